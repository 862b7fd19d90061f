"""A data directory with what cannot be read in it: nothing starts empty beside it, nothing waits for it, and nothing removes it."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import time

import pytest

import shmcache
from shmcache import segment
from shmcache.supervisor import datadir, snapshot
from shmcache.supervisor import format as fmt
from shmcache.supervisor.appendlog import AppendLog

LIMIT = 6  # seconds, of any wait


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_in_head(path):
    content = bytearray(path.read_bytes())
    content[80] ^= 1
    path.write_bytes(content)


def flip_in_end(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def newer(path):
    content = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fmt, "FORMAT", fmt.FORMAT + 1)
        kind = "snapshot" if path.name.startswith("snapshot") else "log"
        path.write_bytes(fmt.preamble(kind) + content[fmt.PREAMBLE.size :])


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def folder_instead(path):
    path.unlink()
    path.mkdir()
    (path / "precious").write_text("somebody's")


def socket_instead(path):
    path.unlink()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock, contextlib.chdir(path.parent):
        sock.bind(path.name)


def link_to_nothing(path):
    path.rename(path.with_suffix(".away"))
    path.symlink_to(path.with_suffix(".nowhere"))


def link_to_damage(path):
    cut(path)
    path.rename(path.with_suffix(".away"))
    path.symlink_to(path.with_suffix(".away"))


UNREADABLE = [cut, flip_in_head, flip_in_end, empty, newer, fifo, folder_instead, socket_instead, link_to_damage]


def state(folder):
    """What is there: (kind and mode, bytes) by name."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        found[str(path.relative_to(folder))] = mode, path.read_bytes() if stat.S_ISREG(mode) else b""
    return found


def supervise(name, *args):
    return [sys.executable, "-m", "shmcache.cli", "supervise", name, *map(str, args)]


def refused(name, *args):
    out = subprocess.run(supervise(name, *args), capture_output=True, text=True, check=False, timeout=LIMIT)
    assert out.returncode == 1, out.stderr
    assert "Traceback" not in out.stderr
    assert not os.path.exists(segment.check_name(name)), "no segment was left behind"
    return out.stderr


@contextlib.contextmanager
def supervising(name, *args):
    with subprocess.Popen(supervise(name, *args), stderr=subprocess.PIPE, text=True) as process:
        try:
            said = []
            while not said or not said[-1].startswith("supervising"):
                said.append(process.stderr.readline())
                assert said[-1], f"it ended: {said}"
            yield process, "".join(said)
        finally:
            process.kill()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


def two_snapshots(make, folder, log=False):
    """Of a segment that is gone afterwards."""
    cache = make("8M", max_processes=16, **({"log_buffer": "64K"} if log else {}))
    with datadir.take(folder):
        logging = AppendLog(cache, folder, "always") if log else None
        for n in (1, 2):
            cache.set("n", n)
            snapshot.write(cache, folder, log=logging)
        if logging:
            cache.set("n", 3)
            logging.close()
    shmcache.unlink(cache.name)


# ---- at the start -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", UNREADABLE)
def test_a_supervisor_does_not_start_empty_beside_what_it_cannot_read(make, name, folder, damage):
    two_snapshots(make, folder)
    for number in (1, 2):
        damage(folder / fmt.snapshot_name(number))
    before = state(folder)
    args = ("--size", "8M", "--data-dir", folder, "--snapshot-every", 0.1)
    said = refused(name, *args)
    assert fmt.snapshot_name(2) in said and "--start-empty" in said
    assert state(folder) == before
    with supervising(name, *args, "--start-empty") as (_, said), shmcache.attach(name) as cache:
        aside = folder / "set-aside-1"
        assert str(aside) in said and fmt.snapshot_name(2) in said
        assert len(cache) == 0
        deadline = time.monotonic() + LIMIT
        while len(fmt.listing(folder)[0]) < 2 or fmt.listing(folder)[0][0][0] < 3:  # it rotates
            assert time.monotonic() < deadline
            time.sleep(0.01)
    for path, was in before.items():
        if path != datadir.LOCK_NAME and not path.endswith(".away"):
            assert state(aside)[path] == was


def test_a_link_to_nothing_is_refused(make, name, folder):
    two_snapshots(make, folder)
    for number in (1, 2):
        link_to_nothing(folder / fmt.snapshot_name(number))
    before = state(folder)
    assert fmt.snapshot_name(2) in refused(name, "--size", "8M", "--data-dir", folder)
    assert state(folder) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_refused(make, name, folder):
    two_snapshots(make, folder)
    (folder / fmt.snapshot_name(2)).chmod(0)
    assert fmt.snapshot_name(2) in refused(name, "--size", "8M", "--data-dir", folder)


