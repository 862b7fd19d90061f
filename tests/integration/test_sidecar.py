"""`shmcache serve` as a service: its processes, who may connect, what happens when somebody dies, and what others see."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

import shmcache
from shmcache import segment
from shmcache.core import _resp
from shmcache.sidecar import server
from shmcache.supervisor import datadir, snapshot
from tests.integration.service import LIMIT, is_worker, running, until
from tests.redis.inprocess import InProcess
from tests.redis.resp import Connection
from tests.redis.servers import free_port

ROOT = Path(shmcache.__file__).parents[1]


def raw(service, *words, read=1):
    """What a connection of its own is told."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", service.port), LIMIT)) as sock:
        sock.sendall(b"".join(words))
        data = b""
        while data.count(b"\r\n") < read and (part := sock.recv(65536)):
            data += part
        return data


# ---- life ---------------------------------------------------------------------------------------------------------------------------


def test_it_ends_in_good_order_and_leaves_the_segment(serve, name):
    service = serve()
    service.client().set("k", "v")
    assert service.stop() == 0
    assert not os.path.exists(service.path)
    with shmcache.attach(name) as cache:
        assert cache["k"] == b"v"
        assert cache.processes() == [p for p in cache.processes() if p["pid"] == os.getpid()]


@pytest.mark.parametrize("who", ["worker", "supervisor"])
def test_who_dies_is_started_again(serve, name, who):
    service = serve()
    client = service.client(retry=None)
    client.set("k", "v")
    with shmcache.attach(name) as cache:
        first = service.workers()[0] if who == "worker" else cache.supervisor()["pid"]
        os.kill(first, signal.SIGKILL)
        if who == "worker":
            until(lambda: [pid for pid in service.workers() if pid != first])
        else:
            until(lambda: cache.supervisor()["alive"] and cache.supervisor()["pid"] != first)

    def answers():
        with contextlib.suppress(redis.ConnectionError):
            return service.client().get("k") == b"v"

    until(answers)
    assert "started again" in service.said()


def test_its_children_end_when_it_is_killed(serve, name):
    service = serve("--workers", "2")
    workers = service.workers()
    service.process.kill()
    service.process.wait()
    until(lambda: not any(map(is_worker, workers)))
    with shmcache.attach(name) as cache:
        until(lambda: not cache.supervisor()["alive"])


def test_a_port_that_is_taken_is_named(serve, name, tmp_path):
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        argv = [sys.executable, "-m", "shmcache.cli", "serve", name, "--size", "8M", "--port", str(sock.getsockname()[1])]
        out = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert out.returncode == 1
    assert "Address already in use" in out.stderr


def test_a_socket_that_somebody_listens_on_is_left_to_him(serve, name):
    service = serve()
    argv = [sys.executable, "-m", "shmcache.cli", "serve", name + "-b", "--size", "8M", "--port", "0", "--unix", service.path]
    out = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert out.returncode == 1
    assert "somebody listens" in out.stderr
    assert service.client().ping()


def test_systemd_is_told(serve, tmp_path, monkeypatch):
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(LIMIT)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        service = serve()
        assert sock.recv(1000).startswith(b"READY=1")
        service.stop()
        assert sock.recv(1000) == b"STOPPING=1"


def test_shutdown_ends_all(serve):
    service = serve("--workers", "2")
    with pytest.raises(redis.ConnectionError):
        service.client(retry=None).execute_command("SHUTDOWN", "NOSAVE")
    assert service.process.wait(LIMIT) == 0


