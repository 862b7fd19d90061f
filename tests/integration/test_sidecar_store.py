"""The sidecar in front of a store: who loads, where writes get to by each policy, what is said when the store fails; leases."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

import shmcache
from shmcache import errors
from shmcache.sidecar import backed, serving
from shmcache.stores import Entry
from shmcache.supervisor import writeback
from tests.integration.service import LIMIT, running, until
from tests.integration.test_policy import POLICIES, STRANGERS, Gate, Hooked, Unsettled, late_store
from tests.integration.test_store import DictStore
from tests.redis.servers import free_port

ADMIN = Path(sys.executable).parent / "shmcache-admin"


@pytest.fixture
def front(make):
    """front(store, mode, **options of Policy) -> (a cache in front of it, a client of a sidecar that serves it)."""
    with contextlib.ExitStack() as stack:

        def made(store, mode, default_ttl=None, size="8M", **options):
            cache = make(size, policy=shmcache.Policy(mode, flush_every=0.01, **options), store=store, default_ttl=default_ttl)
            if mode == "back":
                other = stack.enter_context(shmcache.attach(cache.name))
                stack.callback(writeback.WriteBack(other, store).stop)
            server = stack.enter_context(serving(cache.name, store=store))
            return cache, stack.enter_context(redis.Redis(port=server.port, retry=None, socket_timeout=LIMIT))

        yield made


def another(client):
    return redis.Redis(port=client.connection_pool.connection_kwargs["port"], retry=None, socket_timeout=LIMIT)


def rows(cache, *keys):
    """What the store has, when it has everything."""
    cache.flush()
    return {key: entry.value for key, entry in cache.store.load_many(list(keys)).items()}


# ---- reads --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", POLICIES)
def test_a_key_that_many_ask_for_is_loaded_once_and_the_loop_is_not_held(front, mode):
    store, asked, go = Hooked(), threading.Event(), threading.Event()
    store.store_many({b"k": (b"v", None)})
    cache, client = front(store, mode)
    store.calls.clear()

    def slow(what, keys):
        asked.set()
        assert go.wait(LIMIT)

    store.before = slow
    found, stop = [], threading.Event()

    def ask():
        with another(client) as mine:
            found.append(mine.get("k"))

    with running(*(threading.Thread(target=ask) for _ in range(12)), stop=stop):
        assert asked.wait(LIMIT)
        for _ in range(3):
            assert client.ping()
        assert not found
        go.set()
    assert found == [b"v"] * 12
    assert store.calls == [("load", [b"k"])]
    assert client.get("k") == b"v" and len(store.calls) == 1
    assert cache.peek("k") == b"v"


READS = [
    (("GET", "k"), b"41"), (("MGET", "k", "n", "k2"), [b"41", None, b"xyz"]), (("STRLEN", "k2"), 3), (("EXISTS", "k", "k2", "n"), 2),
    (("TYPE", "k"), b"string"), (("TTL", "k"), -1), (("GETRANGE", "k2", 1, 2), b"yz"), (("GETBIT", "k", 2), 1), (("BITCOUNT", "k"), 6),
    (("LCS", "k", "k2"), b""), (("DUMP", "n"), None), (("OBJECT", "ENCODING", "k"), b"int"), (("TOUCH", "k", "n"), 1), (("PTTL", "n"), -2),
]  # fmt: skip


@pytest.mark.parametrize("mode", POLICIES)
@pytest.mark.parametrize(("words", "reply"), READS, ids=lambda x: x[0] if isinstance(x, tuple) else "")
def test_what_a_read_misses_is_loaded(front, mode, words, reply):
    store = DictStore()
    store.store_many({b"k": (b"41", None), b"k2": (b"xyz", None)})
    _, client = front(store, mode)
    client.response_callbacks.clear()
    assert client.execute_command(*words) == reply


def test_a_ttl_comes_from_the_store(front):
    store = DictStore()
    store.store_many({b"k": (b"v", 100)})
    _, client = front(store, "through")
    assert 90 < client.ttl("k") <= 100
    assert client.ttl("n") == -2


def test_keys_of_the_cache_itself_and_of_other_databases_are_not_asked_for(make):
    store = Hooked()
    cache = make(policy="through", store=store)
    with serving(cache.name, store=store) as server, redis.Redis(port=server.port) as client:
        assert client.get(b"\0own") is None and client.get("") is None
        assert client.set(b"\0own", "1") and client.incr(b"\0own") == 2
        assert store.calls == []


def test_a_stale_copy_is_given_while_the_store_is_down(front):
    store = Hooked()
    store.store_many({b"k": (b"v", 0.5)})
    cache, client = front(store, "through", stale_ttl=100)
    assert client.get("k") == b"v"
    until(lambda: cache.peek("k") is None)
    store.before = lambda what, keys: fail(errors.StoreUnavailable("down"))
    assert client.get("k") == b"v"


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("mode", "line", "reply"), [("through", "GET k", b"41"), ("around", "STRLEN k", 2), ("back", "INCR k", 42), ("back", "SETNX k 1", 0)]
)
def test_what_is_evicted_once_it_was_loaded_is_loaded_again(front, monkeypatch, mode, line, reply):
    store = Hooked()
    store.store_many({b"k": (b"41", None)}, versions={b"k": 0})
    cache, client = front(store, mode, timeout=60.0)
    load, times = backed.load, []

    def and_evicted(*args):
        found = load(*args)
        if len(times) < 3:
            cache.invalidate("k")
        times.append(1)
        return found

    monkeypatch.setattr(backed, "load", and_evicted)
    client.response_callbacks.clear()
    assert client.execute_command(*line.split()) == reply and len(times) == 4


LARGE = b"1" + bytes(3 << 20)
OF_LARGE = [  # command, reply; where it is written through, what the store has then (None: nothing)
    ("GET k", LARGE), ("MGET k other n", [LARGE, b"w", None]), ("STRLEN k", len(LARGE)), ("EXISTS k n k", 2), ("TYPE k", b"string"), ("TTL k", 100),
    ("GETRANGE k 0 1", b"1\0"), ("GETBIT k 2", 1), ("BITCOUNT k", 3), ("TOUCH k", 1), ("OBJECT ENCODING k", b"raw"), ("EVAL_RO return#redis.call('STRLEN',KEYS[1]) 1 k", len(LARGE)),
    ("LEASE.GET k", [LARGE, None]), ("SET k v NX", None), ("SETNX k v", 0), ("MSETNX k v n v", 0), ("COPY other k", 0),
    ("DEL k n", 1, None), ("UNLINK k", 1, None), ("SET k v", b"OK", b"v"), ("MSET k v", b"OK", b"v"), ("COPY other k REPLACE", 1, b"w"), ("RENAME other k", b"OK", b"w"),
    ("GETDEL k", LARGE, None), ("GETSET k v", LARGE, b"v"), ("SET k v XX", b"OK", b"v"), ("SET k v GET", LARGE, b"v"), ("EXPIRE k 1000", 1, LARGE), ("PERSIST k", 1, LARGE),
    ("GETEX k EX 1000", LARGE, LARGE), ("EXPIRE k -1", 1, None), ("INCR k", "not an integer"), ("INCRBYFLOAT k 1", "not a valid float"), ("APPEND k x", "maximum allowed size"), ("SETRANGE k 0 x", "maximum allowed size"),
    ("SETBIT k 0 1", "maximum allowed size"), ("BITFIELD k SET u8 0 1", "maximum allowed size"), ("RENAME k n", "maximum allowed size"),
]  # fmt: skip
IN_PLACE = ["GETDEL k", "GETSET k v", "SET k v XX", "SET k v GET", "EXPIRE k 1000", "EXPIRE k -1", "PERSIST k", "GETEX k EX 1000"]  # of what is cached, in write-back


@pytest.mark.parametrize("mode", POLICIES)
@pytest.mark.parametrize(("line", "reply", "after"), [(*row, LARGE)[:3] for row in OF_LARGE], ids=lambda x: x if isinstance(x, str) else "")
def test_a_row_that_cannot_be_cached_is_given_and_loaded_once(front, mode, line, reply, after):
    store = Hooked()
    of_old = dict.fromkeys((b"k", b"other"), 0) if mode == "back" else None
    store.store_many({b"k": (LARGE, 99.9), b"other": (b"w", None)}, versions=of_old)
    cache, client = front(store, mode, timeout=60.0)
    client.response_callbacks.clear()
    store.calls.clear()
    words = [word.replace("#", " ") for word in line.split()]
    refused = isinstance(reply, str)
    if mode == "back" and line in IN_PLACE:
        refused, reply, after = True, "larger max_value", LARGE
    began = time.monotonic()
    if refused:
        with pytest.raises(redis.ResponseError, match=reply):
            client.execute_command(*words)
    else:
        assert client.execute_command(*words) == reply
    assert time.monotonic() - began < 30  # half of the time that one waits for another
    assert sum(b"k" in keys for what, keys in store.calls if what == "load") <= 1
    assert rows(cache, b"k") == ({} if after is None else {b"k": after})
    if words[0] in ("EXPIRE", "GETEX", "PERSIST") and after is not None and not refused:
        assert store.load_many([b"k"])[b"k"].ttl == (None if words[0] == "PERSIST" else pytest.approx(1000, abs=30))
    if after == LARGE:
        assert client.get("k") == LARGE
    assert cache.verify() == [] and not [key for key in cache.scan() if key.startswith(b"\0try")]


@pytest.mark.parametrize("mode", POLICIES)
def test_a_transaction_on_a_row_that_cannot_be_cached(front, mode):
    store = Hooked()
    store.store_many({b"k": (LARGE, None)}, versions={b"k": 0} if mode == "back" else None)
    cache, client = front(store, mode)
    with client.pipeline(transaction=True) as pipe:
        assert pipe.get("k").strlen("k").exists("k").execute() == [LARGE, len(LARGE), 1]
    with client.pipeline(transaction=True) as pipe:
        assert pipe.strlen("k").delete("k").exists("k").set("k", "new").get("k").execute() == [len(LARGE), 1, 0, True, b"new"]
    assert rows(cache, b"k") == {b"k": b"new"}
    if mode == "back":
        store.store_many({b"w": (LARGE, None)}, versions={b"w": 0})
        with client.pipeline(transaction=True) as pipe:  # it has no version, so nobody could tell whether it was changed
            pipe.watch("w")
            pipe.multi()
            pipe.set("w", "lost")
            with pytest.raises(redis.WatchError):
                pipe.execute()
        assert rows(cache, b"w") == {b"w": LARGE}


@pytest.mark.parametrize(
    ("line", "meanwhile", "reply", "after"),
    [
        ("INCR k", "SET k 5", 6, 6), ("APPEND k x", "SET k 5", 2, b"5x"), ("GETSET k v", "SET k 5", b"5", b"v"), ("SET k v XX", "SET k 5", b"OK", b"v"), ("DEL k", "SET k 5", 1, None),
        ("EXPIRE k 100", "SET k 5", 1, b"5"), ("GETDEL k", "SET k 5", b"5", None), ("GET k", "SET k 5", b"5", b"5"), ("SETNX k v", "SET k 5", 0, b"5"),
        ("INCR k", "DEL k", 1, 1), ("APPEND k x", "DEL k", 1, b"x"), ("GETSET k v", "DEL k", None, b"v"), ("DEL k", "DEL k", 0, None), ("EXPIRE k 100", "DEL k", 0, None),
        ("GETDEL k", "DEL k", None, None), ("GET k", "DEL k", None, None), ("PERSIST k", "DEL k", 0, None), ("SET k v XX", "DEL k", None, None),
    ],
)  # fmt: skip
def test_written_back_what_cannot_be_cached_is_no_more_what_it_was_when_it_was_given(front, monkeypatch, line, meanwhile, reply, after):
    store = Hooked()
    store.store_many({b"k": (LARGE, None)}, versions={b"k": 0})
    cache, client = front(store, "back")
    load, done = backed.load, []

    def and_changed(*args):
        found = load(*args)
        if not done:
            done.append(True)
            with another(client) as other:
                other.execute_command(*meanwhile.split())
        return found

    monkeypatch.setattr(backed, "load", and_changed)
    client.response_callbacks.clear()
    store.before = lambda what, keys: what == "delete" and fail(errors.StoreUnavailable("down"))  # what was deleted is known to the cache alone
    assert client.execute_command(*line.split()) == reply
    store.before = lambda what, keys: None
    assert rows(cache, b"k") == ({} if after is None else {b"k": after})


def test_who_waits_for_what_cannot_be_cached_does_not_wait_for_each_other(front):
    n = 3
    store = Hooked()
    store.store_many({b"k": (LARGE, None)})
    _, client = front(store, "through", timeout=60.0)
    gate, together, loads, answers = Gate(store, "load"), threading.Barrier(n), itertools.count(), []
    store.after = lambda what, keys: next(loads) and together.wait(20)

    def ask():
        with another(client) as mine:
            answers.append(mine.get("k"))

    with running(threading.Thread(target=ask), stop=threading.Event()):
        assert gate.reached.wait(LIMIT)
        with running(*(threading.Thread(target=ask) for _ in range(n)), stop=threading.Event()):
            gate.opened.set()
    assert answers == [LARGE] * (n + 1)


@pytest.mark.parametrize("mode", ["through", "around"])
def test_a_read_does_not_need_the_cache(front, mode):
    """Where the mark of a write stands that nobody ends."""
    store = Hooked()
    store.store_many({b"k": (b"v", 100), b"n": (b"7", None), b"other": (b"w", None)})
    cache, client = front(store, mode, timeout=1.0)
    other = client.get("other")
    client.set(b"\0own", "1")

    def torn(what, keys):
        if what == "store":
            raise Unsettled

    store.before = torn
    for key in "k", "n":
        with pytest.raises(redis.ResponseError):
            client.set(key, "lost")
    store.before = lambda what, keys: None
    began = time.monotonic()
    for _ in range(2):
        assert [client.get("k"), client.strlen("n"), client.exists("k", "n", "other")] == [b"v", 1, 3]
        assert client.mget("other", "n", "none", "k") == [other, b"7", None, b"v"]
        assert 90 < client.ttl("k") <= 100 and client.ttl("n") == -1
    with client.pipeline(transaction=True) as pipe:
        assert pipe.get("k").get("other").execute() == [b"v", b"w"]
    assert client.execute_command("EVAL_RO", "return {redis.call('GET', KEYS[1]), redis.call('TTL', KEYS[2])}", 2, "k", "n") == [b"v", -1]
    assert client.execute_command("OBJECT", "ENCODING", "n") == b"int" and client.type("k") == b"string" and client.getrange("k", 0, 0) == b"v"
    assert client.lcs("k", "k") == b"v" and client.touch("k", "none") == 1
    assert time.monotonic() - began < 1  # nobody waits
    assert client.get(b"\0own") == b"1"
    assert client.mget(b"\0own", "k") == [b"1", b"v"]
    assert cache.peek("k") is None
    assert client.incr("n") == 8
    assert [client.get("n"), cache.peek("n")] == [b"8", None]
    assert not [key for key in cache.scan() if key.startswith(b"\0try")] and cache.verify() == []


def test_without_the_store_nothing_that_depends_on_a_miss_is_written_back(make):
    store = DictStore()
    store.store_many({b"row": (b"41", None)}, versions={b"row": 0})
    cache = make(policy="back", store=store)
    with serving(cache.name) as server, redis.Redis(port=server.port) as client:
        client.set("k", "v")
        for line in ("INCR row", "APPEND row x", "SETNX row x", "SET row x NX", "SETRANGE row 0 x", "SETBIT row 0 1", "GETSET row x", "SET row x GET", "MSETNX row x", "COPY k row", "RENAMENX k row",
                     "INCRBYFLOAT row 1", "LEASE.GET row", "LEASE.FILL row 5 x"):  # fmt: skip
            with pytest.raises(redis.ResponseError, match="this handle has none"):
                client.execute_command(*line.split())
        assert client.get("row") is None and client.get("k") == b"v"
        assert client.set("row", "x") and client.set("row", "y", xx=True) and client.copy("k", "other", replace=True)
    assert cache["row"] == b"y"


@pytest.mark.parametrize("mode", ["through", "around"])
def test_without_the_store_nothing_passes_it_by(make, mode):
    store = DictStore()
    store.store_many({b"k": (b"41", None)})
    cache = make(policy=mode, store=store)
    with serving(cache.name) as server, redis.Redis(port=server.port) as client:
        client.response_callbacks.clear()
        assert cache["k"] == b"41" == client.get("k")
        for line in ("DEL k", "UNLINK k", "GETDEL k", "SET k v", "INCR k", "INCR new", "DECRBY new 2", "APPEND k v", "APPEND new v", "SETRANGE new 0 x", "RENAME k n", "EXPIRE k 9", "SETNX n v", "GETEX k EX 9",
                     "MSET k v", "COPY k n", "SETEX n 9 v", "LEASE.GET n", "LEASE.FILL n 5 v"):  # fmt: skip
            with pytest.raises(redis.ResponseError, match="this handle has none"):
                client.execute_command(*line.split())
        assert client.get("k") == b"41" and store.values() == {b"k": b"41"}
        assert client.flushall() and client.get("k") is None  # what is cached
    assert cache["k"] == b"41"


# ---- writes -------------------------------------------------------------------------------------------------------------------------

THERE = {b"n": b"41", b"s": b"abc", b"a": b"1", b"b": b"2"}
WRITES = [  # command, reply, what changes in the store (None: is deleted)
    ("SET new v", b"OK", {b"new": b"v"}), ("SET s v NX", None, {}), ("SET s v XX", b"OK", {b"s": b"v"}), ("SET new v XX", None, {}),
    ("SET s v GET", b"abc", {b"s": b"v"}), ("SETNX s v", 0, {}), ("SETNX new v", 1, {b"new": b"v"}), ("SETEX s 100 v", b"OK", {b"s": b"v"}),
    ("PSETEX s 100000 v", b"OK", {b"s": b"v"}), ("SET s v EX 100", b"OK", {b"s": b"v"}), ("GETSET s v", b"abc", {b"s": b"v"}),
    ("GETDEL s", b"abc", {b"s": None}), ("GETDEL new", None, {}), ("GETEX s PERSIST", b"abc", {}), ("MSET a x new y", b"OK", {b"a": b"x", b"new": b"y"}),
    ("MSETNX a x new y", 0, {}), ("MSETNX new x new2 y", 1, {b"new": b"x", b"new2": b"y"}), ("INCR n", 42, {b"n": 42}), ("DECRBY n 2", 39, {b"n": 39}),
    ("INCR new", 1, {b"new": 1}), ("INCRBYFLOAT n 0.5", b"41.5", {b"n": b"41.5"}), ("APPEND s d", 4, {b"s": b"abcd"}),
    ("SETRANGE s 1 x", 3, {b"s": b"axc"}), ("SETRANGE new 1 x", 2, {b"new": b"\0x"}), ("SETBIT s 0 1", 0, {b"s": b"\xe1bc"}),
    ("BITOP OR new a b", 1, {b"new": b"3"}), ("BITFIELD s SET u8 0 65", [97], {b"s": b"Abc"}), ("DEL s a new", 2, {b"s": None, b"a": None}),
    ("UNLINK s", 1, {b"s": None}), ("RENAME s new", b"OK", {b"s": None, b"new": b"abc"}), ("RENAMENX s a", 0, {}), ("COPY s new", 1, {b"new": b"abc"}),
    ("COPY s a", 0, {}), ("EXPIRE s 100", 1, {}), ("EXPIRE s -1", 1, {b"s": None}), ("PERSIST s", 0, {}), ("EXPIRE new 100", 0, {}),
]  # fmt: skip


@pytest.mark.parametrize("mode", POLICIES)
@pytest.mark.parametrize(("line", "reply", "changes"), WRITES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_write_gets_to_the_database(front, tmp_path, mode, line, reply, changes):
    store = shmcache.SQLStore(f"sqlite:///{tmp_path}/store.db")
    with contextlib.closing(store):
        of_old = dict.fromkeys(THERE, 0) if mode == "back" else None
        store.store_many({key: (value, None) for key, value in THERE.items()}, versions=of_old)
        cache, client = front(store, mode, default_ttl=1000)
        client.response_callbacks.clear()
        assert client.execute_command(*line.split()) == reply
        expected = {key: value for key, value in {**THERE, **changes}.items() if value is not None}
        keys = [*THERE, b"new", b"new2"]
        assert rows(cache, *keys) == expected
        assert client.mget(keys) == [str(v).encode() if isinstance(v := expected.get(k), int) else v for k in keys]
        assert not [key for key in cache.scan() if key.startswith(b"\0try")] and cache.verify() == []
        ttls = {key: entry.ttl for key, entry in store.load_many(keys).items()}
        with_ttl = {b"s"} if reply and (line.startswith(("SETEX", "PSETEX", "EXPIRE")) or "EX" in line.split()) else set()
        assert {key for key, ttl in ttls.items() if ttl is not None} == with_ttl & expected.keys()


def test_through_fills_and_around_drops(front, make):
    store = Hooked()
    cache, client = front(store, "through")
    client.set("k", "v")
    assert cache.peek("k") == b"v" and ("load", [b"k"]) not in store.calls


def test_around_drops(front):
    store = Hooked()
    cache, client = front(store, "around")
    client.set("k", "v")
    assert cache.peek("k") is None and client.get("k") == b"v" == cache.peek("k")


def test_back_a_delete_is_known_and_not_asked_for_again(front):
    store = Hooked()
    store.store_many({b"k": (b"v", None)})
    cache, client = front(store, "back")
    store.before = lambda what, keys: what == "load" or fail(errors.StoreUnavailable("down"))
    assert client.delete("k") == 1
    n = len([call for call in store.calls if call[0] == "load"])
    assert client.get("k") is None and client.exists("k") == 0 and client.delete("k") == 0
    assert client.incr("k") == 1
    assert len([call for call in store.calls if call[0] == "load"]) == n
    store.before = lambda what, keys: None
    assert rows(cache, b"k") == {b"k": 1}


def test_two_connections_count_together(front):
    store = DictStore()
    cache, client = front(store, "through")

    def count():
        with another(client) as mine:
            for _ in range(50):
                mine.incr("n")

    with running(*(threading.Thread(target=count) for _ in range(4)), stop=threading.Event()):
        pass
    assert rows(cache, b"n") == {b"n": 200} and client.get("n") == b"200"


@pytest.mark.parametrize("mode", ["through", "around"])
def test_who_writes_a_key_that_another_writes_waits_for_him(front, mode):
    store, asked, go = Hooked(), threading.Event(), threading.Event()
    store.store_many({b"n": (b"41", None)})
    cache, client = front(store, mode, timeout=0.3)

    def slow(what, keys):
        if what == "store":
            asked.set()
            assert go.wait(LIMIT)

    store.before = slow
    found = []

    def first():
        with another(client) as mine:
            found.append(mine.incr("n"))

    with running(threading.Thread(target=first), stop=threading.Event()):
        assert asked.wait(LIMIT)
        with pytest.raises(redis.ResponseError, match="another caller has been writing"):
            client.incr("n")
        go.set()
    assert found == [42] and rows(cache, b"n") == {b"n": 42} and client.incr("n") == 43


@pytest.mark.parametrize("mode", ["through", "around"])
@pytest.mark.parametrize("words", [("INCR", "k"), ("RENAME", "k", "other")])
def test_a_command_whose_marks_are_over_when_it_comes_to_store_changes_nothing(front, monkeypatch, mode, words):
    """A sidecar that was stopped behind its load, say: somebody else has counted meanwhile."""
    monkeypatch.setattr(shmcache.stored, "GRACE", 0.1)
    store = Hooked()
    store.store_many({b"k": (1, None)})
    cache, client = front(store, mode, timeout=0.1)
    gate, said = Gate(store, "load", "after"), []

    def ask():
        try:
            said.append(client.execute_command(*words))
        except redis.ResponseError as e:
            said.append(str(e))

    asks = threading.Thread(target=ask)
    asks.start()
    assert gate.reached.wait(LIMIT)
    until(lambda: not cache.claim_version("k"))
    assert cache.incr("k") == 2
    gate.opened.set()
    asks.join(LIMIT)
    assert "too late" in said[0]
    assert rows(cache, b"k", b"other") == {b"k": 2}


@pytest.mark.parametrize("line", ["INCR n", "APPEND n x", "SET n x XX", "DEL n", "EXPIRE n 10", "RENAME n m", "SETNX n 1", "GETDEL n"])
def test_what_is_evicted_in_the_middle_of_a_write_changes_nothing(front, monkeypatch, line):
    store = DictStore()
    store.store_many({b"n": (b"41", None)})
    cache, client = front(store, "through")
    begin = backed.Trial.begin

    def and_cleared(self):
        begin(self)
        cache.clear()

    monkeypatch.setattr(backed.Trial, "begin", and_cleared)
    with pytest.raises(redis.ResponseError, match="try again"):
        client.execute_command(*line.split())
    assert rows(cache, b"n", b"m") == {b"n": b"41"}
    monkeypatch.undo()
    assert client.get("n") == b"41"


# ---- a store that fails ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", POLICIES)
@pytest.mark.parametrize("error", [errors.StoreUnavailable("down\r\n+OK"), ValueError("what")], ids=["down", "strange"])
def test_a_store_that_fails_is_an_error_reply_and_the_next_command_is_served(front, mode, error):
    store = Hooked()
    store.store_many({b"k": (b"1", None)})
    cache, client = front(store, mode)
    store.before = lambda what, keys: fail(error)
    for words in (("GET", "k"), ("INCR", "k"), ("MGET", "k", "n")):
        with pytest.raises(redis.ResponseError, match=r"down .OK|the store failed: ValueError: what"):
            client.execute_command(*words)
    assert client.ping()
    pipe = client.pipeline().get("k").set("k", "2")
    with pytest.raises(redis.ResponseError):
        pipe.execute()
    store.before = lambda what, keys: None
    assert client.get("k") == b"1" and rows(cache, b"k") == {b"k": b"1"}
    assert client.incr("k") == 2


@pytest.mark.parametrize("mode", ["through", "around"])
def test_a_write_that_the_store_does_not_take_is_an_error_and_a_miss(front, mode):
    store = Hooked()
    store.store_many({b"k": (b"1", None)})
    cache, client = front(store, mode)
    assert client.get("k") == b"1"
    store.before = lambda what, keys: what == "load" or fail(errors.StoreUnavailable("down"))
    for words in (("SET", "k", "2"), ("APPEND", "k", "x"), ("DEL", "k"), ("RENAME", "k", "m")):
        with pytest.raises(redis.ResponseError, match="down"):
            client.execute_command(*words)
        assert cache.peek("k") is None and cache.peek("m") is None
    assert client.get("k") == b"1"


@pytest.mark.parametrize("mode", ["through", "around"])
@pytest.mark.parametrize("words", [("SET", "k", "2"), ("INCR", "k"), ("DEL", "k"), ("GETEX", "k", "EX", "100"), ("MSET", "k", "2")], ids=lambda w: w[0])
@pytest.mark.parametrize("error", STRANGERS[:1] + STRANGERS[2:], ids=lambda e: type(e).__name__)
def test_what_a_client_raises_says_nothing_of_what_is_still_to_come(front, mode, words, error):
    store, lands = late_store(error)
    cache, client = front(store, mode)
    assert client.get("k") == b"1"
    with pytest.raises(redis.ResponseError):
        client.execute_command(*words)
    assert client.get("k") == b"1" and cache.peek("k") is None
    lands()
    assert client.get("k") == {"DEL": None, "GETEX": b"1"}.get(words[0], b"2")


def test_a_row_that_is_refused_is_named_and_the_others_are_served(front):
    store = Hooked()
    store.store_many({b"k": (b"1", None)})
    _, client = front(store, "through")
    store.before = lambda what, keys: b"bad" in keys and fail(errors.RowsRefused({b"bad": ValueError("no")}))
    with pytest.raises(redis.ResponseError):
        client.get("bad")
    with pytest.raises(redis.ResponseError):
        client.set("bad", "x")
    assert client.get("k") == b"1" and client.set("k", "2")


# ---- transactions, and what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", POLICIES)
def test_a_transaction_sees_the_store_and_gets_there(front, mode):
    store = DictStore()
    store.store_many({b"n": (b"41", None), b"s": (b"abc", None)})
    cache, client = front(store, mode)
    pipe = client.pipeline().incr("n").append("s", "d").set("new", "v").delete("s").get("n").lpush("n", 1)
    with pytest.raises(redis.ResponseError):
        pipe.execute()
    pipe = client.pipeline().incr("n").append("s", "d").set("new", "v").delete("s").get("n").incr("new")
    *replies, refused = pipe.execute(raise_on_error=False)
    assert replies == [42, 4, True, 1, b"42"] and "not an integer" in str(refused)
    assert rows(cache, b"n", b"s", b"new") == {b"n": 42, b"new": b"v"}
    assert client.pipeline().get("n").exists("s").execute() == [b"42", 0]


def test_a_transaction_whose_store_fails_changes_nothing(front):
    store = Hooked()
    store.store_many({b"n": (b"41", None)})
    cache, client = front(store, "through")
    store.before = lambda what, keys: what == "load" or fail(errors.StoreUnavailable("down"))
    with pytest.raises(redis.ResponseError, match="down"):
        client.pipeline().incr("n").set("m", "v").execute()
    store.before = lambda what, keys: None
    assert rows(cache, b"n", b"m") == {b"n": b"41"} and client.get("n") == b"41" and client.get("m") is None


@pytest.mark.parametrize("mode", ["through", "around"])
def test_what_is_refused_says_so(front, mode):
    store = DictStore()
    _, client = front(store, mode)
    for words in (("WATCH", "k"), ("EVAL", "return 1", 1, "k")):
        with pytest.raises(redis.ResponseError, match="in front of a store"):
            client.execute_command(*words)
    with pytest.raises(redis.ResponseError, match="in one step"):
        client.mset({"a": 1, b"\0b": 2})
    with pytest.raises(redis.ResponseError, match="at most"):
        client.set("x" * 4090, 1)
    for words in (("FLUSHALL",), ("EVAL", "return 1", 0)):
        pipe = client.pipeline()
        pipe.execute_command(*words)
        with pytest.raises(redis.ResponseError, match="in front of a store"):
            pipe.execute()
    assert client.set("k", 1) and client.get("k") == b"1"


def test_scripts_in_front_of_a_store(front):
    pytest.importorskip("lupa")
    store = DictStore()
    store.store_many({b"k": (b"1", None)})
    _, client = front(store, "through")
    assert client.eval_ro("return redis.call('GET', KEYS[1])", 1, "k") == b"1"


def test_scripts_in_front_of_a_store_that_is_written_back(front):
    pytest.importorskip("lupa")
    store = DictStore()
    store.store_many({b"k": (b"1", None)})
    cache, client = front(store, "back")
    assert client.eval("return redis.call('INCR', KEYS[1])", 1, "k") == 2
    assert rows(cache, b"k") == {b"k": 2}
    with pytest.raises(redis.ResponseError, match="not allowed from script"):
        client.eval("return redis.call('FLUSHALL')", 0)


def test_what_knows_nothing_of_what_was_there_does_not_need_the_store(front):
    """Written back: SET and the like, alone or in a transaction."""
    store = Hooked()
    _, client = front(store, "back")
    store.before = lambda what, keys: what == "load" and fail(errors.StoreUnavailable("down"))
    assert client.set("a", 1) and client.mset({"b": 2}) and client.set("c", 3, ex=100)
    assert client.pipeline().set("d", 4).mset({"e": 5}).execute() == [True, True]


def test_watch_in_front_of_a_store_that_is_written_back(front):
    store = DictStore()
    store.store_many({b"k": (b"1", None)})
    _, client = front(store, "back")
    with client.pipeline() as pipe, another(client) as other:
        pipe.watch("k")
        pipe.multi()
        pipe.set("k", "2")
        other.set("k", "3")
        with pytest.raises(redis.WatchError):
            pipe.execute()


@pytest.mark.parametrize("mode", POLICIES)
def test_flushall_clears_the_cache_and_the_store_keeps_all(front, mode):
    store = DictStore()
    cache, client = front(store, mode)
    client.set("k", "v")
    assert client.flushall() and client.flushdb()
    assert len(cache) == 0 and rows(cache, b"k") == {b"k": b"v"} and client.get("k") == b"v"


# ---- as a service ----------------------------------------------------------------------------------------------------------------------


def in_database(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return dict(db.execute("SELECT key, value FROM shmcache WHERE coalesce(expires_at, 1) > 0").fetchall())  # not the tombstones


@pytest.mark.parametrize("mode", POLICIES)
def test_serve_with_a_database(serve, name, tmp_path, mode):
    path = tmp_path / "store.db"
    service = serve("--store", f"sqlite:///{path}", "--policy", mode, "--workers", "2")
    with service.client() as client:
        for i in range(20):
            client.set(f"k{i}", i)
        assert client.incr("k3") == 4 and client.delete("k4") == 1
        if mode != "back":
            assert len(in_database(path)) == 19
    assert service.stop() == 0
    assert len(in_database(path)) == 19 and b"k4" not in in_database(path)
    shmcache.unlink(name)
    service = serve("--store", f"sqlite:///{path}", "--policy", mode)
    with service.client() as client:
        assert client.mget("k3", "k4", "k5") == [b"4", None, b"5"]


@pytest.mark.parametrize("mode", POLICIES)
def test_the_other_databases_are_the_caches_own(serve, tmp_path, mode):
    path = tmp_path / "store.db"
    service = serve("--store", f"sqlite:///{path}", "--databases", "4", "--policy", mode)
    with service.client() as first, service.client(db=1) as second:
        assert second.set("k", "v") and second.incr("n") == 1 and second.get("missing") is None
        assert first.set("a", "x") and first.copy("a", "k", destination_db=1, replace=True) and second.get("k") == b"x"
        assert first.get("k") is None and first.copy("a", "a2") and first.get("a2") == b"x"
        until(lambda: in_database(path).keys() == {b"a", b"a2"})
        first.flushdb()
        assert first.keys() == [] and first.get("a") == b"x" and second.get("k") == b"x"
        second.flushdb()
        assert second.get("k") is None
        assert second.set("n", 5) and second.copy("n", "n", destination_db=0) and first.incr("n") == 6
        first.flushdb()
        assert not second.copy("n", "a", destination_db=0) and first.get("a") == b"x"
        assert second.copy("n", "a", destination_db=0, replace=True) and first.get("a") == b"5"
        until(lambda: in_database(path).keys() == {b"a", b"a2", b"n"})


def descendants(pid):
    """Pids of a process' children, their children, and so on."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from descendants(int(child))


