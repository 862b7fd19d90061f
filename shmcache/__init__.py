"""shmcache: a cache that every process of a host shares, in shared memory, at the speed of a function call.

    import shmcache
    cache = shmcache.open("web", size="256M")       # create or attach
    cache.set("k", {"any": "value"}, ttl=60)
    cache.get("k")

The files, in reading order (arrows point down only; tests/unit/test_layers.py holds it):

    cli.py        shmcache, shmcache-admin                           -> everything below
    sidecar/      the same bytes over the Redis protocol             -> cache, core
    supervisor/   eviction ahead of demand, expiry, snapshots, dump  -> cache, core
    cache.py      Cache, create, attach, open                        -> codec, segment, core
    memoize.py    a function's results by its arguments              -> canonical, flight
    flight.py     get_or_set, lease, lock: computed once per host    -> core
    through.py    a cache in front of a store: writes that are stored first  -> stored
    back.py       the same: writes that the supervisor stores              -> stored
    stored.py     the same: misses load                                    -> policy, cache, flight, stores
    policy.py     which of them it is, in the segment's header             -> segment, core
    aio.py        all of it, awaited                                       -> cache, flight, threads
    threads.py    those in which aio calls a store                         -> core
    namespace.py  keys of their own, an O(1) clear of their own
    stores/       what stands behind the cache: SQLStore, FunctionStore -> codec, core
    canonical.py  values as bytes that do not depend on the process  -> codec, core
    codec.py      values that are not bytes, str or int              -> errors
    segment.py    the shared memory object, geometry, numpy views    -> core
    core/         what is compiled; its __init__ has its files
    errors.py     every exception
    notices.py    standard error of a process that goes on
    metrics.py    what a server of metrics prints, from stats()
"""

import sys as _sys

if not (_sys.platform == "linux" and _sys.maxsize == 2**63 - 1 and _sys.byteorder == "little"):
    raise ImportError("shmcache needs 64-bit little-endian Linux: it shares memory, locks and liveness as that kernel has them")

from shmcache.cache import Cache, attach, create, open
from shmcache.errors import (
    CapacityError,
    ConfigMismatch,
    DamageError,
    RowsRefused,
    SegmentExists,
    SegmentNotFound,
    ShmcacheError,
    StoreNeeded,
    StoreRefused,
    StoreUnavailable,
    UsageError,
)
from shmcache.segment import unlink

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess

    from shmcache import aio as aio
    from shmcache.policy import Policy as Policy
    from shmcache.stores import Store as Store
    from shmcache.stores.function import FunctionStore as FunctionStore
    from shmcache.stores.sql import SQLStore as SQLStore


def supervise(name: str) -> "subprocess.Popen[bytes]":
    """Start a supervisor for a live segment, as a child that ends when this process does (supervisor/start.py)."""
    from shmcache.supervisor import start

    return start.supervise(name)


def __getattr__(name: str) -> object:
    """aio, Policy, Store, FunctionStore and SQLStore are imported by who uses them."""
    import importlib

    if name == "aio":
        return importlib.import_module("shmcache.aio")
    module = {"Policy": "policy", "Store": "stores", "FunctionStore": "stores.function", "SQLStore": "stores.sql"}.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"shmcache.{module}"), name)


__all__ = [
    "Cache",
    "CapacityError",
    "ConfigMismatch",
    "DamageError",
    "RowsRefused",
    "SegmentExists",
    "SegmentNotFound",
    "ShmcacheError",
    "StoreNeeded",
    "StoreRefused",
    "StoreUnavailable",
    "UsageError",
    "attach",
    "create",
    "open",
    "supervise",
    "unlink",
]
__version__ = "0.1.0"
