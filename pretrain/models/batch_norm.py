"""Batch normalisation (arXiv 1502.03167) with float32 statistics, of each rank or over all ranks.

torch's own refuses bfloat16 weights beside float32 statistics on CPUs, casts the statistics with
the model, and nn.SyncBatchNorm runs on GPUs only. The formulas here are the same on every device:
torch's GPU kernels for it are not used, as a rank without rows then talks to the others in another
dtype than they do.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


class FloatBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose running statistics stay float32 when the model is cast to bf16 or fp16.

    Their updates are too small for these: a tenth of a change of a per cent is below a rounding of
    bfloat16. `deepspeed.zero.Init` and DeepSpeed's engine cast buffers, too. x: any float dtype,
    (B, C, ...); the same comes out. momentum: the share of a new batch in the running statistics.
    """

    def __init__(
        self, channels: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True
    ) -> None:
        super().__init__(channels, eps, momentum, affine)
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        if self.running_mean is not None and self.running_mean.element_size() < 4:
            self.running_mean = self.running_mean.float()
            self.running_var = self.running_mean.new_ones(channels).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {"running_mean": self.running_mean, "running_var": self.running_var}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in before.items():
            cast = getattr(self, name)
            if values is not None and cast.is_floating_point() and cast.element_size() < 4:
                setattr(self, name, values.to(cast.device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean = self.running_mean
        assert mean is not None
        weight, bias = self._affine(mean.dtype)
        momentum: Any = self.momentum  # a number, as __init__ takes nothing else
        return F.batch_norm(
            x, mean, self.running_var, weight, bias, self.training, momentum, self.eps
        )

    def _affine(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The weight and the bias in the dtype of the statistics."""
        if not self.affine:
            return None, None
        return self.weight.to(dtype), self.bias.to(dtype)


class SyncFloatBatchNorm(FloatBatchNorm):
    """FloatBatchNorm over the batches of all ranks, while training; else, or alone, the same as it.

    The ranks may have different numbers of rows, and some or all of them none: a rank with none
    learns nothing, and without any row the running statistics stay. A single value per channel over
    all ranks comes out as the bias; torch refuses it, which would cost a wait for the device.
    Collective in the forward and in the backward pass of training: no rank may leave one out.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(x)
        if dist.get_world_size() == 1:
            return super().forward(x)
        running_mean, running_var = self.running_mean, self.running_var
        assert running_mean is not None and running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        with torch.no_grad():
            mean, variance, rows = _statistics_of_all_ranks(x, running_mean.dtype)
            self.num_batches_tracked.add_(1)
            share = self.momentum * (rows > 0).to(mean.dtype)
            unbiased = variance * (rows / (rows - 1).clamp_min(1))
            running_mean.lerp_(mean, share)
            running_var.lerp_(unbiased, share)
        weight, bias = self._affine(mean.dtype)
        y: Tensor = _Normalise.apply(x, weight, bias, mean, variance, rows, self.eps)
        return y


def _statistics_of_all_ranks(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,), and how many values they are of, (1,).

    Parallel form of Chan, Golub and LeVeque (1979): the sums of squares are of differences from a
    mean, so none cancels where the mean is large. Without any value all are 0. Collective.
    """
    channels = x.shape[1]
    own_rows = x.numel() // channels
    own = torch.zeros(2 * channels + 1, dtype=dtype, device=x.device)  # mean, variance, rows
    if own_rows:
        own_variance, own_mean = torch.var_mean(x.to(dtype), _summed(x), correction=0)
        own = torch.cat([own_mean, own_variance, own.new_full((1,), own_rows)])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    means, variances, rows = torch.stack(gathered).split([channels, channels, 1], dim=1)
    total = rows.sum(0)
    part = rows / total.clamp_min(1)  # of each rank, (ranks, 1)
    mean = (part * means).sum(0)
    variance = (part * (variances + (means - mean).square())).sum(0)
    return mean, variance, total


class _Normalise(torch.autograd.Function):
    """Normalisation by statistics that are those of x and of other ranks' rows, and its gradient.

    rows: how many values each channel has over all ranks, (1,). The gradients of weight and bias
    are this rank's; data parallelism sums or averages them as it does all others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        rows: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), rows)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_deviation, rows = ctx.saved_tensors
        shape = (1, -1) + (1,) * (x.dim() - 2)
        normalised = (x.to(mean.dtype) - mean.view(shape)) * inverse_deviation.view(shape)
        grad = grad.to(mean.dtype)
        of_bias = grad.sum(_summed(x))
        of_weight = (grad * normalised).sum(_summed(x))
        sums = torch.cat([of_bias, of_weight])
        dist.all_reduce(sums)
        grad_mean, projection = (sums / rows.clamp_min(1)).chunk(2)
        # the mean and the variance follow x: what of the gradient changes them is taken out
        grad = grad - grad_mean.view(shape) - normalised * projection.view(shape)
        scale = inverse_deviation if weight is None else inverse_deviation * weight
        of_x = (grad * scale.view(shape)).to(x.dtype)
        affine = (None, None) if weight is None else (of_weight, of_bias)
        return of_x, *affine, None, None, None, None


def _summed(x: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [0, *range(2, x.dim())]


# ---- replacing those of a module ----

_PLAIN: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def float_batch_norms(module: nn.Module) -> nn.Module:
    """`module` with a FloatBatchNorm in place of each plain nn.BatchNorm2d in it.

    Changed in place, but for a module that is itself one. Parameters are the same objects, the
    statistics the same values, and the names stay. Raises ValueError for settings that
    FloatBatchNorm has not.
    """
    return _replace(module, FloatBatchNorm, (nn.BatchNorm2d,))


def synchronise_batch_norms(module: nn.Module) -> nn.Module:
    """`module` with a SyncFloatBatchNorm in place of each batch norm, on any device.

    As `float_batch_norms`; BatchNorm1d and BatchNorm3d are replaced as well, and nn.SyncBatchNorm
    stays. Raises TypeError for any other subclass, as what it does besides would be lost.
    """
    for name, part in module.named_modules():
        known = (*_PLAIN, FloatBatchNorm, SyncFloatBatchNorm, nn.SyncBatchNorm)
        if isinstance(part, _BatchNorm) and type(part) not in known:
            raise TypeError(
                f"{name or 'the model'} is a {type(part).__name__}, a batch norm that is not known "
                "here and cannot be synchronised; use FloatBatchNorm or nn.BatchNorm2d, or set "
                "train.sync_batch_norm to false"
            )
    return _replace(module, SyncFloatBatchNorm, (*_PLAIN, FloatBatchNorm))


def _replace(
    module: nn.Module, kind: type[FloatBatchNorm], replaced: tuple[type[_BatchNorm], ...]
) -> nn.Module:
    """Replace the batch norms whose very class is among `replaced`."""
    new: dict[_BatchNorm, FloatBatchNorm] = {}  # one that has two places stays one
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and type(part) in replaced:
            new[part] = _as(kind, part, name)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm) and child in new:
                parent._modules[name] = new[child]
    # itself, where it is one
    return new.get(module, module)  # type: ignore[call-overload]


def _as(kind: type[FloatBatchNorm], norm: _BatchNorm, name: str) -> FloatBatchNorm:
    where = name or "the batch norm"
    if norm.momentum is None or not norm.track_running_stats:
        raise ValueError(
            f"{where} has momentum={norm.momentum}, track_running_stats="
            f"{norm.track_running_stats}; {kind.__name__} keeps running statistics, with a "
            "momentum that is a number"
        )
    if norm.affine and norm.bias is None:
        raise ValueError(f"{where} has a weight and no bias; {kind.__name__} has both or neither")
    made = kind(norm.num_features, norm.eps, norm.momentum, norm.affine)
    made.weight, made.bias = norm.weight, norm.bias
    for buffer in ("running_mean", "running_var"):
        values = getattr(norm, buffer)
        setattr(made, buffer, values.float() if values.element_size() < 4 else values)
    made.num_batches_tracked = norm.num_batches_tracked
    return made.train(norm.training)
