"""What does a snapshot cost, and whom?

    python bench/snapshot.py [--json bench/results/snapshot.json] [--size 1G] [--folder DIR] [--rounds 7] [--quick]

unthrottled   beside two workers that get and set at 90/10 as fast as they can: the MB/s of a snapshot, over those of a bare process that
              does nothing but crc32 and write of one and the same MiB, an fsync every 64 MiB, for as many bytes; and the workers'
              operations/s beside the one over beside the other
throttled     one as the supervisor writes it, over none: the workers' operations/s, and the p99 of their batches of 16 gets; in windows
              of --seconds, 1 s after a snapshot has begun, which is stopped then
restore       items/s put into a fresh segment, alone, its creation and both readings of the file counted; the file is in the page cache

Rounds alternate; medians of 7, after one that is dropped. --size is of keys (22 bytes) and values (100; unthrottled also 1000). --folder
is where the snapshots go, on a disk if they are to be worth something: build/ of the repository, or else /tmp. Needs 3 times --size of
memory, and 1.3 times of disk.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import psutil
from harness import keep, key, options

import shmcache
from shmcache import errors
from shmcache.segment import parse_size
from shmcache.supervisor import datadir, snapshot

WORKERS = 2
BATCH = 16
SET_EVERY = 10  # batches: one of them is of sets
RING = 1 << 21  # batches of a worker that are remembered
MIB = 1 << 20
SETTLE = 1.0  # seconds, before a throttled window
KLEN = len(key(0))

fork = mp.get_context("fork")
Rounds = dict[str, list[float]]  # by peer


# ---- processes ----------------------------------------------------------------------------------------------------------------------


def default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Workers:
    """Two processes that get and set at 90/10, in batches, till the end of the block. They count what they have done as they go."""

    def __init__(self, name: str, n_keys: int, vlen: int, n_ops: int) -> None:
        self.batches = fork.RawArray("Q", WORKERS)  # of gets and sets
        self.reads = fork.RawArray("Q", WORKERS)  # of gets
        self.ns = [fork.RawArray("I", RING) for _ in range(WORKERS)]  # of the last batches of gets, by reads % RING
        args = (os.getpid(), name, n_keys, vlen, n_ops)
        self.children = [fork.Process(target=self.work, args=(i, *args), daemon=True) for i in range(WORKERS)]

    def work(self, i: int, parent: int, name: str, n_keys: int, vlen: int, n_ops: int) -> None:
        default_signals()
        cache, rng, value = shmcache.attach(name), random.Random(i), b"v" * vlen
        keys = [[key(rng.randrange(n_keys)) for _ in range(BATCH)] for _ in range(-(-n_ops // BATCH // SET_EVERY) * SET_EVERY)]
        get, put, clock, reads = cache.get, cache.set, time.perf_counter_ns, 0
        with memoryview(self.ns[i]).cast("B").cast("I") as ns:
            while os.getppid() == parent:
                for n, batch in enumerate(keys, 1):
                    if n % SET_EVERY:
                        start = clock()
                        for k in batch:
                            get(k)
                        ns[reads % RING] = clock() - start
                        reads += 1
                        self.reads[i] = reads
                    else:
                        for k in batch:
                            put(k, value)
                    self.batches[i] += 1

    def __enter__(self) -> Workers:
        for p in self.children:
            p.start()
        while not all(self.reads):
            self.check()
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        for p in self.children:
            p.kill()
            p.join()

    def check(self) -> None:
        if ended := [p.exitcode for p in self.children if p.exitcode is not None]:
            raise RuntimeError(f"a worker ended with {ended[0]}")

    def operations(self) -> int:
        return BATCH * sum(self.batches)

    def window(self, seconds: float) -> tuple[float, float]:
        """(operations/s of both, p99 of their batches of gets in us), from now on for so long."""
        began, operations, reads = time.perf_counter(), self.operations(), list(self.reads)
        time.sleep(seconds)
        rate = (self.operations() - operations) / (time.perf_counter() - began)
        parts = []
        for first, behind, ring in zip(reads, list(self.reads), self.ns, strict=True):
            if behind - first >= RING:
                raise RuntimeError(f"more than {RING} batches in a window: take fewer --seconds")
            parts.append(np.frombuffer(ring, np.uint32)[np.arange(first, behind) % RING])
        self.check()
        return rate, float(np.percentile(np.concatenate(parts), 99)) / 1000


@contextlib.contextmanager
def aside(work: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """A forked process that does work(connection, *args), and the other end of that connection."""
    mine, its = fork.Pipe()

    def child() -> None:
        default_signals()
        mine.close()
        work(its, *args)

    p = fork.Process(target=child, daemon=True)
    p.start()
    its.close()
    try:
        yield mine
        p.join()
    except EOFError:
        p.join()
        raise RuntimeError(f"the process of {work.__name__} ended with {p.exitcode}") from None
    finally:
        p.kill()
        p.join()
        mine.close()


# ---- what is measured ---------------------------------------------------------------------------------------------------------------


class Meter:
    """What happens from now on: bytes/s of this process, its share of a core, and the workers' operations/s meanwhile."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.began, self.used, self.operations = time.perf_counter(), time.process_time(), workers.operations()

    def read(self, n_bytes: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        return {
            "bytes": n_bytes, "MB/s": n_bytes / seconds / 1e6, "cores": (time.process_time() - self.used) / seconds,
            "workers": (self.workers.operations() - self.operations) / seconds,
        }  # fmt: skip


def write_snapshot(parent: Connection, workers: Workers, name: str, folder: Path) -> None:
    with shmcache.attach(name) as cache, datadir.take(folder) as path:
        snapshot.step_back(snapshot.NICE_UNTHROTTLED)  # as shmcache-admin snapshot --data-dir does
        meter = Meter(workers)
        parent.send(meter.read(snapshot.write(cache, path)["bytes"]))


def write_bare(parent: Connection, workers: Workers, n_bytes: int, folder: Path) -> None:
    piece = os.urandom(MIB)
    with memoryview(piece) as view, open(folder / "bare", "wb", buffering=0) as file:
        meter = Meter(workers)
        for at in range(0, n_bytes, MIB):
            with view[: n_bytes - at] as part:
                crc32(part)
                if file.write(part) != len(part):
                    raise OSError("a write was cut short")
            if (at + MIB) % snapshot.SYNC_BYTES == 0:
                os.fsync(file.fileno())
        os.fsync(file.fileno())
        parent.send(meter.read(n_bytes))


def write_throttled(parent: Connection, name: str, folder: Path) -> None:
    """As the supervisor does it; another snapshot if one is done. Says when the first block is written, then waits to be told to stop."""
    stop, begun, seen = threading.Event(), threading.Event(), {"stripes": 0, "snapshots": 0}

    def progress(stripe: int, n_stripes: int) -> None:
        seen["stripes"] = seen["snapshots"] * n_stripes + stripe
        seen["of"] = n_stripes
        begun.set()

    def write() -> float:
        snapshot.step_back(snapshot.NICE)
        began, used = time.perf_counter(), time.thread_time()
        try:
            with shmcache.attach(name) as cache, datadir.take(folder) as path, contextlib.suppress(errors.SnapshotStopped):
                while not stop.is_set():
                    snapshot.write(cache, path, keep=1, throttled=True, stop=stop, progress=progress)
                    seen["snapshots"] += 1
        finally:
            begun.set()
        seconds = time.perf_counter() - began
        seen["per_s"] = seen["stripes"] / seen["of"] / seconds
        return (time.thread_time() - used) / seconds

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write)
        begun.wait()
        parent.send("begun")
        parent.recv()
        stop.set()
        parent.send((written.result(), seen["per_s"]))


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def unthrottled(workers: Workers, name: str, folder: Path, rounds: int) -> tuple[dict[str, Rounds], int]:
    """(by figure, by peer, of each round), bytes of the file."""
    peers: dict[str, list[dict[str, float]]] = {"snapshot": [], "bare": []}
    n_bytes = 0
    for r in range(rounds + 1):
        for peer in peers:
            what = (write_snapshot, workers, name, folder) if peer == "snapshot" else (write_bare, workers, n_bytes, folder)
            with aside(*what) as child:
                got = child.recv()
            workers.check()
            empty(folder)
            n_bytes = int(got["bytes"])
            if r:
                peers[peer].append(got)
    return {figure: {peer: [got[figure] for got in of] for peer, of in peers.items()} for figure in ("MB/s", "workers", "cores")}, n_bytes


