"""Keys of which each has one writer, which counts: what a key has tells after which of its writes that was.

Write number n sets n; each seventh is a delete. A key may show no state from before the last write that has to be there (its floor), and none
from behind the last that was begun (asked).
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import shmcache
from shmcache import errors


def row(number: int) -> int | None:
    """What a key has after its write of this number."""
    return number if number % 7 else None


def deleted_since(number: int) -> int:
    """The first delete that is not before this write."""
    return -(-number // 7) * 7


class Numbers:
    """Of all keys, shared with children of fork. A key that begins with NUL is the cache's own: it may be missed. more: places behind theirs."""

    def __init__(self, names: Sequence[bytes], more: int = 0) -> None:
        self.names = names
        places = np.frombuffer(mmap.mmap(-1, 4 * 8 * (len(names) + more)), np.int64)
        self.asked, self.floor, self.acked, self.checked = places.reshape(4, -1)

    def fault(self, key: int, found: Any, floor: int | None = None) -> str:
        """What is wrong with what was found under a key, or nothing."""
        least, most = int(self.floor[key]) if floor is None else floor, int(self.asked[key])
        if found is None:
            right = self.names[key][0] == 0 or deleted_since(least) <= most
        else:
            right = type(found) is int and least <= found <= most and row(found) == found
        return "" if right else f"{self.names[key]!r} is {found!r:.60}; {least} has to be there, {most} was begun last"


def attached(name: str, store: Any) -> Any:
    while True:
        try:
            return shmcache.attach(name, store=store)
        except (errors.SegmentNotFound, errors.CapacityError):  # or it is being restored
            time.sleep(0.001)


def work(
    name: str, opened: Callable[[], Any], worker: int, workers: int, numbers: Numbers, wrong: Any, seed: float, *,
    strict: bool = True, share: float = 1.0, pause: float = 0.0,
) -> None:  # fmt: skip
    """A worker's life: it reads each of its keys, then goes on with any of them, and reads each before it writes it, or tries to.

    Args: workers: each has the keys of its remainder. strict: nothing was ever lost, so that what is found may also be counted up in place.
    share: of its keys, which it writes; the others are as an earlier life has left them. pause: seconds after twenty keys.
    """
    rng = random.Random(seed)
    mine = range(worker, len(numbers.names), workers)
    written = set(rng.sample(mine, int(share * len(mine))))
    with contextlib.closing(opened()) as store, attached(name, store) as cache:
        for n, key in enumerate(itertools.chain(rng.sample(mine, len(mine)), (rng.choice(mine) for _ in itertools.repeat(None)))):
            own = numbers.names[key]
            if pause and n % 20 == 0:
                time.sleep(pause)
            try:
                found = None
                try:
                    found = cache.get(own)
                    numbers.checked[key] += 1
                    if fault := numbers.fault(key, found):
                        wrong.append(f"read: {fault}")
                except errors.CapacityError:  # the store is down, and has it, or has not
                    if rng.random() < 0.5:
                        continue
                if key not in written:
                    continue
                number = int(numbers.asked[key]) + 1
                newest = strict and found == number - 1 and own[0] != 0
                if newest and rng.random() < 0.1 and not cache.touch(own):
                    wrong.append(f"touch: {own!r}, which was {found}, is not there")
                numbers.asked[key] = number
                if row(number) is None:
                    cache.delete(own)
                elif newest and rng.random() < 0.2:
                    if (counted := cache.incr(own)) != number:
                        wrong.append(f"incr: {own!r} was {found}, and is {counted}")
                else:
                    cache.set(own, number)
                numbers.floor[key] = number
                numbers.acked[key] += 1
            except errors.CapacityError:  # nobody stores, or logs, just now: not acknowledged
                pass
