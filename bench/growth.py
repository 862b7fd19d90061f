"""What do a get and an attach cost as the cache grows, and what do a reader's page tables?

    python bench/growth.py [--json bench/results/growth.json] [--items 10000,1000000,10000000]

22-byte keys, 100-byte values, uniform draws, fresh key objects, beside dict with the same keys; with and without huge pages. A new
process says what attach and its first get took, and what its page tables (VmPTE) grow by when it has read every item. 10 million items
need 9 GB. What a sweep costs is measured by bench/supervisor.py.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any

from harness import VALUE, Peer, alternate, keep, key, options, summary

import shmcache

READER = """
import sys, time
import shmcache
def page_table_kb():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmPTE"))
n, before, began = int(sys.argv[2]), page_table_kb(), time.perf_counter_ns()
cache = shmcache.attach(sys.argv[1])
attached = time.perf_counter_ns()
assert cache.get(b"key:%018d" % 1)
got = time.perf_counter_ns()
for i in range(n):
    cache.get(b"key:%018d" % i)
print((attached - began) / 1000, (got - attached) / 1000, page_table_kb() - before)
"""


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--items", default="10000,1000000,10000000")
    args = parser.parse_args()
    sizes = [int(n) for n in args.items.split(",")]
    if args.quick:
        sizes, args.ops, args.rounds = [n for n in sizes if n <= 1_000_000], args.ops // 10, 3
    cases: dict[str, Any] = {}
    for n in sizes:
        caches: dict[str, shmcache.Cache] = {}
        try:
            for label, huge_pages in (("shmcache", False), ("shmcache, huge pages", True)):
                name = f"bench-growth-{os.getpid()}" + "-huge" * huge_pages
                caches[label] = shmcache.create(name, max(64 << 20, n * 260), huge_pages=huge_pages)
            table = {}
            for i in range(n):
                for cache in caches.values():
                    cache.set(key(i), VALUE)
                table[key(i)] = bytes(bytearray(VALUE))

            def drawn(seed: int, n: int = n) -> list[bytes]:
                return [key(i) for i in random.Random(seed).choices(range(n), k=args.ops)]

            peers: list[Peer] = [("dict", table.get), *((label, cache.get) for label, cache in caches.items())]
            cases[f"get/keys={n}"] = of = summary(alternate(peers, drawn, args.rounds))
            for label, cache in caches.items():
                reader = [sys.executable, "-c", READER, cache.name, str(n)]
                attach, first, tables = map(float, subprocess.run(reader, capture_output=True, text=True, check=True).stdout.split())
                around = {"resident": len(cache), "attach_us": attach, "first_get_us": first, "page_tables_kb": tables}
                cases[f"reader, {label}/keys={n}"] = around
                ratio = of[label]["median_ns"] / of["dict"]["median_ns"]
                print(f"{n:,} items, {label}: get {of[label]['median_ns']} ns, {ratio:.2f} of dict;", around, flush=True)
        finally:
            for cache in caches.values():
                shmcache.unlink(cache.name)
                cache.close()
    keep(cases, [], args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
