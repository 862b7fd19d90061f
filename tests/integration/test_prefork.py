"""Servers that fork their workers from a parent: gunicorn, with the application loaded before the fork and after; a pool as Celery's."""

from __future__ import annotations

import http.client
import multiprocessing as mp
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

APP = """
import os, shmcache
cache = shmcache.attach({name!r})
cache.get("while it is imported")               # with --preload the parent has a row, too
def app(environ, start_response):
    n = cache.incr("requests", default=0)
    body = f"{{os.getpid()}} {{cache.row}} {{n}}".encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""
PATIENCE = 60  # seconds


def ask(path):
    """(pid, row, number) that a worker answers with; None if nobody listens yet, or the worker was killed."""
    connection = http.client.HTTPConnection("localhost", timeout=PATIENCE)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(path)
        connection.request("GET", "/")
        return tuple(map(int, connection.getresponse().read().split()))
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@pytest.mark.parametrize("preload", [(), ("--preload",)])
def test_gunicorn_workers_share_count_and_are_replaced(make, tmp_path, preload):
    cache = make()
    (tmp_path / "site_.py").write_text(APP.format(name=cache.name))
    path = str(tmp_path / "s")
    argv = [sys.executable, "-m", "gunicorn", "--workers", "2", "--bind", f"unix:{path}", "--graceful-timeout", "5", *preload, "site_:app"]
    server = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE
        rows, last = {}, 0

        def till(there):
            nonlocal last
            while not there():
                assert time.monotonic() < deadline
                assert server.poll() is None, server.stdout.read()
                if answer := ask(path):
                    pid, row, last = answer
                    rows[pid] = row

        till(lambda: len(rows) == 2)
        assert len(set(rows.values())) == 2
        killed = next(iter(rows))
        os.kill(killed, signal.SIGKILL)  # it is idle: a request that was counted was answered
        till(lambda: len(rows) == 3)
        living = {p["pid"] for p in cache.processes()}
        assert killed not in living
        assert {pid for pid in rows if pid != killed} <= living
        assert (server.pid in living) == bool(preload)
        assert cache.get("requests") == last
    finally:
        server.terminate()
        server.wait(PATIENCE)
        server.stdout.close()
    assert {p["pid"] for p in cache.processes()} == {os.getpid()}


def task(cache_and_number):
    cache, number = cache_and_number
    cache.set(b"task:%d" % number, os.getpid())
    return cache.incr("tasks", default=0)


def test_a_pool_that_replaces_its_workers(make):
    """As a Celery worker does with --max-tasks-per-child: forked from a parent that uses the cache, replaced all the time."""
    cache = make(max_processes=4)  # the parent's and the workers', one to spare: rows come back
    cache.set("parent", 1)
    with mp.get_context("fork").Pool(2, maxtasksperchild=3) as pool:
        seen = pool.map(task, [(cache, i) for i in range(120)], chunksize=1)
        pool.close()
        pool.join()
    assert sorted(seen) == list(range(1, 121))
    assert len({cache.get(b"task:%d" % i) for i in range(120)}) >= 40
    assert cache.get("parent") == 1
