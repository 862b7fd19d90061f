"""shmcache for asyncio: `await shmcache.aio.opened("web")` gives a Cache of the same names, whose methods are awaited.

    cache = await shmcache.aio.opened("web", size="256M")
    user = await cache.get_or_set("u:1", fetch_user, ttl=60)        # fetch_user may be a coroutine function

An operation on the segment takes less than a switch to another task: it is called directly, in the loop. Every wait is awaited: for another
caller's computation, load, write or lock, for room in write-back, for a flush. Only calls of the store run in threads, which are the
cache's own (threads.py). Rules and claims are those of threads and processes: a task is a claimer of its own.

Cancelled: what waits ends at once. A factory is cancelled. A call of the store that has not begun is never made. One that runs cannot be
stopped: its task ends at once, the thread then does what is left (fills or ends what was claimed and marked), and begins nothing more.
Until then the keys that it writes are held: another write of them, here or in any process, waits, so it is the later one in the store, too.
They are held for as long as their marks stand: a store that does not keep its time (policy.timeout) may be overtaken.

Race table, of a call in a thread: whose the steps are is decided by core/_claims.pyx: Turn, Driving
    cancel vs begin          cancel first: the call is never made, its marks and claims are given back. Begin first: as it runs
    too late vs begin        too late first: the call is never made, its task gets StoreUnavailable. Begin first: as it runs
    a handler raises in a callback of the loop, which drops it      those of this module are compiled, and wake their task first
    the store does not return      its task gets StoreUnavailable, and leaves the call as if it were cancelled; the thread stays in it
                             (so may the tasks of a process that was stopped for as long: the time is the clock's)
    cancel vs end            cancel first: the thread goes through the rest. End first: the task does, and is cancelled then
    the loop is closed       its callbacks do not run: the thread goes through the rest
    the task is collected    as cancelled
    a held mark vs end       the end takes the mark away, or the mark is held until then
    a later write vs the rest      written back there is no mark: the rest ends before its next write (flight.py: BEGIN). What it loaded it
                             fills in the place of its claim alone, which the later write has voided
    a handler raises while a call begins, or is left      as cancelled: the call is known before it is queued, and left in one step
Crash: the process is dead, and its marks and claims are the dead's.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Any

from shmcache import cache as cache_module
from shmcache import errors, flight, segment
from shmcache.core import _claims, _core
from shmcache.threads import Job, Threads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping
    from datetime import timedelta
    from typing import TypeVar

    from shmcache.core._claims import Lock

    T = TypeVar("T")
    Key = bytes | str
    Ttl = float | timedelta | None
    Steps = Generator[Any, Any, T]

MISSING = flight.MISSING


def create(name: str, size: int | str = cache_module.DEFAULT_SIZE, **options: Any) -> Cache:
    """As shmcache.create."""
    return Cache(cache_module.create(name, size, **options))


def attach(name: str, **options: Any) -> Cache:
    """As shmcache.attach. It does not wait for a restore in an event loop, which would stand still: BeingRestored; await attached()."""
    return Cache(cache_module.attach(name, **_at_once(options)))


def open(name: str, size: int | str | None = None, **options: Any) -> Cache:
    """As shmcache.open. It does not wait for a restore in an event loop, which would stand still: BeingRestored; await opened()."""
    return Cache(cache_module.open(name, size, **_at_once(options)))


async def attached(name: str, **options: Any) -> Cache:
    """As attach(), and awaits a restore as shmcache.attach waits for it."""
    return await _when_restored(attach, name, **options)


async def opened(name: str, size: int | str | None = None, **options: Any) -> Cache:
    """As open(), and awaits a restore as shmcache.open waits for it."""
    return await _when_restored(open, name, size, **options)


def _at_once(options: dict[str, Any]) -> dict[str, Any]:
    return options if asyncio._get_running_loop() is None else {**options, "wait": False}


async def _when_restored(make: Callable[..., Cache], *args: Any, wait: bool = True, **options: Any) -> Cache:
    patience = segment.Patience()
    while True:
        try:
            return make(*args, **options)
        except errors.BeingRestored as e:
            if not wait or patience.over(e):
                raise
        await asyncio.sleep(segment.RESTORE_POLL)


class Cache:
    """A shmcache.Cache, awaited. `cache.sync` is that one: for what is not here (scan, stats, verify ...), and from other threads.

    For one event loop. Methods, arguments and errors are shmcache.Cache's.
    """

    def __init__(self, sync: cache_module.Cache) -> None:
        self.sync = sync
        self._loads = sync._reads_through
        self._back = sync.mapping.settings()["policy"] == segment.WRITE_BACK
        self._threads = Threads()
        self._waiting: dict[bytes, list[asyncio.Future[None]]] = {}  # by key: tasks that poll; woken early when another one is through

    def __reduce__(self) -> Any:
        return Cache, (self.sync,)

    def __repr__(self) -> str:
        return f"<shmcache.aio.Cache of {self.sync!r}>"

    # ---- reads ----

    async def get(self, key: Key, default: Any = None) -> Any:
        if not self._loads:
            return self.sync.get(key, default)
        value = self.sync.peek(key, MISSING)
        return value if value is not MISSING else await self._do(self.sync._load_missing, key, default)  # type: ignore[attr-defined]

    async def gets(self, key: Key) -> tuple[Any, int]:
        return await self._do(self.sync.gets, key)

    async def get_many(self, keys: Iterable[Key]) -> dict[Any, Any]:
        return await self._do(self.sync.get_many, keys)

    async def contains(self, key: Key) -> bool:
        """key in cache."""
        return await self._do(self.sync.__contains__, key)

    async def ttl(self, key: Key) -> float | None:
        return await self._do(self.sync.ttl, key)

    # ---- writes ----

    async def set(self, key: Key, value: Any, ttl: Ttl = None, tags: Iterable[str] | None = None) -> None:
        await self._do(self.sync.set, key, value, ttl, tags)

    async def set_many(
        self, mapping: Mapping[Any, Any] | Iterable[tuple[Key, Any]], ttl: Ttl = None, tags: Iterable[str] | None = None
    ) -> None:
        if not self._back:
            await self._do(self.sync.set_many, mapping, ttl, tags)
            return
        values = {_core.key_bytes(key): value for key, value in _core.pairs(mapping)}
        stored = {key: self.sync.encoded(value) for key, value in values.items() if key[0] != 0}
        for key, value in stored.items():  # one by one, for each may wait for room
            await self._do(self.sync.set, key, value, ttl, tags)
        self.sync.set_many({key: value for key, value in values.items() if key[0] == 0}, ttl, tags)

    async def delete(self, key: Key) -> bool:
        return await self._do(self.sync.delete, key)

    async def delete_many(self, keys: Iterable[Key]) -> int:
        if self._loads or not self._back:
            return await self._do(self.sync.delete_many, keys)
        return sum([await self.delete(name) for name in [_core.key_bytes(key) for key in _core.several(keys)]])

    async def add(self, key: Key, value: Any, ttl: Ttl = None, tags: Iterable[str] | None = None) -> bool:
        return await self._do(self.sync.add, key, value, ttl, tags)

    async def replace(self, key: Key, value: Any, ttl: Ttl = None, tags: Iterable[str] | None = None) -> bool:
        return await self._do(self.sync.replace, key, value, ttl, tags)

    async def cas(self, key: Key, value: Any, version: int, ttl: Ttl = None, tags: Iterable[str] | None = None) -> bool:
        return await self._do(self.sync.cas, key, value, version, ttl, tags)

    async def pop(self, key: Key, default: Any = None) -> Any:
        return await self._do(self.sync.pop, key, default)

    async def incr(self, key: Key, n: int = 1, *, default: int | None = None, ttl: Ttl = None) -> int:
        return await self._do(self.sync.incr, key, n, default=default, ttl=ttl)

    async def decr(self, key: Key, n: int = 1, *, default: int | None = None, ttl: Ttl = None) -> int:
        return await self._do(self.sync.incr, key, -n if isinstance(n, int) else n, default=default, ttl=ttl)

    async def touch(self, key: Key, ttl: Ttl = None) -> bool:
        return await self._do(self.sync.touch, key, ttl)

    async def expire(self, key: Key, ttl: float | timedelta) -> bool:
        return self.sync.expire(key, ttl) if ttl is None else await self.touch(key, ttl)

    async def persist(self, key: Key) -> bool:
        return await self._do(self.sync.persist, key)

    async def invalidate_tag(self, *tags: str) -> None:
        self.sync.invalidate_tag(*tags)

    async def clear(self) -> None:
        await self._do(self.sync.clear)

    async def flush(self, timeout: float = 30.0) -> None:
        await self._driven(flight.flushing(self.sync, timeout))

    # ---- computed once ----

    async def get_or_set(
        self, key: Key, factory: Callable[[], Any], ttl: Ttl = None, *, lease: float = flight.LEASE, **options: Any
    ) -> Any:
        """As Cache.get_or_set. factory: called without arguments; what it returns is awaited if it can be. Options: stale_ttl, early, tags.

        If this task is cancelled while it computes, another of those who wait computes.
        """
        if self._loads:
            self.sync._flight_options(key, options)  # type: ignore[attr-defined]
        value = await self.get(key, MISSING)
        if value is not MISSING:
            return value
        flight.check_lease(lease)
        name = _core.key_bytes(key)
        terms = flight.Terms(self.sync, ttl, **options)
        return await self._driven(flight.flying(self.sync, name, lease, terms), name, factory)

    @contextlib.asynccontextmanager
    async def lock(self, name: Key, ttl: float | None = None, timeout: float | None = None) -> AsyncIterator[None]:
        """`async with cache.lock("report", ttl=30): ...`: a lock that all tasks, threads and processes of the host share.

        Raises: TimeoutError: it was not to be had for timeout seconds; UsageError: this task holds it, or the thread that runs this loop
        does. Warns: LockLost: the block ended after its ttl.
        """
        held = self.sync.lock(name, ttl)
        key = flight.LOCK_PREFIX + _core.key_bytes(name)
        try:
            with _claims.Giving(held):
                async with asyncio.timeout(timeout):
                    await self._acquire(held, key)
                yield
        finally:
            self._wake(key)

    async def _acquire(self, held: Lock, key: bytes) -> None:
        wait = flight.FIRST_WAIT
        while not held.acquire(blocking=False):
            if held.beneath:
                raise errors.UsageError("the thread that runs this event loop holds the lock, and goes on only when the loop has ended")
            wait = await self._pause(key, wait)

    # ---- life ----

    async def close(self) -> None:
        self.sync.close()

    async def __aenter__(self) -> Cache:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # ---- how ----

    async def _do(self, method: Callable[..., T], *args: Any, **keywords: Any) -> T:
        """A method of the cache: one without steps is the core's, and called."""
        if not self._loads and not self._back:
            return method(*args, **keywords)
        if hasattr(method, "steps"):
            name = _core.key_bytes(args[0]) if args and isinstance(args[0], (bytes, str)) else b""
            return await self._driven(flight.steps(method, *args, **keywords), name)
        return await self._driven(flight.in_room(self.sync, method, *args, **keywords))

    async def _driven(self, steps: Steps[T], name: bytes = b"", factory: Callable[[], Any] | None = None) -> T:
        """Go through steps (flight.py: run) in this loop. name: the key that they are about."""
        answer: Any = None
        failed: BaseException | None = None
        wait = flight.FIRST_WAIT
        driving = _claims.Driving(self.sync, steps)
        try:
            with driving:
                while True:
                    try:
                        asked = steps.send(answer) if failed is None else steps.throw(failed)
                    except StopIteration as e:
                        return e.value  # type: ignore[no-any-return]
                    finally:
                        failed = None
                    answer = None
                    if asked is flight.BEGIN:
                        continue
                    if asked is flight.WAIT_BENEATH:  # for the thread that runs this loop: in vain
                        answer = True
                        continue
                    if asked is flight.WAIT or asked is flight.WAIT_HERE:
                        wait = await self._pause(name, wait)
                        continue
                    wait = flight.FIRST_WAIT
                    if asked is flight.COMPUTE:
                        assert factory is not None
                        answer = factory()
                        if inspect.isawaitable(answer):
                            answer = await answer
                        continue
                    driving.job = job = Job(steps, asked)
                    try:
                        self._threads.begin(job)
                        await job.wait()
                    finally:
                        if not job.over:
                            self._threads.forget(job)
                    answer, failed = job.take()
        finally:
            self._wake(name)

    async def _pause(self, name: bytes, wait: float) -> float:
        """Wait so many seconds, or until another task of this loop is through with this key: how long to wait next."""
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        waiting = self._waiting.setdefault(name, [])
        waiting.append(woken)
        timer = loop.call_later(wait, _claims.wake, woken)
        try:
            await woken
        finally:
            timer.cancel()
            waiting.remove(woken)
            if not waiting and self._waiting.get(name) is waiting:
                del self._waiting[name]
        return min(wait * 1.5, flight.LONGEST_WAIT)

    def _wake(self, name: bytes) -> None:
        """A hint: what they wait for is the core's to say."""
        if waiting := self._waiting.get(name):
            loop = asyncio._get_running_loop()  # not theirs, if a task is collected in another thread or after its loop
            for woken in waiting:
                if woken.get_loop() is loop:
                    _claims.wake(woken)
