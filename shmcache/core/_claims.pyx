# cython: binding=False, embedsignature=True, boundscheck=False, wraparound=False, cdivision=True
"""What a caller holds for a while: claims, a lock, marks. Taken and noted in one step, given back in one.

The handler of a signal runs between two bytecodes, and may raise there (KeyboardInterrupt, a worker's time-out). So nothing that is held may
depend on a bytecode: the object is there before the claim, the call that claims notes it in the object, and `with` enters and leaves by
compiled methods, between which and the block CPython runs no handler. Giving back runs no handler either; it waits for a stripe for the lock
limit in all, however many signals come.

    raised before the claim             nothing is held
    raised when the claim stands        it is noted: __exit__ gives it back, or (by hand) give_back(), or whoever drops the last reference
    raised in give_back()               impossible: what comes is raised when it has returned
    give_back() finds the stripe busy   it is noted still: StripeBusy (Claims: nothing is said), once more when the object goes, then by its time
                                        or the process's end
    the object is dropped               a claim is given back at once: nobody can fill it any more. That does not wait, for it may be in a
                                        collection of garbage: a busy stripe leaves it to its time. A lock stands until its ttl is over or its
                                        process ends: `if cache.lock(name, ttl=60).acquire(blocking=False)` keeps the others out for 60 s
    fork                                the child's objects hold nothing: the token is the parent's
    the handle is closed                another of the process keeps the row, and gives back by the mapping; the last one gives back the row,
                                        and with it every claim
"""
cimport cython
from libc.stdint cimport int64_t, uint8_t, uint64_t

from shmcache.core._core cimport Mapping, Table, fail, waits_for
from shmcache.core.atomics cimport add64
from shmcache.core.layout cimport seg_t
from shmcache.core.lock cimport wait_until
from shmcache.core.siphash cimport siphash13
from shmcache.core.table cimport claim_t, end_mark, hold_mark, remove_claim
from shmcache.core.token cimport BUSY, INTR, OK, getpid, mono_ns

from shmcache import errors
from shmcache.core._core import key_bytes, monotonic

cdef extern from "Python.h":
    int PyErr_WarnEx(object category, const char* message, Py_ssize_t stack_level) except -1
    object PyWeakref_NewRef(object o, object callback)
    void PyErr_SetObject(object kind, object value)
    void PyErr_WriteUnraisable(object where)

cdef enum:
    GONE = -100         # of put_back(): it is another's, or of another life of this process
    TASKS = 0           # of Turn.leave(): the steps are the task's, and to be closed
    RUNS = 1            # the call goes on; its thread goes through the rest of the steps
    OVER = 2            # it has ended: who leaves goes through the rest
    LEFT = 3            # it was left before


cdef dict marked = {}           # key: the marks of this process that stand there, each a Held


def marked_here(Table table not None, bytes key not None):
    """For whom does a caller wait that waits for the marks on this key? -2: itself, which calls the store; -6: a task or greenlet of its
    thread; -7: who is beneath it; -1: none of them. As Table.claim() says it."""
    cdef Held mark
    cdef int rc
    for mark in marked.get(key, ()):
        if table.s != NULL and mark.mapping() is table.mapping and mark.whose.token == table.s.me[0]:
            rc = waits_for(&mark.whose)
            if rc != -1:
                return rc
    return -1


cdef int marked_by_nobody(uint64_t owner) except -1:
    """That task has left: the marks that it has put end without it."""
    cdef Held mark
    for several in marked.values():
        for mark in several:
            if mark.whose.owner == owner:
                mark.whose.owner = mark.whose.thread = 0
    return 0


