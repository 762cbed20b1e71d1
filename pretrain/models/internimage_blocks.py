"""What InternImage (arXiv 2211.05778, section 3.2) is stacked from; official parameter names."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundwork.kernels.residual_norm import residual_norm
from groundwork.pretrain.models.dcnv3_module import (
    LAYER_NORM_EPS,
    ToChannelsFirst,
    ToChannelsLast,
)
from groundwork.pretrain.models.initialisation import Conv2d, Linear

Norm = Literal["pre_norm", "post_norm", "res_post_norm"]


class Stem(nn.Module):
    """(B, 3, H, W) -> (B, H/4, W/4, C), odd sizes rounded up.

    The only change of layout in the network is here, of the image; its three channels are cheap.
    """

    def __init__(self, channels: int, act: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, channels // 2, 3, stride=2, padding=1)
        self.norm1 = nn.Sequential(
            ToChannelsLast(), nn.LayerNorm(channels // 2, eps=LAYER_NORM_EPS), ToChannelsFirst()
        )
        self.act = act()
        self.conv2 = Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels, eps=LAYER_NORM_EPS))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != 3 or 0 in x.shape[2:]:
            raise ValueError(f"InternImage: x has shape {tuple(x.shape)}; expected (B, 3, H, W)")
        if not x.is_floating_point():
            raise TypeError(
                f"InternImage: x is {str(x.dtype).removeprefix('torch.')}; expected pictures in "
                "floating point, less ImageNet's mean and over its deviation"
            )
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Stage(nn.Module):
    """x: (B, H, W, C) -> the features (B, H, W, C), and the input (B, H/2, W/2, 2C) of the next.

    Without a downsampling (the last stage) the two are the same.
    """

    def __init__(
        self,
        blocks: Sequence["Block"],
        channels: int,
        *,
        has_norm: bool,
        has_downsample: bool,
        post_norm_block_ids: Sequence[int] = (),
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.blocks = nn.ModuleList(blocks)
        self.post_norm_block_ids = tuple(post_norm_block_ids)
        if self.post_norm_block_ids:
            self.post_norms = nn.ModuleList(_layer_norm(channels) for _ in post_norm_block_ids)
        self.norm = _layer_norm(channels) if has_norm else nn.Identity()
        self.downsample = Downsample(channels) if has_downsample else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if i in self.post_norm_block_ids:
                x = self.post_norms[self.post_norm_block_ids.index(i)](x)
        features = self.norm(x)
        return features, self.downsample(features)


class Downsample(nn.Module):
    """(B, H, W, C) -> (B, H/2, W/2, 2C), odd sizes rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels * 2, 3, stride=2, padding=1, bias=False)
        self.norm = nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels * 2, eps=LAYER_NORM_EPS))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class Block(nn.Module):
    """A deformable convolution and an MLP, each with a residual: (B, H, W, C) -> (B, H, W, C).

    For f = dcn or mlp, DP = stochastic depth and gamma = layer scale (1 without):

        pre_norm         x + DP(gamma · f(norm(x)))
        post_norm        x + DP(gamma · norm(f(x)))
        res_post_norm    x + DP(res_post_norm(f(norm(x))))
    """

    def __init__(
        self,
        channels: int,
        dcn: nn.Module,
        mlp: nn.Module,
        *,
        norm: Norm = "pre_norm",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.norm_scheme = norm
        # The plain layers are the reference of the fused ones.
        self.backend = "reference" if backend == "reference" else "auto"
        self.norm1 = _branch_norm(channels)
        self.dcn = dcn
        self.norm2 = _branch_norm(channels)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((channels,), layer_scale))
            self.gamma2 = nn.Parameter(torch.full((channels,), layer_scale))
        if norm == "res_post_norm":
            self.res_post_norm1 = _layer_norm(channels)
            self.res_post_norm2 = _layer_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        outer1 = self.res_post_norm1 if self.norm_scheme == "res_post_norm" else None
        outer2 = self.res_post_norm2 if self.norm_scheme == "res_post_norm" else None
        x = self._add_branch(x, self.dcn, self.norm1, self.gamma1, outer1)
        return self._add_branch(x, self.mlp, self.norm2, self.gamma2, outer2)

    def _add_branch(
        self,
        x: Tensor,
        function: nn.Module,
        norm: nn.Sequential,
        gamma: Tensor | None,
        outer_norm: nn.Sequential | None,
    ) -> Tensor:
        """x + DP(branch of x). With post_norm and gamma it is one op, without gamma that is not
        faster.

        The branches of dropped samples are computed, too: what a rank has drawn must not decide
        what it computes, as ZeRO-3 gathers parameters in the order of the computation.
        """
        keep = None
        if self.training and self.drop_path.drop_prob > 0:
            keep = self.drop_path(x.new_ones(len(x), 1)).flatten()  # (B,), 0 or 1 / (1 - p)
        if self.norm_scheme == "post_norm":
            y = function(x)
            if gamma is not None:
                fused: Tensor = norm[0](y, residual=x, gamma=gamma, keep=keep, backend=self.backend)
                return fused
            y = norm(y)
        else:
            y = _scaled(function(norm(x)), gamma)
            if outer_norm is not None:
                y = outer_norm(y)
        return x + (y if keep is None else y * keep.to(y.dtype).view(-1, 1, 1, 1))


class BranchNorm(nn.LayerNorm):
    """LayerNorm of a branch y; with a residual, residual + keep · gamma · LayerNorm(y) as one op.

    The sum is made here, since under ZeRO-3 the norm's parameters are there only while it runs.
    """

    def forward(
        self,
        y: Tensor,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        keep: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        if residual is None or gamma is None:
            return super().forward(y)
        return residual_norm(
            residual, y, self.weight, self.bias, gamma, keep=keep, eps=self.eps, backend=backend
        )


class Mlp(nn.Module):
    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        act: Callable[[], nn.Module] = nn.GELU,
        *,
        fc2_bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = Linear(channels, hidden_channels)
        self.act = act()
        self.fc2 = Linear(hidden_channels, channels, bias=fc2_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


def _branch_norm(channels: int) -> nn.Sequential:
    return nn.Sequential(BranchNorm(channels, eps=LAYER_NORM_EPS))


def _layer_norm(channels: int) -> nn.Sequential:
    """In a Sequential because the official names say so (`norm1.0.weight`)."""
    return nn.Sequential(nn.LayerNorm(channels, eps=LAYER_NORM_EPS))
