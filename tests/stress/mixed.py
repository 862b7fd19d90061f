"""Does anybody ever see a wrong value? Processes and threads do everything at once, on values that check themselves.

    python -m tests.stress.mixed --seed 7 --procs 4 --threads 2 --seconds 600 --size 64M

A value carries its key's number, its own length and a random seed that fills it, so a torn, stale-length or foreign value is
seen. Counters only grow within one epoch of the test. Ends in verify(); exits 1 at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import struct
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import shmcache
from shmcache import errors

HEAD = struct.Struct("<IIQ")  # key number, length, seed
FILL = bytes(range(256)) * 8200  # 2 MB of known bytes; a value is a window into it that its seed chooses
SIZES = (1, 20, 100, 300, 1000, 3000, 10_000, 40_000, 100_000, 400_000, 2_000_000)
WEIGHTS = (8, 20, 40, 20, 10, 5, 2, 0.5, 0.1, 0.02, 0.004)


def make(number: int, size: int, seed: int) -> bytes:
    """A value of `size` bytes (at least the head's 16, unless 1: then one byte that the key determines)."""
    if size < HEAD.size:
        return bytes([number & 0xFF])
    at = seed & 0xFF
    return HEAD.pack(number, size, seed) + FILL[at : at + size - HEAD.size]


def wrong(number: int, value: bytes) -> bool:
    if len(value) < HEAD.size:
        return value != bytes([number & 0xFF])
    n, size, seed = HEAD.unpack_from(value)
    return n != number or size != len(value) or value != make(n, size, seed)


class Worker:
    """One thread's operations and what it counted."""

    def __init__(self, cache: shmcache.Cache, seed: int, keys: int | Sequence[int], clear_every: int) -> None:
        """keys: how many, or their numbers."""
        self.cache = cache
        self.rng = random.Random(seed)
        self.numbers = range(keys + 1) if isinstance(keys, int) else keys
        self.keys = len(self.numbers) - 1
        self.clear_every = clear_every
        self.count = dict.fromkeys(("ops", "hits", "wrong", "errors", "clears", "big"), 0)
        self.longest_s = 0.0

    def check(self, number: int, value: Any) -> None:
        if value is None:
            return
        self.count["hits"] += 1
        if not isinstance(value, bytes) or wrong(number, value):
            self.count["wrong"] += 1
            shown = value[:32] if isinstance(value, bytes) else value
            print(f"WRONG pid {os.getpid()} key {number}: {type(value).__name__} {len(value)} {shown!r}", flush=True)

    def step(self) -> None:
        rng, cache = self.rng, self.cache
        number = self.numbers[min(int(rng.paretovariate(0.6)), self.keys) if rng.random() < 0.7 else rng.randrange(self.keys)]
        key = b"key:%d" % number
        op = rng.random()
        if op < 0.50:
            self.check(number, cache.get(key))
        elif op < 0.72:
            size = rng.choices(SIZES, WEIGHTS)[0]
            self.count["big"] += size > 32768
            cache.set(key, make(number, size, rng.getrandbits(60)), rng.choice((None, None, None, 0.01, 1, 60)))
        elif op < 0.78:
            cache.add(key, make(number, rng.choice((20, 100, 500)), rng.getrandbits(60)))
        elif op < 0.82:
            cache.delete(key)
        elif op < 0.87:
            counter = b"count:%d" % (number % 64)
            if not isinstance(cache.incr(counter, 1, default=0), int):
                self.count["wrong"] += 1
        elif op < 0.92:
            value, version = cache.gets(key)
            self.check(number, value)
            if version:
                cache.cas(key, make(number, rng.choice((20, 100, 500)), rng.getrandbits(60)), version)
        elif op < 0.95:
            numbers = [self.numbers[rng.randrange(self.keys)] for _ in range(20)]
            found = cache.get_many([b"key:%d" % n for n in numbers])
            for k, v in found.items():
                self.check(int(k[4:]), v)
            self.count["ops"] += 19
        elif op < 0.96:
            self.check(number, cache.pop(key))
        elif op < 0.98:
            cache.touch(key, rng.choice((0.01, 10)))
        elif op < 0.985:
            cache.replace(key, make(number, 700, rng.getrandbits(60)))
        else:
            self.check(number, cache.get(key))
            if (self.count["ops"] + 1) % self.clear_every == 0:
                cache.clear()
                self.count["clears"] += 1
        self.count["ops"] += 1

    def run(self, until: float) -> None:
        while True:
            now = time.monotonic()
            if now >= until:
                return
            for _ in range(50):
                began = time.monotonic()
                try:
                    self.step()
                except errors.ShmcacheError as e:
                    self.count["errors"] += 1
                    print(f"ERROR pid {os.getpid()}: {type(e).__name__}: {e}", flush=True)
                self.longest_s = max(self.longest_s, time.monotonic() - began)


def process(name: str, seed: int, threads: int, until: float, keys: int, clear_every: int, out: Any) -> None:
    cache = shmcache.attach(name)
    workers = [Worker(cache, seed * 1000 + i, keys, clear_every) for i in range(threads)]
    running = [threading.Thread(target=w.run, args=(until,)) for w in workers]
    for t in running:
        t.start()
    for t in running:
        t.join()
    total = {k: sum(w.count[k] for w in workers) for k in workers[0].count}
    total["longest_ms"] = round(1000 * max(w.longest_s for w in workers), 1)
    out.put(total)
    cache.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--procs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--size", default="64M")
    parser.add_argument("--keys", type=int, default=400_000)
    parser.add_argument("--clear-every", type=int, default=20_000, help="about: operations of a thread for each clear()")
    args = parser.parse_args(argv)
    print(f"seed {args.seed}", flush=True)
    name = f"stress-{os.getpid()}"
    cache = shmcache.create(name, args.size)
    try:
        context = mp.get_context("spawn")
        out = context.Queue()
        until = time.monotonic() + args.seconds
        procs = [
            context.Process(target=process, args=(name, args.seed * 100 + i, args.threads, until, args.keys, args.clear_every, out))
            for i in range(args.procs)
        ]
        for p in procs:
            p.start()
        results = [out.get(timeout=args.seconds + 120) for _ in procs]
        for p in procs:
            p.join()
        codes = [p.exitcode for p in procs]
        violations = cache.verify()
        stats = cache.stats()
        total = {k: sum(r[k] for r in results) for k in results[0] if k != "longest_ms"}
        report = {
            **total,
            "hits_by_process": [r["hits"] for r in results],
            "longest_ms": max(r["longest_ms"] for r in results),
            "exit_codes": codes,
            "verify": violations,
            **{k: stats[k] for k in ("evictions", "chain_evictions", "expirations", "retries", "lock_waits", "pages_moved", "unlisted")},
        }
        print(json.dumps(report, indent=1))
        good = not violations and not total["wrong"] and not total["errors"] and not any(codes) and min(r["hits"] for r in results)
        return 0 if good else 1
    finally:
        cache.close()
        shmcache.unlink(name)


if __name__ == "__main__":
    sys.exit(main())
