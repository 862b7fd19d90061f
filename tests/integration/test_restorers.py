"""One process restores a segment: others are refused, or begin again behind a dead one; nobody else gets in, and nobody waits in vain."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import shmcache
from shmcache import cache as cache_module
from shmcache import errors, segment
from shmcache.core import _core
from shmcache.supervisor import datadir, snapshot
from tests.integration.test_processes import child, ended
from tests.integration.test_reboots import Machine, segment_exists, worker

LIMIT = 60.0

KILLED = """
import os, sys
from pathlib import Path
from shmcache.supervisor import snapshot
put_all = snapshot._put_all
def killed(*args):
    put_all(*args)
    os._exit(9)
snapshot._put_all = killed
snapshot.restore(sys.argv[1], Path(sys.argv[2]))
"""


def killed_while_it_restores(machine, folder):
    """Before it is certain that it is not refused, when what the store has not got is in."""
    assert subprocess.run([sys.executable, "-c", KILLED, machine.name, str(folder)], check=False).returncode == 9


@pytest.fixture
def machine(name, tmp_path):
    with datadir.take(tmp_path / "data") as folder:
        machine = Machine(name, folder)
        yield machine
        machine.killed()


@pytest.fixture
def other(machine, tmp_path):
    """An older copy of the machine's data directory; the machine is off."""
    machine.cache.set("k", "older")
    machine.snapshot()
    shutil.copytree(machine.folder, tmp_path / "other")
    machine.cache.set("k", "newer")
    machine.cache.set("new", 1)
    machine.snapshot()
    machine.killed()
    with datadir.take(tmp_path / "other") as folder:
        yield folder


@pytest.fixture
def of_before(machine, tmp_path, name):
    """A data directory of an earlier segment of this name, whose versions begin lower; the machine is off."""
    machine.killed()
    earlier = Machine(name, tmp_path / "earlier")
    with datadir.take(earlier.folder) as folder:
        earlier.cache.set("k", "older")
        earlier.snapshot()
        earlier.killed()
        time.sleep(0.002)  # created_ms tells them apart
        machine.cache = Machine(name, machine.folder).cache
        machine.cache.set("k", "newer")
        machine.snapshot()
        machine.killed()
        yield folder


def asides(machine):
    return [entry for entry, name in segment.aside() if name == machine.name]


def restored_by_another(machine, folder):
    """A process restores it from there: its exit code and what it says."""
    code = "import sys; from pathlib import Path; from shmcache.supervisor import snapshot; snapshot.restore(sys.argv[1], Path(sys.argv[2]))"
    done = subprocess.run([sys.executable, "-c", code, machine.name, str(folder)], capture_output=True, text=True, check=False, timeout=LIMIT)
    return done.returncode, done.stderr


def restored_in_a_thread(machine, folder):
    said = []

    def restore():
        try:
            snapshot.restore(machine.name, folder)
        except errors.BeingRestored as e:
            said.append(f"shmcache.errors.BeingRestored: {e}")

    thread = threading.Thread(target=restore)
    thread.start()
    thread.join(LIMIT)
    return len(said), "".join(said)


@pytest.mark.parametrize("by", [restored_by_another, restored_in_a_thread])
@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("which", ["other", "of_before"])
def test_a_second_restorer_is_refused_and_disturbs_nothing(machine, request, monkeypatch, which, certain, by):
    folder = request.getfixturevalue(which)
    put_all, met = snapshot._put_all, []

    def beside(*args):
        if len(met) == certain:
            monkeypatch.setattr(snapshot, "_put_all", put_all)
            met.append(by(machine, folder))
        else:
            met.append(None)
        put_all(*args)

    monkeypatch.setattr(snapshot, "_put_all", beside)
    machine.reboot()
    [(code, said)] = met[certain:]
    assert code == 1
    assert "BeingRestored: another process restores" in said
    assert machine.cache.get("k") == "newer"


