# One operation on one key: read without a lock, write under one stripe.
#
# A read, in order: head version (acquire); walk, every slot loaded once; of a candidate cas (acquire) first, then hash, epoch,
# expiry and lengths, once each, clamped; key compared; value copied; acquire fence; good if the version is unchanged, or (a hit)
# slot, hash and cas are. Why that is enough: content changes only after rule F's bump; a reader that saw one new byte has, behind
# its acquire fence, to see the bump, or the cas of 0 that is stored before any other byte.
#
# A write (step numbers as in the code): 1 reserve, 2 fill, 3 take the stripe and check, 4 intent, 5 old RETIRED, 6 slot,
# 7 version, 8 log (ring.pxd), 9 new LIVE, 10 seq, 11 release, 12 free the old.
# Crash at 1-3: RESERVED(dead), R1. 4-5: repair undoes. 6-10: repair finishes. 12: RETIRED(dead), R4.
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from shmcache.core.atomics cimport add64, cas32, fence_acquire, fence_release, ld8r, ld16r, ld32, ld32r, ld64, ld64r, \
    likely, prefetch, st8, st8r, st32, st64, unlikely
from shmcache.core.big cimport big_fill, big_free_item_pages, big_free_pages, big_owns, big_read, big_seal_locked, big_shape, big_t, \
    page_bytes_of
from shmcache.core.bucket cimport ADDR_MASK, OP_DELETE, OP_EVICT, OP_SET, OP_TOUCH, bucket_of, bump, chain_first, \
    chain_grow_locked, chain_next, chain_t, count_at, count_without, depart, depart_with, departed, epoch_of, holds, note_intent, pthread_self, remove_locked, \
    slot_naming, slot_word, stripe_of, stripe_release, stripe_take
from shmcache.core.clock cimport claim_stands, now_ms, over, stale, stale_at, take_page, take_room
from shmcache.core.databases cimport changes_tally, expires, is_others, note_newest, tally, tally_begin, tally_end
from shmcache.core.dirty cimport dirty_chunk, dirty_clear, dirty_gone, dirty_in_place, dirty_placed, dirty_set, writes_back
from shmcache.core.layout cimport CLS_BIG, FLAG_BIG, FLAG_CLAIM, FLAG_COPY_TTL, FLAG_DIRTY, FLAG_LOCK, FLAG_WRITING, MAX_REFS, \
    NAMESPACES_FIRST, POLICY_AROUND, POLICY_THROUGH, bucket_t, item_t, seg_t, stripe_t
from shmcache.core.envelope cimport CODEC_ENVELOPE, FLAG_NEGATIVE, HEAD_BYTES, STATE_DAMAGED, STATE_FRESH, STATE_GONE, STATE_NEGATIVE, \
    STATE_STALE, TAG_BYTES, TAG_PREFIX_BYTES, envelope_open, envelope_t
from shmcache.core.lock cimport lock_release, lock_take, within
from shmcache.core.record cimport RECORD_DELETE, RECORD_EXPIRY, RECORD_SET
from shmcache.core.ring cimport log_op, log_t
from shmcache.core.settle cimport INNER_NS, late, settle_pages
from shmcache.core.siphash cimport siphash13
from shmcache.core.slab cimport chunk_class, chunk_free, class_for, cls_mark, in_slab, item_at, page_from_pool, page_room, page_to_pool, \
    refs_of, value_offset
from shmcache.core.token cimport ABSENT, AGAIN, BUSY, EXISTS, INTR, LIVE, MISMATCH, NO_ROOM, NO_STORE, NOT_INT, OK, OVERFLOW, PAGE_BIG, \
    PAGE_CUTTING, RETIRED, TAKEN_OVER, dead, mono_ns, word_of

cdef enum:
    RESTARTS = 64           # of a read, before it takes the stripe
    LARGE_COPY = 65536      # bytes: a read that is overtaken in such a copy twice takes it then
    LARGER = 2              # slab classes tried beyond the fitting one
    CODEC_INT = 2           # codec.py: eight bytes, changed in place
    # put: when
    ALWAYS = 0
    IF_ABSENT = 1
    IF_PRESENT = 2
    IF_VERSION = 3
    IF_UNCLAIMED = 4        # neither a value nor a claim that stands
    IF_CLAIM = 5            # exactly this claim: its version
    IF_UNMARKED = 7         # no mark of a living thread that wants the key for itself
    IF_UNMARKED_BY_ANY = 8  # no mark of a living thread
    IF_SAME = 9             # exactly this item, fresh, stale or negative: what a stale value is replaced with
    RESTORED = 6            # nothing is there, nothing left meanwhile, and nobody has cleared: with a version that is given
    # put_t.drawn
    MADE = 1
    FRESH = 2

# ---- read -----------------------------------------------------------------------------------------------------------------

ctypedef struct read_t:
    bucket_t* head
    uint32_t version
    uint64_t* slot
    uint64_t slot_word
    uint64_t hash
    uint64_t addr
    uint64_t cas
    uint64_t expiry_ms
    uint64_t now_ms         # if there is an expiry: the clock, from before it was loaded
    uint64_t key_bytes
    uint64_t value_bytes
    uint8_t codec
    uint8_t flags
    bint is_big
    bint damaged            # a big value whose pages are not its own
    int state               # STATE_*, of an envelope that was looked into
    bint expired            # the miss was a hit whose time was over
    bint claimed            # the miss is a claim, at addr
    big_t big

cdef enum:
    MARK_WRITERS = 7        # who may write one key at a time; others wait

ctypedef struct claim_t:    # a claim's value. Writer: who places it; constant then
    uint64_t token          # of the process
    uint64_t thread         # number of its thread
    uint64_t owner          # number of the task or greenlet that claimed; 0: the thread itself. No number is used twice in a process

ctypedef struct mark_t:     # a mark's value. Writer: the holder of the stripe
    uint64_t owner          # token of who put it last: he may fill it
    uint64_t alone          # he wants the key for himself, or his caller has left: others wait
    uint64_t given_up_ms    # till when that may go on in the store of which nobody will say how it ended; 0: nothing
    uint64_t token[7]       # of those who have not ended, dead or alive; 0: none
    uint64_t until_ms[7]    # when the time of his mark is over

cdef inline uint64_t claim_bytes(uint8_t flags) noexcept nogil:
    return sizeof(mark_t) if unlikely(flags & FLAG_WRITING) else sizeof(claim_t)

cdef inline bint unchanged(read_t* r) noexcept nogil:
    """Is what was read since read_begin one state of the table?"""
    fence_acquire()
    if likely(ld32r(&r.head.version) == r.version):
        return True
    return False

cdef inline bint same_item(seg_t* s, read_t* r) noexcept nogil:
    """The version moved: is it still this item, in this slot? Long copies next to busy neighbours live by this."""
    cdef item_t* it = item_at(s, r.addr)
    return ld64(r.slot) == r.slot_word and ld64r(&it.hash) == r.hash and ld64r(&it.cas) == r.cas and r.cas != 0

cdef inline bint load_item(seg_t* s, read_t* r, const uint8_t* key, size_t n) noexcept nogil:
    """Load and clamp the header at r.addr; is it this key's? Every field is loaded once."""
    cdef item_t* it = item_at(s, r.addr)
    cdef uint64_t room
    r.cas = ld64(&it.cas)
    if ld64r(&it.hash) != r.hash:
        return False
    r.key_bytes = ld16r(&it.key_bytes)
    r.value_bytes = ld32r(&it.value_bytes)
    r.codec = ld8r(&it.codec)
    r.flags = ld8r(&it.flags)
    r.is_big = r.flags & FLAG_BIG
    room = page_room(s, r.addr)
    if r.key_bytes != n or 48 + n > room or memcmp(<uint8_t*>it + 48, key, n) != 0:
        return False
    if unlikely(r.is_big):
        big_shape(s, n, r.value_bytes, &r.big)
        return r.big.head_bytes <= room and r.value_bytes <= s.max_value_bytes
    return value_offset(n) + r.value_bytes <= room

