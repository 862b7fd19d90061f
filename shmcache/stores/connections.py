"""Connections to SQLite or PostgreSQL: a transaction each call, time limits, forks, and what an error means.

Time: PostgreSQL gets what is left of the call's as statement_timeout, and a little more as idle_in_transaction_session_timeout, in case
this process is stopped in the middle. It counts them for each statement, so they are set again, before a statement and before COMMIT, when
some time has gone by. What does not answer at all is given up (bounded.py). SQLite works inside this process: busy_timeout bounds its
waits, a progress handler what it computes.

A pooler may give each transaction another of its connections to PostgreSQL: all that is set is set for the transaction alone, isolation
included, and nothing is prepared unless the url says so.

Fork: SQLite notes in memory which locks its process holds on a file, and a child would believe those notes. So no connection to it may be
open at a fork, used or not: who forks waits for the calls that are running, and closes what is idle. Connections to PostgreSQL stay
the parent's; the child leaves them alone and opens others.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

import sqlalchemy as sa
from sqlalchemy import exc

from shmcache import errors
from shmcache.core import _core
from shmcache.stores import masked

# Classes of SQLSTATE and result codes of SQLite that are about a row, and about the call; what has any other may go better next time.
ROW_STATES = {"21", "22", "23", "27", "44", "54", "P0"}
CALL_STATES = {"28", "2B", "3D", "3F", "42"}
PREPARED_STATES = {"26000", "42P05"}  # a prepared statement is not there, or is: another's connection
CANCELED = "57014"  # by the time limit; the server says "user request" if that was over just between two statements
ROW_CODES = {sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH}
CALL_CODES = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
LIMITS = sa.text("SELECT set_config('statement_timeout', :ms, true), set_config('idle_in_transaction_session_timeout', :idle, true)")
FILES = {"passfile", "sslcert", "sslcrl", "sslcrldir", "sslkey", "sslrootcert"}  # of libpq, which looks for them at each connection
GRACE_MS = 1000  # after the deadline, until a connection is ended on which nothing comes any more
SLACK = 0.05  # seconds that a statement may end after the deadline, before a limit is worth a round trip
ENCODED = "in a user's name and a password write @, : and / as %40, %3A and %2F"
LOCK = sa.text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")


class RowRefused(errors.StoreRefused):
    """The database refuses one of the statement's rows."""


