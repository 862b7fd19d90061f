"""Snapshots: written while everybody works, found again, and put into a new segment that workers may use meanwhile.

    take()      a data directory, for one process at a time
    write()     core/_stream.Walk -> format.Writer -> a temporary file, fsync, rename, fsync of the directory; the last few are kept
    restore()   the newest file that is whole -> a new segment -> core/_stream.Restore

Crash at any line of write(): the temporary file is no snapshot, and the next write removes it; once renamed it is whole. The rename
may be lost with the power until the directory is synced, as if nothing had been written. Crash in restore(): core/_stream.pyx.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shmcache import cache as cache_module
from shmcache import errors
from shmcache.core import _stream
from shmcache.segment import check_name as segment_path
from shmcache.supervisor import format as fmt

if TYPE_CHECKING:
    from shmcache.cache import Cache

KEEP = 2  # snapshots
BLOCK_BYTES = 1 << 20
SYNC_BYTES = 64 << 20  # written between two fsyncs: what the last one has to wait for stays small
SHARE = 0.15  # of a core, that a throttled snapshot takes
NICE = 10  # of the thread that writes a throttled one
LOCK_NAME = "lock"
VERSIONS_AHEAD = 1 << 40  # no stripe has so many writes between two snapshots

Progress = Callable[[int, int], None]  # (done, of so many), in stripes or bytes


def _nobody(done: int, total: int) -> None:
    pass


@contextlib.contextmanager
def take(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A data directory for this process alone; made if it is not there. Let go when the block or the process ends.

    Raises: DataDirInUse; OSError: it cannot be made or written.
    """
    path = Path(folder)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise errors.DataDirInUse(f"{path} is used by another process: give each segment a data directory of its own") from None
        yield path
    finally:
        os.close(fd)


# ---- writing ------------------------------------------------------------------------------------------------------------------------


class _Throttle:
    """Sleeps so that its thread takes no more than SHARE of a core."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop
        self.began, self.used = time.monotonic(), time.thread_time()

    def pause(self) -> None:
        owed = (time.thread_time() - self.used) / SHARE - (time.monotonic() - self.began)
        if owed > 0.001:
            self.stop.wait(owed)


def write(
    cache: Cache, folder: Path, *, keep: int = KEEP, compress: bool = False, throttled: bool = False, stop: threading.Event | None = None,
    progress: Progress = _nobody,
) -> dict[str, Any]:
    """Write a snapshot of a segment into a directory that was taken.

    Args: keep: so many of the newest are left. compress: with zstd. throttled: within SHARE of a core, for a thread beside workers that
    want both; stop: set by another thread, ends it.
    Returns: {"path", "number", "items", "bytes", "seconds", "damaged"} (damaged: values left out since their pages are not their own).
    Raises: UsageError: the segment is being restored; ForeignDataDir; SnapshotStopped; InvalidConfig: no zstandard; StripeBusy; OSError:
    the file cannot be written. Then nothing but a temporary file is left, if that.
    """
    began, began_ms = time.monotonic(), int(time.time() * 1000)
    stop = stop or threading.Event()
    if cache.durability()["restoring"]:
        raise errors.UsageError(f"the segment {cache.name!r} is being restored, or that was killed: complete it (restore) first")
    try:
        report = _write(cache, folder, keep, compress, _Throttle(stop) if throttled else None, stop, progress)
    except errors.SnapshotStopped:
        raise
    except BaseException:
        mark(cache, snapshot_failed_ms=began_ms)
        raise
    mark(cache, snapshot_ms=began_ms, snapshot_failed_ms=0)
    return {**report, "seconds": time.monotonic() - began}


def mark(cache: Cache, **words: int) -> None:
    """Store words of the header. No view of it is kept: the handle may be closed while an exception still holds the caller's frame."""
    header = cache.views(writable=True).header
    for name, value in words.items():
        header[name] = value


def _write(
    cache: Cache, folder: Path, keep: int, compress: bool, throttle: _Throttle | None, stop: threading.Event, progress: Progress
) -> dict[str, Any]:
    check_owner(folder, cache.name)
    for left in folder.glob("snapshot-*.shmcache.tmp"):
        left.unlink(missing_ok=True)
    snapshots, _ = fmt.listing(folder)
    number = snapshots[-1][0] + 1 if snapshots else 1
    path = folder / fmt.snapshot_name(number)
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb", buffering=0) as file:
            walk, size_bytes = _write_file(cache, file, compress, throttle, stop, progress)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the next snapshot removes it
            temporary.unlink()
        raise
    sync_folder(folder)
    for old in _superseded(cache, [path for _, path in snapshots], keep - 1):
        old.unlink(missing_ok=True)
    return {"path": str(path), "number": number, "items": walk.items, "bytes": size_bytes, "damaged": walk.damaged}


