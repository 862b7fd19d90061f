"""Snapshots: written while everybody works, found again, and put into a new segment that workers may use meanwhile.

    write()     core/_stream.Walk -> format.Writer -> a temporary file, fsync, rename, fsync of the directory; the last few are kept
    restore()   the newest file that is whole, and the log since -> a new segment -> core/_stream.Restore

Versions: files of one restore can be of several lives of the segment. Each life begins above all that those before it may have given out
(_begin, _settle; datadir.GivenOut), and what is added to a version to get its row's, header.version_base, is one number for all of them: so
whatever file an item comes from, of two records the later one has the higher version, and a row that was stored later has a higher one than
the item. Files of lives with another base are of another segment in the same directory, or of a time when each life had its own: their
versions are put in relation to the segment's.
    life 2 begins, no file of it is written, life 3     both begin above the same files: the second above what datadir.GivenOut notes, too
    the clock was set back                              above the files and GivenOut all the same
    it was not                                          at the clock: above what any life gave out, also one of which nothing is left here
    versions were raised (writeback.py)                 above what stands in the records read, and above GivenOut

A restore that may still be refused is nobody's: until what workers need first is in, nobody attaches (segment.attach), no thread or fork
child of the restorer either. The name is held meanwhile, or a worker that starts would create an empty segment.
    refused, or fails before     the segment is unlinked; who waited for it finds none
    killed before that           it stays, and nobody gets in: the next restore begins again, with its own files, in a segment of its own
    fails or killed after it     it stays, with what workers wrote; run again, it is completed

One process restores a segment: it holds the lock (Mapping.begin_restore) from before the segment has its name until it is settled, or has
none. So what is in an uncertain segment is of one restore, and so of one data directory. Race table:
    two begin, there is no segment      the name decides; the later is refused (BeingRestored), and leaves the other's segment alone
    one begins beside another           refused; also in another thread of that process
    two begin, the former was killed    the lock decides; the other looks again, at what has the name then
    one begins, another was refused, or has completed it       it has the lock, of what has no name or is whole: it looks again
    a worker attaches meanwhile         uncertain, and the lock free: its restorer has ended. A living one lets go of it when the segment is
                                        settled or has no name, so the worker looks at both once more (_core.unsettled)
    begins again vs a worker            segment.create
Crash at any line: the lock is free at once.

Crash at any line of write(): the temporary file is no snapshot, and the next write removes it; once renamed it is whole. The rename
may be lost with the power until the directory is synced, as if nothing had been written. Crash in restore(): core/_stream.pyx.

Rotation lets a file go only if what is in it is known to be in the live segment, and so in the snapshot that was just written:
    snapshot of the live segment         goes in its turn
    of a life that is in it (datadir)    in its turn, if it is whole: else it was passed over at the restore
    of any other                         stays, and is said
    snapshot that cannot be read         stays, and is said
    log file of the live segment         goes when no snapshot before which it was begun is left, of those that count; but not the newest
                                         that is written to, if it is logged: by that the next log knows that nothing is missing
    of a life that is in it              the same, if no snapshot stays that may need it
    of any other                         stays, and is said
    log file that cannot be read         stays, and is said
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shmcache import cache as cache_module
from shmcache import errors, segment
from shmcache.core import _stream
from shmcache.supervisor import datadir
from shmcache.supervisor import format as fmt
from shmcache.supervisor.appendlog import AppendLog, Sync, mark

if TYPE_CHECKING:
    from shmcache.cache import Cache

KEEP = 2  # snapshots
BLOCK_BYTES = 1 << 20
SYNC_BYTES = 64 << 20  # written between two fsyncs
SHARE = 0.15  # of a core, that a throttled snapshot takes
NICE = 10  # of the thread that writes a throttled one,
NICE_UNTHROTTLED = 2  # and of a process that does nothing else: workers keep what a plain writer of files would leave them
EPOCHS_AHEAD = 1 << 16  # no segment is cleared so often within one log file
EPOCHS = 1 << 32  # that there are: of 65,535 restores one behind the other, or as many clears
VERSIONS_AHEAD = 1 << 40  # no stripe has so many writes in a life: where no row has a version, and nobody notes what was given out

Progress = Callable[[int, int], None]  # (done, of so many), in stripes or bytes


def _nobody(done: int, total: int) -> None:
    pass


def step_back(nice: int) -> None:
    """Let this thread, from here on, have less of the processors than the workers that want them. It never gets more than it had."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, max(nice, os.getpriority(os.PRIO_PROCESS, thread)))


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
    progress: Progress = _nobody, log: AppendLog | None = None,
) -> dict[str, Any]:
    """Write a snapshot of a segment into a directory that was taken. log: the segment's, if it has one: what it had before goes.

    Args: keep: so many of the newest are left. compress: with zstd. throttled: within SHARE of a core, for a thread beside workers that
    want both; stop: set by another thread, ends it.
    Returns: {"path", "number", "items", "bytes", "seconds", "damaged"} (damaged: values left out since their pages are not their own).
    Raises: UsageError: the segment is being restored; ForeignDataDir, NewerFormat; SnapshotStopped; InvalidConfig: no zstandard;
    StripeBusy; OSError: the file cannot be written. Then nothing but a temporary file is left, if that.
    """
    began, began_ms = time.monotonic(), int(time.time() * 1000)
    stop = stop or threading.Event()
    if cache.durability()["restoring"]:
        raise errors.UsageError(f"the segment {cache.name!r} is being restored, or that was killed: complete it (restore) first")
    mark(cache, snapshot_begun_ms=began_ms)
    try:
        gaps = int(cache.segment.header["log_gaps"])
        report = _write(cache, folder, keep, compress, _Throttle(stop) if throttled else None, stop, progress, log)
    except errors.SnapshotStopped:
        raise
    except BaseException:
        mark(cache, snapshot_failed_ms=began_ms)
        raise
    finally:
        mark(cache, snapshot_begun_ms=0)
    mark(cache, snapshot_ms=began_ms, snapshot_failed_ms=0)
    if log or not int(cache.segment.header["log_policy"]):  # else it is not where the log is
        mark(cache, log_healed=gaps)
    return {**report, "seconds": time.monotonic() - began}


