"""What `Sample.info` says of a picture or clip: classes, captions, boxes, questions.

    {"width": 640, "height": 480, "label": 3, "captions": ["..."], "source": {...},
     "boxes": [{"xyxy": [x0, y0, x1, y1], "label": 0, "category": "cat", "crowd": false,
                "area": 1234.5, "segmentation": [[x, y, ...], ...] or {"size": [h, w],
                "counts": ...}, "spans": [[begin, end], ...], "pair": 1, "id": 17}],
     "qa": [{"question": "...", "answers": ["...", ...], "id": 5, "type": "other"}]}

Every part may be missing. Coordinates are pixels of the upright picture, as `decode_image` shows
it: x to the right, y down, (0, 0) the outer corner of the first pixel, so that the whole picture is
[0, 0, width, height]. A label is an index into the data set's `concepts.json`, or null. Spans are
ranges of characters of `Sample.text`. Other fields are left alone: sources may add their own.

Further members of a sample, by extension: `depth.png` (16 bits, millimetres, unless `depth` says
otherwise), `instances.png` (16 bits, the number of the instance, 0 for none), `shadows.png`,
`mask.png`, and `mp4` for a clip, which has no still picture but `fps`, `frames`, `begin_s` and
`end_s`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from groundwork.data.samples import MAX_LABEL, NO_CLASS, SampleError

Xyxy = tuple[float, float, float, float]
Identifier = int | str

#: Pixels by which a box may leave its picture: what a round trip through JSON may cost.
TOLERANCE = 1e-3
#: Characters of COCO's compressed run lengths.
RLE_CHARACTERS = frozenset(map(chr, range(48, 112)))


class AnnotationError(SampleError):
    """An annotation that cannot be used; the message names its place and what is wrong."""


@dataclass(frozen=True, slots=True)
class Rle:
    """A mask as COCO's run lengths, column by column.

    size: (height, width). counts: lengths of the runs, beginning with background, or COCO's
    compressed form of them.
    """

    size: tuple[int, int]
    counts: str | tuple[int, ...]


#: Each polygon is x, y, x, y, ...; the mask is their union.
Polygons = tuple[tuple[float, ...], ...]
Segmentation = Polygons | Rle


@dataclass(frozen=True, slots=True)
class Box:
    """One object.

    xyxy: left, top, right, bottom edge. area: of the object where a mask tells it, else of the box.
    crowd: a group whose members are not told apart. spans: what the text calls it. pair: number
    shared by an object and its shadow.
    """

    xyxy: Xyxy
    label: int | None = None
    category: str = ""
    crowd: bool = False
    area: float = -1.0
    segmentation: Segmentation | None = None
    spans: tuple[tuple[int, int], ...] = ()
    pair: int | None = None
    id: Identifier | None = None

    def __post_init__(self) -> None:
        if self.area < 0:
            object.__setattr__(self, "area", box_area(self.xyxy))


@dataclass(frozen=True, slots=True)
class Question:
    """A question about the picture, and its answers: none in a test split, ten in VQA v2.

    type: of the answer, by which accuracies are told apart ("yes/no", "number", "other").
    """

    question: str
    answers: tuple[str, ...] = ()
    id: Identifier | None = None
    type: str = ""


@dataclass(frozen=True, slots=True)
class Depth:
    """What the values of `depth.png` mean, where they are not millimetres.

    unit: "relative" where only their order counts. near: whether near things are dark, as where
    the values are distances, or bright.
    """

    unit: Literal["mm", "relative"] = "mm"
    near: Literal["dark", "bright"] = "dark"


@dataclass(frozen=True, slots=True)
class Annotations:
    """All that a source knows of one sample.

    absent_labels: classes that are certainly not in the picture; partial_labels: classes of which
    not every object has a box (both from LVIS, whose other absent classes are merely unknown).
    has_boxes: True where boxes were looked for, so that a picture without any is a negative.
    source: ids and file names of the raw data.
    """

    width: int | None = None
    height: int | None = None
    label: int | None = None
    captions: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    has_boxes: bool = False
    absent_labels: tuple[int, ...] = ()
    partial_labels: tuple[int, ...] = ()
    qa: tuple[Question, ...] = ()
    depth: Depth | None = None
    fps: float | None = None
    frames: int | None = None
    begin_s: float | None = None
    end_s: float | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    def to_info(self) -> dict[str, Any]:
        """As `Sample.info` holds it; what is not known is left out."""
        info: dict[str, Any] = {}
        for name in ("width", "height", "label", "fps", "frames", "begin_s", "end_s"):
            if (value := getattr(self, name)) is not None:
                info[name] = value
        if self.boxes or self.has_boxes:
            info["boxes"] = [_box_json(box) for box in self.boxes]
        for name in ("captions", "absent_labels", "partial_labels"):
            if value := getattr(self, name):
                info[name] = list(value)
        if self.qa:
            info["qa"] = [
                {"question": q.question, "answers": list(q.answers)}
                | ({} if q.id is None else {"id": q.id})
                | ({"type": q.type} if q.type else {})
                for q in self.qa
            ]
        if self.depth is not None:
            info["depth"] = {"unit": self.depth.unit, "near": self.depth.near}
        if self.source:
            info["source"] = dict(self.source)
        return info


def annotations_from_info(info: Mapping[str, Any], text: str | None = None) -> Annotations:
    """Read and check `Sample.info`; fields it does not know are passed over.

    text: the text of the sample, against which the spans are checked; None leaves that out.
    Raises AnnotationError that names the field.
    """
    width, height = _positive(info, "width"), _positive(info, "height")
    if (width is None) != (height is None):
        raise AnnotationError("has one of json.width and json.height; give both")
    records = _list(info, "boxes")
    if records and (width is None or height is None):
        raise AnnotationError("has json.boxes, but neither json.width nor json.height")
    boxes = tuple(
        _box(record, f"json.boxes[{number}]", width or 0, height or 0, text)
        for number, record in enumerate(records)
    )
    label = info.get("label")
    if label is not None and (type(label) is not int or not NO_CLASS <= label <= MAX_LABEL):
        raise _wrong("json.label", label, f"a class index, or {NO_CLASS} for none")
    source = info.get("source", {})
    if not isinstance(source, dict):
        raise _wrong("json.source", source, "an object")
    return Annotations(
        width=width,
        height=height,
        label=None if label == NO_CLASS else label,
        captions=_strings(info.get("captions", []), "json.captions"),
        boxes=boxes,
        has_boxes="boxes" in info,
        absent_labels=_labels(info, "absent_labels"),
        partial_labels=_labels(info, "partial_labels"),
        qa=tuple(_question(q, f"json.qa[{n}]") for n, q in enumerate(_list(info, "qa"))),
        depth=_depth(info.get("depth")),
        fps=_seconds(info, "fps"),
        frames=_positive(info, "frames"),
        begin_s=_seconds(info, "begin_s"),
        end_s=_seconds(info, "end_s"),
        source=source,
    )


def box_area(xyxy: Xyxy) -> float:
    return (xyxy[2] - xyxy[0]) * (xyxy[3] - xyxy[1])


def clip_box(xyxy: Xyxy, width: int, height: int) -> Xyxy | None:
    """The part of a box inside the picture; None where nothing of it is, or it has no area."""
    if not all(math.isfinite(edge) for edge in xyxy):
        return None
    x0, y0, x1, y1 = xyxy
    clipped = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    return clipped if clipped[0] < clipped[2] and clipped[1] < clipped[3] else None


def segmentation_mask(segmentation: Segmentation, height: int, width: int) -> NDArray[np.bool_]:
    """Draw a segmentation as COCO's own tools do. -> (height, width)."""
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ImportError(
            "masks of polygons and run lengths need pycocotools: "
            "pip install 'groundwork-pretrain[annotations]'"
        ) from error
    if isinstance(segmentation, Rle):
        rle: Any = {"size": list(segmentation.size), "counts": segmentation.counts}
        if not isinstance(segmentation.counts, str):
            rle["counts"] = list(segmentation.counts)
            rle = coco_mask.frPyObjects(rle, height, width)
    else:
        parts = coco_mask.frPyObjects([list(p) for p in segmentation], height, width)
        rle = coco_mask.merge(parts)
    mask: NDArray[np.bool_] = coco_mask.decode(rle).astype(bool)
    return mask


