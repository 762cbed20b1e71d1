"""A fine-tuning run: recipe -> task on a backbone, weights, Accelerate engine -> loop."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml
from torch import nn

from groundwork.data.atomic import write_atomically
from groundwork.data.batch_plan import BatchPlan
from groundwork.data.dataset import Dataset, open_dataset, require_two_splits
from groundwork.data.stream import Source, Stream
from groundwork.kernels.member_reader import find_member_reader
from groundwork.pretrain.downstream.classification import build_classification
from groundwork.pretrain.downstream.detection.dino import build_dino_detection
from groundwork.pretrain.downstream.detection.instance_segmentation import (
    build_instance_segmentation,
)
from groundwork.pretrain.downstream.finetuning.checkpoint import (
    FinetuneState,
    is_finetuned,
    keep_last_and_best,
    load_finetuned,
    read_finetune_state,
    save_finetuned,
)
from groundwork.pretrain.downstream.finetuning.ema import averaged, make_ema
from groundwork.pretrain.downstream.finetuning.engine import Engine
from groundwork.pretrain.downstream.finetuning.evaluation import (
    SplitReading,
    any_batch,
    evaluate_split,
)
from groundwork.pretrain.downstream.finetuning.evaluations import Evaluations
from groundwork.pretrain.downstream.finetuning.initial_weights import load_initial_weights
from groundwork.pretrain.downstream.finetuning.loop import FinetuneLoop, finetune_steps
from groundwork.pretrain.downstream.finetuning.recipe import (
    FinetuneRecipe,
    finetune_differences,
    finetune_recipe_to_dict,
)
from groundwork.pretrain.downstream.segmentation.semantic_segmentation import (
    build_semantic_segmentation,
)
from groundwork.pretrain.downstream.task import Task
from groundwork.pretrain.engine.checkpoint import (
    RECIPE,
    CheckpointError,
    find_checkpoint,
    resuming_from,
)
from groundwork.pretrain.engine.deepspeed_config import World
from groundwork.pretrain.engine.ema import Ema
from groundwork.pretrain.engine.faults import Quarantine
from groundwork.pretrain.engine.monitor import Monitor
from groundwork.pretrain.engine.run_lock import locked_run
from groundwork.pretrain.engine.stop import StopRequest
from groundwork.pretrain.recipe_yaml import RecipeError

WEIGHTS: Final = "weights.json"

#: kind of task -> (its config, config of the backbone, training split) -> the task, with fresh
#: weights. `model.backbone` gets the weights of the recipe afterwards.
TASKS: Final[Mapping[str, Callable[[Any, Any, Any], Task]]] = {
    "classification": build_classification,
    "instance_segmentation": build_instance_segmentation,
    "dino_detection": build_dino_detection,
    "semantic_segmentation": build_semantic_segmentation,
}


@dataclass(frozen=True)
class FinetuneSplits:
    """The opened splits. evaluation: None where nothing is evaluated."""

    train: Dataset
    evaluation: Dataset | None


def build_task(recipe: FinetuneRecipe, dataset: Dataset) -> Task:
    """The task of a recipe, with fresh weights. Raises RecipeError."""
    try:
        return TASKS[recipe.task.kind](recipe.task, recipe.backbone, dataset)
    except ValueError as error:
        raise RecipeError(f"{recipe.data.shards}: {error}") from error


def finetune_plan(recipe: FinetuneRecipe, world_size: int, rank: int) -> BatchPlan:
    """How the ranks share a global batch. Raises RecipeError where it does not divide."""
    batch = recipe.train.global_batch
    micro = recipe.train.micro_batch or max(1, batch // world_size)
    try:
        plan = BatchPlan(batch, micro, world_size, rank)
    except ValueError as error:
        raise RecipeError(f"train: {error}") from error
    if not plan.is_even:  # gradients are averaged over ranks and micro-steps alike
        raise RecipeError(
            f"train: global_batch {batch} is not a multiple of micro_batch {micro} x {world_size} "
            "ranks; change one of the three"
        )
    return plan


def check_batch(recipe: FinetuneRecipe, task: Task, plan: BatchPlan) -> None:
    """Raises RecipeError where a rank's forward pass has fewer samples than the task can train on.

    A task says so by an attribute `least_batch`; statistics over all ranks need no more than one.
    """
    least = getattr(task, "least_batch", 1)
    if plan.micro_batch < least and not (recipe.train.sync_batch_norm and plan.world_size > 1):
        raise RecipeError(
            f"train: {plan.micro_batch} samples per rank and forward pass; task.kind "
            f"{recipe.task.kind!r} normalises over a batch and needs at least {least}: raise "
            "train.micro_batch, or train.global_batch, or on several ranks set "
            "train.sync_batch_norm"
        )


def open_finetune_data(recipe: FinetuneRecipe) -> FinetuneSplits:
    """Open what the `data` section names; every missing or damaged file is found here."""
    data = recipe.data
    cache = None if data.cache is None else data.cache.to_config()
    reader = find_member_reader()  # compiled here, before workers are forked
    train = open_dataset(data.shards, data.split, cache=cache, reader=reader)
    split = data.evaluation_split
    if split is None:
        return FinetuneSplits(train, None)
    shards = data.evaluation_shards or data.shards
    evaluation = open_dataset(shards, split, cache=cache, reader=reader)
    require_two_splits(shards, data.split, train, split, evaluation)
    return FinetuneSplits(train, evaluation)


def check_evaluation(recipe: FinetuneRecipe, task: Task, data: FinetuneSplits) -> None:
    """Raises RecipeError or BadDataError where the evaluation could not be made.

    It would otherwise show after the first steps of training, or after all.
    """
    metric, names = recipe.evaluation.metric, task.evaluator().names()
    if metric is not None and metric not in names:
        near = get_close_matches(metric, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        shown = ", ".join(name for name in names if "/" not in name)
        raise RecipeError(f"evaluation.metric is {metric!r}; the task measures {shown}{hint}")
    if data.evaluation is not None:
        any_batch(task, data.evaluation)


def check_finetune_inputs(recipe: FinetuneRecipe, out: Path) -> FinetuneSplits:
    """Everything that can be wrong before the first process group: data, weights, `out` itself.

    Returns the opened data. Raises the error that the user is to see.
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; --out names a folder")
    data = open_finetune_data(recipe)
    checkpoint = _resumable(recipe, out, data)
    weights = recipe.weights
    if checkpoint is None and weights is not None and not Path(weights.path).exists():
        raise CheckpointError(
            f"weights.path: {weights.path} does not exist; give a run's folder, an official "
            "checkpoint or an export folder (--set weights.path=...), or train from scratch with "
            "--set weights=null"
        )
    return data


