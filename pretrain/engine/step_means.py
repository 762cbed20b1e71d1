"""What the steps of a run say on average over its ranks, and whether training still goes well."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from groundwork.pretrain.engine.deepspeed_config import World
from groundwork.pretrain.engine.faults import Quarantine


class DivergedError(RuntimeError):
    """The loss is no number any more."""


def check_finite(step: int, loss: float, gradient_norm: float) -> None:
    """Raise DivergedError where a step is not to be saved."""
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise DivergedError(
            f"step {step}: loss {loss}, gradient norm {gradient_norm}. "
            "Lower optimizer.lr, lengthen schedule.warmup_steps, or set "
            "train.gradient_clipping; the run goes on from its last checkpoint"
        )


def means_over_ranks(
    losses: dict[str, Tensor], wait: float, quarantine: Quarantine, samples: int, world: World
) -> dict[str, float]:
    """Mean of losses and waiting share over ranks; the bad samples of all are collected."""
    names = [*losses, "data_wait"]
    values = torch.stack([*losses.values(), torch.tensor(wait, device=world.device)]).double()
    pending = torch.tensor([quarantine.pending * world.size], device=world.device)
    values = torch.cat([values, pending])
    dist.all_reduce(values)
    *means, bad = (values / world.size).tolist()
    quarantine.collect(round(bad), samples, world)
    return dict(zip(names, means, strict=True))
