"""Bad input gets a documented error that says what to do, and nothing is changed."""

from __future__ import annotations

import math
import os
import stat
import warnings

import numpy as np
import pytest

import shmcache
from shmcache import errors

BIG = b"x" * (3 << 20)  # over a quarter of the slab memory of 8M


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda c: c.set("", 1), errors.InvalidKey, "1 to 4,096"),
        (lambda c: c.set(b"x" * 4097, 1), errors.InvalidKey, "digest"),
        (lambda c: c.get("é" * 2049), errors.InvalidKey, "digest"),
        (lambda c: c.set(5, 1), errors.InvalidKeyType, "str"),
        (lambda c: c.get(None), errors.InvalidKeyType, "bytes or str"),
        (lambda c: c.get("\ud800"), errors.InvalidKey, "UTF-8"),
        (lambda c: c.delete(()), errors.InvalidKeyType, "tuple"),
        (lambda c: c.delete_many(["k", 5]), errors.InvalidKeyType, "int"),
        (lambda c: c.get_many(["k", ""]), errors.InvalidKey, "longer"),
        (lambda c: c.set("k", BIG), errors.ValueTooLarge, "max_value"),
        (lambda c: c.replace("k", BIG), errors.ValueTooLarge, "split"),
        (lambda c: c.set("k", [BIG]), errors.ValueTooLarge, "split"),
        (lambda c: c.set_many({"k": 2, "j": BIG}), errors.ValueTooLarge, "nothing was stored"),
        (lambda c: c.set_many({"k": 2, 5: 1}), errors.InvalidKeyType, "int"),
        (lambda c: c.set("k", object()), errors.UnsupportedValue, "pickle"),
        (lambda c: c.set("k", np.array([object()])), errors.UnsupportedValue, "objects"),
        (lambda c: c.set_many({"k": 2, "j": object()}), errors.UnsupportedValue, "pickle"),
        (lambda c: c.set("k", 2, ttl=-1), errors.InvalidTTL, "zero or more"),
        (lambda c: c.set("k", 2, ttl=math.nan), errors.InvalidTTL, "finite"),
        (lambda c: c.set("k", 2, ttl=math.inf), errors.InvalidTTL, "finite"),
        (lambda c: c.set("k", 2, ttl=10**400), errors.InvalidTTL, "finite"),
        (lambda c: c.set("k", 2, ttl="5"), errors.InvalidTTL, "timedelta"),
        (lambda c: c.set("k", 2, ttl=True), errors.InvalidTTL, "bool"),
        (lambda c: c.set_many({"k": 2}, ttl=-1), errors.InvalidTTL, "zero or more"),
        (lambda c: c.touch("k", -1), errors.InvalidTTL, "zero or more"),
        (lambda c: c.expire("k", None), errors.InvalidTTL, "persist"),
        (lambda c: c.incr("text"), errors.NotANumber, "int"),
        (lambda c: c.incr("k", 1.5), errors.NotANumber, "int"),
        (lambda c: c.incr("none", default="x"), errors.NotANumber, "int"),
        (lambda c: c.decr("k", "1"), errors.NotANumber, "int"),
        (lambda c: c.incr("k", 2**63 - 1), errors.CounterOverflow, "64-bit"),
        (lambda c: c.incr("k", 2**64), errors.CounterOverflow, "64-bit"),
        (lambda c: c.incr("low", -1), errors.CounterOverflow, "keeps"),
        (lambda c: c.incr("none", 2**62, default=2**62), errors.CounterOverflow, "64-bit"),
        (lambda c: c.incr("none", 1, default=0, ttl=-1), errors.InvalidTTL, "zero or more"),
        (lambda c: list(c.scan(prefix=5)), errors.InvalidKeyType, "prefix"),
        (lambda c: c.segment.items(999), errors.UsageError, "class_id"),
    ],
)
def test_bad_call_is_refused_and_changes_nothing(cache, call, error, says):
    cache.set_many({"k": 1, "text": "12", "low": -(2**63)})
    before = {key: cache.gets(key) for key in cache.scan()}
    live = sum(c["live"] for c in cache.stats()["slab_classes"])
    with pytest.raises(error, match=says) as caught:
        call(cache)
    assert isinstance(caught.value, shmcache.UsageError)
    assert {key: cache.gets(key) for key in cache.scan()} == before
    assert sum(c["live"] for c in cache.stats()["slab_classes"]) == live


