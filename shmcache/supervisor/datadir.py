"""A data directory: one segment's snapshots and log files, taken by one process at a time.

What a file says of itself stands in its HEAD (format.py); a file that cannot be read says nothing here, and is named by those who need it.
Such a file is never removed: nobody can tell what would go with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shmcache import cache as cache_module
from shmcache import errors
from shmcache.supervisor import format as fmt

LOCK_NAME = "lock"


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
