"""The Redis protocol as a client sees it: what is compared are bytes, so every reply is kept as it came."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CLOSED, SILENT = b"<closed>", b"<no reply>"  # stand in place of a reply
AGGREGATES = b"*%~>|"


@dataclass(frozen=True)
class Item:
    """A reply that was taken apart: kind is its first byte; value is text, None for null, or a list of Items."""

    kind: bytes
    value: Any


def encode(args: Sequence[bytes]) -> bytes:
    return b"*%d\r\n" % len(args) + b"".join(b"$%d\r\n%s\r\n" % (len(a), a) for a in args)


def parse(data: bytes, at: int = 0) -> tuple[Item, int] | None:
    """The reply that begins there, and where it ends; None: not all of it has come. Raises: ValueError if it is not RESP."""
    line_end = data.find(b"\r\n", at)
    if line_end < 0:
        return None
    kind, rest, at = data[at : at + 1], data[at + 1 : line_end], line_end + 2
    if kind in (b"+", b"-", b":", b",", b"#", b"(", b"_"):
        return Item(kind, None if kind == b"_" else rest), at
    if kind in (b"$", b"!", b"="):
        size = int(rest)
        if size < 0:
            return Item(kind, None), at
        if len(data) < at + size + 2:
            return None
        if data[at + size : at + size + 2] != b"\r\n":
            raise ValueError("a bulk does not end where its length says")
        return Item(kind, data[at : at + size]), at + size + 2
    if kind and kind in AGGREGATES:
        count = int(rest)
        if count < 0:
            return Item(kind, None), at
        items = []
        for _ in range(count * 2 if kind in b"%|" else count):
            found = parse(data, at)
            if found is None:
                return None
            items.append(found[0])
            at = found[1]
        return Item(kind, items), at
    raise ValueError(f"no type of reply: {kind!r}")


class Connection:
    """A socket, and what came but was not asked for yet."""

    def __init__(self, where: tuple[str, int], timeout: float) -> None:
        self.timeout = timeout
        if where[1]:
            self.socket = socket.create_connection(where, timeout=timeout)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(timeout)
            self.socket.connect(where[0])
        self.buffer = b""
        self.open = True

    def send(self, data: bytes, pieces: int = 1) -> None:
        """In so many pieces, which the server most often reads one by one."""
        size = -(-len(data) // pieces) or 1
        with contextlib.suppress(OSError):  # closed by the other side: the reply will say so
            for at in range(0, len(data), size):
                self.socket.sendall(data[at : at + size])
                if pieces > 1:
                    time.sleep(0.001)  # or the kernel may join them

    def more(self) -> bytes | None:
        """Read once. None: something came; else what stands for the reply that does not come."""
        if not self.open:
            return CLOSED
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return SILENT
        except OSError:
            data = b""
        self.open = bool(data)
        self.buffer += data
        return None if data else CLOSED

    def reply(self) -> bytes:
        while True:
            try:
                found = parse(self.buffer)
            except ValueError:
                raw, self.buffer = self.buffer, b""
                return raw
            if found is not None:
                raw, self.buffer = self.buffer[: found[1]], self.buffer[found[1] :]
                return raw
            if (none := self.more()) is not None:
                raw, self.buffer = self.buffer + none, b""
                return raw

    def rest(self) -> bytes:
        """Everything till the other side closes, and that it does."""
        while (none := self.more()) is None:
            pass
        raw, self.buffer = self.buffer, b""
        return raw + none

    def call(self, *args: bytes) -> bytes:
        self.send(encode(args))
        return self.reply()

    def close(self) -> None:
        self.socket.close()
