"""Does anything get lost, or back to what it was, over several lives of one segment? Everything is killed at random moments, also inside a
snapshot that takes seconds, and inside a restore; the segment is gone, and restored from what is on the disk.

    python -m tests.stress.lives --seconds 3600 --seed 1
    python -m tests.stress.lives --lives 12 --seed 7 --log always        the series of seed 7, whose logs are always so
    python -m tests.stress.lives --events copy,quick --seed 3            of the events below these alone, and often
    python -m tests.stress.lives --store postgresql

A series is some lives of one segment that is written back, with one database; series n has the seed `seed` + n. A life is logged `always`,
`everysec` or not at all. The store is up, down, slow, or does what it is told and does not answer, by turns. In a life the clock may be back.
Before the first one rows may be there that were written by a clock that was ahead. By the seed, one of these may happen in a life (--events):
{events}

What has to hold. Each key has one writer, which counts (numbers.py):
  a row never goes back to an older state, whatever happens                                                      (a trigger writes all down)
  a reader finds no state from before its key's floor, and none that was never asked for
  at the end, when all is stored, neither is older than its row was ever seen
The floor is the last write that was acknowledged. A death lowers it to what the files have to have from which the next life is restored:
  what the newest whole snapshot has: all that was acknowledged before it began (its HEAD says when)
  and what was acknowledged in lives that were logged since: `always`, or `everysec` if all rings were empty in the end and there was no gap
With each event it is this:
  lost                 what the rows have. What is acknowledged from then on is no less safe than at any time
  copy                 what the copy promised when it was made; no row goes back that was stored since
  worker               what the rows have. The files of the segment before it stay. A life that is to be logged has to be refused; then the
                       segment is unlinked, and restored, or another directory is taken, which promises what its log has
  backup, other, two   what the directory promises from which the live segment was restored, never a mixture of two. The other one may refuse
                       it. If it does not, nothing that is acknowledged from then on may be lost, and what is not of this segment stays there
  switch, start-empty  the segment lives on. What its new log has; a restore from it has to say that there is a gap
  full                 the same as without it
Nobody can know what is newer where the clock was behind, or rows are of a clock that was ahead, and the directory is lost or an older one is
used (supervisor/DECISIONS.md): that is left out.

A key of the cache's own has no row, and may be missed. Most of the memory is such keys: the ballast that makes a snapshot long; all but a
hundredth of it has to come back.

How it counts: a life ended within a snapshot if everything was killed while one was being written whose file is there, and not whole. Quick
restarts are no lives. An event counts if it came to it; `full` needs a file system of its own, mounted in a private namespace: where that is
not allowed, the program says so, and goes on without it.

Prints a line for people, and JSON; exit code 1: something is wrong. Then the folder is kept, with what there was before the last life.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import mmap
import multiprocessing as mp
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

import shmcache
from shmcache import cache as cache_module
from shmcache import errors
from shmcache.supervisor import datadir
from tests.stress.numbers import Numbers, attached, deleted_since, row, work
from tests.stress.promises import Ancestors, Files
from tests.stress.rows import History

EVENTS = {
    "damaged": "the newest snapshot is damaged",
    "removed": "the newest snapshot is removed",
    "lost": "the data directory is lost",
    "copy": "an older copy of it is put back",
    "worker": "a worker creates the segment before there is a supervisor",
    "backup": "an older copy is restored by hand (shmcache-admin restore), then a supervisor begins with the data directory",
    "other": "a supervisor with an older copy is killed while it restores, then one begins with the data directory",
    "two": "one with the data directory and one with an older copy begin at once",
    "switch": "while it lives, the next supervisor gets a new data directory; sometimes the one after it the former again",
    "start-empty": "a restore is killed when workers are in, its files are damaged, and --start-empty follows",
    "full": "the disk is full for some seconds",
    "quick": "beside any of these: a few restarts at once, one second each or less, before the life or behind it",
}  # fmt: skip
DEFAULT = tuple(EVENTS)
LATER = ("damaged", "removed", "lost", "copy", "backup", "other", "two", "start-empty")  # not in the first life
OF_A_COPY = ("copy", "backup", "other", "two")
KEEPING = ("damaged", "removed", "full", "quick")  # with the others something is lost that was acknowledged
TABLE = "lives"
WORKERS, KEYS = 2, 160
NAMES = [b"\0own %d" % key if key % 8 > 5 else b"%d" % key for key in range(KEYS)]
STORED = [key for key, name in enumerate(NAMES) if name[0] != 0]
BALLAST = KEYS  # where the model has whether all of the ballast was written
ITEM_BYTES = 1000
PAD = bytes(range(256)) * 4
SHARE = 0.4  # of its keys, which a worker writes in a life
PAUSE = 0.02  # seconds after twenty keys: the machine is for the snapshots
LONGEST_LIFE = 15.0  # seconds after which one is ended that has not come to its end
SERIES = 12  # lives of one segment, at most
LIMIT = 100.0  # seconds for a process to begin, or to refuse; a worker waits for a restore for 60
COPIES = 2  # of a series' data directory
EVENT_SHARE, EVENT_SHARE_NAMED = 0.55, 0.8  # of lives with one
UP, DOWN, SLOW, MUTE = range(4)  # what the store does
MS_REMOUNT, MNT_DETACH = 32, 2
LARGE = 16 << 30
IN_NAMESPACE = "LIVES_IN_NAMESPACE"
fork = mp.get_context("fork")
libc = ctypes.CDLL(None, use_errno=True)
CLOCK = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *at) {
    static long back = -1;
    if (back < 0)
        back = getenv("LIVES_CLOCK_BACK") ? atol(getenv("LIVES_CLOCK_BACK")) : 0;
    int rc = (int)syscall(SYS_clock_gettime, clock, at);
    if (rc == 0 && clock == CLOCK_REALTIME)
        at->tv_sec -= back;
    return rc;
}
"""
assert __doc__ is not None
__doc__ = __doc__.format(events="\n".join(f"  {name:<20} {what}" for name, what in EVENTS.items()))