@pytest.mark.parametrize("how", ["file", "variable", "argument"])
def test_the_stores_password_is_shown_nowhere(serve, name, tmp_path, postgres, monkeypatch, how):
    secret, table = "not-to-be-seen", "seen" + how
    url = postgres.replace("://postgres@", f"://postgres:{secret}@")
    assert secret in url
    if how == "variable":
        monkeypatch.setenv("SHMCACHE_STORE", url)
    (tmp_path / "store").write_text(f"{url}\na second line\n")
    (tmp_path / "store").chmod(0o600)
    said = {"file": ["--store-file", str(tmp_path / "store")], "variable": [], "argument": ["--store", url]}[how]
    service = serve(*said, "--store-table", table, "--policy", "back", "--workers", "2", "--metrics-port", str(free_port()))

    def seen():
        children = list(descendants(service.process.pid))
        assert len(children) == 4
        arguments = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children]
        assert sum(b"supervise" in a for a in arguments) == 1
        assert not [a for a in arguments if secret.encode() in a]
        assert not [pid for pid in children if secret.encode() in Path(f"/proc/{pid}/environ").read_bytes()]
        assert (secret.encode() in Path(f"/proc/{service.process.pid}/cmdline").read_bytes()) == (how == "argument")

    seen()
    with service.client() as client, shmcache.attach(name) as cache:
        client.set("a", "1")
        cache.flush(LIMIT)
        killed = cache.supervisor()["pid"]
        os.kill(killed, signal.SIGKILL)
        until(lambda: cache.supervisor()["alive"] and cache.supervisor()["pid"] != killed)
        seen()
        client.set("b", "2")
        cache.flush(LIMIT)
        shown = b"".join(subprocess.run([ADMIN, "stats", name, *more], capture_output=True, check=True, timeout=LIMIT).stdout for more in ([], ["--json"]))
    assert service.stop() == 0
    with contextlib.closing(shmcache.SQLStore(url, table)) as store:
        assert {key: entry.value for key, entry in store.load_many([b"a", b"b"]).items()} == {b"a": b"1", b"b": b"2"}
    assert secret.encode() not in shown and b"serve" in shown
    assert secret not in service.said()
    assert ("--store-file" in service.said()) == (how == "argument")


