"""Each row of the recovery table, set up in the bytes as a dead process would have left it, and each branch of a stripe's repair."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import numpy as np
import pytest

from shmcache.core import _dirty, _sweep
from shmcache.errors import CapacityError, DamageError, NoRoom, StripeBusy
from tests.redis.inprocess import InProcess
from tests.redis.resp import encode

ADDR = (1 << 48) - 1
DEAD = 77 << 16 | 100  # a generation that row 99 never had
FREE, RESERVED, LIVE, RETIRED = range(4)
SET, DELETE, EVICT, TOUCH = range(1, 5)


class Place:
    """One key's slot, item and stripe, writable."""

    def __init__(self, cache, key=b"k", value=b"v"):
        cache.set(key, value)
        self.cache, self.key = cache, key
        seg = cache.views(writable=True)
        self.seg = seg
        b, slot = map(int, np.argwhere(seg.buckets["slot"] != 0)[0])
        self.bucket, self.slot = seg.buckets[b : b + 1], slot
        self.stripe = seg.stripes[b & 1023 : (b & 1023) + 1]
        self.address = int(self.bucket["slot"][0, slot]) & ADDR
        self.item = np.ndarray((1,), seg.items(0).dtype, buffer=seg.bytes, offset=self.address * 16)

    def die_holding(self, op, old, new, count_next):
        self.stripe["count_next"] = 1 << 32 | count_next
        self.stripe["old"] = op << 56 | old
        self.stripe["new"] = new
        self.stripe["word"] = DEAD

    @property
    def kind(self):
        return int(self.item["word"][0]) >> 56

    def unlink(self):
        self.bucket["slot"][0, self.slot] = 0


@pytest.fixture
def place(cache):
    p = Place(cache)
    yield p
    for name in list(vars(p)):
        delattr(p, name)


@contextlib.contextmanager
def living(cache):
    """The token of another process, which lives meanwhile and does nothing."""
    holder = os.fork()
    if holder == 0:
        cache.get(b"x")  # takes a row of its own
        signal.pause()
    try:
        deadline = time.monotonic() + 30
        while holder not in {p["pid"] for p in cache.processes()}:
            assert time.monotonic() < deadline
        row = next(p["row"] for p in cache.processes() if p["pid"] == holder)
        yield int(cache.views().rows["gen"][row]) << 16 | row + 1
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


def held_by_claims(cache):
    """All the room that is left is given to claims, which are not evicted. Returns: these."""
    claims, i, refused = [], 0, 0
    while refused < 10:  # in a row
        i += 1
        try:
            claims.append(cache.claim(b"claim %d" % i, 1000.0))
            refused = 0
        except CapacityError:
            refused += 1
    return claims


def settled(place):
    _sweep.settle(place.cache)
    assert place.cache.verify() == []


def test_reserved_not_reachable_is_freed(place):
    version = int(place.bucket["version"][0])
    place.item["word"] = RESERVED << 56 | DEAD
    place.unlink()
    place.stripe["count"] = 1 << 32
    settled(place)
    assert place.kind == FREE
    assert int(place.bucket["version"][0]) > version, "rule F"


def test_reserved_reachable_is_finished(place):
    place.item["word"] = RESERVED << 56 | DEAD
    settled(place)
    assert place.kind == LIVE
    assert place.cache[b"k"] == b"v"


def test_retired_reachable_is_undone(place):
    place.item["word"] = RETIRED << 56 | DEAD
    settled(place)
    assert place.kind == LIVE


def test_retired_not_reachable_is_freed(place):
    place.item["word"] = RETIRED << 56 | DEAD
    place.unlink()
    place.stripe["count"] = 1 << 32
    settled(place)
    assert place.kind == FREE


def test_live_owner_is_left_alone(place):
    pid = os.fork()
    if pid == 0:
        place.cache.get(b"k")  # takes a row
        os.kill(os.getpid(), 19)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    row = int(np.flatnonzero(place.seg.rows["pid"] == pid)[0])
    token = int(place.seg.rows["gen"][row]) << 16 | row + 1
    place.item["word"] = RETIRED << 56 | token
    place.unlink()
    place.stripe["count"] = 1 << 32
    _sweep.settle(place.cache)
    assert place.kind == RETIRED
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    settled(place)
    assert place.kind == FREE


