"""Nobody reads standard error: the processes that go on go on, and end. An operator's command waits."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import shmcache
from shmcache import errors
from shmcache.sidecar import serve as serve_module
from shmcache.sidecar.bus import Hub
from shmcache.supervisor import appendlog, loop, writeback
from shmcache.supervisor import format as fmt
from shmcache.supervisor.appendlog import AppendLog
from shmcache.supervisor.loop import Supervisor
from tests.integration.service import LIMIT, until

SUPERVISE = [sys.executable, "-m", "shmcache.cli", "supervise"]
RUN = "import sys; from shmcache import cli; sys.exit(cli.main(sys.argv[1:]))"


def fill(fd, piece=4096):
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(fd, b"x" * piece):
            pass
    os.set_blocking(fd, True)


@contextlib.contextmanager
def unread(kind):
    """(reader, writer) of a stream of which nobody reads."""
    reader, writer = pty.openpty() if "pty" in kind else os.pipe()
    try:
        fill(writer, 1 if "pty" in kind else 4096)
        if "some room" in kind:
            os.read(reader, 4096)
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def everything(reader, got=b""):
    """What is read until all writers have closed it."""
    while piece := os.read(reader, 1 << 16):
        got += piece
    return got.lstrip(b"x").decode()


@pytest.fixture(params=["pipe", "pty"])
def stuck(request):
    with unread(request.param) as (_, writer):
        yield writer


@contextlib.contextmanager
def process(argv, stderr, **more):
    with subprocess.Popen([str(word) for word in argv], stderr=stderr, **more) as it:
        try:
            yield it
        finally:
            it.kill()


def supervised_by(name):
    with contextlib.suppress(shmcache.SegmentNotFound, errors.BeingRestored), shmcache.attach(name, wait=False) as cache:
        state = cache.supervisor()
        return state["pid"] if state["alive"] else None
    return None


# ---- commands --------------------------------------------------------------------------------------------------------------------------


def test_a_warning_at_the_start_holds_up_nothing(make, stuck):
    cache = make("16M")
    with process([*SUPERVISE, cache.name, "--size", "32M"], stuck) as it:
        until(lambda: supervised_by(cache.name) == it.pid)
        it.terminate()
        assert it.wait(LIMIT) == 0


def test_a_warning_within_a_restore_keeps_nobody_out(name, tmp_path, stuck):
    argv = ["supervise", name, "--size", "16M", "--data-dir", tmp_path / "data", "--log", "always"]
    with process([sys.executable, "-c", RUN, *argv], subprocess.DEVNULL):
        until(lambda: supervised_by(name))
        with shmcache.attach(name) as cache:
            cache.set("k", 1)
    shmcache.unlink(name)
    refuses = f"""
from shmcache import segment

class Core:
    def __getattr__(self, name):
        return getattr(core, name)

    def format_segment(self, *args):
        core.format_segment(*args)
        return {errno.EINVAL}  # as of a kernel before 6.1

core, segment._core = segment._core, Core()
"""
    with process([sys.executable, "-c", refuses + RUN, *argv, "--huge-pages"], stuck) as it:
        until(lambda: supervised_by(name) == it.pid)
        with shmcache.attach(name, wait=False) as cache:
            assert cache.get("k") == 1
        it.terminate()
        assert it.wait(LIMIT) == 0


@pytest.mark.parametrize("argv, code", [(["supervise"], 2), (["serve", "--port", "0"], 2), (["supervise", "NAME"], 1)])
def test_an_error_ends_it(name, stuck, argv, code):
    with process([sys.executable, "-c", RUN, *(name if word == "NAME" else word for word in argv)], stuck) as it:
        assert it.wait(LIMIT) == code


def test_a_thread_that_dies_is_seen(name, tmp_path, stuck):
    dies = """
from shmcache.supervisor import appendlog

def turn(self):
    raise MemoryError

