"""Is what slow processes see of the cache what one register for each key would have shown them? A storm of delays, with its histories checked.

    python -m tests.stress.linear --seconds 3600 --seed 1
    python -m tests.stress.linear --seed 1 --only 17            one round again
    python -m tests.stress.linear --kind tight --focus "big: page to be freed"

It builds the core with fault points (crash/fault.pxd), and lets every process fall asleep at them, and within reads, at random, for up to
tens of milliseconds; it is slow and living, nobody is killed. Tries for a lock find it busy at random, too, so that every fall-back for a
busy lock is taken often. Each round of some seconds has a segment, processes and rates of its own, drawn from the seed, and mostly one
point at which delays are frequent:

roomy   nothing is evicted: a value that is not there was deleted, cleared, or is over its time
tight   a few MB for hundreds of values, many of several pages: memory changes hands all the time. Here a value may vanish, once

All do every operation on the same keys, and note what they were answered and when. Values are unique, and carry key and number in every
word, so that a torn or foreign one is seen as it is read; then each key's history is checked (stress/history.py). An operation that raises
CapacityError must have changed nothing. Each round ends in verify() and the count of chunks. Exit code 1: something was wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import json
import multiprocessing as mp
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import shmcache
from shmcache import errors
from shmcache.core import _claims, _core, _sweep
from shmcache.supervisor.loop import Supervisor
from tests import special
from tests.stress.history import ADD, CAS, CLEAR, COUNT, DELETE, GET, GETS, IN, INCR, POP, REPLACE, SET, TOUCH, Op, check

KINDS = {  # size of the segment, keys, sizes of values and how often
    "roomy": ("64M", 24, {24: 40, 400: 20, 3000: 10, 40_000: 4, 150_000: 4}),
    "tight": ("4M", 160, {24: 20, 400: 20, 3000: 10, 15_000: 10, 40_000: 5, 70_000: 25, 150_000: 8, 300_000: 2}),
}
OPERATIONS = {"get": 18, "get_many": 4, "gets": 4, "cas": 14, "in": 3, "set": 16, "set_many": 3, "add": 8, "replace": 10, "incr": 8, "count": 4, "pop": 4, "delete": 4, "touch": 6}
TTLS_MS = (0, 0, 0, 0, 5, 20, 60, 1000)  # 0: it never expires
DELAYS = ((50, 500), (200, 3000), (1000, 10_000))  # at one in so many points, of up to so many us
HEAD = struct.Struct("<IIQ")  # key's number, length, the value's number
LATEST_S = 60.0  # for a process to end behind its round
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)


def make(number: int, identity: int, size: int) -> bytes:
    """A value of `size` bytes, a multiple of 8, all of which say which it is."""
    return HEAD.pack(number, size, identity) + identity.to_bytes(8, "little") * (size // 8 - 2)


def runs(value: bytes) -> str:
    """Whose words stand where in a value that is wrong."""
    words = [value[i : i + 8] for i in range(0, len(value), 8)]
    found = [(at * 8, words[at]) for at in range(len(words)) if at == 0 or words[at] != words[at - 1]]
    return f"{len(value)} bytes: " + ", ".join(f"at {at} {word[::-1].hex()}" for at, word in found[:12])


class Wrong(Exception):
    """A value that is none of this key's, or no whole one."""


class Round:
    """What is drawn for one round; the same seed and number draw the same."""

    def __init__(self, args: argparse.Namespace, number: int, points: list[str]) -> None:
        rng = random.Random(f"{args.seed}-{number}")
        self.seed = rng.getrandbits(32)
        self.kind = rng.choice(list(KINDS))
        self.processes = rng.choice((3, 4, 6))
        self.threads = rng.choice((1, 1, 2))
        self.supervisor = rng.random() < 0.5
        self.delay, self.most_us = rng.choice(DELAYS)
        self.busy, self.late, self.pools = rng.choice((0, 3, 10)), rng.choice((0, 0, 300)), rng.choice((0, 3))
        self.focus_one_in, self.focus = rng.choice((1, 3, 10)), rng.choice(points)
        self.clear_every_s = rng.choice((0.05, 0.2, 0.5))
        self.kind = args.kind or self.kind
        self.focus = self.focus if args.focus is None else args.focus
        for name, _, value in (setting.partition("=") for setting in args.set):
            setattr(self, name, type(getattr(self, name))(json.loads(value)))

    def armed(self, process: int) -> str:
        return f"d{self.seed + process},{self.delay},{self.most_us},{self.busy},{self.late},{self.pools},{self.focus_one_in},{self.focus}"


