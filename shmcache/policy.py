"""Policies: how a cache stands in front of a store, and what its writes do there. `StoredCache`, `Policy`.

    through    a write is stored, then cached
    around     a write is stored, and what was cached goes; the next miss loads it
    back       a write is cached and acknowledged; the supervisor stores it (supervisor/writeback.py)

With each a miss loads from the store, once for all processes of the host. The policy stands in the segment's header, so that no two workers
can disagree; a handle without a store reads what is cached, and is refused writes that would pass the store by.

Through and around. Who writes a key first puts a mark on it (core: Table.mark, a claim of the kind WRITING), which takes away what is
cached; then changes the store; then, if exactly his mark still stands and no other writer's was in its place, fills it with the value
(through), else deletes the key. So the cache has a value only if it is what the store has, or was what the store had when no write
that is acknowledged by now had been asked for (a fill that began before a mark finds its claim gone).

Race table
    write vs write           the later mark takes the earlier's place, counts it, and knows it: "overlapped". Neither fills; the last to end
                             takes the mark away, before he returns: nobody knows which of them the store did last
    write vs change          add, replace, cas, incr, pop, expire ... mark the key for themselves: a write waits for them, they wait for all
    write vs load            the mark voids the load's claim: its fill is refused. A load that meets a mark waits for it, then asks again;
                             if the writer is dead, or slow, it loads and does not fill
    write vs invalidate      the mark stays, with another version: its writer does not fill. clear() leaves it as it is
    the store says no, or not now         the mark goes: a miss, which loads what the store has
    the write is torn off    (unsettled; a signal handler raises; a bug of the store's) it may be going on: the mark stands till its time is
                             over, and till then each miss loads, and does not fill
    the writer dies          his mark stands till its time is over, longer than the store may work for him; till then loads do not fill
    the writer is stopped, and goes on when his mark's time is over: his mark is gone, he deletes before he returns
    a load vs a load         one has the claim, the others wait for it (flight.py); its death hands over at once
Writes that other programs do in the store are seen when an item has expired; invalidate(), tags and a ttl are for them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

import msgpack

from shmcache import codec, errors, flight
from shmcache.cache import Cache, attach, each
from shmcache.core import _core, _dirty
from shmcache.segment import parse_size
from shmcache.stores import Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from datetime import timedelta

    from shmcache.stores import Store

    Key = bytes | str
    Ttl = float | timedelta | None
    Tags = Iterable[str] | None
    # what a change makes of what is there: (value, seconds to live or None), or DELETE, or KEEP; and what its caller is told
    Change = Callable[[Entry | None], tuple[Any, Any]]

MODES = ("none", "through", "around", "back")  # by the header's number
GRACE = 5.0  # seconds that a mark stands beyond the times that waiting and storing may take
BATCH = 500  # keys in one call of the store
DELETED = -5  # of claim(): in the store, too, as soon as the supervisor comes to it
MISSING: Any = flight.MISSING
DELETE: Any = object()
KEEP: Any = object()


@dataclasses.dataclass(frozen=True)
class Policy:
    """What create() and open() take as policy=; "through" is Policy("through"). Kept in the segment.

    Args:
        mode: "through", "around" or "back".
        timeout: seconds that a call of the store may take, and that a caller waits for another's.
        negative_ttl: seconds for which it is remembered that a key is not in the store; 0: it is asked each time.
        stale_ttl: seconds beyond its ttl for which a copy is given while one caller loads it anew, or the store is down.
        flush_every: back: seconds between two passes over what is to be stored.
        dirty_limit: back: bytes, or "64M", that may wait to be stored; who would write more waits. Never over a quarter of the slab memory.
    """

    mode: str
    timeout: float = 5.0
    negative_ttl: float = 0.0
    stale_ttl: float = 0.0
    flush_every: float = 0.5
    dirty_limit: int | str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES[1:]:
            raise errors.InvalidConfig(f"policy is 'through', 'around' or 'back', not {self.mode!r}")
        for name in ("timeout", "negative_ttl", "stale_ttl", "flush_every"):
            n = getattr(self, name)
            if isinstance(n, bool) or not isinstance(n, (int, float)) or not 0 <= n < 1e6 or (n == 0 and not name.endswith("_ttl")):
                raise errors.InvalidConfig(f"{name} of a policy is a number of seconds, above 0 but for a ttl, not {n!r}")
        if self.dirty_limit is not None:
            parse_size(self.dirty_limit, "dirty_limit")

    @property
    def number(self) -> int:
        """In the header."""
        return MODES.index(self.mode)

    @property
    def dirty_bytes(self) -> int:
        """dirty_limit in bytes; 0: as much as may be."""
        return 0 if self.dirty_limit is None else parse_size(self.dirty_limit, "dirty_limit")

    def packed(self) -> bytes:
        """For the header's configuration."""
        packed: bytes = msgpack.packb({"policy": dataclasses.asdict(self)})
        return packed


