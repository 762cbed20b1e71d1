"""The image tower of an M3I run as plain InternImage weights: the student, its teacher, or both."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from safetensors.torch import save
from torch import Tensor

from groundwork.data.atomic import write_atomically
from groundwork.pretrain.engine.checkpoint import (
    CheckpointError,
    require_checkpoint,
    verify_files,
)
from groundwork.pretrain.weights.zero_shards import full_weights

Tower = Literal["student", "teacher"]

#: What the parameters of each are called in the objective `m3i`.
PREFIXES: Final[Mapping[Tower, str]] = {"student": "model.visual.", "teacher": "teacher."}


def image_tower(weights: Mapping[str, Tensor], tower: Tower) -> dict[str, Tensor]:
    """InternImage's weights by their official names, out of those of the objective.

    They have attention pooling and `fc_norm`, but no classifier: load them into a model of 0
    classes, or with head "skip". Raises CheckpointError where there is no such tower.
    """
    prefix = PREFIXES[tower]
    own = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
    if not own:
        raise CheckpointError(
            f"no {tower} in these weights: no parameter's name begins with {prefix}; give those of "
            "a run with objective.kind m3i (with dense_weight 0 it has no teacher)"
        )
    return own


def joint_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both towers in one state dict, named `student.…` and `teacher.…` as joint checkpoints are.

    A reader of official weights takes the student from it and leaves the teacher.
    """
    return {
        f"{tower}.{name}": value
        for tower in PREFIXES
        for name, value in image_tower(weights, tower).items()
    }


def write_image_tower(run: Path, path: Path, tower: Tower | Literal["both"] = "teacher") -> None:
    """Write a tower of a run's last checkpoint as a .safetensors file, float32.

    run: the run's folder, or one of its checkpoints. Raises CheckpointError.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: unknown kind of file; name it .safetensors")
    checkpoint = require_checkpoint(run)
    verify_files(checkpoint)
    weights = full_weights(checkpoint)
    chosen = joint_names(weights) if tower == "both" else image_tower(weights, tower)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: value.contiguous() for name, value in chosen.items()}
    write_atomically(path, save(whole, metadata={"format": "pt"}))
