"""What users name: a bad key, name or tag is refused by every entry in the same words, and nothing is changed."""

from __future__ import annotations

import asyncio
import enum
import inspect
import re

import numpy as np
import pytest

import shmcache
from shmcache import aio, errors
from shmcache.back import BackCache
from shmcache.cache import Cache
from shmcache.namespace import Namespace
from shmcache.through import ThroughCache
from tests.integration.test_store import DictStore, function_store

BAD_KEYS = {
    "a lone surrogate": "\ud800", "an empty str": "", "empty bytes": b"", "an int": 5, "None": None, "a tuple": ("k",), "a bytearray": bytearray(b"k"),
    "too long": b"x" * 4097, "too long as UTF-8": "é" * 2049,
}  # fmt: skip
BAD_TAGS = ["tag", b"tag", 5, (b"t",), (5,), ("",), ("\ud800",), ("x" * 201,)]


def only(x):
    return "a value"


# Every public name of the handles stands in one of these: what takes a key ...
KEYED = {
    "get": lambda c, k: c.get(k), "gets": lambda c, k: c.gets(k), "peek": lambda c, k: c.peek(k), "set": lambda c, k: c.set(k, 1),
    "add": lambda c, k: c.add(k, 1), "replace": lambda c, k: c.replace(k, 1), "cas": lambda c, k: c.cas(k, 1, 1), "delete": lambda c, k: c.delete(k),
    "pop": lambda c, k: c.pop(k), "incr": lambda c, k: c.incr(k, default=1), "decr": lambda c, k: c.decr(k, default=1),
    "touch": lambda c, k: c.touch(k, 5), "expire": lambda c, k: c.expire(k, 5), "persist": lambda c, k: c.persist(k), "ttl": lambda c, k: c.ttl(k),
    "get_or_set": lambda c, k: c.get_or_set(k, int), "get_lease": lambda c, k: c.get_lease(k), "invalidate": lambda c, k: c.invalidate("k", k),
    "discard": lambda c, k: c.discard(k), "claim": lambda c, k: c.claim(k, 1.0), "unclaim": lambda c, k: c.unclaim(k, 1),
    "claim_version": lambda c, k: c.claim_version(k), "fill_claim": lambda c, k: c.fill_claim(k, 1, 1), "mark": lambda c, k: c.mark(k, 1.0),
    "end_mark": lambda c, k: c.end_mark(k), "contains": lambda c, k: c.contains(k), "__getitem__": lambda c, k: c[k],
    "__setitem__": lambda c, k: c.__setitem__(k, 1), "__delitem__": lambda c, k: c.__delitem__(k), "__contains__": lambda c, k: k in c,
}  # fmt: skip
# ... several keys ...
SEVERAL = {"get_many": lambda c, ks: c.get_many(ks), "delete_many": lambda c, ks: c.delete_many(ks)}
PAIRS = {"set_many": lambda c, pairs: c.set_many(pairs)}
# ... what becomes part of one: the call, and the bytes that it may have ...
NAMED = {
    "lock": (lambda c, name: c.lock(name), 4090), "namespace": (lambda c, name: c.namespace(name), 200),
    "memoize": (lambda c, name: c.memoize(name=name)(only), 4069),
}  # fmt: skip
# ... what keys begin with (it may be empty) ...
PREFIXED = {"scan": lambda c, prefix: c.scan(prefix)}
# ... tags ...
TAGGED = {
    "set": lambda c, tags: c.set("k", 1, tags=tags), "add": lambda c, tags: c.add("new", 1, tags=tags), "replace": lambda c, tags: c.replace("k", 1, tags=tags),
    "cas": lambda c, tags: c.cas("k", 1, 7, tags=tags), "set_many": lambda c, tags: c.set_many({"k": 1}, tags=tags),
    "get_or_set": lambda c, tags: c.get_or_set("new", int, tags=tags), "get_lease": lambda c, tags: c.get_lease("new", tags=tags),
    "memoize": lambda c, tags: c.memoize(tags=tags)(only)(1),
    "invalidate_tag": lambda c, tags: c.invalidate_tag("fine", *tags) if isinstance(tags, tuple) else c.invalidate_tag("fine", 5),
}  # fmt: skip
# ... a lease ...
LEASED = {"fill": lambda c, lease: c.fill(lease, 1), "release": lambda c, lease: c.release(lease)}
# ... and what takes none of these.
KEYLESS = {
    "cache", "name", "prefix",  # of a namespace
    "sync",  # of an awaited cache
    "policy", "store",  # of one in front of a store
    "clear", "close", "closed", "count_store", "counters", "durability", "encoded", "flush", "keys_between", "lock_limit", "mapping", "processes",
    "row", "segment", "slab_classes", "stats", "store_counters", "supervisor", "unlinked", "verify", "views",
}  # fmt: skip
DUNDERS = {"__getitem__", "__setitem__", "__delitem__", "__contains__"}
TABLES = (KEYED, SEVERAL, PAIRS, NAMED, PREFIXED, TAGGED, LEASED)
HANDLES = {"plain": Cache, "through": ThroughCache, "around": ThroughCache, "back": BackCache, "namespace": Namespace, "awaited": aio.Cache}


