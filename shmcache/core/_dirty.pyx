# cython: binding=False, embedsignature=True, boundscheck=False, wraparound=False, cdivision=True
"""What the store has not got yet (dirty.pxd), for who flushes it: `Dirty`."""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport UINT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from shmcache.core._core cimport Mapping, Table
from shmcache.core.atomics cimport fence_acquire, ld8r, ld16r, ld64, st64
from shmcache.core.bucket cimport ADDR_MASK, bucket_of, chain_first, chain_next, chain_t, stripe_of, stripe_release, stripe_take
from shmcache.core.clock cimport now_ms
from shmcache.core.dirty cimport dirty_chunk, dirty_set, dirty_size
from shmcache.core.envelope cimport CODEC_ENVELOPE, envelope_open, envelope_t
from shmcache.core.layout cimport FLAG_CLAIM, FLAG_COPY_TTL, FLAG_DIRTY, POLICY_BACK, item_t, seg_t
from shmcache.core.lock cimport wait_until
from shmcache.core.siphash cimport siphash13
from shmcache.core.slab cimport chunk_class, in_slab, item_at, page_room
from shmcache.core.table cimport RESTARTS, find_dirty, go_above, mark_clean, read_begin, read_copy, read_t, renew_dirty, same_item, unchanged
from shmcache.core.token cimport ABSENT, BUSY, INTR, MISMATCH, OK

from shmcache import errors

cdef extern from *:
    int popcount "__builtin_popcountll"(uint64_t) nogil

cdef enum:
    CHAIN_BYTES = 400 * 4098        # keys of the longest chain
cdef uint64_t GROUP = 1024          # buckets of a look at all, before signals are seen to


