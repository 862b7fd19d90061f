"""The bytes: sizes, offsets, geometry. A change here is a new LAYOUT_VERSION."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

from shmcache import segment
from shmcache.core import _core

SIZES = {"header": 4096, "row": 1024, "stripe": 128, "databases": 192, "class": 128, "page": 64, "bucket": 64, "overflow": 64, "item": 48, "ring": 192}
OFFSETS = {
    "header": "magic 0 layout_version 8 abi 12 size_bytes 16 created_ms 24 boot_id 32 hash_key 48 n_rows 64 n_stripes 68 n_classes 72 "
    "page_shift 76 n_pages 80 n_buckets 88 n_overflow 96 refs_bytes 104 sketch_bytes 112 rings_bytes 120 rows_off 128 stripes_off 136 "
    "classes_off 144 pages_off 152 refs_off 160 sketch_off 168 buckets_off 176 overflow_off 184 rings_off 192 slab_off 200 "
    "max_value_bytes 208 default_ttl_ms 216 lock_limit_ms 224 config_bytes 228 policy 232 epoch 248 restoring 252 clock_shift_ms 256 restored_seq 264 restored_epoch 272 tick 312 "
    "supervisor 320 heartbeat_ms 328 asleep 336 snapshots_asked 344 snapshots_ended 352 snapshot_ms 360 snapshot_failed_ms 368 "
    "pages_word 376 pages_stalled 384 pages_list 400 pages_n_free 408 pages_cursor 416 overflow_word 504 overflow_stalled 512 "
    "overflow_list 528 overflow_n_free 536 overflow_cursor 544 big_word 632 big_stalled 640 big_list 656 big_n_free 664 "
    "big_cursor 672 config 760 ring_bytes 1848 log_policy 1856 log_gaps 1864 log_healed 1872 log_failed_ms 1880 log_asleep 1888 log_epoch 1896 log_bell 1904 snapshot_begun_ms 1912 unnoted 1920 "
    "dirty_off 1928 dirty_bytes 1936 dirty_limit 1944 version_base 1952 databases_off 1960 dirty 1968 flushes_asked 1976 flushes_ended 1984 "
    "flushed_ms 1992 flush_failed_ms 2000 flush_refused 2008 oldest_dirty_ms 2016 restored_from 2024 log_number 2048 log_bytes 2056 newest 2112",
    "row": "gen 0 pid 8 started_ms 16 gen_check 24 home 32 home_check 40 hits 64 misses 72 sets 80 deletes 88 expired 96 evictions 104 inline_evictions 112 "
    "chain_evictions 120 retries 128 lock_waits 136 takeovers 144 settled 152 pages_moved 160 stalls 168 max_wait_ns 176 unlisted 184 "
    "repairs 192 hazard 256 parked 320 batch 448 store_loads 960 store_found 968 store_writes 976 store_errors 984 locks_lost 992",
    "stripe": "word 0 stalled 8 bell 16 seq 24 old 32 new 40 count 48 count_next 56 turn 64 others 72 expiring 80",
    "databases": "tag 0 n 64 expiring 128",
    "class": "word 0 stalled 8 bell 16 chunk_bytes 24 page_in_hand 28 ring 32 avail 36 hand 40 n_pages 48 n_free 52",
    "page": "word 0 head 8 stamp 16 next 24 prev 28 next_avail 32 prev_avail 36 free 40 n_free 44 cls 48 cls_check 50 listed 52",
    "bucket": "version 0 overflow 4 slot 8",
    "overflow": "head 0 next 4 slot 8 word 56",
    "ring": "head 0 drained 64 durable 72 bell 80",
    "item": "hash 0 word 8 cas 16 expiry_ms 24 value_bytes 32 epoch 36 key_bytes 40 codec 42 flags 43 link 44",
}


@pytest.mark.parametrize("struct", SIZES)
def test_every_size_and_offset_is_pinned(struct):
    dtype = segment.dtypes()[struct]
    assert dtype.itemsize == SIZES[struct]
    assert {n: dtype.fields[n][1] for n in dtype.names} == dict(
        zip(OFFSETS[struct].split()[::2], map(int, OFFSETS[struct].split()[1::2]), strict=True)
    )


def test_hot_lines_do_not_share():
    """What every operation reads (epoch) stands apart from what hands and pools write."""
    fields = segment.dtypes()["header"].fields
    line = {n: fields[n][1] // 64 for n in ("epoch", "tick", "pages_word", "overflow_word", "big_word")}
    assert len(set(line.values())) == len(line)


SECTIONS = ("rows", "stripes", "databases", "classes", "pages", "refs", "sketch", "buckets", "overflow", "dirty", "rings", "slab")


@pytest.mark.parametrize("size", [4 << 20, 16 << 20, (64 << 20) + 4096, 1 << 30, (4 << 30) - 4096, 4 << 30, 1 << 40, 4 << 40])
def test_geometry_fits_and_uses_the_size(size):
    g, chunks = segment.geometry(size)
    offsets = [g[s + "_off"] for s in SECTIONS]
    page_bytes = 1 << g["page_shift"]
    assert offsets == sorted(offsets)
    assert g["slab_off"] % page_bytes == 0
    end = g["slab_off"] + g["n_pages"] * page_bytes
    assert end <= size
    assert size - end < 3 * page_bytes
    assert page_bytes == (1 << 20 if size >= 4 << 30 else 1 << 16)
    assert g["n_pages"] < 1 << 32
    assert g["n_buckets"] < 1 << 32
    assert g["n_overflow"] < 1 << 31
    assert end >> 4 < 1 << 48, "an address has 48 bits of granules"
    assert g["n_pages"] * page_bytes / size > 0.68 if size < 8 << 20 else 0.85
    assert g["max_value_bytes"] <= g["n_pages"] * page_bytes // 4
    list_bytes = -(-g["max_value_bytes"] // page_bytes) * 4
    assert 48 + 4096 + list_bytes <= chunks[-1], "the list of the largest value's pages fits a head chunk"


@pytest.mark.parametrize("page_bytes", [1 << 16, 1 << 20])
def test_slab_classes(page_bytes):
    chunks = segment.slab_classes(page_bytes)
    assert chunks[0] == 128
    assert chunks[-1] == page_bytes // 2
    assert 176 in chunks, "22 + 100 bytes fit 176"
    assert all(c % 16 == 0 for c in chunks)
    assert chunks == sorted(set(chunks))
    assert len(chunks) <= _core.CONSTANTS["max_classes"]
    small = [c for c in chunks if c * 5 <= page_bytes]
    assert all(b / a <= 1.26 for a, b in itertools.pairwise(small))
    assert page_bytes // chunks[0] <= 8192, "a drain keeps one bit a chunk, for this many"


VECTORS_2_4 = ["310e0edd47db6f72", "fd67dc93c539f874", "5a4fa9d909806c0d", "2d7efbd796666785", "b7877127e09427cf", "8da699cd64557618",
               "cee3fe586e46c9cb", "37d1018bf50002ab", "6224939a79f5f593"]  # fmt: skip


def test_siphash_published_vectors():
    """Key 00..0f, messages 00, 00 01, ...: appendix of the SipHash paper's reference code (2-4), and Rust's std (1-3)."""
    k0 = int.from_bytes(bytes(range(8)), "little")
    k1 = int.from_bytes(bytes(range(8, 16)), "little")
    for n, want in enumerate(VECTORS_2_4):
        assert _core.siphash_rounds(bytes(range(n)), k0, k1, 2, 4).to_bytes(8, "little").hex() == want
    first_1_3 = [0xDC, 0xC4, 0x0F, 0x05, 0x58, 0x01, 0xAC, 0xAB]
    assert list(_core.siphash_rounds(b"", k0, k1, 1, 3).to_bytes(8, "little")) == first_1_3


def test_siphash_equals_the_interpreters_own():
    """CPython hashes bytes with SipHash-1-3 and, with PYTHONHASHSEED=0, a key of zeros."""
    if sys.hash_info.algorithm != "siphash13":
        pytest.skip(f"this Python hashes with {sys.hash_info.algorithm}")
    code = "print(*[hash(bytes(i * 7 % 256 for i in range(n))) for n in range(1, 300)])"
    out = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=True)
    for n, want in enumerate(map(int, out.stdout.split()), 1):
        assert _core.siphash_rounds(bytes(i * 7 % 256 for i in range(n)), 0, 0, 1, 3) == want % 2**64


def test_layout_prints_from_the_dtypes():
    out = subprocess.run([sys.executable, "-m", "shmcache.segment"], capture_output=True, text=True, check=True).stdout
    assert "item: 48 bytes" in out
    assert "clock_shift_ms" in out