@pytest.mark.parametrize("damage", [flip_in_head, newer, fifo, folder_instead])
def test_a_log_that_cannot_be_read_is_refused_and_set_aside(make, name, folder, damage):
    two_snapshots(make, folder, log=True)
    damage(fmt.listing(folder)[1][-1][1])
    before = state(folder)
    args = ("--size", "32M", "--data-dir", folder, "--log", "always")
    assert "--start-empty" in refused(name, *args)
    assert state(folder) == before
    with supervising(name, *args, "--start-empty"), shmcache.attach(name) as cache:
        cache.set("k", 1)
    shmcache.unlink(name)
    with supervising(name, *args, "--start-empty"), shmcache.attach(name) as cache:
        assert cache.get("k") == 1, "what was acknowledged since is restored, and not set aside"
    assert {p.name for p in (folder / "set-aside-1").iterdir()} == {p for p in before if "/" not in p} - {datadir.LOCK_NAME}


def test_logs_without_the_snapshot_before_them_are_refused(make, name, folder):
    two_snapshots(make, folder, log=True)
    for _, path in fmt.listing(folder)[0]:
        path.unlink()
    assert fmt.log_name(1) in refused(name, "--size", "8M", "--data-dir", folder)


def test_a_log_that_was_only_begun_is_nothing(name, folder):
    """Its first process was killed, or the power went, before its beginning was whole: nothing had been acknowledged."""
    folder.mkdir()
    (folder / fmt.log_name(1)).write_bytes(fmt.preamble("log")[:7])
    with supervising(name, "--size", "32M", "--data-dir", folder, "--log", "always"), shmcache.attach(name) as cache:
        cache.set("k", 1)
    shmcache.unlink(name)
    with supervising(name, "--size", "32M", "--data-dir", folder, "--log", "always"), shmcache.attach(name) as cache:
        assert cache["k"] == 1


@pytest.mark.parametrize("damage", [d for d in UNREADABLE if d is not newer])
def test_start_empty_is_for_what_cannot_be_read_only(make, name, folder, damage):
    two_snapshots(make, folder)
    damage(folder / fmt.snapshot_name(2))
    with supervising(name, "--size", "8M", "--data-dir", folder, "--start-empty") as (_, said), shmcache.attach(name) as cache:
        assert cache["n"] == 1
        assert "passed over" in said and not list(folder.glob("set-aside-*"))


def test_a_newer_file_is_never_passed_over(make, name, folder):
    two_snapshots(make, folder)
    newer(folder / fmt.snapshot_name(2))
    assert "newer version" in refused(name, "--size", "8M", "--data-dir", folder)


def test_a_foreign_directory_is_refused_whatever_is_said(make, name, folder):
    two_snapshots(make, folder)
    assert "another directory" in refused(name + "b", "--size", "8M", "--data-dir", folder, "--start-empty")


def test_start_empty_says_into_what(name, folder):
    for args in (("--data-dir", folder), ("--size", "8M")):
        out = subprocess.run(supervise(name, *args, "--start-empty"), capture_output=True, text=True, check=False, timeout=LIMIT)
        assert out.returncode == 2 and "--size" in out.stderr


def test_serve_does_not_start_empty_either(make, name, folder, tmp_path):
    pytest.importorskip("uvloop", reason="serve needs uvloop")
    two_snapshots(make, folder)
    for number in (1, 2):
        cut(folder / fmt.snapshot_name(number))
    argv = [sys.executable, "-m", "shmcache.cli", "serve", name, "--port", "0", "--unix", str(tmp_path / "s"), "--size", "8M",
            "--data-dir", str(folder)]  # fmt: skip
    out = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert out.returncode == 2 and "--start-empty" in out.stderr
    with subprocess.Popen([*argv, "--start-empty"], stderr=subprocess.PIPE, text=True) as process:
        try:
            said = ""
            while "serving" not in said:
                line = process.stderr.readline()
                assert line, f"it ended: {said}"
                said += line
            assert "set-aside-1" in said
            process.terminate()
            assert process.wait(LIMIT) == 0
        finally:
            process.kill()


# ---- nothing waits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [fmt.snapshot_name, fmt.log_name])
def test_a_fifo_of_such_a_name_holds_nobody_up(make, name, folder, of):
    make("8M", log_buffer="64K", max_processes=16)
    folder.mkdir()
    os.mkfifo(folder / of(7))
    with supervising(name, "--data-dir", folder, "--log", "everysec") as (process, _), shmcache.attach(name) as cache:
        cache.set("k", 1)
        process.terminate()
        assert process.wait(LIMIT) == 0
    assert stat.S_ISFIFO((folder / of(7)).lstat().st_mode)
    assert [n for n, _ in fmt.listing(folder)[0] if n != 7] != [], "the snapshot at its end is written"


