"""`Cache`: the compiled table with codecs; and create, attach, open.

`Cache.get` and its siblings are the compiled methods of core._core.Table, inherited: a hit runs no Python frame. What stands
here runs when a value is not bytes, str or int, and when a person asks for figures.
"""

from __future__ import annotations

from shmcache import errors, flight, segment
from shmcache.codec import BYTES, INT, STR, check_codec, get_codec
from shmcache.core import _core
from shmcache.segment import Segment

TYPE_CHECKING = False  # see segment.py
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import timedelta
    from typing import Any

    from shmcache.core._claims import Lock
    from shmcache.namespace import Namespace
    from shmcache.policy import Policy
    from shmcache.stores import Store

DEFAULT_SIZE = "256M"


class Cache(_core.Table):
    """One handle on a segment: a dict that every process of the host shares. Safe from several threads, and after fork.

    Made by create(), attach() and open(). Pickles to its name, so that spawned workers can be handed one.
    """

    def __init__(self, mapping: _core.Mapping, codec: str = "msgpack", trust: dict[str, Any] | None = None) -> None:
        self._codec: Any = None
        self._codec_name = codec
        self._trust = trust or {}

    def _load_codec(self) -> Any:
        if self._codec is None:
            self._codec = get_codec(self._codec_name)
            unpack = self._codec.unpack
            self._unpack = unpack and _core.Bound(unpack.func, **unpack.keywords)
        return self._codec

    def _encode(self, value: Any) -> tuple[int, bytes]:
        number, payload = self._load_codec().encode(value)
        return number, payload

    def _decode(self, codec: int, payload: bytes) -> Any:
        return self._load_codec().decode(codec, payload)

    def _value(self, codec: int, payload: bytes) -> Any:
        """Of what an item holds."""
        if codec == BYTES:
            return payload
        if codec == STR:
            return payload.decode("utf-8", "surrogatepass")
        return int.from_bytes(payload, "little", signed=True) if codec == INT else self._decode(codec, payload)

    def _undecoded(self, error: Exception) -> Exception:
        named: Exception = self._load_codec().named(error)
        return named

    def get_or_set(
        self, key: bytes | str, factory: Callable[[], Any], ttl: float | timedelta | None = None, *, lease: float = flight.LEASE,
        stale_ttl: float | timedelta | None = None, early: float | bool = 0.0, tags: Iterable[str] | None = None,
    ) -> Any:
        """The key's value; on a miss factory()'s, stored. Of all threads of all processes that miss at once one computes, the rest wait.

        Args: factory: called without arguments. lease: seconds that it may take before another caller tries as well. stale_ttl: seconds
        after ttl in which one caller computes the value anew and the others are given the old one at once (who passes neither stale_ttl nor
        early waits, as for a miss). early: before ttl is over one caller computes it anew, the more likely the nearer the end is and the
        longer factory takes (XFetch; True is 1.0, more is earlier). tags: as for set; those from before factory is called.
        If it raises, the caller gets the exception and one of those who wait tries in turn. If its process dies, one takes over at once. If
        the key is set, deleted or cleared meanwhile, or one of the tags invalidated, that wins: the computed value is returned to its
        caller, and nobody else is given it.
        Raises: as set; what factory raises.
        Source: Vattani, Chierichetti, Lowenstein, Optimal Probabilistic Cache Stampede Prevention, VLDB 2015.
        """
        value = self.get(key, flight.MISSING)
        if value is not flight.MISSING:
            return value
        return flight.get_or_set(self, key, factory, lease, flight.Terms(self, ttl, stale_ttl, early, tags))

    def _fill_computed(self, key: bytes | str, value: Any, version: int, terms: flight.Terms, refresh: bool) -> bool:
        """Store what was computed for a claim (refresh: a stale item) of this version: True if that is used up."""
        return version > 0 and terms.fill_claim(key, value, version, refresh)

    def _lease_beside(self, key: bytes | str, answer: int) -> tuple[int, bool]:
        """Of a key on which claim() gives no claim: the version of what stands there, which is the lease instead (0: nothing is
        stored), and if it is a tombstone."""
        return 0, False

    def memoize(
        self, ttl: float | timedelta | None = None, *, name: bytes | str | None = None, lease: float = flight.LEASE,
        stale_ttl: float | timedelta | None = None, early: float | bool = 0.0,
        tags: Iterable[str] | Callable[..., Iterable[str]] | None = None,
    ) -> Any:
        """A decorator: the function's results are cached by its arguments and computed once per host, as by get_or_set.

        Args: name: under which the results are kept. Without it the function is told from all others by its module, qualified name, code,
        defaults, attributes and what it closes over (by its program, in `__main__`); a function whose code was changed starts without
        results. With it the caller answers for that. stale_ttl, early: as for get_or_set; tags: too, or a function that makes them
        of the arguments.
        f(1), f(a=1) and f(1, 2) are one call of f(a, b=2). Arguments are what the codec takes, and classes; equal ones of equal types, at
        every depth, are the same in every process; 1 and True and 1.0 are three. The function gets `cache_key(*args)` and `forget(*args)`.
        Raises: UsageError: it is a coroutine function, a generator, a class, a staticmethod or classmethod, or closes over what cannot be
        encoded; when it is called: UnsupportedValue: an argument cannot; TypeError: it does not take these arguments.
        """
        from shmcache.memoize import memoize

        return memoize(self, ttl, name, lease, stale_ttl, early, tags)

    def invalidate(self, *keys: bytes | str) -> None:
        """Drop the cached copies, not what is in the store: for who has changed it there past this cache. Of what is written back, what the
        store has not got yet stays."""
        each([_core.key_bytes(k) for k in keys], self.discard)

    def invalidate_tag(self, *tags: str) -> None:
        """Remove all items that were stored with one of these tags, for everybody: one write a tag, however many items there are.

        What is being computed with one of them (get_or_set, a lease) is not found either; what a set stores after it stays.
        Raises: InvalidTag.
        """
        keys = [self._tag_key(tag) for tag in tags]  # all are checked before the first is renewed
        for key in keys:
            self._renew(key)

    def get_lease(self, key: bytes | str, seconds: float = flight.LEASE, tags: Iterable[str] | None = None) -> flight.Lease:
        """The key's value, or the right to fill it: memcached's lease, for who fills by hand. Never waits.

        Args: seconds: after which another gets it. tags: whose invalidation voids the lease. Returns: a Lease; see its attributes.
            lease = cache.get_lease("k")
            if lease.found: return lease.value
            if lease.held: cache.fill(lease, compute(), ttl=60)
        Source: Nishtala et al., Scaling Memcache at Facebook, NSDI 2013, 3.2.1.
        """
        return flight.get_lease(self, key, seconds, tags)

    def fill(self, lease: flight.Lease, value: Any, ttl: float | timedelta | None = None, tags: Iterable[str] = ()) -> bool:
        """Store the value of a held lease, with its tags and these: True. It is held no more then.

        False if a set, delete, clear or incr of the key, invalidate_tag of one of its tags, or the end of its seconds has voided it.
        Raises: as set; UsageError: it is not held.
        """
        return flight.fill(self, lease, value, ttl, tags)

    def release(self, lease: flight.Lease) -> bool:
        """Give a lease back without a value, so that the next to ask gets one at once: True if it still stood."""
        return flight.release(self, lease)

    def lock(self, name: bytes | str, ttl: float | None = None) -> Lock:
        """A lock that all processes share: `with cache.lock("report", ttl=30): ...`. Its owner's death, or ttl seconds, release it.

        Taken by acquire(), it is held until release(), also when nothing refers to the Lock any more.
        A block that ends after its ttl gets a LockLost warning, counted in stats()["locks_lost"].
        """
        return flight.lock(self, name, ttl)

    def namespace(self, name: bytes | str) -> Namespace:
        """A part of the cache with keys of its own, and an O(1) clear() of its own."""
        from shmcache.namespace import Namespace

        return Namespace(self, name)

    @property
    def segment(self) -> Segment:
        """The segment's bytes as numpy views, read-only."""
        return self.views()

    def views(self, writable: bool = False) -> Segment:
        """The segment's bytes as numpy views. writable: for tests and repair; a wrong store damages the cache for everybody."""
        if self.closed:
            raise errors.CacheClosed("this handle was closed: attach or open the cache again")
        return Segment(self.mapping, writable)

    def stats(self) -> dict[str, Any]:
        """Figures since the segment was created, as a dict that json takes.

        Keys: name, size_bytes, used_bytes (chunks and pages in use), slab_bytes, items, hits, misses, hit_ratio (None before
        the first get), sets, deletes, evictions, expirations, inline_evictions, locks_lost, other counters, processes (living; pid, row,
        started_ms ...), unlinked (the name is gone, or another segment's), slab_classes (chunk_bytes, pages, live, free, reserved
        chunks), supervisor, durability (restoring: a restore goes on, or was killed; snapshot_age_s: None: there was none; snapshot_failed:
        the last one could not be written; snapshot_writing_s: since when the supervisor writes one, None: it does not; log_waiting_bytes:
        in the processes' rings, not taken over by the supervisor), store (None: there is no policy; else policy, and of all processes
        loads, found, writes (keys), errors (calls); written back also dirty_items, dirty_bytes (not stored yet), oldest_s (how long the
        oldest of these has been), failing_s (since when the store fails; None: it does not), refused (items that the store refuses)).
        """
        counters = self.counters()
        classes, pages = self.slab_classes()
        gets = counters["hits"] + counters["misses"]
        used = sum(c["chunk_bytes"] * c["live"] for c in classes) + pages["big_pages"] * pages["page_bytes"]
        store: dict[str, Any] | None = None
        if self.mapping.settings()["policy"]:
            from shmcache import policy

            store = policy.store_stats(self)
        return {
            "name": self.name,
            "size_bytes": memoryview(self.mapping).nbytes,
            "slab_bytes": pages["pages"] * pages["page_bytes"],
            "used_bytes": used,
            "items": len(self),
            "unlinked": self.unlinked,
            "hit_ratio": counters["hits"] / gets if gets else None,
            **counters,
            "free_pages": pages["free_pages"],
            "big_pages": pages["big_pages"],
            "processes": self.processes(),
            "slab_classes": classes,
            "supervisor": self.supervisor(),
            "durability": self.durability(),
            "store": store,
        }

    def verify(self) -> list[str]:
        """Hold every structure against its invariants (numbered in core/_sweep.pyx): a line for each violation, [] if whole.

        May run while others work; each stripe and slab class is looked at under its lock. What a dead process left and the next
        hand will settle is no violation.
        """
        from shmcache.core import _sweep

        return _sweep.verify(self)

    def __repr__(self) -> str:
        return f"<shmcache.Cache {'closed' if self.closed else self.name!r}>"

    def __reduce__(self) -> Any:
        if self.closed:
            raise errors.CacheClosed("a closed handle cannot be pickled")
        return _reattach, (self.name, self._codec_name, self._trust)


