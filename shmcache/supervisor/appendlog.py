"""The append log: records out of the processes' rings (core/ring.pxd) into numbered files, synced as the policy says.

    no          written as they come, synced when the kernel likes
    everysec    synced every second
    always      synced at once; a write returns when the sync that covers it is done, and all that came meanwhile shares the next one

One thread of the supervisor owns the rings' other end and the file. A snapshot asks it for a new file when it begins (what comes after is
in there or later) and for a sync when it ends (a snapshot is valid only when the log is durable up to its end).

A file on which a write or a sync has failed is finished: the kernel may have dropped what it could not write, and says so once. Another is
tried every second, and again all that the log says is said in it. What was collected and not yet taken as drained is collected again, so
with `always` nothing is lost; with the others what was written and not synced may be: that is counted as a gap, and a snapshot asked for,
which heals it. While it fails, `always` refuses writers (header.log_failed_ms). The next file is begun only when there is room for some
records, not just for its first bytes: else the log would go on, admit a write and fail again, and each of those writers would wait ten
seconds. A file that was begun in vain is removed; one that the disk does not let go stays, with nothing or a HEAD in it, and the next has
the next number. That is begun only when the disk has taken a write and a sync of the former one, or each try would leave a file.

The segment says which file is the newest, and how much is in it (header.log_number, log_bytes), by which is_whole() tells later whether
anything is missing. Crash of the supervisor:
    behind a file's HEAD            the file before is the newest still, and nothing is in this one
    between the stores of name()    one of the two files has 0 bytes at least; what the one before has stands in this one's HEAD, too
    in fail()                       what has left the rings for a file that goes is a gap first, then the file before is the newest again,
                                    then it goes
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shmcache import errors
from shmcache.core import _core, _stream
from shmcache.notices import notice
from shmcache.supervisor import datadir
from shmcache.supervisor import format as fmt

if TYPE_CHECKING:
    from shmcache.cache import Cache

POLICIES = {name: number for number, name in enumerate(_core.POLICIES)}  # header.log_policy
FILE_BYTES = 256 << 20  # of a file, after which the next is begun
SYNC_EVERY = 1.0  # seconds
IDLE = 0.02  # seconds between two looks at the rings if nobody rings
RETRY = 1.0  # seconds between two tries to begin a file
ROOM = 1 << 20  # bytes that the disk must have before a log that could not be written goes on


class AppendLog:
    """Args: policy: "no", "everysec" or "always". on_gap: called when a snapshot is needed. open_file: for tests with a disk of their own.
    whole: False: what is there already is a gap (is_whole).
    One whose first file cannot be begun has failed, and goes on as any other.
    Raises: UsageError: the segment has no rings; ForeignDataDir; StripeBusy: it cannot be adopted (datadir.py); NewerFormat, OSError: the
    directory cannot be read.
    """

    def __init__(
        self, cache: Cache, folder: Path, policy: str, on_gap: Callable[[], None] = lambda: None, compress: bool = False,
        open_file: Callable[[Path], Any] = lambda path: os.fdopen(datadir.create(path), "wb", buffering=0), whole: bool = True,
    ) -> None:
        self.cache, self.folder, self.policy, self.on_gap = cache, folder, policy, on_gap
        self.compress, self.open_file = compress, open_file
        self.drain = _stream.Drain(cache)
        self.base_epoch = max(1, int(cache.segment.header["restored_epoch"]))  # what was cleared before it was said in the log before it
        self.epoch = self.base_epoch  # the newest that is in the log
        self.gaps = int(cache.segment.header["log_healed"])  # operations missing that are said in the log, or in a snapshot
        self.synced_gaps = self.gaps  # that are said on the disk
        self.unsynced = False
        self.syncing: Sync | None = None
        self.synced_at = time.monotonic()
        self.failed = self.failure_said = False
        self.retry_at = 0.0
        self.former = 0, 0  # header.log_number and log_bytes before this file was begun
        self.left: Path | None = None  # a file that was begun in vain, and that the disk did not let go
        self.stopping = False
        self.end = threading.Event()
        self.wishes: list[tuple[bool, threading.Event]] = []  # (a new file, done)
        self.lock = threading.Lock()
        self.file: Any = None
        self.writer: fmt.Writer
        datadir.check_owner(folder, cache.name)
        datadir.adopt(cache, folder)
        for _, path in fmt.listing(folder)[1][-1:]:  # what the one before has written must not be lost behind what is synced from now on
            with contextlib.suppress(errors.DamagedFile):  # it is no file
                datadir.sync_file(path)
        self.number = datadir.last_log_number(folder)
        if not whole:  # said when nothing refuses it any more, and before the first file
            _stream.count_gap(cache)
        try:
            self.begin_file()
        except OSError as e:
            self.fail(e)
        else:
            mark(cache, log_failed_ms=0)
        mark(cache, log_policy=POLICIES[policy], log_epoch=self.base_epoch)
        self.header: Any = cache.views(writable=True).header  # for what is stored in each turn
        self.thread = threading.Thread(target=self.run, name="log", daemon=True)
        self.thread.start()

    # -- for the supervisor's other threads

    def rotate(self) -> int:
        """Begin a new file: its number. What is appended from now on is in it or in a later one. Raises: LogFull."""
        self.wish(True)
        return self.number

    def sync(self) -> None:
        """What was appended so far is on the disk. Raises: LogFull."""
        self.wish(False)

    def wish(self, new_file: bool) -> None:
        wish = new_file, threading.Event()
        with self.lock:
            self.wishes.append(wish)
        while not wish[1].wait(1.0):
            if self.failed or not self.thread.is_alive():
                with self.lock, contextlib.suppress(ValueError):  # or a file would be begun for each of them when there is room
                    self.wishes.remove(wish)
                raise errors.LogFull("the log cannot be written: look at the supervisor's output")

    def close(self) -> None:
        """Take over and sync what is in the rings, and end. The policy stays: writers wait for the next supervisor, as far as they wait."""
        self.stopping = True
        self.end.set()
        self.thread.join()
        self.header = None
        if self.file is not None:
            self.file.close()

    # -- the thread

    def run(self) -> None:
        while True:
            stopping = self.stopping
            moved = False
            try:
                if self.file is None:
                    self.begin_file_again()
                else:
                    moved = self.turn()
            except (OSError, errors.StripeBusy) as e:
                self.fail(e)
            if stopping and (self.failed or not self.drain.more):
                return
            if self.file is None:
                self.end.wait(RETRY)  # not on the bell: writers ring it all the time
            elif not moved:
                self.drain.sleep(IDLE)
            elif self.policy != "always" and not self.drain.more:  # with it they wait for each record
                self.drain.pace(IDLE)

    def turn(self) -> bool:
        """Take over what there is: was there any?"""
        with self.lock:
            wishes, self.wishes = self.wishes, []
        try:
            epoch = self.drain.epoch
            got = self.drain.collect()
            if got:
                with memoryview(self.drain) as payload:
                    self.writer.records(payload)
            if epoch != self.epoch:
                self.writer.records(fmt.pack_record(fmt.CLEAR, version=0, epoch=epoch))
                self.epoch = epoch
                self.unsynced = True
            gaps = self.drain.gaps
            if gaps != self.gaps:  # a restore is not to pretend that it has everything
                self.writer.records(fmt.pack_record(fmt.GAP, version=gaps - self.gaps))
                self.gaps = gaps
                self.unsynced = True
                self.on_gap()
            self.unsynced = self.unsynced or got
            if got and self.policy != "always":
                self.say_bytes()
                self.drain.drained()
            due = time.monotonic() - self.synced_at >= SYNC_EVERY
            self.end_sync(wait=self.stopping)
            if self.failed or (self.unsynced and (self.policy == "always" or self.stopping)):
                self.sync_now()
            elif self.unsynced and self.policy == "everysec" and due and self.syncing is None:
                self.begin_sync()
            while wishes and not self.drain.more:
                new_file, done = wishes[-1]
                self.sync_now()
                if new_file:
                    self.begin_file()
                wishes.pop()  # if that failed it is tried again
                done.set()
            if self.writer.bytes_written > FILE_BYTES:
                self.sync_now()
                self.begin_file()
        finally:
            with self.lock:
                self.wishes += wishes
        return got

    def sync_now(self) -> None:
        self.end_sync()
        self.begin_sync(beside=False)
        self.end_sync()
        self.drain.drained()

    def begin_sync(self, beside: bool = True) -> None:
        """beside: in a thread of its own, while the rings are drained: it may take as long as they take to fill."""
        self.drain.begin_sync()
        self.unsynced = False
        self.synced_at = time.monotonic()
        self.syncing = Sync(self.file.fileno(), self.writer.bytes_written, self.epoch, self.gaps)
        self.syncing.start() if beside else self.syncing.run()

    def end_sync(self, wait: bool = True) -> None:
        """Take note of the sync that was begun, if it is over. Raises: OSError, what it failed with."""
        sync = self.syncing
        if sync is None or (sync.is_alive() and not wait):
            return
        self.syncing = None
        try:
            sync.finish()
        except OSError:
            self.unsynced = True
            raise
        self.writer.synced(sync.n_bytes)
        self.say_bytes()
        self.drain.durable()
        self.synced_gaps = sync.gaps
        mark(self.cache, log_epoch=sync.epoch)
        if self.failed:
            self.failed = False
            mark(self.cache, log_failed_ms=0)
            notice(f"shmcache: the log of {self.cache.name} goes on in {fmt.log_name(self.number)}")
            self.on_gap()

    def begin_file(self) -> None:
        """The next file, which outlives a power cut from now on."""
        if self.file is not None:
            self.end_sync()
            self.writer.records(b"")  # says that what is before it was synced: damage there is no torn end
            os.fsync(self.file.fileno())
        datadir.note_first(self.cache, self.folder)
        header = self.cache.segment.header
        former = int(header["log_number"]), int(header["log_bytes"])
        del header  # or the handle cannot be closed while an exception holds this frame
        number = self.number + 1
        while True:
            path = self.folder / fmt.log_name(number)
            try:
                file = self.open_file(path)
                break
            except FileExistsError:  # begun when the disk failed, which then did not let it go: there is no record in it
                if path == self.left:
                    try_disk(path)
                number += 1
        try:
            if self.failed:
                os.posix_fallocate(file.fileno(), 0, ROOM)
                os.ftruncate(file.fileno(), 0)
            gaps = int(self.cache.segment.header["log_gaps"])
            head = {
                "name": self.cache.name, "created_ms": int(time.time() * 1000), "number": number,
                "segment_created_ms": int(self.cache.segment.header["created_ms"]), "settings": self.cache.mapping.settings(),
                "newest": int(self.cache.segment.stripes["seq"].max()), "epoch": int(self.cache.segment.header["epoch"]),
                "log_gaps": gaps, "file": identity(file.fileno()),
                "former": former,
            }  # fmt: skip
            writer = fmt.Writer(file, "log", head, compress=self.compress)
            if gaps != self.gaps:  # on the disk with HEAD: a restore behind a power cut is not to pretend that it has everything
                writer.records(fmt.pack_record(fmt.GAP, version=gaps - self.gaps))
            os.fsync(file.fileno())
            writer.synced()
            datadir.sync_folder(self.folder)
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
            self.let_go(path)
            raise
        if self.file is not None:
            self.file.close()
        self.file, self.writer, self.number, self.former = file, writer, number, former
        self.name(number, writer.bytes_written)
        if gaps != self.gaps:
            self.gaps = gaps
            if not self.failed:  # else this file goes if it fails, too, and what it says
                self.synced_gaps = gaps
            self.on_gap()

    def name(self, number: int, n_bytes: int) -> None:
        """The newest file, and how much it has at least."""
        mark(self.cache, log_bytes=0)
        mark(self.cache, log_number=number)
        mark(self.cache, log_bytes=n_bytes)

    def say_bytes(self) -> None:
        """Before anything leaves the rings, or is acknowledged: the file has it, and no older copy of the file does."""
        self.header["log_bytes"] = self.writer.bytes_written

    def let_go(self, path: Path) -> None:
        """Remove a file in which there is no record, if the disk does."""
        try:
            path.unlink()
        except OSError:
            self.left = path

    def begin_file_again(self) -> None:
        if time.monotonic() >= self.retry_at:
            self.retry_at = time.monotonic() + RETRY
            self.begin_file()

    def fail(self, error: Exception) -> None:
        """This file is finished. With always nothing of it was promised but what is synced; else a snapshot has to heal it."""
        if self.syncing is not None:
            with contextlib.suppress(OSError):
                self.syncing.finish()
            self.syncing, self.unsynced = None, True
        if self.file is not None and self.policy != "always" and self.unsynced:
            _stream.count_gap(self.cache)  # at once: killed here, nobody else knows
        if not self.failed:
            mark(self.cache, log_failed_ms=int(time.time() * 1000))
            self.failure_said = False
        if not self.failure_said:
            self.failure_said = notice(f"shmcache: the log of {self.cache.name} cannot be written: {error}")
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()
            self.file = None
            if self.failed:  # nothing has got into it that is not said to be missing
                self.name(*self.former)
                self.let_go(self.folder / fmt.log_name(self.number))
                self.number -= 1
        self.failed = True
        self.unsynced = False
        self.epoch, self.gaps = self.base_epoch, self.synced_gaps
        self.drain.rewind()
        self.retry_at = time.monotonic() + RETRY


def try_disk(path: Path) -> None:
    """Does the disk take what is written? It is written into this file, whose content is nothing. Raises: OSError: no."""
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.write(fd, fmt.preamble("log"))
        os.fsync(fd)
    finally:
        os.close(fd)


def is_whole(cache: Cache, folder: Path) -> bool:
    """Would a log that is begun in this directory, with what is there and in the rings, have all that was ever written?"""
    header = cache.segment.header
    if not int(header["log_policy"]):  # nothing is in the rings; what is written before it is logged, however soon, will not be
        return False
    life = datadir.life(cache)
    number = int(header["log_number"])
    if not number:  # nobody has emptied the rings yet
        return not int(header["restored_seq"]) or datadir.has_what_it_was_restored_from(cache, folder)
    # else it is whole if it went on here, and nothing was missed since: neither here nor because it went on elsewhere. The newest file is
    # there, and each has all that has left the rings: a copy may lack what came since, also one that was put back in a file's place. Behind
    # the newest is at most what was begun in vain
    logs = [(n, path, head) for n, path in fmt.listing(folder)[1] if (head := datadir.head(path, "log"))]
    own = [(n, path, head) for n, path, head in logs if datadir.life_of(head) == life]
    has = {number: int(header["log_bytes"])}
    for n, _, head in own:
        former, n_bytes = head.get("former", (0, 0))
        if former < n:  # else it was in another directory
            has[former] = max(has.get(former, 0), n_bytes)
    gaps = int(header["log_gaps"])
    went_on = [(head.get("log_gaps"), head.get("file")) == (gaps, identity(path)) for n, path, head in own if n == number]
    return (
        went_on == [True]
        and all(path.stat().st_size >= has.get(n, 0) for n, path, _ in own)
        and not any(n > number for n, _, head in logs if datadir.life_of(head) != life)
    )


def identity(file: int | Path) -> list[int]:
    """Of a file, which a copy of it does not have: as long as the file system is mounted."""
    found = os.stat(file)
    return [found.st_dev, found.st_ino]


class Sync(threading.Thread):
    """One fsync: of what the file has now, n_bytes up to this epoch, and so many gaps. start() or run() it; finish() when it is wanted."""

    def __init__(self, fd: int, n_bytes: int = 0, epoch: int = 0, gaps: int = 0) -> None:
        super().__init__(name="sync", daemon=True)
        self.fd, self.n_bytes, self.epoch, self.gaps = fd, n_bytes, epoch, gaps
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            os.fsync(self.fd)
        except OSError as e:
            self.error = e

    def finish(self) -> None:
        """Wait for it, if it was started. Raises: OSError, what it failed with."""
        if self.ident is not None:
            self.join()
        if self.error is not None:
            raise self.error


def mark(cache: Cache, **words: int) -> None:
    """Store words of the header. No view of it is kept: the handle may be closed while an exception still holds the caller's frame."""
    header = cache.views(writable=True).header
    for name, value in words.items():
        header[name] = value
