# The lock: an owner word, and a futex as its doorbell. Stripes, slab classes, pools: all the same.
#
#   word = 0 | token | WAIT          taken by compare-and-swap from 0: taking and owning are one step, so there is no
#                                    instant at which a lock is held and nobody knows by whom
# A wake-up is a hint, the word is the truth: waiters sleep in slices on the monotonic clock and look at the word after each.
#
# Race table
#   two take a free lock            the compare-and-swap decides; the loser sees the winner's token
#   release vs a waiter's WAIT      release is one exchange: it returns WAIT and rings, or the waiter's compare-and-swap of WAIT
#                                   fails and it begins again from the word
#   ring vs a waiter going to sleep he read the bell before the word: a ring since then has changed it, and the futex does not sleep
#   two take over from a dead one   compare-and-swap from the dead token decides
#   take over vs the dead one       the dead store nothing more
#   take over vs row taken anew     the word has the old gen: dead. That process is not in it
# Crash: holding: word keeps the dead token, the next one to time out asks, takes over, repairs. Between the exchange and the
#   bell, or rung and not yet awake: the word is 0; whoever sleeps looks again within one slice (16 ms at most).
#   Who slept takes the word with WAIT kept, since others may sleep behind him: he owes the next one a bell.
# A stopped owner is alive and is never robbed. Who waited for him as long as the segment's lock_limit notes `stalled`, the rest wait 1 ms and
# fail fast. A signal ends a wait, and the call begins another: it is known by its end (until_ns) that it is the same call's, and when that began
# is kept in seg_t for one call of the process. Two threads that are struck at once may lose it: `stalled` is noted by a later one.
# Source: model/lock.pml checks this with deaths at every step; 40 pauses and 1..16 ms slices are measured there.
from libc.stdint cimport uint32_t, uint64_t

