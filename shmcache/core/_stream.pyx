# cython: binding=False, embedsignature=True, boundscheck=False, wraparound=False, cdivision=True
"""A segment's items as records, out of it and into it again, while everybody works.

Walk: stripe by stripe and bucket by bucket, without locks (a key never changes its bucket, so none is missed however it moves in memory).
Each chain is copied at one instant: its version did not change. Before a stripe's first bucket its sequence is kept as its floor: every
write up to that version is in the copy, or overwritten there.

Restore: into a segment that was created for it (header.restoring), by the one process that holds its lock (Mapping.begin_restore). While
that is 2 the restore may be refused, and nobody attaches; then workers use the segment while the rest comes. Race table, all under the stripe:
    restored vs written      the worker wins: what is there, stale or not, is left (EXISTS)
    restored vs deleted, or written and evicted     the worker wins: the key has departed (bucket.pxd)
    restored vs cleared      the worker wins: the epoch is no more that of the creation (MISMATCH), and the restore ends; but for what the
                             store has not got (write-back), which no clear() takes away
    dirty vs loaded          the dirty come first, while nobody is attached, and nobody loads until they are in (Table.claim): the row would be older
Crash of who restores: `restoring` stays. At 2 the next restore begins again in a segment of its own; at 1 it goes on in this one: what is
there stays, what left stays away.
"""
from cpython.exc cimport PyErr_CheckSignals
from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree, PyMem_RawMalloc
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from shmcache.core._core cimport Mapping, Table
from shmcache.core.atomics cimport add64, fence_acquire, ld8r, ld16r, ld32, ld32r, ld64, ld64r, prefetch, st32, st64, xchg64
from shmcache.core.big cimport big_read, big_shape, big_t
from shmcache.core.bucket cimport ADDR_MASK, OP_TOUCH, bucket_of, chain_first, chain_next, chain_t, stripe_of, stripe_release, stripe_take
from shmcache.core.clock cimport now_ms
from shmcache.core.layout cimport FLAG_BIG, FLAG_CLAIM, FLAG_COPY_TTL, FLAG_DIRTY, MAX_KEY, MAX_REFS, POLICY_BACK, SLOTS, item_t, ring_t, seg_t, stripe_t
from shmcache.core.lock cimport shm_sleep, wait_until
from shmcache.core.record cimport RECORD_CLEAR, RECORD_COPY_TTL, RECORD_DELETE, RECORD_DIRTY, RECORD_EXPIRY, RECORD_GAP, RECORD_REF, RECORD_SET, record_t
from shmcache.core.ring cimport ring_of
from shmcache.core.siphash cimport siphash13
from shmcache.core.slab cimport in_slab, item_at, page_room, refs_of, value_offset
from shmcache.core.table cimport CODEC_INT, RESTARTS, RESTORED, give_up, passes_by, put, put_t, read_begin, read_copy, read_t, same_item, unchanged
from shmcache.core.token cimport ABSENT, AGAIN, BUSY, EXISTS, INTR, MISMATCH, NO_ROOM, OK, mono_ns, wall_ms

from shmcache import errors

cdef enum:
    BUSY_TRIES = 64         # of a restored item: the first wait for the limit, together, the rest for 1 ms each
    BLOCK_BYTES = 1048576   # of a drain
    MOST_IN_CHAIN = 512     # 7 slots, and 64 hops of 6

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
    bint copies             # of what the store has for certain, too


