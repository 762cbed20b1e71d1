"""Masks that boxes hold as COCO's run lengths, drawn into one map.

Decoded here and not by pycocotools, which trusts the lengths: those of a data set that one only
looks at may say anything.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Bounds of what one sample may ask for: masks, pixels of each, characters of its lengths.
MAX_MASKS = 200
MAX_MASK_PIXELS = 2**24
MAX_CHARACTERS = 2**20


def has_run_lengths(box: Any) -> bool:
    """Whether the mask of a box is one of run lengths."""
    return isinstance(box, dict) and isinstance(box.get("segmentation"), dict)


def run_length_map(info: Mapping[str, Any]) -> NDArray[np.uint16] | None:
    """The masks of the boxes of `Sample.info` -> (H, W) box number + 1, the last on top.

    Masks of another size than the first one, and lengths that do not fill their mask, are left out;
    None where nothing is left.
    """
    boxes = info.get("boxes")
    drawn: NDArray[np.uint16] | None = None
    numbered = enumerate(boxes if isinstance(boxes, list) else [], 1)
    for number, box in islice(((n, box) for n, box in numbered if has_run_lengths(box)), MAX_MASKS):
        mask = decode_run_lengths(box["segmentation"])
        if mask is None:
            continue
        if drawn is None:
            drawn = np.zeros(mask.shape, np.uint16)
        if mask.shape == drawn.shape:
            drawn[mask] = number
    return drawn


def decode_run_lengths(segmentation: Mapping[str, Any]) -> NDArray[np.bool_] | None:
    """{"size": [h, w], "counts": lengths, or COCO's string} -> (h, w); None for nonsense."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or len(size) != 2:
        return None
    if any(type(n) is not int or not 0 < n <= MAX_MASK_PIXELS for n in size):
        return None
    height, width = size
    if isinstance(counts, str):
        counts = _uncompressed(counts)
    if not isinstance(counts, list) or height * width > MAX_MASK_PIXELS:
        return None
    if any(type(n) is not int or n < 0 for n in counts) or sum(counts) != height * width:
        return None
    values = np.arange(len(counts)) % 2 == 1  # background first
    return np.repeat(values, counts).reshape(width, height).T  # column by column


def _uncompressed(text: str) -> list[int]:
    """The lengths in COCO's string: 5 bits a character, from the third on as differences."""
    counts: list[int] = []
    value = shift = 0
    for character in text[:MAX_CHARACTERS]:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts
