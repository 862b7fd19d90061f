"""Single flight: a missing value is computed once per host, not once per worker; stale values meanwhile; and locks by the same means.

Who misses claims the key (core: Table.claim): an item without a value that carries the claimer's token. Others see a miss with a claim
on it and wait; who claims next after the claimer's death takes over. The claim's version is the lease: the fill succeeds only if exactly
that claim still stands, so a set, delete, clear or take-over in the meantime wins over what was computed from older data.

A value with stale_ttl or early is stored in an envelope (core/envelope.pxd). Who asks for stale values and meets one claims another key,
REFRESH_PREFIX + key, for a claim on the key itself would replace the value; who has not got that claim goes on with the stale value at
once. The refresher's lease is the version of the stale item: it is replaced only if it is still that one.

A fill with tags carries the generations that they had before the factory was called.

Race table
    claim vs claim            the stripe decides; the loser waits
    fill vs set / delete      set or delete first: the claim is gone, the fill is refused, its caller gets the computed value all the same
                              fill first: set replaces it, delete removes it
    fill vs set / delete, in front of a store
                              the same: what is computed is stored under a mark, or as dirty, in the place of exactly that claim (of a dead
                              writer's mark, of a tombstone that is not stored yet). A row that another host has stored stays, and is cached
                              clear() leaves such a mark as it is, but what was computed before it does not take the mark's place
    fill vs take-over         a claim older than `lease` seconds is void: the late fill is refused
    the claimer dies          the kernel drops its row's lock; the next waiter to look takes over. A caller that ends without a
                              fill (its process lives) gives its claim back by the object that notes it (core/_claims.pyx)
    who is one claimer        a thread, asyncio task or greenlet (core/owner.py), by a number that no other in its process ever has. One
                              waits for another of its own thread only by a sleep that lets that one run, and else does without
    fork while a claim is held: the child has another token: it fills and releases none of its parent's
    a factory asks its own key again: computed at once, not stored; waiting would be for itself. If it refreshes: it gets the stale value
    refresh vs set / delete / clear / touch
                              one of these first: the item is gone or has another version, the refresh is refused, its caller gets the
                              computed value all the same. Refresh first: as fill first
    refresh vs expiry         what has expired meanwhile and is not taken away is replaced; what is taken away, or claimed, is not
    refresh vs refresh        the second looks again when it has the claim: it returns what the first has stored. After `lease` seconds both
                              compute, the first to be ready stores
    the refresher dies        its claim is void at once: the next to ask refreshes; nobody has waited
    the factory raises        in the refresher: its caller gets the exception, the others the stale value, and the next to ask tries
    fill vs invalidate_tag    invalidated while the factory runs: what is stored carries the old generation and is never found
    who does not ask for stale values misses, and claims the key as ever: the stale value is gone then, and who asks for it waits, too
"""

from __future__ import annotations

import math
from time import sleep  # as it is now: a test may put something there that does not sleep

from shmcache import errors
from shmcache.codec import FRESH, STALE
from shmcache.core import _core

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from datetime import timedelta
    from typing import Any, TypeVar

    from shmcache.cache import Cache
    from shmcache.core._claims import Claim, Lock

    T = TypeVar("T")

FIRST_WAIT = 0.0002  # seconds; half as long again each time
LONGEST_WAIT = 0.016
LEASE = 60.0
ROOM_WAIT = 10.0  # seconds that a write waits for room for a dirty item, as in the core
FOREVER = 3e9  # seconds; a ttl that outlives the segment, whatever its default
LOCK_PREFIX = b"\x00lock\x00"
REFRESH_PREFIX = b"\x00refresh\x00"
LONGEST_NAMED = 4096 - len(REFRESH_PREFIX)  # bytes of a key that stands behind such a prefix as it is
MOST_EARLY_MS = (1 << 32) - 1
MISSING: Any = object()
WAIT: Any = object()
WAIT_HERE: Any = object()
WAIT_BENEATH: Any = object()
WAITS = {-2: WAIT_BENEATH, -6: WAIT_HERE, -7: WAIT_BENEATH}  # by what claim() and marked_here() say; else WAIT
COMPUTE: Any = object()
BEGIN: Any = object()
_claims: Any = None


