"""Start a fine-tuning job: as one rank of it, or as the parent of its ranks."""

import os
import shlex
import sys
from pathlib import Path

import typer

from groundwork.launch.errors import reporting
from groundwork.launch.pretraining import (
    LONGEST_TIMEOUT,
    note_signals,
    quieten,
    start_command,
    stopped_early,
)
from groundwork.launch.ranks import run_ranks
from groundwork.launch.terminal import foreground


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
        arguments = ["finetune", recipe, "--out", out]
        for override in overrides:
            arguments += ["--set", override]
        return run_ranks([*arguments, "--timeout", str(timeout_s)], ranks, early)
    rank = int(os.environ.get("RANK", "0"))
    return reporting(lambda: _run_rank(recipe, out, overrides, rank, timeout_s, early), rank=rank)


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
    from groundwork.pretrain.engine.deepspeed_config import prepare_environment

    prepare_environment()
    from groundwork.pretrain.downstream.finetune import (
        check_finetune_inputs,
        finetune,
        finetune_plan,
    )
    from groundwork.pretrain.downstream.finetune_engine import start_accelerator
    from groundwork.pretrain.downstream.finetune_recipe import load_finetune_recipe
    from groundwork.pretrain.engine.stop import StopRequest

    stop = StopRequest()
    stop.requested = stop.requested or bool(early)
    recipe = load_finetune_recipe(recipe_name, overrides)
    plan = finetune_plan(recipe, int(os.environ.get("WORLD_SIZE", "1")), rank)
    data = check_finetune_inputs(recipe, Path(out))
    if stop.requested and (status := stopped_early()) is not None:
        return status
    accelerator, world = start_accelerator(recipe.train, plan, timeout_s)
    with foreground(enabled=world.is_main):
        done = finetune(recipe, Path(out), accelerator, world, stop, data)
    if world.is_main:
        if done < recipe.train.steps:
            print(
                f"\nstopped after step {done} of {recipe.train.steps}; to go on, run\n"
                f"  {_command(world.size)}",
                flush=True,
            )
        else:
            print(f"\ndone: {done} steps, checkpoints in {out}/checkpoints", flush=True)
    return 0


def _command(world_size: int) -> str:
    """The command line that started this job, as far as a rank of it can tell."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "GROUNDWORK_RANKS" not in os.environ:
        # `accelerate launch` hands its settings down through variables, not its arguments
        return "accelerate launch (with the same options) " + shlex.join(sys.argv)
    return start_command(world_size)
