"""Learning-rate schedules: pure functions of the step, so a resumed run needs no state."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate goes from step to step. All rates are absolute, ratios are of the peak.

    kind:
        cosine: linear warm-up that reaches the peak in its last step, then half a cosine over the
            steps that are left.
        timm_cosine: linear warm-up from warmup_lr, then the cosine as if there had been none
            (timm's CosineLRScheduler without `warmup_prefix`, as InternImage was trained).
        multistep: warm-up from warmup_ratio x peak, then gamma x as much from each milestone on
            (mmcv's "step").
        poly: (1 - step / steps)^power between the peak and min_lr, times the warm-up (mmcv's
            "poly").
    warmup_steps: steps of the warm-up; 0 for none.
    min_lr, warmup_lr: the same for every parameter group, however the peak of the group is scaled.
    milestones: steps, ascending.
    """

    kind: Literal["cosine", "timm_cosine", "multistep", "poly"] = "cosine"
    warmup_steps: int = 0
    min_lr: float = 0.0
    warmup_lr: float = 0.0
    warmup_ratio: float = 1e-3
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    power: float = 1.0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "min_lr", "warmup_lr", "gamma", "power"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"schedule.{name} is {getattr(self, name)}; it must not be negative"
                )
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(
                f"schedule.warmup_ratio is {self.warmup_ratio}; it is the share of the learning "
                "rate that the first step gets, from 0 to 1"
            )
        if list(self.milestones) != sorted({m for m in self.milestones if m >= 0}):
            raise ValueError(
                f"schedule.milestones is {list(self.milestones)}; give steps that ascend"
            )
        self._check_use()

    def _check_use(self) -> None:
        """A setting that this kind does not read is a mistake in the recipe."""
        for name, kind in (("warmup_lr", "timm_cosine"), ("milestones", "multistep")):
            if getattr(self, name) and self.kind != kind:
                raise ValueError(
                    f"schedule.{name} is of the kind {kind}, and schedule.kind is {self.kind}; "
                    "leave it out, or change the kind"
                )
        if self.kind == "multistep" and not self.milestones:
            raise ValueError(
                "schedule.milestones is empty, so a multistep schedule never steps; name the "
                "steps at which the learning rate falls"
            )


def lr_at(
    step: int, total_steps: int, peak: float, schedule: ScheduleConfig, factor: float = 1.0
) -> float:
    """The learning rate of a step (0-based).

    peak: of the parameter group, any factors included. factor: multiplies the schedule's own
    absolute rates (linear scaling with the batch).
    """
    low = schedule.min_lr * factor
    match schedule.kind:
        case "cosine":
            return _cosine(step, total_steps, peak, low, schedule.warmup_steps)
        case "timm_cosine":
            first = schedule.warmup_lr * factor
            return _timm_cosine(step, total_steps, peak, low, first, schedule.warmup_steps)
        case "multistep":
            passed = sum(step >= milestone for milestone in schedule.milestones)
            return max(peak * schedule.gamma**passed, low) * _warmup(step, schedule)
        case "poly":
            left = max(0.0, 1 - step / total_steps) ** schedule.power
            return (low + (peak - low) * left) * _warmup(step, schedule)


def _cosine(step: int, total_steps: int, peak: float, low: float, warmup_steps: int) -> float:
    """The last step of the warm-up has the peak, and so has the first after it; the last step of
    all has `low`, where it is not that first one."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    rest = max(1, total_steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / rest)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))


def _timm_cosine(
    step: int, total_steps: int, peak: float, low: float, first: float, warmup_steps: int
) -> float:
    """Falls a little at the end of the warm-up, where the cosine is already under way."""
    if step < warmup_steps:
        return first + step * (peak - first) / warmup_steps
    if step >= total_steps:
        return low
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * step / total_steps))


def _warmup(step: int, schedule: ScheduleConfig) -> float:
    """mmcv's linear warm-up: a factor on whatever the schedule gives, from warmup_ratio to 1."""
    if step >= schedule.warmup_steps:
        return 1.0
    return 1 - (1 - step / schedule.warmup_steps) * (1 - schedule.warmup_ratio)