def test_giving_up_does_not_disturb_who_restores(machine, monkeypatch):
    machine.cache.set("k", 1)
    machine.snapshot()
    settle = snapshot._settle

    def beside(*args):
        with pytest.raises(errors.BeingRestored, match="another process"):
            snapshot.end_restore(machine.name)
        settle(*args)

    monkeypatch.setattr(snapshot, "_settle", beside)
    machine.reboot()
    assert machine.cache.get("k") == 1


@pytest.mark.parametrize("size", [None, "16M"])
@pytest.mark.parametrize("which", ["other", "of_before"])
def test_behind_a_restore_that_was_killed_others_files_are_not_mixed_in(machine, request, which, size):
    folder = request.getfixturevalue(which)
    killed_while_it_restores(machine, machine.folder)
    snapshot.restore(machine.name, folder, **({"size": size} if size else {}))
    machine.cache = shmcache.attach(machine.name, store=machine.store)
    assert machine.cache.get("k") == "older"
    assert machine.cache.peek("new") is None
    assert machine.cache.stats()["size_bytes"] == segment.parse_size(size or "8M")


def test_who_begins_again_needs_no_more_memory_and_lets_nobody_in(machine, other, monkeypatch):
    """The name is held, and the dead one's memory is free, before memory for the new one is taken; who looks can."""
    killed_while_it_restores(machine, machine.folder)
    reserve, put_all, seen = segment._reserve, snapshot._put_all, []
    with contextlib.ExitStack() as stack:

        def reserved(fd, size_bytes):
            there = os.stat(segment.check_name(machine.name))
            seen.append(there.st_blocks * 512 / there.st_size)
            with cache_module.attach_unsettled(machine.name) as looker:
                assert looker.stats()["durability"]["restoring"]
            with pytest.raises(errors.BeingRestored, match="a process is at it"):
                shmcache.open(machine.name, "8M", wait=False)
            with pytest.raises(errors.BeingRestored, match="another process"):
                snapshot.restore(machine.name, machine.folder)
            waiting.append(stack.enter_context(worker(machine.name)))
            reserve(fd, size_bytes)

        def put(*args):
            assert len(cache_module.attach_unsettled(machine.name).processes()) == 1
            put_all(*args)
            monkeypatch.setattr(snapshot, "_put_all", put_all)

        waiting = []
        monkeypatch.setattr(segment, "_reserve", reserved)
        monkeypatch.setattr(snapshot, "_put_all", put)
        snapshot.restore(machine.name, other)
        machine.cache = shmcache.attach(machine.name, store=machine.store)
        assert waiting[0].stdout.readline() == "older None\n"
    assert len(seen) == 1
    assert seen[0] < 0.2