class Worker:
    """One thread: what it did, and what it was answered."""

    def __init__(self, cache: shmcache.Cache, settings: Round, number: int) -> None:
        self.cache = cache
        self.number = number
        self.rng = random.Random(f"{settings.seed}-{number}")
        _, self.keys, self.sizes = KINDS[settings.kind]
        self.clear_every_s = settings.clear_every_s if number == 0 else float("inf")
        self.n_values = 0
        self.notes: list[tuple[int, Op]] = []  # number of the key, -1: all; what was done
        self.refused = 0
        self.wrong: list[str] = []
        self.longest_s = 0.0

    # -- keys and values: every second key is a counter's

    def some_key(self) -> int:
        return self.rng.randrange(8) if self.rng.random() < 0.5 else self.rng.randrange(self.keys)

    def new(self, key: int) -> tuple[int, Any]:
        """(what the history calls it, the value): a number, or bytes."""
        self.n_values += 1
        identity = self.number << 24 | self.n_values
        if key % 2:
            return identity << 16, identity << 16
        return identity, make(key, identity, self.rng.choices(list(self.sizes), list(self.sizes.values()))[0])

    def called(self, key: int, value: Any) -> int:
        """What the history calls a value that was read."""
        if value is None:
            return 0
        if key % 2:
            if type(value) is int and value > 0:
                return value
        elif type(value) is bytes and len(value) >= HEAD.size:
            n, size, identity = HEAD.unpack_from(value)
            if n == key and size == len(value) and value == make(key, identity, size):
                return int(identity)
        raise Wrong(f"key {key}: {type(value).__name__} {runs(value) if type(value) is bytes else repr(value)}")

    # -- operations

    def note(self, key: int, began: int, kind: int, value: int = 0, **more: Any) -> None:
        self.notes.append((key, Op(began, time.monotonic_ns(), kind, value, worker=self.number, counter=bool(key % 2), **more)))

    def step(self, name: str) -> None:
        rng, cache = self.rng, self.cache
        key = self.some_key()
        if name in ("incr", "count"):
            key |= 1
        k = b"key:%d" % key
        ttl_ms = rng.choice(TTLS_MS)
        ttl = ttl_ms / 1000 if ttl_ms else None
        began = time.monotonic_ns()
        if name == "get":
            found = cache.get(k)
            ended = time.monotonic_ns()
            self.notes.append((key, Op(began, ended, GET, self.called(key, found), worker=self.number)))
        elif name == "get_many":
            keys = [key, *(self.some_key() for _ in range(7))]
            found = cache.get_many([b"key:%d" % n for n in keys])
            ended = time.monotonic_ns()
            for n in set(keys):
                self.notes.append((n, Op(began, ended, GET, self.called(n, found.get(b"key:%d" % n)), worker=self.number)))
        elif name in ("gets", "cas"):
            found, version = cache.gets(k)
            self.note(key, began, GETS, seen := self.called(key, found), version=version)
            if name == "cas" and version:
                identity, value = self.new(key)
                began = time.monotonic_ns()
                done = cache.cas(k, value, version, ttl)
                self.note(key, began, CAS, identity, done=done, seen=seen, version=version, ttl_ms=ttl_ms)
        elif name == "in":
            self.note(key, began, IN, int(k in cache))
        elif name == "set":
            identity, value = self.new(key)
            cache.set(k, value, ttl)
            self.note(key, began, SET, identity, ttl_ms=ttl_ms)
        elif name == "set_many":
            new = {n: self.new(n) for n in {key, *(self.some_key() for _ in range(3))}}
            unsure = True
            try:
                cache.set_many({b"key:%d" % n: value for n, (_, value) in new.items()}, ttl)
                unsure = False
            finally:
                for n, (identity, _) in new.items():
                    self.note(n, began, SET, identity, ttl_ms=ttl_ms, unsure=unsure)
        elif name == "add":
            identity, value = self.new(key)
            self.note(key, began, ADD, identity, done=cache.add(k, value, ttl), ttl_ms=ttl_ms)
        elif name == "replace":
            identity, value = self.new(key)
            self.note(key, began, REPLACE, identity, done=cache.replace(k, value, ttl), ttl_ms=ttl_ms)
        elif name == "incr":
            with contextlib.suppress(KeyError):
                self.note(key, began, INCR, cache.incr(k))
                return
            self.note(key, began, INCR, done=False)
        elif name == "count":
            base, _ = self.new(key)
            self.note(key, began, COUNT, cache.incr(k, default=base - 1, ttl=ttl), seen=base, ttl_ms=ttl_ms)
        elif name == "pop":
            self.note(key, began, POP, self.called(key, cache.pop(k)))
        elif name == "delete":
            self.note(key, began, DELETE, done=cache.touch(k, 0) if rng.random() < 0.2 else cache.delete(k))
        elif name == "touch":
            self.note(key, began, TOUCH, done=cache.persist(k) if ttl is None else cache.expire(k, ttl), ttl_ms=ttl_ms)
        else:
            cache.clear()
            self.note(-1, began, CLEAR)

    def run(self, until: float) -> None:
        next_clear = time.monotonic() + self.rng.random() * self.clear_every_s if self.number == 0 else float("inf")
        while (now := time.monotonic()) < until:
            name = self.rng.choices(list(OPERATIONS), list(OPERATIONS.values()))[0]
            if now >= next_clear:
                name, next_clear = "clear", now + self.rng.random() * 2 * self.clear_every_s
            try:
                self.step(name)
            except errors.CapacityError:
                self.refused += 1
            except (Wrong, errors.ShmcacheError) as e:
                self.wrong.append(f"worker {self.number}, {name}: {type(e).__name__}: {e}")
            self.longest_s = max(self.longest_s, time.monotonic() - now)


