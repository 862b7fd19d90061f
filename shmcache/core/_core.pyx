# cython: binding=False, embedsignature=True, boundscheck=False, wraparound=False, cdivision=True
"""The compiled core's edge to Python: `Mapping` (a process's place in a segment) and `Table` (the operations on it).

Below this file everything returns a status (token.pxd, rc_t); exceptions are born here, in fail(). The rules of this edge:

- a call first does everything with the GIL held and without sleeping (limit 0); only when a lock is busy, or the copy is a long one,
  it leaves the GIL
- no Python object is touched under any lock
- while a call runs without the GIL its handle counts it in flight, and close() waits for it
- whatever may run other Python (a codec, a signal handler, a generator's caller) may close this handle: a method that uses `s` after
  such a point keeps the mapping in a local, `held`; the segment is unmapped when the last such reference goes
"""
cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from cpython.unicode cimport PyUnicode_Check, PyUnicode_DecodeUTF8
from libc.errno cimport errno
from libc.math cimport log as ln
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strncpy
from posix.unistd cimport pread, usleep

from shmcache.core.atomics cimport add64, cas32, ld32, ld64, likely, prefetch, st64, unlikely
from shmcache.core.big cimport big_read
from shmcache.core.bucket cimport bucket_of, pthread_self, stripe_of, stripe_release, stripe_take
from shmcache.core.clock cimport now_ms, ring_supervisor
from shmcache.core.envelope cimport (
    CODEC_ENVELOPE, ENVELOPE_FIXED, FLAG_NEGATIVE, HEAD_BYTES, MOST_TAGS, STATE_DAMAGED, STATE_FRESH, STATE_GONE, STATE_NEGATIVE, STATE_STALE, TAG_BYTES, TAG_PREFIX_BYTES,
    TAKE_EARLY, TAKE_STALE, envelope_open, envelope_t)
from shmcache.core.dirty cimport any_dirty, writes_back
from shmcache.core.layout cimport (
    BATCH_CLASSES, BATCH_SLOTS, CLS_POOL, CONFIG_BYTES, DATABASES, FLAG_CLAIM, FLAG_COPY_TTL, FLAG_LOCK, FLAG_WRITING, LAYOUT_VERSION, LOG_ALWAYS, LOG_OFF, MAX_CLASSES, MAX_KEY, MAX_ROWS, MIN_CHUNK,
    NAMESPACES_FIRST, PARKED_SLOTS, POLICY_BACK, VERSIONS_SHIFT,
    bucket_t, class_t, databases_t, header_t, item_t, lock_t, overflow_t, page_t, pool_t, ring_t,
    row_t, seg_t, stripe_t)
from shmcache.core.lock cimport wait_until
from shmcache.core.ring cimport log_t, record_room, ring_of, ring_release, ring_secure, ring_wait, take_kept, wake_drainer
from shmcache.core.siphash cimport siphash, siphash13
from shmcache.core.slab cimport chunk_class, cls_mark, give_back_all, item_at, page_cls
from shmcache.core.table cimport (
    ALWAYS, IF_ABSENT, IF_CLAIM, IF_PRESENT, IF_SAME, IF_UNCLAIMED, IF_UNMARKED, IF_UNMARKED_BY_ANY, IF_VERSION, LARGE_COPY, MADE, RESTARTS, add_to,
    claim_t, clear_all, count_items, drop_dirty, end_mark, envelope_state, give_up, mark_t, next_keys, passes_by, prefetch_item, put, put_t, read_begin, read_claim, read_copy, read_end,
    read_generation, read_left, read_t, remove, remove_claim, same_item, set_expiry, state_in_place, unchanged)
from shmcache.core.token cimport (
    ABSENT, AGAIN, BUSY, EXISTS, INTR, KEPT, MISMATCH, NO_OFD, NO_ROOM, NO_ROW, NO_STORE, NOT_INT, OK, OS_ERROR, OVERFLOW, RESTORER_BYTE,
    SUPERVISOR_BYTE, close, dead, getpid, hold_byte, mono_ns, munmap, prober_ready, row_held, row_of, shm_ofd_lock, shm_reopen, shm_wiped_page, take_row, wall_ms, word_of)

import sys
from os import urandom

from shmcache import errors

cdef extern from *:
    """
    static __thread int shm_at_once;            /* this thread does not wait for room for dirty items */
    static __thread uint64_t shm_acts_for;      /* number of the task or greenlet in whose place it acts; 0: none */
    """
    bint at_once "shm_at_once"
    uint64_t acts_for "shm_acts_for"

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* n) except NULL
    bint PyUnicode_CheckExact(object o)
    bint PyUnicode_IS_COMPACT_ASCII(object o)
    object PyLong_FromLongLong(long long v)
    object PyObject_Vectorcall(object f, PyObject* const* arguments, size_t n, object names)

cdef extern from *:
    """
    #include <errno.h>
    #include <stddef.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #define SHM_HUGE ((uint64_t)2 << 20)
    #ifndef MADV_COLLAPSE
    #define MADV_COLLAPSE 25
    #endif
    /* At an address at which the kernel can map huge pages, if the segment has them. */
    static void *shm_map(int fd, uint64_t size) {
        uint64_t whole = (size + 4095) & ~(uint64_t)4095;
        char *room = mmap(NULL, whole + SHM_HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0), *p;
        uint64_t before;
        if (room == MAP_FAILED) return NULL;
        before = -(uint64_t)room & (SHM_HUGE - 1);
        p = mmap(room + before, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
        if (p == MAP_FAILED) { int e = errno; munmap(room, whole + SHM_HUGE); errno = e; return NULL; }
        if (before) munmap(room, before);
        munmap(p + whole, SHM_HUGE - before);
        madvise(p, size, MADV_DONTDUMP);    /* a core dump of a worker is not to hold the cache */
        return p;
    }
    /* Put the pages of a mapping together to huge ones, for everybody: 0, or the errno of what could not be. */
    static int shm_collapse(void *p, uint64_t size) { return madvise(p, size, MADV_COLLAPSE) ? errno : 0; }
    static int shm_give_back(void *p, uint64_t size) { return madvise(p, size, MADV_REMOVE); }
    static int shm_stat(int fd, uint64_t *dev, uint64_t *ino, uint64_t *size) {
        struct stat st;
        if (fstat(fd, &st)) return -1;
        *dev = (uint64_t)st.st_dev; *ino = (uint64_t)st.st_ino; *size = (uint64_t)st.st_size;
        return 0;
    }
    static int shm_unlinked(int fd) {
        struct stat st;
        return fstat(fd, &st) == 0 && st.st_nlink == 0;
    }
    #define SHM_MAGIC 0x65686361636d6873ull     /* "shmcache" */
    /* Of the thread that runs, from 1. Not its ident, which is used again when it has ended. */
    static uint64_t shm_threads;
    static __thread uint64_t shm_thread;
    static uint64_t shm_this_thread(void) {
        if (!shm_thread) shm_thread = __atomic_add_fetch(&shm_threads, 1, __ATOMIC_RELAXED);
        return shm_thread;
    }
    """
    uint64_t this_thread "shm_this_thread"() noexcept nogil
    void* shm_map(int fd, uint64_t size) noexcept nogil
    int shm_collapse(void* p, uint64_t size) noexcept nogil
    int shm_give_back(void* p, uint64_t size) noexcept nogil
    int shm_stat(int fd, uint64_t* dev, uint64_t* ino, uint64_t* size) noexcept nogil
    bint shm_unlinked(int fd) noexcept nogil
    const uint64_t MAGIC "SHM_MAGIC"

cdef enum:
    CODEC_BYTES = 0
    CODEC_STR = 1
    CODEC_INT = 2
    CODEC_MSGPACK = 3
    WRITTEN = 32                # with IF_CLAIM or IF_SAME: a write, that has to get to the store
    MOST_LOCKS = 1024           # that a process notes before it looks for those that are over
    NAMED_LOCKS = 10            # of those that were lost
    MOST_BOUND = 7              # keyword arguments of a Bound
    GROUP = 16                  # keys that get_many fetches ahead
    STACK_BYTES = 1024          # values up to this are copied to the stack before they are decoded
    LOG_WAIT_NS = 1000000000    # for room in the ring
    RESTORE_WAIT_NS = 1000000000    # for a generation that is to be restored
    LONG_COPY = 32 << 20        # bytes: copying them takes about the interpreter's switch interval, for which getting the GIL back may have to wait

cdef char* TOMBSTONE = b"\0\1\0\0\0\0\0\0\0\0\0\0"      # an envelope: nothing, negative, no tags
cdef uint64_t NEVER = <uint64_t>-1              # log_t.end: it is in no log
cdef uint64_t DURABLE_WAIT_NS = 10000000000     # for an fsync

cdef uint32_t ABI = <uint32_t>(1 << 8 | sizeof(void*) * 8)

CONSTANTS = {"row": sizeof(row_t), "header": sizeof(header_t), "stripe": sizeof(stripe_t), "databases": sizeof(databases_t), "class": sizeof(class_t),
               "page": sizeof(page_t), "bucket": sizeof(bucket_t), "overflow": sizeof(overflow_t), "item": sizeof(item_t), "ring": sizeof(ring_t),
               "max_rows": MAX_ROWS, "versions_shift": VERSIONS_SHIFT, "max_classes": MAX_CLASSES, "max_key": MAX_KEY, "min_chunk": MIN_CHUNK,
               "config": CONFIG_BYTES, "layout_version": LAYOUT_VERSION, "abi": ABI}


def siphash_rounds(const uint8_t[:] data not None, uint64_t k0, uint64_t k1, int c, int d):
    """SipHash-c-d of data under the key (k0, k1): what the published vectors are held against."""
    return siphash(&data[0] if data.shape[0] else NULL, data.shape[0], k0, k1, c, d)


def monotonic():
    """Seconds, for deadlines: time.monotonic(), but not what a test that freezes the clock has put in its place."""
    return mono_ns() / 1e9


cdef uint64_t task_or_greenlet() except? 0:
    """The number of the asyncio task or greenlet that runs; 0: neither. Who loads neither module pays two look-ups."""
    global owner_number
    if "asyncio" not in modules and "greenlet" not in modules:
        return acts_for
    if owner_number is None:
        from shmcache.core.owner import number
        owner_number = number
    return owner_number() or acts_for


cdef int who_waits(const claim_t* mine, const claim_t* whose) noexcept:
    """What claim() says of a claim of this process."""
    if whose.owner == mine.owner and (mine.owner or whose.thread == mine.thread):
        return -2
    if whose.owner:
        return -7 if whose.owner == acts_for else -6 if whose.thread == mine.thread else -1
    return -7 if whose.thread == mine.thread else -1


cdef int waits_for(const claim_t* whose) except 0:
    """The same, of what the caller finds."""
    cdef claim_t mine
    mine.thread = this_thread()
    mine.owner = task_or_greenlet()
    return who_waits(&mine, whose)


def caller_number():
    """The caller's, for acting_for()."""
    return task_or_greenlet()


def acting_for(uint64_t number, call):
    """call() by this thread in the place of that task or greenlet: what that has claimed is this one's own. Tasks and greenlets that call()
    runs in this thread are callers of their own."""
    global acts_for
    cdef uint64_t before = acts_for
    acts_for = number
    try:
        return call()
    finally:
        acts_for = before


# ---- layout, for the numpy dtypes ---------------------------------------------------------------------------------------

def seconds(ttl):
    """A ttl as a number of seconds, 0 or at least 0.001. Raises: InvalidTTL."""
    return ttl_to_ms(ttl) / 1000.0


def key_bytes(key):
    """The bytes of a key. Raises: InvalidKey, InvalidKeyType."""
    cdef const uint8_t* k
    cdef size_t n
    key_view(key, &k, &n)
    return key if PyBytes_CheckExact(key) else PyBytes_FromStringAndSize(<char*>k, <Py_ssize_t>n)


def own_key(bytes prefix, name, str what, Py_ssize_t most=MAX_KEY):
    """The cache's own key of a name or key that a user has passed: its bytes behind a prefix.

    Args: what: the name is, for errors ("the name of a lock"). most: bytes that it may have, if there is room for so many.
    Raises: InvalidKey, InvalidKeyType.
    """
    cdef const uint8_t* k
    cdef size_t n
    cdef Py_ssize_t n_prefix = PyBytes_GET_SIZE(prefix)
    named_view(name, &k, &n, min(most, MAX_KEY - n_prefix), what)
    made = PyBytes_FromStringAndSize(NULL, n_prefix + <Py_ssize_t>n)
    memcpy(PyBytes_AS_STRING(made), PyBytes_AS_STRING(prefix), n_prefix)
    memcpy(PyBytes_AS_STRING(made) + n_prefix, k, n)
    return made


def prefix_bytes(prefix):
    """What keys are to begin with; it may be empty. Raises: InvalidKey, InvalidKeyType."""
    cdef const uint8_t* k
    cdef size_t n
    if isinstance(prefix, (str, bytes)) and not prefix:
        return b""
    named_view(prefix, &k, &n, MAX_KEY, "a prefix")
    return PyBytes_FromStringAndSize(<char*>k, <Py_ssize_t>n)


def several(keys):
    """The keys of a call that takes many, as a list: one that is no key by itself. Raises: InvalidKeyType."""
    if isinstance(keys, (str, bytes)):
        raise errors.InvalidKeyType(f"several keys are passed as a list, not as {type(keys).__name__}: write [{keys[:50]!r}]")
    try:
        iter(keys)
    except TypeError as e:
        raise errors.InvalidKeyType(f"several keys are passed as a list, not as {type(keys).__name__} ({e})") from None
    return list(keys)


def pairs(mapping):
    """(key, value) of each item of a mapping, or of an iterable of such pairs. Raises: InvalidKeyType."""
    if hasattr(mapping, "items"):
        return mapping.items()
    made = several(mapping)
    for pair in made:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise errors.InvalidKeyType(f"keys and values are passed as a mapping, or as (key, value) pairs: {type(pair).__name__} is none")
    return made


