"""Optimiser groups and the learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019). lr: the peak, for the recipe's global batch."""

    kind: Literal["adamw"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up to the peak, then half a cosine down to min_lr."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: int = 0
    min_lr: float = 0.0


def lr_at(step: int, total_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The learning rate of a step (0-based): a pure function, so a resumed run needs no state.

    The last step of the warm-up has the peak, the last step of all has min_lr.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    rest = max(1, total_steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / rest)
    return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: decayed, and not decayed (fewer than two dimensions, or in `no_weight_decay`).

    Any submodule may name parameters that are not to be decayed through a method
    `no_weight_decay() -> set of names`. Call before ZeRO-3 flattens the parameters.
    """
    exempt = set()
    for prefix, module in model.named_modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            exempt |= {f"{prefix}.{name}" if prefix else name for name in names()}
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            chosen = plain if parameter.ndim < 2 or name in exempt else decayed
            chosen.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )
