# cython: binding=False, embedsignature=True, boundscheck=False, wraparound=False, cdivision=True
"""A segment's items as records, out of it and into it again, while everybody works.

Walk: stripe by stripe and bucket by bucket, without locks (a key never changes its bucket, so none is missed however it moves in memory).
Each chain is copied at one instant: its version did not change. Before a stripe's first bucket its sequence is kept as its floor: every
write up to that version is in the copy, or overwritten there.

Restore: into a segment that was created for it (header.restoring), which workers may use all the while. Race table, all under the stripe:
    restored vs written      the worker wins: what is there, stale or not, is left (EXISTS)
    restored vs deleted, or written and evicted     the worker wins: the key has departed (bucket.pxd)
    restored vs cleared      the worker wins: the epoch is no more that of the creation (MISMATCH), and the restore ends
Crash of who restores: `restoring` stays 1, and the restore can be run again: what is there stays, what left stays away.
"""
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from shmcache.core._core cimport Mapping, Table
from shmcache.core.atomics cimport fence_acquire, ld8r, ld16r, ld32, ld32r, ld64, ld64r, st32
from shmcache.core.big cimport big_read, big_shape, big_t
from shmcache.core.bucket cimport ADDR_MASK, OP_TOUCH, bucket_of, chain_first, chain_next, chain_t, stripe_of, stripe_release, stripe_take
from shmcache.core.clock cimport now_ms
from shmcache.core.layout cimport FLAG_BIG, FLAG_CLAIM, MAX_KEY, MAX_REFS, item_t, seg_t, stripe_t
from shmcache.core.record cimport RECORD_SET, record_t
from shmcache.core.siphash cimport siphash13
from shmcache.core.slab cimport in_slab, item_at, page_room, refs_of, value_offset
from shmcache.core.table cimport CODEC_INT, RESTARTS, RESTORED, give_up, put, put_t
from shmcache.core.token cimport AGAIN, BUSY, EXISTS, INTR, MISMATCH, NO_ROOM, OK, wall_ms

from shmcache import errors

cdef enum:
    CREATED_EPOCH = 1       # of a new segment; another one: somebody cleared
    BUSY_TRIES = 64         # limits for which a restored item waits for a stripe
    MOST_IN_CHAIN = 512     # 7 slots, and 64 hops of 6
    NAMESPACES_FIRST = 2    # header.restoring until the generations of namespaces are in

cdef extern from *:
    """
    #define SHM_MOST_BYTES (((uint64_t)1 << 32) - 1)    /* of a block: format.MAX_PAYLOAD_BYTES */
    """
    const uint64_t MOST_BYTES "SHM_MOST_BYTES"

assert sizeof(record_t) == 32

# ---- out ------------------------------------------------------------------------------------------------------------------------

ctypedef struct copy_t:
    uint8_t* to
    uint64_t room
    uint64_t used
    uint64_t wanted         # NO_ROOM: what the chain needs at least
    uint64_t items
    uint64_t damaged
    uint64_t newest
    int64_t to_wall_ms      # added to the segment's clock


