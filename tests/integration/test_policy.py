"""A cache in front of a store: what every policy has to do, on every kind of store; who meets whom; stores that fail; the dead."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import math
import multiprocessing as mp
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest

import shmcache
from shmcache import errors
from shmcache.core import _claims, _dirty, _resp
from shmcache.stores import Entry
from shmcache.supervisor import writeback
from tests.integration.test_flight import claimer, pass_time
from tests.integration.test_processes import child, end_trackers, ended
from tests.integration.test_store import DATABASES, ClientTimeout, DictStore, fail, function_store, in_thread, opened, until

fork = mp.get_context("fork")
POLICIES = ["through", "around", "back"]


STORES = ["dict", "function", *DATABASES]
# functions take no versions
TOGETHER = [(mode, kind) for mode in POLICIES for kind in STORES if (mode, kind) != ("back", "function")]


@pytest.fixture
def store(request, together, tmp_path):
    _, kind = together
    if kind in DATABASES:
        with opened(kind, request, tmp_path) as database:
            yield database.store()
    else:
        yield DictStore() if kind == "dict" else function_store()


@pytest.fixture(params=TOGETHER, ids="-".join)
def together(request):
    return request.param


@pytest.fixture(params=["through", "around"])
def mode(request):
    return request.param


@pytest.fixture(params=POLICIES)
def any_mode(request):
    return request.param


@pytest.fixture
def front(make):
    """front(store, mode, **options of Policy) -> a cache in front of it; if it writes back, to a thread of this process."""
    with contextlib.ExitStack() as stack:

        def made(store, mode, default_ttl=None, **options):
            cache = make(policy=shmcache.Policy(mode, flush_every=0.01, **options), store=store, default_ttl=default_ttl)
            if mode == "back":
                other = stack.enter_context(shmcache.attach(cache.name))
                stack.callback(writeback.WriteBack(other, store).stop)
            return cache

        yield made


@pytest.fixture
def backed(front, together, store):
    return front(store, together[0])


@pytest.fixture
def over(front, mode):
    """over(store, **options of Policy) -> a cache in front of it that is written through, or around."""
    return lambda store, **options: front(store, mode, **options)


def stored(cache, *keys):
    """What the store has, when it has everything."""
    cache.flush()
    return cache.store.load_many([k.encode() for k in keys])


class Hooked(DictStore):
    """A store in whose calls a test has its say."""

    def __init__(self):
        super().__init__()
        self.before = self.after = lambda what, keys: None
        self.calls = []

    def load_many(self, keys, *, timeout=None):
        self.calls.append(("load", sorted(keys)))
        self.before("load", keys)
        found = super().load_many(keys)
        self.after("load", keys)
        return found

    def store_many(self, items, *, timeout=None, versions=None):
        self.calls.append(("store", sorted(items)))
        self.before("store", items)
        super().store_many(items, versions=versions)
        self.after("store", items)

    def delete_many(self, keys, *, timeout=None, versions=None):
        self.calls.append(("delete", sorted(keys)))
        self.before("delete", keys)
        super().delete_many(keys, versions=versions)
        self.after("delete", keys)


@pytest.fixture
def hooked():
    return Hooked()


def down(what, keys):
    raise errors.StoreUnavailable(f"no {what} now")


def kept(cache):
    """What a policy leaves of a write in the cache."""
    return cache.policy.mode != "around"


# ---- the contract ------------------------------------------------------------------------------------------------------------------


def test_it_behaves_as_a_dict_and_the_store_has_it_all(backed, store):
    rng = random.Random(7)
    keys = [b"k%d" % i for i in range(12)]
    values = [b"bytes", "text", 7, 0, {"a": [1, 2.5, None]}, b"", "é", -(2**63)]
    model = {}

    def check(got, expected):
        assert got == expected
        assert type(got) is type(expected)

    for _ in range(600):
        key, value = rng.choice(keys), rng.choice(values)
        what = rng.randrange(18)
        if what == 0:
            backed.set(key, value)
            model[key] = value
        elif what == 1:
            backed[key] = value
            model[key] = value
        elif what == 2:
            check(backed.get(key, "none"), model.get(key, "none"))
        elif what == 3:
            check(backed.delete(key), model.pop(key, None) is not None)
        elif what == 4:
            check(backed.add(key, value), key not in model)
            model.setdefault(key, value)
        elif what == 5:
            check(backed.replace(key, value), key in model)
            if key in model:
                model[key] = value
        elif what == 6:
            if type(model.get(key)) is int and -(2**63) <= model[key] + 3 < 2**63:
                model[key] += 3
                check(backed.incr(key, 3), model[key])
            elif key in model:
                with pytest.raises((errors.NotANumber, errors.CounterOverflow)):
                    backed.incr(key, -1 if type(model[key]) is int else 3)
            else:
                with pytest.raises(KeyError):
                    backed.incr(key)
                check(backed.incr(key, 2, default=40), 42)
                model[key] = 42
        elif what == 7:
            check(backed.pop(key, "none"), model.pop(key, "none"))
        elif what == 8:
            some = rng.sample(keys, 5)
            check(backed.get_many(some), {k: model[k] for k in some if k in model})
        elif what == 9:
            some = {k: rng.choice(values) for k in rng.sample(keys, 4)}
            backed.set_many(some)
            model |= some
        elif what == 10:
            some = rng.sample(keys, 4)
            check(backed.delete_many(some), sum(k in model for k in some))
            for k in some:
                model.pop(k, None)
        elif what == 11:
            check(key in backed, key in model)
        elif what == 12:
            got, version = backed.gets(key)
            check(got, model.get(key))
            assert (version == 0) == (key not in model)
            if rng.random() < 0.5:
                backed.set(key, 1)
                model[key] = 1
                check(backed.cas(key, value, version), False)
            else:
                check(backed.cas(key, value, version), True)
                model[key] = value
        elif what == 13:
            check(backed.get_or_set(key, lambda value=value: value), model.setdefault(key, value))
        elif what == 14:
            backed.invalidate(key)
        elif what == 15:
            backed.clear()
        elif what == 16:
            check(backed.touch(key, 1000), key in model)
            check(backed.persist(key), key in model)
        elif key in model:
            check(backed[key], model[key])
        else:
            with pytest.raises(KeyError):
                backed[key]
    backed.flush()
    assert {key: entry.value for key, entry in store.load_many(keys).items()} == model
    assert {key: backed.get(key) for key in keys if key in backed} == model


def test_a_ttl_is_the_values_also_in_the_store(backed, store):
    backed.set("k", "v", ttl=1000)
    assert 990 < stored(backed, "k")[b"k"].ttl <= 1000
    assert 990 < backed.ttl("k") <= 1000
    backed.invalidate("k")
    assert 990 < backed.ttl("k") <= 1000
    assert backed.get("k") == "v"
    assert 990 < backed.ttl("k") <= 1000
    assert backed.expire("k", 2000)
    assert 1990 < stored(backed, "k")[b"k"].ttl <= 2000
    assert backed.persist("k")
    assert stored(backed, "k")[b"k"].ttl is None
    assert backed.ttl("k") == math.inf
    backed.set("k", "v", ttl=0)
    assert stored(backed, "k") == {}
    assert "k" not in backed
    assert backed.ttl("k") is None


def test_the_default_ttl_is_that_of_the_cached_copy(front, any_mode, hooked):
    cache = front(hooked, any_mode, default_ttl=100)
    cache["k"] = "v"
    assert cache["k"] == "v"
    assert 90 < cache.ttl("k") <= 100
    assert stored(cache, "k")[b"k"].ttl is None
    cache.touch("k", 1000)
    assert 990 < stored(cache, "k")[b"k"].ttl <= 1000


def test_keys_of_the_caches_own_are_not_stored(backed, store):
    calls = []
    memoized = backed.memoize(ttl=60, name="f")(lambda x: calls.append(x) or x + 1)
    assert [memoized(1), memoized(1)] == [2, 2]
    assert calls == [1]
    users = backed.namespace("users")
    users["a"] = 1
    assert users["a"] == 1
    assert users.get_or_set("b", lambda: 2) == 2
    with backed.lock("l"):
        pass
    backed.set_many({"\0x": 1, "y": 2})
    assert backed.get("\0x") == 1
    assert backed.incr("\0x") == 2
    assert backed.delete("\0x")
    assert stored(backed, "\0x", "y") == {b"y": Entry(2)}
    assert backed.store_counters()["writes"] == 1


def test_a_value_that_has_no_form_changes_nothing(backed, store):
    backed["k"] = "v"
    for call in (backed.set, backed.add, backed.replace, lambda k, v: backed.set_many({"other": 1, k: v}), lambda k, v: backed.cas(k, v, 1)):
        with pytest.raises(errors.UnsupportedValue):
            call("k", object())
        with pytest.raises(errors.ValueTooLarge):
            call("k", bytes(64 << 20))
    with pytest.raises(errors.InvalidTTL):
        backed.set("k", "w", ttl=-1)
    with pytest.raises(errors.InvalidKey):
        backed.set("", "w")
    assert backed["k"] == "v"
    assert stored(backed, "k", "other") == {b"k": Entry("v")}


def test_a_handle_without_a_store_reads_and_is_refused_writes(over, hooked):
    backed = over(hooked)
    backed["k"] = 1
    assert backed["k"] == 1
    with shmcache.attach(backed.name) as bare:
        assert bare["k"] == 1
        assert bare.get("other") is None
        calls = [lambda: bare.set("k", 2), lambda: bare.add("n", 2), lambda: bare.set_many({"k": 2}), lambda: bare.incr("k"), lambda: bare.touch("k", 9),
                 lambda: bare.cas("k", 2, bare.gets("k")[1]), lambda: bare.replace("k", 2), lambda: bare.delete("k"), lambda: bare.pop("k"),
                 lambda: bare.delete_many(["k"])]  # fmt: skip
        for call in calls:
            with pytest.raises(shmcache.StoreNeeded, match="store="):
                call()
        assert bare["k"] == 1
        bare["\0own"] = 5
        bare.invalidate("k")
    assert backed["k"] == 1


FILLS = {
    "get_or_set": lambda c, computed: c.get_or_set("n", computed), "get_or_set, stale": lambda c, computed: c.get_or_set("n", computed, ttl=9, stale_ttl=9, early=True),
    "get_lease": lambda c, computed: c.get_lease("n"), "claim": lambda c, computed: c.claim("n", 9), "add": lambda c, computed: c.add("n", 1),
    "incr": lambda c, computed: c.incr("n", default=1), "cas": lambda c, computed: c.cas("n", 1, 0), "fill_claim": lambda c, computed: c.fill_claim("n", 1, 5),
}  # fmt: skip


@pytest.mark.parametrize("fill", FILLS)
def test_a_handle_without_a_store_fills_nothing(front, any_mode, hooked, fill):
    """Neither does it compute what it could not fill, nor keep others from filling it."""
    cache = front(hooked, any_mode)
    computed = []
    with shmcache.attach(cache.name) as bare:
        with pytest.raises(shmcache.StoreNeeded, match="store="):
            FILLS[fill](bare, lambda: computed.append(1) or "computed")
        assert computed == []
        assert bare.get("n") is None
        assert cache.claim_version("n") == 0
    assert stored(cache, "n") == {}
    assert cache.get_or_set("n", lambda: "of a handle that has one") == cache["n"] == "of a handle that has one"
    with shmcache.attach(cache.name) as bare:
        assert [bare["n"], bare.get_or_set("n", lambda: 1 / 0), bare.get_lease("n").value] == ["of a handle that has one"] * 3


def test_a_handle_without_a_store_refreshes_nothing(over, hooked):
    cache = over(hooked, stale_ttl=1000)
    cache.set("k", "old", ttl=10)
    assert cache["k"] == "old"
    pass_time(cache, 11)
    with shmcache.attach(cache.name) as bare, pytest.raises(shmcache.StoreNeeded):
        bare.get_or_set("k", lambda: 1 / 0, stale_ttl=1000)
    hooked.before = down
    assert cache["k"] == "old"


def test_a_lease_is_not_filled_by_a_handle_without_a_store(front, any_mode, hooked):
    cache = front(hooked, any_mode)
    lease = cache.get_lease("n")
    assert lease.held
    with shmcache.attach(cache.name) as bare, pytest.raises(shmcache.StoreNeeded):
        bare.fill(lease, "what the store never had")
    assert nothing_there(cache)


def test_what_is_the_caches_own_needs_no_store(front, any_mode, hooked):
    cache = front(hooked, any_mode)
    with shmcache.attach(cache.name) as bare:
        users = bare.namespace("users")
        assert [users.get_or_set("a", lambda: 1), users.add("b", 2), users.incr("c", default=3)] == [1, True, 4]
        assert bare.memoize(name="f", stale_ttl=9)(lambda x: x + 1)(1) == 2
        lease = users.get_lease("d")
        assert users.fill(lease, 4)
        assert bare.get_or_set("\0own", lambda: 5, ttl=9, stale_ttl=9) == 5
        with bare.lock("l"):
            pass
    assert hooked.calls == []


def test_awaited_a_handle_without_a_store_fills_nothing(front, any_mode, hooked):
    cache = front(hooked, any_mode)

    async def main():
        async with shmcache.aio.attach(cache.name) as bare:
            with pytest.raises(shmcache.StoreNeeded):
                await bare.get_or_set("n", lambda: 1 / 0)
            with pytest.raises(shmcache.StoreNeeded):
                await bare.add("n", 1)

    asyncio.run(main())
    assert nothing_there(cache)


def test_the_segments_policy_stays_in_force(over, mode, hooked):
    store, backed = hooked, over(hooked)
    other = "around" if mode == "through" else "through"
    with pytest.warns(errors.ConfigMismatch, match=f"mode='{other}'.*mode='{mode}'"), shmcache.open(backed.name, policy=other, store=store) as cache:
        assert cache.policy.mode == mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with shmcache.open(backed.name, policy=backed.policy, store=store) as cache:
            assert cache.policy == backed.policy
    with shmcache.attach(backed.name, store=store) as cache:
        assert cache.policy == backed.policy


def test_arguments_that_cannot_be(make, hooked, name):
    plain = make()
    with pytest.raises(errors.InvalidConfig, match="policy="):
        shmcache.attach(plain.name, store=hooked)
    with pytest.raises(errors.InvalidConfig, match="'through'"):
        shmcache.create("x", policy="sideways")
    for wrong in ({"timeout": 0}, {"timeout": -1}, {"timeout": math.nan}, {"negative_ttl": -1}, {"timeout": True}, {"negative_ttl": "1"}):
        with pytest.raises(errors.InvalidConfig):
            shmcache.Policy("through", **wrong)


def test_what_does_not_go_together_creates_nothing(hooked, name):
    with pytest.raises(errors.InvalidConfig, match="versions"):
        shmcache.create(name, "8M", policy="back", store=function_store())
    with pytest.raises(errors.InvalidConfig, match="tags"):
        shmcache.open(name, "8M", policy="back", store=hooked, tags=lambda key: ())
    with pytest.raises(errors.SegmentNotFound):
        shmcache.attach(name)


def test_by_default_a_store_is_written_through(make, hooked):
    assert make(store=hooked).policy == shmcache.Policy("through")


def test_it_is_pickled_with_its_store(make, mode):
    cache = make(policy=mode, store=Fixed())
    with pickle.loads(pickle.dumps(cache)) as other:
        assert other["answer"] == 42


def works(cache, out):
    out.put((cache["k"], cache.incr("n"), type(cache).__name__, cache.policy.mode))


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
@pytest.mark.parametrize("database", DATABASES)
def test_a_cache_goes_to_a_worker_with_its_database(front, any_mode, request, tmp_path, database, method):
    with opened(database, request, tmp_path) as there:
        cache = front(there.store(), any_mode)
        cache["k"], cache["n"] = "v", 1
        context = mp.get_context(method)
        out = context.Queue()
        p = context.Process(target=works, args=(cache, out))
        p.start()
        assert out.get(timeout=60) == ("v", 2, type(cache).__name__, any_mode)
        p.join(60)
        assert cache["n"] == 2
        assert stored(cache, "n") == {b"n": Entry(2)}
        out.close()
        del out, p  # their semaphores go before the tracker of semaphores does
        end_trackers(method)


class Fixed:
    ordered = False

    def load_many(self, keys, *, timeout=None):
        return {key: Entry(42) for key in keys if key == b"answer"}


@pytest.mark.parametrize("together", [pair for pair in TOGETHER if pair[1] in DATABASES], ids="-".join, indirect=True)
def test_after_fork(backed, store):
    backed["k"] = 1
    assert ended(child(lambda: backed.incr("k") == 2 and backed["k"] == 2 and backed.set("child", "c") is None)) == 0
    assert backed["k"] == 2
    assert backed["child"] == "c"
    assert stored(backed, "k") == {b"k": Entry(2)}


# ---- what is asked of the store -----------------------------------------------------------------------------------------------------


def test_a_hit_asks_nothing_and_a_miss_once(over, hooked):
    cache = over(hooked)
    hooked.rows[b"k"] = (hooked.codec.encode("v"), None, 0)
    assert [cache["k"], cache.get("k"), cache.get_many(["k"])["k"], "k" in cache] == ["v", "v", "v", True]
    assert hooked.calls == [("load", [b"k"])]
    hooked.calls.clear()
    assert cache.get_many(["a", "b", "k", "c"]) == {"k": "v"}
    assert hooked.calls == [("load", [b"a", b"b", b"c"])]


def test_many_keys_are_few_calls(over, hooked):
    cache = over(hooked)
    cache.set_many({f"k{i:04}": i for i in range(1200)})
    assert [(what, len(keys)) for what, keys in hooked.calls] == [("store", 500), ("store", 500), ("store", 200)]
    cache.clear()
    hooked.calls.clear()
    assert len(cache.get_many([f"k{i:04}" for i in range(1200)])) == 1200
    assert [(what, len(keys)) for what, keys in hooked.calls] == [("load", 500), ("load", 500), ("load", 200)]
    assert len(cache) == 1200


def test_through_caches_what_it_wrote_and_around_does_not(over, hooked):
    cache = over(hooked)
    cache["k"] = 1
    assert cache.peek("k") == (1 if kept(cache) else None)
    cache.incr("k")
    assert cache.peek("k") == (2 if kept(cache) else None)
    assert cache["k"] == cache.peek("k") == 2


def test_that_a_key_is_not_there_is_remembered(over, hooked):
    cache = over(hooked, negative_ttl=1000)
    assert [cache.get("k"), "k" in cache, cache.get_many(["k"]), cache.gets("k"), cache.ttl("k")] == [None, False, {}, (None, 0), None]
    with pytest.raises(KeyError):
        cache["k"]
    assert hooked.calls == [("load", [b"k"])]
    assert cache.get_many(["k", "a"]) == {}
    assert cache.get("a") is None
    assert hooked.calls == [("load", [b"k"]), ("load", [b"a"])]
    cache["k"] = 1
    assert cache["k"] == 1
    assert cache.delete("k")
    assert cache.add("a", 2)
    assert [cache.get("k"), cache["a"]] == [None, 2]
    hooked.calls.clear()
    assert cache.get("n") is None
    hooked.rows[b"n"] = (hooked.codec.encode("past the cache"), None, 0)
    assert cache.get("n") is None
    cache.invalidate("n")
    assert cache["n"] == "past the cache"
    hooked.before = down
    with pytest.raises(errors.StoreUnavailable):
        cache.get("x")
    hooked.before = lambda what, keys: None
    hooked.rows[b"x"] = (hooked.codec.encode(1), None, 0)
    assert cache["x"] == 1


def test_a_copy_whose_time_is_over_is_given_while_one_caller_loads_it_anew(over, hooked):
    cache = over(hooked, stale_ttl=1000)
    cache.set("k", "old", ttl=10)
    assert cache["k"] == "old"
    pass_time(cache, 11)
    hooked.rows[b"k"] = (hooked.codec.encode("new"), None, 0)  # past the cache
    gate = Gate(hooked, "load")
    loader, got = in_thread(cache.get, "k")
    assert gate.reached.wait(60)
    loads = len(hooked.calls)
    assert [cache["k"], cache.get("k")] == ["old", "old"]
    assert len(hooked.calls) == loads
    gate.opened.set()
    loader.join(60)
    assert got == ["new"]
    assert cache.peek("k") == "new"


def test_a_copy_whose_time_is_over_is_given_while_the_store_is_down(over, hooked):
    cache = over(hooked, stale_ttl=1000)
    cache.set("k", "old", ttl=10)
    assert cache["k"] == "old"
    pass_time(cache, 11)
    hooked.before = down
    assert cache["k"] == "old"
    pass_time(cache, 1001)
    with pytest.raises(errors.StoreUnavailable):
        cache.get("k")


@pytest.mark.parametrize("other", ["set", "delete", "invalidate", "incr"])
def test_what_is_changed_while_a_stale_copy_is_loaded_anew_wins(over, hooked, other):
    cache = over(hooked, stale_ttl=1000)
    cache.set("k", 1, ttl=10)
    assert cache["k"] == 1
    pass_time(cache, 11)
    gate = Gate(hooked, "load", "after")
    loader, got = in_thread(cache.get, "k")
    assert gate.reached.wait(60)
    {"set": lambda: cache.set("k", 5), "delete": lambda: cache.delete("k"), "invalidate": lambda: cache.invalidate("k"), "incr": lambda: cache.incr("k")}[other]()
    gate.opened.set()
    loader.join(60)
    assert got == [1]
    expected = {"set": 5, "delete": None, "incr": 2}.get(other, 1)
    assert cache.peek("k") in (None, expected)
    assert cache.get("k") == expected


def test_a_row_that_is_gone_takes_the_stale_copy_with_it(over, hooked):
    cache = over(hooked, stale_ttl=1000)
    cache.set("k", 1, ttl=10)
    assert cache["k"] == 1
    pass_time(cache, 11)
    del hooked.rows[b"k"]
    assert cache.get("k") is None
    assert cache._look("k")[0] == 3


def test_copies_have_the_tags_that_are_made_of_their_keys(make, mode, hooked):
    cache = make(policy=mode, store=hooked, tags=lambda key: (key.partition(b":")[0].decode(), "all"))
    hooked.rows[b"user:1"] = (hooked.codec.encode(1), None, 0)
    cache["user:2"] = 2
    cache["page:1"] = 3
    cache.incr("user:2", 10)
    everything = ["user:1", "user:2", "page:1"]
    assert cache.get_many(everything) == {"user:1": 1, "user:2": 12, "page:1": 3}
    cache.invalidate_tag("user")
    assert [cache.peek(k) for k in everything] == [None, None, 3]
    assert [cache[k] for k in everything] == [1, 12, 3]
    gate = Gate(hooked, "load", "after")
    cache.invalidate_tag("user")
    reader, got = in_thread(cache.get, "user:1")
    assert gate.reached.wait(60)
    cache.invalidate_tag("all")  # while it is loaded
    gate.opened.set()
    reader.join(60)
    assert got == [1]
    assert [cache.peek(k) for k in everything] == [None] * 3
    with pytest.raises(errors.UsageError, match="open"):
        cache.set("user:1", 5, tags=("x",))
    cache.set("\0own", 5, tags=("x",))
    cache.invalidate_tag("x")
    assert cache.get("\0own") is None


# ---- stores that fail ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_write_that_failed_leaves_a_miss(over, hooked, when):
    cache = over(hooked)
    cache["k"] = 1
    assert cache["k"] == 1
    setattr(hooked, when, lambda what, keys: down(what, keys) if what != "load" else None)
    for call in (lambda: cache.set("k", 2), lambda: cache.incr("k"), lambda: cache.delete("k"), lambda: cache.set_many({"k": 3, "other": 1})):
        with pytest.raises(errors.StoreUnavailable, match="now"):
            call()
        assert cache.peek("k") is None
        assert cache.claim_version("k") == 0
    there = hooked.rows.get(b"k")
    hooked.before = hooked.after = lambda what, keys: None
    assert cache.get("k") == (None if there is None else hooked.codec.decode(*there[0]))
    assert cache.stats()["store"]["errors"] == 4


class Unsettled(errors.StoreUnavailable):
    unsettled = True


@pytest.mark.parametrize("error", [KeyboardInterrupt, Unsettled])
def test_of_a_write_that_was_torn_off_nobody_knows_what_it_does(over, hooked, error):
    """It may still be done: till its mark's time is over nothing is cached, and nobody waits."""
    cache = over(hooked)
    cache["k"] = 1

    def torn(what, keys):
        if what == "store":
            raise error

    hooked.before = torn
    for call in (lambda: cache.set("k", 2), lambda: cache.incr("k")):
        with pytest.raises(error):
            call()
        assert cache.claim_version("k")
    hooked.before = lambda what, keys: None
    began = time.monotonic()
    assert [cache["k"], cache.peek("k")] == [1, None]
    cache["k"] = 5
    assert [cache["k"], cache.incr("k")] == [5, 6]
    assert cache.peek("k") is None
    assert time.monotonic() - began < 2.5


