"""Finds any key in a segment with numpy alone: the independent oracle of the bytes.

Nothing of the core is called: SipHash, bucket, chain, tag, item, list of pages are done again here, from the layout's description. Reads
a segment at rest; a live one may change under it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MASK = (1 << 64) - 1


def siphash13(data: bytes, k0: int, k1: int) -> int:
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rotate(x: int, b: int) -> int:
        return (x << b | x >> (64 - b)) & MASK

    def rounds(n: int) -> None:
        for _ in range(n):
            v[0] = (v[0] + v[1]) & MASK
            v[2] = (v[2] + v[3]) & MASK
            v[1] = rotate(v[1], 13) ^ v[0]
            v[3] = rotate(v[3], 16) ^ v[2]
            v[0] = rotate(v[0], 32)
            v[2] = (v[2] + v[1]) & MASK
            v[0] = (v[0] + v[3]) & MASK
            v[1] = rotate(v[1], 17) ^ v[2]
            v[3] = rotate(v[3], 21) ^ v[0]
            v[2] = rotate(v[2], 32)

    padded = data + bytes(-(len(data) + 1) % 8) + bytes([len(data) & 0xFF])
    for m in np.frombuffer(padded, "<u8").tolist():
        v[3] ^= m
        rounds(1)
        v[0] ^= m
    v[2] ^= 0xFF
    rounds(3)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


class Reader:
    """find(key) -> (codec, payload) or None, over the views of a shmcache.segment.Segment."""

    def __init__(self, segment: Any) -> None:
        self.header, self.buckets, self.overflow = segment.header, segment.buckets, segment.overflow
        self.bytes = segment.bytes
        self.item = segment.items(0).dtype
        self.classes = segment.classes
        self.page_bytes = 1 << int(self.header["page_shift"])

    def find(self, key: bytes) -> tuple[int, bytes] | None:
        h = siphash13(key, *map(int, self.header["hash_key"]))
        bucket = ((h << 16 & MASK) * int(self.header["n_buckets"])) >> 64
        slots, nxt = self.buckets[bucket]["slot"], int(self.buckets[bucket]["overflow"])
        while True:
            for address in (slots[slots >> 48 == h >> 48] & ((1 << 48) - 1)).tolist():
                if address and (found := self.item_at(address * 16, h, key)) is not None:
                    return found
            if nxt == 0:
                return None
            slots, nxt = self.overflow[nxt - 1]["slot"], int(self.overflow[nxt - 1]["next"])

    def item_at(self, at: int, h: int, key: bytes) -> tuple[int, bytes] | None:
        item = np.ndarray((), self.item, buffer=self.bytes, offset=at)
        n_key, n_value = int(item["key_bytes"]), int(item["value_bytes"])
        if int(item["hash"]) != h or self.bytes[at + 48 : at + 48 + n_key].tobytes() != key:
            return None
        if int(item["epoch"]) != int(self.header["epoch"]):
            return None
        before = 48 + -(-n_key // 8) * 8
        start = at + before
        value = self.big(start, before, n_value) if item["flags"] & 1 else self.bytes[start : start + n_value].tobytes()
        return int(item["codec"]), value

    def big(self, start: int, before: int, n_value: int) -> bytes:
        """A list of pages, then what is left; if that does not fit the largest chunk, one page more."""
        n_pages, tail = divmod(n_value, self.page_bytes)
        if before + 4 * n_pages + tail > int(self.classes["chunk_bytes"][-1]):
            n_pages, tail = n_pages + 1, 0
        pages = np.frombuffer(self.bytes[start : start + 4 * n_pages].tobytes(), "<u4")
        slab = int(self.header["slab_off"])
        whole = b"".join(self.bytes[slab + p * self.page_bytes : slab + (p + 1) * self.page_bytes].tobytes() for p in pages.tolist())
        rest = self.bytes[start + 4 * n_pages : start + 4 * n_pages + tail].tobytes()
        return whole[: n_value - tail] + rest
