"""The commands that are not compiled, and the table of all: names, arity, flags, where the keys are.

A command is a function (client, arguments) -> reply, or None if it has replied itself. It raises CommandError for an error reply, and
WouldWait for what has to be run in a thread of the pool: it is called again there.
"""

from __future__ import annotations

import functools
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import shmcache
from shmcache.core import _core, _resp
from shmcache.core._resp import matches
from shmcache.sidecar import replies
from shmcache.sidecar.replies import OK, array, bulk, integer, map_, nil, nil_array

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection, Server

    Run = Callable[[Connection, list[bytes]], bytes | None]

REDIS_VERSION = "7.0.15"  # whose semantics these are
DATABASES = 1

SETTINGS: dict[str, str] = {  # CONFIG's, and what they are if nobody says otherwise
    "appendonly": "no", "bind": "127.0.0.1", "databases": str(DATABASES), "hash-max-listpack-entries": "128", "lfu-log-factor": "10",
    "maxclients": "10000", "maxmemory": "0", "maxmemory-policy": "allkeys-lru", "port": "6379", "proto-max-bulk-len": "536870912",
    "protected-mode": "yes", "requirepass": "", "save": "", "slowlog-log-slower-than": "10000", "slowlog-max-len": "128",
    "tcp-keepalive": "300", "timeout": "0", "unixsocket": "", "latency-monitor-threshold": "0", "enable-debug-command": "no",
}  # fmt: skip
CHANGEABLE = {
    "maxclients": (1, 1 << 20), "slowlog-log-slower-than": (-1, 1 << 62), "slowlog-max-len": (0, 1 << 20), "timeout": (0, 1 << 31),
    "latency-monitor-threshold": (0, 1 << 62), "requirepass": None, "save": None, "appendonly": None, "maxmemory-policy": None,
    "protected-mode": None,
}  # fmt: skip

WRITE, NO_AUTH, IN_MULTI, IN_PUBSUB, FREE = (_resp.FLAGS[f] for f in ("write", "no_auth", "in_multi", "in_pubsub", "free"))


class Error(_resp.CommandError):
    """Error("ERR syntax error")"""

    def __init__(self, text: str) -> None:
        super().__init__(text.encode("utf-8", "surrogateescape"))


PUSH_LIMIT = 32 << 20  # bytes that wait for a subscriber
RAW = 256  # _resp's, with a codec
SCAN_BUCKETS = 1 << 16  # that one SCAN may look at, if they are empty
SYNTAX = "ERR syntax error"
NOT_AN_INTEGER = "ERR value is not an integer or out of range"
TOO_LARGE = "ERR string exceeds maximum allowed size (proto-max-bulk-len)"


@dataclass(frozen=True)
class Command:
    arity: int
    flags: int
    run: Run | None
    keys: tuple[int, int, int]  # first, last (negative: from the end), step; (0, 0, 0): none
    group: str


TABLE: dict[str, Command] = {}


def command(name: str, arity: int, flags: int = 0, keys: tuple[int, int, int] = (0, 0, 0), group: str = "generic") -> Callable[[Run], Run]:
    def add(run: Run) -> Run:
        TABLE[name] = Command(arity, flags, run, keys, group)
        return run

    return add


ONE = (1, 1, 1)
for _names, _arity, _flags, _keys, _group in (
    ("get strlen", 2, 0, ONE, "string"), ("mget", -2, 0, (1, -1, 1), "string"), ("getrange substr", 4, 0, ONE, "string"),
    ("getbit", 3, 0, ONE, "bitmap"), ("set", -3, WRITE, ONE, "string"), ("setnx getset append incrby decrby", 3, WRITE, ONE, "string"),
    ("setex psetex setrange", 4, WRITE, ONE, "string"), ("getdel incr decr", 2, WRITE, ONE, "string"),
    ("getex", -2, WRITE, ONE, "string"), ("mset", -3, WRITE, (1, -1, 2), "string"), ("setbit", 4, WRITE, ONE, "bitmap"),
    ("del unlink", -2, WRITE, (1, -1, 1), "generic"), ("exists touch", -2, 0, (1, -1, 1), "generic"),
    ("ttl pttl expiretime pexpiretime type", 2, 0, ONE, "generic"), ("persist", 2, WRITE, ONE, "generic"),
    ("expire pexpire expireat pexpireat", -3, WRITE, ONE, "generic"), ("ping", -1, IN_PUBSUB, (0, 0, 0), "connection"),
    ("echo", 2, 0, (0, 0, 0), "connection"),
):  # fmt: skip
    for _name in _names.split():
        TABLE[_name] = Command(_arity, _flags, None, _keys, _group)


def table() -> dict[str, tuple[int, int, Run | None]]:
    return {name: (c.arity, c.flags, c.run) for name, c in TABLE.items()}


def integer_of(text: bytes, error: str = NOT_AN_INTEGER) -> int:
    n = _resp.number(text)
    if n is None:
        raise Error(error)
    return n


def in_pool(client: Connection) -> None:
    """What takes long is run in a thread of the pool."""
    if client.ex.impatient:
        raise _core.WouldWait


LONG = {"keys", "lcs", "randomkey", "save", "flushall", "flushdb"}  # they may be run in the pool
OF_LOOP = {"connection", "pubsub", "transactions"}  # groups, and these: they act on connections, which are the loop's
OF_LOOP_ALONE = {"monitor", "config", "slowlog", "info", "shutdown", "latency", "debug"}
NOT_IN_MULTI = {"save", "bgsave", "bgrewriteaof", "shutdown", "debug", "monitor"}


def is_of_loop(client: Connection) -> bool:
    """Is what this client waits for a transaction that acts on connections?"""
    return any((c := TABLE.get(words[0].decode("latin-1").lower())) and is_loops(c, words) for words in client.queue)


def is_loops(c: Command, words: list[bytes]) -> bool:
    return c.group in OF_LOOP or words[0].decode("latin-1").lower() in OF_LOOP_ALONE


def keys_in(name: str, arguments: list[bytes]) -> list[bytes]:
    """The keys among a command's arguments (without its name)."""
    c = TABLE.get(name)
    if c is None:
        return []
    first, last, step = c.keys
    if name == "bitop":
        return arguments[1:]
    if first == 0:
        return []
    last = last if last > 0 else len(arguments) + 1 + last
    return [arguments[i - 1] for i in range(first, last + 1, step) if i - 1 < len(arguments)]


def shown(word: bytes) -> str:
    """In an error: up to its first zero byte, as C prints a string."""
    return word.split(b"\0")[0].decode("utf-8", "surrogateescape")


def unknown_subcommand(command: str, word: bytes) -> Error:
    return Error(f"ERR unknown subcommand '{shown(word[:128])}'. Try {command.upper()} HELP.")


SUBCOMMANDS: dict[str, dict[str, int]] = {  # of a container: arity with both names, as Redis counts
    "client": {
        "getname": 2, "help": 2, "id": 2, "info": 2, "kill": -3, "list": -2, "no-evict": 3, "pause": -3, "reply": 3, "setinfo": 4,
        "setname": 3, "unpause": 2,
    },
    "command": {"count": 2, "docs": -2, "getkeys": -3, "getkeysandflags": -3, "help": 2, "info": -2, "list": -2},
    "config": {"get": -3, "help": 2, "resetstat": 2, "rewrite": 2, "set": -4},
    "function": {"flush": -2, "help": 2},
    "latency": {"doctor": 2, "help": 2, "history": 3, "latest": 2, "reset": -2},
    "memory": {"doctor": 2, "help": 2, "purge": 2, "usage": -3},
    "object": {"encoding": 3, "freq": 3, "help": 2, "idletime": 3, "refcount": 3},
    "pubsub": {"channels": -2, "help": 2, "numpat": 2, "numsub": -2, "shardchannels": -2, "shardnumsub": -2},
    "slowlog": {"get": -2, "help": 2, "len": 2, "reset": 2},
}  # fmt: skip


def check_subcommand(name: str, arguments: list[bytes]) -> None:
    """Raises: Error, if a container has no such subcommand, or it does not take so many arguments."""
    if name not in SUBCOMMANDS or (name == "command" and not arguments):
        return
    word = arguments[0].decode("latin-1").lower()
    arity = SUBCOMMANDS[name].get(word)
    if arity is None:
        raise unknown_subcommand(name, arguments[0])
    given = len(arguments) + 1
    if given != arity if arity > 0 else given < -arity:
        raise Error(f"ERR wrong number of arguments for '{name}|{word}' command")