cdef int copy_chain(seg_t* s, uint64_t b, uint32_t stripe, copy_t* c) noexcept nogil:
    """Append the items of one chain: OK, AGAIN (it changed meanwhile), or NO_ROOM; then nothing is appended."""
    cdef uint64_t at = c.used, items = 0, damaged = 0, newest = 0, w, addr, h, room, offset, expiry, counter
    cdef uint64_t seen[MOST_IN_CHAIN]
    cdef int n_seen = 0, k
    cdef uint32_t version = ld32(&s.buckets[b].version), epoch = ld32(&s.header.epoch)
    cdef uint64_t now = now_ms(s)       # before any expiry (clock.pxd, over())
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
            expiry = ld64(&it.expiry_ms)
            room = page_room(s, addr)
            offset = value_offset(r.key_bytes)
            if (w ^ h) >> 48 or bucket_of(s, h) != b or r.key_bytes == 0 or r.key_bytes > MAX_KEY or 48 + r.key_bytes > room:
                continue
            if not c.copies and passes_by(s, <uint8_t*>it + 48):
                continue
            if flags & FLAG_CLAIM or (not flags & FLAG_DIRTY and (r.epoch != epoch or (expiry != 0 and expiry <= now))):
                continue
            if flags & FLAG_BIG:
                big_shape(s, r.key_bytes, r.value_bytes, &big)
                if big.head_bytes > room or r.value_bytes > s.max_value_bytes:
                    continue
            elif offset + r.value_bytes > room:
                continue
            if r.version >> 63:             # damaged (bucket.pxd, version_of): nothing could be restored from a file with it. verify() names it
                damaged += 1
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
            r.op = <uint8_t>(RECORD_SET | min(ld8r(refs_of(s, addr)), <uint8_t>MAX_REFS) << 4 | (RECORD_DIRTY if flags & FLAG_DIRTY else 0) |
                            (RECORD_COPY_TTL if flags & FLAG_COPY_TTL else 0))
            if flags & FLAG_DIRTY:
                r.epoch = epoch             # cleared or not: it is to be stored
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


cdef inline void prefetch_chain(seg_t* s, uint64_t b) noexcept nogil:
    """Ask for the items of a bucket. A hint: nothing is believed."""
    cdef uint64_t addr
    cdef int i
    if b < s.n_buckets:
        for i in range(SLOTS):
            addr = ld64r(&s.buckets[b].slot[i]) & ADDR_MASK
            if in_slab(s, addr):
                prefetch(item_at(s, addr))
                prefetch(<uint8_t*>item_at(s, addr) + 64)
                prefetch(<uint8_t*>item_at(s, addr) + 128)
                prefetch(refs_of(s, addr))


