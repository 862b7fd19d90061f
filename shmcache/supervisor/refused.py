"""Rows that the store refuses: they stay dirty, and are set aside. `Refused` is the supervisor's, `ask`, `retry` and `drop` an operator's.

What is known of them is the supervisor's, in its memory; its successor learns it when they are refused again. An operator's process puts a
question under a key of the cache's own, and the supervisor puts the answer in its place. Nothing is there but for that moment: what counts,
lists or dumps keys meets no key that no user has set.

Race table
    retry, drop vs a write      they are of one version: the write wins, and they say that there is no such row any more
    drop vs the row's store     whichever takes the stripe first: there is nothing to drop any more; or what was dropped is stored all the
                                same, by the call that was going on, and what was loaded meanwhile goes (WriteBack._stored)
    retry vs the row's store    what has the new version is dirty, and stored over the other: the same value
    ask vs ask                  one takes the other's question or answer away, which is asked again
Crash: a retry or a drop is done or not (core/table.pxd). A question or an answer that is left expires.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from shmcache import errors
from shmcache.core import _core, _dirty
from shmcache.stores import masked
from shmcache.supervisor.batch import BYTES

if TYPE_CHECKING:
    from collections.abc import Container

    from shmcache.cache import Cache

ASKED = b"\x00try\x00writeback\x00refused"  # it begins like the sidecar's copies (_resp.ASIDE), so that KEYS does not show it
ANSWER_WAIT = 5.0  # seconds
POLL = 0.01
NEVER = (1 << 64) - 1  # of flushes_ended: Cache._flushed(NEVER) rings the supervisor
LISTED = 1000  # rows
LISTED_BYTES = 256 << 10
LONGEST_ERROR = 300  # characters
ERRORS = 10_000  # of so many rows what was said; of the others the error's class
FIRST_RETRY = 60.0  # seconds after a row was refused; twice as long after each further time
FIRST_RETRY_ALONE = 1.0  # of one that failed alone, twice, while others were stored
LONGEST_RETRY = 3600.0


class Row(NamedTuple):
    version: int
    size: int  # bytes, as header.dirty counts them
    error: str
    since: float  # wall clock
    tries: int
    again: float  # monotonic
    alone: bool  # the store does not say so; it fails with this row, and not with others


class Refused:
    """What is known of the rows that the store refused. For one thread."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Row] = {}
        self.size = 0  # of all, in bytes
        self.changes = 0
        self.some_wait = False

    def has(self, key: bytes, version: int) -> bool:
        row = self.rows.get(key)
        return row is not None and row.version == version

    def waiting(self) -> dict[bytes, int]:
        """Key -> version of those that are not to be tried yet."""
        now = _core.monotonic()
        return {key: row.version for key, row in self.rows.items() if now < row.again}

    def add(self, key: bytes, version: int, size: int, error: Exception, alone: bool) -> bool:
        """It was refused, so that it is tried later, and later each time. Returns: is it new?"""
        known = self.rows.get(key)
        tries = known.tries + 1 if known and known.version == version else 1
        wait = (FIRST_RETRY_ALONE if alone else FIRST_RETRY) * 2 ** min(tries - 1, 30)  # 30: by then it is the longest one
        again = _core.monotonic() + min(wait, LONGEST_RETRY)
        text = sys.intern(type(error).__name__)
        if len(self.rows) < ERRORS + (known is not None):
            text = masked(f"{text}: {error}")[:LONGEST_ERROR].encode("utf-8", "backslashreplace").decode()
        self.rows[key] = Row(version, size, text, known.since if known else time.time(), tries, again, alone)  # it is there all the while
        self.size += size - (known.size if known else 0)
        self.changes += 1
        self.some_wait = True
        return tries == 1

    def remove(self, key: bytes) -> None:
        row = self.rows.pop(key, None)
        if row is not None:
            self.size -= row.size
            self.changes += 1

    def stored(self, key: bytes, version: int) -> bool:
        """The store has it. If it has taken what it refused before, it may take the others, too: True, and they are to be tried at once."""
        taken = self.has(key, version)
        self.remove(key)
        if taken and self.some_wait:
            self.rows = {k: row._replace(again=0.0) for k, row in self.rows.items()}
            self.some_wait = False
        return taken and len(self.rows) > 0

    def keep(self, seen: Container[bytes]) -> None:
        """Forget all but these."""
        for key in [key for key in self.rows if key not in seen]:
            self.remove(key)

    def answer(self, cache: Cache) -> None:
        """Answer an operator who asks, if one does. By any thread. Raises: CapacityError."""
        asked = _asked(cache)
        if not isinstance(asked.get("asks"), bytes):
            return
        key, known = asked.get("key"), list(self.rows.copy().items())  # the thread changes it
        if isinstance(key, bytes):
            known = [(k, row) for k, row in known if k == key]
        rows: list[list[Any]] = []
        now, ahead = time.time(), _core.monotonic()
        room = min(LISTED_BYTES, cache.stats()["slab_bytes"] >> 6, cache.mapping.settings()["max_value_bytes"] >> 1)
        for key, row in itertools.islice(known, LISTED):
            room -= len(key) + len(row.error.encode()) + 64
            if room < 0 and rows:
                break
            rows.append([key, row.version, row.error, row.since, row.tries, now + max(0.0, row.again - ahead)])
        cache.set(ASKED, {"answers": asked["asks"], "in_all": len(self.rows), "rows": rows}, ttl=ANSWER_WAIT)


