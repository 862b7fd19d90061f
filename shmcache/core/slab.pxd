# Slab memory: pages cut into chunks of one class, lists of the free ones, the page pool, and the chunks in hand.
#
# Invariants
#   a chunk's word is the truth; free lists, avail lists and rings are caches of words, rebuilt by whoever takes the lock of
#   the dead (class_repair, pool_repair)
#   a word goes to and from FREE only under the class lock, and the class notes the page in hand before
#   rule P: a chunk is written only by one who has proof that it is one: a slot names it and I hold that stripe; or its word
#   carries my token; or I hold its class lock and its page row says ACTIVE or DRAINING of that class
#   rule C: a word that names somebody else is changed only by compare-and-swap from the value on which I decided
#   FREE is FREE whatever token its word has: a flipped bit there costs nothing
#   a page is published ACTIVE by one store after all its words are FREE; it leaves its class only when, under the class
#   lock, all its words are FREE
#   a page's class is stored under the lock of that class, before the page is ACTIVE; it stands there until another one is. So who
#   has the lock and loads the word first, and finds it ACTIVE or DRAINING, and then the class, and finds the lock's, has a page of
#   the class. The other way round it may be one that was just leaving by the first load, and by the second is another class's:
#   its list was rebuilt with links every so many bytes, which are not where its chunks are, but within their values
#
# Crash while holding a class lock: the taker rebuilds the list of the page in hand and the class's lists. A chunk popped and not
# yet stored in a batch slot is RESERVED(dead): the hand settles it. Crash while holding the pool lock: the list is rebuilt from
# the page words. A page CUTTING(dead) goes back to the pool (settle_pages).
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from shmcache.core.atomics cimport add64, cas64, ld8r, ld32, ld64, st8, st8r, st32, st64, xchg64
from shmcache.core.layout cimport BATCH_CLASSES, BATCH_SLOTS, CLS_BIG, CLS_POOL, GRANULE_SHIFT, MIN_CHUNK, PARKED_SLOTS, REFS_SHIFT, \
    REPAIRED_CLASS, REPAIRED_POOL, \
    class_t, header_t, item_t, page_t, pool_t, seg_t
from shmcache.core.lock cimport lock_release, lock_take, wait_until
from shmcache.core.token cimport BUSY, FREE, INTR, KEPT, LIVE, NO_ROOM, OK, PAGE_ACTIVE, PAGE_CUTTING, PAGE_DRAINING, PAGE_FREE, \
    RESERVED, RETIRED, TAKEN_OVER, kind_of, token_of, word_of

# ---- places ---------------------------------------------------------------------------------------------------------

cdef inline item_t* item_at(seg_t* s, uint64_t addr) noexcept nogil:
    return <item_t*>(s.base + (addr << GRANULE_SHIFT))

cdef inline bint in_slab(seg_t* s, uint64_t addr) noexcept nogil:
    """Is there an item header's worth of slab memory at this address? Every address out of the segment is asked this."""
    return s.slab_lo <= addr and addr + 3 <= s.slab_hi

cdef inline uint64_t page_of(seg_t* s, uint64_t addr) noexcept nogil:
    return (addr - s.slab_lo) >> (s.page_shift - GRANULE_SHIFT)

cdef inline uint8_t* refs_of(seg_t* s, uint64_t addr) noexcept nogil:
    return s.refs + ((addr - s.slab_lo) >> (REFS_SHIFT - GRANULE_SHIFT))

cdef inline uint64_t chunk_addr(seg_t* s, uint64_t page, uint32_t cls, uint32_t i) noexcept nogil:
    return s.slab_lo + (((page << s.page_shift) + <uint64_t>i * s.chunk_bytes[cls]) >> GRANULE_SHIFT)

cdef inline uint64_t page_room(seg_t* s, uint64_t addr) noexcept nogil:
    """Bytes from this address to the end of its page: what no length may exceed."""
    return s.page_bytes - (((addr - s.slab_lo) << GRANULE_SHIFT) & (s.page_bytes - 1))

cdef inline uint64_t value_offset(uint64_t key_bytes) noexcept nogil:
    """Of the value in its chunk: aligned to 8, so that a counter is one load and one store."""
    return 48 + ((key_bytes + 7) & ~<uint64_t>7)

