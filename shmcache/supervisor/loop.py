"""The supervisor's loop.

Each tick it looks at one small column, the free chunks of each slab class, and where a class with neighbours in need is below its low
watermark it lets the class's CLOCK hand evict up to the high one. The hand, and the choice of the page that moves to a class whose items
are younger, are the writers' own (core/clock.pxd): there is one eviction policy, run ahead of demand here and on demand there.

Between ticks it sweeps a slice of the pages for what has expired and what the dead left. A whole sweep begins as often as keeps it below
half a percent of a core, at once when a process has died, and at least every MOST_BETWEEN_SWEEPS.

Ticks come every BUSY_TICK seconds while chunks are used up, else it sleeps on its doorbell, which a writer rings that had to evict.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import numpy as np

from shmcache.core import _sweep

if TYPE_CHECKING:
    from shmcache.cache import Cache

BUSY_TICK = 0.002  # seconds
IDLE_TICK = 1.0
BUSY_FOR = 0.5  # seconds after the last demand
LOW = 0.01  # watermark: of a class's chunks
HIGH_OF_LOW = 2
MOST = 0.04  # of a class's chunks are ever kept free
RATE_TICKS = 4  # the low watermark covers the demand of so many busy ticks
SLICE = 64  # pages swept in a tick
SWEEP_SHARE = 0.005  # of a core
LEAST_BETWEEN_SWEEPS = 1.0
MOST_BETWEEN_SWEEPS = 60.0
ROWS_EVERY = 0.5  # seconds between two looks for the dead


class Supervisor:
    """Exactly one per segment. run() till stop() is called, from a signal handler or another thread.

    Args: cache: a handle of its own. parent: pid of the process that started it, with which it ends; None: it stays.
    Raises: SupervisorRunning.
    """

    def __init__(self, cache: Cache, parent: int | None = None) -> None:
        self.cache = cache
        self.hold = _sweep.Supervision(cache)
        self.parent = parent
        self.stopping = False
        segment = cache.segment
        self.classes = segment.classes
        self.rows = segment.rows
        self.header = segment.header
        self.n_pages = int(self.header["n_pages"])
        self.page_chunks = (1 << int(self.header["page_shift"])) // self.classes["chunk_bytes"].astype(np.int64)
        self.free = self.classes["n_free"].astype(np.int64)
        self.demand = np.zeros(len(self.free))  # chunks used up in a busy tick, by class: decaying maximum
        self.swept = 0  # page at which the sweep goes on
        self.sweep_took = 0.0
        self.next_sweep = 0.0
        self.next_rows = 0.0
        self.settled_rows: set[tuple[int, int]] = set()

    def stop(self, *_: object) -> None:
        """Let run() return after the tick in hand."""
        self.stopping = True

    def run(self) -> None:
        busy_till = 0.0
        try:
            while not self.stopping:
                now = time.monotonic()
                self.hold.beat()
                if self.parent is not None and os.getppid() != self.parent:
                    return
                if self.fill() or self.sweep(now):
                    busy_till = now + BUSY_FOR
                self.look_for_the_dead(now)
                if self.hold.sleep(BUSY_TICK if now < busy_till else IDLE_TICK):
                    busy_till = time.monotonic() + BUSY_FOR
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the segment, and of the views that keep it mapped."""
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

    def sweep(self, now: float) -> int:
        """Go on with the sweep if one is due: how many items were freed."""
        if self.swept == 0 and now < self.next_sweep:
            return 0
        began = time.thread_time()
        freed = self.hold.sweep(self.swept, self.swept + SLICE)
        self.swept += SLICE
        if self.swept >= self.n_pages:
            self.hold.sweep_overflow()
            self.swept = 0
        self.sweep_took += time.thread_time() - began
        if self.swept == 0:
            self.next_sweep = now + min(max(self.sweep_took / SWEEP_SHARE, LEAST_BETWEEN_SWEEPS), MOST_BETWEEN_SWEEPS)
            self.sweep_took = 0.0
        return freed or self.swept  # in the middle of a sweep: come again soon

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
