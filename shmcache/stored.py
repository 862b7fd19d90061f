"""`StoredCache`: what is the same with each policy: misses load from the store, and what is loaded is cached."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

from shmcache import codec, errors, flight
from shmcache.cache import Cache, attach
from shmcache.core import _core
from shmcache.core._claims import Claims, Marks
from shmcache.flight import steps
from shmcache.policy import check, policy_of
from shmcache.stores import Entry, lifetime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import timedelta

    from shmcache.stores import Store

    Key = bytes | str
    Ttl = float | timedelta | None
    Tags = Iterable[str] | None

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")
Steps = Generator[Any, Any, T]
Found = tuple[Entry | None, Exception | None]  # what there is under a key; None: it is cached, or was, else why it is not
GRACE = 5.0  # seconds that a mark stands beyond the times that waiting and storing may take
BATCH = 500  # keys in one call of the store
DELETED = -5  # of claim(): in the store, too, as soon as the supervisor comes to it
NOT_NOW = -100  # of a claim: it cannot be made
UNFIT_PREFIX = b"\x00unfit\x00"
UNFIT_LIFE = 1.0  # seconds; those that wait look some sixty times a second
LOADED_ANEW: Any = errors.StoreUnavailable("another caller loads this key anew")  # never raised
MISSING: Any = flight.MISSING


def waiting(of: Callable[Concatenate[S, P], Steps[T]]) -> Callable[Concatenate[S, P], T]:
    """A method that goes through these steps in the calling thread. Its attribute `steps` is them, for who goes through them otherwise."""

    @functools.wraps(of)
    def method(self: S, /, *args: P.args, **keywords: P.kwargs) -> T:
        return flight.run(of(self, *args, **keywords))

    method.steps = of  # type: ignore[attr-defined]
    return method


class Call(Generic[T]):
    """A step: a call of the store. It takes its time: a driver that has others to serve makes it in a thread.

    Args: marks: of the keys that it changes, which are told if it is known how it ended. Attributes: keys: those. latest. patience: seconds
    after which a store that has not returned does not keep its time.
    Raises: StoreUnavailable: it begins later than `latest` (monotonic), when the claims and marks that stand for it might end before it.
    """

    __slots__ = ("_cache", "_call", "_marks", "_what", "latest", "patience")

    def __init__(self, cache: StoredCache, call: Callable[..., T], what: Any, latest: float, patience: float, marks: Marks | None) -> None:
        self._cache, self._call, self._what, self.latest, self.patience, self._marks = cache, call, what, latest, patience, marks

    @property
    def keys(self) -> list[bytes]:
        return [] if self._marks is None else [*self._what]

    def __call__(self) -> T:
        if _core.monotonic() > self.latest:
            raise errors.StoreUnavailable("this call of the store came to its turn too late: it was not made; try again")
        cache, marks = self._cache, self._marks
        if marks is not None:
            marks.known = False
        try:
            answer = self._call(self._what, timeout=cache.policy.timeout)
        except BaseException as e:
            if not cache.closed:
                cache.count_store(errors=1)
            if marks is not None:
                marks.known = knows(e)
            raise
        if marks is not None:
            marks.known = True
        return answer


class StoredCache(Cache):
    """A cache that stands in front of a store, by the segment's policy. Made by create(), open() and attach() with store=.

    Methods are Cache's. A miss loads. A write gets to the store, or raises what the store says (StoreUnavailable: it may have been done,
    and can be done again; StoreRefused, RowsRefused) and leaves a miss. Keys that begin with a NUL byte, and with them namespaces, locks
    and memoized results, are the cache's own. A ttl is the value's, also in the store; the segment's default_ttl is that of the cached
    copy. len(), scan() and clear() are about what is cached.

    get_lease() and fill() are for copies of what the caller has read from the store himself: fill() changes nothing there.

    tags: of a stored key's copies, made of the key's bytes, so that who changes the store past the cache can drop them by invalidate_tag().
    """

    def __init__(
        self, mapping: _core.Mapping, codec_name: str, trust: dict[str, Any] | None, store: Store,
        tags: Callable[[bytes], Iterable[str]] | None = None,
    ) -> None:
        super().__init__(mapping, codec_name, trust)
        policy = policy_of(mapping)
        if policy is None:
            raise errors.InvalidConfig(f"the segment {self.name!r} stands before no store: create it with policy=, or leave store= out")
        self.policy = policy
        self.store = store
        self._age = 2 * policy.timeout + GRACE  # of claims and marks: longer than to wait for another's, and then for the store
        check(policy, store, tags)
        self._tags_of = tags
        self._notes = policy.mode == "back" or policy.negative_ttl > 0 or policy.stale_ttl > 0  # there may be envelopes
        self._reads_through = True

    def __reduce__(self) -> Any:
        if self.closed:
            raise errors.CacheClosed("a closed handle cannot be pickled")
        return _reopened, (self.name, self._codec_name, self._trust, self.store, self._tags_of)

    # ---- loads ----

    @waiting
    def _load_missing(self, key: Key, default: Any) -> Steps[Any]:
        """What get() does on a miss."""
        name = _core.key_bytes(key)
        entry = None if name[0] == 0 else (yield from self._found(name))[0]
        return default if entry is None else entry.value

    def _found(self, name: bytes) -> Steps[Found]:
        """What there is under a key that was missed. The store is asked once at most."""
        if self._notes:
            state, value, seen = self._look(name)
            if state == codec.NEGATIVE:
                return None, None
            if state == codec.FRESH:
                return Entry(value), None
            if state == codec.STALE:
                return (yield from self._refreshed(name, value, seen))
        deadline = _core.monotonic() + self.policy.timeout
        with Claims(self) as claims:
            version, value = yield from self._claim_or_value(claims, name, deadline)
            if not version:
                return Entry(value), None
            if version == DELETED:
                return None, None
            uncached: dict[bytes, Exception] = {}
            entry = (yield from steps(self._loaded, [name], claims, uncached)).get(name)
            return entry, uncached.get(name)

    def _claim_or_value(self, claims: Claims, name: bytes, deadline: float) -> Steps[tuple[int, Any]]:
        """As _claim(), and if there is a value (0) that."""
        while (version := (yield from self._claim(claims, name, deadline))) == 0:
            value = self.peek(name, MISSING)
            if value is not MISSING:
                return 0, value
        return version, MISSING

    def _got(self, key: Key) -> Steps[Any]:
        """Steps of get(); MISSING."""
        value = self.peek(key, MISSING)
        return value if value is not MISSING else (yield from steps(self._load_missing, key, MISSING))

    def _ask(self, call: Callable[..., T], what: Any, marks: Marks | None = None) -> Call[T]:
        """A step: a call of the store. marks: of what it changes there: it begins while they stand for as long as it may take."""
        patience = self.policy.timeout + GRACE / 2
        left = patience if marks is None else min(patience, self._age - self.policy.timeout - marks.age)
        latest = _core.monotonic() + left
        return Call(self, call, what, latest, patience, marks)

    def _refreshed(self, name: bytes, stale: Any, seen: int) -> Steps[Found]:
        """A stale copy, of which one caller at a time loads another. No entry: the store has none."""
        with Claims(self) as claims:
            if self._taken(claims, flight.refresh_key(name)) <= 0:
                return Entry(stale), LOADED_ANEW
            try:
                head = self._head(name)
                entry = yield from self._one(name)
            except errors.CapacityError as e:
                return Entry(stale), e
            uncached: dict[bytes, Exception] = {}
            if entry is not None:
                self._filled(name, entry, seen, head, True, uncached)
            if entry is None or uncached:  # nobody is to be given the old one after the new one
                with contextlib.suppress(errors.CapacityError):
                    self.discard(name)
            return entry, uncached.get(name)

    def _one(self, name: bytes) -> Steps[Entry | None]:
        """What the store has under one key. Raises: what the store does, or what it refuses the row for."""
        refused: dict[bytes, Exception] = {}
        entry: Entry | None = (yield self._ask(partial(self._load_some, refused), [name])).get(name)
        self.count_store(loads=1, found=entry is not None)
        if refused:
            raise next(iter(refused.values()))
        return entry

    def _taken(self, claims: Claims, name: bytes) -> int:
        """What Claims.take() says; NOT_NOW: there is no room for a claim, or no lock to be had."""
        try:
            version: int = claims.take(name, self._age)
        except errors.CapacityError:
            return NOT_NOW
        return version

    def _head(self, name: bytes) -> bytes | None:
        """The tags of a key's copy, as they are before it is loaded."""
        return None if self._tags_of is None else self._carry(self._tags_of(name))

    def _claim(self, claims: Claims, name: bytes, deadline: float, to_load: bool = True) -> Steps[int]:
        """Of a missing key: a claim's version; 0: there is a value now; -1: load it, and do not fill it; DELETED.

        Args: to_load: for a caller that loads it if it can have no claim.
        Raises: StoreUnavailable: somebody else has been loading it for too long; and if not to_load what take() does.
        """
        while True:
            version = self._taken(claims, name) if to_load else claims.take(name, self._age)
            if version >= 0 or version == DELETED:
                return version
            if version in (-2, -4, NOT_NOW):  # the load of this very key asks for it; its writer is dead
                return -1
            if to_load and version != -3 and self.claim_version(flight.key_behind(UNFIT_PREFIX, name)):
                return -1  # a load of this key ended a moment ago, with what cannot be cached
            if _core.monotonic() < deadline:
                if (yield flight.how_to_wait(self, name, version)):
                    return -1
            elif version == -3:
                return -1
            else:
                raise errors.StoreUnavailable(f"another caller has been loading this key for {self.policy.timeout} s: try again")

    @waiting
    def _loaded(
        self, names: list[bytes], claims: Claims, uncached: dict[bytes, Exception] | None = None
    ) -> Steps[dict[bytes, Entry]]:
        """What the store has of names, with which those that are claimed are filled. uncached: is given why others are not cached."""
        uncached = {} if uncached is None else uncached
        found: dict[bytes, Entry] = {}
        refused: dict[bytes, Exception] = {}
        heads: dict[bytes, bytes | None] = {}
        for name in names:
            if claims.version(name):
                with contextlib.suppress(errors.CapacityError):  # there is no room for a tag's generation
                    heads[name] = self._head(name)
        for i in range(0, len(names), BATCH):
            found.update((yield self._ask(partial(self._load_some, refused), names[i : i + BATCH])))
        self.count_store(loads=len(names), found=len(found))
        for name, head in heads.items():
            entry, version = found.get(name), claims.version(name)
            if entry is not None:
                filled = self._filled(name, entry, version, head, False, uncached)
                if name in uncached and not isinstance(uncached[name], errors.CapacityError):  # there is no room for a note, either
                    self._say_unfit(name)
            elif name in refused:
                filled = False
                self._say_unfit(name)
            else:
                filled = self._filled_negative(name, version)
            if filled:
                claims.drop(name)
        uncached |= {name: just_now() for name in found if name not in heads}
        if refused:
            raise next(iter(refused.values())) if len(names) == 1 else errors.RowsRefused(refused)
        return found

    def _filled_negative(self, name: bytes, version: int) -> bool:
        """As _filled(), of a key that is not in the store."""
        with contextlib.suppress(errors.CapacityError):
            return self.policy.negative_ttl > 0 and self._put_negative(name, self.policy.negative_ttl, version)
        return False

    def _say_unfit(self, name: bytes) -> None:
        """To those that wait for this caller's claim: what it has loaded cannot be cached, so they need not wait for each other's loads.

        A claim, for it is not logged, and ends by itself: soon, for a claim is not evicted. If it cannot be made, they wait for each
        other, up to policy.timeout.
        """
        with contextlib.suppress(errors.CapacityError):
            self.claim(flight.key_behind(UNFIT_PREFIX, name), min(self.policy.timeout, UNFIT_LIFE))

    def _is_negative(self, name: bytes) -> bool:
        """Is it remembered that this key is not in the store?"""
        return self._notes and self._look(name)[0] == codec.NEGATIVE

    def _load_some(self, refused: dict[bytes, Exception], names: list[bytes], timeout: float) -> dict[bytes, Entry]:
        try:
            found = dict(self.store.load_many(names, timeout=timeout))
        except errors.RowsRefused as e:
            refused |= e.errors
            if e.errors.keys().isdisjoint(names):  # what it is about nobody knows: none of these is known to be absent
                raise
            rest = [*filter(lambda name: name not in refused, names)]  # no loop here: DECISIONS.md
            return self._load_some(refused, rest, timeout) if rest else {}
        for name, (value, ttl) in [*found.items()]:
            if ttl is not None:
                try:
                    found[name] = Entry(value, lifetime(ttl))
                except errors.InvalidTTL as e:
                    refused[name] = e
                    del found[name]
        return found

    def _filled(
        self, name: bytes, entry: Entry, version: int, head: bytes | None, refresh: bool = False,
        uncached: dict[bytes, Exception] | None = None,
    ) -> bool:
        """Fill a claim or a mark with what the store has. False: it does not stand any more, or (uncached is given why) this cannot be
        cached: who asked gets it all the same."""
        if version <= 0:
            return False
        try:
            if is_over(entry):
                raise errors.InvalidTTL("the time of this row is over already: it is not cached, and not changed")
            return self.fill_claim(name, entry.value, version, entry.ttl, head, self.policy.stale_ttl or None, 0, refresh)
        except (errors.UnsupportedValue, errors.ValueTooLarge, errors.InvalidTTL, errors.CapacityError) as e:
            if uncached is not None:
                uncached[name] = e
            return False

    @waiting
    def get_many(self, keys: Iterable[Key]) -> Steps[dict[Any, Any]]:
        wanted = _core.several(keys)
        found = super().get_many(wanted)
        missing = {name for k in wanted if k not in found and (name := _core.key_bytes(k))[0] != 0}
        entries = yield from steps(self._found_many, missing)
        for k in wanted:
            if k not in found and (name := _core.key_bytes(k)) in entries:
                found[k] = entries[name][0].value
        return found

    @waiting
    def _found_many(self, names: Iterable[bytes]) -> Steps[dict[bytes, tuple[Entry, Exception | None]]]:
        """_found() of several keys, of which those that are there are told."""
        later: list[bytes] = []
        ours: list[bytes] = []
        uncached: dict[bytes, Exception] = {}
        with Claims(self) as claims:
            for name in sorted(names):
                state = self._look(name)[0] if self._notes else codec.ABSENT
                if state == codec.NEGATIVE:
                    continue
                claimed = state == codec.ABSENT and self._taken(claims, name) > 0
                (ours if claimed else later).append(name)
            loaded = (yield from steps(self._loaded, ours, claims, uncached)) if ours else {}
        found = {name: (entry, uncached.get(name)) for name, entry in loaded.items()}
        for name in later:  # there is a stale one, or somebody else loads or writes them: one by one, for each may be waited for
            entry, why = yield from self._found(name)
            if entry is not None:
                found[name] = entry, why
        return found

    @waiting
    def gets(self, key: Key) -> Steps[tuple[Any, int]]:
        """As Cache.gets. The version is the cached copy's: after an eviction cas() finds another one. It is 0 of a value that is in the
        store and cannot be cached: cas() with that stores nothing."""
        name = _core.key_bytes(key)
        value, version = super().gets(name)
        if version or name[0] == 0 or (there := (yield from self._got(name))) is MISSING:
            return value, version
        value, version = super().gets(name)
        return (value, version) if version else (there, 0)

    @waiting
    def __contains__(self, key: Key) -> Steps[bool]:
        return (yield from self._got(key)) is not MISSING

    @waiting
    def ttl(self, key: Key) -> Steps[float | None]:
        """As Cache.ttl; of a key that is not cached, or cannot be, as the store says."""
        name = _core.key_bytes(key)
        ttl = super().ttl(name)
        if ttl is None and name[0] != 0 and not self._is_negative(name):
            with Claims(self) as claims:
                version = self._taken(claims, name)
                entry = None if version == DELETED else (yield from steps(self._loaded, [name], claims)).get(name)
            if entry is not None:
                return math.inf if entry.ttl is None else entry.ttl
        return ttl

    def get_or_set(self, key: Key, factory: Callable[[], Any], ttl: Ttl = None, **options: Any) -> Any:
        """As Cache.get_or_set, for a key that the store has not either: factory()'s value is stored. Options: lease alone."""
        return super().get_or_set(key, factory, ttl, **self._flight_options(key, options))

    def _flight_options(self, key: Key, options: dict[str, Any]) -> dict[str, Any]:
        """Those of get_or_set() that this key takes. Raises: UsageError."""
        if not is_own(key) and options.keys() - {"lease"}:
            raise errors.UsageError("in front of a store stale_ttl is the policy's, and tags are open()'s: leave them, and early, out here")
        return options

    def _lease_beside(self, key: Key, answer: int) -> tuple[int, bool]:
        if answer != DELETED:
            return self.claim_version(key), False
        state, _, seen = self._look(key)
        return (seen, True) if state == codec.NEGATIVE else (0, False)

    @waiting
    def _fill_computed(self, key: Key, value: Any, version: int, terms: flight.Terms, refresh: bool) -> Steps[bool]:
        if is_own(key):
            return super()._fill_computed(key, value, version, terms, refresh)
        return version > 0 and (yield from self._added(_core.key_bytes(key), value, version, terms.ttl, refresh)) is True

    def _added(self, name: bytes, value: Any, version: int, ttl: Ttl, deleted: bool) -> Steps[Any]:
        """Store a value in the place of a claim, a mark, or (deleted) a tombstone, if the store has none: True. False: it has one, which is
        cached. MISSING: there is nothing of that version any more, so nothing is stored."""
        raise NotImplementedError

    # ---- all of it ----

    @waiting
    def delete(self, key: Key) -> Steps[bool]:
        return (yield from steps(self.delete_many, [key])) == 1

    def __delitem__(self, key: Key) -> None:
        if not self.delete(key):
            raise KeyError(key)


