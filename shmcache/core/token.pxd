# Tokens: who owns what, and whether he lives.
#
#   token = gen(40 bits) << 16 | row + 1          never 0; an even number of its bits are 1
#
# A token names one life of one process in one row. The row's gen is counted up at every taking, by whoever holds the row's
# byte, and is never reset: so a token is never used twice, and its death is final. Its complement stands beside it: a flipped bit of one is
# seen, and is not taken for another life. The byte alone tells then, till the next taking makes both new, above either. A word with a token
# (a lock's, a chunk's, a page's) has no room for a second one: so every other number is no gen, and a flipped bit makes the number of ones odd.
# Such a token is dead if none that differs from it in one bit is alive: the owner may be any of them, and stores over the word when it is done.
# The rows' generations begin far apart, so that there is hardly ever another one.
#
# Alive is who holds an open-file-description lock on byte 2^62 + row of the segment's own inode. The description is kept by
# one mapped page and no descriptor: closing descriptors cannot drop it (daemons close them all), no fork child inherits it
# (MADV_DONTFORK), and the kernel drops it at exit, exec or death, however that comes. Pids would lie: they are reused, and
# mean nothing in another container.
#
# A byte can be held though its process is dead: a child that it vforked (posix_spawn, subprocess) shares its memory, mappings and all, until
# it calls exec, which may take long (a fifo among its file actions, a slow disk). So a second proof of death stands beside the first, asked
# for only if the byte is held: the process of the pid that the row notes (home) has ended, in the pid namespace that the row notes, if that is
# the asker's own. The kernel says so by ESRCH, or by a pidfd that is readable: then the leader is a zombie and no other thread is left, and each
# thread has let go of its memory (exit_mm) before that: none of them runs, or stores anything, any more. A leader that has ended before its
# threads (pthread_exit) is no death. The vforked child could store, but is in the C library's code, or the interpreter's, which know nothing
# of segments. A pid that was given out again counts as alive for as long as its new owner lives: the byte is free when that child calls exec.
# No pidfds (before Linux 5.3), no /proc, another namespace: the byte alone tells.
#
# Race table
#   two take one row         F_OFD_SETLK of the row's second byte, TAKING_BYTE on, is the taking; the loser tries the next row
#   ask vs die               "alive" may be old by the time it is used: the asker waits one slice more. "dead" is final
#   ask vs row taken anew    gen is counted up before the life byte is locked: the asker sees another gen, or a free byte, and
#                            never takes the dead for alive, however long the successor is stopped on the way
#   ask for the pid vs row taken anew    home is stored behind gen, and gen is looked at behind it: it is of that life, or its halves do not fit
#   gen counted vs asked     between its two stores they do not fit: the byte alone tells, and is free till both stand
#   ask about oneself        the prober would answer right, but is never asked: own token = alive
# Crash: between the two locks: both are free again; nothing carries the token of the generation that began there. Between the stores of gen:
#   the next taking begins above either.
from libc.stdint cimport uint32_t, uint64_t

from shmcache.core.atomics cimport ld64, st64
from shmcache.core.layout cimport ASKED, BATCH_CLASSES, BATCH_SLOTS, HAZARDS, PARKED_SLOTS, row_t, seg_t

cdef enum rc_t:
    OK = 0
    TAKEN_OVER = 1      # the lock was a dead owner's: repair what it guards, then go on
    BUSY = -1           # a living process holds it, longer than the limit
    INTR = -2           # a signal came; nothing is held
    NO_ROOM = -3
    ABSENT = -4         # no such key (or it has expired, or was cleared)
    EXISTS = -5         # the key is there, and the operation wanted it not to be
    MISMATCH = -6       # cas: another version
    NOT_INT = -7
    OVERFLOW = -8
    NO_ROW = -9         # all rows are taken by the living
    NO_OFD = -10        # this file system does not keep open-file-description locks
    OS_ERROR = -11      # errno says
    AGAIN = -12         # a reader has to begin again
    NO_STORE = -13      # the segment stands before a store, which this write would pass by

