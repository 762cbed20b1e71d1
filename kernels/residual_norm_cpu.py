"""`residual_norm` on the CPU: the C++ kernels of `csrc/residual_norm_cpu.cpp`."""

import ctypes
from typing import Final

import torch
from torch import Tensor

from groundwork.kernels.fused_layers import DTYPES, call_host, host_library, wide

SOURCE: Final = "residual_norm_cpu.cpp"


class _Problem(ctypes.Structure):
    """`ResidualNormProblem` of the C++ source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "channels", "rows_per_sample")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("x", "y", "out", "threads")),
    )


def limit(channels: int) -> str | None:
    """Why the kernels cannot take a shape: they take all."""
    return None


def library(instructions: str | None = None) -> ctypes.CDLL:
    """The compiled kernels, by default for the best instruction set of this CPU."""
    return host_library(SOURCE, "residual_norm_problem_bytes", _Problem, instructions)


def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    gamma: Tensor,
    keep: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    instructions: str | None = None,
) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    out = x.new_empty(x.shape, dtype=dtype)
    given = [wide(t) for t in (scale, shift, gamma, keep)]
    problem = _problem(x, eps, x.dtype, y.dtype, dtype)
    call_host(library(instructions), "residual_norm_forward", problem, x, y, *given, out)
    return out


def backward(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    gamma: Tensor,
    keep: Tensor | None,
    eps: float,
    instructions: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of y, and those of scale, shift and gamma: (3, C)."""
    grad, y = grad.contiguous(), y.contiguous()
    grad_y = torch.empty_like(y)
    grads = y.new_empty((3, y.shape[-1]), dtype=torch.float32)
    given = [wide(t) for t in (scale, shift, gamma, keep)]
    problem = _problem(y, eps, y.dtype, y.dtype, grad.dtype)
    tensors = (grad, y, *given, grad_y, grads)
    call_host(library(instructions), "residual_norm_backward", problem, *tensors)
    return grad_y, grads


def _problem(x: Tensor, eps: float, *dtypes: torch.dtype) -> _Problem:
    channels = x.shape[-1]
    rows = x.numel() // channels if channels else 0
    known = DTYPES["cpu"]
    return _Problem(
        rows,
        channels,
        max(1, rows // max(1, x.shape[0])),
        eps,
        *(known[dtype] for dtype in dtypes),
        torch.get_num_threads(),
    )
