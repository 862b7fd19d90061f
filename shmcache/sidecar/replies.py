"""RESP2 and RESP3 replies as bytes, for the commands that Python implements. `protocol` is the client's: 2 or 3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

OK = b"+OK\r\n"
QUEUED = b"+QUEUED\r\n"
EMPTY = b"*0\r\n"


def simple(text: str) -> bytes:
    return f"+{text}\r\n".encode()


def error(text: str) -> bytes:
    return b"-" + text.encode() + b"\r\n"


def integer(n: int) -> bytes:
    return b":%d\r\n" % n


def bulk(data: bytes | str) -> bytes:
    if isinstance(data, str):
        data = data.encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)


def nil(protocol: int) -> bytes:
    return b"_\r\n" if protocol == 3 else b"$-1\r\n"


def nil_array(protocol: int) -> bytes:
    return b"_\r\n" if protocol == 3 else b"*-1\r\n"


def array(parts: Iterable[bytes]) -> bytes:
    """Of replies."""
    parts = list(parts)
    return b"*%d\r\n" % len(parts) + b"".join(parts)


def set_(parts: Iterable[bytes], protocol: int) -> bytes:
    parts = list(parts)
    return (b"~%d\r\n" if protocol == 3 else b"*%d\r\n") % len(parts) + b"".join(parts)


def map_(pairs: Iterable[tuple[bytes, bytes]], protocol: int) -> bytes:
    """A map; in RESP2 an array of keys and values in turn."""
    pairs = list(pairs)
    head = b"%%%d\r\n" % len(pairs) if protocol == 3 else b"*%d\r\n" % (2 * len(pairs))
    return head + b"".join(key + value for key, value in pairs)


def push(parts: Iterable[bytes], protocol: int) -> bytes:
    parts = list(parts)
    return (b">%d\r\n" if protocol == 3 else b"*%d\r\n") % len(parts) + b"".join(parts)


def verbatim(text: str, protocol: int) -> bytes:
    data = text.encode()
    return b"=%d\r\ntxt:%b\r\n" % (len(data) + 4, data) if protocol == 3 else bulk(data)


def of(value: Any, protocol: int) -> bytes:
    """Of a plain value: None, bool (as an integer in RESP2), int, bytes, str (bulk), list, dict."""
    if value is None:
        return nil(protocol)
    if isinstance(value, bool):
        return (b"#t\r\n" if value else b"#f\r\n") if protocol == 3 else integer(value)
    if isinstance(value, int):
        return integer(value)
    if isinstance(value, dict):
        return map_(((of(k, protocol), of(v, protocol)) for k, v in value.items()), protocol)
    if isinstance(value, (list, tuple)):
        return array(of(v, protocol) for v in value)
    return bulk(value)
