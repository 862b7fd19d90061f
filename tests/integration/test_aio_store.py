"""shmcache.aio in front of a store: waits are awaited, only calls of the store have threads, and what a cancelled call leaves behind."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dis
import gc
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

import shmcache
from shmcache import errors, flight, threads
from tests.integration.test_aio import awaited, run  # noqa: F401
from tests.integration.test_policy import STRANGERS, Gate, Hooked, down, flushing, late_store
from tests.integration.test_processes import child, ended
from tests.integration.test_store import in_thread, until

SOON = 20.0  # seconds in which what need not wait has ended, on a busy machine


@pytest.fixture
def store():
    return Hooked()


@pytest.fixture(params=["through", "around"])
def front(request, awaited, store):  # noqa: F811
    """front(**options of Policy) -> an aio.Cache before `store`."""
    return lambda **options: awaited(policy=shmcache.Policy(request.param, **options), store=store)


def row(store, key):
    return store.values().get(key)


async def reached(gate):
    while not gate.reached.is_set():
        await asyncio.sleep(0.001)


async def for_a_while():
    """Long enough for what does not wait to be done."""
    for _ in range(20):
        await asyncio.sleep(0.005)


def in_time(coroutine_function, seconds=60):
    """asyncio.run() of it in another process, that is killed if it does not end: how it did."""
    pid = child(lambda: asyncio.run(coroutine_function()) is None)
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)  # between two looks
    return ended(pid)


# ---- who waits for whom -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_threads", [1, 32])
def test_factories_that_miss_another_key_each(front, store, monkeypatch, n_threads):
    monkeypatch.setattr(threads, "MOST", n_threads)
    cache = front()

    async def main():
        asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(2))

        async def outer(i):
            return await cache.get_or_set(f"inner{i}", lambda: i) + 1

        tasks = [cache.get_or_set(f"outer{i}", lambda i=i: outer(i)) for i in range(6)]
        sets = [cache.set(f"other{i}", i) for i in range(6)]
        assert (await asyncio.gather(*tasks, *sets))[:6] == [1, 2, 3, 4, 5, 6]

    assert in_time(main) == 0


def test_the_users_own_threads_keep_nothing_waiting(front):
    cache = front()
    go = threading.Event()

    async def main():
        executor = concurrent.futures.ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(executor)
        busy = asyncio.create_task(asyncio.to_thread(go.wait, 60))
        await asyncio.sleep(0)  # it has the thread
        try:
            async with asyncio.timeout(SOON):
                await cache.set("k", 1)
                assert await cache.get("k") == 1
        finally:
            go.set()
            await busy

    run(main())


def test_waits_have_no_threads(front, monkeypatch):
    monkeypatch.setattr(threads, "MOST", 1)
    cache = front(timeout=60)

    async def main():
        asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(2))
        version = await asyncio.to_thread(cache.sync.claim, "k", 60.0)
        cache.sync.mark("marked", 60, True)
        waiting = [asyncio.create_task(cache.get("k")) for _ in range(20)] + [asyncio.create_task(cache.set("marked", i)) for i in range(20)]
        await for_a_while()
        async with asyncio.timeout(SOON):
            await cache.set("other", 1)
            assert await cache.get("other") == 1
        assert not any(task.done() for task in waiting)
        cache.sync.unclaim("k", version)
        cache.sync.end_mark("marked")
        async with asyncio.timeout(SOON):
            assert (await asyncio.gather(*waiting))[:20] == [None] * 20

    run(main())


def test_tasks_that_miss_a_key_load_it_once(front, store):
    cache = front()
    store.rows[b"k"] = (store.codec.encode(1), None, 0)
    gate = Gate(store, "load")

    async def main():
        tasks = [asyncio.create_task(cache.get("k")) for _ in range(50)]
        await reached(gate)
        await for_a_while()
        gate.opened.set()
        assert await asyncio.gather(*tasks) == [1] * 50
        assert store.calls == [("load", [b"k"])]

    run(main())


def test_a_load_that_asks_for_its_own_key_does_not_wait_for_itself(front, store):
    cache = front(timeout=60)
    store.rows[b"k"] = (store.codec.encode(1), None, 0)
    asked = []

    def again(what, keys):
        if what == "load" and not asked:
            asked.append(1)
            asked.append(cache.sync["k"])

    store.before = again

    async def main():
        async with asyncio.timeout(SOON):
            assert await cache.get("k") == 1
        assert asked == [1, 1]

    run(main())


def test_tasks_that_a_store_runs_are_callers_of_their_own(front, store):
    """In the thread of a call, which acts for the task that asked; they do not wait for that one."""
    cache = front(timeout=60)
    computed, seen = [], []

    async def factory():
        computed.append(1)
        await asyncio.sleep(0.01)
        return len(computed)

    async def inner():
        with shmcache.attach(cache.sync.name, store=store) as sync:
            other = shmcache.aio.Cache(sync)
            seen.append(await asyncio.gather(*(asyncio.create_task(other.get_or_set(b"\0x", factory)) for _ in range(5))))
            seen.append(await other.get_or_set("k", lambda: "beneath"))

    def runs(what, keys):
        if what == "load" and not seen:
            seen.append(None)
            asyncio.run(inner())

    store.before = runs

    async def main():
        async with asyncio.timeout(SOON):
            assert await cache.get("k") is None

    run(main())
    assert seen == [None, [1] * 5, "beneath"]
    assert computed == [1]


def test_changes_of_one_key_come_one_after_another(front, store):
    cache = front()

    async def main():
        await cache.set("n", 0)
        await asyncio.gather(*(cache.incr("n") for _ in range(50)))
        assert await cache.get("n") == 50

    run(main())
    assert row(store, b"n") == 50


def test_a_synchronous_call_beside_a_change_of_its_own_loop_does_not_stop_it(front, store):
    """Nobody else can end the change. Where it has been left, its thread does."""
    cache = front(timeout=SOON)
    for key in (b"k", b"l"):
        store.rows[key] = (store.codec.encode(1), None, 0)

    async def main():
        opened = threading.Event()
        store.before = lambda what, keys: what == "store" and opened.wait(60)
        changes = [asyncio.create_task(cache.incr("k")), asyncio.create_task(cache.add("n", 1))]
        while len([what for what, keys in store.calls if what == "store"]) < 2:
            await asyncio.sleep(0.001)
        sync = cache.sync
        for call in (lambda: sync.set("k", 5), lambda: sync.incr("k"), lambda: sync.delete("k"), lambda: sync.set_many({"j": 1, "k": 5})):
            with pytest.raises(errors.UsageError, match="await"):
                call()
        assert sync.claim_version("j") == 0
        assert (sync["k"], sync.get_many(["k", "l"]), sync.ttl("k")) == (1, {"k": 1, "l": 1}, float("inf"))
        assert sync.get_or_set("n", lambda: "computed") == "computed"
        opened.set()
        assert await asyncio.gather(*changes) == [2, True]
        assert (await cache.get("k"), await cache.get("n")) == (2, 1)

        for other in (lambda: cache.sync.incr("k"), None):
            gate = Gate(store, "store")
            first = asyncio.create_task(cache.incr("k"))
            await reached(gate)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            threading.Timer(0.05, gate.opened.set).start()
            before = row(store, b"k")
            assert (other() if other else await cache.incr("k")) == before + 2

    began = time.monotonic()
    run(main())
    assert time.monotonic() - began < SOON


def test_a_task_that_gives_up_a_change_makes_the_next(front, store):
    cache = front(timeout=60)

    async def main():
        gate = Gate(store, "store")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await cache.incr("k", default=0)
        threading.Timer(0.05, gate.opened.set).start()
        assert await cache.incr("k", default=0) == 2

    run(main())


def test_a_store_that_writes_through_its_own_cache_is_told_so(front, store):
    cache = front(timeout=SOON)
    store.before = lambda what, keys: what == "store" and cache.sync.incr("k")

    async def main():
        with pytest.raises(errors.UsageError, match="through its cache"):
            await cache.incr("k", default=1)

    began = time.monotonic()
    run(main())
    with pytest.raises(errors.UsageError, match="through its cache"):
        cache.sync.incr("k", default=1)
    assert time.monotonic() - began < SOON


def test_a_call_of_a_store_that_hangs_says_so(front, store, monkeypatch):
    monkeypatch.setattr(shmcache.stored, "GRACE", 0.2)
    cache = front(timeout=0.2)

    async def main():
        gates = Gate(store, "store"), Gate(store, "load", "after")
        for call, unsettled in (cache.set("k", 1), True), (cache.get("l"), False):
            with pytest.raises(errors.StoreUnavailable, match="has not answered") as told:
                async with asyncio.timeout(SOON):
                    await call
            assert told.value.unsettled == unsettled
        for gate in gates:
            gate.opened.set()
        async with asyncio.timeout(SOON):
            while cache._threads._idle < cache._threads._n:
                await asyncio.sleep(0.001)
            await cache.set("k", 2)
        assert await cache.get("k") == row(store, b"k") == 2

    run(main())


def test_a_call_that_comes_to_its_turn_too_late_is_not_made(front, store, monkeypatch):
    """By then its mark may be over, and another's change be going on."""
    monkeypatch.setattr(threads, "MOST", 1)
    monkeypatch.setattr(shmcache.stored, "GRACE", 0.2)
    cache = front(timeout=0.2)
    gate = Gate(store, "store")

    async def main():
        first = asyncio.create_task(cache.set("k", 1))
        await reached(gate)
        late = asyncio.create_task(cache.incr("n", default=1))
        await asyncio.sleep(0.5)
        gate.opened.set()
        with pytest.raises(errors.StoreUnavailable, match="too late"):
            await late
        await asyncio.wait([first])  # on a slow machine it is told that the store has hung
        assert cache.sync.claim_version("n") == 0

    run(main())
    assert row(store, b"n") is None


