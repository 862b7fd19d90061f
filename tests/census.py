"""What a segment's databases hold, by a look at each slot: what their counts are held against."""

from __future__ import annotations

from typing import Any

import numpy as np

import shmcache

ADDRESS = (1 << 48) - 1
OTHERS = b"\0ns\0db:"
CLAIM = 2  # layout.pxd, FLAG_CLAIM


def slots(cache: shmcache.Cache) -> np.ndarray[Any, Any]:
    """All that name an item."""
    buckets, overflow = cache.segment.buckets, cache.segment.overflow
    chained = []
    for link in buckets["overflow"][buckets["overflow"] != 0]:
        while link:
            chained.append(int(link) - 1)
            link = int(overflow["next"][chained[-1]])
    words = np.concatenate((buckets["slot"].ravel(), overflow["slot"][chained].ravel()))
    return words[words != 0]


def sizes(cache: shmcache.Cache) -> dict[int, tuple[int, int]]:
    """{database: (items, those of them that expire)} of those that have any, as Executor.sizes()."""
    at = (slots(cache) & ADDRESS).astype(np.int64) * 16
    places = at[:, None] + np.arange(80)  # of an item's header, and of the first bytes of its key, which the segment's last item may not have
    heads = cache.segment.bytes[np.minimum(places, len(cache.segment.bytes) - 1)]
    items = np.ascontiguousarray(heads[:, :48]).view(cache.segment.items(0).dtype)[:, 0]
    expiring = (items["expiry_ms"] != 0) & (items["flags"] & CLAIM == 0)
    others = (heads[:, 48:55] == np.frombuffer(OTHERS, np.uint8)).all(axis=1) & (items["key_bytes"] >= len(OTHERS))
    now = items["epoch"] == cache.segment.header["epoch"]
    found = {0: (int((now & ~others).sum()), int((now & ~others & expiring).sum()))}
    for d in range(1, 16):
        generation = cache.get(OTHERS + b"%d" % d)
        if generation is not None:
            prefix = OTHERS + b"%d\0" % d + generation
            its = now & others & (heads[:, 48 : 48 + len(prefix)] == np.frombuffer(prefix, np.uint8)).all(axis=1) & (items["key_bytes"] >= len(prefix))
            found[d] = (int(its.sum()), int((its & expiring).sum()))
    return {d: size for d, size in found.items() if size[0]}
