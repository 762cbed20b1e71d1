"""DCNv3 on the CPU: the C++ kernels of `csrc/dcnv3_cpu.cpp` behind the op's backend interface."""

import ctypes
import warnings
from functools import cache
from typing import Final

import torch
from torch import Tensor

from groundwork.kernels.dcnv3_geometry import Geometry
from groundwork.kernels.host_compiler import HostCompileError, load_host_library

SOURCE: Final = "dcnv3_cpu.cpp"
DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}


class _Problem(ctypes.Structure):
    """`Dcnv3Problem` of the C++ source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "height", "width")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width")),
        *((name, ctypes.c_int64) for name in ("groups", "depth", "points")),
        *((name, ctypes.c_int64) for name in ("stride_h", "stride_w", "origin_h", "origin_w")),
        ("grid_xy", ctypes.POINTER(ctypes.c_float)),
        ("offset_scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("softmax", "value", "offset", "mask", "threads")),
    )


def unsupported(value: Tensor, offset: Tensor, mask: Tensor) -> str | None:
    """Why this backend cannot take the tensors; None where it can."""
    for name, tensor in (("value", value), ("offset", offset), ("mask", mask)):
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, not float32 or bfloat16"
    return unavailable()


@cache
def unavailable() -> str | None:
    """Why the kernels cannot run on this machine; None where they can. Warns once."""
    try:
        library()
    except HostCompileError as error:
        warnings.warn(f"dcnv3 runs its slow reference on the CPU: {error}", stacklevel=2)
        return str(error)
    return None


def library(instructions: str | None = None) -> ctypes.CDLL:
    """The compiled kernels, by default for the best instruction set of this CPU."""
    loaded = load_host_library(SOURCE, instructions)
    loaded.dcnv3_problem_bytes.restype = ctypes.c_int64
    if (size := loaded.dcnv3_problem_bytes()) != ctypes.sizeof(_Problem):
        raise HostCompileError(
            f"{loaded._name} expects problems of {size} bytes, not {ctypes.sizeof(_Problem)}; "
            "delete it, and it is compiled again"
        )
    return loaded


def forward(
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    geometry: Geometry,
    softmax: bool,
    instructions: str | None = None,
) -> Tensor:
    value, offset, mask = value.contiguous(), offset.contiguous(), mask.contiguous()
    n, ho, wo, _ = offset.shape
    output = value.new_empty(n, ho, wo, value.shape[-1])
    if output.numel() == 0:
        return output
    problem = _problem(value, offset, mask, geometry, softmax)
    run = library(instructions).dcnv3_forward
    _check(run(ctypes.byref(problem), *_pointers(value, offset, mask, output)))
    return output


def backward(
    grad_output: Tensor,
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    geometry: Geometry,
    softmax: bool,
    instructions: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_output = grad_output.to(value.dtype).contiguous()
    value, offset, mask = value.contiguous(), offset.contiguous(), mask.contiguous()
    if grad_output.numel() == 0:
        return torch.zeros_like(value), torch.zeros_like(offset), torch.zeros_like(mask)
    grads = torch.empty_like(value), torch.empty_like(offset), torch.empty_like(mask)
    problem = _problem(value, offset, mask, geometry, softmax)
    run = library(instructions).dcnv3_backward
    _check(run(ctypes.byref(problem), *_pointers(grad_output, value, offset, mask, *grads)))
    return grads


def _problem(
    value: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool
) -> _Problem:
    n, height, width, channels = value.shape
    _, out_height, out_width, _ = offset.shape
    (ch, cw), (ph, pw) = geometry.center_hw, geometry.padding_hw
    # in double precision and rounded once, as the reference does
    grid = [geometry.offset_scale * c for point in geometry.points_xy() for c in point]
    return _Problem(
        n,
        height,
        width,
        out_height,
        out_width,
        geometry.groups,
        channels // geometry.groups,
        geometry.num_points,
        *geometry.stride_hw,
        ch - ph,
        cw - pw,
        (ctypes.c_float * len(grid))(*grid),
        geometry.offset_scale,
        int(softmax),
        DTYPES[value.dtype],
        DTYPES[offset.dtype],
        DTYPES[mask.dtype],
        torch.get_num_threads(),
    )


def _pointers(*tensors: Tensor) -> tuple[ctypes.c_void_p, ...]:
    return tuple(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)


def _check(status: int) -> None:
    if status:
        raise MemoryError("dcnv3: no memory for a private image per thread; use fewer threads")
