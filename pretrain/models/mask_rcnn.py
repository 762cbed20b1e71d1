"""Mask R-CNN (arXiv 1703.06870) on torchvision's parts: proposals, and heads for boxes and masks.

The settings are those of the public InternImage configs. In the heads' outputs class 0 is the
background, as in torchvision; labels outside of this file begin at 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from groundwork.pretrain.models.feature_pyramid import PyramidRoIAlign

BOX_POOL, MASK_POOL = 7, 14
#: Of the box deltas' standard deviations, (x, y, width, height): 1 / 0.1 and 1 / 0.2.
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
#: Pixels that `paste_masks` computes at once.
PASTED_PIXELS = 2**24


@dataclass(frozen=True)
class RcnnConfig:
    """Sizes and thresholds; the defaults are the official ones for COCO.

    masks: False leaves the mask head out (Faster R-CNN).
    channels: of the pyramid. anchor_sizes: side of the anchors of each of its five levels, pixels;
        aspect_ratios: height over width.
    proposals_before_nms: per level, in training and in testing; proposals: per picture, and
        train_proposals in training (null: as many). Mask R-CNN has 1000, Cascade 2000 in training.
    anchors_per_picture, boxes_per_picture: of which the losses are taken.
    fc_channels: of the box head; mask_channels: of the mask head.
    score_threshold, nms_threshold, detections: of what is reported of a picture.
    """

    masks: bool = True
    channels: int = 256
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    proposals_before_nms: tuple[int, int] = (2000, 1000)
    proposals: int = 1000
    train_proposals: int | None = None
    anchors_per_picture: int = 256
    boxes_per_picture: int = 512
    fc_channels: int = 1024
    mask_channels: int = 256
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        if len(self.anchor_sizes) != 5 or min(self.anchor_sizes) <= 0:
            raise ValueError(
                f"RcnnConfig: anchor_sizes is {list(self.anchor_sizes)}; give a side above 0 for "
                "each of the five levels"
            )
        if not self.aspect_ratios or min(self.aspect_ratios) <= 0:
            raise ValueError(
                f"RcnnConfig: aspect_ratios is {list(self.aspect_ratios)}; give at least one "
                "height over width above 0"
            )
        counts = (
            *("channels", "proposals", "anchors_per_picture", "boxes_per_picture"),
            *("fc_channels", "mask_channels", "detections"),
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"RcnnConfig: {name} is {getattr(self, name)}; need at least 1")
        if self.train_proposals is not None and self.train_proposals < 1:
            raise ValueError(
                f"RcnnConfig: train_proposals is {self.train_proposals}; give at least 1, or null "
                "for as many as `proposals`"
            )
        if min(self.proposals_before_nms) < 1:
            raise ValueError(
                f"RcnnConfig: proposals_before_nms is {list(self.proposals_before_nms)}; give one "
                "number of at least 1 for training and one for testing"
            )
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"RcnnConfig: {name} is {getattr(self, name)}; give 0 to 1")


def build_proposals(config: RcnnConfig) -> RegionProposalNetwork:
    """(ImageList, features by name, targets) -> (boxes of each picture, losses)."""
    before_nms = dict(zip(("training", "testing"), config.proposals_before_nms, strict=True))
    return RegionProposalNetwork(
        Anchors(tuple((size,) for size in config.anchor_sizes), (config.aspect_ratios,) * 5),
        ProposalHead(config.channels, len(config.aspect_ratios)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=config.anchors_per_picture,
        positive_fraction=0.5,
        pre_nms_top_n=before_nms,
        post_nms_top_n={
            "training": config.train_proposals or config.proposals,
            "testing": config.proposals,
        },
        nms_thresh=0.7,
    )


def build_mask_rcnn_heads(config: RcnnConfig, num_classes: int) -> RoIHeads:
    """(features by name, proposals, image shapes, targets) -> (detections, losses).

    In a detection the masks are (n, 1, 28, 28), the probability in its box; see `paste_masks`.
    """
    return roi_heads(
        config,
        num_classes,
        TwoMLPHead(config.channels * BOX_POOL**2, config.fc_channels),
        iou=0.5,
        weights=BOX_WEIGHTS,
    )


def roi_heads(
    config: RcnnConfig,
    num_classes: int,
    box_head: nn.Module,
    *,
    iou: float,
    weights: tuple[float, float, float, float],
) -> RoIHeads:
    """A box head, and a mask head if the config has one.

    iou: overlap from which a proposal is an object. weights: inverse deviations of box deltas.
    """
    masks: Mapping[str, Any] = {}
    if config.masks:
        masks = {
            "mask_roi_pool": PyramidRoIAlign(MASK_POOL),
            "mask_head": MaskRCNNHeads(config.channels, [config.mask_channels] * 4, 1),
            "mask_predictor": MaskPredictor(config.mask_channels, num_classes),
        }
    return RoIHeads(
        PyramidRoIAlign(BOX_POOL),
        box_head,
        BoxPredictor(config.fc_channels, num_classes),
        fg_iou_thresh=iou,
        bg_iou_thresh=iou,
        batch_size_per_image=config.boxes_per_picture,
        positive_fraction=0.25,
        bbox_reg_weights=weights,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_threshold,
        detections_per_img=config.detections,
        **masks,
    )


class Anchors(AnchorGenerator):
    """torchvision's anchors without their rounding to whole pixels, which moves the edges of small
    ones by several percent; official proposal heads were trained without it."""

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        """-> (ratios x scales, 4), around (0, 0)."""
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        ratios = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        width, height = (sides / ratios[:, None]).flatten(), (sides * ratios[:, None]).flatten()
        return torch.stack([-width, -height, width, height], 1) / 2


# The three modules below return float32 also under autocast: in bfloat16 a coordinate of 1000
# pixels has a step of 4.


class ProposalHead(RPNHead):
    """Objectness and box deltas of each anchor, for each level of the pyramid."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class BoxPredictor(FastRCNNPredictor):
    """(n, channels) -> logits (n, num_classes + 1), deltas (n, 4 (num_classes + 1))."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes + 1)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class MaskPredictor(MaskRCNNPredictor):
    """(n, channels, 14, 14) -> logits (n, num_classes + 1, 28, 28)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, channels, num_classes + 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks in their boxes -> (n, height, width) bool: where the probability is at least 1/2.

    masks: (n, 1, h, w), probabilities. boxes: (n, 4), in pixels of the picture. Each pixel of the
    picture is looked up, bilinearly, at its own place in the mask, so that no edge is rounded.
    """
    rows = max(1, PASTED_PIXELS // (height * width))
    parts = [
        _paste(mask, box, height, width)
        for mask, box in zip(masks.split(rows), boxes.split(rows), strict=True)
    ]
    return torch.cat(parts) if parts else masks.new_zeros(0, height, width, dtype=torch.bool)


def _paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    left, top, right, bottom = boxes.to(masks.dtype).T[:, :, None]  # each (n, 1)
    x = (torch.arange(width, device=masks.device) + 0.5 - left) / (right - left) * 2 - 1  # (n, W)
    y = (torch.arange(height, device=masks.device) + 0.5 - top) / (bottom - top) * 2 - 1  # (n, H)
    n = len(masks)
    grid = torch.stack(
        [x[:, None, :].expand(n, height, width), y[:, :, None].expand(n, height, width)], -1
    )
    return grid_sample(masks, grid, align_corners=False)[:, 0] >= 0.5