appendlog.AppendLog.turn = turn
"""
    argv = ["supervise", name, "--size", "16M", "--data-dir", tmp_path / "data", "--log", "always"]
    with process([sys.executable, "-c", dies + RUN, *argv], stuck) as it:
        assert it.wait(LIMIT) == 1


def children(pid):
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found[int(child)] = Path(f"/proc/{child}/cmdline").read_bytes()
    return [child for child, argv in found.items() if b"supervise" in argv]


def test_a_service_starts_its_supervisor_again(name, tmp_path):
    """While another holds the segment, those that it starts end with an error."""
    argv = [sys.executable, "-m", "shmcache.cli", "serve", name, "--size", "16M", "--port", "0", "--unix", tmp_path / "socket"]
    reader, writer = os.pipe()
    try:
        with process(argv, writer) as service:
            assert os.read(reader, 100).startswith(b"serving")
            first = supervised_by(name)
            fill(writer)
            service.send_signal(signal.SIGSTOP)
            os.kill(first, signal.SIGKILL)
            with process([*SUPERVISE, name], subprocess.DEVNULL) as other:
                until(lambda: supervised_by(name) == other.pid)
                service.send_signal(signal.SIGCONT)
                refused = until(lambda: set(children(service.pid)) - {first}).pop()
                until(lambda: refused not in children(service.pid))
            until(lambda: supervised_by(name) in children(service.pid))
            service.terminate()
            assert service.wait(LIMIT) == 0
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("argv, code", [(["NAME"], 1), (["NAME", "--size", "16M"], 0)])
def test_a_closed_standard_error_is_not_standard_output(name, argv, code):
    command = [*SUPERVISE, *(name if word == "NAME" else word for word in argv)]
    with process(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], None, stdout=subprocess.PIPE) as it:
        if code == 0:
            until(lambda: supervised_by(name) == it.pid)
            it.terminate()
        assert it.stdout.read() == b""
        assert it.wait(LIMIT) == code


def test_an_operators_command_waits_until_it_is_read(name, tmp_path):
    data = tmp_path / "data"
    with process([*SUPERVISE, name, "--size", "16M", "--data-dir", data, "--log", "always"], subprocess.DEVNULL):
        until(lambda: supervised_by(name))
        with shmcache.attach(name) as cache:
            cache.set("k", 1)
    shmcache.unlink(name)
    with open(fmt.listing(data)[1][-1][1], "ab") as file:
        file.write(b"a torn end")
    reader, writer = os.pipe()
    fill(writer)
    admin = [sys.executable, "-c", "import sys; from shmcache import cli; sys.exit(cli.admin(sys.argv[1:]))"]
    with process([*admin, "restore", name, "--data-dir", data], writer, stdout=subprocess.DEVNULL) as it:
        os.close(writer)
        until(lambda: it.poll() is not None or is_restored(name))  # then it has something to say
        assert "cut at byte" in everything(reader)
        assert it.wait(LIMIT) == 0
    os.close(reader)


def is_restored(name):
    with contextlib.suppress(shmcache.SegmentNotFound, errors.BeingRestored), shmcache.attach(name, wait=False) as cache:
        return not cache.durability()["restoring"]
    return False


@pytest.fixture
def service_of():
    """service_of(name, its supervisor) -> a Service as run() leaves it, when it ends its children: told by a signal when one has ended."""
    wake_r, wake_w = os.pipe2(os.O_NONBLOCK)
    handler, woken = signal.signal(signal.SIGCHLD, lambda *args: None), signal.set_wakeup_fd(wake_w)

    def service(name, supervisor):
        made = serve_module.Service(name, [])
        made.hub, made.wake = Hub({}), wake_r
        made.children = [serve_module.Child("the supervisor", process=supervisor)]
        return made

    yield service
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, handler)
    os.close(wake_r)
    os.close(wake_w)


def test_the_wait_for_a_supervisor_that_does_not_end_has_a_limit(name, service_of, monkeypatch):
    """It does not hold the segment: nothing is lost with it."""
    monkeypatch.setattr(serve_module, "STOP_LIMIT", 0.1)
    hangs = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; while :; do sleep 1; done"], stdout=subprocess.PIPE)
    with hangs:
        hangs.stdout.read(1)
        service = service_of(name, hangs)
        ends = threading.Thread(target=service.end_all, daemon=True)
        ends.start()
        ends.join(LIMIT)
        was_hanging = ends.is_alive()
        hangs.kill()
        ends.join()
    assert not was_hanging


def test_a_supervisor_that_holds_the_segment_is_waited_for(make, service_of, monkeypatch):
    """Its last snapshot may take long."""
    cache, looks = make("16M"), []
    monkeypatch.setattr(serve_module, "STOP_LIMIT", 0.1)
    supervises = serve_module.Service.supervises
    monkeypatch.setattr(serve_module.Service, "supervises", lambda self, child: looks.append(1) or supervises(self, child), raising=False)
    with process([*SUPERVISE, cache.name], subprocess.DEVNULL) as it:
        until(lambda: supervised_by(cache.name) == it.pid)
        it.send_signal(signal.SIGSTOP)
        service = service_of(cache.name, it)
        ends = threading.Thread(target=service.end_all, daemon=True)
        ends.start()
        try:
            until(lambda: len(looks) >= 3)
        finally:
            monkeypatch.setattr(serve_module, "STOP_LIMIT", LIMIT)
            it.send_signal(signal.SIGCONT)
            ends.join(LIMIT)
        assert it.returncode == 0


SLOW_ROWS = """
import time

