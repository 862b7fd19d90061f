"""EVAL, EVALSHA, SCRIPT: Lua, in threads of the pool, each with a state of its own (Runtime). What a script sees is in lua/sandbox.lua.

While a script runs the stripes of its KEYS are held, as EXEC holds those of what is queued: it is one step for all who write. What it
touches besides is in undeclared.py: a script that finds such a key busy may begin again. It ends `lua-time-limit` after the stripes were
taken. Time that it waits for others' stripes is not counted, but twice the limit is its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import struct
import weakref
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING, Any

from shmcache import errors
from shmcache.core import _core, _resp
from shmcache.notices import notice
from shmcache.sidecar import undeclared
from shmcache.sidecar.commands.pubsub import tell_monitors
from shmcache.sidecar.commands.table import (
    NOT_IN_MULTI_BACKED,
    SYNTAX,
    TABLE,
    WRITE,
    Error,
    check_subcommand,
    command,
    container,
    in_pool,
    integer_of,
    pairs_in,
)
from shmcache.sidecar.commands.transactions import denial
from shmcache.sidecar.replies import OK, array, bulk, integer

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection

MOST_MEMORY = 64 << 20  # bytes of a state
ROOM = 64 << 10  # of it, for what crosses the border besides the replies of commands
MOST_KEPT = 16 << 20  # bytes of a state that is used again
MOST_SCRIPTS = 1000  # known by their SHA, and
MOST_SOURCE = 1 << 20  # bytes of all of them; of one that is run
LOG_NOTICE = 2  # what is said at this level and above is printed
MOST_SAID = 1024  # characters of it: a line that a pipe takes at once (PIPE_BUF), for stripes are held
MOST_NAMED = 3  # parameters of a function with ... : Lua 5.1 does not look whether its stack has room for them
NOT_IN_SCRIPTS = {
    "acl", "auth", "bgrewriteaof", "bgsave", "client", "config", "debug", "discard", "eval", "eval_ro", "evalsha", "evalsha_ro", "exec",
    "function", "hello", "latency", "lease.fill", "lease.get", "lease.release", "monitor", "multi", "psubscribe",
    "punsubscribe", "quit", "reset", "role", "save", "script",
    "shutdown", "subscribe", "unsubscribe", "unwatch", "wait", "watch",
}  # fmt: skip
FLAGS = {"no-writes", "allow-oom", "allow-stale", "no-cluster", "allow-cross-slot-keys"}
REFUSED = "access at least one of the {}s mentioned in the command arguments"
OUTSIDE = {"publish", "slowlog"}  # commands that write no keys, and are to be noticed outside
AGAIN = b"!the script begins again"
KILLED = b"ERR Script killed by user with SCRIPT KILL."
NO_SCRIPT = "NOSCRIPT No matching script. Please use EVAL."


class Scripts:
    """Those of a server: the sources that it knows by their SHA, the oldest forgotten first, and the states that run one now."""

    def __init__(self) -> None:
        self.known: dict[bytes, bytes] = {}
        self.size = 0
        self.running: set[Runtime] = set()
        self.all_allowed = False  # also NOT_IN_SCRIPTS, for tests
        self.doom: bytes | None = None  # why every script ends: the server does

    def learn(self, source: bytes) -> bool:
        """Was it new?"""
        sha = sha_of(source)
        if sha in self.known or len(source) > MOST_SOURCE:
            return False
        self.known[sha] = source
        self.size += len(source)
        while self.size > MOST_SOURCE or len(self.known) > MOST_SCRIPTS:
            self.size -= len(self.known.pop(next(iter(self.known))))
        return True

    def flush(self) -> None:
        self.known.clear()
        self.size = 0


def sha_of(source: bytes) -> bytes:
    return hashlib.sha1(source, usedforsecurity=False).hexdigest().encode()


def learn(client: Connection, source: bytes, loaded: bool = False) -> None:
    """In the loop: this one and the others know it, before this client's command is answered. loaded: wait for them even if this one has
    known it: what another client has loaded may still be on its way to them."""
    server = client.server
    new = server.scripts.learn(source)
    if new:
        server.link.say("scripts", [source])
    if new or loaded:
        wait_for_others(client)


def flushed(client: Connection) -> None:
    """In the loop: the others forget all scripts, too, before this client's command is answered. Else one that is loaded there after the
    answer would be forgotten with the older ones."""
    client.server.link.say("flush_scripts")
    wait_for_others(client)


def wait_for_others(client: Connection) -> None:
    server = client.server
    if server.link.others and not client.lost:
        let_go = server.keep_replies(client)
        server.link.ask("heard", [], lambda _: let_go())


class Runtime:
    """A Lua state, of one thread of the pool: the one that runs this client's command. Raises: Error, if there is no lupa."""

    def __init__(self, client: Connection) -> None:
        try:
            from lupa.lua51 import LuaError, LuaRuntime
        except ImportError:
            raise Error('ERR this server has no Lua: pip install "shmcache[scripts]"') from None
        self.errors = LuaError
        self.server = client.server
        me = weakref.ref(self)  # no cycle: who drops a state has its memory back

        def check_time() -> None:
            runtime = me()
            if runtime is not None and runtime.over() and runtime.doom:
                raise _resp.CommandError(runtime.doom)

        def let_go(busy: bool) -> bool:
            runtime = me()
            return runtime is not None and runtime.reach is not None and runtime.reach.look(busy)

        self.caller = type(client)(client.ex, client.server)  # that runs the commands of scripts
        self.caller.check_time = check_time  # type: ignore[method-assign]
        self.caller.let_go = let_go  # type: ignore[method-assign]
        self.caller.in_script = True
        self.caller.most_out = MOST_MEMORY  # it could not have a larger reply
        self.doom: bytes | None = None
        self.time = undeclared.Time()
        self.reach: undeclared.Reach | None = None  # while one runs
        self.again = False  # it ends, and begins again
        self.untold: list[list[bytes]] = []  # of its commands, to monitors: nothing is told before it is known that it stands
        self.reads_only = False
        self.lua = LuaRuntime(
            encoding=None, register_eval=False, register_builtins=False, unpack_returned_tuples=True, attribute_filter=denied,
            max_memory=MOST_MEMORY,
        )  # fmt: skip
        folder = resources.files("shmcache.sidecar") / "lua"
        chunks = [
            self.lua.compile((folder / f"{name}.lua").read_bytes(), name=f"@{name}.lua")
            for name in ("sandbox", "resp", "pattern", "cjson", "bit")
        ]

        def ask(*words: bytes) -> bytes:
            runtime = me()
            assert runtime is not None
            return runtime.ask(*words)

        self.compile_in_lua, self.run_in_lua = chunks[0](ask, secrets.randbits(31), *chunks[1:])
        self.restrict(0)

    @property
    def used(self) -> int:
        return int(self.lua.get_memory_used(total=True))

    def restrict(self, size: int) -> None:
        """Lua's limit, with room for so many bytes that are about to be handed over: where they are, a failure could not be caught."""
        self.lua.set_max_memory(max(MOST_MEMORY, self.used + size + ROOM), total=True)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """SCRIPT KILL ends what it does, compiling included."""
        self.doom = None
        self.server.scripts.running.add(self)
        try:
            yield
        finally:
            self.server.scripts.running.discard(self)

    def begin(self, executor: _resp.Executor) -> None:
        """From now on it has the time limit; or what is left of it, where stripes are held: within a transaction."""
        began = executor.held_ns / 1e9 if executor.holds else _core.monotonic()
        self.time.begin(began, int(self.server.settings["lua-time-limit"]) / 1000)

    def compile(self, client: Connection, sha: bytes, source: bytes) -> bool:
        """Make it known to this state. Does it say of itself that it only reads? Raises: Error."""
        if len(source) > MOST_SOURCE:
            raise Error(f"ERR a script has at most {MOST_SOURCE} bytes")
        source, reads_only = without_shebang(source)
        self.begin(client.ex)
        if self.over():  # in a transaction: each script that is ended costs the state, and to make another takes as long as many commands
            raise Error((self.doom or b"").decode())
        self.restrict(len(source))
        with self.caught():
            why = self.compile_in_lua(sha, source)
        if why:
            raise Error("ERR Error compiling script (new function): " + why.decode("utf-8", "surrogateescape"))
        return reads_only

    def run(self, client: Connection, sha: bytes, keys: list[bytes], arguments: list[bytes], reads_only: bool, log_bytes: int) -> bytes:
        """Its reply. Raises: StripeBusy, LogFull: it has done nothing."""
        server = self.server
        self.reads_only = reads_only
        self.caller.user, self.caller.restricted, self.caller.db = client.user, client.restricted, client.db
        if not int(server.cache.segment.header["log_policy"]):
            log_bytes = 0
        allowed = server.settings["scripts-undeclared"] == "yes" and server.store is None
        self.reach = reach = undeclared.Reach(client.ex, client.db, keys, log_bytes, self.time, allowed, self.why_over)
        handed = array(map(bulk, keys)), array(map(bulk, arguments))
        try:
            while True:
                with reach.begun():
                    if not self.again:
                        self.begin(client.ex)
                    self.caller.protocol = 2
                    self.untold.clear()
                    self.restrict(sum(map(len, handed)))
                    again, self.again = self.again, False
                    with self.caught():
                        reply: bytes = self.run_in_lua(sha, *handed, b"%d" % client.protocol, again)
                if not self.again:
                    return reply
        finally:
            self.tell()
            self.again, self.reach = False, None
            client.owe(self.caller)
            self.caller.flush()  # it keeps no buffers
            if not client.ex.holds:
                client.ex.wait_cleared()

    @contextlib.contextmanager
    def caught(self) -> Any:
        """For what Lua could not make a reply of, as without memory. Such a state is not used again."""
        try:
            yield
        except self.errors as e:
            self.forget()
            said = b"ERR the script failed: " + " ".join((str(e) or "not enough memory").split()).encode("utf-8", "replace")
            raise _resp.CommandError(self.doom or said) from None
        if self.used > MOST_KEPT:
            self.forget()

    def forget(self) -> None:
        self.server.local.lua = None

    # -- what Lua asks for

    def ask(self, what: bytes, *words: bytes) -> bytes:
        """Strings in, a string out, and it never raises: so nothing of Python gets into Lua. A reply that begins with ! ends the script."""
        try:
            if self.reach is not None:
                self.reach.look()
            reply = b"" if self.over() else self.answer(what, words)
            if self.over() and self.doom:
                reply = b"!" + self.doom
            elif self.used + len(reply) > MOST_MEMORY:
                self.doom = b"ERR the script needs more than %d MB of memory" % (MOST_MEMORY >> 20)
                reply = b"!" + self.doom
        except Exception as e:
            self.server.loop.call_soon_threadsafe(
                self.server.loop.call_exception_handler, {"message": "a command of a script failed", "exception": e}
            )
            reply = b"!ERR internal error: " + type(e).__name__.encode()
        self.restrict(len(reply))
        return reply

    def answer(self, what: bytes, words: tuple[bytes, ...]) -> bytes:
        if what == b"call":
            assert self.reach is not None
            return self.call(words, self.reach)
        if what == b"setresp":
            self.caller.protocol = int(words[0])
        elif what == b"sha1":
            return sha_of(words[0])
        elif what == b"check":
            return b"" if sound(words[0], self.time.deadline) else b"no"
        elif what == b"log" and int(words[0]) >= LOG_NOTICE:
            assert self.reach is not None
            self.reach.wrote = True
            said = ascii(words[1][:MOST_SAID].decode("utf-8", "replace"))[1:-1]
            notice(f"shmcache: a script says: {said[:MOST_SAID]}")
        return b""

    def over(self) -> bool:
        self.doom = self.doom or self.server.scripts.doom
        if self.doom is None and self.time.left < 0:
            limit = self.server.settings["lua-time-limit"].encode()
            self.doom = b"ERR Script killed: it has run for longer than %b ms (lua-time-limit)." % limit
        return self.doom is not None

    def why_over(self) -> bytes | None:
        return self.doom if self.over() else None

    def call(self, words: tuple[bytes, ...], reach: undeclared.Reach) -> bytes:
        """The reply of a command."""
        name, arguments = words[0].decode("latin-1").lower(), list(words[1:])
        try:
            self.check(name, arguments, reach)
            writes = bool(TABLE[name].flags & WRITE) or name in OUTSIDE or name in NOT_IN_SCRIPTS
            reply = reach.run(self.caller, list(words), pairs_in(name, arguments, self.caller.db, self.caller.ex.databases), writes)
        except undeclared.Again:
            self.again = True
            return AGAIN
        except (Error, errors.ShmcacheError) as e:
            return b"-%b\r\n" % _resp.error_text(e).replace(b"\r", b" ").replace(b"\n", b" ")
        if self.server.executor.watched:
            self.untold.append(list(words))
            if reach.wrote:
                self.tell()
        return reply

    def tell(self) -> None:
        """Monitors, of what has run."""
        for words in self.untold:
            self.server.loop.call_soon_threadsafe(tell_monitors, self.caller, words, "lua")
        self.untold.clear()

    def check(self, name: str, arguments: list[bytes], reach: undeclared.Reach) -> None:
        """Raises: Error, if a script may not call it so."""
        if name not in self.server.commands:
            raise Error("ERR Unknown Redis command called from script")
        entry = TABLE[name]
        n = len(arguments) + 1
        if n != entry.arity if entry.arity > 0 else n < -entry.arity:
            raise Error("ERR Wrong number of args calling Redis command from script")
        try:
            check_subcommand(self.caller, name, arguments)
        except Error as e:
            unknown = e.args[0].startswith(b"ERR unknown subcommand")
            raise Error(
                "ERR Unknown Redis command called from script" if unknown else "ERR Wrong number of args calling Redis command from script"
            ) from None
        if name in NOT_IN_SCRIPTS and not self.server.scripts.all_allowed:
            raise Error("ERR This Redis command is not allowed from script")
        if name in NOT_IN_MULTI_BACKED and self.server.store is not None:
            raise Error("ERR This Redis command is not allowed from script in front of a store")
        if self.reads_only and (entry.flags & WRITE or name == "publish"):
            raise Error("ERR Write commands are not allowed from read-only scripts.")
        if self.caller.restricted and (refused := denial(self.caller, name, arguments, "lua")):
            reach.wrote = True  # ACL LOG has it
            what = "run this command or subcommand" if refused[0] == "command" else REFUSED.format(refused[0])
            raise Error(f"ERR The user executing the script can't {what}")
        if name == "select" and arguments[0] != b"%d" % self.caller.db:
            raise Error("ERR a script stays in the database of its caller: its KEYS are held there")


