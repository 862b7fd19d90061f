# Room: CLOCK hands, eviction by the writer who needs it, and pages that move between classes.
#
# Within a class: CLOCK with counts 0..3 (Corbato 1968; two bits as in Linux and CacheLib). A hit raises the count, the hand
# lowers it, 0 is a victim. A writer takes at most 32 steps: a 0, else the lowest seen. He inherits the victim's chunk: no list, no lock.
# Between classes: each page carries the tick at which a hand last left it, so the page under a class's hand says how long that
# class's coldest items have not been looked at. Who finds the pool empty compares that age with his own class's, and when
# another class is idle by a clear margin takes a page there: all its items evicted, the page cut anew. A page most of whose items were
# hit since the last pass gets a second chance instead, as an item would.
#
# Race table
#   two hands on one chunk       the hand is advanced by compare-and-swap: each place is looked at once
#   evict vs get                 version: the get begins again
#   evict vs set of the key      the stripe orders them; the hand re-reads word, hash and slot under it
#   hand vs page recut           the hand reads headers without a lock, maybe of no item any more; all it does with them is
#                                to ask under a stripe whether a slot names that address (rule P) and it is of his class still
#   drain vs set                 chunks are freed into a DRAINING page, never popped from it
#   drain vs a chunk in hand     KEPT: one compare-and-swap on the word decides; the loser finds another word there
# Crash: evicted, not yet inherited: RETIRED(dead) -> R4. Draining: P1, its chunks R4. Cutting: P2.
# Refs are advisory: a late store by a reader hits some count, never data.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from shmcache.core.atomics cimport add64, cas32, cas64, ld8r, ld16r, ld32, ld32r, ld64, ld64r, ldi64r, st8r, st32, st64
from shmcache.core.big cimport big_free_item_pages
from shmcache.core.bucket cimport OP_EVICT, bucket_of, epoch_of, remove_locked, slot_naming, stripe_of, stripe_release, stripe_take
from shmcache.core.layout cimport FLAG_BIG, FLAG_CLAIM, FLAG_DIRTY, FLAG_LOCK, FLAG_WRITING, class_t, item_t, page_t, seg_t, stripe_t
from shmcache.core.lock cimport shm_ring, within
from shmcache.core.settle cimport INNER_NS, late, settle_chunk, settle_overflow, settle_pages
from shmcache.core.slab cimport avail_push_locked, avail_remove_locked, chunk_addr, chunk_class, chunk_free_list, chunk_get, \
    chunk_push_locked, class_release, class_take, cut_page, item_at, page_from_pool, page_in_class, page_of, publish_page, \
    page_room, refs_of, relist_page, ring_remove_locked, value_offset
from shmcache.core.token cimport BUSY, FREE, INTR, KEPT, LIVE, NO_ROOM, OK, PAGE_ACTIVE, PAGE_CUTTING, PAGE_DRAINING, RESERVED, \
    RETIRED, dead, kind_of, mono_ns, token_of, word_of

cdef enum:
    HAND_STEPS = 32         # live items that a writer looks at before he takes the lowest
    ROUNDS = 64             # tries for room before CapacityError
    AGE_MARGIN = 8          # ticks, beside a quarter of the age, by which a class must be older to lose a page

