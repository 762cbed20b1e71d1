"""Full float32 tensors out of DeepSpeed's ZeRO shards, on any machine, without a process group."""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundwork.pretrain.engine.checkpoint import (
    FROZEN_SHAPES,
    PARAMETER_SHAPES,
    TAG,
    CheckpointError,
    averages_file,
    load_tensors,
)
from groundwork.pretrain.engine.parts import joined_parts


def full_weights(checkpoint: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The parameters of a checkpoint, by name: float32 masters, gathered from all ranks.

    ema: the averages of the trained ones instead. Frozen parameters are as the model computes with
    them, a momentum teacher's as it is averaged. Raises CheckpointError where averages are lacking.

    Layout of the shards: ZeRO-3 cuts every parameter into equal parts, one per rank, and lays a
    rank's parts end to end; ZeRO-1 and 2 lay a group's parameters end to end and cut the whole;
    without ZeRO every rank has everything.
    """
    model = load_tensors(_shard_files(checkpoint, "model_states")[0])
    weights = _averaged(checkpoint, ema=True) if ema else _trained_weights(checkpoint, model)
    weights |= _frozen_weights(checkpoint, model)
    weights |= _averaged(checkpoint, ema=False)
    for alias, name in (model.get("shared_params") or {}).items():
        weights[alias] = weights[name]
    return weights


def full_buffers(checkpoint: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The buffers of a checkpoint's model, by name, such as BatchNorm's statistics.

    ema: their averages. All ranks have saved the same statistics.
    """
    if ema:
        return dict(_averages(checkpoint, ema=True)[0]["ema"]["buffers"])
    model = load_tensors(_shard_files(checkpoint, "model_states")[0])
    return {name: model["module"][name] for name in model["buffer_names"]}


def has_ema(checkpoint: Path) -> bool:
    """Whether the checkpoint has averages of the weights."""
    path = averages_file(checkpoint, 0)
    return path.is_file() and "ema" in load_tensors(path)


def _averages(checkpoint: Path, *, ema: bool) -> list[dict[str, Any]]:
    """The averages that each rank has saved; none where they are not asked for and not there."""
    paths = sorted(checkpoint.glob(averages_file(checkpoint, 0).name.replace("00000", "*")))
    states = [load_tensors(path) for path in paths]
    if ema and not (states and all("ema" in state for state in states)):
        raise CheckpointError(
            f"{checkpoint}: no averages of the weights in it; train with a section `ema`, or take "
            "the weights themselves"
        )
    return states


def _averaged(checkpoint: Path, *, ema: bool) -> dict[str, Tensor]:
    """ema: the averaged weights; else the momentum teacher's, if there is one."""
    states = _averages(checkpoint, ema=ema)
    own = [state["ema"]["parts"] if ema else state.get("teacher", {}) for state in states]
    try:
        return joined_parts(own)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: its averages are incomplete: {error}; use another checkpoint"
        ) from error


def _trained_weights(checkpoint: Path, model: dict[str, Any]) -> dict[str, Tensor]:
    if model["optimizer"] is not None:
        return _whole_weights(model)
    states = _optimizer_shards(checkpoint)
    shapes: list[dict[str, Any]] = model["param_shapes"]
    if _stage(states) == 3:
        return _from_stage_3([torch.cat(list(s["fp32_flat_groups"])) for s in states], shapes)
    groups = zip(*(s["single_partition_of_fp32_groups"] for s in states), strict=True)
    return _from_stage_2([torch.cat(parts) for parts in groups], shapes)


def _frozen_weights(checkpoint: Path, model: dict[str, Any]) -> dict[str, Tensor]:
    shapes = model.get(FROZEN_SHAPES, {})
    module = model["module"]
    if all(module[name].numel() == math.prod(shape) for name, shape in shapes.items()):
        return {name: module[name].float().view(shape) for name, shape in shapes.items()}
    ranks = [load_tensors(path) for path in _shard_files(checkpoint, "model_states")]
    parts = [torch.cat([r["frozen_param_fragments"][n].float() for n in shapes]) for r in ranks]
    return _from_stage_3(parts, [shapes])


