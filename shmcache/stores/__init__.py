"""What stands behind the cache: `Store`, the little that a database, a service or a function has to be able to do for it.

    sql.py          SQLStore: a table of SQLite or PostgreSQL
    columns.py      keys and values as its columns have them
    connections.py  its connections
    bounded.py      one to PostgreSQL whose waits end
    function.py     FunctionStore: functions that load, save and delete

Write one of your own by giving a class the methods of `Store`; it need not derive from it. tests/integration/test_store.py is what stores
have to pass.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from shmcache import errors
from shmcache.core import _core

MISSING: Any = object()  # what a function of FunctionStore may return for a key that is not there
TIMEOUT = 5.0  # seconds that a call may take, unless it or the store says otherwise


def checked(keys: Iterable[bytes | str]) -> list[bytes]:
    """The keys of a store's call, for who calls it past the cache. Raises: InvalidKey."""
    return [_core.key_bytes(key) for key in _core.several(keys)]


def checked_items(items: Mapping[Any, Any]) -> dict[bytes, Any]:
    """The same of what is to be stored."""
    return {_core.key_bytes(key): value for key, value in _core.pairs(items)}


def lifetime(ttl: Any) -> float | None:
    """A ttl of an entry. Rules are those of the cache's own ttls but for two: it is what is left, so less than nothing is 0; and math.inf,
    which Cache.ttl() says of what does not expire, is None. Raises: InvalidTTL.
    """
    if ttl is None or (isinstance(ttl, (int, float)) and ttl == math.inf):
        return None
    return 0.0 if isinstance(ttl, (int, float)) and ttl < 0 else _core.seconds(ttl)


class Entry(NamedTuple):
    """What a store has under a key. Where a store is given entries, a plain (value, ttl) will do.

    A ttl that is neither a number of seconds below 1e12 nor a timedelta is an InvalidTTL, the refusal of that row.
    """

    value: Any
    ttl: float | None = None  # seconds that it has still to live; None, or math.inf: it does not expire; 0 or less: that is over


class Store(Protocol):
    """Many keys at a time, each call with a time limit. Called by several threads at once, and by children of fork.

    Args, of all calls:
        keys: bytes, as the cache has them.
        timeout: seconds that the call may take; None: the store's own limit. Nothing of the call should go on in the database after it.
        versions: for each key a number, 0 <= n < 2**63, that grows with its every change; only for a store that is `ordered`. A row whose
            version is not less is left as it is, which is no error. So what arrives late (the COMMIT of a process that was killed) undoes
            nothing that came after it: nor a delete, if the store remembers its version, as SQLStore's own table does. While the rows
            live, versions do not begin again; and a row is always written with one, or never.

    Returns, of calls with versions: of rows that have a higher one, that; None will do, if the store cannot tell.

    Raises, of all calls:
        StoreUnavailable: down, busy, too slow. Done or not done: as a whole, where the store has transactions. To do it again does no harm.
            unsettled is set if something may be going on all the same; for a while nothing of those keys is cached then. Whatever a write
            raises that is none of these four is taken for unsettled.
        RowsRefused: those keys, or their values, will never do; `errors` says why. The others were done (of a load: ask for them alone).
            unsettled: as above.
        StoreRefused: nothing was done, and never will be: no such table, no right to it.
        UsageError: the store was closed, or is not ordered.
    """

    @property
    def ordered(self) -> bool:
        """Does it take versions?"""

    def load_many(self, keys: Sequence[bytes], *, timeout: float | None = None) -> dict[bytes, Entry]:
        """What is there. A key that is not, or has expired, is absent."""

    def store_many(
        self, items: Mapping[bytes, tuple[Any, float | None]], *, timeout: float | None = None, versions: Mapping[bytes, int] | None = None
    ) -> Mapping[bytes, int] | None:
        """Put a value and its ttl under each key, whatever is there; in one transaction."""

    def delete_many(
        self, keys: Sequence[bytes], *, timeout: float | None = None, versions: Mapping[bytes, int] | None = None
    ) -> Mapping[bytes, int] | None:
        """Remove the keys, in one transaction; one that is not there is no error."""

    def close(self) -> None:
        """Wait for the calls that are running, and give back what it holds."""


def masked(text: str) -> str:
    """A text with the passwords of the urls and connection strings in it replaced by ***. Of a text that is only like one rather more is
    replaced."""
    text = re.sub(r"(://[^:/@\s]*:)(?:\S{0,4000}@|[^\n]{0,200}@)", r"\1***@", text)  # with spaces in it if it is none without
    return re.sub(r"(?i)((?:[?&;\s]|%3B|^)[\w-]*(?:password|passwd|pwd)(?:=|%3D))(?:'[^'\n]*'|(?:(?!%3B)[^&;\s])*)", r"\1***", text)


def opened(spec: str, table: str | None = None) -> Store:
    """A store for the command line: of an url that SQLAlchemy takes, as SQLStore(url, table); or of "module:function", what that returns.

    Raises: InvalidConfig, which does not repeat what may be a password; what the function raises.
    """
    module, _, name = spec.partition(":")
    if name.startswith("//"):
        from shmcache.stores.sql import SQLStore

        return SQLStore(spec, table or "shmcache")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise errors.InvalidConfig("the store is an url, as sqlite:///app.db or postgresql://user@host/database, or module:function")
    try:
        store: Store = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as e:
        raise errors.InvalidConfig(f"the store is an url, or module:function, not {spec!r} ({e}); is the module on PYTHONPATH?") from e
    return store
