# The append log's way out of a process: one ring of records per process row, drained by the supervisor into files.
#
# Invariants
#   a ring has one producer, the process that holds its row (its threads by a private lock), and one consumer, the supervisor
#   head moves behind whole records only, under the stripe, after the slot store; drained <= head <= drained + ring_bytes
#   what is between head and a dead producer's last store does not exist; his successor in the row goes on at head
#   no thread waits for room, or for durability, while it holds a lock: room is secured before the stripe is taken (ring_secure). A thread that
#   takes several stripes keeps room for the records of all its writes there, each without its value, until it lets go of them (seg_t.held_room).
#   What an operation has taken of it and does not use goes back there
#   a record's version is its stripe's sequence: order is the version, never the place
#
# Race table
#   append vs drain            head is stored behind the record (release) and loaded before it (acquire)
#   two threads append         the private lock; it is held for a copy, and dies with them. The loser sleeps, so that its holder gets the CPU
#   secure vs append           reserved goes down after head has gone up: between them the room counts twice, and is refused, never given twice
#   drainer dies               drained stands: the records come again, with the same versions, which is harmless
# Crash: before head: the record does not exist; who repairs the stripe logs what he finishes. Behind it: it counts.
#
# A value of over an eighth of the ring is not copied. Nor is a value that a thread with several stripes writes while the ring has no room for it:
# the thread may not wait, and has kept room for records without values. REF says which version of which key the drainer is to fetch from the
# table. If it has been replaced by then the newer one is logged, under its version; if it is gone, a DELETE under the version of the REF: it was
# deleted after it, which may not be durable yet, or evicted, and then a miss is allowed. Never an older value.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from shmcache.core.atomics cimport add64, cas64, ld32, ld64, ldi64r, prefetch_w, st64, sub64
from shmcache.core.layout cimport FLAG_COPY_TTL, FLAG_DIRTY, item_t, ring_t, seg_t
from shmcache.core.lock cimport shm_ring, shm_sleep
from shmcache.core.record cimport RECORD_COPY_TTL, RECORD_DELETE, RECORD_DIRTY, RECORD_EXPIRY, RECORD_REF, RECORD_SET, record_t
from shmcache.core.token cimport BUSY, INTR, OK, mono_ns, wall_ms

cdef extern from *:
    """
    #include <linux/futex.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    /* Of this process's threads: 0 free, 1 taken, 2 taken and somebody sleeps. Who does not get it at once sleeps, so that its holder runs,
       whatever the two threads' scheduling classes are; it is held for a copy, so nobody is asked whether it lives. */
    static inline void shm_latch(uint32_t *l) {
        uint32_t free_ = 0;
        int i;
        for (i = 0; i < 100; i++) {
            if (__atomic_compare_exchange_n(l, &free_, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return;
            free_ = 0;
            cpu_pause();
        }
        while (__atomic_exchange_n(l, 2, __ATOMIC_ACQUIRE))
            syscall(SYS_futex, l, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, 2, NULL, NULL, 0);
    }
    static inline void shm_unlatch(uint32_t *l) {
        if (__atomic_exchange_n(l, 0, __ATOMIC_RELEASE) == 2)
            syscall(SYS_futex, l, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, NULL, NULL, 0);
    }
    """
    void latch "shm_latch"(uint32_t* l) noexcept nogil
    void unlatch "shm_unlatch"(uint32_t* l) noexcept nogil

cdef enum:
    RING_SLICE_NS = 16000000
    RING_SPARE = 16384      # bytes that only repairs may use: several, each a key and a header at most

ctypedef struct log_t:
    uint64_t bytes          # secured for this operation; 0: it is not logged
    bint kept               # these bytes are of seg_t.held_room: an operation that logs nothing gives them back to it
    uint64_t end            # out: head behind its record; 0: there was none
    uint64_t token          # of the process that secured it: a fork child's ring is another one

cdef inline ring_t* ring_of(seg_t* s, uint32_t row) noexcept nogil:
    return <ring_t*>(s.rings + row * (sizeof(ring_t) + s.ring_bytes))

cdef inline uint64_t record_room(seg_t* s, uint64_t key_bytes, uint64_t value_bytes) noexcept nogil:
    """Bytes of a ring that a record takes."""
    if value_bytes > s.ring_bytes >> 3:
        value_bytes = 0
    return (sizeof(record_t) + key_bytes + value_bytes + 7) & ~<uint64_t>7

cdef inline bint ring_secure(seg_t* s, uint64_t n) noexcept nogil:
    """Keep room for a record in this process's ring: False: there is none now."""
    cdef ring_t* ring = ring_of(s, s.row_idx)
    cdef uint64_t kept
    while True:
        kept = ld64(&s.ring_reserved)
        if ld64(&ring.head) + kept + n > ld64(&ring.drained) + s.ring_bytes - RING_SPARE:
            return False
        if cas64(&s.ring_reserved, kept, kept + n):
            # once more: head may have moved while others gave back as much as they took
            if ld64(&ring.head) + ld64(&s.ring_reserved) <= ld64(&ring.drained) + s.ring_bytes - RING_SPARE:
                return True
            sub64(&s.ring_reserved, n)
            return False

cdef inline void ring_release(seg_t* s, log_t* log) noexcept nogil:
    """The operation is over, logged or not."""
    if log.bytes and log.token == s.me[0]:
        if log.kept and log.end == 0:       # no record was made: the step has the room for another
            s.held_room += log.bytes
        else:
            sub64(&s.ring_reserved, log.bytes)
    log.bytes = 0

