"""Rows, forks, threads, descriptors: whoever comes and goes, the living are not robbed and the dead are seen."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

import shmcache
from shmcache import errors
from shmcache.core import _sweep


def fork(run):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if run() is not False else 2
        finally:
            os._exit(code)
    return pid


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end(pid):
    """A child, if it was not waited for."""
    with contextlib.suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0] == 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def hold_a_stripe(cache, stripe=0):
    """What a process leaves that dies with a stripe in its hand."""
    seg = cache.views(writable=True)
    seg.stripes["word"][stripe] = int(seg.rows["gen"][cache.row]) << 16 | cache.row + 1


@pytest.mark.slow
def test_five_thousand_attach_and_kill_rounds_over_eight_rows(make):
    """A reused row neither hides its predecessor's lock nor inherits its chunks. Every fifth dies with a stripe; six rows are taken
    all the while, so that the next one has a good chance of being in the very row."""
    cache = make("4M", max_processes=8, stripes=1, lock_limit=5.0)
    cache["k"] = 0
    sitting = [fork(lambda: cache.get("k") == 0 and os.kill(os.getpid(), signal.SIGSTOP)) for _ in range(5)]
    for pid in sitting:
        os.waitpid(pid, os.WUNTRACED)
    gens = cache.views()

    for i in range(5000):
        def live(i=i):
            began = time.monotonic()
            cache.set(b"k", i)
            took = time.monotonic() - began
            for n in range(3):
                cache.set(b"%d:%d" % (i % 500, n), b"x" * 100)
            if i % 5 == 0:
                hold_a_stripe(cache)
            if took < 1:
                os.kill(os.getpid(), signal.SIGKILL)

        assert exit_code(fork(live)) == -9, "the lock of the dead was had too late, or not at all"
    rows = {i for i, gen in enumerate(gens.rows["gen"].tolist()) if gen % (1 << 23) > 1000}
    assert len(rows) == 2, "two rows did all the work"
    for pid in sitting:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    chunks = _sweep.settle(cache)
    in_hand = sum(c["reserved"] for c in cache.stats()["slab_classes"])
    assert chunks["RESERVED"] == chunks["RETIRED"] == 0
    assert chunks["KEPT"] == in_hand
    assert [p["pid"] for p in cache.processes()] == [os.getpid()]
    del gens


@pytest.mark.slow
def test_threads_of_one_process_never_rob_each_other(make):
    """Ten seconds on one stripe, with another process, so that locks are waited for."""
    cache = make("4M", stripes=1)
    cache["n"] = 0
    end = time.monotonic() + 10
    counted = []

    def count():
        n = 0
        while time.monotonic() < end:
            for _ in range(100):
                cache.incr("n")
            n += 100
        counted.append(n)

    def both():
        threads = [threading.Thread(target=count) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        cache.set(f"of {os.getpid()}", sum(counted))

    pid = fork(both)
    both()
    assert exit_code(pid) == 0
    assert cache["n"] == cache[f"of {pid}"] + sum(counted)
    assert cache.stats()["takeovers"] == 0
    assert cache.stats()["lock_waits"] > 0, "they met"


def test_closed_descriptors_kill_nobody(make):
    """A daemon closes all descriptors: it lives on, is not robbed, and can still ask who is alive."""
    cache = make("4M", stripes=1, lock_limit=0.1)
    cache["k"] = 1

    def daemon():
        cache.get("k")
        os.closerange(3, 4096)
        hold_a_stripe(cache)
        os.kill(os.getpid(), signal.SIGSTOP)
        cache.views(writable=True).stripes["word"][0] = 0
        cache.set("k", 2)

    pid = fork(daemon)
    os.waitpid(pid, os.WUNTRACED)
    with pytest.raises(errors.StripeBusy):
        cache.set("k", 3)
    os.kill(pid, signal.SIGCONT)
    assert exit_code(pid) == 0
    assert cache["k"] == 2


def test_a_fork_in_c_that_runs_no_hook(make):
    """The child outlives its killed parent: the parent is seen to be dead all the same, and the child takes a row of its own."""
    cache = make("4M", stripes=1)
    cache["k"] = 1
    r, w = os.pipe()
    go_r, go_w = os.pipe()

    def parent():
        cache.get("k")
        mine, gen = cache.row, int(cache.views().rows["gen"][cache.row])
        if ctypes.PyDLL(None).fork() == 0:
            os.read(go_r, 1)
            cache.set("k", 2)
            os.write(w, b"y" if cache.row != mine or cache.views().rows["gen"][mine] > gen else b"n")
            os._exit(0)
        hold_a_stripe(cache)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = fork(parent)
    assert exit_code(pid) == -9
    assert [p["pid"] for p in cache.processes()] == [os.getpid()], "the dead parent's row is free though its child lives"
    began = time.monotonic()
    cache.set("k", 3)
    assert time.monotonic() - began < 1
    os.write(go_w, b".")
    assert os.read(r, 1) == b"y"
    assert cache["k"] == 2
    for fd in (r, w, go_r, go_w):
        os.close(fd)


def test_fork_while_other_threads_write(make):
    cache = make("8M")
    stop = threading.Event()

    def write(n):
        i = 0
        while not stop.is_set():
            cache.set(b"%d:%d" % (n, i % 500), b"x" * (i % 500 * 4))
            i += 1

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for t in threads:
        t.start()

    def use():
        for i in range(50):
            cache.set(b"child:%d" % i, b"y" * 100)
            if cache.get(b"child:%d" % i) != b"y" * 100:
                return False
        return True

    codes = [exit_code(fork(use)) for _ in range(100)]
    stop.set()
    for t in threads:
        t.join()
    assert codes == [0] * 100
    assert cache.stats()["evictions"] == 0  # so whatever a child missed of its own, somebody broke
    chunks = _sweep.settle(cache)
    assert chunks["RESERVED"] == chunks["RETIRED"] == 0
    assert cache.verify() == []


def test_the_interpreter_may_end_while_threads_use_the_cache(make):
    cache = make("4M")
    code = f"""
