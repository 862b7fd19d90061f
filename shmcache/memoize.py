"""A function's results, kept by its arguments and computed once per host."""

from __future__ import annotations

import functools
from hashlib import blake2b

from shmcache import errors
from shmcache.flight import MISSING, Terms, get_or_set

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import timedelta
    from typing import Any

    from shmcache.cache import Cache


def memoize(
    cache: Cache, ttl: float | timedelta | None, name: str | None, lease: float, stale_ttl: float | timedelta | None, early: float | bool,
    tags: Iterable[str] | Callable[..., Iterable[str]] | None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Cache.memoize."""
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
            key = cache_key(*args, **kwargs)
            value = cache.get(key, MISSING)
            if value is not MISSING:
                return value
            terms = Terms(cache, ttl, stale_ttl, early, tags(*args, **kwargs) if callable(tags) else tags)
            return get_or_set(cache, key, lambda: function(*args, **kwargs), lease, terms)

        wrapper.cache_key = cache_key  # type: ignore[attr-defined]
        wrapper.forget = lambda *args, **kwargs: cache.delete(cache_key(*args, **kwargs))  # type: ignore[attr-defined]
        return wrapper

    return decorate
