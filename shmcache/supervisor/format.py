"""The bytes of snapshot files and of append-log segment files: the one module that knows them.

A file is a preamble, then blocks to its end: HEAD, any number of RECORDS and, in a snapshot, END. Every byte is under a checksum (the
preamble's, a block header's, a payload's) and every block carries its number, so that one that is missing, repeated or out of place is
found. All numbers are little-endian and unsigned. `python -m shmcache.supervisor.format` prints the layout from the tables below.

Invariants
  F1  what a reader yields is what a writer was given, or DamagedFile is raised: never other bytes, never another exception for damage
  F2  a length is believed only under its checksum, and a read allocates no more than the file still has; decompression no more than
      raw_bytes says, and that no more than zstd can make of so few bytes
  F3  a snapshot ends with END at its last byte. What a reader yielded of one counts only once it is exhausted
  F4  a log may end anywhere: a writer died, or the power went, with pages on the disk in any order. What is not whole is damage if a
      whole block behind it says that it was synced; else a torn tail begins there, cut and reported (Reader.torn, torn_bytes), even if
      whole blocks follow
  F5  what a reader yields of a log is a prefix of its blocks, and after a power cut no shorter than what was fsynced

A bit that flips in a log where no later block says that it was synced cannot be told from a torn write, so it is a torn tail; so are
zeros allocated ahead. A tail that ends exactly between two blocks cannot be told from a log that was shorter. A whole block that is not
the one that must stand there is damage, synced or not: a file is written once, from front to back, and what did not reach the disk reads
as zeros.

A file of a newer version is refused, never tried: the preamble is what all versions have in common.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol
from zlib import crc32

import msgpack

from shmcache import errors

FORMAT = 1  # a bump = files of the version before cannot be restored, unless its reader is kept

FileKind = Literal["snapshot", "log"]
Buffer = bytes | bytearray | memoryview

MAGIC: dict[str, bytes] = {"snapshot": b"shmcache-snapsht", "log": b"shmcache-applog\n"}

# Kinds of blocks. Numbers are the format: never reused.
HEAD, RECORDS, END = 1, 2, 3
KINDS = {
    HEAD: ("HEAD", "msgpack map; block 0 and no other; never compressed"),
    RECORDS: ("RECORDS", "records back to back"),
    END: ("END", "msgpack map; the last block of a snapshot, a log has none; never compressed"),
}
COMPRESSED = 1  # flag: the payload is one zstd frame that states its length

# Operations of records. Numbers are the format: never reused.
SET, DELETE, EXPIRY, CLEAR, GAP = 0, 1, 2, 3, 5  # 4 stands in rings only (core/record.pxd)
OPS = {
    SET: ("SET", "the key has this value"),
    DELETE: ("DELETE", "the key is gone, or was not there; no value"),
    EXPIRY: ("EXPIRY", "only expires_ms changes; no value"),
    CLEAR: ("CLEAR", "items of an earlier epoch than this are gone; no key, no value"),
    GAP: ("GAP", "operations before this are not in the log: version says how many; no key, no value"),
}

MAX_KEY_BYTES = 4096  # the core's

FIELDS = {  # struct -> (field, struct code, meaning)
    "preamble": (
        ("magic", "16s", "which kind of file it is: " + ", ".join(f"{m!r} {k}" for k, m in MAGIC.items())),
        ("version", "I", f"of the format: {FORMAT}"),
        ("preamble_crc", "I", "crc32 of the bytes before"),
    ),
    "block": (
        ("kind", "I", ", ".join(f"{n} {name}" for n, (name, _) in KINDS.items())),
        ("flags", "I", f"{COMPRESSED}: the payload is one zstd frame that states its length; other bits are 0"),
        ("stored_bytes", "I", "length of the payload, which follows, as it stands in the file"),
        ("raw_bytes", "I", "length of the payload once decompressed; stored_bytes if it is not compressed"),
        ("number", "Q", "0, 1, 2 ... in the file"),
        ("synced", "Q", "offset up to which this file was known to be on the disk when this block was written; 0 in a snapshot"),
        ("payload_crc", "I", "crc32 of the payload as it stands in the file"),
        ("header_crc", "I", "crc32 of this header's bytes before"),
    ),
    "record": (
        ("version", "Q", "of the key: the stripe's sequence, the CAS version; per key the highest wins"),
        ("expires_ms", "Q", "wall clock, ms since the epoch of 1970; 0: never"),
        ("value_bytes", "I", "length of the value, which follows the key"),
        ("stripe", "I", "of the key"),
        ("epoch", "I", "of the item: clear() counts it up"),
        ("key_bytes", "H", f"length of the key, which follows: 1 to {MAX_KEY_BYTES}, of a CLEAR or GAP 0"),
        ("codec", "B", "of the value (codec.py)"),
        ("op", "B", "lower half: " + ", ".join(f"{n} {name}" for n, (name, _) in OPS.items())
         + "; upper half: CLOCK count of a SET (16, 32); write-back: 64 its time is the cached copy's, 128 the store has not got it"),
    ),
}


def _struct(name: str) -> struct.Struct:
    return struct.Struct("<" + "".join(code for _, code, _ in FIELDS[name]))


PREAMBLE = _struct("preamble")  # <16sII
BLOCK = _struct("block")  # <IIIIQQII
RECORD = _struct("record")  # <QQIIIHBB

MAX_PAYLOAD_BYTES = (1 << 32) - 1  # a value is not split, and may have nearly so many
MAX_VALUE_BYTES = MAX_PAYLOAD_BYTES - RECORD.size - MAX_KEY_BYTES  # fits a block whatever its key
MAX_MAP_BYTES = 4 << 20  # of HEAD and END: 65,536 stripes' sequences have 0.6 MB
MAX_MAP_LIST = 1 << 16  # msgpack allocates what a list says before it has seen an element
ZSTD_MOST = 1 << 15  # bytes out of one in: a zstd block gives 128 KiB and has 4 bytes at least
CRC_BYTES = 4  # a checksum ends the preamble and the block header, and covers all before it
PIECE = 1 << 20  # bytes in hand while a tail is searched
SECTOR = 512  # bytes: the least that a disk writes as one
UNREADABLE = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)  # of a read: the disk or the file system has lost these bytes


# ---- records ------------------------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """One change of one key, or a clear()."""

    op: int  # SET, DELETE, EXPIRY, CLEAR
    key: bytes
    value: bytes
    version: int
    expires_ms: int  # wall clock, ms since 1970; 0: never
    stripe: int
    epoch: int
    codec: int
    refs: int = 0  # CLOCK count


def _record_fault(op: int, key_bytes: int, value_bytes: int, refs: int) -> str:
    """What is wrong with these, or nothing."""
    if op not in OPS:
        return f"op {op}, which there is not"
    if op in (CLEAR, GAP) and key_bytes:
        return f"a {OPS[op][0]} with a key"
    if op not in (CLEAR, GAP) and not 1 <= key_bytes <= MAX_KEY_BYTES:
        return f"a key of {key_bytes} bytes"
    if op != SET and value_bytes:
        return f"{OPS[op][0]} with a value"
    if op not in (SET, EXPIRY) and refs:
        return f"{OPS[op][0]} with a CLOCK count"
    return ""


def pack_record(
    op: int, key: bytes = b"", value: bytes = b"", *, version: int, expires_ms: int = 0, stripe: int = 0, epoch: int = 0, codec: int = 0,
    refs: int = 0,
) -> bytes:
    """A record's bytes. Args: as Record's. Raises: UsageError; struct.error for a number that its field cannot hold."""
    if fault := _record_fault(op, len(key), len(value), refs):
        raise errors.UsageError(f"no such record: {fault}")
    return RECORD.pack(version, expires_ms, len(value), stripe, epoch, len(key), codec, refs << 4 | op) + key + value


def records(payload: Buffer, path: str = "a RECORDS payload", offset: int = 0) -> Iterator[Record]:
    """The records of a RECORDS block. Args: path, offset: of the block, for the error. Raises: DamagedFile."""
    n_bytes = len(payload)
    at = 0
    while at < n_bytes:
        fault = "its header overruns the payload"
        if at + RECORD.size <= n_bytes:
            version, expires_ms, value_bytes, stripe, epoch, key_bytes, codec, packed = RECORD.unpack_from(payload, at)
            refs, op = divmod(packed, 16)
            value_at = at + RECORD.size + key_bytes
            behind = value_at + value_bytes
            fault = "it overruns the payload" if behind > n_bytes else _record_fault(op, key_bytes, value_bytes, refs)
        if fault:
            raise errors.DamagedFile(path, offset, f"the record at byte {at} of this block's payload: {fault}")
        key = bytes(payload[at + RECORD.size : value_at])
        yield Record(op, key, bytes(payload[value_at:behind]), version, expires_ms, stripe, epoch, codec, refs)
        at = behind


# ---- HEAD and END -------------------------------------------------------------------------------------------------------------


def _refuse_extension(number: int, data: bytes) -> Any:
    raise ValueError(f"msgpack extension type {number}")


def _unpack_map(packed: Buffer) -> dict[str, Any]:
    """The map. Raises: ValueError, with the reason."""
    try:
        unpacked = msgpack.unpackb(packed, ext_hook=_refuse_extension, max_array_len=MAX_MAP_LIST)  # keys: str and bytes only
    except (ValueError, msgpack.UnpackException) as e:  # all it has for damage, since no hook of ours raises another
        raise ValueError(f"msgpack cannot read it ({type(e).__name__}: {e})") from None
    if not isinstance(unpacked, dict) or not all(isinstance(key, str) for key in unpacked):
        raise ValueError("it is no map with str keys")
    return unpacked


def _pack_map(content: Mapping[str, Any]) -> bytes:
    """Read back before it is written: what a reader refuses must not get into a file. Raises: UnsupportedValue."""
    try:
        packed: bytes = msgpack.packb(content)
        _unpack_map(packed)
    except (TypeError, ValueError, OverflowError) as e:
        raise errors.UnsupportedValue(f"HEAD and END are maps of plain data with str keys: {e}") from None
    if len(packed) > MAX_MAP_BYTES:
        raise errors.UnsupportedValue(f"HEAD and END have {MAX_MAP_BYTES} bytes at most, not {len(packed)}")
    return packed


def _zstd() -> Any:
    """Raises: InvalidConfig if it is not installed."""
    try:
        import zstandard
    except ImportError:
        raise errors.InvalidConfig('compressed files need zstandard: pip install "shmcache[zstd]"') from None
    return zstandard


# ---- writing ------------------------------------------------------------------------------------------------------------------


class Writable(Protocol):
    """All that Writer asks of a file. write() may take less than it is given; None is nothing taken, as with raw files."""

    def write(self, data: memoryview, /) -> int | None: ...


class Writer:
    """Writes one file from its first byte. The caller opens it, flushes, syncs, renames and closes it.

    Args:
        kind: "snapshot" or "log".
        head: the HEAD map: plain data, str keys. A tuple comes back as a list.
        compress: RECORDS payloads by zstd, where that makes them smaller.

    Raises: InvalidConfig, UnsupportedValue; OSError, from any method. Behind a failed write may stand half a block, so that nothing
    more is written: the file is finished.
    """

    def __init__(self, file: Writable, kind: FileKind, head: Mapping[str, Any], *, compress: bool = False) -> None:
        if kind not in MAGIC:
            raise errors.InvalidConfig(f"kind is 'snapshot' or 'log', not {kind!r}")
        self.kind = kind
        self.bytes_written = 0
        self._file = file
        self._number = 0
        self._synced = 0
        self._finished = ""  # why nothing more may be written
        self._compressor = _zstd().ZstdCompressor() if compress else None
        packed = _pack_map(head)
        self._write(preamble(kind))
        self._block(HEAD, 0, packed, len(packed))

    def records(self, payload: Buffer) -> int:
        """Write a RECORDS block; the payload is neither copied nor kept. Returns: bytes written. Raises: UsageError, OSError."""
        with memoryview(payload) as view:
            raw_bytes = view.nbytes
            if raw_bytes > MAX_PAYLOAD_BYTES:
                raise errors.UsageError(f"a block has {MAX_PAYLOAD_BYTES} bytes at most, not {raw_bytes}")
            if self._compressor is not None:
                packed: bytes = self._compressor.compress(view)
                if len(packed) < raw_bytes:
                    return self._block(RECORDS, COMPRESSED, packed, raw_bytes)
            return self._block(RECORDS, 0, view, raw_bytes)

    def end(self, content: Mapping[str, Any]) -> int:
        """Write a snapshot's END block. Returns: bytes written. Raises: UsageError, UnsupportedValue, OSError."""
        if self.kind != "snapshot":
            raise errors.UsageError("a log has no END")
        packed = _pack_map(content)
        n_bytes = self._block(END, 0, packed, len(packed))
        self._finished = "its END is written"
        return n_bytes

    def synced(self, n_bytes: int | None = None) -> None:
        """Say that the first n_bytes of this log (None: all that is written so far) are on the disk: an fsync that began behind their last
        write has succeeded, and none failed before (the kernel may forget what it could not write). Blocks written from now on tell the
        reader; an empty one will do. Raises: UsageError for a snapshot."""
        if self.kind != "log":
            raise errors.UsageError("a snapshot does not say what is synced")
        self._synced = self.bytes_written if n_bytes is None else n_bytes

    def _block(self, kind: int, flags: int, stored: Buffer, raw_bytes: int) -> int:
        with memoryview(stored) as view:
            header = BLOCK.pack(kind, flags, view.nbytes, raw_bytes, self._number, self._synced, crc32(view), 0)[:-CRC_BYTES]
            n_bytes = self._write(header + crc32(header).to_bytes(CRC_BYTES, "little"), view)
        self._number += 1
        return n_bytes

    def _write(self, *buffers: Buffer) -> int:
        if self._finished:
            raise errors.UsageError(f"nothing more can be written to this file: {self._finished}")
        self._finished = "an earlier write failed"  # until all of this is written
        n_bytes = sum(_write_all(self._file, buffer) for buffer in buffers)
        self._finished = ""
        self.bytes_written += n_bytes
        return n_bytes


