# Values over half a page: a head chunk whose value area holds a list of whole pages (u32 indexes), then the value's rest.
#
# Invariant: a page BIG(0) is listed by the reachable head that its row names; BIG(token) is being built by that process.
# Whether a page belongs to somebody is asked of its head under the stripe of the head's hash, then acted on under the pool
# lock with the row and the head's hash re-read: `head` differs when the page serves another head, the hash when that head
# chunk serves another value with the same page.
#
# Race table. What decides is `head`: it is set to a head chunk only by a process that has that chunk in hand (before the word says BIG), and
# set to 0 before the word says anything else. So while a chunk is in hand, a row with that head is the row of a page of its value.
#   free vs settle          both may free a page; the pool's lock orders them, and under it (word, head) is compared: one pushes it
#   free, pool busy, vs settle and reuse    the row that was read BIG and then found to have this head was this value's when it was read, so w
#                           is BIG(nobody), or BIG(this process, or the dead one whose stripe is held), which nobody else changes. If a settler
#                           has given the page away meanwhile, the exchange fails on any other word; from BIG(nobody) to the same it may
#                           meet the next big value's page and changes nothing; and the exchange of `head` fails on any other head
#   a word read after the row was asked    would be the next owner's: ACTIVE of living items became BIG(nobody), and the page was given away
# Source: model/big.pml.
#
# Crash while building: pages BIG(dead), head RESERVED(dead) -> pool, by settle_pages. Published, not yet marked: BIG(dead),
# listed -> BIG(0). While freeing: BIG(0), head RETIRED(dead) -> pool, before the head is freed (settle_chunk). A page that could not
# be freed since the pool was busy is BIG(0) of head 0 -> pool, by settle_pages: the head may be another item's by then. Between the two
# exchanges: BIG(0) of a head that the dead had in hand -> pool, as while freeing.
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from shmcache.core.atomics cimport cas64, fence_acquire, ld8r, ld16r, ld32, ld32r, ld64, st64
from shmcache.core.layout cimport CLS_BIG, FLAG_BIG, GRANULE_SHIFT, item_t, seg_t
from shmcache.core.slab cimport cls_mark, item_at, page_room, page_to_pool, value_offset
from shmcache.core.token cimport OK, PAGE_BIG, kind_of, word_of

ctypedef struct big_t:
    uint32_t n_pages        # whole pages
    uint32_t tail           # bytes of the value in the head chunk
    uint64_t head_bytes     # that the head chunk needs in all

cdef inline void big_shape(seg_t* s, uint64_t key_bytes, uint64_t value_bytes, big_t* g) noexcept nogil:
    """How a value is laid out follows from its lengths alone; writer and reader compute it alike."""
    cdef uint64_t most = s.chunk_bytes[s.n_classes - 1]
    g.n_pages = <uint32_t>(value_bytes >> s.page_shift)
    g.tail = <uint32_t>(value_bytes & (s.page_bytes - 1))
    g.head_bytes = value_offset(key_bytes) + 4 * <uint64_t>g.n_pages + g.tail
    if g.head_bytes > most:
        g.n_pages += 1
        g.tail = 0
        g.head_bytes = value_offset(key_bytes) + 4 * <uint64_t>g.n_pages

cdef inline uint8_t* page_bytes_of(seg_t* s, uint64_t p) noexcept nogil:
    return s.base + s.slab_off + (p << s.page_shift)

cdef inline bint big_lists(seg_t* s, uint64_t addr, uint64_t p) noexcept nogil:
    """Does the item at this address list page p? Under the stripe of its hash."""
    cdef item_t* it = item_at(s, addr)
    cdef uint64_t klen = ld16r(&it.key_bytes)
    cdef uint32_t* pages = <uint32_t*>(<uint8_t*>it + value_offset(klen))
    cdef big_t g
    cdef uint32_t i
    if not ld8r(&it.flags) & FLAG_BIG:
        return False
    big_shape(s, klen, ld32r(&it.value_bytes), &g)
    if g.head_bytes > page_room(s, addr):
        return False
    for i in range(g.n_pages):
        if ld32r(&pages[i]) == p:
            return True
    return False