cdef inline void prefetch_rest(seg_t* s, uint64_t addr) noexcept nogil:
    """Ask for the lines that a hit needs behind an item's first: all at once, not one after another."""
    prefetch(<uint8_t*>item_at(s, addr) + 64)
    prefetch(<uint8_t*>item_at(s, addr) + 128)
    prefetch(refs_of(s, addr))

cdef inline int read_begin(seg_t* s, const uint8_t* key, size_t n, uint64_t h, read_t* r) noexcept nogil:
    """Find a key: OK (copy, then read_end), ABSENT (true at one instant), or AGAIN."""
    cdef chain_t c
    cdef uint64_t b = bucket_of(s, h), w
    cdef item_t* it
    cdef int i
    r.head = &s.buckets[b]
    r.version = ld32(&r.head.version)
    #~ read: version loaded
    r.hash = h
    r.damaged = False
    r.expired = False
    r.claimed = False
    chain_first(s, b, &c)
    while True:
        for i in range(c.n_slots):
            w = ld64(&c.slot[i])
            if (w ^ h) >> 48 or w == 0:
                continue
            r.addr = w & ADDR_MASK
            if unlikely(not in_slab(s, r.addr)):
                continue
            prefetch_rest(s, r.addr)
            #~ read: slot loaded
            if not load_item(s, r, key, n):
                continue
            #~ read: item loaded
            it = item_at(s, r.addr)
            r.slot = &c.slot[i]
            r.slot_word = w
            r.expiry_ms = ld64r(&it.expiry_ms)
            if unlikely(r.expiry_ms != 0):
                r.now_ms = now_ms(s)
                #! read: clock
                r.expiry_ms = ld64(&it.expiry_ms)       # behind the clock: if it is over now, it was over when this was loaded
            #~ read: expiry loaded
            if unlikely(ld32r(&it.epoch) != ld32(&s.header.epoch)) and not r.flags & (FLAG_LOCK | FLAG_DIRTY) and \
                    not (s.holder == pthread_self() and ld32r(&it.epoch) == s.held_epoch):      # who holds stripes reads what was there then
                return ABSENT if unchanged(r) else AGAIN
            if unlikely(r.expiry_ms != 0) and r.expiry_ms <= r.now_ms and not r.flags & FLAG_DIRTY:
                #~ read: expired
                if not unchanged(r):
                    return AGAIN
                r.expired = True
                return ABSENT
            if unlikely(r.flags & FLAG_CLAIM):
                r.claimed = unchanged(r)
                return ABSENT if r.claimed else AGAIN
            #~ read: to be copied
            if unlikely(r.is_big) and not unchanged(r):     # before anyone allocates value_bytes
                return AGAIN
            return OK
        if likely(ld32r(c.link) == 0) or not chain_next(s, &c):
            break
    #~ read: not found
    return ABSENT if unchanged(r) else AGAIN

cdef inline void prefetch_item(seg_t* s, uint64_t h) noexcept nogil:
    """Ask for the item that a read of this hash will look at first. A hint: nothing is believed, nothing is written."""
    cdef chain_t c
    cdef uint64_t w
    cdef int i
    chain_first(s, bucket_of(s, h), &c)
    for i in range(c.n_slots):
        w = ld64r(&c.slot[i])
        if (w ^ h) >> 48 == 0 and in_slab(s, w & ADDR_MASK):
            prefetch(item_at(s, w & ADDR_MASK))
            prefetch_rest(s, w & ADDR_MASK)
            return

cdef inline void read_copy(seg_t* s, read_t* r, uint8_t* to) noexcept nogil:
    cdef uint64_t counter
    if unlikely(r.is_big):
        r.damaged = not big_read(s, r.addr, r.key_bytes, r.value_bytes, &r.big, to)
    elif r.codec == CODEC_INT and r.value_bytes == 8:
        counter = ld64r(<uint64_t*>(<uint8_t*>item_at(s, r.addr) + value_offset(r.key_bytes)))
        memcpy(to, &counter, 8)
    else:
        memcpy(to, <uint8_t*>item_at(s, r.addr) + value_offset(r.key_bytes), r.value_bytes)

cdef extern from *:
    """
    #ifdef SHMCACHE_NO_VERSION_CHECK        /* to see the stress test find what the check is for; never in a release */
    #define SHM_TRUST_BLINDLY 1
    #else
    #define SHM_TRUST_BLINDLY 0
    #endif
    """
    const bint TRUST_BLINDLY "SHM_TRUST_BLINDLY"

cdef inline int read_end(seg_t* s, read_t* r) noexcept nogil:
    """After the copy: OK, and the hit is counted for CLOCK; or AGAIN, and the copy is worth nothing."""
    cdef uint8_t* refs
    cdef uint8_t n
    #~ read: copied
    if TRUST_BLINDLY or unchanged(r) or same_item(s, r):
        refs = refs_of(s, r.addr)
        n = ld8r(refs)
        if n < MAX_REFS:
            st8r(refs, n + 1)
        return OK
    return AGAIN

# ---- envelopes ---------------------------------------------------------------------------------------------------------------

cdef inline int read_generation(seg_t* s, const uint8_t* key, size_t n, uint64_t* generation) noexcept nogil:
    """The generation under a tag's key: OK, and CLOCK counts the hit; ABSENT; MISMATCH if it is none; AGAIN after 64 tries."""
    cdef read_t r
    cdef uint64_t h = siphash13(key, n, s.k0, s.k1)
    cdef int rc, tries
    for tries in range(RESTARTS):
        rc = read_begin(s, key, n, h, &r)
        if rc == ABSENT:
            return ABSENT
        if rc == OK:
            if r.value_bytes != 8 or r.is_big:
                return MISMATCH
            read_copy(s, &r, <uint8_t*>generation)
            if read_end(s, &r) == OK:
                return OK
    return AGAIN

cdef inline int envelope_state(seg_t* s, const uint8_t* p, envelope_t* e, uint64_t expiry_ms, uint64_t now) noexcept nogil:
    """STATE_*, of a copy of the head that is whole; now: read_t.now_ms. Takes no lock; may be asked under a stripe."""
    cdef uint8_t key[TAG_PREFIX_BYTES + TAG_BYTES]
    cdef uint64_t carried, generation = 0
    cdef int i
    p += 12
    #~ envelope: head copied
    for i in range(e.n_tags):
        memcpy(key, <const char*>b"\0tag\0", TAG_PREFIX_BYTES)
        memcpy(key + TAG_PREFIX_BYTES, p + 9, p[8])
        memcpy(&carried, p, 8)
        if read_generation(s, key, TAG_PREFIX_BYTES + p[8], &generation) != OK or generation != carried:
            return STATE_GONE
        p += 9 + p[8]
    if e.flags & FLAG_NEGATIVE:
        return STATE_NEGATIVE
    if e.stale_ms and expiry_ms and expiry_ms <= now + e.stale_ms:
        return STATE_STALE
    return STATE_FRESH

cdef inline uint64_t copy_head(seg_t* s, read_t* r, uint8_t* to) noexcept nogil:
    """At most HEAD_BYTES of the value: how many; 0: damage. As read_copy, it is worth something if nothing has changed."""
    cdef uint8_t* at = <uint8_t*>item_at(s, r.addr) + value_offset(r.key_bytes)
    cdef uint64_t n = min(r.value_bytes, <uint64_t>HEAD_BYTES)
    cdef uint32_t page
    if r.is_big and r.big.n_pages:
        page = ld32r(<uint32_t*>at)
        if not big_owns(s, r.addr, page):
            return 0
        at = page_bytes_of(s, page)
    memcpy(to, at, n)
    return n

cdef inline int state_in_place(seg_t* s, read_t* r, bint locked, uint32_t* stale_ms) noexcept nogil:
    """STATE_* of an envelope whose value is not copied, and its stale_ms. Without its stripe: AGAIN if it changes meanwhile."""
    cdef uint8_t head[HEAD_BYTES]
    cdef envelope_t e
    cdef uint64_t n = copy_head(s, r, head)
    stale_ms[0] = 0
    if not locked and not unchanged(r) and not same_item(s, r):
        return AGAIN
    if not envelope_open(head, n, &e):
        return STATE_DAMAGED
    stale_ms[0] = e.stale_ms
    return envelope_state(s, head, &e, r.expiry_ms, r.now_ms)