def preamble(kind: FileKind) -> bytes:
    """The first bytes of such a file."""
    start = PREAMBLE.pack(MAGIC[kind], FORMAT, 0)[:-CRC_BYTES]
    return start + crc32(start).to_bytes(CRC_BYTES, "little")


def _write_all(file: Writable, buffer: Buffer) -> int:
    # every view is released whatever happens: the caller may want to resize its bytearray
    with memoryview(buffer) as view, view.cast("B") as flat:
        return _write_view(file, flat)


def _write_view(file: Writable, flat: memoryview) -> int:
    done = 0
    while done < len(flat):
        with flat[done:] as rest:
            taken = file.write(rest)
        if taken is None or not 0 < taken <= len(flat) - done:
            raise OSError(errno.EIO, f"a write of {len(flat) - done} bytes returned {taken}")
        done += taken
    return done


# ---- reading ------------------------------------------------------------------------------------------------------------------


class Readable(Protocol):
    """All that Reader asks of a binary file."""

    def seek(self, offset: int, whence: int = ..., /) -> int: ...
    def readinto(self, buffer: memoryview, /) -> int | None: ...
    def close(self) -> None: ...


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Open to read what a directory lists under the name of a file of ours. It never waits: a fifo of that name has no writer.
    Raises: DamagedFile if it is no regular file; OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as e:
        if e.errno != errno.ENXIO:  # a socket, or a device without a driver
            raise
    else:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return io.FileIO(fd, "rb")
        os.close(fd)
    raise errors.DamagedFile(str(path), 0, "this is no regular file")


