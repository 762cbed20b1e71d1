"""Recipes of pretraining: one YAML file names one experiment and becomes one frozen dataclass.

How the file is read is in `recipe_file.py`. A resolved recipe is saved beside the checkpoints, and
a resumed run must agree with it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Tag

from groundwork.pretrain.engine.checkpoint import CheckpointConfig
from groundwork.pretrain.engine.ema import EmaConfig
from groundwork.pretrain.engine.monitor import MonitorConfig
from groundwork.pretrain.engine.optimizer import OptimizerConfig
from groundwork.pretrain.engine.schedule import ScheduleConfig
from groundwork.pretrain.image_text import ImageTextConfig
from groundwork.pretrain.labelled_images import LabelledImagesConfig
from groundwork.pretrain.models.internimage import InternImageConfig
from groundwork.pretrain.models.klite import KliteConfig
from groundwork.pretrain.models.swin import SwinConfig
from groundwork.pretrain.objectives.classification import ClassificationConfig
from groundwork.pretrain.objectives.m3i import M3iConfig
from groundwork.pretrain.objectives.unicl import UniclConfig
from groundwork.pretrain.recipe_file import (
    available_recipes,
    by_kind,
    differing_keys,
    read_recipe,
    recipe_from_values,
    recipe_to_dict,
)
from groundwork.pretrain.recipe_yaml import RecipeError

__all__ = ["RECIPES", "Recipe", "RecipeError", "TrainConfig", "load_recipe", "recipe_to_dict"]

RECIPES = Path(__file__).parent / "recipes"
#: Of steps and of samples in one: their product, the position in the stream, stays below 2**63.
MAX_COUNT = 2**31 - 1


@dataclass(frozen=True)
class TrainConfig:
    """The run itself.

    steps: optimiser steps. global_batch: samples per step over all ranks; micro_batch: samples per
    rank and forward pass, so that accumulation is global_batch / (micro_batch x ranks).
    micro_batch null: global_batch / ranks, no accumulation.
    partitioned_init: with zero_stage 3, build the model in parts, so that no rank ever holds all
    its weights; the masters of bf16 then start from values rounded to bf16. null: for models of
    more than 500 million parameters.
    float32_matmul: how products of float32 matrices may be computed, as torch's
    `set_float32_matmul_precision` has it: `high` is TF32 on a GPU, `medium` bf16 on a CPU that has
    instructions for it.
    """

    steps: int
    global_batch: int
    micro_batch: int | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    gradient_clipping: float = 0.0
    zero_stage: Literal[0, 1, 2, 3] = 3
    partitioned_init: bool | None = None
    float32_matmul: Literal["highest", "high", "medium"] = "highest"

    def __post_init__(self) -> None:
        if self.partitioned_init and self.zero_stage != 3:
            raise ValueError(
                f"train.partitioned_init is true and train.zero_stage {self.zero_stage}; only "
                "stage 3 partitions the weights, so set it to 3 or leave the other out"
            )
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


#: `kind` picks the class; each family has one that is meant where a recipe does not say.
ModelSection = Annotated[
    Annotated[KliteConfig, Tag("klite")] | Annotated[InternImageConfig, Tag("internimage")],
    Discriminator(by_kind("klite")),
]
ObjectiveSection = Annotated[
    Annotated[UniclConfig, Tag("unicl")]
    | Annotated[M3iConfig, Tag("m3i")]
    | Annotated[ClassificationConfig, Tag("classification")],
    Discriminator(by_kind("unicl")),
]
DataSection = Annotated[
    Annotated[ImageTextConfig, Tag("image_text")]
    | Annotated[LabelledImagesConfig, Tag("labelled_images")],
    Discriminator(by_kind("image_text")),
]
#: Objective -> the kinds of model and of data that it takes.
TAKES: Mapping[str, tuple[str, str]] = {
    "unicl": ("klite", "image_text"),
    "m3i": ("klite", "image_text"),
    "classification": ("internimage", "labelled_images"),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run. `deepspeed` is merged verbatim into the generated config.

    ema: an average of the weights is kept, which evaluation and export then take.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # holds for the sections, too

    model: ModelSection
    objective: ObjectiveSection
    data: DataSection
    train: TrainConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model, data = TAKES[self.objective.kind]
        for section, given, needed in (("model", self.model, model), ("data", self.data, data)):
            if given.kind != needed:
                raise ValueError(
                    f"{section}.kind is {given.kind!r}; objective.kind {self.objective.kind!r} "
                    f"takes {needed!r}"
                )
        if isinstance(self.model, KliteConfig):
            tower, size = self.model.image, self.data.image.size
            if isinstance(tower, SwinConfig) and tower.image_size != size:
                raise ValueError(
                    f"data.image.size is {size}, but model.image.image_size is "
                    f"{tower.image_size}; give both the same number"
                )
            if isinstance(self.objective, M3iConfig):
                batch = self.train.micro_batch or self.train.global_batch
                self.objective.check(tower, size, batch)
        elif self.model.num_classes < 1:
            raise ValueError(
                f"model.num_classes is {self.model.num_classes}; objective.kind "
                f"{self.objective.kind!r} needs at least 1"
            )


#: Parts of a recipe that may differ when a run is resumed: they do not decide what is computed.
FREE_ON_RESUME = (
    *("checkpoint", "monitor"),
    *("data.workers", "data.prefetch", "data.cache", "data.jpeg_decoder"),
)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by name (a file of `pretrain/recipes/`) or by path, and apply overrides.

    overrides: `key.path=value`, the value in YAML. Raises RecipeError.
    """
    return read_recipe(Recipe, name, overrides, RECIPES)


def recipe_from_dict(values: Mapping[str, Any], source: str) -> Recipe:
    """Validate a recipe that was saved with `recipe_to_dict`. source: named in errors."""
    return recipe_from_values(Recipe, values, source)


def differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Keys, with both values, in which two resolved recipes differ and a resume may not."""
    return differing_keys(saved, present, FREE_ON_RESUME)


def available() -> list[str]:
    """Names of the recipes that come with groundwork."""
    return available_recipes(RECIPES)
