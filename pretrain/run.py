"""A pretraining run: recipe -> data, model, objective, DeepSpeed engine -> loop -> checkpoints."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from groundwork.data.atomic import write_atomically
from groundwork.data.batch_plan import BatchPlan
from groundwork.data.shards import CONCEPTS
from groundwork.data.text import ClipTokenizer, load_tokenizer
from groundwork.pretrain.engine.averages import Averages
from groundwork.pretrain.engine.checkpoint import (
    RECIPE,
    CheckpointError,
    RunState,
    find_checkpoint,
    load_checkpoint,
    read_state,
    resuming_from,
    save_checkpoint,
)
from groundwork.pretrain.engine.deepspeed_config import World, deepspeed_config
from groundwork.pretrain.engine.faults import Quarantine
from groundwork.pretrain.engine.gradient_norm import note_gradient_norm
from groundwork.pretrain.engine.masters import set_masters
from groundwork.pretrain.engine.monitor import Monitor
from groundwork.pretrain.engine.optimizer import build_optimizer, set_lr
from groundwork.pretrain.engine.partitioned_init import LARGE, build_partitioned, parameter_count
from groundwork.pretrain.engine.run_lock import locked_run
from groundwork.pretrain.engine.stop import StopRequest
from groundwork.pretrain.engine.trainer import Loop, train
from groundwork.pretrain.image_text import (
    ImageTextConfig,
    make_tokenizer,
)
from groundwork.pretrain.kinds import DATA, build_objective
from groundwork.pretrain.models.klite import KliteConfig
from groundwork.pretrain.objectives.classification import ClassificationConfig
from groundwork.pretrain.recipe import (
    Recipe,
    RecipeError,
    differences,
    recipe_from_dict,
    recipe_to_dict,
)
from groundwork.pretrain.sample_flops import flops_per_sample
from groundwork.pretrain.training_data import TrainingData

TOKENIZER = "tokenizer"


def batch_plan(recipe: Recipe, world_size: int, rank: int) -> BatchPlan:
    """How the ranks share a global batch. Raises RecipeError where it does not divide."""
    batch = recipe.train.global_batch
    micro = recipe.train.micro_batch or max(1, batch // world_size)
    try:
        plan = BatchPlan(batch, micro, world_size, rank)
    except ValueError as error:
        raise RecipeError(f"train: {error}") from error
    objective = recipe.objective
    if isinstance(objective, ClassificationConfig) and objective.mixes and micro % 2:
        raise RecipeError(
            f"train: {micro} samples per rank and forward pass; objective.mixup and "
            "objective.cutmix mix a batch with itself reversed and need an even number"
        )
    if not plan.is_even:  # DeepSpeed averages gradients over ranks and micro-steps alike
        raise RecipeError(
            f"train: global_batch {batch} is not a multiple of micro_batch {micro} x {world_size} "
            "ranks; change one of the three"
        )
    return plan


def check_inputs(recipe: Recipe, out: Path) -> TrainingData:
    """Everything that can be wrong before the first process group: data, knowledge, `out` itself.

    Returns the opened data. Raises the error that the user is to see.
    """
    data = DATA[recipe.data.kind].open(recipe)
    _resumable(recipe, out, data)
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; --out names a folder")
    return data


def _resumable(recipe: Recipe, out: Path, data: TrainingData) -> Path | None:
    """The checkpoint to go on from. Raises CheckpointError where it is of another run than this."""
    checkpoint = find_checkpoint(out)
    if checkpoint is None:
        return None
    state = read_state(checkpoint)
    # a checkpoint of an earlier version lacks keys that have come since
    saved = recipe_to_dict(recipe_from_dict(state.recipe, f"{checkpoint}: its recipe"))
    changed = differences(saved, recipe_to_dict(recipe))
    if changed:
        listed = "\n  ".join(changed[:12])
        raise CheckpointError(
            f"{checkpoint} is of another recipe. It differs in (saved -> now):\n  {listed}\n"
            f"To go on with it, use the recipe it was made with ({out / RECIPE}); to start "
            "afresh, choose another --out"
        )
    now = data.digests()
    for kind, what in (
        ("dataset", f"on another data set than {recipe.data.where} holds now"),
        ("concepts", f"with other class names than {recipe.data.where} has now ({CONCEPTS})"),
        ("knowledge", f"with another knowledge index than {_knowledge_path(data)} is now"),
    ):
        if getattr(state, kind) != now[kind]:
            raise CheckpointError(
                f"{checkpoint} was made {what}; put back what was there, or choose another --out "
                "to start afresh"
            )
    return checkpoint


def _knowledge_path(data: TrainingData) -> str:
    return "none" if data.knowledge is None else str(data.knowledge.path)


def pretrain(
    recipe: Recipe,
    out: Path,
    world: World,
    stop: StopRequest,
    data: TrainingData,
) -> int:
    """Run `recipe` in folder `out`, from its last checkpoint if it has one. Returns steps done.

    Nothing is written before the folder is locked.
    """
    plan = batch_plan(recipe, world.size, world.rank)
    settings = engine_settings(recipe, plan)
    with locked_run(out, world):
        return _pretrain(recipe, out, world, stop, data, plan, settings)


def _pretrain(
    recipe: Recipe,
    out: Path,
    world: World,
    stop: StopRequest,
    data: TrainingData,
    plan: BatchPlan,
    settings: dict[str, Any],
) -> int:
    torch.set_float32_matmul_precision(recipe.train.float32_matmul)
    # once more, as another job may have held the folder until now
    checkpoint = _resumable(recipe, out, data)
    is_new = checkpoint is None
    tokenizer = _shared_tokenizer(recipe, out, world, data, is_new=is_new)
    engine, initial = _build_engine(recipe, settings, tokenizer, world)
    state = RunState(
        step=0,
        position=0,
        world_size=world.size,
        recipe=recipe_to_dict(recipe),
        bad_samples=0,
        **data.digests(),
    )
    if checkpoint is None and initial is not None:
        set_masters(engine, initial)
    try:
        averages = Averages(engine, recipe.ema, recipe.train.steps, initial)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    del initial  # as large as the model
    if checkpoint is not None:
        loaded = load_checkpoint(engine, checkpoint, world, averages)
        state = replace(loaded, recipe=recipe_to_dict(recipe))
    if world.is_main:
        write_atomically(out / RECIPE, yaml.safe_dump(dict(state.recipe), sort_keys=False).encode())
    monitor = Monitor(
        out,
        recipe.monitor,
        first_step=state.step,
        steps=recipe.train.steps,
        is_main=world.is_main,
    )
    quarantine = Quarantine(
        out,
        recipe.data.bad_sample_budget,
        count=state.bad_samples,
        position=state.position,
        is_main=world.is_main,
    )

    def save(step: int) -> Path:
        now = replace(
            state,
            step=step,
            position=step * plan.global_batch,
            bad_samples=quarantine.count,
        )
        return save_checkpoint(engine, out, now, world, recipe.checkpoint.keep, averages)

    if checkpoint is not None:
        monitor.say(resuming_from(checkpoint, state.position))
    try:
        return train(
            engine,
            DATA[recipe.data.kind].stream(recipe, data),
            DATA[recipe.data.kind].collate(tokenizer),
            Loop(
                first_step=state.step,
                steps=recipe.train.steps,
                plan=plan,
                precision=recipe.train.precision,
                set_lr=lambda optimizer, step: set_lr(
                    optimizer,
                    step,
                    recipe.train.steps,
                    recipe.optimizer,
                    recipe.schedule,
                    plan.global_batch,
                ),
                after_step=averages.after_step,
                flops_per_sample=flops_per_sample(recipe),
                log_every=recipe.monitor.log_every,
                save_every=recipe.checkpoint.every_steps,
                save=save,
                workers=recipe.data.workers,
                prefetch=recipe.data.prefetch,
            ),
            world,
            monitor,
            quarantine,
            stop,
        )
    finally:
        monitor.close()


def _shared_tokenizer(
    recipe: Recipe,
    out: Path,
    world: World,
    data: TrainingData,
    *,
    is_new: bool,
) -> ClipTokenizer | None:
    """The run's tokenizer: made by rank 0 for a new run, read from `out` ever after; None where the
    model reads no text.

    A start that failed before the first checkpoint may have left that of another recipe or data.
    """
    if not isinstance(recipe.model, KliteConfig) or not isinstance(recipe.data, ImageTextConfig):
        return None
    folder, context = out / TOKENIZER, recipe.model.text.context_length
    if world.is_main and (is_new or not folder.is_dir()):
        make_tokenizer(recipe.data.tokenizer, data, context).save(folder)
    dist.barrier()
    return load_tokenizer(folder, context)


def engine_settings(recipe: Recipe, plan: BatchPlan) -> dict[str, Any]:
    """DeepSpeed's configuration, as far as DeepSpeed checks it. Raises RecipeError."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    settings = deepspeed_config(
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        precision=recipe.train.precision,
        zero_stage=recipe.train.zero_stage,
        gradient_clipping=recipe.train.gradient_clipping,
        overrides=recipe.deepspeed,
    )
    try:
        DeepSpeedConfig(copy.deepcopy(settings))
    except (
        *(DeepSpeedConfigError, AssertionError, AttributeError),
        *(KeyError, TypeError, ValueError),
    ) as error:
        problems = str(error) or type(error).__name__
        if isinstance(error, ValidationError):
            problems = "; ".join(
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg']} (got {problem['input']!r})"
                for problem in error.errors()
            )
        given = ", ".join(recipe.deepspeed) or "none"
        raise RecipeError(
            f"DeepSpeed refuses its configuration: {problems}. Mend the section `deepspeed` of the "
            f"recipe (its keys: {given}); DeepSpeed's documentation says what each of them takes"
        ) from error
    return settings