import shmcache, threading, time
cache = shmcache.attach({cache.name!r})
def use(n):
    while True:
        cache.set(b"k%d" % n, b"x" * 100)
        cache.get_or_set("g", lambda: 1)
for n in range(4):
    threading.Thread(target=use, args=(n,), daemon=True).start()
while cache.get(b"k3") is None:
    pass
"""
    for _ in range(5):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
        assert out.returncode == 0, out.stderr
    _sweep.settle(cache)
    assert cache.verify() == []


def test_an_exception_in_the_factory_and_ctrl_c_leave_no_claim(make):
    cache = make("4M")
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            cache.get_or_set("k", lambda error=error: (_ for _ in ()).throw(error))
        assert cache.get_or_set("k2", lambda: 1) == 1
        assert cache.claim_version("k") == 0
    assert shmcache.attach(cache.name).get_or_set("k", lambda: 5) == 5


# ---- a held byte is no life: children that were vforked -----------------------------------------------------------------------------


@pytest.fixture
def vforked(make, tmp_path):
    """vforked(cache) -> pid of a process that holds a stripe, and has vforked a child that shares its memory: it waits within posix_spawn,
    before exec, for somebody who opens a fifo."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def go(cache):
        def parent():
            cache.get("k")
            hold_a_stripe(cache)
            os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, fifo, os.O_RDONLY, 0)])

        pids.append(fork(parent))
        while not psutil.Process(pids[0]).children():
            time.sleep(0.001)
        return pids[0], psutil.Process(pids[0]).children()[0]

    pids = []
    yield go
    os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))  # fails if nobody waits there
    end(pids[0])


@pytest.mark.parametrize("reaped", [False, True])
def test_a_vforked_child_hides_no_death(make, vforked, reaped):
    cache = make("4M", stripes=1, lock_limit=5.0)
    cache["k"] = 1
    pid, child = vforked(cache)
    assert pid in [p["pid"] for p in cache.processes()]
    os.kill(pid, signal.SIGKILL)
    if reaped:
        assert exit_code(pid) == -9
    else:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert child.is_running()
    assert [p["pid"] for p in cache.processes()] == [os.getpid()]
    began = time.monotonic()
    cache.set("k", 2)
    assert time.monotonic() - began < 1
    assert cache.stats()["takeovers"] == 1
    if not reaped:
        assert exit_code(pid) == -9


@pytest.mark.parametrize("word", ["another namespace", "none", "damaged"])
def test_a_pid_is_believed_in_its_own_namespace_only(make, vforked, word):
    cache = make("4M", stripes=1, lock_limit=0.1)
    cache["k"] = 1
    pid, _ = vforked(cache)
    rows = cache.views(writable=True).rows
    row = next(p["row"] for p in cache.processes() if p["pid"] == pid)
    home = int(rows["home"][row])
    assert home >> 32 == os.stat("/proc/self/ns/pid").st_ino and home & 0xFFFFFFFF == pid
    other = {"another namespace": home ^ 1 << 40, "none": pid, "damaged": home}[word]
    rows["home"][row], rows["home_check"][row] = other, ~other & 2**64 - 1 if word != "damaged" else 0
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -9
    with pytest.raises(errors.StripeBusy):
        cache.set("k", 2)
    rows["home"][row], rows["home_check"][row] = home, ~home & 2**64 - 1
    cache.set("k", 2)
    assert cache.stats()["takeovers"] == 1
    del rows


