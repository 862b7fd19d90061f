"""A data directory: one segment's snapshots and log files, taken by one process at a time.

What a file says of itself stands in its HEAD (format.py); a file that cannot be read says nothing here, and is named by those who need it.
Such a file is never removed: nobody can tell what would go with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shmcache import errors, segment
from shmcache.core import _core, _dirty
from shmcache.supervisor import format as fmt

if TYPE_CHECKING:
    from shmcache.cache import Cache

LOCK_NAME = "lock"
VERSIONS_NAME = "versions.shmcache"
LIVES_NAME = "lives.shmcache"
MOST_SKIPPED = 8  # ranges


@contextlib.contextmanager
def take(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A data directory for this process alone; made if it is not there. Let go when the block or the process ends.

    Raises: DataDirInUse; OSError: it cannot be made or written.
    """
    path = Path(folder)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (path / LOCK_NAME).exists():  # or it was taken before, and this was done
        for folder in made or [path]:
            with contextlib.suppress(PermissionError):  # another process, of another user, has made this one and lets nobody look into it
                sync_folder(folder.parent)
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


def with_heads(paths: Iterable[tuple[int, Path]], kind: fmt.FileKind) -> list[tuple[Path, dict[str, Any]]]:
    """Those that can be read, of the files of one kind, as format.listing() has them."""
    return [(path, h) for _, path in paths if (h := head(path, kind))]


