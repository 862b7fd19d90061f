"""How much one call of the store is given: so much that it ends in good time, and no more than the store takes at once. `Size`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shmcache.core._dirty import Item

BYTES = 16 << 20  # of keys and values; a larger row goes alone
GOOD = 0.25  # of the time limit: batches that take less grow
SLOW = 0.5  # of the time limit: once one has failed, batches that take more shrink
ALIKE = 1.3  # times as long: a call takes its time, whatever the number of rows
HOLD = 5.0  # seconds after a batch failed for which none is as large, if a smaller one was stored
LONGEST_HOLD = 3600.0


class Size:
    """Of the next batch: rows, and bytes; a batch has one row at least.

    A batch that fails is sent again in halves (in quarters, if its time was over), whatever the error says: that a packet was too large, or
    that the connection was lost, which may mean the same. If a smaller one is stored, the size was the reason: for HOLD seconds no batch is
    as large as the one that failed, and twice as long each time that one of this size fails again. If a row alone fails, too, the size was
    not the reason: the batches that follow grow to the full size again as fast as they shrank.

    Seconds that do not grow with the rows (a distant database, a slow disk) are no reason to send few: then batches grow, however long
    they take.
    """

    def __init__(self, timeout: float, most: int) -> None:
        """Args: timeout: seconds that a call of the store may take. most: rows."""
        self.timeout, self.most = timeout, most
        self.rows, self.bytes = most, BYTES
        self.failed_rows = self.failed_bytes = 0  # of the smallest batch that failed; 0: none has
        self.hold, self.until = HOLD, 0.0
        # rows and seconds of the last batch that was stored, and of the last one of another size; inf: there was none
        self.last = self.other = most, math.inf

    @property
    def limited(self) -> bool:
        """Has a batch failed, and none of that size been stored since?"""
        return self.failed_rows > 0

    def cut(self, items: list[Item]) -> int:
        """How many of the first of them are the next batch."""
        n = total = 0
        for item in items[: self.rows]:
            total += weight(item)
            if n and total > self.bytes:
                break
            n += 1
        return n

    def failed(self, batch: list[Item], seconds: float, now: float) -> None:
        """This batch failed after so many seconds, at that time (monotonic)."""
        n, total = len(batch), sum(map(weight, batch))
        part = 4 if seconds >= self.timeout else 2  # each of those takes that long
        self.rows, self.bytes = max(1, n // part), max(1, total // part)
        if n == 1:
            self.failed_rows = self.failed_bytes = 0
            return
        if self.limited and now >= self.until:  # it was tried whether more can be stored by now
            self.hold = min(2 * self.hold, LONGEST_HOLD)
        self.failed_rows, self.failed_bytes = n, total
        self.until = now + self.hold

    def stored(self, batch: list[Item], seconds: float, now: float) -> None:
        """This batch was stored; the longest call took so many seconds."""
        n, total = len(batch), sum(map(weight, batch))
        if self.limited and n >= self.failed_rows and total >= self.failed_bytes:
            self.failed_rows = self.failed_bytes = 0
            self.hold = HOLD
        if _differ(n, self.last[0]):
            self.other = self.last
        self.last = n, seconds
        (_, least), (_, longest) = sorted((self.other, self.last))
        alike = _differ(n, self.other[0]) and longest < ALIKE * least  # it takes as long for few rows as for many
        if seconds > SLOW * self.timeout and self.limited and not alike:
            fits = GOOD * self.timeout / seconds
            self.rows, self.bytes = max(1, int(n * fits)), max(1, int(total * fits))
        elif seconds < GOOD * self.timeout or alike or n == 1 or self.other[1] == math.inf:
            if 2 * n > self.rows:  # a batch that is far from full says nothing of a larger one
                self.rows = self._grown(self.rows, self.most, self.failed_rows, now)
            if 2 * total > self.bytes:
                self.bytes = self._grown(self.bytes, BYTES, self.failed_bytes, now)

    def _grown(self, size: int, most: int, failed: int, now: float) -> int:
        if failed and now < self.until:
            most = min(most, max(size, 3 * failed // 4))
        return min(2 * size, most)


def _differ(n: int, m: int) -> bool:
    """Are two numbers of rows so far apart that their seconds tell something?"""
    return 2 * max(n, m) >= 3 * min(n, m)


def weight(item: Item) -> int:
    """Bytes, nearly as a store sends them."""
    return len(item[0]) + len(item[2])