class Store:
    ordered = True

    def load_many(self, keys, *, timeout=None):
        return {{}}

    def store_many(self, items, *, timeout=None, versions=None):
        for key in items:
            time.sleep(0.02)  # a database that is slow
            with open({path!r}, "ab") as saved:
                saved.write(key + b"\\n")
        return {{}}

    def delete_many(self, keys, *, timeout=None, versions=None):
        return {{}}

    def close(self):
        pass

store = Store
"""


def test_a_supervisor_whose_segment_was_unlinked_stores_what_waits(name, service_of, tmp_path, monkeypatch):
    """It is waited for: it was seen to hold the segment."""
    monkeypatch.setattr(serve_module, "STOP_LIMIT", 0.2)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "slow_rows.py").write_text(SLOW_ROWS.format(path=str(tmp_path / "saved")))
    (tmp_path / "saved").touch()
    arguments = [name, "--quiet", "--size", "16M", "--policy", "back", "--store", "slow_rows:store"]
    with process([*SUPERVISE, *arguments], subprocess.DEVNULL) as it:
        until(lambda: supervised_by(name) == it.pid)
        service = service_of(name, it)
        assert service.supervises(service.children[0])
        with shmcache.attach(name) as cache:
            for i in range(100):
                cache.set(b"%d" % i, i)
        shmcache.unlink(name)
        service.end_all()
        assert it.returncode == 0
    assert len(set((tmp_path / "saved").read_text().split())) == 100


# ---- the stream ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [100, 5000])
@pytest.mark.parametrize("kind", ["pipe", "pipe with some room", "pty", "pty with some room"])
def test_what_nobody_reads_keeps_nobody(kind, length):
    """Eight threads of each of two processes, on one stream."""
    code = f"""
import threading
from shmcache import notices
notices.never_wait()

def go():
    for _ in range(300):
        notices.notice("x" * {length})

