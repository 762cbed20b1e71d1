"""A linear layer and cross-entropy as one op that never holds all logits.

For captioning the logits (tokens x vocabulary, in float32) are the largest tensor by far. Here a
block of rows is multiplied, normalised and turned into gradients before the next one; what is kept
is the size of the inputs' gradients. With q_v = smoothing/V + (1 - smoothing)·[v = target]:

    loss = Σ_v -q_v · log softmax(x W^T + b)_v,    d loss / d logits = softmax - q
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

#: Logits of a block, in elements: 64 MiB of float32.
BLOCK_ELEMENTS = 1 << 24


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

    Rows whose target is `ignore_index` count neither in the loss nor in its mean; the mean of no
    rows is NaN, as in torch. Products are in the dtype of x, all else is float32. Differentiable
    once: the gradients are computed with the loss.
    """
    _check(x, weight, targets, bias, label_smoothing, reduction)
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
        needs_x, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
        count = (targets != ignore_index).sum()
        share = 1.0 / count if reduction == "mean" else torch.ones((), device=x.device)
        vocabulary = len(weight)
        loss = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if needs_weight else None
        grad_bias = weight.new_zeros(vocabulary, dtype=torch.float32) if needs_bias else None
        rows = max(1, BLOCK_ELEMENTS // vocabulary)
        for first in range(0, len(x), rows):
            part, target = x[first : first + rows], targets[first : first + rows]
            kept = target != ignore_index
            target = target.where(kept, 0).unsqueeze(1)
            logits = F.linear(part, weight, bias).float()
            log_sum = logits.logsumexp(1)
            losses = log_sum - (1 - smoothing) * logits.gather(1, target).squeeze(1)
            if smoothing:
                losses = losses - smoothing * logits.mean(1)
            loss = loss + (losses * kept).sum()
            if not (needs_x or needs_weight or needs_bias):
                continue
            # in place: the block is the largest tensor here
            grad = logits.sub_(log_sum.unsqueeze(1)).exp_()
            if smoothing:
                grad.sub_(smoothing / vocabulary)
            grad.scatter_add_(1, target, grad.new_full(target.shape, smoothing - 1))
            grad.mul_((kept * share).unsqueeze(1))
            low = grad.to(x.dtype)
            if grad_x is not None:
                torch.matmul(low, weight.to(x.dtype), out=grad_x[first : first + rows])
            if grad_weight is not None:
                grad_weight += low.mT @ part
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(
            grad_x,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return loss * share

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        grad_x, grad_weight, grad_bias = (
            None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return grad_x, grad_weight, None, grad_bias, None, None, None


def _check(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    smoothing: float,
    reduction: str,
) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; "
            "expected (N, D) and (V, D)"
        )
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: targets are {targets.dtype} of shape {tuple(targets.shape)}; "
            f"expected int64 of shape {tuple(x.shape[:1])}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: bias has shape {tuple(bias.shape)}, expected {weight.shape[0]} "
            "values"
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing is {smoothing}; give [0, 1)")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"linear_cross_entropy: reduction is {reduction!r}; give 'mean' or 'sum'")