def entries(table):
    return [(handle, entry) for handle, kind in HANDLES.items() for entry in table if hasattr(kind, entry)]


@pytest.fixture
def handle(request, make):
    kind = request.param
    cache = make(policy=kind, store=DictStore()) if kind in ("through", "around", "back") else make()
    if kind == "namespace":
        return cache.namespace("users")
    return aio.Cache(cache) if kind == "awaited" else cache


def called(result):
    """A call's result, whatever has to be done to get it."""

    async def awaited():
        if hasattr(result, "__aenter__"):
            async with result:
                return None
        return await result

    return asyncio.run(awaited()) if inspect.isawaitable(result) or hasattr(result, "__aenter__") else result


def of(handle):
    """The cache behind a handle."""
    return getattr(handle, "sync", None) or getattr(handle, "cache", None) or handle


def state(handle):
    cache = of(handle)
    cached = {key: cache.peek(key) for key in cache.scan()}
    return cached, dict(cache.store.rows) if hasattr(cache, "store") else None


def refused(handle, call, what, error=errors.InvalidKey, says=r"use |convert |shorten |longer "):
    called(handle.set("k", "old"))
    before = state(handle)
    try:
        called(call(handle, what))
    except error as e:
        assert isinstance(e, shmcache.UsageError), repr(what)
        assert re.search(says, str(e)), repr(what)
    else:
        pytest.fail(f"{what!r} was taken")
    assert state(handle) == before, repr(what)


def each(*tables):
    cases = [case for table in tables for case in entries(table)]
    return pytest.mark.parametrize(("handle", "entry"), cases, indirect=["handle"], ids=[" ".join(case) for case in cases])


@pytest.mark.parametrize("kind", HANDLES)
def test_every_public_name_is_in_a_table(kind):
    names = {name for name in dir(HANDLES[kind]) if not name.startswith("_")} | DUNDERS & set(dir(HANDLES[kind]))
    assert names - {name for table in TABLES for name in table} - KEYLESS == set()


def test_no_table_has_what_is_gone():
    names = {name for kind in HANDLES.values() for name in dir(kind)} | {"cache", "name", "sync", "policy", "store"}
    assert {name for table in TABLES for name in table} | KEYLESS <= names


@each(KEYED)
def test_a_bad_key(handle, entry):
    for bad in BAD_KEYS.values():
        refused(handle, KEYED[entry], bad)


@each(SEVERAL)
def test_a_bad_key_among_several(handle, entry):
    for bad in BAD_KEYS.values():
        refused(handle, SEVERAL[entry], ["k", bad])