# ---- rotation -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def taken(folder):
    with datadir.take(folder) as path:
        yield path


def restored(name, folder):
    report = snapshot.restore(name, folder)
    return report, shmcache.attach(name)


def numbers(files):
    return [number for number, _ in files]


@pytest.mark.parametrize("damage", [d for d in UNREADABLE if d is not newer])
def test_what_was_passed_over_stays(make, name, folder, damage):
    two_snapshots(make, folder)
    path = folder / fmt.snapshot_name(2)
    damage(path)
    before = state(folder)[path.name]
    with datadir.take(folder):
        report, cache = restored(name, folder)
        with cache:
            assert cache["n"] == 1 and len(report["damaged"]) == 1
            reports = [snapshot.write(cache, folder, keep=2) for _ in range(4)]
    assert numbers(fmt.listing(folder)[0]) == [2, 5, 6]
    assert state(folder)[path.name] == before
    assert all(len(report["kept"]) == 1 and str(path) in report["kept"][0] for report in reports)


@pytest.mark.parametrize("damage", UNREADABLE)
def test_what_becomes_unreadable_later_stays(make, taken, damage):
    cache = make("8M")
    snapshot.write(cache, taken)
    damage(taken / fmt.snapshot_name(1))
    before = state(taken)[fmt.snapshot_name(1)]
    for _ in range(4):
        report = snapshot.write(cache, taken)
    if damage in (cut, flip_in_end, link_to_damage):  # its beginning says that all of it is in the live segment
        assert numbers(fmt.listing(taken)[0]) == [4, 5] and report["kept"] == []
    else:
        assert numbers(fmt.listing(taken)[0]) == [1, 4, 5] and len(report["kept"]) == 1
        assert state(taken)[fmt.snapshot_name(1)] == before


def test_logs_stay_with_the_snapshot_that_may_need_them(make, name, folder):
    """Of the live segment they go in their turn, or they would fill the disk."""
    two_snapshots(make, folder, log=True)
    was = numbers(fmt.listing(folder)[1])
    assert len(was) >= 2
    damaged = folder / fmt.snapshot_name(2)
    flip_in_end(damaged)
    with datadir.take(folder):
        report, cache = restored(name, folder)
        with cache:
            assert cache["n"] == 3 and len(report["damaged"]) == 1
            log = AppendLog(cache, folder, "always")
            try:
                for _ in range(5):
                    snapshot.write(cache, folder, log=log)
                now = numbers(fmt.listing(folder)[1])
                assert [n for n in now if n <= was[-1]] == was
                assert len(now) - len(was) <= 3
                damaged.unlink()  # as they were told
                snapshot.write(cache, folder, log=log)
                assert numbers(fmt.listing(folder)[1])[0] > was[-1]
            finally:
                log.close()


@pytest.mark.parametrize("damage", [flip_in_head, newer, fifo, folder_instead])
def test_a_log_that_cannot_be_read_stays(make, taken, damage):
    cache = make("8M", log_buffer="64K", max_processes=16)
    log = AppendLog(cache, taken, "always")
    try:
        cache.set("k", 1)
        snapshot.write(cache, taken, log=log)
        first = fmt.listing(taken)[1][0]
        damage(first[1])
        for _ in range(4):
            report = snapshot.write(cache, taken, log=log)
        assert numbers(fmt.listing(taken)[1])[0] == first[0]
        assert len(fmt.listing(taken)[1]) <= 4
        assert any(fmt.log_name(first[0]) in line for line in report["kept"])
    finally:
        log.close()


def test_only_temporary_files_of_ours_go(make, taken):
    cache = make("8M")
    (taken / "snapshot-of-somebody.shmcache.tmp").write_text("precious")
    (taken / (fmt.snapshot_name(9) + ".tmp")).mkdir()
    (taken / (fmt.snapshot_name(3) + ".tmp")).write_text("half")
    snapshot.write(cache, taken)
    assert sorted(p.name for p in taken.iterdir()) == [
        datadir.LOCK_NAME, fmt.snapshot_name(1), fmt.snapshot_name(9) + ".tmp", "snapshot-of-somebody.shmcache.tmp"
    ]  # fmt: skip


@pytest.mark.parametrize("umask", [0, 0o277])
def test_files_are_for_their_owner_alone(make, taken, umask):
    cache = make("8M", log_buffer="64K", max_processes=16)
    before = os.umask(umask)
    try:
        log = AppendLog(cache, taken, "always")
        try:
            snapshot.write(cache, taken, log=log)
        finally:
            log.close()
    finally:
        os.umask(before)
    for _, path in (*fmt.listing(taken)[0], *fmt.listing(taken)[1]):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
