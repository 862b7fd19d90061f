"""Snapshots, restore, dump and load: what comes back, beside whom, and what bad surroundings do."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import multiprocessing as mp
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest

import shmcache
from shmcache import cache as cache_module
from shmcache import codec, errors, segment
from shmcache.core import _core, _stream
from shmcache.supervisor import datadir, dump, snapshot
from shmcache.supervisor import format as fmt

LIMIT = 60  # seconds, of any wait


def admin(*args, **kwargs):
    argv = [sys.executable, "-c", "import sys; from shmcache.cli import admin; sys.exit(admin())", *map(str, args)]
    return subprocess.run(argv, capture_output=True, check=False, timeout=LIMIT, text=kwargs.pop("text", True), **kwargs)


def until(condition):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


@pytest.fixture
def folder(tmp_path):
    with datadir.take(tmp_path / "data") as folder:
        yield folder


@pytest.fixture
def restored(name, make):
    """restored(folder, **options) -> (report, cache): the segment of that name, unlinked and restored; verified afterwards."""
    opened = []

    def go(folder, **options):
        with contextlib.suppress(shmcache.SegmentNotFound):
            shmcache.unlink(name)
        report = snapshot.restore(name, folder, **options)
        opened.append(shmcache.attach(name))
        return report, opened[-1]

    yield go
    for cache in opened:
        assert cache.verify() == []
        assert not cache.durability()["restoring"]
        cache.close()


# ---- what comes back --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("size", ["32M", "64M", "33554432"])
def test_everything_comes_back(make, restored, folder, size, compress):
    cache = make("32M", default_ttl=9999, max_value="2M", stripes=256, max_processes=17)
    values = {
        b"bytes": os.urandom(100), b"empty": b"", b"str": "é\ud800", b"int": -5, b"large int": 1 << 80, b"tuple": (1, [2.5, None]),
        b"when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), b"page": os.urandom(70_000), b"big": os.urandom(1_900_000),
        b"k" * 4096: {"a": {1, 2}},
    }  # fmt: skip
    for i in range(20_000):
        values[b"many%d" % i] = b"%d" % i
    cache.set_many(values)
    cache.incr("counter", 3, default=0)
    users = cache.namespace("users")
    users.set("u", "in a namespace")
    os.chmod(f"/dev/shm/shmcache.{cache.name}", 0o640)
    cache.set("soon", 1, ttl=500)
    cache.persist("int")
    cache.set("gone", 1, ttl=0.001)
    cache.delete("many7")
    del values[b"many7"]
    lives = {k: cache.ttl(k) for k in ("soon", "int", "str")}
    versions = {k: cache.gets(k)[1] for k in values}
    written = snapshot.write(cache, folder, compress=compress)
    assert written["items"] >= len(values) + 4

    report, cache = restored(folder, size=size)
    assert (report["dropped"], report["present"], report["damaged"], report["cleared"]) == (0, 0, [], False)
    assert cache.get_many(values) == values
    assert cache.get("counter") == 3
    assert cache.get("gone") is None and cache.get("many7") is None
    for k, left in lives.items():
        assert cache.ttl(k) == left or left - LIMIT < cache.ttl(k) <= left
    for k, version in versions.items():
        assert cache.gets(k) == (values[k], version)
    assert cache.namespace("users").get("u") == "in a namespace"
    assert os.stat(f"/dev/shm/shmcache.{cache.name}").st_mode & 0o777 == 0o640
    assert cache.cas("str", "new", versions[b"str"])
    assert not cache.cas("str", "newer", versions[b"str"])
    assert cache.gets("str")[1] > max(versions.values())
    settings = cache.mapping.settings()
    assert (settings["stripes"], settings["max_processes"], settings["default_ttl_ms"]) == (256, 17, 9_999_000)


def test_the_hottest_fit_into_less(make, restored, folder):
    cache = make("32M")
    for i in range(100_000):
        cache.set(b"%d" % i, b"v" * 100)
    hot = [b"%d" % i for i in random.Random(2).sample(range(100_000), 5000)]
    for _ in range(3):
        cache.get_many(hot)
    snapshot.write(cache, folder)
    report, cache = restored(folder, size="4M")
    assert report["dropped"] > 50_000
    assert report["stored"] + report["dropped"] == report["items"]
    there = len(cache.get_many(hot))
    assert there > 0.99 * len(hot)  # but for chains that found no overflow bucket


@pytest.mark.parametrize("optimized", [[], ["-O"]], ids=["", "-O"])
@pytest.mark.parametrize("restored_seq", [0, -1])
def test_what_is_restored_has_versions(make, name, restored_seq, optimized):
    """Without, it would be a segment into which nothing is restored: workers would be let in at once."""
    make("8M")
    code = f"""
from shmcache import attach, cache, errors
try:
    cache.create_restored({(name + "b")!r}, {restored_seq}, 1, attach({name!r}).mapping.settings())
