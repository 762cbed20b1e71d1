"""Start the ranks of a single-node job, pass signals on, and report the one that fails."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Final

#: Seconds that ranks get to save and leave, after a stop signal or after another rank has died.
GRACE_AFTER_STOP = 600.0
GRACE_AFTER_DEATH = 30.0
#: Exit status of a rank that Ctrl-C has interrupted without saving.
INTERRUPTED = 130
#: Exit status of a rank that was asked to stop before it had joined the others.
STOPPED_EARLY = 75
STOPPED_LINE = "\nstopped before the first step; the same command starts again"
#: Signals that ask a job to save and end.
STOP_SIGNALS: Final[tuple[int, ...]] = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run_ranks(arguments: list[str], ranks: int, early: Sequence[int] = ()) -> int:
    """Run `groundwork ARGUMENTS` as `ranks` processes. Returns 0 when all of them ended well.

    Stop signals are passed on; the ranks save and end with 0, and so does this. A second Ctrl-C
    interrupts them: 130. early: stop signals that have arrived before.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GROUNDWORK_RANKS": str(ranks),
    }
    command = [sys.executable, "-m", "groundwork.launch.cli", *arguments]
    # until a rank has handlers of its own the signals wait for it
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    processes = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                **job,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "PYTHONSAFEPATH": "1",
            },
            # a session of its own: the terminal's Ctrl-C arrives here alone, and is passed on once
            start_new_session=True,
        )
        for rank in range(ranks)
    ]
    stopped: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    for number in early:
        pass_on(number, None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    deadline = None
    failed: int | None = None
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        now = time.monotonic()
        if stopped and any(process.poll() == STOPPED_EARLY for process in processes):
            # no rank can be past the start: it takes all of them
            for process in processes:
                process.kill()
        elif failed is None:
            failed = next((r for r, p in enumerate(processes) if p.poll() not in (None, 0)), None)
            if failed is not None:
                status = processes[failed].returncode
                if status != INTERRUPTED or not stopped:
                    print(
                        f"rank {failed} ended with status {status}; ending the others",
                        file=sys.stderr,
                    )
                deadline = now + GRACE_AFTER_DEATH
                for process in processes:
                    process.terminate()
        if deadline is None and stopped:
            deadline = now + GRACE_AFTER_STOP
        if deadline is not None and now > deadline:
            for process in processes:
                process.kill()
    statuses = {process.returncode for process in processes}
    if stopped and INTERRUPTED in statuses:
        return INTERRUPTED
    if stopped and STOPPED_EARLY in statuses and statuses <= {STOPPED_EARLY, -signal.SIGKILL}:
        print(STOPPED_LINE, flush=True)
        return 0
    return 0 if statuses == {0} else 1