def segmentation_from_json(value: Any, where: str, width: int, height: int) -> Segmentation:
    """Polygons or run lengths as COCO writes them. Raises AnnotationError beginning with `where`.

    Compressed run lengths are checked for their characters only; decoding shows the rest.
    """
    if isinstance(value, dict):
        if value.get("size") != [height, width]:
            raise _wrong(f"{where}.size", value.get("size"), f"[{height}, {width}], the picture's")
        counts = value.get("counts")
        if isinstance(counts, str) and counts and RLE_CHARACTERS.issuperset(counts):
            return Rle((height, width), counts)
        if not isinstance(counts, list) or any(type(n) is not int or n < 0 for n in counts):
            raise _wrong(f"{where}.counts", counts, "lengths of runs, or COCO's string of them")
        if sum(counts) != height * width:
            raise AnnotationError(
                f"{where}.counts add up to {sum(counts)}; the picture has {height * width} pixels"
            )
        return Rle((height, width), tuple(counts))
    if not isinstance(value, list) or not value:
        raise _wrong(where, value, "polygons, or an object with `size` and `counts`")
    for polygon in value:
        is_numbers = isinstance(polygon, list) and all(_is_number(edge) for edge in polygon)
        if not is_numbers or len(polygon) % 2 or len(polygon) < 6:
            raise _wrong(where, polygon, "polygons of at least three points: x, y, x, y, ...")
    return tuple(tuple(map(float, polygon)) for polygon in value)


def _box_json(box: Box) -> dict[str, Any]:
    record: dict[str, Any] = {
        "xyxy": list(box.xyxy),
        "label": box.label,
        "category": box.category,
        "crowd": box.crowd,
        "area": box.area,
    }
    if isinstance(box.segmentation, Rle):
        counts = box.segmentation.counts
        record["segmentation"] = {
            "size": list(box.segmentation.size),
            "counts": counts if isinstance(counts, str) else list(counts),
        }
    elif box.segmentation is not None:
        record["segmentation"] = [list(polygon) for polygon in box.segmentation]
    if box.spans:
        record["spans"] = [list(span) for span in box.spans]
    if box.pair is not None:
        record["pair"] = box.pair
    if box.id is not None:
        record["id"] = box.id
    return record


