# cython: binding=False, boundscheck=False, wraparound=False, cdivision=True
"""The Redis protocol, parsed and executed on the segment: `Executor`, one per event loop, and `Client`, one per connection.

A read's bytes go once through Client.feed(): each command that is whole is executed where it stands, its arguments pointers into the
read buffer, its reply appended to one output buffer, which is sent at the end. What Redis' users call often is compiled here; the rest
(COMMANDS, kind PYTHON) is called with bytes objects, sidecar/commands/.

Rules
- nothing that a client sends is believed: lengths are clamped before they are used, no buffer grows beyond its limit
- the loop's thread never waits: what finds a lock busy, or the log full, raises WouldWait before it has changed anything, and the whole
  command is run again by a thread of the pool, which may wait (Client.retry)
- replies leave in the order of the commands. With the log's policy `always` they are kept until what they acknowledge is durable
- an argument points into the read buffer, or into `pending`: both stand still while a command runs
- in front of a store (Executor.backed) a miss in the loop is no miss: WouldWait, and the pool loads it (sidecar/backed.py). A thread of the
  pool knows what is there, and what it does not find of that was evicted: an error, never a wrong reply
"""
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy, memmove, memset
from posix.unistd cimport usleep

from shmcache.core._core cimport Mapping, Table, buried
from shmcache.core.atomics cimport fence_acquire, ld32, ld32r, ld64, ld64r, ldi64r, likely, prefetch, sub64, unlikely
from shmcache.core.bucket cimport bucket_of, epoch_of, pthread_self, stripe_of, stripe_release, stripe_take
from shmcache.core.clock cimport now_ms
from shmcache.core.databases cimport is_others, tag_of
from shmcache.core.envelope cimport CODEC_ENVELOPE, STATE_FRESH, STATE_NEGATIVE, STATE_STALE, envelope_open, envelope_t
from shmcache.core.dirty cimport writes_back
from shmcache.core.layout cimport DATABASES, FLAG_COPY_TTL, FLAG_RAW, LOG_ALWAYS, LOG_OFF, MAX_KEY, POLICY_BACK, SLOTS, bucket_t, seg_t, stripe_t
from shmcache.core.lock cimport wait_until
from shmcache.core.number cimport shm_digits, shm_number
from shmcache.core.ring cimport log_t, record_room, ring_of, ring_release, ring_secure, take_kept
from shmcache.core.siphash cimport siphash13
from shmcache.core.sizes cimport IF_DEAD, has_first, size_counted, size_said, sized_t, take_for_size
from shmcache.core.table cimport (
    ALWAYS, FRESH, IF_ABSENT, IF_PRESENT, IF_VERSION, LARGE_COPY, RESTARTS, count_items, envelope_state, next_keys, passes_by, prefetch_item, put_t, read_begin, read_copy, read_end, read_generation, read_t, remove)
from shmcache.core.token cimport ABSENT, AGAIN, BUSY, EXISTS, INTR, MISMATCH, NO_ROOM, NO_STORE, OK, OVERFLOW, mono_ns, wall_ns

import threading
from os import register_at_fork, urandom

from shmcache import errors
from shmcache.core._core import WouldWait

HOLDING = threading.Lock()      # one thread of a process holds several stripes at a time

class HeldByOthers(errors.StripeBusy):
    """HOLDING was not let go of in time: nothing is said of the keys."""

def _after_fork_in_child():
    """The thread that had it may not be there."""
    global HOLDING
    HOLDING = threading.Lock()

register_at_fork(after_in_child=_after_fork_in_child)

cdef extern from "sys/socket.h" nogil:
    ssize_t send(int fd, const void* buf, size_t n, int flags)
    enum: MSG_DONTWAIT, MSG_NOSIGNAL

cdef extern from *:
    """
    static uint32_t shm_name_hash(const uint8_t *p, size_t n) {
        uint32_t h = 2166136261u;
        for (size_t i = 0; i < n; i++) h = (h ^ (uint32_t)(p[i] | 0x20)) * 16777619u;
        return h;
    }
    static int shm_same_name(const uint8_t *p, const char *name, size_t n) {
        for (size_t i = 0; i < n; i++) {
            uint8_t c = p[i];
            if (c >= 'A' && c <= 'Z') c |= 0x20;
            if (c != (uint8_t)name[i]) return 0;
        }
        return 1;
    }
    """
    uint32_t shm_name_hash(const uint8_t* p, size_t n) nogil
    bint shm_same_name(const uint8_t* p, const char* name, size_t n) nogil

cdef enum:
    READ_BYTES = 65536          # of the loop's read buffer
    INLINE_MAX = 65536          # of a line that has no end yet
    MOST_ARGS = 1048576
    OUT_LIMIT = 1 << 30         # bytes of output of one client
    OUT_MOST = 1 << 20          # bytes of output before it is sent in the middle of a pipeline
    DATABASE_PREFIX = 18        # bytes that a key of a database begins with: b"\0ns\0db:15\0" and a generation
    PREFIX_MOST = 64            # bytes before a key of a database that is not the first
    OUT_KEPT = 16384            # a larger output buffer is freed when it is empty
    TABLE_SLOTS = 1024          # of the table of command names; a power of two
    NAME_MAX = 32
    CODEC_BYTES = 0
    CODEC_INT = 2
    VERBATIM = 2                # look(): with its envelope, for put_copy
    RAW = 256                   # with a codec: FLAG_RAW
    UNKNOWN = 2                 # finish_raw(): a miss, of which nobody has said that the store has not got it either
    LOADS = 1                   # Executor.backed, of a loop
    KNOWS = 2                   # of a thread of the pool, between know() and forget()
    # of a stripe that does not know its size (add_sizes)
    WAITING             # for its lock, as long as a call does
    TRYING              # so long that a dead holder is found; then it is what the counts say
    BRIEFLY             # its lock is only tried (IF_DEAD), and that until BRIEFLY_NS have gone: then, too; 0, if these are another generation's
    TRYING_NS = 2_000_000
    BRIEFLY_NS = 10_000_000
    LOOKS_BEFORE_STRIPES = 128  # keys()
    DRAWS_AT_ONCE = 8           # renew(): generations that are tried, until all stripes of the keys are to be had
    DRAW_US = 100               # between so many and as many more
    DRAW_NS = 8_000_000         # until this is over; but so many at once are tried at least, however little of the CPU there is
    LOOKS_BETWEEN_CLOCKS = 256
    CLOCK_SLACK = 5             # ms by which two readings of an expiry may differ

cdef const uint64_t NEVER = <uint64_t>-1      # an expiry: none, whatever the segment's default is
cdef const uint64_t GIVEN = <uint64_t>0x8000000000000000    # in the version of a value that is not in the segment (Executor.know)

# what a command is: executed here, or in Python
cdef enum:
    C_PYTHON, C_GET, C_SET, C_SETNX, C_SETEX, C_PSETEX, C_GETSET, C_GETDEL, C_GETEX, C_MGET, C_MSET, C_APPEND, C_STRLEN, C_GETRANGE,
    C_SETRANGE, C_INCR, C_DECR, C_INCRBY, C_DECRBY, C_SETBIT, C_GETBIT, C_DEL, C_EXISTS, C_TTL, C_PTTL, C_EXPIRETIME, C_PEXPIRETIME,
    C_EXPIRE, C_PEXPIRE, C_EXPIREAT, C_PEXPIREAT, C_PERSIST, C_TYPE, C_PING, C_ECHO, C_MSETNX, C_RENAME, C_RENAMENX, C_COPY

COMPILED = {
    "get": C_GET, "set": C_SET, "setnx": C_SETNX, "setex": C_SETEX, "psetex": C_PSETEX, "getset": C_GETSET, "getdel": C_GETDEL,
    "getex": C_GETEX, "mget": C_MGET, "mset": C_MSET, "append": C_APPEND, "strlen": C_STRLEN, "getrange": C_GETRANGE,
    "substr": C_GETRANGE, "setrange": C_SETRANGE, "incr": C_INCR, "decr": C_DECR, "incrby": C_INCRBY, "decrby": C_DECRBY,
    "setbit": C_SETBIT, "getbit": C_GETBIT, "del": C_DEL, "unlink": C_DEL, "exists": C_EXISTS, "touch": C_EXISTS, "ttl": C_TTL,
    "pttl": C_PTTL, "expiretime": C_EXPIRETIME, "pexpiretime": C_PEXPIRETIME, "expire": C_EXPIRE, "pexpire": C_PEXPIRE,
    "expireat": C_EXPIREAT, "pexpireat": C_PEXPIREAT, "persist": C_PERSIST, "type": C_TYPE, "ping": C_PING, "echo": C_ECHO,
    "msetnx": C_MSETNX, "rename": C_RENAME, "renamenx": C_RENAMENX, "copy": C_COPY,
}

# flags of a command
cdef enum:
    F_NOAUTH = 1        # allowed before AUTH
    F_IN_MULTI = 2      # executed at once inside MULTI, not queued
    F_IN_PUBSUB = 4     # allowed on a RESP2 connection that has subscriptions
    F_WRITE = 8
    F_PUSHES = 32       # what it sends are pushes: not held back by CLIENT REPLY OFF
    F_FREE = 16         # also while the connection is being asked nothing else (CLIENT REPLY, RESET, QUIT)
    F_KEYLESS = 64      # it has nothing to do with the keys of its connection's database
COUNTED = DATABASES             # so many databases, from the first on, know their sizes
FLAGS = {"no_auth": F_NOAUTH, "in_multi": F_IN_MULTI, "in_pubsub": F_IN_PUBSUB, "write": F_WRITE, "free": F_FREE, "pushes": F_PUSHES,
         "keyless": F_KEYLESS}

ctypedef struct name_t:
    char name[NAME_MAX]
    uint32_t n                  # bytes of the name; 0: no command
    int index                   # of Executor.names
    int kind                    # C_*
    int arity                   # as Redis counts: with the name, negative: at least
    int flags

ctypedef struct stat_t:         # of one command, in the whole event loop
    uint64_t calls
    uint64_t ns
    uint64_t rejected           # refused before they ran
    uint64_t failed             # answered with an error

ctypedef struct arg_t:
    uint64_t at                 # from the beginning of what is parsed
    uint64_t n


class ProtocolError(Exception):
    """What was sent is not the protocol: the reply, after which the connection is closed."""


