"""A segment: one POSIX shared memory object that holds a whole cache. Made, found, removed, and looked at with numpy.

Invariants
  S1  nobody ever sees half a segment: it is made complete in an object without a name, then linked; of two creators one wins
  S2  its memory is reserved when it is made: no later write can fail for want of room
  S3  one process has one mapping of a segment and one row in it, however many handles
  S4  views are made over the mapping's buffer, so that they keep it mapped; the last close() refuses while one is out

`python -m shmcache.segment` prints the layout.
"""

from __future__ import annotations

import errno
import os
import time
from _weakref import ref

import posix_ipc

from shmcache import errors
from shmcache.core import _core

TYPE_CHECKING = False  # typing, re and weakref would be most of what a worker's import costs
if TYPE_CHECKING:
    from io import FileIO
    from typing import Any

    import numpy as np

SHM_DIR = "/dev/shm"
ASIDE = "shmcache-next."  # the same, of one that has no name yet (_take_name)
PREFIX = "shmcache."  # of the object's name: what `ls /dev/shm` shows, and what sets our objects apart
MIN_SIZE = 4 << 20
BIG_PAGES_FROM = 4 << 30  # bytes; from here slab pages have 1 MiB, below 64 KiB (bench: 1 MiB pages cost a small cache 4 points)
BYTES_PER_BUCKET = 768  # of slab memory: not five of the smallest common items (160 B) to seven slots
WRITE_BACK = 3  # layout.pxd, POLICY_BACK
DIRTY_SHARE = 4  # so much of the slab memory, a quarter, may hold at most what the store has not got yet
CONFIG = b"\x80"  # an empty msgpack map
RESTORE_LIMIT = 60.0  # seconds for which attach() waits until it is certain that a restore will not be refused,
RESTARTED_IN = 2.0  # and of them for a restorer that has ended: one that is started again at once is there by then
RESTORE_POLL = 0.01
NAME_LIMIT = 5.0  # seconds for which one waits for a process that takes a name, or unlinks it: some system calls, if it is not stopped

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_mappings: dict[tuple[int, int], ref[_core.Mapping]] = {}
_dtypes: dict[str, np.dtype[Any]] = {}


def parse_size(size: int | str, what: str = "size") -> int:
    """Bytes of `4194304`, `"64M"`, `"1.5G"` or `"1GiB"`. Raises: InvalidSize."""
    n = -1
    if isinstance(size, int) and not isinstance(size, bool):
        n = size
    elif isinstance(size, str):
        digits = size.strip().upper().removesuffix("B").removesuffix("I")
        unit = digits[-1:] if digits[-1:] in _UNITS else ""
        digits = digits.removesuffix(unit).strip()
        if digits.replace(".", "", 1).isdecimal():
            n = int(float(digits) * _UNITS[unit]) if "." in digits else int(digits) * _UNITS[unit]
    if n < 1 or n >= 1 << 62:
        raise errors.InvalidSize(f"{what} is a number of bytes or something like '256M' or '1G', not {size!r}")
    return n


def check_name(name: str) -> str:
    """Path of the segment's object. Raises: InvalidName."""
    ok = isinstance(name, str) and 0 < len(name.encode("utf-8", "surrogatepass")) <= 200 and "/" not in name and "\0" not in name
    if not ok:
        raise errors.InvalidName(f"a segment name is 1 to 200 bytes without '/', not {name!r}")
    return f"{SHM_DIR}/{PREFIX}{name}"


# ---- geometry -----------------------------------------------------------------------------------------------------------------


