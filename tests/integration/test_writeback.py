"""Write-back: that no acknowledged write and no delete is lost on its way to the store, whatever comes between."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import random
import signal
import threading
import time

import pytest

import shmcache
from shmcache import cache as cache_module
from shmcache import errors, segment
from shmcache.codec import MsgpackCodec
from shmcache.core import _core, _dirty, _resp
from shmcache.sidecar import backed
from shmcache.stores import Entry
from shmcache.supervisor import datadir, refused, snapshot, writeback
from shmcache.supervisor.appendlog import AppendLog
from tests.integration.service import running
from tests.integration.test_policy import flushing
from tests.integration.test_processes import child, ended
from tests.integration.test_store import DATABASES, DictStore, opened, until
from tests.redis.inprocess import InProcess
from tests.redis.resp import encode

BACK = shmcache.Policy("back", flush_every=0.01, timeout=5.0)


@pytest.fixture
def folder(tmp_path):
    with datadir.take(tmp_path / "data") as folder:
        yield folder


@pytest.fixture
def store():
    return DictStore()


@pytest.fixture
def back(make, store):
    """back(**options) -> a cache that writes back; nobody stores what it has but flushed()."""
    return lambda policy=BACK, **options: make("16M", policy=policy, store=store, **options)


def flushed(cache, store):
    """What the store has when it has everything: {key: (value, does it expire?)}."""
    with flushing(cache, store):
        pass
    return {key: (entry.value, entry.ttl is not None) for key, entry in store.load_many(list(store.rows)).items()}


def snapped(cache, folder):
    """As after a crash: a snapshot of what is there, and the segment is gone."""
    snapshot.write(cache, folder, throttled=False)
    cache.close()
    shmcache.unlink(cache.name)


# ---- restore ----------------------------------------------------------------------------------------------------------------------


def early(cache, store=None):
    """A handle of a worker that is in before the restore is certain. No worker gets one: it is what attaching waits for."""
    return cache_module._handle(segment.attach(cache.name, unsettled=True), "msgpack", {}, store, None)


def test_nobody_loads_an_older_row_while_what_is_dirty_is_restored(back, store, folder, monkeypatch):
    store.store_many({b"k": ("older", None), b"n": (1, None)})
    cache = back()
    cache.set("k", "newer")
    cache.set("n", 5)
    put_all, seen = snapshot._put_all, []

    def with_a_worker(into, *args):
        if not seen:
            with early(cache, store) as worker:
                seen.append(worker.claim("k", 5))
                thread = threading.Thread(target=lambda: seen.extend([worker.get("k"), worker.incr("n")]))
                thread.start()
                time.sleep(0.05)
                assert len(seen) == 1  # it waits
                put_all(into, *args)
                into.generations_done()
                thread.join()
        else:
            put_all(into, *args)

    monkeypatch.setattr(snapshot, "_put_all", with_a_worker)
    snapped(cache, folder)
    assert snapshot.restore(cache.name, folder)["present"] == 0
    assert seen == [-1, "newer", 6]
    assert flushed(cache, store) == {b"k": ("newer", False), b"n": (6, False)}
    shmcache.unlink(cache.name)


def test_what_is_dirty_outlives_a_clear_also_in_the_log(back, store, folder):
    store.store_many({b"gone": ("older", None), b"touched": ("kept", None)})
    cache = back(log_buffer="64K")
    cache.set("k", "v")
    cache.delete("gone")
    assert cache.get("touched") == "kept"
    snapshot.write(cache, folder, throttled=False)
    log = AppendLog(cache, folder, "always")
    cache.expire("touched", 1000)
    cache.set("in the log", "v")
    with shmcache.attach(cache.name) as bare:
        bare.clear()
    log.close()
    cache.close()
    shmcache.unlink(cache.name)
    snapshot.restore(cache.name, folder)
    assert flushed(cache, store) == {b"k": ("v", False), b"in the log": ("v", False), b"touched": ("kept", True)}
    shmcache.unlink(cache.name)


def test_what_is_dirty_is_restored_also_after_a_worker_cleared(back, store, folder, monkeypatch):
    cache = back()
    for i in range(100):
        cache.set(f"k{i}", i)
    put_all = snapshot._put_all

    def cleared(into, *args):
        with early(cache) as worker:
            worker.set("x", 1)
            worker.clear()
        put_all(into, *args)

    monkeypatch.setattr(snapshot, "_put_all", cleared)
    snapped(cache, folder)
    snapshot.restore(cache.name, folder)
    assert flushed(cache, store) == {b"x": (1, False), **{b"k%d" % i: (i, False) for i in range(100)}}
    shmcache.unlink(cache.name)


def test_keys_of_the_caches_own_are_not_stored_after_a_restore_either(back, store, folder):
    cache = back(log_buffer="64K")
    cache.set("\0own", 1)
    snapshot.write(cache, folder, throttled=False)
    log = AppendLog(cache, folder, "always")
    cache.expire("\0own", 1000)
    log.close()
    cache.close()
    shmcache.unlink(cache.name)
    snapshot.restore(cache.name, folder)
    assert flushed(cache, store) == {}
    with shmcache.attach(cache.name) as cache:
        assert cache.ttl("\0own") < 1001
        assert cache.delete("\0own")
    shmcache.unlink(cache.name)


@pytest.mark.parametrize("kind", DATABASES)
def test_a_delete_that_is_stored_does_not_come_back(name, folder, kind, request, tmp_path):
    with opened(kind, request, tmp_path) as database, contextlib.closing(database.store()) as store:
        with shmcache.create(name, "16M", policy=BACK, store=store) as cache:
            cache.set("k", "v")
            cache.set("n", 1)
            snapshot.write(cache, folder, throttled=False)
            with flushing(cache, store):
                cache.flush()
                cache.delete("k")
                cache.set("n", 2)
        assert {k: e.value for k, e in store.load_many([b"k", b"n"]).items()} == {b"n": 2}
        shmcache.unlink(cache.name)
        snapshot.restore(cache.name, folder)
        with shmcache.attach(cache.name, store=store) as cache:
            assert cache.get("k") == "v"  # till it has been compared with the store
            with flushing(cache, store):
                cache.flush()
            assert [cache.get("k"), cache.get("n")] == [None, 2]  # and what the store has is not hidden by what it refused
            assert {k: e.value for k, e in store.load_many([b"k", b"n"]).items()} == {b"n": 2}
            with flushing(cache, store):
                cache.set("k", "again")
            assert store.load_many([b"k"])[b"k"].value == "again"
            assert cache.verify() == []
        shmcache.unlink(cache.name)


@pytest.mark.parametrize("mode", ["through", "around", "back"])
@pytest.mark.parametrize("logged", [False, True])
def test_a_copy_of_what_the_store_has_is_not_restored(make, store, folder, mode, logged):
    """It would be older than what was stored since."""
    store.store_many({b"k": ("old", None), b"n": ("old", None)}, versions={b"k": 0, b"n": 0})
    cache = make("16M", policy=mode, store=store, log_buffer="64K")
    assert [cache["k"], cache["n"]] == ["old", "old"]
    cache.set("\0own", 1)
    cache.namespace("users").set("1", "Ada")
    snapshot.write(cache, folder, throttled=False)
    if logged:
        log = AppendLog(cache, folder, "always")
        store.store_many({b"more": ("old", None)}, versions={b"more": 0})
        assert cache["more"] == "old"
        log.close()
    cache.close()
    shmcache.unlink(cache.name)
    store.store_many(dict.fromkeys([b"k", b"n", b"more"], ("new", None)), versions={b"k": 1, b"n": 1, b"more": 1})
    report = snapshot.restore(cache.name, folder)
    with shmcache.attach(cache.name, store=store) as cache:
        assert [cache["k"], cache["n"], cache["more"]] == ["new"] * 3
        assert [cache["\0own"], cache.namespace("users").get("1")] == [1, "Ada"]
        assert report["copies"] == (2 + logged if mode == "back" else 0)  # of the others none is written
    shmcache.unlink(cache.name)


def test_what_the_store_has_not_got_is_not_dropped_for_want_of_room(make, store, folder):
    cache = make("32M", policy=BACK, store=store)
    for i in range(400):
        cache.set(f"k{i}", bytes(10_000))
    cache.set("large", bytes(200_000))
    snapped(cache, folder)
    for options in *[{"size": "4M"}] * 20, {"max_value": "100K"}:  # the keys' hashes decide what is met on the way
        with pytest.raises(errors.NoRoom, match="--size"):
            snapshot.restore(cache.name, folder, **options)
        with pytest.raises(errors.SegmentNotFound):
            shmcache.attach(cache.name)
    snapshot.restore(cache.name, folder)
    assert len(flushed(cache, store)) == 401
    shmcache.unlink(cache.name)


def test_who_is_late_and_met_nobody_is_told_that_there_is_no_room(make, store, folder, monkeypatch):
    """Not to continue or kill a process: none was in the way."""
    cache = make("32M", policy=BACK, store=store)
    for i in range(400):
        cache.set(f"k{i}", bytes(10_000))
    snapped(cache, folder)
    fill = snapshot._fill

    def hurried(cache, *args):
        cache.lock_limit = 1e-6
        return fill(cache, *args)

    monkeypatch.setattr(snapshot, "_fill", hurried)
    with pytest.raises(errors.NoRoom, match="--size"):
        snapshot.restore(cache.name, folder, size="4M")


def test_what_is_dirty_is_restored_whatever_departs_meanwhile(back, store, folder, monkeypatch):
    """Other keys may share its bit; and nothing is stored, so that it could depart, before all is there."""
    cache = back()
    cache.set("k", "v")
    put_all, first = snapshot._put_all, []

    def with_a_worker(into, *args):
        if not first:
            first.append(1)
            with early(cache, store) as worker:
                with open(f"/dev/shm/shmcache.{cache.name}", "r+b") as file:  # as if a key of each bit had departed
                    file.seek(int(worker.segment.header["sketch_off"]))
                    file.write(b"\xff" * int(worker.segment.header["sketch_bytes"]))
                with flushing(worker, store, cache_module.attach_unsettled):
                    worker.set("new", "v")
                    with pytest.raises(errors.StoreUnavailable):
                        worker.flush(0.2)
                    assert store.values() == {}
                put_all(into, *args)
                assert worker.peek("k") == "v"
        else:
            put_all(into, *args)

    monkeypatch.setattr(snapshot, "_put_all", with_a_worker)
    snapped(cache, folder)
    snapshot.restore(cache.name, folder)
    assert flushed(cache, store) == {b"k": ("v", False), b"new": ("v", False)}
    shmcache.unlink(cache.name)


def test_add_does_not_pass_by_what_came_behind_a_tombstone(back, store, monkeypatch):
    cache = back()
    store.store_many({b"k": ("old", None)}, versions={b"k": 0})
    cache.delete("k")
    add, seen = shmcache.back.BackCache._add_claimed, []

    def late(self, *args, **kwargs):
        if not seen:
            seen.append(1)
            with flushing(cache, store):
                cache.flush()
                cache.set("k", "another's")
                cache.flush()
                assert cache.discard("k")
        return add(self, *args, **kwargs)

    monkeypatch.setattr(shmcache.back.BackCache, "_add_claimed", late)
    assert not cache.add("k", "mine")
    assert cache.get("k") == "another's"
    cache.delete("k")
    with shmcache.attach(cache.name) as bare:
        bare.clear()  # a tombstone stays
    assert cache.add("k", "mine")
    assert flushed(cache, store) == {b"k": ("mine", False)}
    assert cache.verify() == []


@pytest.mark.parametrize("kind", ["dict", *DATABASES])
def test_rows_of_higher_versions_that_this_segment_has_not_given_do_not_swallow_writes(name, kind, request, tmp_path, capfd):
    """As after the wall clock was set back: a segment's first version is made of it."""
    with contextlib.ExitStack() as stack:
        store = DictStore() if kind == "dict" else stack.enter_context(opened(kind, request, tmp_path)).store()
        stack.callback(store.close)
        names = [b"k%d" % i for i in range(20)]
        store.store_many(dict.fromkeys(names, ("of the future", None)), versions={name: 2**61 + i for i, name in enumerate(names)})
        store.store_many({b"most": ("of nobody", None)}, versions={b"most": 2**63 - 1})
        with shmcache.create(name, "16M", policy=BACK, store=store) as cache:
            for i in range(0, 20, 2):
                cache.set(f"k{i}", i)
            cache.delete("k1")
            cache.set("new", "v")
            cache.set("most", "v")
            if kind == "dict":
                cache.set("poison", 1)
                store.codec = Refusing()
            left = 1 + (kind == "dict")
            with flushing(cache, store):
                until(lambda: cache.stats()["store"]["dirty_items"] == left == cache.stats()["store"]["refused"])
                expected = {b"k%d" % i: "of the future" if i % 2 else i for i in range(20) if i != 1} | {b"new": "v"}
                assert {k: e.value for k, e in store.load_many([*names, b"new"]).items()} == expected
                cache.set("k1", "again")
                cache.delete("k2")
                until(lambda: cache.stats()["store"]["dirty_items"] == left == cache.stats()["store"]["refused"])
                assert {k: e.value for k, e in store.load_many([b"k1", b"k2"]).items()} == {b"k1": "again"}
        said = capfd.readouterr().err
        assert said.count("higher versions") == 1 and said.count("set it to 0") == 1
        shmcache.unlink(name)


