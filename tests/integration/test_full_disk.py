"""A disk that is really full, and then has room again: what writers get meanwhile, and what goes on by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import shmcache
from shmcache import errors
from shmcache.supervisor import appendlog, datadir, snapshot
from shmcache.supervisor import format as fmt
from shmcache.supervisor.appendlog import AppendLog

LIMIT = 60  # seconds, of any wait
AT_ONCE = 3  # seconds, against the ten that a write waits for the disk


def until(condition):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


class SmallDisk:
    """A tmpfs of 4 MiB."""

    def __init__(self, path):
        self.path, self.filler = path, path / "filler"

    def fill(self, but=0):
        with open(self.filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(self.filler, self.filler.stat().st_size - but)

    def empty(self):
        self.filler.unlink()


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    out = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True, text=True, check=False)
    if out.returncode:
        pytest.skip(f"no small file system can be mounted here: {out.stderr.strip()}")
    yield SmallDisk(path)
    subprocess.run(["umount", "-l", path], check=True)


def elapsed(call):
    began = time.monotonic()
    call()
    return time.monotonic() - began


def restored(name, folder):
    with contextlib.suppress(shmcache.SegmentNotFound):
        shmcache.unlink(name)
    snapshot.restore(name, folder)
    return shmcache.attach(name)


def under_way(cache, key, value):
    """A write in another process, which the log's failure finds on its way: it is acknowledged when there is room (exit code 0), or told
    that it may not be durable (3). 4: it came too late, and was refused."""
    code = f"""
import sys
import shmcache
try:
    shmcache.attach({cache.name!r}).set({key!r}, {value!r})
except shmcache.errors.NotDurable:
    sys.exit(3)
except shmcache.errors.LogFull:
    sys.exit(4)
"""
    return subprocess.Popen([sys.executable, "-c", code])


def test_with_always_writers_are_refused_at_once_till_there_is_room(make, disk):
    cache = make("16M", log_buffer="64K", max_processes=16)
    with datadir.take(disk.path / "data") as folder:
        log = AppendLog(cache, folder, "always")
        try:
            cache.set_many({"old": 1, "n": 5, "t": 1})
            disk.fill()
            first = under_way(cache, "under way", os.urandom(20_000).hex())
            until(lambda: cache.durability()["log_failed"])
            n_files = len(fmt.listing(folder)[1])
            writes = {
                "set": lambda: cache.set("old", 2), "new": lambda: cache.set("new", 2), "add": lambda: cache.add("new", 2),
                "delete": lambda: cache.delete("old"), "delete what is not there": lambda: cache.delete("absent"),
                "incr": lambda: cache.incr("n"), "touch": lambda: cache.touch("t", 5), "pop": lambda: cache.pop("old"),
                "set_many": lambda: cache.set_many({"old": 3}), "cas": lambda: cache.cas("old", 2, cache.gets("old")[1]),
                "clear": cache.clear, "get_or_set": lambda: cache.get_or_set("new", lambda: 1),
                "namespace": lambda: cache.namespace("ns").clear(), "tag": lambda: cache.invalidate_tag("t"),
            }  # fmt: skip
            for what, write in writes.items():

                def refused(write=write):
                    with pytest.raises(errors.LogFull, match="by itself"):
                        write()

                assert elapsed(refused) < AT_ONCE, what
            assert cache.get_many(["old", "n", "t", "new"]) == {"old": 1, "n": 5, "t": 1}, "nothing was changed"
            assert cache.ttl("t") == float("inf")
            disk.empty()
            until(lambda: not cache.durability()["log_failed"])
            assert elapsed(lambda: cache.set("after", 1)) < AT_ONCE
            assert first.wait(LIMIT) in (0, 3)
            assert len(fmt.listing(folder)[1]) <= n_files + 1
        finally:
            log.close()
        with restored(cache.name, folder) as after:
            assert after.get_many(["old", "n", "t", "new", "after"]) == {"old": 1, "n": 5, "t": 1, "after": 1}
            assert "under way" in after, "it was done, and is on the disk by now"


def test_a_log_does_not_go_on_into_the_last_bytes(make, disk, monkeypatch):
    """It would admit a write, fail again, and hold that writer up for ten seconds; then the next."""
    monkeypatch.setattr(appendlog, "RETRY", 0.02)
    cache = make("16M", log_buffer="64K", max_processes=16)
    with datadir.take(disk.path / "data") as folder:
        log = AppendLog(cache, folder, "always")
        try:
            cache.set("old", 1)
            disk.fill()
            first = under_way(cache, "under way", os.urandom(20_000).hex())
            until(lambda: cache.durability()["log_failed"])
            disk.fill(but=64 << 10)  # enough for what is under way
            tried = set()
            while len(tried) < 20:
                tried.add(log.retry_at)
                assert cache.durability()["log_failed"]
                with pytest.raises(errors.LogFull):
                    cache.set("old", 2)
            disk.empty()
            until(lambda: not cache.durability()["log_failed"])
            assert first.wait(LIMIT) in (0, 3)
        finally:
            log.close()


def test_those_who_gave_up_leave_no_wishes(make, disk, monkeypatch):
    """Or a file is begun for each snapshot that failed meanwhile."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    with datadir.take(disk.path / "data") as folder:
        log = AppendLog(cache, folder, "everysec")
        try:
            disk.fill()
            cache.set("k", b"v" * 10_000)
            until(lambda: cache.durability()["log_failed"])

            def give_up():
                with pytest.raises(errors.LogFull):
                    log.rotate()

            waiting = [threading.Thread(target=give_up) for _ in range(20)]
            for thread in waiting:
                thread.start()
            for thread in waiting:
                thread.join()
            n = len(fmt.listing(folder)[1])
            disk.empty()
            until(lambda: not cache.durability()["log_failed"])
            log.sync()
            assert len(fmt.listing(folder)[1]) <= n + 1
        finally:
            log.close()