def _write(
    cache: Cache, folder: Path, keep: int, compress: bool, throttle: _Throttle | None, stop: threading.Event, progress: Progress,
    log: AppendLog | None,
) -> dict[str, Any]:
    datadir.check_owner(folder, cache.name)
    datadir.adopt(cache, folder)
    datadir.note_first(cache, folder)
    snapshots, logs = fmt.listing(folder)
    for left in folder.glob("snapshot-*.shmcache.tmp"):
        if fmt.number_of(left.stem, "snapshot") is not None and left.is_file():
            left.unlink(missing_ok=True)
    number = snapshots[-1][0] + 1 if snapshots else 1
    log_from = log.rotate() if log else datadir.last_log_number(folder) + 1
    path = folder / fmt.snapshot_name(number)
    temporary = path.with_name(path.name + ".tmp")
    fd = datadir.create(temporary)
    try:
        with os.fdopen(fd, "wb", buffering=0) as file:
            walk, size_bytes = _write_file(cache, file, compress, throttle, stop, progress, log, log_from)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the next snapshot removes it
            temporary.unlink()
        raise
    datadir.sync_folder(folder)
    kept: list[str] = []
    with contextlib.suppress(errors.SnapshotStopped):  # the next one rotates
        kept = _rotate(cache, folder, snapshots, logs, keep - 1, log_from, throttle, stop)
    return {"path": str(path), "number": number, "items": walk.items, "bytes": size_bytes, "damaged": walk.damaged, "kept": kept}


