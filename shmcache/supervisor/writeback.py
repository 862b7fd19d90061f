"""Write-back: what the cache has and the store has not yet is stored, in batches, by a thread of the supervisor's.

A pass goes over all dirty items (core/dirty.pxd), BATCH at a time: reads them, stores them with their versions, and makes those clean that
have not been written since; of a key that was written ten times between two passes the last value is stored. A pass begins every
flush_every seconds, at once when an eighth of what may be dirty is, or somebody waits in flush().

Who was killed in the middle has changed nothing but the store, and what his COMMIT still does there has versions that are not above those
of his successor, which the store leaves alone. A store that is down is tried again, after a pause that doubles, with jitter, up to
LONGEST_PAUSE. A row that it refuses stays dirty, is said once, and tried again every RETRY_REFUSED seconds, or when it is written again.
A row that is there with a higher version is of a later life of this segment, if what was restored is older than that; then it stays. If
the segment cannot have given it (the wall clock was behind when it was made, or another host writes that table), it is overwritten: the
segment's versions go above it. What is added to an item's version to get its row's stays the same, in all lives (snapshot.py): the item
gets a higher version.

    1  datadir.GivenOut: that what comes is above the row's version, and that no row has got one between what was given out before and that
       from here. On the disk; if there is no room for it, the item waits
    2  the stripes' sequences: whatever is written from now on has a higher version
    3  the item's version; it is dirty as before, and the pass is made once more
Crash: behind 1 whoever stores next goes on with 2. What waits below a row like that, and is restored by a later life, meets it with its old
version, and is told by 1 that it was not stored by anybody later. Behind 3: the row may have it, or not; what is restored has the old
version, and one is no later than the other.
    go above vs set     the set's version is above or below; if below, its row is found next
    go above vs log     a record has the version of its write. Item and row may have a higher one: of the same value

No row gets a version above GivenOut.newest, which is on the disk (datadir.py). A pass begins with raising it, if less than half a block is
left, and a batch leaves out what is above it still: the disk is full, or the pass was long. That waits, as for a store that fails.
"""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Any

from shmcache import codec, errors
from shmcache.core import _core, _dirty
from shmcache.notices import notice
from shmcache.policy import check, policy_of
from shmcache.supervisor import datadir

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from shmcache.cache import Cache
    from shmcache.stores import Store

BATCH = 500  # keys in one call of the store
FIRST_PAUSE = 0.05  # seconds
LONGEST_PAUSE = 5.0
RETRY_REFUSED = 60.0
RECOUNT_EVERY = 5.0  # seconds at least, of what writers' deaths have made wrong
HIGHEST = 1 << 62  # of a row's version that is gone above; a column of 64 bits has as many again
FAR = 1 << 50  # versions that are left out above a row, so that others like it are below, too: 12 days of the clock
MEANWHILE = 1 << 24  # no stripe has so many writes while the sequences of all are raised
ROUNDS = 64  # passes at once, as long as rows of higher versions are found
AT_END = 30.0  # seconds for which stop() tries to store what is left


