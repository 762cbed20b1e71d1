"""The DCNv3 layer of InternImage (arXiv 2211.05778, section 3.1): the op with what feeds it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwork.kernels.dcnv3 import dcnv3
from groundwork.kernels.depthwise_norm_gelu import depthwise_norm_gelu
from groundwork.pretrain.models.initialisation import Conv2d, Linear

#: Of every LayerNorm in InternImage.
LAYER_NORM_EPS = 1e-6


class ToChannelsLast(nn.Module):
    """(B, C, H, W) -> (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    """(B, H, W, C) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class DepthwiseNormAct(nn.Sequential):
    """A depthwise convolution, LayerNorm and activation: (B, H, W, C) -> (B, H, W, C).

    With GELU they are one op, which needs the parameters of two modules at once. Each module reads
    its own while its forward runs, one inside the other: ZeRO-3 gathers them for just that time.
    """

    def __init__(
        self, channels: int, kernel_size: int, act: Callable[[], nn.Module], backend: str
    ) -> None:
        convolution = _DepthwiseConv(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels
        )
        norm = _NormGelu(channels, eps=LAYER_NORM_EPS)
        super().__init__(convolution, nn.Sequential(ToChannelsLast(), norm), act())
        # The plain layers are the op's reference.
        self.backend = "reference" if backend == "reference" else "auto"

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm, act = self
        if type(act) is nn.GELU and act.approximate == "none":
            (_, inner) = norm.children()
            output: Tensor = convolution(x, norm=inner, backend=self.backend)
            return output
        activated: Tensor = act(norm(convolution(x.permute(0, 3, 1, 2))))
        return activated


class _DepthwiseConv(Conv2d):
    """x: (B, C, H, W); with a norm (B, H, W, C), and GELU(norm(convolution of x)) as one op."""

    def forward(self, x: Tensor, norm: nn.Module | None = None, backend: str = "auto") -> Tensor:
        if norm is None:
            return super().forward(x)
        output: Tensor = norm(x, weight=self.weight, bias=self.bias, backend=backend)
        return output


class _NormGelu(nn.LayerNorm):
    """LayerNorm; with the weight of a convolution, that and a GELU around it."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        if weight is None or bias is None:
            return super().forward(x)
        return depthwise_norm_gelu(
            x, weight, bias, self.weight, self.bias, eps=self.eps, backend=backend
        )


class DCNv3(nn.Module):
    """x: (B, H, W, C) -> (B, H, W, C).

    A separable convolution of the raw input gives the offsets and the mask; the op samples the
    projected input. With `center_feature_scale`, each group of each pixel mixes its sum with the
    projected input there. The padding keeps the size, so kernels are odd.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        *,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        dilation: int = 1,
        offset_scale: float = 1.0,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        act: Callable[[], nn.Module] = nn.GELU,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        dw_kernel_size = kernel_size if dw_kernel_size is None else dw_kernel_size
        check_layer("DCNv3", channels, groups, kernel_size, dw_kernel_size)
        self.groups = groups
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.offset_scale = offset_scale
        self.center_feature_scale = center_feature_scale
        self.remove_center = remove_center
        self.backend = backend

        points = kernel_size**2 - int(remove_center)
        self.dw_conv = DepthwiseNormAct(channels, dw_kernel_size, act, backend)
        # It starts on the regular grid with equal weights, and an even mix with the centre.
        self.offset = Linear(channels, groups * points * 2, start="zeros")
        self.mask = Linear(channels, groups * points, start="zeros")
        self.input_proj = Linear(channels, channels, start="xavier")
        self.output_proj = Linear(channels, channels, start="xavier")
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(groups, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(groups))

    def forward(self, x: Tensor) -> Tensor:
        projected = self.input_proj(x)
        guide = self.dw_conv(x)  # (B, H, W, C)
        sampled = dcnv3(
            projected,
            self.offset(guide),
            self.mask(guide),
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            groups=self.groups,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
            softmax=True,
            backend=self.backend,
        )
        if self.center_feature_scale:
            scale = F.linear(
                guide, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            )
            sampled = mix_with_centre(sampled, projected, scale)
        return self.output_proj(sampled)


def mix_with_centre(sampled: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """sampled, centre: (B, H, W, C); scale: (B, H, W, G), of which a sigmoid is the centre's part.

    -> (B, H, W, C), the same part for all channels of a group.
    """
    part = scale.sigmoid().unsqueeze(-1)  # (B, H, W, G, 1)
    by_group = (scale.shape[-1], -1)
    sampled, centre = sampled.unflatten(-1, by_group), centre.unflatten(-1, by_group)
    return (sampled + part * (centre - sampled)).flatten(3)


def check_layer(
    layer: str, channels: int, groups: int, kernel_size: int, dw_kernel_size: int | None
) -> None:
    """Raises ValueError for sizes that a deformable layer cannot have."""
    if channels % groups != 0:
        raise ValueError(
            f"{layer}: {channels} channels in {groups} groups; "
            "choose groups that divide the channels"
        )
    if kernel_size % 2 == 0 or (dw_kernel_size is not None and dw_kernel_size % 2 == 0):
        raise ValueError(
            f"{layer}: kernel_size is {kernel_size}, dw_kernel_size is {dw_kernel_size}; an even "
            "one changes the size of the image, give odd ones"
        )
