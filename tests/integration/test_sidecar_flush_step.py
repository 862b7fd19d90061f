"""FLUSHDB and FLUSHALL within a script or a transaction: what it does before and behind its flush is one step."""

from __future__ import annotations

import collections
import contextlib
import threading

import psutil
import pytest
import redis

import shmcache
from shmcache import errors
from shmcache.core import _resp
from shmcache.sidecar import undeclared
from tests.integration.service import LIMIT, running, until
from tests.redis import servers
from tests.redis.inprocess import InProcess
from tests.redis.resp import encode

CLIENTS, TURNS = 6, 60


def draw_by_script(key):
    """Of this counter: the next number, under KEYS or not."""
    script = "local n = (redis.call('get', {0}) or 0) + 1 redis.call('{1}') redis.call('set', {0}, n) return n"
    declared = key == "KEYS[1]"

    def draw(client, flush):
        return client.eval(script.format(key if declared else "'n'", flush), int(declared), *["n"] * declared)

    return draw


def draw_by_exec(client, flush):
    with client.pipeline() as pipeline:
        pipeline.watch("n")
        n = int(pipeline.get("n") or 0) + 1
        pipeline.multi()
        pipeline.set("n", -1)
        pipeline.execute_command(flush)
        pipeline.incrby("n", n - 1)
        pipeline.execute_command(flush)
        pipeline.incrby("n", n)
        assert pipeline.execute()[2:5] == [n - 1, True, n]
    return n


DRAWS = {"declared": draw_by_script("KEYS[1]"), "undeclared": draw_by_script("n"), "exec": draw_by_exec}


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize("flush", ["flushdb", "flushall"])
@pytest.mark.parametrize("db", [0, 1])
def test_no_number_of_a_counter_is_lost_or_drawn_twice(serve, how, flush, db):
    """Two event loops, several clients. Each of them flushes the counter away between reading and writing it."""
    service = serve("--workers", "2", "--lua-time-limit", "60000")
    drawn, failed = count(service.client, how, flush, db)
    again = sum("changed by others" in said for said in failed)  # undeclared and not held any more: its flush stands, and the count begins anew
    assert again == 0 or how == "undeclared"
    assert not [said for said in failed if "changed by others" not in said and (how != "undeclared" or "is busy" not in said)]
    numbers = collections.Counter(drawn)
    assert max(numbers.values()) <= 1 + again
    if not again:
        assert sorted(drawn) == list(range(1, len(drawn) + 1))
        assert int(service.client(db=db).get("n")) == len(drawn)


@pytest.mark.parametrize("how", DRAWS)
def test_redis_does_the_same(how):
    with servers.redis_server() as (host, port, _):
        drawn, failed = count(lambda **options: redis.Redis(host, port, **options), how, "flushall", 1)
        assert failed == []
        assert sorted(drawn) == list(range(1, len(drawn) + 1))
        assert int(redis.Redis(host, port, db=1).get("n")) == len(drawn)


def count(connect, how, flush, db):
    """(The numbers that were drawn, errors)."""
    drawn, failed, stop = [], [], threading.Event()

    def draw():
        client = connect(db=db, socket_timeout=LIMIT)
        for _ in range(TURNS):
            with contextlib.suppress(redis.WatchError):
                try:
                    drawn.append(DRAWS[how](client, flush))
                except redis.ResponseError as e:
                    failed.append(str(e))

    with running(*(threading.Thread(target=draw) for _ in range(CLIENTS)), stop=stop):
        pass
    assert drawn
    return drawn, failed


@pytest.fixture
def between(make, name, monkeypatch):
    """(a function that runs commands, what is called within them by STRLEN of a script, and the segment)."""
    cache = make()
    calls = []
    run = undeclared.Reach.run

    def hooked(reach, caller, words, keys, writes):
        if words[0].lower() == b"strlen" and calls:
            thread = threading.Thread(target=calls.pop(0))
            thread.start()
            thread.join()
        return run(reach, caller, words, keys, writes)

    monkeypatch.setattr(undeclared.Reach, "run", hooked)
    server = InProcess(name, {"databases": "4", "lua-time-limit": "60000"})
    with contextlib.closing(server):
        yield lambda *commands: server.say(server.connect(), b"".join(map(encode, commands))), calls, cache


