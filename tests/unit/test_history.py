"""The checker of histories accepts what a register may have done, and nothing else."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.stress import history
from tests.stress.history import ADD, CAS, CLEAR, COUNT, DELETE, GET, GETS, IN, INCR, MS, POP, REPLACE, SET, TOUCH, Op, State, check


def op(called, returned, kind, value=0, **more):
    return Op(called * 10 * MS, returned * 10 * MS, kind, value, **more)


A, B = 0xA, 0xB
LINEARIZABLE = {
    "nothing": [],
    "in turn": [op(0, 1, SET, A), op(2, 3, GET, A), op(4, 5, DELETE), op(6, 7, GET, 0)],
    "read during the write, old": [op(0, 1, SET, A), op(2, 9, SET, B), op(3, 4, GET, A), op(5, 6, GET, B)],
    "overlapping writes, the first wins": [op(0, 5, SET, A), op(1, 4, SET, B), op(6, 7, GET, A)],
    "overlapping writes, the second wins": [op(0, 5, SET, A), op(1, 4, SET, B), op(6, 7, GET, B)],
    "one of two adds": [op(0, 5, ADD, A), op(1, 6, ADD, B, done=False), op(7, 8, GET, A)],
    "cas against clear, cas first": [op(0, 1, SET, A), op(2, 3, GETS, A, version=7), op(4, 9, CLEAR), op(5, 8, CAS, B, seen=A, version=7), op(10, 11, GET)],
    "cas is refused after clear": [op(0, 1, SET, A), op(2, 3, GETS, A, version=7), op(4, 5, CLEAR), op(6, 7, CAS, B, seen=A, version=7, done=False)],
    "cas is refused after touch": [op(0, 1, SET, A), op(2, 3, GETS, A, version=7), op(4, 5, TOUCH), op(6, 7, CAS, B, seen=A, version=7, done=False), op(8, 9, GET, A)],
    "counted by two": [op(0, 1, SET, 16), op(2, 6, INCR, 18), op(3, 5, INCR, 17), op(7, 8, GET, 18)],
    "counted from a default": [op(0, 5, COUNT, 16, seen=16), op(1, 6, COUNT, 17, seen=32)],
    "one of two pops": [op(0, 1, SET, A), op(2, 5, POP, A), op(3, 6, POP, 0)],
    "expired": [op(0, 1, SET, A, ttl_ms=100), op(2, 3, GET, A), op(11, 12, GET, 0), op(13, 14, ADD, B)],
    "expires while asked": [op(0, 1, SET, A, ttl_ms=100), op(9, 11, GET, A), op(9, 12, GET, 0)],
    "a cas in time, read behind it": [op(0, 1, SET, A, ttl_ms=100), op(2, 3, GETS, A, version=7), op(9, 15, CAS, B, seen=A, version=7), op(12, 13, GET), op(16, 17, GET, B)],
    "touched in time": [op(0, 1, SET, A, ttl_ms=100), op(2, 3, TOUCH, ttl_ms=1000), op(50, 51, GET, A)],
    "a time comes before its version": [
        op(0, 1, SET, A, ttl_ms=100), op(2, 30, TOUCH), op(3, 4, GETS, A, version=7), op(20, 21, GETS, A, version=7),
        op(5, 31, CAS, B, seen=A, version=7, done=False), op(32, 33, GETS, A, version=8),
    ],
    "a failed write may have been done": [op(0, 1, SET, A), op(2, 3, SET, B, unsure=True), op(4, 5, GET, B)],
    "or not": [op(0, 1, SET, A), op(2, 3, SET, B, unsure=True), op(4, 5, GET, A)],
    "a number comes before its version": [op(0, 1, SET, 16), op(2, 3, GETS, 16, version=7, counter=True), op(4, 9, INCR, 17), op(5, 6, GETS, 17, version=7, counter=True)],
}  # fmt: skip
NOT_LINEARIZABLE = {
    "never written": [op(0, 1, SET, A), op(2, 3, GET, B)],
    "an old value": [op(0, 1, SET, A), op(2, 3, SET, B), op(4, 5, GET, A)],
    "new, then old": [op(0, 1, SET, A), op(2, 20, SET, B), op(3, 4, GET, B), op(5, 6, GET, A)],
    "lost": [op(0, 1, SET, A), op(2, 3, GET, 0)],
    "lost, and back": [op(0, 1, SET, A), op(2, 3, IN, 0), op(4, 5, IN, 1)],
    "back after a delete": [op(0, 1, SET, A), op(2, 3, DELETE), op(4, 5, GET, A)],
    "back after a clear": [op(0, 1, SET, A), op(2, 3, CLEAR), op(4, 5, IN, 1)],
    "two adds": [op(0, 5, ADD, A), op(1, 6, ADD, B)],
    "an add that nothing was in the way of": [op(0, 1, ADD, A, done=False)],
    "replaced what was not there": [op(0, 1, REPLACE, A)],
    "replaced what was cleared": [op(0, 1, SET, A), op(2, 5, CLEAR), op(6, 7, REPLACE, B)],
    "cas after a clear that has returned": [op(0, 1, SET, A), op(2, 3, GETS, A, version=7), op(4, 5, CLEAR), op(4, 9, CAS, B, seen=A, version=7), op(10, 11, GET, B)],
    "cas over another write": [op(0, 1, SET, A), op(2, 3, GETS, A, version=7), op(4, 5, SET, B), op(6, 7, CAS, 0xC, seen=A, version=7)],
    "cas over a touch": [op(0, 1, SET, A), op(2, 3, GETS, A, version=7), op(4, 5, TOUCH), op(6, 7, CAS, B, seen=A, version=7)],
    "cas refused for nothing": [op(0, 1, SET, A), op(2, 3, GETS, A, version=7), op(4, 5, CAS, B, seen=A, version=7, done=False)],
    "two cas of one version": [op(0, 1, SET, A), op(2, 3, GETS, A, version=7), op(4, 8, CAS, B, seen=A, version=7), op(5, 9, CAS, 0xC, seen=A, version=7)],
    "a version that goes back": [op(0, 1, SET, A), op(2, 3, GETS, A, version=7), op(4, 5, SET, B), op(6, 7, GETS, B, version=6)],
    "one version for two values": [op(0, 1, SET, A), op(2, 3, GETS, A, version=7), op(4, 5, SET, B), op(6, 7, GETS, B, version=7)],
    "a count that is lost": [op(0, 1, SET, 16), op(2, 6, INCR, 17), op(3, 5, INCR, 17)],
    "counted what was deleted": [op(0, 1, SET, 16), op(2, 3, DELETE), op(4, 5, INCR, 17)],
    "two defaults": [op(0, 5, COUNT, 16, seen=16), op(1, 6, COUNT, 32, seen=32)],
    "both pop it": [op(0, 1, SET, A), op(2, 5, POP, A), op(3, 6, POP, A)],
    "both delete it": [op(0, 1, SET, A), op(2, 5, DELETE), op(3, 6, DELETE)],
    "given after its time": [op(0, 1, SET, A, ttl_ms=100), op(13, 14, GET, A)],
    "gone before its time": [op(0, 1, SET, A, ttl_ms=1000), op(2, 3, GET, 0)],
    "a cas behind its time": [op(0, 1, SET, A, ttl_ms=100), op(2, 3, GETS, A, version=7), op(13, 15, CAS, B, seen=A, version=7)],
    "the version from before a touch that has returned": [
        op(0, 1, SET, A), op(2, 3, GETS, A, version=7), op(4, 5, TOUCH), op(6, 7, GETS, A, version=7),
    ],
    "a cas with it": [
        op(0, 1, SET, A, ttl_ms=100), op(2, 3, GETS, A, version=7), op(4, 30, TOUCH), op(20, 21, GETS, A, version=7),
        op(31, 32, CAS, B, seen=A, version=7),
    ],
    "missed though it was persisted in time": [op(0, 1, SET, A, ttl_ms=100), op(3, 15, GET), op(4, 5, TOUCH), op(16, 17, GET, A)],
    "expired though it was touched": [op(0, 1, SET, A, ttl_ms=100), op(2, 3, TOUCH), op(50, 51, GET, 0)],
    "back after its time": [op(0, 1, SET, A, ttl_ms=100), op(9, 12, GET, 0), op(13, 14, TOUCH)],
    "a refused write was done": [op(0, 1, SET, A), op(2, 3, ADD, B, done=False), op(4, 5, GET, B)],
    "a failed write is both": [op(0, 1, SET, A), op(2, 3, SET, B, unsure=True), op(4, 5, GET, A), op(6, 7, GET, B)],
}  # fmt: skip
BY_EVICTION = {"lost", "two adds", "two defaults", "cas refused for nothing", "gone before its time", "expired though it was touched"}
BACK = {
    "evicted, and back": [op(0, 1, SET, A), op(2, 3, GET, 0), op(4, 5, GET, A)],
    "evicted, then replaced": [op(0, 1, SET, A), op(2, 3, GET, 0), op(4, 5, REPLACE, B)],
    "evicted, then counted": [op(0, 1, SET, 16), op(2, 3, IN, 0), op(4, 5, INCR, 17)],
    "evicted, then cas": [op(0, 1, SET, A), op(2, 3, GETS, A, version=7), op(4, 5, GETS, 0), op(6, 7, CAS, B, seen=A, version=7)],
}  # fmt: skip


@pytest.mark.parametrize("may_vanish", [False, True])
@pytest.mark.parametrize("events", LINEARIZABLE.values(), ids=LINEARIZABLE)
def test_what_a_register_may_do_is_accepted(events, may_vanish):
    assert check(events, may_vanish) is None


@pytest.mark.parametrize("events", NOT_LINEARIZABLE.values(), ids=NOT_LINEARIZABLE)
def test_what_no_register_does_is_refused(events):
    assert check(events) is not None


@pytest.mark.parametrize("events", [*NOT_LINEARIZABLE.items(), *BACK.items()], ids=lambda item: item[0])
def test_an_eviction_explains_a_miss_and_nothing_else(events):
    name, history_ = events
    assert (check(history_, may_vanish=True) is None) == (name in BY_EVICTION)


def test_the_answer_that_nothing_explains_is_named():
    events = [op(0, 1, SET, A), op(2, 3, SET, B), op(4, 5, GET, A, worker=3), op(6, 7, GET, B)]
    assert check(events) == events[2]
    assert "worker 3: get value=0xa" in str(events[2])


def explained(events, may_vanish):
    """The definition, word for word: is there an order that keeps to time and in which each answer is right? Instants within it are not asked
    for, so none of these operations has a ttl."""
    for order in itertools.permutations(events):
        if any(later.returned < earlier.called for earlier, later in itertools.combinations(order, 2)):
            continue
        states = {State()}
        for one in order:
            states = {then for state in states for then in history.step(state, one, may_vanish, one.returned)}
        if states:
            return True
    return False


@pytest.mark.parametrize("may_vanish", [False, True])
def test_the_search_agrees_with_the_definition(may_vanish):
    rng = random.Random(5)
    seen = set()
    for _ in range(1500):
        events = []
        for i in range(rng.randint(2, 5)):
            called = rng.randrange(10)
            kind = rng.choice((GET, GET, SET, SET, ADD, CAS, INCR, DELETE, CLEAR, POP, REPLACE))
            value = rng.choice((16, 17, 18)) if kind in (GET, POP, INCR) else 16 + i
            events.append(Op(called, called + rng.randrange(6), kind, value * (kind != GET or rng.random() < 0.8), done=rng.random() < 0.7, seen=16, version=7))
        accepted = check(events, may_vanish) is None
        assert accepted == explained(events, may_vanish), events
        seen.add(accepted)
    assert seen == {True, False}
