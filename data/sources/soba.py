"""SOBA (Wang et al. 2020, 2021): objects, their shadows, and which belong together.

    ROOT/SOBA_train_relation_v2.json   ROOT/SOBA_val_v2.json   ROOT/SOBA_challenge_v2.json
    ROOT/images/...                    or below ROOT itself, as `file_name` says

The files lie in ROOT or ROOT/annotations: COCO's layout with categories 1 (Object) and 2 (Shadow),
a pair number `association` in each annotation, and a list `association_anno` of the pairs. Boxes
come objects first, then shadows, both in the order of their pairs, as training and metric need it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from groundwork.data.annotations import Annotations, Box
from groundwork.data.samples import Concept, Sample
from groundwork.data.sources.coco import check_splits, detection_sample
from groundwork.data.sources.coco_json import coco_images, read_coco
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import EncodedImage, find_inside, read_image
from groundwork.data.sources.json_files import JsonFile, member, require_files
from groundwork.data.sources.report import BadItemError, ImportReport

KIND: Final = "soba"

FILES: Final = {
    "train": "SOBA_train_relation_v2.json",
    "val": "SOBA_val_v2.json",
    "challenge": "SOBA_challenge_v2.json",
}
OBJECT, SHADOW = 0, 1


@dataclass(frozen=True)
class SobaConfig:
    """Where the pictures and annotations lie."""

    root: Path
    splits: tuple[str, ...] = ("train", "val")
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_splits(type(self).__name__, self.splits)
        if unknown := set(self.splits) - set(FILES):
            raise SourceError(
                f"SobaConfig: no split {min(unknown)!r}; choose from {', '.join(FILES)}"
            )


def soba_concepts(config: SobaConfig) -> list[Concept]:
    """Label 0 is an object, 1 a shadow."""
    return [Concept(OBJECT, "object"), Concept(SHADOW, "shadow")]


def soba_samples(
    config: SobaConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every picture with its pairs, in the order of the files."""
    report = report or ImportReport()
    require_files(_annotation_file(config.root, split) for split in config.splits)
    for split in config.splits:
        path = _annotation_file(config.root, split)
        file = read_coco(path, skip_bad=config.skip_bad, report=report, more=("association",))
        if len(file.concepts) != 2:
            raise SourceError(
                f"{path}: has {len(file.concepts)} categories; expected Object and Shadow"
            )
        pairs = _pairs(path)
        roots = (config.root / "images", config.root, config.root / "images" / split)

        def find(image: Mapping[str, Any], roots: tuple[Path, ...] = roots) -> EncodedImage:
            return read_image(find_inside(roots, member(image, "file_name", str)))

        for image, encoded, boxes in coco_images(
            file, find, skip_bad=config.skip_bad, report=report
        ):
            try:
                paired = paired_boxes(boxes, pairs[image["id"]] if pairs else None)
            except BadItemError as error:
                report.bad("image", file.where(image), str(error), skip=config.skip_bad)
                continue
            known = Annotations(
                width=encoded.width,
                height=encoded.height,
                boxes=tuple(paired),
                has_boxes=True,
                source={"image_id": image["id"], "file_name": image["file_name"]},
            )
            yield split, detection_sample(image["file_name"], encoded, known)


def paired_boxes(boxes: list[Box], pairs: int | None = None) -> list[Box]:
    """Objects first, then shadows, both in the order of their pair numbers.

    pairs: how many there must be, where the file says so. Raises BadItemError unless each number
    stands for one object and one shadow.
    """
    for box in boxes:
        if box.pair is None:
            raise BadItemError(f"annotation {box.id} has no number `association`")
    counts = Counter((box.pair, box.label) for box in boxes)
    for number in sorted({box.pair for box in boxes if box.pair is not None}):
        found = counts[number, OBJECT], counts[number, SHADOW]
        if found != (1, 1):
            raise BadItemError(
                f"association {number} has {found[0]} object(s) and {found[1]} shadow(s); expected "
                "one of each"
            )
    if pairs is not None and 2 * pairs != len(boxes):
        raise BadItemError(f"has {len(boxes) // 2} pairs, `association_anno` has {pairs}")
    return sorted(boxes, key=lambda box: (box.label or 0, box.pair or 0))


def _pairs(path: Path) -> Counter[int]:
    """Image id -> number of records in `association_anno`; empty where there is no such list."""
    try:
        records = [record for _, record in JsonFile(path).records("association_anno")]
    except SourceError:
        return Counter()
    return Counter(r["image_id"] for r in records if type(r.get("image_id")) is int)


def _annotation_file(root: Path, split: str) -> Path:
    beside = root / FILES[split]
    return beside if beside.is_file() else root / "annotations" / FILES[split]