cdef inline int class_for(seg_t* s, uint64_t n_bytes) noexcept nogil:
    """The smallest class whose chunks hold n_bytes; -1: none does."""
    cdef int lo = 0, hi = <int>s.n_classes, mid
    while lo < hi:
        mid = (lo + hi) >> 1
        if s.chunk_bytes[mid] < n_bytes:
            lo = mid + 1
        else:
            hi = mid
    return lo if lo < <int>s.n_classes else -1

cdef inline uint32_t cls_mark(uint32_t cls) noexcept nogil:
    return cls | (~cls & 0xffff) << 16

cdef inline int page_cls(seg_t* s, uint64_t page) noexcept nogil:
    """The slab class that a page was cut for last; -1: none, or the row is damaged."""
    cdef uint32_t mark = ld32(&s.pages[page].cls), cls = mark & 0xffff
    return <int>cls if mark == cls_mark(cls) and cls < s.n_classes else -1

cdef inline bint page_in_class(seg_t* s, uint64_t page, uint32_t cls) noexcept nogil:
    """With the class's lock it is so, and stays so; without it that is a hint, but for a page that something of this process's keeps."""
    cdef int k
    if page >= s.n_pages or cls >= s.n_classes:
        return False
    k = kind_of(ld64(&s.pages[page].word))
    #~ page: word loaded
    return (k == PAGE_ACTIVE or k == PAGE_DRAINING) and ld32(&s.pages[page].cls) == cls_mark(cls)

