"""Recipes of fine-tuning: a task on a backbone, with the weights it starts from.

A task registers itself with one member of `TaskConfig` here and one line of `TASKS` in
`finetune.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Discriminator, Tag

from groundwork.pretrain.downstream.backbone import BackboneConfig
from groundwork.pretrain.downstream.classification import ClassificationTask
from groundwork.pretrain.downstream.detection.dino import DinoDetectionTask
from groundwork.pretrain.downstream.detection.instance_segmentation import InstanceSegmentationTask
from groundwork.pretrain.downstream.segmentation.semantic_segmentation import (
    SemanticSegmentationTask,
)
from groundwork.pretrain.engine.checkpoint import CheckpointConfig
from groundwork.pretrain.engine.ema import EmaConfig
from groundwork.pretrain.engine.monitor import MonitorConfig
from groundwork.pretrain.engine.optimizer import OptimizerConfig
from groundwork.pretrain.engine.schedule import ScheduleConfig
from groundwork.pretrain.models.internimage import InternImageConfig
from groundwork.pretrain.models.internimage_weights import HeadRule
from groundwork.pretrain.recipe_file import (
    available_recipes,
    by_kind,
    differing_keys,
    read_recipe,
    recipe_from_values,
    recipe_to_dict,
)
from groundwork.pretrain.recipe_yaml import RecipeError
from groundwork.pretrain.training_data import CacheSettings, check_block

__all__ = ["FINETUNE_RECIPES", "FinetuneRecipe", "RecipeError", "load_finetune_recipe"]

FINETUNE_RECIPES: Final = Path(__file__).parents[2] / "recipes" / "finetune"
#: Of steps and of samples in one: their product, the position in the stream, stays below 2**63.
MAX_COUNT: Final = 2**31 - 1

#: `kind` picks the class.
TaskConfig = Annotated[
    Annotated[ClassificationTask, Tag("classification")]
    | Annotated[DinoDetectionTask, Tag("dino_detection")]
    | Annotated[InstanceSegmentationTask, Tag("instance_segmentation")]
    | Annotated[SemanticSegmentationTask, Tag("semantic_segmentation")],
    Discriminator(by_kind("classification")),
]


@dataclass(frozen=True)
class WeightsConfig:
    """What the backbone starts from.

    path: the folder of a pretraining or fine-tuning run, or one of its checkpoints; an official
        checkpoint (.pth, .safetensors); or a folder written by `groundwork export`.
    ema: take the averaged weights, where there are some.
    head: what becomes of a head that does not fit, see `HeadRule`: `same` refuses it, `skip` starts
        it afresh, `zeros` and `scaled` so too, with small weights, as in the official fine-tuning.
        null: `same` where the backbone classifies, `skip` where it does not.
    class_indices: a text file of one integer per class, its row in the checkpoint's head, as when a
        head of 21,841 classes is to serve ImageNet-1K.
    """

    path: str
    ema: bool = True
    head: HeadRule | None = None
    class_indices: str | None = None


@dataclass(frozen=True)
class FinetuneData:
    """The `data` section: what is trained on and what is evaluated on. Images are the task's.

    shards: a data set folder or URL, or a folder, pattern or URL of WebDataset tars.
    evaluation_shards: null for the same. evaluation_split: null for none, no evaluation.
    shuffle_block, cache, bad_sample_budget, workers, prefetch: as in pretraining; a bad sample of
    the evaluation split is left out, counted, and bounded by the same budget.
    """

    shards: str
    split: str = "train"
    evaluation_shards: str | None = None
    evaluation_split: str | None = None
    shuffle: bool = True
    shuffle_block: int | None = None
    cache: CacheSettings | None = None
    bad_sample_budget: float = 0.001
    workers: int = 2
    prefetch: int = 4

    def __post_init__(self) -> None:
        check_block("data.shuffle_block", self.shuffle_block)
        if not 0 <= self.bad_sample_budget <= 1:
            raise ValueError(
                f"data.bad_sample_budget is {self.bad_sample_budget}; it is a fraction, 0 to 1"
            )
        if self.workers < 0:
            raise ValueError(
                f"data.workers is {self.workers}; it must be 0 (decode in the rank itself) or more"
            )
        if self.prefetch < (1 if self.workers else 0):
            raise ValueError(
                f"data.prefetch is {self.prefetch}; with {self.workers} workers it must be at "
                "least 1"
            )
        if self.evaluation_shards is not None and self.evaluation_split is None:
            raise ValueError(
                "data.evaluation_shards is given without data.evaluation_split; name the split"
            )


@dataclass(frozen=True)
class FinetuneTrain:
    """The run itself.

    steps: optimiser steps. global_batch: samples per step over all ranks; micro_batch: samples per
    rank and forward pass (null: global_batch / ranks, no accumulation).
    precision: bf16 runs the forward pass under autocast; the weights that are updated are float32.
    gradient_clipping: largest norm of the gradient, 0 for none.
    find_unused_parameters: for DDP, where some parameters get no gradient in some steps.
    sync_batch_norm: statistics over the batches of all ranks.
    """

    steps: int
    global_batch: int
    micro_batch: int | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    gradient_clipping: float = 0.0
    find_unused_parameters: bool = False
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_COUNT:
                raise ValueError(
                    f"train.{name} is {value}; it must be at least 1 and at most {MAX_COUNT}"
                )
        if not 0 <= self.seed <= MAX_COUNT:
            raise ValueError(f"train.seed is {self.seed}; it must be 0 to {MAX_COUNT}")
        if not 0 <= self.gradient_clipping < math.inf:
            raise ValueError(
                f"train.gradient_clipping is {self.gradient_clipping}; it is the largest norm of "
                "the gradient, or 0 for none"
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """When and how the evaluation split is gone through during training.

    every_steps: null evaluates after the last step only. batch: samples per rank and forward pass
    (null: the training micro-batch). metric: of the task, by which the best checkpoint is chosen
    (null: the task's first). ema: evaluate the averaged weights, where there are some.
    """

    every_steps: int | None = None
    batch: int | None = None
    metric: str | None = None
    larger_is_better: bool = True
    ema: bool = True

    def __post_init__(self) -> None:
        for name in ("every_steps", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluation.{name} is {value}; it must be at least 1, or null")


@dataclass(frozen=True)
class FinetuneRecipe:
    """Everything that decides a fine-tuning run, but for how Accelerate spreads it over devices."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # holds for the sections, too

    task: TaskConfig
    data: FinetuneData
    train: FinetuneTrain
    backbone: BackboneConfig = field(default_factory=InternImageConfig)
    weights: WeightsConfig | None = None
    ema: EmaConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


#: Parts of a recipe that may differ when a run is resumed: they do not decide what is computed.
FREE_ON_RESUME: Final = (
    *("checkpoint", "monitor", "evaluation", "weights.path"),
    *("data.workers", "data.prefetch", "data.cache"),
)


def load_finetune_recipe(name: str, overrides: Sequence[str] = ()) -> FinetuneRecipe:
    """Load a recipe by name (a file of `pretrain/recipes/finetune/`) or by path.

    overrides: `key.path=value`, the value in YAML. Raises RecipeError.
    """
    return read_recipe(FinetuneRecipe, name, overrides, FINETUNE_RECIPES)


def finetune_recipe_from_dict(values: Mapping[str, Any], source: str) -> FinetuneRecipe:
    """Validate a recipe that was saved with `finetune_recipe_to_dict`. source: named in errors."""
    return recipe_from_values(FinetuneRecipe, values, source)


def finetune_recipe_to_dict(recipe: FinetuneRecipe) -> dict[str, Any]:
    """The resolved recipe as plain JSON values, defaults included."""
    return recipe_to_dict(recipe)


def finetune_differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Keys, with both values, in which two resolved recipes differ and a resume may not."""
    return differing_keys(saved, present, FREE_ON_RESUME)


def available_finetune_recipes() -> list[str]:
    """Names of the fine-tuning recipes that come with groundwork."""
    return available_recipes(FINETUNE_RECIPES)
