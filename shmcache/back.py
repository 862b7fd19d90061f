"""Back: set() and the like are the compiled ones, and what they write is dirty (core/dirty.pxd); who wants to know what is there loads it
first. `BackCache`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shmcache import codec, errors
from shmcache.core import _core
from shmcache.core._claims import Claims
from shmcache.stored import DELETED, MISSING, StoredCache, no_tags, seconds_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shmcache.stored import Key, Tags, Ttl


class BackCache(StoredCache):
    """A handle of a segment that writes back."""

    def delete_many(self, keys: Iterable[Key]) -> int:
        names = dict.fromkeys(_core.key_bytes(k) for k in _core.several(keys))
        unseen = [name for name in names if name[0] != 0 and self._look(name)[0] == codec.ABSENT and self.claim_version(name) == 0]
        there = self._loaded(unseen, Claims(self))
        return sum([super(StoredCache, self).delete(name) or name in there for name in names])

    def _changed(self, key: Key, change: Callable[[bytes], Any], absent: Any) -> Any:
        """What change() says, once the key is cached; MISSING is that it is not. absent: it is not in the store."""
        name = _core.key_bytes(key)
        deadline = _core.monotonic() + self.policy.timeout
        while True:
            told = change(name)
            if told is not MISSING:
                return told
            if name[0] == 0 or self.get(name, MISSING) is MISSING:
                return absent
            if _core.monotonic() > deadline:
                raise errors.StoreUnavailable("this key is in the store, but cannot be cached just now, so nothing was changed: try again")

    def replace(self, key: Key, value: Any, ttl: Ttl = None, tags: Tags = None) -> bool:
        return bool(self._changed(key, lambda name: super(BackCache, self).replace(name, value, ttl, tags) or MISSING, False))

    def touch(self, key: Key, ttl: Ttl = None) -> bool:
        if ttl is not None and seconds_of(ttl) == 0:
            return self.delete(key)
        return bool(self._changed(key, lambda name: super(BackCache, self).touch(name, ttl) or MISSING, False))

    def persist(self, key: Key) -> bool:
        return bool(self._changed(key, lambda name: super(BackCache, self).persist(name) or MISSING, False))

    def pop(self, key: Key, default: Any = None) -> Any:
        def taken(name: bytes) -> Any:
            while True:
                value, version = super(StoredCache, self).gets(name)
                if not version:
                    return MISSING
                if self._delete_version(name, version):
                    return value

        return self._changed(key, taken, default)

    def cas(self, key: Key, value: Any, version: int, ttl: Ttl = None, tags: Tags = None) -> bool:
        return super().cas(key, value, version, ttl, tags) if version else self.add(key, value, ttl, tags)

    def add(self, key: Key, value: Any, ttl: Ttl = None, tags: Tags = None) -> bool:
        name = _core.key_bytes(key)
        if name[0] == 0:
            return super().add(name, value, ttl, tags)
        no_tags(tags)
        value = self.encoded(value)
        deadline = _core.monotonic() + self.policy.timeout
        while True:
            state, _, seen = self._look(name)
            if state in (codec.FRESH, codec.STALE):
                return False
            if state == codec.NEGATIVE:  # in the place of just that: behind it another's value may have come, been stored, and evicted
                if self._add_claimed(name, value, seen, ttl, refresh=True):
                    return True
                continue
            with Claims(self) as claims:
                version = self._claim(claims, name, deadline)
                if version and version != DELETED:
                    entry = self._call(self.store.load_many, [name], timeout=self.policy.timeout).get(name)
                    self.count_store(loads=1, found=entry is not None)
                    if entry is not None:
                        self._filled(name, entry, version, None)
                        return False
                    if self._add_claimed(name, value, version, ttl) if version > 0 else super().add(name, value, ttl):
                        return True

    def incr(self, key: Key, n: int = 1, *, default: int | None = None, ttl: Ttl = None) -> int:
        def counted(name: bytes) -> Any:
            try:
                return super(BackCache, self).incr(name, n)
            except KeyError:
                return MISSING

        while (total := self._changed(key, counted, None)) is None:
            if default is None:
                raise KeyError(key)
            total = default + n
            if not -(2**63) <= total < 2**63:
                raise errors.CounterOverflow("default + n is not a signed 64-bit number: nothing was changed")
            if self.add(key, total, ttl):
                break
        return int(total)

    def clear(self) -> None:
        """As Cache.clear; what the store has not got is stored first. Raises: StoreUnavailable, and nothing is cleared."""
        self.flush()
        super().clear()
