"""Grounding data in the format of MDETR (Kamath et al. 2021): GoldG, which GLIP trains on.

    ROOT/final_flickr_separateGT_train.json   pictures of Flickr30k
    ROOT/final_mixed_train_no_coco.json       Visual Genome and GQA

COCO's layout with a caption in each record of `images`, and `tokens_positive`, ranges of
characters of that caption, in each annotation. There are several records, each with a caption of
its own, of the same picture; each gives a sample. Pictures are looked for in the folders `images`,
in their order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from groundwork.data.annotations import Annotations, Box
from groundwork.data.samples import Sample
from groundwork.data.sources.box_table import RawBox
from groundwork.data.sources.coco_json import coco_images, read_coco
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import EncodedImage, find_inside, read_image
from groundwork.data.sources.json_files import known_members, member, require_files
from groundwork.data.sources.keys import sample_key
from groundwork.data.sources.report import BadItemError, ImportReport

KIND: Final = "mdetr"


@dataclass(frozen=True)
class MdetrConfig:
    """Annotation files by split, and the folders of their pictures."""

    annotations: Mapping[str, Path]
    images: tuple[Path, ...]
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if not self.annotations or not self.images:
            raise SourceError("MdetrConfig: give an annotation file and a folder of pictures")


def mdetr_samples(
    config: MdetrConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every caption with its picture and grounded boxes, in the order of the files."""
    report = report or ImportReport()
    require_files(config.annotations.values())

    def find(image: Mapping[str, Any]) -> EncodedImage:
        return read_image(find_inside(config.images, member(image, "file_name", str)))

    for split, path in config.annotations.items():
        file = read_coco(
            path,
            skip_bad=config.skip_bad,
            report=report,
            more=("tokens_positive",),
            segmentations=False,
        )
        for image, encoded, boxes in coco_images(
            file, find, skip_bad=config.skip_bad, report=report
        ):
            raw = {one.id: one for one in file.boxes.of(image["id"])}
            try:
                caption = member(image, "caption", str)
                grounded = tuple(_grounded(box, raw, caption) for box in boxes)
            except BadItemError as error:
                report.bad("image", file.where(image), str(error), skip=config.skip_bad)
                continue
            names = ("file_name", "dataset_name", "data_source", "original_img_id", "sentence_id")
            known = Annotations(
                width=encoded.width,
                height=encoded.height,
                boxes=grounded,
                has_boxes=True,
                source={"image_id": image["id"], **known_members(image, names)},
            )
            key = sample_key(f"{Path(image['file_name']).stem}_{image['id']}")
            yield split, Sample(key, encoded.data, encoded.format, caption, known.to_info())


def _grounded(box: Box, raw: Mapping[Any, RawBox], caption: str) -> Box:
    """The box with its spans, without a class: the only category of these files means nothing."""
    spans = raw[box.id].more.get("tokens_positive", [])
    for span in spans if isinstance(spans, list) else [spans]:
        is_range = isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
        if not is_range or not 0 <= span[0] < span[1] <= len(caption):
            raise BadItemError(
                f"annotation {box.id}: tokens_positive has {span!r}; expected [begin, end] in the "
                f"caption of {len(caption)} characters"
            )
    phrases = [caption[begin:end] for begin, end in spans]
    return Box(
        xyxy=box.xyxy,
        category=" ".join(phrases),
        crowd=box.crowd,
        area=box.area,
        spans=tuple((begin, end) for begin, end in spans),
        id=box.id,
    )