cdef inline int read_left(seg_t* s, const uint8_t* key, size_t n, uint64_t h, bint locked, double* left) noexcept nogil:
    """Seconds that a key has left, INFINITY if it never expires: OK, ABSENT, or AGAIN (without its stripe). With this version, so with this
    expiry, it was there when the clock was read."""
    cdef read_t r
    cdef int state
    cdef uint32_t stale_ms = 0
    cdef uint64_t now
    cdef int rc = read_begin(s, key, n, h, &r)
    if unlikely(rc == OK and r.codec == CODEC_ENVELOPE):
        state = state_in_place(s, &r, locked, &stale_ms)
        if state == AGAIN:
            return AGAIN
        if state != STATE_FRESH and state != STATE_DAMAGED:
            return ABSENT
    if rc == OK:
        #! ttl: read
        now = now_ms(s)
        fence_acquire()
        if not locked and not same_item(s, &r):
            return AGAIN
        left[0] = INFINITY if r.expiry_ms == 0 else max(0, <int64_t>(r.expiry_ms - stale_ms - now)) / 1000.0
    return rc

cdef inline bint hidden_at(seg_t* s, uint64_t addr, uint64_t key_bytes, uint64_t now) noexcept nogil:
    """Is the envelope at this address given to nobody who does not ask for it? Without its stripe the caller sees that it has not changed."""
    cdef read_t r
    cdef item_t* it = item_at(s, addr)
    cdef uint32_t stale_ms
    cdef int state
    r.addr = addr
    r.hash = ld64r(&it.hash)
    if not load_item(s, &r, <uint8_t*>it + 48, key_bytes):
        return False
    r.now_ms = now
    r.expiry_ms = ld64r(&it.expiry_ms)
    state = state_in_place(s, &r, True, &stale_ms)
    return state != STATE_FRESH and state != STATE_DAMAGED

# ---- find, under the stripe -------------------------------------------------------------------------------------------------

ctypedef struct found_t:
    uint64_t* slot          # of the key, or NULL
    uint64_t addr
    bint live               # a value; not cleared, not expired, not hidden
    bint claimed            # a claim; not cleared, not expired
    uint32_t epoch          # with which that was judged: of what is stored now, too
    int state               # STATE_*, of a value that is neither cleared nor expired; live if it is fresh (or damaged)
    uint32_t stale_ms       # of an envelope
    uint64_t* empty         # the first free slot of the chain, or NULL
    uint64_t* dull          # the slot whose item is least worth keeping (stale first)
    uint8_t dull_refs
    uint32_t* last_link     # of the chain's last bucket
    int hops

cdef inline void find_locked(seg_t* s, uint64_t b, const uint8_t* key, size_t n, uint64_t h, found_t* f) noexcept nogil:
    cdef chain_t c
    cdef read_t r
    cdef uint64_t w
    cdef uint8_t refs
    cdef int i
    f.slot = NULL
    f.epoch = epoch_of(s, stripe_of(s, b))
    f.state = STATE_FRESH
    f.stale_ms = 0
    f.empty = NULL
    f.dull = NULL
    f.dull_refs = 255
    r.hash = h
    chain_first(s, b, &c)
    while True:
        for i in range(c.n_slots):
            w = ld64(&c.slot[i])
            if w == 0:
                if f.empty == NULL:
                    f.empty = &c.slot[i]
                continue
            r.addr = w & ADDR_MASK
            if not in_slab(s, r.addr):
                continue
            if (w ^ h) >> 48 == 0 and load_item(s, &r, key, n):
                f.slot = &c.slot[i]
                f.addr = r.addr
                f.live = not stale_at(s, item_at(s, r.addr), f.epoch)
                f.claimed = f.live and r.flags & FLAG_CLAIM and r.value_bytes == claim_bytes(r.flags)
                if unlikely(r.codec == CODEC_ENVELOPE) and f.live and not r.flags & FLAG_CLAIM:
                    r.now_ms = now_ms(s)
                    r.expiry_ms = item_at(s, r.addr).expiry_ms
                    f.state = state_in_place(s, &r, True, &f.stale_ms)
                    f.live = f.state == STATE_FRESH or f.state == STATE_DAMAGED
                if r.flags & FLAG_CLAIM:        # of another size: damage, neither a value nor a claim
                    f.live = False
                return
        if not chain_next(s, &c):
            break
    f.last_link = c.link
    f.hops = c.hops

cdef inline void find_dull_locked(seg_t* s, uint64_t b, found_t* f) noexcept nogil:
    """The chain's least used entry, of equals the oldest (one stripe, so versions compare): what goes when no overflow bucket
    can be had. A slot that names no item of this bucket goes first, and nothing is done to what it names."""
    cdef chain_t c
    cdef uint64_t addr, cas, oldest = 0
    cdef uint32_t index = 0
    cdef uint8_t refs
    cdef int i
    chain_first(s, b, &c)
    while True:
        for i in range(c.n_slots):
            addr = ld64(&c.slot[i]) & ADDR_MASK
            if chunk_class(s, addr, &index) < 0 or ld64(&item_at(s, addr).word) != word_of(LIVE, 0) or \
                    bucket_of(s, ld64(&item_at(s, addr).hash)) != b:
                f.dull = &c.slot[i]
                f.addr = 0
                return
            if claim_stands(s, stripe_of(s, b), addr) or ld8r(&item_at(s, addr).flags) & FLAG_DIRTY:
                continue
            refs = ld8r(refs_of(s, addr))
            cas = item_at(s, addr).cas
            if stale(s, stripe_of(s, b), item_at(s, addr)):
                refs = 0
                cas = 0
            if refs < f.dull_refs or (refs == f.dull_refs and cas < oldest):
                f.dull_refs = refs
                oldest = cas
                f.dull = &c.slot[i]
                f.addr = addr
        if not chain_next(s, &c):
            return

# ---- write -------------------------------------------------------------------------------------------------------------------

ctypedef struct put_t:
    const uint8_t* key
    size_t key_bytes
    uint64_t hash
    const uint8_t* value
    uint64_t value_bytes
    uint64_t expiry_ms
    uint8_t codec
    uint8_t flags           # FLAG_CLAIM, FLAG_LOCK, FLAG_WRITING; else a value: FLAG_RAW or 0
    bint loaded             # it is what the store has: no write that has to get there
    int when                # ALWAYS, IF_ABSENT, IF_PRESENT, IF_VERSION, IF_UNCLAIMED, IF_CLAIM, IF_UNMARKED, IF_UNMARKED_BY_ANY
    uint64_t version        # for IF_VERSION and IF_CLAIM; RESTORED: that it had
    uint32_t epoch          # RESTORED: of the segment when the restore began
    uint8_t refs            # its CLOCK count, but of a key that is there: that stays
    int drawn               # MADE: the value is 8 random bytes, of which put() makes a generation (databases.pxd). FRESH: it is one that the step of this
                            # thread has drawn, under which no item can be before it is stored; 0: anything else
    # what put has in hand between two calls
    uint64_t chunk          # reserved and filled; 0: not yet
    int cls
    big_t big
    bint is_big
    uint64_t copied_ns      # how long it took to fill it, if it is a big one: that is no waiting
    uint64_t cas            # out: the version of the item stored
    uint64_t generation     # out: if it was drawn: the one stored
    bint was_live           # out: there was a value
    bint unstored           # out: there was a dirty item, be it a tombstone
    bint overlapped         # out: it replaced a mark, whoever's and however old
    log_t log