def counted(what: str) -> int:
    """Of all the modules that are compiled with the fault points."""
    return sum(ctypes.c_uint64.in_dll(ctypes.CDLL(m.__file__), f"shmcache_{what}").value for m in (_claims, _core, _sweep))


def process(name: str, settings: Round, number: int, until: float, out: Path) -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["SHMCACHE_FAULT"] = settings.armed(number)
    cache = shmcache.attach(name)
    workers = [Worker(cache, settings, number * settings.threads + i) for i in range(settings.threads)]
    threads = [threading.Thread(target=w.run, args=(until,)) for w in workers[1:]]
    for thread in threads:
        thread.start()
    workers[0].run(until)
    for thread in threads:
        thread.join()
    cache.close()
    del os.environ["SHMCACHE_FAULT"]
    figures = {
        "notes": [note for w in workers for note in w.notes],
        "wrong": [line for w in workers for line in w.wrong],
        "refused": sum(w.refused for w in workers),
        "longest_s": max(w.longest_s for w in workers),
        "delayed": counted("delayed"),
        "forced_busy": counted("refused"),
    }
    out.write_bytes(pickle.dumps(figures))


def supervise(name: str, settings: Round) -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["SHMCACHE_FAULT"] = settings.armed(settings.processes)
    supervisor = Supervisor(shmcache.attach(name))
    signal.signal(signal.SIGTERM, supervisor.stop)
    supervisor.run()