class Refusing(MsgpackCodec):
    def encode(self, value):
        if value == 1:
            raise errors.UnsupportedValue("no")
        return super().encode(value)


# ---- the copy's time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logged", [False, True])
def test_the_copys_time_is_not_the_values_after_a_restore_either(back, store, folder, logged):
    cache = back(default_ttl=0.3, log_buffer="64K")
    cache.set("k", "v")
    cache.set("own", "v", ttl=1000)
    cache.touch("own")  # the segment's default again
    if not logged:
        snapped(cache, folder)
    else:
        snapshot.write(cache, folder, throttled=False)
        log = AppendLog(cache, folder, "always")
        cache.set("logged", "v")
        cache.expire("k", 1000)
        cache.touch("k")
        log.close()
        cache.close()
        shmcache.unlink(cache.name)
    time.sleep(0.4)
    snapshot.restore(cache.name, folder)
    names = ["k", "own", "logged"] if logged else ["k", "own"]
    assert flushed(cache, store) == {name.encode(): ("v", False) for name in names}
    shmcache.unlink(cache.name)


def test_a_touch_with_no_ttl_takes_the_values_time_away(back, store):
    cache = back(default_ttl=1000)
    cache.set("k", "v", ttl=5)
    assert cache.touch("k")
    assert 999 < cache.ttl("k") <= 1000
    assert flushed(cache, store) == {b"k": ("v", False)}
    assert cache.touch("k", 7)
    assert flushed(cache, store) == {b"k": ("v", True)}


# ---- counting, and flush() ----------------------------------------------------------------------------------------------------------


def test_a_count_that_deaths_have_made_too_high_is_put_right_and_writers_go_on(back, store):
    cache = back()
    header = cache.views(writable=True).header
    with flushing(cache, store):
        cache.set("k", "v")
        header["dirty"] = 1 << 40  # as if many had died with large values in hand
        cache.set("k", "w")  # waits till it is counted
        assert header["dirty"] < 1 << 20
    del header


def test_flush_stores_what_is_dirty_whatever_the_count_says(back, store):
    cache = back(shmcache.Policy("back", flush_every=0.2))
    with flushing(cache, store):
        cache.set("k", "v")
        cache.views(writable=True).header["dirty"] = 0
        cache.flush()
        assert store.load_many([b"k"]) == {b"k": Entry("v")}


