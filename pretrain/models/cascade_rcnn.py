"""Cascade Mask R-CNN (arXiv 1712.00726): three heads, each on the boxes that the last one mended.

As in the public InternImage configs: regression per class, GIoU loss on the decoded boxes, batch
normalisation in the box heads (over all ranks where the run synchronises it), a mask head in each
stage.
"""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss

from groundwork.pretrain.models.batch_norm import FloatBatchNorm
from groundwork.pretrain.models.mask_rcnn import BOX_POOL, RcnnConfig, roi_heads


class StageSettings(NamedTuple):
    """iou: overlap from which a box is an object. weights: inverse deviations of its deltas.

    loss: the weight of the stage's losses.
    """

    iou: float
    weights: tuple[float, float, float, float]
    loss: float


STAGES: Final = (
    StageSettings(0.5, (1 / 0.1, 1 / 0.1, 1 / 0.2, 1 / 0.2), 1.0),
    StageSettings(0.6, (1 / 0.05, 1 / 0.05, 1 / 0.1, 1 / 0.1), 0.5),
    StageSettings(0.7, (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067), 0.25),
)
BOX_LOSS_WEIGHT: Final = 10.0

Features = Mapping[str, Tensor]
Targets = list[dict[str, Tensor]]


def build_cascade_heads(config: RcnnConfig, num_classes: int) -> "CascadeHeads":
    """Takes and gives the same as `build_mask_rcnn_heads`."""
    stages = [
        roi_heads(
            config,
            num_classes,
            FastRCNNConvFCHead(
                (config.channels, BOX_POOL, BOX_POOL),
                [config.channels] * 4,
                [config.fc_channels],
                norm_layer=FloatBatchNorm,
            ),
            iou=settings.iou,
            weights=settings.weights,
        )
        for settings in STAGES
    ]
    return CascadeHeads(stages, [settings.loss for settings in STAGES])


class CascadeHeads(nn.Module):
    """stages: heads with the same number of classes; loss_weights: one for each."""

    def __init__(self, stages: Sequence[RoIHeads], loss_weights: Sequence[float]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.loss_weights = list(loss_weights)

    @property
    def _heads(self) -> list[RoIHeads]:
        return list(self.stages)

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[Targets, dict[str, Tensor]]:
        """As torchvision's RoIHeads: (detections, {}) in evaluation, ([], losses) in training."""
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        if targets is None:
            raise ValueError("CascadeHeads: targets is None; in training give one for each picture")
        losses: dict[str, Tensor] = {}
        for number, (stage, weight) in enumerate(zip(self._heads, self.loss_weights, strict=True)):
            own, proposals = _train_stage(stage, features, proposals, image_shapes, targets)
            losses |= {f"{name}_{number}": weight * loss for name, loss in own.items()}
        return [], losses

    def _detect(
        self, features: Features, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Targets:
        logits, deltas = torch.empty(0), torch.empty(0)
        scores = []
        for number, stage in enumerate(self._heads):
            if number:  # mend by what the stage before says
                decoded = self._heads[number - 1].box_coder.decode(deltas, proposals)
                likely = logits[:, 1:].argmax(1) + 1
                proposals = _mend(decoded, likely, proposals, image_shapes)
            logits, deltas = _boxes(stage, features, proposals, image_shapes)
            scores.append(logits)
        last = self._heads[-1]
        # the mean of the logits, not of the probabilities: so does the code of the public weights
        mean = torch.stack(scores).mean(0)
        found = last.postprocess_detections(mean, deltas, proposals, image_shapes)
        results = [
            {"boxes": boxes, "scores": score, "labels": labels}
            for boxes, score, labels in zip(*found, strict=True)
        ]
        if last.has_mask():
            masks = self._masks(features, results, image_shapes)
            for result, mask in zip(results, masks, strict=True):
                result["masks"] = mask
        return results

    def _masks(
        self, features: Features, results: Targets, image_shapes: list[tuple[int, int]]
    ) -> Sequence[Tensor]:
        """Mean over the stages of each detection's mask; (n, 1, 28, 28) of each picture."""
        boxes = [result["boxes"] for result in results]
        labels = [result["labels"] for result in results]
        stages = [
            torch.cat(maskrcnn_inference(_mask_logits(s, features, boxes, image_shapes), labels))
            for s in self._heads
        ]
        return torch.stack(stages).mean(0).split([len(b) for b in boxes])


def _train_stage(
    stage: RoIHeads,
    features: Features,
    proposals: list[Tensor],
    image_shapes: list[tuple[int, int]],
    targets: Targets,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(losses, the boxes of the next stage)."""
    proposals, matched, labels, _ = stage.select_training_samples(proposals, targets)
    logits, deltas = _boxes(stage, features, proposals, image_shapes)
    decoded = stage.box_coder.decode(deltas, proposals)  # (n, classes + 1, 4)
    # of pictures without objects all is background, and no row of `truth` is looked at
    truth = [
        target["boxes"][index] if len(target["boxes"]) else torch.zeros_like(boxes)
        for target, index, boxes in zip(targets, matched, proposals, strict=True)
    ]
    label = torch.cat(labels)
    positive = (label > 0).nonzero().flatten()
    box_loss = generalized_box_iou_loss(
        decoded[positive, label[positive]], torch.cat(truth)[positive], reduction="sum"
    )
    losses = {
        "loss_classifier": F.cross_entropy(logits, label),
        "loss_box_reg": BOX_LOSS_WEIGHT * box_loss / len(label),
    }
    if stage.has_mask():
        positives = [(of_picture > 0).nonzero().flatten() for of_picture in labels]
        boxes = [b[p] for b, p in zip(proposals, positives, strict=True)]
        losses["loss_mask"] = maskrcnn_loss(
            _mask_logits(stage, features, boxes, image_shapes),
            boxes,
            [target["masks"] for target in targets],
            [target["labels"] for target in targets],
            [m[p] for m, p in zip(matched, positives, strict=True)],
        )
    with torch.no_grad():
        # what an object is, is known in training; of the background, the most likely class
        chosen = torch.where(label > 0, label, logits[:, 1:].argmax(1) + 1)
        mended = _mend(decoded, chosen, proposals, image_shapes)
        # the true boxes were added to the proposals, and are added to the next stage's again
        is_truth = [(b == t).all(1) for b, t in zip(proposals, truth, strict=True)]
    return losses, [b[~known] for b, known in zip(mended, is_truth, strict=True)]


def _boxes(
    stage: RoIHeads,
    features: Features,
    proposals: list[Tensor],
    image_shapes: list[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """(logits, deltas) of all proposals."""
    return stage.box_predictor(
        stage.box_head(stage.box_roi_pool(features, proposals, image_shapes))
    )


def _mask_logits(
    stage: RoIHeads,
    features: Features,
    boxes: list[Tensor],
    image_shapes: list[tuple[int, int]],
) -> Tensor:
    return stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, boxes, image_shapes)))


def _mend(
    decoded: Tensor, labels: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
) -> list[Tensor]:
    """Each box as its class's deltas say, (n, 4) of each picture; inside of the picture."""
    # by rows of four: torchvision gives (0, 4 classes) where there is no box at all
    rows = torch.arange(len(labels), device=labels.device) * decoded.shape[1] + labels
    boxes = decoded.detach().reshape(-1, 4)[rows]
    return [
        clip_boxes_to_image(part, shape)
        for part, shape in zip(boxes.split([len(p) for p in proposals]), image_shapes, strict=True)
    ]
