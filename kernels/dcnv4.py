"""DCNv4 (arXiv 2401.06197): DCNv3's sampling with offsets and weights packed in one tensor.

The weights are unbounded: no softmax is taken. Per group the tensor holds 2·P offsets, (x, y)
innermost, then P weights; group g starts at g·3·P. The official layer pads the whole to a multiple
of 8 channels, and the padding is not read.
"""

from torch import Tensor

from groundwork.kernels.dcnv3 import dcnv3
from groundwork.kernels.dcnv3_geometry import Size2d, make_geometry


def packed_channels(groups: int, points: int) -> int:
    """Channels of a packed tensor: 3·groups·points, rounded up to a multiple of 8."""
    return -(-3 * groups * points // 8) * 8


def dcnv4(
    value: Tensor,
    offset_mask: Tensor,
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
    """`dcnv3` with packed offsets and weights; the other arguments are the same.

    value: (N, H, W, C); offset_mask: (N, Ho, Wo, at least 3·groups·P) -> (N, Ho, Wo, C).
    """
    geometry = make_geometry(
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center
    )
    points = geometry.num_points
    used = 3 * groups * points
    if offset_mask.dim() != 4 or offset_mask.shape[-1] < used:
        raise ValueError(
            f"dcnv4: offset_mask has shape {tuple(offset_mask.shape)}; expected (N, Ho, Wo, K), "
            f"K at least {used} = 3·groups·P ({packed_channels(groups, points)} in the official "
            f"layer), as groups is {groups} and P is {points}"
        )
    packed = offset_mask[..., :used].unflatten(-1, (groups, 3 * points))
    offset, mask = packed.split((2 * points, points), dim=-1)
    return dcnv3(
        value,
        offset.flatten(3),
        mask.flatten(3),
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_scale=offset_scale,
        remove_center=remove_center,
        softmax=softmax,
        backend=backend,
    )
