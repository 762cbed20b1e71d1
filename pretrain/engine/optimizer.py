"""Optimiser groups and the learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from groundwork.kernels.optional_backends import AdamWBackend, choose_adamw


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019). lr: the peak, for the recipe's global batch.

    backend: whose implementation; `auto` is torch's, fused on a GPU.
    """

    kind: Literal["adamw"] = "adamw"
    backend: AdamWBackend = "auto"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {list(self.betas)}; both must be in [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"optimizer.weight_decay is {self.weight_decay}; it must not be negative"
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up to the peak, then half a cosine down to min_lr."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: int = 0
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "min_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"schedule.{name} is {getattr(self, name)}; it must not be negative"
                )


def lr_at(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The learning rate of a step (0-based): a pure function, so a resumed run needs no state.

    The last step of the warm-up has the peak, and so has the first after it; the last step of all
    has min_lr, where it is not that first one.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    rest = max(1, total_steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / rest)
    return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: decayed, and not decayed (fewer than two dimensions, or in `no_weight_decay`).

    Any submodule may name parameters that are not to be decayed through a method
    `no_weight_decay() -> set of names`, relative to itself. A parameter that has several names is
    not decayed if one of them is named.
    """
    exempt = set()
    for prefix, module in model.named_modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            exempt |= {f"{prefix}.{name}" if prefix else name for name in names()}
    every_name = model.named_parameters(remove_duplicate=False)
    exempt_ids = {id(parameter) for name, parameter in every_name if name in exempt}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # ZeRO-3 flattens what it partitions, and keeps the shape here
            shape = getattr(parameter, "ds_shape", parameter.shape)
            chosen = plain if len(shape) < 2 or id(parameter) in exempt_ids else decayed
            chosen.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return choose_adamw(config.backend, device).build(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )
