"""Snapshot and log files: what is read is what was written, or the damage is named; whatever happens to the bytes."""

from __future__ import annotations

import gc
import io
import itertools
import pickle
import random
import re
import struct
import subprocess
import sys
import tracemalloc
import warnings
from zlib import crc32

import msgpack
import numpy as np
import pytest

from shmcache import errors
from shmcache.core import _core
from shmcache.supervisor import format as f

KINDS = ("snapshot", "log")
HEAD_MAP = {"name": "web", "epoch": 3, "floors": [1, 2**64 - 1], "positions": b"\0\1"}
END_MAP = {"count": 5, "crc": None}
RECORDS = [
    f.Record(f.SET, b"key", b"value" * 9, 2**64 - 1, 1_795_000_000_000, 1023, 2**32 - 1, 3),
    f.Record(f.SET, b"k" * 4096, b"", 1, 0, 0, 0, 0),
    f.Record(f.DELETE, b"gone", b"", 7, 0, 5, 1, 0),
    f.Record(f.EXPIRY, b"\0", b"", 8, 1, 5, 1, 0),
    f.Record(f.CLEAR, b"", b"", 9, 0, 0, 2, 0),
]
SMALL = [b"", b"a", bytes(range(50)), b"\0" * 80 + b"z", b"abc" * 30]  # payloads that a reader of blocks does not look into


def packed(r: f.Record) -> bytes:
    numbers = {name: getattr(r, name) for name in ("version", "expires_ms", "stripe", "epoch", "codec", "refs")}
    return f.pack_record(r.op, r.key, r.value, **numbers)


def written(kind, payloads, compress=False, synced=True) -> tuple[bytes, list[int]]:
    """A file, and the offset of each block and of the file's end. synced: a log's before each RECORDS block, or never."""
    file = io.BytesIO()
    writer = f.Writer(file, kind, HEAD_MAP, compress=compress)
    offsets = [f.PREAMBLE.size, writer.bytes_written]
    for payload in payloads:
        if kind == "log" and synced:
            writer.synced()
        offsets.append(offsets[-1] + writer.records(payload))
    if kind == "snapshot":
        offsets.append(offsets[-1] + writer.end(END_MAP))
    assert offsets[-1] == writer.bytes_written == len(file.getvalue())
    return file.getvalue(), offsets


def synced_log(n_blocks, sync_odds, seed) -> tuple[bytes, list[int], list[int], int]:
    """A log written with syncs in between; the offset of each block and of its end; what each block says; what is synced in the end.
    Some payloads are copies of the log's own beginning."""
    rng = random.Random(seed)
    file = io.BytesIO()
    writer = f.Writer(file, "log", HEAD_MAP)
    offsets, says, synced = [f.PREAMBLE.size, writer.bytes_written], [0], 0
    for _ in range(n_blocks):
        if rng.random() < sync_odds:
            writer.synced()
            synced = offsets[-1]
        says.append(synced)
        n_bytes = rng.choice((0, rng.randrange(100), rng.randrange(1500)))
        writer.records(rng.choice((rng.randbytes(n_bytes), bytes(n_bytes), file.getvalue()[:n_bytes])))
        offsets.append(writer.bytes_written)
    if rng.random() < sync_odds:
        writer.synced()
        synced = offsets[-1]
    return file.getvalue(), offsets, says, synced


def block(kind, payload, number, *, flags=0, raw_bytes=None, stored_bytes=None, synced=0) -> bytes:
    """A block whose checksums are right, whatever else is not."""
    n_bytes = len(payload)
    header = struct.pack("<IIIIQQI", kind, flags, n_bytes if stored_bytes is None else stored_bytes, n_bytes if raw_bytes is None else raw_bytes,
                         number, synced, crc32(payload))  # fmt: skip
    return header + struct.pack("<I", crc32(header)) + payload


def log_of(*blocks: bytes) -> bytes:
    return f.preamble("log") + block(f.HEAD, b"\x80", 0) + b"".join(blocks)


def read(data, kind=None):
    """(reader, payloads) of a whole reading."""
    reader = f.Reader(io.BytesIO(data), kind)
    return reader, [bytes(payload) for _, payload in reader.blocks()]


def damage(data, kind=None) -> tuple[errors.DamagedFile, list[bytes]]:
    """What a reading raises, and the payloads before it."""
    payloads = []
    with pytest.raises(errors.DamagedFile) as e:
        for _, payload in f.Reader(io.BytesIO(data), kind).blocks():
            payloads.append(bytes(payload))
    return e.value, payloads


