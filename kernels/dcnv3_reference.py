"""DCNv3 in standard PyTorch operations: the definition of correct, for every device and dtype."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from groundwork.kernels.dcnv3_geometry import (
    Geometry,
    Size2d,
    check_tensors,
    make_geometry,
    statement,
)


def dcnv3_reference(
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    kernel_size: Size2d,
    stride: Size2d = 1,
    padding: Size2d | None = None,
    dilation: Size2d = 1,
    groups: int,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:
    """`dcnv3` in standard PyTorch operations, the definition of correct; arguments as there."""
    geometry = make_geometry(
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center
    )
    softmax = statement("dcnv3_reference", "softmax", softmax)
    check_tensors(value, offset, mask, geometry)
    return reference_forward(value, offset, mask, geometry, softmax)


def reference_forward(
    value: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool
) -> Tensor:
    n, height, width, channels = value.shape
    dtype = _compute_dtype(value, offset, mask)
    rows = _image_rows(value, geometry, dtype)  # (N·H·W·G + 1, D)
    origin, outside = _row_origin(value, offset, geometry), rows.shape[0] - 1  # (M,), M = N·Ho·Wo·G
    weights = _point_weights(mask, geometry, dtype, softmax)  # (P, M)
    x, y, counts = _coordinates(offset, (height, width), geometry, dtype)  # (P, M) each
    # Chosen, not multiplied by zero: outside even a weight that is no number contributes nothing.
    weights = weights.where(counts, 0)
    output = rows.new_zeros(weights.shape[1], rows.shape[1])
    for p in range(geometry.num_points):
        for corner in _corners(x[p], y[p], origin, outside, (height, width), geometry):
            weight = (weights[p] * corner.weight).unsqueeze(-1)
            output = torch.addcmul(output, weight, rows.index_select(0, corner.row))
    ho, wo = geometry.output_hw(height, width)
    return output.reshape(n, ho, wo, channels).to(value.dtype)


def reference_backward(
    grad_output: Tensor,
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    geometry: Geometry,
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in closed form, one kernel point at a time: autograd through the forward would
    keep 4·P copies of the output."""
    _, height, width, _ = value.shape
    dtype = _compute_dtype(value, offset, mask)
    rows = _image_rows(value, geometry, dtype)  # (N·H·W·G + 1, D)
    origin, outside = _row_origin(value, offset, geometry), rows.shape[0] - 1  # (M,), M = N·Ho·Wo·G
    weights = _point_weights(mask, geometry, dtype, softmax)  # (P, M)
    x, y, counts = _coordinates(offset, (height, width), geometry, dtype)  # (P, M) each
    used = weights.where(counts, 0)
    grad = grad_output.to(dtype).reshape(weights.shape[1], rows.shape[1])  # (M, D)
    grad_rows = torch.zeros_like(rows)
    grad_weights, grad_x, grad_y = (torch.zeros_like(weights) for _ in range(3))
    for p in range(geometry.num_points):
        for corner in _corners(x[p], y[p], origin, outside, (height, width), geometry):
            product = (grad * rows.index_select(0, corner.row)).sum(-1).where(counts[p], 0)  # (M,)
            grad_weights[p] += corner.weight * product
            grad_x[p] += corner.slope_x * product
            grad_y[p] += corner.slope_y * product
            weight = (used[p] * corner.weight).unsqueeze(-1)
            grad_rows.index_add_(0, corner.row, grad * weight)
    grad_xy = torch.stack((grad_x, grad_y), -1) * used.unsqueeze(-1) * geometry.offset_scale
    if softmax:
        grad_weights = weights * (grad_weights - (weights * grad_weights).sum(0, keepdim=True))
    return (
        grad_rows[:-1].reshape(value.shape).to(value.dtype),
        grad_xy.transpose(0, 1).reshape(offset.shape).to(offset.dtype),
        grad_weights.transpose(0, 1).reshape(mask.shape).to(mask.dtype),
    )


