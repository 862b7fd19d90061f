"""Does killing anybody hurt anybody? Warm workers, and the supervisor, are SIGKILLed at random and replaced, in phases.

    python -m tests.crash.storm --kills 10000 --seed 3          till so many kills counted
    python -m tests.crash.storm --seconds 300 --supervisor 0    for so long, without a supervisor
    python -m tests.crash.storm --kills 2000 --crowd 5          in few buckets: long chains
    python -m tests.crash.storm --kills 2000 --points 0.5       half of the workers die at a fault point (a build of its own);
                                                                with --crowd, every kind of repair
    python -m tests.crash.storm --kills 500 --pid-namespaces    every worker process 1 of a pid namespace of its own

Phases of killing (1 s, one worker every --every ms) and of rest (3 s): constant churn would hide what a reused row can break. In a
share --together of the kills all workers die at once: survivors take a lock over within microseconds, so only then are rows reused
while the locks of the dead still stand. A signal is taken between two instructions, most often behind a slow one, so it hardly ever finds the
few stores between intent and release; with --points workers arm themselves, after their first operations, to die at a random passing of a
random fault point. A kill counts if its victim had done at least 100 operations. Workers are forked from this
process, which is warm; they check every value they read and note the longest time that one call took. Nobody is stopped, so nobody
may reach the limit for a lock (a stall). Ends with every survivor's figures, verify(), and the count of chunks: each FREE, LIVE, or
in the hand of the living; and what databases count is what is in the slots. Exit code 0: nothing wrong; 77: this machine does not allow it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

import shmcache
from shmcache import errors
from shmcache.core import _core, _sweep
from shmcache.supervisor.loop import Supervisor
from tests import census, special
from tests.stress.mixed import Worker

FIELDS = ("wrong", "errors", "longest", "ops", "life", "row", "pid", "dead")  # of a slot in memory that the test shares
CLONE_NEWPID = 0x20000000
PR_SET_PDEATHSIG = 1
LEAST_OPS = 100
END = signal.SIGUSR1  # to the outer process of a pid namespace: the worker, which is dead, may be reaped
libc = ctypes.CDLL(None, use_errno=True)


def worker(name: str, seed: int, keys: int | list[int], figures: Any, fault: str | None) -> None:
    """Run until killed; a killed process reports nothing, so figures go to the test's own shared memory as they come.

    fault: armed as soon as a death counts (fault.pxd).
    """
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    cache = shmcache.attach(name)
    w = Worker(cache, seed, keys, 1 << 60)
    rng = random.Random(seed)
    cache.get(b"takes a row")
    figures["row"] = cache.row
    while True:
        began = time.monotonic()
        try:
            w.step()
            if rng.random() < 0.2:
                in_databases(cache, rng)
        except errors.ShmcacheError as e:
            figures["errors"] += 1
            print(f"ERROR in row {cache.row}: {type(e).__name__}: {e}", flush=True)
        figures["longest"] = max(figures["longest"], time.monotonic() - began)
        figures["wrong"] = w.count["wrong"]
        figures["life"] = w.count["ops"]
        if fault and figures["life"] >= LEAST_OPS:
            os.environ["SHMCACHE_FAULT"], fault = fault, None


def in_databases(cache: shmcache.Cache, rng: random.Random) -> None:
    """An operation in one of the sidecar's databases, whose items are counted."""
    database, key = b"db:%d" % rng.randrange(1, 4), b"%d" % rng.randrange(500)
    space = cache.namespace(database)
    what = rng.random()
    if what < 0.6:
        space.set(key, rng.randbytes(rng.choice((20, 200, 2000))), rng.choice((None, 60)))
    elif what < 0.8:
        space.delete(key)
    elif what < 0.995:
        space.touch(key, rng.choice((None, 60)))
    elif what < 0.998:
        space.clear()
    else:  # as by RENAME of clients: the generation that was kept is stored again, and this one kept
        kept, now = cache.get(database), cache.get(b"\0ns\0" + database)
        if now is not None:
            cache.set(database, now)
        if kept is not None:
            cache.set(b"\0ns\0" + database, kept)


