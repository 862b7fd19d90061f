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
"""
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memset
from posix.unistd cimport usleep

from shmcache.core._core cimport Mapping, Table
from shmcache.core.atomics cimport add64, cas32, ld8r, ld16r, ld32, ld32r, ld64, st8r, st32, st64
from shmcache.core.big cimport big_lists, big_owns, big_shape, big_t
from shmcache.core.bucket cimport (
    ADDR_MASK, MAX_HOPS, bucket_of, bump, chain_first, chain_next, chain_t, overflow_push_locked, overflow_repair, overflow_take, slot_naming, stripe_of, stripe_release, stripe_take)
from shmcache.core.layout cimport (
    BATCH_CLASSES, BATCH_SLOTS, CLS_BIG, CLS_POOL, FLAG_BIG, FLAG_DIRTY, MAX_KEY, MAX_REFS, OV_SLOTS, REFS_SHIFT, PARKED_SLOTS, POLICY_BACK, class_t, item_t, overflow_t, page_t, seg_t, stripe_t)
from shmcache.core.dirty cimport dirty_bit
from shmcache.core.clock cimport evict_chunk, evict_one, give_page, stale, take_page
from shmcache.core.lock cimport lock_release, lock_take, shm_ring, shm_sleep
from shmcache.core.settle cimport in_chain, settle_chunk, settle_overflow, settle_page, settle_pages
from shmcache.core.siphash cimport siphash13
from shmcache.core.slab cimport (
    chunk_addr, chunk_class, chunk_free_list, cls_mark, chunk_push_locked, class_release, class_repair, class_take, in_slab, item_at, page_cls, page_in_class, page_room, pool_push_locked, pool_repair, pool_take, rebuild_page_locked,
    refs_of, value_offset, avail_push_locked)
from shmcache.core.table cimport dirty_at
from shmcache.core.token cimport (
    ABSENT, FREE, KEPT, LIVE, OK, OV_FREE, OV_LINKED, OV_RESERVED, PAGE_ACTIVE, PAGE_BIG, PAGE_CUTTING, PAGE_DRAINING, PAGE_FREE, RESERVED, RETIRED,
    SUPERVISOR_BYTE, close, dead, kind_of, mono_ns, munmap, prober_ready, row_of, shm_keep_description, shm_ofd_lock, shm_reopen, token_of, word_of)

import gc

from shmcache import errors

KINDS = ("FREE", "RESERVED", "LIVE", "RETIRED", "KEPT", "of no kind", "of no kind", "of no kind")
MOST = 1000         # violations listed; more would not help anybody

cdef enum:
    MOST_IN_CHAIN = 512     # 7 slots, and 64 hops of 6


cdef class Verifier:
    cdef Mapping mapping            # another thread may close the handle meanwhile
    cdef seg_t* s
    cdef list found

    def __init__(self, Table table not None):
        self.s = table.ready()
        self.mapping = table.mapping
        self.found = []

    cdef void say(self, text):
        if len(self.found) < MOST:
            self.found.append(text)

    cdef int wait(self, int rc) except -1:
        """Locks are waited for without the GIL by the callers; what is still busy then is an error, not a violation."""
        if rc != OK:
            raise errors.StripeBusy("a living process that does not run holds a lock that verify needs: try again")
        return 0

    # -- buckets, stripe by stripe

    cdef int stripe(self, uint32_t i) except -1:
        cdef seg_t* s = self.s
        cdef stripe_t* st = &s.stripes[i]
        cdef uint64_t b, n = 0, c
        cdef uint32_t epoch
        cdef int rc
        with nogil:
            rc = stripe_take(s, st, 10 * s.limit_ns)
        self.wait(rc)
        # verify is the one place that runs Python under a lock, and only to say what is wrong: it makes plain objects, with the
        # collector off (verify()), and a process that holds a stripe for long is only waited for, never robbed.
        try:
            epoch = ld32(&s.header.epoch)
            b = i
            while b < s.n_buckets:
                n += self.chain(b, st, epoch)
                b += s.n_stripes
            c = st.count if st.count >> 32 == epoch else 0
            if <uint32_t>c != n:
                self.say(f"I15 stripe {i}: counts {<uint32_t>c} items, its buckets hold {n}")
        finally:
            stripe_release(s, st)
        return 0

    cdef uint64_t chain(self, uint64_t b, stripe_t* st, uint32_t epoch):
        """Check one chain, the stripe held; how many items of this epoch it holds. Python objects are made of violations only."""
        cdef seg_t* s = self.s
        cdef chain_t c
        cdef uint64_t seen[MOST_IN_CHAIN]       # addresses of the sound items so far
        cdef uint64_t w, n = 0
        cdef int i, hops = 0, n_seen = 0
        cdef uint32_t nxt = s.buckets[b].overflow
        cdef overflow_t* ov
        while nxt:
            if nxt > s.n_overflow or hops >= MAX_HOPS:
                self.say(f"I16 bucket {b}: its chain does not end (overflow index {nxt}, hop {hops})")
                break
            ov = &s.overflow[nxt - 1]
            if ov.head != b or not (kind_of(ov.word) == OV_LINKED or (kind_of(ov.word) == OV_RESERVED and dead(s, token_of(ov.word)))):
                self.say(f"I16 bucket {b}: overflow bucket {nxt - 1} in its chain is of bucket {ov.head}, kind {kind_of(ov.word)}")
            nxt = ov.next
            hops += 1
        chain_first(s, b, &c)
        while True:
            for i in range(c.n_slots):
                w = c.slot[i]
                if w:
                    n += self.item(b, st, epoch, i, w, seen, &n_seen)
            if not chain_next(s, &c):
                return n

    cdef int item(self, uint64_t b, stripe_t* st, uint32_t epoch, int i, uint64_t w, uint64_t* seen, int* n_seen):
        """Check the item that a slot names: 1 if it is of this epoch."""
        cdef seg_t* s = self.s
        cdef uint64_t addr = w & ADDR_MASK, need
        cdef uint32_t index = 0, j, p, klen, vlen
        cdef item_t* it
        cdef item_t* other
        cdef int cls = chunk_class(s, addr, &index)
        cdef big_t g
        cdef uint8_t* key
        if cls < 0:
            self.say(f"I1 bucket {b} slot {i}: address {addr} is no chunk")
            return 0
        it = item_at(s, addr)
        key = <uint8_t*>it + 48
        klen = ld16r(&it.key_bytes)
        vlen = ld32r(&it.value_bytes)
        if kind_of(it.word) != LIVE:
            self.say(f"I2 bucket {b} slot {i}: chunk {addr} is {KINDS[kind_of(it.word) & 7]}")
        if w >> 48 != it.hash >> 48:
            self.say(f"I3 bucket {b} slot {i}: tag {w >> 48:#06x}, item {it.hash >> 48:#06x}")
        if bucket_of(s, it.hash) != b:
            self.say(f"I4 bucket {b} slot {i}: the item belongs to bucket {bucket_of(s, it.hash)}")
        if it.cas == 0 or it.cas > st.seq:
            self.say(f"I8 bucket {b} slot {i}: version {it.cas}, the stripe is at {st.seq}")
        need = value_offset(klen) + vlen
        if it.flags & FLAG_BIG:
            big_shape(s, klen, vlen, &g)
            need = g.head_bytes
        if not 0 < klen <= MAX_KEY or need > s.chunk_bytes[cls]:
            self.say(f"I6 bucket {b} slot {i}: key {klen} and value {vlen} bytes in a chunk of {s.chunk_bytes[cls]}")
            return it.epoch == epoch
        if siphash13(key, klen, s.k0, s.k1) != it.hash:
            self.say(f"I5 bucket {b} slot {i}: the hash is not that of the key")
        for j in range(<uint32_t>n_seen[0]):
            other = item_at(s, seen[j])
            if other.hash == it.hash and other.key_bytes == klen and memcmp(<uint8_t*>other + 48, key, klen) == 0:
                self.say(f"I7 bucket {b} slot {i}: the key {key[:klen]!r} stands twice in this chain")
        if n_seen[0] < MOST_IN_CHAIN:
            seen[n_seen[0]] = addr
            n_seen[0] += 1
        if it.flags & FLAG_BIG:
            for j in range(g.n_pages):
                p = ld32r(&(<uint32_t*>(<uint8_t*>it + value_offset(klen)))[j])
                if not big_owns(s, addr, p):
                    self.say(f"I13 bucket {b} slot {i}: page {p} of its list is not its own")
        return it.epoch == epoch

    # -- chunks, page by page

    cdef int chunks(self, uint64_t p) except -1:
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
                self.say(f"I18 page {p} chunk {i}: count {refs_of(s, addr)[0]}")
            if kind_of(ld64(&it.word)) == LIVE and not self.named(p, cls, addr):
                self.say(f"I9 page {p} chunk {i}: LIVE, and no slot of bucket {bucket_of(s, it.hash)} names it")
            elif kind_of(ld64(&it.word)) == KEPT and not self.kept(addr):
                self.say(f"I19 page {p} chunk {i}: KEPT by row {row_of(token_of(it.word))}, none of whose slots names it")
            elif s.policy == POLICY_BACK and ld8r(&it.flags) & FLAG_DIRTY and not dirty_bit(s, addr) and self.not_in_map(addr):
                self.say(f"I22 page {p} chunk {i}: dirty, and the map does not have it")
        return 0

    cdef bint not_in_map(self, uint64_t addr) except -1:
        """Who looks for dirty items clears a bit before he looks again."""
        cdef seg_t* s = self.s
        cdef uint8_t key[4096]
        cdef size_t n
        cdef int rc, i
        for i in range(5):
            with nogil:
                rc = dirty_at(s, addr, key, &n, 10 * s.limit_ns)
            if rc == ABSENT or dirty_bit(s, addr):
                return False
            self.wait(rc)
            usleep(1000)
        return True

    cdef bint named(self, uint64_t p, uint32_t cls, uint64_t addr) except -1:
        cdef seg_t* s = self.s
        cdef item_t* it = item_at(s, addr)
        cdef uint64_t h = ld64(&it.hash), b = bucket_of(s, h)
        cdef stripe_t* st = stripe_of(s, b)
        cdef int rc
        cdef bint fine
        if slot_naming(s, b, addr) != NULL:
            return True
        with nogil:
            rc = stripe_take(s, st, 10 * s.limit_ns)
        self.wait(rc)
        fine = slot_naming(s, b, addr) != NULL or ld64(&it.hash) != h or kind_of(ld64(&it.word)) != LIVE or \
            not page_in_class(s, p, cls)
        stripe_release(s, st)
        return fine

    cdef int big_page(self, uint64_t p) except -1:
        cdef seg_t* s = self.s
        cdef page_t* pg = &s.pages[p]
        cdef uint64_t w = ld64(&pg.word), head = ld64(&pg.head), h
        cdef stripe_t* st
        cdef int rc
        if kind_of(w) != PAGE_BIG or token_of(w) or head == 0:      # of head 0: for the next settle_pages
            return 0
        if not in_slab(s, head):
            self.say(f"I14 page {p}: its head {head} is no address")
            return 0
        h = ld64(&item_at(s, head).hash)
        st = stripe_of(s, bucket_of(s, h))
        with nogil:
            rc = stripe_take(s, st, 10 * s.limit_ns)
        self.wait(rc)
        if ld64(&pg.word) == w and ld64(&pg.head) == head and ld64(&item_at(s, head).hash) == h and \
                kind_of(ld64(&item_at(s, head).word)) == LIVE and \
                not (slot_naming(s, bucket_of(s, h), head) != NULL and big_lists(s, head, p)):
            self.say(f"I14 page {p}: BIG, and the item at {head} does not list it")
        stripe_release(s, st)
        return 0

    # -- lists, lock by lock

    cdef int slab_class(self, uint32_t cls) except -1:
        cdef seg_t* s = self.s
        cdef class_t* c = &s.classes[cls]
        cdef uint64_t p, n_free = 0
        cdef uint32_t at
        cdef int rc
        with nogil:
            rc = class_take(s, cls, 10 * s.limit_ns)
        self.wait(rc)
        try:
            ring = set()
            at = c.ring
            while 0 < at <= s.n_pages and at not in ring:
                ring.add(at)
                at = s.pages[at - 1].next
            if at != c.ring or len(ring) != c.n_pages:
                self.say(f"I11 class {cls}: its ring has {len(ring)} pages and ends at {at}, n_pages is {c.n_pages}")
            avail = set()
            at = c.avail
            while 0 < at <= s.n_pages and at not in avail:
                avail.add(at)
                at = s.pages[at - 1].next_avail
            if at:
                self.say(f"I11 class {cls}: its avail list ends at {at}")
            for p in range(s.n_pages):
                if not page_in_class(s, p, cls):
                    if p + 1 in ring or p + 1 in avail:
                        self.say(f"I11 class {cls}: page {p} is in its lists and not of it")
                    continue
                if p + 1 not in ring:
                    self.say(f"I11 class {cls}: page {p} is not in its ring")
                if kind_of(s.pages[p].word) == PAGE_ACTIVE and (s.pages[p].n_free != 0) != (p + 1 in avail):
                    self.say(f"I11 class {cls}: page {p} with {s.pages[p].n_free} free chunks is {'' if p + 1 in avail else 'not '}on "
                             "its avail list")
                n_free += s.pages[p].n_free
                self.free_list(p, cls)
            if c.n_free != n_free:
                self.say(f"I11 class {cls}: counts {c.n_free} free chunks, its pages {n_free}")
        finally:
            class_release(s, cls)
        return 0

    cdef int free_list(self, uint64_t p, uint32_t cls) except -1:
        cdef seg_t* s = self.s
        cdef uint32_t at = s.pages[p].free, n = 0
        cdef uint8_t* seen = <uint8_t*>calloc(s.page_chunks[cls] + 1, 1)
        if seen == NULL:
            raise MemoryError
        while at:
            if at > s.page_chunks[cls] or seen[at]:
                self.say(f"I10 page {p}: its free list leads to chunk {<int64_t>at - 1}" + (" twice" if at <= s.page_chunks[cls] else ""))
                break
            seen[at] = 1
            n += 1
            if kind_of(item_at(s, chunk_addr(s, p, cls, at - 1)).word) != FREE:
                self.say(f"I10 page {p}: chunk {at - 1} on its free list is "
                         f"{KINDS[kind_of(item_at(s, chunk_addr(s, p, cls, at - 1)).word) & 7]}")
                break
            at = item_at(s, chunk_addr(s, p, cls, at - 1)).link
        free(seen)
        if at == 0 and n != s.pages[p].n_free:
            self.say(f"I10 page {p}: {n} chunks on its free list, n_free is {s.pages[p].n_free}")
        return 0

    cdef int pools(self) except -1:
        cdef seg_t* s = self.s
        cdef uint64_t at, k
        cdef int rc
        with nogil:
            rc = pool_take(s, 10 * s.limit_ns)
        self.wait(rc)
        try:
            seen = set()
            at = s.header.pages.list
            while 0 < at <= s.n_pages and at not in seen:
                seen.add(at)
                if kind_of(s.pages[at - 1].word) != PAGE_FREE:
                    self.say(f"I12 page {at - 1} is on the pool's list and of kind {kind_of(s.pages[at - 1].word)}")
                    break
                at = s.pages[at - 1].next
            else:
                if at or len(seen) != s.header.pages.n_free:
                    self.say(f"I12 the page pool's list has {len(seen)} pages and ends at {at}, n_free is {s.header.pages.n_free}")
        finally:
            lock_release(&s.header.pages.lock)
        with nogil:
            rc = overflow_take(s, 10 * s.limit_ns)
        self.wait(rc)
        try:
            seen = set()
            at = s.header.overflow.list
            while 0 < at <= s.n_overflow and at not in seen:
                seen.add(at)
                if kind_of(s.overflow[at - 1].word) != OV_FREE or any(s.overflow[at - 1].slot[k] for k in range(OV_SLOTS)):
                    self.say(f"I17 overflow bucket {at - 1} is on the pool's list and in use")
                    break
                at = s.overflow[at - 1].next
            else:
                if at or len(seen) != s.header.overflow.n_free:
                    self.say(f"I17 the overflow pool's list has {len(seen)} buckets and ends at {at}, n_free is {s.header.overflow.n_free}")
        finally:
            lock_release(&s.header.overflow.lock)
        return 0

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
        cdef int rc
        if page_sound(s, p):
            return 0
        with nogil:
            rc = pool_take(s, 10 * s.limit_ns)
        self.wait(rc)
        if not page_sound(s, p):
            self.say(f"I21 page {p}: its row says {ld64(&s.pages[p].word):#x} of class {ld32(&s.pages[p].cls):#x}")
        lock_release(&s.header.pages.lock)
        return 0

    cdef int header(self) except -1:
        cdef seg_t* s = self.s
        h = s.header
        if (h.n_rows, h.n_stripes, h.n_classes, h.page_shift, h.n_pages, h.n_buckets, h.n_overflow, h.slab_off, h.hash_key[0],
                h.hash_key[1], h.policy, h.dirty_off) != (s.n_rows, s.n_stripes, s.n_classes, s.page_shift, s.n_pages, s.n_buckets, s.n_overflow,
                                   s.slab_off, s.k0, s.k1, s.policy, <uint8_t*>s.dirty - s.base):
            self.say("I20 the header's geometry or key is not what it was at attach")
        for i in range(s.n_classes):
            if s.classes[i].chunk_bytes != s.chunk_bytes[i]:
                self.say(f"I20 class {i}: chunk_bytes {s.classes[i].chunk_bytes}, {s.chunk_bytes[i]} at attach")
        return 0

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
            self.chunks(p)
            self.big_page(p)
        for p in range(s.n_pages):
            self.page(p)
        self.pools()
        return self.found


def verify(Table table not None):
    """Hold every structure against the invariants above: a line for each violation, which begins with its number."""
    collecting = gc.isenabled()
    gc.disable()        # a collection under a stripe could run a finalizer that wants that stripe
    try:
        return Verifier(table).run()
    finally:
        if collecting:
            gc.enable()


def settle(Table table not None):
    """Put everything in order that the dead left, at once, as hands would in time. Returns: {kind of chunk word: how many, of the
    pages that are cut}, to see that every chunk is accounted for."""
    cdef seg_t* s = table.ready()
    cdef Mapping held = table.mapping
    cdef uint64_t p, i
    cdef uint32_t cls, k
    cdef uint64_t counts[8]
    with nogil:
        for i in range(s.n_stripes):
            if stripe_take(s, &s.stripes[i], s.limit_ns) == OK:
                stripe_release(s, &s.stripes[i])
        for cls in range(s.n_classes):
            if class_take(s, cls, s.limit_ns) == OK:
                class_release(s, cls)
        if pool_take(s, s.limit_ns) == OK:
            lock_release(&s.header.pages.lock)
        if overflow_take(s, s.limit_ns) == OK:
            lock_release(&s.header.overflow.lock)
        if lock_take(s, &s.header.big.lock, s.limit_ns) >= OK:
            lock_release(&s.header.big.lock)
        for p in range(s.n_pages):
            settle_page(s, p, s.limit_ns)
            cls = <uint32_t>page_cls(s, p)
            if cls < s.n_classes and page_in_class(s, p, cls):
                for k in range(s.page_chunks[cls]):
                    settle_chunk(s, chunk_addr(s, p, cls, k), s.limit_ns)
        for p in range(s.n_pages):                  # again: pages whose head was settled after them
            settle_page(s, p, s.limit_ns)
            cls = <uint32_t>page_cls(s, p)
            if cls < s.n_classes and page_in_class(s, p, cls) and class_take(s, cls, s.limit_ns) == OK:
                if page_in_class(s, p, cls):        # what is FREE and on no list
                    s.classes[cls].page_in_hand = <uint32_t>p + 1
                    rebuild_page_locked(s, p, cls)
                    if s.pages[p].n_free and kind_of(s.pages[p].word) == PAGE_ACTIVE:
                        avail_push_locked(s, &s.classes[cls], p)
                class_release(s, cls)
        settle_overflow(s, s.n_overflow, s.limit_ns)
        memset(counts, 0, sizeof(counts))
        for p in range(s.n_pages):
            cls = <uint32_t>page_cls(s, p)
            if cls < s.n_classes and page_in_class(s, p, cls):
                for k in range(s.page_chunks[cls]):
                    counts[kind_of(ld64(&item_at(s, chunk_addr(s, p, cls, k)).word)) & 7] += 1
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
        cdef int fd, rc
        if not prober_ready(s):
            raise OSError(errno, "cannot open the segment again")
        fd = shm_reopen(s.prober, s.path, s.dev, s.ino)
        if fd < 0:
            raise OSError(errno, "cannot open the segment again")
        self.lock_page = shm_keep_description(fd)
        rc = shm_ofd_lock(fd, False, SUPERVISOR_BYTE) if self.lock_page != NULL else -1
        close(fd)
        if rc != 0:
            if self.lock_page != NULL:
                munmap(self.lock_page, 4096)
                self.lock_page = NULL
            if rc == 1:
                raise errors.SupervisorRunning(
                    f"the segment {table.name!r} has a supervisor already: process {table.supervisor()['pid']}; there is exactly one")
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
        cdef uint64_t p = 0
        cdef uint32_t got = 0, i, k, moved = 0, evicted = 0
        cdef bint turned, more = True
        if cls >= s.n_classes:
            raise errors.UsageError(f"slab classes are 0 to {s.n_classes - 1}")
        with nogil:
            while got < n and more:
                k = 0
                turned = False
                while k < min(<uint32_t>HANDFUL, n - got):
                    if evict_one(s, cls, 0, PATIENCE_NS, &hand[k], &turned) != OK:
                        more = False
                        break
                    k += 1
                    #! make room: evicted
                if k and class_take(s, cls, PATIENCE_NS) == OK:
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
                    if take_page(s, cls, False, PATIENCE_NS, &p) == OK and give_page(s, p, cls, PATIENCE_NS) == OK:
                        got += s.page_chunks[cls]
                        moved += 1
        return evicted, moved

    def sweep(self, uint64_t first, uint64_t end):
        """Free what has expired or was cleared, and settle what the dead left, in pages first to end: how many were freed."""
        cdef seg_t* s = self.s
        cdef uint64_t p, addr, w, freed = 0
        cdef uint32_t k, cls
        cdef item_t* it
        with nogil:
            for p in range(first, min(end, s.n_pages)):
                settle_page(s, p, PATIENCE_NS)
                cls = <uint32_t>page_cls(s, p)
                if cls >= s.n_classes or not page_in_class(s, p, cls):
                    continue
                for k in range(s.page_chunks[cls]):
                    addr = chunk_addr(s, p, cls, k)
                    it = item_at(s, addr)
                    w = ld64(&it.word)
                    if kind_of(w) == LIVE:
                        if stale(s, it) and evict_chunk(s, addr, cls, True, PATIENCE_NS) == OK:
                            #! sweep: evicted
                            chunk_free_list(s, cls, addr, PATIENCE_NS)
                            freed += 1
                    elif kind_of(w) != FREE and token_of(w) != s.me[0]:
                        settle_chunk(s, addr, PATIENCE_NS)
        return freed

    def sweep_overflow(self):
        """Settle the overflow buckets that the dead left."""
        cdef seg_t* s = self.s
        with nogil:
            settle_overflow(s, s.n_overflow, PATIENCE_NS)


# ---- repair of damage -----------------------------------------------------------------------------------------------------

cdef inline bint sound(seg_t* s, uint64_t b, uint64_t w) noexcept nogil:
    """Does this slot of b's chain name a LIVE item that belongs there and fits its chunk? (I1 to I6, I13)"""
    cdef uint64_t addr = w & ADDR_MASK, room
    cdef uint32_t index = 0
    cdef int cls = chunk_class(s, addr, &index)
    cdef item_t* it = item_at(s, addr)
    cdef big_t big
    cdef uint32_t i
    if cls < 0 or kind_of(ld64(&it.word)) != LIVE or it.cas == 0 or (it.hash ^ w) >> 48 or bucket_of(s, it.hash) != b:
        return False
    room = s.chunk_bytes[cls]
    if it.key_bytes == 0 or it.key_bytes > MAX_KEY or value_offset(it.key_bytes) > room:
        return False
    if it.hash != siphash13(<uint8_t*>it + 48, it.key_bytes, s.k0, s.k1):
        return False
    if it.flags & FLAG_BIG:
        big_shape(s, it.key_bytes, it.value_bytes, &big)
        if big.head_bytes > room or it.value_bytes > s.max_value_bytes:
            return False
        for i in range(big.n_pages):
            if not big_owns(s, addr, (<uint32_t*>(<uint8_t*>it + value_offset(it.key_bytes)))[i]):
                return False
        return True
    return value_offset(it.key_bytes) + it.value_bytes <= room


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
    cdef uint8_t* chained = <uint8_t*>calloc(s.n_overflow, 1)      # overflow buckets that a chain was seen to lead to
    if chained == NULL:
        raise MemoryError
    with nogil:
        for i in range(s.n_stripes):
            st = &s.stripes[i]
            if stripe_take(s, st, s.limit_ns) != OK:
                continue
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
                        if it.cas > st.seq:
                            st64(&st.seq, it.cas)
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
                if stripe_take(s, st, s.limit_ns) != OK:
                    continue
                if ld64(&it.hash) == h and kind_of(ld64(&it.word)) == LIVE and slot_naming(s, b, addr) == NULL and \
                        class_take(s, cls, s.limit_ns) == OK:
                    if page_in_class(s, p, cls):
                        st64(&it.word, word_of(RETIRED, s.me[0]))
                        #! repair: RETIRED
                        bump(s, b)
                        chunk_push_locked(s, cls, addr)
                        freed += 1
                    class_release(s, cls)
                stripe_release(s, st)
        for cls in range(s.n_classes):
            if class_take(s, cls, s.limit_ns) == OK:
                for p in range(s.n_pages):
                    if page_in_class(s, p, cls):
                        rebuild_page_locked(s, p, cls)
                class_repair(s, cls)
                class_release(s, cls)
        for p in range(s.n_pages):              # rows that say nothing sensible: no slot names a chunk there any more
            if not page_sound(s, p) and pool_take(s, s.limit_ns) == OK:
                if not page_sound(s, p):
                    pool_push_locked(s, p)
                lock_release(&s.header.pages.lock)
        if pool_take(s, s.limit_ns) == OK:
            pool_repair(s)
            lock_release(&s.header.pages.lock)
        for p in range(s.n_overflow):
            ov = &s.overflow[p]
            b = ld32(&ov.head)
            if chained[p] or ld64(&ov.word) == word_of(OV_FREE, 0):
                continue
            st = stripe_of(s, b if b < s.n_buckets else 0)
            if stripe_take(s, st, s.limit_ns) != OK:
                continue
            if not (b < s.n_buckets and in_chain(s, b, p)) and ld32(&ov.head) == b and overflow_take(s, s.limit_ns) == OK:
                if ld64(&ov.word) != word_of(OV_FREE, 0):
                    for j in range(OV_SLOTS):
                        st64(&ov.slot[j], 0)
                    if b < s.n_buckets:
                        bump(s, b)
                    overflow_push_locked(s, p)
                lock_release(&s.header.overflow.lock)
            stripe_release(s, st)
        if overflow_take(s, s.limit_ns) == OK:
            for p in range(s.n_overflow):
                if ld64(&s.overflow[p].word) == word_of(OV_FREE, 0):
                    for j in range(OV_SLOTS):
                        st64(&s.overflow[p].slot[j], 0)
            overflow_repair(s)
            lock_release(&s.header.overflow.lock)
        for addr in range((s.n_pages << s.page_shift) >> REFS_SHIFT):
            if s.refs[addr] > MAX_REFS:
                st8r(&s.refs[addr], 0)
    free(chained)
    settle(table)
    return cleared, freed
