# How many items each of the sidecar's databases has, and how many of these expire: what DBSIZE and INFO keyspace say without a walk.
#
# A key of database d, 1 to 15, is b"\0ns\0db:<d>\0", the 8 bytes of a generation (namespace.py), then the client's key. FLUSHDB stores another
# generation under b"\0ns\0db:<d>"; items that carry the old one stay until a CLOCK hand meets them. So what a stripe counts of a database says
# of which generation: by a tag, made of the generation and the item's epoch. All keys that begin with b"\0ns\0db:", those of
# generations too, are counted together as `others`: the first database has what the stripe counts, less these. As there, claims and what
# has expired count until they are taken out.
#
# header.newest has a tag for each database: that of the generation that was stored last, if nothing can have carried that before. put() stores
# it, under the stripe of the generation's key, before the key's slot. Of a generation that put() makes itself (table.pxd, make_generation), and
# of one that a restore puts into a segment in which nobody is yet, that is so. What put() makes is random bytes XOR the write's own version: no two
# writes of a key have the same version, so no two store the same generation, though a fork child has its parent's random bytes. A step that has drawn
# one for its own flush knows it before it stores it, and holds the stripes of the keys that it will name under it; it stores it once (FRESH). Any
# other may be one that items carry: a client renames the generation's key away and back, copies, restores or sets it, a worker sets it. Then newest is 0, which
# is no tag: a stripe that counts another generation says nothing of this one, and is counted by a walk, once. Only if newest is its tag already,
# it stays: C3 holds for it. So a tag is newest once, until the next generation is stored, and never again.
#
# A tag has 31 bits, a hash of all 64 of the generation. C3 does not hold if a generation is made whose tag items of an older one have that lie
# there still: with n older ones, of which something is left, by a chance of n in 2**31 for each FLUSHDB. Then counts are wrong where such items
# lie, and verify may say I23, until the next FLUSHDB. Two generations of one tag that somebody stores by hand are counted as one.
# Nothing is deleted for what a count says: FLUSHDB of the first database takes each stripe's lock, under which C1 holds (sizes.pxd, has_first), and
# removes key by key.
#
# Invariants, for the holder of the stripe, if its turn is even
#   C1  others is the number of items of its epoch whose keys begin so; expiring, of those with other keys that expire
#   C2  n[d] is the number of items of database d that carry tag[d]; expiring[d], of those of them that expire
#   C3  no item of database d carries newest[d], unless tag[d] is newest[d]
# A write that changes one of these makes the turn odd before its intent, and even when the counts are as the slots are: for a reader without
# the stripe it is a seqlock. A write that replaces a key by itself, in the same epoch, and expires as what it replaces does or does not, changes
# none. C3 is why an item whose tag is newest, in a stripe that has another tag, is the first there: its tag is taken
# and 1 counted. An item with a tag that is neither is not counted.
#
# Race table
#   count vs write          the turn was odd, or has changed: the count looks again, at last under the stripe (sizes.pxd)
#   count vs FLUSHDB        the count begins again: a stripe that knows nothing of its generation has it look whether that is the last one. Since
#                           newest comes before the generation, who would walk takes the lock of the generation's key first, and looks again
#   count vs a stopped or dead writer: DBSIZE of the first, INFO, and who holds stripes take what the counts say; DBSIZE of another waits, and counts
#   FLUSHDB of the first vs write: the stripe decides. What was there before is gone; a key that is stored meanwhile may stay
#   FLUSHDB of the first vs restore: it waits for the end; what is still to be put in would come behind it
#   FLUSHDB vs FLUSHDB      the stripe of the generation's key decides; newest is of the later one, as the key is
#   FLUSHDB vs a generation that put() did not make: the same; newest is 0 if that is the later one
#   FLUSHDB vs fork         parent and child go on with it, in any order: each stores a generation of its own, and the later one has flushed once more
#   count vs a generation that put() did not make: newest was the tag of the one that is asked for, after the stripe was looked at: it was that all
#                           the while since it was made, and what came before carried it nowhere. Or it is 0: that stripe is counted
#   insert vs a generation that put() did not make: counted if the stripe has its tag. Else the stripe says nothing of that tag, before and after
#   two are asked for in turn, while newest is 0 (a transaction goes on with an older one): each counts the stripe for itself, with a walk each time
#   insert vs FLUSHDB       the insert carries what it read before: it is counted under that tag if the stripe still has it, or not at all
#   recount vs FLUSHDB      the recount loads newest once, under the stripe. An item with a newer tag was not in the stripe before, since its
#                           generation was stored later, and comes when the stripe is free
#   write vs clear          the tag has the epoch with which the item is stored: what a clear took away is not counted with what comes
# Crash
#   the turn is odd         it stays odd: writers leave the counts alone, until sizes.pxd has counted the stripe's items under its lock, as the next
#                           DBSIZE does, or INFO, for some ms; what that has not come to says what it said
#   FLUSHDB of the first    what is removed is removed; as of each delete by itself
#   newest stored, the generation's key not: newest is no generation, or 0. A stripe that has another tag than the generation's is counted by a
#                           walk, once, by DBSIZE, or by INFO, for some ms: it has the generation's tag then. No slot has named the new generation, so
#                           the next write may have its version; a fork child that makes the same of it finds newest right
#   a generation that put() did not make, or is restored late: the same
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from shmcache.core.atomics cimport ld8r, ld16r, ld32, ld64r, st32, st64, unlikely
from shmcache.core.layout cimport DATABASES, FLAG_CLAIM, databases_t, item_t, seg_t, stripe_t
from shmcache.core.slab cimport item_at, page_room