cdef int copy_chain(seg_t* s, uint64_t b, uint32_t stripe, copy_t* c) noexcept nogil:
    """Append the items of one chain: OK, AGAIN (it changed meanwhile), or NO_ROOM; then nothing is appended."""
    cdef uint64_t at = c.used, items = 0, damaged = 0, newest = 0, w, addr, h, room, offset, expiry, counter
    cdef uint64_t seen[MOST_IN_CHAIN]
    cdef int n_seen = 0, k
    cdef uint32_t version = ld32(&s.buckets[b].version), epoch = ld32(&s.header.epoch)
    cdef record_t r
    cdef chain_t chain
    cdef item_t* it
    cdef big_t big
    cdef uint8_t flags
    cdef int i
    chain_first(s, b, &chain)
    while True:
        for i in range(chain.n_slots):
            w = ld64(&chain.slot[i])
            addr = w & ADDR_MASK
            if not in_slab(s, addr):
                continue
            it = item_at(s, addr)
            r.version = ld64(&it.cas)       # first: no version covers a value changed in place that the copy has not got
            h = ld64r(&it.hash)
            r.key_bytes = ld16r(&it.key_bytes)
            r.value_bytes = ld32r(&it.value_bytes)
            r.codec = ld8r(&it.codec)
            r.epoch = ld32r(&it.epoch)
            flags = ld8r(&it.flags)
            expiry = ld64r(&it.expiry_ms)
            room = page_room(s, addr)
            offset = value_offset(r.key_bytes)
            if (w ^ h) >> 48 or bucket_of(s, h) != b or r.key_bytes == 0 or r.key_bytes > MAX_KEY or 48 + r.key_bytes > room:
                continue
            if flags & FLAG_CLAIM or r.epoch != epoch or (expiry != 0 and expiry <= now_ms(s)):
                continue
            if flags & FLAG_BIG:
                big_shape(s, r.key_bytes, r.value_bytes, &big)
                if big.head_bytes > room or r.value_bytes > s.max_value_bytes:
                    continue
            elif offset + r.value_bytes > room:
                continue
            for k in range(n_seen):         # a damaged chain can lead round and round
                if seen[k] == addr:
                    break
            else:
                k = n_seen
            if k < n_seen or n_seen == MOST_IN_CHAIN or at - c.used > MOST_BYTES - sizeof(record_t) - MAX_KEY - r.value_bytes:
                damaged += 1
                continue
            seen[n_seen] = addr
            n_seen += 1
            if c.room - at < sizeof(record_t) + r.key_bytes + r.value_bytes:
                fence_acquire()
                if ld32r(&s.buckets[b].version) != version:
                    return AGAIN
                c.wanted = at - c.used + sizeof(record_t) + r.key_bytes + r.value_bytes
                return NO_ROOM
            r.expires_ms = <uint64_t>(<int64_t>expiry + c.to_wall_ms) if expiry else 0
            r.stripe = stripe
            r.op = <uint8_t>(RECORD_SET | ld8r(refs_of(s, addr)) << 4)
            memcpy(c.to + at, &r, sizeof(record_t))
            at += sizeof(record_t)
            memcpy(c.to + at, <uint8_t*>it + 48, r.key_bytes)
            at += r.key_bytes
            if flags & FLAG_BIG:
                if not big_read(s, addr, r.key_bytes, r.value_bytes, &big, c.to + at):
                    damaged += 1            # or overtaken: the version tells
                    at -= sizeof(record_t) + r.key_bytes
                    continue
            elif r.codec == CODEC_INT and r.value_bytes == 8:
                counter = ld64r(<uint64_t*>(<uint8_t*>it + offset))
                memcpy(c.to + at, &counter, 8)
                fence_acquire()             # value, then version: one that is just being changed is not to be had with the version before
                if ld64(&stripe_of(s, b).old) == (<uint64_t>OP_TOUCH << 56 | addr) or ld64(&it.cas) != r.version:
                    return AGAIN
            else:
                memcpy(c.to + at, <uint8_t*>it + offset, r.value_bytes)
            at += r.value_bytes
            newest = max(newest, r.version)
            items += 1
        if ld32r(chain.link) == 0 or not chain_next(s, &chain):
            break
    fence_acquire()
    if ld32r(&s.buckets[b].version) != version:
        return AGAIN
    c.used = at
    c.items += items
    c.damaged += damaged
    c.newest = max(c.newest, newest)
    return OK


