"""shmcache for asyncio: `shmcache.aio.open("web")` gives a Cache of the same names, whose methods are awaited.

    cache = shmcache.aio.open("web", size="256M")
    user = await cache.get_or_set("u:1", fetch_user, ttl=60)        # fetch_user may be a coroutine function

An operation on the segment takes less than a switch to another task: it is called directly, in the loop. What may wait does not hold the
loop: a store's loads and writes run in threads (asyncio.to_thread), waits for another's computation or lock are asyncio.sleep. Of all tasks
of this loop, threads and processes that miss a key at once one computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from shmcache import cache as cache_module
from shmcache import flight
from shmcache.core import _core
from shmcache.core._claims import Claim

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping
    from datetime import timedelta
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    T = TypeVar("T")
    Key = bytes | str
    Ttl = float | timedelta | None

MISSING = flight.MISSING
# Keys that this task is computing: a factory that asks for its own is not to wait for itself.
_computing: ContextVar[frozenset[tuple[int, bytes]]] = ContextVar("computing", default=frozenset())


def create(name: str, size: int | str = cache_module.DEFAULT_SIZE, **options: Any) -> Cache:
    """As shmcache.create."""
    return Cache(cache_module.create(name, size, **options))


def attach(name: str, **options: Any) -> Cache:
    """As shmcache.attach."""
    return Cache(cache_module.attach(name, **options))


def open(name: str, size: int | str | None = None, **options: Any) -> Cache:
    """As shmcache.open."""
    return Cache(cache_module.open(name, size, **options))


class Cache:
    """A shmcache.Cache, awaited. `cache.sync` is that one: for what is not here (scan, stats, verify ...), and from other threads.

    For one event loop. Methods, arguments and errors are shmcache.Cache's.
    """

    def __init__(self, sync: cache_module.Cache) -> None:
        self.sync = sync
        self._loads = sync._reads_through
        # a write of a cache that is written through, or around, is a call of the store; to write back is not
        self._stores = self._loads and type(sync).set is not _core.Table.set
        self._flights: dict[bytes, asyncio.Future[Any]] = {}

    def __repr__(self) -> str:
        return f"<shmcache.aio.Cache of {self.sync!r}>"

    # ---- reads ----

    async def get(self, key: Key, default: Any = None) -> Any:
        if not self._loads:
            return self.sync.get(key, default)
        value = self.sync.peek(key, MISSING)
        return await asyncio.to_thread(self.sync.get, key, default) if value is MISSING else value

    async def gets(self, key: Key) -> tuple[Any, int]:
        return await self._asking(self.sync.gets, key)

    async def get_many(self, keys: Iterable[Key]) -> dict[Any, Any]:
        return await self._asking(self.sync.get_many, _core.several(keys))

    async def contains(self, key: Key) -> bool:
        """key in cache."""
        return await self._asking(self.sync.__contains__, key)

    async def ttl(self, key: Key) -> float | None:
        return await self._asking(self.sync.ttl, key)

    # ---- writes ----

    async def set(self, key: Key, value: Any, ttl: Ttl = None, tags: Iterable[str] | None = None) -> None:
        await self._write(self.sync.set, key, value, ttl, tags)

    async def set_many(self, mapping: Mapping[Any, Any], ttl: Ttl = None, tags: Iterable[str] | None = None) -> None:
        await self._write(self.sync.set_many, mapping, ttl, tags)

    async def delete(self, key: Key) -> bool:
        return await self._asking(self.sync.delete, key)

    async def delete_many(self, keys: Iterable[Key]) -> int:
        return await self._asking(self.sync.delete_many, _core.several(keys))

    async def add(self, key: Key, value: Any, ttl: Ttl = None, tags: Iterable[str] | None = None) -> bool:
        return await self._asking(self.sync.add, key, value, ttl, tags)

    async def replace(self, key: Key, value: Any, ttl: Ttl = None, tags: Iterable[str] | None = None) -> bool:
        return await self._asking(self.sync.replace, key, value, ttl, tags)

    async def cas(self, key: Key, value: Any, version: int, ttl: Ttl = None, tags: Iterable[str] | None = None) -> bool:
        return await self._asking(self.sync.cas, key, value, version, ttl, tags)

    async def pop(self, key: Key, default: Any = None) -> Any:
        return await self._asking(self.sync.pop, key, default)

    async def incr(self, key: Key, n: int = 1, *, default: int | None = None, ttl: Ttl = None) -> int:
        return await self._asking(self.sync.incr, key, n, default=default, ttl=ttl)

    async def decr(self, key: Key, n: int = 1, *, default: int | None = None, ttl: Ttl = None) -> int:
        return await self._asking(self.sync.decr, key, n, default=default, ttl=ttl)

    async def touch(self, key: Key, ttl: Ttl = None) -> bool:
        return await self._asking(self.sync.touch, key, ttl)

    async def expire(self, key: Key, ttl: float | timedelta) -> bool:
        return await self._asking(self.sync.expire, key, ttl)

    async def persist(self, key: Key) -> bool:
        return await self._asking(self.sync.persist, key)

    async def invalidate_tag(self, *tags: str) -> None:
        self.sync.invalidate_tag(*tags)

    async def clear(self) -> None:
        await self._asking(self.sync.clear)

    async def flush(self, timeout: float = 30.0) -> None:
        await asyncio.to_thread(self.sync.flush, timeout)

    # ---- computed once ----

    async def get_or_set(
        self, key: Key, factory: Callable[[], Any], ttl: Ttl = None, *, lease: float = flight.LEASE, **options: Any
    ) -> Any:
        """As Cache.get_or_set. factory: called without arguments; what it returns is awaited if it can be. Options: stale_ttl, early, tags.

        If this task is cancelled while it computes, another of those who wait computes.
        """
        value = await self.get(key, MISSING)
        if value is not MISSING:
            return value
        name = _core.key_bytes(key)
        if (id(self), name) in _computing.get():
            return await _called(factory)
        while (there := self._flights.get(name)) is not None:  # a task of this loop computes it
            await asyncio.wait([there])
            if not there.cancelled() and there.exception() is None:
                return there.result()
        future = self._flights[name] = asyncio.get_running_loop().create_future()
        token = _computing.set(_computing.get() | {(id(self), name)})
        try:
            value = await self._computed(name, factory, ttl, lease, options)
            future.set_result(value)
            return value
        finally:
            _computing.reset(token)
            del self._flights[name]
            future.cancel()  # if there is no result

    async def _computed(self, name: bytes, factory: Callable[[], Any], ttl: Ttl, lease: float, options: dict[str, Any]) -> Any:
        if self._loads:  # the store is asked again, and written
            loop = asyncio.get_running_loop()

            def awaited() -> Any:
                return asyncio.run_coroutine_threadsafe(_called(factory), loop).result()

            return await asyncio.to_thread(self.sync.get_or_set, name, awaited, ttl, lease=lease, **options)
        flight.check_lease(lease)
        terms = flight.Terms(self.sync, ttl, options.get("stale_ttl"), options.get("early", 0.0), options.get("tags"))
        wait = flight.FIRST_WAIT
        with Claim(self.sync) as claim:
            steps = flight.flying(self.sync, name, lease, terms, claim)
            try:
                asked = next(steps)
                while True:
                    if asked is not flight.COMPUTE:
                        await asyncio.sleep(wait)
                        wait = min(wait * 1.5, flight.LONGEST_WAIT)
                        asked = next(steps)
                    else:
                        asked = steps.send(await _called(factory))
            except StopIteration as e:
                return e.value

    @contextlib.asynccontextmanager
    async def lock(self, name: Key, ttl: float | None = None, timeout: float | None = None) -> AsyncIterator[None]:
        """`async with cache.lock("report", ttl=30): ...`: a lock that all tasks, threads and processes of the host share.

        Raises: TimeoutError: it was not to be had for timeout seconds.
        """
        held = self.sync.lock(name, ttl)
        local = self._flights  # two tasks of one thread would be one owner
        key = b"\0lock\0" + _core.key_bytes(name)
        async with asyncio.timeout(timeout):
            while (there := local.get(key)) is not None:
                await asyncio.wait([there])
            local[key] = future = asyncio.get_running_loop().create_future()
        try:
            wait = flight.FIRST_WAIT
            async with asyncio.timeout(timeout):
                while not held.acquire(blocking=False):
                    await asyncio.sleep(wait)
                    wait = min(wait * 1.5, flight.LONGEST_WAIT)
            try:
                yield
            finally:
                held.release()
        finally:
            del local[key]
            future.cancel()

    # ---- life ----

    async def close(self) -> None:
        self.sync.close()

    async def __aenter__(self) -> Cache:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # ---- how ----

    async def _asking(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A call that may ask the store."""
        return await asyncio.to_thread(method, *args, **kwargs) if self._loads else method(*args, **kwargs)

    async def _write(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A call that asks it only if it is written through, or around."""
        return await asyncio.to_thread(method, *args, **kwargs) if self._stores else method(*args, **kwargs)


async def _called(factory: Callable[[], Any]) -> Any:
    made = factory()
    return await made if inspect.isawaitable(made) else made