def claims() -> Any:
    """core._claims, when it is needed: a worker whose gets are hits does not load it."""
    global _claims
    if _claims is None:
        from shmcache.core import _claims as module

        _claims = module
    return _claims


def waits(deadline: float | None) -> Any:
    """Sleep in growing slices, once per next(), and let greenlets run; ends when the deadline (_core.monotonic) has come."""
    from shmcache.core import owner

    wait = FIRST_WAIT
    while deadline is None or _core.monotonic() < deadline:
        (owner.sleep_of_greenlets() or sleep)(wait if deadline is None else max(0.0, min(wait, deadline - _core.monotonic())))
        wait = min(wait * 1.5, LONGEST_WAIT)
        yield


def waits_in_vain() -> bool:
    """Can the other callers of this thread not run while this one sleeps?"""
    from shmcache.core import owner

    return owner.sleep_of_greenlets() is None


def several(tags: Iterable[str] | None) -> tuple[str, ...]:
    """Tags that are gone through more than once. Raises: InvalidTag."""
    return () if tags is None else _core.several_tags(tags)


class Terms:
    """How what is computed is stored: its ttl, stale_ttl, early and tags. One call's."""

    __slots__ = ("_began", "_beta", "_cache", "_early_ms", "_head", "_stale_ttl", "_tags", "ttl")

    def __init__(
        self, cache: Cache, ttl: float | timedelta | None, stale_ttl: float | timedelta | None = None, early: float | bool = 0.0,
        tags: Iterable[str] | None = None,
    ) -> None:
        if not 0 <= early < 1e6:
            raise errors.UsageError(f"early is True (1.0), or by what the time is multiplied that the factory takes, not {early!r}")
        self._cache, self.ttl, self._stale_ttl, self._beta, self._tags = cache, ttl, stale_ttl, float(early), several(tags)
        self._head: bytes | None = None
        self._early_ms = 0

    @property
    def stale(self) -> bool:
        """Does the caller take a stale value, if somebody refreshes it?"""
        return self._stale_ttl is not None or self._beta > 0

    def begin(self) -> None:
        """The factory is about to be called: keep the generations from before it."""
        self._head = self._cache._carry(self._tags) if self._tags else None
        self._began = _core.monotonic()

    def end(self) -> None:
        """It has returned."""
        if self._beta:
            self._early_ms = min(math.ceil((_core.monotonic() - self._began) * self._beta * 1000), MOST_EARLY_MS)

    def fill_claim(self, key: bytes | str, value: Any, version: int, refresh: bool) -> bool:
        return self._cache.fill_claim(key, value, version, self.ttl, self._head, self._stale_ttl, self._early_ms, refresh)


def get_or_set(cache: Cache, key: bytes | str, factory: Callable[[], Any], lease: float, terms: Terms) -> Any:
    """Cache.get_or_set, after the first miss."""
    check_lease(lease)
    return run(flying(cache, key, lease, terms), factory)


# Steps: a generator that does one operation, and yields what its driver has to do for it: WAIT, a moment; WAIT_HERE, for another caller
# of this thread, which has to run meanwhile: it is sent True if it cannot; WAIT_BENEATH, for the thread that runs this task or greenlet,
# or for this caller's own call of the store, the same; COMPUTE: call the factory; BEGIN: nothing, a write comes next, which is not to be
# made for a caller that has left; or something to call (a store's call), whose result it is sent, or the exception thrown. run() is the
# driver that sleeps, aio.py has the one that awaits. Steps hold marks and claims by the `with` blocks of core/_claims.pyx. A driver
# closes its steps, by such a block, too: else what they hold would stay held for as long as a traceback has its frame.


