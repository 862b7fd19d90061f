"""What Redis does so that neither an error nor an attacker gets far, and what the sidecar does in its place.

    Redis 7.0                                             the sidecar                                  seen by
    POST or Host: as a command drops the connection       the same                                     test_http_...
    an inline command has at most 64 KB                   the same                                     test_resp.py: test_what_is_not_the_protocol_...
    multibulk count, bulk length (proto-max-bulk-len)     2^20 arguments, max_value                    the same
    10 arguments and 16 KB before AUTH                    the same                                     test_resp.py: test_before_it_has_authenticated_...
    client-query-buffer-limit, 1 GB                       max_value + 256 MB                           test_a_query_...
    client-output-buffer-limit of subscribers, 32 MB      32 MB, of monitors too                       test_what_is_pushed_...
    ... also while a command of theirs waits              the same                                     test_what_is_pushed_while_...
    ... of others: none                                   1 MB unsent: nothing more is executed        test_sidecar.py: test_who_does_not_read_...
    MULTI: none                                           as the query                                 test_a_query_...
    protected mode                                        the same                                     test_protected_mode_...
    maxclients, timeout                                   the same                                     test_sidecar.py
    tcp-keepalive 300                                     the same                                     test_a_dead_peer_...
    requirepass, ACL; compared in constant time; hashes   the same                                     test_acl.py, test_a_password_...
    passwords are hidden in MONITOR and SLOWLOG           the same                                     test_a_password_...
    new users hear no channels (acl-pubsub-default)       the same                                     test_acl.py
    DEBUG, MODULE are off; protected configs              none of them, nor what calls other hosts     test_what_reaches_...
    the directory of its files can be set (CONFIG dir)    it cannot                                    the same
    a reply never carries a line break of a client's      the same                                     test_an_error_...
    CLIENT SETNAME takes no spaces, no line breaks        the same                                     test_an_error_...
    RESTORE looks at what it is given                     its sum, and strings only                    test_what_restore_...
    a unix socket is its owner's (by umask)               mode 700                                     test_sidecar.py
    it unlinks whatever is at the socket's path           a dead socket only                           test_what_is_no_socket_...
    hash seeds are random                                 the same: siphash                            the core
    Lua: no other state, no bytecode, a limit after       the same; a script is ended                  test_sidecar_scripts.py, _script_limits.py
    which SCRIPT KILL is taken
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading

import pytest
import redis

from shmcache.sidecar import commands, server
from shmcache.sidecar.commands import pubsub
from shmcache.sidecar.commands.table import TABLE
from tests.integration.service import LIMIT, until
from tests.redis.inprocess import InProcess, Pipe
from tests.redis.resp import encode


def said_to(service, data):
    """What is answered until the connection is closed. redis.Redis would not send this."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(LIMIT)
        s.connect(service.path)
        s.sendall(data)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while part := s.recv(65536):
                found += part
        return found


# ---- HTTP -------------------------------------------------------------------------------------------------------------------------------

