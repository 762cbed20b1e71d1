"""`depthwise_norm_gelu` on CUDA: the kernels of `csrc/fused_layers.cu`."""

import torch
from torch import Tensor

from groundwork.kernels import fused_layers_cuda
from groundwork.kernels.fused_layers import wide
from groundwork.kernels.fused_layers_cuda import (
    THREADS,
    Plan,
    Problem,
    alignment_of,
    launch,
    plan,
    span_of,
)


def limit(channels: int, kernel: int) -> str | None:
    """Why the kernels cannot take a shape; None where they can."""
    return fused_layers_cuda.limit(channels, kernel)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(x.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    given = (taps_first(weight), *(wide(t) for t in (bias, scale, shift)))
    chosen = plan(x.shape[-1], (x.dtype, x.dtype, dtype), weight.shape[-1], alignment_of(x))
    problem = make_problem(x, eps)
    blocks = strip_blocks(chosen, problem)
    launch("depthwise_norm_gelu_forward", chosen, problem, blocks, (x, *given, out))
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of weight (taps first), bias, scale, shift: (k·k + 3, C)."""
    grad, x = grad.contiguous(), x.contiguous()
    channels, side = x.shape[-1], weight.shape[-1]
    grad_x, along = torch.empty_like(x), torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, x.new_zeros((side**2 + 3, channels), dtype=torch.float32)
    taps = taps_first(weight)
    vectors = tuple(wide(t) for t in (bias, scale, shift))
    chosen = plan(channels, (x.dtype, x.dtype, grad.dtype), side, alignment_of(grad, x))
    problem = make_problem(x, eps)
    problem.span, spans, sum_blocks = cut_sums(problem.rows, channels)
    moments = x.new_empty((problem.rows, 2), dtype=torch.float32)
    sums = x.new_empty((spans, side**2 + 3, channels), dtype=torch.float32)
    blocks = strip_blocks(chosen, problem)
    tensors = (grad, x, taps, *vectors, along, moments)
    launch("depthwise_norm_gelu_backward", chosen, problem, blocks, tensors)
    launch("depthwise_norm_gelu_image", chosen, problem, blocks, (along, taps, grad_x))
    tensors = (grad, x, along, taps, *vectors, moments, sums)
    launch("depthwise_norm_gelu_sums", chosen, problem, sum_blocks, tensors)
    return grad_x, sums.sum(0)


def taps_first(weight: Tensor) -> Tensor:
    """(C, 1, k, k) -> (k·k, C) in float32, contiguous."""
    return weight.detach().float().reshape(len(weight), -1).t().contiguous()


def strip_blocks(chosen: Plan, problem: Problem) -> int:
    per_line = -(-problem.width // chosen.settings["PIXELS"])
    strips: int = problem.rows // problem.width * per_line
    return -(-strips // chosen.rows_per_block)


def cut_sums(rows: int, channels: int) -> tuple[int, int, int]:
    """Rows of a span, spans, and blocks of the kernel that sums."""
    span = span_of(rows, channels)
    spans = -(-rows // span)
    return span, spans, -(-spans * channels // THREADS)


def make_problem(x: Tensor, eps: float) -> Problem:
    batch, height, width, _ = x.shape
    return Problem(batch * height * width, height * width, 1, height, width, eps)
