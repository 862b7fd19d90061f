"""Commands on several keys, on all, and on one that is looked at or moved."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shmcache import errors
from shmcache.core import _core, _resp, _text
from shmcache.sidecar import replies
from shmcache.sidecar.commands.table import (
    ONE,
    RAW,
    SCAN_NS,
    SCAN_TIME,
    SYNTAX,
    WRITE,
    Error,
    command,
    container,
    in_pool,
    in_pool_if_long,
    integer_of,
    that_match,
)
from shmcache.sidecar.replies import OK, array, bulk, integer, nil

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection

FLUSH_NS = 5_000_000  # of FLUSHDB, between two looks at the time
FLUSH_TRIES_AT_ONCE = 8  # of FLUSHDB in a step, for a lock that it does not hold,
FLUSH_PAUSE = 0.0001  # seconds between so many and as many more: to have the GIL back may take 5 ms each time, with locks held
FLUSH_WAIT = 0.02  # seconds, of all these waits
RESTORE_WAIT = 30.0  # seconds that FLUSHDB waits, as flush() of a cache does for its store
BEING_RESTORED = (
    "LOADING the cache is being restored: what is still to come of this database would not go. Try again when INFO says loading:0"
)


def all_keys(client: Connection) -> Iterator[bytes]:
    """Of the database in use. In parts: the loop's thread gets its turns. Raises: what check_time() does."""
    at, ex = 0, client.ex
    while at < ex.n_buckets:
        client.check_time()
        at, some = ex.keys(at, at + 1024)
        yield from some


@command("dbsize", 1, group="server")
def dbsize(client: Connection, arguments: list[bytes]) -> bytes:
    return integer(size_of(client))


def size_of(client: Connection) -> int:
    """Items of the database in use. Raises: WouldWait; what check_time() does."""
    ex = client.ex
    if ex.databases == 1:
        return len(client.server.cache)
    if ex.db < _resp.COUNTED:
        return ex.size()[0]
    in_pool(client)
    return sum(1 for _ in all_keys(client))


def check_flush(arguments: list[bytes]) -> None:
    if len(arguments) > 1 or (arguments and arguments[0].lower() not in (b"sync", b"async")):
        raise Error(SYNTAX)


@command("flushall", -1, WRITE, group="server")
def flushall(client: Connection, arguments: list[bytes]) -> bytes:
    check_flush(arguments)
    return empty(client)


def empty(client: Connection) -> bytes:
    if client.server.store is not None or int(client.server.cache.segment.header["log_policy"]):
        in_pool(client)
    if client.ex.holds:
        client.ex.renew()
    else:
        client.ex.table.clear()  # back: once the store has everything
    return OK


@command("flushdb", -1, WRITE, group="server")
def flushdb(client: Connection, arguments: list[bytes]) -> bytes:
    """What was in the database when this was asked is gone when it is answered, claims included; nothing else is.

    The first has no generation of its own: each of its keys is removed. It is never a clear() of the segment, whatever is counted.
    What is still to be restored of it would come afterwards, so the end of a restore is waited for."""
    ex = client.ex
    check_flush(arguments)
    if ex.databases == 1:
        return empty(client)
    in_pool(client)
    if client.db:
        if ex.holds:
            ex.renew(client.db)
        else:
            ex.table.namespace(f"db:{client.db}").clear()
        return OK
    wait_restored(client)
    if client.server.store is not None:
        ex.table.flush()  # the store has what is dropped here
    if ex.holds:
        keep_room_to_empty(client)
    at = tries = 0
    waited = 0.0
    try:
        ex.empty_held()
        while at < ex.n_stripes:
            client.check_time()
            try:
                at = ex.empty_first(at, FLUSH_NS)
                client.let_go(False)
            except errors.StripeBusy:
                if not client.let_go(True):
                    tries += 1
                    if not ex.holds:
                        raise
                    if tries % FLUSH_TRIES_AT_ONCE == 0:
                        if waited > FLUSH_WAIT:
                            raise
                        began = _core.monotonic()
                        time.sleep(FLUSH_PAUSE)
                        waited += _core.monotonic() - began
    except errors.StripeBusy:
        who = "others hold locks that this command needs, and a transaction or script waits for none" if ex.holds else \
            "a process that does not run holds a lock that this command needs"
        raise Error(f"TRYAGAIN {who}; some of the keys are still there") from None
    except errors.LogFull:
        if not ex.holds:
            raise
        raise Error("MISCONF the log's buffer is full; some of the keys are still there") from None
    return OK