@cython.no_gc_clear             # what __dealloc__ gives back it needs whole
cdef class Held:
    """At most one claim, or mark, of this process."""
    cdef Table table
    cdef object mapping             # weak: the table's when it was taken
    cdef bytes key
    cdef claim_t whose
    cdef bint is_mark
    cdef bint stays                 # taken for a lock, and nobody has tried to give it back
    cdef bint known                 # of a mark: what the store has done
    cdef readonly uint64_t version  # 0: none

    def __cinit__(self, Table table not None, *args):
        self.table = table

    def __dealloc__(self):
        if self.version and not self.is_mark and not self.stays:
            self.put_back(False)

    cdef int64_t claim(self, double seconds, bint lock) except -100:
        """What Table.claim() returns of self.key; noted if it is above 0."""
        cdef uint64_t version = 0
        self.mapping = None if self.table.mapping is None else PyWeakref_NewRef(self.table.mapping, None)
        try:
            return self.table.claim_into(self.key, seconds, lock, &version, &self.whose)
        finally:
            if version:
                self.version = version
                self.stays = lock

    cdef tuple mark(self, double seconds, bint alone, uint64_t version):
        """What Table.mark() returns; noted if it stands."""
        self.mapping = None if self.table.mapping is None else PyWeakref_NewRef(self.table.mapping, None)
        self.is_mark = True
        self.whose.token = 0
        try:
            return self.table.mark_into(self.key, seconds, alone, version, &self.whose)
        finally:
            self.version = self.whose.token

    cdef int put_back(self, bint waits=True) noexcept:
        """OK; BUSY: it is noted still; else it did not stand any more, or there was none. waits: for the lock limit, without the GIL."""
        cdef bytes key = self.key       # another thread may give this object another one while the GIL is free
        cdef const uint8_t* k
        cdef size_t n
        cdef uint64_t version = self.version, until, h
        cdef Mapping held
        cdef seg_t* s
        cdef int rc
        if version == 0:
            return GONE
        self.stays = False
        held = self.mapping()
        if held is None or held.s.me[0] != self.whose.token:
            self.version = 0
            return GONE
        s = &held.s
        k = key
        n = len(key)
        h = siphash13(k, n, s.k0, s.k1)
        rc = end_mark(s, k, n, h, self.known, 0) if self.is_mark else remove_claim(s, k, n, h, version, 0)
        if rc == BUSY and waits:
            until = wait_until(s)
            with nogil:
                while True:
                    rc = end_mark(s, k, n, h, self.known, until) if self.is_mark else remove_claim(s, k, n, h, version, until)
                    if rc != INTR:
                        break
        if rc != BUSY:
            self.version = 0
            held.forget_lock(key, version)
        return rc


@cython.no_gc_clear
cdef class Claim(Held):
    """A claim on whatever key take() was last called for."""

    def take(self, key, double seconds):
        """Table.claim(), noted. What was held before is given back first."""
        if self.version:
            self.give_back()
        self.key = key_bytes(key)
        return self.claim(seconds, False)

    def drop(self):
        """It was filled: there is nothing to be given back."""
        self.version = 0

    def give_back(self):
        """True if it still stood. Raises: StripeBusy."""
        cdef int rc = self.put_back()
        if rc == BUSY:
            fail(rc)
        return rc == OK

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.put_back() == BUSY and kind is None:
            fail(BUSY)


cdef class Claims:
    """Claims on several keys."""
    cdef Table table
    cdef dict held                  # key: Held

    def __cinit__(self, Table table not None):
        self.table = table
        self.held = {}

    def take(self, bytes key not None, double seconds):
        """Table.claim(), noted."""
        cdef Held claim = Held(self.table)
        claim.key = key
        self.held[key] = claim
        return claim.claim(seconds, False)

    def version(self, bytes key not None):
        """Of the claim that is held on this key; 0: none."""
        cdef Held claim = self.held.get(key)
        return 0 if claim is None else claim.version

    def drop(self, bytes key not None):
        """It was filled: there is nothing to be given back."""
        cdef Held claim = self.held.pop(key)
        claim.version = 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Not StripeBusy: what they were for is done without them. One that is not given back is noted, and ends at its time."""
        cdef Held claim
        for claim in self.held.values():
            claim.put_back()


cdef class Marks:
    """Marks on keys that their holder changes in the store (shmcache/through.py). Each that is not filled ends, and what is cached there is
    dropped: if the mark was not there any more, it may have been loaded before. known: what the store has done is known, or will be."""
    cdef Table table
    cdef dict held                  # key: Held
    cdef public bint known
    cdef uint64_t began             # ns: when the first was begun to be put; 0: none was

    def __cinit__(self, Table table not None):
        self.table = table
        self.held = {}
        self.known = True

    def put(self, bytes key not None, double seconds, bint alone=False, uint64_t version=0):
        """Table.mark(), noted."""
        cdef Held mark = Held(self.table)
        cdef uint64_t began = mono_ns()     # its time counts from here: it may have to wait for the stripe
        mark.key = key
        self.held[key] = mark
        try:
            told = mark.mark(seconds, alone, version)
        finally:
            if mark.version:
                marked.setdefault(key, []).append(mark)
                self.began = self.began or began
            else:
                del self.held[key]
        return told

    def drop(self, bytes key not None):
        """It was filled."""
        self.unnote(self.held.pop(key))

    cdef int unnote(self, Held mark) except -1:
        several = marked.get(mark.key)
        if several is not None and mark in several:
            several.remove(mark)
            if not several:
                del marked[mark.key]
        return 0

    @property
    def age(self):
        """Seconds that the first of them has been there; 0: there is none."""
        return (mono_ns() - self.began) / 1e9 if self.began else 0.0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Raises: what discard() did of one of them, when all have been tried; what a signal's handler did before all else."""
        cdef Held mark
        cdef object failed = None, said = None
        cdef uint64_t until
        for mark in self.held.values():
            self.unnote(mark)
            mark.known = self.known
            if mark.put_back() == BUSY:
                failed = failed or errors.StripeBusy("a living process holds a lock that this call needs and does not run: the mark of this "
                                                     "write stands until its time is over")
            until = mono_ns() + <uint64_t>1000000000
            while True:
                try:
                    self.table.discard(mark.key)
                except errors.ShmcacheError as e:
                    failed = e
                except BaseException as e:      # a handler's, from within a wait: not before the copy is gone
                    said = e
                    if mono_ns() < until:
                        continue
                break
        if said is not None:
            raise said
        if failed is not None and kind is None:
            raise failed