def test_value_of_another_codec(cache, name):
    with shmcache.attach(name, codec="pickle") as other:
        other["k"] = ...
    with pytest.raises(errors.CodecMismatch, match='codec="pickle"'):
        cache.get("k")
    assert "k" in cache


@pytest.mark.parametrize("bad", ["", "a/b", "x" * 201, "\0", 5, None])
def test_bad_names(bad):
    for call in (shmcache.create, shmcache.attach, shmcache.open, shmcache.unlink):
        with pytest.raises(errors.InvalidName, match="without '/'"):
            call(bad)


@pytest.mark.parametrize("size", ["3M", 4 << 10, "", "1X", "-1", 0, -5, None, 1.5, True])
def test_bad_sizes(name, size):
    with pytest.raises(errors.InvalidSize):
        shmcache.create(name, size)
    with pytest.raises(errors.SegmentNotFound):
        shmcache.attach(name)


def test_more_than_dev_shm_has(name):
    free = os.statvfs("/dev/shm")
    with pytest.raises(errors.SharedMemoryFull, match="--shm-size"):
        shmcache.create(name, free.f_bavail * free.f_frsize + (1 << 30))
    assert os.statvfs("/dev/shm").f_bavail >= free.f_bavail - 1000
    with pytest.raises(errors.SegmentNotFound):
        shmcache.attach(name)


@pytest.mark.parametrize(
    "option", [{"stripes": 3}, {"stripes": 0}, {"max_processes": 0}, {"max_processes": 1025}, {"max_value": "x"}, {"default_ttl": -1},
               {"lock_limit": 0}, {"codec": "json"}, {"group": "no such group"}]
)  # fmt: skip
def test_bad_options(name, option):
    with pytest.raises(errors.UsageError):
        shmcache.create(name, "4M", **option)
    with pytest.raises(errors.SegmentNotFound):
        shmcache.attach(name)


def test_exists_and_not_found(name, make):
    with pytest.raises(FileNotFoundError, match="create"):
        shmcache.attach(name)
    with pytest.raises(errors.SegmentNotFound):
        shmcache.unlink(name)
    cache = make()
    cache["k"] = 1
    with pytest.raises(FileExistsError, match="attach"):
        shmcache.create(name)
    assert cache["k"] == 1


