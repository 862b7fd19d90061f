"""A running `shmcache serve`, and what its tests wait by."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import redis

from tests.redis.servers import free_port

LIMIT = 60  # seconds, of any wait


def until(condition):
    deadline = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
    return found


def is_worker(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return b"sidecar.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@contextlib.contextmanager
def running(*threads, stop):
    """Threads that end when `stop` is set, which it is at the end, however that comes."""
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(LIMIT)


class Service:
    """A running `shmcache serve`, with its address."""

    def __init__(self, name, folder, *options, size="64M"):
        self.name, self.port, self.path = name, free_port(), str(folder / "socket")
        argv = [sys.executable, "-m", "shmcache.cli", "serve", name, "--port", str(self.port), "--unix", self.path, *options]
        self.log = folder / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([*argv, "--size", size] if size else argv, stderr=log)
        until(lambda: "serving" in self.said() or self.process.poll() is not None)

    def said(self):
        return self.log.read_text()

    def client(self, **options):
        return redis.Redis(unix_socket_path=self.path, **options)

    def workers(self):
        """Pids of the event loops."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if is_worker(pid)]

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(LIMIT)
