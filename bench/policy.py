"""A cache in front of a store: what a hit costs beside a plain one, what writes cost, and how 1,000 misses of one key are served.

    python bench/policy.py [--rounds 7]

Peers by turns in one run. Hits: 100,000 keys of 22 bytes, 100-byte values, fresh objects. Writes: one key at a time into SQLite (WAL),
against the store alone. Stampede: 8 processes of 125 threads miss one key whose load takes 50 ms; then again, and the loading process is
killed within it. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import harness

import shmcache
from shmcache.stores import Entry

fork = mp.get_context("fork")
KEYS = [harness.key(i) for i in range(100_000)]


class Nothing:
    """A store that has nothing, and takes everything."""

    ordered = True

    def load_many(self, keys: Any, **options: Any) -> dict[bytes, Any]:
        return {}

    def store_many(self, items: Any, **options: Any) -> None:
        pass

    delete_many = store_many

    def close(self) -> None:
        pass


@contextmanager
def segment(name: str, **options: Any) -> Iterator[shmcache.Cache]:
    with shmcache.create(name, "256M", **options) as cache:
        try:
            yield cache
        finally:
            shmcache.unlink(name)


def hits(rounds: int) -> dict[str, Any]:
    """By a handle with a store, and by one without, on one segment: two have other lines of memory."""
    with segment(f"bench-policy-{os.getpid()}", policy="through", store=Nothing()) as cache, shmcache.attach(cache.name) as plain:
        cache.set_many(dict.fromkeys(KEYS, harness.VALUE))
        peers = [("with a store", cache.get), ("plain", plain.get)]
        times = harness.alternate(peers, lambda seed: harness.fresh(KEYS, 200_000, seed), rounds)
    ratio = statistics.median(a / b for a, b in zip(times["with a store"], times["plain"], strict=True))
    return {**{name: f"{statistics.median(ns):.0f} ns" for name, ns in times.items()}, "ratio": round(ratio, 3)}


def writes(rounds: int) -> dict[str, Any]:
    """Microseconds each."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stores = {name: shmcache.SQLStore(f"sqlite:///{folder}/{name}.db") for name in ("alone", "through", "around", "back")}
        name = f"bench-policy-{os.getpid()}"
        caches = {
            p: stack.enter_context(segment(f"{name}-{p}", policy=p, store=stores[p])) for p in ("through", "around", "back")
        }  # fmt: skip
        peers = [("store alone", lambda k: stores["alone"].store_many({k: (harness.VALUE, None)}))]
        peers += [(name, lambda k, cache=cache: cache.set(k, harness.VALUE)) for name, cache in caches.items()]
        times = harness.alternate(peers, lambda seed: harness.fresh(KEYS, 500, seed), rounds)
        for store in stores.values():
            store.close()
    return {name: round(statistics.median(ns) / 1000, 2) for name, ns in times.items()}


class Slow(Nothing):
    def __init__(self, calls: Any, owner: Any, began: Any) -> None:
        self.calls, self.owner, self.began = calls, owner, began

    def load_many(self, keys: Any, **options: Any) -> dict[bytes, Any]:
        with self.calls.get_lock():
            self.calls.value += 1
            self.owner.value = os.getpid()
            self.began.value = time.monotonic()
        time.sleep(0.05)  # the load
        return {k: Entry(b"value") for k in keys}


def misses(name: str, store: Slow, ready: Any, go: Any, done: Any) -> None:
    cache = shmcache.attach(name, store=store)

    def one() -> None:
        with ready.get_lock():
            ready.value += 1
        while not go.value:
            time.sleep(0.001)  # between two looks
        assert cache.get(b"k") == b"value"

    threads = [threading.Thread(target=one) for _ in range(125)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    done.value = time.monotonic()


def stampede(kill: bool) -> dict[str, Any]:
    name = f"bench-policy-{os.getpid()}"
    calls, owner, began, go = fork.Value("i", 0), fork.Value("i", 0), fork.Value("d", 0.0), fork.Value("b", 0, lock=False)
    ready = fork.Value("i", 0)
    store = Slow(calls, owner, began)
    with segment(name, policy=shmcache.Policy("through", timeout=60.0), store=store):
        ends = [fork.Value("d", 0.0, lock=False) for _ in range(8)]
        procs = [fork.Process(target=misses, args=(name, store, ready, go, end)) for end in ends]
        for p in procs:
            p.start()
        while ready.value < 1000:
            time.sleep(0.001)  # between two looks
        went = time.monotonic()
        go.value = 1
        killed = 0.0
        if kill:
            while not calls.value:
                time.sleep(0.0005)  # between two looks
            time.sleep(0.02)  # of the 50 ms that the load takes
            killed = time.monotonic()
            os.kill(owner.value, signal.SIGKILL)
        for p in procs:
            p.join()
        result = {"loads": calls.value, "all_served_after_ms": round(1000 * (max(e.value for e in ends) - went), 1)}
        if kill:
            result["next_load_after_ms"] = round(1000 * (began.value - killed), 1)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    stampedes = {"stampede": stampede(False), "stampede, the loading process killed": stampede(True)}
    print(json.dumps({"hit": hits(args.rounds), "write_us": writes(args.rounds), **stampedes}, indent=1))


if __name__ == "__main__":
    main()
