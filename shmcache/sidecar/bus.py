"""Between the processes of one `shmcache serve`: what is published and watched, and what concerns all of them (commands/everywhere.py).

    worker -- Link -- Hub (in the parent) -- Link -- worker
                       +-- Member -- the process that serves the metrics

A frame is a u32 length, the number of the process that it is for (-1: all others), and a msgpack list [kind, from, ...]. The hub hands
it on, frames of one process in the order in which they came. A process that does not read for long is cut off (and ends: it is started
again), nobody waits for it.

What is changed for all (-2) the hub keeps: a process that begins, or begins again, is told all of it first. Such a frame goes back to who
sent it, too: its place among the others' says whose change was the last, for all alike.

    ["hello", i]                                  i serves: a new worker to all, who then tell it what they have; the others' answer to look
    ["look", i]                                   i wants to know who serves
    ["gone", i]                                   from the hub: what i has said is void, and it answers no more
    ["ask", i, number, part, [argument, ...]]     run this part (commands/everywhere.py)
    ["answer", i, number, result]
    ["counts", i, {channel: n}, {pattern: n}]     of those that changed, subscribers in that process now
    ["publish", i, channel, message]
    ["monitors", i, n]                            connections there that watch: they are to be told
    ["monitored", i, [line, ...]]
    ["state", i, {"config": ..., "users": ...}]   the first that i reads: what was kept
    ["config", i, {name: value}]                  kept: by CONFIG SET
    ["users", i, {name: ACL LIST's line, or nil}] kept; nil: there is none any more
    ["scripts", i, [source, ...]]                 they are known by their SHA; to a new one: all
    ["flush_scripts", i]
    ["pause", i, until_ms, writes_only]           to a new one: CLIENT PAUSE, until then on CLOCK_MONOTONIC
    ["paused", i, until_ms]                       to the parent (-3), which tells the supervisor; 0: it is over
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack

from shmcache.sidecar import acl

if TYPE_CHECKING:
    from shmcache.sidecar.server import Server

T = TypeVar("T")
HEADER = struct.Struct("<Ii")
ALL = -1
KEPT = -2
PARENT = -3
MOST_FRAME = 1 << 30
MOST_WAITING = 256 << 20  # bytes for a process that does not read
MOST_UNSAID = 32 << 20  # bytes for the hub, above which monitors elsewhere are told nothing more
ANSWER_LIMIT = 1.0  # seconds that others have for an answer


def frame(*parts: Any, to: int = ALL) -> bytes:
    body: bytes = msgpack.packb(parts)
    return HEADER.pack(len(body), to) + body


def read_state(link: socket.socket) -> dict[str, dict[Any, Any]]:
    """What was kept, from the end of one who begins, which blocks. Raises: OSError: the parent has ended."""

    def exactly(n: int) -> bytes:
        data = b""
        while len(data) < n:
            part = link.recv(n - len(data))
            if not part:
                raise ConnectionResetError("the parent has ended")
            data += part
        return data

    n, _ = HEADER.unpack(exactly(HEADER.size))
    _, _, state = msgpack.unpackb(exactly(n))
    return dict(state)


class Frames:
    """Whole frames out of a stream."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The frames, headers and all, that are whole now. Raises: ValueError: this is no frame."""
        self.buffer += data
        found, at = [], 0
        while len(self.buffer) - at >= HEADER.size:
            n, _ = HEADER.unpack_from(self.buffer, at)
            if n > MOST_FRAME:
                raise ValueError(f"a frame of {n} bytes")
            if len(self.buffer) - at < HEADER.size + n:
                break
            found.append(bytes(self.buffer[at : at + HEADER.size + n]))
            at += HEADER.size + n
        del self.buffer[:at]
        return found