class _Header(NamedTuple):
    kind: int
    flags: int
    stored_bytes: int
    raw_bytes: int
    number: int
    synced: int
    payload_crc: int
    header_crc: int

    def fault(self, at: int, number: int, file_kind: str) -> str:
        """What is wrong with a header whose checksum is right, in this place; or nothing."""
        if self.number != number:
            return f"block {self.number} stands where block {number} must be: one is missing, repeated or out of place"
        if self.kind not in KINDS or (self.kind == HEAD) != (number == 0) or (self.kind == END and file_kind == "log"):
            return f"a block of kind {self.kind} where there must be none"
        if self.flags & ~COMPRESSED or (self.flags and self.kind != RECORDS):
            return f"flags {self.flags} for a block of kind {self.kind}"
        if self.raw_bytes > self.stored_bytes * ZSTD_MOST if self.flags else self.raw_bytes != self.stored_bytes:
            return f"{self.raw_bytes} raw bytes cannot be of {self.stored_bytes} stored ones"
        if self.kind != RECORDS and self.raw_bytes > MAX_MAP_BYTES:
            return f"a map of {self.raw_bytes} bytes"
        if self.synced > (at if file_kind == "log" else 0):
            return f"{self.synced} bytes synced cannot be, in a {file_kind} before byte {at}"
        return ""