def throttled(workers: Workers, name: str, folder: Path, rounds: int, seconds: float) -> dict[str, Rounds]:
    figures: dict[str, Rounds] = {figure: {"snapshot": [], "none": []} for figure in ("workers", "p99")}
    figures.update({"cores": {"snapshot": []}, "snapshots/s": {"snapshot": []}})
    settle = min(SETTLE, seconds)
    for r in range(rounds + 1):
        time.sleep(settle)
        without = workers.window(seconds)
        with aside(write_throttled, name, folder) as child:
            child.recv()
            time.sleep(settle)
            beside = workers.window(seconds)
            child.send("stop")
            cores, per_s = child.recv()
        empty(folder)
        if r:
            for figure, a, b in zip(("workers", "p99"), beside, without, strict=True):
                figures[figure]["snapshot"].append(a)
                figures[figure]["none"].append(b)
            figures["cores"]["snapshot"].append(cores)
            figures["snapshots/s"]["snapshot"].append(per_s)
    return figures


def restore(name: str, folder: Path, n_items: int, rounds: int) -> list[float]:
    """Items/s of each round. The segment must not be there; nor is it afterwards."""
    rates = []
    with datadir.take(folder) as path:
        for r in range(rounds + 1):
            began = time.perf_counter()
            report = snapshot.restore(name, path)
            seconds = time.perf_counter() - began
            shmcache.unlink(name)
            if report["stored"] != n_items:
                raise RuntimeError(f"{report['stored']} of {n_items} items were restored")
            if r:
                rates.append(n_items / seconds)
    return rates


