"""Names of the public detection checkpoints -> those of our R-CNN detectors.

The checkpoints are those of the public InternImage configs for Mask R-CNN and Cascade Mask R-CNN,
which follow mmdetection 2. The backbone's names are the same on both sides.
"""

import re
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

#: What mmdetection calls a parameter, and what the `Rcnn` of `instance_segmentation` does.
#: Group 1 is the stage of a cascade with its dot, empty in Mask R-CNN.
_STAGE = r"(?:(\d+)\.)?"
_RULES: Final = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"backbone\.(.+)", r"backbone.\1"),
        (r"neck\.lateral_convs\.(\d+)\.conv\.(.+)", r"neck.fpn.inner_blocks.\1.0.\2"),
        (r"neck\.fpn_convs\.(\d+)\.conv\.(.+)", r"neck.fpn.layer_blocks.\1.0.\2"),
        (r"rpn_head\.rpn_conv\.(.+)", r"proposals.head.conv.0.0.\1"),
        (r"rpn_head\.rpn_cls\.(.+)", r"proposals.head.cls_logits.\1"),
        (r"rpn_head\.rpn_reg\.(.+)", r"proposals.head.bbox_pred.\1"),
        (r"roi_head\.bbox_head\.shared_fcs\.0\.(.+)", r"heads.box_head.fc6.\1"),
        (r"roi_head\.bbox_head\.shared_fcs\.1\.(.+)", r"heads.box_head.fc7.\1"),
        (
            r"roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.conv\.(.+)",
            r"heads.stages.\1.box_head.\2.0.\3",
        ),
        (
            r"roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.bn\.(.+)",
            r"heads.stages.\1.box_head.\2.1.\3",
        ),
        # after four convolutions and the flattening
        (r"roi_head\.bbox_head\.(\d+)\.shared_fcs\.0\.(.+)", r"heads.stages.\1.box_head.5.\2"),
        (rf"roi_head\.bbox_head\.{_STAGE}fc_cls\.(.+)", r"heads.{stage}box_predictor.cls_score.\2"),
        (rf"roi_head\.bbox_head\.{_STAGE}fc_reg\.(.+)", r"heads.{stage}box_predictor.bbox_pred.\2"),
        (
            rf"roi_head\.mask_head\.{_STAGE}convs\.(\d+)\.conv\.(.+)",
            r"heads.{stage}mask_head.\2.0.\3",
        ),
        (
            rf"roi_head\.mask_head\.{_STAGE}upsample\.(.+)",
            r"heads.{stage}mask_predictor.conv5_mask.\2",
        ),
        (
            rf"roi_head\.mask_head\.{_STAGE}conv_logits\.(.+)",
            r"heads.{stage}mask_predictor.mask_fcn_logits.\2",
        ),
    )
)


def rcnn_from_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a public checkpoint -> one for `Rcnn.load_state_dict`.

    The background is mmdetection's last class and our first; its box deltas and mask, which are
    never read, are 0. Raises ValueError naming parameters that are none of such a detector.
    """
    named = {name: _renamed(name) for name in state}
    unknown = sorted(name for name, ours in named.items() if ours is None)
    if unknown:
        raise ValueError(
            f"{len(unknown)} parameters are none of a Mask R-CNN or Cascade Mask R-CNN with a "
            f"feature pyramid: {', '.join(unknown[:5])}; is it a checkpoint of another detector?"
        )
    return {ours: _background_first(ours, state[name]) for name, ours in named.items() if ours}


def _renamed(name: str) -> str | None:
    for pattern, ours in _RULES:
        if match := pattern.fullmatch(name):
            stage = f"stages.{match[1]}." if "{stage}" in ours and match[1] else ""
            return match.expand(ours.replace("{stage}", stage))
    return None


def _background_first(name: str, x: Tensor) -> Tensor:
    if ".cls_score." in name:
        return torch.cat([x[-1:], x[:-1]])
    if ".box_predictor.bbox_pred." in name:
        return torch.cat([torch.zeros_like(x[:4]), x])
    if ".mask_fcn_logits." in name:
        return torch.cat([torch.zeros_like(x[:1]), x])
    return x
