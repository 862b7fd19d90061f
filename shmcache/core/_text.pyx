# cython: binding=False, embedsignature=True, boundscheck=False, wraparound=False, cdivision=True
"""Texts as Redis has them, of no segment and no connection: patterns, numbers, common subsequences, checksums, bits, LZF, quotes."""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from shmcache.core.number cimport shm_float, shm_not_finite, shm_number, shm_print_float


def matches(bytes pattern not None, bytes data not None):
    """Redis' patterns: * any bytes, ? one, [abc] [a-z] [^a] one of a set, \\x the byte x itself; an unclosed set ends with the pattern.

    At most len(pattern) * len(data) steps: of several stars only the last is ever gone back to.
    """
    cdef const uint8_t* p = <const uint8_t*>PyBytes_AS_STRING(pattern)
    cdef const uint8_t* s = <const uint8_t*>PyBytes_AS_STRING(data)
    cdef size_t np = len(pattern), ns = len(data), i = 0, k = 0, star = 0, from_k = 0, after = 0
    cdef bint starred = False
    if ns == 0:
        return np == 0 or pattern == b"*"
    while k < ns:
        if i < np and p[i] == 42:
            while i < np and p[i] == 42:
                i += 1
            if i == np:
                return True
            starred = True
            star = i
            from_k = k
        elif i < np and one_matches(p, np, i, s[k], &after):
            i = after
            k += 1
        elif starred:
            from_k += 1
            k = from_k
            i = star
        else:
            return False
    while i < np and p[i] == 42:
        i += 1
    return i == np


cdef bint one_matches(const uint8_t* p, size_t n, size_t i, uint8_t c, size_t* after) noexcept:
    """Does the part of the pattern at i, which is no star, match this byte? after: what is behind it."""
    cdef bint negated = False, found = False
    cdef uint8_t low, high
    if p[i] == 63:              # ?
        after[0] = i + 1
        return True
    if p[i] == 92 and i + 1 < n:
        after[0] = i + 2
        return p[i + 1] == c
    if p[i] != 91:              # [
        after[0] = i + 1
        return p[i] == c
    i += 1
    if i < n and p[i] == 94:
        negated = True
        i += 1
    while i < n and p[i] != 93:
        if p[i] == 92 and i + 1 < n:
            found = found or p[i + 1] == c
            i += 2
        elif i + 2 < n and p[i + 1] == 45:
            low = min(p[i], p[i + 2])
            high = max(p[i], p[i + 2])
            found = found or low <= c <= high
            i += 3
        else:
            found = found or p[i] == c
            i += 1
    after[0] = min(i + 1, n)
    return found != negated


def number(bytes text not None):
    """The 64-bit number that a text spells in the canonical way; None: it does not."""
    cdef int64_t n = 0
    if not shm_number(<const uint8_t*>PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text), &n):
        return None
    return n


def add_floats(bytes a not None, bytes b not None):
    """The sum of two numbers' texts as INCRBYFLOAT writes it: 17 digits of a C long double, without zeros at the end. Raises: ValueError: one
    is not a number; ArithmeticError: the sum is not."""
    cdef char out[6000]
    cdef long double x, sum = 0
    cdef int n
    for text in (a, b):
        if not float_of(text, len(text), &x):
            raise ValueError
        sum += x
    if shm_not_finite(sum):
        raise ArithmeticError
    n = shm_print_float(out, sizeof(out), sum)
    return PyBytes_FromStringAndSize(out, n)


cdef bint float_of(bytes text, size_t n, long double* x):
    return n and n < 5120 and shm_float(PyBytes_AS_STRING(text), n, x)


