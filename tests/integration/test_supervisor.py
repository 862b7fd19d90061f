"""The supervisor as a process: one per segment, gone in a second, and what it does for the writers."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

import shmcache
from shmcache import errors
from shmcache.core import _sweep
from shmcache.supervisor.loop import Supervisor


def eventually(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)  # between two looks at the condition


@pytest.fixture
def supervised(make):
    cache = make("16M")
    child = shmcache.supervise(cache.name)
    yield cache, child
    child.terminate()
    child.wait(30)


def test_exactly_one(supervised):
    cache, child = supervised
    state = cache.stats()["supervisor"]
    assert state["alive"]
    assert state["pid"] == child.pid
    second = subprocess.run([sys.executable, "-m", "shmcache.cli", "supervise", cache.name], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert str(child.pid) in second.stderr
    with pytest.raises(errors.SupervisorRunning, match=str(child.pid)):
        shmcache.supervise(cache.name)
    with pytest.raises(errors.SupervisorRunning):
        Supervisor(cache)


def test_sigterm_ends_it_and_leaves_no_name(supervised):
    cache, child = supervised
    child.terminate()
    assert child.wait(10) == 0
    assert cache.stats()["supervisor"] == {"pid": None, "alive": False, "heartbeat_age_s": None}


def test_a_killed_one_can_be_started_again_at_once(supervised):
    cache, child = supervised
    child.kill()
    child.wait()
    assert not cache.supervisor()["alive"]
    assert cache.supervisor()["pid"] == child.pid
    again = shmcache.supervise(cache.name)
    assert cache.supervisor()["pid"] == again.pid
    again.terminate()
    assert again.wait(10) == 0


def test_it_ends_with_its_parent(make):
    cache = make()
    code = f"import shmcache, os; print(shmcache.supervise({cache.name!r}).pid, flush=True); os._exit(0)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(out.stdout)
    eventually(lambda: not cache.supervisor()["alive"])


def test_creates_the_segment(name):
    p = subprocess.Popen([sys.executable, "-m", "shmcache.cli", "supervise", name, "--size", "8M"], stderr=subprocess.PIPE)
    try:
        assert p.stderr.readline() == f"supervising {name}\n".encode()
        with shmcache.attach(name) as cache:
            assert cache.stats()["size_bytes"] == 8 << 20
            assert cache.supervisor()["pid"] == p.pid
    finally:
        p.send_signal(signal.SIGTERM)
        assert p.wait(30) == 0
        p.stderr.close()


def test_no_segment(name):
    out = subprocess.run([sys.executable, "-m", "shmcache.cli", "supervise", name], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert "no segment" in out.stderr


def test_expired_items_are_freed_though_nobody_asks(supervised):
    cache, _ = supervised
    for i in range(2000):
        cache.set(b"%d" % i, b"v", ttl=0.05)
    cache.set(b"stays", b"v")
    eventually(lambda: cache.counters()["expirations"] == 2000)
    assert len(cache) == 1
    assert cache.verify() == []


def test_room_is_kept_free_ahead_of_writers(supervised):
    cache, _ = supervised
    for i in range(200_000):
        cache.set(b"%d" % i, bytes(100))
    eventually(lambda: max(c["free"] for c in cache.slab_classes()[0]) > 100)
    stats = cache.stats()
    assert stats["evictions"] > stats["inline_evictions"]
    assert cache.verify() == []


def test_what_a_killed_process_had_in_hand_is_settled(supervised):
    cache, _ = supervised
    code = f"import shmcache, os, signal; c = shmcache.attach({cache.name!r}); c.set('k', b'v'); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], check=False)
    eventually(lambda: cache.counters()["settled"] >= 3)  # a batch of four, one of them published
    assert cache["k"] == b"v"


def test_make_room_by_hand(make):
    cache = make("8M")
    i = 0
    while cache.counters()["evictions"] == 0:
        cache.set(b"%d" % i, bytes(100))
        i += 1
    hold = _sweep.Supervision(cache)
    cls = max(range(len(cache.slab_classes()[0])), key=lambda c: cache.slab_classes()[0][c]["live"])
    before = cache.counters()
    items = len(cache)
    assert hold.make_room(cls, 500) == (500, 0)
    now = cache.counters()
    assert now["evictions"] - before["evictions"] == 500
    assert now["inline_evictions"] == before["inline_evictions"]
    assert len(cache) == items - 500
    with pytest.raises(errors.UsageError):
        hold.make_room(99, 1)
    hold.end()
    assert not cache.supervisor()["alive"]


class Watched:
    """A supervisor's hold that notes when it sweeps from the first page, and how long it is to sleep; it stops the supervisor after so many sweeps."""

    def __init__(self, supervisor, sweeps):
        self.hold, self.supervisor, self.left, self.asleep = supervisor.hold, supervisor, sweeps, []

    def __getattr__(self, name):
        return getattr(self.hold, name)

    def sweep(self, first, end, spares):
        if first == 0:
            self.asleep.append(0.0)
            self.left -= 1
            self.supervisor.stopping = self.left == 0
        return self.hold.sweep(first, end, spares)

    def sleep(self, seconds):
        self.asleep[-1] += seconds
        return self.hold.sleep(seconds)


def test_what_has_expired_in_a_small_segment_waits_half_a_second_at_most(make):
    """Though nobody asks for it: Redis' own tests, and its users, look at DBSIZE a second after a key was set that lives for half of one."""
    cache = make("8M")
    cache.set("k", "v", ttl=0.2)
    supervisor = Supervisor(cache)
    supervisor.hold = watched = Watched(supervisor, 6)
    supervisor.run()
    assert max(watched.asleep) <= 0.5
    assert len(cache) == 0
