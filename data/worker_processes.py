"""Processes that calls are handed to, and that leave nothing behind however they end.

`ProcessPoolExecutor` makes its queues of named semaphores where processes are spawned; when the
whole process group is killed, nobody is left who removes them from /dev/shm. Here a thread of the
parent stands for each process and speaks with it through a pipe, which ends with the two.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

T = TypeVar("T")


class WorkerProcesses:
    """So many processes, each of which is started with the first call that comes to it."""

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers, "worker-process")
        self._pipe_of = threading.local()
        self._started: list[tuple[SpawnProcess, Connection]] = []
        self._starting = threading.Lock()

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Call a function in one of the processes; function, arguments and result are pickled.

        The future raises what the function raises, and BrokenProcessPool if its process dies.
        """
        return self._threads.submit(self._call, function, args)

    def shutdown(self) -> None:
        """Wait for the calls that have begun, cancel the others, end the processes."""
        try:
            self._threads.shutdown(cancel_futures=True)
        finally:
            for _, pipe in self._started:
                pipe.close()
        for process, _ in self._started:
            process.join()

    def _call(self, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        if not hasattr(self._pipe_of, "this_thread"):
            self._pipe_of.this_thread = self._start()
        pipe: Connection = self._pipe_of.this_thread
        try:
            pipe.send((function, args))
            is_result, answer = pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise BrokenProcessPool("a worker process died") from error
        if not is_result:
            raise answer
        return answer

    def _start(self) -> Connection:
        # spawned, not forked: the caller may hold threads (torch) that do not survive a fork
        context = multiprocessing.get_context("spawn")
        with self._starting:
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,))
            process.start()
            theirs.close()  # so that the pipe ends with the process
            self._started.append((process, pipe))
        return pipe


@contextmanager
def worker_processes(workers: int) -> Iterator[WorkerProcesses]:
    """WorkerProcesses that are shut down at the end."""
    processes = WorkerProcesses(workers)
    try:
        yield processes
    finally:
        processes.shutdown()


def _serve(pipe: Connection) -> None:
    """Answer calls until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=partial(_end_with, parent.sentinel), daemon=True).start()
    with suppress(BrokenPipeError, ConnectionResetError):
        while (answer := _answer(pipe)) is not None:
            try:
                pipe.send(answer)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # nothing is sent before all of it is pickled
                pipe.send((False, RuntimeError(f"the result cannot be sent: {error}")))


def _answer(pipe: Connection) -> tuple[bool, Any] | None:
    """(True, result) or (False, exception) of the next call, None where there is none."""
    try:
        try:
            function, args = pipe.recv()
        except EOFError:
            return None
        return True, function(*args)
    except BaseException as error:
        error.add_note("".join(traceback.format_exception(error)))  # pickle takes the note along
        return False, error


def _end_with(sentinel: int) -> None:
    # an orphan would go on writing beside what is started next
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
