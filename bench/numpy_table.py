"""The same kind of table in plain numpy and posix_ipc: why the core is compiled.

Buckets of 7 tagged slots, fixed chunks, a version per bucket that readers check, one semaphore for writers. get and set only; no
eviction, no crash safety: it does less than the core, and honestly tries to be quick.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
import posix_ipc

SLOTS = 7


class NumpyTable:
    """set() and get() of bytes up to chunk_bytes - 16 - len(key). close() removes the segment and the semaphore."""

    def __init__(self, n_items: int, chunk_bytes: int = 176) -> None:
        self.name = f"/numpy-table-{os.getpid()}"
        n_buckets = 1 << max(4, (n_items // 3).bit_length())
        n_chunks = n_items + 1
        size = n_buckets * 64 + n_chunks * chunk_bytes
        shm = posix_ipc.SharedMemory(self.name, posix_ipc.O_CREX, size=size)
        self.lock = posix_ipc.Semaphore(self.name, posix_ipc.O_CREX, initial_value=1)
        self.map = mmap.mmap(shm.fd, size)
        shm.close_fd()
        self.mask = n_buckets - 1
        self.version = np.ndarray(n_buckets, "<u8", self.map, 0, (64,))
        self.slots = np.ndarray((n_buckets, SLOTS), "<u8", self.map, 8, (64, 8))
        self.chunk_bytes = chunk_bytes
        self.base = n_buckets * 64
        self.lengths = np.ndarray((n_chunks, 2), "<u8", self.map, self.base, (chunk_bytes, 8))
        self.next_chunk = 1

    def _find(self, key: bytes, h: int, bucket: int) -> int:
        """Chunk of the key, or 0."""
        tag = h >> 48 & 0xFFFF
        slots = self.slots[bucket]
        for slot in slots[slots >> 48 == tag].tolist():
            chunk = slot & 0xFFFFFFFFFFFF
            at = self.base + chunk * self.chunk_bytes + 16
            if chunk and self.map[at : at + len(key)] == key and self.lengths[chunk, 0] == len(key):
                return chunk
        return 0

    def get(self, key: bytes) -> bytes | None:
        h = hash(key)
        bucket = h & self.mask
        while True:
            version = self.version[bucket]
            chunk = self._find(key, h, bucket)
            value = None
            if chunk:
                at = self.base + chunk * self.chunk_bytes + 16 + len(key)
                value = self.map[at : at + int(self.lengths[chunk, 1])]
            if self.version[bucket] == version and not version & 1:
                return value

    def set(self, key: bytes, value: bytes) -> None:
        h = hash(key)
        bucket = h & self.mask
        with self.lock:
            chunk = self._find(key, h, bucket)
            self.version[bucket] += 1
            if not chunk:
                chunk = self.next_chunk
                free = np.flatnonzero(self.slots[bucket] == 0)
                slot = int(free[0]) if len(free) else chunk % SLOTS
                self.next_chunk += 1
                self.slots[bucket, slot] = (h >> 48 & 0xFFFF) << 48 | chunk
            at = self.base + chunk * self.chunk_bytes + 16
            self.map[at : at + len(key) + len(value)] = key + value
            self.lengths[chunk] = len(key), len(value)
            self.version[bucket] += 1

    def close(self) -> None:
        posix_ipc.unlink_shared_memory(self.name)
        self.lock.unlink()
        self.lock.close()
