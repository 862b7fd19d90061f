"""Rotten bytes: flips and random runs anywhere in a live segment, while a child goes on working in it.

    python -m tests.crash.fuzz --ops 1000000 --seed 1

The child keeps what each of its keys may hold (it is the only writer); this process damages the shared bytes as the child works, so many bytes each round, and
begins a new segment every round, verifying and repairing the old one first. Never may there be a crash, a call that does not end, or an
access outside the segment; a wrong value only for a key whose own item was hit (values carry no checksum). The report counts, by the
section that was hit, how often, and what operations then said: value, miss, DamageError, other errors, wrong.
"""

from __future__ import annotations

import argparse
import collections
import json
import mmap
import os
import random
import signal
import sys
import time
from typing import Any

import numpy as np

import shmcache
from shmcache import errors
from shmcache.core import _sweep

SECTIONS = ("header", "rows", "stripes", "databases", "classes", "pages", "refs", "buckets", "overflow", "items", "free chunks", "big pages",
            "heads")  # fmt: skip
ADDRESS = (1 << 48) - 1
STUCK = 30.0  # seconds without progress


def value_of(key: int, version: int, size: int) -> bytes:
    """Any 8 aligned bytes of it say whose it is."""
    word = (key << 32 | version).to_bytes(8, "little")
    return (word * (size // 8 + 1))[:size]


class Child:
    """The worker: each key has one right value, or none."""

    def __init__(self, name: str, seed: int, progress: Any) -> None:
        self.cache = shmcache.attach(name)
        self.cache.lock_limit = 0.05
        self.rng = random.Random(seed)
        self.held: dict[int, tuple[int, int]] = {}
        self.progress = progress
        self.said: collections.Counter[str] = collections.Counter()
        self.wrong: list[int] = []

    def check(self, key: int, value: Any) -> str:
        if value is None:
            return "miss"
        if key in self.held and value == value_of(key, *self.held[key]):
            return "value"
        self.wrong.append(key)
        return "wrong"

    def step(self) -> str:
        rng, cache = self.rng, self.cache
        key = rng.randrange(3000)
        name = b"key:%d" % key
        op = rng.random()
        if op < 0.5:
            return self.check(key, cache.get(name))
        if op < 0.85:
            size = rng.choice((20, 60, 200, 700, 3000)) if rng.random() < 0.985 else rng.choice((100_000, 200_000))
            version = self.held.get(key, (0, 0))[0] + 1
            previous = self.held.pop(key, None)
            try:
                cache.set(name, value_of(key, version, size), None, (f"t{key % 20}",) if key % 4 == 0 else None)
            except errors.CapacityError:
                if previous:
                    self.held[key] = previous
                raise
            self.held[key] = (version, size)
            return "stored"
        if op < 0.93:
            cache.delete(name)
            self.held.pop(key, None)
            return "deleted"
        if op < 0.95:
            number = b"n:%d" % (key % 50)
            cache.incr(number, 1, default=0)
            return "counted"
        if op < 0.97:
            cache.touch(name, 1000)
            return "touched"
        if op < 0.975:
            version = cache.claim(b"c:%d" % key, 10.0)
            if version > 0:
                cache.unclaim(b"c:%d" % key, version)
            return "claimed"
        if op < 0.9755:
            sum(1 for _ in cache.scan())
            return "scanned"
        return self.check(key, cache.get(name))

    def run(self, ops: int, hits: int) -> None:
        for i in range(ops):
            try:
                said = self.step()
            except errors.DamageError:
                said = "DamageError"
            except errors.ShmcacheError as e:
                said = type(e).__name__
            except (KeyError, ValueError, TypeError) as e:  # a damaged counter or codec
                said = type(e).__name__
            self.said[said] += 1
            self.progress[0] = i + 1
            while self.progress[1] < i * hits // ops - 2:  # as many damages as operations ask for
                pass


def places(cache: shmcache.Cache, section: str, rng: random.Random) -> tuple[int, int]:
    """(offset, length) of one part of a section of the segment, in which bytes are to be hit."""
    seg = cache.segment
    h = seg.header
    if section == "header":
        return (216, 4096 - 216) if rng.random() < 0.5 else (0, 4096)
    by_name = {"rows": (seg.rows, "rows_off"), "stripes": (seg.stripes, "stripes_off"), "databases": (seg.databases, "databases_off"),
               "classes": (seg.classes, "classes_off"), "pages": (seg.pages, "pages_off"), "refs": (seg.refs, "refs_off"), "buckets": (seg.buckets, "buckets_off"), "overflow": (seg.overflow, "overflow_off")}  # fmt: skip
    if section in by_name:
        array, off = by_name[section]
        i = rng.randrange(len(array)) if section not in ("rows", "stripes", "pages") else rng.randrange(min(len(array), 64))
        return int(h[off]) + i * array.itemsize, array.itemsize
    slab, page_bytes = int(h["slab_off"]), 1 << int(h["page_shift"])
    words = seg.pages["word"] >> 56
    if section == "big pages":
        big = np.flatnonzero(words == 4)
        return (slab + int(rng.choice(big)) * page_bytes, page_bytes) if len(big) else (0, 0)
    for _ in range(200):
        page = rng.randrange(len(words))
        cls = int(seg.pages["cls"][page])
        if words[page] != 2 or cls >= len(seg.classes):
            continue
        chunk = int(seg.classes["chunk_bytes"][cls])
        if chunk < 128:
            continue
        at = slab + page * page_bytes + rng.randrange(page_bytes // chunk) * chunk
        kind = int(seg.bytes[at + 15])
        if section == "free chunks" and kind == 2:
            continue
        if section != "free chunks" and kind != 2:
            continue
        return at, 48 if section == "heads" else chunk
    return 0, 0


def key_at(cache: shmcache.Cache, view: np.ndarray, section: str, at: int) -> set[int]:
    """The key whose item stands here, or (big pages) lists this page."""
    if section == "big pages":
        page = (at - int(cache.segment.header["slab_off"])) >> int(cache.segment.header["page_shift"])
        at = int(cache.segment.pages["head"][page]) * 16
    if at + 64 > len(view):
        return set()
    key = bytes(view[at + 48 : at + 60])
    digits = key[4:].split(b"\0")[0][:4]
    return {int(digits[:n]) for n in range(1, len(digits) + 1) if digits[:n].isdigit()} if key.startswith(b"key:") else set()


def damage(cache: shmcache.Cache, view: np.ndarray, section: str, rng: random.Random) -> set[int]:
    """One flip or one random run: the keys whose item was hit."""
    at, length = places(cache, section, rng)
    if length == 0:
        return {-1}  # there is none just now
    slab = section in ("items", "heads", "free chunks", "big pages")
    own = key_at(cache, view, section, at) if slab else set()
    hit(view, at, length, rng)
    return own | key_at(cache, view, section, at) if slab else set()


def hit(view: np.ndarray, at: int, length: int, rng: random.Random) -> None:
    if rng.random() < 0.6:
        i = at + rng.randrange(length)
        view[i] ^= 1 << rng.randrange(8)
        return
    n = min(length, rng.choice((2, 4, 8, 8, 16, 64)))
    i = at + rng.randrange((length - n) // n + 1) * n
    view[i : i + n] = np.frombuffer(rng.randbytes(n) if rng.random() < 0.7 else bytes(n), np.uint8)


def round_(seed: int, ops: int, hits_wanted: int, report: dict[str, Any]) -> None:
    rng = random.Random(seed)
    name = f"fuzz-{os.getpid()}"
    progress = mmap.mmap(-1, 16)
    counter = memoryview(progress).cast("q")
    cache = shmcache.create(name, "4M", stripes=16, max_processes=8)
    section = SECTIONS[seed % len(SECTIONS)]
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(r)
        child = Child(name, seed, counter)
        child.run(ops, hits_wanted)
        with open(w, "w") as out:
            json.dump({"said": child.said, "wrong": child.wrong}, out)
        os._exit(0)
    os.close(w)
    view = cache.views(writable=True).bytes
    own: set[int] = set()  # keys whose item was hit
    n = missed = 0
    last, since = -1, time.monotonic()
    while True:
        done = counter[0]
        if done >= ops or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        if done != last:
            last, since = done, time.monotonic()
        elif time.monotonic() - since > STUCK:
            report["hangs"].append(f"round {seed}, {section}: no operation ended for {STUCK:.0f} s")
            os.kill(pid, signal.SIGABRT)
            break
        if n < hits_wanted * done / ops + 1:
            keys = damage(cache, view, section, rng)
            own |= keys
            missed += -1 in keys
            n += 1
            counter[1] = n
    with open(r) as f:
        text = f.read()
    status = os.waitpid(pid, 0)[1]
    if status and os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGABRT:
        report["crashes"].append(f"round {seed}, {section}: signal {os.WTERMSIG(status)}")
    elif status:
        report["crashes"].append(f"round {seed}, {section}: ended with status {status}")
    of = report["sections"].setdefault(section, collections.Counter())
    of["hits"] += n - missed
    if text:
        got = json.loads(text)
        of.update(got["said"])
        report["ops"] += sum(got["said"].values())
        if set(got["wrong"]) - own:
            report["wrong"].append(f"round {seed}, {section}: wrong values of keys {sorted(set(got['wrong']) - own)[:5]}, whose items were not hit")
    try:
        cache.verify()
        _sweep.repair(cache)
        left = [v for v in cache.verify() if not v.startswith("I20")]
        if left:
            of["not repaired"] += 1
            report["unrepaired"].append(f"round {seed}, {section}: {left[0]}")
    except errors.ShmcacheError as e:
        of[f"verify: {type(e).__name__}"] += 1
    del view
    shmcache.unlink(name)
    cache.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=int, default=1_000_000)
    parser.add_argument("--round", type=int, default=5_000, help="operations on one segment")
    parser.add_argument("--hits", type=int, default=660, help="damages to one segment")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    report: dict[str, Any] = {"ops": 0, "crashes": [], "hangs": [], "wrong": [], "unrepaired": [], "sections": {}}
    seed = args.seed
    began = time.monotonic()
    while report["ops"] < args.ops and len(report["crashes"]) + len(report["hangs"]) < 10:
        # in a process of its own: verify and repair are on trial, too
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(r)
            round_(seed, args.round, args.hits, report)
            with open(w, "w") as out:
                json.dump(report, out)
            os._exit(0)
        os.close(w)
        with open(r) as f:
            text = f.read()
        status = os.waitpid(pid, 0)[1]
        if text:
            report = json.loads(text)
            report["sections"] = {k: collections.Counter(v) for k, v in report["sections"].items()}
        if status:
            report["crashes"].append(f"round {seed}: verify or repair ended with status {status}")
            try:
                shmcache.unlink(f"fuzz-{pid}")
            except shmcache.SegmentNotFound:
                pass
        seed += 1
    report["seconds"] = round(time.monotonic() - began)
    report["unrepaired"] = report["unrepaired"][:10]
    print(json.dumps(report, indent=1))
    return 1 if report["crashes"] or report["hangs"] or report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
