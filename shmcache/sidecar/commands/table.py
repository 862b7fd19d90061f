"""The table of all commands, and what every one of them may need.

A command is a function (client, arguments) -> reply, or None if it has replied itself. It raises Error for an error reply, and WouldWait
for what has to be run in a thread of the pool: it is called again there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shmcache.core import _core, _resp, _text
from shmcache.core._text import matches
from shmcache.sidecar import replies
from shmcache.sidecar.replies import array

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection

    Run = Callable[[Connection, list[bytes]], bytes | None]

REDIS_VERSION = "7.0.15"  # whose semantics these are

SETTINGS: dict[str, str] = {  # CONFIG's, and what they are if nobody says otherwise
    "daemonize": "no", "aclfile": "", "acllog-max-len": "128",
    "appendonly": "no", "bind": "127.0.0.1", "databases": "16", "hash-max-listpack-entries": "128", "lfu-log-factor": "10",
    "maxclients": "10000", "maxmemory": "0", "maxmemory-policy": "allkeys-lru", "port": "6379", "proto-max-bulk-len": "536870912",
    "protected-mode": "yes", "requirepass": "", "save": "", "slowlog-log-slower-than": "10000", "slowlog-max-len": "128",
    "tcp-keepalive": "300", "timeout": "0", "unixsocket": "", "latency-monitor-threshold": "0", "enable-debug-command": "no",
    "lua-time-limit": "500", "scripts-undeclared": "yes",
}  # fmt: skip
CHANGEABLE = {
    "acllog-max-len": (0, 1 << 20), "maxclients": (1, 1 << 20), "slowlog-log-slower-than": (-1, 1 << 62),
    "slowlog-max-len": (0, 1 << 20), "timeout": (0, 1 << 31),
    "latency-monitor-threshold": (0, 1 << 62), "requirepass": None, "save": None, "appendonly": None, "maxmemory-policy": None,
    "protected-mode": None, "lua-time-limit": (1, 60_000),
}  # fmt: skip

WRITE, NO_AUTH, IN_MULTI, IN_PUBSUB, FREE, PUSHES, KEYLESS = (
    _resp.FLAGS[f] for f in ("write", "no_auth", "in_multi", "in_pubsub", "free", "pushes", "keyless")
)


class Error(_resp.CommandError):
    """Error("ERR syntax error")"""

    def __init__(self, text: str) -> None:
        super().__init__(text.encode("utf-8", "surrogateescape"))


PUSH_LIMIT = 32 << 20  # bytes that wait for a subscriber
RAW = 256  # _resp's, with a codec
SCAN_NS = 1_000_000  # that a SCAN may take in the loop
SCAN_TIME = 0.02  # seconds that a SCAN goes on in the pool, if it has not found enough
MOST_PATTERN = 4096  # bytes, as of a key, and of a channel: a match takes at most the product of both in steps, some 10 ms
SHORT_PATTERN = 64  # with which it is some 0.1 ms
SYNTAX = "ERR syntax error"
NOT_AN_INTEGER = "ERR value is not an integer or out of range"


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
    ("msetnx", -3, WRITE, (1, -1, 2), "string"),
    ("rename renamenx", 3, WRITE, (1, 2, 1), "generic"), ("copy", -3, WRITE, (1, 2, 1), "generic"),
    ("expire pexpire expireat pexpireat", -3, WRITE, ONE, "generic"), ("ping", -1, IN_PUBSUB, (0, 0, 0), "connection"),
    ("echo", 2, 0, (0, 0, 0), "connection"),
):  # fmt: skip
    for _name in _names.split():
        TABLE[_name] = Command(_arity, _flags, None, _keys, _group)


def table(disabled: Container[str] = ()) -> dict[str, tuple[int, int, Run | None]]:
    """As the executor takes it, without those that are disabled."""
    return {
        name: (c.arity, c.flags | (KEYLESS if c.group in ("connection", "pubsub") else 0), c.run)
        for name, c in TABLE.items()
        if name not in disabled
    }


def integer_of(text: bytes, error: str = NOT_AN_INTEGER) -> int:
    n = _text.number(text)
    if n is None:
        raise Error(error)
    return n


def checked_pattern(pattern: bytes) -> bytes:
    """Raises: Error: it is too long."""
    if len(pattern) > MOST_PATTERN:
        raise Error(f"ERR a pattern has at most {MOST_PATTERN} bytes")
    return pattern


def that_match(client: Connection, pattern: bytes, names: Iterable[bytes]) -> Iterator[bytes]:
    """Raises: what check_time() does; Error: the pattern is too long."""
    checked_pattern(pattern)
    for name in names:
        if len(pattern) > SHORT_PATTERN:
            client.check_time()
        if matches(pattern, name):
            yield name


def in_pool(client: Connection) -> None:
    """What takes long is run in a thread of the pool."""
    if client.ex.impatient:
        raise _core.WouldWait


def in_pool_if_long(client: Connection, keys: Iterable[bytes], most: int) -> None:
    """What goes through these keys' values, if they have more than so many bytes."""
    if client.ex.impatient and sum(client.ex.length(key) or 0 for key in keys) > most:
        in_pool(client)


