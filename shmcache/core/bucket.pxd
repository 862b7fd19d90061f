# Buckets, chains, stripes: who is reachable, what a writer notes, and how what a dead writer left is finished or undone.
#
# Invariants
#   an entry never moves: a key's item is replaced in its slot, so an unchanged version makes a miss true
#   only the head bucket's version counts, for the whole chain
#   rule F: between a chunk's (or overflow bucket's) last reference being cleared and its first byte changing, its head's
#   version is counted up, under the stripe, by whoever makes it reusable
#   the one store to the slot commits: before it repair undoes, after it repair finishes
#
# Intent, in the stripe's own line: old = (op, chunk that goes), new = chunk that comes, count_next. Cleared old first, then new:
# a lone old whose slot is empty can then only be a delete or an eviction.
#
# Race table
#   get vs set           set wins -> version changed, get begins again and sees the new item
#   write vs clear       the write's one load of the epoch decides: before it the write finds nothing, after it what it stores is cleared, too
#   get vs evict         evict wins -> version changed, get begins again, then misses
#   set vs set           the stripe decides; the later one replaces the earlier
#   repair vs repair     dies -> the next taker repairs again; every step is idempotent
#   unlink vs get        an overflow bucket leaves its chain only when empty and last; version up before its reuse
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from shmcache.core.atomics cimport add64, ld32, ld64, likely, mulhi64, or64, st32, st64, unlikely
from shmcache.core.databases cimport changes_tally, tally, tally_begin, tally_end
from shmcache.core.layout cimport FLAG_CLAIM, OV_SLOTS, REPAIRED_FINISHED, REPAIRED_POOL, REPAIRED_REMOVED, REPAIRED_UNDONE, SLOTS, bucket_t, item_t, overflow_t, pool_t, seg_t, stripe_t
from shmcache.core.lock cimport lock_release, lock_take
from shmcache.core.record cimport RECORD_DELETE, RECORD_REF
from shmcache.core.ring cimport log_op, log_repaired, log_t
from shmcache.core.slab cimport in_slab, item_at, page_room
from shmcache.core.token cimport LIVE, OK, OV_FREE, OV_LINKED, OV_RESERVED, RETIRED, TAKEN_OVER, kind_of, word_of

cdef enum:
    OP_SET = 1
    OP_DELETE = 2
    OP_EVICT = 3        # also what has expired: not logged, the version stands
    OP_TOUCH = 4        # in place: counter, expiry
    MAX_HOPS = 64       # of a chain; a longer one is damage

cdef extern from *:
    """
    #define SHM_ADDR_MASK (((uint64_t)1 << 48) - 1)
    """
    const uint64_t ADDR_MASK "SHM_ADDR_MASK"

cdef extern from "pthread.h" nogil:
    uint64_t pthread_self()

cdef inline uint64_t bucket_of(seg_t* s, uint64_t h) noexcept nogil:
    """By the low 48 bits of the hash (the top 16 are the tag), scaled: the number of buckets is any."""
    return mulhi64(h << 16, s.n_buckets)

cdef inline stripe_t* stripe_of(seg_t* s, uint64_t b) noexcept nogil:
    return &s.stripes[b & (s.n_stripes - 1)]

cdef inline uint64_t slot_word(uint64_t h, uint64_t addr) noexcept nogil:
    return (h >> 48) << 48 | addr

cdef inline void bump(seg_t* s, uint64_t b) noexcept nogil:
    st32(&s.buckets[b].version, s.buckets[b].version + 1)

# ---- walking a chain --------------------------------------------------------------------------------------------------

ctypedef struct chain_t:
    uint64_t* slot      # of the bucket at hand
    int n_slots
    uint32_t* link      # where the index + 1 of the next one stands
    int hops

cdef inline void chain_first(seg_t* s, uint64_t b, chain_t* c) noexcept nogil:
    c.slot = s.buckets[b].slot
    c.n_slots = SLOTS
    c.link = &s.buckets[b].overflow
    c.hops = 0

cdef inline bint chain_next(seg_t* s, chain_t* c) noexcept nogil:
    cdef uint32_t i = ld32(c.link)
    if i == 0 or i > s.n_overflow or c.hops >= MAX_HOPS:
        return False
    c.slot = s.overflow[i - 1].slot
    c.n_slots = OV_SLOTS
    c.link = &s.overflow[i - 1].next
    c.hops += 1
    return True

cdef inline uint64_t* slot_naming(seg_t* s, uint64_t b, uint64_t addr) noexcept nogil:
    """The slot of b's chain that holds this address, or NULL."""
    cdef chain_t c
    cdef int i
    chain_first(s, b, &c)
    while True:
        for i in range(c.n_slots):
            if ld64(&c.slot[i]) & ADDR_MASK == addr:
                return &c.slot[i]
        if not chain_next(s, &c):
            return NULL

