"""The shapes of InternImage at 224 pixels, and the least that DCNv3 moves through DRAM for them."""

from collections.abc import Iterator
from typing import NamedTuple


class Stage(NamedTuple):
    """One stage: (side, side, channels) with its groups, at 3x3, in `blocks` blocks."""

    model: str
    side: int
    channels: int
    groups: int
    blocks: int


class Floor(NamedTuple):
    """Bytes of one call: every tensor once.

    backward: value, offset, mask, grad_output in, three gradients out. with_sums: and the float32
    sums of grad_value, which are set to zero, added to, and converted.
    """

    forward: int
    backward: int
    with_sums: int


#: channels and groups of the first stage, blocks of each
INTERNIMAGE = {
    "T": (64, 4, (4, 4, 18, 4)),
    "B": (112, 7, (4, 4, 21, 4)),
    "H": (320, 10, (6, 6, 32, 6)),
}
#: Bytes per millisecond of an H100's DRAM, as a round number.
DRAM = 3.0e9


def stages(model: str) -> Iterator[Stage]:
    channels, groups, depths = INTERNIMAGE[model]
    for i, blocks in enumerate(depths):
        yield Stage(model, 56 >> i, channels << i, groups << i, blocks)


def floor(stage: Stage, batch: int, element_bytes: int) -> Floor:
    pixels = batch * stage.side**2
    image = pixels * stage.channels
    samples = pixels * stage.groups * 9 * 3  # x, y, mask
    return Floor(
        (2 * image + samples) * element_bytes,
        (3 * image + 2 * samples) * element_bytes,
        (3 * image + 2 * samples) * element_bytes + 3 * 4 * image,
    )


def floor_of_model(model: str, batch: int, element_bytes: int) -> Floor:
    """Of all blocks."""
    per_stage = [
        [stage.blocks * size for size in floor(stage, batch, element_bytes)]
        for stage in stages(model)
    ]
    return Floor(*(sum(sizes) for sizes in zip(*per_stage, strict=True)))