cdef class Executor:
    """What all connections of one event loop share: the table, the read buffer, the commands.

    Args: table: a Cache, a handle of its own. commands: {name: (arity, flags, callable or None)}, in lower case; the callable of one that is not
    COMPILED is called with (client, [arguments]) and returns the reply, or None. impatient: it is an event loop's, and its calls do not
    wait. databases: what SELECT chooses from.
    """
    cdef readonly Table table
    cdef Mapping mapping
    cdef seg_t* s
    cdef name_t slots[TABLE_SLOTS]
    cdef readonly list names            # by index: (name, callable)
    cdef uint8_t* read_buffer
    cdef const uint8_t** argv
    cdef size_t* argl
    cdef size_t room                    # of both
    cdef size_t argc
    cdef int64_t offset                 # unix time - the segment's time, ms: steady, so that a time that was set reads as it was set; rounded up, so
                                        # that an expiry is not later than it was said
    cdef uint8_t* scratch               # a value that is being changed
    cdef uint64_t room_scratch
    cdef stat_t* stats                  # by index
    cdef readonly dict errors           # error replies, by their first word
    cdef readonly uint64_t commands     # executed in all
    cdef readonly uint64_t bytes_in
    cdef readonly uint64_t bytes_out
    cdef public bint watched            # every command is told to `monitor` before it runs
    cdef public uint64_t slower_than_ns # a command that takes so long is told to `slow`
    cdef public object slow
    cdef public object defer            # called with (client): run its command in the pool
    cdef public object held             # called with (client, end): keep its replies until the ring is durable up to end
    cdef public bint locked             # no client may run anything but F_NOAUTH before it is authenticated
    cdef public uint64_t most_pending   # bytes that are kept of what a client has sent and is not executed
    cdef readonly int64_t tick_ms       # the segment's clock at the last tick(): as fine as idle times have to be
    cdef public int64_t paused_until    # ms, monotonic: CLIENT PAUSE. Of a pool's: its loop's, while it runs a command
    cdef public bint paused_writes_only
    cdef object lock                    # HOLDING, as it was when
    cdef list holding                   # hold() took stripes of these numbers,
    cdef list further                   # and of these, which let_go() gives back before the others (None: of none),
    cdef bint alone                     # or there are no others,
    cdef uint64_t holder                # and with which token: a fork child has none of them
    cdef bint was_impatient             # before
    cdef object own                     # (db, key) pairs: hold() was for these,
    cdef public object others           # and for these, among those of hold_further(): renew()
    cdef bint is_final                  # it is a transaction's step
    cdef public bint goes_on            # it is a script's, which cannot begin again
    cdef uint64_t was_held[1024]        # at empty_held(), as seg_t.held
    cdef dict drawn                     # draw_ahead(): what keys of a database will begin with after each flush of it; in order, by database
    cdef readonly int db                # whose keys are meant
    cdef size_t n_prefix                # of `named`: what the keys of this database begin with
    cdef uint8_t named[MAX_KEY + PREFIX_MOST]
    cdef dict pinned                    # by database, while stripes are held or about to be: what its keys begin with (`named`)
    cdef readonly int databases
    cdef uint16_t* some                 # ask_stripes()
    cdef readonly uint64_t held_ns      # when it did, on the monotonic clock
    cdef readonly int backed            # 0: as if there was no store behind the segment; LOADS, KNOWS
    cdef readonly int put_off           # flags of commands that the pool runs for clients of the first database
    cdef readonly bint lost             # KNOWS: a key that is there was not found
    cdef bint takes_stale               # a stale value is one
    cdef dict there                     # KNOWS: the segment's keys that are there: when they expire, the segment's time; 0: never
    cdef set changed                    # KNOWS: those that were written or removed since
    cdef bytes aside                    # KNOWS: what the keys of the first database begin with instead; None: nothing
    cdef dict given                     # KNOWS: the segment's keys that are there and cannot be cached: (value, the segment's time, error)

    def __cinit__(self, Table table not None, dict commands, *, bint impatient=True, int databases=1):
        cdef uint32_t i
        cdef name_t* slot
        cdef bytes encoded
        self.table = table
        self.mapping = table.mapping
        self.s = table.ready()
        self.names = []
        self.own = self.others = ()
        self.drawn = {}
        self.read_buffer = <uint8_t*>malloc(READ_BYTES)
        self.room = 64
        self.argv = <const uint8_t**>malloc(self.room * sizeof(void*))
        self.argl = <size_t*>malloc(self.room * sizeof(size_t))
        self.room_scratch = 1024
        self.scratch = <uint8_t*>malloc(self.room_scratch)
        if self.read_buffer == NULL or self.argv == NULL or self.argl == NULL or self.scratch == NULL:
            raise MemoryError
        memset(self.slots, 0, sizeof(self.slots))
        self.stats = <stat_t*>calloc(len(commands) + 1, sizeof(stat_t))
        if self.stats == NULL:
            raise MemoryError
        self.errors = {}
        self.slower_than_ns = <uint64_t>-1
        for name, (arity, flags, run) in commands.items():
            encoded = name.encode()
            if not 0 < len(encoded) < NAME_MAX or len(commands) > TABLE_SLOTS // 2:
                raise ValueError(f"{name!r}: too long a name, or too many commands")
            i = shm_name_hash(encoded, len(encoded)) & (TABLE_SLOTS - 1)
            while self.slots[i].n:
                i = (i + 1) & (TABLE_SLOTS - 1)
            slot = &self.slots[i]
            memcpy(slot.name, PyBytes_AS_STRING(encoded), len(encoded))
            slot.n = <uint32_t>len(encoded)
            slot.index = len(self.names)
            slot.kind = COMPILED.get(name, C_PYTHON) if run is None else C_PYTHON
            slot.arity = arity
            slot.flags = flags
            if run is None and slot.kind == C_PYTHON:
                raise ValueError(f"{name!r} is not compiled, and there is no callable for it")
            self.names.append((name, run))
        self.databases = databases
        self.most_pending = self.s.max_value_bytes + (256 << 20)
        table.impatient = impatient
        self.clock()
        self.tick()

    def tick(self):
        """The loop's timer: a tenth of a second has gone."""
        self.tick_ms = <int64_t>now_ms(self.s)

    def __dealloc__(self):
        free(self.read_buffer)
        free(self.argv)
        free(self.argl)
        free(self.scratch)
        free(self.stats)
        free(self.some)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.read_buffer, READ_BYTES, False, flags)

    def __len__(self):
        """Of the read buffer: what TLS asks for."""
        return READ_BYTES

    cdef inline void clock(self) noexcept:
        cdef int64_t ns = <int64_t>wall_ns()
        cdef int64_t offset = offset_of(self.s, ns - <int64_t>mono_ns())
        if unlikely(offset > self.offset or offset < self.offset - 1):
            self.measure()

    cdef void measure(self) noexcept:
        """Set `offset`. Between two readings of clocks this thread may be put off: the best of several, and the later that the wall's can be."""
        cdef int64_t before, wall, took, best = 0, ns = 0, offset
        cdef int i
        for i in range(8):
            before = <int64_t>mono_ns()
            wall = <int64_t>wall_ns()
            took = <int64_t>mono_ns() - before
            if i == 0 or took < best:
                best = took
                ns = wall - before
        offset = offset_of(self.s, ns)
        if offset > self.offset or offset < self.offset - 1:
            self.offset = offset

    cdef inline int64_t unix_ms(self) noexcept:
        self.clock()
        return <int64_t>now_ms(self.s) + self.offset

    cdef inline uint64_t expiry_of(self, int64_t unix_ms) noexcept:
        """The segment's time at this unix time; what is over is 1, for 0 is never."""
        self.clock()
        return <uint64_t>(unix_ms - self.offset) if unix_ms > self.offset else 1

    cdef inline int64_t unix_of(self, uint64_t expiry_ms) noexcept:
        """The unix time then; never beyond the last that an int64 holds: the clocks drift, and an expiry may be near that."""
        self.clock()
        return <int64_t>min(expiry_ms + <uint64_t>self.offset, <uint64_t>0x7fffffffffffffff)

    cdef name_t* find(self, const uint8_t* p, size_t n) noexcept:
        cdef uint32_t i = shm_name_hash(p, n) & (TABLE_SLOTS - 1)
        while self.slots[i].n:
            if self.slots[i].n == n and shm_same_name(p, self.slots[i].name, n):
                return &self.slots[i]
            i = (i + 1) & (TABLE_SLOTS - 1)
        return NULL

    cdef int grow_args(self, size_t n) except -1:
        cdef const uint8_t** argv
        cdef size_t* argl
        cdef size_t room = self.room
        if n <= room:
            return 0
        while room < n:
            room *= 2
        argv = <const uint8_t**>realloc(self.argv, room * sizeof(void*))
        if argv == NULL:
            raise MemoryError
        self.argv = argv
        argl = <size_t*>realloc(self.argl, room * sizeof(size_t))
        if argl == NULL:
            raise MemoryError
        self.argl = argl
        self.room = room
        return 0

    cdef int grow_scratch(self, uint64_t n) except -1:
        cdef uint8_t* larger
        if n > self.room_scratch:
            larger = <uint8_t*>realloc(self.scratch, n)
            if larger == NULL:
                raise MemoryError
            self.scratch = larger
            self.room_scratch = n
        return 0

    cdef void shrink(self) noexcept:
        """After a command that no other is part of: memory that a large one needed is given back."""
        cdef void* smaller
        self.argc = 0
        if self.room_scratch > 1 << 20:
            free(self.scratch)
            self.room_scratch = 1024
            self.scratch = <uint8_t*>malloc(self.room_scratch)
            if self.scratch == NULL:
                self.room_scratch = 0
        if self.room > 65536:
            self.room = 64
            smaller = realloc(self.argv, self.room * sizeof(void*))
            if smaller != NULL:
                self.argv = <const uint8_t**>smaller
            smaller = realloc(self.argl, self.room * sizeof(size_t))
            if smaller != NULL:
                self.argl = <size_t*>smaller

    # -- for commands in Python: values as Redis shows them, times as unix milliseconds

    def now(self):
        """Unix time in ms, as expiry is judged by."""
        return self.unix_ms()

    def read(self, bytes key not None):
        """(value, version, unix ms at which it expires, or 0; None: as the segment's default has it for the copy; codec), or None."""
        cdef raw_t raw
        cdef const uint8_t* k = <const uint8_t*>PyBytes_AS_STRING(key)
        if not look(self, k, PyBytes_GET_SIZE(key), &raw, True):
            return None
        return (PyBytes_FromStringAndSize(<char*>raw.value, <Py_ssize_t>raw.n), raw.version,
                self.unix_of(raw.expiry_ms) if raw.expiry_ms else None if raw.of_copy else 0, raw.codec)

    def length(self, bytes key not None):
        """Bytes of its value, which is not copied; None: it is not there."""
        cdef raw_t raw
        return raw.n if look(self, <const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), &raw, False) else None

    def write(self, bytes key not None, bytes value not None, expires_ms, *, version=None, bint absent=False, int codec=CODEC_BYTES):
        """Store a value: True if it was. expires_ms: unix time; 0: never; None: as the segment's default has it. version: if the key still
        has it; absent: if it is not there. codec: CODEC_BYTES, or that with RAW."""
        return put_value(self, <const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), <const uint8_t*>PyBytes_AS_STRING(value),
                         PyBytes_GET_SIZE(value), codec, 0 if expires_ms is None else self.expiry_of(expires_ms) if expires_ms else NEVER,
                         IF_VERSION if version is not None else IF_ABSENT if absent else ALWAYS, 0 if version is None else version) == OK

    def remove(self, bytes key not None, uint64_t version=0):
        """Delete a key (of this version): True if it was there."""
        return remove_key(self, <const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), version) == OK

    # -- several keys at once

    def hold(self, keys, uint64_t log_bytes=0, *, further=(), list flushed=[], int db=-1, double within=0):
        """Take the stripes of these keys, ascending: from here to release() what this thread does to them is one step for all who write, and
        it waits where it would not. Readers never wait: they may see one key before and the next after. log_bytes: of records that will be
        logged meanwhile; 0: nothing is written. db: whose keys they are; -1: of the database in use. further: (db, key) pairs whose stripes are
        held, too, until let_go(). flushed: databases for which renew() will be called, in order, if there are keys.
        within: seconds after which it waits no more, for each thing that is in the way; 0: as the segment's lock_limit has it. Raises:
        WouldWait; StripeBusy (HeldByOthers), LogFull: nothing is held then."""
        cdef set found, more
        cdef bytes key
        keys = list(keys)
        if db >= 0:
            self.use(db)
        db = self.db
        while True:
            found, more = set(), None
            for key in keys:
                self.add_stripe(found, <const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key))
            if not further and within == 0:
                self.take_stripes(found, log_bytes)
            else:
                self.pin()
                try:
                    if keys:
                        self.draw_ahead(found, flushed, [(db, key) for key in keys])
                    more = set(self.stripes_of(further)) - found
                    self.take_stripes(found, log_bytes, more, <uint64_t>(within * 1e9))
                except BaseException:
                    self.pinned = None
                    self.drawn = {}
                    raise
            if self.is_current():
                break
            self.release()
            self.use(db)
        self.own = [(db, key) for key in keys]

    def hold_further(self, keys):
        """While stripes are held, and no writer is waited for: those of these (db, key) pairs, too, until let_go() or release(). None: they are
        held. Else one of the keys, whose stripe is somebody's: nothing is held that was not before.

        Race: these stripes come out of order, so the holder of one is not waited for: it may wait for one that is held here. clear() vs this:
        what is held has the epoch of when it was taken; once that is not the newest, others may have stored here with a newer one, and
        the stripe is as good as theirs (bucket.pxd, the invariant of counts). FLUSHDB of others vs this: so it is, once the database has another
        generation than this thread goes on with. A dead process's stripe is somebody's, until one who waits takes it over. Crash: as of hold()."""
        cdef seg_t* s = self.s
        cdef dict at = self.stripes_of(keys)
        cdef list stripes = sorted([i for i in at if not s.held[i >> 6] >> (i & 63) & 1])
        cdef list further = stripes if self.further is None else self.further + stripes
        cdef Py_ssize_t k, taken = 0
        cdef uint32_t i
        for k in range(len(stripes)):
            i = stripes[k]
            if stripe_take(s, &s.stripes[i], 0) != OK:
                break
            taken += 1
            #! hold: a further stripe taken
        if taken == len(stripes) and (taken == 0 or ld32(&s.header.epoch) == s.held_epoch and self.is_current(keys)):
            for k in range(taken):
                i = stripes[k]
                s.held[i >> 6] |= <uint64_t>1 << (i & 63)
            self.further = further
            #! hold: further stripes held
            return None
        for k in range(taken):
            i = stripes[k]
            stripe_release(s, &s.stripes[i])
            #! hold: a further stripe given back
        return at[stripes[min(taken, len(stripes) - 1)]]

    cdef bint is_current(self, keys=None) except -1:
        """Have the databases of these (db, key) pairs (None: all that are pinned) the generations still that this thread goes on with? Asked when
        stripes have been taken: who had them before may have flushed a database, and gone on with the same keys under another generation."""
        cdef set of = None if keys is None else {db for db, _ in keys}
        cdef bytes prefix
        cdef uint64_t generation = 0
        cdef Py_ssize_t n
        for db, prefix in self.pinned.items():
            if db and (of is None or db in of):
                n = PyBytes_GET_SIZE(prefix) - 9
                if read_generation(self.s, <const uint8_t*>PyBytes_AS_STRING(prefix), n, &generation) != OK or \
                        memcmp(&generation, PyBytes_AS_STRING(prefix) + n + 1, 8):
                    return False
        return True

    def renew(self, int d=0):
        """While stripes are held: what this step's FLUSHDB of database d does, which is not the first; 0: its FLUSHALL. The step holds its keys all
        the while: those of hold() or transact(), and `others`. A key of another database than the first is in another stripe afterwards.

        Invariant: when a generation is to be seen, this thread holds the stripes of all of the step's keys under it, and that of the generation's
        key. So it draws the generation first, takes these stripes, out of order and therefore by trying, and stores it then. Nobody else can
        have a key under it before. If one is busy it draws again, for some milliseconds: then the keys are in other stripes, and who was about to
        store a generation has done so. transact() has drawn, and holds these stripes from its start.
        Race: another stores a generation, before: this one replaces it. After FLUSHALL another finds no generation, and would store one if there
        is none: it waits for the generation's stripe, and finds this one. Who has read the former generation, and waits for a stripe of the
        step: whoever takes several stripes looks again (is_current), and compiled_held(). A worker's call does not, nor MSET, DEL, or a command
        that is not compiled: it is done to what is gone.
        FLUSHDB or FLUSHALL of others, since the step took its stripes: what it has read is from before that, what others have stored is not. So a
        script ends here. If a script or transaction cannot begin again its FLUSHDB stores nothing, for all of it is before that and gone. A
        transaction's FLUSHALL removes what others have stored since, too. Behind it this step is before that, and all of it is gone.
        Crash: stripes taken, nothing stored: each is free again, nothing has happened. FLUSHALL done, a generation not stored: the database is
        empty, and the next one who needs it draws one. Stored: as of any step.
        Raises: CommandError, LogFull: nothing was changed. A failure behind the clear of FLUSHALL: the step goes on without holding its keys."""
        cdef seg_t* s = self.table.ready()
        cdef int db = self.db, of, tries = 0, rc = BUSY
        cdef uint64_t until = mono_ns() + DRAW_NS
        cdef set found, more
        cdef dict prefixes = {}
        cdef bytes prefix, key
        cdef list databases = [d] if d else sorted({*self.pinned, *(of for of, _ in [*self.own, *self.others])} - {0})
        if s.held_room < len(databases) * record_room(s, DATABASE_PREFIX, 0):
            self.keep_room(len(databases) * record_room(s, DATABASE_PREFIX, 0))
        try:
            while True:
                found, more = set(), set()
                for of in databases:
                    prefixes[of] = self.drawn[of].pop(0) if self.drawn.get(of) else self.draw(of)
                    self.stripes_under(found, of, prefixes[of], self.own)
                    self.stripes_under(more, of, prefixes[of], self.others)
                rc = self.take_renewed(found, more - found, databases, d == 0)
                tries += 1
                if rc != BUSY:
                    break
                if tries % DRAWS_AT_ONCE == 0:
                    if mono_ns() > until:
                        break
                    with nogil:                     # to have the GIL back may take 5 ms each time, with stripes held
                        usleep(DRAW_US)
            if rc == MISMATCH and d and (self.is_final or self.goes_on):    # nothing is stored: it would be gone with all else of this step
                self.pinned[d] = prefixes[d]
                return
            if rc != OK:
                raise CommandError(b"TRYAGAIN others hold locks that this command needs, or have flushed meanwhile; nothing was changed")
            if d == 0:
                self.pinned.clear()
            for of, prefix in prefixes.items():
                key = prefix[:-9]
                self.n_prefix = 0
                put_value(self, <const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key),
                          <const uint8_t*>PyBytes_AS_STRING(prefix) + PyBytes_GET_SIZE(prefix) - 8, 8, CODEC_BYTES, NEVER, ALWAYS, 0, FRESH)
                #! renew: a generation stored
                self.pinned[of] = prefix
        finally:
            self.use(db)

    cdef int draw_ahead(self, set found, list flushed, list keys) except -1:
        """Of a step, before it takes stripes: what renew() will need for each of these flushes."""
        cdef int d, of, db = self.db
        cdef bytes prefix
        self.drawn = {}
        for d in flushed:
            if len(found) == <Py_ssize_t>self.s.n_stripes:      # whatever is drawn then
                break
            for of in ([d] if d else sorted({*self.pinned, *(of for of, _ in keys)} - {0})):
                prefix = self.draw(of)
                self.drawn.setdefault(of, []).append(prefix)
                self.stripes_under(found, of, prefix, keys)
        if flushed:
            self.use(db)

    cdef bytes draw(self, int d):
        """What keys of this database would begin with."""
        return b"\0ns\0db:%d\0" % d + urandom(8)

    cdef int stripes_under(self, set found, int d, bytes prefix, keys) except -1:
        """Those of database d among these (db, key) pairs, if keys of it began so; and its generation's. use() is to be called afterwards."""
        cdef bytes key = prefix[:-9]
        cdef int db
        self.n_prefix = 0
        self.add_stripe(found, <const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key))
        self.n_prefix = PyBytes_GET_SIZE(prefix)
        memcpy(self.named, PyBytes_AS_STRING(prefix), self.n_prefix)
        for db, key in keys:
            if db == d:
                self.add_stripe(found, <const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key))

    cdef int take_renewed(self, set found, set more, list databases, bint clears) except -100:
        """Of renew(): these stripes, too, those of more until let_go(). clears: once they are taken, everything is removed. OK; BUSY: one is somebody's;
        MISMATCH: others have flushed these databases, or everything, since this thread took its stripes. If not OK nothing is held that was not
        before."""
        cdef seg_t* s = self.s
        cdef list stripes = sorted([i for i in found | more if not s.held[i >> 6] >> (i & 63) & 1])
        cdef Py_ssize_t k, taken = 0
        cdef uint32_t i
        cdef int rc = BUSY
        if self.further is None:
            self.further = []
        try:
            for k in range(len(stripes)):
                i = stripes[k]
                if stripe_take(s, &s.stripes[i], 0) != OK:
                    return BUSY
                taken += 1
                #! renew: a stripe taken
            while clears and self.is_final and not self.table.clear_held():
                s.held_epoch = ld32(&s.header.epoch)
            if not (clears and self.is_final) and (not self.is_current([(of, b"") for of in databases]) or ld32(&s.header.epoch) != s.held_epoch or
                                                   (clears and not self.table.clear_held())):
                rc = MISMATCH
                return rc
            rc = OK
            #! renew: cleared
        finally:
            for k in range(taken):
                i = stripes[k]
                if rc == OK:
                    s.held[i >> 6] |= <uint64_t>1 << (i & 63)
                    (self.holding if i in found else self.further).append(i)
                else:
                    stripe_release(s, &s.stripes[i])
                    #! renew: a stripe given back
        # let_go() is not to let go of what has become one of the step's own
        self.holding += [i for i in self.further if i in found]
        self.further = [i for i in self.further if i not in found]
        #! renew: stripes held
        return OK

    def shed(self, keys):
        """After renew(), of a step that will not flush as often as it has drawn: let go of the stripes in which none of the keys of hold() is any more,
        nor of these (db, key) pairs, which stay held until let_go()."""
        cdef seg_t* s = self.s
        cdef int db = self.db
        cdef dict own = self.stripes_of(self.own), others = self.stripes_of(keys)
        cdef list kept = []
        cdef uint32_t i
        for i in self.holding or ():
            if i in own:
                kept.append(i)
                continue
            if i in others and self.further is not None:
                self.further.append(i)
                continue
            s.held[i >> 6] &= ~(<uint64_t>1 << (i & 63))
            if s.me[0] == self.holder:      # else it is a fork child, as in release()
                stripe_release(s, &s.stripes[i])
            #! shed: a stripe released
        if self.has_stripes():
            self.holding = kept
        self.use(db)

    def let_go(self):
        """Of the further stripes; if hold() took no others, this is release()."""
        cdef seg_t* s = self.s
        cdef uint32_t i
        cdef Py_ssize_t k
        if self.further is None:
            return
        if self.alone:
            self.release()
            return
        for k in range(len(self.further)):
            i = self.further[k]
            s.held[i >> 6] &= ~(<uint64_t>1 << (i & 63))
            if s.me[0] == self.holder:      # else it is a fork child, as in release()
                stripe_release(s, &s.stripes[i])
            #! let go: a stripe released
        self.further = None

    def versions(self, keys):
        """Of these (db, key) pairs, as version() has them; not counted as reads."""
        return self.of_each(keys, True)

    def value_sizes(self, keys):
        """Bytes of the values of these (db, key) pairs, 0 of what is not there; not counted as reads."""
        return self.of_each(keys, False)

    cdef list of_each(self, keys, bint versions):
        cdef seg_t* s = self.s
        cdef uint64_t hits = s.row.hits, misses = s.row.misses
        cdef list found = []
        cdef raw_t raw
        cdef bytes key
        cdef int db
        for db, key in keys:
            if db != self.db or self.pinned is None:
                self.use(db)
            if not look(self, <const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), &raw, False):
                found.append(0)
            else:
                found.append(self.version_of(&raw) if versions else raw.n)
        s.row.hits = hits
        s.row.misses = misses
        return found

    cdef dict stripes_of(self, keys):
        """The numbers of the stripes of (db, key) pairs, each with one of its keys."""
        cdef dict at = {}
        cdef set found
        cdef bytes key
        cdef int db
        for db, key in keys:
            if db != self.db:
                self.use(db)
            found = set()
            self.add_stripe(found, <const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key))
            for i in found:
                at[i] = key
        return at

    cdef int add_stripe(self, set found, const uint8_t* key, size_t n) except -1:
        cdef seg_t* s = self.s
        if fits(self, &key, &n):
            found.add(stripe_of(s, bucket_of(s, siphash13(key, n, s.k0, s.k1))) - s.stripes)
        return 0

    cdef int take_stripes(self, set found, uint64_t log_bytes, set more=None, uint64_t within_ns=0) except -1:
        """hold(). From the first stripe on no Python code runs in here: other threads have no turn while stripes are held, unless one is waited
        for."""
        cdef seg_t* s = self.table.ready()
        cdef list base = sorted(found), further = None if more is None else list(more), stripes = base if more is None else sorted(found | more)
        cdef Py_ssize_t k, taken = 0
        cdef uint32_t i
        cdef uint64_t until = 0
        cdef int rc = OK
        cdef bint were_pinned = self.pinned is not None
        cdef object lock = HOLDING
        cdef log_t log
        log.bytes = 0
        if log_bytes:
            self.table.room_in_log(s, self.mapping, &log, log_bytes)    # what is waited for is not waited for with HOLDING
            ring_release(s, &log)
        if within_ns == 0:
            if not lock.acquire(not self.table.impatient):
                raise WouldWait
        elif not lock.acquire(True, within_ns / 1e9):
            raise HeldByOthers("another command of this process holds several locks: try again")
        try:
            self.table.ready()          # a signal's handler may have forked: no lock is taken with a token of 0
            if log_bytes:
                self.table.room_in_log(s, self.mapping, &log, log_bytes)
            self.pin()
        except BaseException:
            ring_release(s, &log)
            lock.release()
            raise
        for k in range(len(stripes)):
            i = stripes[k]
            rc = stripe_take(s, &s.stripes[i], 0)
            while rc != OK and not self.table.impatient:
                until = until or (min(wait_until(s), mono_ns() + within_ns) if within_ns else wait_until(s))
                with nogil:
                    rc = stripe_take(s, &s.stripes[i], until)
                if rc != INTR:
                    break
            if rc != OK:
                break
            taken += 1
            #! hold: a stripe taken
        if rc == OK:
            memset(s.held, 0, sizeof(s.held))
            for k in range(taken):
                i = stripes[k]
                s.held[i >> 6] |= <uint64_t>1 << (i & 63)
            #! hold: all taken
            s.held_epoch = ld32(&s.header.epoch)
            s.held_room = log.bytes
            s.holder = pthread_self()
            self.holder = s.me[0]
            self.holding = base
            self.further = further
            self.alone = further is not None and not base
            self.lock = lock
            #! hold: held
            self.was_impatient = self.table.impatient
            self.table.impatient = False
            self.held_ns = mono_ns()
            return 0
        for k in range(taken):
            i = stripes[k]
            stripe_release(s, &s.stripes[i])
            #! hold: a stripe given back
        ring_release(s, &log)
        lock.release()
        if not were_pinned:
            self.pinned = None
        if self.table.impatient:
            raise WouldWait
        raise errors.StripeBusy("a living process holds a lock that this call needs and does not run: try again")

    def release(self):
        """Let go of what hold() took. In a fork child (of a command that is not compiled, or of a signal's handler) it is the parent's: its stripes
        stay taken, and what it was about to do there stays noted."""
        cdef seg_t* s = self.s
        cdef uint32_t i
        cdef Py_ssize_t k
        #! release: begun
        s.holder = 0
        if s.me[0] == self.holder:
            sub64(&s.ring_reserved, s.held_room)
            s.held_room = 0
            for k in range(len(self.holding)):
                i = self.holding[k]
                stripe_release(s, &s.stripes[i])
                #! release: a stripe released
            for k in range(0 if self.further is None else len(self.further)):
                i = self.further[k]
                stripe_release(s, &s.stripes[i])
                #! release: a further stripe released
        self.holding = self.further = None
        self.own = ()
        self.drawn = {}
        self.is_final = False
        self.pinned = None
        self.table.impatient = self.was_impatient
        self.lock.release()

    def wait_cleared(self):
        """After release(), with the policy always: until a FLUSHALL of this thread's step is durable. Raises: NotDurable."""
        self.table.wait_cleared()

    @property
    def holds(self):
        """Does this thread hold stripes?"""
        return self.has_stripes()

    cdef bint has_stripes(self) noexcept:
        return self.s.holder == pthread_self() and self.s.me[0] == self.holder

    # -- in front of a store

    def stand_before(self, int put_off):
        """Of a loop: a miss may be in the store. put_off: flags of commands that the pool runs at once."""
        self.backed = LOADS
        self.put_off = put_off

    def know(self, dict there not None, bytes aside=None, bint takes_stale=False, dict given not None={}):
        """Of a thread of the pool: these keys are there, each with the unix ms at which it expires (0: never, or not known). Till forget() a miss of
        one of them is an error, and lost. aside: put before each key of the first database, so that commands run on copies: what they write
        gets no default ttl. takes_stale: of values that are stale, too. given: keys that are there and not in the segment: (value, unix ms, why
        not). A command reads them as if they were; it changes them only aside (else that error is raised), or by a value that knows nothing
        of theirs, or by a delete."""
        cdef bytes key
        self.given = {key: (value, self.expiry_of(at) if at else 0, why) for key, (value, at, why) in given.items()}
        self.there = {key: self.expiry_of(at) if at else 0 for key, at in there.items()}
        self.changed = set()
        self.aside = aside
        self.takes_stale = takes_stale
        self.lost = False
        self.backed = KNOWS
        self.use(0)

    def forget(self):
        """(there as it is now, the keys that were written or removed, those of the given ones that are as they were, but for their time)."""
        cdef bytes key
        cdef set given = set(self.given)
        there, changed = {key: self.unix_of(at) if at else 0 for key, at in self.there.items()}, self.changed
        self.there = self.changed = self.aside = self.given = None
        self.takes_stale = False
        self.backed = 0
        self.use(0)
        return there, changed, given

    def name_of(self, bytes key not None):
        """The segment's key for a client's. Raises: InvalidKey."""
        cdef const uint8_t* k = <const uint8_t*>PyBytes_AS_STRING(key)
        cdef size_t n = PyBytes_GET_SIZE(key)
        check_key(self, &k, &n)
        return PyBytes_FromStringAndSize(<char*>k, <Py_ssize_t>n)

    def wait_durable(self, uint64_t end):
        """Wait, in a thread of its own, till this process's ring is durable up to its position `end`: True if it is."""
        return ld64(&ring_of(self.s, self.s.row_idx).durable) >= end or self.table.wait_ring(self.s, self.mapping, 0, end) == OK

    def reset(self):
        """The counts begin anew."""
        memset(self.stats, 0, len(self.names) * sizeof(stat_t))
        self.errors = {}
        self.commands = self.bytes_in = self.bytes_out = 0

    def command_stats(self):
        """{name: (calls, nanoseconds, rejected, failed)} of the commands that somebody sent."""
        cdef stat_t* stat
        cdef Py_ssize_t i
        cdef dict found = {}
        for i in range(len(self.names)):
            stat = &self.stats[i]
            if stat.calls or stat.rejected:
                found[self.names[i][0]] = (stat.calls, stat.ns, stat.rejected, stat.failed)
        return found

    cdef int count_error(self, bytes text) except -1:
        cdef bytes word = text.split(b" ", 1)[0]
        self.errors[word] = self.errors.get(word, 0) + 1
        return 0

    @property
    def impatient(self):
        """May its calls not wait? (False also while stripes are held: who holds them ends what he began.)"""
        return self.table.impatient

    # -- databases

    cdef int use(self, int db) except -1:
        """From here on keys are of this database. The first has the segment's keys; another is the cache's namespace "db:<number>", so that to
        clear it is one write. Raises: WouldWait: the segment is being restored, and this database's generation may still come; a lock is busy."""
        cdef size_t n
        cdef uint64_t generation = 0
        cdef log_t log
        self.db = db
        self.n_prefix = 0
        if db == 0:
            if unlikely(self.aside is not None):
                self.n_prefix = PyBytes_GET_SIZE(self.aside)
                memcpy(self.named, PyBytes_AS_STRING(self.aside), self.n_prefix)
            return 0
        if self.pinned is not None and db in self.pinned:
            self.n_prefix = PyBytes_GET_SIZE(self.pinned[db])
            memcpy(self.named, PyBytes_AS_STRING(self.pinned[db]), self.n_prefix)
            return 0
        n = generation_key(self.named, db)
        self.table.generation(self.named, n, &generation, &log)
        if unlikely(log.end != 0):
            self.table.note_log(&log)
        self.named[n] = 0
        memcpy(self.named + n + 1, &generation, 8)
        self.n_prefix = n + 9
        if self.pinned is not None:
            self.pinned[db] = PyBytes_FromStringAndSize(<char*>self.named, <Py_ssize_t>self.n_prefix)
        return 0

    cdef void pin(self):
        """From here to release() databases keep the generations that they have when they are first used: what was held by their keys is held."""
        if self.pinned is None:
            self.pinned = {}
            if self.db:
                self.pinned[self.db] = PyBytes_FromStringAndSize(<char*>self.named, <Py_ssize_t>self.n_prefix)

    cdef bytes shown(self, const uint8_t* key, size_t n):
        """The client's key for a segment's one, None if it is of another database."""
        if self.n_prefix:
            if n < self.n_prefix or memcmp(key, self.named, self.n_prefix):
                return None
            return PyBytes_FromStringAndSize(<char*>key + self.n_prefix, <Py_ssize_t>(n - self.n_prefix))
        if self.databases > 1 and is_others(key, n):
            return None
        if n == <size_t>PyBytes_GET_SIZE(EMPTY_KEY) and memcmp(key, PyBytes_AS_STRING(EMPTY_KEY), n) == 0:
            return b""
        if n > N_ASIDE and key[0] == 0 and memcmp(key, PyBytes_AS_STRING(ASIDE), 5) == 0:
            return None
        return PyBytes_FromStringAndSize(<char*>key, <Py_ssize_t>n)

    # -- sizes

    def size(self):
        """(items of the database in use, those of them that expire): of one of the first 16, by the stripes' counts. As len() of a cache, with what
        has expired and is not taken out yet. Of a stripe of the first that a stopped process holds, and while this thread holds stripes, what they
        say. Raises: WouldWait; StripeBusy, of another database than the first."""
        cdef uint64_t until = 0
        cdef sized_t size = self.size_of(self.db, BRIEFLY if self.has_stripes() else WAITING if self.db else TRYING, &until)
        return size.items, size.expiring

    def sizes(self, bint exact=False):
        """{database: as size()} of those of the first 16 that have a key. Not exact: soon, without waiting for a lock: some stripes may not know."""
        cdef seg_t* s = self.table.ready()
        cdef sized_t size
        cdef dict found = {}
        cdef uint64_t until = 0
        cdef int d, k, how = WAITING if exact else BRIEFLY
        for d in range(min(self.databases, <int>DATABASES)):
            if exact:
                until = 0
            size = self.size_of(d, how, &until)
            if self.databases == 1:         # those of others are the first's, too
                size.items = count_items(s)
                for k in range(1, DATABASES):
                    size.expiring += self.size_of(k, how, &until).expiring
            if size.items:
                found[d] = size.items, size.expiring
        return found

    cdef sized_t size_of(self, int d, int how, uint64_t* until) except *:
        """Its generation is loaded again when a stripe knows nothing of it: if somebody has flushed the database meanwhile, the sum begins again.
        until: when waiting, or what BRIEFLY counts, is over; 0: it is set when there is something to wait for, or to count."""
        cdef seg_t* s = self.table.ready()
        cdef sized_t size
        cdef uint64_t generation = 0
        cdef int tries
        for tries in range(RESTARTS):
            size.items = size.expiring = 0
            if d and not self.generation_of(s, d, &generation) or self.add_sizes(s, d, generation, how, until, tries + 1 == RESTARTS, &size):
                break
        return size

    cdef bint generation_of(self, seg_t* s, int d, uint64_t* generation):
        """Of database d, which is not the first: does it have one?"""
        cdef uint8_t key[9]
        if self.pinned is not None and d in self.pinned:
            memcpy(generation, PyBytes_AS_STRING(self.pinned[d]) + PyBytes_GET_SIZE(self.pinned[d]) - 8, 8)
            return True
        return read_generation(s, key, generation_key(key, d), generation) == OK

    cdef bint add_sizes(self, seg_t* s, int d, uint64_t generation, int how, uint64_t* until, bint is_last, sized_t* sum) except -1:
        """size_of(). False: the generation is another one now."""
        cdef sized_t size
        cdef uint32_t i
        cdef int rc, told = AGAIN       # what is_untold() says. It stays so: a generation is newest from before it is stored, or not at all
        for i in range(s.n_stripes):
            rc = size_said(s, i, d, generation, &size)
            if rc == ABSENT and told == AGAIN:
                told = self.under_lock(s, -1, d, generation, how, until, &size)
                if told == MISMATCH and not is_last:
                    return False
            if rc == AGAIN or (rc == ABSENT and told == ABSENT):
                if how == BRIEFLY:
                    until[0] = until[0] or mono_ns() + BRIEFLY_NS
                if how != BRIEFLY or mono_ns() < until[0]:
                    self.under_lock(s, i, d, generation, how, until, &size)
            sum.items += size.items
            sum.expiring += size.expiring
        return True

    cdef int under_lock(self, seg_t* s, int64_t i, int d, uint64_t generation, int how, uint64_t* until, sized_t* size) except -100:
        """size_counted() of stripe i; -1: is_untold()."""
        cdef uint64_t wait = IF_DEAD
        cdef int rc
        if self.has_stripes():      # it waits for nobody, not for the GIL either
            if i < 0:
                return is_untold(s, d, generation, self.pinned is not None and d in self.pinned, 0)
            return size_counted(s, <uint32_t>i, d, generation, 0, size)
        if how != BRIEFLY:
            if self.table.impatient:
                raise WouldWait
            if how == TRYING and until[0] and mono_ns() >= until[0]:        # to wait until a time that is over is to sleep once
                return size_counted(s, <uint32_t>i, d, generation, 0, size)
            until[0] = until[0] or (wait_until(s) if how == WAITING else mono_ns() + TRYING_NS)
            wait = until[0]
        while True:
            with nogil:
                rc = is_untold(s, d, generation, False, wait) if i < 0 else size_counted(s, <uint32_t>i, d, generation, wait, size)
            if rc != INTR:
                break
            PyErr_CheckSignals()
            if s.me[0] == 0:
                self.mapping.revive()
        if rc == BUSY and how == WAITING:
            raise errors.StripeBusy("a living process holds a lock that this call needs and does not run: try again")
        return rc

    # -- all keys

    @property
    def n_buckets(self):
        return self.s.n_buckets

    def keys(self, uint64_t at, uint64_t end, size_t enough=<size_t>-1, uint64_t within_ns=0):
        """(the bucket to go on with, the keys of those before it): from bucket `at` up to `end`, until there are enough keys, or so much time has
        gone (0: any), after one bucket at least. Those of a bucket are of one instant; no lock is taken, unless writers overtake again and again.

        Once some buckets were empty the stripes are asked, and those that have no item are passed over, since most are empty then.
        Invariant: a key that was there before the call is found. Its write was over, so its stripe counted it; a write that is under way, or
        whose process died in it, has its intent in the stripe before its item is to be seen (as nothing_counted() relies on). A key that is
        replaced is counted all the while."""
        cdef seg_t* s = self.table.ready()
        cdef list found = []
        cdef uint64_t looked = 0, until = mono_ns() + within_ns if within_ns else <uint64_t>-1
        cdef uint32_t n_some = 0
        cdef bint asked = False, stands
        end = min(end, s.n_buckets)
        while at < end and <size_t>len(found) < enough:
            if looked < LOOKS_BEFORE_STRIPES:
                stands = pass_empty(s, &at, end, NULL, 0, &looked, LOOKS_BEFORE_STRIPES, until)
            else:
                if not asked:
                    n_some = self.ask_stripes()
                    asked = True
                if self.table.impatient:
                    stands = pass_empty(s, &at, end, self.some, n_some, &looked, <uint64_t>-1, until)
                else:
                    with nogil:
                        stands = pass_empty(s, &at, end, self.some, n_some, &looked, <uint64_t>-1, until)
            if stands:
                self.keys_of(at, found)
                at += 1
            if within_ns and mono_ns() >= until:
                break
        return at, found

    cdef uint32_t ask_stripes(self) except? 0:
        """Note in `some`, ascending, which may have items: how many."""
        cdef seg_t* s = self.s
        cdef uint32_t i, n = 0
        cdef uint64_t busy, count, epoch = s.held_epoch if self.has_stripes() else ld32(&s.header.epoch)
        if self.some == NULL:
            self.some = <uint16_t*>malloc(s.n_stripes * sizeof(uint16_t))
            if self.some == NULL:
                raise MemoryError
        for i in range(s.n_stripes):
            busy = ld64(&s.stripes[i].new)      # first: an item is counted before it is cleared
            count = ld64(&s.stripes[i].count)
            if busy or (count >> 32 >= epoch and <uint32_t>count):
                self.some[n] = <uint16_t>i
                n += 1
        return n

    cdef int keys_of(self, uint64_t bucket, list found) except -1:
        cdef seg_t* s = self.table.ready()
        cdef uint32_t used = 0, at = 0, n
        cdef uint64_t until = 0
        cdef int rc
        while True:
            rc = next_keys(s, bucket, False, self.scratch, <uint32_t>min(self.room_scratch, <uint64_t>0xffffffff), &used, 0)
            if rc != OK and rc != NO_ROOM and not self.table.impatient:
                until = until or wait_until(s)
                with nogil:
                    rc = next_keys(s, bucket, False, self.scratch, <uint32_t>min(self.room_scratch, <uint64_t>0xffffffff), &used, until)
            if rc == NO_ROOM:
                self.grow_scratch(2 * self.room_scratch)
            elif rc == INTR:
                PyErr_CheckSignals()
                if s.me[0] == 0:
                    self.mapping.revive()
            elif rc == OK:
                break
            elif self.table.impatient:
                raise WouldWait
            else:
                raise errors.StripeBusy("a living process holds a lock that this call needs and does not run: try again")
        while at < used:
            n = self.scratch[at] | <uint32_t>self.scratch[at + 1] << 8
            key = self.shown(self.scratch + at + 2, n)
            if key is not None:
                found.append(key)
            at += 2 + n
        return 0

    # -- FLUSHDB of the first database

    @property
    def n_stripes(self):
        return self.s.n_stripes

    def log_room(self, keys):
        """Bytes in the log of records that a write of these (db, key) pairs makes, without their values; for none of them, of a generation's key."""
        cdef uint64_t room = 0
        cdef bytes key
        cdef int db
        for db, key in keys:
            room += record_room(self.s, PyBytes_GET_SIZE(key) + (DATABASE_PREFIX if db else N_ASIDE if self.aside is not None else 0), 0)
        return room or record_room(self.s, DATABASE_PREFIX, 0)

    @property
    def most_log_room(self):
        """Bytes in the log that are kept for one step at most; 0: there is no log."""
        return self.s.ring_bytes >> 1

    def empty_first(self, uint32_t stripe, uint64_t within_ns):
        """Remove, from this stripe on, every key of the first database that was there when this was called, for as long as that, from one stripe at
        least: the stripe to go on with. Claims go, too, and the marks of writers fill nothing more. What waits to be stored stays.

        Each stripe is emptied by itself: a key that is stored meanwhile may stay or go. empty_held() comes first, and what is stored in the stripes
        that were held then stays. Before that, while stripes are held, keep_room(). Raises: StripeBusy, LogFull; some keys are removed then.
        """
        cdef seg_t* s = self.table.ready()
        cdef emptying_t e
        cdef log_t log
        cdef uint64_t until = mono_ns() + within_ns
        if not self.has_stripes():
            self.table.room_in_log(s, self.mapping, &log, record_room(s, MAX_KEY, 0))
            ring_release(s, &log)
        memset(&e, 0, sizeof(e))
        e.stripe = stripe
        e.passed = self.was_held
        self.empty(&e, until)
        return e.stripe

    def empty_held(self):
        """Before empty_first(): what this thread holds, in one step. It may let go of that then. Raises: LogFull."""
        cdef seg_t* s = self.table.ready()
        cdef emptying_t e
        cdef uint32_t i
        memset(self.was_held, 0, sizeof(self.was_held))
        if not self.has_stripes():
            return
        memset(&e, 0, sizeof(e))
        for i in range(s.n_stripes):
            if s.held[i >> 6] >> (i & 63) & 1:
                e.stripe = i
                self.empty(&e, 0)
        memcpy(self.was_held, s.held, sizeof(self.was_held))
        #! empty: what is held

    def room_to_empty(self, uint32_t stripe, uint64_t within_ns):
        """What empty_first() will ask of the log, and nothing is removed: (the stripe to go on with, bytes of records)."""
        cdef emptying_t e
        cdef uint64_t until = mono_ns() + within_ns
        memset(&e, 0, sizeof(e))
        e.stripe = stripe
        e.only_counts = True
        self.emptied(&e, until)
        return e.stripe, e.room

    def keep_room(self, uint64_t n):
        """While stripes are held: so many bytes of records more for what this thread does. With the policy always it is done as a whole or not at
        all; with any other what then finds no room is a gap. Raises: LogFull: there is no room for all of them."""
        cdef seg_t* s = self.table.ready()
        if not s.ring_bytes or ld64(&s.header.log_policy) == LOG_OFF:
            return
        if ring_secure(s, n):
            s.held_room += n
        elif ld64(&s.header.log_policy) == LOG_ALWAYS:
            raise errors.LogFull(f"the records of what is to be removed, {n:,} bytes, do not fit into what is free of this segment's log buffer of "
                                 f"{s.ring_bytes:,}: nothing was removed by this command. Send it by itself, not in a transaction or script")

    cdef int empty(self, emptying_t* e, uint64_t until_ns) except -1:
        """From e.stripe on, until then, one stripe at least."""
        cdef const uint8_t* key
        cdef uint32_t n
        cdef log_t log
        while not self.emptied(e, until_ns):
            key = take_key(self.scratch, &e.at, &n)
            self.table.discard_view(self.s, self.mapping, key, n, &log)
            e.log_end = max(e.log_end, log.end)
        if e.log_end:
            log.end = e.log_end
            log.token = self.s.me[0]
            self.table.note_log(&log)

    cdef bint emptied(self, emptying_t* e, uint64_t until_ns) except -1:
        """empty_on(). False: the log has no room for the record of the key that is next."""
        cdef seg_t* s = self.s
        cdef int rc
        while True:
            with nogil:
                rc = empty_on(s, e, self.scratch, <uint32_t>min(self.room_scratch, <uint64_t>0xffffffff), until_ns)
            if rc == OK or rc == AGAIN:
                return rc == OK
            if rc == NO_ROOM:
                self.grow_scratch(2 * self.room_scratch)
            elif rc == INTR:
                PyErr_CheckSignals()
                if s.me[0] == 0:
                    self.mapping.revive()
            else:
                raise errors.StripeBusy("a living process holds a lock that this call needs and does not run: try again")

    def version(self, bytes key not None):
        """The key's version, 0 if it is not there: to be compared. Versions are of a stripe, and a key of another database than the first is in
        another one when that has been flushed: it has another version then, whatever the stripes' are."""
        cdef raw_t raw
        return self.version_of(&raw) if look(self, <const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), &raw, False) else 0

    cdef uint64_t version_of(self, raw_t* raw) noexcept:
        cdef uint64_t generation = 0
        if self.db:
            memcpy(&generation, self.named + self.n_prefix - 8, 8)
        return raw.version ^ generation