def test_a_log_that_begins_on_a_full_disk_refuses_at_once_and_goes_on(make, disk):
    """A supervisor that ended instead would leave writers that wait ten seconds each."""
    cache = make("16M", log_buffer="64K", max_processes=16)
    with datadir.take(disk.path / "data") as folder:
        AppendLog(cache, folder, "always").close()
        disk.fill()
        log = AppendLog(cache, folder, "always")
        try:

            def refused():
                with pytest.raises(errors.LogFull):
                    cache.set("k", 1)

            assert elapsed(refused) < AT_ONCE
            assert "k" not in cache
            with pytest.raises(errors.LogFull):
                log.rotate()
            disk.empty()
            until(lambda: not cache.durability()["log_failed"])
            cache.set("k", 2)
        finally:
            log.close()
        with restored(cache.name, folder) as after:
            assert after["k"] == 2 and after.durability()["log_gaps"] == 0


@pytest.mark.parametrize("policy", ["off", "no", "everysec", "always"])
def test_a_supervisor_writes_its_snapshot_as_soon_as_there_is_room(name, disk, policy):
    argv = [sys.executable, "-m", "shmcache.cli", "supervise", name, "--size", "32M", "--data-dir", disk.path / "data", "--log", policy,
            "--snapshot-every", "100000"]  # fmt: skip
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not (line := process.stderr.readline()).startswith("supervising"):
                assert line, "it ended"
            with shmcache.attach(name) as cache:
                until(lambda: policy == "off" or cache.durability()["snapshot_age_s"] is not None)
                cache.set("before", os.urandom(300_000))
                disk.fill()
                out = subprocess.run([sys.executable, "-c", "from shmcache.cli import admin; admin()", "snapshot", name], check=False,
                                     capture_output=True, timeout=LIMIT)  # fmt: skip
                assert b"could not write" in out.stderr
                assert cache.durability()["snapshot_failed"]
                if policy != "off":
                    written = under_way(cache, "k", os.urandom(20_000).hex())
                    until(lambda: cache.durability()["log_failed"])
                disk.empty()
                emptied = time.time()
                until(lambda: not cache.durability()["snapshot_failed"] and not cache.durability()["log_failed"])
                assert cache.durability()["snapshot_age_s"] <= time.time() - emptied + 1
                assert cache.durability()["log_gaps"] == 0, "it is healed"
                code = written.wait(LIMIT) if policy != "off" else 4
            process.send_signal(signal.SIGKILL)
            process.wait()
        finally:
            process.kill()
    with datadir.take(disk.path / "data") as folder, restored(name, folder) as after:
        assert len(after["before"]) == 300_000
        assert code in (0, 3, 4) and ("k" in after) == (code != 4)


def test_a_supervisor_starts_on_a_full_disk(name, disk):
    argv = [sys.executable, "-m", "shmcache.cli", "supervise", name, "--size", "16M", "--data-dir", disk.path / "data", "--log", "always"]
    for full in (False, True):
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
            try:
                while not (line := process.stderr.readline()).startswith("supervising"):
                    assert line, "it ended"
                with shmcache.attach(name) as cache:
                    if full:
                        with pytest.raises(errors.LogFull):
                            cache.set("k", 2)
                        disk.empty()
                        until(lambda: not cache.durability()["log_failed"])
                        cache.set("k", 3)
                    else:
                        cache.set("k", 1)
            finally:
                process.kill()
        if not full:
            disk.fill()
    with datadir.take(disk.path / "data") as folder, restored(name, folder) as after:
        assert after["k"] == 3


def test_a_supervisor_goes_on_whose_segment_was_restored_on_a_full_disk(name, disk):
    """Then there is room for the log, and not for a snapshot: started again, it is where it was."""
    argv = [sys.executable, "-m", "shmcache.cli", "supervise", name, "--size", "16M", "--data-dir", disk.path / "data"]
    for full in ("", "restored", "again"):
        with subprocess.Popen([*argv, "--log", "always" if full else "off"], stderr=subprocess.PIPE, text=True) as process:
            try:
                while not (line := process.stderr.readline()).startswith("supervising"):
                    assert line, f"it ended: {full}"
                with shmcache.attach(name) as cache:
                    if full == "restored":
                        with pytest.raises(errors.LogFull):
                            cache.set("k", 2)
                        os.truncate(disk.filler, disk.filler.stat().st_size - (1200 << 10))
                        until(lambda: not cache.durability()["log_failed"])
                        cache.set("k", 3)
                    elif full == "again":
                        assert cache["k"] == 3
                        disk.empty()
                    else:
                        for i in range(300):
                            cache.set(f"ballast {i}", os.urandom(5000))
                if not full:
                    process.terminate()
                    process.wait(LIMIT)
            finally:
                process.kill()
        if not full:
            shmcache.unlink(name)
            disk.fill()
    with datadir.take(disk.path / "data") as folder, restored(name, folder) as after:
        assert after["k"] == 3
