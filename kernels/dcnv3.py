"""DCNv3, the deformable convolution of InternImage (arXiv 2211.05778, section 3.1).

For output position (n, y, x), group g and kernel point p = (i, j), its columns i outermost:

    X = x·stride_w - pad_w + c_w + s·(i·dilation_w - c_w + offset_x[n, y, x, g, p])
    Y = y·stride_h - pad_h + c_h + s·(j·dilation_h - c_h + offset_y[n, y, x, g, p])
    out[n, y, x, g] = Σ_p mask[n, y, x, g, p] · bilinear(value[n, :, :, g], Y, X)

with c = dilation·(k-1)//2 and s = `offset_scale`, which scales the regular grid as well as the
learned offset. Coordinates count pixels of the unpadded image. A sample lies in the cell
[floor(X), floor(X)+1] × [floor(Y), floor(Y)+1], also where X or Y is an integer, so that offsets
have the right-sided derivative at the kink; at initialisation all samples sit there. Corners
outside of the image count as zero. Coordinates, weights and sums are float32 (float64 if an input
is), whatever the storage dtype. A non-finite offset gives NaN.

Layouts: value (N, H, W, G·D); offset (N, Ho, Wo, G·P·2), (x, y) innermost; mask (N, Ho, Wo, G·P);
output (N, Ho, Wo, G·D). The op owns no parameter, and does not normalise the mask unless asked to.

`dcnv3_reference` is the definition of correct; `dcnv3` is the op to call.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

Size2d = int | tuple[int, int]


class Geometry(NamedTuple):
    """Where the kernel points of an output position lie in the image; (h, w) throughout."""

    kernel_hw: tuple[int, int]
    stride_hw: tuple[int, int]
    padding_hw: tuple[int, int]
    dilation_hw: tuple[int, int]
    groups: int
    offset_scale: float
    remove_center: bool

    @property
    def center_hw(self) -> tuple[int, int]:
        """The distance from a kernel's first point to its centre, in pixels."""
        (kh, kw), (dh, dw) = self.kernel_hw, self.dilation_hw
        return dh * (kh - 1) // 2, dw * (kw - 1) // 2

    @property
    def num_points(self) -> int:
        return self.kernel_hw[0] * self.kernel_hw[1] - int(self.remove_center)

    def points_xy(self) -> list[tuple[int, int]]:
        """The regular grid around the centre, columns outermost: P pairs (x, y)."""
        (kh, kw), (dh, dw), (ch, cw) = self.kernel_hw, self.dilation_hw, self.center_hw
        return [
            (i * dw - cw, j * dh - ch)
            for i in range(kw)
            for j in range(kh)
            if not (self.remove_center and i == kw // 2 and j == kh // 2)
        ]

    def output_hw(self, height: int, width: int) -> tuple[int, int]:
        (kh, kw), (sh, sw) = self.kernel_hw, self.stride_hw
        (ph, pw), (dh, dw) = self.padding_hw, self.dilation_hw
        return (
            (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1,
            (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1,
        )


class Backend(NamedTuple):
    """One implementation of the op.

    forward: (value, offset, mask, geometry, softmax) -> output.
    backward: (grad_output, value, offset, mask, geometry, softmax) -> their three gradients.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Geometry, bool], Tensor]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Geometry, bool], tuple[Tensor, Tensor, Tensor]
    ]


def dcnv3(
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
    backend: str = "auto",
) -> Tensor:
    """Samples each group at its kernel points, moved by the offsets, and sums by the mask.

    value: (N, H, W, C); offset: (N, Ho, Wo, groups·P·2); mask: (N, Ho, Wo, groups·P)
    -> (N, Ho, Wo, C) in value.dtype, where P = kh·kw, less one with `remove_center`. Sizes are an
    int or (h, w); padding None keeps H and W for an odd kernel at stride 1. With `softmax` the mask
    holds logits, normalised over P per group. The dtypes may differ (bf16 value, fp32 offset).

    Differentiable once; `dcnv3_reference` has derivatives of every order. Without an autocast rule
    on purpose: the op takes what the layers before it give, and sums in float32 in any case.
    """
    geometry = _geometry(
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center
    )
    _check_tensors(value, offset, mask, geometry)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"dcnv3: backend {backend!r} is unknown; choose one of {', '.join(('auto', *BACKENDS))}"
        )
    output: Tensor = _dcnv3_op(
        value,
        offset,
        mask,
        list(geometry.kernel_hw),
        list(geometry.stride_hw),
        list(geometry.padding_hw),
        list(geometry.dilation_hw),
        groups,
        geometry.offset_scale,
        remove_center,
        softmax,
        backend,
    )
    return output


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
    geometry = _geometry(
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center
    )
    _check_tensors(value, offset, mask, geometry)
    return _reference_forward(value, offset, mask, geometry, softmax)


def choose_backend(name: str, value: Tensor) -> str:
    """The backend that runs for a value tensor: `name` itself, or what "auto" stands for."""
    if name != "auto":
        return name
    return AUTO_BACKENDS.get(value.device.type, "reference")


# ---- the reference ----


def _reference_forward(
    value: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool
) -> Tensor:
    n, height, width, channels = value.shape
    dtype = _compute_dtype(value, offset, mask)
    rows = _image_rows(value, geometry, dtype)  # (N·H·W·G + 1, D)
    origin, outside = _row_origin(value, offset, geometry), rows.shape[0] - 1  # (M,), M = N·Ho·Wo·G
    weights = _point_weights(mask, geometry, dtype, softmax)  # (P, M)
    x, y = _coordinates(offset, geometry, dtype)  # (P, M) each
    output = rows.new_zeros(weights.shape[1], rows.shape[1])
    for p in range(geometry.num_points):
        for corner in _corners(x[p], y[p], origin, outside, (height, width), geometry):
            weight = (weights[p] * corner.weight).unsqueeze(-1)
            output = torch.addcmul(output, weight, rows.index_select(0, corner.row))
    ho, wo = geometry.output_hw(height, width)
    return output.reshape(n, ho, wo, channels).to(value.dtype)


def _reference_backward(
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
    x, y = _coordinates(offset, geometry, dtype)  # (P, M) each
    grad = grad_output.to(dtype).reshape(weights.shape[1], rows.shape[1])  # (M, D)
    grad_rows = torch.zeros_like(rows)
    grad_weights, grad_x, grad_y = (torch.zeros_like(weights) for _ in range(3))
    for p in range(geometry.num_points):
        for corner in _corners(x[p], y[p], origin, outside, (height, width), geometry):
            product = (grad * rows.index_select(0, corner.row)).sum(-1)  # (M,)
            grad_weights[p] += corner.weight * product
            grad_x[p] += corner.slope_x * product
            grad_y[p] += corner.slope_y * product
            weight = (weights[p] * corner.weight).unsqueeze(-1)
            grad_rows.index_add_(0, corner.row, grad * weight)
    grad_xy = torch.stack((grad_x, grad_y), -1) * weights.unsqueeze(-1) * geometry.offset_scale
    if softmax:
        grad_weights = weights * (grad_weights - (weights * grad_weights).sum(0, keepdim=True))
    return (
        grad_rows[:-1].reshape(value.shape).to(value.dtype),
        grad_xy.transpose(0, 1).reshape(offset.shape).to(offset.dtype),
        grad_weights.transpose(0, 1).reshape(mask.shape).to(mask.dtype),
    )


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


def _coordinates(offset: Tensor, geometry: Geometry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """offset: (N, Ho, Wo, G·P·2) -> X and Y in pixels of the image, each (P, N·Ho·Wo·G)."""
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
    return x.reshape(-1, points).transpose(0, 1), y.reshape(-1, points).transpose(0, 1)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


# ---- backends: "auto" takes the device's entry, else the reference ----

BACKENDS: Final[Mapping[str, Backend]] = {
    "reference": Backend(_reference_forward, _reference_backward),
}
AUTO_BACKENDS: Final[Mapping[str, str]] = {"cpu": "reference", "cuda": "reference"}


# ---- the arguments ----


def _geometry(
    kernel_size: Size2d,
    stride: Size2d,
    padding: Size2d | None,
    dilation: Size2d,
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> Geometry:
    kernel_hw = _pair("kernel_size", kernel_size, least=1)
    dilation_hw = _pair("dilation", dilation, least=1)
    if padding is None:
        padding = (
            dilation_hw[0] * (kernel_hw[0] - 1) // 2,
            dilation_hw[1] * (kernel_hw[1] - 1) // 2,
        )
    kh, kw = kernel_hw
    if remove_center and (kh != kw or kh % 2 == 0 or kh == 1):
        raise ValueError(
            f"dcnv3: remove_center with kernel_size {kh}×{kw}; a square odd kernel of at least 3×3 "
            "has a centre to remove, so change kernel_size or set remove_center=False"
        )
    if groups < 1:
        raise ValueError(f"dcnv3: groups is {groups}; give at least 1")
    return Geometry(
        kernel_hw,
        _pair("stride", stride, least=1),
        _pair("padding", padding, least=0),
        dilation_hw,
        groups,
        float(offset_scale),
        remove_center,
    )


def _pair(name: str, size: Size2d, least: int) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < least or width < least:
        raise ValueError(f"dcnv3: {name} is {size}; both sizes must be at least {least}")
    return height, width


def _check_tensors(value: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry) -> None:
    for name, tensor in (("value", value), ("offset", offset), ("mask", mask)):
        if not tensor.is_floating_point():
            raise TypeError(f"dcnv3: {name} is {tensor.dtype}; cast it to a floating dtype")
        if tensor.device != value.device:
            raise ValueError(
                f"dcnv3: {name} is on {tensor.device}, value on {value.device}; "
                "move all three to one device"
            )
    if value.dim() != 4:
        raise ValueError(
            f"dcnv3: value has shape {tuple(value.shape)}; expected (N, H, W, C), channels last"
        )
    n, height, width, channels = value.shape
    groups, points = geometry.groups, geometry.num_points
    if channels == 0 or channels % groups != 0:
        raise ValueError(
            f"dcnv3: value has {channels} channels, groups is {groups}; "
            "choose groups that divide the channels"
        )
    ho, wo = geometry.output_hw(height, width)
    if height < 1 or width < 1 or ho < 1 or wo < 1:
        raise ValueError(
            f"dcnv3: an image of {height}×{width} has an output of {ho}×{wo} with {geometry}; "
            "use a larger image or more padding"
        )
    for name, tensor, depth, formula in (
        ("offset", offset, groups * points * 2, "groups·P·2"),
        ("mask", mask, groups * points, "groups·P"),
    ):
        if tuple(tensor.shape) != (n, ho, wo, depth):
            raise ValueError(
                f"dcnv3: {name} has shape {tuple(tensor.shape)}, expected {(n, ho, wo, depth)} = "
                f"(N, Ho, Wo, {formula}) with P = {points} for value {tuple(value.shape)}, "
                f"groups {groups} and {geometry}"
            )


# ---- registration: fake kernels, autograd; the backend is chosen when the op runs ----


@torch.library.custom_op("groundwork::dcnv3", mutates_args=())
def _dcnv3_op(
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_hw: list[int],
    stride_hw: list[int],
    padding_hw: list[int],
    dilation_hw: list[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
    backend: str,
) -> Tensor:
    geometry = _from_lists(
        kernel_hw, stride_hw, padding_hw, dilation_hw, groups, offset_scale, remove_center
    )
    forward = BACKENDS[choose_backend(backend, value)].forward
    return forward(value, offset, mask, geometry, softmax)


@torch.library.custom_op("groundwork::dcnv3_backward", mutates_args=())
def _dcnv3_backward_op(
    grad_output: Tensor,
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_hw: list[int],
    stride_hw: list[int],
    padding_hw: list[int],
    dilation_hw: list[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = _from_lists(
        kernel_hw, stride_hw, padding_hw, dilation_hw, groups, offset_scale, remove_center
    )
    backward = BACKENDS[choose_backend(backend, value)].backward
    return backward(grad_output, value, offset, mask, geometry, softmax)


def _from_lists(
    kernel_hw: list[int],
    stride_hw: list[int],
    padding_hw: list[int],
    dilation_hw: list[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> Geometry:
    return Geometry(
        (kernel_hw[0], kernel_hw[1]),
        (stride_hw[0], stride_hw[1]),
        (padding_hw[0], padding_hw[1]),
        (dilation_hw[0], dilation_hw[1]),
        groups,
        offset_scale,
        remove_center,
    )


@_dcnv3_op.register_fake
def _(value: Tensor, offset: Tensor, mask: Tensor, *arguments: Any) -> Tensor:
    n, ho, wo, _ = offset.shape
    return value.new_empty(n, ho, wo, value.shape[-1])


@_dcnv3_backward_op.register_fake
def _(
    grad_output: Tensor, value: Tensor, offset: Tensor, mask: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        offset.new_empty(offset.shape),
        mask.new_empty(mask.shape),
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.arguments = inputs[3:]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    gradients = _dcnv3_backward_op(grad_output, *ctx.saved_tensors, *ctx.arguments)
    return (*gradients, *(None for _ in ctx.arguments))


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "dcnv3: the op has first derivatives only, and a second one was asked for "
        "(create_graph=True); call dcnv3_reference there, it has all orders"
    )


_dcnv3_op.register_autograd(_backward, setup_context=_save_inputs)
_dcnv3_backward_op.register_autograd(_refuse_second_derivative)