def container(run: Run) -> Run:
    """A command whose first argument names what it does."""

    @functools.wraps(run)
    def checked(client: Connection, arguments: list[bytes]) -> bytes | None:
        name = run.__name__.rstrip("_")
        check_subcommand(name, arguments)
        if arguments and arguments[0].lower() == b"help":
            words = ", ".join(word.upper() for word in SUBCOMMANDS[name])
            return array(map(replies.simple, (f"{name.upper()} <subcommand> [<arg> ...]. As in Redis {REDIS_VERSION}:", words)))
        return run(client, arguments)

    return checked


# ---- the connection -------------------------------------------------------------------------------------------------------------


@command("select", 2, 0, group="connection")
def select(client: Connection, arguments: list[bytes]) -> bytes:
    if integer_of(arguments[0]) not in range(DATABASES):
        raise Error("ERR DB index is out of range")
    return OK


def authenticate(client: Connection, user: bytes, password: bytes) -> None:
    server = client.server
    if user != b"default" or not server.password_is(password):
        raise Error("WRONGPASS invalid username-password pair or user is disabled.")
    client.authenticated = True
    client.user = "default"


@command("auth", -2, NO_AUTH | FREE, group="connection")
def auth(client: Connection, arguments: list[bytes]) -> bytes:
    if len(arguments) > 2:
        raise Error(SYNTAX)
    if len(arguments) == 1 and not client.server.settings["requirepass"]:
        raise Error(
            "ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?"
        )
    user, password = (b"default", arguments[0]) if len(arguments) == 1 else (arguments[0], arguments[1])
    if client.server.settings["requirepass"] or user != b"default":
        authenticate(client, user, password)
    return OK


@command("hello", -1, NO_AUTH, group="connection")
def hello(client: Connection, arguments: list[bytes]) -> bytes:
    protocol, name = client.protocol, None
    rest = list(arguments)
    if rest:
        n = _resp.number(rest.pop(0))
        if n is None:
            raise Error("ERR Protocol version is not an integer or out of range")
        if n not in (2, 3):
            raise Error("NOPROTO unsupported protocol version")
        protocol = n
    credentials = None
    while rest:
        said = rest.pop(0)
        word = said.lower()
        if word == b"auth" and len(rest) >= 2:
            credentials = rest.pop(0), rest.pop(0)
        elif word == b"setname" and rest:
            name = checked_name(rest.pop(0))
        else:
            raise Error("ERR Syntax error in HELLO option '" + shown(said) + "'")
    if credentials and (client.server.settings["requirepass"] or credentials[0] != b"default"):
        authenticate(client, *credentials)
    if not client.authenticated:
        raise Error(
            "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH <user> <pass> option can "
            "be used to authenticate the client and select the RESP protocol version at the same time"
        )
    if name is not None:
        client.name = name
    client.protocol = protocol
    return replies.of(
        {
            "server": "redis", "version": REDIS_VERSION, "proto": protocol, "id": client.id, "mode": "standalone", "role": "master",
            "modules": [],
        }, protocol,
    )  # fmt: skip


def checked_name(name: bytes, error: str = "ERR Client names cannot contain spaces, newlines or special characters.") -> bytes:
    if any(not 33 <= c <= 126 for c in name):
        raise Error(error)
    return name


@command("reset", 1, NO_AUTH | IN_MULTI | IN_PUBSUB | FREE, group="connection")
def reset(client: Connection, arguments: list[bytes]) -> bytes:
    forget(client)
    discard_transaction(client)
    client.name, client.protocol, client.user = b"", 2, "default"
    client.silent, client.skip, client.no_evict = False, 0, False
    client.authenticated = not client.server.settings["requirepass"]
    return replies.simple("RESET")


@command("quit", -1, NO_AUTH | IN_MULTI | IN_PUBSUB | FREE, group="connection")
def quit_(client: Connection, arguments: list[bytes]) -> bytes:
    client.closing = True
    return OK


def info_line(client: Connection) -> str:
    now = time.time()
    flags = ("O" if client.monitoring else "") + ("P" if client.in_pubsub else "") + ("x" if client.in_multi else "")
    flags += ("U" if client.address.startswith("/") else "") + ("b" if client.blocked else "") + ("e" if client.no_evict else "")
    waiting, unsent = client.buffered
    command_name = client.home.names[client.last_command][0] if client.last_command >= 0 else "NULL"
    return (
        f"id={client.id} addr={client.address} laddr={client.local_address} fd={client.fd} name={client.name.decode('latin-1')} "
        f"age={int(now - client.began)} idle={client.idle_ms // 1000} flags={flags or 'N'} db=0 sub={len(client.channels)} "
        f"psub={len(client.patterns)} ssub=0 multi={len(client.queue) if client.in_multi else -1} qbuf={waiting} qbuf-free=0 argv-mem=0 "
        f"multi-mem=0 rbs=0 rbp=0 obl={unsent} oll=0 omem=0 tot-mem={client.memory} events=r cmd={command_name} user={client.user} "
        f"redir=-1 resp={client.protocol}"
    )


@command("client", -2, FREE, group="connection")
@container
def client_(client: Connection, arguments: list[bytes]) -> bytes | None:
    word, rest = arguments[0].lower(), arguments[1:]
    server = client.server
    if word == b"id" and not rest:
        return integer(client.id)
    if word == b"info" and not rest:
        return replies.verbatim(info_line(client) + "\n", client.protocol)
    if word == b"getname" and not rest:
        return bulk(client.name) if client.name else nil(client.protocol)
    if word == b"setname" and len(rest) == 1:
        client.name = checked_name(rest[0])
        return OK
    if word == b"setinfo" and len(rest) == 2:
        attribute = rest[0].lower()
        if attribute not in (b"lib-name", b"lib-ver"):
            raise Error("ERR Unrecognized option '" + shown(rest[0]) + "'")
        name = checked_name(rest[1], f"ERR {attribute.decode()} cannot contain spaces, newlines or special characters.")
        setattr(client, attribute.decode().replace("-", "_"), name)
        return OK
    if word == b"list":
        return replies.verbatim("".join(info_line(c) + "\n" for c in listed(client, rest)), client.protocol)
    if word == b"kill" and rest:
        return kill(client, rest)
    if word == b"no-evict" and len(rest) == 1 and rest[0].lower() in (b"on", b"off"):
        client.no_evict = rest[0].lower() == b"on"
        return OK
    if word == b"reply" and len(rest) == 1 and rest[0].lower() in (b"on", b"off", b"skip"):
        how = rest[0].lower()
        client.silent = how == b"off"
        if how == b"skip" and not client.silent:
            client.skip = 2  # this one, which replies nothing, and the next
        return OK if how == b"on" else None
    if word == b"pause" and len(rest) in (1, 2):
        ms = _resp.number(rest[0])
        if ms is None or not 0 <= ms < 1 << 50:
            raise Error("ERR timeout is negative" if ms is not None and ms < 0 else "ERR timeout is not an integer or out of range")
        if len(rest) == 2 and rest[1].lower() not in (b"write", b"all"):
            raise Error("ERR CLIENT PAUSE mode must be WRITE or ALL")
        server.executor.paused_writes_only = len(rest) == 2 and rest[1].lower() == b"write"
        server.executor.paused_until = int(time.monotonic() * 1000) + ms
        return OK
    if word == b"unpause" and not rest:
        unpause(server)
        return OK
    raise Error(SYNTAX)


def listed(client: Connection, rest: list[bytes]) -> Iterator[Connection]:
    clients = list(client.server.clients.values())
    if not rest:
        return iter(clients)
    if len(rest) == 2 and rest[0].lower() == b"type":
        return (c for c in clients if is_of_type(c, rest[1]))
    if len(rest) >= 2 and rest[0].lower() == b"id":
        ids = {integer_of(word, "ERR Invalid client ID") for word in rest[1:]}
        return (c for c in clients if c.id in ids)
    raise Error(SYNTAX)


def is_of_type(client: Connection, kind: bytes) -> bool:
    kind = kind.lower()
    if kind not in (b"normal", b"pubsub", b"master", b"replica", b"slave"):
        raise Error(f"ERR Unknown client type '{kind.decode('utf-8', 'surrogateescape')}'")
    return kind == (b"pubsub" if client.in_pubsub else b"normal")


