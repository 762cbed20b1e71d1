"""The decoder of M3I pre-training (arXiv 2211.09807): from a mixture's tokens to a picture's.

A decoder between the encoder of the mixture and the dense targets is the paper's idea; that it is a
small transformer with mask tokens and fixed positions, and its size, are ours.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from groundwork.pretrain.models.dcnv3_module import LAYER_NORM_EPS
from groundwork.pretrain.models.initialisation import init_linear_and_norm


class M3iDecoder(nn.Module):
    """tokens: (B, N, D) of mixtures; visible: (B, h, w) bool, N = h·w -> (B, N, D), of the picture.

    Where a token is not visible its place is taken by the mask token: what stands there in the
    mixture is the other picture. Positions are fixed sines, so pictures may have any size.

    Parameters, with width W: 2·D·W + 4·W + 3·D for the way in and out and the mask token, and
    12·W² + 13·W for each block; 13.7 M at D 1024, W 512 and 4 blocks.
    """

    def __init__(self, token_dim: int, width: int, depth: int, heads: int) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        self.width = width
        # the tokens of InternImage-H and -G are the sum of two convolutions, without a norm
        self.norm_in = nn.LayerNorm(token_dim, eps=LAYER_NORM_EPS)
        self.embed = nn.Linear(token_dim, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        norm: Any = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(width, token_dim)
        self.apply(init_linear_and_norm)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        x = self.embed(self.norm_in(tokens))  # (B, N, W)
        x = torch.where(visible.flatten(1)[..., None], x, self.mask_token)
        x = x + self.positions(visible.shape[1], visible.shape[2], x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def positions(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """(rows·columns, W), of the device and dtype of `like`; sines and cosines in float32."""
        from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

        table = build_sincos2d_pos_embed([rows, columns], self.width, device=like.device)
        return table.to(like.dtype)


def decoder_parameters(token_dim: int, width: int, depth: int) -> int:
    """The number of parameters of an `M3iDecoder`."""
    ends = 2 * token_dim * width + 4 * width + 3 * token_dim
    return ends + depth * (12 * width**2 + 13 * width)
