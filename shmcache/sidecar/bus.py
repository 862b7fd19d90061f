"""Between the event loops of one `shmcache serve`: what is published, who subscribes to what, what CONFIG SET changed.

    worker -- Link -- Hub (in the parent) -- Link -- worker

A frame is a u32 length and a msgpack list [kind, worker, ...]; the hub hands each whole frame to all other workers, in the order in which
it came. A worker that does not read for long is cut off (and ends: it is started again), nobody waits for it.

    ["publish", i, channel, message]
    ["counts", i, {channel: n}, {pattern: n}]     of those that changed, subscribers in that process now
    ["config", i, {name: value}]
    ["hello", i]                                  a new one: everybody says his counts
    ["gone", i]                                   its counts are void
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgpack

if TYPE_CHECKING:
    from shmcache.sidecar.server import Server

HEADER = struct.Struct("<I")
MOST_FRAME = 1 << 30
MOST_WAITING = 256 << 20  # bytes for a worker that does not read


def frame(*parts: Any) -> bytes:
    body: bytes = msgpack.packb(parts)
    return HEADER.pack(len(body)) + body


class Frames:
    """Whole frames out of a stream."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames, headers and all, that are whole now. Raises: ValueError: this is no frame."""
        self.buffer += data
        found, at = [], 0
        while len(self.buffer) - at >= HEADER.size:
            (n,) = HEADER.unpack_from(self.buffer, at)
            if n > MOST_FRAME:
                raise ValueError(f"a frame of {n} bytes")
            if len(self.buffer) - at < HEADER.size + n:
                break
            found.append(bytes(self.buffer[at : at + HEADER.size + n]))
            at += HEADER.size + n
        del self.buffer[:at]
        return found


class Hub:
    """The parent's half: call turn() with what select says is ready."""

    def __init__(self) -> None:
        self.links: dict[int, socket.socket] = {}
        self.frames: dict[int, Frames] = {}
        self.waiting: dict[int, bytearray] = {}

    def join(self, worker: int) -> socket.socket:
        """The end for a worker that is about to start; close it when it has it."""
        self.leave(worker)
        mine, theirs = socket.socketpair()
        mine.setblocking(False)
        self.links[worker], self.frames[worker], self.waiting[worker] = mine, Frames(), bytearray()
        self.send(frame("hello", worker), but=worker)
        return theirs

    def leave(self, worker: int) -> None:
        link = self.links.pop(worker, None)
        if link is not None:
            link.close()
            del self.frames[worker], self.waiting[worker]
            self.send(frame("gone", worker), but=worker)

    def readers(self) -> list[socket.socket]:
        return list(self.links.values())

    def writers(self) -> list[socket.socket]:
        return [link for worker, link in self.links.items() if self.waiting[worker]]

    def turn(self, ready: list[Any], writable: list[Any]) -> None:
        for worker, link in list(self.links.items()):
            if link in writable:
                self.push(worker)
            if link in ready and worker in self.links:
                self.read(worker)

    def read(self, worker: int) -> None:
        try:
            data = self.links[worker].recv(1 << 20)
            frames = self.frames[worker].feed(data) if data else None
        except BlockingIOError:
            return
        except (OSError, ValueError):
            frames = None
        if frames is None:
            self.leave(worker)
            return
        for each in frames:
            self.send(each, but=worker)

    def send(self, data: bytes, but: int) -> None:
        for worker in list(self.links):
            if worker != but and worker in self.waiting:
                self.waiting[worker] += data
                self.push(worker)

    def push(self, worker: int) -> None:
        waiting = self.waiting[worker]
        try:
            while waiting:
                del waiting[: self.links[worker].send(waiting)]
        except BlockingIOError:
            if len(waiting) > MOST_WAITING:
                self.leave(worker)
        except OSError:
            self.leave(worker)


class Link(asyncio.Protocol):
    """A worker's half."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.frames = Frames()
        self.heard: dict[bytes, Callable[..., None]] = {
            b"publish": self.published, b"counts": self.counts, b"config": self.config, b"hello": self.hello, b"gone": self.gone,
        }  # fmt: skip
        self.transport: Any = None
        self.told: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})
        self.elsewhere: dict[int, tuple[dict[bytes, int], dict[bytes, int]]] = {}  # worker: subscribers of its channels, of its patterns

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        for each in self.frames.feed(data):
            kind, worker, *rest = msgpack.unpackb(each[HEADER.size :], raw=True)
            self.heard[kind](worker, *rest)

    def connection_lost(self, error: Exception | None) -> None:
        """The parent has cut this worker off, or has ended."""
        self.transport = None
        self.server.cut_off()

    def say(self, *parts: Any) -> None:
        if self.transport is not None:
            self.transport.write(frame(parts[0], self.server.worker, *parts[1:]))

    # -- what others say

    def published(self, worker: int, channel: bytes, message: bytes) -> None:
        self.server.deliver(channel, message)

    def counts(self, worker: int, channels: dict[bytes, int], patterns: dict[bytes, int]) -> None:
        known = self.elsewhere.setdefault(worker, ({}, {}))
        for mine, said in zip(known, (channels, patterns), strict=True):
            mine.update(said)
            for name in [name for name, n in said.items() if n == 0]:
                del mine[name]

    def config(self, worker: int, changes: dict[bytes, bytes]) -> None:
        self.server.configure({name.decode(): value.decode("latin-1") for name, value in changes.items()})

    def hello(self, worker: int) -> None:
        self.elsewhere.pop(worker, None)
        self.say("counts", *self.told)

    def gone(self, worker: int) -> None:
        self.elsewhere.pop(worker, None)

    # -- what this one says

    def subscribed(self, name: bytes, n: int, pattern: bool) -> None:
        """So many subscribers of a channel or pattern are here now."""
        mine = self.told[pattern]
        if n:
            mine[name] = n
        else:
            mine.pop(name, None)
        self.say("counts", {} if pattern else {name: n}, {name: n} if pattern else {})