cdef class Closing:
    """Closes a generator, which gives back what it holds, at the end of a `with` block."""
    cdef object generator

    def __cinit__(self, generator):
        self.generator = generator

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.generator.close()


def wake(future):
    """Let the task go on that awaits it. In one step: an event loop drops what a handler raises in its callbacks, and the task would wait on.
    What one raises within asyncio's call_soon(), which set_result() calls, is asyncio's own to lose, as with each of its futures."""
    if not future.done():
        future.set_result(None)


cdef class Turn:
    """Of a call that a thread makes, for steps that a task goes through: who goes on with them. Each method is one step, between whose parts
    neither a thread nor a handler comes.

    ended: the future that the task awaits.
    """
    cdef public object ended
    cdef bint begun
    cdef readonly bint over
    cdef bint taken
    cdef bint left                  # the task has, or the thread has taken its place
    cdef readonly bint called_off
    cdef readonly bint hangs

    def begin(self):
        """False: the call is not to be made any more."""
        if self.left or self.called_off:
            return False
        self.begun = True
        return True

    def end(self):
        """It was made. True: the task has left, and the thread goes through the rest."""
        self.over = True
        return self.left

    def call_off(self):
        """It is too late to begin: one that has not begun is never made, and its task is told. Called by its loop."""
        if not self.begun and not self.left:
            self.called_off = True
            wake(self.ended)

    def give_up(self):
        """It has had its time: its task is told, and leaves it. Called by its loop."""
        if not self.over and not self.called_off:
            self.hangs = True
            wake(self.ended)

    def taken_back(self):
        """The task has been told how it ended, and goes on."""
        self.taken = True

    def take_over(self):
        """It was made, and the task cannot be told. True: the thread goes through the rest; False: the task has left, and does."""
        if self.left:
            return False
        self.left = True
        return True

    cdef int leave(self):
        """The task does not go on: TASKS, RUNS, OVER or LEFT."""
        if self.left:
            return LEFT
        self.left = True
        return RUNS if self.begun and not self.over else OVER if self.over and not self.taken else TASKS


cdef class Driving:
    """The steps that a task goes through: they are closed at the end of a `with` block. But a call that goes on then leaves them to its
    thread, and the keys that it writes are held until it has ended: other writes of them come after it. A key whose stripe is busy for the
    lock limit is not held; its mark stands all the same.

    job: the call that was begun last: a Turn with `keys`, `caller` (caller_number() of the task) and go_through().
    """
    cdef Table table
    cdef object generator
    cdef public object job

    def __cinit__(self, Table table not None, generator):
        self.table = table
        self.generator = generator

    cdef void hold(self) except *:
        cdef Mapping held = self.table.mapping
        cdef bytes key
        cdef seg_t* s
        cdef const uint8_t* k
        cdef size_t n
        cdef uint64_t until
        if held is None or held.s.me[0] == 0:   # closed; a fork child: the marks are its parent's
            return
        s = &held.s
        until = wait_until(s)
        for key in self.job.keys:
            k = key
            n = len(key)
            with nogil:
                while hold_mark(s, k, n, siphash13(k, n, s.k0, s.k1), until) == INTR:
                    pass                        # handlers run when all are held

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        cdef int how = TASKS if self.job is None else (<Turn?>self.job).leave()
        if how == RUNS:
            marked_by_nobody(self.job.caller)
            self.hold()
        elif how == OVER:
            try:
                self.job.go_through()
            finally:
                self.generator.close()          # if a handler has kept it from beginning
        elif how == TASKS:
            self.generator.close()


