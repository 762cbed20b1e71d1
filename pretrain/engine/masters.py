"""The float32 masters of a bf16 engine."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def set_masters(engine: Any, values: Mapping[str, Tensor]) -> None:
    """Set the master of every trained parameter to the value of its name.

    DeepSpeed makes the masters from weights it has already rounded to bf16, which takes 16 bits off
    the initial values and off whatever was loaded. Every rank calls this with the same values.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    whole = {} if engine.zero_optimization_stage() else _whole_masters(engine.optimizer)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        value = values[name].to(parameter.device, torch.float32)
        if hasattr(parameter, "ds_tensor"):
            # safe_set_full_fp32_param cuts beyond the end of what the ranks do not divide evenly
            safe_set_local_fp32_param(parameter, _own_part(value, parameter))
        elif hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, value)
        else:
            whole[id(parameter)].data.copy_(value)


def _own_part(value: Tensor, parameter: Any) -> Tensor:
    """What ZeRO-3 keeps of a parameter on this rank: equal parts, the last ones padded."""
    numel = parameter.ds_tensor.numel()
    part = torch.zeros(numel, dtype=value.dtype, device=value.device)
    begin = numel * dist.get_rank(group=parameter.ds_process_group)
    own = value.flatten()[begin : begin + numel]
    part[: own.numel()] = own
    return part


def _whole_masters(optimizer: Any) -> dict[int, Tensor]:
    """Masters of an engine without ZeRO, by the id of their parameter."""
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {id(p): master for ps, ms in groups for p, master in zip(ps, ms, strict=True)}