# ---- what is written is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, compress, tmp_path):
    path = tmp_path / "file"
    payloads = [b"".join(map(packed, RECORDS)), b"", random.Random(1).randbytes(3000), packed(RECORDS[0]) * 1000]
    with path.open("wb", buffering=0) as file:
        writer = f.Writer(file, kind, HEAD_MAP, compress=compress)
        sizes = [writer.records(make(p)) for make, p in zip((bytes, bytearray, memoryview, bytes), payloads, strict=True)]
        if kind == "snapshot":
            writer.end(END_MAP)
    assert path.stat().st_size == writer.bytes_written
    with f.Reader(path, kind) as reader:
        assert (reader.kind, reader.head, reader.end, reader.torn, reader.path) == (kind, HEAD_MAP, None, None, str(path))
        read_back = list(reader.blocks())
        assert [bytes(p) for _, p in read_back] == payloads
        assert all(p.readonly for _, p in read_back)
        assert list(f.records(read_back[0][1])) == RECORDS
        assert reader.end == (END_MAP if kind == "snapshot" else None)
        assert reader.torn is None
        assert [bytes(p) for _, p in reader.blocks()] == payloads, "a second time"
    offsets = [o for o, _ in read_back]
    assert [b - a for a, b in itertools.pairwise(offsets)] == sizes[:-1]
    assert sizes[2] == f.BLOCK.size + 3000, "what zstd cannot make smaller is stored as it is"
    assert sizes[3] < 3000 if compress else sizes[3] == f.BLOCK.size + len(payloads[3])


def test_a_value_may_contain_a_log(tmp_path):
    """A torn tail is not searched inside a payload of known length, and nothing is ever read from the middle of a block."""
    inner, _ = written("log", SMALL)
    data, offsets = written("log", [b"x", inner])
    assert read(data)[1] == [b"x", inner]
    broken = bytearray(data)
    broken[-1] ^= 1
    for torn in (data[:-1], broken):
        reader, payloads = read(torn)
        assert (reader.torn, payloads) == (offsets[2], [b"x"])
    data, offsets = written("log", [b"x"] * 8 + [inner])
    changed = bytearray(data)
    changed[offsets[9]] ^= 1  # the header: its length is not known, what follows is searched, but the inner numbers are lower
    assert read(changed)[0].torn == offsets[9]
    for number, synced in ((9, 10**6), (9, offsets[2]), (2, offsets[2] + 1)):  # more than stands before it; not the lost one; no later block
        data, offsets = written("log", [b"x", block(f.RECORDS, b"", number, synced=synced)])
        changed = bytearray(data)
        changed[offsets[2]] ^= 1
        assert read(changed)[0].torn == offsets[2]


def test_zstd_is_asked_for_where_it_is_missing(monkeypatch):
    data, _ = written("log", [b"a" * 100], compress=True)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(errors.InvalidConfig, match=re.escape('pip install "shmcache[zstd]"')):
        f.Writer(io.BytesIO(), "log", {}, compress=True)
    with pytest.raises(errors.InvalidConfig, match="zstd"):
        read(data)
    assert f.Reader(io.BytesIO(data)).head == HEAD_MAP


# ---- files that end early -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
def test_every_truncation_of_a_snapshot_is_damage(compress):
    data, _ = written("snapshot", SMALL, compress)
    for kind in ("snapshot", None):
        for n in range(len(data)):
            e, payloads = damage(data[:n], kind)
            assert e.offset <= n
            assert payloads == SMALL[: len(payloads)]


@pytest.mark.parametrize("tail", [b"", b"\0", b"\0" * 500])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("synced", [False, True])
def test_every_truncation_of_a_log_is_its_whole_blocks(synced, compress, tail):
    """Cut anywhere, and with zeros behind it that were allocated ahead."""
    data, offsets = written("log", SMALL, compress, synced)
    for n in range(len(data) + 1):
        reader, payloads = read(data[:n] + tail, "log")
        whole = [o for o in offsets[1:] if o <= n]
        if not whole:
            assert (reader.torn, reader.torn_bytes, reader.head, payloads) == (0, n + len(tail), {}, [])
            continue
        assert reader.torn == (None if n == whole[-1] and not tail else whole[-1])
        assert reader.torn_bytes == n + len(tail) - whole[-1]
        assert reader.head == HEAD_MAP
        assert payloads == SMALL[: len(whole) - 1]


def test_a_log_torn_in_its_first_bytes_is_a_log_only_to_who_says_so():
    data, _ = written("log", SMALL)
    for start in (b"", data[:15], b"\0" * 100, data[:15] + b"\0" * 100):
        assert read(start, "log")[0].torn == 0
        damage(start)
    for n in range(16, 24):
        assert read(data[:n])[0].torn == 0
    for foreign in (data[:10] + b"x", data[:20] + b"\0" * 50 + b"x", b"\x89PNG", b"\0" * 99 + b"\1"):
        damage(foreign, "log")


# ---- the power goes -----------------------------------------------------------------------------------------------------------


