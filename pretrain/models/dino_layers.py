"""Layers of DINO (arXiv 2203.03605): those of Deformable DETR, with positions made from boxes."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundwork.pretrain.models.deformable_attention import DeformableAttention, Shapes


class EncoderLayer(nn.Module):
    """Every cell of the pyramid looks at a few others. x, positions, and the result: (B, S, width).

    reference: (B, S, levels, 2), the centre of each cell.
    """

    def __init__(
        self, width: int, heads: int, levels: int, points: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(width, heads, levels, points)
        self.norm1 = nn.LayerNorm(width)
        self.ffn = FeedForward(width, hidden, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, positions: Tensor, reference: Tensor, shapes: Shapes, padding: Tensor
    ) -> Tensor:
        found = self.self_attn(x + positions, reference, x, shapes, padding)
        x = self.norm1(x + self.dropout(found))
        return self.norm2(x + self.ffn(x))


class DecoderLayer(nn.Module):
    """Queries look at each other, then into the pyramid. x, positions: (B, N, width).

    reference: (B, N, levels, 4), the box of each query. memory: (B, S, width).
    blocked: (N, N), bool, True where a query (row) may not look at another one; None for nowhere.
    """

    def __init__(
        self, width: int, heads: int, levels: int, points: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, heads, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn = DeformableAttention(width, heads, levels, points)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = FeedForward(width, hidden, dropout)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        padding: Tensor,
        blocked: Tensor | None,
    ) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x, positions, blocked)))
        found = self.cross_attn(x + positions, reference, memory, shapes, padding)
        x = self.norm2(x + self.dropout(found))
        return self.norm3(x + self.ffn(x))


class SelfAttention(nn.Module):
    """Positions are added to queries and keys, not to values. x, positions: (B, N, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, positions: Tensor, blocked: Tensor | None) -> Tensor:
        placed = x + positions
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D)
            for projected in (self.q_proj(placed), self.k_proj(placed), self.v_proj(x))
        )
        allowed = None if blocked is None else ~blocked
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """x: (..., width) -> (..., width), through `hidden` and a ReLU."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.relu(self.fc1(x)))))


class Perceptron(nn.Module):
    """Linear layers of the given widths, with ReLU between."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def cell_positions(inside: Tensor, width: int, temperature: float = 20.0) -> Tensor:
    """Sine positions of the cells of one level, in parts of the picture without its padding.

    inside: (B, H, W), bool, True within the picture -> (B, H·W, width) float32: y, then x.
    """
    counted = inside.float()
    y, x = counted.cumsum(1), counted.cumsum(2)
    y, x = y / (y[:, -1:] + 1e-6), x / (x[:, :, -1:] + 1e-6)
    return torch.cat([_sines(v, width // 2, temperature) for v in (y, x)], -1).flatten(1, 2)


def box_positions(boxes: Tensor, width: int) -> Tensor:
    """boxes: (B, N, 4), centre x and y, width and height -> (B, N, 2·width): of y, x, w, h."""
    x, y, w, h = boxes.float().unbind(-1)
    return torch.cat([_sines(v, width // 2, 10_000.0) for v in (y, x, w, h)], -1)


def _sines(values: Tensor, features: int, temperature: float) -> Tensor:
    """(...) -> (..., features): sine and cosine in turn, ever slower; a period is 0 to 1."""
    exponent = torch.arange(features, device=values.device).div(2, rounding_mode="floor")
    angle = values[..., None] * 2 * math.pi / temperature ** (2 * exponent / features)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2)
