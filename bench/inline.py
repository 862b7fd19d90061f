"""How many evictions do writers have to do themselves? Two workers, half gets and half sets of new keys, with and without a supervisor.

    python bench/inline.py [--seconds 10] [--size 64M]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import time

import shmcache


def work(name: str, me: int, seconds: float) -> None:
    with shmcache.attach(name) as cache:
        value, n, end = bytes(100), 0, time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(1000):
                n += 1
                cache.set(b"%d:%d:%d" % (me, os.getpid(), n), value)
                cache.get(b"%d:%d:%d" % (me, os.getpid(), max(1, n - 1000)))


def run(cache: shmcache.Cache, seconds: float, workers: int) -> dict[str, float]:
    before = cache.stats()
    context = mp.get_context("fork")
    procs = [context.Process(target=work, args=(cache.name, i, seconds)) for i in range(workers)]
    for p in procs:
        p.start()
    for p in procs:
        p.join()
    now = cache.stats()
    evicted, inline = (now[k] - before[k] for k in ("evictions", "inline_evictions"))
    return {
        "evictions_per_s": round(evicted / seconds), "inline_percent": round(100 * inline / evicted, 3) if evicted else 0.0,
        "items": now["items"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--size", default="64M")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    name = f"bench-inline-{os.getpid()}"
    result = {}
    with shmcache.create(name, args.size) as cache:
        try:
            run(cache, 3.0, args.workers)  # until it is full
            result["without"] = run(cache, args.seconds, args.workers)
            supervisor = shmcache.supervise(name)
            try:
                result["with"] = run(cache, args.seconds, args.workers)
            finally:
                supervisor.terminate()
                supervisor.wait()
        finally:
            shmcache.unlink(name)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