cdef inline uint64_t now_ms(seg_t* s) noexcept nogil:
    """The segment's clock: monotonic, so that a step of the wall clock expires nothing."""
    return <uint64_t>(<int64_t>(mono_ns() // 1000000) + ldi64r(&s.header.clock_shift_ms))

cdef inline bint over(item_t* it, uint64_t expiry, uint64_t now, uint32_t epoch) noexcept nogil:
    """Cleared or expired: nobody may be given it any more. Without its stripe the clock is read before the expiry is loaded: else a reader that
    slept between the two finds a key over that was given more time meanwhile."""
    if ld8r(&it.flags) & FLAG_DIRTY:
        return False
    return (ld32r(&it.epoch) != epoch and not ld8r(&it.flags) & FLAG_LOCK) or (expiry != 0 and expiry <= now)

cdef inline bint stale_at(seg_t* s, item_t* it, uint32_t epoch) noexcept nogil:
    """Is it over? Its stripe is held, or it is a hint."""
    cdef uint64_t expiry = ld64r(&it.expiry_ms)
    #~ stale: expiry loaded
    return over(it, expiry, now_ms(s) if expiry else 0, epoch)

cdef inline bint stale(seg_t* s, stripe_t* st, item_t* it) noexcept nogil:
    return stale_at(s, it, epoch_of(s, st))

cdef inline bint seems_stale(seg_t* s, item_t* it) noexcept nogil:
    """A hint, without its stripe."""
    return stale(s, stripe_of(s, bucket_of(s, ld64r(&it.hash))), it)

cdef inline bint claim_stands(seg_t* s, stripe_t* st, uint64_t addr) noexcept nogil:
    """Is this item a claim of a living process whose time is not over? A mark stands without its process, too: what that had begun in the
    store may still go on there. Its stripe is held."""
    cdef item_t* it = item_at(s, addr)
    cdef uint64_t at = value_offset(ld16r(&it.key_bytes))
    if not ld8r(&it.flags) & FLAG_CLAIM or stale(s, st, it) or at + 16 > page_room(s, addr):
        return False
    return ld8r(&it.flags) & FLAG_WRITING or not dead(s, ld64r(<uint64_t*>(<uint8_t*>it + at)))

cdef inline int evict_chunk(seg_t* s, uint64_t addr, uint32_t cls, bint only_stale, uint64_t until_ns) noexcept nogil:
    """Take the item at this address out of the table, whatever its count: OK leaves it RETIRED(this process), a chunk of class cls.

    The class is asked for again under the stripe: since the hand chose the address its page may have been cut anew, with a
    smaller item in this very place. A LIVE item that a slot names, its stripe held, keeps its page from being cut.
    """
    cdef item_t* it = item_at(s, addr)
    cdef uint64_t h = ld64(&it.hash), b = bucket_of(s, h)
    cdef stripe_t* st = stripe_of(s, b)
    cdef uint64_t* slot
    cdef uint32_t index = 0
    cdef bint was_stale
    cdef int rc = stripe_take(s, st, until_ns)
    if rc != OK:
        return rc
    slot = slot_naming(s, b, addr)
    if slot == NULL or ld64(&it.hash) != h or kind_of(ld64(&it.word)) != LIVE or \
            chunk_class(s, addr, &index) != <int>cls:
        stripe_release(s, st)
        return NO_ROOM
    was_stale = stale(s, st, it)
    if (only_stale and not was_stale) or claim_stands(s, st, addr) or ld8r(&it.flags) & FLAG_DIRTY:
        stripe_release(s, st)
        return NO_ROOM
    remove_locked(s, st, b, slot, addr, OP_EVICT, NULL)
    stripe_release(s, st)
    #! evict: out of the table
    if was_stale:
        add64(&s.row.expired, 1)
    else:
        add64(&s.row.evictions, 1)
        if not s.supervising:
            add64(&s.row.inline_evictions, 1)
    big_free_item_pages(s, addr, until_ns)
    return OK

cdef inline uint64_t hand_step(seg_t* s, uint32_t cls, bint* turned) noexcept nogil:
    """Advance the class's hand by one chunk; its address, 0 when the class has no page. turned: the hand left a page."""
    cdef class_t* c = &s.classes[cls]
    cdef uint64_t hand, p
    cdef uint32_t nxt
    while True:
        hand = ld64(&c.hand)
        p = hand >> 32
        if not page_in_class(s, p, cls):
            nxt = ld32(&c.ring)
            if nxt == 0 or nxt > s.n_pages or not page_in_class(s, nxt - 1, cls):
                return 0
            cas64(&c.hand, hand, <uint64_t>(nxt - 1) << 32)
        elif <uint32_t>hand >= s.page_chunks[cls]:
            nxt = ld32(&s.pages[p].next)
            if nxt == 0 or nxt > s.n_pages:
                nxt = <uint32_t>p + 1
            if cas64(&c.hand, hand, <uint64_t>(nxt - 1) << 32):
                #! hand: left a page
                st64(&s.pages[p].stamp, add64(&s.header.tick, 1))
                #! hand: page stamped
                turned[0] = True
        elif cas64(&c.hand, hand, hand + 1):
            return chunk_addr(s, p, cls, <uint32_t>hand)

cdef inline int evict_one(seg_t* s, uint32_t cls, uint64_t most, uint64_t until_ns, uint64_t* out, bint* turned) noexcept nogil:
    """Evict by the class's hand, which moves on by at most so many chunks, 0: a whole round: OK with a RETIRED(this process) chunk, or NO_ROOM.
    BUSY, not NO_ROOM: a living process held the stripe of one at least until it was late; another may do. INTR. Settles the dead's on the way."""
    cdef uint64_t addr, w, lowest = 0
    cdef uint32_t n_live = 0
    cdef uint64_t n
    cdef uint8_t r, lowest_refs = 255
    cdef item_t* it
    cdef int rc
    cdef bint busy = False
    if most == 0:
        most = min(<uint64_t>ld32(&s.classes[cls].n_pages), s.n_pages) * s.page_chunks[cls] + HAND_STEPS
    for n in range(most):
        addr = hand_step(s, cls, turned)
        if addr == 0:
            break
        it = item_at(s, addr)
        w = ld64(&it.word)
        #~ hand: word loaded
        if kind_of(w) == LIVE:
            n_live += 1
            r = ld8r(refs_of(s, addr))
            if r == 0 or seems_stale(s, it):
                #! evict: chosen
                rc = evict_chunk(s, addr, cls, False, until_ns)
                if rc == OK:
                    out[0] = addr
                if rc == OK or rc == INTR or (rc == BUSY and late(s, until_ns)):
                    return rc
                busy |= rc == BUSY
            else:
                st8r(refs_of(s, addr), r - 1)
                if r - 1 < lowest_refs:
                    lowest_refs = r - 1
                    lowest = addr
            if n_live >= HAND_STEPS:
                break
        elif kind_of(w) == FREE:
            relist_page(s, page_of(s, addr), cls)
        elif token_of(w) != s.me[0]:
            rc = settle_chunk(s, addr, until_ns)
            if rc == INTR:
                return INTR
            if rc == BUSY:
                busy |= dead(s, token_of(w))        # else it is a write that goes on: nothing to be evicted
    if lowest != 0:
        rc = evict_chunk(s, lowest, cls, False, until_ns)
        if rc == OK:
            out[0] = lowest
        if rc != NO_ROOM:
            return rc
    return BUSY if busy else NO_ROOM

# ---- pages --------------------------------------------------------------------------------------------------------------------

cdef inline int empty_chunk(seg_t* s, uint64_t addr, uint32_t cls, uint64_t until_ns, bint* retired) noexcept nogil:
    """Make one chunk of a DRAINING page FREE or this process's (retired): OK. NO_ROOM: its item stands, or this process has it in hand, as the
    head of what it wants a page for: a wait would not help. BUSY: somebody else alive is using it, or its stripe. INTR."""
    cdef uint64_t w
    cdef int tries, rc
    for tries in range(8):
        w = ld64(&item_at(s, addr).word)
        #~ drain: word loaded
        if kind_of(w) == FREE:
            return OK
        if kind_of(w) == LIVE:
            rc = evict_chunk(s, addr, cls, False, until_ns)
            if rc == OK:
                retired[0] = True
            if rc != NO_ROOM:
                return rc
        elif kind_of(w) == KEPT:        # in somebody's hand, who may have died: whoever changes the word has the chunk
            if cas64(&item_at(s, addr).word, w, word_of(RESERVED, s.me[0])):
                #! drain: recalled
                retired[0] = True
                return OK
        elif token_of(w) == s.me[0]:
            return NO_ROOM
        else:
            rc = settle_chunk(s, addr, until_ns)
            if rc != OK:
                return rc
    return NO_ROOM

cdef inline int drain_page(seg_t* s, uint64_t p, uint32_t cls, uint64_t until_ns) noexcept nogil:
    """Empty a page of class cls: OK leaves it CUTTING(this process), out of its class. NO_ROOM, BUSY, INTR (of empty_chunk): it stays what it was.

    Another page will do, so no chunk is waited for longer than an instant, however much time the call has.
    """
    cdef class_t* c = &s.classes[cls]
    cdef page_t* pg = &s.pages[p]
    cdef uint32_t i, n = s.page_chunks[cls]
    cdef uint64_t addr
    cdef uint8_t mine[1024]         # bit i: chunk i is this process's to free. 1 MiB / 128 B = 8,192 chunks at most
    cdef bint retired
    cdef int rc = OK, taken
    memset(mine, 0, sizeof(mine))
    taken = class_take(s, cls, until_ns)
    if taken != OK:
        return taken
    if not page_in_class(s, p, cls) or kind_of(ld64(&pg.word)) != PAGE_ACTIVE:
        class_release(s, cls)
        return BUSY
    st32(&c.page_in_hand, <uint32_t>p + 1)
    st64(&pg.word, word_of(PAGE_DRAINING, s.me[0]))
    #! drain: DRAINING
    avail_remove_locked(s, c, p)
    class_release(s, cls)
    #! drain: off the lists
    for i in range(n):
        addr = chunk_addr(s, p, cls, i)
        retired = False
        rc = empty_chunk(s, addr, cls, within(until_ns, INNER_NS), &retired)
        if rc != OK:
            break
        #! drain: chunk emptied
        if retired:
            mine[i >> 3] |= 1 << (i & 7)
    taken = class_take(s, cls, max(until_ns, mono_ns() + INNER_NS) if until_ns else 0)
    if taken != OK:
        # its holder is stopped: the page is left to settle_page, its chunks go back one by one
        st64(&pg.word, word_of(PAGE_DRAINING, 0))
        for i in range(n):
            if mine[i >> 3] & 1 << (i & 7):
                chunk_free_list(s, cls, chunk_addr(s, p, cls, i), until_ns)
        return taken
    st32(&c.page_in_hand, <uint32_t>p + 1)
    for i in range(n):
        if mine[i >> 3] & 1 << (i & 7):
            chunk_push_locked(s, cls, chunk_addr(s, p, cls, i))
            #! drain: chunk FREE
    if rc == OK:
        for i in range(n):
            if kind_of(ld64(&item_at(s, chunk_addr(s, p, cls, i)).word)) != FREE:
                rc = BUSY
                break
    if rc == OK:
        ring_remove_locked(s, c, p)
        #! drain: out of the ring
        st64(&pg.head, 0)
        st64(&pg.word, word_of(PAGE_CUTTING, s.me[0]))
        #! drain: CUTTING
    else:
        st64(&pg.word, word_of(PAGE_ACTIVE, 0))
        if pg.n_free:
            avail_push_locked(s, c, p)
    class_release(s, cls)
    if rc == OK:
        add64(&s.row.pages_moved, 1)
    return rc

cdef inline bint hot_page(seg_t* s, uint64_t p, uint32_t cls) noexcept nogil:
    """Were most of its items hit since the last pass? If so lower their counts, as the hand would."""
    cdef uint32_t i, n_hot = 0, n = s.page_chunks[cls]
    cdef uint8_t* refs
    for i in range(n):
        if ld8r(refs_of(s, chunk_addr(s, p, cls, i))):
            n_hot += 1
    if 2 * n_hot <= n:
        return False
    for i in range(n):
        refs = refs_of(s, chunk_addr(s, p, cls, i))
        if ld8r(refs):
            st8r(refs, ld8r(refs) - 1)
    return True

cdef inline uint64_t hand_page(seg_t* s, uint32_t cls) noexcept nogil:
    """Index of the page under the class's hand; n_pages: it has none."""
    cdef uint64_t p = ld64(&s.classes[cls].hand) >> 32
    if page_in_class(s, p, cls):
        return p
    p = ld32(&s.classes[cls].ring)
    if 0 < p <= s.n_pages and page_in_class(s, p - 1, cls):
        return p - 1
    return s.n_pages

cdef inline int oldest_class(seg_t* s, uint64_t barred, uint64_t* stamp) noexcept nogil:
    """The class whose hand stands on the page that was left longest ago, but for those in the bit set; -1: none."""
    cdef uint32_t cls
    cdef uint64_t p
    cdef int best = -1
    for cls in range(s.n_classes):
        if barred >> cls & 1:
            continue
        p = hand_page(s, cls)
        if p < s.n_pages and (best < 0 or ld64(&s.pages[p].stamp) < stamp[0]):
            best = <int>cls
            stamp[0] = ld64(&s.pages[p].stamp)
    return best

cdef inline int take_page(seg_t* s, int for_cls, bint force, uint64_t until_ns, uint64_t* page) noexcept nogil:
    """A page for class for_cls (-1: for a big value) from the class that needs it least.

    OK: page is CUTTING(this process). AGAIN-like NO_ROOM with pages in the pool is possible: a big value was evicted, look
    there. Without force only a class that is clearly older than for_cls gives one. BUSY: of one at least a lock was. INTR.
    """
    cdef uint64_t own = 0, stamp = 0, tick = ld64(&s.header.tick), victim = 0, p
    cdef uint64_t barred = <uint64_t>1 << for_cls if for_cls >= 0 else 0
    cdef int x, attempt, rc
    cdef bint turned, was_big, busy = False
    if not force:
        p = hand_page(s, for_cls)
        own = ld64(&s.pages[p].stamp) if p < s.n_pages else tick
    for attempt in range(2 * <int>s.n_classes):
        x = oldest_class(s, barred, &stamp)
        if x < 0:
            break
        own = min(own, tick)
        if not force and (stamp >= tick or tick - stamp <= (tick - own) + ((tick - own) >> 2) + AGE_MARGIN):
            return NO_ROOM
        p = hand_page(s, x)
        if p < s.n_pages and attempt < 8 and hot_page(s, p, x):
            st64(&s.pages[p].stamp, add64(&s.header.tick, 1))
            cas64(&s.classes[x].hand, ld64(&s.classes[x].hand), <uint64_t>(ld32(&s.pages[p].next) - 1) << 32)
            continue
        turned = False
        rc = evict_one(s, x, 2 * s.page_chunks[x], within(until_ns, INNER_NS), &victim, &turned)    # not far: an idle class may have no item at all
        busy |= rc == BUSY
        if rc == INTR:
            return INTR
        if rc == OK:
            was_big = item_at(s, victim).flags & FLAG_BIG
            p = page_of(s, victim)
            chunk_free_list(s, x, victim, until_ns)
            #! take page: victim freed
            if was_big and ld64(&s.header.pages.list):
                return NO_ROOM
        if p < s.n_pages:
            rc = drain_page(s, p, x, until_ns)
            if rc == OK:
                page[0] = p
            if rc == OK or rc == INTR:
                return rc
            busy |= rc == BUSY
        barred |= <uint64_t>1 << x
    return BUSY if busy else NO_ROOM

cdef inline int give_page(seg_t* s, uint64_t p, uint32_t cls, uint64_t until_ns) noexcept nogil:
    cut_page(s, p, cls)
    #! give: cut
    return publish_page(s, p, cls, until_ns)

cdef inline void ring_supervisor(seg_t* s) noexcept nogil:
    """A writer had to evict for himself, or much is to be stored: wake who should have done it ahead of him."""
    if ld32(&s.header.asleep) and cas32(&s.header.asleep, 1, 0):
        shm_ring(&s.header.doorbell)

cdef inline int take_room(seg_t* s, uint32_t cls, uint64_t until_ns, uint64_t* addr) noexcept nogil:
    """A chunk of the class, RESERVED(this process): in hand, free, on a new page, or evicted. OK, NO_ROOM, BUSY, INTR.

    until_ns 0: nothing that could sleep; BUSY says to come again with the GIL released. Else BUSY says that there might have been room, but a living
    process was in the way: when it is late in one round at least, in time in most of them, for one that runs is so for an instant. Late, with nobody
    in the way, the caller itself was stopped: two more rounds look at all pages, and then it is NO_ROOM.
    """
    cdef uint64_t p = 0
    cdef int rc, round_, late_rounds = 0, busy_rounds = 0
    cdef bint turned, busy = False
    for round_ in range(ROUNDS):
        rc = chunk_get(s, cls, until_ns, addr)
        if rc == OK or rc == INTR or (rc == BUSY and until_ns == 0):
            return rc
        busy |= rc == BUSY
        busy_rounds += busy
        if until_ns and round_ and mono_ns() > until_ns:        # after a look at what the last round has made free
            if busy_rounds or late_rounds == 2:
                return BUSY if busy_rounds else NO_ROOM
            late_rounds += 1
        busy = False
        rc = page_from_pool(s, PAGE_CUTTING, 0, until_ns, &p)
        busy |= rc == BUSY
        if rc == OK:
            rc = give_page(s, p, cls, until_ns)
            if rc == INTR or (rc == BUSY and until_ns == 0):
                return rc
            busy |= rc == BUSY
            if rc == OK:
                continue
        elif rc == INTR or (rc == BUSY and until_ns == 0):
            return rc
        turned = False
        rc = evict_one(s, cls, 0, until_ns if round_ else 0, addr, &turned)
        if rc == INTR:
            return INTR
        busy |= rc == BUSY and round_ > 0       # in the first round it was not waited for
        if rc == OK:
            st64(&item_at(s, addr[0]).word, word_of(RESERVED, s.me[0]))     # inherited: no list, no lock
            #! evict: inherited
            ring_supervisor(s)
            if turned:
                settle_pages(s, 4, 0)
                settle_overflow(s, 16, 0)
                if take_page(s, cls, False, until_ns, &p) == OK:
                    give_page(s, p, cls, until_ns)
            return OK
        rc = settle_pages(s, s.n_pages if late_rounds or round_ >= ROUNDS // 2 else 16, until_ns)
        if rc == INTR:
            return INTR
        busy |= rc == BUSY
        rc = take_page(s, cls, True, until_ns if round_ else 0, &p)
        busy |= rc == BUSY and round_ > 0
        if rc == OK:
            give_page(s, p, cls, until_ns)
        elif rc == INTR:
            return INTR
        elif until_ns == 0 and round_ > 2:
            return BUSY
    return BUSY if 2 * busy_rounds > ROUNDS else NO_ROOM
