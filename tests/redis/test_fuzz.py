"""The fuzzer of the sidecar's parser and executor: a short run on the build at hand, and that it sees what it looks for."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys

import pytest

from shmcache.core import _resp
from shmcache.sidecar.commands.table import TABLE, Command
from tests.redis import fuzz
from tests.special import ROOT


def test_what_clients_may_send_hurts_nobody():
    argv = [sys.executable, "-m", "tests.redis.fuzz", "--plain", "--inputs", "50000", "--seed", "1"]
    out = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert out.returncode == 0, out.stdout + out.stderr
    report = json.loads(out.stdout)
    assert report["failed"] == []
    assert not set(report["never run"]) & set(_resp.COMPILED) and len(report["never run"]) < 5
    assert report["inputs"] == 50_000 == sum(report["outcomes"].values())
    assert all(report["outcomes"][said] > 500 for said in ("answered", "protocol error", "half a command", "in a transaction")), report


def test_an_input_is_made_by_its_seed_and_number():
    def inputs(seed):
        maker = fuzz.Maker(seed, 3, False)
        return [maker.input() for _ in range(200)]

    assert inputs(1) == inputs(1) != inputs(2)


def del_that(monkeypatch, does):
    monkeypatch.setitem(TABLE, "del", Command(-1, 0, does, (0, 0, 0), "generic"))


def raises(client, arguments):
    raise KeyError("a fault of ours")


def replies_half(client, arguments):
    return b"*2\r\n:1\r\n"


def keeps_what_it_has_sent(client, arguments):
    client.flush = lambda: None
    return b"+OK\r\n"


def dies(client, arguments):
    os.kill(os.getpid(), signal.SIGSEGV)


def never_ends(client, arguments):
    while True:
        pass


@pytest.mark.parametrize(
    "does, said",
    [(raises, "a fault of ours"), (replies_half, "half a reply"), (keeps_what_it_has_sent, "unsent"), (dies, "signal 11"), (never_ends, "did not end")],
)
def test_it_sees(does, said, monkeypatch):
    del_that(monkeypatch, does)
    monkeypatch.setattr(fuzz, "STUCK", 5.0)
    monkeypatch.setattr(fuzz, "LOOKED_AT", 1)
    monkeypatch.setattr(fuzz, "FAILURES", 1)
    report = fuzz.watch(1, 2 * fuzz.BATCH)
    assert said in report["failed"][0], report["failed"]


def test_it_sees_that_memory_grows(monkeypatch):
    kept = []
    del_that(monkeypatch, lambda client, arguments: kept.append(b"x" * 3_000_000) or b":1\r\n")
    monkeypatch.setattr(fuzz, "GROWTH", 1 << 20)
    monkeypatch.setattr(fuzz, "BATCH", 1000)
    assert "grown" in fuzz.watch(1, 10 * fuzz.BATCH)["failed"][0]


def test_nothing_behind_a_read_can_be_read():
    region = fuzz.Region()
    view = region.place(b"PING\r\n")
    assert bytes(view) == b"PING\r\n"
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    assert ctypes.string_at(address, 6) == b"PING\r\n"
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.string_at(address, 7)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGSEGV
