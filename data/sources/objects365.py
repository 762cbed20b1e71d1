"""Objects365 v2 (Shao et al. 2019): 365 classes, 1.7 million pictures.

    ROOT/annotations/zhiyuan_objv2_train.json      or ROOT/zhiyuan_objv2_train.json
    ROOT/train/patch0/objects365_v1_00420917.jpg   or below ROOT/images/train, or ROOT/images

Annotations name a picture `images/v1/patch8/objects365_v1_00420917.jpg`; only patch and name are
found on disk. Three pictures of the training split were never published: use `skip_bad`. The
training file has several gigabytes, and is read record by record.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from groundwork.data.annotations import Annotations
from groundwork.data.samples import Concept, Sample
from groundwork.data.sources.coco import check_splits, detection_sample, same_concepts
from groundwork.data.sources.coco_json import coco_images, read_coco, read_concepts
from groundwork.data.sources.image_files import EncodedImage, find_inside, read_image
from groundwork.data.sources.json_files import JsonFile, member, require_files
from groundwork.data.sources.report import ImportReport

KIND: Final = "objects365"


@dataclass(frozen=True)
class Objects365Config:
    """Where the patches and the annotations lie. skip_bad: as in CocoConfig."""

    root: Path
    splits: tuple[str, ...] = ("train", "val")
    annotations: str = "zhiyuan_objv2_{split}.json"
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_splits(type(self).__name__, self.splits)


def objects365_concepts(config: Objects365Config) -> list[Concept]:
    """The 365 categories in the order of their ids."""
    paths = [_annotation_file(config, split) for split in config.splits]
    return same_concepts({path: read_concepts(JsonFile(path))[0] for path in paths})


def objects365_samples(
    config: Objects365Config, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every picture with its boxes, in the order of the files."""
    report = report or ImportReport()
    require_files(_annotation_file(config, split) for split in config.splits)
    for split in config.splits:
        file = read_coco(
            _annotation_file(config, split),
            skip_bad=config.skip_bad,
            report=report,
            segmentations=False,
        )
        root = config.root
        roots = (root / split, root / "images" / split, root / "images", root)

        def find(image: Mapping[str, Any], roots: tuple[Path, ...] = roots) -> EncodedImage:
            name = PurePosixPath(member(image, "file_name", str))
            return read_image(find_inside(roots, "/".join(name.parts[-2:])))

        for image, encoded, boxes in coco_images(
            file, find, skip_bad=config.skip_bad, report=report
        ):
            known = Annotations(
                width=encoded.width,
                height=encoded.height,
                boxes=tuple(boxes),
                has_boxes=True,
                source={"image_id": image["id"], "file_name": image["file_name"]},
            )
            yield split, detection_sample(PurePosixPath(image["file_name"]).name, encoded, known)


def _annotation_file(config: Objects365Config, split: str) -> Path:
    name = config.annotations.replace("{split}", split)
    beside = config.root / name
    return beside if beside.is_file() else config.root / "annotations" / name
