# cython: binding=False, embedsignature=True, cdivision=True
"""The whole table at once: verify, the settling of what the dead left, and what the supervisor does ahead of the writers.

Invariants, by the numbers that verify() reports. They hold for whoever holds the lock named:

    I1   a slot's address is a chunk of a page ACTIVE or DRAINING                                        (stripe)
    I2   that chunk is LIVE                                                                              (stripe)
    I3   slot >> 48 equals the top 16 bits of the item's hash                                            (stripe)
    I4   the item's hash belongs to this bucket                                                          (stripe)
    I5   the item's hash is SipHash-1-3 of its key                                                       (stripe)
    I6   key and value, or key, page list and tail, fit the chunk; the key has 1 to 4,096 bytes          (stripe)
    I7   no key stands twice in a chain                                                                  (stripe)
    I8   the item's version is 1 to the stripe's seq                                                     (stripe)
    I9   a LIVE chunk is named by a slot of its bucket                                                   (stripe)
    I10  a page's free list holds FREE chunks of the page, each once, n_free of them                     (class)
    I11  the class's ring holds its pages, each once, n_pages of them; the avail list those with a free chunk; n_free sums  (class)
    I12  the page pool's list holds FREE pages, each once, n_free of them                                (page pool)
    I13  a big item's pages are BIG and name it as their head                                            (stripe)
    I14  a page BIG(nobody) is listed by its head, if that is LIVE, and then a slot names it             (stripe)
    I15  a stripe counts the items of the current epoch in its buckets                                   (stripe)
    I16  a chain's overflow buckets are LINKED to its bucket and the chain ends                          (stripe)
    I17  the overflow pool's list holds FREE, empty overflow buckets, each once, n_free of them          (overflow pool)
    I18  a CLOCK count is 0 to 3                                                                         (none)
    I19  a chunk KEPT by a living process is named by a slot of its row                                  (none; looked at five times)
    I20  the header still says what it said when this process attached                                   (none)
    I21  a page's row says free, being cut, of a class, or of a big value, and its class fits            (page pool)
    I22  the map has the bit of every dirty item (dirty.pxd, D2)                                         (stripe; looked at five times)
    I23  a stripe whose turn is even counts the items of databases (databases.pxd, C1 to C3)             (stripe)
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset
from posix.unistd cimport usleep

from shmcache.core._core cimport Mapping, Table
from shmcache.core.atomics cimport add64, cas32, ld8r, ld16r, ld32, ld32r, ld64, st8r, st32, st64
from shmcache.core.big cimport big_lists, big_owns, big_shape, big_t
from shmcache.core.bucket cimport (
    ADDR_MASK, MAX_HOPS, bucket_of, bump, chain_first, chain_next, chain_t, overflow_push_locked, overflow_repair, overflow_take, slot_naming, stripe_of, stripe_release, stripe_take, version_of)
from shmcache.core.layout cimport (
    BATCH_CLASSES, BATCH_SLOTS, CLS_BIG, CLS_POOL, DATABASES, FLAG_BIG, FLAG_DIRTY, MAX_KEY, MAX_REFS, OV_SLOTS, REFS_SHIFT, PARKED_SLOTS, POLICY_BACK, MIN_CHUNK, class_t, databases_t, item_t, overflow_t, page_t, seg_t, stripe_t)
from shmcache.core.dirty cimport dirty_bit
from shmcache.core.clock cimport evict_chunk, evict_one, give_page, seems_stale, take_page
from shmcache.core.lock cimport lock_release, lock_take, shm_ring, shm_sleep, wait_until
from shmcache.core.settle cimport in_chain, settle_chunk, settle_overflow, settle_page, settle_pages
from shmcache.core.siphash cimport siphash13
from shmcache.core.sizes cimport census_t, in_epoch, take_census
from shmcache.core.slab cimport (
    chunk_addr, chunk_class, chunk_free_list, cls_mark, chunk_push_locked, class_release, class_repair, class_take, in_slab, item_at, page_cls, page_in_class, page_room, pool_push_locked, pool_repair, pool_take, rebuild_page_locked,
    refs_of, value_offset, avail_push_locked)
from shmcache.core.table cimport dirty_at
from shmcache.core.token cimport (
    ABSENT, BUSY, FREE, INTR, KEPT, LIVE, OK, OV_FREE, OV_LINKED, OV_RESERVED, PAGE_ACTIVE, PAGE_BIG, PAGE_CUTTING, PAGE_DRAINING, PAGE_FREE, RESERVED, RETIRED,
    SUPERVISOR_BYTE, dead, hold_byte, kind_of, mono_ns, munmap, row_of, token_of, word_of)

from shmcache import errors

cdef extern from *:
    """
    #include <pthread.h>
    #include <signal.h>
    /* What goes through the whole table does not begin again at each signal: they wait till it is done. But for those of faults. */
    static void shm_hold_signals(sigset_t *before) {
        sigset_t all;
        sigfillset(&all);
        sigdelset(&all, SIGSEGV); sigdelset(&all, SIGBUS); sigdelset(&all, SIGFPE); sigdelset(&all, SIGILL); sigdelset(&all, SIGABRT);
        pthread_sigmask(SIG_SETMASK, &all, before);
    }
    static void shm_let_signals(sigset_t *before) { pthread_sigmask(SIG_SETMASK, before, NULL); }
    """
    ctypedef struct sigset_t:
        pass
    void shm_hold_signals(sigset_t* before) noexcept nogil
    void shm_let_signals(sigset_t* before) noexcept nogil

KINDS = ("FREE", "RESERVED", "LIVE", "RETIRED", "KEPT", "of no kind", "of no kind", "of no kind")
MOST = 1000         # violations listed; more would not help anybody

# What is wrong is noted while a lock is held, without the GIL and without a Python object, and said when it is released.

cdef enum:
    KEY_SHOWN = 64
    MOST_IN_CHAIN = 512     # 7 slots, and 64 hops of 6

cdef enum:                  # of TEXTS
    V_COUNT, V_CHAIN_END, V_CHAIN, V_ADDRESS, V_KIND, V_TAG, V_BUCKET, V_VERSION, V_SIZE, V_HASH, V_TWICE, V_BIG_PAGE, V_REFS, V_LOST, V_KEPT, V_DIRTY, V_OTHERS, V_ITEMS, V_EXPIRING, V_NEWEST
    V_HEAD_ADDRESS, V_HEAD, V_RING, V_AVAIL_END, V_LISTS, V_NO_RING, V_NO_AVAIL, V_ON_AVAIL, V_CLASS_FREE, V_FREE_END, V_FREE_TWICE, V_FREE_KIND
    V_FREE_COUNT, V_POOL_KIND, V_POOL, V_OVERFLOW_USED, V_OVERFLOW, V_ROW, V_HEADER, V_CHUNK_BYTES

TEXTS = (
    "I15 stripe {0}: counts {1} items, its buckets hold {2}",
    "I16 bucket {0}: its chain does not end (overflow index {1}, hop {2})",
    "I16 bucket {0}: overflow bucket {1} in its chain is of bucket {2}, kind {3}",
    "I1 bucket {0} slot {1}: address {2} is no chunk",
    "I2 bucket {0} slot {1}: chunk {2} is {kind}",
    "I3 bucket {0} slot {1}: tag {2:#06x}, item {3:#06x}",
    "I4 bucket {0} slot {1}: the item belongs to bucket {2}",
    "I8 bucket {0} slot {1}: version {2}, the stripe is at {3}",
    "I6 bucket {0} slot {1}: key {2} and value {3} bytes in a chunk of {4}",
    "I5 bucket {0} slot {1}: the hash is not that of the key",
    "I7 bucket {0} slot {1}: the key {key!r} stands twice in this chain",
    "I13 bucket {0} slot {1}: page {2} of its list is not its own",
    "I18 page {0} chunk {1}: count {2}",
    "I9 page {0} chunk {1}: LIVE, and no slot of bucket {2} names it",
    "I19 page {0} chunk {1}: KEPT by row {2}, none of whose slots names it",
    "I22 page {0} chunk {1}: dirty, and the map does not have it",
    "I23 stripe {0}: counts {1} items of other databases than the first, its buckets hold {2}",
    "I23 stripe {0}: counts {2} items of database {1}, its buckets hold {3}",
    "I23 stripe {0}: counts {2} items of database {1} that expire, its buckets hold {3}",
    "I23 stripe {0}: {2} items of database {1} carry its newest generation, and the stripe counts another's",
    "I14 page {0}: its head {1} is no address",
    "I14 page {0}: BIG, and the item at {1} does not list it",
    "I11 class {0}: its ring has {1} pages and ends at {2}, n_pages is {3}",
    "I11 class {0}: its avail list ends at {1}",
    "I11 class {0}: page {1} is in its lists and not of it",
    "I11 class {0}: page {1} is not in its ring",
    "I11 class {0}: page {1} with {2} free chunks is not on its avail list",
    "I11 class {0}: page {1} with {2} free chunks is on its avail list",
    "I11 class {0}: counts {1} free chunks, its pages {2}",
    "I10 page {0}: its free list leads to chunk {1}",
    "I10 page {0}: its free list leads to chunk {1} twice",
    "I10 page {0}: chunk {1} on its free list is {kind}",
    "I10 page {0}: {1} chunks on its free list, n_free is {2}",
    "I12 page {0} is on the pool's list and of kind {1}",
    "I12 the page pool's list has {0} pages and ends at {1}, n_free is {2}",
    "I17 overflow bucket {0} is on the pool's list and in use",
    "I17 the overflow pool's list has {0} buckets and ends at {1}, n_free is {2}",
    "I21 page {0}: its row says {1:#x} of class {2:#x}",
    "I20 the header's geometry or key is not what it was at attach",
    "I20 class {0}: chunk_bytes {1}, {2} at attach",
)

ctypedef struct note_t:
    int what                # V_*
    uint64_t of[5]
    int n_key
    uint8_t key[KEY_SHOWN]

ctypedef struct notes_t:
    note_t* at
    int n
    int most

cdef note_t* note(notes_t* o, int what, uint64_t a=0, uint64_t b=0, uint64_t c=0, uint64_t d=0, uint64_t e=0) noexcept nogil:
    """Room for one was left; what is more than MOST is written over the last."""
    cdef note_t* to = &o.at[min(o.n, o.most - 1)]
    to.what = what
    to.of = [a, b, c, d, e]
    to.n_key = 0
    if o.n < o.most:
        o.n += 1
    return to

# -- buckets, stripe by stripe (the stripe held)

cdef void check_stripe(seg_t* s, uint32_t i, notes_t* o) noexcept nogil:
    cdef stripe_t* st = &s.stripes[i]
    cdef uint64_t b = i, n = 0, c
    cdef uint32_t epoch = ld32(&s.header.epoch)
    while b < s.n_buckets:
        n += check_chain(s, b, st, epoch, o)
        b += s.n_stripes
    c = st.count if st.count >> 32 == epoch else 0
    if <uint32_t>c != n:
        note(o, V_COUNT, i, <uint32_t>c, n)
    if st.turn & 1 == 0:
        check_databases(s, i, st, epoch, o)

cdef void check_databases(seg_t* s, uint32_t i, stripe_t* st, uint32_t epoch, notes_t* o) noexcept nogil:
    cdef databases_t* of = &s.databases[i]
    cdef census_t c
    cdef int d
    for d in range(DATABASES):
        c.asked[d] = of.tag[d]
    take_census(s, i, epoch, &c)
    if in_epoch(st.others, epoch) != c.others:
        note(o, V_OTHERS, i, in_epoch(st.others, epoch), c.others)
    if in_epoch(st.expiring, epoch) != c.expiring:
        note(o, V_EXPIRING, i, 0, in_epoch(st.expiring, epoch), c.expiring)
    for d in range(1, DATABASES):
        if of.n[d] != c.n[d]:
            note(o, V_ITEMS, i, d, of.n[d], c.n[d])
        if of.expiring[d] != c.n_expiring[d]:
            note(o, V_EXPIRING, i, d, of.expiring[d], c.n_expiring[d])
        if c.newest[d] != of.tag[d] and c.n_newest[d]:
            note(o, V_NEWEST, i, d, c.n_newest[d])

cdef uint64_t check_chain(seg_t* s, uint64_t b, stripe_t* st, uint32_t epoch, notes_t* o) noexcept nogil:
    """How many items of this epoch the chain holds."""
    cdef chain_t c
    cdef uint64_t seen[MOST_IN_CHAIN]       # addresses of the sound items so far
    cdef uint64_t w, n = 0
    cdef int i, hops = 0, n_seen = 0
    cdef uint32_t nxt = s.buckets[b].overflow
    cdef overflow_t* ov
    while nxt:
        if nxt > s.n_overflow or hops >= MAX_HOPS:
            note(o, V_CHAIN_END, b, nxt, hops)
            break
        ov = &s.overflow[nxt - 1]
        if ov.head != b or not (kind_of(ov.word) == OV_LINKED or (kind_of(ov.word) == OV_RESERVED and dead(s, token_of(ov.word)))):
            note(o, V_CHAIN, b, nxt - 1, ov.head, kind_of(ov.word))
        nxt = ov.next
        hops += 1
    chain_first(s, b, &c)
    while True:
        for i in range(c.n_slots):
            w = c.slot[i]
            if w:
                n += check_item(s, b, st, epoch, i, w, seen, &n_seen, o)
        if not chain_next(s, &c):
            return n

cdef int check_item(seg_t* s, uint64_t b, stripe_t* st, uint32_t epoch, int i, uint64_t w, uint64_t* seen, int* n_seen, notes_t* o) noexcept nogil:
    """The item that a slot names: 1 if it is of this epoch."""
    cdef uint64_t addr = w & ADDR_MASK, need
    cdef uint32_t index = 0, j, p, klen, vlen
    cdef bint is_big
    cdef item_t* it
    cdef item_t* other
    cdef int cls = chunk_class(s, addr, &index)
    cdef big_t g
    cdef note_t* said
    cdef uint8_t* key
    if cls < 0:
        note(o, V_ADDRESS, b, i, addr)
        return 0
    it = item_at(s, addr)
    key = <uint8_t*>it + 48
    klen = ld16r(&it.key_bytes)
    vlen = ld32r(&it.value_bytes)
    if kind_of(it.word) != LIVE:
        note(o, V_KIND, b, i, addr, kind_of(it.word))
    if w >> 48 != it.hash >> 48:
        note(o, V_TAG, b, i, w >> 48, it.hash >> 48)
    if bucket_of(s, it.hash) != b:
        note(o, V_BUCKET, b, i, bucket_of(s, it.hash))
    if it.cas == 0 or it.cas > st.seq:
        note(o, V_VERSION, b, i, it.cas, st.seq)
    is_big = ld8r(&it.flags) & FLAG_BIG != 0
    need = value_offset(klen) + vlen
    if is_big:
        big_shape(s, klen, vlen, &g)
        need = g.head_bytes
    if not 0 < klen <= MAX_KEY or need > s.chunk_bytes[cls]:
        note(o, V_SIZE, b, i, klen, vlen, s.chunk_bytes[cls])
        return it.epoch == epoch
    if siphash13(key, klen, s.k0, s.k1) != it.hash:
        note(o, V_HASH, b, i)
    for j in range(<uint32_t>n_seen[0]):
        other = item_at(s, seen[j])
        if other.hash == it.hash and other.key_bytes == klen and memcmp(<uint8_t*>other + 48, key, klen) == 0:
            said = note(o, V_TWICE, b, i)
            said.n_key = min(<int>klen, <int>KEY_SHOWN)
            memcpy(said.key, key, said.n_key)
    if n_seen[0] < MOST_IN_CHAIN:
        seen[n_seen[0]] = addr
        n_seen[0] += 1
    if is_big:
        for j in range(g.n_pages):
            p = ld32r(&(<uint32_t*>(<uint8_t*>it + value_offset(klen)))[j])
            if not big_owns(s, addr, p):
                note(o, V_BIG_PAGE, b, i, p)
    return it.epoch == epoch

# -- lists, lock by lock (the lock held). seen: zeroes, one byte for each page, overflow bucket or chunk of a page and one more; zeroes again

cdef void check_class(seg_t* s, uint32_t cls, uint8_t* seen, uint8_t* chunks, notes_t* o) noexcept nogil:
    cdef class_t* c = &s.classes[cls]
    cdef uint64_t p, n_free = 0, n_ring = 0
    cdef uint32_t at = c.ring
    while 0 < at <= s.n_pages and not seen[at]:
        seen[at] = 1
        n_ring += 1
        at = s.pages[at - 1].next
    if at != c.ring or n_ring != c.n_pages:
        note(o, V_RING, cls, n_ring, at, c.n_pages)
    at = c.avail
    while 0 < at <= s.n_pages and not seen[at] & 2:
        seen[at] |= 2
        at = s.pages[at - 1].next_avail
    if at:
        note(o, V_AVAIL_END, cls, at)
    for p in range(s.n_pages):
        if not page_in_class(s, p, cls):
            if seen[p + 1]:
                note(o, V_LISTS, cls, p)
            continue
        if not seen[p + 1] & 1:
            note(o, V_NO_RING, cls, p)
        if kind_of(s.pages[p].word) == PAGE_ACTIVE and (s.pages[p].n_free != 0) != (seen[p + 1] & 2 != 0):
            note(o, V_ON_AVAIL if seen[p + 1] & 2 else V_NO_AVAIL, cls, p, s.pages[p].n_free)
        n_free += s.pages[p].n_free
        check_free_list(s, p, cls, chunks, o)
    if c.n_free != n_free:
        note(o, V_CLASS_FREE, cls, c.n_free, n_free)
    memset(seen, 0, s.n_pages + 1)

cdef void check_free_list(seg_t* s, uint64_t p, uint32_t cls, uint8_t* seen, notes_t* o) noexcept nogil:
    cdef uint32_t at = s.pages[p].free, n = 0
    cdef int kind
    while at:
        if at > s.page_chunks[cls]:
            note(o, V_FREE_END, p, at - 1)
            break
        if seen[at]:
            note(o, V_FREE_TWICE, p, at - 1)
            break
        seen[at] = 1
        n += 1
        kind = kind_of(item_at(s, chunk_addr(s, p, cls, at - 1)).word)
        if kind != FREE:
            note(o, V_FREE_KIND, p, at - 1, 0, kind)
            break
        at = item_at(s, chunk_addr(s, p, cls, at - 1)).link
    if at == 0 and n != s.pages[p].n_free:
        note(o, V_FREE_COUNT, p, n, s.pages[p].n_free)
    memset(seen, 0, s.page_chunks[cls] + 1)

cdef void check_page_pool(seg_t* s, uint8_t* seen, notes_t* o) noexcept nogil:
    cdef uint64_t at = s.header.pages.list, n = 0
    while 0 < at <= s.n_pages and not seen[at]:
        seen[at] = 1
        n += 1
        if kind_of(s.pages[at - 1].word) != PAGE_FREE:
            note(o, V_POOL_KIND, at - 1, kind_of(s.pages[at - 1].word))
            return
        at = s.pages[at - 1].next
    if at or n != s.header.pages.n_free:
        note(o, V_POOL, n, at, s.header.pages.n_free)

cdef void check_overflow_pool(seg_t* s, uint8_t* seen, notes_t* o) noexcept nogil:
    cdef uint64_t at = s.header.overflow.list, n = 0, k
    cdef bint used
    while 0 < at <= s.n_overflow and not seen[at]:
        seen[at] = 1
        n += 1
        used = kind_of(s.overflow[at - 1].word) != OV_FREE
        for k in range(OV_SLOTS):
            used = used or s.overflow[at - 1].slot[k] != 0
        if used:
            note(o, V_OVERFLOW_USED, at - 1)
            return
        at = s.overflow[at - 1].next
    if at or n != s.header.overflow.n_free:
        note(o, V_OVERFLOW, n, at, s.header.overflow.n_free)


cdef class Verifier:
    cdef Mapping mapping            # another thread may close the handle meanwhile
    cdef seg_t* s
    cdef notes_t o
    cdef uint8_t* seen              # of pages, or of overflow buckets
    cdef uint8_t* chunks            # of a page
    cdef list found

    def __cinit__(self, Table table not None):
        cdef seg_t* s = table.ready()
        self.s = s
        self.mapping = table.mapping
        self.found = []
        self.o.most = MOST
        self.o.at = <note_t*>calloc(MOST, sizeof(note_t))
        self.seen = <uint8_t*>calloc(max(s.n_pages, s.n_overflow) + 1, 1)
        self.chunks = <uint8_t*>calloc(s.page_bytes // MIN_CHUNK + 1, 1)
        if self.o.at == NULL or self.seen == NULL or self.chunks == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.o.at)
        free(self.seen)
        free(self.chunks)

    cdef int tell(self) except -1:
        """No lock is held: say what was noted."""
        cdef int i
        cdef note_t* said
        for i in range(self.o.n):
            said = &self.o.at[i]
            if len(self.found) < MOST:
                self.found.append(TEXTS[said.what].format(said.of[0], said.of[1], said.of[2], said.of[3], said.of[4], kind=KINDS[said.of[3] & 7],
                                                          key=PyBytes_FromStringAndSize(<char*>said.key, said.n_key)))
        self.o.n = 0
        return 0

    cdef uint64_t patience(self) noexcept:
        return mono_ns() + 10 * self.s.limit_ns

    cdef int had(self, int rc) except -1:
        """After a wait for a lock. INTR: a signal's handlers are run, and the caller begins again. What is still busy is an error, not a violation."""
        if rc == INTR:
            PyErr_CheckSignals()
            if self.s.me[0] == 0:
                self.mapping.revive()       # a handler's fork child: no lock is taken with a token of 0
        elif rc != OK:
            raise errors.StripeBusy("a living process that does not run holds a lock that verify needs: try again")
        return 0

    cdef int stripe(self, uint32_t i) except -1:
        cdef seg_t* s = self.s
        cdef uint64_t until = self.patience()
        cdef int rc = INTR
        while rc == INTR:
            with nogil:
                rc = stripe_take(s, &s.stripes[i], until)
                if rc == OK:
                    check_stripe(s, i, &self.o)
                    #! verify: stripe looked at
                    stripe_release(s, &s.stripes[i])
            self.had(rc)
        return self.tell()

    cdef int slab_class(self, uint32_t cls) except -1:
        cdef seg_t* s = self.s
        cdef uint64_t until = self.patience()
        cdef int rc = INTR
        while rc == INTR:
            with nogil:
                rc = class_take(s, cls, until)
                if rc == OK:
                    check_class(s, cls, self.seen, self.chunks, &self.o)
                    #! verify: class looked at
                    class_release(s, cls)
            self.had(rc)
        return self.tell()

    cdef int pools(self) except -1:
        cdef seg_t* s = self.s
        cdef uint64_t until = self.patience()
        cdef int rc = INTR
        while rc == INTR:
            with nogil:
                rc = pool_take(s, until)
                if rc == OK:
                    check_page_pool(s, self.seen, &self.o)
                    lock_release(&s.header.pages.lock)
            self.had(rc)
        memset(self.seen, 0, s.n_pages + 1)
        until = self.patience()
        rc = INTR
        while rc == INTR:
            with nogil:
                rc = overflow_take(s, until)
                if rc == OK:
                    check_overflow_pool(s, self.seen, &self.o)
                    lock_release(&s.header.overflow.lock)
            self.had(rc)
        return self.tell()

    # -- chunks, page by page

    cdef int chunks_of(self, uint64_t p) except -1:
        cdef seg_t* s = self.s
        cdef uint32_t cls = <uint32_t>page_cls(s, p), i
        cdef uint64_t addr
        cdef item_t* it
        if cls >= s.n_classes or not page_in_class(s, p, cls):
            return 0
        for i in range(s.page_chunks[cls]):
            addr = chunk_addr(s, p, cls, i)
            it = item_at(s, addr)
            if refs_of(s, addr)[0] > MAX_REFS:
                note(&self.o, V_REFS, p, i, refs_of(s, addr)[0])
            if kind_of(ld64(&it.word)) == LIVE and not self.named(p, cls, addr):
                note(&self.o, V_LOST, p, i, bucket_of(s, it.hash))
            elif kind_of(ld64(&it.word)) == KEPT and not self.kept(addr):
                note(&self.o, V_KEPT, p, i, row_of(token_of(it.word)))
            elif s.policy == POLICY_BACK and ld8r(&it.flags) & FLAG_DIRTY and not dirty_bit(s, addr) and self.not_in_map(addr):
                note(&self.o, V_DIRTY, p, i)
        return self.tell()

    cdef bint not_in_map(self, uint64_t addr) except -1:
        """Who looks for dirty items clears a bit before he looks again."""
        cdef seg_t* s = self.s
        cdef uint8_t key[4096]
        cdef size_t n
        cdef uint64_t until
        cdef int rc, i
        for i in range(5):
            until = self.patience()
            rc = INTR
            while rc == INTR:
                with nogil:
                    rc = dirty_at(s, addr, key, &n, until)
                if rc == ABSENT or dirty_bit(s, addr):
                    return False
                self.had(rc)
            with nogil:
                usleep(1000)
        return True

    cdef bint named(self, uint64_t p, uint32_t cls, uint64_t addr) except -1:
        cdef seg_t* s = self.s
        cdef item_t* it = item_at(s, addr)
        cdef uint64_t h = ld64(&it.hash), b = bucket_of(s, h), until
        cdef int rc = INTR
        cdef bint fine = True
        if slot_naming(s, b, addr) != NULL:
            return True
        until = self.patience()
        while rc == INTR:
            with nogil:
                rc = stripe_take(s, stripe_of(s, b), until)
                if rc == OK:
                    fine = slot_naming(s, b, addr) != NULL or ld64(&it.hash) != h or kind_of(ld64(&it.word)) != LIVE or \
                        not page_in_class(s, p, cls)
                    stripe_release(s, stripe_of(s, b))
            self.had(rc)
        return fine

    cdef int big_page(self, uint64_t p) except -1:
        cdef seg_t* s = self.s
        cdef page_t* pg = &s.pages[p]
        cdef uint64_t w = ld64(&pg.word), head = ld64(&pg.head), h, until
        cdef stripe_t* st
        cdef int rc = INTR
        if kind_of(w) != PAGE_BIG or token_of(w) or head == 0:      # of head 0: for the next settle_pages
            return 0
        if not in_slab(s, head):
            note(&self.o, V_HEAD_ADDRESS, p, head)
            return self.tell()
        h = ld64(&item_at(s, head).hash)
        st = stripe_of(s, bucket_of(s, h))
        until = self.patience()
        while rc == INTR:
            with nogil:
                rc = stripe_take(s, st, until)
                if rc == OK:
                    if ld64(&pg.word) == w and ld64(&pg.head) == head and ld64(&item_at(s, head).hash) == h and \
                            kind_of(ld64(&item_at(s, head).word)) == LIVE and \
                            not (slot_naming(s, bucket_of(s, h), head) != NULL and big_lists(s, head, p)):
                        note(&self.o, V_HEAD, p, head)
                    stripe_release(s, st)
            self.had(rc)
        return self.tell()

    # -- rows, header

    cdef bint kept(self, uint64_t addr) except -1:
        """Is this KEPT chunk known to its owner, or not KEPT any more? Its owner notes it an instant after it is KEPT."""
        cdef seg_t* s = self.s
        cdef uint64_t w
        cdef uint32_t r, i
        for _ in range(5):
            w = ld64(&item_at(s, addr).word)
            r = row_of(token_of(w))
            if kind_of(w) != KEPT or r >= s.n_rows or dead(s, token_of(w)):
                return True             # or for any hand to settle
            for i in range(BATCH_CLASSES * BATCH_SLOTS):
                if ld64(&s.rows[r].batch[i // BATCH_SLOTS][i % BATCH_SLOTS]) == addr:
                    return True
            for i in range(PARKED_SLOTS):
                if ld64(&s.rows[r].parked[i]) == addr:
                    return True
            with nogil:
                usleep(5000)
        return False

    cdef int page(self, uint64_t p) except -1:
        cdef seg_t* s = self.s
        cdef uint64_t until
        cdef int rc = INTR
        if page_sound(s, p):
            return 0
        until = self.patience()
        while rc == INTR:
            with nogil:
                rc = pool_take(s, until)
                if rc == OK:
                    if not page_sound(s, p):
                        note(&self.o, V_ROW, p, ld64(&s.pages[p].word), ld32(&s.pages[p].cls))
                    lock_release(&s.header.pages.lock)
            self.had(rc)
        return self.tell()

    cdef int header(self) except -1:
        cdef seg_t* s = self.s
        cdef uint32_t i
        h = s.header
        if (h.n_rows, h.n_stripes, h.n_classes, h.page_shift, h.n_pages, h.n_buckets, h.n_overflow, h.slab_off, h.hash_key[0],
                h.hash_key[1], h.policy, h.dirty_off, h.databases_off) != (s.n_rows, s.n_stripes, s.n_classes, s.page_shift, s.n_pages, s.n_buckets, s.n_overflow,
                                   s.slab_off, s.k0, s.k1, s.policy, <uint8_t*>s.dirty - s.base, <uint8_t*>s.databases - s.base):
            note(&self.o, V_HEADER)
        for i in range(s.n_classes):
            if s.classes[i].chunk_bytes != s.chunk_bytes[i]:
                note(&self.o, V_CHUNK_BYTES, i, s.classes[i].chunk_bytes, s.chunk_bytes[i])
        return self.tell()

    def run(self):
        cdef seg_t* s = self.s
        cdef uint64_t p
        cdef uint32_t i
        self.header()
        for i in range(s.n_stripes):
            self.stripe(i)
        for i in range(s.n_classes):
            self.slab_class(i)
        for p in range(s.n_pages):
            self.chunks_of(p)
            self.big_page(p)
        for p in range(s.n_pages):
            self.page(p)
        self.pools()
        return self.found


def verify(Table table not None):
    """Hold every structure against the invariants above: a line for each violation, which begins with its number."""
    return Verifier(table).run()


def settle(Table table not None):
    """Put everything in order that the dead left, at once, as hands would in time. Returns: {kind of chunk word: how many, of the
    pages that are cut}, to see that every chunk is accounted for."""
    cdef seg_t* s = table.ready()
    cdef Mapping held = table.mapping
    cdef uint64_t p, i
    cdef uint32_t cls, k
    cdef uint64_t counts[8]
    cdef sigset_t before
    with nogil:
        shm_hold_signals(&before)
        for i in range(s.n_stripes):
            if stripe_take(s, &s.stripes[i], wait_until(s)) == OK:
                stripe_release(s, &s.stripes[i])
        for cls in range(s.n_classes):
            if class_take(s, cls, wait_until(s)) == OK:
                class_release(s, cls)
        if pool_take(s, wait_until(s)) == OK:
            lock_release(&s.header.pages.lock)
        if overflow_take(s, wait_until(s)) == OK:
            lock_release(&s.header.overflow.lock)
        if lock_take(s, &s.header.big.lock, wait_until(s)) >= OK:
            lock_release(&s.header.big.lock)
        for p in range(s.n_pages):
            settle_page(s, p, wait_until(s))
            cls = <uint32_t>page_cls(s, p)
            if cls < s.n_classes and page_in_class(s, p, cls):
                for k in range(s.page_chunks[cls]):
                    settle_chunk(s, chunk_addr(s, p, cls, k), wait_until(s))
        for p in range(s.n_pages):                  # again: pages whose head was settled after them
            settle_page(s, p, wait_until(s))
            cls = <uint32_t>page_cls(s, p)
            if cls < s.n_classes and page_in_class(s, p, cls) and class_take(s, cls, wait_until(s)) == OK:
                if page_in_class(s, p, cls):        # what is FREE and on no list
                    s.classes[cls].page_in_hand = <uint32_t>p + 1
                    rebuild_page_locked(s, p, cls)
                    if s.pages[p].n_free and kind_of(s.pages[p].word) == PAGE_ACTIVE:
                        avail_push_locked(s, &s.classes[cls], p)
                class_release(s, cls)
        settle_overflow(s, s.n_overflow, wait_until(s))
        memset(counts, 0, sizeof(counts))
        for p in range(s.n_pages):
            cls = <uint32_t>page_cls(s, p)
            if cls < s.n_classes and page_in_class(s, p, cls):
                for k in range(s.page_chunks[cls]):
                    counts[kind_of(ld64(&item_at(s, chunk_addr(s, p, cls, k)).word)) & 7] += 1
        shm_let_signals(&before)
    return {KINDS[k]: counts[k] for k in range(5)}


# ---- the supervisor's part ------------------------------------------------------------------------------------------------

cdef enum:
    HANDFUL = 32            # chunks evicted before the class's lock is taken to free them
    PATIENCE_NS = 20000000  # the supervisor comes again: it waits for no lock longer than this


def ask_for_snapshot(Table table not None):
    """Ask the supervisor for a snapshot: the number that header.snapshots_ended will have reached when it is written, or could not be."""
    cdef seg_t* s = table.ready()
    cdef uint64_t number = add64(&s.header.snapshots_asked, 1) + 1
    if ld32(&s.header.asleep) and cas32(&s.header.asleep, 1, 0):
        shm_ring(&s.header.doorbell)
    return number


cdef class Supervision:
    """The supervisor's hold on a segment: exactly one process has it, by a lock on a byte that death releases.

    Raises: SupervisorRunning. Race table: two begin at once -> F_OFD_SETLK is the taking. Crash: the byte is free at once, the
    header names a token whose byte nobody holds; what was in hand is RETIRED(dead), for any hand to settle.
    """
    cdef Table table
    cdef Mapping mapping
    cdef seg_t* s
    cdef void* lock_page
    cdef uint64_t token

    def __init__(self, Table table not None):
        cdef seg_t* s = table.ready()
        cdef int rc = hold_byte(s, SUPERVISOR_BYTE, &self.lock_page)
        if rc == 1:
            raise errors.SupervisorRunning(
                f"the segment {table.name!r} has a supervisor already: process {table.supervisor()['pid']}; there is exactly one")
        if rc != 0:
            raise OSError(errno, "cannot lock the supervisor's byte")
        self.table = table
        self.mapping = table.mapping
        self.s = s
        #! supervisor: byte locked
        s.supervising = True
        self.token = s.me[0]
        st64(&s.header.supervisor, s.me[0])
        #! supervisor: named
        self.beat()

    def __dealloc__(self):
        self.end()

    cpdef end(self):
        """Give it up; what is in hand is nothing between two calls."""
        if self.lock_page != NULL and self.s.me[0] != self.token:
            self.lock_page = NULL           # a fork child: the page is not mapped here, and the segment is its parent's to supervise
            self.s.supervising = False
        if self.lock_page != NULL:
            self.s.supervising = False
            st32(&self.s.header.asleep, 0)
            #! supervisor: leaving
            st64(&self.s.header.supervisor, 0)
            #! supervisor: left
            munmap(self.lock_page, 4096)
            self.lock_page = NULL

    cpdef beat(self):
        st64(&self.s.header.heartbeat_ms, mono_ns() // 1000000)

    def sleep(self, double seconds):
        """Sleep till a writer rings or the time is over: True if one rang."""
        cdef int rc
        cdef uint32_t bell = ld32(&self.s.header.doorbell)      # before any writer is told to ring it
        cdef uint64_t ns = <uint64_t>(seconds * 1e9)
        st32(&self.s.header.asleep, 1)
        #! supervisor: asleep
        with nogil:
            rc = shm_sleep(&self.s.header.doorbell, bell, ns)
        st32(&self.s.header.asleep, 0)
        if rc == 2:
            PyErr_CheckSignals()
        return rc == 0

    def make_room(self, uint32_t cls, uint32_t n):
        """Evict by the class's CLOCK hand till n chunks more are free: (evicted, pages taken from other classes)."""
        cdef seg_t* s = self.s
        cdef uint64_t hand[HANDFUL]
        cdef uint64_t p = 0, until_ns
        cdef uint32_t got = 0, i, k, moved = 0, evicted = 0, busy = 0
        cdef bint turned, more = True
        cdef int rc
        cdef sigset_t before
        if cls >= s.n_classes:
            raise errors.UsageError(f"slab classes are 0 to {s.n_classes - 1}")
        with nogil:
            shm_hold_signals(&before)
            while got < n and more:
                k = 0
                turned = False
                until_ns = mono_ns() + PATIENCE_NS      # for all of the handful: signals are held
                while k < min(<uint32_t>HANDFUL, n - got):
                    rc = evict_one(s, cls, 0, until_ns, &hand[k], &turned)
                    if rc == BUSY and busy < HANDFUL:   # the hand has moved on
                        busy += 1
                        continue
                    if rc != OK:
                        more = False
                        break
                    k += 1
                    #! make room: evicted
                if k and class_take(s, cls, mono_ns() + PATIENCE_NS) == OK:
                    for i in range(k):
                        chunk_push_locked(s, cls, hand[i])
                    class_release(s, cls)
                else:
                    for i in range(k):
                        chunk_free_list(s, cls, hand[i], 0)
                got += k
                #! make room: freed
                evicted += k
                if turned:
                    settle_pages(s, 4, 0)
                    settle_overflow(s, 16, 0)
                    if take_page(s, cls, False, mono_ns() + PATIENCE_NS, &p) == OK and give_page(s, p, cls, mono_ns() + PATIENCE_NS) == OK:
                        got += s.page_chunks[cls]
                        moved += 1
            shm_let_signals(&before)
        return evicted, moved

    def sweep(self, uint64_t first, uint64_t end, bint spares=False):
        """Free what has expired or was cleared (spares: it stays), and settle what the dead left, in pages first to end: how many were freed."""
        cdef seg_t* s = self.s
        cdef uint64_t p, addr, w, freed = 0
        cdef uint32_t k, cls
        cdef item_t* it
        cdef sigset_t before
        with nogil:
            shm_hold_signals(&before)
            for p in range(first, min(end, s.n_pages)):
                settle_page(s, p, mono_ns() + PATIENCE_NS)
                cls = <uint32_t>page_cls(s, p)
                if cls >= s.n_classes or not page_in_class(s, p, cls):
                    continue
                for k in range(s.page_chunks[cls]):
                    addr = chunk_addr(s, p, cls, k)
                    it = item_at(s, addr)
                    w = ld64(&it.word)
                    if kind_of(w) == LIVE:
                        if not spares and seems_stale(s, it) and evict_chunk(s, addr, cls, True, mono_ns() + PATIENCE_NS) == OK:
                            #! sweep: evicted
                            chunk_free_list(s, cls, addr, mono_ns() + PATIENCE_NS)
                            freed += 1
                    elif kind_of(w) != FREE and token_of(w) != s.me[0]:
                        settle_chunk(s, addr, mono_ns() + PATIENCE_NS)
            shm_let_signals(&before)
        return freed

    def sweep_overflow(self):
        """Settle the overflow buckets that the dead left."""
        cdef seg_t* s = self.s
        cdef sigset_t before
        with nogil:
            shm_hold_signals(&before)
            settle_overflow(s, s.n_overflow, mono_ns() + PATIENCE_NS)
            shm_let_signals(&before)


# ---- repair of damage -----------------------------------------------------------------------------------------------------

cdef inline bint sound(seg_t* s, uint64_t b, uint64_t w) noexcept nogil:
    """Does this slot of b's chain name a LIVE item that belongs there and fits its chunk? (I1 to I6, I13)"""
    cdef uint64_t addr = w & ADDR_MASK, room
    cdef uint32_t index = 0
    cdef int cls = chunk_class(s, addr, &index)
    cdef item_t* it = item_at(s, addr)
    cdef big_t big
    cdef uint32_t i, klen, vlen
    if cls < 0 or kind_of(ld64(&it.word)) != LIVE or version_of(it) == 0 or (it.hash ^ w) >> 48 or bucket_of(s, it.hash) != b:
        return False
    room = s.chunk_bytes[cls]
    klen = ld16r(&it.key_bytes)
    vlen = ld32r(&it.value_bytes)
    if klen == 0 or klen > MAX_KEY or value_offset(klen) > room:
        return False
    if it.hash != siphash13(<uint8_t*>it + 48, klen, s.k0, s.k1):
        return False
    if ld8r(&it.flags) & FLAG_BIG:
        big_shape(s, klen, vlen, &big)
        if big.head_bytes > room or vlen > s.max_value_bytes:
            return False
        for i in range(big.n_pages):
            if not big_owns(s, addr, ld32r(&(<uint32_t*>(<uint8_t*>it + value_offset(klen)))[i])):
                return False
        return True
    return value_offset(klen) + vlen <= room


cdef inline bint page_sound(seg_t* s, uint64_t p) noexcept nogil:
    """Does the row say one of the things that a row can say? (I21)"""
    cdef uint64_t w = ld64(&s.pages[p].word)
    cdef uint32_t mark = ld32(&s.pages[p].cls)
    cdef int kind = kind_of(w)
    if ld64(&s.pages[p].word) != w:
        return True                         # just changing
    if kind == PAGE_FREE:
        return w == 0 and mark == cls_mark(CLS_POOL)
    if kind == PAGE_ACTIVE or kind == PAGE_DRAINING:
        return page_cls(s, p) >= 0          # the token of an ACTIVE one means nothing
    if kind == PAGE_BIG:
        return mark == cls_mark(CLS_BIG) or mark == cls_mark(CLS_POOL) or token_of(w) != 0
    return kind == PAGE_CUTTING

def repair(Table table not None):
    """Remove what is damaged, so that the rest is sound: clear slots that name no item of their bucket, free items that no slot names,
    count stripes anew, then settle() and rebuild every list. Returns: (slots cleared, items freed)."""
    cdef seg_t* s = table.ready()
    cdef Mapping held = table.mapping
    cdef stripe_t* st
    cdef chain_t c
    cdef item_t* it
    cdef overflow_t* ov
    cdef uint64_t b, h, p, addr, n, cleared = 0, freed = 0
    cdef uint32_t i, k, cls, nxt, epoch
    cdef uint32_t* link
    cdef int j
    cdef sigset_t before
    cdef uint8_t* chained = <uint8_t*>calloc(s.n_overflow, 1)      # overflow buckets that a chain was seen to lead to
    if chained == NULL:
        raise MemoryError
    with nogil:
        shm_hold_signals(&before)
        for i in range(s.n_stripes):
            st = &s.stripes[i]
            if stripe_take(s, st, wait_until(s)) != OK:
                continue
            st64(&st.turn, st.turn | 1)         # sizes.pxd counts anew
            n = 0
            epoch = ld32(&s.header.epoch)
            b = i
            while b < s.n_buckets:
                link = &s.buckets[b].overflow
                j = 0
                while True:
                    nxt = ld32(link)
                    if nxt == 0:
                        break
                    if nxt > s.n_overflow or chained[nxt - 1] or j >= MAX_HOPS:
                        st32(link, 0)           # it leads nowhere, or into another chain
                        bump(s, b)
                        break
                    ov = &s.overflow[nxt - 1]
                    if ov.head != b and ov.head < s.n_buckets and in_chain(s, ov.head, nxt - 1):
                        st32(link, 0)           # the other chain's
                        bump(s, b)
                        break
                    chained[nxt - 1] = 1
                    st32(&ov.head, <uint32_t>b)
                    st64(&ov.word, word_of(OV_LINKED, 0))
                    link = &ov.next
                    j += 1
                chain_first(s, b, &c)
                while True:
                    for j in range(c.n_slots):
                        if c.slot[j] == 0:
                            continue
                        if not sound(s, b, c.slot[j]):
                            st64(&c.slot[j], 0)
                            #! repair: slot cleared
                            bump(s, b)
                            cleared += 1
                            continue
                        it = item_at(s, c.slot[j] & ADDR_MASK)
                        if version_of(it) > st.seq:
                            st64(&st.seq, version_of(it))
                        n += it.epoch == epoch
                    if not chain_next(s, &c):
                        break
                b += s.n_stripes
            st64(&st.count, <uint64_t>epoch << 32 | n)
            stripe_release(s, st)
        for p in range(s.n_pages):
            cls = <uint32_t>page_cls(s, p)
            if cls >= s.n_classes or not page_in_class(s, p, cls):
                continue
            for k in range(s.page_chunks[cls]):
                addr = chunk_addr(s, p, cls, k)
                it = item_at(s, addr)
                if kind_of(ld64(&it.word)) != LIVE:
                    continue
                h = ld64(&it.hash)
                b = bucket_of(s, h)
                st = stripe_of(s, b)
                if stripe_take(s, st, wait_until(s)) != OK:
                    continue
                if ld64(&it.hash) == h and kind_of(ld64(&it.word)) == LIVE and slot_naming(s, b, addr) == NULL and \
                        class_take(s, cls, wait_until(s)) == OK:
                    if page_in_class(s, p, cls):
                        st64(&it.word, word_of(RETIRED, s.me[0]))
                        #! repair: RETIRED
                        bump(s, b)
                        chunk_push_locked(s, cls, addr)
                        freed += 1
                    class_release(s, cls)
                stripe_release(s, st)
        for cls in range(s.n_classes):
            if class_take(s, cls, wait_until(s)) == OK:
                for p in range(s.n_pages):
                    if page_in_class(s, p, cls):
                        rebuild_page_locked(s, p, cls)
                class_repair(s, cls)
                class_release(s, cls)
        for p in range(s.n_pages):              # rows that say nothing sensible: no slot names a chunk there any more
            if not page_sound(s, p) and pool_take(s, wait_until(s)) == OK:
                if not page_sound(s, p):
                    pool_push_locked(s, p)
                lock_release(&s.header.pages.lock)
        if pool_take(s, wait_until(s)) == OK:
            pool_repair(s)
            lock_release(&s.header.pages.lock)
        for p in range(s.n_overflow):
            ov = &s.overflow[p]
            b = ld32(&ov.head)
            if chained[p] or ld64(&ov.word) == word_of(OV_FREE, 0):
                continue
            st = stripe_of(s, b if b < s.n_buckets else 0)
            if stripe_take(s, st, wait_until(s)) != OK:
                continue
            if not (b < s.n_buckets and in_chain(s, b, p)) and ld32(&ov.head) == b and overflow_take(s, wait_until(s)) == OK:
                if ld64(&ov.word) != word_of(OV_FREE, 0):
                    for j in range(OV_SLOTS):
                        st64(&ov.slot[j], 0)
                    if b < s.n_buckets:
                        bump(s, b)
                    overflow_push_locked(s, p)
                lock_release(&s.header.overflow.lock)
            stripe_release(s, st)
        if overflow_take(s, wait_until(s)) == OK:
            for p in range(s.n_overflow):
                if ld64(&s.overflow[p].word) == word_of(OV_FREE, 0):
                    for j in range(OV_SLOTS):
                        st64(&s.overflow[p].slot[j], 0)
            overflow_repair(s)
            lock_release(&s.header.overflow.lock)
        for addr in range((s.n_pages << s.page_shift) >> REFS_SHIFT):
            if s.refs[addr] > MAX_REFS:
                st8r(&s.refs[addr], 0)
        shm_let_signals(&before)
    free(chained)
    settle(table)
    return cleared, freed
