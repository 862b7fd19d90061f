from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from shmcache.core.envelope cimport envelope_t
from shmcache.core.layout cimport header_t, row_t, seg_t
from shmcache.core.ring cimport log_t
from shmcache.core.table cimport claim_t, put_t, read_t


cdef class Mapping:
    cdef seg_t s
    cdef readonly str name
    cdef readonly int exports       # buffers that numpy views hold
    cdef readonly int handles       # open Tables
    cdef dict locks                 # key: (version, by when its time is over on the monotonic clock) of locks that this process has taken
                                    # and not given back, to name them at close(): some are over, or not this process's any more
    cdef Py_ssize_t most_locks      # that many: forget those that are over
    cdef row_t no_row               # what a fork child counts in that has found no row free
    cdef uint64_t row_wanted_ns     # when it looked for one last
    cdef void* restore_page         # this process restores the segment: what holds its byte (hold_byte)
    cdef uint64_t restorer          # token of the process that mapped that page
    cdef object __weakref__
    cdef int note_lock(self, bytes key, uint64_t version, double seconds) except -1
    cdef int forget_lock(self, bytes key, uint64_t version) except -1
    cdef list locks_held(self)
    cpdef end_restore(self)
    cdef int revive(self) except -1
    cdef int stand_by(self) except -1
    cdef bint geometry_sound(self, header_t* h, uint64_t size)


cdef class WritableView:
    cdef Mapping mapping


cdef class Encoded:
    cdef int codec
    cdef bytes payload
    cdef uint32_t stale_ms


cdef class Bound:
    cdef object f
    cdef tuple names
    cdef tuple values
    cdef object call(self, object x)


cdef void buried(put_t* op) noexcept

cdef int fail(int rc) except -100

cdef int waits_for(const claim_t* whose) except 0

