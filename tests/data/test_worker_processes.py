import os
import signal
import threading
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children

import pytest

from groundwork.data.shard_index import ShardError
from groundwork.data.shards import parse_manifest
from groundwork.data.worker_processes import worker_processes


def test_calls_are_spread_and_answered() -> None:
    before = set(active_children())
    with worker_processes(2) as processes:
        squares = [processes.submit(pow, i, 2) for i in range(50)]
        pids = {processes.submit(os.getpid).result() for _ in range(20)}
        assert [square.result() for square in squares] == [i**2 for i in range(50)]
        assert len(set(active_children()) - before) == 2
    assert pids and os.getpid() not in pids
    assert set(active_children()) == before


def test_what_a_call_raises_comes_back_and_the_next_call_is_answered() -> None:
    with worker_processes(1) as processes:
        with pytest.raises(ShardError) as caught:
            processes.submit(parse_manifest, b"{", "x.json").result()
        assert str(caught.value).startswith("x.json: not a groundwork manifest")
        assert "in parse_manifest" in "".join(caught.value.__notes__)  # where, in the other process
        with pytest.raises(RuntimeError, match="the result cannot be sent"):
            processes.submit(threading.Lock).result()
        with pytest.raises(AttributeError):
            processes.submit(lambda: None).result()
        assert processes.submit(abs, -3).result() == 3


def test_a_process_that_dies_breaks_its_calls_only() -> None:
    with worker_processes(1) as processes:
        pid = processes.submit(os.getpid).result()
        os.kill(pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(BrokenProcessPool, match="died"):
                processes.submit(abs, -3).result()
    with worker_processes(1) as processes, pytest.raises(BrokenProcessPool, match="died"):
        processes.submit(os._exit, 9).result()


def test_an_end_cancels_what_has_not_begun() -> None:
    with worker_processes(1) as processes:
        begun = processes.submit(sum, range(20_000_000))
        while not begun.running():
            pass
        waiting = [processes.submit(abs, -3) for _ in range(5)]
    assert begun.result() == sum(range(20_000_000))
    assert all(call.cancelled() for call in waiting)
