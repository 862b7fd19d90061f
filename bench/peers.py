"""The caches that a user would pick instead, each behind the same few calls; servers on a unix socket and in a directory of their own.

A peer that is not installed is named in the notes, never left out in silence. uWSGI's cache exists only inside uWSGI: a bench that wants
it runs itself there (`inside_uwsgi`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import shmcache

START_SECONDS = 10.0


class Peer:
    """get, set, delete, incr: callables of (key), (key, value), (key), (key); get_many, set_many: of (keys), (dict); None: it has none.

    key: makes the peer's kind of key of bytes. calls: how many of a round's calls it is given, as a share (slow peers get fewer).
    """

    calls = 1.0
    get: Any = None
    set: Any = None
    delete: Any = None
    incr: Any = None
    get_many: Any = None
    set_many: Any = None

    def __init__(self, name: str, close: Callable[[], Any] = lambda: None) -> None:
        self.name = name
        self.close = close

    def key(self, k: bytes) -> Any:
        return k

    def filled(self) -> None:
        """Called when it holds what it is to be asked for."""


class Text(Peer):
    def key(self, k: bytes) -> Any:
        return k.decode()


def ours(size: int, huge_pages: bool = False) -> Peer:
    name = f"bench-{os.getpid()}" + "-huge" * huge_pages
    cache = shmcache.create(name, size, huge_pages=huge_pages)

    def close() -> None:
        cache.close()
        shmcache.unlink(name)

    p = Peer("shmcache, huge pages" if huge_pages else "shmcache", close)
    p.get, p.set, p.delete, p.get_many, p.set_many = cache.get, cache.set, cache.delete, cache.get_many, cache.set_many
    p.incr = cache.incr
    return p


def ours_huge(size: int) -> Peer:
    return ours(size, huge_pages=True)


def plain_copy(size: int) -> Peer:
    """No store at all: bytes(memoryview) of one of the values (get) or of what is to be stored (set)."""
    views: dict[bytes, memoryview] = {}
    p = Peer("bytes(memoryview)")

    def get(k: bytes) -> bytes:
        return bytes(views[k])

    def put(k: bytes, v: bytes) -> bytes:
        return bytes(memoryview(v))

    def filled() -> None:
        p.set = put

    p.get, p.set, p.filled = get, lambda k, v: views.__setitem__(k, memoryview(v)), filled  # type: ignore[method-assign]
    return p


def plain_dict(size: int) -> Peer:
    d: dict[bytes, Any] = {}
    p = Peer("dict")
    p.get, p.set, p.delete, p.set_many = d.get, d.__setitem__, d.pop, d.update

    def incr(k: bytes) -> None:
        d[k] += 1

    def get_many(keys: list[bytes]) -> dict[bytes, Any]:
        return {k: d[k] for k in keys if k in d}

    p.incr, p.get_many = incr, get_many
    return p


def cachebox(size: int) -> Peer:
    import cachebox

    c: Any = cachebox.LRUCache(10_000_000)
    p = Peer("cachebox LRUCache (in-process)")
    p.get, p.set, p.delete = c.get, c.insert, c.pop
    return p


class LmdbHeld(Peer):
    def __init__(self, size: int) -> None:
        self.env, close = lmdb_environment(size)
        super().__init__("lmdb, transaction held", close)

    def set(self, k: bytes, v: bytes) -> None:
        with self.env.begin(write=True) as txn:
            txn.put(k, v)

    def filled(self) -> None:
        self.set = None
        self.get = self.env.begin().get


def lmdb_environment(size: int) -> tuple[Any, Callable[[], None]]:
    import lmdb

    path = tempfile.mkdtemp(prefix="bench-lmdb-", dir="/dev/shm")
    env = lmdb.open(path, map_size=4 * size, sync=False, writemap=True)

    def close() -> None:
        env.close()
        shutil.rmtree(path)

    return env, close


def lmdb_per_call(size: int) -> Peer:
    env, close = lmdb_environment(size)
    p = Peer("lmdb, one per call", close)
    p.calls = 0.2

    def get(k: bytes) -> Any:
        with env.begin() as txn:
            return txn.get(k)

    def put(k: bytes, v: bytes) -> None:
        with env.begin(write=True) as txn:
            txn.put(k, v)

    def delete(k: bytes) -> None:
        with env.begin(write=True) as txn:
            txn.delete(k)

    def get_many(keys: list[bytes]) -> dict[bytes, Any]:
        with env.begin() as txn:
            return {k: v for k in keys if (v := txn.get(k)) is not None}

    def set_many(items: dict[bytes, bytes]) -> None:
        with env.begin(write=True) as txn, txn.cursor() as cursor:
            cursor.putmulti(items.items())

    p.get, p.set, p.delete, p.get_many, p.set_many = get, put, delete, get_many, set_many
    return p


def uwsgi(size: int) -> Peer:
    import uwsgi

    uwsgi.cache_clear()
    p = Text("uWSGI cache")
    p.get, p.set, p.delete, p.incr = uwsgi.cache_get, uwsgi.cache_update, uwsgi.cache_del, uwsgi.cache_inc
    return p


def ultradict(size: int) -> Peer:
    from UltraDict import UltraDict

    d = UltraDict(buffer_size=50_000_000, auto_unlink=True)
    p = Peer("UltraDict", lambda: (d.close(), d.unlink()))
    p.calls = 0.02
    p.get, p.set, p.delete = d.get, d.__setitem__, d.pop
    return p


def diskcache(size: int) -> Peer:
    import diskcache

    path = tempfile.mkdtemp(prefix="bench-diskcache-", dir="/dev/shm")
    cache = diskcache.Cache(path, size_limit=16 * size, eviction_policy="none")

    def close() -> None:
        cache.close()
        shutil.rmtree(path)

    p = Peer("diskcache on tmpfs", close)
    p.calls = 0.02
    p.get, p.set, p.delete, p.incr = cache.get, cache.set, cache.delete, cache.incr
    return p


def numpy_table(size: int) -> Peer:
    from numpy_table import NumpyTable

    plain = NumpyTable(size // 400)
    p = Peer("numpy + posix_ipc", plain.close)
    p.calls = 0.05
    p.get, p.set = plain.get, plain.set
    return p


def serve(argv: list[str], path: str, ready: Callable[[], Any]) -> Callable[[], None]:
    """Start a server that listens on the socket `path`, wait until `ready()` succeeds; returns what stops it."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if os.path.exists(path):
                ready()
                break
        except Exception:
            if time.monotonic() > deadline:
                raise
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise RuntimeError(f"{argv[0]} did not start")
        os.sched_yield()

    def stop() -> None:
        process.terminate()
        process.wait(START_SECONDS)
        shutil.rmtree(os.path.dirname(path), ignore_errors=True)

    return stop


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise ImportError(f"no program {name}")
    return found


