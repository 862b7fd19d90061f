# The bytes of a segment. Every struct is defined here and nowhere else: the compiled core reads them as C structs, the
# numpy dtypes of segment.py are made from their sizes and offsets, `python -m shmcache.segment` prints them, and
# tests/unit/test_layout.py pins every one of them.
#
# All integers are little-endian and aligned. A place in the segment is never a pointer:
#   address   48 bits, in granules of 16 bytes from the segment's first byte; 0 = none
#   index     of a row, page, bucket ...; where 0 must mean "none" the index is stored plus one (said in the comment)
#
# Words: see token.pxd. "Writer:" says who stores to a field, and under which lock.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    LAYOUT_VERSION = 11     # bump = attach refuses older segments, every host starts cold
    SLOTS = 7               # of a bucket
    OV_SLOTS = 6            # of an overflow bucket; its last word says whose it is
    GRANULE = 16            # bytes; unit of an address
    GRANULE_SHIFT = 4
    REFS_SHIFT = 7          # one CLOCK count for 128 bytes of slab memory, which is also the smallest chunk
    MIN_CHUNK = 128
    MAX_CLASSES = 64
    BATCH_CLASSES = 16      # the small slab classes, of which a process keeps chunks in hand
    BATCH_SLOTS = 4         # 4 chunks of at most 1 KiB: a batch is at most 4 KiB
    PARKED_SLOTS = 16
    HAZARDS = 8
    ASKED = 16              # answers that a process remembers for a moment (token.pxd, dead)
    MAX_ROWS = 1024         # F_OFD_GETLK gets slow beyond (3 us at 512, 26 us at 4,096)
    MAX_KEY = 4096
    CONFIG_BYTES = 1024
    MAX_REFS = 3
    DATABASES = 16          # of the sidecar, whose items are counted: the first, and 1 to 15 (databases.pxd)
    VERSIONS_SHIFT = 20     # a new segment's row versions begin at the wall clock's milliseconds, times 2^20: no stripe has so many writes in one
    ITEM_HEADER = 48
    # kinds of repair
    REPAIRED_FINISHED = 0   # a set whose slot was stored
    REPAIRED_UNDONE = 1     # a write whose slot was not
    REPAIRED_REMOVED = 2    # a delete or an eviction whose slot was cleared
    REPAIRED_CLASS = 3      # lists of a slab class
    REPAIRED_POOL = 4       # list of the page pool, or of the overflow buckets
    REPAIRED_CHUNK = 5      # a chunk freed
    REPAIRED_PAGE = 6       # a page given back, to its class or to the pool
    REPAIRED_OVERFLOW = 7   # an overflow bucket
    CLS_POOL = 0xffff       # page_t.cls of a page in the pool
    CLS_BIG = 0xfffe        # page_t.cls of a page of a big value
    # what stands behind the cache, and how writes get there (policy.py)
    POLICY_NONE = 0
    POLICY_THROUGH = 1
    POLICY_AROUND = 2
    POLICY_BACK = 3
    NAMESPACES_FIRST = 2    # header.restoring: the generations of namespaces and tags are not in yet, nor what the store has not got
    # log policies
    LOG_OFF = 0
    LOG_NO = 1              # written, synced when the kernel likes
    LOG_EVERYSEC = 2
    LOG_ALWAYS = 3          # a write returns when its record is durable

# ---- locks ----------------------------------------------------------------------------------------------------------
# One kind of lock for everything (lock.pxd). The order: big, stripes ascending, one class, one pool.

ctypedef struct lock_t:
    uint64_t word           # 0, or the owner's token | WAIT (bit 63); taken by compare-and-swap, released by exchange
    uint64_t stalled        # token of an owner that held it past somebody's limit, so that others fail fast; a hint
    uint32_t bell           # futex for those who sleep: counted up to wake one; its value carries no meaning
    uint32_t pad

ctypedef struct stripe_t:   # 128 bytes; bucket b belongs to stripe b & (n_stripes - 1). Writer: the holder
    lock_t lock
    uint64_t seq            # version of the newest write here = CAS version of that item; stored last
    uint64_t old            # intent: op << 56 | address of the chunk that is to go (intent.pxd: OP_*)
    uint64_t new            # intent: address of the chunk that is to come
    uint64_t count          # epoch << 32 | items of that epoch in this stripe's buckets
    uint64_t count_next     # intent: what count is once the write is through
    # a line of its own: databases.pxd
    uint64_t turn           # odd: what follows, and the databases_t, is being changed, or a writer died as it changed it
    uint64_t others         # epoch << 32 | items of that epoch whose keys are not of the first database
    uint64_t expiring       # epoch << 32 | items of that epoch and of the first database that expire; no claims
    uint64_t pad[5]

ctypedef struct databases_t:    # 192 bytes, one per stripe. Writer: the holder of the stripe. Of [0] nothing is used
    uint32_t tag[16]        # DATABASES: of a generation; 0: of none
    uint32_t n[16]          # items that carry it
    uint32_t expiring[16]   # of these: those that expire; no claims

ctypedef struct class_t:    # 128 bytes, one per slab class. Writer: the holder of its lock, but for the hand
    lock_t lock
    uint32_t chunk_bytes    # written at creation only
    uint32_t page_in_hand   # index + 1 of the page whose list is being changed: repair rebuilds it from the words
    uint32_t ring           # index + 1 of some page of this class; pages form a ring by next / prev
    uint32_t avail          # index + 1 of the first page with a free chunk
    uint64_t hand           # CLOCK hand: page index << 32 | chunk index. Writer: anyone, by compare-and-swap, no lock
    uint32_t n_pages        # in the ring
    uint32_t n_free         # on the lists of its pages
    uint64_t pad[9]

ctypedef struct pool_t:     # 128 bytes: the page pool, the pool of overflow buckets, and the lock of big values
    lock_t lock
    uint64_t list           # index + 1 of the first free one
    uint64_t n_free
    uint64_t cursor         # where the next look for leavings of the dead starts; any process, no lock, a hint
    uint64_t pad[10]

# ---- header ---------------------------------------------------------------------------------------------------------