def kill(client: Connection, rest: list[bytes]) -> bytes:
    clients = list(client.server.clients.values())
    if len(rest) == 1:
        found = [c for c in clients if c.address.encode() == rest[0]]
        if not found:
            raise Error("ERR No such client")
        end(client, found)
        return OK
    if len(rest) % 2:
        raise Error(SYNTAX)
    skip_me = True
    for word, value in zip(rest[::2], rest[1::2], strict=True):
        word = word.lower()
        if word == b"id":
            number = _resp.number(value)
            if number is None or number < 1:
                raise Error("ERR client-id should be greater than 0")
            clients = [c for c in clients if c.id == number]
        elif word == b"addr":
            clients = [c for c in clients if c.address.encode() == value]
        elif word == b"laddr":
            clients = [c for c in clients if c.local_address.encode() == value]
        elif word == b"type":
            clients = [c for c in clients if is_of_type(c, value)]
        elif word == b"user":
            if value != b"default":
                raise Error(f"ERR No such user '{value.decode('utf-8', 'surrogateescape')}'")
        elif word == b"skipme" and value.lower() in (b"yes", b"no"):
            skip_me = value.lower() == b"yes"
        else:
            raise Error(SYNTAX)
    clients = [c for c in clients if c is not client or not skip_me]
    end(client, clients)
    return integer(len(clients))


def end(client: Connection, clients: Iterable[Connection]) -> None:
    for c in clients:
        if c is client:
            c.closing = True  # after the reply
        else:
            c.drop()


def unpause(server: Server) -> None:
    server.executor.paused_until = 0
    for client in list(server.clients.values()):
        if client.retried_by_pause is not None:
            server.loop.call_soon(go_on, server, client)


def go_on(server: Server, client: Connection) -> None:
    """Run what a pause has kept. For itself: not within another client's command."""
    arguments, client.retried_by_pause = client.retried_by_pause, None
    if arguments is None or client.lost:
        return
    client.blocked = False
    client.call(arguments)
    if not client.blocked:
        server.go_on(client)


# ---- before a command -----------------------------------------------------------------------------------------------------------


def before(client: Connection, name: str, flags: int, arguments: list[bytes]) -> bool:
    """True: the command has been answered, queued, or put off, and is not to run now."""
    server = client.server
    if server.monitors and name not in ("monitor", "auth", "hello", "exec", "quit"):
        tell_monitors(client, arguments)
    if client.in_pubsub and client.protocol == 2 and not flags & IN_PUBSUB:
        allowed = "(P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET"
        client.add(replies.error(f"ERR Can't execute '{name}': only {allowed} are allowed in this context"))
        return True
    if client.in_multi and not flags & IN_MULTI:
        try:
            if name in NOT_IN_MULTI:
                raise Error("ERR Command not allowed inside a transaction")
            check_subcommand(name, arguments[1:])
            client.queue_bytes += sum(map(len, arguments)) + 64
            if client.queue_bytes > client.home.most_pending:
                raise Error("ERR the transaction is larger than is kept")
        except Error as e:
            client.broken = True
            client.queue = []
            client.fail(e.args[0])
            return True
        client.queue.append(arguments)
        client.add(replies.QUEUED)
        return True
    executor = server.executor
    if executor.paused_until and not flags & FREE and (not executor.paused_writes_only or flags & WRITE or name in ("exec", "publish")):
        client.retried_by_pause = arguments
        client.blocked = True
        return True
    return False


# ---- transactions ---------------------------------------------------------------------------------------------------------------


@command("multi", 1, IN_MULTI, group="transactions")
def multi(client: Connection, arguments: list[bytes]) -> bytes:
    if client.in_multi:
        raise Error("ERR MULTI calls can not be nested")
    client.in_multi, client.broken, client.queue, client.queue_bytes = True, False, [], 0
    return OK


@command("discard", 1, IN_MULTI, group="transactions")
def discard(client: Connection, arguments: list[bytes]) -> bytes:
    if not client.in_multi:
        raise Error("ERR DISCARD without MULTI")
    discard_transaction(client)
    return OK


def discard_transaction(client: Connection) -> None:
    client.in_multi, client.broken, client.queue, client.queue_bytes, client.watching = False, False, [], 0, {}


@command("watch", -2, IN_MULTI, (1, -1, 1), group="transactions")
def watch(client: Connection, arguments: list[bytes]) -> bytes:
    if client.in_multi:
        raise Error("ERR WATCH inside MULTI is not allowed")
    for key in arguments:
        client.watching.setdefault(key, client.ex.version(key))
    return OK


@command("unwatch", 1, group="transactions")
def unwatch(client: Connection, arguments: list[bytes]) -> bytes:
    client.watching = {}
    return OK


@command("exec", 1, IN_MULTI, group="transactions")
def exec_(client: Connection, arguments: list[bytes]) -> bytes | None:
    if not client.in_multi:
        raise Error("ERR EXEC without MULTI")
    if client.broken:
        discard_transaction(client)
        raise Error("EXECABORT Transaction discarded because of previous errors.")
    queue = client.queue
    keys = [*client.watching]
    long, log_bytes = False, 0
    for words in queue:
        name = words[0].decode("latin-1").lower()
        found = keys_in(name, words[1:])
        keys += found
        long = long or name in LONG
        log_bytes += (sum(map(len, words)) + 64 * max(1, len(found))) if TABLE[name].flags & WRITE else 0
    if long and not is_of_loop(client):
        in_pool(client)
    with all_of(client, keys, log_bytes):
        changed = any(client.ex.version(key) != version for key, version in client.watching.items())
        discard_transaction(client)
        if changed:
            return nil_array(client.protocol)
        client.add(b"*%d\r\n" % len(queue))
        for words in queue:
            client.call(words)
    return None


class all_of:
    """with all_of(client, keys): what is done to them is one step for all who write. Within it nothing is put off to the pool."""

    def __init__(self, client: Connection, keys: Iterable[bytes], log_bytes: int = 0) -> None:
        self.executor, self.keys, self.log_bytes = client.ex, keys, log_bytes

    def __enter__(self) -> None:
        self.nested = self.executor.holds
        if not self.nested:
            self.was = self.executor.impatient
            self.executor.hold(self.keys, self.log_bytes)
            self.executor.impatient = False

    def __exit__(self, *_: object) -> None:
        if not self.nested:
            self.executor.impatient = self.was
            self.executor.release()


# ---- several keys ---------------------------------------------------------------------------------------------------------------


@command("msetnx", -3, WRITE, (1, -1, 2), group="string")
def msetnx(client: Connection, arguments: list[bytes]) -> bytes:
    if len(arguments) % 2:
        raise Error("ERR wrong number of arguments for 'msetnx' command")
    ex = client.ex
    with all_of(client, arguments[::2]):
        if any(ex.version(key) for key in arguments[::2]):
            return integer(0)
        for key, value in zip(arguments[::2], arguments[1::2], strict=True):
            ex.write(key, value, 0)
    return integer(1)


def rename_to(client: Connection, arguments: list[bytes], only_if_absent: bool) -> int:
    ex = client.ex
    old, new = arguments
    with all_of(client, arguments):
        found = ex.read(old)
        if found is None:
            raise Error("ERR no such key")
        if old == new:
            return not only_if_absent
        if only_if_absent and ex.version(new):
            return 0
        value, _, expires_ms, codec = found
        ex.write(new, value, expires_ms, codec=codec)
        ex.remove(old)
    return 1


@command("rename", 3, WRITE, (1, 2, 1))
def rename(client: Connection, arguments: list[bytes]) -> bytes:
    rename_to(client, arguments, False)
    return OK


@command("renamenx", 3, WRITE, (1, 2, 1))
def renamenx(client: Connection, arguments: list[bytes]) -> bytes:
    return integer(rename_to(client, arguments, True))


@command("copy", -3, WRITE, (1, 2, 1))
def copy(client: Connection, arguments: list[bytes]) -> bytes:
    ex = client.ex
    replace, rest = False, arguments[2:]
    while rest:
        word = rest.pop(0).lower()
        if word == b"replace":
            replace = True
        elif word == b"db" and rest:
            if integer_of(rest.pop(0)) != 0:
                raise Error("ERR DB index is out of range")
        else:
            raise Error(SYNTAX)
    source, to = arguments[:2]
    if source == to:
        raise Error("ERR source and destination objects are the same")
    with all_of(client, [source, to]):
        found = ex.read(source)
        if found is None or (ex.version(to) and not replace):
            return integer(0)
        value, _, expires_ms, codec = found
        ex.write(to, value, expires_ms, codec=codec)
    return integer(1)


# ---- strings --------------------------------------------------------------------------------------------------------------------


@command("incrbyfloat", 3, WRITE, ONE, group="string")
def incrbyfloat(client: Connection, arguments: list[bytes]) -> bytes:
    ex, (key, by) = client.ex, arguments
    while True:
        found = ex.read(key)
        value, version, expires_ms = (b"0", None, 0) if found is None else found[:3]
        try:
            value = _resp.add_floats(value, by)
        except ValueError:
            raise Error("ERR value is not a valid float") from None
        except ArithmeticError:
            raise Error("ERR increment would produce NaN or Infinity") from None
        if ex.write(key, value, expires_ms, version=version, absent=version is None):
            return bulk(value)


