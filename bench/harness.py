"""What every bench shares: peers alternated in one run, medians, ratios, and where it was measured."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Peer = tuple[str, Callable[[Any], Any]]  # name, operation
ROUNDS = 7
VALUE = b"v" * 100


def key(i: int) -> bytes:
    """The i-th key: 22 bytes."""
    return b"key:%018d" % i


def fresh(keys: Sequence[bytes], n: int, seed: int) -> list[bytes]:
    """n keys drawn uniformly, each a new object: no cached hash, no `is`, no warm line but the table's own."""
    rng = random.Random(seed)
    return [bytes(bytearray(k)) for k in rng.choices(keys, k=n)]


def loop_ns(operation: Callable[[Any], Any], arguments: Sequence[Any], clock: Callable[[], int] = time.perf_counter_ns) -> float:
    """ns per call of one `for a in arguments: operation(a)`, the collector off."""
    gc.collect()
    gc.disable()
    try:
        began = clock()
        for a in arguments:
            operation(a)
        return (clock() - began) / len(arguments)
    finally:
        gc.enable()


def alternate(peers: Sequence[Peer], arguments: Callable[[int], Sequence[Any]], rounds: int) -> dict[str, list[float]]:
    """ns per call of each peer in each round: A, B, C, A, B, C ... One round more is run first and dropped.

    arguments(seed) is made anew for each peer in each round, outside the timed part, with the round's seed.
    """
    times: dict[str, list[float]] = {name: [] for name, _ in peers}
    for r in range(rounds + 1):
        for name, operation in peers:
            ns = loop_ns(operation, arguments(r))
            if r:
                times[name].append(ns)
    return times


def summary(times: dict[str, list[float]], ours: str = "shmcache") -> dict[str, Any]:
    """By peer: every round, median, least, most, and the median of ours over the median of the peer."""
    own = statistics.median(times[ours])
    return {
        name: {
            "ns": [round(x, 1) for x in rounds],
            "median_ns": round(statistics.median(rounds), 1),
            "min_ns": round(min(rounds), 1),
            "max_ns": round(max(rounds), 1),
            "ours_over_it": round(own / statistics.median(rounds), 3),
        }
        for name, rounds in times.items()
    }


def environment() -> dict[str, Any]:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
        return done.stdout.strip()

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    versions = {}
    for package in ("shmcache", "numpy", "lmdb", "posix_ipc", "msgpack"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
    }


def options(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--ops", type=int, default=200_000, help="per peer and round")
    parser.add_argument("--quick", action="store_true", help="a tenth of the keys, three rounds: to see that it runs")
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    return parser


def report(cases: dict[str, dict[str, Any]], notes: list[str], path: str | None) -> None:
    for case, peers in cases.items():
        print(case)
        for name, s in peers.items():
            span = f"({s['min_ns']:.1f} to {s['max_ns']:.1f})"
            print(f"  {name:24} {s['median_ns']:10.1f} ns   {span:24} ours is {s['ours_over_it']:.2f} of it")
    for note in notes:
        print("note:", note)
    keep(cases, notes, path)


def keep(cases: dict[str, Any], notes: list[str], path: str | None) -> None:
    """Write the figures, with where they were measured, to path if there is one."""
    if path:
        Path(path).write_text(json.dumps({"environment": environment(), "cases": cases, "notes": notes}, indent=1) + "\n")
        print("figures in", path, file=sys.stderr)