SCRIPTS = {"eval", "evalsha", "eval_ro", "evalsha_ro"}
LONG = {"keys", "lcs", "randomkey", "save", "flushall", "flushdb", "script", *SCRIPTS}  # they may be run in the pool
OF_LOOP = {"connection", "pubsub", "transactions"}  # groups, and these: they act on connections, which are the loop's
OF_LOOP_ALONE = {"acl", "monitor", "config", "slowlog", "info", "shutdown", "latency", "debug"}
NOT_IN_MULTI = {"save", "bgsave", "bgrewriteaof", "shutdown", "debug", "monitor", "lease.get", "lease.fill", "lease.release"}
NOT_IN_MULTI_BACKED = {"flushall", "flushdb"}  # in front of a store: they wait for it
NOT_IN_MULTI_THROUGH = {"select", "eval", "evalsha"}  # that is written through, or around
OF_CACHE = {"flushall", "flushdb", "lease.fill", "lease.release"}  # they write, but nothing that a store gets
CLAIM = "lease.get"  # nor does it; but it is told what the store has
OURS = frozenset({"lease.get", "lease.fill", "lease.release"})  # Redis has none of them


def is_of_loop(name: str) -> bool:
    """Does this command act on connections? Those that are compiled do not."""
    return TABLE[name].run is not None and (TABLE[name].group in OF_LOOP or name in OF_LOOP_ALONE)


def keys_in(name: str, arguments: list[bytes]) -> list[bytes]:
    """The keys among a command's arguments (without its name)."""
    c = TABLE.get(name)
    if c is None:
        return []
    if name in SCRIPTS:
        n = _text.number(arguments[1]) or 0
        return arguments[2 : 2 + n] if n > 0 else []
    first, last, step = c.keys
    if first == 0:
        return []
    last = last if last > 0 else len(arguments) + 1 + last
    return arguments[first - 1 : max(last, 0) : step]


def target(arguments: list[bytes], db: int) -> int:
    """The database that COPY writes."""
    for word, following in itertools.pairwise(arguments[2:]):
        if word.lower() == b"db" and (n := _text.number(following)) is not None:
            db = n
    return db


def pairs_in(name: str, arguments: list[bytes], db: int, databases: int) -> list[tuple[int, bytes]]:
    """keys_in(), with their databases."""
    keys = [(db, key) for key in keys_in(name, arguments)]
    if name == "copy" and 0 <= (to := target(arguments, db)) < databases:
        keys[1] = to, keys[1][1]
    return keys