def unpacked(config: bytes) -> Policy:
    """Of packed()."""
    return Policy(**msgpack.unpackb(config)["policy"])


def policy_of(mapping: _core.Mapping) -> Policy | None:
    """Of a live segment; None: it stands before no store. Raises: NotASegment if it is damaged."""
    if mapping.settings()["policy"] == 0:
        return None
    try:
        return unpacked(mapping.config)
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as e:
        raise errors.NotASegment(f"the policy in the header of {mapping.name!r} is damaged ({e}): unlink it and create it again") from None


class StoredCache(Cache):
    """A cache that stands in front of a store, by the segment's policy. Made by create(), open() and attach() with store=.

    Methods are Cache's. A miss loads. A write gets to the store, or raises what the store says (StoreUnavailable: it may have been done,
    and can be done again; StoreRefused, RowsRefused) and leaves a miss. Keys that begin with a NUL byte, and with them namespaces, locks
    and memoized results, are the cache's own. A ttl is the value's, also in the store; the segment's default_ttl is that of the cached
    copy. len(), scan() and clear() are about what is cached.

    tags: of a stored key's copies, made of the key's bytes, so that who changes the store past the cache can drop them by invalidate_tag().
    """

    def __init__(
        self, mapping: _core.Mapping, codec_name: str, trust: dict[str, Any] | None, store: Store,
        tags: Callable[[bytes], Iterable[str]] | None = None,
    ) -> None:
        super().__init__(mapping, codec_name, trust)
        policy = policy_of(mapping)
        if policy is None:
            raise errors.InvalidConfig(f"the segment {self.name!r} stands before no store: create it with policy=, or leave store= out")
        self.policy = policy
        self.store = store
        self._age = 2 * policy.timeout + GRACE  # of claims and marks: longer than to wait for another's, and then for the store
        check(policy, store, tags)
        self._tags_of = tags
        self._notes = policy.mode == "back" or policy.negative_ttl > 0 or policy.stale_ttl > 0  # there may be envelopes
        self._reads_through = True

    def __reduce__(self) -> Any:
        if self.closed:
            raise errors.CacheClosed("a closed handle cannot be pickled")
        return _reopened, (self.name, self._codec_name, self._trust, self.store, self._tags_of)

    # ---- loads ----

    def _load_missing(self, key: Key, default: Any) -> Any:
        """What get() does on a miss."""
        name = _core.key_bytes(key)
        if name[0] == 0:
            return default
        if self._notes:
            state, value, seen = self._look(name)
            if state == codec.NEGATIVE:
                return default
            if state == codec.FRESH or (state == codec.STALE and (value := self._refreshed(name, value, seen)) is not MISSING):
                return value
        deadline = time.monotonic() + self.policy.timeout
        while (version := self._claim(name, deadline)) == 0:
            value = self.peek(name, MISSING)
            if value is not MISSING:
                return value
        if version == DELETED:
            return default
        entry = self._loaded([name], {name: version}).get(name)
        return default if entry is None else entry.value

    def _refreshed(self, name: bytes, stale: Any, seen: int) -> Any:
        """A stale copy, of which one caller at a time loads another. MISSING: the store has none."""
        claimed = flight.refresh_key(name)
        version = self.claim(claimed, self._age)
        if version <= 0:
            return stale
        try:
            head = self._head(name)
            entry = self._call(self.store.load_many, [name], timeout=self.policy.timeout).get(name)
            self.count_store(loads=1, found=entry is not None)
            if entry is None:
                self.discard(name)
                return MISSING
            self._filled(name, entry, seen, head, True)
            return entry.value
        except errors.StoreUnavailable:
            return stale
        finally:
            self.unclaim(claimed, version)

    def _head(self, name: bytes) -> bytes | None:
        """The tags of a key's copy, as they are before it is loaded."""
        return None if self._tags_of is None else self._carry(self._tags_of(name))

    def _claim(self, name: bytes, deadline: float) -> int:
        """Of a missing key: a claim's version; 0: there is a value now; -1: load it, and do not fill it; DELETED.

        Raises: StoreUnavailable: somebody else has been loading it for too long.
        """
        pause = flight.waits(deadline)
        while True:
            version = self.claim(name, self._age)
            if version >= 0 or version == DELETED:
                return version
            if version in (-2, -4):  # the load of this very key asks for it; its writer is dead
                return -1
            if next(pause, "late"):
                if version == -3:
                    return -1
                raise errors.StoreUnavailable(f"another caller has been loading this key for {self.policy.timeout} s: try again")

    def _loaded(self, names: list[bytes], claims: dict[bytes, int]) -> dict[bytes, Entry]:
        """What the store has of names, with which those of claims are filled. Claims are given back whatever happens."""
        try:
            found: dict[bytes, Entry] = {}
            refused: dict[bytes, Exception] = {}
            heads = {name: self._head(name) for name in claims}
            for i in range(0, len(names), BATCH):
                found.update(self._call(self._load_some, names[i : i + BATCH], refused))
            self.count_store(loads=len(names), found=len(found))
            for name, version in list(claims.items()):
                entry = found.get(name)
                if entry is None and self.policy.negative_ttl and version > 0 and name not in refused:
                    if self._put_negative(name, self.policy.negative_ttl, version):
                        del claims[name]
                elif entry is not None and self._filled(name, entry, version, heads[name]):
                    del claims[name]
            if refused:
                raise next(iter(refused.values())) if len(names) == 1 else errors.RowsRefused(refused)
            return found
        finally:
            for name, version in claims.items():
                if version > 0:
                    self.unclaim(name, version)

    def _is_negative(self, name: bytes) -> bool:
        """Is it remembered that this key is not in the store?"""
        return self._notes and self._look(name)[0] == codec.NEGATIVE

    def _load_some(self, names: list[bytes], refused: dict[bytes, Exception]) -> dict[bytes, Entry]:
        try:
            return self.store.load_many(names, timeout=self.policy.timeout)
        except errors.RowsRefused as e:
            refused |= e.errors
            rest = [name for name in names if name not in e.errors]
            return self._load_some(rest, refused) if rest and len(rest) < len(names) else {}

    def _filled(self, name: bytes, entry: Entry, version: int, head: bytes | None, refresh: bool = False) -> bool:
        """Fill a claim or a mark with what the store has. False: it does not stand any more, or this cannot be cached."""
        if version <= 0:
            return False
        try:
            return self.fill_claim(name, entry.value, version, entry.ttl, head, self.policy.stale_ttl or None, 0, refresh)
        except (errors.UnsupportedValue, errors.ValueTooLarge, errors.InvalidTTL, errors.CapacityError):
            return False  # who asked gets it all the same

    def _call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call of the store, counted if it fails."""
        try:
            return call(*args, **kwargs)
        except BaseException:
            if not self.closed:
                self.count_store(errors=1)
            raise

    def get_many(self, keys: Iterable[Key]) -> dict[Any, Any]:
        wanted = list(keys)
        found = super().get_many(wanted)
        missing = {_core.key_bytes(k): k for k in wanted if k not in found}
        claims: dict[bytes, int] = {}
        later = []
        for name in sorted(missing):
            if name[0] == 0:
                continue
            state = self._look(name)[0] if self._notes else codec.ABSENT
            if state == codec.NEGATIVE:
                continue
            version = self.claim(name, self._age) if state == codec.ABSENT else 0
            if version > 0:
                claims[name] = version
            else:
                later.append(name)
        values = {name: e.value for name, e in self._loaded(list(claims), claims).items()} if claims else {}
        for name in later:  # there is a stale one, or somebody else loads or writes them: one by one, for each may be waited for
            value = self.get(name, MISSING)
            if value is not MISSING:
                values[name] = value
        for k in wanted:
            if k not in found and (name := _core.key_bytes(k)) in values:
                found[k] = values[name]
        return found

    def gets(self, key: Key) -> tuple[Any, int]:
        """As Cache.gets. The version is the cached copy's: after an eviction cas() finds another one."""
        name = _core.key_bytes(key)
        deadline = time.monotonic() + self.policy.timeout
        while True:
            value, version = super().gets(name)
            if version or name[0] == 0 or self.get(name, MISSING) is MISSING:
                return value, version
            if time.monotonic() > deadline:
                raise errors.StoreUnavailable("this key is there, but cannot be cached just now, so it has no version: try again")

    def __contains__(self, key: Key) -> bool:
        return self.get(key, MISSING) is not MISSING

    def ttl(self, key: Key) -> float | None:
        """As Cache.ttl; of a key that is not cached, or cannot be, as the store says."""
        name = _core.key_bytes(key)
        ttl = super().ttl(name)
        if ttl is None and name[0] != 0 and not self._is_negative(name):
            version = self.claim(name, self._age)
            entry = None if version == DELETED else self._loaded([name], {name: version}).get(name)
            if entry is not None:
                return math.inf if entry.ttl is None else entry.ttl
        return ttl

    def get_or_set(self, key: Key, factory: Callable[[], Any], ttl: Ttl = None, **options: Any) -> Any:
        """As Cache.get_or_set, for a key that the store has not either: factory()'s value is stored. Options: lease alone."""
        if not _is_own(key) and options.keys() - {"lease"}:
            raise errors.UsageError("in front of a store stale_ttl is the policy's, and tags are open()'s: leave them, and early, out here")
        return super().get_or_set(key, factory, ttl, **options)

    def _fill_computed(self, key: Key, value: Any, version: int, terms: flight.Terms, refresh: bool) -> bool:
        return super()._fill_computed(key, value, version, terms, refresh) if _is_own(key) else self.add(key, value, terms.ttl)

    # ---- all of it ----

    def delete(self, key: Key) -> bool:
        return self.delete_many([key]) == 1

    def __delitem__(self, key: Key) -> None:
        if not self.delete(key):
            raise KeyError(key)


