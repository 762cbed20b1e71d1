"""Checkpoints: complete or absent, verified, and loaded without executing anything.

    OUT/checkpoints/step-00000200/deepspeed/*.pt      DeepSpeed's shards, one set per rank
                                  rank-00000.pt       random states of the rank
                                  averages-00000.pt   the rank's parts of averaged weights, if any
                                  checkpoint.json     step, position, recipe, files with checksums
    OUT/checkpoints/latest                            name of the last complete one

A checkpoint is written to a hidden folder, synced, and renamed when every rank is done; `latest` is
replaced after that. Files are read with torch's `weights_only` loader: a checkpoint from elsewhere
can hold numbers, not code.
"""

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import torch.distributed as dist

from groundwork.data.atomic import sync_directory, sync_file, write_atomically
from groundwork.pretrain.engine.arithmetic import arithmetic, resume_note
from groundwork.pretrain.engine.averages import Averages
from groundwork.pretrain.engine.deepspeed_config import World, prepare_environment

FOLDER = "checkpoints"
RECORD = "checkpoint.json"
#: The resolved recipe, in the folder of a run.
RECIPE = "recipe.yaml"
LATEST = "latest"
TAG = "deepspeed"
#: Key of DeepSpeed's model state: shapes of the optimiser's parameters, in its order, by name.
PARAMETER_SHAPES = "groundwork_parameter_shapes"
#: Likewise, of the parameters that are not trained.
FROZEN_SHAPES = "groundwork_frozen_shapes"
FORMAT = "groundwork-checkpoint"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says which, why, and how to mend it."""


@dataclass(frozen=True)
class CheckpointConfig:
    """every_steps: steps between checkpoints. keep: how many of the last complete ones stay."""

    every_steps: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.keep < 1:
            raise ValueError("checkpoint.every_steps and checkpoint.keep must be at least 1")


@dataclass(frozen=True)
class RunState:
    """What a run needs, besides DeepSpeed's shards, to go on exactly.

    step: steps done. position: next global position of the stream.
    recipe: resolved, as JSON values.
    dataset, concepts, knowledge: digests of the tars, of the classes' names, and of the knowledge
    index ("" for none). bad_samples: quarantined so far.
    """

    step: int
    position: int
    world_size: int
    recipe: Mapping[str, Any]
    dataset: str
    concepts: str
    knowledge: str
    bad_samples: int


def save_checkpoint(
    engine: Any,
    out: Path,
    state: RunState,
    world: World,
    keep: int,
    averages: Averages | None = None,
) -> Path:
    """Write a checkpoint of `engine`. Collective; returns its folder when it is complete."""
    folder = out / FOLDER
    name = f"step-{state.step:08d}"
    working = folder / f".{name}.partial"
    if world.is_main:
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
    dist.barrier()
    shapes = parameter_shapes(engine)
    engine.save_checkpoint(str(working), tag=TAG, client_state=shapes, save_latest=False)
    torch.save(random_states(), working / f"rank-{world.rank:05d}.pt")
    if averages is not None and averages.is_saved_by(world.rank):
        torch.save(averages.state_dict(), averages_file(working, world.rank))
    dist.barrier()
    if world.is_main:
        publish(working, folder / name, vars(state))
        write_atomically(folder / LATEST, name.encode())
        for old in complete_checkpoints(out)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return folder / name


def publish(working: Path, final: Path, facts: Mapping[str, Any]) -> None:
    """Make the files in `working` a complete checkpoint, `final`: recorded, synced, renamed.

    facts: what the record says besides the files and what they were computed with.
    """
    for script in (*working.glob("*.py"), *working.glob(f"{TAG}/*.py")):
        script.unlink()  # DeepSpeed copies its converters along; a checkpoint holds data only
    files = sorted(path for path in working.rglob("*") if path.is_file())
    record = {
        "format": FORMAT,
        "version": 1,
        **facts,
        "versions": arithmetic(),
        "files": {
            str(path.relative_to(working)): [path.stat().st_size, file_crc32c(path)]
            for path in files
        },
    }
    (working / RECORD).write_text(json.dumps(record, indent=1))
    folders = [path for path in working.rglob("*") if path.is_dir()]
    for path in (*files, working / RECORD, *folders, working):
        sync_file(path)
    shutil.rmtree(final, ignore_errors=True)
    working.rename(final)
    sync_directory(final.parent)


def load_checkpoint(
    engine: Any, checkpoint: Path, world: World, averages: Averages | None = None
) -> RunState:
    """Restore `engine`, its averages and the random states of this rank. Collective."""
    state = read_state(checkpoint)
    if state.world_size != world.size:
        raise CheckpointError(
            f"{checkpoint}: written by {state.world_size} ranks, this job has {world.size}; start "
            f"it with {state.world_size} ranks (deepspeed --num_gpus {state.world_size} ...)"
        )
    verify_files(checkpoint)
    engine.checkpoint_engine = SafeLoading(engine.checkpoint_engine)
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag=TAG, load_lr_scheduler_states=False)
    if loaded is None:
        raise CheckpointError(f"{checkpoint}: DeepSpeed found no state in it; use an earlier one")
    if averages is not None and averages.has_state:
        _load_averages(averages, checkpoint, world)
    restore_random_states(load_tensors(checkpoint / f"rank-{world.rank:05d}.pt"))
    return state


def averages_file(checkpoint: Path, rank: int) -> Path:
    """Where a rank's parts of the averages are."""
    return checkpoint / f"averages-{rank:05d}.pt"


