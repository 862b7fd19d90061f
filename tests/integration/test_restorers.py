"""One process restores a segment: others are refused, or begin again behind a dead one; nobody else gets in, and nobody waits in vain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time

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
    """A worker that looked in an instant without it would create a segment of its own. Killed before it takes the name, it leaves the
    abandoned one there; the next takes away what stands aside."""
    killed_while_it_restores(machine, machine.folder)
    names, link, at = [], os.link, segment.check_name(machine.name)

    def linked(*args, **options):
        assert os.path.exists(at)
        link(*args, **options)
        assert os.path.exists(at)
        names.append({path for path in os.listdir(segment.SHM_DIR) if path.endswith(machine.name)})

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "link", linked)
        patch.setattr(os, "rename", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        snapshot.restore(machine.name, machine.folder)
    assert len(names[0]) == 2
    with pytest.raises(errors.BeingRestored) as caught:
        shmcache.attach(machine.name, wait=False)
    assert caught.value.abandoned
    monkeypatch.setattr(os, "link", linked)
    snapshot.restore(machine.name, machine.folder)
    machine.cache = shmcache.attach(machine.name, store=machine.store)
    assert machine.cache.get("k") == "newer"
    assert len({path for path in os.listdir(segment.SHM_DIR) if path.endswith(machine.name)}) == 1


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
former = getattr(segment, where)
def killed(*args):
    if behind:
        former(*args)
    os._exit(9)
setattr(segment, where, killed)
snapshot.restore(sys.argv[1], Path(sys.argv[2]))
"""


@pytest.mark.parametrize("at", ["_reserve", "_reserve+", "_take_name", "_link+", "_take_name+"])
def test_a_restore_that_is_killed_as_it_begins_again(machine, other, at):
    """Behind what it found as it was, beside its own or not, or behind its own."""
    killed_while_it_restores(machine, machine.folder)
    command = [sys.executable, "-c", KILLED_AS_IT_BEGINS_AGAIN, machine.name, str(other), at]
    assert subprocess.run(command, check=False).returncode == 9
    with pytest.raises(errors.BeingRestored) as caught:
        shmcache.open(machine.name, "8M", wait=False)
    assert caught.value.abandoned
    snapshot.restore(machine.name, machine.folder)
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
