"""Single flight: a missing value is computed once per host, not once per worker; and locks across processes by the same means.

Who misses claims the key (core: Table.claim): an item without a value that carries the claimer's token. Others see a miss with a claim
on it and wait; who claims next after the claimer's death takes over. The claim's version is the lease: the fill succeeds only if exactly
that claim still stands, so a set, delete, clear or take-over in the meantime wins over what was computed from older data.

Race table
    claim vs claim            the stripe decides; the loser waits
    fill vs set / delete      set or delete first: the claim is gone, the fill is refused, its caller gets the computed value all the same
                              fill first: set replaces it, delete removes it
    fill vs take-over         a claim older than `lease` seconds is void: the late fill is refused
    the claimer dies          the kernel drops its row's lock; the next waiter to look takes over. A thread that ends without a fill
                              (its process lives) gives its claim back in `finally`; else `lease` bounds it
    fork while a claim is held: the child has another token: it fills and releases none of its parent's
    a factory asks its own key again: computed at once, not stored; waiting would be for itself
"""

from __future__ import annotations

import time

from shmcache import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta
    from typing import Any

    from shmcache.cache import Cache

FIRST_WAIT = 0.0002  # seconds; half as long again each time
LONGEST_WAIT = 0.016
LEASE = 60.0
FOREVER = 3e9  # seconds; a ttl that outlives the segment, whatever its default
LOCK_PREFIX = b"\x00lock\x00"
MISSING: Any = object()


def waits(deadline: float | None) -> Any:
    """Sleep in growing slices, once per next(); ends when the deadline (monotonic) has come."""
    wait = FIRST_WAIT
    while deadline is None or time.monotonic() < deadline:
        time.sleep(wait if deadline is None else max(0.0, min(wait, deadline - time.monotonic())))
        wait = min(wait * 1.5, LONGEST_WAIT)
        yield


def get_or_set(cache: Cache, key: bytes | str, factory: Callable[[], Any], ttl: float | timedelta | None, lease: float) -> Any:
    """Cache.get_or_set, after the first miss."""
    if not 0 < lease < 1e9:
        raise errors.InvalidTTL(f"lease is a number of seconds above 0, not {lease!r}")
    pause = waits(None)
    version = 0
    try:
        while (version := cache.claim(key, lease)) <= 0:
            if version == -2:
                return factory()
            if version == -1:
                next(pause)
            elif (value := cache.get(key, MISSING)) is not MISSING:
                return value
        value = factory()
        if cache._keep(key, value, version, ttl):
            version = 0
        return value
    finally:
        if version > 0:
            cache.unclaim(key, version)


def memoize(
    cache: Cache, ttl: float | timedelta | None, name: str | None, lease: float
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Cache.memoize."""
    import functools  # here: a worker that memoizes nothing does not pay for them
    from hashlib import blake2b

    if callable(ttl):
        raise errors.UsageError("memoize is called: @cache.memoize() or @cache.memoize(ttl=60)")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        prefix = (name or f"{function.__module__}.{function.__qualname__}").encode()

        def cache_key(*args: Any, **kwargs: Any) -> bytes:
            codec, payload = cache._encode((args, tuple(sorted(kwargs.items()))))
            digest = blake2b(payload, digest_size=20, person=b"memoize", salt=bytes([codec])).digest()
            return b"\x00memo\x00" + prefix + b"\x00" + digest

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return cache.get_or_set(cache_key(*args, **kwargs), lambda: function(*args, **kwargs), ttl, lease=lease)

        wrapper.cache_key = cache_key  # type: ignore[attr-defined]
        wrapper.forget = lambda *args, **kwargs: cache.delete(cache_key(*args, **kwargs))  # type: ignore[attr-defined]
        return wrapper

    return decorate


class Lock:
    """A lock that threads of all processes of the host share, by name. Not re-entrant; given back by with, release() or its owner's death.

    It is an item that is never evicted and that clear() leaves alone. One Lock object is for one thread at a time.
    """

    def __init__(self, cache: Cache, name: bytes | str, ttl: float | None) -> None:
        if ttl is not None and not 0 < ttl < 1e9:
            raise errors.InvalidTTL(f"the ttl of a lock is a number of seconds above 0, or None, not {ttl!r}")
        self._cache = cache
        self._key = LOCK_PREFIX + (name.encode() if isinstance(name, str) else name)
        self._ttl = ttl or 0.0
        self._version = 0

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take it: True. False if it is taken and blocking is False, or after timeout seconds.

        Raises: UsageError if this object or this thread holds it already.
        """
        if self._version and self.owned():
            raise errors.UsageError("this Lock is held already: it is not re-entrant")
        pause = waits(None if timeout is None else time.monotonic() + timeout)
        while True:
            version = self._cache.claim(self._key, self._ttl, True)
            if version > 0:
                self._version = version
                return True
            if version == -2:
                raise errors.UsageError("this thread holds the lock already, by another Lock object")
            if not blocking or next(pause, "late"):
                return False

    def release(self) -> None:
        """Give it back. Raises: UsageError if it is not held, or not any more (its ttl was over)."""
        version, self._version = self._version, 0
        if not version or not self._cache.unclaim(self._key, version):
            raise errors.UsageError("the lock is not held by this object (any more): its ttl was over, or release() was called twice")

    def owned(self) -> bool:
        """Does this object hold it still?"""
        return self._version != 0 and self._cache.claim_version(self._key, True) == self._version

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()
