"""Subscriptions of `shmcache serve` with several event loops: acknowledged means known to all of them. tests/stress/published.py is the long form."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import threading

import pytest
import uvloop

from shmcache.sidecar import bus
from shmcache.sidecar.server import Server
from tests.integration.service import LIMIT
from tests.redis.resp import CLOSED, Connection, encode
from tests.stress import published

SHORT = 0.3  # seconds in which nothing is to come


@pytest.mark.parametrize("workers", [2, 3])
def test_nothing_is_lost_after_an_acknowledged_subscription(serve, workers):
    """Event loops that are busy, stopped meanwhile, killed meanwhile."""
    service = serve("--workers", str(workers))
    found = published.run(service.port, workers, rounds=60, busy_processes=1, stop_every=20, kill_every=25)
    assert found["first"] == []


@pytest.fixture
def loops(serve):
    """(a service with two event loops, its connections by loop)"""
    service = serve("--workers", "2")
    return service, published.Loops(service.port, 2)


@contextlib.contextmanager
def stopped(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def is_silent(connection):
    return not select.select([connection.socket], [], [], SHORT)[0]


def test_what_follows_a_subscription_in_a_pipeline_is_not_done_before_it_is_known(loops):
    """A publisher elsewhere may take what follows as the sign that somebody listens."""
    service, by_loop = loops
    (first, _), (second, _) = by_loop.idle.values()
    first.call(b"HELLO", b"3")
    with stopped(service.process.pid):  # who hands on what the event loops tell each other
        first.send(encode((b"SUBSCRIBE", b"news")) + encode((b"PING",)) + encode((b"SET", b"ready", b"1")) + encode((b"PUBLISH", b"news", b"mine")))
        assert is_silent(first)
        assert second.call(b"EXISTS", b"ready") == b":0\r\n"
    assert [first.reply() for _ in range(5)] == [
        b">3\r\n$9\r\nsubscribe\r\n$4\r\nnews\r\n:1\r\n", b"+PONG\r\n", b"+OK\r\n", b">3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$4\r\nmine\r\n", b":1\r\n",
    ]  # fmt: skip
    assert second.call(b"EXISTS", b"ready") == b":1\r\n"
    assert second.call(b"PUBLISH", b"news", b"x") == b":1\r\n"


def test_what_a_pause_keeps_does_not_keep_the_acknowledgement(loops):
    _, by_loop = loops
    (first, _), (second, _) = by_loop.idle.values()
    first.call(b"HELLO", b"3")
    assert second.call(b"CLIENT", b"PAUSE", b"600000", b"WRITE") == b"+OK\r\n"
    first.send(encode((b"SUBSCRIBE", b"news")) + encode((b"SET", b"k", b"v")))
    assert first.reply() == b">3\r\n$9\r\nsubscribe\r\n$4\r\nnews\r\n:1\r\n"
    assert is_silent(first)
    assert second.call(b"CLIENT", b"UNPAUSE") == b"+OK\r\n"
    assert first.reply() == b"+OK\r\n"


def test_what_is_published_meanwhile_comes_behind_the_acknowledgement(loops):
    service, by_loop = loops
    (first, neighbour), _ = by_loop.idle.values()
    with stopped(service.process.pid):
        first.send(encode((b"SUBSCRIBE", b"news")))
        assert is_silent(first)
        assert neighbour.call(b"PUBLISH", b"news", b"x") == b":1\r\n"
        assert is_silent(first)
    assert first.reply() == b"*3\r\n$9\r\nsubscribe\r\n$4\r\nnews\r\n:1\r\n"
    assert first.reply() == b"*3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$1\r\nx\r\n"


def test_a_thousand_subscriptions_in_a_pipeline_do_not_wait_for_each_other(loops):
    _, by_loop = loops
    (first, _), (second, _) = by_loop.idle.values()
    n = 1000
    first.send(b"".join(encode((b"SUBSCRIBE", b"c%d" % i)) for i in range(n)))
    for i in range(n):
        assert first.reply().endswith(b":%d\r\n" % (i + 1))
    assert second.call(b"PUBSUB", b"CHANNELS").startswith(b"*1000\r\n")
    first.send(encode((b"UNSUBSCRIBE",)))
    for i in range(n):
        assert first.reply().endswith(b":%d\r\n" % (n - i - 1))
    assert second.call(b"PUBSUB", b"CHANNELS") == b"*0\r\n"


@pytest.mark.parametrize("how", ["reset", "quit", "kill", "kill by another loop", "user is deleted"])
def test_an_end_that_was_acknowledged_is_not_counted(loops, how):
    service, by_loop = loops
    (first, neighbour), (second, admin) = by_loop.idle.values()
    if how == "user is deleted":
        admin.call(b"ACL", b"SETUSER", b"bob", b"on", b"nopass", b"~*", b"&*", b"+@all")
    for i in range(20):
        channel = b"c%d" % i
        listener = Connection(("127.0.0.1", service.port), LIMIT) if how != "reset" else first
        if how == "user is deleted":
            admin.call(b"ACL", b"SETUSER", b"bob", b"on", b"nopass", b"~*", b"&*", b"+@all")
            assert listener.call(b"AUTH", b"bob", b"x") == b"+OK\r\n"
        number = listener.call(b"CLIENT", b"ID")[1:-2]
        publisher = second if published.loop_of(listener) == published.loop_of(first) else neighbour
        listener.call(b"PSUBSCRIBE", channel + b"*")
        listener.call(b"SUBSCRIBE", channel)
        assert publisher.call(b"PUBLISH", channel, b"x") == b":2\r\n"
        for _ in range(2):
            listener.reply()
        if how == "reset":
            assert listener.call(b"RESET") == b"+RESET\r\n"
        elif how == "quit":
            assert listener.call(b"QUIT") == b"+OK\r\n"
        elif how == "user is deleted":
            assert admin.call(b"ACL", b"DELUSER", b"bob") == b":1\r\n"
        else:
            assert (publisher if "other" in how else admin).call(b"CLIENT", b"KILL", b"ID", number) == b":1\r\n"
        assert publisher.call(b"PUBLISH", channel, b"x") == b":0\r\n"
        assert publisher.call(b"PUBSUB", b"NUMPAT") == b":0\r\n"
        if how != "reset":
            listener.close()


def test_a_stopped_event_loop_is_not_waited_for(loops):
    _, by_loop = loops
    (_, (first, _)), (other, _) = by_loop.idle.items()
    with stopped(other):
        for i in range(100):
            assert b"subscribe" in first.call(b"SUBSCRIBE", b"c%d" % i)


def test_with_one_event_loop_a_subscription_waits_for_nobody(serve):
    service = serve("--workers", "1")
    first = Connection(("127.0.0.1", service.port), LIMIT)
    with stopped(service.process.pid):
        assert b"subscribe" in first.call(b"SUBSCRIBE", b"news")
    first.close()


# ---- the parent does not run: an event loop in this process, whose hub is a thread's ------------------------------------------------


class Hubs(threading.Thread):
    """Turns a hub until `ended`; not while `halted`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.hub, self.halted, self.ended = bus.Hub({}), threading.Event(), threading.Event()
        self.link = self.hub.join(0)

    def run(self):
        while not self.ended.is_set():
            ready, writable, _ = select.select(self.hub.readers(), self.hub.writers(), [], 0.01)
            if not self.halted.is_set():
                self.hub.turn(ready, writable)


