"""What a model says about the pictures of a split: accuracy, or features with their labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groundwork.data.dataset import Dataset
from groundwork.data.samples import Sample
from groundwork.data.transforms import ImageTransform, evaluation_image
from groundwork.pretrain.downstream.classification import TopK
from groundwork.pretrain.downstream.evaluation.image_models import ImageModel, normalised
from groundwork.pretrain.downstream.finetuning.evaluation import SplitReading, evaluate_split
from groundwork.pretrain.engine.checkpoint import CheckpointError
from groundwork.pretrain.engine.deepspeed_config import World
from groundwork.pretrain.labelled_images import LabelledImage, collate_labelled, label_below


@dataclass(frozen=True)
class LabelledFeatures:
    """features: (N, D) float32 on the host. labels: (N,) int64."""

    features: Tensor
    labels: Tensor


class _Collect:
    """Keeps what the model says, in the order of the split."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, predictions: Any, batch: dict[str, Any]) -> None:
        self.features.append(predictions.float().cpu())
        self.labels.append(batch["labels"].cpu())

    def records(self) -> list[Any]:
        return []

    def result(self, records: Sequence[Any]) -> dict[str, float]:
        return {}


class _Pictures:
    """The task of looking at labelled pictures as they are evaluated."""

    def __init__(self, image: ImageTransform, num_classes: int, evaluator: Any) -> None:
        self.image, self.num_classes, self._evaluator = image, num_classes, evaluator
        self.model: nn.Module = nn.Identity()

    def example(self, sample: Sample, rng: np.random.Generator | None) -> LabelledImage:
        label = label_below(sample, self.num_classes)
        return LabelledImage(evaluation_image(sample.image, self.image), label)

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        return collate_labelled(examples)

    def evaluator(self) -> Any:
        return self._evaluator

    def no_weight_decay(self) -> frozenset[str]:
        return frozenset()


def evaluation_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def classify_split(
    model: ImageModel, dataset: Dataset, image: ImageTransform, reading: SplitReading
) -> dict[str, float]:
    """top1 and top5 in percent over a split, and `samples` and `bad_samples`."""
    if model.logits is None:
        raise CheckpointError(
            f"{model.source}: has no classifier; evaluate its features with `linear-probe` or `knn`"
        )
    evaluator = TopK()
    return _go_through(model, model.logits, model.num_classes, evaluator, dataset, image, reading)


def split_features(
    model: ImageModel, dataset: Dataset, image: ImageTransform, reading: SplitReading
) -> LabelledFeatures:
    """Frozen pooled features of every picture of a split, with its class."""
    collected = _Collect()
    _go_through(model, model.features, 2**62, collected, dataset, image, reading)
    return LabelledFeatures(torch.cat(collected.features), torch.cat(collected.labels))


def _go_through(
    model: ImageModel,
    function: Callable[[Tensor], Tensor],
    num_classes: int,
    evaluator: Any,
    dataset: Dataset,
    image: ImageTransform,
    reading: SplitReading,
) -> dict[str, float]:
    device = evaluation_device()
    model.module.to(device)
    return evaluate_split(
        lambda batch: function(normalised(batch["image"])),
        _Pictures(image, num_classes, evaluator),
        dataset,
        reading,
        World(0, 1, 0, device),
        lambda batch: {key: value.to(device) for key, value in batch.items()},
    )