def keep_room_to_empty(client: Connection) -> None:
    """In the log, for a record of each key of the first database: this thread holds stripes, so it does not wait for room in the middle.
    Raises: LogFull: nothing is removed; what check_time() does."""
    ex = client.ex
    if not ex.most_log_room or not int(client.server.cache.segment.header["log_policy"]):
        return
    at = room = 0
    while at < ex.n_stripes:
        client.check_time()
        at, more = ex.room_to_empty(at, FLUSH_NS)
        room += more
    ex.keep_room(room)


def wait_restored(client: Connection) -> None:
    """Raises: Error: it is restored still, after RESTORE_WAIT, or at once if stripes are held; what check_time() does."""
    until = _core.monotonic() + RESTORE_WAIT
    while client.server.cache.durability()["restoring"]:
        client.check_time()
        if client.ex.holds or _core.monotonic() > until:
            raise Error(BEING_RESTORED)
        time.sleep(0.002)


@command("keys", 2)
def keys(client: Connection, arguments: list[bytes]) -> bytes:
    in_pool(client)
    return array([bulk(key) for key in that_match(client, arguments[0], all_keys(client))])


@command("scan", -2)
def scan(client: Connection, arguments: list[bytes]) -> bytes:
    cursor = arguments[0].split(b"\0", 1)[0] or b"0"
    if len(cursor) > 30 or not (cursor[1:] if cursor[:1] in b"+-" else cursor).isdigit() or abs(int(cursor)) >= 1 << 64:
        raise Error("ERR invalid cursor")
    pattern, count, kind = b"*", 10, b"string"
    rest = deque(arguments[1:])
    while rest:
        word = rest.popleft().lower()
        if word == b"count" and rest:
            count = integer_of(rest.popleft())
            if count < 1:
                raise Error(SYNTAX)
        elif word == b"match" and rest:
            pattern = rest.popleft()
        elif word == b"type" and rest:
            kind = rest.popleft().lower()
        else:
            raise Error(SYNTAX)
    if count > 1000:
        in_pool(client)
    ex = client.ex
    at = min(int(cursor) % (1 << 64), ex.n_buckets)
    at, found = ex.keys(at, ex.n_buckets, count, SCAN_NS)
    if at < ex.n_buckets and len(found) < count and not ex.holds:
        in_pool(client)
        until = _core.monotonic() + SCAN_TIME
        while at < ex.n_buckets and len(found) < count and _core.monotonic() < until:
            at, more = ex.keys(at, ex.n_buckets, count - len(found), SCAN_NS)
            found += more
    found = [bulk(key) for key in that_match(client, pattern, found if kind == b"string" else [])]
    return array((bulk(b"%d" % (at if at < ex.n_buckets else 0)), array(found)))


