"""Trained models as functions of pictures, for evaluation: logits, or frozen pooled features."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from groundwork.data.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from groundwork.pretrain.downstream.finetuning.checkpoint import is_finetuned, read_finetune_state
from groundwork.pretrain.downstream.finetuning.initial_weights import (
    load_initial_weights,
    read_backbone_weights,
)
from groundwork.pretrain.downstream.finetuning.recipe import (
    WeightsConfig,
    finetune_recipe_from_dict,
)
from groundwork.pretrain.engine.checkpoint import (
    RECIPE,
    CheckpointError,
    find_checkpoint,
    read_state,
    require_checkpoint,
    verify_files,
)
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.internimage_weights import (
    HeadRule,
    OfficialWeightsError,
    official_names,
)
from groundwork.pretrain.models.klite import KliteConfig
from groundwork.pretrain.objectives.pixels import normalise
from groundwork.pretrain.recipe import recipe_from_dict
from groundwork.pretrain.weights.internimage import read_class_indices
from groundwork.pretrain.weights.trained import load_trained
from groundwork.pretrain.weights.zero_shards import has_ema

#: Picture size of the published checkpoints, where their file does not say.
DEFAULT_SIZE: Final = 224


@dataclass(frozen=True)
class ImageModel:
    """logits: (B, 3, S, S) normalised pixels -> (B, K), None without a classifier. features: the
    same -> (B, D) pooled. image: how pictures were prepared in training. source: where the weights
    were read. shards: the data set of the run, where the model is of one.
    """

    module: nn.Module
    logits: Callable[[Tensor], Tensor] | None
    features: Callable[[Tensor], Tensor]
    num_classes: int
    image: ImageTransform
    source: str
    shards: str | None


def load_image_model(
    path: Path,
    *,
    variant: str | None = None,
    class_indices: Path | None = None,
    ema: bool = True,
) -> ImageModel:
    """A model in evaluation mode, float32.

    path: a folder of a pretraining or fine-tuning run, or one of its checkpoints; an official
        checkpoint or an export, of which `variant` ("t", "s", ..., see InternImageConfig.variant)
        tells the architecture.
    class_indices: see `WeightsConfig`. ema: take averaged weights where there are some.
    Raises CheckpointError.
    """
    checkpoint = find_checkpoint(path)
    image, shards = ImageTransform(size=DEFAULT_SIZE), None
    if checkpoint is None:
        if (path / RECIPE).is_file():
            require_checkpoint(path)
        config = _official_config(path, variant)
    else:
        verify_files(checkpoint)
        if is_finetuned(checkpoint):
            state = read_finetune_state(checkpoint)
            recipe = finetune_recipe_from_dict(state.recipe, str(checkpoint))
            config, shards = recipe.backbone, recipe.data.shards
            if recipe.task.kind == "classification":
                config = replace(config, num_classes=state.classes or 0)
                image = recipe.task.image
        else:
            pretrained = recipe_from_dict(read_state(checkpoint).recipe, str(checkpoint))
            image, shards = pretrained.data.image, pretrained.data.shards
            if isinstance(pretrained.model, KliteConfig):
                return _tower(checkpoint, image, shards, ema=ema)
            config = pretrained.model
    if class_indices is not None:
        config = replace(config, num_classes=len(read_class_indices(class_indices)))
    # neither changes the result of evaluation
    model = InternImage(replace(config, drop_path=0.0, activation_checkpointing=False))
    head: HeadRule | None = None if config.num_classes else "skip"
    indices = None if class_indices is None else str(class_indices)
    report = load_initial_weights(model, WeightsConfig(str(path), ema, head, indices))
    model.eval()
    logits = model if config.num_classes else None
    return ImageModel(
        model, logits, model.forward_features, config.num_classes, image, report.source, shards
    )


def _tower(checkpoint: Path, image: ImageTransform, shards: str | None, *, ema: bool) -> ImageModel:
    """The image tower of a two-tower model: what it pools, before the projection."""
    model: Any = load_trained(checkpoint, ema=ema and has_ema(checkpoint)).model
    tower = model.visual.eval()
    features = getattr(tower, "forward_features", tower)
    return ImageModel(tower, None, features, 0, image, str(checkpoint), shards)


def _official_config(path: Path, variant: str | None) -> InternImageConfig:
    """The architecture that was named, with as many classes as the file has."""
    if variant is None:
        raise CheckpointError(
            f"{path} does not say which architecture it is of; name it with --variant (t, s, b, l, "
            "xl, h, g, or flash_t and so on)"
        )
    try:
        config = InternImageConfig.variant(variant)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"--variant {variant}: {error}") from error
    values, source, _ = read_backbone_weights(path, ema=False)
    try:
        names, _ = official_names(values)
    except OfficialWeightsError as error:
        raise CheckpointError(f"{source}: {error}") from error
    classes = len(names["head.weight"]) if "head.weight" in names else 0
    return replace(config, num_classes=classes)


def require_shards(model: ImageModel, given: str | None) -> str:
    """The data set to evaluate on: the one that was named, or the one of the run."""
    shards = given or model.shards
    if shards is None:
        raise CheckpointError(
            f"{model.source} does not say which data set it is to be evaluated on; name one with "
            "--shards"
        )
    return shards


def normalised(image: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> what the models take."""
    return normalise(image, IMAGENET_MEAN, IMAGENET_STD, torch.float32)