@command("lcs", -3, 0, (1, 2, 1), group="string")
def lcs(client: Connection, arguments: list[bytes]) -> bytes:
    length = idx = with_length = False
    least = 0
    rest = arguments[2:]
    while rest:
        word = rest.pop(0).lower()
        if word == b"len":
            length = True
        elif word == b"idx":
            idx = True
        elif word == b"withmatchlen":
            with_length = True
        elif word == b"minmatchlen" and rest:
            least = max(0, integer_of(rest.pop(0)))
        else:
            raise Error(SYNTAX)
    if idx and length:
        raise Error("ERR If you want both the length and indexes, please just use IDX.")
    in_pool(client)
    a, b = (found[0] if (found := client.ex.read(key)) else b"" for key in arguments[:2])
    if (len(a) + 1) * (len(b) + 1) > 1 << 28:
        raise Error("ERR Insufficient memory, transient memory for LCS exceeds proto-max-bulk-len")
    common, ranges, size = _resp.longest_common(a, b)
    if length:
        return integer(size)
    if not idx:
        return bulk(common)
    found_ranges = []
    for (a0, a1), (b0, b1) in ranges:
        n = a1 - a0 + 1
        if n >= least:
            found_ranges.append([[a0, a1], [b0, b1], *([n] if with_length else [])])
    return replies.of({"matches": found_ranges, "len": size}, client.protocol)


# ---- bits -----------------------------------------------------------------------------------------------------------------------


def bit_range(value: bytes, first: int, last: int, in_bits: bool) -> tuple[int, int]:
    """(first, last) bit, clamped as Redis does; first > last: none."""
    total = len(value) * 8 if in_bits else len(value)
    first = max(0, first + total) if first < 0 else first
    last = max(0, last + total) if last < 0 else last
    last = min(last, total - 1)
    return (first, last) if in_bits else (first * 8, last * 8 + 7)


def unit(word: bytes) -> bool:
    if word.lower() not in (b"byte", b"bit"):
        raise Error(SYNTAX)
    return word.lower() == b"bit"


@command("bitcount", -2, 0, ONE, group="bitmap")
def bitcount(client: Connection, arguments: list[bytes]) -> bytes:
    found = client.ex.read(arguments[0])
    if found is None:
        return integer(0)
    if len(arguments) not in (1, 3, 4):
        raise Error(SYNTAX)
    first, last, in_bits = 0, -1, False
    if len(arguments) > 1:
        first, last = integer_of(arguments[1]), integer_of(arguments[2])
        if first < 0 and last < 0 and first > last:
            return integer(0)
        in_bits = len(arguments) == 4 and unit(arguments[3])
    value = found[0]
    low, high = bit_range(value, first, last, in_bits)
    if low > high or not value:
        return integer(0)
    bits = int.from_bytes(value[low >> 3 : (high >> 3) + 1], "big")
    bits &= (1 << (((high >> 3) - (low >> 3) + 1) * 8 - (low & 7))) - 1
    return integer((bits >> (7 - (high & 7))).bit_count())


@command("bitpos", -3, 0, ONE, group="bitmap")
def bitpos(client: Connection, arguments: list[bytes]) -> bytes:
    wanted = integer_of(arguments[1])
    if wanted not in (0, 1):
        raise Error("ERR The bit argument must be 1 or 0.")
    found = client.ex.read(arguments[0])
    if found is None:
        return integer(-1 if wanted else 0)
    if len(arguments) > 5:
        raise Error(SYNTAX)
    first = integer_of(arguments[2]) if len(arguments) > 2 else 0
    in_bits = len(arguments) > 4 and unit(arguments[4])
    last = integer_of(arguments[3]) if len(arguments) > 3 else -1
    end_given = len(arguments) > 3
    value = found[0]
    low, high = bit_range(value, first, last, in_bits)
    if low > high or not value:
        return integer(-1)
    at, end = low >> 3, high >> 3
    plain = b"\0" if wanted else b"\xff"  # a byte with none of the bits
    if value[at : at + 1] == plain:
        at = min(end, len(value) - len(value[at:].lstrip(plain)))
    for i in range(at, end + 1):
        byte = value[i] if wanted else value[i] ^ 0xFF
        if i == low >> 3:
            byte &= 0xFF >> (low & 7)
        if i == high >> 3:
            byte &= 0xFF << (7 - (high & 7)) & 0xFF
        if byte:
            return integer(i * 8 + 8 - byte.bit_length())
    return integer(-1 if wanted or end_given else len(value) * 8)


@command("bitop", -4, WRITE, (2, -1, 1), group="bitmap")
def bitop(client: Connection, arguments: list[bytes]) -> bytes:
    operation, to, sources = arguments[0].lower(), arguments[1], arguments[2:]
    if operation not in (b"and", b"or", b"xor", b"not"):
        raise Error(SYNTAX)
    if operation == b"not" and len(sources) != 1:
        raise Error("ERR BITOP NOT must be called with a single source key.")
    ex = client.ex
    with all_of(client, [to, *sources]):
        result, size = 0, 0
        for i, key in enumerate(sources):  # one at a time: they may be large
            value = found[0] if (found := ex.read(key)) else b""
            number = int.from_bytes(value, "big")
            if len(value) < size:
                number <<= 8 * (size - len(value))
            else:
                result <<= 8 * (len(value) - size)
                size = len(value)
            if i == 0:
                result = number
            else:
                result = result & number if operation == b"and" else result | number if operation == b"or" else result ^ number
        if size == 0:
            ex.remove(to)
            return integer(0)
        if operation == b"not":
            result ^= (1 << 8 * size) - 1
        ex.write(to, result.to_bytes(size, "big"), 0, codec=RAW)
    return integer(size)


def bitfield_type(word: bytes) -> tuple[bool, int]:
    """(signed, bits)"""
    n = _resp.number(word[1:])
    signed = word[:1] == b"i"
    if n is None or not (signed or word[:1] == b"u") or not 1 <= n <= (64 if signed else 63):
        raise Error("ERR Invalid bitfield type. Use something like i16 u8. Note that u64 is not supported but i64 is.")
    return signed, n


def bitfield_offset(client: Connection, word: bytes, bits: int) -> int:
    times = word.startswith(b"#")
    n = _resp.number(word[1:] if times else word)
    most = int(client.server.settings["proto-max-bulk-len"]) * 8
    if n is None or n < 0 or (n * bits if times else n) + bits > most:
        raise Error("ERR bit offset is not an integer or out of range")
    return n * bits if times else n


def bitfield_run(client: Connection, arguments: list[bytes], read_only: bool) -> bytes:
    key, rest = arguments[0], arguments[1:]
    overflow = b"wrap"
    operations: list[tuple[bytes, bool, int, int, int, bytes]] = []
    while rest:
        word = rest.pop(0).lower()
        if word == b"get" and len(rest) >= 2:
            signed, bits = bitfield_type(rest.pop(0))
            operations.append((word, signed, bits, bitfield_offset(client, rest.pop(0), bits), 0, overflow))
        elif word == b"overflow" and rest:
            overflow = rest.pop(0).lower()
            if overflow not in (b"wrap", b"sat", b"fail"):
                raise Error("ERR Invalid OVERFLOW type specified")
        elif word in (b"set", b"incrby") and len(rest) >= 3:
            signed, bits = bitfield_type(rest.pop(0))
            offset = bitfield_offset(client, rest.pop(0), bits)
            operations.append((word, signed, bits, offset, integer_of(rest.pop(0)), overflow))
        else:
            raise Error(SYNTAX)
    if read_only and any(operation[0] != b"get" for operation in operations):
        raise Error("ERR BITFIELD_RO only supports the GET subcommand")
    ex = client.ex
    while True:
        found = ex.read(key)
        value, version, expires_ms = (b"", None, 0) if found is None else found[:3]
        data, out, writes = bytearray(value), [], False
        for word, signed, bits, offset, operand, how in operations:
            end = (offset + bits + 7) >> 3
            if word != b"get":
                writes = True
                data.extend(bytes(max(0, end - len(data))))
            whole = int.from_bytes(data[offset >> 3 : end].ljust(end - (offset >> 3), b"\0"), "big")
            shift = end * 8 - offset - bits
            old = whole >> shift & (1 << bits) - 1
            number = old - (1 << bits) if signed and old >> (bits - 1) else old
            if word == b"get":
                out.append(integer(number))
                continue
            low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
            new = number + operand if word == b"incrby" else operand
            if not signed and word == b"set" and operand < 0:
                new = operand & (1 << 64) - 1
            if not low <= new <= high:
                if how == b"fail":
                    out.append(nil(client.protocol))
                    continue
                new = min(max(new, low), high) if how == b"sat" else new & (1 << bits) - 1
                if signed and new >> (bits - 1) and new > high:
                    new -= 1 << bits
            whole = whole & ~(((1 << bits) - 1) << shift) | (new & (1 << bits) - 1) << shift
            data[offset >> 3 : end] = whole.to_bytes(end - (offset >> 3), "big")
            out.append(integer(number if word == b"set" else new))
        if not writes or (found is not None and data == value):
            return array(out)
        if ex.write(key, bytes(data), expires_ms, version=version, absent=version is None, codec=RAW):
            return array(out)


