# SipHash-1-3: keyed, so that nobody outside can aim keys at one bucket.
# Source: Aumasson, Bernstein, "SipHash: a fast short-input PRF", 2012. One compression and three finalisation rounds,
# as in Rust's and CPython's own tables. The rounds are arguments so that the published vectors of 2-4 test it too.
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

cdef inline uint64_t rotl(uint64_t x, int b) noexcept nogil:
    return (x << b) | (x >> (64 - b))

ctypedef struct sip_t:
    uint64_t v0
    uint64_t v1
    uint64_t v2
    uint64_t v3

cdef inline void sip_round(sip_t* s) noexcept nogil:
    s.v0 += s.v1; s.v1 = rotl(s.v1, 13); s.v1 ^= s.v0; s.v0 = rotl(s.v0, 32)
    s.v2 += s.v3; s.v3 = rotl(s.v3, 16); s.v3 ^= s.v2
    s.v0 += s.v3; s.v3 = rotl(s.v3, 21); s.v3 ^= s.v0
    s.v2 += s.v1; s.v1 = rotl(s.v1, 17); s.v1 ^= s.v2; s.v2 = rotl(s.v2, 32)

cdef inline uint64_t siphash(const uint8_t* p, size_t n, uint64_t k0, uint64_t k1, int c, int d) noexcept nogil:
    cdef sip_t s
    cdef uint64_t m, last = <uint64_t>n << 56
    cdef size_t i, whole = n & ~<size_t>7
    cdef int r
    s.v0 = k0 ^ <uint64_t>0x736f6d6570736575
    s.v1 = k1 ^ <uint64_t>0x646f72616e646f6d
    s.v2 = k0 ^ <uint64_t>0x6c7967656e657261
    s.v3 = k1 ^ <uint64_t>0x7465646279746573
    i = 0
    while i < whole:
        memcpy(&m, p + i, 8)
        s.v3 ^= m
        for r in range(c):
            sip_round(&s)
        s.v0 ^= m
        i += 8
    while i < n:
        last |= <uint64_t>p[i] << (8 * (i & 7))
        i += 1
    s.v3 ^= last
    for r in range(c):
        sip_round(&s)
    s.v0 ^= last
    s.v2 ^= 0xff
    for r in range(d):
        sip_round(&s)
    return s.v0 ^ s.v1 ^ s.v2 ^ s.v3

cdef inline uint64_t siphash13(const uint8_t* p, size_t n, uint64_t k0, uint64_t k1) noexcept nogil:
    return siphash(p, n, k0, k1, 1, 3)