def test_a_function_makes_the_store(serve):
    service = serve("--store", "tests.integration.test_sidecar_store:squares")
    with service.client() as client:
        assert client.get("12") == b"144" and client.get("x") is None
        with pytest.raises(redis.ResponseError, match="no save"):
            client.set("12", 1)


def test_a_segment_that_stands_before_no_store_is_said_to(serve, make):
    make()
    service = serve("--store", "tests.integration.test_sidecar_store:squares", size=None)
    assert service.process.wait(LIMIT) == 2
    assert "stands before no store" in service.said() and "Traceback" not in service.said()


def squares():
    def square(key):
        if not key.isdigit():
            raise KeyError(key)
        return Entry(b"%d" % int(key) ** 2)

    return shmcache.FunctionStore(load=square)


# ---- leases ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(cache):
    with serving(cache.name) as server, redis.Redis(port=server.port, retry=None) as client:
        yield client


def test_one_of_those_that_ask_gets_a_lease_and_fills_it(plain):
    value, token = plain.execute_command("LEASE.GET", "k")
    assert value is None and token > 0
    with another(plain) as other:
        assert other.execute_command("LEASE.GET", "k", 5) == [None, None]
        assert plain.execute_command("LEASE.FILL", "k", token, "v", "EX", 100) == 1
        assert other.execute_command("LEASE.GET", "k") == [b"v", None]
    assert 90 < plain.ttl("k") <= 100
    assert plain.execute_command("LEASE.FILL", "k", token, "w") == 0 and plain.get("k") == b"v"