cdef inline uint64_t* reachable(seg_t* s, uint64_t addr) noexcept nogil:
    """The slot of the chain of the item's hash that names it, or NULL."""
    return slot_naming(s, bucket_of(s, ld64(&item_at(s, addr).hash)), addr)

# ---- count of a stripe --------------------------------------------------------------------------------------------------

# clear() takes no lock: it counts header.epoch up, and of each operation that load decides which comes first. So an operation loads it once,
# under the stripe, judges with it what is there, and gives it to what it stores: what followed on a cleared item is cleared, too. Several
# stripes at once (below) are one operation, of these stripes: in any other, others may have stored with a newer epoch since.
# Invariant: an epoch that was loaded under a stripe is at least that of whatever was stored in this stripe before. So no count goes back to
# an older epoch, which would hide items from len() and from a clear() that looks whether there is anything.

cdef inline bint holds(seg_t* s, stripe_t* st) noexcept nogil:
    """Has this thread taken the stripe together with others?"""
    cdef uint64_t i = st - s.stripes
    return s.holder == pthread_self() and s.held[i >> 6] >> (i & 63) & 1

cdef inline uint32_t epoch_of(seg_t* s, stripe_t* st) noexcept nogil:
    """With which this thread judges what is in this stripe."""
    if unlikely(s.holder != 0) and holds(s, st):
        return s.held_epoch
    return ld32(&s.header.epoch)

cdef inline uint64_t count_at(stripe_t* st, uint64_t epoch) noexcept nogil:
    """epoch << 32 | items; begins again at 0 after clear()."""
    return st.count if st.count >> 32 == epoch else epoch << 32

cdef inline uint64_t count_without(seg_t* s, uint64_t count, uint64_t addr) noexcept nogil:
    if item_at(s, addr).epoch == count >> 32 and <uint32_t>count:
        return count - 1
    return count

cdef inline uint64_t version_of(item_t* it) noexcept nogil:
    """0 if none is that high, nor any row's in a store: what is damaged takes no stripe's versions with it, or the next would begin at 0 again."""
    cdef uint64_t version = ld64(&it.cas)
    return version if version >> 63 == 0 else 0

# ---- stripes ----------------------------------------------------------------------------------------------------------------

cdef inline void stripe_repair(seg_t* s, stripe_t* st) noexcept nogil:
    """Finish or undo what the dead holder had in hand. O(1), idempotent; whoever dies here leaves it to the next taker."""
    cdef uint64_t n = ld64(&st.new) & ADDR_MASK, o = ld64(&st.old) & ADDR_MASK
    cdef uint64_t version
    cdef int op = <int>(ld64(&st.old) >> 56)
    cdef item_t* it
    if not in_slab(s, n):
        n = 0
    if not in_slab(s, o):
        o = 0
    if n and reachable(s, n) != NULL:                       # finish: the slot was stored
        it = item_at(s, n)
        bump(s, bucket_of(s, ld64(&it.hash)))
        #! stripe repair: version
        st64(&it.word, word_of(LIVE, 0))
        #! stripe repair: LIVE
        version = version_of(it)
        if version and not it.flags & FLAG_CLAIM:
            log_repaired(s, RECORD_REF, st - s.stripes, version, it, page_room(s, n))
        if version > st.seq:
            st64(&st.seq, version)
        st64(&st.count, st.count_next)
        add64(&s.row.repairs[REPAIRED_FINISHED], 1)
    elif o and reachable(s, o) != NULL:                     # undo: it was not
        it = item_at(s, o)
        add64(&s.row.repairs[REPAIRED_UNDONE], 1)
        if kind_of(ld64(&it.word)) == RETIRED:
            st64(&it.word, word_of(LIVE, 0))
        #! stripe repair: undone
        if op == OP_TOUCH:                                  # above both: a reader may have the version that was to be
            version = max(st.seq, version_of(it)) + 1
            st64(&it.cas, version)
            #! stripe repair: counted up
            log_repaired(s, RECORD_REF, st - s.stripes, version, it, page_room(s, o))
            st64(&st.seq, version)
    elif o and n == 0:                                      # finish a delete or an eviction
        bump(s, bucket_of(s, ld64(&item_at(s, o).hash)))
        #! stripe repair: removal finished
        if op == OP_DELETE:
            log_repaired(s, RECORD_DELETE, st - s.stripes, st.seq + 1, item_at(s, o), page_room(s, o))
            st64(&st.seq, st.seq + 1)
        st64(&st.count, st.count_next)
        add64(&s.row.repairs[REPAIRED_REMOVED], 1)
    #! stripe repair: settled
    st64(&st.old, 0)
    #! stripe repair: old cleared
    st64(&st.new, 0)