except errors.InvalidConfig as e:
    print(e)
"""
    out = subprocess.run([sys.executable, *optimized, "-c", code], capture_output=True, text=True, check=False, timeout=LIMIT)
    assert str(restored_seq) in out.stdout, out.stderr
    assert not os.path.exists(segment.check_name(name + "b"))


def test_lives_go_on_while_the_segment_is_not_there(make, restored, folder, monkeypatch):
    cache = make("8M")
    cache.set("short", 1, ttl=100)
    cache.set("long", 1, ttl=10_000)
    snapshot.write(cache, folder)
    payloads = [bytes(p) for _, p in fmt.Reader(folder / fmt.snapshot_name(1), "snapshot").blocks()]
    ms = {r.key: r.expires_ms - time.time() * 1000 for p in payloads for r in fmt.records(p)}
    assert ms[b"short"] + LIMIT * 1000 > 99_000 and ms[b"short"] <= 100_100
    into = cache_module.create_restored(cache.name + "b", 100, 1, cache.mapping.settings())
    try:
        restore = _stream.Restore(into)
        for p in payloads:
            restore.put(p, 200_000)  # as if the clock were 200 s further
        assert (restore.stored, restore.expired) == (1, 1)
        assert 9_700 < into.ttl("long") < 9_801
    finally:
        shmcache.unlink(into.name)
        into.close()


def test_a_clock_set_back_makes_no_life_longer(make, restored, folder, monkeypatch):
    cache = make("8M")
    cache.set("k", 1, ttl=100)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)  # the head says an hour later than it is
    snapshot.write(cache, folder)
    monkeypatch.undo()
    report, cache = restored(folder)
    assert 3590 < report["clock_back_s"] <= 3600
    assert report["expired"] == 1  # an hour is over, for all that is known


# ---- beside workers -----------------------------------------------------------------------------------------------------------------


def write_numbers(name, keys, go, numbers):
    """Each key's value is a number that only grows; numbers[i] is what key i has had at least."""
    cache = shmcache.attach(name)
    rng = random.Random(os.getpid())
    go.wait()
    while go.is_set():
        for _ in range(100):
            i = rng.randrange(len(keys))
            if rng.random() < 0.1 and i % 2:
                cache.delete(keys[i])
            cache.set(keys[i], numbers[i] + 1)
            numbers[i] += 1


def test_each_key_is_as_it_was_at_some_instant_of_the_walk(make, restored, folder):
    cache = make("16M", stripes=64)
    n = 6000
    keys = [b"k%d" % i for i in range(n)]
    context = mp.get_context("fork")
    numbers = [mp.RawArray("q", n) for _ in range(2)]
    for half in range(2):
        for i in range(half, n, 2):
            cache.set(keys[i], 0)
    go = context.Event()
    workers = [
        context.Process(target=write_numbers, args=(cache.name, keys[half::2], go, numbers[half]), daemon=True) for half in range(2)
    ]
    for p in workers:
        p.start()
    go.set()
    spans = []
    try:
        for _ in range(5):
            before = [list(numbers[0]), list(numbers[1])]
            snapshot.write(cache, folder)
            spans.append((before, [list(numbers[0]), list(numbers[1])]))
    finally:
        go.clear()
        for p in workers:
            p.join(LIMIT)
    assert sum(spans[-1][1][0]) > sum(spans[0][0][0]) + 1000, "nobody wrote"
    before, after = spans[-1]
    _, cache = restored(folder)
    for i in range(n):
        half, at = i % 2, i // 2
        value = cache.get(keys[i])
        if value is None:
            assert at % 2, f"{keys[i]} is never deleted, and is gone"
        else:
            assert before[half][at] <= value <= after[half][at] + 1  # a set is counted after it is done


def test_what_workers_do_meanwhile_wins(make, folder, name):
    cache = make("16M")
    for k in ("kept", "set", "deleted", "set and deleted", "popped", "expired", "claimed"):
        cache.set(k, "old")
    snapshot.write(cache, folder)
    found = snapshot.Found(folder / fmt.snapshot_name(1))
    into = cache_module.create_restored(name + "b", found.newest + snapshot.VERSIONS_AHEAD, 1, found.settings)
    try:
        into.set("set", "new")
        assert not into.delete("deleted")
        into.set("set and deleted", "new")
        into.delete("set and deleted")
        assert into.pop("popped") is None
        into.set("expired", "new", ttl=0.001)
        until(lambda: into.get("expired") is None)
        with into.lock("claimed"):
            pass
        restore = _stream.Restore(into)
        with fmt.Reader(found.path, "snapshot") as reader:
            for _, payload in reader.blocks():
                restore.put(payload)
        with pytest.raises(shmcache.UsageError, match="being restored"):
            snapshot.write(into, folder)
        late = _stream.Restore(into)
        restore.finish()
        into.delete("kept")
        with fmt.Reader(found.path, "snapshot") as reader:
            for _, payload in reader.blocks():
                late.put(payload)
        assert late.cleared and into.get("kept") is None  # who comes late stores nothing
        into.set("kept", "old")
        got = into.get_many(["kept", "set", "deleted", "set and deleted", "popped", "expired", "claimed"])
        assert got == {"kept": "old", "set": "new", "claimed": "old"}
        assert into.gets("set")[1] > found.newest
        assert into.verify() == []
        with pytest.raises(shmcache.UsageError, match="restored already"):
            _stream.Restore(into)
    finally:
        shmcache.unlink(into.name)
        into.close()