STRANGERS = [ClientTimeout("60 s"), KeyError("a bug"), ValueError("an answer that nobody reads"), TimeoutError("60 s"), errors.NotDurable("of another cache")]


def late_store(error):
    """(a FunctionStore whose save and delete raise this, and are done when it lands(), it)."""
    behind, late = DictStore(), []
    behind.store_many({b"k": (1, None)})

    def begins(call, *args):
        late.append(lambda: call(*args))
        raise error

    store = shmcache.FunctionStore(
        load=lambda key: behind.load_many([key])[key],
        save=lambda key, value, ttl: begins(behind.store_many, {key: (value, ttl)}), delete=lambda key: begins(behind.delete_many, [key]),
    )  # fmt: skip
    return store, lambda: [call() for call in late]


@pytest.mark.parametrize("error", STRANGERS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("change", ["set", "set_many", "incr", "replace", "touch", "delete", "pop", "get_or_set"])
def test_what_a_client_raises_says_nothing_of_what_is_still_to_come(over, change, error):
    store, lands = late_store(error)
    cache = over(store)
    assert change == "get_or_set" or cache["k"] == 1
    changes = {
        "set": lambda: cache.set("k", 2), "set_many": lambda: cache.set_many({"k": 2, "n": 3}), "incr": lambda: cache.incr("k"), "replace": lambda: cache.replace("k", 2),
        "touch": lambda: cache.touch("k", 1000), "delete": lambda: cache.delete("k"), "pop": lambda: cache.pop("k"), "get_or_set": lambda: cache.get_or_set("n", lambda: 2),
    }  # fmt: skip
    key = "n" if change == "get_or_set" else "k"
    if isinstance(error, KeyError) and change in ("delete", "pop"):
        changes[change]()  # it was not there: the function's word
        return
    with pytest.raises((errors.StoreUnavailable, errors.RowsRefused)):
        changes[change]()
    assert cache.get(key) == (None if key == "n" else 1)
    assert cache.peek(key) is None
    assert cache.claim_version(key)
    lands()
    assert cache.get(key) == {"touch": 1, "delete": None, "pop": None}.get(change, 2)


@pytest.mark.parametrize("error", [errors.StripeBusy("of another cache"), errors.DamageError("of another cache"), ZeroDivisionError()], ids=lambda e: type(e).__name__)
def test_of_a_store_only_its_own_words_are_believed(over, hooked, error):
    cache = over(hooked)
    cache["k"] = 1
    hooked.before = lambda what, keys: what == "load" or fail(error)()
    with pytest.raises(type(error)):
        cache.set("k", 2)
    assert [cache["k"], cache.peek("k")] == [1, None]
    assert cache.claim_version("k")


def test_a_function_that_refuses_is_believed(over):
    behind = DictStore()
    behind.store_many({b"k": (1, None)})
    cache = over(shmcache.FunctionStore(load=lambda key: behind.load_many([key])[key], save=fail(errors.StoreRefused("never"))))
    with pytest.raises(errors.RowsRefused, match="never"):
        cache.set("k", 2)
    assert [cache["k"], cache.peek("k")] == [1, 1]


def test_a_write_that_is_refused_leaves_a_miss_that_is_cached_again(over, hooked):
    cache = over(hooked)
    cache["k"] = 1

    def refuse(what, keys):
        if what == "store":
            raise errors.RowsRefused({b"k": ValueError("no")})

    hooked.before = refuse
    for call in (lambda: cache.set("k", 2), lambda: cache.incr("k")):
        with pytest.raises(errors.RowsRefused):
            call()
        assert cache.peek("k") is None
        assert [cache["k"], cache.peek("k")] == [1, 1]


def test_of_many_keys_stale_copies_are_given_while_the_store_is_down(over, hooked):
    cache = over(hooked, stale_ttl=100)
    hooked.store_many({b"stale": (1, 0.5), b"fresh": (2, None)})
    assert cache.get_many(["stale", "fresh", "none"]) == {"stale": 1, "fresh": 2}
    until(lambda: cache.peek("stale") is None)
    hooked.before = down
    for _ in range(2):
        assert cache.get_many(["stale", "fresh"]) == {"stale": 1, "fresh": 2}
    hooked.before = lambda what, keys: None
    hooked.store_many({b"stale": (3, None)})
    assert [cache.get_many(["stale", "none"]) for _ in range(2)][1] == {"stale": 3}


def test_of_overlapping_writers_one_is_killed_when_the_other_has_ended(over, hooked):
    """What the dead one had begun may still be done: nothing is cached on the other's word."""
    cache = over(hooked)
    started, go = fork.Event(), fork.Event()

    def first(what, keys):
        if what == "store":
            started.set()
            go.wait(60)
            os.kill(os.getpid(), signal.SIGKILL)

    def dies():
        hooked.before = first
        cache.set("k", "dead")

    pid = child(dies)
    assert started.wait(60)
    cache.set("k", "alive")
    assert cache["k"] == "alive" if not kept(cache) else cache.peek("k") is None
    assert cache.peek("k") is None
    go.set()
    assert ended(pid) == -signal.SIGKILL
    assert [cache["k"], cache.peek("k")] == ["alive", None]
    assert cache.claim_version("k")


def test_who_invalidates_while_another_writes_voids_his_fill(over, hooked):
    cache = over(hooked)
    gate = Gate(hooked, "store", "after")
    writer, _ = in_thread(cache.set, "k", "written")
    assert gate.reached.wait(60)
    hooked.rows[b"k"] = (hooked.codec.encode("past the cache"), None, 0)
    cache.invalidate("k")
    gate.opened.set()
    writer.join(60)
    assert cache.peek("k") is None
    assert cache["k"] == cache.peek("k") == "past the cache"


def test_a_copy_that_cannot_be_dropped_does_not_keep_the_others(over, hooked, monkeypatch):
    cache = over(hooked)
    cache.set_many({"a": 1, "b": 2})
    assert cache.get_many(["a", "b"]) == {"a": 1, "b": 2}
    discard = type(cache).discard

    def busy(self, key):
        if key == b"a":
            raise errors.StripeBusy("held by who does not run")
        return discard(self, key)

    monkeypatch.setattr(type(cache), "discard", busy)
    with pytest.raises(errors.StripeBusy):
        cache.invalidate("a", "b")
    assert [cache.peek("a"), cache.peek("b")] == [1, None]


def test_a_load_that_failed_is_raised_and_the_next_one_tries_again(over, hooked):
    cache = over(hooked)
    hooked.rows[b"k"] = (hooked.codec.encode("v"), None, 0)
    hooked.before = down
    for call in (lambda: cache.get("k"), lambda: cache["k"], lambda: cache.get_many(["k", "l"]), lambda: "k" in cache, lambda: cache.incr("k"), lambda: cache.ttl("k")):
        with pytest.raises(errors.StoreUnavailable):
            call()
        assert cache.claim_version("k") == 0
    hooked.before = lambda what, keys: None
    assert cache["k"] == "v"


def test_rows_that_are_refused_do_not_keep_the_others(over, hooked):
    cache = over(hooked)

    def poison(what, keys):
        if b"bad" in keys:
            if what == "load":
                raise errors.RowsRefused({b"bad": ValueError("rotten")})
            DictStore.store_many(hooked, {k: v for k, v in keys.items() if k != b"bad"})
            raise errors.RowsRefused({b"bad": ValueError("rotten")})

    hooked.before = poison
    with pytest.raises(errors.RowsRefused, match="rotten"):
        cache.set_many({"a": 1, "bad": 2, **{f"k{i}": i for i in range(600)}})
    assert cache["a"] == 1
    assert cache["k599"] == 599
    with pytest.raises(ValueError, match="rotten"):
        cache.get("bad")
    cache.invalidate("a")
    with pytest.raises(errors.RowsRefused, match="rotten"):
        cache.get_many(["a", "bad"])
    assert cache.peek("a") == 1


def test_what_the_cache_cannot_hold_is_loaded_all_the_same(over, hooked):
    cache = over(hooked)
    large = bytes(4 << 20)
    hooked.rows[b"k"] = (hooked.codec.encode(large), None, 0)
    assert cache["k"] == large
    assert cache.get_many(["k"]) == {"k": large}
    assert cache.peek("k") is None
    assert cache.ttl("k") == math.inf


class Strange:
    """A value that the codec refuses."""


class Rows(Hooked):
    """A store with rows that may be of any kind."""

    def __init__(self, rows):
        super().__init__()
        self.theirs = rows

    def load_many(self, keys, *, timeout=None):
        return {**super().load_many(keys), **{key: self.theirs[key] for key in keys if key in self.theirs}}


UNFIT = {"large": Entry(bytes(4 << 20)), "strange": Entry(Strange()), "over": Entry(b"v", 0.0), "over for long": Entry(b"v", -3), "no room": Entry(b"v")}
ASKS = {
    "get": lambda c: c.get("k"), "[]": lambda c: c["k"], "gets": lambda c: c.gets("k"), "get_many": lambda c: c.get_many(["k", "n"]),
    "in": lambda c: "k" in c, "ttl": lambda c: c.ttl("k"), "get_or_set": lambda c: c.get_or_set("k", lambda: 1 / 0), "get_lease": lambda c: c.get_lease("k").value,
    "add": lambda c: c.add("k", 1),
}  # fmt: skip


def no_room(*_, **__):
    raise errors.NoRoom("nothing can be evicted")


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("kind", UNFIT)
def test_what_cannot_be_cached_is_given_to_each_who_asks_and_loaded_once(front, any_mode, monkeypatch, kind, ask):
    entry = UNFIT[kind]
    store = Rows({b"k": entry})
    cache = front(store, any_mode)
    if kind == "no room":
        monkeypatch.setattr(type(cache), "fill_claim", no_room)
    over = kind.startswith("over")
    told = {"gets": (entry.value, 0), "get_many": {"k": entry.value}, "in": True, "ttl": 0.0 if over else math.inf, "add": over}.get(ask, entry.value)
    for _ in range(1 if ask == "add" else 2):
        store.calls.clear()
        assert ASKS[ask](cache) == told
        assert [keys for what, keys in store.calls if what == "load"] == [[b"k", b"n"] if ask == "get_many" else [b"k"]]
    assert cache.claim_version("k") == 0
    assert over or cache.peek("k") is None


CHANGES = {
    "replace": lambda c: c.replace("k", 1), "touch": lambda c: c.touch("k", 9), "persist": lambda c: c.persist("k"), "pop": lambda c: c.pop("k"),
    "incr": lambda c: c.incr("k"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_cannot_be_cached_is_made_or_refused_at_once(front, any_mode, change):
    """What is written back is changed in the cache: there it is refused."""
    store = Rows({b"k": UNFIT["large"]})
    cache = front(store, any_mode)
    refused = errors.ValueTooLarge if any_mode == "back" else errors.NotANumber if change == "incr" else None
    if refused is None:
        assert CHANGES[change](cache) == (UNFIT["large"].value if change == "pop" else True)
    else:
        with pytest.raises(refused):
            CHANGES[change](cache)
    assert [what for what, _ in store.calls].count("load") == 1
    store.theirs.clear()
    cache.set("k", "fits")
    assert cache["k"] == "fits"
    assert stored(cache, "k") == {b"k": Entry("fits")}


def test_a_lock_that_is_not_to_be_had_keeps_nobody_from_reading(make, any_mode, hooked):
    cache = make(store=hooked, policy=any_mode, lock_limit=0.05)
    hooked.rows[b"k"] = (hooked.codec.encode("v"), None, 0)
    executor, held, over = _resp.Executor(cache, {}, impatient=False), threading.Event(), threading.Event()

    def beside():
        executor.hold([b"k"])
        held.set()
        over.wait(60)
        executor.release()

    thread, _ = in_thread(beside)
    assert held.wait(60)
    try:
        asks = [lambda: cache["k"], lambda: cache.gets("k"), lambda: cache.get_many(["k"]), lambda: "k" in cache, lambda: cache.ttl("k")]
        assert [ask() for ask in asks] == ["v", ("v", 0), {"k": "v"}, True, math.inf]
        assert hooked.calls == [("load", [b"k"])] * 5
    finally:
        over.set()
        thread.join(60)
    assert [cache["k"], cache.peek("k")] == ["v", "v"]


@pytest.mark.parametrize("step", ["claim", "_carry", "_put_negative", "fill_claim"])
def test_no_room_for_a_copy_or_what_belongs_to_it_keeps_nobody_from_reading(make, mode, hooked, monkeypatch, step):
    cache = make(store=hooked, policy=shmcache.Policy(mode, negative_ttl=100, stale_ttl=100), tags=lambda key: ("all",))
    hooked.store_many({b"k": ("v", None), b"stale": ("old", 0.5)})
    assert cache["stale"] == "old"
    until(lambda: cache.peek("stale") is None)
    hooked.store_many({b"stale": ("new", None)})
    if step == "claim":
        monkeypatch.setattr(shmcache.stored, "Claims", ClaimsWithoutRoom)
    else:
        monkeypatch.setattr(type(cache), step, no_room)
    for _ in range(2):
        assert [cache.get("n"), cache["k"], cache.get_many(["k", "n"]), cache.gets("k")[0], cache.ttl("n"), "n" in cache] == [None, "v", {"k": "v"}, "v", None, False]
        assert cache["stale"] in ("old", "new")


class ClaimsWithoutRoom(_claims.Claims):
    take = no_room


def test_who_waits_for_what_cannot_be_cached_does_not_wait_for_each_other(front, any_mode):
    """Each loads it for itself, once it is known: all at the same time."""
    n = 7
    store = Rows({b"k": UNFIT["large"]})
    gate, together = Gate(store, "load"), threading.Barrier(n)
    cache = front(store, any_mode, timeout=60)
    first, got = in_thread(cache.get, "k")
    assert gate.reached.wait(60)
    asks = [lambda: cache.get("k"), lambda: cache.gets("k")[0], lambda: cache.get_many(["k"])["k"], lambda: cache.get_or_set("k", lambda: 1 / 0)]
    store.after = lambda what, keys: None if threading.current_thread() is first else together.wait(20)
    waiters = [in_thread(asks[i % len(asks)]) for i in range(n)]
    gate.opened.set()
    for thread, _ in [(first, got), *waiters]:
        thread.join(60)
    assert [answer for _, (answer,) in [(first, got), *waiters]] == [UNFIT["large"].value] * (n + 1)


def test_a_row_that_has_outgrown_the_cache_takes_the_stale_copy_with_it(over, hooked):
    cache = over(hooked, stale_ttl=1000)
    cache.set("k", "old", ttl=10)
    assert cache["k"] == "old"
    pass_time(cache, 11)
    hooked.rows[b"k"] = (hooked.codec.encode(UNFIT["large"].value), None, 0)
    assert cache["k"] == UNFIT["large"].value
    assert cache._look("k")[0] == 3


BAD_TTLS = [math.nan, True, "9", 1e13, b"", [1]]


@pytest.mark.parametrize("ttl", BAD_TTLS, ids=repr)
def test_a_row_whose_ttl_cannot_be_is_refused_alone(front, any_mode, ttl):
    cache = front(Rows({b"k": Entry("v", ttl), b"n": Entry("w")}), any_mode)
    for ask in (lambda: cache.get("k"), lambda: cache["k"], lambda: cache.gets("k"), lambda: cache.ttl("k"), lambda: cache.incr("k")):
        with pytest.raises(errors.InvalidTTL, match="ttl"):
            ask()
    with pytest.raises(errors.RowsRefused, match="b'k': a ttl"):
        cache.get_many(["k", "n"])
    assert cache.peek("n") == "w"


@pytest.mark.parametrize(("ttl", "is_told"), [(math.inf, math.inf), (None, math.inf), (np.float64("inf"), math.inf), (dt.timedelta(seconds=100), 100), (100, 100)])
def test_a_row_that_does_not_expire_is_cached_for_good(front, any_mode, ttl, is_told):
    store = Rows({b"k": Entry("v", ttl), b"n": Entry(1, ttl)})
    cache = front(store, any_mode)
    assert [cache["k"], cache.peek("k"), cache.ttl("k")] == ["v", "v", pytest.approx(is_told, abs=5)]
    assert cache.incr("n") == 2
    del store.theirs[b"n"]
    assert stored(cache, "n")[b"n"] == (2, pytest.approx(is_told, abs=5) if is_told < math.inf else None)


# ---- who meets whom -----------------------------------------------------------------------------------------------------------------


class Gate:
    """Holds a call of the store till it is opened."""

    def __init__(self, store, what, when="before"):
        self.reached, self.opened = threading.Event(), threading.Event()
        self.what = what
        setattr(store, when, self)

    def __call__(self, what, keys):
        if what == self.what and not self.reached.is_set():
            self.reached.set()
            assert self.opened.wait(60)


def test_a_change_whose_mark_is_over_when_it_comes_to_store_is_not_made(over, hooked, monkeypatch):
    """A process that was stopped behind its load, say: another has counted meanwhile."""
    monkeypatch.setattr(shmcache.stored, "GRACE", 0.1)
    cache = over(hooked, timeout=0.1)
    gate = Gate(hooked, "load", "after")
    first, got = in_thread(lambda: cache.incr("n", default=0))
    assert gate.reached.wait(60)
    until(lambda: not cache.claim_version("n"))
    with shmcache.attach(cache.name, store=hooked) as other:
        assert other.incr("n", default=0) == 1
    gate.opened.set()
    first.join(60)
    assert isinstance(got[0], errors.StoreUnavailable)
    assert "too late" in str(got[0])
    assert stored(cache, "n") == {b"n": Entry(1)}


def test_a_marks_time_counts_from_before_its_wait_for_the_stripe(over, hooked):
    """The store's call that comes behind it is to be over while the mark stands."""
    cache = over(hooked)
    executor = _resp.Executor(cache, {}, impatient=False)
    held, begun = threading.Event(), threading.Event()

    def beside():
        executor.hold([b"n"])
        held.set()
        begun.wait()
        time.sleep(0.3)
        executor.release()

    thread, _ = in_thread(beside)
    assert held.wait(60)
    before = time.monotonic()
    begun.set()
    with _claims.Marks(cache) as marks:
        marks.put(b"n", 60.0)
        waited = time.monotonic() - before
        assert marks.age > waited * 0.9
    assert waited > 0.2
    thread.join()


@pytest.mark.parametrize("other", ["set", "delete", "invalidate", "clear", "incr"])
def test_a_fill_of_what_was_loaded_before_a_change_is_refused(over, hooked, other):
    cache = over(hooked)
    hooked.rows[b"k"] = (hooked.codec.encode(1), None, 0)
    gate = Gate(hooked, "load", "after")
    reader, got = in_thread(cache.get, "k")
    assert gate.reached.wait(60)
    {"set": lambda: cache.set("k", 2), "delete": lambda: cache.delete("k"), "invalidate": lambda: cache.invalidate("k"), "clear": cache.clear,
     "incr": lambda: cache.incr("k")}[other]()  # fmt: skip
    gate.opened.set()
    reader.join(60)
    assert got == [1]  # it asked before
    expected = {"set": 2, "delete": None, "incr": 2}.get(other, 1)
    assert cache.peek("k") in (None, expected)
    if other in ("invalidate", "clear"):
        assert cache.peek("k") is None
    assert cache.get("k") == expected


def test_overlapping_writers_leave_a_miss(over, hooked):
    """The first to mark is the last to store: neither's value may stay."""
    cache = over(hooked)
    gate = Gate(hooked, "store", "before")
    first, _ = in_thread(cache.set, "k", "first")
    assert gate.reached.wait(60)
    cache.set("k", "second")
    assert cache.peek("k") is None
    gate.opened.set()
    first.join(60)
    assert cache.peek("k") is None
    assert hooked.codec.decode(*hooked.rows[b"k"][0]) == "first"
    assert cache["k"] == "first"


def test_a_miss_waits_for_who_writes(over, hooked):
    cache = over(hooked)
    gate = Gate(hooked, "store", "after")
    writer, _ = in_thread(cache.set, "k", "new")
    assert gate.reached.wait(60)
    hooked.calls.clear()
    reader, got = in_thread(cache.get, "k")
    assert got == []
    gate.opened.set()
    writer.join(60)
    reader.join(60)
    assert got == ["new"]
    assert hooked.calls == ([] if kept(cache) else [("load", [b"k"])])


def test_changes_of_one_key_come_one_after_another(over, hooked):
    cache = over(hooked)
    cache["n"] = 0
    threads = [in_thread(lambda: [cache.incr("n") for _ in range(50)]) for _ in range(4)]
    for thread, _ in threads:
        thread.join(60)
    assert all(isinstance(got[0], list) for _, got in threads)
    assert cache["n"] == 200
    assert hooked.codec.decode(*hooked.rows[b"n"][0]) == 200


def test_a_write_waits_for_a_change_and_a_change_for_a_write(over, hooked):
    cache = over(hooked)
    cache["n"] = 5
    gate = Gate(hooked, "store")
    change, got = in_thread(cache.incr, "n")
    assert gate.reached.wait(60)
    write, _ = in_thread(cache.set, "n", 100)
    assert ("store", [b"n"]) not in hooked.calls[3:]
    gate.opened.set()
    change.join(60)
    write.join(60)
    assert got == [6]
    assert cache["n"] == 100
    assert hooked.codec.decode(*hooked.rows[b"n"][0]) == 100


def test_who_waits_too_long_is_told(over, hooked):
    cache = over(hooked, timeout=0.1)
    for what, calls in (("load", [lambda: cache.get("k")]), ("store", [lambda: cache.incr("k", default=1)])):
        gate = Gate(hooked, what)
        blocked, _ = in_thread(cache.get if what == "load" else cache.set, "k", 1)
        assert gate.reached.wait(60)
        for call in calls:
            with pytest.raises(errors.StoreUnavailable, match="another caller"):
                call()
        gate.opened.set()
        blocked.join(60)
    assert cache["k"] == 1


def test_a_load_that_asks_for_its_own_key_does_not_wait_for_itself(over, hooked):
    cache = over(hooked)
    hooked.rows[b"k"] = (hooked.codec.encode(1), None, 0)
    asked = []

    def again(what, keys):
        if what == "load" and not asked:
            asked.append(1)
            asked.append(cache["k"])

    hooked.before = again
    assert cache["k"] == 1
    assert asked == [1, 1]


# ---- the dead -----------------------------------------------------------------------------------------------------------------------


def test_the_mark_of_a_dead_writer_stands_till_its_time_is_over(over, hooked, monkeypatch):
    """What he had begun may still be done in the store: till then nothing that is loaded stays."""
    monkeypatch.setattr(shmcache.stored, "GRACE", 1.0)
    cache = over(hooked, timeout=0.5)
    cache["k"] = "old"
    hooked.before = lambda what, keys: os.kill(os.getpid(), signal.SIGKILL) if what == "store" else None
    assert ended(child(lambda: cache.set("k", "new"))) == -signal.SIGKILL
    hooked.before = lambda what, keys: None
    version = cache.claim_version("k")
    assert version
    began = time.monotonic()
    assert [cache["k"], cache["k"]] == ["old", "old"]
    assert time.monotonic() - began < 1
    assert cache.peek("k") is None
    assert cache.claim_version("k") == version
    cache.clear()
    assert cache.claim_version("k") == version
    until(lambda: cache["k"] == "old" and cache.peek("k") == "old")


def test_who_writes_over_a_dead_writers_mark_leaves_a_miss(over, hooked):
    cache = over(hooked)
    hooked.before = lambda what, keys: os.kill(os.getpid(), signal.SIGKILL) if what == "store" else None
    assert ended(child(lambda: cache.set("k", "dead"))) == -signal.SIGKILL
    assert ended(child(lambda: cache.set("n", "dead"))) == -signal.SIGKILL
    hooked.before = lambda what, keys: None
    cache.set("k", "alive")
    assert cache.peek("k") is None
    assert cache.incr("n", default=4) == 5
    assert cache.peek("n") is None
    assert cache["k"] == "alive"
    assert cache["n"] == 5


def marks_and_dies(cache, seconds, then=lambda: None):
    def dies():
        cache.mark("k", seconds)
        then()
        os.kill(os.getpid(), signal.SIGKILL)

    return child(dies)


def test_a_change_waits_for_a_living_writer_over_whose_mark_one_has_died(over, hooked):
    cache = over(hooked, timeout=0.1)
    cache.mark("k", 60)
    assert ended(marks_and_dies(cache, 60)) == -signal.SIGKILL
    assert cache.mark("k", 60, True) == (0, True)
    with pytest.raises(errors.StoreUnavailable, match="another caller"):
        cache.incr("k", default=1)
    cache.end_mark("k")
    assert cache.claim("k", 1) == -4
    assert cache.incr("k", default=0) == 1


@pytest.mark.parametrize("under", [False, True])
def test_writes_do_not_make_a_dead_writers_mark_longer(over, hooked, under):
    cache = over(hooked)
    begun, go = fork.Event(), fork.Event()
    pid = marks_and_dies(cache, 1, lambda: [begun.set(), go.wait(60)])
    assert begun.wait(60)
    over_at = time.monotonic() + 1.2
    if under:  # another's mark when he dies
        cache.mark("k", 60)
    go.set()
    assert ended(pid) == -signal.SIGKILL
    if under:
        cache.end_mark("k")
    while time.monotonic() < over_at:
        cache.set("k", 1)
        assert cache["k"] == 1
    assert cache.claim_version("k") == 0
    cache.set("k", 2)
    assert [cache["k"], cache.peek("k")] == [2, 2]


def test_a_mark_stands_for_the_longest_of_its_writers_times(over, hooked):
    cache = over(hooked)
    assert ended(marks_and_dies(cache, 60)) == -signal.SIGKILL
    cache.mark("k", 0.01)
    time.sleep(0.03)
    assert cache.claim("k", 1) == -4
    cache.end_mark("k")
    assert cache.claim("k", 1) == -4


def test_who_ends_when_his_time_is_over_takes_no_others_mark_away(over, hooked):
    cache = over(hooked)
    cache.mark("k", 0.01)
    time.sleep(0.03)
    assert ended(marks_and_dies(cache, 60)) == -signal.SIGKILL
    cache.end_mark("k")
    assert cache.claim("k", 1) == -4


def test_of_many_writers_of_one_key_seven_write_at_once(over, hooked):
    cache = over(hooked)
    assert all(cache.mark("k", 60)[0] for _ in range(7))
    assert cache.mark("k", 60) == (0, True)
    cache.end_mark("k")
    assert cache.mark("k", 60)[0]
    for _ in range(7):
        assert cache.claim("k", 1) == -3
        cache.end_mark("k")
    assert cache.claim("k", 1) > 0


def test_what_is_to_be_computed_does_not_wait_for_the_dead(over, hooked):
    cache = over(hooked)
    assert ended(marks_and_dies(cache, 60)) == -signal.SIGKILL
    assert cache.get_or_set("k", lambda: 5) == 5
    assert cache["k"] == 5


BETWEEN = {
    "set and delete": lambda c: (c.set("k", "newer"), c.delete("k")),
    "set, delete, stored": lambda c: (c.set("k", "newer"), c.delete("k"), c.flush()),
    "delete": lambda c: c.delete("k"),
    "set and pop": lambda c: (c.set("k", "newer"), c.pop("k")),
    "invalidate": lambda c: c.invalidate("k"),
    "clear": lambda c: c.clear(),
}


def computed_beside(cache, change):
    """What get_or_set() gives if change(cache), by another thread, has returned while it computes."""

    def factory():
        thread, result = in_thread(change, cache)
        thread.join(60)
        assert not thread.is_alive()
        assert not isinstance(result[0], Exception)
        return "computed"

    return cache.get_or_set("k", factory)


def nothing_there(cache):
    return (cache.get("k"), stored(cache, "k")) == (None, {})


@pytest.mark.parametrize("between", BETWEEN)
def test_what_was_computed_before_a_change_that_has_returned_is_not_stored(front, any_mode, hooked, between):
    cache = front(hooked, any_mode)
    assert computed_beside(cache, BETWEEN[between]) == "computed"
    assert nothing_there(cache)
    assert cache.get_or_set("k", lambda: "next") == "next"
    assert (cache.get("k"), stored(cache, "k")) == ("next", {b"k": Entry("next")})


def test_what_was_computed_over_a_tombstone_is_stored_in_the_place_of_just_that(make, hooked):
    cache = make(policy="back", store=hooked)  # nobody stores
    for change in (lambda c: None, BETWEEN["set and delete"]):
        cache["k"] = "older"
        assert cache.delete("k")
        assert computed_beside(cache, change) == "computed"
    assert cache.get("k") is None
    assert cache.claim("k", 1) == -5
    assert cache.get_or_set("k", lambda: "next") == "next"
    assert cache["k"] == "next"


@pytest.mark.parametrize("between", BETWEEN)
def test_what_was_computed_beside_a_dead_writer_is_stored_if_nobody_has_written_since(over, hooked, between):
    cache = over(hooked)
    assert ended(marks_and_dies(cache, 60)) == -signal.SIGKILL
    assert computed_beside(cache, BETWEEN[between]) == "computed"
    assert nothing_there(cache)


def test_a_handle_without_a_store_fills_no_mark_of_its_own_process(over, hooked):
    cache = over(hooked)
    hooked.before = lambda what, keys: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cache.set("k", 1)  # nobody knows how it ended: the mark stands
    hooked.before = lambda what, keys: None
    with shmcache.attach(cache.name) as bare:
        assert bare.claim("k", 1) == -4
        assert bare.get_or_set("k", lambda: "computed") == "computed"
    assert nothing_there(cache)


def test_a_row_that_another_host_has_stored_meanwhile_stays_and_is_cached(front, any_mode, hooked):
    cache = front(hooked, any_mode)
    assert computed_beside(cache, lambda c: DictStore.store_many(hooked, {b"k": ("row", None)}, versions={b"k": 1})) == "computed"
    hooked.calls.clear()
    assert cache["k"] == "row"
    assert hooked.calls == []
    assert stored(cache, "k")[b"k"].value == "row"


def test_a_factory_may_add_its_own_key(front, any_mode, hooked):
    cache = front(hooked, any_mode)
    assert cache.get_or_set("k", lambda: cache.add("k", "added") and "computed") == "computed"
    assert (cache["k"], stored(cache, "k")) == ("added", {b"k": Entry("added")})
    cache.delete("k")
    cache.flush()

    def overtaken(what, keys):  # behind its load, all of a life passes by
        if what == "load" and threading.current_thread() is threading.main_thread() and not done:
            done.append(in_thread(lambda: (cache.set("k", "newer"), cache.flush(), cache.invalidate("k")))[0])
            done[0].join(60 if any_mode == "back" else 0)

    done = []
    assert cache.get_or_set("k", lambda: setattr(hooked, "after", overtaken) or (cache.add("k", "added"), "computed")[1]) == "computed"
    done[0].join(60)
    assert stored(cache, "k") == {b"k": Entry("newer")}


def test_who_waits_for_what_is_computed_gets_it_and_a_write_in_between_is_not_waited_for(over, hooked):
    cache = over(hooked, timeout=60)
    gate = Gate(hooked, "delete")

    def factory():
        deletes.append(in_thread(cache.delete, "k")[0])
        assert gate.reached.wait(60)
        return "computed"

    deletes = []
    began = time.monotonic()
    assert cache.get_or_set("k", factory) == "computed"
    assert time.monotonic() - began < 50  # the delete has not ended
    assert deletes[0].is_alive()
    gate.opened.set()
    deletes[0].join(60)
    assert nothing_there(cache)


def test_marks_are_not_evicted(over, hooked):
    cache = over(hooked)
    gate = Gate(hooked, "store")
    writer, _ = in_thread(cache.set, "k", "v")
    assert gate.reached.wait(60)
    version = cache.claim_version("k")
    with shmcache.attach(cache.name) as bare:
        for i in range(30_000):
            bare.set(f"\0{i}", bytes(1000 if i % 2 else 10))
    assert cache.stats()["evictions"] > 1000
    assert cache.claim_version("k") == version
    gate.opened.set()
    writer.join(60)
    assert cache.peek("k") == ("v" if kept(cache) else None)


# ---- at once ------------------------------------------------------------------------------------------------------------------------


def misses(name, n, calls, started, hold, results, slot):
    class Counting(Fixed):
        def load_many(self, keys, *, timeout=None):
            with calls.get_lock():
                calls.value += 1
            started.set()
            while not hold.value:
                time.sleep(0.002)
            return super().load_many(keys)

    cache = shmcache.attach(name, store=Counting())

    def one(i):
        results[slot * n + i] = cache.get("answer")

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


@pytest.mark.parametrize("kill", [False, True], ids=["all live", "the loading process is killed"])
def test_a_thousand_misses_load_once(make, mode, kill):
    cache = make(policy=shmcache.Policy(mode, timeout=60), store=Fixed())
    n = 125
    calls, started, hold = fork.Value("i", 0), fork.Event(), fork.Value("b", 0, lock=False)
    results = fork.Array("q", 8 * n, lock=False)
    procs = [fork.Process(target=misses, args=(cache.name, n, calls, started, hold, results, i)) for i in range(8)]
    for p in procs:
        p.start()
    victim = None
    try:
        assert started.wait(60)
        if kill:
            owner = claimer(cache, "answer")
            victim = next(i for i, p in enumerate(procs) if p.pid == owner)
            started.clear()
            os.kill(owner, signal.SIGKILL)
            procs[victim].join(60)
            assert started.wait(10), "nobody took over"
        hold.value = 1
        for p in procs:
            p.join(60)
            assert not p.is_alive()
        assert calls.value == (2 if kill else 1)
        assert all(results[i] == 42 for i in range(8 * n) if i // n != victim)
    finally:
        for p in procs:
            p.kill()
            p.join()


@pytest.mark.parametrize("database", DATABASES)
def test_no_reader_sees_an_older_value_than_an_acknowledged_one(mode, database):
    """In short; python -m tests.stress.stale is the long one."""
    done = stale("--policy", mode, "--store", database, "--fills", "4000")
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_leases_a_reader_does(mode):
    done = stale("--policy", mode, "--fills", "4000", "--no-leases")
    assert done.returncode == 1
    assert '"failed": [], "verify": []' in done.stdout, done.stdout + done.stderr
    assert '"stale": 0' not in done.stdout


def stale(*options):
    return subprocess.run([sys.executable, "-m", "tests.stress.stale", *options], capture_output=True, text=True, timeout=600)


def test_it_is_closed_as_any_cache(backed):
    with contextlib.closing(shmcache.attach(backed.name, store=backed.store)) as cache:
        cache["k"] = 1
    for call in (lambda: cache.get("k"), lambda: cache.set("k", 1), lambda: cache.incr("k"), lambda: cache.get_many(["k"]), lambda: cache.stats()):
        with pytest.raises(errors.CacheClosed):
            call()


# ---- written back -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def back(make):
    """back(store, size, **options) -> a cache that is written back, by nobody yet."""
    return lambda store, size="8M", **options: make(size, store=store, policy=shmcache.Policy("back", **{"flush_every": 0.01, **options}))


@contextlib.contextmanager
def flushing(cache, store, attach=shmcache.attach):
    with attach(cache.name) as other:
        thread = writeback.WriteBack(other, store)
        try:
            yield thread
        finally:
            thread.stop()


def test_what_is_dirty_is_not_evicted_expired_or_cleared(back, hooked):
    """Nobody stores, and the segment is filled many times over."""
    cache = back(hooked)
    cache.set("dirty", "d" * 200)
    cache.set("short", "s", ttl=0.001)
    cache.set("big", b"b" * 100_000)
    hooked.rows[b"gone"] = (hooked.codec.encode("old"), None, 0)
    assert cache.delete("gone")
    with shmcache.attach(cache.name) as bare:
        bare.clear()
        for i in range(60_000):
            bare.set(f"\0{i}", bytes((10, 200, 1000, 3000)[i % 4]))
    assert cache.stats()["evictions"] > 10_000
    assert [cache["dirty"], cache["short"], cache["big"], cache.get("gone")] == ["d" * 200, "s", b"b" * 100_000, None]
    assert hooked.calls == [("load", [b"gone"])]
    cache.invalidate("dirty", "gone")
    assert [cache["dirty"], cache.get("gone")] == ["d" * 200, None]
    with flushing(cache, hooked):
        cache.flush()
        assert hooked.values() == {b"dirty": "d" * 200, b"big": b"b" * 100_000}
        assert cache.segment.header["dirty"] == 0
        assert cache.get("short") is None
        cache.invalidate("dirty")
        assert cache.peek("dirty") is None
        assert cache["dirty"] == "d" * 200


def test_the_last_value_of_a_key_is_stored_once(back, hooked):
    cache = back(hooked)
    for i in range(1000):
        cache.set("k", i)
        cache.incr("n", default=0)
    with flushing(cache, hooked):
        cache.flush()
    assert [call for call in hooked.calls if call[0] != "load"] == [("store", [b"k", b"n"])]
    assert stored(cache, "k", "n") == {b"k": Entry(999), b"n": Entry(1000)}


def test_a_write_while_its_value_is_being_stored_is_stored_too(back, hooked):
    cache = back(hooked)
    gate = Gate(hooked, "store", "after")
    cache.set("k", 1)
    cache.set("n", 1)
    with flushing(cache, hooked):
        assert gate.reached.wait(60)
        cache.set("k", 2)
        cache.incr("n")
        gate.opened.set()
        cache.flush()
    assert stored(cache, "k", "n") == {b"k": Entry(2), b"n": Entry(2)}


def test_what_a_flush_goes_through_misses_no_key_that_is_written_meanwhile(back, hooked):
    """Into chunks behind and ahead: what was dirty at the beginning is met, in whatever chunk it is by then."""
    cache = back(hooked, size="16M")
    keys = [f"k{i}" for i in range(200)]
    for key in keys:
        cache.set(key, "v" * (len(key) * 30))
    dirty = _dirty.Dirty(cache)
    for _ in range(10):
        seen, at, going = set(), 0, True
        while going:
            items, at = dirty.walk(at, 1)
            seen |= {item[0].decode() for item in items}
            going = at != 0
            for key in random.sample(keys, 5):
                cache.set(key, "v" * random.choice((10, 60, 120, 180)))
        assert seen >= set(keys)


def test_a_delete_while_the_value_is_being_stored(back, hooked):
    cache = back(hooked)
    gate = Gate(hooked, "store")
    cache.set("k", 1)
    with flushing(cache, hooked):
        assert gate.reached.wait(60)
        assert cache.delete("k")
        assert cache.get("k") is None
        gate.opened.set()
        cache.flush()
        assert cache.get("k") is None
    assert stored(cache, "k") == {}


def test_over_the_limit_writers_wait_for_the_store(back, hooked):
    cache = back(hooked, dirty_limit=20_000)
    hooked.before = lambda what, keys: down(what, keys) if what == "store" else None
    with flushing(cache, hooked):

        def fill():
            for i in range(400):
                cache.set(f"k{i}", b"v" * 100)

        writer, _ = in_thread(fill)
        until(lambda: cache.segment.header["dirty"] >= 20_000)
        assert writer.is_alive()
        assert cache.segment.header["dirty"] < 21_000
        hooked.before = lambda what, keys: None
        writer.join(60)
        assert not writer.is_alive()
        cache.flush()
    assert len(hooked.rows) == 400


def test_a_store_that_was_down_gets_everything(back, hooked, capsys):
    cache = back(hooked)
    hooked.before = lambda what, keys: down(what, keys) if what == "store" else None
    cache.set("k", 1)
    with flushing(cache, hooked):
        with pytest.raises(errors.StoreUnavailable, match="not stored"):
            cache.flush(0.3)
        figures = cache.stats()["store"]
        assert figures["dirty_items"] == 1
        assert figures["failing_s"] is not None
        assert figures["oldest_s"] is not None
        hooked.before = lambda what, keys: None
        cache.flush()
    figures = cache.stats()["store"]
    assert (figures["dirty_items"], figures["dirty_bytes"], figures["failing_s"], figures["oldest_s"]) == (0, 0, None, None)
    assert stored(cache, "k") == {b"k": Entry(1)}
    assert capsys.readouterr().err.count("the store fails") == 1


def test_a_row_that_is_refused_is_kept_and_said_and_the_others_are_stored(back, hooked, capsys):
    cache = back(hooked)

    def poison(what, keys):
        if what == "store" and keys.get(b"bad", (None,))[0] == "rotten":
            DictStore.store_many(hooked, {k: v for k, v in keys.items() if k != b"bad"})
            raise errors.RowsRefused({b"bad": ValueError("it is rotten")})

    hooked.before = poison
    cache.set_many({"a": 1, "bad": "rotten", "c": 3})
    with flushing(cache, hooked):
        with pytest.raises(errors.StoreUnavailable, match="refuse"):
            cache.flush(0.3)
        assert cache["bad"] == "rotten"
        assert cache.stats()["store"]["refused"] == 1
        assert hooked.load_many([b"a", b"bad", b"c"]) == {b"a": Entry(1), b"c": Entry(3)}
        cache["bad"] = "fresh"
        cache.flush()
    assert stored(cache, "bad") == {b"bad": Entry("fresh")}
    assert capsys.readouterr().err.count("rotten") == 1


def test_what_is_left_at_the_end_is_said(back, hooked, capsys, monkeypatch):
    monkeypatch.setattr(writeback, "AT_END", 0.2)
    cache = back(hooked)
    hooked.before = lambda what, keys: down(what, keys) if what == "store" else None
    cache.set("k", 1)
    with flushing(cache, hooked):
        pass
    assert "1 items are not stored" in capsys.readouterr().err
    assert cache["k"] == 1


def test_clear_stores_first_or_clears_nothing(back, hooked):
    cache = back(hooked)
    cache["k"] = 1
    with flushing(cache, hooked):
        cache.clear()
        assert cache.peek("k") is None
        assert cache["k"] == 1


def test_writers_need_no_store(back, hooked):
    cache = back(hooked)
    hooked.rows[b"old"] = (hooked.codec.encode(1), None, 0)
    with shmcache.attach(cache.name) as bare, flushing(cache, hooked):
        bare["k"] = {"from": "a worker"}
        bare.delete("old")
        for call in (lambda: bare.add("n", 1), lambda: bare.incr("n", default=1), lambda: bare.cas("n", 1, 0)):
            with pytest.raises(shmcache.StoreNeeded):  # it cannot ask whether the store has it
                call()
        bare.flush()
    assert stored(cache, "k", "old") == {b"k": Entry({"from": "a worker"})}


@pytest.mark.parametrize("log", [False, True], ids=["snapshot", "log"])
def test_what_is_dirty_survives_the_segment(name, tmp_path, hooked, log):
    """A reboot: the segment goes, a snapshot or the log has what the store had not got, tombstones too."""
    from shmcache.supervisor import datadir, snapshot
    from shmcache.supervisor.loop import Supervisor

    hooked.rows[b"old"] = (hooked.codec.encode("old"), None, 0)
    options = {"log_buffer": "64K"} if log else {}
    with datadir.take(tmp_path / "data") as folder:
        with shmcache.create(name, "16M", policy="back", store=hooked, **options) as cache, shmcache.attach(name) as other:
            supervisor = Supervisor(other, folder=folder, log="always" if log else None)
            thread = threading.Thread(target=supervisor.run)
            thread.start()
            cache.set("k", "dirty")
            cache.set("ttl", "dirty", ttl=1000)
            assert cache.delete("old")
            first = int(cache.segment.header["version_base"])
            supervisor.stop()
            thread.join(60)
            del supervisor
        shmcache.unlink(name)
        snapshot.restore(name, folder)
        with shmcache.attach(name, store=hooked) as cache:
            assert int(cache.segment.header["version_base"]) == first
            assert [cache["k"], cache.get("old")] == ["dirty", None]
            # the store has got newer values since, which what is restored may not undo
            hooked.rows[b"k"] = (hooked.codec.encode("newer"), None, first + int(cache.segment.header["restored_seq"]))
            with flushing(cache, hooked):
                cache.flush()
            assert hooked.values() == {b"k": "newer", b"ttl": "dirty"}
            cache.set("k", "newest")
            with flushing(cache, hooked):
                cache.flush()
            assert stored(cache, "k") == {b"k": Entry("newest")}
            assert cache.verify() == []


def test_nothing_is_lost_when_the_machine_reboots_again_and_again():
    """In short; python -m tests.stress.reboot is the long one."""
    done = subprocess.run([sys.executable, "-m", "tests.stress.reboot", "--rounds", "8"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def lives(events, seed, n):
    done = subprocess.run(
        [sys.executable, "-m", "tests.stress.lives", "--log", "always", "--events", events, "--seed", str(seed), "--lives", str(n), "--megabytes", "60"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["lives"] == n and told["acked"] and told["rows"]
    return told


def test_nothing_is_lost_over_lives_that_end_before_their_snapshots_are_whole():
    """In short; python -m tests.stress.lives is the long one."""
    assert lives("damaged,removed,lost", 3, 8)["lives_ended_in_snapshot"]


@pytest.mark.parametrize("seed", [1, 3])  # of those that have found a mixture of two directories, files that were let go, a gap that was not named
def test_nothing_is_lost_over_lives_of_several_directories(seed):
    assert lives("copy,worker,backup,other,two,switch,start-empty", seed, 6)["events"]


@pytest.mark.parametrize("database", DATABASES)
def test_nothing_is_lost_or_out_of_order_while_supervisors_are_killed(database):
    """In short; python -m tests.stress.writeback is the long one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.stress.writeback", "--store", database, "--updates", "200000", "--keys", "2000", "--pace", "60000"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
