"""The layers of InternImage (arXiv 2211.05778), with the parameter names of the official code.

This file and those beside it are copied into every export and stand alone there.
Activations are (B, H, W, C).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_internimage import InternImageConfig

try:
    from groundwork.kernels.dcnv3 import choose_backend, dcnv3
except ImportError:
    choose_backend = dcnv3 = None  # type: ignore[assignment]

EPS = 1e-6
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class Linear(nn.Linear):
    """start: how weights begin that a checkpoint does not have: normal, xavier or zeros.

    transformers asks a module about its own parameters only, so a layer's parent cannot say.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, start: str = "normal"
    ) -> None:
        self.start = start
        super().__init__(in_features, out_features, bias=bias)


class ToChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class Stem(nn.Module):
    """(B, 3, H, W) -> (B, H/4, W/4, C)."""

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv1 = nn.Conv2d(3, channels // 2, 3, stride=2, padding=1)
        self.norm1 = nn.Sequential(
            ToChannelsLast(), nn.LayerNorm(channels // 2, eps=EPS), ToChannelsFirst()
        )
        self.act = ACTIVATIONS[config.act]()
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels, eps=EPS))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Downsample(nn.Module):
    """(B, H, W, C) -> (B, H/2, W/2, 2C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * 2, 3, stride=2, padding=1, bias=False)
        self.norm = nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels * 2, eps=EPS))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class Stage(nn.Module):
    """(B, H, W, C) -> its features, and the input (B, H/2, W/2, 2C) of the next stage."""

    #: Set by transformers where it checkpoints activations.
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: InternImageConfig, stage: int) -> None:
        super().__init__()
        channels, depth = config.channels * 2**stage, config.depths[stage]
        first, last = sum(config.depths[:stage]), max(sum(config.depths) - 1, 1)
        self.gradient_checkpointing = False
        self.post_norm_block_ids = config.level2_post_norm_block_ids if stage == 2 else []
        self.blocks = nn.ModuleList(
            Block(
                config,
                channels,
                config.groups[stage],
                config.drop_path
                * ((first + j) / last if config.drop_path_schedule == "linear" else 1),
            )
            for j in range(depth)
        )
        if self.post_norm_block_ids:
            self.post_norms = nn.ModuleList(_norm(channels) for _ in self.post_norm_block_ids)
        has_norm = config.norm != "post_norm" or config.center_feature_scale
        self.norm = _norm(channels) if has_norm else nn.Identity()
        self.downsample = Downsample(channels) if stage < 3 else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x)
            else:
                x = block(x)
            if i in self.post_norm_block_ids:
                x = self.post_norms[self.post_norm_block_ids.index(i)](x)
        features = self.norm(x)
        return features, self.downsample(features)


class Block(nn.Module):
    """For f = dcn or mlp, DP = stochastic depth and gamma = layer scale (1 without):

    pre_norm         x + DP(gamma · f(norm(x)))
    post_norm        x + DP(gamma · norm(f(x)))
    res_post_norm    x + DP(res_post_norm(f(norm(x))))
    """

    def __init__(
        self, config: InternImageConfig, channels: int, groups: int, drop_path: float
    ) -> None:
        super().__init__()
        self.scheme, self.drop_rate = config.norm, drop_path
        self.norm1 = _norm(channels)
        core = DCNv4 if config.core == "dcnv4" else DCNv3
        self.dcn = core(config, channels, groups)
        self.norm2 = _norm(channels)
        self.mlp = Mlp(config, channels)
        self.gamma1 = self.gamma2 = None
        if config.layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((channels,), config.layer_scale))
            self.gamma2 = nn.Parameter(torch.full((channels,), config.layer_scale))
        if config.norm == "res_post_norm":
            self.res_post_norm1 = _norm(channels)
            self.res_post_norm2 = _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme == "post_norm":
            x = self._add(x, self.norm1(self.dcn(x)), self.gamma1)
            return self._add(x, self.norm2(self.mlp(x)), self.gamma2)
        if self.scheme == "res_post_norm":
            x = self._add(x, self.res_post_norm1(self.dcn(self.norm1(x))), None)
            return self._add(x, self.res_post_norm2(self.mlp(self.norm2(x))), None)
        x = self._add(x, self.dcn(self.norm1(x)), self.gamma1)
        return self._add(x, self.mlp(self.norm2(x)), self.gamma2)

    def _add(self, x: Tensor, branch: Tensor, gamma: Tensor | None) -> Tensor:
        if gamma is not None:
            branch = branch * gamma
        if self.training and self.drop_rate > 0:
            keep = x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - self.drop_rate)
            branch = branch * (keep / (1 - self.drop_rate))
        return x + branch


class Mlp(nn.Module):
    def __init__(self, config: InternImageConfig, channels: int) -> None:
        super().__init__()
        hidden_channels = int(channels * config.mlp_ratio)
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.act = ACTIVATIONS[config.act]()
        self.fc2 = nn.Linear(hidden_channels, channels, bias=config.mlp_fc2_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DeformableConv(nn.Module):
    """What DCNv3 and DCNv4 share. uses_kernels: groundwork's, else operations of PyTorch."""

    def __init__(self, config: InternImageConfig, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.points = 9 - int(config.remove_center)
        self.offset_scale = config.offset_scale
        self.remove_center = config.remove_center
        self.uses_kernels = False
        self.center_feature_scale = config.center_feature_scale
        if config.center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(groups, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(groups))

    def sample(self, value: Tensor, offset: Tensor, mask: Tensor, softmax: bool) -> Tensor:
        """value: (B, H, W, C); offset: (B, H, W, G·P·2); mask: (B, H, W, G·P) -> (B, H, W, C)."""
        if self.uses_kernels:
            return dcnv3(
                value,
                offset,
                mask,
                kernel_size=3,
                groups=self.groups,
                offset_scale=self.offset_scale,
                remove_center=self.remove_center,
                softmax=softmax,
            )
        weights = mask.float().unflatten(-1, (self.groups, self.points))
        if softmax:
            weights = weights.softmax(-1)
        return sample_and_sum(value, offset, weights, self.offset_scale)

    def mix_with_centre(self, sampled: Tensor, centre: Tensor, guide: Tensor) -> Tensor:
        """All (B, H, W, C). By center_feature_scale, each group takes a part of the centre."""
        if not self.center_feature_scale:
            return sampled
        part = F.linear(
            guide, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
        )
        part = part.sigmoid().unsqueeze(-1)  # (B, H, W, G, 1)
        by_group = (self.groups, sampled.shape[-1] // self.groups)
        sampled, centre = sampled.unflatten(-1, by_group), centre.unflatten(-1, by_group)
        return (sampled + part * (centre - sampled)).flatten(3)


class DCNv3(DeformableConv):
    """Section 3.1 of the paper: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, config: InternImageConfig, channels: int, groups: int) -> None:
        super().__init__(config, channels, groups)
        kernel = config.dw_kernel_size or 3
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels),
            nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels, eps=EPS)),
            ACTIVATIONS[config.act](),
        )
        self.offset = Linear(channels, groups * self.points * 2, start="zeros")
        self.mask = Linear(channels, groups * self.points, start="zeros")
        self.input_proj = Linear(channels, channels, start="xavier")
        self.output_proj = Linear(channels, channels, start="xavier")

    def forward(self, x: Tensor) -> Tensor:
        value = self.input_proj(x)
        guide = self.dw_conv(x.permute(0, 3, 1, 2))
        sampled = self.sample(value, self.offset(guide), self.mask(guide), softmax=True)
        return self.output_proj(self.mix_with_centre(sampled, value, guide))


class DCNv4(DeformableConv):
    """Section 3 of arXiv 2401.06197: unbounded weights, packed with the offsets by group."""

    def __init__(self, config: InternImageConfig, channels: int, groups: int) -> None:
        super().__init__(config, channels, groups)
        kernel = config.dw_kernel_size
        self.offset_mask_dw = None
        if kernel is not None:
            self.offset_mask_dw = nn.Conv2d(
                channels, channels, kernel, padding=kernel // 2, groups=channels
            )
        packed = -(-3 * groups * self.points // 8) * 8
        self.offset_mask = Linear(channels, packed, start="zeros")
        self.value_proj = Linear(channels, channels, start="xavier")
        self.output_proj = Linear(channels, channels, bias=config.dcn_output_bias, start="xavier")

    def forward(self, x: Tensor) -> Tensor:
        value, guide = self.value_proj(x), x
        if self.offset_mask_dw is not None:
            guide = self.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        packed = self.offset_mask(guide)[..., : 3 * self.groups * self.points]
        packed = packed.unflatten(-1, (self.groups, 3 * self.points))
        offset, mask = packed.split((2 * self.points, self.points), dim=-1)
        sampled = self.sample(value, offset.flatten(3), mask.flatten(3), softmax=False)
        return self.output_proj(self.mix_with_centre(sampled, value, sampled))


def has_kernels() -> bool:
    """Whether groundwork is installed."""
    return dcnv3 is not None


def backend_of(tensor: Tensor) -> str:
    """Which of groundwork's kernels run on tensors like this one: cuda, cpu or reference."""
    probe = tensor.new_zeros(1, 1, 1, 18)
    return choose_backend("auto", probe, probe, probe)


def sample_and_sum(value: Tensor, offset: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The sampling of a 3×3 DCNv3 by `grid_sample`; its output has value's dtype.

    value: (B, H, W, G·D); offset: (B, H, W, G·P·2), (x, y) innermost, in pixels; weights:
    (B, H, W, G, P). For point p in column i and row j of -1, 0, 1, columns outermost, the sample
    lies at (x, y) + scale · ((i, j) + offset). Outside of the picture is zero. Coordinates are
    float32 in any case: bfloat16 has a step of a quarter pixel at 56.
    """
    batch, height, width, channels = value.shape
    groups, points = weights.shape[3:]
    device = value.device
    axis = torch.arange(-1.0, 2.0, device=device)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(9, 2)  # (x, y)
    if points == 8:  # without the centre
        grid = torch.cat((grid[:4], grid[5:]))
    offsets = offset.float().unflatten(-1, (groups, points, 2))  # (B, H, W, G, P, 2)
    xy = scale * (grid + offsets)
    x = xy[..., 0] + torch.arange(width, device=device).view(1, 1, width, 1, 1)
    y = xy[..., 1] + torch.arange(height, device=device).view(1, height, 1, 1, 1)
    # From -1 and from the size on, a sample is outside as a whole; further does not fit an integer.
    x = (x.clamp(-2, width + 1) * 2 + 1) / width - 1
    y = (y.clamp(-2, height + 1) * 2 + 1) / height - 1
    places = torch.stack((x, y), -1).permute(0, 3, 1, 2, 4, 5)  # (B, G, H, W, P, 2)
    images = value.float().unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2)  # (B, G, D, H, W)
    sampled = F.grid_sample(
        images.flatten(0, 1),
        places.reshape(batch * groups, height * width, points, 2),
        align_corners=False,
    )  # (B·G, D, H·W, P)
    factors = weights.permute(0, 3, 1, 2, 4).reshape(batch * groups, 1, height * width, points)
    output = (sampled * factors).sum(-1).reshape(batch, channels, height, width)
    return output.permute(0, 2, 3, 1).to(value.dtype)


class CrossAttention(nn.Module):
    """query: (B, 1, D), key, value: (B, N, D) -> (B, 1, out_dim)."""

    def __init__(self, dim: int, num_heads: int, out_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.k_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = self._heads(self.q(query) + self.q_bias)
        k = self._heads(self.k(key) + self.k_bias)
        v = self._heads(self.v(value) + self.v_bias)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).float().softmax(-1)
        return self.proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, D/heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class AttentionPool(nn.Module):
    """tokens: (B, N, D) -> (B, out_dim), attended by their mean."""

    def __init__(self, dim: int, num_heads: int, out_dim: int) -> None:
        super().__init__()
        self.norm1_q = nn.Sequential(nn.LayerNorm(dim, eps=EPS))
        self.norm1_k = nn.Sequential(nn.LayerNorm(dim, eps=EPS))
        self.norm1_v = nn.Sequential(nn.LayerNorm(dim, eps=EPS))
        self.cross_dcn = CrossAttention(dim, num_heads, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.norm1_q(tokens.mean(1, keepdim=True))
        return self.cross_dcn(query, self.norm1_k(tokens), self.norm1_v(tokens)).squeeze(1)


def _norm(channels: int) -> nn.Sequential:
    """In a Sequential because the official names say so (`norm1.0.weight`)."""
    return nn.Sequential(nn.LayerNorm(channels, eps=EPS))