# ---- deaths under load ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_connections_of_the_other_process_see_no_death(serve, name, seconds):
    """One of two event loops is killed every second: clients of the other go on, and nothing that was acknowledged is lost."""
    service = serve("--workers", "2", size="128M")
    stop, wrong, done, interrupted = threading.Event(), [], [], []

    def use(i):
        client, n = service.client(retry=None), 0
        while not stop.is_set():
            key, value, pid = f"{i}:{n % 500}", f"{i}:{n}".encode(), None
            try:
                pid = client.info("server")["process_id"]
                while not stop.is_set():
                    client.set(key, value)
                    if client.get(key) != value:
                        wrong.append(key)
                    n += 1
                    key, value = f"{i}:{n % 500}", f"{i}:{n}".encode()
            except (redis.ConnectionError, ConnectionError):
                interrupted.append(pid)  # its own process died; None: before it said which it is
                client = service.client(retry=None)
        done.append(n)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(6)]
    killed = []
    with shmcache.attach(name) as cache, running(*threads, stop=stop):
        until_ = time.monotonic() + seconds
        while time.monotonic() < until_:
            victim = service.workers()[len(killed) % 2 :][0]
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
            until(lambda victim=victim: len([pid for pid in service.workers() if pid != victim]) == 2)
            stop.wait(1)
            cache.set("worker", len(killed))
            assert int(service.client().get("worker")) == len(killed)
    assert wrong == [] and len(done) == 6 and min(done) > 0
    assert set(interrupted) <= {None, *killed}, "an error on a connection of a process that lived"
    with shmcache.attach(name) as cache:
        assert cache.verify() == []


def test_what_always_has_acknowledged_is_there_after_everybody_was_killed(serve, name, tmp_path):
    """Pipelines of several clients share the disk's syncs; replies leave when they are durable."""
    data = tmp_path / "data"
    service = serve("--data-dir", str(data), "--log", "always", "--snapshot-every", "1000")
    acknowledged = [0] * 4

    def use(i):
        client, n = service.client(retry=None), 0
        with contextlib.suppress(redis.ConnectionError, ConnectionError):
            while True:
                with client.pipeline(transaction=n % 2 == 0) as pipe:
                    for k in range(20):
                        pipe.set(f"{i}:{k}", n)
                    pipe.incr(f"{i}:n")
                    pipe.execute()
                n += 1
                acknowledged[i] = n

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: min(acknowledged) > 20)
    with shmcache.attach(name) as cache:
        pids = [cache.supervisor()["pid"], *service.workers()]
    service.process.kill()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(LIMIT)
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
    shmcache.unlink(name)
    with datadir.take(data) as folder:
        snapshot.restore(name, folder)
    with shmcache.attach(name) as cache:
        for i in range(4):
            assert cache[f"{i}:n"] in (acknowledged[i], acknowledged[i] + 1)
            assert all(int(cache[f"{i}:{k}"]) in (acknowledged[i] - 1, acknowledged[i]) for k in range(20))


# ---- who may connect -------------------------------------------------------------------------------------------------------------------


def test_password(serve, tmp_path):
    (tmp_path / "password").write_text("secret\n")
    service = serve("--password-file", str(tmp_path / "password"))
    with pytest.raises(redis.AuthenticationError):
        service.client().get("k")
    with pytest.raises(redis.AuthenticationError):
        service.client(password="other").get("k")
    assert service.client(password="secret").set("k", "v")
    assert service.client(username="default", password="secret", protocol=3).get("k") == b"v"
    assert raw(service, b"HELLO 3\r\n").startswith(b"-NOAUTH")
    assert b"unauthenticated" in raw(service, b"*100\r\n")


