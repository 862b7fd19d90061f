"""Does every phase of a changing workload get the memory? One size of value after the other, each three times the segment.

    python -m tests.stress.churn --size 64M

For each phase: no set fails; at its end the live bytes of its items (header, key, value) over slab memory; and how many of the values
written last, half of the slab memory's bytes, are hits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import shmcache

PHASES = (100, 10_000, 1_000_000, 100, 300_000, 3_000)


def key(phase: int, i: int) -> bytes:
    return b"phase%d:%015d" % (phase, i)


def run(cache: shmcache.Cache, size_bytes: int) -> list[dict[str, float]]:
    slab = cache.stats()["slab_bytes"]
    report = []
    for phase, size in enumerate(PHASES):
        n = 3 * size_bytes // size
        value = os.urandom(size)
        for i in range(n):
            cache.set(key(phase, i), value)
        prefix = b"phase%d:" % phase
        live = sum(48 + len(k) + size for k in cache.scan(prefix))
        last = min(n, slab // 2 // (48 + 22 + size))
        hits = sum(cache.get(key(phase, i)) == value for i in range(n - last, n))
        report.append({"value_bytes": size, "sets": n, "live": live / slab, "last": last, "last_hits": hits, "violations": len(cache.verify())})
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="64M")
    args = parser.parse_args(argv)
    name = f"churn-{os.getpid()}"
    with shmcache.create(name, args.size) as cache:
        shmcache.unlink(name)  # it goes with this process
        report = run(cache, cache.stats()["size_bytes"])
        stats = cache.stats()
    for phase in report:
        print(json.dumps(phase))
    print(json.dumps({k: stats[k] for k in ("evictions", "chain_evictions", "pages_moved", "unlisted")}))
    return 0 if all(p["live"] >= 0.75 and p["last_hits"] == p["last"] and not p["violations"] for p in report) else 1


if __name__ == "__main__":
    sys.exit(main())
