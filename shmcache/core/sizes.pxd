# The size of a database (databases.pxd): a sum over stripes, each of one instant, as len() of a cache is. A stripe that does not say, since a
# writer died as it counted or since no write told it of this generation, has its items counted once, under its lock: then it says.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from shmcache.core.atomics cimport cpu_pause, fence_acquire, ld32, ld32r, ld64, ld64r, st32, st64
from shmcache.core.bucket cimport ADDR_MASK, chain_first, chain_next, chain_t, epoch_of, stripe_release, stripe_take
from shmcache.core.databases cimport database_of, expires, is_others, key_bytes_of, tag_of
from shmcache.core.layout cimport DATABASES, databases_t, item_t, seg_t, stripe_t
from shmcache.core.slab cimport in_slab, item_at
from shmcache.core.token cimport ABSENT, AGAIN, BUSY, OK, dead, mono_ns, token_of

cdef enum:
    LOOKS = 64              # at a stripe whose counts are being changed, before its lock is taken
    IF_DEAD = 1             # until_ns: take_for_size()

ctypedef struct sized_t:    # of a database, in a stripe or in all
    uint64_t items
    uint64_t expiring       # of these

ctypedef struct census_t:   # of a stripe's items, counted one by one
    uint64_t others
    uint64_t expiring       # of the first database
    uint32_t asked[16]      # DATABASES: in: a tag
    uint32_t n[16]          # out: items that carry it, and how many of these expire
    uint32_t n_expiring[16]
    uint32_t newest[16]     # the same of header.newest, as it was loaded
    uint32_t n_newest[16]
    uint32_t n_newest_expiring[16]

cdef inline uint64_t in_epoch(uint64_t count, uint32_t epoch) noexcept nogil:
    return <uint32_t>count if count >> 32 == epoch else 0

cdef inline int size_as_said(seg_t* s, stripe_t* st, int d, uint32_t tag, uint32_t epoch, sized_t* to) noexcept nogil:
    """What the stripe's counts say of this tag of database d: OK, ABSENT if they say nothing, AGAIN if a write changes them."""
    cdef databases_t* of = &s.databases[st - s.stripes]
    cdef uint64_t turn = ld64(&st.turn), others
    #~ size: turn loaded
    if d == 0:
        others = in_epoch(ld64r(&st.others), epoch)
        to.items = in_epoch(ld64r(&st.count), epoch)
        to.items -= min(others, to.items)
        to.expiring = in_epoch(ld64r(&st.expiring), epoch)
    else:
        to.items = to.expiring = 0
        if ld32r(&of.tag[d]) == tag:
            to.items = ld32r(&of.n[d])
            to.expiring = ld32r(&of.expiring[d])
    fence_acquire()
    if turn & 1 or ld64r(&st.turn) != turn:
        return AGAIN
    return OK if d == 0 or ld32r(&of.tag[d]) == tag or ld32(&s.header.newest[d]) == tag else ABSENT

cdef inline void take_census(seg_t* s, uint64_t stripe, uint32_t epoch, census_t* c) noexcept nogil:
    """Count the items of a stripe, which is held."""
    cdef chain_t chain
    cdef uint64_t b = stripe, addr, n
    cdef uint8_t* key
    cdef item_t* it
    cdef uint64_t generation
    cdef uint32_t tag
    cdef int i, d
    c.others = c.expiring = 0
    for d in range(DATABASES):
        c.newest[d] = ld32(&s.header.newest[d])
        c.n[d] = c.n_expiring[d] = c.n_newest[d] = c.n_newest_expiring[d] = 0
    while b < s.n_buckets:
        chain_first(s, b, &chain)
        while True:
            for i in range(chain.n_slots):
                addr = ld64(&chain.slot[i]) & ADDR_MASK
                if not in_slab(s, addr):
                    continue
                it = item_at(s, addr)
                key = <uint8_t*>it + 48
                n = key_bytes_of(s, addr)
                if not is_others(key, n):
                    c.expiring += it.epoch == epoch and expires(it)
                    continue
                c.others += it.epoch == epoch
                generation = 0
                d = database_of(key, n, &generation)
                if d == 0:
                    continue
                tag = tag_of(generation, it.epoch)
                if tag == c.asked[d]:
                    c.n[d] += 1
                    c.n_expiring[d] += expires(it)
                if tag == c.newest[d]:
                    c.n_newest[d] += 1
                    c.n_newest_expiring[d] += expires(it)
            if not chain_next(s, &chain):
                break
        b += s.n_stripes