def _superseded(cache: Cache, earlier: list[Path], keep: int) -> list[Path]:
    """Of earlier snapshots, oldest first, those that may go. A segment that was not restored does not know what was in those before it:
    theirs stay."""
    if not int(cache.segment.header["restored_seq"]):
        earlier = [path for path in earlier if _created_ms(path) == int(cache.segment.header["created_ms"])]
    return earlier[: max(0, len(earlier) - keep)]


def is_of(name: str, folder: Path) -> bool:
    """Is the newest readable snapshot there of the live segment, or was that one restored?"""
    created = [ms for _, path in fmt.listing(folder)[0] if (ms := _created_ms(path)) is not None]
    with cache_module.attach(name) as cache:
        return not created or created[-1] == int(cache.segment.header["created_ms"]) or int(cache.segment.header["restored_seq"]) > 0


def _created_ms(path: Path) -> int | None:
    """Of the segment that a snapshot is of."""
    with contextlib.suppress(errors.DamagedFile, errors.NewerFormat), fmt.Reader(path, "snapshot") as reader:
        return reader.head.get("segment_created_ms")
    return None


def _write_file(
    cache: Cache, file: Any, compress: bool, throttle: _Throttle | None, stop: threading.Event, progress: Progress
) -> tuple[_stream.Walk, int]:
    object_ = os.stat(segment_path(cache.name))
    head = {
        "name": cache.name, "host": socket.gethostname(), "created_ms": int(time.time() * 1000),
        "segment_created_ms": int(cache.segment.header["created_ms"]), "settings": cache.mapping.settings(),
        "mode": object_.st_mode & 0o777, "group": object_.st_gid, "newest": int(cache.segment.stripes["seq"].max()),
    }  # fmt: skip
    writer = fmt.Writer(file, "snapshot", head, compress=compress)
    walk = _stream.Walk(cache, BLOCK_BYTES)
    synced = 0
    while walk.block():
        with memoryview(walk) as payload:
            writer.records(payload)
        if writer.bytes_written - synced >= SYNC_BYTES:
            os.fsync(file.fileno())
            synced = writer.bytes_written
        progress(walk.stripe, walk.n_stripes)
        if throttle:
            throttle.pause()
        if stop.is_set():
            raise errors.SnapshotStopped("the snapshot was stopped before it was whole; the one before it is kept")
    epoch = int(cache.segment.header["epoch"])  # now: what was cleared during the walk is cleared
    writer.end({"items": walk.items, "n_stripes": walk.n_stripes, "floors": walk.floors, "newest": walk.newest, "epoch": epoch})
    os.fsync(file.fileno())
    progress(walk.n_stripes, walk.n_stripes)
    return walk, writer.bytes_written


def sync_folder(folder: Path) -> None:
    """What was renamed or made in it outlives a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_owner(folder: Path, name: str) -> None:
    """Raises: ForeignDataDir if the newest readable snapshot there is of a segment of another name."""
    snapshots, _ = fmt.listing(folder)
    for _, path in reversed(snapshots):
        with contextlib.suppress(errors.DamagedFile, errors.NewerFormat), fmt.Reader(path, "snapshot") as reader:
            owner = reader.head.get("name")
            if owner != name:
                raise errors.ForeignDataDir(f"{folder} holds snapshots of the segment {owner!r}, not {name!r}: use another directory")
            return


# ---- reading ------------------------------------------------------------------------------------------------------------------------


class Found:
    """A snapshot file. Raises: DamagedFile, NewerFormat, OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with fmt.Reader(path, "snapshot") as reader:
            head, self.size_bytes = reader.head, reader.size_bytes
        try:
            self.newest, self.created_ms, self.settings = int(head["newest"]), int(head["created_ms"]), dict(head["settings"])
            self.mode, self.group = int(head["mode"]), int(head["group"])
        except (KeyError, TypeError, ValueError) as e:
            raise errors.DamagedFile(str(path), 0, f"HEAD lacks what a snapshot's has ({type(e).__name__}: {e})") from None

    def check(self, each: Callable[[memoryview], None] = lambda payload: None, progress: Progress = _nobody) -> Found:
        """Read it through, each RECORDS block to `each`: self, with items and epoch of its END. Raises: DamagedFile, OSError."""
        with fmt.Reader(self.path, "snapshot") as reader:
            for offset, payload in reader.blocks():
                each(payload)
                progress(offset, reader.size_bytes)
            end = reader.end or {}
        try:
            self.items, self.epoch = int(end["items"]), int(end["epoch"])
        except (KeyError, TypeError, ValueError) as e:
            raise errors.DamagedFile(str(self.path), 0, f"END lacks what a snapshot's has ({type(e).__name__}: {e})") from None
        return self