class Hub:
    """The parent's half: call turn() with what select says is ready. Args: users: when it begins. paused: called with an until_ms."""

    def __init__(self, users: dict[bytes, bytes], paused: Callable[[int], None] = lambda until_ms: None) -> None:
        self.paused = paused
        self.state: dict[str, dict[Any, Any]] = {"config": {}, "users": dict(users)}
        self.links: dict[int, socket.socket] = {}
        self.frames: dict[int, Frames] = {}
        self.waiting: dict[int, bytearray] = {}

    def join(self, member: int) -> socket.socket:
        """The end for a process that is about to start; close it when it has it."""
        self.leave(member)
        mine, theirs = socket.socketpair()
        mine.setblocking(False)
        self.links[member], self.frames[member], self.waiting[member] = mine, Frames(), bytearray()
        self.send(frame("state", member, self.state, to=member))
        return theirs

    def leave(self, member: int) -> None:
        """It has ended; what it said before is heard."""
        while member in self.links and self.read(member):
            pass
        self.cut(member)

    def cut(self, member: int) -> None:
        link = self.links.pop(member, None)
        if link is not None:
            link.close()
            del self.frames[member], self.waiting[member]
            self.send(frame("gone", member), but=member)

    def readers(self) -> list[socket.socket]:
        return list(self.links.values())

    def writers(self) -> list[socket.socket]:
        return [link for member, link in self.links.items() if self.waiting[member]]

    def turn(self, ready: list[Any], writable: list[Any]) -> None:
        for member, link in list(self.links.items()):  # each may have left, or been cut off, at the turn of another
            if link in writable and member in self.links:
                self.push(member)
            if link in ready and member in self.links:
                self.read(member)

    def read(self, member: int) -> bool:
        """False: there was nothing."""
        try:
            data = self.links[member].recv(1 << 20)
            frames = self.frames[member].feed(data) if data else None
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            frames = None
        if frames is None:
            self.cut(member)
            return False
        for each in frames:
            _, to = HEADER.unpack_from(each)
            if to == PARENT:
                self.paused(msgpack.unpackb(memoryview(each)[HEADER.size :])[2])
                continue
            if to == KEPT:
                self.keep(each)
            self.send(each, but=None if to == KEPT else member)
        return True

    def keep(self, whole: bytes) -> None:
        kind, _, changes = msgpack.unpackb(memoryview(whole)[HEADER.size :])
        for name, value in changes.items():
            if value is None:
                self.state[kind].pop(name, None)
            else:
                self.state[kind][name] = value

    def send(self, data: bytes, but: int | None = None) -> None:
        _, to = HEADER.unpack_from(data)
        for member in list(self.links):
            if member != but and to in (ALL, KEPT, member) and member in self.waiting:
                self.waiting[member] += data
                self.push(member)

    def push(self, member: int) -> None:
        waiting = self.waiting[member]
        try:
            while waiting:
                del waiting[: self.links[member].send(waiting)]
        except BlockingIOError:
            if len(waiting) > MOST_WAITING:
                self.cut(member)
        except OSError:  # it has ended: read() finds that out, after what it said before
            waiting.clear()


class Other:
    """What is known of another worker."""

    def __init__(self) -> None:
        self.channels: dict[bytes, int] = {}  # subscribers of each
        self.patterns: dict[bytes, int] = {}
        self.monitors = 0


class Question:
    """What was asked, of those that were there then."""

    def __init__(self, waits_for: set[int], done: Callable[[list[Any]], None]) -> None:
        self.waits_for, self.done = waits_for, done
        self.answers: list[Any] = []
        self.timer: asyncio.TimerHandle | None = None


class Member(asyncio.Protocol):
    """A process's end of its link: it knows who serves, and asks.

    Args: number: its own. cut_off: called when the parent has ended, or has cut this process off.
    """

    def __init__(self, number: int, cut_off: Callable[[], None]) -> None:
        self.number, self.cut_off = number, cut_off
        self.frames = Frames()
        self.transport: Any = None
        self.others: dict[int, Other] = {}  # the workers that serve
        self.questions: dict[int, Question] = {}
        self.last_question = time.monotonic_ns()  # an answer to what a process asked that died is no answer to its successor
        self.heard: dict[str, Callable[..., None]] = {"hello": self.hello, "gone": self.gone, "answer": self.answered}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.say("look")

    def data_received(self, data: bytes) -> None:
        for each in self.frames.feed(data):
            kind, *rest = msgpack.unpackb(memoryview(each)[HEADER.size :])
            if kind in self.heard:
                self.heard[kind](*rest)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        for other in list(self.others):
            self.gone(other)
        self.cut_off()

    def say(self, kind: str, *parts: Any, to: int = ALL) -> None:
        if self.transport is not None:
            self.transport.write(frame(kind, self.number, *parts, to=to))

    def hello(self, worker: int) -> None:
        self.others[worker] = Other()

    def gone(self, worker: int) -> None:
        self.others.pop(worker, None)
        for number in list(self.questions):
            self.settle(number, worker)

    # -- questions

    def ask(self, part: str, arguments: list[Any], done: Callable[[list[Any]], None]) -> None:
        """Have all who serve run a part: done(their results) in the loop; when ANSWER_LIMIT is over, of those that have answered."""
        self.last_question += 1
        question = self.questions[self.last_question] = Question(set(self.others), done)
        question.timer = asyncio.get_running_loop().call_later(ANSWER_LIMIT, self.close_question, self.last_question)
        self.say("ask", self.last_question, part, arguments)
        if not self.others:
            self.close_question(self.last_question)

    def answered(self, worker: int, number: int, result: Any) -> None:
        if number in self.questions and worker in self.questions[number].waits_for:
            self.questions[number].answers.append(result)
            self.settle(number, worker)

    def settle(self, number: int, worker: int) -> None:
        question = self.questions[number]
        question.waits_for.discard(worker)
        if not question.waits_for:
            self.close_question(number)

    def close_question(self, number: int) -> None:
        question = self.questions.pop(number)
        if question.timer is not None:
            question.timer.cancel()
        question.done(question.answers)


