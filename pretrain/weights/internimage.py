"""Files of official InternImage weights: read into a model, and written back."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from groundwork.data.atomic import sync_directory, sync_file
from groundwork.pretrain.engine.checkpoint import CheckpointError
from groundwork.pretrain.models.internimage import InternImage
from groundwork.pretrain.models.internimage_weights import (
    HeadRule,
    LoadReport,
    OfficialWeightsError,
)
from groundwork.pretrain.weights.official import read_file


def load_internimage(
    model: InternImage, path: Path, head: HeadRule = "same", class_indices: Path | None = None
) -> LoadReport:
    """Copy the weights of a `.pth`, `.pt` or `.safetensors` file into a model; CheckpointError.

    class_indices: a file of one integer per class of the model, its row in the checkpoint's head.
    """
    indices = None if class_indices is None else read_class_indices(class_indices)
    values = read_file(path)
    try:
        return model.load_official(values, head, indices)
    except OfficialWeightsError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_class_indices(path: Path) -> list[int]:
    """The integers of a text file, one per line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    indices = []
    for number, line in enumerate(lines, 1):
        if not line.strip().isdecimal():
            raise CheckpointError(
                f"{path}:{number}: {line!r} is no class; give one integer per line, the row of "
                "the checkpoint's head for each class of the model"
            )
        indices.append(int(line))
    return indices


def save_internimage(model: InternImage, path: Path) -> None:
    """Write the weights as the official code does: under `model` in a `.pth`; or `.safetensors`."""
    state = {name: v.cpu().contiguous() for name, v in model.official_state_dict().items()}
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise CheckpointError(f"{path}: unknown kind of file; name it .pth or .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".safetensors":
            save_file(state, temporary, metadata={"format": "pt"})
        else:
            torch.save({"model": state}, temporary)
        sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
