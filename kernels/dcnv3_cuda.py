"""DCNv3 on CUDA: the kernels of `csrc/dcnv3*.cu` behind the op's backend interface.

How a kernel is launched is a choice: a default, or what `autotune` found on this device. The output
has the same bits for every choice. The gradient of value is summed by atomics, in no fixed order,
so its last bits differ between runs and between choices. Where torch is told to be deterministic
(`torch.use_deterministic_algorithms(True)`) it is summed in 64-bit fixed point instead: slower,
twice the buffer, and the same bits in every run and for every choice.
"""

import ctypes
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor

from groundwork.kernels import autotune, cuda_compiler
from groundwork.kernels.cuda_compiler import LEAST_CAPABILITY, CudaKernel, cuda_kernel
from groundwork.kernels.dcnv3_geometry import Geometry, make_geometry

SOURCE: Final = "dcnv3.cu"
TILE_SOURCE: Final = "dcnv3_tile.cu"
DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Of one load.
MAX_BYTES: Final = 16
#: Bytes per sample in shared memory (in the backward pass), and how many all samples may take.
SAMPLE_BYTES, SHARED_BYTES = 32 + 12, 48 * 1024
#: The first corner of a sample is held in 26 bits, its place in bytes in 32.
MAX_PIXELS: Final = 1 << 26
MAX_IMAGE_BYTES: Final = 1 << 32
#: Of the tiles of the backward pass: output pixels, channels per group, kernel points, and bytes.
TILE_UNITS: Final = 32
TILE_DEPTH: Final = 32
TILE_POINTS: Final = 16
TILE_PITCH: Final = 36 * 4
#: Compute capability with float32 operands for tensor cores.
TILE_CAPABILITY: Final = (8, 0)
C = TypeVar("C", bound=Hashable)


class ForwardChoice(NamedTuple):
    """threads: per block; unroll: points whose corners are loaded at once."""

    threads: int = 128
    unroll: int = 3


class AtomicChoice(NamedTuple):
    """The backward pass of `dcnv3.cu`. threads: per block."""

    threads: int = 128


class TileChoice(NamedTuple):
    """The backward pass of `dcnv3_tile.cu`. width: of a tile, in output pixels.

    halo: pixels by which a sample may be displaced and still be summed in shared memory.
    """

    halo: int = 2
    width: int = 8


BackwardChoice = AtomicChoice | TileChoice

#: The default first.
FORWARD_CHOICES: Final = tuple(
    ForwardChoice(threads, unroll) for unroll in (3, 1, 9) for threads in (128, 64, 256)
)
TILE_CHOICES: Final = tuple(TileChoice(halo, width) for halo in (2, 1, 3) for width in (8, 16))
ATOMIC_CHOICES: Final = tuple(AtomicChoice(threads) for threads in (128, 64, 256))


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


@dataclass(frozen=True, eq=False)
class Call:
    """What the launch of a kernel depends on; one object for equal calls.

    dtypes: of value, offset, mask; alignment: of value and grad_output, in bytes.
    """

    device: int
    capability: tuple[int, int]
    problem: Problem
    geometry: Geometry
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    softmax: bool
    alignment: int

    @cached_property
    def kind(self) -> str:
        """Names the calls that share a choice: sizes to the next power of two, softmax or not."""
        dtypes = " ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        (kh, kw), (sh, sw) = self.geometry.kernel_hw, self.geometry.stride_hw
        dh, dw = self.geometry.dilation_hw
        return (
            f"{dtypes}, depth {self.problem.depth}, {self.geometry.num_points} points of {kh}x{kw}"
            f", stride {sh}x{sw}, dilation {dh}x{dw}, scale {self.geometry.offset_scale:g}, "
            f"alignment {self.alignment}, units below 2^{self.problem.units.bit_length()}"
        )


