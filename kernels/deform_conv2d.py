"""DCNv2, the modulated deformable convolution of DyHead (arXiv 1811.11168)."""

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

from groundwork.kernels.dcnv3_geometry import Size2d, check_tensor, size_pair

OP = "modulated_deform_conv2d"


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
    """torchvision's op in float32, float64 if an input is; returned in x.dtype (torchvision has no
    bfloat16).

    x: (N, C, H, W); offset: (N, groups·2·P, Ho, Wo), rows of the kernel outermost, (y, x); mask:
    (N, groups·P, Ho, Wo), not normalised; weight: (K, C/convolution groups, kh, kw); bias: (K,)
    -> (N, K, Ho, Wo).
    """
    stride_hw = size_pair(OP, "stride", stride, least=1)
    padding_hw = size_pair(OP, "padding", padding, least=0)
    dilation_hw = size_pair(OP, "dilation", dilation, least=1)
    if mask is None:
        raise TypeError(f"{OP}: mask is None; for DCNv1, without one, give torch.ones")
    named = {"x": x, "offset": offset, "mask": mask, "weight": weight}
    tensors = named if bias is None else {**named, "bias": bias}
    for name, tensor in tensors.items():
        check_tensor(OP, name, tensor, x, "x")
    _check_shapes(named, bias, stride_hw, padding_hw, dilation_hw)
    double = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    dtype = torch.float64 if double else torch.float32
    output: Tensor = deform_conv2d(
        x.to(dtype),
        offset.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        stride=stride_hw,
        padding=padding_hw,
        dilation=dilation_hw,
        mask=mask.to(dtype),
    )
    return output.to(x.dtype)


def _check_shapes(
    named: dict[str, Tensor],
    bias: Tensor | None,
    stride_hw: tuple[int, int],
    padding_hw: tuple[int, int],
    dilation_hw: tuple[int, int],
) -> None:
    """That the tensors fit together: torchvision ends the process, or reads beyond, if not."""
    layouts = {
        "x": "(N, C, H, W)",
        "offset": "(N, groups·2·P, Ho, Wo)",
        "mask": "(N, groups·P, Ho, Wo)",
        "weight": "(K, C/convolution groups, kh, kw)",
    }
    for name, tensor in named.items():
        if tensor.dim() != 4:
            _refuse(name, tensor, layouts[name])
    x, offset, weight = named["x"], named["offset"], named["weight"]
    n, channels, *image_hw = x.shape
    outputs, depth, *kernel_hw = weight.shape
    if min(outputs, depth, *kernel_hw) < 1 or channels < 1:
        _refuse("weight", weight, f"{layouts['weight']}, all at least 1, for x {tuple(x.shape)}")
    if channels % depth or outputs % (channels // depth):
        _refuse(
            "weight", weight, f"{layouts['weight']} with groups that divide C = {channels} and K"
        )
    sizes = zip(image_hw, kernel_hw, stride_hw, padding_hw, dilation_hw, strict=True)
    ho, wo = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
    if min(*image_hw, ho, wo) < 1:
        raise ValueError(
            f"{OP}: an image of {image_hw[0]}×{image_hw[1]} has an output of {ho}×{wo} with a "
            f"kernel of {kernel_hw[0]}×{kernel_hw[1]}, stride {stride_hw}, padding {padding_hw} "
            f"and dilation {dilation_hw}; use a larger image or more padding"
        )
    points = kernel_hw[0] * kernel_hw[1]
    groups = offset.shape[1] // (2 * points)
    if offset.shape[1] != groups * 2 * points or groups < 1 or channels % groups:
        expected = f"{layouts['offset']} with P = {points} and groups that divide C = {channels}"
        _refuse("offset", offset, expected)
    for name, depth in (("offset", groups * 2 * points), ("mask", groups * points)):
        if tuple(named[name].shape) != (n, depth, ho, wo):
            _refuse(name, named[name], f"{(n, depth, ho, wo)} = {layouts[name]} with P = {points}")
    if bias is not None and tuple(bias.shape) != (outputs,):
        _refuse("bias", bias, f"{(outputs,)} = (K,)")


def _refuse(name: str, tensor: Tensor, expected: Any) -> None:
    raise ValueError(f"{OP}: {name} has shape {tuple(tensor.shape)}; expected {expected}")