@command("bitfield", -2, WRITE, ONE, group="bitmap")
def bitfield(client: Connection, arguments: list[bytes]) -> bytes:
    return bitfield_run(client, arguments, False)


@command("bitfield_ro", -2, 0, ONE, group="bitmap")
def bitfield_ro(client: Connection, arguments: list[bytes]) -> bytes:
    return bitfield_run(client, arguments, True)


# ---- all keys -------------------------------------------------------------------------------------------------------------------


@command("dbsize", 1, group="server")
def dbsize(client: Connection, arguments: list[bytes]) -> bytes:
    return integer(len(client.server.cache))


def flush(client: Connection, arguments: list[bytes]) -> bytes:
    if len(arguments) > 1 or (arguments and arguments[0].lower() not in (b"sync", b"async")):
        raise Error(SYNTAX)
    if int(client.server.cache.segment.header["log_policy"]):
        in_pool(client)
    client.server.cache.clear()
    return OK


command("flushall", -1, WRITE, group="server")(flush)
command("flushdb", -1, WRITE, group="server")(flush)


@command("keys", 2)
def keys(client: Connection, arguments: list[bytes]) -> bytes:
    in_pool(client)
    pattern, ex = arguments[0], client.ex
    at, found = 0, []
    while at < ex.n_buckets:  # in parts: the loop's thread gets its turns
        at, some = ex.keys(at, at + 1024)
        found += [bulk(key) for key in some if matches(pattern, key)]
    return array(found)


@command("scan", -2)
def scan(client: Connection, arguments: list[bytes]) -> bytes:
    cursor = arguments[0].split(b"\0")[0] or b"0"
    if len(cursor) > 30 or not (cursor[1:] if cursor[:1] in b"+-" else cursor).isdigit() or abs(int(cursor)) >= 1 << 64:
        raise Error("ERR invalid cursor")
    pattern, count, kind = b"*", 10, b"string"
    rest = arguments[1:]
    while rest:
        word = rest.pop(0).lower()
        if word == b"count" and rest:
            count = integer_of(rest.pop(0))
            if count < 1:
                raise Error(SYNTAX)
        elif word == b"match" and rest:
            pattern = rest.pop(0)
        elif word == b"type" and rest:
            kind = rest.pop(0).lower()
        else:
            raise Error(SYNTAX)
    if count > 1000:
        in_pool(client)
    ex = client.ex
    at = min(int(cursor) % (1 << 64), ex.n_buckets)
    at, found = ex.keys(at, at + min(max(10 * count, SCAN_BUCKETS), ex.n_buckets), count)
    found = [bulk(key) for key in found if kind == b"string" and matches(pattern, key)]
    return array((bulk(b"%d" % (at if at < ex.n_buckets else 0)), array(found)))


@command("randomkey", 1)
def randomkey(client: Connection, arguments: list[bytes]) -> bytes:
    ex = client.ex
    if len(client.server.cache):
        for _ in range(100):
            _, found = ex.keys(random.randrange(ex.n_buckets), ex.n_buckets, 1)
            if found:
                return bulk(random.choice(found))
        in_pool(client)
        _, found = ex.keys(0, ex.n_buckets, 1)
        if found:
            return bulk(found[0])
    return nil(client.protocol)


# ---- one key, looked at ---------------------------------------------------------------------------------------------------------


def encoding(value: bytes, codec: int) -> str:
    if codec & RAW:
        return "raw"
    if codec == 2 or (len(value) <= 20 and _resp.number(value) is not None):
        return "int"
    return "embstr" if len(value) <= 44 else "raw"


@command("object", -2, 0, (2, 2, 1))
@container
def object_(client: Connection, arguments: list[bytes]) -> bytes:
    word = arguments[0].lower()
    found = client.ex.read(arguments[1])
    if found is None:
        return nil(client.protocol)
    kind = encoding(found[0], found[3])
    if word == b"encoding":
        return bulk(kind)
    if word == b"freq":
        raise Error(
            "ERR An LFU maxmemory policy is not selected, access frequency not tracked. Please note that when switching between policies "
            "at runtime LRU and LFU data will take some time to adjust."
        )
    shared = word == b"refcount" and kind == "int" and 0 <= int(found[0]) < 10000  # Redis has one object for each of these numbers
    return integer(0 if word == b"idletime" else (1 << 31) - 1 if shared else 1)


@command("memory", -2, 0, (2, 2, 1), group="server")
@container
def memory(client: Connection, arguments: list[bytes]) -> bytes:
    word = arguments[0].lower()
    if word == b"usage" and len(arguments) in (2, 4):
        if len(arguments) == 4 and (arguments[2].lower() != b"samples" or integer_of(arguments[3]) < 0):
            raise Error(SYNTAX)
        found = client.ex.read(arguments[1])
        return nil(client.protocol) if found is None else integer(48 + len(arguments[1]) + len(found[0]) + 10)
    if word == b"doctor" and len(arguments) == 1:
        return replies.verbatim("Nothing to say: look at shmcache-admin stats.", client.protocol)
    if word == b"purge" and len(arguments) == 1:
        return OK
    raise Error(SYNTAX)


RDB_VERSION = 10


@command("dump", 2, 0, ONE)
def dump(client: Connection, arguments: list[bytes]) -> bytes:
    found = client.ex.read(arguments[0])
    if found is None:
        return nil(client.protocol)
    value = found[0]
    n = _resp.number(value) if len(value) <= 11 else None
    if n is not None and -(1 << 31) <= n < 1 << 31:
        width = 1 if -128 <= n < 128 else 2 if -(1 << 15) <= n < 1 << 15 else 4
        body = bytes([0xC0 | (width >> 1)]) + n.to_bytes(width, "little", signed=True)
    else:
        body = rdb_length(len(value)) + value
    payload = b"\0" + body + RDB_VERSION.to_bytes(2, "little")
    return bulk(payload + _resp.crc64(payload).to_bytes(8, "little"))


def rdb_length(n: int) -> bytes:
    if n < 1 << 6:
        return bytes([n])
    if n < 1 << 14:
        return bytes([0x40 | n >> 8, n & 0xFF])
    return b"\x80" + n.to_bytes(4, "big") if n < 1 << 32 else b"\x81" + n.to_bytes(8, "big")


BAD_PAYLOAD = "ERR DUMP payload version or checksum are wrong"
BAD_FORMAT = "ERR Bad data format"


def undumped(payload: bytes, most: int = 1 << 29) -> bytes:
    if len(payload) < 10 or int.from_bytes(payload[-10:-8], "little") > RDB_VERSION:
        raise Error(BAD_PAYLOAD)
    if _resp.crc64(payload[:-8]) != int.from_bytes(payload[-8:], "little"):
        raise Error(BAD_PAYLOAD)
    body = payload  # as Redis reads it: what follows the value is not looked at
    try:
        if body[0] != 0:  # not a string
            raise Error(BAD_FORMAT)
        kind = body[1] >> 6
        if kind == 3:
            how = body[1] & 0x3F
            if how < 3:
                width = 1 << how
                if len(body) < 2 + width:
                    raise Error(BAD_FORMAT)
                return b"%d" % int.from_bytes(body[2 : 2 + width], "little", signed=True)
            if how != 3:
                raise Error(BAD_FORMAT)
            packed, at = length_at(body, 2)
            size, at = length_at(body, at)
            if size > most:
                raise Error(BAD_FORMAT)
            return unpack_lzf(body[at : at + packed], size)
        size, at = length_at(body, 1)
        if len(body) < at + size:
            raise Error(BAD_FORMAT)
        return body[at : at + size]
    except IndexError:
        raise Error(BAD_FORMAT) from None


