"""The sidecar with a log: a step over several keys finds room for its records, whatever it writes, beside any other writers. Or it does not begin."""

from __future__ import annotations

import contextlib
import threading

import psutil
import pytest
import redis

import shmcache
from shmcache.core import _resp
from shmcache.supervisor import appendlog
from tests.integration.service import LIMIT, running
from tests.redis.inprocess import InProcess
from tests.redis.resp import encode

LARGE = b"v" * 1_000_000  # more than a record takes: it says where the value is
SMALL = b"v" * 8000  # a record has it: an eighth of a process's buffer, about
LONG = "k" * 4000  # a name, of which each record has a sixteenth of the buffer
STEPS = 60  # each of one to twenty records of SMALL: many times what the buffer takes


@pytest.fixture(params=["always", "everysec"])
def logged(request, serve, name, tmp_path):
    """(the service, a function: gaps of the log)"""
    service = serve("--data-dir", str(tmp_path / "data"), "--log", request.param, "--lua-time-limit", "60000")
    with shmcache.attach(name) as cache:
        yield service, lambda: int(cache.segment.header["log_gaps"])


def in_one_step(*commands):
    return [("MULTI",), *commands, ("EXEC",)]


def script(text, *keys, arguments=()):
    return [("EVAL", text, len(keys), *keys, *arguments)]


MAKES = {  # what a client sends, again and again
    "exec": lambda i: in_one_step(*(("COPY", "a", f"b{j}", "REPLACE") for j in range(20))),
    "exec of what it makes": lambda i: in_one_step(("SET", "n", SMALL), *(("COPY", "n", f"b{j}", "REPLACE") for j in range(9)), ("SETRANGE", "n", 1, i)),
    "exec: expire, copy": lambda i: in_one_step(("EXPIRE", "a", 1000), *(("COPY", "a", f"b{j}", "REPLACE") for j in range(9))),
    "exec: copy onto large": lambda i: in_one_step(("SET", "l", LARGE), *(("COPY", "a", "l", "REPLACE") for _ in range(9))),
    "exec: copy to another database": lambda i: in_one_step(*(("COPY", "a", f"b{j}", "DB", 11, "REPLACE") for j in range(9))),
    "exec: of many": lambda i: in_one_step(("BITOP", "OR", "b", *(f"{LONG}{j}" for j in range(60))), *(("COPY", f"{LONG}{j}", "b", "REPLACE") for j in range(60))),
    "exec: setrange": lambda i: in_one_step(*(("SETRANGE", f"b{j}", 8000, "x") for j in range(9))),
    "exec: setbit": lambda i: in_one_step(*(("SETBIT", f"b{j}", 64000, 1) for j in range(9))),
    "exec: bitfield": lambda i: in_one_step(*(("BITFIELD", f"b{j}", "SET", "u8", 64000, 1) for j in range(9))),
    "exec: long names": lambda i: in_one_step(*(("APPEND", "a" * 1000 + str(j), SMALL) for j in range(9))),
    "exec: many small": lambda i: in_one_step(*(("SETBIT", "k", j, 1) for j in range(150)), *(("APPEND", "m", "x") for _ in range(150))),
    "exec: many sets": lambda i: in_one_step(*(("SET", f"k{j}", 1) for j in range(500))),
    "exec: floats": lambda i: in_one_step(*(("INCRBYFLOAT", "k", "1e300") for _ in range(200))),
    "exec: a script": lambda i: in_one_step(*script("for i = 1, 9 do redis.call('set', KEYS[1], ARGV[1]) end return 1", "k", arguments=[SMALL])),
    "exec: many scripts": lambda i: in_one_step(*(words for j in range(40) for words in script("return redis.call('incr', KEYS[1])", f"n{j}"))),
    "eval": lambda i: script("for i = 1, 9 do redis.call('copy', KEYS[1], KEYS[2], 'replace') end return 1", "a", "b"),
    "eval: large arguments": lambda i: script("return redis.call('set', KEYS[1], ARGV[1])", "k", arguments=[SMALL, LARGE]),
    "undeclared": lambda i: script("return redis.call('copy', 'a', ARGV[1], 'replace')", arguments=[f"b{i}"]),
    "undeclared: setrange": lambda i: script("for i = 1, 9 do redis.call('setrange', 'b' .. i, 8000, 'x') end return 1"),
    "undeclared: what it has read": lambda i: script("if redis.call('get', 'a') then return redis.call('append', 'a', '') end"),
    "undeclared: many": lambda i: script("local k = {} for i = 1, 60, 2 do k[i], k[i + 1] = 'k' .. i, ARGV[1] end return redis.call('mset', unpack(k))", arguments=[SMALL]),
    "copy": lambda i: [("COPY", "a", f"b{i}", "REPLACE")],
    "rename": lambda i: [("RENAME", *(("a", "b") if i % 2 == 0 else ("b", "a")))],
    "bitop": lambda i: [("BITOP", "NOT", f"b{i}", "a")],
    "msetnx": lambda i: [("MSETNX", *(word for j in range(300) for word in (f"{i % 40}:{j}", 1)))],
    "msetnx of large": lambda i: [("MSETNX", f"c{i % 9}", LARGE, f"d{i % 9}", SMALL)],
}  # fmt: skip