ctypedef struct header_t:   # 4,096 bytes. Written at creation only, where nothing else is said
    uint64_t magic
    uint32_t layout_version
    uint32_t abi            # 64 (bits) | 1 << 8 (little-endian)
    uint64_t size_bytes     # of the whole segment
    uint64_t created_ms     # wall clock, for people
    uint8_t boot_id[16]     # of the kernel: monotonic times mean nothing after a reboot
    uint64_t hash_key[2]    # SipHash key, random per segment
    # geometry
    uint32_t n_rows
    uint32_t n_stripes      # power of two
    uint32_t n_classes
    uint32_t page_shift     # page_bytes = 1 << page_shift: 64 KiB, or 1 MiB from 4 GiB up
    uint64_t n_pages
    uint64_t n_buckets      # below 2^32
    uint64_t n_overflow     # below 2^31
    uint64_t refs_bytes
    uint64_t sketch_bytes
    uint64_t rings_bytes
    uint64_t rows_off
    uint64_t stripes_off
    uint64_t classes_off
    uint64_t pages_off
    uint64_t refs_off
    uint64_t sketch_off
    uint64_t buckets_off
    uint64_t overflow_off
    uint64_t rings_off
    uint64_t slab_off       # a multiple of page_bytes
    # configuration
    uint64_t max_value_bytes
    uint64_t default_ttl_ms # 0 = items never expire
    uint32_t lock_limit_ms  # how long a writer waits for one lock that a living process holds
    uint32_t config_bytes   # length of the msgpack map in config
    uint32_t policy         # POLICY_*
    uint32_t pad8
    uint64_t pad0
    # read by every operation, written seldom: a line of their own
    uint32_t epoch          # clear() counts it up, by compare-and-swap, no lock
    uint32_t restoring      # items of a snapshot are being put in (bucket.pxd, departed); 2: the generations of namespaces and tags are not in yet, nor what the store
                            # has not got (write-back), and the restore may still be refused: nobody attaches (segment.attach).
                            # Writer: creation, and the one process that holds RESTORER_BYTE
    int64_t clock_shift_ms  # added to CLOCK_MONOTONIC: the segment's clock. 0; tests move it
    uint64_t restored_seq   # no restored item has a higher version, nor has anything that an earlier life gave out; every later write has. Writer: creation, and who
                            # restores, as long as nobody else is attached
    uint32_t restored_epoch # epoch at the creation: another one, and somebody has cleared since
    uint32_t pad7
    uint64_t pad2[4]
    uint64_t tick           # pages that CLOCK hands have left: the time by which pages age. Any process, no lock
    uint64_t supervisor     # token of the process that holds the supervisor's byte (token.pxd). Writer: it
    uint64_t heartbeat_ms   # when it last looked round, on CLOCK_MONOTONIC. Writer: it
    uint32_t asleep         # 1: it sleeps on the doorbell. Writer: it; back to 0 by whoever rings, by compare-and-swap
    uint32_t doorbell       # of the supervisor: a futex like lock_t.bell
    uint64_t snapshots_asked    # counted up by who wants one. Any process, no lock
    uint64_t snapshots_ended    # snapshots_asked when the last one began that is over, written or not. Writer: the supervisor, last
    uint64_t snapshot_ms        # wall clock, when the newest one began. Writer: who writes it
    uint64_t snapshot_failed_ms # wall clock, when the last one failed; 0: it did not. Writer: who writes it
    pool_t pages
    pool_t overflow
    pool_t big              # guards the taking of more than one page
    uint8_t config[1024]    # CONFIG_BYTES
    uint64_t pad4[8]
    # the append log: ring.pxd
    uint64_t ring_bytes     # of each row's ring, a power of two; 0: no log. Written at creation only
    uint64_t log_policy     # LOG_*. Writer: the supervisor, at its start
    uint64_t log_gaps       # operations that the log does not have. Anyone, no lock
    uint64_t log_healed     # log_gaps when the newest snapshot began: what came before is in it. Writer: the supervisor
    uint64_t log_failed_ms  # wall clock, since when the log cannot be written; 0: it can. Writer: the supervisor
    uint64_t log_asleep     # 1: the drainer sleeps on log_bell. Writer: it; back to 0 by whoever rings, by compare-and-swap
    uint64_t log_epoch      # the newest epoch that is durable in the log. Writer: the supervisor
    uint32_t log_bell       # a futex
    uint32_t pad5
    uint64_t snapshot_begun_ms  # wall clock, when the one began that is being written; 0: none is, unless its writer died. Writer: who writes it
    uint64_t unnoted        # what the newest files were of the directory from which this was restored, as long as that is not noted there; 0: it is, or was not
                            # restored (datadir.py). Writer: who restores, and the supervisor
    # write-back: dirty.pxd. Of the first four three are written at creation only
    uint64_t dirty_off      # a bit for each 128 bytes of slab memory
    uint64_t dirty_bytes
    uint64_t dirty_limit    # bytes of items; who would write beyond waits. Writer: creation, and the supervisor, which adds what is set aside (supervisor/refused.py)
    uint64_t version_base   # added to an item's version: its row's version. A restored segment has that of the one before it
    uint64_t databases_off
    uint64_t dirty          # bytes of dirty items. Anyone, no lock; counted anew by the supervisor, for a death loses count
    uint64_t flushes_asked  # counted up by who wants everything stored. Any process, no lock
    uint64_t flushes_ended  # flushes_asked when the last pass over everything began that left nothing. Writer: the supervisor
    uint64_t flushed_ms     # wall clock, when a batch was stored last. Writer: the supervisor
    uint64_t flush_failed_ms    # wall clock, since when the store fails; 0: it does not. Writer: the supervisor
    uint64_t flush_refused  # dirty items that the store refused at the last pass. Writer: the supervisor
    uint64_t oldest_dirty_ms    # wall clock, when what was the oldest dirty item at the last pass was found dirty; 0: none. Writer: the supervisor
    uint64_t restored_from  # what the newest files were of the directory from which this was restored; 0: it was not. Writer: who restores
    uint64_t pad9[2]
    # the log's file, which is to be there when the log goes on: appendlog.py
    uint64_t log_number     # of the newest that was begun; 0: none was, and nobody has emptied the rings. Writer: the supervisor
    uint64_t log_bytes      # that it has at least: all that has left the rings is in them, or in earlier files. Writer: the supervisor
    uint64_t pad10[6]
    uint32_t newest[16]     # DATABASES: the tag of each one's newest generation; 0: none, or items may have carried it before. Writer: the holder of the stripe of the generation's key
    uint64_t pad11[240]

# ---- process rows ---------------------------------------------------------------------------------------------------

