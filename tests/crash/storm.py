"""Does killing anybody hurt anybody? Warm workers are SIGKILLed at random and replaced, in phases; no supervisor.

    python -m tests.crash.storm --seed 3 --seconds 300

Phases of killing (1 s, one worker every --every ms) and of rest (3 s): constant churn would hide what a reused row can break. Workers
check every value they read and note the longest time that one call took. Ends with every survivor's figures, verify() and the count of
chunks: each FREE, LIVE, or in the hand of the living.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import signal
import sys
import time
from typing import Any

import shmcache
from shmcache import errors
from shmcache.core import _sweep
from tests.stress.mixed import Worker


def worker(name: str, seed: int, keys: int, shared: Any, slot: int) -> None:
    """Run until killed; figures go to shared memory of the test's own, since a killed process reports nothing."""
    cache = shmcache.attach(name)
    w = Worker(cache, seed, keys, 1 << 60)
    while True:
        for _ in range(100):
            began = time.monotonic()
            try:
                w.step()
            except errors.ShmcacheError as e:
                w.count["errors"] += 1
                print(f"ERROR pid {os.getpid()}: {type(e).__name__}: {e}", flush=True)
            w.longest_s = max(w.longest_s, time.monotonic() - began)
        shared[slot * 4 + 0] = w.count["wrong"]
        shared[slot * 4 + 1] = w.count["errors"]
        shared[slot * 4 + 2] = max(shared[slot * 4 + 2], w.longest_s)
        shared[slot * 4 + 3] += w.count["ops"]
        w.count["ops"] = 0
        if os.getppid() == 1:
            return


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=float, default=1.0, help="seconds that a call of a survivor may take (1)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--procs", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--every", type=float, default=20, help="ms between kills in a killing phase")
    parser.add_argument("--size", default="16M")
    parser.add_argument("--stripes", type=int, default=64)
    parser.add_argument("--keys", type=int, default=50_000)
    parser.add_argument("--rows", type=int, default=8, help="process rows: few, so that they are reused at once")
    args = parser.parse_args(argv)
    print(f"seed {args.seed}", flush=True)
    rng = random.Random(args.seed)
    name = f"storm-{os.getpid()}"
    cache = shmcache.create(name, args.size, stripes=args.stripes, max_processes=args.rows)
    shared = mp.RawArray("d", 4 * args.procs)
    wrong = [0.0] * args.procs
    failed = [0.0] * args.procs
    procs: list[Any] = []
    context = mp.get_context("fork")
    kills = 0

    def start(slot: int) -> Any:
        for i in range(2):
            shared[slot * 4 + i] = 0
        p = context.Process(target=worker, args=(name, rng.getrandbits(40), args.keys, shared, slot), daemon=True)
        p.start()
        return p

    def harvest(slot: int) -> None:
        wrong[slot] += shared[slot * 4]
        failed[slot] += shared[slot * 4 + 1]

    try:
        procs = [start(i) for i in range(args.procs)]
        end = time.monotonic() + args.seconds
        next_kill = time.monotonic() + 1.0
        while time.monotonic() < end:
            calm_from = next_kill + 1.0
            while time.monotonic() < min(calm_from, end):
                signal.sigtimedwait([], max(0.0, next_kill - time.monotonic()))  # a wait on the clock: the test's own pace
                slot = rng.randrange(args.procs)
                os.kill(procs[slot].pid, signal.SIGKILL)
                kills += 1
                procs[slot].join()
                harvest(slot)
                procs[slot] = start(slot)
                next_kill += rng.random() * 2 * args.every / 1000
            next_kill = calm_from + 3.0
            signal.sigtimedwait([], max(0.0, min(next_kill, end) - time.monotonic()))
        for slot, p in enumerate(procs):
            os.kill(p.pid, signal.SIGKILL)
            p.join()
            harvest(slot)
        while_dead = cache.verify()
        chunks = _sweep.settle(cache)
        violations = cache.verify()
        stats = cache.stats()
        in_hand = sum(c["reserved"] for c in stats["slab_classes"])
        report = {
            "kills": kills,
            "ops": int(sum(shared[i * 4 + 3] for i in range(args.procs))),
            "wrong": int(sum(wrong)),
            "errors": int(sum(failed)),
            "longest_call_ms": round(1000 * max(shared[i * 4 + 2] for i in range(args.procs)), 1),
            "verify_before_settling": while_dead,
            "verify": violations,
            "chunks": chunks,
            "in_hand_of_the_living": in_hand,
            "items": len(cache),
            **{k: stats[k] for k in ("takeovers", "settled", "evictions", "lock_waits", "stalls", "unlisted", "pages_moved")},
            "max_lock_wait_ms": stats["max_wait_ns"] / 1e6,
            "attaches": int(cache.segment.rows["gen"].sum()),
        }
        print(json.dumps(report, indent=1))
        accounted = chunks["RETIRED"] == 0 and chunks["RESERVED"] == in_hand
        good = not (report["wrong"] or report["errors"] or violations or while_dead) and accounted
        return 0 if good and report["longest_call_ms"] < 1000 * args.longest else 1
    finally:
        for p in procs:
            if p.is_alive():
                p.kill()
                p.join()
        cache.close()
        shmcache.unlink(name)


if __name__ == "__main__":
    sys.exit(main())
