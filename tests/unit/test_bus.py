"""The bus between the processes of `shmcache serve`: frames in whatever pieces, to whom the hub hands them, and questions that end."""

from __future__ import annotations

import asyncio
import random
import select

import pytest

from shmcache.sidecar import bus
from shmcache.sidecar.bus import ALL, Frames, Hub, Member, frame


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
    hub = Hub()
    hub.ends = {i: hub.join(i) for i in range(3)}

    def turn():
        while ready := select.select(hub.readers(), [], [], 0)[0]:
            hub.turn(ready, hub.writers())

    def heard(i):
        turn()
        data = b""
        while select.select([hub.ends[i]], [], [], 0)[0] and (part := hub.ends[i].recv(65536)):
            data += part
        return parts_of(data)

    hub.settle, hub.heard = turn, heard
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
    hub.settle()
    assert hub.heard(0) == [["gone", 1]] == hub.heard(2)
    assert set(hub.links) == {0, 2}


def test_who_does_not_read_is_cut_off(hub, monkeypatch):
    monkeypatch.setattr(bus, "MOST_WAITING", 1 << 20)
    for _ in range(4):
        hub.ends[0].sendall(frame("publish", 0, b"c", b"x" * (100 << 10)))
        hub.settle()
    assert set(hub.links) == {0, 1, 2}, "it has some time"
    for _ in range(20):
        hub.ends[0].sendall(frame("publish", 0, b"c", b"x" * (100 << 10)))
        hub.settle()
    assert set(hub.links) == {0}


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