cdef bint is_empty(seg_t* s, uint64_t b) noexcept nogil:
    """At one instant. False: something is in its chain, or was meanwhile."""
    cdef bucket_t* bucket = &s.buckets[b]
    cdef uint32_t v = ld32(&bucket.version)
    cdef uint64_t any = ld32r(&bucket.overflow)
    cdef int i
    for i in range(SLOTS):
        any |= ld64r(&bucket.slot[i])
    fence_acquire()
    return any == 0 and ld32r(&bucket.version) == v


cdef bint pass_empty(seg_t* s, uint64_t* at, uint64_t end, const uint16_t* some, uint32_t n_some, uint64_t* looked, uint64_t most,
                     uint64_t until_ns) noexcept nogil:
    """From at on, up to end, to the next bucket in which something is: True. some: of these stripes alone; NULL: of all. looked: counted up, to
    most. until_ns: or until then."""
    cdef uint64_t b = at[0], stripe = b & (s.n_stripes - 1), ahead
    cdef uint32_t j = 0
    if some != NULL:
        while j < n_some and some[j] < stripe:
            j += 1
    while True:
        if some != NULL:
            if j == n_some:
                b = (b | (s.n_stripes - 1)) + 1
                j = 0
            if n_some == 0 or b >= end:
                break
            b = (b & ~<uint64_t>(s.n_stripes - 1)) + some[j]
            ahead = b + s.n_stripes
            if ahead < end:
                prefetch(&s.buckets[ahead])
        if b >= end or looked[0] >= most:
            break
        looked[0] += 1
        if not is_empty(s, b):
            at[0] = b
            return True
        b += some == NULL
        j += 1
        if looked[0] % LOOKS_BETWEEN_CLOCKS == 0 and mono_ns() >= until_ns:
            break
    at[0] = end if some != NULL and n_some == 0 else min(b, end)
    return False