@pytest.mark.parametrize("change", ["SET k new", "DEL k", "FLUSHALL", "INCR k"])
def test_a_change_voids_a_lease(plain, change):
    _, token = plain.execute_command("LEASE.GET", "k")
    plain.execute_command(*change.split())
    assert plain.execute_command("LEASE.FILL", "k", token, "old") == 0
    assert plain.get("k") == {"SET k new": b"new", "INCR k": b"1"}.get(change)


def test_a_lease_that_is_given_back_is_given_to_the_next(plain):
    _, token = plain.execute_command("LEASE.GET", "k")
    assert plain.execute_command("LEASE.RELEASE", "k", token) == 1
    assert plain.execute_command("LEASE.FILL", "k", token, "v") == 0
    assert plain.execute_command("LEASE.GET", "k")[1] > token


def test_a_token_that_is_no_number_for_every_client_is_given_as_text(plain, cache):
    """JavaScript's numbers tell integers apart up to 2^53; after restores, versions are higher some day."""
    cache.views(writable=True).stripes["seq"][:] = 1 << 60
    _, token = plain.execute_command("LEASE.GET", "k")
    assert isinstance(token, bytes) and int(token) > 1 << 60
    assert plain.execute_command("LEASE.FILL", "k", token, "v") == 1
    assert plain.get("k") == b"v"