def send(client, how, steps=STEPS):
    """All that failed."""
    client.response_callbacks.clear()
    failed = []
    for first in range(0, steps, 20):
        with client.pipeline(transaction=False) as pipeline:
            for i in range(first, first + 20):
                for words in MAKES[how](i):
                    pipeline.execute_command(*words)
            for reply in pipeline.execute(raise_on_error=False):
                failed += [part for part in (reply if isinstance(reply, list) else [reply]) if isinstance(part, Exception)]
    return failed


@pytest.mark.parametrize("how", MAKES)
@pytest.mark.parametrize("db", [0, 12])
def test_a_step_finds_room(logged, how, db):
    service, gaps = logged
    client = service.client(socket_timeout=LIMIT, db=db)
    client.set("a", SMALL)
    assert send(client, how, 20 if "large" in how else STEPS) == []
    assert gaps() == 0


@pytest.mark.parametrize("how", ["exec", "exec: a script", "eval", "undeclared", "msetnx"])
def test_a_step_finds_room_beside_others(logged, how):
    """Who writes one key at a time fills what is left of the process's buffer."""
    service, gaps = logged
    client, end = service.client(socket_timeout=LIMIT), threading.Event()
    client.set("a", SMALL)

    def fill(i):
        other = service.client(socket_timeout=LIMIT)
        with other.pipeline(transaction=False) as pipeline:
            while not end.is_set():
                for j in range(200):
                    pipeline.set(f"f{i}:{j}", b"f" * (2000 if i else 20))
                pipeline.execute()

    with running(*(threading.Thread(target=fill, args=(i,)) for i in range(3)), stop=end):
        assert send(client, how, 3 * STEPS) == []
    assert gaps() == 0


def test_a_step_that_no_buffer_takes_is_refused_as_a_whole(serve, tmp_path):
    client = serve("--data-dir", str(tmp_path / "data"), "--log", "always").client(socket_timeout=LIMIT)
    client.set("a", SMALL)
    with (
        pytest.raises(redis.ResponseError, match="does not fit into this segment's log buffer"),
        client.pipeline(transaction=True) as pipeline,
    ):
        for i in range(1000):
            pipeline.set(f"{i}" * 100, 1)
        pipeline.execute()
    assert client.dbsize() == 1


