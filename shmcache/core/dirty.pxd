# Write-back: which items the store has not got yet.
#
# A write of a key (not one that begins with NUL, not what was loaded) makes its item dirty: FLAG_DIRTY in it, and a bit in a map, by which
# the supervisor finds it (supervisor/writeback.py). A delete stores a negative envelope, a tombstone, which is dirty as any value.
#
# Invariants
#   D1  a dirty item leaves its slot for a newer dirty item of its key, or when mark_clean says so, or an operator (drop_dirty), and in no
#       other way: it is not evicted, nor expired, nor cleared, nor replaced by a claim or by what was loaded
#   D2  the bit of a dirty item in a slot is set: it is set under the stripe before the slot's store, and cleared under the stripe, the
#       item in the slot, or when there was none that is dirty, before another look under the stripe that sets it again (find_dirty)
#   D3  an item is clean only if the store has this version of it, or a newer one
# Race table
#   flush vs set        the set replaces the item: its version is another, and mark_clean finds it no more
#   flush vs incr, touch    the same: they change the version under the stripe
#   flush vs drop       whichever takes the stripe first: mark_clean finds no such item, or drop_dirty finds it stored
#   flush vs flush      one supervisor; the COMMIT of one that was killed has lower versions, which the store leaves (stores.Store)
#   bit cleared vs set of a new item in this chunk: the look comes after the clearing, and under the stripe: it waits for who sets
# Crash: a bit without a dirty item: the next look clears it. header.dirty drifts by what the dead had in hand, and by what is written during a
# count: counted anew at each start, and after passes that find it far off (supervisor/writeback.py).
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from shmcache.core.atomics cimport add64, and64, cas64, ld8r, ld64, or64, st8r
from shmcache.core.layout cimport FLAG_DIRTY, POLICY_BACK, item_t, seg_t
from shmcache.core.slab cimport chunk_addr, chunk_class, item_at, page_cls, page_of

cdef inline uint64_t dirty_index(seg_t* s, uint64_t addr) noexcept nogil:
    return (addr - s.slab_lo) >> 3

cdef inline uint64_t dirty_chunk(seg_t* s, uint64_t at) noexcept nogil:
    """The chunk that begins in the 128 bytes of bit `at`: none is smaller, so one at most. 0: none does."""
    cdef uint64_t addr = s.slab_lo + (at << 3), p, first, size
    cdef uint32_t cls, i
    if addr >= s.slab_hi:
        return 0
    p = page_of(s, addr)
    cls = page_cls(s, p)
    if cls >= s.n_classes:
        return 0
    first = chunk_addr(s, p, cls, 0)
    size = s.chunk_bytes[cls] >> 4
    i = <uint32_t>((addr - first + size - 1) // size)
    if i >= s.page_chunks[cls] or first + i * size >= addr + 8:
        return 0
    return first + i * size

cdef inline uint64_t dirty_size(seg_t* s, uint64_t addr) noexcept nogil:
    """What an item counts for: its chunk, and its value if that is in pages of its own."""
    cdef uint32_t index = 0
    cdef int cls = chunk_class(s, addr, &index)
    cdef item_t* it = item_at(s, addr)
    if cls < 0:
        return 0
    return s.chunk_bytes[cls] if it.value_bytes < s.chunk_bytes[cls] else s.chunk_bytes[cls] + it.value_bytes

cdef inline bint dirty_bit(seg_t* s, uint64_t addr) noexcept nogil:
    cdef uint64_t i = dirty_index(s, addr)
    return ld64(&s.dirty[i >> 6]) >> (i & 63) & 1

cdef inline void dirty_set(seg_t* s, uint64_t addr) noexcept nogil:
    cdef uint64_t i = dirty_index(s, addr)
    if not dirty_bit(s, addr):
        or64(&s.dirty[i >> 6], <uint64_t>1 << (i & 63))

cdef inline void dirty_clear(seg_t* s, uint64_t addr) noexcept nogil:
    cdef uint64_t i = dirty_index(s, addr)
    and64(&s.dirty[i >> 6], ~(<uint64_t>1 << (i & 63)))

cdef inline bint any_dirty(seg_t* s) noexcept nogil:
    """Is a bit set? header.dirty is a count, and may be 0 too early."""
    cdef uint64_t i
    for i in range((((s.slab_hi - s.slab_lo) >> 3) + 63) >> 6):
        if ld64(&s.dirty[i]):
            return True
    return False

cdef inline void dirty_placed(seg_t* s, uint64_t new, uint64_t old) noexcept nogil:
    """Under the stripe, before the slot names the new item: it will be dirty, and takes the place of old (0: of none)."""
    dirty_set(s, new)
    #! dirty: bit
    add64(&s.header.dirty, dirty_size(s, new))
    if old and ld8r(&item_at(s, old).flags) & FLAG_DIRTY:
        dirty_gone(s, old)

cdef inline void dirty_gone(seg_t* s, uint64_t addr) noexcept nogil:
    cdef uint64_t n = dirty_size(s, addr), have
    while True:         # two at once are not to take more away than there is: the count would be above any limit
        have = ld64(&s.header.dirty)
        if cas64(&s.header.dirty, have, have - min(n, have)):
            return

cdef inline void dirty_in_place(seg_t* s, uint64_t addr) noexcept nogil:
    """Under the stripe, before a counter or a time changes in place."""
    cdef item_t* it = item_at(s, addr)
    if not it.flags & FLAG_DIRTY:
        dirty_placed(s, addr, 0)
        st8r(&it.flags, it.flags | FLAG_DIRTY)
    #! dirty: in place

cdef inline bint writes_back(seg_t* s, const uint8_t* key) noexcept nogil:
    return s.policy == POLICY_BACK and key[0] != 0