def _rotate(
    cache: Cache, folder: Path, snapshots: list[tuple[int, Path]], logs: list[tuple[int, Path]], keep: int, log_from: int,
    throttle: _Throttle | None, stop: threading.Event,
) -> list[str]:
    """Let go what was there before a snapshot that needs the log from log_from on, but for the newest `keep` snapshots: why others stay,
    which cannot be read, or are of other lives. Raises: SnapshotStopped: something may be left that is to go; OSError."""
    mine, needed, faults = datadir.life(cache), log_from, []
    noted: dict[int, set[int]] = {}
    try:
        noted = datadir.lives(folder)
    except (errors.DamagedFile, errors.NewerFormat) as e:
        faults.append(str(e))
    known = noted.get(mine, set()) | {mine}
    newest = int(cache.segment.header["log_number"]) if int(cache.segment.header["log_policy"]) else 0
    staying: set[int | None] = set()  # lives of snapshots that stay; None: of any
    for _, path in reversed(snapshots):
        head = datadir.head(path, "snapshot")
        life = datadir.life_of(head)
        if life != mine:
            fault = _fault(path, throttle, stop) or ("" if life in known else _of_another(path, cache.name))
            if fault:
                faults.append(fault)
                staying.add(life)
                continue
        if keep > 0:
            keep -= 1
            needed = min(needed, int(head.get("log_from", 0)))
        else:
            path.unlink(missing_ok=True)
    for number, path in logs:
        if number < needed:
            try:
                with fmt.Reader(path, "log") as reader:
                    life, nothing = datadir.life_of(reader.head), reader.torn == 0
            except (errors.DamagedFile, errors.NewerFormat, OSError) as e:
                faults.append(str(e))
                continue
            if nothing or life == mine:
                if not newest or number < newest:
                    path.unlink(missing_ok=True)
            elif life not in known:
                faults.append(_of_another(path, cache.name))
            elif not staying or (life in noted and None not in staying and not staying & (noted[life] | {life})):
                path.unlink(missing_ok=True)
    return faults


def _of_another(path: Path, name: str) -> str:
    return (
        f"{path} is of another segment {name!r}, and this one was not restored from it here. To have it back: end all, unlink the segment, "
        "move the later snapshots and logs out of the directory, and start the supervisor first. Else remove it"
    )


_faults: dict[tuple[str, int, int, int], str] = {}  # a file's path, inode, size and time of its last change -> what _fault said


def _fault(path: Path, throttle: _Throttle | None, stop: threading.Event) -> str:
    """What is wrong with a snapshot that is read through; nothing if it is whole. Once, as long as the file stays as it is."""

    def progress(done: int, total: int) -> None:
        if throttle:
            throttle.pause()
        if stop.is_set():
            raise errors.SnapshotStopped("the rotation was stopped")

    try:
        is_now = path.stat()
        key = (str(path), is_now.st_ino, is_now.st_size, is_now.st_mtime_ns)
        if key not in _faults:
            try:
                Found(path).check(progress=progress)
                _faults[key] = ""
            except (errors.DamagedFile, errors.NewerFormat) as e:
                _faults[key] = str(e)
        return _faults[key]
    except OSError as e:
        return str(e)