def length_at(body: bytes, at: int) -> tuple[int, int]:
    kind, low = body[at] >> 6, body[at] & 0x3F
    if kind == 0:
        return low, at + 1
    if kind == 1:
        return low << 8 | body[at + 1], at + 2
    width = 4 if body[at] == 0x80 else 8
    return int.from_bytes(body[at + 1 : at + 1 + width], "big"), at + 1 + width


def unpack_lzf(packed: bytes, size: int) -> bytes:
    """LibLZF's format: a literal run of up to 32 bytes, or a distance back and a length."""
    out, i = bytearray(), 0
    if size > 1 << 32:
        raise Error(BAD_FORMAT)
    while i < len(packed) and len(out) <= size:
        control = packed[i]
        i += 1
        if control < 32:
            out += packed[i : i + control + 1]
            i += control + 1
            continue
        n = control >> 5
        if n == 7:
            n += packed[i]
            i += 1
        start = len(out) - ((control & 0x1F) << 8 | packed[i]) - 1
        i += 1
        if start < 0:
            raise Error(BAD_FORMAT)
        for k in range(n + 2):
            out.append(out[start + k])
    if len(out) != size:
        raise Error(BAD_FORMAT)
    return bytes(out)


@command("restore", -4, WRITE, ONE)
def restore(client: Connection, arguments: list[bytes]) -> bytes:
    key, ttl_text, payload = arguments[:3]
    replace = absolute = False
    hint = b""
    rest = arguments[3:]
    while rest:
        word = rest.pop(0).lower()
        if word == b"replace":
            replace = True
        elif word == b"absttl":
            absolute = True
        elif word == b"idletime" and rest and hint != b"freq":
            hint = word
            if integer_of(rest.pop(0)) < 0:
                raise Error("ERR Invalid IDLETIME value, must be >= 0")
        elif word == b"freq" and rest and hint != b"idletime":
            hint = word
            if not 0 <= integer_of(rest.pop(0)) <= 255:
                raise Error("ERR Invalid FREQ value, must be >= 0 and <= 255")
        else:
            raise Error(SYNTAX)
    if not replace and client.ex.version(key):
        raise Error("BUSYKEY Target key name already exists.")
    ttl = integer_of(ttl_text)
    if ttl < 0:
        raise Error("ERR Invalid TTL value, must be >= 0")
    if len(payload) > 4096:
        in_pool(client)
    value = undumped(payload, int(client.server.settings["proto-max-bulk-len"]))
    expires_ms = (ttl if absolute else client.ex.now() + ttl) if ttl else 0
    if not client.ex.write(key, value, expires_ms, absent=not replace):
        raise Error("BUSYKEY Target key name already exists.")
    return OK


# ---- publish and subscribe ------------------------------------------------------------------------------------------------------


def subscription(client: Connection, kind: str, channel: bytes | None) -> bytes:
    name = nil(client.protocol) if channel is None else bulk(channel)
    return replies.push((bulk(kind), name, integer(len(client.channels) + len(client.patterns))), client.protocol)


def add_subscription(client: Connection, kind: str, names: list[bytes], pattern: bool) -> None:
    mine, everybody = of_kind(client, pattern)
    for name in names:
        if name not in mine:
            mine[name] = None
            everybody.setdefault(name, {})[client] = None
            client.server.link.subscribed(name, len(everybody[name]), pattern)
        client.in_pubsub = True
        client.add(subscription(client, kind, name))


def end_subscription(client: Connection, kind: str, names: list[bytes], pattern: bool) -> None:
    mine, _ = of_kind(client, pattern)
    names = names or list(mine)
    for name in names:
        remove_subscription(client, name, pattern)
        client.in_pubsub = bool(client.channels or client.patterns)
        client.add(subscription(client, kind, name))
    if not names:
        client.add(subscription(client, kind, None))


def remove_subscription(client: Connection, name: bytes, pattern: bool) -> None:
    mine, everybody = of_kind(client, pattern)
    if name in mine:
        del mine[name]
        del everybody[name][client]
        client.server.link.subscribed(name, len(everybody[name]), pattern)
        if not everybody[name]:
            del everybody[name]


def of_kind(client: Connection, pattern: bool) -> tuple[dict[bytes, None], dict[bytes, dict[Connection, None]]]:
    """(this client's, all clients') channels, or patterns."""
    server = client.server
    return (client.patterns, server.pattern_subscribers) if pattern else (client.channels, server.subscribers)


@command("subscribe", -2, IN_PUBSUB, group="pubsub")
def subscribe(client: Connection, arguments: list[bytes]) -> None:
    add_subscription(client, "subscribe", arguments, False)


@command("psubscribe", -2, IN_PUBSUB, group="pubsub")
def psubscribe(client: Connection, arguments: list[bytes]) -> None:
    add_subscription(client, "psubscribe", arguments, True)


@command("unsubscribe", -1, IN_PUBSUB, group="pubsub")
def unsubscribe(client: Connection, arguments: list[bytes]) -> None:
    end_subscription(client, "unsubscribe", arguments, False)


@command("punsubscribe", -1, IN_PUBSUB, group="pubsub")
def punsubscribe(client: Connection, arguments: list[bytes]) -> None:
    end_subscription(client, "punsubscribe", arguments, True)


def deliver(server: Server, channel: bytes, message: bytes, but: Connection | None = None) -> int:
    """To the subscribers of this process: how many. What `but` gets leaves with its own reply."""
    n = 0
    for to in list(server.subscribers.get(channel, ())):
        send(to, replies.push((bulk(b"message"), bulk(channel), bulk(message)), to.protocol), but)
        n += 1
    for pattern, clients in list(server.pattern_subscribers.items()):
        if matches(pattern, channel):
            for to in list(clients):
                send(to, replies.push((bulk(b"pmessage"), bulk(pattern), bulk(channel), bulk(message)), to.protocol), but)
                n += 1
    return n


def send(to: Connection, data: bytes, but: Connection | None) -> None:
    """Who does not read what is pushed to him is dropped."""
    to.push(data)
    if to is not but:
        to.flush()
    if to.unsent() > PUSH_LIMIT:
        to.drop()


@command("publish", 3, group="pubsub")
def publish(client: Connection, arguments: list[bytes]) -> bytes:
    channel, message = arguments
    link, n = client.server.link, deliver(client.server, channel, message, client)
    elsewhere = [
        count
        for channels, patterns in link.elsewhere.values()
        for count in (channels.get(channel, 0), *(count for pattern, count in patterns.items() if matches(pattern, channel)))
    ]
    if any(elsewhere):
        link.say("publish", channel, message)
    return integer(n + sum(elsewhere))


def all_channels(server: Server) -> dict[bytes, int]:
    """Subscribers of each, in all processes."""
    found = {name: len(clients) for name, clients in server.subscribers.items()}
    for channels, _ in server.link.elsewhere.values():
        for name, n in channels.items():
            found[name] = found.get(name, 0) + n
    return found


@command("pubsub", -2, group="pubsub")
@container
def pubsub(client: Connection, arguments: list[bytes]) -> bytes:
    word, rest, server = arguments[0].lower(), arguments[1:], client.server
    if word == b"channels" and len(rest) <= 1:
        return array(bulk(c) for c in all_channels(server) if not rest or matches(rest[0], c))
    if word == b"numsub":
        numbers = all_channels(server)
        return array(part for c in rest for part in (bulk(c), integer(numbers.get(c, 0))))
    if word == b"numpat" and not rest:
        return integer(len({*server.pattern_subscribers, *(p for _, patterns in server.link.elsewhere.values() for p in patterns)}))
    if word == b"shardchannels" and len(rest) <= 1:
        return replies.EMPTY
    if word == b"shardnumsub":
        return array(part for c in rest for part in (bulk(c), integer(0)))
    raise Error(SYNTAX)


def forget(client: Connection) -> None:
    """The connection is gone, or begins anew."""
    server = client.server
    for pattern in (False, True):
        for name in list(of_kind(client, pattern)[0]):
            remove_subscription(client, name, pattern)
    client.in_pubsub = False
    client.watching = {}
    client.retried_by_pause = None
    server.monitors.pop(client, None)
    client.monitoring = False
    server.executor.watched = bool(server.monitors)


@command("monitor", 1, group="server")
def monitor(client: Connection, arguments: list[bytes]) -> bytes:
    client.server.monitors[client] = None
    client.monitoring = True
    client.server.executor.watched = True
    return OK


def tell_monitors(client: Connection, arguments: list[bytes]) -> None:
    words = " ".join('"' + "".join(escape(c) for c in word) + '"' for word in arguments)
    line = f"{time.time():.6f} [0 {client.address}] {words}"
    for to in list(client.server.monitors):
        send(to, replies.simple(line), client)


