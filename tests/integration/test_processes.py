"""Between real processes and threads: sharing, fork, spawn, close, stopped owners, the stress and the storm in short."""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings

import numpy as np
import psutil
import pytest

import shmcache
from shmcache import errors, flight
from shmcache.core import _sweep
from tests.redis.inprocess import InProcess
from tests.redis.resp import encode


def child(run):
    """Fork, run, exit 0 if it returned true."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if run() else 1)
        except BaseException as e:
            print(f"child: {e!r}", file=sys.stderr)
            os._exit(2)
    return pid


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def increments(cache, n):
    for _ in range(n):
        cache.incr("n", 1, default=0)


def test_counter_of_processes_and_threads_is_exact(cache):
    def run():
        threads = [threading.Thread(target=increments, args=(cache, 5000)) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return True

    pids = [child(run) for _ in range(3)]
    assert [ended(p) for p in pids] == [0] * 3
    assert cache["n"] == 30_000


def test_cas_loops_lose_nothing(cache):
    cache["n"] = (0,)

    def run():
        for _ in range(2000):
            while True:
                (n,), version = cache.gets("n")
                if cache.cas("n", (n + 1,), version):
                    break
        return True

    pids = [child(run) for _ in range(3)]
    assert [ended(p) for p in pids] == [0] * 3
    assert cache["n"] == (6000,)


def test_fork_child_takes_a_row_of_its_own(cache):
    cache["k"] = 1

    def run():
        cache["c"] = 2
        pids = {p["pid"] for p in cache.stats()["processes"]}
        return cache["k"] == 1 and pids == {os.getpid(), os.getppid()}

    assert ended(child(run)) == 0
    assert cache["c"] == 2
    assert len(cache.stats()["processes"]) == 1


def test_child_of_a_child_after_its_parent_died(cache):
    read, write = os.pipe()

    def parent():
        cache["p"] = 1

        def grandchild():
            while os.getppid() == mine:
                signal.sigtimedwait([], 0.001)
            ok = cache["p"] == 1 and len(cache.stats()["processes"]) == 2
            os.write(write, b"y" if ok else b"n")
            return True

        mine = os.getpid()
        child(grandchild)
        os.kill(mine, signal.SIGKILL)

    assert ended(child(parent)) == -9
    assert os.read(read, 1) == b"y"
    os.close(read)
    os.close(write)


def spawned(cache, out):
    out.put((cache["k"], os.getpid() in {p["pid"] for p in cache.stats()["processes"]}))


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_handle_goes_to_a_worker(cache, method):
    cache["k"] = "v"
    context = mp.get_context(method)
    out = context.Queue()
    p = context.Process(target=spawned, args=(cache, out))
    p.start()
    assert out.get(timeout=30) == ("v", True)
    p.join()
    out.close()
    del out, p  # their semaphores go before the tracker of semaphores does
    end_trackers(method)


def end_trackers(method):
    """What multiprocessing has started for itself."""
    if method == "forkserver":
        from multiprocessing import forkserver, resource_tracker

        forkserver._forkserver._stop()
        resource_tracker._resource_tracker._stop()
    elif method == "spawn":
        from multiprocessing import resource_tracker

        resource_tracker._resource_tracker._stop()


def test_close_waits_for_a_call_that_is_under_way(make):
    cache = make(lock_limit=0.5)
    cache["k"] = 1
    seg = cache.views(writable=True)
    holder = child(lambda: cache.get("k") and os.kill(os.getpid(), signal.SIGSTOP) is None)
    os.waitpid(holder, os.WUNTRACED)
    row = int(np.flatnonzero(seg.rows["pid"] == holder)[0])
    seg.stripes["word"][:] = int(seg.rows["gen"][row]) << 16 | row + 1  # as if it had been stopped inside every stripe
    del seg
    raised = []

    def write():
        try:
            cache.set("k", 2)
        except errors.StripeBusy as e:
            raised.append(e)

    t = threading.Thread(target=write)
    t.start()
    other = shmcache.attach(cache.name)
    while other.mapping.handles and other.counters()["lock_waits"] == 0 and t.is_alive():
        signal.sigtimedwait([], 0.01)
    cache.close()
    t.join()
    assert len(raised) == 1
    other.close()
    os.kill(holder, signal.SIGKILL)
    ended(holder)


def test_a_stopped_owner_is_not_robbed_and_readers_go_on(make):
    cache = make(lock_limit=0.2, stripes=1)
    cache["k"] = 1
    seg = cache.views(writable=True)
    holder = child(lambda: cache.get("k") and os.kill(os.getpid(), signal.SIGSTOP) is None)
    os.waitpid(holder, os.WUNTRACED)
    row = int(np.flatnonzero(seg.rows["pid"] == holder)[0])
    token = int(seg.rows["gen"][row]) << 16 | row + 1
    seg.stripes["word"][0] = token
    for call in (lambda: cache.set("k", 2), lambda: cache.delete("k"), lambda: cache.incr("k"), lambda: cache.touch("k", 5)):
        began = time.monotonic()
        with pytest.raises(errors.StripeBusy, match="stopped"):
            call()
        assert time.monotonic() - began < 5
        assert cache.get("k") == 1, "a reader needs no lock"
    assert int(seg.stripes["stalled"][0]) == token
    os.kill(holder, signal.SIGKILL)
    ended(holder)
    cache.set("k", 3)
    assert cache["k"] == 3
    assert cache.stats()["takeovers"] == 1
    assert int(seg.stripes["stalled"][0]) == 0, "whoever releases the lock runs: nobody is to fail fast because of him"
    del seg


def held_stripe(cache):
    """A stopped process that holds the only stripe: (its pid, writable views)."""
    seg = cache.views(writable=True)
    holder = child(lambda: cache.get("k") and os.kill(os.getpid(), signal.SIGSTOP) is None)
    os.waitpid(holder, os.WUNTRACED)
    row = int(np.flatnonzero(seg.rows["pid"] == holder)[0])
    seg.stripes["word"][0] = int(seg.rows["gen"][row]) << 16 | row + 1
    return holder, seg


def test_a_handler_may_close_the_handle_that_waits(make):
    cache = make(lock_limit=0.5, stripes=1)
    cache["k"] = 1
    holder, seg = held_stripe(cache)
    del seg
    for call in (lambda c: c.set("k", 2), lambda c: c.delete("k"), lambda c: c.touch("k", 5), lambda c: c.incr("k")):
        with shmcache.attach(cache.name) as other:
            signal.signal(signal.SIGALRM, lambda *a, other=other: other.close())
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            began = time.monotonic()
            with pytest.raises((errors.StripeBusy, errors.CacheClosed)):
                call(other)
            assert time.monotonic() - began < 5, "close() waited for the call that it interrupted"
    signal.setitimer(signal.ITIMER_REAL, 0)  # a call may have ended before it came
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.kill(holder, signal.SIGKILL)
    ended(holder)


def test_a_handler_may_fork_in_the_middle_of_a_write(make):
    cache = make(lock_limit=20, stripes=1)
    cache["k"] = 1
    holder, seg = held_stripe(cache)
    children = []

    def handler(*args):
        signal.setitimer(signal.ITIMER_REAL, 0)
        pid = os.fork()
        if pid == 0:
            return  # the child goes on with the same write
        children.append(pid)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)

    me = os.getpid()
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)  # till it is heard: one that comes between two slices of the wait is not
    try:
        cache.set("k", b"x" * 50)
    finally:
        if os.getpid() != me:
            os._exit(0 if cache.get("k") == b"x" * 50 else 1)
    signal.setitimer(signal.ITIMER_REAL, 0)  # a call may have ended before it came
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    ended(children[0])
    assert cache["k"] == b"x" * 50
    for i in range(20):
        cache.set(f"other {i}", b"y" * 50)
    assert cache["k"] == b"x" * 50
    assert cache.verify() == []
    del seg


def test_ctrl_c_while_waiting_leaves_nothing_in_hand(make):
    cache = make(lock_limit=60, stripes=1)
    cache["k"] = 1
    seg = cache.views(writable=True)
    holder = child(lambda: cache.get("k") and os.kill(os.getpid(), signal.SIGSTOP) is None)
    os.waitpid(holder, os.WUNTRACED)
    row = int(np.flatnonzero(seg.rows["pid"] == holder)[0])
    seg.stripes["word"][0] = int(seg.rows["gen"][row]) << 16 | row + 1
    before = cache.stats()["slab_classes"][0]

    def handler(*args):
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt

    for call in (lambda: cache.set("k", b"x" * 50), lambda: cache.set("k", bytes(200_000)), lambda: cache.incr("k")):
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)  # till it is heard: one that comes between two slices of the wait is not
        with pytest.raises(KeyboardInterrupt):
            call()
    os.kill(holder, signal.SIGKILL)
    ended(holder)
    assert cache["k"] == 1
    after = cache.stats()["slab_classes"][0]
    assert after["live"] == before["live"]
    assert cache.stats()["big_pages"] == 0
    del seg


@contextlib.contextmanager
def recurring_signal(seconds, deadline):
    """A handler that runs every so often; past the deadline it raises. What it yields are the times at which it ran."""
    began = time.monotonic()
    ran = []

    def handler(*args):
        ran.append(time.monotonic() - began)
        if ran[-1] > deadline:
            raise TimeoutError("the call began again at each signal")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield ran
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("seconds", [0.05, 0.0007])
def test_a_recurring_signal_does_not_make_the_limit_longer(make, seconds):
    """Beside a stopped holder each call ends at its limit, whatever else the process has to do, also when no slice of its sleep is whole."""
    cache = make(lock_limit=0.6, stripes=1)
    cache["k"] = 1
    claim = cache.claim("claimed", 60.0)
    mark, _ = cache.mark("marked", 60.0)
    assert claim > 0
    assert mark > 0
    holder, seg = held_stripe(cache)
    word = int(seg.stripes["word"][0])
    calls = {
        "set": lambda: cache.set("k", 2),
        "set large": lambda: cache.set("k", bytes(200_000)),
        "add": lambda: cache.add("new", 2),
        "delete": lambda: cache.delete("k"),
        "incr": lambda: cache.incr("k"),
        "touch": lambda: cache.touch("k", 5),
        "claim": lambda: cache.claim("other", 5.0),
        "unclaim": lambda: cache.unclaim("claimed", claim),
        "end_mark": lambda: cache.end_mark("marked"),
    }
    for name, call in calls.items():
        seg.stripes["stalled"][0] = 0  # else only the first would wait for long
        with recurring_signal(seconds, deadline=10) as ran, pytest.raises(errors.StripeBusy):
            call()
        assert len(ran) > 2, name
        assert int(seg.stripes["word"][0]) & ~(1 << 63) == word, name
    with contextlib.closing(InProcess(cache.name)) as server:
        for words in ((b"MSETNX", b"one", b"1", b"two", b"2"), (b"SET", b"k", b"2"), (b"INCR", b"k")):
            seg.stripes["stalled"][0] = 0
            with recurring_signal(seconds, deadline=10):
                assert server.say(server.connect(), encode(words)).startswith(b"-TRYAGAIN"), words
    assert cache["k"] == 1
    os.kill(holder, signal.SIGKILL)
    ended(holder)
    del seg


def test_the_dead_are_taken_over_from_whatever_signals_come(make):
    """No slice of the sleep is whole before the next signal, and the limit is over before the first one: the holder is asked for all the same."""
    cache = make(lock_limit=0.001, stripes=1)
    cache["k"] = 1
    holder, seg = held_stripe(cache)
    os.kill(holder, signal.SIGKILL)
    ended(holder)
    with recurring_signal(0.0007, deadline=10):
        cache.set("k", 2)
    assert cache["k"] == 2
    assert cache.stats()["takeovers"] == 1
    del seg


def test_signals_do_not_end_verify_and_settle(make):
    """A lock is held for a while and signals come: that is waited for, and nothing is left out."""
    cache = make(stripes=1)
    cache["k"] = 1
    holder, seg = held_stripe(cache)
    word = int(seg.stripes["word"][0])
    for look in (lambda: cache.verify() == [], lambda: _sweep.settle(cache)["LIVE"] == 1, lambda: _sweep.repair(cache) == (0, 0)):
        seg.stripes["word"][0] = word
        release = threading.Timer(0.5, seg.stripes["word"].__setitem__, (0, 0))
        release.start()
        with recurring_signal(0.05, deadline=30):
            assert look()
        release.join()
    os.kill(holder, signal.SIGKILL)
    ended(holder)
    del seg, release


def test_verify_does_not_wait_for_the_interpreter_with_a_lock(make):
    """While other threads run Python, nobody waits for what verify looks at."""
    cache = make(stripes=16)  # few: numpy lets others run while it looks at many
    cache["k"] = 1
    seg = cache.views()
    interval, longest, stop = sys.getswitchinterval(), 0.0, threading.Event()
    found = []

    def look():
        while not stop.is_set():
            found.extend(cache.verify())

    sys.setswitchinterval(1)  # each of the two keeps the interpreter for so long when it has it; or gives it away to wait for a lock
    t = threading.Thread(target=look)
    try:
        t.start()
        began = free = time.monotonic()
        while time.monotonic() - began < 5:
            if not seg.stripes["word"].any() and not seg.classes["word"].any():
                free = time.monotonic()
            longest = max(longest, time.monotonic() - free)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        t.join()
        del seg
    assert longest < 0.8, "a lock was held by a thread that waited for the interpreter"
    assert found == []


def test_a_fork_child_without_a_row_reads(make):
    """Every row is taken: the child reads, is refused at a write, changes nothing by what it meets, and writes when a row is free."""
    cache = make(max_processes=2)
    cache["k"] = "v"
    cache["n"] = 5
    cache.set("short", "s", ttl=0.05)
    cache.set("tagged", "t", tags=("a",))
    cache.invalidate_tag("a")
    other = child(lambda: cache.get("k") == "v" and signal.pause() is None)
    deadline = time.monotonic() + 30
    while len(cache.processes()) < 2:
        assert time.monotonic() < deadline
    time.sleep(0.06)  # until the short one is over
    before = cache.counters()
    go_read, go = os.pipe()
    told_read, told = os.pipe()

    def run():
        for _ in range(3):
            assert cache.get("k") == "v"
            assert cache["n"] == 5
            assert cache.get("short", 1) == 1
            assert cache.get("tagged", 2) == 2
            assert cache.get_many(["k", "n", "none"]) == {"k": "v", "n": 5}
            assert cache.gets("k")[0] == "v"
            assert "k" in cache
            assert cache.ttl("k") == float("inf")
        for write in (lambda: cache.set("k", 1), lambda: cache.delete("k"), lambda: cache.incr("n"), lambda: cache.pop("k"), lambda: list(cache)):
            with pytest.raises(errors.TooManyProcesses):
                write()
        assert cache.get("k") == "v"
        os.write(told, b"r")
        os.read(go_read, 1)
        cache.set("k", "of the child")
        return cache.get("k") == "of the child"

    reader = child(run)
    os.close(told)
    said = os.read(told_read, 1)  # nothing: the child has ended
    os.close(told_read)
    after = cache.counters()
    os.kill(other, signal.SIGKILL)
    ended(other)
    os.write(go, b"g")
    assert ended(reader) == 0
    assert said == b"r"
    assert {k: after[k] for k in ("hits", "deletes", "expirations")} == {k: before[k] for k in ("hits", "deletes", "expirations")}
    assert cache["k"] == "of the child"
    os.close(go_read)
    os.close(go)


def test_closing_the_last_handle_warns_of_locks_that_go_with_it(make):
    cache = make()
    other = shmcache.attach(cache.name)
    lock = cache.lock("report")
    lock.acquire()
    other.close()  # not the last one: the lock stays, and nothing is said
    free = cache.lock("free")
    with free:
        pass

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache.close()  # the child's: the lock is its parent's
        return True

    assert ended(child(run)) == 0
    with pytest.warns(errors.LockLost, match="'report'") as said:
        cache.close()
    assert "free" not in str(said[0].message).split("'report'")[1].split(":")[0]


def test_locks_that_are_over_are_not_lost(cache):
    """`cache.lock(name, ttl).acquire(blocking=False)` says that something was done lately: nobody gives it back."""
    tracemalloc.start()
    try:
        for i in range(20_000):
            assert cache.lock(f"job-{i}", ttl=0.001).acquire(blocking=False)
        assert tracemalloc.get_traced_memory()[0] < 1_000_000, "what is over is forgotten"
    finally:
        tracemalloc.stop()
    again = cache.lock("again", ttl=0.001)
    again.acquire()
    while again.owned():
        pass
    other = cache.lock("again")
    other.acquire()
    with pytest.raises(errors.UsageError):
        again.release()  # what the other holds is not forgotten with it
    gone = cache.lock("gone", ttl=3600)
    gone.acquire()
    cache.unclaim(flight.LOCK_PREFIX + b"gone", gone.version)
    with pytest.warns(errors.LockLost, match="held 'again':"):
        cache.close()


def test_of_many_lost_locks_some_are_named(cache):
    for i in range(100):
        cache.lock(f"l{i:03}", ttl=3600).acquire()
    with pytest.warns(errors.LockLost, match=r"held 'l000', 'l001', .*'l009' and 90 more:") as said:
        cache.close()
    assert len(str(said[0].message)) < 500


def test_readme_two_terminals(name):
    one = "import shmcache, sys; c = shmcache.open(sys.argv[1], size='4M'); c.set('greeting', 'hello'); c.close()"
    two = "import shmcache, sys; print(shmcache.attach(sys.argv[1]).get('greeting'))"
    subprocess.run([sys.executable, "-c", one, name], check=True)
    out = subprocess.run([sys.executable, "-c", two, name], check=True, capture_output=True, text=True)
    assert out.stdout == "hello\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "tests.stress.mixed --seed 5 --seconds 6 --size 16M --clear-every 2000",
        "tests.crash.storm --seed 5 --seconds 9 --longest 10",
        "tests.stress.churn --size 16M",
    ],
)
def test_long_runs_in_short(command):
    out = subprocess.run([sys.executable, "-m", *command.split()], capture_output=True, text=True, check=False, timeout=120)
    assert out.returncode == 0, out.stdout + out.stderr


def replay(*args):
    return subprocess.run([sys.executable, "tools/replay.py", *args], capture_output=True, text=True, check=False, timeout=120)


def test_demo_on_the_standard_library():
    out = replay("--seconds", "1", "--procs", "2", "--size", "8M", "--json")
    assert out.returncode == 0, out.stderr
    report = json.loads(out.stdout)
    assert report["wrong_values"] == 0
    assert report["verify"] == []
    assert 0.3 < report["hit_ratio"] < 1
    assert report["evictions"] > 0


def test_demo_on_a_trace(tmp_path):
    import gzip

    path = tmp_path / "trace.csv.gz"
    with gzip.open(path, "wt") as f:
        f.write("time_s,key,key_size,value_size,op,ttl\n")
        f.writelines(f"0,{i * i % 997},16,{i * i % 997 % 50},get,0\n" for i in range(20_000))
    out = replay("--trace", str(path), "--procs", "3", "--size", "4M", "--json")
    report = json.loads(out.stdout)
    assert (report["requests"], report["wrong_values"]) == (20_000, 0)
    assert report["hit_ratio"] == pytest.approx(report["lru_hit_ratio"]), "all fit: both miss the first requests only"
    assert "exact LRU" in replay("--trace", str(path), "--size", "4M").stdout


def test_demo_says_what_is_wrong_with_its_input(tmp_path):
    bad = tmp_path / "bad.gz"
    bad.write_bytes(b"no gzip")
    for args in (("--trace", str(bad)), ("--trace", str(tmp_path / "none")), ("--size", "1K", "--seconds", "1"), ("--procs", "0")):
        out = replay(*args)
        assert out.returncode == 2
        assert out.stderr.startswith("demo: ")
        assert out.stderr.count("\n") == 1


def test_demo_cleans_up_after_ctrl_c(name):
    p = subprocess.Popen([sys.executable, "tools/replay.py", "--seconds", "60", "--procs", "2", "--name", name], stderr=subprocess.PIPE)
    while True:
        try:
            cache = shmcache.attach(name)
            break
        except errors.ShmcacheError:
            assert p.poll() is None
            signal.sigtimedwait([], 0.02)
    while cache.counters()["sets"] == 0:
        signal.sigtimedwait([], 0.02)
    workers = [w["pid"] for w in cache.stats()["processes"] if w["pid"] not in (p.pid, os.getpid())]
    cache.close()
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=30)
    assert p.returncode == 130, err
    with pytest.raises(errors.SegmentNotFound):
        shmcache.attach(name)
    assert workers
    assert not any(os.path.exists(f"/proc/{w}") for w in workers)


def site_demo(*args, **kwargs):
    return subprocess.run([sys.executable, "tools/site_demo.py", *args], capture_output=True, text=True, check=False, timeout=120, **kwargs)


@pytest.mark.slow
def test_site_demo_survives_a_killed_worker_and_a_reload():
    pytest.importorskip("gunicorn", reason="the site demo needs gunicorn")
    out = site_demo("--seconds", "12", "--workers", "2", "--size", "4M", "--json")  # enough requests on a slow machine, too
    assert out.returncode == 0, out.stderr
    r = json.loads(out.stdout)
    assert r["verify"] == []
    assert r["without"]["hit_ratio"] == 0
    assert r["without"]["requests"] > 0
    assert r["reloaded"]["hit_ratio"] > 0.3
    assert r["evictions"] > 0, "4 MB do not hold all pages"
    assert len(r["hit_ratio_by_worker"]) >= 3, "two workers, and whoever came after the kill and the reload"
    assert str(r["killed_pid"]) in r["hit_ratio_by_worker"]


def test_site_demo_refuses_what_it_cannot_do():
    pytest.importorskip("gunicorn", reason="the site demo needs gunicorn")
    for args in (("--workers", "0"), ("--seconds", "0"), ("--size", "1K")):
        out = site_demo(*args)
        assert out.returncode == 2
        assert out.stderr.startswith("demo: ")


@pytest.mark.slow
def test_site_demo_cleans_up_after_ctrl_c(name):
    pytest.importorskip("gunicorn", reason="the site demo needs gunicorn")
    p = subprocess.Popen([sys.executable, "tools/site_demo.py", "--seconds", "60", "--workers", "2", "--name", name], stderr=subprocess.PIPE, text=True)
    while "asking" not in p.stderr.readline():
        assert p.poll() is None
    children = [c.pid for c in psutil.Process(p.pid).children(recursive=True)]
    assert len(children) >= 3  # gunicorn, its workers, the supervisor
    p.send_signal(signal.SIGINT)
    assert p.wait(60) == 130
    p.stderr.close()
    with pytest.raises(shmcache.SegmentNotFound):
        shmcache.attach(name)
    assert not any(psutil.pid_exists(c) for c in children)


def test_close_in_another_thread_crashes_nobody(make):
    """A codec runs Python in the middle of a read and a write: the segment must stay mapped under it."""
    code = """
