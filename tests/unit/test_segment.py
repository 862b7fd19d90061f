"""Views, their lifetime, the creation race, and the bytes as an independent reader finds them."""

from __future__ import annotations

import errno
import gc
import multiprocessing as mp
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest

import shmcache
from shmcache import errors
from shmcache.core import _core
from tests.reference_reader import Reader


def test_reference_reader_finds_what_the_core_finds(cache):
    rng = random.Random(4)
    expected = {}
    for i in range(40_000):
        key = b"k" * rng.choice((1, 7, 8, 9, 20)) + b"%d" % i
        value = rng.randbytes(rng.choice((0, 1, 8, 20, 60)))
        cache.set(key, value)
        expected[key] = value
        if rng.random() < 0.1:
            victim = key[:-1] + b"0"
            expected.pop(victim, None)
            cache.delete(victim)
    for size in (33_000, 65_536, 100_000, 200_000, 65_536 * 3 + 32_000):
        expected[b"big%d" % size] = rng.randbytes(size)
        cache.set(b"big%d" % size, expected[b"big%d" % size])
    reader = Reader(cache.segment)
    assert np.count_nonzero(cache.segment.buckets["overflow"]) > 100, "chains are tested, too"
    for key in expected:
        value = cache.get(key)
        assert reader.find(key) == (None if value is None else (0, value))
        assert value in (None, expected[key])
    assert reader.find(b"none") is None
    cache.set("s", "é")
    cache.set("i", -2)
    assert reader.find(b"s") == (1, "é".encode())
    assert reader.find(b"i") == (2, (-2).to_bytes(8, "little", signed=True))
    del reader


def test_views_are_live_typed_and_strided(cache):
    seg = cache.segment
    assert seg.header["n_stripes"] == 1024
    assert len(seg.rows) == 128
    assert seg.rows["pid"].max() == os.getpid()
    items = seg.items(0)
    assert items.strides[1] == 128
    assert seg.classes["chunk_bytes"][0] == 128
    cache.set(b"abc", b"v")
    page = int(np.flatnonzero(seg.pages["word"] >> 56 == 2)[0])
    live = items[page][items[page]["word"] >> 56 == 2]
    assert live["key_bytes"].tolist() == [3]
    assert seg.refs.sum() == 0
    cache.get(b"abc")
    assert seg.refs.sum() == 1
    with pytest.raises(ValueError, match="read-only"):
        seg.header["epoch"] = 7
    del seg, items, live


def test_view_keeps_the_mapping_after_the_handle_is_gone(name, make):
    cache = make("4M")
    cache["k"] = 1
    view = cache.segment.buckets
    with pytest.raises(errors.ViewsInUse):
        cache.close()
    derived = view["version"][::2]
    del view
    with pytest.raises(errors.ViewsInUse):
        cache.close()
    shmcache.unlink(name)
    assert derived.sum() + 1 > 0
    del derived
    gc.collect()
    cache.close()


def create_and_say(name, go, out):
    go.wait()
    try:
        with shmcache.create(name, "4M") as c:
            c["winner"] = os.getpid()
        out.put("won")
    except shmcache.SegmentExists:
        out.put("exists")


def test_of_several_creators_one_wins(name):
    context = mp.get_context("fork")
    for _ in range(10):
        go, out = context.Event(), context.Queue()
        procs = [context.Process(target=create_and_say, args=(name, go, out)) for _ in range(4)]
        for p in procs:
            p.start()
        go.set()
        said = sorted(out.get(timeout=30) for _ in procs)
        for p in procs:
            p.join()
        assert said == ["exists"] * 3 + ["won"]
        with shmcache.attach(name) as c:
            assert c["winner"] in {p.pid for p in procs}
        shmcache.unlink(name)


