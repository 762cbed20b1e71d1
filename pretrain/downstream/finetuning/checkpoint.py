"""Checkpoints of fine-tuning: complete or absent, verified, and loaded without executing anything.

    OUT/checkpoints/step-00000200/model.safetensors      weights and buffers, float32, whole
                                  ema.safetensors        the same of the average, if there is one
                                  optimizer.safetensors  AdamW's state, whole (not with DeepSpeed)
                                  deepspeed/*.pt         DeepSpeed's shards (with DeepSpeed)
                                  rank-00000.pt          random states of the rank
                                  checkpoint.json        step, recipe, best so far, checksums
    OUT/checkpoints/latest, best                         names of complete ones

The first two files are all that evaluation and export need, however the run was spread over ranks.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundwork.data.atomic import write_atomically
from groundwork.pretrain.downstream.finetuning.ema import (
    load_average,
    whole_average,
    whole_weights,
)
from groundwork.pretrain.downstream.finetuning.engine import Engine, whole
from groundwork.pretrain.engine.checkpoint import (
    FOLDER,
    LATEST,
    RECORD,
    TAG,
    CheckpointError,
    SafeLoading,
    complete_checkpoints,
    load_tensors,
    parameter_shapes,
    publish,
    random_states,
    read_record,
    restore_random_states,
    verify_files,
)
from groundwork.pretrain.engine.ema import Ema

KIND: Final = "finetune"
BEST: Final = "best"
MODEL, AVERAGE, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"


@dataclass(frozen=True)
class FinetuneState:
    """What a run needs, besides weights and optimiser, to go on exactly.

    step: steps done. spread: how the weights were parted (plain, deepspeed, fsdp). recipe:
    resolved, as JSON values. classes: width of a classifier's head, else None. dataset: digest of
    the training split. bad_samples: quarantined so far. ema_updates: of the average.
    """

    step: int
    world_size: int
    spread: str
    recipe: Mapping[str, Any]
    classes: int | None
    dataset: str
    bad_samples: int
    ema_updates: int = 0


def save_finetuned(
    engine: Engine,
    ema: Ema | None,
    out: Path,
    state: FinetuneState,
    keep: int,
    best: int | None = None,
) -> Path:
    """Write a checkpoint. Collective; returns its folder when it is complete.

    keep: how many of the last stay. best: the step of one that stays besides, if it is there.
    """
    world = engine.world
    folder, name = out / FOLDER, f"step-{state.step:08d}"
    working = folder / f".{name}.partial"
    if world.is_main:
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
    dist.barrier()
    weights = whole_weights(engine, keep=world.is_main)
    if world.is_main:
        save_file(_separate(weights), working / MODEL)
    del weights
    if ema is not None:
        average = whole_average(engine, ema, keep=world.is_main)
        if world.is_main:
            save_file(_separate(average), working / AVERAGE)
        del average
    if engine.kind == "deepspeed":
        shapes = parameter_shapes(engine.model)
        engine.model.save_checkpoint(str(working), tag=TAG, client_state=shapes, save_latest=False)
    else:
        moments = _whole_moments(engine)
        if world.is_main:
            save_file(moments, working / OPTIMIZER)
    torch.save(random_states(), working / f"rank-{world.rank:05d}.pt")
    dist.barrier()
    if world.is_main:
        publish(working, folder / name, {"kind": KIND, **vars(state)})
        write_atomically(folder / LATEST, name.encode())
        keep_last_and_best(out, keep, best)
    dist.barrier()
    return folder / name


def keep_last_and_best(out: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the last `keep` and that of the step `best`; point to that one."""
    kept = {path.name for path in complete_checkpoints(out)[-keep:]}
    if best is not None:
        name = f"step-{best:08d}"
        if (out / FOLDER / name / RECORD).is_file():
            write_atomically(out / FOLDER / BEST, name.encode())
            kept.add(name)
    for old in complete_checkpoints(out):
        if old.name not in kept:
            shutil.rmtree(old, ignore_errors=True)