class Listed(NamedTuple):
    """A row of an answer. since, again: wall clock, when it was refused first and when it is tried next."""

    key: bytes
    version: int
    error: str
    since: float
    tries: int
    again: float


def ask(cache: Cache, key: bytes | None = None) -> tuple[list[Listed], int]:
    """The first rows that the store refuses, or that one, and how many there are in all. Raises: UsageError: nobody runs who knows;
    StripeBusy: it does not answer; CapacityError."""
    token, until = os.urandom(8), _core.monotonic() + ANSWER_WAIT
    while cache.segment.header["flush_refused"]:
        if not cache.supervisor()["alive"]:
            raise errors.UsageError(
                f"{cache.name} has no supervisor, which would know what the store refuses: start one, with --store, and ask again"
            )
        found = _asked(cache)
        if found.get("asks", found.get("answers")) != token:
            cache.set(ASKED, {"asks": token, "key": key}, ttl=ANSWER_WAIT)
        elif "answers" in found:
            cache.discard(ASKED)
            return [Listed(*row) for row in found["rows"]], found["in_all"]
        if _core.monotonic() > until:
            raise errors.StripeBusy(f"the supervisor has not answered for {ANSWER_WAIT:.0f} s: is it stopped, or without --store?")
        cache._flushed(NEVER, 0.0, False)
        time.sleep(POLL * random.uniform(0.5, 2.0))
    return [], 0


def _asked(cache: Cache) -> dict[str, Any]:
    """The question or the answer that stands there."""
    try:
        found: Any = cache.peek(ASKED)
    except errors.DamageError:  # another's
        found = None
    return found if isinstance(found, dict) else {}


def find(cache: Cache, key: bytes) -> Listed:
    """Raises: UsageError: it is not refused, or as ask()."""
    for row in ask(cache, key)[0]:
        return row
    raise errors.UsageError(f"{key!r} is not among the rows that the store refuses: look at the list again")


def retry(cache: Cache, row: Listed) -> bool:
    """Let a row be tried at once: it gets a new version. False: it was written, stored or dropped meanwhile."""
    return _dirty.Dirty(cache).renew(row.key, row.version, row.version)


def retry_all(cache: Cache) -> int:
    """The same for whatever is not stored yet: how many rows that were."""
    dirty, at, n = _dirty.Dirty(cache), 0, 0
    dirty.most_bytes = BYTES
    while True:
        items, at = dirty.walk(at, 500)
        n += sum(dirty.renew(item[0], item[4], item[4]) for item in items)
        if at == 0:
            return n


def hurry(cache: Cache) -> None:
    """Let the supervisor begin a pass at once."""
    asked = cache._ask_flush()
    if asked:
        cache._flushed(asked, 0.0, False)


def drop(cache: Cache, row: Listed) -> bool:
    """Give up what the store refuses: the value leaves the cache, and the store keeps what it has. False: as of retry(). Raises:
    CapacityError."""
    return cache._give_up(row.key, row.version)
