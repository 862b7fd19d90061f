# An envelope: a value of the codec ENVELOPE, that carries something beside itself. Values that carry nothing are stored as they are.
#
#   u8 codec of what is inside, u8 flags, u16 n_tags, u32 stale_ms, u32 early_ms;
#   n_tags times: u64 generation, u8 length, name; then the value inside. Little-endian, not aligned.
#
# E1  it holds no envelope; a flag that is not known, more than MOST_TAGS tags, a name of no or over TAG_BYTES bytes, or one that
#     does not end within the value: damage.
# E2  it is fresh until expiry_ms - stale_ms. In the stale_ms before its expiry only who asks for stale values is given it.
# E3  it is there for nobody if the generation of one of its tags (under TAG_PREFIX + name in the table) is not the one it carries.
# Where an envelope is not to be given (hidden), its key is absent for every operation: get, add, replace, cas, claim, delete, touch, incr, scan.
#
# Race table
#   get vs invalidate_tag       the tag's generation is read after the value: the new one hides it, the old one was good when it was read
#   get vs a tag's eviction     a generation that is not there hides all that carries it: a miss; generations are random, none comes again
#   set vs invalidate_tag       the set carries the generation that it has read: read before, it is hidden from the start; read after, it stands
#   64 writes overtake the read of a generation: a miss
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    CODEC_ENVELOPE = 5      # codec.py
    ENVELOPE_FIXED = 12     # bytes before the tags
    MOST_TAGS = 16
    TAG_BYTES = 200         # of a tag's name
    TAG_PREFIX_BYTES = 5
    HEAD_BYTES = ENVELOPE_FIXED + MOST_TAGS * (9 + TAG_BYTES)      # less than any page
    FLAG_NEGATIVE = 1       # it is known that there is nothing
    # states; the first four are codec.py's
    STATE_FRESH = 0
    STATE_STALE = 1
    STATE_NEGATIVE = 2
    STATE_GONE = 3          # a tag was invalidated
    STATE_DAMAGED = 4       # a value, for who replaces it; get says what it is
    # what a reader takes (bits)
    TAKE_EARLY = 1          # may miss a while before the fresh end
    TAKE_STALE = 2          # a stale value, too; misses are not counted

ctypedef struct envelope_t:
    uint8_t codec           # of what is inside
    uint8_t flags
    uint16_t n_tags
    uint32_t stale_ms       # before expiry_ms
    uint32_t early_ms       # XFetch's delta * beta; 0: off
    uint64_t head_bytes     # before what is inside

cdef inline bint envelope_open(const uint8_t* p, uint64_t n, envelope_t* e) noexcept nogil:
    """Read and clamp the head of n bytes that nobody changes meanwhile: False if it is damaged (E1). n may end behind the head."""
    cdef uint64_t at = ENVELOPE_FIXED
    cdef int i
    if n < ENVELOPE_FIXED:
        return False
    e.codec = p[0]
    e.flags = p[1]
    memcpy(&e.n_tags, p + 2, 2)
    memcpy(&e.stale_ms, p + 4, 4)
    memcpy(&e.early_ms, p + 8, 4)
    if e.codec >= CODEC_ENVELOPE or e.flags & ~FLAG_NEGATIVE or e.n_tags > MOST_TAGS:
        return False
    for i in range(e.n_tags):
        if n - at < 9 or p[at + 8] == 0 or p[at + 8] > TAG_BYTES or n - at - 9 < p[at + 8]:
            return False
        at += 9 + p[at + 8]
    e.head_bytes = at
    return True
