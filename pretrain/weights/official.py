"""Official checkpoints of K-LITE and UniCL: read into a `Klite` model, and written back.

`models/klite.py` has the official parameter names, so reading is a matter of three things: the
names of the sibling UniCL class, the buffers that the official code saves (we recompute them), and
tables made for another window or context length. Nothing in a file is executed.
"""

import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from groundwork.pretrain.engine.checkpoint import CheckpointError

#: Names of the sibling UniCL class -> K-LITE's, by the first part of a parameter's name.
RENAMES: Mapping[str, str] = {
    "image_encoder": "visual",
    "lang_encoder": "text",
    "image_projection": "vision_projection",
    "lang_projection": "text_projection",
}

#: Buffers of Swin that official checkpoints hold. They follow from the window and the image size.
BUFFERS = ("relative_position_index", "attn_mask")

BIAS_TABLE = "relative_position_bias_table"
POSITIONS = "positional_embedding"


def load_official(path: Path) -> dict[str, Tensor]:
    """The weights of an official checkpoint under our names. Raises CheckpointError.

    path: `.safetensors`, or a `.pt`/`.pth` file that holds a state dict, alone or under `model`.
    """
    values = read_file(path)
    for key in ("model", "state_dict"):
        if isinstance(values, Mapping) and isinstance(values.get(key), Mapping):
            values = values[key]
    if not isinstance(values, Mapping) or not values:
        raise CheckpointError(f"{path}: holds no state dict; expected parameter names and tensors")
    strange = [str(name) for name, value in values.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"{path}: not a state dict: {_listed(strange)} hold no tensors; expected one alone, or "
            "under the key 'model'"
        )
    state: dict[str, Tensor] = {}
    for name, value in values.items():
        ours = our_name(name)
        if ours.rpartition(".")[2] in BUFFERS:
            continue
        if ours in state:
            raise CheckpointError(
                f"{path}: two of its tensors are named {ours} here, one is {name}"
            )
        # saved with one element by wrappers that cannot hold scalars
        state[ours] = value.reshape(()) if ours == "logit_scale" and value.numel() == 1 else value
    return state


def our_name(name: str) -> str:
    """The name a parameter of an official checkpoint has in `Klite`."""
    while name.startswith("module."):  # DistributedDataParallel, once per wrapper
        name = name.removeprefix("module.")
    first, dot, rest = name.partition(".")
    return RENAMES.get(first, first) + dot + rest


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: str = "the weights") -> None:
    """Copy `state` into `model`: every entry, each in its place, or CheckpointError.

    Relative position bias tables of another window and text positions of another context length are
    resized. Call before DeepSpeed wraps the model. source: named in errors.
    """
    own = model.state_dict()
    fitted = {k: _fit(k, v, own[k].shape) if k in own else v for k, v in state.items()}
    missing = [name for name in own if name not in fitted]
    unexpected = [name for name in fitted if name not in own]
    shapes = [
        f"{name} is {tuple(value.shape)}, the model's is {tuple(own[name].shape)}"
        for name, value in fitted.items()
        if name in own and value.shape != own[name].shape
    ]
    found = (("missing", missing), ("not in the model", unexpected), ("of another shape", shapes))
    problems = [f"{len(names)} {what}: {_listed(names)}" for what, names in found if names]
    if problems:
        raise CheckpointError(
            f"{source}: of another model than the recipe's. Tensors "
            + "; ".join(problems)
            + ". Set the sections model.image and model.text to those of the checkpoint"
        )
    model.load_state_dict(fitted)


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict as the official code saves it: the same names, its buffers included.

    Tensors are on the model's device and share its memory.
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    buffers = {n: b.detach() for n, b in model.named_buffers() if n.rpartition(".")[2] in BUFFERS}
    return state | buffers


def resize_bias_table(table: Tensor, size: int) -> Tensor:
    """Bicubic resize of a relative position bias table, as the official Swin code does it.

    table: (s^2, heads), s = 2 window - 1 -> (size^2, heads), heads apart; computed in float32.
    """
    side, heads = math.isqrt(len(table)), table.shape[1]
    grid = table.float().T.reshape(1, heads, side, side)
    resized = F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False)
    return resized.reshape(heads, size**2).T.contiguous().to(table.dtype)


def resize_positions(table: Tensor, length: int) -> Tensor:
    """Text positions for another context length. table: (N, D) -> (length, D).

    The first `length` where there are enough: texts that fit keep their features exactly. Bicubic
    along the text where there are not.
    """
    if length <= len(table):
        return table[:length]
    columns = table.float().T[None, :, :, None]  # (1, D, N, 1)
    resized = F.interpolate(columns, size=(length, 1), mode="bicubic", align_corners=False)
    return resized[0, :, :, 0].T.contiguous().to(table.dtype)


def _fit(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """`value` resized to `shape` where it is a table whose size is a setting; else as it is."""
    if value.shape == shape or value.ndim != 2 or len(shape) != 2 or value.shape[1] != shape[1]:
        return value
    kind = name.rpartition(".")[2]
    if kind == BIAS_TABLE and all(math.isqrt(n) ** 2 == n for n in (len(value), shape[0])):
        return resize_bias_table(value, math.isqrt(shape[0]))
    return resize_positions(value, shape[0]) if kind == POSITIONS else value


def read_file(path: Path) -> Any:
    """What a `.safetensors`, `.pt` or `.pth` file holds, on the CPU. Raises CheckpointError.

    Nothing in it is executed; a file of more than tensors and plain values is refused.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a .pt, .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # training checkpoints of the Swin family carry their configuration, a dict of its own class
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # the rest of torch's message advises to load it nevertheless
        reason = re.search(r"WeightsUnpickler error: ([^\n]*)", str(error))
        raise CheckpointError(
            f"{path}: holds more than tensors and numbers, so it is not loaded, or it is no "
            f"checkpoint at all ({reason[1].strip() if reason else type(error).__name__})"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