@pytest.mark.parametrize("words", ["LEASE.GET k 0", "LEASE.GET k x", "LEASE.FILL k 1 v EX", "LEASE.FILL k 1 v EX 0", "LEASE.FILL k x v", "LEASE.GET k 1 2"])
def test_a_lease_command_that_is_wrong_says_so(plain, words):
    with pytest.raises(redis.ResponseError):
        plain.execute_command(*words.split())


def test_a_lease_of_another_process_is_not_filled_here(plain, cache):
    with serving(cache.name) as server, redis.Redis(port=server.port) as other:
        _, token = plain.execute_command("LEASE.GET", "k")
        assert other.execute_command("LEASE.FILL", "k", token, "v") in (0, 1)  # the same process here; of others see the next test


def test_leases_with_several_event_loops(serve):
    service = serve("--workers", "2")
    clients = {}
    until(lambda: clients.setdefault((c := service.client(single_connection_client=True)).info("server")["process_id"], c) and len(clients) == 2)
    one, two = clients.values()
    _, token = one.execute_command("LEASE.GET", "k")
    assert two.execute_command("LEASE.GET", "k") == [None, None]
    assert two.execute_command("LEASE.FILL", "k", token, "v") == 0
    assert one.execute_command("LEASE.FILL", "k", token, "v") == 1
    assert two.get("k") == b"v"
    for client in clients.values():
        client.close()


def test_a_lease_is_of_what_the_store_has_not_either(front):
    store = DictStore()
    store.store_many({b"k": (b"v", None)})
    cache, client = front(store, "through")
    assert client.execute_command("LEASE.GET", "k") == [b"v", None]
    _, token = client.execute_command("LEASE.GET", "n")
    assert client.execute_command("LEASE.FILL", "n", token, "x") == 1 and client.get("n") == b"x"
    assert rows(cache, b"n") == {}
