"""The main job on real input: worker processes replay requests against one shared segment, and every value is checked.

With --trace FILE the requests are a trace's (gzip CSV: time_s,key,key_size,value_size,op,ttl); without one the keys are the modules
of this Python's standard library, the values their source text, and their popularity is Zipf's with exponent 0.99. Each request is a
get, and on a miss a set. Requests are dealt to the workers by key; the workers go in step, a block of requests at a time, so that the
hit ratio can be held against exact LRU and FIFO over the same requests in order.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import multiprocessing as mp
import os
import random
import signal
import sys
import sysconfig
import time
from bisect import bisect_left
from itertools import accumulate
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from reference_policies import fifo_hits, lru_hits

import shmcache
from shmcache.errors import ShmcacheError

BLOCK = 5_000  # requests between two meetings of the workers
STDLIB_REQUESTS = 3_000_000
COLUMNS = ("key", "key_size", "value_size")


class BadInput(Exception):
    """Said in one line; exit code 2."""


class Trace:
    """Requests of a trace: sizes from the file, contents made from the key, so that every byte of a value can be checked."""

    def __init__(self, path: str) -> None:
        columns = self._read(path)
        self.ids = np.array(columns[0], dtype=np.uint32)
        self.n_keys = int(self.ids.max()) + 1
        self.key_size = np.zeros(self.n_keys, dtype=np.uint16)
        self.value_size = np.zeros(self.n_keys, dtype=np.uint32)
        self.key_size[self.ids] = columns[1]
        self.value_size[self.ids] = columns[2]
        self.pattern = random.Random(1).randbytes(65536 + int(self.value_size.max()))

    @staticmethod
    def _read(path: str) -> tuple[list[int], list[int], list[int]]:
        try:
            with gzip.open(path, "rt", newline="") as file:
                rows = csv.reader(file)
                header = next(rows, [])
                missing = [c for c in COLUMNS if c not in header]
                if missing:
                    raise BadInput(f"{path}: its header lacks {', '.join(missing)}")
                at = [header.index(c) for c in COLUMNS]
                table = [(int(r[at[0]]), int(r[at[1]]), int(r[at[2]])) for r in rows]
        except (OSError, EOFError, UnicodeDecodeError, gzip.zlib.error) as e:  # type: ignore[attr-defined]
            raise BadInput(f"{path}: {e}") from None
        except (ValueError, IndexError) as e:
            raise BadInput(f"{path}: a row is not numbers ({e})") from None
        if not table or min(min(r) for r in table) < 0:
            raise BadInput(f"{path}: it has no rows, or a negative number")
        keys, key_sizes, value_sizes = zip(*table, strict=True)
        return list(keys), list(key_sizes), list(value_sizes)

    def key(self, i: int) -> bytes:
        return b"%0*d" % (max(1, int(self.key_size[i])), i)  # longer than key_size if its digits need that

    def value(self, i: int) -> bytes:
        at = i * 2654435761 & 0xFFFF
        return self.pattern[at : at + int(self.value_size[i])]


class StandardLibrary:
    """Zipf 0.99 over the modules of the running Python's standard library."""

    def __init__(self) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        self.paths = [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts and p.stat().st_size]
        random.Random(1).shuffle(self.paths)
        self.n_keys = len(self.paths)
        self.root = root
        self.texts: dict[int, bytes] = {}
        weights = list(accumulate(1 / (i + 1) ** 0.99 for i in range(self.n_keys)))
        rng = random.Random(2)
        total = weights[-1]
        self.ids = np.fromiter((bisect_left(weights, rng.random() * total) for _ in range(STDLIB_REQUESTS)), np.uint32)

    def key(self, i: int) -> bytes:
        return str(self.paths[i].relative_to(self.root)).encode()

    def value(self, i: int) -> bytes:
        if i not in self.texts:
            self.texts[i] = self.paths[i].read_bytes()
        return self.texts[i]


