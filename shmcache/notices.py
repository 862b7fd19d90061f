"""What a process that goes on says to its operator, on standard error."""

from __future__ import annotations

import contextlib
import select
import sys


def notice(text: str) -> None:
    """Say it if somebody listens. A pipe whose reader has gone, or is slow, and a full disk are no reason to end, or to wait."""
    with contextlib.suppress(OSError, ValueError):
        if _takes():
            print(text, file=sys.stderr, flush=True)


def _takes() -> bool:
    """Would a line be written at once, or refused?"""
    if sys.stderr is None:  # closed when the interpreter started: print() would take standard output
        return False
    try:
        fd = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # it is no file
        return True
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))
