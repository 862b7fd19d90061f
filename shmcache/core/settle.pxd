# What the dead left: settled by the CLOCK hand as it passes, by writers and supervisor alike, always by asking under the
# stripe of the hash whether the bucket refers to it, with the word re-read there and claimed by compare-and-swap.
#
# Recovery table (row names as in the code below)
#   FREE      not reachable           none. On no list: the next rebuild of its page finds it
#   FREE      reachable               damage: verify names it
#   RESERVED / RETIRED, owner alive   leave
#   KEPT, owner alive                 leave, but for a drainer of its page
#   RESERVED / KEPT, not reachable, dead  free       [R1]
#   RESERVED  reachable, dead         finish         [R2]
#   RETIRED   reachable, dead         undo: LIVE     [R3]
#   RETIRED   not reachable, dead     free           [R4]
#   LIVE      not reachable           damage: verify names it
#   slot of a dead row                forgotten when the row is taken anew; its chunk is R1
#   page DRAINING(dead)               ACTIVE again, list rebuilt   [P1]
#   page CUTTING(dead)                to the pool                  [P2]
#   page BIG, head reachable, listed  BIG(0)                       [P3]
#   page BIG(dead or 0), else         to the pool                  [P4]; R1 and R4 send the pages of their chunk there first
#   overflow RESERVED(dead)           in its chain: LINKED [O1], else version up, to the pool [O2]
#
# Race table
#   two settle one chunk     the stripe orders them; the second sees another word
#   settle vs its writer     the writer is dead; a row taken anew has another token
# Crash: R4 claims as RETIRED(me) and R1 likewise, so a settler's death leaves a chunk that the next one settles.
from libc.stdint cimport uint32_t, uint64_t

from shmcache.core.atomics cimport add64, cas64, ld32, ld64, st32, st64
from shmcache.core.big cimport big_free_item_pages, big_lists
from shmcache.core.bucket cimport bucket_of, bump, overflow_push_locked, overflow_take, reachable, slot_naming, \
    stripe_of, stripe_release, stripe_take, version_of
from shmcache.core.layout cimport REPAIRED_CHUNK, REPAIRED_OVERFLOW, REPAIRED_PAGE, class_t, item_t, overflow_t, page_t, seg_t, stripe_t
from shmcache.core.lock cimport lock_release, within
from shmcache.core.slab cimport avail_push_locked, chunk_class, chunk_push_locked, class_release, class_take, in_slab, \
    item_at, page_cls, page_in_class, page_to_pool, pool_push_locked, pool_take, rebuild_page_locked
from shmcache.core.token cimport BUSY, INTR, KEPT, LIVE, OK, OV_LINKED, OV_RESERVED, PAGE_ACTIVE, PAGE_BIG, PAGE_CUTTING, PAGE_DRAINING, \
    RESERVED, RETIRED, dead, kind_of, mono_ns, token_of, word_of

cdef enum:
    INNER_NS = 4000000      # to wait for a lock within a stripe: enough to take over from the dead, too short to hold others up

cdef inline bint late(seg_t* s, uint64_t until_ns) noexcept nogil:
    """Is the time over that a call waits in all? Then each lock that is busy still costs 1 ms, so it is not to look for many more. A thread that
    has taken several stripes waits for each lock for an instant, and for no other stripe: it looks everywhere."""
    return until_ns != 0 and mono_ns() > until_ns and s.holder == 0

cdef inline int settle_chunk(seg_t* s, uint64_t addr, uint64_t until_ns) noexcept nogil:
    """Put a dead process's chunk in order: OK: it is, or was nobody's. BUSY: its owner lives, or a lock of the dead's chunk is busy. INTR."""
    cdef item_t* it = item_at(s, addr)
    cdef uint64_t w = ld64(&it.word), h, b
    cdef int kind = kind_of(w), cls, rc
    cdef uint32_t index = 0
    cdef stripe_t* st
    if (kind != RESERVED and kind != RETIRED and kind != KEPT) or token_of(w) == s.me[0]:
        return OK
    #~ settle: word loaded
    if not dead(s, token_of(w)):
        return BUSY
    h = ld64(&it.hash)
    b = bucket_of(s, h)
    st = stripe_of(s, b)
    rc = stripe_take(s, st, until_ns)
    if rc != OK:
        return rc
    if ld64(&it.word) == w and ld64(&it.hash) == h and slot_naming(s, b, addr) != NULL:
        if kind != RETIRED:                                 # R2
            bump(s, b)
            if version_of(it) > st.seq:
                st64(&st.seq, version_of(it))
        st64(&it.word, word_of(LIVE, 0))                    # R2, R3: a slot names it and this process holds that stripe
        #! settle: LIVE
        add64(&s.row.settled, 1)
    elif ld64(&it.word) == w and ld64(&it.hash) == h:       # R1, R4
        if kind != KEPT:                                    # of one that was kept its owner has freed them; and a drainer may take it
            big_free_item_pages(s, addr, 0)                 # now, without the stripe, and give it away. Else they would name as their
                                                            # head what lives here next
        cls = chunk_class(s, addr, &index)
        rc = class_take(s, cls, within(until_ns, INNER_NS)) if cls >= 0 else OK
        if cls >= 0 and rc == OK:
            if chunk_class(s, addr, &index) == cls and ld64(&it.hash) == h and \
                    cas64(&it.word, w, word_of(RETIRED, s.me[0])):
                #! settle: claimed
                bump(s, b)                                  # rule F
                #! settle: version
                chunk_push_locked(s, cls, addr)
                add64(&s.row.settled, 1)
                add64(&s.row.repairs[REPAIRED_CHUNK], 1)
            class_release(s, cls)
    stripe_release(s, st)
    return rc

cdef inline int settle_big_page(seg_t* s, uint64_t p, uint64_t w, uint64_t until_ns) noexcept nogil:
    """w: the page's word, by which it was seen to be a big value's. It is not loaded again: what it says now may be of a page of items."""
    cdef page_t* pg = &s.pages[p]
    cdef uint64_t head = ld64(&pg.head), h, b
    cdef stripe_t* st
    cdef bint listed
    cdef int rc
    if token_of(w) and not dead(s, token_of(w)):
        return OK
    if not in_slab(s, head):
        return page_to_pool(s, p, w, head, until_ns)
    h = ld64(&item_at(s, head).hash)
    #~ settle: big page's head read
    b = bucket_of(s, h)
    st = stripe_of(s, b)
    rc = stripe_take(s, st, until_ns)
    if rc != OK:
        return rc
    if ld64(&item_at(s, head).hash) == h:
        listed = slot_naming(s, b, head) != NULL and big_lists(s, head, p)
        if listed and token_of(w):                          # P3
            cas64(&pg.word, w, word_of(PAGE_BIG, 0))
            #! settle: big page sealed
        elif not listed:                                    # P4
            #! settle: big page nobody's
            if pool_take(s, within(until_ns, INNER_NS)) == OK:
                # the hash again: the head may have been freed and taken for another big value, and the page with it, so that the
                # row says the same as before. Of this hash it can only be published under this stripe
                if ld64(&pg.word) == w and ld64(&pg.head) == head and ld64(&item_at(s, head).hash) == h:
                    pool_push_locked(s, p)
                    add64(&s.row.settled, 1)
                    add64(&s.row.repairs[REPAIRED_PAGE], 1)
                lock_release(&s.header.pages.lock)
    stripe_release(s, st)
    return OK

