"""The bus between the processes of `shmcache serve`: frames in whatever pieces, to whom the hub hands them, and questions that end."""

from __future__ import annotations

import asyncio
import contextlib
import random
import select
import socket

import pytest

from shmcache.sidecar import acl, bus
from shmcache.sidecar.bus import ALL, Frames, Hub, Member, frame
from shmcache.sidecar.commands.scripting import Scripts


def parts_of(data):
    return [bus.msgpack.unpackb(each[bus.HEADER.size :]) for each in Frames().feed(data)]


def test_frames_come_whole_from_pieces_of_any_size():
    said = [("ask", 1, 2**60, "state", []), ("publish", 0, b"\xff\0", b"x" * 5000), ("config", 1, {"requirepass": "\xe9"})]
    stream = b"".join(frame(*parts) for parts in said)
    for seed in range(20):
        rng, frames, found, at = random.Random(seed), Frames(), [], 0
        while at < len(stream):
            n = rng.choice((1, 3, 8, 100, 4000))
            found += frames.feed(stream[at : at + n])
            at += n
        assert [tuple(parts) for each in found for parts in parts_of(each)] == said
        assert not frames.buffer


def test_what_is_no_frame_is_refused():
    with pytest.raises(ValueError, match="a frame of"):
        Frames().feed(bus.HEADER.pack(bus.MOST_FRAME + 1, ALL))


@pytest.fixture
def hub():
    hub = Hub({})
    hub.ends = {i: hub.join(i) for i in range(3)}
    assert [bus.read_state(end) for end in hub.ends.values()] == 3 * [{"config": {}, "users": {}, "counts": []}]

    def turn():
        while ready := select.select(hub.readers(), [], [], 0)[0]:
            hub.turn(ready, hub.writers())

    def heard(i):
        turn()
        data = b""
        while select.select([hub.ends[i]], [], [], 0)[0] and (part := hub.ends[i].recv(65536)):
            data += part
        return parts_of(data)

    hub.settle_frames, hub.heard = turn, heard
    yield hub
    for i, end in hub.ends.items():
        hub.leave(i)
        end.close()


def test_the_hub_hands_a_frame_to_all_others_or_to_the_one_it_is_for(hub):
    hub.ends[0].sendall(frame("hello", 0) + frame("answer", 0, 7, "x", to=2) + frame("answer", 0, 8, "nobody", to=9))
    assert hub.heard(0) == []
    assert hub.heard(1) == [["hello", 0]]
    assert hub.heard(2) == [["hello", 0], ["answer", 0, 7, "x"]]


def test_who_leaves_is_gone_for_the_others(hub):
    hub.ends[1].close()
    hub.settle_frames()
    assert hub.heard(0) == [["gone", 1]] == hub.heard(2)
    assert set(hub.links) == {0, 2}


def test_who_does_not_read_is_cut_off(hub, monkeypatch):
    monkeypatch.setattr(bus, "MOST_WAITING", 1 << 20)
    for _ in range(4):
        hub.ends[0].sendall(frame("publish", 0, b"c", b"x" * (100 << 10)))
        hub.settle_frames()
    assert set(hub.links) == {0, 1, 2}, "it has some time"
    for _ in range(20):
        hub.ends[0].sendall(frame("publish", 0, b"c", b"x" * (100 << 10)))
        hub.settle_frames()
    assert set(hub.links) == {0}


# ---- what is told before it is acknowledged -------------------------------------------------------------------------------------------


def tell(hub, i, *parts):
    hub.ends[i].sendall(frame(parts[0], i, *parts[1:], to=bus.TOLD))
    hub.settle_frames()


def serving(hub, *numbers):
    for i in numbers:
        tell(hub, i, "hello")
        assert hub.heard(i)[-1] == ["told", i]
    for i in hub.ends:
        hub.heard(i)


def fill(hub, i, sender):
    """Until its socket takes no more."""
    while not hub.waiting[i]:
        hub.ends[sender].sendall(frame("publish", sender, b"c", b"x" * (50 << 10), to=i))
        hub.settle_frames()


def test_a_sender_is_told_when_all_have_it(hub):
    serving(hub, 0, 1, 2)
    tell(hub, 0, "counts", {b"c": 1}, {})
    assert select.select([hub.ends[1]], [], [], 0)[0] and select.select([hub.ends[2]], [], [], 0)[0]
    assert hub.heard(0) == [["told", 0]]
    assert hub.heard(1) == [["counts", 0, {b"c": 1}, {}]] == hub.heard(2)


def test_a_sender_is_not_told_while_one_that_serves_cannot_read_it(hub):
    serving(hub, 0, 1)
    fill(hub, 1, 2)
    tell(hub, 0, "counts", {b"c": 1}, {})
    assert hub.heard(0) == []
    for _ in range(1000):
        hub.ends[1].recv(1 << 20)
        hub.turn([], hub.writers())
        if not hub.waiting[1]:
            break
    assert hub.heard(0) == [["told", 0]]