def _build_engine(
    recipe: Recipe, settings: dict[str, Any], tokenizer: ClipTokenizer | None, world: World
) -> tuple[Any, dict[str, Tensor] | None]:
    """The engine, and the initial weights where DeepSpeed rounds them (bf16; None otherwise).

    A model that is built in parts has no whole weights to give: its masters start from bf16.
    """
    import deepspeed

    def build() -> nn.Module:
        # all ranks build the same initial weights; after that each draws its own numbers
        torch.manual_seed(recipe.train.seed)
        return build_objective(recipe, tokenizer)

    initial = None
    if _is_partitioned(recipe, build):
        objective = build_partitioned(build, settings)
    else:
        objective = build()
        if recipe.train.precision == "bf16":
            initial = {name: p.detach().clone() for name, p in objective.named_parameters()}
    try:
        optimizer = build_optimizer(objective, recipe.optimizer)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
    note_gradient_norm(engine)
    own = recipe.train.seed * 65_537 + world.rank + 1
    torch.manual_seed(own)
    # nothing here draws from these two, but they go into checkpoints, and a library may
    random.seed(own)
    np.random.seed(own % 2**32)
    return engine, initial


def _is_partitioned(recipe: Recipe, build: Callable[[], nn.Module]) -> bool:
    if recipe.train.partitioned_init is None:
        return recipe.train.zero_stage == 3 and parameter_count(build) > LARGE
    return recipe.train.partitioned_init
