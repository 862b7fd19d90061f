"""A handler of a signal raises between any two steps of a caller (KeyboardInterrupt, a worker's time-out): nothing stays held."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import shmcache
from shmcache import errors, flight
from shmcache.core import _claims
from tests import holes
from tests.integration.test_store import DictStore

ROUNDS = 300
LOCK = flight.LOCK_PREFIX + b"l"


class Struck(Exception):
    pass


class Forked(Exception):
    pass


@pytest.fixture
def strike():
    """strike(operation, held, ends=True): how many of ROUNDS loops of the operation left something held when a handler raised in them.
    One that ends is done once before: what a handler raises in a callback of the import system is lost. So it is in a finalizer that the
    garbage collector calls: the next signal comes a second later."""
    rng = random.Random(17)
    inside = []

    def handler(*_):
        if inside:
            raise Struck

    def strike(operation, held, ends=True):
        left = 0
        if ends:
            operation()
        for _ in range(ROUNDS):
            try:
                inside.append(True)
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-4), 1.0)
                while True:
                    operation()
            except Struck:
                pass
            finally:  # if the operation raises something else, that is what is to be seen
                inside.clear()
            left += bool(held())
        return left

    was = signal.signal(signal.SIGALRM, handler)
    yield strike
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, was)


def claims(cache, *keys):
    """Those of keys that are claimed; given back."""
    left = [key for key in keys if (version := cache.claim_version(key)) and cache.unclaim(key, version) is not None]
    cache.delete_many(keys)
    return left


def interpreter(version):
    """One of that version of the machine's, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for folder in [*os.get_exec_path(), *pyenv.glob(f"versions/{version}.*/bin")]:
        path = Path(folder) / f"python{version}"
        if path.exists() and subprocess.run([path, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0:
            return path
    return None


# of processes of ours, whose handlers only set a flag, or of threads, to which no handler comes
NO_HANDLER_RAISES = ["sidecar/", "supervisor/appendlog.py", "supervisor/loop.py", "supervisor/writeback.py"]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_no_jump_leaves_a_block_without_its_end(version):
    python = sys.executable if sys.version.startswith(version) else interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    root = Path(shmcache.__file__).parent
    lines = subprocess.run([python, holes.__file__, root], check=True, capture_output=True, text=True).stdout.splitlines()
    found = [line for line in lines if not any(line.startswith(f"{root}/{part}") for part in NO_HANDLER_RAISES)]
    assert not found, "make such a loop a function of its own"


def test_locks(cache, strike):
    def block():
        with cache.lock("l"):
            pass

    lock = cache.lock("l")

    def the_same():
        with lock:
            pass

    def raising():
        with contextlib.suppress(KeyError), cache.lock("l", ttl=60):
            raise KeyError

    for operation in (block, the_same, raising):
        assert strike(operation, lambda: claims(cache, LOCK)) == 0, operation.__name__


def test_what_is_computed(cache, strike):
    def get_or_set():
        cache.delete("k")
        cache.get_or_set("k", lambda: 1)

    @cache.memoize()
    def function():
        return 1

    def memoized():
        function.forget()
        function()

    def refresh():  # early, always
        cache.get_or_set("k", lambda: sum(range(100)), 10, early=1e5)

    def raising():
        cache.delete("k")
        with contextlib.suppress(KeyError):
            cache.get_or_set("k", lambda: {}["no"])

    keys = "k", function.cache_key(), flight.refresh_key("k")
    for operation in (get_or_set, memoized, refresh, raising):
        assert strike(operation, lambda: claims(cache, *keys)) == 0, operation.__name__


def test_leases(cache, strike):
    def filled():
        cache.delete("k")
        cache.fill(cache.get_lease("k"), 1)

    def released():
        cache.release(cache.get_lease("k", tags=("t",)))

    for operation in (filled, released):
        assert strike(operation, lambda: claims(cache, "k")) == 0, operation.__name__


@pytest.mark.parametrize("mode", ["through", "around", "back"])
def test_in_front_of_a_store(make, strike, mode):
    cache = make(policy=mode, store=DictStore())
    keys = [b"a", b"b", b"c"]

    def loads():
        cache.invalidate(*keys)
        cache.get("a")
        cache.get_many(keys)
        cache.gets("none")
        cache.ttl("none")

    def writes():
        cache.set_many(dict.fromkeys(keys, 1))
        cache.add("d", 1)
        cache.pop("d")
        cache.incr("a")

    def held():
        states = {key: cache.claim(key, 60) for key in [*keys, b"d", b"none"]}
        for key, version in states.items():
            cache.unclaim(key, max(version, 0))
        return [key for key, version in states.items() if version in (-1, -2, -3)]

    cache.set_many(dict.fromkeys(keys, 1))
    for operation in (loads, writes):
        assert strike(operation, held) == 0, operation.__name__


def test_waits_end_when_a_handler_raises(cache, strike):
    there, over = threading.Event(), threading.Event()

    def hold():
        with cache.lock("l"), contextlib.closing(flight.waits(None)):
            there.set()
            over.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    there.wait()
    try:
        version = cache.claim_version(LOCK)
        assert strike(lambda: cache.lock("l").acquire(timeout=60), lambda: cache.claim_version(LOCK) != version, False) == 0
    finally:
        over.set()
        holder.join()


def test_a_lease_that_is_dropped_is_given_back(cache):
    lease = cache.get_lease("k")
    assert lease.held
    del lease
    gc.collect()
    assert cache.get_lease("k").held


def test_a_lock_that_is_dropped_excludes_others(cache):
    assert cache.lock("l", ttl=600).acquire(blocking=False)
    gc.collect()
    with ThreadPoolExecutor(1) as other:
        assert not other.submit(cache.lock("l").acquire, blocking=False).result()


def test_a_child_drops_nothing_of_its_parents(cache):
    lock, lease = cache.lock("l"), cache.get_lease("k")
    lock.acquire()
    pid = os.fork()
    if pid == 0:
        try:
            with contextlib.suppress(errors.UsageError):
                lock.release()
            del lock, lease
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert lock.owned()
    assert cache.fill(lease, 1)


def test_another_handle_of_the_process_closes(make):
    cache = make()
    other = shmcache.attach(cache.name)
    lock = other.lock("l")
    lock.acquire()
    other.close()
    assert cache.claim_version(LOCK)
    lock.release()
    assert cache.lock("l").acquire(blocking=False)


@contextlib.contextmanager
def stripes_taken(cache):
    """By a process that does not run."""
    stripes = cache.views(writable=True).stripes
    stripes["word"] = cache.segment.rows["gen"][cache.row] << 16 | (cache.row + 1)
    try:
        yield
    finally:
        stripes["word"] = 0


def test_what_cannot_be_given_back_is_held_until_it_can(make):
    cache = make(lock_limit=0.01)
    lock, claim = cache.lock("l"), _claims.Claim(cache)
    lock.acquire()
    claim.take("k", 60)
    with stripes_taken(cache):
        with pytest.raises(errors.StripeBusy):
            lock.release()
        with pytest.raises(errors.StripeBusy):
            claim.give_back()
        with pytest.raises(KeyError), claim:
            raise KeyError("the body's own comes first")
    assert lock.owned()
    lock.release()
    del claim
    assert cache.claim_version("k") == 0


def test_who_drops_the_last_reference_does_not_wait(make):
    """It may be any thread, in the middle of anything: a collection of garbage."""
    cache = make(lock_limit=60)
    claim = _claims.Claim(cache)
    claim.take("k", 3600)
    with stripes_taken(cache):
        began = time.monotonic()
        del claim
        assert time.monotonic() - began < 30
    assert cache.claim_version("k"), "it stands until its time is over"


def test_giving_back_waits_for_a_stripe(make):
    cache = make(lock_limit=60)
    lock = cache.lock("l")
    lock.acquire()

    def end():
        words = cache.views(writable=True).stripes["word"]
        while (words == words[0]).all():  # until one says that somebody waits
            pass
        words[:] = 0

    with stripes_taken(cache):
        thread = threading.Thread(target=end)
        thread.start()
        lock.release()
        thread.join()
    assert cache.lock("l").acquire(blocking=False)


def test_signals_do_not_lengthen_the_wait_of_giving_back(make, strike):
    """A timer that comes again and again would begin the limit anew each time."""
    cache = make(lock_limit=0.2)
    lock = cache.lock("l")
    lock.acquire()
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    with stripes_taken(cache), pytest.raises(errors.StripeBusy):
        lock.release()


@pytest.mark.filterwarnings("error")
def test_where_warnings_are_errors_a_lost_lock_does_not_hide_what_the_block_raised(cache, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", lambda said: unraisable.append(said.exc_type))
    for raised, expected in (ZeroDivisionError, ZeroDivisionError), (None, errors.LockLost):
        with pytest.raises(expected), cache.lock("l", ttl=0.001):
            while cache.claim_version(LOCK):
                pass
            if raised:
                raise raised
    assert unraisable == [errors.LockLost]
    assert cache.stats()["locks_lost"] == 2


@pytest.mark.filterwarnings("error")
def test_a_fork_child_that_leaves_its_parents_block_has_lost_nothing(cache):
    with contextlib.suppress(Forked), cache.lock("l"):
        if (pid := os.fork()) == 0:
            cache.get("k")  # it has a row of its own
            raise Forked
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert cache.claim_version(LOCK)
        assert cache.stats()["locks_lost"] == 0
        pid = 1
    if pid == 0:
        os._exit(0)
    with cache.lock("l"):
        pass


def test_a_lock_that_was_lost_is_a_warning_and_is_counted(cache):
    """Not an exception in the place of the body's."""

    def block(error):
        with cache.lock("l", ttl=0.001):
            while cache.claim_version(LOCK):
                pass
            with cache.lock("l"):
                raise error

    for n in 1, 2:
        with pytest.warns(errors.LockLost), pytest.raises(ZeroDivisionError):
            block(ZeroDivisionError)
        assert cache.stats()["locks_lost"] == n
    with pytest.raises(errors.UsageError, match="ttl was over"):
        lock = cache.lock("l", ttl=0.001)
        lock.acquire()
        while lock.owned():
            pass
        lock.release()
    assert cache.stats()["locks_lost"] == 2
    with pytest.raises(errors.UsageError, match="twice"), cache.lock("l") as lock:
        lock.release()


def test_a_child_of_a_handler_takes_no_lock_without_a_row(make):
    """verify() waits for a stripe; a signal's handler forks, and the child goes on in verify()."""
    cache = make(stripes=1, lock_limit=60)
    cache.set("k", 1)
    words = cache.views(writable=True).stripes["word"]
    parent, children = os.getpid(), []

    def handler(*_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        children.append(os.fork())
        words[0] = 0

    was = signal.signal(signal.SIGALRM, handler)
    try:
        with stripes_taken(cache):
            signal.setitimer(signal.ITIMER_REAL, 0.2, 0.02)  # again: of one that comes between two of its sleeps verify() learns at its limit
            found = cache.verify()
        if os.getpid() != parent:
            rows = cache.segment.rows["pid"]
            os._exit(found != [] or os.getpid() not in rows)
    finally:
        if os.getpid() != parent:
            os._exit(1)
        signal.signal(signal.SIGALRM, was)
    assert found == [] and os.waitpid(children[0], 0)[1] == 0
