"""Write-back: what the cache has and the store has not yet is stored, in batches, by a thread of the supervisor's.

A pass goes over all dirty items (core/dirty.pxd), some at a time (batch.py): reads them, stores them with their versions, and makes those
clean that have not been written since; of a key that was written ten times between two passes the last value is stored. A pass begins
every flush_every seconds, at once when an eighth of what may be dirty is, or somebody waits in flush().

Who was killed in the middle has changed nothing but the store, and what his COMMIT still does there has versions that are not above those
of his successor, which the store leaves alone. A batch that fails may have been done all the same, or be done later. It is sent again in
smaller ones: the store leaves a row alone that has its version. Of a key no older version follows a newer one within a pass (Pass.later).

When rows fail alone, too, the store is down: it is tried again, after a pause that doubles, with jitter, up to LONGEST_PAUSE. A pass puts
off rows that have failed alone, so that a few that always do keep nobody waiting. Many may stand together, those of one program, say: so
before a pass takes the store for down it tries some from anywhere, and goes on when one is stored. Those that failed alone in a pass that
stored others, and fail alone once more, are taken for refused.

A row that the store refuses stays dirty, is said once, and set aside (refused.py): it is tried again when it is written again, and else at
longer and longer intervals, behind the others. Writers are not to wait for what does not get less: header.dirty_limit is raised by what is
set aside, by half at most. What is refused beyond that counts as what waits to be stored. If the limit is reached with rows that fail
alone, no row can come that the store would take, and that would tell that it is they: then it is raised a little.

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

import contextlib
import operator
import random
import threading
import time
from typing import TYPE_CHECKING, Any

from shmcache import codec, errors, segment
from shmcache.core import _core, _dirty
from shmcache.notices import notice
from shmcache.policy import check, policy_of
from shmcache.stores import masked
from shmcache.supervisor import batch, datadir
from shmcache.supervisor.refused import Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from shmcache.cache import Cache
    from shmcache.stores import Store

BATCH = 500  # keys in one call of the store, at most
FIRST_PAUSE = 0.05  # seconds
LONGEST_PAUSE = 5.0
PROBES = 3  # rows in a row that fail alone, before a pass takes the store for down
QUICK_PROBES = 30  # of a store that says so at once; the last third of them from anywhere
ELSEWHERE = 3  # places that are looked at for one that has not failed yet
SAY_EVERY = 10.0  # seconds at least, which rows are refused
SAID = 3  # of these, with what is wrong
LONGEST_SAID = 600  # characters, of each
ASIDE_SHIFT = 1  # by half: what is set aside raises the dirty limit no further
SPARE_SHIFT = 4  # by a sixteenth it is raised if nothing goes, a quarter of that with each pass
RECOUNT_EVERY = 5.0  # seconds at least, of what writers' deaths have made wrong
HIGHEST = 1 << 62  # of a row's version that is gone above; a column of 64 bits has as many again
FAR = 1 << 50  # versions that are left out above a row, so that others like it are below, too: 12 days of the clock
MEANWHILE = 1 << 24  # no stripe has so many writes while the sequences of all are raised
ROUNDS = 64  # passes at once, as long as rows of higher versions are found
LAST_CALL = 30.0  # seconds for which stop() waits for a call of the store, at least; twice the policy's timeout if that is more
AT_END = 30.0  # seconds for which it then tries to store what is left


class Pass:
    """What a pass has met so far."""

    def __init__(self) -> None:
        self.seen: dict[bytes, float] = {}  # dirty -> since when
        self.left = 0  # that stay dirty
        self.later: dict[bytes, _dirty.Item] = {}  # put off until the others are stored. None that was met again since, in a newer version
        self.room = batch.BYTES  # for these
        self.cut = False  # there were more
        self.began = False  # a call of the store was made
        self.worked = False  # a row was stored
        self.missed: list[tuple[bytes, int]] = []  # keys and versions of rows that failed alone: they may be many, and are read again
        self.misses = 0  # the last calls of the store, so many, were of one row, and failed
        self.missed_at = 0.0  # monotonic, when the first of these began

    def put_off(self, item: _dirty.Item) -> None:
        self.room -= batch.weight(item)
        if self.later and (self.room < 0 or len(self.later) >= BATCH):
            self.left += 1
            self.cut = True
        else:
            self.later[item[0]] = item


def _named(e: BaseException) -> Exception:
    """What a store has raised, as a failure. asyncio's CancelledError is no Exception, and if the thread ended, nothing would be stored."""
    if isinstance(e, KeyboardInterrupt):
        raise e
    return e if isinstance(e, Exception) else errors.StoreUnavailable(f"{type(e).__name__}: {e}")