class ThroughCache(StoredCache):
    """Through and around: who writes changes the store."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._fills = self.policy.mode == "through"

    # ---- writes ----

    def set(self, key: Key, value: Any, ttl: Ttl = None, tags: Tags = None) -> None:
        name = _core.key_bytes(key)
        if name[0] == 0:
            super().set(name, value, ttl, tags)
        else:
            _no_tags(tags)
            self._write({name: value}, _seconds(ttl))

    def __setitem__(self, key: Key, value: Any) -> None:
        self.set(key, value)

    def set_many(self, mapping: Mapping[Any, Any] | Iterable[tuple[Key, Any]], ttl: Ttl = None, tags: Tags = None) -> None:
        """As Cache.set_many; in the store as few calls, each a transaction where it has them."""
        values = {_core.key_bytes(k): v for k, v in (mapping.items() if hasattr(mapping, "items") else mapping)}
        own = {k: v for k, v in values.items() if k[0] == 0}
        if own.keys() != values.keys():
            _no_tags(tags)
        if own:
            super().set_many(own, ttl, tags)
        names = sorted(values.keys() - own.keys())
        seconds = _seconds(ttl)
        for name in names:
            self.encoded(values[name])  # all, before the first is stored
        self._write_all({name: values[name] for name in names}, seconds)

    def delete_many(self, keys: Iterable[Key]) -> int:
        names = dict.fromkeys(_core.key_bytes(k) for k in keys)
        there = super().delete_many([name for name in names if name[0] == 0])
        stored = sorted(name for name in names if name[0] != 0)
        unseen = [name for name in stored if self.peek(name, MISSING) is MISSING]
        there += len(stored) - len(unseen) + len(self._loaded(unseen, {}))
        self._write_all(dict.fromkeys(stored, DELETE), None)
        return there

    def _write_all(self, values: dict[bytes, Any], ttl: float | None) -> None:
        """_write() in batches; what the store refuses of one does not keep it from the others."""
        refused: dict[bytes, Exception] = {}
        names = list(values)
        for i in range(0, len(names), BATCH):
            try:
                self._write({name: values[name] for name in names[i : i + BATCH]}, ttl)
            except errors.RowsRefused as e:
                refused |= e.errors
        if refused:
            raise errors.RowsRefused(refused)

    def _write(self, values: dict[bytes, Any], ttl: float | None) -> None:
        """Store those values, or delete where it is DELETE (all, or none of them)."""
        encoded = {name: value if value is DELETE else self.encoded(value) for name, value in values.items()}
        deadline = time.monotonic() + self.policy.timeout
        marks: dict[bytes, int] = {}  # 0: overlapped
        heads = {name: self._head(name) for name in values} if self._fills else {}
        known = True
        try:
            for name in sorted(values):
                marks[name] = self._mark(name, deadline, alone=False)
            known = False
            self._store(values, ttl)
            known = True
            if self._fills and ttl != 0:
                for name, value in encoded.items():
                    if value is not DELETE and self._filled(name, Entry(value, ttl), marks[name], heads[name]):
                        del marks[name]
        except errors.ShmcacheError as e:
            known = known or knows(e)
            raise
        finally:
            self._end(marks, known)

    def _end(self, names: Iterable[bytes], known: bool) -> None:
        """Of writes that have not filled their marks. Not known: whether the store has done it, or will."""
        def end(name: bytes) -> None:
            self.end_mark(name, known)
            self.discard(name)  # if the mark was not there any more, what was loaded meanwhile may be older

        each(names, end)

    def _mark(self, name: bytes, deadline: float, alone: bool, version: int = 0) -> int:
        """Put a mark on a key: its version, 0 if another's was there, -1: the key has not this version.

        Raises: StoreUnavailable: who has the key for himself, or (alone) whoever writes it, takes too long.
        """
        pause = flight.waits(deadline)
        while True:
            mark, overlapped = self.mark(name, self._age, alone, version)
            if mark:
                return 0 if overlapped and mark > 0 else mark
            if next(pause, "late"):
                raise errors.StoreUnavailable(
                    f"another caller has been writing this key for {self.policy.timeout} s: nothing was changed; try again"
                )

    def _store(self, values: dict[bytes, Any], ttl: float | None) -> None:
        gone = [name for name, value in values.items() if value is DELETE or ttl == 0]
        kept = {name: (value, ttl) for name, value in values.items() if name not in gone} if len(gone) < len(values) else {}
        if gone:
            self._call(self.store.delete_many, gone, timeout=self.policy.timeout)
        if kept:
            self._call(self.store.store_many, kept, timeout=self.policy.timeout)
        self.count_store(writes=len(values))

    # ---- changes of what is there ----

    def _change(self, key: Key, change: Change, version: int = 0) -> Any:
        """Let change() make something else of what the store has, with nobody between: what it tells. MISSING: another version."""
        name = _core.key_bytes(key)
        deadline = time.monotonic() + self.policy.timeout
        mark = self._mark(name, deadline, True, version)
        if mark < 0:
            return MISSING
        filled, known = False, True
        try:
            head = self._head(name)
            was = self._call(self.store.load_many, [name], timeout=self.policy.timeout).get(name)
            now, told = change(was)
            if now is KEEP:
                now = was
            else:
                known = False
                if now is DELETE:
                    self._store({name: DELETE}, None)
                else:
                    self._store({name: now.value}, now.ttl)
                known = True
            if isinstance(now, Entry) and now.ttl != 0 and (self._fills or now is was):
                filled = self._filled(name, now, mark, head)
            return told
        except errors.ShmcacheError as e:
            known = known or knows(e)
            raise
        finally:
            if not filled:
                self._end([name], known)

    def add(self, key: Key, value: Any, ttl: Ttl = None, tags: Tags = None) -> bool:
        if _is_own(key):
            return super().add(key, value, ttl, tags)
        _no_tags(tags)
        new = Entry(value, _seconds(ttl))
        self.encoded(value)
        return bool(self._change(key, lambda was: (new, True) if was is None else (KEEP, False)))

    def replace(self, key: Key, value: Any, ttl: Ttl = None, tags: Tags = None) -> bool:
        if _is_own(key):
            return super().replace(key, value, ttl, tags)
        _no_tags(tags)
        new = Entry(value, _seconds(ttl))
        self.encoded(value)
        return bool(self._change(key, lambda was: (KEEP, False) if was is None else (new, True)))

    def cas(self, key: Key, value: Any, version: int, ttl: Ttl = None, tags: Tags = None) -> bool:
        if _is_own(key):
            return super().cas(key, value, version, ttl, tags)
        _no_tags(tags)
        if not version:
            return self.add(key, value, ttl)
        new = Entry(value, _seconds(ttl))
        self.encoded(value)
        return self._change(key, lambda was: (new, True), version) is True

    def pop(self, key: Key, default: Any = None) -> Any:
        if _is_own(key):
            return super().pop(key, default)
        return self._change(key, lambda was: (KEEP, default) if was is None else (DELETE, was.value))

    def incr(self, key: Key, n: int = 1, *, default: int | None = None, ttl: Ttl = None) -> int:
        if _is_own(key):
            return super().incr(key, n, default=default, ttl=ttl)
        if not isinstance(n, int) or not (default is None or isinstance(default, int)):
            raise errors.NotANumber("incr and decr take an int to add, and an int or None as default")
        seconds = _seconds(ttl)

        def count(was: Entry | None) -> tuple[Any, int]:
            if was is None and default is None:
                raise KeyError(key)
            base, left = (default, seconds) if was is None else was
            if type(base) is not int:
                raise errors.NotANumber("the value of this key was not set as an int: set it to one first")
            if not -(2**63) <= base + n < 2**63:
                raise errors.CounterOverflow("the counter would leave the signed 64-bit range; it keeps its value")
            return Entry(base + n, left), base + n

        return int(self._change(key, count))

    def touch(self, key: Key, ttl: Ttl = None) -> bool:
        if _is_own(key):
            return super().touch(key, ttl)
        seconds = _seconds(ttl)
        if seconds == 0:
            return self.delete(key)
        return bool(self._change(key, lambda was: (KEEP, False) if was is None else (Entry(was.value, seconds), True)))

    def persist(self, key: Key) -> bool:
        return super().persist(key) if _is_own(key) else self.touch(key)


class BackCache(StoredCache):
    """Back: set() and the like are the compiled ones, and what they write is dirty; who wants to know what is there loads it first."""

    def delete_many(self, keys: Iterable[Key]) -> int:
        names = dict.fromkeys(_core.key_bytes(k) for k in keys)
        unseen = [name for name in names if name[0] != 0 and self._look(name)[0] == codec.ABSENT and self.claim_version(name) == 0]
        there = self._loaded(unseen, {})
        return sum([super(StoredCache, self).delete(name) or name in there for name in names])

    def _changed(self, key: Key, change: Callable[[bytes], Any], absent: Any) -> Any:
        """What change() says, once the key is cached; MISSING is that it is not. absent: it is not in the store."""
        name = _core.key_bytes(key)
        deadline = time.monotonic() + self.policy.timeout
        while True:
            told = change(name)
            if told is not MISSING:
                return told
            if name[0] == 0 or self.get(name, MISSING) is MISSING:
                return absent
            if time.monotonic() > deadline:
                raise errors.StoreUnavailable("this key is in the store, but cannot be cached just now, so nothing was changed: try again")

    def replace(self, key: Key, value: Any, ttl: Ttl = None, tags: Tags = None) -> bool:
        return bool(self._changed(key, lambda name: super(BackCache, self).replace(name, value, ttl, tags) or MISSING, False))

    def touch(self, key: Key, ttl: Ttl = None) -> bool:
        if ttl is not None and _seconds(ttl) == 0:
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
        _no_tags(tags)
        value = self.encoded(value)
        deadline = time.monotonic() + self.policy.timeout
        while True:
            state, _, seen = self._look(name)
            if state in (codec.FRESH, codec.STALE):
                return False
            if state == codec.NEGATIVE:  # in the place of just that: behind it another's value may have come, been stored, and evicted
                if self._add_claimed(name, value, seen, ttl, refresh=True):
                    return True
                continue
            version = self._claim(name, deadline)
            if version and version != DELETED:
                try:
                    entry = self._call(self.store.load_many, [name], timeout=self.policy.timeout).get(name)
                    self.count_store(loads=1, found=entry is not None)
                    if entry is not None:
                        self._filled(name, entry, version, None)
                        return False
                    if self._add_claimed(name, value, version, ttl) if version > 0 else super().add(name, value, ttl):
                        return True
                finally:
                    if version > 0:
                        self.unclaim(name, version)

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


def store_stats(cache: Cache) -> dict[str, Any]:
    """stats()["store"] of any handle on a segment that has a policy."""
    policy = policy_of(cache.mapping)
    assert policy is not None
    figures: dict[str, Any] = {"policy": policy.mode, **cache.store_counters()}
    if policy.mode == "back":
        header, now = cache.segment.header, time.time() * 1000

        def since(field: str) -> float | None:
            at = int(header[field])
            return max(0.0, now - at) / 1000 if at else None

        figures |= {
            "dirty_items": _dirty.Dirty(cache).items(), "dirty_bytes": int(header["dirty"]), "oldest_s": since("oldest_dirty_ms"),
            "failing_s": since("flush_failed_ms"), "refused": int(header["flush_refused"]),
        }  # fmt: skip
    return figures


def check(policy: Policy, store: Store, tags: Callable[[bytes], Iterable[str]] | None = None) -> None:
    """Do they go together? Raises: InvalidConfig."""
    if policy.mode == "back" and tags is not None:
        raise errors.InvalidConfig("what is written back has no tags: take policy='through', or leave tags= out")
    if policy.mode == "back" and not store.ordered:
        raise errors.InvalidConfig(
            "write-back needs a store that takes versions, or what a killed supervisor had begun could undo newer writes: "
            "give SQLStore version_column=, or take policy='through'"
        )


def handle(
    mapping: _core.Mapping, codec_name: str, trust: dict[str, Any], store: Store, tags: Callable[[bytes], Iterable[str]] | None
) -> StoredCache:
    """A cache on a segment and its store. Raises: InvalidConfig: the segment has no policy, or not one for this store."""
    policy = policy_of(mapping)
    kind = BackCache if policy is not None and policy.mode == "back" else ThroughCache
    return kind(mapping, codec_name, trust, store, tags)


def _reopened(
    name: str, codec_name: str, trust: dict[str, Any], store: Store, tags: Callable[[bytes], Iterable[str]] | None
) -> Cache:
    return attach(name, codec=codec_name, store=store, tags=tags, **trust)


def knows(e: errors.ShmcacheError) -> bool:
    """Does who got this of a store's write know that nothing of it is to come? It is the store's word, not a signal's or a stranger's."""
    return not (isinstance(e, errors.StoreUnavailable) and e.unsettled)


def _no_tags(tags: Tags) -> None:
    if tags is not None:
        raise errors.UsageError("a copy that is loaded again would not have these tags: give open() tags=, a function of the key, instead")


def _is_own(key: Key) -> bool:
    return _core.key_bytes(key)[0] == 0


def _seconds(ttl: Ttl) -> float | None:
    """Raises: InvalidTTL."""
    return None if ttl is None else _core.seconds(ttl)
