"""Single flight: what does get_or_set cost on a hit, and how soon after the computing process's SIGKILL does another compute?

    python bench/flight.py [--rounds 20]

8 processes of 8 threads miss one key; the process that computes is killed in the middle of it. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import signal
import threading
import time
from typing import Any

import shmcache

fork = mp.get_context("fork")


def wanting(name: str, calls: Any, owner: Any, began: Any, go: Any) -> None:
    cache = shmcache.attach(name)

    def factory() -> bytes:
        with calls.get_lock():
            calls.value += 1
            owner.value = os.getpid()
            began.value = time.monotonic()
        while not go.value:
            time.sleep(0.001)  # until it is killed, or told
        return b"value"

    threads = [threading.Thread(target=cache.get_or_set, args=("k", factory)) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def until(condition: Any) -> None:
    while not condition():
        time.sleep(0.0005)  # between two looks


def handover(name: str) -> tuple[float, int]:
    """Milliseconds from the kill to the next call of the factory; calls in all."""
    with shmcache.create(name, "8M") as cache:
        calls, owner, began, go = fork.Value("i", 0), fork.Value("i", 0), fork.Value("d", 0.0), fork.Value("b", 0, lock=False)
        procs = [fork.Process(target=wanting, args=(name, calls, owner, began, go)) for _ in range(8)]
        try:
            for p in procs:
                p.start()
            until(lambda: calls.value == 1)
            time.sleep(0.2)  # until the others wait in long slices
            killed = time.monotonic()
            os.kill(owner.value, signal.SIGKILL)
            until(lambda: calls.value > 1)
            go.value = 1
            for p in procs:
                p.join()
            assert cache["k"] == b"value"
            return 1000 * (began.value - killed), calls.value
        finally:
            for p in procs:
                p.kill()
                p.join()
            shmcache.unlink(name)


def hit_ns(name: str) -> dict[str, float]:
    with shmcache.create(name, "8M") as cache:
        try:
            cache.set("k", b"value")
            result = {}
            for what, call in (("get", lambda: cache.get("k")), ("get_or_set", lambda: cache.get_or_set("k", bytes))):
                began = time.perf_counter()
                for _ in range(500_000):
                    call()
                result[what + "_ns"] = round((time.perf_counter() - began) * 2000)
            return result
        finally:
            shmcache.unlink(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    name = f"bench-flight-{os.getpid()}"
    rounds = [handover(name) for _ in range(args.rounds)]
    took = sorted(r[0] for r in rounds)
    figures = {"median_ms": round(took[len(took) // 2], 1), "worst_ms": round(took[-1], 1), "calls": sorted({r[1] for r in rounds})}
    print(json.dumps({"handover": figures, "hit": hit_ns(name)}, indent=1))


if __name__ == "__main__":
    main()
