"""Commands about the connection: SELECT, AUTH, HELLO, RESET, QUIT, CLIENT."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shmcache.core import _core, _text
from shmcache.sidecar import acl, replies
from shmcache.sidecar.commands.everywhere import everywhere, part
from shmcache.sidecar.commands.pubsub import forget, tell_monitors
from shmcache.sidecar.commands.table import (
    FREE,
    IN_MULTI,
    IN_PUBSUB,
    NO_AUTH,
    REDIS_VERSION,
    SYNTAX,
    Error,
    command,
    container,
    integer_of,
    shown,
)
from shmcache.sidecar.commands.transactions import discard_transaction, is_refused
from shmcache.sidecar.replies import OK, bulk, integer, nil

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection, Server


OUT_OF_RANGE = "ERR DB index is out of range"
OUT_OF_RANGE_BACKED = (
    "ERR DB index is out of range: the store behind this cache has one database. Others are the cache's alone: what is written there is "
    "not stored, and may be evicted. Start the server with --databases N if that will do"
)


@command("select", 2, 0, group="connection")
def select(client: Connection, arguments: list[bytes]) -> bytes:
    n = integer_of(arguments[0])
    if not 0 <= n < client.home.databases:
        raise Error(OUT_OF_RANGE_BACKED if client.server.store is not None and client.home.databases == 1 else OUT_OF_RANGE)
    client.db = n
    return OK


def authenticate(client: Connection, name: bytes, password: bytes, said_by: bytes) -> None:
    user = client.server.users.get(name)
    if user is None or not user.accepts(password):
        client.server.denied(client, "auth", "multi" if client.in_multi else "toplevel", said_by, name)
        raise Error("WRONGPASS invalid username-password pair or user is disabled.")
    client.authenticated = True
    become(client, user)


def become(client: Connection, user: acl.User) -> None:
    client.user, client.restricted = user.name, user.restricted


@command("auth", -2, NO_AUTH | FREE, group="connection")
def auth(client: Connection, arguments: list[bytes]) -> bytes:
    if len(arguments) > 2:
        raise Error(SYNTAX)
    if len(arguments) == 1 and client.server.users[acl.DEFAULT].nopass:
        raise Error(
            "ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?"
        )
    name, password = (acl.DEFAULT, arguments[0]) if len(arguments) == 1 else arguments
    authenticate(client, name, password, b"AUTH")
    return OK


@command("hello", -1, NO_AUTH, group="connection")
def hello(client: Connection, arguments: list[bytes]) -> bytes:
    protocol, name = client.protocol, None
    rest = deque(arguments)
    if rest:
        n = _text.number(rest.popleft())
        if n is None:
            raise Error("ERR Protocol version is not an integer or out of range")
        if n not in (2, 3):
            raise Error("NOPROTO unsupported protocol version")
        protocol = n
    while rest:
        said = rest.popleft()
        word = said.lower()
        if word == b"auth" and len(rest) >= 2:
            authenticate(client, rest.popleft(), rest.popleft(), b"HELLO")
        elif word == b"setname" and rest:
            name = checked_name(rest.popleft())
        else:
            raise Error("ERR Syntax error in HELLO option '" + shown(said) + "'")
    if not client.authenticated:
        raise Error(
            "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO AUTH <user> <pass> option can be used "
            "to authenticate the client and select the RESP protocol version at the same time"
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
    if client.home.watched:
        tell_monitors(client, [b"reset"])  # now: it is none itself any more
    discard_transaction(client)
    client.name, client.protocol = b"", 2
    client.silent, client.skip, client.no_evict, client.db = False, 0, False, 0
    client.authenticated = not client.home.locked
    become(client, client.server.users[acl.DEFAULT])
    return replies.simple("RESET")


@command("quit", -1, NO_AUTH | IN_MULTI | IN_PUBSUB | FREE, group="connection")
def quit_(client: Connection, arguments: list[bytes]) -> bytes:
    forget(client)
    client.closing = True
    return OK


def info_line(client: Connection, asked_by: int = 0, word: bytes = b"") -> str:
    """asked_by: id of the client that runs CLIENT and this word."""
    now = time.time()
    flags = ("O" if client.monitoring else "") + ("P" if client.in_pubsub else "") + ("x" if client.in_multi else "")
    flags += ("U" if client.address.startswith("/") else "") + ("b" if client.blocked else "") + ("e" if client.no_evict else "")
    waiting, unsent = client.buffered
    command_name = client.home.names[client.last_command][0] if client.last_command >= 0 else "NULL"
    user = client.user.decode("latin-1")
    if client.id == asked_by:
        waiting, command_name = client.reading, f"client|{word.decode()}"
    return (
        f"id={client.id} addr={client.address} laddr={client.local_address} fd={client.fd} name={client.name.decode('latin-1')} "
        f"age={int(now - client.began)} idle={client.idle_ms // 1000} flags={flags or 'N'} db={client.db} sub={len(client.channels)} "
        f"psub={len(client.patterns)} ssub=0 multi={len(client.queue) if client.in_multi else -1} qbuf={waiting} qbuf-free=0 argv-mem=0 "
        f"multi-mem=0 rbs=0 rbp=0 obl={unsent} oll=0 omem=0 tot-mem={client.memory} events=r cmd={command_name} user={user} "
        f"redir=-1 resp={client.protocol}"
    )


@command("client", -2, FREE, group="connection")
@container
def client_(client: Connection, arguments: list[bytes]) -> bytes | None:
    word, rest = arguments[0].lower(), arguments[1:]
    if word == b"id" and not rest:
        return integer(client.id)
    if word == b"info" and not rest:
        return replies.verbatim(info_line(client, client.id, word) + "\n", client.protocol)
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
        return everywhere(client, client_lines, [client.id, rest], lambda found: replies.verbatim(listing(found), client.protocol))
    if word == b"kill" and rest:
        return everywhere(client, kill_clients, [client.id, rest], lambda numbers: killed(rest, sum(numbers)))
    if word == b"no-evict" and len(rest) == 1 and rest[0].lower() in (b"on", b"off"):
        client.no_evict = rest[0].lower() == b"on"
        return OK
    if word == b"reply" and len(rest) == 1 and rest[0].lower() in (b"on", b"off", b"skip"):
        how = rest[0].lower()
        client.silent = how == b"off"
        client.skip = 0
        if how == b"skip" and not client.silent:
            client.skip = 2  # this one, which replies nothing, and the next
        return OK if how == b"on" else None
    if word == b"pause" and len(rest) in (1, 2):
        ms = _text.number(rest[0])
        if ms is None or not 0 <= ms < 1 << 50:
            raise Error("ERR timeout is negative" if ms is not None and ms < 0 else "ERR timeout is not an integer or out of range")
        if len(rest) == 2 and rest[1].lower() not in (b"write", b"all"):
            raise Error("ERR CLIENT PAUSE mode must be WRITE or ALL")
        until_ms, writes_only = int(_core.monotonic() * 1000) + ms, len(rest) == 2 and rest[1].lower() == b"write"
        return everywhere(client, pause, [until_ms, writes_only], lambda _: OK)
    if word == b"unpause" and not rest:
        return everywhere(client, unpause, [], lambda _: OK)
    raise Error(SYNTAX)


@part
def client_lines(server: Server, asked_by: int, rest: list[bytes]) -> list[tuple[int, str]]:
    return [(c.id, info_line(c, asked_by, b"list") + "\n") for c in listed(server, rest)]


def listing(found: list[Any]) -> str:
    """What client_lines found, by id."""
    return "".join(line for _, line in sorted((pair for pairs in found for pair in pairs), key=lambda pair: int(pair[0])))


def listed(server: Server, rest: list[bytes]) -> Iterator[Connection]:
    clients = list(server.clients.values())
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


def killed(rest: list[bytes], n: int) -> bytes:
    """The reply of CLIENT KILL."""
    if len(rest) > 1:
        return integer(n)
    if n == 0:
        raise Error("ERR No such client")
    return OK


@part
def kill_clients(server: Server, asked_by: int, rest: list[bytes]) -> int:
    """How many."""
    clients = list(server.clients.values())
    if len(rest) == 1:
        return end(asked_by, [c for c in clients if c.address.encode() == rest[0]])
    if len(rest) % 2:
        raise Error(SYNTAX)
    skip_me = True
    for word, value in zip(rest[::2], rest[1::2], strict=True):
        word = word.lower()
        if word == b"id":
            number = _text.number(value)
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
            if value not in server.users:
                raise Error(f"ERR No such user '{shown(value)}'")
            clients = [c for c in clients if c.user == value]
        elif word == b"skipme" and value.lower() in (b"yes", b"no"):
            skip_me = value.lower() == b"yes"
        else:
            raise Error(SYNTAX)
    return end(asked_by, [c for c in clients if c.id != asked_by or not skip_me])


def end(asked_by: int, clients: list[Connection]) -> int:
    """Close them: how many. asked_by: id of the client whose command does it."""
    for c in clients:
        if c.id == asked_by:
            c.closing = True  # after the reply
        else:
            c.drop()
    return len(clients)


@part
def pause(server: Server, until_ms: int, writes_only: bool) -> None:
    server.executor.paused_until, server.executor.paused_writes_only = until_ms, writes_only
    server.link.say_paused(until_ms)


@part
def unpause(server: Server) -> None:
    server.executor.paused_until = 0
    server.link.say_paused(0)
    for client in list(server.clients.values()):
        if client.retried_by_pause is not None:
            server.loop.call_soon(go_on, server, client)


def go_on(server: Server, client: Connection) -> None:
    """Run what a pause has kept, if its user may still. For itself: not within another client's command."""
    arguments, client.retried_by_pause = client.retried_by_pause, None
    if arguments is None or client.closing:
        return
    client.blocked = False
    if not is_refused(client, arguments):
        client.redo(arguments)
    if not client.blocked:
        server.go_on(client)
