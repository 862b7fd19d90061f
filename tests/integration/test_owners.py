"""Who claims: threads, asyncio tasks and the greenlets of gevent and eventlet, patched or not, each with a life of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import socket
import subprocess
import sys
import threading
import time

import greenlet
import pytest

from shmcache import errors

PATIENCE = 60  # seconds
HUBS = {
    "gevent, patched": "from gevent import monkey; monkey.patch_all(); import gevent as hub",
    "gevent": "import gevent as hub",
    "eventlet, patched": "import eventlet as hub; hub.monkey_patch()",
    "eventlet": "import eventlet as hub",
}
TOGETHER = """
import sys, threading
import shmcache
from shmcache import errors
cache = shmcache.attach(sys.argv[1])

def together(function, n=10):
    done = [hub.spawn(function) for _ in range(n)]
    return [g.get() if hasattr(g, "get") else g.wait() for g in done]

calls = []
def factory():
    calls.append(1)
    for _ in range(20):
        hub.sleep(0.001)
    return {"call": len(calls)}

assert together(lambda: cache.get_or_set("k", factory)) == [{"call": 1}] * 10, calls

inside, most = 0, 0
def locked():
    global inside, most
    with cache.lock("l"):
        inside += 1
        most = max(most, inside)
        hub.sleep(0.002)
        inside -= 1
    return "done"
assert together(locked) == ["done"] * 10
assert most == 1, most

def twice():
    with cache.lock("l"):
        try:
            cache.lock("l").acquire()
        except errors.UsageError as e:
            return str(e)
assert all("not re-entrant" in said for said in together(twice)), together(twice)

def own():
    return cache.get_or_set("own", lambda: ["outer", cache.get_or_set("own", lambda: "inner")])
assert together(own) == [["outer", "inner"]] * 10

def late():
    with cache.lock("l"):
        return cache.lock("l2").acquire(timeout=0.05)
with cache.lock("l2"):
    held = hub.spawn(late)
    while not cache.claim_version(b"\\0lock\\0l", True):
        hub.sleep(0.001)
    hub.sleep(0.1)
assert not (held.get() if hasattr(held, "get") else held.wait())
print("well")
"""
# the main greenlet sleeps for all, if nobody has patched its sleep: it waits for none of its own thread
BENEATH = """
import sys
import shmcache
from shmcache import errors
cache = shmcache.attach(sys.argv[1])

def hold():
    with cache.lock("l"):
        cache.get_or_set("k", lambda: hub.sleep(0.05))
holder = hub.spawn(hold)
while not cache.claim_version("k"):
    hub.sleep(0.001)
assert cache.get_or_set("k", lambda: "computed beside it") == "computed beside it"
assert not cache.lock("l").acquire(blocking=False)
try:
    cache.lock("l").acquire()
except errors.UsageError:
    print("well")
