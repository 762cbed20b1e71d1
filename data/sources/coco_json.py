"""Detection annotations in COCO's JSON: `images`, `annotations`, `categories`.

What COCO, LVIS, Objects365 and SOBA have in common.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundwork.data.annotations import (
    AnnotationError,
    Box,
    Segmentation,
    Xyxy,
    box_area,
    clip_box,
    segmentation_from_json,
)
from groundwork.data.samples import Concept
from groundwork.data.sources.box_table import BoxTable, RawBox
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import EncodedImage
from groundwork.data.sources.json_files import JsonFile, is_encodable, member
from groundwork.data.sources.report import BadItemError, ImportReport
from groundwork.data.sources.upright import (
    annotated_as_stored,
    upright_box,
    upright_segmentation,
)


@dataclass(frozen=True)
class CocoFile:
    """A parsed annotation file.

    images: the records of `images`, in the order of the file. labels: category id -> class index.
    """

    path: Path
    images: tuple[Mapping[str, Any], ...]
    boxes: BoxTable
    labels: Mapping[int, int]
    concepts: tuple[Concept, ...] = field(repr=False)

    def where(self, image: Mapping[str, Any]) -> str:
        return f"{self.path}: image {image.get('id')!r}"


ConceptOf = Callable[[int, Mapping[str, Any]], Concept]


def named_concept(label: int, category: Mapping[str, Any]) -> Concept:
    """The class of a category that has an id, a name and perhaps a supercategory."""
    info = {"category_id": category["id"]}
    above = category.get("supercategory")
    if isinstance(above, str) and is_encodable(above):
        info["supercategory"] = above
    return Concept(label, category["name"], info=info)


def read_concepts(
    file: JsonFile, concept_of: ConceptOf = named_concept
) -> tuple[tuple[Concept, ...], dict[int, int]]:
    """The classes, labelled in the order of their ids, and category id -> label."""
    categories: dict[int, Mapping[str, Any]] = {}
    for where, category in file.records("categories"):
        try:
            number = member(category, "id", int)
            member(category, "name", str)
        except BadItemError as error:
            raise SourceError(f"{where}: {error}; fetch the file again") from error
        if number in categories:
            raise SourceError(f"{where}: category id {number} is there twice; remove one of them")
        categories[number] = category
    labels = {number: label for label, number in enumerate(sorted(categories))}
    return tuple(concept_of(labels[n], categories[n]) for n in sorted(categories)), labels


def read_coco(
    path: Path,
    *,
    skip_bad: bool,
    report: ImportReport,
    concept_of: ConceptOf = named_concept,
    more: tuple[str, ...] = (),
    segmentations: bool = True,
) -> CocoFile:
    """Read an annotation file and check what ids refer to.

    more: further members of an annotation to keep. segmentations: keep them. Raises SourceError for
    a file in another layout, and for double ids and ids that lead nowhere unless `skip_bad`.
    """
    file = JsonFile(path)
    concepts, labels = read_concepts(file, concept_of)
    images: dict[int, Mapping[str, Any]] = {}
    for where, image in file.records("images"):
        try:
            number = member(image, "id", int)
            if number in images:
                raise BadItemError(f"image id {number} is there twice")
            images[number] = image
        except BadItemError as error:
            report.bad("image", where, str(error), skip=skip_bad)
    boxes = BoxTable(keeps_more=segmentations or bool(more))
    for where, annotation in file.records("annotations"):
        try:
            box, image_id = _raw_box(annotation, more, segmentations)
            if image_id not in images:
                raise BadItemError(f"annotation {box.id}: image_id {image_id} is not in `images`")
            if box.category_id not in labels:
                raise BadItemError(
                    f"annotation {box.id}: category_id {box.category_id} is not in `categories` "
                    f"(ids {_some(labels)})"
                )
        except BadItemError as error:
            report.bad("box", where, str(error), skip=skip_bad)
            continue
        boxes.add(image_id, box)
    for image_id, number in boxes.drop_doubles():
        where = f"{path}: image {image_id}"
        report.bad("box", where, f"annotation id {number} is there twice", skip=skip_bad)
    return CocoFile(path, tuple(images.values()), boxes, labels, concepts)


def coco_boxes(
    file: CocoFile,
    image: Mapping[str, Any],
    encoded: EncodedImage,
    *,
    skip_bad: bool,
    report: ImportReport,
) -> list[Box]:
    """The boxes of one picture in pixels of the upright one, cut to it.

    Raises BadItemError where the picture is not the one that was annotated.
    """
    as_stored = is_stored_size(image, encoded)
    boxes = []
    for raw in file.boxes.of(image["id"]):
        try:
            boxes.append(_box(file, raw, encoded, as_stored, report))
        except BadItemError as error:
            where = f"{file.where(image)}: annotation {raw.id}"
            report.bad("box", where, str(error), skip=skip_bad)
    return boxes


def is_stored_size(image: Mapping[str, Any], encoded: EncodedImage) -> bool:
    """Whether the annotations are of the picture as it is stored, before it is turned upright."""
    if "width" not in image and "height" not in image:
        return False
    return annotated_as_stored(encoded, member(image, "width", int), member(image, "height", int))


def _raw_box(
    annotation: Mapping[str, Any], more: tuple[str, ...], segmentations: bool
) -> tuple[RawBox, int]:
    number = member(annotation, "id", int)
    try:
        bbox = member(annotation, "bbox", list)
        if len(bbox) != 4 or any(type(edge) not in (int, float) for edge in bbox):
            raise BadItemError(f"bbox is {bbox!r}; expected [left, top, width, height]")
        box = RawBox(
            id=number,
            category_id=member(annotation, "category_id", int),
            bbox=(float(bbox[0]), float(bbox[1]), float(bbox[2]), float(bbox[3])),
            area=float(annotation.get("area") or -1.0),
            crowd=bool(annotation.get("iscrowd", 0)),
            segmentation=annotation.get("segmentation") if segmentations else None,
            more={name: annotation[name] for name in more if name in annotation},
        )
        return box, member(annotation, "image_id", int)
    except (BadItemError, TypeError, ValueError, OverflowError) as error:
        raise BadItemError(f"annotation {number}: {error}") from error


def _box(
    file: CocoFile, raw: RawBox, encoded: EncodedImage, as_stored: bool, report: ImportReport
) -> Box:
    left, top, width, height = raw.bbox
    xyxy: Xyxy = (left, top, left + width, top + height)
    stored = encoded.stored_size
    segmentation = _segmentation(raw.segmentation, stored if as_stored else None, encoded, report)
    if as_stored:
        xyxy = upright_box(xyxy, encoded.orientation, stored)
        report.mended["boxes turned upright"] += 1
        if segmentation is not None:
            segmentation = upright_segmentation(segmentation, encoded.orientation, stored)
    clipped = clip_box(xyxy, encoded.width, encoded.height)
    if clipped is None or width <= 0 or height <= 0:
        raise BadItemError(
            f"bbox {list(raw.bbox)} has no area inside of the picture of {encoded.width} x "
            f"{encoded.height} pixels"
        )
    if clipped != xyxy:
        report.mended["boxes cut to their picture"] += 1
    label = file.labels[raw.category_id]
    pair = raw.more.get("association")
    return Box(
        xyxy=clipped,
        label=label,
        category=file.concepts[label].name,
        crowd=raw.crowd,
        area=raw.area if 0 < raw.area <= encoded.width * encoded.height else box_area(clipped),
        segmentation=segmentation,
        pair=pair if type(pair) is int else None,
        id=raw.id,
    )


def _segmentation(
    value: Any, stored: tuple[int, int] | None, encoded: EncodedImage, report: ImportReport
) -> Segmentation | None:
    """What can be used of a segmentation. COCO and LVIS have polygons of two points, or none."""
    width, height = stored or (encoded.width, encoded.height)
    if isinstance(value, list):
        usable = [p for p in value if isinstance(p, list) and len(p) >= 6]
        if len(usable) < len(value):
            report.mended["polygons of fewer than three points left out"] += 1
        value = usable
    if not value:
        return None
    try:
        return segmentation_from_json(value, "segmentation", width, height)
    except AnnotationError as error:
        raise BadItemError(str(error)) from error


def _some(labels: Mapping[int, int]) -> str:
    listed = sorted(labels)
    return ", ".join(map(str, listed[:5])) + (f" ... {listed[-1]}" if len(listed) > 5 else "")


def coco_images(
    file: CocoFile,
    find: Callable[[Mapping[str, Any]], EncodedImage],
    *,
    skip_bad: bool,
    report: ImportReport,
) -> Iterator[tuple[Mapping[str, Any], EncodedImage, list[Box]]]:
    """Every picture of a file with its boxes, read one at a time, in the order of the file."""
    for image in file.images:
        try:
            encoded = find(image)
            boxes = coco_boxes(file, image, encoded, skip_bad=skip_bad, report=report)
        except BadItemError as error:
            report.bad("image", file.where(image), str(error), skip=skip_bad)
            continue
        yield image, encoded, boxes