def test_the_password_is_not_seen_among_the_processes(serve, tmp_path):
    (tmp_path / "password").write_text("not-to-be-seen\n")
    service = serve("--password-file", str(tmp_path / "password"))
    assert service.client(password="not-to-be-seen").ping()
    assert not [pid for pid in (service.process.pid, *service.workers()) if b"not-to-be-seen" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_the_unix_socket_is_its_owners(serve):
    service = serve("--unix-mode", "750")
    assert os.stat(service.path).st_mode & 0o777 == 0o750


def test_tls(serve, tmp_path):
    if subprocess.run(["openssl", "version"], capture_output=True, check=False).returncode:
        pytest.skip("no openssl to make a certificate")
    key, cert = tmp_path / "key", tmp_path / "cert"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    service = serve("--tls-cert", str(cert), "--tls-key", str(key))
    client = redis.Redis(port=service.port, ssl=True, ssl_ca_certs=str(cert), ssl_check_hostname=False)
    assert client.set("k", b"v" * 100_000) and client.get("k") == b"v" * 100_000
    with pytest.raises((redis.ConnectionError, ssl.SSLError)):
        redis.Redis(port=service.port, retry=None).ping()
    assert service.client().get("k") == b"v" * 100_000


def test_tls_with_certificates_of_clients(serve, tmp_path):
    if subprocess.run(["openssl", "version"], capture_output=True, check=False).returncode:
        pytest.skip("no openssl to make certificates")

    def make(name, *signed_by):
        key, cert = str(tmp_path / f"{name}.key"), str(tmp_path / f"{name}.crt")
        argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", f"/CN={name}"]
        argv += ["-addext", "keyUsage=critical,digitalSignature,keyCertSign"]  # Python 3.13 verifies strictly: an authority has to say so
        subprocess.run([*argv, *signed_by], check=True, capture_output=True)
        return cert, key

    ca, ca_key = make("authority")
    other, other_key = make("other")
    cert, key = make("localhost", "-CA", ca, "-CAkey", ca_key)
    mine, my_key = make("client", "-CA", ca, "-CAkey", ca_key)
    foreign, foreign_key = make("foreign", "-CA", other, "-CAkey", other_key)
    service = serve("--tls-cert", cert, "--tls-key", key, "--tls-ca", ca)

    def client(**options):
        return redis.Redis(port=service.port, ssl=True, ssl_ca_certs=ca, ssl_check_hostname=False, retry=None, **options)

    assert client(ssl_certfile=mine, ssl_keyfile=my_key).set("k", "v")
    for options in ({}, {"ssl_certfile": foreign, "ssl_keyfile": foreign_key}):
        with pytest.raises((redis.ConnectionError, ssl.SSLError)):
            client(**options).get("k")
    assert client(ssl_certfile=mine, ssl_keyfile=my_key).get("k") == b"v"


# ---- users and permissions ---------------------------------------------------------------------------------------------------------------


def connections_to_all(service, **options):
    """A client of one connection to each of two processes."""
    found = {}

    def look():
        client = service.client(single_connection_client=True, **options)
        found.setdefault(client.info("server")["worker"], client)
        return len(found) == 2

    until(look)
    return [found[0], found[1]]


def test_a_command_that_a_pause_has_kept_is_refused_if_its_user_may_not_run_it_any_more(serve):
    service = serve()
    client = service.client(single_connection_client=True)
    assert client.execute_command("ACL SETUSER alice on >a ~* +@all")
    with contextlib.closing(socket.create_connection(("127.0.0.1", service.port), LIMIT)) as sock:
        sock.settimeout(LIMIT)
        sock.sendall(b"AUTH alice a\r\n")
        assert sock.recv(100) == b"+OK\r\n"
        client.client_pause(LIMIT * 1000, all=False)
        sock.sendall(b"SET k v\r\n")
        until(lambda: any(c["user"] == "alice" and "b" in c["flags"] for c in client.client_list()))
        assert client.execute_command("ACL SETUSER alice -set")
        client.client_unpause()
        assert sock.recv(100) == b"-NOPERM this user has no permissions to run the 'set' command\r\n"
    assert client.get("k") is None


def users_file(folder, text, mode=0o600):
    path = folder / "users"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_users_of_all_processes(serve, tmp_path):
    path = users_file(tmp_path, "user default on nopass ~* &* +@all\nuser alice on >a ~a:* resetchannels -@all +get +set +info +client|list\n")
    service = serve("--workers", "2", "--acl-file", str(path))
    one, two = connections_to_all(service)
    alice = connections_to_all(service, username="alice", password="a")
    for client in alice:
        assert client.set("a:1", "v") and client.get("a:1") == b"v"
        with pytest.raises(redis.exceptions.NoPermissionError, match="one of the keys"):
            client.get("b")
        with pytest.raises(redis.exceptions.NoPermissionError, match="'flushall' command"):
            client.flushall()
    assert one.execute_command("ACL SETUSER alice resetkeys ~b:*")

    def refused(client):
        with contextlib.suppress(redis.exceptions.NoPermissionError):
            client.get("a:1")
            return False
        return True

    assert all(map(refused, alice))
    refusals = [entry["object"] for entry in one.acl_log(100)]
    assert [refusals.count(what) for what in ("a:1", "b", "flushall")] == [2, 2, 2], "of both processes"
    assert all(client.set("b:1", "v") for client in alice)
    assert two.execute_command("ACL DELUSER alice") == 1
    for client in alice:
        until(lambda client=client: fails(client, redis.ConnectionError))
    assert one.acl_users() == ["default"]


def changed(client, number):
    """Has the client had to connect again?"""
    with contextlib.suppress(redis.ConnectionError):
        return client.client_id() != number


def fails(client, error):
    try:
        client.get("b:1")
    except error:
        return True
    except redis.RedisError:
        pass
    return False


def test_a_process_that_is_started_again_knows_what_was_changed(serve, tmp_path):
    path = users_file(tmp_path, "user alice on >a ~* +@all\nuser eve on >e ~* +@all\n")
    service = serve("--workers", "2", "--acl-file", str(path))
    one, two = connections_to_all(service)
    assert one.execute_command("ACL SETUSER bob on >b ~b:* -@all +get")
    assert two.execute_command("ACL SETUSER alice -set")
    assert two.execute_command("ACL DELUSER eve") == 1
    assert one.config_set("timeout", 77) and two.config_set("requirepass", "secret")
    known = one.acl_list()
    assert known == two.acl_list() and one.config_get("requirepass") == {"requirepass": "secret"}
    assert [line.split()[1] for line in known] == ["alice", "bob", "default"]
    before = service.workers()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    until(lambda: len(service.workers()) == 2 and not set(before) & set(service.workers()))

    def begun():
        with contextlib.suppress(redis.ConnectionError):
            return connections_to_all(service, password="secret")

    for client in until(begun):
        assert client.acl_list() == known
        assert client.config_get("timeout") == {"timeout": "77"} and client.config_get("requirepass") == {"requirepass": "secret"}
    with pytest.raises(redis.AuthenticationError):
        service.client().ping()
    with pytest.raises(redis.AuthenticationError):
        service.client(username="eve", password="e").ping()
    with pytest.raises(redis.exceptions.NoPermissionError):
        service.client(username="bob", password="b").get("a")


def test_users_are_loaded_and_saved(serve, tmp_path):
    path = users_file(tmp_path, "user alice on >a ~* +@all\n")
    service = serve("--workers", "2", "--acl-file", str(path))
    one, two = connections_to_all(service)
    alice = service.client(username="alice", password="a", single_connection_client=True)
    number = alice.client_id()
    assert one.execute_command("ACL SETUSER bob on nopass +ping")
    assert one.execute_command("ACL SAVE")
    assert path.read_text() == "\n".join(one.acl_list()) + "\n" and path.stat().st_mode & 0o777 == 0o600
    good = path.read_text()
    path.write_text(good + "user eve on nopass +get\nuser x +nope\n")
    with pytest.raises(redis.ResponseError, match=r"users:5: Error in applying operation '\+nope'.*no change"):
        one.execute_command("ACL LOAD")
    assert one.acl_users() == ["alice", "bob", "default"] and alice.client_id() == number
    path.write_text("user alice on >a ~* +@all\nuser eve on nopass +get\n")
    assert one.execute_command("ACL LOAD")
    assert all(client.acl_users() == ["alice", "default", "eve"] for client in (one, two))
    until(lambda: changed(alice, number))


def test_a_password_is_of_the_default_user_unless_the_file_has_him(serve, tmp_path):
    (tmp_path / "password").write_text("secret")
    path = users_file(tmp_path, "user alice on >a ~* +@all\n")
    service = serve("--acl-file", str(path), "--password-file", str(tmp_path / "password"))
    with pytest.raises(redis.AuthenticationError):
        service.client().ping()
    assert service.client(password="secret").ping() and service.client(username="alice", password="a").ping()
    users_file(tmp_path, "user default on >other ~* +@all\n")
    assert service.client(password="secret").execute_command("ACL LOAD")
    with pytest.raises(redis.AuthenticationError):
        service.client(password="secret").ping()
    assert service.client(password="other").ping()
    assert "password is open" in service.said().replace(str(tmp_path), "").replace("/", "") and "users is open" not in service.said()
    arguments = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in service.workers())
    assert b"sidecar.worker" in arguments and b"secret" not in arguments


