"""`groundwork pretrain`: one rank of the job."""

import os
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
    return start_job(Job("pretrain", recipe, Path(out), overrides, timeout_s), ranks, _run_rank)


def _run_rank(job: Job, rank: int, early: list[int]) -> int:
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
    recipe = load_recipe(job.recipe, job.overrides)
    batch_plan(recipe, int(os.environ.get("WORLD_SIZE", "1")), rank)
    data = check_inputs(recipe, job.out)
    if stop.requested and (status := stopped_early()) is not None:
        return status
    world = start_process_group(job.timeout_s)
    with foreground(enabled=world.is_main):
        done = pretrain(recipe, job.out, world, stop, data)
    if world.is_main:
        say_how_it_ended(done, recipe.train.steps, job.out, start_command(world.size))
    return 0