def _until(item: _dirty.Item) -> _dirty.Item:
    """The same, with the time (monotonic) when it is over in the place of the seconds to live: it may wait for its batch."""
    key, number, payload, left, version, row, size = item
    return item if left is None else (key, number, payload, _core.monotonic() + left, version, row, size)


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
        self.size = batch.Size(self.policy.timeout, BATCH)
        self.took = 0.0  # seconds, the longest of the last batch's calls
        self.error: Exception | None = None  # why the last one failed that did
        self.dirty.most_bytes = batch.BYTES
        self.limit = segment.dirty_limit_of(self.policy.dirty_bytes, cache.stats()["slab_bytes"])  # without what is set aside
        self.refused = Refused()
        self.unsaid: list[str] = []  # of these, what has not been said yet: of the first ones
        self.n_unsaid = 0  # of how many
        self.say_at = 0.0  # monotonic, not before then
        self.alone: dict[bytes, int] = {}  # key -> version of rows that failed alone, and are not known to be refused
        self.more = False  # of what was put off the store takes some, and more is left
        self.spare = 0  # bytes beyond the limit, for rows that the store may take when all that wait fail
        self.walked = (0, -1)  # flushes_asked and self.refused.changes at the last walk that left nothing but what is refused
        self.pause = FIRST_PAUSE
        self.since: dict[bytes, float] = {}  # dirty at the last pass -> since when, as far as is known
        self.wake = threading.Event()
        self.stopping = False
        self.until: float | None = None  # monotonic, when stop() gives up; None: it has not begun to store
        self.left_alone = False  # stop() has not waited for the thread
        self.dirty.recount()  # who was before may have died
        self.next_recount = 0.0
        self.damaged: bytes | None = None
        # it has been said that versions are below the store's; that what was restored is older than it; that a restore is waited for
        self.behind = self.older = self.waiting = False
        self.failing = self.lessened = False  # that the store fails; that batches are smaller
        self.thread = threading.Thread(target=self.run, name="writeback", daemon=True)
        self.thread.start()

    def look(self) -> None:
        """Called often: begin a pass if somebody waits for it, or there is much to store; answer an operator."""
        if not self.thread.is_alive():
            raise RuntimeError("the thread that writes back has ended")
        if self._asked()[1] or int(self.header["dirty"]) - self.refused.size > self.limit >> 3:
            self.wake.set()
        if self.refused.rows:
            with contextlib.suppress(errors.ShmcacheError):  # no room, or no question stands there: the operator asks again
                self.refused.answer(self.cache)

    def _asked(self) -> tuple[int, bool]:
        """flushes_asked; and: is a walk to be made for those who wait? If the last one left what is refused, the next would, too."""
        asked = int(self.header["flushes_asked"])
        return asked, asked > int(self.header["flushes_ended"]) and self.walked != (asked, self.refused.changes)

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
        """one_pass(), again if it gave higher versions, or put off what the store takes; what it raises is taken for a failure of the
        store's: if this thread ended, writers would wait for good."""
        try:
            for _ in range(ROUNDS):
                if not self.one_pass():
                    return False
                if not self.renewed and not self.more:
                    break
            return True
        except BaseException as e:
            if not self.left_alone:  # else header and handle are gone
                self._failed(_named(e))
            return False

    def one_pass(self) -> bool:
        """Store what is dirty now: False if the store failed. What is refused, or was written meanwhile, stays dirty."""
        if self.cache.durability()["generations_missing"]:  # what is dirty is being restored: none of it is to go before all is there
            if not self.waiting:
                self.waiting = self._say(
                    "storing nothing until the restore has put in what the store has not got; if it was killed, run it again"
                )
            return True
        asked, walks = self._asked()
        find = self.dirty.walk if walks else self.dirty.find
        at, began, this = 0, time.time(), Pass()
        self.renewed = self.more = False
        self.dirty.go_above(max(0, self.given.floor - self.base))  # if it was cut short
        self.unnoted = None
        self._note_more()
        self.dirty.passed = self.refused.waiting()
        skipped, counted = self.dirty.skipped, int(self.header["dirty"]) + self.dirty.found_bytes
        while True:
            items, at = find(at, BATCH)
            # A key is there twice if a write put it into a chunk further on meanwhile; the write is the later one. D1: no two are in a slot
            items = list({item[0]: _until(item) for item in items}.values())
            damaged = self.dirty.damaged
            if damaged != self.damaged and self._say(
                f"a page of the value of {damaged!r} belongs to somebody else: run shmcache-admin verify --repair"
            ):
                self.damaged = damaged
            for item in items:
                this.seen[item[0]] = self.since.get(item[0], began)
                this.later.pop(item[0], None)
            if not self._store_all(this, self._ready(this, items)):
                return self._gave_up(this)
            if at == 0:
                break
        if not self._store_later(this):
            return self._gave_up(this)
        self.since = this.seen
        self.header["oldest_dirty_ms"] = int(min(this.seen.values()) * 1000) if this.seen else 0
        if self.dirty.skipped == skipped:
            self.refused.keep(this.seen)
            self.alone = {key: version for key, version in self.alone.items() if key in this.seen}
        self._set_aside()
        if self.unnoted and this.left:
            self._failed(self.unnoted, f"{datadir.VERSIONS_NAME} cannot be written")
            return False
        self.pause = FIRST_PAUSE
        self.failing, self.spare = False, 0
        self.header["flush_failed_ms"] = 0
        if walks and self.dirty.skipped == skipped and not self.renewed:
            if this.left == 0:
                self.header["flushes_ended"] = asked
            elif this.left == len(self.refused.rows):
                self.walked = (asked, self.refused.changes)
        self._recount(counted - self.dirty.found_bytes)
        return True

    def _gave_up(self, this: Pass) -> bool:
        """False: the store failed, or stop() has no time for more."""
        self.since |= this.seen
        if self.since:
            self.header["oldest_dirty_ms"] = int(min(self.since.values()) * 1000)
        if this.worked:
            self.pause = FIRST_PAUSE
        elif int(self.header["dirty"]) >= int(self.header["dirty_limit"]):
            self.spare = min(self.spare + (self.limit >> SPARE_SHIFT + 2), self.limit >> SPARE_SHIFT)
        self._set_aside()
        return False

    def _recount(self, too_many: int) -> None:
        """Count what is dirty anew if header.dirty had so many bytes more than a pass has found: writers wait by it."""
        now = _core.monotonic()
        if too_many > int(self.header["dirty_limit"]) >> 4 and now >= self.next_recount:
            self.next_recount = now + RECOUNT_EVERY
            self.dirty.recount()

    def _ready(self, this: Pass, items: list[_dirty.Item]) -> list[_dirty.Item]:
        """Those that are stored now; the others are put off, or left alone."""
        ready = []
        for item in items:
            key, version = item[0], item[4]
            if self.dirty.passed.get(key) == version:
                this.left += 1
            elif self.refused.has(key, version) or self.alone.get(key) == version:
                this.put_off(item)
            else:
                ready.append(item)
        return sorted(ready, key=batch.weight)  # if a few are too large for the store, they come last

    def _store_all(self, this: Pass, items: list[_dirty.Item]) -> bool:
        """In batches that the store takes. False: it fails, or stop() has no time for more."""
        items = self._noted(this, items)
        while items:
            if this.began and (self._is_late() or self._enough(this)):
                this.left += len(items)
                return False
            if 3 * this.misses >= 2 * self._probes(this) and (item := self._elsewhere(this)):
                items = [item, *(other for other in items if other[0] != item[0])]
                n = 1
            else:
                n = self.size.cut(items)
            if self._stored(this, items[:n]):
                items = items[n:]
            elif n == 1:
                self.alone[items[0][0]] = items[0][4]
                this.missed.append((items[0][0], items[0][4]))
                items = items[1:]
        return True

    def _store_later(self, this: Pass) -> bool:
        """What was put off, and what failed alone in this pass. False: it is the store that fails, or stop() has no time for more."""
        this.missed = [(key, version) for key, version in this.missed if key not in this.later]  # met again, if it was found elsewhere
        later = self._noted(this, [*this.later.values()])
        known = {item[0]: self.refused.rows[item[0]] for item in later if self.refused.has(item[0], item[4])}
        suspects = [item for item in later if item[0] not in known]
        random.shuffle(suspects)  # the same ones are not to be the first each time, if they are the ones that fail
        if not self._store_all(this, [item for item in later if item[0] in known and not known[item[0]].alone]) and not this.worked:
            return False
        before = this.worked
        while suspects and not this.worked:
            if this.began and (self._is_late() or self._enough(this)):
                return False
            item = suspects.pop()
            if not self._stored(this, [item]):
                this.missed.append((item[0], item[4]))
        missed = [(key, version) for key, version in this.missed if self.alone.get(key) == version]  # the others were met again since
        if missed and not this.worked:
            return False
        if suspects and not before:  # it was down: those that failed alone then are to go in batches again
            self.alone = dict(missed)
            this.left += len(suspects)
            self.more = True
            suspects = []
        again = [(key, row.version) for key, row in known.items() if row.alone]
        self._store_alone(this, [*((item[0], item[4]) for item in suspects), *missed, *again])
        self.more = self.more or (this.cut and this.worked)
        return True

    def _store_alone(self, this: Pass, rows: list[tuple[bytes, int]]) -> None:
        """Rows that have failed alone before, one by one, for as long as a call may take: if they fail once more, they are refused."""
        tried, until = 0, _core.monotonic() + self.policy.timeout
        while tried < len(rows) and not self._is_late() and _core.monotonic() < until:
            key, version = rows[tried]
            tried += 1
            self.alone.pop(key, None)
            item = self.dirty.item(key)
            if item is None or item[4] != version:  # written since: the next pass meets it
                this.left += 1
            elif not self._stored(this, [_until(item)], alone=True):
                assert self.error is not None
                self._refuse(this, {key: self.error}, [item], alone=True)
        for key, version in rows[tried:]:
            this.left += 1
            if not self.refused.has(key, version):
                self.alone[key] = version
        self._set_aside()

    def _elsewhere(self, this: Pass) -> _dirty.Item | None:
        """An item from anywhere in the map that has not failed alone: this pass has met no newer version of it. None: none was found."""
        for _ in range(ELSEWHERE):
            found, _ = self.dirty.find(self.dirty.place(random.randrange(max(1, self.dirty.items()))), 1)
            for item in self._noted(this, found):
                key, version = item[0], item[4]
                if version not in (self.dirty.passed.get(key), self.alone.get(key)) and not self.refused.has(key, version):
                    this.seen.setdefault(key, self.since.get(key, time.time()))
                    this.later.pop(key, None)
                    return _until(item)
        return None

    def _probes(self, this: Pass) -> int:
        """How many rows may fail alone, one behind the other, before this pass takes the store for down."""
        return QUICK_PROBES if _core.monotonic() - this.missed_at < self.policy.timeout / 2 else PROBES

    def _enough(self, this: Pass) -> bool:
        return this.misses >= self._probes(this)

    def _is_late(self) -> bool:
        return self.stopping and (self.until is None or _core.monotonic() > self.until)

    def _noted(self, this: Pass, items: list[_dirty.Item]) -> list[_dirty.Item]:
        """Those whose versions are noted as given out; the others wait."""
        if any(item[5] > self.given.newest for item in items):
            self._note_more()
        if self.unnoted:
            noted = [item for item in items if item[5] <= self.given.newest]
            this.left += len(items) - len(noted)
            return noted
        return items

    def _stored(self, this: Pass, items: list[_dirty.Item], alone: bool = False) -> bool:
        """A batch is stored, as far as the store does not refuse rows. False: the store failed; why is in self.error.

        alone: a row that has failed before: it says nothing of the size of batches, nor of the store.
        """
        began = _core.monotonic()
        this.began = True
        self.took, known = 0.0, self.size.limited and len(items) > 1
        refused, kept, gone = self._decoded(items)
        versions = {item[0]: item[5] for item in items}
        try:
            newer = self._sent(self.store.store_many, kept, versions, refused)
            newer |= self._sent(lambda keys, **limits: self.store.delete_many(list(keys), **limits), gone, versions, refused)
        except BaseException as e:  # a store: anybody's code
            self.error = _named(e)
            if not alone:
                self.size.failed(items, self.took, _core.monotonic())
            if len(items) == 1:
                this.missed_at = this.missed_at if this.misses else began
                this.misses += 1
            self._failed(self.error, quiet=alone or known)
            return False
        self.size.stored(items, self.took, _core.monotonic())
        self._say_if_lessened()
        this.misses = 0
        this.worked = this.worked or len(refused) < len(items)
        self.header["flush_failed_ms"] = 0
        behind = self._gone_above(items, newer, refused)
        self.cache.count_store(writes=len(items) - len(refused) - len(behind))
        self.header["flushed_ms"] = int(time.time() * 1000)
        self._refuse(this, refused, items)
        if refused:
            self._set_aside()
        this.left += len(behind) if self.unnoted else 0
        for item in items:
            if item[0] not in refused and item[0] not in behind:
                self.more = self.refused.stored(item[0], item[4]) or self.more
                self.alone.pop(item[0], None)
                if self.dirty.clean(item[0], item[4]):
                    this.seen.pop(item[0], None)
                    self.since.pop(item[0], None)
                else:  # it was written since, or dropped: then what was loaded since is older than what the store has now
                    with contextlib.suppress(errors.CapacityError):  # busy: it goes when it expires, or is evicted
                        self.cache.discard(item[0])
        return True

    def _decoded(self, items: list[_dirty.Item]) -> tuple[dict[bytes, Exception], dict[bytes, tuple[Any, float | None]], dict[bytes, None]]:
        """Those that cannot be decoded, what is to be stored, and what is to be deleted."""
        refused: dict[bytes, Exception] = {}
        kept: dict[bytes, tuple[Any, float | None]] = {}
        gone: dict[bytes, None] = {}
        now = _core.monotonic()
        for key, number, payload, until, _, _, _ in items:
            try:
                negative = False
                if number == codec.ENVELOPE:
                    number, negative, _, _, payload = codec.open_envelope(payload)
                if negative or (until is not None and until <= now):
                    gone[key] = None
                else:
                    kept[key] = (self.cache._value(number, payload), None if until is None else until - now)
            except Exception as e:  # a codec: anybody's code
                refused[key] = e
        return refused, kept, gone

    def _gone_above(self, items: list[_dirty.Item], newer: dict[bytes, int], refused: dict[bytes, Exception]) -> set[bytes]:
        """Of the rows that are newer in the store, those that are stored later, with a higher version; some are refused."""
        behind = [item for item in items if item[0] in newer and not self._overtaken(item, newer[item[0]])]
        for item in behind:
            if newer[item[0]] >= HIGHEST:
                refused[item[0]] = errors.StoreRefused(f"its row's version is {newer[item[0]]}, which shmcache never gives: set it to 0")
        behind = [item for item in behind if item[0] not in refused]
        if behind:
            above = self._go_above(max(newer[item[0]] for item in behind))
            if not self.behind and above:
                self.behind = self._say(
                    f"the store has rows of higher versions than this segment's, {behind[0][0]!r} is one; they are overwritten: was the "
                    "clock set back, or does another host write that table?"
                )
            for item in behind if above else ():
                self.dirty.renew(item[0], item[4], above)
        return {item[0] for item in behind}

    def _refuse(self, this: Pass, refused: dict[bytes, Exception], items: list[_dirty.Item], alone: bool = False) -> None:
        """Set those of the items aside that were refused. alone: they have failed alone."""
        for item in items:
            error = refused.get(item[0])
            if error is not None and self.refused.add(item[0], item[4], item[6], error, alone):
                self.n_unsaid += 1
                if self.n_unsaid <= SAID:  # not the error: with it would stay what its frames have
                    self.unsaid.append(masked(f"{item[0]!r:.100}: {error}")[:LONGEST_SAID])
        this.left += len(refused)

    def _say_refused(self) -> None:
        if self.n_unsaid:
            self.say_at = _core.monotonic() + SAY_EVERY
            more = f"; and {self.n_unsaid - SAID} more" if self.n_unsaid > SAID else ""
            shown = "; ".join(self.unsaid) + more
            if self._say(f"rows refused: {shown}; they are kept, and tried again: shmcache-admin refused {self.cache.name}"):
                self.unsaid, self.n_unsaid = [], 0

    def _set_aside(self) -> None:
        """Say how much that is, and which rows."""
        refused = self.refused
        self.header["dirty_limit"] = self.limit + min(refused.size + self.spare, self.limit >> ASIDE_SHIFT)
        self.header["flush_refused"] = len(refused.rows)
        if _core.monotonic() >= self.say_at:
            self._say_refused()

    def _say_if_lessened(self) -> None:
        size = self.size
        self.lessened = size.limited and (
            self.lessened
            or self._say(
                f"the store failed with {size.failed_rows} rows, {size.failed_bytes:,} bytes, at once, and takes fewer: it is given fewer"
            )
        )

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
            began = _core.monotonic()
            try:
                said = dict(call(what, timeout=self.policy.timeout, versions={key: versions[key] for key in what}) or {})
                numbers = {key: operator.index(version) for key, version in said.items()}
                return {key: version for key, version in numbers.items() if key in what and version > versions[key]}
            except errors.RowsRefused as e:
                named = {key: error for key, error in e.errors.items() if key in what}
                if not named:  # what it is about nobody knows: none of these is known to be stored
                    raise
                refused |= named
                what = {key: x for key, x in what.items() if key not in named}
            finally:
                self.took = max(self.took, _core.monotonic() - began)
        return {}

    def _failed(self, error: Exception, what: str = "the store fails", quiet: bool = False) -> None:
        self.cache.count_store(errors=1)
        if not self.header["flush_failed_ms"]:
            self.header["flush_failed_ms"] = int(time.time() * 1000)
        if not self.failing and not quiet:
            self.failing = self._say(f"{what} ({type(error).__name__}: {error}); what the store has not got is kept, and tried again")

    def _say(self, what: str) -> bool:
        return notice(f"shmcache: {self.cache.name}: {masked(what)}")

    def stop(self) -> None:
        """End the thread; then try for a while to store what is left, and say if something is. A thread whose call of the store does not
        end is left alone, so that the supervisor can write its last snapshot."""
        self.stopping = True
        self.wake.set()
        limit = max(LAST_CALL, 2 * self.policy.timeout)
        self.thread.join(limit)
        self.left_alone = self.thread.is_alive()
        if self.left_alone:
            self._say(f"a call of the store has not ended for {limit:.0f} s: it is not waited for")
        else:
            self.until = _core.monotonic() + AT_END
            while not self.tried() and _core.monotonic() < self.until:
                time.sleep(min(self.pause, max(0.0, self.until - _core.monotonic())))
                self.pause = min(2 * self.pause, LONGEST_PAUSE)
        self._say_refused()
        left = self.dirty.items()
        if left:
            self._say(f"{left} items are not stored; they are in the segment, and in its snapshot if there is one")
        del self.header
