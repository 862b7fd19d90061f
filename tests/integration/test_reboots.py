"""Several lives of a segment in a row, one restored from the other's files: nothing that was acknowledged is lost, and no row goes back."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import pytest

import shmcache
from shmcache import cache as cache_module
from shmcache import cli, errors, segment
from shmcache.core import _dirty
from shmcache.supervisor import datadir, snapshot, writeback
from shmcache.supervisor import format as fmt
from shmcache.supervisor.appendlog import AppendLog
from shmcache.supervisor.loop import Supervisor
from tests.integration.test_lock_limit import stopped_holder
from tests.integration.test_store import DictStore

BACK = shmcache.Policy("back", flush_every=0.01, timeout=5.0)
FUTURE = 2**61  # of rows' versions: no clock of this century gives so high ones


class Machine:
    """A segment that writes back, its store, and its data directory: it is killed, and restored."""

    def __init__(self, name, folder):
        self.name, self.folder, self.store = name, folder, DictStore()
        self.log = None
        self.created()

    def created(self, back=0):
        """An empty segment, as a worker makes it. back: versions by which the clock was set back."""
        options = {"log_buffer": "64K", "max_processes": 16, "policy": BACK, "store": self.store}
        self.cache = shmcache.create(self.name, "8M", **options)
        header = self.cache.views(writable=True).header
        header["version_base"] -= back

    def logged(self):
        self.log = AppendLog(self.cache, self.folder, "always")

    def snapshot(self):
        snapshot.write(self.cache, self.folder, log=self.log)

    def flush(self):
        """Who stores comes, stores all there is, and goes."""
        with shmcache.attach(self.name) as other:
            thread = writeback.WriteBack(other, self.store, self.folder)
            try:
                self.cache.flush(30)
            finally:
                thread.stop()

    @contextlib.contextmanager
    def stores(self, down=False):
        """The supervisor's part that stores, without its thread. down: the store fails."""
        store = Mock(ordered=True, store_many=Mock(side_effect=errors.StoreUnavailable("down"))) if down else self.store
        store.delete_many = store.store_many if down else store.delete_many
        with shmcache.attach(self.name) as other, pytest.MonkeyPatch.context() as patch:
            patch.setattr(writeback.WriteBack, "run", lambda self: None)
            patch.setattr(writeback, "AT_END", 0.0)
            thread = writeback.WriteBack(other, store, self.folder)
            try:
                yield thread
            finally:
                thread.stop()

    def killed(self):
        """All its processes, and the segment is gone."""
        if self.log:
            self.log.close()
            self.log = None
        if not self.cache.closed:
            assert self.cache.verify() == []
            self.cache.close()
        with contextlib.suppress(shmcache.SegmentNotFound):
            shmcache.unlink(self.name)

    def reboot(self, **options):
        """A new life; logged, if the one before it was."""
        log_policy = 3 if self.log else 0
        self.killed()
        report = snapshot.restore(self.name, self.folder, log_policy=log_policy, **options)
        self.cache = shmcache.attach(self.name, store=self.store)
        if log_policy:
            self.logged()
        return report

    def row(self, key):
        entry = self.store.load_many([key]).get(key)
        return None if entry is None else entry.value

    def version(self, key):
        return self.store.rows[key][2]


@pytest.fixture
def folder(tmp_path):
    with datadir.take(tmp_path / "data") as folder:
        yield folder


@pytest.fixture
def machine(name, folder):
    machine = Machine(name, folder)
    yield machine
    machine.killed()


def segment_exists(name):
    return os.path.exists(segment.check_name(name))


def flipped(path):
    """One bit of the file's first block of records."""
    data = bytearray(path.read_bytes())
    with fmt.Reader(path) as reader:
        at = next(offset for offset, _ in reader.blocks()) + fmt.BLOCK.size
    data[at + 3] ^= 4
    path.write_bytes(data)


# ---- one restore, several lives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deleted", [False, True])
def test_a_second_crash_before_the_second_life_has_a_snapshot(machine, deleted):
    """Its log is read with the first life's snapshot."""
    machine.cache.set("k", 1)
    machine.snapshot()
    machine.logged()
    machine.reboot()
    machine.cache.set("k", 2)
    machine.flush()
    if deleted:
        assert machine.cache.delete("k")
    else:
        machine.cache.set("k", 3)
    machine.reboot()
    assert machine.cache.get("k") == (None if deleted else 3)
    machine.flush()
    assert machine.row(b"k") == (None if deleted else 3)
    machine.reboot()
    machine.flush()
    assert machine.row(b"k") == (None if deleted else 3)


@pytest.mark.parametrize("logged", [False, True])
def test_what_many_lives_have_acknowledged(machine, logged):
    """Each writes some keys, stores some, dies with a snapshot or without; in the end each row is what was acknowledged last, or with
    neither log nor snapshot since what was stored last."""
    expected, stored = {}, {}
    if logged:
        machine.logged()
    for life in range(8):
        for n in range(3):
            for key in (b"all", b"%d" % (life % 3), b"%d-%d" % (life % 2, n)):
                machine.cache.set(key, life * 10 + n)
                expected[key] = life * 10 + n
            if (life + n) % 3 == 0:
                machine.flush()
                stored |= expected
        if life in (0, 1, 5):
            machine.snapshot()
            stored |= expected
        elif not logged:
            expected = dict(stored)
        machine.reboot()
    machine.flush()
    assert {key: machine.row(key) for key in expected} == expected


