"""Namespaces: keys of their own, and a clear() of their own that costs one write; and the generations by which that, and tags, are done.

A namespace has a generation, a random number under a key of the cache (core/databases.pxd); every key carries it. clear() stores another
one: what carries the old one is never found again, and goes as the CLOCK hand meets it. A tag has a generation, too, which the item
carries instead of its key (core/envelope.pxd). A generation that was evicted is replaced by a new random one: a namespace or a tag may lose
what is in it, it never sees again what was cleared. While a segment is restored generations come first, and whoever needs one waits for
them, a second at most.
"""

from __future__ import annotations

from shmcache import errors, flight
from shmcache.core import _core

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from datetime import timedelta
    from typing import Any

    from shmcache.cache import Cache

    Key = bytes | str
    Ttl = float | timedelta | None

PREFIX = b"\x00ns\x00"
LONGEST_NAME = 200  # bytes


class Namespace:
    """A part of a cache, with the cache's operations on keys, and clear(). Made by cache.namespace(name)."""

    def __init__(self, cache: Cache, name: Key) -> None:
        try:
            self._generation_key = _core.own_key(PREFIX, name, "the name of a namespace", LONGEST_NAME)
        except errors.InvalidKey as e:
            raise errors.InvalidNamespace(str(e)) from None
        if b"\x00" in self._generation_key[len(PREFIX) :]:  # which ends it in the keys of what is in it
            raise errors.InvalidNamespace(f"the name of a namespace has no NUL byte, as {name!r} has: use another")
        self.cache = cache
        self.name = name

    def prefix(self) -> bytes:
        """What its keys begin with in the cache, till the next clear()."""
        return self._generation_key + b"\x00" + self.cache._generation(self._generation_key)

    def _key(self, key: Key) -> bytes:
        own: bytes = _core.own_key(self.prefix(), key, "a key in a namespace")
        return own

    def _keys(self, keys: Iterable[Key]) -> list[tuple[Key, bytes]]:
        """Several keys, each as passed and as it is in the cache."""
        prefix = self.prefix()
        return [(key, _core.own_key(prefix, key, "a key in a namespace")) for key in _core.several(keys)]

    def clear(self) -> None:
        """Remove everything in the namespace, for everybody, in one step."""
        self.cache._renew(self._generation_key)

    def get(self, key: Key, default: Any = None) -> Any:
        return self.cache.get(self._key(key), default)

    def gets(self, key: Key) -> tuple[Any, int]:
        return self.cache.gets(self._key(key))

    def set(self, key: Key, value: Any, ttl: Ttl = None, tags: Iterable[str] | None = None) -> None:
        self.cache.set(self._key(key), value, ttl, tags)

    def add(self, key: Key, value: Any, ttl: Ttl = None, tags: Iterable[str] | None = None) -> bool:
        return self.cache.add(self._key(key), value, ttl, tags)

    def replace(self, key: Key, value: Any, ttl: Ttl = None, tags: Iterable[str] | None = None) -> bool:
        return self.cache.replace(self._key(key), value, ttl, tags)

    def cas(self, key: Key, value: Any, version: int, ttl: Ttl = None, tags: Iterable[str] | None = None) -> bool:
        return self.cache.cas(self._key(key), value, version, ttl, tags)

    def delete(self, key: Key) -> bool:
        return self.cache.delete(self._key(key))

    def pop(self, key: Key, default: Any = None) -> Any:
        return self.cache.pop(self._key(key), default)

    def incr(self, key: Key, n: int = 1, *, default: int | None = None, ttl: Ttl = None) -> int:
        return self.cache.incr(self._key(key), n, default=default, ttl=ttl)

    def decr(self, key: Key, n: int = 1, *, default: int | None = None, ttl: Ttl = None) -> int:
        return self.cache.decr(self._key(key), n, default=default, ttl=ttl)

    def touch(self, key: Key, ttl: Ttl = None) -> bool:
        return self.cache.touch(self._key(key), ttl)

    def expire(self, key: Key, ttl: float | timedelta) -> bool:
        return self.cache.expire(self._key(key), ttl)

    def persist(self, key: Key) -> bool:
        return self.cache.persist(self._key(key))

    def ttl(self, key: Key) -> float | None:
        return self.cache.ttl(self._key(key))

    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        wanted = self._keys(keys)
        found = self.cache.get_many([own for _, own in wanted])
        return {key: found[own] for key, own in wanted if own in found}

    def set_many(self, mapping: Mapping[Key, Any], ttl: Ttl = None, tags: Iterable[str] | None = None) -> None:
        prefix = self.prefix()
        own = [(_core.own_key(prefix, key, "a key in a namespace"), value) for key, value in _core.pairs(mapping)]
        self.cache.set_many(own, ttl, tags)

    def delete_many(self, keys: Iterable[Key]) -> int:
        return self.cache.delete_many([own for _, own in self._keys(keys)])

    def get_or_set(
        self, key: Key, factory: Callable[[], Any], ttl: Ttl = None, *, lease: float = flight.LEASE, stale_ttl: Ttl = None,
        early: float | bool = 0.0, tags: Iterable[str] | None = None,
    ) -> Any:
        return self.cache.get_or_set(self._key(key), factory, ttl, lease=lease, stale_ttl=stale_ttl, early=early, tags=tags)

    def get_lease(self, key: Key, seconds: float = flight.LEASE, tags: Iterable[str] | None = None) -> flight.Lease:
        return self.cache.get_lease(self._key(key), seconds, tags)

    def fill(self, lease: flight.Lease, value: Any, ttl: Ttl = None, tags: Iterable[str] = ()) -> bool:
        return self.cache.fill(lease, value, ttl, tags)

    def release(self, lease: flight.Lease) -> bool:
        return self.cache.release(lease)

    def scan(self, prefix: Key = b"") -> Iterator[bytes]:
        """The keys, as bytes, that begin with prefix: as they are in the namespace."""
        own = self.prefix()
        n = len(own)
        return (key[n:] for key in self.cache._scan(own + _core.prefix_bytes(prefix)))

    def __getitem__(self, key: Key) -> Any:
        return self.cache[self._key(key)]

    def __setitem__(self, key: Key, value: Any) -> None:
        self.cache[self._key(key)] = value

    def __delitem__(self, key: Key) -> None:
        del self.cache[self._key(key)]

    def __contains__(self, key: Key) -> bool:
        return self._key(key) in self.cache

    def __repr__(self) -> str:
        return f"<shmcache.Namespace {self.name!r} of {self.cache!r}>"
