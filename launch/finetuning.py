"""`groundwork finetune`: one rank of the job."""

import os
import shlex
import sys
from pathlib import Path

from groundwork.launch.terminal import foreground
from groundwork.launch.training_job import (
    Job,
    say_how_it_ended,
    start_command,
    start_job,
    stopped_early,
)


def start(recipe: str, out: str, overrides: list[str], ranks: int, timeout_s: float) -> int:
    """Run a recipe. Returns the exit status, see `start_job`."""
    return start_job(Job("finetune", recipe, Path(out), overrides, timeout_s), ranks, _run_rank)


def _run_rank(job: Job, rank: int, early: list[int]) -> int:
    from groundwork.pretrain.engine.deepspeed_config import prepare_environment

    prepare_environment()
    from groundwork.pretrain.downstream.finetuning.engine import start_accelerator
    from groundwork.pretrain.downstream.finetuning.recipe import load_finetune_recipe
    from groundwork.pretrain.downstream.finetuning.run import (
        check_finetune_inputs,
        finetune,
        finetune_plan,
    )
    from groundwork.pretrain.engine.stop import StopRequest

    stop = StopRequest()
    stop.requested = stop.requested or bool(early)
    recipe = load_finetune_recipe(job.recipe, job.overrides)
    plan = finetune_plan(recipe, int(os.environ.get("WORLD_SIZE", "1")), rank)
    data = check_finetune_inputs(recipe, job.out)
    if stop.requested and (status := stopped_early()) is not None:
        return status
    accelerator, world = start_accelerator(recipe.train, plan, job.timeout_s)
    with foreground(enabled=world.is_main):
        done = finetune(recipe, job.out, accelerator, world, stop, data)
    if world.is_main:
        say_how_it_ended(done, recipe.train.steps, job.out, _command(world.size))
    return 0


def _command(world_size: int) -> str:
    """The command line that started this job, as far as a rank of it can tell."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "GROUNDWORK_RANKS" not in os.environ:
        # `accelerate launch` hands its settings down through variables, not its arguments
        return "accelerate launch (with the same options) " + shlex.join(sys.argv)
    return start_command(world_size)
