"""Values that carry something beside themselves: their bytes, when they are given and to whom, on a clock that the tests move."""

from __future__ import annotations

import math
import os
import random
import struct

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmcache import errors
from shmcache.codec import ABSENT, BYTES, ENVELOPE, FRESH, INT, MSGPACK, NEGATIVE, STALE, STR, open_envelope
from shmcache.core import _core, _stream
from shmcache.supervisor import format as fmt
from tests.redis.inprocess import InProcess
from tests.redis.resp import encode
from tests.unit.test_cache import pass_time

GENERATION = 0x1122334455667788


def envelope(codec, inside, *, tags=(), stale_ms=0, early_ms=0, flags=0, n_tags=None):
    """The bytes by their description, not by the code that is tested."""
    out = struct.pack("<BBHII", codec, flags, len(tags) if n_tags is None else n_tags, stale_ms, early_ms)
    for name, generation in tags:
        out += struct.pack("<QB", generation, len(name)) + name
    return out + inside


def put(cache, key, payload, ttl=None):
    stale_ms = struct.unpack_from("<I", payload, 4)[0] if len(payload) >= 8 else 0
    cache.set(key, _core.Encoded(ENVELOPE, payload, stale_ms), ttl)


def counted(cache):
    figures = cache.counters()
    return figures["hits"], figures["misses"]


INSIDE = [
    (BYTES, b"", b""), (BYTES, b"x" * 2000, b"x" * 2000), (STR, "ünï".encode(), "ünï"), (INT, struct.pack("<q", -5), -5),
    (MSGPACK, msgpack.packb({"a": [1, None]}), {"a": [1, None]}),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "inside", "value"), INSIDE, ids=lambda x: str(x)[:12])
def test_what_is_inside_is_the_value(cache, codec, inside, value):
    put(cache, "k", envelope(codec, inside, early_ms=1))
    assert cache.get("k") == cache["k"] == value
    assert type(cache.get("k")) is type(value)
    assert "k" in cache
    assert cache.get_many(["k", "no"]) == {"k": value}
    assert cache.gets("k")[0] == value
    assert cache._look("k") == (FRESH, value, cache.gets("k")[1])
    assert cache.ttl("k") == math.inf
    assert cache.pop("k") == value
    assert "k" not in cache
    assert cache._look("k") == (ABSENT, None, 0)


@pytest.mark.parametrize("size", [900, 1024, 5000, 32_768, 65_536, 300_000, 1_000_000])
def test_large_ones(cache, size):
    value = os.urandom(size)
    cache.set(b"\0tag\0t", struct.pack("<Q", GENERATION))
    put(cache, "k", envelope(BYTES, value, tags=[(b"t", GENERATION)], stale_ms=5000), ttl=10)
    assert cache.get("k") == value
    assert "k" in cache
    assert 9 < cache.ttl("k") <= 10
    cache.set(b"\0tag\0t", struct.pack("<Q", 1))
    assert "k" not in cache
    assert cache.add("k", 1)


def test_a_value_is_stale_before_it_expires(cache):
    put(cache, "k", envelope(BYTES, b"v", stale_ms=5000), ttl=10)
    assert 9 < cache.ttl("k") <= 10
    version = cache.gets("k")[1]
    assert cache._look("k") == (FRESH, b"v", version)
    pass_time(cache, 10.1)
    assert counted(cache) == (2, 0)
    assert cache.get("k", "miss") == "miss"
    with pytest.raises(KeyError):
        cache["k"]
    assert "k" not in cache
    assert cache.get_many(["k"]) == {}
    assert cache.gets("k") == (None, 0)
    assert cache.ttl("k") is None
    assert counted(cache) == (2, 4), "in and ttl count nothing, as ever"
    assert cache._look("k") == (STALE, b"v", version)
    assert counted(cache) == (3, 4)
    pass_time(cache, 5)
    assert cache._look("k") == (ABSENT, None, 0)


HIDDEN = {
    "stale": envelope(BYTES, b"v", stale_ms=2_000_000),
    "negative": envelope(BYTES, b"", flags=1),
    "invalidated": envelope(BYTES, b"v", tags=[(b"t", GENERATION)]),
}