def test_a_call_that_gets_no_thread_in_time_says_so(front, store, monkeypatch):
    """Not when a thread is free at last: the store may hang."""
    monkeypatch.setattr(threads, "MOST", 1)
    monkeypatch.setattr(shmcache.stored, "GRACE", 0.2)
    cache = front(timeout=0.2)
    gate = Gate(store, "load")

    async def main():
        first = asyncio.create_task(cache.get("hangs"))
        await reached(gate)
        for call in (cache.get("k"), cache.set("k", 1), cache.incr("n", default=1)):
            with pytest.raises(errors.StoreUnavailable, match="too late"):
                async with asyncio.timeout(SOON):
                    await call
        assert [cache.sync.claim_version(key) for key in "kn"] == [0, 0]
        assert not cache._threads._jobs
        with pytest.raises(errors.StoreUnavailable, match="has not answered"):
            await first
        gate.opened.set()

    run(main())
    assert store.values() == {}


def test_a_cancelled_call_that_has_not_begun_is_forgotten(front, store, monkeypatch):
    monkeypatch.setattr(threads, "MOST", 1)
    cache = front()
    gate = Gate(store, "load")

    async def main():
        first = asyncio.create_task(cache.get("hangs"))
        await reached(gate)
        for i in range(100):
            task = asyncio.create_task(cache.set(f"k{i}", i))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not cache._threads._jobs
        gate.opened.set()
        await first

    run(main())


