"""shmcache.aio: the same operations, awaited; the loop is not held by a store, a factory or a lock."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import time

import pytest

import shmcache
from shmcache import errors
from shmcache.stores import Entry
from tests.integration.test_flight import pass_time
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


# ---- the rules of claims are the tasks', too ----------------------------------------------------------------------------------------


async def begun(calls, n=1):
    while len(calls) < n:
        await asyncio.sleep(0.001)


def hanging(calls):
    """A factory that never ends."""

    async def factory():
        calls.append(1)
        await asyncio.get_running_loop().create_future()

    return factory


@pytest.mark.parametrize("policy", [None, "through"])
def test_a_collected_task_gives_its_claim_back(awaited, policy):
    cache = awaited(policy=policy, store=Hooked()) if policy else awaited()
    calls = []

    async def main():
        task = asyncio.create_task(cache.get_or_set("k", hanging(calls)))
        await begun(calls)
        task._log_destroy_pending = False
        del task
        gc.collect()
        async with asyncio.timeout(20):
            assert await cache.get_or_set("k", lambda: 2) == 2

    run(main())


def test_a_closed_loop_keeps_a_key_for_the_lease_alone(awaited):
    cache = awaited()
    calls = []
    loop = asyncio.new_event_loop()
    task = loop.create_task(cache.get_or_set("k", hanging(calls), lease=0.5))
    loop.run_until_complete(begun(calls))
    loop.close()
    assert run(cache.get_or_set("k", lambda: 2)) == 2
    task._log_destroy_pending = False
    del task
    gc.collect()  # while the cache is open


def test_a_coroutine_that_is_closed_in_another_context_gives_its_claim_back(awaited):
    cache = awaited()
    calls = []

    async def main():
        flight = cache.get_or_set("k", hanging(calls))
        contextvars.copy_context().run(flight.send, None)
        assert cache.sync.claim_version("k")
        flight.close()
        assert cache.sync.claim_version("k") == 0
        async with asyncio.timeout(20):
            assert await cache.get_or_set("k", lambda: 2) == 2

    run(main())


def test_after_the_lease_another_task_computes(awaited):
    cache = awaited()
    calls = []

    async def main():
        first = asyncio.create_task(cache.get_or_set("k", hanging(calls), lease=0.1))
        await begun(calls)
        async with asyncio.timeout(20):
            assert await cache.get_or_set("k", lambda: 2) == 2
        first.cancel()

    run(main())


def test_a_task_that_takes_a_stale_value_gets_it_while_another_refreshes(awaited):
    cache = awaited()
    calls = []

    async def main():
        assert await cache.get_or_set("k", lambda: "old", ttl=1000, stale_ttl=1000) == "old"
        pass_time(cache.sync, 1001)
        refresher = asyncio.create_task(cache.get_or_set("k", hanging(calls), ttl=1000, stale_ttl=1000))
        await begun(calls)
        async with asyncio.timeout(20):
            assert await cache.get_or_set("k", lambda: pytest.fail("computed"), ttl=1000, stale_ttl=1000) == "old"
        refresher.cancel()

    run(main())


@pytest.mark.parametrize(
    ("change", "policy"), [("delete", None), ("clear", None), ("invalidate_tag", None), ("delete", "through"), ("clear", "through")]
)
def test_a_caller_that_asks_after_a_change_is_not_given_what_was_computed_before_it(awaited, change, policy):
    cache = awaited(policy=policy, store=Hooked()) if policy else awaited()
    options = {"tags": ("t",)} if change == "invalidate_tag" else {}
    calls = []

    async def main():
        go = asyncio.Event()

        async def before():
            calls.append(1)
            await go.wait()
            return "before"

        first = asyncio.create_task(cache.get_or_set("k", before, **options))
        await begun(calls)
        await {"delete": lambda: cache.delete("k"), "clear": cache.clear, "invalidate_tag": lambda: cache.invalidate_tag("t")}[change]()
        second = asyncio.create_task(cache.get_or_set("k", lambda: "after", **options))
        await asyncio.sleep(0.05)
        go.set()
        assert [await first, await second] == ["before", "after"]

    run(main())
    assert cache.sync.claim_version("k") == 0


def test_a_task_that_is_started_in_a_factory_waits_as_any_other(awaited):
    cache = awaited()

    async def main():
        inner = []

        async def factory():
            inner.append(asyncio.create_task(cache.get_or_set("k", lambda: pytest.fail("computed by two"))))
            await asyncio.sleep(0.05)
            assert not inner[0].done()
            return 1

        assert await cache.get_or_set("k", factory) == 1
        assert await inner[0] == 1

    run(main())


def test_what_a_factory_asks_of_its_own_key_in_a_call_of_its_own_is_computed_at_once(awaited):
    """By a plain method, too: it would wait for its own task."""
    cache = awaited()

    async def outer():
        return await cache.get_or_set("k", lambda: 1) + cache.sync.get_or_set("k", lambda: 2)

    assert run(cache.get_or_set("k", outer)) == 3


def test_an_option_that_there_is_not(awaited):
    cache = awaited()
    with pytest.raises(TypeError, match="leese"):
        run(cache.get_or_set("k", lambda: 1, leese=5))
    with pytest.raises(errors.InvalidTTL):
        run(cache.get_or_set("k", lambda: 1, lease=-1))


def test_of_tasks_that_want_a_lock_one_gets_it_when_its_ttl_is_over(awaited):
    cache = awaited()

    async def main():
        version = await asyncio.create_task(taken(cache.sync.lock("l", 0.1)))
        assert version
        async with asyncio.timeout(20), cache.lock("l"):
            pass

    async def taken(lock):
        assert lock.acquire(blocking=False)
        return lock

    run(main())


@pytest.mark.parametrize("error", [None, KeyError("the block's own")])
def test_a_block_that_ends_after_its_locks_ttl_is_warned_of_it(awaited, error):
    cache = awaited()

    async def main():
        async with cache.lock("l", ttl=0.05):
            async with asyncio.timeout(20):
                await asyncio.create_task(once())
            if error:
                raise error

    async def once():
        async with cache.lock("l"):
            pass

    with pytest.warns(errors.LockLost), pytest.raises(KeyError) if error else contextlib.nullcontext():
        run(main())
    assert cache.sync.stats()["locks_lost"] == 1


def test_a_task_waits_for_a_lock_for_its_time_out_alone(awaited):
    cache = awaited()

    async def main():
        async with cache.lock("l"):

            async def want():
                async with cache.lock("l", timeout=0.05):
                    pytest.fail("it is another task's")

            with pytest.raises(TimeoutError):
                async with asyncio.timeout(20):
                    await asyncio.create_task(want())

    run(main())


def test_a_lock_is_not_reentrant_and_a_task_is_told_so(awaited):
    cache = awaited()

    async def main():
        async with cache.lock("l"):
            with pytest.raises(errors.UsageError, match="re-entrant"):
                async with cache.lock("l"):
                    pass
        async with cache.lock("l"):
            pass

    run(main())


def test_a_cancelled_holder_of_a_lock_gives_it_back_and_a_cancelled_waiter_takes_none(awaited):
    cache = awaited()

    async def main():
        held = asyncio.Event()

        async def hold():
            async with cache.lock("l"):
                held.set()
                await asyncio.Event().wait()

        holder = asyncio.create_task(hold())
        await held.wait()
        waiter = asyncio.create_task(hold())
        await asyncio.sleep(0.01)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        holder.cancel()
        async with asyncio.timeout(20), cache.lock("l"):
            pass

    run(main())