@pytest.mark.parametrize("how", ["exec", "eval"])
@pytest.mark.parametrize("policy", ["always", "everysec"])
def test_the_first_database_is_emptied_in_a_step_as_a_whole_or_not_at_all(serve, name, tmp_path, policy, how):
    """A record for each of its keys: these are more than the buffer takes, and nobody waits for room while a step holds stripes."""
    service = serve("--data-dir", str(tmp_path / "data"), "--log", policy)
    client = service.client(socket_timeout=LIMIT)
    with shmcache.attach(name) as cache:
        keys = {b"%d:%s" % (i, b"k" * 4000): b"v" for i in range(int(cache.segment.header["ring_bytes"]) // 4000 + 20)}
        for key, value in keys.items():
            client.set(key, value)
        client.response_callbacks.clear()
        pipeline = client.pipeline(transaction=False)
        for words in in_one_step(("SET", "k", 1), ("FLUSHDB",), ("EXISTS", "k")) if how == "exec" else script("redis.call('set', KEYS[1], 1) return redis.call('flushdb')", "k"):
            pipeline.execute_command(*words)
        reply = pipeline.execute(raise_on_error=False)[-1]
        said = reply[1] if how == "exec" else reply
        if policy == "always":
            assert cache.get_many(keys) == keys
            assert "nothing was removed by this command. Send it by itself" in str(said)
            assert how == "eval" or reply[2] == 1
            assert client.flushdb()
        assert client.dbsize() == 0
        assert (int(cache.segment.header["log_gaps"]) > 0) == (policy == "everysec")


def test_the_first_database_is_emptied_in_a_step_for_which_there_is_room(logged):
    service, gaps = logged
    client = service.client(socket_timeout=LIMIT)
    for empty in (in_one_step(("SET", "k", 1), ("FLUSHDB",), ("SET", "k", 2)), script("redis.call('get', KEYS[1]) redis.call('flushdb') return redis.call('set', KEYS[1], 2)", "k")):
        client.mset({f"{i}" * 50: "v" for i in range(100)})
        with client.pipeline(transaction=False) as pipeline:
            for words in empty:
                pipeline.execute_command(*words)
            pipeline.execute()
        assert client.keys() == [b"k"]
    assert gaps() == 0


def test_room_that_an_operation_has_not_used_is_its_steps(make):
    """Others have filled the ring but for what the step has kept: a write whose condition fails leaves it to the step."""
    cache = make("8M", log_buffer="64K", max_processes=16)
    appendlog.mark(cache, log_policy=appendlog.POLICIES["everysec"])
    executor, gaps = _resp.Executor(cache, {}, impatient=False), lambda: int(cache.segment.header["log_gaps"])
    executor.write(b"k", b"", 0)
    executor.hold([b"k", b"absent"], executor.log_room([(0, b"k")]))

    def fill():
        """Of another thread: what is free of the ring."""
        before = gaps()
        while gaps() == before:
            cache.set(b"f", b"")

    def full():
        thread = threading.Thread(target=fill)
        thread.start()
        thread.join()
        return gaps()

    full()
    for _ in range(3):
        assert not executor.write(b"k", b"", 0, absent=True)
        assert not executor.write(b"absent", b"", 0, version=7)
        assert not executor.remove(b"k", 7)
    before = full()
    assert executor.write(b"k", b"", 0)
    assert gaps() == before
    assert executor.write(b"k", b"", 0)
    assert gaps() == before + 1
    executor.release()


def test_values_without_room_in_the_buffer_are_restored(serve, name, tmp_path):
    """What was acknowledged is in the log: the supervisor has fetched it from the segment."""
    options = ("--data-dir", str(tmp_path / "data"), "--log", "always")
    service = serve(*options)
    client, want = service.client(socket_timeout=LIMIT), {}
    for i in range(60):
        values = {f"k{j}": b"%d:%d " % (i, j) * 1000 for j in range(i % 20, i % 20 + 20)}
        with client.pipeline(transaction=True) as pipeline:
            for key, value in values.items():
                pipeline.set(key, value)
            pipeline.execute()
        want |= values
    for process in [*psutil.Process(service.process.pid).children(recursive=True), psutil.Process(service.process.pid)]:
        process.kill()
    service.process.wait(LIMIT)
    with contextlib.suppress(shmcache.SegmentNotFound):
        shmcache.unlink(name)
    client = serve(*options).client(socket_timeout=LIMIT)
    assert {key: client.get(key) for key in want} == want


def test_a_full_log_does_not_keep_a_connection_in_a_database_without_a_generation(make):
    cache = make("16M", log_buffer="64K", max_processes=4)
    appendlog.mark(cache, log_policy=2)
    inprocess = InProcess(cache.name)
    client = inprocess.connect()

    def say(text):
        client.transport.written.clear()
        return inprocess.say(client, encode(text.encode().split()))

    gaps = cache.durability()["log_gaps"]
    while cache.durability()["log_gaps"] == gaps:  # to the last byte
        cache.set("k", b"")
    cache.set("of-the-first", b"1")
    appendlog.mark(cache, log_policy=3)
    assert say("SELECT 5") == b"+OK\r\n"
    assert say("GET k").startswith(b"-MISCONF the log takes nothing")
    for text, said in (
        ("PING", b"+PONG"), ("ECHO a", b"$1"), ("PUBLISH c m", b":0"), ("SUBSCRIBE c", b"*3"), ("UNSUBSCRIBE", b"*3"), ("SELECT 0", b"+OK"),
        ("GET of-the-first", b"$1"), ("SELECT 5", b"+OK"), ("HELLO 3", b"%7"), ("RESET", b"+RESET"), ("GET of-the-first", b"$1"),
    ):  # fmt: skip
        assert say(text).startswith(said + b"\r\n")
    inprocess.close()