@cython.no_gc_clear
cdef class Lock(Held):
    """A lock that threads, tasks and greenlets of all processes of the host share, by name. Not re-entrant; given back by with, release(), its
    ttl, or the death of its process; not by the end of this object.

    It is an item that is never evicted and that clear() leaves alone. One Lock object is for one caller at a time. Made by Cache.lock().
    """
    cdef double ttl
    cdef int pid                    # that took it
    cdef object waits
    cdef object in_vain
    cdef readonly bint beneath      # it was not taken: the thread beneath this caller's event loop holds it

    def __init__(self, Table table, bytes key not None, double ttl, waits, in_vain):
        self.key = key
        self.ttl = ttl
        self.waits = waits
        self.in_vain = in_vain

    cdef bint acquired(self, bint blocking, object timeout) except -1:
        cdef object pause = None, deadline = None if timeout is None else monotonic() + timeout
        cdef int64_t rc
        cdef uint64_t noted
        if self.version and self.owned():
            raise errors.UsageError("this Lock is held already: it is not re-entrant, and each caller is to make one of its own")
        while True:
            noted = self.version
            try:
                rc = self.claim(self.ttl, True)
                if rc > 0:
                    self.pid = getpid()
                    if self.table.mapping is not None:
                        (<Mapping>self.table.mapping).note_lock(self.key, self.version, self.ttl)
                    return True
            except:                 # a handler's, say: the caller does not learn that it was taken
                if self.version != noted:
                    self.put_back()
                raise
            self.beneath = rc == -7
            if rc == -2:
                raise errors.UsageError("this thread, task or greenlet holds the lock already, by another Lock object: it is not re-entrant")
            if not blocking:
                return False
            if rc in (-6, -7) and self.in_vain():
                raise errors.UsageError("a task or greenlet of this thread holds the lock, and cannot give it back while this call waits: await "
                                        "shmcache.aio's lock in tasks; let gevent or eventlet patch time.sleep")
            if pause is None:
                pause = self.waits(deadline)
            if next(pause, "late"):
                return False

    def acquire(self, bint blocking=True, timeout=None):
        """Take it: True. False if it is taken and blocking is False, or after timeout seconds.

        Raises: UsageError if this object or this caller holds it already, or another task or greenlet of this thread, which could not
        give it back while this one sleeps.
        """
        return self.acquired(blocking, timeout)

    def release(self):
        """Give it back. Raises: UsageError if it is not held, or not any more (its ttl was over)."""
        cdef int rc = self.put_back()
        if rc == BUSY:
            fail(rc)
        if rc != OK:
            raise errors.UsageError("the lock is not held by this object (any more): its ttl was over, or release() was called twice")

    def owned(self):
        """Does this object hold it still?"""
        return self.version != 0 and self.table.claim_version(self.key, True) == self.version

    def __enter__(self):
        self.acquired(True, None)
        return self

    def __exit__(self, kind, error, trace):
        """Warns: LockLost."""
        cdef int rc
        if self.version == 0:
            if kind is None:
                self.release()
            return
        if self.pid != getpid():        # a fork child leaves its parent's block: the lock is the parent's, and stands
            self.version = 0
            return
        rc = self.put_back()
        if rc == BUSY and kind is None:
            fail(rc)
        if rc != OK and rc != BUSY:
            if self.table.s != NULL:
                add64(&self.table.ready().row.locks_lost, 1)
            try:
                PyErr_WarnEx(errors.LockLost, b"the lock was not held any more when its block ended (its ttl was over, or all handles were "
                             b"closed): others may have been in the block; give it more time, or none", 1)
            except Warning as e:        # a filter makes an error of it: the block's own goes first
                if kind is None:
                    raise
                PyErr_SetObject(type(e), e)
                PyErr_WriteUnraisable(self)


cdef class Giving:
    """Gives back at the end of a `with` block the lock that was acquired in it, if it was."""
    cdef Lock lock

    def __cinit__(self, Lock lock not None):
        self.lock = lock

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Warns: LockLost."""
        if self.lock.version:
            self.lock.__exit__(kind, error, trace)
