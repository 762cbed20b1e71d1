"""The InternImage that is looked at: of a run, of a file of official weights, or untrained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from groundwork.pretrain.downstream.finetuning.checkpoint import is_finetuned, read_finetune_state
from groundwork.pretrain.downstream.finetuning.initial_weights import read_backbone_weights
from groundwork.pretrain.downstream.finetuning.recipe import finetune_recipe_from_dict
from groundwork.pretrain.engine.checkpoint import (
    CheckpointError,
    find_checkpoint,
    read_state,
)
from groundwork.pretrain.models.internimage import InternImage
from groundwork.pretrain.models.internimage_config import VARIANTS, InternImageConfig
from groundwork.pretrain.models.internimage_weights import OfficialWeightsError, official_names
from groundwork.pretrain.recipe import recipe_from_dict


def find_backbone(
    checkpoint: Path | None, variant: str | None = None, *, ema: bool = True
) -> tuple[InternImage, str]:
    """The stages of a model without its head, in evaluation mode, and a line that says what it is.

    checkpoint: a run's folder or one of its checkpoints, or a file of official weights; None for
    the initial weights of `variant`. variant: of a file; found by its shapes unless given. ema: the
    averaged weights, where a run has some. Raises CheckpointError.
    """
    if checkpoint is None:
        if variant is None:
            raise CheckpointError("neither a checkpoint nor a variant is given; give one of them")
        torch.manual_seed(0)
        return _build(_of_variant(variant)), f"untrained InternImage-{variant.upper()}"
    values, source, averaged = read_backbone_weights(checkpoint, ema=ema)
    run = find_checkpoint(checkpoint)
    if variant is not None:
        config = _of_variant(variant)
    elif run is not None:
        config = _of_run(run)
    else:
        config = _of_variant(_matching_variant(values, source))
    model = _build(config)
    try:
        model.load_official(values, head="skip")
    except OfficialWeightsError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return model, f"{source}{' (averaged)' if averaged else ''}"


def _build(config: InternImageConfig) -> InternImage:
    """The form of detectors: no head. A layer scale that weights lack is 1."""
    return InternImage(config.detection()).eval()


def _of_variant(name: str) -> InternImageConfig:
    try:
        return InternImageConfig.variant(name)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _of_run(checkpoint: Path) -> InternImageConfig:
    """What the recipe of a run says of its image model."""
    config: object
    if is_finetuned(checkpoint):
        state = read_finetune_state(checkpoint)
        config = finetune_recipe_from_dict(state.recipe, str(checkpoint)).backbone
    else:
        config = recipe_from_dict(read_state(checkpoint).recipe, str(checkpoint)).model
        config = getattr(config, "image", config)
    if not isinstance(config, InternImageConfig):
        raise CheckpointError(
            f"{checkpoint}: its image model is a {type(config).__name__.removesuffix('Config')}, "
            "which has no sampling points; give a run that trained an InternImage"
        )
    return config


def _matching_variant(values: Mapping[str, Any], source: str) -> str:
    """The published size whose stages have the shapes of these weights."""
    try:
        state, _ = official_names(values)
    except OfficialWeightsError as error:
        raise CheckpointError(f"{source}: {error}") from error
    given = _shapes(state)
    for name, config in VARIANTS.items():
        with torch.device("meta"):
            model = InternImage(config.detection())
        if _shapes(model.state_dict()) == given:
            return name
    raise CheckpointError(
        f"{source}: its weights have the shapes of no published size ({', '.join(VARIANTS)}); give "
        "the run that trained them"
    )


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of stem and stages; layer scales may be missing, so they tell nothing."""
    return {
        name: tuple(value.shape)
        for name, value in state.items()
        if name.startswith(("patch_embed.", "levels.")) and not name.endswith(("gamma1", "gamma2"))
    }
