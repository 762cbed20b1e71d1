"""Semantic segmentation as a downstream task: UperNet over a backbone's four maps, scored by mIoU.

The loss is the cross entropy of the labelled pixels at the size of the crop, plus 0.4 of that of an
auxiliary head. A picture is evaluated whole, and scored at its original size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundwork.data.dataset import Dataset
from groundwork.data.samples import Sample
from groundwork.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from groundwork.pretrain.downstream.backbone import BackboneConfig, build_backbone
from groundwork.pretrain.downstream.segmentation.data import (
    SegmentationExample,
    SegmentationTransform,
    segmentation_collate,
    segmentation_example,
)
from groundwork.pretrain.downstream.segmentation.maps import SegmentationLabels
from groundwork.pretrain.downstream.segmentation.mean_iou import MeanIou
from groundwork.pretrain.models.upernet import UperNet, UperNetConfig
from groundwork.pretrain.objectives.pixels import normalise


@dataclass(frozen=True)
class SemanticSegmentationTask:
    """The task `semantic_segmentation`: what the classes are, how pictures are cut, the head."""

    labels: SegmentationLabels
    kind: Literal["semantic_segmentation"] = "semantic_segmentation"
    transform: SegmentationTransform = field(default_factory=SegmentationTransform)
    head: UperNetConfig = field(default_factory=UperNetConfig)


class Segmenter(nn.Module):
    """A backbone with heads; its batch is that of `segmentation_collate`.

    forward: in training {"loss", "loss_main", "loss_auxiliary", "pixel_accuracy"}; in evaluation a
    class for each pixel of each picture at its original size, a list of (H, W) int64.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: UperNet,
        *,
        auxiliary_weight: float = 0.4,
        ignore_index: int = 255,
        test_flip: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.auxiliary_weight = auxiliary_weight
        self.ignore_index = ignore_index
        self.test_flip = test_flip

    def forward(self, batch: dict[str, Any]) -> Any:
        if self.training:
            return self._losses(torch.stack(batch["views"][0]), torch.stack(batch["labels"]).long())
        sizes = [tuple(labels.shape) for labels in batch["labels"]]
        if len(batch["views"]) == 1 and not self.test_flip:
            # the largest logit is the largest probability
            logits = self._logits_by_size(batch["views"][0])
            return [_resize(x, size).argmax(0) for x, size in zip(logits, sizes, strict=True)]
        return [p.argmax(0) for p in self._probabilities(batch["views"], sizes)]

    def _predict(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """pictures: (B, 3, H, W) uint8 -> what `UperNet` gives."""
        pixels = normalise(pictures, IMAGENET_MEAN, IMAGENET_STD, torch.float32)
        logits: tuple[Tensor, Tensor | None] = self.heads(self.backbone.features(pixels))  # type: ignore[operator]
        return logits

    def _losses(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """pictures: (B, 3, S, S) uint8; labels: (B, S, S) int64."""
        logits, auxiliary = self._predict(pictures)
        logits = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
        main = self._cross_entropy(logits, labels)
        losses = {"loss": main, "loss_main": main.detach()}
        if auxiliary is not None:
            auxiliary = F.interpolate(auxiliary.float(), labels.shape[1:], mode="bilinear")
            other = self._cross_entropy(auxiliary, labels)
            losses["loss"] = main + self.auxiliary_weight * other
            losses["loss_auxiliary"] = other.detach()
        with torch.no_grad():
            counted = labels != self.ignore_index
            hits = (logits.argmax(1) == labels) & counted
            losses["pixel_accuracy"] = hits.sum() / counted.sum().clamp_min(1)
        return losses

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the labelled pixels; 0, not NaN, where a batch has none."""
        total = F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")
        return total / (labels != self.ignore_index).sum().clamp_min(1)

    def _logits_by_size(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Each (3, h, w) uint8 -> (classes, h/4, w/4) float32; those of one size in one batch.

        They are not filled up to a common size, which would change what is pooled.
        """
        logits: list[Tensor | None] = [None] * len(pictures)
        for size in dict.fromkeys(picture.shape for picture in pictures):
            same = [n for n, picture in enumerate(pictures) if picture.shape == size]
            found, _ = self._predict(torch.stack([pictures[n] for n in same]))
            for n, row in zip(same, found, strict=True):
                logits[n] = row.float()
        return [row for row in logits if row is not None]

    def _probabilities(
        self, views: Sequence[Sequence[Tensor]], sizes: Sequence[tuple[int, ...]]
    ) -> list[Tensor]:
        """Mean probabilities over scales and mirror images, each (classes, H, W)."""
        total: list[Tensor] = []
        for pictures in views:
            for mirrored in (False, True) if self.test_flip else (False,):
                turned = [p.flip(2) for p in pictures] if mirrored else pictures
                logits = self._logits_by_size(turned)
                found = [
                    _resize(x.flip(2) if mirrored else x, size).softmax(0)
                    for x, size in zip(logits, sizes, strict=True)
                ]
                total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return total


class SegmentImages:
    """The task, see `task.Task`."""

    #: Samples per forward pass: UperNet normalises its pooled 1×1 map over the batch.
    least_batch = 2

    def __init__(
        self, config: SemanticSegmentationTask, model: Segmenter, class_names: Sequence[str]
    ) -> None:
        self.config = config
        self.model: nn.Module = model
        self.class_names = class_names
        self.num_classes = config.labels.num_classes

    def example(self, sample: Sample, rng: np.random.Generator | None) -> SegmentationExample:
        return segmentation_example(sample, self.config.labels, self.config.transform, rng)

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        return segmentation_collate(examples)

    def evaluator(self) -> MeanIou:
        labels = self.config.labels
        return MeanIou(
            labels.num_classes, ignore_index=labels.ignore_index, class_names=self.class_names
        )

    def no_weight_decay(self) -> frozenset[str]:
        return frozenset()


def build_semantic_segmentation(
    config: SemanticSegmentationTask, backbone: BackboneConfig, dataset: Dataset
) -> SegmentImages:
    """The task on a fresh backbone, which is built without what only classifies."""
    features = replace(backbone, num_classes=0, use_clip_projector=False)
    widths = [backbone.channels * 2**stage for stage in range(4)]
    model = Segmenter(
        build_backbone(features),
        UperNet(config.head, widths, config.labels.num_classes),
        auxiliary_weight=config.head.auxiliary_weight,
        ignore_index=config.labels.ignore_index,
        test_flip=config.transform.test_flip,
    )
    names = list(config.labels.names)
    concepts = sorted(dataset.concepts, key=lambda concept: concept.label)
    if not names and [c.label for c in concepts] == list(range(config.labels.num_classes)):
        names = [concept.name for concept in concepts]
    return SegmentImages(config, model, names)


def _resize(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """(classes, h, w) -> (classes, H, W)."""
    return F.interpolate(logits[None], size, mode="bilinear")[0]
