"""The DCNv4 layer of FlashInternImage (arXiv 2401.06197, section 3): the op with what feeds it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwork.kernels.dcnv4 import dcnv4, packed_channels
from groundwork.pretrain.models.dcnv3_module import check_layer, mix_with_centre
from groundwork.pretrain.models.initialisation import Conv2d, Linear


class DCNv4(nn.Module):
    """x: (B, H, W, C) -> (B, H, W, C).

    Offsets and unbounded weights come from one linear map of x, or of a depthwise convolution of x
    where `dw_kernel_size` is given. It starts at zero, and with it the weights: a new layer gives
    the bias of its output projection. With `center_feature_scale`, each group of each pixel mixes
    its sum with the projected input there, by as much as the sum says (the sum, where DCNv3 asks
    the convolution).
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
        output_bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_layer("DCNv4", channels, groups, kernel_size, dw_kernel_size)
        self.groups = groups
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.offset_scale = offset_scale
        self.center_feature_scale = center_feature_scale
        self.remove_center = remove_center
        self.backend = backend

        points = kernel_size**2 - int(remove_center)
        self.offset_mask_dw: nn.Module | None = None
        if dw_kernel_size is not None:
            self.offset_mask_dw = Conv2d(
                channels, channels, dw_kernel_size, padding=dw_kernel_size // 2, groups=channels
            )
        self.offset_mask = Linear(channels, packed_channels(groups, points), start="zeros")
        self.value_proj = Linear(channels, channels, start="xavier")
        self.output_proj = Linear(channels, channels, bias=output_bias, start="xavier")
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(groups, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(groups))

    def forward(self, x: Tensor) -> Tensor:
        value = self.value_proj(x)
        guide = x
        if self.offset_mask_dw is not None:
            guide = self.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        sampled = dcnv4(
            value,
            self.offset_mask(guide),
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            groups=self.groups,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
            backend=self.backend,
        )
        if self.center_feature_scale:
            scale = F.linear(
                sampled, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
            )
            sampled = mix_with_centre(sampled, value, scale)
        return self.output_proj(sampled)