def test_flush_does_not_say_that_all_is_stored_if_a_stopped_process_holds_a_stripe(back, store):
    cache = back(lock_limit=0.05)
    cache.set("k", "v")
    segment = cache.views(writable=True)
    holder = child(lambda: cache.get("k") and os.kill(os.getpid(), signal.SIGSTOP) is None)
    os.waitpid(holder, os.WUNTRACED)
    row = next(p["row"] for p in cache.processes() if p["pid"] == holder)
    # as if it had been stopped while it had the key's stripe
    segment.stripes["word"][segment.stripes["seq"] != 0] = (int(segment.rows["gen"][row]) << 16) | (row + 1)
    try:
        with flushing(cache, store):
            with pytest.raises(errors.StoreUnavailable):
                cache.flush(0.5)
            os.kill(holder, signal.SIGKILL)
            ended(holder)
            cache.flush()
            assert store.load_many([b"k"]) == {b"k": Entry("v")}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(holder, signal.SIGKILL)
        del segment


# ---- what fails -------------------------------------------------------------------------------------------------------------------------


def test_a_store_that_raises_what_it_should_not_is_tried_again(back, store, monkeypatch, capsys):
    cache = back()
    cache.set("k", "v")
    cache.set("j", "v")
    cache.delete("j")
    wrong = [ZeroDivisionError("a bug"), TypeError("another")]

    def failing(call):
        def fails(*args, **kwargs):
            if wrong:
                raise wrong.pop()
            return call(*args, **kwargs)

        return fails

    monkeypatch.setattr(store, "store_many", failing(store.store_many))
    monkeypatch.setattr(store, "delete_many", failing(store.delete_many))
    with flushing(cache, store) as thread:
        cache.flush()
        assert thread.thread.is_alive()
    assert store.load_many([b"k", b"j"]) == {b"k": Entry("v")}
    assert "TypeError: another" in capsys.readouterr().err


def test_a_damaged_value_does_not_keep_the_others_from_the_store(back, store, capsys):
    cache = back(max_value="1M")
    cache.set("big", b"x" * 300_000)
    for i in range(100):
        cache.set(f"k{i}", i)
    segment = cache.views(writable=True)
    heads = segment.pages["head"]
    heads[heads != 0] = 1  # nobody's
    del segment, heads
    with flushing(cache, store):
        with pytest.raises(errors.StoreUnavailable):
            cache.flush(0.5)
        assert len(store.rows) == 100
        cache.set("big", b"y")
        cache.flush()
    assert len(store.rows) == 101
    assert capsys.readouterr().err.count("belongs to somebody else") == 1
    for line in cache.verify():
        assert "big" in line.lower() or "page" in line
    cache.close()


# ---- what is over already ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", ["value", "delete"])
def test_of_a_key_that_a_batch_has_twice_the_later_write_is_stored(back, store, monkeypatch, later):
    class Slow(_dirty.Dirty):
        """A write comes between two chunks of the walk, and into one that is still ahead."""

        def find(self, at, most):
            items, at = super().find(at, most)
            if items and not wrote:
                wrote.append(write())
                more, at = super().find(at, most)
                assert [item[0] for item in more] == [b"k"]
                items += more
            return items, at

    wrote = []
    cache = back()
    cache.set("k", 20)

    def write():
        return cache.delete("k") if later == "delete" else cache.set("k", 21)

    monkeypatch.setattr(writeback._dirty, "Dirty", Slow)
    with flushing(cache, store) as thread:
        until(lambda: wrote)
        cache.flush()
        assert thread.thread.is_alive()
    assert store.load_many([b"k"]) == ({} if later == "delete" else {b"k": Entry(21)})


def test_what_is_stored_for_no_time_is_seen_by_nobody(back, store):
    store.store_many({b"there": ("v", None), b"sent": ("v", None)})
    cache = back()
    stop, seen = threading.Event(), []

    def read():
        with shmcache.attach(cache.name, store=store) as other:
            while not stop.is_set():
                seen.append(other.peek("k"))

    thread = threading.Thread(target=read)
    thread.start()
    until(lambda: seen)
    for _ in range(5000):
        cache.set("k", "over", ttl=0)
    stop.set()
    thread.join()
    assert set(seen) == {None}
    cache.set("there", "w", ttl=0)
    server = InProcess(cache.name)
    client = server.connect()
    for words in (["SET", "past", "v", "PXAT", "1000"], ["SET", "past", "v", "PXAT", str(int(time.time() * 1000) - 10)], ["SET", "sent", "v", "PXAT", "1000"]):
        assert server.say(client, encode([w.encode() for w in words])) == b"+OK\r\n", words
        client.transport.written.clear()
    server.close()
    assert cache.peek("past") is None
    assert flushed(cache, store) == {}


def test_the_sidecar_does_not_make_the_copys_time_the_values(back, store):
    cache = back(default_ttl=1000)
    server = InProcess(cache.name)
    client = server.connect()
    for words in ("SET a 1", "APPEND a 2", "SET b 1", "SET b 2 KEEPTTL", "SET c 1.5", "INCRBYFLOAT c 1", "SET d v", "RENAME d e", "SET f v EX 9", "APPEND f w"):
        assert not server.say(client, encode([w.encode() for w in words.split()])).startswith(b"-"), words
        client.transport.written.clear()
    server.close()
    found = {key: expires for key, (_, expires) in flushed(cache, store).items()}
    assert found == {b"a": False, b"b": False, b"c": False, b"e": False, b"f": True}