def _resumable(recipe: FinetuneRecipe, out: Path, data: FinetuneSplits) -> Path | None:
    """The checkpoint to go on from. Raises CheckpointError where it is of another run than this."""
    checkpoint = find_checkpoint(out)
    if checkpoint is None:
        return None
    if not is_finetuned(checkpoint):
        raise CheckpointError(
            f"{out} is the folder of a pretraining run; choose another --out, and name it in "
            "weights.path to start from it"
        )
    state = read_finetune_state(checkpoint)
    changed = finetune_differences(state.recipe, finetune_recipe_to_dict(recipe))
    if changed:
        listed = "\n  ".join(changed[:12])
        raise CheckpointError(
            f"{checkpoint} is of another recipe. It differs in (saved -> now):\n  {listed}\n"
            f"To go on with it, use the recipe it was made with ({out / RECIPE}); to start "
            "afresh, choose another --out"
        )
    if state.dataset != data.train.digest:
        raise CheckpointError(
            f"{checkpoint} was made on another data set than {recipe.data.shards} holds now; put "
            "back what was there, or choose another --out to start afresh"
        )
    return checkpoint


def finetune(
    recipe: FinetuneRecipe,
    out: Path,
    accelerator: Any,
    world: World,
    stop: StopRequest,
    data: FinetuneSplits,
) -> int:
    """Run `recipe` in folder `out`, from its last checkpoint if it has one. Returns steps done.

    Nothing is written before the folder is locked.
    """
    with locked_run(out, world):
        return _finetune(recipe, out, accelerator, world, stop, data)


