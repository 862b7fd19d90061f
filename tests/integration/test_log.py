"""The append log: what is in it, what a restore makes of it, and what a full ring, a dead supervisor and a broken disk do."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import shmcache
from shmcache import cli, errors
from shmcache.core import _stream
from shmcache.supervisor import appendlog, datadir, snapshot
from shmcache.supervisor import format as fmt
from shmcache.supervisor.appendlog import AppendLog
from shmcache.supervisor.loop import Supervisor

LIMIT = 60  # seconds, of any wait


def until(condition):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


@pytest.fixture
def folder(tmp_path):
    with datadir.take(tmp_path / "data") as folder:
        yield folder


@pytest.fixture
def logged(make, folder):
    """logged(policy, **options) -> (cache, log): the drainer is a thread of this process."""
    logs = []

    def go(policy, size="16M", **options):
        cache = make(size, log_buffer="64K", max_processes=16, **options)
        logs.append(AppendLog(cache, folder, policy))
        return cache, logs[-1]

    yield go
    for log in logs:
        log.close()


def breakable(monkeypatch):
    """[does fsync fail?], for the test to say."""
    fsync, broken = os.fsync, [False]

    def fails(fd):
        if broken[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fails)
    return broken


def restored(name, folder, **options):
    with contextlib.suppress(shmcache.SegmentNotFound):
        shmcache.unlink(name)
    return snapshot.restore(name, folder, **options), shmcache.attach(name)


def records(folder):
    for _, path in fmt.listing(folder)[1]:
        with fmt.Reader(path, "log") as reader:
            for _, payload in reader.blocks():
                yield from fmt.records(payload)


@pytest.mark.parametrize("policy", ["no", "everysec", "always"])
def test_every_operation_is_in_the_log(logged, folder, policy):
    cache, log = logged(policy)
    cache.set("set", 1)
    cache.set("set", 2)
    cache.add("added", "a")
    cache.add("added", "b")
    cache.replace("added", "c", ttl=1000)
    cache.cas("added", "d", cache.gets("added")[1], ttl=1000)
    cache.incr("n", 5, default=0)
    cache.incr("n")
    cache.decr("n", 2)
    cache.set_many({"m1": [1], "m2": (2,)})
    cache.set("deleted", 1)
    cache.delete("deleted")
    cache.set("popped", 1)
    cache.pop("popped")
    cache.set("gone", 1)
    cache.set("gone", 1, ttl=0)
    cache.set("touched", 1)
    cache.touch("touched", 500)
    cache.set("persisted", 1, ttl=500)
    cache.persist("persisted")
    cache.set("big", os.urandom(100_000))
    cache.get_or_set("computed", lambda: "x")
    cache.namespace("ns").set("k", "v")
    cache.set("invalidated", 1, tags=("t",))
    cache.invalidate_tag("t")
    cache.set("tagged", 1, tags=("t", "u"))
    cache.get_or_set("fresh", lambda: 1, 10, stale_ttl=500)
    cache.touch("fresh", 300)
    with cache.lock("locked"):
        pass
    big = cache["big"]
    log.sync()
    versions = {k: cache.gets(k)[1] for k in ("set", "added", "n", "big", "touched")}
    report, after = restored(cache.name, folder)
    with after:
        assert report["snapshot"] is None and report["cut"] == [] and report["dropped"] == 0
        assert after.get_many(["set", "added", "n", "m1", "m2", "touched", "persisted", "big", "computed"]) == {
            "set": 2, "added": "d", "n": 4, "m1": [1], "m2": (2,), "touched": 1, "persisted": 1, "big": big, "computed": "x",
        }  # fmt: skip
        assert not any(after.get(k) for k in ("deleted", "popped", "gone", "locked", "invalidated"))
        assert after["tagged"] == after["fresh"] == 1 and 200 < after.ttl("fresh") <= 300
        after.invalidate_tag("u")
        assert after.get("tagged") is None
        assert 400 < after.ttl("touched") <= 500 and 900 < after.ttl("added") <= 1000 and after.ttl("persisted") == float("inf")
        assert after.namespace("ns").get("k") == "v"
        assert {k: after.gets(k)[1] for k in versions} == versions
        assert after.verify() == []


def test_a_clear_is_in_the_log(logged, folder):
    cache, _ = logged("always")
    cache.set("before", 1)
    cache.clear()
    assert int(cache.segment.header["log_epoch"]) >= 2
    cache.set("after", 1)
    _, after = restored(cache.name, folder)
    with after:
        assert set(after.scan()) == {b"after"}
        after.set("later", 1)
        assert after.get("later") == 1


def test_a_delete_of_an_absent_key_is_logged(logged, folder):
    """An older value may be in a snapshot, or earlier in the log, though it was evicted here."""
    cache, log = logged("always")
    cache.set("k", "old")
    snapshot.write(cache, folder, log=log)
    cache.delete("k")
    cache.delete("k")
    assert [r.op for r in records(folder) if r.key == b"k"].count(fmt.DELETE) >= 2
    _, after = restored(cache.name, folder)
    with after:
        assert after.get("k") is None


def test_a_snapshot_and_the_log_since(logged, folder):
    cache, log = logged("everysec", "32M")
    rng = random.Random(1)
    expected = {}
    for turn in range(3):
        for _ in range(20_000):
            k = b"k%d" % rng.randrange(5000)
            if rng.random() < 0.2:
                cache.delete(k)
                expected.pop(k, None)
            else:
                expected[k] = rng.randbytes(rng.choice((5, 50, 500)))
                cache.set(k, expected[k])
        if turn < 2:
            snapshot.write(cache, folder, log=log)
    log.sync()
    assert fmt.listing(folder)[1][0][0] > 1, "the log before the older snapshot has gone"
    versions = {k: cache.gets(k)[1] for k in expected}
    for size in ("32M", "64M"):
        report, after = restored(cache.name, folder, size=size)
        with after:
            assert report["log_records"] > 10_000
            assert after.get_many(list(expected)) == expected
            assert len(after) == len(expected)
            assert {k: after.gets(k)[1] for k in expected} == versions
            assert after.verify() == []
    # a newest snapshot that is damaged: the one before, and the longer log
    newest = fmt.listing(folder)[0][-1][1]
    newest.write_bytes(newest.read_bytes()[:-1])
    report, after = restored(cache.name, folder)
    with after:
        assert len(report["damaged"]) == 1
        assert after.get_many(list(expected)) == expected and len(after) == len(expected)


def test_what_the_snapshot_has_newer_is_not_taken_from_the_log(logged, folder, monkeypatch):
    """Written behind the new file's beginning and before the walk: in the log, and below the floors."""
    cache, log = logged("always")
    rotate = log.rotate

    def rotate_and_write():
        number = rotate()
        for value in ("old", "new"):
            for key in ("set", "deleted", "touched"):
                cache.set(key, value)
        cache.delete("deleted")
        return number

    monkeypatch.setattr(log, "rotate", rotate_and_write)
    snapshot.write(cache, folder, log=log)
    cache.touch("touched", 500)
    _, after = restored(cache.name, folder)
    with after:
        assert after.get_many(["set", "deleted", "touched"]) == {"set": "new", "touched": "new"}
        assert 400 < after.ttl("touched") <= 500