# ---- cancelled ----------------------------------------------------------------------------------------------------------------------


def test_a_cancelled_wait_ends_at_once(front):
    cache = front(timeout=60)

    async def main():
        assert await asyncio.to_thread(cache.sync.claim, "k", 60.0) > 0
        for wait in (lambda: cache.get("k"), lambda: cache.get_or_set("k", int), lambda: cache.get_many(["k"])):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await wait()

    began = time.monotonic()
    run(main())  # and leaves no thread for which asyncio.run() would wait
    assert time.monotonic() - began < SOON
    assert cache.sync.claim_version("k")


@pytest.mark.parametrize("what", ["load", "store"])
def test_the_loop_ends_while_a_call_of_the_store_goes_on(front, store, what):
    cache = front()
    gate = Gate(store, what)

    async def main():
        task = asyncio.create_task(cache.get("k") if what == "load" else cache.set("k", 1))
        await reached(gate)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop, got = in_thread(asyncio.run, main())
    loop.join(SOON)
    try:
        assert not loop.is_alive(), "asyncio.run() waits for the store"
        assert got == [None]
        assert cache.sync.claim_version("k")
    finally:
        gate.opened.set()
    until(lambda: cache.sync.claim_version("k") == 0)
    assert row(store, b"k") == (None if what == "load" else 1)