def _reopened(
    name: str, codec_name: str, trust: dict[str, Any], store: Store, tags: Callable[[bytes], Iterable[str]] | None
) -> Cache:
    return attach(name, codec=codec_name, store=store, tags=tags, **trust)


def just_now() -> errors.StoreUnavailable:
    return errors.StoreUnavailable("this key is in the store, but cannot be cached just now: nothing was changed; try again")


def is_over(entry: Entry) -> bool:
    """It had a time to live, of which nothing is left."""
    return entry.ttl is not None and entry.ttl <= 0


def no_tags(tags: Tags) -> None:
    if tags is not None:
        raise errors.UsageError("a copy that is loaded again would not have these tags: give open() tags=, a function of the key, instead")


def is_own(key: Key) -> bool:
    return _core.key_bytes(key)[0] == 0


def knows(e: BaseException) -> bool:
    """Does the caller that got this of a store's write know that nothing of it is to come? Only from what stores are to raise; not from
    what a signal's handler has raised, or a client's code that the store calls."""
    return isinstance(e, (errors.StoreUnavailable, errors.UsageError)) and not getattr(e, "unsettled", False)


def seconds_of(ttl: Ttl) -> float | None:
    """Raises: InvalidTTL."""
    return None if ttl is None else _core.seconds(ttl)