def test_a_second_crash_before_the_first_snapshot(logged, folder):
    cache, _ = logged("always")
    for i in range(200):
        cache.set(f"k{i}", i)
    cache.clear()
    for i in range(200):
        cache.set(f"k{i}", i)
    _, again = restored(cache.name, folder, log_policy=3)
    with again:
        assert len(again) == 200
        again.lock_limit = 0.05
        with contextlib.suppress(errors.NotDurable):  # before its log begins: it waits in the ring
            again.delete("k7")
        log = AppendLog(again, folder, "always")
        try:
            again.set("more", 1)
        finally:
            log.close()
    for _ in range(2):
        _, third = restored(cache.name, folder)
        with third:
            assert len(third) == 200 and third.get("k7") is None and third["more"] == 1


def test_numbers_of_log_files_are_never_used_again(logged, folder):
    """A snapshot that needs no log has let all files go."""
    cache, log = logged("always")
    for _ in range(3):
        log.rotate()
    log.close()
    appendlog.mark(cache, log_policy=0)  # a supervisor without a log was there
    for _ in range(3):
        snapshot.write(cache, folder)
    assert fmt.listing(folder)[1] == []
    log = AppendLog(cache, folder, "always")
    try:
        assert log.number > 3
        cache.set("k", 1)
    finally:
        log.close()
    _, after = restored(cache.name, folder)
    with after:
        assert after["k"] == 1


def test_files_of_another_segment_are_refused(logged, make, folder, name):
    cache, _ = logged("always")
    cache.set("k", 1)
    with shmcache.create(name + "b", "16M", log_buffer="64K", max_processes=4) as other:
        try:
            with pytest.raises(errors.ForeignDataDir, match=name):
                AppendLog(other, folder, "always")
        finally:
            shmcache.unlink(other.name)
    with pytest.raises(errors.ForeignDataDir):
        snapshot.restore(name + "c", folder)


def test_what_is_not_in_the_table_can_be_in_the_log(logged, folder):
    cache, log = logged("always")
    before = int(cache.segment.header["epoch"])
    cache.clear()  # of a table that is empty, maybe by evictions
    assert int(cache.segment.header["epoch"]) == before + 1
    assert cache.pop("evicted", None) is None
    log.sync()
    assert [(r.op, r.key) for r in records(folder)].count((fmt.DELETE, b"evicted")) == 1


def test_a_snapshot_in_another_directory_heals_nothing(logged, folder, tmp_path):
    cache, _ = logged("everysec")
    _stream.count_gap(cache)
    with datadir.take(tmp_path / "other") as other:
        snapshot.write(cache, other)
    assert cache.durability()["log_gaps"] == 1


def test_the_log_ends_though_its_disk_is_full(make, folder, monkeypatch):
    cache = make("16M", log_buffer="64K", max_processes=16)
    log = AppendLog(cache, folder, "everysec", open_file=Disk)
    monkeypatch.setattr(Disk, "broken", errno.ENOSPC)
    cache.set("k", b"v" * 1000)
    until(lambda: cache.durability()["log_failed"] and log.retry_at)
    first, began = log.retry_at, time.process_time()
    until(lambda: log.retry_at > first)
    assert time.process_time() - began < 0.5, "it waits for the next try, it does not turn round"
    log.close()
    assert len(fmt.listing(folder)[1]) <= 2
    monkeypatch.setattr(Disk, "broken", 0)


def test_lives_of_the_log_and_of_the_snapshot_go_together(logged, folder):
    cache, log = logged("always")
    cache.set("k", "v")
    cache.set("shortened", "v", ttl=5000)
    snapshot.write(cache, folder, log=log)
    cache.touch("k", 700)
    cache.expire("shortened", 600)
    cache.expire("absent", 100)
    _, after = restored(cache.name, folder)
    with after:
        assert after["k"] == "v" and 600 < after.ttl("k") <= 700
        assert 500 < after.ttl("shortened") <= 600


def test_a_missing_file_in_the_middle_is_named(logged, folder):
    cache, log = logged("always")
    for i in range(3):
        cache.set(f"k{i}", i)
        log.rotate()
    path = folder / fmt.log_name(2)
    content = path.read_bytes()
    path.unlink()
    shmcache.unlink(cache.name)
    with pytest.raises(errors.DamagedFile, match=r"log-000000000002.*missing"):
        snapshot.restore(cache.name, folder)
    assert not os.path.exists(f"/dev/shm/shmcache.{cache.name}")
    path.write_bytes(content)
    _, after = restored(cache.name, folder)
    with after:
        assert [after[f"k{i}"] for i in range(3)] == [0, 1, 2]


