"""Start a pretraining job: as one rank of it, or as the parent of its ranks."""

import logging
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType

import typer

from groundwork.launch.errors import reporting
from groundwork.launch.ranks import STOP_SIGNALS, STOPPED_EARLY, STOPPED_LINE, run_ranks
from groundwork.launch.terminal import foreground

#: Longest --timeout, a week, in seconds.
LONGEST_TIMEOUT = 604_800


def start(recipe: str, out: str, overrides: list[str], ranks: int, timeout_s: float) -> int:
    """Run a recipe. Returns the exit status: 0 also after a polite stop, which is resumable."""
    if ranks < 1:
        raise typer.BadParameter(
            f"{ranks} processes cannot train; give 1 or more", param_hint="--ranks"
        )
    if not 1 <= timeout_s <= LONGEST_TIMEOUT:
        raise typer.BadParameter(
            f"{timeout_s:g} is not between 1 and {LONGEST_TIMEOUT:,} seconds",
            param_hint="--timeout",
        )
    early = note_signals()
    if ranks > 1 and "RANK" not in os.environ:
        arguments = ["pretrain", recipe, "--out", out]
        for override in overrides:
            arguments += ["--set", override]
        return run_ranks([*arguments, "--timeout", str(timeout_s)], ranks, early)
    rank = int(os.environ.get("RANK", "0"))
    return reporting(lambda: _run_rank(recipe, out, overrides, rank, timeout_s, early), rank=rank)


def note_signals() -> list[int]:
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


def _run_rank(
    recipe_name: str,
    out: str,
    overrides: list[str],
    rank: int,
    timeout_s: float,
    early: list[int],
) -> int:
    quieten()
    if early and (status := stopped_early()) is not None:
        return status
    from groundwork.pretrain.engine.deepspeed_config import (
        prepare_environment,
        start_process_group,
    )

    prepare_environment()
    from groundwork.pretrain.engine.stop import StopRequest
    from groundwork.pretrain.recipe import load_recipe
    from groundwork.pretrain.run import batch_plan, check_inputs, pretrain

    stop = StopRequest()
    stop.requested = stop.requested or bool(early)
    recipe = load_recipe(recipe_name, overrides)
    batch_plan(recipe, int(os.environ.get("WORLD_SIZE", "1")), rank)
    data = check_inputs(recipe, Path(out))
    if stop.requested and (status := stopped_early()) is not None:
        return status
    world = start_process_group(timeout_s)
    with foreground(enabled=world.is_main):
        done = pretrain(recipe, Path(out), world, stop, data)
    if world.is_main:
        if done < recipe.train.steps:
            print(
                f"\nstopped after step {done} of {recipe.train.steps}; to go on, run\n"
                f"  {start_command(world.size)}",
                flush=True,
            )
        else:
            print(f"\ndone: {done} steps, checkpoints in {out}/checkpoints", flush=True)
    return 0


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


def quieten() -> None:
    """Silence what DeepSpeed and torch say at every start and nobody can act upon."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    for message in (
        "Attempting to get learning rate from scheduler before it has started",
        ".*all_gather_into_tensor.*",
        ".*reduce_scatter_tensor.*",
    ):
        warnings.filterwarnings("ignore", message=message)
