"""What every Store has to do, held against a dict as the model; and what SQLite and PostgreSQL do when they are busy, gone, or refuse a row."""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import itertools
import json
import math
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from urllib.parse import quote

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import shmcache
from shmcache import errors, stores
from shmcache.codec import MsgpackCodec
from shmcache.core import _core
from shmcache.stores import MISSING, Entry
from tests.integration.test_processes import child, ended

numbers = itertools.count()
DATABASES = ["sqlite", "postgresql"]


class DictStore:
    """The model: a Store in a dict."""

    ordered = True

    def __init__(self):
        self.rows = {}  # key -> (encoded value, when it expires or None, version)
        self.codec = MsgpackCodec()
        self.closed = False
        self.lock = threading.Lock()

    def check(self):
        if self.closed:
            raise errors.UsageError("closed")

    def load_many(self, keys, *, timeout=None):
        self.check()
        now = time.time()
        rows = {key: self.rows[key] for key in keys if key in self.rows}
        alive = {key: row for key, row in rows.items() if row[1] is None or row[1] > now}
        return {key: Entry(self.codec.decode(*row[0]), row[1] and row[1] - now) for key, row in alive.items()}

    def store_many(self, items, *, timeout=None, versions=None):
        self.check()
        refused, newer = {}, {}
        with self.lock:
            for key, (value, ttl) in items.items():
                try:
                    encoded = self.codec.encode(value)
                except errors.UnsupportedValue as e:
                    refused[key] = e
                    continue
                there = self.rows.get(key, (None, None, -1))[2]
                version = there if versions is None else versions[key]
                if versions is None or there < version:
                    self.rows[key] = (encoded, None if ttl is None else time.time() + ttl, version)
                elif there > version:
                    newer[key] = there
        if refused:
            raise errors.RowsRefused(refused)
        return newer

    def delete_many(self, keys, *, timeout=None, versions=None):
        self.check()
        newer = {}
        with self.lock:
            for key in keys:
                there = self.rows.get(key, (None, None, -1))[2]
                if versions is None:
                    self.rows.pop(key, None)
                elif there < versions[key]:
                    self.rows[key] = (None, 0, versions[key])  # a tombstone
                elif there > versions[key]:
                    newer[key] = there
        return newer

    def values(self):
        """What is there: {key: value}."""
        return {key: entry.value for key, entry in self.load_many(list(self.rows)).items()}

    def close(self):
        self.closed = True


def function_store():
    behind = DictStore()
    return shmcache.FunctionStore(
        load=lambda key: behind.load_many([key])[key],
        save=lambda key, value, ttl: behind.codec.encode(value) and behind.store_many({key: (value, ttl)}),
        delete=lambda key: behind.delete_many([key]),
    )


class Database:
    """One of the two, with a connection beside the store's, and tables of its own."""

    def __init__(self, url):
        self.url = url
        self.name = url.partition(":")[0]
        self.connect()
        self.table = f"t{os.getpid()}_{next(numbers)}"
        self.stores = []

    def connect(self):
        if self.name == "sqlite":
            self.connection = sqlite3.connect(self.url.removeprefix("sqlite:///"), isolation_level=None, timeout=30)
        else:
            self.connection = psycopg.connect(self.url, autocommit=True)

    def store(self, **options):
        store = shmcache.SQLStore(self.url, self.table, **options)
        self.stores.append(store)
        return store

    def mapped(self, columns, **options):
        """A store on a new table of these columns, the first of which is the key, the second the value."""
        self.run(f"CREATE TABLE {self.table} ({columns})")
        key, value = (column.split()[0] for column in columns.split(",")[:2])
        return self.store(key_column=key, value_column=value, **options)

    def run(self, statement):
        cursor = self.connection.execute(statement)
        return cursor.fetchall() if cursor.description else None

    def rows(self):
        return self.run(f"SELECT count(*) FROM {self.table}")[0][0]

    def waiting(self):
        """How many of the stores' backends of PostgreSQL wait for a lock."""
        return self.run("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shmcache' AND wait_event_type = 'Lock'")[0][0]

    @contextlib.contextmanager
    def locked(self, key):
        """Meanwhile somebody else holds what a write of that key needs."""
        if self.name == "sqlite":
            self.run("BEGIN IMMEDIATE")
        else:
            self.run("BEGIN")
            self.connection.execute(f"SELECT * FROM {self.table} WHERE key = %s FOR UPDATE", [key])
        try:
            yield
        finally:
            self.run("ROLLBACK")


@contextlib.contextmanager
def opened(kind, request, tmp_path):
    database = Database(f"sqlite:///{tmp_path}/store.db" if kind == "sqlite" else request.getfixturevalue("postgres"))
    yield database
    for store in database.stores:
        store.close()
    database.connection.close()


@pytest.fixture(params=DATABASES)
def database(request, tmp_path):
    with opened(request.param, request, tmp_path) as database:
        yield database


@pytest.fixture
def postgresql(request, tmp_path):
    with opened("postgresql", request, tmp_path) as database:
        yield database


@pytest.fixture
def sqlite(request, tmp_path):
    with opened("sqlite", request, tmp_path) as database:
        yield database


@pytest.fixture
def pooled(request, tmp_path, pgbouncer):
    """PostgreSQL, whose stores get there by PgBouncer, in transaction mode."""
    with opened("postgresql", request, tmp_path) as database:
        database.url = pgbouncer
        yield database


@pytest.fixture(params=["dict", "function", *DATABASES, "pgbouncer"])
def store(request, tmp_path):
    if request.param == "pgbouncer":
        yield request.getfixturevalue("pooled").store()
    elif request.param in DATABASES:
        with opened(request.param, request, tmp_path) as database:
            yield database.store()
    else:
        yield DictStore() if request.param == "dict" else function_store()


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in 30 s"
        time.sleep(0.005)  # between two looks


def values(store, keys):
    return {key: entry.value for key, entry in store.load_many(keys).items()}


def in_thread(function, *args, **options):
    """A thread that calls the function, and a list that then has what came of it."""
    result = []

    def run():
        try:
            result.append(function(*args, **options))
        except Exception as e:
            result.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


# ---- every store ------------------------------------------------------------------------------------------------------------------

VALUES = [
    None, True, 0, -1, 2**63, -(2**200), 1.5, math.inf, b"", b"\0\xff" * 10, "", "a\0b", "\ud800", "ü" * 1000, (), (1, (2,)), [1, [2.0]], {"a": {1: b"x"}},
    {1, 2}, frozenset("a"), dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC), dt.timedelta(1), decimal.Decimal("1.10"), uuid.UUID(int=7), 1 + 2j, b"z" * 1_000_000,
]  # fmt: skip


def test_values_come_back_equal_and_of_the_same_type(store):
    items = {b"k%d" % i: (value, None) for i, value in enumerate(VALUES)}
    store.store_many(items)
    found = store.load_many(list(items))
    assert found == {key: Entry(value) for key, (value, _) in items.items()}
    assert [type(found[key].value) for key in items] == [type(value) for value in VALUES]
    store.store_many({b"array": (np.arange(6.0).reshape(2, 3), None)})
    np.testing.assert_array_equal(store.load_many([b"array"])[b"array"].value, np.arange(6.0).reshape(2, 3))


def test_what_is_not_there_is_absent(store):
    assert store.load_many([b"a"]) == {}
    store.store_many({b"b": (1, None)})
    assert values(store, [b"a", b"b", b"b", b"c"]) == {b"b": 1}


def test_nothing_asked_is_nothing_done(store):
    store.store_many({})
    store.delete_many([])
    assert store.load_many([]) == {}


def test_a_value_is_overwritten_with_its_ttl(store):
    store.store_many({b"a": (1, 50), b"b": (2, None)})
    store.store_many({b"a": (3, None)})
    assert store.load_many([b"a", b"b"]) == {b"a": (3, None), b"b": (2, None)}


def test_what_was_deleted_is_gone(store):
    store.store_many({b"a": (1, None), b"b": (2, None)})
    store.delete_many([b"a", b"c", b"a"])
    assert values(store, [b"a", b"b", b"c"]) == {b"b": 2}