class _NotWhole(Exception):
    """A block that is torn or damaged. search_from: where a later one may begin."""

    def __init__(self, what: str, search_from: int) -> None:
        self.what, self.search_from = what, search_from


# how the header of a RECORDS block begins, the only kind that can follow in a log
_RECORDS_BEGIN = re.compile(re.escape(struct.pack("<I", RECORDS)) + b"[\0" + bytes([COMPRESSED]) + b"]\0\0\0")


class Reader:
    """Reads one file, a block at a time; what others append to it meanwhile is not seen.

    Args:
        source: a path, or a seekable binary file, which the caller closes.
        kind: "snapshot" or "log"; a file of the other kind is refused. None: whatever it is; then a log that is torn within its
            first 16 bytes is refused, since it could be anything.

    Attributes:
        kind, path, size_bytes: of the file.
        head: the HEAD map; empty if torn is 0.
        end: a snapshot's END map, once blocks() is exhausted.
        torn: offset of a log's torn tail, once blocks() has come to it: cut the file there. 0: not even HEAD is whole, remove the file.
        torn_bytes: how many bytes are cut off with it; 0 if there is no torn tail.

    Raises: DamagedFile, NewerFormat; InvalidConfig at a compressed block without zstandard; OSError.
    """

    def __init__(self, source: str | os.PathLike[str] | Readable, kind: FileKind | None = None) -> None:
        self._owned = isinstance(source, (str, os.PathLike))
        self._file: Readable = open_regular(source) if isinstance(source, (str, os.PathLike)) else source
        self.path = str(source if self._owned else getattr(source, "name", "a file without a name"))
        self.head: dict[str, Any] = {}
        self.end: dict[str, Any] | None = None
        self.torn: int | None = None
        try:
            self.size_bytes = self._file.seek(0, os.SEEK_END)
            self.kind = self._check_preamble(kind)
            self._first = PREAMBLE.size  # offset of the first block behind HEAD
            block = self._block_or_torn(PREAMBLE.size, 0) if self.torn is None else None
            if block is None:
                self.torn = 0
            else:
                self.head = self._map(PREAMBLE.size, block[1])
                self._first += BLOCK.size + block[0].stored_bytes
        except BaseException:
            self.close()
            raise

    @property
    def torn_bytes(self) -> int:
        return 0 if self.torn is None else self.size_bytes - self.torn

    def close(self) -> None:
        if self._owned:
            self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def blocks(self) -> Iterator[tuple[int, memoryview]]:
        """(offset, payload) of each RECORDS block, in order; decompressed, read-only. Afterwards `end` or `torn` is set.
        Raises: DamagedFile, InvalidConfig, OSError."""
        if self.torn == 0:
            return
        at, number = self._first, 1
        while at < self.size_bytes:
            block = self._block_or_torn(at, number)
            if block is None:
                self.torn = at
                return
            header, payload = block
            behind = at + BLOCK.size + header.stored_bytes
            if header.kind == END:
                if behind != self.size_bytes:
                    raise self._damaged(behind, "there are bytes behind END")
                self.end = self._map(at, payload)
                return
            yield at, self._raw(at, header, payload)
            del block, payload  # do not hold it while the next is read
            at, number = behind, number + 1
        if self.kind == "snapshot":
            raise self._damaged(at, "the file ends without END: it is not the whole snapshot")

    def _damaged(self, offset: int, what: str) -> errors.DamagedFile:
        return errors.DamagedFile(self.path, offset, what)

    def _check_preamble(self, wanted: FileKind | None) -> FileKind:
        """Which kind of file it is. torn becomes 0 if it is a log whose torn tail begins within its preamble."""
        sector = bytes(self._read(0, min(SECTOR, self.size_bytes)))
        start = sector[: PREAMBLE.size]
        found: FileKind | None = next((k for k in ("snapshot", "log") if start.startswith(MAGIC[k])), None)
        if found and wanted and found != wanted:
            raise self._damaged(0, f"this is a {found}, not a {wanted}")
        if found and len(start) == PREAMBLE.size and crc32(start[:-CRC_BYTES]) == PREAMBLE.unpack(start)[2]:
            version = PREAMBLE.unpack(start)[1]
            if version > FORMAT:
                raise errors.NewerFormat(
                    f"{self.path} was written by a newer version of shmcache (format {version}; this one reads {FORMAT}): use that version"
                )
            if version < FORMAT:
                raise self._damaged(0, f"format {version}, which there never was")
            return found
        # all that a torn write leaves: a part of it, or nothing, and zeros behind
        torn = "log" in (found, wanted) and preamble("log").startswith(sector.rstrip(b"\0"))
        if not found and not torn:
            raise self._damaged(0, f"this is no shmcache {wanted or 'snapshot or log'}")
        what = f"the first {PREAMBLE.size} bytes are damaged or not all there"
        if not torn:
            raise self._damaged(0, what)
        self._check_never_synced(0, -1, what, len(start))
        self.torn = 0
        return "log"

    def _block_or_torn(self, at: int, number: int) -> tuple[_Header, bytearray] | None:
        """The block at this offset; None if a log's torn tail begins there. Raises: DamagedFile."""
        try:
            return self._block(at, number)
        except _NotWhole as e:
            what, search_from = e.what, e.search_from  # not e itself: its traceback holds the payload
        if self.kind != "log":
            raise self._damaged(at, what)
        self._check_never_synced(at, number, what, search_from)
        return None

    def _check_never_synced(self, at: int, number: int, what: str, search_from: int) -> None:
        """A log's torn tail begins here, with a block that is not whole. Raises: DamagedFile if a later one says that it was synced."""
        # Whole blocks may follow: pages reach the disk in any order. They are dropped too: replayed without the lost one, they could show
        # an older state of its keys beside a newer one of theirs, which never was. That breaks no promise: what was never fsynced was
        # never promised, and an fsync of any block behind would have put this one on the disk as well.
        later = self._says_synced(at, number, search_from)
        if later is not None:
            raise self._damaged(at, f"{what}, and the block at byte {later} says that it was on the disk")

    def _block(self, at: int, number: int) -> tuple[_Header, bytearray]:
        """The block at this offset, whole and in its place. Raises: _NotWhole; DamagedFile for what no torn write leaves."""
        if self.size_bytes - at < BLOCK.size:
            raise _NotWhole("the file ends inside a block header", self.size_bytes)
        raw = self._read(at, BLOCK.size)
        header = _Header(*BLOCK.unpack(raw))
        if crc32(raw[:-CRC_BYTES]) != header.header_crc:
            raise _NotWhole("a block header does not match its checksum", at + 1)
        if fault := header.fault(at, number, self.kind):
            raise self._damaged(at, fault)
        behind = at + BLOCK.size + header.stored_bytes
        if behind > self.size_bytes:
            raise _NotWhole("the file ends inside a block's payload", self.size_bytes)
        payload = self._read(at + BLOCK.size, header.stored_bytes)
        if crc32(payload) != header.payload_crc:
            # not searched: a value may hold a copy of a log
            raise _NotWhole("a block's payload does not match its checksum", behind)
        return header, payload

    def _says_synced(self, lost_at: int, number: int, at: int) -> int | None:
        """Offset of the first whole RECORDS block of a higher number, from `at` on, that says that what stood at lost_at was synced."""
        while at + BLOCK.size <= self.size_bytes:
            piece = self._read(at, min(PIECE + BLOCK.size - 1, self.size_bytes - at))  # any header that begins in PIECE is whole
            for match in _RECORDS_BEGIN.finditer(piece):
                raw = piece[match.start() : match.start() + BLOCK.size]
                if len(raw) < BLOCK.size or crc32(raw[:-CRC_BYTES]) != BLOCK.unpack(raw)[-1]:
                    continue
                header = _Header(*BLOCK.unpack(raw))
                found_at = at + match.start()
                payload_at = found_at + BLOCK.size
                if (
                    header.number > number
                    and lost_at < header.synced <= found_at
                    and payload_at + header.stored_bytes <= self.size_bytes
                    and self._crc(payload_at, header.stored_bytes) == header.payload_crc
                ):
                    return found_at
            at += PIECE
        return None

    def _raw(self, at: int, header: _Header, payload: bytearray) -> memoryview:
        if not header.flags & COMPRESSED:
            return memoryview(payload).toreadonly()
        zstd = _zstd()
        try:
            # checked first: the frame's own length is what zstandard allocates, whatever max_output_size says
            if zstd.frame_content_size(payload) == header.raw_bytes:
                raw = zstd.ZstdDecompressor().decompress(payload, max_output_size=header.raw_bytes, allow_extra_data=False)
                if len(raw) == header.raw_bytes:
                    return memoryview(raw)
        except zstd.ZstdError:
            pass
        raise self._damaged(at, f"the payload is not one zstd frame of {header.raw_bytes} bytes")

    def _map(self, at: int, payload: bytearray) -> dict[str, Any]:
        try:
            return _unpack_map(payload)
        except ValueError as e:
            raise self._damaged(at, f"the map of this block is damaged: {e}") from None

    def _read(self, at: int, n_bytes: int) -> bytearray:
        """Exactly so many bytes. Read, not mapped: a file that another truncates would kill a process that has it mapped."""
        data = bytearray(n_bytes)
        self._file.seek(at)
        with memoryview(data) as view:
            self._fill(at, view)
        return data

    def _fill(self, at: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            with view[done:] as rest:
                n_read = self._readinto(at + done, rest)
            if not n_read:
                raise self._damaged(at + done, "the file became shorter while it was read")
            done += n_read

    def _readinto(self, at: int, view: memoryview) -> int | None:
        try:
            return self._file.readinto(view)
        except OSError as e:
            if e.errno not in UNREADABLE:
                raise
            raise self._damaged(at, f"the disk does not give these bytes back ({e.strerror})") from None

    def _crc(self, at: int, n_bytes: int) -> int:
        crc = 0
        for start in range(at, at + n_bytes, PIECE):
            crc = crc32(self._read(start, min(PIECE, at + n_bytes - start)), crc)
        return crc


# ---- names of files -----------------------------------------------------------------------------------------------------------

_NAME = re.compile(r"(snapshot|log)-([0-9]+)\.shmcache")


def snapshot_name(number: int) -> str:
    return f"snapshot-{number:012d}.shmcache"


def log_name(number: int) -> str:
    return f"log-{number:012d}.shmcache"


def number_of(name: str, kind: str) -> int | None:
    """Of a file of this name; None if no such file has it."""
    match = _NAME.fullmatch(name)
    if match and match[1] == kind and name == f"{kind}-{int(match[2]):012d}.shmcache":  # one name per number
        return int(match[2])
    return None


def listing(folder: str | os.PathLike[str]) -> tuple[list[tuple[int, Path]], list[tuple[int, Path]]]:
    """(snapshots, logs) of a folder, each as (number, path), ascending. Other names, temporary ones too, are left out. Raises: OSError."""
    paths = list(Path(folder).iterdir())
    snapshots, logs = (sorted((n, path) for path in paths if (n := number_of(path.name, kind)) is not None) for kind in MAGIC)
    return snapshots, logs


def gaps(numbers: Iterable[int]) -> list[range]:
    """What is missing between the lowest and the highest number: gaps([1, 2, 5]) == [range(3, 5)]."""
    ordered = sorted(set(numbers))
    return [range(a + 1, b) for a, b in pairwise(ordered) if b > a + 1]


# ---- documentation ------------------------------------------------------------------------------------------------------------


def documentation() -> str:
    """The layout as text, from the tables that the code uses."""
    lines = [f"shmcache file format {FORMAT}. A file: preamble, HEAD, RECORDS ..., and in a snapshot END. Little-endian, unsigned."]
    for name, fields in FIELDS.items():
        lines += ["", f"{name}: {_struct(name).size} bytes", "  offset  bytes  field"]
        at = 0
        for field, code, meaning in fields:
            size = struct.calcsize("<" + code)
            lines.append(f"  {at:6}  {size:5}  {field:13} {meaning}")
            at += size
    for title, table in (("kinds of blocks", KINDS), ("operations of records", OPS)):
        lines += ["", title, *(f"  {number}  {name:8} {meaning}" for number, (name, meaning) in table.items())]
    limits = {
        "key": MAX_KEY_BYTES,
        "value": MAX_VALUE_BYTES,
        "payload": MAX_PAYLOAD_BYTES,
        "HEAD, END": MAX_MAP_BYTES,
        "list in them": MAX_MAP_LIST,
    }
    return "\n".join([*lines, "", "at most, in bytes; of a list, elements", *(f"  {name:13} {most}" for name, most in limits.items())])


if __name__ == "__main__":
    print(documentation())