cdef class Dirty:
    """Find dirty items, and say that they are stored. For one thread at a time.

    Args: table: a handle of a segment whose policy is write-back.
    """
    cdef Table table
    cdef Mapping mapping
    cdef uint64_t words
    cdef readonly uint64_t skipped      # found dirty, or not known, and not read: a process that does not run holds the stripe
    cdef readonly bytes damaged         # the last key whose value has a page that belongs to somebody else
    cdef readonly uint64_t found_bytes  # of the items found, as header.dirty counts them
    cdef public dict passed             # key -> version of items whose payload is not read: find() and walk() give them with none
    cdef public uint64_t most_bytes     # find() and walk() end behind the item by which the payloads have so many

    def __init__(self, Table table not None):
        cdef seg_t* s = table.ready()
        if s.policy != POLICY_BACK:
            raise errors.UsageError("nothing is written back in this segment: create it with policy='back'")
        self.table = table
        self.mapping = table.mapping
        self.skipped = self.found_bytes = 0
        self.passed = {}
        self.most_bytes = UINT64_MAX
        self.words = (((s.slab_hi - s.slab_lo) >> 3) + 63) >> 6

    def find(self, uint64_t at, Py_ssize_t most):
        """(items, at): at most so many dirty items behind a place in the map, 0 at first, and the place to go on; 0: that was all.

        An item is (key, codec, payload, seconds to live or None, version, row's version, bytes as header.dirty counts them). A tombstone is a
        negative envelope.
        """
        cdef seg_t* s = self.table.ready()
        cdef list found = []
        cdef uint8_t key[4096]
        cdef size_t n = 0
        cdef uint64_t payloads = 0
        cdef uint64_t bits, until = 0       # 0: this bit was not waited for yet
        cdef int rc, bit
        while at < self.words << 6:
            bits = ld64(&s.dirty[at >> 6]) >> (at & 63)
            if bits == 0:
                at = (at | 63) + 1
                continue
            bit = 0
            while not bits >> bit & 1:
                bit += 1
            at += bit + 1
            until = until or wait_until(s)
            with nogil:
                rc = find_dirty(s, at - 1, key, &n, until)
            if rc == INTR:
                PyErr_CheckSignals()
                s = self.table.ready()
                at -= 1
                continue
            until = 0
            if rc == BUSY:
                self.skipped += 1
            elif rc == OK:
                self.found_bytes += dirty_size(s, dirty_chunk(s, at - 1))
                item = self.read(s, PyBytes_FromStringAndSize(<char*>key, <Py_ssize_t>n))
                if item is not None:
                    found.append(item)
                    payloads += len(item[2])
                    if len(found) == most or payloads >= self.most_bytes:
                        return found, at
        return found, 0

    def walk(self, uint64_t at, Py_ssize_t most):
        """find(), bucket by bucket: slower, and no key that was dirty when a walk began is missed, in whatever chunk it is by the time. (The map is
        gone through chunk by chunk: a key may be written into one behind, and leave the one ahead.)"""
        cdef seg_t* s = self.table.ready()
        cdef list found = []
        cdef uint8_t* keys = <uint8_t*>malloc(CHAIN_BYTES)
        cdef uint64_t used = 0, items = 0, payloads = 0, place, until = 0
        cdef size_t n
        cdef int rc
        if keys == NULL:
            raise MemoryError
        try:
            while at < s.n_buckets:
                until = until or wait_until(s)
                with nogil:
                    rc = visit(s, at, keys, &used, &items, &self.found_bytes, until)
                if rc == INTR:
                    PyErr_CheckSignals()
                    s = self.table.ready()
                    continue
                until = 0
                at += 1
                if rc == BUSY:
                    self.skipped += 1
                    continue
                place = 0
                while place < used:
                    n = keys[place] | <size_t>keys[place + 1] << 8
                    item = self.read(s, PyBytes_FromStringAndSize(<char*>keys + place + 2, <Py_ssize_t>n))
                    if item is not None:
                        found.append(item)
                        payloads += len(item[2])
                    place += 2 + n
                if len(found) >= most or payloads >= self.most_bytes:
                    return found, at if at < s.n_buckets else 0
        finally:
            free(keys)
        return found, 0

    def item(self, bytes key not None):
        """The item of this key, as of find(); None: it is not dirty, or a process that does not run holds its stripe."""
        return self.read(self.table.ready(), key)

    cdef object read(self, seg_t* s, bytes key):
        cdef const uint8_t* k = <const uint8_t*>PyBytes_AS_STRING(key)
        cdef size_t n = PyBytes_GET_SIZE(key)
        cdef uint64_t h = siphash13(k, n, s.k0, s.k1), now
        cdef read_t r
        cdef envelope_t e
        cdef bytes payload
        cdef int rc, tries = 0
        while True:
            tries += 1
            if tries > RESTARTS:            # who changes it is slow, stopped or dead: with the stripe it is repaired, or left for the next pass
                with nogil:
                    rc = stripe_take(s, stripe_of(s, bucket_of(s, h)), wait_until(s))
                    if rc == OK:
                        stripe_release(s, stripe_of(s, bucket_of(s, h)))
                if rc == BUSY:
                    self.skipped += 1
                    return None
                tries = 0
            rc = read_begin(s, k, n, h, &r)
            if rc == ABSENT:
                return None
            if rc == OK and r.flags & FLAG_DIRTY and self.passed.get(key) == r.cas:
                return key, r.codec, b"", None, r.cas, r.cas + s.header.version_base, read_size(s, &r)
            if rc == OK:
                payload = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>r.value_bytes)
                read_copy(s, &r, <uint8_t*>PyBytes_AS_STRING(payload))
                fence_acquire()
                # a counter changes in place, and its version behind it: of a value with the version before there is no telling
                if (unchanged(&r) or same_item(s, &r)) and ld64(&item_at(s, r.addr).cas) == r.cas and \
                        ld64(&stripe_of(s, r.head - s.buckets).old) & ADDR_MASK != r.addr:
                    break
            PyErr_CheckSignals()
            s = self.table.ready()
        if not r.flags & FLAG_DIRTY:
            return None
        if r.damaged:
            self.skipped += 1       # and the others are stored
            self.damaged = key
            return None
        left = None
        if r.codec == CODEC_ENVELOPE and r.expiry_ms and envelope_open(<uint8_t*>PyBytes_AS_STRING(payload), r.value_bytes, &e):
            r.expiry_ms -= min(<uint64_t>e.stale_ms, r.expiry_ms - 1)       # in which the copy may be given as a stale one
        if r.expiry_ms and not r.flags & FLAG_COPY_TTL:
            now = now_ms(s)
            left = (r.expiry_ms - now) / 1000.0 if r.expiry_ms > now else 0.0
        return key, r.codec, payload, left, r.cas, r.cas + s.header.version_base, read_size(s, &r)

    def clean(self, bytes key not None, uint64_t version):
        """The store has this version of a key: True. False: it has been written since, or a process that does not run holds its stripe; then
        it is dirty still."""
        cdef seg_t* s = self.table.ready()
        cdef const uint8_t* k = <const uint8_t*>PyBytes_AS_STRING(key)
        cdef size_t n = PyBytes_GET_SIZE(key)
        cdef uint64_t h = siphash13(k, n, s.k0, s.k1), until = wait_until(s)
        cdef int rc = INTR
        while rc == INTR:
            with nogil:
                rc = mark_clean(s, k, n, h, version, until)
            if rc == INTR:
                PyErr_CheckSignals()
                s = self.table.ready()
        return rc == OK

    def renew(self, bytes key not None, uint64_t version, uint64_t above):
        """Give a key's dirty item of this version a new one, above that: True. False: it has been written since, or a process that does not
        run holds its stripe."""
        cdef seg_t* s = self.table.ready()
        cdef const uint8_t* k = <const uint8_t*>PyBytes_AS_STRING(key)
        cdef size_t n = PyBytes_GET_SIZE(key)
        cdef uint64_t h = siphash13(k, n, s.k0, s.k1), until = wait_until(s)
        cdef int rc = INTR
        while rc == INTR:
            with nogil:
                rc = renew_dirty(s, k, n, h, version, version, above, until)
            if rc == INTR:
                PyErr_CheckSignals()
                s = self.table.ready()
        return rc == OK

    def go_above(self, uint64_t version):
        """All that is written from now on has higher versions: True. False: a process that does not run holds a stripe: call it again."""
        cdef seg_t* s = self.table.ready()
        cdef uint64_t i = 0, until = wait_until(s)
        cdef bint all_do = True
        cdef int rc
        while i < s.n_stripes:
            with nogil:
                rc = go_above(s, &s.stripes[i], version, until)
            if rc == INTR:
                PyErr_CheckSignals()
                s = self.table.ready()
                continue
            all_do = all_do and rc == OK
            i += 1
        return all_do

    def renew_all(self, uint64_t first, uint64_t last):
        """Give each dirty item whose version is one of first to last a new one, above last: True. False: a process that does not run holds a
        stripe; some have it. go_above(last) first, or one may be written meanwhile whose version is not above last."""
        cdef seg_t* s = self.table.ready()
        cdef uint8_t* keys = <uint8_t*>malloc(CHAIN_BYTES)
        cdef uint64_t b = 0, used = 0, items = 0, total = 0, place, until = 0
        cdef const uint8_t* key
        cdef size_t n
        cdef int rc
        if keys == NULL:
            raise MemoryError
        try:
            while b < s.n_buckets:
                until = until or wait_until(s)
                with nogil:
                    rc = visit(s, b, keys, &used, &items, &total, until)
                    place = 0
                    while rc == OK and place < used:
                        n = keys[place] | <size_t>keys[place + 1] << 8
                        key = keys + place + 2
                        rc = renew_dirty(s, key, n, siphash13(key, n, s.k0, s.k1), first, last, last, until)
                        if rc == MISMATCH:          # stored meanwhile, or written: then it is above
                            rc = OK
                        place += n + 2
                if rc == INTR:                      # the chain again: those that have a new one are left
                    PyErr_CheckSignals()
                    s = self.table.ready()
                    continue
                if rc == BUSY:
                    return False
                until = 0
                b += 1
        finally:
            free(keys)
        return True

    def recount(self):
        """Look at every item: set the bits that are missing, and count anew. (items, bytes)."""
        cdef seg_t* s = self.table.ready()
        cdef uint64_t b = 0, used = 0, total = 0, items = 0, end, until = 0
        cdef int rc
        while b < s.n_buckets:
            end = min(b + GROUP, s.n_buckets)
            while b < end:
                until = until or wait_until(s)
                with nogil:
                    rc = visit(s, b, NULL, &used, &items, &total, until)
                if rc == INTR:
                    break
                until = 0
                b += 1                              # busy: its items are counted the next time
            PyErr_CheckSignals()
            s = self.table.ready()
        st64(&s.header.dirty, total)
        return items, total

    def items(self):
        """How many bits are set: so many items are dirty, or nearly."""
        cdef seg_t* s = self.table.ready()
        cdef uint64_t i, total = 0
        with nogil:
            for i in range(self.words):
                total += popcount(ld64(&s.dirty[i]))
        return total

    def place(self, uint64_t n):
        """Where find() begins so that it leaves out the first n items of the map, or nearly."""
        cdef seg_t* s = self.table.ready()
        cdef uint64_t i, bits, at = 0
        with nogil:
            for i in range(self.words):
                bits = ld64(&s.dirty[i])
                if n < <uint64_t>popcount(bits):
                    while n:
                        bits &= bits - 1
                        n -= 1
                    at = i << 6 | <uint64_t>popcount((bits & -bits) - 1)
                    break
                n -= popcount(bits)
        return at