@pytest.mark.parametrize("why", HIDDEN)
def test_what_is_hidden_is_absent_for_every_operation(cache, why):
    for key in "abcdefghijk":
        put(cache, key, HIDDEN[why], ttl=1000)
    version = 1
    if why == "stale":
        version = cache.gets("c")[1]
        pass_time(cache, 1001)
    assert list(cache.scan()) == []
    assert cache.add("a", 2)
    assert not cache.replace("b", 2)
    assert not cache.cas("c", 2, version)
    assert not cache.touch("d", 100)
    assert not cache.persist("d")
    assert not cache.delete("e")
    assert cache._look("e") == (ABSENT, None, 0), "and yet it is gone then"
    with pytest.raises(KeyError):
        cache.incr("f")
    assert cache.incr("f", default=6) == 7
    assert cache.pop("g") is None
    assert cache._look("g") == (ABSENT, None, 0)
    assert cache.cas("h", 3, 0)
    claim = cache.claim("i", 60)
    assert claim > 0
    assert cache.claim("i", 60) == -2
    assert cache.unclaim("i", claim)
    assert cache.get_or_set("j", lambda: 4) == 4
    assert (cache["a"], cache["f"], cache["h"], cache["j"]) == (2, 7, 3, 4)


def test_a_tag_is_its_generation(cache):
    payload = envelope(BYTES, b"v", tags=[(b"t", GENERATION), (b"u" * 200, 7)])
    put(cache, "k", payload)
    assert cache.get("k") is None, "a generation that is not there, evicted or never made"
    for t, u, found in [(GENERATION, 7, True), (GENERATION, 8, False), (GENERATION + 1, 7, False), (GENERATION, 7, True)]:
        cache.set(b"\0tag\0t", struct.pack("<Q", t))
        cache.set(b"\0tag\0" + b"u" * 200, struct.pack("<Q", u))
        put(cache, "k", payload)
        assert (cache.get("k") == b"v", "k" in cache) == (found, found)
    cache.set(b"\0tag\0t", b"no generation")
    assert cache.get("k") is None


def test_what_was_invalidated_is_taken_away_by_who_meets_it(cache):
    put(cache, "k", envelope(BYTES, b"v", tags=[(b"t", GENERATION)]))
    assert len(cache) == 1
    assert cache.get("k") is None
    assert len(cache) == 0
    cache._put_negative("n")
    put(cache, "s", envelope(BYTES, b"v", stale_ms=5000), ttl=1)
    pass_time(cache, 2)
    assert cache.get("n") is cache.get("s") is None
    assert len(cache) == 2, "these are for who asks for them"


def test_negative(cache):
    assert cache._put_negative("k", 10)
    state, value, version = cache._look("k")
    assert (state, value) == (NEGATIVE, None)
    assert version > 0
    assert "k" not in cache
    pass_time(cache, 11)
    assert cache._look("k")[0] == ABSENT
    claim = cache.claim("k", 60)
    cache.set("k", "newer")
    assert not cache._put_negative("k", 10, claim)
    assert cache["k"] == "newer"
    cache.delete("k")
    assert cache._put_negative("k", 10, cache.claim("k", 60))
    assert cache._look("k")[0] == NEGATIVE
    cache.clear()
    assert cache._look("k")[0] == ABSENT


def test_touch_is_about_the_time_till_it_is_stale(cache):
    put(cache, "k", envelope(BYTES, b"v", stale_ms=5000), ttl=10)
    assert cache.touch("k", 100)
    assert 99 < cache.ttl("k") <= 100
    assert cache.expire("k", 20)
    pass_time(cache, 20.1)
    assert cache._look("k")[:2] == (STALE, b"v")
    assert not cache.touch("k", 100)
    pass_time(cache, 5)
    assert cache._look("k")[0] == ABSENT
    put(cache, "k", envelope(BYTES, b"v", stale_ms=5000), ttl=10)
    assert cache.persist("k")
    assert cache.ttl("k") == math.inf
    pass_time(cache, 1e6)
    assert cache.get("k") == b"v"
    assert cache.touch("k", 10)
    assert 9 < cache.ttl("k") <= 10


def test_a_counter_in_an_envelope_is_not_counted_up(cache):
    put(cache, "k", envelope(INT, struct.pack("<q", 5), stale_ms=1000), ttl=10)
    with pytest.raises(errors.NotANumber, match="tags"):
        cache.incr("k")
    assert cache["k"] == 5
    cache.set("k", 5)
    assert cache.incr("k") == 6