cdef inline int collect_pages(seg_t* s, put_t* op, uint64_t until_ns) noexcept nogil:
    """Pages for a big value, listed in its head: OK, NO_ROOM, BUSY or INTR: then none is in hand. One process at a time, or two could each hold
    half and wait. When it is late it has been round the classes once more, and gives up: others wait for the lock of big values.
    """
    cdef uint32_t* pages = <uint32_t*>(<uint8_t*>item_at(s, op.chunk) + value_offset(op.key_bytes))
    cdef uint32_t got = 0
    cdef uint64_t p = 0
    cdef int rc, failures = 0
    cdef bint busy = False      # since the last page: not all that could be had was looked at, so it is not said that there is no room
    if unlikely(s.holder != 0) and s.holder == pthread_self():     # stripes before big: the wrong way round, so not for long
        until_ns = within(until_ns, INNER_NS)
    rc = lock_take(s, &s.header.big.lock, until_ns)
    if rc != OK and rc != TAKEN_OVER:       # a dead holder's pages are BIG(dead): settle_pages finds them
        return rc
    rc = OK
    #! big: lock taken
    while got < op.big.n_pages:
        rc = page_from_pool(s, PAGE_BIG, op.chunk, until_ns, &p)
        if rc == NO_ROOM:
            rc = take_page(s, -1, True, until_ns, &p)
            if rc == OK:
                st64(&s.pages[p].head, op.chunk)
                #! big: head noted
                st64(&s.pages[p].word, word_of(PAGE_BIG, s.me[0]))
                #! big: page BIG
                st32(&s.pages[p].cls, cls_mark(CLS_BIG))
        if rc == OK:
            pages[got] = <uint32_t>p
            #! big: page listed
            got += 1
            failures = 0
            busy = False
            continue
        failures += 1
        busy |= rc == BUSY
        if rc == INTR or failures > 64 or (rc == BUSY and until_ns == 0) or (failures > 2 and (until_ns == 0 or late(s, until_ns))):
            break
        rc = settle_pages(s, s.n_pages, until_ns)
        if rc == INTR:
            break
        busy |= rc == BUSY
    lock_release(&s.header.big.lock)
    if got == op.big.n_pages:
        return OK
    big_free_pages(s, op.chunk, op.key_bytes, got, until_ns)
    return BUSY if (busy or until_ns == 0) and rc != INTR else rc

cdef inline int reserve(seg_t* s, put_t* op, uint64_t until_ns) noexcept nogil:
    """Steps 1 and 2: a chunk (and pages) of this process's, filled."""
    cdef uint64_t need = value_offset(op.key_bytes) + op.value_bytes
    cdef uint64_t addr = 0
    cdef item_t* it
    cdef int rc, i
    cdef bint busy = False
    op.is_big = need > s.chunk_bytes[s.n_classes - 1]
    if op.is_big:
        big_shape(s, op.key_bytes, op.value_bytes, &op.big)
        need = op.big.head_bytes
    op.cls = class_for(s, need)
    if op.cls < 0:
        return NO_ROOM
    rc = take_room(s, op.cls, until_ns, &addr)
    for i in range(LARGER):
        if rc == OK or rc == INTR or until_ns == 0 or op.cls + 1 == <int>s.n_classes:
            break
        busy |= rc == BUSY
        op.cls += 1             # a stopped process holds the class's lock, and nothing in it can be evicted: a larger chunk will do
        rc = take_room(s, op.cls, until_ns, &addr)
    if rc != OK:
        return BUSY if busy and rc == NO_ROOM else rc
    op.chunk = addr
    prefetch_item(s, op.hash)   # of the key's old item, which is looked at next; its bucket was asked for first
    #! put: reserved
    it = item_at(s, addr)
    st64(&it.cas, 0)
    fence_release()             # nobody sees a byte of the new content and the old cas
    #! put: cas 0
    st64(&it.hash, op.hash)
    #! put: hash
    if op.is_big:
        rc = collect_pages(s, op, until_ns)
        if rc != OK:
            chunk_free(s, op.cls, addr, until_ns)
            op.chunk = 0
            return rc
    it.key_bytes = <uint32_t>op.key_bytes
    it.value_bytes = <uint32_t>op.value_bytes
    it.codec = op.codec
    it.flags = op.flags | (FLAG_BIG if op.is_big else 0)
    it.expiry_ms = op.expiry_ms
    #! put: header
    memcpy(<uint8_t*>it + 48, op.key, op.key_bytes)
    op.copied_ns = 0
    if op.is_big:
        op.copied_ns = mono_ns()
        big_fill(s, addr, op.key_bytes, op.value, op.value_bytes)
        op.copied_ns = mono_ns() - op.copied_ns
    else:
        memcpy(<uint8_t*>it + value_offset(op.key_bytes), op.value, op.value_bytes)
    st8r(refs_of(s, addr), op.refs)
    #! put: filled
    return OK

cdef inline void give_up(seg_t* s, put_t* op) noexcept nogil:
    """The put will not be: free what it has in hand."""
    if op.chunk:
        if op.is_big:
            big_free_pages(s, op.chunk, op.key_bytes, op.big.n_pages, 0)
            #! give up: pages freed
        chunk_free(s, op.cls, op.chunk, 0)
        op.chunk = 0

cdef inline void free_old(seg_t* s, uint64_t addr, uint64_t until_ns) noexcept nogil:
    """Step 12: an item that this process has taken out of the table."""
    cdef uint32_t index = 0
    cdef int cls = chunk_class(s, addr, &index)
    big_free_item_pages(s, addr, until_ns)
    #! free old: pages freed
    if cls >= 0:
        chunk_free(s, cls, addr, until_ns)

cdef inline int place_locked(seg_t* s, put_t* op, uint64_t b, found_t* f, uint64_t until_ns) noexcept nogil:
    """The slot into which a new key goes: an empty one, a new overflow bucket's, or the chain's dullest entry's."""
    cdef int rc = OK
    f.addr = 0
    f.slot = f.empty
    if f.slot == NULL and f.hops < 60:
        f.slot = chain_grow_locked(s, b, f.last_link, within(until_ns, INNER_NS), &rc)
        if rc == INTR or (rc == BUSY and until_ns == 0):
            return rc           # the pool may have one: come again with time to wait
    if f.slot == NULL:
        find_dull_locked(s, b, f)
        if f.dull == NULL:      # nothing but claims: the pool may have room for one more
            return BUSY if rc == BUSY else NO_ROOM
        f.slot = f.dull
        add64(&s.row.chain_evictions, 1)
        add64(&s.row.inline_evictions, 1)
        add64(&s.row.evictions, 1)
    return OK

cdef inline bint my_claim(seg_t* s, uint64_t addr, size_t n) noexcept nogil:
    """Is this claim of this process? A fork child knows its parent's versions, and is to fill and release none of them."""
    return item_at(s, addr).value_bytes >= 16 and value_offset(n) + 16 <= page_room(s, addr) and \
        ld64r(<uint64_t*>(<uint8_t*>item_at(s, addr) + value_offset(n))) == s.me[0]

cdef inline bint passes_by(seg_t* s, const uint8_t* key) noexcept nogil:
    """Would a plain write of this key pass the store by? Keys that begin with a NUL are the cache's own."""
    return s.policy != 0 and (s.policy == POLICY_THROUGH or s.policy == POLICY_AROUND) and key[0] != 0

# ---- marks: somebody changes a key in the store (policy.py) --------------------------------------------------------------------
# A mark names all who are at it. A new one takes the place of the one that stands and takes over whom it names; each who ends takes his
# name off, and the last the mark. What of the dead, or of one who cannot say, may still go on in the store keeps it for as long as his own
# mark would have stood, however many come after him.

cdef inline mark_t* of_mark(seg_t* s, uint64_t addr, size_t n) noexcept nogil:
    """Of a mark that was found, and is of its size."""
    return <mark_t*>(<uint8_t*>item_at(s, addr) + value_offset(n))

cdef inline uint64_t living_writers(seg_t* s, mark_t* m, int* n) noexcept nogil:
    """How many live who have put a mark here, have not ended, and whose time is not over; the token of one of them, or 0. Takes no lock."""
    cdef uint64_t token, one = 0, now = now_ms(s)
    cdef int i
    n[0] = 0
    for i in range(MARK_WRITERS):
        token = ld64r(&m.token[i])
        if token and ld64r(&m.until_ms[i]) > now and not dead(s, token):
            one = token
            n[0] += 1
    return one