cdef enum:
    ASKED_NS = 1000000      # for which a process that was found alive is not asked for again by its pid
    # kinds of chunk words: FREE -> RESERVED(token) -> LIVE -> RETIRED(token) -> FREE; KEPT(token): in that process's hand, for later
    FREE = 0
    RESERVED = 1
    LIVE = 2
    RETIRED = 3
    KEPT = 4
    # kinds of page words
    PAGE_FREE = 0       # in the pool
    PAGE_CUTTING = 1    # token: taken from the pool, being cut for a class
    PAGE_ACTIVE = 2     # of class `cls`
    PAGE_DRAINING = 3   # token: of class `cls`, being emptied
    PAGE_BIG = 4        # token while the big value is being built, then 0
    # kinds of overflow bucket words
    OV_FREE = 0
    OV_RESERVED = 1     # token
    OV_LINKED = 2

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    #define SHM_LIFE_BYTE ((off_t)1 << 62)
    #define SHM_SUPERVISOR_BYTE 65536       /* behind it: one more byte, for the one supervisor of a segment */
    #define SHM_RESTORER_BYTE 65537         /* and one for the one process that restores it */
    #define SHM_TAKING_BYTE 131072          /* and one per row, for him who takes it */

    /* 0 done or free, 1 held by another, -1 error */
    static int shm_ofd_lock(int fd, int ask, uint32_t row) {
        struct flock f;
        memset(&f, 0, sizeof f);
        f.l_type = F_WRLCK;
        f.l_whence = SEEK_SET;
        f.l_start = SHM_LIFE_BYTE + row;
        f.l_len = 1;
        if (fcntl(fd, ask ? F_OFD_GETLK : F_OFD_SETLK, &f) < 0)
            return (errno == EAGAIN || errno == EACCES) && !ask ? 1 : -1;
        return ask ? f.l_type != F_UNLCK : 0;
    }
    /* of this process, as in row_t.home */
    static uint64_t shm_home(void) {
        struct stat st;
        if (stat("/proc/self/ns/pid", &st) || (uint64_t)st.st_ino > UINT32_MAX) return 0;      /* 15 us */
        return (uint64_t)st.st_ino << 32 | (uint32_t)getpid();
    }
    /* Has the process of this home ended, with all its threads? In doubt, no. mine: the asker's. 10 us */
    static int shm_process_gone(uint64_t home, uint64_t mine) {
        struct pollfd p = {-1, POLLIN, 0};
        pid_t pid = (pid_t)(uint32_t)home;
        if (pid <= 0 || home >> 32 == 0 || home >> 32 != mine >> 32) return 0;
    #ifdef SYS_pidfd_open
        p.fd = (int)syscall(SYS_pidfd_open, pid, 0);
    #endif
        if (p.fd < 0) return kill(pid, 0) < 0 && errno == ESRCH;    /* a pid may stay, as the number of a group */
        int n = poll(&p, 1, 0);
        close(p.fd);
        return n == 1 && p.revents & POLLIN;
    }
    static int shm_same_file(int fd, uint64_t dev, uint64_t ino) {
        struct stat st;
        return fd >= 0 && fstat(fd, &st) == 0 && (uint64_t)st.st_dev == dev && (uint64_t)st.st_ino == ino;
    }
    /* a descriptor of a new description of the same inode; by name when the descriptor is gone. -1: impossible */
    static int shm_reopen(int fd, const char *path, uint64_t dev, uint64_t ino) {
        char proc[64];
        int got = -1;
        if (shm_same_file(fd, dev, ino)) {
            snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd);
            got = open(proc, O_RDWR | O_CLOEXEC);
        }
        if (got < 0) got = open(path, O_RDWR | O_CLOEXEC);
        if (got >= 0 && !shm_same_file(got, dev, ino)) { close(got); got = -1; errno = ESTALE; }
        return got;
    }
    static void *shm_keep_description(int fd) {
        void *p = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) return NULL;
        if (madvise(p, 4096, MADV_DONTFORK)) { munmap(p, 4096); return NULL; }
        return p;
    }
    static uint64_t *shm_wiped_page(void) {
        void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) return NULL;
        if (madvise(p, 4096, MADV_WIPEONFORK)) { munmap(p, 4096); return NULL; }
        return (uint64_t *)p;
    }
    static uint64_t shm_clock_ns(clockid_t c) {
        struct timespec t;
        clock_gettime(c, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    #ifdef SHMCACHE_NO_TAKEOVER         /* to see the storm find what liveness is for; never in a release */
    #define SHM_ALL_ALIVE 1
    #else
    #define SHM_ALL_ALIVE 0
    #endif
    #ifdef SHMCACHE_NO_GENERATIONS      /* the same, for generations */
    #define SHM_GEN_STEP 0
    #else
    #define SHM_GEN_STEP 1
    #endif
    #define SHM_GEN_UNKNOWN UINT64_MAX
    static inline uint64_t mono_ns(void) { return shm_clock_ns(CLOCK_MONOTONIC); }
    static inline uint64_t wall_ns(void) { return shm_clock_ns(CLOCK_REALTIME); }
    static inline uint64_t wall_ms(void) { return wall_ns() / 1000000u; }
    """
    const uint32_t SUPERVISOR_BYTE "SHM_SUPERVISOR_BYTE"
    const uint32_t RESTORER_BYTE "SHM_RESTORER_BYTE"
    const uint32_t TAKING_BYTE "SHM_TAKING_BYTE"
    const bint ALL_ALIVE "SHM_ALL_ALIVE"
    const uint64_t GEN_STEP "SHM_GEN_STEP"
    const uint64_t GEN_UNKNOWN "SHM_GEN_UNKNOWN"
    bint shm_odd "__builtin_parityll" (uint64_t x) noexcept nogil
    int shm_ofd_lock(int fd, bint ask, uint32_t row) noexcept nogil
    uint64_t shm_home() noexcept nogil
    bint shm_process_gone(uint64_t home, uint64_t mine) noexcept nogil
    bint shm_same_file(int fd, uint64_t dev, uint64_t ino) noexcept nogil
    int shm_reopen(int fd, const char* path, uint64_t dev, uint64_t ino) noexcept nogil
    void* shm_keep_description(int fd) noexcept nogil
    uint64_t* shm_wiped_page() noexcept nogil
    uint64_t mono_ns() noexcept nogil
    uint64_t wall_ns() noexcept nogil
    uint64_t wall_ms() noexcept nogil
    int getpid() noexcept nogil
    int close(int fd) noexcept nogil
    int munmap(void* p, size_t n) noexcept nogil

cdef inline uint64_t word_of(uint64_t kind, uint64_t token) noexcept nogil:
    return kind << 56 | token

cdef inline int kind_of(uint64_t word) noexcept nogil:
    return <int>(word >> 56)

cdef inline uint64_t token_of(uint64_t word) noexcept nogil:
    return word & ((<uint64_t>1 << 56) - 1)

cdef inline uint32_t row_of(uint64_t token) noexcept nogil:
    """Row index of a token; anything from outside must be held against n_rows."""
    return <uint32_t>((token & 0xffff) - 1)

cdef inline bint prober_ready(seg_t* s) noexcept nogil:
    """See that s.prober is a descriptor of the segment. Somebody may have closed it, and its number be another file's."""
    if shm_same_file(s.prober, s.dev, s.ino):
        return True
    s.prober = shm_reopen(-1, s.path, s.dev, s.ino)     # the number is not ours any more: nothing to close
    return s.prober >= 0

cdef inline int hold_byte(seg_t* s, uint32_t byte, void** page) noexcept nogil:
    """Lock one of the bytes that one process has: 0 done, 1 another has it, -1 error. It is free when page is unmapped, or the process has
    died: the page alone keeps the description open, and fork children do not have it."""
    cdef int rc = -1
    cdef int fd = shm_reopen(s.prober, s.path, s.dev, s.ino) if prober_ready(s) else -1
    if fd < 0:
        return -1
    page[0] = shm_keep_description(fd)
    if page[0] != NULL:
        rc = shm_ofd_lock(fd, False, byte)
        if rc != 0:
            munmap(page[0], 4096)
            page[0] = NULL
    close(fd)
    return rc

cdef inline uint64_t generation(seg_t* s, uint32_t r) noexcept nogil:
    """Of a row; GEN_UNKNOWN if it is damaged, or just being counted."""
    cdef uint64_t gen = ld64(&s.rows[r].gen)
    return gen if gen == ~ld64(&s.rows[r].gen_check) else GEN_UNKNOWN

cdef inline bint byte_free(seg_t* s, uint32_t r) noexcept nogil:
    """Does nobody hold a row's byte? In doubt, no."""
    cdef int fd
    if not prober_ready(s):
        return False
    fd = s.prober
    return shm_ofd_lock(fd, True, r) == 0 and shm_same_file(fd, s.dev, s.ino)   # it may have become another file's meanwhile

cdef inline bint process_gone(seg_t* s, uint32_t r) noexcept nogil:
    """Has the process that a row notes ended? In doubt, no."""
    cdef uint64_t home = ld64(&s.rows[r].home)
    return home == ~ld64(&s.rows[r].home_check) and shm_process_gone(home, s.home if s.me[0] else shm_home())

cdef inline bint row_held(seg_t* s, uint32_t r) noexcept nogil:
    """Does a living process have this row? In doubt, yes."""
    return not byte_free(s, r) and not process_gone(s, r)

cdef inline bint life_over(seg_t* s, uint64_t token) noexcept nogil:
    """dead(), of a token with no flipped bit."""
    cdef uint32_t r = row_of(token), k = r & (ASKED - 1)
    cdef uint64_t gen
    if token == s.me[0] or ALL_ALIVE:
        return False
    if r >= s.n_rows:
        return True                                     # no process ever had it: damage, which nobody will release
    gen = generation(s, r)
    if gen != GEN_UNKNOWN and gen != token >> 16:
        return True
    if byte_free(s, r):
        return True
    if ld64(&s.asked[k]) != token or mono_ns() - ld64(&s.asked_ns[k]) > ASKED_NS:   # a hand may meet many locks of one owner
        if process_gone(s, r):
            return True
        st64(&s.asked_ns[k], mono_ns())
        st64(&s.asked[k], token)
    gen = generation(s, r)
    return gen != GEN_UNKNOWN and gen != token >> 16

cdef inline bint dead(seg_t* s, uint64_t token) noexcept nogil:
    """Has this token's process died? In doubt, no: what is dead may be robbed. 1 us, of the living 10, once a millisecond; ask only after a
    time-out."""
    cdef int i
    if not shm_odd(token):
        return life_over(s, token)
    for i in range(56):
        if not life_over(s, token ^ <uint64_t>1 << i):
            return False
    return True

cdef inline uint64_t count_generation(seg_t* s, uint32_t r) noexcept nogil:
    """Begin the row's next generation, whose number is returned: above both that stand there, as far as they are such numbers."""
    cdef uint64_t most = (<uint64_t>1 << 40) - 1, gen = ld64(&s.rows[r].gen), check = ~ld64(&s.rows[r].gen_check)
    gen = max(gen if gen <= most else 0, check if check <= most else 0)
    if gen == 0:
        gen = <uint64_t>((r + 1) * 40503 & 0xffff) << 23    # the first of two rows differ in more than a bit or two: 4 in 1,024 rows
    gen += GEN_STEP
    while gen == 0 or gen > most or shm_odd(gen << 16 | (r + 1)):
        gen = (gen + 1) & most
    st64(&s.rows[r].gen, gen)
    #! row: gen half counted
    st64(&s.rows[r].gen_check, ~gen)
    return gen

cdef inline void row_begin(seg_t* s, uint32_t r, uint64_t gen) noexcept nogil:
    """Start a life in row r, whose byte this process has just locked. What the dead had in hand is told by his token."""
    cdef row_t* row = &s.rows[r]
    cdef uint64_t home = shm_home()
    cdef int i, j
    for i in range(BATCH_CLASSES):
        for j in range(BATCH_SLOTS):
            st64(&row.batch[i][j], 0)
    for i in range(PARKED_SLOTS):
        st64(&row.parked[i], 0)
    for i in range(HAZARDS):
        st64(&row.hazard[i], 0)
    #! row: hand emptied
    st64(&row.started_ms, wall_ms())
    st64(&row.pid, <uint64_t>getpid())
    st64(&row.home, home)
    st64(&row.home_check, ~home)
    s.home = home
    s.row = row
    s.row_idx = r
    s.ring_stuck = <uint64_t>-1
    s.ring_reserved = s.held_room = 0       # of a parent
    s.ring_lock = 0
    s.me[0] = gen << 16 | (r + 1)
    #! row: begun

cdef inline int take_row(seg_t* s) noexcept nogil:
    """Take a free row: OK, NO_ROW, NO_OFD or OS_ERROR. Also what a fork child does at its first operation."""
    cdef uint32_t i, r, start = <uint32_t>((mono_ns() >> 10) % s.n_rows)
    cdef uint64_t gen
    cdef int fd, rc
    if not prober_ready(s):
        return OS_ERROR
    fd = shm_reopen(s.prober, s.path, s.dev, s.ino)
    if fd < 0:
        return OS_ERROR
    s.lock_page = shm_keep_description(fd)
    if s.lock_page == NULL:
        close(fd)
        return OS_ERROR
    for i in range(s.n_rows):
        r = (start + i) % s.n_rows
        rc = shm_ofd_lock(fd, False, r + TAKING_BYTE)
        if rc == 0:
            #! row: being taken
            gen = count_generation(s, r)
            #! row: gen counted
            rc = shm_ofd_lock(fd, False, r)
            #! row: byte locked
            if rc != 0:
                break
            close(fd)                                   # the mapping keeps the description, and so the locks
            if shm_ofd_lock(s.prober, True, r) != 1:    # held, but the prober does not see it: all would look dead
                munmap(s.lock_page, 4096)
                s.lock_page = NULL
                return NO_OFD
            row_begin(s, r, gen)
            return OK
        if rc < 0:
            break
    close(fd)
    munmap(s.lock_page, 4096)
    s.lock_page = NULL
    return NO_ROW if rc == 1 else NO_OFD