from shmcache.core.atomics cimport add64, cas64, cpu_pause, ld32, ld64, st64, unlikely, xchg64
from shmcache.core.layout cimport lock_t, seg_t
from shmcache.core.token cimport BUSY, INTR, OK, TAKEN_OVER, dead, mono_ns, token_of

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/futex.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>
    #define SHM_WAIT ((uint64_t)1 << 63)
    /* Sleep while *bell == seen: 0 rung, 1 slice over, 2 interrupted. Whatever the word holds, nothing worse happens. */
    static int shm_sleep(uint32_t *bell, uint32_t seen, uint64_t slice_ns) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        uint64_t at = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec + slice_ns;
        t.tv_sec = (time_t)(at / 1000000000u);
        t.tv_nsec = (long)(at % 1000000000u);
        if (syscall(SYS_futex, bell, FUTEX_WAIT_BITSET, seen, &t, NULL, FUTEX_BITSET_MATCH_ANY) == 0 || errno == EAGAIN) return 0;
        return errno == EINTR ? 2 : 1;
    }
    static void shm_ring(uint32_t *bell) {
        __atomic_fetch_add(bell, 1, __ATOMIC_SEQ_CST);
        syscall(SYS_futex, bell, FUTEX_WAKE, 1, NULL, NULL, 0);
    }
    """
    const uint64_t WAIT "SHM_WAIT"
    int shm_sleep(uint32_t* bell, uint32_t seen, uint64_t slice_ns) noexcept nogil
    void shm_ring(uint32_t* bell) noexcept nogil

cdef enum:
    SPINS = 40
    PATIENCE = 4            # limits, in all, for a lock that goes from hand to hand
    SLICE_MIN_NS = 1000000
    SLICE_MAX_NS = 16000000

cdef inline int lock_try(seg_t* s, lock_t* l) noexcept nogil:
    """Take the lock without sleeping: OK or BUSY."""
    cdef int i
    #? lock: to be tried
    if cas64(&l.word, 0, s.me[0]):
        #! lock: taken
        return OK
    for i in range(SPINS):
        cpu_pause()
        if ld64(&l.word) == 0 and cas64(&l.word, 0, s.me[0]):
            #! lock: taken
            return OK
    return BUSY

cdef inline void note_wait(seg_t* s, uint64_t since_ns) noexcept nogil:
    cdef uint64_t waited = mono_ns() - since_ns
    add64(&s.row.lock_waits, 1)
    if waited > ld64(&s.row.max_wait_ns):
        st64(&s.row.max_wait_ns, waited)

cdef inline uint64_t wait_until(seg_t* s) noexcept nogil:
    """Until when a call waits that begins to wait now."""
    return mono_ns() + s.limit_ns

cdef inline uint64_t within(uint64_t until_ns, uint64_t ns) noexcept nogil:
    """A nearer end of waiting, for a lock that is wanted while another is held."""
    return min(until_ns, mono_ns() + ns) if until_ns else 0

cdef inline int lock_take(seg_t* s, lock_t* l, uint64_t until_ns) noexcept nogil:
    """Take the lock: OK, TAKEN_OVER, BUSY at until_ns (on the monotonic clock) of a living owner, or INTR. until_ns 0: do not sleep at all.

    One call of a user waits until one time, whatever locks it needs and however often signals make it begin again: INTR is given only before
    that time. A caller that comes later sleeps once, 1 ms, so that it is told of the dead, and is not refused for an owner that has no CPU just
    now. When the lock is let go and another gets it, it is a new holding: the time that was left at the beginning begins again, PATIENCE
    times in all. A signal that comes while nobody sleeps (some us of each slice) is seen when this returns, as any that another thread gets.
    May sleep: never called with the GIL held, unless until_ns is 0.
    """
    cdef uint64_t w, t0, now, since, patience, end, left, slice_ns = SLICE_MIN_NS
    cdef uint32_t bell
    cdef bint slept = False, ask = False
    cdef int rc = lock_try(s, l)
    if rc == OK or until_ns == 0:
        return rc
    #? lock: to be waited for
    t0 = now = since = mono_ns()
    if s.struck == <void*>l and s.struck_until_ns == until_ns:
        since = s.struck_since_ns
    left = max(until_ns, t0 + SLICE_MIN_NS) - t0
    end = t0 + left
    patience = t0 + PATIENCE * left
    while True:
        bell = ld32(&l.bell)
        w = ld64(&l.word)
        #~ lock: word loaded
        if token_of(w) == 0:
            if cas64(&l.word, w, s.me[0] | (WAIT if slept else 0)):
                #! lock: taken after a wait
                note_wait(s, t0)
                return OK
            continue
        if ask:
            ask = False
            if dead(s, token_of(w)):
                if cas64(&l.word, w, s.me[0] | WAIT):
                    #! lock: taken over
                    note_wait(s, t0)
                    add64(&s.row.takeovers, 1)
                    return TAKEN_OVER
                continue
            now = mono_ns()
            if now > end or (ld64(&l.stalled) == token_of(w) and now > end - left + SLICE_MIN_NS):
                if now - since > s.patience_ns - (s.patience_ns >> 3):  # the impatient do not speak for all
                    st64(&l.stalled, token_of(w))
                    add64(&s.row.stalls, 1)
                note_wait(s, t0)
                if slept:
                    shm_ring(&l.bell)        # the bell that woke us was for somebody: pass it on
                return BUSY
        if not w & WAIT:
            if not cas64(&l.word, w, w | WAIT):
                continue
        #! lock: WAIT noted
        rc = shm_sleep(&l.bell, bell, slice_ns)
        now = mono_ns()
        if rc == 2 and now < until_ns:
            if slept:
                shm_ring(&l.bell)
            s.struck_until_ns = 0
            s.struck = <void*>l
            s.struck_since_ns = since
            s.struck_until_ns = until_ns
            return INTR
        if rc == 0:
            slept = True
            end = min(now + left, patience)     # it was let go: the limit is for one holding
            #! lock: woken
        if rc != 0 or now > patience:           # others may be served again and again
            ask = True
            slice_ns = min(2 * slice_ns, <uint64_t>SLICE_MAX_NS)

cdef inline void lock_release(lock_t* l) noexcept nogil:
    """Give the lock back. The holder has cleared its intent before."""
    if unlikely(ld64(&l.stalled)):
        st64(&l.stalled, 0)                 # it runs again
    #! lock: to be released
    if xchg64(&l.word, 0) & WAIT:
        #! lock: released, not rung
        shm_ring(&l.bell)

cdef inline bint lock_mine(seg_t* s, lock_t* l) noexcept nogil:
    return token_of(ld64(&l.word)) == s.me[0]
