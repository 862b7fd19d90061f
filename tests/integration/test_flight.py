"""Single flight, leases, locks, namespaces: by threads and processes that want the same at once, and die."""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import signal
import threading
import time

import pytest

import shmcache
from shmcache import codec, errors, flight
from shmcache.core._claims import Claim

fork = mp.get_context("fork")


def compute_once(name, calls, started, hold, results, slot):
    cache = shmcache.attach(name)

    def factory():
        with calls.get_lock():
            calls.value += 1
        started.set()
        while not hold.value:  # not an Event: a killed waiter would wedge it
            time.sleep(0.002)
        return {"pid": os.getpid()}

    def one(i):
        results[slot * 8 + i] = cache.get_or_set("k", factory, ttl=60)["pid"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


@pytest.mark.parametrize("kill", [False, True], ids=["all live", "the computing process is killed"])
def test_eight_processes_of_eight_threads_call_the_factory_once(cache, kill):
    calls, started, hold = fork.Value("i", 0), fork.Event(), fork.Value("b", 0, lock=False)
    results = fork.Array("q", 64, lock=False)
    procs = [fork.Process(target=compute_once, args=(cache.name, calls, started, hold, results, i)) for i in range(8)]
    for p in procs:
        p.start()
    assert started.wait(60)
    victim = None
    try:
        if kill:
            token = cache.claim_version("k")
            owner = next(p for p in procs if p.pid == claimer(cache, "k"))
            victim = procs.index(owner)
            started.clear()
            os.kill(owner.pid, signal.SIGKILL)
            owner.join(60)
            died = time.monotonic()
            assert started.wait(10), "nobody took over"
            assert time.monotonic() - died < 10  # liveness; the bench measures
            assert cache.claim_version("k") not in (0, token)
        hold.value = 1
        for p in procs:
            p.join(60)
            assert not p.is_alive()
        assert calls.value == (2 if kill else 1)
        pids = {results[i] for i in range(64) if i // 8 != victim}
        assert pids == {cache["k"]["pid"]}
    finally:
        for p in procs:
            p.kill()
            p.join()


def claimer(cache, key):
    """Pid of the process whose claim is on the key, read from the segment's bytes."""
    seg = cache.segment
    for b, slot in zip(*seg.buckets["slot"].nonzero(), strict=True):
        at = (int(seg.buckets["slot"][b, slot]) & ((1 << 48) - 1)) * 16
        n = int.from_bytes(seg.bytes[at + 40 : at + 42].tobytes(), "little")
        if seg.bytes[at + 43] & 2 and seg.bytes[at + 48 : at + 48 + n].tobytes() == key.encode():
            value = at + (48 + n + 7) // 8 * 8
            token = int.from_bytes(seg.bytes[value : value + 8].tobytes(), "little")
            return int(seg.rows["pid"][(token & 0xFFFF) - 1])
    raise AssertionError("no claim")


def test_a_hit_does_not_compute(cache):
    cache.set("k", 1)
    assert cache.get_or_set("k", lambda: pytest.fail("computed")) == 1
    cache.set("none", None)
    assert cache.get_or_set("none", lambda: pytest.fail("computed")) is None


def test_a_miss_computes_and_stores_with_its_ttl(cache):
    assert cache.get_or_set("k", lambda: [1, 2], ttl=50) == [1, 2]
    assert cache["k"] == [1, 2]
    assert 40 < cache.ttl("k") <= 50
    counters = cache.counters()
    assert counters["sets"] == 1
    assert len(cache) == 1


def test_a_claim_is_no_value(cache):
    assert cache.claim("k", 60) > 0
    assert cache.get("k") is None
    assert "k" not in cache
    assert cache.ttl("k") is None
    assert list(cache.scan()) == []
    assert cache.gets("k") == (None, 0)
    assert cache.get_many(["k"]) == {}
    assert not cache.touch("k")
    assert not cache.replace("k", 1)
    assert not cache.delete("k")
    assert cache.claim_version("k") == 0
    assert cache.counters()["expirations"] == cache.counters()["deletes"] == 0
    assert cache.claim("k", 60) > 0
    assert cache.add("k", 5)
    assert cache["k"] == 5
    assert cache.verify() == []


@pytest.mark.parametrize("meanwhile", ["set", "delete", "clear", "add", "incr", "expire"])
def test_what_happens_meanwhile_wins(cache, meanwhile):
    def factory():
        if meanwhile in ("set", "add"):
            getattr(cache, meanwhile)("k", "newer")
        elif meanwhile == "delete":
            cache.delete("k")
        elif meanwhile == "clear":
            cache.clear()
        elif meanwhile == "incr":
            cache.incr("k", default=6)
        else:
            cache.set("k", "gone", ttl=0)
        return "older"

    assert cache.get_or_set("k", factory) == "older"
    assert cache.get("k") == {"set": "newer", "add": "newer", "incr": 7}.get(meanwhile)
    assert cache.verify() == []


def test_ten_thousand_deletes_while_it_is_computed(cache):
    """A database row that a writer changes and deletes from the cache, against readers who fill it: no stale value stays."""
    row = [0]
    rounds = 10_000
    read, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def factory():
        value = row[0]
        read.release()
        go_on.acquire()
        return value

    def reader():
        for _ in range(rounds):
            cache.get_or_set("k", factory)

    t = threading.Thread(target=reader)
    t.start()
    stale = 0
    for i in range(rounds):
        read.acquire()
        row[0] = i + 1
        cache.delete("k")
        go_on.release()
        while cache.claim_version("k"):
            pass
        value = cache.get("k")
        stale += value is not None and value != row[0]
    t.join()
    assert stale == 0


def test_a_late_fill_is_refused(cache):
    version = cache.claim("k", 0.001)
    while cache.claim_version("k"):
        pass
    second = cache.claim("k", 60)
    assert second > version
    assert not cache.fill_claim("k", "late", version)
    assert cache.fill_claim("k", "in time", second)
    assert cache["k"] == "in time"
    assert not cache.unclaim("k", second)


def test_a_factory_that_raises_lets_the_next_try(cache):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.get_or_set("k", fail)
    assert cache.claim_version("k") == 0
    with pytest.raises(errors.UnsupportedValue):
        cache.get_or_set("k", object)
    with pytest.raises(KeyboardInterrupt):
        cache.get_or_set("k", lambda: signal.raise_signal(signal.SIGINT))
    assert cache.get_or_set("k", lambda: 1) == 1
    with pytest.raises(errors.InvalidTTL):
        cache.get_or_set("l", lambda: 1, lease=0)


def test_a_factory_that_asks_for_itself(cache):
    assert cache.get_or_set("k", lambda: cache.get_or_set("k", lambda: 1) + 1) == 2
    assert cache["k"] == 2


def test_claims_are_not_evicted(make):
    cache = make("4M")
    version = cache.claim("k", 600)
    lock = cache.lock("l")
    lock.acquire()
    for i in range(200_000):
        cache.set(b"%d" % i, bytes(i % 200))
    assert cache.claim_version("k") == version
    assert lock.owned()
    cache.clear()
    assert cache.claim_version("k") == 0
    assert lock.owned()
    lock.release()
    assert cache.verify() == []


def test_memoize(cache):
    calls = []

    @cache.memoize(ttl=60)
    def add(a, b=2, *, c=3):
        "Adds."
        calls.append((a, b, c))
        return a + b + c

    assert add(1) == add(1) == 6
    assert add(1, c=4) == 7
    assert add(True) == add(1.0) == 6
    assert calls == [(1, 2, 3), (1, 2, 4), (True, 2, 3), (1.0, 2, 3)]
    assert add.__doc__ == "Adds."
    assert add.cache_key(1) in cache
    assert add.forget(1)
    add(1)
    assert len(calls) == 5
    with pytest.raises(errors.UnsupportedValue):
        add(object())
    with pytest.raises(errors.UsageError, match="called"):
        cache.memoize(len)


def test_lock(cache):
    lock = cache.lock("l")
    with lock:
        assert lock.owned()
        with pytest.raises(errors.UsageError, match="re-entrant"):
            lock.acquire()
        with pytest.raises(errors.UsageError, match="this thread"):
            cache.lock("l").acquire(blocking=False)
        got = []
        t = threading.Thread(target=lambda: got.append(cache.lock("l").acquire(timeout=0.05)))
        t.start()
        t.join()
        t = threading.Thread(target=lambda: got.append(cache.lock("l").acquire(blocking=False)))
        t.start()
        t.join()
        assert got == [False, False]
    assert not lock.owned()
    with pytest.raises(errors.UsageError, match="not held"):
        lock.release()
    with pytest.raises(errors.InvalidTTL):
        cache.lock("l", ttl=-1)


def test_a_fork_child_releases_and_fills_nothing_of_its_parents(cache):
    lock = cache.lock("l")
    lock.acquire()
    version = cache.claim("k", 60)
    child = os.fork()
    if child == 0:
        try:
            assert not lock.owned()
            with pytest.raises(errors.UsageError, match="not held"):
                lock.release()
            assert not lock.acquire(blocking=False)
            assert not cache.fill_claim("k", "the child's", version)
            assert not cache.unclaim("k", version)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert lock.owned()
    lock.release()
    assert cache.fill_claim("k", "the parent's", version)
    assert cache["k"] == "the parent's"


# ---- stale values, early refresh, tags, leases ---------------------------------------------------------------------------------


def pass_time(cache, seconds):
    """Move the segment's clock: for every process, at once."""
    cache.views(writable=True).header["clock_shift_ms"] += int(seconds * 1000)


def refresh_in_a_process(name, started, hold, result):
    cache = shmcache.attach(name)

    def factory():
        started.set()
        while not hold.value:
            time.sleep(0.002)
        return "new"

    result.value = cache.get_or_set("k", factory, 10, stale_ttl=100) == "new"


@pytest.mark.parametrize("kill", [False, True], ids=["all live", "the refresher is killed"])
def test_one_refreshes_and_the_others_get_the_stale_value(cache, kill):
    assert cache.get_or_set("k", lambda: "old", 10, stale_ttl=100) == "old"
    assert 9 < cache.ttl("k") <= 10
    pass_time(cache, 11)
    started, hold, result = fork.Event(), fork.Value("b", 0, lock=False), fork.Value("b", 0, lock=False)
    refresher = fork.Process(target=refresh_in_a_process, args=(cache.name, started, hold, result))
    refresher.start()
    try:
        assert started.wait(60)
        for _ in range(100):
            assert cache.get_or_set("k", lambda: pytest.fail("computed"), 10, stale_ttl=100) == "old"
        assert cache.get("k") is None, "who does not ask for a stale value"
        if kill:
            refresher.kill()
            refresher.join(60)
            assert cache.get_or_set("k", lambda: "newer", 10, stale_ttl=100) == "newer"
        else:
            hold.value = 1
            refresher.join(60)
            assert result.value
        assert cache["k"] == ("newer" if kill else "new")
        assert 9 < cache.ttl("k") <= 10
        assert cache.get_or_set("k", lambda: pytest.fail("computed"), 10, stale_ttl=100) == cache["k"]
        assert len(cache) == 1, "no claim is left"
    finally:
        refresher.kill()
        refresher.join()


def test_who_does_not_ask_for_stale_values_computes(cache):
    cache.get_or_set("k", lambda: "old", 10, stale_ttl=100)
    pass_time(cache, 11)
    assert cache.get_or_set("k", lambda: "new", 10) == "new"
    assert cache["k"] == "new"


@pytest.mark.parametrize("meanwhile", ["set", "delete", "clear", "touch", "invalidate_tag", "add", "another refresh"])
def test_what_happens_during_a_refresh_wins(cache, meanwhile):
    cache.get_or_set("k", lambda: "old", 10, stale_ttl=100, tags=("t",))
    pass_time(cache, 11)

    def factory():
        if meanwhile in ("set", "add"):
            assert getattr(cache, meanwhile)("k", "newer") in (None, True)
        elif meanwhile == "delete":
            assert not cache.delete("k"), "it was a miss"
        elif meanwhile == "clear":
            cache.clear()
        elif meanwhile == "invalidate_tag":
            cache.invalidate_tag("t")
        elif meanwhile == "touch":
            cache.persist("k")  # refused: it is a miss
            cache.set("k", "newer")
            assert cache.touch("k", 50)
        else:
            assert cache.fill_claim("k", "newer", cache._look("k")[2], 10, None, 100, 0, True)
        return "computed"

    assert cache.get_or_set("k", factory, 10, stale_ttl=100, tags=("t",)) == "computed"
    assert cache.get("k") == (None if meanwhile in ("delete", "clear", "invalidate_tag") else "newer")
    assert not any(key.startswith(flight.REFRESH_PREFIX) for key in cache.scan())
    assert cache.get_or_set("k", lambda: "next", 10, stale_ttl=100) in ("next", "newer")
    assert cache.verify() == []


def test_who_gets_the_claim_after_a_refresh_looks_again(cache):
    cache.get_or_set("k", lambda: "old", 10, stale_ttl=100)
    pass_time(cache, 11)
    state, value, seen = cache._look("k")
    assert state == codec.STALE
    assert cache.get_or_set("k", lambda: "new", 10, stale_ttl=100) == "new"

    def late():
        with pytest.raises(StopIteration) as ended, Claim(cache) as claim:
            next(flight.refreshing(cache, "k", 60, flight.Terms(cache, 10, 100, 0, None), claim, value, seen))
        return ended.value.value

    assert late() == "new"
    cache.delete("k")
    assert late() is flight.MISSING
    assert len(cache) == 0


def test_an_invalidated_value_is_not_refreshed_without_its_tags(cache):
    cache.get_or_set("k", lambda: "old", 10, stale_ttl=100, tags=("t",))
    pass_time(cache, 11)
    assert cache.get_or_set("k", lambda: cache.invalidate_tag("t") or "computed", 10, stale_ttl=100) == "computed"
    assert cache.get("k") is None


def test_what_expires_during_a_refresh_is_stored(cache):
    cache.get_or_set("k", lambda: "old", 10, stale_ttl=100)
    pass_time(cache, 11)
    assert cache.get_or_set("k", lambda: pass_time(cache, 200) or "new", 10, stale_ttl=100) == "new"
    assert cache["k"] == "new"


def test_a_refreshers_exception_is_its_own(cache):
    cache.get_or_set("k", lambda: "old", 10, stale_ttl=100)
    pass_time(cache, 11)
    with pytest.raises(ZeroDivisionError):
        cache.get_or_set("k", lambda: 1 // 0, 10, stale_ttl=100)
    assert cache._look("k")[:2] == (codec.STALE, "old")
    assert cache.get_or_set("k", lambda: "new", 10, stale_ttl=100) == "new"


def test_a_refresher_that_asks_its_own_key_gets_the_stale_value(cache):
    cache.get_or_set("k", lambda: ["old"], 10, stale_ttl=100)
    pass_time(cache, 11)

    def factory():
        return [*cache.get_or_set("k", lambda: pytest.fail("computed"), 10, stale_ttl=100), "new"]

    assert cache.get_or_set("k", factory, 10, stale_ttl=100) == ["old", "new"]


@pytest.mark.parametrize("length", [4096, 4088, 4087])
def test_a_key_of_any_length_is_refreshed(cache, length):
    key = "k" * length
    cache.get_or_set(key, lambda: "old", 10, stale_ttl=100)
    pass_time(cache, 11)
    assert cache.get_or_set(key, lambda: cache.get_or_set(key, None, 10, stale_ttl=100) + "+", 10, stale_ttl=100) == "old+"
    assert flight.refresh_key(key) != flight.refresh_key("l" + key[1:])


def test_early_refresh(cache, monkeypatch):
    """The factory takes a second by its clock: half a second before the end e ** -0.5 of the reads are early, and one computes."""
    now = [0.0]
    monkeypatch.setattr(flight._core, "monotonic", lambda: now[0])

    def slow():
        now[0] += 1.0
        return "old"

    assert cache.get_or_set("k", slow, 100, early=True) == "old"
    assert cache.get_or_set("k", lambda: pytest.fail("computed"), 100, early=True) == "old", "a hundred seconds before the end"
    pass_time(cache, 99.5)
    calls = []

    def factory():
        calls.append(1)
        for _ in range(200):
            assert cache.get_or_set("k", lambda: pytest.fail("computed by a second one"), 100, early=True) == "old"
        return "new"

    while not calls:
        assert cache.get_or_set("k", factory, 100, early=True) in ("old", "new")
    assert calls == [1]
    assert cache["k"] == "new"
    assert 99 < cache.ttl("k") <= 100
    cache.get_or_set("fast", lambda: 1, 100, early=True)
    pass_time(cache, 99.5)
    assert all(cache.get("fast") == 1 for _ in range(200)), "what costs nothing is not computed early"
    for early in (-1, float("nan"), 1e9):
        with pytest.raises(errors.UsageError):
            cache.get_or_set("x", lambda: 1, early=early)


def test_stale_ttl_is_bounded(cache):
    for stale_ttl in (-1, "5", 5e6):
        with pytest.raises(errors.InvalidTTL):
            cache.get_or_set("k", lambda: 1, 10, stale_ttl=stale_ttl)
        assert cache.claim_version("k") == 0
    cache.get_or_set("k", lambda: 1, stale_ttl=5)
    assert cache.ttl("k") == math.inf, "no default: never stale"


def test_an_invalidation_during_the_computation_wins(cache):
    def factory():
        cache.invalidate_tag("t")
        return "older"

    assert cache.get_or_set("k", factory, tags=("t",)) == "older"
    assert cache.get("k") is None
    assert cache.get_or_set("k", lambda: "newer", tags=("t",)) == "newer"
    assert cache["k"] == "newer"


def test_a_thousand_invalidations_while_it_is_computed(cache):
    """As with deletes: rows that a writer changes, and their tag invalidated, against two who fill."""
    row = [0]
    end = threading.Event()
    stale = []

    def reader():
        while not end.is_set():
            cache.get_or_set("k", lambda: row[0], tags=("t",))

    threads = [threading.Thread(target=reader) for _ in range(2)]
    for t in threads:
        t.start()
    for i in range(1000):
        row[0] = i + 1
        cache.invalidate_tag("t")
        value = cache.get_or_set("k", lambda: row[0], tags=("t",))
        if value != row[0] or cache.get("k", row[0]) != row[0]:
            stale.append((i, value))
    end.set()
    for t in threads:
        t.join()
    assert stale == []


def test_memoize_with_tags_and_a_stale_time(cache):
    calls = []

    @cache.memoize(10, stale_ttl=100, tags=lambda n: (f"u:{n}", "all"))
    def f(n):
        calls.append(n)
        return n * 2

    assert [f(1), f(1), f(2)] == [2, 2, 4]
    cache.invalidate_tag("u:1")
    assert [f(1), f(2)] == [2, 4]
    assert calls == [1, 2, 1]
    cache.invalidate_tag("all")
    assert [f(1), f(2)] == [2, 4]
    assert calls == [1, 2, 1, 1, 2]
    pass_time(cache, 11)
    assert f(1) == 2
    assert calls[-1] == 1


def test_lease(cache):
    lease = cache.get_lease("k")
    assert (lease.found, lease.held, lease.value) == (False, True, None)
    other = []
    t = threading.Thread(target=lambda: other.append(cache.get_lease("k")))
    t.start()
    t.join()
    assert (other[0].found, other[0].held) == (False, False)
    for not_held in (other[0], cache.get_lease("k")):
        assert not not_held.held
        with pytest.raises(errors.UsageError):
            cache.fill(not_held, 1)
        assert not cache.release(not_held)
    assert cache.fill(lease, "v", 50, tags=("t",))
    assert 49 < cache.ttl("k") <= 50
    with pytest.raises(errors.UsageError):
        cache.fill(lease, "again")
    found = cache.get_lease("k")
    assert (found.found, found.held, found.value) == (True, False, "v")
    cache.invalidate_tag("t")
    lease = cache.get_lease("k")
    assert lease.held
    assert cache.release(lease)
    assert not cache.release(lease)
    assert cache.get_lease("k").held
    cache.set("none", None)
    assert cache.get_lease("none").found
    with pytest.raises(errors.InvalidTTL):
        cache.get_lease("x", 0)


@pytest.mark.parametrize("meanwhile", ["set", "delete", "clear", "incr", "invalidate_tag", "time"])
def test_a_void_lease_fills_nothing(cache, meanwhile):
    lease = cache.get_lease("k", 10, tags=("t",))
    if meanwhile == "set":
        cache.set("k", "newer")
    elif meanwhile == "incr":
        cache.incr("k", default=1)
    elif meanwhile == "invalidate_tag":
        cache.invalidate_tag("t")
    elif meanwhile == "time":
        pass_time(cache, 11)
    else:
        getattr(cache, meanwhile)(*["k"] * (meanwhile == "delete"))
    assert not cache.fill(lease, "older", tags=("u",))
    assert cache.get("k") == {"set": "newer", "incr": 2}.get(meanwhile)
    assert cache.claim_version("k") == 0, "the next to ask gets it at once"


def test_a_lease_whose_value_cannot_be_stored_is_given_back(cache):
    lease = cache.get_lease("k")
    with pytest.raises(errors.UnsupportedValue):
        cache.fill(lease, object())
    assert cache.get_lease("k").held


def test_a_lock_whose_time_is_over_is_free(cache):
    lock = cache.lock("l", ttl=0.001)
    lock.acquire()
    while lock.owned():
        pass
    with cache.lock("l"):
        assert not lock.owned()
        with pytest.raises(errors.UsageError):
            lock.release()


def count(name, n):
    cache = shmcache.attach(name)
    for _ in range(n):
        with cache.lock("l"):
            cache.set("n", cache["n"] + 1)  # two steps: only the lock makes them one


def test_a_lock_excludes_other_processes_and_survives_their_death(cache):
    cache.set("n", 0)
    procs = [fork.Process(target=count, args=(cache.name, 300)) for _ in range(4)]
    doomed = fork.Process(target=lambda: (shmcache.attach(cache.name).lock("l").acquire(), os.kill(os.getpid(), signal.SIGKILL)))
    doomed.start()
    for p in procs:
        p.start()
    for p in [*procs, doomed]:
        p.join(60)
        assert not p.is_alive()
    assert cache["n"] == 1200


def test_namespace(cache):
    users, pages = cache.namespace("users"), cache.namespace("pages")
    users.set("1", "Ada")
    users["2"] = "Grace"
    pages["1"] = "index"
    cache["1"] = "outside"
    assert (users["1"], pages["1"], cache["1"]) == ("Ada", "index", "outside")
    assert sorted(users.scan()) == [b"1", b"2"]
    assert list(users.scan("2")) == [b"2"]
    assert users.get_many(["1", "2", "3"]) == {"1": "Ada", "2": "Grace"}
    users.set_many({"3": 3, b"4": 4})
    assert users.incr("3") == 4
    assert users.decr("n", default=0) == -1
    assert users.delete_many(["3", "4", "5"]) == 2
    assert users.get_or_set("9", lambda: "nine") == "nine"
    assert users.pop("9") == "nine"
    assert not users.delete("9")
    value, version = users.gets("1")
    assert users.cas("1", value + "!", version)
    assert not users.add("1", 0)
    assert users.replace("1", "Ada")
    assert users.touch("1", 50)
    assert users.ttl("1") > 40
    assert users.persist("1")
    assert users.expire("2", 0)
    assert "2" not in users
    del users["n"]
    users.clear()
    assert users.get("1") is None
    assert list(users.scan()) == []
    assert (pages["1"], cache["1"]) == ("index", "outside")
    with pytest.raises(errors.InvalidKeyType):
        users.get(1)
    with pytest.raises(errors.InvalidKey):
        users.get("")
    with pytest.raises(errors.InvalidName):
        cache.namespace("")
    assert cache.namespace("users").get("1") is None


def test_a_namespace_whose_generation_was_evicted_shows_nothing_that_was_cleared(cache):
    users = cache.namespace("users")
    users["1"] = "old"
    users.clear()
    users["1"] = "new"
    assert cache.delete(b"\x00ns\x00users")
    assert users.get("1") is None
