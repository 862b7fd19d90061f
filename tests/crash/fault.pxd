# Points: named places at which a test lets a process die, stop, dawdle, or find a lock busy. In the sources each is a comment line, and
# tests/special.py makes calls of these comments for its build, so every other build has nothing of them:
#   #! name     fault(name): between two stores
#   #~ name     delay(name): within a read, or between two loads, where a death leaves nothing behind, but a slow process may be overtaken; it can
#               be stopped there, too
#   #? name     if busy(name): return -1, which is BUSY
#
# Armed by the environment variable SHMCACHE_FAULT, read at every point, so that a process arms itself alone:
#   k0003put: slot stored      SIGKILL to itself at the third passing of this point
#   s0001lock: taken           SIGSTOP to itself
#   t0005                      write the name of every point passed to file descriptor 5
#   d7,100,2000,10,1000,5,3,big: page to be freed
#                              seed 7; sleep up to 2000 us at one in 100 passings of any point, up to ten times as long at one in 3 of
#                              those whose names begin with what follows; one in 10 tries for a lock finds it busy, one in 1000 waits
#                              for one have been too long, one in 5 times that of a class or pool is, however it is asked (0: none)
# Each extension module counts in shmcache_delayed and shmcache_refused, which ctypes can read.
cdef extern from *:
    """
    #include <signal.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <time.h>
    #include <unistd.h>
    __attribute__((visibility("default"))) uint64_t shmcache_delayed, shmcache_refused;
    static struct { unsigned long seed, delay, most_us, busy, late, pools, focus; char name[64]; } dawdle;
    static __thread uint64_t chance;

    static const char *dawdling(void) {  /* what is armed, if it is this; parsed once */
        static const char *parsed;
        const char *armed = getenv("SHMCACHE_FAULT");
        if (!armed || armed[0] != 'd') return NULL;
        if (armed != parsed) {
            memset(&dawdle, 0, sizeof dawdle);
            sscanf(armed, "d%lu,%lu,%lu,%lu,%lu,%lu,%lu,%63[^\\n]", &dawdle.seed, &dawdle.delay, &dawdle.most_us, &dawdle.busy,
                   &dawdle.late, &dawdle.pools, &dawdle.focus, dawdle.name);
            parsed = armed;
        }
        return armed;
    }
    static int one_in(unsigned long n) {
        if (n == 0) return 0;
        if (chance == 0) chance = (dawdle.seed << 20 ^ (uint64_t)(uintptr_t)&chance) * 0x9e3779b97f4a7c15u | 1;
        chance ^= chance << 13; chance ^= chance >> 7; chance ^= chance << 17;      /* xorshift64: Marsaglia 2003 */
        return (chance >> 11) % n == 0;
    }
    static void fault(const char *name);
    static void delay(const char *name) {
        struct timespec t;
        uint64_t us;
        const char *armed = getenv("SHMCACHE_FAULT");
        if (armed && armed[0] == 's') fault(name);
        if (!dawdling()) return;
        if (dawdle.name[0] && strncmp(name, dawdle.name, strlen(dawdle.name)) == 0 && one_in(dawdle.focus)) us = 10 * dawdle.most_us;
        else if (one_in(dawdle.delay)) us = dawdle.most_us;
        else return;
        us >>= chance & 7;                              /* down to a 128th, of each length about as often */
        t.tv_sec = (time_t)(us / 1000000);
        t.tv_nsec = (long)(us % 1000000 * 1000);
        nanosleep(&t, NULL);
        __atomic_fetch_add(&shmcache_delayed, 1, __ATOMIC_RELAXED);
    }
    static int busy(const char *name) {
        if (!dawdling()) return 0;
        if (!one_in(!strcmp(name, "lock: to be tried") ? dawdle.busy : !strcmp(name, "lock: to be waited for") ? dawdle.late : dawdle.pools)) return 0;
        __atomic_fetch_add(&shmcache_refused, 1, __ATOMIC_RELAXED);
        return 1;
    }
    static void fault(const char *name) {
        char *armed = getenv("SHMCACHE_FAULT"), *digit;
        if (!armed || strlen(armed) < 5) return;
        if (armed[0] == 'd') { delay(name); return; }
        if (armed[0] == 't') { dprintf(atoi(armed + 1), "%s\\n", name); return; }
        if (strcmp(armed + 5, name)) return;
        for (digit = armed + 4; digit > armed && *digit == '0'; digit--) *digit = '9';  /* one less, for both modules */
        if (digit == armed) return;
        *digit -= 1;
        if (memcmp(armed + 1, "0000", 4) == 0) kill(getpid(), armed[0] == 's' ? SIGSTOP : SIGKILL);
    }
    """
    void fault(const char* name) noexcept nogil
    void delay(const char* name) noexcept nogil
    bint busy(const char* name) noexcept nogil
