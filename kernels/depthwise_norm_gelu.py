"""A depthwise convolution, LayerNorm and GELU as one op: what feeds the offsets of DCNv3.

    c = Σ_ij weight[i, j] · x[y + i - k//2, x + j - k//2] + bias     (outside of the image: zero)
    out = u · Φ(u)   with   u = scale · (c - mean(c)) / sqrt(var(c) + eps) + shift

over NHWC images, mean and variance over the channels, Φ the normal distribution. In plain PyTorch
each of the three reads and writes the image, the convolution twice more to change its layout, and
the backward pass keeps two intermediate images. The op reads the image once, keeps nothing but
its input, and computes the convolution again in the backward pass.

`depthwise_norm_gelu_reference` is the definition of correct.
"""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from groundwork.kernels import depthwise_norm_gelu_cpu, depthwise_norm_gelu_cuda
from groundwork.kernels.fused_layers import (
    check_eps,
    check_parameters,
    check_tensor,
    choose_backend,
    convolved_dtype,
    is_cast,
    is_eager,
    layer_norm,
    normed_dtype,
    refuse_second_derivative,
)

OP = "depthwise_norm_gelu"
MODULES = {"cpu": depthwise_norm_gelu_cpu, "cuda": depthwise_norm_gelu_cuda}


def depthwise_norm_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """x: (B, H, W, C); weight: (C, 1, k, k), k odd; bias, scale, shift: (C,) -> (B, H, W, C).

    The output has the dtype that the three layers would give it, also under autocast; sums are in
    float32. Parameters may have another dtype than x; without autocast the output has that of x.
    B may be 0. Differentiable once; the reference has derivatives of every order.
    """
    _check(x, weight, bias, scale, shift)
    check_eps(OP, eps)
    dtype = convolved_dtype(x)
    if normed_dtype(x) != x.dtype:
        dtype = torch.float32
    k, channels = weight.shape[-1], x.shape[-1]
    chosen = choose_backend(
        OP, backend, x.device, (x.dtype, dtype), lambda b: MODULES[b].limit(channels, k)
    )
    if chosen == "reference":
        return depthwise_norm_gelu_reference(x, weight, bias, scale, shift, eps=eps)
    run = _DepthwiseNormGelu.apply if is_eager(x, weight, bias, scale, shift) else _op
    output: Tensor = run(x, weight, bias, scale, shift, eps, dtype, chosen)
    return output


def depthwise_norm_gelu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """The same by three layers of PyTorch, without autocast in the widest dtype of the inputs."""
    channels, dtype = x.shape[-1], x.dtype
    if mixed := not (is_cast(x) or dtype == weight.dtype == bias.dtype):
        for tensor in (weight, bias, scale, shift):
            dtype = torch.promote_types(dtype, tensor.dtype)
        weight, bias = weight.to(dtype), bias.to(dtype)
    c = F.conv2d(
        x.to(dtype).permute(0, 3, 1, 2),
        weight,
        bias,
        padding=weight.shape[-1] // 2,
        groups=channels,
    ).permute(0, 2, 3, 1)
    output = F.gelu(layer_norm(c, scale, shift, eps))
    return output.to(x.dtype) if mixed else output


class _DepthwiseNormGelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale, shift)
        ctx.arguments = (eps, backend)
        output: Tensor = MODULES[backend].forward(x, weight, bias, scale, shift, eps, dtype)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        grad_x, grads = _DepthwiseNormGeluBackward.apply(
            grad_output, x, *parameters, *ctx.arguments
        )
        return _gradients(grad_x, grads, *parameters)


class _DepthwiseNormGeluBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        grad_x, grads = MODULES[backend].backward(grad_output, x, weight, bias, scale, shift, eps)
        return grad_x, grads

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        _refuse(ctx, *gradients)


# ---- registration: fake kernels and autograd, for what traces ----


@torch.library.custom_op("groundwork::depthwise_norm_gelu", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    output: Tensor = MODULES[backend].forward(x, weight, bias, scale, shift, eps, dtype)
    return output


@torch.library.custom_op("groundwork::depthwise_norm_gelu_backward", mutates_args=())
def _backward_op(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_x, grads = MODULES[backend].backward(grad_output, x, weight, bias, scale, shift, eps)
    return grad_x, grads


@_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@_backward_op.register_fake
def _(grad_output: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    grads = x.new_empty((weight.shape[-1] ** 2 + 3, x.shape[-1]), dtype=torch.float32)
    return x.new_empty(x.shape), grads


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.arguments = (inputs[5], inputs[7])


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    x, *parameters = ctx.saved_tensors
    grad_x, grads = _backward_op(grad_output, x, *parameters, *ctx.arguments)
    return _gradients(grad_x, grads, *parameters)


def _gradients(
    grad_x: Tensor, grads: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Any, ...]:
    """grads: (k·k + 3, C) in float32, of weight (taps first), bias, scale, shift."""
    return (
        grad_x,
        grads[:-3].t().reshape(weight.shape).to(weight.dtype),
        grads[-3].to(bias.dtype),
        grads[-2].to(scale.dtype),
        grads[-1].to(shift.dtype),
        *(None, None, None),
    )


def _refuse(ctx: Any, *gradients: Tensor) -> NoReturn:
    refuse_second_derivative(OP)


_op.register_autograd(_backward, setup_context=_save_inputs)
_backward_op.register_autograd(_refuse)


def _check(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> None:
    check_tensor(OP, "x", x, x)
    if x.dim() != 4:
        raise ValueError(f"{OP}: x has shape {tuple(x.shape)}, expected (B, H, W, C)")
    if 0 in x.shape[1:]:
        raise ValueError(
            f"{OP}: x has shape {tuple(x.shape)}, expected (B, H, W, C) with at least one pixel "
            "and channel; only B may be 0"
        )
    channels = x.shape[-1]
    check_tensor(OP, "weight", weight, x)
    k = weight.shape[-1] if weight.dim() == 4 else 0
    if weight.shape != (channels, 1, k, k) or k % 2 == 0:
        raise ValueError(
            f"{OP}: weight has shape {tuple(weight.shape)}, expected ({channels}, 1, k, k) with an "
            f"odd k for x of shape {tuple(x.shape)}"
        )
    vectors = {"bias": bias, "scale": scale, "shift": shift}
    check_parameters(OP, x, {name: (tensor, channels) for name, tensor in vectors.items()})