def script_of(text, *keys):
    return (b"EVAL", text.encode(), b"%d" % len(keys), *keys)


STEPS = {  # what sets n, flushes, and sets it again; STRLEN in between
    "declared": lambda flush: [script_of(f"redis.call('set', KEYS[1], 1) {flush} redis.call('strlen', KEYS[1]) return redis.call('append', KEYS[1], 2)", b"n")],
    "declared, flushed before": lambda flush: [script_of(f"{flush} redis.call('strlen', KEYS[1]) return redis.call('append', KEYS[1], 2)", b"n")],
    "flushed twice": lambda flush: [script_of(f"redis.call('set', KEYS[1], 1) {flush} {flush} redis.call('strlen', KEYS[1]) return redis.call('append', KEYS[1], 2)", b"n")],
    "undeclared": lambda flush: [script_of(f"redis.call('set', 'n', 1) {flush} redis.call('strlen', 'n') return redis.call('append', 'n', 2)")],
    "undeclared, let go of": lambda flush: [
        script_of(f"redis.call('set', 'n', 1) redis.call('keys', 'x') {flush} redis.call('strlen', 'other') return redis.call('append', 'n', 2)")
    ],
    "in a transaction": lambda flush: [
        (b"MULTI",),
        (b"SET", b"n", b"1"),
        script_of(f"{flush} redis.call('strlen', KEYS[1]) return redis.call('append', KEYS[1], 2)", b"n"),
        (b"EXEC",),
    ],
    "behind a transaction's": lambda flush: [
        (b"MULTI",),
        (b"SET", b"n", b"1"),
        (flush.split("'")[1].encode(),),
        script_of("redis.call('strlen', KEYS[1]) return redis.call('append', KEYS[1], 2)", b"n"),
        (b"EXEC",),
    ],
}


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("flush", ["flushdb", "flushall"])
@pytest.mark.parametrize("db", [0, 2])
def test_the_keys_of_a_step_are_held_behind_its_flush(between, how, flush, db):
    say, calls, cache = between
    space = cache.namespace(f"db:{db}") if db else cache
    if how == "declared, flushed before" and (db, flush) == (0, "flushdb"):
        pytest.skip("this removes key by key, and waits for each: of keys that the script has not touched none is held")
    space.set("n", b"0")
    space.set("m", b"0")
    refused = []

    def write():
        cache.lock_limit = 0.01
        try:
            with pytest.raises(errors.StripeBusy):
                space.set("n", b"another's")
            refused.append(True)
        finally:
            cache.lock_limit = 1.0

    calls.append(write)
    said = say((b"SELECT", b"%d" % db), *STEPS[how](f"redis.call('{flush}')"))
    assert said.endswith(b":1\r\n"), said
    assert refused == [True]
    assert space["n"] == b"2"
    assert "m" not in space
    assert not cache.views().stripes["word"].any()


@pytest.mark.parametrize("flush", ["flushdb", "flushall"])
def test_a_step_of_several_databases_holds_the_keys_of_each(between, flush):
    """COPY, and SELECT between two flushes."""
    say, calls, cache = between
    spaces = {db: cache.namespace(f"db:{db}") for db in (1, 2, 3)}
    for space in spaces.values():
        space.set("n", b"1")
    refused = []

    def write():
        cache.lock_limit = 0.01
        for db, space in spaces.items():
            with pytest.raises(errors.StripeBusy):
                space.set("n", b"another's")
            refused.append(db)
        cache.lock_limit = 1.0

    calls.append(write)
    flushes = [(b"SELECT", b"1"), (flush.encode(),), (b"SELECT", b"2"), (flush.encode(),), (b"APPEND", b"n", b"2"), (b"COPY", b"n", b"n", b"DB", b"3", b"REPLACE")]
    said = say((b"MULTI",), *flushes, script_of("return redis.call('strlen', KEYS[1])", b"n"), (b"SELECT", b"1"), (b"EXISTS", b"n"), (b"EXEC",))
    assert said.endswith(b"*9\r\n+OK\r\n+OK\r\n+OK\r\n+OK\r\n:1\r\n:1\r\n:1\r\n+OK\r\n:0\r\n"), said
    assert refused == [1, 2, 3]
    assert [space.get("n") for space in spaces.values()] == [None, b"2", b"2"]


