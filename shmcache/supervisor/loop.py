"""The supervisor's loop.

Each tick it looks at one small column, the free chunks of each slab class, and where a class with neighbours in need is below its low
watermark it lets the class's CLOCK hand evict up to the high one. The hand, and the choice of the page that moves to a class whose items
are younger, are the writers' own (core/clock.pxd): there is one eviction policy, run ahead of demand here and on demand there.

Between ticks it sweeps the pages, some in each tick, for what has expired and what the dead left. A whole sweep begins LEAST_BETWEEN_SWEEPS
after the last one has ended, later if sweeps would take more than half a percent of a core, at once when a process has died, and at
least every MOST_BETWEEN_SWEEPS. So in a small segment what has expired is gone within a third of a second, though nobody asks for it.

With a data directory it writes snapshots, in a thread of its own: every so many seconds, when asked (shmcache-admin snapshot), and one
more at its end. One that has failed is tried again when its disk has more room than it had then, at longer and longer intervals.

Ticks come every BUSY_TICK seconds while chunks are used up or a sweep is under way, else it sleeps, at most until the next sweep, on its
doorbell, which a writer rings that had to evict.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shmcache import errors
from shmcache.core import _stream, _sweep
from shmcache.notices import notice
from shmcache.supervisor import appendlog, snapshot
from shmcache.supervisor.appendlog import AppendLog
from shmcache.supervisor.writeback import WriteBack

if TYPE_CHECKING:
    from shmcache.cache import Cache
    from shmcache.stores import Store

BUSY_TICK = 0.002  # seconds
IDLE_TICK = 1.0
BUSY_FOR = 0.5  # seconds after the last demand
LOW = 0.01  # watermark: of a class's chunks
HIGH_OF_LOW = 2
MOST = 0.04  # of a class's chunks are ever kept free
RATE_TICKS = 4  # the low watermark covers the demand of so many busy ticks
SLICE = 64  # pages swept at a time
SLICE_TIME = 0.0002  # seconds of work after which a tick sweeps no more
SWEEP_SHARE = 0.005  # of a core
LEAST_BETWEEN_SWEEPS = 0.25
MOST_BETWEEN_SWEEPS = 60.0
ROWS_EVERY = 0.5  # seconds between two looks for the dead
SNAPSHOT_EVERY = 300.0  # seconds
SNAPSHOT_RETRY = 1.0  # seconds after the first failure of a snapshot, if there is more room; twice as long after each
MORE_ROOM = 1 << 20  # bytes


class Supervisor:
    """Exactly one per segment. run() till stop() is called, from a signal handler or another thread.

    Args: cache: a handle of its own. parent: pid of the process that started it, with which it ends; None: it stays. folder: a data
    directory that was taken (datadir.take), for snapshots every so many seconds, of which the newest `keep` are left. log: "no",
    "everysec" or "always": what is written is logged there, too (appendlog.py). None, "off": it is not. store: of a segment whose policy
    is write-back: what is written is stored there (writeback.py). spares: asked before each part of a sweep: True: what has expired stays.
    Raises: SupervisorRunning; UsageError: the segment was created without a log_buffer; StripeBusy: it cannot be adopted (datadir.py);
    NewerFormat, OSError.
    """

    def __init__(
        self, cache: Cache, parent: int | None = None, *, folder: Path | None = None, every: float = SNAPSHOT_EVERY,
        keep: int = snapshot.KEEP, compress: bool = False, log: str | None = None, store: Store | None = None,
        spares: Callable[[], bool] = lambda: False,
    ) -> None:
        self.cache = cache
        self.hold = _sweep.Supervision(cache)
        self.parent = parent
        self.spares = spares
        self.stopping = False
        segment = cache.segment
        self.classes = segment.classes
        self.rows = segment.rows
        self.header = segment.header
        appendlog.mark(cache, snapshot_begun_ms=0)  # of who was killed while he wrote one
        self.n_pages = int(self.header["n_pages"])
        self.page_chunks = (1 << int(self.header["page_shift"])) // self.classes["chunk_bytes"].astype(np.int64)
        self.free = self.classes["n_free"].astype(np.int64)
        self.demand = np.zeros(len(self.free))  # chunks used up in a busy tick, by class: decaying maximum
        self.swept = 0  # page at which the sweep goes on
        self.sweep_took = 0.0
        self.next_sweep = 0.0
        self.next_rows = 0.0
        self.settled_rows: set[tuple[int, int]] = set()
        self.folder, self.every, self.keep, self.compress = folder, every, keep, compress
        self.next_snapshot = time.monotonic() + every
        self.failure, self.failure_said = "", False  # of the last snapshot
        self.room = 0  # bytes that the disk had after it
        self.retry, self.retry_at = SNAPSHOT_RETRY, 0.0
        self.writer: threading.Thread | None = None
        self.said: set[str] = set()  # which files are kept, and why
        self.stop_writing = threading.Event()
        self.log: AppendLog | None = None
        self.writeback: WriteBack | None = None
        try:
            if store is not None:
                self.writeback = WriteBack(cache, store, folder)
            self.begin_log(log)
        except BaseException:
            self.close()
            raise

    def stop(self, *_: object) -> None:
        """Let run() return after the tick in hand."""
        self.stopping = True

    def begin_log(self, policy: str | None) -> None:
        if policy in (None, "off"):
            if int(self.header["log_policy"]):  # from here on it is not
                _stream.count_gap(self.cache)
                appendlog.mark(self.cache, log_policy=0)
                self.want_snapshot()
            return
        assert self.folder is not None
        whole = appendlog.is_whole(self.cache, self.folder)
        self.log = AppendLog(self.cache, self.folder, policy, self.want_snapshot, self.compress, whole=whole)
        self.want_snapshot()

    def want_snapshot(self) -> None:
        """Soon: the log has a gap, or begins."""
        self.next_snapshot = 0.0

    def run(self) -> None:
        busy_till = 0.0
        try:
            while not self.stopping:
                now = time.monotonic()
                self.hold.beat()
                if self.parent is not None and os.getppid() != self.parent:
                    return
                if self.fill():
                    busy_till = now + BUSY_FOR
                self.sweep(now)
                if self.writeback is not None:
                    self.writeback.look()
                self.look_for_the_dead(now)
                self.snapshots(now)
                if self.log is not None and not self.log.thread.is_alive():
                    raise RuntimeError("the thread that writes the log has ended")
                until_sweep = 0.0 if self.swept else self.next_sweep - now
                if self.hold.sleep(BUSY_TICK if now < busy_till else max(BUSY_TICK, min(IDLE_TICK, until_sweep))):
                    busy_till = time.monotonic() + BUSY_FOR
            if self.writeback is not None:
                self.writeback.stop()
                self.writeback = None
            if self.folder is not None and not self.cache.unlinked:
                self.end_writer()
                self.write(throttled=False)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the segment, and of the views that keep it mapped."""
        self.end_writer()
        if self.writeback is not None:
            self.writeback.stop()
            self.writeback = None
        if self.log is not None:
            self.log.close()
            self.log = None
        self.hold.end()
        del self.classes, self.rows, self.header

    def fill(self) -> int:
        """Evict up to the high watermark in each class that is below the low one: how many were evicted."""
        free = self.classes["n_free"].astype(np.int64)
        chunks = self.classes["n_pages"] * self.page_chunks
        used = np.maximum(self.free - free, 0)
        self.demand = np.maximum(self.demand * 0.98, used)
        evicted = 0
        if not self.header["pages_n_free"]:  # while there are pages to cut, nothing has to go
            low = np.minimum(np.maximum(LOW * chunks, RATE_TICKS * self.demand), MOST / HIGH_OF_LOW * chunks).astype(np.int64)
            for cls in np.flatnonzero((free < low) & (chunks > 0)).tolist():
                n, _ = self.hold.make_room(cls, int(HIGH_OF_LOW * low[cls] - free[cls]))
                evicted += n
        self.free = self.classes["n_free"].astype(np.int64)
        return evicted + int(used.sum())

    def sweep(self, now: float) -> None:
        """Go on with the sweep if one is due."""
        if self.swept == 0 and now < self.next_sweep:
            return
        began = time.thread_time()
        spares = self.spares()
        while self.swept < self.n_pages and time.thread_time() - began < SLICE_TIME:
            self.hold.sweep(self.swept, self.swept + SLICE, spares)
            self.swept += SLICE
        if self.swept >= self.n_pages:
            self.hold.sweep_overflow()
            self.swept = 0
        self.sweep_took += time.thread_time() - began
        if self.swept == 0:
            self.next_sweep = now + min(max(self.sweep_took / SWEEP_SHARE, LEAST_BETWEEN_SWEEPS), MOST_BETWEEN_SWEEPS)
            self.sweep_took = 0.0

    def look_for_the_dead(self, now: float) -> None:
        """If a process died since the last look, sweep at once: what it had in hand is settled. Of an unlinked segment nobody new
        will ask for anything: leave it to those who still have it."""
        if now < self.next_rows:
            return
        self.next_rows = now + ROWS_EVERY
        self.stopping = self.stopping or self.cache.unlinked
        living = {p["row"] for p in self.cache.processes()}
        rows = self.rows[["gen", "pid"]]
        dead = {(i, int(rows["gen"][i])) for i in np.flatnonzero(rows["pid"]).tolist() if i not in living}
        if dead - self.settled_rows:
            self.next_sweep = 0.0
        self.settled_rows = dead

    def snapshots(self, now: float) -> None:
        """Begin a snapshot if one is due, or was asked for, and none is being written."""
        asked = int(self.header["snapshots_asked"]) > int(self.header["snapshots_ended"])
        if self.folder is None:
            if asked:  # nobody is to wait for what will not be
                self.end_asked(int(self.header["snapshots_asked"]), int(time.time() * 1000))
            return
        if (asked or now >= self.next_snapshot or self.has_room_again(now)) and (self.writer is None or not self.writer.is_alive()):
            self.next_snapshot = now + self.every
            self.writer = threading.Thread(target=self.write, name="snapshot", daemon=True)
            self.writer.start()

    def has_room_again(self, now: float) -> bool:
        """Has the disk more room than when the last snapshot failed?"""
        return self.failure != "" and now >= self.retry_at and self.disk_room() >= self.room + MORE_ROOM

    def disk_room(self) -> int:
        """Free bytes; 0: nobody knows."""
        assert self.folder is not None
        with contextlib.suppress(OSError):
            disk = os.statvfs(self.folder)
            return disk.f_bavail * disk.f_frsize
        return 0

    def write(self, throttled: bool = True) -> None:
        """Write a snapshot. That it failed is said in stats(), and on standard error until one is written: each reason once."""
        assert self.folder is not None
        if throttled:
            snapshot.step_back(snapshot.NICE)
        asked = int(self.header["snapshots_asked"])
        try:
            report = snapshot.write(
                self.cache, self.folder, keep=self.keep, compress=self.compress, throttled=throttled,
                stop=self.stop_writing if throttled else None, log=self.log,
            )  # fmt: skip
            if self.failure:
                notice(f"shmcache: snapshots of {self.cache.name} go on with {report['path']}")
            self.failure, self.retry = "", SNAPSHOT_RETRY
            self.said |= {line for line in set(report["kept"]) - self.said if notice(f"shmcache: kept: {line}")}
        except errors.SnapshotStopped:
            return  # the last one, which run() writes, is what was asked for
        except (errors.ShmcacheError, OSError) as e:
            if str(e) != self.failure or not self.failure_said:
                self.failure_said = notice(f"shmcache: no snapshot of {self.cache.name}: {e}")
            self.failure, self.room = str(e), self.disk_room()
            self.retry_at = time.monotonic() + self.retry
            self.retry = min(2 * self.retry, self.every)
        except BaseException:
            self.end_asked(asked, int(time.time() * 1000))
            raise
        self.end_asked(asked)

    def end_asked(self, number: int, failed_ms: int = 0) -> None:
        header = self.cache.views(writable=True).header
        if failed_ms:
            header["snapshot_failed_ms"] = failed_ms
        header["snapshots_ended"] = number

    def end_writer(self) -> None:
        """Stop the snapshot that is being written, if one is."""
        if self.writer is not None:
            self.stop_writing.set()
            self.writer.join()
            self.writer = None
