"""Standard error of a process that goes on: no writer waits for its reader.

A pipe or terminal whose reader is slow, or does not read, makes a plain write wait for good: of a warning or a traceback as of what is said
on purpose. Here every text goes into a queue, and one thread writes them: in order, each line in one write. Whether a write would wait
cannot be asked: POLLOUT promises some room, other processes write to the same pipe, and O_NONBLOCK would be theirs, too.

    the reader is slow, or stopped    texts wait, MOST at most; then new ones are dropped, and how many is said in their place
    the reader has gone, a full disk  the text is tried again every RETRY seconds, for a pipe with a name gets another reader, a disk room
    the process ends                  what waits is written, until nothing is read for AT_END (atexit, which runs after a last traceback)
    the process is killed             what the thread has not taken yet is lost: the time of a switch to it, if the stream takes it
    fork                              the child has no thread, and may end without atexit: its texts are written at once, if there is room
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import queue
import select
import signal
import sys
import threading
from typing import Any, TextIO

MOST = 1 << 20  # bytes that wait for a reader
LONGEST = 1 << 16  # characters of a line whose end has not come
RETRY = 1.0  # seconds
AT_END = 2.0  # seconds without a byte read


class Stderr(io.TextIOBase):
    """Args: plain: the stream in whose place this one is. Its file stays the same if `plain` is closed.
    Raises: OSError, ValueError, AttributeError: it is no open file; RuntimeError: there is no room for a thread."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, plain: TextIO) -> None:
        fd = plain.fileno()
        self.encoding = getattr(plain, "encoding", None) or "utf-8"
        self.begun = threading.local()  # text: of a line whose end this thread has not written yet: lines of two threads are not mixed
        self.texts: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self.put_bytes = self.written = 0  # of all texts; the second by the thread
        self.lost = 0  # texts, since one was kept
        self.counting = threading.RLock()  # of those who write, never of the thread; a signal handler may write in the middle
        self.ending = threading.Event()
        self.forked = False
        self.fd = os.dup(fd)
        try:
            threading.Thread(target=self.run, name="stderr", daemon=True).start()
        except BaseException:
            os.close(self.fd)
            raise
        atexit.register(self.end)
        os.register_at_fork(after_in_child=self.note_fork)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.fd

    def isatty(self) -> bool:
        return os.isatty(self.fd)

    def write(self, text: str, /) -> int:
        begun, self.begun.text = getattr(self.begun, "text", ""), ""  # out first: a signal handler may write in the middle
        lines, newline, rest = (begun + text).rpartition("\n")
        if newline:
            self.put(lines + newline)
        if len(rest) > LONGEST:
            self.put(rest)
        else:
            self.begun.text = rest
        return len(text)

    def flush(self) -> None:
        """The beginning of a line, too. Nobody waits until it is written."""
        text, self.begun.text = getattr(self.begun, "text", ""), ""
        if text:
            self.put(text)

    def put(self, text: str) -> bool:
        """Write it, or keep it until somebody reads. False: it was dropped, for too much waits."""
        data = text.encode(self.encoding, self.errors)
        if self.forked:
            return takes(self.fd) and os.write(self.fd, data) > 0
        with self.counting:
            if self.put_bytes - self.written > MOST:
                self.lost += 1
                return False
            self.say_lost()
            self.keep(data)
        return True

    def keep(self, data: bytes) -> None:
        self.put_bytes += len(data)
        self.texts.put(data)

    def say_lost(self) -> None:
        if self.lost:
            lost, self.lost = self.lost, 0
            self.keep(f"shmcache: {lost:,} messages were dropped here: nobody read standard error\n".encode())

    def end(self) -> None:
        self.flush()
        if not self.forked:
            with self.counting:
                self.say_lost()
            self.ending.set()
            done = threading.Event()
            self.texts.put(done)
            written = -1
            while not done.is_set() and written != self.written:  # for a reader that reads
                written = self.written
                done.wait(AT_END)

    def note_fork(self) -> None:
        self.forked = True

    # -- the thread

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's; and no SIGTTOU of a terminal
        while True:
            text = self.texts.get()
            if isinstance(text, threading.Event):
                text.set()
            else:
                self.write_out(text)

    def write_out(self, text: bytes) -> None:
        while text:
            try:
                n = os.write(self.fd, text)
            except BlockingIOError:  # somebody has made it so for all who share it
                takes(self.fd, RETRY)
            except (OSError, MemoryError):
                if self.ending.wait(RETRY):
                    self.written += len(text)
                    return
            else:
                self.written += n
                text = text[n:]


def never_wait() -> None:
    """Let sys.stderr be one that nobody waits for, for the rest of this process: at the top of a command that goes on."""
    stream: Any = sys.stderr
    if stream is None:  # closed when the interpreter started: print() would take standard output
        stream = open(os.devnull, "w")  # noqa: SIM115
    elif not isinstance(stream, Stderr):
        try:
            stream = Stderr(stream)
        except (AttributeError, OSError, ValueError, RuntimeError):  # it is no file, or there is no room for a thread
            return
    sys.stderr = stream
    sys.__stderr__ = stream  # type: ignore[misc]  # what the interpreter takes when it ends


def notice(text: str) -> bool:
    """Say it if somebody listens. False: it was dropped, and is to be said again if it still holds later.

    In a program that has not called never_wait() standard error is the program's: it is asked whether it takes anything, and written to.
    """
    stderr = sys.stderr
    if isinstance(stderr, Stderr):
        return stderr.put(text + "\n")
    if stderr is None:
        return True
    try:
        if not takes(stderr.fileno()):
            return False
    except (AttributeError, OSError, ValueError):  # it is no file
        pass
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stderr, flush=True)
    return True


def takes(fd: int, seconds: float = 0.0) -> bool:
    """Would it take some bytes, or refuse them: at once, or within so many seconds?"""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))