def longest_common(const uint8_t[:] a not None, const uint8_t[:] b not None):
    """The longest common subsequence of two strings: (itself, [((first, last) in a, (first, last) in b)] of its runs from the end, length).
    By the table of lengths of all prefixes, 4 bytes each: the caller bounds it."""
    cdef size_t n = a.shape[0], m = b.shape[0], i, j
    cdef uint32_t* table = <uint32_t*>malloc((n + 1) * (m + 1) * sizeof(uint32_t))
    cdef size_t width = m + 1
    cdef int64_t a0 = -1, a1 = 0, b0 = 0, b1 = 0
    cdef bytearray common = bytearray()
    cdef list runs = []
    cdef uint32_t size
    if table == NULL:
        raise MemoryError
    try:
        with nogil:
            for j in range(m + 1):
                table[j] = 0
            for i in range(1, n + 1):
                table[i * width] = 0
                for j in range(1, m + 1):
                    if a[i - 1] == b[j - 1]:
                        table[i * width + j] = table[(i - 1) * width + j - 1] + 1
                    else:
                        table[i * width + j] = max(table[(i - 1) * width + j], table[i * width + j - 1])
        size = table[n * width + m]
        i, j = n, m
        while i and j:
            if a[i - 1] == b[j - 1]:
                common.append(a[i - 1])
                if a0 == <int64_t>i and b0 == <int64_t>j:
                    a0 -= 1
                    b0 -= 1
                else:
                    if a0 >= 0:
                        runs.append(((a0, a1), (b0, b1)))
                    a0 = a1 = <int64_t>i - 1
                    b0 = b1 = <int64_t>j - 1
                i -= 1
                j -= 1
            elif table[(i - 1) * width + j] > table[i * width + j - 1]:
                i -= 1
            else:
                j -= 1
        if a0 >= 0:
            runs.append(((a0, a1), (b0, b1)))
    finally:
        free(table)
    common.reverse()
    return bytes(common), runs, size


def quoted(const uint8_t[:] word not None):
    """A word as Redis shows it in a line: in quotes, bytes that are not printed as \\n, \\r, \\t, \\a, \\b or \\x00."""
    cdef Py_ssize_t i, size = 2, at = 1
    cdef uint8_t c
    cdef bytes text
    cdef char* to
    cdef const char* named = b"abtn"
    cdef const char* digits = b"0123456789abcdef"
    for i in range(word.shape[0]):
        c = word[i]
        size += 1 if 32 <= c < 127 and c != 34 and c != 92 else 2 if 7 <= c <= 10 or c == 13 or c == 34 or c == 92 else 4
    text = PyBytes_FromStringAndSize(NULL, size)
    to = PyBytes_AS_STRING(text)
    to[0] = to[size - 1] = 34
    for i in range(word.shape[0]):
        c = word[i]
        if 32 <= c < 127 and c != 34 and c != 92:
            to[at] = c
            at += 1
            continue
        to[at] = 92
        if 7 <= c <= 10:
            to[at + 1] = named[c - 7]
        elif c == 13:
            to[at + 1] = c"r"
        elif c == 34 or c == 92:
            to[at + 1] = c
        else:
            to[at + 1] = c"x"
            to[at + 2] = digits[c >> 4]
            to[at + 3] = digits[c & 15]
            at += 2
        at += 2
    return text.decode("ascii")


cdef extern from *:
    """
    #define shm_ones(x) __builtin_popcountll(x)
    """
    int shm_ones(uint64_t x) noexcept nogil


cdef inline uint8_t kept(Py_ssize_t i, Py_ssize_t low, Py_ssize_t high) noexcept nogil:
    """The bits of byte i that lie within [low, high]; bit 0 is the highest of byte 0."""
    return (0xff >> (low & 7) if i == low >> 3 else 0xff) & (0xff << (7 - (high & 7)) if i == high >> 3 else 0xff)


def count_bits(const uint8_t[:] data not None, Py_ssize_t low, Py_ssize_t high):
    """How many of the bits low to high are set; 0 <= low <= high < 8 * len(data)."""
    cdef Py_ssize_t i = (low >> 3) + 1, end = high >> 3
    cdef uint64_t found, word
    with nogil:
        found = shm_ones(data[i - 1] & kept(i - 1, low, high))
        while i + 8 <= end:
            memcpy(&word, &data[i], 8)
            found += shm_ones(word)
            i += 8
        while i <= end:
            found += shm_ones(data[i] & kept(i, low, high))
            i += 1
    return found


