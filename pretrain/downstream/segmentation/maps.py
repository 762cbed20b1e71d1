"""A sample -> the class of each of its pixels.

Two forms are read. An index map is a member such as `seg.png`: a PNG of 8 or 16 bits without
colours (or with a palette, whose indices count), as large as the upright picture, whose values are
the classes; the largest value, 255 or 65535, is ignored. An instance map is `instances.png`, as
synthetic scenes have it: the value of a pixel is the `id` of one of `json.boxes`, which says what
it is.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundwork.data.decode import ignoring_warnings, open_image
from groundwork.data.diagnosis import Diagnosis
from groundwork.data.samples import Sample, SampleError

#: Layouts of a PNG, as Pillow names them, whose values it would not give as they are.
SCALED = ("L;2", "L;4")


@dataclass(frozen=True)
class SegmentationLabels:
    """Where the classes of the pixels come from, and what they are called.

    num_classes: with the background, where there is one. names: of the classes, for reports; none,
        or one for each. ignore_index: stands for pixels that are neither trained on nor scored.
    member: of the sample. zero_is_ignored: of an index map in which classes begin at 1 and 0 is
        everything else, as in ADE20K; they are then counted from 0.
    instance_field: None for an index map. Else the map holds instances, and this field of their
        boxes their class: one of `names`, or a number, which is counted on from 1. Background is
        class 0; an instance without a box is ignored.
    """

    num_classes: int
    names: tuple[str, ...] = ()
    ignore_index: int = 255
    member: str = "seg.png"
    zero_is_ignored: bool = False
    instance_field: str | None = None

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"labels.num_classes is {self.num_classes}; give at least 2")
        if self.names and len(self.names) != self.num_classes:
            raise ValueError(
                f"labels.names has {len(self.names)} names for num_classes {self.num_classes}; "
                "name every class, in order, or none"
            )
        if 0 <= self.ignore_index < self.num_classes:
            raise ValueError(
                f"labels.ignore_index is {self.ignore_index}, which is one of the "
                f"{self.num_classes} classes; give a number beyond them, such as 65535"
            )
        if self.zero_is_ignored and self.instance_field is not None:
            raise ValueError(
                "labels.zero_is_ignored is for index maps; with instance_field class 0 is the "
                "background"
            )


def segmentation_map(sample: Sample, labels: SegmentationLabels) -> NDArray[np.int32]:
    """-> (H, W), a class or ignore_index at each pixel. Raises SampleError naming what is wrong."""
    if labels.member not in sample.members:
        raise SampleError(
            f"no member {labels.member!r} (found: {', '.join(sorted(sample.members)) or 'none'}); "
            "build the data set with it, or name another in task.labels.member",
            Diagnosis.MISSING_FIELD,
        )
    values, largest = _decode(sample.members[labels.member], labels.member)
    if labels.instance_field is not None:
        return _classes_of_instances(values, sample.info, labels, labels.instance_field)
    classes = np.where(values == largest, labels.ignore_index, values)
    if labels.zero_is_ignored:
        is_class = (values != 0) & (values != largest)
        classes = np.where(is_class, values - 1, labels.ignore_index)
    wrong = (classes >= labels.num_classes) & (classes != labels.ignore_index)
    if wrong.any():
        raise SampleError(
            f"{labels.member} has the class {int(classes[wrong].max())}; expected 0 to "
            f"{labels.num_classes - 1}, or {largest} for what is ignored: set "
            "task.labels.num_classes, or task.labels.zero_is_ignored where classes begin at 1",
            Diagnosis.BAD_LABEL,
        )
    return classes.astype(np.int32)


def _decode(data: bytes, member: str) -> tuple[NDArray[np.int32], int]:
    """-> (H, W) values, and the largest value that the format has: 255 or 65535."""
    with ignoring_warnings():
        try:
            image = open_image(data)
        except SampleError as error:
            raise SampleError(f"{member}: {error}", error.diagnosis) from error
        tiles = getattr(image, "tile", ())
        layout = str(tiles[0][3]) if tiles else ""
        shown = layout if layout in SCALED else image.mode
        has_indices = image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16")
        if image.format != "PNG" or not has_indices or layout in SCALED:
            raise SampleError(
                f"{member} is a {image.format} of mode {shown}; expected a PNG of 8 "
                "or 16 bits with one value per pixel, the class",
                Diagnosis.BAD_LABEL,
            )
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise SampleError(
                f"{member} cannot be decoded: {error}", Diagnosis.DAMAGED_IMAGE
            ) from error
    largest = 255 if image.mode in ("1", "L", "P") else 65535
    return np.asarray(image).astype(np.int32), largest


def _classes_of_instances(
    values: NDArray[np.int32], info: Any, labels: SegmentationLabels, name: str
) -> NDArray[np.int32]:
    boxes = info.get("boxes", [])
    if not isinstance(boxes, list) or not all(isinstance(box, dict) for box in boxes):
        raise SampleError(f"json.boxes is {repr(boxes)[:60]}; expected a list of objects")
    table = np.full(int(values.max()) + 1, labels.ignore_index, np.int32)
    table[0] = 0
    for place, box in enumerate(boxes):
        number, value = box.get("id"), box.get(name)
        if type(number) is not int or number < 1:
            raise SampleError(f"json.boxes[{place}].id is {number!r}; expected a number from 1")
        if number < len(table):
            table[number] = _class(value, labels, f"json.boxes[{place}].{name}")
    return table[values]


def _class(value: Any, labels: SegmentationLabels, where: str) -> int:
    if isinstance(value, str) and value in labels.names:
        return labels.names.index(value)
    if type(value) is int and 0 <= value < labels.num_classes - 1:
        return value + 1
    raise SampleError(
        f"{where} is {repr(value)[:60]}; expected one of {', '.join(labels.names) or 'the names'}, "
        f"or a number of 0 to {labels.num_classes - 2}",
        Diagnosis.BAD_LABEL,
    )
