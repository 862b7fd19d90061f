"""Through and around: who writes changes the store. `ThroughCache`.

Who writes a key first puts a mark on it (core: Table.mark, a claim of the kind WRITING), which takes away what is cached; then changes the
store; then, if exactly his mark still stands and no other writer's was in its place, fills it with the value (through), else deletes the
key. So the cache has a value only if it is what the store has, or was what the store had when no write that is acknowledged by now had
been asked for (a fill that began before a mark finds its claim gone).

Race table
    write vs write           the later mark takes the earlier's place, names its writers, and knows it: "overlapped". Neither fills; the
                             last to end takes the mark away, before he returns: nobody knows which of them the store did last. Of more than
                             seven at a time the others wait
    write vs change          add, replace, cas, incr, pop, expire ... mark the key for themselves: a write waits for them, they wait for all
    write vs load            the mark voids the load's claim: its fill is refused. A load that meets a mark waits for it, then asks again;
                             if the writer is dead, or slow, it loads and does not fill
    write vs invalidate      the mark stays, with another version: its writer does not fill. clear() leaves it as it is
    the store says no, or not now         the mark goes: a miss, which loads what the store has
    the write is torn off    (unsettled; a signal handler raises; an error that is not a store's) it may be going on: the mark stands till
                             its time is over, and till then each miss loads, and does not fill
    the writer's task is cancelled (aio.py) while the store is called: the call goes on, and its mark is held: every other writer waits
                             until it has ended, so the store has theirs last. A mark from before the cancellation overlaps as ever
    the writer dies          his mark stands till its time is over, longer than the store may work for him, whoever writes meanwhile; till
                             then loads do not fill, and nobody waits
    the writer is stopped, and goes on when his mark's time is over: his mark is gone, he deletes before he returns
    a write that outlasts its mark      its store does not keep its time: one that was given up, or that follows from a load, can land over
                             a later one. None begins for which the mark would not stand long enough (stored.py: Call)
    a write vs one of its own thread    a task's or greenlet's, or this caller's own, which cannot end while this one waits: UsageError
    a load vs a load         one has the claim, the others wait for it (flight.py); its death hands over at once. If it ends with what
                             cannot be cached it says so under another key, before its claim goes: the others load then, at once, and do
                             not fill. If it dies before it says so, the next one does
Writes that other programs do in the store are seen when an item has expired; invalidate(), tags and a ttl are for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shmcache import errors, flight
from shmcache.core import _core
from shmcache.core._claims import Claims, Marks
from shmcache.flight import steps
from shmcache.stored import BATCH, MISSING, StoredCache, is_over, is_own, no_tags, seconds_of, waiting
from shmcache.stores import Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from shmcache.stored import Key, Steps, Tags, Ttl

    # what a change makes of what is there: (value, seconds to live or None), or DELETE, or KEEP; and what its caller is told
    Change = Callable[[Entry | None], tuple[Any, Any]]

DELETE: Any = object()
KEEP: Any = object()


class ThroughCache(StoredCache):
    """Through and around: who writes changes the store."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._fills = self.policy.mode == "through"

    # ---- writes ----

    @waiting
    def set(self, key: Key, value: Any, ttl: Ttl = None, tags: Tags = None) -> Steps[None]:
        name = _core.key_bytes(key)
        if name[0] == 0:
            super().set(name, value, ttl, tags)
        else:
            no_tags(tags)
            yield from self._write({name: value}, seconds_of(ttl))

    def __setitem__(self, key: Key, value: Any) -> None:
        self.set(key, value)

    @waiting
    def set_many(self, mapping: Mapping[Any, Any] | Iterable[tuple[Key, Any]], ttl: Ttl = None, tags: Tags = None) -> Steps[None]:
        """As Cache.set_many; in the store as few calls, each a transaction where it has them."""
        values = {_core.key_bytes(k): v for k, v in _core.pairs(mapping)}
        own = {k: v for k, v in values.items() if k[0] == 0}
        if own.keys() != values.keys():
            no_tags(tags)
        if own:
            super().set_many(own, ttl, tags)
        names = sorted(values.keys() - own.keys())
        seconds = seconds_of(ttl)
        for name in names:
            self.encoded(values[name])  # all, before the first is stored
        yield from self._write_all({name: values[name] for name in names}, seconds)

    @waiting
    def delete_many(self, keys: Iterable[Key]) -> Steps[int]:
        names = dict.fromkeys(_core.key_bytes(k) for k in _core.several(keys))
        there = super().delete_many([name for name in names if name[0] == 0])
        stored = sorted(name for name in names if name[0] != 0)
        unseen = [name for name in stored if self.peek(name, MISSING) is MISSING]
        there += len(stored) - len(unseen) + len((yield from steps(self._loaded, unseen, Claims(self))))
        yield from self._write_all(dict.fromkeys(stored, DELETE), None)
        return there

    def _write_all(self, values: dict[bytes, Any], ttl: float | None) -> Steps[None]:
        """_write() in batches; what the store refuses of one does not keep it from the others."""
        refused: dict[bytes, Exception] = {}
        unsettled = False
        names = list(values)
        for i in range(0, len(names), BATCH):
            try:
                yield from self._write({name: values[name] for name in names[i : i + BATCH]}, ttl)
            except errors.RowsRefused as e:
                refused |= e.errors
                unsettled |= e.unsettled
                if e.errors.keys().isdisjoint(names):  # what it is about nobody knows: none of these is known to be stored
                    raise
        if refused:
            error = errors.RowsRefused(refused)
            error.unsettled = unsettled
            raise error

    def _write(self, values: dict[bytes, Any], ttl: float | None) -> Steps[None]:
        """Store those values, or delete where it is DELETE (all, or none of them)."""
        encoded = {name: value if value is DELETE else self.encoded(value) for name, value in values.items()}
        deadline = _core.monotonic() + self.policy.timeout
        heads = {name: self._head(name) for name in values} if self._fills else {}
        versions: dict[bytes, int] = {}  # 0: overlapped
        with Marks(self) as marks:
            for name in sorted(values):
                versions[name] = yield from self._mark(marks, name, deadline, alone=False)
            yield from self._store(values, ttl, marks)
            if self._fills and ttl != 0:
                self._fill_written(encoded, ttl, marks, versions, heads)

    def _fill_written(
        self, encoded: dict[bytes, Any], ttl: float | None, marks: Marks, versions: dict[bytes, int], heads: dict[bytes, bytes | None]
    ) -> None:
        """What the store has now, in the places of its marks."""
        for name, value in encoded.items():
            if value is not DELETE and self._filled(name, Entry(value, ttl), versions[name], heads[name]):
                marks.drop(name)

    def _mark(self, marks: Marks, name: bytes, deadline: float, alone: bool, version: int = 0) -> Steps[int]:
        """Put a mark on a key: its version, 0 if another's was there, -1: the key has not this version.

        Raises: StoreUnavailable: the caller that has the key alone, or (alone, or seven at a time) a caller that writes it, takes too long;
        UsageError: that caller does not go on while this call waits.
        """
        while True:
            mark, overlapped = marks.put(name, self._age, alone, version)
            if mark:
                return 0 if overlapped and mark > 0 else mark
            if _core.monotonic() >= deadline:
                raise errors.StoreUnavailable(
                    f"another caller has been writing this key for {self.policy.timeout} s: nothing was changed; try again"
                )
            if (yield flight.how_to_wait(self, name, -3)):
                raise errors.UsageError(
                    "a task or greenlet of this thread, or the caller itself, is changing this key in the store, and does not go on while "
                    "this call waits: nothing was changed; await shmcache.aio's methods in tasks, and let no store write through its cache"
                )

    @waiting
    def _mark_alone(self, marks: Marks, name: bytes, deadline: float) -> Steps[int]:
        """_mark(), for a command of the sidecar's."""
        return (yield from self._mark(marks, name, deadline, alone=True))

    def _store(self, values: dict[bytes, Any], ttl: float | None, marks: Marks) -> Steps[None]:
        kept = {} if ttl == 0 else {name: (value, ttl) for name, value in values.items() if value is not DELETE}
        gone = [name for name in values if name not in kept] if len(kept) < len(values) else []
        if gone:
            yield self._ask(self.store.delete_many, gone, marks)
        if kept:
            yield self._ask(self.store.store_many, kept, marks)
        self.count_store(writes=len(values))

    # ---- changes of what is there ----

    def _change(self, key: Key, change: Change, version: int = 0) -> Steps[Any]:
        """Let change() make something else of what the store has, with nobody between: what it tells. MISSING: another version."""
        name = _core.key_bytes(key)
        deadline = _core.monotonic() + self.policy.timeout
        with Marks(self) as marks:
            mark = yield from self._mark(marks, name, deadline, True, version)
            if mark < 0:
                return MISSING
            head = self._head(name)
            was = yield from self._one(name)
            if was is not None and is_over(was):
                was = None
            now, told = change(was)
            if now is KEEP:
                now = was
            elif now is DELETE:
                yield from self._store({name: DELETE}, None, marks)
            else:
                yield from self._store({name: now.value}, now.ttl, marks)
            if isinstance(now, Entry) and now.ttl != 0 and (self._fills or now is was) and self._filled(name, now, mark, head):
                marks.drop(name)
            return told

    @waiting
    def add(self, key: Key, value: Any, ttl: Ttl = None, tags: Tags = None) -> Steps[bool]:
        if is_own(key):
            return super().add(key, value, ttl, tags)
        no_tags(tags)
        return bool((yield from self._added(_core.key_bytes(key), value, 0, ttl, False)))

    def _added(self, name: bytes, value: Any, version: int, ttl: Ttl, deleted: bool) -> Steps[Any]:
        new = Entry(value, seconds_of(ttl))
        self.encoded(value)
        return (yield from self._change(name, lambda was: (new, True) if was is None else (KEEP, False), version))

    @waiting
    def replace(self, key: Key, value: Any, ttl: Ttl = None, tags: Tags = None) -> Steps[bool]:
        if is_own(key):
            return super().replace(key, value, ttl, tags)
        no_tags(tags)
        new = Entry(value, seconds_of(ttl))
        self.encoded(value)
        return bool((yield from self._change(key, lambda was: (KEEP, False) if was is None else (new, True))))

    @waiting
    def cas(self, key: Key, value: Any, version: int, ttl: Ttl = None, tags: Tags = None) -> Steps[bool]:
        if is_own(key):
            return super().cas(key, value, version, ttl, tags)
        no_tags(tags)
        if not version:
            return (yield from steps(self.add, key, value, ttl))
        new = Entry(value, seconds_of(ttl))
        self.encoded(value)
        return (yield from self._change(key, lambda was: (new, True), version)) is True

    @waiting
    def pop(self, key: Key, default: Any = None) -> Steps[Any]:
        if is_own(key):
            return super().pop(key, default)
        return (yield from self._change(key, lambda was: (KEEP, default) if was is None else (DELETE, was.value)))

    @waiting
    def incr(self, key: Key, n: int = 1, *, default: int | None = None, ttl: Ttl = None) -> Steps[int]:
        if is_own(key):
            return super().incr(key, n, default=default, ttl=ttl)
        if not isinstance(n, int) or not (default is None or isinstance(default, int)):
            raise errors.NotANumber("incr and decr take an int to add, and an int or None as default")
        seconds = seconds_of(ttl)

        def count(was: Entry | None) -> tuple[Any, int]:
            if was is None and default is None:
                raise KeyError(key)
            base, left = (default, seconds) if was is None else was
            if type(base) is not int:
                raise errors.NotANumber("the value of this key was not set as an int: set it to one first")
            if not -(2**63) <= base + n < 2**63:
                raise errors.CounterOverflow("the counter would leave the signed 64-bit range; it keeps its value")
            return Entry(base + n, left), base + n

        return int((yield from self._change(key, count)))

    @waiting
    def touch(self, key: Key, ttl: Ttl = None) -> Steps[bool]:
        if is_own(key):
            return super().touch(key, ttl)
        seconds = seconds_of(ttl)
        if seconds == 0:
            return (yield from steps(self.delete, key))
        return bool((yield from self._change(key, lambda was: (KEEP, False) if was is None else (Entry(was.value, seconds), True))))

    @waiting
    def persist(self, key: Key) -> Steps[bool]:
        return super().persist(key) if is_own(key) else (yield from steps(self.touch, key))