def test_a_bad_file_of_users_is_refused(name, tmp_path):
    path = users_file(tmp_path, "user default on nopass ~* +@all\nuser bob on +nope\n")
    argv = [sys.executable, "-m", "shmcache.cli", "serve", name, "--size", "8M", "--port", "0", "--unix", str(tmp_path / "socket")]
    for options, said in (
        (["--acl-file", str(path)], "users:2: Error in applying operation '+nope': Unknown command or category name in ACL."),
        (["--disable-command", "nope"], "'nope': there is no such command or category"),
    ):
        out = subprocess.run([*argv, *options], capture_output=True, text=True, check=False, timeout=LIMIT)
        assert out.returncode == 2 and said in out.stderr
    out = subprocess.run([*argv, "--acl-file", str(tmp_path / "none")], capture_output=True, text=True, check=False, timeout=LIMIT)
    assert out.returncode == 1 and "No such file" in out.stderr


def test_disabled_commands_are_unknown_to_all(serve):
    service = serve("--disable-command", "flushall", "--disable-command", "config|set", "--disable-command", "@scripting")
    client = service.client(single_connection_client=True)
    with pytest.raises(redis.ResponseError, match="unknown command 'flushall', with args beginning with: 'async'"):
        client.execute_command("flushall", "async")
    with pytest.raises(redis.ResponseError, match=r"unknown subcommand 'set'\. Try CONFIG HELP."):
        client.execute_command("CONFIG", "set", "timeout", "1")
    assert client.config_get("timeout") == {"timeout": "0"}
    pipe = client.pipeline()
    pipe.set("k", "v")
    pipe.execute_command("FLUSHALL")
    with pytest.raises(redis.ResponseError, match="unknown command"):
        pipe.execute()
    assert client.get("k") is None
    assert raw(service, b"COMMAND INFO flushall\r\n", read=2) == b"*1\r\n*-1\r\n"
    listed = client.command_list()
    assert b"flushdb" in listed and b"config|get" in listed and not {b"flushall", b"config|set", b"function|flush"} & set(listed)
    assert client.command_count() == sum(b"|" not in each for each in listed)
    with pytest.raises(redis.ResponseError, match="Command 'flushall' not found"):
        client.execute_command("ACL", "DRYRUN", "default", "flushall")
    assert client.execute_command("ACL", "SETUSER", "bob", "-flushall")  # a file of users need not know what is disabled