@each(PAIRS)
def test_a_bad_key_of_a_pair(handle, entry):
    for bad in BAD_KEYS.values():
        refused(handle, PAIRS[entry], [("k", "new"), (bad, 1)])


@each(SEVERAL, PAIRS)
def test_what_is_no_list(handle, entry):
    for bad in ("ab", b"ab"):
        refused(handle, (SEVERAL | PAIRS)[entry], bad, errors.InvalidKeyType, re.escape(f"write [{bad!r}]"))
    for bad in (5, None):
        refused(handle, (SEVERAL | PAIRS)[entry], bad, errors.InvalidKeyType, "as a list")


@each(PAIRS)
def test_what_are_no_pairs(handle, entry):
    for bad in (["ab"], [("k",)], [("k", 1, 2)], [5], [("k", "new"), "ab"]):
        refused(handle, PAIRS[entry], bad, errors.InvalidKeyType, "as a mapping")


@each(NAMED)
def test_a_bad_name(handle, entry):
    for bad in BAD_KEYS.values():
        if (entry, bad) != ("memoize", None):
            refused(handle, NAMED[entry][0], bad)


@each(PREFIXED)
def test_a_bad_prefix(handle, entry):
    for kind in ("a lone surrogate", "an int", "None", "a tuple", "a bytearray"):
        refused(handle, PREFIXED[entry], BAD_KEYS[kind])


@each(TAGGED)
def test_a_bad_tag(handle, entry):
    for bad in BAD_TAGS:
        refused(handle, TAGGED[entry], bad, shmcache.UsageError if hasattr(of(handle), "store") else errors.InvalidTag, "tag")


@each(LEASED)
def test_what_is_no_lease(handle, entry):
    for bad in ("k", 5, None):
        refused(handle, LEASED[entry], bad, shmcache.UsageError, "get_lease")


@each(NAMED)
def test_a_name_may_have_as_many_bytes_as_its_error_says(handle, entry):
    call, most = NAMED[entry]
    made = called(call(handle, "x" * most))
    if entry == "lock" and made is not None:
        assert made.acquire(blocking=False)
        made.release()
    if entry == "namespace":
        made["k"] = 1
        assert made["k"] == 1
    refused(handle, call, "x" * (most + 1), says=f"{most:,} bytes, this one {most + 1:,}")


@pytest.mark.parametrize("handle", ["namespace"], indirect=True)
def test_a_key_that_has_no_room_in_its_namespace(handle):
    most = 4096 - len(handle.prefix())
    says = f"namespace has 1 to {most:,} bytes, this one {most + 1:,}"
    for entry in KEYED.keys() & set(dir(handle)):
        refused(handle, KEYED[entry], "x" * (most + 1), says=says)
    for entry in SEVERAL:
        refused(handle, SEVERAL[entry], ["k", "x" * (most + 1)], says=says)
    refused(handle, PAIRS["set_many"], {"k": "new", "x" * (most + 1): 1}, says=says)
    handle["x" * most] = 1
    assert handle.get_many(["x" * most]) == {"x" * most: 1}


def test_no_namespace_has_a_nul_byte_in_its_name(cache):
    refused(cache, lambda c, name: c.namespace(name), "users\0x", errors.InvalidNamespace, "NUL")


def test_str_and_bytes_are_the_same_name(cache):
    cache.namespace("users")["k"] = 1
    assert cache.namespace(b"users")["k"] == 1
    with cache.lock("name"), pytest.raises(errors.UsageError, match="this thread"):
        cache.lock(b"name").acquire(blocking=False)


def test_several_keys_of_a_namespace_come_back_as_they_were_passed(cache):
    users = cache.namespace("users")
    users.set_many([("a", 1), (b"b", 2)])
    assert users.get_many(k for k in ("a", b"a", "b", "c")) == {"a": 1, b"a": 1, "b": 2}
    assert users.delete_many(("a", b"a", "b")) == 2
    assert list(users.scan(b"")) == []


class Safe(str):
    """As a template engine's: a str that is one for all who look."""

    __slots__ = ()


