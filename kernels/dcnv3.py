"""DCNv3, the deformable convolution of InternImage (arXiv 2211.05778, section 3.1).

For output position (n, y, x), group g and kernel point p = (i, j), its columns i outermost:

    X = x·stride_w - pad_w + c_w + s·(i·dilation_w - c_w + offset_x[n, y, x, g, p])
    Y = y·stride_h - pad_h + c_h + s·(j·dilation_h - c_h + offset_y[n, y, x, g, p])
    out[n, y, x, g] = Σ_p mask[n, y, x, g, p] · bilinear(value[n, :, :, g], Y, X)

with c = dilation·(k-1)//2 and s = `offset_scale`, which scales the regular grid as well as the
learned offset. Coordinates count pixels of the unpadded image. A sample lies in the cell
[floor(X), floor(X)+1] × [floor(Y), floor(Y)+1], also where X or Y is an integer, so that offsets
have the right-sided derivative at the kink; at initialisation all samples sit there. Corners
outside of the image count as zero. Coordinates, weights and sums are float32 (float64 if an input
is), whatever the storage dtype. A sample at no finite place contributes nothing.

Layouts: value (N, H, W, G·D); offset (N, Ho, Wo, G·P·2), (x, y) innermost; mask (N, Ho, Wo, G·P);
output (N, Ho, Wo, G·D). The op owns no parameter, and does not normalise the mask unless asked to.

`dcnv3_reference` is the definition of correct; `dcnv3` is the op to call. Its backends: `cuda`
and `cpu`, compiled at first use; `reference`, for everything else.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import Tensor

from groundwork.kernels import dcnv3_cpu, dcnv3_cuda, dcnv3_reference
from groundwork.kernels.dcnv3_geometry import (
    Geometry,
    Size2d,
    check_tensors,
    make_geometry,
    statement,
)
from groundwork.kernels.fused_layers import is_eager, refuse_second_derivative


class Backend(NamedTuple):
    """One implementation of the op.

    forward: (value, offset, mask, geometry, softmax) -> output.
    backward: (grad_output, value, offset, mask, geometry, softmax) -> their three gradients.
    unsupported: (value, offset, mask) -> why it cannot take them, or None.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Geometry, bool], Tensor]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Geometry, bool], tuple[Tensor, Tensor, Tensor]
    ]
    unsupported: Callable[[Tensor, Tensor, Tensor], str | None]


#: In order of preference.
BACKENDS: Final[Mapping[str, Backend]] = {
    "cuda": Backend(dcnv3_cuda.forward, dcnv3_cuda.backward, dcnv3_cuda.unsupported),
    "cpu": Backend(dcnv3_cpu.forward, dcnv3_cpu.backward, dcnv3_cpu.unsupported),
    "reference": Backend(
        dcnv3_reference.reference_forward,
        dcnv3_reference.reference_backward,
        lambda value, offset, mask: None,
    ),
}


