"""How the kernels of `csrc/fused_layers.cu` are cut into threads, and launched."""

import ctypes
from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from groundwork.kernels.cuda_compiler import CudaKernel, cuda_kernel
from groundwork.kernels.fused_layers import DTYPES

SOURCE: Final = "fused_layers.cu"
THREADS: Final = 128
#: Channels that a lane may hold of a pixel: more do not fit its registers.
MAX_HELD: Final = 64
#: Lanes that the kernels which sum over rows should have, to fill a GPU.
ENOUGH_LANES: Final = 1 << 16
#: Most rows that are summed one after the other.
MAX_SPAN: Final = 256


class Problem(ctypes.Structure):
    """`Problem` of the CUDA source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "rows_per_sample", "span")),
        *((name, ctypes.c_int32) for name in ("height", "width")),
        ("eps", ctypes.c_float),
    )


class Plan(NamedTuple):
    """settings: of the source. held: rows of channels that a group of lanes has."""

    settings: Mapping[str, int]
    held: int

    @property
    def rows_per_block(self) -> int:
        """Rows (in a convolution: strips of pixels) that a block has."""
        return THREADS // self.settings["LANES"]


def plan(
    channels: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    side: int = 0,
    alignment: int = 16,
) -> Plan:
    """dtypes: of x, y, the output; side: of the convolution, 0 for a residual; in bytes, the
    alignment that all tensors have."""
    sizes = [dtype.itemsize for dtype in dtypes]
    # 16 bytes of the narrower dtype, of which two loads of the wider
    width = max(1, min(16 // min(sizes), min(16, alignment) // max(sizes) * 2))
    while channels % width or (alignment < 16 and width * max(sizes) > alignment):
        width //= 2
    lanes = 1
    while lanes < 32 and lanes * width < channels:
        lanes *= 2
    pieces = -(-channels // (lanes * width))
    held = pieces * width
    # so many that the registers of none of the kernels spill: the tests see to it
    pixels = 1 if side in (0, 7) or held > 32 else 2 if held > 16 or side == 5 else 4
    known = DTYPES["cuda"]
    x, y, out = (known[dtype] for dtype in dtypes)
    settings = {
        **{"X_T": x, "Y_T": y, "OUT_T": out, "CHANNELS": channels, "WIDTH": width},
        **{"LANES": lanes, "PIECES": pieces, "SIDE": side, "PIXELS": pixels, "THREADS": THREADS},
    }
    return Plan(settings, held)


def limit(channels: int, side: int = 0) -> str | None:
    """Why a shape cannot be taken; None where it can."""
    if side > 7:
        return f"a kernel of {side}×{side} does not fit its registers"
    pieces = plan(channels, (torch.float32,) * 3, side).held
    if pieces > MAX_HELD:
        return f"{channels} channels do not fit its registers"
    return None


def span_of(rows: int, columns: int) -> int:
    """How many rows a lane sums, of which `columns` lanes are needed side by side."""
    return max(1, min(MAX_SPAN, rows * columns // ENOUGH_LANES))


def alignment_of(*tensors: Tensor) -> int:
    """Of all tensors, in bytes: a power of two, at most 16."""
    pointers = 16
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    return pointers & -pointers


def launch(
    name: str, chosen: Plan, problem: Problem, blocks: int, tensors: tuple[Tensor | None, ...]
) -> None:
    """Queue a kernel on the current stream of the tensors' device (None: a null pointer)."""
    device = next(t for t in tensors if t is not None).device.index
    settings = tuple(sorted(chosen.settings.items()))
    kernel: CudaKernel = cuda_kernel(SOURCE, name, settings, device)
    pointers = (ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors)
    kernel.launch(blocks, THREADS, [problem, *pointers])