def run(steps: Generator[Any, Any, T], factory: Callable[[], Any] | None = None) -> T:
    """Go through the steps in this thread: what they return."""
    pause: Any = None
    answer: Any = None
    failed: BaseException | None = None
    with claims().Closing(steps):
        while True:
            try:
                asked = steps.send(answer) if failed is None else steps.throw(failed)
            except StopIteration as e:
                return e.value  # type: ignore[no-any-return]
            finally:
                failed = None
            answer = None
            if asked is BEGIN:
                continue
            here = asked is WAIT_HERE or asked is WAIT_BENEATH
            if here and waits_in_vain():
                answer = True
            elif here or asked is WAIT:
                next(pause := pause or waits(None))
            elif asked is COMPUTE:
                assert factory is not None
                answer = factory()
            else:
                pause = None
                try:
                    answer = asked()
                except BaseException as e:
                    failed = e


def steps(method: Callable[..., T], *args: Any, **keywords: Any) -> Generator[Any, Any, T]:
    """A call of a method that may have steps (stored.py: waiting)."""
    of = getattr(method, "steps", None)
    if of is None:
        return method(*args, **keywords)
    return (yield from of(method.__self__, *args, **keywords))  # type: ignore[attr-defined, no-any-return]


def in_room(cache: Cache, call: Callable[..., T], *args: Any, **keywords: Any) -> Generator[Any, Any, T]:
    """Steps of a write of one key that waits, in write-back, until there is room for a dirty item. Raises: StoreUnavailable."""
    until = _core.monotonic() + ROOM_WAIT
    while True:
        yield BEGIN
        try:
            return cache._at_once(call, *args, **keywords)
        except _core.WouldWait as e:
            if _core.monotonic() > until:
                raise errors.StoreUnavailable(*e.args) from None
        yield WAIT


def how_to_wait(cache: Cache, key: bytes | str, said: int) -> Any:
    """For whom claim() says this of; -3: for whose marks are on the key."""
    return WAITS.get(claims().marked_here(cache, _core.key_bytes(key)) if said == -3 else said, WAIT)


def flushing(cache: Cache, timeout: float) -> Generator[Any, Any, None]:
    """Steps of flush()."""
    until = _core.monotonic() + timeout
    asked = cache._ask_flush()
    while not cache._flushed(asked, timeout, _core.monotonic() > until):
        yield WAIT


def flying(cache: Cache, key: bytes | str, lease: float, terms: Terms) -> Generator[Any, Any, Any]:
    """Steps of get_or_set()."""
    deleted = False
    with claims().Claim(cache) as claim:
        while True:
            if terms.stale:
                state, value, seen = cache._look(key)
                if state == FRESH:
                    return value
                if state == STALE:
                    value = yield from refreshing(cache, key, lease, terms, claim, value, seen)
                    if value is not MISSING:
                        return value
            version = claim.take(key, lease)
            if version > 0:
                break
            if version in (-4, -5):  # -4: who changes it in the store is dead; -5: deleted, which the store has not got yet
                version, deleted = cache._lease_beside(key, version)
                break
            if version == -2:
                return (yield COMPUTE)
            if version:  # another's; or somebody changes the key in the store
                if (yield how_to_wait(cache, key, version)):
                    return (yield COMPUTE)
            else:
                value, seen = yield from steps(cache.gets, key)  # not get: that may miss early again
                if seen or value is not None:  # 0: of what stands in the store, and cannot be cached
                    return value
        terms.begin()
        value = yield COMPUTE
        terms.end()
        if (yield from steps(cache._fill_computed, key, value, version, terms, deleted)):
            claim.drop()
        return value


def refreshing(
    cache: Cache, key: bytes | str, lease: float, terms: Terms, claim: Claim, stale: Any, seen: int
) -> Generator[Any, Any, Any]:
    """A value for who has met a stale one: computed if nobody else does so, else the stale one. MISSING: it is not there any more."""
    cache._check_fills(key)
    if claim.take(refresh_key(key), lease) <= 0:
        return stale
    state, newer, now = cache._look(key)
    if now != seen:
        claim.give_back()
        return newer if state in (FRESH, STALE) else MISSING
    terms.begin()
    value = yield COMPUTE
    terms.end()
    yield from steps(cache._fill_computed, key, value, seen, terms, True)
    return value