def test_what_was_written_and_evicted_meanwhile_does_not_come_back_old(make, folder, name):
    cache = make("8M")
    keys = [b"k%d" % i for i in range(2000)]
    for k in keys:
        cache.set(k, b"old" * 30)
    snapshot.write(cache, folder)
    found = snapshot.Found(folder / fmt.snapshot_name(1))
    into = cache_module.create_restored(name + "b", found.newest + snapshot.VERSIONS_AHEAD, 1, found.settings)
    try:
        for k in keys:
            into.set(k, b"new" * 30)
        for i in range(200_000):  # evicts them all
            into.set(b"other%d" % i, b"v" * 90)
        left = set(into.get_many(keys))
        assert len(left) < 200
        restore = _stream.Restore(into)
        with fmt.Reader(found.path, "snapshot") as reader:
            for _, payload in reader.blocks():
                restore.put(payload)
        assert restore.stored == 0
        assert not [k for k, v in into.get_many(keys).items() if v != b"new" * 30]
        assert into.verify() == []
    finally:
        shmcache.unlink(into.name)
        into.close()


def test_a_version_given_out_after_the_snapshot_is_given_out_to_nobody_else(make, restored, folder):
    cache = make("8M")
    cache.set("k", "one")
    snapshot.write(cache, folder)
    cache.set("k", "two")
    held = cache.gets("k")[1]
    _, cache = restored(folder)
    cache.set("k", "three")
    assert not cache.cas("k", "the client's", held)


def test_a_namespace_waits_for_its_generation(make, folder, name):
    cache = make("16M")
    cache.namespace("n").set("k", "old")
    cache.namespace("cleared").set("k", "old")
    cache.namespace("cleared").clear()
    snapshot.write(cache, folder)
    (found,), _ = snapshot.find(folder)
    into = cache_module.create_restored(name + "b", found.newest + snapshot.VERSIONS_AHEAD, 1, found.settings)
    try:
        got = []
        asker = threading.Thread(target=lambda: got.append(into.namespace("n").get("k")))
        asker.start()
        restore = _stream.Restore(into)
        found.check(lambda payload: restore.put(payload, generations=True))
        assert restore.stored == 2
        restore.generations_done()
        asker.join(LIMIT)
        found.check(restore.put)
        restore.finish()
        assert into.namespace("n").get("k") == "old"
        assert into.namespace("cleared").get("k") is None
    finally:
        shmcache.unlink(into.name)
        into.close()


def test_what_was_cleared_during_the_walk_stays_cleared(make, restored, folder):
    cache = make("16M")
    cache.set_many({b"%d" % i: b"v" * 100 for i in range(50_000)})
    turns = []

    def clear(done, total):
        turns.append(done)
        if len(turns) == 3:
            cache.clear()
            cache.set("after", 1)

    written = snapshot.write(cache, folder, progress=clear)
    assert 5000 < written["items"] < 50_000
    report, cache = restored(folder)
    assert report["stored"] <= 1
    assert set(cache.scan()) <= {b"after"}


def test_a_counter_and_its_version_belong_together(make):
    """incr counts the value, then the version; n and its version count up alike from the first."""
    cache = make("8M", stripes=1)
    cache.set("n", 0)
    offset = cache.gets("n")[1]
    child = os.fork()
    if child == 0:
        while True:
            cache.incr("n")
    try:
        until(lambda: cache["n"] > 1000)
        for _ in range(300):
            walk = _stream.Walk(cache)
            while walk.block():
                with memoryview(walk) as payload:
                    (r,) = fmt.records(payload)
                assert r.version == offset + int.from_bytes(r.value, "little")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_chain_that_leads_round_and_round_is_copied_once(make):
    cache = make("8M")
    for i in range(40_000):
        cache.set(b"%d" % i, b"v" * 60)
    segment = cache.views(writable=True)
    linked = [b for b in range(len(segment.buckets)) if segment.buckets["overflow"][b]]
    link = int(segment.buckets["overflow"][linked[0]])
    behind = int(segment.overflow["next"][link - 1])
    segment.overflow["next"][link - 1] = link
    walk = _stream.Walk(cache)
    keys = []
    while walk.block():
        with memoryview(walk) as payload:
            keys += [r.key for r in fmt.records(payload)]
    assert walk.damaged > 0
    assert len(keys) == len(set(keys)) >= 39_000
    segment.overflow["next"][link - 1] = behind
    del segment


