"""Multiply-accumulates of a model's forward pass, counted from its config.

One multiply-accumulate is two floating-point operations; a training step is about three forward
passes. Norms, activations, softmax and residuals are not counted, as in the published numbers.
"""

from groundwork.kernels.dcnv4 import packed_channels
from groundwork.pretrain.models.clip_text import TextConfig
from groundwork.pretrain.models.internimage_config import InternImageConfig
from groundwork.pretrain.models.klite import KliteConfig
from groundwork.pretrain.models.swin import SwinConfig

KERNEL_SIZE = 3


def internimage_macs(config: InternImageConfig, height: int, width: int) -> int:
    """Multiply-accumulates of one image of height × width pixels."""
    return sum(internimage_mac_split(config, height, width).values())


def internimage_mac_split(config: InternImageConfig, height: int, width: int) -> dict[str, int]:
    """`internimage_macs` by part of the network.

    sampling: 5 per channel and point, four corners weighted and summed up, as the official script
    counts it. pooling: the attention pooling of H and G; their head is what fuses its input.
    """
    split = dict.fromkeys(
        (
            *("stem", "depthwise", "projections", "offsets_and_weights", "center_feature_scale"),
            *("sampling", "mlp", "downsample", "pooling", "head"),
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
    if config.use_clip_projector:
        dim, n3 = config.clip_embed_dim, pixels[3]
        # keys and values of all tokens; one query; its products with keys, and with values
        split["pooling"] = 2 * dim * dim * n3 + dim * dim + 2 * dim * n3 + dim * config.clip_dim
    return split


def _head(config: InternImageConfig, n3: int, n4: int) -> int:
    """n3, n4: pixels of the last two stages."""
    width = config.channels * 8
    classifier = config.out_dim * config.num_classes
    if not config.use_clip_projector:
        return (width * config.out_dim * n4 if config.num_classes > 0 else 0) + classifier
    dim = config.clip_embed_dim
    return width * 4 * dim * n4 + width // 2 * dim * n3 + classifier


def _pixels(height: int, width: int, halvings: int) -> int:
    return -(-height // 2**halvings) * -(-width // 2**halvings)


def klite_macs(config: KliteConfig, image_size: int) -> int:
    """Of one picture of image_size² pixels and one text, up to their features.

    Their products with those of the other samples, below 0.1 % in every recipe, are not counted.
    """
    if isinstance(config.image, SwinConfig):
        image = swin_macs(config.image)
    else:
        image = internimage_macs(config.image, image_size, image_size)
    projections = (config.image.out_dim + config.text.width) * config.projection_dim
    return image + text_macs(config.text) + projections


def swin_macs(config: SwinConfig) -> int:
    """Of one picture of `config.image_size`."""
    side = config.image_size // config.patch_size
    macs = side**2 * 3 * config.patch_size**2 * config.embed_dim
    for stage, depth in enumerate(config.depths):
        width, tokens = config.embed_dim * 2**stage, (side // 2**stage) ** 2
        window = min(config.window_size, side // 2**stage)
        # a map that windows do not divide is padded for the attention, not for the MLP
        padded = (-(-(side // 2**stage) // window) * window) ** 2
        macs += depth * padded * attention_macs(width, window**2)
        macs += depth * tokens * 2 * width * int(width * config.mlp_ratio)
        if stage < len(config.depths) - 1:
            macs += tokens // 4 * 4 * width * 2 * width
    return macs


def text_macs(config: TextConfig) -> int:
    """Of one text, padded to the context length."""
    return config.context_length * config.layers * block_macs(config.width, config.context_length)


def block_macs(width: int, tokens: int) -> int:
    """Of one token in a transformer's block whose MLP is four times as wide."""
    return attention_macs(width, tokens) + 8 * width**2


def attention_macs(width: int, tokens: int) -> int:
    """Of one token: queries, keys, values, the way out, and its products with all tokens.

    A causal mask halves the products; kernels are free to use that, and MFU by custom does not.
    """
    return 4 * width**2 + 2 * tokens * width