def test_a_torn_end_is_cut_and_said_and_damage_is_refused(logged, folder):
    cache, _ = logged("always")
    for i in range(50):
        cache.set(f"k{i}", b"v" * 1000)
    (_, path), = fmt.listing(folder)[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    report, after = restored(cache.name, folder)
    with after:
        assert len(report["cut"]) == 1 and str(path) in report["cut"][0]
        assert len(after) == 49
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    shmcache.unlink(cache.name)
    with pytest.raises(errors.DamagedFile, match="byte"):
        snapshot.restore(cache.name, folder)
    with pytest.raises(shmcache.SegmentNotFound):
        shmcache.attach(cache.name)


# ---- rings -------------------------------------------------------------------------------------------------------------------------


def test_a_ring_wraps_and_takes_records_of_any_size(make):
    cache = make("64M", log_buffer="64K", max_processes=4)
    appendlog.mark(cache, log_policy=1)
    drain = _stream.Drain(cache)
    rng = random.Random(3)
    for _ in range(300):
        sent = []
        for _ in range(rng.randrange(1, 40)):
            k, v = b"k%d" % rng.randrange(10**9), rng.randbytes(rng.choice((0, 1, 7, 8, 100, 900)))
            cache.set(k, v)
            sent.append((k, v))
        got = []
        while drain.collect():
            with memoryview(drain) as payload:
                got += [(r.key, r.value) for r in fmt.records(payload)]
            drain.drained()
        assert got == sent
    assert cache.durability()["log_gaps"] == 0 and drain.damaged == 0


def test_a_drainer_that_paces_itself_is_woken_by_a_ring_half_full(make):
    """At the rate so far its ring would be a quarter full in minutes."""
    cache = make("16M", log_buffer="64K", max_processes=4)
    appendlog.mark(cache, log_policy=1)
    drain = _stream.Drain(cache)
    for _ in range(2):
        cache.set("k", b"v" * 100)
        assert drain.collect()
        drain.drained()
        time.sleep(0.5)  # the rate that is measured
    paced = threading.Thread(target=drain.pace, args=(600,), daemon=True)
    paced.start()
    until(lambda: cache.segment.header["log_asleep"])
    for _ in range(400):  # over half of the ring, less than all of it
        cache.set("k", b"v" * 80)
    paced.join(LIMIT)
    assert not paced.is_alive()
    began = time.monotonic()
    drain.pace(600)  # half full already: who filled it does not ring again
    assert time.monotonic() - began < LIMIT
    assert cache.durability()["log_gaps"] == 0


def test_a_large_value_is_fetched_from_the_table(make):
    cache = make("64M", log_buffer="64K", max_processes=4, max_value="10M")
    appendlog.mark(cache, log_policy=1)
    drain = _stream.Drain(cache)

    def drained():
        assert drain.collect()
        with memoryview(drain) as payload:
            got = list(fmt.records(payload))
        drain.drained()
        return got

    value = os.urandom(5_000_000)
    cache.set("big", value)
    (r,) = drained()
    assert (r.op, r.value, r.version) == (fmt.SET, value, cache.gets("big")[1])
    cache.set("big", b"1" * 10_000)
    first = cache.gets("big")[1]
    cache.set("big", b"2" * 10_000)
    for r in drained():  # of the first only its successor is left
        assert (r.value, r.version) == (b"2" * 10_000, cache.gets("big")[1])
    cache.set("big", b"3" * 10_000)
    first = cache.gets("big")[1]
    cache.delete("big")
    set_, delete = drained()
    assert (set_.op, set_.version) == (fmt.DELETE, first), "what is gone was at that version or later deleted"
    assert delete.op == fmt.DELETE and delete.version > first


def test_a_full_ring_makes_writers_wait_then_a_gap(make):
    cache = make("16M", log_buffer="64K", max_processes=4)
    appendlog.mark(cache, log_policy=2)
    began = time.monotonic()
    for i in range(2000):
        cache.set(f"k{i}", b"v" * 100)
    assert time.monotonic() - began < LIMIT / 2, "it waited once, not for each"
    assert len(cache) == 2000
    assert cache.stats()["durability"]["log_gaps"] > 1000
    gaps = cache.durability()["log_gaps"]
    while cache.durability()["log_gaps"] == gaps:  # to the last byte
        cache.set("k", b"")
    appendlog.mark(cache, log_policy=3)
    with pytest.raises(errors.LogFull):
        cache.set("refused", 1)
    assert cache.get("refused") is None
    with pytest.raises(errors.LogFull):
        cache.delete("k1")
    assert cache.get("k1") is not None
    drain = _stream.Drain(cache)
    while drain.collect():
        drain.drained()
    drain.durable()
    appendlog.mark(cache, log_policy=2)
    gaps = cache.durability()["log_gaps"]
    cache.set("taken", 1)
    assert cache.durability()["log_gaps"] == gaps


def test_a_gap_is_healed_by_a_snapshot(logged, folder):
    cache, log = logged("everysec")
    cache.set("k", 1)
    _stream.count_gap(cache)
    assert cache.durability()["log_gaps"] == 1
    log.sync()
    report, after = restored(cache.name, folder)
    with after:
        assert report["gaps"] == 1, "a restore says so"
    snapshot.write(cache, folder, log=log)
    assert cache.durability()["log_gaps"] == 0
    report, after = restored(cache.name, folder)
    with after:
        assert report["gaps"] == 0 and after["k"] == 1


def test_several_sets_wait_for_one_sync(logged, folder, monkeypatch):
    cache, _ = logged("always")
    syncs = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (syncs.append(fd), fsync(fd))[1])
    cache.set_many({f"k{i}": i for i in range(200)})
    cache.delete_many([f"k{i}" for i in range(100)])
    assert len(syncs) < 20
    _, after = restored(cache.name, folder)
    with after:
        assert len(after) == 100


def test_damaged_rings_harm_nobody(make):
    cache = make("16M", log_buffer="64K", max_processes=4)
    appendlog.mark(cache, log_policy=1)
    rng = random.Random(2)
    header = cache.segment.header
    at, size = int(header["rings_off"]), int(header["rings_bytes"])
    del header
    for _ in range(300):
        drain = _stream.Drain(cache)
        for i in range(20):
            cache.set(f"k{i}", b"v" * rng.choice((1, 100, 9000)))
        view = cache.views(writable=True).bytes
        for _ in range(rng.randrange(1, 60)):
            view[at + rng.randrange(size if rng.random() < 0.3 else 1000)] = rng.randrange(256)
        del view
        for _ in range(50):
            if not drain.collect():
                break
            with memoryview(drain) as payload, contextlib.suppress(errors.DamagedFile):
                for _ in fmt.records(payload):
                    pass
            drain.drained()
        del drain
    assert cache.get("k1") is not None


# ---- always --------------------------------------------------------------------------------------------------------------------------


def write_numbered(name, acknowledged, go):
    cache = shmcache.attach(name)
    go.wait()
    n = 0
    while go.is_set():
        n += 1
        cache.set(b"k%d" % (n % 50), n)
        acknowledged[n % 50] = n