cdef class Table:
    cdef seg_t* s                   # NULL: closed
    cdef readonly Mapping mapping   # None: closed
    cdef readonly str name
    cdef int in_flight              # calls of this handle that run without the GIL
    cdef uint64_t life              # the token for which in_flight counts: a fork child starts at 0
    cdef public Bound _unpack       # of msgpack's bytes: a codec's own, so that a hit runs no Python frame (its errors go through
                                    # _undecoded()); None: by _decode()
    cdef public bint _reads_through  # a miss of get() is answered by _load_missing(key, default)
    cdef object idle                # set by the last of them when close() waits
    cdef bint impatient      # an event loop's: a write that would wait raises WouldWait, and nothing is changed
    cdef uint64_t rolled            # hash ^ version of the item that get has last missed early
    cdef uint64_t rolls
    cdef uint64_t noted             # impatient: the ring's end that what was done with the log's policy always wants durable
    cdef uint32_t cleared           # by clear_held(): the epoch that the policy always wants durable; 0: none
    cdef int room_in_log(self, seg_t* s, Mapping held, log_t* log, uint64_t n) except -1
    cdef bint clear_held(self) except -1
    cdef int wait_cleared(self) except -1
    cdef int note_log(self, log_t* log) except -1
    cdef uint64_t take_log(self)
    cdef seg_t* ready(self) except NULL
    cdef seg_t* ready_to_read(self) except NULL
    cdef void enter(self, seg_t* s)
    cdef int leave(self) except -1
    cdef object read(self, object key, object default, uint64_t* version)
    cdef object read_taking(self, object key, int take, uint64_t* version, int* state)
    cdef object read_hashed(self, seg_t* s, const uint8_t* k, size_t n, uint64_t h, object default, uint64_t* version, int take, int* state)
    cdef void note_hidden(self, seg_t* s, const uint8_t* k, size_t n, uint64_t h, read_t* r, int take, int* state)
    cdef object decoded(self, int codec, const uint8_t* p, uint64_t n)
    cdef bint given(self, seg_t* s, read_t* r, const uint8_t* p, int take, envelope_t* e) except -1
    cdef bint rolled_early(self, seg_t* s, read_t* r, envelope_t* e, int take)
    cdef int copy_out(self, seg_t* s, read_t* r, uint8_t* to) except -1
    cdef int copy_long(self, seg_t* s, read_t* r, uint8_t* to) except -1
    cdef object take_value(self, seg_t* s, read_t* r, int take, uint64_t* version, int* rc)
    cdef object read_locked(self, seg_t* s, const uint8_t* key, size_t n, uint64_t h, object default, uint64_t* version, int take,
                            int* state)
    cdef object store_view(self, object value, put_t* op, int64_t* number)
    cdef int check_fills(self, seg_t* s, const uint8_t* key) except -1
    cdef int store(self, object key, object value, object ttl, int when, uint64_t version, uint64_t* stored) except -100
    cdef int secure(self, seg_t* s, Mapping held, log_t* log, uint64_t n, uint64_t least=*) except -1
    cdef int wait_ring(self, seg_t* s, Mapping held, uint64_t n, uint64_t end) except -100
    cdef void over(self, seg_t* s, log_t* log, bint done)
    cdef int durable(self, seg_t* s, Mapping held, log_t* log) except -1
    cdef int forked(self, seg_t* s, Mapping held, log_t* log) except -1
    cdef int clear_logged(self, seg_t* s, Mapping held, uint32_t epoch) except -1
    cdef int store_logged(self, object key, object value, object ttl, int when, uint64_t version, uint64_t* stored, log_t* log) except -100
    cdef bytes carried(self, object tags, bytes head)
    cdef int generation(self, const uint8_t* key, size_t n, uint64_t* to, log_t* log) except -100
    cdef int draw(self, const uint8_t* key, size_t n, int when, uint64_t version, uint64_t* to, log_t* log) except -100
    cdef int store_tagged(self, object key, object value, object ttl, object tags, int when, uint64_t version) except -100
    cdef Encoded wrapped(self, object value, bytes head, uint32_t stale_ms, uint32_t early_ms, int flags)
    cdef int remove_logged(self, object key, uint64_t version, log_t* log) except -100
    cdef int put_view(self, seg_t* s, put_t* op) except -100
    cdef int put_now(self, seg_t* s, put_t* op) except -100
    cdef int64_t claim_into(self, object key, double seconds, bint lock, uint64_t* version, claim_t* noted) except -100
    cdef tuple mark_into(self, object key, double seconds, bint alone, uint64_t version, claim_t* whose)
    cdef int give_back(self, object key, uint64_t version, bint known) except -100
    cdef int wait_stored(self, seg_t* s, Mapping held) except -1
    cdef int bury(self, seg_t* s, const uint8_t* key, size_t n, uint64_t h, uint64_t version, log_t* log) except -100
    cdef int discard_view(self, seg_t* s, Mapping held, const uint8_t* key, size_t n, log_t* log) except -100
    cdef int remove_now(self, seg_t* s, Mapping held, const uint8_t* key, size_t n, uint64_t h, uint64_t version,
                        bint only_expired, log_t* log) except -100
    cdef int remove_key(self, object key, uint64_t version) except -100
    cdef int remove_view(self, seg_t* s, Mapping held, const uint8_t* key, size_t n, uint64_t h, uint64_t version,
                         bint only_expired, log_t* log) except -100
    cdef int add_view(self, seg_t* s, Mapping held, const uint8_t* key, size_t n, uint64_t h, int64_t by, int64_t* out,
                      log_t* log) except -100
    cdef int change_expiry(self, object key, uint64_t expiry_ms, bint copy_ttl) except -100
    cdef int change_expiry_view(self, seg_t* s, Mapping held, const uint8_t* key, size_t n, uint64_t h, uint64_t expiry_ms,
                                bint copy_ttl, log_t* log) except -100
    cdef bint interrupted(self, seg_t* s, Mapping held) except -1
    cdef bint row_alive(self, seg_t* s, uint32_t i)
    cdef int kept(self, seg_t* s, uint32_t r, uint64_t addr)
