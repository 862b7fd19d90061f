"""Every fault point x every operation: the operation's process is killed (or stopped) there, and nobody else may notice.

    python -m tests.crash.matrix [--only NAME]... [--stop] [--jobs N]   builds the core with fault points, then runs on that build

Scenarios run N at a time (as many as there are CPUs), each with a segment of its own. For each: prepare a segment, note which points the operation passes; then, for each point (its first, second and last passing),
put the segment's bytes back, let a forked child do the operation and die there, and from a fresh process see that
- every other key reads right (where the operation evicts: right, or not there), the operation's key reads old or new, never torn; of a
  transaction exactly those writes are there that were stored before its death, which is at each passing of each point
- a write to the same stripe, or to each that a transaction held, and one to the same slab class succeed, and how long they took
- once what was left is settled verify() is empty, every chunk is FREE, LIVE or in the hand of the living, every page is in the pool, a
  class or a big value, every lock free, every row free to take
With --stop the child is stopped instead: readers go on, writers to what it holds fail fast or wait for their limit, and when it is
continued it finishes as if nothing had been; a transaction is whole then.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import ctypes
import json
import mmap
import multiprocessing
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import numpy as np

import shmcache
from shmcache import errors
from shmcache.core import _core, _dirty, _resp, _stream, _sweep
from shmcache.stores import Entry
from shmcache.supervisor import appendlog
from shmcache.supervisor import format as fmt
from tests import census, special
from tests.redis.inprocess import InProcess
from tests.redis.resp import encode

ADDRESS = (1 << 48) - 1
MASK64 = (1 << 64) - 1
MASK63 = MASK64 >> 1
VICTIM = b"victim"
OLD, NEW = b"old" * 20, b"new" * 21
BIG_OLD, BIG_NEW = bytes(range(256)) * 800, bytes(reversed(range(256))) * 900  # 3 pages each and a rest
SMALL = 48 + 16 + 60  # bytes of a chunk for the filling items
COMMITS = {"put: slot stored", "remove: slot cleared", "incr: value"}  # points right behind the store that makes a write seen


class Shared:
    """A store that children of fork see and change, too. torn: a signal's exception ends a write before it is done, or just behind."""

    ordered = False

    def __init__(self) -> None:
        self.shared = mmap.mmap(-1, 1 << 17)
        self.rows = {}
        self.torn = False

    @property
    def rows(self) -> dict[bytes, Any]:
        rows: dict[bytes, Any] = pickle.loads(self.shared)
        return rows

    @rows.setter
    def rows(self, rows: dict[bytes, Any]) -> None:
        packed = pickle.dumps(rows)
        self.shared[: len(packed)] = packed

    def load_many(self, keys: Any, *, timeout: float | None = None) -> dict[bytes, Entry]:
        rows = self.rows
        return {key: Entry(rows[key]) for key in keys if key in rows}

    def store_many(self, items: Any, *, timeout: float | None = None, versions: Any = None) -> None:
        if self.torn:
            raise KeyboardInterrupt
        self.rows = self.rows | {key: value for key, (value, _) in items.items()}

    def delete_many(self, keys: Any, *, timeout: float | None = None, versions: Any = None) -> None:
        self.rows = {key: value for key, value in self.rows.items() if key not in keys}

    def close(self) -> None:
        pass