def test_clients_are_told_where_a_command_has_its_keys_and_channels(serve):
    service = serve("--enable-debug-command")
    with contextlib.closing(Connection(("127.0.0.1", service.port), LIMIT)) as connection:
        for name in (b"get", b"set", b"eval", b"evalsha_ro", b"publish", b"psubscribe", b"pubsub"):
            said = connection.call(b"COMMAND", b"INFO", name)
            assert (b"movablekeys" in said) == name.startswith(b"eval"), said
            assert (b"+pubsub\r\n" in said) == (name in (b"publish", b"psubscribe")), said
        assert connection.call(b"COMMAND", b"GETKEYS", b"EVAL", b"return 1", b"0", b"k") == b"*0\r\n"
        assert connection.call(b"DEBUG", b"ERROR", b"LOADING of\r\ntwo lines") == b"-LOADING of  two lines\r\n"


def test_passwords_are_not_in_the_slow_log_nor_told_to_monitors(serve):
    service = serve()
    client = service.client()
    client.config_set("slowlog-log-slower-than", 0)
    monitor = service.client().monitor()
    with monitor as m:
        client.execute_command("ACL", "SETUSER", "bob", ">hush")
        client.config_set("requirepass", "hush")
        client.config_set("requirepass", "")
        client.echo("over")
        commands = []
        while not commands or "over" not in commands[-1]:
            commands.append(m.next_command()["command"])
    assert not any("hush" in command for command in commands)
    words = [entry["command"] for entry in client.slowlog_get(100)]
    assert b"ACL SETUSER (redacted) (redacted)" in words and b"CONFIG SET requirepass (redacted)" in words
    assert not any(b"hush" in command for command in words)


