"""Between the processes of one `shmcache serve`: what is published and watched, and what concerns all of them (commands/everywhere.py).

    worker -- Link -- Hub (in the parent) -- Link -- worker
                       +-- Member -- the process that serves the metrics

A frame is a u32 length, the number of the process that it is for (-1: all others), and a msgpack list [kind, from, ...]. The hub hands
it on, frames of one process in the order in which they came. A process that does not read for long is cut off (and ends: it is started
again), nobody waits for it.

What is changed for all (-2) the hub keeps: a process that begins, or begins again, is told all of it first. Such a frame goes back to who
sent it, too: its place among the others' says whose change was the last, for all alike.

What has to be known before it is acknowledged (-4) goes to all others, and the hub tells the sender when each worker that serves has it in
its socket, or is gone. The hub keeps each worker's counts, too.

    ["hello", i]                                  -4. i is about to serve: the others tell it what they have; an answer to look
    ["look", i]                                   i wants to know who serves
    ["gone", i]                                   from the hub: what i has said is void, and it answers no more
    ["told", i]                                   from the hub: of i's frames to -4 the first that was not told yet is
    ["ask", i, number, part, [argument, ...]]     run this part (commands/everywhere.py)
    ["answer", i, number, result]
    ["counts", i, {channel: n}, {pattern: n}]     -4. Of those that changed, subscribers in that process now
    ["publish", i, channel, message]
    ["monitors", i, n]                            connections there that watch: they are to be told
    ["monitored", i, [line, ...]]
    ["state", i, {"config": ..., "users": ..., "counts": [[worker, {channel: n}, {pattern: n}], ...]}]
                                                  the first that i reads: what was kept, and the counts of the workers that serve
    ["config", i, {name: value}]                  kept: by CONFIG SET
    ["users", i, {name: ACL LIST's line, or nil}] kept; nil: there is none any more
    ["scripts", i, [source, ...]]                 they are known by their SHA; to a new one: all
    ["flush_scripts", i]
    ["pause", i, until_ms, writes_only]           to a new one: CLIENT PAUSE, until then on CLOCK_MONOTONIC
    ["paused", i, until_ms]                       to the parent (-3), which tells the supervisor; 0: it is over

A subscription is acknowledged when a PUBLISH in any worker will find it, its end when none will count it. S has the subscriber, P the
publisher:

    S   enters the client, says its counts, and keeps the client's replies (Client.untold), not its next SUBSCRIBE or PING; what
        others could see of a later command waits, too (transactions.before)
    hub keeps the counts, sends them to all others, then "told" to S
    S   lets the replies go: first the acknowledgement, behind it what was published meanwhile
    P   reads, before it counts, what its socket holds (Link.catch_up), and sends the message to the hub if somebody elsewhere hears it

Invariant: a PUBLISH that was sent after the acknowledgement was received is run by P after P's socket got the counts, and P reads the
socket first. Neither S nor the hub waits for P's turn: P may be busy or stopped. Waiting for P's answer instead would take as
long as its longest turn, and would not do for a stopped P: when it goes on, it may serve the publisher before it reads its link.

    PUBLISH vs SUBSCRIBE, not acknowledged yet     either. If P counts the client, it gets the message behind its acknowledgement
    PUBLISH vs UNSUBSCRIBE, not acknowledged yet   either. P may count a client that gets nothing
    PUBLISH vs a disconnect                        the same, for as long as S takes to see it. RESET, QUIT and CLIENT KILL are acknowledged
                                                   when it is known
    P's socket is full                             the counts wait in the hub, and "told" with them. P is cut off after TELL_LIMIT; when it
                                                   goes on, it finds that out before it counts: an error, and it ends
    P dies                                         the hub waits for it no more. What it published and had not handed on is lost with it
    P begins while counts are on their way         those that the hub had before P joined are in its state; the others are in its socket
                                                   before "told" is, for its hello. It listens only then (Link.begin)
    S dies                                         the hub hands on what it said before, then "gone": P forgets its counts
    S dies and begins again                        "told" of what the former said is never sent to the latter
    the hub (the parent) dies                      every link ends, and so does every worker
    the hub is stopped                             nothing is acknowledged; after UNTOLD_LIMIT the connections that wait are closed
    a subscriber does not read                     it is dropped at PUSH_LIMIT, whether its acknowledgement has left or not
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack

from shmcache.core import _core, _resp
from shmcache.sidecar import acl

if TYPE_CHECKING:
    from shmcache.sidecar.server import Server

T = TypeVar("T")
HEADER = struct.Struct("<Ii")
ALL = -1
KEPT = -2
PARENT = -3
TOLD = -4
MOST_FRAME = 1 << 30
MOST_WAITING = 256 << 20  # bytes for a process that does not read
MOST_UNSAID = 32 << 20  # bytes for the hub, above which monitors elsewhere are told nothing more
ANSWER_LIMIT = 1.0  # seconds that others have for an answer
TELL_LIMIT = 10.0  # seconds after which a worker is cut off that does not read what is to be acknowledged
UNTOLD_LIMIT = 20.0  # seconds that a client waits for an acknowledgement, if the hub is stopped

Counts = tuple[dict[bytes, int], dict[bytes, int]]  # subscribers of each channel, of each pattern


def frame(*parts: Any, to: int = ALL) -> bytes:
    body: bytes = msgpack.packb(parts)
    return HEADER.pack(len(body), to) + body


def read_state(link: socket.socket) -> dict[str, Any]:
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


def update(counts: Counts, *changes: dict[bytes, int]) -> None:
    for known, said in zip(counts, changes, strict=True):
        known.update(said)
        for name in [name for name, n in said.items() if n == 0]:
            del known[name]


@dataclass
class Telling:
    """A frame whose sender is to be told that all have it. left: the workers that do not have it yet, and how many bytes the hub will have
    sent to each in its life when it does."""

    sender: int
    left: dict[int, int]
    moved: float  # when one of them was last seen to read
    sent: dict[int, int]  # and what each had been sent then


class Hub:
    """The parent's half: call turn() with what select says is ready. Args: users: when it begins. paused: called with an until_ms."""

    def __init__(self, users: dict[bytes, bytes], paused: Callable[[int], None] = lambda until_ms: None) -> None:
        self.paused = paused
        self.state: dict[str, dict[Any, Any]] = {"config": {}, "users": dict(users)}
        self.counts: dict[int, Counts] = {}  # of the workers that serve
        self.links: dict[int, socket.socket] = {}
        self.frames: dict[int, Frames] = {}
        self.waiting: dict[int, bytearray] = {}
        self.sent: dict[int, int] = {}  # bytes, by each one's life
        self.tellings: deque[Telling] = deque()

    def join(self, member: int) -> socket.socket:
        """The end for a process that is about to start; close it when it has it."""
        self.leave(member)
        mine, theirs = socket.socketpair()
        mine.setblocking(False)
        self.links[member], self.frames[member], self.waiting[member], self.sent[member] = mine, Frames(), bytearray(), 0
        counts = [(worker, *counts) for worker, counts in self.counts.items()]
        self.send(frame("state", member, {**self.state, "counts": counts}, to=member))
        return theirs

    def leave(self, member: int) -> None:
        """It has ended; what it said before is heard."""
        while member in self.links and self.read(member):
            pass
        self.cut(member)
        self.settle()

    def cut(self, member: int) -> None:
        link = self.links.pop(member, None)
        if link is not None:
            link.close()
            del self.frames[member], self.waiting[member], self.sent[member]
            self.counts.pop(member, None)
            self.tellings = deque(telling for telling in self.tellings if telling.sender != member)
            for telling in self.tellings:
                telling.left.pop(member, None)
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
        self.settle()

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
            if member not in self.links:  # what it said has had others cut off, and them it
                return False
            _, to = HEADER.unpack_from(each)
            if to == PARENT:
                self.paused(msgpack.unpackb(memoryview(each)[HEADER.size :])[2])
                continue
            if to == KEPT:
                self.keep(each)
            elif to == TOLD:
                self.count(member, each)
            self.send(each, but=None if to == KEPT else member)
            if to == TOLD:
                left = {i: self.sent[i] + len(self.waiting[i]) for i in self.counts if i != member and self.waiting.get(i)}
                self.tellings.append(Telling(member, left, _core.monotonic(), {}))
        return True

    def settle(self) -> None:
        """Tell the senders what all have, in its order; cut off a member that does not read."""
        while self.tellings:
            telling = self.tellings[0]
            telling.left = {member: end for member, end in telling.left.items() if self.sent[member] < end}
            sent = {member: self.sent[member] for member in telling.left}
            if not telling.left:
                self.tellings.popleft()
                self.send(frame("told", telling.sender, to=telling.sender))
            elif sent != telling.sent:  # much may wait before it: one that reads has its time
                telling.sent, telling.moved = sent, _core.monotonic()
                return
            elif _core.monotonic() - telling.moved > TELL_LIMIT:
                for member in list(telling.left):
                    self.cut(member)
            else:
                return

    def count(self, member: int, whole: bytes) -> None:
        kind, _, *changes = msgpack.unpackb(memoryview(whole)[HEADER.size :])
        if kind == "hello":
            self.counts[member] = ({}, {})
        elif kind == "counts" and member in self.counts:
            update(self.counts[member], *changes)

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
            if member != but and to in (ALL, KEPT, TOLD, member) and member in self.waiting:
                self.waiting[member] += data
                self.push(member)

    def push(self, member: int) -> None:
        waiting = self.waiting[member]
        try:
            while waiting:
                n = self.links[member].send(waiting)
                self.sent[member] += n
                del waiting[:n]
        except BlockingIOError:
            if len(waiting) > MOST_WAITING:
                self.cut(member)
        except ConnectionError:  # it has ended: read() finds that out, after what it said before
            self.sent[member] += len(waiting)
            waiting.clear()
        except OSError:  # of memory: what it has of a frame nobody knows
            self.cut(member)


