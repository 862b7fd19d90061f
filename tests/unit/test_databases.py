"""How many items each database has: DBSIZE and INFO keyspace, against a look at every slot."""

from __future__ import annotations

import contextlib
import io
import os
import random
import select
import signal
import threading
import time

import pytest

import shmcache
from shmcache import errors
from shmcache.core import _sweep
from shmcache.sidecar.commands import keys
from shmcache.sidecar.server import Connection
from shmcache.supervisor import dump, snapshot
from tests import census
from tests.integration.service import until
from tests.redis.inprocess import InProcess
from tests.redis.resp import encode


@pytest.fixture
def serve():
    servers = []

    def start(name, **settings):
        servers.append(InProcess(name, settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ask(server, client, *commands):
    """The lines of the replies to these commands."""
    client.transport.written.clear()
    words = [command if isinstance(command, tuple) else tuple(command.encode().split()) for command in commands]
    return server.say(client, b"".join(map(encode, words))).split(b"\r\n")[:-1]


def dbsizes(server, client, databases=range(16)):
    return {d: int(ask(server, client, f"SELECT {d}", "DBSIZE")[-1][1:]) for d in databases}


def keyspace(server, client):
    lines = ask(server, client, "INFO keyspace")
    return {int(line[2 : line.index(b":")]): line.split(b":")[1] for line in lines if line.startswith(b"db")}


def agree(server, client, cache):
    """What all that say it say is what is there."""
    there = census.sizes(cache)
    assert dbsizes(server, client) == {d: there.get(d, (0, 0))[0] for d in range(16)}
    assert keyspace(server, client) == {d: b"keys=%d,expires=%d,avg_ttl=0" % size for d, size in there.items()}
    assert cache.verify() == []


def unsure(cache):
    return int((cache.segment.stripes["turn"] & 1).sum())


def test_sixteen_databases_are_the_default(make, serve):
    server = serve(make().name)
    client = server.connect()
    assert ask(server, client, "SELECT 15", "SET k v", "CONFIG GET databases", "SELECT 16") == [
        b"+OK", b"+OK", b"*2", b"$9", b"databases", b"$2", b"16", b"-ERR DB index is out of range",
    ]  # fmt: skip


def test_each_database_is_counted(make, serve):
    cache = make()
    server = serve(cache.name)
    client = server.connect()
    ask(server, client, "SET zero 0", "SET nil 0 EX 100", "SELECT 1", "SET one 1", "SET uno 1", "SET eins 1", "SELECT 15", "SET k v EX 9", "SET l v")
    assert dbsizes(server, client, (0, 1, 2, 15)) == {0: 2, 1: 3, 2: 0, 15: 2}
    assert keyspace(server, client) == {
        0: b"keys=2,expires=1,avg_ttl=0", 1: b"keys=3,expires=0,avg_ttl=0", 15: b"keys=2,expires=1,avg_ttl=0",
    }  # fmt: skip
    ask(server, client, "SELECT 15", "EXPIRE l 9", "PERSIST k", "SELECT 1", "FLUSHDB", "SET one again", "SELECT 0", "DEL zero", "PERSIST nil")
    assert keyspace(server, client) == {
        0: b"keys=1,expires=0,avg_ttl=0", 1: b"keys=1,expires=0,avg_ttl=0", 15: b"keys=2,expires=1,avg_ttl=0",
    }  # fmt: skip
    ask(server, client, "FLUSHALL")
    assert keyspace(server, client) == {}
    agree(server, client, cache)


@pytest.mark.parametrize("flush", [["FLUSHDB"], ["MULTI", "FLUSHDB", "FLUSHDB", "EXEC"], [(b"EVAL", b"return redis.call('flushdb')", b"1", b"l1")]])
def test_a_size_is_not_a_walk(make, serve, monkeypatch, flush):
    """Nor does a database that was flushed, or that others have written to, need one."""
    cache = make("16M")
    server = serve(cache.name)
    client = server.connect()
    for d in (0, 1, 2):
        ask(server, client, f"SELECT {d}", *(f"SET k{i} v" for i in range(300)))
    ask(server, client, "SELECT 2", *flush, *(f"SET l{i} v" for i in range(40)))
    before = bytes(cache.segment.stripes["turn"]), bytes(cache.segment.databases)
    assert dbsizes(server, client, (0, 1, 2)) == {0: 300, 1: 300, 2: 40}
    assert (bytes(cache.segment.stripes["turn"]), bytes(cache.segment.databases)) == before, "a stripe was counted anew"
    monkeypatch.setattr("shmcache.sidecar.commands.keys.all_keys", None)
    assert dbsizes(server, client, (0, 1, 2)) == {0: 300, 1: 300, 2: 40}


@pytest.mark.parametrize("seed", range(6))
def test_counts_are_what_a_look_at_every_slot_says(make, serve, seed):
    rng = random.Random(seed)
    cache = make("4M", stripes=16 if seed % 2 else 1024)
    server = serve(cache.name)
    client = server.connect()
    sizes = (1, 60, 900, 9000, 200_000)
    generations = set()
    for _ in range(40):
        for _ in range(rng.randrange(120)):
            d, key = rng.choice((0, 0, 0, 1, 2, 9, 15)), b"k%d" % rng.randrange(300)
            value = b"v" * rng.choices(sizes, (30, 20, 10, 3, 1))[0]
            expiry = rng.choice(((), (), (b"EX", b"100"), (b"PX", b"1")))
            command = rng.choices(
                ((b"SET", key, value, *expiry), (b"DEL", key), (b"EXPIRE", key, b"50"), (b"PERSIST", key), (b"INCR", key), (b"GETDEL", key),
                 (b"RENAME", key, b"renamed"), (b"COPY", key, key, b"DB", b"2", b"REPLACE"), (b"GET", key), (b"LEASE.GET", key, b"1")),
                (60, 8, 6, 6, 4, 3, 3, 3, 20, 2))[0]  # fmt: skip
            ask(server, client, f"SELECT {d}", command)
        what = rng.randrange(12)
        if what == 0:
            ask(server, client, "FLUSHALL")
        elif what < 4:
            ask(server, client, f"SELECT {rng.choice((1, 2, 9))}", "FLUSHDB")
        elif what == 4:
            ask(server, client, "SELECT 0", "FLUSHDB")
        elif what == 5:
            cache.namespace("db:2").clear()
        elif what == 6:  # as worker processes do it, and what databases have nothing to do with
            for name in ("db:9", "db:16", "db:100", "db:01", "db:", "db", "other", "db:x"):
                space = cache.namespace(name)
                space.set(f"w{rng.randrange(20)}", b"worker", rng.choice((None, 60)), tags=["t"] if rng.random() < 0.3 else None)
        elif what == 7:
            cache.set_many({b"fill%d" % i: b"f" * 500 for i in range(3000)})  # evicts
        elif what == 8:
            cache.clear()
        elif what == 9:  # who holds stripes of several databases at once
            ask(server, client, "SELECT 1", "MULTI", "SET m 1", "SELECT 2", "SET m 2 EX 9", "SELECT 9", "FLUSHDB", "SET m 3", "DBSIZE", "EXEC")
        elif what == 10:
            cache.delete(b"\0ns\0db:%d" % rng.choice((1, 2, 9)))  # as if it was evicted
        elif what == 11 and generations:  # one that was there before, or is there
            d, generation = rng.choice(sorted(generations))
            cache.set(b"\0ns\0db:%d" % d, generation)
        generations |= {(d, generation) for d in (1, 2, 9) if (generation := cache.get(b"\0ns\0db:%d" % d))}
        agree(server, client, cache)


def test_without_databases_all_keys_are_the_firsts(make, serve):
    cache = make()
    server = serve(cache.name, databases="1")
    client = server.connect()
    cache.namespace("db:1").set("k", 1)
    ask(server, client, "SET k v")
    assert ask(server, client, "DBSIZE") == [b":%d" % len(cache)] == [b":3"]
    assert keyspace(server, client) == {0: b"keys=3,expires=0,avg_ttl=0"}
    cache.namespace("db:1").set("expires", 1, 100)
    ask(server, client, "EXPIRE k 100")
    assert keyspace(server, client) == {0: b"keys=4,expires=2,avg_ttl=0"}


def test_databases_beyond_the_sixteenth_are_counted_by_a_walk(make, serve):
    cache = make()
    server = serve(cache.name, databases="20")
    client = server.connect()
    ask(server, client, "SET zero 0", "SELECT 17", "SET a 1", "SET b 1", "SELECT 3", "SET c 1")
    assert dbsizes(server, client, (0, 3, 16, 17)) == {0: 1, 3: 1, 16: 0, 17: 2}
    assert ask(server, client, "SELECT 0", "FLUSHDB", "DBSIZE", "SELECT 17", "DBSIZE") == [b"+OK", b"+OK", b":0", b"+OK", b":2"]


# -- FLUSHDB of the first: all of it goes, and nothing else


def test_flushdb_of_the_first_takes_nothing_of_the_others(make, serve):
    """Whether they have keys or not: it is never a clear() of the segment."""
    cache = make()
    server = serve(cache.name)
    client = server.connect()
    epoch = int(cache.segment.header["epoch"])
    for change, there in (("SET k v", [b"$1", b"v"]), ("DEL k", [b"$-1"])):
        ask(server, client, "SELECT 3", change, "SELECT 0", *(f"SET k{i} v" for i in range(50)))
        assert ask(server, client, "FLUSHDB", "DBSIZE", "GET k1", "SELECT 3", "GET k") == [b"+OK", b":0", b"$-1", b"+OK", *there]
        agree(server, client, cache)
    after = int(cache.segment.header["epoch"])
    assert after == epoch


@pytest.mark.parametrize("served", ["4", "16", "20"])
@pytest.mark.parametrize("other", [None, "db:1"])
@pytest.mark.parametrize("whose", ["db:", "db:x", "db:9", "db:20", "db:200"])
def test_flushdb_of_the_first_keeps_databases_that_this_server_does_not_serve(make, serve, served, other, whose):
    """Of a server with more of them on the same segment, and of workers."""
    cache = make()
    server = serve(cache.name, databases=served)
    client = server.connect()
    if other:
        cache.namespace(other).set("k", 1)
    cache.namespace(whose).set("k", 1)
    assert ask(server, client, "SET a 1", "FLUSHDB", "DBSIZE") == [b"+OK", b"+OK", b":0"]
    assert cache.namespace(whose).get("k") == 1


@pytest.mark.parametrize("other", [False, True])
def test_flushdb_of_the_first_leaves_nothing_of_it(make, serve, other):
    """Claims, what has expired and what is stale go, too: a lease of before fills nothing, and DBSIZE is 0."""
    cache = make()
    server = serve(cache.name)
    client = server.connect()
    if other:
        ask(server, client, "SELECT 1", "SET x 1", "SELECT 0")
    lease = cache.get_lease("leased")
    cache.get_or_set("stale", lambda: "old", ttl=0.02, stale_ttl=100)
    cache.set("tagged", 1, tags=["t"])
    cache.namespace("of workers").set("k", 1)
    ask(server, client, "LEASE.GET l 10", *(f"SET k{i} v PX 1" for i in range(100)), "SET live v", (b"SET", b"", b"no name"))
    until(lambda: cache.get("stale") is None and ask(server, client, "KEYS k*") == [b"*0"])
    assert ask(server, client, "FLUSHDB", "DBSIZE", "KEYS *") == [b"+OK", b":0", b"*0"]
    assert 0 not in keyspace(server, client)
    assert not cache.fill(lease, "computed before")
    assert cache.get_or_set("stale", lambda: "new", ttl=1, stale_ttl=100) == "new"
    assert cache.namespace("of workers").get("k") is None
    agree(server, client, cache)


def test_flushdb_of_the_first_does_not_go_by_counts_that_are_being_changed(make, serve):
    """A writer that holds the stripe of another database's only key has just said that there is none."""
    cache = make(lock_limit=0.1)
    server = serve(cache.name)
    client = server.connect()
    ask(server, client, "SELECT 1", "SET only v", "SELECT 0", "SET zero v")
    with interrupted(cache, cache.namespace("db:1").prefix() + b"only", False) as at:
        view = cache.views(writable=True)
        view.databases["n"][at, 1] = 0
        del view
        reply = ask(server, client, "FLUSHDB")
    assert reply[0].startswith(b"-TRYAGAIN")
    assert ask(server, client, "SELECT 1", "GET only") == [b"+OK", b"$1", b"v"]
    assert ask(server, client, "SELECT 0", "FLUSHDB", "DBSIZE", "SELECT 1", "GET only") == [b"+OK", b"+OK", b":0", b"+OK", b"$1", b"v"]
    agree(server, client, cache)


def test_flushdb_of_the_first_in_a_transaction(make, serve):
    cache = make()
    server = serve(cache.name)
    client = server.connect()
    ask(server, client, "SELECT 1", "SET k one", "SELECT 0", *(f"SET k{i} v" for i in range(300)))
    transaction = ("MULTI", "SET k0 new", "FLUSHDB", "DBSIZE", "SET k1 after", "SELECT 1", "SET l one", "SELECT 0", "FLUSHDB", "SET k2 last", "EXEC")
    assert ask(server, client, *transaction)[-10:] == [b"*9", b"+OK", b"+OK", b":0", b"+OK", b"+OK", b"+OK", b"+OK", b"+OK", b"+OK"]
    assert ask(server, client, "KEYS *", "SELECT 1", "MGET k l") == [b"*1", b"$2", b"k2", b"+OK", b"*2", b"$3", b"one", b"$3", b"one"]
    assert ask(server, client, "SELECT 0", (b"EVAL", b"return {redis.call('flushdb'), redis.call('dbsize')}", b"0")) == [b"+OK", b"*2", b"+OK", b":0"]
    agree(server, client, cache)


@contextlib.contextmanager
def interrupted(cache, name, is_dead):
    """Another process died, or is stopped, as it counted an item of this name: the turn of its stripe is odd, and its lock taken."""
    before = cache.segment.stripes["word"].copy()
    held, end = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        InProcess(cache.name).executor.hold([name])
        os.write(held[1], b".")
        os.close(end[1])
        os.read(end[0], 1)
        os._exit(0)
    os.read(held[0], 1)
    view = cache.views(writable=True)
    at = int((view.stripes["word"] != before).argmax())
    view.stripes["turn"][at] |= 1
    del view
    if is_dead:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    try:
        yield at
    finally:
        for fd in (*held, *end):
            os.close(fd)
        if not is_dead:
            os.waitpid(pid, 0)


@pytest.mark.parametrize("is_dead", [True, False])
def test_a_writer_that_died_or_was_stopped_keeps_no_size_of_the_first_back(make, serve, is_dead):
    """Nor one of another database, for a transaction, which waits for nobody."""
    cache = make(lock_limit=5)
    server = serve(cache.name)
    client = server.connect()
    ask(server, client, *(f"SET k{i} v" for i in range(20)), "SELECT 1", *(f"SET k{i} v" for i in range(20)), "SELECT 0")
    with interrupted(cache, b"k7", is_dead):
        began = time.monotonic()
        assert ask(server, client, "MULTI", "DBSIZE", "RANDOMKEY", "SELECT 1", "DBSIZE", "RANDOMKEY", "EXEC")[6:8] == [b"*5", b":20"]
        replies = ask(server, client, "SELECT 1", "MULTI", "DBSIZE", "RANDOMKEY", "EXEC", "SELECT 0")
        assert replies[4:6] == [b"*2", b":20"]
        assert ask(server, client, "DBSIZE", "INFO keyspace")[0] == b":20"
        assert ask(server, client, "RANDOMKEY")[0][:1] == b"$"
        assert time.monotonic() - began < 4, "it waited for the stripe's holder"
    agree(server, client, cache)
    assert unsure(cache) == 0


def test_flushdb_of_the_first_takes_over_the_stripe_of_a_dead_writer(make, serve):
    cache = make()
    server = serve(cache.name)
    client = server.connect()
    ask(server, client, "SELECT 1", "SET only v", "SELECT 0", *(f"SET k{i} v" for i in range(20)))
    with interrupted(cache, cache.namespace("db:1").prefix() + b"only", True) as at:
        view = cache.views(writable=True)
        view.databases["n"][at, 1] = 0
        del view
        assert ask(server, client, "FLUSHDB", "DBSIZE", "SELECT 1", "GET only") == [b"+OK", b":0", b"+OK", b"$1", b"v"]
    agree(server, client, cache)


def test_a_size_counts_no_stripe_because_somebody_flushes_the_database(make, serve):
    """A stripe that knows nothing of the generation that was asked for may know the one that has come since."""
    cache = make()
    server = serve(cache.name)
    client = server.connect()
    ask(server, client, "SELECT 1", *(f"SET k{i} v" for i in range(300)))
    before = cache.segment.stripes["turn"].copy()
    pid = os.fork()
    if pid == 0:
        space = shmcache.attach(cache.name).namespace("db:1")
        while True:
            space.clear()
    for _ in range(3000):
        ask(server, client, "INFO keyspace", "DBSIZE")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    counted = int((cache.segment.stripes["turn"] != before).sum())
    assert counted <= 1, "its generation is in one stripe"


def test_info_asks_for_sizes_only_where_it_says_them(make, serve):
    cache = make()
    server = serve(cache.name)
    client = server.connect()
    view = cache.views(writable=True)
    view.stripes["turn"] |= 1
    del view
    ask(server, client, "INFO server", "INFO stats")
    assert unsure(cache) == 1024
    ask(server, client, "INFO")
    assert unsure(cache) < 1024


def test_a_key_that_is_replaced_is_counted_all_the_while(make, serve):
    """A write that changes no count does not begin to change them."""
    cache = make()
    server = serve(cache.name)
    client = server.connect()
    ask(server, client, "SET a 1", "SET b 1 EX 100", "SELECT 1", "SET a 1", "SET b 1 EX 100")
    cache.namespace("of workers").set("k", 1)
    turns = bytes(cache.segment.stripes["turn"])
    ask(server, client, "SET a 22", "SET b 22 EX 50", "SELECT 0", "SET a 22", "SET b 22 EX 50", "EXPIRE b 70")
    cache.namespace("of workers").set("k", 2)
    cache.namespace("of workers").set("new", 2)
    same = bytes(cache.segment.stripes["turn"]) == turns
    assert same
    agree(server, client, cache)


@pytest.fixture
def restored(make, name, tmp_path, monkeypatch):
    """restore(between): a segment with 100 keys in each of databases 0 and 5 is restored; between() is called once workers are in, and before
    their keys are."""
    tmp_path.chmod(0o700)
    cache = make()
    server = InProcess(cache.name)
    client = server.connect()
    ask(server, client, *(f"SET k{i} v" for i in range(100)), "SELECT 5", *(f"SET five{i} v" for i in range(100)))
    snapshot.write(cache, tmp_path)
    server.close()
    cache.close()
    shmcache.unlink(name)
    put_all = snapshot._put_all

    def restore(between):
        def put(into, found, logs, progress, back, heat, epoch, generations, tail):
            if not generations:
                between()
            put_all(into, found, logs, progress, back, heat, epoch, generations, tail)

        monkeypatch.setattr(snapshot, "_put_all", put)
        snapshot.restore(name, tmp_path)
        return shmcache.attach(name)

    yield restore
    with contextlib.suppress(shmcache.SegmentNotFound):
        shmcache.unlink(name)


def test_flushdb_of_the_first_waits_for_the_end_of_a_restore(restored, serve, name, monkeypatch):
    """It takes what was still to be put in, and nothing of other databases."""
    asked, said = threading.Event(), []
    monkeypatch.setattr(Connection, "check_time", lambda client: asked.set())

    def flush():
        server = serve(name)
        client = server.connect()
        said.extend(ask(server, client, "SELECT 1", "SET mine v", "SELECT 0", "SET zero v", "FLUSHDB", "DBSIZE"))

    flushing = threading.Thread(target=flush)

    def between():
        flushing.start()
        asked.wait(20)

    cache = restored(between)
    flushing.join(60)
    assert said == [b"+OK", b"+OK", b"+OK", b"+OK", b"+OK", b":0"]
    server = serve(name)
    client = server.connect()
    assert dbsizes(server, client, (0, 1, 5)) == {0: 0, 1: 1, 5: 100}
    assert ask(server, client, "SELECT 5", "GET five7") == [b"+OK", b"$1", b"v"]
    agree(server, client, cache)
    cache.close()


def test_flushdb_of_the_first_does_not_wait_for_ever_for_a_restore(restored, serve, name, monkeypatch):
    said = []
    monkeypatch.setattr(keys, "RESTORE_WAIT", 0.02, raising=False)

    def between():
        server = serve(name)
        client = server.connect()
        said.extend(ask(server, client, "FLUSHDB", "MULTI", "FLUSHDB", "EXEC", "SELECT 5", "FLUSHDB", "SET new v"))

    cache = restored(between)
    loading = b"-LOADING the cache is being restored: what is still to come of this database would not go. Try again when INFO says loading:0"
    assert said == [loading, b"+OK", b"+QUEUED", b"*1", loading, b"+OK", b"+OK", b"+OK"]
    server = serve(name)
    client = server.connect()
    assert dbsizes(server, client, (0, 5)) == {0: 100, 5: 1}
    assert ask(server, client, "SELECT 0", "FLUSHDB", "DBSIZE") == [b"+OK", b"+OK", b":0"]
    cache.close()


def test_what_is_not_known_is_counted_once(make, serve):
    """Of stripes in which a writer died, and of a generation that no write has told of, as one that is restored late."""
    cache = make()
    server = serve(cache.name)
    client = server.connect()
    for d in (0, 1, 2):
        ask(server, client, f"SELECT {d}", *(f"SET k{i} v EX 50" for i in range(100)))
    view = cache.views(writable=True)
    view.stripes["turn"] |= 1
    view.stripes["others"] = view.stripes["expiring"] = 77
    view.databases["n"] = view.databases["tag"] = 99
    ask(server, client, "SELECT 1", "SET more v", "DEL k3")
    assert unsure(cache) == len(view.stripes), "a writer believed them"
    agree(server, client, cache)
    assert unsure(cache) == 0
    ask(server, client, "SELECT 1", "SET still v", "SELECT 2", "FLUSHDB", "SET k v")
    agree(server, client, cache)

    for d in (1, 2):  # the header has not been told of their generations, and they are written to
        view.header["newest"][d] = 1
        view.databases["tag"][:, d] = 0
        view.databases["n"][:, d] = view.databases["expiring"][:, d] = 0
        ask(server, client, f"SELECT {d}", *(f"SET m{i} v" for i in range(50)))
    agree(server, client, cache)
    tags = bytes(view.databases["tag"])
    ask(server, client, "SELECT 1", *(f"SET n{i} v" for i in range(50)))
    agree(server, client, cache)
    assert bytes(view.databases["tag"]) == tags, "they were counted again"
    del view


@pytest.mark.parametrize("how", ["the turn is odd", "newest is of no generation", "its holder is dead"])
def test_info_counts_what_is_not_known(make, serve, how):
    """As DBSIZE would, which comes after it here: a writer died as it counted, or in FLUSHDB before the generation was stored, and let go or not."""
    cache = make(stripes=16)
    server = serve(cache.name)
    client = server.connect()
    ask(server, client, "SELECT 1", *(f"SET k{i} v EX 50" for i in range(100)), "SET only v", "SELECT 0")
    with contextlib.ExitStack() as stack:
        at = slice(None)
        if how == "its holder is dead":
            at = stack.enter_context(interrupted(cache, cache.namespace("db:1").prefix() + b"only", True))
        view = cache.views(writable=True)
        view.databases["n"][at, 1] = view.databases["expiring"][at, 1] = 0
        if how == "newest is of no generation":
            view.header["newest"][1] = 1
            view.databases["tag"][:, 1] = 3
        else:
            view.stripes["turn"][at] |= 1
        del view
        assert keyspace(server, client)[1] == b"keys=101,expires=100,avg_ttl=0"
    agree(server, client, cache)


GENERATION = b"\0ns\0db:1"


def renamed(cache, client):
    client("SELECT 0", (b"RENAME", GENERATION, b"away"), "SELECT 1", "SET meanwhile v", "SELECT 0", (b"RENAME", b"away", GENERATION))


def flushed_and(store):
    """The generation of before a FLUSHDB is stored again."""

    def act(cache, client):
        old = cache.get(GENERATION)
        client((b"COPY", GENERATION, b"kept"), "SELECT 1", "FLUSHDB", *(f"SET new{i} v" for i in range(100)), "SELECT 0")
        store(cache, client, old)

    return act


def restored_by_a_client(cache, client, old):
    dumped = client((b"DUMP", b"kept"))
    client((b"RESTORE", GENERATION, b"0", b"\r\n".join(dumped[1:]), b"REPLACE"))


def stored_before_a_clear(cache, client):
    """And with it the items that carry it, before it."""
    old, prefix = cache.get(GENERATION), cache.namespace("db:1").prefix()
    client("FLUSHALL", "SELECT 1", *(f"SET new{i} v" for i in range(100)))
    cache.set_many({prefix + b"k%d" % i: b"v" for i in range(100)})
    cache.set(GENERATION, old)


AGAIN = {
    "renamed": renamed,
    "copied": flushed_and(lambda cache, client, old: client((b"COPY", b"kept", GENERATION, b"REPLACE"))),
    "set by a client": flushed_and(lambda cache, client, old: client((b"SET", GENERATION, old))),
    "getset": flushed_and(lambda cache, client, old: client((b"GETSET", GENERATION, old))),
    "in a transaction": flushed_and(lambda cache, client, old: client("MULTI", (b"SET", GENERATION, old), "EXEC")),
    "restored by a client": flushed_and(restored_by_a_client),
    "set": flushed_and(lambda cache, client, old: cache.set(GENERATION, old)),
    "added": flushed_and(lambda cache, client, old: cache.delete(GENERATION) and cache.add(GENERATION, old)),
    "by its version": flushed_and(lambda cache, client, old: cache.cas(GENERATION, old, cache.gets(GENERATION)[1])),
    "set as a number": flushed_and(lambda cache, client, old: cache.set(GENERATION, int.from_bytes(old, "little", signed=True))),
    "behind its items": stored_before_a_clear,
}


@pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN)
def test_a_generation_that_is_stored_again_is_counted(make, serve, again):
    """Items carry it already, in stripes that count those of another one."""
    cache = make(stripes=16)
    server = serve(cache.name)
    client = server.connect()
    ask(server, client, "SELECT 1", *(f"SET k{i} v EX 100" for i in range(100)), "SELECT 0")
    old = cache.get(GENERATION)
    again(cache, lambda *commands: ask(server, client, *commands))
    now = cache.get(GENERATION)
    assert now in (old, int.from_bytes(old, "little", signed=True))
    assert keyspace(server, client)[1].startswith(b"keys=100,"), "INFO comes first"
    assert ask(server, client, "SELECT 1", "MULTI", "DBSIZE", "EXEC", "DBSIZE")[-2:] == [b":100", b":100"]
    if isinstance(now, bytes):  # the census takes no number for a generation
        agree(server, client, cache)
    ask(server, client, "SELECT 1", *(f"SET m{i} v" for i in range(50)), *(f"DEL k{i}" for i in range(30)))
    assert dbsizes(server, client, (0, 1))[1] == 120
    before = bytes(cache.segment.stripes["turn"]), bytes(cache.segment.databases)
    assert dbsizes(server, client, (0, 1))[1] == 120
    assert (bytes(cache.segment.stripes["turn"]), bytes(cache.segment.databases)) == before, "a stripe was counted again"
    assert cache.verify() == []
    ask(server, client, "SELECT 1", "FLUSHDB", *(f"SET l{i} v" for i in range(40)))
    agree(server, client, cache)


@pytest.mark.parametrize("clears_again", [False, True])
@pytest.mark.parametrize("is_first", ["parent", "child"])
def test_a_fork_child_that_goes_on_with_a_clear_makes_another_generation(make, serve, is_first, clears_again):
    """A signal's handler forks while clear() waits. One of the two ends it, and stores items; then the other goes on with it."""
    cache = make(stripes=16, lock_limit=30)
    server = serve(cache.name)
    client = server.connect()
    space = cache.namespace("db:1")
    space.set("k", 1)
    held, let_go, over = os.pipe(), os.pipe(), os.pipe()
    parent, forked = os.getpid(), []

    def fork(*_):
        if forked:
            return
        forked.append(None)
        forked[0] = os.fork()
        if (forked[0] == 0) == (is_first == "child"):
            os.write(let_go[1], b".")
        else:
            os.close(over[1])
            os.read(over[0], 1)  # its end, when the first closes it, or fails

    def fill():
        for i in range(100):
            space.set(f"k{i}", 1)

    holder = os.fork()
    if holder == 0:
        executor = InProcess(cache.name).executor
        executor.hold([GENERATION])
        words = bytes(cache.segment.stripes["word"])
        os.write(held[1], b".")
        until(lambda: bytes(cache.segment.stripes["word"]) != words)  # somebody waits
        while not select.select([let_go[0]], [], [], 0.05)[0]:
            os.kill(parent, signal.SIGUSR1)  # again if it did not sleep just then
        executor.release()
        os._exit(0)
    before = signal.signal(signal.SIGUSR1, fork)
    failed = 1
    try:
        os.read(held[0], 1)
        space.clear()
        if (os.getpid() == parent) == (is_first == "parent"):
            fill()
            cache.set("first", cache.get(GENERATION))
            if clears_again:
                space.clear()
                fill()
            os.close(over[1])
        failed = 0
    finally:
        if os.getpid() != parent:
            os._exit(failed)
        signal.signal(signal.SIGUSR1, before)
    for fd in (*held, *let_go, over[0]):
        os.close(fd)
    assert [os.waitpid(child, 0)[1] for child in (holder, forked[0])] == [0, 0]
    assert cache.get(GENERATION) != cache.get("first")
    assert space.get("k7") is None, "what was cleared is back"
    assert dbsizes(server, client, (1,)) == {1: 0}
    fill()
    assert dbsizes(server, client, (1,)) == {1: 100}
    agree(server, client, cache)


def test_counts_are_right_whoever_is_stopped_while_all_clear(make, serve):
    """Three processes clear a database and fill it; one at a time is stopped for a while, wherever it is."""
    cache = make(stripes=16, lock_limit=30)
    server = serve(cache.name)
    client = server.connect()
    rng = random.Random(7)
    children, end = [], os.pipe()
    for n in range(3):
        children.append(os.fork())
        if children[-1] == 0:
            space = shmcache.attach(cache.name).namespace("db:1")
            while not select.select([end[0]], [], [], 0)[0]:
                space.clear()
                for i in range(30):
                    space.set(f"{n}.{i}", 1, 100 if i % 2 else None)
            os._exit(0)
    for _ in range(40):
        child = rng.choice(children)
        os.kill(child, signal.SIGSTOP)
        ask(server, client, "INFO keyspace")
        os.kill(child, signal.SIGCONT)
        assert int(ask(server, client, "SELECT 1", "DBSIZE")[1][1:]) <= 90
    os.write(end[1], b".")
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    for fd in end:
        os.close(fd)
    agree(server, client, cache)


@pytest.mark.parametrize("rubbish", [b"v" * 7, b"v" * 200_000, "text", [1], b""])
def test_what_is_no_generation_gives_way_to_one(make, serve, rubbish):
    """To the same one for all who ask."""
    cache = make("8M")
    server = serve(cache.name)
    client = server.connect()
    space = cache.namespace("db:1")
    cache.set(GENERATION, rubbish, 1000)
    ask(server, client, "SELECT 1", "SET k v")
    assert space.get("k") == b"v"
    assert cache.ttl(GENERATION) == float("inf")
    cache.set(GENERATION, rubbish)
    space.set("k", b"w")
    assert ask(server, client, "SELECT 1", "GET k", "DBSIZE") == [b"+OK", b"$1", b"w", b":1"]
    cache.set(b"\0tag\0t", rubbish)
    cache.set("tagged", 1, tags=["t"])
    assert cache.get("tagged") == 1
    agree(server, client, cache)


@pytest.mark.parametrize("how", ["negative", "stale", "invalidated", "tagged", "claimed", "expired"])
@pytest.mark.parametrize("key", [GENERATION, b"\0tag\0t"])
def test_what_is_there_for_nobody_gives_way_to_a_generation(make, how, key):
    cache = make()
    if how == "negative":
        cache._put_negative(key, 1000)
    elif how == "stale":
        cache.get_or_set(key, lambda: 1, 0.001, stale_ttl=1000)
        until(lambda: cache.get(key) is None)
    elif how == "invalidated":
        cache.set(key, 1, tags=["other"])
        cache.invalidate_tag("other")
    elif how == "tagged":
        cache.set(key, 1, tags=["other"])
    elif how == "claimed":
        cache.claim(key, 1000)
    else:
        cache.set(key, 1, 0.001)
        until(lambda: cache.get(key) is None)
    if key == GENERATION:
        cache.namespace("db:1").set("k", 1)
        assert cache.namespace("db:1").get("k") == 1
    else:
        cache.set("k", 1, tags=["t"])
        assert cache.get("k") == 1


def test_generations_that_begin_alike_are_two(make, serve):
    """Their first bytes are the same, as a client may choose them."""
    cache = make(stripes=16)
    server = serve(cache.name)
    client = server.connect()
    for n, generation in enumerate((b"same1111", b"same2222", b"1111same", b"2222same")):
        ask(server, client, "SELECT 0", (b"SET", GENERATION, generation), "SELECT 1", *(f"SET {n}.{i} v" for i in range(100)))
        assert ask(server, client, "DBSIZE") == [b":100"]
        agree(server, client, cache)


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_what_is_loaded_is_counted(make, name, serve, flushed, empty):
    """Into another segment, or into the same. What a database has there stays."""
    cache = make(stripes=16)
    server = serve(cache.name)
    client = server.connect()
    for d in (1, 2):
        ask(server, client, f"SELECT {d}", *(f"SET k{i} v EX 1000" for i in range(100)))
    ask(server, client, "SELECT 2", "FLUSHDB", "SET only v", (b"SET", b"", b"no name"))
    out = io.BytesIO()
    assert dump.dump(cache, out) == 102
    with contextlib.ExitStack() as stack:
        if empty:
            cache = stack.enter_context(shmcache.create(name + "b", "8M", stripes=16))
            stack.callback(shmcache.unlink, cache.name)
            server = serve(cache.name)
            client = server.connect()
        if flushed:
            ask(server, client, "SELECT 1", "FLUSHDB", "SET new v")
        assert dump.load(cache, io.BytesIO(out.getvalue())) == 102
        assert keyspace(server, client) == {1: b"keys=%d,expires=100,avg_ttl=0" % (100 + flushed), 2: b"keys=2,expires=0,avg_ttl=0"}
        assert ask(server, client, "SELECT 1", "GET k7", "SELECT 2", "GET only", (b"GET", b"")) == [
            b"+OK", b"$1", b"v", b"+OK", b"$1", b"v", b"$7", b"no name",
        ]  # fmt: skip
        agree(server, client, cache)


def test_who_asks_by_an_old_generation_takes_no_count_from_the_new(make, serve, monkeypatch):
    """A transaction goes on with the generation that it began with, and counts what carries it, while others have flushed the database."""
    cache = make(stripes=16)
    server = serve(cache.name)
    client = server.connect()
    ask(server, client, "SELECT 1", "SET old 1")
    counted = keys.size_of

    def meanwhile(client):
        space = cache.namespace("db:1")
        space.clear()
        space.set("new", 1)
        view = cache.views(writable=True)
        view.stripes["turn"] |= 1
        del view
        return counted(client)

    monkeypatch.setattr(keys, "size_of", meanwhile)
    assert ask(server, client, "MULTI", "SET old2 1", "DBSIZE", "EXEC")[-3:] == [b"*2", b"+OK", b":2"]
    monkeypatch.undo()
    assert dbsizes(server, client, (1,)) == {1: 1}
    assert unsure(cache) == 0
    agree(server, client, cache)


def test_a_transaction_counts_what_it_began_with_where_stripes_count_the_new(make, serve, monkeypatch):
    """Others have flushed the database meanwhile, and written to it."""
    cache = make(stripes=16, lock_limit=0.01)
    server = serve(cache.name)
    client = server.connect()
    ask(server, client, "SELECT 1", *(f"SET k{i} v EX 100" for i in range(100)))
    counted = keys.size_of

    def meanwhile(client):
        space = cache.namespace("db:1")
        space.clear()
        for i in range(40):
            with contextlib.suppress(errors.StripeBusy):  # the transaction holds one
                space.set(f"new{i}", 1)
        return counted(client)

    monkeypatch.setattr(keys, "size_of", meanwhile)
    assert ask(server, client, "MULTI", "SET more 1", "DBSIZE", "EXEC")[-3:] == [b"*2", b"+OK", b":101"]
    monkeypatch.undo()
    agree(server, client, cache)


def test_a_write_that_a_flush_overtook_is_not_counted(make, serve):
    """As of a worker that has slept since it asked for the generation."""
    cache = make(stripes=16)
    server = serve(cache.name)
    client = server.connect()
    space = cache.namespace("db:1")
    old = space.prefix()
    for i in range(40):
        space.set(f"before{i}", 1)
    space.clear()
    for i in range(40):
        cache.set(old + b"late%d" % i, 1)
        space.set(f"k{i}", 1)
        cache.set(old + b"later%d" % i, 1, 60)
        cache.delete(old + b"before%d" % i)
    assert dbsizes(server, client, (0, 1)) == {0: 0, 1: 40}
    agree(server, client, cache)
    assert unsure(cache) == 0


def test_repair_mends_what_damage_has_made_of_the_counts(make, serve):
    cache = make()
    server = serve(cache.name)
    client = server.connect()
    ask(server, client, *(f"SET k{i} v EX 50" for i in range(100)), "SELECT 1", *(f"SET k{i} v EX 50" for i in range(100)))
    view = cache.views(writable=True)
    view.databases["n"] += 3
    view.databases["tag"][:, 1] ^= 2
    view.stripes["others"] += 1
    view.stripes["expiring"] ^= 1 << 33
    del view
    assert cache.verify() != []
    _sweep.repair(cache)
    agree(server, client, cache)
    assert unsure(cache) == 0
