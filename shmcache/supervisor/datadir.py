"""A data directory: one segment's snapshots and log files, taken by one process at a time.

What a file says of itself stands in its HEAD (format.py); a file that cannot be read says nothing here, and is named by those who need it.
Such a file is never removed: nobody can tell what would go with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shmcache import cache as cache_module
from shmcache import errors
from shmcache.supervisor import format as fmt

LOCK_NAME = "lock"
VERSIONS_NAME = "versions.shmcache"
MOST_SKIPPED = 8  # ranges


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


def create(path: Path) -> int:
    """A descriptor of a new file, to write. It is for its owner alone, whatever the umask. Raises: OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd


def head(path: Path, kind: fmt.FileKind) -> dict[str, Any]:
    """Of a file; empty if it cannot be read, or is a log in which nothing is whole."""
    with contextlib.suppress(errors.DamagedFile, errors.NewerFormat, OSError), fmt.Reader(path, kind) as reader:
        return reader.head
    return {}


def heads(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """HEADs of the readable (snapshots, logs) of a directory, oldest first."""
    snapshots, logs = fmt.listing(folder)
    return [h for _, path in snapshots if (h := head(path, "snapshot"))], [h for _, path in logs if (h := head(path, "log"))]


def last_log_number(folder: Path) -> int:
    """Of the log files that are or were there: a snapshot that needs those from n on has let the earlier ones go."""
    _, logs = fmt.listing(folder)
    return max([0, *(number for number, _ in logs[-1:]), *(int(head.get("log_from", 1)) - 1 for head in heads(folder)[0])])


def check_owner(folder: Path, name: str) -> None:
    """Raises: ForeignDataDir if something readable there is of a segment of another name."""
    for head in (*heads(folder)[0], *heads(folder)[1]):
        if head and head.get("name") != name:
            raise errors.ForeignDataDir(f"{folder} holds files of the segment {head.get('name')!r}, not {name!r}: use another directory")


def is_blank(folder: Path) -> bool:
    """Is there nothing but log files in which nothing is whole, since who began them was killed, or the power went?"""
    snapshots, logs = fmt.listing(folder)
    try:
        for _, path in logs:
            with fmt.Reader(path, "log") as reader:
                if reader.torn != 0:
                    return False
    except (errors.DamagedFile, errors.NewerFormat, OSError):
        return False
    return not snapshots


def is_of(name: str, folder: Path) -> bool:
    """Are the newest readable files there of the live segment, or was that one restored?"""
    created = [head["segment_created_ms"] for of_kind in heads(folder) for head in of_kind[-1:] if "segment_created_ms" in head]
    with cache_module.attach(name) as cache:
        mine = int(cache.segment.header["created_ms"])
        return all(ms == mine for ms in created) or int(cache.segment.header["restored_seq"]) > 0


def set_aside(folder: Path) -> Path:
    """Move all snapshots and log files of a directory that was taken into a new one within it, which only people look into: that one.

    Crash: what is left is refused as all of it was, for the newest snapshot goes behind the others, then the logs, the earliest first.
    """
    snapshots, logs = fmt.listing(folder)
    for n in itertools.count(1):
        aside = folder / f"set-aside-{n}"
        with contextlib.suppress(FileExistsError):
            aside.mkdir(mode=0o700)
            break
    for _, path in (*snapshots, *logs):
        path.rename(aside / path.name)
    sync_folder(aside)
    sync_folder(folder)
    return aside


# ---- which versions have been given out -------------------------------------------------------------------------------------------------
# The versions that rows of the store carry (header.version_base + an item's) grow from one life of a segment to the next, also if the
# later one is restored from files of which the earlier one has written none, or the wall clock was set back. So what may have been given
# out stands in a file: a log of no records, whose HEAD has "newest", and "skipped": ranges that a life has left out, since a row was there
# already. A row of a version in one of these, or above newest, was stored by no segment of this directory.
# Crash: before the rename the former file stands, and nothing above it has been given out; behind it some versions are never given out.


class GivenOut(NamedTuple):
    newest: int = 0  # no row has got a higher version from here; 0: that is not known
    skipped: tuple[tuple[int, int], ...] = ()  # (from, to), both exclusive: no row has got one of these

    def may_have(self, version: int) -> bool:
        return version <= self.newest and not any(low < version < high for low, high in self.skipped)

    def above(self, newest: int, version: int) -> GivenOut:
        """Once those up to newest are given out, and what comes is above version. The narrowest of too many ranges is forgotten: what may
        have been given out is left as it is."""
        skipped = [*self.skipped, *([(newest, version + 1)] if newest < version else [])]
        return GivenOut(max(self.newest, version), tuple(sorted(sorted(skipped, key=lambda r: r[0] - r[1])[:MOST_SKIPPED])))


def given_out(folder: Path) -> GivenOut:
    """What is noted; nothing, if nothing is. Raises: DamagedFile, NewerFormat, OSError."""
    path = folder / VERSIONS_NAME
    try:
        with fmt.Reader(path, "log") as reader:
            return GivenOut(int(reader.head["newest"]), tuple((int(low), int(high)) for low, high in reader.head["skipped"]))
    except FileNotFoundError:
        return GivenOut()
    except (KeyError, TypeError, ValueError) as e:
        raise errors.DamagedFile(str(path), 0, f"it lacks what it has to have ({type(e).__name__}: {e})") from None


def note_given_out(folder: Path, name: str, given: GivenOut) -> None:
    """Before one of these is given out. Raises: OSError."""
    path = folder / VERSIONS_NAME
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of who was killed
    with os.fdopen(create(temporary), "wb", buffering=0) as file:
        fmt.Writer(file, "log", {"name": name, "created_ms": int(time.time() * 1000), "newest": given.newest, "skipped": given.skipped})
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(folder)


def sync_file(path: Path) -> None:
    with fmt.open_regular(path) as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """What was renamed or made in it outlives a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
