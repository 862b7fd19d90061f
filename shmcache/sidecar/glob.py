"""Redis' patterns (KEYS, SCAN, PSUBSCRIBE, CONFIG GET) as compiled regular expressions."""

from __future__ import annotations

import re
from functools import lru_cache


@lru_cache(256)
def compiled(pattern: bytes) -> re.Pattern[bytes]:
    """* any bytes, ? one byte, [abc] [a-z] [^a] one of a set, \\x the byte x itself. An unclosed set ends with the pattern."""
    out, i, n = [b"(?s:"], 0, len(pattern)
    while i < n:
        c = pattern[i : i + 1]
        i += 1
        if c == b"*":
            while pattern[i : i + 1] == b"*":
                i += 1
            out.append(b".*")
        elif c == b"?":
            out.append(b".")
        elif c == b"[":
            i, part = _set(pattern, i)
            out.append(part)
        else:
            if c == b"\\" and i < n:
                c = pattern[i : i + 1]
                i += 1
            out.append(re.escape(c))
    out.append(b")")
    return re.compile(b"".join(out))


def _set(pattern: bytes, i: int) -> tuple[int, bytes]:
    negated = pattern[i : i + 1] == b"^"
    i += negated
    members: set[int] = set()
    while i < len(pattern) and pattern[i] != ord("]"):
        if pattern[i] == ord("\\") and i + 1 < len(pattern):
            members.add(pattern[i + 1])
            i += 2
        elif i + 2 < len(pattern) and pattern[i + 1] == ord("-"):
            low, high = sorted((pattern[i], pattern[i + 2]))
            members.update(range(low, high + 1))
            i += 3
        else:
            members.add(pattern[i])
            i += 1
    if not members:
        return i + 1, b"." if negated else b"(?!)"
    return i + 1, b"[" + (b"^" if negated else b"") + b"".join(b"\\x%02x" % m for m in sorted(members)) + b"]"


def matches(pattern: bytes, data: bytes) -> bool:
    return pattern == b"*" or (compiled(pattern).fullmatch(data) is not None if data else not pattern)
