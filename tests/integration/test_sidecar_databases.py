"""Databases over sockets: what is there by default, and their sizes beside workers, event loops and restores."""

from __future__ import annotations

import threading

import pytest
import redis

import shmcache
from shmcache.sidecar import serving
from tests import census
from tests.integration.service import running, until


def sizes(client):
    """What INFO keyspace says."""
    return {int(name[2:]): (of["keys"], of["expires"]) for name, of in client.info("keyspace").items()}


def test_a_url_may_name_any_of_sixteen_databases(serve):
    service = serve()
    clients = [redis.Redis.from_url(f"redis://127.0.0.1:{service.port}/{d}") for d in range(16)]
    for d, client in enumerate(clients):
        client.mset({f"k{i}": d for i in range(d + 1)})
        client.expire("k0", 100)
    assert [client.dbsize() for client in clients] == [d + 1 for d in range(16)]
    assert sizes(clients[7]) == {d: (d + 1, 1) for d in range(16)}
    assert clients[0].config_get("databases") == {"databases": "16"}
    with pytest.raises(redis.ResponseError, match=r"^DB index is out of range$"):
        redis.Redis.from_url(f"redis://127.0.0.1:{service.port}/16").get("k")
    for client in clients:
        client.close()


def test_behind_a_store_there_is_one_database_and_select_says_why(serve, tmp_path):
    service = serve("--store", f"sqlite:///{tmp_path / 'store.db'}")
    with service.client() as client, service.client(db=1) as other:
        assert client.config_get("databases") == {"databases": "1"}
        with pytest.raises(redis.ResponseError, match=r"^DB index is out of range: the store .* --databases N"):
            other.get("k")


def test_where_a_store_has_more_databases_select_does_not_say_that_it_has_one(serve, tmp_path):
    service = serve("--store", f"sqlite:///{tmp_path / 'store.db'}", "--databases", "4")
    with service.client(db=3) as client, service.client(db=4) as beyond:
        client.set("k", "v")
        with pytest.raises(redis.ResponseError, match=r"^DB index is out of range$"):
            beyond.get("k")


def test_an_embedded_server_has_as_many(name, tmp_path):
    for store, wanted in ((None, "16"), (shmcache.SQLStore(f"sqlite:///{tmp_path / 'store.db'}"), "1")):
        with serving(name, size="8M", store=store) as address, redis.Redis(port=address.port) as client:
            assert client.config_get("databases") == {"databases": wanted}
        shmcache.unlink(name)
        if store is not None:
            store.close()


def test_sizes_are_true_beside_workers_and_two_event_loops(serve, name):
    """While all write, sizes are between what is surely there and what may be; when they are done, what is there."""
    service = serve("--workers", "2")
    stop, wrong = threading.Event(), []
    cache = shmcache.attach(name)
    with service.client() as client:
        client.mset({f"stays:{i}": "v" for i in range(200)})

    def write(d, name):
        space = cache.namespace(f"db:{d}")
        with service.client(db=d) as client:
            n = 0
            while not stop.is_set():
                n += 1
                if name == "worker":
                    space.set(f"w{n % 50}", n, ttl=None if n % 3 else 60)
                    space.delete(f"w{(n + 25) % 50}")
                else:
                    client.set(f"c{n % 50}", n, ex=None if n % 3 else 60)
                    client.delete(f"c{(n + 25) % 50}")
                if n % 400 == 0:
                    client.flushdb() if d == 2 else client.persist("c1")

    def look():
        clients = [service.client() for _ in range(4)]  # of both event loops, most likely
        while not stop.is_set():
            for client in clients:
                there = sizes(client)
                if client.dbsize() != 200 or there[0] != (200, 0) or not all(0 <= n <= 100 for d, (n, _) in there.items() if d):
                    wrong.append(there)
        for client in clients:
            client.close()

    threads = [threading.Thread(target=write, args=(d, who)) for d in (1, 2) for who in ("worker", "client")]
    with running(*threads, threading.Thread(target=look), stop=stop), service.client() as client:
        began = client.info("stats")["total_commands_processed"]
        until(lambda: client.info("stats")["total_commands_processed"] > began + 5_000)
    assert wrong == []
    with service.client() as client:
        assert sizes(client) == census.sizes(cache)
        for d in range(3):
            with service.client(db=d) as one:
                assert one.dbsize() == len(one.keys())
    assert cache.verify() == []
    cache.close()


def test_a_restored_segment_knows_the_sizes_of_its_databases(serve, name, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    service = serve("--data-dir", str(folder), "--log", "everysec")
    for d in (0, 1, 9):
        with service.client(db=d) as client:
            client.mset({f"k{i}": "v" for i in range(50 + d)})
            client.expire("k1", 1000)
    with service.client(db=9) as client:
        client.flushdb()
        client.set("after", "v")
    with service.client() as client:
        before = sizes(client)
    assert before == {0: (50, 1), 1: (51, 1), 9: (1, 0)}
    assert service.stop() == 0
    shmcache.unlink(name)
    service = serve("--data-dir", str(folder), "--log", "everysec")
    cache = shmcache.attach(name)
    with service.client() as client:
        turns = bytes(cache.segment.stripes["turn"])
        assert sizes(client) == before
        assert bytes(cache.segment.stripes["turn"]) == turns, "their items were counted one by one"
        with service.client(db=1) as other:
            other.set("more", "v")
            other.delete("k3", "k4")
            assert other.dbsize() == 50
        assert sizes(client) == {**before, 1: (50, 1)} == census.sizes(cache)
    assert cache.verify() == []
    cache.close()