"""


def ran(cache, code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, cache.name], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "well\n", done.stderr


@pytest.mark.parametrize("hub", HUBS.values(), ids=HUBS)
def test_greenlets_of_one_thread_are_callers_of_their_own(cache, hub):
    ran(cache, hub + TOGETHER)


@pytest.mark.parametrize("hub", [HUBS["gevent"], HUBS["eventlet"]], ids=["gevent", "eventlet"])
def test_a_thread_that_cannot_let_its_greenlets_run_does_not_wait_for_them(cache, hub):
    ran(cache, hub + BENEATH)


def test_an_ended_thread_leaves_its_claim_to_nobody(cache):
    idents = []

    def claims():
        idents.append(threading.get_ident())
        found.append(cache.claim("k", 600))

    found = []
    while len(idents) < 2 or idents[0] not in idents[1:]:  # until its ident is used again
        thread = threading.Thread(target=claims)
        thread.start()
        thread.join()
    assert found[0] > 0
    assert set(found[1:]) == {-1}, "another thread, whatever its ident"


def test_an_ended_greenlet_and_task_leave_theirs_to_nobody(cache):
    places = set()

    def claims():
        places.add(id(greenlet.getcurrent()))
        return cache.claim("k", 600)

    found = [greenlet.greenlet(claims).switch() for _ in range(100)]
    assert found[0] > 0
    assert set(found[1:]) == {-6}
    assert len(places) < 100, "no object was made in the place of another"
    assert cache.claim("k", 600) == -6, "the thread itself is none of them"
    cache.delete("k")

    async def claims_too():
        return cache.claim("k", 600)

    found = [asyncio.run(claims_too()) for _ in range(100)]
    assert found[0] > 0
    assert set(found[1:]) == {-6}
    assert cache.claim("k", 600) == -6


def test_threads_tasks_and_greenlets_know_their_own(cache):
    def twice(key):
        return cache.claim(key, 600) > 0 and cache.claim(key, 600)

    async def awaiting():
        first = twice("task")
        await asyncio.sleep(0)
        return first, cache.claim("task", 600)

    assert twice("thread") == -2
    assert greenlet.greenlet(lambda: twice("greenlet")).switch() == -2
    assert asyncio.run(awaiting()) == (-2, -2)
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        assert [other.submit(cache.claim, key, 600).result() for key in ("thread", "greenlet", "task")] == [-1] * 3


def test_a_task_does_not_wait_for_a_task_of_its_loop(cache):
    """Its sleep would stop the loop, and the other with it."""

    async def holds(there, over):
        assert cache.claim("k", 600) > 0
        with cache.lock("l"):
            there.set()
            await over.wait()

    async def both():
        there, over = asyncio.Event(), asyncio.Event()
        holder = asyncio.create_task(holds(there, over))
        await there.wait()
        assert cache.get_or_set("k", lambda: "beside it") == "beside it"
        assert cache.get("k") is None, "what has not got the claim stores nothing"
        with pytest.raises(errors.UsageError, match="aio"):
            cache.lock("l").acquire(timeout=600)
        assert not cache.lock("l").acquire(blocking=False)
        over.set()
        await holder
        assert cache.lock("l").acquire()

    asyncio.run(both())


def test_another_thread_waits_for_a_task(cache):
    async def holds():
        with cache.lock("l"):
            waiter.start()
            while not waits.is_set():
                await asyncio.sleep(0.001)

    def wait():
        lock = cache.lock("l")
        assert not lock.acquire(blocking=False)
        waits.set()
        with lock:
            got.append(True)

    waits, got = threading.Event(), []
    waiter = threading.Thread(target=wait)
    asyncio.run(holds())
    waiter.join(PATIENCE)
    assert got == [True]


APP = """
import shmcache, time
cache = shmcache.attach({name!r})
def app(environ, start_response):
    with cache.lock("l"):
        time.sleep(0.002)
    def factory():
        cache.incr("computed", default=0)
        time.sleep(0.05)
        return b"well"
    body = cache.get_or_set("k", factory)
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


def asked(path):
    connection = http.client.HTTPConnection("localhost", timeout=PATIENCE)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(path)
        connection.request("GET", "/")
        return connection.getresponse().read()
    except OSError:
        return None  # not there yet
    finally:
        connection.close()


def test_gunicorn_with_gevent_answers_requests_that_lock_and_compute(make, tmp_path):
    cache = make()
    (tmp_path / "site_.py").write_text(APP.format(name=cache.name))
    path = str(tmp_path / "s")
    argv = [sys.executable, "-m", "gunicorn", "-k", "gevent", "--workers", "1", "--bind", f"unix:{path}", "site_:app"]
    server = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        while asked(path) is None:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        cache.delete_many(["k", "computed"])
        with concurrent.futures.ThreadPoolExecutor(40) as users:
            assert list(users.map(asked, [path] * 40)) == [b"well"] * 40
        assert cache["computed"] == 1
    finally:
        server.terminate()
        server.wait(PATIENCE)