def escape(c: int) -> str:
    special = {34: '\\"', 92: "\\\\", 10: "\\n", 13: "\\r", 9: "\\t", 7: "\\a", 8: "\\b"}
    return special.get(c) or (chr(c) if 32 <= c < 127 else f"\\x{c:02x}")


# ---- the server -----------------------------------------------------------------------------------------------------------------


@command("config", -2, group="server")
@container
def config(client: Connection, arguments: list[bytes]) -> bytes:
    word, rest, server = arguments[0].lower(), arguments[1:], client.server
    if word == b"get" and rest:
        found = {name: value for name, value in sorted(server.settings.items()) if any(matches(p.lower(), name.encode()) for p in rest)}
        return map_(((bulk(name), bulk(value)) for name, value in found.items()), client.protocol)
    if word == b"set" and rest and len(rest) % 2 == 0:
        changes = {}
        for name_b, value_b in zip(rest[::2], rest[1::2], strict=True):
            name, value = name_b.decode("latin-1").lower(), value_b.decode("latin-1")
            if name not in server.settings:
                raise Error(f"ERR Unknown option or number of arguments for CONFIG SET - '{name}'")
            if name in changes:
                raise Error(f"ERR CONFIG SET failed (possibly related to argument '{name}') - duplicate parameter")
            if name not in CHANGEABLE:
                raise Error(f"ERR CONFIG SET failed (possibly related to argument '{name}') - can't set immutable config")
            limits = CHANGEABLE[name]
            if limits is not None:
                n = _resp.number(value_b)
                if n is None or not limits[0] <= n <= limits[1]:
                    raise Error(
                        f"ERR CONFIG SET failed (possibly related to argument '{name}') - argument must be between {limits[0]} and "
                        f"{limits[1]} inclusive"
                    )
            changes[name] = value
        server.configure(changes)
        server.link.say("config", {name: value.encode("latin-1") for name, value in changes.items()})
        return OK
    if word == b"resetstat" and not rest:
        server.reset_stats()
        return OK
    if word == b"rewrite" and not rest:
        raise Error("ERR The server is running without a config file")
    raise Error(SYNTAX)


def info_of(name: str) -> bytes:
    c = TABLE[name]
    flags = ["write" if c.flags & WRITE else "readonly", *(["no_auth"] if c.flags & NO_AUTH else [])]
    categories = [f"@{'write' if c.flags & WRITE else 'read'}", f"@{c.group}"]
    return array(
        (
            bulk(name), integer(c.arity), replies.set_(map(replies.simple, flags), 2), *(integer(n) for n in c.keys),
            replies.set_(map(replies.simple, categories), 2), replies.EMPTY, replies.EMPTY, replies.EMPTY,
        )
    )  # fmt: skip


@command("command", -1, group="server")
@container
def command_(client: Connection, arguments: list[bytes]) -> bytes:
    word, rest = (arguments[0].lower(), arguments[1:]) if arguments else (b"info", [])
    names = list(TABLE)
    if word == b"count" and not rest:
        return integer(len(names))
    if word == b"info":
        wanted = [w.decode("latin-1").lower() for w in rest] if rest else names
        return array(info_of(name) if name in TABLE else nil_array(client.protocol) for name in wanted)
    if word == b"list":
        if rest and not (len(rest) == 3 and rest[0].lower() == b"filterby"):
            raise Error(SYNTAX)
        if rest and rest[1].lower() == b"pattern":
            names = [name for name in names if matches(rest[2].lower(), name.encode())]
        elif rest and rest[1].lower() == b"aclcat":
            group = rest[2].decode("latin-1").lower()
            names = [n for n in names if group in (TABLE[n].group, "write" if TABLE[n].flags & WRITE else "read")]
        elif rest and rest[1].lower() == b"module":
            names = []
        elif rest:
            raise Error(SYNTAX)
        return array(map(bulk, names))
    if word == b"docs":
        wanted = [n for w in rest if (n := w.decode("latin-1").lower()) in TABLE] if rest else names
        return replies.of({n: {"summary": f"As in Redis {REDIS_VERSION}", "group": TABLE[n].group} for n in wanted}, client.protocol)
    if word in (b"getkeys", b"getkeysandflags") and rest:
        name = rest[0].decode("latin-1").lower()
        if name not in TABLE:
            raise Error("ERR Invalid command specified")
        arity = TABLE[name].arity
        if (arity > 0 and len(rest) != arity) or len(rest) < -arity:
            raise Error("ERR Invalid number of arguments specified for command")
        found = keys_in(name, rest[1:])
        if not found:
            raise Error("ERR The command has no key arguments")
        if word == b"getkeys":
            return array(map(bulk, found))
        access = "RW" if TABLE[name].flags & WRITE else "RO"
        return array(array((bulk(key), replies.set_([replies.simple(access)], client.protocol))) for key in found)
    raise Error(SYNTAX)


