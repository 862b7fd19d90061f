"""What a script touches besides its KEYS: which stripes it holds for that, until when, and when it begins again.

Rules
1. the stripes of KEYS are taken before it begins, ascending, and held until it ends (Executor.hold). Those of an undeclared key are taken when
   a command names it, out of that order. So nobody is waited for while any stripe is held: it is tried
2. what was taken is kept until the script ends: it is one step, as with KEYS, while it names few keys and is quick
3. busy, and the script has written nothing: it lets go of everything and begins again, with the keys that it has named held from its start,
   ascending, waited for. What is to be seen outside is a write: PUBLISH, a line of the log, a refusal that ACL LOG notes
4. so that workers never wait long, everything undeclared is let go for good after KEPT seconds, or MOST_KEPT keys, or before a walk over all
   keys. From there on (loose) each command holds its own keys, while it runs; and each of them has to be as the script's last command
   left it (seen), by its version. Else the script begins again, or, after a write, the command is an error: no write of others is lost
5. whoever holds nothing at all (loose, without KEYS, not in a transaction) may wait for a stripe. So what clears a prefix does not fail for busy keys

Race table
  another writes a key that is kept      it waits, at most KEPT and a command, or what Lua is at between two looks at the clock
  another writes a key that was seen     the script finds another version: 3, or an error that names the key. A key that was set and deleted
                                         in between looks as it did: as with WATCH
  another holds the stripe               3; after a write an error that names the key, or 5
  two scripts name two keys, crosswise   neither waits while it holds one: the one that finds its second key busy lets go of its first
  FLUSHALL                               takes no lock: what is held is as it was, what is named after it is taken as busy
Crash: as of KEYS: each stripe is repaired by itself, what was written stands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from shmcache import errors
from shmcache.core import _core
from shmcache.sidecar.commands.table import Error

if TYPE_CHECKING:
    from shmcache.core._resp import Executor

    Key = tuple[int, bytes]  # of this database

KEPT = 0.01  # seconds, and
MOST_KEPT = 32  # keys, whose stripes are kept
MOST_BEGINNINGS = 5
MARGIN = 0.02  # seconds before its time is over in which a script waits for no key: it is told which one is busy
SHORT = 0.001  # that it waits at least
WALKS = {"keys", "dbsize", "randomkey", "flushdb", "flushall"}  # and what else takes long, and has no keys

NAME_IT = "name it among the KEYS of the script"
REFUSED = "ERR Script attempted to access the key '{}', which is not among its KEYS: name it there"
BUSY = "TRYAGAIN the key '{}' is busy, and a script that has written, or has begun too often, does not wait for it: " + NAME_IT
CHANGED = "TRYAGAIN the key '{}' was changed by others while the script ran: " + NAME_IT


class Again(Exception):
    """The script is to begin again."""


class Time:
    """Until when a script may run (monotonic seconds). What it waits for others is not counted, but within `latest`."""

    def __init__(self) -> None:
        self.deadline = self.latest = 0.0

    def begin(self, at: float, limit: float) -> None:
        self.deadline, self.latest = at + limit, at + 2 * limit

    @property
    def left(self) -> float:
        return self.deadline - _core.monotonic()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        began = _core.monotonic()
        try:
            yield
        finally:
            self.deadline = min(self.deadline + _core.monotonic() - began, self.latest)


class Reach:
    """Of one script, over all its beginnings. Args: ex: the thread's. declared: its KEYS, in database db. log_bytes: of what it will log. allowed:
    may it name other keys?"""

    def __init__(self, ex: Executor, db: int, declared: list[bytes], log_bytes: int, time: Time, allowed: bool) -> None:
        self.ex, self.db, self.log_bytes, self.time, self.allowed = ex, db, log_bytes, time, allowed
        self.declared = {(db, key) for key in declared}
        self.nested = ex.holds  # within a transaction, which cannot begin again
        self.wanted: dict[Key, None] = {}  # held from its next beginning on
        self.beginnings = 0

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """It runs from its start. Raises: StripeBusy, LogFull: it does not."""
        self.wrote, self.loose = self.nested, False
        self.kept, self.since = dict(self.wanted), _core.monotonic()
        self.seen: dict[Key, int] = {}  # their versions
        self.used: Collection[Key] = ()  # by the command that runs, and held for it alone
        self.beginnings += 1
        if not self.nested and (self.declared or self.wanted):
            with self.time.stopped():
                self.ex.hold([key for _, key in self.declared], self.log_bytes, further=self.wanted, db=self.db)
            self.since = _core.monotonic()
        try:
            yield
        finally:
            if self.nested:
                self.ex.let_go()
            elif self.ex.holds:
                self.ex.release()

    def enter(self, name: str, keys: list[Key], size: int, writes: bool) -> None:
        """A command is about to run. size: of what it may log. Then leave() is to be called. Raises: Again; Error; LogFull: it does not run."""
        others = [key for key in dict.fromkeys(keys) if key not in self.declared]
        if others and not self.allowed:
            others = [key for key in others if (self.db, key[1]) not in self.declared]  # COPY to another database
            if others:
                raise Error(REFUSED.format(shown(others[0])))
        try:
            if others:
                self.take(others, size, writes)
            elif name in WALKS and self.kept:
                self.loosen()
        except BaseException:
            if self.loose:
                self.ex.let_go()
            raise
        self.wrote = self.wrote or writes

    def take(self, keys: list[Key], size: int, writes: bool) -> None:
        missing = [key for key in keys if key not in self.kept]
        if not missing:
            return
        if len(self.kept) + len(missing) > MOST_KEPT:
            self.loosen()
            missing = keys
        ex, busy = self.ex, None
        if ex.holds:
            busy = ex.hold_further(missing)
            if busy is not None:
                self.begin_again(keys)
                self.loosen()
                missing = keys
        if not ex.holds:
            if len(missing) > MOST_KEPT and not any(key in self.seen for key in missing):  # as outside of scripts: each by itself
                if not writes:
                    self.seen.update(zip(missing, ex.versions(missing), strict=True))
                return
            self.wait(missing, size)
        elif busy is not None:
            raise Error(BUSY.format(shown((0, busy))))
        known = [key for key in missing if key in self.seen]
        for key, version in zip(known, ex.versions(known), strict=True):
            if version != self.seen[key]:
                self.begin_again(keys)
                raise Error(CHANGED.format(shown(key)))
        if self.loose:
            self.used = missing
        else:
            if not self.kept:
                self.since = _core.monotonic()
            self.kept.update(dict.fromkeys(missing))

    def wait(self, keys: list[Key], size: int) -> None:
        """For the stripes of these; nothing is held."""
        try:
            with self.time.stopped():
                self.ex.hold((), size, further=keys, within=max(self.time.left - MARGIN, SHORT))
        except errors.StripeBusy:
            raise Error(BUSY.format(shown(keys[0]))) from None

    def begin_again(self, keys: list[Key]) -> None:
        """With these held, too: unless that cannot be. Raises: Again."""
        if not self.wrote and self.beginnings < MOST_BEGINNINGS:
            self.wanted = dict.fromkeys([*self.kept, *keys])
            raise Again

    def leave(self) -> None:
        """The command is over."""
        if self.used:
            try:
                self.seen.update(zip(self.used, self.ex.versions(self.used), strict=True))
            finally:
                self.used = ()
                self.ex.let_go()

    def look(self) -> None:
        """Between two commands: has it kept others waiting for long?"""
        if self.kept and _core.monotonic() - self.since > KEPT:
            self.loosen()

    def loosen(self) -> None:
        kept = list(self.kept)
        self.loose = True
        self.kept.clear()
        try:
            self.seen.update(zip(kept, self.ex.versions(kept), strict=True))
        finally:
            self.ex.let_go()


def shown(key: Key) -> str:
    return key[1][:128].decode("utf-8", "surrogateescape")
