"""Commands on the bits of a string that are not compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmcache.core import _text
from shmcache.sidecar.commands.table import ONE, RAW, SYNTAX, WRITE, Error, command, integer_of
from shmcache.sidecar.commands.transactions import all_of
from shmcache.sidecar.replies import array, integer, nil

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection


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
    while at <= end:
        byte = value[at] if wanted else value[at] ^ 0xFF
        if at == low >> 3:
            byte &= 0xFF >> (low & 7)
        if at == high >> 3:
            byte &= 0xFF << (7 - (high & 7)) & 0xFF
        if byte:
            return integer(at * 8 + 8 - byte.bit_length())
        at += 1
        if value[at : at + 1] == plain:  # once, if the range does not end there
            at = len(value) - len(value[at:].lstrip(plain))
    return integer(-1 if wanted or end_given else len(value) * 8)


@command("bitop", -4, WRITE, (2, -1, 1), group="bitmap")
def bitop(client: Connection, arguments: list[bytes]) -> bytes:
    operation, to, sources = arguments[0].lower(), arguments[1], arguments[2:]
    if operation not in (b"and", b"or", b"xor", b"not"):
        raise Error(SYNTAX)
    if operation == b"not" and len(sources) != 1:
        raise Error("ERR BITOP NOT must be called with a single source key.")
    ex = client.ex
    with all_of(client, [to, *sources], ex.log_room([(ex.db, to)])):
        result, size = 0, 0
        for i, key in enumerate(sources):  # one at a time: they may be large
            client.check_time()
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
        ex.write(to, result.to_bytes(size, "big"), None, codec=RAW)
    return integer(size)


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
        value, version, expires_ms = (b"", None, None) if found is None else found[:3]
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
