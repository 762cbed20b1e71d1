"""DCNv4 (arXiv 2401.06197): DCNv3's sampling with offsets and weights packed in one tensor.

The weights are unbounded: no softmax is taken. Per group the tensor holds 2·P offsets, (x, y)
innermost, then P weights; group g starts at g·3·P. The official layer pads the whole to a multiple
of 8 channels, and the padding is not read.
"""

from torch import Tensor, compiler

from groundwork.kernels.dcnv3 import BACKENDS, check_backend, sample_and_sum
from groundwork.kernels.dcnv3_geometry import (
    Size2d,
    check_tensor,
    check_value,
    layout_hint,
    make_geometry,
    statement,
)


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
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center, op="dcnv4"
    )
    softmax = statement("dcnv4", "softmax", softmax)
    check_backend("dcnv4", backend)
    for name, tensor in (("value", value), ("offset_mask", offset_mask)):
        check_tensor("dcnv4", name, tensor, value, "value")
    ho, wo = check_value("dcnv4", value, geometry, offset_mask)
    groups, points = geometry.groups, geometry.num_points
    used = 3 * groups * points
    expected = (value.shape[0], ho, wo)
    if tuple(offset_mask.shape[:-1]) != expected or offset_mask.shape[-1] < used:
        raise ValueError(
            f"dcnv4: offset_mask has shape {tuple(offset_mask.shape)}; expected (N, Ho, Wo, K) = "
            f"({value.shape[0]}, {ho}, {wo}, K), "
            f"K at least {used} = 3·groups·P ({packed_channels(groups, points)} in the official "
            f"layer), as groups is {groups} and P is {points}, for value {tuple(value.shape)} and "
            f"{geometry}{layout_hint(value, offset_mask, geometry)}"
        )
    packed = offset_mask[..., :used].unflatten(-1, (groups, 3 * points))
    parts = packed.split((2 * points, points), dim=-1)
    offset, mask = (part.flatten(3) for part in parts)
    if backend != "auto" and not compiler.is_compiling():
        # Here, as the caller knows of no offset.
        reason = BACKENDS[backend].unsupported(value, offset, mask)
        if reason is not None:
            reason = reason.replace("offset is", "offset_mask is")
            raise ValueError(f"dcnv4: backend {backend!r} cannot run: {reason}; use backend='auto'")
    return sample_and_sum(value, offset, mask, geometry, softmax, backend)
