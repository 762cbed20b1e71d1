"""Multi-scale deformable attention (arXiv 2010.04159, eq. 3): each query looks at a few places.

The places are sampled by transformers' module, which is plain PyTorch (grid_sample per level) and
runs on every device; the learned parts around it are here, with the original names.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.deformable_detr.modeling_deformable_detr import (
    MultiScaleDeformableAttention,
)

#: Height and width of each level, from fine to coarse.
Shapes = Sequence[tuple[int, int]]


class DeformableAttention(nn.Module):
    """width: of queries and memory, a multiple of `heads`. points: per head, level and query.

    queries: (B, N, width), with their positions added -> (B, N, width).
    reference: (B, N, levels, 4), boxes as centre, width and height in parts of the padded picture;
        offsets are then in half boxes. Or (B, N, levels, 2), points; offsets are then in cells.
    memory: (B, S, width), the levels one after the other, row by row. shapes: of the levels.
    padding: (B, S), bool, True where memory belongs to no picture; None for nowhere.
    """

    def __init__(self, width: int, heads: int = 8, levels: int = 4, points: int = 4) -> None:
        super().__init__()
        if width % heads != 0:
            raise ValueError(
                f"DeformableAttention: width {width} is not a multiple of {heads} heads; choose "
                "heads that divide it"
            )
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.sample = MultiScaleDeformableAttention()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each head looks into its own direction, its points one to `points` cells away."""
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)
        offsets = direction[:, None, None] * steps[None, None, :, None]  # (heads, 1, points, 2)
        offsets = offsets.expand(-1, self.levels, -1, -1).reshape(-1)
        self.sampling_offsets.bias.copy_(offsets)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        queries: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        padding: Tensor | None = None,
    ) -> Tensor:
        B, N, width = queries.shape
        value = self.value_proj(memory)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0)
        value = value.unflatten(-1, (self.heads, width // self.heads))  # (B, S, heads, D)
        grid = (B, N, self.heads, self.levels, self.points)
        weights = self.attention_weights(queries).float().view(*grid[:3], -1)
        weights = F.softmax(weights, -1).view(grid)
        offsets = self.sampling_offsets(queries).float().view(*grid, 2)
        locations = _locations(reference.float(), offsets, shapes)
        # in float32: bf16 cannot tell neighbouring pixels of a large picture apart
        with torch.autocast(queries.device.type, enabled=False):
            sampled = self.sample(value.float(), None, list(shapes), None, locations, weights, 64)
        return self.output_proj(sampled.to(queries.dtype))


def _locations(reference: Tensor, offsets: Tensor, shapes: Shapes) -> Tensor:
    """Where to sample, in parts of the padded picture. offsets, and they: (B, N, heads, levels,
    points, 2)."""
    reference = reference[:, :, None, :, None]  # (B, N, 1, levels, 1, 2 or 4)
    if reference.shape[-1] == 4:
        return reference[..., :2] + offsets / offsets.shape[-2] * reference[..., 2:] * 0.5
    cells = torch.tensor([(w, h) for h, w in shapes], dtype=offsets.dtype, device=offsets.device)
    return reference + offsets / cells[:, None]
