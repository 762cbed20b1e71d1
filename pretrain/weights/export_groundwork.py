"""`--format groundwork`: our own names and configuration, for every model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groundwork.pretrain.engine.checkpoint import CheckpointError
from groundwork.pretrain.kinds import MODELS
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.klite import KliteConfig
from groundwork.pretrain.recipe import recipe_from_dict
from groundwork.pretrain.recipe_file import recipe_from_values, recipe_to_dict
from groundwork.pretrain.weights.exportable import Exportable, ExportOptions

WEIGHTS, CONFIG = "model.safetensors", "config.json"

#: kind of model -> its config.
CONFIGS: Final[Mapping[str, type]] = {"klite": KliteConfig, "internimage": InternImageConfig}


def write_groundwork(subject: Exportable, folder: Path, _: ExportOptions) -> None:
    save_weights(subject.model.state_dict(), folder / WEIGHTS)
    config = {"format": "groundwork", "model": recipe_to_dict(subject.config)}
    if subject.recipe is not None:
        config["recipe"] = subject.recipe
    if subject.labels:
        config["labels"] = list(subject.labels)
    (folder / CONFIG).write_text(json.dumps(config, indent=1), "utf-8")


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """As a safetensors file; "format" is the key that transformers asks for."""
    weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(weights, path, metadata={"format": "pt"})


def load_groundwork(folder: Path) -> nn.Module:
    """Load what `--format groundwork` wrote, in evaluation mode. Raises CheckpointError."""
    place = folder / CONFIG
    try:
        config = json.loads(place.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{place}: cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("format") != "groundwork":
        raise CheckpointError(
            f"{place}: no export of --format groundwork; give the folder that the export wrote"
        )
    if "model" in config:
        kind = config["model"].get("kind")
        if kind not in CONFIGS:
            raise CheckpointError(
                f"{place}: model.kind is {kind!r}; this version knows {', '.join(CONFIGS)}"
            )
        model = MODELS[kind](recipe_from_values(CONFIGS[kind], config["model"], str(place)))
    else:  # as the first version wrote them
        recipe = recipe_from_dict(config["recipe"], str(place))
        model = MODELS[recipe.model.kind](recipe.model)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be loaded: {error}") from error
    return model.eval()


@torch.no_grad()
def image_model_outputs(model: nn.Module, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything an InternImage gives for each batch of images of a probe, by `name.output`."""
    assert isinstance(model, InternImage)
    results: dict[str, Tensor] = {}
    for name, images in probe.items():
        results |= {f"{name}.map{i}": m for i, m in enumerate(model.features(images))}
        results[f"{name}.pooled"] = model.forward_features(images)
        if model.config.num_classes > 0:
            results[f"{name}.logits"] = model(images)
    return results
