"""The contrastive loss with several positives per row, over the batches of all ranks.

UniCL (arXiv 2204.03610), equations 3 to 5. With normalised features U, V and L = scale U V^T,
T_ij = 1 where labels i and j agree, a row's loss is -sum_j T_ij log softmax_j(L_i.) / sum_j T_ij.
The logits are computed in float32, a block of rows at a time, so neither L nor T exists as a whole.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Label of a sample that belongs to no class: its only positive is itself.
UNIQUE = -1


class _GatherRanks(torch.autograd.Function):
    """Concatenate over ranks; the gradient of a rank's part is summed over all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        world = dist.get_world_size()
        out = x.new_empty(world * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may still need its own
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_ranks(x: Tensor) -> Tensor:
    """x: (b, ...) of this rank -> (world x b, ...), differentiable; x itself for one rank.

    Every rank must bring the same b. The mean over ranks of losses that use the result has, after
    gradient averaging over ranks, the gradient of the global loss.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _GatherRanks.apply(x)


def resolve_unique(labels: Tensor) -> Tensor:
    """Give each UNIQUE entry a label of its own. labels: (N,) int64 of the *global* batch -> (N,).

    Only after the gather: two ranks on their own would invent the same fresh label. Fresh labels
    are negative, so they meet no class, and no 64-bit hash of a text however large.
    """
    fresh = UNIQUE - 1 - torch.arange(len(labels), device=labels.device)
    return torch.where(labels == UNIQUE, fresh, labels)


class _SoftContrastive(torch.autograd.Function):
    """Mean over rows of the multi-positive cross entropy; gradients are made block by block too."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        query_labels: Tensor,
        key_labels: Tensor,
        block_rows: int,
    ) -> Tensor:
        q, k, s = queries.float(), keys.float(), scale.float()
        grad_q, grad_k = torch.empty_like(q), torch.zeros_like(k)
        loss, grad_s = q.new_zeros(()), q.new_zeros(())
        with torch.autocast(q.device.type, enabled=False):  # it would make the logits bf16 again
            for start in range(0, len(q), block_rows):
                rows = slice(start, start + block_rows)
                cosines = q[rows] @ k.T  # (b, N)
                log_p = torch.log_softmax(s * cosines, dim=1)
                targets = (query_labels[rows, None] == key_labels).float()
                targets /= targets.sum(1, keepdim=True)
                loss -= (targets * log_p).sum()
                grad = log_p.exp_().sub_(targets)  # of the row's loss by its logits
                grad_s += (grad * cosines).sum()
                grad_q[rows] = grad @ k
                grad_k.addmm_(grad.T, q[rows])
        ctx.save_for_backward(grad_q, grad_k, grad_s, s)
        ctx.dtypes = queries.dtype, keys.dtype, scale.dtype
        return loss / len(q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_q, grad_k, grad_s, s = ctx.saved_tensors
        factor = grad / len(grad_q)
        return (
            (grad_q * (factor * s)).to(ctx.dtypes[0]),
            (grad_k * (factor * s)).to(ctx.dtypes[1]),
            (grad_s * factor).to(ctx.dtypes[2]),
            None,
            None,
            None,
        )


def soft_contrastive(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    block_rows: int = 1024,
) -> Tensor:
    """Mean over queries of the multi-positive contrastive loss, float32.

    queries: (b, D); keys: (N, D); scale: (); query_labels: (b,), key_labels: (N,) int64. Every
    query needs a key of its label. Memory: a few times block_rows x N floats, in both directions.
    """
    return _SoftContrastive.apply(queries, keys, scale, query_labels, key_labels, block_rows)


def unicl_loss(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    labels: Tensor,
    block_rows: int = 1024,
) -> tuple[Tensor, Tensor]:
    """(image-to-text, text-to-image) losses of this rank's rows against the global batch.

    image_features, text_features: (b, D) normalised; scale: (); labels: (b,) int64, UNIQUE for
    image-text pairs without a class. Mean over ranks of the two losses' mean is the global loss.
    """
    all_labels = resolve_unique(gather_ranks(labels))
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = all_labels[rank * len(labels) : (rank + 1) * len(labels)]
    all_image, all_text = gather_ranks(image_features), gather_ranks(text_features)
    i2t = soft_contrastive(image_features, all_text, scale, own, all_labels, block_rows)
    t2i = soft_contrastive(text_features, all_image, scale, own, all_labels, block_rows)
    return i2t, t2i