def test_a_row_lives_as_long_as_its_ttl(store, monkeypatch):
    now = 1_800_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    store.store_many({b"a": (1, 10), b"b": (2, 0.5), b"c": (3, 0), b"d": (4, None), b"e": (5, -1)})
    assert store.load_many([b"a", b"b", b"c", b"d", b"e"]) == {b"a": (1, 10), b"b": (2, 0.5), b"d": (4, None)}
    now += 0.5
    assert store.load_many([b"a", b"b", b"d"]) == {b"a": (1, 9.5), b"d": (4, None)}
    store.store_many({b"b": (6, 1)})
    assert store.load_many([b"b"]) == {b"b": (6, 1)}


def test_ten_thousand_at_once(store):
    items = {b"%06d" % i: ((i, "x" * (i % 50)), None) for i in range(10_000)}
    store.store_many(items, timeout=60)
    assert values(store, list(items)) == {key: value for key, (value, _) in items.items()}
    store.delete_many(list(items)[::2], timeout=60)
    assert set(store.load_many(list(items), timeout=60)) == set(list(items)[1::2])


def test_keys_of_all_bytes_and_lengths(store):
    rng = random.Random(7)
    keys = [bytes([i]) for i in range(256)] + [b"\0", b"\0\0", b"a\0b", b"\xff\xfe", b"%s", b":k", b"'\""]
    long = rng.randbytes(4096)  # of no use to who compresses
    keys += [long, long[:-1], long[:2048], long[:2049], long[:4095] + bytes([long[-1] ^ 1])]
    store.store_many({key: (key, None) for key in keys})
    assert values(store, keys) == {key: key for key in keys}
    store.delete_many([long])
    assert values(store, keys) == {key: key for key in keys if key != long}


def test_a_value_that_cannot_be_encoded_is_refused_alone(store):
    with pytest.raises(errors.RowsRefused, match=r"b'b': .*would not come back") as e:
        store.store_many({b"a": (1, None), b"b": (object(), None), b"c": (3, None)})
    assert set(e.value.errors) == {b"b"}
    assert values(store, [b"a", b"b", b"c"]) == {b"a": 1, b"c": 3}


@pytest.mark.parametrize("bad", [math.nan, True, False, 1e12, 10**400, "9", b"", [1]], ids=repr)
def test_a_row_whose_ttl_cannot_be_is_refused_alone(database, bad):
    for store in (database.store(), function_store()):
        with pytest.raises(errors.RowsRefused, match="b'b': a ttl") as e:
            store.store_many({b"a": (1, 100), b"b": (2, bad), b"c": (3, None)})
        assert type(e.value.errors[b"b"]) is errors.InvalidTTL
        assert values(store, [b"a", b"b", b"c"]) == {b"a": 1, b"c": 3}


@pytest.mark.parametrize("kind", ["own", "seconds", "integer"])
def test_a_row_that_never_expires(database, kind):
    store = database.store() if kind == "own" else database.mapped(f"k TEXT PRIMARY KEY, v TEXT, e {'DOUBLE PRECISION' if kind == 'seconds' else 'INTEGER'}", ttl_column="e")
    for one in (store, function_store()):
        one.store_many({b"a": ("v", math.inf), b"b": ("v", dt.timedelta(seconds=100))})
        assert one.load_many([b"a", b"b"]) == {b"a": Entry("v"), b"b": ("v", pytest.approx(100, abs=5))}


def test_what_others_have_put_into_the_column_of_expiry(database):
    store = database.mapped("k TEXT PRIMARY KEY, v TEXT, e DOUBLE PRECISION", ttl_column="e")
    infinity = "9e999" if database.name == "sqlite" else "'Infinity'"
    database.run(f"INSERT INTO {database.table} VALUES ('a', 'v', {infinity}), ('b', 'v', -5), ('c', 'v', 1e15), ('d', 'v', NULL)")
    with pytest.raises(errors.RowsRefused, match="b'c': a ttl"):
        store.load_many([b"a", b"b", b"c", b"d"])
    assert store.load_many([b"a", b"b", b"d"]) == {b"a": Entry("v"), b"d": Entry("v")}


def test_an_older_version_never_overwrites(store):
    if not store.ordered:
        for call in (lambda: store.store_many({b"a": (1, None)}, versions={b"a": 1}), lambda: store.delete_many([b"a"], versions={b"a": 1})):
            with pytest.raises(errors.UsageError, match="not ordered"):
                call()
        return
    store.store_many({b"a": ("new", None), b"b": ("old", None)}, versions={b"a": 8, b"b": 6})
    store.store_many({b"a": ("late", 5), b"b": ("newer", 5), b"c": ("first", None)}, versions={b"a": 7, b"b": 2**63 - 1, b"c": 0})
    store.store_many({b"a": ("again", None), b"c": ("again", None)}, versions={b"a": 8, b"c": 0})
    assert values(store, [b"a", b"b", b"c"]) == {b"a": "new", b"b": "newer", b"c": "first"}
    store.delete_many([b"a", b"b", b"c", b"d"], versions={b"a": 8, b"b": 5, b"c": 1, b"d": 9})
    assert values(store, [b"a", b"b", b"c"]) == {b"a": "new", b"b": "newer"}
    store.delete_many([b"a"], versions={b"a": 9})
    assert values(store, [b"a", b"b"]) == {b"b": "newer"}
    # nor what is not there: a delete is remembered
    store.store_many(dict.fromkeys([b"a", b"c", b"d", b"e"], ("late", None)), versions={b"a": 9, b"c": 0, b"d": 8, b"e": 0})
    store.delete_many([b"a"], versions={b"a": 7})
    store.store_many({b"a": ("late", None)}, versions={b"a": 8})
    assert values(store, [b"a", b"b", b"c", b"d", b"e"]) == {b"b": "newer", b"e": "late"}
    store.store_many(dict.fromkeys([b"a", b"d"], ("again", None)), versions={b"a": 10, b"d": 10})
    assert values(store, [b"a", b"d"]) == {b"a": "again", b"d": "again"}


def test_what_has_been_over_for_long_is_purged(database):
    store = database.store()
    store.store_many({b"kept": (1, None), b"long": (2, 1000), b"over": (3, 0)})
    store.store_many({b"deleted": (4, None)}, versions={b"deleted": 1})
    store.delete_many([b"deleted", b"never there"], versions={b"deleted": 2, b"never there": 2})
    assert database.rows() == 5
    assert store.purge() == 0
    assert store.purge(age=-1) == 3
    assert values(store, [b"kept", b"long"]) == {b"kept": 1, b"long": 2}
    assert database.rows() == 2
    store.store_many({b"deleted": (5, None)}, versions={b"deleted": 1})
    assert values(store, [b"deleted"]) == {b"deleted": 5}


def test_a_table_that_is_there_is_purged_if_its_rows_expire(database):
    with pytest.raises(errors.StoreRefused, match="do not expire"):
        database.mapped("k TEXT PRIMARY KEY, v TEXT").purge()
    database.table = f"t{os.getpid()}_{next(numbers)}"
    store = database.mapped("k TEXT PRIMARY KEY, v TEXT, t TIMESTAMP, n BIGINT", ttl_column="t", version_column="n")
    store.store_many({b"kept": ("x", 1000), b"over": ("x", 0), b"deleted": ("x", None)}, versions={b"kept": 1, b"over": 1, b"deleted": 1})
    store.delete_many([b"deleted"], versions={b"deleted": 2})
    assert database.rows() == 2  # others read it
    assert (store.purge(age=-1), database.rows()) == (1, 1)


def test_a_row_without_a_version_is_older_than_any(store):
    if store.ordered:
        store.store_many({b"a": (1, None)})
        store.store_many({b"a": (2, None)}, versions={b"a": 0})
        assert values(store, [b"a"]) == {b"a": 2}


def test_a_closed_store_says_so(store):
    store.store_many({b"a": (1, None)})
    store.close()
    store.close()
    for call in (lambda: store.load_many([b"a"]), lambda: store.store_many({b"a": (1, None)}), lambda: store.delete_many([b"a"])):
        with pytest.raises(errors.UsageError, match="closed"):
            call()