def test_the_interpreter_ends_while_a_call_of_the_store_goes_on():
    """And the key is written by others when the mark's time is over."""
    code = """if True:
        import asyncio, os, threading, shmcache
        from shmcache.stores import Entry
        began = threading.Event()
        class Slow:
            ordered = False
            def load_many(self, keys, *, timeout=None):
                return {}
            def store_many(self, items, *, timeout=None):
                began.set()
                threading.Event().wait(600)
        async def main():
            cache = shmcache.aio.create(name, "8M", policy="through", store=Slow())
            task = asyncio.create_task(cache.set("k", 1))
            while not began.is_set():
                await asyncio.sleep(0.001)
        name = f"t-{os.getpid()}-exit"
        asyncio.run(main())
        shmcache.unlink(name)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=3 * SOON)


@pytest.mark.parametrize("other", ["task", "thread", "process"])
@pytest.mark.parametrize("change", ["set", "incr", "delete", "set_many"])
def test_a_write_after_a_cancelled_one_is_the_later_one(front, store, other, change):
    """A cancelled call of the store cannot be stopped: the next writer, wherever it is, waits until it has ended."""
    cache = front(timeout=60)
    gate = Gate(store, "delete" if change == "delete" else "store")

    async def main():
        calls = {"set": lambda: cache.set("k", 1), "incr": lambda: cache.incr("k", default=1), "delete": lambda: cache.delete("k"),
                 "set_many": lambda: cache.set_many({"k": 1, "l": 1})}  # fmt: skip
        first = asyncio.create_task(calls[change]())
        await reached(gate)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        with shmcache.attach(cache.sync.name, store=store) as sync:
            if other == "process":
                pid = child(lambda: sync.set("k", 2) is None)  # its store is a copy of ours: what it writes there is not seen
                await for_a_while()
                assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "it did not wait"
                gate.opened.set()
                assert await asyncio.to_thread(ended, pid) == 0
                return
            second = asyncio.create_task(cache.set("k", 2) if other == "task" else asyncio.to_thread(sync.set, "k", 2))
            await for_a_while()
            assert not second.done(), "acknowledged, and about to be overtaken"
            gate.opened.set()
            await second
            until(lambda: cache.sync.claim_version("k") == 0)
            assert row(store, b"k") == 2
            assert await cache.get("k") == 2

    run(main())


def test_a_write_that_has_not_begun_when_it_is_cancelled_is_never_begun(front, store, monkeypatch):
    monkeypatch.setattr(threads, "MOST", 1)
    cache = front()
    gate = Gate(store, "store")

    async def main():
        first = asyncio.create_task(cache.set("k", 1))
        await reached(gate)
        queued = [asyncio.create_task(call) for call in (cache.set("a", 1), cache.set_many({"b": 1, "c": 1}), cache.incr("d", default=1))]
        await for_a_while()
        for task in queued:
            task.cancel()
        assert [type(e) for e in await asyncio.gather(*queued, return_exceptions=True)] == [asyncio.CancelledError] * 3
        assert [cache.sync.claim_version(key) for key in "abcd"] == [0] * 4
        gate.opened.set()
        await first
        await cache.set("last", 1)

    run(main())
    assert store.values() == {b"k": 1, b"last": 1}


def test_of_a_cancelled_change_nothing_more_is_begun(front, store):
    cache = front()
    gate = Gate(store, "load")

    async def main():
        change = asyncio.create_task(cache.incr("n", default=1))
        await reached(gate)
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
        gate.opened.set()
        while cache.sync.claim_version("n"):
            await asyncio.sleep(0.001)
        assert await cache.incr("n", default=5) == 6

    run(main())
    assert [call for call in store.calls if call[0] == "store"] == [("store", [b"n"])]


def test_what_a_cancelled_load_finds_is_for_those_who_wait(front, store):
    cache = front()
    store.rows[b"k"] = (store.codec.encode(1), None, 0)
    gate = Gate(store, "load")

    async def main():
        first = asyncio.create_task(cache.get("k"))
        await reached(gate)
        second = asyncio.create_task(cache.get("k"))
        await for_a_while()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        gate.opened.set()
        assert await second == 1

    run(main())
    assert store.calls == [("load", [b"k"])]


@pytest.mark.parametrize("mode", ["through", "around"])
@pytest.mark.parametrize("error", STRANGERS, ids=lambda e: type(e).__name__)
def test_what_a_client_raises_says_nothing_of_what_is_still_to_come(awaited, mode, error):  # noqa: F811
    late, lands = late_store(error)
    cache = awaited(policy=mode, store=late)

    async def main():
        for change in (lambda: cache.set("k", 2), lambda: cache.incr("k")):
            with pytest.raises((errors.StoreUnavailable, errors.RowsRefused)):
                await change()
            assert [await cache.get("k"), cache.sync.peek("k")] == [1, None]
        lands()
        assert await cache.get("k") == 2

    run(main())


def test_who_waits_for_what_cannot_be_cached_does_not_wait_for_each_other(front, store):
    n, large = 5, bytes(4 << 20)
    store.store_many({b"k": (large, None)})
    gate, together, loads = Gate(store, "load"), threading.Barrier(n), itertools.count()
    store.after = lambda what, keys: next(loads) and together.wait(20)
    cache = front(timeout=60)

    async def main():
        first = asyncio.create_task(cache.get("k"))
        await reached(gate)
        others = [asyncio.create_task(cache.get("k") if i % 2 else cache.get_or_set("k", lambda: 1 / 0)) for i in range(n)]
        await for_a_while()
        gate.opened.set()
        assert await asyncio.gather(first, *others) == [large] * (n + 1)

    run(main())
    assert store.calls.count(("load", [b"k"])) == n + 1


@pytest.mark.parametrize("error", [errors.StoreUnavailable("down"), KeyError("a bug of the store's")])
def test_a_store_that_fails_when_its_caller_has_left(front, store, error, monkeypatch):
    said = []
    monkeypatch.setattr(threading, "excepthook", lambda told: said.append(told.exc_value))
    cache = front()
    gate = Gate(store, "store")

    def fails(what, keys):
        gate(what, keys)
        if what == "store":
            raise error

    store.before = fails

    async def main():
        task = asyncio.create_task(cache.set("k", 1))
        await reached(gate)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    gate.opened.set()
    known = isinstance(error, errors.ShmcacheError)  # what the store has done
    until(lambda: cache.sync.store_counters()["errors"] == 1 and (not known or cache.sync.claim_version("k") == 0))
    if known:
        assert said == []
    else:
        until(lambda: said == [error])
        assert cache.sync.claim_version("k"), "nobody knows what the store has done"


def test_a_cancelled_factory_is_cancelled_and_another_computes(front, store):
    cache = front()
    begun, ended_by = [], []

    async def slow():
        begun.append(1)
        if len(begun) > 1:
            return "second"
        try:
            await asyncio.Event().wait()
        except BaseException as e:
            ended_by.append(type(e))
            raise

    async def main():
        first = asyncio.create_task(cache.get_or_set("k", slow))
        while not begun:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(cache.get_or_set("k", slow))
        await for_a_while()
        assert not second.done()
        first.cancel()
        async with asyncio.timeout(SOON):
            assert await second == "second"
        with pytest.raises(asyncio.CancelledError):
            await first
        assert ended_by == [asyncio.CancelledError]

    run(main())
    assert row(store, b"k") == "second"


@pytest.mark.parametrize("when", ["the loop is closed", "its task is collected"])
def test_a_call_whose_task_is_not_to_go_on_ends_its_mark(front, store, when):
    cache = front()
    gate = Gate(store, "store")
    loop = asyncio.new_event_loop()
    task = loop.create_task(cache.set("k", 1))
    loop.run_until_complete(reached(gate))
    loop.close()
    if when == "its task is collected":
        task._log_destroy_pending = False
        del task
        gc.collect()
    assert cache.sync.claim_version("k")
    gate.opened.set()
    until(lambda: cache.sync.claim_version("k") == 0)
    assert row(store, b"k") == 1


def test_a_cancellation_that_comes_with_the_end_of_a_call(front, store):
    """Whichever is first: the write is done, its mark is gone, and nothing is left running."""
    cache = front()

    async def main():
        loop = asyncio.get_running_loop()
        for i in range(200):
            task = asyncio.create_task(cache.set("k", i))
            await asyncio.sleep(0)
            loop.call_later(i * 1e-5, task.cancel)
            cancelled = isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
            await cache.set("l", i)
            while cache.sync.claim_version("k"):
                await asyncio.sleep(0)
            if not cancelled:
                assert await cache.get("k") == i
            assert await cache.get("k") == row(store, b"k")

    run(main())


CHANGES = {
    "delete": lambda cache: cache.delete("k"), "delete_many": lambda cache: cache.delete_many(["k", "j"]), "pop": lambda cache: cache.pop("k"),
    "touch": lambda cache: cache.touch("k", 0), "replace": lambda cache: cache.replace("k", "cancelled"),
    "incr": lambda cache: cache.incr("k", 1, default=5), "add": lambda cache: cache.add("k", "cancelled"),
    "get_or_set": lambda cache: cache.get_or_set("k", lambda: "cancelled"),
}  # fmt: skip


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_of_a_cancelled_change_nothing_more_is_written_back(awaited, store, change, there):  # noqa: F811
    """It loads first, and the thread that loads goes through the rest: not over what was acknowledged meanwhile."""
    cache = awaited(policy="back", store=store)
    if there:
        store.rows[b"k"] = (store.codec.encode(1), None, 0)
    gate = Gate(store, "load")

    async def main():
        first = asyncio.create_task(CHANGES[change](cache))
        await reached(gate)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        if change in ("incr", "add", "get_or_set"):  # which write where there is nothing
            assert not await cache.delete("k") or there
            expected = None
        else:
            await cache.set("k", "acknowledged")
            expected = "acknowledged"
        gate.opened.set()
        while cache._threads._idle < cache._threads._n or cache._threads._jobs:
            await asyncio.sleep(0.001)
        assert await cache.get("k") == expected

    run(main())


@pytest.mark.parametrize("n_threads", [2, 32])
@pytest.mark.parametrize("front", ["through", "around", "back"], indirect=True)
def test_what_is_acknowledged_holds_whatever_was_cancelled_before(front, store, monkeypatch, n_threads):
    """One user a key, who gives up at random: nothing of what it gave up comes after what it did next."""
    monkeypatch.setattr(threads, "MOST", n_threads)
    cache = front(timeout=60)
    back = cache.sync.policy.mode == "back"  # in which the store has it later
    rng = random.Random(7)
    store.before = store.after = lambda what, keys: time.sleep(rng.choice((0, 0, 0.0005, 0.002)))  # in the threads of the store
    ends = {"cancelled": 0, "acknowledged": 0}

    async def user(key):
        sure, maybe = None, []  # what was acknowledged last; what was given up since
        for i in range(60):
            call, value = rng.choice([
                (lambda i=i: cache.set(key, i), i), (lambda i=i: cache.set_many({key: i, "shared": i}), i), (lambda: cache.delete(key), None),
                (lambda: cache.incr(key, 1, default=1000), "+1"), (lambda: cache.get(key), "read"), (lambda: cache.get(key), "read"),
            ])  # fmt: skip
            try:
                async with asyncio.timeout(rng.choice((0, 0.0003, 0.001, 0.003, 60))):
                    got = await call()
            except TimeoutError:
                ends["cancelled"] += 1
                maybe += [] if value == "read" else [value]
                continue
            ends["acknowledged"] += 1
            possible = outcomes(sure, maybe)
            if value == "read":
                assert got in possible
            elif value == "+1":
                assert got in {1001 if x is None else x + 1 for x in possible}
                sure, maybe = got, []
            else:
                sure, maybe = value, []
            if not maybe:
                assert await cache.get(key) == sure
                assert back or sure == store.values().get(key.encode())

    def outcomes(sure, maybe):
        """Each of those given up was done, or was not; in their order, for each waited for the one before."""
        values = {sure}
        for change in maybe:
            values |= {(1001 if x is None else x + 1) if change == "+1" else change for x in values}
        return values

    async def main():
        n_users = 80 if back else 8  # once a key is written it is there, and nothing is waited for
        await asyncio.gather(*(user(f"k{i}") for i in range(n_users)))
        while any(cache.sync.claim_version(f"k{i}") for i in range(n_users)):
            await asyncio.sleep(0.001)

    run(main())
    assert min(ends.values()) > 50


# ---- a handler raises ---------------------------------------------------------------------------------------------------------------


class Struck(BaseException):
    pass


def where_handlers_run(code):
    """Offsets of the bytecodes before which CPython may run a signal's handler: behind calls, where a function begins, at a jump back."""
    pairs = list(itertools.pairwise(dis.get_instructions(code)))
    behind = {after.offset for before, after in pairs if before.opname.startswith(("CALL", "RESUME"))}
    return behind | {before.offset for before, _ in pairs if before.opname.startswith("JUMP_BACKWARD")}


