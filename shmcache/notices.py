"""What a process that goes on says to its operator, on standard error."""

from __future__ import annotations

import contextlib
import sys


def notice(text: str) -> None:
    """Say it if somebody listens: a pipe whose reader has gone, or a full disk, is no reason to end."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
