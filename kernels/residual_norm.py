"""A residual around a normalised branch, with layer scale and stochastic depth, as one op.

    out = x + keep · gamma · LN(y)      LN(y) = scale · (y - mean(y)) / sqrt(var(y) + eps) + shift

with mean and variance over the channels; gamma (layer scale) is per channel, keep (stochastic
depth) per sample. It ends each branch of a block with `post_norm` or `res_post_norm`. In plain
PyTorch each norm, product and sum reads and writes the image, and the backward pass keeps two more;
the op reads each input once, and keeps y.

`residual_norm_reference` is the definition of correct.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from groundwork.kernels import residual_norm_cpu, residual_norm_cuda
from groundwork.kernels.fused_layers import (
    check_eps,
    check_parameters,
    check_tensor,
    choose_backend,
    is_eager,
    layer_norm,
    normed_dtype,
    refuse_second_derivative,
)

OP = "residual_norm"
MODULES = {"cpu": residual_norm_cpu, "cuda": residual_norm_cuda}


def residual_norm(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    gamma: Tensor,
    *,
    keep: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """x, y: (B, ..., C); scale, shift, gamma: (C,); keep: (B,) -> x + keep · gamma · LN(y).

    The output has the dtype that the layers would give it, also under autocast; sums are in
    float32. Any dimension but the channels may be 0. Differentiable once, but not for `keep`; the
    reference is, in every order.
    """
    _check(x, y, {"scale": scale, "shift": shift, "gamma": gamma}, keep)
    check_eps(OP, eps)
    dtype = torch.promote_types(torch.promote_types(x.dtype, normed_dtype(y)), gamma.dtype)
    channels = x.shape[-1]
    chosen = choose_backend(
        OP, backend, x.device, (x.dtype, y.dtype, dtype), lambda b: MODULES[b].limit(channels)
    )
    if chosen == "reference":
        return residual_norm_reference(x, y, scale, shift, gamma, keep=keep, eps=eps)
    eager = is_eager(x, y, scale, shift, gamma, keep)
    run = _ResidualNorm.apply if eager else _residual_norm_op
    output: Tensor = run(x, y, scale, shift, gamma, keep, eps, dtype, chosen)
    return output


def residual_norm_reference(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    gamma: Tensor,
    *,
    keep: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The same by the operations of PyTorch."""
    branch = layer_norm(y, scale, shift, eps) * gamma
    return x + (branch if keep is None else branch * _per_sample(keep, branch))


def _per_sample(keep: Tensor, y: Tensor) -> Tensor:
    """keep: (B,) in y's dtype and number of dimensions."""
    return keep.to(y.dtype).view(-1, *(1 for _ in y.shape[1:]))


# ---- x + keep · gamma · LN(y) ----


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, y, scale, shift, gamma, keep, eps, dtype, backend = inputs
        ctx.save_for_backward(y, scale, shift, gamma, keep)
        ctx.arguments = (x.dtype, eps, backend)
        output: Tensor = MODULES[backend].forward(x, y, scale, shift, gamma, keep, eps, dtype)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y, scale, shift, gamma, keep = ctx.saved_tensors
        dtype, eps, backend = ctx.arguments
        grad_y, grads = _ResidualNormBackward.apply(
            grad, y, scale, shift, gamma, keep, eps, backend
        )
        return _gradients(grad.to(dtype), grad_y, grads, scale, shift, gamma)


class _ResidualNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *arguments, backend = inputs
        grad_y, grads = MODULES[backend].backward(*arguments)
        return grad_y, grads

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        _refuse(ctx, *gradients)


@torch.library.custom_op("groundwork::residual_norm", mutates_args=())
def _residual_norm_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    gamma: Tensor,
    keep: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    output: Tensor = MODULES[backend].forward(x, y, scale, shift, gamma, keep, eps, dtype)
    return output


@torch.library.custom_op("groundwork::residual_norm_backward", mutates_args=())
def _residual_norm_backward_op(
    grad: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    gamma: Tensor,
    keep: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_y, grads = MODULES[backend].backward(grad, y, scale, shift, gamma, keep, eps)
    return grad_y, grads


@_residual_norm_op.register_fake
def _(x: Tensor, y: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=rest[5])


@_residual_norm_backward_op.register_fake
def _(grad: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty((3, y.shape[-1]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, scale, shift, gamma, keep, eps, _, backend = inputs
    ctx.save_for_backward(y, scale, shift, gamma, keep)
    ctx.arguments = (x.dtype, eps, backend)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, scale, shift, gamma, keep = ctx.saved_tensors
    dtype, eps, backend = ctx.arguments
    grad_y, grads = _residual_norm_backward_op(grad, y, scale, shift, gamma, keep, eps, backend)
    return _gradients(grad.to(dtype), grad_y, grads, scale, shift, gamma)


def _gradients(
    grad_x: Tensor,
    grad_y: Tensor,
    grads: Tensor,
    scale: Tensor,
    shift: Tensor,
    gamma: Tensor,
) -> tuple[Any, ...]:
    """grads: of scale, shift and gamma, (3, C) in float32."""
    return (
        grad_x,
        grad_y,
        grads[0].to(scale.dtype),
        grads[1].to(shift.dtype),
        grads[2].to(gamma.dtype),
        *(None, None, None, None),
    )


def _refuse(ctx: Any, *gradients: Tensor) -> NoReturn:
    refuse_second_derivative(OP)


_residual_norm_op.register_autograd(_backward, setup_context=_save)
_residual_norm_backward_op.register_autograd(_refuse)


def _check(x: Tensor, y: Tensor, parameters: dict[str, Tensor], keep: Tensor | None) -> None:
    check_tensor(OP, "x", x, x)
    check_tensor(OP, "y", y, x)
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(
            f"{OP}: x has shape {tuple(x.shape)}, expected (B, ..., C) with at least one channel"
        )
    if y.shape != x.shape:
        raise ValueError(f"{OP}: y has shape {tuple(y.shape)}, expected {tuple(x.shape)} as x has")
    channels = x.shape[-1]
    check_parameters(OP, x, {name: (tensor, channels) for name, tensor in parameters.items()})
    if keep is not None:
        check_parameters(OP, x, {"keep": (keep, x.shape[0])})