cdef inline bint take_kept(seg_t* s, log_t* log, uint64_t n) noexcept nogil:
    """Room for a record from what this thread has kept for its step: False: it is not as much. It stays reserved."""
    if s.held_room < n:
        return False
    s.held_room -= n
    log.bytes = n
    log.kept = True
    return True

cdef inline void wake_drainer(seg_t* s) noexcept nogil:
    if ld64(&s.header.log_asleep) and cas64(&s.header.log_asleep, 1, 0):
        shm_ring(&s.header.log_bell)

cdef inline int ring_wait(seg_t* s, uint64_t n, uint64_t end, uint64_t until_ns) noexcept nogil:
    """Till n bytes are secured (n), or the ring is durable up to end: OK, BUSY (till then it was not), INTR. No lock is held."""
    cdef ring_t* ring = ring_of(s, s.row_idx)
    cdef uint64_t now
    cdef uint32_t bell
    while True:
        bell = ld32(&ring.bell)     # before the look: who changes it afterwards rings
        if ring_secure(s, n) if n else ld64(&ring.durable) >= end:
            return OK
        now = mono_ns()
        if now >= until_ns:
            return BUSY
        wake_drainer(s)
        if shm_sleep(&ring.bell, bell, min(until_ns - now, <uint64_t>RING_SLICE_NS)) == 2:
            return INTR

cdef inline void ring_copy(seg_t* s, ring_t* ring, uint64_t at, const uint8_t* what, uint64_t n) noexcept nogil:
    cdef uint8_t* data = <uint8_t*>ring + sizeof(ring_t)
    cdef uint64_t place = at & (s.ring_bytes - 1)
    cdef uint64_t first = min(n, s.ring_bytes - place)
    memcpy(data + place, what, first)
    memcpy(data, what + first, n - first)

cdef inline uint64_t ring_append(seg_t* s, record_t* r, const uint8_t* key, const uint8_t* value, uint64_t value_bytes) noexcept nogil:
    """Under the stripe, the room secured: head behind the record."""
    cdef ring_t* ring = ring_of(s, s.row_idx)
    cdef uint64_t at
    cdef int i
    #~ ring: to be latched
    latch(&s.ring_lock)
    at = (ld64(&ring.head) + 7) & ~<uint64_t>7     # as it is, but for damage
    ring_copy(s, ring, at, <uint8_t*>r, sizeof(record_t))
    ring_copy(s, ring, at + sizeof(record_t), key, r.key_bytes)
    ring_copy(s, ring, at + sizeof(record_t) + r.key_bytes, value, value_bytes)
    #! ring: record copied
    at += (sizeof(record_t) + r.key_bytes + value_bytes + 7) & ~<uint64_t>7
    st64(&ring.head, at)
    unlatch(&s.ring_lock)
    for i in range(5):      # where the next record goes: the drainer's core has read these lines
        prefetch_w(<uint8_t*>ring + sizeof(ring_t) + ((at + 64 * <uint64_t>i) & (s.ring_bytes - 1)))
    #! ring: head
    return at

cdef inline void log_op(seg_t* s, log_t* log, int op, uint64_t stripe, uint64_t version, item_t* it, const uint8_t* key, uint64_t key_bytes,
                        const uint8_t* value, uint64_t value_bytes) noexcept nogil:
    """Append what was done to a key. it: its item, NULL if it has none; op: RECORD_*."""
    cdef record_t r
    if log == NULL or log.bytes == 0:
        return
    r.version = version
    r.expires_ms = 0
    r.epoch = s.header.epoch
    r.codec = 0
    r.value_bytes = 0
    if it != NULL:
        r.epoch = it.epoch
        r.codec = it.codec
        if it.expiry_ms:
            r.expires_ms = <uint64_t>(<int64_t>(it.expiry_ms + wall_ms()) - <int64_t>(mono_ns() // 1000000) - ldi64r(&s.header.clock_shift_ms))
    r.stripe = <uint32_t>stripe
    r.key_bytes = <uint16_t>key_bytes
    if op == RECORD_SET and (value_bytes > s.ring_bytes >> 3 or log.bytes < record_room(s, key_bytes, value_bytes)):
        op = RECORD_REF
        value_bytes = 0
    r.value_bytes = <uint32_t>value_bytes
    r.op = <uint8_t>op
    if it != NULL and it.flags & FLAG_DIRTY and op != RECORD_EXPIRY:
        r.op |= RECORD_DIRTY
    if it != NULL and it.flags & FLAG_COPY_TTL:
        r.op |= RECORD_COPY_TTL
    log.end = ring_append(s, &r, key, value, value_bytes)

cdef inline void log_repaired(seg_t* s, int op, uint64_t stripe, uint64_t version, item_t* it, uint64_t room) noexcept nogil:
    """What the dead one may not have logged: the taker does, in the spare room, under the stripe. None left: a gap, and it is said."""
    cdef ring_t* ring
    cdef log_t log
    cdef uint64_t key_bytes = it.key_bytes
    if s.ring_bytes == 0 or ld64(&s.header.log_policy) == 0 or key_bytes == 0 or 48 + key_bytes > room:
        return
    ring = ring_of(s, s.row_idx)
    log.bytes = (sizeof(record_t) + key_bytes + 7) & ~<uint64_t>7
    if ld64(&ring.head) + ld64(&s.ring_reserved) + log.bytes > ld64(&ring.drained) + s.ring_bytes:
        add64(&s.header.log_gaps, 1)
        return
    log_op(s, &log, op, stripe, version, it, <uint8_t*>it + 48, key_bytes, NULL, 0)
