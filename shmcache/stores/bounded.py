"""A psycopg connection whose waits end: also for a server, or a pooler, that is stopped, while the kernel goes on to answer for it.

A wait that is over closes the connection. What the server was sent is in a transaction that nobody commits any more, unless it was the
COMMIT.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Any

import psycopg

from shmcache import errors
from shmcache.core import _core

GRACE = 0.5  # seconds after the deadline: the server is to end the statement first, so that the connection stays


class Call(threading.local):
    """The call that this thread makes: until when it may take, on the monotonic clock; 0: there is none."""

    deadline = 0.0


call = Call()


class Connection(psycopg.Connection[Any]):
    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **options: Any) -> Any:
        return super().wait(self._until(gen, call.deadline) if call.deadline else gen, *args, **options)

    def _until(self, gen: Generator[Any, Any, Any], deadline: float) -> Generator[Any, Any, Any]:
        """gen, which psycopg goes on with when something has come, and ten times a second when nothing has."""
        ready = None
        while True:
            try:
                wanted = gen.send(ready)
            except StopIteration as e:
                return e.value
            if ready is not None and _core.monotonic() > deadline + GRACE:
                self.close()
                raise psycopg.OperationalError("the database did not answer in time: is it, or a pooler before it, stopped?")
            ready = yield wanted


def connect(parameters: dict[str, Any]) -> Connection:
    """A connection by psycopg's parameters, if there is time for one. Raises: StoreUnavailable; psycopg.Error."""
    left = call.deadline - _core.monotonic()
    if left <= 0:
        raise errors.StoreUnavailable("the time was over before there was a connection to the database: try again, with more time")
    return Connection.connect(**parameters)