ctypedef struct row_t:      # 1,024 bytes. Writer: the process that holds the row's byte (token.pxd), but for batch recall
    uint64_t gen            # 40 bits; counted up at every taking, never reset: token = gen << 16 | row + 1
    uint64_t pid            # for people; 0 = left in good order
    uint64_t started_ms     # wall clock, of the attach; for people
    uint64_t gen_check      # ~gen, so that damage is seen
    uint64_t home           # inode of the process's pid namespace << 32 | its pid there; 0: not known
    uint64_t home_check     # ~home
    uint64_t pad0[2]
    # counters: never reset, so that the sum over the rows stays true
    uint64_t hits
    uint64_t misses
    uint64_t sets           # values stored, by whatever operation
    uint64_t deletes        # items removed by delete, pop and ttl=0
    uint64_t expired        # items removed because their time was over
    uint64_t evictions      # items removed to make room
    uint64_t inline_evictions   # of these by a writer that needed the room at once
    uint64_t chain_evictions    # of these because no overflow bucket was left
    uint64_t retries        # reads begun again because a write came between
    uint64_t lock_waits     # locks for which this process went to sleep
    uint64_t takeovers      # locks taken from the dead
    uint64_t settled        # chunks, pages and overflow buckets of the dead put in order
    uint64_t pages_moved    # pages drained for another class or a big value
    uint64_t stalls         # locks given up on after the limit
    uint64_t max_wait_ns    # the longest wait for a lock
    uint64_t unlisted       # chunks freed while no list was to be had: FREE, listed again when a hand passes
    uint64_t repairs[8]     # what this process put in order after a death, by kind: REPAIRED_*
    uint64_t hazard[8]      # HAZARDS: addresses that this process reads in place (pinned values)
    uint64_t parked[16]     # PARKED_SLOTS: chunks of any class whose class lock was busy when they were freed
    uint64_t batch[16][4]   # BATCH_CLASSES, BATCH_SLOTS: addresses of RESERVED(this process) chunks; 0 = empty.
                            # Put by compare-and-swap, taken by exchange, recalled by others by compare-and-swap
    uint64_t store_loads    # keys asked of the store; of it those that were there
    uint64_t store_found
    uint64_t store_writes   # keys stored and deleted there
    uint64_t store_errors   # calls that failed
    uint64_t locks_lost     # blocks under a lock that ended when the lock was not theirs any more
    uint64_t pad1[3]

# ---- rings of the log ---------------------------------------------------------------------------------------------------

ctypedef struct ring_t:     # 192 bytes, one per row, then ring_bytes of records (record.pxd), each at a multiple of 8
    uint64_t head           # bytes ever appended. Writer: the row's process
    uint64_t pad0[7]
    uint64_t drained        # bytes ever taken over: their room is free. Writer: the supervisor
    uint64_t durable        # bytes that are on the disk. Writer: the supervisor
    uint32_t bell           # futex for who waits for either; rung by the supervisor
    uint32_t pad1
    uint64_t pad2[13]

# ---- slab pages -----------------------------------------------------------------------------------------------------

ctypedef struct page_t:     # 64 bytes, one per slab page. Writer: the holder of its class lock, or of the page pool
    uint64_t word           # kind << 56 | token (token.pxd: PAGE_*)
    uint64_t head           # BIG: address of the head chunk whose list names this page
    uint64_t stamp          # tick when a hand last left this page, or it was cut. Writer: hands, no lock; a hint
    uint32_t next           # index + 1: ring of the class's pages; in the pool, the list
    uint32_t prev           # index + 1
    uint32_t next_avail     # index + 1: pages of the class with a free chunk
    uint32_t prev_avail     # index + 1
    uint32_t free           # chunk index + 1: first of the page's free list
    uint32_t n_free         # on that list
    uint32_t cls            # slab class, or CLS_POOL, CLS_BIG; in the upper half its complement, so that damage is seen
    uint8_t listed          # is on the avail list
    uint8_t pad0[3]
    uint32_t pad1[2]

# ---- table ----------------------------------------------------------------------------------------------------------

ctypedef struct bucket_t:   # 64 bytes = one cache line. Writer: the holder of the stripe
    uint32_t version        # counts for the whole chain; rule F
    uint32_t overflow       # index + 1 of the next bucket of the chain
    uint64_t slot[7]        # SLOTS: tag (top 16 bits of the hash) << 48 | address; 0 = empty. One store publishes

ctypedef struct overflow_t: # 64 bytes. Writer: the holder of the stripe of `head`, or of the overflow pool
    uint32_t head           # bucket index whose chain this is, or was to be, part of
    uint32_t next           # index + 1 of the next bucket of the chain; in the pool, the list
    uint64_t slot[6]        # OV_SLOTS
    uint64_t word           # kind << 56 | token (token.pxd: OV_*)