def test_what_was_acknowledged_survives_everything_being_killed(name, tmp_path):
    """Workers and the supervisor are killed, the segment is gone: each key has what was acknowledged last, or what came after it."""
    for turn in range(5):
        data = tmp_path / f"data{turn}"
        argv = [sys.executable, "-m", "shmcache.cli", "supervise", name, "--size", "16M", "--data-dir", str(data), "--log", "always",
                "--snapshot-every", "0.3", "--log-buffer", "64K"]  # fmt: skip
        supervisor = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
        assert supervisor.stderr.readline().startswith("supervising")
        context = mp.get_context("fork")
        acknowledged, go = context.RawArray("q", 50), context.Event()
        worker = context.Process(target=write_numbered, args=(name, acknowledged, go), daemon=True)
        worker.start()
        go.set()
        until(lambda acknowledged=acknowledged, turn=turn: min(acknowledged) > 100 * (turn + 1))
        supervisor.kill() if turn % 2 else worker.kill()
        supervisor.kill()
        worker.kill()
        supervisor.wait()
        worker.join()
        supervisor.stderr.close()
        promised = list(acknowledged)
        shmcache.unlink(name)
        with datadir.take(data) as folder:
            snapshot.restore(name, folder)
        with shmcache.attach(name) as cache:
            for i in range(50):
                assert promised[i] <= cache.get(b"k%d" % i) <= promised[i] + 50, (i, promised[i], cache.get(b"k%d" % i))
            assert cache.verify() == []
        shmcache.unlink(name)


def test_a_segment_that_supervise_creates_is_logged_from_the_first_moment(name, tmp_path, monkeypatch):
    """Else what workers write before the log begins is acknowledged, and in no file."""
    seen = []

    class Looked(Supervisor):
        def __init__(self, cache, *args, **kwargs):
            with shmcache.attach(cache.name) as worker:
                seen.append(worker.durability()["log"])
                thread = threading.Thread(target=lambda: seen.append(worker.set("k", "v")))
                thread.start()
                until(lambda: worker.peek("k") == "v")
                assert len(seen) == 1  # seen by all, and not acknowledged
                super().__init__(cache, *args, **kwargs)
                thread.join()
                self.stop()

    monkeypatch.setattr("shmcache.supervisor.loop.Supervisor", Looked)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # or the command's own would stay
    monkeypatch.setattr(sys, "__stderr__", sys.__stderr__)
    assert cli.main(["supervise", name, "--quiet", "--size", "16M", "--data-dir", str(tmp_path / "data"), "--log", "always"]) == 0
    assert seen == ["always", None]
    shmcache.unlink(name)
    with datadir.take(tmp_path / "data") as folder:
        assert snapshot.restore(name, folder)["gaps"] == 0
    with shmcache.attach(name) as cache:
        assert cache["k"] == "v"
    shmcache.unlink(name)


def test_a_supervisor_that_dies_and_its_successor(name, tmp_path):
    """Under always a writer waits for the next one, or is told."""
    argv = [sys.executable, "-m", "shmcache.cli", "supervise", name, "--size", "16M", "--data-dir", str(tmp_path / "data"), "--log", "always"]
    context = mp.get_context("fork")
    acknowledged, go = context.RawArray("q", 50), context.Event()
    worker = context.Process(target=write_numbered, args=(name, acknowledged, go), daemon=True)
    supervisor = None
    try:
        for turn in range(4):
            supervisor = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
            line = supervisor.stderr.readline()
            assert "supervising" in line, line
            if turn == 0:
                worker.start()
                go.set()
            before = max(acknowledged)
            until(lambda before=before: max(acknowledged) > before + 100)
            supervisor.kill()
            supervisor.wait()
            supervisor.stderr.close()
        assert worker.is_alive()
    finally:
        if supervisor is not None and supervisor.poll() is None:
            supervisor.kill()
            supervisor.wait()
        worker.kill()
        worker.join()
        if supervisor is not None:
            supervisor.stderr.close()


class Disk:
    """A file whose writes and syncs fail while `broken` holds an errno."""

    broken = 0

    def __init__(self, path):
        self.file = open(path, "xb", buffering=0)  # noqa: SIM115
        self.fileno, self.close = self.file.fileno, self.file.close

    def write(self, data):
        if Disk.broken:
            raise OSError(Disk.broken, os.strerror(Disk.broken))
        return self.file.write(data)


@pytest.mark.parametrize("policy", ["everysec", "always"])
def test_a_full_disk_is_said_and_got_over(make, folder, policy, monkeypatch, capfd):
    cache = make("16M", log_buffer="64K", max_processes=16)
    wanted = []
    log = AppendLog(cache, folder, policy, on_gap=lambda: wanted.append(1), open_file=Disk)
    try:
        cache.set("before", 1)
        log.sync()
        monkeypatch.setattr(Disk, "broken", errno.ENOSPC)
        if policy == "always":
            monkeypatch.setattr(appendlog, "RETRY", 0.05)
            worker = mp.get_context("fork").Process(target=lambda: shmcache.attach(cache.name).set("during", 1), daemon=True)
            worker.start()
        else:
            cache.set("during", 1)
        until(lambda: cache.durability()["log_failed"])
        until(lambda: "No space left" in capfd.readouterr().err)
        with pytest.raises(errors.LogFull):
            log.sync()
        assert cache.get("before") == 1
        monkeypatch.setattr(Disk, "broken", 0)
        until(lambda: not cache.durability()["log_failed"])
        until(lambda: wanted)  # it is called behind that
        if policy == "always":
            worker.join(LIMIT)
            assert worker.exitcode == 0, "it was acknowledged once there was room"
        cache.set("after", 1)
        log.sync()
    finally:
        log.close()
    _, after = restored(cache.name, folder)
    with after:
        assert after.get_many(["before", "during", "after"]) == {"before": 1, "during": 1, "after": 1}


