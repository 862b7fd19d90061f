"""What a command needs of the store behind the segment. In a thread of the pool, in place of Client.retry; the loop never asks the store.

    a read            what it misses is loaded, as StoredCache does it, then it runs; what cannot be cached it is given (Executor.know)
    back: a write     the same: it runs on what there is. What it writes is dirty, and the supervisor stores it. What cannot be cached it
                      can replace, or delete, but not change: the reply is why
    through, around:  the keys are marked for this thread alone, and loaded; the command runs on copies of them (Executor.know,
    a write           aside), as it would on the keys; what it has changed is stored; then the marks are filled (through), or
                      dropped. If the store fails its reply is the error, and the keys are misses
A transaction is one command, with the keys of all that were queued. Keys of other databases, and those that begin with NUL, are the
cache's own.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shmcache import errors
from shmcache.core import _core, _resp, _text
from shmcache.core._claims import Claims, Marks
from shmcache.sidecar.commands.table import CLAIM, OF_CACHE, TABLE, WRITE, Error, keys_in, target
from shmcache.sidecar.commands.transactions import discard_transaction
from shmcache.stored import BATCH, LOADED_ANEW, MISSING, StoredCache, is_over
from shmcache.stores import Entry, masked
from shmcache.through import ThroughCache

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shmcache.sidecar.server import Connection

MOST_KEY = 4096 - len(_resp.ASIDE) - 8  # bytes of a key that is written through
KNOWING = {b"nx", b"xx", b"get", b"keepttl"}  # options of SET
LATE = 0.005  # seconds by which two readings of an expiry may differ


@dataclass
class Plan:
    """Of a command or transaction: its keys that the store may have, those whose values matter to it; does it write any?"""

    names: dict[bytes, None] = field(default_factory=dict)
    read: dict[bytes, None] = field(default_factory=dict)
    writes: bool = False
    own: bool = False  # others, too


def planned(client: Connection, through: bool) -> Plan:
    """Raises: Error: it cannot be done before a store."""
    words = client.retried or []
    transaction = words[0].lower() == b"exec"
    if transaction and (not client.in_multi or client.broken):
        return Plan()
    plan, db = Plan(), client.db
    for one in client.queue if transaction else [words]:
        name, arguments = one[0].decode("latin-1").lower(), one[1:]
        if name == "select" and (n := _text.number(arguments[0])) is not None and 0 <= n < client.ex.databases:
            db = n
        if through and name in ("eval", "evalsha"):
            raise Error("ERR scripts that may write do not run in front of a store that is written through, or around: use EVAL_RO")
        if name in OF_CACHE:
            continue
        keys = keys_in(name, arguments)
        if name == "copy":
            keys = keys[: db == 0] + keys[1:] * (target(arguments, db) == 0)
        elif db:
            continue
        names = dict.fromkeys(key for key in keys if key[:1] > b"\0")
        if TABLE[name].flags & WRITE and keys and name != CLAIM:
            plan.writes = plan.writes or bool(names)
        plan.own = plan.own or any(key not in names for key in keys)
        plan.names |= names
        if not is_blind(name, arguments):
            plan.read |= names
    if through and plan.writes and plan.own:
        raise Error("ERR keys that are stored, and keys of the cache's own (which begin with a zero byte), are not changed in one step")
    if through and plan.writes and max(map(len, plan.names)) > MOST_KEY:
        raise Error(f"ERR a key that is stored has at most {MOST_KEY} bytes")
    return plan


def is_blind(name: str, arguments: list[bytes]) -> bool:
    """Does it write the same, whatever was there?"""
    return name in ("mset", "setex", "psetex") or (name == "set" and not {a.lower() for a in arguments[2:]} & KNOWING)


def run(client: Connection, ex: _resp.Executor) -> None:
    """Client.retry, and before and after it what the store has to do."""
    cache: StoredCache = ex.table
    try:
        plan = planned(client, isinstance(cache, ThroughCache))
    except Error as e:
        refuse(client, ex, e)
        return
    if plan.writes and isinstance(cache, ThroughCache):
        written(client, ex, cache, plan)
    elif plan.read:
        loaded(client, ex, cache, plan)
    else:
        client.retry(ex)


def refuse(client: Connection, ex: _resp.Executor, e: Exception) -> None:
    """It does not run."""
    if client.in_multi:
        discard_transaction(client)
    client.instead(ex, text_of(e))


def text_of(e: Exception) -> bytes:
    """An error reply, of a store that may raise whatever it likes."""
    if isinstance(e, (errors.ShmcacheError, _resp.CommandError)):
        return _resp.error_text(e)
    return b"ERR the store failed: " + masked(f"{type(e).__name__}: {e}").encode("utf-8", "replace")


def loaded(client: Connection, ex: _resp.Executor, cache: StoredCache, plan: Plan) -> None:
    """Run it with what it reads cached, or, if it cannot be cached, given. What is evicted meanwhile is loaded again; but a part of a
    transaction may have been done."""
    deadline = _core.monotonic() + cache.policy.timeout
    words, before = client.retried or [], client.buffered[1]
    names = [name for name in plan.read if len(name) <= 4096]
    while True:
        try:
            there, given = load(ex, cache, names, plan.writes)
        except Exception as e:
            refuse(client, ex, e)
            return
        ex.know(dict.fromkeys(there, 0), takes_stale=not plan.writes, given=given)
        try:
            client.retry(ex)
        finally:
            ex.forget()
        if not ex.lost or words[0].lower() == b"exec" or _core.monotonic() > deadline:
            return
        client.take_back(before)


Given = tuple[Any, int, Exception]  # a value that cannot be cached, the unix ms at which it expires (0: never), and why it cannot


def load(ex: _resp.Executor, cache: StoredCache, names: list[bytes], writes: bool) -> tuple[set[bytes], dict[bytes, Given]]:
    """Those of names that are there: they were cached, or are now; and those that are to be given. Raises: whatever the store does."""
    there, given = {name for name in names if ex.version(name)}, {}
    for name, (entry, why) in cache._found_many(set(names) - there).items():
        if why is None or (writes and why is LOADED_ANEW):  # a change waits for that
            there.add(name)
        else:
            given[name] = entry.value, expires(ex, entry), why
    return there, given


def expires(ex: _resp.Executor, entry: Entry) -> int:
    """The unix ms at which it does; 0: never."""
    return 0 if entry.ttl is None else ex.now() + math.ceil(entry.ttl * 1000)


class Copies:
    """Of keys, with their values and times, for a command that is to run on them. Nobody else knows their names."""

    def __init__(self, ex: _resp.Executor, cache: StoredCache) -> None:
        self.ex, self.cache = ex, cache
        self.aside = _resp.ASIDE + os.urandom(8)
        self.at: dict[bytes, int] = {}  # a copy's name -> unix ms at which it expires, 0: never
        self.given: dict[bytes, Given] = {}  # those of which there can be no copy

    def put(self, entries: Mapping[bytes, Entry]) -> None:
        for name, entry in entries.items():
            if not is_over(entry):
                copy, at = self.aside + name, expires(self.ex, entry)
                try:
                    self.cache.set(copy, entry.value, entry.ttl)
                except (errors.ValueTooLarge, errors.CapacityError) as e:
                    self.given[copy] = entry.value, at, e
                    continue
                self.at[copy] = at
                if entry.ttl is None:
                    self.cache.persist(copy)  # the segment's default is that of cached copies

    def drop(self) -> None:
        for copy in self.at:
            with contextlib.suppress(errors.CapacityError):  # till it is evicted
                self.cache.discard(copy)


class Trial:
    """A command that is run on copies of its keys, in front of a store that is written through, or around."""

    def __init__(self, ex: _resp.Executor, cache: ThroughCache, plan: Plan) -> None:
        self.ex, self.cache, self.plan = ex, cache, plan
        self.names = sorted(plan.names)
        self.copies = Copies(ex, cache)
        self.marks = Marks(cache)
        self.versions: dict[bytes, int] = {}  # of the marks
        self.was: dict[bytes, Entry] = {}
        self.kept: dict[bytes, Entry] = {}  # what the command has written
        self.gone: list[bytes] = []  # and removed

    def begin(self) -> None:
        """Nobody else writes these keys from here on, and the copies are there."""
        cache = self.cache
        self.heads = {name: cache._head(name) for name in self.names}
        deadline = _core.monotonic() + cache.policy.timeout
        for name in self.names:
            self.versions[name] = cache._mark_alone(self.marks, name, deadline)
        if self.plan.read:
            self.was = cache._loaded([name for name in self.names if name in self.plan.read], Claims(cache))
        self.copies.put(self.was)

    def run(self, client: Connection) -> None:
        aside = self.copies.aside
        self.ex.know(self.copies.at, aside, given=self.copies.given)
        try:
            client.retry(self.ex)
        finally:
            self.there, self.changed, self.given = self.ex.forget()
            self.changed = {copy for copy in self.changed if copy.startswith(aside)}  # COPY writes another database, too
            self.copies.at |= dict.fromkeys(self.changed, 0)

    def look(self) -> None:
        """At what it has done. Raises: StoreUnavailable: a copy was evicted, or cleared, so that nobody knows."""
        there = self.there
        if self.ex.lost:
            raise errors.StoreUnavailable("what this command works on was evicted meanwhile: nothing was changed; try again")
        for copy in self.changed:
            name = copy.removeprefix(self.copies.aside)
            if copy not in there:
                self.gone.append(name)
                continue
            if copy in self.given:  # its time was changed
                at = there[copy]
                self.kept[name] = Entry(self.was[name].value, max(at - self.ex.now(), 1) / 1000 if at else None)
                continue
            value, ttl = self.cache.peek(copy, MISSING), self.cache.ttl(copy)
            if value is not MISSING and ttl is not None:
                self.kept[name] = Entry(value, None if ttl == math.inf else ttl)
            elif there[copy] and self.ex.now() >= there[copy] - LATE * 1000:
                self.gone.append(name)
            else:
                raise errors.StoreUnavailable("what this command has written was evicted too soon: nothing was changed; try again")

    def store(self) -> None:
        """New values first: of a RENAME that is cut off both keys are there, not none. No call begins for which the marks would not stand
        long enough."""
        cache = self.cache
        kept = list(self.kept.items())
        for i in range(0, len(kept), BATCH):
            cache._ask(cache.store.store_many, {name: tuple(entry) for name, entry in kept[i : i + BATCH]}, self.marks)()
        for i in range(0, len(self.gone), BATCH):
            cache._ask(cache.store.delete_many, self.gone[i : i + BATCH], self.marks)()
        if self.kept or self.gone:
            cache.count_store(writes=len(self.kept) + len(self.gone))

    def fill(self) -> None:
        """The marks of what the store has for certain."""
        cache, gone = self.cache, set(self.gone)
        for name in self.names:
            entry = (self.kept if cache._fills else {}).get(name)
            if entry is None and name not in self.kept and name not in gone:
                entry = self.was.get(name)
            if entry is not None and entry.ttl != 0 and cache._filled(name, entry, self.versions[name], self.heads[name]):
                self.marks.drop(name)

    def end(self) -> None:
        """What is marked still goes, and the copies."""
        with contextlib.suppress(errors.CapacityError), self.marks:  # what cannot end stands till its time is over
            pass
        self.copies.drop()


def written(client: Connection, ex: _resp.Executor, cache: ThroughCache, plan: Plan) -> None:
    trial, before = Trial(ex, cache, plan), client.buffered[1]
    try:
        try:
            trial.begin()
        except Exception as e:
            refuse(client, ex, e)
            return
        trial.run(client)
        try:
            trial.look()
            trial.store()
            trial.fill()
        except Exception as e:
            client.take_back(before, text_of(e))
    finally:
        trial.end()