# Several stripes at once (what the sidecar's EXEC needs): a thread takes them in ascending order, then says so: from there on what it does
# to keys of these stripes finds them taken. For any other stripe it does not wait (it would wait out of order, for somebody who may wait
# for it): an eviction goes on to the next item. Each stripe is repaired by itself when its holder has died: what was done to some of the
# keys stays, the rest is not done.
cdef inline int stripe_take(seg_t* s, stripe_t* st, uint64_t until_ns) noexcept nogil:
    cdef int rc
    if unlikely(s.holder != 0):
        if holds(s, st):
            #! stripe: held already
            return OK
        if s.holder == pthread_self():
            #! stripe: not one of those held
            until_ns = 0
    rc = lock_take(s, &st.lock, until_ns)
    if rc == TAKEN_OVER:
        stripe_repair(s, st)
        return OK
    return rc

cdef inline void stripe_release(seg_t* s, stripe_t* st) noexcept nogil:
    if st.old:
        st64(&st.old, 0)
    if st.new:
        st64(&st.new, 0)
    if likely(s.holder == 0) or not holds(s, st):
        lock_release(&st.lock)
        return
    #! stripe: kept

cdef inline void note_intent(stripe_t* st, int op, uint64_t old, uint64_t new, uint64_t count_next) noexcept nogil:
    st64(&st.count_next, count_next)
    #! intent: count
    st64(&st.old, <uint64_t>op << 56 | old)
    #! intent: old
    st64(&st.new, new)
    #! intent: new

# ---- overflow buckets (the stripe held) --------------------------------------------------------------------------------------

cdef inline void overflow_push_locked(seg_t* s, uint64_t i) noexcept nogil:
    """Under the overflow pool's lock. The bucket is in no chain, its slots are empty."""
    cdef pool_t* pool = &s.header.overflow
    st32(&s.overflow[i].next, <uint32_t>pool.list)
    #! overflow push: linked
    st64(&s.overflow[i].word, word_of(OV_FREE, 0))
    #! overflow push: FREE
    st64(&pool.list, i + 1)
    #! overflow push: on the list
    st64(&pool.n_free, pool.n_free + 1)

cdef inline int overflow_take(seg_t* s, uint64_t until_ns) noexcept nogil:
    cdef int rc
    #? overflow: to be taken
    rc = lock_take(s, &s.header.overflow.lock, until_ns)
    if rc == TAKEN_OVER:
        overflow_repair(s)
        return OK
    return rc

cdef inline void overflow_repair(seg_t* s) noexcept nogil:
    """The list anew, from the words; the pool's lock is held."""
    cdef uint64_t i
    add64(&s.row.repairs[REPAIRED_POOL], 1)
    st64(&s.header.overflow.list, 0)
    st64(&s.header.overflow.n_free, 0)
    #! overflow repair: list dropped
    i = s.n_overflow
    while i > 0:
        i -= 1
        if ld64(&s.overflow[i].word) == word_of(OV_FREE, 0):
            overflow_push_locked(s, i)

cdef inline uint64_t* chain_grow_locked(seg_t* s, uint64_t b, uint32_t* link, uint64_t until_ns, int* rc) noexcept nogil:
    """Link an empty overflow bucket behind the last of b's chain; its first slot, or NULL: none is left (rc OK), or rc.

    Crash: popped, not linked: RESERVED(dead), in no chain -> settle_overflow frees it. Linked: RESERVED(dead), in its chain ->
    LINKED. An empty bucket in a chain harms nobody.
    """
    cdef pool_t* pool = &s.header.overflow
    cdef uint64_t i
    cdef int k
    cdef overflow_t* ov
    rc[0] = OK
    if ld64(&pool.list) == 0 and ld64(&pool.lock.word) == 0:
        return NULL             # under a lock an empty list may be one that its dead holder was making anew
    rc[0] = overflow_take(s, until_ns)
    if rc[0] != OK:
        return NULL
    i = ld64(&pool.list) - 1
    if i < s.n_overflow and kind_of(ld64(&s.overflow[i].word)) != OV_FREE or i >= s.n_overflow and i + 1:
        overflow_repair(s)      # a damaged list
        i = ld64(&pool.list) - 1
    if i >= s.n_overflow:
        lock_release(&pool.lock)
        return NULL
    ov = &s.overflow[i]
    st32(&ov.head, <uint32_t>b)
    st64(&ov.word, word_of(OV_RESERVED, s.me[0]))
    #! grow: RESERVED
    st64(&pool.list, ov.next)
    #! grow: off the list
    st64(&pool.n_free, pool.n_free - 1 if pool.n_free else 0)
    lock_release(&pool.lock)
    #! grow: released
    st32(&ov.next, 0)
    for k in range(OV_SLOTS):
        st64(&ov.slot[k], 0)
    #! grow: emptied
    st32(link, <uint32_t>i + 1)
    #! grow: linked
    st64(&ov.word, word_of(OV_LINKED, 0))
    #! grow: LINKED
    return ov.slot