def _reattach(name: str, codec: str, trust: dict[str, Any]) -> Cache:
    return attach(name, codec=codec, **trust)


def _options(
    default_ttl: float | timedelta | None, max_value: int | str | None, stripes: int | None, max_processes: int | None,
    lock_limit: float | None, log_buffer: int | str | None,
) -> dict[str, Any]:
    """Those that were given, as segment.geometry takes them. Raises: InvalidConfig."""
    given: dict[str, Any] = {}
    if default_ttl is not None:
        seconds = default_ttl if isinstance(default_ttl, (int, float)) else getattr(default_ttl, "total_seconds", lambda: None)()
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < 1e12:
            raise errors.InvalidTTL(f"default_ttl is a number of seconds above 0, or None for never, not {default_ttl!r}")
        given["default_ttl_ms"] = max(1, round(seconds * 1000))
    if max_value is not None:
        given["max_value_bytes"] = segment.parse_size(max_value, "max_value")
    if stripes is not None:
        if isinstance(stripes, bool) or not isinstance(stripes, int) or not 1 <= stripes <= 65536 or stripes & (stripes - 1):
            raise errors.InvalidConfig(f"stripes is a power of two from 1 to 65536, not {stripes!r}")
        given["stripes"] = stripes
    if max_processes is not None:
        most = _core.CONSTANTS["max_rows"]
        if isinstance(max_processes, bool) or not isinstance(max_processes, int) or not 1 <= max_processes <= most:
            raise errors.InvalidConfig(f"max_processes is 1 to {most}, not {max_processes!r}")
        given["max_processes"] = max_processes
    if lock_limit is not None:
        if isinstance(lock_limit, bool) or not isinstance(lock_limit, (int, float)) or not 0.001 <= lock_limit < 1e6:
            raise errors.InvalidConfig(f"lock_limit is a number of seconds from 0.001, not {lock_limit!r}")
        given["lock_limit_ms"] = round(lock_limit * 1000)
    if log_buffer is not None:
        n = segment.parse_size(log_buffer, "log_buffer")
        if n & (n - 1) or not 1 << 16 <= n <= 1 << 30:
            raise errors.InvalidConfig(f"log_buffer is a power of two from '64K' to '1G', not {log_buffer!r}")
        given["ring_bytes"] = n
    return given