def test_more_connections_than_it_takes(serve):
    service = serve("--maxclients", "3")
    kept = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(3)]
    try:
        for sock in kept:
            sock.sendall(b"PING\r\n")
            assert sock.recv(100) == b"+PONG\r\n"
        assert raw(service, b"PING\r\n") == b"-ERR max number of clients reached\r\n"
    finally:
        for sock in kept:
            sock.close()
    until(lambda: raw(service, b"PING\r\n") == b"+PONG\r\n")


def test_idle_connections_are_closed(serve):
    service = serve("--timeout", "1")
    with contextlib.closing(socket.create_connection(("127.0.0.1", service.port), LIMIT)) as sock:
        assert sock.recv(100) == b""


# ---- slow and greedy clients --------------------------------------------------------------------------------------------------------------


def test_who_does_not_read_is_not_served_more_and_holds_up_nobody(serve):
    service = serve()
    client = service.client()
    client.set("big", b"x" * 1_000_000)
    with contextlib.closing(socket.create_connection(("127.0.0.1", service.port), LIMIT)) as sock:
        sock.sendall(b"GET big\r\n" * 2000)  # 2 GB of replies
        until(lambda: int(client.info("stats")["total_net_output_bytes"]) > 2_000_000)
        began = time.monotonic()
        for i in range(100):
            client.set(f"k{i}", i)
        assert time.monotonic() - began < LIMIT
        rss = client.info("memory")["used_memory_rss"]
        assert rss < 300_000_000, "the replies are not kept for him"
        want, got = 2000 * (1_000_000 + len("$1000000\r\n\r\n")), 0
        while got < want:
            part = sock.recv(1 << 20)
            assert part
            got += len(part)
        assert got == want


def test_long_commands_do_not_hold_up_the_others(serve):
    service = serve("--enable-debug-command")
    client, slow = service.client(), service.client()
    thread = threading.Thread(target=lambda: slow.execute_command("DEBUG", "SLEEP", "2"))
    began = time.monotonic()
    thread.start()
    n = 0
    while thread.is_alive():
        client.set("k", n)
        n += 1
    assert time.monotonic() - began >= 2 and n > 10
    thread.join()


# ---- what others see -----------------------------------------------------------------------------------------------------------------------


def test_published_to_subscribers_of_all_processes(serve):
    service = serve("--workers", "2")
    subscribers, pids = [], set()
    for _ in range(200):  # till both processes have some
        client = service.client(single_connection_client=True)
        subscribers.append(client)
        pids.add(client.info("server")["process_id"])
        if len(pids) == 2 and len(subscribers) >= 4:
            break
    assert len(pids) == 2
    listening = []
    for client in subscribers:
        pubsub = client.pubsub()
        pubsub.subscribe("news")
        pubsub.psubscribe("n*")
        for _ in range(2):
            assert pubsub.get_message(timeout=LIMIT)["type"].endswith("subscribe")
        listening.append(pubsub)
    publisher = service.client()
    until(lambda: publisher.pubsub_numsub("news") == [(b"news", len(subscribers))])
    assert publisher.publish("news", "x") == 2 * len(subscribers)
    for pubsub in listening:
        got = [pubsub.get_message(timeout=LIMIT) for _ in range(2)]
        assert sorted(m["type"] for m in got) == ["message", "pmessage"] and {m["data"] for m in got} == {b"x"}
    for pubsub in listening:
        pubsub.close()
    until(lambda: publisher.pubsub_channels() == [])
    assert publisher.publish("news", "x") == 0


def test_config_set_is_for_all_processes(serve):
    service = serve("--workers", "2")
    service.client().config_set("timeout", 77)
    seen = {}

    def both():
        client = service.client()
        seen[client.info("server")["process_id"]] = client.config_get("timeout")["timeout"]
        return len(seen) == 2 and set(seen.values()) == {"77"}

    until(both)