def test_two_restores_with_the_store_down_in_between(machine):
    machine.cache.set("k", 1)
    machine.cache.set("d", 1)
    machine.snapshot()
    machine.cache.set("k", 2)
    machine.cache.delete("d")
    machine.flush()
    machine.reboot()
    machine.snapshot()  # what is restored is dirty still
    machine.reboot()
    machine.flush()
    assert machine.row(b"k") == 2
    assert machine.row(b"d") is None
    assert machine.cache.get("k") == 2


def test_an_earlier_lifes_snapshot_is_used_since_the_newest_is_damaged(machine, folder):
    machine.cache.set("k", 1)
    machine.snapshot()
    machine.cache.set("k", 2)
    machine.flush()
    machine.reboot()
    machine.snapshot()
    flipped(fmt.listing(folder)[0][-1][1])
    report = machine.reboot()
    assert len(report["damaged"]) == 1
    machine.flush()
    assert machine.row(b"k") == 2
    machine.cache.set("k", 3)
    machine.flush()
    assert machine.row(b"k") == 3


def test_two_lives_of_the_same_files_give_out_no_version_twice(machine):
    """The first of them has left nothing but rows."""
    machine.cache.set("k", 0)
    machine.snapshot()
    seen = set()
    for life in range(1, 4):
        machine.reboot()
        machine.flush()
        machine.cache.set("k", life)
        seen.add(machine.cache.gets("k")[1])
        machine.flush()
        assert machine.row(b"k") == life
    assert len(seen) == 3


