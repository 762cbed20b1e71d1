"""COCO detection (Lin et al. 2014), and every data set in its format.

    ROOT/annotations/instances_train2017.json   ROOT/annotations/instances_val2017.json
    ROOT/train2017/000000000009.jpg             ROOT/val2017/000000000139.jpg

Other data sets in this format differ in file names only, which `annotations` and `images` give:
`{split}/_annotations.coco.json` and `{split}`, for example.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from groundwork.data.annotations import Annotations
from groundwork.data.samples import Concept, Sample
from groundwork.data.sources.coco_json import coco_images, read_coco, read_concepts
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import EncodedImage, inside, read_image
from groundwork.data.sources.json_files import JsonFile, member, require_files
from groundwork.data.sources.keys import sample_key
from groundwork.data.sources.report import ImportReport

KIND: Final = "coco"


@dataclass(frozen=True)
class CocoConfig:
    """Where the pictures and their boxes lie.

    annotations, images: file and folder of a split below `root`; `{split}` stands for its name.
    segmentations: keep polygons and run lengths. skip_bad: pass over bad pictures and boxes and
    count them, instead of stopping at the first.
    """

    root: Path
    splits: tuple[str, ...] = ("train", "val")
    annotations: str = "annotations/instances_{split}2017.json"
    images: str = "{split}2017"
    segmentations: bool = True
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_splits(type(self).__name__, self.splits)


def coco_concepts(config: CocoConfig) -> list[Concept]:
    """The categories, labelled in the order of their ids: 0 to 79 for COCO's ids 1 to 90."""
    paths = _annotation_files(config)
    return same_concepts({path: read_concepts(JsonFile(path))[0] for path in paths})


def coco_samples(
    config: CocoConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every picture with its boxes, in the order of the files; pictures without boxes too."""
    report = report or ImportReport()
    require_files(_annotation_files(config))
    for split, path in zip(config.splits, _annotation_files(config), strict=True):
        file = read_coco(
            path,
            skip_bad=config.skip_bad,
            report=report,
            segmentations=config.segmentations,
        )
        folder = config.root / config.images.replace("{split}", split)

        def find(image: Mapping[str, Any], folder: Path = folder) -> EncodedImage:
            return read_image(inside(folder, member(image, "file_name", str)))

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
            yield split, detection_sample(image["file_name"], encoded, known)


def detection_sample(name: str, encoded: EncodedImage, known: Annotations) -> Sample:
    """A sample named for its file, without a text: which classes to name is the objective's."""
    return Sample(
        key=sample_key(str(PurePosixPath(name).with_suffix(""))),
        image=encoded.data,
        image_format=encoded.format,
        text="",
        info=known.to_info(),
    )


def same_concepts(by_file: Mapping[Path, Sequence[Concept]]) -> list[Concept]:
    """The classes that all files agree upon. Raises SourceError naming those that do not."""
    (first, concepts), *others = by_file.items()
    for path, listed in others:
        names, other_names = [c.name for c in concepts], [c.name for c in listed]
        if names != other_names:
            different = sorted(set(names) ^ set(other_names)) or ["their order"]
            raise SourceError(
                f"{path} and {first} have different categories ({', '.join(different[:5])}); build "
                "the splits as data sets of their own"
            )
    return list(concepts)


def _annotation_files(config: CocoConfig) -> list[Path]:
    return [config.root / config.annotations.replace("{split}", split) for split in config.splits]


def check_splits(name: str, splits: tuple[str, ...]) -> None:
    if not splits or len(set(splits)) != len(splits):
        raise SourceError(f"{name}: splits is {splits!r}; name at least one, and each once")