import os, threading, shmcache, sys
name = sys.argv[1]
class Closer:
    def __reduce__(self):
        return (close, ())
def close():
    cache.close()
    return 1
for call in (lambda: cache.get('k'), lambda: cache.pop('k'), lambda: cache.get_many(['k', 'k']), lambda: cache.set('k', Encloser())):
    cache = shmcache.attach(name, codec='pickle')
    class Encloser:
        def __reduce__(self):
            cache.close()
            return (int, ())
    cache.set('k', Closer())
    try:
        call()
    except shmcache.UsageError as e:
        assert 'closed' in str(e), e
print('alive')
"""
    cache = make()
    out = subprocess.run([sys.executable, "-c", code, cache.name], capture_output=True, text=True, check=False)
    assert out.stdout == "alive\n", (out.returncode, out.stderr)


def test_close_while_threads_work(name, make):
    make()
    for _ in range(20):
        cache = shmcache.attach(name)
        started = threading.Barrier(4)

        def work(cache=cache, started=started):
            started.wait()
            try:
                while True:
                    cache.set("k", (1, 2))
                    cache.get("k")
                    cache.incr("n", default=0)
            except errors.CacheClosed:
                pass

        threads = [threading.Thread(target=work) for _ in range(3)]
        for t in threads:
            t.start()
        started.wait()
        cache.close()
        for t in threads:
            t.join(30)
            assert not t.is_alive()


def test_only_a_long_copy_leaves_the_gil(make):
    """The interpreter is told not to switch threads by itself, so another one runs during a call only if that lets it."""
    cache = make("512M", max_value="100M")
    short, long = os.urandom(1 << 20), os.urandom(64 << 20)
    turns, done = 0, False

    def other():
        nonlocal turns
        while not done:
            turns += 1
            time.sleep(0)  # gives the GIL away

    def let_run(call):
        before = turns
        call()
        return turns - before

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    thread = threading.Thread(target=other)
    thread.start()
    try:
        cache.set("short", short)
        cache.set("list", [long])
        calls = {
            "set": lambda: cache.set("long", long), "get": lambda: cache.get("long"), "get of a list": lambda: cache.get("list"),
        }  # fmt: skip
        for what, call in calls.items():
            assert any(let_run(call) for _ in range(100)), f"{what} kept the GIL"
        assert not any(let_run(lambda: (cache.set("short", short), cache.get("short"))) for _ in range(100))
    finally:
        done = True
        sys.setswitchinterval(interval)
        thread.join()
    assert cache.get("long") == long
    assert cache.get("short") == short


def test_close_during_a_long_copy(name, make):
    value = os.urandom(40 << 20)
    make("512M", max_value="100M").set("long", value)
    for turn in range(20):
        cache = shmcache.attach(name)
        started = threading.Barrier(3)
        ended: list[int] = []

        def work(cache=cache, started=started, ended=ended, turn=turn):
            started.wait()
            try:
                while True:
                    assert cache.get("long") == value
            except errors.CacheClosed:
                ended.append(turn)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for t in threads:
            t.start()
        started.wait()
        cache.close()
        for t in threads:
            t.join(60)
            assert not t.is_alive()
        assert ended == [turn, turn]
