"""supervise(): a supervisor as a child process."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from shmcache import cache as cache_module
from shmcache import errors
from shmcache.core import _core

START_LIMIT = 20.0  # seconds


def supervise(name: str) -> subprocess.Popen[bytes]:
    """Start a supervisor for a live segment, as a child that ends when this process does.

    Returns: the child, once it holds the segment; terminate() and wait() end it.
    Raises: SegmentNotFound, SupervisorRunning, CapacityError if it does not begin in 20 s.
    """
    with cache_module.attach(name) as cache:
        running = cache.supervisor()
        if running["alive"]:
            raise errors.SupervisorRunning(f"the segment {name!r} has a supervisor already: process {running['pid']}")
        child = subprocess.Popen(
            [sys.executable, "-m", "shmcache.cli", "supervise", "--quiet", "--parent", str(os.getpid()), name],
            stdin=subprocess.DEVNULL,
        )
        deadline = _core.monotonic() + START_LIMIT
        while cache.supervisor()["pid"] != child.pid:
            code = child.poll()  # not wait(), whose time-out is by a clock that a test may have stopped
            if code is None:
                if _core.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
                child.kill()
                child.wait()
                raise errors.StripeBusy(f"the supervisor of {name!r} did not begin within {START_LIMIT:.0f} s")
            running = cache.supervisor()
            if running["alive"]:
                raise errors.SupervisorRunning(f"the segment {name!r} has a supervisor already: process {running['pid']}")
            raise errors.ShmcacheError(f"the supervisor of {name!r} ended at once with exit code {code}")
        return child
