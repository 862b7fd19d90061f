"""`shmcache serve`: a supervisor and so many workers as child processes, watched.

    parent       opens the unix socket and hands it on; starts, watches and ends the others; answers systemd
    supervisor   `shmcache supervise`: makes or restores the segment, works ahead of the writers, snapshots, log
    workers      worker.py, one event loop each, on one port (SO_REUSEPORT) and the one unix socket
    metrics      metrics.py, if they are asked for

Who dies is started again, at once, then after longer and longer waits if it dies at once again. The children end when the parent does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from shmcache import cache as cache_module
from shmcache import errors, segment
from shmcache.notices import notice
from shmcache.sidecar import server, worker
from shmcache.sidecar.bus import Hub

START_LIMIT = 60.0  # seconds for a worker to be ready
STOP_LIMIT = 15.0  # seconds for a worker to drain; for a supervisor, since it was last seen to hold the segment
LAST_SNAPSHOT_LIMIT = 3600.0  # seconds for one that holds it
LONGEST_WAIT = 5.0  # seconds before another start of what dies at once
STEADY = 5.0  # seconds of life after which a death is the first again


@dataclass
class Child:
    what: str
    argv: list[str] = field(default_factory=list)
    fds: tuple[int, ...] = ()
    module: str = ""  # of one on the bus; options: what it is told
    options: dict[str, Any] = field(default_factory=dict)
    told: bytes = b""  # on standard input: passwords are not to be seen among the arguments
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    wait: float = 0.0
    start_at: float = 0.0
    starts: int = 0
    segment: tuple[int, int] | None = None  # of a supervisor: which one it was seen to hold (Mapping.identity)


@dataclass
class Service:
    """Args: supervise: arguments of `shmcache supervise` before the segment's name; it gets the store on standard input. bind, port
    (0: no TCP), unix, settings, users, disabled, tls, store: of worker.py, when it begins."""

    name: str
    supervise: list[str]
    workers: int = 1
    bind: list[str] = field(default_factory=lambda: ["127.0.0.1"])
    port: int = 6379
    unix: str | None = None
    unix_mode: int = 0o700
    settings: dict[str, str] = field(default_factory=dict)
    users: dict[bytes, bytes] = field(default_factory=dict)
    disabled: list[str] = field(default_factory=list)
    tls: dict[str, str] | None = None
    quiet: bool = False
    metrics_port: int = 0  # 0: no metrics
    metrics_bind: str = "127.0.0.1"
    store: tuple[str, str | None] | None = None  # of stores.opened()

    def run(self) -> int:
        """Till SIGTERM or SIGINT. Raises: OSError: an address is not to be had; ShmcacheError: the supervisor does not begin."""
        if not 1 <= self.workers <= 64:
            raise errors.UsageError("--workers is 1 to 64")
        if not self.port and self.unix is None:
            raise errors.UsageError("nothing to listen on: say --port or --unix")
        if self.metrics_port and importlib.util.find_spec("prometheus_client") is None:
            raise errors.UsageError('--metrics-port needs prometheus-client: pip install "shmcache[metrics]"')
        self.stopping = False
        wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.wake = wake_r
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.children: list[Child] = []
        self.hub = Hub(self.users, self.paused)
        self.paused_until_ms = 0
        try:
            worker.context_of(self.tls)  # each worker makes its own: but what is wrong is said here, before there is anything
        except OSError as e:
            raise errors.UsageError(f"--tls-cert, --tls-key, --tls-ca: {e}") from None
        with contextlib.ExitStack() as stack:
            for fd in (pipe := os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)):
                stack.callback(os.close, fd)
            self.pauses, self.tell_pauses = pipe
            if self.port:  # nobody else's; workers of ours share it
                reserved = [stack.enter_context(contextlib.closing(reserve(host, self.port))) for host in self.bind]
                del reserved
            self.listening: socket.socket | None = None
            if self.unix is not None:
                self.listening = stack.enter_context(contextlib.closing(server.listen_unix(self.unix, self.unix_mode)))
                stack.callback(server.remover(self.unix))
            metrics = server.listen(self.metrics_bind, self.metrics_port, shared=False) if self.metrics_port else []
            for sock in metrics:
                stack.enter_context(contextlib.closing(sock))
            self.was, self.serving = inode_of(self.name), False
            stack.push(self.take_back)
            stack.callback(self.end_all)
            self.start_supervisor()
            for i in range(self.workers):
                if not self.stopping:
                    self.start_worker(i)
            if metrics and not self.stopping:
                self.start_metrics([sock.fileno() for sock in metrics])
            self.serving = True
            if not self.stopping:
                notify("READY=1\nSTATUS=serving " + self.name)
                if not self.quiet:
                    notice(f"serving {self.name} on {self.places()}")
            while not self.stopping:
                self.watch()
            notify("STOPPING=1")
        return 0

    def places(self) -> str:
        found = [f"{host}:{self.port}" for host in self.bind] if self.port else []
        return ", ".join([*found, *([self.unix] if self.unix else [])])

    def stop(self, *_: object) -> None:
        self.stopping = True

    # -- children

    def start_supervisor(self) -> None:
        mine = ["--quiet", "--parent", str(os.getpid()), "--pauses", str(self.pauses)]
        argv = [sys.executable, "-m", "shmcache.cli", "supervise", *mine, *self.supervise]
        child = Child("the supervisor", argv=[*argv, self.name], fds=(self.pauses,))
        if self.store:
            child.argv, child.told = [*argv, "--store-file", "-", self.name], os.fsencode(self.store[0])
        self.children.append(child)
        self.start(child)
        assert child.process is not None
        while not self.stopping:
            with (
                contextlib.suppress(errors.SegmentNotFound, errors.NotASegment, errors.SegmentTruncated),
                cache_module.attach_unsettled(self.name) as cache,
            ):
                if cache.supervisor()["pid"] == child.process.pid:
                    child.segment = cache.mapping.identity
                    return
            if child.process.poll() is not None:
                raise errors.ShmcacheError(f"the supervisor of {self.name!r} ended at once with exit code {child.process.returncode}")
            self.pause(0.02)

    def start_worker(self, i: int) -> None:
        options: dict[str, Any] = {
            "name": self.name, "settings": self.settings, "worker": i, "workers": self.workers, "parent": os.getpid(), "bind": self.bind,
            "port": self.port, "sockets": [self.listening.fileno()] if self.listening is not None else [], "tls": self.tls,
            "disabled": self.disabled, "store": self.store,
        }  # fmt: skip
        child = Child(f"worker {i}", module="shmcache.sidecar.worker", options=options)
        self.children.append(child)
        self.launch(child, i, wait=True)

    def start_metrics(self, sockets: list[int]) -> None:
        options = {"name": self.name, "number": self.workers, "workers": self.workers, "sockets": sockets}
        child = Child("the metrics' process", module="shmcache.sidecar.metrics", options=options)
        self.children.append(child)
        self.launch(child, self.workers, wait=True)

    def launch(self, child: Child, i: int, wait: bool) -> None:
        """Start one that is on the bus, as its member i."""
        ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
        link = self.hub.join(i)
        try:
            options = {**child.options, "ready_fd": ready_w, "link": link.fileno()}
            child.argv = [sys.executable, "-m", child.module, self.name, str(i)]  # for who looks at processes
            child.told = json.dumps(options).encode()
            child.fds = (*options["sockets"], ready_w, link.fileno())
            self.start(child)
            os.close(ready_w)
            ready_w = -1
            deadline = time.monotonic() + START_LIMIT
            while wait and not self.stopping:
                self.pause(0.5, ready_r)
                if select.select([ready_r], [], [], 0)[0] and os.read(ready_r, 1) == b"r":
                    return
                assert child.process is not None
                if child.process.poll() is not None:
                    raise errors.ShmcacheError(f"{child.what} of {self.name!r} ended at once with exit code {child.process.returncode}")
                if time.monotonic() > deadline:
                    raise errors.ShmcacheError(f"{child.what} of {self.name!r} did not begin within {START_LIMIT:.0f} s")
        finally:
            link.close()
            os.close(ready_r)
            if ready_w >= 0:
                os.close(ready_w)

    def start(self, child: Child) -> None:
        child.began = time.monotonic()
        child.starts += 1
        child.process = subprocess.Popen(child.argv, stdin=subprocess.PIPE, pass_fds=child.fds)
        assert child.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.process.stdin as told:  # it has died at once: its exit code says so
            told.write(child.told)

    def watch(self) -> None:
        """Wait for a signal, and start again who has ended."""
        now = time.monotonic()
        self.pause(max(0.0, min([1.0, *(c.start_at - now for c in self.children if c.process is None)])))
        for i, child in enumerate(self.children):
            if child.process is not None and child.process.poll() is not None:
                if self.stopping:
                    return
                lived = time.monotonic() - child.began
                child.wait = 0.0 if lived > STEADY else min(LONGEST_WAIT, max(0.1, 2 * child.wait))
                notice(f"shmcache: {child.what} of {self.name} ended with {child.process.returncode}: started again")
                child.process = None
                if i:
                    self.hub.leave(i - 1)
                child.start_at = time.monotonic() + child.wait
            if child.process is None and time.monotonic() >= child.start_at and not self.stopping:
                if i == 0:
                    self.start(child)
                    self.paused(self.paused_until_ms)
                else:
                    self.launch(child, i - 1, wait=False)

    def paused(self, until_ms: int) -> None:
        """Tell the supervisor of CLIENT PAUSE: nothing that has expired goes until then. A stopped supervisor is not waited for."""
        self.paused_until_ms = until_ms
        line = b"%d\n" % until_ms
        try:
            os.write(self.tell_pauses, line)
        except BlockingIOError:  # it has not read for long: only the last one counts
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.read(self.pauses, 1 << 16)
            os.write(self.tell_pauses, line)

    def pause(self, seconds: float, also: int | None = None) -> None:
        """Till a signal comes, or something to read from `also`, or so long. Meanwhile the workers talk."""
        until = time.monotonic() + seconds
        while True:
            left = until - time.monotonic()
            others = [self.wake] if also is None else [self.wake, also]
            readers: list[Any] = [*others, *self.hub.readers()]
            ready, writable, _ = select.select(readers, self.hub.writers(), [], max(0.0, left))
            self.hub.turn(ready, writable)
            if self.wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wake, 512)
            if any(other in ready for other in others) or left <= 0:
                return

    def take_back(self, kind: type[BaseException] | None, *_: object) -> None:
        """What cannot begin leaves no segment that it has made; but one that others use, or that has what no snapshot has."""
        made = inode_of(self.name)
        if kind is None or self.serving or made in (None, self.was):
            return
        supervisor = self.children[0].process
        with contextlib.suppress(errors.ShmcacheError):
            with cache_module.attach_unsettled(self.name) as cache:
                others = [process for process in cache.processes() if process["pid"] != os.getpid()]
                kept = bool(others) or (len(cache) > 0 and (supervisor is None or supervisor.returncode != 0))
            if not kept and inode_of(self.name) == made:
                segment.unlink(self.name)

    def end_all(self) -> None:
        """Workers first: what they have acknowledged is in the supervisor's last snapshot."""
        for group in (self.children[1:], self.children[:1]):
            for child in group:
                if child.process is not None:
                    child.process.terminate()
            for child in group:
                if child.process is None:
                    continue
                deadline = time.monotonic() + (LAST_SNAPSHOT_LIMIT if child is self.children[0] else STOP_LIMIT)
                held = True
                while not self.ends(child):
                    held, before = self.supervises(child), held
                    if time.monotonic() >= deadline or not (held or before):  # one that has just let go of it has its time, too
                        child.process.kill()
                        child.process.wait()
                        break

    def ends(self, child: Child) -> bool:
        """Does it end within STOP_LIMIT? What the workers still have to tell each other is handed on."""
        assert child.process is not None
        deadline = time.monotonic() + STOP_LIMIT
        while child.process.poll() is None and time.monotonic() < deadline:
            self.pause(deadline - time.monotonic())
        return child.process.returncode is not None

    def supervises(self, child: Child) -> bool:
        """Does this process hold the segment? One that does not has not begun, or is through: it has nothing to save. One that was seen to
        hold it may be storing what was written back to it, if somebody has unlinked it since: nobody knows, so yes."""
        assert child.process is not None
        try:
            with cache_module.attach_unsettled(self.name) as cache:
                holds = bool(cache.supervisor()["pid"] == child.process.pid)
                if holds:
                    child.segment = cache.mapping.identity
                return holds or child.segment not in (None, cache.mapping.identity)
        except (errors.SegmentNotFound, errors.NotASegment, errors.SegmentTruncated):
            return child.segment is not None
        except (errors.ShmcacheError, OSError):  # nobody knows
            return True


def inode_of(name: str) -> int | None:
    """Of the segment of this name; None: there is none."""
    try:
        return os.stat(segment.check_name(name)).st_ino
    except FileNotFoundError:
        return None


def reserve(host: str, port: int) -> socket.socket:
    """Hold an address, without listening, so that only sockets of this user get it."""
    with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))  # somebody else's, that does not share it
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def notify(text: str) -> None:
    """Tell systemd, if it asked (NOTIFY_SOCKET)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock, contextlib.suppress(OSError):
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.sendall(text.encode())