def test_repair_undoes_a_set_that_did_not_commit(place):
    place.item["word"] = RETIRED << 56 | DEAD
    other = place.address + 2
    place.die_holding(SET, place.address, other, 1)
    assert place.cache.set(b"other", b"x") is None
    place.cache.delete(b"k2")
    settled(place)
    assert place.cache[b"k"] == b"v"
    assert place.stripe["word"][0] == place.stripe["old"][0] == place.stripe["new"][0] == 0


def test_repair_finishes_a_set_that_did(place):
    place.item["word"] = RESERVED << 56 | DEAD
    place.item["cas"] = 10
    place.stripe["count"] = 1 << 32
    version = int(place.bucket["version"][0])
    place.die_holding(SET, 0, place.address, 1)
    settled(place)
    assert place.kind == LIVE
    assert place.stripe["seq"][0] == 10
    assert int(place.bucket["version"][0]) > version
    assert len(place.cache) == 1


@pytest.mark.parametrize("op", [DELETE, EVICT])
@pytest.mark.parametrize("committed", [False, True])
def test_repair_of_a_removal(place, op, committed):
    seq = int(place.stripe["seq"][0])
    place.item["word"] = RETIRED << 56 | DEAD
    place.die_holding(op, place.address, 0, 0)
    if committed:
        place.unlink()
    settled(place)
    assert place.cache.get(b"k") == (None if committed else b"v")
    assert len(place.cache) == (not committed)
    assert place.stripe["seq"][0] == seq + (op == DELETE and committed)


def test_repair_of_a_touch_counts_the_version_up(place):
    version = place.cache.gets(b"k")[1]
    place.die_holding(TOUCH, place.address, 0, 1)
    settled(place)
    assert place.cache.gets(b"k")[1] > version


def test_repair_of_a_touch_gives_no_version_that_a_reader_may_have(place):
    """The version of a renewal is far above its stripe's, and stored first."""
    place.item["cas"] += 1000
    value, version = place.cache.gets(b"k")
    place.die_holding(TOUCH, place.address, 0, 1)
    settled(place)
    assert place.cache.gets(b"k") == (value, version + 1)
    place.cache.set(b"k", b"w")
    assert place.cache.gets(b"k") == (b"w", version + 2)


def test_a_read_ends_though_a_version_is_damaged(place):
    """One bit: the version 1 becomes 0, which no item has."""
    reads = [
        *(getattr(place.cache, name) for name in ("get", "gets", "peek", "ttl", "__contains__", "_look", "claim_version")),
        lambda key: place.cache.get_many([key]), lambda key: list(place.cache), lambda key: _dirty.Dirty(place.cache).walk(0, 9),
        *(lambda key, word=word: (server := InProcess(place.cache.name)).say(server.connect(), encode([word, key])) for word in (b"GET", b"TTL", b"STRLEN", b"EXISTS")),
    ]  # fmt: skip
    version = int(place.item["cas"][0])
    place.item["cas"] = 0
    for read in reads:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends it, whoever has the interpreter
            signal.alarm(20)
            try:
                read(b"k")
            except DamageError:
                pass
            finally:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, read
    place.item["cas"] = version


def test_dead_class_lock_rebuilds_lists(place):
    place.seg.classes["word"][0] = DEAD
    page = int(np.flatnonzero(place.seg.pages["word"] >> 56 == 2)[0])
    place.seg.classes["page_in_hand"][0] = page + 1
    place.seg.pages["free"][page] = 0
    place.seg.pages["n_free"][page] = 0
    place.seg.classes["ring"][0] = place.seg.classes["avail"][0] = 0
    settled(place)


def test_dead_pool_locks_rebuild_lists(place):
    for pool in ("pages", "overflow"):
        place.seg.header[pool + "_word"] = DEAD
        place.seg.header[pool + "_list"] = 0
        place.seg.header[pool + "_n_free"] = 3
    place.seg.header["big_word"] = DEAD
    place.cache.set(b"big", bytes(200_000))
    settled(place)
    assert place.cache[b"big"] == bytes(200_000)


@pytest.mark.parametrize("kind", [1, 4])
def test_pages_of_the_dead_go_to_the_pool(place, kind):
    seg = place.seg
    first = int(seg.header["pages_list"]) - 1
    seg.header["pages_list"] = seg.pages["next"][first]
    seg.header["pages_n_free"] -= 1
    seg.pages["word"][first] = kind << 56 | DEAD
    seg.pages["head"][first] = place.address if kind == 4 else 0
    settled(place)
    assert int(seg.pages["word"][first]) >> 56 == 0