class Connections:
    """pool_size connections at most, each made when it is needed. timeout: seconds that making one may take."""

    def __init__(self, url: sa.URL, pool_size: int, timeout: float) -> None:
        self.url, self.pool_size, self.timeout = url, pool_size, timeout
        self.shown = masked(str(url))
        self.dialect = url.get_backend_name()
        self._closed = False
        self._sqlite = self.dialect == "sqlite"
        self._call: Any = None  # of PostgreSQL: what bounded.py has of this thread's call
        self._inherited: list[sa.Engine] = []  # the parent's, kept so that nothing of them is closed here
        self._begin()
        with forking:
            alive.add(self)

    def _begin(self) -> None:
        self._gate = threading.Lock()  # held while waiting for a slot: else who gives one back and takes it again starves the others
        self._slots = threading.Semaphore(self.pool_size)
        if self._sqlite:
            self._engine = _sqlite_engine(self.url, self.pool_size, self.timeout)
        else:
            self._engine, self._call = _postgres_engine(self.url, self.pool_size, self.timeout)

    def __reduce__(self) -> Any:
        if self._closed:
            raise errors.UsageError("a closed store cannot be pickled")
        return Connections, (self.url, self.pool_size, self.timeout)

    def close(self) -> None:
        with forking:
            self._quiesce()
            self._closed = True
            alive.discard(self)
            self._resume()

    @contextlib.contextmanager
    def transaction(self, deadline: float, write: bool = False, alone: str | None = None) -> Iterator[sa.Connection]:
        """A connection, and a transaction that is committed at the end.

        Args: alone: a name; no other transaction of that name is going on, not even the COMMIT of a process that was killed.
        Raises: StoreUnavailable, StoreRefused; RowRefused: one of its rows was; UsageError: closed.
        """
        slots, free, commits = self._slots, False, False
        if self._gate.acquire(timeout=max(0.0, deadline - _core.monotonic())):
            try:
                free = slots.acquire(timeout=max(0.0, deadline - _core.monotonic()))
            finally:
                self._gate.release()
        if not free:
            raise errors.StoreUnavailable(f"all {self.pool_size} connections of this process are in use: try again, or raise pool_size")
        try:
            if self._closed:
                raise errors.UsageError("this store was closed: make another")
            if self._call is not None:
                self._call.deadline = deadline
            with self._engine.connect() as c, c.begin():
                self.forget_limit(c)  # of a transaction before
                self.limit(c, deadline)
                if self._sqlite:
                    c.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
                elif alone is not None:
                    c.execute(LOCK, {"name": alone})
                    self.limit(c, deadline)
                yield c
                self.limit(c, deadline)
                commits = write and not self._sqlite
        except Exception as e:
            error = named(e)
            if commits and isinstance(error, errors.StoreUnavailable):
                error.unsettled = True
            if error is e:
                raise
            raise error from e
        finally:
            if self._call is not None:
                self._call.deadline = 0.0
            slots.release()

    def forget_limit(self, c: sa.Connection) -> None:
        """What limit() has set is not in force any more: it was rolled back."""
        c.info["limited"] = -math.inf

    def limit(self, c: sa.Connection, deadline: float) -> None:
        """Let the next statement not go on after the deadline. Raises: StoreUnavailable."""
        now = _core.monotonic()
        left = deadline - now
        if left <= 0:
            raise errors.StoreUnavailable("the time was over before the database had done all: try again, with more time or fewer keys")
        if self._sqlite:
            driver: Any = c.connection.driver_connection
            driver.execute(f"PRAGMA busy_timeout = {math.ceil(left * 1000)}")
            driver.set_progress_handler(lambda: _core.monotonic() > deadline, 10_000)
        elif now - c.info["limited"] > min(SLACK, left / 10):
            c.info["limited"] = now
            ms = math.ceil(left * 1000)
            c.execute(LIMITS, {"ms": str(ms), "idle": str(ms + GRACE_MS)})

    def _quiesce(self) -> None:
        """Wait for the calls that are running, let none begin, and close the connections."""
        self._gate.acquire()
        for _ in range(self.pool_size):
            self._slots.acquire()
        self._engine.dispose()

    def _resume(self) -> None:
        self._slots.release(self.pool_size)
        self._gate.release()

    def before_fork(self) -> None:
        if self._sqlite:
            self._quiesce()

    def after_fork_in_parent(self) -> None:
        if self._sqlite:
            self._resume()

    def after_fork_in_child(self) -> None:
        self._inherited.append(self._engine)
        self._begin()


def named(e: Exception) -> Exception:
    """StoreUnavailable, StoreRefused or RowRefused for an error of the database or its driver; any other as it is."""
    if isinstance(e, exc.DBAPIError):
        cause: Any = e.orig
        text = masked(" ".join(str(cause).split()))[:500]
        state, code = getattr(cause, "sqlstate", None), getattr(cause, "sqlite_errorcode", None)
        if e.connection_invalidated or (state is None and code is None and isinstance(e, exc.OperationalError)):
            return errors.StoreUnavailable(f"{text}; try again")  # no connection
        if state is None and code is None:
            return RowRefused(text)  # the driver does not take a value
        if (state and state[:2] in ROW_STATES) or (code and code & 0xFF in ROW_CODES):
            return RowRefused(text)
        if (state and state[:2] in CALL_STATES and state not in PREPARED_STATES) or (code and code & 0xFF in CALL_CODES):
            return errors.StoreRefused(f"{text}; change the table, or what the store is told of it")
        if state == CANCELED:
            text = f"the time was over: {text}"
        if state in PREPARED_STATES:
            text = f"{text}; behind a pooler that gives each transaction another connection, take prepare_threshold out of the url"
        return errors.StoreUnavailable(f"{text}; try again")
    if isinstance(e, (exc.StatementError, TypeError, ValueError, OverflowError)) and not isinstance(e, errors.ShmcacheError):
        return RowRefused(f"{type(e).__name__}: {e}")  # SQLAlchemy or the driver does not take a value
    return e