cdef inline bint chain_shrink_locked(seg_t* s, uint64_t b) noexcept nogil:
    """Unlink the last bucket of b's chain if it is empty: True. If the pool is busy it stays: a later delete tries again.

    Crash: RESERVED(dead) and still in the chain -> LINKED again; out of it -> version up, and to the pool (settle_overflow).
    """
    cdef uint32_t* link = &s.buckets[b].overflow
    cdef uint32_t i = ld32(link), nxt
    cdef overflow_t* ov
    cdef int k, hops = 0
    if i == 0 or i > s.n_overflow:
        return False
    while True:
        ov = &s.overflow[i - 1]
        nxt = ld32(&ov.next)
        if nxt == 0 or nxt > s.n_overflow or hops >= MAX_HOPS:
            break
        link = &ov.next
        i = nxt
        hops += 1
    for k in range(OV_SLOTS):
        if ov.slot[k]:
            return False
    if nxt or ov.head != b or kind_of(ld64(&ov.word)) != OV_LINKED or overflow_take(s, 0) != OK:
        return False
    st64(&ov.word, word_of(OV_RESERVED, s.me[0]))
    #! shrink: RESERVED
    st32(link, 0)
    #! shrink: unlinked
    bump(s, b)
    #! shrink: version
    overflow_push_locked(s, i - 1)
    lock_release(&s.header.overflow.lock)
    return True

# ---- what has departed while the segment is restored (the stripe held) ------------------------------------------------------
# Workers may use a segment while a snapshot is put into it, and what they do wins. The restorer adds what is absent, so a key that
# left again after it was written, or was deleted before it was restored, must not come back: its bit is set under the stripe before its
# slot is cleared, and looked at under the stripe by put(RESTORED). Two keys may share a bit: then one is not restored, which a cache may do.
# Evictions of what was restored set none: nothing newer is lost by them.

cdef inline void depart(seg_t* s, uint64_t h) noexcept nogil:
    cdef uint64_t bit = h & s.departed_mask
    or64(&s.departed[bit >> 6], <uint64_t>1 << (bit & 63))

cdef inline bint departed(seg_t* s, uint64_t h) noexcept nogil:
    cdef uint64_t bit = h & s.departed_mask
    return ld64(&s.departed[bit >> 6]) >> (bit & 63) & 1

cdef inline void depart_with(seg_t* s, uint64_t addr, int op) noexcept nogil:
    """This item is about to leave its slot."""
    if op == OP_DELETE or ld64(&item_at(s, addr).cas) > ld64(&s.header.restored_seq):
        depart(s, ld64(&item_at(s, addr).hash))

# ---- taking an item out (the stripe held) ---------------------------------------------------------------------------------------

cdef inline void remove_locked(seg_t* s, stripe_t* st, uint64_t b, uint64_t* slot, uint64_t addr, int op, log_t* log) noexcept nogil:
    """Clear the slot, which names addr; the item is then RETIRED(this process), and the caller frees it after release. A delete is logged.

    Crash: before the slot's store repair makes it LIVE again; after it repair counts version and count, and the hand frees it.
    """
    cdef uint32_t epoch = epoch_of(s, st)
    cdef bint tallied = changes_tally(s, addr, 0, False) and tally_begin(st)
    if unlikely(ld32(&s.header.restoring)):
        depart_with(s, addr, op)
    note_intent(st, op, addr, 0, count_without(s, count_at(st, epoch), addr))
    st64(&item_at(s, addr).word, word_of(RETIRED, s.me[0]))
    #! remove: RETIRED
    st64(slot, 0)
    #! remove: slot cleared
    bump(s, b)
    #! remove: version
    if op == OP_DELETE:
        log_op(s, log, RECORD_DELETE, st - s.stripes, st.seq + 1, NULL, <uint8_t*>item_at(s, addr) + 48, item_at(s, addr).key_bytes, NULL, 0)
        st64(&st.seq, st.seq + 1)
    #! remove: seq
    st64(&st.count, st.count_next)
    #! remove: count
    if tallied:
        tally(s, st, addr, epoch, False)
        tally_end(st)
    st64(&st.old, 0)
    #! remove: old cleared
    while s.buckets[b].overflow and chain_shrink_locked(s, b):      # those before it may have become empty earlier
        pass
