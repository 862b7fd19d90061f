"""How keys, values and expiry become what the columns of a table hold, and back; and the statements on that table."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from shmcache import codec as codecs
from shmcache import errors

LONG_KEY = 2048  # bytes; an index of PostgreSQL takes up to 2,704


def own(name: str, schema: str | None) -> sa.Table:
    """The table that SQLStore makes."""
    return sa.Table(
        name,
        sa.MetaData(),
        sa.Column("key", sa.LargeBinary, primary_key=True),
        sa.Column("value", sa.LargeBinary, nullable=False),
        sa.Column("expires_at", sa.Double),  # seconds since 1970; NULL: never
        sa.Column("version", sa.BigInteger),
        schema=schema,
    )


class Columns:
    """Key, value, expiry and version of a table.

    Args: names: of the four, the last two or None. hooks: encode_key, encode and decode of SQLStore. codec: for binary values.
    tombstones: what is deleted with a version leaves a row without a value that expired at the negative of the time.
    Raises: StoreRefused if there is no such column, or keys have no form in it.
    """

    def __init__(
        self, table: sa.Table, names: tuple[str, str, str | None, str | None], hooks: tuple[Callable[..., Any] | None, ...],
        codec: codecs.Codec, dialect: str, tombstones: bool,
    ) -> None:  # fmt: skip
        for name in names:
            if name is not None and name not in table.c:
                raise errors.StoreRefused(f"the table {table} has no column {name!r}: its columns are {', '.join(table.c.keys())}")
        self.table, self._codec, self._dialect, self.tombstones = table, codec, dialect, tombstones
        self.key, self.value = table.c[names[0]], table.c[names[1]]
        self.expiry, self.version = (None if name is None else table.c[name] for name in names[2:])
        self._type = _python_type(self.value)
        encode_key, encode, decode = hooks
        self.encode_key: Callable[[bytes], Any] = encode_key or self._key_encoder()
        self.encode: Callable[[Any], Any] = encode or (self._pack if self._type is bytes else self._checked)
        self.decode: Callable[[Any], Any] = decode or (self._unpack if self._type is bytes else lambda value: value)
        either = (False, True) if self.version is not None else (False,)
        self.select = self._select()
        self.select_version = sa.select(self.key, sa.null() if self.version is None else self.version).where(self._among_keys())
        self.upsert = {versioned: self._upsert(versioned) for versioned in either}
        self.delete = {versioned: self._delete(versioned) for versioned in either}

    # ---- keys and values ----

    def _key_encoder(self) -> Callable[[bytes], Any]:
        kind = _python_type(self.key)
        if kind is bytes:
            return _shortened if self._dialect == "postgresql" else bytes
        if kind is str:
            return _text
        if kind is int:
            return _number
        raise errors.StoreRefused(f"the key column {self.key} is neither binary, text nor integer: give SQLStore encode_key=")

    def _pack(self, value: Any) -> bytes:
        return self._codec.encode(value)[1]

    def _unpack(self, data: bytes) -> Any:
        # A pickle begins with 0x80; to msgpack that is a dict of nothing, which nothing follows.
        pickled = data[:1] == b"\x80" and len(data) > 1
        return self._codec.decode(codecs.PICKLE if pickled else codecs.MSGPACK, data)

    def _checked(self, value: Any) -> Any:
        if value is not None and self._type is not None and type(value) is not self._type:
            raise errors.UnsupportedValue(
                f"the column {self.value} holds {self._type.__name__}, and would not give this {type(value).__qualname__} back as it is: "
                "convert it, or give SQLStore encode= and decode="
            )
        return value

    # ---- expiry ----

    def expires(self, ttl: float | None, now: float) -> Any:
        """What the expiry column holds for a row that has ttl seconds to live."""
        if ttl is None or self.expiry is None:
            return None
        if isinstance(self.expiry.type, sa.DateTime):
            at = dt.datetime.fromtimestamp(now + ttl, dt.UTC)
            return at if self.expiry.type.timezone else at.replace(tzinfo=None)
        return int(now + ttl) if _python_type(self.expiry) is int else now + ttl

    def expired(self, before: float) -> sa.ColumnElement[bool]:
        """Rows whose time was over then, and tombstones that were made before then. Raises: StoreRefused: rows do not expire here."""
        if self.expiry is None:
            raise errors.StoreRefused(f"rows of {self.table} do not expire: give SQLStore ttl_column=")
        at = sa.func.abs(self.expiry) if self.tombstones else self.expiry
        over: sa.ColumnElement[bool] = at < self.expires(0.0, before)
        return over

    def ttl(self, expiry: Any, now: float) -> float | None:
        """Seconds that a row still has to live, 0 or less if it has expired; None: for ever."""
        if expiry is None:
            return None
        if isinstance(expiry, dt.datetime):
            expiry = expiry.replace(tzinfo=expiry.tzinfo or dt.UTC).timestamp()
        return float(expiry) - now

    # ---- statements ----

    def _select(self) -> sa.Select[Any]:
        """Key, value and expiry of :keys."""
        expiry = sa.null() if self.expiry is None else self.expiry
        return sa.select(self.key, self.value, expiry).where(self._among_keys())

    def _among_keys(self) -> sa.ColumnElement[bool]:
        return self.key.in_(sa.bindparam("keys", expanding=True))

    def row(self, key: Any, value: Any, expiry: Any, version: int | None) -> dict[str, Any]:
        """What upsert is given for a row."""
        row = {self.key.key: key, self.value.key: value}
        if self.expiry is not None:
            row[self.expiry.key] = expiry
        if self.version is not None and version is not None:
            row[self.version.key] = version
        return row

    def tombstone(self, key: Any, now: float, version: int) -> dict[str, Any]:
        """The same, for a key that is deleted with this version."""
        return self.row(key, b"", -now, version)

    def _upsert(self, versioned: bool) -> sa.Insert:
        """For many rows of row(): INSERT, or UPDATE (versioned: if the version there is less)."""
        statement = (postgresql.insert if self._dialect == "postgresql" else sqlite.insert)(self.table)
        changed = [self.value, self.expiry, self.version if versioned else None]
        statement = statement.on_conflict_do_update(
            index_elements=[self.key],
            set_={column.key: statement.excluded[column.key] for column in changed if column is not None},
            where=self._older_than(statement.excluded[self.version.key]) if versioned and self.version is not None else None,
        )
        # With RETURNING SQLAlchemy sends many rows as one statement, which one time limit bounds; without it psycopg sends one for each.
        return statement.returning(self.key) if self._dialect == "postgresql" else statement

    def _delete(self, versioned: bool) -> sa.Delete:
        """Of :keys; versioned: of :k if its version is less than :v, for many (PostgreSQL: of arrays, so that it is one statement)."""
        statement = sa.delete(self.table)
        if not versioned:
            return statement.where(self._among_keys())
        if self._dialect != "postgresql":
            return statement.where(self.key == sa.bindparam("k"), self._older_than(sa.bindparam("v")))
        # Of text without its length: a cast to VARCHAR(n)[] cuts a longer key, without an error, to another row's.
        kind = sa.Text() if isinstance(self.key.type, sa.String) and not isinstance(self.key.type, sa.Enum) else self.key.type
        arrays = [sa.bindparam(name, type_=postgresql.ARRAY(of)) for name, of in (("k", kind), ("v", sa.BigInteger()))]
        columns = sa.column("k", kind), sa.column("v", sa.BigInteger())
        rows = sa.func.unnest(*arrays).table_valued(*columns, name="rows").render_derived()
        return statement.where(self.key == rows.c.k, self._older_than(rows.c.v))

    def arguments(self, statement: sa.Insert | sa.Delete, rows: list[dict[str, Any]]) -> Any:
        """What an upsert or a versioned delete is given for many rows."""
        if self._dialect == "postgresql" and isinstance(statement, sa.Delete):
            return {"k": [row["k"] for row in rows], "v": [row["v"] for row in rows]}
        return rows

    def _older_than(self, version: Any) -> sa.ColumnElement[bool]:
        older: sa.ColumnElement[bool] = sa.func.coalesce(self.version, -1) < version
        return older


def _python_type(column: sa.Column[Any]) -> type | None:
    """Of the values that it gives; None: of several types, or not known."""
    if isinstance(column.type, sa.JSON):
        return None
    try:
        return column.type.python_type
    except NotImplementedError:
        return None


def _shortened(key: bytes) -> bytes:
    """The key; of a long one as much of it, and a hash, that no other key has this form."""
    if len(key) <= LONG_KEY:
        return key
    from hashlib import blake2b

    return key[: LONG_KEY + 1 - 32] + blake2b(key, digest_size=32).digest()


def _text(key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise errors.StoreRefused(f"the key {key[:100]!r} is not UTF-8, and the key column is of text: use keys of text") from None


def _number(key: bytes) -> int:
    try:
        number = int(key)
    except ValueError:
        number = -1
    if b"%d" % number != key:
        raise errors.StoreRefused(f"the key {key[:100]!r} is not a decimal number, as the key column needs: use such, or encode_key=")
    return number