def test_two_lives_of_the_same_files_with_a_clock_that_stands(machine, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    test_two_lives_of_the_same_files_give_out_no_version_twice(machine)


def test_versions_go_on_behind_all_that_a_read_record_has(machine, folder):
    """Also of those that were raised far beyond what the beginnings of the files say."""
    machine.logged()
    machine.cache.set("k", 1)
    machine.store.store_many({b"k": (0, None)}, versions={b"k": FUTURE})
    machine.flush()
    machine.cache.set("k", 2)
    held = machine.cache.gets("k")[1]
    (folder / datadir.VERSIONS_NAME).unlink()
    machine.reboot()
    assert machine.cache["k"] == 2
    machine.cache.set("k", 3)
    assert machine.cache.gets("k")[1] > held
    machine.reboot()
    assert machine.cache["k"] == 3
    machine.flush()
    assert machine.row(b"k") == 3


@pytest.mark.parametrize("snapped", [False, True])
def test_files_of_lives_that_had_a_base_each(machine, snapped):
    """As segments had that were restored by earlier versions; or of another segment, in the same directory."""
    machine.cache.set("first", 1)
    machine.cache.set("k", 1)
    machine.snapshot()
    machine.logged()
    machine.cache.set("first", 2)
    machine.reboot()
    machine.log.close()
    (machine.folder / datadir.VERSIONS_NAME).unlink()
    header = machine.cache.views(writable=True).header
    header["version_base"] += header["restored_seq"] + 1
    del header
    machine.logged()
    machine.cache.set("k", 2)
    machine.flush()
    if snapped:
        machine.snapshot()
    machine.cache.set("k", 3)
    machine.cache.delete("first")
    base = int(machine.cache.segment.header["version_base"])
    machine.reboot()
    assert int(machine.cache.segment.header["version_base"]) < base
    assert [machine.cache["k"], machine.cache.get("first")] == [3, None]
    machine.flush()
    assert [machine.row(b"k"), machine.row(b"first")] == [3, None]
    machine.cache.set("k", 4)
    machine.flush()
    assert machine.row(b"k") == 4


def test_a_segment_that_starts_empty_begins_above_what_was_given_out(machine, folder):
    """The rows are there still, and what it has written, and the store has not got before the next crash, is newer."""
    for _ in range(3):
        machine.snapshot()
        machine.reboot()
    machine.cache.set("k", 1)
    machine.flush()
    machine.killed()
    datadir.set_aside(folder)
    base = snapshot.base_of_empty(folder)
    cache_module.open_logged(machine.name, "32M", 3, log_buffer="64K", policy=BACK, version_base=base).close()
    machine.cache = shmcache.attach(machine.name, store=machine.store)
    machine.logged()
    machine.cache.set("k", 2)
    machine.reboot()
    machine.flush()
    assert machine.row(b"k") == 2


def test_a_note_of_versions_that_is_damaged_is_named_and_made_anew(machine, folder):
    machine.cache.set("k", 1)
    machine.snapshot()
    machine.reboot()
    path = folder / datadir.VERSIONS_NAME
    given = datadir.given_out(folder)
    path.write_bytes(path.read_bytes()[:-1])
    report = machine.reboot()
    assert len(report["damaged"]) == 1 and str(path) in report["damaged"][0]
    assert datadir.given_out(folder).newest >= given.newest
    assert machine.reboot()["damaged"] == []


def test_what_may_have_been_given_out():
    given = datadir.GivenOut(100)
    assert given.may_have(100) and not given.may_have(101)
    given = given.above(120, 1000).above(1100, 3000)
    assert [v for v in (100, 120, 121, 1000, 1001, 1100, 1101, 3000) if given.may_have(v)] == [100, 120, 1001, 1100]
    assert given.above(4000, 3500) == datadir.GivenOut(3500, given.skipped)  # it has got there by itself
    for i in range(2 * datadir.MOST_SKIPPED):
        given = given.above(10_000 * (i + 1), 10_000 * (i + 1) + 500 + i)
    assert len(given.skipped) == datadir.MOST_SKIPPED
    assert (120, 1001) in given.skipped and (10_000, 10_501) not in given.skipped  # the narrowest are forgotten


def test_a_life_that_gave_out_nothing_is_restored_by_a_clock_that_is_behind(machine, monkeypatch):
    machine.logged()
    machine.cache.set("k", 1)
    monkeypatch.setattr(datadir, "clock", lambda: 1)
    machine.reboot()
    assert machine.cache["k"] == 1 and not machine.cache.durability()["generations_missing"]
    machine.flush()
    assert machine.row(b"k") == 1


# ---- versions stay at the clock, and are noted before they are given out ---------------------------------------------------------------


def quick_lives(machine, n=3):
    """Each shorter than what a version is ahead, if anything runs ahead."""
    for _ in range(n):
        machine.reboot()


@pytest.mark.parametrize("later", [1, 3, 8])
def test_what_waits_in_a_new_data_directory_is_newer_than_rows_of_the_one_that_was_lost(machine, folder, later):
    machine.logged()
    quick_lives(machine)
    machine.cache.set("k", "before")
    machine.flush()
    machine.killed()
    for path in folder.glob("*.shmcache"):
        path.unlink()
    machine.created()
    machine.logged()
    machine.cache.set("k", "acknowledged")
    quick_lives(machine, later)
    machine.flush()
    assert machine.row(b"k") == machine.cache["k"] == "acknowledged"


@pytest.mark.parametrize("back", [0, 1 << 50], ids=["the clock is right", "it was set back by 12 days"])
@pytest.mark.parametrize("when", ["before", "behind"])
def test_what_a_worker_wrote_that_was_first_is_newer_than_rows_of_earlier_lives(machine, when, back):
    """Before a supervisor came, or behind; the store was down all the while."""
    machine.snapshot()
    quick_lives(machine)
    machine.cache.set("k", "before")
    machine.cache.set("d", "before")
    machine.flush()
    machine.killed()
    machine.created(back)
    with contextlib.ExitStack() as stack:
        if when == "behind":
            stack.enter_context(machine.stores(down=True))
        machine.cache.set("k", "newer")
        machine.cache.delete("d")
        if when == "before":
            stack.enter_context(machine.stores(down=True))
        machine.snapshot()
    assert machine.row(b"k") == "before"
    machine.reboot()
    machine.flush()
    assert [machine.row(b"k"), machine.row(b"d")] == ["newer", None]
    machine.cache.set("k", "newest")
    machine.flush()
    assert machine.row(b"k") == "newest"


def test_a_supervisor_that_is_killed_while_it_adopts_has_adopted_nothing(machine, monkeypatch):
    machine.cache.set("k", "before")
    machine.flush()
    noted = datadir.given_out(machine.folder)
    machine.killed()
    machine.created(1 << 50)
    machine.cache.set("k", "newer")

    class Killed:
        def __init__(self, cache, dirty=_dirty.Dirty):
            self.dirty = dirty(cache)

        def __getattr__(self, name):
            return getattr(self.dirty, name)

        def renew_all(self, first, last):
            raise SystemExit

    with monkeypatch.context() as patch, shmcache.attach(machine.name) as other:
        patch.setattr(_dirty, "Dirty", Killed)
        with pytest.raises(SystemExit):
            writeback.WriteBack(other, machine.store, machine.folder)
    assert datadir.given_out(machine.folder) == noted
    with machine.stores(down=True):
        machine.snapshot()
    machine.reboot()
    machine.flush()
    assert machine.row(b"k") == "newer"


def test_a_supervisor_that_comes_back_adopts_nothing_again(machine):
    """The tokens for cas() of what waits stay what they are."""
    machine.cache.set("k", 0)
    machine.flush()
    machine.killed()
    machine.created(1 << 50)
    machine.cache.set("k", 1)
    first = machine.cache.gets("k")[1]
    with machine.stores(down=True) as thread:
        thread.one_pass()
    adopted = machine.cache.gets("k")[1]
    assert adopted > first
    with machine.stores(down=True):
        pass
    assert machine.cache.gets("k")[1] == adopted


def test_what_cannot_be_adopted_is_not_stored(machine, monkeypatch):
    """A stripe is held by a process that does not run."""
    machine.cache.set("k", 1)
    machine.flush()
    machine.killed()
    machine.created(1 << 50)
    machine.cache.set("k", 2)
    with shmcache.attach(machine.name) as other, monkeypatch.context() as patch:
        patch.setattr(_dirty, "Dirty", lambda cache: Mock(go_above=lambda version: False))
        with pytest.raises(errors.StripeBusy, match="does not run"):
            writeback.WriteBack(other, machine.store, machine.folder)
    assert machine.row(b"k") == 1
    machine.flush()
    assert machine.row(b"k") == 2


def by_admin(machine, cache):
    cache.set("k", "newer")
    assert cli.admin(["snapshot", machine.name, "--data-dir", str(machine.folder)]) == 0


def by_a_supervisor(machine, cache):
    """Nobody stores."""
    cache.set("k", "newer")
    supervisor = Supervisor(cache, folder=machine.folder)
    supervisor.write()
    supervisor.close()


def by_its_log(machine, cache):
    supervisor = Supervisor(cache, folder=machine.folder, log="always")
    cache.set("k", "newer")
    supervisor.close()


@pytest.mark.parametrize("saved", [by_admin, by_a_supervisor, by_its_log])
def test_what_a_worker_wrote_that_was_first_is_adopted_by_what_saves_it(name, tmp_path, saved):
    """It is in a file of the directory, and was acknowledged after all rows, while the clock was an hour behind."""
    machine = Machine(name, tmp_path)
    try:
        machine.snapshot()
        machine.cache.set("k", "before")
        machine.flush()
        machine.killed()
        machine.created(3_600_000 << 20)
        with shmcache.attach(name) as cache:
            saved(machine, cache)
        machine.reboot()
        machine.flush()
        assert machine.row(b"k") == machine.cache["k"] == "newer"
    finally:
        machine.killed()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("saved", [Machine.snapshot, Machine.logged])
def test_what_cannot_be_adopted_is_in_no_file(machine, folder, monkeypatch, saved):
    machine.cache.set("k", 1)
    machine.flush()
    machine.killed()
    machine.created(1 << 50)
    machine.cache.set("k", 2)
    before = files_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr(_dirty, "Dirty", lambda cache: Mock(go_above=lambda version: False))
        with pytest.raises(errors.StripeBusy, match="does not run"):
            saved(machine)
    assert files_of(folder) == before
    with monkeypatch.context() as patch:
        patch.setattr(datadir, "given_out", Mock(side_effect=errors.NewerFormat("versions", 2, 1)))
        with pytest.raises(errors.NewerFormat):
            saved(machine)
    assert files_of(folder) == before
    machine.snapshot()
    machine.reboot()
    machine.flush()
    assert machine.row(b"k") == 2


STORE = "tests.integration.test_store:DictStore"
ADMIN = [sys.executable, "-c", "import sys; from shmcache import cli; sys.exit(cli.admin(sys.argv[1:]))"]
SUPERVISE = [sys.executable, "-m", "shmcache.cli"]


@pytest.mark.parametrize(
    "command",
    [[*ADMIN, "snapshot"], [*SUPERVISE, "supervise", "--log", "always"], [*SUPERVISE, "supervise", "--store", STORE]],
    ids=["snapshot", "log", "store"],
)
def test_who_is_to_adopt_what_a_stopped_process_holds_is_told(name, tmp_path, command):
    machine = Machine(name, tmp_path)
    try:
        machine.cache.set("k", 1)
        machine.flush()
        machine.killed()
        machine.cache = shmcache.create(name, "8M", log_buffer="64K", max_processes=16, policy=BACK, store=machine.store, lock_limit=0.05)
        machine.cache.views(writable=True).header["version_base"] -= 1 << 50
        machine.cache.set("k", 2)
        before = files_of(tmp_path)
        with stopped_holder(machine.cache):
            ended = subprocess.run([*command, name, "--data-dir", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 1 and "a process that does not run holds some: continue or kill it" in ended.stderr
        assert files_of(tmp_path) == before | {"lock": b""}
    finally:
        machine.killed()


def test_what_is_not_written_back_has_no_versions_to_be_above(name, folder):
    with shmcache.create(name, "8M") as cache:
        snapshot.write(cache, folder)
        assert not (folder / datadir.VERSIONS_NAME).exists()
    shmcache.unlink(name)


def test_what_is_adopted_on_a_full_disk_is_noted_by_the_next(machine, folder, full):
    machine.cache.set("k", 1)
    machine.flush()
    noted = datadir.given_out(folder)
    machine.killed()
    machine.created(1 << 50)
    machine.cache.set("k", 2)
    full.set()
    machine.snapshot()
    assert datadir.given_out(folder) == noted
    version = machine.cache.gets("k")[1]
    assert version + int(machine.cache.segment.header["version_base"]) > noted.newest
    full.clear()
    machine.snapshot()
    assert datadir.given_out(folder).segment == datadir.life(machine.cache)
    assert machine.cache.gets("k")[1] == version


def test_a_note_of_another_thread_stays_when_a_segment_is_adopted(machine, folder, monkeypatch):
    """One that stores notes more, now that the disk has room, while a snapshot is about to note what it knows."""
    machine.cache.set("k", 1)
    machine.flush()
    machine.killed()
    machine.created(1 << 50)
    given = datadir.given_out(folder)
    given = given._replace(newest=given.newest + 1000, segment=datadir.life(machine.cache))
    thread = threading.Thread(target=datadir.note_given_out, args=(folder, machine.name, given))
    adopted = _dirty.Dirty

    def beside(cache):
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        return adopted(cache)

    monkeypatch.setattr(_dirty, "Dirty", beside)
    datadir.adopt(machine.cache, folder)
    thread.join()
    assert datadir.given_out(folder) == given


@pytest.mark.parametrize("damaged", [False, True])
def test_where_the_note_is_lost_rows_from_behind_the_files_stay(machine, folder, monkeypatch, capfd, damaged):
    """And the clock was set back since: nothing but the files says what was given out."""
    machine.cache.set("k", 1)
    machine.snapshot()
    machine.cache.set("k", 2)
    machine.flush()
    path = folder / datadir.VERSIONS_NAME
    if damaged:
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    monkeypatch.setattr(datadir, "clock", lambda: 1)
    machine.reboot()
    machine.flush()
    assert machine.row(b"k") == machine.cache["k"] == 2
    assert "older than their rows" in capfd.readouterr().err
    machine.cache.set("k", 3)
    machine.flush()
    assert machine.row(b"k") == 3


def test_a_worker_was_first_where_the_note_is_lost(machine, folder):
    machine.cache.set("k", 1)
    machine.snapshot()
    machine.flush()
    machine.cache.set("k", 2)
    machine.flush()
    (folder / datadir.VERSIONS_NAME).unlink()
    machine.killed()
    machine.created(1 << 50)
    machine.cache.set("k", 3)
    machine.snapshot()
    machine.reboot()
    machine.flush()
    assert machine.row(b"k") == 3


def test_everything_is_adopted_beside_writers(machine):
    stop = threading.Event()
    keys = [b"%d" % i for i in range(300)]

    def write():
        with shmcache.attach(machine.name) as cache:
            for key in itertools.cycle(keys):
                cache.set(key, time.monotonic_ns())
                if stop.is_set():
                    return

    writers = [threading.Thread(target=write) for _ in range(2)]
    machine.cache.set_many(dict.fromkeys(keys, 0))
    for writer in writers:
        writer.start()
    try:
        dirty = _dirty.Dirty(machine.cache)
        for _ in range(20):
            last = int(machine.cache.segment.stripes["seq"].max()) + 1000
            assert dirty.go_above(last) and dirty.renew_all(1, last)
            items, at = dirty.walk(0, 10_000)
            assert at == 0 and len(items) == len(keys)
            assert [item for item in items if item[4] <= last] == []
    finally:
        stop.set()
        for writer in writers:
            writer.join()


def test_rows_do_not_go_back_when_an_older_copy_of_the_directory_is_put_in_its_place(machine, folder, tmp_path, capfd):
    machine.cache.set("k", 1)
    machine.snapshot()
    shutil.copytree(folder, tmp_path / "copy")  # in which k waits
    for _ in range(3):
        machine.reboot()
        machine.snapshot()
    machine.cache.set("k", 2)
    machine.flush()
    machine.killed()
    for path in folder.glob("*.shmcache"):
        path.unlink()
    shutil.copytree(tmp_path / "copy", folder, dirs_exist_ok=True)
    machine.reboot()
    machine.flush()
    assert machine.row(b"k") == machine.cache["k"] == 2
    assert "older than their rows" in capfd.readouterr().err


def test_versions_are_not_ahead_of_the_clock(machine, folder):
    for life in range(10):
        machine.cache.set("k", life)
        machine.flush()
        assert machine.version(b"k") <= datadir.clock() + datadir.BLOCK
        assert datadir.given_out(folder).newest <= datadir.clock() + 2 * datadir.BLOCK
        machine.snapshot()
        machine.reboot()


def test_no_row_has_a_version_that_was_not_noted(machine, folder, monkeypatch):
    """However many there are in a pass."""
    monkeypatch.setattr(datadir, "BLOCK", 8)
    monkeypatch.setattr(datadir, "LONG_BLOCK", 8)
    monkeypatch.setattr(writeback, "BATCH", 4)
    store_many, seen = machine.store.store_many, []

    def noted(items, *, versions, **limits):
        seen.append(max(versions.values()) <= datadir.given_out(folder).newest)
        machine.cache.set("k", len(seen))  # while it is stored, there are more
        machine.cache.incr("n")
        return store_many(items, versions=versions, **limits)

    monkeypatch.setattr(machine.store, "store_many", noted)
    for life in range(3):
        machine.cache.set("n", 0)
        with machine.stores() as thread:
            for n in range(100):
                machine.cache.set("k", n)
                machine.cache.set(f"{n}", life)
                thread.one_pass()
        assert thread.given == datadir.given_out(folder)
        machine.snapshot()
        machine.reboot()
    assert len(seen) > 100 and all(seen)


def test_a_note_of_the_first_versions_of_shmcache_says_less_than_was_given_out(machine, folder):
    """They noted where a life began: what it gave out then is above."""
    machine.cache.set("k", 1)
    machine.snapshot()
    begun = 1 << 61
    path = folder / datadir.VERSIONS_NAME
    path.unlink()
    with os.fdopen(datadir.create(path), "wb", buffering=0) as file:
        fmt.Writer(file, "log", {"name": machine.name, "created_ms": 1, "newest": begun, "skipped": ((3, 5),)})
    given = datadir.given_out(folder)
    assert given.may_have(begun + (1 << 39)) and not given.may_have(4)
    machine.store.store_many({b"k": (0, None)}, versions={b"k": begun + (1 << 39)})
    machine.reboot()
    machine.flush()
    assert machine.row(b"k") == 0  # a later life stored it
    machine.cache.set("k", 2)
    machine.flush()
    assert machine.row(b"k") == 2 and machine.version(b"k") > begun + (1 << 40)


@pytest.fixture
def full(monkeypatch):
    """The disk of the data directory has no room for the note, while full.set()."""
    note, full = datadir.note_given_out, threading.Event()

    def noted(*args):
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        note(*args)

    monkeypatch.setattr(datadir, "note_given_out", noted)
    return full


def test_on_a_full_disk_what_the_note_covers_is_stored_and_the_rest_when_there_is_room(machine, folder, monkeypatch, full, capfd):
    monkeypatch.setattr(datadir, "BLOCK", 64)
    monkeypatch.setattr(datadir, "LONG_BLOCK", 64)
    machine.cache.set("k", 0)
    machine.flush()
    full.set()
    with machine.stores() as thread:
        machine.cache.set("covered", 1)
        thread.one_pass()
        assert machine.row(b"covered") == 1
        for n in range(100):
            machine.cache.set("k", n)
        machine.cache.set("other", 2)
        assert not thread.one_pass()
        assert machine.row(b"other") == 2  # of a stripe that is not so far
        assert machine.row(b"k") == 0 and thread.dirty.items() == 1
        assert not thread.one_pass()
        assert machine.cache.segment.header["flush_failed_ms"] > 0
        assert capfd.readouterr().err.count(datadir.VERSIONS_NAME) == 1
        full.clear()
        assert thread.one_pass()
        assert machine.row(b"k") == 99 and machine.version(b"k") <= datadir.given_out(folder).newest
        assert machine.cache.segment.header["flush_failed_ms"] == 0


def test_a_segment_is_restored_on_a_full_disk_and_stored_when_there_is_room(machine, full):
    machine.cache.set("k", 1)
    machine.flush()
    machine.cache.set("k", 2)
    machine.cache.set("waits", 1)
    machine.snapshot()
    full.set()
    machine.reboot()
    machine.cache.set("k", 3)
    with machine.stores() as thread:
        thread.tried()
        assert machine.row(b"k") == 1
        full.clear()
        assert thread.tried()
        assert [machine.row(b"k"), machine.row(b"waits")] == [3, 1]
        full.set()
    machine.killed()


def test_a_row_that_cannot_be_gone_above_on_a_full_disk_holds_up_no_other(machine, full):
    future(machine, b"k")
    machine.cache.set("first", 0)
    machine.flush()
    full.set()
    machine.cache.set("k", 1)
    machine.cache.set("other", 1)
    with machine.stores() as thread:
        asked = int(machine.cache.segment.header["flushes_ended"])
        assert not thread.tried()
        assert [machine.row(b"k"), machine.row(b"other")] == [0, 1]
        assert thread.dirty.items() == 1 and int(machine.cache.segment.header["flushes_ended"]) == asked
        full.clear()
        assert thread.tried()
        assert machine.row(b"k") == 1 and thread.dirty.items() == 0


# ---- rows of versions that this cache has never given -------------------------------------------------------------------------------


def future(machine, *keys):
    """As if the clock had been years ahead when they were stored, and was set right since."""
    machine.store.store_many(dict.fromkeys(keys, (0, None)), versions={key: FUTURE + i for i, key in enumerate(keys)})


def test_what_was_acknowledged_behind_a_row_of_the_future_is_restored_above_it(machine):
    future(machine, b"k")
    machine.logged()
    machine.cache.set("k", 1)
    machine.flush()
    assert machine.row(b"k") == 1 and machine.version(b"k") > FUTURE
    machine.cache.set("k", 2)
    machine.reboot()
    machine.flush()
    assert machine.row(b"k") == 2


@pytest.mark.parametrize("logged", [False, True])
def test_what_waits_below_a_row_of_the_future_is_stored_also_after_a_crash(machine, logged):
    """One key's row has been found, the other's not yet."""
    future(machine, b"found", b"waits")
    if logged:
        machine.logged()
    machine.cache.set("found", 1)
    machine.flush()
    machine.cache.set("waits", 1)
    if not logged:
        machine.snapshot()
    machine.reboot()
    machine.flush()
    assert [machine.row(b"found"), machine.row(b"waits")] == [1, 1]
    machine.cache.set("waits", 2)
    machine.flush()
    assert machine.row(b"waits") == 2


def test_what_is_restored_is_not_dropped_for_a_row_that_nobody_here_has_stored(machine, capfd):
    machine.cache.set("k", 1)
    machine.cache.delete("d")
    machine.snapshot()
    future(machine, b"k", b"d")
    machine.reboot()
    machine.flush()
    assert [machine.row(b"k"), machine.row(b"d")] == [1, None]
    assert capfd.readouterr().err.count("higher versions") == 1


def test_a_row_that_was_stored_above_one_of_the_future_does_not_go_back(machine, capfd):
    machine.cache.set("k", 1)
    machine.snapshot()
    future(machine, b"k")
    machine.cache.set("k", 2)
    machine.flush()
    assert machine.row(b"k") == 2
    capfd.readouterr()
    machine.reboot()
    assert machine.cache["k"] == 1  # till it has been compared with the store
    machine.flush()
    assert machine.row(b"k") == machine.cache["k"] == 2
    said = capfd.readouterr().err
    assert "older than their rows" in said and "higher versions" not in said


def test_a_raise_that_was_cut_short_is_completed(machine, monkeypatch):
    """Who stores is killed when it is on the disk what comes next, and no stripe knows of it yet."""
    future(machine, b"k")
    machine.cache.set("k", 1)
    note = datadir.note_given_out

    def killed(folder, name, given):
        note(folder, name, given)
        if given.floor > FUTURE:
            raise SystemExit

    def lowest():
        return int(machine.cache.segment.header["version_base"]) + int(machine.cache.segment.stripes["seq"].min())

    with monkeypatch.context() as patch, shmcache.attach(machine.name) as other:
        patch.setattr(datadir, "note_given_out", killed)
        patch.setattr(writeback.WriteBack, "run", lambda self: None)
        thread = writeback.WriteBack(other, machine.store, machine.folder)
        with pytest.raises(SystemExit):
            thread.one_pass()
        del thread.header
    assert lowest() < FUTURE and machine.row(b"k") == 0
    machine.store.rows.clear()  # what is below is raised all the same: it has been noted
    machine.flush()
    assert lowest() > FUTURE and machine.row(b"k") == 1


def test_what_cannot_be_raised_just_now_stays_dirty(machine, monkeypatch):
    """Its stripe is held by a process that does not run, and goes on before the item would be marked clean."""
    future(machine, b"k")
    machine.cache.set("k", 1)
    monkeypatch.setattr(writeback.WriteBack, "run", lambda self: None)

    class Busy:
        def __init__(self, dirty):
            self.dirty, self.tries = dirty, []

        def __getattr__(self, name):
            return getattr(self.dirty, name)

        def renew(self, *args):
            self.tries.append(args)
            return len(self.tries) > 1 and self.dirty.renew(*args)

    with shmcache.attach(machine.name) as other:
        thread = writeback.WriteBack(other, machine.store, machine.folder)
        thread.dirty = Busy(thread.dirty)
        thread.one_pass()
        assert machine.row(b"k") == 0 and thread.dirty.items() == 1
        given = thread.given
        thread.one_pass()
        assert thread.given is given  # it goes no further at each try
        thread.one_pass()
        assert machine.row(b"k") == 1 and thread.dirty.items() == 0 and len(thread.dirty.tries) == 2
        thread.stop()


# ---- nobody is in a segment whose restore is refused --------------------------------------------------------------------------------

WORKER = """
import sys, shmcache
from shmcache import segment
if len(sys.argv) > 2:
    segment.RESTORE_LIMIT = float(sys.argv[2])
print("there", flush=True)
try:
    cache = shmcache.attach(sys.argv[1])
except shmcache.ShmcacheError as e:
    print(type(e).__name__, flush=True)
else:
    print(cache.get("k"), cache.get("n"), flush=True)
"""


@contextlib.contextmanager
def worker(name, *args):
    """A process that attaches, says what it has found, and ends; it is about to when the block begins."""
    process = subprocess.Popen([sys.executable, "-c", WORKER, name, *args], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "there\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def attached_to_by_others(name):
    """Does a process other than this have a row in it?"""
    with cache_module.attach_unsettled(name) as cache:
        return len(cache.processes()) > 1


def test_nobody_attaches_before_it_is_certain_that_the_restore_is_not_refused(machine, monkeypatch):
    machine.cache.set("k", 1)
    machine.cache.set("\0own", 1)
    machine.snapshot()
    put_all, found = snapshot._put_all, []
    with contextlib.ExitStack() as stack:

        def watched(into, *args):
            if not found:
                process = stack.enter_context(worker(machine.name))
                for _ in range(20):  # it tries again and again meanwhile
                    assert not attached_to_by_others(machine.name)
                    time.sleep(0.01)
                put_all(into, *args)
                assert not attached_to_by_others(machine.name)
                found.append(process)
            else:
                assert found[0].stdout.readline() == "1 None\n"  # it has: the rest comes beside it
                put_all(into, *args)

        monkeypatch.setattr(snapshot, "_put_all", watched)
        machine.reboot()
    assert len(found) == 1


def test_a_worker_that_waits_for_a_restore_that_is_refused_is_told(machine, monkeypatch):
    machine.cache.set("k", bytes(200_000))
    machine.snapshot()
    put_all = snapshot._put_all
    with contextlib.ExitStack() as stack:
        waiting = []

        def watched(*args):
            waiting.append(stack.enter_context(worker(machine.name)))
            put_all(*args)

        monkeypatch.setattr(snapshot, "_put_all", watched)
        with pytest.raises(errors.NoRoom):
            machine.reboot(max_value="100K")
        assert waiting[0].stdout.readline() == "SegmentNotFound\n"


def test_a_damaged_log_is_refused_before_anybody_attaches(machine, folder, monkeypatch):
    machine.logged()
    for n in range(50):
        machine.cache.set("k", n)
    machine.killed()
    flipped(fmt.listing(folder)[1][0][1])
    blocks = snapshot.Logs.blocks
    with contextlib.ExitStack() as stack:
        waiting = []

        def watched(self):
            waiting.append(stack.enter_context(worker(machine.name)))
            assert not attached_to_by_others(machine.name)
            yield from blocks(self)

        monkeypatch.setattr(snapshot.Logs, "blocks", watched)
        with pytest.raises(errors.DamagedFile):
            snapshot.restore(machine.name, folder)
        assert waiting[0].stdout.readline() == "SegmentNotFound\n"


@pytest.mark.parametrize("given_up", [False, True])
def test_who_waits_for_a_restore_that_was_killed_is_told_and_it_is_completed(machine, given_up):
    machine.cache.set("k", 1)
    machine.snapshot()
    machine.killed()
    code = f"""
import os
from pathlib import Path
from shmcache.supervisor import snapshot
snapshot._put_all = lambda *args: os._exit(9)
snapshot.restore({machine.name!r}, Path({str(machine.folder)!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with worker(machine.name, "0.2") as process:
        assert process.stdout.readline() == "BeingRestored\n"
    with cache_module.attach_unsettled(machine.name) as cache:
        assert cache.durability()["restoring"]
    if given_up:
        with worker(machine.name) as process:
            snapshot.end_restore(machine.name)
            assert process.stdout.readline() == "SegmentNotFound\n"
        return
    with worker(machine.name) as process:
        snapshot.restore(machine.name, machine.folder)
        assert process.stdout.readline() == "1 None\n"
    machine.cache = shmcache.attach(machine.name, store=machine.store)


@pytest.mark.parametrize("given_up", [False, True])
def test_a_restore_that_fails_when_workers_are_in_takes_nothing_from_them(machine, folder, monkeypatch, given_up):
    """The disk gives back a whole file at first, then not."""
    machine.cache.set("k", 1)
    machine.snapshot()
    machine.killed()
    put_all = snapshot._put_all

    def damaged(into, found, logs, progress, clock_back_ms, heat, epoch, generations, tail, *more):
        if not generations:
            raise errors.DamagedFile("a file", 0, "it was whole")
        put_all(into, found, logs, progress, clock_back_ms, heat, epoch, generations, tail, *more)

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_put_all", damaged)
        with pytest.raises(errors.DamagedFile):
            snapshot.restore(machine.name, folder)
    with shmcache.attach(machine.name, store=machine.store) as cache:
        assert cache["k"] == 1 and cache.durability()["restoring"]
        cache.set("k", 2)
        if given_up:
            snapshot.end_restore(machine.name)
        else:
            snapshot.restore(machine.name, folder)
        assert cache["k"] == 2 and not cache.unlinked and not cache.durability()["restoring"]
    machine.cache = shmcache.attach(machine.name, store=machine.store)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), MemoryError(), errors.NewerFormat("log-9", 9, 1), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", ["_settle", "_put_all"])
def test_a_restore_that_fails_leaves_nothing_to_wait_for(machine, folder, monkeypatch, at, error):
    """Also with what is no refusal: each worker would wait a minute for who has ended."""
    machine.cache.set("k", 1)
    machine.snapshot()
    machine.killed()
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, at, Mock(side_effect=error))
        with pytest.raises(type(error)):
            snapshot.restore(machine.name, folder)
        assert not segment_exists(machine.name)
    machine.reboot()
    assert machine.cache.get("k") == 1


def test_a_restore_without_zstandard_leaves_nothing_to_wait_for(machine, folder, monkeypatch):
    machine.cache.set("k", "x" * 10_000)
    snapshot.write(machine.cache, folder, compress=True)
    machine.killed()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "zstandard", None)
        with pytest.raises(errors.InvalidConfig, match="zstandard"):
            snapshot.restore(machine.name, folder)
        assert not segment_exists(machine.name)
    machine.reboot()
    assert len(machine.cache.get("k")) == 10_000