def run_round(settings: Round, seconds: float, folder: Path) -> dict[str, Any]:
    name = f"linear-{os.getpid()}"
    size, _, _ = KINDS[settings.kind]
    context = mp.get_context("fork")
    cache = shmcache.create(name, size, stripes=64)
    wrong: list[str] = []
    try:
        until = time.monotonic() + seconds
        files = [folder / f"{i}" for i in range(settings.processes)]
        running = [context.Process(target=process, args=(name, settings, i, until, file)) for i, file in enumerate(files)]
        if settings.supervisor:
            running.append(context.Process(target=supervise, args=(name, settings)))
        for p in running:
            p.start()
        for i, p in enumerate(running):
            if i == settings.processes:
                os.kill(p.pid or 0, signal.SIGTERM)
            p.join(max(0.0, until - time.monotonic()) + LATEST_S)
            if p.exitcode != 0:
                wrong.append(f"process {i} " + ("hangs" if p.exitcode is None else f"ended with {p.exitcode}"))
                p.kill()
                p.join()
        figures = [pickle.loads(file.read_bytes()) for file in files if file.exists()]
        stats = cache.stats()
        wrong += [f"verify: {line}" for line in cache.verify()]
        chunks = _sweep.settle(cache)
        lost = chunks["RETIRED"] + chunks["RESERVED"] + chunks["KEPT"] - sum(c["reserved"] for c in cache.stats()["slab_classes"])
        wrong += [f"{lost} chunks are lost"] if lost else []
    finally:
        shmcache.unlink(name)
        cache.close()
    by_key: dict[int, list[Op]] = collections.defaultdict(list)
    for figure in figures:
        wrong += figure["wrong"]
        for key, op in figure["notes"]:
            by_key[key].append(op)
    clears = by_key.pop(-1, [])
    for key, done in sorted(by_key.items()):
        bad = check(done + clears, may_vanish=stats["evictions"] > 0)
        if bad is not None:
            near = sorted(op for op in done + clears if op.returned >= bad.called - 200_000_000 and op.called <= bad.returned)[-25:]
            wrong.append("\n    ".join((f"key {key}: nothing explains", str(bad), "of these:", *map(str, near))))
    return {
        "wrong": wrong,
        "operations": sum(map(len, by_key.values())) + len(clears),
        "checked": sum(map(len, by_key.values())),
        "clears": len(clears),
        "strict": stats["evictions"] == 0,
        "longest_ms": round(1000 * max((f["longest_s"] for f in figures), default=0)),
        **{k: sum(f[k] for f in figures) for k in ("refused", "delayed", "forced_busy")},
        **{f"repaired_{k}": n for k, n in stats["repairs"].items() if n},
        **{k: stats[k] for k in ("evictions", "pages_moved", "unlisted", "settled", "lock_waits", "retries", "stalls")},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--round", type=float, default=8, help="seconds of a round (8)")
    parser.add_argument("--only", type=int, help="only the round of this number")
    parser.add_argument("--kind", choices=list(KINDS), help="all rounds of this kind")
    parser.add_argument("--focus", help="in all rounds delays are frequent at points whose names begin so")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of what is drawn for each round, as WRONG shows it")
    args = parser.parse_args(argv)
    if not special.points_of_build():
        folder = special.build("-DSHMCACHE_FAULT_POINTS")
        argv_, env = special.command(folder, "tests.stress.linear", *(sys.argv[1:] if argv is None else argv))
        return subprocess.run(argv_, env=env, cwd=folder).returncode
    print(f"seed {args.seed}", flush=True)
    points = ["", *sorted(special.points_of_build("fault|delay"))]
    began = time.monotonic()
    total: dict[str, Any] = collections.Counter()
    examples: list[str] = []
    with tempfile.TemporaryDirectory() as top:
        for number in range(1 << 30) if args.only is None else [args.only]:
            if time.monotonic() - began >= args.seconds:
                break
            settings = Round(args, number, points)
            folder = Path(top) / str(number)
            folder.mkdir()
            report = run_round(settings, args.round, folder)
            for line in report.pop("wrong"):
                total["wrong"] += 1
                examples.append(line)
                print(f"WRONG in round {number} ({vars(settings)}): {line}", flush=True)
            total["rounds"] += 1
            total["longest_ms"] = max(total["longest_ms"], report.pop("longest_ms"))
            for k, v in report.items():
                total[k] += v
    seconds = time.monotonic() - began
    print(json.dumps({"seed": args.seed, "seconds": round(seconds), **total, "wrong": len(examples), "examples": [e.split("\n    of these")[0] for e in examples[:5]]}, indent=1))
    return 1 if examples else 0


if __name__ == "__main__":
    sys.exit(main())
