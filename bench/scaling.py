"""Do two processes get twice as much done on one cache?

    python bench/scaling.py [--json bench/results/scaling.json] [--procs 2]

1, 2 ... --procs processes in one loop over keys drawn by Zipf's law (0.99) from a million, or over one hot key, at 100/0, 90/10 and 50/50
gets and sets of 100 bytes; beside it the same loop over a dict of each process's own, which shares nothing: what it gains is what the
machine has to give. Share = 2 x our gain / the dict's gain. Rates in operations/s of all processes together, medians of 7 rounds.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from harness import VALUE, keep, key, options

import shmcache

MIXES = {"100/0": 0, "90/10": 10, "50/50": 50}  # percent of sets


def zipf(n_keys: int, n: int, seed: int, exponent: float = 0.99) -> list[int]:
    """n numbers below n_keys, k with weight 1 / (k + 1)^exponent, spread over the key space."""
    weights = list(accumulate(1 / (k + 1) ** exponent for k in range(n_keys)))
    spread = 2_654_435_761  # odd, so that neighbours in rank are none in the table
    return [k * spread % n_keys for k in random.Random(seed).choices(range(n_keys), cum_weights=weights, k=n)]


def run(get: Callable[[bytes], Any], put: Callable[[bytes, bytes], Any], ops: list[tuple[bytes, bool]], seconds: float) -> float:
    """Operations per second of loops over ops, for so long at least."""
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for k, is_set in ops:
            if is_set:
                put(k, VALUE)
            else:
                get(k)
        done += len(ops)
    return done / (time.perf_counter() - began)


def together(procs: int, work: Callable[[int], Callable[[], float]]) -> float:
    """The sum of what work(i)() returns in each of so many forked processes that begin at the same time."""
    context = mp.get_context("fork")
    barrier, out = context.Barrier(procs), context.SimpleQueue()

    def child(i: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        loop = work(i)
        barrier.wait()
        out.put(loop())

    children = [context.Process(target=child, args=(i,), daemon=True) for i in range(procs)]
    for p in children:
        p.start()
    for p in children:
        p.join()
        if p.exitcode:
            raise RuntimeError(f"a worker ended with {p.exitcode}")
    return sum(out.get() for _ in children)


def gains(stores: dict[str, Any], numbers: list[int], percent: int, args: Any) -> dict[str, dict[str, Any]]:
    """By number of processes: rates, gains over one process, and the share."""
    rates: dict[tuple[str, int], list[float]] = {}
    for r in range(args.rounds + 1):
        for store, (get, put) in stores.items():
            for procs in range(1, args.procs + 1):

                def work(i: int, r: int = r, get: Any = get, put: Any = put) -> Callable[[], float]:
                    rng = random.Random(1000 * r + i)
                    turn = rng.randrange(len(numbers))
                    ops = [(key(k), rng.random() * 100 < percent) for k in numbers[turn:] + numbers[:turn]]
                    return lambda: run(get, put, ops, args.seconds)

                rate = together(procs, work)
                if r:
                    rates.setdefault((store, procs), []).append(rate)
    median = {at: statistics.median(rs) for at, rs in rates.items()}
    case = {}
    for procs in range(1, args.procs + 1):
        ours, plain = (median[store, procs] / median[store, 1] for store in stores)
        case[f"procs={procs}"] = {
            **{f"{store}, ops/s": round(median[store, procs]) for store in stores},
            "gain": round(ours, 3),
            "dict's gain": round(plain, 3),
            "share": round(procs * ours / plain, 3),
        }
    return case


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--procs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.7, help="of each measurement")
    args = parser.parse_args()
    n_keys = 1_000_000
    if args.quick:
        n_keys, args.rounds, args.seconds = n_keys // 10, 3, 0.2
    name = f"bench-scaling-{os.getpid()}"
    cache = shmcache.create(name, n_keys * 400)
    table: dict[bytes, bytes] = {}
    try:
        for i in range(n_keys):
            cache.set(key(i), VALUE)
            table[key(i)] = bytes(bytearray(VALUE))
        drawn = zipf(n_keys, args.ops, 1)
        stores = {"shmcache": (cache.get, cache.set), "dict of its own": (table.get, table.__setitem__)}
        cases: dict[str, dict[str, Any]] = {}
        for spread, numbers in ((f"zipf=0.99/keys={n_keys}", drawn), ("one hot key", [0] * args.ops)):
            for mix, percent in MIXES.items():
                cases[f"{spread}/{mix}"] = gains(stores, numbers, percent, args)
                for procs, figures in cases[f"{spread}/{mix}"].items():
                    print(f"{spread}/{mix:6} {procs}  {figures}", flush=True)
    finally:
        cache.close()
        shmcache.unlink(name)
    keep(cases, [], args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