cdef inline int settle_page(seg_t* s, uint64_t p, uint64_t until_ns) noexcept nogil:
    """OK, or INTR or BUSY: it is left as it is."""
    cdef page_t* pg = &s.pages[p]
    cdef uint64_t w = ld64(&pg.word)
    cdef int kind = kind_of(w)
    cdef int cls = page_cls(s, p)
    cdef int rc = OK
    #~ settle: page's word loaded
    if kind == PAGE_BIG:
        #! settle: big page seen
        rc = settle_big_page(s, p, w, until_ns)
    elif kind == PAGE_CUTTING and dead(s, token_of(w)):     # P2
        rc = page_to_pool(s, p, w, ld64(&pg.head), until_ns)
        if rc == OK:
            add64(&s.row.settled, 1)
            add64(&s.row.repairs[REPAIRED_PAGE], 1)
    elif kind == PAGE_DRAINING and cls >= 0 and dead(s, token_of(w)):               # P1
        rc = class_take(s, cls, until_ns)
        if rc == OK:
            st32(&s.classes[cls].page_in_hand, <uint32_t>p + 1)
            if page_in_class(s, p, cls) and cas64(&pg.word, w, word_of(PAGE_ACTIVE, 0)):
                #! settle: page ACTIVE
                rebuild_page_locked(s, p, cls)
                #! settle: page rebuilt
                if pg.n_free:
                    avail_push_locked(s, &s.classes[cls], p)
                add64(&s.row.settled, 1)
                add64(&s.row.repairs[REPAIRED_PAGE], 1)
            class_release(s, cls)
    return rc

cdef inline int settle_pages(seg_t* s, uint64_t n, uint64_t until_ns) noexcept nogil:
    """Look at the next n rows of the page table: OK, INTR, or BUSY: one at least was left whose lock was busy for longer than an instant, and all
    that come behind it when it was late."""
    cdef uint64_t i, at = add64(&s.header.pages.cursor, n) % s.n_pages
    cdef int rc
    cdef bint busy = False
    for i in range(min(n, s.n_pages)):
        if busy and late(s, until_ns):
            break
        rc = settle_page(s, (at + i) % s.n_pages, within(until_ns, INNER_NS))
        if rc == INTR:
            return INTR
        busy |= rc == BUSY
    return BUSY if busy else OK

cdef inline void settle_overflow(seg_t* s, uint64_t n, uint64_t until_ns) noexcept nogil:
    """Look at the next n overflow buckets."""
    cdef uint64_t i, j, k, w, b, at = add64(&s.header.overflow.cursor, n) % s.n_overflow
    cdef overflow_t* ov
    cdef stripe_t* st
    if ld64(&s.header.overflow.lock.word) and overflow_take(s, until_ns) == OK:     # its holder may be dead, and nobody in need
        lock_release(&s.header.overflow.lock)
    for i in range(min(n, s.n_overflow)):
        j = (at + i) % s.n_overflow
        ov = &s.overflow[j]
        w = ld64(&ov.word)
        b = ld32(&ov.head)
        if kind_of(w) != OV_RESERVED or b >= s.n_buckets or not dead(s, token_of(w)):
            continue
        st = stripe_of(s, b)
        if stripe_take(s, st, until_ns) != OK:
            continue
        if ld64(&ov.word) == w and ov.head == b:
            if in_chain(s, b, j):                           # O1
                st64(&ov.word, word_of(OV_LINKED, 0))
                #! settle: LINKED
            elif overflow_take(s, within(until_ns, INNER_NS)) == OK:         # O2
                bump(s, b)
                for k in range(6):
                    st64(&ov.slot[k], 0)
                #! settle: overflow emptied
                overflow_push_locked(s, j)
                lock_release(&s.header.overflow.lock)
            add64(&s.row.settled, 1)
            add64(&s.row.repairs[REPAIRED_OVERFLOW], 1)
        stripe_release(s, st)

cdef inline bint in_chain(seg_t* s, uint64_t b, uint64_t overflow_idx) noexcept nogil:
    """Is this overflow bucket part of b's chain? The stripe is held."""
    cdef uint32_t i = ld32(&s.buckets[b].overflow)
    cdef int hops = 0
    while 0 < i <= s.n_overflow and hops <= 64:
        if i - 1 == overflow_idx:
            return True
        i = ld32(&s.overflow[i - 1].next)
        hops += 1
    return False