def each(names: Iterable[bytes], call: Callable[[bytes], object]) -> None:
    """The call for all of them. Raises: what one of them raised for want of time or room, when all have been tried."""
    failed: Exception | None = None
    for name in names:
        try:
            call(name)
        except errors.CapacityError as e:
            failed = e
    if failed is not None:
        raise failed


def create(
    name: str, size: int | str = DEFAULT_SIZE, *, default_ttl: float | timedelta | None = None, codec: str = "msgpack",
    max_value: int | str | None = None, stripes: int | None = None, mode: int = 0o600, group: int | str | None = None,
    max_processes: int | None = None, lock_limit: float | None = None, huge_pages: bool = False, log_buffer: int | str | None = None,
    policy: Policy | str | None = None, store: Store | None = None, tags: Callable[[bytes], Iterable[str]] | None = None,
) -> Cache:
    """Create a segment and open it.

    Args:
        name: 1 to 200 bytes without "/"; the object is /dev/shm/shmcache.NAME.
        size: bytes in all, or "256M", "1G"; at least "4M". Reserved at once.
        default_ttl: seconds until an item expires that is set without ttl; None: never.
        codec: for values other than bytes, str and int: "msgpack", or "pickle" (which runs code from the segment: trust its writers).
        max_value: bytes of one encoded value, 64M by default; never over a quarter of the slab memory.
        stripes: number of locks, a power of two, 1,024 by default.
        mode, group: of the object; who else may open it.
        max_processes: that can be attached at once, 128 by default, at most 1,024. 1 KiB each.
        lock_limit: seconds that a write waits for a lock that a living process holds, 1 by default; then StripeBusy.
        log_buffer: bytes for each of max_processes, in which what it writes waits to be taken over by the append log (`shmcache supervise
            --log`): a power of two from "64K"; None: no log can be kept.
        huge_pages: put the segment's memory into pages of 2 MiB (Linux 6.1): a large cache is faster, and every worker's page tables are
            smaller. A HugePagesRefused warning says if the kernel has not done it.
        policy: how the cache stands in front of a store: "through", "around", "back", or a Policy (policy.py); kept in the segment. With a
            store and no policy: "through".
        store: a Store (stores/), for this handle. Each process has its own; a handle without one reads what is cached.
        tags: with a store: a function that makes the tags of a key's cached copy of the key's bytes, for invalidate_tag().
    Raises: SegmentExists, SharedMemoryFull, InvalidName, InvalidConfig, SegmentForbidden.
    """
    check_codec(codec)
    options = _options(default_ttl, max_value, stripes, max_processes, lock_limit, log_buffer)
    options |= _policy_options(policy, store, tags)
    mapping = segment.create(name, segment.parse_size(size), mode=mode, group=group, huge_pages=huge_pages, **options)
    return _handle(mapping, codec, {}, store, tags)


