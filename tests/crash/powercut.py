"""Is what was acknowledged there after a power cut? One run is recorded, then cut at many instants.

    python -m tests.crash.powercut --cuts 300 [--policy always] [--seed 1] [--no-folder-sync]

Threads write numbered values (durable.state) while snapshots are written and files rotated; every open, write, rename, unlink and fsync
below the data directory is recorded, and with each acknowledged write how many of these had happened. A cut keeps a part of that record:
what was written and not synced is, sector by sector of 512 bytes, there, zero or missing, at a length between what was synced and what was
written; of directory changes since the last sync of the directory a part from the first on is there. What is left is restored and compared with
what had been acknowledged by then (everysec: 1.5 s before). With --no-folder-sync the directory is never synced, and the check must fail.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import shmcache
from shmcache.supervisor import appendlog, datadir, snapshot
from shmcache.supervisor import format as fmt
from tests.crash.durable import state

SECTOR = 512
KEYS = 40
THREADS = 2
SIZE = 400  # of a value, at most
LEAST, LONGEST = 300, 60  # acknowledged writes that are waited for; seconds


class Disk:
    """Records what happens below a folder, by standing in for the calls that make it happen."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.events: list[tuple[Any, ...]] = []
        self.files: dict[int, int] = {}  # descriptor -> number of the file; -1: the folder
        self.count = 0
        self.real = {name: getattr(os, name) for name in ("open", "rename", "unlink", "fsync", "close")}
        self.real_write_all = fmt._write_all

    def note(self, *event: Any) -> None:
        self.events.append(event)

    def opened(self, path: Any, fd: int, created: bool) -> int:
        if str(path) == self.folder:
            self.files[fd] = -1
        elif os.path.dirname(str(path)) == self.folder and created:
            self.count += 1
            self.files[fd] = self.count
            self.note("create", os.path.basename(str(path)), self.count)
        return fd

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        return self.opened(path, self.real["open"](path, flags, *args, **kwargs), bool(flags & os.O_CREAT))

    def open_file(self, path: Path) -> Any:
        file = open(path, "xb", buffering=0)  # noqa: SIM115
        self.opened(path, file.fileno(), True)
        return file

    def rename(self, a: Any, b: Any) -> None:
        self.real["rename"](a, b)
        self.note("rename", os.path.basename(a), os.path.basename(b))

    def unlink(self, path: Any, **kwargs: Any) -> None:
        self.real["unlink"](path, **kwargs)
        if os.path.dirname(str(path)) == self.folder:
            self.note("unlink", os.path.basename(str(path)))

    def fsync(self, fd: int) -> None:
        number = self.files.get(fd)
        self.real["fsync"](fd)
        if number is not None:
            self.note("sync folder") if number < 0 else self.note("sync", number)

    def write_all(self, file: Any, buffer: Any) -> int:
        data = bytes(buffer)
        written = self.real_write_all(file, buffer)
        number = self.files.get(file.fileno())
        if number is not None:
            self.note("write", number, data)
        return written

    def __enter__(self) -> Disk:
        for name in ("open", "rename", "unlink", "fsync"):
            setattr(os, name, getattr(self, name))
        fmt._write_all = self.write_all
        return self

    def __exit__(self, *exc: object) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)
        fmt._write_all = self.real_write_all

    def after_cut(self, n: int, to: Path, rng: random.Random) -> None:
        """Make in `to` what a power cut behind the first n events may leave."""
        content: dict[int, bytearray] = {}
        synced: dict[int, int] = {}
        names: dict[str, int] = {}
        pending: list[tuple[Any, ...]] = []

        def change(event: tuple[Any, ...]) -> None:
            if event[0] == "create":
                names[event[1]] = event[2]
            elif event[0] == "rename":
                names[event[2]] = names.pop(event[1])
            else:
                names.pop(event[1], None)

        for event in self.events[:n]:
            if event[0] == "write":
                content.setdefault(event[1], bytearray()).extend(event[2])
            elif event[0] == "sync":
                synced[event[1]] = len(content.get(event[1], b""))
            elif event[0] == "sync folder":
                for e in pending:
                    change(e)
                pending = []
            else:
                pending.append(event)
        for e in pending[: rng.randrange(len(pending) + 1)]:
            change(e)
        for name, number in names.items():
            data, safe = content.get(number, bytearray()), synced.get(number, 0)
            left = bytearray(data[: rng.randint(safe, len(data))])
            at = safe
            while at < len(left):
                end = min((at // SECTOR + 1) * SECTOR, len(left))
                if rng.random() < 0.5:
                    left[at:end] = bytes(end - at)
                at = end
            (to / name).write_bytes(left)


def record(name: str, folder: Path, policy: str, seconds: float, seed: int) -> tuple[Disk, list[tuple[int, float, int, int]], list[int]]:
    """(disk, acknowledged: (events by then, time, key, number), begun)."""
    acknowledged: list[tuple[int, float, int, int]] = []
    begun = [0] * (KEYS * THREADS)
    cache = shmcache.create(name, "16M", max_processes=4, log_buffer="64K")
    began = time.monotonic()

    def over() -> bool:
        passed = time.monotonic() - began
        return passed >= (seconds if len(acknowledged) >= LEAST else seconds + LONGEST)

    def write(t: int) -> None:
        rng = random.Random(seed + t)
        while not over():
            k = t * KEYS + rng.randrange(KEYS)
            n = begun[k] = begun[k] + 1
            value = state(n, SIZE)
            if value is None:
                cache.delete(b"key:%d" % k)
            else:
                cache.set(b"key:%d" % k, value)
            acknowledged.append((len(disk.events), time.monotonic(), k, n))
            if policy != "always":
                time.sleep(0.0005)  # the point is the time between syncs, not their number

    with Disk(folder) as disk:
        log = appendlog.AppendLog(cache, folder, policy, open_file=disk.open_file)
        threads = [threading.Thread(target=write, args=(t,)) for t in range(THREADS)]
        for t in threads:
            t.start()
        rng = random.Random(seed)
        while not over():
            if rng.random() < 0.3:
                log.rotate()
            else:
                snapshot.write(cache, folder, log=log)
        for t in threads:
            t.join()
        log.close()
    shmcache.unlink(name)
    cache.close()
    return disk, acknowledged, begun


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--policy", choices=("always", "everysec"), default="always")
    parser.add_argument("--seconds", type=float, help="that are recorded, at least (1; everysec: 4)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-folder-sync", action="store_true", help="a flaw that is to be found")
    args = parser.parse_args(argv)
    args.seconds = args.seconds or (1.0 if args.policy == "always" else 4.0)
    if args.no_folder_sync:
        datadir.sync_folder = lambda folder: None
    name, work = f"powercut-{os.getpid()}", Path(tempfile.mkdtemp(prefix="powercut-"))
    rng = random.Random(args.seed)
    report = {"cuts": 0, "wrong": 0, "refused": 0, "empty": 0, "events": 0, "acknowledged": 0, "with_snapshot": 0, "torn": 0}
    try:
        with datadir.take(work / "data") as folder:
            disk, acknowledged, begun = record(name, folder, args.policy, args.seconds, args.seed)
        report["events"], report["acknowledged"] = len(disk.events), len(acknowledged)
        for i in range(args.cuts):
            n = rng.randrange(len(disk.events) + 1)
            promised = dict.fromkeys(range(len(begun)), 0)
            cut_at = max((at for events, at, _, _ in acknowledged if events <= n), default=0.0)
            for events, at, k, number in acknowledged:
                if events <= n and (args.policy == "always" or at <= cut_at - 1.5):
                    promised[k] = max(promised[k], number)
            left = work / f"cut{i}"
            with datadir.take(left) as folder:
                disk.after_cut(n, folder, rng)
                wrong = compare(name, folder, promised, begun, report)
            for line in wrong[:3]:
                print(f"cut {i} behind event {n}: {line}", flush=True)
            report["cuts"] += 1
            report["wrong"] += len(wrong)
            shutil.rmtree(left)
    finally:
        shutil.rmtree(work)
    print(json.dumps(report))
    return 1 if report["wrong"] else 0


def compare(name: str, folder: Path, promised: dict[int, int], begun: list[int], report: dict[str, int]) -> list[str]:
    try:
        restored = snapshot.restore(name, folder)
    except shmcache.ShmcacheError as e:
        if any(promised.values()):
            report["refused"] += 1
            return [f"nothing could be restored: {e}"]
        report["empty"] += 1
        return []
    report["with_snapshot"] += restored["snapshot"] is not None
    report["torn"] += len(restored["cut"])
    wrong = []
    with shmcache.attach(name) as cache:
        for k, n in promised.items():
            got = cache.get(b"key:%d" % k)
            if not any(got == state(m, SIZE) for m in range(n, begun[k] + 1)):
                wrong.append(f"key {k} is {got!r:.20}; promised {n}, begun {begun[k]}")
        wrong += cache.verify()
    shmcache.unlink(name)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