def strike_at(n, ours):
    """Raise Struck where a handler may run for the n-th time in ours, (file, function) each; () -> did it?"""
    seen = []

    def trace(frame, event, arg):
        if (frame.f_code.co_filename, frame.f_code.co_name) in ours:
            frame.f_trace_opcodes = True
            if event == "opcode" and frame.f_lasti in where_handlers_run(frame.f_code):
                seen.append(1)
                if len(seen) == n:
                    sys.settrace(None)
                    raise Struck
        return trace

    sys._getframe().f_trace_opcodes = True  # CPython 3.12: settrace() looks whether any frame wants them
    sys.settrace(trace)
    return lambda: len(seen) >= n


@pytest.mark.parametrize("warm", [True, False])
def test_a_handler_that_raises_while_a_call_begins(awaited, store, monkeypatch, warm):  # noqa: F811
    """It is raised on, the next write is the later one, and threads are counted as they are. warm: a thread is there, and waits."""
    monkeypatch.setattr(threads, "IDLE", 1.0)
    cache = awaited(policy=shmcache.Policy("through", timeout=60), store=store)
    struck = []

    def slow(what, keys):
        if what == "store" and struck == [False]:
            time.sleep(0.002)  # in a thread: still there when the next write comes

    store.before = slow

    async def main():
        n = 0
        while True:
            n += 1
            cache._threads = threads.Threads()
            if warm:
                await cache.set("warm", n)
            struck[:] = [False]
            did = strike_at(n, [(shmcache.aio.__file__, "_driven"), *((threads.__file__, f) for f in ("begin", "wait")), (threading.__file__, "start")])
            try:
                await cache.set("k", "interrupted")
            except Struck:
                struck[:] = [True]
            finally:
                sys.settrace(None)
            if not did():
                return n
            assert struck == [True], f"swallowed at {n}"
            async with asyncio.timeout(SOON):
                await cache.set("k", n)
                while cache._threads._idle < cache._threads._n or cache._threads._jobs:
                    await asyncio.sleep(0)
            assert await cache.get("k") == row(store, b"k") == n
            assert cache._threads._n <= 2

    assert run(main()) > 10


