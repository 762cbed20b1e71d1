"""Bytes of pictures -> what models take."""

import torch
from torch import Tensor


def normalise(
    image: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> Tensor:
    """image: (B, 3, H, W) uint8 -> normalised pixels of the same shape, computed in float32.

    mean, std: of the pixels in [0, 1], per channel. Plain numbers: buffers of a module would be
    rounded to bf16 with its weights.
    """
    unit = image.float() / 255
    channels = zip(unit.unbind(1), mean, std, strict=True)
    return torch.stack([(x - m) / s for x, m, s in channels], dim=1).to(dtype)