@pytest.mark.parametrize("left", ["nothing", "HEAD"])
def test_a_file_that_a_failing_disk_does_not_let_go(make, folder, monkeypatch, left):
    """As when it was mounted again, to be read only. The log goes on in the next one, and the error that is said is the disk's."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    monkeypatch.setattr(appendlog, "RETRY", 0.05)
    begun = []

    def begin(path):
        begun.append(path)
        return Disk(path)

    def fails(real):
        def call(*args, **kwargs):
            if Disk.broken:
                raise OSError(Disk.broken, os.strerror(Disk.broken))
            return real(*args, **kwargs)

        return call

    log = AppendLog(cache, folder, "everysec", open_file=begin)
    try:
        cache.set("before", 1)
        log.sync()
        monkeypatch.setattr(Path, "unlink", fails(Path.unlink))
        if left == "HEAD":
            monkeypatch.setattr(Disk, "write", lambda self, data: self.file.write(data))
            monkeypatch.setattr(os, "fsync", fails(os.fsync))
        monkeypatch.setattr(Disk, "broken", errno.EROFS)
        cache.set("during", 1)
        until(lambda: len(begun) > 3)
        monkeypatch.setattr(Disk, "broken", 0)
        until(lambda: not cache.durability()["log_failed"])
        cache.set("after", 1)
        log.sync()
    finally:
        log.close()
    report, after = restored(cache.name, folder)
    with after:
        assert after.get_many(["before", "during", "after"]) == {"before": 1, "during": 1, "after": 1}
        assert report["damaged"] == []


# ---- the commands ------------------------------------------------------------------------------------------------------------------------


def test_a_log_wants_a_directory_and_a_buffer(name, make, tmp_path):
    argv = [sys.executable, "-m", "shmcache.cli", "supervise", name]
    out = subprocess.run([*argv, "--log", "always", "--size", "8M"], capture_output=True, text=True, check=False, timeout=LIMIT)
    assert out.returncode == 2 and "--data-dir" in out.stderr
    make("8M")
    out = subprocess.run([*argv, "--log", "always", "--data-dir", str(tmp_path / "d")], capture_output=True, text=True, check=False, timeout=LIMIT)
    assert out.returncode == 2 and "log_buffer" in out.stderr
    for wrong in ("63K", "96K", "2G", "x"):
        with pytest.raises(errors.InvalidConfig):
            shmcache.create(name + "b", "8M", log_buffer=wrong)
    with pytest.raises(errors.InvalidSize, match="log buffers"):
        shmcache.create(name + "b", "8M", log_buffer="64K")


def test_stats_shout_about_gaps(make):
    cache = make("16M", log_buffer="64K", max_processes=4)
    appendlog.mark(cache, log_policy=2)
    _stream.count_gap(cache)
    out = subprocess.run([sys.executable, "-c", "from shmcache.cli import admin; admin()", "stats", cache.name, "--interval", "0.05"],
                         capture_output=True, text=True, check=True, timeout=LIMIT)  # fmt: skip
    assert "GAP" in out.stdout
    out = subprocess.run([sys.executable, "-c", "from shmcache.cli import admin; admin()", "stats", cache.name, "--interval", "0.05", "--json"],
                         capture_output=True, text=True, check=True, timeout=LIMIT)  # fmt: skip
    assert json.loads(out.stdout)["durability"]["log_gaps"] == 1


def test_a_worker_killed_while_it_writes_leaves_whole_records(make):
    cache = make("16M", log_buffer="64K", max_processes=16, stripes=64)
    appendlog.mark(cache, log_policy=1)
    drain = _stream.Drain(cache)
    rng = random.Random(9)
    for _ in range(30):
        child = os.fork()
        if child == 0:
            while True:
                cache.set(b"k%d" % rng.randrange(100), rng.randbytes(rng.randrange(300)))
        deadline = time.monotonic() + 0.03
        got = 0
        while time.monotonic() < deadline or not got:
            while drain.collect():
                with memoryview(drain) as payload:
                    got += sum(1 for _ in fmt.records(payload))
                drain.drained()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert drain.damaged == 0


def test_a_disk_that_neither_syncs_nor_removes_is_not_filled_with_files(make, folder, monkeypatch):
    """It creates one in each try, a try each second."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    monkeypatch.setattr(appendlog, "RETRY", 0.01)
    broken, tries = [False], []

    def fails(real):
        def call(*args, **kwargs):
            if broken[0]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args, **kwargs)

        return call

    def begin(path):
        tries.append(path)
        return open(path, "xb", buffering=0)

    monkeypatch.setattr(Path, "unlink", fails(Path.unlink))
    monkeypatch.setattr(os, "fsync", fails(os.fsync))
    log = AppendLog(cache, folder, "everysec", open_file=begin)
    try:
        cache.set("before", 1)
        log.sync()
        n_files = len(fmt.listing(folder)[1])
        broken[0] = True
        cache.set("during", 1)
        until(lambda: len(tries) > 20)
        assert len(fmt.listing(folder)[1]) <= n_files + 1
        broken[0] = False
        until(lambda: not cache.durability()["log_failed"])
        cache.set("after", 1)
        log.sync()
        assert len(fmt.listing(folder)[1]) <= n_files + 2
    finally:
        log.close()
    report, after = restored(cache.name, folder)
    with after:
        assert after.get_many(["before", "during", "after"]) == {"before": 1, "during": 1, "after": 1}
        assert report["damaged"] == []


@pytest.mark.parametrize("policy", ["everysec", "always"])
def test_a_gap_that_a_failed_file_says_is_said_again(make, folder, policy, monkeypatch):
    cache = make("16M", log_buffer="64K", max_processes=16)
    monkeypatch.setattr(appendlog, "RETRY", 0.05)
    broken = breakable(monkeypatch)
    log = AppendLog(cache, folder, policy)
    try:
        cache.set("before", 1)
        log.sync()
        _stream.count_gap(cache)
        log.sync()
        broken[0] = True
        _stream.count_gap(cache)
        until(lambda: cache.durability()["log_failed"])
        failed = log.number
        broken[0] = False
        until(lambda: not cache.durability()["log_failed"])
        log.sync()
    finally:
        log.close()
    (folder / fmt.log_name(failed)).write_bytes(b"")  # what was not synced may be lost
    gaps = int(cache.segment.header["log_gaps"])
    said = [r.version for r in records(folder) if r.op == fmt.GAP]
    assert sum(said) == gaps - 1, "what was said in the file that is lost, and synced there, is not said again"


@pytest.mark.parametrize("elsewhere", ["log", "log and back", "nothing"])
def test_a_log_that_goes_on_in_another_directory_says_what_it_lacks(make, tmp_path, elsewhere):
    """The policy is the same, but what was written before is not there."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    appendlog.mark(cache, log_policy=appendlog.POLICIES["always"])  # from its first moment, as of one that a supervisor creates
    with datadir.take(tmp_path / "a") as first, datadir.take(tmp_path / "b") as second:
        supervisor = Supervisor(cache, folder=first, log="always")
        assert cache.durability()["log_gaps"] == 0, "it is empty"
        cache.set("before", 1)
        supervisor.close()
        Supervisor(cache, folder=first, log="always").close()
        assert cache.durability()["log_gaps"] == 0, "it goes on where it was"
        if elsewhere != "nothing":
            Supervisor(cache, folder=second, log="always").close()
        else:
            Supervisor(cache, folder=second).close()
        gaps = cache.durability()["log_gaps"]
        assert gaps > 0
        last = first if elsewhere != "log" else second
        supervisor = Supervisor(cache, folder=last, log="always")
        assert cache.durability()["log_gaps"] == gaps + (elsewhere != "log")
        cache.set("after", 1)
        supervisor.close()
        report, after = restored(cache.name, last)
        with after:
            assert report["gaps"] > 0 and after["after"] == 1


@pytest.mark.parametrize("moved", [False, True])
def test_a_log_that_goes_on_in_a_copy_says_what_it_lacks(make, tmp_path, moved):
    """It was copied while the supervisor ran, and lacks what came since. A directory that was moved has it."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    appendlog.mark(cache, log_policy=appendlog.POLICIES["always"])
    with datadir.take(tmp_path / "a") as first:
        supervisor = Supervisor(cache, folder=first, log="always")
        cache.set("before", 1)
        if not moved:
            shutil.copytree(first, tmp_path / "b")
        cache.set("since", 1)
        supervisor.close()
    if moved:
        first.rename(tmp_path / "b")
    with datadir.take(tmp_path / "b") as second:
        Supervisor(cache, folder=second, log="always").close()
        assert cache.durability()["log_gaps"] == (not moved)
        report, after = restored(cache.name, second)
        with after:
            assert after.get("since") == (1 if moved else None) and report["gaps"] == (not moved)