class WriteBack:
    """The thread. Args: cache: a handle of its own on a segment whose policy is write-back. store: its to use; closed by its maker.
    folder: the segment's data directory, if it has one.

    Raises: InvalidConfig: the store takes no versions. StripeBusy: a process that does not run holds what is to be adopted (datadir.py).
    NewerFormat, OSError.
    """

    def __init__(self, cache: Cache, store: Store, folder: Path | None = None) -> None:
        policy = policy_of(cache.mapping)
        assert policy is not None
        check(policy, store)
        self.cache, self.store, self.policy = cache, store, policy
        self.dirty = _dirty.Dirty(cache)
        self.folder = folder
        self.given = datadir.adopt(cache, folder)  # while no view is kept, since it may raise: the handle could not be closed then
        self.base = int(cache.segment.header["version_base"])
        self.before = self.base + int(cache.segment.header["restored_seq"])  # of rows of earlier lives none has a higher version
        self.unnoted: OSError | None = None  # why what is above given.newest waits
        self.header = cache.views(writable=True).header
        self.renewed = False  # items have new versions, and another pass is to be made
        self.refused: dict[bytes, tuple[int, float]] = {}  # key -> version, when to try again
        self.pause = FIRST_PAUSE
        self.since: dict[bytes, float] = {}  # dirty at the last pass -> since when, as far as is known
        self.wake = threading.Event()
        self.stopping = False
        self.dirty.recount()  # who was before may have died
        self.next_recount = 0.0
        self.damaged: bytes | None = None
        # it has been said that versions are below the store's; that what was restored is older than it; that a restore is waited for
        self.behind = self.older = self.waiting = False
        self.failure_said = True  # a failure that is noted in the header was said by the supervisor before
        self.thread = threading.Thread(target=self.run, name="writeback", daemon=True)
        self.thread.start()

    def look(self) -> None:
        """Called often: begin a pass if somebody waits for it, or there is much to store."""
        header = self.header
        if header["flushes_asked"] > header["flushes_ended"] or header["dirty"] > header["dirty_limit"] >> 3:
            self.wake.set()

    def run(self) -> None:
        while not self.stopping:
            self.wake.wait(self.policy.flush_every)
            self.wake.clear()
            if not self.stopping and not self.tried():
                pause = self.pause * random.uniform(0.5, 1.5)
                self.pause = min(2 * self.pause, LONGEST_PAUSE)
                deadline = _core.monotonic() + pause
                while not self.stopping and _core.monotonic() < deadline:
                    self.wake.wait(max(0.0, deadline - _core.monotonic()))
                    self.wake.clear()

    def tried(self) -> bool:
        """one_pass(), again if it gave higher versions; what it raises is taken for a failure of the store's: if this thread ended, writers
        would wait for good."""
        try:
            for _ in range(ROUNDS):
                if not self.one_pass():
                    return False
                if not self.renewed:
                    break
            return True
        except Exception as e:
            self._failed(e)
            return False

    def one_pass(self) -> bool:
        """Store what is dirty now: False if the store failed. What is refused, or was written meanwhile, stays dirty."""
        if self.cache.durability()["generations_missing"]:  # what is dirty is being restored: none of it is to go before all is there
            if not self.waiting:
                self.waiting = self._say(
                    "storing nothing until the restore has put in what the store has not got; if it was killed, run it again"
                )
            return True
        asked = int(self.header["flushes_asked"])
        find = self.dirty.walk if asked > int(self.header["flushes_ended"]) else self.dirty.find
        at, left, began = 0, 0, time.time()
        self.renewed = False
        self.dirty.go_above(max(0, self.given.floor - self.base))  # if it was cut short
        self.unnoted = None
        self._note_more()
        skipped, counted = self.dirty.skipped, int(self.header["dirty"]) + self.dirty.found_bytes
        seen: dict[bytes, float] = {}
        while True:
            items, at = find(at, BATCH)
            # A key is there twice if a write put it into a chunk further on meanwhile; the write is the later one. D1: no two are in a slot
            items = list({item[0]: item for item in items}.values())
            damaged = self.dirty.damaged
            if damaged != self.damaged and self._say(
                f"a page of the value of {damaged!r} belongs to somebody else: run shmcache-admin verify --repair"
            ):
                self.damaged = damaged
            now = _core.monotonic()
            due = [item for item in items if not self._waits(item[0], item[4], now)]
            if any(item[5] > self.given.newest for item in due):
                self._note_more()
                if self.unnoted:
                    due = [item for item in due if item[5] <= self.given.newest]
            left += len(items) - len(due)
            for item in items:
                seen[item[0]] = self.since.get(item[0], began)
            if due:
                stored = self._store(due)
                if stored is None:
                    self.since |= seen
                    self.header["oldest_dirty_ms"] = int(min(self.since.values()) * 1000)
                    return False
                refused, behind = stored
                left += len(refused) + (len(behind) if self.unnoted else 0)
                for item in due:
                    if item[0] not in refused and item[0] not in behind and self.dirty.clean(item[0], item[4]):
                        seen.pop(item[0], None)
            if at == 0:
                break
        self.since = seen
        self.header["oldest_dirty_ms"] = int(min(seen.values()) * 1000) if seen else 0
        if self.unnoted and left:
            self._failed(self.unnoted, f"{datadir.VERSIONS_NAME} cannot be written")
            return False
        self.pause = FIRST_PAUSE
        self.header["flush_failed_ms"] = 0
        self.header["flush_refused"] = left
        if left == 0 and self.dirty.skipped == skipped and not self.renewed:
            self.header["flushes_ended"] = asked
        self._recount(counted - self.dirty.found_bytes)
        return True

    def _recount(self, too_many: int) -> None:
        """Count what is dirty anew if header.dirty had so many bytes more than a pass has found: writers wait by it."""
        now = _core.monotonic()
        if too_many > int(self.header["dirty_limit"]) >> 4 and now >= self.next_recount:
            self.next_recount = now + RECOUNT_EVERY
            self.dirty.recount()

    def _waits(self, key: bytes, version: int, now: float) -> bool:
        """Was this version of it refused a short while ago?"""
        refused = self.refused.get(key)
        if refused is None:
            return False
        if refused[0] == version and now < refused[1]:
            return True
        del self.refused[key]
        return False

    def _store(self, items: list[_dirty.Item]) -> tuple[dict[bytes, Exception], set[bytes]] | None:
        """Those that were refused, and those that are stored later, with a higher version; None: the store failed."""
        refused: dict[bytes, Exception] = {}
        kept: dict[bytes, tuple[Any, float | None]] = {}
        gone: dict[bytes, None] = {}
        for key, number, payload, left, _, _ in items:
            try:
                negative = False
                if number == codec.ENVELOPE:
                    number, negative, _, _, payload = codec.open_envelope(payload)
                if negative or left == 0:
                    gone[key] = None
                else:
                    kept[key] = (self.cache._value(number, payload), left)
            except Exception as e:  # a codec: anybody's code
                refused[key] = e
        versions = {item[0]: item[5] for item in items}
        try:
            newer = self._sent(self.store.store_many, kept, versions, refused)
            newer |= self._sent(lambda keys, **limits: self.store.delete_many(list(keys), **limits), gone, versions, refused)
        except Exception as e:  # a store: anybody's code
            self._failed(e)
            return None
        behind = [item for item in items if item[0] in newer and not self._overtaken(item, newer[item[0]])]
        for item in behind:
            if newer[item[0]] >= HIGHEST:
                refused[item[0]] = errors.StoreRefused(f"its row's version is {newer[item[0]]}, which shmcache never gives: set it to 0")
        behind = [item for item in behind if item[0] not in refused]
        self.cache.count_store(writes=len(items) - len(refused) - len(behind))
        if behind:
            above = self._go_above(max(newer[item[0]] for item in behind))
            if not self.behind and above:
                self.behind = self._say(
                    f"the store has rows of higher versions than this segment's, {behind[0][0]!r} is one; they are overwritten: was the "
                    "clock set back, or does another host write that table?"
                )
            for item in behind if above else ():
                self.dirty.renew(item[0], item[4], above)
        self.header["flushed_ms"] = int(time.time() * 1000)
        again = _core.monotonic() + RETRY_REFUSED
        for key, _, _, _, version, _ in items:
            if key in refused:
                self.refused[key] = (version, again)
        if refused:
            self._say(f"{errors.RowsRefused(refused)}; they are kept, and tried again")
        return refused, {item[0] for item in behind}

    def _overtaken(self, item: _dirty.Item, row: int) -> bool:
        """Was the row, of a higher version than this item's, stored by a later life than that from which the item was restored?"""
        if item[5] > self.before or not (row <= self.before and self.given.may_have(row)):
            return False
        if not self.older:
            self.older = self._say(f"items that were restored are older than their rows in the store, {item[0]!r} is one; the rows stay")
        return True

    def _newest(self) -> int:
        return self.base + int(self.cache.segment.stripes["seq"].max())

    def _note(self, given: datadir.GivenOut) -> bool:
        """On the disk, and here: True. False: it cannot be written, and why is in self.unnoted."""
        try:
            if self.folder is not None:
                datadir.note_given_out(self.folder, self.cache.name, given)
        except OSError as e:
            self.unnoted = e
            return False
        self.given = given
        return True

    def _note_more(self) -> None:
        """If less than half a block is left of what may be given out: more."""
        newest = self._newest()
        if newest + datadir.BLOCK // 2 > self.given.newest and not self.unnoted:
            self._note(self.given.more(newest))

    def _go_above(self, row: int) -> int:
        """From now on (in a stripe that is busy: from the next pass on) what is written has a higher version than this row. Returns:
        that of an item of which the same is to be true; 0: it cannot be noted."""
        if row > self.given.floor:
            if row > self.given.newest:
                row += min(FAR, (HIGHEST - row) >> 10)  # the less, the less is left: another host may do the same
            given = self.given.above(max(self.given.newest, self._newest() + MEANWHILE), row)
            if not self._note(given._replace(floor=row).more(row)):
                return 0
            self.dirty.go_above(row - self.base)
        self.renewed = True
        return self.given.floor - self.base

    def _sent(
        self, call: Callable[..., Mapping[bytes, int] | None], what: dict[bytes, Any], versions: dict[bytes, int],
        refused: dict[bytes, Exception],
    ) -> dict[bytes, int]:  # fmt: skip
        """A call of the store, and again for those that it does not refuse: of rows that are newer there, their versions."""
        while what:
            try:
                return dict(call(what, timeout=self.policy.timeout, versions={key: versions[key] for key in what}) or {})
            except errors.RowsRefused as e:
                refused |= e.errors
                rest = {key: x for key, x in what.items() if key not in e.errors}
                what = rest if len(rest) < len(what) else {}
        return {}

    def _failed(self, error: Exception, what: str = "the store fails") -> None:
        self.cache.count_store(errors=1)
        if not self.header["flush_failed_ms"]:
            self.header["flush_failed_ms"] = int(time.time() * 1000)
            self.failure_said = False
        if not self.failure_said:
            text = f"{what} ({type(error).__name__}: {error}); what the store has not got is kept, and tried again"
            self.failure_said = self._say(text)

    def _say(self, what: str) -> bool:
        return notice(f"shmcache: {self.cache.name}: {what}")

    def stop(self) -> None:
        """End the thread; then try for a while to store what is left, and say if something is."""
        self.stopping = True
        self.wake.set()
        self.thread.join()
        deadline = _core.monotonic() + AT_END
        while not self.tried() and _core.monotonic() < deadline:
            time.sleep(min(self.pause, max(0.0, deadline - _core.monotonic())))
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
        left = self.dirty.items()
        if left:
            self._say(f"{left} items are not stored; they are in the segment, and in its snapshot if there is one")
        del self.header
