"""A Hypothesis state machine against a dict: whatever the order of operations, `got is None or got == model[key]`.

In the roomy segment nothing is evicted, and the cache must equal the model exactly; in the tight one it may miss, never lie.
"""

from __future__ import annotations

import itertools
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import shmcache
from shmcache.core import _sweep

numbers = itertools.count()
KEYS = st.integers(0, 30).map(lambda i: b"k" * (i % 4 + 1) + b"%d" % i)
VALUES = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20),
    st.integers(-(2**63), 2**63 - 1),
    st.tuples(st.integers(), st.floats(allow_nan=False)),
    st.sampled_from([100, 3000, 33_000, 70_000, 300_000]).map(lambda n: b"z" * n),
)
TAGS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=2)
TTLS = st.sampled_from([None, None, None, 0, 5, 50])


class CacheMachine(RuleBasedStateMachine):
    size = "8M"
    exact = True

    @initialize()
    def create(self):
        self.name = f"t-{os.getpid()}-p{next(numbers)}"
        self.cache = shmcache.create(self.name, self.size, stripes=4)
        self.header = self.cache.views(writable=True)
        self.model = {}  # key -> (value, seconds at which it expires or None)
        self.now = 0.0
        self.versions = {}
        self.tags = {}  # key -> those that it was stored with

    def alive(self, key):
        if key in self.model and self.model[key][1] is not None and self.model[key][1] <= self.now:
            del self.model[key]
        return key in self.model

    def here(self, key):
        """Is it in the cache? The model follows an eviction, where there may be one."""
        if self.exact:
            return self.alive(key)
        if not self.alive(key):
            return False
        if key not in self.cache:
            del self.model[key]
        return key in self.model

    def store(self, key, value, ttl, tags=()):
        self.tags[key] = tags
        if ttl == 0:
            self.model.pop(key, None)
        else:
            self.model[key] = (value, None if ttl is None else self.now + ttl)

    def check(self, key, got):
        if self.alive(key):
            value = self.model[key][0]
            if got is None and not self.exact:
                del self.model[key]
                return
            assert got == value
            assert type(got) is type(value)
        else:
            assert got is None

    @rule(key=KEYS)
    def get(self, key):
        self.check(key, self.cache.get(key))

    @rule(key=KEYS, value=VALUES, ttl=TTLS)
    def set(self, key, value, ttl):
        self.cache.set(key, value, ttl)
        self.store(key, value, ttl)

    @rule(key=KEYS, value=VALUES, ttl=TTLS)
    def add(self, key, value, ttl):
        expected = not self.here(key)
        assert self.cache.add(key, value, ttl) == expected
        if expected:
            self.store(key, value, ttl)

    @rule(key=KEYS, value=VALUES, ttl=TTLS)
    def replace(self, key, value, ttl):
        expected = self.here(key)
        assert self.cache.replace(key, value, ttl) == expected
        if expected:
            self.store(key, value, ttl)

    @rule(key=KEYS, value=VALUES, ttl=TTLS, tags=TAGS, how=st.sampled_from(["set", "add", "replace", "set_many"]))
    def store_with_tags(self, key, value, ttl, tags, how):
        there = self.here(key)
        if how == "set_many":
            self.cache.set_many({key: value}, ttl, tags)
        else:
            assert getattr(self.cache, how)(key, value, ttl, tags) is {"set": None, "add": not there, "replace": there}[how]
        if there is not {"add": True, "replace": False}.get(how):
            self.store(key, value, ttl, tags)

    @rule(key=KEYS, value=VALUES, ttl=st.sampled_from([5, 50]), tags=TAGS)
    def get_or_set(self, key, value, ttl, tags):
        """One caller: it computes what has expired, stale or not."""
        there = self.here(key)
        got = self.cache.get_or_set(key, lambda: value, ttl, stale_ttl=20, tags=tags)
        if there:
            self.check(key, got)
        else:
            assert got == value
            self.store(key, value, ttl, tags)

    @rule(tag=st.sampled_from(["a", "b", "c"]))
    def invalidate_tag(self, tag):
        self.cache.invalidate_tag(tag)
        for key in [key for key in self.model if tag in self.tags[key]]:
            del self.model[key]

    @rule(key=KEYS)
    def gets(self, key):
        value, version = self.cache.gets(key)
        self.check(key, value)
        self.versions[key] = (version, self.model.get(key))

    @rule(key=KEYS, value=VALUES)
    def cas(self, key, value):
        version, seen = self.versions.get(key, (1 << 60, None))
        stored = self.cache.cas(key, value, version)
        if stored:
            assert self.model.get(key) == seen or not self.alive(key)
            self.store(key, value, None)

    @rule(key=KEYS)
    def delete(self, key):
        expected = self.here(key)
        assert self.cache.delete(key) == expected
        self.model.pop(key, None)

    @rule(key=KEYS)
    def pop(self, key):
        self.check(key, self.cache.pop(key))
        self.model.pop(key, None)

    @rule(key=KEYS, n=st.integers(-1000, 1000))
    def incr(self, key, n):
        if self.here(key) and (type(self.model[key][0]) is not int or self.tags[key]):
            return
        value, expires = self.model.get(key, (0, None)) if self.alive(key) else (0, None)
        if not -(2**63) <= value + n < 2**63:
            return
        assert self.cache.incr(key, n, default=0) == value + n
        self.model[key] = (value + n, expires)
        self.tags[key] = ()

    @rule(key=KEYS, ttl=st.sampled_from([5, 50]))
    def expire(self, key, ttl):
        expected = self.here(key)
        assert self.cache.expire(key, ttl) == expected
        if expected:
            self.model[key] = (self.model[key][0], self.now + ttl)

    @rule(key=KEYS)
    def persist(self, key):
        expected = self.here(key)
        assert self.cache.persist(key) == expected
        if expected:
            self.model[key] = (self.model[key][0], None)

    @rule(keys=st.lists(KEYS, max_size=8))
    def get_many(self, keys):
        found = self.cache.get_many(keys)
        for key in keys:
            self.check(key, found.get(key))

    @rule(items=st.dictionaries(KEYS, VALUES, max_size=8), ttl=TTLS)
    def set_many(self, items, ttl):
        self.cache.set_many(items, ttl)
        for key, value in items.items():
            self.store(key, value, ttl)

    @rule(seconds=st.sampled_from([1, 4, 30]))
    def wait(self, seconds):
        self.header.header["clock_shift_ms"] += seconds * 1000
        self.now += seconds - 0.5  # real time passes, too: stay clear of the edge
        self.header.header["clock_shift_ms"] -= 500

    @rule()
    def clear(self):
        self.cache.clear()
        self.model.clear()

    @rule()
    def scan(self):
        found = [k for k in self.cache.scan() if not k.startswith(b"\0tag\0")]
        assert len(found) == len(set(found))
        live = {k for k in list(self.model) if self.alive(k)}
        assert set(found) == live if self.exact else set(found) <= live

    @invariant()
    def whole(self):
        if hasattr(self, "cache"):
            assert self.cache.verify() == []
            if not self.exact:
                return
            assert len(self.cache) >= sum(self.alive(k) for k in list(self.model))

    def teardown(self):
        if hasattr(self, "cache"):
            counts = _sweep.settle(self.cache)
            reserved = sum(c["reserved"] for c in self.cache.stats()["slab_classes"])
            assert counts["KEPT"] == reserved
            assert counts["RETIRED"] == 0
            del self.header
            self.cache.close()
            shmcache.unlink(self.name)


class TightMachine(CacheMachine):
    """With so little room that most sets evict: ballast goes in beside the model's keys."""

    size = "4M"
    exact = False

    @rule(n=st.integers(1, 3000), size=st.sampled_from([50, 1000, 20_000, 400_000]))
    def ballast(self, n, size):
        for i in range(min(n, 3_000_000 // size)):
            self.cache.set(b"ballast%d" % i, b"b" * size, 0.001 if n % 3 == 0 else None)

    @rule()
    def scan(self):
        found = [k for k in self.cache.scan() if not k.startswith((b"ballast", b"\0tag\0"))]
        assert set(found) <= {k for k in list(self.model) if self.alive(k)}


quick = settings(max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestExact = CacheMachine.TestCase
TestExact.settings = quick
TestTight = TightMachine.TestCase
TestTight.settings = quick