def slab_classes(page_bytes: int) -> list[int]:
    """Chunk sizes: growth 1.25 at most where it matters, multiples of 16, the larger ones fitted to the page."""
    sizes = [128, 144]
    while sizes[-1] < page_bytes // 2:
        last = sizes[-1]
        grown = max(last + 16, last * 5 // 4 // 16 * 16)
        if last * 64 >= page_bytes:  # few to a page: the sizes that divide it, or its end would be wasted
            per_page = min(-(-page_bytes // grown), page_bytes // last - 1)
            grown = page_bytes // per_page // 16 * 16
        sizes.append(grown)
    return sizes


def dirty_limit_of(asked: int, slab_bytes: int) -> int:
    """Bytes that may wait to be stored, of what a policy asks for (0: as much as may be)."""
    return min(asked or slab_bytes, slab_bytes // DIRTY_SHARE)


def geometry(
    size_bytes: int,
    *,
    max_processes: int = 128,
    stripes: int = 1024,
    max_value_bytes: int = 64 << 20,
    default_ttl_ms: int = 0,
    lock_limit_ms: int = 1000,
    ring_bytes: int = 0,
    policy: int = 0,
    dirty_limit: int = 0,
) -> tuple[dict[str, int], list[int]]:
    """Where everything stands in a segment of size_bytes, by header field name; and the slab classes. Allocates nothing."""
    page_shift = 20 if size_bytes >= BIG_PAGES_FROM else 16
    page_bytes = 1 << page_shift
    chunks = slab_classes(page_bytes)
    fixed = {"n_rows": max_processes, "n_stripes": stripes, "n_classes": len(chunks), "page_shift": page_shift, "ring_bytes": ring_bytes}
    fixed["policy"] = policy
    n_pages = size_bytes >> page_shift
    while True:
        if n_pages < 1:
            raise errors.InvalidSize(f"{size_bytes:,} bytes have no room for {max_processes} log buffers of {ring_bytes:,}")
        g = _sections(fixed, n_pages)
        end = g["slab_off"] + (n_pages << page_shift)
        if end <= size_bytes:
            break
        n_pages -= max(1, (end - size_bytes) >> (page_shift + 1))
    slab_bytes = n_pages << page_shift
    # the list of a big value's pages must fit its head chunk, beside the longest key
    listable = (chunks[-1] - _core.CONSTANTS["item"] - _core.CONSTANTS["max_key"]) // 4 * page_bytes
    g["max_value_bytes"] = min(max_value_bytes, slab_bytes // 4, listable, (1 << 32) - 1)
    g["default_ttl_ms"] = default_ttl_ms
    g["lock_limit_ms"] = lock_limit_ms
    g["dirty_limit"] = dirty_limit_of(dirty_limit, slab_bytes)
    g["size_bytes"] = size_bytes
    return g, chunks


def _sections(fixed: dict[str, int], n_pages: int) -> dict[str, int]:
    size_of = _core.CONSTANTS
    slab_bytes = n_pages << fixed["page_shift"]
    n_buckets = min(max(64, slab_bytes // BYTES_PER_BUCKET), (1 << 32) - 1)
    n_overflow = min(max(16, n_buckets // 3), (1 << 31) - 1)
    sketch_bytes = 1 << max(6, (slab_bytes // 512).bit_length() - 1)
    sections = {
        "rows": fixed["n_rows"] * size_of["row"],
        "stripes": fixed["n_stripes"] * size_of["stripe"],
        "databases": fixed["n_stripes"] * size_of["databases"],
        "classes": fixed["n_classes"] * size_of["class"],
        "pages": n_pages * size_of["page"],
        "refs": slab_bytes >> 7,
        "sketch": sketch_bytes,
        "buckets": n_buckets * size_of["bucket"],
        "overflow": n_overflow * size_of["overflow"],
        "dirty": (slab_bytes >> 10) + 8 if fixed["policy"] == WRITE_BACK else 0,
        "rings": fixed["n_rows"] * (size_of["ring"] + fixed["ring_bytes"]) if fixed["ring_bytes"] else 0,
    }
    g = dict(fixed, n_pages=n_pages, n_buckets=n_buckets, n_overflow=n_overflow)
    g.update(refs_bytes=sections["refs"], sketch_bytes=sketch_bytes, rings_bytes=sections["rings"], dirty_bytes=sections["dirty"])
    at = size_of["header"]
    for name, n_bytes in sections.items():
        g[name + "_off"] = at
        at += -(-n_bytes // 128) * 128
    page_bytes = 1 << fixed["page_shift"]
    g["slab_off"] = -(-at // page_bytes) * page_bytes
    return g


# ---- create, attach, unlink -----------------------------------------------------------------------------------------------


def create(
    name: str, size_bytes: int, *, mode: int = 0o600, group: int | str | None = None, huge_pages: bool = False, restored_seq: int = 0,
    restored_epoch: int = 0, log_policy: int = 0, config: bytes = CONFIG, version_base: int | None = None,
    instead_of: _core.Mapping | None = None, **options: int,
) -> _core.Mapping:
    """Make a segment and map it. options: of geometry(). restored_seq: it is to be restored by this process, and no version in what comes
    is higher; its epoch is restored_epoch; this process holds its lock (Mapping.begin_restore). log_policy: of its log, from the first
    moment. config: a msgpack map, for the header. version_base: of the segment that it is restored from; None: one of its own.
    instead_of: the segment of this name, whose lock this process holds and in which nobody is, gives its memory and then its name.

    Warns: HugePagesRefused.

    Raises: InvalidName, InvalidConfig, SegmentExists, SegmentForbidden, SharedMemoryFull; with instead_of BeingRestored (_hold_name).
    Crash: at any step before the link the object has no name and goes with its creator; after it the segment is whole. instead_of: it has
    the name, without items, until the new one has (_take_name).
    """
    path = check_name(name)
    size_bytes = -(-size_bytes // 4096) * 4096
    if size_bytes < MIN_SIZE:
        raise errors.InvalidSize(f"a segment has at least 4M ({MIN_SIZE:,} bytes), not {size_bytes:,}")
    if instead_of is None and os.path.exists(path):
        raise errors.SegmentExists(f"a segment {name!r} exists: attach() or open() it, or unlink() it first")
    g, chunks = geometry(size_bytes, **options)
    if restored_seq:
        g["restored_seq"], g["epoch"] = restored_seq, restored_epoch
    if version_base is not None:
        g["version_base"] = version_base
    g["log_policy"] = log_policy
    try:
        # Not posix_ipc's O_CREAT under a temporary name: a creator that is killed would leave it, with all its memory.
        fd = os.open(SHM_DIR, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode)
    except PermissionError as e:
        raise errors.SegmentForbidden(f"may not create objects in {SHM_DIR}: {e.strerror}") from None
    try:
        os.fchmod(fd, mode)  # the umask has cut the mode of open
        if group is not None:
            os.fchown(fd, -1, _gid(group))
        if instead_of is not None:
            instead_of.give_back()
        _clear_aside(name)
        _reserve(fd, size_bytes)
        refused = _core.format_segment(fd, g, chunks, _boot_id(), os.urandom(16), config, huge_pages)
        mapping = _map(fd, path, name)
        if restored_seq:
            mapping.begin_restore()  # before anybody can see that it is being restored
        if instead_of is not None:
            _take_name(fd, path, name, instead_of)
        else:
            _link(fd, path, name)
        if refused:
            _warn_of_small_pages(name, refused)
        return mapping
    finally:
        os.close(fd)


def _warn_of_small_pages(name: str, refused: int) -> None:
    import warnings

    warnings.warn(
        f"not all of the segment {name!r} is in huge pages ({os.strerror(refused)}): the kernel is older than Linux 6.1, forbids them "
        "(/sys/kernel/mm/transparent_hugepage/shmem_enabled), or has too few free ones; the segment works, with small pages",
        errors.HugePagesRefused,
        stacklevel=4,
    )


# ---- a name that changes hands --------------------------------------------------------------------------------------------------
#
# A new segment B takes the name of an abandoned one A. B is linked aside, under a name that nobody can guess, and renamed over A: the name
# is there all the while. A rename replaces whatever has the name. So a process that takes a name away from an object locks the object
# first (_hold_name), and looks under the lock whether it has the name still.
#
# Invariants
#   N1  a name is taken only from what its lock is held of
#   N2  B is uncertain, and its restorer's byte is held, before it has any name; no name aside is used twice. So what stands aside is a
#       living restorer's (_core.unsettled is 1), which removes it itself, or nobody's (2), and then anybody may remove it
#
# Race table
#   unlink vs rename         the lock decides. unlink: A has not got the name any more, so nothing is replaced: B gets the name by a link if
#                            it is free, else a worker was faster (SegmentExists). rename: unlink looks again and removes B, and the
#                            restore, which looks at its end, says so
#   unlink vs unlink         the lock decides; the other finds none, or (unlink_this) another, and leaves it
#   clearing vs a restorer   it holds its byte: what is its own stays
#   rm in a shell vs rename  it takes no lock. Behind the link aside and before the look: as unlink. Between the look and the rename, two
#                            system calls: a segment that was created there is replaced; its users see that it is unlinked
#
# Crash, or an exception, which removes what stands aside
#   before the link aside    B has no name and goes with its maker
#   before the rename        A has the name; B stands aside, nobody's, with its memory: create() and unlink() of that name remove it
#   behind the rename        B has the name, as an abandoned one; the next restorer begins again
#   behind the link of B     it has two names, and the next restorer lets go of the one; then the other is removed as above


def aside(beginning: str = "") -> list[tuple[str, str]]:
    """(object's name, segment's name) of all that stands aside, and of whatever else has such a name: of segments whose names begin so."""
    found = []
    prefix = ASIDE + beginning
    for entry in sorted(entry for entry in os.listdir(SHM_DIR) if entry.startswith(prefix)):
        name, dot, suffix = entry.removeprefix(ASIDE).rpartition(".")
        if dot and len(suffix) == 16:
            found.append((entry, name))
    return found


def aside_state(entry: str) -> int:
    """As _core.unsettled. 0: no restore of this layout has left it there, or it is another user's."""
    try:
        with _look_at(f"{SHM_DIR}/{entry}") as file:
            return _core.unsettled(file.fileno()) if os.geteuid() in (0, os.fstat(file.fileno()).st_uid) else 0
    except OSError:
        return 0


def _clear_aside(name: str) -> bool:
    """Remove what killed restorers of this name have left aside. Was there anything?"""
    left = False
    try:
        # the condition is not in this loop: DECISIONS.md, "No loop that ends in a condition"
        for entry in (entry for entry, of in aside(name) if of == name and aside_state(entry) == 2):
            _remove(f"{SHM_DIR}/{entry}")
            left = True
    except OSError:  # it may not be listed, or removed, by this user: what is asked for does not need it
        pass
    return left


def _look_at(path: str) -> FileIO:
    return open(path, "rb", 0, opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK))  # it may be a link, a fifo


def _hold_name(path: str, name: str) -> FileIO | None:
    """What has the name, locked until _let_go. None: nothing has it, or what has it cannot be opened.

    Raises: BeingRestored: another has it locked for NAME_LIMIT seconds.
    """
    import errno
    import fcntl

    until = _core.monotonic() + NAME_LIMIT
    while True:
        try:
            file = _look_at(path)
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR):  # it is there, for all that is known
                raise
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            if _core.monotonic() >= until:
                raise errors.BeingRestored(
                    f"a process that is about to unlink the segment {name!r}, or to restore it, does not go on: end it if it is stopped, "
                    "and try again"
                ) from None
            time.sleep(RESTORE_POLL)
            continue
        stat = os.fstat(file.fileno())
        if _identity(path) == (stat.st_dev, stat.st_ino):
            return file
        _let_go(file)


def _let_go(file: FileIO | None) -> None:
    import fcntl

    if file is not None:
        fcntl.flock(file, fcntl.LOCK_UN)  # to close it is not enough: a child that was forked meanwhile has it, too
        file.close()


def _identity(path: str) -> tuple[int, int] | None:
    try:
        stat = os.lstat(path)
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def _take_name(fd: int, path: str, name: str, instead_of: _core.Mapping) -> None:
    """Give the nameless object the name of another, if that has it still; else the name, if nobody has it."""
    held = _hold_name(path, name)
    try:
        beside = f"{SHM_DIR}/{ASIDE}{name}.{os.urandom(8).hex()}"
        try:
            _link(fd, beside, name)
            if _identity(path) == instead_of.identity:
                os.rename(beside, path)
            else:
                _link(fd, path, name)  # before the other name goes: an object that has lost its last one gets none again
        finally:
            _remove(beside)
    finally:
        _let_go(held)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _link(fd: int, path: str, name: str) -> None:
    """Give the nameless object its name, if nobody was faster."""
    descriptors = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(str(fd), path, src_dir_fd=descriptors, follow_symlinks=True)  # with a src_dir_fd it is linkat, which follows
    except FileExistsError:
        raise errors.SegmentExists(f"a segment {name!r} exists: attach() or open() it, or unlink() it first") from None
    finally:
        os.close(descriptors)


def _reserve(fd: int, size_bytes: int) -> None:
    """ftruncate alone succeeds on a full tmpfs, and the first write then dies of SIGBUS."""
    stat = os.statvfs(SHM_DIR)
    full = (
        f"{SHM_DIR} has {stat.f_bavail * stat.f_frsize:,} of {size_bytes:,} bytes free: ask for less (size=), or make it larger "
        "(docker run --shm-size, a Kubernetes emptyDir with medium: Memory, or mount -o remount,size=)"
    )
    if stat.f_bavail * stat.f_frsize < size_bytes and stat.f_blocks:
        raise errors.SharedMemoryFull(errno.ENOSPC, full)
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise errors.SharedMemoryFull(errno.ENOSPC, full) from None
        raise


class Patience:
    """How long to go on waiting for a restore."""

    def __init__(self) -> None:
        self.until = _core.monotonic() + RESTORE_LIMIT
        self.abandoned_until = 0.0  # 0: somebody is at it

    def over(self, why: errors.BeingRestored) -> bool:
        """why: it is waited for still."""
        now = _core.monotonic()
        if not why.abandoned:
            self.abandoned_until = 0.0
            return now >= self.until
        self.abandoned_until = self.abandoned_until or min(self.until, now + RESTARTED_IN)
        return now >= self.abandoned_until


def attach(
    name: str, *, owner: int | str | None = None, group: int | str | None = None, unsettled: bool = False, wait: bool = True
) -> _core.Mapping:
    """Map a live segment. If its restore may still be refused, wait for that: what is written there could be gone with it. unsettled: not
    to write, but to look, or to complete the restore. wait: False: raise BeingRestored at once.

    Raises: InvalidName, SegmentNotFound, SegmentForbidden, ForeignSegment, NotASegment, LayoutMismatch, SegmentTruncated,
    TooManyProcesses; BeingRestored: for RESTORE_LIMIT seconds, or RESTARTED_IN of its restorer, which has ended.
    """
    path = check_name(name)
    patience = None
    while True:
        try:
            return _attached(path, name, owner, group, unsettled)
        except errors.BeingRestored as e:
            patience = patience or Patience()
            if not wait or patience.over(e):
                raise
        time.sleep(RESTORE_POLL)


def _attached(path: str, name: str, owner: int | str | None, group: int | str | None, unsettled: bool) -> _core.Mapping:
    try:
        shm = posix_ipc.SharedMemory("/" + PREFIX + name)
    except posix_ipc.ExistentialError:
        raise errors.SegmentNotFound(f"there is no segment {name!r}: create() or open() it") from None
    except (posix_ipc.PermissionsError, PermissionError):
        raise errors.SegmentForbidden(
            f"this user may not open the segment {name!r}: run as its owner, or create it with mode= and group="
        ) from None
    try:
        _check_owner(shm.fd, name, owner, group)
        if not unsettled and (state := _core.unsettled(shm.fd)):
            raise _being_restored(name, abandoned=state == 2)
        return _map(shm.fd, path, name)
    finally:
        shm.close_fd()


def _being_restored(name: str, abandoned: bool) -> errors.BeingRestored:
    if abandoned:
        said = (
            f"the process that restored the segment {name!r} has ended before it was certain that this can be done, and nobody is in it: "
            "restore it again (shmcache supervise, or shmcache-admin restore, with --data-dir), or unlink it"
        )
    else:
        said = (
            f"it is not certain yet that the segment {name!r} can be restored, and a process is at it: try again (attach() and open() wait "
            "for it, up to a minute; in an event loop await shmcache.aio.attached() or opened())"
        )
    error = errors.BeingRestored(said)
    error.abandoned = abandoned
    return error


def _check_owner(fd: int, name: str, owner: int | str | None, group: int | str | None) -> None:
    """/dev/shm is writable for everybody: what another user has put there under our name is not to be trusted."""
    stat = os.fstat(fd)
    if stat.st_uid == os.geteuid():
        return
    if (owner is not None and stat.st_uid == _uid(owner)) or (group is not None and stat.st_gid == _gid(group)):
        return
    raise errors.ForeignSegment(
        f"the segment {name!r} belongs to uid {stat.st_uid}, gid {stat.st_gid}; this process is uid {os.geteuid()}. If you trust "
        "that user, say so with owner= or group="
    )


def _map(fd: int, path: str, name: str) -> _core.Mapping:
    stat = os.fstat(fd)
    known = _mappings.get((stat.st_dev, stat.st_ino))
    mapping = known() if known is not None else None
    if mapping is None:
        for identity in [i for i, r in _mappings.items() if r() is None]:
            del _mappings[identity]
        mapping = _core.Mapping(fd, path, name)
        _mappings[mapping.identity] = ref(mapping)
    return mapping


def unlink(name: str) -> None:
    """Remove a segment's name. Processes that have it mapped keep it until they close; its memory goes with the last of them. What killed
    restores of it have left aside goes, too.

    Raises: InvalidName, SegmentNotFound, SegmentForbidden; BeingRestored: a process that is stopped has its name in hand.
    """
    _unlink(name, None)


def unlink_this(name: str, mapping: _core.Mapping) -> None:
    """unlink(), if the name is this segment's still."""
    _unlink(name, mapping)


def _unlink(name: str, only: _core.Mapping | None) -> None:
    path = check_name(name)
    held = _hold_name(path, name)
    try:
        if only is not None and _identity(path) != only.identity:
            return
        posix_ipc.unlink_shared_memory("/" + PREFIX + name)
    except posix_ipc.ExistentialError:
        if not _clear_aside(name):
            raise errors.SegmentNotFound(f"there is no segment {name!r}") from None
    except (posix_ipc.PermissionsError, PermissionError):
        raise errors.SegmentForbidden(f"this user may not unlink the segment {name!r}") from None
    finally:
        _let_go(held)
    _clear_aside(name)


def _uid(owner: int | str) -> int:
    if isinstance(owner, int):
        return owner
    import pwd

    try:
        return pwd.getpwnam(owner).pw_uid
    except KeyError:
        raise errors.InvalidConfig(f"owner: there is no user {owner!r}") from None


def _gid(group: int | str) -> int:
    if isinstance(group, int):
        return group
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise errors.InvalidConfig(f"group: there is no group {group!r}") from None


def _boot_id() -> bytes:
    with open("/proc/sys/kernel/random/boot_id") as f:
        return bytes.fromhex(f.read().strip().replace("-", ""))


# ---- numpy views ---------------------------------------------------------------------------------------------------------------


def dtypes() -> dict[str, np.dtype[Any]]:
    """The structs of core/layout.pxd as numpy dtypes, by name."""
    if _dtypes:
        return _dtypes
    import numpy as np

    made = {}
    for struct, (size, fields) in _core.layout().items():
        made[struct] = np.dtype(
            {
                "names": [f[0] for f in fields],
                "offsets": [f[1] for f in fields],
                "formats": [f[2] if f[3] == 1 else (f[2], f[3]) for f in fields],
                "itemsize": size,
            }
        )
    _dtypes.update(made)  # in one step: other threads see none or all
    return _dtypes


class Segment:
    """The bytes of a mapped segment as numpy arrays. They are the live bytes: they change while you look.

    Each array keeps the segment mapped; delete them before the last close(). Read-only, unless writable=True: then a wrong store
    damages the cache for everybody.
    """

    def __init__(self, mapping: _core.Mapping, writable: bool = False) -> None:
        self._buffer = _core.WritableView(mapping) if writable else mapping
        self._mapping = mapping
        self.writable = writable

    def _array(self, dtype: Any, shape: Any, offset: int, strides: Any = None) -> np.ndarray[Any, Any]:
        import numpy as np

        # frombuffer first: it holds the buffer, by which the last close() sees that a view is out; ndarray lets go of it at once
        return np.ndarray(shape, dtype, buffer=np.frombuffer(memoryview(self._buffer), "u1"), offset=offset, strides=strides)

    def _section(self, struct: str, count: str, section: str) -> np.ndarray[Any, Any]:
        header = self.header
        return self._array(dtypes()[struct], (int(header[count]),), int(header[section + "_off"]))

    @property
    def header(self) -> np.ndarray[Any, Any]:
        """() header."""
        return self._array(dtypes()["header"], (), 0)

    @property
    def rows(self) -> np.ndarray[Any, Any]:
        """(n_rows,) process rows."""
        return self._section("row", "n_rows", "rows")

    @property
    def stripes(self) -> np.ndarray[Any, Any]:
        """(n_stripes,) stripes."""
        return self._section("stripe", "n_stripes", "stripes")

    @property
    def databases(self) -> np.ndarray[Any, Any]:
        """(n_stripes,) what each stripe counts of the sidecar's databases."""
        return self._section("databases", "n_stripes", "databases")

    @property
    def classes(self) -> np.ndarray[Any, Any]:
        """(n_classes,) slab classes."""
        return self._section("class", "n_classes", "classes")

    @property
    def pages(self) -> np.ndarray[Any, Any]:
        """(n_pages,) slab page table."""
        return self._section("page", "n_pages", "pages")

    @property
    def buckets(self) -> np.ndarray[Any, Any]:
        """(n_buckets,) buckets."""
        return self._section("bucket", "n_buckets", "buckets")

    @property
    def overflow(self) -> np.ndarray[Any, Any]:
        """(n_overflow,) overflow buckets."""
        return self._section("overflow", "n_overflow", "overflow")

    @property
    def refs(self) -> np.ndarray[Any, Any]:
        """(slab bytes / 128,) uint8: CLOCK counts."""
        return self._array("u1", (int(self.header["refs_bytes"]),), int(self.header["refs_off"]))

    @property
    def bytes(self) -> np.ndarray[Any, Any]:
        """(size_bytes,) uint8: the whole segment; an address times 16 is an index into it."""
        return self._array("u1", (int(self.header["size_bytes"]),), 0)

    def items(self, class_id: int) -> np.ndarray[Any, Any]:
        """(n_pages, chunks per page) items, strided by page and by chunk of this slab class.

        Row p has a meaning only while `pages[p]` is of this class: `segment.items(c)[segment.pages["cls"] == c]` copies those (and
        any page that was of the class before; check the kind in `pages["word"]`).
        """
        n_classes = int(self.header["n_classes"])
        if not 0 <= class_id < n_classes:
            raise errors.UsageError(f"class_id is 0 to {n_classes - 1}, not {class_id}")
        header = self.header
        chunk = int(self.classes["chunk_bytes"][class_id])
        page_bytes = 1 << int(header["page_shift"])
        return self._array(
            dtypes()["item"], (int(header["n_pages"]), page_bytes // chunk), int(header["slab_off"]), (page_bytes, chunk)
        )


def format_layout() -> str:
    """The layout as a table, from the dtypes."""
    lines = []
    for struct, dtype in dtypes().items():
        lines.append(f"{struct}: {dtype.itemsize} bytes")
        fields: Any = dtype.fields
        lines += [f"  {fields[n][1]:5}  {fields[n][0]!s:16}  {n}" for n in dtype.names or ()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(format_layout())