def all_with_heads(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Readable files of a directory: snapshots, then logs, each oldest first."""
    snapshots, logs = fmt.listing(folder)
    return with_heads(snapshots, "snapshot") + with_heads(logs, "log")


def heads(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """HEADs of the readable (snapshots, logs) of a directory, oldest first."""
    snapshots, logs = fmt.listing(folder)
    return [h for _, h in with_heads(snapshots, "snapshot")], [h for _, h in with_heads(logs, "log")]


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


def is_of(cache: Cache, folder: Path) -> bool:
    """Are the newest readable files there of this segment, or did they lie there when it was restored from there? Raises: NewerFormat,
    OSError."""
    if is_unnoted(cache, folder):
        return True
    mine = life(cache)
    noted, passed = Noted(), Noted()
    with contextlib.suppress(errors.DamagedFile):  # then only its own are known to be
        noted, passed = notes(folder)
    of_it = noted.get(mine, set()) | passed.get(mine, set()) | {mine}
    return all(life_of(head) in of_it for of_kind in heads(folder) for head in of_kind[-1:])


def set_aside(folder: Path) -> Path:
    """Move all snapshots and log files of a directory that was taken into a new one within it, which only people look into: that one.

    Crash: what is left is refused as all of it was, for the newest snapshot goes behind the others, then the logs, the earliest first; then
    what says of whose lives they are.
    """
    snapshots, logs = fmt.listing(folder)
    for n in itertools.count(1):
        aside = folder / f"set-aside-{n}"
        with contextlib.suppress(FileExistsError):
            aside.mkdir(mode=0o700)
            break
    for _, path in (*snapshots, *logs):
        path.rename(aside / path.name)
    with contextlib.suppress(FileNotFoundError):  # it speaks of these
        (folder / LIVES_NAME).rename(aside / LIVES_NAME)
    sync_folder(aside)
    sync_folder(folder)
    return aside


# ---- which lives are in which -----------------------------------------------------------------------------------------------------------
# A life is one segment, from its creation on: header.created_ms, which stands in the HEAD of each of its files. Files of several lives lie
# here, and a later one need not have what an earlier one had: a worker may have created its segment, or a copy of this directory may have
# been restored. So from whose files a life was restored is noted here, before anybody attaches, in a log of no records: HEAD has "lives",
# (life, those that are in it and have files here) of each. Only what was restored from this directory is noted in it: one that was restored
# from a copy does not have what these files have got since.
# What is not noted is not known: such a file is kept. "passed" has those whose files lay here, too, and are not in it: a supervisor that is
# started again knows by it that nobody else was here since, though the newest file that can be read may be of one of them.
# No room for the note: the segment is restored all the same, and has in header.unnoted what the newest files here are. That is true of this
# directory until the first file of this life is begun, and of no copy from another time. The note comes before that file: note_first().
# Crash: header.unnoted, and the former note, stand until the rename; behind it the note is there, and note_first() finds it.

Noted = dict[int, set[int]]  # a life -> others
_unnoted: dict[tuple[int, Path], set[int]] = {}  # of a life that this process has restored from there: those that are in it, not noted yet
_noting = threading.RLock()  # the threads of the log, of the snapshot, and of what is stored


def life(cache: Cache) -> int:
    return int(cache.segment.header["created_ms"])


def life_of(head: dict[str, Any]) -> int | None:
    """Of a file with this HEAD; None: it does not say."""
    of = head.get("segment_created_ms")
    return of if isinstance(of, int) else None


def lives(folder: Path) -> Noted:
    """What is noted: of a life that was restored from here, those that are in it. Raises: DamagedFile, NewerFormat, OSError."""
    return notes(folder)[0]


def notes(folder: Path) -> tuple[Noted, Noted]:
    """(lives(), of such a life those that were passed over). Raises: DamagedFile, NewerFormat, OSError."""
    path = folder / LIVES_NAME
    try:
        with fmt.Reader(path, "log") as reader:
            both = reader.head["lives"], reader.head.get("passed", [])
            noted, passed = ({int(one): {int(other) for other in others} for one, others in of} for of in both)
            return noted, passed
    except FileNotFoundError:
        return {}, {}
    except (KeyError, TypeError, ValueError) as e:
        raise errors.DamagedFile(str(path), 0, f"it lacks what it has to have ({type(e).__name__}: {e})") from None


def note_life(cache: Cache, folder: Path, restored_from: set[int]) -> None:
    """The segment has what files of these lives had, here. Raises: NewerFormat; OSError, UnsupportedValue (there are too many lives): it is
    not noted yet."""
    _unnoted[life(cache), folder] = restored_from
    header = cache.views(writable=True).header
    header["restored_from"] = header["unnoted"] = _newest(cache, folder)
    del header
    note_first(cache, folder)


def note_first(cache: Cache, folder: Path) -> None:
    """Before the first file of the segment is begun here: what could not be noted when it was restored. By another process than that which
    restored it only that it was: which lives are in it is not known then. Raises: as note_life()."""
    mine = life(cache)
    with _noting:
        if (mine, folder) not in _unnoted and not is_unnoted(cache, folder):
            return
        _note_first(cache, folder, mine)
        _unnoted.pop((mine, folder), None)
        cache.views(writable=True).header["unnoted"] = 0


def _note_first(cache: Cache, folder: Path, mine: int) -> None:
    noted, passed = Noted(), Noted()
    with contextlib.suppress(errors.DamagedFile):  # what stood there is not known any more
        noted, passed = notes(folder)
    if (mine, folder) not in _unnoted and mine in noted:
        return
    here = {one for of_kind in heads(folder) for head in of_kind if (one := life_of(head)) is not None}
    restored_from = _unnoted.get((mine, folder), set())
    noted[mine] = restored_from.union(*(noted.get(one, set()) for one in restored_from))
    passed[mine] = here - noted[mine]
    head: dict[str, Any] = {"name": cache.name, "created_ms": int(time.time() * 1000)}
    for key, of in (("lives", noted), ("passed", passed)):
        head[key] = [(one, sorted(others & here)) for one, others in of.items() if one in here or one == mine]
    _replace(folder / LIVES_NAME, head)


def is_unnoted(cache: Cache, folder: Path) -> bool:
    """Was it restored from what is here, and that could not be noted?"""
    unnoted = int(cache.segment.header["unnoted"])
    return unnoted != 0 and unnoted == _newest(cache, folder)


def is_from(cache: Cache, folder: Path) -> bool:
    """Was it restored from here? Raises: DamagedFile, NewerFormat, OSError."""
    return is_unnoted(cache, folder) or life(cache) in lives(folder)


def has_what_it_was_restored_from(cache: Cache, folder: Path) -> bool:
    """And nothing newer, but files of its own."""
    return int(cache.segment.header["restored_from"]) == _newest(cache, folder)


def _newest(cache: Cache, folder: Path) -> int:
    """What the newest readable files here are that are not the segment's own, in 64 bits, never 0."""
    found, mine = [], life(cache)
    for kind, of_kind in zip(fmt.MAGIC, fmt.listing(folder), strict=True):
        readable = ((h, path.stat().st_size) for _, path in reversed(of_kind) if (h := head(path, kind)))  # type: ignore[arg-type]
        found.append(next((one for one in readable if life_of(one[0]) != mine), None))
    return int.from_bytes(hashlib.blake2b(repr(found).encode(), digest_size=8).digest(), "little") | 1


# ---- which versions have been given out -------------------------------------------------------------------------------------------------
# The versions that rows of the store carry (header.version_base + an item's) grow from one life of a segment to the next, also if the
# later one is restored from files of which the earlier one has written none, or the wall clock was set back. So what may have been given
# out stands in a file: a log of no records, whose HEAD has the fields of GivenOut.
#   1  No row gets a version above `newest`: it is raised, on the disk, before the first one is stored (writeback.py).
#   2  A life begins above it (snapshot.py), and not below the clock's.
#   3  So the versions of a life are above all those before it. And they are not ahead of the clock, if it was not set back: a nanosecond is
#      a version, no stripe has a write in each, and `newest` is at most BLOCK ahead of the clock (more(), below), which has passed when the
#      next life begins. What is newer by its version was then written later also where this file does not know of both: the directory was
#      lost, or an older copy of it was put back, or a worker was first.
#   4  Where the clock was set back, a segment that a worker begins may be below it: adopted, it goes above it (adopt(), below).
# `skipped` are ranges that a life has left out, since a row was there already. A row of a version in one of these, or above newest, was
# stored by no segment of this directory.
# Crash: before the rename the former file stands, and nothing above it has been given out; behind it some versions are never given out.
# No room for it: the former file stands. What is not above that is stored, the rest waits.
# The file is lost, or damaged, and snapshots or logs are there: as much as UNSAID above their beginnings may have been given out.

BLOCK = 1 << 20  # versions: a millisecond of the clock
UNSAID = 1 << 40  # above `newest` of a note without a floor, and above the files without a note
LONG_BLOCK = 1 << 30  # a second: how far ahead it goes where the clock is already
HIGHEST = (1 << 63) - (1 << 40)  # of a row's version: a column of 64 bits has no higher ones, and a life has so many to go on


def clock() -> int:
    """The version of a row with which a segment that is created now would begin."""
    return int(time.time() * 1000) << _core.CONSTANTS["versions_shift"]


class GivenOut(NamedTuple):
    newest: int = 0  # no row has got a higher version from here; 0: that is not known
    skipped: tuple[tuple[int, int], ...] = ()  # (from, to), both exclusive: no row has got one of these
    floor: int = 0  # what is written from now on has a higher version, of the segment that noted this,
    segment: int = 0  # its created_ms; 0: that is not known

    def may_have(self, version: int) -> bool:
        return version <= self.newest and not any(low < version < high for low, high in self.skipped)

    def above(self, newest: int, version: int) -> GivenOut:
        """Once those up to newest are given out, and what comes is above version. The narrowest of too many ranges is forgotten: what may
        have been given out is left as it is."""
        skipped = [*self.skipped, *([(newest, version + 1)] if newest < version else [])]
        return self._replace(
            newest=max(self.newest, version), skipped=tuple(sorted(sorted(skipped, key=lambda r: r[0] - r[1])[:MOST_SKIPPED]))
        )

    def more(self, used: int) -> GivenOut:
        """Once those up to `used` are given out: some above may be, too."""
        return self._replace(newest=max(self.newest, used + max(BLOCK, min(LONG_BLOCK, clock() - used))))


def given_out(folder: Path) -> GivenOut:
    """What is noted. Raises: DamagedFile, NewerFormat, OSError."""
    path = folder / VERSIONS_NAME
    try:
        with fmt.Reader(path, "log") as reader:
            newest, skipped = int(reader.head["newest"]), tuple((int(low), int(high)) for low, high in reader.head["skipped"])
            if "floor" not in reader.head:  # as it was first: where a life has begun, and it has not said what it gave out
                return GivenOut(newest + UNSAID, skipped, newest)
            return GivenOut(newest, skipped, int(reader.head["floor"]), int(reader.head["segment_created_ms"]))
    except FileNotFoundError:
        return unsaid(folder)
    except (KeyError, TypeError, ValueError) as e:
        raise errors.DamagedFile(str(path), 0, f"it lacks what it has to have ({type(e).__name__}: {e})") from None


def unsaid(folder: Path) -> GivenOut:
    """Where no note says it: nothing, if no file is there either."""
    newest = 0
    for path, head in all_with_heads(folder):
        with contextlib.suppress(errors.DamagedFile):  # a restore names it
            newest = max(newest, given_out_of_head(path, head)[1])
    return GivenOut(newest + UNSAID, (), newest) if newest else GivenOut()


def given_out_of_head(path: Path, head: dict[str, Any]) -> tuple[int, int]:
    """(what is added to its versions to get rows', the highest row's version) when this file was begun. Raises: DamagedFile."""
    highest, _, settings, _ = of_head(path, head)
    base = base_of(path, settings)
    return base, base + highest


def of_head(path: Path, head: dict[str, Any]) -> tuple[int, int, dict[str, int], int]:
    try:
        newest, created_ms, settings, epoch = int(head["newest"]), int(head["created_ms"]), dict(head["settings"]), int(head["epoch"])
    except (KeyError, TypeError, ValueError) as e:
        raise errors.DamagedFile(str(path), 0, f"HEAD lacks what it has to have ({type(e).__name__}: {e})") from None
    if not 0 <= newest < HIGHEST:
        raise errors.DamagedFile(str(path), 0, f"the newest version in it is {newest}")
    return newest, created_ms, settings, epoch


def base_of(path: Path, settings: dict[str, int]) -> int:
    """What is added to the versions of this file to get their rows'."""
    try:
        base = int(settings.get("version_base", 0))
    except (TypeError, ValueError) as e:
        raise errors.DamagedFile(str(path), 0, f"its version_base is none ({type(e).__name__}: {e})") from None
    if not 0 <= base < HIGHEST:
        raise errors.DamagedFile(str(path), 0, f"its version_base is {base}")
    return base


def note_given_out(folder: Path, name: str, given: GivenOut) -> None:
    """Before one of these is given out. Raises: OSError."""
    head = {
        "name": name, "created_ms": int(time.time() * 1000), "newest": given.newest, "skipped": given.skipped, "floor": given.floor,
        "segment_created_ms": given.segment,
    }  # fmt: skip
    with _noting:
        _replace(folder / VERSIONS_NAME, head)


# A segment that GivenOut does not name was begun by a process that did not know of it: by a worker that was first. (A restore names its
# own.) Rows from before are older than all that was written in it, whatever the clock says. So it is adopted before anything of it is
# stored, or is in a file of the directory: by WriteBack, AppendLog and snapshot.write, each for itself.
#   1  the stripes' sequences go above all that may have been given out: what is written from now on has a higher version
#   2  so do the dirty items that were written in it; what was restored into it keeps its versions, by which it is older
#   3  GivenOut names it, on the disk; if there is no room for that, the next adopts it again, and finds 1 and 2 done
# Crash before 3: adopted again. A stripe that cannot be had: nothing is begun, and StripeBusy says why.
#     adopt vs set        behind 1 it has a higher version; before, 2 finds it, for its stripe was taken after it
#     adopt vs clear, delete      a tombstone is written as any value; what is dirty no clear() takes away
#     adopt vs note_given_out of another thread       one waits for the other (_noting). Noted first: it names the segment, and stays.
#                         Adopted first: what is noted next has more


def adopt(cache: Cache, folder: Path | None) -> GivenOut:
    """Before anything of a segment that is written back is stored, or in a file of this directory. Returns: what may have been given out,
    as this segment knows of it, whose versions are above. Raises: StripeBusy; NewerFormat, OSError: the note cannot be read."""
    own, base = life(cache), int(cache.segment.header["version_base"])
    before = base + int(cache.segment.header["restored_seq"])  # of rows of earlier lives none has a higher version
    if folder is None or cache.mapping.settings()["policy"] != segment.WRITE_BACK:
        return GivenOut(before, (), before, own)
    with _noting:
        try:
            given = given_out(folder)
        except errors.DamagedFile:
            given = unsaid(folder)
        if given.segment == own:
            return given._replace(newest=max(given.newest, before))
        if given.newest > before:
            last, dirty = given.newest - base, _dirty.Dirty(cache)
            if not (dirty.go_above(last) and dirty.renew_all(before - base + 1, last)):
                raise errors.StripeBusy(
                    f"items of {cache.name!r} are to get versions above the store's, and a process that does not run holds some: "
                    "continue or kill it, and try again"
                )
        newest = max(given.newest, before)
        given = given._replace(newest=newest, floor=newest, segment=own)
        with contextlib.suppress(OSError):
            note_given_out(folder, cache.name, given)
        return given


def _replace(path: Path, head: dict[str, Any]) -> None:
    """Write a log of no records, in one step. Raises: OSError, UnsupportedValue."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    with os.fdopen(create(temporary), "wb", buffering=0) as file:
        fmt.Writer(file, "log", head)
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


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
