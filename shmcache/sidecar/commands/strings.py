"""Commands on strings that are not compiled."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from shmcache.core import _text
from shmcache.sidecar import replies
from shmcache.sidecar.commands.table import ONE, SYNTAX, WRITE, Error, command, in_pool, integer_of
from shmcache.sidecar.replies import bulk, integer

if TYPE_CHECKING:
    from shmcache.sidecar.server import Connection


MOST_COMPARED = 1 << 28  # pairs of bytes in LCS: a second or two,
MOST_HELD = 1 << 25  # and some 0.2 s where stripes are held, in a transaction or a script


@command("incrbyfloat", 3, WRITE, ONE, group="string")
def incrbyfloat(client: Connection, arguments: list[bytes]) -> bytes:
    ex, (key, by) = client.ex, arguments
    while True:
        found = ex.read(key)
        value, version, expires_ms = (b"0", None, None) if found is None else found[:3]
        try:
            value = _text.add_floats(value, by)
        except ValueError:
            raise Error("ERR value is not a valid float") from None
        except ArithmeticError:
            raise Error("ERR increment would produce NaN or Infinity") from None
        if ex.write(key, value, expires_ms, version=version, absent=version is None):
            return bulk(value)


@command("lcs", -3, 0, (1, 2, 1), group="string")
def lcs(client: Connection, arguments: list[bytes]) -> bytes:
    length = idx = with_length = False
    least = 0
    rest = deque(arguments[2:])
    while rest:
        word = rest.popleft().lower()
        if word == b"len":
            length = True
        elif word == b"idx":
            idx = True
        elif word == b"withmatchlen":
            with_length = True
        elif word == b"minmatchlen" and rest:
            least = max(0, integer_of(rest.popleft()))
        else:
            raise Error(SYNTAX)
    if idx and length:
        raise Error("ERR If you want both the length and indexes, please just use IDX.")
    in_pool(client)
    a, b = (found[0] if (found := client.ex.read(key)) else b"" for key in arguments[:2])
    if (len(a) + 1) * (len(b) + 1) > (MOST_HELD if client.ex.holds or client.in_script else MOST_COMPARED):
        raise Error("ERR Insufficient memory, transient memory for LCS exceeds proto-max-bulk-len")
    common, ranges, size = _text.longest_common(a, b)
    if length:
        return integer(size)
    if not idx:
        return bulk(common)
    found_ranges = []
    for (a0, a1), (b0, b1) in ranges:
        n = a1 - a0 + 1
        if n >= least:
            found_ranges.append([[a0, a1], [b0, b1], *([n] if with_length else [])])
    return replies.of({"matches": found_ranges, "len": size}, client.protocol)