def power_cut(data, synced, rng) -> bytes:
    """What is on the disk of a file of which so much was synced: of each sector behind it all, nothing or its beginning; any length."""
    size = rng.choice((len(data), rng.randint(synced, len(data))))
    odds = rng.choice((0.02, 0.1, 0.4, 0.8))
    left = bytearray(data[:size])
    for sector in range(synced // 512 * 512, size, 512):
        if rng.random() < odds:
            start, end = max(sector, synced), min(sector + 512, size)
            kept = rng.choice((start, rng.randint(start, end)))
            left[kept:end] = bytes(end - kept)
    return bytes(left) + bytes(rng.choice((0, 0, 1, 700)))  # allocated ahead


def test_after_a_power_cut_a_log_is_a_prefix_with_all_that_was_synced():
    rng = random.Random(31)
    seen = {"whole": 0, "torn": 0, "whole blocks cut": 0, "torn at 0": 0}
    for seed in range(100):
        data, offsets, says, synced = synced_log(rng.randrange(25), rng.choice((0, 0.1, 0.4)), seed)
        assert says[-1] <= synced
        spans = list(itertools.pairwise([0, *offsets[1:]]))  # the preamble is of no use without HEAD
        for _ in range(20):
            left = power_cut(data, synced, rng)
            whole = [left[a:b] == data[a:b] for a, b in spans]
            n_whole = [*whole, False].index(False)
            behind = spans[n_whole - 1][1] if n_whole else 0
            reader, payloads = read(left, "log")
            assert payloads == [data[a + f.BLOCK.size : b] for a, b in spans[1:n_whole]]
            assert reader.head == (HEAD_MAP if n_whole else {})
            assert reader.torn == (None if n_whole and behind == len(left) else behind)
            assert reader.torn_bytes == len(left) - behind
            assert behind >= synced
            seen["whole" if reader.torn is None else "torn"] += 1
            seen["torn at 0"] += reader.torn == 0
            seen["whole blocks cut"] += any(whole[n_whole:])
    assert min(seen.values()) > 200, seen


def test_a_changed_byte_is_damage_if_a_later_block_says_that_it_was_synced():
    """And is a torn tail if none says so, whole blocks behind it or not."""
    seen = {"damage": 0, "torn": 0, "whole blocks cut": 0}
    for seed, sync_odds in enumerate((0, 0.1, 0.3, 0.3, 1)):
        data, offsets, says, _ = synced_log(8, sync_odds, seed)
        spans = list(itertools.pairwise(offsets))
        for at in range(offsets[0], len(data), 3):
            i = next(i for i, (_, b) in enumerate(spans) if at < b)
            start = offsets[i]
            changed = bytearray(data)
            changed[at] ^= 1 << at % 8
            if any(say > start for say in says[i + 1 :]):
                e, payloads = damage(changed, "log")
                assert e.offset == start
                by = next(offsets[j] for j in range(i + 1, len(says)) if says[j] > start)
                assert f"the block at byte {by} says" in str(e)
                seen["damage"] += 1
            else:
                reader, payloads = read(changed, "log")
                assert reader.torn == (start if i else 0)
                assert reader.torn_bytes == len(data) - reader.torn
                seen["torn"] += 1
                seen["whole blocks cut"] += i + 1 < len(spans)
            assert payloads == [data[a + f.BLOCK.size : b] for a, b in spans[1:i]]
    assert min(seen.values()) > 500, seen


def test_zeros_in_the_middle_of_a_tail():
    """Where nothing says that it was synced, they are torn off with the whole blocks behind them; else they are damage."""
    payloads = [bytes([n]) * 100 for n in range(1, 7)]
    file = io.BytesIO()
    writer = f.Writer(file, "log", HEAD_MAP)
    offsets = [f.PREAMBLE.size, writer.bytes_written]
    for i, payload in enumerate(payloads):
        if i == 2:
            writer.synced()
        offsets.append(offsets[-1] + writer.records(payload))
    data, synced = file.getvalue(), offsets[3]
    for a in range(offsets[0], len(data), 3):
        for n in (1, 2, 30, 300):
            b = min(a + n, len(data))
            changed = data[:a] + bytes(b - a) + data[b:]
            first = next((i for i, (x, y) in enumerate(itertools.pairwise(offsets)) if changed[x:y] != data[x:y]), None)
            if first is None:
                continue
            if offsets[first] < synced:
                e, read_back = damage(changed)
                assert e.offset == offsets[first]
            else:
                reader, read_back = read(changed)
                assert (reader.torn, reader.torn_bytes) == (offsets[first], len(data) - offsets[first])
            assert read_back == payloads[: max(0, first - 1)]


@pytest.mark.parametrize("n", range(25))
def test_a_first_sector_that_is_lost(n):
    """The preamble, or a part of it, with zeros behind it. A block that says the file was synced makes it damage."""
    for synced in (False, True):
        data, offsets = written("log", [b"x" * 600, b"y", b"z"], synced=synced)
        lost = data[:n] + bytes(512 - n) + data[512:]
        if synced:
            e, payloads = damage(lost, "log")
            assert (e.offset, payloads) == (offsets[0] if n == 24 else 0, [])
            assert f"the block at byte {offsets[2]} says" in str(e)
        else:
            reader, payloads = read(lost, "log")
            assert (reader.torn, reader.torn_bytes, reader.head, payloads) == (0, len(data), {}, [])
        if n < 24:
            assert damage(data[:n] + bytes(511 - n) + data[511:], "log")[0].offset == 0, "no sector is lost so"
        if n < 16:
            damage(lost)


def test_a_header_of_zeros_is_no_header():
    assert crc32(bytes(f.BLOCK.size - 4)) != 0
    assert crc32(bytes(f.PREAMBLE.size - 4)) != 0


def test_a_log_says_what_is_synced_and_a_snapshot_does_not():
    file = io.BytesIO()
    writer = f.Writer(file, "log", HEAD_MAP)
    at = []
    for synced in (False, True, False, True, True):
        at.append(writer.bytes_written)
        if synced:
            writer.synced()
            writer.synced()
        writer.records(b"x")
    data = file.getvalue()
    assert [f._Header(*f.BLOCK.unpack_from(data, o)).synced for o in (f.PREAMBLE.size, *at)] == [0, 0, at[1], at[1], at[3], at[4]]
    assert read(data)[1] == [b"x"] * 5
    file = io.BytesIO()
    writer = f.Writer(file, "snapshot", {})
    with pytest.raises(errors.UsageError, match="snapshot"):
        writer.synced()
    writer.end({})
    assert read(file.getvalue())[0].end == {}


@pytest.mark.parametrize("over", [0, 1, 2**63])
def test_more_synced_than_stands_before_it_is_damage(over):
    """In a snapshot, anything."""
    at = len(log_of())
    data = log_of(block(f.RECORDS, b"x", 1, synced=at + over))
    if over:
        e, _ = damage(data)
        assert e.offset == at
        assert f"{at + over} bytes synced" in str(e)
    else:
        assert read(data)[1] == [b"x"]
    start = f.preamble("snapshot") + block(f.HEAD, b"\x80", 0)
    assert damage(start + block(f.RECORDS, b"x", 1, synced=1 + over) + block(f.END, b"\x80", 2))[0].offset == len(start)


# ---- bytes that change --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_is_named_with_its_block(kind, compress):
    """In a log's last block, which none says was synced, it is a torn tail, everywhere else damage."""
    rng = random.Random(17)
    data, offsets = written(kind, SMALL, compress)
    starts = [0, *offsets[:-1]]
    for _ in range(5000):
        at = rng.randrange(len(data))
        changed = bytearray(data)
        changed[at] ^= rng.randrange(1, 256)
        start = max(o for o in starts if o <= at)
        if kind == "log" and start == starts[-1]:
            reader, payloads = read(changed, kind)
            assert (reader.torn, payloads) == (start, SMALL[:-1])
        else:
            e, payloads = damage(changed, kind)
            assert e.offset == start
            assert payloads == SMALL[: max(0, starts.index(start) - 2)]


@pytest.mark.parametrize(("kind", "synced"), [("snapshot", False), ("log", False), ("log", True)])
def test_worse_damage_never_gives_other_data(kind, synced):
    """Spans overwritten, cut out, repeated, moved; several at once."""
    rng = random.Random(23)
    original, offsets = written(kind, SMALL, synced=synced)
    seen = {"damage": 0, "torn": 0, "whole": 0}
    for _ in range(5000):
        data = bytearray(original)
        for _ in range(rng.choice((1, 1, 2, 5))):
            a, b = sorted(rng.choice((rng.randrange(len(data) + 1), min(rng.choice(offsets), len(data)))) for _ in range(2))
            span = data[a:b]
            how = rng.randrange(5)
            if how == 0:
                data[a:b] = rng.randbytes(b - a)
            elif how == 1:
                data[a:b] = bytes(b - a)
            else:
                if how > 2:
                    del data[a:b]
                at = rng.randrange(len(data) + 1)
                data[at:at] = span if how < 4 else b""
            if not data:
                break
        payloads = []
        try:
            reader = f.Reader(io.BytesIO(data), kind)
            payloads.extend(bytes(payload) for _, payload in reader.blocks())
        except errors.DamagedFile as e:
            seen["damage"] += 1
            assert 0 <= e.offset <= len(data)
        else:
            assert reader.head == (HEAD_MAP if reader.torn != 0 else {})
            if kind == "snapshot":
                assert data == original
                assert (payloads, reader.end) == (SMALL, END_MAP)
            seen["whole" if reader.torn is None else "torn"] += 1
        assert payloads == SMALL[: len(payloads)]
    assert seen["damage"] > (500 if kind == "log" and not synced else 1000)
    assert seen["torn"] > 100 if kind == "log" else not seen["torn"]


@pytest.mark.parametrize(("kind", "synced"), [("snapshot", False), ("log", False), ("log", True)])
def test_a_block_that_is_missing_repeated_or_swapped(kind, synced):
    """No torn write leaves that, so that it is damage in an unsynced tail too."""
    data, offsets = written(kind, SMALL, synced=synced)
    start, *blocks = [data[a:b] for a, b in itertools.pairwise([0, *offsets[1:]])]
    n = len(blocks)
    for i in range(n):
        damage(start + b"".join(blocks[: i + 1] + blocks[i:]))
        if i < n - 1 or kind == "snapshot":
            damage(start + b"".join(blocks[:i] + blocks[i + 1 :]))
        for j in range(i):
            swapped = blocks.copy()
            swapped[i], swapped[j] = swapped[j], swapped[i]
            damage(start + b"".join(swapped))
    damage(data + data[offsets[0] : offsets[1]])  # HEAD again
    if kind == "snapshot":
        for behind in (b"\0", b"x" * 40, data):
            e, payloads = damage(data + behind)
            assert (e.offset, payloads) == (len(data), SMALL)


def test_two_broken_blocks_are_one_torn_tail():
    """A header alone is no whole block: it says nothing of what was synced."""
    data, offsets = written("log", SMALL)
    for at in (offsets[-3], offsets[-3] + f.BLOCK.size):
        changed = bytearray(data)
        changed[at] ^= 1
        changed[-1] ^= 1
        reader, payloads = read(changed)
        assert (reader.torn, payloads) == (offsets[-3], SMALL[:-2])


@pytest.mark.parametrize("header_too", [False, True])
def test_a_block_that_says_synced_is_found_behind_damage_wherever_it_is(monkeypatch, header_too):
    """The search goes in pieces: a header that lies across two is found."""
    monkeypatch.setattr(f, "PIECE", 64)
    for n in range(150):
        data, offsets = written("log", [b"ok", b"\2" * n, b"later", b"torn"])
        changed = bytearray(data[:-1])
        changed[offsets[2] + (24 if header_too else f.BLOCK.size - 1)] ^= 1
        e, payloads = damage(changed)
        assert (e.offset, payloads) == (offsets[2], [b"ok"])
        assert f"byte {offsets[3]}" in str(e)
        reader, payloads = read(changed[: offsets[4] - 1])  # without the whole one there is only a tail
        assert (reader.torn, payloads) == (offsets[2], [b"ok"])


# ---- other files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_newer_version_is_refused_and_never_tried(kind):
    for version, error in ((f.FORMAT + 1, errors.NewerFormat), (2**32 - 1, errors.NewerFormat), (0, errors.DamagedFile)):
        start = f.MAGIC[kind] + struct.pack("<I", version)
        data = start + struct.pack("<I", crc32(start)) + b"nothing that this version knows"
        with pytest.raises(error, match="newer version" if version else "format 0"):
            f.Reader(io.BytesIO(data))


def test_the_wrong_kind_of_file():
    snapshot, log = written("snapshot", SMALL)[0], written("log", SMALL)[0]
    assert "this is a log, not a snapshot" in str(damage(log, "snapshot")[0])
    assert "this is a snapshot, not a log" in str(damage(snapshot, "log")[0])
    for foreign in (b"\x7fELF" + b"x" * 100, b"shmcache", snapshot[1:]):
        for kind in ("snapshot", "log", None):
            if kind == "log" and log.startswith(foreign):
                continue
            assert f"this is no shmcache {kind or 'snapshot or log'}" in str(damage(foreign, kind)[0])
    with pytest.raises(errors.InvalidConfig, match="journal"):
        f.Writer(io.BytesIO(), "journal", {})
    with pytest.raises(FileNotFoundError):
        f.Reader("/nowhere/at/all")


# ---- what nobody wrote by accident --------------------------------------------------------------------------------------------


def nested(levels: int, list_says: int) -> bytes:
    return b"\x81\xa1k" + (b"\xdd" + struct.pack(">I", list_says)) * levels


BAD_MAPS = {
    "empty": b"", "cut": b"\x82\xa1k", "list": b"\x90", "number": b"\1", "int key": b"\x81\1\1", "bytes key": b"\x81\xc4\1k\1", "behind": b"\x80\x80",
    "list key": b"\x81\x90\1", "utf-8": b"\x81\xa1\xff\1", "never used": b"\xc1", "extension": b"\x81\xa1k\xd4\1\0", "bad time": b"\x81\xa1k\xc7\x0c\xff" + b"\xff" * 12,
    "deep": b"\x81\xa1k" + b"\x91" * 100_000, "huge str": b"\xdb\xff\xff\xff\xff", "huge list": nested(1, 2**32 - 1), "huge lists": nested(800, 65_000),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MAPS)
def test_a_map_is_decoded_strictly(case):
    bad = BAD_MAPS[case]
    for kind in KINDS:
        e, _ = damage(f.preamble(kind) + block(f.HEAD, bad, 0) + block(f.END, b"\x80", 1))
        assert e.offset == f.PREAMBLE.size
    data = f.preamble("snapshot") + block(f.HEAD, b"\x80", 0)
    assert damage(data + block(f.END, bad, 1))[0].offset == len(data)


def test_any_bytes_are_a_map_or_damage():
    rng = random.Random(3)
    good = msgpack.packb({"a": [1, 2.5, None, {"b": b"x" * 40}], "t": msgpack.Timestamp(1, 2), "n": -(2**63), "u": 2**64 - 1, "s": "x" * 300})
    for _ in range(5000):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            f.Reader(io.BytesIO(f.preamble("log") + block(f.HEAD, bad, 0) + block(f.RECORDS, b"", 1)))
        except errors.DamagedFile as e:
            assert e.offset == f.PREAMBLE.size


@pytest.mark.parametrize("content", [{1: 2}, {"k": {(): 1}}, {"k": object()}, {"k": 2**64}, {"k": [0] * 70_000}, {"k": b"x" * (4 << 20)},
                                     {"k": msgpack.ExtType(5, b"")}, [], {b"k": 1}])  # fmt: skip
def test_a_map_that_would_not_be_read_is_not_written(content):
    with pytest.raises(errors.UnsupportedValue):
        f.Writer(io.BytesIO(), "log", content)
    file = io.BytesIO()
    writer = f.Writer(file, "snapshot", {})
    before = file.getvalue()
    with pytest.raises(errors.UnsupportedValue):
        writer.end(content)
    assert file.getvalue() == before
    writer.end({})
    assert read(file.getvalue())[0].end == {}


HOSTILE = {
    "stored": block(f.RECORDS, b"", 1, stored_bytes=2**32 - 1, raw_bytes=2**32 - 1),
    "raw": block(f.RECORDS, b"x", 1, raw_bytes=2**32 - 1),
    "zstd, more than it can be": block(f.RECORDS, b"\x28\xb5\x2f\xfd\xa0\xff\xff\xff\xff" + b"\0" * 20, 1, flags=1, raw_bytes=2**32 - 1),
    "zstd, the frame says more": block(f.RECORDS, b"\x28\xb5\x2f\xfd\xa0\xff\xff\xff\xff" + b"\0" * 20, 1, flags=1, raw_bytes=100),
    "zstd, the frame says less": block(f.RECORDS, b"\x28\xb5\x2f\xfd\x20\x01\x09\0\0x", 1, flags=1, raw_bytes=2),
    "zstd, no length": block(f.RECORDS, b"\x28\xb5\x2f\xfd\x00\x58\x09\0\0x", 1, flags=1, raw_bytes=1),
    "zstd, two frames": block(f.RECORDS, b"\x28\xb5\x2f\xfd\x20\x01\x09\0\0x" * 2, 1, flags=1, raw_bytes=1),
    "zstd, cut": block(f.RECORDS, b"\x28\xb5\x2f\xfd\x20\x01\x09\0\0", 1, flags=1, raw_bytes=1),
    "zstd, nothing": block(f.RECORDS, b"", 1, flags=1),
    "unknown flag": block(f.RECORDS, b"", 1, flags=2),
    "unknown kind": block(4, b"", 1),
    "no kind": block(0, b"", 1),
    "second HEAD": block(f.HEAD, b"\x80", 1),
    "END in a log": block(f.END, b"\x80", 1),
    "number": block(f.RECORDS, b"", 2**64 - 1),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_blocks_allocate_nothing_big(case):
    data = log_of(HOSTILE[case])
    tracemalloc.start()
    try:
        if case == "stored":  # as a tail torn off would say
            assert read(data)[0].torn == len(log_of())
        else:
            assert damage(data)[0].offset == len(log_of())
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    if case != "END in a log":
        damage(f.preamble("snapshot") + data[f.PREAMBLE.size :])


def test_hostile_maps_allocate_nothing_big():
    header_only = block(f.HEAD, b"", 0, stored_bytes=2**31, raw_bytes=2**31)
    assert "map of" in str(damage(f.preamble("log") + header_only)[0])
    for flags in (1, 2):
        damage(f.preamble("log") + block(f.HEAD, b"\x80", 0, flags=flags))


def test_the_one_byte_frame_of_those_cases_is_a_good_one():
    assert read(log_of(block(f.RECORDS, b"\x28\xb5\x2f\xfd\x20\x01\x09\0\0x", 1, flags=1, raw_bytes=1)))[1] == [b"x"]


# ---- records ------------------------------------------------------------------------------------------------------------------


def test_a_record_that_overruns_or_cannot_be():
    payload = b"".join(map(packed, RECORDS))
    ends = set(itertools.accumulate(len(packed(r)) for r in RECORDS)) | {0}
    for n in [*range(200), *range(len(payload) - 200, len(payload) + 1)]:
        read_back = []
        if n in ends:
            read_back.extend(f.records(payload[:n]))
        else:
            with pytest.raises(errors.DamagedFile, match="overruns") as e:
                read_back.extend(f.records(payload[:n], "some/file", 77))
            assert (e.value.path, e.value.offset) == ("some/file", 77)
        assert read_back == RECORDS[: len(read_back)]
    for op, key_bytes, value_bytes in (
        (4, 1, 0), (255, 1, 0), (f.SET, 0, 1), (f.SET, 4097, 1), (f.DELETE, 0, 0), (f.DELETE, 1, 1), (f.EXPIRY, 1, 1), (f.CLEAR, 1, 0), (f.CLEAR, 0, 1),
    ):  # fmt: skip
        record = f.RECORD.pack(1, 0, value_bytes, 0, 0, key_bytes, 0, op) + bytes(key_bytes + value_bytes)
        with pytest.raises(errors.DamagedFile):
            list(f.records(record))
        with pytest.raises(errors.UsageError):
            f.pack_record(op, bytes(key_bytes), bytes(value_bytes), version=1)
    with pytest.raises(errors.DamagedFile, match="overruns"):
        list(f.records(f.RECORD.pack(1, 0, 2**32 - 1, 0, 0, 1, 0, f.SET) + b"k"))


def test_any_bytes_are_records_or_damage():
    rng = random.Random(5)
    good = bytearray(packed(RECORDS[0]) * 3 + packed(RECORDS[2]))
    for _ in range(3000):
        payload = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            payload[rng.randrange(len(payload))] = rng.choice((0, 1, 255, rng.randrange(256)))
        try:
            assert b"".join(map(packed, f.records(payload))) == payload
        except errors.DamagedFile:
            pass


# ---- the writer ---------------------------------------------------------------------------------------------------------------


class Shim:
    """A file that answers each write as told, and takes so many bytes or raises; later ones it takes whole."""

    def __init__(self, answers=()):
        self.answers = list(answers)
        self.taken = bytearray()

    def write(self, data):
        answer = self.answers.pop(0) if self.answers else len(data)
        if isinstance(answer, BaseException):
            raise answer
        self.taken += data[: min(answer or 0, len(data))]
        return answer


class Slow(io.BytesIO):
    def write(self, data):
        return super().write(data[:7])

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer)[:7])


