"""The public operations, one by one, on a clock that the tests move."""

from __future__ import annotations

import datetime as dt
import math
import os
import pickle

import pytest

import shmcache
from shmcache import errors


def pass_time(cache, seconds):
    """Move the segment's clock: for every process, at once."""
    cache.views(writable=True).header["clock_shift_ms"] += int(seconds * 1000)


@pytest.mark.parametrize("value", [b"", b"x", b"\0" * 1000, "", "text", "ünï\ud800", 0, -1, 2**63 - 1, -(2**63), 2**63, True, None, 1.5, (1, [2])])
def test_get_gives_what_set_got(cache, value):
    cache.set("k", value)
    got = cache.get("k")
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 1023, 1024, 1025, 5000, 32_600, 32_700, 32_768, 65_536, 65_537, 131_072, 300_000, 1_000_000])
def test_every_size_comes_back_whole(cache, size):
    value = os.urandom(size)
    cache.set(b"k", value)
    assert cache.get(b"k") == value
    text = "é" * (size // 2)
    cache.set(b"t", text)
    assert cache.get(b"t") == text
    assert cache.delete(b"k")
    assert cache.get(b"k") is None


def test_str_and_bytes_are_one_key(cache):
    cache.set("schlüssel", 1)
    assert cache.get("schlüssel".encode()) == 1
    assert cache.get_many(["schlüssel", b"none"]) == {"schlüssel": 1}


def test_a_miss_is_the_default(cache):
    assert cache.get("k") is None
    assert cache.get("k", 5) == 5
    assert cache.gets("k") == (None, 0)
    assert "k" not in cache
    with pytest.raises(KeyError):
        cache["k"]
    with pytest.raises(KeyError):
        del cache["k"]


def test_mapping_methods(cache):
    cache["a"] = b"1"
    assert cache["a"] == b"1"
    assert "a" in cache
    assert len(cache) == 1
    assert list(cache) == [b"a"]
    del cache["a"]
    assert len(cache) == 0


def test_add_stores_only_what_is_not_there(cache):
    assert cache.add("k", 1)
    assert not cache.add("k", 2)
    assert cache["k"] == 1


def test_replace_stores_only_what_is_there(cache):
    assert not cache.replace("k", 1)
    assert "k" not in cache
    cache["k"] = 1
    assert cache.replace("k", 2)
    assert cache["k"] == 2


def test_cas_needs_the_version(cache):
    cache["k"] = 1
    value, version = cache.gets("k")
    assert (value, version > 0) == (1, True)
    cache["k"] = 1
    assert not cache.cas("k", 9, version), "equal value, another version"
    assert cache.cas("k", 9, cache.gets("k")[1])
    assert cache["k"] == 9
    assert not cache.cas("none", 1, 7)
    assert cache.cas("none", 1, 0), "version 0: still not there"
    assert not cache.cas("none", 2, 0)


def test_version_is_not_used_again_after_delete(cache):
    seen = set()
    for _ in range(50):
        cache["k"] = 1
        seen.add(cache.gets("k")[1])
        cache.delete("k")
    assert len(seen) == 50


def test_counters(cache):
    with pytest.raises(KeyError):
        cache.incr("n")
    assert cache.incr("n", 5, default=10) == 15
    assert cache.decr("n") == 14
    version = cache.gets("n")[1]
    assert cache.incr("n", -20) == -6
    assert cache["n"] == -6
    assert not cache.cas("n", 0, version), "a change in place is a new version"


def test_counter_keeps_its_time_and_default_gets_one(cache):
    cache.incr("n", 1, default=0, ttl=10)
    cache.incr("n", 1, ttl=1000)
    assert cache.ttl("n") <= 10


def test_pop(cache):
    cache["k"] = "v"
    assert cache.pop("k") == "v"
    assert cache.pop("k") is None
    assert cache.pop("k", 3) == 3


def test_many(cache):
    cache.set_many({f"k{i}": i for i in range(100)}, ttl=60)
    assert cache.get_many([f"k{i}" for i in range(0, 200, 2)]) == {f"k{i}": i for i in range(0, 100, 2)}
    assert cache.ttl("k5") > 50
    assert cache.delete_many(["k0", "k1", "none"]) == 2
    cache.set_many([("x", (1,))])
    assert cache["x"] == (1,)
    cache.set_many({"x": 1, "y": (2,)}, ttl=0)
    assert "x" not in cache
    assert "y" not in cache


def test_expiry_by_the_segments_clock(cache):
    cache.set("k", 1, ttl=10)
    cache.set("d", 1, ttl=dt.timedelta(seconds=20))
    cache.set("f", 1)
    assert 9 < cache.ttl("k") <= 10
    assert cache.ttl("f") == math.inf
    assert cache.ttl("none") is None
    pass_time(cache, 9.9)
    assert cache.get("k") == 1
    pass_time(cache, 0.2)
    assert cache.get("k") is None
    assert "k" not in cache
    assert len(cache) == 2, "the get has freed it"
    assert cache.get("d") == 1
    assert cache.stats()["expirations"] == 1


def test_what_has_expired_is_not_there_for_anybody(cache):
    for key in "abcdefg":
        cache.set(key, 1, ttl=1)
    version = cache.gets("c")[1]
    pass_time(cache, 2)
    assert cache.add("a", 2)
    assert not cache.replace("b", 2)
    assert not cache.cas("c", 2, version)
    assert not cache.touch("d", 100)
    assert not cache.delete("e")
    with pytest.raises(KeyError):
        cache.incr("f")
    assert cache.pop("g") is None
    assert list(cache.scan()) == [b"a"]


def test_touch_expire_persist(cache):
    cache.set("k", 1, ttl=10)
    assert cache.expire("k", 100)
    assert cache.ttl("k") > 90
    assert cache.persist("k")
    assert cache.ttl("k") == math.inf
    assert cache.touch("k", 5)
    assert cache.ttl("k") <= 5
    assert cache.touch("k")
    assert cache.ttl("k") == math.inf, "no default: never"
    assert cache.touch("k", 0)
    assert "k" not in cache
    assert not cache.touch("k", 0)
    assert not cache.persist("k")
    assert not cache.expire("k", 5)


def test_default_ttl(make):
    cache = make(default_ttl=30)
    cache["k"] = 1
    assert 29 < cache.ttl("k") <= 30
    cache.set("l", 1, ttl=5)
    assert cache.ttl("l") <= 5
    cache.touch("l")
    assert cache.ttl("l") > 25


def test_ttl_zero_means_expired_already(cache):
    cache["k"] = 1
    cache.set("k", 2, ttl=0)
    assert "k" not in cache
    cache["k"] = 1
    assert cache.replace("k", 2, ttl=0)
    assert "k" not in cache
    assert cache.add("k", 1, ttl=0)
    assert "k" not in cache
    assert len(cache) == 0


def test_clear_is_for_all_at_once(cache):
    cache.set_many({str(i): i for i in range(1000)})
    epoch = int(cache.segment.header["epoch"])
    cache.clear()
    assert len(cache) == 0
    assert cache.get("5") is None
    assert list(cache.scan()) == []
    assert not cache.replace("5", 1)
    assert cache.add("5", 1)
    assert len(cache) == 1
    cache.clear()
    cache.clear()
    assert int(cache.segment.header["epoch"]) == epoch + 2, "an empty cache is clear: no epoch is spent"


def test_scan_finds_each_key_once(cache):
    keys = {f"user:{i}".encode() for i in range(3000)} | {b"other"}
    for k in keys:
        cache[k] = 1
    found = list(cache.scan())
    assert len(found) == len(keys)
    assert set(found) == keys
    assert set(cache.scan(prefix="user:29")) == {k for k in keys if k.startswith(b"user:29")}
    it = cache.scan()
    next(it)
    cache.close()
    with pytest.raises(errors.CacheClosed):
        list(it)


def test_overfull_chains_evict_and_stay_whole(make):
    """Many more items than slots: overflow buckets run out, sets go on."""
    cache = make("4M")
    for i in range(60_000):
        cache.set(b"%d" % i, b"")
    assert cache.stats()["chain_evictions"] > 0
    assert cache.get(b"59999") == b""
    assert cache.verify() == []
    cache.clear()
    for i in range(60_000):
        cache.delete(b"%d" % i)
    assert cache.verify() == []


def test_stats_have_what_is_promised(cache):
    cache["a"] = 1
    cache.get("a")
    cache.get("b")
    s = cache.stats()
    assert (s["hits"], s["misses"], s["sets"], s["items"], s["hit_ratio"]) == (1, 1, 1, 1, 0.5)
    assert s["name"] == cache.name
    assert s["size_bytes"] == 8 << 20
    assert 0 < s["used_bytes"] < s["slab_bytes"] < s["size_bytes"]
    assert [p["pid"] for p in s["processes"]] == [os.getpid()]
    assert {"chunk_bytes", "pages", "live", "free"} <= s["slab_classes"][0].keys()
    assert {"pid", "alive"} <= s["supervisor"].keys()
    assert sum(c["live"] for c in s["slab_classes"]) == 1
    for k in ("deletes", "evictions", "expirations", "inline_evictions"):
        assert s[k] == 0


def test_handle_pickles_to_its_name(cache):
    cache["k"] = 1
    with pickle.loads(pickle.dumps(cache)) as other:
        assert other["k"] == 1
        assert len(cache.stats()["processes"]) == 1, "one row for a process, however many handles"


def test_two_handles_close_by_themselves(name, make):
    cache = make()
    other = shmcache.attach(name)
    other["k"] = 1
    other.close()
    other.close()
    assert cache["k"] == 1
    with pytest.raises(errors.CacheClosed):
        other.get("k")


def test_pickle_codec_is_opted_into(name, make):
    cache = make()
    with shmcache.attach(name, codec="pickle") as other:
        other["k"] = {1, ...}
        assert other["k"] == {1, ...}
        with pytest.raises(errors.CodecMismatch, match="pickle"):
            cache.get("k")
        cache["m"] = {"a": (1,)}
        assert other["m"] == {"a": (1,)}


def test_clear_hides_what_is_stored_and_not_yet_counted(cache):
    """A writer between the store of its slot and that of the stripe's count: others have read the item already."""
    cache["k"] = "v"
    segment = cache.views(writable=True)
    stripe = int(segment.stripes["count"].argmax())
    segment.stripes["count"][stripe] = 0
    segment.stripes["new"][stripe] = 1
    cache.clear()
    assert cache.get("k") is None
    segment.stripes["new"][stripe] = 0
    cache["another"] = 1
    cache.clear()
    segment.stripes["count"][stripe] = int(segment.header["epoch"]) << 32
    del segment