@command("randomkey", 1)
def randomkey(client: Connection, arguments: list[bytes]) -> bytes:
    ex = client.ex
    if ex.db >= _resp.COUNTED or size_of(client):
        for _ in range(100):
            _, found = ex.keys(random.randrange(ex.n_buckets), ex.n_buckets, 1, SCAN_NS // 100)
            if found:
                return bulk(random.choice(found))
        in_pool(client)
        for start in (random.randrange(ex.n_buckets), 0):
            _, found = ex.keys(start, ex.n_buckets, 1)
            if found:
                return bulk(random.choice(found))
    return nil(client.protocol)


EMBSTR_MOST = 44  # bytes


def encoding(value: bytes, codec: int) -> str:
    if codec & RAW:
        return "raw"
    if codec == 2 or (len(value) <= 20 and _text.number(value) is not None):
        return "int"
    return "embstr" if len(value) <= EMBSTR_MOST else "raw"


@command("object", -2, 0, (2, 2, 1))
@container
def object_(client: Connection, arguments: list[bytes]) -> bytes:
    word = arguments[0].lower()
    n = client.ex.length(arguments[1])
    found = client.ex.read(arguments[1]) if n is not None and n <= EMBSTR_MOST else None
    if n is None or (found is None and n <= EMBSTR_MOST):  # it may have gone meanwhile
        return nil(client.protocol)
    kind = encoding(found[0], found[3]) if found else "raw"
    if word == b"encoding":
        return bulk(kind)
    if word == b"freq":
        raise Error(
            "ERR An LFU maxmemory policy is not selected, access frequency not tracked. Please note that when switching between policies "
            "at runtime LRU and LFU data will take some time to adjust."
        )
    # of each of these numbers Redis has one object
    shared = word == b"refcount" and found is not None and kind == "int" and 0 <= int(found[0]) < 10000
    return integer(0 if word == b"idletime" else (1 << 31) - 1 if shared else 1)


@command("memory", -2, 0, (2, 2, 1), group="server")
@container
def memory(client: Connection, arguments: list[bytes]) -> bytes:
    word = arguments[0].lower()
    if word == b"usage" and len(arguments) in (2, 4):
        if len(arguments) == 4 and (arguments[2].lower() != b"samples" or integer_of(arguments[3]) < 0):
            raise Error(SYNTAX)
        n = client.ex.length(arguments[1])
        return nil(client.protocol) if n is None else integer(48 + len(arguments[1]) + n + 10)
    if word == b"doctor" and len(arguments) == 1:
        return replies.verbatim("Nothing to say: look at shmcache-admin stats.", client.protocol)
    if word == b"purge" and len(arguments) == 1:
        return OK
    raise Error(SYNTAX)


RDB_VERSION = 10
LONG_DUMP = 1 << 16  # bytes of a value, some 0.1 ms


@command("dump", 2, 0, ONE)
def dump(client: Connection, arguments: list[bytes]) -> bytes:
    in_pool_if_long(client, arguments, LONG_DUMP)
    found = client.ex.read(arguments[0])
    if found is None:
        return nil(client.protocol)
    value = found[0]
    n = _text.number(value) if len(value) <= 11 else None
    if n is not None and -(1 << 31) <= n < 1 << 31:
        width = 1 if -128 <= n < 128 else 2 if -(1 << 15) <= n < 1 << 15 else 4
        parts = [bytes([0, 0xC0 | (width >> 1)]), n.to_bytes(width, "little", signed=True), RDB_VERSION.to_bytes(2, "little")]
    else:
        parts = [b"\0" + rdb_length(len(value)), value, RDB_VERSION.to_bytes(2, "little")]
    crc = 0
    for part in parts:
        crc = _text.crc64(part, crc)
    return bulk(b"".join([*parts, crc.to_bytes(8, "little")]))


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
    if _text.crc64(memoryview(payload)[:-8]) != int.from_bytes(payload[-8:], "little"):
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
            value = _text.unpack_lzf(memoryview(body)[at : at + packed], size) if at + packed <= len(body) and size <= most else None
            if value is None:
                raise Error(BAD_FORMAT)
            return value
        size, at = length_at(body, 1)
        if len(body) < at + size:
            raise Error(BAD_FORMAT)
        return body[at : at + size]
    except IndexError:
        raise Error(BAD_FORMAT) from None


def length_at(body: bytes, at: int) -> tuple[int, int]:
    """(it, the place behind it), as Redis reads one: or an encoding's number, where a length is wanted. Raises: Error; IndexError."""
    kind, low = body[at] >> 6, body[at] & 0x3F
    if kind in (0, 3):
        return low, at + 1
    if kind == 1:
        return low << 8 | body[at + 1], at + 2
    if low > 1:
        raise Error(BAD_FORMAT)
    width = 8 if low else 4
    return int.from_bytes(body[at + 1 : at + 1 + width], "big"), at + 1 + width


@command("restore", -4, WRITE, ONE)
def restore(client: Connection, arguments: list[bytes]) -> bytes:
    key, ttl_text, payload = arguments[:3]
    replace = absolute = False
    hint = b""
    rest = deque(arguments[3:])
    while rest:
        word = rest.popleft().lower()
        if word == b"replace":
            replace = True
        elif word == b"absttl":
            absolute = True
        elif word == b"idletime" and rest and hint != b"freq":
            hint = word
            if integer_of(rest.popleft()) < 0:
                raise Error("ERR Invalid IDLETIME value, must be >= 0")
        elif word == b"freq" and rest and hint != b"idletime":
            hint = word
            if not 0 <= integer_of(rest.popleft()) <= 255:
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
    if expires_ms >= 1 << 63:
        raise Error("ERR invalid expire time in 'restore' command")
    if not client.ex.write(key, value, expires_ms, absent=not replace):
        raise Error("BUSYKEY Target key name already exists.")
    return OK