def test_short_writes_and_short_reads():
    data, _ = written("snapshot", SMALL)
    file = Slow()
    writer = f.Writer(file, "snapshot", HEAD_MAP)
    for payload in SMALL:
        writer.records(payload)
    writer.end(END_MAP)
    assert file.getvalue() == data
    reader = f.Reader(Slow(data))
    assert [bytes(p) for _, p in reader.blocks()] == SMALL
    assert reader.path == "a file without a name"


@pytest.mark.parametrize("answer", [None, 0, -1, 10_000, OSError(28, "no space"), KeyboardInterrupt()])
@pytest.mark.parametrize("which", [0, 1, 2, 3, 4, 5])
def test_after_a_failed_write_nothing_more_is_written(which, answer):
    """Behind half a block there must be nothing: it would never be read. And the payload is let go."""
    kind = BaseException if isinstance(answer, BaseException) else OSError
    file = Shim()
    writer = f.Writer(file, "log", {})
    writer.records(b"first")
    whole = len(file.taken)
    file.answers = [11] * which + [answer] if which < 3 else [f.BLOCK.size] + [11] * (which - 3) + [answer]
    payload = bytearray(b"second" * 20)
    with pytest.raises(kind):
        writer.records(payload)
    payload.append(1)
    before = bytes(file.taken)
    assert writer.bytes_written == whole
    with pytest.raises(errors.UsageError, match="earlier write failed"):
        writer.records(b"third")
    assert file.taken == before
    if answer != 10_000:
        reader, payloads = read(before)
        assert payloads == [b"first"]
        assert reader.torn == (whole if len(before) > whole else None)