def denied(thing: Any, name: Any, setting: bool) -> Any:
    """Lua sees no attribute of anything."""
    raise AttributeError("not from Lua")


def sound(dump: bytes, deadline: float = float("inf")) -> bool:
    """Of a function as string.dump() gives it: False if it, or one in it, has `...` and over MOST_NAMED parameters; or time is over."""
    at = 12  # behind its header

    def skip(n: int) -> None:
        nonlocal at
        at += n

    def take(form: str) -> int:
        (value,) = struct.unpack_from("=" + form, dump, at)
        skip(struct.calcsize("=" + form))
        return int(value)

    def good() -> bool:
        skip(take("Q") + 9)  # its source; its first line, its last, how many upvalues
        named, variable, _ = take("B"), take("B"), take("B")
        if variable & 2 and named > MOST_NAMED:
            return False
        skip(4 * take("i"))  # instructions
        if _core.monotonic() > deadline:
            return False
        for i in range(take("i")):  # constants: nil, a boolean, a number, a string
            if i % 1024 == 1023 and _core.monotonic() > deadline:
                return False
            kind = take("B")
            skip(take("Q") if kind == 4 else {0: 0, 1: 1, 3: 8}[kind])
        for _ in range(take("i")):
            if not good():
                return False
        skip(4 * take("i"))  # lines
        for _ in range(take("i")):  # names of variables, and of upvalues
            skip(take("Q") + 8)
        for _ in range(take("i")):
            skip(take("Q"))
        return True

    return good()