cdef class Walk:
    """The items of a segment as blocks of records, each of whole chains.

    Args: table: any handle. block_bytes: of a block; one with larger values is larger. copies: also of what stands in a store, through or around.
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
    cdef uint64_t until_ns          # the next stripe is waited for; 0: it was not begun

    def __cinit__(self, Table table not None, uint64_t block_bytes=1 << 20, bint copies=True):
        cdef seg_t* s = table.ready()
        self.c.copies = copies
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
                prefetch(&s.buckets[min(self.bucket - 1 + 8 * <uint64_t>s.n_stripes, s.n_buckets - 1)])
                prefetch_chain(s, self.bucket - 1 + 3 * <uint64_t>s.n_stripes)
                rc = AGAIN
                for tries in range(RESTARTS):
                    rc = copy_chain(s, self.bucket - 1, <uint32_t>self.stripe, &self.c)
                    if rc != AGAIN:
                        break
                if rc == AGAIN:
                    if self.until_ns == 0:
                        self.until_ns = wait_until(s)
                    rc = stripe_take(s, st, self.until_ns)
                    if rc == INTR:
                        return rc
                    self.until_ns = 0
                    if rc != OK:
                        return rc
                    rc = copy_chain(s, self.bucket - 1, <uint32_t>self.stripe, &self.c)
                    stripe_release(s, st)
                if rc == NO_ROOM:
                    return OK if self.c.used else NO_ROOM
                self.bucket += s.n_stripes
            self.stripe += 1
            self.bucket = 0
        return OK

cdef bint is_generation(const uint8_t* key, uint64_t n) noexcept nogil:
    """Is it the key of a namespace's or a tag's generation (namespace.py)?"""
    if n > 5 and memcmp(key, b"\0tag\0", 5) == 0:
        return True
    return n > 4 and memcmp(key, b"\0ns\0", 4) == 0 and memchr(key + 4, 0, n - 4) == NULL

# ---- in -------------------------------------------------------------------------------------------------------------------------


cdef class Restore:
    """Puts records into a segment that was created for it. Counts: stored, present (a worker has written or removed the key meanwhile),
    expired, dropped (too large for this segment, or no room), lost (the same, of what the store has not got), copies (of what the store has:
    they may be older than that by now, and are left out).

    full: the segment began to evict; cleared: a worker has cleared it, nothing more is stored but what is dirty.
    Raises: UsageError: the segment is not being restored.
    """
    cdef Table table
    cdef Mapping mapping
    cdef readonly uint64_t stored
    cdef readonly uint64_t present
    cdef readonly uint64_t expired
    cdef readonly uint64_t dropped
    cdef readonly uint64_t lost
    cdef readonly uint64_t copies
    cdef readonly bint full
    cdef readonly bint cleared
    cdef uint64_t evicted_before
    cdef uint64_t until_ns          # the next item is waited for; 0: it was not begun

    def __init__(self, Table table not None):
        cdef seg_t* s = table.ready()
        self.table = table
        self.mapping = table.mapping
        if not ld32(&s.header.restoring):
            raise errors.UsageError(f"the segment {table.name!r} was not created to be restored, or is restored already")
        self.evicted_before = s.row.evictions

    def put(self, const uint8_t[::1] payload not None, int64_t clock_back_ms=0, int heat=-1, uint32_t least_epoch=0, bint generations=False,
            Tail tail=None, bint of_log=False, uint64_t ahead=0):
        """Store the records of one block. Without the GIL.

        Args: clock_back_ms: added to the wall clock. heat: only those with this CLOCK count, and end where the segment is full (-1: all).
        least_epoch: items of an earlier one were cleared. generations: only what workers need before the rest: the generations of namespaces and
        tags, and in write-back what the store has not got (all of it: no clear() takes it away); else all but that. tail: what the log has since; of_log: the block is the log's.
        ahead: added to versions, for the file's base is so far above the segment's (header.version_base).
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
                rc = self.put_all(s, &payload[0], &at, end, wall, heat, least_epoch, generations, tail, of_log, ahead)
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
                     bint generations, Tail tail, bint of_log, uint64_t ahead) noexcept nogil:
        cdef record_t r
        cdef put_t op
        cdef uint64_t size, hash
        cdef bint dirty, back, stored
        cdef int rc, tries
        while at[0] < end and (generations or not self.cleared):
            size = record_bytes(payload, at[0], end, &r)
            if size == 0:
                return MISMATCH
            r.version += ahead
            if r.op & 15 != RECORD_SET:
                at[0] += size
                continue
            stored = s.policy != 0 and payload[at[0] + sizeof(record_t)] != 0
            back = stored and s.policy == POLICY_BACK
            dirty = False
            hash = 0
            if back:                        # the tail tells what is dirty
                hash = siphash13(payload + at[0] + sizeof(record_t), r.key_bytes, s.k0, s.k1)
                if tail is not None and not tail.wins(hash, &r, of_log):
                    at[0] += size
                    continue
                dirty = r.op & RECORD_DIRTY != 0
            if stored and not dirty:
                self.copies += not generations and heat <= 0
                at[0] += size
                continue
            if (dirty or is_generation(payload + at[0] + sizeof(record_t), r.key_bytes)) != generations:
                at[0] += size
                continue
            if not dirty and (r.epoch < least_epoch or (heat >= 0 and (<int>MAX_REFS if of_log else min(r.op >> 4 & 3, <int>MAX_REFS)) != heat)):
                at[0] += size
                continue
            if heat >= 0 and self.full:
                self.dropped += 1
                at[0] += size
                continue
            if not back:
                hash = siphash13(payload + at[0] + sizeof(record_t), r.key_bytes, s.k0, s.k1)
                if tail is not None and not tail.wins(hash, &r, of_log):
                    at[0] += size
                    continue
            if r.expires_ms and r.expires_ms <= wall and not dirty:
                self.expired += 1
                at[0] += size
                continue
            if r.value_bytes > s.max_value_bytes:
                self.dropped += 1
                self.lost += dirty
                at[0] += size
                continue
            op.key = payload + at[0] + sizeof(record_t)
            op.key_bytes = r.key_bytes
            op.value = op.key + r.key_bytes
            op.value_bytes = r.value_bytes
            op.hash = hash
            op.expiry_ms = now_ms(s) + (r.expires_ms - wall) if r.expires_ms > wall else 1 if r.expires_ms else 0
            op.codec = r.codec
            op.flags = (FLAG_DIRTY if dirty else 0) | (FLAG_COPY_TTL if back and r.op & RECORD_COPY_TTL else 0)
            op.refs = <uint8_t>min(r.op >> 4 & 3, <int>MAX_REFS)
            op.when = RESTORED
            op.drawn = 0
            op.loaded = True
            op.version = r.version
            op.epoch = s.header.restored_epoch
            op.log.bytes = 0                # it is in the log, or in the snapshot, already
            op.chunk = 0
            if self.until_ns == 0:
                self.until_ns = wait_until(s)
            rc = BUSY
            for tries in range(BUSY_TRIES):
                rc = put(s, &op, self.until_ns)
                if rc != BUSY:
                    break
            give_up(s, &op)
            if rc == INTR:
                return rc
            self.until_ns = 0
            if rc == BUSY:
                return rc
            if rc == OK:
                self.stored += 1
            elif rc == EXISTS:
                self.present += 1
            elif rc == MISMATCH:
                self.cleared = True
            else:
                self.dropped += 1
                self.lost += dirty
            if s.row.evictions != self.evicted_before:
                self.full = True
            at[0] += size
        return OK

    def generations_done(self):
        """Those of all namespaces and tags are in, and all that is dirty: workers need not wait for them any more."""
        cdef seg_t* s = self.table.ready()
        if ld32(&s.header.restoring):
            st32(&s.header.restoring, 1)

    def finish(self):
        """The segment is an ordinary one from now on."""
        cdef seg_t* s = self.table.ready()
        st32(&s.header.restoring, 0)