def unsupported(value: Tensor, offset: Tensor, mask: Tensor) -> str | None:
    """Why this backend cannot take the tensors; None where it can."""
    for name, tensor in (("value", value), ("offset", offset), ("mask", mask)):
        if tensor.device.type != "cuda":
            return f"{name} is on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, not float32, bfloat16 or float16"
    height, width, channels = value.shape[1:]
    if height * width >= MAX_PIXELS or value.nbytes // max(1, len(value)) >= MAX_IMAGE_BYTES:
        return f"an image of {height}×{width} pixels and {channels} channels is too large"
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
    threads: int = ForwardChoice().threads,
    unroll: int = ForwardChoice().unroll,
) -> Plan:
    """The settings of `dcnv3.cu` for a problem.

    dtypes: of value, offset, mask; alignment: of value, in bytes; threads: at most, per block.
    """
    width = _channels_per_load(problem.depth, dtypes[0], alignment)
    # As many lanes as a group's channels fill; more where the samples of a block would not fit.
    lanes = 1
    while lanes < 32 and lanes * width < problem.depth:
        lanes *= 2
    while threads // lanes * points * SAMPLE_BYTES > SHARED_BYTES:
        if threads > 32:
            threads //= 2
        elif lanes < 32:
            lanes *= 2
        else:
            raise ValueError(f"dcnv3: a kernel of {points} points does not fit the GPU; use fewer")
    settings = {
        **_common_settings(dtypes, width, points, softmax),
        **{"LANES": lanes, "THREADS": threads, "UNROLL": unroll, "FIXED": int(fixed)},
    }
    return Plan(settings, threads, -(-problem.units * lanes // threads))


def tile_plan(call: Call, choice: TileChoice) -> Plan | None:
    """The settings of `dcnv3_tile.cu` for a backward pass; None where it cannot run it."""
    problem, geometry = call.problem, call.geometry
    points = geometry.num_points
    if (
        call.capability < TILE_CAPABILITY
        or problem.depth > TILE_DEPTH
        or points > TILE_POINTS
        or not math.isfinite(geometry.offset_scale)
    ):
        return None
    tile_w, tile_h = choice.width, TILE_UNITS // choice.width
    grid = [geometry.offset_scale * axis for point in geometry.points_xy() for axis in point]
    (left, right), (top, bottom) = (_reach(grid[axis::2], choice.halo) for axis in (0, 1))
    region_h = (tile_h - 1) * problem.stride_h + bottom - top + 1
    region_w = (tile_w - 1) * problem.stride_w + right - left + 1
    rows = -(-region_h * region_w // 16) * 16
    if rows * TILE_PITCH > SHARED_BYTES or 3 * points > rows:
        return None
    width = _channels_per_load(problem.depth, call.dtypes[0], call.alignment)
    settings = {
        **_common_settings(call.dtypes, width, points, call.softmax),
        **{"DEPTH": problem.depth, "TILE_H": tile_h, "TILE_W": tile_w},
        **{"REGION_H": region_h, "REGION_W": region_w},
        **{"REGION_TOP": top, "REGION_LEFT": left},
    }
    images = problem.units // (problem.out_height * problem.out_width * problem.groups)
    tiles = -(-problem.out_height // tile_h) * -(-problem.out_width // tile_w)
    blocks = images * tiles * problem.groups
    return Plan(settings, 32, blocks) if blocks < 1 << 31 else None


def _reach(grid: list[float], halo: int) -> tuple[int, int]:
    """The first and last corner of samples displaced by less than `halo` pixels."""
    return math.floor(min(grid)) - halo, math.floor(max(grid)) + halo


def _channels_per_load(depth: int, dtype: torch.dtype, alignment: int) -> int:
    width = min(MAX_BYTES, alignment) // dtype.itemsize
    while depth % width:
        width //= 2
    return width


def _common_settings(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], width: int, points: int, softmax: bool
) -> dict[str, int]:
    value, offset, mask = (DTYPES[dtype] for dtype in dtypes)
    types = {"VALUE_T": value, "OFFSET_T": offset, "MASK_T": mask}
    return {**types, "WIDTH": width, "POINTS": points, "SOFTMAX": int(softmax)}


@lru_cache(maxsize=1024)
def backward_choices(call: Call) -> tuple[BackwardChoice, ...]:
    """What the backward pass may choose from, the default first; not in deterministic mode."""
    return (*(c for c in TILE_CHOICES if tile_plan(call, c) is not None), *ATOMIC_CHOICES)


def forward(
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    geometry: Geometry,
    softmax: bool,
    tune: bool = False,
) -> Tensor:
    """tune: measure this kind of call if it has not been; `GROUNDWORK_TUNE=1` does so, too."""
    value, offset, mask = value.contiguous(), offset.contiguous(), mask.contiguous()
    n, ho, wo, _ = offset.shape
    output = value.new_empty(n, ho, wo, value.shape[-1])
    if output.numel() == 0:
        return output
    call = _call(value, offset, mask, geometry, softmax, value.data_ptr())

    def launch(choice: ForwardChoice) -> None:
        _launch(call, choice, "dcnv3_forward", False, (value, offset, mask, output))

    launch(_choose(call, "forward", FORWARD_CHOICES, launch, tune))
    return output


def backward(
    grad_output: Tensor,
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    geometry: Geometry,
    softmax: bool,
    tune: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """tune: as in `forward`."""
    grad_output = grad_output.to(value.dtype).contiguous()
    value, offset, mask = value.contiguous(), offset.contiguous(), mask.contiguous()
    grad_offset, grad_mask = torch.empty_like(offset), torch.empty_like(mask)
    if grad_output.numel() == 0:
        return torch.zeros_like(value), grad_offset, grad_mask
    pointers = value.data_ptr() | grad_output.data_ptr()
    call = _call(value, offset, mask, geometry, softmax, pointers)
    inputs = (grad_output, value, offset, mask)
    if torch.are_deterministic_algorithms_enabled():
        scale = fixed_scale(grad_output, mask, geometry, softmax)
        sums = torch.zeros_like(value, dtype=torch.int64)
        tensors = (*inputs, sums, grad_offset, grad_mask, scale)
        _launch(call, ATOMIC_CHOICES[0], "dcnv3_backward", True, tensors)
        return (sums.double() / scale).to(value.dtype), grad_offset, grad_mask

    def launch(choice: BackwardChoice, sums: Tensor) -> None:
        tensors = (*inputs, sums, grad_offset, grad_mask)
        if isinstance(choice, TileChoice):
            _launch(call, choice, "dcnv3_backward_tile", False, tensors)
        else:  # the kernel does not look at the last argument
            _launch(call, choice, "dcnv3_backward", False, (*tensors, grad_mask))

    @cache
    def scratch() -> Tensor:  # what trials add to must not be the gradient
        return torch.zeros_like(value, dtype=torch.float32)

    choices = backward_choices(call)
    choice = _choose(call, "backward", choices, lambda trial: launch(trial, scratch()), tune)
    sums = torch.zeros_like(value, dtype=torch.float32)
    launch(choice, sums)
    return sums.to(value.dtype), grad_offset, grad_mask


def tune(device: int) -> list[str]:
    """Measure the kinds of calls of InternImage on a device where they have not been; names them.

    3x3 logits, 16 and 32 channels per group, bfloat16, float16 and float32, 2^14 to 2^22 units.
    """
    geometry = make_geometry(3, 1, 1, 1, 8, 1.0, False)
    kinds = []
    for dtype, depth in itertools.product(DTYPES, (16, 32)):
        for power in range(14, 23):
            images, side = (1 << power - 13, 28) if power < 20 else (1 << power - 15, 56)
            g = torch.Generator(torch.device("cuda", device)).manual_seed(0)
            value, offset, mask, grad = (
                torch.randn(images, side, side, channels, generator=g, device=g.device).to(dtype)
                for channels in (8 * depth, 8 * 18, 8 * 9, 8 * depth)
            )
            with torch.cuda.device(device):
                forward(value, offset, mask, geometry, True, tune=True)
                backward(grad, value, offset, mask, geometry, True, tune=True)
            kinds.append(_call(value, offset, mask, geometry, True, MAX_BYTES).kind)
    return kinds


def fixed_scale(grad_output: Tensor, mask: Tensor, geometry: Geometry, softmax: bool) -> Tensor:
    """Steps per unit at which no sum of grad_value overflows 64 bits: a power of two, (1,)."""
    _, ho, wo, _ = grad_output.shape
    largest = grad_output.abs().amax().double() if grad_output.numel() else torch.zeros(())
    if not softmax and mask.numel():
        largest = largest * mask.abs().amax().double()
    bound = largest * (ho * wo * geometry.num_points)
    return torch.exp2((62 - bound.log2()).floor().clamp(-100, 100)).float().reshape(1)


def make_problem(
    value_shape: Sequence[int], offset_shape: Sequence[int], geometry: Geometry
) -> Problem:
    n, height, width, channels = value_shape
    _, ho, wo, _ = offset_shape
    (ch, cw), (ph, pw) = geometry.center_hw, geometry.padding_hw
    return Problem(
        n * ho * wo * geometry.groups,
        *(height, width, ho, wo),
        *(geometry.groups, channels // geometry.groups),
        *geometry.stride_hw,
        *(ch - ph, cw - pw),
        geometry.offset_scale,
    )


def _call(
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    geometry: Geometry,
    softmax: bool,
    pointers: int,
) -> Call:
    # value and grad_output are read in pieces of up to 16 bytes; all else is offset and mask, which
    # are aligned to their pairs, or has just been allocated. pointers: their bits, together.
    dtypes = (value.dtype, offset.dtype, mask.dtype)
    shapes = (tuple(value.shape), tuple(offset.shape))
    alignment = min(MAX_BYTES, pointers & -pointers)
    return _cached_call(value.device.index, *shapes, dtypes, geometry, softmax, alignment)


@lru_cache(maxsize=1024)
def _cached_call(
    device: int,
    value_shape: tuple[int, ...],
    offset_shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    geometry: Geometry,
    softmax: bool,
    alignment: int,
) -> Call:
    problem = make_problem(value_shape, offset_shape, geometry)
    capability = torch.cuda.get_device_capability(device)
    return Call(device, capability, problem, geometry, dtypes, softmax, alignment)


def _choose(
    call: Call, direction: str, choices: Sequence[C], launch: Callable[[C], None], tune: bool
) -> C:
    table = autotune.table_of(call.device, (SOURCE, TILE_SOURCE))
    key = f"dcnv3 {direction}, {call.kind}"
    return autotune.choose(table, key, choices, launch, tune or autotune.wanted())


def _launch(
    call: Call,
    choice: ForwardChoice | BackwardChoice,
    name: str,
    fixed: bool,
    tensors: tuple[Tensor, ...],
) -> None:
    kernel, cut, grid = _kernel(call, choice, name, fixed)
    arguments: list[Any] = [call.problem]
    arguments += (ctypes.c_void_p(tensor.data_ptr()) for tensor in (grid, *tensors))
    kernel.launch(cut.blocks, cut.threads, arguments)


@lru_cache(maxsize=1024)
def _kernel(
    call: Call, choice: ForwardChoice | BackwardChoice, name: str, fixed: bool
) -> tuple[CudaKernel, Plan, Tensor]:
    if isinstance(choice, TileChoice):
        source, cut = TILE_SOURCE, tile_plan(call, choice)
        assert cut is not None, "backward_choices"
    else:
        source, points = SOURCE, call.geometry.num_points
        arguments = (call.problem, points, call.dtypes, call.softmax, fixed, call.alignment)
        cut = plan(*arguments, **choice._asdict())
    kernel = cuda_kernel(source, name, tuple(sorted(cut.settings.items())), call.device)
    return kernel, cut, _grid(call.geometry, call.device)


@cache
def _grid(geometry: Geometry, device: int) -> Tensor:
    """offset_scale times the regular grid, (P, 2) on the device; rounded once from float64."""
    grid = geometry.offset_scale * torch.tensor(geometry.points_xy(), dtype=torch.float64)
    return grid.float().to(torch.device("cuda", device))
