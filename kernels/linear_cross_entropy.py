"""A linear layer and cross-entropy as one op that never holds all logits.

For captioning the logits (tokens x vocabulary, in float32) are the largest tensor by far. Here a
block of rows is multiplied, normalised and turned into gradients before the next one; what is kept
is the size of the inputs' gradients. With q_v = smoothing/V + (1 - smoothing)·[v = target]:

    loss = Σ_v -q_v · log softmax(x W^T + b)_v,    d loss / d logits = softmax - q
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from groundwork.kernels.fused_layers import (
    check_tensor,
    convolved_dtype,
    in_functorch,
    is_cast,
    refuse_second_derivative,
)

OP = "linear_cross_entropy"
#: Logits of a block, in elements: 64 MiB of float32.
BLOCK_ELEMENTS = 1 << 24
#: What float16 holds of softmax - q is this many times as large: down to 1.5e-8 in full precision.
FLOAT16_FACTOR = 4096.0


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """x: (N, D); weight: (V, D); targets: (N,) int64; bias: (V,) -> loss () in float32.

    Rows whose target is `ignore_index` count neither in the loss, nor in its mean, nor in a
    gradient, even where they are NaN (there torch's gradients are NaN). The mean of no rows is NaN
    and its gradients zeros, as in torch. Products are in the dtype of x, or of autocast; all else
    is float32. Targets out of range are named on the CPU; on CUDA, where looking would wait for the
    device, torch's own assertion speaks.

    Differentiable once: the gradients are computed with the loss, and kept until the backward pass
    in the dtypes of x, weight and bias; those of float16 in float32 (4 bytes each, not 2), since
    the scale of the loss, which keeps them in the range of float16, is not known before.
    """
    _check(x, weight, targets, bias, label_smoothing, ignore_index, reduction)
    if not torch.is_grad_enabled():  # the function below would compute gradients all the same
        x, weight, bias = x.detach(), weight.detach(), None if bias is None else bias.detach()
    loss: Tensor = _LinearCrossEntropy.apply(
        x, weight, targets, bias, label_smoothing, ignore_index, reduction
    )
    return loss


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The same by materialising the logits: the definition of correct."""
    return F.cross_entropy(
        F.linear(x, weight, bias).float(),
        targets,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        smoothing: float,
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        kind = x.device.type
        known = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if known else nullcontext():
            loss, gradients = _loss_and_gradients(
                *(x, weight, targets, bias, smoothing, ignore_index, reduction),
                dtype=convolved_dtype(x),
                needs=(ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]),
            )
        # the inputs are kept for their place in the graph of a second derivative, which is refused
        ctx.save_for_backward(x, weight, bias, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        grad_x, grad_weight, grad_bias = _LinearCrossEntropyBackward.apply(
            grad_loss, *ctx.saved_tensors
        )
        return grad_x, grad_weight, None, grad_bias, None, None, None


class _LinearCrossEntropyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad_loss: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """tensors: x, weight, bias, and the gradients of each."""
        return tuple(
            None if of is None or grad is None else (grad * grad_loss).to(of.dtype)
            for of, grad in zip(tensors[:3], tensors[3:], strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivative(OP)


def _loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    smoothing: float,
    ignore_index: int,
    reduction: str,
    *,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The loss, and the gradients of x, weight and bias that are needed.

    dtype: of the products.
    """
    needs_x, needs_weight, needs_bias = needs
    count = (targets != ignore_index).sum()
    share = torch.ones((), device=x.device)
    if reduction == "mean":
        share = 1.0 / count.clamp_min(1)  # of no rows: 1, so that the gradients are zeros
    vocabulary = len(weight)
    loss = torch.zeros((), device=x.device)
    grad_x = torch.empty_like(x, dtype=_kept_dtype(x)) if needs_x else None
    grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if needs_weight else None
    grad_bias = weight.new_zeros(vocabulary, dtype=torch.float32) if needs_bias else None
    low_weight, low_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    # float16 would lose a share of thousands of rows: it is given once the products are float32
    now, later = (FLOAT16_FACTOR, share / FLOAT16_FACTOR) if dtype == torch.float16 else (share, 1)
    rows = max(1, BLOCK_ELEMENTS // vocabulary)
    for first in range(0, len(x), rows):
        part, target = x[first : first + rows], targets[first : first + rows]
        kept = target != ignore_index
        part = part.to(dtype).where(kept.unsqueeze(1), 0)  # chosen, as NaN times zero is NaN
        target = target.where(kept, 0).unsqueeze(1)
        logits = F.linear(part, low_weight, low_bias).float()
        log_sum = logits.logsumexp(1)
        losses = log_sum - (1 - smoothing) * logits.gather(1, target).squeeze(1)
        if smoothing:
            losses = losses - smoothing * logits.mean(1)
        loss = loss + losses.where(kept, 0).sum()
        if not (needs_x or needs_weight or needs_bias):
            continue
        # in place: the block is the largest tensor here
        grad = logits.sub_(log_sum.unsqueeze(1)).exp_()
        if smoothing:
            grad.sub_(smoothing / vocabulary)
        grad.scatter_add_(1, target, grad.new_full(target.shape, smoothing - 1))
        grad.mul_((kept * now).unsqueeze(1))
        low = grad.to(dtype)
        if grad_x is not None:
            grad_x[first : first + rows] = _product(low, low_weight) * later
        if grad_weight is not None:
            grad_weight += _product(low.mT, part)
        if grad_bias is not None:
            grad_bias += grad.sum(0)
    if grad_weight is not None:
        grad_weight = grad_weight.mul_(later).to(_kept_dtype(weight))
    if grad_bias is not None and bias is not None:
        grad_bias = grad_bias.mul_(later).to(_kept_dtype(bias))
    if reduction == "mean":
        loss = loss / count
    return loss, (grad_x, grad_weight, grad_bias)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of float16 in float32."""
    if a.dtype != torch.float16:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _kept_dtype(tensor: Tensor) -> torch.dtype:
    """In which a gradient waits for the scale of the loss."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _check(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    smoothing: float,
    ignore_index: int,
    reduction: str,
) -> None:
    if in_functorch():
        raise RuntimeError(
            f"{OP}: vmap, func.grad and their like have no rule for the op; call {OP}_reference "
            "there"
        )
    check_tensor(OP, "x", x, x)
    check_tensor(OP, "weight", weight, x)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or len(weight) == 0:
        raise ValueError(
            f"{OP}: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; "
            "expected (N, D) and (V, D), V at least 1"
        )
    if bias is not None:
        check_tensor(OP, "bias", bias, x)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{OP}: bias has shape {tuple(bias.shape)}, expected {weight.shape[0]} values"
            )
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.dtype != x.dtype and not is_cast(x):
            raise TypeError(
                f"{OP}: {name} is {tensor.dtype}, x {x.dtype}; convert one, or use torch.autocast"
            )
    if not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
        raise ValueError(f"{OP}: label_smoothing is {smoothing!r}; give a number in [0, 1)")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{OP}: reduction is {reduction!r}; give 'mean' or 'sum'")
    if not isinstance(ignore_index, int):
        raise TypeError(f"{OP}: ignore_index is {ignore_index!r}; give an int, such as -100")
    _check_targets(x, len(weight), targets, ignore_index)


def _check_targets(x: Tensor, vocabulary: int, targets: Tensor, ignore_index: int) -> None:
    if not isinstance(targets, Tensor):
        raise TypeError(
            f"{OP}: targets are a {type(targets).__name__}; expected an int64 torch.Tensor"
        )
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"{OP}: targets are {targets.dtype} of shape {tuple(targets.shape)}; "
            f"expected int64 of shape {tuple(x.shape[:1])}"
        )
    if targets.device != x.device:
        raise ValueError(f"{OP}: targets are on {targets.device}, expected {x.device}, where x is")
    traced = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
    if traced or targets.device.type != "cpu":
        return
    counted = targets[targets != ignore_index]
    if len(counted) == 0:
        return
    least, most = (int(end) for end in counted.aminmax())
    if least < 0 or most >= vocabulary:
        wrong = least if least < 0 else most
        raise ValueError(
            f"{OP}: targets have {wrong}, expected 0 to {vocabulary - 1} for weight's {vocabulary} "
            f"rows, or ignore_index ({ignore_index})"
        )