def _policy_options(
    policy: Policy | str | None, store: Store | None, tags: Callable[[bytes], Iterable[str]] | None
) -> dict[str, Any]:
    """As segment.create takes them. Raises: InvalidConfig."""
    if policy is None and store is None:
        return {}
    from shmcache.policy import Policy, check

    chosen = Policy(policy or "through") if isinstance(policy, str | None) else policy
    if store is not None:
        check(chosen, store, tags)
    return {"policy": chosen.number, "config": chosen.packed(), "dirty_limit": chosen.dirty_bytes}


def _handle(
    mapping: _core.Mapping, codec: str, trust: dict[str, Any], store: Store | None, tags: Callable[[bytes], Iterable[str]] | None
) -> Cache:
    if store is None:
        return Cache(mapping, codec, trust)
    from shmcache.policy import policy_of

    policy = policy_of(mapping)
    if policy is not None and policy.mode == "back":
        from shmcache.back import BackCache

        return BackCache(mapping, codec, trust, store, tags)
    from shmcache.through import ThroughCache

    return ThroughCache(mapping, codec, trust, store, tags)


def attach(
    name: str, *, codec: str = "msgpack", owner: int | str | None = None, group: int | str | None = None, store: Store | None = None,
    tags: Callable[[bytes], Iterable[str]] | None = None, wait: bool = True,
) -> Cache:
    """Open a live segment.

    While it is not certain yet that it can be restored, this waits, up to a minute; two seconds, if the process that restored it has ended.

    Args: codec, store, tags: as in create; they are this handle's. owner, group: a user or group, by id or name, whose segment is trusted.
    wait: False: raise BeingRestored at once.
    Raises: SegmentNotFound, SegmentForbidden, ForeignSegment, NotASegment, LayoutMismatch, SegmentTruncated, TooManyProcesses,
    BeingRestored.
    """
    check_codec(codec)
    trust: dict[str, Any] = {k: v for k, v in (("owner", owner), ("group", group)) if v is not None}
    return _handle(segment.attach(name, wait=wait, **trust), codec, trust, store, tags)