def _write_file(
    cache: Cache, file: Any, compress: bool, throttle: _Throttle | None, stop: threading.Event, progress: Progress, log: AppendLog | None,
    log_from: int,
) -> tuple[_stream.Walk, int]:
    object_ = os.stat(segment.check_name(cache.name))
    head = {
        "name": cache.name, "host": socket.gethostname(), "created_ms": int(time.time() * 1000),
        "segment_created_ms": int(cache.segment.header["created_ms"]), "settings": cache.mapping.settings(),
        "mode": object_.st_mode & 0o777, "group": object_.st_gid, "newest": int(cache.segment.stripes["seq"].max()),
        "epoch": int(cache.segment.header["epoch"]), "log_from": log_from, "logged": log is not None,
    }  # fmt: skip
    writer = fmt.Writer(file, "snapshot", head, compress=compress)
    walk = _stream.Walk(cache, BLOCK_BYTES, copies=False)
    synced, sync = 0, Sync(file.fileno())
    try:
        while True:  # its last line is no condition: DECISIONS.md of the package, "No loop that ends in a condition"
            if stop.is_set():
                raise errors.SnapshotStopped("the snapshot was stopped before it was whole; the one before it is kept")
            if not walk.block():
                break
            with memoryview(walk) as payload:
                writer.records(payload)
            if writer.bytes_written - synced >= SYNC_BYTES:
                sync.finish()
                sync = Sync(file.fileno())
                sync.start()  # beside the walk: what the last one has to wait for stays small
                synced = writer.bytes_written
            if throttle:
                throttle.pause()
            progress(walk.stripe, walk.n_stripes)
    finally:
        if sync.ident is not None:
            sync.join()  # the file is closed next
    if log:
        log.sync()  # what the copy shows is durable, or a restore would have it and not what came before it in other keys
    epoch = int(cache.segment.header["epoch"])  # now: what was cleared during the walk is cleared
    sync.finish()
    writer.end({"items": walk.items, "n_stripes": walk.n_stripes, "floors": walk.floors, "newest": walk.newest, "epoch": epoch})
    os.fsync(file.fileno())
    progress(walk.n_stripes, walk.n_stripes)
    return walk, writer.bytes_written


# ---- reading ------------------------------------------------------------------------------------------------------------------------