def put_back_in_place(folder, copy):
    for path in copy.iterdir():
        shutil.copyfile(path, folder / path.name)  # into the file that is there


def put_back_as_others(folder, copy):
    """A file system may give a new file the inode of one that has gone."""
    for _, path in fmt.listing(folder)[1]:
        path.unlink()
    for path in copy.iterdir():
        shutil.copyfile(path, folder / path.name)


def newest_removed(folder, copy):
    fmt.listing(folder)[1][-1][1].unlink()


def newest_cut(folder, copy):
    path = fmt.listing(folder)[1][-1][1]
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("happens", [None, put_back_in_place, put_back_as_others, newest_removed, newest_cut])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_log_that_goes_on_behind_an_older_copy_says_what_it_lacks(make, folder, tmp_path, monkeypatch, happens, rotated):
    cache = make("16M", log_buffer="64K", max_processes=16)
    if happens is put_back_as_others:
        monkeypatch.setattr(appendlog, "identity", lambda file: [1, 2])
    for _ in range(2):  # two files at least
        log = AppendLog(cache, folder, "always")
        cache.set("before", 1)
        log.close()
    log = AppendLog(cache, folder, "always")
    shutil.copytree(folder, tmp_path / "copy")
    cache.set("since", 1)
    if rotated:
        log.rotate()
    log.close()
    assert appendlog.is_whole(cache, folder)
    if happens:
        happens(folder, tmp_path / "copy")
    assert appendlog.is_whole(cache, folder) == (happens is None)
    gaps = cache.durability()["log_gaps"]
    Supervisor(cache, folder=folder, log="always").close()
    assert cache.durability()["log_gaps"] == gaps + (happens is not None)


@pytest.mark.parametrize("policy", ["no", "everysec", "always"])
def test_what_has_left_the_rings_is_in_the_file_as_the_segment_says(make, folder, policy):
    """Also what is not synced yet: an older copy of the file has less."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    log = AppendLog(cache, folder, policy)
    try:
        for n in range(3):
            path = folder / fmt.log_name(log.number)
            size_bytes = path.stat().st_size
            assert int(cache.segment.header["log_number"]) == log.number
            cache.set("k", n)
            until(lambda size_bytes=size_bytes, path=path: path.stat().st_size > size_bytes)
            until(lambda path=path: int(cache.segment.header["log_bytes"]) == path.stat().st_size)
            if n == 1:
                log.rotate()
    finally:
        log.close()
    assert int(cache.segment.header["log_bytes"]) == path.stat().st_size


@pytest.mark.parametrize("by", ["it", "another"])
def test_a_file_that_was_begun_in_vain_is_no_reason_for_a_gap(make, name, folder, by):
    """Its supervisor was killed when it was begun. One that another segment began is."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    AppendLog(cache, folder, "always").close()
    head = datadir.head(fmt.listing(folder)[1][-1][1], "log")
    if by == "another":
        head["segment_created_ms"] -= 1
    with os.fdopen(datadir.create(folder / fmt.log_name(2)), "wb", buffering=0) as file:
        fmt.Writer(file, "log", head | {"number": 2})
    datadir.create(folder / fmt.log_name(3))
    assert appendlog.is_whole(cache, folder) == (by == "it")


class Killed(BaseException):
    """The process is gone: it cleans nothing up."""


@pytest.mark.parametrize("stores", range(4))
@pytest.mark.parametrize("happens", [None, put_back_in_place])
def test_a_supervisor_is_killed_while_it_says_which_file_is_the_newest(make, folder, tmp_path, monkeypatch, stores, happens):
    """Behind any of its stores nothing is missing, and an older copy of the file before lacks something still."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    log = AppendLog(cache, folder, "always")
    shutil.copytree(folder, tmp_path / "copy")
    cache.set("k", b"v" * 10_000)
    log.close()
    left, mark = [stores], appendlog.mark

    def killed(cache, **words):
        for word, value in words.items():
            if word in ("log_number", "log_bytes"):
                if not left[0]:
                    raise Killed
                left[0] -= 1
            mark(cache, **{word: value})

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(appendlog, "mark", killed)
        AppendLog(cache, folder, "always").close()
    assert len(fmt.listing(folder)[1]) == 2
    if happens:
        happens(folder, tmp_path / "copy")
    assert appendlog.is_whole(cache, folder) == (happens is None)


@pytest.mark.parametrize("policy", ["everysec", "always"])
@pytest.mark.parametrize("what", ["write", "sync", "write, then sync"])
def test_a_log_that_fails_again_goes_on_where_it_was(make, folder, monkeypatch, policy, what):
    """The file that it began when it had failed already is removed, and is not the newest any more. If what had left the rings was in it,
    that is a gap by then."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    monkeypatch.setattr(appendlog, "RETRY", 0.01)
    broken, seen, let_go = [""], [], AppendLog.let_go

    def fails(what, real):
        def call(*args):
            if broken[0] == what:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args)

        return call

    def removed(log, path):
        let_go(log, path)
        said = cache.durability()
        seen.append((said["log_gaps"] == 0, said["log_waiting_bytes"] > 0, appendlog.is_whole(cache, folder)))  # if it were killed here

    monkeypatch.setattr(fmt.Writer, "records", fails("write", fmt.Writer.records))
    monkeypatch.setattr(appendlog.Sync, "finish", fails("sync", appendlog.Sync.finish))
    monkeypatch.setattr(AppendLog, "let_go", removed)
    log = AppendLog(cache, folder, policy)
    try:
        cache.set("before", 1)
        log.sync()
        broken[0] = what.split(",")[0]
        worker = mp.get_context("fork").Process(target=lambda: shmcache.attach(cache.name).set("during", 1), daemon=True)
        worker.start()
        until(lambda: len(seen) > 2)
        if what == "write, then sync":
            broken[0], n = "sync", len(seen)
            until(lambda: len(seen) > n + 2)
        broken[0] = ""
        until(lambda: not cache.durability()["log_failed"])
        worker.join(LIMIT)
        assert worker.exitcode == 0
    finally:
        log.close()
    assert all(no_gap == waiting == whole for no_gap, waiting, whole in seen), seen
    report, after = restored(cache.name, folder)
    with after:
        lost = policy == "everysec" and what != "write"
        assert (report["gaps"] > 0) == lost and (after.get("during") == 1 or lost)