def layout():
    """The structs of layout.pxd: {struct: (size, [(field, offset, numpy format, count)])}."""
    cdef header_t* h = NULL
    cdef row_t* r = NULL
    cdef stripe_t* t = NULL
    cdef databases_t* d = NULL
    cdef class_t* c = NULL
    cdef pool_t* o = NULL
    cdef page_t* p = NULL
    cdef bucket_t* b = NULL
    cdef overflow_t* v = NULL
    cdef item_t* i = NULL
    cdef lock_t* l = NULL
    cdef ring_t* g = NULL

    def pool(name, base):
        return [(name + "_word", base + <size_t>&o.lock.word, "<u8", 1),
                (name + "_stalled", base + <size_t>&o.lock.stalled, "<u8", 1),
                (name + "_list", base + <size_t>&o.list, "<u8", 1),
                (name + "_n_free", base + <size_t>&o.n_free, "<u8", 1),
                (name + "_cursor", base + <size_t>&o.cursor, "<u8", 1)]

    return {
        "header": (sizeof(header_t), [
            ("magic", <size_t>&h.magic, "<u8", 1), ("layout_version", <size_t>&h.layout_version, "<u4", 1),
            ("abi", <size_t>&h.abi, "<u4", 1), ("size_bytes", <size_t>&h.size_bytes, "<u8", 1),
            ("created_ms", <size_t>&h.created_ms, "<u8", 1), ("boot_id", <size_t>&h.boot_id, "u1", 16),
            ("hash_key", <size_t>&h.hash_key, "<u8", 2), ("n_rows", <size_t>&h.n_rows, "<u4", 1),
            ("n_stripes", <size_t>&h.n_stripes, "<u4", 1), ("n_classes", <size_t>&h.n_classes, "<u4", 1),
            ("page_shift", <size_t>&h.page_shift, "<u4", 1), ("n_pages", <size_t>&h.n_pages, "<u8", 1),
            ("n_buckets", <size_t>&h.n_buckets, "<u8", 1), ("n_overflow", <size_t>&h.n_overflow, "<u8", 1),
            ("refs_bytes", <size_t>&h.refs_bytes, "<u8", 1), ("sketch_bytes", <size_t>&h.sketch_bytes, "<u8", 1),
            ("rings_bytes", <size_t>&h.rings_bytes, "<u8", 1), ("rows_off", <size_t>&h.rows_off, "<u8", 1),
            ("stripes_off", <size_t>&h.stripes_off, "<u8", 1), ("classes_off", <size_t>&h.classes_off, "<u8", 1),
            ("pages_off", <size_t>&h.pages_off, "<u8", 1), ("refs_off", <size_t>&h.refs_off, "<u8", 1),
            ("sketch_off", <size_t>&h.sketch_off, "<u8", 1), ("buckets_off", <size_t>&h.buckets_off, "<u8", 1),
            ("overflow_off", <size_t>&h.overflow_off, "<u8", 1), ("rings_off", <size_t>&h.rings_off, "<u8", 1),
            ("slab_off", <size_t>&h.slab_off, "<u8", 1), ("max_value_bytes", <size_t>&h.max_value_bytes, "<u8", 1),
            ("default_ttl_ms", <size_t>&h.default_ttl_ms, "<u8", 1), ("lock_limit_ms", <size_t>&h.lock_limit_ms, "<u4", 1),
            ("config_bytes", <size_t>&h.config_bytes, "<u4", 1), ("policy", <size_t>&h.policy, "<u4", 1),
            ("epoch", <size_t>&h.epoch, "<u4", 1),
            ("restoring", <size_t>&h.restoring, "<u4", 1), ("restored_seq", <size_t>&h.restored_seq, "<u8", 1),
            ("restored_epoch", <size_t>&h.restored_epoch, "<u4", 1),
            ("snapshots_asked", <size_t>&h.snapshots_asked, "<u8", 1), ("snapshots_ended", <size_t>&h.snapshots_ended, "<u8", 1),
            ("snapshot_ms", <size_t>&h.snapshot_ms, "<u8", 1), ("snapshot_failed_ms", <size_t>&h.snapshot_failed_ms, "<u8", 1),
            ("clock_shift_ms", <size_t>&h.clock_shift_ms, "<i8", 1), ("tick", <size_t>&h.tick, "<u8", 1),
            ("supervisor", <size_t>&h.supervisor, "<u8", 1), ("heartbeat_ms", <size_t>&h.heartbeat_ms, "<u8", 1),
            ("asleep", <size_t>&h.asleep, "<u4", 1),
            *pool("pages", <size_t>&h.pages), *pool("overflow", <size_t>&h.overflow), *pool("big", <size_t>&h.big),
            ("config", <size_t>&h.config, "u1", CONFIG_BYTES),
            ("ring_bytes", <size_t>&h.ring_bytes, "<u8", 1), ("log_policy", <size_t>&h.log_policy, "<u8", 1),
            ("log_gaps", <size_t>&h.log_gaps, "<u8", 1), ("log_healed", <size_t>&h.log_healed, "<u8", 1),
            ("log_failed_ms", <size_t>&h.log_failed_ms, "<u8", 1), ("log_asleep", <size_t>&h.log_asleep, "<u8", 1),
            ("log_epoch", <size_t>&h.log_epoch, "<u8", 1), ("log_bell", <size_t>&h.log_bell, "<u4", 1),
            ("snapshot_begun_ms", <size_t>&h.snapshot_begun_ms, "<u8", 1), ("unnoted", <size_t>&h.unnoted, "<u8", 1), ("dirty_off", <size_t>&h.dirty_off, "<u8", 1),
            ("dirty_bytes", <size_t>&h.dirty_bytes, "<u8", 1), ("dirty_limit", <size_t>&h.dirty_limit, "<u8", 1),
            ("version_base", <size_t>&h.version_base, "<u8", 1), ("databases_off", <size_t>&h.databases_off, "<u8", 1),
            ("dirty", <size_t>&h.dirty, "<u8", 1), ("flushes_asked", <size_t>&h.flushes_asked, "<u8", 1),
            ("flushes_ended", <size_t>&h.flushes_ended, "<u8", 1), ("flushed_ms", <size_t>&h.flushed_ms, "<u8", 1),
            ("flush_failed_ms", <size_t>&h.flush_failed_ms, "<u8", 1), ("flush_refused", <size_t>&h.flush_refused, "<u8", 1),
            ("oldest_dirty_ms", <size_t>&h.oldest_dirty_ms, "<u8", 1), ("restored_from", <size_t>&h.restored_from, "<u8", 1), ("log_number", <size_t>&h.log_number, "<u8", 1),
            ("log_bytes", <size_t>&h.log_bytes, "<u8", 1), ("newest", <size_t>&h.newest, "<u4", DATABASES)]),
        "ring": (sizeof(ring_t), [
            ("head", <size_t>&g.head, "<u8", 1), ("drained", <size_t>&g.drained, "<u8", 1), ("durable", <size_t>&g.durable, "<u8", 1),
            ("bell", <size_t>&g.bell, "<u4", 1)]),
        "row": (sizeof(row_t), [
            ("gen", <size_t>&r.gen, "<u8", 1), ("pid", <size_t>&r.pid, "<u8", 1),
            ("gen_check", <size_t>&r.gen_check, "<u8", 1), ("home", <size_t>&r.home, "<u8", 1), ("home_check", <size_t>&r.home_check, "<u8", 1),
            ("started_ms", <size_t>&r.started_ms, "<u8", 1), ("hits", <size_t>&r.hits, "<u8", 1),
            ("misses", <size_t>&r.misses, "<u8", 1), ("sets", <size_t>&r.sets, "<u8", 1),
            ("deletes", <size_t>&r.deletes, "<u8", 1), ("expired", <size_t>&r.expired, "<u8", 1),
            ("evictions", <size_t>&r.evictions, "<u8", 1), ("inline_evictions", <size_t>&r.inline_evictions, "<u8", 1),
            ("chain_evictions", <size_t>&r.chain_evictions, "<u8", 1), ("retries", <size_t>&r.retries, "<u8", 1),
            ("lock_waits", <size_t>&r.lock_waits, "<u8", 1), ("takeovers", <size_t>&r.takeovers, "<u8", 1),
            ("settled", <size_t>&r.settled, "<u8", 1), ("pages_moved", <size_t>&r.pages_moved, "<u8", 1),
            ("stalls", <size_t>&r.stalls, "<u8", 1), ("max_wait_ns", <size_t>&r.max_wait_ns, "<u8", 1),
            ("unlisted", <size_t>&r.unlisted, "<u8", 1), ("repairs", <size_t>&r.repairs, "<u8", 8), ("hazard", <size_t>&r.hazard, "<u8", 8),
            ("parked", <size_t>&r.parked, "<u8", PARKED_SLOTS),
            ("batch", <size_t>&r.batch, "<u8", (BATCH_CLASSES, BATCH_SLOTS)), ("store_loads", <size_t>&r.store_loads, "<u8", 1),
            ("store_found", <size_t>&r.store_found, "<u8", 1), ("store_writes", <size_t>&r.store_writes, "<u8", 1),
            ("store_errors", <size_t>&r.store_errors, "<u8", 1),
            ("locks_lost", <size_t>&r.locks_lost, "<u8", 1)]),
        "stripe": (sizeof(stripe_t), [
            ("word", <size_t>&t.lock.word, "<u8", 1), ("stalled", <size_t>&t.lock.stalled, "<u8", 1), ("bell", <size_t>&t.lock.bell, "<u4", 1),
            ("seq", <size_t>&t.seq, "<u8", 1), ("old", <size_t>&t.old, "<u8", 1), ("new", <size_t>&t.new, "<u8", 1),
            ("count", <size_t>&t.count, "<u8", 1), ("count_next", <size_t>&t.count_next, "<u8", 1),
            ("turn", <size_t>&t.turn, "<u8", 1), ("others", <size_t>&t.others, "<u8", 1), ("expiring", <size_t>&t.expiring, "<u8", 1)]),
        "databases": (sizeof(databases_t), [("tag", <size_t>&d.tag, "<u4", DATABASES), ("n", <size_t>&d.n, "<u4", DATABASES), ("expiring", <size_t>&d.expiring, "<u4", DATABASES)]),
        "class": (sizeof(class_t), [
            ("word", <size_t>&c.lock.word, "<u8", 1), ("stalled", <size_t>&c.lock.stalled, "<u8", 1), ("bell", <size_t>&c.lock.bell, "<u4", 1),
            ("chunk_bytes", <size_t>&c.chunk_bytes, "<u4", 1), ("page_in_hand", <size_t>&c.page_in_hand, "<u4", 1),
            ("ring", <size_t>&c.ring, "<u4", 1), ("avail", <size_t>&c.avail, "<u4", 1),
            ("hand", <size_t>&c.hand, "<u8", 1), ("n_pages", <size_t>&c.n_pages, "<u4", 1), ("n_free", <size_t>&c.n_free, "<u4", 1)]),
        "page": (sizeof(page_t), [
            ("word", <size_t>&p.word, "<u8", 1), ("head", <size_t>&p.head, "<u8", 1), ("stamp", <size_t>&p.stamp, "<u8", 1),
            ("next", <size_t>&p.next, "<u4", 1), ("prev", <size_t>&p.prev, "<u4", 1),
            ("next_avail", <size_t>&p.next_avail, "<u4", 1), ("prev_avail", <size_t>&p.prev_avail, "<u4", 1),
            ("free", <size_t>&p.free, "<u4", 1), ("n_free", <size_t>&p.n_free, "<u4", 1), ("cls", <size_t>&p.cls, "<u2", 1),
            ("cls_check", <size_t>&p.cls + 2, "<u2", 1),
            ("listed", <size_t>&p.listed, "u1", 1)]),
        "bucket": (sizeof(bucket_t), [
            ("version", <size_t>&b.version, "<u4", 1), ("overflow", <size_t>&b.overflow, "<u4", 1),
            ("slot", <size_t>&b.slot, "<u8", 7)]),
        "overflow": (sizeof(overflow_t), [
            ("head", <size_t>&v.head, "<u4", 1), ("next", <size_t>&v.next, "<u4", 1), ("slot", <size_t>&v.slot, "<u8", 6),
            ("word", <size_t>&v.word, "<u8", 1)]),
        "item": (sizeof(item_t), [
            ("hash", <size_t>&i.hash, "<u8", 1), ("word", <size_t>&i.word, "<u8", 1), ("cas", <size_t>&i.cas, "<u8", 1),
            ("expiry_ms", <size_t>&i.expiry_ms, "<u8", 1), ("value_bytes", <size_t>&i.value_bytes, "<u4", 1),
            ("epoch", <size_t>&i.epoch, "<u4", 1), ("key_bytes", <size_t>&i.key_bytes, "<u2", 1),
            ("codec", <size_t>&i.codec, "u1", 1), ("flags", <size_t>&i.flags, "u1", 1), ("link", <size_t>&i.link, "<u4", 1)]),
    }


cdef bint says_unsettled(int fd):
    cdef header_t h
    if pread(fd, &h, sizeof(header_t), 0) != <ssize_t>sizeof(header_t):
        return False
    return h.magic == MAGIC and h.layout_version == LAYOUT_VERSION and h.abi == ABI and h.restoring == NAMESPACES_FIRST


def unsettled(int fd):
    """Of a segment of this layout whose restore may still be refused: 1 a process is at it, 2 its restorer has ended; else 0. Cheaper than to
    map it.

    A restorer lets go of its byte when the segment is settled, or has lost its name: who finds the byte free looks at both once more.
    """
    if not says_unsettled(fd):
        return 0
    if shm_ofd_lock(fd, True, RESTORER_BYTE):       # in doubt, it lives
        return 1
    return 1 if shm_unlinked(fd) else 2 if says_unsettled(fd) else 0


def format_segment(int fd, dict g, list chunk_bytes, bytes boot_id, bytes hash_key, bytes config, bint huge_pages):
    """Write a new segment's header and empty sections into fd, whose memory is all zero. The magic is stored last.

    g: the geometry by field name (segment.geometry); if it is to be restored, restored_seq. chunk_bytes: of each slab class, ascending. Returns: 0, or the errno for which
    (a part of) its memory was not put into huge pages.
    """
    cdef int refused = 0
    cdef uint64_t size = g["size_bytes"], i
    cdef uint8_t* base = <uint8_t*>shm_map(fd, size)
    cdef header_t* h = <header_t*>base
    cdef class_t* classes
    cdef page_t* pages
    cdef overflow_t* ov
    if base == NULL:
        raise OSError(errno, "mmap of the new segment")
    try:
        if huge_pages:
            with nogil:
                refused = shm_collapse(base, size)
        h.layout_version = LAYOUT_VERSION
        h.abi = ABI
        h.size_bytes = size
        h.created_ms = wall_ms()
        memcpy(h.boot_id, PyBytes_AS_STRING(boot_id), min(16, len(boot_id)))
        memcpy(h.hash_key, PyBytes_AS_STRING(hash_key), min(16, len(hash_key)))
        memcpy(h.config, PyBytes_AS_STRING(config), min(CONFIG_BYTES, len(config)))
        h.config_bytes = <uint32_t>len(config)
        h.n_rows = g["n_rows"]; h.n_stripes = g["n_stripes"]; h.n_classes = g["n_classes"]; h.page_shift = g["page_shift"]
        h.n_pages = g["n_pages"]; h.n_buckets = g["n_buckets"]; h.n_overflow = g["n_overflow"]
        h.refs_bytes = g["refs_bytes"]; h.sketch_bytes = g["sketch_bytes"]; h.rings_bytes = g["rings_bytes"]
        h.rows_off = g["rows_off"]; h.stripes_off = g["stripes_off"]; h.databases_off = g["databases_off"]; h.classes_off = g["classes_off"]
        h.pages_off = g["pages_off"]; h.refs_off = g["refs_off"]; h.sketch_off = g["sketch_off"]
        h.buckets_off = g["buckets_off"]; h.overflow_off = g["overflow_off"]; h.rings_off = g["rings_off"]
        h.slab_off = g["slab_off"]
        h.max_value_bytes = g["max_value_bytes"]; h.default_ttl_ms = g["default_ttl_ms"]; h.lock_limit_ms = g["lock_limit_ms"]
        h.policy = g["policy"]
        h.dirty_off = g["dirty_off"]; h.dirty_bytes = g["dirty_bytes"]; h.dirty_limit = g["dirty_limit"]
        h.version_base = g.get("version_base", h.created_ms << VERSIONS_SHIFT)
        #! create: header
        h.ring_bytes = g["ring_bytes"]
        h.log_policy = g.get("log_policy", 0)
        h.epoch = 1
        h.tick = 1
        if "restored_seq" in g:
            h.epoch = h.restored_epoch = g["epoch"]
            h.restoring = NAMESPACES_FIRST
            h.restored_seq = g["restored_seq"]
            for i in range(h.n_stripes):
                (<stripe_t*>(base + h.stripes_off))[i].seq = h.restored_seq
        classes = <class_t*>(base + h.classes_off)
        for i in range(h.n_classes):
            classes[i].chunk_bytes = chunk_bytes[i]
            classes[i].hand = <uint64_t>0xffffffff << 32         # on no page
        pages = <page_t*>(base + h.pages_off)
        for i in range(h.n_pages):
            pages[i].next = <uint32_t>(i + 2 if i + 1 < h.n_pages else 0)
            pages[i].cls = cls_mark(CLS_POOL)
        h.pages.list = 1
        h.pages.n_free = h.n_pages
        ov = <overflow_t*>(base + h.overflow_off)
        for i in range(h.n_overflow):
            ov[i].next = <uint32_t>(i + 2 if i + 1 < h.n_overflow else 0)
        h.overflow.list = 1
        h.overflow.n_free = h.n_overflow
        #! create: lists
        st64(&h.magic, MAGIC)
        #! create: magic
    finally:
        munmap(base, size)
    return refused


# ---- errors ---------------------------------------------------------------------------------------------------------------

cdef object damaged_pages():
    return errors.DamageError("a page of this value belongs to somebody else: delete the key, or run shmcache-admin verify --repair")


cdef object too_large(uint64_t n, uint64_t most):
    return errors.ValueTooLarge(f"the encoded value has {n:,} bytes, this segment takes {most:,}: split it, or create the segment larger or "
                                "with a larger max_value; nothing was stored")


cdef object damaged_envelope():
    return errors.DamageError("the head of a value with tags, stale or negative time is damaged, or of a newer version: delete the key")


cdef object untagged():
    return errors.UsageError("what is written back has no tags: a value that an invalidated tag hides would be stored all the same")


cdef int refuse_if_failed(seg_t* s) except -1:
    """With the policy always, before anything is changed. The drainer says so, from the first write or sync that fails until the next file is
    written and synced, and keeps trying."""
    if ld64(&s.header.log_failed_ms):
        raise errors.LogFull("the log cannot be written (is its disk full?): nothing was changed. It goes on by itself when there is room")
    return 0


cdef object not_durable():
    return errors.NotDurable("the write was done and everybody sees it, but it is not known to be on the disk: is the supervisor running, is "
                             "its disk full?")


