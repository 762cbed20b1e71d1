"""Full float32 tensors out of DeepSpeed's ZeRO shards, on any machine, without a process group."""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundwork.pretrain.engine.checkpoint import TAG, CheckpointError, load_tensors


def full_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The parameters of a checkpoint, by name: float32 masters, gathered from all ranks.

    Layout of the shards: ZeRO-3 cuts every parameter into equal parts, one per rank, and lays a
    rank's parts end to end; ZeRO-1 and 2 lay a group's parameters end to end and cut the whole.
    """
    states = _optimizer_shards(checkpoint)
    model = load_tensors(_shard_files(checkpoint, "model_states")[0])
    shapes: list[dict[str, Any]] = model["param_shapes"]
    if _stage(states) == 3:
        weights = _from_stage_3([torch.cat(list(s["fp32_flat_groups"])) for s in states], shapes)
    else:
        groups = zip(*(s["single_partition_of_fp32_groups"] for s in states), strict=True)
        weights = _from_stage_2([torch.cat(parts) for parts in groups], shapes)
    for alias, name in model.get("shared_params", {}).items():
        weights[alias] = weights[name]
    return weights


def full_optimizer_state(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """AdamW's moments of a ZeRO-3 checkpoint: "exp_avg" and "exp_avg_sq", each name -> tensor."""
    states = _optimizer_shards(checkpoint)
    if _stage(states) != 3:
        raise CheckpointError(
            f"{checkpoint}: moments are read from ZeRO-3 checkpoints only, this one is of "
            f"stage {_stage(states)}"
        )
    shapes = load_tensors(_shard_files(checkpoint, "model_states")[0])["param_shapes"]
    moments = {}
    for kind in ("exp_avg", "exp_avg_sq"):
        ranks = [
            torch.cat([group[kind].flatten() for _, group in sorted(state["state"].items())])
            for state in (s["optimizer_state_dict"] for s in states)
        ]
        moments[kind] = _from_stage_3(ranks, shapes)
    return moments


def state_digest(checkpoint: Path) -> str:
    """sha256 over all parameters and both moments of AdamW, by name, for comparing two runs.

    Taken from the reassembled tensors: the shards end in padding that nobody initialises.
    """
    digest = hashlib.sha256()
    tensors = {"weight": full_weights(checkpoint), **full_optimizer_state(checkpoint)}
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
    return int(states[0]["zero_stage"])


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