def test_the_name_is_there_all_the_while(machine, other, monkeypatch):
    """A worker that looked in an instant without it would create a segment of its own. A restore that is torn off before it takes the name
    leaves the abandoned one there, and nothing aside."""
    killed_while_it_restores(machine, machine.folder)
    names, link, at = [], os.link, segment.check_name(machine.name)

    def linked(*args, **options):
        assert os.path.exists(at)
        link(*args, **options)
        assert os.path.exists(at)
        names.append(asides(machine))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "link", linked)
        patch.setattr(os, "rename", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        snapshot.restore(machine.name, machine.folder)
    assert len(names[0]) == 1
    assert asides(machine) == []
    with pytest.raises(errors.BeingRestored) as caught:
        shmcache.attach(machine.name, wait=False)
    assert caught.value.abandoned
    monkeypatch.setattr(os, "link", linked)
    snapshot.restore(machine.name, machine.folder)
    machine.cache = shmcache.attach(machine.name, store=machine.store)
    assert machine.cache.get("k") == "newer"
    assert asides(machine) == []


def test_a_restore_that_cannot_begin_again_is_begun_by_the_next(machine, other, monkeypatch):
    """The dead one's memory is given back by then."""
    killed_while_it_restores(machine, machine.folder)
    with monkeypatch.context() as patch, pytest.raises(errors.SharedMemoryFull):
        patch.setattr(segment, "_reserve", lambda fd, size_bytes: (_ for _ in ()).throw(errors.SharedMemoryFull("full")))
        snapshot.restore(machine.name, machine.folder)
    with pytest.raises(errors.BeingRestored) as caught:
        shmcache.attach(machine.name, wait=False)
    assert caught.value.abandoned
    snapshot.restore(machine.name, machine.folder)
    machine.cache = shmcache.attach(machine.name, store=machine.store)
    assert machine.cache.get("k") == "newer"


KILLED_AS_IT_BEGINS_AGAIN = """
import os, sys
from pathlib import Path
from shmcache import segment
from shmcache.supervisor import snapshot
where, behind = sys.argv[3].removesuffix("+"), sys.argv[3].endswith("+")
place, _, what = where.rpartition(".")
place = os if place else segment
former = getattr(place, what)
def killed(*args, **options):
    if behind:
        former(*args, **options)
    os._exit(9)
setattr(place, what, killed)
snapshot.restore(sys.argv[1], Path(sys.argv[2]))
"""


def killed_as_it_begins_again(machine, folder, at="os.rename"):
    """By default the new segment stands aside."""
    command = [sys.executable, "-c", KILLED_AS_IT_BEGINS_AGAIN, machine.name, str(folder), at]
    assert subprocess.run(command, check=False).returncode == 9


STEPS = {  # of a restore that begins again, and what stands aside then
    "_clear_aside": 0, "_reserve": 0, "_reserve+": 0, "_take_name": 0, "_hold_name": 0, "_hold_name+": 0, "_link": 0, "os.link": 0,
    "os.link+": 1, "_link+": 1, "os.rename": 1, "os.rename+": 0, "_remove": 0, "_remove+": 0, "_let_go": 0, "_let_go+": 0, "_take_name+": 0,
}  # fmt: skip


@pytest.mark.parametrize("at", STEPS)
def test_a_restore_that_is_killed_as_it_begins_again(machine, other, at):
    """Behind what it found as it was, beside its own or not, or behind its own."""
    killed_while_it_restores(machine, machine.folder)
    killed_as_it_begins_again(machine, other, at)
    assert len(asides(machine)) == STEPS[at]
    with pytest.raises(errors.BeingRestored) as caught:
        shmcache.open(machine.name, "8M", wait=False)
    assert caught.value.abandoned
    snapshot.restore(machine.name, machine.folder)
    assert asides(machine) == []
    machine.cache = shmcache.attach(machine.name, store=machine.store)
    assert machine.cache.get("k") == "newer"


def test_a_restore_whose_segment_is_unlinked_meanwhile_does_not_pass_for_another(machine, monkeypatch):
    machine.cache.set("k", "restored")
    machine.snapshot()
    machine.killed()
    put_all = snapshot._put_all

    def unlinked(*args):
        put_all(*args)
        shmcache.unlink(machine.name)
        machine.cache = shmcache.create(machine.name, "8M")
        machine.cache.set("k", "a worker's")

    monkeypatch.setattr(snapshot, "_put_all", unlinked)
    with pytest.raises(errors.SegmentNotFound, match="restore again"):
        snapshot.restore(machine.name, machine.folder)
    with shmcache.attach(machine.name) as cache:
        assert cache["k"] == "a worker's"


def test_a_segment_that_takes_the_name_meanwhile_stays(machine, other, monkeypatch):
    """Somebody unlinks what was left, and creates another, while the restore is about to begin again."""
    killed_while_it_restores(machine, machine.folder)
    reserve = segment._reserve

    def meanwhile(fd, size_bytes):
        monkeypatch.setattr(segment, "_reserve", reserve)
        shmcache.unlink(machine.name)
        machine.cache = shmcache.create(machine.name, "8M")
        machine.cache.set("k", "its own")
        reserve(fd, size_bytes)

    monkeypatch.setattr(segment, "_reserve", meanwhile)
    with pytest.raises(errors.SegmentExists):
        snapshot.restore(machine.name, other)
    with shmcache.attach(machine.name) as cache:
        assert cache["k"] == "its own"


# ---- a name that changes hands ---------------------------------------------------------------------------------------------------------


def a_worker_begins(machine):
    machine.cache = shmcache.open(machine.name, "8M")
    machine.cache.set("acknowledged", 1)


def test_who_unlinks_while_a_restore_takes_the_name_waits_for_it(machine, other, monkeypatch):
    """What a worker creates behind that is not replaced."""
    killed_while_it_restores(machine, machine.folder)
    rename, threads = os.rename, []

    def meanwhile():
        shmcache.unlink(machine.name)
        a_worker_begins(machine)

    def renamed(source, target):
        if target == segment.check_name(machine.name):
            threads.append(threading.Thread(target=meanwhile))
            threads[0].start()
            threads[0].join(0.3)
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    with contextlib.suppress(errors.SegmentNotFound):  # or it was done before that
        snapshot.restore(machine.name, other)
    threads[0].join(LIMIT)
    assert not machine.cache.unlinked
    with shmcache.attach(machine.name) as cache:
        assert cache.get("acknowledged") == 1
    assert asides(machine) == []


def removed_by_hand_when_the_new_one_is_linked(machine, monkeypatch, then):
    """It takes no lock."""
    link = os.link

    def linked(source, target, **options):
        link(source, target, **options)
        monkeypatch.setattr(os, "link", link)
        os.unlink(segment.check_name(machine.name))
        then()

    monkeypatch.setattr(os, "link", linked)


def test_what_a_worker_creates_where_an_abandoned_one_was_removed_by_hand_is_not_replaced(machine, other, monkeypatch):
    killed_while_it_restores(machine, machine.folder)
    removed_by_hand_when_the_new_one_is_linked(machine, monkeypatch, lambda: a_worker_begins(machine))
    with pytest.raises(errors.SegmentExists):
        snapshot.restore(machine.name, other)
    assert not machine.cache.unlinked
    with shmcache.attach(machine.name) as cache:
        assert cache.get("acknowledged") == 1
    assert asides(machine) == []


def test_where_an_abandoned_one_was_removed_by_hand_the_new_one_has_the_name(machine, other, monkeypatch):
    killed_while_it_restores(machine, machine.folder)
    removed_by_hand_when_the_new_one_is_linked(machine, monkeypatch, lambda: None)
    snapshot.restore(machine.name, other)
    machine.cache = shmcache.attach(machine.name, store=machine.store)
    assert machine.cache.get("k") == "older"
    assert asides(machine) == []
    assert os.stat(segment.check_name(machine.name)).st_nlink == 1


KILLED_WITH_TWO_NAMES = """
import os, sys
from pathlib import Path
from shmcache import segment
from shmcache.supervisor import snapshot
link = os.link
def linked(source, target, **options):
    link(source, target, **options)
    if target == segment.check_name(sys.argv[1]):
        os._exit(9)
    os.unlink(segment.check_name(sys.argv[1]))
os.link = linked
snapshot.restore(sys.argv[1], Path(sys.argv[2]))
"""


def test_of_one_that_was_killed_with_two_names_nothing_stays(machine, other):
    killed_while_it_restores(machine, machine.folder)
    command = [sys.executable, "-c", KILLED_WITH_TWO_NAMES, machine.name, str(other)]
    assert subprocess.run(command, check=False).returncode == 9
    assert os.stat(segment.check_name(machine.name)).st_nlink == 2
    snapshot.restore(machine.name, machine.folder)
    with shmcache.attach(machine.name) as cache:
        assert cache.get("k") == "newer"
        shmcache.unlink(machine.name)
        assert cache.unlinked
    assert asides(machine) == []


def gives_up(machine):
    with pytest.raises(errors.DamagedFile):
        snapshot.restore(machine.name, machine.folder)


@pytest.mark.parametrize("remove", [gives_up, lambda machine: snapshot.end_restore(machine.name)])
def test_a_restore_that_gives_up_unlinks_no_other_segment(machine, other, monkeypatch, remove):
    """An operator unlinks its segment, and a worker creates one, between its last look and its unlink."""
    killed_while_it_restores(machine, machine.folder)
    unlink, called = shmcache.unlink, []

    def meanwhile(former):
        def unlinked(*args):
            if not called:
                called.append(former)
                unlink(machine.name)
                a_worker_begins(machine)
            former(*args)

        return unlinked

    def damaged(*args):
        raise errors.DamagedFile("a file", 0, "it was whole")

    monkeypatch.setattr(snapshot, "_put_all", damaged)
    monkeypatch.setattr(segment, "unlink_this", meanwhile(segment.unlink_this))
    remove(machine)
    assert called
    assert not machine.cache.unlinked
    with shmcache.attach(machine.name) as cache:
        assert cache.get("acknowledged") == 1


def create_again(machine):
    os.unlink(segment.check_name(machine.name))
    shmcache.create(machine.name, "8M").close()


def admin(*args):
    command = "import sys; from shmcache import cli; sys.exit(cli.admin(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", command, *args], capture_output=True, text=True, check=True).stdout