def attach_unsettled(name: str) -> Cache:
    """attach(), also while its restore may still be refused: to look, or to complete it; nothing is to be written. Raises: as attach()."""
    return Cache(segment.attach(name, unsettled=True))


def open(
    name: str, size: int | str | None = None, *, default_ttl: float | timedelta | None = None, codec: str = "msgpack",
    max_value: int | str | None = None, stripes: int | None = None, mode: int = 0o600, group: int | str | None = None,
    max_processes: int | None = None, lock_limit: float | None = None, huge_pages: bool = False, log_buffer: int | str | None = None,
    owner: int | str | None = None, policy: Policy | str | None = None, store: Store | None = None,
    tags: Callable[[bytes], Iterable[str]] | None = None, wait: bool = True,
) -> Cache:
    """Open a segment, and create it if there is none: what a worker calls. Arguments as of create (size: 256M by default) and attach.

    A live segment keeps its own settings: arguments that differ from them are said in one ConfigMismatch warning.
    """
    options = _options(default_ttl, max_value, stripes, max_processes, lock_limit, log_buffer) | _policy_options(policy, store, tags)
    new = {"mode": mode, "group": group, "huge_pages": huge_pages}
    how = {"codec": codec, "owner": owner, "store": store, "tags": tags, "wait": wait}
    return _attached_or_created(name, size, options, new, {**how, "group": group})


def open_logged(
    name: str, size: int | str | None, log_policy: int, *, create: bool = True, huge_pages: bool = False,
    log_buffer: int | str | None = None, policy: Policy | str | None = None, version_base: int | None = None,
) -> Cache:
    """open(), for who is about to log it: one that is created is logged from the first moment, so that no write is acknowledged before.
    create: False: it is to be there. version_base: of one that is created (header_t)."""
    options = _options(None, None, None, None, None, log_buffer) | _policy_options(policy, None, None)
    new = {"huge_pages": huge_pages, "log_policy": log_policy, "version_base": version_base}
    return _attached_or_created(name, size, options, new if create else None, {})


