"""What a script touches besides its KEYS: which stripes it holds for that, until when, and when it begins again.

Rules
1. the stripes of KEYS are taken before it begins, ascending, and held until it ends (Executor.hold). Those of an undeclared key are taken
   when a command names it, out of that order. So nobody is waited for while any stripe is held: it is tried
2. what was taken is kept until the script ends: it is one step, as with KEYS, while it names few keys and is quick
3. busy, and the script has written nothing: it lets go of everything, waits for that key, and begins again, with the keys that it has
   named held from its start, ascending. What is to be seen outside is a write: PUBLISH, a line of the log, a refusal that ACL LOG notes
4. so that workers never wait long, all undeclared keys are let go after KEPT seconds, or MOST_KEPT keys, or before a walk over all keys.
   From there on (loose) a command that writes holds its own keys while it runs; one that only reads until another names other keys, or
   KEPT is over. Each key has to be as the script's last command left it (seen), by its version: else the script begins again, or, after
   a write, the command is an error. No write of others is lost
5. a script that holds nothing at all (loose, without KEYS, not in a transaction) may wait for a stripe. So one that clears a prefix does
   not fail for busy keys

Race table
  another writes a key that is held      it waits: for KEPT and a command at most, or until Lua looks at the clock
  another writes a key that was seen     the script finds another version: 3, or an error that names the key. A key that was set and
                                         deleted in between looks as it did, as with WATCH
  another holds the stripe               3; after a write 5, or an error that names the key
  two scripts name two keys, crosswise   neither waits while it holds one: the one that finds its second key busy lets go of its first
  FLUSHALL                               takes no lock: what is held is as it was, what is named after it is taken as busy
Crash: as of KEYS: each stripe is repaired by itself, what was written stands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shmcache import errors
from shmcache.core import _core
from shmcache.sidecar.commands.table import Error
from shmcache.sidecar.commands.transactions import call

if TYPE_CHECKING:
    from shmcache.core._resp import Executor
    from shmcache.sidecar.server import Connection

    Key = tuple[int, bytes]  # of this database

KEPT = 0.02  # seconds, and: a command may wait for Python's lock, 5 ms
MOST_KEPT = 32  # keys, whose stripes are kept
MOST_BEGINNINGS = 5
MARGIN = 0.02  # seconds before its last time is over in which a script waits for no key: it is told which one is busy
SHORT = 0.001  # that it waits at least
FLUSHES = {b"flushdb", b"flushall"}
WALKS = {b"keys", b"dbsize", b"randomkey", *FLUSHES}  # they take long, and have no keys

NAME_IT = "name it among the KEYS of the script"
REFUSED = "ERR Script attempted to access the key '{}', which is not among its KEYS: name it there"
BUSY = "TRYAGAIN the key '{}' is busy, and this script waits for it no longer: " + NAME_IT
CHANGED = "TRYAGAIN the key '{}' was changed by others while the script ran: " + NAME_IT


class Again(Exception):
    """The script is to begin again."""


class Time:
    """Until when a script may run (monotonic seconds). What it waits for others is not counted, but it ends at `latest`."""

    def __init__(self) -> None:
        self.deadline = self.latest = 0.0

    def begin(self, at: float, limit: float) -> None:
        self.deadline, self.latest = at + limit, at + 2 * limit

    @property
    def left(self) -> float:
        return self.deadline - _core.monotonic()


class Reach:
    """Of one script, over all its beginnings. Args: ex: the thread's. declared: its KEYS, in database db. log_bytes: of what it will log.
    allowed: may it name other keys?"""

    def __init__(self, ex: Executor, db: int, declared: list[bytes], log_bytes: int, time: Time, allowed: bool) -> None:
        self.ex, self.db, self.log_bytes, self.time, self.allowed = ex, db, log_bytes, time, allowed
        self.declared = {(db, key) for key in declared}
        self.nested = ex.holds  # within a transaction, which cannot begin again
        self.wanted: dict[Key, None] = {}  # held from its next beginning on
        self.awaited: list[Key] = []  # those of them for which it begins again
        self.beginnings = 0

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """It runs from its start. Raises: Error, StripeBusy, LogFull: it does not."""
        self.wrote, self.loose = self.nested, False
        self.held = dict(self.wanted)  # undeclared keys whose stripes are held
        self.seen: dict[Key, int] = {}  # the versions of others that it has named
        self.beginnings += 1
        for key in self.awaited[:MOST_KEPT]:  # each while nothing is held: whoever has it may not run
            with self.waits(key):
                self.ex.hold((), further=[key], db=self.db, within=self.patience)
            self.ex.release()
        if not self.nested and (self.declared or self.wanted):
            with self.waits():
                self.ex.hold([key for _, key in self.declared], self.log_bytes, further=self.wanted, db=self.db)
        self.since = _core.monotonic()  # when the first of them was taken
        try:
            yield
        finally:
            self.held = {}
            if self.nested:
                self.ex.let_go()
            elif self.ex.holds:
                self.ex.release()

    def run(self, caller: Connection, words: list[bytes], keys: list[Key], writes: bool) -> None:
        """A command of the script. Raises: Again; Error, StripeBusy, LogFull: it has not run."""
        others = [key for key in dict.fromkeys(keys) if key not in self.declared]
        if others and not self.allowed:
            others = [key for key in others if (self.db, key[1]) not in self.declared]  # COPY to another database
            if others:
                raise Error(REFUSED.format(shown(others[0][1])))
        name = words[0].lower()
        if self.held and name in WALKS:
            self.loosen()
        if name in FLUSHES:
            self.seen.clear()  # whatever was there, this script has removed it
        size = sum(map(len, words)) + 64 * len(keys)
        if not self.loose:
            self.keep([key for key in others if key not in self.held], size)
        if others and self.loose:
            self.run_loose(caller, words, others, size, writes)
            return
        self.wrote = self.wrote or writes
        call(caller, words)

    def keep(self, keys: list[Key], size: int) -> None:
        """The stripes of these, too; or let go of all. Raises: Again; Error."""
        if not keys:
            return
        if len(self.held) + len(keys) > MOST_KEPT:
            self.loosen()
            return
        if not self.ex.holds:
            with self.waits(keys[0]):
                self.ex.hold((), size, further=keys, db=self.db, within=self.patience)
        elif self.ex.hold_further(keys) is not None:
            self.begin_again(keys)
            self.loosen()
            return
        if not self.held:
            self.since = _core.monotonic()
        self.held.update(dict.fromkeys(keys))

    def run_loose(self, caller: Connection, words: list[bytes], keys: list[Key], size: int, writes: bool) -> None:
        if not all(key in self.held for key in keys):
            self.loosen()
        if self.held or (len(keys) > MOST_KEPT and not self.ex.holds and not any(key in self.seen for key in keys)):
            if not self.held and not writes:  # as outside of scripts: each key by itself
                self.seen.update(zip(keys, self.ex.versions(keys), strict=True))
            self.wrote = self.wrote or writes
            call(caller, words)
            if writes:
                self.loosen()
            return
        with contextlib.nullcontext() if self.ex.holds else self.waits(keys[0]):
            why = caller.call_alone(words, keys, self.seen, not writes, size, self.patience)
        if why is not None:
            busy, key = why
            self.begin_again(keys)
            raise Error((BUSY if busy else CHANGED).format(shown(key)))
        self.wrote = self.wrote or writes
        if not writes:  # what it has read may be why it changes them
            self.since, self.held = _core.monotonic(), dict.fromkeys(keys)

    @property
    def patience(self) -> float:
        """Seconds for which it waits for a stripe."""
        return max(self.time.latest - _core.monotonic() - MARGIN, SHORT)

    @contextlib.contextmanager
    def waits(self, key: Key | None = None) -> Iterator[None]:
        """Around Executor.hold(): its time stands still until it has the stripes. Raises: Error: they are busy, this key or another."""
        began = _core.monotonic()
        try:
            yield
        except errors.StripeBusy:
            if key is None:
                raise
            raise Error(BUSY.format(shown(key[1]))) from None
        finally:
            taken = self.ex.held_ns / 1e9
            waited = (taken if taken >= began else _core.monotonic()) - began
            self.time.deadline = min(self.time.deadline + waited, self.time.latest)

    def begin_again(self, keys: list[Key]) -> None:
        """With these held, too: unless that cannot be. Raises: Again."""
        if not self.wrote and self.beginnings < MOST_BEGINNINGS:
            self.wanted, self.awaited = dict.fromkeys([*self.held, *keys]), keys
            raise Again

    def look(self) -> None:
        """Between two commands: has it kept others waiting for long?"""
        if self.held and _core.monotonic() - self.since > KEPT:
            self.loosen()

    def loosen(self) -> None:
        """Let go of what is held of the undeclared, and keep no more."""
        keys, self.loose, self.held = list(self.held), True, {}
        try:
            self.seen.update(zip(keys, self.ex.versions(keys), strict=True))
        finally:
            self.ex.let_go()


def shown(key: bytes) -> str:
    return key[:128].decode("utf-8", "surrogateescape")