def test_nothing_is_written_behind_end():
    file = Shim()
    writer = f.Writer(file, "snapshot", {})
    writer.end({})
    n_bytes = len(file.taken)
    for call in (lambda: writer.end({}), lambda: writer.records(b"x")):
        with pytest.raises(errors.UsageError, match="END is written"):
            call()
    assert len(file.taken) == n_bytes
    with pytest.raises(errors.UsageError, match="a log has no END"):
        f.Writer(Shim(), "log", {}).end({})


def test_a_payload_that_no_block_can_say_is_refused():
    file = Shim()
    writer = f.Writer(file, "log", {})
    n_bytes = len(file.taken)
    with pytest.raises(errors.UsageError, match="4294967295"):
        writer.records(memoryview(np.broadcast_to(np.uint8(0), 1 << 32)))  # one byte, shown 4 Gi times
    assert len(file.taken) == n_bytes
    writer.records(b"x")


def test_a_payload_is_not_copied():
    class Counts:
        n_bytes = 0

        def write(self, data):
            self.n_bytes += len(data)
            return len(data)

    payload = bytearray(8 << 20)
    writer = f.Writer(Counts(), "log", {})
    tracemalloc.start()
    try:
        assert writer.records(payload) == writer.records(memoryview(payload).cast("Q")) == f.BLOCK.size + len(payload)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
    payload.append(1)


