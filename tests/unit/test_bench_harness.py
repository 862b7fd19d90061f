"""The benches' arithmetic: who is run when, and what is divided by what."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import harness


def test_peers_alternate_and_the_first_round_is_dropped():
    order = []
    times = harness.alternate([("a", lambda x: order.append(("a", x))), ("b", lambda x: order.append(("b", x)))], lambda r: [r], 2)
    assert order == [(p, r) for r in range(3) for p in "ab"]
    assert [len(t) for t in times.values()] == [2, 2]


def test_loop_divides_by_the_calls():
    ticks = iter([100, 1100])
    assert harness.loop_ns(lambda _: None, range(10), lambda: next(ticks)) == 100


def test_ratio_is_of_medians():
    s = harness.summary({"shmcache": [1.0, 50.0, 3.0], "peer": [6.0, 6.0, 60.0]})
    assert s["peer"]["ours_over_it"] == 0.5
    assert s["shmcache"]["median_ns"] == 3


def test_fresh_keys_are_new_objects():
    keys = [b"abc", b"def"]
    drawn = harness.fresh(keys, 100, 1)
    assert set(drawn) == set(keys)
    assert len({id(k) for k in drawn}) == 100
