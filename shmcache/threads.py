"""Threads in which an event loop's cache makes calls that take their time: `Threads`, and `Job`, one call (aio.py).

Not asyncio's executor: code of the user's that keeps all of its threads would keep the cache waiting, and asyncio.run() and the end of the
interpreter wait for calls whose tasks have left. A call here waits for nothing that needs another of these threads.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from shmcache import errors
from shmcache.core import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

MOST = 32
IDLE = 10.0  # seconds after which a thread without work ends


class Threads:
    """At most MOST daemon threads, started when they are needed. After a fork the child has others."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._n = self._idle = 0  # threads; those of them that wait for a job

    def begin(self, steps: Generator[Any, Any, Any], call: Callable[[], Any]) -> Job:
        """Queue a call that those steps have asked for; called in an event loop."""
        if self._pid != os.getpid():
            self.__init__()  # type: ignore[misc]
        job = Job(steps, call)
        with self._changed:
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._changed.notify()
                return job
            if self._n == MOST:
                return job
            self._n += 1
        try:
            threading.Thread(target=self._work, name="shmcache-store", daemon=True).start()
        except BaseException:
            with self._changed:
                self._n -= 1
                if self._n == 0:
                    self._jobs.remove(job)
                    raise
        return job

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.run()
            except BaseException:
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
            del job

    def _next(self) -> Job | None:
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._jobs, IDLE)
            self._idle -= 1
            if self._jobs:
                return self._jobs.popleft()
            self._n -= 1
            return None


class Job:
    """A call in a thread, for steps that a task goes through. Await `ended`, then take(); or leave().

    A task that leaves a call that has begun leaves the rest of the steps to the thread: they are told how it ended, and begin nothing more.
    """

    def __init__(self, steps: Generator[Any, Any, Any], call: Callable[[], Any]) -> None:
        self._steps, self._call = steps, call
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._caller = _core.caller_number()
        self._lock = threading.Lock()
        self._begun = self._over = False
        self._left: bool = False  # the task has, or the thread has taken its place
        self._answer: Any = None
        self._failed: BaseException | None = None
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def run(self) -> None:
        """In a thread."""
        with self._lock:
            if self._left:
                return
            self._begun = True
        try:
            self._answer = self._context.run(_core.acting_for, self._caller, self._call)
        except BaseException as e:
            self._failed = e
        with self._lock:
            self._over = True
            mine: bool = self._left
        if not mine:
            try:
                self._loop.call_soon_threadsafe(wake, self.ended)
            except RuntimeError:  # the loop is closed: its task will not go on
                with self._lock:
                    mine = not self._left
                    self._left = True
        if mine:
            self._go_through()

    def take(self) -> tuple[Any, BaseException | None]:
        """What the call returned, or raised."""
        answer, failed = self._answer, self._failed
        self._answer = self._failed = None
        return answer, failed

    def leave(self) -> bool:
        """The task is cancelled, or collected. False: the call is not made, and the steps are still the task's to close."""
        with self._lock:
            if self._left:
                return True
            self._left = True
            if not self._begun:
                return False
            over = self._over
        if over:
            self._go_through()
        return True

    def _go_through(self) -> None:
        answer, failed = self.take()
        try:
            if failed is None:
                self._steps.send(answer)
            else:
                self._steps.throw(failed)
        except (StopIteration, errors.ShmcacheError):
            return  # through; an error is its task's, which has left. The store's are counted
        self._steps.close()


def wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