# ---- the segment, the folder, the figures -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def filled(name: str, n_items: int, vlen: int) -> Iterator[None]:
    """A segment with so many items, and room for those that are overwritten; unlinked at the end, whoever has made it anew."""
    try:
        with shmcache.create(name, int(n_items * (64 + KLEN + vlen) * 1.35) + 4 * MIB) as cache:
            value = b"v" * vlen
            for i in range(n_items):
                cache.set(key(i), value)
            if len(cache) != n_items:
                raise RuntimeError(f"{len(cache)} items of {n_items} have room")
        yield
    finally:
        with contextlib.suppress(errors.SegmentNotFound):
            shmcache.unlink(name)


@contextlib.contextmanager
def folder_in(where: str | None) -> Iterator[Path]:
    """A folder of our own there, removed at the end."""
    build = Path(__file__).resolve().parent.parent / "build"
    if where is None:
        try:
            build.mkdir(exist_ok=True)
            where = str(build) if os.access(build, os.W_OK) else "/tmp"
        except OSError:
            where = "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="bench-snapshot-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def file_system(folder: Path) -> str:
    over = [p for p in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(p.mountpoint)]
    mount = max(reversed(over), key=lambda p: len(p.mountpoint))  # the last one hides those before
    return f"{mount.fstype} on {mount.device}"


def others_seconds() -> float:
    """CPU seconds of this machine so far that neither this process nor its children that have ended took."""
    cpu, own = psutil.cpu_times(), os.times()
    return cpu.user + cpu.nice + cpu.system + cpu.softirq - (own.user + own.system + own.children_user + own.children_system)