class Bench:
    """A segment with writable views, and what its keys ought to hold."""

    def __init__(self, size: str = "4M", **options: Any) -> None:
        self.name = f"matrix-{os.getpid()}"
        self.store = Shared() if "policy" in options and options["policy"] != "back" else None
        if self.store is not None:
            options["store"] = self.store
        self.cache = shmcache.create(self.name, size, stripes=16, max_processes=6, lock_limit=2.0, **options)
        self.seg = self.cache.views(writable=True)
        self.expected: dict[bytes, Any] = {}
        self.fleeting: set[bytes] = set()  # may be evicted
        self.victim: list[Any] = []  # values that VICTIM may have; None: no value
        self.states: list[dict[bytes, Any]] = []  # of a transaction: what its keys hold before it and after each of its writes
        self.before: list[str] = []  # the points that were passed before the death, that of it, too
        self.marked = 0  # the version of a mark that this process has put on VICTIM
        self.done = 0  # so many of these were stored before the death
        self.whole = False  # it died, or was stopped, with all of its stripes
        row = int(np.flatnonzero(self.seg.rows["pid"] == os.getpid())[0])
        self.me = int(self.seg.rows["gen"][row]) << 16 | row + 1
        self.k0, self.k1 = map(int, self.seg.header["hash_key"])
        self.n_buckets, self.n_stripes = len(self.seg.buckets), len(self.seg.stripes)
        self.near: dict[bytes, list[bytes]] = {}

    def close(self) -> None:
        del self.seg
        shmcache.unlink(self.name)
        self.cache.close()

    def save(self) -> tuple[bytes, bytes]:
        return bytes(self.seg.bytes), bytes(self.store.shared) if self.store is not None else b""

    def restore(self, saved: tuple[bytes, bytes]) -> None:
        self.seg.bytes[:] = np.frombuffer(saved[0], np.uint8)
        if self.store is not None:
            self.store.shared[:] = saved[1]

    def put(self, key: bytes, value: Any) -> None:
        self.cache.set(key, value)
        self.expected[key] = value

    def fill(self, n: int, value: bytes = b"x" * 60, prefix: bytes = b"fill") -> None:
        for i in range(n):
            key = b"%s:%d" % (prefix, i)
            self.cache.set(key, value)
            self.expected[key] = value
            self.fleeting.add(key)

    def full(self, value: bytes = b"x" * 60, prefix: bytes = b"fill") -> None:
        """Fill till the first eviction, then some."""
        n = 0
        while not self.cache.stats()["evictions"]:
            self.fill(200, value, b"%s%d" % (prefix, n))
            n += 1

    def hash(self, key: bytes) -> int:
        return _core.siphash_rounds(key, self.k0, self.k1, 1, 3)

    def bucket(self, key: bytes) -> int:
        return (self.hash(key) << 16 & MASK64) * self.n_buckets >> 64

    def neighbours(self, key: bytes, n: int) -> list[bytes]:
        """Keys of the same bucket. They are some thousand tries apart: who asks here before it forks saves that to its children."""
        found = self.near.setdefault(key, [])
        rng, bucket = random.Random(len(found)), self.bucket(key)
        while len(found) < n:
            other = b"n:%d" % rng.getrandbits(48)
            if self.bucket(other) == bucket:
                found.append(other)
        return found[:n]

    def stripe(self, key: bytes) -> int:
        return self.bucket(key) & self.n_stripes - 1

    def on_stripes(self, *stripes: int, prefix: bytes = b"t") -> list[bytes]:
        """A key of each of these stripes."""
        found: list[bytes] = []
        number = 0
        while len(found) < len(stripes):
            key = b"%s:%d" % (prefix, number)
            if self.stripe(key) == stripes[len(found)]:
                found.append(key)
            number += 1
        return found

    def address(self, key: bytes) -> int:
        h = self.hash(key)
        chains = self.seg.buckets[self.bucket(key)]["slot"]
        for word in chains:
            at = int(word) & ADDRESS
            if word and int(word) >> 48 == h >> 48 and int(self.item(at)["hash"]) == h:
                return at
        raise KeyError(key)

    def item(self, address: int) -> Any:
        return np.ndarray((), self.seg.items(0).dtype, buffer=self.seg.bytes, offset=address * 16)

    def keys_under_hand(self) -> list[bytes]:
        """The filling keys in the page under the CLOCK hand of their class: the one that goes next."""
        cls = self.slab_class(SMALL)
        hand = int(self.seg.classes["hand"][cls]) >> 32
        page = hand if hand < len(self.seg.pages) else int(self.seg.classes["ring"][cls]) - 1
        page_bytes, chunk = 1 << int(self.seg.header["page_shift"]), int(self.seg.classes["chunk_bytes"][cls])
        keys = []
        for i in range(page_bytes // chunk):
            at = int(self.seg.header["slab_off"]) + page * page_bytes + i * chunk
            item = self.item(at // 16)
            key = bytes(self.seg.bytes[at + 48 : at + 48 + int(item["key_bytes"])])
            if int(item["word"]) >> 56 == 2 and key in self.expected:
                keys.append(key)
        return keys

    def slab_class(self, n_bytes: int) -> int:
        return int(np.searchsorted(self.seg.classes["chunk_bytes"], n_bytes))

    def plant(self, locks: np.ndarray, at: int) -> None:
        """A lock that the first process, which lives, holds and does not release: unplant() does."""
        locks["word"][at] = self.me

    def unplant(self) -> None:
        for locks in (self.seg.stripes, self.seg.classes):
            locks["word"][locks["word"] & ((1 << 63) - 1) == self.me] = 0
        if int(self.seg.header["pages_word"]) & ((1 << 63) - 1) == self.me:
            self.seg.header["pages_word"] = 0


def nothing(b: Bench) -> None:
    pass


@dataclass
class Scenario:
    prepare: Callable[[Bench], None]
    act: Callable[[Bench], Any]
    evicts: bool = False  # other keys may go
    options: dict[str, Any] = field(default_factory=dict)
    meanwhile: Callable[[Bench, int], None] | None = None  # what another process does while the child acts: what is passed is up to both
    mend: Callable[[Any], Any] = _sweep.settle
    after: Callable[[Bench], list[str]] | None = None  # what the first process sees and does after the death: what is wrong


SCENARIOS: dict[str, Scenario] = {}


def scenario(evicts: bool = False, meanwhile: Any = None, prepare: Any = None, **options: Any) -> Any:
    def add(function: Any) -> Any:
        SCENARIOS[function.__name__] = Scenario(prepare or basic, function, evicts, options, meanwhile)
        return function

    return add


def basic(b: Bench) -> None:
    for i in range(300):
        b.put(b"key:%d" % i, b"value %d " % i * (i % 20 + 1))
    b.put(b"number", 7)
    b.cache.set(VICTIM, OLD)
    b.victim = [OLD, NEW]


# -- one key


@scenario()
def set_replace(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


def absent(b: Bench) -> None:
    basic(b)
    b.cache.delete(VICTIM)
    b.victim = [None, NEW]


@scenario(prepare=absent)
def set_new(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


@scenario(prepare=lambda b: setattr(b, "victim", [None, NEW]))
def set_first(b: Bench) -> None:
    """Its stripe has no other item."""
    b.cache.set(VICTIM, NEW)


@scenario(prepare=absent)
def add_new(b: Bench) -> None:
    b.cache.add(VICTIM, NEW)


@scenario(prepare=lambda b: (absent(b), setattr(b, "victim", [None, b"N" * 9000]))[0])
def set_first_of_class(b: Bench) -> None:
    b.cache.set(VICTIM, b"N" * 9000)  # a page from the pool, cut, published


@scenario()
def refused(b: Bench) -> None:
    b.cache.add(VICTIM, NEW)  # reserves, finds the key, gives the chunk up
    b.cache.cas(VICTIM, NEW, 12345)


def to_delete(b: Bench) -> None:
    basic(b)
    b.victim = [OLD, None]


@scenario(prepare=to_delete)
def delete(b: Bench) -> None:
    b.cache.delete(VICTIM)


@scenario(prepare=to_delete)
def pop(b: Bench) -> None:
    b.cache.pop(VICTIM)


def counter(b: Bench) -> None:
    basic(b)
    b.cache.set(VICTIM, 41)
    b.victim = [41, 42]


@scenario(prepare=counter)
def incr(b: Bench) -> None:
    b.cache.incr(VICTIM)


@scenario(prepare=lambda b: (basic(b), setattr(b, "victim", [OLD]))[0])
def touch(b: Bench) -> None:
    b.cache.touch(VICTIM, 1000)
    b.cache.persist(VICTIM)


@scenario(prepare=lambda b: (basic(b), setattr(b, "victim", [OLD]))[0])
def look_round(b: Bench) -> None:
    assert VICTIM in set(b.cache)
    assert b.cache.ttl(VICTIM) == float("inf")


@scenario(prepare=lambda b: (basic(b), setattr(b, "victim", [OLD]))[0])
def verify(b: Bench) -> None:
    assert b.cache.verify() == []


# -- the same, logged: in the ring, or logged by who repairs


def logged(prepare: Callable[[Bench], None], evicts: bool = False) -> Any:
    def prepared(b: Bench) -> None:
        appendlog.mark(b.cache, log_policy=1)
        prepare(b)

    return scenario(evicts, prepare=prepared, log_buffer="64K")


@logged(basic)
def logged_set(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


@logged(absent)
def logged_set_new(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


@logged(lambda b: (basic(b), setattr(b, "victim", [OLD, BIG_NEW]))[0])
def logged_set_large(b: Bench) -> None:
    b.cache.set(VICTIM, BIG_NEW)


@logged(to_delete)
def logged_delete(b: Bench) -> None:
    b.cache.delete(VICTIM)


@logged(lambda b: (absent(b), setattr(b, "victim", [None]))[0])
def logged_delete_absent(b: Bench) -> None:
    b.cache.delete(VICTIM)


@logged(counter)
def logged_incr(b: Bench) -> None:
    b.cache.incr(VICTIM)


@logged(lambda b: (basic(b), setattr(b, "victim", [OLD]))[0])
def logged_touch(b: Bench) -> None:
    b.cache.touch(VICTIM, 1000)


# -- the same, written back: what is stored is dirty till the store has it


def written_back(prepare: Callable[[Bench], None]) -> Any:
    return scenario(prepare=prepare, policy="back")


def stored(b: Bench, key: bytes | None = None) -> None:
    """What a supervisor does: find what is dirty, and say that the store has it."""
    dirty = _dirty.Dirty(b.cache)
    at = 1
    while at:
        items, at = dirty.find(at * (at > 1), 100)
        for item in items:
            if key in (None, item[0]):
                dirty.clean(item[0], item[4])


@written_back(basic)
def back_set(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


@written_back(lambda b: (absent(b), stored(b))[0])
def back_set_new(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


@written_back(lambda b: (to_delete(b), stored(b))[0])
def back_delete(b: Bench) -> None:
    b.cache.delete(VICTIM)


@written_back(lambda b: (counter(b), stored(b))[0])
def back_incr(b: Bench) -> None:
    b.cache.incr(VICTIM)


@written_back(lambda b: (basic(b), stored(b), setattr(b, "victim", [OLD]))[0])
def back_touch(b: Bench) -> None:
    b.cache.touch(VICTIM, 1000)


def to_be_stored(b: Bench) -> None:
    basic(b)
    b.cache.delete(VICTIM)
    b.victim = [None]
    at = int(b.seg.header["dirty_off"])
    b.seg.bytes[at : at + 64] |= 0x55  # bits without a dirty item


@written_back(to_be_stored)
def back_store(b: Bench) -> None:
    stored(b, VICTIM)
    stored(b)


@written_back(lambda b: (basic(b), setattr(b, "victim", [OLD]))[0])
def back_goes_above_a_row(b: Bench) -> None:
    dirty = _dirty.Dirty(b.cache)
    version = b.cache.gets(VICTIM)[1]
    assert dirty.go_above(version + 1000)
    assert dirty.renew(VICTIM, version, version + 2000)


@written_back(to_delete)
def back_gives_up(b: Bench) -> None:
    """What the store refuses, and an operator drops."""
    b.cache._give_up(VICTIM, b.cache.gets(VICTIM)[1])


def expired(b: Bench) -> None:
    basic(b)
    b.cache.set(VICTIM, OLD, ttl=10)
    b.seg.header["clock_shift_ms"] = 20_000
    b.victim = [None]


@scenario(prepare=expired)
def get_expired(b: Bench) -> None:
    b.cache.get(VICTIM)


@scenario(prepare=lambda b: (absent(b), setattr(b, "victim", [None, NEW]))[0])
def claim_and_fill(b: Bench) -> None:
    version = b.cache.claim(VICTIM, 60.0)
    b.cache.fill_claim(VICTIM, NEW, version)


@scenario(prepare=lambda b: (absent(b), setattr(b, "victim", [None]))[0])
def claim_and_unclaim(b: Bench) -> None:
    b.cache.unclaim(VICTIM, b.cache.claim(VICTIM, 60.0, lock=True))


def cleared(b: Bench) -> None:
    basic(b)
    b.fleeting = set(b.expected)
    b.victim = [OLD, None]


@scenario(prepare=cleared, evicts=True)
def clear(b: Bench) -> None:
    b.cache.clear()


# -- in front of a store: what is cached is what the store has, whoever died on his way there, and no key is shut for ever


TIMEOUT = 0.02  # seconds of a wait, and of a call of the store
AGE = 600.0  # seconds that a mark stands: longer than a scenario takes
LATE, LATER, LATEST = b"late" * 20, b"later" * 20, b"latest" * 20


def marks(b: Bench) -> None:
    b.marked = b.cache.mark(VICTIM, AGE)[0]


def marks_and_dies(b: Bench) -> None:
    marks(b)
    os.kill(os.getpid(), signal.SIGKILL)


def before_store(other: str = "", mode: str = "through", after: Any = None) -> Any:
    """Other: whose mark is on VICTIM already: of the "living" (the first process), of the "dead", or nobody's."""
    def prepare(b: Bench) -> None:
        basic(b)
        b.cache._age = AGE
        b.cache.get(VICTIM)
        b.victim = [OLD, NEW, LATE, LATER, LATEST, None]
        if other == "living":
            marks(b)
        elif other == "dead":
            assert die(b, Scenario(nothing, marks_and_dies), "") == "killed"

    def add(function: Any) -> Any:
        options = {"policy": shmcache.Policy(mode, timeout=TIMEOUT)}
        SCENARIOS[function.__name__] = Scenario(prepare, function, False, options, after=after or (lambda b: after_writer(b, other)))
        return function

    return add


@before_store()
def through_set(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


@before_store("living")
def through_set_beside_living(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


@before_store("dead")
def through_set_after_dead(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


@before_store()
def through_delete(b: Bench) -> None:
    b.cache.delete(VICTIM)


@before_store()
def through_change(b: Bench) -> None:
    b.cache.replace(VICTIM, NEW)


@before_store("dead")
def through_change_after_dead(b: Bench) -> None:
    b.cache.replace(VICTIM, NEW)


@before_store("living")
def through_change_beside_living(b: Bench) -> None:
    assert b.cache.mark(VICTIM, AGE, True) == (0, True)


@before_store(mode="around")
def around_set(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


@before_store("living", mode="around")
def around_set_beside_living(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


@before_store()
def through_torn_off(b: Bench) -> None:
    b.store.torn = True
    with contextlib.suppress(KeyboardInterrupt):
        b.cache.set(VICTIM, NEW)


@before_store("living")
def through_torn_off_beside_living(b: Bench) -> None:
    through_torn_off(b)


@before_store("dead")
def through_torn_off_after_dead(b: Bench) -> None:
    through_torn_off(b)


@before_store("living", after=lambda b: after_invalidation(b))
def through_invalidate(b: Bench) -> None:
    b.store.rows = b.store.rows | {VICTIM: NEW}
    b.cache.invalidate(VICTIM)


def mark_on(b: Bench) -> tuple[list[int], bool] | None:
    """The mark on VICTIM, as the bytes have it: whom it names, and whether something was given up."""
    try:
        at = b.address(VICTIM)
    except KeyError:
        return None
    if not int(b.item(at)["flags"]) & 16:
        return None
    words = b.seg.bytes[at * 16 + 48 + (len(VICTIM) + 7 & ~7) :][: 17 * 8].view("<u8")
    return [int(w) for w in words[3:10] if w], bool(words[2])


def take_over_stripe(b: Bench) -> None:
    b.cache.discard(b.on_stripes(b.stripe(VICTIM), prefix=b"absent")[0])


class After:
    """Who looks at VICTIM after a death, and writes it."""

    def __init__(self, b: Bench) -> None:
        self.b, self.cache, self.wrong = b, b.cache, list[str]()
        take_over_stripe(b)

    def see(self, what: str, got: Any, expected: Any) -> None:
        if got != expected:
            self.wrong.append(f"{what}: {got!r:.70}, not {expected!r:.70}")

    def reads(self, when: str, cached: bool) -> None:
        """What is read is what the store has; from then on it is cached, or it is not."""
        has = self.b.store.rows.get(VICTIM)
        self.see(f"{when} there is read", self.cache.get(VICTIM), has)
        self.see(f"{when} there is cached", self.cache.peek(VICTIM), has if cached else None)

    def comes_late(self, when: str) -> None:
        """The store does now what the dead had begun, and the cache must not have what it replaces."""
        self.b.store.rows = self.b.store.rows | {VICTIM: LATE}
        self.reads(f"{when}, and the dead one's write was late,", False)


def after_writer(b: Bench, other: str) -> list[str]:
    a, cache = After(b), b.cache
    commits = [name for name in b.before if name in ("put: slot stored", "end mark: name off", "remove: slot cleared")]
    writing, filled = commits == ["put: slot stored"], commits[1:] == ["put: slot stored"]
    torn = "end mark: given up" in b.before
    unknown = writing or torn  # what he had begun may still be done
    shut = unknown or other != ""
    names = writing + (other == "living") + (other == "dead" and not commits)
    mark = mark_on(b)
    given_up = torn or (other == "dead" and commits != [])
    a.see("the mark's names, and what it gave up", mark and (len(mark[0]), mark[1]), (names, given_up) if shut else None)
    if shut:
        a.see("the mark's claim", cache.claim(VICTIM, AGE), -3 if other == "living" else -4)
        a.see("the living one's name", mark and mark[0].count(b.me), int(other == "living"))
    else:
        a.see("cached is", cache.peek(VICTIM), NEW if filled else None if commits else OLD)
    a.reads("after the death", not shut)
    if unknown:
        a.comes_late("after the death")
    try:
        changed = cache.replace(VICTIM, LATER) or VICTIM not in b.store.rows
        a.see("a change beside a writer", other == "living", False)
    except errors.StoreUnavailable:
        changed = True
        a.see("a change that was kept waiting, by the living", other, "living")
    a.see("a change was done", changed, True)
    a.reads("after a change", not shut)
    cache.set(VICTIM, LATEST)
    a.reads("after a write", not shut)
    if unknown:
        a.comes_late("after a write")
    if other == "living":
        a.see("the living one fills", cache.fill_claim(VICTIM, LATE, b.marked), False)
        cache.end_mark(VICTIM, True)
        cache.discard(VICTIM)
        a.reads("when the living one has ended", not unknown)
        if unknown:
            a.comes_late("when the living one has ended")
    b.seg.header["clock_shift_ms"] += int(AGE * 900)
    cache.set(VICTIM, LATER)
    if unknown:
        a.comes_late("when his time is nearly over")
    b.seg.header["clock_shift_ms"] += int(AGE * 200)  # of no mark but the dead one's, however many came after it
    a.reads("when his time is over", True)
    return a.wrong


def after_invalidation(b: Bench) -> list[str]:
    a, cache = After(b), b.cache
    voided = "mark: voided" in b.before
    a.see("the mark's names", mark_on(b), ([b.me], False))
    a.see("the mark's claim", cache.claim(VICTIM, AGE), -3)
    if voided or "intent: count" not in b.before:
        a.see("the living one fills", cache.fill_claim(VICTIM, NEW if not voided else OLD, b.marked), not voided)
    if cache.claim_version(VICTIM):
        cache.end_mark(VICTIM, True)
        cache.discard(VICTIM)
    a.reads("when the living one has ended", True)
    return a.wrong


# -- chains


def chained(n: int) -> Callable[[Bench], None]:
    def prepare(b: Bench) -> None:
        absent(b)
        there = sum(b.bucket(key) == b.bucket(VICTIM) for key in b.expected)  # by chance: the hash key is random
        for key in b.neighbours(VICTIM, n - there):
            b.put(key, b"neighbour")

    return prepare


@scenario(prepare=chained(7))
def set_grows_chain(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


def chain_to_shrink(b: Bench) -> None:
    chained(7)(b)
    b.cache.set(VICTIM, OLD)
    b.victim = [OLD, None]


@scenario(prepare=chain_to_shrink)
def delete_shrinks_chain(b: Bench) -> None:
    b.cache.delete(VICTIM)


def no_overflow_left(b: Bench) -> None:
    chained(7)(b)
    b.seg.header["overflow_list"] = 0
    b.seg.header["overflow_n_free"] = 0
    words = b.seg.overflow["word"]
    words[words == 0] = 2 << 56  # linked, to nobody: put back by `restore_overflow`
    b.fleeting = set(b.expected)


@scenario(prepare=no_overflow_left, evicts=True)
def set_evicts_from_chain(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


# -- room


def full(b: Bench) -> None:
    absent(b)
    b.full()
    b.victim = [None, NEW, b"N" * 9000]
    b.fleeting = set(b.expected)


@scenario(prepare=full, evicts=True)
def set_evicts(b: Bench) -> None:
    for i in range(12):  # past what is in hand
        b.cache.set(b"more:%d" % i, b"x" * 60)
    b.cache.set(VICTIM, NEW)


@scenario(prepare=full, evicts=True)
def set_turns_hand(b: Bench) -> None:
    for i in range(1200):
        b.cache.set(b"more:%d" % i, b"x" * 60)


@scenario(prepare=full, evicts=True)
def set_takes_page(b: Bench) -> None:
    b.cache.set(VICTIM, b"N" * 9000)


def hand_of_a_living(b: Bench) -> None:
    """The page that goes next has chunks in this process's hand."""
    full(b)
    b.seg.refs[:] = 0
    for key in b.keys_under_hand()[:8]:
        b.cache.delete(key)
        del b.expected[key]


@scenario(prepare=hand_of_a_living, evicts=True)
def set_recalls(b: Bench) -> None:
    b.cache.set(VICTIM, b"N" * 9000)


def busy_class(b: Bench) -> None:
    absent(b)
    b.cache.set(VICTIM, OLD)
    b.victim = [OLD]
    b.fill(40, b"y" * 60, b"park")


@scenario(prepare=busy_class, evicts=True)
def frees_while_class_busy(b: Bench) -> None:
    b.cache.lock_limit = 0.001
    b.plant(b.seg.classes, b.slab_class(SMALL))
    for i in range(24):  # 4 in hand, 16 parked, 4 on no list
        b.cache.delete(b"park:%d" % i)
    b.unplant()
    for i in range(6):
        b.cache.set(b"unparks:%d" % i, b"y" * 60)


def unlisted(b: Bench) -> None:
    full(b)
    b.cache.lock_limit = 0.001
    here = b.keys_under_hand()
    b.plant(b.seg.classes, b.slab_class(SMALL))
    for key in here[-30:]:  # where the hand has not been
        b.cache.delete(key)
        del b.expected[key]
    b.unplant()
    for i in range(40):
        b.put(b"again:%d" % i, b"x" * 60)
    b.cache.lock_limit = 2.0
    b.fleeting = set(b.expected)
    b.victim = [None]


@scenario(prepare=unlisted, evicts=True)
def hand_meets_unlisted(b: Bench) -> None:
    for i in range(1500):
        b.cache.set(b"more:%d" % i, b"x" * 60)


# -- big values


@scenario(prepare=lambda b: (absent(b), setattr(b, "victim", [None, BIG_NEW]))[0])
def big_new(b: Bench) -> None:
    b.cache.set(VICTIM, BIG_NEW)


def big(b: Bench) -> None:
    basic(b)
    b.cache.set(VICTIM, BIG_OLD)
    b.victim = [BIG_OLD, BIG_NEW]


@scenario(prepare=big)
def big_replace(b: Bench) -> None:
    b.cache.set(VICTIM, BIG_NEW)


@scenario(prepare=big)
def big_refused(b: Bench) -> None:
    b.cache.add(VICTIM, BIG_NEW)


def big_gone(b: Bench) -> None:
    big(b)
    b.victim = [BIG_OLD, None]


@scenario(prepare=big_gone)
def big_delete(b: Bench) -> None:
    b.cache.delete(VICTIM)


@scenario(prepare=big_gone)
def big_freed_pool_busy(b: Bench) -> None:
    b.seg.header["pages_word"] = b.me
    b.cache.delete(VICTIM)
    b.unplant()


def big_full(b: Bench) -> None:
    full(b)
    b.victim = [None, BIG_NEW]


@scenario(prepare=big_full, evicts=True)
def big_takes_pages(b: Bench) -> None:
    b.cache.set(VICTIM, BIG_NEW)


def full_of_big(b: Bench) -> None:
    absent(b)
    n = 0
    while not b.cache.stats()["evictions"]:
        b.put(b"big:%d" % n, BIG_OLD + b"%d" % n)
        n += 1
    b.fleeting = set(b.expected)
    b.victim = [None, BIG_NEW]


@scenario(prepare=full_of_big, evicts=True)
def big_evicts_big(b: Bench) -> None:
    b.cache.set(VICTIM, BIG_NEW)


# -- rows, segments, supervisor


@scenario()
def attach_and_close(b: Bench) -> None:
    with shmcache.attach(b.name) as other:
        other.set(b"by another handle", b"1")


@scenario()
def first_use_by_child_and_close(b: Bench) -> None:
    for i in range(3):
        b.cache.set(b"child's %d" % i, b"z" * 60)  # takes a row; some chunks stay in hand
    for i in range(3):
        b.cache.delete(b"child's %d" % i)
    del b.seg
    b.cache.close()


@scenario()
def create_another(b: Bench) -> None:
    shmcache.create(b.name + "-new", "4M").close()


def supervised(b: Bench) -> None:
    full(b)
    for i in range(100):
        b.cache.set(b"short:%d" % i, b"s", ttl=10)
    b.seg.header["clock_shift_ms"] = 20_000
    b.victim = [None]


@scenario(prepare=supervised, evicts=True)
def supervise(b: Bench) -> None:
    hold = _sweep.Supervision(b.cache)
    hold.beat()
    hold.make_room(b.slab_class(SMALL), 40)
    hold.sweep(0, len(b.seg.pages))
    hold.sleep(0.001)
    hold.end()


def damaged(b: Bench) -> None:
    basic(b)
    keys = [k for k in b.expected if k.startswith(b"key:")]
    for key in keys[:3]:
        b.item(b.address(key))["hash"] = 12345  # its slot names no item of the bucket, and no slot names the item
        del b.expected[key]
    b.victim = [OLD]


@scenario(prepare=damaged)
def repair(b: Bench) -> None:
    _sweep.repair(b.cache)


SCENARIOS["repair"].mend = _sweep.repair


def left_by_the_dead(b: Bench) -> None:
    """What repair of the stripe does before a hand comes, but for the oddest of deaths: rows R2 and R3 of settle.pxd."""
    basic(b)
    b.item(b.address(VICTIM))["word"] = 3 << 56 | 77 << 16 | 5
    b.item(b.address(b"key:7"))["word"] = 1 << 56 | 77 << 16 | 5
    b.victim = [OLD]


@scenario(prepare=left_by_the_dead)
def settle(b: Bench) -> None:
    _sweep.settle(b.cache)


# -- taking over from the dead: the first has died in prepare, the second dies in the taking over

FIRST_DEATHS = [
    ("set_replace", "put: cas"), ("set_replace", "put: old RETIRED"), ("set_replace", "put: slot stored"), ("set_replace", "put: LIVE"), ("delete", "remove: RETIRED"),
    ("delete", "remove: slot cleared"), ("incr", "incr: value"), ("set_first_of_class", "pop: RESERVED"), ("set_first_of_class", "pool pop: taken"), ("set_first_of_class", "publish: ACTIVE"),
    ("set_first_of_class", "give: cut"), ("set_grows_chain", "grow: RESERVED"), ("set_grows_chain", "grow: linked"), ("set_grows_chain", "grow: released"), ("delete_shrinks_chain", "shrink: RESERVED"),
    ("delete_shrinks_chain", "shrink: unlinked"), ("set_takes_page", "drain: DRAINING"), ("set_takes_page", "drain: chunk FREE"), ("set_takes_page", "drain: out of the ring"), ("big_new", "big: page listed"),
    ("big_new", "put: slot stored"), ("big_replace", "put: version"), ("big_delete", "remove: old cleared"), ("set_evicts", "evict: out of the table"),
    ("claim_and_fill", "put: released"), ("frees_while_class_busy", "push: FREE"), ("through_set_after_dead", "put: slot stored"),
    ("through_delete", "remove: slot cleared"), ("through_torn_off", "end mark: name off"), ("through_invalidate", "mark: voided"),
]  # fmt: skip


SETTLED_AT_ONCE = [("big_new", "put: slot stored"), ("set_replace", "put: reserved"), ("delete", "remove: slot cleared"), ("set_grows_chain", "grow: linked"),
                   ("set_takes_page", "give: cut"), ("set_recalls", "drain: recalled"), ("set_replace", "keep: KEPT")]  # fmt: skip


def after_death(name: str, point: str, settle_first: bool = False) -> Scenario:
    first = SCENARIOS[name]

    def prepare(b: Bench) -> None:
        first.prepare(b)
        if name == "set_grows_chain":
            b.neighbours(VICTIM, 15)
        assert die(b, first, f"k0001{point}") == "killed", f"{name} does not pass {point}"
        b.unplant()

    def act(b: Bench) -> None:
        b.cache.lock_limit = 2.0
        if settle_first:
            _sweep.settle(b.cache)
            return
        for value in b.victim:
            if value is not None:
                b.cache.set(VICTIM, value)
        for i in range(6):
            b.cache.set(b"same class:%d" % i, b"N" * (9000 if b"N" * 9000 in b.victim else 60))
        if name == "set_grows_chain":
            for key in b.neighbours(VICTIM, 15)[7:]:
                b.cache.set(key, b"neighbour")
        _sweep.settle(b.cache)

    return Scenario(prepare, act, first.evicts, first.options)


# -- contention: another living process holds the stripe


def stripe_taken(b: Bench) -> None:
    basic(b)
    b.plant(b.seg.stripes, b.bucket(VICTIM) & 15)


def release_and_ring(b: Bench, pid: int) -> None:
    """What the holder of the planted lock would do: wait till somebody waits, exchange, ring. Ends with the child, too."""
    stripe = b.seg.stripes[b.bucket(VICTIM) & 15 : (b.bucket(VICTIM) & 15) + 1]
    libc = ctypes.CDLL(None, use_errno=True)
    at = ctypes.c_void_p(stripe["bell"].__array_interface__["data"][0])
    while not int(stripe["word"][0]) >> 63:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
    stripe["word"] = 0
    stripe["bell"] += 1
    libc.syscall(202, at, 1, 1, None, None, 0)


@scenario(prepare=stripe_taken, meanwhile=release_and_ring)
def waits(b: Bench) -> None:
    b.cache.set(VICTIM, NEW)


# -- several stripes at once: EXEC and its like, through the sidecar


def say(b: Bench, *commands: tuple[bytes, ...], reply: bytes) -> None:
    """Be the sidecar, and a client of it: the reply has to be this."""
    server = InProcess(b.name, {"databases": "2"})
    said = server.say(server.connect(), b"".join(map(encode, commands)))
    assert said == reply, said


def writes(b: Bench, before: dict[bytes, Any], *steps: tuple[bytes, Any]) -> None:
    """What the keys of a transaction hold, and what it writes, in order."""
    for key, value in before.items():
        if value is None:
            b.cache.delete(key)
        else:
            b.cache.set(key, value)
    b.states = [before]
    for key, value in steps:
        b.states.append({**b.states[-1], key: value})
    b.victim = [state[VICTIM] for state in b.states if VICTIM in state] or b.victim


def keys_of_transaction(b: Bench) -> list[bytes]:
    """Of six stripes, none of them VICTIM's, and one more of the first of them."""
    at = b.stripe(VICTIM)
    return b.on_stripes(*((at + i) % 16 for i in (5, 1, 9, 3, 14, 7, 5)))


def to_transact(b: Bench) -> None:
    basic(b)
    new, gone, gone_too, number, large, text, counted = keys_of_transaction(b)
    writes(
        b, {new: None, VICTIM: OLD, gone: OLD, gone_too: b"x", number: 41, large: None, text: OLD, counted: None},
        (new, NEW), (VICTIM, NEW), (gone, None), (gone_too, None), (number, 42), (large, b"L" * 2100), (text, OLD + b"more"), (counted, 1), (new, b"again"),
    )  # fmt: skip


def transact(b: Bench) -> None:
    new, gone, gone_too, number, large, text, counted = keys_of_transaction(b)
    queue = [(b"SET", new, NEW), (b"SET", VICTIM, NEW), (b"DEL", gone, gone_too), (b"INCR", number), (b"SET", large, b"L" * 2100), (b"APPEND", text, b"more"),
             (b"INCR", counted), (b"SET", new, b"again")]  # fmt: skip
    replies = b"+OK\r\n+OK\r\n:2\r\n:42\r\n+OK\r\n:64\r\n:1\r\n+OK\r\n"
    say(b, (b"MULTI",), *queue, (b"EXEC",), reply=b"+OK\r\n" + b"+QUEUED\r\n" * 8 + b"*8\r\n" + replies)


@scenario(prepare=to_transact)
def exec_several(b: Bench) -> None:
    transact(b)


@logged(to_transact)
def exec_several_logged(b: Bench) -> None:
    transact(b)


def to_be_refused(b: Bench) -> None:
    """A living process holds the last of the stripes."""
    to_transact(b)
    b.states = b.states[:1]
    b.plant(b.seg.stripes, max(map(b.stripe, b.states[0])))


@scenario(prepare=to_be_refused)
def exec_refused(b: Bench) -> None:
    b.cache.lock_limit = 0.01
    queue = [(b"SET", key, NEW) for key in b.states[0]]
    busy = b"-TRYAGAIN a process that does not run holds a lock that this command needs; nothing was changed\r\n"
    say(b, (b"MULTI",), *queue, (b"EXEC",), reply=b"+OK\r\n" + b"+QUEUED\r\n" * len(queue) + busy)


def to_transact_in_full(b: Bench) -> None:
    """Room for what is written is made in other stripes, one of which a living process holds."""
    absent(b)
    b.full()
    b.fleeting = set(b.expected)
    keys = b.on_stripes(*(i % 3 for i in range(20)), prefix=b"x" * 9)
    writes(b, dict.fromkeys(keys), *((key, b"x" * 60) for key in keys))
    b.plant(b.seg.stripes, 8)


@scenario(prepare=to_transact_in_full, evicts=True)
def exec_evicts(b: Bench) -> None:
    queue = [(b"SET", key, b"x" * 60) for key in b.states[0]]
    say(b, (b"MULTI",), *queue, (b"EXEC",), reply=b"+OK\r\n" + b"+QUEUED\r\n" * 20 + b"*20\r\n" + b"+OK\r\n" * 20)


def to_rename(b: Bench) -> None:
    basic(b)
    a, c = keys_of_transaction(b)[:2]
    writes(b, {a: OLD, c: b"was here"}, (c, OLD), (a, None))


@scenario(prepare=to_rename)
def rename(b: Bench) -> None:
    say(b, (b"RENAME", *b.states[0]), reply=b"+OK\r\n")


def to_copy(b: Bench) -> None:
    basic(b)
    a, c = keys_of_transaction(b)[:2]
    writes(b, {a: OLD, c: None}, (c, OLD))


@scenario(prepare=to_copy)
def copy(b: Bench) -> None:
    say(b, (b"COPY", *b.states[0]), reply=b":1\r\n")


def to_set_all(b: Bench) -> None:
    basic(b)
    keys = keys_of_transaction(b)
    writes(b, dict.fromkeys(keys), *((key, NEW) for key in keys))


@scenario(prepare=to_set_all)
def msetnx(b: Bench) -> None:
    say(b, (b"MSETNX", *(word for key in b.states[0] for word in (key, NEW))), reply=b":1\r\n")


# -- databases: what their counts say afterwards is looked at in every scenario


def to_count(b: Bench) -> None:
    basic(b)
    b.victim = [OLD]
    for d in (1, 2):
        space = b.cache.namespace(f"db:{d}")
        for i in range(60):
            space.set(b"%d" % i, b"value %d" % i, ttl=1000 if i % 3 else None)
        space.set(b"old", OLD, 1000)
        if d == 1:
            b.expected |= {space.prefix() + b"%d" % i: b"value %d" % i for i in range(60)}


@scenario(prepare=to_count)
def database_writes(b: Bench) -> None:
    space = b.cache.namespace("db:1")
    space.set(b"new", NEW, 1000)
    space.set(b"new", NEW)
    space.touch(b"new", 50)
    space.persist(b"old")
    space.delete(b"old")


@scenario(prepare=to_count)
def database_flushed(b: Bench) -> None:
    space = b.cache.namespace("db:2")
    with mock.patch.object(_core, "urandom", lambda n: b"another!"):  # one that is drawn would have its keys in other stripes each time
        space.clear()
    for i in range(8):
        space.set(b"%d" % i, NEW, 1000)


def to_store_again(b: Bench) -> None:
    """A database was flushed, and somebody keeps its former generation."""
    to_count(b)
    b.cache.set(b"kept", b.cache[b"\0ns\0db:2"])
    database_flushed(b)


@scenario(prepare=to_store_again)
def generation_stored_again(b: Bench) -> None:
    b.cache.set(b"\0ns\0db:2", b.cache[b"kept"])
    space = b.cache.namespace("db:2")
    for i in range(8):
        space.set(b"new %d" % i, NEW, 1000)
        space.delete(b"%d" % i)


def to_flush_the_first(b: Bench) -> None:
    """It has some keys, one that expires, and a claim; another database, and a namespace of workers, have keys that stay."""
    b.cache.set(VICTIM, OLD, 1000)
    b.victim = [None, OLD]
    b.fill(5)
    b.cache.get_lease(b"claimed")
    for name in ("db:1", "db:x"):
        space = b.cache.namespace(name)
        space.set(b"stays", OLD)
        b.expected[space.prefix() + b"stays"] = OLD
    b.states = [{}]


def flush_the_first(b: Bench) -> None:
    say(b, (b"FLUSHDB",), (b"DBSIZE",), reply=b"+OK\r\n:0\r\n")


@scenario(prepare=to_flush_the_first, evicts=True)
def first_flushed(b: Bench) -> None:
    flush_the_first(b)


@scenario(prepare=to_flush_the_first, evicts=True)
def first_flushed_in_a_transaction(b: Bench) -> None:
    say(b, (b"MULTI",), (b"FLUSHDB",), (b"DBSIZE",), (b"EXEC",), reply=b"+OK\r\n+QUEUED\r\n+QUEUED\r\n*2\r\n+OK\r\n:0\r\n")


@scenario(prepare=to_flush_the_first, evicts=True)
def first_flushed_in_a_step_of_one_key(b: Bench) -> None:
    """As a script does: its key goes first, and is let go of before the others go."""
    executor = _resp.Executor(b.cache, {}, impatient=False, databases=2)
    executor.hold((), further=[(0, VICTIM)], db=0)
    executor.empty_held()
    executor.let_go()
    assert executor.empty_first(0, 1 << 60) == 16


@logged(to_flush_the_first, evicts=True)
def first_flushed_in_a_transaction_logged(b: Bench) -> None:
    first_flushed_in_a_transaction(b)


def flush_in_a_step(b: Bench, flushed: int) -> None:
    """As a script does: it holds a key of database 2, and names another. Of the first generation that is drawn the key's stripe is somebody's."""
    executor = _resp.Executor(b.cache, {}, impatient=False, databases=4)
    drawn = drawn_in_order(b)
    executor.hold([b"old"], db=2)
    assert executor.hold_further([(2, b"1")]) is None
    assert executor.write(b"old", NEW, 0)
    executor.others = [(2, b"1")]
    with mock.patch.object(_resp, "urandom", lambda n: drawn.pop(0)):
        executor.renew(flushed)
    assert executor.read(b"old") is None
    assert executor.write(b"old", NEW, 0)
    assert executor.write(b"1", NEW, 0)
    executor.shed([(2, b"1")])
    executor.let_go()
    executor.release()


def busy_stripe(b: Bench) -> int:
    """The last that is of none of the keys that it holds, nor of VICTIM, whose stripe is written to after its death."""
    prefix = b.cache.namespace("db:2").prefix()
    return max({*range(16)} - {b.stripe(key) for key in (VICTIM, prefix[:-9], prefix + b"old", prefix + b"1")})


def drawn_in_order(b: Bench) -> list[bytes]:
    """Generations: the key old is in the busy stripe under the first, and the other's is taken before; neither is in it under the second."""
    busy, prefix = busy_stripe(b), b.cache.namespace("db:2").prefix()
    held = {b.stripe(prefix + b"old"), b.stripe(prefix + b"1")}

    def stripes(n: int) -> list[int]:
        return [b.stripe(b"\0ns\0db:2\0%08d" % n + key) for key in (b"old", b"1")]

    first = next(n for n in range(10_000) if stripes(n)[0] == busy > stripes(n)[1] and stripes(n)[1] not in held)
    second = next(n for n in range(1000) if busy not in stripes(n))
    return [b"%08d" % first, b"%08d" % second]


def with_one_busy(prepare: Callable[[Bench], None]) -> Callable[[Bench], None]:
    """A living process holds a stripe."""

    def prepared(b: Bench) -> None:
        prepare(b)
        b.states = [{}]
        b.plant(b.seg.stripes, busy_stripe(b))

    return prepared


def to_clear_all(b: Bench) -> None:
    to_count(b)
    b.fleeting = set(b.expected)
    b.victim = [OLD, None]


@scenario(prepare=with_one_busy(to_count), evicts=True)
def database_flushed_in_a_step(b: Bench) -> None:
    flush_in_a_step(b, 2)


@logged(with_one_busy(to_count), evicts=True)
def database_flushed_in_a_step_logged(b: Bench) -> None:
    flush_in_a_step(b, 2)


@scenario(prepare=with_one_busy(to_clear_all), evicts=True)
def all_flushed_in_a_step(b: Bench) -> None:
    flush_in_a_step(b, 0)


@logged(to_flush_the_first, evicts=True)
def first_flushed_logged(b: Bench) -> None:
    flush_the_first(b)


@scenario(prepare=to_count)
def expiry_changes(b: Bench) -> None:
    b.cache.touch(VICTIM, 1000)
    b.cache.touch(b"key:3", 1000)
    b.cache.persist(b"key:3")


def to_count_anew(b: Bench) -> None:
    """In some stripes a writer has died; the header has not been told of a database's generation."""
    to_count(b)
    b.seg.stripes["turn"][::3] |= 1
    b.seg.databases["tag"][1::3, 2] = b.seg.databases["n"][1::3, 2] = b.seg.databases["expiring"][1::3, 2] = 0
    b.seg.header["newest"][2] = 1


@scenario(prepare=to_count_anew)
def counted_anew(b: Bench) -> None:
    _resp.Executor(b.cache, {}, impatient=False, databases=16).sizes(exact=True)


def to_reach(b: Bench) -> None:
    """A living process holds the stripe of one further key, which comes behind the other's."""
    basic(b)
    writes(b, {VICTIM: OLD}, (VICTIM, NEW))
    b.plant(b.seg.stripes, max(two_stripes(b)))


def two_stripes(b: Bench) -> list[int]:
    return [(b.stripe(VICTIM) + i) % 16 for i in (3, 5)]


@scenario(prepare=to_reach)
def reach_further(b: Bench) -> None:
    """As a script does, of keys that it has not declared."""
    at = b.stripe(VICTIM)
    first, second, third, busy = ((0, key) for key in b.on_stripes((at + 1) % 16, (at + 9) % 16, *sorted(two_stripes(b))))
    executor = _resp.Executor(b.cache, {}, impatient=False)
    executor.hold([VICTIM])
    assert executor.hold_further([first, second]) is None
    assert executor.hold_further([third, busy]) == busy[1]
    assert executor.write(VICTIM, NEW, 0)
    executor.let_go()
    executor.release()
    executor.hold((), further=[first, second])
    executor.release()


# -- running one case ------------------------------------------------------------------------------------------------


def start(b: Bench, s: Scenario, armed: str) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os.environ["SHMCACHE_FAULT"] = armed
            s.act(b)
            os._exit(0)
        except BaseException as e:
            print(f"the operation raised {type(e).__name__}: {e}", file=sys.stderr, flush=True)
            os._exit(1)
    if s.meanwhile:
        s.meanwhile(b, pid)
    return pid


def die(b: Bench, s: Scenario, armed: str) -> str:
    status = os.waitpid(start(b, s, armed), 0)[1]
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"signal {os.WTERMSIG(status)}"
    return "done" if os.WEXITSTATUS(status) == 0 else "raised"


def trace(b: Bench, s: Scenario) -> list[str]:
    """The points that it passes, in order."""
    r, w = os.pipe()
    os.set_inheritable(w, True)
    with open(r) as lines:
        # a reader of its own: the pipe is smaller than what a page's cutting says
        reader = os.fork()
        if reader == 0:
            os.close(w)
            with open(f"/dev/shm/{b.name}.trace", "w") as out:
                json.dump([line.rstrip("\n") for line in lines], out)
            os._exit(0)
        ended = die(b, s, f"t{w:04d}")
        os.close(w)
        os.waitpid(reader, 0)
    assert ended == "done", ended
    with open(f"/dev/shm/{b.name}.trace") as f:
        passed: list[str] = json.load(f)
    os.unlink(f"/dev/shm/{b.name}.trace")
    return passed


def note_progress(b: Bench, passed: list[str], point: str, nth: int) -> None:
    """How far a transaction is at this passing of the point."""
    at = [i for i, name in enumerate(passed) if name == point][nth - 1]
    b.before = passed[: at + 1]
    b.done = sum(name in COMMITS for name in b.before)
    b.whole = "hold: held" in b.before and "release: begun" not in passed[:at]


def not_held(b: Bench) -> list[str]:
    """A transaction lets go of none of its stripes before its end."""
    free = [key for key in b.states[0] if not b.seg.stripes["word"][b.stripe(key)]] if b.whole else []
    return [f"in the middle of the transaction the stripes of {free} are free"] if free else []


def in_fresh_process(b: Bench, look: Callable[[Bench], list[str]]) -> tuple[list[str], dict[str, float]]:
    """look() in a forked child, which takes a row of its own: (what is wrong, how long the writes took in ms)."""
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = look(b)
        except BaseException as e:
            said = ([f"{type(e).__name__}: {e}"], {})
        with open(w, "w") as out:
            json.dump(said, out)
        os._exit(0)
    os.close(w)
    with open(r) as f:
        text = f.read()
    status = os.waitpid(pid, 0)[1]
    if status or not text:
        return [f"the checking process ended with status {status}"], {}
    said, took = json.loads(text)
    return said, took


def fallen_versions(b: Bench) -> list[str]:
    """Whoever takes over the stripes of the operation's keys gives none of them a version below that of before, nor that of before to another value."""
    wrong = []
    for key in {VICTIM, *(b.states[0] if b.states else ())}:
        value, version = b.cache.gets(key)
        b.cache.touch(b.on_stripes(b.stripe(key), prefix=b"absent")[0], 60)
        now, new = b.cache.gets(key)
        if (new < version and now is not None) or (new == version and now != value):
            wrong.append(f"{key!r} had {value!r:.40} at {version}, and has {now!r:.40} at {new}")
    return wrong


def read_all(b: Bench, evicts: bool) -> list[str]:
    wrong = []
    for key, value in b.expected.items():
        got = b.cache.get(key)
        if got != value and not (got is None and evicts and key in b.fleeting):
            wrong.append(f"{key!r} reads {got!r:.40}, not {value!r:.40}")
    got = b.cache.get(VICTIM)
    if not any(type(got) is type(v) and got == v for v in b.victim):
        wrong.append(f"the operation's key reads {got!r:.60}")
    _, scanned = _resp.Executor(b.cache, {}, impatient=False).keys(0, b.n_buckets)
    if not {key for key in b.cache.scan() if key[:1] > b"\0"} <= set(scanned):
        wrong.append("the sidecar's SCAN, which passes over stripes that count nothing, does not find all keys")
    return (wrong + read_states(b, evicts))[:5]


def read_states(b: Bench, evicts: bool) -> list[str]:
    """A transaction's keys are as they were after the writes that were done; where it evicts, after some of them, or not there."""
    got = {key: b.cache.get(key) for state in b.states[:1] for key in state}

    def is_state(state: dict[bytes, Any]) -> bool:
        return all((type(value) is type(state[key]) and value == state[key]) or (evicts and value is None) for key, value in got.items())

    if not b.states or any(map(is_state, b.states if evicts else b.states[b.done : b.done + 1])):
        return []
    return [f"after {b.done} writes its keys are { {key: str(value)[:20] for key, value in got.items()} }"]


def survivors(s: Scenario) -> Any:
    """What a fresh process sees and does after the death."""

    def look(b: Bench) -> Any:
        wrong = read_all(b, s.evicts)
        if "log_buffer" in s.options:
            wrong += log_agrees(b)
        took = {}
        began = time.monotonic()
        if b.store is None:
            wrong += fallen_versions(b)
        b.cache.set(VICTIM, b"after")
        took["same stripe"] = 1000 * (time.monotonic() - began)
        for key in b.states[0] if b.states else ():
            began = time.monotonic()
            b.cache.set(key, b"after")
            took["stripe of a transaction"] = max(took.get("stripe of a transaction", 0), 1000 * (time.monotonic() - began))
        for n in (60, 9000):
            began = time.monotonic()
            for i in range(6):
                b.cache.set(b"after:%d:%d" % (n, i), b"a" * n)
            took[f"same class {n}"] = 1000 * (time.monotonic() - began)
        if b.cache.get(VICTIM) not in (b"after", None):
            wrong.append("a later write is not read")
        s.mend(b.cache)
        wrong += b.cache.verify()
        wrong += miscounted(b)
        wrong += read_others(b, s.evicts)
        b.cache.clear()
        return wrong[:6], took

    return look


def miscounted(b: Bench) -> list[str]:
    """What the databases' counts say is what a look at each slot says, and afterwards every stripe is sure of them."""
    said, there = _resp.Executor(b.cache, {}, impatient=False, databases=16).sizes(exact=True), census.sizes(b.cache)
    wrong = [f"the databases count {said}, and have {there}"] if said != there else []
    unsure = np.flatnonzero(b.seg.stripes["turn"] & 1)
    return wrong + ([f"the stripes {unsure} do not know what they count"] if len(unsure) else []) + b.cache.verify()


def log_agrees(b: Bench) -> list[str]:
    """What a restore would make of the log for the operation's keys is what is read, once their stripes were taken over."""
    keys = {VICTIM, *(b.states[0] if b.states else ())}
    for key in keys:
        b.cache.delete(b.on_stripes(b.stripe(key), prefix=b"absent")[0])
    drain = _stream.Drain(b.cache)
    newest: dict[bytes, Any] = {}
    while drain.collect():
        with memoryview(drain) as payload:
            for r in fmt.records(payload):
                if r.key in keys and r.op != fmt.EXPIRY and (r.key not in newest or r.version >= newest[r.key].version):
                    newest[r.key] = r
        drain.drained()
    if drain.damaged:
        return ["a ring is damaged"]
    return [said for key in keys if (said := disagreement(b, key, newest.get(key)))]


def disagreement(b: Bench, key: bytes, newest: Any) -> str | None:
    """Between the newest record of a key and what is read."""
    value, version = b.cache.gets(key)
    if newest is None or newest.op == fmt.DELETE:
        return None if value is None else f"the log has {key!r} deleted, and it is read"
    logged = int.from_bytes(newest.value, "little") if newest.codec == 2 else newest.value
    if logged != value or newest.version > version:
        return f"the log has {logged!r:.40} for {key!r} at {newest.version}, {value!r:.40} is read at {version}"
    return None


def read_others(b: Bench, evicts: bool) -> list[str]:
    return [
        f"after settling {key!r} reads wrong" for key, value in b.expected.items()
        if (got := b.cache.get(key)) != value and not (got is None and (evicts and key in b.fleeting))
    ][:3]  # fmt: skip


def accounts(b: Bench) -> list[str]:
    """Chunks, pages, locks, rows: nothing is lost, nobody holds anything. All others have gone."""
    wrong = []
    chunks = _sweep.settle(b.cache)
    stats = b.cache.stats()
    in_hand = sum(c["reserved"] for c in stats["slab_classes"])
    if chunks["RETIRED"] or chunks["RESERVED"] or chunks["KEPT"] != in_hand:
        wrong.append(f"chunks {chunks}, in hand {in_hand}")
    kinds = np.bincount(b.seg.pages["word"] >> 56, minlength=5)
    if kinds[1] or kinds[3] or len(kinds) > 5:
        wrong.append(f"pages by kind {kinds}")
    if int(b.seg.header["pages_n_free"]) != kinds[0]:
        wrong.append(f"{b.seg.header['pages_n_free']} pages in the pool, {kinds[0]} are free")
    if int(b.seg.header["overflow_n_free"]) + int((b.seg.overflow["word"] >> 56 == 2).sum()) != len(b.seg.overflow):
        wrong.append("overflow buckets are lost")
    if any(np.any(words) for words in (b.seg.stripes["word"], b.seg.classes["word"], *(b.seg.header[p + "_word"] for p in ("pages", "overflow", "big")))):
        wrong.append("a lock is held by nobody")
    living = [p["pid"] for p in b.cache.processes()]
    if living != [os.getpid()]:
        wrong.append(f"rows are held by {living}")
    if b.cache.stats()["supervisor"]["alive"]:
        wrong.append("the dead supervisor lives")
    return wrong + b.cache.verify()


def stopped(b: Bench, s: Scenario, armed: str) -> tuple[list[str], dict[str, float]]:
    """Stop the child there: readers go on, writers fail fast or succeed; continued, it finishes."""
    pid = start(b, s, armed)
    status = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED)
    if status.si_code not in (os.CLD_STOPPED, os.CLD_TRAPPED):
        os.waitpid(pid, 0)
        return [f"the operation did not stop: {status}"], {}

    held = {int(i) for i in np.flatnonzero(b.seg.stripes["word"])}
    left = not_held(b)

    def look(b: Bench) -> Any:
        b.cache.lock_limit = 0.02
        took, wrong = {}, []
        waits = b.cache.counters()["lock_waits"]
        began = time.monotonic()
        wrong += read_all(b, s.evicts)
        took["reads"] = 1000 * (time.monotonic() - began)
        if b.states and b.cache.counters()["lock_waits"] != waits:
            wrong.append("a reader waited for a lock")
        refused, tried = set(), set()
        for i, key in enumerate(b.on_stripes(*range(16), prefix=b"elsewhere") if b.states else (b"elsewhere:%d" % i for i in range(40))):
            began = time.monotonic()
            small = i % 2 or b.states
            tried.add(b.stripe(key))
            try:
                b.cache.set(key, b"e" * (60 if small else 9000))
            except errors.CapacityError as e:
                if b.states and type(e) is not errors.StripeBusy:
                    wrong.append(f"a write to {key!r} was refused: {type(e).__name__}")
                if small or not s.evicts:  # in a full segment the larger ones need pages of the class whose lock may be held
                    refused.add(b.stripe(key))
            took["a write"] = max(took.get("a write", 0), 1000 * (time.monotonic() - began))
        if b.states and refused != tried & held:
            wrong.append(f"writes were refused in the stripes {sorted(refused)}, of {sorted(tried)}; held are {sorted(held)}")
        if b.states and took["a write"] > 1000:
            wrong.append(f"a write took {took['a write']:.0f} ms, and its limit is 20")
        if len(refused) > 1 and not b.states:
            wrong.append(f"writes were refused in {len(refused)} stripes of 16; one process holds one stripe")
        b.fleeting = set(b.expected)  # who cannot have the lock of a class evicts
        return wrong + read_others(b, True), took

    wrong, took = in_fresh_process(b, look)
    os.kill(pid, signal.SIGCONT)
    status = os.waitpid(pid, 0)[1]
    if status:
        wrong.append(f"continued, it ended with status {status}")
    b.done = len(b.states) - 1
    return left + wrong + read_states(b, s.evicts), took


def run(name: str, s: Scenario, stop: bool, report: dict[str, Any]) -> None:
    b = Bench(**s.options)
    with contextlib.closing(b):
        s.prepare(b)
        saved = b.save()
        passed = trace(b, s)
        counts = dict(collections.Counter(passed))
        if b.states and not s.evicts and sum(name in COMMITS for name in passed) != len(b.states) - 1:
            report["failed"].append(f"{name}: not the writes that it says: {[p for p in passed if p in COMMITS]}")
        for _ in range(15 if s.meanwhile else 0):  # the two may meet otherwise each time: what they can pass is what any of these has
            b.restore(saved)
            counts = {**collections.Counter(trace(b, s)), **counts}
        clean_up_created(b)
        for point, n in counts.items():
            if s.meanwhile or point == "lock: WAIT noted":  # how often is up to both, or to the clock
                passings = [1]
            elif stop:
                passings = sorted({1, (n + 1) // 2} if b.states else {1})
            elif (b.states and not s.evicts) or s.after:
                passings = list(range(1, n + 1))
            else:
                passings = sorted({1, 2, n} & set(range(1, n + 1)))
            for nth in passings:
                b.restore(saved)
                if not s.meanwhile:
                    note_progress(b, passed, point, nth)
                where = f"{name} / {point} / {nth} of {n}"
                if stop:
                    wrong, took = stopped(b, s, f"s{nth:04d}{point}")
                    b.unplant()
                else:
                    ended = die(b, s, f"k{nth:04d}{point}")
                    for _ in range(100 if s.meanwhile else 0):
                        if ended != "done":
                            break
                        b.restore(saved)  # the two met otherwise than when they were traced: again
                        ended = die(b, s, f"k{nth:04d}{point}")
                    b.unplant()
                    if ended == "killed":
                        report["kills"] += 1
                        left = not_held(b) + (s.after(b) if s.after else [])
                        wrong, took = in_fresh_process(b, survivors(s))
                        wrong = left + wrong
                        for what, ms in took.items():
                            report["took_ms"].setdefault(what, []).append(ms)
                    else:
                        wrong = [f"not killed there: {ended}"]
                clean_up_created(b)
                wrong = wrong + accounts_unless(b, s)
                report["hit"].add(point)
                report["failed"] += [f"{where}: {text}" for text in wrong]
                for text in wrong:
                    print(f"{where}: {text}", flush=True)
                for what, ms in took.items() if stop else ():
                    report["took_ms"].setdefault(what, []).append(ms)


# -- interleavings of two, one of whom is stopped at a point till the other has gone by -------------------------------


class Stopped:
    """A child that does act() and is stopped at a point; go() lets it finish."""

    alive: ClassVar[set[int]] = set()

    def __init__(self, b: Bench, act: Callable[[Bench], Any], point: str, nth: int = 1) -> None:
        self.pid = start(b, Scenario(nothing, act), f"s{nth:04d}{point}")
        self.alive.add(self.pid)
        status = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED)
        assert status.si_code in (os.CLD_STOPPED, os.CLD_TRAPPED), f"it does not pass {point}"

    def go(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        self.alive.discard(self.pid)
        assert os.waitpid(self.pid, 0)[1] == 0


def token_of_dead(b: Bench) -> int:
    pid = os.fork()
    if pid == 0:
        b.cache.set(VICTIM, OLD)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    row = int(np.flatnonzero(b.seg.rows["pid"] == pid)[0])
    return int(b.seg.rows["gen"][row]) << 16 | row + 1


def settler_and_reused_pages(b: Bench) -> list[str]:
    """A settler has found a page of a deleted big value to be nobody's; it is freed and taken again by another key of the same head."""
    b.cache.set(b"K1", BIG_OLD)
    f = Stopped(b, lambda b: b.cache.delete(b"K1"), "big: page to be freed")
    s = Stopped(b, lambda b: _sweep.settle(b.cache), "settle: big page nobody's")
    f.go()
    free = [k for k in (b"K2:%d" % i for i in range(100)) if (b.bucket(k) ^ b.bucket(b"K1")) & 15]  # the settler holds K1's stripe
    for key in free[:8]:  # chunks of the head's class: one of them the same
        b.put(key, BIG_OLD)
    s.go()
    return read_others(b, False) + accounts(b)


def settler_and_page_of_items(b: Bench) -> list[str]:
    """A settler has seen a page of a big value; the value is deleted and the page cut for items before it asks whose it is."""
    b.cache.set(b"K1", BIG_OLD)
    s = Stopped(b, lambda b: _sweep.settle(b.cache), "settle: big page seen")
    b.cache.delete(b"K1")
    b.full()
    s.go()
    return read_others(b, True) + accounts(b)


def evictor_and_recut_page(b: Bench) -> list[str]:
    """A hand has chosen an item; its page is drained and cut anew for smaller items, one of them in the very place."""
    b.full(b"x" * 1900, b"large")
    b.seg.refs[:] = 0
    e = Stopped(b, lambda b: b.cache.set(b"one more", b"x" * 1900), "evict: chosen")
    for i in range(60_000):
        b.put(b"small:%d" % i, b"%d" % i)
    b.fleeting = set(b.expected)
    e.go()
    for i in range(2000):
        b.put(b"later:%d" % i, b"x" * 1900)
        b.fleeting.add(b"later:%d" % i)
    return read_others(b, True) + accounts(b)


def taker_and_page_that_leaves(b: Bench) -> list[str]:
    """A page is leaving its class when the lock of that class is taken over from the dead; by the time that the taker has looked at the page it is another class's,
    with values in it."""
    b.full()
    b.seg.refs[:] = 0
    cls = b.slab_class(SMALL)
    mover = Stopped(b, lambda b: b.cache.set(b"large:0", bytes(1900)), "cut: chunk FREE")
    page = int(b.seg.classes["page_in_hand"][cls]) - 1
    assert int(b.seg.pages["word"][page]) >> 56 == 1, "it is not being cut"
    b.seg.classes["word"][cls] = token_of_dead(b)
    taker = Stopped(b, lambda b: b.cache.set(b"one more", b"x" * 60), "page: word loaded")
    assert int(b.seg.classes["word"][cls]) & MASK63 not in (0, b.me), "it has not the lock"
    mover.go()
    for i in range(1, 34):  # the page is theirs
        b.put(b"large:%d" % i, bytes(1900))
    taker.go()
    b.fleeting = set(b.expected)
    return read_others(b, True) + b.cache.verify() + accounts(b)


def dead_holder_and_stopped_successors(b: Bench) -> list[str]:
    """Somebody dies with a stripe; every free row, his too, is then being taken by processes that are stopped on the way."""
    basic(b)
    assert die(b, SCENARIOS["set_replace"], "k0001put: slot stored") == "killed"
    stopped_ = [Stopped(b, lambda b: b.cache.get(VICTIM), "row: being taken") for _ in range(5)]
    began = time.monotonic()
    b.cache.set(VICTIM, b"after")
    took = time.monotonic() - began
    for s in stopped_:
        s.go()
    return ([f"the stripe was had after {took:.2f} s"] if took > 1 else []) + read_others(b, False) + accounts(b)


def page_of_items_and_late_freer(b: Bench, point: str) -> list[str]:
    """A process that frees a page of a big value is stopped; a settler has given it to the pool, and it is cut for items by then. The freer finds the pool busy."""
    b.cache.set(b"K1", BIG_OLD)
    f = Stopped(b, lambda b: b.cache.delete(b"K1"), point)
    _sweep.settle(b.cache)
    b.full()
    b.seg.header["pages_word"] = b.me
    f.go()
    b.seg.header["pages_word"] = 0
    return read_others(b, True) + accounts(b)


def freer_stopped_before_the_row_is_asked(b: Bench) -> list[str]:
    return page_of_items_and_late_freer(b, "big: word read")


def freer_stopped_behind_it(b: Bench) -> list[str]:
    return page_of_items_and_late_freer(b, "big: page to be freed")


def write_and_clear(b: Bench, write: Callable[[Bench], Any], point: str, nth: int = 1, clear: Callable[[Bench], Any] | None = None) -> list[str]:
    """A write is stopped behind its look at what is there; all is cleared meanwhile. What it stores on that ground is cleared, too, all of it."""
    w = Stopped(b, write, point, nth)
    (clear or (lambda b: b.cache.clear()))(b)
    left = set(b.cache)
    w.go()
    back = set(b.cache) - left
    b.expected = {}
    return [f"survived clear(): {key!r}" for key in back] + accounts(b)


def clear_during_cas(b: Bench) -> list[str]:
    b.cache.set(VICTIM, OLD)
    version = b.cache.gets(VICTIM)[1]
    return write_and_clear(b, lambda b: b.cache.cas(VICTIM, NEW, version), "put: found")


def clear_during_replace(b: Bench) -> list[str]:
    b.cache.set(VICTIM, OLD)
    return write_and_clear(b, lambda b: b.cache.replace(VICTIM, NEW), "put: found")


def clear_during_append(b: Bench) -> list[str]:
    b.cache.set(VICTIM, OLD)
    return write_and_clear(b, lambda b: say(b, (b"APPEND", VICTIM, NEW), reply=b":%d\r\n" % len(OLD + NEW)), "put: found")


def clear_during_rename(b: Bench) -> list[str]:
    b.cache.set(VICTIM, OLD)
    return write_and_clear(b, lambda b: say(b, (b"RENAME", VICTIM, b"other"), reply=b"+OK\r\n"), "put: reserved")


def clear_during_msetnx(b: Bench) -> list[str]:
    return write_and_clear(b, lambda b: say(b, (b"MSETNX", b"one", b"1", b"two", b"2"), reply=b":1\r\n"), "put: found", 2)


def rename_during_clear(b: Bench) -> list[str]:
    """clear() has seen one empty stripe when the only item goes there, from a stripe at which it has not looked."""
    to, key = b.on_stripes(0, 9)
    b.cache.set(key, OLD)
    c = Stopped(b, lambda b: b.cache.clear(), "clear: stripe looked at")
    say(b, (b"RENAME", key, to), reply=b"+OK\r\n")
    c.go()
    left = [k for k in (key, to) if b.cache.get(k) is not None]
    return [f"{left} is there still"] * bool(left) + accounts(b)


def clear_of_a_database_during_exec(b: Bench) -> list[str]:
    """Of a database with a generation of its own: what the second command stores is cleared with what the first has."""
    say(b, (b"SELECT", b"1"), (b"SET", VICTIM, OLD), reply=b"+OK\r\n" * 2)
    space = b.cache.namespace("db:1")
    while b.stripe(b"\0ns\0db:1") in (b.stripe(space.prefix() + b"one"), b.stripe(space.prefix() + b"two")):
        space.clear()  # its stripe is not to be one of those that the stopped process holds
    words = ((b"SELECT", b"1"), (b"MULTI",), (b"SET", b"one", b"1"), (b"SET", b"two", b"2"), (b"EXEC",))
    replies = b"+OK\r\n" * 2 + b"+QUEUED\r\n" * 2 + b"*2\r\n" + b"+OK\r\n" * 2
    w = Stopped(b, lambda b: say(b, *words, reply=replies), "put: released")
    b.cache.namespace("db:1").clear()
    w.go()
    say(b, (b"SELECT", b"1"), (b"MGET", b"one", b"two"), reply=b"+OK\r\n*2\r\n$-1\r\n$-1\r\n")
    return accounts(b)


def persist_during_get(b: Bench) -> list[str]:
    """A reader is stopped by the clock until the key's first time is over; it was given more meanwhile."""
    b.cache.set(VICTIM, OLD, ttl=0.5)
    wrong: list[str] = []

    def read(b: Bench) -> None:
        assert b.cache.get(VICTIM) == OLD

    readers = [Stopped(b, read, "read: clock"), Stopped(b, lambda b: list(b.cache).index(VICTIM), "scan: clock")]
    ttl = Stopped(b, lambda b: os._exit(b.cache.ttl(VICTIM) != float("inf")), "ttl: read")
    b.cache.persist(VICTIM)
    time.sleep(0.6)
    for name, reader in zip(("get", "scan", "ttl"), [*readers, ttl], strict=True):
        try:
            reader.go()
        except AssertionError:
            wrong.append(f"{name} missed a key that was there all the while")
    return wrong + accounts(b)


def set_during_ttl(b: Bench) -> list[str]:
    """A value that may be given as a stale one is replaced by a plain one: what the first said of its time is nothing to the second."""
    b.cache.get_or_set(VICTIM, lambda: OLD, 10, stale_ttl=1000)
    ttl = Stopped(b, lambda b: os._exit(b.cache.ttl(VICTIM) < 1500), "ttl: read")
    b.cache.set(VICTIM, NEW, ttl=2000)
    try:
        ttl.go()
    except AssertionError:
        return ["ttl took the former value's time off"]
    return accounts(b)


def real_time_thread_behind_a_log_record(b: Bench) -> list[str]:
    """Two threads on one CPU write large values, which run without the interpreter; the ordinary one is slow within its ring. A SCHED_FIFO
    thread that spun for it would have the CPU until the kernel throttles it, a second later."""
    name, took = b.name + "-new", mmap.mmap(-1, 8)
    large = bytes(33 << 20)  # _core.LONG_COPY

    def write(cache: shmcache.Cache, key: bytes, n: int, policy: int) -> None:
        os.sched_setscheduler(0, policy, os.sched_param(policy != os.SCHED_OTHER))
        for _ in range(n):
            began = time.thread_time()
            cache.set(key, large)
            if policy != os.SCHED_OTHER:
                time.sleep(0.02)  # till the other one is within its ring
                took[:] = struct.pack("d", max(struct.unpack("d", took[:])[0], time.thread_time() - began))

    with shmcache.create(name, "256M", log_buffer="64K") as cache:
        shmcache.unlink(name)
        appendlog.mark(cache, log_policy=1)
        pid = os.fork()
        if pid == 0:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            os.environ["SHMCACHE_FAULT"] = "d7,0,10000,0,0,0,1,ring: record copied"
            threads = [threading.Thread(target=write, args=(cache, b"ordinary", 20, os.SCHED_OTHER)),
                       threading.Thread(target=write, args=(cache, b"first", 20, os.SCHED_FIFO))]  # fmt: skip
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
    most = struct.unpack("d", took[:])[0]
    return ([f"it ended with {status}"] if status or not most else []) + ([f"a set of 33 MiB used {most:.2f} s of its CPU"] if most > 0.5 else [])


def large_get_beside_a_writer(b: Bench) -> list[str]:
    """Each copy of a large value is overtaken by the next set of its key: the third one is made under the stripe."""
    b.cache.set(VICTIM, BIG_OLD)
    before = b.cache.counters()["retries"]
    reader = start(b, Scenario(nothing, lambda b: b.cache[VICTIM]), "d7,0,2000,0,0,0,1,read: copied")
    while os.waitpid(reader, os.WNOHANG) == (0, 0):
        b.cache.set(VICTIM, BIG_NEW)
    tries = b.cache.counters()["retries"] - before
    return [f"the value was read {tries + 1} times"] if tries > 8 else []  # some are overtaken before they copy; 65 without that


RACES = [
    large_get_beside_a_writer,
    real_time_thread_behind_a_log_record,
    clear_during_cas,
    clear_during_replace,
    clear_during_append,
    clear_during_rename,
    clear_during_msetnx,
    rename_during_clear,
    clear_of_a_database_during_exec,
    persist_during_get,
    set_during_ttl,
    taker_and_page_that_leaves,
    dead_holder_and_stopped_successors,
    settler_and_reused_pages,
    settler_and_page_of_items,
    evictor_and_recut_page,
    freer_stopped_before_the_row_is_asked,
    freer_stopped_behind_it,
]


def accounts_unless(b: Bench, s: Scenario) -> list[str]:
    if s.prepare is no_overflow_left:  # its overflow buckets were hidden by hand: free again, and the pool made anew
        words, linked = b.seg.overflow["word"], set()
        for at in b.seg.buckets["overflow"][b.seg.buckets["overflow"] != 0]:
            while at:
                linked.add(int(at) - 1)
                at = b.seg.overflow["next"][int(at) - 1]
        for i in range(len(words)):
            if i not in linked and int(words[i]) >> 56 == 2:
                words[i] = 0
        free = [i for i in range(len(words)) if int(words[i]) == 0]
        for i, after in zip(free, [*free[1:], None], strict=True):
            b.seg.overflow["next"][i] = 0 if after is None else after + 1
        b.seg.header["overflow_list"] = free[0] + 1 if free else 0
        b.seg.header["overflow_n_free"] = len(free)
    return accounts(b)


def clean_up_created(b: Bench) -> None:
    try:
        shmcache.unlink(b.name + "-new")
    except shmcache.SegmentNotFound:
        pass


def cases(stop: bool) -> dict[str, Scenario | Callable[[Bench], list[str]]]:
    """All that there is to run, by name."""
    taken_over = {
        **{f"take over after {first} / {point}": after_death(first, point) for first, point in FIRST_DEATHS},
        **{f"settle after {first} / {point}": after_death(first, point, settle_first=True) for first, point in SETTLED_AT_ONCE},
    }
    scenarios = {name: s for name, s in SCENARIOS.items() if not (stop and s.after)}  # before a store a miss loads, and so writes
    return {**scenarios, **({} if stop else taken_over), **{race.__name__: race for race in RACES}}


def run_race(name: str, case: Callable[[Bench], list[str]], report: dict[str, Any]) -> None:
    with contextlib.closing(Bench()) as b:
        try:
            report["failed"] += case(b)
        finally:
            for pid in Stopped.alive:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            Stopped.alive.clear()
    for text in report["failed"]:
        print(f"{name}: {text}", flush=True)


def one(name: str, stop: bool) -> tuple[float, dict[str, Any]]:
    """Run this one, in this process and children of it: how long it took, and the report."""
    report: dict[str, Any] = {"kills": 0, "failed": [], "hit": set(), "took_ms": {}}
    began, case = time.monotonic(), cases(stop)[name]
    try:
        if isinstance(case, Scenario):
            run(name, case, stop, report)
        else:
            run_race(name, case, report)
    except Exception as e:  # the others are run all the same
        traceback.print_exc()
        report["failed"].append(f"{name}: it raised {type(e).__name__}: {e}")
    return time.monotonic() - began, report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="scenarios whose name contains this; may be given several times")
    parser.add_argument("--stop", action="store_true", help="SIGSTOP and SIGCONT instead of SIGKILL")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="scenarios at a time (the number of CPUs)")
    args = parser.parse_args(argv)
    if not special.points_of_build():
        folder = special.build("-DSHMCACHE_FAULT_POINTS")
        argv_, env = special.command(folder, "tests.crash.matrix", *sys.argv[1:])
        return subprocess.run(argv_, env=env, cwd=folder).returncode
    os.environ.pop("SHMCACHE_FAULT", None)
    names = [name for name in cases(args.stop) if args.only is None or any(part in name for part in args.only)]
    if unknown := [part for part in args.only or () if not any(part in name for name in names)]:
        parser.error(f"no scenario has a name with {unknown}")
    report: dict[str, Any] = {"kills": 0, "failed": [], "hit": set(), "took_ms": {}}
    began = time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
        for name, (seconds, of) in zip(names, pool.map(one, names, [args.stop] * len(names)), strict=True):
            report["kills"] += of["kills"]
            report["failed"] += of["failed"]
            report["hit"] |= of["hit"]
            for what, ms in of["took_ms"].items():
                report["took_ms"].setdefault(what, []).extend(ms)
            bad = len(of["failed"])
            print(f"{name:60} {seconds:6.1f} s{f'  {bad} FAILED' if bad else ''}", flush=True)
    missed = sorted(special.points_of_build() - report["hit"])
    print(f"{report['kills']} kills at {len(report['hit'])} points in {len(names)} scenarios, {time.monotonic() - began:.0f} s; failed: {len(report['failed'])}")
    for what, ms in report["took_ms"].items():
        print(f"  {what}: median {np.median(ms):.2f} ms, 99 % {np.percentile(ms, 99):.1f}, worst {max(ms):.1f}; over 100 ms: {sum(m > 100 for m in ms)} of {len(ms)}")
    if missed and not args.only and not args.stop:
        print("points never passed:", missed)
        return 1
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
