"""Evaluation of a downstream task: of a fine-tuned run, or of an official detector's file."""

from dataclasses import dataclass
from pathlib import Path

import torch

from groundwork.data.dataset import Dataset, open_dataset
from groundwork.pretrain.downstream.evaluation.frozen import evaluation_device
from groundwork.pretrain.downstream.finetuning.checkpoint import (
    finetuned_weights,
    is_finetuned,
    read_finetune_state,
)
from groundwork.pretrain.downstream.finetuning.engine import moved
from groundwork.pretrain.downstream.finetuning.evaluation import SplitReading, evaluate_split
from groundwork.pretrain.downstream.finetuning.recipe import (
    FinetuneRecipe,
    finetune_recipe_from_dict,
    load_finetune_recipe,
)
from groundwork.pretrain.downstream.finetuning.run import build_task
from groundwork.pretrain.downstream.task import Task
from groundwork.pretrain.engine.checkpoint import CheckpointError, require_checkpoint
from groundwork.pretrain.engine.deepspeed_config import World
from groundwork.pretrain.weights.mmdet_rcnn import rcnn_from_mmdet
from groundwork.pretrain.weights.official import read_file


@dataclass(frozen=True)
class TrainedTask:
    """A task with its weights, and the split it is to be measured on.

    source: what was read. bf16: compute under autocast, as the run itself did. budget: the share of
    bad samples that the run allowed.
    """

    task: Task
    dataset: Dataset
    source: str
    bf16: bool
    budget: float


def load_task(
    path: Path,
    *,
    recipe: str | None = None,
    shards: str | None = None,
    split: str | None = None,
    ema: bool = True,
) -> TrainedTask:
    """A fine-tuned run or checkpoint; with `recipe`, an official file of that recipe's detector.

    shards, split: what is evaluated; by default what the recipe evaluates.
    Raises CheckpointError, RecipeError.
    """
    if recipe is not None:
        known = load_finetune_recipe(recipe)
        dataset = _open(known, shards, split)
        task, source = build_task(known, dataset), str(path)
        values = read_file(path)
        state = values.get("state_dict", values) if isinstance(values, dict) else values
        try:
            task.model.load_state_dict(rcnn_from_mmdet(state))
        except (ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not of the detector of {recipe}: {error}") from error
        return TrainedTask(task, dataset, source, False, known.data.bad_sample_budget)
    checkpoint = require_checkpoint(path)
    if not is_finetuned(checkpoint):
        raise CheckpointError(
            f"{checkpoint} is of a pretraining, which has no task; evaluate it with `groundwork "
            "evaluate classification`, `knn`, `linear-probe` or `zeroshot`"
        )
    state = read_finetune_state(checkpoint)
    known = finetune_recipe_from_dict(state.recipe, str(checkpoint))
    dataset = _open(known, shards, split)
    task = build_task(known, dataset)
    weights = finetuned_weights(checkpoint, ema=ema)
    try:
        task.model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint}: its weights do not fit {dataset.where(0)[0]}, which may have other "
            f"classes than the run was trained on: {error}"
        ) from error
    bf16, budget = known.train.precision == "bf16", known.data.bad_sample_budget
    return TrainedTask(task, dataset, str(checkpoint), bf16, budget)


def evaluate_task(trained: TrainedTask, reading: SplitReading) -> dict[str, float]:
    """The task's metrics over the split, and `samples` and `bad_samples`. On one device."""
    device = evaluation_device()
    model = trained.task.model.to(device).eval()
    world = World(0, 1, 0, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=trained.bf16):
        return evaluate_split(
            model, trained.task, trained.dataset, reading, world, lambda batch: moved(batch, device)
        )


def _open(recipe: FinetuneRecipe, shards: str | None, split: str | None) -> Dataset:
    data = recipe.data
    where = shards or data.evaluation_shards or data.shards
    return open_dataset(where, split or data.evaluation_split or "val")
