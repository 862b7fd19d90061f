"""Standard error of a process that goes on: nobody who writes to it waits.

A pipe or terminal whose reader is slow, or does not read, makes a plain write wait for good: of a warning or a traceback as of what is said
on purpose. Here every text goes into a queue, and one thread writes them: in order, each line in one write. Whether a write would wait
cannot be asked: POLLOUT promises some room, other processes write to the same pipe, and O_NONBLOCK would be theirs, too.

    the reader is slow, or stopped    texts wait, MOST at most; then new ones are dropped, and how many is said in their place
    the reader has gone, a full disk  the text is tried again every RETRY seconds, for a pipe with a name gets another reader, a disk room
    the process ends                  what waits is written, for AT_END seconds at most (atexit, which runs after a last traceback)
    the process is killed             what the thread has not taken yet is lost: the time of a switch to it, if the stream takes it
    fork                              the child has no thread, and may end without atexit: its texts are written at once, waiting
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

MOST = 1000  # texts that wait for a reader
RETRY = 1.0  # seconds
AT_END = 2.0  # seconds


class Stderr(io.TextIOBase):
    """Args: plain: the stream in whose place this one is. Its file stays the same if `plain` is closed.
    Raises: OSError, ValueError, AttributeError: it is no open file; RuntimeError: there is no room for a thread."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, plain: TextIO) -> None:
        fd = plain.fileno()
        self.plain = plain
        self.encoding = getattr(plain, "encoding", None) or "utf-8"
        self.begun = threading.local()  # text: of a line whose end this thread has not written yet: lines of two threads are not mixed
        self.texts: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
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
        lines, newline, self.begun.text = (getattr(self.begun, "text", "") + text).rpartition("\n")
        if newline:
            self.put(lines + newline)
        return len(text)

    def flush(self) -> None:
        """The beginning of a line, too. Nobody waits until it is written."""
        text, self.begun.text = getattr(self.begun, "text", ""), ""
        if text:
            self.put(text)

    def put(self, text: str) -> bool:
        """Write it, or keep it until somebody reads. False: it was dropped, for too much waits."""
        if self.forked:
            os.write(self.fd, text.encode(self.encoding, self.errors))
            return True
        with self.counting:
            if self.texts.qsize() >= MOST:
                self.lost += 1
                return False
            self.say_lost()
            self.texts.put(text.encode(self.encoding, self.errors))
        return True

    def say_lost(self) -> None:
        if self.lost:
            lost, self.lost = self.lost, 0
            self.texts.put(f"shmcache: {lost:,} messages were dropped here: nobody read standard error\n".encode())

    def end(self) -> None:
        self.flush()
        if not self.forked:
            with self.counting:
                self.say_lost()
            self.ending.set()
            done = threading.Event()
            self.texts.put(done)
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
                text = text[os.write(self.fd, text) :]
            except BlockingIOError:  # somebody has made it so for all who share it
                select.select([], [self.fd], [], RETRY)
            except (OSError, MemoryError):
                if self.ending.wait(RETRY):
                    return


_stream: Stderr | None = None
_making = threading.Lock()


def _of(stderr: TextIO) -> Stderr | None:
    """One that nobody waits for, to the same file; None: it is no file."""
    global _stream
    if isinstance(stderr, Stderr):
        return stderr
    stream = _stream
    if stream is not None and stream.plain is stderr:
        return stream
    with _making:
        if _stream is None or _stream.plain is not stderr:
            try:
                _stream = Stderr(stderr)
            except (AttributeError, OSError, ValueError, RuntimeError):
                return None
        return _stream


def never_wait() -> None:
    """Let sys.stderr be one that nobody waits for, for the rest of this process: at the top of a command that goes on."""
    # None: closed when the interpreter started: print() would take standard output
    stream: Any = open(os.devnull, "w") if sys.stderr is None else _of(sys.stderr)  # noqa: SIM115
    if stream is not None:
        sys.stderr = stream
        sys.__stderr__ = stream  # type: ignore[misc]  # what the interpreter takes when it ends


def notice(text: str) -> bool:
    """Say it if somebody listens, in whatever process. False: it was dropped, and is to be said again if it still holds later."""
    stderr = sys.stderr
    if stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            if (stream := _of(stderr)) is not None:
                return stream.put(text + "\n")
            print(text, file=stderr, flush=True)
    return True
