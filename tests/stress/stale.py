"""Does a reader of a cache in front of a store ever see an older value than one whose write was acknowledged before?

    python -m tests.stress.stale --policy through --fills 100000 --seed 1
    python -m tests.stress.stale --policy through --fills 5000 --no-leases       has to find some
    python -m tests.stress.stale --policy around --store postgresql

Readers and writers are processes, of some threads each; all want the same hundred keys. The store sleeps for a random while behind each
load, and before and behind each write, so that all kinds of things happen between what a reader loads and what he puts into the cache.
Everything is written down: of a write when it was asked for and when it was acknowledged, of a read when it was asked for and what came. A
read is stale if it gave a value (or none) that was acknowledged before another write was asked for that was acknowledged before the read
was asked for: a register that behaves has no such read, in whatever order the writes went. Exit code 1: there was one, or an error.
"""

from __future__ import annotations

import argparse
import bisect
import json
import multiprocessing as mp
import os
import random
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import shmcache
from shmcache.stored import MISSING
from shmcache.through import ThroughCache

EVENT = struct.Struct("<BHQQQ")  # kind, key, value (0: none), from, to; monotonic ns, which all processes of a host share
READ, WRITE = 0, 1
KEYS = 100
DELAYS = (0, 0, 0, 0.0002, 0.001, 0.005)  # seconds
TABLE = "stale"


class Slow:
    """A store that sleeps when something has happened that nobody knows of yet."""

    def __init__(self, behind: shmcache.Store) -> None:
        self.behind = behind
        self.ordered = behind.ordered

    def load_many(self, keys: Any, **options: Any) -> Any:
        found = self.behind.load_many(keys, **options)
        time.sleep(random.choice(DELAYS))
        return found

    def store_many(self, items: Any, **options: Any) -> None:
        time.sleep(random.choice(DELAYS))
        self.behind.store_many(items, **options)
        time.sleep(random.choice(DELAYS))

    def delete_many(self, keys: Any, **options: Any) -> None:
        time.sleep(random.choice(DELAYS))
        self.behind.delete_many(keys, **options)
        time.sleep(random.choice(DELAYS))

    def close(self) -> None:
        self.behind.close()


class Leaseless(ThroughCache):
    """What this test has to find: the lease is taken when the value is there already."""

    def _load_missing(self, key: Any, default: Any) -> Any:
        entry = self.store.load_many([key]).get(key)
        self.count_store(loads=1, found=entry is not None)
        version = self.claim(key, 5.0)
        if version > 0:
            self._filled(key, entry, version, None) if entry else self.unclaim(key, version)
        return entry.value if entry else default


