"""Threads in which an event loop's cache makes calls that take their time: `Threads`, and `Job`, one call (aio.py).

Not asyncio's executor: code of the user's that keeps all of its threads would keep the cache waiting, and asyncio.run() and the end of the
interpreter wait for calls whose tasks have left. A call here waits for nothing that needs another of these threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from shmcache import errors
from shmcache.core import _core
from shmcache.core._claims import Turn, wake

if TYPE_CHECKING:
    from collections.abc import Generator

MOST = 32
IDLE = 10.0  # seconds after which a thread without work ends


class Threads:
    """At most MOST daemon threads, started when they are needed. After a fork the child has others."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()  # taken by itself: no handler runs between `with` and the block, as one does in a Condition's
        self._changed = threading.Condition(self._lock)
        self._jobs: deque[Job] = deque()
        self._n = self._idle = 0  # threads; those of them that wait for a job

    def begin(self, job: Job) -> None:
        """Queue a call; called in an event loop. If it raises (a signal's handler, say) the call may be queued, or made: leave it."""
        if self._pid != os.getpid():
            self.__init__()  # type: ignore[misc]
        with self._lock:
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._changed.notify()
                return
            if self._n >= MOST:
                return
        try:
            threading.Thread(target=self._work, name="shmcache-store", daemon=True).start()
        except RuntimeError:  # no more threads: one of those that are there comes to it
            if not self._n:
                raise

    def forget(self, job: Job) -> None:
        """A call that is not to be made any more. In a fork child it is its parent's, whose lock nobody here gives back."""
        if self._pid != os.getpid():
            return
        with self._lock, contextlib.suppress(ValueError):  # a thread has it in its hands, and sees that, too
            self._jobs.remove(job)

    def _work(self) -> None:
        with self._lock:
            if self._n >= MOST:
                return  # several were started before the first of them was counted
            self._n += 1
        while (job := self._next()) is not None:
            try:
                job.run()
            except BaseException:
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
            del job

    def _next(self) -> Job | None:
        with self._lock:
            self._idle += 1
            self._changed.wait_for(lambda: self._jobs, IDLE)
            self._idle -= 1
            if self._jobs:
                return self._jobs.popleft()
            self._n -= 1
            return None


class Job(Turn):
    """A call in a thread, for steps that a task goes through. Await wait(), then take(); `with` core/_claims.pyx: Driving.

    A task that leaves a call that has begun leaves the rest of the steps to the thread: they are told how it ended, and begin nothing more.
    """

    def __init__(self, steps: Generator[Any, Any, Any], call: Any) -> None:
        """call: with `keys`, which it writes, `latest` and `patience` (stored.py: Call)."""
        self._steps, self._call, self.keys = steps, call, call.keys
        self.loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self.caller = _core.caller_number()
        self._answer: Any = None
        self._failed: BaseException | None = None
        self.ended = self.loop.create_future()

    def run(self) -> None:
        """In a thread."""
        if not self.begin():
            return
        try:
            self._answer = self._context.run(_core.acting_for, self.caller, self._call)
        except BaseException as e:
            self._failed = e
        if self.end():
            self.go_through()
            return
        try:
            self.loop.call_soon_threadsafe(wake, self.ended)
        except RuntimeError:  # the loop is closed: its task will not go on
            if self.take_over():
                self.go_through()

    async def wait(self) -> None:
        """Until it has ended, or is called off: at its `latest` if it has not begun. Raises: StoreUnavailable: its patience after that the
        store has not returned."""
        left = self._call.latest - _core.monotonic()
        timers = [self.loop.call_later(left, self.call_off), self.loop.call_later(left + self._call.patience, self.give_up)]
        try:
            await self.ended
        finally:
            for timer in timers:
                timer.cancel()
        if self.hangs:
            raise hangs(bool(self.keys))

    def take(self) -> tuple[Any, BaseException | None]:
        """What the call returned, or raised; StoreUnavailable: it was called off."""
        self.taken_back()
        answer, failed = self._answer, self._failed
        self._answer = self._failed = None
        return answer, too_late() if self.called_off else failed

    def go_through(self) -> None:
        """The rest of the steps, for a task that has left."""
        answer, failed = self._answer, self._failed
        self._answer = self._failed = None
        try:
            if failed is None:
                self._steps.send(answer)
            else:
                self._steps.throw(failed)
        except (StopIteration, errors.ShmcacheError):
            return  # through; an error is its task's, which has left. The store's are counted
        finally:
            del failed  # its traceback has this frame, and with it the steps and their cache
        self._steps.close()


def too_late() -> errors.StoreUnavailable:
    return errors.StoreUnavailable("this call of the store came to its turn too late: it was not made; try again")


def hangs(writes: bool) -> errors.StoreUnavailable:
    error = errors.StoreUnavailable("the store has not answered in its time: its call goes on in a thread, and it may be done later")
    error.unsettled = writes
    return error
