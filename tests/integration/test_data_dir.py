"""A data directory with what cannot be read in it: nothing starts empty beside it, nothing waits for it, and nothing removes it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
import subprocess
import sys
import time

import pytest

import shmcache
from shmcache import cache as cache_module
from shmcache import cli, errors, segment
from shmcache.supervisor import datadir, snapshot
from shmcache.supervisor import format as fmt
from shmcache.supervisor.appendlog import POLICIES, AppendLog, is_whole
from shmcache.supervisor.loop import Supervisor

LIMIT = 30  # seconds, of any wait


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


@pytest.mark.parametrize("optimized", [[], ["-O"]], ids=["", "-O"])
@pytest.mark.parametrize("newest", [-1, -(1 << 41), 1 << 63])
@pytest.mark.parametrize("kind", ["snapshot", "log"])
def test_a_beginning_that_no_segment_has_written_is_refused(make, name, folder, kind, newest, optimized):
    """A version below all others would make a segment that looks as if nothing were to be restored into it."""
    cache = make("8M", max_processes=16, log_buffer="64K")
    with datadir.take(folder):
        if kind == "log":
            AppendLog(cache, folder, "always").close()
        else:
            snapshot.write(cache, folder)
    shmcache.unlink(cache.name)
    path = next(path for of_kind in fmt.listing(folder) for _, path in of_kind)
    head = datadir.head(path, kind) | {"name": name, "newest": newest}
    path.unlink()
    with os.fdopen(datadir.create(path), "wb", buffering=0) as file:
        writer = fmt.Writer(file, kind, head)
        if kind == "snapshot":
            writer.end({"items": 0, "n_stripes": 1, "floors": bytes(8), "newest": 0, "epoch": 1})
    argv = supervise(name, "--data-dir", folder, "--size", "8M", *([] if kind == "snapshot" else ["--log", "always"]))
    out = subprocess.run([argv[0], *optimized, *argv[1:]], capture_output=True, text=True, check=False, timeout=LIMIT)
    assert out.returncode == 1 and str(path) in out.stderr and "Traceback" not in out.stderr
    assert not os.path.exists(segment.check_name(name))


def test_one_bad_beginning_hides_no_other(make, folder):
    """Where no note says what was given out the files do, each for itself."""
    cache = make("8M", max_processes=16)
    with datadir.take(folder):
        for n in range(3):
            cache.set("k", n)
            snapshot.write(cache, folder)
        (folder / datadir.VERSIONS_NAME).unlink(missing_ok=True)
        given = datadir.given_out(folder)
        path = fmt.listing(folder)[0][0][1]
        head = datadir.head(path, "snapshot") | {"newest": -1}
        path.unlink()
        with os.fdopen(datadir.create(path), "wb", buffering=0) as file:
            fmt.Writer(file, "snapshot", head)
        assert given.newest > 0 and datadir.given_out(folder) == given


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


@pytest.mark.parametrize("there", ["", "a", "a/b", "a/b/c"])
def test_a_new_directory_outlives_a_power_cut(tmp_path, monkeypatch, there):
    """Its own entry, and those of the folders above it that were made with it, are synced before anything is written there."""
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    folders = [tmp_path, tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/c"]
    with datadir.take(folders[-1]):
        assert {str(folder) for folder in folders[there.count("/") + (there != "") :-1]} <= set(synced)
        assert str(folders[-2]) in synced, "also if a process was killed when it was just made"
    synced.clear()
    with datadir.take(folders[-1]):
        assert synced == []


# ---- several lives in one directory -------------------------------------------------------------------------------------------------


def lived(name, folder, value, log=True):
    """A life that ends with a snapshot: restored from there if anything is there."""
    if any(fmt.listing(folder)):
        snapshot.restore(name, folder)
        cache = shmcache.attach(name)
    else:
        cache = shmcache.create(name, "8M", log_buffer="64K", max_processes=16)
    with cache:
        logging = AppendLog(cache, folder, "always") if log else None
        cache.set("n", value)
        cache.set("of", value)
        snapshot.write(cache, folder, log=logging)
        cache.set("n", value)
        if logging:
            logging.close()
    shmcache.unlink(name)


def is_of(name, folder):
    with shmcache.attach(name) as cache:
        return datadir.is_of(cache, folder)


def names(folder):
    return {path.name for of_kind in fmt.listing(folder) for _, path in of_kind}


@pytest.mark.parametrize("log", [False, True])
def test_what_a_later_life_was_not_restored_from_stays(name, taken, log):
    """A worker was first, and then its segment was restored: that one does not have what the former one had."""
    lived(name, taken, "precious", log)
    precious = names(taken)
    with shmcache.create(name, "8M", log_buffer="64K", max_processes=16) as worker:
        worker.set("n", "worker's")
        report = snapshot.write(worker, taken)
        assert {line.split(":")[0].split(" is of")[0] for line in report["kept"]} >= {str(taken / fmt.snapshot_name(1))}
    shmcache.unlink(name)
    for life in range(3):
        lived(name, taken, life)
        assert names(taken) >= precious
    others = names(taken) - precious
    assert sorted(others) == sorted([*[n for n in others if n.startswith("snapshot")][:2], *[n for n in others if n.startswith("log")]])
    assert len(others) <= 2 + 3, "what those lives left goes in its turn"
    for path in others:
        (taken / path).unlink()  # as the message says
    _, cache = restored(name, taken)
    with cache:
        assert cache["n"] == "precious"
    shmcache.unlink(name)


def test_what_a_chain_of_lives_left_goes(name, taken):
    """Also what lives left that ended without a snapshot."""
    for life in range(4):
        lived(name, taken, life)
        for _ in range(2):
            snapshot.restore(name, taken)
            with shmcache.attach(name) as cache:
                log = AppendLog(cache, taken, "always")
                cache.set("n", "logged")
                log.close()
            shmcache.unlink(name)
    _, cache = restored(name, taken)
    with cache:
        assert cache["n"] == "logged" and cache["of"] == 3
        log = AppendLog(cache, taken, "always")
        for _ in range(3):
            report = snapshot.write(cache, taken, log=log)
        log.close()
        assert report["kept"] == []
        assert all(datadir.life_of(head) == datadir.life(cache) for of_kind in datadir.heads(taken) for head in of_kind)
    shmcache.unlink(name)


def test_a_log_behind_a_snapshot_of_another_life_is_not_whole(name, taken):
    """The snapshots between are damaged: what was in them is missing, though the log has what came later."""
    lived(name, taken, "former", log=False)
    with shmcache.create(name, "8M", log_buffer="64K", max_processes=16) as worker:
        worker.set("n", "worker's")
        snapshot.write(worker, taken)
    shmcache.unlink(name)
    lived(name, taken, "later")
    report, cache = restored(name, taken)
    with cache:
        assert report["gaps"] == 0 and cache["n"] == "later"
    shmcache.unlink(name)
    for _, path in fmt.listing(taken)[0][1:]:
        cut(path)
    report, cache = restored(name, taken)
    with cache:
        assert report["gaps"] > 0 and cache["n"] == "later" and cache["of"] == "later"
    shmcache.unlink(name)


@pytest.mark.parametrize("since", ["a life", "a snapshot", "a log"])
def test_what_was_restored_from_a_copy_does_not_have_what_came_since(name, folder, tmp_path, since):
    """Restored by hand from a backup, and then supervised with the directory of which it was one."""
    args = ("--size", "8M", "--data-dir", folder, "--log", "always")
    with datadir.take(folder):
        lived(name, folder, 1)
    backup = tmp_path / "backup"
    if since == "a life":
        shutil.copytree(folder, backup)
        with datadir.take(folder):
            lived(name, folder, "since")
    else:
        with datadir.take(folder):
            snapshot.restore(name, folder)
            with shmcache.attach(name) as cache:
                log = AppendLog(cache, folder, "always")
                cache.set("n", 2)
                if since == "a snapshot":
                    snapshot.write(cache, folder, log=log)
                shutil.copytree(folder, backup)
                cache.set("n", "since")
                if since == "a snapshot":
                    snapshot.write(cache, folder, log=log)
                log.close()
            shmcache.unlink(name)
    was = names(folder)
    with datadir.take(backup):
        snapshot.restore(name, backup)
        assert is_of(name, backup)
    with shmcache.attach(name) as cache:
        assert cache["n"] in (1, 2)
        out = subprocess.run(supervise(name, *args), capture_output=True, text=True, check=False, timeout=LIMIT)
        assert out.returncode == 1 and "another directory" in out.stderr and "Traceback" not in out.stderr
        with datadir.take(folder):
            assert not is_of(name, folder)
            for _ in range(3):
                report = snapshot.write(cache, folder, keep=1)
            assert names(folder) >= was and report["kept"] != []
        with supervising(name, "--data-dir", backup, "--log", "always"):
            pass
    shmcache.unlink(name)
    for number in set(numbers(fmt.listing(folder)[0])):
        if fmt.snapshot_name(number) not in was:
            (folder / fmt.snapshot_name(number)).unlink()
    with supervising(name, *args), shmcache.attach(name) as cache:
        assert cache["n"] == "since"


def note_is_damaged(path):
    flip_in_head(path)


def note_is_lost(path):
    path.unlink()


def note_is_no_map(path):
    path.unlink()
    with os.fdopen(datadir.create(path), "wb", buffering=0) as file:
        fmt.Writer(file, "log", {"lives": 5})


@pytest.mark.parametrize("damage", [note_is_damaged, note_is_lost, note_is_no_map, newer, fifo])
def test_without_the_note_of_lives_nothing_of_others_goes(name, taken, damage):
    lived(name, taken, 1)
    was = names(taken)
    _, cache = restored(name, taken)
    with cache:
        damage(taken / datadir.LIVES_NAME)
        reports = [snapshot.write(cache, taken, keep=1) for _ in range(3)]
        assert names(taken) >= was and len(names(taken) - was) == 1
        assert all(len(report["kept"]) == len(was) + (damage is not note_is_lost) for report in reports)
    shmcache.unlink(name)
    if damage is newer:
        with pytest.raises(errors.NewerFormat):
            snapshot.restore(name, taken)
        return
    _, cache = restored(name, taken)
    with cache:
        assert cache["n"] == 1
        snapshot.write(cache, taken, keep=1)
        assert names(taken) >= was, "they are of lives of which nothing is noted any more"
    shmcache.unlink(name)


@contextlib.contextmanager
def full_disk():
    """For the directory's notes."""

    def full(path, head):
        raise OSError(errno.ENOSPC, "full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datadir, "_replace", full)
        yield


@pytest.mark.parametrize("process", ["the same", "another"])
def test_a_full_disk_is_no_reason_not_to_restore(name, taken, process):
    lived(name, taken, 1)
    was = names(taken)
    with full_disk():
        report, cache = restored(name, taken)
        assert "full" in report["unnoted"]
    with cache:
        assert cache["n"] == 1
        if process == "another":
            datadir._unnoted.clear()
        report = snapshot.write(cache, taken, keep=1)
        if process == "another":  # does not know from which files
            assert names(taken) >= was and len(report["kept"]) == len(was)
        else:
            assert not names(taken) & was and report["kept"] == []
    shmcache.unlink(name)


@pytest.mark.parametrize("first", ["log", "snapshot"])
@pytest.mark.parametrize("process", ["the same", "another"])
def test_no_file_of_a_life_is_begun_before_the_life_is_noted(name, taken, first, process):
    """Else its own supervisor, started again, would take them for another segment's."""
    lived(name, taken, 1)
    was = names(taken)
    with full_disk():
        _, cache = restored(name, taken)
        with cache:
            log = AppendLog(cache, taken, "always")
            with pytest.raises(errors.LogFull):
                cache.set("n", 2)
            with pytest.raises(OSError, match="full"):
                snapshot.write(cache, taken)
            log.close()
            assert names(taken) == was
    if process == "another":
        datadir._unnoted.clear()
    assert is_of(name, taken)
    with shmcache.attach(name) as cache:
        if first == "log":
            log = AppendLog(cache, taken, "always")
            cache.set("n", "acknowledged")
            log.close()
        else:
            snapshot.write(cache, taken)
        assert is_of(name, taken) and names(taken) > was
        assert datadir.life(cache) in datadir.lives(taken)
    shmcache.unlink(name)
    report, cache = restored(name, taken)
    with cache:
        assert cache["n"] == ("acknowledged" if first == "log" else 1)
        assert process == "another" or report["gaps"] == 0
    shmcache.unlink(name)


@pytest.mark.parametrize("since", ["a life", "a record"])
def test_what_could_not_be_noted_is_true_of_no_other_directory(name, folder, tmp_path, since):
    backup, copy = tmp_path / "backup", tmp_path / "copy"
    with datadir.take(folder):
        lived(name, folder, 1)
        snapshot.restore(name, folder)
        with shmcache.attach(name) as cache:
            log = AppendLog(cache, folder, "always")
            shutil.copytree(folder, backup)
            cache.set("n", "since")
            log.close()
        shmcache.unlink(name)
        if since == "a life":
            lived(name, folder, "since")
    with datadir.take(backup), full_disk():
        snapshot.restore(name, backup)
    shutil.copytree(backup, copy)
    assert is_of(name, backup) and not is_of(name, folder)
    assert is_of(name, copy), "the same is in it"
    with shmcache.attach(name) as cache, datadir.take(folder):
        snapshot.write(cache, folder)
        assert datadir.life(cache) not in datadir.lives(folder)
        log = AppendLog(cache, backup, "always")
        log.close()
        assert is_of(name, backup) and not is_of(name, copy)
    shmcache.unlink(name)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("by", ["nobody", "a worker"])
def test_a_segment_that_goes_at_the_start_is_not_replaced_by_another(name, folder, monkeypatch, live, by):
    """Unlinked when it was restored, or found to be the directory's: nothing begins empty beside the files, and no other segment is logged
    there."""
    with datadir.take(folder):
        lived(name, folder, "acknowledged")
        if live:
            snapshot.restore(name, folder)
    was, real = names(folder), cache_module.open_logged

    def gone(*args, **options):
        shmcache.unlink(name)
        if by == "a worker":
            shmcache.create(name, "32M", log_buffer="64K").close()
        return real(*args, **options)

    monkeypatch.setattr(cache_module, "open_logged", gone)
    args = cli.parser().parse_args(["supervise", name, "--size", "32M", "--data-dir", str(folder), "--log", "always"])
    with datadir.take(folder), pytest.raises(errors.SegmentNotFound if by == "nobody" else errors.ForeignDataDir):
        cli._live_or_restored(args, folder)
    assert names(folder) == was
    assert os.path.exists(segment.check_name(name)) == (by == "a worker")
    with contextlib.suppress(shmcache.SegmentNotFound):
        shmcache.unlink(name)
    with datadir.take(folder):
        _, cache = restored(name, folder)
    with cache:
        assert cache["n"] == "acknowledged"
    shmcache.unlink(name)


@pytest.mark.parametrize("damage", [flip_in_end, cut])
def test_a_segment_goes_on_behind_a_snapshot_that_was_passed_over(name, folder, damage):
    """The newest file whose beginning can be read is of a life that is not in it."""
    with datadir.take(folder):
        lived(name, folder, "former", log=False)
        lived(name, folder, "passed over", log=False)
    damage(folder / fmt.snapshot_name(2))
    args = ("--size", "8M", "--data-dir", folder, "--log", "always", "--snapshot-every", 1000)
    with datadir.take(folder):
        snapshot.restore(name, folder, log_policy=3, log_buffer="64K")
        with shmcache.attach(name) as cache:
            log = AppendLog(cache, folder, "always")
            cache.set("n", "acknowledged")
            log.close()
            assert is_of(name, folder)
            report = snapshot.write(cache, folder, keep=1)
            assert any(fmt.snapshot_name(2) in line for line in report["kept"]), "it is not in it all the same"
        (folder / fmt.snapshot_name(report["number"])).unlink()
    with supervising(name, *args), shmcache.attach(name) as cache:
        assert cache["n"] == "acknowledged"
    shmcache.unlink(name)


@pytest.mark.parametrize("damage", [flip_in_head, flip_in_end, None])
def test_the_log_of_a_restored_life_is_not_all_there_was(name, taken, damage):
    """A log's file 1 may begin behind a restore: from a snapshot of a life that was not logged."""
    lived(name, taken, "in the snapshot only", log=False)
    snapshot.restore(name, taken, log_policy=3, log_buffer="64K")
    with shmcache.attach(name) as cache:
        log = AppendLog(cache, taken, "always")
        cache.set("new", 1)
        log.close()
    shmcache.unlink(name)
    path = taken / fmt.snapshot_name(1)
    if damage:
        damage(path)
        with pytest.raises(errors.NoSnapshot):
            snapshot.restore(name, taken)
        assert not os.path.exists(segment.check_name(name))
    else:
        path.unlink()
        assert snapshot.restore(name, taken)["gaps"] >= 1
        shmcache.unlink(name)


def test_a_log_is_whole_behind_a_restore_only_with_what_was_restored(name, taken, tmp_path):
    lived(name, taken, "older", log=False)
    older, aside = tmp_path / "older", tmp_path / "aside"
    shutil.copytree(taken, older)
    lived(name, taken, "newer", log=False)
    snapshot.restore(name, taken, log_policy=3, log_buffer="64K")
    with shmcache.attach(name) as cache:
        assert is_whole(cache, taken)
        files = [path for of_kind in fmt.listing(taken) for _, path in of_kind]
        aside.mkdir()
        for path in files:
            path.rename(aside / path.name)
        assert not is_whole(cache, taken), "they were moved out"
        for _, path in fmt.listing(older)[0]:
            shutil.copy2(path, taken)
        assert not is_whole(cache, taken), "an older copy was put back"
        for path in files:
            shutil.copy2(aside / path.name, path)
        assert is_whole(cache, taken)
        log = AppendLog(cache, taken, "always")
        log.close()
        assert is_whole(cache, taken)
    shmcache.unlink(name)


@pytest.mark.parametrize("note", [datadir.VERSIONS_NAME, datadir.LIVES_NAME])
def test_to_start_empty_beside_a_note_of_a_newer_format(name, folder, note):
    """Refused before anything is moved; or it begins, and so does the next."""
    with datadir.take(folder) as taken:
        lived(name, taken, 1)
        snapshot.restore(name, taken)
        shmcache.unlink(name)
        if note == datadir.VERSIONS_NAME:
            datadir.note_given_out(taken, name, datadir.GivenOut(1))
    newer(folder / note)
    before = state(folder)
    args = ("--size", "32M", "--data-dir", folder, "--log", "always")
    refused(name, *args)
    if note == datadir.VERSIONS_NAME:
        refused(name, *args, "--start-empty")
        assert state(folder) == before
        return
    with supervising(name, *args, "--start-empty"), shmcache.attach(name) as cache:
        cache.set("k", 1)
    with supervising(name, *args), shmcache.attach(name) as cache:
        assert cache["k"] == 1
    shmcache.unlink(name)
    with supervising(name, *args), shmcache.attach(name) as cache:
        assert cache["k"] == 1


def test_a_note_without_those_that_were_passed_over_is_read(name, taken):
    lived(name, taken, 1)
    snapshot.restore(name, taken)
    path = taken / datadir.LIVES_NAME
    head = datadir.head(path, "log")
    del head["passed"]
    datadir._replace(path, head)
    assert is_of(name, taken)
    assert list(datadir.lives(taken)) == [life for life, _ in head["lives"]]
    shmcache.unlink(name)


def killed_in_a_restore(name, folder, full=False, log="always"):
    """When workers are in, and all but its last step is done. full: it could not note of what the segment is restored."""
    code = f"""
import os
from pathlib import Path
from shmcache.core import _stream
from shmcache.supervisor import datadir, snapshot
def full(path, head):
    raise OSError(28, "full")
if {full}:
    datadir._replace = full
class Killed(_stream.Restore):
    def finish(self):
        os._exit(9)
_stream.Restore = Killed
snapshot.restore({name!r}, Path({str(folder)!r}), log_policy={POLICIES[log]})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9


def test_a_restore_is_completed_where_it_was_begun_only(name, folder, tmp_path):
    with datadir.take(folder):
        lived(name, folder, 1)
    backup = tmp_path / "backup"
    shutil.copytree(folder, backup)
    with datadir.take(folder):
        lived(name, folder, 2)
    killed_in_a_restore(name, backup)
    with datadir.take(folder), pytest.raises(errors.ForeignDataDir, match="unlink the segment"):
        snapshot.restore(name, folder)
    with shmcache.attach(name) as cache, datadir.take(backup):
        assert cache["n"] == 1 and cache.durability()["restoring"]
        snapshot.restore(name, backup)
        assert not cache.durability()["restoring"]
    shmcache.unlink(name)


def test_a_restore_that_could_not_be_noted_is_completed_where_it_was_begun_only(name, folder, tmp_path):
    with datadir.take(folder):
        lived(name, folder, 1)
    backup = tmp_path / "backup"
    shutil.copytree(folder, backup)
    with datadir.take(folder):
        lived(name, folder, 2)
    killed_in_a_restore(name, backup, full=True, log="everysec")
    with shmcache.attach(name) as cache:
        cache.set("since", 1)
        with datadir.take(folder), pytest.raises(errors.ForeignDataDir, match="--start-empty"):
            snapshot.restore(name, folder)
        with datadir.take(backup):
            assert snapshot.restore(name, backup)["unnoted"] == ""
            assert not cache.durability()["restoring"] and datadir.life(cache) in datadir.lives(backup)
            assert cache["n"] == 1 and cache["since"] == 1
    shmcache.unlink(name)


def test_what_the_refusal_to_complete_a_restore_says_keeps_what_workers_wrote(name, folder, tmp_path):
    with datadir.take(folder):
        lived(name, folder, 1)
    backup = tmp_path / "backup"
    shutil.copytree(folder, backup)
    with datadir.take(folder):
        lived(name, folder, 2)
    killed_in_a_restore(name, backup)
    shutil.rmtree(backup)
    args = ("--size", "8M", "--data-dir", folder, "--log", "always")
    with shmcache.attach(name) as cache:
        out = subprocess.run(supervise(name, *args), capture_output=True, text=True, check=False, timeout=LIMIT)
        assert out.returncode == 1 and "--start-empty" in out.stderr
        for path in names(folder):
            (folder / path).rename(tmp_path / path)
        with supervising(name, *args, "--start-empty"):
            cache.set("since", 1)
        assert cache["n"] == 1 and not cache.durability()["restoring"]
    shmcache.unlink(name)


def test_what_was_restored_before_start_empty_is_missing_in_the_log(name, folder):
    """Workers were in: it goes on with what is there, which no file has."""
    with datadir.take(folder):
        lived(name, folder, 1)
        killed_in_a_restore(name, folder)
        datadir.set_aside(folder)
        snapshot.end_restore(name)
        with shmcache.attach(name) as cache:
            assert cache["n"] == 1
            supervisor = Supervisor(cache, folder=folder, log="always")
            cache.set("new", 1)
            supervisor.close()
            assert cache.durability()["log_gaps"] > 0
        shmcache.unlink(name)
        report, cache = restored(name, folder)
        with cache:
            assert cache["new"] == 1 and "n" not in cache and report["gaps"] > 0
        shmcache.unlink(name)


def test_start_empty_that_was_killed_when_all_was_set_aside(name, folder):
    """Of a segment that counts as being restored no snapshot would ever be written."""
    with datadir.take(folder):
        lived(name, folder, 1)
        killed_in_a_restore(name, folder)
        datadir.set_aside(folder)
    with supervising(name, "--size", "8M", "--data-dir", folder, "--start-empty"), shmcache.attach(name) as cache:
        assert cache["n"] == 1
        deadline = time.monotonic() + LIMIT
        while not fmt.listing(folder)[0]:
            assert time.monotonic() < deadline, "no snapshot is written"
            time.sleep(0.01)
    shmcache.unlink(name)