@pytest.mark.parametrize("refused", [errors.StripeBusy, errors.ForeignDataDir, errors.NewerFormat])
def test_a_log_that_is_refused_lacks_nothing_where_it_was(make, folder, tmp_path, monkeypatch, refused):
    cache = make("16M", log_buffer="64K", max_processes=16)
    appendlog.mark(cache, log_policy=appendlog.POLICIES["always"])
    Supervisor(cache, folder=folder, log="always").close()
    with datadir.take(tmp_path / "other") as other, monkeypatch.context() as patch:

        def refuse(*args):
            raise refused("not here")

        patch.setattr(datadir, "adopt", refuse)
        with pytest.raises(refused):
            Supervisor(cache, folder=other, log="always")
    assert appendlog.is_whole(cache, folder) and cache.durability()["log_gaps"] == 0


@pytest.mark.parametrize("by", ["hand", "the supervisor"])
def test_the_file_by_which_a_log_is_known_to_be_whole_stays(make, folder, by):
    """A snapshot that is written while no supervisor runs has all of it."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    for n in range(2):
        log = AppendLog(cache, folder, "always")
        cache.set("n", n)
        if by == "the supervisor":
            snapshot.write(cache, folder, keep=1, log=log)
        log.close()
        if by == "hand":
            snapshot.write(cache, folder, keep=1)
        assert len(fmt.listing(folder)[1]) == 1 and appendlog.is_whole(cache, folder)
    Supervisor(cache, folder=folder, log="always").close()
    report, after = restored(cache.name, folder)
    with after:
        assert after["n"] == 1 and report["gaps"] == 0


def test_nothing_is_removed_beside_a_supervisor_that_is_stopped(name, tmp_path):
    """What it has acknowledged is in the file that it writes."""
    data = tmp_path / "data"
    argv = [sys.executable, "-m", "shmcache.cli", "supervise", name, "--size", "16M", "--data-dir", data, "--log", "always"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as supervisor:
        try:
            assert "supervising" in supervisor.stderr.readline()
            with shmcache.attach(name) as cache:
                cache.set("acknowledged", 1)
                until(lambda: cache.durability()["snapshot_age_s"] is not None)  # it writes no file meanwhile
                cache.set("acknowledged", 2)
            supervisor.send_signal(signal.SIGSTOP)
            before = {path.name: path.read_bytes() for path in data.iterdir()}
            out = subprocess.run([sys.executable, "-c", "import sys; from shmcache.cli import admin; sys.exit(admin())", "snapshot", name,
                                  "--data-dir", data, "--keep", "1"], capture_output=True, text=True, check=False, timeout=LIMIT)  # fmt: skip
            assert out.returncode == 1 and "used by another process" in out.stderr
            assert {path.name: path.read_bytes() for path in data.iterdir()} == before
        finally:
            supervisor.kill()
    with datadir.take(data) as folder:
        report, after = restored(name, folder)
        with after:
            assert after["acknowledged"] == 2 and report["gaps"] == 0
    shmcache.unlink(name)


def test_a_log_of_what_was_restored_from_another_directory_says_what_it_lacks(make, tmp_path):
    cache = make("16M", log_buffer="64K", max_processes=16)
    with datadir.take(tmp_path / "a") as first, datadir.take(tmp_path / "b") as second:
        cache.set("before", 1)
        snapshot.write(cache, first)
        for folder in (first, second):
            _, after = restored(cache.name, first, log_policy=appendlog.POLICIES["always"], log_buffer="64K")
            with after:
                assert after["before"] == 1
                Supervisor(after, folder=folder, log="always").close()
                assert after.durability()["log_gaps"] == (folder == second)


def test_a_log_that_begins_beside_files_of_an_empty_segment_says_what_it_lacks(make, folder):
    """What is in them was deleted when nothing was logged."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    cache.set("deleted", 1)
    snapshot.write(cache, folder)
    cache.delete("deleted")
    Supervisor(cache, folder=folder, log="always").close()
    assert cache.durability()["log_gaps"] == 1


class Gone:
    """A standard error of which nobody reads, or on a full disk."""

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise OSError(self.error, os.strerror(self.error))

    flush = write


