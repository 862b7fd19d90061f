"""FLUSHDB and FLUSHALL within a script or a transaction: what it does before and behind its flush is one step."""

from __future__ import annotations

import collections
import contextlib
import threading
import time

import psutil
import pytest
import redis

import shmcache
from shmcache import errors
from shmcache.core import _core, _resp
from shmcache.sidecar import undeclared
from shmcache.sidecar.commands import keys
from shmcache.supervisor import appendlog
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


def stripe_of(executor, raw):
    """Of a key as the segment has it."""
    words = executor.table.views(writable=True).stripes["word"]
    before = words.copy()
    executor.hold([raw], db=0)
    at = int((words != before).argmax())
    executor.release()
    return at


@pytest.mark.parametrize("further", [True, False])
def test_what_was_let_go_of_is_not_what_the_step_has_become(make, monkeypatch, further):
    """The step's own key lies in a stripe, after the flush, that it held for another key; or it has let go of all others before."""
    cache = make()
    ours = _resp.Executor(cache, {}, impatient=False, databases=4)
    words = cache.views(writable=True).stripes["word"]
    monkeypatch.setattr(_resp, "urandom", lambda n: b"12345678")
    at = stripe_of(ours, b"\0ns\0db:1\x0012345678n")
    other = next(key for key in (b"%d" % i for i in range(100_000)) if stripe_of(ours, key) == at)
    ours.hold([b"n"], db=1)
    assert ours.hold_further([(0, other)]) is None
    if not further:
        ours.let_go()
    ours.others = [(0, other)]
    ours.renew(1)
    ours.let_go()
    assert words[at]
    ours.release()
    assert not words.any()


def test_a_busy_stripe_has_it_draw_again_or_nothing_is_done(make, monkeypatch, request):
    """Others hold the stripe of the key under the first generation that is drawn, or of the generation's key. That draw takes as long as all
    of them may, as it may where the CPU is others'."""
    cache = make()
    space = cache.namespace("db:1")
    space.set("n", b"1")
    ours = _resp.Executor(cache, {}, impatient=False, databases=4)
    words = cache.views(writable=True).stripes["word"]

    drawn = [bytes([i] * 8) for i in range(1, 100)]
    busy = [stripe_of(ours, b"\0ns\0db:1\0" + drawn[0] + b"n"), stripe_of(ours, b"\0ns\0db:1")]

    def draw(n):
        if len(drawn) == 99:
            time.sleep(0.05)
        return drawn.pop(0) if len(drawn) > 1 else drawn[0]

    monkeypatch.setattr(_resp, "urandom", draw)
    request.addfinalizer(lambda: ours.holds and ours.release())  # else whatever comes in this process would wait for it
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
            with pytest.raises(_resp.CommandError, match="TRYAGAIN others hold locks"):
                ours.renew(1)
            assert set(words.nonzero()[0]) == held
            assert space.prefix() == before
            assert ours.read(b"n") is None
            words[at] = 0
    ours.release()


@pytest.mark.parametrize("flush", ["flushdb", "flushall"])
@pytest.mark.parametrize("others", ["flushdb", "flushall"])
def test_a_script_that_others_have_flushed_under_begins_again(between, flush, others):
    """What it has read is from before their flush; what they have stored behind that is not lost."""
    say, calls, cache = between
    space = cache.namespace("db:1")
    space.set("n", b"5")

    def other():
        (cache if others == "flushall" else space).clear()
        space.set("n", b"0")

    calls.append(other)
    script = f"local v = redis.call('get', KEYS[1]) redis.call('strlen', KEYS[1]) redis.call('{flush}') redis.call('set', KEYS[1], v + 1) return v"
    assert say((b"SELECT", b"1"), script_of(script, b"n")) == b"+OK\r\n$1\r\n0\r\n"
    assert space.get("n") == b"1" and not calls


def test_a_script_that_has_written_is_before_a_flush_of_others_that_came_first(between):
    """Its own FLUSHDB is not refused; nothing of it is left, and nothing of theirs is lost."""
    say, calls, cache = between
    space = cache.namespace("db:1")
    space.set("n", b"5")

    def other():
        space.clear()
        space.set("n", b"0")

    calls.append(other)
    script = "redis.call('incr', KEYS[1]) redis.call('strlen', KEYS[1]) redis.call('flushdb') redis.call('set', KEYS[1], 7) return redis.call('incr', KEYS[1])"
    assert say((b"SELECT", b"1"), script_of(script, b"n")) == b"+OK\r\n:8\r\n"
    assert space.get("n") == b"0" and not calls


