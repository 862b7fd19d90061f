"""The protocol's parser and executor, without a socket: what is fed, in whatever pieces, and what comes out."""

from __future__ import annotations

import operator
import os
import random
import re
import signal
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shmcache
from shmcache import errors
from shmcache.core import _resp, _text
from shmcache.sidecar import acl, commands
from tests.redis.inprocess import InProcess
from tests.redis.resp import encode


@pytest.fixture
def server(make):
    server = InProcess(make("16M").name)
    yield server
    server.close()


def say(*words):
    return encode([w if isinstance(w, bytes) else str(w).encode() for w in words])


def connect(server):
    """A client of number 1, as all of them: HELLO says it."""
    server.next_id = 1
    return server.connect()


def answer(server, data):
    return server.say(connect(server), data)


CONVERSATION = b"".join(
    (
        say("SET", "a", "1"), say("GET", "a"), b"PING\r\n", say("INCR", "a"), b"set b 'x y'\r\n", say("MGET", "a", "b", "c"), b"\r\n",
        say("MULTI"), say("SET", "d", b"\x00\r\n\xff"), say("GET", "d"), say("EXEC"), say("HELLO", "3"), say("GET", "nope"), b"*0\r\n",
        say("SETRANGE", "e", "5", "x"), say("FOO", "bar"), say("GET"), say("DEL", "a", "b", "c", "d", "e"), b'PING "\\x41\\n"\r\n',
    )
)  # fmt: skip


def test_pieces_of_any_size_are_answered_alike(server):
    whole = answer(server, CONVERSATION)
    assert whole.count(b"+QUEUED") == 2 and whole.endswith(b":4\r\n$2\r\nA\n\r\n")
    for at in range(len(CONVERSATION)):
        client = connect(server)
        server.say(client, CONVERSATION[:at])
        assert server.say(client, CONVERSATION[at:]) == whole, at
    client = connect(server)
    for byte in CONVERSATION:
        server.say(client, bytes([byte]))
    assert b"".join(client.transport.written) == whole


@pytest.mark.parametrize(
    "sent, error",
    [
        (b"*x\r\n", b"invalid multibulk length"),
        (b"*3000000000\r\n", b"invalid multibulk length"),
        (b"*1\r\n:1\r\n", b"expected '$', got ':'"),
        (b"*1\r\n$x\r\n", b"invalid bulk length"),
        (b"*1\r\n$-1\r\n", b"invalid bulk length"),
        (b"*1\r\n$99999999999\r\n", b"invalid bulk length"),
        (b"'\r\n", b"unbalanced quotes in request"),
        (b'"a"b\r\n', b"unbalanced quotes in request"),
        (b"x" * 70000, b"too big inline request"),
        (b"*" + b"1" * 70000, b"too big mbulk count string"),
        (b"*1\r\n$" + b"1" * 70000, b"too big bulk count string"),
    ],
)
def test_what_is_not_the_protocol_ends_the_connection(server, sent, error):
    client = connect(server)
    said = b"+PONG\r\n-ERR Protocol error: " + error + b"\r\n"
    assert server.say(client, say("PING") + sent) == said
    assert client.closing
    assert server.say(client, say("PING")) == said


def test_before_it_has_authenticated_a_client_sends_little(server):
    server.executor.locked = True
    assert answer(server, say("GET", "a")) == b"-NOAUTH Authentication required.\r\n"
    assert b"unauthenticated multibulk length" in answer(server, b"*11\r\n")
    assert b"unauthenticated bulk length" in answer(server, b"*1\r\n$20000\r\n")


def test_what_a_large_command_needed_is_given_back_though_the_next_has_begun(server):
    client = connect(server)
    large = say("SET", "a", b"x" * 3_000_000)
    for at in range(0, len(large), 65536):
        server.say(client, large[at : at + 65536] + b"*3\r\n" * (at + 65536 > len(large)))
    assert b"".join(client.transport.written) == b"+OK\r\n"
    assert client.buffered == (4, 0)
    assert client.memory < 100_000
    assert server.say(client, say("SET", "a", "1")[4:]) == b"+OK\r\n" * 2


