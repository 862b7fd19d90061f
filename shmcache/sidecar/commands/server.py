"""Commands about the server: CONFIG, COMMAND, snapshots, SLOWLOG, DEBUG."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from shmcache.core import _core, _text
from shmcache.core._text import matches
from shmcache.sidecar import acl, replies
from shmcache.sidecar.commands.everywhere import everywhere, heard, part
from shmcache.sidecar.commands.keys import encoding
from shmcache.sidecar.commands.table import (
    CHANGEABLE,
    NO_AUTH,
    REDIS_VERSION,
    SCRIPTS,
    SYNTAX,
    TABLE,
    WRITE,
    Error,
    categories_of,
    checked_pattern,
    command,
    container,
    family,
    fits,
    in_pool,
    integer_of,
    keys_in,
    unknown_subcommand,
)
from shmcache.sidecar.replies import OK, array, bulk, integer, map_, nil, nil_array

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection, Server


@command("config", -2, group="server")
@container
def config(client: Connection, arguments: list[bytes]) -> bytes | None:
    word, rest, server = arguments[0].lower(), arguments[1:], client.server
    if word == b"get" and rest:
        patterns = [checked_pattern(pattern).lower() for pattern in rest]
        found = {name: value for name, value in sorted(server.settings.items()) if any(matches(p, name.encode()) for p in patterns)}
        return map_(((bulk(name), bulk(value)) for name, value in found.items()), client.protocol)
    if word == b"set" and rest and len(rest) % 2 == 0:
        changes: dict[str, str] = {}
        for name_b, value_b in zip(rest[::2], rest[1::2], strict=True):
            name = name_b.decode("latin-1").lower()
            if name not in server.settings:
                raise Error(f"ERR Unknown option or number of arguments for CONFIG SET - '{name}'")
            if name not in CHANGEABLE and name != "maxmemory":
                raise Error(f"ERR CONFIG SET failed (possibly related to argument '{name}') - can't set immutable config")
            if name in changes:
                raise Error(f"ERR CONFIG SET failed (possibly related to argument '{name}') - duplicate parameter")
            changes[name] = value_b.decode("latin-1")
        for name, value in changes.items():
            if name == "maxmemory":     # Redis can set it: it is looked at with the values
                raise Error(
                    f"ERR CONFIG SET failed (possibly related to argument '{name}') - can't set immutable config: the segment has "
                    f"{server.settings[name]} bytes, for as long as it lives"
                )
            limits = CHANGEABLE[name]
            if limits is not None:
                n = _text.number(value.encode("latin-1"))
                if n is None or not limits[0] <= n <= limits[1]:
                    raise Error(
                        f"ERR CONFIG SET failed (possibly related to argument '{name}') - argument must be between {limits[0]} and "
                        f"{limits[1]} inclusive"
                    )
        server.change_settings(changes)
        if "requirepass" in changes:
            password = changes["requirepass"].encode("latin-1")
            user = server.users[acl.DEFAULT].changed([b"resetpass", b">" + password if password else b"nopass"])
            server.change_users({acl.DEFAULT: user}, client.id)
        return everywhere(client, heard, [], lambda _: OK)
    if word == b"resetstat" and not rest:
        return everywhere(client, reset_stats, [], lambda _: OK)
    if word == b"rewrite" and not rest:
        raise Error("ERR The server is running without a config file")
    raise Error(SYNTAX)


@part
def reset_stats(server: Server) -> None:
    server.reset_stats()


def info_of(name: str, protocol: int) -> bytes:
    c = TABLE[name]
    flags = ["write" if c.flags & WRITE else "readonly", *(["no_auth"] if c.flags & NO_AUTH else [])]
    # by these two clients that look for keys go: ask GETKEYS; channels are in the place of keys
    flags += (["movablekeys"] if name in SCRIPTS else []) + (["pubsub"] if c.group == "pubsub" and name != "pubsub" else [])
    groups = ["@" + category for category in categories_of(name)]
    return array(
        (
            bulk(name), integer(c.arity), replies.set_(map(replies.simple, flags), protocol), *(integer(n) for n in c.keys),
            replies.set_(map(replies.simple, groups), protocol), replies.EMPTY, replies.EMPTY, replies.EMPTY,
        )
    )  # fmt: skip


@command("command", -1, group="server")
@container
def command_(client: Connection, arguments: list[bytes]) -> bytes:
    word, rest = (arguments[0].lower(), arguments[1:]) if arguments else (b"info", [])
    enabled, disabled = client.server.commands, client.server.disabled
    names = list(enabled)
    if word == b"count" and not rest:
        return integer(len(names))
    if word == b"info":
        asked = [w.decode("latin-1").lower() for w in rest] if rest else names
        return array(info_of(name, client.protocol) if name in enabled else nil_array(client.protocol) for name in asked)
    if word == b"list":
        if rest and not (len(rest) == 3 and rest[0].lower() == b"filterby"):
            raise Error(SYNTAX)
        names = [full for name in names for full in family(name) if full not in disabled]
        if rest and rest[1].lower() == b"pattern":
            pattern = checked_pattern(rest[2]).lower()
            names = [name for name in names if matches(pattern, name.encode())]
        elif rest and rest[1].lower() == b"aclcat":
            wanted = rest[2].decode("latin-1").lower()
            names = [name for name in names if wanted in categories_of(name)]
        elif rest and rest[1].lower() == b"module":
            names = []
        elif rest:
            raise Error(SYNTAX)
        return array(map(bulk, names))
    if word == b"docs":
        asked = [n for w in rest if (n := w.decode("latin-1").lower()) in enabled] if rest else names
        return replies.of({n: {"summary": f"As in Redis {REDIS_VERSION}", "group": TABLE[n].group} for n in asked}, client.protocol)
    if word in (b"getkeys", b"getkeysandflags") and rest:
        name = rest[0].decode("latin-1").lower()
        if name not in enabled:
            raise Error("ERR Invalid command specified")
        if not fits(TABLE[name].arity, len(rest)):
            raise Error("ERR Invalid number of arguments specified for command")
        found = keys_in(name, rest[1:])
        if not found and name not in SCRIPTS:
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
    deadline = _core.monotonic() + 600
    while wait and int(cache.segment.header["snapshots_ended"]) < number:
        if _core.monotonic() > deadline or not cache.supervisor()["alive"]:
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
def slowlog(client: Connection, arguments: list[bytes]) -> bytes | None:
    word, most = arguments[0].lower(), int(client.server.settings["slowlog-max-len"])
    if word == b"get" and len(arguments) <= 2:
        n = integer_of(arguments[1]) if len(arguments) == 2 else 10
        if n < -1:
            raise Error("ERR count should be greater than or equal to -1")
        return everywhere(client, slow_commands, [], lambda found: slow_entries(newest(found, most)[: n if n >= 0 else None]))
    if word == b"len" and len(arguments) == 1:
        return everywhere(client, slow_commands, [], lambda found: integer(len(newest(found, most))))
    if word == b"reset" and len(arguments) == 1:
        return everywhere(client, forget_slow_commands, [], lambda _: OK)
    raise Error(SYNTAX)


@part
def slow_commands(server: Server) -> list[Any]:
    return list(server.slowlog)


@part
def forget_slow_commands(server: Server) -> None:
    server.slowlog.clear()


def newest(found: list[Any], most: int) -> list[Any]:
    """So many of what slow_commands found."""
    return sorted((entry for entries in found for entry in entries), key=lambda entry: entry[1], reverse=True)[:most]


def slow_entries(entries: list[Any]) -> bytes:
    return array(
        array((integer(number), integer(int(when)), integer(us), array(map(bulk, words)), bulk(address), bulk(name)))
        for number, when, us, words, address, name in entries
    )


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
def debug(client: Connection, arguments: list[bytes]) -> bytes | None:
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
    if word == b"set-disable-deny-scripts" and len(rest) == 1:
        client.server.scripts.all_allowed = rest[0] != b"0"
        return OK
    if word == b"error" and len(rest) == 1:  # for tests of clients
        raise Error(rest[0].decode("utf-8", "surrogateescape"))
    if word == b"protocol" and len(rest) == 1:
        return protocol_sample(client, rest[0].lower())
    if word == b"set-active-expire" and len(rest) == 1:
        return everywhere(client, set_active_expire, [rest[0] != b"0"], lambda _: OK)
    if word in (b"jmap", b"reload", b"loadaof", b"change-repl-id", b"replybuffer", b"stringmatch-len", b"pause-cron"):
        return OK
    raise unknown_subcommand("debug", arguments[0])


@part
def set_active_expire(server: Server, on: bool) -> None:
    """As a pause for the supervisor, without end."""
    server.link.say_paused(int(server.executor.paused_until) if on else 1 << 62)


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
        b"attrib": (b"|1\r\n" + bulk("key-popularity") + array((bulk("key:123"), integer(90))) if three else b"")
        + bulk("Some real reply following the attribute"),
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