def test_open_warns_once_of_settings_that_differ(name, make):
    make("8M", default_ttl=5)
    with pytest.warns(shmcache.ConfigMismatch) as caught:
        shmcache.open(name, "16M", default_ttl=6, stripes=64).close()
    assert len(caught) == 1
    assert all(w in str(caught[0].message) for w in ("size_bytes", "default_ttl_ms", "stripes"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shmcache.open(name, "8M", default_ttl=5).close()
        shmcache.open(name).close()


def write(name, content):
    with open(f"/dev/shm/shmcache.{name}", "wb") as f:
        f.write(content)


def test_what_is_no_segment(name):
    for content in (b"", b"x" * 100, bytes(1 << 20), os.urandom(1 << 20)):
        write(name, content)
        with pytest.raises(errors.NotASegment, match="unlink"):
            shmcache.attach(name)


def image(name, make):
    cache = make("4M")
    cache.close()
    with open(f"/dev/shm/shmcache.{name}", "rb") as f:
        return bytearray(f.read())


def test_other_layout_and_truncated(name, make):
    good = image(name, make)
    other = good.copy()
    other[8] += 1
    write(name, other)
    with pytest.raises(errors.LayoutMismatch, match="start cold"):
        shmcache.attach(name)
    write(name, good[: len(good) // 2])
    with pytest.raises(errors.SegmentTruncated, match="create it again"):
        shmcache.attach(name)
    write(name, good)
    shmcache.attach(name).close()


def test_damaged_geometry_is_refused(name, make):
    good = image(name, make)
    for offset in range(64, 208):
        for value in (0xFF, 0x7F, 0):
            bad = good.copy()
            if bad[offset] == value:
                continue
            bad[offset] = value
            write(name, bad)
            try:
                cache = shmcache.attach(name)
            except shmcache.DamageError:
                continue
            cache.get("k")  # sound, though another: it must not crash
            cache.close()


def test_mode_and_owner(name, make):
    path = f"/dev/shm/shmcache.{name}"
    old = os.umask(0o077)
    try:
        make("4M", mode=0o640).close()
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
    if os.geteuid() != 0:
        pytest.skip("only root can give a segment to another user")
    os.chown(path, 12345, 23456)
    with pytest.raises(errors.ForeignSegment, match="owner="):
        shmcache.attach(name)
    shmcache.attach(name, owner=12345).close()
    shmcache.attach(name, group=23456).close()


def test_permission_denied(name, make):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    make("4M").close()
    pid = os.fork()
    if pid == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            shmcache.attach(name)
        except errors.SegmentForbidden:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_all_rows_taken(name, make):
    make("4M", max_processes=1)
    pid = os.fork()
    if pid == 0:
        cache = shmcache.attach(name)
        try:
            if cache.get("k", "a miss") == "a miss":  # reads need no row
                cache.set("k", 1)
        except errors.TooManyProcesses as e:
            os._exit(0 if "max_processes" in str(e) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_closing_with_a_view_out(cache):
    view = cache.segment.buckets
    with pytest.raises(errors.ViewsInUse, match="delete"):
        cache.close()
    cache["k"] = 1
    assert view["version"].sum() == 1
    del view
    cache.close()


def test_every_error_says_what_to_do():
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, (shmcache.ShmcacheError, Warning)):
            assert error.__doc__
            assert issubclass(error, (errors.UsageError, errors.CapacityError, errors.DamageError, Warning)) or error is errors.ShmcacheError


def test_a_closed_handle_answers_or_says_that_it_is_closed(cache):
    """Every public name: what it is called, and that it is closed, it still knows; everything else says so."""
    name = cache.name
    calls = {
        "set": (b"k", b"v"), "add": (b"k", b"v"), "replace": (b"k", b"v"), "cas": (b"k", b"v", 1), "get_or_set": (b"k", int), "claim": (b"k", 1.0),
        "fill_claim": (b"k", b"v", 1), "get_lease": (b"k",), "invalidate_tag": ("t",), "discard": (b"k",), "invalidate": (b"k",), "flush": (), "mark": (b"k", 1.0), "end_mark": (b"k",), "count_store": (1,), "unclaim": (b"k", 1), "set_many": ({b"k": b"v"},), "get_many": ([b"k"],), "delete_many": ([b"k"],), "expire": (b"k", 1),
        **dict.fromkeys(("get", "gets", "peek", "delete", "pop", "ttl", "touch", "persist", "incr", "decr", "claim_version"), (b"k",)),
        **dict.fromkeys(("clear", "counters", "processes", "supervisor", "slab_classes", "stats", "verify", "views", "durability", "store_counters"), ()),
    }  # fmt: skip
    cache.close()
    for attribute, arguments in calls.items():
        with pytest.raises(errors.CacheClosed):
            getattr(cache, attribute)(*arguments)
    for attribute in ("segment", "unlinked", "row", "lock_limit"):
        with pytest.raises(errors.CacheClosed):
            getattr(cache, attribute)
    with pytest.raises(errors.CacheClosed):
        list(cache.scan())
    with pytest.raises(errors.CacheClosed):
        len(cache)
    assert cache.name == name
    assert cache.closed
    assert "closed" in repr(cache)
    cache.close()
    untested = {a for a in dir(cache) if not a.startswith("_")} - set(calls)
    assert untested == {"close", "closed", "encoded", "fill", "keys_between", "lock", "lock_limit", "mapping", "memoize", "name", "namespace", "release", "row", "scan", "segment", "unlinked"}