def dcnv3(
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    kernel_size: Size2d,
    stride: Size2d = 1,
    padding: Size2d | None = None,
    dilation: Size2d = 1,
    groups: int,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Samples each group at its kernel points, moved by the offsets, and sums by the mask.

    value: (N, H, W, C); offset: (N, Ho, Wo, groups·P·2); mask: (N, Ho, Wo, groups·P)
    -> (N, Ho, Wo, C) in value.dtype, where P = kh·kw, less one with `remove_center`. Sizes are an
    int or (h, w); padding None keeps H and W for an odd kernel at stride 1. With `softmax` the mask
    holds logits, normalised over P per group. The dtypes may differ (bf16 value, fp32 offset).

    Differentiable once; `dcnv3_reference` has derivatives of every order. Without an autocast rule
    on purpose: the op takes what the layers before it give, and sums in float32 in any case.
    """
    geometry = make_geometry(
        kernel_size, stride, padding, dilation, groups, offset_scale, remove_center
    )
    softmax = statement("dcnv3", "softmax", softmax)
    check_tensors(value, offset, mask, geometry)
    check_backend("dcnv3", backend)
    return sample_and_sum(value, offset, mask, geometry, softmax, backend)


def check_backend(op: str, backend: str) -> None:
    if not isinstance(backend, str) or backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"{op}: backend {backend!r} is unknown; choose one of {', '.join(('auto', *BACKENDS))}"
        )


def sample_and_sum(
    value: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry, softmax: bool, backend: str
) -> Tensor:
    """`dcnv3` of arguments that have been checked."""
    if is_eager(value, offset, mask):
        return _Dcnv3.apply(value, offset, mask, geometry, softmax, backend)
    return _dcnv3_op(
        value,
        offset,
        mask,
        list(geometry.kernel_hw),
        list(geometry.stride_hw),
        list(geometry.padding_hw),
        list(geometry.dilation_hw),
        geometry.groups,
        geometry.offset_scale,
        geometry.remove_center,
        softmax,
        backend,
    )


def choose_backend(name: str, value: Tensor, offset: Tensor, mask: Tensor) -> str:
    """The backend that runs: `name` itself, or with "auto" the first that takes the tensors."""
    if name == "auto":
        return next(n for n, b in BACKENDS.items() if b.unsupported(value, offset, mask) is None)
    reason = BACKENDS[name].unsupported(value, offset, mask)
    if reason is not None:
        raise ValueError(f"dcnv3: backend {name!r} cannot run: {reason}; use backend='auto'")
    return name


# ---- eager: half of a registered op's overhead, which a GPU would wait for ----


class _Dcnv3(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        offset: Tensor,
        mask: Tensor,
        geometry: Geometry,
        softmax: bool,
        backend: str,
    ) -> Tensor:
        chosen = BACKENDS[choose_backend(backend, value, offset, mask)]
        ctx.save_for_backward(value, offset, mask)
        ctx.arguments = (geometry, softmax, chosen)
        return chosen.forward(value, offset, mask, geometry, softmax)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        gradients = _Dcnv3Backward.apply(grad_output, *ctx.saved_tensors, *ctx.arguments)
        return (*gradients, None, None, None)


class _Dcnv3Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        value: Tensor,
        offset: Tensor,
        mask: Tensor,
        geometry: Geometry,
        softmax: bool,
        chosen: Backend,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return chosen.backward(grad_output, value, offset, mask, geometry, softmax)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative(ctx, *gradients)
        return ()


# ---- registration: fake kernels, autograd; the backend is chosen when the op runs ----


@torch.library.custom_op("groundwork::dcnv3", mutates_args=())
def _dcnv3_op(
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_hw: list[int],
    stride_hw: list[int],
    padding_hw: list[int],
    dilation_hw: list[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
    backend: str,
) -> Tensor:
    geometry = _from_lists(
        kernel_hw, stride_hw, padding_hw, dilation_hw, groups, offset_scale, remove_center
    )
    forward = BACKENDS[choose_backend(backend, value, offset, mask)].forward
    return forward(value, offset, mask, geometry, softmax)


@torch.library.custom_op("groundwork::dcnv3_backward", mutates_args=())
def _dcnv3_backward_op(
    grad_output: Tensor,
    value: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_hw: list[int],
    stride_hw: list[int],
    padding_hw: list[int],
    dilation_hw: list[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = _from_lists(
        kernel_hw, stride_hw, padding_hw, dilation_hw, groups, offset_scale, remove_center
    )
    backward = BACKENDS[choose_backend(backend, value, offset, mask)].backward
    return backward(grad_output, value, offset, mask, geometry, softmax)


def _from_lists(
    kernel_hw: list[int],
    stride_hw: list[int],
    padding_hw: list[int],
    dilation_hw: list[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
) -> Geometry:
    return Geometry(
        (kernel_hw[0], kernel_hw[1]),
        (stride_hw[0], stride_hw[1]),
        (padding_hw[0], padding_hw[1]),
        (dilation_hw[0], dilation_hw[1]),
        groups,
        offset_scale,
        remove_center,
    )


@_dcnv3_op.register_fake
def _(value: Tensor, offset: Tensor, mask: Tensor, *arguments: Any) -> Tensor:
    n, ho, wo, _ = offset.shape
    return value.new_empty(n, ho, wo, value.shape[-1])


@_dcnv3_backward_op.register_fake
def _(
    grad_output: Tensor, value: Tensor, offset: Tensor, mask: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        offset.new_empty(offset.shape),
        mask.new_empty(mask.shape),
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.arguments = inputs[3:]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    gradients = _dcnv3_backward_op(grad_output, *ctx.saved_tensors, *ctx.arguments)
    return (*gradients, *(None for _ in ctx.arguments))


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> NoReturn:
    refuse_second_derivative("dcnv3")


_dcnv3_op.register_autograd(_backward, setup_context=_save_inputs)
_dcnv3_backward_op.register_autograd(_refuse_second_derivative)
