"""How long does the slowest get take while others write, evict and sweep?

    python bench/tail.py [--json bench/results/tail.json]

A reader times batches of 16 gets of 100 bytes: beside two processes that only spin (what the machine itself costs), beside one that
stores new keys into a full segment all the time and a supervisor that sweeps and evicts; and two workers at 90/10 do the same. Rounds
alternate; median, p99 and p99.9 of a batch over all rounds, in us.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from harness import VALUE, keep, key, options

import shmcache

BATCH = 16


def spin() -> None:
    while True:
        pass


def store_new_keys(name: str) -> None:
    cache, i = shmcache.attach(name), os.getpid() << 32
    while True:
        i += 1
        cache.set(key(i), VALUE)


def two_workers(name: str, n_keys: int, seconds: float, seed: int) -> tuple[np.ndarray, float]:
    """(us of each batch of both, their gets per second together): two processes at 90/10 that begin at the same time."""
    context = mp.get_context("fork")
    barrier, out = context.Barrier(2), context.SimpleQueue()

    def worker(i: int) -> None:
        cache = shmcache.attach(name)
        cache.get(b"takes a row")
        out.put(read(cache, n_keys, seconds, 2 * seed + i, 9, barrier.wait))

    children = [context.Process(target=worker, args=(i,), daemon=True) for i in range(2)]
    for p in children:
        p.start()
    parts = [out.get() for _ in children]
    for p in children:
        p.join()
    return np.concatenate([taken for taken, _ in parts]), sum(rate for _, rate in parts)


def supervise(name: str) -> None:
    from shmcache.supervisor.loop import Supervisor

    Supervisor(shmcache.attach(name)).run()


@contextlib.contextmanager
def beside(*works: tuple[Callable[..., None], tuple[Any, ...]]) -> Iterator[None]:
    """Forked processes that do this until the end of the block."""
    children = [mp.get_context("fork").Process(target=work, args=args, daemon=True) for work, args in works]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for p in children:
        p.start()
    try:
        yield
    finally:
        for p in children:
            p.kill()
            p.join()


def read(
    cache: shmcache.Cache, n_keys: int, seconds: float, seed: int, set_every: int = 0, ready: Callable[[], Any] = lambda: None
) -> tuple[np.ndarray, float]:
    """(us of each batch, gets per second). set_every: a batch of sets follows so many of gets; 0: none."""
    rng = random.Random(seed)
    batches = [[key(rng.randrange(n_keys)) for _ in range(BATCH)] for _ in range(4000)]
    get, clock = cache.get, time.perf_counter_ns
    taken: list[int] = []
    ready()
    until = clock() + int(seconds * 1e9)
    began = at = clock()
    while at < until:
        for batch in batches:
            start = clock()
            for k in batch:
                get(k)
            at = clock()
            taken.append(at - start)
            if set_every and len(taken) % set_every == 0:
                for k in batch:
                    cache.set(k, VALUE)
    return np.array(taken) / 1000, BATCH * len(taken) / ((at - began) / 1e9)


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 2, 0.5
    name = f"bench-tail-{os.getpid()}"
    cache = shmcache.create(name, "64M")
    try:
        for i in range(2 * args.keys):
            cache.set(key(i), VALUE)
        n = args.keys
        surroundings: dict[str, list[Any]] = {
            "alone": [],
            "beside two that spin": [(spin, ()), (spin, ())],
            "beside one that evicts, and a supervisor": [(store_new_keys, (name,)), (supervise, (name,))],
            "two workers at 90/10": [],
        }
        batches: dict[str, list[np.ndarray]] = {where: [] for where in surroundings}
        rates: dict[str, list[float]] = {where: [] for where in surroundings}
        for r in range(args.rounds + 1):
            for where, works in surroundings.items():
                for k in range(n):  # what the evicting one threw out
                    cache.set(key(k), VALUE)
                with beside(*works):
                    if where.startswith("two workers"):
                        taken, rate = two_workers(name, n, args.seconds, r)
                    else:
                        taken, rate = read(cache, n, args.seconds, r)
                if r:
                    batches[where].append(taken)
                    rates[where].append(rate)
        cases: dict[str, Any] = {}
        for where, parts in batches.items():
            us = np.concatenate(parts)
            cases[where] = {
                **{f"p{q:g}_us": round(float(np.percentile(us, q)), 2) for q in (50, 99, 99.9)},
                "max_us": round(float(us.max()), 1), "gets_per_s": round(float(np.median(rates[where]))), "batches": len(us),
            }  # fmt: skip
            print(f"{where:42} {cases[where]}", flush=True)
        ratio = cases["beside one that evicts, and a supervisor"]["p99.9_us"] / cases["beside two that spin"]["p99.9_us"]
        cases["p99.9 beside an evicting writer over beside spinning ones"] = round(ratio, 3)
        print(f"p99.9 beside an evicting writer and a supervisor is {ratio:.2f} of that beside two that spin")
    finally:
        cache.close()
        shmcache.unlink(name)
    keep(cases, [], args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