def work(name: str, load: Any, me: int, procs: int, pipe: Connection) -> None:
    """A worker: for each block the parent names, its own share in order; answers (hits, wrong)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import psutil

    cache = shmcache.attach(name)
    get, put = cache.get, cache.set
    try:
        while (message := pipe.recv()) is not None:
            first, end = message
            ids = load.ids[first:end]
            hits = wrong = 0
            for i in ids[ids % procs == me].tolist():
                key = load.key(i)
                value = get(key)
                if value is None:
                    put(key, load.value(i))
                else:
                    hits += 1
                    wrong += value != load.value(i)
            pipe.send((hits, wrong))
        pipe.send(psutil.Process().memory_full_info().uss)
    except (EOFError, BrokenPipeError):  # the parent has gone
        return
    finally:
        cache.close()


class Replay:
    """The parent's side: starts the workers, leads them block by block, adds up."""

    def __init__(self, cache: shmcache.Cache, load: Any, procs: int) -> None:
        self.cache = cache
        self.load = load
        self.workers: list[BaseProcess] = []
        self.pipes: list[Connection] = []
        context = mp.get_context("fork")
        for i in range(procs):
            here, there = context.Pipe()
            p = context.Process(target=work, args=(cache.name, load, i, procs, there), daemon=True)
            p.start()
            there.close()
            self.workers.append(p)
            self.pipes.append(here)
        self.hits = self.wrong = self.rows = 0
        self.busy_s = 0.0
        self.resident: list[tuple[int, int]] = []

    def _answers(self) -> list[Any]:
        """One message of each worker. Raises: RuntimeError if one dies first."""
        got: dict[int, Any] = {}
        while len(got) < len(self.pipes):
            waiting: list[Any] = [p for i, p in enumerate(self.pipes) if i not in got]
            for ready in wait(waiting):
                i = self.pipes.index(ready)  # type: ignore[arg-type]
                try:
                    got[i] = self.pipes[i].recv()
                except (EOFError, ConnectionResetError):
                    self.workers[i].join()
                    raise RuntimeError(f"worker {self.workers[i].pid} ended with exit code {self.workers[i].exitcode}") from None
        return [got[i] for i in range(len(self.pipes))]

    def run(self, seconds: float | None, bar: Any) -> None:
        began = time.monotonic()
        total = len(self.load.ids)
        while self.rows < total and (seconds is None or time.monotonic() - began < seconds):
            end = min(self.rows + BLOCK, total)
            start = time.monotonic()
            for pipe in self.pipes:
                pipe.send((self.rows, end))
            for hits, wrong in self._answers():
                self.hits += hits
                self.wrong += wrong
            self.busy_s += time.monotonic() - start
            self.rows = end
            self.resident.append((end, len(self.cache)))
            bar(max(self.rows / total, (time.monotonic() - began) / seconds if seconds else 0))

    def finish(self) -> list[int]:
        """End the workers in good order; the private memory of each, in bytes."""
        for pipe in self.pipes:
            pipe.send(None)
        private = self._answers()
        for p in self.workers:
            p.join()
        return private

    def kill(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for p in self.workers:
            if p.is_alive():
                p.kill()
            p.join()

    def report(self, private: list[int]) -> dict[str, Any]:
        second_half = [n for row, n in self.resident if row > self.rows / 2]
        items = round(sum(second_half) / len(second_half))
        ids = self.load.ids[: self.rows].tolist()
        stats = self.cache.stats()
        ratio, lru, fifo = self.hits / self.rows, lru_hits(ids, items) / self.rows, fifo_hits(ids, items) / self.rows
        return {
            "requests": self.rows,
            "operations": self.rows * 2 - self.hits,
            "operations_per_s": round((self.rows * 2 - self.hits) / self.busy_s),
            "procs": len(self.workers),
            "resident_items": items,
            "hit_ratio": ratio,
            "lru_hit_ratio": lru,
            "fifo_hit_ratio": fifo,
            "points_above_lru": 100 * (ratio - lru),
            "points_above_fifo": 100 * (ratio - fifo),
            "wrong_values": self.wrong,
            "exit_codes": [p.exitcode for p in self.workers],
            **{k: stats[k] for k in ("evictions", "inline_evictions", "used_bytes", "size_bytes", "pages_moved")},
            "private_bytes": private,
            "verify": self.cache.verify(),
        }


def show(r: dict[str, Any]) -> None:
    mb = 1 / (1 << 20)
    print(f"requests          {r['requests']:>12,}   by {r['procs']} processes, {r['operations_per_s']:,} operations/s in all")
    print(f"hit ratio         {100 * r['hit_ratio']:>11.2f}%   with {r['resident_items']:,} resident items (mean of the second half)")
    print(f"  exact LRU       {100 * r['lru_hit_ratio']:>11.2f}%   {r['points_above_lru']:+.2f} points")
    print(f"  FIFO            {100 * r['fifo_hit_ratio']:>11.2f}%   {r['points_above_fifo']:+.2f} points")
    print(f"evictions         {r['evictions']:>12,}   of these by the writer that needed the room: {r['inline_evictions']:,}")
    print(f"segment           {r['used_bytes'] * mb:>9.1f} MB   in use of {r['size_bytes'] * mb:.1f} MB")
    print(f"private memory    {max(r['private_bytes']) * mb:>9.1f} MB   at most, of a worker")
    print(f"wrong values      {r['wrong_values']:>12,}")
    print(f"verify            {'whole' if not r['verify'] else r['verify'][:5]!s:>12}")


def progress(fraction: float) -> None:
    done = int(40 * min(1.0, fraction))
    sys.stderr.write(f"\r[{'#' * done}{'.' * (40 - done)}] {100 * min(1.0, fraction):3.0f} % ")
    sys.stderr.flush()


def run(args: argparse.Namespace) -> int:
    if args.procs < 1 or args.procs > 100 or (args.seconds is not None and args.seconds <= 0):
        raise BadInput("--procs is 1 to 100, --seconds is above 0")
    if args.seconds is None and not args.trace:
        args.seconds = 10.0
    load = Trace(args.trace) if args.trace else StandardLibrary()
    name = args.name or f"demo-{os.getpid()}"
    with shmcache.create(name, args.size) as cache:
        replay = supervisor = None
        try:
            supervisor = shmcache.supervise(name)
            replay = Replay(cache, load, args.procs)
            replay.run(args.seconds, progress if sys.stderr.isatty() else lambda _: None)
            private = replay.finish()
            report = replay.report(private)
        finally:
            if sys.stderr.isatty():
                sys.stderr.write("\r" + " " * 60 + "\r")
            if replay is not None:
                replay.kill()
            if supervisor is not None:
                supervisor.terminate()
                supervisor.wait()
            shmcache.unlink(name)
    print(json.dumps(report)) if args.json else show(report)
    return 0 if not (report["wrong_values"] or report["verify"] or any(report["exit_codes"])) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", help="gzip CSV of requests; without it the standard library's modules")
    parser.add_argument("--size", default="16M", help="of the segment (16M)")
    parser.add_argument("--procs", type=int, default=4, help="worker processes (4)")
    parser.add_argument("--seconds", type=float, help="at most; 10 without a trace, else the whole trace")
    parser.add_argument("--name", help="of the segment")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(args)
    except (BadInput, ShmcacheError) as e:
        print(f"demo: {e}", file=sys.stderr)
        return 2
    except RuntimeError as e:
        print(f"demo: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped; the segment and the workers are gone", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
