"""Threads that fetch: what a reader waits for first, what it will want later after that."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from typing import Any, Generic, TypeVar

T = TypeVar("T")

URGENT, LATER, CLOSING = 0, 1, 2


class Task(Generic[T]):
    """A call on its way through the pool, and in `future` its result."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.call = call
        self.future: Future[T] = Future()
        self.since = time.monotonic()  # when it was submitted, later when it began
        self.claim = threading.Lock()

    def run(self) -> None:
        if not self.claim.acquire(blocking=False):
            return  # it was made urgent, so it stood in the queue twice
        self.since = time.monotonic()
        try:
            self.future.set_result(self.call())
        except BaseException as error:
            self.future.set_exception(error)


class Pool:
    """At most `threads` daemon threads, started as they are needed.

    Not a ThreadPoolExecutor: that one has no priorities, and a process that ends waits for all that
    is queued there. Belongs to one process; after a fork the child makes its own.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.progress = time.monotonic()  # when the pool last finished something
        self._queue: queue.PriorityQueue[tuple[int, int, Task[Any] | None]] = queue.PriorityQueue()
        self._order = count()
        self._idle = threading.Semaphore(0)
        self._started = 0
        self._starting = threading.Lock()

    def submit(self, call: Callable[[], T], *, urgent: bool) -> Task[T]:
        task = Task(call)
        self._queue.put((URGENT if urgent else LATER, next(self._order), task))
        with self._starting:
            if not self._idle.acquire(blocking=False) and self._started < self.threads:
                self._started += 1
                threading.Thread(target=self._work, name="groundwork-storage", daemon=True).start()
        return task

    def hurry(self, task: Task[Any]) -> None:
        """Move a task to the front, if it has not begun."""
        if not task.claim.locked():
            self._queue.put((URGENT, next(self._order), task))

    def close(self) -> None:
        """Let the threads end when all that is queued is done."""
        for _ in range(self.threads):
            self._queue.put((CLOSING, next(self._order), None))

    def _work(self) -> None:
        while True:
            try:
                _, _, task = self._queue.get_nowait()
            except queue.Empty:
                self._idle.release()
                _, _, task = self._queue.get()
            if task is None:
                return
            task.run()
            self.progress = time.monotonic()
            del task  # or its result stays alive until the next one comes
