"""Parts of tensors that lie on several ranks: moved, saved, restored and joined."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """What one rank keeps of a parameter.

    values: (n,), the elements begin to begin + n of the flattened parameter, and padding beyond its
    end. shape: of the whole parameter.
    """

    begin: int
    values: Tensor
    shape: tuple[int, ...]


@torch.no_grad()
def follow(shadows: list[Tensor], values: list[Tensor], weight: float) -> None:
    """shadow <- shadow + weight (value - shadow), in place; the shadows are float32."""
    if not shadows:
        return
    if all(value.dtype == torch.float32 for value in values):
        torch._foreach_lerp_(shadows, values, weight)
    else:
        for shadow, value in zip(shadows, values, strict=True):
            shadow.lerp_(value.float(), weight)


def part_state(part: Part) -> dict[str, Any]:
    return {"begin": part.begin, "shape": list(part.shape), "values": part.values}


def load_parts(shadow: Mapping[str, Part], state: Mapping[str, Any]) -> None:
    """Copy saved parts over the present ones, which must be cut alike."""
    if state.keys() != shadow.keys():
        differing = sorted(state.keys() ^ shadow.keys())
        raise ValueError(f"the saved average is of other weights: {', '.join(differing[:5])}")
    for name, part in shadow.items():
        saved = state[name]
        if saved["begin"] != part.begin or saved["values"].shape != part.values.shape:
            raise ValueError(
                f"the saved average of {name} is cut into other parts; resume with the ZeRO stage "
                "and the settings it was saved with"
            )
        part.values.copy_(saved["values"])


def joined_parts(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Whole tensors, by name, from the saved parts of all ranks. Raises ValueError for a gap."""
    shapes = {name: saved["shape"] for state in ranks for name, saved in state.items()}
    whole = {}
    for name, shape in shapes.items():
        flat, covered = torch.empty(math.prod(shape)), 0
        for saved in (state[name] for state in ranks if name in state):
            values = saved["values"][: max(0, flat.numel() - saved["begin"])]  # then padding
            flat[saved["begin"] : saved["begin"] + values.numel()] = values
            covered += values.numel()
        if covered != flat.numel():
            raise ValueError(f"{covered} of {flat.numel()} elements of {name} were saved")
        whole[name] = flat.view(shape)
    return whole
