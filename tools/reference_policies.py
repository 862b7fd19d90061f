"""Exact LRU and FIFO over objects, sizes ignored: what a replay's hit ratio is held against."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable


def lru_hits(keys: Iterable[int], capacity: int) -> int:
    """Hits of an LRU cache of `capacity` objects, cold at the start, that inserts every miss."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for key in keys:
        if key in held:
            hits += 1
            held.move_to_end(key)
        elif capacity:
            if len(held) >= capacity:
                held.popitem(last=False)
            held[key] = None
    return hits


def fifo_hits(keys: Iterable[int], capacity: int) -> int:
    """Hits of a FIFO cache of `capacity` objects, cold at the start, that inserts every miss."""
    held: set[int] = set()
    order: deque[int] = deque()
    hits = 0
    for key in keys:
        if key in held:
            hits += 1
        elif capacity:
            if len(held) >= capacity:
                held.remove(order.popleft())
            held.add(key)
            order.append(key)
    return hits