def test_early_misses_get_more_frequent_towards_the_end(cache):
    """XFetch: with early_ms of 1 s a read misses with probability exp(-left), so e ** -2 two seconds before the end."""
    n = 4000

    def share(left):
        put(cache, "k", envelope(BYTES, b"v", early_ms=1000), ttl=100)
        pass_time(cache, 100 - left)
        return sum(cache.get("k") is None for _ in range(n)) / n

    for left in (60, 4, 2, 1, 0.5):
        expected = math.exp(-left)
        assert abs(share(left) - expected) < 5 * math.sqrt(expected / n) + 0.02, left
    put(cache, "k", envelope(BYTES, b"v", early_ms=1000), ttl=100)
    pass_time(cache, 99.5)
    assert all("k" in cache and cache.gets("k")[0] == b"v" and cache.ttl("k") for _ in range(100)), "who does not read to show it is not early"
    while cache.get("k") is not None:
        pass
    assert cache._look("k")[:2] == (STALE, b"v"), "the miss that there was is not rolled for again"
    assert cache.pop("k") == b"v"


def test_bytes_of_any_kind_are_read_or_refused(make):
    """Whatever the lengths say: DamageError, a miss or a value out of the payload, and who replaces or removes it can."""
    cache = make()
    cache.set(b"\0tag\0t", struct.pack("<Q", GENERATION))
    server = InProcess(cache.name)
    client = server.connect()

    @given(data=st.binary(max_size=300), shape=st.sampled_from(["any", "cut", "flipped"]), seed=st.integers(0, 1 << 32))
    @settings(max_examples=500, deadline=None)
    def go(data, shape, seed):
        r = random.Random(seed)
        if shape != "any":
            tags = [(b"t" * r.choice([1, 1, 200]), GENERATION) for _ in range(r.randint(0, 16))]
            data = envelope(BYTES, b"inside", tags=tags, stale_ms=r.randint(0, 9), early_ms=3)
        if shape == "cut":
            data = data[: r.randrange(len(data) + 1)]
        if shape == "flipped":
            data = bytearray(data)
            for _ in range(3):
                data[r.randrange(min(len(data), r.choice([4, 12, 4000])))] = r.randrange(256)
        for ttl in (None, 100):
            put(cache, "k", bytes(data), ttl)
            for read in (cache.get, cache._look, cache.gets):
                try:
                    read("k")
                except (errors.DamageError, errors.CodecMismatch):
                    pass
            put(cache, "k", bytes(data), ttl)
            assert ("k" in cache) == (cache.ttl("k") is not None)
            server.say(client, b"".join(encode([word, b"k"]) for word in (b"GET", b"STRLEN", b"EXISTS", b"TTL")))
            cache.touch("k", 50)
            assert cache.claim("k", 60) >= 0
            cache.set("k", 1)
            assert cache["k"] == 1

    go()
    server.close()


BAD = {
    "too short": b"\0" * 11,
    "an envelope inside": envelope(ENVELOPE, b"\0" * 12),
    "a codec of a newer version": envelope(200, b""),
    "a flag of a newer version": envelope(BYTES, b"", flags=2),
    "seventeen tags": envelope(BYTES, b"", tags=[(b"t", 1)] * 17),
    "tags that are not there": envelope(BYTES, b"", n_tags=1),
    "a tag without a name": envelope(BYTES, b"x" * 300, tags=[(b"", 1)]),
    "a name of 201 bytes": envelope(BYTES, b"x" * 300, tags=[(b"t" * 201, 1)]),
    "a name that ends behind the value": envelope(BYTES, b"", tags=[(b"t" * 200, 1)])[:-1],
}


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_head_is_an_error(cache, what):
    put(cache, "k", BAD[what])
    for read in (cache.get, cache.gets, cache._look, cache.__getitem__, cache.pop):
        with pytest.raises(errors.DamageError, match="head of a value"):
            read("k")
    with pytest.raises(errors.DamageError):
        cache.get_or_set("k", lambda: 1)
    assert not cache.add("k", 1)
    cache.set("k", 1)
    assert cache["k"] == 1


# ---- tags ---------------------------------------------------------------------------------------------------------------------


def test_tags(cache):
    cache.set("a", 1, tags=("t",))
    cache.set("b", {"x": (1,)}, 50, ("t", "u"))
    cache.set("c", "plain")
    assert cache.add("d", b"d", tags=["u"])
    assert not cache.add("d", b"e", tags=["u"])
    assert cache.replace("d", b"f", tags=["v"])
    assert cache.cas("d", b"g", cache.gets("d")[1], tags=("u", "u"))
    cache.set_many({"e": 5, "f": [6]}, ttl=50, tags=("t",))
    cache.set("g", "no tags", tags=())
    everything = {"a": 1, "b": {"x": (1,)}, "c": "plain", "d": b"g", "e": 5, "f": [6], "g": "no tags"}
    assert cache.get_many(everything) == everything
    assert 49 < cache.ttl("b") <= 50
    assert 49 < cache.ttl("f") <= 50
    cache.invalidate_tag("never used")
    assert cache.get_many(everything) == everything
    cache.invalidate_tag("t")
    assert cache.get_many(everything) == {"c": "plain", "d": b"g", "g": "no tags"}
    cache.set("a", 2, tags=("t",))
    assert cache["a"] == 2
    cache.invalidate_tag("u", "t")
    assert cache.get_many(everything) == {"c": "plain", "g": "no tags"}
    cache.set("a", 1, 0, ("t",))
    assert "a" not in cache