class Found:
    """A snapshot file. Raises: DamagedFile, NewerFormat, OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with fmt.Reader(path, "snapshot") as reader:
            head, self.size_bytes = reader.head, reader.size_bytes
        self.newest, self.created_ms, self.settings, self.head_epoch = datadir.of_head(path, head)
        self.life = datadir.life_of(head)
        self.base = datadir.base_of(path, self.settings)
        self.ahead = 0  # of the segment's base: relate()
        try:
            self.mode, self.group = int(head["mode"]), int(head["group"])
            self.log_from, self.logged = int(head["log_from"]), bool(head["logged"])
        except (KeyError, TypeError, ValueError) as e:
            raise errors.DamagedFile(str(path), 0, f"HEAD lacks what a snapshot's has ({type(e).__name__}: {e})") from None

    def check(self, each: Callable[[memoryview], None] = lambda payload: None, progress: Progress = _nobody) -> Found:
        """Read it through, each RECORDS block to `each`: self, with items, epoch and floors of its END. Raises: DamagedFile, OSError."""
        with fmt.Reader(self.path, "snapshot") as reader:
            for offset, payload in reader.blocks():
                each(payload)
                progress(offset, reader.size_bytes)
            end = reader.end or {}
        try:
            self.items, self.epoch, self.floors = int(end["items"]), int(end["epoch"]), bytes(end["floors"])
            self.newest = max(self.newest, int(end["newest"]))
        except (KeyError, TypeError, ValueError) as e:
            raise errors.DamagedFile(str(self.path), 0, f"END lacks what a snapshot's has ({type(e).__name__}: {e})") from None
        return self


def relate(cache: Cache, path: Path, base: int) -> int:
    """What is added to the versions of a file with this base. Raises: ForeignDataDir."""
    own = int(cache.segment.header["version_base"])
    if base < own:
        raise errors.ForeignDataDir(
            f"{path} is not of those from which {cache.name!r} was begun to be restored: unlink the segment, and restore it again"
        )
    return base - own


def find(folder: Path) -> tuple[list[Found], list[str]]:
    """The snapshots of a directory whose beginning is sound, newest first; and what is wrong with others. Raises: NewerFormat, OSError."""
    found, damaged = [], []
    for _, path in reversed(fmt.listing(folder)[0]):
        try:
            found.append(Found(path))
        except errors.DamagedFile as e:
            damaged.append(str(e))
    return found, damaged


class Logs:
    """The log files of a directory from one on. Raises: DamagedFile: one is missing, or its beginning is damaged; NewerFormat, OSError."""

    def __init__(self, name: str, folder: Path, log_from: int, wanted: bool) -> None:
        numbered = [(number, path) for number, path in fmt.listing(folder)[1] if number >= log_from]
        self.paths = [path for _, path in numbered]
        there = {number for number, _ in numbered}
        missing = sorted(set(range(log_from, max(there, default=log_from - 1 + wanted) + 1)) - there)
        if missing:
            path = folder / fmt.log_name(missing[0])
            raise errors.DamagedFile(str(path), 0, "this log file is missing, and what is in it cannot be had from any other")
        self.cut: list[str] = []
        self.newest = self.epoch = 0  # newest: of a row's version
        self.created_ms = 0
        self.settings: dict[str, int] = {}
        self.lives: list[int | None] = []
        self.restored = False  # the life of the first file was: what it was restored from is not in these
        self.bases: dict[Path, int] = {}
        self.ahead: dict[Path, int] = {}  # of the segment's base: relate()
        for path in self.paths:
            with fmt.Reader(path, "log") as reader:
                if reader.torn == 0:
                    continue
                if reader.head.get("name") != name:
                    raise errors.ForeignDataDir(f"{path} is of the segment {reader.head.get('name')!r}, not {name!r}: move it away")
                newest, self.created_ms, self.settings, epoch = datadir.of_head(path, reader.head)
                if not self.lives:
                    self.restored = epoch >= EPOCHS_AHEAD
                self.lives.append(datadir.life_of(reader.head))
                self.bases[path] = datadir.base_of(path, self.settings)
                self.newest, self.epoch = max(self.newest, self.bases[path] + newest), max(self.epoch, epoch)

    def relate(self, cache: Cache) -> None:
        self.ahead = {path: relate(cache, path, base) for path, base in self.bases.items()}

    def blocks(self) -> Iterator[tuple[memoryview, int]]:
        """(payload, what is added to its versions) of all, in order; what is torn is left out, and named in `cut`.
        Raises: DamagedFile, OSError."""
        self.cut = []
        for path in self.paths:
            with fmt.Reader(path, "log") as reader:
                for _, payload in reader.blocks():
                    yield payload, self.ahead[path]
                if reader.torn is not None:
                    self.cut.append(f"{path}: cut at byte {reader.torn} of {reader.size_bytes}, behind the last whole block")


def restore(
    name: str, folder: Path, *, progress: Progress = _nobody, log_buffer_if_none: int | None = None, **options: Any
) -> dict[str, Any]:
    """Create the segment and put the newest whole snapshot of a directory that was taken into it, and what its log has since. Workers who
    attach wait until it is certain that this will not be refused, and can use it from then on. One whose restore was killed is completed.

    Args: options: of create(); those that are not given are as they were when the snapshot was written. log_policy: with which the
    segment is logged from the first moment. log_buffer_if_none: log_buffer, if it had none.
    Returns: {"snapshot" (None: log only), "items", "stored", "present", "expired", "dropped", "copies" (of what the store has: to be
    loaded again), "log_records", "seconds", "clock_back_s", "cleared", "damaged" (newer files that are not whole), "cut" (torn ends of log
    files), "gaps" (operations that the log lacks), "unnoted" (why it could not be noted that this was restored from there)}.
    Raises: NoSnapshot: none is whole, and there is no log from the first write on; DamagedFile: of the log, whose place is named; NoRoom:
    for what the store has not got. ForeignDataDir, NewerFormat; InvalidConfig: no zstandard; SegmentExists and the rest of create();
    StripeBusy, OSError. SegmentNotFound: somebody unlinked it meanwhile. Whatever is raised, the segment is unlinked, unless workers were
    let in already. BeingRestored: another process restores it; that is not disturbed.
    """
    began = time.monotonic()
    datadir.check_owner(folder, name)
    candidates, damaged = find(folder)
    logs = Logs(name, folder, candidates[0].log_from, candidates[0].logged) if candidates else Logs(name, folder, 1, False)
    if not candidates and (not logs.settings or (damaged and logs.restored)):
        raise errors.NoSnapshot(_none_whole(folder, damaged))
    if log_buffer_if_none and not (candidates[0].settings if candidates else logs.settings)["ring_bytes"]:
        options.setdefault("log_buffer", log_buffer_if_none)
    try:
        given = datadir.given_out(folder)
    except errors.DamagedFile as e:
        damaged.append(str(e))
        given = datadir.unsaid(folder)
    with _create_or_complete(name, folder, candidates, logs, given, options) as cache:
        try:
            report = _fill(cache, folder, candidates, logs, given, damaged, progress)
            if cache.unlinked:
                raise errors.SegmentNotFound(
                    f"somebody unlinked {name!r} while it was restored. No file was changed; what has that name now is another segment: "
                    "look at it, unlink it, and restore again"
                )
        except BaseException:  # whatever it is, memory or a disk that is full, too: nobody is to wait for what will not come
            if cache.durability()["generations_missing"]:  # nobody is in it
                with contextlib.suppress(errors.ShmcacheError, OSError):  # why it failed is to be told
                    segment.unlink_this(name, cache.mapping)
            raise
        finally:
            cache.mapping.end_restore()
    return {**report, "seconds": time.monotonic() - began}


def _fill(
    cache: Cache, folder: Path, candidates: list[Found], logs: Logs, given: datadir.GivenOut, damaged: list[str], progress: Progress
) -> dict[str, Any]:
    into = _stream.Restore(cache)
    found: Found | None = None
    for found in candidates:
        try:
            found.check(progress=progress)
            break
        except errors.DamagedFile as e:
            damaged.append(str(e))
    else:
        found = None
        if candidates:  # an earlier log is not there any more: it went when they were written
            raise errors.NoSnapshot(_none_whole(folder, damaged))
    if found is not None and found is not candidates[0]:
        logs = Logs(cache.name, folder, found.log_from, found.logged)
    logs.relate(cache)
    if found:
        found.ahead = relate(cache, found.path, found.base)
    ahead = found.ahead if found else 0
    tail = _stream.Tail(cache, found.floors if found else b"", ahead)
    for payload, more in logs.blocks():
        tail.add(payload, more)
    epoch = max(tail.epoch, found.epoch if found else 0)
    if found and tail.keys:
        found.check(lambda payload: tail.see(payload, ahead), progress)
    gaps, unnoted = tail.gaps or int(found is None and logs.restored), ""
    first = cache.durability()["generations_missing"]
    if first:
        _settle(cache, folder, max(tail.newest, found.newest + ahead if found else 0), given)
    elif not datadir.is_from(cache, folder):
        raise errors.ForeignDataDir(
            f"workers use {cache.name!r} already, and its restore was not begun from {folder}, as far as is noted: complete it from the "
            "directory from which it was begun. Or, to go on with what is in it, move the snapshots and logs out of this directory, and "
            "start the supervisor with --start-empty. Or, without what workers wrote since: end all, unlink the segment, and restore it "
            "from here"
        )
    if first or datadir.is_unnoted(cache, folder):
        more, unnoted = _note_life(cache, folder, [*([found.life] if found else []), *logs.lives])
        gaps += more
    # if the wall clock was set back since, lives do not become longer than they were
    created_ms = max(logs.created_ms, found.created_ms if found else 0)
    clock_back_ms = max(0, created_ms - int(time.time() * 1000))
    # namespaces first: who needs one while it is absent would begin a new one; and what is dirty: who loads its key would get an older row
    _put_all(into, found, logs, progress, clock_back_ms, -1, epoch, True, tail)
    if into.lost:
        raise errors.NoRoom(
            f"{into.lost:,} items that the store has not got do not fit into {memoryview(cache.mapping).nbytes:,} bytes, or are larger "
            "than its values may be: restore into a segment as large as it was (--size); the data directory is as it was"
        )
    into.generations_done()
    # into less memory than they came from: the hottest first, as long as there is room
    settings = found.settings if found else logs.settings
    smaller = memoryview(cache.mapping).nbytes < settings["size_bytes"]
    for heat in (3, 2, 1, 0) if smaller else (-1,):
        _put_all(into, found, logs, progress, clock_back_ms, heat, epoch, False, tail)
    into.finish()
    items = found.items if found else 0
    return {
        "snapshot": str(found.path) if found else None, "items": items, "stored": into.stored, "present": into.present,
        "expired": into.expired, "dropped": into.dropped, "copies": into.copies,
        "log_records": tail.records, "clock_back_s": clock_back_ms / 1000,
        "cleared": into.cleared, "damaged": damaged, "cut": logs.cut, "gaps": gaps, "unnoted": unnoted,
    }  # fmt: skip


def _put_all(
    into: _stream.Restore, found: Found | None, logs: Logs, progress: Progress, clock_back_ms: int, heat: int, epoch: int,
    generations: bool, tail: _stream.Tail,
) -> None:
    for payload, ahead in logs.blocks():
        into.put(payload, clock_back_ms, heat, epoch, generations, tail, True, ahead)
    if found is None:
        return
    with fmt.Reader(found.path, "snapshot") as reader:
        for offset, payload in reader.blocks():
            into.put(payload, clock_back_ms, heat, epoch, generations, tail, False, found.ahead)
            if into.cleared and not generations:
                break
            progress(offset, reader.size_bytes)


def _none_whole(folder: Path, damaged: list[str]) -> str:
    return f"no whole snapshot in {folder}" + "".join(f"\n  {line}" for line in damaged)


def end_restore(name: str) -> None:
    """What its files have not given yet will not come: a segment whose restore was killed goes on with what is there, if workers are in it;
    else it is unlinked. Raises: BeingRestored: another process restores it."""
    if (cache := _abandoned(name)) is None:
        return
    with cache:
        try:
            if cache.durability()["generations_missing"]:
                segment.unlink_this(name, cache.mapping)
            else:
                if int(cache.segment.header["log_policy"]):
                    _stream.count_gap(cache)  # what was restored is not in it
                _stream.Restore(cache).finish()
        finally:
            cache.mapping.end_restore()


def _abandoned(name: str) -> Cache | None:
    """The segment, if its restorer has ended and its restore has not: this process restores it from here on. None: there is none, or it is
    whole. Raises: BeingRestored: another process restores it."""
    while True:
        with contextlib.ExitStack() as stack:
            try:
                cache = stack.enter_context(cache_module.attach_unsettled(name))
            except errors.SegmentNotFound:
                return None
            if not cache.durability()["restoring"]:
                return None
            if not cache.mapping.begin_restore():
                raise errors.BeingRestored(
                    f"another process restores the segment {name!r}, maybe from another data directory: wait until it has ended, or end it"
                )
            stack.callback(cache.mapping.end_restore)
            if cache.durability()["restoring"] and not cache.unlinked:  # else its restorer has ended just now
                stack.pop_all()
                return cache


def base_of_empty(folder: Path) -> int | None:
    """version_base of a segment that starts empty in this directory: above what an earlier one has given out, whose rows are there still.
    None: the clock's. Raises: NewerFormat, OSError."""
    with contextlib.suppress(errors.DamagedFile):
        newest = datadir.given_out(folder).newest
        return max(newest, datadir.clock()) if newest else None
    return None


