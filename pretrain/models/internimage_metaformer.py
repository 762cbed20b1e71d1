"""InternImage of iNaturalist: where and when a picture was taken adds to its logits.

After MetaFormer (arXiv 2203.02751), whose encoder of such facts it has; parameter names are those
of the public code.
"""

import torch
from torch import Tensor, nn

from groundwork.pretrain.models.dcnv3_module import LAYER_NORM_EPS
from groundwork.pretrain.models.initialisation import Linear
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig

#: Numbers that say when, and where.
TEMPORAL, SPATIAL = 4, 3


class FactEncoder(nn.Module):
    """Two layers with a residual around both. x: (B, D) -> (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.nonlin1 = nn.ReLU()
        self.nonlin2 = nn.ReLU()
        self.norm_fn1 = nn.LayerNorm(dim)
        self.norm_fn2 = nn.LayerNorm(dim)
        self.w1 = Linear(dim, dim)
        self.w2 = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_fn1(self.nonlin1(self.w1(x)))
        return x + self.norm_fn2(self.nonlin2(self.w2(y)))


class InternImageMetaFormer(InternImage):
    """images: (B, 3, H, W), temporal: (B, 4), spatial: (B, 3) -> logits (B, num_classes).

    A subclass, as the official checkpoints have the new parts beside the old ones.
    """

    def __init__(self, config: InternImageConfig, meta_dim: int = 64) -> None:
        if config.num_classes < 1:
            raise ValueError(
                "InternImageMetaFormer: num_classes is 0; the facts add to logits, give classes"
            )
        super().__init__(config)
        self.meta_head_1 = _branch(TEMPORAL, meta_dim)
        self.meta_head_2 = _branch(SPATIAL, meta_dim)
        self.meta_norm = nn.LayerNorm(meta_dim * 2, eps=LAYER_NORM_EPS)
        self.meta_head = Linear(meta_dim * 2, config.num_classes)

    def forward(  # type: ignore[override]  # it takes what InternImage does not know of
        self, x: Tensor, temporal: Tensor, spatial: Tensor
    ) -> Tensor:
        for name, facts, width in (("temporal", temporal, TEMPORAL), ("spatial", spatial, SPATIAL)):
            if facts.shape != (len(x), width):
                raise ValueError(
                    f"InternImageMetaFormer: {name} has shape {tuple(facts.shape)}; expected "
                    f"({len(x)}, {width})"
                )
        facts = torch.cat([self.meta_head_1(temporal), self.meta_head_2(spatial)], dim=-1)
        return super().forward(x) + self.meta_head(self.meta_norm(facts))


def _branch(numbers: int, dim: int) -> nn.Sequential:
    return nn.Sequential(Linear(numbers, dim), nn.ReLU(), nn.LayerNorm(dim), FactEncoder(dim))