cdef enum:
    N_OTHERS = 7            # bytes of b"\0ns\0db:"

cdef inline uint32_t tag_of(uint64_t generation, uint32_t epoch) noexcept nogil:
    """Of all bits of a generation (Fibonacci hashing): odd, so that 0 is none's."""
    return (<uint32_t>(generation * <uint64_t>0x9e3779b97f4a7c15 >> 32) + (epoch << 1)) | 1

cdef inline bint is_others(const uint8_t* key, uint64_t n) noexcept nogil:
    return n >= N_OTHERS and memcmp(key, <const char*>b"\0ns\0db:", N_OTHERS) == 0

cdef inline int number_in(const uint8_t* key, uint64_t n, uint64_t* end) noexcept nogil:
    """The number behind b"\\0ns\\0db:", if it is 1 to 15, and where it ends; else 0."""
    cdef int d = key[N_OTHERS] - 48 if n > N_OTHERS else 0
    end[0] = N_OTHERS + 1
    if d == 1 and n > N_OTHERS + 1 and 48 <= key[N_OTHERS + 1] <= 57:
        d = 10 + key[N_OTHERS + 1] - 48
        end[0] += 1
    return d if 0 < d < DATABASES else 0

cdef inline int database_of(const uint8_t* key, uint64_t n, uint64_t* generation) noexcept nogil:
    """Of a key that is_others(): whose item it is, and the generation that it carries. 0: no database's, or of one that is
    not counted by itself."""
    cdef uint64_t end = 0
    cdef int d = number_in(key, n, &end)
    if d == 0 or n < end + 9 or key[end] != 0:
        return 0
    memcpy(generation, key + end + 1, 8)
    return d

cdef inline int whose_generation(const uint8_t* key, uint64_t n) noexcept nogil:
    """The database whose generation's key this is; 0: none's."""
    cdef uint64_t end = 0
    cdef int d = number_in(key, n, &end) if is_others(key, n) else 0
    return d if n == end else 0

cdef inline uint64_t key_bytes_of(seg_t* s, uint64_t addr) noexcept nogil:
    """Of an item, clamped."""
    cdef uint64_t room = page_room(s, addr)
    return min(<uint64_t>ld16r(&item_at(s, addr).key_bytes), room - 48) if room > 48 else 0

cdef inline bint expires(item_t* it) noexcept nogil:
    """Is it counted as one that expires?"""
    return ld64r(&it.expiry_ms) != 0 and not ld8r(&it.flags) & FLAG_CLAIM