def work(name: str, url: str, leases: bool, seed: int, writes: bool, folder: str, stop: Any) -> None:
    store = Slow(shmcache.SQLStore(url, TABLE, pool_size=8, timeout=30.0))
    cache = shmcache.attach(name, store=store)
    if not leases:
        cache = Leaseless(cache.mapping, "msgpack", {}, store)
    threads = [threading.Thread(target=one, args=(cache, seed * 100 + i, writes, folder, stop)) for i in range(1 if writes else 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.close()
    store.close()


def one(cache: Any, seed: int, writes: bool, folder: str, stop: Any) -> None:
    rng = random.Random(seed)
    n = 0
    with open(Path(folder) / f"{os.getpid()}-{seed}", "wb") as out:
        while not stop.value:
            number = rng.randrange(KEYS)
            key = b"%d" % number
            value = 0
            began = time.monotonic_ns()
            if writes and rng.random() < 0.05:
                cache.delete(key)
            elif writes:
                n += 1
                value = seed << 32 | n
                cache.set(key, value)
            elif rng.random() < 0.02:
                cache.invalidate(key)
                continue
            else:
                found = cache.get(key, MISSING)
                value = 0 if found is MISSING else found
            out.write(EVENT.pack(WRITE if writes else READ, number, value, began, time.monotonic_ns()))


def stale(events: list[tuple[int, int, int, int, int]]) -> tuple[int, int, list[str]]:
    """Reads, writes, and a line for each stale read."""
    writes: dict[int, list[tuple[int, int, int]]] = {k: [] for k in range(KEYS)}
    for kind, key, value, began, ended in events:
        if kind == WRITE:
            writes[key].append((ended, began, value))
    ended_at: dict[int, list[int]] = {}
    latest: dict[int, list[int]] = {}  # of the writes of a key by their end: the latest begin of those so far
    acknowledged: dict[tuple[int, int], int] = {}
    gone: dict[int, list[tuple[int, int]]] = {k: [] for k in range(KEYS)}  # deletes: (end, begin)
    for key, done in writes.items():
        done.sort()
        ended_at[key] = [w[0] for w in done]
        highest, latest[key] = 0, []
        for ended, began, value in done:
            highest = max(highest, began)
            latest[key].append(highest)
            if value:
                acknowledged[key, value] = ended
            else:
                gone[key].append((ended, began))
    found = []
    reads = 0
    for kind, key, value, began, ended in events:
        if kind != READ:
            continue
        reads += 1
        before = bisect.bisect_left(ended_at[key], began)
        if before == 0:
            continue
        newest = latest[key][before - 1]  # a write that began then was acknowledged before the read was asked for
        # a write that is not acknowledged goes on; of deletes any may be the one that was seen
        seen = [e for e, b in gone[key] if b <= ended] if not value else [acknowledged.get((key, value), ended)]
        if all(e < newest for e in seen):
            found.append(f"key {key}: {value:#x} read at {began}, but a write asked for at {newest} was acknowledged")
    return reads, sum(map(len, writes.values())), found


def run(policy: str, url: str, fills: int, seed: int, leases: bool) -> dict[str, Any]:
    name = f"stale-{os.getpid()}"
    context = mp.get_context("spawn")
    stop = context.Value("b", 0, lock=False)
    with tempfile.TemporaryDirectory() as folder:
        cache = shmcache.create(name, "8M", policy=shmcache.Policy(policy, timeout=30.0), store=(store := shmcache.SQLStore(url, TABLE)))
        try:
            workers = [context.Process(target=work, args=(name, url, leases, seed * 10 + i, i < 2, folder, stop)) for i in range(6)]
            for worker in workers:
                worker.start()
            began = time.monotonic()
            while cache.store_counters()["found"] < fills and all(w.is_alive() for w in workers) and time.monotonic() - began < 3600:
                time.sleep(0.05)
            stop.value = 1
            for worker in workers:
                worker.join(60)
            failed = [w.exitcode for w in workers if w.exitcode != 0]
            counters = cache.store_counters()
            events = [e for path in Path(folder).iterdir() for e in EVENT.iter_unpack(path.read_bytes())]
            reads, writes, found = stale(events)
            damage = cache.verify()
            hits = cache.stats()["hits"]
        finally:
            cache.close()
            shmcache.unlink(name)
            store.close()
    return {
        "policy": policy, "leases": leases, "store": url.partition(":")[0], "loads": counters["loads"], "fills": counters["found"], "errors": counters["errors"], "reads": reads, "hits": hits,
        "writes": writes, "stale": len(found), "first": found[:3], "failed": failed, "verify": damage, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=("through", "around"), default="through")
    parser.add_argument("--store", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--fills", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-leases", action="store_true")
    args = parser.parse_args()
    if args.store == "postgresql":
        from tests.postgres import postgres_server

        with postgres_server() as url:
            result = run(args.policy, url, args.fills, args.seed, not args.no_leases)
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            result = run(args.policy, f"sqlite:///{folder}/stale.db", args.fills, args.seed, not args.no_leases)
    print(json.dumps(result))
    return 1 if result["stale"] or result["failed"] or result["verify"] or result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
