"""Clients of Redis as their users install them, over real sockets: redis-cli, redis-py, node-redis, ioredis, redis-benchmark, Django.

SHMCACHE_TEST_SERVER names what they talk to: `shmcache` (the default), `redis-server`, or both with a comma between. What holds for one
has to hold for the other. A client that is not there is skipped, and the reason says which.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgpack
import pytest

import shmcache

START_SECONDS = 30.0
NODE_PACKAGES = ("redis@5", "ioredis@5")
NODE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shmcache-tests" / "node"
SERVERS = os.environ.get("SHMCACHE_TEST_SERVER", "shmcache").split(",")


@dataclass
class Server:
    kind: str
    name: str  # of the segment, if it has one
    port: int
    path: str  # of the unix socket
    process: subprocess.Popen


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pong(family: int, address) -> bool:
    with contextlib.suppress(OSError), socket.socket(family) as s:
        s.settimeout(5)
        s.connect(address)
        s.sendall(b"*1\r\n$4\r\nPING\r\n")
        return s.recv(100) == b"+PONG\r\n"
    return False


def command_line(kind: str, name: str, port: int, path: str, folder: Path) -> list[str]:
    if kind == "redis-server":
        if shutil.which(kind) is None:
            pytest.skip("redis-server is not installed")
        at = ["--bind", "127.0.0.1", "--port", str(port), "--unixsocket", path]
        return [kind, *at, "--dir", str(folder), "--save", "", "--appendonly", "no"]
    assert kind == "shmcache", f"SHMCACHE_TEST_SERVER={kind}"
    return [sys.executable, "-m", "shmcache.cli", "serve", name, "--size", "64M", "--port", str(port), "--unix", path, "--workers", "1"]


@pytest.fixture(params=SERVERS)
def server(request, name, tmp_path):
    port, path, log = free_port(), str(tmp_path / "s"), tmp_path / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command_line(request.param, name, port, path, tmp_path), stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (pong(socket.AF_UNIX, path) and pong(socket.AF_INET, ("127.0.0.1", port))):
            assert process.poll() is None, f"it ended with {process.returncode}: {log.read_text()}"
            assert time.monotonic() < deadline, f"no answer to PING: {log.read_text()}"
            time.sleep(0.02)  # between two tries
        yield Server(request.param, name, port, path, process)
        assert process.poll() is None, f"it ended with {process.returncode}: {log.read_text()}"
        process.terminate()
        assert process.wait(30) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def eventually(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)  # between two looks at the condition


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


# ---- redis-cli ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(server):
    """cli("GET", "k") -> the line it prints; stdin=, and check=False for the whole result."""
    path = program("redis-cli")

    def run(*arguments, stdin=b"", check=True):
        argv = [path, "-p", str(server.port), *arguments]
        done = subprocess.run(argv, input=stdin, capture_output=True, timeout=30, check=False)
        if not check:
            return done
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.removesuffix(b"\n").decode()

    return run


def test_redis_cli_strings(cli):
    assert cli("PING") == "PONG"
    assert cli("PING", "hello there") == "hello there"
    assert cli("ECHO", "x") == "x"
    assert cli("SET", "k", "v") == "OK"
    assert cli("GET", "k") == "v"
    assert cli("GET", "nothing") == ""
    assert cli("SETNX", "k", "w") == "0"
    assert cli("SET", "k", "w", "NX") == ""
    assert cli("SET", "k", "w", "XX", "GET") == "v"
    assert cli("GETSET", "k", "x") == "w"
    assert cli("APPEND", "k", "yz") == "3"
    assert cli("STRLEN", "k") == "3"
    assert cli("GETRANGE", "k", "-2", "-1") == "yz"
    assert cli("SETRANGE", "k", "1", "--") == "3"
    assert cli("GETDEL", "k") == "x--"
    assert cli("EXISTS", "k") == "0"
    assert cli("MSET", "a", "1", "b", "2") == "OK"
    assert cli("MSETNX", "b", "1", "c", "2") == "0"
    assert cli("MGET", "a", "c", "b") == "1\n\n2"
    assert cli("INCR", "a") == "2"
    assert cli("INCRBY", "a", "40") == "42"
    assert cli("DECRBY", "a", "50") == "-8"
    assert cli("INCRBYFLOAT", "a", "0.5") == "-7.5"


def test_redis_cli_keys_and_expiry(cli):
    assert cli("SET", "k", "v", "EX", "100") == "OK"
    assert cli("TTL", "k") in ("100", "99")
    assert cli("EXPIRE", "k", "50", "GT") == "0"
    assert cli("EXPIRE", "k", "50") == "1"
    assert 49_000 < int(cli("PTTL", "k")) <= 50_000
    assert cli("PERSIST", "k") == "1"
    assert cli("TTL", "k") == "-1"
    assert cli("TTL", "nothing") == "-2"
    assert cli("GETEX", "k", "PX", "20") == "v"
    eventually(lambda: cli("EXISTS", "k") == "0")
    assert cli("MSET", "a:1", "1", "a:2", "2", "b:1", "3") == "OK"
    assert cli("TYPE", "a:1") == "string"
    assert cli("TYPE", "nothing") == "none"
    assert cli("DBSIZE") == "3"
    assert sorted(cli("KEYS", "a:*").split()) == ["a:1", "a:2"]
    assert sorted(cli("--scan", "--pattern", "?:1").split()) == ["a:1", "b:1"]
    assert cli("RENAME", "a:1", "c") == "OK"
    assert cli("EXISTS", "a:1", "c", "c") == "2"
    assert cli("DEL", "c", "a:2", "nothing") == "2"
    assert cli("FLUSHALL") == "OK"
    assert cli("DBSIZE") == "0"


def test_redis_cli_options(cli, server):
    assert cli("-3", "--no-raw", "GET", "nothing") == "(nil)"
    assert cli("-3", "SET", "n", "1") == "OK"
    assert cli("-3", "--no-raw", "INCR", "n") == "(integer) 2"
    assert cli("-2", "--no-raw", "MGET", "n", "nothing") == '1) "2"\n2) (nil)'
    assert json.loads(cli("--json", "MGET", "n", "nothing")) == ["2", None]
    assert cli("--csv", "MGET", "n", "n") == '"2","2"'
    assert cli("--no-auth-warning", "PING") == "PONG"
    assert cli("-n", "0", "GET", "n") == "2"
    assert cli("-r", "3", "INCR", "n") == "3\n4\n5"
    assert cli("-s", server.path, "GET", "n") == "5"
    assert cli("--quoted-input", "SET", r'"\x00key"', r'"\xff\r\n"') == "OK"
    assert cli("--quoted-input", "STRLEN", r'"\x00key"') == "3"
    assert cli(stdin=b"SET several lines\nGET several\nDEL several nothing\n") == "OK\nlines\n1"


def test_redis_cli_takes_a_value_from_standard_input(cli):
    value = bytes(range(256)) * 1000
    assert cli("-x", "SET", "k", stdin=value) == "OK"
    assert cli("GET", "k", check=False).stdout == value + b"\n"
    assert cli("-x", "APPEND", "k", stdin=b"\r\n") == str(len(value) + 2)
    assert cli("-X", "middle", "MSET", "a", "middle", "b", "2", stdin=b"$3\r\n") == "OK"
    assert cli("--no-raw", "GET", "a") == r'"$3\r\n"'


def test_redis_cli_is_told_what_is_wrong(cli):
    def refused(*arguments):
        done = cli("-e", *arguments, check=False)
        assert done.returncode == 1
        return (done.stdout + done.stderr).decode().strip()

    cli("SET", "text", "v")
    assert refused("INCR", "text") == "ERR value is not an integer or out of range"
    assert refused("INCRBYFLOAT", "text", "1") == "ERR value is not a valid float"
    assert refused("GET") == "ERR wrong number of arguments for 'get' command"
    assert refused("SET", "k", "v", "EX") == "ERR syntax error"
    assert refused("SET", "k", "v", "EX", "0") == "ERR invalid expire time in 'set' command"
    assert refused("EXPIRE", "k", "soon") == "ERR value is not an integer or out of range"
    assert refused("RENAME", "nothing", "k") == "ERR no such key"
    assert refused("NOSUCH", "a").startswith("ERR unknown command 'NOSUCH', with args beginning with: 'a'")
    assert cli("GET", "text") == "v"


# ---- redis-py -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def protocol(request):
    return request.param


@pytest.fixture(params=["tcp", "unix"])
def address(request, server):
    """What redis-py is told of where the server is."""
    return {"unix_socket_path": server.path} if request.param == "unix" else {"host": "127.0.0.1", "port": server.port}


@pytest.fixture
def client(address, protocol):
    redis = pytest.importorskip("redis")
    with redis.Redis(**address, protocol=protocol, socket_timeout=30) as r:
        yield r


def test_redis_py_strings(client):
    assert client.ping()
    assert client.echo("x") == b"x"
    assert client.set("k", "v")
    assert client.get("k") == b"v"
    assert client.get("nothing") is None
    assert client.set("k", "w", nx=True) is None
    assert client.set("new", "w", nx=True) is True
    assert client.set("nothing", "w", xx=True) is None
    assert client.set("k", b"\x00\xff\r\n", get=True) == b"v"
    assert client.get("k") == b"\x00\xff\r\n"
    assert client.setnx("k", "w") is False
    assert client.getset("k", "text") == b"\x00\xff\r\n"
    assert client.append("k", "ure") == 7
    assert client.strlen("k") == 7
    assert client.getrange("k", 0, 3) == b"text"
    assert client.setrange("k", 9, "!") == 10
    assert client.getdel("k") == b"texture\x00\x00!"
    assert client.getdel("k") is None
    assert client.mset({"a": 1, b"b\x00": "2", "c": 3.5})
    assert client.msetnx({"c": 1, "d": 2}) is False
    assert client.mget("a", "d", b"b\x00", "c") == [b"1", None, b"2", b"3.5"]
    assert client.incr("a") == 2
    assert client.decr("a", 12) == -10
    assert client.incrby("fresh", 7) == 7
    assert client.get("a") == b"-10"
    assert client.incrbyfloat("c", 0.25) == 3.75
    assert client.get("c") == b"3.75"


def test_redis_py_keys(client):
    assert client.mset({f"k:{i}": i for i in range(500)})
    client.set("other", "v")
    assert client.dbsize() == 501
    assert client.exists("k:1", "k:1", "nothing") == 2
    assert client.type("k:1") == b"string"
    assert client.type("nothing") == b"none"
    assert client.touch("k:1", "nothing") == 1
    assert sorted(client.keys("k:[12]")) == [b"k:1", b"k:2"]
    assert client.randomkey() is not None
    assert set(client.scan_iter(count=7)) == {b"other", *(b"k:%d" % i for i in range(500))}
    assert set(client.scan_iter(match="k:1?", count=50)) == {b"k:%d" % i for i in range(10, 20)}
    assert set(client.scan_iter(match="oth*", _type="STRING")) == {b"other"}
    assert client.rename("other", "renamed")
    assert client.renamenx("renamed", "k:1") is False
    assert client.copy("renamed", "k:1", replace=True) is True
    assert client.get("k:1") == b"v"
    assert client.delete("k:1", "k:2", "nothing") == 2
    assert client.unlink("k:3") == 1
    assert client.flushdb()
    assert client.dbsize() == 0
    assert list(client.scan_iter()) == []
    assert client.randomkey() is None


def test_redis_py_expiry(client):
    client.set("k", "v", ex=100)
    assert client.ttl("k") in (99, 100)
    client.set("k", "w", keepttl=True)
    assert 98_000 < client.pttl("k") <= 100_000
    assert abs(client.expiretime("k") - time.time() - 100) < 5
    assert client.expire("k", 50, gt=True) is False
    assert client.expire("k", 500, nx=True) is False
    assert client.expire("k", 50, lt=True) is True
    assert client.expireat("k", int(time.time()) + 1000, xx=True) is True
    assert 990 < client.ttl("k") <= 1000
    assert client.getex("k", persist=True) == b"w"
    assert client.ttl("k") == -1
    assert client.persist("k") is False
    assert client.ttl("nothing") == -2
    assert client.pexpire("nothing", 1) is False
    client.set("k", "v", ex=100)
    client.set("k", "v")
    assert client.ttl("k") == -1
    client.execute_command("SETEX", "brief", 1, "v")  # redis-py calls its own method deprecated
    client.execute_command("PSETEX", "briefer", 30, "v")
    client.set("briefest", "v", px=20)
    assert client.pexpire("k", 40)
    eventually(lambda: client.exists("k", "briefer", "briefest") == 0)
    eventually(lambda: client.get("brief") is None)
    client.set("k", "v")
    assert client.expire("k", -1) is True
    assert client.get("k") is None


def test_redis_py_decodes_responses(address, protocol):
    redis = pytest.importorskip("redis")
    with redis.Redis(**address, protocol=protocol, decode_responses=True, socket_timeout=30) as r:
        r.mset({"grüße": "välue", "n": 1})
        assert r.get("grüße") == "välue"
        assert r.mget("n", "nothing", "grüße") == ["1", None, "välue"]
        assert sorted(r.scan_iter()) == ["grüße", "n"]
        assert r.type("n") == "string"
        assert r.pipeline().incr("n").get("n").execute() == [2, "2"]


def test_redis_py_errors_leave_the_connection_usable(client):
    redis = pytest.importorskip("redis")
    client.set("k", "text")
    with pytest.raises(redis.ResponseError, match="not an integer or out of range"):
        client.incr("k")
    with pytest.raises(redis.ResponseError, match="unknown command"):
        client.execute_command("NOSUCH", "a")
    with pytest.raises(redis.ResponseError, match="wrong number of arguments for 'get' command"):
        client.execute_command("GET")
    client.set("n", (1 << 63) - 1)
    with pytest.raises(redis.ResponseError, match="overflow"):
        client.incr("n")
    assert client.get("k") == b"text"


@pytest.mark.parametrize("transaction", [False, True], ids=["plain", "transaction"])
def test_redis_py_pipeline(client, transaction):
    redis = pytest.importorskip("redis")
    with client.pipeline(transaction=transaction) as p:
        for i in range(1000):
            p.set(f"k:{i}", i * i)
        assert p.execute() == [True] * 1000
        p.get("k:30").incr("k:30").get("nothing").ttl("k:30").mget("k:1", "k:2").delete("k:1", "nothing")
        assert p.execute() == [b"900", 901, None, -1, [b"1", b"4"], 1]
        p.set("before", 1).incr("k:wrong").set("k:wrong", "text").incr("k:wrong").set("after", 1)
        got = p.execute(raise_on_error=False)
        assert got[:3] == [True, 1, True]
        assert isinstance(got[3], redis.ResponseError)
        assert got[4] is True
    assert client.exists("before", "after") == 2


def test_redis_py_optimistic_transaction(client):
    redis = pytest.importorskip("redis")
    client.set("k", 1)
    with client.pipeline() as p:
        p.watch("k")
        assert p.get("k") == b"1"
        client.set("k", 2)
        p.multi()
        p.set("k", 3).set("other", 1)
        with pytest.raises(redis.WatchError):
            p.execute()
    assert client.mget("k", "other") == [b"2", None]
    with client.pipeline() as p:
        p.watch("k")
        p.multi()
        p.incr("k")
        assert p.execute() == [3]
    assert client.transaction(lambda p: p.multi() or p.incr("k"), "k") == [4]
    with client.pipeline() as p:
        p.execute_command("GET")  # refused when it is queued: nothing is done
        p.set("k", 9)
        with pytest.raises(redis.ResponseError):
            p.execute()
    assert client.get("k") == b"4"


def test_redis_py_pool_of_threads(address, protocol):
    redis = pytest.importorskip("redis")
    if "unix_socket_path" in address:
        address = {"connection_class": redis.UnixDomainSocketConnection, "path": address["unix_socket_path"]}
    pool = redis.BlockingConnectionPool(max_connections=4, timeout=20, protocol=protocol, socket_timeout=30, **address)
    r = redis.Redis(connection_pool=pool)
    failures = []

    def work(i):
        try:
            for n in range(100):
                r.incr("n")
                r.set(f"{i}:{n}", f"{i}:{n}")
                assert r.get(f"{i}:{n}") == b"%d:%d" % (i, n)
                assert r.pipeline(transaction=n % 2 == 0).incr("n").get(f"{i}:{n}").execute()[1] == b"%d:%d" % (i, n)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []
    assert r.get("n") == b"1600"
    r.close()
    pool.disconnect()


def test_redis_py_large_and_many(client):
    value = os.urandom(5 << 20)
    client.set("large", value)
    assert client.get("large") == value
    assert client.getrange("large", 1 << 20, (1 << 20) + 9) == value[1 << 20 : (1 << 20) + 10]
    client.set("k" * 4000, "v")
    assert client.get("k" * 4000) == b"v"
    client.set("empty", b"")
    assert client.get("empty") == b""
    with client.pipeline(transaction=False) as p:  # 20 MB of replies before the first is read
        for _ in range(4):
            p.get("large")
        assert [len(x) for x in p.execute()] == [len(value)] * 4
    many = {f"key:{i}": b"%d" % i * 20 for i in range(5000)}
    client.mset(many)
    assert client.mget(list(many)) == list(many.values())


def test_redis_py_lock(client):
    redis = pytest.importorskip("redis")
    with client.lock("lock", timeout=30) as held:
        assert held.owned()
        assert held.locked()
        assert client.lock("lock", timeout=30).acquire(blocking=False) is False
        assert held.extend(30)
        assert held.reacquire()
    assert client.get("lock") is None
    other = client.lock("lock", timeout=30)
    assert other.acquire(blocking=False)
    client.set("lock", "somebody else")
    with pytest.raises(redis.exceptions.LockNotOwnedError):
        other.release()


def test_redis_py_scripts(client):
    redis = pytest.importorskip("redis")
    double = client.register_script("local n = redis.call('get', KEYS[1]) redis.call('set', KEYS[1], n * ARGV[1]) return n * ARGV[1]")
    client.set("n", 3)
    assert double(keys=["n"], args=[2]) == 6
    client.script_flush()
    assert double(keys=["n"], args=[2]) == 12
    with client.pipeline() as pipe:
        double(keys=["n"], args=[2], client=pipe)
        pipe.get("n")
        assert pipe.execute() == [24, b"24"]
    assert client.script_exists(double.sha) == [True]
    assert client.eval_ro("return redis.call('get', KEYS[1])", 1, "n") == b"24"
    with pytest.raises(redis.exceptions.NoScriptError):
        client.evalsha("0" * 40, 0)


def test_dogpile_cache_with_its_distributed_lock(address):
    """Of many that miss one key at once, one makes the value, in whichever region object."""
    dogpile = pytest.importorskip("dogpile.cache")
    redis = pytest.importorskip("redis")
    made, got, failures = [], [], []

    def region():
        pool = redis.UnixDomainSocketConnection if "unix_socket_path" in address else redis.Connection
        where = {"path": address["unix_socket_path"]} if "unix_socket_path" in address else address
        arguments = {"connection_pool": redis.ConnectionPool(connection_class=pool, **where), "distributed_lock": True, "thread_local_lock": False, "lock_timeout": 30}
        return dogpile.make_region().configure("dogpile.cache.redis", expiration_time=100, arguments=arguments)

    def make():
        made.append(1)
        started.wait(30)
        return {"value": 1}

    def use():
        try:
            got.append(region().get_or_create("key", make))
        except BaseException as e:
            failures.append(e)

    started = threading.Barrier(2)
    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    started.wait(30)
    for thread in threads:
        thread.join()
    assert failures == []
    assert got == [{"value": 1}] * 6
    assert made == [1]
    one = region()
    one.set_multi({"a": 1, "b": 2})
    assert one.get_multi(["a", "b"]) == [1, 2]
    one.delete("a")
    assert not one.get("a")


def test_redis_py_asyncio(address, protocol):
    redis = pytest.importorskip("redis.asyncio")

    async def all_of_it():
        async with redis.Redis(**address, protocol=protocol, max_connections=20, socket_timeout=30) as r:
            assert await r.ping()
            assert await r.set("k", "v", ex=100)
            assert await r.ttl("k") in (99, 100)
            assert await r.get("k") == b"v"

            async def one(i):
                await r.set(f"n:{i}", i)
                await r.incr("total", i)
                return await r.get(f"n:{i}")

            for start in range(0, 200, 20):
                got = await asyncio.gather(*(one(i) for i in range(start, start + 20)))
                assert got == [b"%d" % i for i in range(start, start + 20)]
            assert await r.get("total") == b"%d" % sum(range(200))
            assert {k async for k in r.scan_iter(match="n:*", count=10)} == {b"n:%d" % i for i in range(200)}
            for transaction in (False, True):
                async with r.pipeline(transaction=transaction) as p:
                    assert await p.set("a", 1).incr("a").mget("a", "nothing").execute() == [True, 2, [b"2", None]]
            assert await r.pexpire("k", 20)
            for _ in range(1000):
                if await r.get("k") is None:
                    break
                await asyncio.sleep(0.01)  # between two looks
            assert await r.exists("k") == 0
            assert await r.flushall()
            assert await r.dbsize() == 0
        async with redis.Redis(**address, protocol=protocol, decode_responses=True, socket_timeout=30) as r:
            await r.set("k", "grüße")
            assert await r.get("k") == "grüße"

    asyncio.run(asyncio.wait_for(all_of_it(), 60))


def test_redis_py_is_said_hello(client, protocol):
    hello = client.execute_command("HELLO", protocol)
    if isinstance(hello, list):
        hello = dict(zip(hello[::2], hello[1::2], strict=True))
    assert hello[b"proto"] == protocol
    assert hello[b"server"] == b"redis"
    assert client.info("server")["redis_version"].startswith("7.0")
    assert client.client_setname("a-name")
    assert client.client_getname() in ("a-name", b"a-name")
    assert client.client_id() > 0


# ---- a worker on the same segment -----------------------------------------------------------------------------------------------


@pytest.fixture
def worker(server):
    if server.kind != "shmcache":
        pytest.skip("only a segment has workers")
    with shmcache.attach(server.name) as cache:
        yield cache


def test_values_of_a_worker_and_of_redis_py(worker, client):
    worker.set("text", "grüße")
    worker.set(b"bytes", b"\x00\xff\r\n")
    worker.set("int", -42)
    assert client.mget("text", "bytes", "int", "nothing") == ["grüße".encode(), b"\x00\xff\r\n", b"-42", None]
    for i in range(200):
        client.set(f"k:{i % 3}", b"v%d\x00" % i)
        assert worker.get(f"k:{i % 3}") == b"v%d\x00" % i
        worker.set(f"k:{i % 3}", f"w{i}")
        assert client.get(f"k:{i % 3}") == b"w%d" % i
    d = {"name": "Ada", "langs": ["en", "fr"], "n": 3}
    worker.set("dict", d)
    assert msgpack.unpackb(client.get("dict")) == d
    assert worker.get("dict") == d
    large = os.urandom(3 << 20)
    client.set("large", large)
    assert worker.get("large") == large
    worker.set("large", large[::-1])
    assert client.get("large") == large[::-1]
    worker.set_many({f"m:{i}": i for i in range(300)})
    assert client.mget([f"m:{i}" for i in range(300)]) == [b"%d" % i for i in range(300)]
    assert set(client.scan_iter(match="m:*")) == {b"m:%d" % i for i in range(300)}
    client.mset({f"m:{i}": b"x" for i in range(300)})
    assert set(worker.get_many([f"m:{i}" for i in range(300)]).values()) == {b"x"}
    client.delete("text")
    assert worker.get("text") is None
    worker.delete(b"bytes")
    assert client.get("bytes") is None
    assert client.dbsize() == len(worker)
    client.flushall()
    assert len(worker) == 0
    assert worker.verify() == []


def test_lives_of_a_worker_and_of_redis_py(worker, client):
    client.set("k", "v", ex=100)
    assert 98 < worker.ttl("k") <= 100
    assert client.persist("k")
    assert worker.ttl("k") == float("inf")
    worker.expire("k", 50)
    assert 49_000 < client.pttl("k") <= 50_000
    worker.set("w", b"v", ttl=200)
    assert client.ttl("w") in (199, 200)
    assert client.expire("w", 20)
    assert 18 < worker.ttl("w") <= 20
    worker.persist("w")
    assert client.ttl("w") == -1
    worker.set("brief", "v", ttl=0.03)
    eventually(lambda: client.get("brief") is None)
    client.set("brief", "v", px=30)
    eventually(lambda: worker.get("brief") is None)


def test_counters_of_a_worker_and_of_redis_py(worker, client):
    assert worker.incr("n", default=0) == 1
    assert client.incr("n") == 2
    assert worker.incr("n") == 3
    assert client.incrby("n", 39) == 42
    assert worker.get("n") == 42
    assert client.get("n") == b"42"
    assert client.decr("fresh", 5) == -5
    assert worker.incr("fresh", 6) == 1
    failures = []

    def of_the_worker():
        try:
            for _ in range(2000):
                worker.incr("both")
        except BaseException as e:
            failures.append(e)

    thread = threading.Thread(target=of_the_worker)
    client.incr("both")
    thread.start()
    for _ in range(20):
        with client.pipeline(transaction=False) as p:
            for _ in range(50):
                p.incr("both")
            p.execute()
    thread.join()
    assert failures == []
    assert worker.get("both") == 3001
    assert client.get("both") == b"3001"


# ---- node -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def node_modules():
    """The folder with NODE_PACKAGES: installed once, kept from run to run."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node or npm is not installed")
    done, wanted = NODE_FOLDER / "installed", " ".join(NODE_PACKAGES)
    NODE_FOLDER.mkdir(parents=True, exist_ok=True)
    with (NODE_FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists() or done.read_text() != wanted:
            argv = ["npm", "install", "--prefix", str(NODE_FOLDER), "--no-audit", "--no-fund", "--ignore-scripts", *NODE_PACKAGES]
            try:
                npm = subprocess.run(argv, capture_output=True, text=True, timeout=180, check=False)
            except subprocess.TimeoutExpired:
                pytest.skip("npm install took over 180 s")
            if npm.returncode:
                pytest.skip(f"npm install failed: {npm.stderr.strip().splitlines()[:1]}")
            done.write_text(wanted)
    return NODE_FOLDER


NODE_REDIS = """
import { createRequire } from "node:module";
const [folder, port, path, protocol] = process.argv.slice(2);
const { createClient } = createRequire(folder + "/")("redis");
const socket = path ? { path } : { host: "127.0.0.1", port: Number(port) };
const client = createClient({ socket, RESP: Number(protocol) });
client.on("error", (e) => { console.error(e); process.exit(1); });
await client.connect();
const got = {};
got.set = await client.set("k", "välue");
got.get = await client.get("k");
got.miss = await client.get("nothing");
got.mset = await client.mSet({ a: "1", b: "2" });
got.mget = await client.mGet(["a", "nothing", "b"]);
got.incr = await client.incr("n");
got.incrBy = await client.incrBy("n", 41);
got.expire = await client.expire("k", 100);
got.ttl = await client.ttl("k");
got.noTtl = await client.ttl("n");
got.px = await client.set("brief", "v", { PX: 20 });
got.nx = await client.set("k", "w", { NX: true });
got.together = await Promise.all(Array.from({ length: 100 }, (_, i) => client.incrBy("sum", i)));
got.pipeline = await client.multi().set("p", "1").incr("p").get("p").execAsPipeline();
got.multi = await client.multi().set("m", "1").incrBy("m", 9).mGet(["m", "nothing"]).exec();
got.error = await client.incr("k").catch((e) => e.message);
got.scanned = [];
for await (const keys of client.scanIterator({ MATCH: "[ab]", COUNT: 5 })) got.scanned.push(...keys);
got.del = await client.del(["a", "b", "nothing"]);
for (let i = 0; i < 500 && (await client.exists("brief")); i++) await new Promise((r) => setTimeout(r, 10));
got.brief = await client.get("brief");
await client.close();
console.log(JSON.stringify(got));
"""

IOREDIS = """
import { createRequire } from "node:module";
const [folder, port, path] = process.argv.slice(2);
const Redis = createRequire(folder + "/")("ioredis");
const options = { maxRetriesPerRequest: 1 };
const client = path ? new Redis(path, options) : new Redis(Number(port), "127.0.0.1", options);
client.on("error", (e) => { console.error(e); process.exit(1); });
const got = {};
got.set = await client.set("k", "välue");
got.get = await client.get("k");
got.miss = await client.get("nothing");
got.mset = await client.mset({ a: "1", b: "2" });
got.mget = await client.mget("a", "nothing", "b");
got.incr = await client.incr("n");
got.incrBy = await client.incrby("n", 41);
got.expire = await client.expire("k", 100);
got.ttl = await client.ttl("k");
got.noTtl = await client.ttl("n");
got.px = await client.set("brief", "v", "PX", 20);
got.nx = await client.set("k", "w", "NX");
got.together = await Promise.all(Array.from({ length: 100 }, (_, i) => client.incrby("sum", i)));
const replies = (of) => of.map(([error, reply]) => { if (error) throw error; return reply; });
got.pipeline = replies(await client.pipeline().set("p", "1").incr("p").get("p").exec());
got.multi = replies(await client.multi().set("m", "1").incrby("m", 9).mget("m", "nothing").exec());
got.error = await client.incr("k").catch((e) => e.message);
got.scanned = [];
for await (const keys of client.scanStream({ match: "[ab]", count: 5 })) got.scanned.push(...keys);
got.del = await client.del("a", "b", "nothing");
for (let i = 0; i < 500 && (await client.exists("brief")); i++) await new Promise((r) => setTimeout(r, 10));
got.brief = await client.get("brief");
await client.quit();
console.log(JSON.stringify(got));
"""


@pytest.mark.parametrize("transport", ["tcp", "unix"])
@pytest.mark.parametrize(
    ("script", "version"), [(NODE_REDIS, 2), (NODE_REDIS, 3), (IOREDIS, 2)], ids=["node-redis-resp2", "node-redis-resp3", "ioredis"]
)
def test_node(server, node_modules, tmp_path, script, version, transport):
    (tmp_path / "client.mjs").write_text(script)
    path = server.path if transport == "unix" else ""
    argv = ["node", str(tmp_path / "client.mjs"), str(node_modules), str(server.port), path, str(version)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got.pop("ttl") in (99, 100)
    assert sorted(got.pop("scanned")) == ["a", "b"]
    together = got.pop("together")
    assert together == [i * (i + 1) // 2 for i in range(100)]
    assert got == {
        "set": "OK", "get": "välue", "miss": None, "mset": "OK", "mget": ["1", None, "2"], "incr": 1, "incrBy": 42, "expire": 1,
        "noTtl": -1, "px": "OK", "nx": None, "pipeline": ["OK", 2, "2"], "multi": ["OK", 10, ["10", None]],
        "error": "ERR value is not an integer or out of range", "del": 2, "brief": None,
    }  # fmt: skip


# ---- redis-benchmark ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [(), ("-P", "16"), ("-3", "-P", "16"), ("-r", "1000", "-d", "100")], ids=["plain", "P16", "resp3", "keys"]
)
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_redis_benchmark(server, transport, options):
    where = ["-s", server.path] if transport == "unix" else ["-p", str(server.port)]
    argv = [program("redis-benchmark"), *where, "-n", "5000", "-t", "set,get,incr,mset,ping", "-q", *options]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rror" not in done.stdout + done.stderr
    lines = [line.split("\r")[-1] for line in done.stdout.splitlines()]
    rates = {line.partition(":")[0]: float(line.partition(":")[2].split()[0]) for line in lines if "requests per second" in line}
    assert set(rates) == {"PING_INLINE", "PING_MBULK", "SET", "GET", "INCR", "MSET (10 keys)"}
    assert min(rates.values()) > 0
    redis = pytest.importorskip("redis")
    with redis.Redis(port=server.port) as r:
        if "-r" in options:
            counters = r.mget(list(r.scan_iter(match="counter:*", count=1000)))
            assert sum(map(int, counters)) == 5000
        else:
            assert 5000 <= int(r.get("counter:__rand_int__")) < 5016
            assert len(r.get("key:__rand_int__")) == 3


# ---- Django ---------------------------------------------------------------------------------------------------------------------

DJANGO = """
import datetime, sys, time
from django.conf import settings
settings.configure(
    CACHES={
        "default": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": sys.argv[1], "KEY_PREFIX": "site", "TIMEOUT": 300,
        }
    }
)
import django
django.setup()
from django.core.cache import cache

value = {"name": "Ada", "when": datetime.date(1843, 8, 1), "tuple": (1, None, 2.5)}
cache.set("k", value)
assert cache.get("k") == value
assert cache.get("nothing") is None and cache.get("nothing", "default") == "default"
assert cache.add("k", 1) is False and cache.add("new", 1) is True and cache.get("new") == 1
cache.set("n", 41)
assert cache.incr("n") == 42 and cache.decr("n", 2) == 40 and cache.get("n") == 40
try:
    cache.incr("nothing")
except ValueError:
    pass
else:
    raise AssertionError("incr of nothing")
assert cache.touch("k", 100) is True and cache.touch("nothing", 100) is False
raw = cache._cache.get_client()
assert raw.ttl("site:1:k") in (99, 100) and raw.ttl("site:1:n") in range(290, 301)
assert cache.touch("k", None) is True and raw.ttl("site:1:k") == -1
assert cache.has_key("k") and "k" in cache and "nothing" not in cache
assert cache.delete("k") is True and cache.delete("k") is False and cache.get("k") is None
assert cache.set_many({"a": 1, "b": "two", "c": b"three"}, timeout=60) == []
assert cache.get_many(["a", "nothing", "b", "c"]) == {"a": 1, "b": "two", "c": b"three"}
assert raw.ttl("site:1:b") in (59, 60)
cache.delete_many(["a", "b", "nothing"])
assert cache.get_many(["a", "b", "c"]) == {"c": b"three"}
cache.set("versioned", 1, version=2)
assert cache.get("versioned") is None and cache.get("versioned", version=2) == 1
assert cache.incr_version("versioned", version=2) == 3 and cache.get("versioned", version=3) == 1
cache.set("gone", 1, timeout=0)
assert cache.get("gone") is None
cache.set("forever", 1, timeout=None)
assert raw.ttl("site:1:forever") == -1
cache.set("brief", 1, timeout=1)
until = time.monotonic() + 10
while cache.get("brief") is not None:
    assert time.monotonic() < until
    time.sleep(0.02)
assert cache.get_or_set("made", lambda: [1, 2]) == [1, 2] and cache.get("made") == [1, 2]
assert cache.clear() is True and cache.get("forever") is None and raw.dbsize() == 0
cache.close()
print("done")
"""


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_django(server, transport):
    pytest.importorskip("django")
    pytest.importorskip("redis")
    where = f"unix://{server.path}" if transport == "unix" else f"redis://127.0.0.1:{server.port}"
    done = subprocess.run([sys.executable, "-c", DJANGO, where], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