def test_transfers_keep_the_sum(serve, name):
    """EXEC is one step for all who write, over this protocol or not; readers may see its keys one by one."""
    service = serve("--workers", "2")
    keys = [f"account:{i}" for i in range(8)]
    with shmcache.attach(name) as cache:
        for key in keys:
            cache.set(key, 1000)
        stop = threading.Event()

        def transfer(seed):
            client, n = service.client(), seed
            while not stop.is_set():
                a, b = keys[n % 8], keys[(n * 5 + 3) % 8]
                with client.pipeline(transaction=True) as pipe:
                    pipe.decrby(a, 7)
                    pipe.incrby(b, 7)
                    pipe.execute()
                n += 1

        def look():
            client = service.client()
            while not stop.is_set():
                with client.pipeline(transaction=True) as pipe:
                    for key in keys:
                        pipe.get(key)
                    totals.append(sum(map(int, pipe.execute())))

        totals: list[int] = []
        threads = [threading.Thread(target=transfer, args=(i,)) for i in range(3)] + [threading.Thread(target=look)]
        with running(*threads, stop=stop):
            until(lambda: len(totals) > 200)
        assert set(totals) == {8000}
        assert sum(cache[key] for key in keys) == 8000
        assert cache.verify() == []


def test_monitor_and_slowlog(serve):
    service = serve()
    client = service.client()
    client.config_set("slowlog-log-slower-than", 0)
    client.set("seen", "x")
    assert any(entry["command"] == b"SET seen x" for entry in client.slowlog_get())
    with client.monitor() as monitor:
        service.client().set("a", 'b"\n')
        until(lambda: re.search(r'SET.*a', monitor.next_command()["command"]))


def test_pause_and_unpause(serve):
    service = serve()
    client, other = service.client(), service.client()
    client.client_pause(60_000, all=False)
    assert other.get("k") is None
    done = threading.Event()
    thread = threading.Thread(target=lambda: (service.client().set("k", "v"), done.set()))
    thread.start()
    assert not done.wait(0.5)
    client.client_unpause()
    assert done.wait(LIMIT)
    thread.join()
    assert other.get("k") == b"v"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_who_is_paused_is_blocked_and_nothing_expires_meanwhile(serve, workers):
    service = serve("--workers", workers)
    client = service.client(single_connection_client=True)
    until(lambda: client.info("server")["workers_counted"] == int(workers))
    client.mset({"a": 1, "b": 2})
    client.client_pause(LIMIT * 1000, all=False)
    waiting = service.client(single_connection_client=True)
    with running(threading.Thread(target=lambda: waiting.set("k", "v")), stop=threading.Event()):
        until(lambda: client.info("clients")["blocked_clients"] == 1)
        client.client_unpause()
    assert client.info("clients")["blocked_clients"] == 0
    expired = client.info("stats")["expired_keys"]
    with client.pipeline() as pipe:
        pipe.pexpire("a", 1000).pexpire("b", 1000).client_pause(LIMIT * 1000, all=False).execute()
    for read in (lambda: client.get("a"), lambda: client.strlen("b"), lambda: client.lcs("a", "b")):  # the last by the pool
        until(lambda read=read: not read())
    assert client.info("stats")["expired_keys"] == expired
    client.client_unpause()
    assert client.get("a") is None and client.strlen("b") == 0
    assert client.info("stats")["expired_keys"] == expired + 2


@pytest.mark.parametrize("end", ["its time", "unpause", "another supervisor"])
def test_what_nobody_asks_for_expires_after_a_pause(serve, name, end):
    service = serve("--workers", "2")
    client = service.client(single_connection_client=True)

    def expired():
        return client.info("stats")["expired_keys"]

    client.set("first", "v", px=1)
    until(lambda: expired() == 1)  # of itself
    client.mset({str(i): i for i in range(20)})
    with client.pipeline() as pipe:
        for i in range(20):
            pipe.pexpire(str(i), 1000)
        pipe.client_pause(5000 if end == "its time" else LIMIT * 1000, all=False).execute()
    began = time.monotonic()
    if end == "another supervisor":
        with shmcache.attach(name) as cache:
            was = cache.supervisor()["pid"]
            os.kill(was, signal.SIGKILL)
            until(lambda: cache.supervisor()["alive"] and cache.supervisor()["pid"] != was)
    if end == "its time":
        until(lambda: expired() == 21)
        assert time.monotonic() - began > 4.9
    else:
        while time.monotonic() - began < 5:
            assert expired() == 1
        client.client_unpause()
        until(lambda: expired() == 21)