def _load_averages(averages: Averages, checkpoint: Path, world: World) -> None:
    path = averages_file(checkpoint, world.rank if averages.is_saved_by(world.rank) else 0)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: the checkpoint was saved without averages of the weights, which "
            "this run has; go on with the settings it was saved with"
        )
    try:
        averages.load_state_dict(load_tensors(path))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint a path stands for: itself, the last complete one of a run's folder, or what a
    run's file `checkpoints/latest` or `checkpoints/best` names.

    None where the folder holds none. Falls back to earlier ones if `latest` points nowhere.
    """
    for named in (_follow_pointer(path), _follow_pointer(path / FOLDER / LATEST)):
        if (named / RECORD).is_file():
            return named
    complete = complete_checkpoints(path)
    return complete[-1] if complete else None


def _follow_pointer(path: Path) -> Path:
    """The folder of a checkpoint that a file in `checkpoints/` names; any other path itself."""
    if path.parent.name == FOLDER and path.is_file():
        named = path.parent / Path(path.read_text("utf-8", errors="replace").strip()).name
        if (named / RECORD).is_file():
            return named
    return path


def require_checkpoint(path: Path) -> Path:
    """`find_checkpoint`, or an error that says what to do."""
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(
            f"{path}: no checkpoint here (looked for {RECORD}, and for {FOLDER}/step-*/{RECORD}); "
            "give the --out folder of a pretraining run, or one of its checkpoints"
        )
    return checkpoint


def complete_checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(record.parent for record in (out / FOLDER).glob(f"step-*/{RECORD}"))


def read_state(checkpoint: Path) -> RunState:
    record = read_record(checkpoint)
    try:
        return RunState(**{field: record[field] for field in RunState.__dataclass_fields__})
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint / RECORD}: no {error} in it. {_without(checkpoint)}"
        ) from error


def resuming_from(checkpoint: Path, sample: int) -> str:
    """What a run says when it goes on from a checkpoint, at the next sample of its stream."""
    note = resume_note(read_record(checkpoint))
    return f"resuming from {checkpoint} at sample {sample:,}{note}"


def verify_files(checkpoint: Path) -> None:
    """Check size and checksum of every file of a checkpoint."""
    problems = []
    for name, (size, checksum) in read_record(checkpoint)["files"].items():
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size:,} bytes, expected {size:,}")
        elif file_crc32c(path) != checksum:
            problems.append(f"{name} fails its checksum")
    if problems:
        raise CheckpointError(
            f"{checkpoint}: damaged: {'; '.join(problems)}. {_without(checkpoint)}"
        )


def load_tensors(path: Path) -> Any:
    """torch.load that admits tensors, containers and DeepSpeed's own plain records, never code."""
    prepare_environment()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # an enumeration and two records of numbers
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        except Exception as error:
            if type(error).__name__ != "UnpicklingError":
                raise
            raise CheckpointError(
                f"{path}: holds more than tensors and numbers, so it is not loaded: {error}"
            ) from error


def parameter_shapes(engine: Any) -> dict[str, dict[str, list[int]]]:
    """What DeepSpeed's checkpoints lack: the names of the optimiser's parameters without ZeRO, as
    they number them; and the frozen parameters, which stages 0 and 1 do not tell from buffers."""
    named = list(engine.module.named_parameters())
    frozen = {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in named
        if not parameter.requires_grad
    }
    shapes = {FROZEN_SHAPES: frozen} if frozen else {}
    if engine.zero_optimization_stage() > 0:
        return shapes
    names = {id(parameter): name for name, parameter in named}
    # the optimiser of bf16 has float32 copies; the parameters of the module are kept beside them
    groups = getattr(engine.optimizer, "fp16_groups", None)
    if groups is None:
        groups = [group["params"] for group in engine.optimizer.param_groups]
    shapes[PARAMETER_SHAPES] = {names[id(p)]: list(p.shape) for group in groups for p in group}
    return shapes


class SafeLoading:
    """DeepSpeed's checkpoint engine, with `load` replaced by the loader that runs no code."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_tensors(Path(path))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def read_record(checkpoint: Path) -> dict[str, Any]:
    """checkpoint.json of a complete checkpoint. Raises CheckpointError."""
    path = checkpoint / RECORD
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format is {record['format']!r}")
        if not isinstance(record["files"], dict):
            raise TypeError("files is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not the record of a complete checkpoint: {error}. {_without(checkpoint)}"
        ) from error
    return record


def _without(checkpoint: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    others = [p.name for p in complete_checkpoints(checkpoint.parent.parent) if p != checkpoint]
    then = f"goes on from {others[-1]}" if others else "starts afresh, as no other one is here"
    return f"Delete the folder {checkpoint}: the run then {then}"


def random_states() -> dict[str, Any]:
    """The states of all generators of this process, as tensors and numbers."""
    version, keys, gauss = random.getstate()
    _, legacy, position, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(keys), gauss],
        "numpy": [[int(k) for k in legacy], int(position), int(has_gauss), float(cached)],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states["torch"])
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    legacy, position, has_gauss, cached = states["numpy"]
    np.random.set_state(("MT19937", np.array(legacy, np.uint32), position, has_gauss, cached))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def file_crc32c(path: Path) -> int:
    """The checksum of a file, as checkpoint.json has it."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum.update(block)
    return int.from_bytes(checksum.digest(), "big")