class Choice(enum.StrEnum):
    A = "a"


class Settings:
    """A mapping to whoever asks for items alone."""

    def items(self):
        return ([k, i] for i, k in enumerate("abc"))


@pytest.mark.parametrize("handle", ["plain", "through", "around", "back", "namespace"], indirect=True)
def test_what_looks_like_keys_is_taken(handle):
    handle.set_many(Settings())
    handle.set_many((k, k) for k in ("d", b"e"))
    handle.set_many([["f", 1]])
    names = [Safe("a"), Choice.A, np.str_("b"), bytes(np.bytes_(b"c"))]
    assert handle.get_many(iter(names)) == {"a": 0, "b": 1, b"c": 2}
    for several in ({"d": 1}, {"d"}, {"d": 1}.keys(), ("d",), dict.fromkeys("d"), (k for k in "d")):
        assert handle.get_many(several) == {"d": "d"}
    assert handle.get_many([]) == handle.get_many({}) == {}
    assert handle.delete_many(k for k in ("a", "a", b"e", "none")) == 2
    handle.set_many({})
    handle.set_many([])
    assert handle.delete_many([]) == 0
    for key in ("é", "e\u0301", "a b", "a\r\nb", "a\0", " ", "%", "a" * 250):
        handle.set(key, key)
        assert handle.get_many([key, key.encode()]) == {key: key, key.encode(): key}


@pytest.mark.parametrize("handle", ["plain", "through", "back", "namespace"], indirect=True)
def test_an_iterable_that_fails_changes_nothing(handle):
    def failing(*given):
        yield from given
        raise ZeroDivisionError

    handle.set("k", "old")
    before = state(handle)
    for call in (handle.get_many, handle.delete_many):
        with pytest.raises(ZeroDivisionError):
            call(failing("k"))
    with pytest.raises(ZeroDivisionError):
        handle.set_many(failing(("k", "new")))
    assert state(handle) == before


@pytest.mark.parametrize("kind", ["sqlite", "function"])
def test_a_store_that_is_called_past_the_cache(kind, tmp_path):
    store = shmcache.SQLStore(f"sqlite:///{tmp_path}/app.db") if kind == "sqlite" else function_store()
    try:
        store.store_many({"k": ("v", None)})
        for bad in BAD_KEYS.values():
            calls = [lambda bad=bad: store.load_many(["k", bad]), lambda bad=bad: store.delete_many(["k", bad])]
            if not isinstance(bad, bytearray):
                calls.append(lambda bad=bad: store.store_many({"k": ("new", None), bad: ("v", None)}))
            for call in calls:
                with pytest.raises(errors.InvalidKey):
                    call()
        for bad in ("ab", b"ab", 5, None):
            for call in (store.load_many, store.delete_many, store.store_many):
                with pytest.raises(errors.InvalidKeyType):
                    call(bad)
        assert {key: entry.value for key, entry in store.load_many(["k", b"none"]).items()} == {b"k": "v"}
        store.delete_many(["k"])
        assert store.load_many([b"k"]) == {}
    finally:
        store.close()


@pytest.mark.parametrize("mode", ["through", "around"])
@pytest.mark.parametrize("tags", ["user", b"user", 5, None, ("",), ("\ud800",), (5,)])
def test_a_function_that_makes_no_tags(make, mode, tags):
    store = DictStore()
    store.store_many({b"k": ("v", None)})
    before = dict(store.rows)
    cache = make(policy=mode, store=store, tags=lambda key: tags)
    calls = [lambda: cache["k"], lambda: cache.get_many(["k"]), lambda: cache.incr("n", default=1), lambda: cache.add("n", 1), lambda: cache.pop("k")]
    if mode == "through":
        calls += [lambda: cache.set("k", "new"), lambda: cache.set_many({"k": "new"})]
    for call in calls:
        with pytest.raises(errors.InvalidTag):
            call()
    assert store.rows == before
    assert len(cache) == 0
