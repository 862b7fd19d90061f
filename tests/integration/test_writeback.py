"""Write-back: that no acknowledged write and no delete is lost on its way to the store, whatever comes between."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest

import shmcache
from shmcache import cache as cache_module
from shmcache import errors, segment
from shmcache.codec import MsgpackCodec
from shmcache.core import _dirty
from shmcache.stores import Entry
from shmcache.supervisor import datadir, snapshot, writeback
from shmcache.supervisor.appendlog import AppendLog
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