def _attached_or_created(
    name: str, size: int | str | None, options: dict[str, Any], new: dict[str, Any] | None, how: dict[str, Any]
) -> Cache:
    """new: of one that is created; None: none is."""
    size_bytes = None if size is None else segment.parse_size(size)
    for _ in range(100):  # only against somebody who creates and unlinks all the while
        try:
            cache = attach(name, **how)
        except errors.SegmentNotFound:
            if new is None:
                raise
            try:
                mapping = segment.create(name, size_bytes or segment.parse_size(DEFAULT_SIZE), **new, **options)
                return _handle(mapping, how.get("codec", "msgpack"), {}, how.get("store"), how.get("tags"))
            except errors.SegmentExists:
                continue
        _warn_of_differences(cache, size_bytes, options)
        return cache
    raise errors.SegmentNotFound(f"the segment {name!r} is created and unlinked again and again")


def create_restored(
    name: str, restored_seq: int, epoch: int, was: dict[str, Any], *, size: int | str | None = None, codec: str = "msgpack",
    default_ttl: float | timedelta | None = None, max_value: int | str | None = None, stripes: int | None = None, mode: int = 0o600,
    group: int | str | None = None, max_processes: int | None = None, lock_limit: float | None = None, huge_pages: bool = False,
    log_buffer: int | str | None = None, log_policy: int = 0, instead_of: Cache | None = None,
) -> Cache:
    """Create a segment of this epoch into which core._stream.Restore then puts items of versions up to restored_seq. was: settings() of the
    segment that they come from, for arguments that are not given, and for what is added to versions in the store. instead_of: the segment
    of this name, in which nobody is (segment.create). The others, and what is raised, as of create()."""
    if restored_seq <= 0:  # by that it would be a segment into which nothing is restored
        raise errors.InvalidConfig(f"restored_seq is 1 at least, not {restored_seq}")
    options = {k: was[k] for k in ("default_ttl_ms", "max_value_bytes", "stripes", "max_processes", "lock_limit_ms", "ring_bytes")}
    options |= {k: was[k] for k in ("policy", "config", "dirty_limit", "version_base") if k in was}
    options |= _options(default_ttl, max_value, stripes, max_processes, lock_limit, log_buffer)
    size_bytes = was["size_bytes"] if size is None else segment.parse_size(size)
    options |= {"restored_seq": restored_seq, "restored_epoch": epoch, "log_policy": log_policy if options["ring_bytes"] else 0}
    there = None if instead_of is None else instead_of.mapping
    mapping = segment.create(name, size_bytes, mode=mode, group=group, huge_pages=huge_pages, instead_of=there, **options)
    return Cache(mapping, codec)


def _warn_of_differences(cache: Cache, size_bytes: int | None, options: dict[str, Any]) -> None:
    live = cache.mapping.settings()
    wanted = dict(options)
    if size_bytes is not None:
        wanted["size_bytes"] = -(-size_bytes // 4096) * 4096
    if "max_value_bytes" in wanted:
        wanted["max_value_bytes"] = min(wanted["max_value_bytes"], live["max_value_most"])
    no_number = ("config", "policy", "dirty_limit")
    differ = [f"{k} {v:,} asked, {live[k]:,} in force" for k, v in wanted.items() if k not in no_number and live[k] != v]
    if "config" in wanted and wanted["config"] != live["config"]:
        from shmcache import policy

        differ.append(f"{policy.unpacked(wanted['config'])} asked, {policy.policy_of(cache.mapping)} in force")
    if differ:
        import warnings

        warnings.warn(
            f"the segment {cache.name!r} is live with other settings: {'; '.join(differ)}. To change them, unlink it and create it again",
            errors.ConfigMismatch,
            stacklevel=3,
        )
