"""InternImage in plain PyTorch, as people run it without the official CUDA extension.

Written from the description of the official code: DCNv3 by padding and `grid_sample`, LayerNorm
between permutes, convolutions on (B, C, H, W) views of channels-last activations. T, S and B only:
pre-norm, or post-norm with layer scale. Parameter names are the official ones, so that weights of
our model load and the two are compared before they are timed.
"""

from collections.abc import Callable

import torch
from dcnv3_peers import grid_sample_core
from timm.layers.drop import DropPath
from torch import Tensor, nn

EPS = 1e-6
Core = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


def to_last() -> Permute:
    return Permute(0, 2, 3, 1)


def to_first() -> Permute:
    return Permute(0, 3, 1, 2)


def layer_norm(channels: int) -> nn.LayerNorm:
    return nn.LayerNorm(channels, eps=EPS)


class PeerDcnv3(nn.Module):
    """x: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, groups: int, core: Core) -> None:
        super().__init__()
        self.groups, self.core = groups, core
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.Sequential(to_last(), layer_norm(channels)),
            nn.GELU(),
        )
        self.offset = nn.Linear(channels, groups * 18)
        self.mask = nn.Linear(channels, groups * 9)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, _ = x.shape
        projected = self.input_proj(x)
        guide = self.dw_conv(x.permute(0, 3, 1, 2))
        offset = self.offset(guide)
        mask = self.mask(guide).view(n, h, w, self.groups, 9).softmax(-1).flatten(3)
        mask = mask.to(projected.dtype)
        return self.output_proj(self.core(projected, offset, mask, self.groups))


class PeerMlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc2(self.act(self.fc1(x)))
        return output


class PeerBlock(nn.Module):
    def __init__(
        self, channels: int, groups: int, layer_scale: float | None, drop_path: float, core: Core
    ) -> None:
        super().__init__()
        self.norm1 = nn.Sequential(layer_norm(channels))
        self.dcn = PeerDcnv3(channels, groups, core)
        self.norm2 = nn.Sequential(layer_norm(channels))
        self.mlp = PeerMlp(channels)
        self.drop_path = DropPath(drop_path)
        self.is_post_norm = layer_scale is not None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((channels,), layer_scale))
            self.gamma2 = nn.Parameter(torch.full((channels,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_post_norm:
            x = x + self.drop_path(self.gamma1 * self.norm1(self.dcn(x)))
            return x + self.drop_path(self.gamma2 * self.norm2(self.mlp(x)))
        x = x + self.drop_path(self.dcn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PeerStem(nn.Module):
    """(B, 3, H, W) -> (B, H/4, W/4, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1)
        self.norm1 = nn.Sequential(to_last(), layer_norm(half), to_first())
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(half, channels, 3, stride=2, padding=1)
        self.norm2 = nn.Sequential(to_last(), layer_norm(channels))

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.norm2(self.conv2(self.act(self.norm1(self.conv1(images)))))
        return output


class PeerDownsample(nn.Module):
    """(B, H, W, C) -> (B, H/2, W/2, 2C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.Sequential(to_last(), layer_norm(2 * channels))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(self.conv(x.permute(0, 3, 1, 2)))
        return output


class PeerStage(nn.Module):
    def __init__(self, blocks: list[PeerBlock], channels: int, norm: bool, last: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Sequential(layer_norm(channels)) if norm else nn.Identity()
        self.downsample = nn.Identity() if last else PeerDownsample(channels)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.downsample(self.norm(self.blocks(x)))
        return output


class PeerInternImage(nn.Module):
    """images (B, 3, H, W) -> logits (B, num_classes). core: what samples, see `dcnv3_peers`."""

    def __init__(
        self,
        channels: int,
        depths: tuple[int, ...],
        groups: tuple[int, ...],
        layer_scale: float | None,
        drop_path: float,
        num_classes: int = 1000,
        core: Core = grid_sample_core,
    ) -> None:
        super().__init__()
        width = 8 * channels
        self.patch_embed = PeerStem(channels)
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        self.levels = nn.Sequential(
            *(
                PeerStage(
                    [
                        PeerBlock(channels << i, groups[i], layer_scale, next(rates), core)
                        for _ in range(depth)
                    ],
                    channels << i,
                    norm=layer_scale is None,
                    last=i == len(depths) - 1,
                )
                for i, depth in enumerate(depths)
            )
        )
        self.conv_head = nn.Sequential(
            nn.Conv2d(width, width * 3 // 2, 1, bias=False),
            nn.Sequential(nn.BatchNorm2d(width * 3 // 2)),
            nn.GELU(),
        )
        self.head = nn.Linear(width * 3 // 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.levels(self.patch_embed(images))
        x = self.conv_head(x.permute(0, 3, 1, 2))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