def memcached(size: int) -> Peer:
    import pylibmc

    path = tempfile.mkdtemp(prefix="bench-memcached-") + "/s"
    client = pylibmc.Client([path], binary=False, behaviors={"tcp_nodelay": True})

    def check() -> None:
        client.set(b"there", b"1")

    argv = [program("memcached"), "-s", path, "-m", str(max(64, 4 * size >> 20)), "-u", "root", "-I", "8m"]
    p = Peer("memcached, pylibmc, unix socket", serve(argv, path, check))
    p.calls = 0.05
    p.get, p.set, p.delete, p.incr = client.get, client.set, client.delete, client.incr
    p.get_many, p.set_many = client.get_multi, client.set_multi
    return p


def redis(size: int) -> Peer:
    import hiredis  # noqa: F401  # without it the client is slower, and the comparison unfair
    import redis

    folder = tempfile.mkdtemp(prefix="bench-redis-")
    path = folder + "/s"
    client = redis.Redis(unix_socket_path=path)
    argv = [program("redis-server"), "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no", "--dir", folder]
    p = Peer("Redis, redis-py + hiredis, unix socket", serve(argv, path, client.ping))
    p.calls = 0.03
    p.get, p.set, p.delete, p.incr, p.get_many, p.set_many = client.get, client.set, client.delete, client.incr, client.mget, client.mset
    return p


ALL: tuple[Callable[[int], Peer], ...] = (
    plain_copy, plain_dict, ours, ours_huge,
    cachebox, LmdbHeld, lmdb_per_call, uwsgi, ultradict, numpy_table, diskcache, memcached, redis)  # fmt: skip


@contextlib.contextmanager
def opened(size: int, notes: list[str], which: Iterable[Callable[[int], Peer]] = ALL) -> Any:
    """The peers that this machine has, empty, for `size` bytes of items; what is missing goes into notes."""
    peers: list[Peer] = []
    try:
        for make in which:
            try:
                peers.append(make(size))
            except ImportError as e:
                notes.append(f"{make.__name__} is left out: {e}")
        yield peers
    finally:
        for p in peers:
            p.close()


def inside_uwsgi(items: int, block_bytes: int) -> None:
    """Run this program again inside uWSGI, with a cache for so many items. Returns if uWSGI is not installed, or when inside."""
    if "uwsgi" in sys.modules or os.environ.get("SHMCACHE_BENCH_UWSGI"):
        return
    beside = os.path.join(os.path.dirname(sys.executable), "uwsgi")
    found = beside if os.path.exists(beside) else shutil.which("uwsgi")
    if found is None:
        return
    cache = f"name=bench,items={items},blocks={items},blocksize={block_bytes},keysize=64,hashsize={items}"
    argv = [found, "--need-app=false", "--virtualenv", sys.prefix, "--cache2", cache, "--disable-logging", "--pyrun", sys.argv[0]]
    if sys.argv[1:]:
        argv += ["--pyargv", " ".join(sys.argv[1:])]
    with tempfile.TemporaryFile() as log:
        env = {**os.environ, "SHMCACHE_BENCH_UWSGI": "1", "PYTHONPATH": os.path.dirname(os.path.abspath(__file__))}
        code = subprocess.run(argv, env=env, stderr=log, check=False).returncode
        log.seek(0)
        said = log.read().decode(errors="replace").partition("spawned uWSGI worker")[2].partition("\n")[2]
        sys.stderr.write(said)  # of uWSGI's own lines none: they come before
    raise SystemExit(code or "Traceback" in said)
