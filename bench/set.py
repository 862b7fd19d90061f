"""What does a set cost next to dict, py-lmdb and the same table in plain numpy?

    python bench/set.py [--json bench/results/set.json]

22-byte keys, 100-byte values, fresh key objects; one loop per peer and round, alternated, medians of 7. Overwrites draw from
100,000 keys that are there; inserts are of keys that are not, into a segment large enough, and into a full one (each set evicts).
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

from harness import Peer, alternate, fresh, options, report, summary

import shmcache

VALUE = b"v" * 100
counter = itertools.count()


def key(i: int) -> bytes:
    return b"key:%018d" % i


def new_keys(n: int) -> list[bytes]:
    return [key(1_000_000_000 + next(counter)) for _ in range(n)]


def setter(put: Callable[[bytes, bytes], Any]) -> Callable[[bytes], Any]:
    """The same frame for every peer, so that ratios are of the stores."""

    def one(k: bytes) -> None:
        put(k, VALUE)

    return one


def peers_for(n: int, capacity: int, notes: list[str]) -> tuple[list[Peer], list[Peer], list[Callable[[], Any]]]:
    name = f"bench-set-{os.getpid()}"
    cache = shmcache.create(name, size=capacity * 400)
    full = shmcache.create(name + "-full", size="16M")
    for i in range(200_000):
        full.set(key(i), VALUE)
    clean: list[Callable[[], Any]] = [cache.close, full.close, lambda: shmcache.unlink(name), lambda: shmcache.unlink(name + "-full")]
    table: dict[bytes, bytes] = {}
    peers: list[Peer] = [("dict", setter(table.__setitem__)), ("shmcache", setter(cache.set)), ("shmcache, full", setter(full.set))]
    slow: list[Peer] = []
    try:
        import lmdb
    except ImportError:
        notes.append("py-lmdb is not installed (pip install shmcache[bench]): left out")
    else:
        path = f"/dev/shm/bench-lmdb-{os.getpid()}"
        env = lmdb.open(path, map_size=capacity * 1000, sync=False, writemap=True)

        def per_call(k: bytes, v: bytes) -> None:
            with env.begin(write=True) as txn:
                txn.put(k, v)

        slow.append(("lmdb, one per call", setter(per_call)))
        clean += [env.close, lambda: shutil.rmtree(path)]
    from numpy_table import NumpyTable

    plain = NumpyTable(capacity)
    clean.append(plain.close)
    slow.append(("numpy + posix_ipc", setter(plain.set)))
    for _, put in peers + slow:
        for i in range(n):
            put(key(i))
    return peers, slow, clean


def main() -> int:
    args = options(__doc__ or "").parse_args()
    if args.quick:
        args.keys, args.ops, args.rounds = args.keys // 10, args.ops // 10, 3
    notes: list[str] = []
    cases: dict[str, dict[str, Any]] = {}
    few = max(1000, args.ops // 20)
    peers, slow, clean = peers_for(args.keys, args.keys + args.ops * (args.rounds + 1), notes)
    try:
        keys = [key(i) for i in range(args.keys)]
        over = alternate([p for p in peers if p[0] != "shmcache, full"], lambda seed: fresh(keys, args.ops, seed), args.rounds)
        over |= alternate(slow, lambda seed: fresh(keys, few, seed), args.rounds)
        cases[f"overwrite/keys={args.keys}/klen=22/vlen=100"] = summary(over)
        inserts = alternate(peers, lambda _: new_keys(args.ops), args.rounds)
        inserts |= alternate(slow, lambda _: new_keys(few), args.rounds)
        cases["insert/klen=22/vlen=100"] = summary(inserts)
    finally:
        for step in clean:
            step()
    report(cases, notes, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
