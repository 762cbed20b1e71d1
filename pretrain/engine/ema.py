"""Exponential moving average of the weights, in float32, of plain modules and of ZeRO engines."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groundwork.pretrain.engine.masters import own_parts
from groundwork.pretrain.engine.parts import Part, follow, load_parts, part_state


@dataclass(frozen=True)
class EmaConfig:
    """decay: of the average with each optimiser step.

    warmup: of the n-th update it is at most (1 + n) / (10 + n), so that a short run does not end
    with an average of its initial weights. warmup_steps: if given, it is decay (1 - exp(-n /
    warmup_steps)) instead, as in mmdetection 2, whose default is 2000.
    """

    decay: float = 0.9999
    warmup: bool = True
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}; it must be in [0, 1)")
        if self.warmup_steps is not None and (self.warmup_steps < 1 or not self.warmup):
            raise ValueError(
                f"ema.warmup_steps is {self.warmup_steps} and ema.warmup {self.warmup}; give at "
                "least 1 and true, or null for the steps"
            )


class Ema:
    """shadow <- d shadow + (1 - d) weights, once for each optimiser step.

    parts: gives what this process keeps of the trained weights, by name. Each process averages its
    own: a ZeRO engine costs one more float32 copy over all its ranks together. buffers: BatchNorm's
    statistics and the like; those of floating point are averaged, others follow.
    """

    def __init__(
        self,
        parts: Callable[[], Mapping[str, Part]],
        buffers: Callable[[], Mapping[str, Tensor]],
        config: EmaConfig,
    ) -> None:
        self._parts, self._buffers, self.config = parts, buffers, config
        self.updates = 0
        self.shadow = {
            name: Part(part.begin, _copy(part.values), part.shape) for name, part in parts().items()
        }
        self.shadow_buffers = {name: _copy(buffer) for name, buffer in buffers().items()}

    def decay(self) -> float:
        """Of the next update."""
        n, config = self.updates + 1, self.config
        if not config.warmup:
            return config.decay
        if config.warmup_steps is not None:
            return config.decay * -math.expm1(-n / config.warmup_steps)
        return min(config.decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of an optimiser step in."""
        weight = 1 - self.decay()
        self.updates += 1
        parts, buffers = self._parts(), self._buffers()
        follow(
            [part.values for part in self.shadow.values()],
            [parts[name].values for name in self.shadow],
            weight,
        )
        averaged = [name for name, b in self.shadow_buffers.items() if b.is_floating_point()]
        follow(
            [self.shadow_buffers[name] for name in averaged],
            [buffers[name] for name in averaged],
            weight,
        )
        for name in self.shadow_buffers.keys() - set(averaged):
            self.shadow_buffers[name].copy_(buffers[name])

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Within, `module` has the averages as its weights; for evaluation.

        module: the plain one that is averaged, or one of the same names; ZeRO's parts fit no
        module, their checkpoints do (`full_weights(checkpoint, ema=True)`).
        """
        targets: dict[str, Tensor] = {
            name: parameter for name, parameter in module.named_parameters() if name in self.shadow
        }
        targets |= {name: b for name, b in module.named_buffers() if name in self.shadow_buffers}
        values = {name: part.values.view(part.shape) for name, part in self.shadow.items()}
        values |= self.shadow_buffers
        if targets.keys() != values.keys():
            lacking = sorted(values.keys() - targets.keys())
            raise ValueError(f"Ema.applied_to: the module has no {', '.join(lacking[:5])}")
        kept = {name: target.detach().clone() for name, target in targets.items()}
        _assign(targets, values)
        try:
            yield
        finally:
            _assign(targets, kept)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors, for `torch.load(weights_only=True)`."""
        return {
            "updates": self.updates,
            "parts": {name: part_state(part) for name, part in self.shadow.items()},
            "buffers": dict(self.shadow_buffers),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the state is of other weights, or cut into other parts."""
        self.updates = int(state["updates"])
        load_parts(self.shadow, state["parts"])
        if state["buffers"].keys() != self.shadow_buffers.keys():
            raise ValueError("the saved average has other buffers than the model")
        for name, buffer in self.shadow_buffers.items():
            buffer.copy_(state["buffers"][name])


def ema_of_module(module: nn.Module, config: EmaConfig) -> Ema:
    """The average of a module that is whole in each process, alone or under DDP."""
    if any(hasattr(parameter, "ds_tensor") for parameter in module.parameters()):
        raise ValueError("the module is partitioned by ZeRO-3; use ema_of_engine with its engine")

    def parts() -> dict[str, Part]:
        return {
            name: Part(0, parameter.detach().reshape(-1), tuple(parameter.shape))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    return Ema(parts, lambda: saved_buffers(module), config)


def ema_of_engine(engine: Any, config: EmaConfig) -> Ema:
    """The average of a DeepSpeed engine's masters: each rank of the part it keeps.

    Raises ValueError where they lie on disk.
    """
    return Ema(lambda: own_parts(engine), lambda: saved_buffers(engine.module), config)


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the module's state."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    }


def _copy(value: Tensor) -> Tensor:
    """A copy of its own, float32 if it is of floating point."""
    copy = value.detach().clone()
    return copy.float() if copy.is_floating_point() else copy


@torch.no_grad()
def _assign(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(values[name])