def _begin(folder: Path, given: datadir.GivenOut, policy: int) -> tuple[int, int]:
    """(base, highest) of a segment that is restored: what is added to its versions, and up to which row's version all are given out.

    Written back, by the clock, too: what was stored from here while this directory was not used is newer than what is restored.
    One above all, at least: 0 above the base is a segment that is not restored.
    """
    bases, highest = zip(*(datadir.given_out_of_head(path, head) for path, head in datadir.all_with_heads(folder)), strict=True)
    newest = max(given.newest, *highest)
    return min(bases), max(newest + 1, datadir.clock()) if policy == segment.WRITE_BACK else newest + VERSIONS_AHEAD


def _settle(cache: Cache, folder: Path, newest: int, given: datadir.GivenOut) -> None:
    """No version in what is restored is above `newest`: begin above all that was given out, and note that, before anybody attaches.

    Crash: what was put in has lower versions; run again, it begins where it did. No room for the note: no row gets a version of this life
    before there is (writeback.py). The next life knows of those in the files, and by the clock of the others.
    """
    base, begins = int(cache.segment.header["version_base"]), int(cache.segment.header["restored_seq"])
    ahead = 0 if cache.mapping.settings()["policy"] == segment.WRITE_BACK else VERSIONS_AHEAD
    own = datadir.life(cache)
    begins = max(begins, newest + ahead, 0 if given.segment == own else given.newest - base)  # with another directory than at first
    if base + begins >= datadir.HIGHEST:
        raise errors.DamagedFile(str(folder), 0, f"a version there is {newest}, which no segment has ever given out")
    mark(cache, restored_seq=begins)
    seq = cache.views(writable=True).stripes["seq"]
    seq[seq < begins] = begins
    given = given._replace(floor=base + begins, segment=own)
    with contextlib.suppress(OSError):
        datadir.note_given_out(folder, cache.name, given.more(base + begins))


