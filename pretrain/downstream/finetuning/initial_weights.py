"""What a backbone starts from: a run of ours, an official checkpoint, or an export."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from groundwork.pretrain.downstream.finetuning.checkpoint import finetuned_weights, is_finetuned
from groundwork.pretrain.downstream.finetuning.recipe import WeightsConfig
from groundwork.pretrain.engine.checkpoint import (
    CheckpointError,
    find_checkpoint,
    verify_files,
)
from groundwork.pretrain.models.internimage_weights import (
    LoadReport,
    OfficialWeightsError,
    listed,
)
from groundwork.pretrain.weights.internimage import read_class_indices
from groundwork.pretrain.weights.official import read_file
from groundwork.pretrain.weights.zero_shards import full_buffers, full_weights, has_ema

#: A parameter that every InternImage has; what comes before it is what a wrapper has added.
MARK = "patch_embed.conv1.weight"


@dataclass(frozen=True)
class WeightsReport:
    """What was read from where, and what of it was used.

    source: the file or checkpoint; averaged: whether it is of averaged weights.
    copied, of: tensors of the backbone that were given, and all of them.
    """

    source: str
    averaged: bool
    copied: int
    of: int
    report: LoadReport

    def summary(self) -> str:
        """A line or two for the terminal."""
        lines = [
            f"weights: {self.copied} of {self.of} tensors of the backbone from {self.source}"
            f"{' (averaged)' if self.averaged else ''}"
        ]
        for what, names in (
            ("not in it, fresh", self.report.initial),
            ("parts of a head, left out", self.report.skipped),
            ("no part of a backbone, left out", self.report.dropped),
        ):
            if names:
                lines.append(f"  {what}: {listed(names)}")
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def load_initial_weights(backbone: nn.Module, config: WeightsConfig) -> WeightsReport:
    """Copy weights into a backbone, strictly: what does not fit is an error, or in the report.

    Raises CheckpointError.
    """
    path = Path(config.path)
    values, source, averaged = read_backbone_weights(path, ema=config.ema)
    head = config.head
    if head is None:
        head = "same" if getattr(getattr(backbone, "config", None), "num_classes", 0) else "skip"
    indices = (
        None if config.class_indices is None else read_class_indices(Path(config.class_indices))
    )
    try:
        report: LoadReport = backbone.load_official(values, head, indices)  # type: ignore[operator]
    except OfficialWeightsError as error:
        text = str(error)
        keys = [f"weights.{key}" for key in ("head", "class_indices") if key in text]
        hint = f". In a recipe: {', '.join(keys)}" if keys else ""
        raise CheckpointError(
            f"{source}: {text}{hint}; the section `backbone` is the model"
        ) from error
    own = len(backbone.state_dict())
    return WeightsReport(source, averaged, own - len(report.initial), own, report)


def read_backbone_weights(path: Path, *, ema: bool) -> tuple[Mapping[str, Any], str, bool]:
    """(state dict in one of the published forms, where it was read, whether it is averaged).

    path: a folder of a run or one of its checkpoints; a .pth or .safetensors file; or an export,
    a folder with model.safetensors. Raises CheckpointError.
    """
    checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        return _of_run(checkpoint, ema=ema)
    if path.is_file():
        return read_file(path), str(path), False
    if not path.is_dir():
        raise CheckpointError(
            f"{path} does not exist; give a run's folder, an official checkpoint (.pth, "
            ".safetensors) or an export folder"
        )
    exported = path / "model.safetensors"
    if exported.is_file():
        return read_file(exported), str(exported), False
    raise CheckpointError(
        f"{path}: neither a run of groundwork (no checkpoints/) nor an export (no "
        "model.safetensors) is in this folder"
    )


def _of_run(checkpoint: Path, *, ema: bool) -> tuple[dict[str, Tensor], str, bool]:
    verify_files(checkpoint)
    if is_finetuned(checkpoint):
        averaged = ema and (checkpoint / "ema.safetensors").is_file()
        values = finetuned_weights(checkpoint, ema=ema)
    else:
        averaged = ema and has_ema(checkpoint)
        values = full_weights(checkpoint, ema=averaged)
        values |= full_buffers(checkpoint)
        if averaged:
            values |= full_buffers(checkpoint, ema=True)
    prefix = _backbone_prefix(values, checkpoint)
    own = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
    return own, str(checkpoint), averaged


def _backbone_prefix(values: Mapping[str, Tensor], checkpoint: Path) -> str:
    """Of a run's parameter names: the student's where there is a momentum teacher, too."""
    found = [name.removesuffix(MARK) for name in values if name.endswith(MARK)]
    if not found:
        raise CheckpointError(
            f"{checkpoint}: no InternImage is in it (no parameter {MARK}); give a run that trained "
            "one"
        )
    preferred = [p for p in found if p in ("backbone.", "model.", "model.visual.", "")]
    if len(found) > 1 and len(preferred) != 1:
        raise CheckpointError(
            f"{checkpoint}: holds several InternImages ({', '.join(found)}); export the one that "
            "is meant, and name the export"
        )
    return preferred[0] if preferred else found[0]