def test_threads_share_a_store(store):
    def work(n):
        for i in range(10):
            keys = [b"%d-%d-%d" % (n, i, j) for j in range(5)]
            store.store_many(dict.fromkeys(keys, (i, None)), timeout=60)
            assert values(store, keys) == dict.fromkeys(keys, i)
        return True

    threads = [in_thread(work, n) for n in range(8)]
    for thread, _ in threads:
        thread.join()
    assert [result for _, result in threads] == [[True]] * 8


class StoreMachine(RuleBasedStateMachine):
    """The same calls on a store and on the model."""

    make = staticmethod(DictStore)
    keys = st.sampled_from([b"a", b"b", b"\0", b"\xff", b"x" * 4096, b"x" * 4095])
    several = st.lists(keys, max_size=8)

    @initialize()
    def begin(self):
        self.model, self.store = DictStore(), self.make()

    @rule(
        items=st.dictionaries(keys, st.tuples(st.one_of(st.none(), st.integers(), st.text(max_size=5), st.binary(max_size=5), st.just(object())),
                                              st.sampled_from([None, None, 0, 1000]))),
        version=st.one_of(st.none(), st.integers(0, 5)),
    )  # fmt: skip
    def store_many(self, items, version):
        versions = None if version is None else dict.fromkeys(items, version)
        told = []
        for store in (self.model, self.store):
            try:
                told.append(store.store_many(items, versions=versions))
            except errors.RowsRefused as e:
                told.append(set(e.errors))
        assert told[0] == told[1]

    @rule(keys=several, version=st.one_of(st.none(), st.integers(0, 5)))
    def delete_many(self, keys, version):
        versions = None if version is None else dict.fromkeys(keys, version)
        told = [store.delete_many(keys, versions=versions) for store in (self.model, self.store)]
        assert told[0] == told[1]

    @rule(keys=several)
    def load_many(self, keys):
        expected, got = self.model.load_many(keys), self.store.load_many(keys)
        assert values_and_kinds(got) == values_and_kinds(expected)

    def teardown(self):
        self.store.close()


def values_and_kinds(found):
    return {key: (entry.value, type(entry.value), entry.ttl is None) for key, entry in found.items()}


def test_a_database_does_as_the_model_does(database):
    def make():
        database.table = f"t{os.getpid()}_{next(numbers)}"
        return database.store()

    machine = type("Machine", (StoreMachine,), {"make": staticmethod(make)})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
    )


# ---- between processes -------------------------------------------------------------------------------------------------------------


def test_processes_that_begin_at_once_make_one_table(database):
    code = f"""
import shmcache, sys, time
store = shmcache.SQLStore({database.url!r}, {database.table!r}, timeout=60)
with store._connections.transaction(time.monotonic() + 60):
    print("connected", flush=True)
sys.stdin.readline()
n = int(sys.argv[1])
store.store_many({{b"%d" % i: (n, None) for i in range(n, 100, 4)}})
store.close()
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for n in range(4)]
    for p in running:
        assert p.stdout.readline() == b"connected\n"
    for p in running:
        p.stdin.close()
        p.stdout.close()
    assert [p.wait(60) for p in running] == [0] * 4
    assert values(database.store(), [b"%d" % i for i in range(100)]) == {b"%d" % i: i % 4 for i in range(100)}


def test_who_makes_the_table_later_waits_for_who_makes_it(postgresql):
    """IF NOT EXISTS does not see a table that is not committed, and fails when it is."""
    postgresql.run("CREATE FUNCTION made() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_xact_lock(43); END $$")
    postgresql.run("CREATE EVENT TRIGGER made ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION made()")
    postgresql.run("SELECT pg_advisory_lock(43)")
    threads = [in_thread(postgresql.store().store_many, {b"%d" % i: (i, None)}, timeout=60) for i in range(3)]
    until(lambda: postgresql.waiting() == 3)
    postgresql.run("SELECT pg_advisory_unlock(43)")
    for thread, _ in threads:
        thread.join()
    postgresql.run("DROP FUNCTION made CASCADE")
    assert [result for _, result in threads] == [[{}]] * 3
    assert postgresql.rows() == 3


def test_a_child_has_connections_of_its_own(database):
    def connection(store):
        with store._connections.transaction(time.monotonic() + 30) as c:
            driver = c.connection.driver_connection
            return driver if database.name == "sqlite" else driver.info.backend_pid

    store = database.store()
    store.store_many({b"a": (0, None)})
    before = connection(store)

    def run():
        assert connection(store) != before
        for i in range(20):
            store.store_many({b"child": (i, None)})
            assert values(store, [b"a", b"child"]) == {b"a": 0, b"child": i}
        grandchild = child(lambda: values(store, [b"child"]) == {b"child": 19})
        return ended(grandchild) == 0

    pid = child(run)
    for i in range(20):
        store.store_many({b"parent": (i, None)})
        assert values(store, [b"a", b"parent"]) == {b"a": 0, b"parent": i}
    assert ended(pid) == 0
    assert values(store, [b"a", b"child", b"parent"]) == {b"a": 0, b"child": 19, b"parent": 19}


def test_a_child_does_not_lose_what_it_writes_when_its_parent_ends_first(database):
    """With SQLite a parent that thinks to be the last one removes the log that the child goes on writing to."""
    store = database.store()
    store.store_many({b"a": (0, None)})
    database.connection.close()
    go, ready = os.pipe(), os.pipe()

    def run():
        store.load_many([b"a"])
        os.write(ready[1], b"!")
        os.read(go[0], 1)
        store.store_many({b"b": (1, None)})
        return True

    pid = child(run)
    os.read(ready[0], 1)
    store.close()
    os.write(go[1], b"!")
    assert ended(pid) == 0
    for fd in (*go, *ready):
        os.close(fd)
    database.connect()
    assert values(database.store(), [b"a", b"b"]) == {b"a": 0, b"b": 1}
    if database.name == "sqlite":
        assert database.run("PRAGMA integrity_check") == [("ok",)]


def test_a_pickled_store_is_another_one_of_the_same_table(database):
    store = database.store(timeout=7.0, pool_size=2, codec="pickle")
    store.store_many({b"a": (1, None)})
    with contextlib.closing(pickle.loads(pickle.dumps(store))) as other:
        assert other.load_many([b"a"]) == {b"a": Entry(1)}
        other.store_many({b"b": ({1}, None)}, versions={b"b": 5})
        assert (other.ordered, other._timeout, other._connections.pool_size) == (True, 7.0, 2)
    assert values(store, [b"a", b"b"]) == {b"a": 1, b"b": {1}}
    store.close()
    with pytest.raises(errors.UsageError, match="closed"):
        pickle.dumps(store)


def test_a_pickled_store_knows_its_password():
    store = pickle.loads(pickle.dumps(shmcache.SQLStore("postgresql://u:se%40cret%3F@host/x?application_name=a%20b")))
    assert store._connections.url.password == "se@cret?"
    assert store._connections.url.query["application_name"] == "a b"
    assert "cret" not in repr(store)


class Larger(shmcache.SQLStore):
    """A store of a user's, with something of its own."""

    def __init__(self, path):
        super().__init__(f"sqlite:///{path}")
        self.more = 5


@pytest.mark.parametrize("url", ["sqlite:///rows.db", "sqlite:///rows.db?uri=true", "sqlite:///file:rows.db?uri=true", "sqlite:///./x/../file:rows.db"])
@pytest.mark.parametrize("how", ["fork", "pickle", "here"])
def test_a_relative_path_is_one_from_where_the_store_was_made(tmp_path, monkeypatch, url, how):
    made, elsewhere = tmp_path / "made?%41 #1", tmp_path / "elsewhere"
    made.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(made)
    with contextlib.closing(shmcache.SQLStore(url)) as store:
        monkeypatch.chdir(elsewhere)
        if how == "fork":
            assert ended(child(lambda: store.store_many({b"k": (1, None)}) == {} and store.close() is None)) == 0
        elif how == "pickle":
            with contextlib.closing(pickle.loads(pickle.dumps(store))) as other:
                other.store_many({b"k": (1, None)})
        assert store.load_many([b"k"]) == ({} if how == "here" else {b"k": Entry(1)})
    assert [path.name for path in made.iterdir()] == ["file:rows.db" if url.endswith("/file:rows.db") else "rows.db"]
    assert list(elsewhere.iterdir()) == []