def test_a_clear_ends_a_restore(make, folder, name):
    cache = make("8M")
    cache.set_many({b"%d" % i: b"old" for i in range(1000)})
    snapshot.write(cache, folder)
    found = snapshot.Found(folder / fmt.snapshot_name(1))
    into = cache_module.create_restored(name + "b", found.newest + snapshot.VERSIONS_AHEAD, 1, found.settings)
    try:
        into.clear()  # nothing is there yet, and what comes is to be cleared all the same
        restore = _stream.Restore(into)
        with fmt.Reader(found.path, "snapshot") as reader:
            for _, payload in reader.blocks():
                restore.put(payload)
        assert restore.cleared
        assert restore.stored == 0 and len(into) == 0
    finally:
        shmcache.unlink(into.name)
        into.close()


RESTORE = """
import os, sys
from shmcache.supervisor import datadir, snapshot
def stop(done, total):
    global turns
    turns += filling
    if turns == 2:
        os.kill(os.getpid(), 9)
turns = filling = 0
put_all = snapshot._put_all
def fill(*args):
    global filling
    filling = not args[-2]
    put_all(*args)
snapshot._put_all = fill
with datadir.take(sys.argv[2]) as folder:
    snapshot.restore(sys.argv[1], folder, progress=stop)
"""


def test_a_restore_that_was_killed_is_completed(make, tmp_path, name):
    cache = make("32M")
    values = {b"k%d" % i: b"old" * 20 for i in range(50_000)}
    cache.set_many(values)
    with datadir.take(tmp_path / "data") as folder:
        snapshot.write(cache, folder)
    shmcache.unlink(name)
    killed = subprocess.run([sys.executable, "-c", RESTORE, name, str(tmp_path / "data")], check=False, timeout=LIMIT)
    assert killed.returncode == -signal.SIGKILL
    half = shmcache.attach(name)
    assert half.durability()["restoring"]
    assert 0 < len(half) < len(values)
    half.set(b"k49999", b"new")
    half.delete(b"k0")
    half.close()
    out = admin("restore", name, "--data-dir", tmp_path / "data", "--json")
    assert out.returncode == 0, out.stderr
    with shmcache.attach(name) as whole:
        values |= {b"k49999": b"new"}
        del values[b"k0"]
        missing = [k for k in values if whole.get(k) != values[k]]
        assert len(missing) < 10  # the keys that share their bit with k0
        assert whole.verify() == []
    again = admin("restore", name, "--data-dir", tmp_path / "data")
    assert again.returncode == 1 and "exists" in again.stderr


# ---- files and directories --------------------------------------------------------------------------------------------------------------


def test_the_last_ones_are_kept_and_leavings_go(make, folder):
    cache = make("8M")
    (folder / "snapshot-000000000009.shmcache.tmp").write_bytes(b"half")
    (folder / "precious.tmp").write_bytes(b"somebody's")
    for i in range(4):
        cache.set("n", i)
        snapshot.write(cache, folder, keep=3)
    assert sorted(p.name for p in folder.iterdir()) == [datadir.LOCK_NAME, "precious.tmp", *(fmt.snapshot_name(n) for n in (2, 3, 4))]


