"""The geometry of DCNv3: where kernel points lie, and whether tensors fit to it."""

from typing import NamedTuple

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


def check_tensors(value: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry) -> None:
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
