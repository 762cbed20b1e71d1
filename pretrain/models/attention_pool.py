"""Attention pooling with the mean token as query, the `clip_projector` of InternImage-H and -G."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwork.pretrain.models.initialisation import Linear


class CrossAttention(nn.Module):
    """query: (B, M, D), key, value: (B, N, D) -> (B, M, out_dim).

    The projections' biases are parameters of their own, as in the official weights.
    """

    def __init__(self, dim: int, num_heads: int, out_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim, bias=False)
        self.k = Linear(dim, dim, bias=False)
        self.v = Linear(dim, dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.k_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, out_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # The weights are applied by the layers that own them, where ZeRO-3 has gathered them.
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, D/heads)
            for x in (
                self.q(query) + self.q_bias,
                self.k(key) + self.k_bias,
                self.v(value) + self.v_bias,
            )
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class AttentionPool(nn.Module):
    """tokens: (B, N, D) -> (B, out_dim), attended by their mean."""

    def __init__(self, dim: int, num_heads: int, out_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1_q = nn.Sequential(nn.LayerNorm(dim, eps=norm_eps))
        self.norm1_k = nn.Sequential(nn.LayerNorm(dim, eps=norm_eps))
        self.norm1_v = nn.Sequential(nn.LayerNorm(dim, eps=norm_eps))
        self.cross_dcn = CrossAttention(dim, num_heads, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.norm1_q(tokens.mean(1, keepdim=True))
        return self.cross_dcn(query, self.norm1_k(tokens), self.norm1_v(tokens)).squeeze(1)