cdef inline void inherit_mark(seg_t* s, mark_t* new, mark_t* old) noexcept nogil:
    """Take over those whose mark the new one takes the place of; who of them is dead will not tell what he has done."""
    cdef uint64_t token, until, now = now_ms(s)
    cdef int i, n = 1
    new.given_up_ms = old.given_up_ms if old.given_up_ms > now else 0
    for i in range(MARK_WRITERS):
        token = old.token[i]
        until = old.until_ms[i]
        if token == 0 or until <= now:
            continue
        if n < MARK_WRITERS and not dead(s, token):
            new.token[n] = token
            new.until_ms[n] = until
            n += 1
        else:
            new.given_up_ms = max(new.given_up_ms, until)
    #! mark: inherited

cdef inline uint64_t mark_until(mark_t* m, int but) noexcept nogil:
    """When it need not stand any more, if it were not for that writer."""
    cdef uint64_t until = m.given_up_ms
    cdef int i
    for i in range(MARK_WRITERS):
        if i != but and m.token[i]:
            until = max(until, m.until_ms[i])
    return until

cdef inline bint waits_for_others(seg_t* s, put_t* op, mark_t* m) noexcept nogil:
    """Has this mark to wait for those that the one which stands names?"""
    cdef int n
    living_writers(s, m, &n)
    return n >= MARK_WRITERS or (n > 0 and (op.when == IF_UNMARKED_BY_ANY or m.alone))

cdef inline int allowed(seg_t* s, put_t* op, found_t* f) noexcept nogil:
    cdef bint present = f.slot != NULL and f.live
    op.was_live = present
    op.unstored = f.slot != NULL and ld8r(&item_at(s, f.addr).flags) & FLAG_DIRTY
    if unlikely(op.unstored) and op.loaded:
        return EXISTS           # what was loaded is older, and a claim would take a tombstone's place
    if op.flags & FLAG_WRITING:
        op.overlapped = f.slot != NULL and ld8r(&item_at(s, f.addr).flags) & FLAG_WRITING
        if op.version and not (f.slot != NULL and (present or (f.claimed and (op.overlapped or my_claim(s, f.addr, op.key_bytes)))) and
                               ld64(&item_at(s, f.addr).cas) == op.version and item_at(s, f.addr).epoch == f.epoch):
            return MISMATCH         # at once: whatever comes of the mark that may stand there, that version does not come back
        if op.overlapped and f.claimed and waits_for_others(s, op, of_mark(s, f.addr, op.key_bytes)):
            return EXISTS
        return OK
    if op.when == IF_ABSENT:
        return EXISTS if present else OK
    if op.when == ALWAYS:
        return OK
    if op.when == RESTORED:
        if not ld32(&s.header.restoring):       # somebody else has finished it: nothing departs with a mark any more
            return MISMATCH
        # a stale item, too, is newer than what is restored. What is dirty is put in before anything that is may depart
        return EXISTS if f.slot != NULL or (departed(s, op.hash) and not (op.flags & FLAG_DIRTY and ld32(&s.header.restoring) == NAMESPACES_FIRST)) else OK
    if op.when == IF_UNCLAIMED:
        return EXISTS if present or (f.slot != NULL and f.claimed) else OK
    if op.when == IF_CLAIM:
        if f.slot == NULL or not f.claimed or ld64(&item_at(s, f.addr).cas) != op.version:
            return MISMATCH
        return OK if op.flags & FLAG_CLAIM or my_claim(s, f.addr, op.key_bytes) else MISMATCH     # a claim on a claim: the dead's is taken over
    if op.when == IF_SAME:      # it may have expired meanwhile: who deletes, sets or clears it takes the item or its epoch away
        return OK if f.slot != NULL and not f.claimed and f.state != STATE_GONE and ld64(&item_at(s, f.addr).cas) == op.version and \
            (op.unstored or item_at(s, f.addr).epoch == f.epoch) else MISMATCH
    if not present:
        return ABSENT
    if op.when == IF_VERSION and ld64(&item_at(s, f.addr).cas) != op.version:
        return MISMATCH
    return OK

cdef inline void make_generation(seg_t* s, put_t* op) noexcept nogil:
    """The stripe is held, no slot names the item yet: store the random bytes XOR the write's version, which no other write of the key has. So
    who goes on with a write after a fork, parent or child, does not store what the other stores."""
    memcpy(&op.generation, op.value, 8)
    op.generation ^= op.cas
    op.value = <const uint8_t*>&op.generation       # what is logged
    memcpy(<uint8_t*>item_at(s, op.chunk) + value_offset(op.key_bytes), op.value, 8)
    #! put: generation made

cdef inline int put(seg_t* s, put_t* op, uint64_t until_ns) noexcept nogil:
    """Store an item: OK, or EXISTS / ABSENT / MISMATCH by op.when; BUSY and INTR keep the chunk: call again, or give_up."""
    cdef uint64_t b = bucket_of(s, op.hash), old, count
    cdef stripe_t* st = stripe_of(s, b)
    cdef item_t* it
    cdef found_t f
    cdef bint tallied, same_key
    cdef int rc
    if unlikely(passes_by(s, op.key)) and not op.loaded:
        return NO_STORE
    if unlikely(writes_back(s, op.key)) and not op.loaded:
        op.flags |= FLAG_DIRTY
    prefetch(&s.buckets[b])
    if op.expiry_ms:
        prefetch(&st.turn)          # it is counted, most likely
    if op.chunk == 0:
        rc = reserve(s, op, until_ns)
        if rc != OK:
            return rc
    it = item_at(s, op.chunk)
    rc = stripe_take(s, st, until_ns + op.copied_ns if until_ns else 0)     # 3
    if rc != OK:
        return rc
    find_locked(s, b, op.key, op.key_bytes, op.hash, &f)
    #! put: found
    same_key = f.slot != NULL
    rc = allowed(s, op, &f)
    if rc == OK and f.slot == NULL:
        rc = place_locked(s, op, b, &f, until_ns)
    elif rc == OK:
        st8r(refs_of(s, op.chunk), ld8r(refs_of(s, f.addr)))        # a key keeps its count
    if unlikely(op.when == RESTORED) and rc == OK and f.epoch != op.epoch and not op.flags & FLAG_DIRTY:
        rc = MISMATCH
    if rc != OK:
        stripe_release(s, st)
        return rc
    #! put: placed
    count = count_at(st, f.epoch)
    old = f.addr
    if old and unlikely(ld32(&s.header.restoring)) and ld64(&item_at(s, old).hash) != op.hash:
        depart_with(s, old, OP_EVICT)
    it.epoch = f.epoch
    if unlikely(op.flags & FLAG_WRITING) and op.overlapped and f.claimed:
        inherit_mark(s, of_mark(s, op.chunk, op.key_bytes), of_mark(s, f.addr, op.key_bytes))
        it.expiry_ms = mark_until(of_mark(s, op.chunk, op.key_bytes), -1)
        #! mark: time
    op.cas = st.seq + 1 if likely(op.when != RESTORED) else op.version
    st64(&it.cas, op.cas)
    #! put: cas
    if unlikely(op.flags & FLAG_DIRTY):
        dirty_placed(s, op.chunk, old)
    if unlikely(op.key[0] == 0) and op.value_bytes == 8:
        if op.drawn == MADE:
            make_generation(s, op)
        # no item carries it yet: while a segment is restored nobody is in it; a fork child holds nothing
        note_newest(s, op.key, op.key_bytes, op.value, f.epoch, op.drawn == MADE or (op.drawn == FRESH and holds(s, st)) or
                    (op.when == RESTORED and ld32(&s.header.restoring) == NAMESPACES_FIRST))
    tallied = changes_tally(s, old, op.chunk, same_key) and tally_begin(st)
    note_intent(st, OP_SET, old, op.chunk, (count_without(s, count, old) if old else count) + 1)     # 4
    if old:
        st64(&item_at(s, old).word, word_of(RETIRED, s.me[0]))      # 5
        #! put: old RETIRED
    st64(f.slot, slot_word(op.hash, op.chunk))                      # 6
    #! put: slot stored
    bump(s, b)                                                      # 7
    #! put: version
    if unlikely(op.log.bytes != 0):                                 # 8
        log_op(s, &op.log, RECORD_SET, st - s.stripes, op.cas, it, op.key, op.key_bytes, op.value, op.value_bytes)
    if op.is_big:
        big_seal_locked(s, op.chunk, op.key_bytes, op.big.n_pages)
    st64(&it.word, word_of(LIVE, 0))                                # 9
    #! put: LIVE
    if likely(op.cas > st.seq):
        st64(&st.seq, op.cas)                                       # 10
    #! put: seq
    st64(&st.count, st.count_next)
    #! put: count
    if tallied:
        if old:
            tally(s, st, old, f.epoch, False)
        tally(s, st, op.chunk, f.epoch, True)
        tally_end(st)
    op.chunk = 0
    stripe_release(s, st)                                              # 11
    #! put: released
    if old:
        free_old(s, old, until_ns)                                  # 12
    return OK

