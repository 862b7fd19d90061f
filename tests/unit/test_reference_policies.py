"""LRU and FIFO by hand, and against the obvious slow way."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from reference_policies import fifo_hits, lru_hits


def slow(keys, capacity, lru):
    held, hits = [], 0
    for k in keys:
        if k in held:
            hits += 1
            if lru:
                held.remove(k)
                held.append(k)
        else:
            held = [*held, k][-capacity:]
    return hits


def test_by_hand():
    assert lru_hits([1, 2, 1, 3, 2], 2) == 1
    assert fifo_hits([1, 2, 1, 3, 1], 2) == 1
    assert lru_hits([1, 2, 1, 3, 1], 2) == 2
    assert lru_hits([1, 1], 0) == fifo_hits([1, 1], 0) == 0


def test_against_the_slow_way():
    rng = random.Random(1)
    for capacity in (1, 2, 5, 20):
        keys = [int(rng.paretovariate(0.7)) % 50 for _ in range(2000)]
        assert lru_hits(keys, capacity) == slow(keys, capacity, True)
        assert fifo_hits(keys, capacity) == slow(keys, capacity, False)