cdef inline void count_anew(seg_t* s, stripe_t* st, int d, uint32_t tag, uint32_t epoch, sized_t* to) noexcept nogil:
    """The stripe is held: count its items, and how many carry this tag of database d; afterwards its counts say so.

    C3: a tag that is newest (0: none is) gives way to the one that is asked for only if no item carries it. Counts of other databases stay, unless the
    turn was odd: then nothing is known of them, and what carries newest is counted. Crash: the turn is odd.
    """
    cdef databases_t* of = &s.databases[st - s.stripes]
    cdef bint all = st.turn & 1, newest
    cdef census_t c
    cdef int k
    for k in range(DATABASES):
        c.asked[k] = tag if k == d else 0
    take_census(s, st - s.stripes, epoch, &c)
    if not all:
        st64(&st.turn, st.turn + 1)
    #! count anew: begun
    if all:
        st64(&st.others, <uint64_t>epoch << 32 | c.others)
        st64(&st.expiring, <uint64_t>epoch << 32 | c.expiring)
    for k in range(1, DATABASES):
        if all or k == d:
            newest = k != d or c.n_newest[k] != 0
            st32(&of.tag[k], c.newest[k] if newest else tag)
            st32(&of.n[k], c.n_newest[k] if newest else c.n[k])
            st32(&of.expiring[k], c.n_newest_expiring[k] if newest else c.n_expiring[k])
    #! count anew: counted
    st64(&st.turn, st.turn + 1)
    to.items = c.n[d] if d else in_epoch(st.count, epoch) - min(c.others, in_epoch(st.count, epoch))
    to.expiring = c.n_expiring[d] if d else c.expiring

cdef inline int take_for_size(seg_t* s, stripe_t* st, uint64_t until_ns) noexcept nogil:
    """stripe_take(). IF_DEAD: the lock is only tried; if its holder is dead it is taken over, after 1 ms."""
    cdef uint64_t holder
    cdef int rc = stripe_take(s, st, until_ns if until_ns != IF_DEAD else 0)
    if rc == BUSY and until_ns == IF_DEAD:
        holder = token_of(ld64(&st.lock.word))
        if holder and dead(s, holder):
            rc = stripe_take(s, st, mono_ns())
    return rc

cdef inline int has_first(seg_t* s, uint32_t i, uint64_t until_ns) noexcept nogil:
    """May stripe i have an item of the first database? OK; ABSENT: it has none, by C1, for the stripe was held; BUSY or INTR."""
    cdef stripe_t* st = &s.stripes[i]
    cdef uint32_t epoch
    cdef int rc = stripe_take(s, st, until_ns)
    if rc == OK:
        epoch = epoch_of(s, st)
        if st.turn & 1 == 0 and in_epoch(st.count, epoch) <= in_epoch(st.others, epoch):
            rc = ABSENT
        stripe_release(s, st)
    return rc

cdef inline int size_said(seg_t* s, uint32_t i, int d, uint64_t generation, sized_t* to) noexcept nogil:
    """What stripe i says of this generation of database d: OK, ABSENT or AGAIN as size_as_said(). It takes no lock."""
    cdef stripe_t* st = &s.stripes[i]
    cdef uint32_t epoch
    cdef int looks, rc = AGAIN
    for looks in range(LOOKS):
        epoch = epoch_of(s, st)
        rc = size_as_said(s, st, d, tag_of(generation, epoch), epoch, to)
        if rc != AGAIN:
            break
        cpu_pause()
    return rc

cdef inline int size_counted(seg_t* s, uint32_t i, int d, uint64_t generation, uint64_t until_ns, sized_t* to) noexcept nogil:
    """The same under the lock, where what is not known is counted: OK. BUSY or INTR: `to` is as it was. A walk through the stripe's buckets."""
    cdef stripe_t* st = &s.stripes[i]
    cdef uint32_t epoch
    cdef int rc = take_for_size(s, st, until_ns)
    if rc != OK:
        return rc
    epoch = epoch_of(s, st)
    if size_as_said(s, st, d, tag_of(generation, epoch), epoch, to) != OK:
        count_anew(s, st, d, tag_of(generation, epoch), epoch, to)
    stripe_release(s, st)
    return OK
