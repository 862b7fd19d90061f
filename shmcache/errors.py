"""Every exception and warning of shmcache.

Three families under `ShmcacheError`:

- `UsageError`: the call cannot be right. Nothing was changed; the segment is sound. Change the call.
- `CapacityError`: no room or no time. Nothing was changed; the segment is sound. Make room, or try again.
- `DamageError`: the bytes are not what they must be. Do not use the segment; verify or unlink it. Of a file: put it aside.

A miss is a value, never an error; a time-out is an error, never a miss.
"""


class ShmcacheError(Exception):
    """Base of all errors of this package."""


class UsageError(ShmcacheError):
    """The call cannot be right. Nothing was changed, the segment is sound. Change the call."""


class CapacityError(ShmcacheError):
    """No room or no time. Nothing was changed, the segment is sound. Make room, or try again."""


class DamageError(ShmcacheError):
    """The segment's bytes are not what they must be. Unlink it, or look at it with verify()."""


class InvalidKey(UsageError, ValueError):
    """A key is bytes, or a str that has a UTF-8 form, of 1 to 4,096 bytes; so is a name that is part of one. Shorten, hash or encode it."""


class InvalidKeyType(InvalidKey, TypeError):
    """A key is bytes or str, and several keys are a list. Convert it, for example with str(key)."""


class ValueTooLarge(UsageError, ValueError):
    """The encoded value is over the segment's limit. Split it, or create the segment with a larger max_value."""


class UnsupportedValue(UsageError, TypeError):
    """The codec cannot give this value back equal and of the same type. Convert it, or open with codec="pickle"."""


class CodecMismatch(UsageError, ValueError):
    """The value was written by a codec that this handle does not read. Open the cache with that codec."""


class NotANumber(UsageError, TypeError):
    """incr and decr work on values that were set as int. Set the key to an int first."""


class CounterOverflow(UsageError, OverflowError):
    """The counter would leave the signed 64-bit range; it keeps its value. Reset it."""


class InvalidTTL(UsageError, ValueError):
    """A ttl is a finite number of seconds, zero or more, or a timedelta, or None. Pass such a one."""


class InvalidTag(InvalidKey):
    """A tag is a str of 1 to 200 bytes in UTF-8, and an item has at most 16, in a tuple. Shorten it, or use fewer."""


class InvalidTagType(InvalidTag, InvalidKeyType):
    """A tag is a str, and tags are a tuple of them. Convert it, for example with str(tag)."""


class InvalidName(UsageError, ValueError):
    """A segment name is 1 to 200 characters without a slash, not '.' or '..'. Choose another."""


class InvalidNamespace(InvalidKey, InvalidName):
    """The name of a namespace is bytes or str of 1 to 200 bytes, none of them NUL. Choose another."""


class InvalidConfig(UsageError, ValueError):
    """An argument of create or open is out of range, of the wrong type, or unknown; the message names it."""


class InvalidSize(InvalidConfig):
    """A size is a number of bytes, or a number with K, M, G or T, at least 4M. Pass such a one."""


class SegmentExists(UsageError, FileExistsError):
    """A live segment has this name. attach() or open() it, or unlink() it first."""


class SegmentNotFound(UsageError, FileNotFoundError):
    """No segment has this name. create() or open() it."""


class SegmentForbidden(UsageError, PermissionError):
    """The segment may not be opened by this user. Create it with mode= and group=, or run as its owner."""


class ForeignSegment(SegmentForbidden):
    """The segment belongs to another user, who could have put anything there. Trust it with owner= or group=."""


class CacheClosed(UsageError, ValueError):
    """The handle was closed. Attach or open the cache again."""


class ViewsInUse(UsageError, BufferError):
    """numpy views of the segment are still in use; unmapping it would crash them. Delete them, then close."""


class SharedMemoryFull(CapacityError, OSError):
    """/dev/shm has not that many bytes free. Ask for less, or make it larger (mount -o remount,size=, --shm-size)."""


class TooManyProcesses(CapacityError):
    """All process rows are taken by living processes. Create the segment with a larger max_processes."""


class StripeBusy(CapacityError):
    """A process that is alive but does not run (stopped, out of CPU quota) holds what this call needs. Try again."""


