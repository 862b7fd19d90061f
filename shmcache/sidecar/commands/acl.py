"""ACL: users, and what each may do."""

from __future__ import annotations

import secrets
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from shmcache import errors
from shmcache.sidecar import acl, replies
from shmcache.sidecar.commands.everywhere import everywhere, heard, part
from shmcache.sidecar.commands.table import Error, arity_of, categories, command, container, fits, full_name, in_pool, integer_of, shown
from shmcache.sidecar.replies import OK, array, bulk, integer, map_, nil

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection, Server

MOST_BITS = 4096  # of GENPASS


@command("acl", -2, group="server")
@container
def acl_(client: Connection, arguments: list[bytes]) -> bytes | None:
    word, rest, server = arguments[0].lower(), arguments[1:], client.server
    if word == b"whoami":
        return bulk(client.user)
    if word == b"users":
        return array(map(bulk, sorted(server.users)))
    if word == b"list":
        return array(bulk(user.line) for _, user in sorted(server.users.items()))
    if word == b"getuser":
        return described(server.users.get(rest[0]), client.protocol)
    if word == b"setuser":
        return set_user(client, rest[0], rest[1:])
    if word == b"deluser":
        if acl.DEFAULT in rest:
            raise Error("ERR The 'default' user cannot be removed")
        gone: dict[bytes, acl.User | None] = {name: None for name in rest if name in server.users}
        server.change_users(gone, client.id)
        return everywhere(client, heard, [], lambda _: integer(len(gone)))
    if word == b"cat" and len(rest) <= 1:
        return of_category(rest)
    if word == b"genpass" and len(rest) <= 1:
        bits = integer_of(rest[0]) if rest else 256
        if not 0 < bits <= MOST_BITS:
            raise Error(f"ERR ACL GENPASS argument must be the number of bits for the output password, a positive number up to {MOST_BITS}")
        n = (bits + 3) // 4
        return bulk(secrets.token_hex((n + 1) // 2)[:n])
    if word in (b"load", b"save"):
        return load(client) if word == b"load" else save(client)
    if word == b"log" and len(rest) <= 1:
        return log(client, rest)
    if word == b"dryrun":
        return dry_run(server, rest[0], rest[1:])
    raise Error(f"ERR unknown subcommand or wrong number of arguments for '{shown(arguments[0][:128])}'. Try ACL HELP.")


def described(user: acl.User | None, protocol: int) -> bytes:
    if user is None:
        return nil(protocol)
    return map_(
        (
            (bulk("flags"), replies.set_(map(bulk, user.flags), protocol)),
            (bulk("passwords"), array(map(bulk, user.passwords))),
            (bulk("commands"), bulk(b" ".join(user.command_rules))),
            (bulk("keys"), bulk(b" ".join(user.key_rules))),
            (bulk("channels"), bulk(b" ".join(user.channel_rules))),
            (bulk("selectors"), replies.EMPTY),
        ),
        protocol,
    )


def set_user(client: Connection, name: bytes, rules: list[bytes]) -> bytes | None:
    if acl.has_spaces(name):
        raise Error("ERR Usernames can't contain spaces or null characters")
    try:
        user = client.server.users.get(name, acl.User(name)).changed(rules)
    except acl.BadRule as e:
        raise Error(f"ERR {e}") from None
    client.server.change_users({name: user}, client.id)
    return everywhere(client, heard, [], lambda _: OK)


def of_category(rest: list[bytes]) -> bytes:
    if not rest:
        return array(map(bulk, categories()))
    found = categories().get(rest[0].decode("latin-1").lower())
    if found is None:
        raise Error(f"ERR Unknown category '{shown(rest[0][:128])}'")
    return array(map(bulk, sorted(found)))


def file_of(server: Server) -> str:
    path = server.settings["aclfile"]
    if not path:
        raise Error(
            "ERR This Redis instance is not configured to use an ACL file. You may want to specify users via the ACL SETUSER command and "
            "then issue a CONFIG REWRITE (assuming you have a Redis configuration file set) in order to store users in the Redis "
            "configuration."
        )
    return path


def load(client: Connection) -> bytes | None:
    """As in Redis connections of all users but `default` are closed."""
    server = client.server
    path = file_of(server)
    try:
        users = acl.read_file(path, server.settings["requirepass"].encode("latin-1"))
    except OSError as e:
        raise Error(f"ERR Error loading ACLs, opening file '{path}': {e.strerror}") from None
    except errors.UsageError as e:
        raise Error(f"ERR {e} WARNING: ACL errors detected, no change to the previously active ACL rules was performed") from None
    server.change_users({name: None for name in server.users if name != acl.DEFAULT}, client.id)
    server.change_users(dict(users), client.id)
    return everywhere(client, heard, [], lambda _: OK)


def save(client: Connection) -> bytes:
    path = file_of(client.server)
    in_pool(client)
    try:
        acl.write_file(path, [user for _, user in sorted(client.server.users.items())])
    except OSError as e:
        raise Error(f"ERR There was an error trying to save the ACLs: {e.strerror}") from None
    return OK


def log(client: Connection, rest: list[bytes]) -> bytes | None:
    if rest and rest[0].lower() == b"reset":
        return everywhere(client, forget_refusals, [], lambda _: OK)
    count = max(0, integer_of(rest[0])) if rest else 10

    def shown_all(found: list[Any]) -> bytes:
        refusals = sorted((acl.Refusal(*each) for some in found for each in some), key=lambda refusal: -refusal.when)
        return array(refusal.shown(client.protocol) for refusal in refusals[:count])

    return everywhere(client, last_refusals, [count], shown_all)


@part
def last_refusals(server: Server, count: int) -> list[Any]:
    return [astuple(refusal) for refusal in server.acl_log[:count]]


@part
def forget_refusals(server: Server) -> None:
    server.acl_log.clear()


def dry_run(server: Server, name: bytes, words: list[bytes]) -> bytes:
    user = server.users.get(name)
    if user is None:
        raise Error(f"ERR User '{shown(name)}' not found")
    command_name, arguments = words[0].decode("latin-1").lower(), words[1:]
    full = full_name(command_name, arguments)
    arity = arity_of(full)
    if arity is None or command_name not in server.commands or full in server.disabled:
        raise Error(f"ERR Command '{shown(words[0])}' not found")
    if not fits(arity, len(words)):
        raise Error(f"ERR wrong number of arguments for '{full}' command")
    found = user.denied(command_name, arguments)
    if found is None:
        return OK
    kind, what = found
    if kind == "command":
        return bulk(b"This user has no permissions to run the '%b' command" % what)
    return bulk(b"This user has no permissions to access the '%b' %b" % (what.split(b"\0", 1)[0], kind.encode()))