def refresh_key(key: bytes | str) -> bytes:
    """Who has claimed this key refreshes that one."""
    return key_behind(REFRESH_PREFIX, key)


def key_behind(prefix: bytes, key: bytes | str) -> bytes:
    """A key of the cache's own that says something of another."""
    raw = _core.key_bytes(key)
    if len(raw) > LONGEST_NAMED:
        from hashlib import blake2b

        raw = blake2b(raw, digest_size=32, person=b"refresh").digest()
    return prefix + raw


def check_lease(seconds: float) -> None:
    """Raises: InvalidTTL."""
    if not 0 < seconds < 1e9:
        raise errors.InvalidTTL(f"lease is a number of seconds above 0, not {seconds!r}")


class Lease:
    """What get_lease() has found: a value, the right to fill, or that another has it. One that is dropped is given back.

    Attributes: found: there is a value, `value`. held: this caller is the one to fill(), or to release(). If neither, another caller (a
    thread, task or greenlet of some process) has the lease: wait and ask again, or do without.
    """

    __slots__ = ("_claim", "_head", "_tags", "found", "key", "value")

    def __init__(self, key: bytes | str, value: Any, found: bool, claim: Claim, tags: tuple[str, ...], head: bytes | None) -> None:
        self.key, self.value, self.found = key, value, found
        self._claim, self._tags, self._head = claim, tags, head

    @property
    def held(self) -> bool:
        return self._claim.version > 0

    def __repr__(self) -> str:
        return f"<shmcache.Lease on {self.key!r}: {'a value' if self.found else 'to be filled' if self.held else 'not held'}>"


def check_is_lease(lease: Lease) -> None:
    """Raises: UsageError."""
    if not isinstance(lease, Lease):
        raise errors.UsageError(f"a lease is what get_lease() has returned, not {type(lease).__name__}")


def get_lease(cache: Cache, key: bytes | str, seconds: float, tags: Iterable[str] | None) -> Lease:
    """Cache.get_lease."""
    check_lease(seconds)
    names = several(tags)
    claim = claims().Claim(cache)
    while True:
        value, seen = cache.gets(key)
        if seen or value is not None:
            return Lease(key, value, True, claim, (), None)
        version = claim.take(key, seconds)
        if version < 0:
            return Lease(key, None, False, claim, (), None)
        if version:
            try:
                return Lease(key, None, False, claim, names, cache._carry(names) if names else None)
            except BaseException:
                claim.give_back()
                raise


def fill(cache: Cache, lease: Lease, value: Any, ttl: float | timedelta | None, tags: Iterable[str]) -> bool:
    """Cache.fill."""
    check_is_lease(lease)
    with lease._claim as claim:
        if not claim.version:
            raise errors.UsageError(
                "this lease is not held: get_lease() has found a value or another's lease, or it was filled or released"
            )
        more = several(tags)
        head = lease._head
        if more:
            head = cache._carry(more, head)
        filled = False
        if lease._head is None or cache._carry(lease._tags) == lease._head:
            filled = cache.fill_claim(lease.key, value, claim.version, ttl, head)
        if filled:
            claim.drop()
        return filled


def release(cache: Cache, lease: Lease) -> bool:
    """Cache.release."""
    check_is_lease(lease)
    return lease._claim.give_back()


def lock(cache: Cache, name: bytes | str, ttl: float | None) -> Lock:
    """Cache.lock."""
    if ttl is not None and not 0 < ttl < 1e9:
        raise errors.InvalidTTL(f"the ttl of a lock is a number of seconds above 0, or None, not {ttl!r}")
    made: Lock = claims().Lock(cache, _core.own_key(LOCK_PREFIX, name, "the name of a lock"), ttl or 0.0, waits, waits_in_vain)
    return made
