"""Layer-wise decay of InternImage's learning rate, by the two rules of the official code."""

from collections.abc import Iterable, Sequence
from typing import Literal

LayerDecayRule = Literal["classification", "detection"]


def layer_scales(
    names: Iterable[str],
    depths: Sequence[int],
    decay: float,
    rule: LayerDecayRule,
    dcn_lr_mul: float = 1.0,
) -> dict[str, float]:
    """Name of a parameter -> by how much its learning rate is multiplied.

    names: relative to the model. depths: blocks of each stage. Both rules multiply by `decay` per
    block from the end; a stage's norm and downsampling go with the first block of the next stage.

    classification: the last block has 1, and the stem what the first block has. The norm of the
        last stage, the post norms of the third one and the head have 1. dcn_lr_mul comes on top for
        offsets and the center feature scale; the linear maps of the masks are not meant.
    detection: the head has 1, the last block `decay`, and the stem one step less than the first
        block. The norm of the last stage goes with that stage's first block. A post norm of the
        third stage goes by its place in the list of post norms, as if it were the block of that
        number. dcn_lr_mul is not in this rule.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer decay is {decay}; give 0 < decay <= 1, 1 for none")
    if rule not in ("classification", "detection"):
        raise ValueError(f"rule is {rule!r}; choose classification or detection")
    scales = {}
    for name in names:
        if rule == "detection":
            scales[name] = decay ** (sum(depths) + 1 - _layer_of_detection(name, depths))
        else:
            steps = _steps_of_classification(name, depths)
            is_dcn = "offset" in name or "center_feature_scale_proj" in name
            scales[name] = decay**steps * (dcn_lr_mul if is_dcn else 1.0)
    return scales


def _steps_of_classification(name: str, depths: Sequence[int]) -> int:
    """Blocks behind the parameter, up to the last one."""
    last = sum(depths) - 1
    part, stage, kind, index = _parts(name)
    if part == "patch_embed":
        return last
    if part == "levels" and kind == "blocks":
        return last - sum(depths[:stage]) - index
    if part == "levels" and kind in ("norm", "downsample") and stage < len(depths) - 1:
        return last - sum(depths[: stage + 1])
    return 0


def _layer_of_detection(name: str, depths: Sequence[int]) -> int:
    """0 for the stem, then one per block; the head is one past the last block."""
    part, stage, kind, index = _parts(name)
    if part == "patch_embed":
        return 0
    if part == "levels" and kind in ("blocks", "post_norms"):
        return sum(depths[:stage]) + index + 1
    if part == "levels" and kind in ("norm", "downsample"):
        return 1 + sum(depths[: min(stage + 1, len(depths) - 1)])
    return sum(depths) + 1


def _parts(name: str) -> tuple[str, int, str, int]:
    """`levels.2.blocks.5.norm1.0.weight` -> levels, 2, blocks, 5; without numbers -1 for them."""
    parts = [*name.split("."), "", "", ""]
    numbers = [int(parts[i]) if parts[i].isdigit() else -1 for i in (1, 3)]
    return parts[0], numbers[0], parts[2], numbers[1]