def test_nobody_waits_for_a_process_that_does_not_serve_yet_or_has_ended(hub):
    serving(hub, 0, 1)
    fill(hub, 2, 1)
    tell(hub, 0, "counts", {b"c": 1}, {})
    assert hub.heard(0) == [["told", 0]]
    fill(hub, 1, 2)
    tell(hub, 0, "counts", {b"c": 2}, {})
    assert hub.heard(0) == []
    hub.leave(1)
    assert hub.heard(0) == [["gone", 1], ["told", 0]]


def test_a_process_that_does_not_read_what_is_to_be_acknowledged_is_cut_off(hub, monkeypatch):
    serving(hub, 0, 1)
    fill(hub, 1, 2)
    tell(hub, 0, "counts", {b"c": 1}, {})
    hub.turn([], [])
    assert 1 in hub.links
    monkeypatch.setattr(bus, "TELL_LIMIT", -1.0)
    hub.turn([], [])
    assert set(hub.links) == {0, 2}
    assert hub.heard(0) == [["gone", 1], ["told", 0]]


def test_a_process_that_reads_slowly_is_not_cut_off(hub, monkeypatch):
    """However much waits before it."""
    serving(hub, 0, 1)
    fill(hub, 1, 2)
    for _ in range(20):
        hub.ends[2].sendall(frame("publish", 2, b"c", b"x" * (50 << 10), to=1))
        hub.settle_frames()
    tell(hub, 0, "counts", {b"c": 1}, {})
    monkeypatch.setattr(bus, "TELL_LIMIT", -1.0)
    hub.ends[1].setblocking(False)
    while hub.tellings:
        with contextlib.suppress(BlockingIOError):
            while hub.ends[1].recv(1 << 20):
                pass
        hub.turn([], [hub.links[1]])
        assert 1 in hub.links
    assert hub.heard(0) == [["told", 0]]


def test_a_successor_is_not_told_what_the_dead_has_said(hub):
    serving(hub, 0, 1)
    fill(hub, 1, 2)
    tell(hub, 0, "counts", {b"c": 1}, {})
    hub.leave(0)
    hub.ends[0].close()
    hub.ends[0] = hub.join(0)
    bus.read_state(hub.ends[0])
    hub.leave(1)
    assert hub.heard(0) == [["gone", 1]]


def test_a_process_that_begins_is_told_the_counts_of_those_that_serve(hub):
    serving(hub, 0, 1)
    tell(hub, 0, "counts", {b"c": 2, b"d": 1}, {b"p*": 1})
    tell(hub, 0, "counts", {b"d": 0}, {b"p*": 3})
    tell(hub, 1, "counts", {b"e": 1}, {})
    tell(hub, 2, "counts", {b"not": 1}, {b"serving": 1})
    end = hub.join(3)
    assert bus.read_state(end)["counts"] == [[0, {b"c": 2}, {b"p*": 3}], [1, {b"e": 1}, {}]]
    hub.leave(0)
    hub.leave(3)
    end.close()
    end = hub.join(3)
    assert bus.read_state(end)["counts"] == [[1, {b"e": 1}, {}]]
    end.close()


# ---- what is kept -------------------------------------------------------------------------------------------------------------------


class Worker:
    """As much of a Server as its Link asks for, with the Link's transport: a socket."""

    def __init__(self, hub, number):
        self.worker, self.settings, self.users, self.monitors = number, {}, {}, {}
        self.executor = self
        self.scripts = Scripts()
        self.paused_until = 0
        self.sock = hub.join(number)
        self.state = bus.read_state(self.sock)
        self.link = bus.Link(self)
        self.link.connection_made(self)

    def write(self, data):
        self.sock.sendall(data)

    def configure(self, changes):
        self.settings.update(changes)

    def take_users(self, changes):
        self.users.update({name: user and user.line for name, user in changes.items()})

    def watch_commands(self):
        pass

    def set(self, **changes):
        self.configure(changes)
        self.link.change("config", changes)

    def hear(self):
        while select.select([self.sock], [], [], 0)[0]:
            self.link.data_received(self.sock.recv(1 << 16))


@pytest.fixture
def workers():
    """(a hub, what makes a worker)"""
    hub, made = Hub({acl.DEFAULT: acl.default_user(b"").line}), []

    def make(number):
        made.append(Worker(hub, number))
        return made[-1]

    yield hub, make
    for sock in [*(worker.sock for worker in made), *hub.readers()]:
        sock.close()


def turn(hub):
    while ready := select.select(hub.readers(), [], [], 0)[0]:
        hub.turn(ready, [])