class Other:
    """What is known of another worker."""

    def __init__(self) -> None:
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
        self.unhandled: deque[tuple[str, list[Any]]] = deque()
        self.heard_at = 0.0  # when something came last

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.say("look")

    def data_received(self, data: bytes) -> None:
        self.heard_at = _core.monotonic()
        for kind, parts in self.read(data):
            self.unhandled.append((kind, parts))
        self.handle()

    def read(self, data: bytes) -> Iterator[tuple[str, list[Any]]]:
        """The frames that are whole now: (kind, the rest)."""
        for each in self.frames.feed(data):
            kind, *parts = msgpack.unpackb(memoryview(each)[HEADER.size :])
            yield kind, parts

    def handle(self) -> None:
        while self.unhandled:
            kind, parts = self.unhandled.popleft()
            if kind in self.heard:
                self.heard[kind](*parts)

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
            "look": self.looked_for, "ask": self.asked, "told": self.told, "publish": self.published, "monitors": self.watched,
            "monitored": self.monitored, "config": self.config, "users": self.users, "pause": self.pause,
            "scripts": self.scripts, "flush_scripts": self.flush_scripts,
        }  # fmt: skip
        self.sock: socket.socket | None = None  # the link's end once more, for catch_up()
        self.most = 0  # bytes
        self.elsewhere: dict[int, Counts] = {}  # by worker: as far as the socket was read
        self.tellings: deque[tuple[float, Callable[[], None] | None]] = deque()  # (when, then) of what is not told yet
        self.unheard: Counter[tuple[str, Any]] = Counter()  # (kind, name) of what this one has changed and that has not come back
        self.lines: list[str] = []  # for monitors elsewhere, said together
        self.begun: asyncio.Future[Any] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self.begun is not None and not self.begun.done():
            self.begun.set_exception(ConnectionResetError("the parent has ended, or has cut this process off"))
        super().connection_lost(error)

    def know(self, counts: list[tuple[int, dict[bytes, int], dict[bytes, int]]]) -> None:
        """Of the state that the hub kept: the workers that serve, and their counts."""
        for worker, channels, patterns in counts:
            self.others[worker], self.elsewhere[worker] = Other(), (channels, patterns)

    async def begin(self) -> None:
        """Before this worker serves: it has heard all that was said before it said hello, and the others know it, or ANSWER_LIMIT is over.
        Raises: OSError: the parent has ended."""
        self.begun = asyncio.get_running_loop().create_future()
        self.tell("hello", then=lambda: self.ask("heard", [], self.begin_to_serve))
        await self.begun

    def begin_to_serve(self, answers: list[Any]) -> None:
        if self.begun is not None and not self.begun.done():
            self.begun.set_result(None)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    # -- what is read

    def read(self, data: bytes) -> Iterator[tuple[str, list[Any]]]:
        """Counts, and which workers are gone, are known as soon as they are read: catch_up()."""
        for kind, parts in super().read(data):
            if kind == "counts":
                worker, *changes = parts
                update(self.elsewhere.setdefault(worker, ({}, {})), *changes)
                continue
            if kind == "gone":
                self.elsewhere.pop(parts[0], None)
            yield kind, parts

    def catch_up(self) -> None:
        """Read what has come until now: `elsewhere` is then as new as it has to be for a command that counts subscribers. The rest is
        handled at the loop's next turn, in its order: other clients' commands, and this client's pushes, have no place within a
        command. Raises: CommandError: this process was cut off."""
        left = self.most  # what comes meanwhile would never end
        while self.sock is not None and left > 0 and self.ready.poll(0):
            try:
                data = self.sock.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            left -= len(data)
            if not data:
                raise _resp.CommandError(b"ERR this event loop was cut off from the others, and ends: connect again")
            later = list(self.read(data))
            if later and not self.unhandled:
                self.server.loop.call_soon(self.handle)
            self.unhandled += later

    def read_also_from(self, link: socket.socket) -> None:
        self.sock = link.dup()
        self.most = 2 * link.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)  # more than the hub's end holds at any time
        self.ready = select.poll()
        self.ready.register(self.sock, select.POLLIN)

    # -- what others say

    def hello(self, worker: int) -> None:
        """It is new, and is to know what this one does, and that it is there."""
        super().hello(worker)
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

    def told(self, worker: int) -> None:
        _, then = self.tellings.popleft()
        if then is not None:
            then()

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

    def tell(self, kind: str, *parts: Any, then: Callable[[], None] | None = None) -> None:
        """For all; then(): in the loop, when each worker that serves has it to read, or is gone."""
        self.say(kind, *parts, to=TOLD)
        self.tellings.append((_core.monotonic(), then))

    def subscribed(self, counts: dict[bytes, int], pattern: bool, then: Callable[[], None] | None) -> None:
        """So many subscribers of these channels or patterns are here now; then: as tell()."""
        self.tell("counts", {} if pattern else counts, counts if pattern else {}, then=then)

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