cdef inline int remove(seg_t* s, const uint8_t* key, size_t n, uint64_t h, uint64_t version, bint only_expired,
                       log_t* log, uint64_t until_ns) noexcept nogil:
    """Take a key out: OK, ABSENT, or MISMATCH if version is given (not 0) and is another; BUSY, INTR.

    only_expired: what get does with what it found expired, or (version: its) hidden for good; whoever replaced the item meanwhile wins. log: NULL, or what is secured for it;
    then an absent key's delete takes a version, too: a log may hold an older value that was evicted here. The version first, so that no
    other write gets it if this process dies in between.
    """
    cdef uint64_t b = bucket_of(s, h)
    cdef stripe_t* st = stripe_of(s, b)
    cdef found_t f
    cdef int rc = stripe_take(s, st, until_ns)
    if rc != OK:
        return rc
    find_locked(s, b, key, n, h, &f)
    #~ remove: found
    if f.slot != NULL and unlikely(ld8r(&item_at(s, f.addr).flags) & FLAG_DIRTY):
        stripe_release(s, st)       # only a newer value takes its place
        return ABSENT
    if f.slot != NULL and unlikely(ld8r(&item_at(s, f.addr).flags) & FLAG_WRITING) and f.claimed:
        if not only_expired:        # the mark stays, and whoever's it is fills no more: what he has stored may be older than this
            note_intent(st, OP_TOUCH, f.addr, 0, st.count)
            st64(&item_at(s, f.addr).cas, st.seq + 1)
            #! mark: voided
            st64(&st.seq, st.seq + 1)
            #! mark: voided, seq
        stripe_release(s, st)
        return ABSENT
    if unlikely(ld32(&s.header.restoring)) and not only_expired and not version:
        depart(s, h)
    if f.slot == NULL or (only_expired and f.live):
        rc = ABSENT
    elif f.state != STATE_FRESH and not f.live and (only_expired or version) and ld64(&item_at(s, f.addr).cas) != version:
        f.slot = NULL
        rc = ABSENT
    elif not f.live:
        if not only_expired or not f.claimed:       # a delete takes a claim away: what is being computed may be old
            remove_locked(s, st, b, f.slot, f.addr, OP_DELETE if f.claimed else OP_EVICT, log)
        else:
            f.slot = NULL
        rc = ABSENT
    elif version and ld64(&item_at(s, f.addr).cas) != version:
        f.slot = NULL
        rc = MISMATCH
    else:
        remove_locked(s, st, b, f.slot, f.addr, OP_DELETE, log)
        rc = OK
    if only_expired and f.live:
        f.slot = NULL
    if unlikely(log != NULL) and rc == ABSENT and not only_expired and log.bytes and log.end == 0:
        st64(&st.seq, st.seq + 1)
        #! remove: version of an absent key
        log_op(s, log, RECORD_DELETE, st - s.stripes, st.seq, NULL, key, n, NULL, 0)
    stripe_release(s, st)
    if f.slot != NULL:
        if not f.claimed:
            add64(&s.row.deletes if rc == OK else &s.row.expired, 1)
        free_old(s, f.addr, until_ns)
    return rc

cdef inline int remove_claim(seg_t* s, const uint8_t* key, size_t n, uint64_t h, uint64_t version, uint64_t until_ns) noexcept nogil:
    """Take exactly this claim, of this process, away: OK, MISMATCH, BUSY or INTR."""
    cdef uint64_t b = bucket_of(s, h)
    cdef stripe_t* st = stripe_of(s, b)
    cdef found_t f
    cdef int rc = stripe_take(s, st, until_ns)
    if rc != OK:
        return rc
    find_locked(s, b, key, n, h, &f)
    rc = OK if f.slot != NULL and f.claimed and ld64(&item_at(s, f.addr).cas) == version and my_claim(s, f.addr, n) else MISMATCH
    if rc == OK:
        remove_locked(s, st, b, f.slot, f.addr, OP_EVICT, NULL)
    stripe_release(s, st)
    if rc == OK:
        free_old(s, f.addr, until_ns)
    return rc

cdef inline int end_mark(seg_t* s, const uint8_t* key, size_t n, uint64_t h, bint known, uint64_t until_ns) noexcept nogil:
    """A writer who has put a mark here ends: the last takes it away. Not known: what the store has done; then it stands till his time is
    over, and nobody waits for it. OK, ABSENT (it does not name this process), BUSY or INTR.

    Crash: till his name is off as if he had not ended; then, till its time is set, it stands longer than it need, and nobody waits for it.
    """
    cdef uint64_t b = bucket_of(s, h), until
    cdef stripe_t* st = stripe_of(s, b)
    cdef found_t f
    cdef mark_t* m
    cdef int i, at = -1
    cdef bint gone = False
    cdef int rc = stripe_take(s, st, until_ns)
    if rc != OK:
        return rc
    find_locked(s, b, key, n, h, &f)
    if f.slot != NULL and f.claimed and ld8r(&item_at(s, f.addr).flags) & FLAG_WRITING:
        m = of_mark(s, f.addr, n)
        for i in range(MARK_WRITERS):   # of this process's threads any: the first to be over
            if m.token[i] == s.me[0] and (at < 0 or m.until_ms[i] < m.until_ms[at]):
                at = i
    rc = ABSENT if at < 0 else OK
    if at >= 0:
        until = mark_until(m, at)
        if not known:
            until = max(until, m.until_ms[at])
            st64(&m.given_up_ms, max(m.given_up_ms, m.until_ms[at]))
            #! end mark: given up
        gone = until <= now_ms(s)
        if gone:
            remove_locked(s, st, b, f.slot, f.addr, OP_EVICT, NULL)
        else:
            st64(&m.token[at], 0)
            #! end mark: name off
            st64(&item_at(s, f.addr).expiry_ms, until)
            #! end mark: time
    stripe_release(s, st)
    if gone:
        free_old(s, f.addr, until_ns)
    return rc

cdef inline int hold_mark(seg_t* s, const uint8_t* key, size_t n, uint64_t h, uint64_t until_ns) noexcept nogil:
    """Whoever wants to write this key waits from now on for all whom its mark names: OK, ABSENT (there is no mark), BUSY or INTR."""
    cdef uint64_t b = bucket_of(s, h)
    cdef stripe_t* st = stripe_of(s, b)
    cdef found_t f
    cdef int rc = stripe_take(s, st, until_ns)
    if rc != OK:
        return rc
    find_locked(s, b, key, n, h, &f)
    if f.slot != NULL and f.claimed and ld8r(&item_at(s, f.addr).flags) & FLAG_WRITING:
        st64(&of_mark(s, f.addr, n).alone, 1)
    else:
        rc = ABSENT
    stripe_release(s, st)
    return rc