cdef int fail(int rc) except -100:
    """The one place where a status becomes an exception."""
    if rc == NO_ROOM:
        raise errors.NoRoom("nothing can be evicted for this value just now: try again, or create a larger segment")
    if rc == BUSY:
        raise errors.StripeBusy(
            "a living process holds a lock that this call needs and does not run (stopped, or out of its CPU quota); nothing "
            "was changed: try again, or continue or kill that process")
    if rc == NO_STORE:
        raise errors.StoreNeeded("this segment stands before a store, and this handle has none: open it with store=, so that writes get there "
                                 "(invalidate() drops a cached copy)")
    if rc == NO_ROW:
        raise errors.TooManyProcesses(
            "every process row is taken by a living process: create the segment with a larger max_processes")
    if rc == NO_OFD:
        raise errors.LivenessUnknown("the file system of /dev/shm does not keep open-file-description locks; it must be a tmpfs")
    if rc == OS_ERROR:
        raise OSError(errno, "cannot open the segment again to take a process row")
    raise errors.DamageError(f"unexpected status {rc}")


cdef inline int key_view(object key, const uint8_t** p, size_t* n) except -1:
    return named_view(key, p, n, MAX_KEY, "a key")


cdef inline int named_view(object key, const uint8_t** p, size_t* n, Py_ssize_t most, str what) except -1:
    """The bytes of a key, or of what else a user names: here it is decided what can be one. what: it is, for errors."""
    cdef Py_ssize_t size
    if PyBytes_Check(key):
        p[0] = <const uint8_t*>PyBytes_AS_STRING(key)
        size = PyBytes_GET_SIZE(key)
    elif PyUnicode_Check(key):
        try:
            p[0] = <const uint8_t*>PyUnicode_AsUTF8AndSize(key, &size)
        except UnicodeEncodeError as e:
            raise errors.InvalidKey(f"{what} has a UTF-8 form, this str has none ({e.reason}): use bytes, or another") from None
    else:
        raise errors.InvalidKeyType(f"{what} is bytes or str, not {type(key).__name__}: convert it, for example with str()")
    if unlikely(size == 0 or size > most):
        raise errors.InvalidKey(f"{what} has 1 to {most:,} bytes, this one {size:,}: " +
                                ("use a longer one" if size == 0 else "shorten it, or use a digest of it"))
    n[0] = <size_t>size
    return 0


def several_tags(tags):
    """What is passed as tags=, as a tuple. Raises: InvalidTag."""
    if isinstance(tags, (str, bytes)):
        raise errors.InvalidTag(f"tags is a tuple of str, not {type(tags).__name__}: write tags=({tags[:50]!r},)")
    try:
        iter(tags)
    except TypeError as e:
        raise errors.InvalidTagType(f"tags is a tuple of str, not {type(tags).__name__} ({e})") from None
    return tuple(tags)


cdef const char* tag_view(object tag, Py_ssize_t* n) except NULL:
    """A tag's UTF-8, which lives as long as it. Raises: InvalidTag."""
    cdef const char* name
    if not PyUnicode_Check(tag):
        raise errors.InvalidTagType(f"a tag is a str, not {type(tag).__name__}: convert it, for example with str(tag)")
    try:
        name = PyUnicode_AsUTF8AndSize(tag, n)
    except UnicodeEncodeError as e:
        raise errors.InvalidTag(f"this str has no UTF-8 form ({e.reason}): use another as the tag") from None
    if not 0 < n[0] <= TAG_BYTES:
        raise errors.InvalidTag(f"a tag has 1 to {TAG_BYTES} bytes, this one {n[0]:,}: " +
                                ("use a longer one" if n[0] == 0 else "shorten it, or use a digest of it"))
    return name


cdef uint64_t ttl_to_ms(object ttl) except? 0xffffffffffffffff:
    """Milliseconds, rounded up; 0 stays 0: already expired."""
    cdef double seconds
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)):
        total_seconds = getattr(ttl, "total_seconds", None)
        if total_seconds is None:
            raise errors.InvalidTTL(f"a ttl is a number of seconds, a timedelta or None, not {type(ttl).__name__}")
        ttl = total_seconds()
    try:
        seconds = ttl
    except OverflowError:
        seconds = float("inf")
    if not 0 <= seconds < 1e12:
        raise errors.InvalidTTL(f"a ttl is a finite number of seconds, zero or more and below 1e12, not {ttl}; "
                                "None means the segment's default")
    return <uint64_t>(seconds * 1000 + 0.999999)


cdef void buried(put_t* op) noexcept:
    """Write-back: what is put is a tombstone: one step, so that nobody sees, and no store gets, what is over already."""
    op.flags = 0
    op.expiry_ms = 0
    op.codec = CODEC_ENVELOPE
    op.value = <const uint8_t*>TOMBSTONE
    op.value_bytes = ENVELOPE_FIXED


class WouldWait(Exception):
    """A call of an impatient table, or by _at_once(), would have had to wait: nothing was changed."""


cdef str NOT_STORED = ("as much as may be is waiting to be stored, and it does not become less: is the supervisor running with --store, "
                       "is its store up? Nothing was changed: try again")


# ---- mapping ----------------------------------------------------------------------------------------------------------------

cdef class WritableView:
    """Hands out the segment's bytes writable, for tests and repair tools."""
    def __init__(self, Mapping mapping not None):
        self.mapping = mapping

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.mapping.s.base, <Py_ssize_t>self.mapping.s.size_bytes, False, flags)
        self.mapping.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.mapping.exports -= 1