def parsed_url(url: str) -> sa.URL:
    """The url, with its driver, and with whole paths: a process may change its directory. Raises: InvalidConfig."""
    try:
        parsed = sa.make_url(url)
    except (exc.ArgumentError, ValueError):  # ValueError: of a port. Neither is repeated: it may be a part of the password
        raise errors.InvalidConfig(f"a url is like sqlite:///app.db or postgresql://user@host/database, not that one: {ENCODED}") from None
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise errors.InvalidConfig(f"SQLStore speaks SQLite and PostgreSQL, not {parsed.get_backend_name()}: use one, or write a Store")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise errors.InvalidConfig(f"there is no driver {parsed.drivername!r} here: leave it out, as in sqlite:// or postgresql://")
    if parsed.get_backend_name() == "postgresql":
        if "@" in (parsed.host or "") or "@" in (parsed.database or ""):
            raise errors.InvalidConfig(f"the url has more than one @: {ENCODED}")  # what is behind the first one would be shown as the host
        _threshold(parsed)
        files = {name: path for name, path in parsed.query.items() if name in FILES and isinstance(path, str) and path != "system"}
        return parsed.update_query_dict({name: os.path.abspath(path) for name, path in files.items()})
    database = parsed.database or ""
    is_uri = sa.util.asbool(parsed.query.get("uri", False)) and database.startswith("file:")
    path = unquote(database.removeprefix("file:")) if is_uri else database
    if path in ("", ":memory:") or (is_uri and parsed.query.get("mode") == "memory"):
        raise errors.InvalidConfig("a database in one process' memory stands behind no cache that processes share: give a file")
    if is_uri and path.startswith("/"):
        return parsed
    path = os.path.abspath(path)
    return parsed.set(database="file:" + quote(path) if is_uri else path)


def _sqlite_engine(url: sa.URL, pool_size: int, timeout: float) -> sa.Engine:
    arguments = {"timeout": timeout, "isolation_level": None}  # None: BEGIN is said here, not by the driver
    engine = sa.create_engine(url, pool_size=pool_size, max_overflow=0, pool_pre_ping=True, hide_parameters=True, connect_args=arguments)
    sa.event.listen(engine, "connect", _write_ahead)
    return engine


def _postgres_engine(url: sa.URL, pool_size: int, timeout: float) -> tuple[sa.Engine, Any]:
    try:
        from shmcache.stores import bounded
    except ModuleNotFoundError as e:
        raise ImportError('SQLStore needs psycopg for PostgreSQL: pip install "shmcache[postgres]"') from e
    seconds = max(2, math.ceil(timeout))
    arguments: dict[str, Any] = {"application_name": "shmcache", "connect_timeout": seconds}
    # A host that is gone without a word is noticed.
    arguments |= {"tcp_user_timeout": seconds * 1000, "keepalives_idle": seconds, "keepalives_interval": seconds}
    arguments = {name: x for name, x in arguments.items() if name not in url.query}
    arguments["prepare_threshold"] = _threshold(url)
    # READ COMMITTED: versioned writes wait for each other, and then have to see what the one before has committed.
    engine = sa.create_engine(
        url.difference_update_query(["prepare_threshold"]), pool_size=pool_size, max_overflow=0, pool_pre_ping=True, hide_parameters=True,
        connect_args=arguments, isolation_level="READ COMMITTED",
    )  # fmt: skip
    sa.event.listen(engine, "do_connect", lambda dialect, record, args, parameters: bounded.connect(parameters))
    return engine, bounded.call


def _threshold(url: sa.URL) -> int | None:
    """psycopg's prepare_threshold: after how many times a statement is prepared; None: none is. Raises: InvalidConfig."""
    text = url.query.get("prepare_threshold", "none")
    if text == "none":
        return None
    if isinstance(text, str) and text.isascii() and text.isdigit():
        return int(text)
    raise errors.InvalidConfig("prepare_threshold in a url is none, as without it, or after how many times a statement is prepared")


def _write_ahead(connection: sqlite3.Connection, _: object) -> None:
    """Readers and a writer do not wait for each other. It is the file's mode for all, and stays."""
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as e:
        if e.sqlite_errorcode & 0xFF != sqlite3.SQLITE_READONLY:  # who may only read need not
            raise


alive: set[Connections] = set()  # all that are not closed
forking = threading.Lock()  # held from before a fork until after it: none is made or closed meanwhile


def _before_fork() -> None:
    forking.acquire()
    for connections in alive:
        connections.before_fork()


def _after_fork_in_parent() -> None:
    for connections in alive:
        connections.after_fork_in_parent()
    forking.release()


def _after_fork_in_child() -> None:
    global forking
    for connections in alive:
        connections.after_fork_in_child()
    forking = threading.Lock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
