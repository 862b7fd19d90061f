"""A test of a user's has stopped the clocks that Python knows: what waits for a time still ends."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading

import freezegun
import pytest

import shmcache
from shmcache import errors
from tests.integration.test_store import DictStore


@pytest.fixture
def frozen():
    with freezegun.freeze_time("2030-01-01"):
        yield


@contextlib.contextmanager
def beside(function):
    """Something that another thread holds on to for the length of a block."""
    there, over = threading.Event(), threading.Event()

    def hold():
        with function():
            there.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    there.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_lock(cache, frozen):
    with beside(lambda: cache.lock("l")):
        assert not cache.lock("l").acquire(timeout=0.05)


def test_a_sleep_that_does_not_sleep(cache, monkeypatch):
    """A test's own time.sleep is not called, and not taken for one in which other callers of this thread run."""
    asked = []
    monkeypatch.setattr("time.sleep", lambda seconds: asked.append(seconds))  # not a builtin, as the one in its place
    with beside(lambda: cache.lock("l")):
        assert not cache.lock("l").acquire(timeout=0.05)

    async def claims():
        return cache.claim("k", 60)

    version = asyncio.run(claims())
    assert cache.get_or_set("k", lambda: "beside") == "beside"
    assert (cache.claim_version("k"), asked) == (version, [])


def test_a_lease_and_a_ttl(cache, frozen):
    assert cache.get_lease("k", 0.05).held is True
    waiting = cache.get_or_set("k", lambda: 1, 0.05)
    assert waiting == 1
    while "k" in cache:
        pass


@pytest.mark.parametrize("mode", ["through", "around", "back"])
def test_waits_for_a_store(make, frozen, mode):
    cache = make(policy=shmcache.Policy(mode, timeout=0.05), store=DictStore())
    with beside(lambda: contextlib.nullcontext(cache.claim("k", 60))), pytest.raises(errors.StoreUnavailable):
        cache["k"]
    if mode != "back":
        with beside(lambda: contextlib.nullcontext(cache.mark("l", 60, True))), pytest.raises(errors.StoreUnavailable):
            cache.set("l", 1)


def test_functions_and_connections(frozen, tmp_path):
    waits = threading.Event()
    store = shmcache.FunctionStore(load=lambda key: waits.wait(0.05), timeout=0.02)
    with pytest.raises(errors.StoreUnavailable):
        store.load_many([b"a", b"b"])
    with contextlib.closing(shmcache.SQLStore(f"sqlite:///{tmp_path}/rows")) as store:
        store.store_many({b"k": (1, None)})
        with contextlib.closing(sqlite3.connect(tmp_path / "rows")) as other:
            other.execute("begin immediate")
            with pytest.raises(errors.StoreUnavailable):
                store.store_many({b"k": (2, None)}, timeout=0.05)


def test_supervise(cache, frozen):
    child = shmcache.supervise(cache.name)
    child.terminate()
    child.wait()