# ---- names, errors, documentation ---------------------------------------------------------------------------------------------


def test_names_and_listing(tmp_path):
    assert f.snapshot_name(1) == "snapshot-000000000001.shmcache"
    for name in ("snapshot-1.shmcache", "snapshot-000000000001.shmcache.tmp", "snapshot-0000000000001.shmcache", "log-00000000000x.shmcache",
                 "xlog-000000000001.shmcache", "log-000000000001.shmcache\n", "log-٠٠٠٠٠٠٠٠٠٠٠١.shmcache", "notes.txt"):  # fmt: skip
        (tmp_path / name).touch()
    assert f.listing(tmp_path) == ([], [])
    for n in (10**12, 2, 11, 1):
        (tmp_path / f.snapshot_name(n)).touch()
        (tmp_path / f.log_name(n + 1)).touch()
    snapshots, logs = f.listing(str(tmp_path))
    assert snapshots == [(n, tmp_path / f.snapshot_name(n)) for n in (1, 2, 11, 10**12)]
    assert logs == [(n, tmp_path / f.log_name(n)) for n in (2, 3, 12, 10**12 + 1)]
    with pytest.raises(FileNotFoundError):
        f.listing(tmp_path / "nowhere")


def test_gaps():
    assert f.gaps([]) == f.gaps([5]) == f.gaps([3, 1, 2, 2]) == []
    assert f.gaps([1, 2, 4, 9]) == f.gaps([9, 2, 1, 9, 4]) == [range(3, 4), range(5, 9)]
    assert f.gaps([1, 10**12]) == [range(2, 10**12)]


