"""The sidecar in front of a log: what is one step asks for room for what it will log, no more and no less, before it begins."""

from __future__ import annotations

import pytest
import redis

import shmcache
from tests.integration.service import LIMIT

LARGE = b"v" * 1_000_000  # more than a record takes: it says where the value is
SMALL = b"v" * 8000  # a record has it: an eighth of a process's buffer, about


@pytest.fixture(params=["always", "everysec"])
def logged(request, serve, name, tmp_path):
    """(client, a function: gaps of the log)"""
    service = serve("--data-dir", str(tmp_path / "data"), "--log", request.param)
    with shmcache.attach(name) as cache:
        yield service.client(socket_timeout=LIMIT), lambda: int(cache.segment.header["log_gaps"])


def in_one_step(client, *commands):
    with client.pipeline(transaction=True) as pipeline:
        for words in commands:
            pipeline.execute_command(*words)
        return pipeline.execute()


STEPS = [
    ("set", lambda c: in_one_step(c, ("SET", "a", LARGE), ("APPEND", "a", LARGE), ("COPY", "a", "b"), ("GETRANGE", "b", 0, 0))),
    ("msetnx", lambda c: c.msetnx({"c": LARGE, "d": LARGE})),
    ("rename", lambda c: in_one_step(c, ("SET", "e", LARGE), ("RENAME", "e", "f"), ("BITOP", "NOT", "g", "f"))),
    ("eval", lambda c: c.eval("redis.call('set', KEYS[1], ARGV[1]) return redis.call('copy', KEYS[1], 'i', 'replace')", 1, "h", LARGE)),
    ("undeclared", lambda c: c.eval("redis.call('set', 'j', ARGV[1]) return redis.call('append', 'j', ARGV[1])", 0, LARGE)),
]


@pytest.mark.parametrize("step", [step for _, step in STEPS], ids=[name for name, _ in STEPS])
def test_values_that_no_record_has_need_no_room(logged, step):
    client, gaps = logged
    assert step(client)
    assert gaps() == 0


MANY = 500  # steps, each of one to three records of SMALL: many times what the buffer takes


def copies_in_one_step(pipeline, i):
    for words in (("MULTI",), ("COPY", "a", f"b{i}"), ("COPY", "a", f"c{i}"), ("APPEND", f"b{i}", ""), ("EXEC",)):
        pipeline.execute_command(*words)


def copies_of_what_it_makes(pipeline, i):
    for words in (("MULTI",), ("SET", "n", SMALL), ("COPY", "n", f"b{i}"), ("SETRANGE", "n", 1, i), ("EXEC",)):
        pipeline.execute_command(*words)


LOG_VALUES = {
    "exec": copies_in_one_step,
    "exec of what it makes": copies_of_what_it_makes,
    "eval": lambda pipeline, i: pipeline.eval("return redis.call('copy', 'a', ARGV[1])", 0, f"b{i}"),
    "eval setrange": lambda pipeline, i: pipeline.eval("return redis.call('setrange', 'a', 1, ARGV[1])", 0, i),
    "eval what it has read": lambda pipeline, i: pipeline.eval(
        "if redis.call('get', 'a') then return redis.call('append', 'a', '') end", 0
    ),
    "copy": lambda pipeline, i: pipeline.execute_command("COPY", "a", f"b{i}"),
    "rename": lambda pipeline, i: pipeline.execute_command("RENAME", *(("a", "b") if i % 2 == 0 else ("b", "a"))),
    "bitop": lambda pipeline, i: pipeline.execute_command("BITOP", "NOT", f"b{i}", "a"),
}


@pytest.mark.parametrize("how", LOG_VALUES)
def test_what_logs_more_than_its_arguments_finds_room(logged, how):
    client, gaps = logged
    client.set("a", SMALL)
    with client.pipeline(transaction=False) as pipeline:
        for i in range(MANY):
            LOG_VALUES[how](pipeline, i)
        replies = pipeline.execute(raise_on_error=False)
    replies = [part for reply in replies for part in (reply if isinstance(reply, list) else [reply])]
    assert [reply for reply in replies if isinstance(reply, Exception)] == []
    assert gaps() == 0


def test_a_step_that_no_buffer_takes_is_refused_as_a_whole(serve, name, tmp_path):
    client = serve("--data-dir", str(tmp_path / "data"), "--log", "always").client(socket_timeout=LIMIT)
    client.set("a", SMALL)
    with pytest.raises(redis.ResponseError, match="does not fit into this segment's log buffer"):
        in_one_step(client, ("SET", "n", 1), *(("COPY", "a", f"b{i}") for i in range(20)))
    assert client.dbsize() == 1
