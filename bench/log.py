"""What does the append log cost?

    python bench/log.py [--json bench/results/log.json] [--folder DIR]

1. A set of 100 bytes of an existing key, one process, beside a supervisor: without a log, with `no`, with `everysec`; medians of 7
   rounds by turns.
2. `always`: writes per second of so many processes (50) that each wait for the disk, beside redis-server with `appendfsync always` and
   as many clients (redis-py + hiredis, unix socket), both on --folder's disk, in turns.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from harness import VALUE, fresh, keep, key, loop_ns, options, summary
from peers import program, serve

import shmcache

SIZE = "256M"


@contextlib.contextmanager
def supervised(policy: str, folder: str) -> Iterator[shmcache.Cache]:
    """A segment with a supervisor that logs by this policy."""
    name, data = f"bench-log-{os.getpid()}-{policy}", tempfile.mkdtemp(prefix=f"{policy}-", dir=folder)
    argv = [sys.executable, "-m", "shmcache.cli", "supervise", name, "--size", SIZE, "--data-dir", data, "--log", policy,
            "--snapshot-every", "100000", "--quiet"]  # fmt: skip
    process = subprocess.Popen(argv)
    try:
        while True:
            with contextlib.suppress(shmcache.SegmentNotFound):
                cache = shmcache.attach(name)
                if cache.supervisor()["alive"] and cache.durability()["log"] == policy:
                    break
                cache.close()
            if process.poll() is not None:
                raise RuntimeError(f"the supervisor ended with {process.returncode}")
            time.sleep(0.01)
        yield cache
        gaps = cache.durability()["log_gaps"]
        cache.close()
        if gaps:
            raise RuntimeError(f"{gaps} writes are not in the log of {policy}")
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(shmcache.SegmentNotFound):
            shmcache.unlink(name)
        shutil.rmtree(data)


def cost(args: Any) -> dict[str, Any]:
    keys = [key(i) for i in range(args.keys)]
    times: dict[str, list[float]] = {"off": [], "no": [], "everysec": []}
    with contextlib.ExitStack() as stack:
        sets = {policy: stack.enter_context(supervised(policy, args.folder)).set for policy in times}
        for put in sets.values():
            for k in keys:
                put(k, VALUE)
        for r in range(args.rounds + 1):
            for policy, put in sets.items():
                ns = loop_ns(lambda k, put=put: put(k, VALUE), fresh(keys, args.ops, r))
                if r:
                    times[policy].append(ns)
    return summary(times, ours="everysec")


def writes_per_second(procs: int, seconds: float, connect: Callable[[], Callable[[bytes, bytes], Any]]) -> float:
    """Of so many processes together, each of which waits for each of its writes."""
    context = mp.get_context("fork")
    barrier, counts = context.Barrier(procs + 1), context.RawArray("q", procs)

    def work(i: int) -> None:
        put, n = connect(), 0
        barrier.wait()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            put(key(i * 1_000_003 + n % 1000), VALUE)
            n += 1
            counts[i] = n

    children = [context.Process(target=work, args=(i,), daemon=True) for i in range(procs)]
    for p in children:
        p.start()
    barrier.wait()
    for p in children:
        p.join()
        if p.exitcode:
            raise RuntimeError(f"a writer ended with {p.exitcode}")
    return sum(counts) / seconds


def always(args: Any) -> dict[str, Any]:
    import redis

    rates: dict[str, list[float]] = {"shmcache": [], "Redis": []}
    folder = tempfile.mkdtemp(prefix="redis-", dir=args.folder)
    path = folder + "/s"
    argv = [program("redis-server"), "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "yes", "--appendfsync", "always",
            "--dir", folder]  # fmt: skip
    stop = serve(argv, path, redis.Redis(unix_socket_path=path).ping)
    try:
        with supervised("always", args.folder) as cache:
            connects = {"shmcache": lambda: shmcache.attach(cache.name).set, "Redis": lambda: redis.Redis(unix_socket_path=path).set}
            for r in range(args.rounds + 1):
                for who, connect in connects.items():
                    rate = writes_per_second(args.procs, args.seconds, connect)
                    if r:
                        rates[who].append(rate)
    finally:
        stop()
    median = {who: round(statistics.median(rs)) for who, rs in rates.items()}
    return {**{f"{who}, writes/s": n for who, n in median.items()}, "ratio": round(median["shmcache"] / median["Redis"], 2)}


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--folder", help="of which the disk is meant (a temporary one)")
    parser.add_argument("--procs", type=int, default=50, help="writers with always (50)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement with always")
    args = parser.parse_args()
    if args.quick:
        args.keys, args.ops, args.rounds, args.procs, args.seconds = args.keys // 10, args.ops // 10, 2, 8, 0.5
    made = None
    if args.folder is None:
        args.folder = made = tempfile.mkdtemp(prefix="bench-log-")
    notes: list[str] = []
    cases: dict[str, Any] = {}
    try:
        cases["set/klen=22/vlen=100"] = of = cost(args)
        for policy, s in of.items():
            print(f"set, log {policy:9} {s['median_ns']:8.1f} ns   everysec is {s['ours_over_it']:.2f} of it", flush=True)
        try:
            cases[f"always/procs={args.procs}"] = always(args)
            print(f"always, {args.procs} writers: {cases[f'always/procs={args.procs}']}", flush=True)
        except ImportError as e:
            notes.append(f"Redis is left out: {e}")
    finally:
        if made:
            shutil.rmtree(made)
    for note in notes:
        print("note:", note)
    keep(cases, notes, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
