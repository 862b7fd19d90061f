"""Does anything get lost, or back to what it was, over several lives of one segment? Everything is killed at random moments, also inside a
snapshot that takes seconds, and inside a restore; the segment is gone, and restored from what is on the disk.

    python -m tests.stress.lives --seconds 3600 --seed 1
    python -m tests.stress.lives --lives 12 --seed 7 --log always        the series of seed 7, whose logs are always so
    python -m tests.stress.lives --store postgresql

A series is some lives of one segment that is written back, with one data directory and one database; series n has the seed `seed` + n. A life is
logged `always`, `everysec` or not at all. The store is up, down, slow, or does what it is told and does not answer, by turns. Between two lives the
newest snapshot may be damaged or vanish, or all files may; in a life the clock may be back. Before the first one rows may be there that were
written by a clock that was ahead.

What has to hold. Each key has one writer, which counts (numbers.py):
  a row never goes back to an older state, whatever happens                                                          (a trigger writes all down)
  a reader finds no state from before its key's floor, and none that was never asked for; at the end, when all is stored, neither does a row
The floor is the last write that was acknowledged. A death lowers it to what a file has to have:
  what the newest whole snapshot has: all that was acknowledged before it began (its HEAD says when)
  and what was acknowledged in lives that were logged since: `always`, or `everysec` if all rings were empty in the end and there was no gap
A key of the cache's own has no row, and may be missed. Most of the memory is such keys: the ballast that makes a snapshot long; all but a
hundredth of it has to come back.

Prints JSON; exit code 1: something is wrong. Then the data directory is kept, with what it and the database had before the last life.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import mmap
import multiprocessing as mp
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

import shmcache
from shmcache import cache as cache_module
from shmcache import errors
from shmcache.supervisor import datadir
from shmcache.supervisor import format as fmt
from tests.stress.numbers import Numbers, attached, deleted_since, row, work
from tests.stress.rows import History

TABLE = "lives"
WORKERS, KEYS = 2, 160
NAMES = [b"\0own %d" % key if key % 8 > 5 else b"%d" % key for key in range(KEYS)]
BALLAST = KEYS  # where the model has whether all of the ballast was written
ITEM_BYTES = 1000
PAD = bytes(range(256)) * 4
SHARE = 0.4  # of its keys, which a worker writes in a life
PAUSE = 0.02  # seconds after twenty keys: the machine is for the snapshots
LONGEST_LIFE = 40.0  # seconds after which one is ended that has not come to its end
UP, DOWN, SLOW, MUTE = range(4)  # what the store does
fork = mp.get_context("fork")
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

    end: "restore": inside it; "first": inside the first snapshot that has all of the ballast; "later": inside another; "whenever". at: how far into
    that, 0 to 1. mood: of the store all the time; None: it changes. before: what happens to the files before it: "damaged", "removed" (the newest
    snapshot), "lost" (all).
    """

    log: str
    end: str
    at: float
    mood: int | None
    supervisors: list[tuple[float, float]]  # seconds after the start when one is killed, and till the next begins
    workers_first: bool
    before: str | None
    clock_back: int  # seconds
    every: float  # seconds between two snapshots


def planned(rng: random.Random, log: str, first: bool) -> Plan:
    if log == "mixed":
        log = rng.choice(("always", "everysec", "off"))
    plan = Plan(
        log=log,
        end=rng.choices(("restore", "first", "later", "whenever"), (0 if first else 2, 5, 2, 2))[0],
        at=rng.random(),
        mood=rng.choices((None, DOWN, UP), (3, 1, 1))[0],
        supervisors=sorted((rng.uniform(0, 3), rng.choice((0, rng.uniform(0, 1.5)))) for _ in range(rng.choices((0, 1, 2), (7, 2, 1))[0])),
        workers_first=rng.random() < (0.7 if log == "everysec" else 0.3),
        before=None if first else rng.choices((None, "damaged", "removed", "lost"), (20, 4, 2, 1))[0],
        clock_back=rng.choices((0, 3600, 30 * 86400), (7, 1, 1))[0],
        every=rng.uniform(0.3, 2.0),
    )  # fmt: skip
    if plan.before == "lost":
        plan.clock_back = 0  # with that too nobody could know what is newer: supervisor/DECISIONS.md
    return plan


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


