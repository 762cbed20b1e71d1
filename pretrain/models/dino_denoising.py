"""Contrastive denoising (arXiv 2203.03605, section 3.3): noisy boxes that the decoder corrects.

Each group holds every object of a picture twice: with a little noise, to be brought back, and with
more, to be told apart from it. Groups and the matched queries do not see one another's boxes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Denoising(NamedTuple):
    """G groups of 2·M queries: M with little noise, then M with more; M the most objects of one.

    labels: (B, G, 2, M), noisy classes. boxes: (B, G, 2, M, 4), noisy, as centre, width and height
    in 0 to 1. present: (B, M), bool, False where a picture has fewer objects.
    true_labels: (B, M); true_boxes: (B, M, 4).
    """

    labels: Tensor
    boxes: Tensor
    present: Tensor
    true_labels: Tensor
    true_boxes: Tensor


def make_denoising(
    labels: Sequence[Tensor],
    boxes: Sequence[Tensor],
    num_classes: int,
    *,
    queries: int = 100,
    label_noise: float = 0.5,
    box_noise: float = 1.0,
) -> Denoising:
    """Noisy queries from the objects of a batch; draws from torch's generator.

    labels: of each picture (n,). boxes: (n, 4), centre, width and height in parts of the picture.
    queries: with little noise, over all groups, for the picture with the most objects; at least one
        group is made. label_noise: half of this part of the labels is drawn anew. box_noise: edges
        move by up to this part of half the box, those with more noise by one to two such parts.

    A batch without a single object still gives one group, of absent queries.
    """
    most = max(1, *(len(one) for one in labels))
    has_objects = any(len(one) for one in labels)
    groups = max(1, queries // most) if has_objects else 1
    true_labels = _padded(labels, most)
    true_boxes = _padded(boxes, most)
    counts = torch.tensor([len(one) for one in labels], device=true_labels.device)
    present = torch.arange(most, device=true_labels.device) < counts[:, None]  # (B, M)

    shape = (len(labels), groups, 2, most)
    device = true_labels.device
    noisy_labels = true_labels[:, None, None].expand(shape)
    drawn = torch.randint(num_classes, shape, device=device)
    changed = torch.rand(shape, device=device) < 0.5 * label_noise
    noisy_labels = torch.where(changed, drawn, noisy_labels)

    amount = torch.rand(*shape, 4, device=device)
    amount[:, :, 1] += 1
    sign = torch.randint(2, (*shape, 4), device=device) * 2.0 - 1
    centre, size = true_boxes[:, None, None].expand(*shape, 4).chunk(2, -1)
    edges = torch.cat([centre - size / 2, centre + size / 2], -1)
    edges = edges + sign * amount * size.repeat(1, 1, 1, 1, 2) / 2 * box_noise
    first, last = edges.clamp(0, 1).chunk(2, -1)
    # strong noise can turn a box inside out; its size then is 0, as after the official clamp
    size = (last - first).clamp_min(0)
    noisy_boxes = torch.cat([(first + last) / 2, size], -1)
    # the box that an absent query has is of no importance, so long as it is one
    noisy_boxes = torch.where(present[:, None, None, :, None], noisy_boxes, 0.5)
    return Denoising(noisy_labels, noisy_boxes, present, true_labels, true_boxes)


def blocked_attention(groups: int, per_group: int, matched: int, device: torch.device) -> Tensor:
    """(D + N, D + N), bool: True where a query (row) may not look at another one (column).

    D: groups·per_group denoising queries, which come first; N: the matched ones. Nobody but its own
    group looks at a denoising query, since it knows an answer; each may look at the matched ones.
    """
    group = torch.arange(groups, device=device).repeat_interleave(per_group)
    group = torch.cat([group, group.new_full((matched,), -1)])
    is_denoising = group >= 0
    return is_denoising[None, :] & (group[:, None] != group[None, :])


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    """Rows (n, ...) of different length -> (B, length, ...), zeros at the end."""
    stacked = pad_sequence(list(rows), batch_first=True)
    missing = length - stacked.shape[1]
    if missing == 0:
        return stacked
    return torch.cat([stacked, stacked.new_zeros(len(rows), missing, *stacked.shape[2:])], 1)