cdef inline bint big_owns(seg_t* s, uint64_t addr, uint64_t p) noexcept nogil:
    """Does the row of page p say that it belongs to the big value whose head is at addr?"""
    return p < s.n_pages and kind_of(ld64(&s.pages[p].word)) == PAGE_BIG and ld64(&s.pages[p].head) == addr and \
        ld32(&s.pages[p].cls) == cls_mark(CLS_BIG)

cdef inline bint big_read(seg_t* s, uint64_t addr, uint64_t klen, uint64_t vlen, big_t* g, uint8_t* to) noexcept nogil:
    """Copy a big value out. The caller has clamped g.head_bytes. False: a page of the list is not (any more) its own."""
    cdef bint own = True
    cdef uint8_t* at = <uint8_t*>item_at(s, addr) + value_offset(klen)
    cdef uint32_t i, p
    cdef uint64_t left = vlen - g.tail, n
    for i in range(g.n_pages):
        p = ld32r(&(<uint32_t*>at)[i])
        n = min(left, s.page_bytes)
        #~ big read: page named
        if p < s.n_pages:
            memcpy(to, page_bytes_of(s, p), n)
        #~ big read: page copied
        fence_acquire()
        own = own and big_owns(s, addr, p)
        to += n
        left -= n
    memcpy(to, at + 4 * <uint64_t>g.n_pages, g.tail)
    return own

cdef inline void big_fill(seg_t* s, uint64_t addr, uint64_t klen, const uint8_t* value, uint64_t vlen) noexcept nogil:
    """Copy a value into a head and the pages that it lists; all are this process's, or they are not written to."""
    cdef uint8_t* at = <uint8_t*>item_at(s, addr) + value_offset(klen)
    cdef big_t g
    cdef uint32_t i, p
    cdef uint64_t left, n
    big_shape(s, klen, vlen, &g)
    left = vlen - g.tail
    for i in range(g.n_pages):
        n = min(left, s.page_bytes)
        p = ld32r(&(<uint32_t*>at)[i])
        if big_owns(s, addr, p):
            memcpy(page_bytes_of(s, p), value, n)
            #! big: page filled
        value += n
        left -= n
    memcpy(at + 4 * <uint64_t>g.n_pages, value, g.tail)

cdef inline void big_seal_locked(seg_t* s, uint64_t addr, uint64_t klen, uint32_t n_pages) noexcept nogil:
    """Under the stripe, the slot stored: the pages are nobody's but the item's."""
    cdef uint32_t* pages = <uint32_t*>(<uint8_t*>item_at(s, addr) + value_offset(klen))
    cdef uint32_t i, p
    for i in range(n_pages):
        p = ld32r(&pages[i])
        if big_owns(s, addr, p):
            st64(&s.pages[p].word, word_of(PAGE_BIG, 0))
            #! big: page sealed

cdef inline void big_free_pages(seg_t* s, uint64_t addr, uint64_t klen, uint32_t n_pages, uint64_t until_ns) noexcept nogil:
    """Pages of a head chunk that is this process's, or a dead one's under its stripe, and that no slot names. What stays behind
    settle_pages finds."""
    cdef uint32_t* pages = <uint32_t*>(<uint8_t*>item_at(s, addr) + value_offset(klen))
    cdef uint32_t i, p
    cdef uint64_t w
    for i in range(n_pages):
        p = ld32r(&pages[i])
        if p >= s.n_pages:
            continue
        w = ld64(&s.pages[p].word)      # before the row is asked whose it is: w is the value's own word then, never that of a later owner
        #! big: word read
        if kind_of(w) == PAGE_BIG and big_owns(s, addr, p):
            #! big: page to be freed
            if page_to_pool(s, p, w, addr, until_ns) != OK and cas64(&s.pages[p].word, w, word_of(PAGE_BIG, 0)):
                #! big: page left behind
                cas64(&s.pages[p].head, addr, 0)    # no other page gets this head while the chunk is in hand

cdef inline void big_free_item_pages(seg_t* s, uint64_t addr, uint64_t until_ns) noexcept nogil:
    """The same for an item that was taken out of the table, if it is a big one."""
    cdef item_t* it = item_at(s, addr)
    cdef uint64_t klen = ld16r(&it.key_bytes)
    cdef big_t g
    if ld8r(&it.flags) & FLAG_BIG:
        big_shape(s, klen, ld32r(&it.value_bytes), &g)
        if g.head_bytes <= page_room(s, addr):
            big_free_pages(s, addr, klen, g.n_pages, until_ns)
