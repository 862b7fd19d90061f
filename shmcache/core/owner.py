"""Who claims, and how it waits: of a thread that runs several callers by turns, the asyncio task or greenlet whose turn it is.

Imported by the first claim of a process that has loaded asyncio or greenlet. It imports neither.

A caller that waits for another of its own thread has to let it run. A greenlet can, if the sleep it calls is its event loop's. A task that
calls a synchronous method cannot: the loop stands still for as long as the call lasts.
"""

from __future__ import annotations

import itertools
import sys
import weakref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_count = itertools.count(1)
PATCHERS = (("gevent", "gevent.monkey", "is_module_patched"), ("eventlet", "eventlet.patcher", "is_monkey_patched"))


def number() -> int:
    """Of the task or greenlet that runs, and of no other ever in this process; 0: the thread itself runs."""
    one = task() or greenlet()
    return 0 if one is None else _numbers.setdefault(one, next(_count))


def task() -> Any:
    """The asyncio task that runs in this thread, or None."""
    get_loop = getattr(sys.modules.get("asyncio"), "_get_running_loop", None)  # missing while asyncio is being imported
    loop = get_loop and get_loop()
    return loop and sys.modules["asyncio"].current_task(loop)


def greenlet() -> Any:
    """The greenlet that runs in this thread; None: it is the thread's main one, which is the thread."""
    get_current = getattr(sys.modules.get("greenlet"), "getcurrent", None)
    current = get_current and get_current()
    return current if current is not None and current.parent is not None else None


def sleep_of_greenlets() -> Callable[[float], object] | None:
    """The sleep in which other greenlets of this thread run; None: there is none here."""
    if task() is not None:
        return None
    sleep: Callable[[float], object]
    for name, patcher, asks in PATCHERS:  # not what time.sleep is: a test may have put anything there
        patched = getattr(sys.modules.get(patcher), asks, None)
        if patched is not None and patched("time"):
            sleep = sys.modules[name].sleep
            return sleep
    for name, _, _ in PATCHERS:
        if name in sys.modules and greenlet() is not None:
            sleep = sys.modules[name].sleep
            return sleep
    return None
