"""Every command through a real subprocess: what a person reads, what a program reads, and each way to fail."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

import shmcache
from shmcache import cli
from tests.integration.test_store import until

BIN = Path(sys.executable).parent


def admin(*args, stdin=b"", code=0):
    out = subprocess.run([BIN / "shmcache-admin", *args], input=stdin, capture_output=True, check=False, timeout=60)
    assert out.returncode == code, (out.returncode, out.stdout, out.stderr)
    if code:
        assert b"Traceback" not in out.stderr
        assert len(out.stderr.splitlines()) == 1 or b"usage:" in out.stderr or not out.stderr
    return out.stdout.decode("utf-8", "surrogateescape") if not code else out.stderr.decode()


def data(*args, **kwargs):
    return json.loads(admin(*args, "--json", **kwargs))


def test_create(name):
    assert "created" in admin("create", name, "--size", "8M", "--default-ttl", "60", "--mode", "640", "--max-processes", "9")
    with shmcache.attach(name) as cache:
        settings = cache.mapping.settings()
        assert settings["size_bytes"] == 8 << 20
        assert settings["default_ttl_ms"] == 60_000
        assert settings["max_processes"] == 9
    assert Path(f"/dev/shm/shmcache.{name}").stat().st_mode & 0o777 == 0o640
    assert "exist" in admin("create", name, "--size", "8M", code=1)
    assert "size" in admin("create", name + "x", "--size", "many", code=2)
    assert "stripes" in admin("create", name + "x", "--stripes", "3", code=2)
    assert "NAME" in admin("create", code=2)
    assert "/dev/shm" in admin("create", name + "x", "--size", "900T", code=1)


def on_a_terminal(*args):
    """What a command prints there."""
    ours, theirs = pty.openpty()
    p = subprocess.Popen([BIN / "shmcache-admin", *args], stdout=theirs)
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 65536):
            text += part
    except OSError:  # EIO: the other side was closed
        pass
    finally:
        os.close(ours)
    assert p.wait(60) == 0
    return text


COMMANDS = {  # of a terminal, and how they are shown
    b"\x1b]0;title\x07": b"\\x1b]0;title\\x07", b"\x1b[2J\r": b"\\x1b[2J\\r", "\x9b2J".encode(): b"\\x9b2J", b"\xff\x9b": b"\\xff\\x9b",
    "\u202eevil".encode(): b"\\u202eevil", "grün\x7f".encode(): "grün\\x7f".encode(),
}  # fmt: skip


KINDS = {"bytes": bytes, "str": bytes.decode, "list": lambda data: [data.decode("latin-1")]}


@pytest.mark.parametrize(("command", "kind"), [(c, kind) for c in COMMANDS for kind in KINDS if kind != "str" or c[:1] != b"\xff"])
def test_a_terminal_is_given_no_commands(cache, command, kind):
    cache.set(b"k" + command, KINDS[kind](b"two\nlines\t" + command))
    assert on_a_terminal("scan", cache.name) == b"k" + COMMANDS[command] + b"\r\n"
    assert admin("scan", cache.name).encode() == b"k" + COMMANDS[command] + b"\n"  # for what reads lines, too
    said = on_a_terminal("get", cache.name, b"k" + command)
    assert said.decode().replace("\r\n", "").replace("\t", "").isprintable()
    if kind != "list":
        assert said == b"two\r\nlines\t" + COMMANDS[command] + b"\r\n"
        assert admin("get", cache.name, b"k" + command).encode("utf-8", "surrogateescape").startswith(b"two\nlines\t" + command)  # as it is


def test_create_json(name):
    made = data("create", name, "--size", "8M")
    assert made["name"] == name
    assert made["size_bytes"] == 8 << 20


def test_list(cache):
    cache.set("k", 1)
    row = next(r for r in data("list") if r["name"] == cache.name)
    assert row["items"] == 1
    assert row["processes"] == 1
    assert row["supervisor"] is False
    assert re.search(rf"{cache.name} +8\.0 MiB +1 +1 +no", admin("list"))


def test_list_shows_what_is_no_segment(name):
    path = Path(f"/dev/shm/shmcache.{name}")
    path.write_bytes(b"x" * 8192)
    try:
        row = next(r for r in data("list") if r["name"] == name)
        assert "not a shmcache segment" in row["error"]
        assert "not a shmcache segment" in admin("list")
    finally:
        path.unlink()


def test_stats(cache):
    cache.set("k", b"v")
    cache.get("k")
    s = data("stats", cache.name, "--interval", "0.05")
    assert {"name", "size_bytes", "used_bytes", "items", "hits", "misses", "hit_ratio", "sets", "deletes", "evictions", "expirations",
            "inline_evictions", "processes", "slab_classes", "supervisor"} <= s.keys()  # fmt: skip
    assert (s["items"], s["hits"], s["sets"]) == (1, 1, 1)
    mine = next(p for p in s["processes"] if p["pid"] == os.getpid())
    assert "python" in mine["command"]
    assert mine["rss_bytes"] >= mine["pss_bytes"] > 0
    assert {"chunk_bytes", "pages", "live", "free"} <= s["slab_classes"][0].keys()
    text = admin("stats", cache.name, "--interval", "0.05")
    assert re.search(r"hit ratio +100\.00 %", text)
    assert str(os.getpid()) in text
    assert re.search(r"supervisor +none", text)
    assert "no segment" in admin("stats", cache.name + "x", code=1)
    assert "seconds" in admin("stats", cache.name, "--interval", "0", code=2)


def test_rich_draws_the_tables_on_a_terminal(cache):
    pytest.importorskip("rich", reason="rich draws the tables if it is installed")
    ours, theirs = pty.openpty()
    p = subprocess.Popen([BIN / "shmcache-admin", "stats", cache.name, "--interval", "0.05"], stdout=theirs, env=os.environ | {"COLUMNS": "120"})
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 65536):
            text += part
    except OSError:  # EIO: the other side was closed
        pass
    finally:
        os.close(ours)
    assert p.wait(60) == 0
    assert "┃" in text.decode()
    assert "no gets yet" in text.decode()


def test_stats_prometheus(cache):
    cache.set("k", b"v")
    text = admin("stats", cache.name, "--format", "prometheus", "--interval", "0.05")
    assert f'shmcache_sets_total{{segment="{cache.name}"}} 1\n' in text
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) shmcache_\w+ .+|shmcache_\w+\{segment="[^"]+"(,\w+="\w+")?\} [\d.e+-]+', line), line


def test_stats_watch_goes_on_till_it_is_stopped(cache):
    p = subprocess.Popen([BIN / "shmcache-admin", "stats", cache.name, "--json", "--watch", "0.05"], stdout=subprocess.PIPE)
    try:
        seen = [json.loads(p.stdout.readline())["name"] for _ in range(3)]
    finally:
        p.send_signal(signal.SIGINT)
        p.stdout.close()
        assert p.wait(30) in (130, 0)
    assert seen == [cache.name] * 3


@pytest.mark.parametrize(
    ("value", "printed", "shown", "kind"),
    [
        (b"bytes", "bytes", "bytes", "bytes"),
        ("t\u00e9xt", "t\u00e9xt\n", "t\u00e9xt", "str"),
        (17, "17\n", 17, "int"),
        ({"a": [1, None]}, '{"a": [1, null]}\n', {"a": [1, None]}, "dict"),
        (b"\xff\x00", "\udcff\x00", {"base64": "/wA="}, "bytes"),
    ],
)
def test_get(cache, value, printed, shown, kind):
    cache.set("k", value, ttl=100)
    assert admin("get", cache.name, "k") == printed
    got = data("get", cache.name, "k")
    assert 90 < got.pop("ttl") <= 100
    assert got == {"key": "k", "value": shown, "type": kind}


def test_get_fails(cache):
    assert "not there" in admin("get", cache.name, "k", code=1)
    assert "no segment" in admin("get", cache.name + "x", "k", code=1)
    assert "4,096" in admin("get", cache.name, "k" * 5000, code=2)
    cache.set("k", 1)
    assert data("get", cache.name, "k")["ttl"] is None


@pytest.mark.parametrize(
    ("args", "stdin", "value"),
    [
        (("v",), b"", "v"), (("17", "--type", "int"), b"", 17), (("v", "--type", "bytes"), b"", b"v"),
        (('[1, {"a": null}]', "--type", "json"), b"", [1, {"a": None}]), (("-", "--type", "bytes"), b"\xff\n", b"\xff\n"),
    ],
)  # fmt: skip
def test_set(cache, args, stdin, value):
    assert admin("set", cache.name, "k", *args, stdin=stdin) == ""
    assert cache["k"] == value


def test_set_json_ttl_and_failures(cache):
    assert data("set", cache.name, "k", "v", "--ttl", "50") == {"key": "k", "stored": True}
    assert 40 < cache.ttl("k") <= 50
    assert "not int" in admin("set", cache.name, "k", "many", "--type", "int", code=2)
    assert "not json" in admin("set", cache.name, "k", "{", "--type", "json", code=2)
    assert "ttl" in admin("set", cache.name, "k", "v", "--ttl", "-1", code=2)
    assert "no segment" in admin("set", cache.name + "x", "k", "v", code=1)
    assert "larger max_value" in admin("set", cache.name, "k", "-", stdin=bytes(5 << 20), code=2)
    assert cache["k"] == "v"


def test_delete(cache):
    cache.set("k", 1)
    cache.set("l", 1)
    assert admin("delete", cache.name, "k") == ""
    assert data("delete", cache.name, "l") == {"key": "l", "deleted": True}
    assert len(cache) == 0
    assert "not there" in admin("delete", cache.name, "k", code=1)
    assert "no segment" in admin("delete", cache.name + "x", "k", code=1)


def test_scan(cache):
    for key in ("user:1", "user:2", "page:1", b"\xff"):
        cache.set(key, 1)
    assert sorted(admin("scan", cache.name, "--prefix", "user:").split()) == ["user:1", "user:2"]
    assert "\\xff" in admin("scan", cache.name).split()
    lines = admin("scan", cache.name, "--json").splitlines()
    assert {"base64": "/w=="} in [json.loads(line) for line in lines]
    assert len(lines) == 4
    assert len(admin("scan", cache.name, "--limit", "2").splitlines()) == 2
    assert "no segment" in admin("scan", cache.name + "x", code=1)


def test_flush_asks(cache):
    cache.set("k", 1)
    assert "--yes" in admin("flush", cache.name, code=2)
    assert len(cache) == 1
    assert "removed 1 item" in admin("flush", cache.name, "--yes")
    assert len(cache) == 0
    cache.set("k", 1)
    assert data("flush", cache.name, "--yes") == {"name": cache.name, "removed": 1}
    assert "no segment" in admin("flush", cache.name + "x", "--yes", code=1)


@pytest.mark.parametrize(("answer", "left"), [(b"n\n", 1), (b"y\n", 0)])
def test_a_person_is_asked(cache, answer, left):
    cache.set("k", 1)
    ours, theirs = pty.openpty()
    try:
        p = subprocess.Popen([BIN / "shmcache-admin", "flush", cache.name], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.write(ours, answer)
        out, _ = p.communicate(timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"Remove all 1 items" in out
    assert len(cache) == left
    assert p.returncode == (2 if left else 0)


def test_verify_and_repair(name):
    with shmcache.create(name, "8M") as cache:
        for i in range(1000):
            cache.set(b"%d" % i, b"v")
        assert "whole" in admin("verify", name)
        assert data("verify", name) == {"name": name, "violations": [], "repaired": False, "left": []}
        seg = cache.views(writable=True)
        b, slot = next((b, i) for b, i in zip(*seg.buckets["slot"].nonzero(), strict=True))
        seg.buckets["slot"][b, slot] ^= 1 << 60  # the tag: the key is not found any more
        out = subprocess.run([BIN / "shmcache-admin", "verify", name], capture_output=True, check=False)
        assert out.returncode == 1
        assert b"I3 " in out.stdout
        assert "--yes" in admin("verify", name, "--repair", code=2)
        report = data("verify", name, "--repair", "--yes")
        assert report["repaired"]
        assert report["violations"]
        assert report["left"] == []
        assert cache.verify() == []
        assert len(cache) == len(list(cache.scan())) == 999
        assert sum(cache.get(b"%d" % i) == b"v" for i in range(1000)) == 999
        del seg
    assert "no segment" in admin("verify", name + "x", code=1)


def test_layout():
    assert re.search(r"item: 48 bytes", admin("layout"))
    assert data("layout")["item"]["fields"]["cas"] == {"offset": 16, "type": "uint64"}


def test_unlink(name):
    shmcache.create(name, "4M").close()
    assert "--yes" in admin("unlink", name, code=2)
    assert "unlinked" in admin("unlink", name, "--yes")
    assert "no segment" in admin("unlink", name, "--yes", code=1)
    assert "name" in admin("unlink", "a/b", "--yes", code=2)
    shmcache.create(name, "4M").close()
    assert data("unlink", name, "--yes") == {"name": name, "unlinked": True}


def test_usage():
    assert "usage" in admin(code=2)
    assert "usage" in admin("nonsense", code=2)
    assert shmcache.__version__ in admin("--version")


def shmcache_(*args, code, stdin=b"", env=None):
    out = subprocess.run([BIN / "shmcache", *args], input=stdin, env={**os.environ, **(env or {})}, capture_output=True, check=False, timeout=60)
    assert out.returncode == code, (out.returncode, out.stdout, out.stderr)
    assert b"Traceback" not in out.stderr
    return out.stderr.decode()


@pytest.mark.parametrize("option", ["--store-file", "--password-file", "--acl-file"])
def test_a_secret_is_read_from_a_regular_file_and_nothing_is_waited_for(name, tmp_path, option):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "long").write_bytes(b"s3cret" * 20_000)
    listening = socket.socket(socket.AF_UNIX)
    with listening:
        listening.bind(str(tmp_path / "socket"))
        for path, said in (("fifo", "regular"), (".", "regular"), ("empty", "first line"), ("long", "65,536"), ("/dev/null", "regular"), ("socket", "regular"), ("missing", "No such file")):
            if option == "--acl-file" and said in ("first line", "65,536"):
                continue
            told = shmcache_("serve", name, "--size", "8M", "--port", "0", "--unix", str(tmp_path / "s"), option, str(tmp_path / path), code=1 if path == "missing" else 2)
            assert said in told and "s3cret" not in told
            if option == "--store-file":
                told = shmcache_("supervise", name, "--size", "8M", option, str(tmp_path / path), code=1 if path == "missing" else 2)
                assert said in told and "s3cret" not in told
    assert not Path(f"/dev/shm/shmcache.{name}").exists()


def test_where_a_supervisor_learns_its_store(name, tmp_path):
    """What makes the store ends it at once, and says which one it is."""
    for where in "argument", "file", "variable":
        (tmp_path / f"{where}.py").write_text("def store():\n    import sys, os\n    sys.exit(f'it is the {__name__}, ' + os.environ.get('SHMCACHE_STORE', 'not in the environment'))\n")
    (tmp_path / "said").write_text("  file:store  \nargument:store\n")
    (tmp_path / "said").chmod(0o644)
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]), "SHMCACHE_STORE": "variable:store"}
    command = ["supervise", name, "--size", "8M"]
    assert shmcache_(*command, env=env, code=1) == "it is the variable, not in the environment\n"
    assert shmcache_(*command, "--store", "argument:store", env=env, code=1) == "it is the argument, not in the environment\n"
    told = shmcache_(*command, "--store-file", str(tmp_path / "said"), env=env, code=1)
    assert "chmod 600" in told and "it is the file, not in the environment" in told
    assert shmcache_(*command, "--store-file", "-", env=env, stdin=b"file:store", code=1) == "it is the file, not in the environment\n"
    assert "standard input is empty" in shmcache_(*command, "--store-file", "-", env=env, code=2)
    assert "not allowed with" in shmcache_(*command, "--store-file", "-", "--store", "argument:store", code=2)
    assert "--store-file" in shmcache_(*command, "--store", "nosuch://u:s3cret@host/x", code=2)


def test_refused(make, tmp_path):
    """Through a supervisor of its own, before a table that takes no negative numbers."""
    database = tmp_path / "app.db"
    with sqlite3.connect(database) as db:
        db.execute("CREATE TABLE t (key BLOB PRIMARY KEY, value INTEGER CHECK (value >= 0), version INTEGER)")
    (tmp_path / "ours.py").write_text(
        "import shmcache\n\n"
        f"def store():\n    return shmcache.SQLStore('sqlite:///{database}', 't', key_column='key', value_column='value', version_column='version')\n"
    )
    cache = make("8M", policy=shmcache.Policy("back", flush_every=0.02))
    name = cache.name
    with shmcache.create(name + "-plain", "8M"):
        assert "nothing is written back" in admin("refused", name + "-plain", code=2)
    shmcache.unlink(name + "-plain")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}
    supervisor = subprocess.Popen([BIN / "shmcache", "supervise", name, "--quiet", "--store", "ours:store"], env=env, stderr=subprocess.DEVNULL)
    try:
        until(lambda: cache.supervisor()["pid"] == supervisor.pid)
        assert "refuses nothing" in admin("refused", name)
        for key, value in (("one", -1), ("two\x1b[2J", -2), ("three", -3), ("good", 4)):
            cache.set(key, value)
        until(lambda: cache.stats()["store"]["refused"] == 3)
        told = data("refused", name)
        assert told["refused"] == 3
        rows = {row["key"]: row for row in told["rows"]}
        assert rows.keys() == {"one", "two\x1b[2J", "three"}
        assert "CHECK" in rows["one"]["error"]
        assert rows["one"]["version"] == cache.gets("one")[1]
        assert 0 <= rows["one"]["since_s"] < 30
        assert (rows["one"]["tries"], 0 < rows["one"]["again_s"] <= 60) == (1, True)
        text = admin("refused", name)
        assert "\x1b" not in text and "two\\x1b[2J" in text and "CHECK" in text
        assert len(cache) == 4 == len(list(cache.scan()))
        assert "--yes" in admin("refused", name, "--drop", "one", code=2)
        assert "among" in admin("refused", name, "--drop", "good", "--yes", code=2)
        assert "among" in admin("refused", name, "--retry", "good", code=2)
        assert "not allowed" in admin("refused", name, "--retry", "one", "--drop", "one", code=2)
        assert data("refused", name, "--drop", "one", "--yes") == {"name": name, "dropped": 1}
        assert cache.get("one") is None
        cache.set("one", -5)
        until(lambda: cache.stats()["store"]["refused"] == 3)
        assert "given up" in admin("refused", name, "--drop", "one", "--yes")
        until(lambda: cache.stats()["store"]["refused"] == 2)
        assert "at once" in admin("refused", name, "--retry", "three")
        until(lambda: any(row["key"] == "three" and row["version"] != rows["three"]["version"] for row in data("refused", name)["rows"]))
        with sqlite3.connect(database) as db:
            db.execute("DROP TABLE t")
            db.execute("CREATE TABLE t (key BLOB PRIMARY KEY, value INTEGER, version INTEGER)")
        assert data("refused", name, "--retry") == {"name": name, "retried": 2}
        until(lambda: cache.stats()["store"]["dirty_items"] == 0)
        with sqlite3.connect(database) as db:
            assert dict(db.execute("SELECT key, value FROM t")) == {b"two\x1b[2J": -2, b"three": -3}
        until(lambda: data("refused", name)["refused"] == 0)
        assert "none" in admin("refused", name, "--retry", code=1)
    finally:
        supervisor.terminate()
        assert supervisor.wait(60) == 0
    assert "refuses nothing" in admin("refused", name)
    cache.views(writable=True).header["flush_refused"] = 1  # as a supervisor leaves it that ends with rows refused
    for more in [], ["--drop", "one", "--yes"], ["--retry", "one"]:
        assert "no supervisor" in admin("refused", name, *more, code=2)


def test_a_table_on_a_terminal_shows_what_a_key_says_and_nothing_else(monkeypatch):
    """It is no markup, and no emoji."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    cli._table("a [title]", ("key", "n"), [("[/b]", 1), ("[red]x", 2), (":smile:", 3)])
    shown = sys.stdout.getvalue()
    assert all(text in shown for text in ("a [title]", "[/b]", "[red]x", ":smile:"))
