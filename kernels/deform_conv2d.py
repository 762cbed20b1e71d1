"""DCNv2, the modulated deformable convolution of DyHead (arXiv 1811.11168)."""

from torch import Tensor
from torchvision.ops import deform_conv2d

from groundwork.kernels.dcnv3_geometry import Size2d


def modulated_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size2d = 1,
    padding: Size2d = 0,
    dilation: Size2d = 1,
) -> Tensor:
    """torchvision's op, in float32 and returned in x.dtype (torchvision has no bfloat16).

    x: (N, C, H, W); offset: (N, groups·2·P, Ho, Wo), rows of the kernel outermost, (y, x); mask:
    (N, groups·P, Ho, Wo), not normalised; weight: (K, C/convolution groups, kh, kw)
    -> (N, K, Ho, Wo).
    """
    output: Tensor = deform_conv2d(
        x.float(),
        offset.float(),
        weight.float(),
        None if bias is None else bias.float(),
        stride=stride,
        padding=padding,
        dilation=dilation,
        mask=mask.float(),
    )
    return output.to(x.dtype)
