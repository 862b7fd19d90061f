"""Publish and subscribe, and MONITOR."""

from __future__ import annotations

import time
from collections.abc import Container
from typing import TYPE_CHECKING

from shmcache.core._text import matches, quoted
from shmcache.sidecar import replies
from shmcache.sidecar.commands.table import (
    IN_PUBSUB,
    MOST_PATTERN,
    PUSH_LIMIT,
    PUSHES,
    SHORT_PATTERN,
    SYNTAX,
    Error,
    categories,
    checked_pattern,
    command,
    container,
    full_name,
    that_match,
    without_passwords,
)
from shmcache.sidecar.replies import OK, array, bulk, integer, nil

if TYPE_CHECKING:
    from shmcache.sidecar.acl import User
    from shmcache.sidecar.server import Connection, Server


def subscription(client: Connection, kind: str, channel: bytes | None) -> bytes:
    name = nil(client.protocol) if channel is None else bulk(channel)
    return replies.push((bulk(kind), name, integer(len(client.channels) + len(client.patterns))), client.protocol)


def add_subscription(client: Connection, kind: str, names: list[bytes], pattern: bool) -> None:
    mine, everybody = of_kind(client, pattern)
    counts: dict[bytes, int] = {}
    said = []
    for name in names:
        if name not in mine:
            mine[name] = None
            everybody.setdefault(name, {})[client] = None
            counts[name] = len(everybody[name])
        client.in_pubsub = True
        said.append(subscription(client, kind, name))
    tell(client, counts, pattern)
    client.add(b"".join(said))


def end_subscription(client: Connection, kind: str, names: list[bytes], pattern: bool) -> None:
    mine, _ = of_kind(client, pattern)
    counts: dict[bytes, int] = {}
    said = []
    names = names or list(mine)
    for name in names:
        counts |= remove_subscription(client, name, pattern)
        client.in_pubsub = bool(client.channels or client.patterns)
        said.append(subscription(client, kind, name))
    tell(client, counts, pattern)
    client.add(b"".join(said or [subscription(client, kind, None)]))


def remove_subscription(client: Connection, name: bytes, pattern: bool) -> dict[bytes, int]:
    """{name: how many there are then}, if this client had it."""
    mine, everybody = of_kind(client, pattern)
    if name not in mine:
        return {}
    del mine[name]
    del everybody[name][client]
    n = len(everybody[name])
    if not n:
        del everybody[name]
    return {name: n}


def tell(client: Connection, counts: dict[bytes, int], pattern: bool) -> None:
    """The other event loops; the client's replies wait until it is sure that these know (bus.py)."""
    server = client.server
    if counts and not server.alone:
        server.link.subscribed(counts, pattern, None if client.closing else server.keep_replies(client))


def of_kind(client: Connection, pattern: bool) -> tuple[dict[bytes, None], dict[bytes, dict[Connection, None]]]:
    """(this client's, all clients') channels, or patterns."""
    server = client.server
    return (client.patterns, server.pattern_subscribers) if pattern else (client.channels, server.subscribers)


def check_channel(channel: bytes) -> None:
    """Raises: Error: its name is too long to be matched with patterns."""
    if len(channel) > MOST_PATTERN:
        raise Error(f"ERR the name of a channel has at most {MOST_PATTERN} bytes")


@command("subscribe", -2, IN_PUBSUB | PUSHES, group="pubsub")
def subscribe(client: Connection, arguments: list[bytes]) -> None:
    for channel in arguments:
        check_channel(channel)
    add_subscription(client, "subscribe", arguments, False)


@command("psubscribe", -2, IN_PUBSUB | PUSHES, group="pubsub")
def psubscribe(client: Connection, arguments: list[bytes]) -> None:
    for pattern in arguments:
        checked_pattern(pattern)
    add_subscription(client, "psubscribe", arguments, True)


@command("unsubscribe", -1, IN_PUBSUB | PUSHES, group="pubsub")
def unsubscribe(client: Connection, arguments: list[bytes]) -> None:
    end_subscription(client, "unsubscribe", arguments, False)


@command("punsubscribe", -1, IN_PUBSUB | PUSHES, group="pubsub")
def punsubscribe(client: Connection, arguments: list[bytes]) -> None:
    end_subscription(client, "punsubscribe", arguments, True)


def deliver(server: Server, channel: bytes, message: bytes, patterns: Container[bytes], but: Connection | None = None) -> int:
    """To the subscribers of this process: how many. patterns: those that match the channel. What `but` gets leaves with its own reply."""
    n = 0
    for to in list(server.subscribers.get(channel, ())):
        send(to, replies.push((bulk(b"message"), bulk(channel), bulk(message)), to.protocol), but)
        n += 1
    for pattern, clients in list(server.pattern_subscribers.items()):
        if pattern in patterns:
            for to in list(clients):
                send(to, replies.push((bulk(b"pmessage"), bulk(pattern), bulk(channel), bulk(message)), to.protocol), but)
                n += 1
    return n


