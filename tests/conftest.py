"""Fixtures: segments that are verified after each test, and nothing left behind by any."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

import shmcache

counter = itertools.count()
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, and so inherited, when started in a shell's background


def objects() -> set[str]:
    return {p.name for p in Path("/dev/shm").glob("shmcache[.-]*")} | {p.name for p in Path("/dev/shm").glob("sem.shmcache*")}


def of_another_run(name: str) -> bool:
    """Objects are named by the pid of their maker: it lives, and is neither this process nor a child of it."""
    maker = re.search(r"-(\d+)", name)
    if maker is None or int(maker[1]) == os.getpid():
        return False
    try:
        return os.getpid() not in {p.pid for p in psutil.Process(int(maker[1])).parents()}
    except psutil.NoSuchProcess:
        return False


def of_this_run(names: set[str]) -> set[str]:
    """Those that nobody else's test is at. Beside another worker of pytest-xdist, whose test may have made one by a child that has died,
    these are what is still there after a while: it goes with that test."""
    deadline = time.monotonic() + ("PYTEST_XDIST_WORKER" in os.environ) * 60
    while (left := {name for name in names & objects() if not of_another_run(name)}) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.fixture(autouse=True)
def nothing_left():
    before, nice = objects(), os.getpriority(os.PRIO_PROCESS, 0)
    yield
    if os.getpriority(os.PRIO_PROCESS, 0) != nice:  # it has written a throttled snapshot in this thread; those that follow are not to be slow
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, nice)
    left = objects() - before
    assert not psutil.Process().children(recursive=True), "left processes"
    ours = of_this_run(left)
    assert not ours, f"left in /dev/shm: {ours}"


@pytest.fixture
def name():
    """A fresh segment name, unlinked afterwards if the test made it."""
    name = f"t-{os.getpid()}-{next(counter)}"
    yield name
    try:
        shmcache.unlink(name)
    except shmcache.SegmentNotFound:
        pass


@pytest.fixture
def make(name):
    """make(size, **options) -> Cache: verified and closed after the test."""
    made = []

    def create(size="8M", **options):
        made.append(shmcache.create(name, size, **options))
        return made[-1]

    yield create
    for cache in made:
        if not cache.closed:
            assert cache.verify() == []
            cache.close()


@pytest.fixture
def cache(make):
    return make()