def without_shebang(source: bytes) -> tuple[bytes, bool]:
    """(the script with its first line empty, does that say no-writes?). Raises: Error."""
    if not source.startswith(b"#!"):
        return source, False
    line, newline, rest = source.partition(b"\n")
    if not newline:
        raise Error("ERR Invalid script shebang")
    engine, *options = line.decode("utf-8", "surrogateescape").split()
    if engine != "#!lua":
        raise Error("ERR Unexpected engine in script shebang: " + engine)
    flags: list[str] = []
    for option in options:
        if not option.startswith("flags="):
            raise Error("ERR Unknown lua shebang option: " + option)
        flags = option.removeprefix("flags=").split(",")
        for flag in flags:
            if flag and flag not in FLAGS:
                raise Error("ERR Unexpected flag in script shebang: " + flag)
    return newline + rest, "no-writes" in flags


# ---- commands --------------------------------------------------------------------------------------------------------------------------


def runtime(client: Connection) -> Runtime:
    """This thread's."""
    local = client.server.local
    if getattr(local, "lua", None) is None:
        local.lua = Runtime(client)
    found: Runtime = local.lua
    return found


def evaluate(client: Connection, arguments: list[bytes], by_sha: bool, reads_only: bool) -> bytes:
    n = integer_of(arguments[1])
    if n > len(arguments) - 2:
        raise Error("ERR Number of keys can't be greater than number of args")
    if n < 0:
        raise Error("ERR Number of keys can't be negative")
    server = client.server
    if by_sha:
        sha = arguments[0].lower()
        source = server.scripts.known.get(sha)
        if source is None:
            raise Error(NO_SCRIPT)
    else:
        source = arguments[0]
        sha = sha_of(source)
    in_pool(client)
    lua = runtime(client)
    with lua.in_use():
        declared_so = lua.compile(client, sha, source)
        if reads_only and source.startswith(b"#!") and not declared_so:
            raise Error("ERR Can not execute a script with write flag using *_ro command.")
        if not by_sha:
            server.loop.call_soon_threadsafe(learn, client, source)
        keys = arguments[2 : 2 + n]
        reads_only = reads_only or declared_so
        log_bytes = 0 if reads_only else client.ex.log_room((client.db, key) for key in keys)
        return lua.run(client, sha, keys, arguments[2 + n :], reads_only, log_bytes)


