"""Optimiser groups: what decays, and how fast each parameter learns."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from groundwork.kernels.optional_backends import AdamWBackend, choose_adamw
from groundwork.pretrain.engine.schedule import ScheduleConfig, lr_at

#: Key of a parameter group: its learning rate over that of a group with no factors.
LR_SCALE = "lr_scale"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019). lr: the peak, for the recipe's global batch.

    backend: whose implementation; `auto` is torch's, fused on a GPU.
    lr_for_batch: the batch that lr, and schedule.min_lr and schedule.warmup_lr, are meant for: all
        are multiplied by global batch / lr_for_batch. None: they are taken as they are.
    layer_decay: the learning rate falls by this factor from layer to layer towards the input, as
        the modules with `lr_scales` say. layer_decay_rule: how those count layers.
    lr_multipliers: text -> factor, for every parameter whose name contains the text.
    no_weight_decay: parameters whose name contains one of these are not decayed.
    """

    kind: Literal["adamw"] = "adamw"
    backend: AdamWBackend = "auto"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    lr_for_batch: int | None = None
    layer_decay: float | None = None
    layer_decay_rule: Literal["classification", "detection"] = "classification"
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    no_weight_decay: tuple[str, ...] = ()

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
        if self.lr_for_batch is not None and self.lr_for_batch < 1:
            raise ValueError(
                f"optimizer.lr_for_batch is {self.lr_for_batch}; it is a number of samples, or "
                "null to take the learning rate as it is"
            )
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"optimizer.layer_decay is {self.layer_decay}; it must be above 0 and at most 1, "
                "or null for none"
            )
        for text, factor in self.lr_multipliers.items():
            if not 0 <= factor < math.inf:
                raise ValueError(
                    f"optimizer.lr_multipliers.{text} is {factor}; it must not be negative"
                )


def batch_factor(config: OptimizerConfig, batch: int) -> float:
    """What linear scaling multiplies learning rates by (Goyal et al. 2017). batch: global."""
    return 1.0 if config.lr_for_batch is None else batch / config.lr_for_batch


def set_lr(
    optimizer: torch.optim.Optimizer,
    step: int,
    total_steps: int,
    config: OptimizerConfig,
    schedule: ScheduleConfig,
    batch: int,
) -> float:
    """Give every group the learning rate of a step (0-based); returns that of a group of scale 1.

    batch: global, accumulation included.
    """
    factor = batch_factor(config, batch)

    def lr(scale: float) -> float:
        return lr_at(step, total_steps, config.lr * factor * scale, schedule, factor)

    for group in optimizer.param_groups:
        group["lr"] = lr(group.get(LR_SCALE, 1.0))
    return lr(1.0)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trained parameters, in groups of one weight decay and one factor of the learning rate.

    Not decayed are parameters of fewer than two dimensions, those in `config.no_weight_decay`, and
    those that a submodule names through a method `no_weight_decay() -> set of names`, relative to
    itself. With `layer_decay`, submodules say through `lr_scales(decay, rule) -> {name: factor}`
    how fast their parameters learn; the others learn at the full rate. A parameter that has several
    names is exempt, or slowed, if one of them is. Raises ValueError where a setting of the recipe
    is about no parameter at all.
    """
    every_name: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        every_name.setdefault(id(parameter), []).append(name)
    _check_texts(config, [name for names in every_name.values() for name in names])
    exempt = _exempt(model)
    scales = {} if config.layer_decay is None else _layer_scales(model, config)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        names = every_name[id(parameter)]
        # ZeRO-3 flattens what it partitions, and keeps the shape here
        is_plain = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
        is_plain |= any(name in exempt for name in names)
        is_plain |= any(text in name for name in names for text in config.no_weight_decay)
        weight_decay = 0.0 if is_plain else config.weight_decay
        scale = min(scales.get(name, 1.0) * _multiplier(name, config) for name in names)
        # powers of a decay that differ in the last bits only are one group
        key = (float(f"{scale:.10g}"), weight_decay)
        group = groups.setdefault(
            key,
            {
                "params": [],
                "weight_decay": weight_decay,
                LR_SCALE: scale,
                "lr": config.lr * scale,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda k: (-k[0], -k[1]))]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return choose_adamw(config.backend, device).build(
        parameter_groups(model, config),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def _exempt(model: nn.Module) -> set[str]:
    """Names that submodules exempt from weight decay, as the model has them."""
    exempt = set()
    for prefix, module in model.named_modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            exempt |= {_joined(prefix, name) for name in names()}
    return exempt


def _layer_scales(model: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    """Factor of the learning rate by name, from the submodules that have layers."""
    scales: dict[str, float] = {}
    found = False
    for prefix, module in model.named_modules():
        own = getattr(module, "lr_scales", None)
        if callable(own):
            found = True
            named: Mapping[str, float] = own(config.layer_decay, config.layer_decay_rule)
            scales |= {_joined(prefix, name): scale for name, scale in named.items()}
    if not found:
        raise ValueError(
            f"optimizer.layer_decay is {config.layer_decay}, but no part of the model "
            "(no submodule with a method lr_scales) says which layers it has; set it to null"
        )
    return scales


def _multiplier(name: str, config: OptimizerConfig) -> float:
    return math.prod(factor for text, factor in config.lr_multipliers.items() if text in name)


def _check_texts(config: OptimizerConfig, names: list[str]) -> None:
    """Refuse texts that no parameter's name contains: a slip of the pen would go unnoticed."""
    for key in ("lr_multipliers", "no_weight_decay"):
        for text in getattr(config, key):
            if not any(text in name for name in names):
                raise ValueError(
                    f"optimizer.{key} names {text!r}, which is in the name of no parameter; the "
                    f"model has e.g. {', '.join(names[:3])}"
                )


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