@pytest.mark.parametrize("ends", ["while it waits", "before it is left"])
def test_a_handler_that_raises_while_a_call_is_left(front, store, ends):
    """The next write is the later one all the same, and no mark is left. ends: when the call does."""
    cache = front(timeout=60)

    async def main():
        n, struck = 0, True
        while struck:
            n += 1
            gate = Gate(store, "store")
            first = asyncio.create_task(cache.set("k", "interrupted"))
            await reached(gate)
            if ends == "before it is left":
                gate.opened.set()
                while cache._threads._idle < cache._threads._n:
                    time.sleep(0.0001)  # and the loop does not run: its task is not told
            first.cancel()
            leaving = [(shmcache.aio.__file__, "_driven")] + [(threads.__file__, name) for name in ("leave", "wait", "forget", "take", "go_through")]
            did = strike_at(n, leaving)
            try:
                await first
            except (Struck, asyncio.CancelledError):
                pass
            finally:
                sys.settrace(None)
            struck = did()
            second = asyncio.create_task(cache.set("k", n))
            if ends == "while it waits":
                await for_a_while()
                assert not second.done(), f"a later write is done at {n}"
                gate.opened.set()
            async with asyncio.timeout(SOON):
                await second
                while cache._threads._idle < cache._threads._n or cache._threads._jobs:
                    await asyncio.sleep(0)
            assert await cache.get("k") == row(store, b"k") == n
            assert cache.sync.claim_version("k") == 0
            store.before = lambda what, keys: None
        return n

    assert run(main()) > 3