@pytest.mark.slow
def test_two_creators_at_one_instant(name):
    """1,000 times: one creates, the other attaches to what it made."""
    r, w = os.pipe()
    for _ in range(1000):
        pids = []
        for _ in range(2):
            pids.append(os.fork())
            if pids[-1] == 0:
                try:
                    try:
                        cache, said = shmcache.create(name, "4M"), b"c"
                    except shmcache.SegmentExists:
                        cache, said = shmcache.attach(name), b"a"
                    cache.incr("n", 1, default=0)
                except BaseException:
                    said = b"!"
                os.write(w, said)
                os._exit(0)
        for pid in pids:
            os.waitpid(pid, 0)
        assert sorted(os.read(r, 2)) == sorted(b"ca")
        with shmcache.attach(name) as cache:
            assert cache["n"] == 2
        shmcache.unlink(name)
    os.close(r)
    os.close(w)


def test_a_segment_that_loses_its_name_is_told_from_its_successor(name, make):
    old = make()
    old["k"] = "old"
    assert not old.unlinked
    shmcache.unlink(name)
    assert old.unlinked
    assert old.stats()["unlinked"]
    with shmcache.create(name, "4M") as new:
        assert old.unlinked
        assert not new.unlinked
        assert old["k"] == "old", "never SIGBUS: the memory is the handle's as long as it is open"
        old["k"] = "still"
        assert new.get("k") is None
        with shmcache.attach(name) as again:
            assert again.mapping.identity == new.mapping.identity != old.mapping.identity


def test_a_killed_creator_leaves_nothing(name):
    """The object has no name until it is whole: fork a child that dies between reserving and linking."""
    free = os.statvfs("/dev/shm").f_bavail
    pid = os.fork()
    if pid == 0:
        from shmcache import segment

        segment._link = lambda *a: os.kill(os.getpid(), 9)
        shmcache.create(name, "64M")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    with pytest.raises(errors.SegmentNotFound):
        shmcache.attach(name)
    assert os.statvfs("/dev/shm").f_bavail >= free - 4096


def test_sizes_are_read():
    from shmcache.segment import parse_size

    assert parse_size("4M") == parse_size("4MiB") == parse_size(4 << 20) == parse_size("4096k") == 4 << 20
    assert parse_size("1.5G") == 3 << 29


def test_no_descriptor_is_needed(cache):
    """A daemon closes every descriptor; its row lives by a mapping, and the prober finds its way back by name."""
    pid = os.fork()
    if pid == 0:
        cache.get("k")
        os.closerange(3, 256)
        os.open("/dev/null", os.O_RDONLY)
        ok = len(cache.stats()["processes"]) == 2
        cache["k"] = 5
        os._exit(0 if ok and cache["k"] == 5 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert cache["k"] == 5


def huge_bytes_mapped(name):
    """(address, bytes in huge pages) of this process's mapping of a segment."""
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if line.rstrip().endswith(f"/shmcache.{name}"):
                at = int(line.partition("-")[0], 16)
                return at, next(int(field.split()[1]) << 10 for field in lines if field.startswith("ShmemPmdMapped"))
    raise AssertionError("not mapped")


def test_huge_pages_are_mapped_by_everybody(name, make):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cache = make("64M", huge_pages=True)
    if said:
        assert [w.category for w in said] == [errors.HugePagesRefused]
        pytest.skip(f"the kernel gives no huge pages: {said[0].message}")
    code = "import sys, shmcache; c = shmcache.attach(sys.argv[1]); [c.set(i.to_bytes(4, 'big'), b'v' * 100) for i in range(100_000)]; "
    code += "from tests.unit.test_segment import huge_bytes_mapped; print(*huge_bytes_mapped(sys.argv[1]))"
    out = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True).stdout
    at, mapped = map(int, out.split())
    assert at % (2 << 20) == 0
    assert mapped > 10 << 20
    assert len(cache) == 100_000


def test_refused_huge_pages_are_said(name, monkeypatch):
    monkeypatch.setattr(_core, "format_segment", lambda *args, made=_core.format_segment: made(*args) or errno.EINVAL)
    with pytest.warns(errors.HugePagesRefused, match="Invalid argument"), shmcache.create(name, "4M", huge_pages=True) as cache:
        cache["k"] = 1