def test_a_draining_page_of_the_dead_is_active_again(place):
    page = int(np.flatnonzero(place.seg.pages["word"] >> 56 == 2)[0])
    place.seg.pages["word"][page] = 3 << 56 | DEAD
    place.seg.pages["listed"][page] = 0
    place.seg.classes["avail"][0] = 0
    settled(place)
    assert int(place.seg.pages["word"][page]) >> 56 == 2


def test_a_big_value_published_but_not_sealed(cache):
    cache.set(b"big", bytes(200_000))
    seg = cache.views(writable=True)
    pages = np.flatnonzero(seg.pages["word"] >> 56 == 4)
    seg.pages["word"][pages] = 4 << 56 | DEAD
    _sweep.settle(cache)
    assert cache[b"big"] == bytes(200_000)
    assert (seg.pages["word"][pages] == 4 << 56).all()
    del seg, pages


@pytest.mark.parametrize("linked", [False, True])
def test_overflow_bucket_of_the_dead(place, linked):
    seg = place.seg
    i = int(seg.header["overflow_list"]) - 1
    seg.header["overflow_list"] = seg.overflow["next"][i]
    seg.header["overflow_n_free"] -= 1
    b = int(np.flatnonzero(seg.buckets["slot"][:, place.slot])[0])
    seg.overflow["head"][i] = b
    seg.overflow["next"][i] = 0
    seg.overflow["word"][i] = 1 << 56 | DEAD
    if linked:
        place.bucket["overflow"] = i + 1
    settled(place)
    assert int(seg.overflow["word"][i]) >> 56 == (2 if linked else 0)


def test_writers_find_what_the_dead_held_without_a_supervisor(place):
    """No settle(): an ordinary set of the key takes the stripe over, repairs, goes on."""
    place.item["word"] = RETIRED << 56 | DEAD
    place.die_holding(SET, place.address, 0, 1)
    place.cache.set(b"k", b"new")
    assert place.cache[b"k"] == b"new"
    assert place.cache.stats()["takeovers"] == 1


def test_chunks_freed_while_no_list_is_to_be_had_come_back(make):
    """A living process holds the class's lock: 16 freed chunks are parked, the rest are FREE on no list till a hand passes."""
    cache = make("8M", lock_limit=0.01)
    value = bytes(3000)  # of a class without batches
    n = 0
    while cache.counters()["evictions"] == 0:
        cache.set(b"%d" % n, value)
        n += 1
    full = len(cache)
    seg = cache.views(writable=True)
    cls = next(i for i, c in enumerate(cache.stats()["slab_classes"]) if c["live"])
    with living(cache) as token:
        seg.classes["word"][cls] = token
        for k in list(cache.scan())[:20]:
            assert cache.delete(k)
        seg.classes["word"][cls] = 0
        assert cache.counters()["unlisted"] == 4
        for i in range(3 * full):
            cache.set(b"again %d" % i, value)
        assert len(cache) == full
        del seg


@pytest.mark.parametrize("left", ["big value", "chunks of the dead"])
def test_who_is_in_the_way_is_said(make, left):
    """All that could be evicted has its stripe in the hand of a living process that does not run: StripeBusy, not that there is no room."""
    cache = make("4M", lock_limit=0.2)
    value = bytes(40_000 if left == "big value" else 30_000)
    before = cache.views().stripes["count"].copy()
    cache.set(b"n0", value)
    cache.set(b"n1", value)
    seg = cache.views(writable=True)
    stripes = np.flatnonzero(seg.stripes["count"] != before)
    cls = next(i for i, c in enumerate(cache.stats()["slab_classes"]) if c["live"])
    if left == "chunks of the dead":
        pages = np.flatnonzero((seg.pages["cls"] & 0xFFFF) == cls)
        seg.items(cls)["word"][pages] = RETIRED << 56 | DEAD
    with living(cache) as token:
        seg.stripes["word"][stripes] = token
        cache.lock_limit = 0.001
        claims = held_by_claims(cache)
        cache.lock_limit = 0.2
        seg.refs[:] = 0
        for i in range(3):
            with pytest.raises(StripeBusy):
                cache.set(b"new %d" % i, value)
    del claims, seg
    for _ in range(100):  # the hand has passed 32 claims each time
        with contextlib.suppress(NoRoom):
            cache.set(b"new", value)
            break
    assert cache.get(b"new") == value
    _sweep.settle(cache)


