"""Two pictures in one: pairs of a batch exchange the cells of a random grid, and can be told apart.

The mixed input of M3I pre-training (arXiv 2211.09807): the encoder sees a mixture, the targets are
those of both constituents. Rows 2k and 2k+1 of a batch are partners and share one mask, so both
mixtures of a pair together show every pixel of both pictures exactly once.
"""

import torch
from torch import Tensor


def check_mixable(batch: int, height: int, width: int, cell: int) -> None:
    """Raise ValueError where pictures cannot be mixed. height, width, cell: in pixels."""
    if batch % 2:
        raise ValueError(
            f"objective m3i mixes pairs of pictures, but a micro-batch has {batch}; choose "
            "train.global_batch and train.micro_batch so that each rank has an even number"
        )
    if height % cell or width % cell or (height, width) == (cell, cell):
        raise ValueError(
            f"pictures of {height} x {width} pixels have no grid of cells of {cell}: choose "
            "objective.mask_cell and data.image.size so that one divides the other, with two cells "
            "or more"
        )


def own_cells(rows: int, columns: int, share: float) -> int:
    """How many cells of a grid a picture keeps in its own mixture: at least one, never all."""
    cells = rows * columns
    return min(max(round(share * cells), 1), cells - 1)


def draw_masks(
    pairs: int, rows: int, columns: int, share: float, generator: torch.Generator | None = None
) -> Tensor:
    """(pairs, rows, columns) bool, True where a picture stays: `own_cells` of each grid, anywhere.

    Drawn on the CPU, from torch's global generator unless another is given.
    """
    order = torch.rand(pairs, rows * columns, generator=generator).argsort(1)
    return (order < own_cells(rows, columns, share)).view(pairs, rows, columns)


def swap_partners(x: Tensor) -> Tensor:
    """x: (B, ...), B even -> the same with the rows of each pair exchanged."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def per_picture(masks: Tensor, height: int, width: int) -> Tensor:
    """Masks of pairs, (B/2, rows, columns) -> (B, height, width), for both pictures of a pair.

    height, width: of the pixels or of the tokens; multiples of rows and columns.
    """
    fine = masks.repeat_interleave(height // masks.shape[1], 1)
    fine = fine.repeat_interleave(width // masks.shape[2], 2)
    return fine.repeat_interleave(2, 0)


def mix_partners(images: Tensor, own: Tensor) -> Tensor:
    """images: (B, C, H, W); own: (B, H, W) bool, the same for partners -> mixtures (B, C, H, W).

    Mixture i has the pixels of picture i where `own`, and those of its partner elsewhere.
    """
    return torch.where(own[:, None], images, swap_partners(images))
