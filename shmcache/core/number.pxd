# Numbers and their texts, as Redis reads and writes them.
from libc.stdint cimport int64_t, uint8_t

cdef extern from *:
    """
    /* Decimal digits of n behind `to`: how many characters. */
    static int shm_digits(char *to, int64_t n) {
        char d[24]; int i = 0, k = 0;
        uint64_t u = n < 0 ? 0 - (uint64_t)n : (uint64_t)n;
        do { d[i++] = (char)('0' + u % 10); u /= 10; } while (u);
        if (n < 0) to[k++] = '-';
        while (i) to[k++] = d[--i];
        return k;
    }
    /* The number that these bytes spell in the one canonical way (no sign +, no leading zero, no space): 1, or 0. */
    static int shm_number(const uint8_t *p, size_t n, int64_t *out) {
        size_t i = 0; int minus = 0; uint64_t v = 0;
        if (n == 0 || n > 20) return 0;
        if (n == 1 && p[0] == '0') { *out = 0; return 1; }
        if (p[0] == '-') { minus = 1; i = 1; if (n == 1) return 0; }
        if (p[i] < '1' || p[i] > '9') return 0;
        for (; i < n; i++) {
            unsigned d = (unsigned)p[i] - '0';
            if (d > 9 || v > (UINT64_MAX - d) / 10) return 0;
            v = v * 10 + d;
        }
        if (minus) { if (v > (uint64_t)INT64_MAX + 1) return 0; *out = (int64_t)(0 - v); }
        else { if (v > INT64_MAX) return 0; *out = (int64_t)v; }
        return 1;
    }
    #include <ctype.h>
    #include <errno.h>
    #include <math.h>
    #include <stdio.h>
    #include <stdlib.h>
    static int shm_float(const char *p, size_t n, long double *x) {
        char *end;
        errno = 0;
        *x = strtold(p, &end);      /* Python's bytes end with a zero byte */
        return !isspace((unsigned char)p[0]) && (size_t)(end - p) == n && !isnan(*x) &&
               !(errno == ERANGE && (isinf(*x) || fpclassify(*x) == FP_ZERO)) && errno != EINVAL;
    }
    static int shm_not_finite(long double x) { return isnan(x) || isinf(x); }
    static int shm_print_float(char *to, size_t room, long double x) {
        int n = snprintf(to, room, "%.17Lf", x);
        while (to[n - 1] == '0') n--;
        if (to[n - 1] == '.') n--;
        if (n == 2 && to[0] == '-' && to[1] == '0') { to[0] = '0'; n = 1; }
        return n;
    }
    """
    int shm_digits(char* to, int64_t n) nogil
    bint shm_number(const uint8_t* p, size_t n, int64_t* out) nogil
    bint shm_float(const char* p, size_t n, long double* x) nogil
    bint shm_not_finite(long double x) nogil
    int shm_print_float(char* to, size_t room, long double x) nogil
