"""What does a supervisor spare the writers, and what does it cost?

    python bench/supervisor.py [--seconds 10] [--idle 120] [--items 10000000]

Prints, as JSON: the share of evictions that two writers (half gets, half sets of new keys) do themselves, without and with it; the CPU time
of an idle one; how long a sweep over so many items takes, and the slowest get and set of another process meanwhile, beside those of the
same process with no sweep.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import time
from typing import Any

import psutil

import shmcache
from shmcache.core import _sweep

fork = mp.get_context("fork")


def work(name: str, me: int, seconds: float) -> None:
    with shmcache.attach(name) as cache:
        value, n, end = bytes(100), 0, time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(1000):
                n += 1
                cache.set(b"%d:%d:%d" % (me, os.getpid(), n), value)
                cache.get(b"%d:%d:%d" % (me, os.getpid(), max(1, n - 1000)))


def writers(cache: shmcache.Cache, seconds: float) -> dict[str, Any]:
    before = cache.stats()
    procs = [fork.Process(target=work, args=(cache.name, i, seconds)) for i in range(2)]
    for p in procs:
        p.start()
    for p in procs:
        p.join()
    now = cache.stats()
    evicted, inline = (now[k] - before[k] for k in ("evictions", "inline_evictions"))
    share = round(100 * inline / evicted, 3) if evicted else 0.0
    return {"evictions_per_s": round(evicted / seconds), "inline_percent": share, "items": now["items"]}


def inline(name: str, seconds: float) -> dict[str, Any]:
    with shmcache.create(name, "64M") as cache:
        try:
            writers(cache, 3.0)  # until it is full
            without = writers(cache, seconds)
            supervisor = shmcache.supervise(name)
            try:
                return {"without": without, "with": writers(cache, seconds)}
            finally:
                supervisor.terminate()
                supervisor.wait()
        finally:
            shmcache.unlink(name)


def cpu_when_idle(name: str, seconds: float) -> dict[str, Any]:
    with shmcache.create(name, "1G") as cache:
        try:
            for i in range(1_000_000):
                cache.set(b"%d" % i, bytes(100), ttl=1e6)
            supervisor = shmcache.supervise(name)
            try:
                time.sleep(2.0)  # it settles
                process = psutil.Process(supervisor.pid)
                before = process.cpu_times()
                time.sleep(seconds)  # what is measured
                now = process.cpu_times()
                used = now.user + now.system - before.user - before.system
                return {"seconds": seconds, "cpu_percent": round(100 * used / seconds, 3)}
            finally:
                supervisor.terminate()
                supervisor.wait()
        finally:
            shmcache.unlink(name)


def probe(name: str, items: int, stop: Any, slowest: Any) -> None:
    with shmcache.attach(name) as cache:
        clock, i, value = time.perf_counter, 0, bytes(100)
        while not stop.value:
            i = (i + 7919) % items
            key = b"%d" % i
            a = clock()
            cache.get(key)
            b = clock()
            cache.set(key, value, 1e6)
            c = clock()
            slowest[0] = max(slowest[0], b - a)
            slowest[1] = max(slowest[1], c - b)
            slowest[2] += 1


def latencies(name: str, items: int, during: Any) -> dict[str, float]:
    stop, slowest = fork.Value("b", 0, lock=False), fork.Array("d", 3, lock=False)
    p = fork.Process(target=probe, args=(name, items, stop, slowest))
    p.start()
    while not slowest[2]:
        time.sleep(0.01)  # until it has begun
    slowest[0] = slowest[1] = 0.0
    try:
        during()
    finally:
        stop.value = 1
        p.join()
    return {"worst_get_us": round(1e6 * slowest[0], 1), "worst_set_us": round(1e6 * slowest[1], 1)}


def sweep(name: str, items: int) -> dict[str, Any]:
    with shmcache.create(name, items * 240) as cache:
        try:
            for i in range(items):
                cache.set(b"%d" % i, bytes(100), ttl=1e6)
            took: list[float] = []
            hold = _sweep.Supervision(cache)
            n_pages = int(cache.segment.header["n_pages"])

            def whole() -> None:
                began = time.perf_counter()
                for first in range(0, n_pages, 64):
                    hold.sweep(first, first + 64)
                took.append(time.perf_counter() - began)

            result = {
                "items": len(cache),
                "no_sweep": latencies(name, items, lambda: time.sleep(2.0)),
                "during_sweeps": latencies(name, items, lambda: [whole() for _ in range(3)]),
                "sweep_s": [round(t, 3) for t in took],
            }
            hold.end()
            return result
        finally:
            shmcache.unlink(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of writing, without and with")
    parser.add_argument("--idle", type=float, default=120.0, help="seconds of idleness")
    parser.add_argument("--items", type=int, default=10_000_000, help="to sweep")
    args = parser.parse_args()
    name = f"bench-supervisor-{os.getpid()}"
    result = {"writers": inline(name, args.seconds), "sweep": sweep(name, args.items), "idle": cpu_when_idle(name, args.idle)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
