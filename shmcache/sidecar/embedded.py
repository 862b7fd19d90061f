"""serving(): a sidecar within a program or a test, one event loop in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shmcache import cache as cache_module
from shmcache import errors
from shmcache.sidecar import server as server_module
from shmcache.sidecar.server import Server

if TYPE_CHECKING:
    from shmcache.policy import Policy
    from shmcache.stores import Store


@dataclass(frozen=True)
class Address:
    """Where it listens. port: 0 if not on TCP. unix: None if not on a unix socket."""

    host: str
    port: int
    unix: str | None


@contextlib.contextmanager
def serving(
    name: str, size: int | str | None = None, *, unix: str | None = None, port: int | None = None, host: str = "127.0.0.1",
    password: str | None = None, store: Store | None = None, policy: Policy | str | None = None,
) -> Iterator[Address]:  # fmt: skip
    """Serve a segment over the Redis protocol while the with block runs, from this process.

        with shmcache.sidecar.serving("web", size="64M") as server:
            redis.Redis(port=server.port).set("greeting", "hello")

    It starts a thread with an event loop, and others for what may wait; no process, no supervisor (shmcache.supervise() starts one) and no
    snapshots, which are `shmcache serve`'s. Signals are left alone. It ends with the block, or at SHUTDOWN: what is being executed
    is answered, connections are closed, a unix socket's file is removed. The segment stays. A forked child has the socket, but no
    thread that serves it: fork before.

    Args: size: create the segment with it if there is none; None: there has to be one. unix: path of a unix socket. port: of TCP, 0: a free
    one; None: a free one, or no TCP if unix is given. password: that clients have to give; without one only loopback is served. store,
    policy: as shmcache.open() takes them; what is written back waits for a supervisor with the store.
    Yields: where it listens.
    Raises: UsageError: there is no uvloop; what shmcache.open() or attach() raise; OSError: an address is not to be had.
    """
    try:
        import uvloop
    except ImportError:
        raise errors.UsageError('a sidecar needs uvloop: pip install "shmcache[serve]"') from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            cache_module.attach(name, store=store) if size is None else cache_module.open(name, size, store=store, policy=policy)
        )
        sockets = []
        if port is not None or unix is None:
            sockets += server_module.listen(host, port or 0, shared=False)
            port = sockets[0].getsockname()[1]
        for sock in sockets:
            stack.enter_context(contextlib.closing(sock))
        if unix is not None:
            sockets.append(stack.enter_context(contextlib.closing(server_module.listen_unix(unix))))
            stack.callback(server_module.remover(unix))
        started: Future[Any] = Future()  # of (the loop, what ends it)

        async def serve() -> None:
            server, end = Server(name, {"requirepass": password or "", "port": str(port or 0)}, store=store), asyncio.Event()
            server.on_shutdown = end.set
            await server.start(sockets=sockets)
            started.set_result((asyncio.get_running_loop(), end))
            await end.wait()
            await server.stop()

        thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sidecar"))
        served: Future[Any] = thread.submit(uvloop.run, serve())
        wait([started, served], return_when=FIRST_COMPLETED)
        if not started.done():
            served.result()
        loop, end = started.result()
        try:
            yield Address(host, port or 0, unix)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended, at SHUTDOWN
                loop.call_soon_threadsafe(end.set)
            served.result()