class NoRoom(CapacityError):
    """Nothing could be evicted for this value just now. Try again, or create a larger segment."""


class BeingRestored(CapacityError):
    """It is not certain yet that the segment can be restored, and nobody is in it. From unlink(), and from a restore, also: a process is
    stopped that was about to take the segment's name from it.

    Attributes: abandoned: the process that restored it has ended: restore it again, or unlink it. Else try again.
    """

    abandoned = False


class SupervisorRunning(UsageError):
    """The segment has a supervisor already; there is exactly one. End that one first."""


class NewerFormat(UsageError):
    """A newer version of shmcache wrote the snapshot or log file. Use that version, or move the file away."""


class DataDirInUse(UsageError):
    """Another process writes to this data directory. Give each segment one of its own."""


class ForeignDataDir(UsageError):
    """The data directory holds another segment's snapshots. Use another directory, or the segment's own name."""


class NoSnapshot(UsageError):
    """The data directory holds no snapshot that is whole. Create the segment empty, or use another directory."""


class SnapshotStopped(CapacityError):
    """The snapshot was stopped before it was whole; nothing of it is left. Write another."""


class LogFull(CapacityError):
    """The log takes nothing, and its policy is always; nothing was changed. Start the supervisor, make room on its disk, try again."""


class NotDurable(CapacityError):
    """The write was done and everybody sees it, but it is not known to be on the disk. See that the supervisor runs, and write it again."""


class LivenessUnknown(CapacityError):
    """The kernel does not keep open-file-description locks on this file system, so the dead could not be told."""


class StoreUnavailable(CapacityError):
    """The store (a database, a service) is down, busy or too slow. What was asked is done or not; try again, which does no harm.

    Attributes: unsettled: it may even be going on still, and be done later (a COMMIT, or a request, whose answer was lost).
    """

    unsettled = False


class StoreRefused(UsageError):
    """The store will never do this: its table, its rights or the value are not made for it. Change what the message names."""


class StoreNeeded(UsageError):
    """The segment stands before a store, and this handle has none. Open it with store=; nothing was changed."""


class RowsRefused(StoreRefused):
    """The store will never take some of the rows; the others were done. Change those rows, or leave them out.

    Attributes: errors: key -> what is wrong with its row. unsettled: as of StoreUnavailable, of one of these rows.
    """

    unsettled = False

    def __init__(self, errors: dict[bytes, Exception]) -> None:
        super().__init__(errors)
        self.errors = errors

    def __str__(self) -> str:
        shown = "; ".join(f"{key!r:.100}: {error}" for key, error in list(self.errors.items())[:3])
        more = len(self.errors) - 3
        return f"rows refused: {shown}{f'; and {more} more' if more > 0 else ''}. Change them, or leave them out; the others were done"


class NotASegment(DamageError):
    """The object of this name is not a shmcache segment (or is damaged). Unlink it, or choose another name."""


class LayoutMismatch(DamageError):
    """Another version or ABI of shmcache made the segment. Use that version, or unlink it and start cold."""


class SegmentTruncated(DamageError):
    """The segment is shorter than its header says. Unlink it and create it again."""


class DamagedFile(DamageError):
    """A snapshot or log file is damaged. Put a copy in its place, or move it away and start from what is left.

    Attributes: path; offset: in bytes, of what is damaged; what: is wrong there.
    """

    def __init__(self, path: str, offset: int, what: str) -> None:
        super().__init__(path, offset, what)
        self.path, self.offset, self.what = path, offset, what

    def __str__(self) -> str:
        return f"{self.path}, byte {self.offset}: {self.what}; put a copy in its place, or move it away and start from what is left"


class ConfigMismatch(UserWarning):
    """open() was given arguments that differ from those of the live segment; the segment's stay in force."""


class SharedName(UserWarning):
    """Two functions of this process are memoized under one name=, and may be given each other's results. Give each its own."""


class LockLost(UserWarning):
    """A block under cache.lock ended, or its process closed its last handle, when others may have been in: its ttl was over, or the lock
    went with the handle. Give it more time; close behind the block."""


class HugePagesRefused(UserWarning):
    """create() was asked for huge pages and the kernel gave none, or too few: they are small. Free memory, or allow them."""
