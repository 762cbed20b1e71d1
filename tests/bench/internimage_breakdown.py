"""Where the time of a training step goes, by part of the network, forward and backward.

Each part is a range of the profiler in the forward pass. An autograd node bears the sequence number
of the forward op that made it, so what runs in the backward pass is put down to the same part.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

#: The last part of a module's name -> the part of the network; the innermost named one counts.
PARTS: Final[Mapping[str, str]] = {
    "dcn": "sampling",
    "input_proj": "in and out projections",
    "output_proj": "in and out projections",
    "offset": "offset and mask",
    "mask": "offset and mask",
    "dw_conv": "depthwise, norm, GELU",
    "mlp": "MLP",
    "patch_embed": "stem",
    "downsample": "downsampling",
    "norm": "norms",
    "norm1": "norms",
    "norm2": "norms",
    "conv_head": "head",
    "head": "head",
}
#: Of a block, what none of its parts takes: residuals, stochastic depth, layer scale.
RESIDUAL: Final = "residuals"
OPTIMISER: Final = "optimiser"
OTHER: Final = "other"
_MARK: Final = "part: "


def breakdown(
    model: nn.Module, step: Callable[[], object], repetitions: int = 3
) -> dict[str, dict[str, float]]:
    """Part -> its milliseconds "forward" and "backward" in one step; the least of repetitions."""
    best: dict[str, dict[str, float]] = {}
    with _marked(model):
        step()
        for _ in range(repetitions):
            found = _profiled(step)
            if not best or _total(found) < _total(best):
                best = found
    return dict(sorted(best.items(), key=lambda item: -sum(item[1].values())))


def _total(parts: Mapping[str, Mapping[str, float]]) -> float:
    return sum(sum(directions.values()) for directions in parts.values())


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    handles, running = [], []
    for name, module in model.named_modules():
        tail = name.rpartition(".")[2]
        part = PARTS.get(tail) or (RESIDUAL if ".blocks." in name and tail.isdecimal() else None)
        if part is None or (tail.isdecimal() and name.split(".")[-2] != "blocks"):
            continue

        def enter(*_: Any, part: str = part) -> None:
            running.append(record_function(_MARK + part))
            running[-1].__enter__()

        def leave(*_: Any) -> None:
            running.pop().__exit__(None, None, None)

        handles += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _profiled(step: Callable[[], object]) -> dict[str, dict[str, float]]:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiler:
        step()
    return attribute(list(profiler.events() or []), on_device=torch.cuda.is_available())


def attribute(events: list[Any], on_device: bool = False) -> dict[str, dict[str, float]]:
    """events: of the profiler; on_device: count the time of kernels instead of that of the CPU."""
    field = "self_device_time_total" if on_device else "self_cpu_time_total"
    part_of: dict[int, str] = {}  # by sequence number of forward ops
    for event in events:
        if event.sequence_nr >= 0 and not _ancestor(event, "autograd::engine"):
            part = _part(event)
            if part is not None:
                part_of.setdefault(event.sequence_nr, part)
    parts: dict[str, dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for event in events:
        if event.name.startswith(("ProfilerStep", _MARK)) or _is_kernel(event):
            continue
        node = _ancestor(event, "autograd::engine")
        direction = "forward" if node is None else "backward"
        if node is not None:
            part = part_of.get(node.sequence_nr, OTHER)
        elif _ancestor(event, "Optimizer."):
            part = OPTIMISER
        else:
            part = _part(event) or OTHER
        parts[part][direction] += getattr(event, field) / 1e3
    return {name: times for name, times in parts.items() if sum(times.values()) > 0}


def _is_kernel(event: Any) -> bool:
    return event.device_type != torch.autograd.DeviceType.CPU


def _ancestor(event: Any, prefix: str) -> Any:
    while event is not None and not event.name.startswith(prefix):
        event = event.cpu_parent
    return event


def _part(event: Any) -> str | None:
    mark = _ancestor(event, _MARK)
    return None if mark is None else str(mark.name).removeprefix(_MARK)