cdef class Mapping:
    """A process's one mapping of one segment, and its row in it. Every handle of the process shares it.

    Args: fd: a descriptor of the segment, opened for reading and writing; may be closed afterwards. path: by which it can be
    opened again. name: for messages.
    Raises: NotASegment, LayoutMismatch, SegmentTruncated, TooManyProcesses, LivenessUnknown, OSError.
    """
    def __cinit__(self, int fd, str path, str name):
        cdef uint64_t size = 0
        cdef bytes path_b = path.encode()
        cdef int rc
        memset(&self.s, 0, sizeof(seg_t))
        self.s.prober = -1
        self.name = name
        self.locks = {}
        self.most_locks = MOST_LOCKS
        if shm_stat(fd, &self.s.dev, &self.s.ino, &size):
            raise OSError(errno, "fstat of the segment")
        if size < sizeof(header_t):
            raise errors.NotASegment(f"{name!r} has only {size} bytes: it is not a shmcache segment; unlink it or choose another name")
        if len(path_b) >= sizeof(self.s.path):
            raise errors.InvalidName("the segment's name is too long")
        strncpy(self.s.path, path_b, sizeof(self.s.path) - 1)
        self.s.size_bytes = size
        self.s.base = <uint8_t*>shm_map(fd, size)
        if self.s.base == NULL:
            raise OSError(errno, "mmap of the segment")
        self.load_geometry(size)
        self.s.me = shm_wiped_page()
        if self.s.me == NULL:
            raise OSError(errno, "no page for the token (MADV_WIPEONFORK needs Linux 4.14)")
        self.s.prober = shm_reopen(fd, self.s.path, self.s.dev, self.s.ino)
        if self.s.prober < 0:
            raise OSError(errno, f"cannot open {path} again")
        rc = take_row(&self.s)
        if rc != OK:
            fail(rc)

    def load_geometry(self, uint64_t size):
        """Check the header and copy the geometry: it is never read from the segment again."""
        cdef seg_t* s = &self.s
        cdef header_t* h = <header_t*>s.base
        cdef uint32_t i
        cdef class_t* classes
        if ld64(&h.magic) != MAGIC:
            raise errors.NotASegment(f"{self.name!r} is not a shmcache segment (wrong magic); unlink it or choose another name")
        if h.layout_version != LAYOUT_VERSION or h.abi != ABI:
            raise errors.LayoutMismatch(
                f"{self.name!r} was made by layout {h.layout_version}, ABI {h.abi:#x}; this is layout {LAYOUT_VERSION}, ABI "
                f"{ABI:#x}: use the version that made it, or unlink it and start cold")
        if h.size_bytes > size:
            raise errors.SegmentTruncated(
                f"{self.name!r} has {size:,} bytes, its header says {h.size_bytes:,}: unlink it and create it again")
        if not self.geometry_sound(h, size):
            raise errors.NotASegment(f"the header of {self.name!r} is damaged; unlink it and create it again")
        s.header = h
        s.rows = <row_t*>(s.base + h.rows_off)
        s.stripes = <stripe_t*>(s.base + h.stripes_off)
        s.databases = <databases_t*>(s.base + h.databases_off)
        s.classes = <class_t*>(s.base + h.classes_off)
        s.pages = <page_t*>(s.base + h.pages_off)
        s.refs = s.base + h.refs_off
        s.rings = s.base + h.rings_off
        s.ring_bytes = h.ring_bytes
        s.departed = <uint64_t*>(s.base + h.sketch_off)
        s.departed_mask = 8 * h.sketch_bytes - 1
        s.buckets = <bucket_t*>(s.base + h.buckets_off)
        s.overflow = <overflow_t*>(s.base + h.overflow_off)
        s.n_rows = h.n_rows
        s.n_stripes = h.n_stripes
        s.n_classes = h.n_classes
        s.n_pages = h.n_pages
        s.n_buckets = h.n_buckets
        s.n_overflow = h.n_overflow
        s.page_shift = h.page_shift
        s.page_bytes = <uint64_t>1 << h.page_shift
        s.slab_off = h.slab_off
        s.slab_lo = h.slab_off >> 4
        s.slab_hi = (h.slab_off + (h.n_pages << h.page_shift)) >> 4
        s.k0 = h.hash_key[0]
        s.k1 = h.hash_key[1]
        s.max_value_bytes = h.max_value_bytes
        s.default_ttl_ms = h.default_ttl_ms
        s.policy = h.policy
        s.dirty = <uint64_t*>(s.base + h.dirty_off)
        s.limit_ns = s.patience_ns = <uint64_t>h.lock_limit_ms * 1000000
        classes = s.classes
        for i in range(s.n_classes):
            s.chunk_bytes[i] = classes[i].chunk_bytes
            s.page_chunks[i] = <uint32_t>(s.page_bytes // classes[i].chunk_bytes)

    cdef bint geometry_sound(self, header_t* h, uint64_t size):
        cdef uint64_t off[12]
        cdef uint64_t need[12]
        cdef class_t* classes
        cdef uint32_t i, last = 0
        if not (0 < h.n_rows <= MAX_ROWS and 0 < h.n_classes <= MAX_CLASSES and 0 < h.n_stripes <= 65536):
            return False
        if h.n_stripes & (h.n_stripes - 1) or h.page_shift < 12 or h.page_shift > 20 or h.n_pages == 0:
            return False
        if h.ring_bytes and (h.ring_bytes & (h.ring_bytes - 1) or not 65536 <= h.ring_bytes <= <uint64_t>1 << 30 or
                             h.rings_bytes < h.n_rows * (sizeof(ring_t) + h.ring_bytes)):
            return False
        if h.policy == POLICY_BACK and h.dirty_bytes < ((h.n_pages << h.page_shift) >> 10) + 8:
            return False
        if h.sketch_bytes < 64 or h.sketch_bytes & (h.sketch_bytes - 1):
            return False
        if h.n_pages >> 32 or h.n_buckets == 0 or h.n_buckets >> 32 or h.n_overflow == 0 or h.n_overflow >> 31:
            return False
        off = [h.rows_off, h.stripes_off, h.databases_off, h.classes_off, h.pages_off, h.refs_off, h.sketch_off, h.buckets_off, h.overflow_off,
               h.dirty_off, h.rings_off, h.slab_off]
        need = [h.n_rows * sizeof(row_t), h.n_stripes * sizeof(stripe_t), h.n_stripes * sizeof(databases_t), h.n_classes * sizeof(class_t),
                h.n_pages * sizeof(page_t), (h.n_pages << h.page_shift) >> 7, h.sketch_bytes, h.n_buckets * sizeof(bucket_t),
                h.n_overflow * sizeof(overflow_t), h.dirty_bytes, h.rings_bytes, h.n_pages << h.page_shift]
        for i in range(12):
            if off[i] & 63 or off[i] < sizeof(header_t) or off[i] > size or need[i] > size - off[i]:
                return False
            if i and off[i] < off[i - 1] + need[i - 1]:
                return False
        if h.slab_off & ((<uint64_t>1 << h.page_shift) - 1) or h.config_bytes > CONFIG_BYTES or h.policy > POLICY_BACK:
            return False
        classes = <class_t*>(<uint8_t*>h + h.classes_off)
        for i in range(h.n_classes):
            if classes[i].chunk_bytes < MIN_CHUNK or classes[i].chunk_bytes & 15 or classes[i].chunk_bytes <= last or \
                    classes[i].chunk_bytes > <uint64_t>1 << h.page_shift:
                return False
            last = classes[i].chunk_bytes
        return True

    def begin_restore(self):
        """Become the one process that restores it: False: another is. Until end_restore(), or its death."""
        cdef void* page = NULL
        cdef int rc = hold_byte(&self.s, RESTORER_BYTE, &page)
        if rc < 0:
            raise OSError(errno, "cannot lock the restorer's byte")
        if rc == 0:
            self.restore_page = page
            self.restorer = self.s.me[0]
        return rc == 0

    cpdef end_restore(self):
        """Behind this it is settled, or has no name, or is for the next restorer to begin again."""
        if self.restore_page != NULL and self.s.me[0] == self.restorer:     # in a fork child there is no such page
            munmap(self.restore_page, 4096)
        self.restore_page = NULL

    def give_back(self):
        """The memory of all that is in it: for who takes its name. Who has it mapped finds zeros there; the header, rows, stripes and classes
        stay, so that it can be attached to and looked at."""
        cdef uint64_t start = (self.s.header.pages_off + 4095) & ~<uint64_t>4095
        if shm_give_back(self.s.base + start, self.s.size_bytes - start):
            raise OSError(errno, "cannot give back the memory of the segment")

    cdef int note_lock(self, bytes key, uint64_t version, double seconds) except -1:
        """It was taken just now, for so long; 0: until it is given back. A ttl may end it, so those that are over go when there are as many
        again as had been left."""
        cdef uint64_t now = mono_ns()
        if len(self.locks) >= self.most_locks:
            self.locks = {k: v for k, v in self.locks.items() if <double>v[1] > now}
            self.most_locks = max(MOST_LOCKS, 2 * len(self.locks))
        self.locks[key] = (version, now + seconds * 1e9 if seconds else INFINITY)
        return 0

    cdef int forget_lock(self, bytes key, uint64_t version) except -1:
        """It was given back, or had not stood any more. Another lock of this name may."""
        cdef tuple noted = self.locks.get(key)
        if noted is not None and noted[0] == version:
            del self.locks[key]
        return 0

    cdef list locks_held(self):
        """The names of the locks that this process holds. Takes no lock."""
        cdef list names = []
        cdef bytes key
        cdef tuple noted
        cdef uint64_t version
        cdef claim_t whose
        cdef uint8_t flags
        cdef int rc
        if self.s.me[0] == 0:
            return names
        for key, noted in sorted(self.locks.items()):
            version = whose.token = 0
            rc = AGAIN
            while rc == AGAIN:
                rc = read_claim(&self.s, key, len(key), siphash13(key, len(key), self.s.k0, self.s.k1), &version, &whose, &flags)
            if rc == EXISTS and whose.token == self.s.me[0] and version == noted[0]:
                names.append(repr(key.split(b"\0", 2)[2].decode(errors="replace")))
        return names

    cdef int revive(self) except -1:
        """This process is a fork child of the one that took the row: take one of its own."""
        cdef int rc
        self.s.lock_page = NULL         # MADV_DONTFORK: it is not mapped here
        self.s.holder = 0
        self.locks.clear()              # they are the parent's
        rc = take_row(&self.s)
        if rc != OK:
            fail(rc)
        return 0

    cdef int stand_by(self) except -1:
        """revive(), of who wants to read: if every row is taken it goes on without one, looks for one again after a second, and is told at its first
        write. A token of 0 takes no lock: what a read does under one it leaves, or raises."""
        cdef uint64_t now = mono_ns()
        if self.s.row == &self.no_row and now - self.row_wanted_ns < 1000000000:
            return 0
        self.row_wanted_ns = now
        try:
            return self.revive()
        except errors.TooManyProcesses:
            self.s.row = &self.no_row
        return 0

    def __dealloc__(self):
        if self.s.me != NULL:
            self.end_restore()
            if self.s.me[0]:
                with nogil:             # the lock of a class may have to be waited for
                    give_back_all(&self.s)
                #! leave: given back
                st64(&self.s.row.pid, 0)
                #! leave: pid cleared
                munmap(self.s.lock_page, 4096)
                #! leave: row free
            munmap(self.s.me, 4096)
        if self.s.prober >= 0 and prober_ready(&self.s):
            close(self.s.prober)
        if self.s.base != NULL:
            munmap(self.s.base, self.s.size_bytes)

    @property
    def identity(self):
        """(device, inode) of the segment: two mappings of one process are of one segment if these are equal."""
        return self.s.dev, self.s.ino

    def settings(self):
        """What create() was given, as it is in force; max_value_most: the largest that this size allows."""
        cdef seg_t* s = &self.s
        cdef uint64_t list_room = (s.chunk_bytes[s.n_classes - 1] - sizeof(item_t) - MAX_KEY) // 4 * s.page_bytes
        return {"size_bytes": s.size_bytes, "default_ttl_ms": s.default_ttl_ms, "max_value_bytes": s.max_value_bytes,
                "max_value_most": min((s.n_pages << s.page_shift) // 4, list_room, <uint64_t>0xffffffff),
                "stripes": s.n_stripes, "max_processes": s.n_rows, "lock_limit_ms": s.header.lock_limit_ms,
                "ring_bytes": s.ring_bytes, "policy": s.policy, "config": self.config,
                "version_base": s.header.version_base, "dirty_limit": s.header.dirty_limit}

    @property
    def config(self):
        """The msgpack map of the configuration."""
        return PyBytes_FromStringAndSize(<char*>self.s.header.config, min(<uint32_t>CONFIG_BYTES, ld32(&self.s.header.config_bytes)))

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.s.base, <Py_ssize_t>self.s.size_bytes, True, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.exports -= 1


# ---- table --------------------------------------------------------------------------------------------------------------------

cdef class Bound:
    """f with keyword arguments: Bound(f, a=1)(x) is f(x, a=1). As functools.partial, which makes a dict of them at each call (0.2 us)."""

    def __init__(self, f, **keywords):
        if len(keywords) > MOST_BOUND:
            raise TypeError(f"at most {MOST_BOUND} keyword arguments")
        self.f = f
        self.names = tuple(keywords)
        self.values = tuple(keywords.values())

    def __call__(self, x):
        return self.call(x)

    cdef object call(self, object x):
        cdef PyObject* arguments[MOST_BOUND + 1]
        cdef Py_ssize_t i
        arguments[0] = <PyObject*>x
        for i in range(len(self.values)):
            arguments[i + 1] = <PyObject*>self.values[i]
        return PyObject_Vectorcall(self.f, arguments, 1, self.names)


@cython.no_gc_clear             # the collector must not take the mapping from a table that is still to be deallocated
cdef class Table:
    """Operations on one segment's table, by one handle. `shmcache.Cache` is this with codecs."""

    def __cinit__(self, Mapping mapping not None, *args, **kwargs):
        self.mapping = mapping
        self.name = mapping.name
        self.s = &mapping.s
        mapping.handles += 1

    def __dealloc__(self):
        if self.s != NULL:
            self.s = NULL
            self.mapping.handles -= 1

    cdef seg_t* ready(self) except NULL:
        if self.s == NULL:
            raise errors.CacheClosed("this handle was closed: attach or open the cache again")
        if self.s.me[0] == 0:
            self.mapping.revive()
        return self.s

    cdef seg_t* ready_to_read(self) except NULL:
        """ready(), of what takes no lock: a fork child needs no row for it."""
        if self.s == NULL:
            raise errors.CacheClosed("this handle was closed: attach or open the cache again")
        if self.s.me[0] == 0:
            self.mapping.stand_by()
        return self.s

    cdef void enter(self, seg_t* s):
        if self.life != s.me[0]:            # a fork child: the calls counted so far are threads of the parent
            self.life = s.me[0]
            self.in_flight = 0
        self.in_flight += 1

    cdef int leave(self) except -1:
        self.in_flight -= 1
        if self.in_flight == 0 and self.idle is not None:
            self.idle.set()
        return 0

    cdef bint interrupted(self, seg_t* s, Mapping held) except -1:
        """A signal came in the middle of a call: run its handlers. They may close this handle (so the call is not counted
        meanwhile, or close() would wait for itself) or fork: True in the child, which has a row of its own then and must
        forget what the call had in hand, for it is the parent's. An exception in the child leaves it without a row.
        """
        cdef uint64_t me = s.me[0]
        self.leave()
        try:
            PyErr_CheckSignals()
        finally:
            self.enter(s)
        if s.me[0] == 0:
            held.revive()
        return s.me[0] != me

    cdef int note_log(self, log_t* log) except -1:
        """An impatient table's durable(): its user waits, later, for what take_log() gives."""
        if log.token == self.s.me[0] and ld64(&self.s.header.log_policy) == LOG_ALWAYS:
            if log.end == NEVER:
                raise not_durable()
            self.noted = log.end
        return 0

    cdef uint64_t take_log(self):
        cdef uint64_t end = self.noted
        self.noted = 0
        return end

    def _encode(self, value):
        raise errors.UnsupportedValue(f"this table stores bytes, str and int, not {type(value).__name__}")

    def _decode(self, int codec, bytes payload):
        raise errors.CodecMismatch(f"this table does not read values of codec {codec}")

    # -- get

    @cython.final
    cdef inline int copy_out(self, seg_t* s, read_t* r, uint8_t* to) except -1:
        if likely(r.value_bytes < LONG_COPY):
            read_copy(s, r, to)
            return 0
        return self.copy_long(s, r, to)

    cdef int copy_long(self, seg_t* s, read_t* r, uint8_t* to) except -1:
        """Without the GIL. If another thread closes this handle meanwhile: CacheClosed, and s is gone."""
        cdef Mapping held = self.mapping
        self.enter(s)
        with nogil:
            read_copy(s, r, to)
        self.leave()
        self.ready_to_read()
        return 0

    cdef object take_value(self, seg_t* s, read_t* r, int take, uint64_t* version, int* rc):
        """Copy the value out and check that it was whole: rc OK and the object, or AGAIN and None. Of an envelope what is inside; rc ABSENT,
        None and r.state if it is hidden from who takes (TAKE_*)."""
        cdef uint8_t stack[STACK_BYTES]
        cdef uint8_t* to = stack
        cdef bytes data
        cdef envelope_t e
        if r.codec == CODEC_BYTES:
            data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>r.value_bytes)
            self.copy_out(s, r, <uint8_t*>PyBytes_AS_STRING(data))
            rc[0] = read_end(s, r)
            version[0] = r.cas
            if rc[0] != OK:
                return None
            if unlikely(r.damaged):
                raise damaged_pages()
            s.row.hits += 1
            return data
        if r.value_bytes > STACK_BYTES:
            to = <uint8_t*>malloc(r.value_bytes)
            if to == NULL:
                raise MemoryError
        try:
            self.copy_out(s, r, to)
            rc[0] = read_end(s, r)
            version[0] = r.cas
            if rc[0] != OK:
                return None
            if unlikely(r.damaged):
                raise damaged_pages()
            if unlikely(r.codec == CODEC_ENVELOPE):
                if not self.given(s, r, to, take, &e):
                    rc[0] = ABSENT
                    return None
                s.row.hits += 1
                return self.decoded(e.codec, to + e.head_bytes, r.value_bytes - e.head_bytes)
            s.row.hits += 1                 # here, for a codec may close the handle
            return self.decoded(r.codec, to, r.value_bytes)
        finally:
            if to != stack:
                free(to)

    @cython.final
    cdef inline object decoded(self, int codec, const uint8_t* p, uint64_t n):
        """The object of a copied value. May run a codec, which may close this handle."""
        cdef int64_t number
        cdef bytes data
        if codec == CODEC_STR:
            try:
                return PyUnicode_DecodeUTF8(<char*>p, <Py_ssize_t>n, "surrogatepass")
            except UnicodeDecodeError:
                raise errors.DamageError("a str value is not UTF-8: run verify()") from None
        if codec == CODEC_INT and n == 8:
            memcpy(&number, p, 8)
            return PyLong_FromLongLong(number)
        data = PyBytes_FromStringAndSize(<char*>p, <Py_ssize_t>n)
        if codec == CODEC_BYTES:
            return data
        if codec == CODEC_MSGPACK and self._unpack is not None:
            try:
                return self._unpack.call(data)
            except Exception as e:
                raise self._undecoded(e) from None
        return self._decode(codec, data)

    cdef bint given(self, seg_t* s, read_t* r, const uint8_t* p, int take, envelope_t* e) except -1:
        """Is what is in this envelope, copied to p, given to who takes (TAKE_*)? Its state is then in r."""
        if not envelope_open(p, r.value_bytes, e):
            raise damaged_envelope()
        r.state = envelope_state(s, p, e, r.expiry_ms, r.now_ms)
        if r.state == STATE_FRESH and e.early_ms and take & TAKE_EARLY and r.expiry_ms and self.rolled_early(s, r, e, take):
            r.state = STATE_STALE
        return r.state == STATE_FRESH or (r.state == STATE_STALE and take & TAKE_STALE)

    cdef bint rolled_early(self, seg_t* s, read_t* r, envelope_t* e, int take):
        """Is this the read that misses early? now - early_ms * ln(random) >= the fresh end (XFetch: Vattani, Chierichetti and Lowenstein, VLDB
        2015). The miss that get has just had is not rolled for again by the _look that follows."""
        cdef uint64_t now = r.now_ms, end = r.expiry_ms - e.stale_ms, x
        if take & TAKE_STALE and self.rolled == (r.hash ^ r.cas):
            self.rolled = 0
            return True
        if end <= now or end - now > 45 * <uint64_t>e.early_ms:     # -ln(2 ** -64) = 44.4
            return False
        self.rolls += 1                                             # splitmix64 of what is another number in each thread, process and call
        x = (mono_ns() ^ s.me[0] << 32) + self.rolls * <uint64_t>0x9e3779b97f4a7c15
        x = (x ^ x >> 30) * <uint64_t>0xbf58476d1ce4e5b9
        x = (x ^ x >> 27) * <uint64_t>0x94d049bb133111eb
        x ^= x >> 31
        if -ln((<double>(x >> 11) + 0.5) / <double>(<uint64_t>1 << 53)) * e.early_ms < end - now:
            return False
        self.rolled = r.hash ^ r.cas
        return True

    cdef object read(self, object key, object default, uint64_t* version):
        cdef const uint8_t* k
        cdef size_t n
        cdef int state
        cdef seg_t* s
        key_view(key, &k, &n)
        s = self.s
        if unlikely(s == NULL or s.me[0] == 0):
            s = self.ready_to_read()
        return self.read_hashed(s, k, n, siphash13(k, n, s.k0, s.k1), default, version, TAKE_EARLY, &state)

    cdef object read_taking(self, object key, int take, uint64_t* version, int* state):
        """read() for who takes (TAKE_*): MISS, and the envelope's state if there is one, STATE_FRESH if not."""
        cdef const uint8_t* k
        cdef size_t n
        cdef seg_t* s = self.ready_to_read()
        key_view(key, &k, &n)
        state[0] = STATE_FRESH
        return self.read_hashed(s, k, n, siphash13(k, n, s.k0, s.k1), MISS, version, take, state)

    @cython.final
    cdef inline object read_hashed(self, seg_t* s, const uint8_t* k, size_t n, uint64_t h, object default, uint64_t* version, int take,
                                   int* state):
        cdef read_t r
        cdef int rc, tries
        cdef bint overtaken
        cdef object value
        for tries in range(RESTARTS):
            rc = read_begin(s, k, n, h, &r)
            if rc == ABSENT:
                s.row.misses += not take & TAKE_STALE
                if unlikely(r.expired) and s.me[0]:
                    remove(s, k, n, h, 0, True, NULL, 0)    # if the stripe is free: it is nobody's duty
                return default
            overtaken = rc == OK and r.value_bytes >= LARGE_COPY
            if rc == OK:
                value = self.take_value(s, &r, take, version, &rc)
                if rc == OK:
                    if unlikely(r.codec == CODEC_ENVELOPE):
                        state[0] = r.state
                    return value
                if rc == ABSENT:
                    self.note_hidden(s, k, n, h, &r, take, state)
                    return default
            s.row.retries += 1
            if rc == AGAIN and tries and overtaken:     # as long again for each copy, with the interpreter: under the stripe once is enough
                break
        return self.read_locked(s, k, n, h, default, version, take, state)

    cdef void note_hidden(self, seg_t* s, const uint8_t* k, size_t n, uint64_t h, read_t* r, int take, int* state):
        """A read met an envelope that is hidden from it: a miss. What is hidden for good is taken away, if its stripe is free."""
        state[0] = r.state
        s.row.misses += not take & TAKE_STALE
        if r.state == STATE_GONE and s.me[0]:
            remove(s, k, n, h, r.cas, True, NULL, 0)

    cdef object read_locked(self, seg_t* s, const uint8_t* key, size_t n, uint64_t h, object default, uint64_t* version, int take, int* state):
        """A read that was overtaken by writes 64 times, or twice in a long copy: under the stripe, into memory of ours, without the interpreter."""
        cdef read_t r
        cdef uint8_t* copy = NULL
        cdef int rc
        cdef uint64_t until = wait_until(s)
        cdef envelope_t e
        cdef Mapping held = self.mapping
        if s.me[0] == 0:
            s = self.ready()            # who has no row takes no lock
        self.enter(s)
        try:
            while True:
                with nogil:
                    rc = stripe_take(s, stripe_of(s, bucket_of(s, h)), until)
                    if rc == OK:
                        rc = read_begin(s, key, n, h, &r)
                        if rc == OK:
                            copy = <uint8_t*>malloc(r.value_bytes + 1)
                            if copy != NULL:
                                read_copy(s, &r, copy)
                                read_end(s, &r)
                        stripe_release(s, stripe_of(s, bucket_of(s, h)))
                if rc != INTR:
                    break
                self.interrupted(s, held)
        finally:
            self.leave()
        if rc == ABSENT:
            s.row.misses += not take & TAKE_STALE
            return default
        if rc != OK:
            fail(rc)
        if copy == NULL:
            raise MemoryError
        try:
            if r.damaged:
                raise damaged_pages()
            version[0] = r.cas
            e.codec = r.codec
            e.head_bytes = 0
            if r.codec == CODEC_ENVELOPE:
                if not self.given(s, &r, copy, take, &e):
                    self.note_hidden(s, key, n, h, &r, take, state)
                    return default
                state[0] = r.state
            s.row.hits += 1
            return self.decoded(e.codec, copy + e.head_bytes, r.value_bytes - e.head_bytes)
        finally:
            free(copy)

    def get(self, key, default=None):
        """The key's value, or default.

        Args: key: bytes or str of 1 to 4,096 bytes; a str is the same key as its UTF-8.
        Returns: a value equal to the one that was set, and of its type.
        Raises: InvalidKey; CodecMismatch; CapacityError, only if 64 writes (2, of a value above 64 KiB) overtook the read and its stripe is then
        held by a stopped process. Locks: none. A fork child that finds no row free reads without one (max_processes).
        """
        cdef uint64_t version
        if likely(not self._reads_through):
            return self.read(key, default, &version)
        value = self.read(key, MISS, &version)
        return self._load_missing(key, default) if value is MISS else value

    def peek(self, key, default=None):
        """get(), but of what is cached, whatever stands behind the cache."""
        cdef uint64_t version
        return self.read(key, default, &version)

    def gets(self, key):
        """(value, version) for cas(); (None, 0) if the key is not there. A version is never used twice for one key. While a touch() or an
        incr() is under way it may be the one from before that: a cas() with it is refused."""
        cdef uint64_t version = 0
        cdef int state
        value = self.read_taking(key, 0, &version, &state)
        return (None, 0) if value is MISS else (value, version)

    def _look(self, key):
        """(state, value, version) for who takes stale values: codec.FRESH or STALE (near its end also early, as for get) and the value; NEGATIVE
        or ABSENT and None. The version is 0 if ABSENT. A value counts as a hit; a miss is not counted: get has done so."""
        cdef uint64_t version = 0
        cdef int state
        value = self.read_taking(key, TAKE_EARLY | TAKE_STALE, &version, &state)
        if value is not MISS:
            return (state, value, version)
        return (STATE_NEGATIVE, None, version) if state == STATE_NEGATIVE else (STATE_GONE, None, 0)

    def get_many(self, keys):
        """{key: value} of those found, keyed as passed. Each value is whole; together they are not one instant's.

        Keys are looked at in groups: their buckets are fetched into the processor's cache together, then their items, then they are
        read one by one.
        """
        cdef dict found = {}
        cdef list todo = several(keys)      # ours: what a codec runs cannot change it
        cdef const uint8_t* k[GROUP]
        cdef size_t n[GROUP]
        cdef uint64_t h[GROUP]
        cdef uint64_t version
        cdef int state
        cdef seg_t* s = self.ready_to_read()
        cdef Py_ssize_t at, i, end
        for at in range(0, len(todo), GROUP):
            end = min(<Py_ssize_t>GROUP, len(todo) - at)
            s = self.ready_to_read()
            for i in range(end):
                key_view(todo[at + i], &k[i], &n[i])
                h[i] = siphash13(k[i], n[i], s.k0, s.k1)
                prefetch(&s.buckets[bucket_of(s, h[i])])
            for i in range(end):
                prefetch_item(s, h[i])
            for i in range(end):
                if unlikely(self.s == NULL or s.me[0] == 0):        # a codec closed this handle, or forked
                    s = self.ready_to_read()
                value = self.read_hashed(s, k[i], n[i], h[i], MISS, &version, TAKE_EARLY, &state)
                if value is not MISS:
                    found[todo[at + i]] = value
        return found

    def __getitem__(self, key):
        cdef uint64_t version
        value = self.read(key, MISS, &version)
        if value is MISS and self._reads_through:
            value = self._load_missing(key, MISS)
        if value is MISS:
            raise KeyError(key)
        return value

    def __contains__(self, key):
        cdef const uint8_t* k
        cdef size_t n
        cdef read_t r
        cdef seg_t* s
        cdef int rc = AGAIN, state
        cdef uint32_t stale_ms
        cdef uint64_t version
        key_view(key, &k, &n)
        s = self.ready_to_read()
        for _ in range(RESTARTS):
            rc = read_begin(s, k, n, siphash13(k, n, s.k0, s.k1), &r)
            if unlikely(rc == OK and r.codec == CODEC_ENVELOPE):
                state = state_in_place(s, &r, False, &stale_ms)
                if state == AGAIN:
                    continue
                return state == STATE_FRESH or state == STATE_DAMAGED
            if rc == ABSENT or (rc == OK and (unchanged(&r) or same_item(s, &r))):
                return rc == OK
        return self.read_taking(key, 0, &version, &state) is not MISS

    def ttl(self, key):
        """Seconds that the key has left (float; of a value with stale_ttl: till it is stale), math.inf if it never expires, None if it is not there."""
        cdef const uint8_t* k
        cdef size_t n
        cdef uint64_t h, until
        cdef seg_t* s = self.ready_to_read()
        cdef Mapping held = self.mapping
        cdef double left = 0
        cdef int rc = AGAIN
        key_view(key, &k, &n)
        h = siphash13(k, n, s.k0, s.k1)
        for _ in range(RESTARTS):
            rc = read_left(s, k, n, h, False, &left)
            if rc != AGAIN:
                break
        if rc == AGAIN:         # writes overtook it so often, or its version is damaged
            s = self.ready()
            until = wait_until(s)
            self.enter(s)
            try:
                rc = INTR
                while rc == INTR:
                    with nogil:
                        rc = stripe_take(s, stripe_of(s, bucket_of(s, h)), until)
                        if rc == OK:
                            rc = read_left(s, k, n, h, True, &left)
                            stripe_release(s, stripe_of(s, bucket_of(s, h)))
                    if rc == INTR:
                        self.interrupted(s, held)
            finally:
                self.leave()
        if rc == ABSENT:
            return None
        if rc != OK:
            fail(rc)
        return left

    # -- set

    cdef object store_view(self, object value, put_t* op, int64_t* number):
        """Point op at the value's bytes; the object returned keeps them alive."""
        cdef Py_ssize_t n
        cdef int overflow = 0
        if type(value) is Encoded:
            op.codec = (<Encoded>value).codec
            value = (<Encoded>value).payload
        elif PyBytes_CheckExact(value):
            op.codec = CODEC_BYTES
        elif PyUnicode_CheckExact(value):
            op.codec = CODEC_STR
            if PyUnicode_IS_COMPACT_ASCII(value):
                op.value = <const uint8_t*>PyUnicode_AsUTF8AndSize(value, &n)
                op.value_bytes = <uint64_t>n
                return value
            value = value.encode("utf-8", "surrogatepass")
        else:
            if PyLong_CheckExact(value):
                number[0] = PyLong_AsLongLongAndOverflow(value, &overflow)
                if not overflow:
                    op.codec = CODEC_INT
                    op.value = <const uint8_t*>number
                    op.value_bytes = 8
                    return value
            op.codec, value = self._encode(value)
        op.value = <const uint8_t*>PyBytes_AS_STRING(value)
        op.value_bytes = <uint64_t>PyBytes_GET_SIZE(value)
        return value

    # -- the log: room before a write takes its stripe, durability after it

    cdef int secure(self, seg_t* s, Mapping held, log_t* log, uint64_t n, uint64_t least=0) except -1:
        """Room for a record of n bytes in this process's ring. If there is none for a second: with the policy always an error; else the
        operation is not logged, which is counted as a gap, and nobody waits again until the drainer has moved. With always the error comes at
        once while the log cannot be written: else each write would be done, and wait ten seconds for the disk. A step that room_in_log() has
        admitted goes on: its thread holds several stripes, so it does not wait. least: bytes of the record without its value (0: it has none),
        which is what such a thread gets if there is no room for n."""
        cdef ring_t* ring
        cdef int rc
        cdef bint always = ld64(&s.header.log_policy) == LOG_ALWAYS
        log.bytes = 0
        log.kept = False
        log.end = 0
        log.token = s.me[0]
        if ld64(&s.header.log_policy) == LOG_OFF:
            return 0
        if always and s.holder != pthread_self():
            refuse_if_failed(s)
        ring = ring_of(s, s.row_idx)
        if ring_secure(s, n):
            log.bytes = n
            if ld64(&ring.head) - ld64(&ring.drained) > s.ring_bytes >> 1:
                wake_drainer(s)
            return 0
        if s.holder == pthread_self():          # nobody waits with a stripe in hand
            least = least or n
            if take_kept(s, log, least):
                return 0
            if least < n and ring_secure(s, least):
                log.bytes = least
                return 0
            if always:
                raise errors.LogFull("the log takes nothing more now: nothing was changed by this command")
            return 0
        if self.impatient:
            wake_drainer(s)
            raise WouldWait
        if always or ld64(&ring.drained) != s.ring_stuck:
            if self.wait_ring(s, held, n, 0) == OK:
                log.token = s.me[0]
                log.bytes = n
                return 0
            s.ring_stuck = ld64(&ring_of(s, s.row_idx).drained)
        if always:
            raise errors.LogFull("the log takes nothing: is its supervisor running, is its disk full? Nothing was changed: try again")
        return 0

    cdef void over(self, seg_t* s, log_t* log, bint done):
        """The operation is over: give back what was secured. What was done and is not in the log is a gap: counted now, not before, or a
        snapshot between could heal it."""
        ring_release(s, log)
        if done and log.end == 0 and ld64(&s.header.log_policy) != LOG_OFF:
            add64(&s.header.log_gaps, 1)
            if ld64(&s.header.log_policy) == LOG_ALWAYS:
                log.token = s.me[0]
                log.end = NEVER

    cdef int wait_ring(self, seg_t* s, Mapping held, uint64_t n, uint64_t end) except -100:
        cdef uint64_t until = mono_ns() + (<uint64_t>LOG_WAIT_NS if n else DURABLE_WAIT_NS), me = s.me[0]
        cdef int rc
        self.enter(s)
        try:
            while True:
                with nogil:
                    rc = ring_wait(s, n, end, until)
                if rc != INTR:
                    return rc
                self.interrupted(s, held)
                if end and s.me[0] != me:       # a fork child: what is waited for is the parent's
                    return OK
        finally:
            self.leave()

    cdef int durable(self, seg_t* s, Mapping held, log_t* log) except -1:
        """With the policy always: wait until what was logged is durable. No lock is held, nothing secured."""
        if log.end and log.token == s.me[0] and ld64(&s.header.log_policy) == LOG_ALWAYS:
            if log.end == NEVER or ld64(&ring_of(s, s.row_idx).durable) < log.end and self.wait_ring(s, held, 0, log.end) != OK:
                raise not_durable()
        return 0

    cdef int put_view(self, seg_t* s, put_t* op) except -100:
        """Put what op points at: OK, EXISTS, ABSENT or MISMATCH. It is logged; the caller waits (durable())."""
        cdef Mapping held
        cdef int rc = BUSY
        op.log.bytes = 0
        op.log.end = 0
        if unlikely(writes_back(s, op.key)) and not op.loaded:
            if op.when == IF_ABSENT and not self._reads_through:
                return fail(NO_STORE)       # who cannot ask the store does not know
            self.wait_stored(s, self.mapping)
        if likely(s.ring_bytes == 0) or op.flags & FLAG_CLAIM or passes_by(s, op.key):      # a copy of what the store has is not restored
            return self.put_now(s, op)
        held = self.mapping
        self.secure(s, held, &op.log, record_room(s, op.key_bytes, op.value_bytes), record_room(s, op.key_bytes, 0))
        try:
            rc = self.put_now(s, op)
        finally:
            self.over(s, &op.log, rc == OK)
        return rc

    cdef int wait_stored(self, seg_t* s, Mapping held) except -1:
        """Write-back: room for one more dirty item. No lock is held; who holds some does not wait."""
        cdef uint64_t until
        if likely(ld64(&s.header.dirty) < ld64(&s.header.dirty_limit) >> 3):
            return 0
        ring_supervisor(s)
        if ld64(&s.header.dirty) < ld64(&s.header.dirty_limit) or s.holder == pthread_self():
            return 0
        if self.impatient or at_once:
            raise WouldWait(NOT_STORED)
        until = mono_ns() + DURABLE_WAIT_NS
        self.enter(s)
        try:
            while ld64(&s.header.dirty) >= ld64(&s.header.dirty_limit):
                if mono_ns() > until:
                    raise errors.StoreUnavailable(NOT_STORED)
                with nogil:
                    ring_supervisor(s)
                    usleep(500)
                self.interrupted(s, held)
        finally:
            self.leave()
        return 0

    cdef int bury(self, seg_t* s, const uint8_t* key, size_t n, uint64_t h, uint64_t version, log_t* log) except -100:
        """Write-back: delete a key, of which the store may have more than the cache: a tombstone is what is stored. As remove_view()."""
        cdef put_t op
        cdef int rc
        op.chunk = 0
        op.flags = 0
        op.refs = 0
        op.drawn = 0
        op.when = IF_VERSION if version else ALWAYS
        op.loaded = False
        op.version = version
        op.key = key
        op.key_bytes = n
        op.hash = h
        buried(&op)
        rc = self.put_view(s, &op)
        if log != NULL:
            log[0] = op.log
        if rc == OK:
            s.row.sets -= 1
            s.row.deletes += op.was_live
        return (OK if op.was_live else ABSENT) if rc == OK else rc

    cdef int put_now(self, seg_t* s, put_t* op) except -100:
        cdef Mapping held = self.mapping
        cdef uint64_t me, until
        cdef int rc = BUSY if unlikely(op.value_bytes >= LONG_COPY) else put(s, op, 0)
        if self.impatient and (rc == BUSY or rc == NO_ROOM):
            if op.chunk:
                give_up(s, op)
            raise WouldWait
        if rc == BUSY or rc == NO_ROOM:
            me = s.me[0]
            until = wait_until(s)
            self.enter(s)
            try:
                while True:
                    with nogil:
                        rc = put(s, op, until)
                    if rc != INTR:
                        break
                    if self.interrupted(s, held):
                        op.chunk = 0
                        op.log.bytes = 0                # secured in the parent's ring
                        me = s.me[0]
                        if op.flags & FLAG_CLAIM:       # it would be the parent's: claim() begins again
                            rc = MISMATCH
                            break
            finally:
                if op.chunk and s.me[0] == me:
                    give_up(s, op)
                self.leave()
        elif op.chunk:
            give_up(s, op)
        if rc == OK:
            if not op.flags & FLAG_CLAIM:
                s.row.sets += 1
        elif rc != EXISTS and rc != ABSENT and rc != MISMATCH:
            fail(rc)
        return rc

    cdef int store(self, object key, object value, object ttl, int when, uint64_t version, uint64_t* stored) except -100:
        cdef log_t log
        cdef Mapping held = self.mapping
        cdef int rc = self.store_logged(key, value, ttl, when, version, stored, &log)
        if unlikely(log.end != 0) and held is not None:
            self.durable(&held.s, held, &log)
        return rc

    cdef int store_logged(self, object key, object value, object ttl, int when, uint64_t version, uint64_t* stored, log_t* log) except -100:
        """store(), but for the wait till it is durable."""
        cdef put_t op
        cdef int64_t number
        cdef uint64_t ttl_ms = 0
        cdef seg_t* s = self.ready()
        cdef object holder
        cdef Mapping held = self.mapping
        cdef int rc
        op.chunk = 0
        op.flags = 0
        op.refs = 0
        op.when = when & ~WRITTEN
        op.drawn = 0
        op.loaded = when == IF_CLAIM or when == IF_SAME
        op.version = version
        key_view(key, &op.key, &op.key_bytes)
        op.hash = siphash13(op.key, op.key_bytes, s.k0, s.k1)
        prefetch(&s.buckets[bucket_of(s, op.hash)])
        if ttl is not None:
            ttl_ms = ttl_to_ms(ttl)
            op.expiry_ms = now_ms(s) + ttl_ms if ttl_ms else 1
        else:
            op.expiry_ms = now_ms(s) + s.default_ttl_ms if s.default_ttl_ms else 0
            if unlikely(s.policy == POLICY_BACK) and s.default_ttl_ms:
                op.flags = FLAG_COPY_TTL
        holder = self.store_view(value, &op, &number)
        if type(value) is Encoded and op.expiry_ms > 1:
            op.expiry_ms += (<Encoded>value).stale_ms
        if op.value_bytes > s.max_value_bytes:
            raise too_large(op.value_bytes, s.max_value_bytes)
        s = self.ready()                    # an encoder is Python: it may have closed this handle, or forked
        held = self.mapping
        if unlikely(op.expiry_ms == 1) and ttl is not None and writes_back(s, op.key) and not op.loaded:
            buried(&op)
        rc = self.put_view(s, &op)
        log[0] = op.log
        if rc == OK:
            stored[0] = op.cas
            if ttl is not None and ttl_ms == 0:
                if likely(not writes_back(s, op.key)):
                    self.remove_view(s, held, op.key, op.key_bytes, op.hash, 0, True, NULL)
        return rc

    def set(self, key, value, ttl=None, tags=None):
        """Store a value.

        Args: key: bytes or str of 1 to 4,096 bytes. value: bytes, str, int, or what the codec takes. ttl: seconds (int, float or
        timedelta) until it expires; None: the segment's default; 0: already expired, so that an existing value is removed. tags: str
        of 1 to 200 bytes, at most 16: invalidate_tag() of one of them removes it.
        Raises: InvalidKey, InvalidTTL, InvalidTag, UnsupportedValue, ValueTooLarge; NoRoom, StripeBusy. After an error nothing is changed.
        Locks: one stripe; a slab class if nothing is in hand.
        """
        cdef uint64_t stored
        if unlikely(tags is not None):
            self.store_tagged(key, value, ttl, tags, ALWAYS, 0)
        else:
            self.store(key, value, ttl, ALWAYS, 0, &stored)

    def add(self, key, value, ttl=None, tags=None):
        """Store a value if the key is not there: True if it was stored."""
        cdef uint64_t stored
        if unlikely(tags is not None):
            return self.store_tagged(key, value, ttl, tags, IF_ABSENT, 0) == OK
        return self.store(key, value, ttl, IF_ABSENT, 0, &stored) == OK

    def replace(self, key, value, ttl=None, tags=None):
        """Store a value if the key is there: True if it was stored."""
        cdef uint64_t stored
        if unlikely(tags is not None):
            return self.store_tagged(key, value, ttl, tags, IF_PRESENT, 0) == OK
        return self.store(key, value, ttl, IF_PRESENT, 0, &stored) == OK

    def cas(self, key, value, uint64_t version, ttl=None, tags=None):
        """Store a value if the key still has the version that gets() gave (0: is still not there): True if it was stored."""
        cdef uint64_t stored
        cdef int when = IF_VERSION if version else IF_ABSENT
        if unlikely(tags is not None):
            return self.store_tagged(key, value, ttl, tags, when, version) == OK
        return self.store(key, value, ttl, when, version, &stored) == OK

    def encoded(self, value):
        """A value as its codec has it: Encoded, or the value itself if it needs none. What set() and the like take instead of it.

        Raises: UnsupportedValue, ValueTooLarge.
        """
        cdef put_t op
        cdef int64_t number
        cdef seg_t* s
        holder = self.store_view(value, &op, &number)
        s = self.ready()                    # an encoder is Python
        if op.value_bytes > s.max_value_bytes:
            raise too_large(op.value_bytes, s.max_value_bytes)
        return value if op.codec <= CODEC_INT or type(value) is Encoded else Encoded(op.codec, holder)

    def set_many(self, mapping, ttl=None, tags=None):
        """Store several values, each with all of the tags. All are checked and encoded before the first is stored; each is then stored by itself."""
        cdef list ready = []
        cdef bytes head = None if tags is None else self.carried(tags, None)
        cdef log_t log
        cdef const uint8_t* k
        cdef size_t n
        cdef uint64_t stored
        cdef seg_t* s = self.ready()
        cdef Mapping held = self.mapping
        if ttl is not None:
            ttl_to_ms(ttl)
        for key, value in pairs(mapping):
            key_view(key, &k, &n)
            if unlikely(head is not None and writes_back(self.ready(), k)):
                raise untagged()
            ready.append((key, self.encoded(value) if head is None else self.encoded(self.wrapped(value, head, 0, 0, 0))))
        log.end = 0
        for key, value in ready:
            self.store_logged(key, value, ttl, ALWAYS, 0, &stored, &log)
        if unlikely(log.end != 0):          # of the last: what is durable up to there is all of them
            self.durable(s, held, &log)

    cdef int store_tagged(self, object key, object value, object ttl, object tags, int when, uint64_t version) except -100:
        cdef uint64_t stored
        cdef const uint8_t* k
        cdef size_t n
        key_view(key, &k, &n)
        if unlikely(writes_back(self.ready(), k)):
            raise untagged()
        return self.store(key, self.wrapped(value, self.carried(tags, None), 0, 0, 0), ttl, when, version, &stored)

    cdef Encoded wrapped(self, object value, bytes head, uint32_t stale_ms, uint32_t early_ms, int flags):
        """An envelope around a value. head: ENVELOPE_FIXED bytes, of which n_tags is set, and the tags (_carry())."""
        cdef put_t op
        cdef int64_t number
        cdef object holder                  # keeps the value's bytes
        cdef Py_ssize_t n = PyBytes_GET_SIZE(head)
        cdef bytes payload
        cdef uint8_t* p
        cdef Encoded out
        if type(value) is Encoded:
            holder = (<Encoded>value).payload
            op.codec = <uint8_t>(<Encoded>value).codec
            op.value = <const uint8_t*>PyBytes_AS_STRING(holder)
            op.value_bytes = <uint64_t>PyBytes_GET_SIZE(holder)
        else:
            holder = self.store_view(value, &op, &number)
        payload = PyBytes_FromStringAndSize(NULL, n + <Py_ssize_t>op.value_bytes)
        p = <uint8_t*>PyBytes_AS_STRING(payload)
        memcpy(p, PyBytes_AS_STRING(head), n)
        p[0] = op.codec
        p[1] = <uint8_t>flags
        memcpy(p + 4, &stale_ms, 4)
        memcpy(p + 8, &early_ms, 4)
        memcpy(p + n, op.value, op.value_bytes)
        out = <Encoded>Encoded.__new__(Encoded)
        out.codec = CODEC_ENVELOPE
        out.payload = payload
        out.stale_ms = stale_ms
        return out

    def _carry(self, tags, bytes head=None):
        """The head of an envelope with these tags' generations as they are now, behind those of another head. What is stored with it is hidden by
        every invalidate_tag() from here on. Raises: InvalidTag."""
        return self.carried(tags, head)

    cdef bytes carried(self, object tags, bytes head):
        cdef uint8_t to[HEAD_BYTES]
        cdef uint8_t key[TAG_PREFIX_BYTES + TAG_BYTES]
        cdef uint64_t generation = 0, at = ENVELOPE_FIXED
        cdef uint16_t n_tags = 0
        cdef Py_ssize_t n
        cdef const char* name
        cdef log_t log
        memset(to, 0, ENVELOPE_FIXED)
        if head is not None:
            at = <uint64_t>PyBytes_GET_SIZE(head)
            memcpy(to, PyBytes_AS_STRING(head), at)
            memcpy(&n_tags, to + 2, 2)
        for tag in several_tags(tags):
            name = tag_view(tag, &n)
            if n_tags == MOST_TAGS:
                raise errors.InvalidTag(f"an item has at most {MOST_TAGS} tags: use fewer")
            memcpy(key, <const char*>b"\0tag\0", TAG_PREFIX_BYTES)
            memcpy(key + TAG_PREFIX_BYTES, name, n)
            self.generation(key, TAG_PREFIX_BYTES + n, &generation, &log)
            self.durable(self.s, self.mapping, &log)
            memcpy(to + at, &generation, 8)
            to[at + 8] = <uint8_t>n
            memcpy(to + at + 9, name, n)
            at += 9 + <uint64_t>n
            n_tags += 1
        memcpy(to + 2, &n_tags, 2)
        return PyBytes_FromStringAndSize(<char*>to, <Py_ssize_t>at)

    def _tag_key(self, tag):
        """The key of a tag's generation. Raises: InvalidTag."""
        cdef Py_ssize_t n
        cdef const char* name = tag_view(tag, &n)
        return b"\0tag\0" + PyBytes_FromStringAndSize(name, n)

    cdef int generation(self, const uint8_t* key, size_t n, uint64_t* to, log_t* log) except -100:
        """The generation under this key, a namespace's or a tag's (namespace.py): the eight bytes that are there, however they got there; if
        there are none, a new one. While a segment is restored it may still come, and is waited for, RESTORE_WAIT_NS at most. log: of a new one.
        Raises: WouldWait; as set()."""
        cdef uint64_t until = 0
        cdef seg_t* s
        cdef read_t r
        cdef int rc
        log.end = 0
        while True:
            s = self.ready()
            rc = read_generation(s, key, n, to)
            if rc == OK:
                return OK
            if rc == MISMATCH:          # replace exactly what is no generation
                rc = read_begin(s, key, n, siphash13(key, n, s.k0, s.k1), &r)
                if rc == OK and (r.value_bytes != 8 or r.is_big) and read_end(s, &r) == OK:
                    rc = self.draw(key, n, IF_VERSION, r.cas, to, log)
                    if rc == ABSENT:        # a stale or negative value, or one that is hidden: it is there for no write
                        rc = self.draw(key, n, IF_ABSENT, 0, to, log)
                    if rc == OK:
                        return OK
            elif rc == ABSENT and ld32(&s.header.restoring) == NAMESPACES_FIRST and (until == 0 or mono_ns() < until):
                if self.impatient:
                    raise WouldWait
                if s.holder == pthread_self():
                    raise errors.StripeBusy("the cache is being restored, and what this call needs may still come: try again")
                until = until or mono_ns() + RESTORE_WAIT_NS
                with nogil:
                    usleep(2000)
            elif rc == ABSENT and self.draw(key, n, IF_ABSENT, 0, to, log) == OK:
                return OK
            PyErr_CheckSignals()

    cdef int draw(self, const uint8_t* key, size_t n, int when, uint64_t version, uint64_t* to, log_t* log) except -100:
        """Store a new generation: OK, and which; else as put_view()."""
        cdef bytes drawn = urandom(8)
        cdef seg_t* s = self.ready()
        cdef put_t op
        cdef int rc
        log.end = 0
        op.key = key
        op.key_bytes = n
        op.hash = siphash13(key, n, s.k0, s.k1)
        op.value = <const uint8_t*>PyBytes_AS_STRING(drawn)
        op.value_bytes = 8
        op.expiry_ms = 0
        op.codec = CODEC_BYTES
        op.flags = 0
        op.refs = 0
        op.chunk = 0
        op.when = when
        op.drawn = MADE
        op.loaded = False
        op.version = version
        rc = self.put_view(s, &op)
        if rc == OK:
            to[0] = op.generation
            log[0] = op.log
        return rc

    def _generation(self, bytes key not None):
        """generation(), as bytes."""
        cdef uint64_t generation = 0
        cdef log_t log
        self.generation(<const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), &generation, &log)
        self.durable(self.s, self.mapping, &log)
        return PyBytes_FromStringAndSize(<char*>&generation, 8)

    def _generation_there(self, bytes key not None):
        """The same, None if there is none."""
        cdef uint64_t generation = 0
        cdef int rc = AGAIN
        while rc == AGAIN:
            rc = read_generation(self.ready(), <const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), &generation)
        return PyBytes_FromStringAndSize(<char*>&generation, 8) if rc == OK else None

    def _renew(self, bytes key not None):
        """Another generation under this key: what carries the one before is never found again."""
        cdef uint64_t generation = 0
        cdef log_t log
        self.draw(<const uint8_t*>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key), ALWAYS, 0, &generation, &log)
        self.durable(self.s, self.mapping, &log)

    def _put_negative(self, key, ttl=None, uint64_t version=0):
        """Store that it is known, for ttl seconds, that there is nothing: a miss for everybody but _look(). version: of the claim() under which
        it was found out; 0: whatever is there. True if it was stored."""
        cdef uint64_t stored
        return self.store(key, self.wrapped(b"", bytes(ENVELOPE_FIXED), 0, 0, FLAG_NEGATIVE), ttl, IF_CLAIM if version else ALWAYS, version, &stored) == OK

    def __setitem__(self, key, value):
        cdef uint64_t stored
        self.store(key, value, None, ALWAYS, 0, &stored)

    cdef int room_in_log(self, seg_t* s, Mapping held, log_t* log, uint64_t n) except -1:
        """Before several stripes are held: room for n bytes of records, for what will be logged meanwhile may not wait. It is secured."""
        log.bytes = 0
        if s.ring_bytes and ld64(&s.header.log_policy) != LOG_OFF:
            if n > s.ring_bytes >> 1:
                if ld64(&s.header.log_policy) == LOG_ALWAYS:
                    raise errors.LogFull(f"a transaction of {n:,} bytes does not fit into this segment's log buffer of {s.ring_bytes:,}: nothing "
                                         "was changed. Make it smaller, or create the segment with a larger log_buffer")
                n = s.ring_bytes >> 1
            self.secure(s, held, log, n)
        return 0

    cdef int forked(self, seg_t* s, Mapping held, log_t* log) except -1:
        """interrupted(); what was secured in a parent's ring is not this process's."""
        if self.interrupted(s, held) and log != NULL:
            log.bytes = 0
        return 0

    # -- delete

    cdef int remove_view(self, seg_t* s, Mapping held, const uint8_t* key, size_t n, uint64_t h, uint64_t version,
                         bint only_expired, log_t* log) except -100:
        """log: out, for durable(); NULL: what expires is not logged."""
        cdef int rc = BUSY
        if unlikely(s.policy != 0) and not only_expired:
            if writes_back(s, key):
                return self.bury(s, key, n, h, version, log)
            if passes_by(s, key):
                return fail(NO_STORE)
        if likely(s.ring_bytes == 0) or log == NULL:
            return self.remove_now(s, held, key, n, h, version, only_expired, NULL)
        self.secure(s, held, log, record_room(s, n, 0))
        try:
            rc = self.remove_now(s, held, key, n, h, version, only_expired, log)
        finally:
            self.over(s, log, rc == OK or rc == ABSENT)
        return rc

    cdef int remove_now(self, seg_t* s, Mapping held, const uint8_t* key, size_t n, uint64_t h, uint64_t version,
                        bint only_expired, log_t* log) except -100:
        cdef uint64_t until
        cdef int rc = remove(s, key, n, h, version, only_expired, log, 0)
        if rc == BUSY and self.impatient:
            if only_expired:
                return ABSENT       # nobody's duty
            raise WouldWait
        if rc == BUSY:
            until = wait_until(s)
            self.enter(s)
            try:
                while True:
                    with nogil:
                        rc = remove(s, key, n, h, version, only_expired, log, until)
                    if rc != INTR:
                        break
                    self.forked(s, held, log)
            finally:
                self.leave()
        if rc != OK and rc != ABSENT and rc != MISMATCH:
            fail(rc)
        return rc

    cdef int remove_key(self, object key, uint64_t version) except -100:
        cdef log_t log
        cdef Mapping held = self.mapping
        cdef int rc = self.remove_logged(key, version, &log)
        if unlikely(log.end != 0) and held is not None:
            self.durable(&held.s, held, &log)
        return rc

    cdef int remove_logged(self, object key, uint64_t version, log_t* log) except -100:
        """remove_key(), but for the wait till it is durable."""
        cdef const uint8_t* k
        cdef size_t n
        cdef seg_t* s
        log.end = 0
        key_view(key, &k, &n)
        s = self.ready()
        return self.remove_view(s, self.mapping, k, n, siphash13(k, n, s.k0, s.k1), version, False, log)

    def delete(self, key):
        """Remove a key: True if it was there."""
        return self.remove_key(key, 0) == OK

    def discard(self, key):
        """Drop the cached copy of a key, whatever stands behind the cache: True if there was one. What the store has not got yet stays."""
        cdef const uint8_t* k
        cdef size_t n
        cdef log_t log
        key_view(key, &k, &n)
        return self.discard_view(self.ready(), self.mapping, k, n, &log) == OK

    cdef int discard_view(self, seg_t* s, Mapping held, const uint8_t* key, size_t n, log_t* log) except -100:
        cdef int rc
        cdef bint logged = s.ring_bytes != 0 and not passes_by(s, key)
        log.bytes = 0
        log.end = 0
        if logged:
            self.secure(s, held, log, record_room(s, n, 0))
        try:
            rc = self.remove_now(s, held, key, n, siphash13(key, n, s.k0, s.k1), 0, False, log)
        finally:
            if logged:
                self.over(s, log, rc == OK and s.policy == 0)     # in front of a store it was a copy
        return rc

    def flush(self, double timeout=30.0):
        """Write-back: wait till the store has everything that was written before this call. With any other policy it has.

        Args: timeout: seconds.
        Raises: StoreUnavailable: it has not, after that time; or it refuses some of it (stats(): store, refused).
        """
        cdef seg_t* s
        cdef Mapping held
        cdef uint64_t until = mono_ns() + <uint64_t>(max(0.0, min(timeout, 1e6)) * 1e9), asked = self._ask_flush()
        while not self._flushed(asked, timeout, mono_ns() > until):
            s = self.ready()
            held = self.mapping
            self.enter(s)
            try:
                with nogil:
                    usleep(500)
                self.interrupted(s, held)
            finally:
                self.leave()

    def _ask_flush(self):
        """Ask for a flush: its number, for _flushed(); 0 if the store has everything."""
        cdef seg_t* s = self.ready()
        if s.policy != POLICY_BACK or (ld64(&s.header.dirty) == 0 and not any_dirty(s)):
            return 0
        return add64(&s.header.flushes_asked, 1) + 1

    def _flushed(self, uint64_t asked, double timeout, bint late):
        """Has that flush ended? Raises: StoreUnavailable: it has not, and it is late, timeout seconds after it was asked for."""
        cdef seg_t* s = self.ready()
        if ld64(&s.header.flushes_ended) >= asked:
            return True
        if late:
            raise errors.StoreUnavailable(
                f"{ld64(&s.header.dirty):,} bytes are not stored after {timeout} s; they are kept: is the supervisor running with --store, "
                "is its store up, does it refuse some (stats)?")
        ring_supervisor(s)
        return False

    def _at_once(self, call, *args, **keywords):
        """call(), a method of a table: raises WouldWait where it would have waited, in this thread, for room for a dirty item. Of a call that
        changes several keys some may be changed."""
        global at_once
        cdef bint was = at_once
        at_once = True
        try:
            return call(*args, **keywords)
        finally:
            at_once = was

    def delete_many(self, keys):
        """Remove several keys: how many were there."""
        cdef list todo = several(keys)
        cdef const uint8_t* k
        cdef size_t n
        cdef log_t log, last
        cdef Mapping held = self.mapping
        cdef Py_ssize_t removed = 0
        last.end = 0
        for key in todo:
            key_view(key, &k, &n)           # all are checked before the first is removed
        log.end = 0
        for key in todo:
            removed += self.remove_logged(key, 0, &log) == OK
            if log.end:
                last = log
        if unlikely(last.end != 0):
            self.durable(&held.s, held, &last)
        return removed

    def __delitem__(self, key):
        if self.remove_key(key, 0) != OK:
            raise KeyError(key)

    def pop(self, key, default=None):
        """Remove a key and return the value it had, or default. Of several callers one gets the value."""
        cdef uint64_t version = 0
        cdef seg_t* s
        cdef int state
        while True:
            value = self.read_taking(key, 0, &version, &state)
            if value is MISS:
                s = self.ready()
                if unlikely(state != STATE_FRESH or ld32(&s.header.restoring) or (s.ring_bytes and ld64(&s.header.log_policy))):
                    self.remove_key(key, 0)         # it is not to come back
                return default
            if self.remove_key(key, version) == OK:
                return value

    # -- claims: who computes a missing value, who holds a lock

    def claim(self, key, double seconds, bint lock=False):
        """Claim a key that is not there: say that the caller (a thread, asyncio task or greenlet) computes its value, or (lock) holds it.

        Args: seconds: after which the claim is void, 0: never. lock: clear() leaves it alone.
        Returns: the claim's version, above 0; 0: a value is there; -1: another living caller's claim stands, or (write-back) a restore has
        not put in yet what the store has not got; -2: this caller's own; -3: somebody changes it in the store (mark()); -4: did, and is
        dead or does not know how it ended; -5: it was deleted, and the store does not know yet; -6: as -1, and that caller is a task or
        greenlet of this very thread: it goes on only if this caller lets it run; -7: as -1, and that caller is beneath this one: this very
        thread (or the task in whose place it acts), which runs this one's event loop, or is the main greenlet.
        A claim of the dead is taken over. Whoever sets, deletes or (but for a lock) clears the key voids it.
        Raises: StoreNeeded: the segment stands before a store, and this handle does not.
        """
        cdef uint64_t version = 0
        cdef claim_t whose
        return self.claim_into(key, seconds, lock, &version, &whose)

    cdef int64_t claim_into(self, object key, double seconds, bint lock, uint64_t* version, claim_t* noted) except -100:
        """claim(), and what was claimed is noted, also if this raises."""
        cdef put_t op
        cdef claim_t mine, whose
        cdef uint8_t flags = 0
        cdef seg_t* s
        cdef int rc
        cdef Mapping held
        key_view(key, &op.key, &op.key_bytes)
        mine.thread = this_thread()
        mine.owner = task_or_greenlet()
        while True:
            s = self.ready()
            held = self.mapping
            mine.token = s.me[0]
            op.chunk = 0
            op.refs = 0
            op.drawn = 0
            op.hash = siphash13(op.key, op.key_bytes, s.k0, s.k1)
            op.version = 0
            rc = read_claim(s, op.key, op.key_bytes, op.hash, &op.version, &whose, &flags)
            if rc == OK:
                return 0
            if rc == AGAIN:
                continue
            if rc == EXISTS:
                if flags & FLAG_WRITING:
                    return -3 if whose.token else -4
                if whose.token == mine.token:
                    return who_waits(&mine, &whose)
                if not dead(s, whose.token):
                    return -1
            elif unlikely(ld32(&s.header.restoring) == NAMESPACES_FIRST) and writes_back(s, op.key):
                return -1           # what the store has not got is not in yet
            self.check_fills(s, op.key)
            op.when = IF_CLAIM if rc == EXISTS else IF_UNCLAIMED
            op.flags = FLAG_CLAIM | (FLAG_LOCK if lock else 0)
            op.loaded = True
            op.codec = CODEC_BYTES
            op.value = <const uint8_t*>&mine
            op.value_bytes = sizeof(mine)
            op.expiry_ms = now_ms(s) + <uint64_t>(seconds * 1000 + 0.999999) if seconds else 0
            op.cas = 0
            try:
                rc = self.put_view(s, &op)
            finally:
                if op.cas:
                    version[0] = op.cas
                    noted[0] = mine
            if rc == OK:
                return op.cas
            if op.unstored:             # a tombstone, for a value would have been seen
                return -5
            if op.when == IF_UNCLAIMED:
                PyErr_CheckSignals()

    cdef int check_fills(self, seg_t* s, const uint8_t* key) except -1:
        """Raises: StoreNeeded: what is loaded, or computed, for this key is in the store, and this handle has none."""
        if unlikely(s.policy != 0) and key[0] != 0 and not self._reads_through:
            fail(NO_STORE)
        return 0

    def _check_fills(self, key):
        """check_fills(), before it is computed."""
        cdef const uint8_t* k
        cdef size_t n
        key_view(key, &k, &n)
        self.check_fills(self.ready(), k)

    def claim_version(self, key, bint mine=False):
        """The version of the claim on this key (mine: if it is this process's); 0: there is none."""
        cdef const uint8_t* k
        cdef size_t n
        cdef uint64_t version = 0
        cdef claim_t whose
        cdef uint8_t flags = 0
        cdef seg_t* s
        cdef int rc = AGAIN
        key_view(key, &k, &n)
        while rc == AGAIN:
            s = self.ready()
            rc = read_claim(s, k, n, siphash13(k, n, s.k0, s.k1), &version, &whose, &flags)
        return version if rc == EXISTS and (not mine or whose.token == s.me[0]) else 0

    def mark(self, key, double seconds, bint alone=False, uint64_t version=0):
        """Say that this thread is about to change a key in the store: whatever is there goes, readers miss, and nobody fills.

        Args: seconds: that the mark stands, also if this process dies: its write may be going on in the store. alone: nobody else is to
        write meanwhile. version: if the key still has it, or a claim of this process has, or the mark that stands there
        and that no clear() has come behind.
        Returns: (version, overlapped). The version is for fill_claim(), 0 if living threads' marks are in the way: of one that wants the
        key for itself; alone, of any; or of seven; -1: it has another version. overlapped: another's mark was there, so nobody knows what
        the store will have in the end. Who does not fill it calls end_mark().
        """
        cdef claim_t whose
        return self.mark_into(key, seconds, alone, version, &whose)

    cdef tuple mark_into(self, object key, double seconds, bint alone, uint64_t version, claim_t* whose):
        """mark(), and who put it is noted, also if this raises."""
        cdef put_t op
        cdef mark_t mark
        cdef seg_t* s
        cdef int rc
        key_view(key, &op.key, &op.key_bytes)
        whose.thread = this_thread()
        whose.owner = task_or_greenlet()
        while True:
            s = self.ready()
            memset(&mark, 0, sizeof(mark))
            mark.owner = mark.token[0] = s.me[0]
            mark.alone = alone
            op.chunk = 0
            op.refs = 0
            op.drawn = 0
            op.hash = siphash13(op.key, op.key_bytes, s.k0, s.k1)
            op.version = version
            op.overlapped = False
            op.when = IF_UNMARKED_BY_ANY if alone else IF_UNMARKED
            op.flags = FLAG_CLAIM | FLAG_LOCK | FLAG_WRITING
            op.loaded = True
            op.codec = CODEC_BYTES
            op.value = <const uint8_t*>&mark
            op.value_bytes = sizeof(mark)
            op.expiry_ms = mark.until_ms[0] = now_ms(s) + <uint64_t>(seconds * 1000 + 0.999999)
            op.cas = 0
            try:
                rc = self.put_view(s, &op)
            finally:
                if op.cas:
                    whose.token = mark.owner
            if rc != MISMATCH or mark.owner == s.me[0]:      # else a fork child: the mark was the parent's
                return (op.cas if rc == OK else -1 if rc == MISMATCH else 0), bool(op.overlapped)

    def end_mark(self, key, bint known=True):
        """End a write for which mark() was called, and whose mark was not filled: it goes when all have ended who put one here.

        Args: known: it is known what the store has done; else the mark stands till this write's time is over, and nobody waits for it.
        """
        self.give_back(key, 0, known)

    cdef int give_back(self, object key, uint64_t version, bint known) except -100:
        """A claim of this version, or (0) a mark: OK, or what remove_claim() and end_mark() say of one that is not there any more."""
        cdef const uint8_t* k
        cdef size_t n
        cdef uint64_t h, until
        cdef seg_t* s
        cdef Mapping held
        cdef int rc
        key_view(key, &k, &n)
        s = self.ready()
        held = self.mapping
        h = siphash13(k, n, s.k0, s.k1)
        rc = remove_claim(s, k, n, h, version, 0) if version else end_mark(s, k, n, h, known, 0)
        if rc == BUSY:
            until = wait_until(s)
            self.enter(s)
            try:
                while True:
                    with nogil:
                        rc = remove_claim(s, k, n, h, version, until) if version else end_mark(s, k, n, h, known, until)
                    if rc != INTR:
                        break
                    self.interrupted(s, held)
            finally:
                self.leave()
        if rc != OK and rc != MISMATCH and rc != ABSENT:
            fail(rc)
        return rc

    def fill_claim(self, key, value, uint64_t version, ttl=None, bytes head=None, stale_ttl=None, uint32_t early_ms=0, bint refresh=False):
        """Store the value for which claim() gave this version: True if the claim still stood.

        Args: head: the tags, by _carry(), from before the value was computed. stale_ttl: seconds, beside ttl, in which it may be given to who
        takes a stale value. early_ms: XFetch's delta * beta (core/envelope.pxd). refresh: version is that of the stale value which it replaces.
        """
        cdef uint64_t stored, stale_ms = 0
        cdef int when = IF_SAME if refresh else IF_CLAIM
        self._check_fills(key)
        if stale_ttl is not None:
            stale_ms = ttl_to_ms(stale_ttl)
            if stale_ms > 0xffffffff:
                raise errors.InvalidTTL(f"stale_ttl is at most 49 days, not {stale_ttl} seconds")
        if stale_ms == 0 and early_ms == 0 and (head is None or PyBytes_GET_SIZE(head) == ENVELOPE_FIXED):
            return self.store(key, value, ttl, when, version, &stored) == OK
        if head is None:
            head = bytes(ENVELOPE_FIXED)
        return self.store(key, self.wrapped(value, head, <uint32_t>stale_ms, early_ms, 0), ttl, when, version, &stored) == OK

    def _add_claimed(self, key, value, uint64_t version, ttl=None, bint refresh=False):
        """fill_claim(), of a value that the store has not got."""
        cdef uint64_t stored
        return self.store(key, value, ttl, (IF_SAME if refresh else IF_CLAIM) | WRITTEN, version, &stored) == OK

    def _give_up(self, key, uint64_t version):
        """Write-back: take out what is not stored yet, if it still has this version: True if it had. The store keeps what it has."""
        cdef const uint8_t* k
        cdef size_t n
        cdef log_t log
        cdef seg_t* s
        cdef Mapping held = self.mapping
        cdef uint64_t h, until
        cdef int rc = INTR
        key_view(key, &k, &n)
        s = self.ready()
        h = siphash13(k, n, s.k0, s.k1)
        log.bytes = 0
        log.end = 0
        if s.ring_bytes:
            self.secure(s, held, &log, record_room(s, n, 0))
        try:
            until = wait_until(s)
            self.enter(s)
            try:
                while rc == INTR:
                    with nogil:
                        rc = drop_dirty(s, k, n, h, version, &log, until)
                    if rc == INTR:
                        self.forked(s, held, &log)
            finally:
                self.leave()
        finally:
            self.over(s, &log, rc == OK)
        if rc == BUSY:
            fail(rc)
        if log.end:
            self.durable(s, held, &log)
        return rc == OK

    def _delete_version(self, key, uint64_t version):
        """Remove a key if it still has this version: True if it was removed."""
        return self.remove_key(key, version) == OK

    def unclaim(self, key, uint64_t version):
        """Give a claim back: True if it still stood."""
        return version != 0 and self.give_back(key, version, True) == OK

    # -- in place

    def incr(self, key, n=1, *, default=None, ttl=None):
        """Add n to an int value, in one step for everybody: the new number.

        Args: n: a signed 64-bit int. default: what a key that is not there counts as, so that default + n is stored; None: KeyError.
        ttl: for a key that is stored by this call; one that is there keeps its time.
        Raises: KeyError; NotANumber (the value is not an int, or n or default is not); CounterOverflow. Locks: one stripe.
        """
        cdef const uint8_t* k
        cdef size_t size
        cdef uint64_t h, stored
        cdef int64_t by, out = 0
        cdef int overflow = 0
        cdef int rc
        cdef log_t log
        cdef seg_t* s
        cdef Mapping held
        if not isinstance(n, int) or not (default is None or isinstance(default, int)):
            raise errors.NotANumber("incr and decr take an int to add, and an int or None as default")
        by = PyLong_AsLongLongAndOverflow(n, &overflow)
        if overflow:
            raise errors.CounterOverflow(f"{n} is not a signed 64-bit number: nothing was changed")
        if ttl is not None:
            ttl_to_ms(ttl)
        key_view(key, &k, &size)
        while True:
            s = self.ready()
            held = self.mapping
            h = siphash13(k, size, s.k0, s.k1)
            rc = self.add_view(s, held, k, size, h, by, &out, &log)
            if unlikely(log.end != 0):
                self.durable(s, held, &log)
            if rc == OK:
                s.row.sets += 1
                return out
            if rc == ABSENT:
                if default is None:
                    raise KeyError(key)
                total = default + n
                if not -0x8000000000000000 <= total <= 0x7fffffffffffffff:
                    raise errors.CounterOverflow("default + n is not a signed 64-bit number: nothing was changed")
                if self.store(key, int(total), ttl, IF_ABSENT, 0, &stored) == OK:
                    return int(total)
            elif rc == NOT_INT:
                raise errors.NotANumber("the value of this key was not set as an int, or it was set with tags or a stale_ttl, and is not counted "
                                        "up: set it to a plain int first")
            elif rc == OVERFLOW:
                raise errors.CounterOverflow("the counter would leave the signed 64-bit range; it keeps its value")
            else:
                fail(rc)

    cdef int add_view(self, seg_t* s, Mapping held, const uint8_t* key, size_t n, uint64_t h, int64_t by, int64_t* out,
                      log_t* log) except -100:
        """add_to(), logged: OK, ABSENT, NOT_INT, OVERFLOW, or what fail() takes."""
        cdef uint64_t until
        cdef int rc = BUSY
        log.bytes = 0
        log.end = 0
        if unlikely(writes_back(s, key)):
            self.wait_stored(s, held)
        if unlikely(s.ring_bytes != 0):
            self.secure(s, held, log, record_room(s, n, 8), record_room(s, n, 0))
        try:
            rc = add_to(s, key, n, h, by, out, log, 0)
            if rc == BUSY and self.impatient:
                raise WouldWait
            if rc == BUSY:
                until = wait_until(s)
                self.enter(s)
                try:
                    while True:
                        with nogil:
                            rc = add_to(s, key, n, h, by, out, log, until)
                        if rc != INTR:
                            break
                        self.forked(s, held, log)
                finally:
                    self.leave()
        finally:
            if unlikely(s.ring_bytes != 0):
                self.over(s, log, rc == OK)
        return rc

    def decr(self, key, n=1, *, default=None, ttl=None):
        """Subtract n from an int value: incr(key, -n)."""
        if not isinstance(n, int):
            raise errors.NotANumber("incr and decr take an int to add, and an int or None as default")
        return self.incr(key, -n, default=default, ttl=ttl)

    cdef int change_expiry(self, object key, uint64_t expiry_ms, bint copy_ttl) except -100:
        cdef const uint8_t* k
        cdef size_t n
        cdef log_t log
        cdef seg_t* s
        cdef Mapping held
        cdef int rc
        key_view(key, &k, &n)
        s = self.ready()
        held = self.mapping
        rc = self.change_expiry_view(s, held, k, n, siphash13(k, n, s.k0, s.k1), expiry_ms, copy_ttl, &log)
        if unlikely(log.end != 0):
            self.durable(s, held, &log)
        return rc

    cdef int change_expiry_view(self, seg_t* s, Mapping held, const uint8_t* key, size_t n, uint64_t h, uint64_t expiry_ms,
                                bint copy_ttl, log_t* log) except -100:
        """set_expiry(), logged: OK or ABSENT."""
        cdef uint64_t until
        cdef int rc = BUSY
        log.bytes = 0
        log.end = 0
        if unlikely(s.ring_bytes != 0):
            self.secure(s, held, log, record_room(s, n, 0))
        try:
            rc = set_expiry(s, key, n, h, expiry_ms, copy_ttl, log, 0)
            if rc == BUSY and self.impatient:
                raise WouldWait
            if rc == BUSY:
                until = wait_until(s)
                self.enter(s)
                try:
                    while True:
                        with nogil:
                            rc = set_expiry(s, key, n, h, expiry_ms, copy_ttl, log, until)
                        if rc != INTR:
                            break
                        self.forked(s, held, log)
                finally:
                    self.leave()
        finally:
            if s.ring_bytes:
                self.over(s, log, rc == OK)
        if rc != OK and rc != ABSENT:
            fail(rc)
        return rc

    def touch(self, key, ttl=None):
        """Let a key expire ttl seconds from now (None: the segment's default; 0: remove it): True if it was there. With a stale_ttl it is stale then."""
        cdef uint64_t ms = 0 if ttl is None else ttl_to_ms(ttl)
        cdef seg_t* s = self.ready()
        if ttl is None:
            ms = s.default_ttl_ms
        if ttl is not None and ms == 0:
            return self.remove_key(key, 0) == OK
        return self.change_expiry(key, now_ms(s) + ms if ms else 0, ttl is None) == OK

    def expire(self, key, ttl):
        """Let a key expire ttl seconds from now, 0: remove it: True if it was there."""
        if ttl is None:
            raise errors.InvalidTTL("expire takes a number of seconds or a timedelta; persist() removes a ttl")
        return self.touch(key, ttl)

    def persist(self, key):
        """Let a key never expire: True if it was there."""
        return self.change_expiry(key, 0, False) == OK

    # -- the whole table

    def __len__(self):
        return count_items(self.ready_to_read())

    def clear(self):
        """Remove everything, for everybody, in one step: O(1) by a new epoch. What a set stores after it stays."""
        cdef seg_t* s = self.ready()
        cdef Mapping held = self.mapping
        if unlikely(ld64(&s.header.log_policy) == LOG_ALWAYS):
            refuse_if_failed(s)
        clear_all(s)
        if unlikely(s.ring_bytes != 0) and ld64(&s.header.log_policy) != LOG_OFF:
            self.clear_logged(s, held, ld32(&s.header.epoch))

    cdef bint clear_held(self) except -1:
        """clear() by a thread that holds several stripes: False: somebody else has done it since they were taken. wait_cleared() waits for the log."""
        cdef seg_t* s = self.s
        cdef uint32_t epoch = s.held_epoch
        if ld64(&s.header.log_policy) == LOG_ALWAYS:
            refuse_if_failed(s)
        if not cas32(&s.header.epoch, epoch, epoch + 1):
            return False
        s.held_epoch = epoch + 1        # nothing is counted with it yet
        #! clear: epoch
        if s.ring_bytes != 0 and ld64(&s.header.log_policy) != LOG_OFF:
            wake_drainer(s)
            self.cleared = epoch + 1
        return True

    cdef int wait_cleared(self) except -1:
        """After clear_held(), the stripes let go of."""
        cdef uint32_t epoch = self.cleared
        self.cleared = 0
        if epoch:
            self.clear_logged(self.ready(), self.mapping, epoch)
        return 0

    cdef int clear_logged(self, seg_t* s, Mapping held, uint32_t epoch) except -1:
        """The drainer logs the epoch; with the policy always it is waited for, in slices: no record of a ring is behind it."""
        cdef uint64_t until = mono_ns() + DURABLE_WAIT_NS
        wake_drainer(s)
        while ld64(&s.header.log_policy) == LOG_ALWAYS and ld64(&s.header.log_epoch) < epoch:
            if mono_ns() > until:
                raise errors.NotDurable("everything was removed for everybody, but that is not known to be on the disk: is the supervisor "
                                        "running, is its disk full?")
            self.enter(s)
            try:
                with nogil:
                    wake_drainer(s)
                    usleep(500)
            finally:
                self.leave()
            PyErr_CheckSignals()
            if self.s == NULL:
                return 0
        return 0

    def scan(self, prefix=b""):
        """The keys, as bytes, that begin with prefix, in no order. One that is there all the while comes exactly once."""
        cdef bytes begins = prefix_bytes(prefix)
        self.ready()
        return self._scan(begins)

    def _scan(self, bytes prefix):
        cdef uint64_t b = 0
        while b < self.ready().n_buckets:
            for key in self.keys_between(b, b + 256):
                if key.startswith(prefix):
                    yield key
            b += 256

    def __iter__(self):
        return self.scan()

    def keys_between(self, uint64_t first, uint64_t end):
        """The keys of a range of buckets; those of one bucket are of one instant."""
        cdef seg_t* s = self.ready()
        cdef Mapping held = self.mapping
        cdef uint32_t room = 65536, used = 0, at
        cdef uint8_t* buffer = <uint8_t*>malloc(room)
        cdef uint8_t* larger
        cdef list keys = []
        cdef uint64_t b = first, until = 0      # 0: this bucket was not waited for yet
        cdef int rc
        if buffer == NULL:
            raise MemoryError
        self.enter(s)
        try:
            while b < min(end, s.n_buckets):
                rc = next_keys(s, b, False, buffer, room, &used, 0)
                if rc == BUSY:
                    until = until or wait_until(s)
                    with nogil:
                        rc = next_keys(s, b, False, buffer, room, &used, until)
                if rc == NO_ROOM:           # 391 keys of 4,096 bytes in one chain
                    larger = <uint8_t*>malloc(2 * <size_t>room)
                    if larger == NULL or room > 1 << 26:
                        free(larger)
                        raise MemoryError
                    free(buffer)
                    buffer = larger
                    room *= 2
                    continue
                if rc == INTR:
                    self.interrupted(s, held)
                    continue
                if rc != OK:
                    fail(rc)
                at = 0
                while at < used:
                    keys.append(PyBytes_FromStringAndSize(<char*>buffer + at + 2, buffer[at] | buffer[at + 1] << 8))
                    at += 2 + (buffer[at] | buffer[at + 1] << 8)
                b += 1
                until = 0
        finally:
            free(buffer)
            self.leave()
        return keys

    # -- about the segment

    @property
    def unlinked(self):
        """Has the segment lost its name? This handle goes on as before, but nobody can attach any more, and what has the name now is
        another segment: close this handle and attach again. One fstat, no lock."""
        cdef seg_t* s = self.ready()
        return not prober_ready(s) or shm_unlinked(s.prober) != 0

    @property
    def closed(self):
        return self.s == NULL

    def counters(self):
        """The counters of all rows, summed; since the segment was created, whoever has died meanwhile."""
        cdef seg_t* s = self.ready()
        cdef uint32_t i, j
        cdef row_t* r
        total = dict.fromkeys(
            ("hits", "misses", "sets", "deletes", "expirations", "evictions", "inline_evictions", "chain_evictions", "retries",
             "lock_waits", "takeovers", "settled", "pages_moved", "stalls", "unlisted", "locks_lost", "max_wait_ns"), 0)
        repairs = [0] * 8
        for i in range(s.n_rows):
            r = &s.rows[i]
            if ld64(&r.gen) == 0:
                continue
            total["hits"] += r.hits; total["misses"] += r.misses; total["sets"] += r.sets; total["deletes"] += r.deletes
            total["expirations"] += r.expired; total["evictions"] += r.evictions
            total["inline_evictions"] += r.inline_evictions; total["chain_evictions"] += r.chain_evictions
            total["retries"] += r.retries; total["lock_waits"] += r.lock_waits; total["takeovers"] += r.takeovers
            total["settled"] += r.settled; total["pages_moved"] += r.pages_moved; total["stalls"] += r.stalls
            total["unlisted"] += r.unlisted; total["locks_lost"] += r.locks_lost
            total["max_wait_ns"] = max(total["max_wait_ns"], r.max_wait_ns)
            for j in range(8):
                repairs[j] += r.repairs[j]
        total["repairs"] = dict(zip(("sets_finished", "writes_undone", "removals_finished", "class_lists", "pool_lists", "chunks", "pages",
                                     "overflow_buckets"), repairs))
        return total

    def count_store(self, uint64_t loads=0, uint64_t found=0, uint64_t writes=0, uint64_t errors=0):
        """Count what this process had to do with the store."""
        cdef row_t* r = self.ready().row
        r.store_loads += loads
        r.store_found += found
        r.store_writes += writes
        r.store_errors += errors

    def store_counters(self):
        """What all processes had to do with the store: keys loaded, found, written (stored or deleted), calls that failed."""
        cdef seg_t* s = self.ready()
        cdef uint32_t i
        cdef uint64_t loads = 0, found = 0, writes = 0, failed = 0
        for i in range(s.n_rows):
            loads += s.rows[i].store_loads
            found += s.rows[i].store_found
            writes += s.rows[i].store_writes
            failed += s.rows[i].store_errors
        return {"loads": loads, "found": found, "writes": writes, "errors": failed}

    def processes(self):
        """The living, by row: [{"pid", "row", "started_ms", "hits", "misses", "sets", "deletes"}]."""
        cdef seg_t* s = self.ready()
        cdef uint32_t i
        cdef row_t* r
        living = []
        for i in range(s.n_rows):
            r = &s.rows[i]
            if self.row_alive(s, i):
                living.append({"pid": r.pid, "row": i, "started_ms": r.started_ms, "hits": r.hits, "misses": r.misses,
                               "sets": r.sets, "deletes": r.deletes, "max_wait_ns": r.max_wait_ns})
        return living

    cdef bint row_alive(self, seg_t* s, uint32_t i):
        return i == s.row_idx or (ld64(&s.rows[i].gen) and prober_ready(s) and row_held(s, i))

    def supervisor(self):
        """{"pid", "alive", "heartbeat_age_s"}: of the supervisor; pid None: none was ever started, or it left in good order."""
        cdef seg_t* s = self.ready()
        cdef uint64_t token = ld64(&s.header.supervisor)
        cdef uint32_t r = row_of(token)
        cdef bint alive
        if token == 0 or r >= s.n_rows:
            return {"pid": None, "alive": False, "heartbeat_age_s": None}
        alive = not dead(s, token) and prober_ready(s) and shm_ofd_lock(s.prober, True, SUPERVISOR_BYTE) == 1
        return {"pid": s.rows[r].pid, "alive": alive,
                "heartbeat_age_s": max(0, <int64_t>(mono_ns() // 1000000 - ld64(&s.header.heartbeat_ms))) / 1000.0}

    def durability(self):
        """{"restoring", "generations_missing", "snapshot_age_s", "snapshot_failed", "snapshot_writing_s", "log", "log_gaps", "log_failed",
        "log_waiting_bytes"}: see Cache.stats()."""
        cdef seg_t* s = self.ready()
        cdef header_t* h = s.header
        cdef uint64_t at = ld64(&h.snapshot_ms), begun = ld64(&h.snapshot_begun_ms), waiting = 0, drained
        cdef uint32_t i
        for i in range(s.n_rows if h.ring_bytes else 0):
            drained = ld64(&ring_of(s, i).drained)      # first: the other moves on meanwhile
            waiting += min(ld64(&ring_of(s, i).head) - drained, s.ring_bytes)
        return {"restoring": ld32(&h.restoring) != 0, "generations_missing": ld32(&h.restoring) == NAMESPACES_FIRST,
                "snapshot_age_s": max(0, <int64_t>(wall_ms() - at)) / 1000.0 if at else None,
                "snapshot_failed": ld64(&h.snapshot_failed_ms) != 0,
                "snapshot_writing_s": max(0, <int64_t>(wall_ms() - begun)) / 1000.0 if begun and self.supervisor()["alive"] else None,
                "log_waiting_bytes": waiting,
                "log": POLICIES[min(ld64(&h.log_policy), <uint64_t>3)] if h.ring_bytes else "off",
                "log_gaps": ld64(&h.log_gaps) - min(ld64(&h.log_healed), ld64(&h.log_gaps)), "log_failed": ld64(&h.log_failed_ms) != 0}

    cdef int kept(self, seg_t* s, uint32_t r, uint64_t addr):
        """The class of a chunk that a slot of row r names and that is in that process's hand; else -1."""
        cdef uint32_t index = 0
        cdef int cls = chunk_class(s, addr, &index)
        return cls if cls >= 0 and ld64(&item_at(s, addr).word) == word_of(KEPT, s.rows[r].gen << 16 | (r + 1)) else -1

    def slab_classes(self):
        """By class: chunk_bytes, pages, live, free, reserved (in the hands of processes) chunks; and {"pages", "big_pages", "free_pages"}.

        live counts every chunk that is neither free nor kept in hand: one pass over the page table, none over the chunks.
        """
        cdef seg_t* s = self.ready()
        cdef uint64_t p, in_hand, n_big = 0, n_pool = 0
        cdef uint32_t cls, i, j
        cdef int kind, got
        classes = [{"chunk_bytes": s.chunk_bytes[cls], "pages": 0, "live": 0, "free": 0, "reserved": 0}
                   for cls in range(s.n_classes)]
        for p in range(s.n_pages):
            kind = <int>(ld64(&s.pages[p].word) >> 56)
            got = page_cls(s, p)
            if kind == 0:
                n_pool += 1
            elif kind == 4:
                n_big += 1
            elif (kind == 2 or kind == 3) and got >= 0:
                classes[got]["pages"] += 1
                classes[got]["free"] += s.pages[p].n_free
                classes[got]["live"] += s.page_chunks[got] - s.pages[p].n_free
        for i in range(s.n_rows):
            if not self.row_alive(s, i):
                continue                    # what the dead had in hand is for the CLOCK hand to settle
            for cls in range(min(BATCH_CLASSES, s.n_classes)):
                for j in range(BATCH_SLOTS):
                    if self.kept(s, i, s.rows[i].batch[cls][j]) == <int>cls:
                        classes[cls]["reserved"] += 1
                        classes[cls]["live"] -= 1
            for j in range(PARKED_SLOTS):
                got = self.kept(s, i, s.rows[i].parked[j])
                if got >= 0:
                    classes[got]["reserved"] += 1
                    classes[got]["live"] -= 1
        return classes, {"pages": s.n_pages, "big_pages": n_big, "free_pages": n_pool, "page_bytes": s.page_bytes}

    @property
    def row(self):
        """Index of this process's row in segment.rows."""
        return self.ready().row_idx

    @property
    def lock_limit(self):
        """Seconds that a write of this process waits for a lock that a living process holds; then StripeBusy."""
        return self.ready().limit_ns / 1e9

    @lock_limit.setter
    def lock_limit(self, double seconds):
        if not 0 < seconds < 1e6:
            raise errors.InvalidConfig(f"lock_limit is a number of seconds above 0, not {seconds}")
        self.ready().limit_ns = <uint64_t>(seconds * 1e9)

    def close(self):
        """Close this handle. The last one of a process gives its row and what it has in hand back, and unmaps the segment.

        Waits for calls that other threads have in flight. Closing twice is no error. Warns: LockLost, if locks go with it.
        Raises: ViewsInUse if numpy views of the segment are out and this is the last handle; it stays open then.
        """
        if self.s == NULL:
            return
        if self.mapping.handles == 1 and self.mapping.exports:
            raise errors.ViewsInUse(f"{self.mapping.exports} numpy view(s) of {self.name!r} are still in use: delete them, then close")
        if self.life != self.s.me[0]:
            self.in_flight = 0
        self.s = NULL
        if self.in_flight:
            import threading
            self.idle = threading.Event()
            self.idle.wait()
        lost = self.mapping.locks_held() if self.mapping.handles == 1 else ()
        self.mapping.handles -= 1
        self.mapping = None
        if lost:
            import warnings
            names = ", ".join(lost[:NAMED_LOCKS]) + (f" and {len(lost) - NAMED_LOCKS} more" if len(lost) > NAMED_LOCKS else "")
            warnings.warn(f"the last handle of {self.name!r} was closed while this process held {names}: the lock is free now, and others may be "
                          "in; leave its block before close()", errors.LockLost, stacklevel=2)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


cdef class Encoded:
    """A value that a codec has turned into bytes. stale_ms: of an envelope, stored for so much longer than its ttl."""

    def __init__(self, int codec, bytes payload not None, uint32_t stale_ms=0):
        self.codec = codec
        self.payload = payload
        self.stale_ms = stale_ms


POLICIES = ("off", "no", "everysec", "always")     # of the log: header.log_policy
cdef dict modules = sys.modules
cdef object owner_number = None     # owner.number, when it is needed
cdef object MISS = object()
cdef object INFINITY = float("inf")
