"""One event loop that serves one segment: connections, the pool of threads for what may wait, and what is measured.

    the loop       reads, executes, sends; it never waits
    the queue      Client.retry of what would have to (a busy lock, a full log, a walk over all keys, ...), bounded
    the pool       threads, each with an executor of its own, that take from it
    the watcher    with the log's policy `always`: waits for the disk, for all connections together, and lets replies go

A connection's commands stay in order: while one of them is in the pool nothing more of that connection is executed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from shmcache import cache as cache_module
from shmcache.core import _core, _resp
from shmcache.core._text import matches
from shmcache.notices import notice
from shmcache.sidecar import acl, backed, bus, commands
from shmcache.sidecar.commands import connection, pubsub, scripting, transactions

if TYPE_CHECKING:
    from shmcache.cache import Cache
    from shmcache.stores import Store

POOL_THREADS = 4
POOL_THREADS_BACKED = 16  # in front of a store, which they wait for
CRON_EVERY = 0.1  # seconds
WRITE_HIGH = 1 << 20  # bytes that the transport holds before its connection is paused
SLOW_LIMIT = 60.0  # seconds that a connection may be paused before it is dropped
NEVER = (1 << 64) - 1  # nanoseconds
WARN_EVERY = 60.0  # seconds, of attacks
KEEPALIVE = 300  # seconds of silence after which TCP asks whether the other end is still there


class Connection(_resp.Client):
    """A client: what of its state the compiled half does not need."""

    def __init__(self, executor: _resp.Executor, server: Server) -> None:
        self.server = server
        self.id = 0
        self.name = b""
        self.user = acl.DEFAULT
        self.restricted = server.users[acl.DEFAULT].restricted
        self.lib_name = b""
        self.lib_ver = b""
        self.address = ""
        self.local_address = ""
        self.began = time.time()
        self.queue: list[list[bytes]] = []  # of MULTI
        self.queue_bytes = 0
        self.broken = False  # its EXEC will fail
        self.watching: dict[tuple[int, bytes], int] = {}  # (database, key): the version it had, 0: absent
        self.channels: dict[bytes, None] = {}
        self.patterns: dict[bytes, None] = {}
        self.no_evict = False
        self.monitoring = False
        self.full_since = 0.0
        self.n_pushed = 0  # bytes that others have sent while the pool runs its command
        self.retried_by_pause: list[bytes] | None = None  # what CLIENT PAUSE keeps
        self.in_script = False

    # -- of the event loop

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(WRITE_HIGH, 0)
        sock = transport.get_extra_info("socket")
        if transport.get_extra_info("ssl_object") is None and sock is not None:
            self.fd = sock.fileno()
        self.server.opened(self, sock)

    def connection_lost(self, error: Exception | None) -> None:
        self.closing = self.lost = True
        self.fd = -1
        self.server.closed(self)

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.full = True
        self.full_since = _core.monotonic()
        if not self.lost:
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.full = False
        self.full_since = 0.0
        if not self.closing:
            self.transport.resume_reading()
            if not self.blocked:
                self.resume()

    def overflow(self) -> None:
        if self.transport is not None:
            self.transport.pause_reading()
            self.server.paused.add(self)

    # -- of commands

    def check_time(self) -> None:
        """In a command that may take long. Raises: CommandError: it is a script's, and the script's time is over."""

    def let_go(self, busy: bool) -> bool:
        """FLUSHDB has emptied the stripes that are held, and goes on with others. busy: one of these is somebody's. True: a script has let
        go of some of its own."""
        return False

    def refused(self, text: bytes, name: str) -> bytes:
        if name == "exec":
            transactions.discard_transaction(self)
            return b"EXECABORT Transaction discarded because of: " + text.removeprefix(b"ERR ")
        self.broken = self.broken or self.in_multi
        return text

    def before(self, name: str, flags: int, arguments: list[bytes]) -> bool:
        return transactions.before(self, name, flags, arguments)

    def attacked(self) -> None:
        self.server.attacked(self)
        self.drop()

    def resume(self) -> None:
        self.n_pushed = 0
        super().resume()

    def unsent(self) -> int:
        """Bytes that wait to be sent."""
        return 0 if self.lost else self.n_pushed + self.buffered[1] + int(self.transport.get_write_buffer_size())

    def drop(self) -> None:
        """Close it now, whatever it has not read."""
        self.closing = True
        pubsub.forget(self)
        if self.transport is not None:
            self.transport.abort()


class Server:
    """Args: name: of a live segment. settings: CONFIG's, by name (commands.SETTINGS). users: None: `default` alone, with the
    settings' password. disabled: full names of commands that are unknown. store: what the segment stands before (backed.py).
    Within a running loop: await start()."""

    def __init__(
        self,
        name: str,
        settings: dict[str, str] | None = None,
        users: dict[bytes, acl.User] | None = None,
        *,
        disabled: frozenset[str] = frozenset(),
        worker: int = 0,
        of_workers: int = 1,
        store: Store | None = None,
    ) -> None:
        self.name = name
        self.store = store
        self.worker, self.of_workers = worker, of_workers
        self.settings = {**commands.SETTINGS, **(settings or {})}
        if store is not None and "databases" not in (settings or {}):
            self.settings["databases"] = "1"  # what others hold would not be stored
        self.users = users or {acl.DEFAULT: acl.default_user(self.settings["requirepass"].encode("latin-1"))}
        self.disabled = disabled
        self.cache = cache_module.attach(name, store=store)
        if "maxmemory" not in (settings or {}):
            self.settings["maxmemory"] = str(int(self.cache.segment.header["size_bytes"]))
        self.settings["proto-max-bulk-len"] = str(int(self.cache.segment.header["max_value_bytes"]))
        self.handles: list[Cache] = [self.cache]
        self.commands = commands.table(disabled)
        self.executor = _resp.Executor(self.cache, self.commands, databases=int(self.settings["databases"]))
        self.executor.locked = not self.users[acl.DEFAULT].at_once
        self.executor.defer = self.defer
        self.executor.held = self.hold
        self.policy: str = "none" if store is None else self.cache.policy.mode  # type: ignore[attr-defined]  # it is a StoredCache
        if store is not None:
            self.executor.stand_before(commands.WRITE if self.written_through else 0)
        self.executor.slow = self.slow
        self.set_slowlog()
        self.clients: dict[int, Connection] = {}
        self.next_id = worker + 1
        self.accepted = self.refused = 0
        self.began = time.time()
        self.slowlog: deque[tuple[int, float, int, list[bytes], str, bytes]] = deque(maxlen=int(self.settings["slowlog-max-len"]))
        self.slow_number = worker
        self.acl_log: list[acl.Refusal] = []
        self.next_warning = 0.0
        self.rates: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=10)
        self.lag = 0.0  # of the loop: how late the last tick came, seconds
        self.worst_lag = 0.0
        self.paused: set[Connection] = set()
        self.subscribers: dict[bytes, dict[Connection, None]] = {}
        self.pattern_subscribers: dict[bytes, dict[Connection, None]] = {}
        self.monitors: dict[Connection, None] = {}
        self.scripts = scripting.Scripts()
        self.waiting: deque[tuple[int, Connection]] = deque()  # (ring's end, whose replies wait for it)
        self.wake = threading.Event()
        self.ended = False
        self.local = threading.local()
        self.pool = ThreadPoolExecutor(POOL_THREADS if store is None else POOL_THREADS_BACKED, thread_name_prefix="pool")
        self.in_pool = 0
        self.servers: list[asyncio.AbstractServer] = []
        self.on_shutdown: Callable[[], None] = lambda: None
        self.link = bus.Link(self)
        self.cut_off: Callable[[], None] = lambda: None  # called when the others cannot be reached any more

    @property
    def alone(self) -> bool:
        """Is there never another event loop?"""
        return self.of_workers == 1 or self.link.sock is None

    @property
    def written_through(self) -> bool:
        """Do its writes change the store, before they are answered?"""
        return self.policy in ("through", "around")

    # -- life

    async def start(self, *, sockets: list[socket.socket], tls: Any = None, link: socket.socket | None = None) -> None:
        """Serve on these listening sockets; tls: an SSLContext for those of TCP; link: to the other event loops (bus.py)."""
        self.loop = asyncio.get_running_loop()
        if link is not None:
            self.link.read_also_from(link)
            await self.loop.create_connection(lambda: self.link, sock=link)
            await self.link.begin()
        for sock in sockets:
            if sock.family == socket.AF_UNIX:
                server = await self.loop.create_unix_server(self.connection, sock=sock, backlog=511)
            else:
                server = await self.loop.create_server(self.connection, sock=sock, backlog=511, ssl=tls)
            self.servers.append(server)
        self.watcher = threading.Thread(target=self.watch, name="durable", daemon=True)
        self.watcher.start()
        self.ticker = self.loop.call_later(CRON_EVERY, self.cron, self.loop.time() + CRON_EVERY)

    def connection(self) -> asyncio.BaseProtocol:
        return Connection(self.executor, self)  # type: ignore[return-value]  # it has a protocol's methods

    async def stop(self, grace: float = 5.0) -> None:
        """Take no more connections, let what is being executed end and its replies go, close."""
        for server in self.servers:
            server.close()
        deadline = self.loop.time() + grace
        while self.loop.time() < deadline and any(
            not c.untold and (c.blocked or c.buffered[1] or c.writing_now()) for c in self.clients.values()
        ):
            await asyncio.sleep(0.01)
        self.scripts.doom = b"ERR Script killed: the server ends."
        self.ticker.cancel()
        for client in list(self.clients.values()):
            client.drop()
        await asyncio.sleep(0)
        self.cut_off = lambda: None
        self.link.close()
        self.ended = True
        self.wake.set()
        self.watcher.join()
        await asyncio.to_thread(self.pool.shutdown)  # what runs there may still need the loop
        self.clients.clear()
        del self.executor
        self.local = threading.local()
        for handle in self.handles:
            handle.close()

    def cron(self, due: float) -> None:
        self.executor.tick()
        now = self.loop.time()
        self.lag = max(0.0, now - due)
        self.worst_lag = max(self.worst_lag, self.lag)
        self.ticker = self.loop.call_later(CRON_EVERY, self.cron, now + CRON_EVERY)
        self.rates.append((now, self.executor.commands))
        idle_limit = int(self.settings["timeout"])
        clock = _core.monotonic()
        if idle_limit or any(c.full_since for c in self.clients.values()):
            for client in list(self.clients.values()):
                if (client.full_since and clock - client.full_since > SLOW_LIMIT) or (
                    idle_limit and client.idle_ms > idle_limit * 1000 and not client.in_pubsub and not client.blocked
                ):
                    client.drop()
        if self.link.tellings and clock - max(self.link.tellings[0][0], self.link.heard_at) > bus.UNTOLD_LIMIT:
            for client in list(self.clients.values()):
                if client.untold:
                    client.drop()
        if self.executor.paused_until and self.executor.paused_until <= clock * 1000:
            connection.unpause(self)

    # -- connections

    def opened(self, client: Connection, sock: Any) -> None:
        self.accepted += 1
        if len(self.clients) >= int(self.settings["maxclients"]):
            self.refused += 1
            client.add(b"-ERR max number of clients reached\r\n")
            client.closing = True
            client.flush()
            return
        client.id = self.next_id
        self.next_id += self.of_workers
        self.clients[client.id] = client
        if sock is not None and sock.family == socket.AF_UNIX:
            client.address = f"{sock.getsockname()}:0"
            client.local_address = client.address
            return
        peer = client.transport.get_extra_info("peername")
        mine = client.transport.get_extra_info("sockname")
        client.address = f"{peer[0]}:{peer[1]}" if peer else "?:0"
        client.local_address = f"{mine[0]}:{mine[1]}" if mine else "?:0"
        if self.users[acl.DEFAULT].nopass and self.settings["protected-mode"] == "yes" and peer and not _loopback(peer[0]):
            client.add(
                b"-DENIED this server has no password and is in protected mode: it serves the loopback interface only. Set a password "
                b"(--password-file), or say --protected-mode no\r\n"
            )
            client.closing = True
            client.flush()

    def closed(self, client: Connection) -> None:
        self.clients.pop(client.id, None)
        self.paused.discard(client)
        pubsub.forget(client)

    def keep_replies(self, client: Connection) -> Callable[[], None]:
        """From here on no reply leaves for this client until what is returned is called, in the loop and not within a command: the other
        event loops know then what the replies say. Subscriptions and PINGs of the client run meanwhile (transactions.before)."""
        client.untold += 1

        def let_go() -> None:
            client.untold -= 1
            if not client.untold:
                client.flush()  # whatever its next command waits for
                if client.retried_by_pause is not None:
                    connection.go_on(self, client)

        return let_go

    def deliver(self, channel: bytes, message: bytes) -> int:
        return pubsub.deliver(self, channel, message, {pattern for pattern in self.pattern_subscribers if matches(pattern, channel)})

    def run_part(self, part: str, arguments: list[Any]) -> Any:
        """What commands/everywhere.py has asked of this process."""
        return commands.PARTS[part](self, *arguments)

    def monitors_changed(self) -> None:
        self.watch_commands()
        self.link.say("monitors", len(self.monitors))

    def watch_commands(self) -> None:
        """Every command is told to monitors, if there are any in any process."""
        self.executor.watched = bool(self.monitors) or any(other.monitors for other in self.link.others.values())

    def show(self, lines: list[str]) -> None:
        pubsub.show(self, lines)

    def pause(self, until_ms: int, writes_only: bool) -> None:
        connection.pause(self, until_ms, writes_only)

    def configure(self, changes: dict[str, str]) -> None:
        """CONFIG SET of what was checked."""
        self.settings.update(changes)
        self.set_slowlog()
        self.resize_slowlog()

    def change_settings(self, changes: dict[str, str]) -> None:
        """For all processes, soon."""
        self.configure(changes)
        self.link.change("config", changes)

    def change_users(self, changes: dict[bytes, acl.User | None], by: int) -> None:
        """These take the place of those of their names, soon for all processes; None: there is none any more. by: id of the client who
        changes them."""
        self.take_users(changes, by)
        self.link.change("users", {name: user and user.line for name, user in changes.items()})

    def take_users(self, changes: dict[bytes, acl.User | None], by: int = 0) -> None:
        for name, user in changes.items():
            was = self.users.get(name)
            mine = [client for client in self.clients.values() if client.user == name]
            if user is None:
                for client in mine:
                    client.authenticated = False
                    connection.become(client, self.users[acl.DEFAULT])
                connection.end(by, mine)
                self.users.pop(name, None)
                continue
            self.users[name] = user
            for client in mine:
                connection.become(client, user)
            if was is not None and user.hears_less(was):
                connection.end(by, [client for client in mine if not pubsub.may_stay(client, user)])
        self.executor.locked = not self.users[acl.DEFAULT].at_once

    # -- the pool

    def defer(self, client: Connection) -> bool:
        """Run the client's command in a thread, where it may wait. False: too many wait."""
        if self.in_pool >= int(self.settings["maxclients"]):
            return False
        self.in_pool += 1
        self.pool.submit(self.in_thread, client)
        return True

    def in_thread(self, client: Connection) -> None:
        try:
            if self.store is None:
                client.retry(self.patient())
            else:
                backed.run(client, self.patient())
        except BaseException as e:  # a fault of ours: this client's connection ends, the others go on
            self.loop.call_soon_threadsafe(self.failed, client, e)
            return
        self.loop.call_soon_threadsafe(self.done, client)

    def patient(self) -> _resp.Executor:
        """This thread's executor."""
        if not hasattr(self.local, "executor"):
            handle = cache_module.attach(self.name, store=self.store)
            self.handles.append(handle)
            self.local.executor = _resp.Executor(handle, self.commands, impatient=False, databases=self.executor.databases)
        executor: _resp.Executor = self.local.executor
        return executor

    def done(self, client: Connection) -> None:
        self.in_pool -= 1
        if client.took_ns >= self.executor.slower_than_ns:
            self.slow(client, client.retried or [], client.took_ns)
        if client.lost:
            self.closed(client)  # what the command has entered it for since
        self.go_on(client)

    def go_on(self, client: Connection) -> None:
        """Its command is over."""
        if client in self.paused:
            self.paused.discard(client)
            if not client.closing and not client.full:
                client.transport.resume_reading()
        client.resume()

    def failed(self, client: Connection, error: BaseException) -> None:
        self.in_pool -= 1
        self.loop.call_exception_handler({"message": f"a command of {client.address} failed", "exception": error})
        client.drop()

    # -- durability

    def hold(self, client: Connection, end: int) -> None:
        """The client's replies wait until the ring is durable up to its end."""
        self.waiting.append((end, client))
        self.wake.set()

    def watch(self) -> None:
        while True:
            self.wake.wait()
            self.wake.clear()
            if self.ended:
                return
            while self.waiting:
                taken = [self.waiting.popleft() for _ in range(len(self.waiting))]
                durable = self.executor.wait_durable(max(end for end, _ in taken))
                self.loop.call_soon_threadsafe(self.let_go, taken, durable)

    def let_go(self, group: list[tuple[int, Connection]], durable: bool) -> None:
        for end, client in group:
            if durable:
                client.durable(end)
            else:  # what it was told is done is not known to be on the disk: it is not told
                client.drop()

    # -- what is seen

    def set_slowlog(self) -> None:
        limit = int(self.settings["slowlog-log-slower-than"])
        self.executor.slower_than_ns = min(limit * 1000, NEVER) if limit >= 0 else NEVER

    def resize_slowlog(self) -> None:
        most = int(self.settings["slowlog-max-len"])
        if most != self.slowlog.maxlen:
            self.slowlog = deque(list(self.slowlog)[:most], maxlen=most)

    def reset_stats(self) -> None:
        self.accepted = self.refused = 0
        self.worst_lag = 0.0
        self.rates.clear()
        self.rates.append((self.loop.time(), 0))
        self.executor.reset()

    def rate(self) -> int:
        """Commands a second, over the last second or so."""
        (then, before), (now, after) = self.rates[0], (self.loop.time(), self.executor.commands)
        return int((after - before) / max(0.001, now - then))

    def attacked(self, client: Connection) -> None:
        """Say so, once a minute."""
        now = _core.monotonic()
        if now >= self.next_warning:
            self.next_warning = now + WARN_EVERY
            notice(
                f"shmcache: somebody at {client.address} sends POST or Host:, as a browser does in which a web page makes it send commands "
                "(cross-protocol scripting): the connection is dropped"
            )

    def denied(self, client: Connection, reason: str, context: str, what: bytes, name: bytes | None = None) -> None:
        """For ACL LOG: what a user may not. name: his, if it is not the client's."""
        info = connection.info_line(client)
        refusal = acl.Refusal(reason, context, what, client.user if name is None else name, info, time.time())
        acl.note(self.acl_log, refusal, int(self.settings["acllog-max-len"]))

    def slow(self, client: Connection, arguments: list[bytes], ns: int) -> None:
        arguments = commands.without_passwords(arguments)
        words = arguments[:31] if len(arguments) > 32 else arguments
        words = [w if len(w) <= 128 else w[:128] + b"... (%d more bytes)" % (len(w) - 128) for w in words]
        if len(arguments) > 32:
            words.append(b"... (%d more arguments)" % (len(arguments) - 31))
        self.slowlog.appendleft((self.slow_number, time.time(), ns // 1000, words, client.address, client.name))
        self.slow_number += self.of_workers


def _loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "::ffff:127.0.0.1")


def listen(host: str, port: int, shared: bool = True) -> list[socket.socket]:
    """Listening sockets for an address; shared: others of this user may listen on it, too (SO_REUSEPORT)."""
    found: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            sock = socket.socket(family, kind, protocol)
            found.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # as the next three, of what is accepted, too
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE // 3)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            sock.setblocking(False)
            sock.listen(511)
    except OSError:
        for sock in found:
            sock.close()
        raise
    return found


def listen_unix(path: str, mode: int = 0o700) -> socket.socket:
    """A listening unix socket; what an ended server left there is replaced, a living one's is not. Raises: OSError."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
            probe.setblocking(False)
            try:
                with contextlib.suppress(BlockingIOError):  # as many wait already as may
                    probe.connect(path)
                raise OSError(errno.EADDRINUSE, "somebody listens on it", path)
            except ConnectionRefusedError:
                if not is_socket(path):
                    raise OSError(errno.EEXIST, "it is there, and no socket: it is not replaced", path) from None
                os.unlink(path)
            except FileNotFoundError:
                pass
        sock.bind(path)
        try:
            os.chmod(path, mode)
            sock.setblocking(False)
            sock.listen(511)
        except BaseException:
            os.unlink(path)
            raise
    except BaseException:
        sock.close()
        raise
    return sock


def is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.lstat(path).st_mode)


def remover(path: str) -> Callable[[], None]:
    """What removes a unix socket's file, as it is there now: what has taken its place by then stays."""
    inode = os.lstat(path).st_ino

    def remove() -> None:
        with contextlib.suppress(OSError):
            if os.lstat(path).st_ino == inode:
                os.unlink(path)

    return remove
