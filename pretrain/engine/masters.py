"""The float32 masters of an engine: whole or in parts, as its ZeRO stage keeps them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from groundwork.pretrain.engine.parts import Part


def own_parts(engine: Any) -> dict[str, Part]:
    """This rank's parts of the masters of all trained parameters, by name, on their device.

    Over all ranks they cover every parameter: ZeRO-3 gives each rank an equal part of each, ZeRO-1
    and 2 give it what falls into its share of the optimiser's groups (perhaps nothing), without
    ZeRO each rank has all. To be read at once: later steps may move the masters. Raises
    ValueError where the masters lie on disk.
    """
    if getattr(engine.optimizer, "swap_optimizer", False):
        raise ValueError(
            "averages of the weights need the float32 masters in memory, but "
            "deepspeed.zero_optimization.offload_optimizer.device is nvme; use cpu or none, or "
            "leave out `ema` and the momentum teacher"
        )
    whole = _whole_masters(engine)
    parts = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if hasattr(parameter, "ds_tensor"):
            # DeepSpeed's public function would copy an offloaded master to the accelerator
            zero = parameter._z3_optimizer
            group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
            values = zero.fp32_partitioned_groups_flat[group].detach().narrow(0, offset, numel)
            begin = numel * dist.get_rank(group=parameter.ds_process_group)
            parts[name] = Part(begin, values, shape)
        elif not hasattr(parameter, "_hp_mapping"):
            parts[name] = Part(0, whole[id(parameter)].detach().reshape(-1), shape)
        elif (fragment := parameter._hp_mapping) is not None:
            begin = fragment.lp_fragment_address.start
            parts[name] = Part(begin, fragment.hp_fragment.detach(), shape)
    return parts


def set_masters(engine: Any, values: Mapping[str, Tensor]) -> None:
    """Set the master of every trained parameter to the value of its name.

    DeepSpeed makes the masters from weights it has already rounded to bf16, which takes 16 bits off
    the initial values and off whatever was loaded. Every rank calls this with the same values.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    whole = _whole_masters(engine)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        value = values[name].to(parameter.device, torch.float32)
        if hasattr(parameter, "ds_tensor"):
            # safe_set_full_fp32_param cuts beyond the end of what the ranks do not divide evenly
            safe_set_local_fp32_param(parameter, own_part(value, parameter))
        elif hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, value)
        else:
            whole[id(parameter)].data.copy_(value)


def own_part(value: Tensor, parameter: Any) -> Tensor:
    """What ZeRO-3 keeps of a parameter on this rank: equal parts, the last ones padded."""
    numel = parameter.ds_tensor.numel()
    part = torch.zeros(numel, dtype=value.dtype, device=value.device)
    begin = numel * dist.get_rank(group=parameter.ds_process_group)
    own = value.flatten()[begin : begin + numel]
    part[: own.numel()] = own
    return part


def _whole_masters(engine: Any) -> dict[int, Tensor]:
    """Masters of an engine without ZeRO, by the id of their parameter."""
    if engine.zero_optimization_stage() > 0:
        return {}
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups"):  # float32 training: the weights are the masters
        module: nn.Module = engine.module
        return {id(parameter): parameter for parameter in module.parameters()}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {id(p): master for ps, ms in groups for p, master in zip(ps, ms, strict=True)}
