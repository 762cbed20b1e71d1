"""Multiply-accumulates of a model's forward pass, counted from its config.

One multiply-accumulate is two floating-point operations; a training step is about three forward
passes. Norms, activations, softmax and residuals are not counted, as in the published numbers.
"""

from groundwork.kernels.dcnv4 import packed_channels
from groundwork.pretrain.models.internimage_config import InternImageConfig

KERNEL_SIZE = 3


def internimage_macs(config: InternImageConfig, height: int, width: int) -> int:
    """Multiply-accumulates of one image of height × width pixels."""
    return sum(internimage_mac_split(config, height, width).values())


def internimage_mac_split(config: InternImageConfig, height: int, width: int) -> dict[str, int]:
    """`internimage_macs` by part of the network.

    sampling: 5 per channel and point, four corners weighted and summed up, as the official script
    counts it.
    """
    split = dict.fromkeys(
        (
            *("stem", "depthwise", "projections", "offsets_and_weights", "center_feature_scale"),
            *("sampling", "mlp", "downsample", "head"),
        ),
        0,
    )
    points = KERNEL_SIZE**2 - int(config.remove_center)
    channels = config.channels
    pixels = [_pixels(height, width, halvings) for halvings in range(1, 6)]  # at strides 2 to 32
    split["stem"] = 9 * (3 * channels // 2) * pixels[0] + 9 * (channels // 2) * channels * pixels[1]
    for i, (depth, groups) in enumerate(zip(config.depths, config.groups, strict=True)):
        c, n = channels * 2**i, pixels[1 + i]
        each = depth * n * c
        split["depthwise"] += each * (config.dw_kernel_size or 0) ** 2
        split["projections"] += each * 2 * c
        is_packed = config.core == "dcnv4"
        split["offsets_and_weights"] += each * (
            packed_channels(groups, points) if is_packed else 3 * groups * points
        )
        split["center_feature_scale"] += each * groups if config.center_feature_scale else 0
        split["sampling"] += each * 5 * points
        split["mlp"] += each * 2 * int(c * config.mlp_ratio)
        if i < 3:
            split["downsample"] += 9 * c * 2 * c * pixels[2 + i]
    split["head"] = _head(config, pixels[3], pixels[4])
    return split


def _head(config: InternImageConfig, n3: int, n4: int) -> int:
    """n3, n4: pixels of the last two stages."""
    width = config.channels * 8
    classifier = config.out_dim * config.num_classes
    if not config.use_clip_projector:
        return (width * config.out_dim * n4 if config.num_classes > 0 else 0) + classifier
    dim = config.clip_embed_dim
    fusion = width * 4 * dim * n4 + width // 2 * dim * n3
    # keys and values of all tokens; one query; its products with keys, and with values
    attention = 2 * dim * dim * n3 + dim * dim + 2 * dim * n3 + dim * config.clip_dim
    return fusion + attention + classifier


def _pixels(height: int, width: int, halvings: int) -> int:
    return -(-height // 2**halvings) * -(-width // 2**halvings)