def test_who_begins_is_told_what_was_changed(workers):
    hub, make = workers
    one, two = make(0), make(1)
    assert one.state == {"config": {}, "users": {b"default": b"user default on nopass ~* &* +@all"}, "counts": []}
    one.set(timeout="7")
    one.link.change("users", {b"bob": b"user bob on", b"eve": b"user eve on"})
    two.link.change("users", {b"eve": None})
    turn(hub)
    two.hear()
    assert two.settings == {"timeout": "7"} and two.users[b"bob"] == b"user bob on resetchannels -@all"
    state = make(2).state
    assert state["config"] == {"timeout": "7"} and set(state["users"]) == {b"default", b"bob"}


def test_what_one_has_said_before_he_died_is_heard(workers):
    hub, make = workers
    one, two = make(0), make(1)
    one.set(timeout="7")
    one.sock.shutdown(socket.SHUT_RDWR)
    one.sock.close()
    two.link.say("publish", b"c", b"m")  # the hub cannot pass it on to the dead, and finds that out first
    hub.turn([hub.links[1]], [])
    hub.leave(0)
    assert make(0).state["config"] == {"timeout": "7"}


@pytest.mark.parametrize("first", [0, 1])
def test_two_that_change_the_same_end_alike(workers, first):
    hub, make = workers
    both = [make(0), make(1)]
    for i, each in enumerate(both):
        each.set(timeout=str(i), maxclients=str(i))
        each.set(timeout=str(10 + i))
    for i in (first, 1 - first):
        hub.turn([hub.links[i]], [])
        both[1 - first].hear()
        assert both[first].settings["timeout"] == str(10 + first)  # what one has set stands till another's later one comes
    for each in both:
        each.hear()
    last = str(11 - first)
    assert [each.settings["timeout"] for each in both] == [last, last] and hub.state["config"]["timeout"] == last
    assert both[0].settings == both[1].settings
    both[first].set(timeout="20")
    turn(hub)
    both[1 - first].hear()
    assert both[1 - first].settings["timeout"] == "20"


# ---- questions ----------------------------------------------------------------------------------------------------------------------


class Wire:
    """A transport that keeps what is said."""

    def __init__(self):
        self.said = []

    def write(self, data):
        self.said += parts_of(data)


def asking(test):
    """Run test(member, wire) in a loop; the member knows workers 0 and 1."""

    async def run():
        member, wire = Member(2, lambda: None), Wire()
        member.connection_made(wire)
        assert wire.said == [["look", 2]]
        member.data_received(frame("hello", 0) + frame("hello", 1))
        result = test(member, wire)
        if result is not None:
            await result

    asyncio.run(run())


def test_a_question_ends_when_all_have_answered():
    def test(member, wire):
        done = []
        member.ask("state", [5], done.append)
        kind, asker, number, part, arguments = wire.said[-1]
        assert (kind, asker, part, arguments) == ("ask", 2, "state", [5])
        member.data_received(frame("answer", 1, number, "b"))
        member.data_received(frame("answer", 1, number, "again"))
        member.data_received(frame("answer", 0, number - 1, "of another question"))
        assert done == []
        member.data_received(frame("answer", 0, number, "a"))
        assert done == [["b", "a"]] and not member.questions

    asking(test)


def test_a_question_does_not_wait_for_who_is_gone():
    def test(member, wire):
        done = []
        member.ask("state", [], done.append)
        member.data_received(frame("answer", 0, wire.said[-1][2], "a") + frame("gone", 1))
        assert done == [["a"]] and set(member.others) == {0}
        member.ask("state", [], done.append)
        member.connection_lost(None)
        assert done == [["a"], []] and not member.others
        member.ask("state", [], done.append)
        assert done == [["a"], [], []]

    asking(test)


def test_a_question_waits_for_who_is_stopped_so_long_and_no_longer(monkeypatch):
    monkeypatch.setattr(bus, "ANSWER_LIMIT", 0.05)

    async def test(member, wire):
        done = asyncio.get_running_loop().create_future()
        member.ask("state", [], done.set_result)
        number = wire.said[-1][2]
        member.data_received(frame("answer", 0, number, "a"))
        assert await asyncio.wait_for(done, 30) == ["a"]
        member.data_received(frame("answer", 1, number, "late"))

    asking(test)


def test_two_lives_of_a_process_do_not_number_their_questions_alike():
    def test(member, wire):
        member.ask("state", [], print)
        number = wire.said[-1][2]
        again = Member(2, lambda: None)
        again.connection_made(wire)
        again.data_received(frame("hello", 0))
        done = []
        again.ask("state", [], done.append)
        again.data_received(frame("answer", 0, number, "to the one before"))
        assert done == []
        for each in (member, again):
            each.connection_lost(None)

    asking(test)