@pytest.mark.parametrize(
    ("words", "reply", "left"),
    [
        ("INCR n", b":2", {"n": 2}), ("APPEND n x", b":2", {"n": b"1x"}), ("GETDEL n", b"$1\r\n1", {}), ("COPY n n DB 0", b":1", {"n": b"1", "0:n": b"1"}),
        ("RENAME n x", b"+OK", {"x": b"1"}), ("RENAMENX n x", b":1", {"x": b"1"}), ("MSETNX n 1 y 2", b":0", {"n": b"1"}), ("BITOP OR y n", b":1", {"n": b"1", "y": b"1"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("flush", ["flushdb", "flushall"])
def test_a_command_that_has_waited_for_a_step_comes_behind_it(between, flush, words, reply, left):
    """It has read the database's generation before, and does not see what the step wrote before its flush."""
    say, calls, cache = between
    spaces = {"": cache.namespace("db:1"), "0:": cache}
    spaces[""].set("n", b"5")
    said = []
    with shmcache.attach(cache.name) as other:
        server = InProcess(other.name, {"databases": "4"})
        client = server.connect()
        thread = threading.Thread(target=lambda: said.append(server.say(client, encode((b"SELECT", b"1")) + encode(words.encode().split()))))

        def wait():
            thread.start()
            until(lambda: client.in_pool)

        calls.append(wait)
        script = f"redis.call('set', KEYS[1], 100) redis.call('strlen', KEYS[1]) redis.call('{flush}') redis.call('set', KEYS[1], 1) return 1"
        assert say((b"SELECT", b"1"), script_of(script, b"n")) == b"+OK\r\n:1\r\n"
        thread.join()
        server.close()
    assert said == [b"+OK\r\n" + reply + b"\r\n"]
    found = {start + key: space.get(key) for start, space in spaces.items() for key in ("n", "x", "y")}
    assert {key: value for key, value in found.items() if value is not None} == left


@pytest.mark.parametrize("flush", ["flushdb", "flushall"])
def test_what_others_store_behind_a_flush_of_a_script_that_has_read_many_keys_stays(between, monkeypatch, flush):
    """Over 32 undeclared keys: their stripes are let go of."""
    say, _, cache = between
    space = cache.namespace("db:1")
    space.set("n", b"5")
    call, other = undeclared.call, threading.Thread(target=lambda: space.set("n", b"100"))

    def hooked(caller, words):
        call(caller, words)
        if words[0] == flush.encode() and not other.ident:
            other.start()
            other.join()

    monkeypatch.setattr(undeclared, "call", hooked)
    reads = " ".join(f"redis.call('get', 'k{i}')" for i in range(40))
    said = say((b"SELECT", b"1"), script_of(f"local v = redis.call('get', 'n') {reads} redis.call('{flush}') redis.call('set', 'n', v + 1) return v"))
    assert b"TRYAGAIN the key 'n' was changed by others" in said
    assert space.get("n") == b"100"


@pytest.mark.parametrize("words", ["FLUSHALL", "SELECT 0,SELECT 3,SELECT 0,SET n 1"])
def test_a_transaction_has_its_databases_before_it_begins(between, words):
    """One of them has no generation, and somebody holds that key's stripe: nothing is done."""
    say, _, cache = between
    cache.set("z", b"z")
    client_words = cache.views(writable=True).stripes["word"]
    executor = _resp.Executor(cache, {}, impatient=False, databases=4)
    at = stripe_of(executor, b"\0ns\0db:3")
    executor.hold([b"z"], db=0)
    token = int(client_words[client_words != 0][0])
    executor.release()
    cache.lock_limit = 0.05
    before = [(b"SELECT", b"3")] if words == "FLUSHALL" else []
    for command in before:
        assert say(command) == b"+OK\r\n"
    client_words[at] = token
    said = say(*before, (b"MULTI",), *(each.encode().split() for each in words.split(",")), (b"EXEC",))
    client_words[at] = 0
    del client_words
    assert said.split(b"\r\n")[-2].startswith(b"-TRYAGAIN"), said
    assert cache.get("z") == b"z" and cache.get("n") is None


def test_a_flushall_has_room_in_the_log_for_the_generation_of_each_database(make, name, monkeypatch):
    cache = make("8M", log_buffer="64K", max_processes=16)
    appendlog.mark(cache, log_policy=appendlog.POLICIES["everysec"])
    empty, full = keys.empty, []

    def fill(server):
        with contextlib.suppress(_core.WouldWait):
            while True:
                server.cache.set(b"f", b"")
        full.append(int(cache.segment.header["log_gaps"]))

    def filled(client):
        """Another thread has used what is free of the ring."""
        thread = threading.Thread(target=fill, args=(client.server,))
        thread.start()
        thread.join()
        return empty(client)

    monkeypatch.setattr(keys, "empty", filled)
    server = InProcess(name, {"databases": "16"})
    commands = [(b"MULTI",), (b"FLUSHALL",), *(each for d in range(1, 7) for each in ((b"SELECT", b"%d" % d), (b"SET", b"k", b"1"))), (b"EXEC",)]
    assert server.say(server.connect(), b"".join(map(encode, commands))).endswith(b"+OK\r\n" * 13)
    assert [int(cache.segment.header["log_gaps"])] == full
    server.close()


def test_a_script_that_flushes_again_and_again_holds_few_stripes(between):
    say, calls, cache = between
    words = cache.views().stripes["word"]
    held = []
    calls.append(lambda: held.append(int((words != 0).sum())))
    said = say((b"SELECT", b"1"), script_of("for i = 1, 300 do redis.call('flushdb') end redis.call('strlen', KEYS[1]) return redis.call('incr', KEYS[1])", b"n"))
    assert said == b"+OK\r\n:1\r\n" and held == [1]
    assert not words.any()


def test_who_waits_for_one_key_keeps_no_step_waiting(make):
    """Of the same process: a step over other keys."""
    cache = make()
    server = InProcess(cache.name, {"databases": "4"})
    client, said = server.connect(), []
    assert server.say(client, encode((b"SELECT", b"1")) + encode((b"INCR", b"n"))) == b"+OK\r\n:1\r\n"
    executor = _resp.Executor(cache, {}, impatient=False, databases=4)
    words = cache.views(writable=True).stripes["word"]
    at = stripe_of(executor, cache.namespace("db:1").prefix() + b"n")
    other = next(key for key in (b"%d" % i for i in range(1000)) if stripe_of(executor, key) != at)
    executor.hold([other], db=0)
    token = int(words[words != 0][0])
    executor.release()
    words[at] = token
    thread = threading.Thread(target=lambda: said.append(server.say(client, encode((b"INCR", b"n")))))
    thread.start()
    until(lambda: client.in_pool)
    for _ in range(300):
        executor.hold([other], db=0, within=0.02)
        executor.release()
    assert not said
    words[at] = 0
    thread.join()
    assert said == [b"+OK\r\n:1\r\n:2\r\n"]
    server.close()


@pytest.mark.parametrize("where", ["of the key before", "of the generation"])
def test_a_script_that_has_flushed_holds_on_to_what_it_has_named_besides(make, where):
    """In a stripe that it held for its own key, or for the generation's, and needs for these no more."""
    cache = make()
    executor = _resp.Executor(cache, {}, impatient=False, databases=4)
    words = cache.views().stripes["word"]
    prefix = cache.namespace("db:1").prefix()
    at = stripe_of(executor, prefix + b"n" if where == "of the key before" else prefix[:-9])
    other = next(key for key in (b"%d" % i for i in range(100_000)) if stripe_of(executor, key) == at)
    executor.hold([b"n"], db=1)
    assert executor.hold_further([(0, other)]) is None
    executor.others = [(0, other)]
    executor.renew(1)
    executor.shed([(0, other)])
    assert words[at]
    executor.let_go()
    assert not words[at] and words.any()
    executor.release()
    assert not words.any()


def test_a_script_without_keys_that_begins_again_for_its_flush_lets_go_of_all(make):
    cache = make()
    executor = _resp.Executor(cache, {}, impatient=False, databases=4)
    executor.hold([], further=[(1, b"n")], flushed=[1], db=1, within=LIMIT)
    executor.others = [(1, b"n")]
    executor.renew(1)
    executor.shed([(1, b"n")])
    executor.let_go()
    assert not executor.holds and not cache.views().stripes["word"].any()


@pytest.mark.parametrize(("flush", "left"), [("FLUSHALL", b"2"), ("FLUSHDB", None)])
def test_a_transaction_is_not_refused_for_a_flush_of_others(between, flush, left):
    """It cannot begin again: its FLUSHALL comes behind theirs, its FLUSHDB is gone with all of it."""
    say, calls, cache = between
    space = cache.namespace("db:1")
    cache.set("n", b"0")
    calls.append(cache.clear)
    probe = script_of("redis.call('strlen', KEYS[1]) return 1", b"n")
    said = say((b"SELECT", b"1"), (b"MULTI",), (b"INCR", b"n"), probe, (flush.encode(),), (b"SET", b"n", b"2"), (b"EXEC",))
    assert said.endswith(b"*4\r\n:1\r\n:1\r\n+OK\r\n+OK\r\n") and not calls
    assert space.get("n") == left and cache.get("n") is None


def test_a_step_of_many_keys_holds_from_its_start_what_its_flush_needs(make):
    """Had by trying they would all have to be free at once."""
    cache = make()
    executor = _resp.Executor(cache, {}, impatient=False, databases=4)
    names = [b"%d" % i for i in range(600)]
    executor.hold(names, flushed=[1], db=1, within=LIMIT)
    words = cache.views(writable=True).stripes["word"]
    free = (words == 0).nonzero()[0]
    words[free] = words[words != 0][0]
    executor.renew(1)
    words[free] = 0
    executor.release()
    assert not words.any()


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