# ---- the tail of a log, for a restore ---------------------------------------------------------------------------------------------

ctypedef struct entry_t:
    uint64_t hash           # 0: free
    uint64_t version        # of the newest SET or DELETE; 0: none
    uint64_t expiry_version # of the newest EXPIRY
    uint64_t expires_ms
    uint8_t copy_ttl        # RECORD_COPY_TTL or 0


cdef class Tail:
    """For each key of a log's tail its newest version, so that each key is put into the segment once, and as it was last.

    add() all blocks of the log, see() all of the snapshot, then Restore.put(..., tail=self, of_log=...) both. Keys are told apart by 64 bits
    of a hash with the segment's random key. floors: of the snapshot: what is not above its stripe's is in it. ahead: added to them, and in add()
    and see() to versions, as in Restore.put.
    """
    cdef Table table
    cdef entry_t* entries
    cdef uint64_t mask
    cdef readonly uint64_t keys
    cdef readonly uint64_t records
    cdef readonly uint32_t epoch    # highest CLEAR
    cdef readonly uint64_t gaps     # operations that the log says it does not have
    cdef readonly uint64_t newest   # no version in the log is higher
    cdef bytes floors
    cdef const uint64_t* floor
    cdef uint64_t n_floors
    cdef uint64_t floors_ahead

    def __cinit__(self, Table table not None, bytes floors not None, uint64_t ahead=0):
        self.table = table
        table.ready()
        self.floors = floors
        self.floor = <const uint64_t*><const uint8_t*>floors
        self.n_floors = len(floors) // 8
        self.floors_ahead = ahead
        self.mask = 1023
        self.entries = <entry_t*>PyMem_RawCalloc(self.mask + 1, sizeof(entry_t))
        if self.entries == NULL:
            raise MemoryError

    def __dealloc__(self):
        PyMem_RawFree(self.entries)

    cdef entry_t* find(self, uint64_t hash) noexcept nogil:
        """The key's entry, or the free one where it would stand."""
        cdef uint64_t i = hash & self.mask
        while self.entries[i].hash != 0 and self.entries[i].hash != hash:
            i = (i + 1) & self.mask
        return &self.entries[i]

    cdef int larger(self) except -1:
        cdef entry_t* old = self.entries
        cdef uint64_t n = self.mask + 1, i
        cdef entry_t* entries = <entry_t*>PyMem_RawCalloc(4 * n, sizeof(entry_t))
        if entries == NULL:
            raise MemoryError
        self.entries = entries
        self.mask = 4 * n - 1
        for i in range(n):
            if old[i].hash:
                self.find(old[i].hash)[0] = old[i]
        PyMem_RawFree(old)
        return 0

    def add(self, const uint8_t[::1] payload not None, uint64_t ahead=0):
        """Note the records of a block of the log. Raises: DamageError."""
        self.walk(payload, True, ahead)

    def see(self, const uint8_t[::1] payload not None, uint64_t ahead=0):
        """Note the versions that a block of the snapshot has of keys of the log. Raises: DamageError."""
        self.walk(payload, False, ahead)

    cdef int walk(self, const uint8_t[::1] payload, bint of_log, uint64_t ahead) except -1:
        cdef seg_t* s = self.table.ready()
        cdef uint64_t at = 0, end = payload.shape[0], size, h
        cdef record_t r
        cdef entry_t* e
        cdef int op
        while at < end:
            size = record_bytes(&payload[0], at, end, &r)
            if size == 0:
                raise errors.DamageError("a block does not consist of whole records")
            op = r.op & 15
            if op == RECORD_CLEAR:
                self.epoch = max(self.epoch, r.epoch)
            elif op == RECORD_GAP:
                self.gaps += r.version
            else:
                r.version += ahead
                if of_log:
                    self.newest = max(self.newest, r.version)
                h = siphash13(&payload[at + sizeof(record_t)], r.key_bytes, s.k0, s.k1) | 1
                e = self.find(h)
                if not of_log:
                    if e.hash and r.version > e.version:
                        e.version = r.version
                elif r.stripe >= self.n_floors or r.version > self.floor[r.stripe] + self.floors_ahead:
                    self.records += 1
                    if e.hash == 0:
                        if 2 * self.keys > self.mask:
                            self.larger()
                            e = self.find(h)
                        e.hash = h
                        self.keys += 1
                    if op == RECORD_EXPIRY:
                        if r.version > e.expiry_version:
                            e.expiry_version = r.version
                            e.expires_ms = r.expires_ms
                            e.copy_ttl = r.op & RECORD_COPY_TTL
                    elif r.version > e.version:
                        e.version = r.version
            at += size
        return 0

    cdef bint wins(self, uint64_t hash, record_t* r, bint of_log) noexcept nogil:
        """Is this SET the newest of its key? Its life is then as it was set last. One of the log that was not noted is in the snapshot, or
        was overwritten or deleted before it."""
        cdef entry_t* e = self.find(hash | 1)
        if e.hash == 0:
            return not of_log
        if r.version != e.version if of_log else r.version < e.version:
            return False
        if e.expiry_version > r.version:
            r.expires_ms = e.expires_ms
            r.version = e.expiry_version
            r.op = (r.op & ~RECORD_COPY_TTL) | e.copy_ttl | RECORD_DIRTY        # in write-back the store may not have that
        return True