def send(to: Connection, data: bytes, but: Connection | None) -> None:
    """Who does not read what is pushed to him is dropped."""
    to.push(data)
    if to.in_pool:
        to.n_pushed += len(data)
    if to is not but:
        to.flush()
    if to.unsent() > PUSH_LIMIT:
        to.drop()


@command("publish", 3, group="pubsub")
def publish(client: Connection, arguments: list[bytes]) -> bytes:
    channel, message = arguments
    check_channel(channel)
    catch_up(client)
    link, found = client.server.link, patterns_of(client, channel)
    n = deliver(client.server, channel, message, found, client)
    elsewhere = [
        count
        for channels, patterns in link.elsewhere.values()
        for count in (channels.get(channel, 0), *(count for pattern, count in patterns.items() if pattern in found))
    ]
    if any(elsewhere):
        link.say("publish", channel, message)
    return integer(n + sum(elsewhere))


def patterns_of(client: Connection, channel: bytes) -> set[bytes]:
    """Those of all processes that match it. Raises: what check_time() does: nobody has been sent anything yet."""
    found = set()
    for pattern in all_patterns(client.server):
        if len(pattern) > SHORT_PATTERN:
            client.check_time()
        if matches(pattern, channel):
            found.add(pattern)
    return found


def catch_up(client: Connection) -> None:
    """Before this client's command counts subscribers. A transaction has done it before it took its stripes."""
    if not client.ex.holds:
        client.server.link.catch_up()


def all_channels(server: Server) -> dict[bytes, int]:
    """Subscribers of each, in all processes."""
    found = {name: len(clients) for name, clients in server.subscribers.items()}
    for channels, _ in server.link.elsewhere.values():
        for name, n in channels.items():
            found[name] = found.get(name, 0) + n
    return found


def all_patterns(server: Server) -> set[bytes]:
    return {*server.pattern_subscribers, *(p for _, patterns in server.link.elsewhere.values() for p in patterns)}


@command("pubsub", -2, group="pubsub")
@container
def pubsub(client: Connection, arguments: list[bytes]) -> bytes:
    word, rest, server = arguments[0].lower(), arguments[1:], client.server
    catch_up(client)
    if word == b"channels" and len(rest) <= 1:
        channels = all_channels(server)
        return array(map(bulk, that_match(client, rest[0], channels) if rest else channels))
    if word == b"numsub":
        numbers = all_channels(server)
        return array(part for c in rest for part in (bulk(c), integer(numbers.get(c, 0))))
    if word == b"numpat" and not rest:
        return integer(len(all_patterns(server)))
    if word == b"shardchannels" and len(rest) <= 1:
        return replies.EMPTY
    if word == b"shardnumsub":
        return array(part for c in rest for part in (bulk(c), integer(0)))
    raise Error(SYNTAX)


def may_stay(client: Connection, user: User) -> bool:
    """May this user hear what the client has subscribed to?"""
    return all(user.may_hear(name, pattern) for pattern in (False, True) for name in of_kind(client, pattern)[0])


def forget(client: Connection) -> None:
    """The connection is gone, or begins anew."""
    server = client.server
    for pattern in (False, True):
        counts: dict[bytes, int] = {}
        for name in list(of_kind(client, pattern)[0]):
            counts |= remove_subscription(client, name, pattern)
        tell(client, counts, pattern)
    client.in_pubsub = False
    client.watching = {}
    client.retried_by_pause = None
    if client.monitoring:
        client.monitoring = False
        del server.monitors[client]
        server.monitors_changed()


@command("monitor", 1, group="server")
def monitor(client: Connection, arguments: list[bytes]) -> bytes:
    server = client.server
    server.monitors[client] = None
    client.monitoring = True
    server.monitors_changed()
    if server.link.others:  # OK is said when each of them shows its commands: behind it what they have shown before
        let_go = server.keep_replies(client)
        server.link.ask("heard", [], lambda _: let_go())
    return OK


def tell_monitors(client: Connection, arguments: list[bytes], who: str = "") -> None:
    """Of any command but those of administrators. who: if it is not the client itself."""
    if full_name(arguments[0].decode("latin-1").lower(), arguments[1:]) in categories()["admin"]:
        return
    words = " ".join(map(quoted, without_passwords(arguments)))
    line = f"{time.time():.6f} [{client.db} {who or client.address}] {words}"
    show(client.server, [line], client)
    client.server.link.seen(line)


def show(server: Server, lines: list[str], but: Connection | None = None) -> None:
    """To the monitors of this process."""
    for to in list(server.monitors):
        send(to, b"".join(map(replies.simple, lines)), but)