def test_a_generation_that_is_gone_never_comes_back(cache):
    cache.set("k", "old", tags=("t",))
    assert cache.delete(cache._tag_key("t")), "as an eviction would"
    assert cache.get("k") is None
    cache.set("k", "old", tags=("t",))
    cache.delete(cache._tag_key("t"))
    cache.set("other", 1, tags=("t",))
    assert cache.get("k") is None
    cache.set(cache._tag_key("t"), "what a user put there")
    assert cache.get("other") is None
    cache.set("k", "new", tags=("t",))
    assert cache["k"] == "new"


@pytest.mark.parametrize("tags", ["t", b"t", (b"t",), (1,), ("",), ("x" * 201,), ("\ud800",), ("ü" * 101,), ("t",) * 17, 5])
def test_a_wrong_tag_changes_nothing(cache, tags):
    cache.set("k", "old")
    for call in (cache.set, cache.replace, lambda k, v, tags: cache.cas(k, v, cache.gets(k)[1], tags=tags),
                 lambda k, v, tags: cache.set_many({k: v}, tags=tags), lambda k, v, tags: cache.get_or_set("new", lambda: v, tags=tags),
                 lambda k, v, tags: cache.get_lease("new", tags=tags)):  # fmt: skip
        with pytest.raises(TypeError if tags == 5 else errors.InvalidTag):
            call("k", "new", tags=tags)
    if isinstance(tags, tuple) and len(tags) == 1:
        with pytest.raises(errors.InvalidTag):
            cache.invalidate_tag("fine", *tags)
    assert cache["k"] == "old"
    assert cache.claim_version("new") == 0
    assert len(cache) == 1 or tags == ("t",) * 17


def test_the_most_that_is_allowed(cache):
    tags = tuple(f"{i:x}" + "ü" * 99 + "x" for i in range(16))
    cache.set("k", b"v" * 100_000, tags=tags)
    assert cache["k"] == b"v" * 100_000
    cache.invalidate_tag(tags[-1])
    assert cache.get("k") is None


def test_a_namespaces_tags_are_the_caches(cache):
    users = cache.namespace("users")
    users.set("k", 1, tags=("t",))
    users.set_many({"m": 2}, tags=("t",))
    assert users.add("a", 3, tags=("t",))
    assert users.replace("a", 4, tags=("t",))
    assert users.cas("a", 5, users.gets("a")[1], tags=("t",))
    assert users.get_or_set("f", lambda: 6, tags=("t",)) == 6
    lease = users.get_lease("l", tags=("t",))
    assert users.fill(lease, 7)
    assert not users.release(lease)
    assert users.get_many(["k", "m", "a", "f", "l"]) == {"k": 1, "m": 2, "a": 5, "f": 6, "l": 7}
    cache.invalidate_tag("t")
    assert users.get_many(["k", "m", "a", "f", "l"]) == {}


def test_a_tools_reader_reads_what_the_core_wrote(cache):
    cache.set("k", b"inside", tags=("t", "u"))
    walk = _stream.Walk(cache)
    found = {}
    while walk.block():
        with memoryview(walk) as payload:
            found.update({r.key: (r.codec, r.value) for r in fmt.records(payload)})
    codec, payload = found[b"k"]
    assert codec == ENVELOPE
    tags = [("t", cache[cache._tag_key("t")]), ("u", cache[cache._tag_key("u")])]
    assert open_envelope(payload) == (BYTES, False, 0, tags, b"inside")
    for what in BAD.values():
        if b"t" * 201 not in what and what[2:4] != b"\1\0":
            with pytest.raises(errors.DamageError):
                open_envelope(what)


# ---- the sidecar --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def redis(cache):
    """redis("GET", "k") -> the reply's bytes."""
    server = InProcess(cache.name)

    def say(*words):
        client = server.connect()
        reply = server.say(client, encode([str(w).encode() for w in words]))
        client.drop()
        server.turn()
        return reply

    yield say
    server.close()