@pytest.mark.parametrize("error", [errno.EPIPE, errno.ENOSPC])
@pytest.mark.parametrize("what", ["the log", "snapshots"])
def test_a_supervisor_to_which_nobody_listens_goes_on(make, folder, monkeypatch, what, error):
    """Also when it has something to say: what it does not write is said in stats(), and it writes again when it can."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    monkeypatch.setattr(appendlog, "RETRY", 0.01)
    broken = breakable(monkeypatch)
    supervisor = Supervisor(cache, folder=folder, log="everysec" if what == "the log" else None)
    try:
        monkeypatch.setattr(sys, "stderr", Gone(error))
        broken[0] = True
        failed = "log_failed" if what == "the log" else "snapshot_failed"
        if what == "the log":
            cache.set("k", 1)
            until(lambda: cache.durability()[failed])
        else:
            supervisor.write()
            assert cache.durability()[failed]
        broken[0] = False
        if what == "the log":
            until(lambda: not cache.durability()[failed])
            cache.set("k", 2)
            supervisor.log.sync()
        else:
            supervisor.write()
            assert not cache.durability()[failed]
    finally:
        supervisor.close()
    _, after = restored(cache.name, folder)
    with after:
        assert after.get("k") == (2 if what == "the log" else None)


@pytest.mark.parametrize("stderr", ["gone", "full"])
def test_a_supervisor_begins_whoever_reads(name, tmp_path, stderr):
    """Each time: empty; with something to say of a restore."""
    data = tmp_path / "data"
    argv = [sys.executable, "-m", "shmcache.cli", "supervise", name, "--size", "16M", "--data-dir", data, "--log", "always"]
    for n in range(2):
        reader, writer = os.pipe()
        if stderr == "gone":
            os.close(reader)
        else:
            os.set_blocking(writer, False)
            with contextlib.suppress(BlockingIOError):
                while os.write(writer, b"x" * 4096):
                    pass
            os.set_blocking(writer, True)
        with subprocess.Popen(argv, stderr=writer) as supervisor:
            os.close(writer)
            try:
                until(lambda: supervisor.poll() is not None or is_logged(name))
                with shmcache.attach(name) as cache:
                    assert cache.get("n") == (n - 1 if n else None)
                    cache.set("n", n)
                supervisor.kill()
            finally:
                supervisor.kill()
                supervisor.wait()
                if stderr == "full":
                    os.close(reader)
        shmcache.unlink(name)
        with open(fmt.listing(data)[1][-1][1], "ab") as file:
            file.write(b"a torn end")


def is_logged(name):
    with contextlib.suppress(shmcache.SegmentNotFound, errors.BeingRestored), shmcache.attach(name, wait=False) as cache:
        return bool(cache.supervisor()["alive"])
    return False


def test_a_gap_that_is_on_the_disk_is_not_said_again(make, folder, monkeypatch):
    """The file fails before its first sync."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    monkeypatch.setattr(appendlog, "RETRY", 0.01)
    finish, broken = appendlog.Sync.finish, [True]

    def fails(sync):
        if broken[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        finish(sync)

    monkeypatch.setattr(appendlog.Sync, "finish", fails)
    cache.set("not logged", 1)
    log = AppendLog(cache, folder, "always", whole=False)
    try:
        worker = mp.get_context("fork").Process(target=lambda: shmcache.attach(cache.name).set("k", 1), daemon=True)
        worker.start()
        until(lambda: cache.durability()["log_failed"])
        broken[0] = False
        until(lambda: not cache.durability()["log_failed"])
        worker.join(LIMIT)
    finally:
        log.close()
    assert sum(r.version for r in records(folder) if r.op == fmt.GAP) == cache.durability()["log_gaps"] == 1


def test_what_a_failed_sync_has_lost_is_a_gap_before_anything_is_said(make, folder, monkeypatch):
    """Whoever reads standard error may take its time, and the supervisor be killed meanwhile."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    monkeypatch.setattr(appendlog, "RETRY", 0.01)
    seen = []
    monkeypatch.setattr(appendlog, "notice", lambda text: seen.append((text, cache.durability()["log_gaps"])), raising=False)

    class Disk:
        def write(self, text):
            seen.append((text, cache.durability()["log_gaps"]))

        flush = staticmethod(lambda: None)

    monkeypatch.setattr(sys, "stderr", Disk())
    log = AppendLog(cache, folder, "everysec")
    try:
        monkeypatch.setattr(appendlog.Sync, "finish", lambda sync: (_ for _ in ()).throw(OSError(errno.EIO, "lost")))
        cache.set("k", 1)
        until(lambda: seen)
    finally:
        monkeypatch.undo()
        log.close()
    assert "cannot be written" in seen[0][0] and seen[0][1] > 0


@pytest.mark.parametrize("policy", ["no", "everysec", "always"])
def test_a_gap_from_before_a_file_is_on_the_disk_with_its_beginning(make, folder, monkeypatch, policy):
    """Else the power may go before the first sync, and a restore does not know."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    synced, fsync = {}, os.fsync

    def noted(fd):
        fsync(fd)
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.is_file():
            synced.setdefault(path.name, path.read_bytes())

    monkeypatch.setattr(os, "fsync", noted)
    cache.set("not logged", 1)
    asked = []
    AppendLog(cache, folder, policy, lambda: asked.append(1), whole=False).close()
    monkeypatch.undo()
    path = folder / fmt.log_name(1)
    path.write_bytes(synced[path.name])
    assert [(r.op, r.version) for r in records(folder)] == [(fmt.GAP, 1)] and asked


def test_what_is_written_while_a_log_begins_is_said_to_be_missing(make, folder, monkeypatch):
    """A worker created the segment, which was empty. What it writes before the log takes anything is in no ring."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    begin_file = AppendLog.begin_file

    def beside(log):
        begin_file(log)
        cache.set("beside", 1)

    with monkeypatch.context() as patch:
        patch.setattr(AppendLog, "begin_file", beside)
        patch.setattr(Supervisor, "want_snapshot", lambda self: setattr(self, "next_snapshot", float("inf")))
        Supervisor(cache, folder=folder, log="always").close()
    report, after = restored(cache.name, folder)
    with after:
        assert after.get("beside") == 1 or report["gaps"] > 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_supervisor_that_ends_waits_for_the_sync_beside(make, folder, monkeypatch, fails):
    """What the disk has lost then is a gap; and its file is open as long as it is synced."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    fsync, begun, go, ended = os.fsync, threading.Event(), threading.Event(), []

    def slow(fd):
        if isinstance(threading.current_thread(), appendlog.Sync):
            begun.set()
            go.wait(LIMIT)
            if fails:
                raise OSError(errno.EIO, "lost")
        fsync(fd)

    log = AppendLog(cache, folder, "everysec")
    cache.set("a", 1)
    log.sync()
    monkeypatch.setattr(os, "fsync", slow)
    cache.set("b", 1)
    assert begun.wait(LIMIT)
    closing = threading.Thread(target=lambda: (log.close(), ended.append(1)))
    closing.start()
    closing.join(0.2)
    assert not ended, "it goes on"
    go.set()
    closing.join(LIMIT)
    assert (cache.durability()["log_gaps"] > 0) == fails and appendlog.is_whole(cache, folder) != fails


def test_a_snapshot_by_hand_keeps_what_says_how_much_is_in_the_newest_log(make, folder, tmp_path, monkeypatch):
    """The supervisor was killed when it had begun the next file, whose beginning says it."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    log = AppendLog(cache, folder, "always")
    shutil.copytree(folder, tmp_path / "copy")
    cache.set("k", b"v" * 10_000)
    log.close()
    mark = appendlog.mark

    def killed(cache, **words):
        if "log_number" in words:
            raise Killed
        mark(cache, **words)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(appendlog, "mark", killed)
        AppendLog(cache, folder, "always")
    snapshot.write(cache, folder, keep=1)
    assert appendlog.is_whole(cache, folder)
    put_back_in_place(folder, tmp_path / "copy")
    for _, path in fmt.listing(folder)[0]:
        path.unlink()
    assert not appendlog.is_whole(cache, folder)
