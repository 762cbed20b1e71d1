"""BatchNorm's statistics under data parallelism: each rank gathers its own; exports need one."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from groundwork.pretrain.models.batch_norm import SyncFloatBatchNorm


def batch_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of all BatchNorms, by name; synchronised ones are alike."""
    synchronised = (SyncFloatBatchNorm, nn.SyncBatchNorm)
    return {
        f"{prefix}.{name}" if prefix else name: getattr(part, name)
        for prefix, part in module.named_modules()
        if isinstance(part, _BatchNorm) and not isinstance(part, synchronised)
        for name in ("running_mean", "running_var")
        if getattr(part, name) is not None
    }


@torch.no_grad()
def average_over_ranks(statistics: dict[str, Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, in place. Collective."""
    if not statistics or dist.get_world_size() == 1:
        return
    flat = torch.cat([value.flatten().float() for value in statistics.values()])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = 0
    for value in statistics.values():
        value.copy_(flat[offset : offset + value.numel()].view(value.shape))
        offset += value.numel()
