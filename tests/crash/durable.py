"""Is what was acknowledged there after everything was killed? Workers and the supervisor die at random, the segment goes, as in a reboot.

    python -m tests.crash.durable --rounds 200                          always: each key is as its last acknowledged write left it, or newer
    python -m tests.crash.durable --rounds 50 --policy everysec         nothing is missing that was acknowledged 1.5 s before the end

Each key has one writer, which counts: number n is a set of n, or (each fifth) a delete. So the state that is restored says after which number
it is: it may be none before the last acknowledged one, nor one that was not begun. In half of the rounds the supervisor dies first and the
workers go on for a moment, wait, and are told. Exit code 0: nothing wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import shmcache
from shmcache import errors
from shmcache.supervisor import datadir, snapshot

KEYS = 60  # of each worker
WORKERS = 3
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None, use_errno=True)


def state(n: int, size: int) -> Any:
    """What the key has after its write number n."""
    return None if n == 0 or n % 5 == 0 else b"%d:" % n + b"x" * (n * 7919 % size)


def write(name: str, worker: int, begun: Any, done: Any, size: int, seed: int) -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    cache, rng = shmcache.attach(name), random.Random(seed)
    while True:
        k = worker * KEYS + rng.randrange(KEYS)
        n = begun[k] + 1
        begun[k] = n
        value, key = state(n, size), b"key:%d" % k
        try:
            if value is None:
                cache.delete(key)
            else:
                cache.set(key, value)
        except errors.CapacityError:  # the supervisor is dead: it was refused, or is not acknowledged
            continue
        done[k] = n


def round_(args: argparse.Namespace, rng: random.Random, report: dict[str, Any]) -> list[str]:
    name, folder = f"durable-{os.getpid()}", tempfile.mkdtemp(prefix="durable-")
    argv = [sys.executable, "-m", "shmcache.cli", "supervise", name, "--size", "24M", "--data-dir", folder, "--log", args.policy,
            "--snapshot-every", f"{rng.uniform(0.05, 1.0):.2f}", "--log-buffer", "64K", "--quiet"]  # fmt: skip
    context = mp.get_context("fork")
    begun, done = (context.RawArray("q", WORKERS * KEYS) for _ in range(2))
    supervisor = subprocess.Popen(argv)
    workers = []
    try:
        while True:
            try:
                with shmcache.attach(name) as cache:
                    if cache.supervisor()["alive"] and cache.durability()["log"] == args.policy:
                        break
            except shmcache.SegmentNotFound:
                pass
            if supervisor.poll() is not None:
                return [f"the supervisor ended with {supervisor.returncode}"]
            os.sched_yield()
        size = rng.choice((1, 100, 2000, 20_000))
        workers = [
            context.Process(target=write, args=(name, i, begun, done, size, rng.getrandbits(32)), daemon=True) for i in range(WORKERS)
        ]
        for p in workers:
            p.start()
        samples: list[tuple[float, list[int]]] = [(0.0, [0] * len(done))]
        end = time.monotonic() + rng.uniform(0.05, args.seconds)
        while (now := time.monotonic()) < end:
            samples.append((now, list(done)))
            signal.sigtimedwait([], min(0.05, end - now))  # a wait on the clock: the test's own pace
        if rng.random() < 0.5:
            supervisor.kill()
            signal.sigtimedwait([], rng.uniform(0, 0.2))
        for p in rng.sample([supervisor, *workers], len(workers) + 1):
            p.kill()
        killed = time.monotonic()
        supervisor.wait()
        for p in workers:
            p.join()
        promised = list(done)
        if args.policy != "always":
            promised = next(sample for at, sample in reversed(samples) if at <= killed - 1.5)
        shmcache.unlink(name)
        with datadir.take(folder) as taken:
            restored = snapshot.restore(name, taken)
        wrong = []
        with shmcache.attach(name) as cache:
            for k in range(WORKERS * KEYS):
                got = cache.get(b"key:%d" % k)
                if not any(got == state(n, size) for n in range(promised[k], begun[k] + 1)):
                    wrong.append(f"key {k} is {got!r:.20}; promised {promised[k]}, begun {begun[k]}")
            wrong += cache.verify()
        report["writes"] += sum(done)
        report["log_records"] += restored["log_records"]
        report["with_snapshot"] += restored["snapshot"] is not None
        report["cut"] += len(restored["cut"])
        return wrong
    finally:
        for p in workers:
            p.kill()
            p.join()
        supervisor.kill()
        supervisor.wait()
        shutil.rmtree(folder)
        try:
            shmcache.unlink(name)
        except shmcache.SegmentNotFound:
            pass


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--policy", choices=("always", "everysec"), default="always")
    parser.add_argument("--seconds", type=float, help="that a round lasts at most (0.8; everysec: 4)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    args.seconds = args.seconds or (0.8 if args.policy == "always" else 4.0)
    report: dict[str, Any] = {"rounds": 0, "wrong": 0, "writes": 0, "log_records": 0, "with_snapshot": 0, "cut": 0}
    for i in range(args.rounds):
        wrong = round_(args, random.Random(args.seed * 1_000_003 + i), report)
        for line in wrong[:5]:
            print(f"round {i}: {line}", flush=True)
        report["rounds"] += 1
        report["wrong"] += len(wrong)
    print(json.dumps(report))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