cdef inline int read_claim(seg_t* s, const uint8_t* key, size_t n, uint64_t h, uint64_t* version, claim_t* whose,
                           uint8_t* flags) noexcept nogil:
    """Whose claim is on this key? OK: a value is there. EXISTS: a claim (of a mark: the token of one of its living writers, or 0). ABSENT:
    neither. AGAIN."""
    cdef read_t r
    cdef uint64_t* at
    cdef uint32_t stale_ms
    cdef int n_living
    cdef int rc = read_begin(s, key, n, h, &r)
    if unlikely(rc == OK and r.codec == CODEC_ENVELOPE):
        rc = state_in_place(s, &r, False, &stale_ms)
        return OK if rc == STATE_FRESH or rc == STATE_DAMAGED else AGAIN if rc == AGAIN else ABSENT
    if rc != ABSENT or not r.claimed or r.value_bytes != claim_bytes(r.flags):
        return rc
    at = <uint64_t*>(<uint8_t*>item_at(s, r.addr) + value_offset(n))
    flags[0] = r.flags
    version[0] = r.cas
    whose.token = living_writers(s, <mark_t*>at, &n_living) if r.flags & FLAG_WRITING else ld64r(&at[0])
    whose.thread = ld64r(&at[1])
    whose.owner = ld64r(&at[2])
    return EXISTS if unchanged(&r) or same_item(s, &r) else AGAIN

cdef inline int add_to(seg_t* s, const uint8_t* key, size_t n, uint64_t h, int64_t by, int64_t* out,
                       log_t* log, uint64_t until_ns) noexcept nogil:
    """Change a counter in place: OK, ABSENT, NOT_INT, OVERFLOW, BUSY or INTR.

    Value, then cas: gets() loads cas first, so no version covers a value it has not got. Crash between: repair counts the
    version up (TOUCH).
    """
    cdef uint64_t b = bucket_of(s, h)
    cdef stripe_t* st = stripe_of(s, b)
    cdef found_t f
    cdef item_t* it
    cdef int64_t* at
    cdef int64_t was
    cdef int rc = NO_STORE if unlikely(passes_by(s, key)) else stripe_take(s, st, until_ns)
    if rc != OK:
        return rc
    find_locked(s, b, key, n, h, &f)
    if f.slot == NULL or not f.live:
        rc = ABSENT
    else:
        it = item_at(s, f.addr)
        at = <int64_t*>(<uint8_t*>it + value_offset(n))
        if it.codec != CODEC_INT or it.value_bytes != 8 or it.flags & FLAG_BIG or value_offset(n) + 8 > page_room(s, f.addr):
            rc = NOT_INT
        else:
            was = at[0]
            if (by > 0 and was > <int64_t>0x7fffffffffffffff - by) or (by < 0 and was < -<int64_t>0x7fffffffffffffff - 1 - by):
                rc = OVERFLOW
            else:
                #~ incr: found
                out[0] = was + by
                if unlikely(writes_back(s, key)):
                    dirty_in_place(s, f.addr)
                note_intent(st, OP_TOUCH, f.addr, 0, st.count)
                st64(<uint64_t*>at, <uint64_t>(was + by))
                #! incr: value
                st64(&it.cas, st.seq + 1)
                #! incr: cas
                log_op(s, log, RECORD_SET, st - s.stripes, st.seq + 1, it, key, n, <uint8_t*>at, 8)
                st64(&st.seq, st.seq + 1)
                #! incr: seq
    stripe_release(s, st)
    return rc

cdef inline int set_expiry(seg_t* s, const uint8_t* key, size_t n, uint64_t h, uint64_t expiry_ms, bint copy_ttl,
                           log_t* log, uint64_t until_ns) noexcept nogil:
    """Change when an item expires, in place (of an envelope: when it is fresh no more): OK, ABSENT, BUSY or INTR. copy_ttl: in write-back
    it is the copy's time, not that of what is stored.

    Expiry, then FLAG_COPY_TTL, then cas, all behind the intent, for who flushes looks at that last: the copy's time under no such flag
    would go to the store, where the value would expire with it.
    """
    cdef uint64_t b = bucket_of(s, h)
    cdef stripe_t* st = stripe_of(s, b)
    cdef found_t f
    cdef item_t* it
    cdef bint tallied
    cdef int rc = NO_STORE if unlikely(passes_by(s, key)) else stripe_take(s, st, until_ns)
    if rc != OK:
        return rc
    find_locked(s, b, key, n, h, &f)
    if f.slot == NULL or not f.live:
        rc = ABSENT
    else:
        #~ touch: found
        it = item_at(s, f.addr)
        if unlikely(writes_back(s, key)):
            dirty_in_place(s, f.addr)
        tallied = expires(it) != (expiry_ms != 0) and tally_begin(st)
        note_intent(st, OP_TOUCH, f.addr, 0, st.count)
        if tallied:
            tally(s, st, f.addr, f.epoch, False)
        st64(&it.expiry_ms, expiry_ms + f.stale_ms if expiry_ms else 0)
        #! touch: expiry
        if tallied:
            tally(s, st, f.addr, f.epoch, True)
            tally_end(st)
        if unlikely(writes_back(s, key)):
            st8r(&it.flags, (it.flags & ~FLAG_COPY_TTL) | (FLAG_COPY_TTL if copy_ttl else 0))
            #! touch: whose time
        st64(&it.cas, st.seq + 1)
        #! touch: cas
        log_op(s, log, RECORD_EXPIRY, st - s.stripes, st.seq + 1, it, key, n, NULL, 0)
        st64(&st.seq, st.seq + 1)
        #! touch: seq
    stripe_release(s, st)
    return rc

# ---- write-back (dirty.pxd) -------------------------------------------------------------------------------------------------

cdef inline int mark_clean(seg_t* s, const uint8_t* key, size_t n, uint64_t h, uint64_t version, uint64_t until_ns) noexcept nogil:
    """The store has this version of a key, or a newer one: OK; MISMATCH: there is a newer one here; BUSY, INTR. A tombstone goes, and what was
    restored and has the version of then: if the store has a newer one, that is to be loaded."""
    cdef uint64_t b = bucket_of(s, h)
    cdef stripe_t* st = stripe_of(s, b)
    cdef found_t f
    cdef item_t* it
    cdef bint goes = False
    cdef int rc = stripe_take(s, st, until_ns)
    if rc != OK:
        return rc
    find_locked(s, b, key, n, h, &f)
    rc = MISMATCH
    if f.slot != NULL:
        it = item_at(s, f.addr)
        if it.flags & FLAG_DIRTY and it.cas == version:
            rc = OK
            st8(&it.flags, it.flags & ~FLAG_DIRTY)
            #! clean: flag
            dirty_clear(s, f.addr)      # behind it: who dies between leaves a bit too many
            #! clean: bit
            dirty_gone(s, f.addr)
            goes = f.state == STATE_NEGATIVE or version <= s.header.restored_seq
            if goes:
                remove_locked(s, st, b, f.slot, f.addr, OP_EVICT, NULL)
    stripe_release(s, st)
    if goes:
        free_old(s, f.addr, until_ns)
    return rc

cdef inline int drop_dirty(seg_t* s, const uint8_t* key, size_t n, uint64_t h, uint64_t version, log_t* log, uint64_t until_ns) noexcept nogil:
    """Take a dirty item of this version out, which the store then never has: OK; MISMATCH: it has another one, or is stored; BUSY, INTR.

    log: NULL, or what is secured for it. Crash: as of a delete; behind it a bit too many is set, and too much counted.
    """
    cdef uint64_t b = bucket_of(s, h)
    cdef stripe_t* st = stripe_of(s, b)
    cdef found_t f
    cdef int rc = stripe_take(s, st, until_ns)
    if rc != OK:
        return rc
    find_locked(s, b, key, n, h, &f)
    rc = MISMATCH
    if f.slot != NULL and ld8r(&item_at(s, f.addr).flags) & FLAG_DIRTY and ld64(&item_at(s, f.addr).cas) == version:
        rc = OK
        remove_locked(s, st, b, f.slot, f.addr, OP_DELETE, log)
        dirty_clear(s, f.addr)
        #! drop: bit
        dirty_gone(s, f.addr)
    stripe_release(s, st)
    if rc == OK:
        free_old(s, f.addr, until_ns)
    return rc

