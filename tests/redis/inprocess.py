"""The sidecar without sockets, threads and an event loop: its own Server and Connections. What these would be given to do waits for turn()."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from shmcache.sidecar.server import Connection, Server


class Soon:
    """Stands for the event loop and for the pool of threads."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self.in_pool = False

    def call_soon(self, function: Callable[..., Any], *args: Any) -> None:
        self.waiting.append((function, args))

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        self.call_soon(self.run_in_pool, function, *args)

    def run_in_pool(self, function: Callable[..., Any], *args: Any) -> None:
        self.in_pool = True
        try:
            function(*args)
        finally:
            self.in_pool = False

    def call_soon_threadsafe(self, function: Callable[..., Any], *args: Any) -> None:
        """From the pool: the loop, which has nothing else to do, runs it at once."""
        if self.in_pool:
            function(*args)
        else:
            self.call_soon(function, *args)

    def call_later(self, delay: float, function: Callable[..., Any], *args: Any) -> None:
        self.call_soon(function, *args)

    def time(self) -> float:
        return time.monotonic()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        raise context["exception"]


class Pipe:
    """A transport whose other end reads at once; written is kept."""

    def __init__(self, client: Connection, soon: Soon) -> None:
        self.client, self.soon = client, soon
        self.written: list[bytes] = []
        self.open = True

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        if self.open:
            self.open = False
            self.soon.call_soon(self.client.connection_lost, None)

    abort = close

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str) -> None:
        return None

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class InProcess(Server):
    """Serves a live segment to whoever calls connect()."""

    def __init__(self, name: str, settings: dict[str, str] | None = None) -> None:
        super().__init__(name, settings)
        self.soon = Soon()
        self.loop = self.pool = self.soon  # type: ignore[assignment]

    def connect(self) -> Connection:
        client = Connection(self.executor, self)
        client.connection_made(Pipe(client, self.soon))  # type: ignore[arg-type]
        return client

    def turn(self) -> None:
        """What the loop and the pool have to do, till nothing is left."""
        waiting = self.soon.waiting
        while waiting:
            function, args = waiting.popleft()
            function(*args)

    def say(self, client: Connection, data: bytes) -> bytes:
        """Feed this: all that the client has been sent so far."""
        client.feed(data)
        self.turn()
        client.flush()
        return b"".join(client.transport.written)

    def close(self) -> None:
        for client in list(self.clients.values()):
            client.drop()
        self.turn()
        del self.executor
        self.local = threading.local()
        for handle in self.handles:
            handle.close()

