"""How many items does 1 GiB hold, beside memcached, Redis and LMDB given the same?

    python bench/memory.py [--size 1024] [--sizes-from TRACE.csv.gz] [--json bench/results/memory.json]

Distinct items of 22 + 100 bytes (or of the sizes of a cache trace's keys: columns key,key_size,value_size) are stored till well past
what fits; then what is resident is counted. Bytes per item = the whole limit / items, so everything is counted that each counts
against its limit: buckets, locks and rows of ours; of memcached `-m` not its hash table; of Redis `maxmemory`. LMDB has no eviction: it
is filled till its map is full.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from harness import keep, options
from peers import program, serve

import shmcache

Items = Iterator[tuple[bytes, bytes]]


def constant() -> Items:
    value = b"v" * 100
    return ((b"key:%018d" % i, value) for i in itertools.count())


def of_trace(path: str, most_bytes: int) -> Callable[[], Items]:
    """Distinct keys with sizes as in the trace; after its last key, its sizes again for new keys."""
    sizes: dict[str, tuple[int, int]] = {}
    with gzip.open(path, "rt") as lines:
        for line in csv.DictReader(lines):
            sizes.setdefault(line["key"], (int(line["key_size"]), int(line["value_size"])))
    content = bytes(most_bytes)

    def items() -> Items:
        number = 0
        while True:
            for klen, vlen in sizes.values():
                number += 1
                yield (b"%d:" % number).ljust(min(klen, 250), b"k"), content[: min(vlen, most_bytes)]

    return items


def fill_ours(size: int, items: Items, n: int) -> int:
    name = f"bench-memory-{os.getpid()}"
    cache = shmcache.create(name, size)
    try:
        for k, v in itertools.islice(items, n):
            cache.set(k, v)
        return len(cache)
    finally:
        cache.close()
        shmcache.unlink(name)


def pour(connection: socket.socket, messages: Iterator[bytes], answers: bool) -> None:
    """Send messages in large pieces; where each is answered, read as many lines as were sent before the next piece."""
    while piece := list(itertools.islice(messages, 5000)):
        connection.sendall(b"".join(piece))
        lines = 0
        while answers and lines < len(piece):
            lines += connection.recv(1 << 16).count(b"\n")


def connected(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return connection


def ask(connection: socket.socket, question: bytes, end: bytes) -> bytes:
    connection.sendall(question)
    answer = b""
    while not answer.endswith(end):
        answer += connection.recv(1 << 16)
    return answer


def fill_memcached(size: int, items: Items, n: int) -> int:
    path = tempfile.mkdtemp(prefix="bench-memcached-") + "/s"
    argv = [program("memcached"), "-s", path, "-m", str(size >> 20), "-u", "root"]
    stop = serve(argv, path, lambda: connected(path).close())
    try:
        with connected(path) as connection:
            messages = (b"set %b 0 0 %d noreply\r\n%b\r\n" % (k, len(v), v) for k, v in itertools.islice(items, n))
            pour(connection, messages, False)
            answer = ask(connection, b"stats\r\n", b"END\r\n")
        return next(int(line.split()[2]) for line in answer.splitlines() if line.startswith(b"STAT curr_items "))
    finally:
        stop()


def fill_redis(size: int, items: Items, n: int) -> int:
    folder = tempfile.mkdtemp(prefix="bench-redis-")
    path = folder + "/s"
    argv = [program("redis-server"), "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no", "--dir", folder,
            "--maxmemory", str(size), "--maxmemory-policy", "allkeys-lru"]  # fmt: skip
    stop = serve(argv, path, lambda: connected(path).close())
    try:
        with connected(path) as connection:
            form = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n"
            pour(connection, (form % (len(k), k, len(v), v) for k, v in itertools.islice(items, n)), True)
            return int(ask(connection, b"DBSIZE\r\n", b"\r\n")[1:])
    finally:
        stop()


def fill_lmdb(size: int, items: Items, n: int) -> int:
    import lmdb

    path = tempfile.mkdtemp(prefix="bench-lmdb-", dir="/dev/shm")
    try:
        env = lmdb.open(path, map_size=size, sync=False, writemap=True)
        while piece := list(itertools.islice(items, 5000)):
            try:
                with env.begin(write=True) as txn, txn.cursor() as cursor:
                    cursor.putmulti(piece)
            except lmdb.MapFullError:
                break
        n_items = int(env.stat()["entries"])
        env.close()
        return n_items
    finally:
        shutil.rmtree(path)


FILL = {"shmcache": fill_ours, "memcached": fill_memcached, "Redis": fill_redis, "LMDB": fill_lmdb}


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--size", type=int, default=1024, help="MiB that each is given (1024)")
    parser.add_argument("--sizes-from", metavar="TRACE")
    args = parser.parse_args()
    size = (64 if args.quick else args.size) << 20
    notes: list[str] = []
    cases: dict[str, Any] = {}
    kinds: dict[str, Callable[[], Items]] = {"klen=22/vlen=100": constant}
    if args.sizes_from:
        kinds[f"sizes of {os.path.basename(args.sizes_from)}"] = of_trace(args.sizes_from, 500_000)
    for kind, made in kinds.items():
        n, sample, in_sample = 0, 0, 100_000
        for k, v in itertools.islice(made(), in_sample):
            sample += len(k) + len(v)
        n = int(1.3 * size / (sample / in_sample + 48))  # well past what fits anybody
        for peer, fill in FILL.items():
            try:
                items = fill(size, made(), n)
            except ImportError as e:
                notes.append(f"{peer} is left out: {e}")
                continue
            of = {"items": items, "bytes_per_item": round(size / items, 1), "overhead": round(size / items - sample / in_sample, 1)}
            cases.setdefault(f"{kind}/size={size >> 20}M", {})[peer] = of
            print(f"{kind}  {peer:10} {of}", flush=True)
    keep(cases, notes, args.json)
    for note in notes:
        print("note:", note)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