def _note_life(cache: Cache, folder: Path, restored_from: list[int | None]) -> tuple[int, str]:
    """Of whose files this life is, in their order. A full disk is no reason to refuse: it is noted before the first file of this life.
    Returns: of how many of them it is not known that they had what the first had, so that something may be missing between; why it is not
    noted yet."""
    noted: dict[int, set[int]] = {}
    with contextlib.suppress(errors.DamagedFile):
        noted = datadir.lives(folder)
    lives = {life for life in restored_from if life is not None}
    unnoted = ""
    try:
        datadir.note_life(cache, folder, lives)
    except (OSError, errors.UnsupportedValue) as e:
        unnoted = str(e)
    return sum(life != restored_from[0] and restored_from[0] not in noted.get(life, set()) for life in lives), unnoted


def _create_or_complete(
    name: str, folder: Path, candidates: list[Found], logs: Logs, given: datadir.GivenOut, options: dict[str, Any]
) -> Cache:
    """The segment, which has its name before the files are read through: a worker that begins meanwhile is to wait for this one, not to
    create its own."""
    # above every epoch: a CLEAR that is in the log still is not to hide what comes
    epoch = max([logs.epoch, *(found.head_epoch for found in candidates)]) + EPOCHS_AHEAD
    if epoch >= EPOCHS:
        raise errors.UsageError(
            f"{folder} is of a segment that was cleared, or restored ({EPOCHS_AHEAD:,} clears each), {epoch - EPOCHS_AHEAD:,} times: "
            "there are no higher numbers, by which what is stored now would be told from what was cleared. Nothing was changed. "
            "Move the directory away to start empty"
        )
    settings = dict(candidates[0].settings if candidates else logs.settings)
    base, highest = _begin(folder, given, int(settings.get("policy", 0)))
    settings["version_base"] = base
    was: dict[str, Any] = {}
    if candidates:
        was["mode"] = candidates[0].mode
        if candidates[0].group != os.getegid():
            was["group"] = candidates[0].group
    create = functools.partial(cache_module.create_restored, name, highest - base, epoch, settings, **{**was, **options})
    cache = None
    while cache is None:
        try:
            return create()
        except errors.SegmentExists:
            cache = _abandoned(name)
            if cache is None and os.path.exists(segment.check_name(name)):
                raise
    if not cache.durability()["generations_missing"]:
        return cache
    with cache:
        try:
            return create(instead_of=cache)  # what is in it may be of other files
        finally:
            cache.mapping.end_restore()