BODY = b"SET stolen 1\r\nEVAL 'return 1' 0\r\nQUIT\r\n"
REQUESTS = {
    "post": b"POST / HTTP/1.1\r\nHost: localhost:6379\r\nContent-Length: 40\r\n\r\n" + BODY,
    "get": b"GET / HTTP/1.1\r\nHost: localhost:6379\r\n\r\n" + BODY,
    "put": b"PUT / HTTP/1.1\r\nConnection: close\r\nhost: localhost:6379\r\n\r\n" + BODY,
    "in small letters": b"post / HTTP/1.1\r\n" + BODY,
    "in RESP": b"*1\r\n$4\r\nPOST\r\n" + BODY,
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_http_is_not_executed(serve, kind):
    service = serve()
    client = service.client()
    client.set("k", "v")
    said = said_to(service, b"GET k\r\n" + REQUESTS[kind])
    assert b"OK" not in said and said.count(b"\r\n") <= 4  # what came before it may be answered
    assert client.get("stolen") is None
    said_to(service, REQUESTS[kind])
    until(lambda: "POST or Host:" in service.said())
    assert service.said().count("POST or Host:") == 1  # once a minute
    assert client.ping()


def test_before_a_password_is_given_too(serve, tmp_path):
    (tmp_path / "password").write_text("secret\n")
    service = serve("--password-file", str(tmp_path / "password"))
    assert said_to(service, REQUESTS["post"]) == b""


# ---- what is kept of a client -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def inprocess(cache):
    found = InProcess(cache.name)
    yield found
    found.close()


def test_a_query_that_is_larger_than_is_kept(inprocess):
    inprocess.executor.most_pending = 100_000
    client = inprocess.connect()
    inprocess.say(client, b"*2\r\n$4\r\nECHO\r\n$60000\r\n" + b"x" * 50_000)
    assert not client.closing
    client = inprocess.connect()
    sent = b"*3\r\n$3\r\nSET\r\n$60000\r\n" + b"x" * 60_000 + b"\r\n$60000\r\n"
    inprocess.say(client, sent)
    assert b"larger than is kept" in inprocess.say(client, b"x" * 50_000) and client.closing
    client = inprocess.connect()
    inprocess.say(client, b"MULTI\r\n")
    for _ in range(3):
        said = inprocess.say(client, encode([b"SET", b"k", b"x" * 40_000]))
    assert b"larger than is kept" in said
    assert b"EXECABORT" in inprocess.say(client, b"EXEC\r\n")


class Stuck(Pipe):
    """Its other end does not read."""

    def get_write_buffer_size(self):
        return sum(map(len, self.written))


@pytest.mark.parametrize("ask", [b"SUBSCRIBE c\r\n", b"PSUBSCRIBE *\r\n", b"MONITOR\r\n"])
def test_what_is_pushed_to_who_does_not_read_is_bounded(inprocess, monkeypatch, ask):
    monkeypatch.setattr(pubsub, "PUSH_LIMIT", 100_000)
    client = server.Connection(inprocess.executor, inprocess)
    client.connection_made(Stuck(client, inprocess.soon))
    other = inprocess.connect()
    inprocess.say(client, ask)
    n = 0
    while not client.closing:
        assert n < 11
        inprocess.say(other, encode([b"PUBLISH", b"c", b"x" * 10_000]))
        n += 1
    assert n > 8 and client.id not in inprocess.clients


def test_what_is_pushed_while_the_pool_works_is_bounded(inprocess, monkeypatch):
    """It is kept until the command's reply is there."""
    monkeypatch.setattr(pubsub, "PUSH_LIMIT", 100_000)
    client = inprocess.connect()
    inprocess.say(client, b"HELLO 3\r\nSUBSCRIBE c\r\n")
    for _ in range(3):
        client.feed(b"KEYS *\r\n")
        assert client.in_pool
        for _ in range(9):
            inprocess.deliver(b"c", b"x" * 10_000)
        assert not client.closing
        inprocess.turn()
    client.feed(b"KEYS *\r\n")
    n = 0
    while not client.closing:
        assert n < 11
        inprocess.deliver(b"c", b"x" * 10_000)
        n += 1
    assert n > 8
    inprocess.turn()


# ---- who is served ----------------------------------------------------------------------------------------------------------------------


class From(Pipe):
    """A TCP connection from this address."""

    def __init__(self, address, *arguments):
        super().__init__(*arguments)
        self.address = address

    def get_extra_info(self, name):
        return {"peername": (self.address, 1234), "sockname": ("10.0.0.1", 6379)}.get(name)


@pytest.mark.parametrize(
    ("address", "settings", "served"),
    [
        ("127.0.0.1", {}, True), ("127.8.9.1", {}, True), ("::1", {}, True), ("::ffff:127.0.0.1", {}, True),
        ("10.0.0.9", {}, False), ("fe80::1", {}, False), ("::ffff:10.0.0.9", {}, False),
        ("10.0.0.9", {"protected-mode": "no"}, True), ("10.0.0.9", {"requirepass": "secret"}, True),
    ],
)  # fmt: skip
def test_protected_mode_serves_the_loopback_alone(cache, address, settings, served):
    inprocess = InProcess(cache.name, settings)
    client = server.Connection(inprocess.executor, inprocess)
    client.connection_made(From(address, client, inprocess.soon))
    said = inprocess.say(client, b"SET k v\r\n")
    assert said.startswith(b"-NOAUTH" if "requirepass" in settings else b"+OK" if served else b"-DENIED")
    assert cache.get("k") == (b"v" if served and "requirepass" not in settings else None)
    inprocess.close()


def test_a_dead_peer_is_noticed_by_tcp():
    (listening,) = server.listen("127.0.0.1", 0)
    with listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == int(commands.SETTINGS["tcp-keepalive"])


# ---- what is told -----------------------------------------------------------------------------------------------------------------------

HUSH = [
    ["AUTH", "default", "hush"], ["AUTH", "hush"], ["HELLO", "2", "AUTH", "default", "hush"], ["hello", "2", "setname", "auth", "auth", "default", "hush"],
    ["HELLO", "2", "AUHT", "default", "hush"], ["ACL", "SETUSER", "bob", ">hush"], ["CONFIG", "SET", "requirepass", "hush"],
    ["config", "set", "timeout", "0", "REQUIREPASS", "hush"],
]  # fmt: skip


@pytest.mark.parametrize("in_multi", [False, True])
def test_a_password_is_not_told(serve, in_multi):
    service = serve()
    client, changed = service.client(single_connection_client=True), service.client()
    client.config_set("slowlog-log-slower-than", 0)
    with service.client().monitor() as monitor:
        if in_multi:
            client.execute_command("MULTI")
        for words in HUSH:
            with contextlib.suppress(redis.RedisError):
                client.execute_command(*words)
        if in_multi:
            with contextlib.suppress(redis.RedisError):
                client.execute_command("EXEC")
        changed = service.client(password="hush")
        changed.config_set("requirepass", "")
        changed.echo("over")
        told = []
        while not told or "over" not in told[-1]:
            told.append(monitor.next_command()["command"])
    assert not [line for line in told if "hush" in line]
    assert "AUTH (redacted)" in told and "HELLO 2 AUTH (redacted) (redacted)" in told and "hello 2 setname auth auth (redacted) (redacted)" in told
    logged = [entry["command"] for entry in changed.slowlog_get(1000)]
    assert logged and not [line for line in logged if b"hush" in line]
    assert not [line for line in changed.execute_command("ACL", "LIST") if b"hush" in line]
    client.close()


def test_an_error_is_one_line(serve):
    service = serve()
    client = service.client()
    for words in (["a\r\n+OK"], ["GET", "a\r\n+OK", "b"], ["SET", "k", "v", "a\r\n+OK"], ["CLIENT", "a\r\n+OK"], ["CONFIG", "SET", "a\r\n+OK", "b"],
                  ["ACL", "SETUSER", "bob", "a\r\n+OK"], ["HELLO", "3", "a\r\n+OK"], ["EVAL", "return {err = 'a\\r\\n+OK'}", "0"],
                  ["EVAL", "error('a\\r\\n+OK')", "0"], ["EVAL", "a\r\n+OK", "0"], ["SCRIPT", "a\r\n+OK"]):  # fmt: skip
        said = said_to(service, encode([word.encode() for word in words]) + b"QUIT\r\n")
        assert said.startswith(b"-") and said.endswith(b"\r\n+OK\r\n") and said.count(b"\r") == said.count(b"\n") == 2, (words, said)
    for name in ("two words", "two\nlines", "\x1b[2J"):
        with pytest.raises(redis.ResponseError, match="Client names cannot contain"):
            client.client_setname(name)


# ---- what is not there ------------------------------------------------------------------------------------------------------------------


def test_what_reaches_other_hosts_files_or_the_process_is_not_there(serve):
    client = serve().client()
    for name in ("module", "migrate", "replicaof", "slaveof", "sync", "psync", "cluster", "failover", "function", "fcall"):
        assert name not in TABLE or name in ("function", "fcall"), name
    for words in (["DEBUG", "SLEEP", "0"], ["DEBUG", "SEGFAULT"], ["CONFIG", "SET", "dir", "/"], ["CONFIG", "SET", "dbfilename", "x"],
                  ["CONFIG", "SET", "logfile", "/tmp/x"], ["CONFIG", "SET", "unixsocket", "/tmp/x"], ["CONFIG", "SET", "aclfile", "/tmp/x"],
                  ["CONFIG", "SET", "enable-debug-command", "yes"], ["CONFIG", "REWRITE"], ["MODULE", "LOAD", "/tmp/x.so"],
                  ["MIGRATE", "10.0.0.9", "6379", "k", "0", "1"], ["REPLICAOF", "10.0.0.9", "6379"]):  # fmt: skip
        with pytest.raises(redis.ResponseError):
            client.execute_command(*words)
    assert client.ping()


def test_what_restore_is_given_is_looked_at(serve):
    client = serve().client()
    client.set("k", "v" * 100)
    whole = client.dump("k")
    for at in range(len(whole)):
        with pytest.raises(redis.ResponseError, match="DUMP payload version or checksum are wrong"):
            client.restore("other", 0, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert client.exists("other") == 0


# ---- the unix socket's path -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder", "link", "pipe"])
def test_what_is_no_socket_is_not_replaced(tmp_path, kind, name):
    path, target = tmp_path / "path", tmp_path / "target"
    target.write_bytes(b"precious")
    {"file": lambda: path.write_bytes(b"precious"), "folder": path.mkdir, "link": lambda: path.symlink_to(target), "pipe": lambda: os.mkfifo(path)}[kind]()
    was = os.lstat(path)
    with pytest.raises(OSError, match=r"no socket|Is a directory"):
        server.listen_unix(str(path))
    now = os.lstat(path)
    assert (now.st_ino, now.st_mode, target.read_bytes()) == (was.st_ino, was.st_mode, b"precious")
    if kind == "file":
        done = subprocess.run(
            [sys.executable, "-m", "shmcache.cli", "serve", name, "--size", "8M", "--unix", str(path)], capture_output=True, timeout=LIMIT, check=False
        )
        assert done.returncode == 1 and b"no socket" in done.stderr and b"Traceback" not in done.stderr
        assert path.read_bytes() == b"precious"


def test_what_a_dead_server_left_is_replaced(tmp_path):
    path = str(tmp_path / "path")
    with server.listen_unix(path), pytest.raises(OSError, match="somebody listens"):
        server.listen_unix(path)
    with server.listen_unix(path):  # nobody listens on the old one any more
        remove = server.remover(path)
    remove()
    assert not os.path.lexists(path)
    remove()


def test_what_has_taken_the_sockets_place_stays(tmp_path):
    path = str(tmp_path / "path")
    with server.listen_unix(path):
        remove = server.remover(path)
        os.rename(path, path + "x")  # so that its inode is not given again
        with server.listen_unix(path):
            remove()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)


def test_a_server_that_accepts_nothing_is_not_replaced_nor_waited_for(tmp_path):
    path = str(tmp_path / "path")
    with socket.socket(socket.AF_UNIX) as stuck, contextlib.ExitStack() as stack:
        stuck.bind(path)
        stuck.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
        found = []

        def listen():
            try:
                found.append(server.listen_unix(path))
            except OSError as e:
                found.append(e)

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        thread.join(LIMIT)
        assert isinstance(found[0], OSError) and "somebody listens" in str(found[0])


@pytest.mark.parametrize("kind", ["dead", "none", "living"])
def test_a_link_to_a_socket_stays(tmp_path, kind):
    path, target = tmp_path / "path", str(tmp_path / "target")
    path.symlink_to(target)
    with contextlib.ExitStack() as stack:
        if kind != "none":
            listening = stack.enter_context(server.listen_unix(target))
            if kind == "dead":
                listening.close()
        with pytest.raises(OSError, match=r"no socket|in use|somebody listens"):
            server.listen_unix(str(path))
        assert path.is_symlink() and os.path.lexists(target) == (kind != "none")


# ---- leases -----------------------------------------------------------------------------------------------------------------------------


def test_a_lease_is_for_who_may_write_and_not_for_long(serve):
    service = serve()
    client = service.client()
    for name, rules in {"reader": ["+@all", "%R~*"], "readers": ["+@read", "+@connection", "~*"], "writer": ["+@all", "~*"]}.items():
        client.execute_command("ACL", "SETUSER", name, "on", ">secret", *rules)
    for name in ("reader", "readers"):
        one = service.client(username=name, password="secret")
        with pytest.raises(redis.exceptions.NoPermissionError):
            one.execute_command("LEASE.GET", "k", 100)
        assert one.get("k") is None
    writer = service.client(username="writer", password="secret")
    with pytest.raises(redis.ResponseError, match="1 to 300 seconds"):
        writer.execute_command("LEASE.GET", "k", 86_400)
    assert writer.execute_command("LEASE.GET", "k", 300)[1] > 0
