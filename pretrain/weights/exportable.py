"""What an export needs to know of a model, wherever it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from groundwork.data.text import ClipTokenizer
from groundwork.data.transforms import ImageTransform
from groundwork.pretrain.models.internimage import InternImageConfig
from groundwork.pretrain.models.klite import KliteConfig
from groundwork.pretrain.weights.export_error import ExportError


@dataclass(frozen=True)
class Exportable:
    """A model in evaluation mode, in float32.

    image: how a picture becomes its input, of which the evaluation's part counts. origin: a
    sentence for the model card: by what, on what, for how long it was trained. recipe: resolved,
    as JSON values. labels: the names of the classes, where they are known. licence: of the weights.
    """

    model: nn.Module
    config: KliteConfig | InternImageConfig
    image: ImageTransform
    origin: str
    recipe: Mapping[str, Any] | None = None
    tokenizer: ClipTokenizer | None = None
    labels: tuple[str, ...] = ()
    licence: str | None = None

    def __post_init__(self) -> None:
        classes = getattr(self.config, "num_classes", 0)
        if self.labels and len(self.labels) != classes:
            raise ExportError(
                f"{len(self.labels)} labels are given, the model has {classes} classes; give one "
                "name per class, in their order"
            )


@dataclass(frozen=True)
class ExportOptions:
    """What formats may add. pth: `official` also writes a .pth file. features: `onnx` also gives
    the four maps. opset: of `onnx`."""

    pth: bool = False
    features: bool = False
    opset: int = 18

    def __post_init__(self) -> None:
        if not 16 <= self.opset <= 23:
            raise ExportError(
                f"--opset {self.opset}: choose 16 to 23; sampling begins with 16, and layer norms "
                "are one node from 17 on"
            )


def relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value where that is above 1."""
    got, expected = got.detach().double(), expected.detach().double()
    if got.shape != expected.shape or not torch.isfinite(got).all():
        return float("inf")
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    return float((got - expected).abs().max()) / scale if expected.numel() else 0.0
