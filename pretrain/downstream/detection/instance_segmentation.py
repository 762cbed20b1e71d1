"""Detection and instance segmentation by R-CNN heads on a backbone's feature pyramid.

Loss and metrics are COCO's: AP of boxes and of masks, see `coco_evaluation`.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from groundwork.data.dataset import Dataset
from groundwork.data.samples import Sample
from groundwork.pretrain.downstream.backbone import BackboneConfig, build_backbone
from groundwork.pretrain.downstream.detection.coco_evaluation import CocoEvaluator
from groundwork.pretrain.downstream.detection.data import (
    DetectionExample,
    DetectionTransform,
    detection_collate,
    detection_example,
    normalise_images,
)
from groundwork.pretrain.models.cascade_rcnn import build_cascade_heads
from groundwork.pretrain.models.feature_pyramid import FeaturePyramid
from groundwork.pretrain.models.mask_rcnn import (
    RcnnConfig,
    build_mask_rcnn_heads,
    build_proposals,
    paste_masks,
)

Head = Literal["mask_rcnn", "cascade_mask_rcnn"]
#: (config, number of classes) -> the heads on the proposals.
HEADS: Final[Mapping[Head, Callable[[RcnnConfig, int], nn.Module]]] = {
    "mask_rcnn": build_mask_rcnn_heads,
    "cascade_mask_rcnn": build_cascade_heads,
}


@dataclass(frozen=True)
class InstanceSegmentationTask:
    """The task `instance_segmentation`.

    head: one stage, or three. num_classes: null takes as many as the data set names
    (concepts.json). image: sizes and augmentation. rcnn: sizes and thresholds of the heads;
    rcnn.masks: false detects boxes only.
    """

    kind: Literal["instance_segmentation"] = "instance_segmentation"
    head: Head = "mask_rcnn"
    num_classes: int | None = None
    image: DetectionTransform = field(default_factory=DetectionTransform)
    rcnn: RcnnConfig = field(default_factory=RcnnConfig)

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(
                f"task.num_classes is {self.num_classes}; it must be at least 1, or null for as "
                "many as the data set names"
            )


class Rcnn(nn.Module):
    """A batch of `detection_collate` -> {"loss", its parts} in training, else detections.

    A detection of a picture: boxes (n, 4) in pixels of the original picture, scores (n,), labels
    (n,), and with a mask head masks (n, H, W), bool, of the original picture's size.
    backbone: its `features` gives four maps, `feature_info` their channels.
    """

    def __init__(self, backbone: Any, head: Head, config: RcnnConfig, num_classes: int) -> None:
        super().__init__()
        channels = [info["num_chs"] for info in backbone.feature_info]
        self.backbone: Any = backbone
        self.neck = FeaturePyramid(channels, config.channels)
        self.proposals = build_proposals(config)
        self.heads = HEADS[head](config, num_classes)

    def forward(self, batch: Mapping[str, Any]) -> Any:
        images = normalise_images(batch["images"], batch["sizes"])
        shapes = [(h, w) for h, w in batch["sizes"].tolist()]
        targets = _with_background(batch["targets"]) if self.training else None
        features: OrderedDict[str, Tensor] = self.neck(self.backbone.features(images))
        boxes, losses = self.proposals(ImageList(images, shapes), features, targets)
        results, more = self.heads(features, boxes, shapes, targets)
        if self.training:
            losses = losses | more
            return {"loss": torch.stack(list(losses.values())).sum(), **losses}
        originals = [tuple(target["orig_size"]) for target in batch["targets"]]
        return [
            _in_original(result, shape, original)
            for result, shape, original in zip(results, shapes, originals, strict=True)
        ]


class InstanceSegmentation:
    """The task, see `task.Task`."""

    def __init__(
        self,
        config: InstanceSegmentationTask,
        backbone: nn.Module,
        num_classes: int,
        class_names: Sequence[str],
    ) -> None:
        self.image = config.image
        self.masks = config.rcnn.masks
        self.num_classes = num_classes
        self.class_names = list(class_names)
        self.model: nn.Module = Rcnn(backbone, config.head, config.rcnn, num_classes)

    def example(self, sample: Sample, rng: np.random.Generator | None) -> DetectionExample:
        return detection_example(sample, self.image, self.num_classes, rng, masks=self.masks)

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        return detection_collate(examples)

    def evaluator(self) -> CocoEvaluator:
        return CocoEvaluator(self.class_names, masks=self.masks)

    def no_weight_decay(self) -> frozenset[str]:
        return frozenset()


def build_instance_segmentation(
    config: InstanceSegmentationTask, backbone: BackboneConfig, dataset: Dataset
) -> InstanceSegmentation:
    """The task on a fresh backbone without a classifier. Raises ValueError, see `class_names`."""
    names = class_names(config.num_classes, dataset)
    model = build_backbone(replace(backbone, num_classes=0, use_clip_projector=False))
    return InstanceSegmentation(config, model, len(names), names)


def class_names(num_classes: int | None, dataset: Dataset) -> list[str]:
    """The name of each label of a detection data set; a number where the data set has none.

    Raises ValueError where neither the recipe nor the data set says how many there are, or the data
    set has more than the recipe says.
    """
    named = {concept.label: concept.name for concept in dataset.concepts}
    if num_classes is None and not named:
        raise ValueError(
            "task.num_classes is null, and the data set names no classes (no concepts.json); give "
            "the number of classes"
        )
    needed = 1 + max(named, default=-1)
    if num_classes is not None and num_classes < needed:
        raise ValueError(
            f"task.num_classes is {num_classes}, and the data set names {needed} classes "
            "(concepts.json); set it to null, or leave those classes out of the data set"
        )
    return [named.get(label, str(label)) for label in range(num_classes or needed)]


def _with_background(targets: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    """Targets as torchvision has them: label 0 is the background."""
    return [
        {
            "boxes": target["boxes"],
            "labels": target["labels"] + 1,
            **({"masks": target["masks"]} if "masks" in target else {}),
        }
        for target in targets
    ]


def _in_original(
    result: Mapping[str, Tensor], shape: tuple[int, int], original: tuple[int, int]
) -> dict[str, Tensor]:
    """A detection in a resized picture of `shape` -> in the original one; both (height, width)."""
    scale = result["boxes"].new_tensor([original[1] / shape[1], original[0] / shape[0]] * 2)
    boxes = result["boxes"] * scale
    detection = {"boxes": boxes, "scores": result["scores"], "labels": result["labels"] - 1}
    if "masks" in result:
        detection["masks"] = paste_masks(result["masks"], boxes, *original)
    return detection
