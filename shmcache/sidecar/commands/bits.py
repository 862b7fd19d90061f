"""Commands on the bits of a string that are not compiled."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from shmcache.core import _text
from shmcache.sidecar.commands.table import ONE, RAW, SYNTAX, WRITE, Error, command, in_pool, in_pool_if_long, integer_of
from shmcache.sidecar.commands.transactions import all_of
from shmcache.sidecar.replies import array, integer, nil

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection


OPERATORS = {b"and": ord("&"), b"or": ord("|"), b"xor": ord("^"), b"not": ord("~")}  # of BITOP
LONG_FIELDS = 1000  # words of BITFIELD, some 0.5 ms
LONG = 1 << 18  # bytes of values, some 0.1 ms


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
    in_pool_if_long(client, arguments[:1], LONG)
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
    return integer(_text.count_bits(value, low, high))


@command("bitpos", -3, 0, ONE, group="bitmap")
def bitpos(client: Connection, arguments: list[bytes]) -> bytes:
    wanted = integer_of(arguments[1])
    if wanted not in (0, 1):
        raise Error("ERR The bit argument must be 1 or 0.")
    in_pool_if_long(client, arguments[:1], LONG)
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
    at = _text.first_bit(value, wanted == 1, low, high)
    return integer(len(value) * 8 if at < 0 and not wanted and not end_given else at)


@command("bitop", -4, WRITE, (2, -1, 1), group="bitmap")
def bitop(client: Connection, arguments: list[bytes]) -> bytes:
    operation, to, sources = arguments[0].lower(), arguments[1], arguments[2:]
    if operation not in OPERATORS:
        raise Error(SYNTAX)
    if operation == b"not" and len(sources) != 1:
        raise Error("ERR BITOP NOT must be called with a single source key.")
    ex = client.ex
    in_pool_if_long(client, sources, LONG)
    with all_of(client, [to, *sources], ex.log_room([(ex.db, to)])):
        result = bytearray()
        for i, key in enumerate(sources):  # one at a time: they may be large
            client.check_time()
            value = found[0] if (found := ex.read(key)) else b""
            if i == 0:
                result += value
            elif len(value) > len(result):
                result += bytes(len(value) - len(result))
            if i or operation == b"not":
                _text.combine_bits(result, value, OPERATORS[operation])
        if not result:
            ex.remove(to)
            return integer(0)
        ex.write(to, bytes(result), None, codec=RAW)
    return integer(len(result))


def bitfield_type(word: bytes) -> tuple[bool, int]:
    """(signed, bits)"""
    n = _text.number(word[1:])
    signed = word[:1] == b"i"
    if n is None or not (signed or word[:1] == b"u") or not 1 <= n <= (64 if signed else 63):
        raise Error("ERR Invalid bitfield type. Use something like i16 u8. Note that u64 is not supported but i64 is.")
    return signed, n


def bitfield_offset(client: Connection, word: bytes, bits: int) -> int:
    times = word.startswith(b"#")
    n = _text.number(word[1:] if times else word)
    most = int(client.server.settings["proto-max-bulk-len"]) * 8
    if n is None or n < 0 or (n * bits if times else n) + bits > most:
        raise Error("ERR bit offset is not an integer or out of range")
    return n * bits if times else n


def bitfield_run(client: Connection, arguments: list[bytes], read_only: bool) -> bytes:
    key, rest = arguments[0], deque(arguments[1:])
    if len(rest) > LONG_FIELDS:
        in_pool(client)
    overflow = b"wrap"
    operations: list[tuple[bytes, bool, int, int, int, bytes]] = []
    while rest:
        client.check_time()
        word = rest.popleft().lower()
        if word == b"get" and len(rest) >= 2:
            signed, bits = bitfield_type(rest.popleft())
            operations.append((word, signed, bits, bitfield_offset(client, rest.popleft(), bits), 0, overflow))
        elif word == b"overflow" and rest:
            overflow = rest.popleft().lower()
            if overflow not in (b"wrap", b"sat", b"fail"):
                raise Error("ERR Invalid OVERFLOW type specified")
        elif word in (b"set", b"incrby") and len(rest) >= 3:
            signed, bits = bitfield_type(rest.popleft())
            offset = bitfield_offset(client, rest.popleft(), bits)
            operations.append((word, signed, bits, offset, integer_of(rest.popleft()), overflow))
        else:
            raise Error(SYNTAX)
    writes = any(operation[0] != b"get" for operation in operations)
    if read_only and writes:
        raise Error("ERR BITFIELD_RO only supports the GET subcommand")
    ex = client.ex
    in_pool_if_long(client, [key], LONG)
    if writes and max(offset + bits for _, _, bits, offset, _, _ in operations) > 8 * LONG:
        in_pool(client)
    while True:
        found = ex.read(key)
        value, version, expires_ms = (b"", None, None) if found is None else found[:3]
        data: Any = bytearray(value) if writes else value
        out = []
        for word, signed, bits, offset, operand, how in operations:
            client.check_time()
            end = (offset + bits + 7) >> 3
            if word != b"get":
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