cdef class Walk:
    """The items of a segment as blocks of records, each of whole chains.

    Args: table: any handle. block_bytes: of a block; one with larger values is larger.
    After the last block: items, damaged (big values whose pages are not their own: left out), floors (n_stripes u64, little-endian:
    each stripe's sequence before it was copied), newest (no version in the blocks is higher).
    """
    cdef Table table
    cdef Mapping mapping            # another thread may close the handle between two blocks
    cdef readonly uint64_t stripe   # that comes next, of n_stripes
    cdef readonly uint64_t n_stripes
    cdef uint64_t bucket
    cdef uint64_t block_bytes
    cdef copy_t c
    cdef Py_ssize_t exports
    cdef uint64_t* floor

    def __cinit__(self, Table table not None, uint64_t block_bytes=1 << 20):
        cdef seg_t* s = table.ready()
        self.table = table
        self.mapping = table.mapping
        self.n_stripes = s.n_stripes
        self.block_bytes = self.c.room = block_bytes
        self.c.to = <uint8_t*>PyMem_RawMalloc(block_bytes)
        self.floor = <uint64_t*>PyMem_RawMalloc(8 * <size_t>s.n_stripes)
        if self.c.to == NULL or self.floor == NULL:
            raise MemoryError

    def __dealloc__(self):
        PyMem_RawFree(self.c.to)
        PyMem_RawFree(self.floor)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.c.to, <Py_ssize_t>self.c.used, True, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.exports -= 1

    @property
    def newest(self):
        return self.c.newest

    @property
    def items(self):
        return self.c.items

    @property
    def damaged(self):
        return self.c.damaged

    @property
    def floors(self):
        return (<uint8_t*>self.floor)[:8 * self.n_stripes]

    def block(self):
        """Copy the next block: True, and memoryview(self) is its bytes till the next call; False: there is none. Without the GIL.

        Raises: StripeBusy: a bucket changed 64 times while it was copied and its stripe is held by a process that does not run; MemoryError.
        """
        cdef seg_t* s = self.table.ready()
        cdef uint64_t i
        cdef int rc
        if self.exports:
            raise BufferError("the last block is still in use")
        self.c.used = 0
        if self.c.room > self.block_bytes:
            self.resize(self.block_bytes)
        self.c.to_wall_ms = <int64_t>wall_ms() - <int64_t>now_ms(s)
        while True:
            with nogil:
                rc = self.fill(s)
            if rc == OK:
                break
            if rc == NO_ROOM:               # one chain alone is larger than a block
                self.resize(self.c.wanted)
            elif rc == INTR:
                PyErr_CheckSignals()
                s = self.table.ready()
            else:
                raise errors.StripeBusy("a process that does not run holds a stripe whose items are to be copied: continue or kill it, and try again")
        if self.stripe == self.n_stripes:
            for i in range(s.n_stripes):
                self.c.newest = max(self.c.newest, ld64(&s.stripes[i].seq))
        return self.c.used > 0

    cdef int resize(self, uint64_t room) except -1:
        cdef uint8_t* to = <uint8_t*>PyMem_RawMalloc(room)
        if to == NULL:
            raise MemoryError
        PyMem_RawFree(self.c.to)
        self.c.to = to
        self.c.room = room
        return 0

    cdef int fill(self, seg_t* s) noexcept nogil:
        """Whole chains till the block is full or the last stripe is done: OK; NO_ROOM if not even one fits."""
        cdef stripe_t* st
        cdef int rc, tries
        while self.stripe < s.n_stripes:
            st = &s.stripes[self.stripe]
            if self.bucket == 0:
                self.floor[self.stripe] = ld64(&st.seq)
                self.bucket = self.stripe + 1           # that comes next, plus one
            while self.bucket <= s.n_buckets:
                rc = AGAIN
                for tries in range(RESTARTS):
                    rc = copy_chain(s, self.bucket - 1, <uint32_t>self.stripe, &self.c)
                    if rc != AGAIN:
                        break
                if rc == AGAIN:
                    rc = stripe_take(s, st, s.limit_ns)
                    if rc != OK:
                        return rc
                    rc = copy_chain(s, self.bucket - 1, <uint32_t>self.stripe, &self.c)
                    stripe_release(st)
                if rc == NO_ROOM:
                    return OK if self.c.used else NO_ROOM
                self.bucket += s.n_stripes
            self.stripe += 1
            self.bucket = 0
        return OK

cdef bint is_generation(const uint8_t* key, uint64_t n) noexcept nogil:
    """Is it the key of a namespace's generation (namespace.py)?"""
    return n > 4 and memcmp(key, b"\0ns\0", 4) == 0 and memchr(key + 4, 0, n - 4) == NULL

# ---- in -------------------------------------------------------------------------------------------------------------------------


