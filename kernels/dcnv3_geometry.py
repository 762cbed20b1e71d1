"""The geometry of DCNv3: where kernel points lie, and whether tensors fit to it."""

import math
import operator
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
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


def make_geometry(
    kernel_size: Size2d,
    stride: Size2d,
    padding: Size2d | None,
    dilation: Size2d,
    groups: int,
    offset_scale: float,
    remove_center: bool,
    op: str = "dcnv3",
) -> Geometry:
    """op: that errors name."""
    kernel_hw = size_pair(op, "kernel_size", kernel_size, least=1)
    dilation_hw = size_pair(op, "dilation", dilation, least=1)
    if padding is None:
        padding = (
            dilation_hw[0] * (kernel_hw[0] - 1) // 2,
            dilation_hw[1] * (kernel_hw[1] - 1) // 2,
        )
    remove_center = statement(op, "remove_center", remove_center)
    kh, kw = kernel_hw
    if remove_center and (kh != kw or kh % 2 == 0 or kh == 1):
        raise ValueError(
            f"{op}: remove_center with kernel_size {kh}×{kw}; a square odd kernel of at least 3×3 "
            "has a centre to remove, so change kernel_size or set remove_center=False"
        )
    groups = _whole(op, "groups", groups, groups, "an integer")
    if groups < 1:
        raise ValueError(f"{op}: groups is {groups}; give at least 1")
    return Geometry(
        kernel_hw,
        size_pair(op, "stride", stride, least=1),
        size_pair(op, "padding", padding, least=0),
        dilation_hw,
        groups,
        _scale(op, offset_scale),
        remove_center,
    )


def size_pair(op: str, name: str, size: Size2d, least: int) -> tuple[int, int]:
    """A size as (h, w), checked. op, name: of the argument, for errors."""
    expected = "an integer or a pair of them (h, w)"
    if isinstance(size, tuple | list):
        if len(size) != 2:
            raise ValueError(
                f"{op}: {name} is {size!r}, of {len(size)} numbers; expected {expected}"
            )
        height, width = (_whole(op, name, axis, size, expected) for axis in size)
    else:
        height = width = _whole(op, name, size, size, expected)
    if height < least or width < least:
        raise ValueError(f"{op}: {name} is {size}; both sizes must be at least {least}")
    return height, width


def statement(op: str, name: str, given: Any) -> bool:
    """A bool, checked; 0 and 1 are taken for one."""
    if isinstance(given, bool | int | np.bool_) and given in (0, 1):
        return bool(given)
    raise TypeError(f"{op}: {name} is {given!r}; expected True or False")


def _whole(op: str, name: str, number: Any, given: Any, expected: str) -> int:
    """number: the argument `given`, or one of its two."""
    if not isinstance(number, bool | np.bool_ | Tensor):  # True is no size
        if isinstance(number, int):
            return number
        try:
            return operator.index(number)
        except TypeError:
            pass
    raise TypeError(f"{op}: {name} is {given!r}; expected {expected}")


def _scale(op: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, Real | torch.SymFloat):
        raise TypeError(f"{op}: offset_scale is {given!r}; expected a number, such as 1.0")
    scale = float(given)
    if not -math.inf < scale < math.inf:
        raise ValueError(
            f"{op}: offset_scale is {scale}; expected a finite number, as no sample would count"
        )
    return scale


def check_tensors(value: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry) -> None:
    """That the arguments of dcnv3 fit together; raises TypeError or ValueError."""
    for name, tensor in (("value", value), ("offset", offset), ("mask", mask)):
        check_tensor("dcnv3", name, tensor, value, "value")
    ho, wo = check_value("dcnv3", value, geometry, offset)
    groups, points = geometry.groups, geometry.num_points
    for name, tensor, depth, formula in (
        ("offset", offset, groups * points * 2, "groups·P·2"),
        ("mask", mask, groups * points, "groups·P"),
    ):
        expected = (value.shape[0], ho, wo, depth)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"dcnv3: {name} has shape {tuple(tensor.shape)}, expected {expected} = "
                f"(N, Ho, Wo, {formula}) with P = {points} for value {tuple(value.shape)}, "
                f"groups {groups} and {geometry}{layout_hint(value, tensor, geometry)}"
            )


def check_tensor(op: str, name: str, tensor: Any, first: Any, first_name: str) -> None:
    """That an argument is a floating-point tensor that a kernel can read, on the device of the
    first one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{op}: {name} is {_kind(tensor)}; expected a torch.Tensor of a floating dtype"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} has layout {tensor.layout}; make it dense with .to_dense()")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} is {tensor.dtype}; cast it to a floating dtype")
    if tensor.device != first.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, {first_name} on {first.device}; "
            "move all to one device"
        )


def _kind(given: Any) -> str:
    return "None" if given is None else f"a {type(given).__module__}.{type(given).__qualname__}"


def check_value(op: str, value: Tensor, geometry: Geometry, offset: Tensor) -> tuple[int, int]:
    """That an image can be sampled -> height and width of the output. offset: to guess layouts."""
    if value.dim() != 4:
        raise ValueError(
            f"{op}: value has shape {tuple(value.shape)}; expected (N, H, W, C), channels last"
        )
    _, height, width, channels = value.shape
    if channels == 0 or channels % geometry.groups != 0:
        raise ValueError(
            f"{op}: value has {channels} channels, groups is {geometry.groups}; "
            f"choose groups that divide the channels{layout_hint(value, offset, geometry)}"
        )
    ho, wo = geometry.output_hw(height, width)
    if height < 1 or width < 1 or ho < 1 or wo < 1:
        raise ValueError(
            f"{op}: an image of {height}×{width} has an output of {ho}×{wo} with {geometry}; "
            f"use a larger image or more padding{layout_hint(value, offset, geometry)}"
        )
    return ho, wo


def layout_hint(value: Tensor, offset: Tensor, geometry: Geometry) -> str:
    """For an error: that value fits if its channels are the second axis; empty if it does not."""
    if value.dim() != 4 or offset.dim() != 4 or value.shape[1] % geometry.groups:
        return ""
    output = geometry.output_hw(value.shape[2], value.shape[3])
    if output not in (tuple(offset.shape[1:3]), tuple(offset.shape[2:])):
        return ""
    return "; value looks like (N, C, H, W): channels come last, so give value.permute(0, 2, 3, 1)"