def test_damage_names_file_and_offset(tmp_path):
    path = tmp_path / f.snapshot_name(3)
    data, offsets = written("snapshot", SMALL)
    path.write_bytes(data[:-1])
    with f.Reader(path) as reader, pytest.raises(errors.DamagedFile) as e:
        list(reader.blocks())
    assert (e.value.path, e.value.offset) == (str(path), offsets[-2])
    for error in (e.value, pickle.loads(pickle.dumps(e.value))):
        assert str(path) in str(error)
        assert f"byte {offsets[-2]}" in str(error)
        assert "put a copy in its place" in str(error)


def test_a_reader_closes_what_it_opened_and_nothing_else(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"not a log")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(errors.DamagedFile) as e:
            f.Reader(path)
        del e
        gc.collect()
    assert not [w for w in warned if w.category is ResourceWarning]
    with path.open("rb") as file:
        with pytest.raises(errors.DamagedFile):
            f.Reader(file)
        assert not file.closed
        path.write_bytes(written("log", [])[0])
        f.Reader(file).close()
        assert not file.closed


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(written("log", SMALL)[0])
    with f.Reader(path) as reader:
        blocks = reader.blocks()
        next(blocks)
        path.write_bytes(b"")
        with pytest.raises(errors.DamagedFile, match="shorter"):
            list(blocks)