cdef inline size_t generation_key(uint8_t* key, int d) noexcept nogil:
    """Of database d, in 9 bytes."""
    memcpy(key, <const char*>b"\0ns\0db:", 7)
    return 7 + shm_digits(<char*>key + 7, d)


cdef int is_untold(seg_t* s, int d, uint64_t generation, bint pinned, uint64_t until_ns) noexcept nogil:
    """Does newest say nothing of this generation of database d? It is stored before the generation, so this looks under the lock that is held
    for both: ABSENT; MISMATCH: it does, or the generation is another one now (of one that is pinned that is no matter). BUSY, INTR."""
    cdef uint8_t key[9]
    cdef size_t n = generation_key(key, d)
    cdef stripe_t* st = stripe_of(s, bucket_of(s, siphash13(key, n, s.k0, s.k1)))
    cdef uint64_t now = 0
    cdef int rc = take_for_size(s, st, until_ns)
    if rc == OK:
        rc = ABSENT
        if not pinned and (read_generation(s, key, n, &now) != OK or now != generation) or \
                ld32(&s.header.newest[d]) == tag_of(generation, epoch_of(s, st)):
            rc = MISMATCH
        stripe_release(s, st)
    return rc


ctypedef struct emptying_t:     # how far FLUSHDB of the first database is
    uint32_t stripe         # the next, or
    bint is_begun           # the one whose buckets before this one are done with
    uint64_t bucket
    uint32_t used           # bytes of keys, of the bucket
    uint32_t at             # of these: of keys that are done with
    uint64_t log_end        # log_t.end of the last that was logged
    const uint64_t* passed  # bits of stripes that are left as they are; NULL: of none
    bint only_counts        # nothing is removed:
    uint64_t room           # bytes of records that would be logged


cdef inline const uint8_t* take_key(const uint8_t* keys, uint32_t* at, uint32_t* n) noexcept nogil:
    """The key at `at`, among those of next_keys()."""
    cdef const uint8_t* key = keys + at[0] + 2
    n[0] = key[-2] | <uint32_t>key[-1] << 8
    at[0] += 2 + n[0]
    return key


cdef int empty_on(seg_t* s, emptying_t* e, uint8_t* keys, uint32_t room, uint64_t until_ns) noexcept nogil:
    """empty_first(), up to the end of a stripe: OK. NO_ROOM: more is needed for the keys of a bucket. AGAIN: the next key's log record has to be
    waited for. BUSY, INTR."""
    cdef log_t log
    cdef const uint8_t* key
    cdef uint64_t wait_ns
    cdef uint32_t at, n
    cdef int rc
    while e.stripe < s.n_stripes:
        wait_ns = wait_until(s)
        if not e.is_begun and e.passed != NULL and e.passed[e.stripe >> 6] >> (e.stripe & 63) & 1:
            e.stripe += 1
            continue
        if not e.is_begun:
            rc = OK if e.only_counts else has_first(s, e.stripe, wait_ns)       # to count, no lock is waited for or tried
            if rc != OK and rc != ABSENT:
                return rc
            e.bucket = e.stripe if rc == OK else s.n_buckets
            e.is_begun = True
        while e.bucket < s.n_buckets:
            if e.used == 0 and not is_empty(s, e.bucket):
                rc = next_keys(s, e.bucket, True, keys, room, &e.used, wait_ns)
                e.at = 0
                if rc != OK:
                    e.used = 0
                    return rc
            while e.at < e.used:
                at = e.at
                key = take_key(keys, &at, &n)
                log.bytes = log.end = 0
                log.kept = False
                log.token = s.me[0]
                if e.only_counts:
                    e.room += 0 if passes_by(s, key) else record_room(s, n, 0)
                    e.at = at
                    continue
                if s.ring_bytes and ld64(&s.header.log_policy) and not passes_by(s, key):
                    if ring_secure(s, record_room(s, n, 0)):
                        log.bytes = record_room(s, n, 0)
                    elif s.holder != pthread_self() or not take_kept(s, &log, record_room(s, n, 0)):
                        return AGAIN
                rc = remove(s, key, n, siphash13(key, n, s.k0, s.k1), 0, False, &log, wait_ns)
                ring_release(s, &log)
                e.log_end = max(e.log_end, log.end)
                if rc != OK and rc != ABSENT:
                    return rc
                e.at = at
            e.used = e.at = 0
            e.bucket += s.n_stripes
        e.is_begun = False
        e.stripe += 1
        if mono_ns() >= until_ns:
            break
    return OK


# ---- keys and values -------------------------------------------------------------------------------------------------------------

ctypedef struct raw_t:
    uint8_t* value              # in Executor.scratch, as text if it is an int
    uint64_t n
    uint64_t version
    uint64_t expiry_ms          # the segment's time; 0: never. Of what was in an envelope: when it is fresh no more
    bint of_copy                # only the cached copy expires, by the segment's default: the value never does
    int codec


# Redis has a key of no bytes, a segment has none: it is stored under this one.
cdef bytes EMPTY_KEY = b"\0the empty key\0"
# Copies on which a command that is written through is tried: this, 8 random bytes, the key. Nobody is shown them.
ASIDE = b"\0try\0"
cdef enum:
    N_ASIDE = 13

cdef inline bint fits(Executor ex, const uint8_t** key, size_t* n) noexcept:
    """The segment's key for a client's, good till the next is asked for. False: there can be none."""
    if unlikely(ex.n_prefix):
        if n[0] > MAX_KEY - ex.n_prefix:
            return False
        memcpy(ex.named + ex.n_prefix, key[0], n[0])
        key[0] = ex.named
        n[0] += ex.n_prefix
        return True
    if unlikely(n[0] == 0):
        key[0] = <const uint8_t*>PyBytes_AS_STRING(EMPTY_KEY)
        n[0] = PyBytes_GET_SIZE(EMPTY_KEY)
    return n[0] <= MAX_KEY


cdef inline uint64_t as_it_was(raw_t* raw) noexcept:
    """The expiry of a value that replaces this one."""
    return raw.expiry_ms if raw.expiry_ms else 0 if raw.of_copy else NEVER


cdef bint look(Executor ex, const uint8_t* key, size_t n, raw_t* raw, int whole) except -1:
    """Read a key into the scratch (whole; else what is known of it without its bytes): False if it is not there. Of an envelope what is inside,
    if it is fresh; VERBATIM: the envelope."""
    return fits(ex, &key, &n) and look_at(ex, key, n, raw, whole)


cdef int missed(Executor ex, const uint8_t* key, size_t n, raw_t* raw=NULL) except -1:
    """Of a segment before a store: there is nothing under this key (the segment's). 1: it was given, and is read into raw. Raises: WouldWait: perhaps
    in the store. StoreUnavailable: there was, but a moment ago."""
    cdef bytes name
    if ex.backed == LOADS:
        if key[0] != 0:
            raise WouldWait
        return 0
    name = PyBytes_FromStringAndSize(<char*>key, <Py_ssize_t>n)
    if name in ex.given:
        if raw != NULL:
            read_given(ex, ex.given[name], raw)
        return 1
    at = ex.there.get(name)
    if at is None:
        return 0
    if at and now_ms(ex.s) + CLOCK_SLACK >= <uint64_t>at:
        del ex.there[name]
        return 0
    ex.lost = True
    raise errors.StoreUnavailable("a key is in the store, but cannot be cached just now: nothing was changed; try again")


cdef int read_given(Executor ex, tuple given, raw_t* raw) except -1:
    """As look() reads what is in the segment. Its version is no other's: who watches it finds it changed."""
    cdef put_t op
    cdef int64_t number
    holder = ex.table.store_view(given[0], &op, &number)        # which keeps the value's bytes
    ex.grow_scratch(max(<uint64_t>64, op.value_bytes))
    memcpy(ex.scratch, op.value, op.value_bytes)
    raw.value = ex.scratch
    raw.n = op.value_bytes
    raw.version = GIVEN | mono_ns()
    raw.expiry_ms = given[1]
    raw.of_copy = False
    raw.codec = op.codec
    ex.s.row.hits += 1
    if raw.codec == CODEC_INT and raw.n == 8:
        memcpy(&number, ex.scratch, 8)
        raw.n = shm_digits(<char*>ex.scratch, number)
    return 0


cdef tuple given_of(Executor ex, const uint8_t* key, size_t n, uint64_t version):
    """What was given for this key (the segment's), or None. version: that which is to be changed, 0: any. Raises: it is the given one's, and not
    aside: why that is not cached, for somebody else may have changed it since."""
    cdef tuple given
    if ex.backed != KNOWS or not ex.given:
        return None
    given = ex.given.get(PyBytes_FromStringAndSize(<char*>key, <Py_ssize_t>n))
    if given is not None and version & GIVEN and ex.aside is None:
        raise given[2]
    return given


cdef int not_given(Executor ex, const uint8_t* key, size_t n) except -1:
    """The segment has something newer under this key: a value, or that it was deleted."""
    if ex.given:
        ex.given.pop(PyBytes_FromStringAndSize(<char*>key, <Py_ssize_t>n), None)
    return 0


cdef int noted(Executor ex, const uint8_t* key, size_t n, uint64_t expiry_ms, bint gone) except -1:
    """For know(): this key (the segment's) was written or removed. expiry_ms: NEVER: as it was."""
    cdef bytes name = PyBytes_FromStringAndSize(<char*>key, <Py_ssize_t>n)
    ex.changed.add(name)
    ex.given.pop(name, None)
    if gone or ex.aside is None:
        ex.there.pop(name, None)
    elif expiry_ms != NEVER:
        ex.there[name] = expiry_ms
    return 0


cdef bint known(Executor ex, const uint8_t* key, size_t n) except -1:
    """Before it matters, for what does not read it, whether a client's key is there: as missed(). False: not before a store, or it is not there."""
    cdef raw_t raw
    return unlikely(ex.backed) and look(ex, key, n, &raw, False)