@pytest.fixture
def tagged(cache):
    """Keys with a value each, of the tag t, ten seconds fresh and five stale."""
    cache.set(b"\0tag\0t", struct.pack("<Q", GENERATION))
    for key, codec, inside in [("b", BYTES, b"bytes"), ("s", STR, b"text"), ("i", INT, struct.pack("<q", 1234)), ("empty", BYTES, b"")]:
        put(cache, key, envelope(codec, inside, tags=[(b"t", GENERATION)], stale_ms=5000), ttl=10)


def test_a_redis_client_reads_what_is_inside(cache, redis, tagged):
    assert redis("MGET", "b", "s", "i", "empty") == b"*4\r\n$5\r\nbytes\r\n$4\r\ntext\r\n$4\r\n1234\r\n$0\r\n\r\n"
    assert redis("GET", "i") == b"$4\r\n1234\r\n"
    assert redis("STRLEN", "b") == b":5\r\n"
    assert redis("STRLEN", "i") == b":4\r\n"
    assert redis("GETRANGE", "b", 1, 2) == b"$2\r\nyt\r\n"
    assert redis("EXISTS", "b", "s", "i", "no") == b":3\r\n"
    assert redis("TTL", "b") == b":10\r\n"
    assert redis("KEYS", "[a-z]").count(b"$1\r\n") == 3
    assert redis("TYPE", "b") == b"+string\r\n"
    assert redis("GETBIT", "b", 1) == b":1\r\n"
    assert redis("OBJECT", "ENCODING", "i") == b"$3\r\nint\r\n"
    assert redis("EXPIRE", "b", 100) == b":1\r\n"
    assert redis("TTL", "b") == b":100\r\n"
    assert redis("PERSIST", "b") == b":1\r\n"
    assert redis("TTL", "b") == b":-1\r\n"


@pytest.mark.parametrize("why", ["stale", "invalidated"])
def test_for_a_redis_client_what_is_hidden_is_not_there(cache, redis, tagged, why):
    if why == "stale":
        pass_time(cache, 10.1)
    else:
        cache.set(b"\0tag\0t", struct.pack("<Q", 1))
    before = counted(cache)
    assert redis("MGET", "b", "i") == b"*2\r\n$-1\r\n$-1\r\n"
    assert counted(cache) == (before[0], before[1] + 2)
    assert redis("EXISTS", "b") == redis("STRLEN", "b") == redis("EXPIRE", "b", 5) == redis("PERSIST", "b") == b":0\r\n"
    assert redis("TTL", "b") == b":-2\r\n"
    assert redis("KEYS", "[a-z]*") == b"*0\r\n"
    assert redis("TYPE", "b") == b"+none\r\n"
    assert redis("GETRANGE", "b", 0, 1) == b"$0\r\n\r\n"
    assert redis("SET", "b", "x", "XX") == redis("GETDEL", "b") == b"$-1\r\n"
    assert redis("RENAME", "s", "t") == b"-ERR no such key\r\n"
    assert redis("SET", "s", "x", "NX") == b"+OK\r\n"
    assert redis("INCR", "i") == b":1\r\n"
    assert redis("APPEND", "empty", "a") == b":1\r\n"
    assert redis("DEL", "b") == b":0\r\n"


def test_what_a_redis_client_changes_is_a_plain_value(cache, redis, tagged):
    assert redis("APPEND", "b", "+") == b":6\r\n"
    assert redis("INCRBY", "i", 6) == b":1240\r\n"
    assert redis("SETRANGE", "s", 1, "E") == b":4\r\n"
    assert redis("GETSET", "empty", "full") == b"$0\r\n\r\n"
    cache.set(b"\0tag\0t", struct.pack("<Q", 1))
    assert cache.get_many(["b", "i", "s", "empty"]) == {"b": b"bytes+", "i": 1240, "s": b"tExt", "empty": b"full"}
    assert 9 < cache.ttl("b") <= 10, "it lives as long as it was fresh"
    assert 9 < cache.ttl("i") <= 10


def test_a_redis_client_renames_and_copies_a_value_with_its_tags(cache, redis, tagged):
    assert redis("RENAME", "b", "c") == b"+OK\r\n"
    assert redis("COPY", "i", "j") == b":1\r\n"
    assert cache["c"] == b"bytes"
    assert cache["j"] == cache["i"] == 1234
    assert 9 < cache.ttl("c") <= 10
    cache.set(b"\0tag\0t", struct.pack("<Q", 1))
    assert cache.get_many(["b", "c", "i", "j"]) == {}