def test_who_watches_and_resets_watches_no_more(serve):
    service = serve()
    other = service.client()
    with other.monitor() as seen, socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIMIT)
        sock.connect(service.path)
        sock.sendall(b"MONITOR\r\n")
        assert sock.recv(100) == b"+OK\r\n"
        sock.sendall(b"RESET\r\n")
        said = b""
        while b"RESET\r\n" not in said:
            said += sock.recv(1000)
        other.set("k", "v")
        sock.sendall(b"PING\r\n")
        while b"PONG" not in said:
            said += sock.recv(1000)
        assert said == b"+RESET\r\n+PONG\r\n"
        told = []
        while not told or told[-1] != "PING":
            told.append(seen.next_command()["command"])
        assert "reset" in told


def test_maxmemory_is_the_segments_size(serve, name):
    client = serve(size="32M").client()
    with shmcache.attach(name) as cache:
        size = int(cache.segment.header["size_bytes"])
    assert client.config_get("maxmemory") == {"maxmemory": str(size)}
    with pytest.raises(redis.ResponseError, match=rf"'maxmemory'.*immutable config: the segment has {size} bytes"):
        client.config_set("maxmemory", "1gb")


def test_a_time_to_live_is_never_more_than_was_said(cache):
    """The wall's clock and the segment's change their millisecond at different moments: at any of them, and with any difference."""
    inprocess = InProcess(cache.name)
    for _ in range(20):
        executor = _resp.Executor(inprocess.cache, inprocess.commands)  # it measures the difference
        client = server.Connection(executor, inprocess)
        for i in range(1000):
            at = time.time_ns() // 1_000_000 + 10_000
            client.feed(b"SET k v PXAT %d\r\nPTTL k\r\nPEXPIRETIME k\r\n" % at)
            said = client.take().split(b"\r\n")
            assert said[0] == b"+OK" and 5_000 < int(said[1][1:]) <= 10_000 and int(said[2][1:]) == at, i
        del client, executor
    inprocess.close()


# ---- what cannot begin ----------------------------------------------------------------------------------------------------------------


def without_uvloop(folder):
    (folder / "uvloop.py").write_text("raise ImportError('not here')\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


CANNOT = {
    "a port that is taken": (["--port", "PORT"], "in use"),
    "a port that is taken, and a unix socket": (["--port", "PORT", "--unix", "socket"], "in use"),
    "a socket that is no socket": (["--unix", "file"], "no socket"),
    "a bad file of users": (["--acl-file", "file"], "should start with user"),
    "no file of users": (["--acl-file", "none"], "No such file"),
    "a bad certificate": (["--tls-cert", "file", "--tls-key", "file"], "--tls-cert"),
    "no certificate": (["--tls-cert", "none", "--tls-key", "none"], "--tls-cert"),
    "no such store": (["--store", "none:none"], "none"),
    "too many workers": (["--workers", "65"], "1 to 64"),
    "no event loop": ([], "needs uvloop"),
}


@pytest.mark.parametrize("why", CANNOT)
@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_what_cannot_begin_leaves_no_segment_of_its_own(tmp_path, name, why, there):
    options, said = CANNOT[why]
    (tmp_path / "file").write_text("nothing of the kind\n")
    (tmp_path / "path").mkdir()
    environment = without_uvloop(tmp_path / "path") if why == "no event loop" else dict(os.environ)
    if there:
        with shmcache.create(name, "8M") as cache:
            cache["k"] = "v"
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        options = [str(taken.getsockname()[1]) if word == "PORT" else word for word in options]
        port = [] if "--port" in options else ["--port", str(free_port())]
        done = subprocess.run(
            [sys.executable, "-m", "shmcache.cli", "serve", name, "--size", "8M", *port, *options],
            capture_output=True, text=True, timeout=LIMIT, check=False, cwd=tmp_path,
            env=environment | {"PYTHONPATH": os.pathsep.join([environment.get("PYTHONPATH", ""), str(ROOT)])},
        )  # fmt: skip
    assert done.returncode in (1, 2) and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert os.path.exists(segment.check_name(name)) == there
    assert not (tmp_path / "socket").exists() and (tmp_path / "file").read_text() == "nothing of the kind\n"
    if there:
        with shmcache.attach(name) as cache:
            assert cache["k"] == "v"
        shmcache.unlink(name)
