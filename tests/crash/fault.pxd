# Fault points: named places between two stores, at which a test lets a process die or stop. In the sources each is a comment line,
# "#! name"; tests/special.py makes calls of these comments for its build, so every other build has nothing of them.
#
# Armed by the environment variable SHMCACHE_FAULT, read at every point, so that a process arms itself alone:
#   k0003put: slot stored      SIGKILL to itself at the third passing of this point
#   s0001lock: taken           SIGSTOP to itself
#   t0005                      write the name of every point passed to file descriptor 5
cdef extern from *:
    """
    #include <signal.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <unistd.h>
    static void fault(const char *name) {
        char *armed = getenv("SHMCACHE_FAULT"), *digit;
        if (!armed || strlen(armed) < 5) return;
        if (armed[0] == 't') { dprintf(atoi(armed + 1), "%s\\n", name); return; }
        if (strcmp(armed + 5, name)) return;
        for (digit = armed + 4; digit > armed && *digit == '0'; digit--) *digit = '9';  /* one less, for both modules */
        if (digit == armed) return;
        *digit -= 1;
        if (memcmp(armed + 1, "0000", 4) == 0) kill(getpid(), armed[0] == 's' ? SIGSTOP : SIGKILL);
    }
    """
    void fault(const char* name) noexcept nogil
