"""SCAN, KEYS and RANDOMKEY in a segment that is large beside its keys, or full of other databases' keys."""

from __future__ import annotations

import random
import threading

import pytest
import redis

import shmcache
from shmcache.sidecar import serving
from tests.integration.service import running, until


def scanned(client, **options):
    """(the keys, in how many calls)"""
    found, cursor, calls = [], 0, 0
    while not calls or cursor:
        cursor, some = client.scan(cursor, **options)
        found += some
        calls += 1
    return found, calls


def most_calls(n, count):
    """Of Redis n / count + 1; here time may end a call on a busy machine. By 65,536 buckets a call it would be 20 for one key."""
    return 2 * (n // count) + 5


@pytest.fixture
def sparse(name):
    """(a cache of many buckets, whose pages are mapped, and a client of it)"""
    with serving(name, size="1G") as server, shmcache.attach(name) as cache:
        client = redis.Redis(port=server.port)
        assert list(cache.scan()) == []
        yield cache, client
        client.close()


@pytest.mark.parametrize(("n", "count"), [(0, 10), (1, 10), (10, 10), (100, 10), (1000, 100), (3000, 1000)])
def test_few_keys_in_a_large_segment_are_found_in_about_as_many_calls_as_by_redis(sparse, n, count):
    cache, client = sparse
    keys = {b"k:%d" % i for i in range(n)}
    for key in keys:
        cache.set(key, b"v")
    found, calls = scanned(client, count=count)
    assert set(found) == keys and len(found) == n
    assert calls <= most_calls(n, count)
    assert set(client.keys()) == keys
    assert client.randomkey() in (keys or {None})


def test_a_match_or_a_type_that_nothing_has_takes_no_more_calls(sparse):
    cache, client = sparse
    for i in range(100):
        cache.set(b"k:%d" % i, b"v")
    for options in ({"match": "other:*"}, {"_type": "list"}):
        found, calls = scanned(client, **options)
        assert found == [] and calls <= most_calls(100, 10)
    assert set(scanned(client, match="k:1?")[0]) == {b"k:%d" % i for i in range(10, 20)}


def test_after_a_clear_nothing_is_looked_at_again(sparse):
    cache, client = sparse
    for i in range(5000):
        cache.set(b"old:%d" % i, b"v")
    cache.clear()
    cache.set(b"new", b"v")
    found, calls = scanned(client)
    assert found == [b"new"] and calls <= most_calls(1, 10)
    assert client.randomkey() == b"new"


def test_each_key_is_drawn(sparse):
    cache, client = sparse
    keys = {b"k:%d" % i for i in range(5)}
    for key in keys:
        cache.set(key, b"v")
    drawn = set()
    until(lambda: drawn.add(client.randomkey()) or drawn == keys)


def test_a_transaction_scans_too(sparse):
    cache, client = sparse
    cache.set(b"a", b"v")
    cache.set(b"b", b"v")
    with client.pipeline(transaction=True) as pipe:
        pipe.set("c", "v")
        pipe.scan(0, count=10)
        _, (_, keys) = pipe.execute()
    assert set(keys) <= {b"a", b"b", b"c"}


def test_what_is_there_all_the_while_is_found_among_writers(name):
    """Keys that stay are replaced, with values of other slab classes; others come and go beside them, in stripes that are else empty."""
    with serving(name, size="64M") as server, shmcache.attach(name) as cache:
        stay = [b"stay:%d" % i for i in range(50)]
        sizes = (10, 300, 5000, 70_000)
        for key in stay:
            cache.set(key, b"v" * sizes[0])
        stop, passes = threading.Event(), []

        def write(seed):
            rng = random.Random(seed)
            with shmcache.attach(name) as mine:
                while not stop.is_set():
                    mine.set(rng.choice(stay), b"v" * rng.choice(sizes))
                    other = b"other:%d" % rng.randrange(300)
                    mine.set(other, b"v")
                    mine.delete(b"other:%d" % rng.randrange(300))

        def scan():
            client = redis.Redis(port=server.port)
            while not stop.is_set():
                found, _ = scanned(client, count=7)
                passes.append((set(stay) - set(found), {key for key in found if not key.startswith((b"stay:", b"other:"))}))
            client.close()

        threads = [threading.Thread(target=write, args=(seed,)) for seed in range(2)] + [threading.Thread(target=scan)]
        with running(*threads, stop=stop):
            until(lambda: len(passes) >= 10)
        assert [found for found in passes if any(found)] == []
        assert cache.verify() == []


def test_few_keys_of_a_database_among_many_of_another(serve):
    """A call ends after a short time, whatever it has found."""
    service = serve("--databases", "4")
    first, third = service.client(), service.client(db=3)
    with first.pipeline(transaction=False) as pipe:
        for i in range(30_000):
            pipe.set(f"k:{i}", "v")
        pipe.execute()
    for i in range(20):
        third.set(f"t:{i}", "v")
    found, calls = scanned(third)
    assert sorted(found) == sorted(b"t:%d" % i for i in range(20))
    assert calls <= 100
