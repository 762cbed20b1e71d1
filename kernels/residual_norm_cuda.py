"""`residual_norm` on CUDA: the kernels of `csrc/fused_layers.cu`."""

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


def limit(channels: int) -> str | None:
    """Why the kernels cannot take a shape; None where they can."""
    return fused_layers_cuda.limit(channels)


def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    gamma: Tensor,
    keep: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    out = x.new_empty(x.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    given = [wide(t) for t in (scale, shift, gamma, keep)]
    chosen = plan(x.shape[-1], (x.dtype, y.dtype, dtype), alignment=alignment_of(x, y))
    problem = make_problem(x, eps)
    blocks = -(-problem.rows // chosen.rows_per_block)
    launch("residual_norm_forward", chosen, problem, blocks, (x, y, *given, out))
    return out


def backward(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    gamma: Tensor,
    keep: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of y, and those of scale, shift and gamma: (3, C)."""
    grad, y = grad.contiguous(), y.contiguous()
    channels = y.shape[-1]
    grad_y = torch.empty_like(y)
    if y.numel() == 0:
        return grad_y, y.new_zeros((3, channels), dtype=torch.float32)
    wide_scale, wide_shift, wide_gamma = scale.float(), shift.float(), gamma.float()
    kept = wide(keep)
    chosen = plan(channels, (y.dtype, y.dtype, grad.dtype), alignment=alignment_of(grad, y))
    problem = make_problem(y, eps)
    problem.span, spans, sum_blocks = cut_sums(chosen, problem.rows, channels)
    moments = y.new_empty((problem.rows, 2), dtype=torch.float32)
    sums = y.new_empty((spans, 2, channels), dtype=torch.float32)
    blocks = -(-problem.rows // chosen.rows_per_block)
    tensors = (grad, y, wide(scale), wide(gamma), kept, grad_y, moments)
    launch("residual_norm_backward", chosen, problem, blocks, tensors)
    launch("residual_norm_sums", chosen, problem, sum_blocks, (grad, y, kept, moments, sums))
    return grad_y, parameter_gradients(sums, wide_scale, wide_shift, wide_gamma)


def parameter_gradients(sums: Tensor, scale: Tensor, shift: Tensor, gamma: Tensor) -> Tensor:
    """sums: (spans, 2, C), of keep · grad · normed and of keep · grad -> (3, C)."""
    along_normed, along = sums.sum(0)
    return torch.stack((gamma * along_normed, gamma * along, scale * along_normed + shift * along))


def cut_sums(chosen: Plan, rows: int, channels: int) -> tuple[int, int, int]:
    """Rows of a span, spans, and blocks of the kernel that sums."""
    columns = channels // chosen.settings["WIDTH"]
    span = span_of(rows, columns)
    spans = -(-rows // span)
    return span, spans, -(-spans * columns // THREADS)


def make_problem(x: Tensor, eps: float) -> Problem:
    rows = x.numel() // x.shape[-1]
    return Problem(rows, max(1, rows // x.shape[0]), 1, 1, 1, eps)