@command("time", 1, group="server")
def time_(client: Connection, arguments: list[bytes]) -> bytes:
    us = time.time_ns() // 1000
    return array((bulk(str(us // 1_000_000)), bulk(str(us % 1_000_000))))


@command("lastsave", 1, group="server")
def lastsave(client: Connection, arguments: list[bytes]) -> bytes:
    saved = int(client.server.cache.segment.header["snapshot_ms"]) // 1000
    return integer(saved or int(client.server.began))


def snapshot(client: Connection, wait: bool) -> None:
    """Have the supervisor write one."""
    from shmcache.core import _sweep

    cache = client.server.cache
    if not cache.supervisor()["alive"]:
        raise Error("ERR no supervisor runs that could write a snapshot")
    if wait:
        in_pool(client)
    number = _sweep.ask_for_snapshot(cache)
    deadline = time.monotonic() + 600
    while wait and int(cache.segment.header["snapshots_ended"]) < number:
        if time.monotonic() > deadline or not cache.supervisor()["alive"]:
            raise Error("ERR the snapshot was not written: look at the supervisor's output")
        time.sleep(0.02)
    if wait and int(cache.segment.header["snapshot_failed_ms"]):
        raise Error("ERR the snapshot was not written: look at the supervisor's output, and whether it has a data directory")


@command("save", 1, group="server")
def save(client: Connection, arguments: list[bytes]) -> bytes:
    snapshot(client, True)
    return OK


@command("bgsave", -1, group="server")
def bgsave(client: Connection, arguments: list[bytes]) -> bytes:
    if len(arguments) > 1 or (arguments and arguments[0].lower() != b"schedule"):
        raise Error(SYNTAX)
    snapshot(client, False)
    return replies.simple("Background saving started")


@command("bgrewriteaof", 1, group="server")
def bgrewriteaof(client: Connection, arguments: list[bytes]) -> bytes:
    snapshot(client, False)
    return replies.simple("Background append only file rewriting started")


@command("shutdown", -1, group="server")
def shutdown(client: Connection, arguments: list[bytes]) -> None:
    words = [a.lower() for a in arguments]
    if any(w not in (b"nosave", b"save", b"now", b"force", b"abort") for w in words) or (b"save" in words and b"nosave" in words):
        raise Error(SYNTAX)
    if b"abort" in words:
        raise Error("ERR No shutdown in progress.")
    client.closing = True
    client.server.on_shutdown()


@command("function", -2, group="scripting")
@container
def function(client: Connection, arguments: list[bytes]) -> bytes:
    if arguments[0].lower() == b"flush" and len(arguments) <= 2:
        return OK
    raise Error(SYNTAX)


@command("wait", 3)
def wait(client: Connection, arguments: list[bytes]) -> bytes:
    integer_of(arguments[0])
    if integer_of(arguments[1], "ERR timeout is not an integer or out of range") < 0:
        raise Error("ERR timeout is negative")
    return integer(0)  # replicas: there are none


@command("role", 1, group="server")
def role(client: Connection, arguments: list[bytes]) -> bytes:
    return array((bulk("master"), integer(0), replies.EMPTY))


@command("slowlog", -2, group="server")
@container
def slowlog(client: Connection, arguments: list[bytes]) -> bytes:
    word, server = arguments[0].lower(), client.server
    if word == b"get" and len(arguments) <= 2:
        n = integer_of(arguments[1]) if len(arguments) == 2 else 10
        if n < -1:
            raise Error("ERR count should be greater than or equal to -1")
        entries = list(server.slowlog)[: n if n >= 0 else None]
        return array(
            array((integer(number), integer(int(when)), integer(us), array(map(bulk, words)), bulk(address), bulk(name)))
            for number, when, us, words, address, name in entries
        )
    if word == b"len" and len(arguments) == 1:
        return integer(len(server.slowlog))
    if word == b"reset" and len(arguments) == 1:
        server.slowlog.clear()
        return OK
    raise Error(SYNTAX)


@command("latency", -2, group="server")
@container
def latency(client: Connection, arguments: list[bytes]) -> bytes:
    word = arguments[0].lower()
    if word == b"latest" and len(arguments) == 1:
        return replies.EMPTY
    if word == b"history" and len(arguments) == 2:
        return replies.EMPTY
    if word == b"reset":
        return integer(0)
    if word == b"doctor" and len(arguments) == 1:
        worst = client.server.worst_lag * 1000
        return replies.verbatim(f"The event loop's latest tick came {worst:.1f} ms late at worst.", client.protocol)
    raise Error(SYNTAX)


@command("debug", -2, group="server")
def debug(client: Connection, arguments: list[bytes]) -> bytes:
    if client.server.settings["enable-debug-command"] != "yes":
        raise Error("ERR DEBUG command not allowed: start the server with --enable-debug-command")
    word, rest = arguments[0].lower(), arguments[1:]
    if word == b"sleep" and len(rest) == 1:
        in_pool(client)
        time.sleep(float(rest[0]))
        return OK
    if word == b"object" and len(rest) == 1:
        found = client.ex.read(rest[0])
        if found is None:
            raise Error("ERR no such key")
        return replies.simple(
            f"Value at:0x0 refcount:1 encoding:{encoding(found[0], found[3])} serializedlength:{len(found[0])} lru:0 lru_seconds_idle:0"
        )
    if word == b"protocol" and len(rest) == 1:
        return protocol_sample(client, rest[0].lower())
    if word in (b"jmap", b"set-active-expire", b"reload", b"loadaof", b"change-repl-id", b"replybuffer", b"stringmatch-len", b"pause-cron"):
        return OK
    raise unknown_subcommand("debug", arguments[0])


def protocol_sample(client: Connection, kind: bytes) -> bytes:
    three = client.protocol == 3
    samples = {
        b"string": bulk("Hello World"),
        b"integer": integer(12345),
        b"double": b",3.141\r\n" if three else bulk("3.141"),
        b"null": nil(client.protocol),
        b"array": array(map(integer, range(3))),
        b"set": replies.set_(map(integer, range(3)), client.protocol),
        b"map": map_(((integer(i), (b"#t\r\n" if i == 1 else b"#f\r\n") if three else integer(i == 1)) for i in range(3)), client.protocol),
        b"true": b"#t\r\n" if three else integer(1),
        b"false": b"#f\r\n" if three else integer(0),
        b"bignum": b"(1234567999999999999999999999999999999\r\n" if three else bulk("1234567999999999999999999999999999999"),
        b"verbatim": replies.verbatim("This is a verbatim\nstring", client.protocol),
    }
    if kind not in samples:
        raise Error(
            "ERR Wrong protocol type name. Please use one of the following: string|integer|double|null|array|set|map|attrib|push|verbatim|"
            "true|false"
        )
    return samples[kind]


@command("info", -1, group="server")
def info(client: Connection, arguments: list[bytes]) -> bytes:
    wanted = [a.decode("latin-1").lower() for a in arguments] or ["default"]
    return replies.verbatim("\r\n".join(info_sections(client.server, wanted)), client.protocol)


def human(n: float) -> str:
    for unit_name in ("B", "K", "M", "G"):
        if n < 1024:
            return f"{n:.2f}{unit_name}"
        n /= 1024
    return f"{n:.2f}T"


def info_sections(server: Server, wanted: list[str]) -> Iterator[str]:
    cache, ex, now = server.cache, server.executor, time.time()
    counters = cache.counters()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    size = int(cache.segment.header["size_bytes"])
    durability = cache.durability()
    used = size - int(cache.segment.header["pages_n_free"]) * (1 << int(cache.segment.header["page_shift"]))
    rss = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()  # noqa: SIM115
    keys_n = len(cache)
    sections: dict[str, dict[str, Any]] = {
        "server": {
            "redis_version": REDIS_VERSION,
            "shmcache_version": shmcache.__version__,
            "redis_git_sha1": "00000000",
            "redis_git_dirty": 0,
            "redis_mode": "standalone",
            "os": f"{platform.system()} {platform.release()} {platform.machine()}",
            "arch_bits": 64,
            "multiplexing_api": "epoll",
            "process_id": os.getpid(),
            "run_id": f"{int(cache.segment.header['created_ms']):040x}",
            "tcp_port": server.settings["port"],
            "server_time_usec": int(now * 1e6),
            "uptime_in_seconds": int(now - server.began),
            "uptime_in_days": int(now - server.began) // 86400,
            "hz": 10,
            "configured_hz": 10,
            "executable": sys.executable,
            "config_file": "",
            "segment": server.name,
            "worker": server.worker,
            "workers": server.of_workers,
        },
        "clients": {
            "connected_clients": len(server.clients),
            "maxclients": server.settings["maxclients"],
            "blocked_clients": server.in_pool,
            "pubsub_clients": sum(c.in_pubsub for c in server.clients.values()),
            "clients_waiting_for_the_disk": len(server.waiting),
        },
        "memory": {
            "used_memory": used,
            "used_memory_human": human(used),
            "used_memory_rss": rss,
            "used_memory_rss_human": human(rss),
            "used_memory_peak": used,
            "used_memory_peak_human": human(used),
            "total_system_memory": os.sysconf("SC_PHYS_PAGES") * resource.getpagesize(),
            "maxmemory": size,
            "maxmemory_human": human(size),
            "maxmemory_policy": server.settings["maxmemory-policy"],
            "mem_fragmentation_ratio": 1.0,
            "mem_allocator": "shmcache",
            "mem_clients_normal": sum(c.memory for c in server.clients.values()),
        },
        "persistence": {
            "loading": int(bool(durability["restoring"])),
            "rdb_bgsave_in_progress": 0,
            "rdb_last_save_time": int(cache.segment.header["snapshot_ms"]) // 1000,
            "rdb_last_bgsave_status": "err" if int(cache.segment.header["snapshot_failed_ms"]) else "ok",
            "rdb_changes_since_last_save": counters["sets"],
            "aof_enabled": int(durability["log"] not in (None, "off")),
            "aof_last_write_status": "err" if durability["log_failed"] else "ok",
            "log_policy": durability["log"],
            "log_gaps": durability["log_gaps"],
        },
        "stats": {
            "total_connections_received": server.accepted,
            "total_commands_processed": ex.commands,
            "instantaneous_ops_per_sec": server.rate(),
            "total_net_input_bytes": ex.bytes_in,
            "total_net_output_bytes": ex.bytes_out,
            "rejected_connections": server.refused,
            "expired_keys": counters["expirations"],
            "evicted_keys": counters["evictions"],
            "keyspace_hits": counters["hits"],
            "keyspace_misses": counters["misses"],
            "pubsub_channels": len(server.subscribers),
            "pubsub_patterns": len(server.pattern_subscribers),
            "total_error_replies": 0,
            "event_loop_lag_ms": round(server.lag * 1000, 3),
            "event_loop_worst_lag_ms": round(server.worst_lag * 1000, 3),
        },
        "replication": {
            "role": "master",
            "connected_slaves": 0,
            "master_failover_state": "no-failover",
            "master_repl_offset": 0,
            "repl_backlog_active": 0,
        },
        "cpu": {
            "used_cpu_sys": f"{usage.ru_stime:.6f}",
            "used_cpu_user": f"{usage.ru_utime:.6f}",
            "used_cpu_sys_children": "0.000000",
            "used_cpu_user_children": "0.000000",
        },
        "modules": {},
        "errorstats": {},
        "cluster": {"cluster_enabled": 0},
        "keyspace": {"db0": f"keys={keys_n},expires=0,avg_ttl=0"} if keys_n else {},
        "commandstats": {
            f"cmdstat_{name}": f"calls={n},usec=0,usec_per_call=0.00,rejected_calls=0,failed_calls=0"
            for (name, _), n in zip(ex.names, ex.calls, strict=True)
            if n
        },
    }
    default = [s for s in sections if s != "commandstats"]
    chosen = []
    for name in wanted:
        chosen += default if name == "default" else list(sections) if name in ("all", "everything") else [name] if name in sections else []
    for name in dict.fromkeys(chosen):
        title = "CPU" if name == "cpu" else name.capitalize()
        yield "\r\n".join([f"# {title}", *(f"{k}:{v}" for k, v in sections[name].items()), ""])
