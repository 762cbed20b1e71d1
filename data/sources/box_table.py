"""The boxes of an annotation file, packed: 57 bytes each, where Python objects take hundreds.

The training split of Objects365 has 25 million.
"""

import struct
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

#: id, category_id, left, top, width, height, area, crowd.
PACKED: Final = struct.Struct("<qq5d?")


class RawBox(NamedTuple):
    """One record of `annotations`, as the file has it. bbox: left, top, width, height."""

    id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float
    crowd: bool
    segmentation: Any = None
    more: Mapping[str, Any] = {}


class BoxTable:
    """Boxes by image id, in the order in which they were added.

    keeps_more: also keep the segmentations and further members, which are not packed.
    """

    def __init__(self, *, keeps_more: bool) -> None:
        self.keeps_more = keeps_more
        self._packed: dict[int, bytearray] = {}
        self._more: dict[int, list[tuple[Any, Mapping[str, Any]]]] = {}
        self._ids = array("q")

    def add(self, image_id: int, box: RawBox) -> None:
        row = PACKED.pack(box.id, box.category_id, *box.bbox, box.area, box.crowd)
        self._packed.setdefault(image_id, bytearray()).extend(row)
        self._ids.append(box.id)
        if self.keeps_more:
            self._more.setdefault(image_id, []).append((box.segmentation, box.more))

    def of(self, image_id: int) -> Iterator[RawBox]:
        """The boxes of an image; none for an image that has none."""
        more = self._more.get(image_id)
        for row, fields in enumerate(PACKED.iter_unpack(self._packed.get(image_id, b""))):
            number, category_id, left, top, width, height, area, crowd = fields
            segmentation, others = more[row] if more is not None else (None, {})
            bbox = (left, top, width, height)
            yield RawBox(number, category_id, bbox, area, crowd, segmentation, others)

    def drop_doubles(self) -> Iterator[tuple[int, int]]:
        """Keep one box of each id; yields (image id, box id) of those that go."""
        ids, counts = np.unique(np.frombuffer(self._ids, np.int64), return_counts=True)
        double = set(ids[counts > 1].tolist())
        seen: set[int] = set()
        for image_id in list(self._packed) if double else ():
            boxes = list(self.of(image_id))
            if double.isdisjoint(box.id for box in boxes):
                continue
            kept = []
            for box in boxes:
                if box.id in seen:
                    yield image_id, box.id
                    continue
                seen.update({box.id} & double)
                kept.append(box)
            self._packed.pop(image_id), self._more.pop(image_id, None)
            for box in kept:
                self.add(image_id, box)