def sampling_positions(
    offset: Tensor, geometry: Geometry, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Where each point of each output position samples.

    offset: (N, Ho, Wo, G·P·2) -> (N, Ho, Wo, G, P, 2), (x, y) in pixels of the unpadded image, also
    where they lie outside of it.
    """
    n, ho, wo, _ = offset.shape
    (sh, sw), (ph, pw), (ch, cw) = geometry.stride_hw, geometry.padding_hw, geometry.center_hw
    scale, points = geometry.offset_scale, geometry.num_points
    xy = scale * offset.to(dtype).reshape(n, ho, wo, geometry.groups, points, 2)
    grid = scale * torch.tensor(geometry.points_xy(), dtype=dtype, device=offset.device)  # (P, 2)
    column = torch.arange(wo, dtype=dtype, device=offset.device) * sw - pw + cw
    line = torch.arange(ho, dtype=dtype, device=offset.device) * sh - ph + ch
    # Regular grid first: it is exact, so a zero offset samples exactly on it.
    x = (column.view(1, 1, wo, 1, 1) + grid[:, 0]) + xy[..., 0]
    y = (line.view(1, ho, 1, 1, 1) + grid[:, 1]) + xy[..., 1]
    return torch.stack((x, y), -1)


class _Corner(NamedTuple):
    """One of the four pixels around the samples of a kernel point, each (M,).

    weight: bilinear; slope_x, slope_y: its derivatives; row: the pixel in `_image_rows`.
    """

    weight: Tensor
    slope_x: Tensor
    slope_y: Tensor
    row: Tensor


def _corners(
    x: Tensor,
    y: Tensor,
    origin: Tensor,
    outside: int,
    image_hw: tuple[int, int],
    geometry: Geometry,
) -> Iterator[_Corner]:
    """x, y: (M,) in pixels, origin: (M,), the row of pixel (0, 0), outside: the row of zeros
    -> the corners of their cells."""
    height, width = image_hw
    x0, y0 = x.floor(), y.floor()
    right, down = x - x0, y - y0
    for column, weight_x, sign_x in ((x0, 1 - right, -1), (x0 + 1, right, 1)):
        for line, weight_y, sign_y in ((y0, 1 - down, -1), (y0 + 1, down, 1)):
            # Compared as floats: a far-away coordinate does not fit an integer.
            inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
            pixel = line.where(inside, 0).long() * width + column.where(inside, 0).long()
            yield _Corner(
                weight=weight_x * weight_y,
                slope_x=sign_x * weight_y,
                slope_y=sign_y * weight_x,
                row=(origin + pixel * geometry.groups).where(inside, outside),
            )


def _image_rows(value: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """The D channels of each (image, pixel, group), then a row of zeros for all that is outside."""
    depth = value.shape[-1] // geometry.groups
    rows = value.to(dtype).reshape(-1, depth)
    return torch.cat((rows, rows.new_zeros(1, depth)))


def _row_origin(value: Tensor, offset: Tensor, geometry: Geometry) -> Tensor:
    """The row of pixel (0, 0) in `_image_rows`, for each (n, y, x, g): (M,)."""
    n, height, width, _ = value.shape
    _, ho, wo, _ = offset.shape
    image = torch.arange(n, device=value.device) * (height * width * geometry.groups)
    group = torch.arange(geometry.groups, device=value.device)
    return (image.view(n, 1, 1) + group).expand(n, ho * wo, geometry.groups).reshape(-1)


def _point_weights(mask: Tensor, geometry: Geometry, dtype: torch.dtype, softmax: bool) -> Tensor:
    """mask: (N, Ho, Wo, G·P) -> (P, N·Ho·Wo·G)."""
    weights = mask.to(dtype).reshape(-1, geometry.num_points)
    return (weights.softmax(-1) if softmax else weights).transpose(0, 1)


def _coordinates(
    offset: Tensor, image_hw: tuple[int, int], geometry: Geometry, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """offset: (N, Ho, Wo, G·P·2) -> X and Y in pixels of the image, and whether a sample counts,
    each (P, N·Ho·Wo·G).

    A sample with no corner in the image, or at no number, is moved to (-2, -2), which has none, and
    does not count.
    """
    x, y = sampling_positions(offset, geometry, dtype).unbind(-1)
    height, width = image_hw
    counts = (x >= -1) & (x < width) & (y >= -1) & (y < height)
    points = geometry.num_points
    return (
        x.where(counts, -2).reshape(-1, points).transpose(0, 1),
        y.where(counts, -2).reshape(-1, points).transpose(0, 1),
        counts.reshape(-1, points).transpose(0, 1),
    )


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
