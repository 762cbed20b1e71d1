"""`depthwise_norm_gelu` on the CPU: the C++ kernels of `csrc/depthwise_norm_gelu_cpu.cpp`."""

import ctypes
from typing import Final

import torch
from torch import Tensor

from groundwork.kernels.fused_layers import DTYPES, call_host, host_library, wide

SOURCE: Final = "depthwise_norm_gelu_cpu.cpp"


class _Problem(ctypes.Structure):
    """`DepthwiseNormGeluProblem` of the C++ source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels", "kernel")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("image", "output", "threads")),
    )


def limit(channels: int, kernel: int) -> str | None:
    """Why the kernels cannot take a shape: they take all."""
    return None


def library(instructions: str | None = None) -> ctypes.CDLL:
    """The compiled kernels, by default for the best instruction set of this CPU."""
    return host_library(SOURCE, "depthwise_norm_gelu_problem_bytes", _Problem, instructions)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
    instructions: str | None = None,
) -> Tensor:
    x = x.contiguous()
    output = x.new_empty(x.shape, dtype=dtype)
    parameters = [wide(p) for p in (weight, bias, scale, shift)]
    problem = _problem(x, weight, eps, dtype)
    tensors = (x, *parameters, output)
    call_host(library(instructions), "depthwise_norm_gelu_forward", problem, *tensors)
    return output


def backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    instructions: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of weight (taps first), bias, scale, shift: (k·k + 3, C)."""
    grad_output, x = grad_output.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    grads = x.new_empty((weight.shape[-1] ** 2 + 3, x.shape[-1]), dtype=torch.float32)
    parameters = [wide(p) for p in (weight, bias, scale, shift)]
    problem = _problem(x, weight, eps, grad_output.dtype)
    tensors = (grad_output, x, *parameters, grad_x, grads)
    call_host(library(instructions), "depthwise_norm_gelu_backward", problem, *tensors)
    return grad_x, grads


def _problem(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> _Problem:
    known = DTYPES["cpu"]
    return _Problem(
        *x.shape, weight.shape[-1], eps, known[x.dtype], known[dtype], torch.get_num_threads()
    )