def test_who_has_waited_for_a_step_goes_on_with_the_generation_that_it_has_stored(make):
    cache = make()
    with shmcache.attach(cache.name) as other:
        first, second = (_resp.Executor(table, {}, impatient=False, databases=4) for table in (cache, other))
        begun, got = threading.Event(), []

        def told():
            """No keys; the second has read the generation when it asks for them."""
            begun.set()
            yield from ()

        def wait():
            second.hold([b"n"], db=1, further=told(), within=LIMIT)
            got.append(second.read(b"n")[0])
            second.release()

        first.hold([b"n"], db=1)
        assert first.write(b"n", b"1", 0)
        thread = threading.Thread(target=wait)
        thread.start()
        assert begun.wait(LIMIT)
        first.renew(1)
        first.write(b"n", b"2", 0)
        first.release()
        thread.join()
    assert got == [b"2"]


def test_a_busy_stripe_has_it_draw_again_or_nothing_is_done(make, monkeypatch):
    """Others hold the stripe of the key under the first generation that is drawn, or of the generation's key."""
    cache = make()
    space = cache.namespace("db:1")
    space.set("n", b"1")
    ours = _resp.Executor(cache, {}, impatient=False, databases=4)
    words = cache.views(writable=True).stripes["word"]

    def stripe_of(raw):
        before = words.copy()
        ours.hold([raw], db=0)
        at = int((words != before).argmax())
        ours.release()
        return at

    drawn = [bytes([i] * 8) for i in range(1, 100)]
    busy = [stripe_of(b"\0ns\0db:1\0" + drawn[0] + b"n"), stripe_of(b"\0ns\0db:1")]
    monkeypatch.setattr(_resp, "urandom", lambda n: drawn.pop(0))
    ours.hold([b"n"], db=1)
    before, token = space.prefix(), int(words[words != 0][0])
    for at in busy:
        words[at] = token
        held = set(words.nonzero()[0])
        if at == busy[0]:
            ours.renew(1)
            assert space.prefix().endswith(bytes([2] * 8))
            before = space.prefix()
            words[at] = 0
            ours.release()
            ours.hold([b"n"], db=1)
        else:
            with pytest.raises(errors.StripeBusy):
                ours.renew(1)
            assert set(words.nonzero()[0]) == held
            assert space.prefix() == before
            assert ours.read(b"n") is None
            words[at] = 0
    ours.release()


def test_a_flushed_and_stored_key_is_changed_for_who_watches_it(serve):
    """A version is of a stripe: behind a flush the key is in another one, where it may have the same version."""
    service = serve("--databases", "2")
    client, other = service.client(db=1), service.client(db=1)
    for i in range(50):
        client.set(f"k{i}", "1")
        with client.pipeline() as pipeline:
            pipeline.watch(f"k{i}")
            other.flushdb()
            other.set(f"k{i}", "2")
            pipeline.multi()
            pipeline.set(f"k{i}", "3")
            with pytest.raises(redis.WatchError):
                pipeline.execute()


@pytest.mark.parametrize("flush", ["FLUSHDB", "FLUSHALL"])
def test_nobody_waits_for_the_disk_with_stripes_held(serve, name, tmp_path, flush):
    """With the policy always, and a supervisor that does not run: what is done is free, its reply waits."""
    service = serve("--data-dir", str(tmp_path / "data"), "--log", "always", "--databases", "2")
    connection = service.client(db=1, socket_timeout=LIMIT).connection_pool.get_connection()
    for words in (("SET", "n", "1"), ("MULTI",), ("SET", "n", "2"), (flush,), ("SET", "n", "3")):
        connection.send_command(*words)
        connection.read_response()
    supervisor = next(p for p in psutil.Process(service.process.pid).children() if "supervis" in " ".join(p.cmdline()))
    with shmcache.attach(name) as cache:
        space = cache.namespace("db:1")
        supervisor.suspend()
        try:
            connection.send_command("EXEC")
            until(lambda: space.get("n") == b"3")
            until(lambda: not cache.views().stripes["word"].any())
            assert not connection.can_read(0)
        finally:
            supervisor.resume()
        assert connection.read_response() == [b"OK", b"OK", b"OK"]
    connection.disconnect()
