"""Signals that come again and again beside a process that is stopped with a lock in its hand: every operation still ends at its limit."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import numpy as np
import pytest

from shmcache import errors

LIMIT = 0.2  # seconds
WEDGED = 5.0  # far more than an operation may take that waits for several locks on a busy machine
TIMERS = {"0.1 s": 0.1, "5 ms": 0.005}  # seconds between two signals


class Wedged(BaseException):
    """What the handler raises in a call that goes on and on."""


@contextlib.contextmanager
def recurring(seconds):
    """SIGALRM every so many seconds, with a handler in Python, which the call that it interrupts has to run."""
    began = time.monotonic()
    ran = []

    def handler(*args):
        ran.append(time.monotonic())
        if ran[-1] - began > WEDGED:
            raise Wedged

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield ran
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def stopped_holder(cache, stripes=1):
    """A stopped process that holds the first stripes: the words that say so."""
    seg = cache.views(writable=True)
    pid = os.fork()
    if pid == 0:
        try:
            cache.get("takes a row")
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(1)
    try:
        os.waitpid(pid, os.WUNTRACED)
        row = int(np.flatnonzero(seg.rows["pid"] == pid)[0])
        seg.stripes["word"][:stripes] = int(seg.rows["gen"][row]) << 16 | row + 1
        yield seg.stripes
    finally:
        del seg
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def never(*args):
    pytest.fail("computed, though nobody could say that this process computes")


class Prepared:
    """What the operations need from before the stripe was taken."""

    def __init__(self, cache):
        cache["n"] = 1
        cache["v"] = b"value"
        cache["large"] = bytes(300_000)
        self.version = cache.gets("v")[1]
        self.lease = cache.get_lease("leased")
        self.held = cache.lock("held")
        self.held.acquire()
        self.space = cache.namespace("space")
        self.space["v"] = b"value"
        self.compute = cache.memoize(ttl=60)(never)


OPERATIONS = {
    "set": lambda c, p: c.set("v", b"new"),
    "set, new key": lambda c, p: c.set("new", b"new"),
    "set, several pages": lambda c, p: c.set("new", bytes(200_000)),
    "set, already expired": lambda c, p: c.set("v", b"new", 0),
    "set, tags": lambda c, p: c.set("v", b"new", tags=("t",)),
    "item": lambda c, p: c.__setitem__("v", b"new"),
    "set_many": lambda c, p: c.set_many({"v": 1, "new": 2}),
    "add": lambda c, p: c.add("new", b"new"),
    "replace": lambda c, p: c.replace("v", b"new"),
    "cas": lambda c, p: c.cas("v", b"new", p.version),
    "delete": lambda c, p: c.delete("v"),
    "delete, several pages": lambda c, p: c.delete("large"),
    "del item": lambda c, p: c.__delitem__("v"),
    "delete_many": lambda c, p: c.delete_many(["v", "n"]),
    "discard": lambda c, p: c.discard("v"),
    "pop": lambda c, p: c.pop("v"),
    "incr": lambda c, p: c.incr("n"),
    "incr, new key": lambda c, p: c.incr("new", default=0),
    "decr": lambda c, p: c.decr("n"),
    "touch": lambda c, p: c.touch("v", 60),
    "touch, at once": lambda c, p: c.touch("v", 0),
    "expire": lambda c, p: c.expire("v", 60),
    "persist": lambda c, p: c.persist("v"),
    "get_or_set": lambda c, p: c.get_or_set("new", never),
    "memoize": lambda c, p: p.compute(1),
    "get_lease": lambda c, p: c.get_lease("new"),
    "fill": lambda c, p: c.fill(p.lease, b"new"),
    "release": lambda c, p: c.release(p.lease),
    "lock, acquire": lambda c, p: c.lock("free").acquire(),
    "lock, with": lambda c, p: c.lock("free").__enter__(),
    "lock, release": lambda c, p: p.held.release(),
    "invalidate_tag": lambda c, p: c.invalidate_tag("t"),
    "namespace, set": lambda c, p: p.space.set("v", b"new"),
    "namespace, delete": lambda c, p: p.space.delete("v"),
    "namespace, clear": lambda c, p: p.space.clear(),
}
NO_LOCK = {
    "get": lambda c, p: c.get("v") == b"value",
    "gets": lambda c, p: c.gets("v")[0] == b"value",
    "get, a miss": lambda c, p: c.get("new") is None,
    "get_many": lambda c, p: c.get_many(["v", "new"]) == {"v": b"value"},
    "in": lambda c, p: "v" in c,
    "ttl": lambda c, p: c.ttl("v") > 0,
    "scan": lambda c, p: set(c.scan()) >= {b"v", b"n", b"large"},
    "namespace, get": lambda c, p: p.space.get("v") == b"value",
    "len": lambda c, p: len(c) >= 3,
    "clear": lambda c, p: c.clear() is None and "v" not in c,
}


@pytest.mark.parametrize("seconds", TIMERS.values(), ids=TIMERS)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_signals_do_not_put_the_limit_off(make, operation, seconds):
    cache = make(lock_limit=LIMIT, stripes=1)
    prepared = Prepared(cache)
    with stopped_holder(cache):
        with recurring(seconds) as ran, pytest.raises(errors.StripeBusy):
            operation(cache, prepared)
        assert ran, "a signal came while it waited"
        assert cache.get("n") == 1 and cache.get("v") == b"value" and cache.get("new") is None, "nothing was changed"
        assert cache.get("large") == bytes(300_000) and prepared.space.get("v") == b"value"


@pytest.mark.parametrize("operation", NO_LOCK.values(), ids=NO_LOCK)
def test_what_needs_no_lock_is_answered(make, operation):
    cache = make(lock_limit=LIMIT, stripes=1)
    prepared = Prepared(cache)
    with stopped_holder(cache), recurring(0.005):
        assert operation(cache, prepared)


@pytest.mark.parametrize("seconds", TIMERS.values(), ids=TIMERS)
def test_signals_do_not_hide_from_others_that_it_is_in_vain(make, seconds):
    """Who has waited for the whole limit notes it, however many waits signals have made of that."""
    cache = make(lock_limit=LIMIT, stripes=1)
    with stopped_holder(cache) as stripes:
        with recurring(seconds), pytest.raises(errors.StripeBusy):
            cache.set("v", b"new")
        assert stripes["stalled"][0] and stripes["stalled"][0] << np.uint64(1) == stripes["word"][0] << np.uint64(1), "but for WAIT"
        del stripes


@pytest.mark.parametrize("held", [16, 64])
def test_a_big_value_finds_no_page_beside_stopped_holders(make, held):
    """Of each page some item's stripe is held: it is said at the limit, and handlers run then at the latest."""
    cache = make("8M", lock_limit=LIMIT, stripes=64)
    for i in range(12_000):
        cache.set(b"k%d" % i, b"x" * (50 + 97 * (i % 60)))
    with stopped_holder(cache, held), recurring(0.02) as ran:
        began = time.monotonic()
        for i in range(2):
            with contextlib.suppress(errors.StripeBusy):
                cache.set(b"new%d" % i, b"y" * 700_000)
        took = time.monotonic() - began
    assert took < WEDGED
    assert len(ran) >= 2
    assert cache.set(b"new", b"y" * 700_000) is None and cache.get(b"new") == b"y" * 700_000
    assert cache.verify() == []
