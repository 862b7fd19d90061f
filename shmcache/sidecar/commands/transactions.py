"""MULTI and EXEC, and what is looked at before a command runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from shmcache.core._core import WouldWait
from shmcache.core._text import number
from shmcache.sidecar import acl, replies
from shmcache.sidecar.commands.pubsub import tell_monitors
from shmcache.sidecar.commands.table import (
    FREE,
    IN_MULTI,
    IN_PUBSUB,
    LONG,
    NOT_IN_MULTI,
    NOT_IN_MULTI_BACKED,
    NOT_IN_MULTI_THROUGH,
    TABLE,
    WRITE,
    Error,
    check_subcommand,
    command,
    in_pool,
    is_of_loop,
    pairs_in,
    written_in,
)
from shmcache.sidecar.replies import OK, nil_array

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection

SCRIPT_ROOM = 8192  # bytes in the log that a script asks for at least, if it may write: a thread that holds stripes does not wait for room
MOST_UNTOLD = 1 << 20  # bytes of replies that wait for the other event loops, beyond which nothing of the connection is executed

REASONS = {  # at EXEC
    "command": "no permission to execute the command or subcommand",
    "key": "no permission to touch the specified keys",
    "channel": "no permission to access one of the channels used as arguments",
}


def is_refused(client: Connection, words: list[bytes]) -> bool:
    """A command is about to run, or to be queued. True: the client's user may not run it, and that is its reply."""
    if not client.restricted:
        return False
    name, arguments = words[0].decode("latin-1").lower(), words[1:]
    try:
        check_subcommand(client, name, arguments)
        denied = denial(client, name, arguments, "multi" if client.in_multi else "toplevel")
        if denied is None:
            return False
        kind, what = denied
        to = f"run the '{what.decode()}' command" if kind == "command" else f"access one of the {kind}s used as arguments"
        raise Error(f"NOPERM this user has no permissions to {to}")
    except Error as e:
        client.fail(client.refused(e.args[0], name))
        return True


def denial(client: Connection, name: str, arguments: list[bytes], context: str) -> tuple[str, bytes] | None:
    """What of this command the client's user may not (acl.User.denied), which is then in ACL LOG; None: he may run it."""
    server = client.server
    user = server.users.get(client.user) or acl.User(client.user)  # deleted meanwhile: who may do nothing
    denied = user.denied(name, arguments)
    if denied is not None:
        in_loop(client, server.denied, client, denied[0], context, denied[1])
    return denied


def in_loop(client: Connection, run: Callable[..., None], *arguments: Any) -> None:
    """Of what acts on other connections or on the server: now, or by the loop if a thread of the pool says it."""
    if client.ex is client.server.executor:
        run(*arguments)
    else:
        client.server.loop.call_soon_threadsafe(run, *arguments)


def before(client: Connection, name: str, flags: int, arguments: list[bytes]) -> bool:
    """True: the command has been answered, queued, or put off, and is not to run now."""
    server = client.server
    if is_refused(client, arguments):
        return True
    queued = client.in_multi and not flags & IN_MULTI
    if client.in_pubsub and client.protocol == 2 and not flags & IN_PUBSUB:
        allowed = "(P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET"
        client.fail(f"ERR Can't execute '{name}': only {allowed} are allowed in this context".encode())
        return True
    if queued:
        try:
            if name in NOT_IN_MULTI:
                raise Error("ERR Command not allowed inside a transaction")
            if (server.store is not None and name in NOT_IN_MULTI_BACKED) or (server.written_through and name in NOT_IN_MULTI_THROUGH):
                raise Error("ERR Command not allowed inside a transaction in front of a store")
            check_subcommand(client, name, arguments[1:])
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
    if (client.untold and (not flags & IN_PUBSUB or client.buffered[1] > MOST_UNTOLD)) or (
        executor.paused_until and not flags & FREE and (not executor.paused_writes_only or flags & WRITE or name in ("exec", "publish"))
    ):
        client.retried_by_pause = arguments
        client.blocked = True
        return True
    if executor.watched and name not in ("exec", "quit", "reset"):
        tell_monitors(client, arguments)
    return False


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
    if client.server.written_through:
        raise Error("ERR WATCH is not to be had in front of a store that is written through, or around: a copy's version says too little")
    for key in arguments:
        client.watching.setdefault((client.db, key), client.ex.version(key))
    return OK


@command("unwatch", 1, group="transactions")
def unwatch(client: Connection, arguments: list[bytes]) -> bytes:
    client.watching = {}
    return OK