cdef class Restore:
    """Puts records into a segment that was created for it. Counts: stored, present (a worker has written or removed the key meanwhile),
    expired, dropped (too large for this segment, or no room).

    full: the segment began to evict; cleared: a worker has cleared it, nothing more is stored.
    Raises: UsageError: the segment is not being restored.
    """
    cdef Table table
    cdef Mapping mapping
    cdef readonly uint64_t stored
    cdef readonly uint64_t present
    cdef readonly uint64_t expired
    cdef readonly uint64_t dropped
    cdef readonly bint full
    cdef readonly bint cleared
    cdef uint64_t evicted_before

    def __init__(self, Table table not None):
        cdef seg_t* s = table.ready()
        self.table = table
        self.mapping = table.mapping
        if not ld32(&s.header.restoring):
            raise errors.UsageError(f"the segment {table.name!r} was not created to be restored, or is restored already")
        self.evicted_before = s.row.evictions

    def put(self, const uint8_t[::1] payload not None, int64_t clock_back_ms=0, int heat=-1, uint32_t least_epoch=0, bint generations=False):
        """Store the records of one block. Without the GIL.

        Args: clock_back_ms: added to the wall clock. heat: only those with this CLOCK count, and end where the segment is full (-1: all).
        least_epoch: items of an earlier one were cleared. generations: only those of namespaces, which workers need before the rest; else all but
        those.
        Raises: DamageError: the payload is not whole records; StripeBusy.
        """
        cdef uint64_t at = 0, end = payload.shape[0]
        cdef seg_t* s = self.table.ready()
        cdef uint64_t wall = <uint64_t>(<int64_t>wall_ms() + clock_back_ms)
        cdef int rc
        if end == 0:
            return
        while True:
            with nogil:
                rc = self.put_all(s, &payload[0], &at, end, wall, heat, least_epoch, generations)
            if rc == INTR:
                PyErr_CheckSignals()
                s = self.table.ready()
            elif rc == BUSY:
                raise errors.StripeBusy("a process that does not run holds what a restored item needs: continue or kill it, and try again")
            elif rc != OK:
                raise errors.DamageError("a block does not consist of whole records")
            else:
                return

    cdef int put_all(self, seg_t* s, const uint8_t* payload, uint64_t* at, uint64_t end, uint64_t wall, int heat, uint32_t least_epoch,
                     bint generations) noexcept nogil:
        cdef record_t r
        cdef put_t op
        cdef uint64_t size
        cdef int rc, tries
        while at[0] < end and not self.cleared:
            if end - at[0] < sizeof(record_t):
                return MISMATCH
            memcpy(&r, payload + at[0], sizeof(record_t))
            size = sizeof(record_t) + r.key_bytes + <uint64_t>r.value_bytes
            if r.key_bytes == 0 or r.key_bytes > MAX_KEY or size > end - at[0]:
                return MISMATCH
            if r.op & 15 != RECORD_SET or (heat >= 0 and min(r.op >> 4, <int>MAX_REFS) != heat):
                at[0] += size
                continue
            if is_generation(payload + at[0] + sizeof(record_t), r.key_bytes) != generations or r.epoch < least_epoch:
                at[0] += size
                continue
            if heat >= 0 and self.full:
                self.dropped += 1
                at[0] += size
                continue
            if r.expires_ms and r.expires_ms <= wall:
                self.expired += 1
                at[0] += size
                continue
            if r.value_bytes > s.max_value_bytes:
                self.dropped += 1
                at[0] += size
                continue
            op.key = payload + at[0] + sizeof(record_t)
            op.key_bytes = r.key_bytes
            op.value = op.key + r.key_bytes
            op.value_bytes = r.value_bytes
            op.hash = siphash13(op.key, op.key_bytes, s.k0, s.k1)
            op.expiry_ms = now_ms(s) + (r.expires_ms - wall) if r.expires_ms else 0
            op.codec = r.codec
            op.flags = 0
            op.refs = <uint8_t>min(r.op >> 4, <int>MAX_REFS)
            op.when = RESTORED
            op.version = r.version
            op.epoch = CREATED_EPOCH
            op.chunk = 0
            rc = BUSY
            for tries in range(BUSY_TRIES):
                rc = put(s, &op, s.limit_ns)
                if rc != BUSY:
                    break
            give_up(s, &op)
            if rc == BUSY or rc == INTR:
                return rc
            if rc == OK:
                self.stored += 1
            elif rc == EXISTS:
                self.present += 1
            elif rc == MISMATCH:
                self.cleared = True
            else:
                self.dropped += 1
            if s.row.evictions != self.evicted_before:
                self.full = True
            at[0] += size
        return OK

    def generations_done(self):
        """Those of all namespaces are in: workers need not wait for them any more."""
        cdef seg_t* s = self.table.ready()
        if ld32(&s.header.restoring):
            st32(&s.header.restoring, 1)

    def finish(self):
        """The segment is an ordinary one from now on."""
        cdef seg_t* s = self.table.ready()
        st32(&s.header.restoring, 0)