@pytest.mark.parametrize("what", ["a call", "a wait"])
def test_what_a_handler_raises_in_the_loop_leaves_no_task_waiting(front, store, what):
    """An event loop drops it where it runs a callback."""
    cache = front(timeout=60)

    async def main():
        n, struck = 0, True
        while struck:
            n += 1
            version = cache.sync.claim("k", 60) if what == "a wait" else 0
            task = asyncio.create_task(cache.set("k", n) if what == "a call" else cache.get_or_set("k", int))
            did = strike_at(n, [(threads.__file__, "wake"), (shmcache.aio.__file__, "_pause")])
            try:
                await asyncio.sleep(0.01)
                sys.settrace(None)
                if version:
                    cache.sync.unclaim("k", version)
                async with asyncio.timeout(SOON):
                    await task
            except Struck:
                pass
            finally:
                sys.settrace(None)
            struck = did()
            await cache.delete("k")

    run(main())


def test_a_handler_that_raises_in_a_lock(awaited):  # noqa: F811
    cache = awaited()

    async def locked():
        async with cache.lock("l"):
            pass

    async def main():
        n, struck = 0, True
        while struck:
            n += 1
            did = strike_at(n, [(shmcache.aio.__file__, "lock")])
            try:
                await locked()
            except Struck:
                pass
            finally:
                sys.settrace(None)
            struck = did()
            assert cache.sync.lock("l").acquire(blocking=False), f"left held at {n}"
            version = cache.sync.claim_version(flight.LOCK_PREFIX + b"l")
            assert cache.sync.unclaim(flight.LOCK_PREFIX + b"l", version)
        return n

    assert run(main()) > 5


def test_nobody_waits_for_the_thread_beneath_its_loop(awaited):  # noqa: F811
    cache = awaited()

    async def locks():
        async with asyncio.timeout(SOON):
            with pytest.raises(errors.UsageError, match="event loop"):
                async with cache.lock("l"):
                    pass

    async def computes():
        async with asyncio.timeout(SOON):
            return await cache.get_or_set("k", lambda: 1)

    with cache.sync.lock("l"):
        run(locks())
    assert cache.sync.get_or_set("k", lambda: run(computes()) + 1) == 2


# ---- forks, errors ------------------------------------------------------------------------------------------------------------------


def test_a_fork_child_has_threads_of_its_own(front, store):
    cache = front()

    async def both():
        await cache.set("k", 1)
        assert await cache.get("other") is None

    run(both())
    assert in_time(both) == 0


def test_a_fork_child_that_leaves_its_parents_call_waits_for_nothing(front, store, monkeypatch):
    """A thread of the parent had the lock of the threads when it was forked: in the child nobody gives it back."""
    monkeypatch.setattr(threads, "MOST", 1)
    cache = front()
    gate = Gate(store, "load")

    async def main():
        first = asyncio.create_task(cache.get("hangs"))
        await reached(gate)
        task = asyncio.create_task(cache.set("k", 1))
        while not cache._threads._jobs:
            await asyncio.sleep(0)
        has, done = threading.Event(), threading.Event()

        def hold():
            with cache._threads._lock:
                has.set()
                done.wait(2 * SOON)

        holder, _ = in_thread(hold)
        has.wait(SOON)

        def leaves():
            with pytest.raises(GeneratorExit):
                task.get_coro().throw(GeneratorExit)
            return True

        pid = child(leaves)
        deadline = time.monotonic() + SOON
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        done.set()
        holder.join()
        gate.opened.set()
        await asyncio.gather(first, task)
        return ended(pid)

    assert run(main()) == 0
    assert row(store, b"k") == 1


def test_threads_end_when_they_have_had_nothing_to_do(front, monkeypatch):
    monkeypatch.setattr(threads, "IDLE", 0.05)
    cache = front()

    async def main():
        await asyncio.gather(*(cache.set(f"k{i}", i) for i in range(100)))

    run(main())
    # enumerate() also has what a handler kept from being started: it is not alive
    until(lambda: not any(thread.name == "shmcache-store" and thread.is_alive() for thread in threading.enumerate()))
    run(main())


def test_a_handle_goes_to_a_worker_with_its_database(awaited, tmp_path):  # noqa: F811
    with contextlib.closing(shmcache.SQLStore(f"sqlite:///{tmp_path}/rows.db")) as rows:
        cache = awaited(policy="through", store=rows)

        async def main():
            await cache.set("k", 1)
            async with pickle.loads(pickle.dumps(cache)) as other:
                assert await other.incr("k") == 2
                other.sync.store.close()
            assert await cache.get("k") == 2

        run(main())


def test_what_the_store_raises_is_raised(front, store):
    cache = front()
    store.before = down

    async def main():
        for call in (lambda: cache.get("k"), lambda: cache.set("k", 1), lambda: cache.incr("k"), lambda: cache.get_or_set("k", int)):
            with pytest.raises(errors.StoreUnavailable, match="now"):
                await call()
            assert cache.sync.claim_version("k") == 0

    run(main())


