"""Back: set() and the like are the compiled ones, and what they write is dirty (core/dirty.pxd); who wants to know what is there loads it
first. `BackCache`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shmcache import codec, errors, flight
from shmcache.core import _core
from shmcache.core._claims import Claims
from shmcache.flight import flushing, in_room, steps
from shmcache.stored import LOADED_ANEW, MISSING, StoredCache, is_over, just_now, no_tags, seconds_of, waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shmcache.stored import Key, Steps, Tags, Ttl


class BackCache(StoredCache):
    """A handle of a segment that writes back."""

    @waiting
    def delete_many(self, keys: Iterable[Key]) -> Steps[int]:
        names = dict.fromkeys(_core.key_bytes(k) for k in _core.several(keys))
        unseen = [name for name in names if name[0] != 0 and self._look(name)[0] == codec.ABSENT and self.claim_version(name) == 0]
        there = yield from steps(self._loaded, unseen, Claims(self))
        n = 0
        for name in names:
            n += (yield from in_room(self, super(StoredCache, self).delete, name)) or name in there
        return n

    def _changed(self, key: Key, change: Callable[[bytes], Any], absent: Any) -> Steps[Any]:
        """What change() says, once the key is cached; MISSING is that it is not. absent: it is not in the store.

        Raises: why what the store has cannot be cached: nothing was changed.
        """
        name = _core.key_bytes(key)
        deadline = _core.monotonic() + self.policy.timeout
        while True:
            told = yield from in_room(self, change, name)
            if told is not MISSING:
                return told
            entry, why = (None, None) if name[0] == 0 else (yield from self._found(name))
            if entry is None:
                return absent
            if why is not None and why is not LOADED_ANEW:
                raise why
            if _core.monotonic() > deadline:
                raise just_now()
            if why is not None:
                yield flight.WAIT

    @waiting
    def replace(self, key: Key, value: Any, ttl: Ttl = None, tags: Tags = None) -> Steps[bool]:
        return bool((yield from self._changed(key, lambda name: super(BackCache, self).replace(name, value, ttl, tags) or MISSING, False)))

    @waiting
    def touch(self, key: Key, ttl: Ttl = None) -> Steps[bool]:
        if ttl is not None and seconds_of(ttl) == 0:
            return (yield from steps(self.delete, key))
        return bool((yield from self._changed(key, lambda name: super(BackCache, self).touch(name, ttl) or MISSING, False)))

    @waiting
    def persist(self, key: Key) -> Steps[bool]:
        return bool((yield from self._changed(key, lambda name: super(BackCache, self).persist(name) or MISSING, False)))

    @waiting
    def pop(self, key: Key, default: Any = None) -> Steps[Any]:
        def taken(name: bytes) -> Any:
            while True:
                value, version = super(StoredCache, self).gets(name)
                if not version:
                    return MISSING
                if self._delete_version(name, version):
                    return value

        return (yield from self._changed(key, taken, default))

    @waiting
    def cas(self, key: Key, value: Any, version: int, ttl: Ttl = None, tags: Tags = None) -> Steps[bool]:
        if not version:
            return (yield from steps(self.add, key, value, ttl, tags))
        return (yield from in_room(self, super().cas, key, value, version, ttl, tags))

    @waiting
    def add(self, key: Key, value: Any, ttl: Ttl = None, tags: Tags = None) -> Steps[bool]:
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
            if state == codec.NEGATIVE:
                if (yield from self._added(name, value, seen, ttl, True)) is True:
                    return True
                continue
            with Claims(self) as claims:
                version = yield from self._claim(claims, name, deadline, to_load=False)
                if version == -1:  # a get_or_set of this very key asks for it, by its factory
                    version = self.claim_version(name, True)
                    if not version and _core.monotonic() > deadline:
                        raise errors.StoreUnavailable(
                            "another caller has been busy with this key for too long: nothing was changed; try again"
                        )
                if version > 0 and (told := (yield from self._added(name, value, version, ttl, False))) is not MISSING:
                    return bool(told)

    def _added(self, name: bytes, value: Any, version: int, ttl: Ttl, deleted: bool) -> Steps[Any]:
        if not deleted:
            entry = yield from self._one(name)
            if entry is not None and not is_over(entry):
                self._filled(name, entry, version, None)
                return False
        # in the place of just that: behind it another's value may have come, been stored, and evicted
        return (yield from in_room(self, self._add_claimed, name, value, version, ttl, refresh=deleted)) or MISSING

    @waiting
    def incr(self, key: Key, n: int = 1, *, default: int | None = None, ttl: Ttl = None) -> Steps[int]:
        def counted(name: bytes) -> Any:
            try:
                return super(BackCache, self).incr(name, n)
            except KeyError:
                return MISSING

        while (total := (yield from self._changed(key, counted, None))) is None:
            if default is None:
                raise KeyError(key)
            total = default + n
            if not -(2**63) <= total < 2**63:
                raise errors.CounterOverflow("default + n is not a signed 64-bit number: nothing was changed")
            if (yield from steps(self.add, key, total, ttl)):
                break
        return int(total)

    @waiting
    def clear(self) -> Steps[None]:
        """As Cache.clear; what the store has not got is stored first. Raises: StoreUnavailable, and nothing is cleared."""
        yield from flushing(self, 30.0)
        super().clear()