class Series:
    """Some lives of one segment, in a folder of its own, which has their database, too, if that is a file."""

    def __init__(self, seed: int, url: str, folder: Path, log: str, megabytes: float, wrong: Any, report: dict[str, Any]) -> None:
        self.seed, self.url, self.folder, self.log, self.wrong, self.report = seed, url, folder, log, wrong, report
        self.rng = random.Random(seed)
        self.name = f"lives-{os.getpid()}-{seed}"
        self.data = folder / "data"
        self.mood = folder / "mood"
        self.mood.write_bytes(bytes([UP]))
        self.environment = os.environ | {"LIVES_URL": url, "LIVES_MOOD": str(self.mood)}
        self.store = Store(url, str(self.mood))
        self.history = History(url, TABLE)
        self.items = int(megabytes * self.rng.uniform(0.7, 1.3) * 1e6 / ITEM_BYTES)
        self.size = f"{64 + self.items * ITEM_BYTES * 14 // 10_000_000}M"
        self.numbers = Numbers(NAMES, more=1)
        self.rows = np.zeros(KEYS, np.int64)  # the write after which each row is, at least
        self.samples: list[tuple[float, Any]] = []  # of the floor, and when it was at least so high
        self.snapshots: dict[str, Any] = {}  # what each file has to have
        self.logged = np.zeros(KEYS + 1, np.int64)  # and the log
        self.damaged: set[str] = set()
        self.lost = False  # everything, between two lives
        self.snapshot_takes = self.restore_takes = 1.0  # seconds, as the last one did
        self.processes: list[Any] = []
        self.supervisor: Any = None
        self.supervised = 0.0  # since when
        ahead = self.rng.choice((0, 0, 30 * 86400))
        if ahead:
            some = [key for key in range(0, KEYS, 2) if NAMES[key][0] != 0]
            self.numbers.asked[some] = 3
            version = int(time.time() + ahead) * 1000 << 20
            self.store.store_many({NAMES[key]: (row(3), None) for key in some}, versions={NAMES[key]: version for key in some})
            self.look_at_rows()
        say(f"seed {seed}: log {log}, {self.items} items of ballast, rows {'of a clock that was ahead' if ahead else 'none'} at first")

    def close(self) -> None:
        for process in self.processes[:]:
            self.end(process)
        with contextlib.suppress(errors.SegmentNotFound):
            shmcache.unlink(self.name)
        self.store.close()
        self.history.close()

    def end(self, process: Any) -> None:
        process.kill()
        process.wait() if isinstance(process, subprocess.Popen) else process.join()
        self.processes.remove(process)

    def supervise(self, plan: Plan) -> None:
        command = [sys.executable, "-m", "shmcache.cli", "supervise", self.name, "--quiet", "--size", self.size, "--policy", "back", "--store",
                   "tests.stress.lives:store", "--data-dir", str(self.data), "--log", plan.log, "--snapshot-every", f"{plan.every:.2f}",
                   "--parent", str(os.getpid())]  # fmt: skip
        environment = self.environment
        if plan.clock_back:
            environment = environment | {"LD_PRELOAD": str(self.folder / "clock.so"), "LIVES_CLOCK_BACK": str(plan.clock_back)}
        self.supervised = time.time()
        with open(self.folder / "said", "ab") as said:
            self.supervisor = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=said, env=environment)
        self.processes.append(self.supervisor)

    def begin_worker(self, target: Any, *args: Any, **kwargs: Any) -> None:
        process = fork.Process(target=target, args=(self.name, *args), kwargs=kwargs, daemon=True)
        self.processes.append(process)
        process.start()

    # ---- a life ----

    def live(self, plan: Plan) -> None:
        self.tamper(plan)
        self.keep()
        began_with = self.promised()
        self.numbers.floor[:] = began_with
        self.samples = []
        self.sample()
        self.supervise(plan)
        for i in range(WORKERS):
            self.begin_worker(
                work, lambda: Store(self.url, str(self.mood)), i, WORKERS, self.numbers, self.wrong, self.rng.random(),
                strict=self.log == "always" and not self.lost, share=SHARE, pause=PAUSE,
            )  # fmt: skip
        self.begin_worker(fill, self.items, self.numbers, self.wrong)
        cache = self.born()
        if cache is not None:
            cache = self.watch(cache, plan)
        if cache is None:
            return
        with cache:
            self.kill(cache, plan)
            restoring, begun_ms, whole_ms, gaps = self.header(cache, "restoring", "snapshot_begun_ms", "snapshot_ms", "log_gaps")
            waiting = cache.durability()["log_waiting_bytes"]
        shmcache.unlink(self.name)
        in_snapshot = begun_ms / 1000 + plan.clock_back > self.supervised
        say(f"  {plan}: ended in {'a restore' if restoring else 'a snapshot' if in_snapshot else 'neither'}")
        self.report["lives"] += 1
        self.report["lives_ended_in_snapshot"] += in_snapshot
        self.report["lives_ended_in_restore"] += restoring != 0
        self.report["lives_without_a_snapshot"] += whole_ms == 0
        self.report["logged"][plan.log] += 1
        self.look_at_rows()
        for _, path in fmt.listing(self.data)[0]:
            if path.name not in self.snapshots:
                created = datadir.head(path, "snapshot")["created_ms"] / 1000 + plan.clock_back
                self.snapshots[path.name] = next(floor for at, floor in reversed(self.samples) if at < created)
        if plan.log == "always" or (plan.log == "everysec" and not waiting and not gaps):
            self.logged = np.where(self.numbers.floor > began_with, self.numbers.floor, self.logged)

    def tamper(self, plan: Plan) -> None:
        """What happens to the files between two lives."""
        whole = [path for _, path in fmt.listing(self.data)[0] if path.name not in self.damaged] if self.data.exists() else []
        if plan.before == "lost":
            shutil.rmtree(self.data)
            self.snapshots, self.lost = {}, True
            self.logged[:] = 0
            # Each life begins a quarter of an hour of the clock further. As lives are short here, the rows would be ahead of the clock, of which
            # nobody knows any more: they get the versions of lives as long as in earnest
            self.history.age(int(time.time() - 86400) * 1000 << 20)
        elif plan.before is None or len(whole) < 2:
            return
        elif plan.before == "damaged":
            with open(whole[-1], "r+b") as file:
                at = self.rng.randrange(whole[-1].stat().st_size)
                file.seek(at)
                byte = file.read(1)[0] ^ 1 << self.rng.randrange(8)
                file.seek(at)
                file.write(bytes([byte]))
            self.damaged.add(whole[-1].name)
        else:
            whole[-1].unlink()
            del self.snapshots[whole[-1].name]
        self.report[plan.before] += 1

    def keep(self) -> None:
        """What there is before a life: for who looks for the mistake."""
        before = self.folder / "before"
        shutil.rmtree(before, ignore_errors=True)
        before.mkdir()
        if self.data.exists():
            shutil.copytree(self.data, before / "data", copy_function=os.link)
        for path in self.folder.glob("db*"):
            shutil.copy(path, before)

    def promised(self) -> Any:
        """The floor, by the files that there are."""
        snapshots, logs = fmt.listing(self.data) if self.data.exists() else ([], [])
        whole = [path.name for _, path in snapshots if path.name not in self.damaged]
        if not whole and not logs:
            return np.append(self.rows, 0)
        return np.maximum(self.snapshots[whole[-1]], self.logged) if whole else self.logged.copy()

    def sample(self) -> None:
        floor = self.numbers.floor.copy()
        self.samples.append((time.time(), floor))

    def born(self) -> Any:
        """A handle, as soon as there is a segment; None: there will be none."""
        while True:
            try:
                return cache_module.attach_unsettled(self.name)  # also while nobody else may: it only looks
            except errors.SegmentNotFound:
                if self.supervisor.poll() is not None:
                    self.wrong.append(f"the supervisor ended with {self.supervisor.returncode}")
                    return None
                time.sleep(0.002)

    @staticmethod
    def header(cache: Any, *names: str) -> list[int]:
        """Words of it; no view is kept, so that it can be closed whatever comes."""
        header = cache.segment.header
        return [int(header[name]) for name in names]

    def watch(self, cache: Any, plan: Plan) -> Any:
        """Till the life comes to its end, or something is wrong: a handle of the segment that there is then."""
        began = time.monotonic()
        restored = full = begun_at = mood_till = 0.0
        begun, again, deaths = 0, 0.0, [began + after for after, _ in plan.supervisors]
        end = began + (1.2 * plan.at * self.restore_takes if plan.end == "restore" else LONGEST_LIFE)
        while (now := time.monotonic()) < end:
            self.sample()
            restoring, begun_ms, whole_ms = self.header(cache, "restoring", "snapshot_begun_ms", "snapshot_ms")
            if now > mood_till:
                self.store.mood[0] = self.rng.choices((UP, DOWN, SLOW, MUTE), (6, 3, 2, 1))[0] if plan.mood is None else plan.mood
                mood_till = now + self.rng.expovariate(1)
            if self.supervisor not in self.processes:
                if now > again:
                    self.supervise(plan)
            elif deaths and now > deaths[0]:
                again = now + plan.supervisors[len(plan.supervisors) - len(deaths)][1]
                del deaths[0]
                self.end(self.supervisor)
                self.report["supervisors_killed"] += 1
            elif any((process.poll() if isinstance(process, subprocess.Popen) else process.exitcode) for process in self.processes):
                self.wrong.append("the supervisor, or a worker, ended by itself")
            if self.wrong:
                return cache
            if cache.unlinked:  # the restore was killed, and the next has begun again
                cache.close()
                cache = self.born()
                if cache is None:
                    return None
                continue
            if not restored and not restoring:
                restored = now
                self.restore_takes = max(0.2, now - began)
            if not full and self.numbers.floor[BALLAST]:
                full = now
                if plan.end == "whenever":
                    end = now + 6 * plan.at
            if begun_ms != begun:
                if begun and whole_ms == begun:
                    self.snapshot_takes = max(0.2, now - begun_at)
                begun, begun_at = begun_ms, now
                if begun and full and (plan.end == "first" or (plan.end == "later" and whole_ms)):
                    end = now + plan.at * self.snapshot_takes
            time.sleep(0.01)
        return cache

    def kill(self, cache: Any, plan: Plan) -> None:
        """Everything, at once; or the workers first, and the supervisor when it has taken over what they wrote."""
        self.rng.shuffle(self.processes)
        if plan.workers_first:
            for process in [p for p in self.processes if p is not self.supervisor]:
                self.end(process)
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

    def finish(self, plan: Plan) -> None:
        """All is stored: neither the cache nor a row is older than it may be."""
        self.keep()
        self.numbers.floor[:] = self.promised()
        self.store.mood[0] = UP
        self.supervise(plan)
        cache = self.born()
        if cache is None:
            return
        with cache:
            fill(self.name, self.items, self.numbers, self.wrong)
            cache.flush(60)
            self.wrong.extend(cache.verify())
        with shmcache.attach(self.name, store=self.store) as cache:
            rows = self.store.load_many([name for name in NAMES if name[0] != 0], timeout=60.0)
            for key, name in enumerate(NAMES):
                found = [cache.get(name)] if name[0] == 0 else [cache.get(name), rows[name].value if name in rows else None]
                for which, value in zip(("read", "row"), found, strict=False):
                    self.report["checked"] += 1
                    if fault := self.numbers.fault(key, value):
                        self.wrong.append(f"{which} at the end: {fault}")
        self.look_at_rows()
        self.supervisor.terminate()
        if self.supervisor.wait(120):
            self.wrong.append(f"the supervisor, told to end, ended with {self.supervisor.returncode}")
        self.processes.remove(self.supervisor)

    def run(self, lives: int, till: float) -> None:
        for life in range(lives):
            if time.monotonic() > till or self.wrong:
                break
            self.live(planned(random.Random(self.seed * 1000 + life), self.log, life == 0))
        if not self.wrong:
            self.finish(dataclasses.replace(planned(self.rng, self.log, True), clock_back=0))


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