@pytest.mark.parametrize("policy", ["through", "around", "back"])
def test_what_was_computed_before_a_delete_that_has_returned_is_not_stored(awaited, store, policy):  # noqa: F811
    cache = awaited(policy=shmcache.Policy(policy, flush_every=0.01), store=store)

    async def factory():
        await asyncio.create_task(cache.set("k", "newer"))
        await asyncio.create_task(cache.delete("k"))
        return "computed"

    async def main():
        assert await cache.get_or_set("k", factory) == "computed"
        assert await cache.get("k") is None
        await cache.flush()
        assert row(store, b"k") is None
        assert await cache.get_or_set("k", lambda: "next") == "next"
        await cache.flush()
        assert row(store, b"k") == "next"

    with flushing(cache.sync, store) if policy == "back" else contextlib.nullcontext():
        run(main())


# ---- written back -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_store", [True, False])
def test_over_the_limit_tasks_wait_and_the_loop_goes_on(awaited, store, own_store):  # noqa: F811
    store.before = lambda what, keys: down(what, keys) if what == "store" else None
    cache = awaited(policy=shmcache.Policy("back", flush_every=0.01, dirty_limit=20_000), store=store)
    writer = cache if own_store else shmcache.aio.attach(cache.sync.name)

    async def main():
        async def fill():
            for i in range(200):
                await writer.set(f"k{i}", b"v" * 100)
            await writer.set_many({f"m{i}": b"v" * 100 for i in range(200)})
            assert await writer.delete_many([f"k{i}" for i in range(100)]) == 100

        task = asyncio.create_task(fill())
        limit = 20_000 + 20_000 // 16  # of it a sixteenth is for rows that come behind those that fail
        while cache.sync.segment.header["dirty"] < limit:
            await asyncio.sleep(0.001)
        began = time.monotonic()
        await for_a_while()
        assert time.monotonic() - began < 5, "the loop stands still"
        assert not task.done()
        assert cache.sync.segment.header["dirty"] < limit + 1000
        for wait in (lambda: writer.set("more", 1), lambda: writer.flush()):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await wait()
        store.before = lambda what, keys: None
        await task
        await writer.flush()

    with flushing(cache.sync, store):
        run(main())
    assert len(store.values()) == 300
    writer.sync.close()


def test_a_flush_that_fails_says_so(awaited, store):  # noqa: F811
    store.before = lambda what, keys: down(what, keys) if what == "store" else None
    cache = awaited(policy=shmcache.Policy("back", flush_every=0.01), store=store)

    async def main():
        await cache.set("k", 1)
        with pytest.raises(errors.StoreUnavailable, match="not stored"):
            await cache.flush(0.1)
        store.before = lambda what, keys: None
        await cache.clear()
        assert cache.sync.peek("k") is None
        assert await cache.get("k") == 1

    with flushing(cache.sync, store):
        run(main())


@pytest.mark.parametrize("what", ["a call that gets no thread", "a call of a store that hangs"])
def test_what_a_handler_raises_in_the_loop_leaves_no_task_without_an_end(front, store, monkeypatch, what):
    """The call is told that it is too late, or that the store has not answered, all the same."""
    monkeypatch.setattr(threads, "MOST", 1)
    monkeypatch.setattr(shmcache.stored, "GRACE", 0.1)
    cache = front(timeout=0.1)
    ours = [(threads.__file__, name) for name in vars(threads.Threads) | vars(threads.Job)]

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        n, struck = 0, True
        while struck:
            n += 1
            gate = Gate(store, "load")
            tasks = [asyncio.create_task(cache.get("hangs"))]
            while not gate.reached.is_set() and not tasks[0].done():
                await asyncio.sleep(0.001)
            if not gate.reached.is_set():  # its thread came too late, on a busy machine: once more
                gate.opened.set()
                await asyncio.wait(tasks)
                n -= 1
                continue
            if what == "a call that gets no thread":
                tasks.append(asyncio.create_task(cache.get("k")))
                await asyncio.sleep(0)
            did = strike_at(n, ours)
            try:
                done, waiting = await asyncio.wait(tasks, timeout=SOON)
            finally:
                sys.settrace(None)
            assert not waiting, f"for ever, at {n}"
            assert all(isinstance(task.exception(), (Struck, errors.StoreUnavailable)) for task in done)
            struck = did()
            gate.opened.set()
            while cache._threads._idle < cache._threads._n or cache._threads._jobs:
                await asyncio.sleep(0.001)
        return n

    assert run(main()) > 3


def test_a_call_that_fails_when_its_task_has_left_keeps_no_handle_alive(front, store):
    cache = front(timeout=60)
    reached, go = threading.Event(), threading.Event()

    def fails(what, keys):
        reached.set()
        go.wait(60)
        raise errors.StoreUnavailable("not now")

    async def main():
        async def idle():
            while not 0 < cache._threads._n == cache._threads._idle:
                await asyncio.sleep(0.001)

        await cache.set("k", 1)
        await idle()
        before = sys.getrefcount(cache.sync)
        store.before = fails
        task = asyncio.create_task(cache.set("k", 2))
        while not reached.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        del task
        go.set()
        await idle()
        return sys.getrefcount(cache.sync) - before

    gc.collect()  # not in between: what others have left goes then
    gc.disable()
    try:
        assert run(main()) == 0
    finally:
        gc.enable()
