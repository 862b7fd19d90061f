"""shmcache.aio: the same operations, awaited; the loop is not held by a store, a factory or a lock."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest

import shmcache
from shmcache import errors
from shmcache.stores import Entry
from tests.integration.test_policy import Gate, Hooked, flushing
from tests.integration.test_processes import child, ended


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


@pytest.fixture
def awaited(name):
    """awaited(**options) -> shmcache.aio.Cache"""
    made = []

    def create(**options):
        made.append(shmcache.aio.create(name, "8M", **options))
        return made[-1]

    yield create
    for cache in made:
        if not cache.sync.closed:
            assert cache.sync.verify() == []
            cache.sync.close()


async def everything(cache):
    await cache.set("k", {"a": 1}, ttl=100)
    assert await cache.get("k") == {"a": 1}
    assert await cache.get("none", 7) == 7
    assert 90 < await cache.ttl("k") <= 100
    assert await cache.contains("k")
    assert not await cache.add("k", 2)
    assert await cache.add("n", 2)
    assert await cache.incr("n", 3) == 5
    assert await cache.decr("n") == 4
    assert await cache.replace("k", "v")
    value, version = await cache.gets("k")
    assert value == "v"
    assert await cache.cas("k", "w", version)
    assert not await cache.cas("k", "x", version)
    assert await cache.get_many(["k", "n", "none"]) == {"k": "w", "n": 4}
    await cache.set_many({"a": 1, "b": 2})
    assert await cache.touch("a", 50)
    assert await cache.expire("a", 60)
    assert await cache.persist("a")
    assert await cache.pop("a") == 1
    assert await cache.delete("b")
    assert await cache.delete_many(["b", "n"]) == 1
    assert await cache.get_or_set("made", lambda: 3) == 3
    await cache.flush()
    await cache.clear()


@pytest.mark.parametrize("policy", [None, "through", "around", "back"])
def test_the_same_operations(awaited, policy):
    store = Hooked()
    cache = awaited(policy=policy, store=store) if policy else awaited()

    async def main():
        async with cache:
            await everything(cache)
            assert await cache.get("k") == (None if policy is None else "w")
            assert await cache.get("made") == (None if policy is None else 3)

    with flushing(cache.sync, store) if policy == "back" else contextlib.nullcontext():
        run(main())
    with pytest.raises(errors.CacheClosed):
        cache.sync.get("k")


def test_a_slow_store_does_not_hold_the_loop(awaited):
    store = Hooked()
    store.rows[b"k"] = (store.codec.encode(1), None, 0)
    cache = awaited(policy="through", store=store)
    gate = Gate(store, "load")

    async def main():
        load = asyncio.create_task(cache.get("k"))
        assert await asyncio.to_thread(gate.reached.wait, 60)
        await asyncio.sleep(0)  # the loop goes on
        assert not load.done()
        gate.opened.set()
        assert await load == 1
        gate.what = "store"
        gate.reached.clear()
        gate.opened.clear()
        store.before = gate
        write = asyncio.create_task(cache.set("k", 2))
        assert await asyncio.to_thread(gate.reached.wait, 60)
        assert not write.done()
        gate.opened.set()
        await write
        assert await cache.get("k") == 2

    run(main())


@pytest.mark.parametrize("policy", [None, "through"])
def test_of_many_tasks_threads_and_processes_one_computes(awaited, name, policy):
    store = Hooked()
    cache = awaited(policy=policy, store=store) if policy else awaited()
    calls = []

    async def factory():
        calls.append(1)
        while not others_wait.is_set():
            await asyncio.sleep(0.001)
        return {"value": 42}

    others_wait = threading.Event()

    async def main():
        tasks = [asyncio.create_task(cache.get_or_set("k", factory, ttl=60)) for _ in range(100)]
        while not calls:
            await asyncio.sleep(0.001)
        results = []
        with shmcache.attach(name, store=store) if policy else shmcache.attach(name) as other:
            thread = threading.Thread(target=lambda: results.append(other.get_or_set("k", lambda: calls.append(1))))
            thread.start()
            if policy is None:
                pid = child(lambda: shmcache.attach(name).get_or_set("k", lambda: None) == {"value": 42})
            others_wait.set()
            assert await asyncio.gather(*tasks) == [{"value": 42}] * 100
            await asyncio.to_thread(thread.join, 60)
            assert results == [{"value": 42}]
            if policy is None:
                assert await asyncio.to_thread(ended, pid) == 0
        assert calls == [1]

    run(main())


def test_a_factory_that_raises_is_its_callers_and_another_tries(awaited):
    cache = awaited()
    calls = []

    async def factory():
        calls.append(1)
        await asyncio.sleep(0)
        if len(calls) == 1:
            raise RuntimeError("the first")
        return 2

    async def main():
        results = await asyncio.gather(*(cache.get_or_set("k", factory) for _ in range(5)), return_exceptions=True)
        assert str(results[0]) == "the first"
        assert results[1:] == [2] * 4
        assert len(calls) == 2

    run(main())


def test_a_cancelled_computation_is_another_tasks(awaited):
    cache = awaited()
    begun = []

    async def slow():
        begun.append(1)
        if len(begun) == 1:
            await asyncio.Event().wait()
        return "second"

    async def main():
        first = asyncio.create_task(cache.get_or_set("k", slow))
        while not begun:
            await asyncio.sleep(0)
        second = asyncio.create_task(cache.get_or_set("k", slow))
        await asyncio.sleep(0)
        first.cancel()
        assert await second == "second"
        with pytest.raises(asyncio.CancelledError):
            await first
        assert cache.sync.claim_version("k") == 0

    run(main())


def test_a_factory_that_asks_its_own_key_does_not_wait_for_itself(awaited):
    cache = awaited()

    async def outer():
        return await cache.get_or_set("k", lambda: 1) + 1

    assert run(cache.get_or_set("k", outer)) == 2


def test_stale_values_meanwhile(awaited):
    cache = awaited()

    async def main():
        assert await cache.get_or_set("k", lambda: "old", ttl=1000, stale_ttl=1000) == "old"
        cache.sync.touch("k", 0.001)
        until = time.monotonic() + 30
        while await cache.get("k") is not None:
            assert time.monotonic() < until
        go = asyncio.Event()

        async def new():
            await go.wait()
            return "new"

        refresher = asyncio.create_task(cache.get_or_set("k", new, ttl=1000, stale_ttl=1000))
        await asyncio.sleep(0)
        with shmcache.attach(cache.sync.name) as other:
            assert await asyncio.to_thread(other.get_or_set, "k", lambda: 1, 1000, stale_ttl=1000) == "old"
        go.set()
        assert await refresher == "new"
        assert await cache.get("k") == "new"

    run(main())


def test_a_lock_is_one_tasks_at_a_time(awaited):
    cache = awaited()
    inside = []

    async def work(n):
        async with cache.lock("l"):
            inside.append(n)
            assert len(inside) == 1
            await asyncio.sleep(0)
            inside.remove(n)

    async def main():
        await asyncio.gather(*(work(n) for n in range(20)))
        held = cache.sync.lock("l")
        assert await asyncio.to_thread(held.acquire)
        with pytest.raises(TimeoutError):
            async with cache.lock("l", timeout=0.05):
                pass
        held.release()
        async with cache.lock("l"):
            with shmcache.attach(cache.sync.name) as other:
                assert not await asyncio.to_thread(other.lock("l").acquire, False)

    run(main())


def test_what_is_written_back_is_written_at_once(awaited):
    store = Hooked()
    cache = awaited(policy="back", store=store)

    async def main():
        await cache.set("k", 1)
        assert await cache.get("k") == 1
        assert store.calls == []

    run(main())
    with flushing(cache.sync, store):
        cache.sync.flush()
    assert store.load_many([b"k"]) == {b"k": Entry(1)}
