"""Floating-point operations of training on one sample: the numerator of MFU, for every recipe."""

from groundwork.pretrain.engine.throughput import training_flops
from groundwork.pretrain.models.flops import (
    block_macs,
    internimage_mac_split,
    internimage_macs,
    klite_macs,
)
from groundwork.pretrain.models.internimage_config import InternImageConfig
from groundwork.pretrain.objectives.m3i import TOKEN_STRIDE, M3iConfig
from groundwork.pretrain.recipe import Recipe


def flops_per_sample(recipe: Recipe) -> float:
    """Of the model's forward and backward pass, with all that the objective adds to it."""
    size = recipe.data.image.size
    if isinstance(recipe.model, InternImageConfig):
        return training_flops(internimage_macs(recipe.model, size, size))
    flops = training_flops(klite_macs(recipe.model, size))
    if isinstance(recipe.objective, M3iConfig) and recipe.objective.dense_weight > 0:
        assert isinstance(recipe.model.image, InternImageConfig)
        flops += m3i_dense_flops(recipe.objective, recipe.model.image, size)
    return flops


def m3i_dense_flops(config: M3iConfig, tower: InternImageConfig, size: int) -> float:
    """Of the dense targets of one picture of size² pixels: the teacher, which has no backward pass
    and does not pool its tokens, and the decoder, which is asked for both pictures of a mixture.
    """
    split = internimage_mac_split(tower, size, size)
    teacher = sum(split.values()) - split["pooling"]
    tokens, width = (size // TOKEN_STRIDE) ** 2, config.decoder_width
    ends = 2 * tower.clip_embed_dim * width
    decoder = tokens * (ends + config.decoder_depth * block_macs(width, tokens))
    return 2 * teacher + training_flops(2 * decoder)