def run(kind: str, log: str | None, megabytes: float, series: int, lives: int, seconds: float, seed: int, where: str) -> dict[str, Any]:
    began = time.monotonic()
    names = ("lives", "lives_ended_in_snapshot", "lives_ended_in_restore", "lives_without_a_snapshot", "supervisors_killed", "damaged", "removed", "lost",
             "rows", "acked", "checked")  # fmt: skip
    report: dict[str, Any] = {"store": kind, "seed": seed, **dict.fromkeys(names, 0), "logged": dict.fromkeys(("always", "everysec", "off"), 0)}
    with mp.Manager() as manager:
        wrong = manager.list()
        while report["lives"] < lives and time.monotonic() - began < seconds and not wrong:
            folder = Path(tempfile.mkdtemp(prefix="lives-", dir=where))
            subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O", "-x", "c", "-", "-o", folder / "clock.so"], input=CLOCK, text=True, check=True)
            with contextlib.ExitStack() as stack:
                stack.callback(lambda folder=folder: wrong or shutil.rmtree(folder))
                rng = random.Random(seed)
                logs = log or rng.choice(("always", "always", "off", "everysec", "mixed"))
                one = Series(seed, stack.enter_context(database(kind, folder)), folder, logs, megabytes, wrong, report)
                stack.callback(one.close)
                one.run(min(series, lives - report["lives"]), began + seconds)
                report["acked"] += int(one.numbers.acked.sum())
                report["checked"] += int(one.numbers.checked.sum())
            if wrong:
                report |= {"wrong_with_seed": seed, "kept": str(folder), "said": (folder / "said").read_text()[-1000:]}
            seed += 1
        return report | {"wrong": len(wrong), "first": list(wrong)[:5], "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--log", choices=("always", "everysec", "off", "mixed"), help="of all series (each has its own)")
    parser.add_argument("--megabytes", type=float, default=180, metavar="MB", help="of ballast, about (180)")
    parser.add_argument("--series", type=int, default=12, metavar="N", help="lives of one segment (12)")
    parser.add_argument("--lives", type=int, default=1_000_000, help="in all (as many as there is time for)")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", default="/dev/shm", help="for the data directories; nothing is lost here but processes, so memory will do (/dev/shm)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and clean up
    result = run(args.store, args.log, args.megabytes, args.series, args.lives, args.seconds, args.seed, args.folder)
    print(json.dumps(result))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