def _finetune(
    recipe: FinetuneRecipe,
    out: Path,
    accelerator: Any,
    world: World,
    stop: StopRequest,
    data: FinetuneSplits,
) -> int:
    # once more, as another job may have held the folder until now
    checkpoint = _resumable(recipe, out, data)
    # all ranks build the same initial weights; after that each draws its own numbers
    torch.manual_seed(recipe.train.seed)
    task = build_task(recipe, data.train)
    if checkpoint is None and recipe.weights is not None:
        report = load_initial_weights(task.model.backbone, recipe.weights)  # type: ignore[arg-type]
        if world.is_main:
            print(report.summary(), flush=True)
            write_atomically(out / WEIGHTS, report.to_json().encode())
    plan = finetune_plan(recipe, world.size, world.rank)
    check_batch(recipe, task, plan)
    check_evaluation(recipe, task, data)
    engine = Engine(accelerator, task, recipe, plan, world)
    ema = None if recipe.ema is None else make_ema(engine, recipe.ema)
    _seed_rank(recipe.train.seed, world)
    state = FinetuneState(
        step=0,
        world_size=world.size,
        spread=engine.kind,
        recipe=finetune_recipe_to_dict(recipe),
        classes=getattr(task, "num_classes", None),
        dataset=data.train.digest,
        bad_samples=0,
    )
    if checkpoint is not None:
        saved = load_finetuned(engine, ema, checkpoint)
        state = replace(state, step=saved.step, bad_samples=saved.bad_samples)
    if world.is_main:
        write_atomically(out / RECIPE, yaml.safe_dump(dict(state.recipe), sort_keys=False).encode())
    return _train(recipe, out, engine, task, ema, stop, data, state, checkpoint)


def _train(
    recipe: FinetuneRecipe,
    out: Path,
    engine: Engine,
    task: Task,
    ema: Ema | None,
    stop: StopRequest,
    data: FinetuneSplits,
    state: FinetuneState,
    checkpoint: Path | None,
) -> int:
    world, batch = engine.world, engine.plan.global_batch
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
        position=state.step * batch,
        is_main=world.is_main,
    )
    evaluations = Evaluations(out, recipe.evaluation, world.is_main)
    evaluations.resume(state.step)

    def save(step: int) -> Path:
        now = replace(
            state,
            step=step,
            bad_samples=quarantine.count,
            ema_updates=0 if ema is None else ema.updates,
        )
        best = evaluations.best
        step_of_best = None if best is None else best["step"]
        return save_finetuned(engine, ema, out, now, recipe.checkpoint.keep, step_of_best)

    def keep_best(step: int) -> None:
        if world.is_main:
            keep_last_and_best(out, recipe.checkpoint.keep, step)

    def evaluate() -> dict[str, float]:
        assert data.evaluation is not None
        return _evaluate(recipe, engine, task, ema, data.evaluation, data.train)

    if checkpoint is not None:
        monitor.say(resuming_from(checkpoint, state.step * batch))
    source = Source(data.train, _Decode(task), "", recipe.data.shuffle_block)
    try:
        return finetune_steps(
            engine,
            task,
            Stream([source], seed=recipe.train.seed, shuffle=recipe.data.shuffle),
            FinetuneLoop(
                first_step=state.step,
                steps=recipe.train.steps,
                log_every=recipe.monitor.log_every,
                save_every=recipe.checkpoint.every_steps,
                evaluate_every=recipe.evaluation.every_steps,
                save=save,
                keep_best=keep_best,
                evaluate=None if data.evaluation is None else evaluate,
                workers=recipe.data.workers,
                prefetch=recipe.data.prefetch,
            ),
            ema,
            monitor,
            quarantine,
            evaluations,
            stop,
        )
    finally:
        monitor.close()


@dataclass(frozen=True)
class _Decode:
    """The training examples of a task, as `Stream` asks for them."""

    task: Task

    def __call__(self, sample: Any, rng: np.random.Generator) -> Any:
        return self.task.example(sample, rng)


def _evaluate(
    recipe: FinetuneRecipe,
    engine: Engine,
    task: Task,
    ema: Ema | None,
    split: Dataset,
    train: Dataset,
) -> dict[str, float]:
    """The metrics of the evaluation split, of the averaged weights where there are some."""
    reading = SplitReading(
        recipe.evaluation.batch or engine.plan.micro_batch,
        recipe.data.workers,
        recipe.data.prefetch,
        recipe.data.bad_sample_budget,
    )

    def replica() -> nn.Module:
        return build_task(recipe, train).model

    engine.model.eval()
    try:
        if ema is None or not recipe.evaluation.ema:
            return evaluate_split(
                engine.model, task, split, reading, engine.world, engine.to_device
            )
        with averaged(engine, ema, replica) as model:
            return evaluate_split(model, task, split, reading, engine.world, engine.to_device)
    finally:
        engine.settle()
        engine.model.train()


def _seed_rank(seed: int, world: World) -> None:
    """Each rank draws numbers of its own: for stochastic depth, and for mixing."""
    own = seed * 65_537 + world.rank + 1
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own % 2**32)