REMOVERS = {
    "unlink": lambda machine: shmcache.unlink(machine.name),
    "admin unlink": lambda machine: admin("unlink", machine.name, "--yes"),
    "create": create_again,
    "restore": lambda machine: snapshot.restore(machine.name, machine.folder),
    "start empty": lambda machine: snapshot.end_restore(machine.name),
    "refused": gives_up,
}


@pytest.mark.parametrize("how", REMOVERS)
@pytest.mark.parametrize("gone", [False, True])
def test_what_a_killed_restore_left_aside_goes_with_the_next_that_is_done_to_its_name(machine, other, monkeypatch, how, gone):
    """Nobody is in it, and its memory is taken. gone: nothing has the name any more."""
    killed_while_it_restores(machine, machine.folder)
    killed_as_it_begins_again(machine, other)
    [left] = asides(machine)
    row = next(row for row in json.loads(admin("list", "--json")) if row["aside"] == left)
    assert row["name"] == machine.name
    assert row["size_bytes"] == 8 << 20
    assert f"{left}: left by a restore that was killed" in admin("list")
    if gone and how not in ("create", "start empty"):
        os.unlink(segment.check_name(machine.name))
    if how == "refused":
        monkeypatch.setattr(snapshot, "_put_all", lambda *args: (_ for _ in ()).throw(errors.DamagedFile("a file", 0, "it was whole")))
    REMOVERS[how](machine)
    assert asides(machine) == []


