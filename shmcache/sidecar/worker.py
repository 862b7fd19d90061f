"""One process with one event loop: python -m shmcache.sidecar.worker NAME NUMBER, started by serve.py, which says the rest on its input."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from typing import Any

from shmcache import errors, notices, stores
from shmcache.sidecar import acl, bus
from shmcache.sidecar import server as server_module
from shmcache.sidecar.server import Server


async def serve(options: dict[str, Any], ready: Callable[[], None]) -> None:
    """Serve till SIGTERM or SIGINT, or till the process that started this one has ended."""
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    link = socket.socket(fileno=options["link"])
    state = bus.read_state(link)
    store = stores.opened(*options["store"]) if options.get("store") else None
    server = Server(
        options["name"],
        {**options["settings"], **state["config"]},
        {name: acl.of_line(line) for name, line in state["users"].items()},
        disabled=frozenset(options["disabled"]),
        worker=options["worker"],
        of_workers=options["workers"],
        store=store,
    )
    parent = options["parent"]
    server.on_shutdown = lambda: os.kill(parent, signal.SIGTERM)
    sockets = [socket.socket(fileno=fd) for fd in options["sockets"]]
    if options["port"]:
        for host in options["bind"]:
            sockets += server_module.listen(host, options["port"])
    server.cut_off = end.set
    server.link.know(state["counts"])
    await server.start(sockets=sockets, tls=context_of(options["tls"]), link=link)
    gc.freeze()
    ready()
    while not end.is_set():
        if os.getppid() != parent:
            break
        try:
            await asyncio.wait_for(end.wait(), 1.0)
        except TimeoutError:
            pass
    await server.stop()
    if store is not None:
        await asyncio.to_thread(store.close)


def context_of(tls: dict[str, str] | None) -> ssl.SSLContext | None:
    if not tls:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls["cert"], tls["key"])
    if tls.get("ca"):
        context.load_verify_locations(tls["ca"])
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def main() -> int:
    notices.never_wait()
    options = json.load(sys.stdin)

    def ready() -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody waits for one that was started again
            os.write(options["ready_fd"], b"r")
        os.close(options["ready_fd"])

    try:
        import uvloop
    except ImportError:
        print('shmcache: serve needs uvloop: pip install "shmcache[serve]"', file=sys.stderr)
        return 1
    try:
        uvloop.run(serve(options, ready))
    except errors.ShmcacheError as e:
        print(f"shmcache: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