@command("exec", 1, IN_MULTI, group="transactions")
def exec_(client: Connection, arguments: list[bytes]) -> bytes | None:
    try:
        reply = execute(client)
    except Error:
        tell(client, [b"exec"])
        raise
    tell(client, [b"exec"])
    return reply


def tell(client: Connection, words: list[bytes]) -> None:
    """Monitors, of a part of a transaction."""
    if client.server.executor.watched:
        in_loop(client, tell_monitors, client, words)


def is_answered(client: Connection, words: list[bytes]) -> bool:
    """A part of a transaction is about to run. True: it has its reply: the client's user may not run it any more, or the loop ran it."""
    denied = denial(client, words[0].decode("latin-1").lower(), words[1:], "multi") if client.restricted else None
    if denied is not None:
        client.fail(
            b"NOPERM ACLs rules changed between the moment the transaction was accumulated and the EXEC call. This command is no longer "
            b"allowed for the following reason: " + REASONS[denied[0]].encode()
        )
        return True
    tell(client, words)
    if not is_elsewhere(client, words):
        return False
    call(client, words)
    return True


def is_elsewhere(client: Connection, words: list[bytes]) -> bool:
    """Does this command act on connections, which are the loop's, and is this a thread of the pool?"""
    return client.ex is not client.server.executor and is_of_loop(words[0].decode("latin-1").lower())


def execute(client: Connection) -> bytes | None:
    if not client.in_multi:
        raise Error("ERR EXEC without MULTI")
    if client.broken:
        discard_transaction(client)
        raise Error("EXECABORT Transaction discarded because of previous errors.")
    queue = client.queue
    keys = [*client.watching]
    flushed: list[int] = []  # databases, in order; 0: all
    selected: set[int] = set()
    long, elsewhere, everything, db = False, False, False, client.db
    log_bytes = wished = 0  # for what scripts write besides their KEYS there may be less room
    for words in queue:
        name = words[0].decode("latin-1").lower()
        if name == "select" and (n := number(words[1])) is not None and 0 <= n < client.ex.databases:
            db = n
            selected.add(n)
        found = pairs_in(name, words[1:], db, client.ex.databases)
        keys += found
        long = long or name in LONG
        if name == "flushdb" and db == 0 and client.ex.databases > 1:
            everything = True
        elif name in ("flushdb", "flushall"):
            flushed.append(db if name == "flushdb" else 0)
        elsewhere = elsewhere or is_elsewhere(client, words)
        if TABLE[name].flags & WRITE:
            log_bytes += client.ex.log_room(written_in(name, found))
            wished += SCRIPT_ROOM if TABLE[name].group == "scripting" else 0
    others = {client.db, *selected, *(of for of, _ in keys)} - {0}  # each of which gets a generation from a FLUSHALL
    log_bytes += flushed.count(0) * len(others) * client.ex.log_room([])
    if log_bytes < (most := client.ex.most_log_room):
        log_bytes = min(log_bytes + wished, most)
    if long or client.server.store is not None:
        in_pool(client)
    if any(TABLE[words[0].decode("latin-1").lower()].group == "pubsub" for words in queue) and client.ex is client.server.executor:
        client.server.link.catch_up()  # what is read must not be handled while stripes are held
    looked_at = elsewhere or client.server.executor.watched
    try:
        answered = functools.partial(is_answered, client)
        done = client.transact(queue, keys, everything, flushed, selected, client.watching, log_bytes, answered, looked_at)
    except WouldWait:  # it is run again where it may
        raise
    except BaseException:
        discard_transaction(client)
        raise
    discard_transaction(client)
    client.ex.wait_cleared()
    return None if done else nil_array(client.protocol)


def call(client: Connection, words: list[bytes]) -> None:
    """Run a command as part of another; one that is_elsewhere() in the loop."""
    if not is_elsewhere(client, words):
        client.call(words)
        return
    done: Future[None] = Future()

    def there() -> None:
        try:
            client.call(words)
            done.set_result(None)
        except BaseException as e:  # it is the thread's
            done.set_exception(e)

    client.server.loop.call_soon_threadsafe(there)
    done.result()


class all_of:
    """with all_of(client, keys): what is done to them is one step for all who write. Within it nothing is put off to the pool."""

    def __init__(self, client: Connection, keys: Iterable[bytes], log_bytes: int = 0) -> None:
        self.executor, self.keys, self.log_bytes = client.ex, keys, log_bytes

    def __enter__(self) -> None:
        self.nested = self.executor.holds
        if not self.nested:
            self.executor.hold(self.keys, self.log_bytes)

    def __exit__(self, *_: object) -> None:
        if not self.nested:
            self.executor.release()