@pytest.fixture
def halting(make, name, monkeypatch):
    """(the hub's thread, a connection to an event loop that knows of others)"""
    monkeypatch.setattr(bus, "UNTOLD_LIMIT", 0.5)
    make()
    hub, started = Hubs(), threading.Event()
    hub.start()
    listening = socket.create_server(("127.0.0.1", 0))
    port, ends = listening.getsockname()[1], []

    async def serve():
        bus.read_state(hub.link)
        server, end = Server(name, of_workers=2), asyncio.Event()
        await server.start(sockets=[listening], link=hub.link)
        ends.append((asyncio.get_running_loop(), end))
        started.set()
        await end.wait()
        await server.stop()

    thread = threading.Thread(target=uvloop.run, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(LIMIT)
    client = Connection(("127.0.0.1", port), LIMIT)
    yield hub, client
    client.close()
    ((loop, end),) = ends
    loop.call_soon_threadsafe(end.set)
    thread.join(LIMIT)
    hub.ended.set()
    hub.join(LIMIT)
    hub.hub.leave(0)


def test_a_subscription_of_which_nobody_can_be_told_is_not_acknowledged(halting):
    hub, client = halting
    assert b"subscribe" in client.call(b"SUBSCRIBE", b"c")
    client.call(b"RESET")
    hub.halted.set()
    client.send(encode((b"SUBSCRIBE", b"news")))
    assert client.reply() == CLOSED


def test_what_has_not_to_be_told_goes_on(halting):
    hub, client = halting
    hub.halted.set()
    assert client.call(b"SET", b"k", b"v") == b"+OK\r\n"
    assert client.call(b"PUBLISH", b"c", b"m") == b":0\r\n"


def test_an_event_loop_that_was_cut_off_does_not_count(halting):
    hub, client = halting
    assert client.call(b"PUBLISH", b"c", b"m") == b":0\r\n"
    hub.ended.set()
    hub.join(LIMIT)
    hub.hub.cut(0)
    assert client.call(b"PUBLISH", b"c", b"m").startswith(b"-ERR this event loop was cut off")