def test_the_bytes_are_pinned():
    """A change here is a new FORMAT."""
    assert (f.PREAMBLE.format, f.BLOCK.format, f.RECORD.format) == ("<16sII", "<IIIIQQII", "<QQIIIHBB")
    assert (f.FORMAT, f.HEAD, f.RECORDS, f.END, f.COMPRESSED) == (1, 1, 2, 3, 1)
    assert (f.SET, f.DELETE, f.EXPIRY, f.CLEAR) == (0, 1, 2, 3)
    assert list(f._Header._fields) == [field for field, _, _ in f.FIELDS["block"]]
    assert {len(magic) for magic in f.MAGIC.values()} == {16}
    assert _core.CONSTANTS["max_key"] == f.MAX_KEY_BYTES
    file = io.BytesIO()
    writer = f.Writer(file, "snapshot", {"a": 1})
    writer.records(f.pack_record(f.SET, b"k", b"v", version=5, expires_ms=6, stripe=7, epoch=8, codec=3))
    writer.end({})
    assert file.getvalue() == bytes.fromhex(PINNED)
    file = io.BytesIO()
    writer = f.Writer(file, "log", {})
    writer.synced()
    writer.records(b"")
    assert file.getvalue() == bytes.fromhex(PINNED_LOG)


PINNED = (
    "73686d63616368652d736e61707368740100000092724f15"
    "01000000000000000400000004000000000000000000000000000000000000006553faa7cfa4f454"
    "81a16101"
    "02000000000000002200000022000000010000000000000000000000000000008ee2eab798b50cba"
    "05000000000000000600000000000000010000000700000008000000010003006b76"
    "0300000000000000010000000100000002000000000000000000000000000000ad6cba3f0ebf881280"
)
PINNED_LOG = (
    "73686d63616368652d6170706c6f670a0100000054d6d75d"
    "0100000000000000010000000100000000000000000000000000000000000000ad6cba3fe966d62980"
    "02000000000000000000000000000000010000000000000041000000000000000000000067dd8755"
)


def test_the_documentation_has_every_field_and_its_sizes_add_up():
    text = subprocess.run([sys.executable, "-m", "shmcache.supervisor.format"], capture_output=True, text=True, check=True).stdout
    sections = re.findall(r"^(\w+): (\d+) bytes\n.*\n((?:  +\d+ +\d+  .+\n)+)", text, re.M)
    assert [name for name, _, _ in sections] == ["preamble", "block", "record"]
    for (name, size, table), struct_ in zip(sections, (f.PREAMBLE, f.BLOCK, f.RECORD), strict=True):
        rows = [line.split(maxsplit=3) for line in table.splitlines()]
        assert [row[2] for row in rows] == [field for field, _, _ in f.FIELDS[name]]
        assert all(row[3] for row in rows)
        at = 0
        for offset, n_bytes, *_ in rows:
            assert int(offset) == at
            assert at % int(n_bytes) == 0, "naturally aligned"
            at += int(n_bytes)
        assert at == int(size) == struct_.size
    for names in (f.KINDS, f.OPS):
        assert all(re.search(rf"^ +{number}  {name} +\w", text, re.M) for number, (name, _) in names.items())
    assert f"format {f.FORMAT}" in text


@pytest.mark.parametrize("number", f.UNREADABLE)
@pytest.mark.parametrize("at", [0, 30, -1])
def test_what_the_disk_does_not_give_back_is_damage(number, at):
    """So a snapshot on a bad sector is passed over, as one with a flipped bit is."""
    whole, _ = written("snapshot", SMALL)

    class BadSector(io.BytesIO):
        def readinto(self, view):
            if self.tell() <= at % len(whole) < self.tell() + len(view):
                raise OSError(number, "bad sector")
            return super().readinto(view)

    with pytest.raises(errors.DamagedFile, match="does not give"), f.Reader(BadSector(whole)) as reader:
        list(reader.blocks())