def test_what_is_written_back_has_no_tags(back, store):
    cache = back()
    cache.set("k", "v")
    calls = [
        lambda tags: cache.set("k", "w", tags=tags), lambda tags: cache.set_many({"k": "w", "j": "w"}, tags=tags), lambda tags: cache.add("n", "w", tags=tags),
        lambda tags: cache.replace("k", "w", tags=tags), lambda tags: cache.cas("k", "w", cache.gets("k")[1], tags=tags),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(errors.UsageError, match="tags"):
            call(("t",))
    cache.set("\0own", "v", tags=("t",))
    assert flushed(cache, store) == {b"k": ("v", False)}


def test_the_time_in_which_a_copy_is_stale_is_not_the_values(back, store):
    store.store_many({b"k": ("v", None)})
    cache = back(shmcache.Policy("back", stale_ttl=1000))
    assert cache.get("k") == "v"
    assert cache.touch("k", 50)
    with flushing(cache, store):
        pass
    assert 40 < store.load_many([b"k"])[b"k"].ttl <= 50


def test_no_time_left_is_a_delete_also_of_what_only_the_store_has(back, store):
    store.store_many({b"a": ("v", None), b"b": ("v", None)})
    cache = back()
    assert cache.touch("a", 0)
    assert cache.expire("b", 0)
    assert not cache.touch("a", 0)
    assert not cache.expire("none", 0)
    with pytest.raises(errors.InvalidTTL):
        cache.expire("a", None)
    assert flushed(cache, store) == {}


# ---- batches --------------------------------------------------------------------------------------------------------------------------


class Limited(DictStore):
    """A store with limits: seconds that each row takes, bytes at once, and rows that fail."""

    def __init__(self, row_s=0.0, packet=1 << 40, keeps_time=True):
        super().__init__()
        self.row_s, self.packet, self.keeps_time = row_s, packet, keeps_time
        self.sizes, self.failed, self.bad = [], [], set()
        self.down = False

    def store_many(self, items, *, timeout=None, versions=None):
        takes = len(items) * self.row_s
        self.sizes.append(len(items))
        late = self.keeps_time and takes > timeout
        time.sleep(timeout if late else takes)
        if late or self.down or self.bad & items.keys() or sum(len(value) for value, _ in items.values() if isinstance(value, bytes)) > self.packet:
            self.failed.append(len(items))
            raise errors.StoreUnavailable("the server closed the connection")
        return super().store_many(items, timeout=timeout, versions=versions)


def test_a_store_that_takes_its_time_for_each_row_gets_everything(back):
    store = Limited(row_s=0.004)
    cache = back(shmcache.Policy("back", flush_every=0.01, timeout=0.25))
    for i in range(400):  # 1.6 s
        cache.set(f"k{i}", i)
    with flushing(cache, store):
        cache.flush(30)
        assert len(store.values()) == 400
        assert cache.stats()["store"]["failing_s"] is None
    assert len(store.failed) < 10
    assert 1 < store.sizes[-2] <= 62


def test_what_waits_for_its_batch_lives_no_longer_in_a_slow_store(back):
    store = Limited(row_s=0.008)
    cache = back(shmcache.Policy("back", flush_every=0.01, timeout=0.25))
    began = time.time()
    for i in range(400):  # 3.2 s
        cache.set(f"k{i}", i, ttl=1000)
    with flushing(cache, store):
        cache.flush(60)
    ends = [expires - began for _, expires, _ in store.rows.values()]
    assert len(ends) == 400
    assert max(ends) < 1001.5


def test_a_store_that_is_quick_again_gets_large_batches_again(back, monkeypatch):
    monkeypatch.setattr(writeback.batch, "HOLD", 0.05)
    store = Limited(row_s=0.01)
    cache = back(shmcache.Policy("back", flush_every=0.01, timeout=0.25))
    with flushing(cache, store):
        for i in range(100):
            cache.set(f"k{i}", i)
        cache.flush(30)
        store.row_s = 0.0
        largest = 0
        for turn in range(100):
            for i in range(400):
                cache.set(f"k{i}", turn)
            store.sizes.clear()
            cache.flush(30)
            largest = max(largest, *store.sizes)
            if largest >= 300:
                break
        assert largest >= 300


@pytest.mark.parametrize("done", [False, True])
def test_a_batch_that_failed_and_was_done_all_the_same_undoes_nothing(back, monkeypatch, done):
    """Its answer was lost, and it may be done before the smaller ones that follow, or behind them."""
    store, late = DictStore(), []
    cache = back(shmcache.Policy("back", flush_every=0.01, timeout=0.5))
    store_many = store.store_many

    def unsettled(items, **limits):
        if not late:
            late.append((items, limits))
            if done:
                store_many(items, **limits)
            cache.set("k0", "newer")
            error = errors.StoreUnavailable("the answer was lost")
            error.unsettled = True
            raise error
        return store_many(items, **limits)

    monkeypatch.setattr(store, "store_many", unsettled)
    for i in range(100):
        cache.set(f"k{i}", i)
    with flushing(cache, store):
        cache.flush(30)
        cache.flush(30)  # what was written behind the first one
        newer = store_many(late[0][0], **late[0][1])
        assert list(newer) == [b"k0"]
        assert store.values() == {b"k%d" % i: i or "newer" for i in range(100)}
        cache.set("k1", "again")
        cache.flush(30)
        assert store.values()[b"k1"] == "again"


def test_a_store_that_takes_so_many_bytes_at_once_gets_everything_but_what_is_larger(back, capsys):
    store = Limited(packet=1_000_000)
    cache = back(shmcache.Policy("back", flush_every=0.01, timeout=5.0), max_value="2M")
    cache.set("too large", b"x" * 1_200_000)
    for i in range(7):
        cache.set(f"large{i}", b"x" * 300_000)
    for i in range(200):
        cache.set(f"k{i}", b"x")
    with flushing(cache, store):
        until(lambda: cache.stats()["store"]["dirty_items"] == 1)
        until(lambda: cache.stats()["store"]["refused"] == 1)
        assert len(store.values()) == 207
        assert cache["too large"] == b"x" * 1_200_000
        figures = cache.stats()["store"]
        assert figures["failing_s"] is None
        assert len(store.failed) < 20
        store.packet = 1 << 40
        until(lambda: cache.stats()["store"]["dirty_items"] == 0)
        assert len(store.values()[b"too large"]) == 1_200_000
    assert capsys.readouterr().err.count("too large") == 1


def test_rows_that_fail_alone_keep_no_other_from_the_store(back):
    """Whatever the map's order: those that fail may be the first."""
    store = Limited()
    cache = back()
    for i in range(60):
        cache.set(f"bad{i}", i)
        cache.set(f"good{i}", i)
    store.bad = {b"bad%d" % i for i in range(60)}
    with flushing(cache, store):
        until(lambda: store.values().keys() >= {b"good%d" % i for i in range(60)})
        until(lambda: cache.stats()["store"]["refused"] == 60)
        store.bad = set()
        until(lambda: len(store.values()) == 120)
        until(lambda: cache.stats()["store"]["refused"] == 0)


def test_many_rows_that_fail_alone_and_stand_in_front_keep_no_other_from_the_store(back):
    """Thirty behind one another look like a store that is down."""
    store, cache = Limited(), back()
    store.bad = {b"bad%d" % i for i in range(1500)}
    for i in range(1500):
        cache.set(f"bad{i}", i)
    for i in range(200):
        cache.set(f"good{i}", i)
    with flushing(cache, store):
        until(lambda: store.values().keys() >= {b"good%d" % i for i in range(200)})
        assert cache.stats()["store"]["dirty_items"] == 1500
        store.bad = set()
        refused.retry_all(cache)
        until(lambda: cache.stats()["store"]["dirty_items"] == 0)
        assert len(store.values()) == 1700


def test_a_dirty_item_is_found_wherever_it_is(back, store):
    cache = back()
    for i in range(300):
        cache.set(f"k{i}", b"x" * (i % 7 * 100))
    dirty = _dirty.Dirty(cache)
    every, _ = dirty.find(0, 300)
    assert dirty.items() == 300
    assert [dirty.find(dirty.place(n), 1)[0] for n in range(300)] == [[item] for item in every]
    assert dirty.place(300) == 0


def test_a_store_that_was_down_blames_no_row(back, capsys):
    store = Limited()
    store.down = True
    cache = back()
    for i in range(700):
        cache.set(f"k{i}", i)
    with flushing(cache, store):
        until(lambda: len(store.failed) > 100)
        assert cache.stats()["store"]["failing_s"] is not None
        store.sizes.clear()
        store.down = False
        until(lambda: cache.stats()["store"]["dirty_items"] == 0)
        assert max(store.sizes) >= 100
        assert cache.stats()["store"]["refused"] == 0
    said = capsys.readouterr().err
    assert "rows refused" not in said
    assert said.count("the store fails") == 1


def test_a_pass_reads_no_more_at_once_than_a_batch_may_have(back, store):
    cache = back()
    for i in range(20):
        cache.set(f"k{i}", b"x" * 100_000)
    dirty = _dirty.Dirty(cache)
    dirty.most_bytes = 300_000
    for find in dirty.find, dirty.walk:
        at, sizes = 0, []
        while True:
            items, at = find(at, 500)
            sizes.append(len(items))
            if at == 0:
                break
        assert sum(sizes) == 20
        assert max(sizes) <= 5  # a bucket may have some


def test_the_supervisor_holds_no_more_values_at_once_than_a_batch_may_have(back, store, monkeypatch):
    held, sent = [], []

    class Counted(_dirty.Dirty):
        def find(self, at, most):
            items, at = super().find(at, most)
            held.append(sum(len(item[2]) for item in items))
            return items, at

        def walk(self, at, most):
            items, at = super().walk(at, most)
            held.append(sum(len(item[2]) for item in items))
            return items, at

    store_many = store.store_many

    def counted(items, **limits):
        sent.append(sum(len(value) for value, _ in items.values()))
        return store_many(items, **limits)

    monkeypatch.setattr(writeback._dirty, "Dirty", Counted)
    monkeypatch.setattr(writeback.batch, "BYTES", 300_000)
    monkeypatch.setattr(store, "store_many", counted)
    cache = back()
    for i in range(20):
        cache.set(f"k{i}", b"x" * 100_000)
    cache.set("large", b"x" * 700_000)
    with flushing(cache, store):
        cache.flush(30)
    assert len(store.rows) == 21
    assert sorted(sent)[-2:] <= [300_000, 700_000]
    assert max(held) <= 700_000 + 500_000  # a bucket may have some


def test_stop_ends_in_time_with_a_slow_store(back, monkeypatch, capsys):
    monkeypatch.setattr(writeback, "AT_END", 0.5)
    store = Limited(row_s=0.004, keeps_time=False)
    cache = back(shmcache.Policy("back", flush_every=0.01, timeout=0.2))
    for i in range(3000):  # 12 s
        cache.set(f"k{i}", i)
    with shmcache.attach(cache.name) as other:
        thread = writeback.WriteBack(other, store)
        until(lambda: store.sizes)
        thread.stop()
        left = cache.stats()["store"]["dirty_items"]
        assert 0 < left < 3000
        assert f"{left} items are not stored" in capsys.readouterr().err
    assert len(store.rows) == 3000 - left


def test_stop_does_not_wait_for_a_store_that_hangs(back, store, monkeypatch, capsys):
    monkeypatch.setattr(writeback, "LAST_CALL", 0.2)
    cache, called, go = back(shmcache.Policy("back", flush_every=0.01, timeout=0.1)), threading.Event(), threading.Event()
    store_many = store.store_many

    def hangs(items, **limits):
        called.set()
        assert go.wait(60)
        return store_many(items, **limits)

    store.store_many = hangs
    for i in range(5):
        cache.set(f"k{i}", i)
    try:
        with shmcache.attach(cache.name) as other:
            thread = writeback.WriteBack(other, store)
            assert called.wait(30)
            thread.stop()
            assert thread.thread.is_alive()
        said = capsys.readouterr().err
        assert "not waited for" in said and "5 items are not stored" in said
    finally:
        go.set()
    thread.thread.join(30)
    assert not thread.thread.is_alive()
    assert capsys.readouterr().err == ""
    store.store_many = store_many
    assert flushed(cache, store) == {b"k%d" % i: (i, False) for i in range(5)}


# ---- rows that the store refuses --------------------------------------------------------------------------------------------------------


class Poisoned(DictStore):
    """It refuses rows by their keys."""

    def __init__(self):
        super().__init__()
        self.sent, self.mended = [], False

    def store_many(self, items, *, timeout=None, versions=None):
        self.sent += items
        bad = {} if self.mended else {key: ValueError(f"{key!r} violates a constraint") for key in items if key.startswith(b"bad")}
        super().store_many({key: x for key, x in items.items() if key not in bad}, timeout=timeout, versions=versions)
        if bad:
            raise errors.RowsRefused(bad)


SMALL = shmcache.Policy("back", flush_every=0.01, timeout=5.0, dirty_limit=20_000)


def test_rows_that_are_refused_do_not_keep_good_writes_out(back):
    store = Poisoned()
    cache = back(SMALL)
    with flushing(cache, store):
        for i in range(200):
            cache.set(f"bad{i}", b"v" * 40)
        assert int(cache.segment.header["dirty"]) > 20_000
        for i in range(1000):
            cache.set(f"good{i}", b"v" * 40)
        until(lambda: cache.stats()["store"]["dirty_items"] == 200 == cache.stats()["store"]["refused"])
        assert sum(key.startswith(b"good") for key in store.values()) == 1000
        assert cache["bad0"] == b"v" * 40
        store.mended = True
        for i in range(200):
            cache.set(f"bad{i}", b"w")
        cache.flush(30)
        assert store.values()[b"bad0"] == b"w"
        assert cache.segment.header["dirty_limit"] == 20_000


def test_what_is_set_aside_is_bounded(back):
    store = Poisoned()
    cache = back(SMALL)
    with flushing(cache, store):
        with pytest.raises(_core.WouldWait):
            for i in range(1000):
                until(lambda: int(cache.segment.header["dirty"]) < 20_000 or cache.stats()["store"]["refused"] > 150)
                if i > 200:
                    time.sleep(0.001)
                cache._at_once(cache.set, f"bad{i}", b"v" * 40)
        assert 25_000 < int(cache.segment.header["dirty"]) < 31_000
        assert cache.verify() == []


def test_a_refused_row_is_sent_again_seldom_and_less_and_less(back, monkeypatch):
    store = Poisoned()
    cache = back()
    monkeypatch.setattr(refused, "FIRST_RETRY", 0.2)
    cache.set("bad", 1)
    with flushing(cache, store) as thread:
        until(lambda: len(store.sent) == 4)  # at 0, 0.2, 0.6, 1.4 s
        until(lambda: told(thread)[b"bad"].tries == 4)
        assert time.time() - told(thread)[b"bad"].since > 1.0
        for i in range(50):
            cache.set("good", i)
            cache.stats()
        assert store.sent.count(b"bad") == 4
        assert told(thread)[b"bad"].again - time.time() > 1.0


def test_a_row_that_is_refused_again_is_listed_all_the_while(monkeypatch):
    rows = refused.Refused()
    rows.add(b"bad", 1, 100, ValueError("no"), False)
    seen = []
    monkeypatch.setattr(refused, "masked", lambda text: seen.append(rows.rows.get(b"bad")) or text)
    assert not rows.add(b"bad", 1, 300, ValueError("no"), False)
    assert seen[0].tries == 1
    assert (rows.rows[b"bad"].tries, rows.size) == (2, 300)


def test_one_refused_row_that_is_taken_lets_the_others_be_tried_at_once(back, monkeypatch):
    store = Poisoned()
    cache = back()
    with flushing(cache, store):
        for i in range(1200):
            cache.set(f"bad{i}", i)
        until(lambda: cache.stats()["store"]["refused"] == 1200)
        monkeypatch.setattr(refused, "FIRST_RETRY", 0.1)
        cache.set("bad", 0)
        until(lambda: cache.stats()["store"]["refused"] == 1201)
        store.mended = True
        cache.flush(30)
        assert len(store.values()) == 1201


def test_a_flush_that_was_given_up_lets_the_supervisor_rest(back, monkeypatch):
    walks = []

    class Counted(_dirty.Dirty):
        def walk(self, at, most):
            walks.append(at)
            return super().walk(at, most)

    monkeypatch.setattr(writeback._dirty, "Dirty", Counted)
    store = Poisoned()
    cache = back()
    cache.set("bad", 1)
    with flushing(cache, store) as thread:
        until(lambda: cache.stats()["store"]["refused"] == 1)
        with pytest.raises(errors.StoreUnavailable, match="refuse"):
            cache.flush(0.3)
        until(lambda: walks)
        n = len(walks)
        for i in range(20):
            thread.look()
            cache.set("good", i)
            until(lambda i=i: store.values().get(b"good") == i)
        assert len(walks) <= n + 1
        store.mended = True
        cache.set("bad", 2)
        cache.flush(30)
        assert store.values()[b"bad"] == 2


def told(thread):
    """What an operator would be told, in the supervisor's process: its rows by their keys."""
    now = _core.monotonic()
    return {key: refused.Listed(key, row.version, row.error, row.since, row.tries, time.time() + row.again - now) for key, row in [*thread.refused.rows.items()]}


def test_what_is_refused_is_listed_tried_again_and_dropped(back, capsys):
    store = Poisoned()
    cache = back()
    store.rows[b"bad two"] = (store.codec.encode("what the store has"), None, 0)
    with flushing(cache, store) as thread:
        for key in "bad one", "bad two", "bad\x1b[2J":
            cache.set(key, "refused")
        cache.set("good", 1)
        until(lambda: len(told(thread)) == 3)
        rows = told(thread)
        assert rows.keys() == {b"bad one", b"bad two", b"bad\x1b[2J"}
        assert "violates a constraint" in rows[b"bad one"].error
        assert rows[b"bad one"].version == cache.gets("bad one")[1]
        # dropped: the store keeps what it has
        dirty = int(cache.segment.header["dirty"])
        assert refused.drop(cache, rows[b"bad two"])
        assert int(cache.segment.header["dirty"]) < dirty
        with shmcache.attach(cache.name, store=store) as other:
            assert other["bad two"] == "what the store has"
        assert not refused.drop(cache, rows[b"bad two"])
        until(lambda: cache.stats()["store"]["refused"] == 2 == cache.stats()["store"]["dirty_items"])
        # retried
        sent = len(store.sent)
        assert refused.retry(cache, rows[b"bad one"])
        refused.hurry(cache)
        until(lambda: len(store.sent) > sent)
        until(lambda: told(thread).get(b"bad one", rows[b"bad one"]).version > rows[b"bad one"].version)
        store.mended = True
        assert refused.retry_all(cache) == 2
        refused.hurry(cache)
        until(lambda: cache.stats()["store"]["dirty_items"] == 0)
        until(lambda: told(thread) == {})
        assert store.values()[b"bad one"] == "refused"
        cache.flush(30)
    assert cache.verify() == []


def test_a_write_supersedes_what_is_refused(back):
    store = Poisoned()
    cache = back()
    with flushing(cache, store) as thread:
        cache.set("bad", "refused")
        until(lambda: len(told(thread)) == 1)
        row = told(thread)[b"bad"]
        store.mended = True
        cache.set("bad", "newer")
        cache.flush(30)
        until(lambda: told(thread) == {})
        assert store.values() == {b"bad": "newer"}
        assert not cache._give_up("bad", row.version)
        assert cache["bad"] == "newer"
        cache.set("bad", "newest")
        assert not cache._give_up("bad", row.version)
        cache.flush(30)
        assert store.values() == {b"bad": "newest"}


def test_a_delete_that_is_refused_is_set_aside_and_can_be_given_up(back):
    store = Poisoned()
    cache = back()
    store.store_many({b"k": ("referred to", None)}, versions={b"k": 0})
    delete_many = store.delete_many

    def refuse(keys, **limits):
        delete_many([key for key in keys if key != b"k"], **limits)
        if b"k" in keys:
            raise errors.RowsRefused({b"k": ValueError("other rows refer to it")})

    store.delete_many = refuse
    with flushing(cache, store) as thread, shmcache.attach(cache.name, store=store) as other:
        assert other.delete("k")
        other.set("good", 1)
        until(lambda: len(told(thread)) == 1)
        assert other.get("k") is None
        assert refused.drop(cache, told(thread)[b"k"])
        assert other["k"] == "referred to"
        cache.flush(30)
        assert store.values() == {b"k": "referred to", b"good": 1}


def test_the_next_supervisor_finds_what_is_refused(back):
    store = Poisoned()
    cache = back()
    cache.set("bad", 1)
    with flushing(cache, store) as thread:
        until(lambda: len(told(thread)) == 1)
    with flushing(cache, store) as thread:
        assert cache["bad"] == 1
        until(lambda: len(told(thread)) == 1)
    store.mended = True
    with flushing(cache, store) as thread:
        until(lambda: cache.stats()["store"]["dirty_items"] == 0)
        assert told(thread) == {}
    assert store.values() == {b"bad": 1}


def supervised(cache, store, monkeypatch, stack):
    """A supervisor, as far as an operator is concerned."""
    monkeypatch.setattr(shmcache.Cache, "supervisor", lambda self: {"alive": True})
    thread = stack.enter_context(flushing(cache, store))
    ended = threading.Event()

    def look():
        while not ended.is_set():
            thread.look()
            time.sleep(0.001)

    stack.enter_context(running(threading.Thread(target=look), stop=ended))
    return thread


def test_an_operator_is_told_what_is_refused_and_a_question_is_seen_by_nobody_else(back, monkeypatch):
    assert refused.ASKED.startswith(_resp.ASIDE) and len(refused.ASKED) > 13
    store, cache = Poisoned(), back()
    assert refused.ask(cache) == ([], 0)
    with contextlib.ExitStack() as stack:
        thread = supervised(cache, store, monkeypatch, stack)
        for i in range(1500):
            cache.set(f"bad{i}", i)
        until(lambda: cache.stats()["store"]["refused"] == 1500)
        rows, in_all = refused.ask(cache)
        assert (len(rows), in_all) == (1000, 1500)
        assert len({row.key for row in rows}) == 1000
        assert rows[0] == told(thread)[rows[0].key]._replace(again=rows[0].again)
        last = list(told(thread))[-1]
        assert last not in {row.key for row in rows}
        assert refused.find(cache, last).key == last
        with pytest.raises(errors.UsageError, match="list"):
            refused.find(cache, b"good")
        assert len(cache) == 1500 == len(list(cache.scan()))
        for other in "another's", 5, {}, {"asks": 5}, {"answers": b"12345678"}, _core.Encoded(1, b"\xc1"):
            cache.set(refused.ASKED, other)
            assert refused.ask(cache)[1] == 1500
        answers, stop = [], threading.Event()
        with running(*(threading.Thread(target=lambda: answers.append(refused.ask(cache))) for _ in range(4)), stop=stop):
            pass
        assert [(len(rows), n) for rows, n in answers] == [(1000, 1500)] * 4
        until(lambda: cache.peek(refused.ASKED) is None)
        store.mended = True
        refused.retry_all(cache)
        until(lambda: refused.ask(cache) == ([], 0))
    assert cache.verify() == []


def test_a_question_that_nobody_answers_ends(back, monkeypatch):
    monkeypatch.setattr(refused, "ANSWER_WAIT", 0.1)
    store, cache = Poisoned(), back()
    cache.set("bad", 1)
    with flushing(cache, store):
        until(lambda: cache.stats()["store"]["refused"] == 1)
    with pytest.raises(errors.UsageError, match="no supervisor"):
        refused.ask(cache)
    monkeypatch.setattr(shmcache.Cache, "supervisor", lambda self: {"alive": True})
    with pytest.raises(errors.StripeBusy, match="not answered"):
        refused.ask(cache)
    until(lambda: cache.peek(refused.ASKED) is None)


@pytest.mark.parametrize("logged", [False, True])
def test_what_is_refused_is_restored_and_what_was_dropped_is_not(back, folder, logged):
    store = Poisoned()
    cache = back(log_buffer="64K")
    if logged:
        snapshot.write(cache, folder, throttled=False)
        log = AppendLog(cache, folder, "always")
    with flushing(cache, store) as thread:
        cache.set("bad one", "refused")
        cache.set("bad two", "refused")
        until(lambda: len(told(thread)) == 2)
        assert refused.drop(cache, told(thread)[b"bad two"])
    if logged:
        log.close()
    else:
        snapshot.write(cache, folder, throttled=False)
    cache.close()
    shmcache.unlink(cache.name)
    snapshot.restore(cache.name, folder)
    with shmcache.attach(cache.name, store=store) as cache:
        assert [cache.get("bad one"), cache.get("bad two")] == ["refused", None]
        store.mended = True
        name = cache.name
    with shmcache.attach(name) as cache:
        assert flushed(cache, store) == {b"bad one": ("refused", False)}
    shmcache.unlink(name)


class Moody(DictStore):
    """It fails in any way, at random: before and behind what was asked for, of rows, by size, by time; what was given up may be done later."""

    def __init__(self, seed):
        super().__init__()
        self.random = random.Random(seed)
        self.late, self.back = [], []
        self.calm = False

    def store_many(self, items, **limits):
        return self.moody(super().store_many, items, limits)

    def delete_many(self, keys, **limits):
        return self.moody(super().delete_many, dict.fromkeys(keys), limits)

    def moody(self, call, items, limits):
        if self.calm:
            return self.done(call, items, limits)
        if self.late and self.random.random() < 0.3:
            self.done(*self.late.pop())
        mood = self.random.randrange(12)
        if mood == 0 or (mood < 4 and len(items) > 20):
            raise errors.StoreUnavailable("down")
        if mood == 4:
            self.done(call, items, limits)
            raise errors.StoreUnavailable("the answer was lost")
        if mood == 5:
            self.late.append((call, items, limits))
            raise errors.StoreUnavailable("it may be going on")
        if mood == 6:
            half = dict(list(items.items())[::2])
            self.done(call, half, limits)
            raise errors.StoreUnavailable("half of it is done")
        bad = {key: ValueError("bad") for key in items if hash(key) % 8 == self.random.randrange(9)}
        newer = self.done(call, {key: x for key, x in items.items() if key not in bad}, limits)
        if bad:
            raise errors.RowsRefused(bad)
        return newer

    def done(self, call, items, limits):
        was = {key: self.rows[key][2] for key in items if key in self.rows}
        newer = call(items, timeout=limits["timeout"], versions={key: limits["versions"][key] for key in items})
        self.back += [key for key, version in was.items() if self.rows[key][2] < version]
        return newer


def test_nothing_is_lost_or_goes_back_whatever_a_store_does(back, monkeypatch, capsys):
    monkeypatch.setattr(refused, "FIRST_RETRY", 0.02)
    monkeypatch.setattr(refused, "FIRST_RETRY_ALONE", 0.01)
    monkeypatch.setattr(writeback, "LONGEST_PAUSE", 0.05)
    store = Moody(seed := random.randrange(1 << 32))
    print(f"seed {seed}")
    cache = back(shmcache.Policy("back", flush_every=0.005, timeout=5.0, dirty_limit=1_000_000))
    last, stop = {}, threading.Event()

    def write(n):
        chance = random.Random(seed + n)
        with shmcache.attach(cache.name) as other:
            for i in itertools.count():
                if stop.is_set():
                    return
                key = f"{n}:{chance.randrange(300)}"
                if chance.random() < 0.2:
                    other.delete(key)
                    last[key.encode()] = None
                else:
                    other.set(key, i)
                    last[key.encode()] = i
                time.sleep(0.0002)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    with flushing(cache, store):
        until(lambda: len(last) > 800)
        for _ in range(40):
            refused.retry_all(cache)
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join()
        store.calm = True
        cache.flush(30)
        for call, items, limits in store.late:
            store.done(call, items, limits)
        assert store.values() == {key: value for key, value in last.items() if value is not None}, seed
        assert store.back == []
        until(lambda: cache.stats()["store"]["refused"] == 0)
        assert int(cache.segment.header["dirty"]) == 0
    assert cache.verify() == []
    assert "higher versions" not in capsys.readouterr().err


# ---- stores that do not keep to what a store is told to do ---------------------------------------------------------------------------


class Wrong(DictStore):
    """It stores all but the keys that begin with bad, of which it says what `says` makes of a batch's keys."""

    def __init__(self, says):
        super().__init__()
        self.says, self.mended = says, False

    def store_many(self, items, *, timeout=None, versions=None):
        kept = {key: x for key, x in items.items() if self.mended or not key.startswith(b"bad")}
        newer = super().store_many(kept, timeout=timeout, versions={key: versions[key] for key in kept})
        if kept.keys() != items.keys():
            return self.says(list(items))
        return newer


def refuse(keys):
    raise errors.RowsRefused(keys)


WRONG = {
    "refuses rows by another type of key": lambda keys: refuse({key.decode(): ValueError() for key in keys if key.startswith(b"bad")}),
    "refuses nothing": lambda keys: refuse({}),
    "refuses rows that it was not given": lambda keys: refuse({b"other": ValueError()}),
    "refuses a list of keys": lambda keys: refuse([key for key in keys if key.startswith(b"bad")]),
    "says that a version is none": lambda keys: dict.fromkeys(keys),
    "says that a version is a text": lambda keys: dict.fromkeys(keys, "7"),
    "answers with a number": lambda keys: 5,
    "ends its thread": lambda keys: exec("raise SystemExit"),
    "is cancelled": lambda keys: exec("raise CancelledError", {"CancelledError": asyncio.CancelledError}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_store_that_says_what_it_should_not_loses_nothing_and_holds_nothing_up(back, what):
    store, cache = Wrong(WRONG[what]), back()
    for i in range(5):
        cache.set(f"bad{i}", i)
    for i in range(50):
        cache.set(f"good{i}", i)
    with flushing(cache, store) as thread:
        until(lambda: len(store.values()) == 50)
        until(lambda: cache.stats()["store"]["refused"] == 5 == cache.stats()["store"]["dirty_items"])
        assert thread.thread.is_alive()
        cache.set("bad0", "newer")
        cache.set("good0", "newer")
        until(lambda: store.values()[b"good0"] == "newer")
        store.mended = True
        refused.retry_all(cache)
        cache.flush(30)
        assert {key: value for key, value in store.values().items() if key.startswith(b"bad")} == {b"bad0": "newer", **{b"bad%d" % i: i for i in range(1, 5)}}


def test_a_store_may_say_the_version_of_every_row(back):
    """Those that have just this one, or a lower one, are no newer ones."""
    store, cache = DictStore(), back()
    store_many, calls = store.store_many, []

    def talkative(items, *, timeout=None, versions=None):
        calls.append(list(items))
        store_many(items, timeout=timeout, versions=versions)
        return {key: version - (key == b"k1") for key, version in versions.items()} | {b"another": 1 << 60}

    store.store_many = talkative
    for i in range(50):
        cache.set(f"k{i}", i)
    version = cache.gets("k0")[1]
    with flushing(cache, store):
        cache.flush(30)
        assert len(calls) <= 2
    assert cache.gets("k0")[1] == version
    assert store.values() == {b"k%d" % i: i for i in range(50)}


def test_a_supervisor_whose_thread_has_ended_says_so(back, store):
    cache = back()
    with flushing(cache, store) as thread:
        thread.look()
        thread.stopping = True
        thread.wake.set()
        thread.thread.join()
        with pytest.raises(RuntimeError, match="ended"):
            thread.look()


def test_rows_that_fail_alone_and_fill_the_limit_keep_no_others_out(back):
    """Before one comes that the store takes, it may as well be down."""
    store, cache = Limited(), back(SMALL)
    with pytest.raises(_core.WouldWait):
        for i in itertools.count():
            store.bad.add(b"bad%d" % i)
            cache._at_once(cache.set, f"bad{i}", b"v" * 40)
    n = cache.stats()["store"]["dirty_items"]

    def good(key):
        with contextlib.suppress(_core.WouldWait):
            cache._at_once(cache.set, key, 1)
            return True

    more = (f"good{i}" for i in itertools.count())
    with flushing(cache, store):
        until(lambda: good("good"))
        until(lambda: b"good" in store.values())
        until(lambda: good(next(more)) and cache.stats()["store"]["refused"] == n)
        until(lambda: cache.stats()["store"]["dirty_items"] == n)
        assert int(cache.segment.header["dirty_limit"]) <= 30_000
        store.bad.clear()
        refused.retry_all(cache)
        cache.flush(30)
        until(lambda: int(cache.segment.header["dirty_limit"]) == 20_000)


def test_a_store_that_is_down_gets_little_more_than_the_limit(back):
    store, cache = Limited(), back(SMALL)
    store.down = True
    with flushing(cache, store):
        for i in range(1000):
            with contextlib.suppress(_core.WouldWait):
                cache._at_once(cache.set, f"k{i}", b"v" * 40)
            if i > 150:
                time.sleep(0.002)
        assert int(cache.segment.header["dirty"]) <= 20_000 * 17 // 16 + 200
        store.down = False
        cache.flush(30)
        until(lambda: int(cache.segment.header["dirty_limit"]) == 20_000)


def test_rows_that_fail_alone_are_not_all_held_at_once(back, monkeypatch):
    monkeypatch.setattr(writeback.batch, "BYTES", 40_000)
    passes = []

    class Counted(writeback.Pass):
        def __init__(self):
            super().__init__()
            self.room = writeback.batch.BYTES
            passes.append(self)

    monkeypatch.setattr(writeback, "Pass", Counted)
    store, cache = Limited(), back(max_value="1M")
    for i in range(90):
        cache.set(f"bad{i}", b"x" * 8_000)
        cache.set(f"good{i}", b"x" * 8_000)
    store.bad = {b"bad%d" % i for i in range(90)}
    with flushing(cache, store):
        until(lambda: cache.stats()["store"]["refused"] == 90 == cache.stats()["store"]["dirty_items"])
        assert len(store.values()) == 90
        store.bad = set()
        refused.retry_all(cache)
        cache.flush(30)
    assert len(store.values()) == 180
    held = [sum(len(x) for item in [*this.missed, *this.later.values()] for x in item if isinstance(x, bytes)) for this in passes]
    assert max(held) <= 40_000 + 2 * 8_000


def test_what_a_refused_row_s_error_holds_is_let_go(back):
    class Big(Exception):
        pass

    class Heavy(DictStore):
        def store_many(self, items, *, timeout=None, versions=None):
            bad = {}
            for key in items:
                values = Big(b"x" * 100_000)
                try:
                    raise values
                except Big as e:
                    bad[key] = e
            raise errors.RowsRefused(bad)

    cache = back()
    with flushing(cache, Heavy()) as thread:
        cache.set("first", 1)
        until(lambda: cache.stats()["store"]["refused"] == 1)
        for i in range(300):  # these are said seconds later
            cache.set(f"k{i}", i)
        until(lambda: cache.stats()["store"]["refused"] == 301)
        until(lambda: len(thread.dirty.passed) == 301)  # the next pass
        gc.collect()
        assert sum(type(x) is Big for x in gc.get_objects()) == 0
        assert max(len(row.error) for row in thread.refused.rows.values()) <= refused.LONGEST_ERROR


@pytest.mark.parametrize("refuses", [False, True])
def test_a_password_in_what_a_store_raises_is_not_shown(back, capsys, refuses):
    told = RuntimeError("cannot reach postgresql://u:s3cret@host/x " + "y" * 10_000 + " postgresql://u:s3cret@host/x")

    class Telling(DictStore):
        def store_many(self, items, **limits):
            raise errors.RowsRefused(dict.fromkeys(items, told)) if refuses else told

    cache, said = back(), []

    def hears():
        said.append(capsys.readouterr().err)
        return "cannot reach" in "".join(said)

    cache.set("k", 1)
    with flushing(cache, Telling()) as thread:
        until(hears)
        until(lambda: thread.refused.rows or not refuses)
        shown = "".join(row.error for row in thread.refused.rows.values())
    assert "s3cret" not in "".join(said) + shown + backed.text_of(RuntimeError("x://u:s3cret@host")).decode()
    assert not refuses or "postgresql://u:***@host/x" in shown


def test_of_many_refused_rows_few_texts_are_kept(monkeypatch):
    monkeypatch.setattr(refused, "ERRORS", 10)
    rows = refused.Refused()
    for i in range(50):
        rows.add(b"k%d" % i, 1, 128, ValueError(f"row {i} is wrong"), False)
    texts = [row.error for row in rows.rows.values()]
    assert texts[:11] == [*(f"ValueError: row {i} is wrong" for i in range(10)), "ValueError"]
    assert len({id(text) for text in texts}) == 11


def test_a_store_that_fails_now_and_then_for_ever_costs_no_memory(back, monkeypatch):
    """Each row fails once, and no pass comes to its end."""
    monkeypatch.setattr(writeback, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(writeback, "LONGEST_PAUSE", 0.001)
    store, cache = DictStore(), back()
    store_many, failed = store.store_many, set()

    def flaky(items, **limits):
        if not items.keys() <= failed:
            failed.update(items)
            raise errors.StoreUnavailable("now and then")
        return store_many(items, **limits)

    store.store_many = flaky
    store_later = writeback.WriteBack._store_later
    monkeypatch.setattr(writeback.WriteBack, "_store_later", lambda self, this: store_later(self, this) and False)
    with flushing(cache, store) as thread:
        for turn in range(200):
            cache.set(f"k{turn}", turn)
            until(lambda turn=turn: b"k%d" % turn in store.rows)
        assert len(thread.since) < 20


def test_what_is_dropped_while_the_store_gets_it_leaves_no_older_copy(back):
    """The call that was going on is done: what was loaded meanwhile is older."""
    store, cache = DictStore(), back()
    store.store_many({b"k": ("older", None)}, versions={b"k": 0})
    store_many = store.store_many
    with shmcache.attach(cache.name, store=store) as reader:

        def going_on(items, **limits):
            if b"k" in items:
                assert cache._give_up("k", cache.gets("k")[1])
                assert reader.get("k") == "older"
            return store_many(items, **limits)

        store.store_many = going_on
        with flushing(cache, store):
            cache.set("k", "dropped")
            cache.flush(30)
            until(lambda: store.values() == {b"k": "dropped"})
            until(lambda: reader.get("k") == "dropped")


def test_what_is_refused_beyond_the_limit_is_restored(back, folder):
    store, cache = Poisoned(), back(SMALL)
    with flushing(cache, store):
        for i in range(130):
            until(lambda: int(cache.segment.header["dirty"]) < 19_000 or cache.stats()["store"]["refused"] > 100)
            cache.set(f"bad{i}", b"v" * 40)
        until(lambda: cache.stats()["store"]["refused"] == 130)
    limit = int(cache.segment.header["dirty_limit"])
    assert int(cache.segment.header["dirty"]) > 20_000 * 0.75
    snapshot.write(cache, folder, throttled=False)
    cache.close()
    shmcache.unlink(cache.name)
    snapshot.restore(cache.name, folder)
    with shmcache.attach(cache.name) as cache:
        assert len([key for key in cache.scan() if key.startswith(b"bad")]) == 130
        with flushing(cache, store):
            until(lambda: cache.stats()["store"]["refused"] == 130)
            assert int(cache.segment.header["dirty_limit"]) == limit
            cache.set("good", 1)
            until(lambda: store.values() == {b"good": 1})
            store.mended = True
            refused.retry_all(cache)
            cache.flush(30)
            until(lambda: int(cache.segment.header["dirty_limit"]) < limit)
        assert len(store.values()) == 131
        shmcache.unlink(cache.name)


@pytest.mark.parametrize("refuses", [{}, {"k": ValueError()}, {b"another": ValueError()}], ids=["nothing", "a text", "another key"])
@pytest.mark.parametrize("mode", ["through", "around"])
def test_a_caller_is_told_of_a_refusal_that_names_none_of_its_keys(make, mode, refuses):
    store = DictStore()
    cache = make("8M", policy=shmcache.Policy(mode, negative_ttl=60.0), store=store)

    def refuse(*args, **limits):
        raise errors.RowsRefused(refuses)

    store.store_many = store.delete_many = refuse
    for call in cache.set, lambda key, value: cache.set_many({key: value}), lambda key, value: cache.delete(key):
        with pytest.raises(errors.RowsRefused):
            call("k", "v")
    store.rows[b"k"] = (store.codec.encode("there"), None, 0)
    load_many, store.load_many = store.load_many, refuse
    for call in cache.get, lambda key: cache.get_many([key, "other"]):
        with pytest.raises(errors.RowsRefused):
            call("k")
    store.load_many = load_many
    assert cache.get("k") == "there"
