"""One planted violation per numbered invariant: verify() names that number; and what repair undoes or finishes after a death."""

from __future__ import annotations

import re

import numpy as np
import pytest

import shmcache.core._sweep as sweep

ADDR = (1 << 48) - 1


class Bytes:
    """Writable views of a cache with small items, one big item, a chain with overflow."""

    def __init__(self, cache):
        self.cache = cache
        for i in range(30_000):
            cache.set(b"key:%d" % i, b"value")
        i = 30_000
        while not np.any(cache.segment.overflow["word"] >> 56 == 2):  # how the keys fall is the segment's own secret
            cache.set(b"key:%d" % i, b"value")
            i += 1
        cache.set(b"big", b"x" * 200_000)
        cache.delete(b"key:29999")  # its chunk stays in hand
        self.seg = cache.views(writable=True)
        self.h, self.b, self.o, self.p = self.seg.header, self.seg.buckets, self.seg.overflow, self.seg.pages
        self.c, self.s, self.r, self.d = self.seg.classes, self.seg.stripes, self.seg.rows, self.seg.databases
        self.bytes, self.refs = self.seg.bytes, self.seg.refs
        self.full = int(np.flatnonzero((self.b["slot"][:, 0] != 0) & (self.b["slot"][:, 1] != 0))[0])

    def item_at(self, address):
        return np.ndarray((), self.seg.items(0).dtype, buffer=self.bytes, offset=int(address & ADDR) * 16)

    def item(self, bucket=None, slot=0):
        return self.item_at(int(self.b[self.full if bucket is None else bucket]["slot"][slot]))

    def page(self, kind):
        return int(np.flatnonzero(self.p["word"] >> 56 == kind)[0])

    def cls(self):
        return int(np.flatnonzero(self.c["n_pages"] > 1)[0])


def bad_address(x):
    x.b["slot"][x.full, 0] = int(x.b["slot"][x.full, 0]) + 1


def wrong_kind(x):
    x.item()["word"] = 1 << 56


def wrong_tag(x):
    x.b["slot"][x.full, 0] ^= np.uint64(1 << 50)


def wrong_bucket(x):
    other = (x.full + 1) % len(x.b)
    x.b["slot"][other, 6], x.b["slot"][x.full, 0] = x.b["slot"][x.full, 0], 0


def wrong_key(x):
    at = int(x.b["slot"][x.full, 0]) & ADDR
    x.bytes[at * 16 + 48] ^= 1


def too_long(x):
    x.item()["value_bytes"] = 5000


def twice(x):
    x.b["slot"][x.full, 1] = x.b["slot"][x.full, 0]


def version_ahead(x):
    x.item()["cas"] = 1 << 40


def lost(x):
    x.b["slot"][x.full, 0] = 0


def free_list(x):
    i = int(np.flatnonzero((x.p["n_free"] > 0) & (x.p["word"] >> 56 == 2))[0])
    x.p["n_free"][i] += 1


def ring(x):
    x.c["n_pages"][x.cls()] += 1


def avail(x):
    x.c["avail"][x.cls()] = 0


def class_free(x):
    x.c["n_free"][x.cls()] += 1


def pool(x):
    x.h["pages_n_free"] += 1


def big_page(x):
    x.p["head"][x.page(4)] += 1


def big_page_unlisted(x):
    p = x.page(2)
    spare = x.page(0)
    x.p["head"][spare] = int(x.b["slot"][x.full, 0]) & ADDR
    x.p["word"][spare] = 4 << 56
    assert p != spare


def count(x):
    x.s["count"][3] += 1


def chain(x):
    linked = int(np.flatnonzero(x.o["word"] >> 56 == 2)[0])
    x.o["head"][linked] ^= 1


def overflow_pool(x):
    x.h["overflow_n_free"] += 1


def refs(x):
    at = int(x.b["slot"][x.full, 0]) & ADDR
    x.refs[(at * 16 - int(x.h["slab_off"])) // 128] = 9


def in_hand(x):
    row = int(np.flatnonzero(x.r["pid"])[0])
    assert x.r["batch"][row].any()
    x.r["batch"][row][:] = 0


def header(x):
    x.c["chunk_bytes"][5] += 16


def page_class(x):
    x.p["cls"][x.page(2)] ^= 1


def databases_elsewhere(x):
    x.h["databases_off"] += 64


def others(x):
    x.s["others"][3] = int(x.h["epoch"]) << 32 | 1


def expiring(x):
    x.s["expiring"][3] = int(x.h["epoch"]) << 32 | 1


def database(x):
    x.d["n"][3, 2] += 1


def database_expiring(x):
    x.d["expiring"][3, 2] += 1


def not_the_newest(x):
    """A stripe that has items of a database's newest generation counts those of another one."""
    x.cache.namespace("db:2").set("k", 1)
    at = int(np.flatnonzero(x.d["tag"][:, 2])[0])
    x.d["tag"][at, 2] = 7
    x.d["n"][at, 2] = 0


PLANTED = [
    (1, bad_address), (2, wrong_kind), (3, wrong_tag), (4, wrong_bucket), (5, wrong_key), (6, too_long), (7, twice), (8, version_ahead), (9, lost),
    (10, free_list), (11, ring), (11, avail), (11, class_free), (12, pool), (13, big_page), (14, big_page_unlisted), (15, count), (16, chain), (17, overflow_pool),
    (18, refs), (19, in_hand), (20, header), (20, databases_elsewhere), (21, page_class), (23, others), (23, expiring), (23, database), (23, database_expiring), (23, not_the_newest),
]  # fmt: skip


@pytest.mark.parametrize(("number", "plant"), PLANTED, ids=lambda v: v if isinstance(v, int) else v.__name__)
def test_planted_violation_is_named(name, number, plant):
    import shmcache

    with shmcache.create(name, "16M") as cache:
        x = Bytes(cache)
        assert cache.verify() == []
        plant(x)
        said = {int(n) for n in re.findall(r"^I(\d+) ", "\n".join(cache.verify()), re.MULTILINE)}
        assert number in said
        del x


def test_a_dirty_item_that_the_map_has_not_is_named(make):
    cache = make("16M", policy="back")
    cache["k"] = "v"
    assert cache.verify() == []
    at, n = (int(cache.segment.header[field]) for field in ("dirty_off", "dirty_bytes"))
    bits = cache.views(writable=True).bytes[at : at + n]
    was = bits.copy()
    assert was.any()
    bits[:] = 0
    assert re.match("I22 ", *cache.verify())
    bits[:] = was
    del bits


def test_every_invariant_has_a_plant():
    numbers = {int(n) for n in re.findall(r"^    I(\d+) ", sweep.__doc__, re.MULTILINE)}
    assert numbers == {n for n, _ in PLANTED} | {22}
    assert len(numbers) == 23
