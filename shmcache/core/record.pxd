# A record: an item, or what happened to one, as snapshots, the log and dumps hold it. supervisor/format.py documents it (RECORD).
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

ctypedef struct record_t:   # 32 bytes, then the key, then the value; nothing between, nothing aligned
    uint64_t version
    uint64_t expires_ms     # wall clock; 0: never
    uint32_t value_bytes
    uint32_t stripe         # of the segment that it comes from
    uint32_t epoch
    uint16_t key_bytes
    uint8_t codec
    uint8_t op              # RECORD_*; of RECORD_SET the CLOCK count in bits 4 and 5; RECORD_COPY_TTL, RECORD_DIRTY

cdef enum:
    RECORD_SET = 0
    RECORD_DELETE = 1
    RECORD_EXPIRY = 2
    RECORD_CLEAR = 3
    RECORD_GAP = 5      # in files only: so many operations (version) before it are not in the log
    RECORD_REF = 4      # in a ring only: of a SET whose value is to be fetched from the table
    RECORD_COPY_TTL = 64    # with all that have a time: write-back, and it is that of the copy (FLAG_COPY_TTL)
    RECORD_DIRTY = 128  # with RECORD_SET or RECORD_REF: write-back, and the store had not got it yet
