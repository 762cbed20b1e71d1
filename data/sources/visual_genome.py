"""Visual Genome (Krishna et al. 2016): phrases or names for regions of 108,077 pictures.

    ROOT/image_data.json            size, url, coco_id of each picture
    ROOT/region_descriptions.json   for each picture a list of regions, each with a phrase
    ROOT/objects.json               for each picture a list of objects, each with names
    ROOT/VG_100K/2.jpg              ROOT/VG_100K_2/1.jpg, as the url ends; or below ROOT/images

With `annotate="regions"` the text of a sample is the phrases of its regions, one on each line, and
each box has the span of its phrase. With "objects" the boxes have a free name as `category`.
The publisher names no splits; `val_fraction` sets some pictures apart. Half of the pictures are
also in COCO: `without_coco` leaves those out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from groundwork.data.annotations import Annotations, Box, Xyxy, clip_box
from groundwork.data.samples import Sample
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import EncodedImage, find_inside, read_image, url_tail
from groundwork.data.sources.json_files import JsonFile, is_encodable, known_members, member
from groundwork.data.sources.keys import hash_fraction, sample_key
from groundwork.data.sources.report import BadItemError, ImportReport
from groundwork.data.sources.upright import annotated_as_stored, upright_box

KIND: Final = "visual_genome"


@dataclass(frozen=True)
class VisualGenomeConfig:
    """Which annotations of which pictures. without_coco: leave out pictures that COCO has, too."""

    root: Path
    annotate: Literal["regions", "objects"] = "regions"
    val_fraction: float = 0.0
    seed: int = 0
    without_coco: bool = False
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.annotate not in ("regions", "objects"):
            raise SourceError(
                f"VisualGenomeConfig: annotate is {self.annotate!r}; choose 'regions' or 'objects'"
            )
        if not 0 <= self.val_fraction < 1:
            raise SourceError(
                f"VisualGenomeConfig: val_fraction is {self.val_fraction}; give a number in [0, 1)"
            )


def visual_genome_samples(
    config: VisualGenomeConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every picture with its regions or objects, in the order of the annotation file."""
    report = report or ImportReport()
    pictures = _pictures(config, report)
    is_regions = config.annotate == "regions"
    name = "region_descriptions.json" if is_regions else "objects.json"
    seen: set[int] = set()
    for where, record in JsonFile(config.root / name).records():
        try:
            number = member(record, "id" if "id" in record else "image_id", int)
            where = f"{config.root / name}: image {number}"
            if number in seen:
                raise BadItemError("is there twice")
            seen.add(number)
            if number not in pictures:
                raise BadItemError("is not in image_data.json")
            picture = pictures[number]
            if config.without_coco and picture.get("coco_id") is not None:
                report.mended["pictures of COCO left out"] += 1
                continue
            name = url_tail(member(picture, "url", str))
            encoded = read_image(find_inside((config.root, config.root / "images"), name))
            as_stored = annotated_as_stored(
                encoded, member(picture, "width", int), member(picture, "height", int)
            )
            entries = member(record, "regions" if is_regions else "objects", list)
        except BadItemError as error:
            report.bad("image", where, str(error), skip=config.skip_bad)
            continue
        text, boxes = "", []
        for entry in entries:
            try:
                phrase = _phrase(entry, is_regions)
                identifier = member(entry, "region_id" if is_regions else "object_id", int)
                xyxy = _xyxy(entry, encoded, as_stored, report)
            except BadItemError as error:
                report.bad("box", where, str(error), skip=config.skip_bad)
                continue
            spans: tuple[tuple[int, int], ...] = ()
            if is_regions:
                text += "\n" if text else ""
                spans = ((len(text), len(text) + len(phrase)),)
                text += phrase
            category = "" if is_regions else phrase
            boxes.append(Box(xyxy, category=category, spans=spans, id=identifier))
        known = Annotations(
            width=encoded.width,
            height=encoded.height,
            boxes=tuple(boxes),
            has_boxes=True,
            source={"image_id": number, **known_members(picture, ["coco_id"])},
        )
        is_val = hash_fraction(config.seed, str(number)) < config.val_fraction
        sample = Sample(
            sample_key(str(number)), encoded.data, encoded.format, text, known.to_info()
        )
        yield "val" if is_val else "train", sample


def _pictures(config: VisualGenomeConfig, report: ImportReport) -> dict[int, Mapping[str, Any]]:
    pictures = {}
    for where, record in JsonFile(config.root / "image_data.json").records():
        try:
            number = member(record, "image_id", int)
            if number in pictures:
                raise BadItemError(f"image_id {number} is there twice")
            pictures[number] = record
        except BadItemError as error:
            report.bad("image", where, str(error), skip=config.skip_bad)
    return pictures


def _phrase(entry: Any, is_region: bool) -> str:
    """The phrase of a region, on one line, or the first name of an object."""
    if not isinstance(entry, dict):
        raise BadItemError(f"an entry is {repr(entry)[:60]}; expected an object")
    if is_region:
        phrase = " ".join(member(entry, "phrase", str).split())
    else:
        names = member(entry, "names", list)
        is_name = bool(names) and isinstance(names[0], str) and is_encodable(names[0])
        phrase = names[0].strip() if is_name else ""
    if not phrase:
        number = entry.get("region_id" if is_region else "object_id")
        raise BadItemError(f"entry {number} has neither a phrase nor a name")
    return phrase


def _xyxy(
    entry: Mapping[str, Any], encoded: EncodedImage, as_stored: bool, report: ImportReport
) -> Xyxy:
    # regions have width and height, objects w and h
    width = member(entry, "width" if "width" in entry else "w", float)
    height = member(entry, "height" if "height" in entry else "h", float)
    left, top = member(entry, "x", float), member(entry, "y", float)
    xyxy: Xyxy = (left, top, left + width, top + height)
    if as_stored:
        xyxy = upright_box(xyxy, encoded.orientation, encoded.stored_size)
    clipped = clip_box(xyxy, encoded.width, encoded.height)
    if clipped is None or width <= 0 or height <= 0:
        raise BadItemError(
            f"entry {entry.get('region_id', entry.get('object_id'))}: x {left}, y {top}, width "
            f"{width}, height {height} has no area inside of the picture of {encoded.width} x "
            f"{encoded.height} pixels"
        )
    if clipped != xyxy:
        report.mended["boxes cut to their picture"] += 1
    return clipped
