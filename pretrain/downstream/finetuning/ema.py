"""The average of the weights in fine-tuning, however Accelerate parts them over ranks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from groundwork.pretrain.downstream.finetuning.engine import Engine, whole
from groundwork.pretrain.engine.ema import (
    Ema,
    EmaConfig,
    ema_of_engine,
    ema_of_module,
    saved_buffers,
)
from groundwork.pretrain.engine.masters import own_parts
from groundwork.pretrain.engine.parts import Part


def make_ema(engine: Engine, config: EmaConfig) -> Ema:
    """An average that starts from the weights as they are. Each rank keeps what it trains."""
    if engine.kind == "deepspeed":
        return ema_of_engine(engine.model, config)
    if engine.kind == "fsdp":
        return Ema(lambda: _local_parts(engine), lambda: saved_buffers(engine.module), config)
    return ema_of_module(engine.module, config)


@contextmanager
def averaged(
    engine: Engine, ema: Ema, replica: Callable[[], nn.Module]
) -> Iterator[Callable[[Any], Any]]:
    """A model with the averaged weights, in evaluation mode as the engine's is. Collective.

    replica: makes a module like `engine.module`; DeepSpeed's parts fit no other, so that each rank
    holds a whole one meanwhile.
    """
    if engine.kind == "plain":
        with ema.applied_to(engine.module):
            yield engine.model
    elif engine.kind == "fsdp":
        with _local_values(engine, ema):
            yield engine.model
    else:
        module = replica().to(engine.world.device).eval()
        values = whole_average(engine, ema, keep=True)
        with torch.no_grad():
            for name, target in (*module.named_parameters(), *saved_buffers(module).items()):
                if name in values:
                    target.copy_(values[name])
                else:  # a frozen one
                    target.copy_(whole_parameter(engine, name))
        is_bf16 = engine.recipe.train.precision == "bf16"

        def forward(batch: Any) -> Any:
            with torch.autocast(engine.world.device.type, torch.bfloat16, enabled=is_bf16):
                return module(batch)

        yield forward


def whole_average(engine: Engine, ema: Ema, *, keep: bool) -> dict[str, Tensor]:
    """The averages by name, float32 on the host. Collective; empty where not `keep`."""
    if engine.kind == "fsdp":
        with _local_values(engine, ema):
            named = {**engine.parameters, **saved_buffers(engine.module)}
            wanted = [*ema.shadow, *ema.shadow_buffers]
            found = ((name, whole(named[name].detach())) for name in wanted)
            return {name: value.cpu().clone() for name, value in found if keep}
    shapes = {name: _shape(p) for name, p in engine.parameters.items() if p.requires_grad}
    values: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        value = _assembled(ema.shadow.get(name), shape, engine)
        if keep:
            values[name] = value.cpu()
    buffers = {name: b.cpu().clone() for name, b in ema.shadow_buffers.items()}
    return {**values, **buffers} if keep else {}


def whole_weights(engine: Engine, *, keep: bool) -> dict[str, Tensor]:
    """The weights and buffers by name, float32 masters on the host. Collective; empty where not
    `keep`."""
    values: dict[str, Tensor] = {}
    parts = _deepspeed_parts(engine)
    for name, parameter in engine.parameters.items():
        if name in parts or (engine.kind == "deepspeed" and parameter.requires_grad):
            value = _assembled(parts.get(name), _shape(parameter), engine)
        else:
            value = whole_parameter(engine, name)
        if keep:
            values[name] = value.detach().cpu().clone()
    if keep:
        values |= {n: b.detach().cpu().clone() for n, b in saved_buffers(engine.module).items()}
    return values


def whole_parameter(engine: Engine, name: str) -> Tensor:
    """A parameter as it is used in the forward pass, put together. Collective."""
    parameter: Any = engine.parameters[name]
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    value: Tensor = whole(parameter.detach())
    return value.float() if value.is_floating_point() else value


def load_average(engine: Engine, ema: Ema, values: Mapping[str, Tensor], updates: int) -> None:
    """Take up an average that `whole_average` gave: this rank's part of it."""
    ema.updates = updates
    for name, part in ema.shadow.items():
        value = values[name]
        if engine.kind == "fsdp":
            value = _sharded_like(value, engine.parameters[name]).to_local()
            part.values.copy_(value.reshape(-1))
            continue
        own = value.reshape(-1)[part.begin : part.begin + part.values.numel()]
        part.values[: own.numel()].copy_(own)
    for name, buffer in ema.shadow_buffers.items():
        buffer.copy_(values[name])


def _sharded_like(value: Tensor, parameter: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _deepspeed_parts(engine: Engine) -> dict[str, Part]:
    return own_parts(engine.model) if engine.kind == "deepspeed" else {}


def _assembled(part: Part | None, shape: tuple[int, ...], engine: Engine) -> Tensor:
    """A parameter from the parts of all ranks. Collective where it is parted."""
    numel = torch.Size(shape).numel()
    is_whole_everywhere = engine.kind == "plain" or engine.model.zero_optimization_stage() == 0
    flat = torch.zeros(numel, device=engine.world.device)
    if part is not None:
        # the last parts of ZeRO-3 are padded
        own = part.values[: max(0, numel - part.begin)]
        flat[part.begin : part.begin + own.numel()] = own
    if not is_whole_everywhere and engine.world.size > 1:
        dist.all_reduce(flat)  # every element comes from one rank, and zeros from the others
    return flat.view(shape)


def _local_parts(engine: Engine) -> dict[str, Part]:
    return {
        name: Part(0, _local(parameter).reshape(-1), tuple(_local(parameter).shape))
        for name, parameter in engine.parameters.items()
        if parameter.requires_grad
    }


def _local(parameter: Any) -> Tensor:
    local: Tensor = parameter.detach()
    return local.to_local() if hasattr(local, "to_local") else local


@contextmanager
def _local_values(engine: Engine, ema: Ema) -> Iterator[None]:
    """Within, the parts of an FSDP module are those of the average."""
    engine.settle()
    targets = {n: _local(p) for n, p in engine.parameters.items() if n in ema.shadow}
    targets |= saved_buffers(engine.module)
    values = {name: part.values.view(part.shape) for name, part in ema.shadow.items()}
    values |= ema.shadow_buffers
    kept = {name: target.clone() for name, target in targets.items()}
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])
        try:
            yield
        finally:
            engine.settle()
            for name, target in targets.items():
                target.copy_(kept[name])
