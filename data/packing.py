"""Token packing: several texts in one row, so that few places of a batch are padding.

The texts of one micro-batch are packed among themselves. What a position of the stream holds thus
stays a function of the position, and the state of a packed stream is the same one integer; the
price is the last, half-filled row of each micro-batch. The number of rows differs from batch to
batch; attention must be kept inside of a segment.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PackedTokens(NamedTuple):
    """ids: (R, L) int64, padded with `pad_id`.

    segments: (R, L) int32, 1, 2, ... for the texts of a row in order, 0 for padding.
    positions: (R, L) int64, place of a token in its own text.
    rows, starts: (B,) int64, where the text of each sample of the micro-batch begins.
    """

    ids: Tensor
    segments: Tensor
    positions: Tensor
    rows: Tensor
    starts: Tensor

    @property
    def fill(self) -> float:
        """The share of places that hold a token; 1 where there is no place."""
        return float((self.segments > 0).float().mean()) if self.segments.numel() else 1.0


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put texts of these lengths into rows of `capacity` tokens; returns their numbers, by row.

    Best fit, longest first: at most 11/9 of the fewest rows possible, and one (Johnson 1974).
    Deterministic. Raises ValueError where a text is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        length = lengths[number]
        if not 0 <= length <= capacity:
            raise ValueError(
                f"text {number} has {length} tokens, a row holds {capacity}; truncate texts "
                "before they are packed, or make rows longer"
            )
        place = bisect_left(free, (length, -1))
        if place == len(free):
            rows.append([])
            left, row = capacity, len(rows) - 1
        else:
            left, row = free.pop(place)
        rows[row].append(number)
        insort(free, (left - length, row))
    return [sorted(row) for row in rows]


def pack_tokens(texts: Sequence[Sequence[int]], capacity: int, pad_id: int = 0) -> PackedTokens:
    """The packed rows of a micro-batch. texts: token ids of each sample, at most `capacity` each.

    Rows come in the order of their first sample.
    """
    packed = sorted(pack([len(text) for text in texts], capacity))
    ids = torch.full((len(packed), capacity), pad_id, dtype=torch.int64)
    segments = torch.zeros((len(packed), capacity), dtype=torch.int32)
    positions = torch.zeros((len(packed), capacity), dtype=torch.int64)
    rows = torch.empty(len(texts), dtype=torch.int64)
    starts = torch.empty(len(texts), dtype=torch.int64)
    for row, numbers in enumerate(packed):
        start = 0
        for segment, number in enumerate(numbers, start=1):
            end = start + len(texts[number])
            ids[row, start:end] = torch.tensor(texts[number], dtype=torch.int64)
            segments[row, start:end] = segment
            positions[row, start:end] = torch.arange(end - start)
            rows[number], starts[number] = row, start
            start = end
    return PackedTokens(ids, segments, positions, rows, starts)


def segment_mask(segments: Tensor) -> Tensor:
    """Who may attend to whom: (R, L) -> (R, L, L) bool, True inside of one segment.

    Padding attends to itself, so that no row of a softmax is empty.
    """
    same = segments[:, :, None] == segments[:, None, :]
    own = torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)
    return (same & (segments > 0)[:, :, None]) | own