def first_bit(const uint8_t[:] data not None, bint wanted, Py_ssize_t low, Py_ssize_t high):
    """The first of the bits low to high that is set, or is not; -1: there is none. 0 <= low <= high < 8 * len(data)."""
    cdef Py_ssize_t i = low >> 3, end = high >> 3
    cdef uint8_t flip = 0 if wanted else 0xff, byte = (data[i] ^ flip) & kept(i, low, high)
    cdef uint64_t word, plain = 0 if wanted else <uint64_t>-1
    with nogil:
        while byte == 0 and i < end:
            i += 1
            while i + 8 <= end:
                memcpy(&word, &data[i], 8)
                if word != plain:
                    break
                i += 8
            byte = (data[i] ^ flip) & kept(i, low, high)
    if byte == 0:
        return -1
    low = 8 * i
    while not byte & 0x80:
        byte <<= 1
        low += 1
    return low


def combine_bits(uint8_t[:] result not None, const uint8_t[:] data not None, int how):
    """result = result & data, | data, ^ data, or ~data (how: that character). What data lacks is zeros; it is not the longer one."""
    cdef Py_ssize_t i, n = data.shape[0]
    if n > result.shape[0]:
        raise ValueError("result is the shorter one")
    with nogil:
        if how == c"&":
            for i in range(n):
                result[i] &= data[i]
            for i in range(n, result.shape[0]):
                result[i] = 0
        elif how == c"|":
            for i in range(n):
                result[i] |= data[i]
        elif how == c"^":
            for i in range(n):
                result[i] ^= data[i]
        else:
            for i in range(n):
                result[i] = ~data[i]


LZF_MOST = 88       # bytes that one byte becomes, at most: three make 264


def unpack_lzf(const uint8_t[:] packed not None, uint64_t size):
    """What LibLZF has packed: runs of up to 32 bytes as they are, and of up to 264 that came up to 8,192 bytes before. None: it is not of this
    size, or damaged. Every length and distance is hostile."""
    cdef Py_ssize_t i = 0, end = packed.shape[0], at = 0, n, back
    cdef bytes found
    cdef uint8_t* out
    cdef bint good = True
    if size == 0 or size > <uint64_t>end * LZF_MOST:
        return None
    found = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
    out = <uint8_t*>PyBytes_AS_STRING(found)
    with nogil:
        while i < end:
            n = packed[i]
            i += 1
            if n < 32:
                n += 1
                if n > end - i or n > <Py_ssize_t>size - at:
                    good = False
                    break
                memcpy(out + at, &packed[i], n)
                i += n
                at += n
                continue
            back = (n & 0x1f) << 8
            n >>= 5
            if end - i < (2 if n == 7 else 1):
                good = False
                break
            if n == 7:
                n += packed[i]
                i += 1
            back += packed[i] + 1
            i += 1
            n += 2
            if back > at or n > <Py_ssize_t>size - at:
                good = False
                break
            for back in range(at - back, at - back + n):      # byte by byte: they may overlap
                out[at] = out[back]
                at += 1
    return found if good and at == <Py_ssize_t>size else None


def crc64(const uint8_t[:] data not None, uint64_t crc=0):
    """CRC-64 of the Jones polynomial, reflected, as DUMP's payloads end with. crc: of what is before. Eight bytes at a time: they are a word
    of a machine that is little-endian."""
    cdef Py_ssize_t i = 0, n = data.shape[0]
    cdef uint64_t word
    cdef int k
    with nogil:
        while i + 8 <= n:
            memcpy(&word, &data[i], 8)
            word ^= crc
            crc = 0
            for k in range(8):
                crc ^= CRC64[7 - k][word >> 8 * k & 0xff]
            i += 8
        while i < n:
            crc = CRC64[0][(crc ^ data[i]) & 0xff] ^ (crc >> 8)
            i += 1
    return crc


cdef uint64_t CRC64[8][256]         # [k]: of a byte with k zero bytes behind it

cdef void make_crc64() noexcept:
    cdef int i, k
    cdef uint64_t crc
    for i in range(256):
        crc = i
        for k in range(8):
            crc = (crc >> 1) ^ (0x95ac9329ac4bc9b5 if crc & 1 else 0)
        CRC64[0][i] = crc
    for k in range(1, 8):
        for i in range(256):
            crc = CRC64[k - 1][i]
            CRC64[k][i] = CRC64[0][crc & 0xff] ^ (crc >> 8)

make_crc64()