class Link(Member):
    """A worker's half."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.worker, lambda: server.cut_off())
        self.server = server
        self.heard |= {
            "look": self.looked_for, "ask": self.asked, "counts": self.counts, "publish": self.published, "monitors": self.watched,
            "monitored": self.monitored, "config": self.config, "users": self.users, "pause": self.pause,
            "scripts": self.scripts, "flush_scripts": self.flush_scripts,
        }  # fmt: skip
        self.told: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})
        self.unheard: Counter[tuple[str, Any]] = Counter()  # (kind, name) of what this one has changed and that has not come back
        self.lines: list[str] = []  # for monitors elsewhere, said together

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.say("hello")

    # -- what others say

    def hello(self, worker: int) -> None:
        """It is new, and is to know what this one does, and that it is there."""
        super().hello(worker)
        self.say("counts", *self.told, to=worker)
        if self.server.monitors:
            self.say("monitors", len(self.server.monitors), to=worker)
        if self.server.scripts.known:
            self.say("scripts", list(self.server.scripts.known.values()), to=worker)
        executor = self.server.executor
        if executor.paused_until:
            self.say("pause", executor.paused_until, executor.paused_writes_only, to=worker)

    def scripts(self, worker: int, sources: list[bytes]) -> None:
        for source in sources:
            self.server.scripts.learn(source)

    def flush_scripts(self, worker: int) -> None:
        self.server.scripts.flush()

    def looked_for(self, member: int) -> None:
        self.say("hello", to=member)

    def gone(self, worker: int) -> None:
        super().gone(worker)
        self.server.watch_commands()

    def asked(self, member: int, number: int, part: str, arguments: list[Any]) -> None:
        self.say("answer", number, self.server.run_part(part, arguments), to=member)

    def counts(self, worker: int, channels: dict[bytes, int], patterns: dict[bytes, int]) -> None:
        other = self.others.setdefault(worker, Other())
        for known, said in ((other.channels, channels), (other.patterns, patterns)):
            known.update(said)
            for name in [name for name, n in said.items() if n == 0]:
                del known[name]

    def published(self, worker: int, channel: bytes, message: bytes) -> None:
        self.server.deliver(channel, message)

    def watched(self, worker: int, n: int) -> None:
        self.others.setdefault(worker, Other()).monitors = n
        self.server.watch_commands()

    def monitored(self, worker: int, lines: list[str]) -> None:
        self.server.show(lines)

    def config(self, worker: int, changes: dict[str, str]) -> None:
        self.server.configure(self.news("config", worker, changes))

    def users(self, worker: int, changes: dict[bytes, bytes | None]) -> None:
        news = self.news("users", worker, changes)
        self.server.take_users({name: acl.of_line(line) if line else None for name, line in news.items()})

    def news(self, kind: str, worker: int, changes: dict[T, Any]) -> dict[T, Any]:
        """What this worker has changed comes back after all that the hub heard before it: till then others' of the same are older."""
        if worker == self.number:
            self.unheard -= Counter((kind, name) for name in changes)
            return {}
        return {name: value for name, value in changes.items() if (kind, name) not in self.unheard}

    def pause(self, worker: int, until_ms: int, writes_only: bool) -> None:
        self.server.pause(until_ms, writes_only)

    # -- what this one says

    def change(self, kind: str, changes: dict[Any, Any]) -> None:
        """For all, and to be kept."""
        if self.transport is not None:
            self.unheard.update((kind, name) for name in changes)
            self.say(kind, changes, to=KEPT)

    def subscribed(self, name: bytes, n: int, pattern: bool) -> None:
        """So many subscribers of a channel or pattern are here now."""
        mine = self.told[pattern]
        if n:
            mine[name] = n
        else:
            mine.pop(name, None)
        self.say("counts", {} if pattern else {name: n}, {name: n} if pattern else {})

    def say_paused(self, until_ms: int) -> None:
        self.say("paused", until_ms, to=PARENT)

    def seen(self, line: str) -> None:
        """What a monitor elsewhere is to see."""
        if not any(other.monitors for other in self.others.values()):
            return
        if not self.lines:
            self.server.loop.call_soon(self.say_lines)
        self.lines.append(line)

    def say_lines(self) -> None:
        lines, self.lines = self.lines, []
        if self.transport is not None and self.transport.get_write_buffer_size() < MOST_UNSAID:  # else they miss some
            self.say("monitored", lines)