cdef inline int chunk_class(seg_t* s, uint64_t addr, uint32_t* index) noexcept nogil:
    """The class of which this address is a chunk, as the page table has it just now; -1: it is none."""
    cdef uint64_t page, off
    cdef int cls
    if not in_slab(s, addr):
        return -1
    page = page_of(s, addr)
    cls = page_cls(s, page)
    if cls < 0 or not page_in_class(s, page, cls):
        return -1
    off = s.page_bytes - page_room(s, addr)
    index[0] = <uint32_t>(off // s.chunk_bytes[cls])
    if off % s.chunk_bytes[cls] or index[0] >= s.page_chunks[cls]:
        return -1
    return cls

# ---- lists of a class (its lock held) ---------------------------------------------------------------------------------

cdef inline void avail_push_locked(seg_t* s, class_t* c, uint64_t p) noexcept nogil:
    cdef page_t* pg = &s.pages[p]
    cdef uint32_t first = ld32(&c.avail)
    if pg.listed:
        return
    st32(&pg.prev_avail, 0)
    st32(&pg.next_avail, first)
    if 0 < first <= s.n_pages:
        st32(&s.pages[first - 1].prev_avail, <uint32_t>p + 1)
    st8(&pg.listed, 1)
    #! avail push: listed
    st32(&c.avail, <uint32_t>p + 1)
    #! avail push: first

cdef inline void avail_remove_locked(seg_t* s, class_t* c, uint64_t p) noexcept nogil:
    cdef page_t* pg = &s.pages[p]
    cdef uint32_t nxt = ld32(&pg.next_avail), prv = ld32(&pg.prev_avail)
    if not pg.listed:
        return
    if 0 < prv <= s.n_pages:
        st32(&s.pages[prv - 1].next_avail, nxt)
    else:
        st32(&c.avail, nxt)
    if 0 < nxt <= s.n_pages:
        st32(&s.pages[nxt - 1].prev_avail, prv)
    #! avail remove: unlinked
    st8(&pg.listed, 0)
    #! avail remove: not listed

cdef inline void ring_link_locked(seg_t* s, class_t* c, uint64_t p, uint64_t at) noexcept nogil:
    """Put page p into the ring before page `at`, which is in it; an `at` that is no page: into an empty ring."""
    cdef page_t* pg = &s.pages[p]
    cdef uint32_t before
    if at >= s.n_pages:
        st32(&pg.next, <uint32_t>p + 1)
        st32(&pg.prev, <uint32_t>p + 1)
        st32(&c.ring, <uint32_t>p + 1)
    else:
        before = ld32(&s.pages[at].prev)
        if not (0 < before <= s.n_pages):
            before = <uint32_t>at + 1
        st32(&pg.next, <uint32_t>at + 1)
        st32(&pg.prev, before)
        #! ring link: page points in
        st32(&s.pages[before - 1].next, <uint32_t>p + 1)
        st32(&s.pages[at].prev, <uint32_t>p + 1)
    #! ring link: linked
    st32(&c.n_pages, c.n_pages + 1)
    #! ring link: counted
    st32(&c.n_free, c.n_free + pg.n_free)

cdef inline void ring_insert_locked(seg_t* s, class_t* c, uint64_t p) noexcept nogil:
    """Before the page under the hand: what is in it is young, and is to be visited last."""
    cdef uint64_t at = ld64(&c.hand) >> 32
    if at == p or ld32(&c.ring) == 0 or not page_in_class(s, at, page_cls(s, p)):
        at = <uint32_t>(ld32(&c.ring) - 1)
    ring_link_locked(s, c, p, at)

cdef inline void ring_remove_locked(seg_t* s, class_t* c, uint64_t p) noexcept nogil:
    cdef page_t* pg = &s.pages[p]
    cdef uint64_t hand = ld64(&c.hand)
    cdef uint32_t nxt = ld32(&pg.next), prv = ld32(&pg.prev)
    if nxt == p + 1 or not (0 < nxt <= s.n_pages) or not (0 < prv <= s.n_pages):
        st32(&c.ring, 0)
    else:
        st32(&s.pages[prv - 1].next, nxt)
        #! ring remove: half out
        st32(&s.pages[nxt - 1].prev, prv)
        if c.ring == p + 1:
            st32(&c.ring, nxt)
        if hand >> 32 == p:
            cas64(&c.hand, hand, <uint64_t>(nxt - 1) << 32)
    #! ring remove: out
    if c.n_pages:
        st32(&c.n_pages, c.n_pages - 1)
    st32(&c.n_free, c.n_free - min(c.n_free, pg.n_free))

cdef inline void rebuild_page_locked(seg_t* s, uint64_t p, uint32_t cls) noexcept nogil:
    """The free list of a page of the class anew, from the words of its chunks."""
    cdef page_t* pg = &s.pages[p]
    cdef uint32_t i = s.page_chunks[cls], first = 0, n = 0
    cdef item_t* it
    while i > 0:
        i -= 1
        it = item_at(s, chunk_addr(s, p, cls, i))
        if kind_of(ld64(&it.word)) == FREE:
            st32(&it.link, first)
            first = i + 1
            n += 1
    #! rebuild: linked
    st32(&pg.free, first)
    #! rebuild: list stored
    st32(&s.classes[cls].n_free, s.classes[cls].n_free - min(s.classes[cls].n_free, pg.n_free) + n)
    st32(&pg.n_free, n)

cdef inline void class_repair(seg_t* s, uint32_t cls) noexcept nogil:
    """After the death of the lock's holder: the page in hand, the ring and the avail list. Idempotent. 5 ns per page."""
    cdef class_t* c = &s.classes[cls]
    cdef uint64_t p = <uint32_t>(ld32(&c.page_in_hand) - 1)
    if page_in_class(s, p, cls):
        rebuild_page_locked(s, p, cls)
    st32(&c.ring, 0)
    #! class repair: lists dropped
    st32(&c.avail, 0)
    st32(&c.n_pages, 0)
    st32(&c.n_free, 0)
    for p in range(s.n_pages):
        if page_in_class(s, p, cls):
            ring_link_locked(s, c, p, <uint32_t>(ld32(&c.ring) - 1))    # not by the hand: its page may not be in the new ring yet
            st8(&s.pages[p].listed, 0)
            #! class repair: page in the ring
            if s.pages[p].n_free and kind_of(ld64(&s.pages[p].word)) == PAGE_ACTIVE:
                avail_push_locked(s, c, p)
    #! class repair: done
    st32(&c.page_in_hand, 0)

cdef inline int class_take(seg_t* s, uint32_t cls, uint64_t until_ns) noexcept nogil:
    cdef int rc
    #? class: to be taken
    rc = lock_take(s, &s.classes[cls].lock, until_ns)
    if rc == TAKEN_OVER:
        class_repair(s, cls)
        add64(&s.row.repairs[REPAIRED_CLASS], 1)
        return OK
    return rc

cdef inline void class_release(seg_t* s, uint32_t cls) noexcept nogil:
    lock_release(&s.classes[cls].lock)

cdef inline void chunk_push_locked(seg_t* s, uint32_t cls, uint64_t addr) noexcept nogil:
    """Free a chunk that is this process's and that no slot names (its bucket's version was counted up since)."""
    cdef class_t* c = &s.classes[cls]
    cdef uint64_t p = page_of(s, addr)
    cdef page_t* pg = &s.pages[p]
    cdef item_t* it = item_at(s, addr)
    cdef uint32_t i = <uint32_t>((s.page_bytes - page_room(s, addr)) // s.chunk_bytes[cls])
    if c.page_in_hand != p + 1:
        st32(&c.page_in_hand, <uint32_t>p + 1)
    #! push: page noted
    st32(&it.link, pg.free)
    #! push: linked
    st64(&it.word, word_of(FREE, 0))
    #! push: FREE
    st32(&pg.free, i + 1)
    #! push: on the list
    st32(&pg.n_free, pg.n_free + 1)
    st32(&c.n_free, c.n_free + 1)
    #! push: counted
    if kind_of(ld64(&pg.word)) == PAGE_ACTIVE:
        avail_push_locked(s, c, p)

cdef inline uint64_t chunk_pop_locked(seg_t* s, uint32_t cls) noexcept nogil:
    """A chunk, now RESERVED(this process); 0: the class has none free."""
    cdef class_t* c = &s.classes[cls]
    cdef uint64_t p, addr
    cdef page_t* pg
    cdef item_t* it
    cdef uint32_t first
    cdef int mended
    for mended in range(4):
        p = <uint32_t>(ld32(&c.avail) - 1)
        if p >= s.n_pages:
            return 0
        pg = &s.pages[p]
        if not page_in_class(s, p, cls) or not pg.listed:
            class_repair(s, cls)                # a damaged list: from the words, once more
            continue
        if c.page_in_hand != p + 1:
            st32(&c.page_in_hand, <uint32_t>p + 1)
        first = ld32(&pg.free)
        addr = chunk_addr(s, p, cls, first - 1)
        if not (0 < first <= s.page_chunks[cls]) or kind_of(ld64(&item_at(s, addr).word)) != FREE:
            rebuild_page_locked(s, p, cls)
            if pg.n_free == 0:
                avail_remove_locked(s, c, p)
            continue
        it = item_at(s, addr)
        #! pop: page noted
        st64(&it.word, word_of(RESERVED, s.me[0]))
        #! pop: RESERVED
        st32(&pg.free, it.link)
        #! pop: off the list
        st32(&pg.n_free, pg.n_free - 1 if pg.n_free else 0)
        st32(&c.n_free, c.n_free - 1 if c.n_free else 0)
        if pg.free == 0:
            avail_remove_locked(s, c, p)
        #! pop: counted
        return addr
    return 0

# ---- the page pool ------------------------------------------------------------------------------------------------------

cdef inline void pool_push_locked(seg_t* s, uint64_t p) noexcept nogil:
    cdef pool_t* pool = &s.header.pages
    st32(&s.pages[p].next, <uint32_t>pool.list)
    st64(&s.pages[p].head, 0)
    st32(&s.pages[p].cls, cls_mark(CLS_POOL))
    #! pool push: linked
    st64(&s.pages[p].word, word_of(PAGE_FREE, 0))
    #! pool push: FREE
    st64(&pool.list, p + 1)
    #! pool push: on the list
    st64(&pool.n_free, pool.n_free + 1)

cdef inline bint page_is_free(seg_t* s, uint64_t p) noexcept nogil:
    return ld64(&s.pages[p].word) == word_of(PAGE_FREE, 0) and ld32(&s.pages[p].cls) == cls_mark(CLS_POOL)

cdef inline void pool_repair(seg_t* s) noexcept nogil:
    cdef uint64_t p = s.n_pages
    st64(&s.header.pages.list, 0)
    st64(&s.header.pages.n_free, 0)
    #! pool repair: list dropped
    while p > 0:
        p -= 1
        if page_is_free(s, p):
            pool_push_locked(s, p)

cdef inline int pool_take(seg_t* s, uint64_t until_ns) noexcept nogil:
    cdef int rc
    #? pool: to be taken
    rc = lock_take(s, &s.header.pages.lock, until_ns)
    if rc == TAKEN_OVER:
        pool_repair(s)
        add64(&s.row.repairs[REPAIRED_POOL], 1)
        return OK
    return rc

cdef inline int page_from_pool(seg_t* s, int kind, uint64_t head, uint64_t until_ns, uint64_t* page) noexcept nogil:
    """A page, now kind(this process): OK, NO_ROOM, BUSY or INTR."""
    cdef pool_t* pool = &s.header.pages
    cdef uint64_t p
    cdef int rc
    if ld64(&pool.list) == 0 and ld64(&pool.lock.word) == 0:
        return NO_ROOM
    #~ pool pop: looked at
    rc = pool_take(s, until_ns)
    if rc != OK:
        return rc
    p = ld64(&pool.list) - 1
    if p < s.n_pages and not page_is_free(s, p) or p >= s.n_pages and p + 1:
        pool_repair(s)
        p = ld64(&pool.list) - 1
    if p >= s.n_pages:
        lock_release(&pool.lock)
        return NO_ROOM
    st64(&s.pages[p].head, head)
    #! pool pop: head noted
    st64(&s.pages[p].word, word_of(kind, s.me[0]))
    #! pool pop: taken
    st32(&s.pages[p].cls, cls_mark(CLS_BIG))        # what is being cut gets its class then
    st64(&pool.list, s.pages[p].next)
    #! pool pop: off the list
    st64(&pool.n_free, pool.n_free - 1 if pool.n_free else 0)
    lock_release(&pool.lock)
    #! pool pop: released
    page[0] = p
    return OK

cdef inline int page_to_pool(seg_t* s, uint64_t p, uint64_t word, uint64_t head, uint64_t until_ns) noexcept nogil:
    """Put a page into the pool if its row still says (word, head). BUSY leaves it to settle_pages."""
    cdef int rc = pool_take(s, until_ns)
    if rc != OK:
        return rc
    if ld64(&s.pages[p].word) == word and ld64(&s.pages[p].head) == head:
        pool_push_locked(s, p)
    lock_release(&s.header.pages.lock)
    return OK

cdef inline void cut_page(seg_t* s, uint64_t p, uint32_t cls) noexcept nogil:
    """Cut a page that is CUTTING(this process): every word FREE, every count 0, the list in order of address."""
    cdef page_t* pg = &s.pages[p]
    cdef uint32_t i, n = s.page_chunks[cls]
    cdef item_t* it
    cdef uint64_t addr
    for i in range(n):
        addr = chunk_addr(s, p, cls, i)
        it = item_at(s, addr)
        st64(&it.cas, 0)
        st64(&it.word, word_of(FREE, 0))
        #! cut: chunk FREE
        st64(&it.hash, 0)
        st32(&it.link, i + 2 if i + 1 < n else 0)
        st8r(refs_of(s, addr), 0)
    st8(&pg.listed, 0)
    st32(&pg.free, 1)
    st32(&pg.n_free, n)
    #! cut: list stored
    st64(&pg.stamp, add64(&s.header.tick, 1))

cdef inline int publish_page(seg_t* s, uint64_t p, uint32_t cls, uint64_t until_ns) noexcept nogil:
    """Give a page that was cut to its class. After BUSY or INTR it is in the pool again."""
    cdef int rc = class_take(s, cls, until_ns)
    if rc != OK:
        if page_to_pool(s, p, word_of(PAGE_CUTTING, s.me[0]), 0, until_ns) != OK:
            st64(&s.pages[p].word, word_of(PAGE_CUTTING, 0))        # nobody's: for settle_pages
        return rc
    st32(&s.classes[cls].page_in_hand, <uint32_t>p + 1)
    #! publish: page noted
    st32(&s.pages[p].cls, cls_mark(cls))
    #! publish: class stored
    st64(&s.pages[p].word, word_of(PAGE_ACTIVE, 0))
    #! publish: ACTIVE
    ring_insert_locked(s, &s.classes[cls], p)
    #! publish: in the ring
    avail_push_locked(s, &s.classes[cls], p)
    class_release(s, cls)
    return OK

# ---- chunks in hand -------------------------------------------------------------------------------------------------------

cdef inline bint batched(seg_t* s, uint32_t cls) noexcept nogil:
    return cls < BATCH_CLASSES and s.chunk_bytes[cls] <= 1024

cdef inline bint keep(seg_t* s, uint64_t* slot, uint64_t addr, uint32_t cls) noexcept nogil:
    """Put a RESERVED(this process) chunk into an empty slot of the row, as KEPT. False: another thread was faster.

    The word decides, the slot is a note: a KEPT chunk is its owner's who makes it RESERVED by compare-and-swap, or a drainer's
    who does the same with his own token (empty_chunk). Whoever dies before has changed nothing, whoever dies after leaves
    RESERVED(dead), R1; a slot that names a chunk which is not KEPT by its process means nothing.
    """
    cdef uint64_t* word = &item_at(s, addr).word
    cdef uint32_t index = 0
    st64(word, word_of(KEPT, s.me[0]))
    #! keep: KEPT
    if cas64(slot, 0, addr):
        #! keep: noted
        return True
    if not cas64(word, word_of(KEPT, s.me[0]), word_of(RESERVED, s.me[0])):
        return True                 # a drainer had it: done with, too
    if chunk_class(s, addr, &index) == <int>cls:
        return False
    chunk_unlist(s, addr)           # a drainer had it, its page was cut anew, and another thread has just kept what begins there now
    return True

cdef inline bint take_kept(seg_t* s, uint64_t addr, uint32_t cls) noexcept nogil:
    """What a slot of the row named: is it still this process's? Then it is RESERVED now."""
    cdef uint32_t index = 0
    #! kept: slot emptied
    if chunk_class(s, addr, &index) != <int>cls or \
            not cas64(&item_at(s, addr).word, word_of(KEPT, s.me[0]), word_of(RESERVED, s.me[0])):
        return False
    if chunk_class(s, addr, &index) == <int>cls:            # RESERVED by us: now the page stays as it is
        return True
    chunk_unlist(s, addr)
    return False

cdef inline bint batch_put(seg_t* s, uint32_t cls, uint64_t addr) noexcept nogil:
    """Keep a RESERVED(this process) chunk for later; False: the batch is full."""
    cdef int i
    if batched(s, cls):
        for i in range(BATCH_SLOTS):
            if ld64(&s.row.batch[cls][i]) == 0 and keep(s, &s.row.batch[cls][i], addr, cls):
                return True
    return False

cdef inline uint64_t batch_get(seg_t* s, uint32_t cls) noexcept nogil:
    cdef int i
    cdef uint64_t addr
    if batched(s, cls):
        for i in range(BATCH_SLOTS):
            if ld64(&s.row.batch[cls][i]):
                addr = xchg64(&s.row.batch[cls][i], 0)
                if addr and take_kept(s, addr, cls):
                    return addr
    return 0

cdef inline uint64_t parked_get(seg_t* s, uint32_t cls) noexcept nogil:
    cdef int i
    cdef uint64_t addr
    cdef uint32_t index = 0
    for i in range(PARKED_SLOTS):
        addr = ld64(&s.row.parked[i])
        if addr and chunk_class(s, addr, &index) == <int>cls and cas64(&s.row.parked[i], addr, 0) and take_kept(s, addr, cls):
            return addr
    return 0

cdef inline void unpark_locked(seg_t* s, uint32_t cls) noexcept nogil:
    """The class's lock is had at last: chunks that were freed while it was busy go to its lists."""
    cdef uint64_t addr = parked_get(s, cls)
    while addr:
        chunk_push_locked(s, cls, addr)
        addr = parked_get(s, cls)

cdef inline int chunk_get(seg_t* s, uint32_t cls, uint64_t until_ns, uint64_t* addr) noexcept nogil:
    """A free chunk, RESERVED(this process): OK, NO_ROOM, BUSY or INTR."""
    cdef int rc, i
    cdef uint64_t more
    addr[0] = batch_get(s, cls)
    if addr[0]:
        return OK
    if ld32(&s.classes[cls].avail) == 0 and ld64(&s.classes[cls].lock.word) == 0:
        addr[0] = parked_get(s, cls)
        return OK if addr[0] else NO_ROOM
    rc = class_take(s, cls, until_ns)
    if rc != OK:
        addr[0] = parked_get(s, cls)        # what was freed while the lock was busy serves while it is busy
        return OK if addr[0] else rc
    unpark_locked(s, cls)
    addr[0] = chunk_pop_locked(s, cls)
    if addr[0] and batched(s, cls):
        for i in range(BATCH_SLOTS - 1):
            more = chunk_pop_locked(s, cls)
            if more == 0:
                break
            if not batch_put(s, cls, more):
                chunk_push_locked(s, cls, more)
                break
    class_release(s, cls)
    return OK if addr[0] else NO_ROOM

cdef inline bint park(seg_t* s, uint32_t cls, uint64_t addr) noexcept nogil:
    cdef int i
    for i in range(PARKED_SLOTS):
        if ld64(&s.row.parked[i]) == 0 and keep(s, &s.row.parked[i], addr, cls):
            return True
    return False

cdef inline void chunk_unlist(seg_t* s, uint64_t addr) noexcept nogil:
    """No place is left for a chunk of this process's: FREE, on no list, until a hand passes (relist_page).

    The one store of FREE without the class lock. It is this process's last touch of the chunk; whoever holds that lock sees the
    chunk either RESERVED by a living process, which he leaves, or FREE, which he may list: only lists, and nobody else, give
    it away.
    """
    st64(&item_at(s, addr).word, word_of(FREE, 0))
    #! unlisted: FREE
    add64(&s.row.unlisted, 1)

cdef inline void relist_page(seg_t* s, uint64_t p, uint32_t cls) noexcept nogil:
    """A hand met a FREE chunk where the class has none to give: list what is FREE in its page, if the lock is to be had."""
    if ld32(&s.classes[cls].avail) or class_take(s, cls, 0) != OK:
        return
    if page_in_class(s, p, cls) and kind_of(ld64(&s.pages[p].word)) == PAGE_ACTIVE:
        st32(&s.classes[cls].page_in_hand, <uint32_t>p + 1)
        rebuild_page_locked(s, p, cls)
        #! relist: rebuilt
        if s.pages[p].n_free:
            avail_push_locked(s, &s.classes[cls], p)
    class_release(s, cls)

cdef inline void parked_flush(seg_t* s, uint64_t until_ns) noexcept nogil:
    """Give every parked chunk to its class, as far as the locks are to be had."""
    cdef uint32_t index = 0
    cdef uint64_t addr
    cdef int i, cls
    for i in range(PARKED_SLOTS):
        addr = xchg64(&s.row.parked[i], 0)
        cls = chunk_class(s, addr, &index) if addr else -1
        if cls < 0 or not take_kept(s, addr, cls):
            continue
        if class_take(s, cls, until_ns) == OK:
            chunk_push_locked(s, cls, addr)
            class_release(s, cls)
        elif not park(s, cls, addr):
            chunk_unlist(s, addr)

cdef inline void chunk_park(seg_t* s, uint32_t cls, uint64_t addr) noexcept nogil:
    """The class lock is busy: keep the chunk until it is not."""
    st64(&item_at(s, addr).word, word_of(RESERVED, s.me[0]))
    #! parked: to be put
    if park(s, cls, addr):
        return
    parked_flush(s, 0)
    if not park(s, cls, addr):
        chunk_unlist(s, addr)

cdef inline void chunk_free_list(seg_t* s, uint32_t cls, uint64_t addr, uint64_t until_ns) noexcept nogil:
    """Free this process's chunk for everybody, not into the batch."""
    if class_take(s, cls, until_ns) == OK:
        chunk_push_locked(s, cls, addr)
        unpark_locked(s, cls)
        class_release(s, cls)
    else:
        chunk_park(s, cls, addr)

cdef inline void chunk_free(seg_t* s, uint32_t cls, uint64_t addr, uint64_t until_ns) noexcept nogil:
    """Free this process's chunk, which no slot names: into the batch, else the class's list, else parked."""
    if batched(s, cls):
        st64(&item_at(s, addr).word, word_of(RESERVED, s.me[0]))
        if batch_put(s, cls, addr):
            return
    chunk_free_list(s, cls, addr, until_ns)

cdef inline void give_back_all(seg_t* s) noexcept nogil:
    """Before this process leaves its row: the chunks in its hand go to their lists."""
    cdef uint32_t cls
    cdef int i
    cdef uint64_t addr, until_ns = wait_until(s)
    for cls in range(BATCH_CLASSES):
        for i in range(BATCH_SLOTS):
            addr = xchg64(&s.row.batch[cls][i], 0)
            if addr and take_kept(s, addr, cls):
                chunk_free_list(s, cls, addr, until_ns)
    parked_flush(s, until_ns)
    #! leave: hand empty
