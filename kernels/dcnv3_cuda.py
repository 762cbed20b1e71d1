"""DCNv3 on CUDA: the kernels of `csrc/dcnv3.cu` behind the op's backend interface.

The gradient of value is summed by atomics, in no fixed order. Where torch is told to be
deterministic (`torch.use_deterministic_algorithms(True)`) it is summed in 64-bit fixed point
instead: slower, twice the buffer, and the same bits in every run.
"""

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from groundwork.kernels import cuda_compiler
from groundwork.kernels.cuda_compiler import LEAST_CAPABILITY, CudaKernel, cuda_kernel
from groundwork.kernels.dcnv3_geometry import Geometry

SOURCE: Final = "dcnv3.cu"
DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Of one load.
MAX_BYTES: Final = 16
#: Bytes per sample in shared memory (in the backward pass), and how many all samples may take.
SAMPLE_BYTES, SHARED_BYTES = 32 + 12, 48 * 1024
#: The first corner of a sample is held in 26 bits.
MAX_PIXELS: Final = 1 << 26


class Problem(ctypes.Structure):
    """`Problem` of the CUDA source."""

    _fields_ = (
        ("units", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("height", "width", "out_height", "out_width")),
        *((name, ctypes.c_int32) for name in ("groups", "depth")),
        *((name, ctypes.c_int32) for name in ("stride_h", "stride_w", "origin_h", "origin_w")),
        ("offset_scale", ctypes.c_float),
    )


class Plan(NamedTuple):
    """How a problem is cut into threads: settings of the source, threads per block, blocks."""

    settings: Mapping[str, int]
    threads: int
    blocks: int


def unsupported(value: Tensor, offset: Tensor, mask: Tensor) -> str | None:
    """Why this backend cannot take the tensors; None where it can."""
    for name, tensor in (("value", value), ("offset", offset), ("mask", mask)):
        if tensor.device.type != "cuda":
            return f"{name} is on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, not float32, bfloat16 or float16"
    if value.shape[1] * value.shape[2] >= MAX_PIXELS:
        return f"an image of {value.shape[1]}×{value.shape[2]} pixels is too large"
    return unavailable(value.device.index)


@cache
def unavailable(device: int) -> str | None:
    """Why the kernels cannot run on a device; None where they can."""
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"its compute capability is {capability}, below {LEAST_CAPABILITY}"
    return cuda_compiler.unavailable()


def plan(
    problem: Problem,
    points: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    softmax: bool,
    fixed: bool,
    alignment: int = MAX_BYTES,
) -> Plan:
    """The settings for a problem. dtypes: of value, offset, mask; alignment: of value, in bytes."""
    size = dtypes[0].itemsize
    width = min(MAX_BYTES, alignment) // size
    while problem.depth % width:
        width //= 2
    # As many lanes as a group's channels fill; more where the samples of a block would not fit.
    lanes = 1
    while lanes < 32 and lanes * width < problem.depth:
        lanes *= 2
    threads = 128
    while threads // lanes * points * SAMPLE_BYTES > SHARED_BYTES:
        if threads > 32:
            threads //= 2
        elif lanes < 32:
            lanes *= 2
        else:
            raise ValueError(f"dcnv3: a kernel of {points} points does not fit the GPU; use fewer")
    value, offset, mask = (DTYPES[dtype] for dtype in dtypes)
    settings = {
        **{"VALUE_T": value, "OFFSET_T": offset, "MASK_T": mask},
        **{"WIDTH": width, "LANES": lanes, "THREADS": threads},
        **{"POINTS": points, "SOFTMAX": int(softmax), "FIXED": int(fixed)},
    }
    return Plan(settings, threads, -(-problem.units * lanes // threads))


def forward(
    value: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool
) -> Tensor:
    value, offset, mask = value.contiguous(), offset.contiguous(), mask.contiguous()
    n, ho, wo, _ = offset.shape
    output = value.new_empty(n, ho, wo, value.shape[-1])
    tensors = (value, offset, mask, output)
    _launch("dcnv3_forward", value, offset, mask, geometry, softmax, False, tensors)
    return output


def backward(
    grad_output: Tensor,
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    geometry: Geometry,
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_output = grad_output.to(value.dtype).contiguous()
    value, offset, mask = value.contiguous(), offset.contiguous(), mask.contiguous()
    fixed = torch.are_deterministic_algorithms_enabled()
    scale = fixed_scale(grad_output, mask, geometry, softmax) if fixed else value.new_empty(1)
    sums = torch.zeros_like(value, dtype=torch.int64 if fixed else torch.float32)
    grad_offset, grad_mask = torch.empty_like(offset), torch.empty_like(mask)
    tensors = (grad_output, value, offset, mask, sums, grad_offset, grad_mask, scale)
    _launch("dcnv3_backward", value, offset, mask, geometry, softmax, fixed, tensors)
    grad_value = sums.double() / scale if fixed else sums
    return grad_value.to(value.dtype), grad_offset, grad_mask


def fixed_scale(grad_output: Tensor, mask: Tensor, geometry: Geometry, softmax: bool) -> Tensor:
    """Steps per unit at which no sum of grad_value overflows 64 bits: a power of two, (1,)."""
    _, ho, wo, _ = grad_output.shape
    largest = grad_output.abs().amax().double() if grad_output.numel() else torch.zeros(())
    if not softmax and mask.numel():
        largest = largest * mask.abs().amax().double()
    bound = largest * (ho * wo * geometry.num_points)
    return torch.exp2((62 - bound.log2()).floor().clamp(-100, 100)).float().reshape(1)


def make_problem(value: Tensor, offset: Tensor, geometry: Geometry) -> Problem:
    n, height, width, channels = value.shape
    _, ho, wo, _ = offset.shape
    (ch, cw), (ph, pw) = geometry.center_hw, geometry.padding_hw
    return Problem(
        n * ho * wo * geometry.groups,
        *(height, width, ho, wo),
        *(geometry.groups, channels // geometry.groups),
        *geometry.stride_hw,
        *(ch - ph, cw - pw),
        geometry.offset_scale,
    )


def _launch(
    name: str,
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    geometry: Geometry,
    softmax: bool,
    fixed: bool,
    tensors: tuple[Tensor, ...],
) -> None:
    problem = make_problem(value, offset, geometry)
    if problem.units == 0:
        return
    device = value.device.index
    # value, and in the backward pass grad_output before it, are read in pieces of up to 16 bytes;
    # all else is offset and mask, or has just been allocated
    pointers = (tensors[0].data_ptr(), value.data_ptr())
    alignment = min(MAX_BYTES, *(pointer & -pointer for pointer in pointers))
    dtypes = (value.dtype, offset.dtype, mask.dtype)
    cut = plan(problem, geometry.num_points, dtypes, softmax, fixed, alignment)
    kernel: CudaKernel = cuda_kernel(SOURCE, name, tuple(sorted(cut.settings.items())), device)
    grid = _grid(geometry, device)
    arguments: list[Any] = [problem, *(ctypes.c_void_p(t.data_ptr()) for t in (grid, *tensors))]
    kernel.launch(cut.blocks, cut.threads, arguments)


@cache
def _grid(geometry: Geometry, device: int) -> Tensor:
    """offset_scale times the regular grid, (P, 2) on the device; rounded once from float64."""
    grid = geometry.offset_scale * torch.tensor(geometry.points_xy(), dtype=torch.float64)
    return grid.float().to(torch.device("cuda", device))