def load_finetuned(engine: Engine, ema: Ema | None, checkpoint: Path) -> FinetuneState:
    """Restore weights, optimiser, average and this rank's random states. Collective.

    Exact where the job has as many ranks as wrote it. Without DeepSpeed another number of ranks may
    go on, too; dropout then draws other numbers.
    """
    state, world = read_finetune_state(checkpoint), engine.world
    is_sharded = "deepspeed" in (state.spread, engine.kind)
    if is_sharded and (state.spread, state.world_size) != (engine.kind, world.size):
        raise CheckpointError(
            f"{checkpoint}: written by {state.world_size} ranks ({state.spread}), this job has "
            f"{world.size} ({engine.kind}); start it as it was, with the same Accelerate config"
        )
    verify_files(checkpoint)
    if engine.kind == "deepspeed":
        engine.model.checkpoint_engine = SafeLoading(engine.model.checkpoint_engine)
        loaded, _ = engine.model.load_checkpoint(
            str(checkpoint), tag=TAG, load_lr_scheduler_states=False
        )
        if loaded is None:
            raise CheckpointError(f"{checkpoint}: DeepSpeed found no state in it")
    else:
        _load_weights(engine, read_weights_file(checkpoint / MODEL), checkpoint)
        _load_moments(engine, read_weights_file(checkpoint / OPTIMIZER), checkpoint)
    if ema is not None:
        load_average(engine, ema, read_weights_file(checkpoint / AVERAGE), state.ema_updates)
    if state.world_size == world.size:
        restore_random_states(load_tensors(checkpoint / f"rank-{world.rank:05d}.pt"))
    return state


def read_finetune_state(checkpoint: Path) -> FinetuneState:
    """The record of a checkpoint of fine-tuning. Raises CheckpointError."""
    record = read_record(checkpoint)
    if record.get("kind") != KIND:
        raise CheckpointError(
            f"{checkpoint}: not a checkpoint of fine-tuning (its kind is "
            f"{record.get('kind', 'pretraining')!r}); give a folder of `groundwork finetune`"
        )
    try:
        return FinetuneState(**{f: record[f] for f in FinetuneState.__dataclass_fields__})
    except KeyError as error:
        raise CheckpointError(f"{checkpoint / RECORD}: no {error} in it") from error


def is_finetuned(checkpoint: Path) -> bool:
    """Whether a checkpoint is of fine-tuning, and not of pretraining."""
    return read_record(checkpoint).get("kind") == KIND


def finetuned_weights(checkpoint: Path, *, ema: bool = True) -> dict[str, Tensor]:
    """Weights and buffers by name, averaged ones where there are some and `ema` says so."""
    verify_files(checkpoint)
    path = checkpoint / AVERAGE
    weights = read_weights_file(checkpoint / MODEL)
    # the average is of the trained weights; frozen ones are in the model's file only
    return {**weights, **read_weights_file(path)} if ema and path.is_file() else weights


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """A .safetensors file. Raises CheckpointError."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return tensors


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, as safetensors wants them."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _torch_optimizer(engine: Engine) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


def _whole_moments(engine: Engine) -> dict[str, Tensor]:
    """AdamW's state as "exp_avg/NAME" and so on, on the host of rank 0. Collective with FSDP."""
    state, moments = _torch_optimizer(engine).state, {}
    for name, parameter in engine.parameters.items():
        for key, value in state.get(parameter, {}).items():
            full = whole(value if isinstance(value, Tensor) else torch.tensor(value))
            if engine.world.is_main:
                moments[f"{key}/{name}"] = full.detach().cpu().clone().contiguous()
    return moments


@torch.no_grad()
def _load_weights(engine: Engine, weights: Mapping[str, Tensor], checkpoint: Path) -> None:
    from groundwork.pretrain.engine.ema import saved_buffers

    targets = {**engine.parameters, **saved_buffers(engine.module)}
    if targets.keys() != weights.keys():
        odd = sorted(targets.keys() ^ weights.keys())
        raise CheckpointError(
            f"{checkpoint}: its weights are of another model (e.g. {', '.join(odd[:3])})"
        )
    for name, target in targets.items():
        target.copy_(_like(weights[name], target))


def _load_moments(engine: Engine, moments: Mapping[str, Tensor], checkpoint: Path) -> None:
    optimizer = _torch_optimizer(engine)
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = value
    names = {id(parameter): name for name, parameter in engine.parameters.items()}
    described = optimizer.state_dict()  # its groups number the parameters
    order = [p for group in optimizer.param_groups for p in group["params"]]
    described["state"] = {
        number: {
            kind: _like(value, p) if value.shape == p.shape else value
            for kind, value in by_name[names[id(p)]].items()
        }
        for number, p in enumerate(order)
        if names[id(p)] in by_name
    }
    if by_name and not described["state"]:
        raise CheckpointError(f"{checkpoint}: its optimiser's state is of another model")
    optimizer.load_state_dict(described)


def _like(value: Tensor, target: Any) -> Any:
    """A whole tensor, or the part of it that FSDP keeps here."""
    if not hasattr(target, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