threads = [threading.Thread(target=go) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
"""
    with unread(kind) as (_, writer), process([sys.executable, "-c", code], writer) as one, process([sys.executable, "-c", code], writer) as two:
        assert (one.wait(LIMIT), two.wait(LIMIT)) == (0, 0)


def said(code, code_of_exit=0, reads_late=False):
    """What a process that never waits says. reads_late: it is read when all is said, and the process ends behind that."""
    reader, writer = os.pipe()
    code = f"from shmcache import notices\nnotices.never_wait()\nimport os, sys, threading, warnings\n{code}\nprint('said', flush=True)"
    code += "\nsys.stdin.read()" if reads_late else ""
    with process([sys.executable, "-c", code], writer, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as it:
        os.close(writer)
        if reads_late:
            assert it.stdout.readline() == b"said\n"
        got = b""
        if reads_late:  # it ends when some is read
            got = os.read(reader, 1)
            it.stdin.close()
        got = everything(reader, got)
        assert it.wait(LIMIT) == code_of_exit
    os.close(reader)
    return got


def test_what_is_read_late_is_all_there_and_in_order():
    text = "y" * 1000
    got = said(f"for i in range(500): notices.notice(f'{{i}} {text}') if i % 2 else print(i, {text!r}, file=sys.stderr)", reads_late=True)
    assert got == "".join(f"{i} {text}\n" for i in range(500))


def test_a_reader_hears_of_what_was_dropped():
    """Where it was: some may find room again between those that do not."""
    lines = said("for i in range(5000): notices.notice(f'{i} ' + 'y' * 1000)", reads_late=True).splitlines()
    heard, dropped = 0, []
    for line in lines:
        if line.startswith("shmcache: "):
            dropped.append(int(line.split()[1].replace(",", "")))
            assert line.split()[2:5] == ["messages", "were", "dropped"]
        else:
            assert line.split()[0] == str(heard + sum(dropped))
            heard += 1
    assert heard >= 1000
    assert heard + sum(dropped) == 5000
    assert dropped


def test_the_last_line_is_a_traceback():
    got = said("warnings.warn('first')\nthread = threading.Thread(target=lambda: 1 / 0)\nthread.start()\nthread.join()\nraise ValueError('last')", 1)
    assert "first" in got
    assert got.index("first") < got.index("ZeroDivisionError") < got.index("ValueError: last")
    assert got.endswith("ValueError: last\n")


def test_lines_of_threads_are_whole():
    code = """
def go(letter):
    for _ in range(100):
        print(letter * 50, letter * 50, file=sys.stderr)
threads = [threading.Thread(target=go, args=(letter,)) for letter in "abcdefgh"]
[t.start() for t in threads]
[t.join() for t in threads]
sys.stderr.write("the end")
"""
    *lines, last = said(code).splitlines()
    assert sorted(lines) == sorted(f"{letter * 50} {letter * 50}" for letter in "abcdefgh" for _ in range(100))
    assert last == "the end"


def test_a_forked_child_says_it_before_it_ends():
    code = """
warnings.simplefilter("ignore")  # that threads run, and a child may hang
if not (pid := os.fork()):
    print("a child", file=sys.stderr)
    os._exit(0)
os.waitpid(pid, 0)
print("its parent", file=sys.stderr)
"""
    assert said(code) == "a child\nits parent\n"


def test_a_child_of_a_process_that_nobody_reads_does_not_wait_either():
    code = """
import os, sys
from shmcache import notices
notices.never_wait()
notices.notice("the parent")
if not (pid := os.fork()):
    print("a child", file=sys.stderr)
    os._exit(7)
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    with unread("pipe") as (_, writer), process([sys.executable, "-c", code], writer) as it:
        assert it.wait(LIMIT) == 7


def test_a_slow_reader_gets_the_last_line(monkeypatch):
    reader, writer = os.pipe()
    code = "from shmcache import notices\nnotices.AT_END = 1.0\nnotices.never_wait()\nfor i in range(300): notices.notice('y' * 1000)\nraise ValueError('last')"
    got = b""
    with process([sys.executable, "-c", code], writer) as it:
        os.close(writer)
        while part := os.read(reader, 32768):
            got += part
            time.sleep(0.3)  # ten of these are longer than it waits for nothing
        assert it.wait(LIMIT) == 1
    os.close(reader)
    assert got.endswith(b"ValueError: last\n")


def test_what_waits_is_bounded_however_long_the_texts_are():
    assert said("for i in range(50): notices.notice('y' * 1_000_000)", reads_late=True).count("\n") <= 4


def test_standard_error_of_another_program_stays_its_own(tmp_path):
    """No thread, no descriptor, no file that was taken for it."""
    code = f"""
import os, sys, threading
from shmcache import notices
files = [open({str(tmp_path / "a")!r}, "w"), open({str(tmp_path / "b")!r}, "w")]
was = len(os.listdir("/proc/self/fd"))
for i in range(100):
    sys.stderr = files[i & 1]
    assert notices.notice(str(i))
assert threading.active_count() == 1 and len(os.listdir("/proc/self/fd")) == was
sys.stderr = sys.__stderr__
print("ended", notices.notice("nobody reads this"))
"""
    with unread("pipe") as (_, writer), process([sys.executable, "-c", code], writer, stdout=subprocess.PIPE) as it:
        assert it.stdout.read() == b"ended False\n"
        assert it.wait(LIMIT) == 0
    assert (tmp_path / "a").read_text().split() == [str(i) for i in range(0, 100, 2)]


def test_a_pipe_with_a_name_may_get_another_reader(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tmp_path / "fifo", os.O_WRONLY)
    os.close(reader)
    code = "import sys; from shmcache import notices; notices.never_wait(); notices.notice('heard'); print(flush=True); sys.stdin.read()"
    with process([sys.executable, "-c", code], writer, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as it:
        assert it.stdout.read(1)
        reader = os.open(tmp_path / "fifo", os.O_RDONLY)
        assert select.select([reader], [], [], LIMIT)[0]
        assert os.read(reader, 100) == b"heard\n"
        it.stdin.close()
        assert it.wait(LIMIT) == 0
    os.close(reader)
    os.close(writer)


# ---- what was dropped is said again --------------------------------------------------------------------------------------------------------


class Listener:
    """In place of notice(): it takes a text at the third call."""

    def __init__(self):
        self.heard = []
        self.calls = 0

    def __call__(self, text):
        self.calls += 1
        if self.calls >= 3:
            self.heard.append(text)
        return self.calls >= 3


def test_why_there_is_no_snapshot_is_said_until_it_is_heard(make, tmp_path, monkeypatch):
    listener = Listener()
    monkeypatch.setattr(loop, "notice", listener)
    supervisor = Supervisor(make("16M"), folder=tmp_path)
    try:
        monkeypatch.setattr(loop.snapshot, "write", lambda *args, **more: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        for _ in range(5):
            supervisor.write()
    finally:
        supervisor.close()
    assert len(listener.heard) == 1 and "broken" in listener.heard[0]


def test_that_the_log_fails_is_said_until_it_is_heard(make, tmp_path, monkeypatch):
    listener = Listener()
    cache = make("16M", log_buffer="64K", max_processes=16)
    monkeypatch.setattr(appendlog, "RETRY", 0.01)
    monkeypatch.setattr(appendlog, "notice", listener)
    tries = []

    def broken(path):
        tries.append(path)
        raise OSError(errno.EIO, "broken")

    log = AppendLog(cache, tmp_path, "everysec", open_file=broken)
    try:
        until(lambda: len(tries) > 5)
    finally:
        log.close()
    assert len(listener.heard) == 1 and "broken" in listener.heard[0]


def test_that_the_store_fails_is_said_until_it_is_heard(make, tmp_path, monkeypatch):
    listener = Listener()
    monkeypatch.setattr(writeback, "notice", listener)
    monkeypatch.setattr(writeback, "AT_END", 0.0)

    store = shmcache.SQLStore(f"sqlite:///{tmp_path / 'db'}", "items")
    monkeypatch.setattr(store, "store_many", lambda *args, **more: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    cache = make("16M", policy="back", store=store)
    cache.set("k", 1)
    back = writeback.WriteBack(cache, store)
    try:
        for _ in range(5):
            back.tried()
    finally:
        back.stop()
        store.close()
    assert sum("broken" in text for text in listener.heard) == 1