cdef uint64_t read_size(seg_t* s, read_t* r) noexcept:
    """As dirty_size(), of what was read: it may be another's chunk by now."""
    cdef uint32_t index = 0
    cdef int cls = chunk_class(s, r.addr, &index)
    if cls < 0:
        return 0
    return s.chunk_bytes[cls] if r.value_bytes < s.chunk_bytes[cls] else s.chunk_bytes[cls] + r.value_bytes


cdef int visit(seg_t* s, uint64_t b, uint8_t* to, uint64_t* used, uint64_t* items, uint64_t* total, uint64_t until_ns) noexcept nogil:
    """A chain's dirty items: their bits are set, they are counted, and (to) their keys, each as u16 length + bytes: OK, BUSY or INTR."""
    cdef chain_t c
    cdef uint64_t addr, n
    cdef int i, rc = OK
    used[0] = 0
    rc = stripe_take(s, stripe_of(s, b), until_ns)
    if rc != OK:
        return rc
    chain_first(s, b, &c)
    while True:
        for i in range(c.n_slots):
            addr = ld64(&c.slot[i]) & ADDR_MASK
            if not in_slab(s, addr) or not ld8r(&item_at(s, addr).flags) & FLAG_DIRTY or ld8r(&item_at(s, addr).flags) & FLAG_CLAIM:
                continue
            dirty_set(s, addr)
            items[0] += 1
            total[0] += dirty_size(s, addr)
            n = ld16r(&item_at(s, addr).key_bytes)
            if to == NULL or n == 0 or n > 4096 or 48 + n > page_room(s, addr) or used[0] + 2 + n > CHAIN_BYTES:
                continue
            to[used[0]] = n & 0xff
            to[used[0] + 1] = <uint8_t>(n >> 8)
            memcpy(to + used[0] + 2, <uint8_t*>item_at(s, addr) + 48, n)
            used[0] += n + 2
        if not chain_next(s, &c):
            break
    stripe_release(s, stripe_of(s, b))
    return OK
