"""The losses of DINO: one query for each object, found by the Hungarian method (arXiv 2005.12872).

Every decoder layer, and the proposals of the encoder, is matched and scored by itself. Denoising
queries know their object and are not matched.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn import functional as F
from torchvision.ops import (
    box_convert,
    generalized_box_iou,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
)

from groundwork.pretrain.models.dino import Detections, DinoOutputs
from groundwork.pretrain.models.dino_denoising import Denoising

#: Weights of (classes, L1 distance, generalised IoU): in matching, and in the loss.
MATCH_WEIGHTS = (2.0, 5.0, 2.0)
LOSS_WEIGHTS = (1.0, 5.0, 2.0)
#: Of the focal loss (arXiv 1708.02002).
ALPHA, GAMMA = 0.25, 2.0


class Objects(NamedTuple):
    """What is in a picture. labels: (n,) int64. boxes: (n, 4), centre, width, height in 0 to 1."""

    labels: Tensor
    boxes: Tensor


def dino_losses(
    outputs: DinoOutputs, objects: Sequence[Objects], denoising: Denoising | None
) -> dict[str, Tensor]:
    """-> "loss", the sum over all layers, and for reading: the parts of the last decoder layer,
    that of the proposals and that of the denoising queries.

    Sums over queries are divided by the mean number of objects per rank.
    """
    objects_here = sum(len(one.labels) for one in objects)
    count = _mean_over_ranks(objects_here, outputs.matched.logits)
    layers = Detections(
        torch.cat([outputs.matched.logits, outputs.proposals.logits]),
        torch.cat([outputs.matched.boxes, outputs.proposals.boxes]),
    )
    matches = match(layers, objects)
    parts = torch.stack(
        [
            _matched_loss(logits, boxes, objects, pairs, count)
            for logits, boxes, pairs in zip(*layers, matches, strict=True)
        ]
    )  # (layers, 3)
    weights = parts.new_tensor(LOSS_WEIGHTS)
    loss = (parts * weights).sum()
    shown = {
        "loss_class": parts[-2, 0],
        "loss_box": parts[-2, 1],
        "loss_giou": parts[-2, 2],
        "loss_proposals": (parts[-1] * weights).sum(),
    }
    if outputs.denoising is not None and denoising is not None:
        # ranks differ in their groups
        count = _mean_over_ranks(objects_here * denoising.labels.shape[1], count)
        noisy = torch.stack(
            [
                _denoising_loss(logits, boxes, denoising, count)
                for logits, boxes in zip(*outputs.denoising, strict=True)
            ]
        )
        loss = loss + (noisy * weights).sum()
        shown["loss_denoising"] = (noisy[-1] * weights).sum()
    return {"loss": loss} | {name: value.detach() for name, value in shown.items()}


@torch.no_grad()
def match(found: Detections, objects: Sequence[Objects]) -> list[list[tuple[Tensor, Tensor]]]:
    """The cheapest assignment of different queries to the objects, for each layer and picture.

    -> [layer][picture]: (queries, objects), int64, as many as there are of the fewer.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "the matching of DINO needs scipy: pip install 'groundwork-pretrain[annotations]'"
        ) from error
    layers, _, queries, _ = found.logits.shape
    costs = [
        matching_cost(found.logits[:, b], found.boxes[:, b], one) for b, one in enumerate(objects)
    ]
    # one transfer for all
    flat = torch.cat([cost.flatten() for cost in costs]).cpu()
    parts = flat.split([cost.numel() for cost in costs])
    device = found.logits.device
    matches: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(layers)]
    for part, one in zip(parts, objects, strict=True):
        for layer, cost in enumerate(part.view(layers, queries, len(one.labels))):
            # a model that has diverged is told by its loss, not by an error of the solver
            rows, columns = linear_sum_assignment(cost.nan_to_num(1e6, 1e6, 1e6).numpy())
            pair = torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
            matches[layer].append(pair)
    return matches


def matching_cost(logits: Tensor, boxes: Tensor, objects: Objects) -> Tensor:
    """logits: (layers, N, classes); boxes: (layers, N, 4); n objects -> (layers, N, n)."""
    by_class, by_distance, by_overlap = MATCH_WEIGHTS
    probability = logits.sigmoid()[..., objects.labels]
    log_yes = F.logsigmoid(logits)[..., objects.labels]
    log_no = F.logsigmoid(-logits)[..., objects.labels]
    if_object = -ALPHA * (1 - probability) ** GAMMA * log_yes
    if_none = -(1 - ALPHA) * probability**GAMMA * log_no
    distance = torch.cdist(boxes, objects.boxes.expand(len(boxes), -1, -1), p=1)
    overlap = generalized_box_iou(_edges(boxes.flatten(0, 1)), _edges(objects.boxes))
    return (
        by_class * (if_object - if_none)
        + by_distance * distance
        - by_overlap * overlap.view(*boxes.shape[:2], -1)
    )


def _matched_loss(
    logits: Tensor,
    boxes: Tensor,
    objects: Sequence[Objects],
    pairs: Sequence[tuple[Tensor, Tensor]],
    count: Tensor,
) -> Tensor:
    """One layer. logits: (B, N, classes); boxes: (B, N, 4) -> (3,): class, L1, GIoU."""
    targets = torch.zeros_like(logits)
    for row, (queries, numbers), one in zip(targets, pairs, objects, strict=True):
        row[queries, one.labels[numbers]] = 1
    found = torch.cat([row[queries] for row, (queries, _) in zip(boxes, pairs, strict=True)])
    true = torch.cat([one.boxes[numbers] for one, (_, numbers) in zip(objects, pairs, strict=True)])
    focal = sigmoid_focal_loss(logits, targets, ALPHA, GAMMA, reduction="sum")
    return torch.stack([focal, *_box_losses(found, true)]) / count


def _denoising_loss(logits: Tensor, boxes: Tensor, denoising: Denoising, count: Tensor) -> Tensor:
    """One layer. logits: (B, G·2·M, classes); boxes: (B, G·2·M, 4) -> (3,)."""
    B, G, _, M = denoising.labels.shape
    logits, boxes = logits.view(B, G, 2, M, -1), boxes.view(B, G, 2, M, 4)
    present = denoising.present[:, None].expand(B, G, M)
    # those with more noise are to be told apart: they are of no class
    targets = torch.zeros_like(logits)
    true_labels = denoising.true_labels[:, None].expand(B, G, M)
    targets[:, :, 0].scatter_(-1, true_labels[..., None], 1.0)
    focal = sigmoid_focal_loss(logits, targets, ALPHA, GAMMA)
    focal = (focal * present[:, :, None, :, None]).sum()
    true = denoising.true_boxes[:, None].expand(B, G, M, 4)
    return torch.stack([focal, *_box_losses(boxes[:, :, 0][present], true[present])]) / count


def _box_losses(found: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the L1 distance and of 1 - GIoU. (n, 4), centre, width and height."""
    distance = (found - true).abs().sum()
    return distance, generalized_box_iou_loss(_edges(found), _edges(true), reduction="sum")


def _edges(boxes: Tensor) -> Tensor:
    """Centre, width and height -> left, top, right, bottom."""
    return box_convert(boxes, "cxcywh", "xyxy")


def _mean_over_ranks(count: int, like: Tensor) -> Tensor:
    """At least 1, (), on the device of `like`. Every rank of a process group must call it."""
    total = torch.tensor(float(count), device=like.device)
    if distributed.is_initialized() and (ranks := distributed.get_world_size()) > 1:
        distributed.all_reduce(total)
        total = total / ranks
    return total.clamp_min(1)
