"""Servers that the programs here compare: each on a free port of loopback, in a folder of its own, stopped and removed after use."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.redis.resp import Connection, parse

READY = 30.0  # seconds that a server may take to answer PING
counter = itertools.count()
Server = tuple[str, int, int]  # host, port, pid


class Missing(Exception):
    """This machine does not have what it takes: exit code 77."""


class Failed(Exception):
    """A server did not come up."""


def need(program: str, package: str) -> str:
    """The path of a program; its Debian package is installed if it is missing and this is root. Raises: Missing."""
    if not shutil.which(program) and os.geteuid() == 0 and shutil.which("apt-get"):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # 1: a service of the package is not started
        for command in (["install", "-y", "-q", package], ["update", "-q"], ["install", "-y", "-q", package]):
            subprocess.run(["apt-get", *command], env=env, capture_output=True, timeout=600, check=False)
            if shutil.which(program):
                break
    found = shutil.which(program)
    if found is None:
        raise Missing(f"{program} is missing: the package {package} of Debian has it")
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as s:
            s.sendall(b"PING\r\n")
            return s.recv(100) == b"+PONG\r\n"
    except OSError:
        return False


@contextlib.contextmanager
def running(argv: Callable[[int, str], Sequence[str]]) -> Iterator[Server]:
    """The server that argv(port, folder) starts, once it answers. Another port is tried if it ends at once: it may be taken."""
    folder = tempfile.mkdtemp(prefix="shmcache-test-")
    output = Path(folder, "output")
    process = None
    try:
        for _ in range(3):
            port = free_port()
            with output.open("wb") as out:
                process = subprocess.Popen(argv(port, folder), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
            deadline = time.monotonic() + READY
            while process.poll() is None and not answers(port):
                if time.monotonic() > deadline:
                    raise Failed(f"no answer to PING in {READY:.0f} s:\n{output.read_text(errors='replace')[-2000:]}")
                time.sleep(0.02)  # between two tries
            if process.returncode is None:
                break
        else:
            raise Failed(f"ended with {process.returncode}:\n{output.read_text(errors='replace')[-2000:]}")
        yield "127.0.0.1", port, process.pid
    finally:
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def redis_server(*options: str) -> Iterator[Server]:
    """redis-server, without files, with what its own tests need allowed; options as on its command line, later ones win."""
    program = need("redis-server", "redis-server")

    def argv(port: int, folder: str) -> list[str]:
        fixed = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--daemonize", "no"]
        return [program, *fixed, "--enable-debug-command", "yes", "--enable-protected-configs", "yes", *options]

    with running(argv) as server:
        yield server


def lean() -> list[str]:
    """Options that leave a redis-server strings, keys, expiry, transactions, scripts and messages: what a server of strings has."""
    with redis_server() as (host, port, _):
        connection = Connection((host, port), 10.0)
        groups = (b"list", b"hash", b"set", b"sortedset", b"stream", b"geo", b"hyperloglog")
        lists = [parse(connection.call(b"COMMAND", b"LIST", b"FILTERBY", b"ACLCAT", group)) for group in groups]
        connection.close()
    gone = {item.value.decode() for found in lists if found for item in found[0].value if b"|" not in item.value}
    gone |= {"sort", "sort_ro", "replicaof", "slaveof", "sync", "psync", "module", "cluster", "failover", "wait", "migrate"}
    gone |= {"save", "bgsave", "bgrewriteaof"}
    gone.discard("function")  # the suite calls FUNCTION FLUSH before every unit
    return [option for command in sorted(gone) for option in ("--rename-command", command, "")]


@contextlib.contextmanager
def shmcache_server(*options: str, size: str = "64M") -> Iterator[Server]:
    """`shmcache serve` with a segment of its own, which is gone afterwards."""
    import shmcache

    name = f"redis-{os.getpid()}-{next(counter)}"

    def argv(port: int, folder: str) -> list[str]:
        fixed = ["--size", size, "--port", str(port), "--bind", "127.0.0.1", "--workers", "1", "--enable-debug-command"]
        return [sys.executable, "-m", "shmcache.cli", "serve", name, *fixed, *options]

    try:
        with running(argv) as server:
            yield server
    finally:
        with contextlib.suppress(shmcache.SegmentNotFound):
            shmcache.unlink(name)


def end_on_sigterm() -> None:
    """For programs: SIGTERM runs what is to be done at the end, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def address(text: str) -> tuple[str, int]:
    """HOST:PORT, or the path of a Unix socket, which has port 0. Raises: ValueError."""
    if text.startswith("/"):
        return text, 0
    host, _, port = text.rpartition(":")
    return host or "127.0.0.1", int(port)


@contextlib.contextmanager
def given_or_started(text: str | None, start: Callable[[], contextlib.AbstractContextManager[Server]]) -> Iterator[tuple[str, int]]:
    """Where the server is that an option names: an address, `redis` for a redis-server of its own, or none: start()."""
    if text is not None and text != "redis":
        yield address(text)
    else:
        with redis_server() if text == "redis" else start() as (host, port, _):
            yield host, port