cdef bint is_none(Executor ex, const uint8_t* key, size_t n) except -1:
    """Is there nothing under a client's key, so that what is written depends on it? Raises: StoreNeeded: the store might have something."""
    cdef raw_t raw
    if look(ex, key, n, &raw, False):
        return False
    if unlikely(ex.s.policy == POLICY_BACK) and fits(ex, &key, &n):
        ex.table.check_fills(ex.s, key)
    return True


cdef int take_expired(Executor ex, const uint8_t* key, size_t n, uint64_t h) except -1:
    """What was found expired goes; not during a pause."""
    if ex.paused_until == 0:
        ex.table.remove_view(ex.s, ex.mapping, key, n, h, 0, True, NULL)
    return 0


cdef bint look_at(Executor ex, const uint8_t* key, size_t n, raw_t* raw, int whole) except -1:
    """The same, of the segment's key."""
    cdef seg_t* s = ex.s
    cdef read_t r
    cdef uint64_t h = siphash13(key, n, s.k0, s.k1)
    cdef int rc, tries, found
    for tries in range(RESTARTS):
        rc = read_begin(s, key, n, h, &r)
        if rc == ABSENT:
            s.row.misses += 1
            if r.expired:
                take_expired(ex, key, n, h)
            return unlikely(ex.backed) and missed(ex, key, n, raw)
        if rc == OK:
            raw.n = r.value_bytes
            if whole or r.codec == CODEC_INT or r.codec == CODEC_ENVELOPE:
                ex.grow_scratch(max(<uint64_t>64, r.value_bytes))
                read_copy(s, &r, ex.scratch)
            if read_end(s, &r) == OK:
                if r.damaged:
                    raise errors.DamageError("a page of this value belongs to somebody else: delete the key")
                found = finish_raw(ex, &r, raw, whole)
                if unlikely(found == UNKNOWN):
                    found = missed(ex, key, n, raw)
                elif unlikely(ex.given is not None):
                    not_given(ex, key, n)
                return found == True
        s.row.retries += 1
        if rc == OK and tries and whole and r.value_bytes >= LARGE_COPY:
            break
    return look_locked(ex, key, n, h, raw, whole)


cdef int finish_raw(Executor ex, read_t* r, raw_t* raw, int whole) except -1:
    """What was read, as Redis has it, counted as a hit. False: a miss, since the envelope is hidden; UNKNOWN."""
    cdef int64_t number
    cdef int state
    cdef envelope_t e
    raw.value = ex.scratch
    raw.version = r.cas
    raw.of_copy = r.flags & FLAG_COPY_TTL and r.expiry_ms
    raw.expiry_ms = 0 if unlikely(raw.of_copy) else r.expiry_ms
    raw.codec = r.codec | (RAW if r.flags & FLAG_RAW else 0)
    if unlikely(r.codec == CODEC_ENVELOPE):
        if not envelope_open(ex.scratch, r.value_bytes, &e):
            raise errors.DamageError("the head of this value is damaged, or of a newer version: delete the key")
        state = envelope_state(ex.s, ex.scratch, &e, r.expiry_ms, r.now_ms)
        if state != STATE_FRESH and not (state == STATE_STALE and ex.takes_stale):
            ex.s.row.misses += 1
            return UNKNOWN if ex.backed and state != STATE_NEGATIVE else False
        if whole != VERBATIM:
            raw.codec = e.codec
            raw.n -= e.head_bytes
            memmove(ex.scratch, ex.scratch + e.head_bytes, raw.n)
            if raw.expiry_ms:
                raw.expiry_ms -= min(e.stale_ms, r.expiry_ms - 1)
    ex.s.row.hits += 1
    if raw.codec & ~RAW == CODEC_INT and raw.n == 8:
        memcpy(&number, ex.scratch, 8)
        raw.n = shm_digits(<char*>ex.scratch, number)
    return True


cdef int take_stripe(Executor ex, uint32_t i) except -1:
    """One, while none is held. Raises: WouldWait, StripeBusy."""
    cdef seg_t* s = ex.table.ready()
    cdef uint64_t until = 0
    cdef int rc = stripe_take(s, &s.stripes[i], 0)
    while rc != OK and not ex.table.impatient:
        until = until or wait_until(s)
        with nogil:
            rc = stripe_take(s, &s.stripes[i], until)
        if rc != INTR:
            break
        PyErr_CheckSignals()
        if s.me[0] == 0:
            ex.mapping.revive()
    if rc != OK:
        if ex.table.impatient:
            raise WouldWait
        raise errors.StripeBusy("a living process holds a lock that this call needs and does not run: try again")
    return 0


cdef bint look_locked(Executor ex, const uint8_t* key, size_t n, uint64_t h, raw_t* raw, int whole) except -1:
    """After so many reads that writes overtook: under the stripe, if it is free now."""
    cdef seg_t* s = ex.table.ready()
    cdef read_t r
    cdef int rc
    ex.grow_scratch(s.max_value_bytes if s.max_value_bytes < 1 << 20 else 1 << 20)
    take_stripe(ex, stripe_of(s, bucket_of(s, h)) - s.stripes)
    rc = read_begin(s, key, n, h, &r)
    if rc == OK and r.value_bytes <= ex.room_scratch:
        read_copy(s, &r, ex.scratch)
        read_end(s, &r)
    stripe_release(s, stripe_of(s, bucket_of(s, h)))
    if rc == OK:
        if r.value_bytes > ex.room_scratch:
            ex.grow_scratch(r.value_bytes)
            return look_at(ex, key, n, raw, max(1, whole))
        if r.damaged:
            raise errors.DamageError("a page of this value belongs to somebody else: delete the key")
        raw.n = r.value_bytes
        rc = finish_raw(ex, &r, raw, whole)
        if rc == UNKNOWN:
            rc = missed(ex, key, n, raw)
        elif ex.given is not None:
            not_given(ex, key, n)
        return rc == True
    return ex.backed and missed(ex, key, n, raw)


cdef int check_key(Executor ex, const uint8_t** key, size_t* n) except -1:
    if unlikely(not fits(ex, key, n)):
        raise errors.InvalidKey(f"a key has at most {MAX_KEY - ex.n_prefix} bytes, this one {n[0]}")
    return 0


cdef int put_value(Executor ex, const uint8_t* key, size_t n, const uint8_t* value, uint64_t size, int codec, uint64_t expiry_ms,
                   int when, uint64_t version, int drawn=0) except -100:
    """OK, EXISTS, ABSENT or MISMATCH. expiry_ms: the segment's time, 0: its default, NEVER. drawn: as of put_t."""
    cdef seg_t* s = ex.s
    cdef put_t op
    cdef int rc
    cdef tuple given = None
    check_key(ex, &key, &n)
    if unlikely(expiry_ms == 0 and ex.aside is not None):   # the default is the cached copy's, not the store's
        expiry_ms = NEVER
    if size > s.max_value_bytes:
        raise errors.ValueTooLarge("string exceeds maximum allowed size (proto-max-bulk-len)")
    if unlikely(ex.backed):
        given = given_of(ex, key, n, version)
        if given is not None and when == IF_ABSENT:
            return EXISTS
        if given is not None and ex.aside is not None and (when == IF_PRESENT or version & GIVEN):
            when = ALWAYS
    op.key = key
    op.key_bytes = n
    op.hash = siphash13(key, n, s.k0, s.k1)
    prefetch(&s.buckets[bucket_of(s, op.hash)])
    op.value = value
    op.value_bytes = size
    op.codec = <uint8_t>codec
    op.flags = FLAG_RAW if codec & RAW else 0
    op.refs = 0
    op.chunk = 0
    op.when = when
    op.drawn = drawn
    op.loaded = False
    op.version = version
    op.expiry_ms = expiry_ms
    if unlikely(expiry_ms == NEVER):
        op.expiry_ms = 0
    elif expiry_ms == 0 and s.default_ttl_ms:
        op.expiry_ms = now_ms(s) + s.default_ttl_ms
        if s.policy == POLICY_BACK:
            op.flags |= FLAG_COPY_TTL
    if unlikely(s.policy == POLICY_BACK) and writes_back(s, key) and expiry_ms != 0 and expiry_ms <= now_ms(s):      # it is over already
        buried(&op)
    rc = ex.table.put_view(s, &op)
    if unlikely(op.log.end != 0):
        ex.table.note_log(&op.log)
    if unlikely(expiry_ms == 1) and rc == OK and not writes_back(s, key):
        ex.table.remove_view(s, ex.mapping, key, n, op.hash, 0, True, NULL)
    if unlikely(ex.backed == KNOWS):
        if ex.aside is not None and (rc == ABSENT or (rc == OK and when == IF_ABSENT)):
            missed(ex, key, n)
        if rc == OK:
            noted(ex, key, n, op.expiry_ms, expiry_ms == 1)
        elif rc == ABSENT and given is not None:
            raise given[2]
    return rc


cdef int put_copy(Executor ex, const uint8_t* key, size_t n, raw_t* raw) except -100:
    """Store what look() has read: as it is, and for as long."""
    cdef int64_t number = 0
    if raw.codec == CODEC_INT and shm_number(raw.value, raw.n, &number):
        return put_value(ex, key, n, <const uint8_t*>&number, 8, CODEC_INT, as_it_was(raw), ALWAYS, 0)
    return put_value(ex, key, n, raw.value, raw.n, raw.codec, as_it_was(raw), ALWAYS, 0)


cdef int remove_key(Executor ex, const uint8_t* key, size_t n, uint64_t version) except -100:
    cdef seg_t* s = ex.s
    cdef log_t log
    cdef int rc
    cdef bint given = False
    if not fits(ex, &key, &n):
        return ABSENT
    log.end = 0
    if unlikely(ex.backed) and (version == 0 or version & GIVEN):
        given = given_of(ex, key, n, version) is not None
    rc = ex.table.remove_view(s, ex.mapping, key, n, siphash13(key, n, s.k0, s.k1), version, False, &log)
    if unlikely(log.end != 0):
        ex.table.note_log(&log)
    if unlikely(ex.backed == KNOWS):
        if given:
            rc = OK
        if rc == OK:
            noted(ex, key, n, 0, True)
        elif rc == ABSENT and ex.aside is not None:
            missed(ex, key, n)
    return rc


cdef int expire_key(Executor ex, const uint8_t* key, size_t n, uint64_t expiry_ms) except -100:
    """Change when it expires (0: never): OK or ABSENT."""
    cdef log_t log
    cdef int rc
    cdef tuple given = None
    if not fits(ex, &key, &n):
        return ABSENT
    log.end = 0
    if unlikely(ex.backed):
        given = given_of(ex, key, n, 0)
        if given is not None and ex.aside is not None:
            noted(ex, key, n, expiry_ms, False)
            ex.given[PyBytes_FromStringAndSize(<char*>key, <Py_ssize_t>n)] = given[0], expiry_ms, given[2]
            return OK
    rc = ex.table.change_expiry_view(ex.s, ex.mapping, key, n, siphash13(key, n, ex.s.k0, ex.s.k1), expiry_ms, False, &log)
    if unlikely(log.end != 0):
        ex.table.note_log(&log)
    if unlikely(ex.backed == KNOWS):
        if rc == OK:
            noted(ex, key, n, expiry_ms, False)
        elif given is not None:
            raise given[2]
        elif ex.aside is not None:
            missed(ex, key, n)
    return rc


# ---- a connection ----------------------------------------------------------------------------------------------------------------

