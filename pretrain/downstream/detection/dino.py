"""Object detection by DINO on the three coarse maps of a backbone, scored by COCO's AP of boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn
from torchvision.ops import box_convert

from groundwork.data.dataset import Dataset
from groundwork.data.samples import Sample
from groundwork.pretrain.downstream.backbone import BackboneConfig, build_backbone
from groundwork.pretrain.downstream.detection.coco_evaluation import CocoEvaluator
from groundwork.pretrain.downstream.detection.data import (
    DINO_MULTI_SCALE,
    DetectionExample,
    DetectionTransform,
    detection_collate,
    detection_example,
    inside_pictures,
    normalise_images,
)
from groundwork.pretrain.downstream.detection.dino_loss import Objects, dino_losses
from groundwork.pretrain.downstream.detection.instance_segmentation import class_names
from groundwork.pretrain.models.dino import Detections, Dino, DinoConfig
from groundwork.pretrain.models.dino_denoising import make_denoising


@dataclass(frozen=True)
class DinoDetectionTask:
    """The task `dino_detection`.

    num_classes: null takes as many as the data set names (concepts.json). image: sizes and
    augmentation, by default DETR's. head: the detector. detections: kept of each picture, those of
    highest score.
    """

    kind: Literal["dino_detection"] = "dino_detection"
    num_classes: int | None = None
    image: DetectionTransform = DINO_MULTI_SCALE
    head: DinoConfig = field(default_factory=DinoConfig)
    detections: int = 300

    def __post_init__(self) -> None:
        for name in ("num_classes", "detections"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"task.{name} is {value}; it must be at least 1")


class DinoDetector(nn.Module):
    """A batch of `detection_collate` -> the losses of `dino_losses` in training, else detections.

    A detection of a picture: boxes (n, 4) as [left, top, right, bottom] in pixels of the original
    picture, scores (n,), labels (n,); by falling score.
    """

    def __init__(self, backbone: nn.Module, detector: Dino, detections: int = 300) -> None:
        super().__init__()
        self.backbone = backbone
        self.detector = detector
        self.detections = detections

    def forward(self, batch: Mapping[str, Any]) -> Any:
        images, sizes = batch["images"], batch["sizes"]
        features: list[Tensor] = self.backbone.features(normalise_images(images, sizes))  # type: ignore[operator]
        inside = inside_pictures(sizes, *images.shape[-2:])
        if not self.training:
            found = self.detector(features[1:], inside).matched
            originals = [tuple(target["orig_size"]) for target in batch["targets"]]
            return best_detections(found, originals, self.detections)
        config = self.detector.config
        objects = picture_objects(batch["targets"], sizes)
        denoising = None
        if config.denoising_queries:
            denoising = make_denoising(
                [one.labels for one in objects],
                [one.boxes for one in objects],
                self.detector.num_classes,
                queries=config.denoising_queries,
                label_noise=config.label_noise,
                box_noise=config.box_noise,
            )
        outputs = self.detector(features[1:], inside, denoising)
        return dino_losses(outputs, objects, denoising)


class DinoDetection:
    """The task, see `task.Task`."""

    def __init__(
        self, config: DinoDetectionTask, model: DinoDetector, names: Sequence[str]
    ) -> None:
        self.image = config.image
        self.class_names = list(names)
        self.num_classes = len(self.class_names)
        self.model: nn.Module = model

    def example(self, sample: Sample, rng: np.random.Generator | None) -> DetectionExample:
        return detection_example(sample, self.image, len(self.class_names), rng, masks=False)

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        return detection_collate(examples)

    def evaluator(self) -> CocoEvaluator:
        return CocoEvaluator(self.class_names, masks=False)

    def no_weight_decay(self) -> frozenset[str]:
        return frozenset()


def build_dino_detection(
    config: DinoDetectionTask, backbone: BackboneConfig, dataset: Dataset
) -> DinoDetection:
    """The task on a fresh backbone without a classifier. Raises ValueError, see `class_names`."""
    names = class_names(config.num_classes, dataset)
    widths = [backbone.channels * 2**stage for stage in (1, 2, 3)]
    model = DinoDetector(
        build_backbone(replace(backbone, num_classes=0, use_clip_projector=False)),
        Dino(config.head, widths, len(names)),
        config.detections,
    )
    return DinoDetection(config, model, names)


def picture_objects(targets: Sequence[Mapping[str, Any]], sizes: Tensor) -> list[Objects]:
    """Training targets of `detection_example` in parts of their pictures.

    sizes: (B, 2), height and width without padding.
    """
    return [
        Objects(
            target["labels"],
            box_convert(target["boxes"], "xyxy", "cxcywh") / size.flip(0).repeat(2),
        )
        for target, size in zip(targets, sizes, strict=True)
    ]


def best_detections(
    found: Detections, originals: Sequence[tuple[int, ...]], count: int
) -> list[dict[str, Tensor]]:
    """The `count` likeliest pairs of a query and a class of the last layer, for each picture.

    originals: (height, width) of the pictures, in whose pixels the boxes are.
    """
    scores, boxes = found.logits[-1].sigmoid(), box_convert(found.boxes[-1], "cxcywh", "xyxy")
    classes = scores.shape[-1]
    best = scores.flatten(1).topk(min(count, scores[0].numel()), 1)
    results = []
    for row, picked, edges, (height, width) in zip(*best, boxes, originals, strict=True):
        scale = edges.new_tensor([width, height, width, height])
        results.append(
            {
                "boxes": edges[picked // classes].clamp(0, 1) * scale,
                "scores": row,
                "labels": picked % classes,
            }
        )
    return results
