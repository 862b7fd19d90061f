"""Does a rotten or cut file ever restore a value that was never there?

    python -m tests.crash.rot --flips 10000         every truncation of a small snapshot and log, then so many flips of random bits in both

Each time the directory is restored: an error that names the place, or every key has a value that it had at some time (a flip in a log's last
block cannot be told from a torn write: that block is cut).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import shmcache
from shmcache import errors
from shmcache.supervisor import appendlog, datadir, snapshot
from shmcache.supervisor import format as fmt


def make(name: str, folder: Path) -> dict[bytes, set[bytes | None]]:
    """A snapshot and a log; by key the values that it had, None: none."""
    rng = random.Random(1)
    had: dict[bytes, set[bytes | None]] = {b"k%d" % i: {None} for i in range(12)}
    cache = shmcache.create(name, "4M", max_processes=4, stripes=16, log_buffer="64K")
    log = appendlog.AppendLog(cache, folder, "always")
    for turn in range(3):
        for _ in range(12):
            key = rng.choice(list(had))
            if rng.random() < 0.2:
                cache.delete(key)
            else:
                value = rng.randbytes(rng.randrange(20))
                cache.set(key, value)
                had[key].add(value)
        if turn == 0:
            snapshot.write(cache, folder, log=log)
    log.close()
    shmcache.unlink(name)
    cache.close()
    return had


def look(name: str, folder: Path, had: dict[bytes, set[bytes | None]], report: dict[str, int]) -> list[str]:
    try:
        snapshot.restore(name, folder)
    except (errors.DamagedFile, errors.NoSnapshot, errors.NewerFormat, errors.ForeignDataDir) as e:
        report[type(e).__name__] = report.get(type(e).__name__, 0) + 1
        if isinstance(e, errors.NoSnapshot):
            try:
                shmcache.unlink(name)
            except shmcache.SegmentNotFound:
                pass
        return []
    with shmcache.attach(name) as cache:
        wrong = [f"{k!r} is {cache.get(k)!r}" for k in had if cache.get(k) not in had[k]]
        wrong += [f"{k!r} was never there" for k in cache.scan() if k not in had]
    shmcache.unlink(name)
    report["restored"] += 1
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    name, work = f"rot-{os.getpid()}", Path(tempfile.mkdtemp(prefix="rot-"))
    report = {"truncations": 0, "flips": 0, "wrong": 0, "restored": 0}
    rng = random.Random(args.seed)
    try:
        with datadir.take(work / "data") as folder:
            had = make(name, folder)
            snapshots, logs = fmt.listing(folder)
            files = [path for _, path in (*snapshots, *logs)]
            for path in files:
                whole = path.read_bytes()
                for n in range(len(whole)):
                    path.write_bytes(whole[:n])
                    report["wrong"] += len(look(name, folder, had, report))
                    report["truncations"] += 1
                path.write_bytes(whole)
            for _ in range(args.flips):
                path = rng.choice(files)
                whole = path.read_bytes()
                flipped = bytearray(whole)
                flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
                path.write_bytes(flipped)
                wrong = look(name, folder, had, report)
                for line in wrong[:2]:
                    print(f"{path.name}: {line}", flush=True)
                report["wrong"] += len(wrong)
                report["flips"] += 1
                path.write_bytes(whole)
            assert look(name, folder, had, report) == []
    finally:
        shutil.rmtree(work)
    print(json.dumps(report))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
