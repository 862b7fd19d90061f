"""What a script touches besides its KEYS: which stripes it holds for that, until when, and when it begins again.

Rules
1. the stripes of KEYS are taken before it begins, ascending, and held until it ends (Executor.hold). If none was named by a command when
   it looks at all keys (WALKS, SCAN; 9), they are let go of, for they may be patterns, and taken again when one is named. The stripe of an
   undeclared key is taken when a command names it, out of that order. So nobody is waited for while any stripe is held: it is tried
2. what was taken is kept until the script ends: it is one step, as with KEYS, while it names few keys and is quick
3. busy, and the script has written nothing: it lets go of everything, waits for that key, and begins again, with the keys that it has
   named held from its start, ascending. What is to be seen outside is a write: PUBLISH, a line of the log, a refusal that ACL LOG notes
4. so that workers never wait long, all undeclared keys are let go after KEPT seconds, or MOST_KEPT keys, or before a walk over all keys.
   From there on (loose) a command that writes holds its own keys while it runs; one that only reads until another names other keys, or
   KEPT is over. Each key that a command has named (seen) has to be as the last of them left it, by its version: else the script begins
   again, or, after a write, the command is an error. No write of others is lost, and no two scripts take the same value: a DEL, too, fails
   of a key that was read, and is gone meanwhile. What KEYS and SCAN reply is not named by that
5. a script that holds nothing at all (loose, without KEYS, not in a transaction) may wait for a stripe. So one that clears a prefix does
   not fail for busy keys. It waits in slices, after each of which it looks whether it is to end (SCRIPT KILL, SIGTERM)
6. a command of over MOST_KEPT undeclared keys runs in pieces of so many, if it is no step outside of scripts either (PIECES). If it is one,
   or writes keys that were seen and the log has room for it, it waits for one stripe alone, then tries the rest, and lets go of all for
   the next one that is busy
7. a command that reads and computes for long (takes_long) runs while its undeclared keys are not held: their versions are noted before
8. a script asks for room in the log when it takes its first stripe: for records of its KEYS, or SCRIPT_ROOM: it is kept. Once that
   is used or there is not as much, it lets go, and each command asks for its own; one that reads for as much again, under which the next
   may write. What only reads asks for none. While stripes of KEYS are held nothing more can be asked for: a write that finds no room, not
   even for a record without its value, is an error, or a gap
9. FLUSHDB and FLUSHALL of the script: what it has named is held while they run, as it was when it was seen, and afterwards, as after a
   read when it is loose. Keys of other databases than the first are under another generation then, whose stripes are taken before it is to
   be seen (Executor.renew). FLUSHDB of the first database removes key by key: what is held goes first, in one step. From there on 4 counts,
   and 5 if another stripe is busy. KEYS that no command has named are let go of before

Race table
  another writes a key that is held      it waits: for KEPT and a command at most, or until Lua looks at the clock
  another writes a key that was seen     the script finds another version: 3, or an error that names the key. A key that was set and
                                         deleted in between looks as it did, as with WATCH
  another holds the stripe               3; after a write 5, or an error that names the key
  two scripts name two keys, crosswise   neither waits while it holds one: the one that finds its second key busy lets go of its first
  FLUSHALL, FLUSHDB                      take no lock of keys: what is held is as it was, what is named after it is taken as busy
  they, while the script waits           its KEYS are under another generation: it lets go of them, and takes those of the new one
  a flush of the script                  what was seen has to be as it was, and is absent once it has succeeded: looked at under its
                                         stripes, which are held on if they are 32 at most, else let go of
  that vs another writes such a key      it waits, and has the new generation then (_resp.Executor.is_current, Client.compiled_held). In
                                         another database than the first a worker's call, MSET, DEL, or a command that is not compiled
                                         goes on with the one that it has read: what it writes is gone
  a flush of others, then of the script  3: what it has read is from before that. After a write its FLUSHDB changes nothing, for all that it
                                         does is before the other's flush, and gone; its FLUSHALL is an error
  a flush vs a stripe that it needs      3; after a write an error, and nothing was removed, but by FLUSHDB of the first database while
                                         KEYS are held: some keys are
  another script of this process holds   it is waited for, as at the script's beginning, and that is not counted; after a write until the
  several stripes (HOLDING)              script's time is over: an error of its own, which names no key
Crash: as of KEYS: each stripe is repaired by itself, what was written stands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from shmcache import errors
from shmcache.core import _core, _resp
from shmcache.sidecar.commands.table import Error, written_in
from shmcache.sidecar.commands.transactions import SCRIPT_ROOM, call
from shmcache.sidecar.replies import integer

if TYPE_CHECKING:
    from shmcache.core._resp import Executor
    from shmcache.sidecar.server import Connection

    Key = tuple[int, bytes]  # of this database

T = TypeVar("T")

KEPT = 0.02  # seconds, and: a command may wait for Python's lock, 5 ms
MOST_KEPT = 32  # keys, whose stripes are kept
MOST_BEGINNINGS = 5
MARGIN = 0.02  # seconds before its last time is over in which a script waits for no key: it is told which one is busy
SHORT = 0.001  # that it waits at least
SLICE = 0.1  # after which a wait looks whether the script is to end
LONG_READ = 1 << 20  # bytes, or for LCS pairs of them: some 3 ms at most
FLUSHES = {b"flushdb", b"flushall"}
WALKS = {b"keys", b"dbsize", b"randomkey"}  # they take long, and have no keys
PIECES = {b"del": 1, b"unlink": 1, b"exists": 1, b"touch": 1, b"mget": 1, b"mset": 2}  # no step over all keys: the arguments of each
READS_ALL = {b"bitcount", b"bitpos", b"dump", b"get", b"getrange", b"substr", b"mget"}

NAME_IT = "name it among the KEYS of the script"
REFUSED = "ERR Script attempted to access the key '{}', which is not among its KEYS: name it there"
BUSY = "TRYAGAIN the key '{}' is busy, and this script waits for it no longer: " + NAME_IT
OTHERS = "TRYAGAIN other scripts of this server hold keys, and this one waits for them no longer: name its keys among its KEYS"
TOO_LARGE = "ERR the reply is larger than a script may have"
CHANGED = "TRYAGAIN the key '{}' was changed by others, or has expired, while the script ran: " + NAME_IT


class Again(Exception):
    """The script is to begin again."""


class Time:
    """Until when a script may run (monotonic seconds). What it waits for others is not counted, but it ends at `latest`."""

    def __init__(self) -> None:
        self.deadline = self.latest = 0.0

    def begin(self, at: float, limit: float) -> None:
        self.deadline, self.latest = at + limit, at + 2 * limit

    def waited(self, seconds: float, moves: bool) -> None:
        """moves: `latest`, too."""
        self.latest += seconds * moves
        self.deadline = min(self.deadline + seconds, self.latest)

    @property
    def left(self) -> float:
        return self.deadline - _core.monotonic()


class Reach:
    """Of one script, over all its beginnings. Args: ex: the thread's. declared: its KEYS, in database db. log_bytes: of what it will log;
    0: it only reads, or there is no log. allowed: may it name other keys? doom: tells why the script is to end, if it is."""

    def __init__(
        self, ex: Executor, db: int, declared: list[bytes], log_bytes: int, time: Time, allowed: bool, doom: Callable[[], bytes | None]
    ) -> None:
        self.ex, self.db, self.time, self.allowed, self.doom = ex, db, time, allowed, doom
        self.declared = {(db, key) for key in declared}
        self.logs = log_bytes > 0
        self.log_bytes = min(max(log_bytes, SCRIPT_ROOM), ex.most_log_room) if self.logs else 0
        self.log_full = False  # when it asked: no more is asked for by what only reads
        self.nested = ex.holds  # within a transaction, which cannot begin again
        self.wanted: dict[Key, None] = {}  # held from its next beginning on
        self.awaited: list[Key] = []  # those of them for which it begins again
        self.flushed: list[int] = []  # the flush for which it begins again, so that it holds from its start what that needs
        self.beginnings = 0

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """It runs from its start. Raises: Error, StripeBusy, LogFull: it does not."""
        self.wrote, self.loose = self.nested, False
        self.touched = self.given_up = False  # its KEYS: by a command; their stripes, before any was
        self.held = dict(self.wanted)  # undeclared keys whose stripes are held
        self.named: set[Key] = set()  # undeclared keys: by a command that has run
        self.seen: dict[Key, int] = {}  # the versions of those that are not held
        self.room = self.log_bytes  # in the log: what is left of it
        self.beginnings += 1
        for key in self.awaited[:MOST_KEPT]:  # each while nothing is held: whoever has it may not run
            self.hold([key], 0)
            self.ex.release()
        if not self.nested and (self.declared or self.wanted):
            self.hold_declared()
        self.since = _core.monotonic()  # when the first of them was taken
        try:
            yield
        finally:
            self.held = {}
            if self.nested:
                self.ex.let_go()
            elif self.ex.holds:
                self.ex.release()

    def run(self, caller: Connection, words: list[bytes], keys: list[Key], writes: bool) -> bytes:
        """The reply to a command of the script. Raises: Again; Error, StripeBusy, LogFull: it has not run, or only its first PIECES."""
        others = [key for key in dict.fromkeys(keys) if key not in self.declared]
        if others and not self.allowed:
            others = [key for key in others if (self.db, key[1]) not in self.declared]  # COPY to another database
            if others:
                raise Error(REFUSED.format(shown(others[0][1])))
        name = words[0].lower()
        if not self.declared.isdisjoint(keys):
            self.touched = True
            if self.given_up:
                self.take_back()
        if name in FLUSHES:
            return self.flush(caller, words)
        if name in WALKS or name == b"scan":
            self.give_up(name)
        size = self.log_size(words, keys) if writes else 0
        is_large = self.logs and size > self.ex.most_log_room
        divides = (len(others) > MOST_KEPT or is_large) and len(words) - 1 == PIECES.get(name, 0) * len(keys)
        if divides and (is_large or not writes or self.named.isdisjoint(others)):
            return self.run_in_pieces(caller, words, keys, writes)
        long = bool(others) and self.takes_long(name, others)
        if long:
            self.look_at(others)
        elif not self.loose:
            self.keep([key for key in others if key not in self.held], size)
        if others and self.loose and not long:
            try:
                self.run_loose(caller, words, others, size, writes)
            except errors.LogFull:
                if not divides:
                    raise
                return self.run_in_pieces(caller, words, keys, writes)
        else:
            self.note(others, writes)
            call(caller, words)
        return caller.take()

    def flush(self, caller: Connection, words: list[bytes]) -> bytes:
        """The reply. What was named is held meanwhile, as it was when it was seen, and afterwards. Raises: Again; Error: nothing was
        removed."""
        everything = words[0].lower() == b"flushall"
        one_by_one = not everything and self.db == 0 and self.ex.databases > 1  # which may take long
        if one_by_one and not self.held:
            self.give_up(words[0])
        seen = [key for key in self.seen if everything or key[0] == self.db]
        if self.held and not all(key in self.held for key in seen):
            self.loosen()
            seen = [key for key in self.seen if everything or key[0] == self.db]
        if seen and not self.held:
            self.hold_seen(seen, self.log_size(words, []))
        self.ex.goes_on = not self.may_begin_again
        wrote, self.wrote = self.wrote, True
        self.ex.others = [*self.held] if len(self.held) <= MOST_KEPT else ()
        try:
            call(caller, words)
        finally:
            self.ex.others = ()
        reply = caller.take()
        if reply.startswith(b"-TRYAGAIN") and not one_by_one:  # nothing was removed: the generation's key is somebody's
            self.wrote = wrote
            self.flushed.append(0 if everything else self.db)
            self.begin_again([(0, b"\0ns\0db:%d" % db) for db in sorted({db for db, _ in (*self.declared, *self.held)} - {0})])
        if len(self.held) > MOST_KEPT:
            self.loosen()
        if not reply.startswith(b"-"):  # what there was this script has removed, what there is now is another's
            self.seen |= dict.fromkeys(seen, 0)
            if not self.nested:
                self.ex.shed(self.held)
        return reply

    def run_in_pieces(self, caller: Connection, words: list[bytes], keys: list[Key], writes: bool) -> bytes:
        """As outside of scripts: no step over all of its keys."""
        each = PIECES[words[0].lower()]
        replies: list[bytes] = []
        most = MOST_KEPT
        if writes and self.logs:
            most = max(1, min(most, self.ex.most_log_room // 2 // max(self.ex.log_room([key]) for key in keys)))
        for i in range(0, len(keys), most):
            piece = [words[0], *words[1 + i * each : 1 + (i + most) * each]]
            replies.append(self.run(caller, piece, keys[i : i + most], writes))
            if replies[-1].startswith(b"-"):
                return replies[-1]
            if sum(map(len, replies)) > caller.most_out:
                raise Error(TOO_LARGE)
        heads = [reply.split(b"\r\n", 1) for reply in replies]
        if each == 2:
            return replies[0]
        if heads[0][0].startswith(b"*"):
            return b"*%d\r\n" % len(keys) + b"".join(rest for _, rest in heads)
        return integer(sum(int(head[1:]) for head, _ in heads))

    def keep(self, keys: list[Key], size: int) -> None:
        """The stripes of these, too; or let go of all. Raises: Again; Error."""
        if keys and len(self.held) + len(keys) > MOST_KEPT:
            self.loosen()
        elif keys and not self.ex.holds:
            self.room = max(size, self.log_bytes)
            try:
                self.hold(keys, self.room)
            except errors.LogFull:
                self.log_full = True
                self.loosen()  # each command asks for its own
        elif keys and self.ex.hold_further(keys) is not None:
            self.begin_again(keys)
            self.loosen()
        if self.loose:
            return
        if not self.held:
            self.since = _core.monotonic()
        self.held.update(dict.fromkeys(keys))
        self.room -= size
        if self.room < 0 and self.logs and self.held and self.is_bare:
            self.loosen()

    def run_loose(self, caller: Connection, words: list[bytes], keys: list[Key], size: int, writes: bool) -> None:
        if not all(key in self.held for key in keys) or (writes and self.logs and size > self.room and self.is_bare):
            self.loosen()
        if self.held:
            self.note(keys, writes)
            call(caller, words)
            if writes:
                self.loosen()
            return

        def call_alone(within: float) -> tuple[bool, bytes] | None:
            self.room = size if writes else 0 if self.log_full else self.log_bytes
            try:
                return caller.call_alone(words, keys, self.seen, not writes, self.room, within)
            except errors.LogFull:
                if writes:
                    raise
            self.room, self.log_full = 0, True
            return caller.call_alone(words, keys, self.seen, True, 0, within)

        if self.ex.holds:
            why = call_alone(0)
        elif len(keys) > MOST_KEPT:
            self.hold_many(keys, size)
            why = call_alone(0)
        else:
            why = self.wait(call_alone, keys[0])
        if why is not None:
            busy, key = why
            self.begin_again(keys)
            raise Error((BUSY if busy else CHANGED).format(shown(key)))
        self.note(keys, writes)
        if not writes:  # what it has read may be why it changes them
            self.since, self.held = _core.monotonic(), dict.fromkeys(keys)

    def log_size(self, words: list[bytes], keys: list[Key]) -> int:
        """Bytes in the log for which a command asks that names these keys, and writes."""
        return self.ex.log_room(written_in(words[0].decode("latin-1").lower(), keys))

    def note(self, keys: list[Key], writes: bool) -> None:
        """A command that names these undeclared keys runs, or has run."""
        self.named.update(keys)
        self.wrote = self.wrote or writes

    def takes_long(self, name: bytes, keys: list[Key]) -> bool:
        """Does it only read, and compute for long?"""
        if name == b"lcs":
            a, *b = self.ex.value_sizes(keys)
            return a * sum(b or [a]) > LONG_READ
        return name in READS_ALL and sum(self.ex.value_sizes(keys)) > LONG_READ

    def look_at(self, keys: list[Key]) -> None:
        """They are about to be read while their stripes are not held: what comes after this instant is another's. Raises: Again; Error."""
        if self.held or not self.loose:
            self.loosen()
        for key, version in zip(keys, self.ex.versions(keys), strict=True):
            if self.seen.setdefault(key, version) != version:
                self.begin_again(keys)
                raise Error(CHANGED.format(shown(key[1])))

    # -- stripes

    @property
    def is_bare(self) -> bool:
        """Does it hold undeclared keys only?"""
        return not self.nested and (self.given_up or not self.declared)

    def hold_declared(self, further: bool = True) -> None:
        def take(within: float) -> None:
            wanted = self.wanted if further else ()
            flushed = self.flushed if further else []
            self.ex.hold([key for _, key in self.declared], self.log_bytes, further=wanted, flushed=flushed, db=self.db, within=within)

        if self.beginnings == 1 and further:
            take(0)
        else:
            self.wait(take)

    def give_up(self, name: bytes) -> None:
        """Before it looks at all keys. Of KEYS, too, if no command has named one: they may be there for a pattern."""
        gives = bool(self.declared) and not (self.nested or self.touched or self.given_up) and self.allowed
        if self.held and (gives or name in WALKS):
            self.loosen()
        if gives:
            self.given_up = True
            self.ex.release()

    def take_back(self) -> None:
        """Its KEYS, which it has not touched: as at its beginning."""
        if self.held:
            self.loosen()
        self.hold_declared(False)
        self.given_up = False

    def hold(self, keys: list[Key], log_bytes: int) -> None:
        """While nothing is held. Raises: Error."""
        self.wait(lambda within: self.ex.hold((), log_bytes, further=keys, db=self.db, within=within), keys[0])

    def hold_many(self, keys: list[Key], log_bytes: int) -> None:
        """While nothing is held: so many that nobody may wait for one while it has the others. Raises: Error."""
        first = keys[0]
        while True:
            self.hold([first], log_bytes)
            busy = self.ex.hold_further(keys)
            if busy is None:
                return
            self.ex.release()
            first = next(key for key in keys if key[1] == busy)
            if why := self.doom():
                raise Error(why.decode())

    def hold_seen(self, keys: list[Key], log_bytes: int) -> None:
        """While none of the undeclared is held: these, if they are as they were seen. Raises: Again; Error."""
        self.room = max(log_bytes, self.log_bytes)
        if self.ex.holds:
            busy = self.ex.hold_further(keys)
            if busy is not None:
                self.begin_again(keys)
                raise Error(BUSY.format(shown(busy)))
        elif len(keys) > MOST_KEPT:
            self.hold_many(keys, self.room)
        else:
            self.hold(keys, self.room)
        for key, version in zip(keys, self.ex.versions(keys), strict=True):
            if self.seen[key] != version:
                self.ex.let_go()
                self.begin_again(keys)
                raise Error(CHANGED.format(shown(key[1])))
        self.since, self.held = _core.monotonic(), dict.fromkeys(keys)

    @property
    def patience(self) -> float:
        """Seconds for which it waits for a stripe."""
        return max(self.time.latest - _core.monotonic() - MARGIN, SHORT)

    def wait(self, take: Callable[[float], T], key: Key | None = None) -> T:
        """take(seconds) takes stripes, while none is held, this key's or others: as often as there is time. The script's time stands still
        until it has them. Other scripts of this process are waited for besides, unless it has written. Raises: Error, StripeBusy."""
        while True:
            began, others = _core.monotonic(), False
            try:
                return take(min(self.patience, SLICE))
            except _resp.HeldByOthers:
                others = True
            except errors.StripeBusy:
                if self.patience <= SHORT:
                    if key is None:
                        raise
                    raise Error(BUSY.format(shown(key[1]))) from None
            finally:
                taken = self.ex.held_ns / 1e9
                self.time.waited((taken if taken >= began else _core.monotonic()) - began, others and not self.wrote)
            if others and self.wrote and self.patience <= SHORT:
                raise Error(OTHERS)
            if why := self.doom():
                raise Error(why.decode())

    @property
    def may_begin_again(self) -> bool:
        return not self.wrote and self.beginnings < MOST_BEGINNINGS

    def begin_again(self, keys: list[Key]) -> None:
        """With these held, too, if they are few: unless that cannot be. Raises: Again."""
        if self.may_begin_again:
            self.wanted, self.awaited = dict.fromkeys([*self.held, *keys]), keys
            if len(self.wanted) > MOST_KEPT:
                self.wanted = {}
            raise Again

    def look(self, at_once: bool = False) -> bool:
        """Between two commands, or two parts of FLUSHDB: has it kept others waiting for long? True: it has let go of what it may."""
        if not self.held or (_core.monotonic() - self.since <= KEPT and not at_once):
            return False
        self.loosen()
        return True

    def loosen(self) -> None:
        """Let go of what is held of the undeclared, and keep no more."""
        keys, self.loose, self.held = [key for key in self.held if key in self.named], True, {}
        try:
            self.seen.update(zip(keys, self.ex.versions(keys), strict=True))
        finally:
            self.ex.let_go()


def shown(key: bytes) -> str:
    return key[:128].decode("utf-8", "surrogateescape")