def find(folder: Path) -> tuple[list[Found], list[str]]:
    """The snapshots of a directory whose beginning is sound, newest first; and what is wrong with others. Raises: NewerFormat, OSError."""
    found, damaged = [], []
    for _, path in reversed(fmt.listing(folder)[0]):
        try:
            found.append(Found(path))
        except errors.DamagedFile as e:
            damaged.append(str(e))
    return found, damaged


def restore(name: str, folder: Path, *, progress: Progress = _nobody, **options: Any) -> dict[str, Any]:
    """Create the segment and put the newest whole snapshot of a directory that was taken into it. Workers can use it from the first moment.
    A segment whose restore was killed is completed.

    Args: options: of create(); those that are not given are as they were when the snapshot was written.
    Returns: {"snapshot", "items", "stored", "present", "expired", "dropped", "seconds", "clock_back_s", "cleared", "damaged" (newer files
    that are not whole)}.
    Raises: NoSnapshot: none is whole; the segment, if it was created, is empty then. ForeignDataDir, NewerFormat; SegmentExists and the
    rest of create(); StripeBusy, OSError.
    """
    began = time.monotonic()
    check_owner(folder, name)
    candidates, damaged = find(folder)
    if not candidates:
        raise errors.NoSnapshot(_none_whole(folder, damaged))
    with _create_or_complete(name, candidates, options) as cache:
        into = _stream.Restore(cache)
        for found in candidates:
            try:
                # namespaces first: who needs one while it is absent would begin a new one
                found.check(lambda payload: into.put(payload, generations=True), progress)
                break
            except errors.DamagedFile as e:
                damaged.append(str(e))
        else:
            into.finish()
            raise errors.NoSnapshot(_none_whole(folder, damaged) + f"\nthe segment {name!r} was created, and is empty")
        into.generations_done()
        # if the wall clock was set back since, lives do not become longer than they were
        clock_back_ms = max(0, found.created_ms - int(time.time() * 1000))
        # into less memory than they came from: the hottest first, as long as there is room
        smaller = memoryview(cache.mapping).nbytes < found.settings["size_bytes"]
        heats = (3, 2, 1, 0) if smaller else (-1,)
        for turn, heat in enumerate(heats):
            with fmt.Reader(found.path, "snapshot") as reader:
                for offset, payload in reader.blocks():
                    into.put(payload, clock_back_ms, heat, found.epoch)
                    progress(turn * reader.size_bytes + offset, len(heats) * reader.size_bytes)
                    if into.cleared or (smaller and into.full):
                        break
            if into.cleared or (smaller and into.full):
                break
        into.finish()
        return {
            "snapshot": str(found.path), "items": found.items, "stored": into.stored, "present": into.present, "expired": into.expired,
            "dropped": max(0, found.items - into.stored - into.present - into.expired), "seconds": time.monotonic() - began,
            "clock_back_s": clock_back_ms / 1000, "cleared": into.cleared, "damaged": damaged,
        }  # fmt: skip


def _none_whole(folder: Path, damaged: list[str]) -> str:
    return f"no whole snapshot in {folder}" + "".join(f"\n  {line}" for line in damaged)


def _create_or_complete(name: str, candidates: list[Found], options: dict[str, Any]) -> Cache:
    """The segment, live before the files are read through: a worker that begins meanwhile is to find this one, not to create its own."""
    newest = candidates[0]
    # above every version that was given out before, also after the snapshot: clients may still hold one for cas()
    restored_seq = max(found.newest for found in candidates) + VERSIONS_AHEAD
    was = {"mode": newest.mode, **({"group": newest.group} if newest.group != os.getegid() else {})}
    try:
        return cache_module.create_restored(name, restored_seq, newest.settings, **{**was, **options})
    except errors.SegmentExists:
        cache = cache_module.attach(name)
        if not cache.durability()["restoring"]:
            cache.close()
            raise
        return cache