def test_an_overflow_lock_that_is_in_the_way_is_said(make):
    """A chain has nothing but claims, and whether there is a bucket more nobody can see: StripeBusy, not that there is no room."""
    cache = make("64M", lock_limit=0.05)
    with living(cache) as token:
        cache.views(writable=True).header["overflow_word"] = token
        with pytest.raises(StripeBusy):
            for i in range(1_000_000):
                cache.claim(b"claim %d" % i, 1000.0)
    cache.claim(b"claim %d" % i, 1000.0)


def test_a_signal_is_heard_among_chunks_of_the_dead(make):
    """Each of them has its stripe in the hand of a living process that does not run."""
    cache = make("4M", lock_limit=0.2)
    before = cache.views().stripes["count"].copy()
    cache.set(b"n0", bytes(30_000))
    cache.set(b"n1", bytes(30_000))
    seg = cache.views(writable=True)
    stripes = np.flatnonzero(seg.stripes["count"] != before)
    cls = next(i for i, c in enumerate(cache.stats()["slab_classes"]) if c["live"])
    pages = np.flatnonzero((seg.pages["cls"] & 0xFFFF) == cls)
    seg.items(cls)["word"][pages] = RETIRED << 56 | DEAD

    def handler(signum, frame):
        raise TimeoutError

    with living(cache) as token:
        seg.stripes["word"][stripes] = token
        cache.lock_limit = 0.001
        claims = held_by_claims(cache)
        cache.lock_limit = 30.0
        former = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)  # one that comes between two slices of the wait is not heard
        began = time.monotonic()
        try:
            with pytest.raises(TimeoutError):
                cache.set(b"new", bytes(30_000))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, former)
        assert time.monotonic() - began < 15.0
    del claims, seg
    cache.lock_limit = 0.2
    _sweep.settle(cache)


def test_a_value_that_was_made_a_claim_by_damage_is_claimed_over(place):
    place.item["flags"] = 2
    assert place.cache.get(b"k") is None
    version = place.cache.claim(b"k", 10.0)
    assert version > 0
    assert place.cache.fill_claim(b"k", b"new", version)
    settled(place)
    assert place.cache[b"k"] == b"new"


def test_pages_of_a_head_that_is_freed_go_before_another_item_lives_there(make):
    """Its owner died before he freed them; the hand frees the head for a small value, and no page still names it."""
    cache = make("8M")
    cache.set(b"big", bytes(200_000))
    cls = next(i for i, c in enumerate(cache.stats()["slab_classes"]) if c["live"])
    seg = cache.views(writable=True)
    pages = np.flatnonzero(seg.pages["word"] >> 56 == 4)
    head = int(seg.pages["head"][pages[0]])
    item = np.ndarray((1,), seg.items(0).dtype, buffer=seg.bytes, offset=head * 16)
    b, slot = map(int, np.argwhere(seg.buckets["slot"] & ADDR == head)[0])
    item["word"] = RETIRED << 56 | DEAD
    seg.buckets["slot"][b, slot] = 0
    seg.stripes["count"][b & 1023] = 1 << 32
    size = int(seg.classes["chunk_bytes"][cls]) - 100
    n = 0
    while int(item["word"][0]) != LIVE << 56:
        cache.set(b"%d" % n, bytes(size))
        n += 1
        assert n < 10_000
    assert not (seg.pages["head"][pages] == head).any()
    assert cache.verify() == []
    del seg, item


def test_a_damaged_version_takes_no_stripes_versions_with_it(make):
    """A touch was not finished, and its item's version is the highest number there is: the next is not 0, below all that were given out."""
    cache = make("4M", stripes=1)
    cache.set(b"k", 1)
    cache.set(b"other", 1)
    seg = cache.views(writable=True)
    seq = int(seg.stripes["seq"][0])
    slot = int(seg.buckets["slot"][seg.buckets["slot"] != 0][0])
    item = np.ndarray((1,), seg.items(0).dtype, buffer=seg.bytes, offset=(slot & ADDR) * 16)
    item["cas"] = (1 << 64) - 1
    seg.stripes["old"][0] = 4 << 56 | slot & ADDR
    seg.stripes["word"][0] = DEAD
    cache.set(b"new", 1)
    assert int(seg.stripes["seq"][0]) == seq + 2 and int(item["cas"][0]) == seq + 1
    assert cache.stats()["takeovers"] == 1 and cache.verify() == []
    del seg, item