def test_a_slow_command_of_many_arguments_is_told_as_it_was(server):
    """What it needed of memory is given back behind the slow log's look at it."""
    told = []
    server.executor.slower_than_ns, server.executor.slow = 0, lambda client, words, ns: told.append(words)
    words = [b"MSET", *(b"%d" % (i // 2) for i in range(100_000))]
    assert answer(server, say(*words) + say("PING")) == b"+OK\r\n+PONG\r\n"
    assert told == [words, [b"PING"]]
    told.clear()
    answer(server, say("MULTI") + say("SET", "a", "b") + say("EXEC"))
    assert [words[0].upper() for words in told if len(words) == 1] == [b"MULTI", b"EXEC"]


def test_replies_that_a_client_does_not_want(server):
    said = say("CLIENT", "REPLY", "OFF") + say("KEYS", "*") + say("FOO") + say("GET") + say("SET", "a", "1") + say("CLIENT", "REPLY", "ON")
    assert answer(server, said + say("PING")) == b"+OK\r\n+PONG\r\n"
    assert answer(server, say("CLIENT", "REPLY", "SKIP") + say("KEYS", "*") + say("PING")) == b"+PONG\r\n"
    assert answer(server, say("CLIENT", "REPLY", "SKIP") + say("FOO") + say("PING")) == b"+PONG\r\n"


def test_nor_when_a_pause_is_over(server):
    server.go_on = lambda client: client.resume()
    client = connect(server)
    server.executor.paused_until = 1 << 60
    assert server.say(client, say("CLIENT", "REPLY", "SKIP") + say("SET", "a", "1") + say("PING")) == b"" and client.blocked
    commands.connection.go_on(server, client)
    assert client.blocked, "the pause is not over"
    server.executor.paused_until = 0
    commands.connection.go_on(server, client)
    assert b"".join(client.transport.written) == b"+PONG\r\n" and server.cache["a"] == b"1"
    assert server.executor.command_stats()["set"][0] == 1


def test_commands_are_counted_where_they_end(server):
    client = connect(server)
    server.say(client, say("SET", "a", "x") + say("MULTI") + say("INCR", "a") + say("GET", "a") + say("EXEC") + say("KEYS", "*"))  # in the pool
    server.say(client, say("GET") + say("FOO") + say("SUBSCRIBE", "c") + say("GET", "a") + say("UNSUBSCRIBE") + say("EXEC") + say("GETEX", "a", "NO"))
    stats = {name: (calls, rejected, failed) for name, (calls, _, rejected, failed) in server.executor.command_stats().items()}
    assert stats == {
        "set": (1, 0, 0), "multi": (1, 0, 0), "incr": (1, 0, 1), "get": (1, 2, 0), "exec": (2, 0, 1), "keys": (1, 0, 0), "subscribe": (1, 0, 0),
        "unsubscribe": (1, 0, 0), "getex": (1, 0, 1),
    }  # fmt: skip
    assert server.executor.commands == sum(calls for calls, _, _ in stats.values())
    assert server.executor.errors == {b"ERR": 6} and b"".join(client.transport.written).count(b"-ERR") == 6
    assert all(ns > 0 for calls, ns, _, _ in server.executor.command_stats().values() if calls)
    assert server.say(client, b"*1\r\n!\r\n") and server.executor.errors == {b"ERR": 7}
    server.executor.reset()
    assert server.executor.command_stats() == server.executor.errors == {} and server.executor.commands == 0


@pytest.mark.parametrize(
    "words", [("SCAN", 2**64 - 1), ("SCAN", 0, "COUNT", 2**63 - 1), ("SCAN", "9" * 5000), ("CLIENT", "PAUSE", 2**63 - 1), ("SETRANGE", "a", 2**62, "x")]
)
def test_numbers_at_their_ends(server, words):
    assert answer(server, say(*words) + say("PING")).endswith(b"+PONG\r\n")


def test_a_restricted_user(server):
    client, bob = server.connect(), acl.User(b"bob").changed(b"on nopass ~a %R~r &c +@all -keys".split())
    server.users[b"bob"] = bob
    keys, channels = (b"-NOPERM this user has no permissions to access one of the %b used as arguments\r\n" % what for what in (b"keys", b"channels"))
    sent = b"".join(
        (say("AUTH", "bob", "x"), say("SET", "a", "1"), say("GET", "r"), say("SET", "r", "1"), say("KEYS", "*"), say("PUBLISH", "d", "x"),
         say("KEYS"), say("MULTI"), say("GET", "a"), say("GET", "b"), say("EXEC"), say("MULTI"), say("GET", "a"), say("GET", "r")),
    )  # fmt: skip
    assert server.say(client, sent) == (
        b"+OK\r\n+OK\r\n$-1\r\n" + keys + b"-NOPERM this user has no permissions to run the 'keys' command\r\n" + channels
        + b"-ERR wrong number of arguments for 'keys' command\r\n+OK\r\n+QUEUED\r\n" + keys
        + b"-EXECABORT Transaction discarded because of previous errors.\r\n+OK\r\n+QUEUED\r\n+QUEUED\r\n"
    )  # fmt: skip
    client.transport.written.clear()
    server.users[b"bob"] = bob.changed([b"resetkeys", b"~r"])
    assert server.say(client, say("EXEC")) == (
        b"*2\r\n-NOPERM ACLs rules changed between the moment the transaction was accumulated and the EXEC call. This command is no longer allowed "
        b"for the following reason: no permission to touch the specified keys\r\n$-1\r\n"
    )
    client.transport.written.clear()
    assert server.say(client, say("RESET") + say("GET", "a")) == b"+RESET\r\n$1\r\n1\r\n"


def test_nothing_is_injected_into_an_error(server):
    said = answer(server, say("MULTI") + say("CLIENT", "x\r\n+INJECTED") + say("DISCARD"))
    assert said.count(b"\r\n") == 3


words = st.binary(max_size=12) | st.sampled_from(
    [b"get", b"SET", b"a", b"b", b"EX", b"PX", b"NX", b"1", b"-1", b"0", b"9223372036854775807", b"*", b"[a-", b"GET", b"KEEPTTL", b"u8", b"#1"]
)
names = st.sampled_from([name.encode() for name in commands.TABLE if name not in ("shutdown", "save", "info", "debug", "client", "monitor")])
requests = st.lists(st.tuples(names, st.lists(words, max_size=6)), max_size=8)


@settings(max_examples=300, deadline=None)
@given(requests, st.data())
def test_requests_of_any_content(requests, data):
    """Every command with any arguments, in any two pieces: each is answered, or the connection ends; nothing else happens to this process."""
    name = f"t-{os.getpid()}-hypothesis-{random.getrandbits(40)}"
    with shmcache.create(name, "8M") as cache:
        try:
            server = InProcess(cache.name)
            sent = b"".join(say(name, *arguments) for name, arguments in requests)
            at = data.draw(st.integers(0, len(sent)))
            client = connect(server)
            server.say(client, sent[:at])
            assert (server.say(client, sent[at:]) != b"") == bool(requests)
            assert cache.verify() == []
            server.close()
        finally:
            shmcache.unlink(name)


@settings(max_examples=500, deadline=None)
@given(data=st.lists(st.binary(max_size=20) | st.sampled_from([b"*2\r\n", b"$3\r\n", b"\r\n", b"GET a\r\n", b"$-1\r\n", b"*-1\r\n"]), max_size=12))
def test_bytes_of_any_kind(data):
    name = f"t-{os.getpid()}-bytes-{random.getrandbits(40)}"
    with shmcache.create(name, "8M") as cache:
        try:
            server = InProcess(cache.name)
            whole, client = answer(server, b"".join(data)), connect(server)
            for piece in data:
                server.say(client, piece)
            assert b"".join(client.transport.written) == whole
            server.close()
        finally:
            shmcache.unlink(name)


# ---- the parts ------------------------------------------------------------------------------------------------------------------------


def as_expression(pattern):
    """A pattern without sets as a regular expression."""
    return re.compile(b"".join(b".*" if c == b"*" else b"." if c == b"?" else re.escape(c) for c in (pattern[i : i + 1] for i in range(len(pattern)))), re.S)


@given(st.lists(st.sampled_from([b"*", b"?", b"a", b"b"]), max_size=8), st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=10))
def test_patterns_as_regular_expressions(pattern, data):
    pattern, data = b"".join(pattern), b"".join(data)
    assert _text.matches(pattern, data) == (as_expression(pattern).fullmatch(data) is not None)


@pytest.mark.parametrize(
    "pattern, data, fits",
    [
        (b"h[ae]llo", b"hallo", True), (b"h[^e]llo", b"hello", False), (b"h[a-c]llo", b"hbllo", True), (b"h[c-a]llo", b"hbllo", True),
        (b"h\\*llo", b"h*llo", True), (b"h\\*llo", b"hallo", False), (b"h[ab", b"hb", True), (b"h[\\]]", b"h]", True), (b"**", b"", False),
        (b"*", b"", True), (b"", b"", True), (b"a", b"", False), (b"*?" * 40 + b"b", b"a" * 300, False),
    ],
)  # fmt: skip
def test_patterns(pattern, data, fits):
    assert _text.matches(pattern, data) == fits


def test_crc64_of_the_published_check_value():
    assert _text.crc64(b"123456789") == 0xE9C6D914C4B8D9CA


def test_crc64_is_that_of_its_bytes_however_it_is_divided():
    draw = random.Random(9)
    for n in range(100):
        data, wanted = draw.randbytes(n), 0
        for byte in data:  # a bit at a time
            wanted ^= byte
            for _ in range(8):
                wanted = wanted >> 1 ^ (0x95AC9329AC4BC9B5 if wanted & 1 else 0)
        at = draw.randrange(n + 1)
        assert _text.crc64(data) == _text.crc64(memoryview(data)[at:], _text.crc64(data[:at])) == wanted


@pytest.mark.parametrize(
    "a, b, total", [(b"10.5", b"0.1", b"10.6"), (b"3.0e3", b"200", b"3200"), (b"-0.0", b"0", b"0"), (b"1", b"-1", b"0"), (b"5e-324", b"0", None)]
)
def test_floats_are_added_as_long_doubles(a, b, total):
    assert _text.add_floats(a, b) == (total if total is not None else b"0")


@pytest.mark.parametrize("text", [b"", b" 1", b"1 ", b"x", b"nan", b"1,5", b"1e99999"])
def test_what_is_no_float(text):
    with pytest.raises(ValueError):
        _text.add_floats(text, b"1")


@given(st.binary(max_size=30), st.binary(max_size=30))
def test_the_longest_common_subsequence(a, b):
    common, runs, size = _text.longest_common(a, b)
    assert len(common) == size == sum(a1 - a0 + 1 for (a0, a1), _ in runs)
    assert common == b"".join(a[a0 : a1 + 1] for (a0, a1), _ in reversed(runs)) == b"".join(b[b0 : b1 + 1] for _, (b0, b1) in reversed(runs))
    rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
    assert rows[-1][-1] == size


@pytest.mark.parametrize(
    "payload, value",
    [
        ("00c3094064016161e057000161610a00e8a3b507b06df271", b"a" * 100),
        ("00c07b0a0048e253e1007a67b9", b"123"),
        ("00c2701101000a0001a408fe953095a5", b"70000"),
        ("000b2d333030303030303030300a007cef356d39051fd1", b"-3000000000"),
    ],
)
def test_what_redis_7_has_dumped_is_restored(payload, value):
    assert commands.keys.undumped(bytes.fromhex(payload)) == value


def unpacked(packed):
    """LZF, a byte at a time: what the compiled one is held against."""
    out, i = bytearray(), 0
    while i < len(packed):
        n = packed[i]
        i += 1
        if n < 32:
            out += packed[i : i + n + 1]
            if len(packed) < i + n + 1:
                return None
            i += n + 1
            continue
        if len(packed) < i + (2 if n >> 5 == 7 else 1):
            return None
        back, n = (n & 0x1F) << 8, n >> 5
        if n == 7:
            n += packed[i]
            i += 1
        back += packed[i] + 1
        i += 1
        if back > len(out):
            return None
        for _ in range(n + 2):
            out.append(out[-back])
    return bytes(out)


def test_lzf_of_any_bytes():
    draw, good = random.Random(7), 0
    for _ in range(20_000):
        packed = bytearray(b"\x00a")
        while draw.random() < 0.9:
            if draw.random() < 0.4:
                n = draw.randrange(32)
                packed += bytes([n]) + draw.randbytes(n + 1)
            else:
                packed += bytes([draw.randrange(1, 8) << 5 | (draw.random() < 0.05)]) + draw.randbytes(2)[draw.randrange(2) :]
        if draw.random() < 0.3:
            del packed[draw.randrange(len(packed)) :]
        wanted = unpacked(packed) or None
        good += wanted is not None
        n = len(wanted or packed) or 1
        assert _text.unpack_lzf(bytes(packed), n) == wanted
        assert [_text.unpack_lzf(bytes(packed), other) for other in (n - 1, n + 1, 0, 1 << 40, (1 << 64) - 1)] == [None] * 5
    assert 2000 < good < 18_000


def payload_of(packed, size, says=None):
    """As Redis dumps a compressed string. says: how long it says that the compressed bytes are."""
    body = b"\0\xc3" + b"".join(b"\x80" + n.to_bytes(4, "big") for n in (len(packed) if says is None else says, size)) + packed + b"\x0a\0"
    return body + _text.crc64(body).to_bytes(8, "little")


def test_a_restored_value_that_is_large_takes_no_time():
    packed = b"\0a" + b"\xe0\xff\0" * 1_000_000
    began = time.monotonic()
    assert commands.keys.undumped(payload_of(packed, 264_000_001)) == b"a" * 264_000_001
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("first, good", [(0x80, True), (0x81, True), (0x82, False), (0x96, False), (0xBF, False)])
def test_a_length_is_read_as_redis_reads_it(first, good):
    body = bytes([0, first]) + (3).to_bytes(8 if first & 0x3F else 4, "big") + b"abc\x0a\0"
    payload = body + _text.crc64(body).to_bytes(8, "little")
    if good:
        assert commands.keys.undumped(payload) == b"abc"
    else:
        with pytest.raises(_resp.CommandError, match="Bad data format"):
            commands.keys.undumped(payload)


def test_a_packed_length_may_look_like_an_encoding_as_in_redis():
    packed = b"\0a\xe0\xff\0"
    body = b"\0\xc3" + bytes([0xC0 | len(packed)]) + b"\x41\x09" + packed + b"\x0a\0"
    assert commands.keys.undumped(body + _text.crc64(body).to_bytes(8, "little")) == b"a" * 265


@pytest.mark.parametrize("size, says", [(265, 100), (264, None), (266, None), (0, None), (1 << 31, None)])
def test_a_false_length_is_bad_data(size, says):
    assert commands.keys.undumped(payload_of(b"\0a\xe0\xff\0", 265)) == b"a" * 265
    with pytest.raises(_resp.CommandError, match="Bad data format"):
        commands.keys.undumped(payload_of(b"\0a\xe0\xff\0", size, says))


def test_bits_are_counted_found_and_combined():
    draw = random.Random(8)
    for _ in range(5000):
        n = draw.choice((1, 2, 7, 8, 9, 17, 40, 100))
        data = bytearray(draw.choice((b"\0", b"\xff")) * n) if draw.random() < 0.7 else bytearray(draw.randbytes(n))
        for _ in range(draw.randrange(3)):
            data[draw.randrange(n)] ^= 1 << draw.randrange(8)
        low = draw.randrange(8 * n)
        high = draw.randrange(low, 8 * n)
        bits = "".join(f"{byte:08b}" for byte in data)
        assert _text.count_bits(bytes(data), low, high) == bits[low : high + 1].count("1")
        for wanted in (0, 1):
            assert _text.first_bit(bytes(data), wanted, low, high) == bits.find(str(wanted), low, high + 1)
        other = draw.randbytes(draw.randrange(n + 1))
        padded = other + bytes(n - len(other))
        for sign, operation in (("&", operator.and_), ("|", operator.or_), ("^", operator.xor)):
            result = bytearray(data)
            _text.combine_bits(result, other, ord(sign))
            assert result == bytes(map(operation, data, padded))
        _text.combine_bits(result, bytes(data), ord("~"))
        assert result == bytes(byte ^ 0xFF for byte in data)
    with pytest.raises(ValueError, match="shorter"):
        _text.combine_bits(bytearray(1), b"ab", ord("|"))


@pytest.mark.parametrize("options", [(), ("ABSTTL",)])
def test_a_time_of_restore_that_no_clock_reaches(server, options):
    client = connect(server)
    payload = payload_of(b"\0a\xe0\xff\0", 265)
    said = server.say(client, say("RESTORE", "k", (1 << 63) - 1, payload, *options) + say("RESTORE", "k", (1 << 63) - 1 - 10**14, payload) + say("EXISTS", "k"))
    assert said == (b"+OK\r\n-BUSYKEY Target key name already exists.\r\n:1\r\n" if options else b"-ERR invalid expire time in 'restore' command\r\n+OK\r\n:1\r\n")


# ---- databases ----


@pytest.fixture
def databases(make):
    server = InProcess(make("16M").name, {"databases": "3"})
    yield server
    server.close()


def ask(server, client, *commands):
    """The lines of the replies to these commands."""
    client.transport.written.clear()
    return server.say(client, b"".join(say(*command.split()) for command in commands)).split(b"\r\n")[:-1]


def test_databases_have_keys_of_their_own(databases):
    a, b = connect(databases), connect(databases)
    assert ask(databases, a, "SET k zero", "INCR n", "SELECT 2", "GET k", "SET k two", "INCRBY n 5", "APPEND k !", "MGET k n none") == [
        b"+OK", b":1", b"+OK", b"$-1", b"+OK", b":5", b":4", b"*3", b"$4", b"two!", b"$1", b"5", b"$-1",
    ]  # fmt: skip
    assert ask(databases, b, "GET k", "EXISTS k n", "SELECT 2", "GET k", "SELECT 3", "GET k") == [
        b"$4", b"zero", b":2", b"+OK", b"$4", b"two!", b"-ERR DB index is out of range", b"$4", b"two!",
    ]  # fmt: skip
    assert databases.cache["k"] == b"zero"
    assert databases.cache.namespace("db:2")["n"] == 5


def test_what_is_asked_of_all_keys_is_asked_of_those_of_a_database(databases):
    client = connect(databases)
    ask(databases, client, "SET zero 0", "SELECT 1", "SET one 1", "SET uno 1")
    assert sorted(ask(databases, client, "KEYS *")) == [b"$3", b"$3", b"*2", b"one", b"uno"]
    assert sorted(ask(databases, client, "SCAN 0 COUNT 100000000")) == [b"$1", b"$3", b"$3", b"*2", b"*2", b"0", b"one", b"uno"]
    assert ask(databases, client, "DBSIZE", "SELECT 0", "DBSIZE", "KEYS *", "RANDOMKEY") == [b":2", b"+OK", b":1", b"*1", b"$4", b"zero", b"$4", b"zero"]
    assert ask(databases, client, "SELECT 1", "FLUSHDB", "DBSIZE", "GET one", "SELECT 0", "GET zero") == [
        b"+OK", b"+OK", b":0", b"$-1", b"+OK", b"$1", b"0",
    ]  # fmt: skip
    ask(databases, client, "SELECT 1", "SET one again")
    assert ask(databases, client, "SELECT 0", "FLUSHDB", "DBSIZE", "SELECT 1", "GET one", "FLUSHALL", "GET one") == [
        b"+OK", b"+OK", b":0", b"+OK", b"$5", b"again", b"+OK", b"$-1",
    ]  # fmt: skip


def test_a_step_of_several_keys_may_cross_databases(databases):
    a, b = connect(databases), connect(databases)
    assert ask(databases, a, "SET k v EX 100", "COPY k k DB 1", "COPY k k DB 1", "COPY k k DB 3", "SELECT 1", "GET k", "TTL k", "RENAME k l", "GET l") == [
        b"+OK", b":1", b":0", b"-ERR DB index is out of range", b"+OK", b"$1", b"v", b":100", b"+OK", b"$1", b"v",
    ]  # fmt: skip
    assert ask(databases, a, "MULTI", "SET m 1", "SELECT 2", "SET m 2", "EXEC", "GET m", "SELECT 1", "GET m")[-8:] == [
        b"+OK", b"+OK", b"+OK", b"$1", b"2", b"+OK", b"$1", b"1",
    ]  # fmt: skip
    assert ask(databases, a, "WATCH w") == [b"+OK"]
    ask(databases, b, "SET w other", "SELECT 1")
    assert ask(databases, a, "MULTI", "GET w", "EXEC") == [b"+OK", b"+QUEUED", b"*1", b"$-1"]
    ask(databases, a, "WATCH w")
    ask(databases, b, "SET w mine")
    assert ask(databases, a, "MULTI", "GET w", "EXEC") == [b"+OK", b"+QUEUED", b"*-1"]


def test_a_key_is_bounded_with_its_database(databases):
    client = connect(databases)
    assert ask(databases, client, "SELECT 1", "SET " + "k" * 4090 + " v")[1].startswith(b"-ERR a key has at most 40")
    assert ask(databases, client, "SET " + "k" * 4070 + " v", "GET " + "k" * 4090) == [b"+OK", b"$-1"]


def test_what_never_expired_does_not_begin_to(make):
    server = InProcess(make("16M", default_ttl=50).name)
    client = connect(server)
    assert ask(server, client, "SET a 1", "PTTL a")[1] != b":-1"
    changes = ("APPEND a x", "SETRANGE a 0 y", "SETBIT a 5 1", "RENAME a b", "COPY b a", "SET a 1 KEEPTTL", "INCRBYFLOAT a 1.5", "BITFIELD a SET u8 0 1")
    for change in ("INCR a", *changes):
        ask(server, client, "PERSIST a", change)
        assert ask(server, client, "TTL a" if not change.startswith("RENAME") else "TTL b") == [b":-1"], change
    assert ask(server, client, "SET a 1", "TTL a", "APPEND new x", "TTL new", "MSETNX other 1", "TTL other")[1::2] == [b":50"] * 3
    server.close()


# ---- stripes that are held, beside a clear() of another process


def elsewhere(act):
    """Done by another process."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.fixture
def two_stripes(make):
    """A cache of two stripes, an executor, keys of the first, keys of the second."""
    cache = make("4M", stripes=2)
    keys = ([], [])
    counts = cache.views().stripes["count"]
    for i in range(800):
        before = int(counts[0])
        cache.set(b"k%d" % i, b"old")
        keys[int(counts[0]) == before].append(b"k%d" % i)
    executor = _resp.Executor(cache, {}, impatient=False)
    yield cache, executor, *keys
    if executor.holds:
        executor.release()
    del counts, executor


def test_a_count_never_goes_back_behind_a_clear(two_stripes):
    """What is written to held stripes evicts from the others, where a newer epoch counts."""
    cache, executor, held, others = two_stripes
    counts = cache.views().stripes["count"]  # epoch << 32 | items
    for i in range(6000):
        cache.set(b"f%d" % i, b"x" * 900)
    executor.hold(held)
    elsewhere(cache.clear)
    elsewhere(lambda: cache.set(others[0], b"z" * 900))
    newest = int(counts[1]) >> 32
    for key in held:
        cache.set(key, b"y" * 900)
    assert int(counts[1]) >> 32 == newest
    del counts
    executor.release()
    assert cache.stats()["evictions"] > 0 and cache.verify() == []
    elsewhere(cache.clear)
    assert cache.get(others[0]) is None and len(cache) == 0


def test_a_write_to_a_stripe_that_is_not_held_comes_after_the_clear(two_stripes):
    cache, executor, held, others = two_stripes
    executor.hold(held[:1])
    elsewhere(cache.clear)
    elsewhere(lambda: cache.set(others[0], 1))
    cache.set(others[0], 2)
    assert cache.add(others[1], 3) and not cache.add(others[0], 4)
    elsewhere(lambda: cache.set(others[2], 5))
    assert cache.incr(others[2], 1) == 6
    executor.release()
    assert [cache.get(key) for key in others[:3]] == [2, 3, 6] and len(cache) == 3


def test_who_holds_stripes_clears_what_it_still_sees(two_stripes):
    cache, executor, held, _ = two_stripes
    executor.hold(held)
    elsewhere(cache.clear)
    assert cache.get(held[0]) == b"old"
    assert sorted(cache) == sorted(held) and len(cache) == len(held)
    cache.clear()
    assert cache.get(held[0]) is None and list(cache) == [] and len(cache) == 0
    cache.set(held[0], b"new")
    executor.release()
    assert cache.get(held[0]) == b"new" and len(cache) == 1


# ---- further stripes


def owners(cache):
    """Whether each stripe is somebody's."""
    return [bool(word) for word in cache.views().stripes["word"]]


def test_further_stripes_are_held_until_they_are_let_go(two_stripes):
    cache, executor, held, others = two_stripes
    executor.hold(held[:1])
    assert executor.hold_further([(0, key) for key in (*others[:3], held[1])]) is None
    assert owners(cache) == [True, True]
    cache.set(others[0], b"new")
    assert owners(cache) == [True, True]
    executor.let_go()
    executor.let_go()
    assert owners(cache) == [True, False] and executor.holds
    assert executor.hold_further([(0, held[1])]) is None and executor.hold_further([(0, others[0])]) is None
    executor.release()
    assert owners(cache) == [False, False] and not executor.holds


def test_of_further_stripes_alone_nothing_is_left(two_stripes):
    cache, executor, held, others = two_stripes
    executor.hold((), further=[(0, others[0])])
    assert owners(cache) == [False, True] and executor.holds
    assert executor.hold_further([(0, held[0])]) is None
    assert owners(cache) == [True, True]
    executor.let_go()
    assert owners(cache) == [False, False] and not executor.holds
    executor.hold((), further=[(0, b"x" * 5000)])  # there is no such key
    executor.let_go()
    assert not executor.holds


def test_let_go_leaves_what_was_held_without_a_stripe(two_stripes):
    """A transaction of no keys, in which a script names some."""
    _, executor, held, _ = two_stripes
    executor.hold(())
    assert executor.hold_further([(0, held[0])]) is None
    executor.let_go()
    assert executor.holds
    executor.release()


def test_a_further_stripe_that_is_busy_is_not_waited_for(two_stripes):
    cache, executor, held, others = two_stripes
    stripes = cache.views(writable=True).stripes
    executor.hold(())
    mine = int(stripes["word"].max())
    stripes["word"][1] = other = 1 << 40 | 77  # somebody's
    assert executor.hold_further([(0, held[0]), (0, others[5])]) == others[5]
    assert [int(word) for word in stripes["word"]] == [mine, other]
    with pytest.raises(errors.StripeBusy):
        cache.set(others[0], 1)
    executor.release()
    stripes["word"][1] = 0
    del stripes


def test_after_a_clear_no_further_stripe_is_taken(two_stripes):
    """What is held has an older epoch than what others may have stored there since."""
    cache, executor, held, others = two_stripes
    executor.hold(held[:1])
    elsewhere(cache.clear)
    elsewhere(lambda: cache.set(others[0], 1))
    assert executor.hold_further([(0, others[0])]) == others[0]
    assert executor.hold_further([(0, held[1])]) is None  # is held
    assert owners(cache) == [True, False]
    executor.release()
    assert len(cache) == 1 and cache.verify() == []


def test_versions_are_no_reads(two_stripes):
    cache, executor, held, others = two_stripes
    before = cache.stats()
    assert executor.versions([(0, held[0]), (0, b"none"), (0, others[0])]) == [cache.gets(held[0])[1], 0, cache.gets(others[0])[1]]
    after = cache.stats()
    assert after["hits"] - before["hits"] == 2 and after["misses"] == before["misses"]


def test_sizes_are_no_reads(two_stripes):
    cache, executor, held, others = two_stripes
    cache.set(held[0], b"x" * 300)
    before = cache.stats()
    assert executor.value_sizes([(0, held[0]), (0, b"none"), (0, others[0])])[:2] == [300, 0]
    after = cache.stats()
    assert (after["hits"], after["misses"]) == (before["hits"], before["misses"])


def test_who_waits_for_another_command_of_the_process_is_told_so(two_stripes):
    cache, executor, held, others = two_stripes
    told = []

    def wait():
        other = _resp.Executor(cache, {}, impatient=False)
        for keys, further in (((), [(0, others[0])]), (others[:1], ())):
            try:
                other.hold(keys, further=further, within=0.01)
            except _resp.HeldByOthers:
                told.append(other.holds)

    executor.hold(held[:1])
    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    executor.release()
    assert told == [False, False]
    assert owners(cache) == [False, False]


# ---- stripes that are held, and a fork


@pytest.mark.parametrize("uses", [False, True])
def test_a_fork_child_lets_go_of_nothing_that_its_parent_holds(two_stripes, uses):
    """A handler, or a command that is not compiled, forks within EXEC: the child leaves that by release(), too."""
    cache, executor, held, others = two_stripes
    stripes = cache.views(writable=True).stripes
    executor.hold(held[:1])
    taken = int(stripes["word"][0])
    stripes["old"][0] = 1  # as if it was in the middle of a write

    def child():
        if uses:
            cache.set(others[0], b"the child's")
        assert executor.holds is False
        executor.release()

    elsewhere(child)
    assert taken and (int(stripes["word"][0]), int(stripes["old"][0])) == (taken, 1)
    stripes["old"][0] = 0
    assert executor.holds
    executor.release()
    assert not int(stripes["word"][0]) and cache.get(others[0]) == (b"the child's" if uses else b"old")
    del stripes


def test_a_fork_child_holds_stripes_by_a_token_of_its_own(two_stripes):
    cache, executor, held, _ = two_stripes

    def child():
        executor.hold(held[:1])
        stripes = cache.views().stripes
        assert int(stripes["word"][0]) & 0xFFFF == cache.row + 1
        assert executor.holds
        executor.release()
        assert not int(stripes["word"][0])

    elsewhere(child)


def test_a_fork_child_does_not_wait_for_a_thread_that_held_stripes_in_its_parent(two_stripes):
    cache, executor, held, others = two_stripes
    holding, forked = threading.Event(), threading.Event()

    def beside():
        executor.hold(held[:1])
        holding.set()
        forked.wait()
        executor.release()

    def child():
        signal.alarm(20)
        mine = _resp.Executor(cache, {}, impatient=False)
        mine.hold(others[:1])
        mine.release()

    thread = threading.Thread(target=beside)
    thread.start()
    holding.wait()
    try:
        elsewhere(child)
    finally:
        forked.set()
        thread.join()
    executor.hold(held[:1])
    executor.release()