@command("eval", -3, WRITE, group="scripting")
def eval_(client: Connection, arguments: list[bytes]) -> bytes:
    return evaluate(client, arguments, False, False)


@command("evalsha", -3, WRITE, group="scripting")
def evalsha(client: Connection, arguments: list[bytes]) -> bytes:
    return evaluate(client, arguments, True, False)


@command("eval_ro", -3, group="scripting")
def eval_ro(client: Connection, arguments: list[bytes]) -> bytes:
    return evaluate(client, arguments, False, True)


@command("evalsha_ro", -3, group="scripting")
def evalsha_ro(client: Connection, arguments: list[bytes]) -> bytes:
    return evaluate(client, arguments, True, True)


@command("script", -2, group="scripting")
@container
def script(client: Connection, arguments: list[bytes]) -> bytes:
    word, rest, server = arguments[0].lower(), arguments[1:], client.server
    if word == b"load":
        in_pool(client)
        sha = sha_of(rest[0])
        lua = runtime(client)
        with lua.in_use():
            lua.compile(client, sha, rest[0])
        server.loop.call_soon_threadsafe(learn, client, rest[0], True)
        return bulk(sha)
    if word == b"exists":
        return array(integer(sha.lower() in server.scripts.known) for sha in rest)
    if word == b"flush":
        if len(rest) > 1 or (rest and rest[0].lower() not in (b"sync", b"async")):
            raise Error("ERR SCRIPT FLUSH only support SYNC|ASYNC option")
        server.scripts.flush()
        if client.ex is server.executor:
            flushed(client)
        else:
            server.loop.call_soon_threadsafe(flushed, client)
        return OK
    if word == b"kill":
        running = list(server.scripts.running)
        if not running:
            raise Error("NOTBUSY No scripts in execution right now.")
        for each in running:
            each.doom = KILLED
        return OK
    raise Error(SYNTAX)
