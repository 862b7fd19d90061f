"""What does a get cost next to dict, py-lmdb and the same table in plain numpy?

    python bench/get.py [--large] [--json bench/results/get.json]

22-byte keys, 100-byte values; keys drawn uniformly into a list of fresh bytes objects; one `for k in seq: f(k)` loop; peers alternated,
medians of 7 rounds. Beside 100,000 keys: one hot key (fresh objects, and one object whose hash dict finds cached), misses, and with
--large 10 million keys.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from harness import Peer, alternate, fresh, options, report, summary

import shmcache

VALUE = b"v" * 100


def key(i: int) -> bytes:
    return b"key:%018d" % i


def fill(n: int, with_numpy: bool, notes: list[str]) -> tuple[list[Peer], list[Peer], list[Callable[[], Any]]]:
    """Peers that all hold the same n keys; those of the second list are slow, and given fewer calls; and how to clean up."""
    name = f"bench-get-{os.getpid()}"
    cache = shmcache.create(name, size=max(64 << 20, n * 400))
    clean: list[Callable[[], Any]] = [cache.close, lambda: shmcache.unlink(name)]
    table: dict[bytes, bytes] = {}
    for i in range(n):
        cache.set(key(i), VALUE)
        table[key(i)] = bytes(bytearray(VALUE))
    peers: list[Peer] = [("dict", table.get), ("shmcache", cache.get)]
    slow: list[Peer] = []
    try:
        import lmdb
    except ImportError:
        notes.append("py-lmdb is not installed (pip install shmcache[bench]): left out")
    else:
        path = f"/dev/shm/bench-lmdb-{os.getpid()}"
        env = lmdb.open(path, map_size=max(256 << 20, n * 600), sync=False, writemap=True)
        with env.begin(write=True) as txn:
            for k in sorted(table):
                txn.put(k, VALUE)
        reading = env.begin()
        peers.append(("lmdb, transaction held", reading.get))

        def per_call(k: bytes) -> bytes | None:
            with env.begin() as txn:
                return txn.get(k)

        peers.append(("lmdb, one per call", per_call))
        clean += [reading.abort, env.close, lambda: shutil.rmtree(path)]
    if with_numpy:
        from numpy_table import NumpyTable

        plain = NumpyTable(n)
        clean.append(plain.close)
        for i in range(n):
            plain.set(key(i), VALUE)
        slow.append(("numpy + posix_ipc", plain.get))
    else:
        notes.append(f"numpy + posix_ipc is left out at {n:,} keys: filling it takes minutes")
    return peers, slow, clean


def measure(peers: list[Peer], slow: list[Peer], keys: Sequence[bytes], ops: int, rounds: int) -> dict[str, Any]:
    times = alternate(peers, lambda seed: fresh(keys, ops, seed), rounds)
    times |= alternate(slow, lambda seed: fresh(keys, max(1000, ops // 20), seed), rounds)
    return summary(times)


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--large", action="store_true", help="10 million keys, too: needs 10 GB")
    args = parser.parse_args()
    if args.quick:
        args.keys, args.ops, args.rounds = args.keys // 10, args.ops // 10, 3
    cases: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for n in [args.keys] + ([10_000_000] if args.large else []):
        peers, slow, clean = fill(n, n <= 200_000, notes)
        try:
            keys = [key(i) for i in range(n)]
            cases[f"get/keys={n}/klen=22/vlen=100"] = measure(peers, slow, keys, args.ops, args.rounds)
            if n == args.keys:
                cases["get/keys=1/klen=22/vlen=100"] = measure(peers, slow, keys[:1], args.ops, args.rounds)
                same = keys[:1] * args.ops
                cases["get/keys=1/same object"] = summary(alternate(peers, lambda _, same=same: same, args.rounds))
                absent = [key(i) for i in range(n, 2 * n)]
                cases[f"miss/keys={n}/klen=22"] = measure(peers, slow, absent, args.ops, args.rounds)
        finally:
            for step in clean:
                step()
    report(cases, notes, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