class Store:
    """An SQLStore that is up, down, slow, or mute, as the first byte of a file says."""

    ordered = True

    def __init__(self, url: str, mood: str) -> None:
        self.store = shmcache.SQLStore(url, TABLE)
        with open(mood, "r+b") as file:
            self.mood = mmap.mmap(file.fileno(), 1)

    def call(self, most: float, call: Any, *args: Any, **kwargs: Any) -> Any:
        """most: seconds that it takes when it is slow."""
        mood = self.mood[0]
        if mood == DOWN:
            raise errors.StoreUnavailable("it is down")
        if mood == SLOW:
            time.sleep(random.uniform(0, most))
        told = call(*args, **kwargs)
        if mood == MUTE:
            raise errors.StoreUnavailable("it was done, and nobody heard it")
        return told

    def load_many(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(0.01, self.store.load_many, *args, **kwargs)

    def store_many(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(0.5, self.store.store_many, *args, **kwargs)

    def delete_many(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(0.5, self.store.delete_many, *args, **kwargs)

    def close(self) -> None:
        self.store.close()


def store() -> Store:
    """What the supervisor is told to open (--store)."""
    return Store(os.environ["LIVES_URL"], os.environ["LIVES_MOOD"])


@dataclasses.dataclass
class Plan:
    """Of a life.

    end: "restore": inside it; "first": inside the first snapshot that has all of the ballast; "later": inside another; "whenever"; "quick": as
    soon as it is restored. at: how far into that, 0 to 1. mood: of the store all the time; None: it changes. event: one of EVENTS, or None.
    """

    log: str
    end: str
    at: float
    mood: int | None
    supervisors: list[tuple[float, float]]  # seconds after the start when one is killed, and until the next begins
    workers_first: bool  # they are killed before it is
    event: str | None
    advice: bool  # what is refused is unlinked, and begun again; or the operator goes on another way. Of a quick restart: are there workers?
    copied: bool  # a copy of the data directory is made before it
    clock_back: int  # seconds
    every: float  # seconds between two snapshots


def planned(rng: random.Random, log: str, life: int, events: list[str], share: float) -> Plan:
    """events: those that may happen, each as likely as often it stands there; in so many lives (share) one does."""
    if log == "mixed":
        log = rng.choice(("always", "everysec", "off"))
    events = [event for event in events if event != "quick" and (life or event not in LATER)]
    event = rng.choice(events) if events and rng.random() < share else None
    alone = event in (None, "damaged", "removed", "lost", "copy", "full")
    ends = (0, 12, 1, 1) if event in ("switch", "start-empty") else (3 if life and alone and event != "full" else 0, 6, 2, 2)
    return Plan(
        log=log, end=rng.choices(("restore", "first", "later", "whenever"), ends)[0], at=rng.random(), mood=rng.choices((None, DOWN, UP), (3, 9 if event in ("lost", "copy", "worker") else 1, 1))[0],
        supervisors=sorted((rng.uniform(0, 3), rng.choice((0, rng.uniform(0, 1.5)))) for _ in range(rng.choices((0, 1, 2), (7, 2, 1))[0] * alone)),
        workers_first=rng.random() < (0.7 if log == "everysec" else 0.3), event=event, advice=rng.random() < 0.5,
        copied=life == 1 or rng.random() < 0.3, clock_back=rng.choices((0, 3600, 30 * 86400), (7, 1, 1))[0] if alone else 0, every=rng.uniform(0.3, 2.0),
    )  # fmt: skip


def ballast(i: int) -> bytes:
    return (b"%d:" % i + PAD)[:ITEM_BYTES]


def fill(name: str, items: int, numbers: Numbers, wrong: Any) -> None:
    """Look at the ballast as soon as the segment is restored, and write what is missing."""
    with attached(name, None) as cache:
        while cache.durability()["restoring"]:
            time.sleep(0.01)
        missing = []
        for i in range(items):
            value = cache.get(b"\0ballast %d" % i)
            if value is None:
                missing.append(i)
            elif value != ballast(i):
                wrong.append(f"ballast {i} is {value[:40]!r}")
        if numbers.floor[BALLAST] and len(missing) > items // 100:
            wrong.append(f"{len(missing)} of {items} items of ballast are missing")
        while missing:
            try:
                cache.set_many({b"\0ballast %d" % i: ballast(i) for i in missing[-50:]})
                del missing[-50:]
            except errors.CapacityError:
                time.sleep(0.01)
        numbers.floor[BALLAST] = 1


class Disk:
    """A folder for data directories. If it is a file system of its own it can be full."""

    def __init__(self, path: Path, of_its_own: bool) -> None:
        self.path, self.of_its_own = path, of_its_own
        path.mkdir()
        if of_its_own:
            self.mount(0, LARGE)

    def mount(self, flags: int, size: int) -> None:
        if libc.mount(b"tmpfs", os.fsencode(self.path), b"tmpfs", flags, b"size=%d" % size):
            raise OSError(ctypes.get_errno(), f"mount of {self.path}")

    def fill(self) -> None:
        """Once more: what was removed has left room."""
        now = os.statvfs(self.path)
        with contextlib.suppress(OSError):  # somebody writes just now
            self.mount(MS_REMOUNT, (now.f_blocks - now.f_bfree) * now.f_frsize + 4096)

    def empty(self) -> None:
        self.mount(MS_REMOUNT, LARGE)

    def close(self, keep: bool) -> None:
        if self.of_its_own:
            if keep:
                shutil.copytree(self.path, self.path.with_name("kept"))
            if libc.umount2(os.fsencode(self.path), MNT_DETACH):
                raise OSError(ctypes.get_errno(), f"umount of {self.path}")


class Series:
    """Some lives of one segment, in a folder of its own, which has their database, too, if that is a file."""

    def __init__(
        self, seed: int, url: str, folder: Path, log: str, megabytes: float, events: tuple[list[str], float], wrong: Any, report: dict[str, Any]
    ) -> None:
        self.seed, self.url, self.folder, self.log, self.wrong, self.report = seed, url, folder, log, wrong, report
        self.rng = random.Random(seed)
        self.name = f"lives-{os.getpid()}-{seed}"
        self.disk = Disk(folder / "disk", IN_NAMESPACE in os.environ)
        self.mood = folder / "mood"
        self.mood.write_bytes(bytes([UP]))
        self.environment = os.environ | {"LIVES_URL": url, "LIVES_MOOD": str(self.mood)}
        self.store = Store(url, str(self.mood))
        self.history = History(url, TABLE)
        self.items = int(megabytes * self.rng.uniform(0.7, 1.3) * self.rng.choice((1, 1, 0.2)) * 1e6 / ITEM_BYTES)
        self.size = f"{64 + self.items * ITEM_BYTES * 14 // 10_000_000}M"
        self.numbers = Numbers(NAMES, more=1)
        self.rows = np.zeros(KEYS, np.int64)  # the write after which each row is, at least
        self.places = 0  # directories so far
        self.files = self.new_files()
        self.copies: list[Files] = []
        self.ancestors: Ancestors = {}
        self.lost = False  # something that was acknowledged, perhaps
        self.snapshot_takes = self.restore_takes = 1.0  # seconds, as the last one did
        self.processes: list[Any] = []
        self.supervisor: Any = None
        self.said = folder / "said"
        self.said.touch()
        self.begin_accounts()
        ahead = self.rng.choice((0, 0, 0, 30 * 86400))
        if ahead:
            some = STORED[::2]
            self.numbers.asked[some] = 3
            version = int(time.time() + ahead) * 1000 << 20
            self.store.store_many({NAMES[key]: (row(3), None) for key in some}, versions={NAMES[key]: version for key in some})
            self.look_at_rows()
        self.events, self.share = events
        if ahead:
            self.events = [event for event in self.events if event in (*KEEPING, "lost")]
        say(f"seed {seed}: log {log}, {self.items} items of ballast, rows {'of a clock that was ahead' if ahead else 'none'} at first")

    def close(self) -> None:
        for process in self.processes[:]:
            self.end(process)
        with contextlib.suppress(errors.SegmentNotFound):
            shmcache.unlink(self.name)
        self.store.close()
        self.history.close()
        self.disk.close(bool(self.wrong))

    # ---- processes ----

    def end(self, process: Any) -> None:
        process.kill()
        process.wait() if isinstance(process, subprocess.Popen) else process.join()
        self.processes.remove(process)

    def end_workers(self) -> None:
        for process in [p for p in self.processes if not isinstance(p, subprocess.Popen)]:
            self.end(process)

    def spawn(self, plan: Plan, path: Path, *more: str) -> Any:
        """A supervisor with this directory."""
        command = [sys.executable, "-m", "shmcache.cli", "supervise", self.name, "--quiet", "--size", self.size, "--policy", "back", "--store",
                   "tests.stress.lives:store", "--data-dir", str(path), "--log", plan.log, "--snapshot-every", f"{plan.every:.2f}",
                   "--parent", str(os.getpid()), *more]  # fmt: skip
        environment = self.environment
        if plan.clock_back:
            environment = environment | {"LD_PRELOAD": str(self.folder / "clock.so"), "LIVES_CLOCK_BACK": str(plan.clock_back)}
        with open(self.said, "ab") as said:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=said, env=environment)
        self.processes.append(process)
        return process

    def supervise(self, plan: Plan, *more: str) -> None:
        self.supervisor = self.spawn(plan, self.files.path, *more)

    def begin_worker(self, target: Any, *args: Any, **kwargs: Any) -> None:
        process = fork.Process(target=target, args=(self.name, *args), kwargs=kwargs, daemon=True)
        self.processes.append(process)
        process.start()

    def begin_workers(self, plan: Plan) -> None:
        for i in range(WORKERS):
            self.begin_worker(
                work, lambda: Store(self.url, str(self.mood)), i, WORKERS, self.numbers, self.wrong, self.rng.random(),
                strict=self.log == "always" and not self.lost, share=SHARE, pause=PAUSE,
            )  # fmt: skip
        if plan.end != "quick":
            self.begin_worker(fill, self.items, self.numbers, self.wrong)

    def until(self, condition: Callable[[], Any], limit: float = LIMIT) -> bool:
        """Wait for it: has it come true, and nothing gone wrong?"""
        deadline = time.monotonic() + limit
        while not self.wrong and time.monotonic() < deadline:
            if condition():
                return True
            self.sample()
            time.sleep(0.002)
        return False

    # ---- the accounts of a life: what was acknowledged when, and where it was logged ----

    def begin_accounts(self) -> None:
        self.samples: list[tuple[float, Any]] = []  # of the floor, and when it was at least so high
        self.used: list[Files] = []  # in this life
        self.since: Any = None  # what was acknowledged before this floor may not be in the log; None: nothing is
        self.gaps = 0  # that the log had then
        self.gap_behind: set[str] | None = None  # Files.gap_behind, if something is
        self.stay: list[tuple[Files, set[str]]] = []  # names of files
        self.reads_gap = False  # the restore has to say so
        self.restores: str | None = None  # the snapshot that has to be restored
        self.said_before = self.said.stat().st_size

    def begin_floor(self, floor: Any) -> None:
        """From here on. Nobody works."""
        self.numbers.floor[:] = floor
        self.samples = []
        self.sample()

    def sample(self) -> None:
        floor = self.numbers.floor.copy()
        self.samples.append((time.time(), floor))

    def begins(self, cache: Any, ancestors: set[int]) -> None:
        """The segment is there."""
        segment = self.header(cache, "created_ms")[0]
        self.ancestors[segment] = frozenset(ancestors).union(*(self.ancestors[one] for one in ancestors))

    def goes_on_in(self, cache: Any, files: Files) -> None:
        """A supervisor has taken the segment, with this directory."""
        self.files = files
        if files not in self.used:
            self.used.append(files)
        self.stay.append((files, files.others(self.header(cache, "created_ms")[0], self.ancestors)))

    def logged(self, cache: Any, log: str, floor: Any) -> None:
        """What was acknowledged is in the log as far as it has to be."""
        if self.since is None or log == "off":
            return
        waiting, gaps = cache.durability()["log_waiting_bytes"], self.header(cache, "log_gaps")[0]
        has_all = log == "always" or (not waiting and gaps == self.gaps)
        if has_all and self.files.log(floor, self.since) and self.gap_behind is not None:
            self.files.gap_behind = self.gap_behind
        self.since = None

    def log_has_begun(self, cache: Any, plan: Plan, numbers: set[int]) -> bool:
        """In a new file: from now on it has what is acknowledged."""
        if plan.log == "off":
            return True

        def begun() -> bool:
            return self.ended() or any(number not in numbers and datadir.head(path, "log") for number, path in self.files.listing()[1])

        if not self.until(begun) or self.ended():
            self.wrong.append(f"no log began; the supervisor: {self.supervisor.poll()}")
            return False
        self.since, self.gaps = self.numbers.floor.copy(), self.header(cache, "log_gaps")[0]
        self.since[BALLAST] = 1  # not all of it is in there
        return True

    def ended(self) -> bool:
        return self.supervisor.poll() is not None

    # ---- how a life begins ----

    def restored(self, plan: Plan) -> Any:
        """By the supervisor, while the workers wait: a handle, or None."""
        self.promise(self.files)
        self.supervise(plan)
        if plan.end != "quick" or plan.advice:  # else nobody works
            self.begin_workers(plan)
        return self.born_of(self.files)

    def promise(self, files: Files) -> None:
        """The segment will be restored from it, or begin empty with it."""
        self.reads_gap, whole = files.has_gap(), files.whole()
        self.restores = whole[-1] if whole else "None"
        self.parents = files.parents()
        files.restored()
        self.begin_floor(files.promised(self.rows))
        self.since, self.gaps = self.numbers.floor.copy(), 0  # logged from the first moment

    def born_of(self, files: Files) -> Any:
        cache = self.born()
        if cache is not None:
            self.begins(cache, self.parents)
            self.goes_on_in(cache, files)
        return cache

    def born(self) -> Any:
        """A handle, as soon as there is a segment; None: there will be none."""
        while True:
            try:
                return cache_module.attach_unsettled(self.name)  # also while nobody else may: it only looks
            except errors.SegmentNotFound:
                if self.ended():
                    self.wrong.append(f"the supervisor ended with {self.supervisor.returncode}")
                    return None
                time.sleep(0.002)

    def by_worker(self, plan: Plan) -> Any:
        """It begins empty, and above nobody's versions."""
        options = {} if plan.log == "off" else {"log_buffer": "64K"}
        self.begin_floor(np.append(self.rows, 0))
        self.restores = None
        shmcache.open(self.name, self.size, policy="back", store=self.store, **options).close()
        cache = cache_module.attach_unsettled(self.name)
        self.begins(cache, set())
        self.begin_workers(plan)
        time.sleep(self.rng.uniform(0, 0.5))  # they work without a supervisor
        return self.adopted(cache, plan, self.new_files())

    def by_hand(self, plan: Plan) -> Any:
        """Restored from an older copy; then a supervisor with the data directory adopts it, or does not."""
        copy = self.a_copy()
        self.promise(copy)
        self.begin_workers(plan)
        command = [sys.executable, "-c", "import sys; from shmcache.cli import admin; sys.exit(admin())", "restore", self.name, "--data-dir",
                   str(copy.path), "--size", self.size]  # fmt: skip
        with open(self.said, "ab") as said:
            told = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=self.environment, check=False)
        if told.returncode:
            self.wrong.append(f"restore ended with {told.returncode}")
            return None
        cache = cache_module.attach_unsettled(self.name)
        self.begins(cache, self.parents)
        return self.adopted(cache, plan, copy)

    def by_another(self, plan: Plan) -> Any:
        """A supervisor with an older copy is killed within its restore, or soon after it."""
        copy, files = self.a_copy(), self.files
        self.promise(copy)
        self.supervisor = self.spawn(plan, copy.path)
        cache = self.born_of(copy)
        if cache is None:
            return None
        self.until(lambda: not cache.durability()["restoring"], self.restore_takes * plan.at * 1.2)
        self.end(self.supervisor)
        self.used, self.stay, self.restores = [], [], None
        if not cache.durability()["generations_missing"]:  # it is certain: workers could have been in
            self.begin_workers(plan)
            return self.adopted(cache, plan, copy, files)
        self.count("other: not certain")
        before = files.names()
        self.promise(files)
        self.files = files
        self.supervise(plan)
        self.begin_workers(plan)
        if not self.held():
            return self.refused(cache, plan, None, before)
        cache.close()
        return self.born_of(files)

    def by_two(self, plan: Plan) -> Any:
        """Two supervisors, one with an older copy: one of them gets the segment, and all of its own."""
        both = [self.files, self.a_copy()]
        self.rng.shuffle(both)
        began, promised, processes = time.time(), [], []
        for files in both:
            self.promise(files)
            promised.append((self.parents, self.since))
        for files in both:
            processes.append(self.spawn(plan, files.path))
            self.until(lambda: False, self.rng.uniform(0, self.restore_takes))
        self.until(lambda: any(process.poll() is not None for process in processes))
        left = [at for at, process in enumerate(processes) if process.poll() is None]
        if len(left) != 1 or "Traceback" in self.new_said():
            self.wrong.append(f"two supervisors began, and have ended with {[process.returncode for process in processes]}")
            return None
        self.processes.remove(processes[1 - left[0]])
        files, (self.parents, self.since) = both[left[0]], promised[left[0]]
        self.begin_floor(self.since)
        self.samples[0] = began, self.since
        self.restores = None  # two have said what they restored
        self.count("two: the copy" if files is not self.files else "two: the directory")
        self.files, self.supervisor = files, processes[left[0]]
        self.begin_workers(plan)
        return self.born_of(files)

    def from_nothing(self, plan: Plan) -> Any:
        """A restore is killed when workers are in, its snapshots are damaged, and what is there goes on without them."""
        files = self.files
        self.promise(files)
        self.supervise(plan)
        self.begin_workers(dataclasses.replace(plan, end="quick"))
        cache = self.born_of(files)
        if cache is None:
            return None
        self.until(lambda: not cache.durability()["generations_missing"])
        self.until(lambda: not cache.durability()["restoring"], 0.3 * plan.at * self.restore_takes)
        self.end(self.supervisor)
        self.begin_worker(fill, self.items, self.numbers, self.wrong)
        if not cache.durability()["restoring"]:  # too late
            plan.event = None
            self.supervise(plan)
            return cache
        self.restores = None
        self.numbers.floor[BALLAST] = 0  # what is the cache's own, and not there yet, does not come any more
        for name in files.whole():
            files.damage(name, self.rng.random(), self.rng.randrange(8))
        before = files.names()
        self.supervise(plan, "--start-empty")
        if not self.held():
            self.wrong.append(f"with --start-empty the supervisor ended with {self.supervisor.returncode}")
            return cache
        aside = {path.name for path in files.path.glob("set-aside-*/*")}
        if before - aside:
            self.wrong.append(f"not set aside: {before - aside}")
        self.lost = True
        self.files = Files(files.path, KEYS + 1)
        self.used, self.stay = [], []
        self.since, self.gap_behind = None, set()
        self.log_has_begun(cache, plan, set())
        self.goes_on_in(cache, self.files)
        return cache

    def held(self) -> bool:
        """Has the supervisor taken the segment? Else it has ended."""

        def holds() -> bool:
            if self.ended():
                return True
            try:
                with cache_module.attach_unsettled(self.name) as cache:  # each time: it may begin another
                    return bool(cache.supervisor()["pid"] == self.supervisor.pid)
            except errors.SegmentNotFound:
                return False

        return self.until(holds) and not self.ended()

    def adopted(self, cache: Any, plan: Plan, own: Files, files: Files | None = None) -> Any:
        """A supervisor begins with a directory of which the live segment was not restored. It may refuse that.

        own: a directory that fits."""
        files = files or self.files
        before, numbers = files.names(), {number for number, _ in files.listing()[1]}
        self.since = None
        self.lost = True
        self.files = files
        self.supervise(plan)
        if not self.held():
            return self.refused(cache, plan, own, before)
        self.count(f"{plan.event}: adopted")
        if before:
            files.adopted()
        self.log_has_begun(cache, plan, numbers)
        self.goes_on_in(cache, files)
        return cache

    def refused(self, cache: Any, plan: Plan, own: Files | None, before: set[str]) -> Any:
        """What an operator does then: unlinks the segment, and restores it; or takes a directory that fits."""
        files, code = self.files, self.supervisor.poll()
        if self.wrong:
            return None
        if code not in (1, 2) or "Traceback" in self.new_said():
            self.wrong.append(f"a supervisor that may be refused ended with {code}")
            return None
        if files.names() != before:
            self.wrong.append(f"a supervisor that was refused has changed {before} to {files.names()}")
        if own is not None and not Path(f"/dev/shm/shmcache.{self.name}").exists():
            self.wrong.append("a supervisor that was refused has unlinked the segment")
            return None
        self.count(f"{plan.event}: refused")
        self.processes.remove(self.supervisor)
        logs = plan.log == "off" or self.header(cache, "ring_bytes")[0] > 0
        if own is None or plan.advice or not logs:
            self.end_workers()
            cache.close()
            with contextlib.suppress(errors.SegmentNotFound):  # if nobody could be in, it is
                shmcache.unlink(self.name)
            self.used, self.stay = [], []
            self.said_before = self.said.stat().st_size
            return self.restored(plan)
        self.files = own
        numbers = {number for number, _ in own.listing()[1]}
        self.supervise(plan)
        if not self.held():
            self.wrong.append(f"with a directory that fits the supervisor ended with {self.supervisor.returncode}")
            return cache
        self.log_has_begun(cache, plan, numbers)
        self.goes_on_in(cache, own)
        return cache

    # ---- a life ----

    def live(self, plan: Plan) -> None:
        if plan.event in OF_A_COPY and not self.copies:
            plan.event = None
        if plan.event == "start-empty" and not self.files.whole():
            plan.event = None
        self.tamper(plan)
        self.keep()
        self.begin_accounts()
        if self.files.is_empty() or plan.event in ("lost", "copy"):
            plan.clock_back = 0  # with that nobody could know what is newer: supervisor/DECISIONS.md
        begin = {"worker": self.by_worker, "backup": self.by_hand, "other": self.by_another, "two": self.by_two, "start-empty": self.from_nothing}
        self.report["doing"] = str(plan)
        cache = begin.get(plan.event or "", self.restored)(plan)
        if cache is not None and not self.wrong:
            cache = self.watch(cache, plan)
        if cache is None:
            return
        with cache:
            if self.disk.of_its_own:
                self.disk.empty()
            supervised = not self.ended() and self.supervisor in self.processes
            self.kill(cache, plan)
            restoring, begun_ms, whole_ms, segment = self.header(cache, "restoring", "snapshot_begun_ms", "snapshot_ms", "created_ms")
            self.logged(cache, plan.log, self.numbers.floor.copy())
        with contextlib.suppress(errors.SegmentNotFound):
            shmcache.unlink(self.name)
        in_snapshot = supervised and begun_ms != 0 and any(
            path.stat().st_mtime_ns // 1_000_000 >= begun_ms + plan.clock_back * 1000 for path in self.files.path.glob("snapshot-*.shmcache.tmp")
        )
        say(f"  {plan}: ended in {'a restore' if restoring else 'a snapshot' if in_snapshot else 'neither'}")
        if plan.end == "quick":
            self.report["quick_restarts"] += 1
        else:
            self.report["lives"] += 1
            self.report["lives_ended_in_snapshot"] += in_snapshot
            self.report["lives_ended_in_restore"] += restoring != 0
            self.report["lives_without_a_snapshot"] += whole_ms == 0
            self.report["logged"][plan.log] += 1
            if plan.event and plan.event not in ("switch", "full"):
                self.count(plan.event)
        self.look_at_rows()
        self.look_at_files(plan, segment)
        self.look_at_said(restoring)

    def count(self, event: str) -> None:
        self.report["events"][event] = self.report["events"].get(event, 0) + 1

    def new_files(self) -> Files:
        self.places += 1
        return Files(self.disk.path / f"data-{self.places}", KEYS + 1)

    def a_copy(self) -> Files:
        """To be used: a copy of one of the copies."""
        self.lost = True
        self.places += 1
        return self.rng.choice(self.copies).copied(self.disk.path / f"data-{self.places}")

    def tamper(self, plan: Plan) -> None:
        """What happens to the files between two lives."""
        files, whole = self.files, self.files.whole()
        if plan.event in ("lost", "copy") and files.path.exists():
            shutil.rmtree(files.path)
            self.files = self.new_files() if plan.event == "lost" else self.rng.choice(self.copies).copied(files.path)
            self.lost = True
        elif plan.event in ("damaged", "removed"):
            if len(whole) < 2 or files.snapshots[whole[-1]][1] != files.snapshots[whole[-2]][1]:
                plan.event = None
            elif plan.event == "damaged":
                files.damage(whole[-1], self.rng.random(), self.rng.randrange(8))
            else:
                files.remove(whole[-1])
        if plan.copied and plan.end != "quick" and not self.files.is_empty() and plan.event is None:
            if len(self.copies) == COPIES:
                shutil.rmtree(self.copies.pop(0).path)
            self.places += 1
            self.copies.append(self.files.copied(self.disk.path / f"copy-{self.places}"))

    def keep(self) -> None:
        """What there is before a life: for a person who looks for the mistake."""
        before = self.disk.path / "before"
        shutil.rmtree(before, ignore_errors=True)
        before.mkdir()
        if self.files.path.exists():
            shutil.copytree(self.files.path, before / "data", copy_function=os.link)
        for path in self.folder.glob("db*"):
            shutil.copy(path, before)

    @staticmethod
    def header(cache: Any, *names: str) -> list[int]:
        """Words of it; no view is kept, so that it can be closed whatever comes."""
        header = cache.segment.header
        return [int(header[name]) for name in names]

    def watch(self, cache: Any, plan: Plan) -> Any:
        """Until the life comes to its end, or something is wrong: a handle of the segment that there is then, or None."""
        began = time.monotonic()
        restored = full = begun_at = mood_till = 0.0
        begun, newest, again, deaths = 0, 0, 0.0, [began + after for after, _ in plan.supervisors]
        end = began + (1.2 * plan.at * self.restore_takes if plan.end == "restore" else LONGEST_LIFE)
        event_at = event_till = float("inf")
        former: Files | None = None  # of a switch that is to go back
        while (now := time.monotonic()) < end:
            self.sample()
            restoring, begun_ms, whole_ms = self.header(cache, "restoring", "snapshot_begun_ms", "snapshot_ms")
            if now > mood_till:
                self.store.mood[0] = self.rng.choices((UP, DOWN, SLOW, MUTE), (6, 3, 2, 1))[0] if plan.mood is None else plan.mood
                mood_till = now + self.rng.expovariate(1)
            if self.supervisor not in self.processes:
                if now > again:
                    self.supervise(plan)
            elif self.ended():
                self.wrong.append(f"the supervisor ended by itself, with {self.supervisor.returncode}")
            elif deaths and now > deaths[0]:
                again = now + plan.supervisors[len(plan.supervisors) - len(deaths)][1]
                del deaths[0]
                self.end(self.supervisor)
                self.report["supervisors_killed"] += 1
            elif any(process.exitcode for process in self.processes if not isinstance(process, subprocess.Popen)):
                self.wrong.append("a worker ended by itself")
            if self.wrong:
                return cache
            if cache.unlinked:  # the restore was killed, and the next has begun again
                cache.close()
                cache = self.born_of(self.files)
                if cache is None:
                    return None
                continue
            if not restored and not restoring:
                restored = now
                self.restore_takes = max(0.2, now - began)
                if plan.end == "quick":
                    end = now + plan.at * (1 if plan.advice else 0.3)
            if not full and self.numbers.floor[BALLAST]:
                full = now
                if plan.end == "whenever":
                    end = now + 6 * plan.at
                if plan.event in ("switch", "full"):
                    event_at = now + self.rng.uniform(0, 2)
            if now > event_at and plan.event == "full" and self.disk.of_its_own:
                self.count("full")
                event_at, event_till = float("inf"), now + self.rng.uniform(0.5, 3)
                end = max(end, event_till + 1)
            if now > event_at and plan.event == "switch" and not cache.durability()["generations_missing"]:
                # while it is not certain that it can be restored, only the same directory has what it takes: another is refused, and says so
                if former is None:
                    self.count("switch")
                    former = self.files
                    self.switch(cache, plan, self.new_files())
                    event_at = time.monotonic() + self.rng.uniform(0, 2) if plan.advice else float("inf")
                    if plan.end == "whenever":
                        end = time.monotonic() + plan.at
                else:
                    self.count("switch: back")
                    self.switch(cache, plan, former)
                    event_at = float("inf")
            if now < event_till < float("inf"):
                self.disk.fill()
            elif event_till < float("inf"):
                self.disk.empty()
                event_till = float("inf")
            if begun_ms != begun:
                if begun and whole_ms == begun:
                    self.snapshot_takes = max(0.2, now - begun_at)
                begun, begun_at = begun_ms, now
            if max(begun_ms, whole_ms) > newest:  # a short one is over before it is seen
                newest = max(begun_ms, whole_ms)
                ready = (full or plan.event == "start-empty") and event_at == event_till == float("inf")
                if ready and (plan.end == "first" or (plan.end == "later" and whole_ms)):
                    end = now + plan.at * self.snapshot_takes
            time.sleep(0.01)
        return cache

    def switch(self, cache: Any, plan: Plan, files: Files) -> None:
        """The supervisor ends, and the next one has another directory."""
        self.lost = True
        floor = self.numbers.floor.copy()
        if self.store.mood[0] != UP or self.rng.random() < 0.5:  # told to end, one tries for half a minute to store what waits
            self.end(self.supervisor)
        else:
            self.supervisor.terminate()
            if self.supervisor.wait(LIMIT):
                self.wrong.append(f"the supervisor, told to end, ended with {self.supervisor.returncode}")
            self.processes.remove(self.supervisor)
        if plan.log == "always":
            self.logged(cache, plan.log, floor)
        self.since, self.gap_behind = None, set(files.whole())
        numbers = {number for number, _ in files.listing()[1]}
        self.files = files
        self.supervise(plan)
        if not self.held():
            self.wrong.append(f"with another directory the supervisor ended with {self.supervisor.returncode}")
        elif self.log_has_begun(cache, plan, numbers):
            self.goes_on_in(cache, files)

    def kill(self, cache: Any, plan: Plan) -> None:
        """Everything, at once; or the workers first, and the supervisor when it has taken over what they wrote."""
        self.rng.shuffle(self.processes)
        if plan.workers_first:
            self.end_workers()
            deadline = time.monotonic() + 2
            while cache.durability()["log_waiting_bytes"] and time.monotonic() < deadline:
                time.sleep(0.001)
        for process in self.processes:
            process.kill()
        for process in self.processes[:]:
            self.end(process)

    # ---- what is right ----

    def look_at_rows(self) -> None:
        """Those that were stored since the last look, in their order."""
        stored = self.history.taken()
        self.report["rows"] += len(stored)
        for name, value, _ in stored:
            key = NAMES.index(name)
            was, most = int(self.rows[key]), int(self.numbers.asked[key])
            number = deleted_since(was) if value is None else msgpack.unpackb(value)
            if type(number) is not int or not was <= number <= most or (value is not None and row(number) != number):
                self.wrong.append(f"row {name!r} was of {was} at least, is {'deleted' if value is None else number}; {most} was begun last")
            else:
                self.rows[key] = number

    def look_at_files(self, plan: Plan, segment: int) -> None:
        """What the new ones have to have; and is there still what has to stay?"""
        for files in self.used:
            for _, path in files.listing()[0]:
                if path.name not in files.snapshots:
                    created = datadir.head(path, "snapshot")["created_ms"] / 1000 + plan.clock_back
                    floor = next((floor for at, floor in reversed(self.samples) if at < created), None)
                    if floor is None:
                        self.wrong.append(f"{path} is of no life that is known")
                    else:
                        files.snapshots[path.name] = floor, files.era
        for files, stay in self.stay:
            if gone := stay - files.names():
                self.wrong.append(f"{files.path}: {sorted(gone)} went, and the segment {segment} has nothing of them")

    def new_said(self) -> str:
        with open(self.said, "rb") as file:
            file.seek(self.said_before)
            return file.read().decode(errors="replace")

    def look_at_said(self, restoring: int) -> None:
        """Was what had to be restored restored, and was a gap named?"""
        said = self.new_said()
        if self.restores is None or not (found := re.search(r"restored [\d,]+ items .* of (\S+) and [\d,]+ log records", said)):
            return
        if Path(found[1]).name != self.restores:
            self.wrong.append(f"restored from {found[1]}, and not from {self.restores}")
        if self.reads_gap:
            self.count("gaps to be named")
            if "LOG GAP" not in said[: found.start()]:
                self.wrong.append("the restore claims to be whole; its log began in the midst of a life")

    def finish(self, plan: Plan) -> None:
        """All is stored: neither the cache nor a row is older than it may be."""
        self.keep()
        self.begin_accounts()
        self.report["doing"] = "the end"
        self.store.mood[0] = UP
        self.promise(self.files)
        self.supervise(plan)
        cache = self.born_of(self.files)
        if cache is None:
            return
        with cache:
            fill(self.name, self.items, self.numbers, self.wrong)
            cache.flush(60)
            self.wrong.extend(cache.verify())
        self.look_at_rows()
        self.numbers.floor[:KEYS] = np.maximum(self.numbers.floor[:KEYS], self.rows)
        with shmcache.attach(self.name, store=self.store) as cache:
            rows = self.store.load_many([NAMES[key] for key in STORED], timeout=60.0)
            for key, name in enumerate(NAMES):
                found = [cache.get(name)] if name[0] == 0 else [cache.get(name), rows[name].value if name in rows else None]
                for which, value in zip(("read", "row"), found, strict=False):
                    self.report["checked"] += 1
                    if fault := self.numbers.fault(key, value):
                        self.wrong.append(f"{which} at the end: {fault}")
        self.supervisor.terminate()
        if self.supervisor.wait(120):
            self.wrong.append(f"the supervisor, told to end, ended with {self.supervisor.returncode}")
        self.processes.remove(self.supervisor)
        self.look_at_said(0)

    def restart(self, plan: Plan, rng: random.Random, mood: int | None, working: bool) -> None:
        if not self.wrong:
            self.live(dataclasses.replace(plan, end="quick", event=None, at=rng.random(), mood=mood, supervisors=[], copied=False, advice=working))

    def run(self, lives: int, till: float) -> None:
        for life in range(min(lives, random.Random(self.seed).randint(3, SERIES))):
            if time.monotonic() > till or self.wrong:
                break
            rng = random.Random(self.seed * 1000 + life)
            plan = planned(rng, self.log, life, self.events, self.share)
            quick = "quick" in self.events and rng.random() < (0.3 if len(set(self.events)) > 5 else 0.6)
            newer = plan.event in ("lost", "copy", "worker")  # what is written then is newer than what was stored in the lives before it
            if quick:
                for _ in range(1 if newer else rng.randint(2, 5)):
                    self.restart(plan, rng, UP if newer else rng.choice((DOWN, None)), newer or rng.random() < 0.3)
            if not self.wrong:
                self.live(plan)
            if quick and newer:
                for _ in range(rng.randint(2, 5)):
                    self.restart(plan, rng, DOWN, False)
        if not self.wrong:
            self.finish(dataclasses.replace(planned(self.rng, self.log, 0, [], 0.0), clock_back=0))


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


@contextlib.contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{folder}/db"
    else:
        from tests.postgres import postgres_server

        with postgres_server() as url:
            yield url


def run(
    kind: str, log: str | None, megabytes: float, lives: int, seconds: float, seed: int, where: str, events: tuple[list[str], float]
) -> dict[str, Any]:
    began = time.monotonic()
    names = ("lives", "lives_ended_in_snapshot", "lives_ended_in_restore", "lives_without_a_snapshot", "quick_restarts", "supervisors_killed", "rows",
             "acked", "checked")  # fmt: skip
    report: dict[str, Any] = {"store": kind, "seed": seed, **dict.fromkeys(names, 0), "logged": dict.fromkeys(("always", "everysec", "off"), 0), "events": {}}
    with mp.Manager() as manager:
        wrong = manager.list()
        while report["lives"] < lives and time.monotonic() - began < seconds and not wrong:
            folder = Path(tempfile.mkdtemp(prefix="lives-", dir=where))
            subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O", "-x", "c", "-", "-o", folder / "clock.so"], input=CLOCK, text=True, check=True)
            with contextlib.ExitStack() as stack:
                stack.callback(lambda folder=folder: wrong or shutil.rmtree(folder))
                rng = random.Random(seed)
                logs = log or rng.choice(("always", "always", "off", "everysec", "mixed", "mixed"))
                one = Series(seed, stack.enter_context(database(kind, folder)), folder, logs, megabytes, events, wrong, report)
                stack.callback(one.close)
                one.run(lives - report["lives"], began + seconds)
                report["acked"] += int(one.numbers.acked.sum())
                report["checked"] += int(one.numbers.checked.sum())
            if wrong:
                report |= {"wrong_with_seed": seed, "kept": str(folder), "said": (folder / "said").read_text()[-1000:]}
            seed += 1
        if not wrong:
            del report["doing"]
        return report | {"wrong": len(wrong), "first": list(wrong)[:5], "seconds": round(time.monotonic() - began, 1)}


def summary(report: dict[str, Any]) -> str:
    events = ", ".join(f"{name} {n}" for name, n in sorted(report["events"].items()))
    return (
        f"{report['lives']} lives ({report['lives'] / report['seconds'] * 3600:.0f} an hour), of which {report['lives_ended_in_snapshot']} ended within a "
        f"snapshot, {report['lives_ended_in_restore']} within a restore; {report['quick_restarts']} quick restarts; {report['supervisors_killed']} supervisors "
        f"killed while they lived; events: {events or 'none'}; {report['acked']:,} acknowledged writes, {report['rows']:,} rows, {report['checked']:,} checks, "
        f"{report['wrong']} wrong"
    )


def in_namespace() -> None:
    """This program again, where it may mount small file systems that nobody else sees. It returns where that is not allowed."""
    for options in (["-m"], ["-r", "-m"]):
        command = ["unshare", *options, "--propagation", "private"]
        with contextlib.suppress(OSError):
            tried = f"{shlex.join(command)} sh -c 'mount -t tmpfs -o size=1m tmpfs /mnt'"
            if subprocess.run(tried, shell=True, capture_output=True, check=False).returncode == 0:
                os.environ[IN_NAMESPACE] = "1"
                os.execvp("unshare", [*command, sys.executable, "-m", "tests.stress.lives", *sys.argv[1:]])
    say("no small file system can be mounted here: no disk is full (--events full)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--log", choices=("always", "everysec", "off", "mixed"), help="of all series (each has its own)")
    parser.add_argument("--events", default=None, metavar="E,E", help=f"only these ({','.join(DEFAULT)}); none: none")
    parser.add_argument("--megabytes", type=float, default=180, metavar="MB", help="of ballast, about (180; a third of the series has a fifth of it)")
    parser.add_argument("--lives", type=int, default=1_000_000, help="in all (as many as there is time for)")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", default="/dev/shm", help="for the data directories; nothing is lost here but processes, so memory will do (/dev/shm)")
    args = parser.parse_args()
    events = list(DEFAULT) if args.events is None else [event for event in args.events.split(",") if event != "none"]
    if unknown := set(events) - set(EVENTS):
        parser.error(f"--events: there is no {', '.join(sorted(unknown))}; there are {', '.join(EVENTS)}")
    if "full" in events and IN_NAMESPACE not in os.environ:
        in_namespace()
        events.remove("full")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and clean up
    share = EVENT_SHARE if args.events is None else EVENT_SHARE_NAMED
    result = run(args.store, args.log, args.megabytes, args.lives, args.seconds, args.seed, args.folder, (events, share))
    say(summary(result))
    print(json.dumps(result))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