def _box(record: Any, where: str, width: int, height: int, text: str | None) -> Box:
    if not isinstance(record, dict):
        raise _wrong(where, record, "an object")
    xyxy = record.get("xyxy")
    if not isinstance(xyxy, list) or len(xyxy) != 4 or not all(map(_is_number, xyxy)):
        raise _wrong(f"{where}.xyxy", xyxy, "[left, top, right, bottom]")
    x0, y0, x1, y1 = map(float, xyxy)
    is_inside = min(x0, y0) >= -TOLERANCE and x1 <= width + TOLERANCE and y1 <= height + TOLERANCE
    if not (x0 < x1 and y0 < y1 and is_inside):
        raise _wrong(f"{where}.xyxy", xyxy, f"edges in order, inside of {width} x {height} pixels")
    label, area = record.get("label"), record.get("area", -1.0)
    if label is not None and (type(label) is not int or not 0 <= label <= MAX_LABEL):
        raise _wrong(f"{where}.label", label, "an index into the concepts, or null")
    if not _is_number(area):
        raise _wrong(f"{where}.area", area, "a number of pixels")
    category, crowd, pair = record.get("category", ""), record.get("crowd", False), None
    if not isinstance(category, str):
        raise _wrong(f"{where}.category", category, "a string")
    if not isinstance(crowd, bool):
        raise _wrong(f"{where}.crowd", crowd, "true or false")
    if (pair := record.get("pair")) is not None and type(pair) is not int:
        raise _wrong(f"{where}.pair", pair, "a number")
    segmentation = record.get("segmentation")
    if segmentation is not None:
        segmentation = segmentation_from_json(segmentation, f"{where}.segmentation", width, height)
    spans = tuple(_span(span, f"{where}.spans", text) for span in _list(record, "spans", where))
    return Box(
        xyxy=(x0, y0, x1, y1),
        label=label,
        category=category,
        crowd=crowd,
        area=float(area),
        segmentation=segmentation,
        spans=spans,
        pair=pair,
        id=_identifier(record, where),
    )


def _span(span: Any, where: str, text: str | None) -> tuple[int, int]:
    is_pair = isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)
    if not is_pair or not 0 <= span[0] < span[1]:
        raise _wrong(where, span, "[begin, end], begin before end")
    if text is not None and span[1] > len(text):
        raise _wrong(where, span, f"a range of the text, which has {len(text)} characters")
    return span[0], span[1]


def _question(record: Any, where: str) -> Question:
    if not isinstance(record, dict):
        raise _wrong(where, record, "an object")
    question = record.get("question")
    if not isinstance(question, str) or not question:
        raise _wrong(f"{where}.question", question, "a question")
    answers = _strings(record.get("answers", []), f"{where}.answers")
    kind = record.get("type", "")
    if not isinstance(kind, str):
        raise _wrong(f"{where}.type", kind, "a string")
    return Question(question, answers, _identifier(record, where), kind)


def _depth(record: Any) -> Depth | None:
    if record is None:
        return None
    unit, near = (record.get(n) if isinstance(record, dict) else None for n in ("unit", "near"))
    if unit not in ("mm", "relative") or near not in ("dark", "bright"):
        raise _wrong("json.depth", record, "a unit, mm or relative, and near, dark or bright")
    return Depth(unit, near)


def _identifier(record: Mapping[str, Any], where: str) -> Identifier | None:
    value = record.get("id")
    if value is not None and type(value) not in (int, str):
        raise _wrong(f"{where}.id", value, "a number or a string")
    return value


def _labels(info: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = _list(info, name)
    if any(type(value) is not int or value < 0 for value in values):
        raise _wrong(f"json.{name}", values, "class indices")
    return tuple(values)


def _list(record: Mapping[str, Any], name: str, where: str = "json") -> Sequence[Any]:
    values = record.get(name, [])
    if not isinstance(values, list):
        raise _wrong(f"{where}.{name}", values, "a list")
    return values


def _strings(values: Any, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _wrong(where, values, "a list of strings")
    return tuple(values)


def _positive(info: Mapping[str, Any], name: str) -> int | None:
    value = info.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise _wrong(f"json.{name}", value, "a positive number")
    return value


def _seconds(info: Mapping[str, Any], name: str) -> float | None:
    value = info.get(name)
    if value is not None and (not _is_number(value) or value < 0):
        raise _wrong(f"json.{name}", value, "a number, 0 or more")
    return value


def _is_number(value: Any) -> bool:
    # a comparison also refuses NaN and integers beyond what a float can hold
    return type(value) in (int, float) and -1e300 < value < 1e300


def _wrong(where: str, value: Any, expected: str) -> AnnotationError:
    return AnnotationError(f"{where} is {repr(value)[:80]}; expected {expected}")