cdef class Client:
    """One connection: what it sent and is not executed, what it is to be sent, and its state. A protocol of the event loop.

    A subclass gives it life: refused(), before() and overflow() are called here.
    """
    cdef readonly Executor home         # of its event loop
    cdef readonly Executor ex           # that runs its command: a thread's of the pool, while it is blocked by one
    cdef uint8_t* pending               # what was read and is not executed
    cdef uint64_t n_pending
    cdef uint64_t room_pending
    cdef uint64_t need                  # bytes of it before there is anything new to find
    cdef arg_t* args                    # of the command that is being read
    cdef uint64_t n_args
    cdef uint64_t room_args
    cdef int64_t left                   # arguments of it that are not there yet; -1: its first line is not
    cdef uint64_t scanned               # of `pending`: where the next argument begins
    cdef uint8_t* out
    cdef uint64_t n_out
    cdef uint64_t room_out
    cdef public uint64_t most_out       # bytes of `out`: a reply that does not fit is an error
    cdef uint64_t carry                 # of a command that is run again: what its earlier part has counted,
    cdef size_t carry_at                # and where it goes on
    cdef public int protocol            # 2 or 3
    cdef public int db                  # SELECT's
    cdef public bint authenticated
    cdef public bint blocked            # a command is being run elsewhere: nothing more is executed, what comes is kept
    cdef public int untold              # so many things others have to know before what is in `out` is true: it is not sent
    cdef public bint closing            # after what is in `out`
    cdef public bint in_multi
    cdef public bint in_pubsub
    cdef public bint restricted         # its user may not do everything: before() is asked about each command
    cdef bint pushing                   # the command being executed sends pushes
    cdef public bint silent             # CLIENT REPLY OFF
    cdef public int skip                # CLIENT REPLY SKIP: replies of so many commands are dropped
    cdef public object transport
    cdef public int fd                  # -1: what is sent goes through the transport
    cdef public bint writing            # the transport has something to write
    cdef public bint full               # so much that nothing more is executed till it is gone
    cdef public uint64_t commands
    cdef public uint64_t bytes_in
    cdef readonly uint64_t reading      # bytes of the last read
    cdef public int64_t last_ms         # of the segment's clock, when it last sent something
    cdef public int last_command        # index of it
    cdef public list retried            # arguments of the command that the pool runs
    cdef uint64_t unheld                # the same, if nobody was asked yet to wait for it
    cdef readonly bint in_pool          # its command is run in the pool, or again later: what is in `out` is not the loop's
    cdef public bint lost               # the connection is gone
    cdef bint failed                    # the command being executed has an error for a reply
    cdef readonly uint64_t took_ns      # by the last command
    cdef list asked                     # a command that asks others, and is told to `slow` when they have answered
    cdef list pushed                    # what others sent to it while it is in_pool
    cdef readonly uint64_t log_end      # its replies leave when the ring is durable up to here
    cdef object __weakref__

    def __cinit__(self, Executor ex not None, *args, **kwargs):
        self.home = self.ex = ex
        self.protocol = 2
        self.authenticated = not ex.locked
        self.most_out = OUT_LIMIT
        self.fd = -1
        self.left = -1
        self.last_command = -1
        self.last_ms = ex.tick_ms

    def __dealloc__(self):
        free(self.pending)
        free(self.args)
        free(self.out)

    # -- the event loop's side

    def get_buffer(self, Py_ssize_t hint):
        """Where to read to: the loop's one buffer."""
        return self.home

    def buffer_updated(self, Py_ssize_t n):
        self.home.bytes_in += n
        self.bytes_in += n
        self.last_ms = self.home.tick_ms
        self.reading = n
        if self.n_pending == 0 and not self.blocked:
            self.run(self.home.read_buffer, n)
        else:
            self.keep(self.home.read_buffer, n)
            if not self.blocked and self.n_pending >= self.need:
                self.run(self.pending, self.n_pending)
        self.send_out()

    def feed(self, const uint8_t[:] data not None):
        """As if this had been read."""
        if self.n_pending == 0 and not self.blocked and data.shape[0]:
            self.run(&data[0], data.shape[0])
        elif data.shape[0]:
            self.keep(&data[0], data.shape[0])
            if not self.blocked and self.n_pending >= self.need:
                self.run(self.pending, self.n_pending)

    def resume(self):
        """A command that was run elsewhere is over: go on with what came meanwhile."""
        self.blocked = self.in_pool = False
        self.ex = self.home
        self.retried = None
        if self.pushed is not None:
            for data in self.pushed:
                self.add(data)
            self.pushed = None
        if self.n_pending and not self.closing:
            self.run(self.pending, self.n_pending)
        self.send_out()

    def push(self, bytes data not None):
        """What others send to this client: appended; behind the reply of a command that the pool runs for it."""
        if self.in_pool:
            if self.pushed is None:
                self.pushed = []
            self.pushed.append(data)
        else:
            self.add(data)

    cdef int keep(self, const uint8_t* data, uint64_t n) except -1:
        """Append to what is not executed yet."""
        cdef uint64_t room = self.room_pending
        cdef uint8_t* larger
        if self.n_pending + n > self.home.most_pending:
            self.n_pending = 0
            self.closing = True
            self.home.count_error(b"ERR")
            self.push(b"-ERR Protocol error: the query is larger than is kept\r\n")
            return 0
        if self.n_pending + n > room:
            room = max(self.n_pending + n, 2 * room if room < 1 << 24 else room + (1 << 24))
            if self.need > room:
                room = self.need if self.need < self.n_pending + (64 << 20) else self.n_pending + (64 << 20)
            larger = <uint8_t*>realloc(self.pending, room)
            if larger == NULL:
                raise MemoryError
            self.pending = larger
            self.room_pending = room
        memcpy(self.pending + self.n_pending, data, n)
        self.n_pending += n
        if self.blocked and self.n_pending > self.need + (1 << 20):
            self.overflow()
        return 0

    def overflow(self):
        """More came than is kept while a command runs elsewhere."""

    def attacked(self):
        """It sends HTTP: a web page makes its reader's browser send commands, say. Nothing more of it is executed."""
        self.closing = True

    def writing_now(self):
        """Has the transport something to send, or waits a reply for the disk?"""
        return self.log_end != 0 or (self.writing and self.transport.get_write_buffer_size() > 0)

    @property
    def idle_ms(self):
        """Since it sent something."""
        return self.home.tick_ms - self.last_ms

    @property
    def buffered(self):
        """(bytes not executed, bytes not sent)."""
        return self.n_pending, self.n_out

    @property
    def memory(self):
        """Bytes of its buffers."""
        return self.room_pending + self.room_out + self.room_args * sizeof(arg_t)

    def take(self):
        """What is to be sent, which is then this caller's to send."""
        cdef bytes data = PyBytes_FromStringAndSize(<char*>self.out, <Py_ssize_t>self.n_out)
        self.n_out = 0
        return data

    def flush(self):
        """Send what there is; or, with the log's policy always, when it is durable."""
        self.send_out()

    cdef int send_out(self) except -1:
        cdef uint64_t at = 0, end
        cdef ssize_t n
        if unlikely(self.lost):
            self.n_out = 0
            return 0
        if unlikely(self.in_pool or self.untold):
            return 0
        if unlikely(self.log_end != 0):
            if self.unheld:
                end = self.unheld
                self.unheld = 0
                self.home.held(self, end)
            return 0
        if self.n_out == 0:
            self.rest()
            return 0
        self.home.bytes_out += self.n_out
        if self.writing and self.transport.get_write_buffer_size() == 0:
            self.writing = False
        if self.fd >= 0 and not self.writing:
            while at < self.n_out:
                n = send(self.fd, self.out + at, self.n_out - at, MSG_DONTWAIT | MSG_NOSIGNAL)
                if n < 0 and errno == EINTR:
                    continue
                if n <= 0:
                    break
                at += n
        if at < self.n_out:
            self.writing = True
            self.transport.write(PyBytes_FromStringAndSize(<char*>self.out + at, <Py_ssize_t>(self.n_out - at)))
        self.n_out = 0
        return self.rest()

    def durable(self, uint64_t end):
        """The ring is durable up to here: send what waited for it."""
        if self.log_end <= end:
            self.log_end = 0
            self.flush()

    cdef int rest(self) except -1:
        """Nothing is to be sent: an idle connection keeps no buffers."""
        if self.room_out > OUT_KEPT or (self.room_out and self.n_pending == 0):
            free(self.out)
            self.out = NULL
            self.room_out = 0
        if self.n_pending == 0 and self.room_pending:
            free(self.pending)
            self.pending = NULL
            self.room_pending = 0
        if self.closing and not self.blocked and self.transport is not None:
            self.transport.close()
        return 0

    # -- parsing

    cdef int run(self, const uint8_t* data, uint64_t n) except -1:
        """Execute what is whole; the rest is kept."""
        cdef uint64_t at = 0
        cdef int64_t step
        while at < n and not self.blocked and not self.closing and not self.full:
            try:
                if data[at] == 42 or self.left >= 0:        # *
                    step = self.parse(data + at, n - at)
                else:
                    step = self.parse_line(data + at, n - at)
            except ProtocolError as e:
                self.error(b"ERR Protocol error: " + e.args[0])
                self.closing = True
                break
            if step < 0:
                break
            at += step
            if self.ex.argc:
                self.execute()
                self.home.shrink()
                if self.n_out > OUT_MOST:       # who does not read what he is sent is not served more
                    self.send_out()
        if self.closing:
            at = n
        if data == self.pending:
            if at:
                memmove(self.pending, self.pending + at, n - at)
                self.n_pending = n - at
        elif at < n:
            self.keep(data + at, n - at)
        if self.n_pending == 0:
            self.need = 0
        self.trim()
        return 0

    cdef void trim(self) noexcept:
        """Memory that a large command needed is given back, though the next one has begun."""
        cdef uint64_t room = max(self.n_pending, self.need, <uint64_t>READ_BYTES)
        cdef void* smaller
        if self.room_pending > 4 * room:
            smaller = realloc(self.pending, room)
            if smaller != NULL:
                self.pending = <uint8_t*>smaller
                self.room_pending = room

    cdef int64_t parse(self, const uint8_t* data, uint64_t n) except -2:
        """A command in RESP: how many bytes it has, and Executor.argv points to its arguments; -1: it is not whole, and `need` says
        how much there has to be before it is worth to look again."""
        cdef Executor ex = self.ex
        cdef uint64_t at, i, room
        cdef const uint8_t* end
        cdef int64_t number = 0
        cdef arg_t* larger
        ex.argc = 0
        if self.left < 0:
            end = <const uint8_t*>memchr(data, 13, n)
            if end == NULL:
                if n > INLINE_MAX:
                    raise ProtocolError(b"too big mbulk count string")
                self.need = n + 1
                return -1
            at = end - data
            if at + 2 > n:
                self.need = at + 2
                return -1
            if not shm_number(data + 1, at - 1, &number) or number > 2147483647:
                raise ProtocolError(b"invalid multibulk length")
            if number > 10 and not self.authenticated and ex.locked:
                raise ProtocolError(b"unauthenticated multibulk length")
            if number > MOST_ARGS:
                raise ProtocolError(b"invalid multibulk length")
            if number <= 0:
                return at + 2
            self.left = number
            self.n_args = 0
            self.scanned = at + 2
        while self.left:
            at = self.scanned
            if at >= n:
                self.need = at + 1
                return -1
            end = <const uint8_t*>memchr(data + at, 13, n - at)
            if end == NULL:
                if n - at > INLINE_MAX:
                    raise ProtocolError(b"too big bulk count string")
                self.need = n + 1
                return -1
            if <uint64_t>(end - data) + 2 > n:
                self.need = (end - data) + 2
                return -1
            if data[at] != 36:      # $
                raise ProtocolError(b"expected '$', got '" + (bytes([data[at]]) if data[at] not in (10, 13) else b" ") + b"'")
            if not shm_number(data + at + 1, end - data - at - 1, &number) or number < 0 or <uint64_t>number > ex.s.max_value_bytes and number > 65536:
                raise ProtocolError(b"invalid bulk length")
            if number > 16384 and not self.authenticated and ex.locked:
                raise ProtocolError(b"unauthenticated bulk length")
            at = (end - data) + 2
            if at + number + 2 > n:
                self.need = at + number + 2
                return -1
            if self.n_args == self.room_args:
                room = 2 * self.room_args if self.room_args else 8
                larger = <arg_t*>realloc(self.args, room * sizeof(arg_t))
                if larger == NULL:
                    raise MemoryError
                self.args = larger
                self.room_args = room
            self.args[self.n_args].at = at
            self.args[self.n_args].n = number
            self.n_args += 1
            self.left -= 1
            self.scanned = at + number + 2
        ex.grow_args(self.n_args)
        for i in range(self.n_args):
            ex.argv[i] = data + self.args[i].at
            ex.argl[i] = self.args[i].n
        ex.argc = self.n_args
        self.left = -1
        if self.room_args > 8:
            free(self.args)
            self.args = NULL
            self.room_args = 0
        return self.scanned

    cdef int64_t parse_line(self, const uint8_t* data, uint64_t n) except -2:
        """An inline command."""
        cdef const uint8_t* end = <const uint8_t*>memchr(data, 10, n)
        cdef uint64_t size
        cdef Executor ex = self.ex
        cdef list words
        ex.argc = 0
        if end == NULL:
            if n > INLINE_MAX:
                raise ProtocolError(b"too big inline request")
            self.need = n + 1
            return -1
        size = end - data
        words = split_line(PyBytes_FromStringAndSize(<char*>data, <Py_ssize_t>(size - (size and data[size - 1] == 13))))
        if words:
            self.retried = words        # keeps them alive
            ex.grow_args(len(words))
            self.point(words)
        return size + 1

    cdef int point(self, list words) except -1:
        cdef Executor ex = self.ex
        cdef Py_ssize_t i
        ex.grow_args(len(words))
        for i in range(len(words)):
            ex.argv[i] = <const uint8_t*>PyBytes_AS_STRING(words[i])
            ex.argl[i] = PyBytes_GET_SIZE(words[i])
        ex.argc = len(words)
        return 0

    cdef list arguments(self, size_t first):
        cdef Executor ex = self.ex
        cdef size_t i
        cdef list found = []
        for i in range(first, ex.argc):
            found.append(PyBytes_FromStringAndSize(<char*>ex.argv[i], <Py_ssize_t>ex.argl[i]))
        return found

    # -- replies

    cdef inline uint8_t* space(self, uint64_t n) except NULL:
        """Room for n more bytes of output."""
        cdef uint64_t room
        cdef uint8_t* larger
        if unlikely(self.n_out + n > self.room_out):
            if self.n_out + n > self.most_out:
                raise CommandError(b"ERR the reply is larger than this server sends at once")
            room = max(self.n_out + n, min(2 * self.room_out, self.room_out + (1 << 22)), <uint64_t>1024)
            larger = <uint8_t*>realloc(self.out, room)
            if larger == NULL:
                raise MemoryError
            self.out = larger
            self.room_out = room
        return self.out + self.n_out

    cdef inline int raw(self, const void* data, uint64_t n) except -1:
        memcpy(self.space(n), data, n)
        self.n_out += n
        return 0

    def add(self, bytes data not None):
        """Append a reply."""
        self.raw(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))

    cdef inline int ok(self) except -1:
        return self.raw(<const char*>b"+OK\r\n", 5)

    cdef inline int nil(self) except -1:
        return self.raw(<const char*>b"_\r\n", 3) if self.protocol == 3 else self.raw(<const char*>b"$-1\r\n", 5)

    cdef inline int header(self, char kind, int64_t n) except -1:
        cdef char* to = <char*>self.space(32)
        cdef int k = 1 + shm_digits(to + 1, n)
        to[0] = kind
        to[k] = 13
        to[k + 1] = 10
        self.n_out += k + 2
        return 0

    cdef inline int integer(self, int64_t n) except -1:
        return self.header(58, n)

    cdef inline int bulk(self, const void* data, uint64_t n) except -1:
        self.header(36, n)
        self.raw(data, n)
        return self.raw(<const char*>b"\r\n", 2)

    def fail(self, bytes text not None):
        """Append an error reply: its text without the minus sign."""
        self.error(text)

    cdef int error(self, bytes text) except -1:
        self.failed = True
        self.home.count_error(text)
        self.add(b"-" + text.rstrip(b"\r\n").replace(b"\r", b" ").replace(b"\n", b" ") + b"\r\n")
        return 0

    # -- executing

    cdef int execute(self) except -1:
        """The command in Executor.argv."""
        cdef uint64_t out = self.n_out
        self.commands += 1
        self.carry = self.carry_at = 0
        self.pushing = self.failed = False
        self.answer()
        if unlikely(self.silent or self.skip) and not self.blocked and not self.pushing:
            self.hush(out)
        return 0

    cdef void hush(self, uint64_t out) noexcept:
        """CLIENT REPLY OFF or SKIP: this reply is not sent."""
        self.n_out = out
        self.skip -= self.skip > 0

    cdef int answer(self) except -1:
        cdef Executor ex = self.ex
        cdef name_t* command = ex.find(ex.argv[0], ex.argl[0])
        if unlikely(command == NULL):
            if is_http(ex.argv[0], ex.argl[0]):
                self.attacked()
                return 0
            return self.refuse(b"ERR unknown command '" + clean(ex.argv[0], min(ex.argl[0], <size_t>128)) +
                               b"', with args beginning with: " + self.beginning(), NULL)
        self.last_command = command.index
        if unlikely(ex.argc != <size_t>command.arity if command.arity > 0 else ex.argc < <size_t>(-command.arity)):
            return self.refuse(b"ERR wrong number of arguments for '" + command.name[:command.n] + b"' command", command)
        if unlikely(not self.authenticated and ex.locked and not command.flags & F_NOAUTH):
            return self.refuse(b"NOAUTH Authentication required.", command)
        if unlikely(self.in_multi or self.in_pubsub or self.restricted or ex.watched or ex.paused_until or self.untold):
            if self.unusual(command):
                ex.stats[command.index].rejected += self.failed
                return 0
        self.pushing = command.flags & F_PUSHES
        self.perform(command)
        if not self.blocked and unlikely(self.took_ns >= ex.slower_than_ns) and not command.flags & F_NOAUTH:
            # argc is 0 if other commands were part of it
            ex.slow(self, self.arguments(0) if ex.argc else [<bytes>command.name[:command.n]], self.took_ns)
        elif self.blocked and not self.in_pool and unlikely(self.took_ns >= ex.slower_than_ns) and ex.argc:
            self.asked = self.arguments(0)
        return 0

    cdef int perform(self, name_t* command) except -1:
        """Run it, here or in the pool. What it raises becomes its reply."""
        cdef Executor ex = self.ex
        cdef stat_t* stat = &self.home.stats[command.index]
        cdef uint64_t out = self.n_out, end, began = mono_ns()
        cdef bint deferred = False
        try:
            # the database may have no generation, and no room in the log for one: a connection gets out of it all the same
            if unlikely(self.db != 0 or ex.db != 0) and not command.flags & F_KEYLESS:
                ex.use(self.db)
            if unlikely(ex.put_off & command.flags) and self.db == 0:
                raise WouldWait
            if command.kind == C_PYTHON:
                reply = ex.names[command.index][1](self, self.arguments(1))
                if reply is not None:
                    self.add(reply)
            elif unlikely(ex.db != 0 and command.flags & F_WRITE) and not ex.table.impatient and not ex.has_stripes():
                self.compiled_held(command.kind)
            else:
                self.compiled(command.kind)
        except Exception as e:
            self.n_out = out
            if type(e) is WouldWait:
                self.retried = self.arguments(0)
                self.blocked = self.in_pool = deferred = True
                if not self.home.defer(self):
                    self.blocked = self.in_pool = deferred = False
                    self.error(b"BUSY too many commands wait: try again")
            else:
                self.error(error_text(e))
        if not deferred:            # else it is counted when it has run, and is perhaps being run already
            self.took_ns = mono_ns() - began
            stat.calls += 1
            stat.ns += self.took_ns
            stat.failed += self.failed
            self.home.commands += 1
            self.failed = False     # of a transaction: this part has failed, not the whole
        end = ex.table.take_log()
        if unlikely(end != 0):      # whoever sends this client's replies waits for the disk
            self.log_end = max(self.log_end, end)
            self.unheld = self.log_end
        return 0

    cdef int refuse(self, bytes text, name_t* command) except -1:
        """A command that is not run; one that was to be queued breaks its transaction."""
        if command != NULL:
            self.home.stats[command.index].rejected += 1
        return self.error(self.refused(text, "" if command == NULL else command.name[:command.n].decode()))

    def refused(self, bytes text, str name):
        """A command was refused before it ran: the error to reply."""
        return text

    cdef bint unusual(self, name_t* command) except -1:
        """True: the command is not to be run now."""
        return self.before(command.name[:command.n].decode(), command.flags, self.arguments(0))

    def before(self, str name, int flags, list arguments):
        """Called before a command that is in a transaction, on a subscribed connection, of a restricted user, watched, or paused: True if it
        is not to run."""
        return False

    def call(self, list arguments):
        """Run a command from its arguments, as part of another one: its reply is appended. None is refused for its arity here."""
        cdef name_t* command
        cdef Executor ex = self.ex
        self.point(arguments)
        command = ex.find(ex.argv[0], ex.argl[0])
        self.carry = self.carry_at = 0
        try:
            self.perform(command)
        finally:
            ex.argc = 0             # they were this call's

    def call_alone(self, list arguments, list keys not None, dict seen not None, bint keep, uint64_t log_bytes, double within):
        """Run a command as call() does, while the stripes of its (db, key) pairs are held: in the core, so that no other thread has a turn until
        it is over, unless a stripe is waited for. That is done for `within` seconds, if this thread holds nothing else; else not at all.
        seen: versions that some keys have to have. None: it has run, and its keys' versions are in seen;
        keep: not yet, the stripes are held further. (True, key): it has not run, that one is busy; (False, key): has another version.
        Raises: as hold()."""
        cdef Executor ex = self.ex
        cdef bint kept = False
        if ex.has_stripes():
            busy = ex.hold_further(keys)
            if busy is not None:
                return True, busy
        else:
            ex.hold((), log_bytes, further=keys, db=self.db, within=within)
        try:
            for key, version in zip(keys, ex.versions(keys)):
                if seen.get(key, version) != version:
                    return False, key[1]
            self.call(arguments)
            if not keep:
                seen.update(zip(keys, ex.versions(keys)))
            kept = keep
        finally:
            if not kept:
                ex.let_go()

    def redo(self, list arguments):
        """Run a command that was put off before it began, as if it came now."""
        self.point(arguments)
        self.execute()
        self.home.shrink()

    def conclude(self, finish, list answers):
        """The end of a command that had to ask others (sidecar/commands/everywhere.py): reply finish(answers), or what it raises."""
        cdef uint64_t out = self.n_out
        try:
            self.add(finish(answers))
        except Exception as e:
            self.n_out = out
            self.error(error_text(e))
        if unlikely(self.silent or self.skip):
            self.hush(out)
        if self.asked is not None:
            self.home.slow(self, self.asked, self.took_ns)
            self.asked = None

    def retry(self, Executor executor not None):
        """Run the command that would have had to wait once more: in a thread of the pool, with its executor, which may wait. Then resume() is to
        be called in the loop; till then the loop sends nothing of this client's."""
        cdef uint64_t out = self.n_out
        self.ex = executor
        executor.paused_until = self.home.paused_until
        self.point(self.retried)
        self.perform(executor.find(executor.argv[0], executor.argl[0]))
        if unlikely(self.silent or self.skip):
            self.hush(out)
        executor.shrink()

    def instead(self, Executor executor not None, bytes text not None):
        """In place of retry(): the command does not run, and this error is its reply."""
        cdef uint64_t out = self.n_out
        cdef stat_t* stat
        self.ex = executor
        self.point(self.retried)
        stat = &self.home.stats[executor.find(executor.argv[0], executor.argl[0]).index]
        stat.calls += 1
        stat.failed += 1
        self.home.commands += 1
        self.error(text)
        self.failed = False
        if unlikely(self.silent or self.skip):
            self.hush(out)
        executor.shrink()

    def take_back(self, uint64_t out, bytes text=None):
        """After retry(): what it has replied since there were `out` bytes to be sent; text: it replies this error."""
        if self.n_out > out:
            self.n_out = out
            if text is not None:
                self.error(text)
                self.failed = False

    def owe(self, Client other not None):
        """Another one has run commands for this one: this one's replies wait for what was logged."""
        if other.log_end:
            self.log_end = max(self.log_end, other.log_end)
            self.unheld = self.log_end
            other.log_end = other.unheld = 0

    cdef bytes beginning(self):
        cdef Executor ex = self.ex
        cdef size_t i
        cdef bytes text = b""
        for i in range(1, ex.argc):
            if len(text) >= 128:
                break
            text += b"'" + clean(ex.argv[i], min(ex.argl[i], 128 - <size_t>len(text))) + b"' "
        return text

    # -- the commands

    cdef int compiled_held(self, int kind) except -1:
        """Of the pool, where a command of another database than the first may wait for a step that flushes this: one that writes its first
        argument's key, and no other, takes that key's stripe before, under the generation that the database has then. With the one that it has
        read before it would see what the step has written before its flush. The wait is without HOLDING, for which others of this process wait."""
        cdef Executor ex = self.ex
        cdef set found = set()
        if kind == C_MSET or kind == C_DEL or kind == C_MSETNX or kind == C_RENAME or kind == C_RENAMENX or kind == C_COPY:
            return self.compiled(kind)
        ex.add_stripe(found, ex.argv[1], ex.argl[1])
        for i in found:
            take_stripe(ex, i)
            stripe_release(ex.s, &ex.s.stripes[<uint32_t>i])
        ex.use(self.db)
        self.hold_keys(2, 1, record_room(ex.s, ex.argl[1] + DATABASE_PREFIX, 0))
        try:
            return self.compiled(kind)
        finally:
            ex.release()

    cdef int compiled(self, int kind) except -1:
        cdef Executor ex = self.ex
        cdef size_t i, size
        cdef const uint8_t* key
        cdef int64_t n = 0
        if kind == C_GET:
            return self.get_one(ex.argv[1], ex.argl[1])
        if kind == C_SET:
            return self.set_one()
        if kind == C_MGET:
            return self.get_many()
        if kind == C_MSET:
            if not ex.argc & 1:
                return self.error(b"ERR wrong number of arguments for 'mset' command")
            for i in range(1, ex.argc, 2):
                key = ex.argv[i]
                size = ex.argl[i]
                check_key(ex, &key, &size)
            for i in range(1, ex.argc, 2):
                put_value(ex, ex.argv[i], ex.argl[i], ex.argv[i + 1], ex.argl[i + 1], CODEC_BYTES, 0, ALWAYS, 0)
            return self.ok()
        if kind == C_INCR:
            return self.incr(1)
        if kind == C_DECR:
            return self.incr(-1)
        if kind == C_INCRBY or kind == C_DECRBY:
            if not shm_number(ex.argv[2], ex.argl[2], &n):
                return self.error(b"ERR value is not an integer or out of range")
            if kind == C_DECRBY:
                if n == <int64_t>(<uint64_t>1 << 63):
                    return self.error(b"ERR decrement would overflow")
                n = -n
            return self.incr(n)
        if kind == C_DEL:
            return self.delete()
        if kind == C_EXISTS:
            return self.exists()
        if kind == C_PING:
            return self.ping()
        if kind == C_ECHO:
            return self.bulk(ex.argv[1], ex.argl[1])
        if kind == C_SETNX:
            known(ex, ex.argv[1], ex.argl[1])
            return self.integer(put_value(ex, ex.argv[1], ex.argl[1], ex.argv[2], ex.argl[2], CODEC_BYTES, 0, IF_ABSENT, 0) == OK)
        if kind == C_SETEX or kind == C_PSETEX:
            if not self.lifetime(2, kind == C_PSETEX, True, b"setex" if kind == C_SETEX else b"psetex", &n):
                return 0
            put_value(ex, ex.argv[1], ex.argl[1], ex.argv[3], ex.argl[3], CODEC_BYTES, ex.expiry_of(n), ALWAYS, 0)
            return self.ok()
        if kind == C_GETSET:
            return self.swap(0, ALWAYS)
        if kind == C_GETDEL:
            return self.take_out()
        if kind == C_GETEX:
            return self.get_and_expire()
        if kind == C_STRLEN:
            return self.length()
        if kind == C_APPEND:
            return self.append()
        if kind == C_GETRANGE:
            return self.get_range()
        if kind == C_SETRANGE:
            return self.set_range()
        if kind == C_GETBIT or kind == C_SETBIT:
            return self.bit(kind == C_SETBIT)
        if kind == C_TTL or kind == C_PTTL or kind == C_EXPIRETIME or kind == C_PEXPIRETIME:
            return self.lifetime_left(kind)
        if kind == C_EXPIRE or kind == C_PEXPIRE or kind == C_EXPIREAT or kind == C_PEXPIREAT:
            return self.expire(kind)
        if kind == C_PERSIST:
            return self.persist()
        if kind == C_TYPE:
            return self.type_of()
        if kind == C_MSETNX:
            return self.set_if_none()
        if kind == C_RENAME or kind == C_RENAMENX:
            return self.rename(kind == C_RENAMENX)
        if kind == C_COPY:
            return self.copy()
        raise AssertionError("a command without code")

    cdef int get_one(self, const uint8_t* key, size_t n) except -1:
        """The value, straight into the output buffer."""
        cdef Executor ex = self.ex
        cdef seg_t* s = ex.s
        cdef read_t r
        cdef uint64_t h, at = self.n_out
        cdef int rc, tries
        cdef raw_t raw
        if unlikely(not fits(ex, &key, &n)):
            return self.nil()
        h = siphash13(key, n, s.k0, s.k1)
        for tries in range(RESTARTS):
            rc = read_begin(s, key, n, h, &r)
            if rc == ABSENT:
                if unlikely(ex.backed):
                    break
                s.row.misses += 1
                if unlikely(r.expired):
                    take_expired(ex, key, n, h)
                return self.nil()
            if rc == OK and (r.codec == CODEC_INT or r.codec == CODEC_ENVELOPE):
                break
            if rc == OK:
                self.header(36, r.value_bytes)
                self.space(r.value_bytes + 2)
                read_copy(s, &r, self.out + self.n_out)
                if likely(read_end(s, &r) == OK):
                    if unlikely(r.damaged):
                        raise errors.DamageError("a page of this value belongs to somebody else: delete the key")
                    self.n_out += r.value_bytes
                    self.out[self.n_out] = 13
                    self.out[self.n_out + 1] = 10
                    self.n_out += 2
                    s.row.hits += 1
                    return 0
                self.n_out = at
            s.row.retries += 1
            if rc == OK and tries and r.value_bytes >= LARGE_COPY:
                break
        if not look_at(ex, key, n, &raw, True):
            return self.nil()
        return self.bulk(raw.value, raw.n)

    cdef int get_many(self) except -1:
        cdef Executor ex = self.ex
        cdef seg_t* s = ex.s
        cdef size_t at, i, end
        cdef uint64_t h[16]
        self.header(42, ex.argc - 1)
        for at in range(1, ex.argc, 16):
            end = min(<size_t>16, ex.argc - at)
            for i in range(end if likely(ex.n_prefix == 0) else 0):
                h[i] = siphash13(ex.argv[at + i], min(ex.argl[at + i], <size_t>MAX_KEY), s.k0, s.k1)
                prefetch(&s.buckets[bucket_of(s, h[i])])
            for i in range(end if likely(ex.n_prefix == 0) else 0):
                prefetch_item(s, h[i])
            for i in range(end):
                self.get_one(ex.argv[at + i], ex.argl[at + i])
        return 0

    cdef bint word(self, size_t i, const char* name) noexcept:
        cdef size_t n = 0
        while name[n]:
            n += 1
        return self.ex.argl[i] == n and shm_same_name(self.ex.argv[i], name, n)

    cdef int unit_at(self, size_t i) noexcept:
        """1 EX, 2 PX, 3 EXAT, 4 PXAT; 0: none of them."""
        return 1 if self.word(i, b"ex") else 2 if self.word(i, b"px") else 3 if self.word(i, b"exat") else 4 if self.word(i, b"pxat") else 0

    cdef bint lifetime(self, size_t i, bint in_ms, bint relative, bytes command, int64_t* unix_ms) except -1:
        """The unix time, ms, that an argument gives: False, and the error is the reply, if it does not."""
        cdef int64_t n = 0, now
        if not shm_number(self.ex.argv[i], self.ex.argl[i], &n):
            self.error(b"ERR value is not an integer or out of range")
            return False
        now = self.ex.unix_ms() if relative else 0
        if n <= 0 or (not in_ms and n > 0x7fffffffffffffff // 1000) or \
                (relative and (n if in_ms else n * 1000) > 0x7fffffffffffffff - now):
            self.error(b"ERR invalid expire time in '" + command + b"' command")
            return False
        unix_ms[0] = (n if in_ms else n * 1000) + now
        return True

    cdef int set_one(self) except -1:
        cdef Executor ex = self.ex
        cdef size_t i = 3
        cdef int64_t unix_ms = 0
        cdef uint64_t expiry = 0
        cdef bint nx = False, xx = False, get = False, keep = False
        cdef int unit = 0           # 1 EX, 2 PX, 3 EXAT, 4 PXAT
        cdef size_t time_at = 0
        cdef int when, rc
        cdef raw_t raw
        if likely(ex.argc == 3):
            put_value(ex, ex.argv[1], ex.argl[1], ex.argv[2], ex.argl[2], CODEC_BYTES, 0, ALWAYS, 0)
            return self.ok()
        while i < ex.argc:
            if self.word(i, b"nx") and not xx:
                nx = True
            elif self.word(i, b"xx") and not nx:
                xx = True
            elif self.word(i, b"get"):
                get = True
            elif self.word(i, b"keepttl") and not unit:
                keep = True
            elif i + 1 < ex.argc and not keep and self.unit_at(i) and unit in (0, self.unit_at(i)):
                unit = self.unit_at(i)
                i += 1
                time_at = i
            else:
                return self.error(b"ERR syntax error")
            i += 1
        if unit:
            if not self.lifetime(time_at, unit == 2 or unit == 4, unit <= 2, b"set", &unix_ms):
                return 0
            expiry = ex.expiry_of(unix_ms)
        when = IF_ABSENT if nx else IF_PRESENT if xx else ALWAYS
        if get or keep:
            return self.set_knowing(expiry, when, get, keep)
        if when != ALWAYS:
            known(ex, ex.argv[1], ex.argl[1])
        rc = put_value(ex, ex.argv[1], ex.argl[1], ex.argv[2], ex.argl[2], CODEC_BYTES, expiry, when, 0)
        return self.ok() if rc == OK else self.nil()

    cdef int swap(self, uint64_t expiry, int when) except -1:
        return self.set_knowing(expiry, when, True, False)

    cdef int set_knowing(self, uint64_t expiry, int when, bint get, bint keep) except -1:
        """A set that has to know what it replaces: again until nobody came between."""
        cdef Executor ex = self.ex
        cdef raw_t raw
        cdef bint there
        cdef int rc
        while True:
            there = look(ex, ex.argv[1], ex.argl[1], &raw, get)
            if (when == IF_ABSENT and there) or (when == IF_PRESENT and not there):
                rc = EXISTS
                break
            rc = put_value(ex, ex.argv[1], ex.argl[1], ex.argv[2], ex.argl[2], CODEC_BYTES,
                           as_it_was(&raw) if keep and there else expiry, IF_VERSION if there else IF_ABSENT, raw.version if there else 0)
            if rc == OK:
                break
        if get:
            return self.bulk(raw.value, raw.n) if there else self.nil()
        return self.ok() if rc == OK else self.nil()

    cdef int take_out(self) except -1:
        cdef Executor ex = self.ex
        cdef raw_t raw
        while True:
            if not look(ex, ex.argv[1], ex.argl[1], &raw, True):
                return self.nil()
            if remove_key(ex, ex.argv[1], ex.argl[1], raw.version) == OK:
                return self.bulk(raw.value, raw.n)

    cdef int get_and_expire(self) except -1:
        cdef Executor ex = self.ex
        cdef raw_t raw
        cdef int64_t unix_ms = 0
        cdef int unit = 0
        cdef bint persist = False
        cdef size_t i = 2
        while i < ex.argc:
            if self.word(i, b"persist") and not unit:
                persist = True
            elif i + 1 < ex.argc and not persist and self.unit_at(i) and unit in (0, self.unit_at(i)):
                unit = self.unit_at(i)
                i += 1
            else:
                return self.error(b"ERR syntax error")
            i += 1
        while True:
            if not look(ex, ex.argv[1], ex.argl[1], &raw, True):
                return self.nil()
            if unit and not unix_ms and not self.lifetime(ex.argc - 1, unit == 2 or unit == 4, unit <= 2, b"getex", &unix_ms):
                return 0
            if unit and ex.expiry_of(unix_ms) <= now_ms(ex.s):
                if remove_key(ex, ex.argv[1], ex.argl[1], raw.version) != OK:
                    continue
            elif unit:
                self.change_expiry(ex.expiry_of(unix_ms))
            elif persist and raw.expiry_ms:
                self.change_expiry(0)
            return self.bulk(raw.value, raw.n)

    cdef int change_expiry(self, uint64_t expiry_ms) except -100:
        """Of argv[1]: OK or ABSENT."""
        return expire_key(self.ex, self.ex.argv[1], self.ex.argl[1], expiry_ms)

    cdef int incr(self, int64_t by) except -1:
        cdef Executor ex = self.ex
        cdef const uint8_t* key
        cdef size_t n
        cdef seg_t* s = ex.s
        cdef int64_t number = 0, out = 0
        cdef raw_t raw
        cdef log_t log
        cdef int rc
        while True:
            key = ex.argv[1]
            n = ex.argl[1]
            check_key(ex, &key, &n)
            log.end = 0
            rc = ex.table.add_view(s, ex.mapping, key, n, siphash13(key, n, s.k0, s.k1), by, &out, &log)
            if unlikely(log.end != 0):
                ex.table.note_log(&log)
            if rc == OK:
                s.row.sets += 1
                if unlikely(ex.backed == KNOWS):
                    noted(ex, key, n, NEVER, False)
                return self.integer(out)
            if rc == OVERFLOW:
                return self.error(b"ERR increment or decrement would overflow")
            if rc == ABSENT or rc == NO_STORE or rc == BUSY:        # the last two raise here
                if not known(ex, ex.argv[1], ex.argl[1]):
                    if put_value(ex, ex.argv[1], ex.argl[1], <const uint8_t*>&by, 8, CODEC_INT, 0, IF_ABSENT, 0) == OK:
                        return self.integer(by)
                    continue
            if not look_at(ex, key, n, &raw, True):
                continue
            if not shm_number(raw.value, raw.n, &number):
                return self.error(b"ERR value is not an integer or out of range")
            if (by > 0 and number > 0x7fffffffffffffff - by) or (by < 0 and number < -0x7fffffffffffffff - 1 - by):
                return self.error(b"ERR increment or decrement would overflow")
            number += by
            if put_value(ex, ex.argv[1], ex.argl[1], <const uint8_t*>&number, 8, CODEC_INT, as_it_was(&raw), IF_VERSION, raw.version) == OK:
                return self.integer(number)

    cdef int delete(self) except -1:
        cdef Executor ex = self.ex
        cdef size_t i
        for i in range(max(<size_t>1, self.carry_at), ex.argc):
            self.carry_at = i       # if it would have to wait: it goes on here
            known(ex, ex.argv[i], ex.argl[i])
            self.carry += remove_key(ex, ex.argv[i], ex.argl[i], 0) == OK
        return self.integer(self.carry)

    cdef int exists(self) except -1:
        cdef Executor ex = self.ex
        cdef size_t i
        cdef raw_t raw
        cdef int64_t n = 0
        for i in range(1, ex.argc):
            n += look(ex, ex.argv[i], ex.argl[i], &raw, False)
        return self.integer(n)

    cdef int ping(self) except -1:
        cdef Executor ex = self.ex
        if ex.argc > 2:
            return self.error(b"ERR wrong number of arguments for 'ping' command")
        if unlikely(self.in_pubsub and self.protocol == 2):
            self.raw(<const char*>b"*2\r\n$4\r\npong\r\n", 14)
            return self.bulk(ex.argv[1], ex.argl[1]) if ex.argc == 2 else self.bulk(<const char*>b"", 0)
        if ex.argc == 2:
            return self.bulk(ex.argv[1], ex.argl[1])
        return self.raw(<const char*>b"+PONG\r\n", 7)

    cdef int length(self) except -1:
        cdef raw_t raw
        return self.integer(<int64_t>raw.n if look(self.ex, self.ex.argv[1], self.ex.argl[1], &raw, False) else 0)

    cdef int append(self) except -1:
        cdef Executor ex = self.ex
        cdef raw_t raw
        cdef uint64_t more = ex.argl[2]
        while True:
            if not look(ex, ex.argv[1], ex.argl[1], &raw, True):
                if put_value(ex, ex.argv[1], ex.argl[1], ex.argv[2], more, CODEC_BYTES, 0, IF_ABSENT, 0) == OK:
                    return self.integer(more)
                continue
            ex.grow_scratch(raw.n + more)
            memcpy(ex.scratch + raw.n, ex.argv[2], more)
            if put_value(ex, ex.argv[1], ex.argl[1], ex.scratch, raw.n + more, CODEC_BYTES | RAW, as_it_was(&raw), IF_VERSION, raw.version) == OK:
                return self.integer(raw.n + more)

    cdef int get_range(self) except -1:
        cdef Executor ex = self.ex
        cdef raw_t raw
        cdef int64_t first = 0, last = 0, n
        if not shm_number(ex.argv[2], ex.argl[2], &first) or not shm_number(ex.argv[3], ex.argl[3], &last):
            return self.error(b"ERR value is not an integer or out of range")
        if not look(ex, ex.argv[1], ex.argl[1], &raw, True):
            return self.bulk(<const char*>b"", 0)
        n = raw.n
        if first < 0 and last < 0 and first > last:
            return self.bulk(<const char*>b"", 0)
        first = max(first + n, 0) if first < 0 else first
        last = max(last + n, 0) if last < 0 else last
        last = min(last, n - 1)
        if first > last or n == 0:
            return self.bulk(<const char*>b"", 0)
        return self.bulk(raw.value + first, last - first + 1)

    cdef int set_range(self) except -1:
        cdef Executor ex = self.ex
        cdef raw_t raw
        cdef int64_t offset = 0
        cdef uint64_t size
        cdef bint there
        if not shm_number(ex.argv[2], ex.argl[2], &offset):
            return self.error(b"ERR value is not an integer or out of range")
        if offset < 0:
            return self.error(b"ERR offset is out of range")
        while True:
            there = look(ex, ex.argv[1], ex.argl[1], &raw, True)
            if not there:
                raw.n = 0
            if ex.argl[3] == 0:
                return self.integer(raw.n)
            if <uint64_t>offset + ex.argl[3] > ex.s.max_value_bytes:
                return self.error(b"ERR string exceeds maximum allowed size (proto-max-bulk-len)")
            size = max(raw.n, <uint64_t>offset + ex.argl[3])
            ex.grow_scratch(size)
            if <uint64_t>offset > raw.n:
                memset(ex.scratch + raw.n, 0, <uint64_t>offset - raw.n)
            memcpy(ex.scratch + offset, ex.argv[3], ex.argl[3])
            if put_value(ex, ex.argv[1], ex.argl[1], ex.scratch, size, CODEC_BYTES | RAW, as_it_was(&raw) if there else 0,
                         IF_VERSION if there else IF_ABSENT, raw.version if there else 0) == OK:
                return self.integer(size)

    cdef int bit(self, bint setting) except -1:
        cdef Executor ex = self.ex
        cdef raw_t raw
        cdef int64_t offset = 0, on = 0
        cdef uint64_t at, size
        cdef int was
        cdef bint there
        if not shm_number(ex.argv[2], ex.argl[2], &offset) or offset < 0 or <uint64_t>offset >> 3 >= ex.s.max_value_bytes:
            return self.error(b"ERR bit offset is not an integer or out of range")
        if setting and (not shm_number(ex.argv[3], ex.argl[3], &on) or on & ~<int64_t>1):
            return self.error(b"ERR bit is not an integer or out of range")
        at = <uint64_t>offset >> 3
        while True:
            there = look(ex, ex.argv[1], ex.argl[1], &raw, True)
            if not there:
                raw.n = 0
            was = ex.scratch[at] >> (7 - (offset & 7)) & 1 if at < raw.n else 0
            if not setting or (there and was == on and at < raw.n):
                return self.integer(was)
            size = max(raw.n, at + 1)
            ex.grow_scratch(size)
            memset(ex.scratch + raw.n, 0, size - raw.n)
            ex.scratch[at] = <uint8_t>(ex.scratch[at] & ~(1 << (7 - (offset & 7))) | on << (7 - (offset & 7)))
            if put_value(ex, ex.argv[1], ex.argl[1], ex.scratch, size, CODEC_BYTES | RAW, as_it_was(&raw) if there else 0,
                         IF_VERSION if there else IF_ABSENT, raw.version if there else 0) == OK:
                return self.integer(was)

    cdef int lifetime_left(self, int kind) except -1:
        cdef Executor ex = self.ex
        cdef raw_t raw
        cdef int64_t at, left
        if not look(ex, ex.argv[1], ex.argl[1], &raw, False):
            return self.integer(-2)
        if raw.expiry_ms == 0:
            return self.integer(-1)
        at = ex.unix_of(raw.expiry_ms)
        left = max(<int64_t>0, at - ex.unix_ms())
        if kind == C_TTL:
            return self.integer((left + 500) // 1000)
        if kind == C_PTTL:
            return self.integer(left)
        return self.integer(at // 1000 + (at % 1000 >= 500) if kind == C_EXPIRETIME else at)

    cdef int expire(self, int kind) except -1:
        cdef Executor ex = self.ex
        cdef bint in_ms = kind == C_PEXPIRE or kind == C_PEXPIREAT, relative = kind == C_EXPIRE or kind == C_PEXPIRE
        cdef bint nx = False, xx = False, gt = False, lt = False
        cdef int64_t when = 0, now, old
        cdef size_t i
        cdef raw_t raw
        for i in range(3, ex.argc):
            if self.word(i, b"nx"):
                nx = True
            elif self.word(i, b"xx"):
                xx = True
            elif self.word(i, b"gt"):
                gt = True
            elif self.word(i, b"lt"):
                lt = True
            else:
                return self.error(b"ERR Unsupported option " + clean(ex.argv[i], ex.argl[i]))
        if nx and (xx or gt or lt):
            return self.error(b"ERR NX and XX, GT or LT options at the same time are not compatible")
        if gt and lt:
            return self.error(b"ERR GT and LT options at the same time are not compatible")
        if not shm_number(ex.argv[2], ex.argl[2], &when):
            return self.error(b"ERR value is not an integer or out of range")
        now = ex.unix_ms()
        if (not in_ms and (when > 0x7fffffffffffffff // 1000 or when < -0x7fffffffffffffff // 1000)) or \
                (relative and (when if in_ms else when * 1000) > 0x7fffffffffffffff - now):
            return self.error(b"ERR invalid expire time in '" + (<bytes>b"p" if in_ms else b"") +
                              (<bytes>b"expire" if relative else b"expireat") + b"' command")
        when = (when if in_ms else when * 1000) + (now if relative else 0)
        while True:
            if not look(ex, ex.argv[1], ex.argl[1], &raw, False):
                return self.integer(0)
            old = ex.unix_of(raw.expiry_ms) if raw.expiry_ms else -1
            if (nx and old >= 0) or (xx and old < 0) or (gt and (old < 0 or when <= old)) or (lt and old >= 0 and when >= old):
                return self.integer(0)
            if when <= now:
                if remove_key(ex, ex.argv[1], ex.argl[1], raw.version) == OK:
                    return self.integer(1)
            elif self.change_expiry(ex.expiry_of(when)) == OK:
                return self.integer(1)

    cdef int persist(self) except -1:
        cdef Executor ex = self.ex
        cdef raw_t raw
        if not look(ex, ex.argv[1], ex.argl[1], &raw, False) or raw.expiry_ms == 0:
            return self.integer(0)
        return self.integer(self.change_expiry(0) == OK)

    cdef int type_of(self) except -1:
        cdef raw_t raw
        if look(self.ex, self.ex.argv[1], self.ex.argl[1], &raw, False):
            return self.raw(<const char*>b"+string\r\n", 9)
        return self.raw(<const char*>b"+none\r\n", 7)

    # -- several keys in one step

    cdef bint hold_keys(self, size_t end, size_t step, uint64_t log_bytes) except -1:
        """Take the stripes of the keys among the arguments 1, 1 + step, ... before end. False: whoever called this command has them."""
        cdef Executor ex = self.ex
        cdef set found
        cdef size_t i
        if ex.has_stripes():
            return False
        while True:
            found = set()
            for i in range(1, end, step):
                ex.add_stripe(found, ex.argv[i], ex.argl[i])
            ex.take_stripes(found, log_bytes)
            if ex.is_current():
                return True
            ex.release()
            ex.use(self.db)

    cdef int set_if_none(self) except -1:
        cdef Executor ex = self.ex
        cdef size_t i, n
        cdef const uint8_t* key
        cdef uint64_t log_bytes = 0
        cdef bint held
        if not ex.argc & 1:
            return self.error(b"ERR wrong number of arguments for 'msetnx' command")
        for i in range(1, ex.argc, 2):
            key = ex.argv[i]
            n = ex.argl[i]
            check_key(ex, &key, &n)
            log_bytes += record_room(ex.s, n, 0)
        held = self.hold_keys(ex.argc, 2, log_bytes)
        try:
            for i in range(1, ex.argc, 2):
                if not is_none(ex, ex.argv[i], ex.argl[i]):
                    return self.integer(0)
            for i in range(1, ex.argc, 2):
                put_value(ex, ex.argv[i], ex.argl[i], ex.argv[i + 1], ex.argl[i + 1], CODEC_BYTES, 0, ALWAYS, 0)
            return self.integer(1)
        finally:
            if held:
                ex.release()

    cdef int rename(self, bint only_if_absent) except -1:
        cdef Executor ex = self.ex
        cdef raw_t raw
        cdef bint held
        held = self.hold_keys(3, 1, record_room(ex.s, ex.argl[1] + DATABASE_PREFIX, 0) + record_room(ex.s, ex.argl[2] + DATABASE_PREFIX, 0))
        try:
            if not look(ex, ex.argv[1], ex.argl[1], &raw, False):
                return self.error(b"ERR no such key")
            if ex.argl[1] == ex.argl[2] and memcmp(ex.argv[1], ex.argv[2], ex.argl[1]) == 0:
                return self.integer(0) if only_if_absent else self.ok()
            if only_if_absent and not is_none(ex, ex.argv[2], ex.argl[2]):
                return self.integer(0)
            if not look(ex, ex.argv[1], ex.argl[1], &raw, VERBATIM):    # evicted in between
                return self.error(b"ERR no such key")
            put_copy(ex, ex.argv[2], ex.argl[2], &raw)
            remove_key(ex, ex.argv[1], ex.argl[1], 0)
            return self.integer(1) if only_if_absent else self.ok()
        finally:
            if held:
                ex.release()

    cdef int copy(self) except -1:
        cdef Executor ex = self.ex
        cdef raw_t raw
        cdef size_t i = 3
        cdef int64_t db = self.db
        cdef bint replace = False, held = False
        cdef set found
        while i < ex.argc:
            if self.word(i, b"replace"):
                replace = True
            elif self.word(i, b"db") and i + 1 < ex.argc:
                i += 1
                if not shm_number(ex.argv[i], ex.argl[i], &db):
                    return self.error(b"ERR value is not an integer or out of range")
                if not 0 <= db < ex.databases:
                    return self.error(b"ERR DB index is out of range")
            else:
                return self.error(b"ERR syntax error")
            i += 1
        if db == self.db and ex.argl[1] == ex.argl[2] and memcmp(ex.argv[1], ex.argv[2], ex.argl[1]) == 0:
            return self.error(b"ERR source and destination objects are the same")
        if unlikely(ex.put_off) and db == 0:
            raise WouldWait
        try:
            while not held and not ex.has_stripes():
                ex.pin()
                found = set()
                ex.add_stripe(found, ex.argv[1], ex.argl[1])
                ex.use(<int>db)
                ex.add_stripe(found, ex.argv[2], ex.argl[2])
                ex.take_stripes(found, record_room(ex.s, ex.argl[2] + DATABASE_PREFIX, 0))
                held = ex.is_current()
                if not held:
                    ex.release()
                    ex.use(self.db)
            ex.use(<int>db)
            if not replace and not is_none(ex, ex.argv[2], ex.argl[2]):
                return self.integer(0)
            ex.use(self.db)
            if not look(ex, ex.argv[1], ex.argl[1], &raw, VERBATIM):
                return self.integer(0)
            ex.use(<int>db)
            put_copy(ex, ex.argv[2], ex.argl[2], &raw)
            return self.integer(1)
        finally:
            if held:
                ex.release()
            elif not ex.has_stripes():
                ex.pinned = None

    def transact(self, list queue not None, list keys not None, bint everything, list flushed not None, set selected not None, dict watching not None,
                 uint64_t log_bytes, is_answered, bint looked_at):
        """EXEC: the replies to the queued commands are appended, unless a watched key has another version now: False. keys: (db, key) of all of
        them. everything: of all other keys, too. flushed: databases that are flushed, in order; 0: all. selected: those that
        are used besides, which get a generation before a stripe is taken. is_answered: called with each command before it runs, if they are looked at or the user is restricted. True: it has its reply, and
        does not run.
        Raises: as hold(), nothing was done then.

        Race: between the first stripe and the last command compiled commands do not let another thread of this process run; what is queued
        and is not compiled does, and may keep its stripes for as long as the other threads take. Crash: each stripe is repaired by itself."""
        cdef Executor ex = self.ex
        cdef set found
        cdef bytes key
        cdef int db
        while True:
            found = set()
            ex.pin()
            try:
                for db, key in keys:
                    if db != ex.db:
                        ex.use(db)
                    ex.add_stripe(found, <const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key))
                for db in selected:
                    ex.use(db)
                if everything:
                    found.update(range(ex.s.n_stripes))
                ex.draw_ahead(found, flushed, keys)
                ex.take_stripes(found, log_bytes)
            except BaseException:
                ex.pinned = None
                ex.drawn = {}
                raise
            if ex.is_current():
                break
            ex.release()
            ex.use(self.db)
        ex.own = keys
        ex.is_final = True
        try:
            for (db, key), version in watching.items():
                if db != ex.db:
                    ex.use(db)
                if ex.version(key) != version:
                    return False
            self.header(42, len(queue))
            for words in queue:
                if (looked_at or self.restricted) and is_answered(words):
                    continue
                self.call(words)
        finally:
            ex.release()
        return True


cdef inline int64_t offset_of(seg_t* s, int64_t ns) noexcept:
    """Of the wall's clock before the monotonic one, as Executor.offset."""
    return (ns + 999_999) // 1_000_000 - ldi64r(&s.header.clock_shift_ms)


# ---- error replies, inline commands ---------------------------------------------------------------------------------------------

cdef bint is_http(const uint8_t* name, size_t n) noexcept:
    return (n == 4 and shm_same_name(name, b"post", 4)) or (n == 5 and shm_same_name(name, b"host:", 5))


cdef bytes clean(const uint8_t* p, size_t n):
    """For an error: up to the first zero byte, as C prints a string."""
    return PyBytes_FromStringAndSize(<char*>p, <Py_ssize_t>n).split(b"\0")[0]


def error_text(e):
    """A reply for what a command raised."""
    if isinstance(e, CommandError):
        return e.args[0]
    if isinstance(e, errors.NoRoom):
        return b"OOM command not allowed when used memory > 'maxmemory'."
    if isinstance(e, errors.StripeBusy):
        return b"TRYAGAIN a process that does not run holds a lock that this command needs; nothing was changed"
    if isinstance(e, (errors.LogFull, errors.NotDurable)):
        return b"MISCONF " + str(e).encode()
    if isinstance(e, errors.ShmcacheError):
        return b"ERR " + " ".join(str(e).split()).encode("utf-8", "replace")
    if isinstance(e, (OverflowError, ValueError, MemoryError)):
        return b"ERR internal error: " + type(e).__name__.encode()
    raise e


class CommandError(Exception):
    """A command's error reply, without its minus sign: CommandError(b"ERR syntax error")."""


cdef dict ESCAPES = {110: 10, 114: 13, 116: 9, 98: 8, 97: 7}


def split_line(const uint8_t[:] line not None):
    """The words of an inline command. Quotes and escapes as redis-cli's. Raises: ProtocolError."""
    cdef list words = []
    cdef Py_ssize_t i = 0, n = line.shape[0]
    cdef uint8_t quote
    cdef bytearray word
    while True:
        while i < n and (line[i] == 32 or 9 <= line[i] <= 13 or line[i] == 0):
            if line[i] == 0:
                return words
            i += 1
        if i == n:
            return words
        word = bytearray()
        while i < n and not (line[i] == 32 or line[i] in (9, 10, 13, 0)):
            if line[i] != 34 and line[i] != 39:
                word.append(line[i])
                i += 1
                continue
            quote = line[i]
            i += 1
            while True:
                if i == n:
                    raise ProtocolError(b"unbalanced quotes in request")
                if quote == 34 and line[i] == 92 and i + 3 < n and line[i + 1] == 120 and is_hex(line[i + 2]) and is_hex(line[i + 3]):
                    word.append(int(bytes(line[i + 2:i + 4]), 16))
                    i += 4
                elif quote == 34 and line[i] == 92 and i + 1 < n:
                    word.append(ESCAPES.get(line[i + 1], line[i + 1]))
                    i += 2
                elif quote == 39 and line[i] == 92 and i + 1 < n and line[i + 1] == 39:
                    word.append(39)
                    i += 2
                elif line[i] == quote:
                    i += 1
                    if i < n and not (line[i] == 32 or 9 <= line[i] <= 13 or line[i] == 0):
                        raise ProtocolError(b"unbalanced quotes in request")
                    break
                else:
                    word.append(line[i])
                    i += 1
            break
        words.append(bytes(word))


cdef bint is_hex(uint8_t c) noexcept:
    return 48 <= c <= 57 or 65 <= c <= 70 or 97 <= c <= 102