cdef uint64_t record_bytes(const uint8_t* payload, uint64_t at, uint64_t end, record_t* r) noexcept nogil:
    """Load the record's header: its bytes in all; 0: it is none."""
    cdef uint64_t size
    if end - at < sizeof(record_t):
        return 0
    memcpy(r, payload + at, sizeof(record_t))
    size = sizeof(record_t) + r.key_bytes + <uint64_t>r.value_bytes
    if size > end - at or r.key_bytes > MAX_KEY or r.op & 15 > RECORD_GAP or r.op & 15 == RECORD_REF:
        return 0
    if (r.key_bytes == 0) != (r.op & 15 == RECORD_CLEAR or r.op & 15 == RECORD_GAP):
        return 0
    return size

# ---- the log ----------------------------------------------------------------------------------------------------------------------

cdef extern from *:
    """
    #include <linux/futex.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #include <limits.h>
    static void shm_ring_all(uint32_t *bell) {
        __atomic_fetch_add(bell, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, bell, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
    """
    void shm_ring_all(uint32_t* bell) noexcept nogil


cdef class Drain:
    """Takes the records out of all rings. One per segment: the supervisor's. Race table and crash: ring.pxd.

    collect() copies what is there; drained(): it is in a file, and its room is free; durable(): it is on the disk. A ring whose positions
    cannot be is begun anew at its head, and counted: damaged.
    """
    cdef Table table
    cdef Mapping mapping
    cdef uint64_t* at               # by row: taken so far
    cdef uint64_t* syncing          # by row: taken when the last sync began
    cdef uint8_t* to
    cdef uint64_t used
    cdef uint64_t room
    cdef Py_ssize_t exports
    cdef readonly uint64_t damaged
    cdef readonly bint more         # a block was full, and something is left
    cdef uint64_t collected_ns      # when collect() was called last,
    cdef uint64_t between_ns        # so long after the time before,
    cdef uint64_t most              # and the most that a ring had for it

    def __cinit__(self, Table table not None):
        cdef seg_t* s = table.ready()
        cdef uint32_t i
        if s.ring_bytes == 0:
            raise errors.UsageError(f"the segment {table.name!r} was created without a log: unlink it, and create it with one (log_buffer=, --log)")
        self.table = table
        self.mapping = table.mapping
        self.room = BLOCK_BYTES
        self.to = <uint8_t*>PyMem_RawMalloc(self.room)
        self.at = <uint64_t*>PyMem_RawMalloc(8 * <size_t>s.n_rows)
        self.syncing = <uint64_t*>PyMem_RawMalloc(8 * <size_t>s.n_rows)
        if self.to == NULL or self.at == NULL or self.syncing == NULL:
            raise MemoryError
        for i in range(s.n_rows):
            self.at[i] = ld64(&ring_of(s, i).drained)
            self.syncing[i] = ld64(&ring_of(s, i).durable)

    def __dealloc__(self):
        PyMem_RawFree(self.to)
        PyMem_RawFree(self.at)
        PyMem_RawFree(self.syncing)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.to, <Py_ssize_t>self.used, True, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.exports -= 1

    @property
    def epoch(self):
        """Of the segment, now."""
        return ld32(&self.table.ready().header.epoch)

    @property
    def gaps(self):
        """header.log_gaps, now."""
        return ld64(&self.table.ready().header.log_gaps)

    def collect(self):
        """Copy new records: True if there are any; memoryview(self) is them, till the next call. Without the GIL."""
        cdef seg_t* s = self.table.ready()
        cdef uint32_t i
        cdef int rc
        if self.exports:
            raise BufferError("the last records are still in use")
        self.used = 0
        self.more = False
        self.most = 0
        self.between_ns = mono_ns() - self.collected_ns
        self.collected_ns += self.between_ns
        with nogil:
            for i in range(s.n_rows):
                self.most = max(self.most, ld64(&ring_of(s, i).head) - self.at[i])
                rc = self.take(s, i)
                if rc == NO_ROOM:
                    break
        if rc == NO_ROOM and self.used == 0:
            raise MemoryError
        return self.used > 0

    cdef int grow(self, uint64_t n) noexcept nogil:
        """Room for n bytes behind what is there: OK, or NO_ROOM: the block is full."""
        cdef uint8_t* larger
        if self.room - self.used >= n:
            return OK
        if self.used:
            self.more = True
            return NO_ROOM
        larger = <uint8_t*>PyMem_RawMalloc(n)
        if larger == NULL:
            return NO_ROOM
        PyMem_RawFree(self.to)
        self.to = larger
        self.room = n
        return OK

    cdef int take(self, seg_t* s, uint32_t row) noexcept nogil:
        cdef ring_t* ring = ring_of(s, row)
        cdef uint64_t head = ld64(&ring.head), size, value_bytes
        cdef record_t r
        cdef uint8_t key[4096]
        cdef int rc, op
        if head == self.at[row]:
            return OK
        if head - self.at[row] > s.ring_bytes or self.at[row] & 7:
            self.damaged += 1
            add64(&s.header.log_gaps, 1)
            self.at[row] = head
            return OK
        while self.at[row] < head:
            self.out(s, ring, self.at[row], <uint8_t*>&r, sizeof(record_t))
            op = r.op & 15
            value_bytes = r.value_bytes if op == RECORD_SET else 0
            size = (sizeof(record_t) + r.key_bytes + value_bytes + 7) & ~<uint64_t>7
            if r.key_bytes == 0 or r.key_bytes > MAX_KEY or size > head - self.at[row] or op == RECORD_CLEAR or op > RECORD_REF:
                self.damaged += 1
                add64(&s.header.log_gaps, 1)
                self.at[row] = head
                return OK
            if op == RECORD_REF:
                self.out(s, ring, self.at[row] + sizeof(record_t), key, r.key_bytes)
                rc = self.fetch(s, &r, key)
            else:
                rc = self.grow(sizeof(record_t) + r.key_bytes + value_bytes)
                if rc == OK:
                    r.value_bytes = <uint32_t>value_bytes
                    self.out(s, ring, self.at[row], self.to + self.used, sizeof(record_t) + r.key_bytes + value_bytes)
                    memcpy(self.to + self.used, &r, sizeof(record_t))
                    self.used += sizeof(record_t) + r.key_bytes + value_bytes
            if rc != OK:
                return rc
            self.at[row] += size
        return OK

    cdef void out(self, seg_t* s, ring_t* ring, uint64_t at, uint8_t* to, uint64_t n) noexcept nogil:
        cdef uint8_t* data = <uint8_t*>ring + sizeof(ring_t)
        cdef uint64_t place = at & (s.ring_bytes - 1)
        cdef uint64_t first = min(n, s.ring_bytes - place)
        memcpy(to, data + place, first)
        memcpy(to + first, data, n - first)

    cdef int fetch(self, seg_t* s, record_t* r, const uint8_t* key) noexcept nogil:
        """Append what the table has for a REF now: OK; NO_ROOM; AGAIN: writes overtook it 64 times, come again."""
        cdef read_t read
        cdef record_t found
        cdef item_t* it
        cdef uint64_t hash = siphash13(key, r.key_bytes, s.k0, s.k1)
        cdef int rc = AGAIN, tries
        for tries in range(RESTARTS):
            rc = read_begin(s, key, r.key_bytes, hash, &read)
            if rc == ABSENT:
                break
            if rc != OK:
                continue
            rc = self.grow(sizeof(record_t) + r.key_bytes + read.value_bytes)
            if rc != OK:
                return rc
            it = item_at(s, read.addr)
            found = r[0]
            found.version = read.cas
            found.value_bytes = <uint32_t>read.value_bytes
            found.codec = read.codec
            found.epoch = ld32r(&it.epoch)
            found.op = RECORD_SET | (RECORD_DIRTY if read.flags & FLAG_DIRTY else 0) | (RECORD_COPY_TTL if read.flags & FLAG_COPY_TTL else 0)
            found.expires_ms = 0
            if read.expiry_ms:
                found.expires_ms = <uint64_t>(<int64_t>read.expiry_ms + <int64_t>wall_ms() - <int64_t>now_ms(s))
            read_copy(s, &read, self.to + self.used + sizeof(record_t) + r.key_bytes)
            if not (unchanged(&read) or same_item(s, &read)):
                rc = AGAIN
                continue
            if read.damaged:
                rc = ABSENT
                break
            memcpy(self.to + self.used, &found, sizeof(record_t))
            memcpy(self.to + self.used + sizeof(record_t), key, r.key_bytes)
            self.used += sizeof(record_t) + r.key_bytes + read.value_bytes
            return OK
        if rc != ABSENT:
            self.more = True
            return AGAIN
        rc = self.grow(sizeof(record_t) + r.key_bytes)
        if rc == OK:
            r.op = RECORD_DELETE
            r.value_bytes = 0
            r.codec = 0
            r.expires_ms = 0
            memcpy(self.to + self.used, r, sizeof(record_t))
            memcpy(self.to + self.used + sizeof(record_t), key, r.key_bytes)
            self.used += sizeof(record_t) + r.key_bytes
        return rc

    def drained(self):
        """What was collected so far is in a file: its room is free."""
        cdef seg_t* s = self.table.ready()
        cdef uint32_t i
        for i in range(s.n_rows):
            if ld64(&ring_of(s, i).drained) != self.at[i]:
                st64(&ring_of(s, i).drained, self.at[i])
                shm_ring_all(&ring_of(s, i).bell)

    def begin_sync(self):
        """What was written so far is about to be synced."""
        cdef seg_t* s = self.table.ready()
        cdef uint32_t i
        for i in range(s.n_rows):
            self.syncing[i] = self.at[i]

    def durable(self):
        """What was written before begin_sync() is on the disk."""
        cdef seg_t* s = self.table.ready()
        cdef uint32_t i
        for i in range(s.n_rows):
            if ld64(&ring_of(s, i).durable) != self.syncing[i]:
                st64(&ring_of(s, i).durable, self.syncing[i])
                shm_ring_all(&ring_of(s, i).bell)

    cdef bint over(self, seg_t* s, uint64_t n) noexcept nogil:
        """Has any ring more than n bytes that were not collected?"""
        cdef uint32_t i
        for i in range(s.n_rows):
            if ld64(&ring_of(s, i).head) - self.at[i] > n:
                return True
        return False

    cdef bint sleep_for(self, uint64_t ns, uint64_t n) except -1:
        """Till a writer rings or the time is over; not at all if a ring has over n bytes: True if one rang."""
        cdef seg_t* s = self.table.ready()
        cdef uint32_t bell = ld32(&s.header.log_bell)
        cdef int rc = 0
        xchg64(&s.header.log_asleep, 1)     # seen by whoever appends after the look at the heads
        if not self.over(s, n):
            with nogil:
                rc = shm_sleep(&s.header.log_bell, bell, ns)
        st64(&s.header.log_asleep, 0)
        return rc == 0

    def sleep(self, double seconds):
        """Sleep till a writer rings or the time is over; not at all if there is something to collect: True if one rang."""
        return self.sleep_for(<uint64_t>(seconds * 1e9), 0)

    def pace(self, double seconds):
        """Sleep till the fullest ring is about a quarter full, at its rate since the last collect(), and at most so long. A writer whose ring
        is half full rings. So nobody waits for room, and nobody has to wake anybody for it: that costs a writer more than a set."""
        cdef uint64_t ring_bytes = self.table.ready().ring_bytes
        cdef double ns = min(seconds * 1e9, self.between_ns * (ring_bytes / 4.0 / max(self.most, 1)))
        ns -= mono_ns() - self.collected_ns
        if ns > 0:
            self.sleep_for(<uint64_t>ns, ring_bytes >> 1)

    def rewind(self):
        """What was collected and not drained is collected again: it could not be written."""
        cdef seg_t* s = self.table.ready()
        cdef uint32_t i
        for i in range(s.n_rows):
            self.at[i] = ld64(&ring_of(s, i).drained)


def count_gap(Table table not None):
    """Something was done that the log does not have."""
    add64(&table.ready().header.log_gaps, 1)