def test_a_subclass_of_a_store_pickles_whole(tmp_path):
    with contextlib.closing(Larger(tmp_path / "s.db")) as store, contextlib.closing(pickle.loads(pickle.dumps(store))) as other:
        store.store_many({b"k": (1, None)})
        assert (type(other), other.more, other.load_many([b"k"])) == (Larger, 5, {b"k": Entry(1)})


def test_files_of_a_connection_are_found_from_where_the_store_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = shmcache.SQLStore("postgresql://host/x?sslrootcert=ca.pem&sslcert=/etc/a.pem&application_name=a.pem")._connections.url
    assert url.query == {"sslrootcert": f"{tmp_path}/ca.pem", "sslcert": "/etc/a.pem", "application_name": "a.pem"}
    assert shmcache.SQLStore("postgresql://host/x?sslrootcert=system")._connections.url.query["sslrootcert"] == "system"


def test_forks_while_threads_write_lose_nothing(database):
    store = database.store(pool_size=3, timeout=60.0)
    store.store_many({b"a": (0, None)})
    done = threading.Event()

    def work(n):
        for i in itertools.count(1):
            store.store_many({b"%d-%d" % (n, i): (i, None), b"last-%d" % n: (i, None)})
            if done.is_set():
                return i
        return 0

    threads = [in_thread(work, n) for n in range(4)]
    try:
        for n in range(8):
            pid = child(lambda n=n: store.store_many({b"child-%d" % n: (n, None)}) == {} and values(store, [b"a", b"child-%d" % n]) == {b"a": 0, b"child-%d" % n: n})
            assert ended(pid) == 0
    finally:
        done.set()
        for thread, _ in threads:
            thread.join()
    last = [result[0] for _, result in threads]
    assert values(store, [b"last-%d" % n for n in range(4)]) == {b"last-%d" % n: i for n, i in enumerate(last)}
    assert database.rows() == 1 + 8 + 4 + sum(last)
    if database.name == "sqlite":
        assert database.run("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_a_commit_of_a_dead_process_comes_before_what_its_successor_does(postgresql, isolation):
    """The process is killed while its COMMIT waits in the database: its rows are not to be seen yet, and will be. Whatever the default isolation is."""
    postgresql.url += "&options=" + quote(f"-cdefault_transaction_isolation={isolation}".replace(" ", "\\ "))
    store = postgresql.store()
    assert store.load_many([b"a"]) == {}
    postgresql.run("CREATE OR REPLACE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NULL; END $$")
    postgresql.run(
        f"CREATE CONSTRAINT TRIGGER wait AFTER INSERT OR UPDATE ON {postgresql.table} DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()"
    )
    code = f"import shmcache; shmcache.SQLStore({postgresql.url!r}, {postgresql.table!r}).store_many({{b'a': ('old', None)}}, timeout=60, versions={{b'a': 5}})"
    mapped = postgresql.store(key_column="key", value_column="value", version_column="version")  # there a delete is a DELETE
    for successor, expected in (
        (lambda: store.store_many({b"a": ("new", None)}, timeout=60, versions={b"a": 6}), {b"a": "new"}),
        (lambda: store.delete_many([b"a"], timeout=60, versions={b"a": 6}), {}),
        (lambda: mapped.delete_many([b"a"], timeout=60, versions={b"a": 6}), {}),
    ):
        postgresql.run(f"DELETE FROM {postgresql.table}")
        postgresql.run("SELECT pg_advisory_lock(42)")
        dead = subprocess.Popen([sys.executable, "-c", code])
        until(lambda: postgresql.run("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query = 'COMMIT'")[0][0] == 1)
        dead.kill()
        assert dead.wait() == -signal.SIGKILL
        thread, result = in_thread(successor)
        until(lambda thread=thread: postgresql.waiting() == 2 or not thread.is_alive())
        assert postgresql.rows() == 0
        postgresql.run("SELECT pg_advisory_unlock(42)")
        thread.join()
        until(lambda: postgresql.waiting() == 0)
        assert result == [{}]
        assert values(store, [b"a"]) == expected


# ---- tables that are there ---------------------------------------------------------------------------------------------------------


COLUMNS = {
    "bytes": ("BLOB", "BYTEA", [b"", b"x", "text", (1, 2), None]),  # the codec's
    "text": ("TEXT", "TEXT", ["", "ü", None]),
    "integer": ("INTEGER", "BIGINT", [0, -(2**63), 2**63 - 1, None]),
    "float": ("REAL", "DOUBLE PRECISION", [0.1, -1e300, None]),
    "json": ("JSON", "JSONB", [{"a": [1, None, "x"]}, [], 1, "x", True, None]),
    "timestamp": ("TIMESTAMP", "TIMESTAMP", [dt.datetime(2026, 3, 1, 12, 30, 0, 5), None]),
    "boolean": ("BOOLEAN", "BOOLEAN", [True, False, None]),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_of_each_kind_gives_its_values_back(database, kind):
    *types, good = COLUMNS[kind]
    store = database.mapped(f"k TEXT PRIMARY KEY, v {types[DATABASES.index(database.name)]}")
    items = {b"k%d" % i: (value, None) for i, value in enumerate(good)}
    store.store_many(items)
    got = values(store, list(items))
    assert [(type(got[key]), got[key]) for key in items] == [(type(value), value) for value, _ in items.values()]
    assert not store.ordered


@pytest.mark.parametrize(("kind", "bad"), [("text", b"x"), ("text", 1), ("integer", True), ("integer", 1.0), ("float", 1), ("boolean", 1), ("integer", 2**63)])
def test_a_value_that_the_column_would_change_is_refused(database, kind, bad):
    store = database.mapped(f"k TEXT PRIMARY KEY, v {COLUMNS[kind][DATABASES.index(database.name)]}")
    with pytest.raises(errors.RowsRefused) as e:
        store.store_many({b"good": (None, None), b"bad": (bad, None)})
    assert set(e.value.errors) == {b"bad"}
    assert values(store, [b"good", b"bad"]) == {b"good": None}


def test_rows_of_others_are_read(database):
    store = database.mapped("name TEXT PRIMARY KEY, age INTEGER, until TIMESTAMP, seconds INTEGER", ttl_column="until")
    database.run(f"INSERT INTO {database.table} VALUES ('ada', 36, NULL, NULL), ('bob', 7, '2001-01-01 00:00:00', NULL), ('cy', 1, '2101-01-01 00:00:00', NULL)")
    got = store.load_many([b"ada", b"bob", b"cy"])
    assert values_and_kinds(got) == {b"ada": (36, int, True), b"cy": (1, int, False)}
    assert got[b"cy"].ttl == pytest.approx(dt.datetime(2101, 1, 1, tzinfo=dt.UTC).timestamp() - time.time(), abs=60)


@pytest.mark.parametrize("kind", ["TIMESTAMP", "TIMESTAMP WITH TIME ZONE", "BIGINT", "DOUBLE PRECISION", "NUMERIC(20,3)"])
def test_expiry_in_columns_of_every_kind(database, kind):
    store = database.mapped(f"k TEXT PRIMARY KEY, v TEXT, e {kind}, n BIGINT", ttl_column="e", version_column="n")
    store.store_many({b"a": ("x", 1000), b"b": ("y", None), b"c": ("z", -5)})
    got = store.load_many([b"a", b"b", b"c"])
    assert set(got) == {b"a", b"b"}
    assert got[b"a"].ttl == pytest.approx(1000, abs=60)
    assert got[b"b"].ttl is None
    assert store.ordered


def test_keys_of_text(database):
    store = database.mapped("k VARCHAR(50) PRIMARY KEY, v TEXT")
    with pytest.raises(errors.RowsRefused, match="not UTF-8") as e:
        store.store_many({b"\xff": ("x", None), "ü".encode(): ("y", None)})
    assert set(e.value.errors) == {b"\xff"}
    assert database.run(f"SELECT k FROM {database.table}") == [("ü",)]
    for call in (store.load_many, store.delete_many):
        with pytest.raises(errors.RowsRefused, match="not UTF-8"):
            call([b"\xff", "ü".encode()])
    assert store.load_many(["ü".encode()]) == {}


def test_keys_that_only_the_database_refuses(postgresql):
    store = postgresql.mapped("k VARCHAR(50) PRIMARY KEY, v TEXT")
    store.store_many({b"a": ("x", None)})
    with pytest.raises(errors.RowsRefused) as e:
        store.load_many([b"a", b"\0", b"b"])
    assert set(e.value.errors) == {b"\0"}
    with pytest.raises(errors.RowsRefused) as e:
        store.delete_many([b"a", b"\0", b"b"])
    assert set(e.value.errors) == {b"\0"}
    assert store.load_many([b"a"]) == {}


def test_keys_of_integers(database):
    store = database.mapped("id INTEGER PRIMARY KEY, v TEXT")
    with pytest.raises(errors.RowsRefused, match="decimal number") as e:
        store.store_many({b"17": ("x", None), b"-3": ("y", None), b"017": ("z", None), b"x": ("z", None), b" 1": ("z", None)})
    assert set(e.value.errors) == {b"017", b"x", b" 1"}
    assert sorted(database.run(f"SELECT id, v FROM {database.table}")) == [(-3, "y"), (17, "x")]
    assert values(store, [b"17", b"-3", b"18"]) == {b"17": "x", b"-3": "y"}


def test_hooks_come_in_place_of_the_columns_own(database):
    store = database.mapped(
        "id INTEGER PRIMARY KEY, v TEXT",
        encode_key=lambda key: int(key.removeprefix(b"user:")),
        encode=lambda value: "/".join(value),
        decode=lambda text: text.split("/"),
    )
    with pytest.raises(errors.RowsRefused) as e:
        store.store_many({b"user:1": (["a", "b"], None), b"x": (["a"], None), b"user:2": (7, None)})
    assert set(e.value.errors) == {b"x", b"user:2"}
    assert database.run(f"SELECT * FROM {database.table}") == [(1, "a/b")]
    assert values(store, [b"user:1", b"user:01"]) == {b"user:1": ["a", "b"], b"user:01": ["a", "b"]}


def test_a_hook_that_gives_what_no_column_takes(database):
    store = database.mapped("k TEXT PRIMARY KEY, v TEXT", encode=lambda value: value)
    with pytest.raises(errors.RowsRefused) as e:
        store.store_many({b"a": ("x", None), b"b": ({1}, None), b"c": ("z", None)})
    assert set(e.value.errors) == {b"b"}
    assert values(store, [b"a", b"b", b"c"]) == {b"a": "x", b"c": "z"}


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_poison_rows_are_found_and_the_others_stored(database, n):
    store = database.mapped("k TEXT PRIMARY KEY, v TEXT CHECK (length(v) < 5)")
    rng = random.Random(n)
    for poisoned in (1, n // 3, n):
        items = {b"%d-%d" % (poisoned, i): (f"{i}", None) for i in range(n)}
        poison = set(rng.sample(sorted(items), poisoned))
        with pytest.raises(errors.RowsRefused) if poison else contextlib.nullcontext() as e:
            store.store_many({key: ("too long", None) if key in poison else item for key, item in items.items()})
        assert not poison or set(e.value.errors) == poison
        assert not poison or all(isinstance(error, errors.StoreRefused) for error in e.value.errors.values())
        assert values(store, list(items)) == {key: value for key, (value, _) in items.items() if key not in poison}


@pytest.mark.parametrize("kind", ["VARCHAR(8)", "CHAR(8)", "TEXT"])
def test_a_delete_of_a_key_too_long_for_its_column_deletes_no_other(postgresql, kind):
    store = postgresql.mapped(f"k {kind} PRIMARY KEY, v TEXT, n BIGINT", version_column="n")
    postgresql.run(f"INSERT INTO {postgresql.table} VALUES ('user:100', 'precious', 1)")
    store.delete_many([b"user:1001", b"user:10"], versions={b"user:1001": 5, b"user:10": 5})
    assert postgresql.run(f"SELECT v, n FROM {postgresql.table}") == [("precious", 1)]
    store.delete_many([b"user:100"], versions={b"user:100": 5})
    assert postgresql.rows() == 0


def test_a_limit_that_was_rolled_back_is_set_again(postgresql):
    """A refused half takes the limit back that was set in it; the next half, and COMMIT, are not to have the one of the transaction's begin."""
    store = postgresql.store()
    columns, connections, refused, left = store._open(time.monotonic() + 60), store._connections, {}, []
    deadline = time.monotonic() + 60

    def action(c, rows):
        if rows == ["bad"]:
            c.exec_driver_sql("SELECT pg_sleep(0.2)")
            connections.limit(c, deadline)
            c.exec_driver_sql(f"INSERT INTO {postgresql.table} (key) VALUES (NULL)")
        left.append(c.exec_driver_sql("SHOW statement_timeout").scalar())

    with connections.transaction(deadline, write=True) as c:
        before = c.exec_driver_sql("SHOW statement_timeout").scalar()
        store._sift(c, lambda c, rows: action(c, [name for name, _ in rows]), [("bad", 0), ("good", 0)], deadline, refused)
    assert columns is not None and set(refused) == {"bad"}
    assert len(left) == 1 and left != [before]


def test_what_is_not_settled_stays_so_when_the_time_is_over(monkeypatch):
    def save(key, value, ttl):
        if key == b"a":
            raise ValueError("a client's own error: it may land later")
        time.sleep(0.3)  # the store is slow

    store = shmcache.FunctionStore(load=lambda key: None, save=save)
    with pytest.raises(errors.StoreUnavailable, match="the time was over") as raised:
        store.store_many({b"a": (1, None), b"b": (1, None), b"c": (1, None)}, timeout=0.2)
    assert raised.value.unsettled


def test_a_value_too_long_for_its_column(postgresql):
    store = postgresql.mapped("k TEXT PRIMARY KEY, v VARCHAR(3)")
    with pytest.raises(errors.RowsRefused, match="too long"):
        store.store_many({b"a": ("four", None), b"b": ("3.3", None)})
    assert values(store, [b"a", b"b"]) == {b"b": "3.3"}


@pytest.mark.parametrize(
    ("table", "options"),
    [
        (None, {"create": False}),
        (None, {"key_column": "k", "value_column": "v"}),
        ("k TEXT PRIMARY KEY, v TEXT", {}),
        ("k TEXT PRIMARY KEY, v TEXT", {"key_column": "k", "value_column": "w"}),
        ("k TEXT PRIMARY KEY, v TEXT", {"key_column": "k", "value_column": "v", "version_column": "n"}),
        ("k TEXT, v TEXT", {"key_column": "k", "value_column": "v"}),
    ],
)
def test_a_table_that_is_not_as_it_was_said_to_be(database, table, options):
    if table is not None:
        database.run(f"CREATE TABLE {database.table} ({table})")
    store = database.store(**options)
    with pytest.raises(errors.StoreRefused) as e:
        store.store_many({b"%d" % i: ("x", None) for i in range(100)})
    assert not isinstance(e.value, errors.RowsRefused)


def test_a_schema_of_its_own(postgresql):
    postgresql.run("CREATE SCHEMA IF NOT EXISTS app")
    postgresql.table = f"app.{postgresql.table}"
    postgresql.store().store_many({b"a": (1, None)})
    assert postgresql.rows() == 1
    assert values(postgresql.store(), [b"a"]) == {b"a": 1}


def test_rights_that_are_missing_refuse_the_call(postgresql):
    postgresql.store().store_many({b"a": (1, None)})
    postgresql.run("DROP ROLE IF EXISTS reader")
    postgresql.run("CREATE ROLE reader LOGIN")
    postgresql.run(f"GRANT SELECT ON {postgresql.table} TO reader")
    postgresql.url = postgresql.url.replace("postgres@", "reader@")
    store = postgresql.store()
    assert values(store, [b"a"]) == {b"a": 1}
    with pytest.raises(errors.StoreRefused, match="permission denied") as e:
        store.store_many({b"a": (1, None), b"b": (1, None)})
    assert not isinstance(e.value, errors.RowsRefused)


def test_a_pickle_is_read_by_who_asked_for_it(database):
    database.store(codec="pickle").store_many({b"a": (range(3), None)})
    database.store().store_many({b"b": ({}, None), b"c": ({"x": (1,)}, None)})
    assert values(database.store(codec="pickle"), [b"a", b"b", b"c"]) == {b"a": range(3), b"b": {}, b"c": {"x": (1,)}}
    with pytest.raises(errors.RowsRefused, match="pickled") as e:
        database.store().load_many([b"a", b"b"])
    assert set(e.value.errors) == {b"a"}


def test_a_damaged_row_is_named(database):
    store = database.store()
    store.store_many({b"a": (1, None), b"b": ((1, 2), None)})
    database.run(f"UPDATE {database.table} SET value = {'X' if database.name == 'sqlite' else ''}'{'c1' if database.name == 'sqlite' else chr(92) + 'xc1'}' WHERE version IS NULL AND length(value) = 1")
    with pytest.raises(errors.RowsRefused) as e:
        store.load_many([b"a", b"b"])
    assert set(e.value.errors) == {b"a"}


# ---- trouble -----------------------------------------------------------------------------------------------------------------------


def test_a_store_that_is_locked_is_unavailable_in_time_and_works_again(database):
    store = database.store()
    store.store_many({b"k": (0, None)})
    others = {b"a%d" % i: (i, None) for i in range(10)}
    with database.locked(b"k"):
        for call in (lambda: store.store_many({**others, b"k": (1, None)}, timeout=0.3), lambda: store.delete_many([*others, b"k"], timeout=0.3)):
            begun = time.monotonic()
            with pytest.raises(errors.StoreUnavailable, match=r"locked|timeout"):
                call()
            assert 0.25 < time.monotonic() - begun < 5
        assert values(store, [b"k", *others]) == {b"k": 0}  # read while it is locked; and nothing of the batch is there
        if database.name == "postgresql":
            assert database.waiting() == 0
    store.store_many({**others, b"k": (1, None)})
    assert values(store, [b"k", b"a0"]) == {b"k": 1, b"a0": 0}


def test_a_lock_that_ends_in_time_is_waited_for(database):
    store = database.store()
    store.store_many({b"k": (0, None)})
    with database.locked(b"k"):
        thread, result = in_thread(store.store_many, {b"k": (1, None)}, timeout=30)
        until(lambda: database.name == "sqlite" or database.waiting() == 1)
    thread.join()
    assert result == [{}]


def test_a_query_that_takes_for_ever_is_ended(database):
    endless = {
        "sqlite": "SELECT 'a' AS k, CAST(count(*) AS TEXT) AS v FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n)",
        "postgresql": "SELECT 'a'::text AS k, pg_sleep(100)::text AS v",
    }
    database.run(f"CREATE VIEW {database.table} AS {endless[database.name]}")
    store = database.store(key_column="k", value_column="v", encode_key=bytes.decode, encode=str, decode=str)
    store.load_many([])
    begun = time.monotonic()
    with pytest.raises(errors.StoreUnavailable, match=r"interrupted|timeout"):
        store.load_many([b"a"], timeout=1)
    assert time.monotonic() - begun < 5
    if database.name == "postgresql":
        assert database.run("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shmcache' AND state = 'active'") == [(0,)]
    database.table += "_table"
    store = database.store()
    store.store_many({b"a": (1, None)})
    assert values(store, [b"a"]) == {b"a": 1}


def test_what_is_ended_leaves_nothing(database):
    if database.name == "sqlite":
        database.run("CREATE VIEW endless AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n")
        action = "BEGIN SELECT count(*) FROM endless; END"
    else:
        database.run("CREATE OR REPLACE FUNCTION endless() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(100); RETURN NEW; END $$")
        action = "EXECUTE FUNCTION endless()"
    store = database.mapped("k TEXT PRIMARY KEY, v TEXT")
    database.run(f"CREATE TRIGGER slow BEFORE INSERT ON {database.table} FOR EACH ROW WHEN (NEW.v = 'slow') {action}")
    assert store.load_many([b"a"]) == {}
    with pytest.raises(errors.StoreUnavailable, match=r"interrupted|timeout"):
        store.store_many({b"a": ("fast", None), b"b": ("fast", None), b"z": ("slow", None)}, timeout=1)
    assert database.rows() == 0
    store.store_many({b"a": ("fast", None)})
    assert database.rows() == 1


def test_a_call_ends_in_time_though_each_statement_would(database):
    """The time is the call's: what the first statement took is not there for the next."""
    store = database.mapped("k TEXT PRIMARY KEY, v TEXT CHECK (v <> 'bad')")
    assert store.load_many([b"a"]) == {}
    with pytest.raises(errors.StoreUnavailable, match="time"):
        store.store_many({b"%05d" % i: ("bad", None) for i in range(10_000)}, timeout=0.5)
    assert database.rows() == 0


SLEEPS = "CREATE OR REPLACE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(TG_ARGV[0]::float); RETURN COALESCE(NEW, OLD); END $$"


@pytest.mark.parametrize("action", ["store", "delete", "versioned store", "versioned delete"])
def test_a_call_ends_in_time_though_each_row_would(postgresql, action):
    store = postgresql.mapped("k TEXT PRIMARY KEY, v TEXT, n BIGINT", version_column="n")
    postgresql.run(SLEEPS)
    postgresql.run(f"INSERT INTO {postgresql.table} SELECT lpad(i::text, 5, '0'), 'old', 0 FROM generate_series(0, 999) i")
    postgresql.run(f"CREATE TRIGGER slow BEFORE INSERT OR DELETE ON {postgresql.table} FOR EACH ROW EXECUTE FUNCTION slow('0.02')")
    keys = [b"%05d" % i for i in range(1000)]
    versions = dict.fromkeys(keys, 1) if "versioned" in action else None
    begun = time.monotonic()
    with pytest.raises(errors.StoreUnavailable, match="time"):
        if "store" in action:
            store.store_many(dict.fromkeys(keys, ("new", None)), timeout=1, versions=versions)
        else:
            store.delete_many(keys, timeout=1, versions=versions)
    assert time.monotonic() - begun < 10  # and not 20
    assert postgresql.run(f"SELECT count(*), min(v), max(v), max(n) FROM {postgresql.table}") == [(1000, "old", "old", 0)]
    assert postgresql.run("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shmcache' AND state <> 'idle'") == [(0,)]


@pytest.mark.parametrize("at", ["lock", "commit"])
def test_what_was_waited_for_is_not_there_for_what_comes_next(postgresql, at):
    """What waits and what comes then take two thirds of the time each."""
    store = postgresql.store()
    assert store.load_many([b"a"]) == {}
    postgresql.run(SLEEPS)
    postgresql.run(f"CREATE TRIGGER slow BEFORE INSERT ON {postgresql.table} FOR EACH ROW EXECUTE FUNCTION slow('2')")
    if at == "commit":
        postgresql.run(
            f"CREATE CONSTRAINT TRIGGER late AFTER INSERT ON {postgresql.table} DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow('2')"
        )
        with pytest.raises(errors.StoreUnavailable, match="time") as raised:
            store.store_many({b"a": (1, None)}, timeout=3)
        assert raised.value.unsettled
    else:
        postgresql.run("BEGIN")
        postgresql.connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [postgresql.table])
        thread, result = in_thread(store.store_many, {b"a": (1, None)}, timeout=3, versions={b"a": 1})
        until(lambda: postgresql.waiting() == 1)
        postgresql.run("SELECT pg_sleep(2)")
        postgresql.run("COMMIT")
        thread.join()
        assert isinstance(result[0], errors.StoreUnavailable)
        assert not result[0].unsettled
    assert postgresql.rows() == 0


@pytest.mark.parametrize("when", ["before", "meanwhile", "at commit"])
def test_a_server_that_is_stopped_is_not_waited_for(postgresql, when):
    """Its kernel answers for it."""
    store = postgresql.store()
    store.store_many({b"k": (0, None)})
    pid = postgresql.run("SELECT pid FROM pg_stat_activity WHERE application_name = 'shmcache' ORDER BY backend_start DESC")[0][0]
    if when == "meanwhile":
        with postgresql.locked(b"k"):
            thread, result = in_thread(store.store_many, {b"k": (1, None)}, timeout=2)
            until(lambda: postgresql.waiting() == 1)
            os.kill(pid, signal.SIGSTOP)
    elif when == "at commit":
        postgresql.run(SLEEPS)
        postgresql.run(
            f"CREATE CONSTRAINT TRIGGER late AFTER UPDATE ON {postgresql.table} DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow('0.5')"
        )
        thread, result = in_thread(store.store_many, {b"k": (1, None)}, timeout=2)
        until(lambda: postgresql.run(f"SELECT query FROM pg_stat_activity WHERE pid = {pid} AND state = 'active'") == [("COMMIT",)])
        os.kill(pid, signal.SIGSTOP)
    else:
        os.kill(pid, signal.SIGSTOP)
        thread, result = in_thread(store.store_many, {b"k": (1, None)}, timeout=2)
    try:
        thread.join(25)
        assert not thread.is_alive()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert isinstance(result[0], errors.StoreUnavailable)
    assert result[0].unsettled is (when == "at commit")
    until(lambda: postgresql.run(f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}") == [(0,)])
    if when != "at commit":
        assert values(store, [b"k"]) == {b"k": 0}
    store.store_many({b"k": (2, None)})
    assert values(store, [b"k"]) == {b"k": 2}


# ---- a pooler before the database ---------------------------------------------------------------------------------------------------


def test_each_transaction_may_have_another_connection(pooled):
    """More clients than the pooler has connections, with statements that are told apart by their text alone."""
    store, other = pooled.store(pool_size=20), pooled.store(pool_size=20)
    store.load_many([])

    def some(i):
        for n in range(30):
            key = b"%d" % i
            (store, other)[n & 1].store_many({key: (n, None)}, versions={key: n} if i & 1 else None, timeout=60)
            assert values((store, other)[i & 1], [key]) == {key: n}
            if n & 1:
                (store, other)[i & 1].delete_many([key, b"none"], timeout=60)
        return i

    threads = [in_thread(some, i) for i in range(12)]
    for thread, _ in threads:
        thread.join()
    assert [result for _, result in threads] == [[i] for i in range(12)]


def test_prepared_statements_are_for_those_who_ask(pooled, postgresql):
    """A pooler that does not know of them gives another's connection, or another's statement: it is said what to do."""
    pooled.store().load_many([])
    pooled.url += "&prepare_threshold=0"
    stores = [pooled.store() for _ in range(8)]

    def some(store):
        for _ in range(200):
            store.load_many([b"k"], timeout=60)

    threads = [in_thread(some, store) for store in stores]
    for thread, _ in threads:
        thread.join()
    [error, *_] = [result[0] for _, result in threads if result[0] is not None]
    assert isinstance(error, errors.StoreUnavailable)
    assert "prepare_threshold" in str(error)
    postgresql.url += "&prepare_threshold=0"
    store = postgresql.store()
    store.store_many({b"k": (1, None)})
    assert values(store, [b"k"]) == {b"k": 1}


def test_more_threads_than_connections_wait_for_their_turn(database):
    store = database.store(pool_size=1)
    store.store_many({b"k": (0, None)})
    with database.locked(b"k"):
        thread, result = in_thread(store.store_many, {b"k": (1, None)}, timeout=30)
        until(lambda: store._connections._slots._value == 0)
        with pytest.raises(errors.StoreUnavailable, match="connections"):
            store.load_many([b"k"], timeout=0.1)
    thread.join()
    assert result == [{}]
    assert values(store, [b"k"]) == {b"k": 1}


def test_a_connection_lost_in_a_transaction(postgresql):
    store = postgresql.store()
    store.store_many({b"k": (0, None)})
    with postgresql.locked(b"k"):
        thread, result = in_thread(store.store_many, {b"a": (1, None), b"k": (1, None)}, timeout=60)
        until(lambda: postgresql.waiting() == 1)
        assert postgresql.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'shmcache' AND wait_event_type = 'Lock'") == [(True,)]
        thread.join()
    assert type(result[0]) is errors.StoreUnavailable
    assert values(store, [b"a", b"k"]) == {b"k": 0}
    store.store_many({b"k": (1, None)})
    assert values(store, [b"k"]) == {b"k": 1}


def test_a_connection_lost_between_two_calls_is_not_noticed(postgresql):
    store = postgresql.store()
    store.store_many({b"k": (0, None)})
    count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shmcache'"
    postgresql.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'shmcache'")
    until(lambda: postgresql.run(count) == [(0,)])
    assert values(store, [b"k"]) == {b"k": 0}


def test_a_deadlock_is_to_be_tried_again(postgresql):
    store = postgresql.store()
    store.store_many({b"a": (0, None), b"k": (0, None)})
    with postgresql.locked(b"k"):
        thread, result = in_thread(store.store_many, {b"a": (1, None), b"k": (1, None)}, timeout=60)
        until(lambda: postgresql.waiting() == 1)
        postgresql.run("SET LOCAL deadlock_timeout = '100s'")  # the store's backend is the one to notice
        postgresql.connection.execute(f"SELECT * FROM {postgresql.table} WHERE key = 'a' FOR UPDATE")
        thread.join()
    assert type(result[0]) is errors.StoreUnavailable
    assert "deadlock" in str(result[0])
    assert values(store, [b"a", b"k"]) == {b"a": 0, b"k": 0}


def test_a_server_that_is_not_there(tmp_path, postgresql):
    store = shmcache.SQLStore(f"postgresql://postgres@/postgres?host={tmp_path}")
    with pytest.raises(errors.StoreUnavailable, match="try again"):
        store.load_many([b"a"])
    store.close()
    store = shmcache.SQLStore(f"sqlite:///{tmp_path}/none/a.db")
    with pytest.raises(errors.StoreUnavailable, match="unable to open"):
        store.load_many([b"a"])
    store.close()


def test_a_process_stopped_in_a_transaction_does_not_hold_its_locks(postgresql):
    store = postgresql.store()
    store.store_many({b"k": (0, None)})
    code = f"""
import shmcache, sys, time
store = shmcache.SQLStore({postgresql.url!r}, {postgresql.table!r})
store.load_many([])
with store._connections.transaction(time.monotonic() + 1, write=True) as c:
    c.exec_driver_sql("UPDATE {postgresql.table} SET version = 1")
    print("holds it", flush=True)
    sys.stdin.read()
"""
    p = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert p.stdout.readline() == b"holds it\n"
    p.send_signal(signal.SIGSTOP)
    store.store_many({b"k": (1, None)}, timeout=30)
    p.kill()
    p.wait()
    p.stdin.close()
    p.stdout.close()
    assert values(store, [b"k"]) == {b"k": 1}


def test_sqlite_readers_and_a_writer_do_not_wait_for_each_other(sqlite):
    store = sqlite.store(timeout=5)
    store.store_many({b"k": (0, None)})
    sqlite.run("BEGIN")
    assert sqlite.rows() == 1
    store.store_many({b"l": (0, None)})
    assert sqlite.rows() == 1
    sqlite.run("ROLLBACK")


def test_a_database_that_can_only_be_read(sqlite):
    sqlite.run(f"CREATE TABLE {sqlite.table} (k TEXT PRIMARY KEY, v TEXT)")
    sqlite.run(f"INSERT INTO {sqlite.table} VALUES ('a', 'x')")
    sqlite.url = sqlite.url.replace(":///", ":///file:") + "?mode=ro&uri=true"
    store = sqlite.store(key_column="k", value_column="v")
    assert values(store, [b"a"]) == {b"a": "x"}
    with pytest.raises(errors.StoreRefused, match="readonly"):
        store.store_many({b"a": ("y", None)})


# ---- what is told wrong ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("sqlite://", {}), ("sqlite:///:memory:", {}), ("sqlite:///file::memory:?uri=true", {}), ("sqlite:///file:x?mode=memory&uri=true", {}), ("sqlite:///file:?uri=1", {}),
        ("mysql://host/x", {}), ("nonsense", {}), ("postgresql:///x?prepare_threshold=five", {}), ("sqlite:///x.db", {"key_column": "k"}),
        ("sqlite:///x.db", {"version_column": "n"}), ("sqlite:///x.db", {"timeout": 0}), ("sqlite:///x.db", {"pool_size": 0}), ("sqlite:///x.db", {"codec": "x"}),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_right(url, options):
    with pytest.raises(errors.InvalidConfig):
        shmcache.SQLStore(url, **options)


def test_a_password_is_not_shown():
    assert "secret" not in repr(shmcache.SQLStore("postgresql://u:secret@host/x"))
    assert "secret" not in repr(shmcache.SQLStore("postgresql://u@host/x?sslpassword=secret&password=secret"))


@pytest.mark.parametrize(
    "spec",
    [
        "postgresql://u:p@secret@host/x", "postgresql://u:p@ss:secret@host/x", "postgresql://u:p@h:secret/x", "postgresql://us/er:secret@host/x",
        "postgresql:/u:secret@host/x", "postgresql:secret@host", "http:secret@host", "u:secret@host", "secret", "mysql://u:secret@host/x",
        "nosuch://u:secret@host/x", "postgresql+nosuch://u:secret@host/x", "", ":", "http.client:", ":secret@",
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_url_is_said_without_its_password(spec):
    with pytest.raises(errors.InvalidConfig) as told:
        stores.opened(spec)
    e = told.value
    while e is not None:
        assert "secret" not in str(e) and "ss@" not in str(e)
        e = None if e.__suppress_context__ and e.__cause__ is None else e.__cause__ or e.__context__


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:p@host/x", "postgresql://u:***@host/x"), ("--store postgresql://u:p@ss/w:@host/x --quiet", "--store postgresql://u:***@host/x --quiet"),
        ("postgresql://:p@host", "postgresql://:***@host"), ("x://host/?Password=p&a=1 b", "x://host/?Password=***&a=1 b"),
        ("x://h?a=1&sslpassword=p", "x://h?a=1&sslpassword=***"), ("sqlite:////a/b.db", "sqlite:////a/b.db"), ("postgresql://u@host:5432/x", "postgresql://u@host:5432/x"),
        ("module:function a@b", "module:function a@b"), ("no x://u:my pass w@ord@host/x there", "no x://u:***@host/x there"), ("x://h?passwd=p;a=1", "x://h?passwd=***;a=1"),
        ("x://h:1/\ny@z", "x://h:1/\ny@z"), ("x://h?odbc_connect=UID%3Du%3BPWD%3Dp%3Ba%3D1", "x://h?odbc_connect=UID%3Du%3BPWD%3D***%3Ba%3D1"),
        ("Driver=x;Uid=u;Pwd=p;A=1", "Driver=x;Uid=u;Pwd=***;A=1"), ("x://h?ssl_key_password=p w", "x://h?ssl_key_password=*** w"), ("dsn: user=u password='p q' host=h", "dsn: user=u password=*** host=h"),
    ],
)  # fmt: skip
def test_the_passwords_in_a_text_are_masked(text, shown):
    assert stores.masked(text) == shown


@pytest.mark.parametrize(("module", "extra", "url"), [("sqlalchemy", "sql", "sqlite:///x"), ("psycopg", "postgres", "postgresql://host/x")])
def test_a_package_that_is_missing_is_named(module, extra, url):
    code = f"import sys; sys.modules[{module!r}] = None\nimport shmcache\nshmcache.FunctionStore(load=dict)\nshmcache.SQLStore({url!r})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f'pip install "shmcache[{extra}]"' in out.stderr.splitlines()[-1]


# ---- functions ---------------------------------------------------------------------------------------------------------------------


def test_a_function_says_what_is_not_there():
    answers = {b"a": 1, b"b": Entry(2, 5.0), b"c": MISSING, b"d": None}
    one = shmcache.FunctionStore(load=answers.__getitem__)
    many = shmcache.FunctionStore(load_many=lambda keys: {**{key: answers[key] for key in keys if key in answers}, b"z": 9})
    for store in (one, many):
        assert store.load_many([b"a", b"b", b"c", b"d", b"e"]) == {b"a": Entry(1), b"b": Entry(2, 5.0), b"d": Entry(None)}


def fail(error):
    def function(*_):
        raise error

    return function


def test_errors_of_functions():
    for store in (shmcache.FunctionStore(load=fail(ConnectionError("down"))), shmcache.FunctionStore(load_many=fail(TimeoutError("down")))):
        with pytest.raises(errors.StoreUnavailable, match="down"):
            store.load_many([b"a"])
    with pytest.raises(ZeroDivisionError):
        shmcache.FunctionStore(load=fail(ZeroDivisionError())).load_many([b"a"])
    with pytest.raises(errors.StoreUnavailable, match="down"):
        shmcache.FunctionStore(load=dict, save=fail(ConnectionError("down"))).store_many({b"a": (1, None)})
    with pytest.raises(errors.RowsRefused, match="b'a': no") as e:
        shmcache.FunctionStore(load=dict, delete=fail(ValueError("no"))).delete_many([b"a", b"b"])
    assert set(e.value.errors) == {b"a", b"b"}
    shmcache.FunctionStore(load=dict, delete=fail(KeyError())).delete_many([b"a"])


class ClientTimeout(Exception):
    """As clients of services have it, of no class that Python knows."""


@pytest.mark.parametrize(
    ("error", "raised", "unsettled"),
    [
        (ClientTimeout("60 s"), errors.StoreUnavailable, True), (KeyError("a bug"), errors.StoreUnavailable, True), (EOFError(), errors.StoreUnavailable, True),
        (TimeoutError("60 s"), errors.StoreUnavailable, True), (errors.StripeBusy("of another cache"), errors.StoreUnavailable, True),
        (json.JSONDecodeError("a proxy's page", "<", 0), errors.RowsRefused, True), (TypeError("None"), errors.RowsRefused, True),
        (errors.StoreRefused("no"), errors.RowsRefused, False), (errors.UnsupportedValue("no"), errors.RowsRefused, False),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)  # fmt: skip
@pytest.mark.parametrize("what", ["save", "delete"])
def test_only_who_says_that_nothing_is_to_come_is_believed(what, error, raised, unsettled):
    store = shmcache.FunctionStore(load=dict, **{what: fail(error)})
    call = {"save": lambda: store.store_many({b"a": (1, None)}), "delete": lambda: store.delete_many([b"a"])}[what]
    if what == "delete" and isinstance(error, KeyError):
        call()  # it is not there
        return
    with pytest.raises(raised, match=r"60 s|b'a': |of another|bug|EOFError") as e:
        call()
    assert e.value.unsettled is unsettled


def test_functions_that_are_not_given():
    with pytest.raises(errors.StoreRefused, match="no save"):
        shmcache.FunctionStore(load=dict).store_many({b"a": (1, None)})
    with pytest.raises(errors.StoreRefused, match="no delete"):
        shmcache.FunctionStore(load=dict).delete_many([b"a"])
    for options in ({}, {"load": dict, "load_many": dict}):
        with pytest.raises(errors.InvalidConfig, match="either"):
            shmcache.FunctionStore(**options)


def test_no_function_is_called_after_the_time(monkeypatch):
    now = 0.0
    monkeypatch.setattr(_core, "monotonic", lambda: now)
    called = []

    def load(key):
        nonlocal now
        called.append(key)
        now += 1
        return key

    store = shmcache.FunctionStore(load=load, timeout=10.0)
    with pytest.raises(errors.StoreUnavailable, match="time"):
        store.load_many([b"a", b"b", b"c"], timeout=1.5)
    assert called == [b"a", b"b"]
    assert len(store.load_many([b"%d" % i for i in range(10)])) == 10
