"""Image classification as a downstream task: the backbone's own head, cross entropy, top-1, top-5.

Evaluation is that of the official code: shorter side to the crop size itself (ratio 1.0), bicubic,
centre crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from groundwork.data.dataset import Dataset
from groundwork.data.samples import Sample
from groundwork.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageTransform,
    evaluation_image,
)
from groundwork.kernels.jpeg_crop import find_jpeg_crop
from groundwork.pretrain.downstream.backbone import BackboneConfig, build_backbone
from groundwork.pretrain.labelled_images import (
    LabelledImage,
    LabelledImageDecoder,
    collate_labelled,
    label_below,
    make_rand_augment,
)
from groundwork.pretrain.objectives.classification import Classification, ClassificationConfig


@dataclass(frozen=True)
class ClassificationTask:
    """The task `classification`.

    num_classes: null takes as many as the data set names (concepts.json). It decides the width of
        the backbone's head.
    image: the crop, in training and evaluation. rand_augment: timm's description, such as
        rand-m9-mstd0.5-inc1, or null.
    objective: label smoothing, mixup, cutmix, random erasing; off by default, as in the official
        fine-tuning.
    """

    kind: Literal["classification"] = "classification"
    num_classes: int | None = None
    image: ImageTransform = field(default_factory=ImageTransform)
    rand_augment: str | None = None
    objective: ClassificationConfig = field(default_factory=ClassificationConfig)

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(
                f"task.num_classes is {self.num_classes}; it must be at least 1, or null for as "
                "many as the data set names"
            )
        try:
            make_rand_augment(self.rand_augment, self.image)
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                f"task.rand_augment is {self.rand_augment!r}, which timm does not understand "
                f"({error or 'see its rand_augment_transform'}); give one such as "
                "rand-m9-mstd0.5-inc1, or null"
            ) from error


class Classifier(nn.Module):
    """backbone: (B, 3, H, W) -> logits (B, num_classes).

    forward({"image": (B, 3, H, W) uint8, "labels": (B,)}): in training {"loss", "top1"}, in
    evaluation the logits, float32.
    """

    def __init__(self, backbone: nn.Module, config: ClassificationConfig, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.objective = Classification(
            nn.Identity(), config, num_classes, mean=IMAGENET_MEAN, std=IMAGENET_STD
        )

    def forward(self, batch: dict[str, Tensor]) -> Any:
        if not self.training:
            image = self.objective.normalise(batch["image"], torch.float32)
            return self.backbone(image).float()
        image, targets = self.objective.inputs(batch)
        return self.objective.losses(self.backbone(image), targets, batch["labels"])


class TopK:
    """Top-1 and top-5 in percent, from the rank of the true class among the logits."""

    def __init__(self) -> None:
        self._ranks: list[int] = []

    def add(self, predictions: Any, batch: dict[str, Any]) -> None:
        """predictions: logits (B, K). A class that scores the same as the true one counts
        against it."""
        logits, labels = predictions, batch["labels"]
        own = logits.gather(1, labels[:, None])
        # NaN compares as false: a model that has diverged must not be right
        above = (~(logits < own)).sum(1) - 1
        self._ranks += above.tolist()

    def records(self) -> list[Any]:
        return list(self._ranks)

    def names(self) -> list[str]:
        return ["top1", "top5"]

    def result(self, records: Sequence[Any]) -> dict[str, float]:
        ranks = np.asarray(records, np.int64)
        return {
            "top1": 100 * float((ranks < 1).mean()),
            "top5": 100 * float((ranks < 5).mean()),
        }


class Classify:
    """The task, see `task.Task`."""

    def __init__(self, config: ClassificationTask, backbone: nn.Module, num_classes: int) -> None:
        self.image = config.image
        self.num_classes = num_classes
        self.model: nn.Module = Classifier(backbone, config.objective, num_classes)
        self._decoder = LabelledImageDecoder(
            config.image, num_classes, config.rand_augment, find_jpeg_crop()
        )

    def example(self, sample: Sample, rng: np.random.Generator | None) -> LabelledImage:
        if rng is not None:
            return self._decoder(sample, rng)
        label = label_below(sample, self.num_classes)
        return LabelledImage(evaluation_image(sample.image, self.image), label)

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        return collate_labelled(examples)

    def evaluator(self) -> TopK:
        return TopK()

    def no_weight_decay(self) -> frozenset[str]:
        return frozenset()


def build_classification(
    config: ClassificationTask, backbone: BackboneConfig, dataset: Dataset
) -> Classify:
    """The task on a fresh backbone. Raises ValueError where the number of classes is unknown."""
    num_classes = config.num_classes
    if num_classes is None:
        if not dataset.concepts:
            raise ValueError(
                "task.num_classes is null, and the data set names no classes (no concepts.json); "
                "give the number of classes"
            )
        num_classes = 1 + max(concept.label for concept in dataset.concepts)
    model = build_backbone(replace(backbone, num_classes=num_classes))
    return Classify(config, model, num_classes)