# ---- what a write does, the stripe held ----------------------------------------------------------------------------------------

cdef inline bint is_other(seg_t* s, uint64_t addr) noexcept nogil:
    """Is this item not of the first database? Of a plain key its first byte says so."""
    cdef const uint8_t* key = <uint8_t*>item_at(s, addr) + 48
    return unlikely(key[0] == 0) and is_others(key, key_bytes_of(s, addr))

cdef inline bint changes_tally(seg_t* s, uint64_t old, uint64_t new, bint same_key) noexcept nogil:
    """Does it change one of the counts above that `new` comes and `old` goes (0: none)? It may say so of what does not. Of two items of the same
    key, and so of the same database and generation, that are of one epoch and expire or do not, both, it does not."""
    cdef item_t* it = item_at(s, new if new else old)
    cdef item_t* goes
    cdef bint more = expires(it)
    if new and old:
        goes = item_at(s, old)
        if goes.epoch == it.epoch and more == expires(goes) and (same_key or not (is_other(s, new) or is_other(s, old))):
            return False
        return more or expires(goes) or is_other(s, new) or is_other(s, old)
    return more or is_other(s, new if new else old)

cdef inline bint tally_begin(stripe_t* st) noexcept nogil:
    """Before the intent of a write that changes a count. False: they are worth nothing; leave them alone."""
    if st.turn & 1:
        return False
    st64(&st.turn, st.turn + 1)
    #! tally: begun
    return True

cdef inline void tally_in(uint64_t* at, uint32_t epoch, item_t* it, bint comes) noexcept nogil:
    """A count of one epoch, as a stripe's is."""
    cdef uint64_t count = at[0] if at[0] >> 32 == epoch else <uint64_t>epoch << 32
    if it.epoch == epoch and (comes or <uint32_t>count):
        count = count + 1 if comes else count - 1
    st64(at, count)

cdef inline void tally(seg_t* s, stripe_t* st, uint64_t addr, uint32_t epoch, bint comes) noexcept nogil:
    """Between begin and end: this item has come into its slot, or has left it. epoch: of this operation (bucket.pxd, epoch_of)."""
    cdef databases_t* of = &s.databases[st - s.stripes]
    cdef item_t* it = item_at(s, addr)
    cdef const uint8_t* key = <uint8_t*>it + 48
    cdef uint64_t generation = 0
    cdef uint32_t tag, by = 1 if comes else <uint32_t>-1
    cdef int d
    if not is_other(s, addr):
        if expires(it):
            tally_in(&st.expiring, epoch, it, comes)
        return
    tally_in(&st.others, epoch, it, comes)
    #! tally: others
    d = database_of(key, key_bytes_of(s, addr), &generation)
    if d == 0:
        return
    tag = tag_of(generation, it.epoch)
    if of.tag[d] != tag:
        if not comes or ld32(&s.header.newest[d]) != tag:
            return
        st32(&of.tag[d], tag)
        #! tally: tag
        st32(&of.n[d], 0)
        st32(&of.expiring[d], 0)
    if comes or of.n[d]:
        st32(&of.n[d], of.n[d] + by)
    #! tally: counted
    if expires(it) and (comes or of.expiring[d]):
        st32(&of.expiring[d], of.expiring[d] + by)

cdef inline void tally_end(stripe_t* st) noexcept nogil:
    st64(&st.turn, st.turn + 1)
    #! tally: over

cdef inline void note_newest(seg_t* s, const uint8_t* key, uint64_t n, const uint8_t* value, uint32_t epoch, bint fresh) noexcept nogil:
    """Before the slot's store of an item of 8 bytes: is it a generation? fresh: no item carries it yet."""
    cdef int d = whose_generation(key, n)
    cdef uint64_t generation
    cdef uint32_t tag
    if d:
        memcpy(&generation, value, 8)
        tag = tag_of(generation, epoch)
        if fresh or s.header.newest[d] != tag:
            st32(&s.header.newest[d], tag if fresh else 0)
        #! put: newest
