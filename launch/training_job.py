"""A training job: started as one rank of it, or as the parent of its ranks."""

import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import typer

from groundwork.launch.errors import reporting
from groundwork.launch.ranks import STOP_SIGNALS, STOPPED_EARLY, STOPPED_LINE, run_ranks

#: Longest --timeout, a week, in seconds.
LONGEST_TIMEOUT = 604_800


@dataclass(frozen=True)
class Job:
    """What was asked for. command: the sub-command of `groundwork` that a rank runs."""

    command: str
    recipe: str
    out: Path
    overrides: list[str]
    timeout_s: float


def start_job(job: Job, ranks: int, run_rank: Callable[[Job, int, list[int]], int]) -> int:
    """Start `ranks` processes, or be one of a job. Returns the exit status, 0 also after a polite
    stop, which is resumable.

    run_rank: (job, rank, stop signals that have come so far) -> exit status.
    """
    if ranks < 1:
        raise typer.BadParameter(
            f"{ranks} processes cannot train; give 1 or more", param_hint="--ranks"
        )
    if not 1 <= job.timeout_s <= LONGEST_TIMEOUT:
        raise typer.BadParameter(
            f"{job.timeout_s:g} is not between 1 and {LONGEST_TIMEOUT:,} seconds",
            param_hint="--timeout",
        )
    early = _note_signals()
    if ranks > 1 and "RANK" not in os.environ:
        arguments = [job.command, job.recipe, "--out", str(job.out)]
        for override in job.overrides:
            arguments += ["--set", override]
        return run_ranks([*arguments, "--timeout", str(job.timeout_s)], ranks, early)
    rank = int(os.environ.get("RANK", "0"))

    def run() -> int:
        _quieten()
        if early and (status := stopped_early()) is not None:
            return status
        return run_rank(job, rank, early)

    return reporting(run, rank=rank)


def say_how_it_ended(done: int, steps: int, out: Path, command: str) -> None:
    """command: what would go on with the job."""
    if done < steps:
        print(f"\nstopped after step {done} of {steps}; to go on, run\n  {command}", flush=True)
    else:
        print(f"\ndone: {done} steps, checkpoints in {out}/checkpoints", flush=True)


def stopped_early() -> int | None:
    """The exit status of a rank asked to stop before it has joined the others, if it may leave.

    None under a launcher of others, which would not tell the other ranks: then the job starts, and
    stops in good order before its first step.
    """
    if "GROUNDWORK_RANKS" in os.environ:
        return STOPPED_EARLY
    if os.environ.get("WORLD_SIZE", "1") == "1":
        print(STOPPED_LINE, flush=True)
        return 0
    return None


def start_command(world_size: int) -> str:
    """The command line that started this job."""
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    if os.environ.get("GROUNDWORK_RANKS"):
        return shlex.join(["groundwork", *arguments, "--ranks", str(world_size)])
    script = sys.argv[0]
    if "CROSS_SIZE" in os.environ:  # set by deepspeed's launcher alone
        return shlex.join(["deepspeed", "--num_gpus", str(world_size), script, *arguments])
    if world_size > 1:
        return shlex.join(["torchrun", "--nproc_per_node", str(world_size), script, *arguments])
    name = "groundwork" if Path(script).name == "groundwork" else f"python {script}"
    return f"{name} {shlex.join(arguments)}"


def _note_signals() -> list[int]:
    """Collect stop signals from now on: imports and start-up take seconds, which one must survive.

    A second Ctrl-C interrupts at once.
    """
    early: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in early:
            raise KeyboardInterrupt
        early.append(number)

    for number in STOP_SIGNALS:
        signal.signal(number, note)
    # run_ranks starts its ranks with these blocked, so that none is lost before this line
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return early


def _quieten() -> None:
    """Silence what DeepSpeed and torch say at every start and nobody can act upon."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    for message in (
        "Attempting to get learning rate from scheduler before it has started",
        ".*all_gather_into_tensor.*",
        ".*reduce_scatter_tensor.*",
    ):
        warnings.filterwarnings("ignore", message=message)