cdef inline int renew_dirty(seg_t* s, const uint8_t* key, size_t n, uint64_t h, uint64_t first, uint64_t last, uint64_t above, uint64_t until_ns) noexcept nogil:
    """Give a dirty item whose version is one of first to last a new one, above that: OK; MISMATCH: it has another one, or is stored; BUSY, INTR.

    It is not logged: if all dies before the row has the new version, what is restored has the old one, and meets the same row. Crash between
    the stores: as of a touch, repair counts the version up, from the higher of the two.
    """
    cdef uint64_t b = bucket_of(s, h), new
    cdef stripe_t* st = stripe_of(s, b)
    cdef found_t f
    cdef int rc = stripe_take(s, st, until_ns)
    if rc != OK:
        return rc
    find_locked(s, b, key, n, h, &f)
    rc = MISMATCH
    if f.slot != NULL and ld8r(&item_at(s, f.addr).flags) & FLAG_DIRTY and first <= ld64(&item_at(s, f.addr).cas) <= last:
        rc = OK
        new = max(st.seq, above) + 1
        note_intent(st, OP_TOUCH, f.addr, 0, st.count)
        st64(&item_at(s, f.addr).cas, new)
        #! renew: cas
        st64(&st.seq, new)
        #! renew: seq
    stripe_release(s, st)
    return rc

cdef inline int go_above(seg_t* s, stripe_t* st, uint64_t version, uint64_t until_ns) noexcept nogil:
    """What comes in this stripe has higher versions than that: OK, BUSY or INTR."""
    cdef int rc = OK
    if ld64(&st.seq) < version:
        rc = stripe_take(s, st, until_ns)
        if rc == OK:
            st64(&st.seq, max(st.seq, version))
            #! go above: seq
            stripe_release(s, st)
    return rc

cdef inline int dirty_at(seg_t* s, uint64_t addr, uint8_t* key, size_t* n, uint64_t until_ns) noexcept nogil:
    cdef item_t* it = item_at(s, addr)
    cdef uint64_t h = ld64(&it.hash)
    cdef stripe_t* st = stripe_of(s, bucket_of(s, h))
    cdef bint dirty
    cdef int rc = stripe_take(s, st, until_ns)
    if rc != OK:
        return rc
    dirty = slot_naming(s, bucket_of(s, h), addr) != NULL and ld64(&it.hash) == h and ld64(&it.word) == word_of(LIVE, 0) and \
        ld8r(&it.flags) & FLAG_DIRTY
    if dirty:
        n[0] = ld16r(&it.key_bytes)
        dirty = 0 < n[0] <= 4096 and 48 + n[0] <= page_room(s, addr)
        if dirty:
            memcpy(key, <uint8_t*>it + 48, n[0])
    stripe_release(s, st)
    return OK if dirty else ABSENT

cdef inline int find_dirty(seg_t* s, uint64_t at, uint8_t* key, size_t* n, uint64_t until_ns) noexcept nogil:
    """Is there a dirty item where this bit is set? OK, and its key; or ABSENT and the bit is cleared; BUSY, INTR."""
    cdef uint64_t addr = dirty_chunk(s, at)
    cdef int rc = dirty_at(s, addr, key, n, until_ns) if addr else ABSENT
    if rc == ABSENT:
        dirty_clear(s, s.slab_lo + (at << 3))
        #! find dirty: bit cleared
        addr = dirty_chunk(s, at)                       # who set it before is seen now; who sets it later sets it
        rc = dirty_at(s, addr, key, n, until_ns) if addr else ABSENT
        if rc != ABSENT:
            dirty_set(s, addr)
    return rc

# ---- the whole table, cheaply --------------------------------------------------------------------------------------------------

cdef inline uint64_t count_items(seg_t* s) noexcept nogil:
    """Items of this epoch; some may have expired. Not one instant: a sum over stripes."""
    cdef uint32_t i
    cdef uint64_t total = 0, c, epoch = ld32(&s.header.epoch)
    for i in range(s.n_stripes):
        c = ld64(&s.stripes[i].count)
        if c >> 32 == (s.held_epoch if unlikely(s.holder != 0) and holds(s, &s.stripes[i]) else epoch):
            total += <uint32_t>c
    return total

cdef inline bint nothing_counted(seg_t* s, uint32_t epoch, uint64_t* written) noexcept nogil:
    """Was each stripe empty when it was looked at? written: the sum of their versions, which every write raises, then."""
    cdef uint32_t i
    cdef uint64_t busy, count
    written[0] = 0
    for i in range(s.n_stripes):
        written[0] += ld64(&s.stripes[i].seq)       # first: a write that came since is counted, or is seen under way
        busy = ld64(&s.stripes[i].new)      # then: an item may be in its slot and not yet counted, and is counted before new is cleared
        count = ld64(&s.stripes[i].count)
        if busy or (count >> 32 == epoch and <uint32_t>count):
            return False
        #~ clear: stripe looked at
    return True

cdef inline void clear_all(seg_t* s) noexcept nogil:
    """Everything stored before is gone: O(1), by a new epoch. Of two at once one suffices, and none if there is nothing.

    That takes two looks, since an item may be stored behind the first while another goes before it (as RENAME does): each stripe was empty at the first,
    and had no write before the second, so all were when the first was over.
    """
    cdef uint32_t e = ld32(&s.header.epoch)
    cdef uint64_t before, after
    cdef bint empty = False
    # else there is more to clear than is counted: what is to be restored, what was evicted and is in the log
    if not ld32(&s.header.restoring) and (s.ring_bytes == 0 or ld64(&s.header.log_policy) == 0):
        empty = nothing_counted(s, e, &before) and nothing_counted(s, e, &after) and before == after
    #~ clear: counted
    if not empty:
        cas32(&s.header.epoch, e, e + 1)
        #! clear: epoch
    # nothing is counted with the newest epoch, but what this thread holds may have an older one
    if unlikely(s.holder != 0) and s.holder == pthread_self():
        s.held_epoch = ld32(&s.header.epoch)

cdef inline int next_keys(seg_t* s, uint64_t b, bint first, uint8_t* to, uint32_t room, uint32_t* used, uint64_t until_ns) noexcept nogil:
    """The keys of one chain at one instant, each as u16 length + bytes: OK, NO_ROOM (a larger buffer), BUSY or INTR. first: all that are counted
    as the first database's (databases.pxd), those of claims, of what has expired and of what is hidden, too."""
    cdef stripe_t* st = stripe_of(s, b)
    cdef int tries, rc
    cdef uint32_t v
    for tries in range(RESTARTS):
        v = ld32(&s.buckets[b].version)
        rc = copy_keys(s, b, first, to, room, used)
        #~ keys: copied
        fence_acquire()
        if ld32r(&s.buckets[b].version) == v:
            return rc
    rc = stripe_take(s, st, until_ns)
    if rc == OK:
        rc = copy_keys(s, b, first, to, room, used)
        stripe_release(s, st)
    return rc

cdef inline int copy_keys(seg_t* s, uint64_t b, bint first, uint8_t* to, uint32_t room, uint32_t* used) noexcept nogil:
    cdef chain_t c
    cdef uint64_t addr, klen, now = now_ms(s)       # before any expiry
    cdef uint32_t epoch = epoch_of(s, stripe_of(s, b))  # once: these are the keys of one instant
    cdef item_t* it
    cdef int i
    used[0] = 0
    #! scan: clock
    chain_first(s, b, &c)
    while True:
        for i in range(c.n_slots):
            addr = ld64(&c.slot[i]) & ADDR_MASK
            if not in_slab(s, addr):
                continue
            it = item_at(s, addr)
            klen = ld16r(&it.key_bytes)
            if klen == 0 or klen > 4096 or 48 + klen > page_room(s, addr):
                continue
            if first:
                if it.epoch != epoch or is_others(<uint8_t*>it + 48, klen):
                    continue
            elif over(it, ld64(&it.expiry_ms), now, epoch) or ld8r(&it.flags) & FLAG_CLAIM:
                continue
            elif unlikely(ld8r(&it.codec) == CODEC_ENVELOPE) and hidden_at(s, addr, klen, now):
                continue
            if used[0] + 2 + klen > room:
                return NO_ROOM
            to[used[0]] = klen & 0xff
            to[used[0] + 1] = <uint8_t>(klen >> 8)
            memcpy(to + used[0] + 2, <uint8_t*>it + 48, klen)
            used[0] += <uint32_t>klen + 2
        if not chain_next(s, &c):
            return OK