def test_a_segment_is_restored_only_so_often(make, folder, name):
    """Each restore goes on with a higher epoch, and they have 32 bits: it says so, and leaves everything."""
    cache = make("8M")
    cache.set("k", 1)
    cache.views(writable=True).header["epoch"] = snapshot.EPOCHS - snapshot.EPOCHS_AHEAD
    cache.set("k", 2)
    snapshot.write(cache, folder)
    shmcache.unlink(name)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(shmcache.UsageError, match="there are no higher numbers"):
        snapshot.restore(name, folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    with pytest.raises(shmcache.SegmentNotFound):
        shmcache.attach(name)


def test_snapshots_of_a_segment_that_was_not_restored_stay(make, restored, folder, name):
    cache = make("8M")
    cache.set("precious", 1)
    for _ in range(2):
        snapshot.write(cache, folder)
    shmcache.unlink(name)
    with shmcache.create(name, "8M") as other:  # by a worker that was faster than who restores
        assert not datadir.is_of(other, folder)
        for _ in range(3):
            snapshot.write(other, folder)
    assert [n for n, _ in fmt.listing(folder)[0]] == [1, 2, 4, 5]
    for n in (4, 5):
        (folder / fmt.snapshot_name(n)).unlink()
    _, cache = restored(folder)
    assert cache["precious"] == 1
    for _ in range(3):
        snapshot.write(cache, folder)
    assert len(fmt.listing(folder)[0]) == 2


def test_an_item_whose_version_is_damaged_keeps_no_other_from_being_restored(make, restored, folder):
    cache = make("8M")
    cache.set_many({b"k%d" % i: i for i in range(50)})
    segment = cache.views(writable=True)
    address = int(segment.buckets["slot"][segment.buckets["slot"] != 0][0]) & (1 << 48) - 1
    item = np.ndarray((1,), segment.items(0).dtype, buffer=segment.bytes, offset=address * 16)
    item["cas"] |= np.uint64(1 << 63)
    del item, segment
    assert any("I8" in line for line in cache.verify())
    assert snapshot.write(cache, folder)["damaged"] == 1
    cache.close()
    _, cache = restored(folder)
    assert len(cache) == 49
    cache.set("new", 1)
    assert cache.gets("new")[1] < 1 << 62


def test_a_damaged_one_is_named_and_the_one_before_is_used(make, restored, folder):
    cache = make("8M")
    cache.set("n", 1)
    snapshot.write(cache, folder)
    cache.set("n", 2)
    snapshot.write(cache, folder)
    newest = folder / fmt.snapshot_name(2)
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    report, cache = restored(folder)
    assert cache["n"] == 1
    assert len(report["damaged"]) == 1 and str(newest) in report["damaged"][0]
    (folder / fmt.snapshot_name(1)).write_bytes(b"")
    with pytest.raises(errors.NoSnapshot, match=r"(?s)snapshot-000000000001.*snapshot-000000000002"):
        restored(folder)
    with pytest.raises(errors.SegmentNotFound):
        shmcache.attach(cache.name)
    newest.write_bytes(whole)
    assert restored(folder)[1]["n"] == 2


def test_every_truncation_and_any_flip_gives_no_wrong_value(make, folder, name):
    """What check() has let through, the restore then reads."""
    cache = make("8M")
    for i in range(20):
        cache.set(b"k%d" % i, b"v%d" % i)
    snapshot.write(cache, folder)
    path = folder / fmt.snapshot_name(1)
    whole = path.read_bytes()
    def whole_ones():
        for found in snapshot.find(folder)[0]:
            with contextlib.suppress(errors.DamagedFile):
                yield found.check()

    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        assert not list(whole_ones())
    rng = random.Random(1)
    for _ in range(500):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with contextlib.suppress(errors.NewerFormat):
            assert not list(whole_ones())
    path.write_bytes(whole)
    assert len(list(whole_ones())) == 1


def test_a_directory_in_use_or_of_another_segment_is_refused(make, folder, name):
    cache = make("8M")
    with pytest.raises(errors.DataDirInUse), datadir.take(folder):
        pass
    snapshot.write(cache, folder)
    with shmcache.create(name + "b", "8M") as other:
        try:
            with pytest.raises(errors.ForeignDataDir, match=name):
                snapshot.write(other, folder)
            assert other.durability()["snapshot_failed"] and other.durability()["snapshot_age_s"] is None
        finally:
            shmcache.unlink(other.name)
    with pytest.raises(errors.ForeignDataDir):
        snapshot.restore(name + "c", folder)


def test_a_newer_format_is_refused(make, folder, restored, monkeypatch):
    cache = make("8M")
    monkeypatch.setattr(fmt, "FORMAT", fmt.FORMAT + 1)
    snapshot.write(cache, folder)
    monkeypatch.undo()
    with pytest.raises(errors.NewerFormat):
        restored(folder)


def test_no_room_leaves_the_snapshot_before_and_the_segment(make, folder):
    cache = make("16M")
    cache.set_many({b"%d" % i: b"v" * 100 for i in range(20_000)})
    snapshot.write(cache, folder)
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            snapshot.write(cache, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    assert sorted(p.name for p in folder.iterdir()) == [datadir.LOCK_NAME, fmt.snapshot_name(1)]
    assert cache.durability()["snapshot_failed"]
    snapshot.write(cache, folder)
    assert not cache.durability()["snapshot_failed"]
    assert len(cache) == 20_000


def test_a_directory_that_cannot_be_made_is_said(make, tmp_path):
    cache = make("8M")
    with datadir.take(tmp_path / "other") as folder, shmcache.create(cache.name + "b", "8M") as other:
        snapshot.write(other, folder)
        shmcache.unlink(other.name)
    out = admin("snapshot", cache.name, "--data-dir", tmp_path / "other")
    assert out.returncode == 1
    assert other.name in out.stderr and "Traceback" not in out.stderr
    (tmp_path / "file").write_text("")
    out = admin("snapshot", cache.name, "--data-dir", tmp_path / "file" / "data")
    assert out.returncode == 1
    assert "file" in out.stderr and "Traceback" not in out.stderr


# ---- the supervisor, the commands --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def supervising(name, *args):
    argv = [sys.executable, "-m", "shmcache.cli", "supervise", name, *map(str, args)]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    said = []
    while not said or not said[-1].startswith("supervising"):
        said.append(process.stderr.readline())
        assert said[-1], f"it ended: {said}"
    try:
        yield process, said
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_supervisor_writes_them_and_restores_at_its_start(name, tmp_path):
    data = tmp_path / "data"
    with supervising(name, "--size", "8M", "--data-dir", data, "--snapshot-every", 0.2) as (process, _), shmcache.attach(name) as cache:
        cache.set("k", 1)
        assert cache.stats()["durability"]["snapshot_failed"] is False
        until(lambda: len(fmt.listing(data)[0]) == 2)
        cache.set("k", 2)
        out = admin("snapshot", name, "--json")
        assert out.returncode == 0, out.stderr
        assert json.loads(out.stdout)["snapshot_age_s"] < LIMIT
        process.kill()
        process.wait()
    shmcache.unlink(name)
    with supervising(name, "--size", "8M", "--data-dir", data, "--snapshot-every", 1000) as (process, said), shmcache.attach(name) as cache:
        assert any("restored 1 items" in line for line in said)
        assert cache["k"] == 2
        busy = admin("snapshot", name, "--data-dir", data)
        assert busy.returncode == 1 and "another process" in busy.stderr
        cache.set("k", 3)
        process.terminate()  # one more at its end
        assert process.wait(LIMIT) == 0
    shmcache.unlink(name)
    with supervising(name, "--data-dir", data), shmcache.attach(name) as cache:
        assert cache["k"] == 3


def test_who_asks_for_what_cannot_be_is_told(make, name):
    make("8M")
    out = admin("snapshot", name)
    assert out.returncode == 2 and "--data-dir" in out.stderr
    with supervising(name):
        out = admin("snapshot", name)
        assert out.returncode == 1 and "no --data-dir" in out.stderr


def test_a_snapshot_is_stopped_at_the_supervisors_end(make, folder):
    cache = make("8M")
    cache.set("k", os.urandom(100_000))
    stop = threading.Event()
    stop.set()
    with pytest.raises(errors.SnapshotStopped):
        snapshot.write(cache, folder, stop=stop)
    assert [p.name for p in folder.iterdir()] == [datadir.LOCK_NAME]
    assert not cache.durability()["snapshot_failed"]


def test_dump_and_load(make, name, tmp_path):
    cache = make("16M", max_value="4M")
    values = {"b": b"\xff", "s": "\ud800", "i": 7, "huge": 1 << 70, "t": (1, {2}), "f": 1.5, "none": None, "big": os.urandom(3_000_000)}
    cache.set_many(values, ttl=1000)
    cache.set("never", [1])
    with open(tmp_path / "all", "wb") as file:
        subprocess.run([sys.executable, "-c", "from shmcache.cli import admin; admin()", "dump", name], stdout=file, check=True)
    cache.clear()
    out = admin("load", name, input=(tmp_path / "all").read_bytes(), text=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout == b"9 items\n"
    assert cache.get_many(values) == values
    assert cache["never"] == [1] and cache.ttl("never") == float("inf")
    assert 900 < cache.ttl("t") <= 1000
    with shmcache.create(name + "b", "16M", default_ttl=60) as other:
        assert dump.load(other, io.BytesIO((tmp_path / "all").read_bytes())) == 9
        assert other.ttl("never") == float("inf")
        shmcache.unlink(other.name)
    part = io.BytesIO()
    assert dump.dump(cache, part, b"b") == 2
    whole = part.getvalue()
    for cut in (1, len(whole) // 2, len(whole) - 1):
        with pytest.raises(errors.DamageError, match=r"cut|no msgpack"):
            dump.load(cache, io.BytesIO(whole[:cut]))
    for wrong in (b"\x01", b"\xc1", b"\x81\xa3key\x01", b"hello, world", b"\x82\xa3key\xc4\x01k\xa6pickle\x05", b"\x81\x90\x01"):
        with pytest.raises(errors.DamageError):
            dump.load(cache, io.BytesIO(wrong))
    assert dump.load(cache, io.BytesIO(b"")) == 0


def test_what_carries_tags_is_dumped_with_them(make):
    cache = make("8M")
    cache.set("a", [1], 100, ("t", "u"))
    cache.set("b", b"b", tags=("gone",))
    cache.invalidate_tag("gone")
    cache._put_negative("c", 100)
    cache.get_or_set("d", lambda: 4, 50, stale_ttl=1000)
    out = io.BytesIO()
    assert dump.dump(cache, out) == 2
    cache.clear()
    cache.invalidate_tag("t")
    assert dump.load(cache, io.BytesIO(out.getvalue())) == 2
    assert cache["a"] == [1]
    assert cache["d"] == 4
    assert 49 < cache.ttl("d") <= 50
    cache.invalidate_tag("u")
    assert cache.get("a") is None
    wrong = io.BytesIO(b"\x83\xa3key\xc4\x01k\xa5value\x05\xa4tags\x05")
    with pytest.raises(errors.DamageError, match="tags"):
        dump.load(cache, wrong)
    cache.set("bad", _core.Encoded(5, b"short"))
    with pytest.raises(errors.DamageError, match="bad"):
        dump.dump(cache, io.BytesIO())


def test_what_is_in_a_namespace_is_dumped_with_its_name(make):
    """What another segment's namespace has stays beside it."""
    cache = make("8M")
    space, gone = cache.namespace("users"), cache.namespace("db:1")
    space.set("cleared", 1)
    gone.set("evicted", 1)
    space.clear()
    space.set_many({"a": [1], "b": b"b"}, 100)
    space.set("tagged", 1, tags=("t",))
    cache.set_many({b"\0ns\0": 3, b"\0ns\0short\0key": 4, "plain": 5})
    cache.delete(b"\0ns\0db:1")
    out = io.BytesIO()
    assert dump.dump(cache, out) == 6
    items = {(item.get("namespace"), item["key"]): item["value"] for item in msgpack.Unpacker(io.BytesIO(out.getvalue()))}
    assert items == {
        (b"users", b"a"): [1], (b"users", b"b"): b"b", (b"users", b"tagged"): 1, (None, b"\0ns\0"): 3, (None, b"\0ns\0short\0key"): 4,
        (None, b"plain"): 5,
    }  # fmt: skip
    cache.clear()
    space.set_many({"a": "replaced", "stays": 6})
    assert dump.load(cache, io.BytesIO(out.getvalue())) == 6
    assert space.get_many(["a", "b", "tagged", "stays", "cleared"]) == {"a": [1], "b": b"b", "tagged": 1, "stays": 6}
    assert 90 < space.ttl("a") <= 100
    cache.invalidate_tag("t")
    assert space.get("tagged") is None

    by_hand = msgpack.packb({"namespace": "users", "key": "c", "value": 7})
    assert dump.load(cache, io.BytesIO(by_hand)) == 1
    assert space.get("c") == 7
    with pytest.raises(errors.DamageError, match="namespace"):
        dump.load(cache, io.BytesIO(msgpack.packb({"namespace": 5, "key": b"k", "value": 1})))
    with pytest.raises(errors.InvalidNamespace):
        dump.load(cache, io.BytesIO(msgpack.packb({"namespace": b"a\0b", "key": b"k", "value": 1})))


def test_tags_and_stale_times_are_restored(make, restored, folder):
    cache = make("8M")
    cache.set("a", "kept", tags=("t",))
    cache.set("b", "gone", tags=("u",))
    cache.invalidate_tag("u")
    cache.get_or_set("c", lambda: "fresh for long", 5000, stale_ttl=1000)
    cache._put_negative("d", 5000)
    cache.set("e", "late", tags=("v",))
    cache.set("f", os.urandom(100_000), tags=("t",))
    big = cache["f"]
    snapshot.write(cache, folder)
    _, after = restored(folder)
    assert after["a"] == "kept"
    assert after["f"] == big
    assert after.get("b") is None
    assert after["c"] == "fresh for long"
    assert 4990 < after.ttl("c") <= 5000
    assert after._look("d")[0] == codec.NEGATIVE
    after.invalidate_tag("v", "t")
    assert after.get_many(["a", "e", "f"]) == {}


def test_a_tag_waits_for_its_generation(make, folder, name):
    """Generations come first: a set with a tag waits for its one, so that what the snapshot has of that tag stays with it."""
    cache = make("16M")
    cache.set("k", "old", tags=("t",))
    cache.set("gone", "old", tags=("u",))
    cache.invalidate_tag("u")
    snapshot.write(cache, folder)
    (found,), _ = snapshot.find(folder)
    into = cache_module.create_restored(name + "b", found.newest + snapshot.VERSIONS_AHEAD, 1, found.settings)
    try:
        setter = threading.Thread(target=lambda: into.set("new", 1, tags=("t", "u")))
        setter.start()
        restore = _stream.Restore(into)
        found.check(lambda payload: restore.put(payload, generations=True))
        assert restore.stored == 2
        restore.generations_done()
        setter.join(LIMIT)
        found.check(restore.put)
        restore.finish()
        assert into["k"] == "old"
        assert into["new"] == 1
        assert into.get("gone") is None
        into.invalidate_tag("t")
        assert into.get_many(["k", "new"]) == {}
    finally:
        shmcache.unlink(into.name)
        into.close()


def old_dump(items):
    """As versions wrote it that knew of no namespaces: keys as they are in the segment."""
    return b"".join(msgpack.packb({"key": key, "value": value, "ttl": None}) for key, value in items)


def test_an_old_dump_is_loaded_into_the_generations_that_the_segment_has(make):
    """Wherever a generation stands in it; of two items of a key the later one. What had been cleared does not come back."""
    cache = make("8M")
    users, other, empty = (cache.namespace(name) for name in ("users", "db:1", "empty"))
    users.set_many({"a": "replaced", "stays": 6})
    items = [
        (b"\0ns\0users\0generat1a", 1), (b"\0ns\0users\0clearedXgone", 2), (b"\0ns\0db:1\0generat2c", 3), (b"\0ns\0users", b"generat1"),
        (b"\0ns\0users\0generat1b", [4]), (b"\0ns\0users\0clearedXgone2", 5), (b"plain", 6), (b"\0ns\0short\0key", 7), (b"\0ns\0", 8),
        (b"\0ns\0empty\0generat1d", 9), (b"\0ns\0db:1", b"generat2"), (b"\0ns\0db:1\0generat2", "no name"),
        (b"\0ns\0users\0generat1a", "newer"),
    ]  # fmt: skip
    said = []
    generation = cache[b"\0ns\0users"]
    assert dump.load(cache, io.BytesIO(old_dump(items)), warn=said.append) == 8
    assert users.get_many(["a", "b", "gone", "gone2", "stays"]) == {"a": "newer", "b": [4], "stays": 6}
    assert cache[b"\0ns\0users"] == generation
    assert other.get_many(["c", "e"]) == {"c": 3}
    assert cache[other.prefix()] == "no name"
    assert list(empty.scan()) == []
    assert cache.get_many([b"plain", b"\0ns\0short\0key", b"\0ns\0"]) == {b"plain": 6, b"\0ns\0short\0key": 7, b"\0ns\0": 8}
    assert said == ["3 items were left out: their namespaces had been cleared, or the dump does not have the generations of these"]
    later = [(b"\0ns\0db:1\0generat2d", 9), (b"\0ns\0db:1", b"generat3"), (b"\0ns\0db:1\0generat2c", 3), (b"\0ns\0db:1\0generat3e", 10)]
    other.delete("c")
    assert dump.load(cache, io.BytesIO(old_dump(later))) == 1
    assert other.get_many(["c", "d", "e"]) == {"e": 10}

    cache.clear()
    with pytest.raises(errors.DamageError, match="cut"):
        dump.load(cache, io.BytesIO(old_dump(items[:4]) + b"\x81"))
    assert users.get("a") == 1, "it came before the cut, and its generation behind it"


def test_a_generation_of_whatever_codec_is_one_for_a_dump(make):
    """A client has set it to a number."""
    cache = make("8M")
    cache.set(b"\0ns\0users", 7)
    space = cache.namespace("users")
    space.set("k", 1)
    cache.set("tagged", 2, tags=["t"])
    cache.set(b"\0tag\0t", int.from_bytes(cache[b"\0tag\0t"], "little", signed=True))
    assert (space.get("k"), cache.get("tagged"), cache[b"\0ns\0users"]) == (1, 2, 7)
    out = io.BytesIO()
    assert dump.dump(cache, out) == 2


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (b"\xc1", 1)])
def test_a_load_that_is_stopped_says_how_many_items_are_in(make, name, how, code):
    cache = make("8M")
    argv = [sys.executable, "-c", "import sys; from shmcache.cli import admin; sys.exit(admin())", "load", name]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as loading:
        loading.stdin.write(old_dump((b"k%05d" % i, b"v") for i in range(50_000)))  # more than it reads at once
        loading.stdin.flush()
        until(lambda: len(cache))
        if isinstance(how, bytes):
            loading.stdin.write(how)
            loading.stdin.close()
        while loading.poll() is None:
            if not isinstance(how, bytes):
                loading.send_signal(how)  # again if it had not begun to read just then
            time.sleep(0.05)
        assert loading.returncode == code
        assert loading.stdout.read() == b""
        said = loading.stderr.read()
    n = int(re.search(rb"the load was stopped: ([0-9,]+) items are in", said)[1].replace(b",", b""))
    assert 0 < n <= len(cache) <= n + 1


def test_pickled_values_are_dumped_as_they_are(name, make):
    make("8M")
    with shmcache.attach(name, codec="pickle") as cache:
        cache.set("path", Path("/tmp"))
        out = io.BytesIO()
        assert dump.dump(cache, out) == 1
        cache.clear()
        dump.load(cache, io.BytesIO(out.getvalue()))
        assert cache["path"] == Path("/tmp")


def test_a_data_directory_is_made_and_let_go(tmp_path):
    with datadir.take(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
    with datadir.take(tmp_path / "a" / "b"):
        pass
    shutil.rmtree(tmp_path / "a")


@pytest.mark.parametrize("nice, then", [(0, 10), (15, 15)])
def test_a_thread_that_steps_back_gets_no_more_than_it_had(nice, then):
    had = []

    def go():
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, nice)
        snapshot.step_back(10)
        had.append(os.getpriority(os.PRIO_PROCESS, thread))

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    assert had == [then]