def written_in(name: str, keys: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Of pairs_in() of a command that writes: those that it may write. Others it reads."""
    return keys[:1] if name == "bitop" else keys[1:] if name == "copy" else keys


def shown(word: bytes) -> str:
    """In an error: up to its first zero byte, as C prints a string."""
    return word.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def unknown_subcommand(command: str, word: bytes) -> Error:
    return Error(f"ERR unknown subcommand '{shown(word[:128])}'. Try {command.upper()} HELP.")


SUBCOMMANDS: dict[str, dict[str, int]] = {  # of a container: arity with both names, as Redis counts
    "acl": {
        "cat": -2, "deluser": -3, "dryrun": -4, "genpass": -2, "getuser": 3, "help": 2, "list": 2, "load": 2, "log": -2, "save": 2,
        "setuser": -3, "users": 2, "whoami": 2,
    },
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
    "script": {"exists": -3, "flush": -2, "help": 2, "kill": 2, "load": 3},
    "pubsub": {"channels": -2, "help": 2, "numpat": 2, "numsub": -2, "shardchannels": -2, "shardnumsub": -2},
    "slowlog": {"get": -2, "help": 2, "len": 2, "reset": 2},
}  # fmt: skip


def full_name(name: str, arguments: list[bytes]) -> str:
    """A command's name; with its subcommand, as in config|get, if it is a container."""
    return f"{name}|{arguments[0].decode('latin-1').lower()}" if name in SUBCOMMANDS and arguments else name


def family(name: str) -> tuple[str, ...]:
    """A command and its subcommands, by full names."""
    return (name, *(f"{name}|{word}" for word in SUBCOMMANDS.get(name, ())))


_EXPIRY = "expire expireat expiretime persist pexpire pexpireat pexpiretime pttl ttl"
_STRINGS_READ = "get getrange lcs mget strlen substr"
_CATEGORIES = {  # as Redis has them, in its order; name|*: all its subcommands
    "keyspace": "copy dbsize del dump exists flushall flushdb keys lease.fill lease.get lease.release object|* randomkey rename renamenx "
    "restore scan touch type unlink "
    + _EXPIRY,
    "read": "bitcount bitfield_ro bitpos dbsize dump exists expiretime getbit keys memory|usage object|encoding object|freq "
    "object|idletime object|refcount pexpiretime pttl randomkey scan touch ttl type " + _STRINGS_READ,
    "write": "function|flush",  # and all that are flagged so
    "set": "", "sortedset": "", "list": "", "hash": "",
    "string": "append decr decrby getdel getex getset incr incrby incrbyfloat mset msetnx psetex set setex setnx setrange " + _STRINGS_READ,
    "bitmap": "bitcount bitfield bitfield_ro bitop bitpos getbit setbit",
    "hyperloglog": "", "geo": "", "stream": "",
    "pubsub": "psubscribe publish pubsub|channels pubsub|numpat pubsub|numsub pubsub|shardchannels pubsub|shardnumsub punsubscribe "
    "subscribe unsubscribe",
    "admin": "acl|deluser acl|dryrun acl|getuser acl|list acl|load acl|log acl|save acl|setuser acl|users bgrewriteaof bgsave client|kill "
    "client|list client|no-evict client|pause client|unpause config|get config|resetstat config|rewrite config|set debug lastsave "
    "latency|doctor latency|history latency|latest latency|reset monitor role save shutdown slowlog|get slowlog|len slowlog|reset",
    "fast": "append auth bitfield_ro dbsize decr decrby discard echo exists get getbit getdel getex getset hello incr incrby incrbyfloat "
    "lastsave mget multi ping publish quit renamenx reset role select setnx strlen time touch type unlink unwatch watch " + _EXPIRY,
    "slow": "",  # all that are not fast
    "blocking": "",
    "dangerous": "flushall flushdb info keys restore",  # and all of admin
    "connection": "auth client|* command command|* echo hello ping quit reset select wait",
    "transaction": "discard exec multi unwatch watch",
    "scripting": "eval eval_ro evalsha evalsha_ro fcall fcall_ro function|* script|*",
}  # fmt: skip


@functools.cache
def categories() -> dict[str, frozenset[str]]:
    """The commands and subcommands of each category, by full names."""
    everything = {full for name in TABLE for full in family(name)}
    found = {}
    for category, text in _CATEGORIES.items():
        words = text.split()
        named = {full for word in words for full in (family(word[:-2])[1:] if word.endswith("|*") else (word,))}
        found[category] = named & everything
    found["write"] |= {name for name, c in TABLE.items() if c.flags & WRITE and name not in SCRIPTS}
    found["slow"] = everything - found["fast"]
    found["dangerous"] |= found["admin"]
    return {category: frozenset(names) for category, names in found.items()}


def categories_of(full: str) -> list[str]:
    return [category for category, names in categories().items() if full in names]


def arity_of(full: str) -> int | None:
    """Of a command or subcommand; None: there is none."""
    name, _, word = full.partition("|")
    if word:
        return SUBCOMMANDS.get(name, {}).get(word)
    return TABLE[name].arity if name in TABLE else None


def check_subcommand(client: Connection, name: str, arguments: list[bytes]) -> None:
    """Raises: Error, if a container has no such subcommand, or it does not take so many arguments."""
    if name not in SUBCOMMANDS or (name == "command" and not arguments):
        return
    full = full_name(name, arguments)
    arity = SUBCOMMANDS[name].get(full.partition("|")[2])
    if arity is None or full in client.server.disabled:
        raise unknown_subcommand(name, arguments[0])
    if not fits(arity, len(arguments) + 1):
        raise Error(f"ERR wrong number of arguments for '{full}' command")


def fits(arity: int, n: int) -> bool:
    """So many words, with the name."""
    return n == arity if arity > 0 else n >= -arity


def without_passwords(words: list[bytes]) -> list[bytes]:
    """A command as MONITOR and SLOWLOG show it."""
    name, hidden = words[0].lower(), set[int]()
    if name == b"auth":
        hidden = set(range(1, len(words)))
    elif name == b"hello":
        at = 2
        while at < len(words):
            word = words[at].lower()
            if word == b"setname":
                at += 2
            elif word == b"auth":
                hidden |= {at + 1, at + 2}
                at += 3
            else:  # nobody knows what it is
                hidden |= set(range(at, len(words)))
                break
    elif name == b"config" and words[1:] and words[1].lower() == b"set":
        hidden = {i + 1 for i, word in enumerate(words) if word.lower() == b"requirepass"}
    elif name == b"acl" and words[1:] and words[1].lower() == b"setuser":
        hidden = set(range(2, len(words)))
    return [b"(redacted)" if i in hidden else word for i, word in enumerate(words)]


def container(run: Run) -> Run:
    """A command whose first argument names what it does."""

    @functools.wraps(run)
    def checked(client: Connection, arguments: list[bytes]) -> bytes | None:
        name = run.__name__.rstrip("_")
        check_subcommand(client, name, arguments)
        if arguments and arguments[0].lower() == b"help":
            words = ", ".join(word.upper() for word in SUBCOMMANDS[name] if f"{name}|{word}" not in client.server.disabled)
            return array(map(replies.simple, (f"{name.upper()} <subcommand> [<arg> ...]. As in Redis {REDIS_VERSION}:", words)))
        return run(client, arguments)

    return checked
