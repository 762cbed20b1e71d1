"""LVIS v1 (Gupta et al. 2019): 1,203 classes with a long tail, on the pictures of COCO.

    ROOT/annotations/lvis_v1_train.json   ROOT/annotations/lvis_v1_val.json
    ROOT/train2017/000000391895.jpg       ROOT/val2017/000000000139.jpg

The files lie in ROOT or ROOT/annotations; a picture of either split in the folder that its
`coco_url` names. LVIS is a federation: of an image only some classes are known to be absent
(`neg_category_ids`), and some are not boxed in full (`not_exhaustive_category_ids`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from groundwork.data.annotations import Annotations
from groundwork.data.samples import Concept, Sample
from groundwork.data.sources.coco import check_splits, detection_sample, same_concepts
from groundwork.data.sources.coco_json import CocoFile, coco_images, read_coco, read_concepts
from groundwork.data.sources.image_files import EncodedImage, inside, read_image, url_tail
from groundwork.data.sources.json_files import JsonFile, is_encodable, member, require_files
from groundwork.data.sources.report import BadItemError, ImportReport

KIND: Final = "lvis"


@dataclass(frozen=True)
class LvisConfig:
    """Where the pictures of COCO and the files of LVIS lie. skip_bad: as in CocoConfig."""

    root: Path
    splits: tuple[str, ...] = ("train", "val")
    annotations: str = "lvis_v1_{split}.json"
    segmentations: bool = True
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_splits(type(self).__name__, self.splits)


def lvis_concepts(config: LvisConfig) -> list[Concept]:
    """The categories in the order of their ids, with synset, definition and frequency.

    frequency: "r", "c" or "f", by which the average precision of rare classes is told apart.
    """
    paths = [_annotation_file(config, split) for split in config.splits]
    return same_concepts({path: read_concepts(JsonFile(path), lvis_concept)[0] for path in paths})


def lvis_samples(
    config: LvisConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every picture with its boxes, and the classes known to be absent or boxed in part."""
    report = report or ImportReport()
    require_files(_annotation_file(config, split) for split in config.splits)

    def find(image: Mapping[str, Any]) -> EncodedImage:
        return read_image(inside(config.root, _file_name(image)))

    for split in config.splits:
        file = read_coco(
            _annotation_file(config, split),
            skip_bad=config.skip_bad,
            report=report,
            concept_of=lvis_concept,
            segmentations=config.segmentations,
        )
        for image, encoded, boxes in coco_images(
            file, find, skip_bad=config.skip_bad, report=report
        ):
            try:
                absent = _labels(file, image, "neg_category_ids")
                partial = _labels(file, image, "not_exhaustive_category_ids")
            except BadItemError as error:
                report.bad("image", file.where(image), str(error), skip=config.skip_bad)
                continue
            known = Annotations(
                width=encoded.width,
                height=encoded.height,
                boxes=tuple(boxes),
                has_boxes=True,
                absent_labels=absent,
                partial_labels=partial,
                source={"image_id": image["id"], "file_name": _file_name(image)},
            )
            yield split, detection_sample(PurePosixPath(_file_name(image)).name, encoded, known)


def lvis_concept(label: int, category: Mapping[str, Any]) -> Concept:
    """`aerosol_can` -> "aerosol can", its synonyms as aliases."""
    listed = category.get("synonyms")
    listed = listed if isinstance(listed, list) else []
    synonyms = [name for name in listed if isinstance(name, str) and is_encodable(name)]
    names = list(dict.fromkeys(_readable(name) for name in (category["name"], *synonyms)))
    info = {
        name: category[key]
        for name, key in (
            ("category_id", "id"),
            ("synset", "synset"),
            ("definition", "def"),
            ("frequency", "frequency"),
        )
        if key == "id" or (isinstance(category.get(key), str) and is_encodable(category[key]))
    }
    return Concept(label, names[0], tuple(names[1:]), info=info)


def _readable(name: str) -> str:
    return name.replace("_", " ").strip()


def _annotation_file(config: LvisConfig, split: str) -> Path:
    name = config.annotations.replace("{split}", split)
    beside = config.root / name
    return beside if beside.is_file() else config.root / "annotations" / name


def _file_name(image: Mapping[str, Any]) -> str:
    return url_tail(member(image, "coco_url", str))


def _labels(file: CocoFile, image: Mapping[str, Any], name: str) -> tuple[int, ...]:
    numbers = member(image, name, list) if name in image else []
    unknown = [n for n in numbers if type(n) is not int or n not in file.labels]
    if unknown:
        raise BadItemError(f"{name} has {unknown[:5]}, which are not in `categories`")
    return tuple(sorted(file.labels[number] for number in numbers))