def full_optimizer_state(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """AdamW's moments of a checkpoint: "exp_avg" and "exp_avg_sq", each name -> tensor."""
    kinds = ("exp_avg", "exp_avg_sq")
    model = load_tensors(_shard_files(checkpoint, "model_states")[0])
    if (optimizer := model["optimizer"]) is not None:
        state = optimizer.get("optimizer_state_dict", optimizer)["state"]
        names = model[PARAMETER_SHAPES]
        return {kind: {name: state[i][kind] for i, name in enumerate(names)} for kind in kinds}
    states = _optimizer_shards(checkpoint)
    is_stage_3 = _stage(states) == 3
    inner = "optimizer_state_dict" if is_stage_3 else "base_optimizer_state"
    moments = {}
    for kind in kinds:
        # (rank, group), flat
        parts = [
            [group[kind].flatten() for _, group in sorted(state[inner]["state"].items())]
            for state in states
        ]
        if is_stage_3:
            moments[kind] = _from_stage_3([torch.cat(own) for own in parts], model["param_shapes"])
        else:
            groups = [torch.cat(group) for group in zip(*parts, strict=True)]
            moments[kind] = _from_stage_2(groups, model["param_shapes"])
    return moments


def state_digest(checkpoint: Path) -> str:
    """sha256 over all parameters, their averages if there are any, and both moments of AdamW, by
    name, for comparing two runs.

    Taken from the reassembled tensors: the shards end in padding that nobody initialises.
    """
    digest = hashlib.sha256()
    tensors = {"weight": full_weights(checkpoint), **full_optimizer_state(checkpoint)}
    if has_ema(checkpoint):
        tensors["ema"] = full_weights(checkpoint, ema=True)
        tensors["ema buffer"] = full_buffers(checkpoint, ema=True)
    for kind, named in tensors.items():
        for name in sorted(named):
            value = named[name]
            digest.update(f"{kind} {name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _optimizer_shards(checkpoint: Path) -> list[dict[str, Any]]:
    files = _shard_files(checkpoint, "optim_states")
    return [load_tensors(path)["optimizer_state_dict"] for path in files]


def _stage(states: list[dict[str, Any]]) -> int:
    # DeepSpeed's optimiser for ZeRO-1 with bf16 weights and float32 gradients does not say
    return int(states[0].get("zero_stage", 1))


def _whole_weights(model: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a checkpoint without ZeRO; with bf16 the masters lie in the optimiser's state."""
    shapes, optimizer = model[PARAMETER_SHAPES], model["optimizer"]
    if "fp32_groups" not in optimizer:
        # a module may give its state dict other shapes than its parameters have
        return {name: model["module"][name].view(shape) for name, shape in shapes.items()}
    masters = [master.detach() for group in optimizer["fp32_groups"] for master in group]
    return dict(zip(shapes, masters, strict=True))


def _from_stage_3(ranks: list[Tensor], groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    weights, offset = {}, 0
    for name, shape in (item for group in groups for item in group.items()):
        numel = math.prod(shape)
        part = -(-numel // len(ranks))
        flat = torch.cat([rank[offset : offset + part] for rank in ranks])
        weights[name] = flat[:numel].view(tuple(shape)).clone()
        offset += part
    return weights


def _from_stage_2(vectors: list[Tensor], groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    weights = {}
    for vector, group in zip(vectors, groups, strict=True):
        offset = 0
        for name, shape in group.items():
            numel = math.prod(shape)
            weights[name] = vector[offset : offset + numel].view(tuple(shape)).clone()
            offset += numel
    return weights


def _shard_files(checkpoint: Path, kind: str) -> list[Path]:
    def rank(path: Path) -> int:
        return (
            int(path.name.split("zero_pp_rank_")[1].split("_")[0]) if "zero_pp" in path.name else 0
        )

    files = sorted((checkpoint / TAG).glob(f"*{kind}.pt"), key=rank)
    if not files:
        raise CheckpointError(
            f"{checkpoint}: no {kind} in its {TAG} folder; use another checkpoint"
        )
    return files