def compare(what: str, rounds: Rounds, wanted: str, digits: int = 0) -> dict[str, Any]:
    """Print and return the medians of two peers, and the first over the second."""
    figures: dict[str, Any] = {}
    said = []
    for peer, values in rounds.items():
        figures[peer] = {
            "median": round(statistics.median(values), digits), "min": round(min(values), digits), "max": round(max(values), digits),
            "rounds": [round(v, digits) for v in values],
        }  # fmt: skip
        median, least, most = (f"{figures[peer][k]:,.{digits}f}" for k in ("median", "min", "max"))
        said.append(f"{peer} {median} ({least} to {most})")
    if len(rounds) == 2:
        ours, other = (statistics.median(values) for values in rounds.values())
        figures["ratio"] = round(ours / other, 3)
        said.append(f"ratio {ours / other:.2f}")
    if wanted:
        figures["wanted"] = wanted
        said.append(f"wanted {wanted}")
    print(f"  {what:24}", ", ".join(said), flush=True)
    return figures


def measure(name: str, folder: Path, vlen: int, size_bytes: int, args: Any, cases: dict[str, Any]) -> None:
    n_items = size_bytes // (KLEN + vlen)
    case = f"klen={KLEN}/vlen={vlen}"
    with filled(name, n_items, vlen):
        with Workers(name, n_items, vlen, args.ops) as workers:
            print(f"unthrottled/{case}, {n_items:,} items", flush=True)
            figures, n_bytes = unthrottled(workers, name, folder, args.rounds)
            cases[f"unthrottled/{case}"] = {
                "items": n_items, "file_bytes": n_bytes,
                "MB/s": compare("MB/s", figures["MB/s"], ">= 0.5"),
                "workers' operations/s": compare("workers' operations/s", figures["workers"], ">= 0.9"),
                "cores used": compare("cores used", figures["cores"], "", 2),
            }  # fmt: skip
            if vlen > 100:
                return
            print(f"throttled/{case}", flush=True)
            figures = throttled(workers, name, folder, args.rounds, args.seconds)
            megabytes = {"snapshot": [per_s * n_bytes / 1e6 for per_s in figures["snapshots/s"]["snapshot"]]}
            cases[f"throttled/{case}"] = {
                "items": n_items, "file_bytes": n_bytes, "seconds": args.seconds,
                "workers' operations/s": compare("workers' operations/s", figures["workers"], ">= 0.9"),
                "p99 of 16 gets, us": compare("p99 of 16 gets, us", figures["p99"], "<= 1.5", 2),
                "MB/s": compare("MB/s", megabytes, "", 1),
                "cores used": compare("cores used", figures["cores"], "", 3),
            }  # fmt: skip
        with shmcache.attach(name) as cache, datadir.take(folder) as path:
            snapshot.write(cache, path)
        shmcache.unlink(name)
        print(f"restore/{case}", flush=True)
        rates = restore(name, folder, n_items, args.rounds)
        empty(folder)
        cases[f"restore/{case}"] = {
            "items": n_items, "file_bytes": n_bytes, "items/s": compare("items/s", {"restore": rates}, ">= 1,000,000"),
        }  # fmt: skip


def main() -> int:
    parser = options(__doc__ or "")
    parser.add_argument("--size", default="1G", help="of keys and values")
    parser.add_argument("--folder", help="where snapshots are written, in a folder of their own that is removed")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each window beside a throttled snapshot")
    args = parser.parse_args()
    if args.quick:
        args.size, args.rounds, args.seconds = "16M", 3, 0.3
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    name = f"bench-snapshot-{os.getpid()}"
    cases: dict[str, Any] = {}
    began, others = time.perf_counter(), others_seconds()
    with folder_in(args.folder) as folder:
        notes = [f"snapshots were written to {file_system(folder)}", f"{args.size} of keys and values"]
        for note in notes:
            print("note:", note, flush=True)
        for vlen in (100, 1000):
            measure(name, folder, vlen, parse_size(args.size), args, cases)
    # the workers take all that there is: what others take is missing in the figures
    notes.append(f"everybody else on this machine used {(others_seconds() - others) / (time.perf_counter() - began):.2f} cores meanwhile")
    print("note:", notes[-1], flush=True)
    keep(cases, notes, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
