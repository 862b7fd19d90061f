"""SQLStore: a table of SQLite or PostgreSQL as a Store, by SQLAlchemy Core.

One call is one transaction; a second one if the database refuses a row, in which halving finds out which. Values are encoded before it and
decoded after it: no code of others runs while a connection is held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from shmcache import errors
from shmcache.codec import get_codec
from shmcache.core import _core
from shmcache.stores import TIMEOUT, Entry, checked, checked_items, lifetime

try:
    import sqlalchemy as sa
    from sqlalchemy import exc
except ImportError as e:
    raise ImportError('SQLStore needs SQLAlchemy: pip install "shmcache[sql]"') from e

from shmcache.stores.columns import Columns, own
from shmcache.stores.connections import Connections, RowRefused, named, parsed_url

MOST_SECONDS = 1e6  # of a timeout; as milliseconds they fit 32 bits
IN_LIMIT = 500  # keys in one IN (...), or rows in one statement; SQLite takes 999 variables at least

Row = tuple[bytes, Any]  # a key, and what the statement is given for it
Action = Callable[[sa.Connection, list[Row]], object]


class SQLStore:
    """A table of SQLite or PostgreSQL as a Store. Safe from several threads, and after fork. The first call connects. It pickles, with its
    password, and without its connections.

    Args:
        url: as SQLAlchemy has it: "sqlite:///app.db" (a file; a relative path is one from the directory in which the store is made),
            "postgresql://user:password@host/database" (by psycopg 3).
        table: "name" or "schema.name". Without the next four it is the store's own, with the columns key, value, expires_at and version.
        key_column, value_column: of a table that is there. A binary key column gets the key's bytes, one of text its UTF-8, one of integers
            its decimal number. A binary value column gets the codec's bytes; any other the value itself, which has to be of the column's
            type (in a JSON column a tuple becomes a list).
        ttl_column: when a row expires, as date and time or in seconds since 1970. None: rows do not expire, their ttl is dropped.
        version_column: of integers; without it such a table is not `ordered`.
        create: make the store's own table if it is not there.
        encode_key, encode, decode: make a column's key of a key, a column's value of a value, and a value of a column's instead.
        codec: as of shmcache.create: "msgpack", or "pickle" (reading one runs code from the table).
        pool_size: connections at most, in each process. timeout: seconds that a call may take by default.

    An expired row is not found, and stays in the table until it is written, deleted or purged. In the store's own table a delete with a
    version leaves such a row, a tombstone, so that nothing with a lower version comes after it; from a table that is there the row goes.
    """

    def __init__(
        self, url: str, table: str = "shmcache", *, key_column: str | None = None, value_column: str | None = None,
        ttl_column: str | None = None, version_column: str | None = None, create: bool = True,
        encode_key: Callable[[bytes], Any] | None = None, encode: Callable[[Any], Any] | None = None,
        decode: Callable[[Any], Any] | None = None, codec: str = "msgpack", pool_size: int = 5, timeout: float = TIMEOUT,
    ) -> None:  # fmt: skip
        if key_column is not None and value_column is not None:
            self._names = key_column, value_column, ttl_column, version_column
        elif (key_column, value_column, ttl_column, version_column) == (None,) * 4:
            self._names = "key", "value", "expires_at", "version"
        else:
            raise errors.InvalidConfig("a table that is there needs key_column and value_column; the store's own table is given no columns")
        if not (pool_size > 0 and timeout > 0):
            raise errors.InvalidConfig("pool_size and timeout are numbers above 0")
        self.ordered = self._names[3] is not None
        self._own = key_column is None
        self._create = create and self._own
        self._table = table
        self._hooks = encode_key, encode, decode
        self._codec = get_codec(codec)
        self._timeout = timeout
        self._columns: Columns | None = None
        self._connections = Connections(parsed_url(url), pool_size, timeout)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_columns": None}

    def __repr__(self) -> str:
        return f"<shmcache.SQLStore {self._table!r} of {self._connections.shown}>"

    # ---- the calls ----

    def load_many(self, keys: Sequence[bytes], *, timeout: float | None = None) -> dict[bytes, Entry]:
        deadline = self._deadline(timeout)
        columns = self._open(deadline)
        refused: dict[bytes, Exception] = {}
        rows = _encoded(dict.fromkeys(checked(keys)), columns.encode_key, refused)
        found: dict[Any, Any] = {}

        def select(c: sa.Connection, some: list[Row]) -> None:
            for part in self._parts(c, some, deadline):
                found.update((row[0], row) for row in c.execute(columns.select, {"keys": part}))

        self._run(select, rows, deadline, refused)
        now = time.time()
        entries: dict[bytes, Entry] = {}
        for key, name in rows:
            if name in found:
                _, value, expiry = found[name]
                try:
                    ttl = lifetime(columns.ttl(expiry, now))
                    if ttl is None or ttl > 0:
                        entries[key] = Entry(columns.decode(value), ttl)
                except Exception as e:  # a hook, a pickle: anybody's code
                    refused[key] = e
        if refused:
            raise errors.RowsRefused(refused)
        return entries

    def store_many(
        self, items: Mapping[bytes, tuple[Any, float | None]], *, timeout: float | None = None, versions: Mapping[bytes, int] | None = None
    ) -> Mapping[bytes, int]:
        deadline = self._deadline(timeout, versions)
        columns = self._open(deadline)
        refused: dict[bytes, Exception] = {}
        entries = checked_items(items)
        now = time.time()

        def row(key: bytes) -> dict[str, Any]:
            value, ttl = entries[key]
            version = None if versions is None else versions[key]
            return columns.row(columns.encode_key(key), columns.encode(value), columns.expires(lifetime(ttl), now), version)

        rows = _encoded(sorted(entries), row, refused)  # sorted: two batches lock their rows in the same order
        if versions is not None:
            return self._run_versioned(columns, columns.upsert[True], rows, deadline, refused, versions)
        self._run(lambda c, some: self._many(c, columns, columns.upsert[False], some, deadline), rows, deadline, refused, write=True)
        if refused:
            raise errors.RowsRefused(refused)
        return {}

    def delete_many(
        self, keys: Sequence[bytes], *, timeout: float | None = None, versions: Mapping[bytes, int] | None = None
    ) -> Mapping[bytes, int]:
        deadline = self._deadline(timeout, versions)
        columns = self._open(deadline)
        refused: dict[bytes, Exception] = {}

        now = time.time()

        def row(key: bytes) -> Any:
            name = columns.encode_key(key)
            if versions is None:
                return name
            return columns.tombstone(name, now, versions[key]) if columns.tombstones else {"k": name, "v": versions[key]}

        rows = _encoded(sorted(set(checked(keys))), row, refused)
        if versions is not None:
            statement = columns.upsert[True] if columns.tombstones else columns.delete[True]
            return self._run_versioned(columns, statement, rows, deadline, refused, versions)

        def delete(c: sa.Connection, some: list[Row]) -> None:
            for part in self._parts(c, some, deadline):
                c.execute(columns.delete[False], {"keys": part})

        self._run(delete, rows, deadline, refused, write=True)
        if refused:
            raise errors.RowsRefused(refused)
        return {}

    def purge(self, age: float = 86400.0, *, timeout: float | None = None) -> int:
        """Remove the rows that have been expired, or deleted with a version, for so many seconds at least: how many they were. Let it be
        more than the age of any snapshot that may be restored.

        Raises: StoreUnavailable; StoreRefused: rows of this table do not expire.
        """
        deadline = self._deadline(timeout)
        columns = self._open(deadline)
        with self._connections.transaction(deadline, write=True) as c:
            return int(c.execute(sa.delete(columns.table).where(columns.expired(time.time() - age))).rowcount)

    def close(self) -> None:
        self._connections.close()

    # ---- a call's way ----

    def _deadline(self, timeout: float | None, versions: object = None) -> float:
        if versions is not None and not self.ordered:
            raise errors.UsageError("this store is not ordered: give SQLStore version_column=, or do not give versions")
        return _core.monotonic() + min(self._timeout if timeout is None else timeout, MOST_SECONDS)

    def _open(self, deadline: float) -> Columns:
        """The table's columns; made first, if it is to be. Raises: StoreRefused if it is not as it was said to be."""
        if self._columns is None:
            schema, _, name = self._table.rpartition(".")
            try:
                with self._connections.transaction(deadline) as c:
                    table = sa.Table(name, sa.MetaData(schema=schema or None), autoload_with=c, resolve_fks=False)
            except exc.NoSuchTableError:
                if not self._create:
                    raise errors.StoreRefused(f"there is no table {self._table!r} in {self._connections.shown}: make it") from None
                table = own(name, schema or None)
                with self._connections.transaction(deadline, write=True, alone=self._table) as c:
                    c.execute(sa.schema.CreateTable(table, if_not_exists=True))
            self._columns = Columns(table, self._names, self._hooks, self._codec, self._connections.dialect, self._own)
        return self._columns

    def _run(
        self, action: Action, rows: list[Row], deadline: float, refused: dict[bytes, Exception], *, write: bool = False,
        versioned: bool = False,
    ) -> None:  # fmt: skip
        """The action on all rows but those that the database refuses, in one transaction.

        versioned: one at a time: an INSERT that is not committed yet holds up another INSERT, but no DELETE.
        """
        if not rows:
            return
        alone = self._table if versioned else None
        try:
            with self._connections.transaction(deadline, write, alone) as c:
                action(c, rows)
        except RowRefused as e:
            if len(rows) == 1:
                refused[rows[0][0]] = e
                return
            with self._connections.transaction(deadline, write, alone) as c:
                self._sift(c, action, rows, deadline, refused)

    def _run_versioned(
        self, columns: Columns, statement: sa.Insert | sa.Delete, rows: list[Row], deadline: float, refused: dict[bytes, Exception],
        versions: Mapping[bytes, int],
    ) -> Mapping[bytes, int]:  # fmt: skip
        """A statement on all rows of lower versions: the versions of those that have a higher one."""
        newer: dict[bytes, int] = {}

        def change(c: sa.Connection, some: list[Row]) -> None:
            if self._many(c, columns, statement, some, deadline) == len(some):
                return
            there: dict[Any, int] = {}
            names = [(key, columns.encode_key(key)) for key, _ in some]
            for part in self._parts(c, names, deadline):
                there.update((row[0], row[1]) for row in c.execute(columns.select_version, {"keys": part}))
            newer.update((key, there[name]) for key, name in names if (there.get(name) or 0) > versions[key])

        self._run(change, rows, deadline, refused, write=True, versioned=True)
        if refused:
            raise errors.RowsRefused(refused)
        return newer

    def _sift(self, c: sa.Connection, action: Action, rows: list[Row], deadline: float, refused: dict[bytes, Exception]) -> None:
        """The action on both halves of rows, one of which at least is refused."""
        for half in rows[: len(rows) // 2], rows[len(rows) // 2 :]:
            self._connections.limit(c, deadline)
            c.exec_driver_sql("SAVEPOINT half")
            error = None
            try:
                action(c, half)
            except Exception as e:
                error = named(e)
                if not isinstance(error, RowRefused):
                    raise
                c.exec_driver_sql("ROLLBACK TO SAVEPOINT half")
                self._connections.forget_limit(c)
            c.exec_driver_sql("RELEASE SAVEPOINT half")
            if error is None:
                continue
            if len(half) == 1:
                refused[half[0][0]] = error
            else:
                self._sift(c, action, half, deadline, refused)

    def _parts(self, c: sa.Connection, rows: list[Row], deadline: float) -> Iterator[list[Any]]:
        """What the statement is given, as much as one takes at a time."""
        for i in range(0, len(rows), IN_LIMIT):
            self._connections.limit(c, deadline)
            yield [name for _, name in rows[i : i + IN_LIMIT]]

    def _many(self, c: sa.Connection, columns: Columns, statement: sa.Insert | sa.Delete, rows: list[Row], deadline: float) -> int:
        """How many rows there were to change."""
        changed = 0
        for part in self._parts(c, rows, deadline):
            result = c.execute(statement, columns.arguments(statement, part))
            changed += len(result.all()) if result.returns_rows else result.rowcount
        return changed


def _encoded(keys: Iterable[bytes], encode: Callable[[bytes], Any], refused: dict[bytes, Exception]) -> list[Row]:
    """Each key with what encode makes of it; those of which it makes nothing are refused."""
    rows = []
    for key in keys:
        try:
            rows.append((key, encode(key)))
        except Exception as e:  # the codec's, or a hook's: anybody's code
            refused[key] = e
    return rows