def in_namespace(name: str, seed: int, keys: int | list[int], figures: Any, fault: str | None) -> None:
    """Fork the worker into a new pid namespace, and end with it. It is reaped only on END, so that till then its pid is nobody else's."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if libc.unshare(CLONE_NEWPID):
        os._exit(77)
    pid = os.fork()
    if pid == 0:
        worker(name, seed, keys, figures, fault)
    figures["pid"] = pid
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    figures["dead"] = 1
    signal.sigwait({END})
    if os.waitpid(pid, 0)[1] != signal.SIGKILL:
        os._exit(1)


def supervise(name: str) -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    Supervisor(shmcache.attach(name)).run()


def crowded(cache: shmcache.Cache, n: int, percent: float) -> list[int]:
    """Numbers of keys that all fall into so many percent of the buckets: chains grow and shrink, and stripes are held longer."""
    k0, k1 = map(int, cache.segment.header["hash_key"])
    least = int(percent / 100 * (1 << 48))
    found: list[int] = []
    number = 0
    while len(found) < n:
        number += 1
        if _core.siphash_rounds(b"key:%d" % number, k0, k1, 1, 3) & (1 << 48) - 1 < least:
            found.append(number)
    return found


class Storm:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rng = random.Random(args.seed)
        self.name = f"storm-{os.getpid()}"
        self.cache = shmcache.create(self.name, args.size, stripes=args.stripes, max_processes=args.rows, lock_limit=args.limit)
        dtype = np.dtype([(f, "f8") for f in FIELDS])
        self.keys = crowded(self.cache, args.keys, args.crowd) if args.crowd else args.keys
        self.figures = np.frombuffer(mp.RawArray("b", dtype.itemsize * args.procs), dtype)
        self.total = dict.fromkeys(("wrong", "errors", "ops", "kills", "counted", "held", "supervisors"), 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, {END})  # as the processes inherit it
        self.points = sorted(special.points_of_build())
        self.context = mp.get_context("fork")
        self.procs = [self.start(i) for i in range(args.procs)]
        self.supervisor = self.start_supervisor() if args.supervisor else None

    def start(self, slot: int) -> Any:
        for field in ("wrong", "errors", "life", "pid", "dead"):
            self.figures[field][slot] = 0
        self.figures["row"][slot] = -1
        run = in_namespace if self.args.pid_namespaces else worker
        fault = f"k{self.rng.choice((1, 1, 2, 20)):04d}{self.rng.choice(self.points)}" if self.rng.random() < self.args.points else None
        args = (self.name, self.rng.getrandbits(40), self.keys, self.figures[slot : slot + 1], fault)
        p = self.context.Process(target=run, args=args, daemon=True)
        p.start()
        return p

    def start_supervisor(self) -> Any:
        p = self.context.Process(target=supervise, args=(self.name,), daemon=True)
        p.start()
        return p

    def kill(self, *slots: int, replace: bool = True) -> None:
        """Kill the workers of these slots together: none of them sees another one dead."""
        if self.args.pid_namespaces:
            self.kill_in_namespaces(*slots)
        else:
            for slot in slots:
                if self.procs[slot].exitcode is None:
                    os.kill(self.procs[slot].pid, signal.SIGKILL)
            for slot in slots:
                self.procs[slot].join()
        for slot in slots:
            self.count(slot)
        for slot in slots:
            if self.args.pid_namespaces:
                os.kill(self.procs[slot].pid, END)
                self.procs[slot].join()
            if self.procs[slot].exitcode not in (-signal.SIGKILL, 0):  # 0: the outer process of a namespace
                print(f"ERROR: a worker ended with {self.procs[slot].exitcode}", flush=True)
                self.total["errors"] += 1
        if replace:
            for slot in slots:
                self.procs[slot] = self.start(slot)

    def kill_in_namespaces(self, *slots: int) -> None:
        for slot in slots:
            while not (pid := int(self.figures["pid"][slot])):
                if self.procs[slot].exitcode is not None:
                    print(f"pid namespaces are not to be had here: exit code {self.procs[slot].exitcode}")
                    raise SystemExit(77)
            os.kill(pid, signal.SIGKILL)
        for slot in slots:
            while not self.figures["dead"][slot]:
                os.sched_yield()

    def count(self, slot: int) -> None:
        """The figures of one that has just died: before others have taken over what he held, if possible."""
        figures = self.figures[slot]
        row = int(figures["row"])
        if figures["life"] >= LEAST_OPS:
            self.total["counted"] += 1
            self.total["held"] += row >= 0 and self.holds(row)
        self.total["kills"] += 1
        for field, of in (("wrong", "wrong"), ("errors", "errors"), ("ops", "life")):
            self.total[field] += int(figures[of])

    def kill_supervisor(self) -> None:
        if self.supervisor.exitcode is None:
            os.kill(self.supervisor.pid, signal.SIGKILL)
        self.supervisor.join()
        if self.supervisor.exitcode != -signal.SIGKILL:
            print(f"ERROR: the supervisor ended with {self.supervisor.exitcode}", flush=True)
            self.total["errors"] += 1

    def next_victim(self) -> int:
        """One that has died at its fault point, if there is one."""
        of_itself = [i for i, p in enumerate(self.procs) if p.exitcode is not None]
        return of_itself[0] if of_itself else self.rng.randrange(self.args.procs)

    def holds(self, row: int) -> bool:
        """Does some lock name the dead process of this row?"""
        seg = self.cache.segment
        token = int(seg.rows["gen"][row]) << 16 | row + 1
        words = np.concatenate([seg.stripes["word"], seg.classes["word"], [seg.header[p + "_word"] for p in ("pages", "overflow", "big")]])
        return bool(np.any(words.astype(np.uint64) & np.uint64((1 << 56) - 1) == np.uint64(token)))

    def over(self, began: float) -> bool:
        if self.total["errors"] or self.cache.counters()["stalls"]:
            return True
        if self.args.kills:
            return self.total["counted"] >= self.args.kills
        return time.monotonic() - began >= self.args.seconds

    def run(self) -> None:
        began = time.monotonic()
        next_kill = next_supervisor = began + 0.5
        while not self.over(began):
            calm_from = next_kill + 1.0
            while time.monotonic() < calm_from and not self.over(began):
                signal.sigtimedwait([], max(0.0, next_kill - time.monotonic()))  # a wait on the clock: the test's own pace
                together = self.rng.random() < self.args.together
                self.kill(*(range(self.args.procs) if together else [self.next_victim()]))
                next_kill += self.rng.random() * 2 * self.args.every / 1000
                if self.supervisor and time.monotonic() > next_supervisor:
                    self.kill_supervisor()
                    self.supervisor = self.start_supervisor()
                    self.total["supervisors"] += 1
                    next_supervisor = time.monotonic() + self.args.supervisor
            next_kill = calm_from + 3.0
            if not self.over(began):
                signal.sigtimedwait([], max(0.0, next_kill - time.monotonic()))

    def report(self) -> tuple[dict[str, Any], bool]:
        self.kill(*range(self.args.procs), replace=False)
        if self.supervisor:
            self.kill_supervisor()
        try:
            before = self.cache.verify()
            chunks = _sweep.settle(self.cache)
            unsure = int((self.cache.segment.stripes["turn"] & 1).sum())
            sizes = there = census.sizes(self.cache)
            if importlib.util.find_spec("shmcache.core._resp"):  # a build that is only to be seen to fail has it not
                from shmcache.core import _resp

                sizes = _resp.Executor(self.cache, {}, impatient=False, databases=16).sizes(exact=True)
            after = self.cache.verify()
        except errors.StripeBusy as e:  # held for ever
            return {**self.total, "stalls": self.cache.counters()["stalls"], "verify": str(e)}, False
        stats = self.cache.stats()
        in_hand = sum(c["reserved"] for c in stats["slab_classes"])
        longest = 1000 * float(self.figures["longest"].max())
        lost = chunks["RETIRED"] + chunks["RESERVED"] + chunks["KEPT"] - in_hand
        report = {
            **self.total,
            "held_percent": round(100 * self.total["held"] / max(1, self.total["counted"]), 2),
            "longest_call_ms": round(longest, 1),
            "verify_before_settling": before,
            "verify": after,
            "chunks": chunks,
            "chunks_lost": lost,
            "items": len(self.cache),
            "databases": sizes,
            "databases_of_the_slots": there,
            "stripes_counted_anew": unsure,
            **{k: stats[k] for k in ("takeovers", "repairs", "settled", "evictions", "lock_waits", "stalls", "unlisted", "pages_moved")},
            "max_lock_wait_ms": stats["max_wait_ns"] / 1e6,
            "attaches": int((self.cache.segment.rows["gen"] % (1 << 23) // 2).sum()),  # every other number is one
        }
        bad = self.total["wrong"] or self.total["errors"] or before or after or lost or sizes != there or stats["stalls"] or longest > 1000 * self.args.longest
        return report, not bad

    def close(self) -> None:
        for p in (*self.procs, self.supervisor):
            if p is not None and p.is_alive():
                p.kill()
                p.join()
        shmcache.unlink(self.name)
        self.cache.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="end after so many counted kills")
    parser.add_argument("--seconds", type=float, default=60, help="end after this time, if --kills is not given (60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--procs", type=int, default=4)
    parser.add_argument("--supervisor", type=float, default=2.0, help="seconds between kills of the supervisor (2); 0: there is none")
    parser.add_argument("--every", type=float, default=20, help="ms between kills in a killing phase (20)")
    parser.add_argument("--together", type=float, default=0.1, help="share of the kills that hit all workers at once (0.1)")
    parser.add_argument("--longest", type=float, default=1.0, help="seconds that a call of a survivor may take (1)")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds that a write waits for a lock (5): longer than --longest")
    parser.add_argument("--size", default="16M")
    parser.add_argument("--stripes", type=int, default=64)
    parser.add_argument("--keys", type=int, default=50_000)
    parser.add_argument("--crowd", type=float, default=0, help="percent of the buckets that all keys fall into; 0: as they fall")
    parser.add_argument("--points", type=float, default=0, help="share of the workers that die at a fault point (0)")
    parser.add_argument("--rows", type=int, default=8, help="process rows: few, so that they are reused at once (8)")
    parser.add_argument("--pid-namespaces", action="store_true", help="every worker in a pid namespace of its own")
    args = parser.parse_args(argv)
    if args.points and args.pid_namespaces:
        parser.error("--points and --pid-namespaces do not go together: process 1 of a namespace cannot send itself SIGKILL")
    if args.points and not special.points_of_build():
        folder = special.build("-DSHMCACHE_FAULT_POINTS")
        argv_, env = special.command(folder, "tests.crash.storm", *(sys.argv[1:] if argv is None else argv))
        return subprocess.run(argv_, env=env, cwd=folder).returncode
    print(f"seed {args.seed}", flush=True)
    storm = Storm(args)
    try:
        storm.run()
        report, good = storm.report()
    finally:
        storm.close()
    print(json.dumps(report, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