def test_what_a_living_restorer_has_aside_stays(machine, other, monkeypatch):
    killed_while_it_restores(machine, machine.folder)
    rename, seen = os.rename, []

    def renamed(source, target):
        if target == segment.check_name(machine.name):
            seen.extend(asides(machine))
            assert not segment._clear_aside(machine.name)
            assert asides(machine) == seen
            assert f"{seen[0]}: a process that restores is about to" in admin("list")
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    snapshot.restore(machine.name, other)
    assert len(seen) == 1
    machine.cache = shmcache.attach(machine.name, store=machine.store)
    assert machine.cache.get("k") == "older"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "of the kernel's"), MemoryError()])
def test_a_restore_that_is_torn_off_leaves_nothing_aside(machine, other, monkeypatch, error):
    killed_while_it_restores(machine, machine.folder)
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(os, "rename", lambda *args: (_ for _ in ()).throw(error))
        snapshot.restore(machine.name, other)
    assert asides(machine) == []
    snapshot.restore(machine.name, machine.folder)


def foreign(path):
    path.touch()
    os.chown(path, 12345, 12345)


SQUATTERS = {
    "file": lambda path: path.write_bytes(bytes(8192)),
    "foreign file": foreign,
    "directory": lambda path: path.mkdir(),
    "fifo": os.mkfifo,
    "link": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("kind", SQUATTERS)
@pytest.mark.parametrize("abandoned", [False, True])
def test_what_somebody_puts_aside_forbids_no_restore(machine, other, kind, abandoned):
    """Any user may write to /dev/shm. What is not left by a restore stays."""
    if kind == "foreign file" and os.geteuid():
        pytest.skip("only root can give a file away")
    paths = [Path(segment.SHM_DIR, segment.ASIDE + machine.name + end) for end in ("", ".0123456789abcdef", ".0123456789abcdef.")]
    if abandoned:
        killed_while_it_restores(machine, machine.folder)
    try:
        for path in paths:
            SQUATTERS[kind](path)
        snapshot.restore(machine.name, other)
        with shmcache.attach(machine.name) as cache:
            assert cache.get("k") == "older"
        assert f"{paths[1].name}: of another user, another version of shmcache, or no segment" in admin("list")
        shmcache.unlink(machine.name)
        assert all(path.lstat() for path in paths)
    finally:
        for path in paths:
            path.rmdir() if kind == "directory" else path.unlink(missing_ok=True)


def test_what_another_name_has_aside_stays(machine, other):
    killed_while_it_restores(machine, machine.folder)
    killed_as_it_begins_again(machine, other)
    left = asides(machine)
    other_name = machine.name.rpartition("-")[0]
    assert not segment._clear_aside(other_name)
    assert not segment._clear_aside(f"{machine.name}.{'0' * 16}")
    assert asides(machine) == left
    shmcache.unlink(machine.name)


def test_what_another_user_has_aside_stays(machine, other):
    """It looks as if a restore of ours had left it."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    killed_while_it_restores(machine, machine.folder)
    killed_as_it_begins_again(machine, other)
    os.unlink(segment.check_name(machine.name))
    [left] = asides(machine)
    os.chmod(f"{segment.SHM_DIR}/{left}", 0o666)
    segment._let_go(segment._hold_name(segment.check_name(machine.name), machine.name))  # what this imports the other user may not read

    def as_another():
        os.setresuid(12345, 12345, 12345)
        shmcache.create(machine.name, "8M").close()
        assert segment.aside_state(left) == 0
        shmcache.unlink(machine.name)
        with pytest.raises(errors.SegmentNotFound):
            shmcache.unlink(machine.name)
        return asides(machine) == [left]

    assert ended(child(as_another)) == 0
    shmcache.unlink(machine.name)
    assert asides(machine) == []


def test_who_unlinks_behind_a_stopped_process_is_told_and_a_fork_child_holds_nothing(machine, other, monkeypatch):
    killed_while_it_restores(machine, machine.folder)
    path = segment.check_name(machine.name)
    monkeypatch.setattr(segment, "NAME_LIMIT", 0.1)
    held = segment._hold_name(path, machine.name)
    reading, writing = os.pipe()
    forked = child(lambda: os.read(reading, 1))
    try:
        with pytest.raises(errors.BeingRestored, match="end it if it is stopped"):
            shmcache.unlink(machine.name)
        with pytest.raises(errors.BeingRestored, match="end it if it is stopped"):
            snapshot.restore(machine.name, other)
        assert os.path.exists(path)
        assert asides(machine) == []
        segment._let_go(held)
        shmcache.unlink(machine.name)
        assert not os.path.exists(path)
    finally:
        os.write(writing, b"x")
        ended(forked)
        os.close(writing)
        os.close(reading)


# ---- who gets in -----------------------------------------------------------------------------------------------------------------------


def attempt(name, said):
    try:
        with shmcache.attach(name) as cache:
            cache.set("\0mine", 1)
            said("in")
    except errors.ShmcacheError as e:
        said(type(e).__name__)


def in_a_thread(name):
    """Somebody who attaches: (what tells what came of it, at once or None; what waits for that)"""
    said = []
    thread = threading.Thread(target=attempt, args=(name, said.append))
    thread.start()
    return (lambda: said[0] if said else None), (lambda: thread.join(LIMIT))


def in_a_fork_child(name):
    reading, writing = os.pipe()
    process = child(lambda: attempt(name, lambda word: os.write(writing, word.encode())))
    os.close(writing)
    os.set_blocking(reading, False)
    found = []

    def said():
        with contextlib.suppress(BlockingIOError):
            if not found and (word := os.read(reading, 100)):
                found.append(word.decode())
        return found[0] if found else None

    def wait():
        ended(process)
        said()
        os.close(reading)

    return said, wait


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize("somebody", [in_a_thread, in_a_fork_child])
def test_the_restorers_own_threads_and_children_wait_as_others(machine, monkeypatch, somebody, refused):
    machine.cache.set("k", 1)
    machine.snapshot()
    put_all, waiting = snapshot._put_all, []

    def beside(into, found, logs, *args):
        monkeypatch.setattr(snapshot, "_put_all", put_all)
        with pytest.raises(errors.BeingRestored):
            shmcache.attach(machine.name, wait=False)
        waiting.extend(somebody(machine.name))
        for _ in range(20):  # it tries again and again meanwhile
            assert waiting[0]() is None
            time.sleep(0.01)
        if refused:
            raise errors.DamagedFile("a file", 0, "it was whole")
        put_all(into, found, logs, *args)

    monkeypatch.setattr(snapshot, "_put_all", beside)
    with pytest.raises(errors.DamagedFile) if refused else contextlib.nullcontext():
        machine.reboot()
    said, wait = waiting
    wait()
    assert said() == ("SegmentNotFound" if refused else "in")
    assert segment_exists(machine.name) != refused


# ---- who waits -------------------------------------------------------------------------------------------------------------------------


def test_who_waits_for_a_restorer_that_has_ended_is_told_soon(machine, other):
    killed_while_it_restores(machine, machine.folder)
    began = time.monotonic()
    for call in (lambda: shmcache.attach(machine.name), lambda: shmcache.open(machine.name, "8M")):
        with pytest.raises(errors.BeingRestored, match=r"has ended before it was certain.*shmcache-admin restore.*or unlink it") as caught:
            call()
        assert caught.value.abandoned
    assert time.monotonic() - began < segment.RESTORE_LIMIT / 2


def test_a_restorer_that_ends_while_one_waits_is_noticed(machine, other):
    """At first it lives."""
    code = KILLED.replace("os._exit(9)", "print('there', flush=True); sys.stdin.read()")
    process = subprocess.Popen(
        [sys.executable, "-c", code, machine.name, str(machine.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "there\n"
        said, wait = in_a_thread(machine.name)
        with pytest.raises(errors.BeingRestored, match="a process is at it") as caught:
            shmcache.attach(machine.name, wait=False)
        assert not caught.value.abandoned
        began = time.monotonic()
        assert said() is None
    finally:
        process.kill()
        process.communicate()
    wait()
    assert said() == "BeingRestored"
    assert time.monotonic() - began < segment.RESTORE_LIMIT / 2


def test_a_stopped_restorer_is_waited_for_up_to_the_limit(machine, other, monkeypatch):
    there = cache_module.create_restored(machine.name, 100, 1, machine_settings(machine))
    monkeypatch.setattr(segment, "RESTORE_LIMIT", 0.1)
    with pytest.raises(errors.BeingRestored, match="a process is at it") as caught:
        shmcache.attach(machine.name)
    assert not caught.value.abandoned
    there.close()


def machine_settings(machine):
    found, _ = snapshot.find(machine.folder)
    return found[0].settings


def test_the_state_of_a_restore_by_its_descriptor(machine, other):
    """Whoever finds the lock free looks at the segment again: a restorer lets go of it when the segment is settled, or has lost its name."""
    there = cache_module.create_restored(machine.name, 100, 1, machine_settings(machine))
    fd = os.open(segment.check_name(machine.name), os.O_RDWR)
    try:
        assert _core.unsettled(fd) == 1
        assert not there.mapping.begin_restore()
        pid = os.fork()
        if pid == 0:
            there.mapping.end_restore()  # its parent's
            os._exit(_core.unsettled(fd))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
        there.mapping.end_restore()
        assert _core.unsettled(fd) == 2
        assert there.mapping.begin_restore()
        assert _core.unsettled(fd) == 1
        shmcache.unlink(machine.name)
        there.mapping.end_restore()
        assert _core.unsettled(fd) == 1
        there.views(writable=True).header["restoring"] = 0
        assert _core.unsettled(fd) == 0
    finally:
        os.close(fd)
        there.close()


# ---- awaited ---------------------------------------------------------------------------------------------------------------------------


class Ticking:
    """The loop's turns, while a block runs."""

    async def __aenter__(self):
        self.turns = 0
        self.task = asyncio.create_task(self.tick())
        return self

    async def tick(self):
        while True:
            self.turns += 1
            await asyncio.sleep(0.001)

    async def __aexit__(self, *exc):
        self.task.cancel()


OPENERS = [shmcache.aio.attached, lambda name: shmcache.aio.opened(name, "8M")]


@pytest.mark.parametrize("make", OPENERS)
def test_a_task_awaits_a_restore_and_the_loop_goes_on(machine, monkeypatch, make):
    machine.cache.set("k", 1)
    machine.cache.set("\0own", 1)
    machine.snapshot()
    go = threading.Event()
    settle = snapshot._settle
    at = threading.Event()

    def wait(*args):
        at.set()
        assert go.wait(LIMIT)
        settle(*args)

    monkeypatch.setattr(snapshot, "_settle", wait)
    machine.killed()
    thread = threading.Thread(target=snapshot.restore, args=(machine.name, machine.folder))
    thread.start()

    async def main():
        assert at.wait(LIMIT)
        for plain in (shmcache.aio.attach, shmcache.aio.open):
            with pytest.raises(errors.BeingRestored, match=r"await shmcache\.aio\.attached\(\)"):
                plain(machine.name)
        with pytest.raises(errors.BeingRestored):
            await shmcache.aio.attached(machine.name, wait=False)
        async with Ticking() as loop:
            task = asyncio.create_task(make(machine.name))
            while loop.turns < 30:
                await asyncio.sleep(0.001)
            assert not task.done()
            go.set()
            cache = await task
            assert await cache.get("k") == 1
            await cache.close()

    try:
        asyncio.run(asyncio.wait_for(main(), LIMIT))
    finally:
        go.set()
        thread.join(LIMIT)
    machine.cache = shmcache.attach(machine.name, store=machine.store)


@pytest.mark.parametrize("make", OPENERS)
def test_a_task_is_told_that_the_restorer_has_ended_or_limits_its_wait_itself(machine, other, monkeypatch, make):
    killed_while_it_restores(machine, machine.folder)

    async def main():
        async with Ticking() as loop:
            with pytest.raises(errors.BeingRestored) as caught:
                await make(machine.name)
            assert caught.value.abandoned
            assert loop.turns > 30
        monkeypatch.setattr(segment, "RESTARTED_IN", 1000.0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await make(machine.name)

    began = time.monotonic()
    asyncio.run(asyncio.wait_for(main(), LIMIT))
    assert time.monotonic() - began < segment.RESTORE_LIMIT / 2


def test_opened_creates_what_is_not_there_and_attached_does_not(name):
    async def main():
        with pytest.raises(errors.SegmentNotFound):
            await shmcache.aio.attached(name)
        async with await shmcache.aio.opened(name, "8M") as cache:
            await cache.set("k", 1)
        async with await shmcache.aio.attached(name) as cache:
            assert await cache.get("k") == 1

    asyncio.run(main())


def test_outside_of_a_loop_the_plain_forms_wait(machine, monkeypatch):
    machine.cache.set("k", 1)
    machine.snapshot()
    settle, waiting = snapshot._settle, []

    def beside(*args):
        waiting.append(threading.Thread(target=lambda: found.append(shmcache.aio.attach(machine.name))))
        waiting[0].start()
        settle(*args)

    found = []
    monkeypatch.setattr(snapshot, "_settle", beside)
    machine.reboot()
    waiting[0].join(LIMIT)
    assert found[0].sync.get("k") == 1
    found[0].sync.close()