ctypedef struct item_t:     # 48 bytes, then the key, zero to seven bytes of padding, then the value; all in one chunk
    uint64_t hash           # SipHash-1-3 of the key
    uint64_t word           # kind << 56 | token (token.pxd: FREE, RESERVED, LIVE, RETIRED)
    uint64_t cas            # version of the write that stored it; 0 while it is being filled
    uint64_t expiry_ms      # on the segment's clock; 0 = never
    uint32_t value_bytes
    uint32_t epoch          # of the header when it was stored; another one = cleared
    uint16_t key_bytes
    uint8_t codec           # codec.py
    uint8_t flags           # FLAG_*
    uint32_t link           # FREE: chunk index + 1 of the next on the page's list

cdef enum:
    FLAG_BIG = 1            # instead of the value: u32 page indexes, then the rest of the value
    FLAG_CLAIM = 2          # no value: somebody computes it, or holds this lock. Value: claim_t
    FLAG_LOCK = 4           # a claim that clear() leaves alone
    FLAG_WRITING = 16       # a claim and lock: somebody changes this key in the store. It stands till its time is over. Value: mark_t
    FLAG_DIRTY = 32         # write-back: the store has not got it yet. Neither evicted, nor expired, nor cleared (dirty.pxd)
    FLAG_COPY_TTL = 64      # write-back: it expires by the segment's default, which is that of the copy, not of what is stored
    FLAG_RAW = 8            # for the sidecar: in Redis the value would be of the encoding raw, even if it spells a number. Not in snapshots

# ---- a process's own view, outside the segment ------------------------------------------------------------------------

ctypedef struct seg_t:
    # what a hit reads
    uint8_t* base           # of the mapping
    uint64_t* me            # this process's token, in a page that reads 0 in every fork child; 0 = take a row first
    bucket_t* buckets
    uint64_t n_buckets
    uint64_t k0
    uint64_t k1
    header_t* header
    row_t* row
    uint8_t* refs
    uint8_t* rings
    uint64_t ring_bytes
    uint64_t ring_stuck     # what was drained when a call of this process waited for room in vain
    uint64_t ring_reserved  # secured by calls of this process that are not over. Any thread
    uint32_t ring_lock      # of this process's threads
    uint64_t* departed      # the sketch section: a bit for each hash that left while the segment is restored
    uint64_t departed_mask  # number of these bits, less one
    uint64_t slab_lo        # first and last + 1 address of slab memory, in granules
    uint64_t slab_hi
    uint64_t page_bytes
    # the rest. Geometry is copied here at attach, after it was checked, and never read from the segment again
    uint64_t size_bytes
    uint64_t slab_off
    stripe_t* stripes
    databases_t* databases
    class_t* classes
    page_t* pages
    overflow_t* overflow
    row_t* rows
    uint64_t n_pages
    uint64_t n_overflow
    uint32_t n_stripes
    uint32_t n_classes
    uint32_t n_rows
    uint32_t page_shift
    uint32_t row_idx
    uint32_t chunk_bytes[64]
    uint32_t page_chunks[64]    # chunks that a page of the class holds
    uint64_t max_value_bytes
    uint64_t default_ttl_ms
    uint32_t policy
    uint64_t* dirty         # the bits
    uint64_t holder         # the thread of this process that holds several stripes at once; 0: none. One at a time
    uint64_t held_room      # of ring_reserved: what is kept for the records of what the holder does. Writer: the holder
    uint64_t held[1024]     # which: a bit for each stripe
    uint32_t held_epoch     # header.epoch when it had them all: the one that counts for what it does to their keys
    bint supervising        # this process is the supervisor: what it evicts, it evicts ahead of demand
    uint64_t limit_ns       # how long to wait for a lock that a living process holds
    uint64_t patience_ns    # the same, as the segment has it: who waited so long speaks for all
    void* struck            # the lock for which a call of this process waited when a signal struck it: any thread, no lock, and
    uint64_t struck_until_ns    # it is the same call's wait that goes on to this time. The worst is that `stalled` is noted by a later one
    uint64_t struck_since_ns    # when that began
    void* lock_page         # mapped from the description that holds the row's byte
    uint64_t home           # as in this process's row
    uint64_t asked[16]      # ASKED: tokens that were found alive by their pid, and when. Any thread, no lock; the worst is an answer of another time
    uint64_t asked_ns[16]
    int prober              # a descriptor that holds no lock, to ask who is alive
    uint64_t dev
    uint64_t ino
    char path[280]          # to open the prober again after somebody closed it
