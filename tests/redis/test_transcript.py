"""The comparison with Redis itself: it finds nothing between two of the same, and finds what a proxy or a setting changes."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

import pytest

from tests.redis import servers, transcript
from tests.redis.grammar import GROUPS, Grammar, c, name
from tests.redis.resp import Connection, Item, encode, parse

COMMANDS = (
    "GET SET SETNX SETEX PSETEX GETSET GETDEL GETEX MGET MSET MSETNX APPEND STRLEN GETRANGE SETRANGE SUBSTR INCR DECR INCRBY "
    "DECRBY INCRBYFLOAT LCS SETBIT GETBIT BITCOUNT BITPOS BITOP BITFIELD BITFIELD_RO DEL UNLINK EXISTS TOUCH TYPE RENAME "
    "RENAMENX COPY KEYS SCAN RANDOMKEY DBSIZE FLUSHDB FLUSHALL EXPIRE PEXPIRE EXPIREAT PEXPIREAT EXPIRETIME PEXPIRETIME TTL "
    "PTTL PERSIST DUMP RESTORE MULTI EXEC DISCARD WATCH UNWATCH PING ECHO SELECT HELLO RESET QUIT TIME"
)


@pytest.fixture
def redis():
    """Two servers."""
    try:
        with servers.redis_server() as one, servers.redis_server() as two:
            yield one[:2], two[:2]
    except servers.Missing as e:
        pytest.skip(str(e))


@contextlib.contextmanager
def proxy(to, change, hang=False):
    """Where what the server says goes through change(bytes); hang: nor does it pass on that the server closes. A thread per direction."""
    listener = socket.create_server(("127.0.0.1", 0))
    sockets = [listener]

    def pump(source, target, f):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(f(data))
            if f is not change or not hang:
                target.shutdown(socket.SHUT_WR)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                here, there = listener.accept()[0], socket.create_connection(to)
                sockets.extend((here, there))
                threads.extend(threading.Thread(target=pump, args=a, daemon=True) for a in ((here, there, bytes), (there, here, change)))
                for t in threads[-2:]:
                    t.start()

    threads = [threading.Thread(target=accept, daemon=True)]
    threads[0].start()
    try:
        yield listener.getsockname()
    finally:
        for s in sockets:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()
        for t in threads:
            t.join(10)


def run(capsys, ours, reference, *options):
    """(exit code, report)"""
    places = [f"--{option}={host}:{port}" for option, (host, port) in (("ours", ours), ("reference", reference))]
    code = transcript.main([*places, "--seed=7", "--json", "--timeout=2", "--seconds=60", *options])
    return code, json.loads(capsys.readouterr().out)


def test_two_of_the_same(redis, capsys):
    code, report = run(capsys, *redis, "--sequences=200")
    assert report["differences"] == {}, "\n".join(report["shown"])
    assert code == 0
    assert report["sequences"] == 200
    assert report["commands"] > 3000


def test_a_changed_reply_is_found_and_shortened(redis, capsys):
    with proxy(redis[0], lambda data: b":8\r\n" if data == b":7\r\n" else data) as ours:
        code, report = run(capsys, ours, redis[1], "--sequences=60", "--only=strings,integers")
    assert code == 1
    assert report["differences"]
    assert "ours:      b':8\\r\\n'\n  reference: b':7\\r\\n'" in report["shown"][0]
    assert len(report["shown"][0].splitlines()) <= 8


def test_another_error_text_is_found(redis, capsys):
    with proxy(redis[0], lambda data: data.replace(b"syntax error", b"Syntax error")) as ours:
        assert run(capsys, ours, redis[1], "--sequences=60")[0] == 1


def test_a_reply_too_many_is_found(redis, capsys):
    with proxy(redis[0], lambda data: data + b"+OK\r\n" if data == b":0\r\n" else data) as ours:
        assert run(capsys, ours, redis[1], "--sequences=20")[0] == 1


def test_a_reply_that_does_not_come_is_found(redis, capsys):
    with proxy(redis[0], lambda data: b"" if data == b"$-1\r\n" else data) as ours:
        code, report = run(capsys, ours, redis[1], "--sequences=4", "--only=strings", "--protocol=2", "--timeout=0.3")
    assert code == 1
    assert "<no reply>" in report["shown"][0]


def test_a_connection_that_stays_open_is_found(redis, capsys):
    with proxy(redis[0], bytes, hang=True) as ours:
        code, report = run(capsys, ours, redis[1], "--sequences=2", "--only=protocol", "--timeout=0.3")
    assert code == 1
    assert report["differences"] == {"raw": 2}


@pytest.mark.parametrize("gone", ["GETDEL", "PEXPIRETIME", "BITOP"])
def test_a_missing_command_is_found(redis, capsys, gone):
    with servers.redis_server("--rename-command", gone, "") as ours:
        code, report = run(capsys, ours[:2], redis[1], "--sequences=60", "--only=strings,expiry,bits")
    assert code == 1
    assert set(report["differences"]) == {gone}


def test_a_setting_is_found(redis, capsys):
    with servers.redis_server("--databases", "1") as ours:
        code, report = run(capsys, ours[:2], redis[1], "--sequences=40", "--only=connection", "--protocol=2")
    assert code == 1
    assert set(report["differences"]) == {"SELECT"}


def test_a_seed_gives_the_same_sequences():
    def made(seed):
        return [Grammar(seed, n).make().steps for n in range(20)]

    assert made(3) == made(3)
    assert made(3) != made(4)


def test_the_grammar_knows_the_commands():
    found = {name(command) for n in range(1500) for step in Grammar(1, n).make().steps for command in step.commands}
    assert found >= set(COMMANDS.split())
    assert found >= {f"OBJECT {s}" for s in ("ENCODING", "REFCOUNT", "FREQ", "IDLETIME", "HELP")}
    assert found >= {f"CLIENT {s}" for s in ("SETNAME", "GETNAME", "ID", "REPLY")}


def test_groups_keep_to_themselves():
    for group in GROUPS:
        Grammar(1, 1, {group}).make()
    assert {name(command) for n in range(50) for step in Grammar(1, n, {"integers"}).make().steps for command in step.commands} == {
        "INCR", "DECR", "INCRBY", "DECRBY", "INCRBYFLOAT", "SET",
    }  # fmt: skip
    with pytest.raises(ValueError, match="no group lists"):
        transcript.chosen("strings,lists", None)


@pytest.mark.parametrize(
    ("data", "item"),
    [
        (b"+OK\r\n", Item(b"+", b"OK")),
        (b"$3\r\na\r\n\r\n", Item(b"$", b"a\r\n")),
        (b"$-1\r\n", Item(b"$", None)),
        (b"*2\r\n:1\r\n*-1\r\n", Item(b"*", [Item(b":", b"1"), Item(b"*", None)])),
        (b"%1\r\n+a\r\n,1.5\r\n", Item(b"%", [Item(b"+", b"a"), Item(b",", b"1.5")])),
        (b"_\r\n", Item(b"_", None)),
    ],
)
def test_reader(data, item):
    assert parse(data + b"more") == (item, len(data))
    assert all(parse(data[:n]) is None for n in range(len(data)))


def test_tolerances():
    def alike(command, a, b, expiring=0):
        return transcript.alike(c(*command.split()), parse(a)[0], parse(b)[0], expiring)

    assert alike("TTL k", b":100\r\n", b":99\r\n")
    assert not alike("TTL k", b":100\r\n", b":90\r\n")
    assert not alike("TTL k", b":-1\r\n", b":-2\r\n")
    assert not alike("TTL k", b":0\r\n", b":-2\r\n")
    assert alike("KEYS *", encode([b"a", b"b"]), encode([b"b", b"a"]))
    assert not alike("KEYS *", encode([b"a"]), encode([b"b", b"a"]))
    assert not alike("GET k", b"$1\r\na\r\n", b"$1\r\nb\r\n")
    assert not alike("DUMP k", b"$-1\r\n", b"$1\r\nb\r\n")
    assert alike("DBSIZE", b":3\r\n", b":4\r\n", expiring=1)
    assert not alike("DBSIZE", b":3\r\n", b":4\r\n")


def test_connection_keeps_what_was_not_asked_for():
    ours, theirs = socket.socketpair()
    connection = Connection.__new__(Connection)
    connection.socket, connection.buffer, connection.open, connection.timeout = ours, b"", True, 1.0
    theirs.sendall(b":1\r\n:2\r\n:")
    assert connection.reply() == b":1\r\n"
    assert connection.reply() == b":2\r\n"
    theirs.close()
    assert connection.rest() == b":<closed>"
    connection.close()


@pytest.mark.parametrize("protocol", [2, 3])
def test_ours_answers_as_redis_does(protocol, capsys):
    """400 sequences of each protocol; the longer comparison is `python -m tests.redis.transcript --sequences 3000`."""
    try:
        assert transcript.main(["--sequences", "400", "--seed", str(protocol), "--protocol", str(protocol)]) == 0, (
            capsys.readouterr().out
        )
    except servers.Missing as e:
        pytest.skip(str(e))