def test_a_leader_that_has_ended_before_its_threads_lives(make):
    """It is a zombie for /proc, and its other threads go on."""
    exit_of_thread = {"x86_64": 60, "aarch64": 93}[platform.machine()]
    cache = make("4M", stripes=1, lock_limit=0.1)
    cache["k"] = 1
    go_r, go_w = os.pipe()

    def process():
        def work():
            cache.get("k")
            hold_a_stripe(cache)
            os.read(go_r, 1)
            cache.views(writable=True).stripes["word"][0] = 0
            cache.set("k", 2)
            os._exit(7)

        threading.Thread(target=work).start()
        ctypes.CDLL(None).syscall(exit_of_thread, 0)

    pid = fork(process)
    while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE or pid not in [p["pid"] for p in cache.processes()]:
        time.sleep(0.001)
    while not cache.views().stripes["word"][0]:
        time.sleep(0.001)
    with pytest.raises(errors.StripeBusy):
        cache.set("k", 3)
    assert pid in [p["pid"] for p in cache.processes()]
    os.write(go_w, b".")
    assert exit_code(pid) == 7
    assert cache["k"] == 2
    assert cache.stats()["takeovers"] == 0
    os.close(go_r)
    os.close(go_w)


def test_exec_ends_a_life(make):
    """The process goes on, with the same pid, and knows nothing of the segment."""
    cache = make("4M", stripes=1, lock_limit=5.0)
    cache["k"] = 1

    def process():
        cache.get("k")
        hold_a_stripe(cache)
        os.execv("/bin/sleep", ["sleep", "60"])

    pid = fork(process)
    while "sleep" not in psutil.Process(pid).name():
        time.sleep(0.001)
    began = time.monotonic()
    cache.set("k", 2)
    assert time.monotonic() - began < 1
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -9


# ---- a flipped bit kills nobody ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(make):
    """(cache, pid, row) of a process that is stopped with a stripe in its hand; continued, it stores 1 and exits with 7."""
    cache = make("4M", stripes=1, max_processes=2, lock_limit=0.02)
    cache["k"] = 0

    def process():
        cache.get("k")
        hold_a_stripe(cache)
        os.kill(os.getpid(), signal.SIGSTOP)
        cache.views(writable=True).stripes["word"][0] = 0
        cache.set("k", 1)
        os._exit(7)

    pid = fork(process)
    os.waitpid(pid, os.WUNTRACED)
    yield cache, pid, next(p["row"] for p in cache.processes() if p["pid"] == pid)
    end(pid)


@pytest.mark.parametrize("word", ["gen", "gen_check", "home", "home_check", "pid"])
def test_a_flipped_bit_of_a_row_robs_nobody(stopped, word):
    cache, pid, row = stopped
    rows = cache.views(writable=True).rows
    was = int(rows[word][row])
    for bit in range(64):
        rows[word][row] = was ^ 1 << bit
        with pytest.raises(errors.StripeBusy):
            cache.set("k", 2)
    rows[word][row] = was
    del rows
    os.kill(pid, signal.SIGCONT)
    assert exit_code(pid) == 7
    assert cache["k"] == 1
    assert cache.stats()["takeovers"] == 0


def test_a_flipped_bit_of_a_locks_word_robs_nobody(stopped):
    cache, pid, _ = stopped
    words = cache.views(writable=True).stripes["word"]
    was = int(words[0])
    for bit in range(63):  # 63 is WAIT
        words[0] = was ^ 1 << bit
        with pytest.raises(errors.StripeBusy):
            cache.set("k", 2)
    words[0] = was
    del words
    os.kill(pid, signal.SIGCONT)
    assert exit_code(pid) == 7
    assert cache["k"] == 1
    assert cache.stats()["takeovers"] == 0


@pytest.mark.parametrize("where", ["row", "word"])
def test_the_dead_are_seen_whatever_bit_is_flipped(stopped, where):
    cache, pid, row = stopped
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -9
    views = cache.views(writable=True)
    token, gen = int(views.stripes["word"][0]), int(views.rows["gen"][row])
    for n, bit in enumerate(range(63 if where == "word" else 64), 1):
        views.stripes["word"][0] = token ^ (1 << bit if where == "word" else 0)
        views.rows["gen"][row] = gen ^ (1 << bit if where == "row" else 0)
        cache.set("k", bit)
        assert cache.stats()["takeovers"] == n
    del views


def test_no_generation_is_given_twice_whatever_bit_was_flipped(stopped):
    cache, pid, row = stopped
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -9
    r, w = os.pipe()
    rows = cache.views(writable=True).rows
    was, check = int(rows["gen"][row]), int(rows["gen_check"][row])
    for word in ("gen", "gen_check"):
        for bit in range(64):
            rows["gen"][row], rows["gen_check"][row] = was, check
            rows[word][row] ^= 1 << bit
            assert exit_code(fork(lambda: cache.get("k") == 0 and os.write(w, cache.row.to_bytes(2)))) == 0
            assert int.from_bytes(os.read(r, 2)) == row
            gen = int(rows["gen"][row])
            assert gen > was and gen == ~int(rows["gen_check"][row]) & 2**64 - 1
            assert (gen << 16 | row + 1).bit_count() % 2 == 0
    del rows
    os.close(r)
    os.close(w)
    cache.views(writable=True).stripes["word"][0] = 0
