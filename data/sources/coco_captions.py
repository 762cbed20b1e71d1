"""Captions of COCO (Chen et al. 2015): five or more for each picture.

    ROOT/annotations/captions_train2017.json   ROOT/annotations/captions_val2017.json
    ROOT/train2017/000000000009.jpg            ROOT/val2017/000000000139.jpg

or, with `karpathy`, the file of Karpathy and Fei-Fei (2015), by whose splits captions are compared:

    ROOT/dataset_coco.json     images: [{filepath, filename, cocoid, split, sentences: [{raw}]}]
    ROOT/train2014/COCO_train2014_000000000009.jpg   ROOT/val2014/COCO_val2014_000000391895.jpg

A picture is one sample with all of its captions, so that epochs count pictures; its text is the
first one. Karpathy's "restval" counts as "train", as everybody takes it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from groundwork.data.annotations import Annotations
from groundwork.data.samples import Sample
from groundwork.data.sources.coco import check_splits
from groundwork.data.sources.image_files import inside, read_image
from groundwork.data.sources.json_files import JsonFile, known_members, member, require_files
from groundwork.data.sources.keys import sample_key
from groundwork.data.sources.report import BadItemError, ImportReport

KIND: Final = "coco_captions"
KARPATHY: Final = "dataset_coco.json"


@dataclass(frozen=True)
class CocoCaptionsConfig:
    """Which captions. annotations, images: below root, `{split}` stands for the name of the split.

    karpathy: take splits and captions from `dataset_coco.json` instead.
    """

    root: Path
    splits: tuple[str, ...] = ("train", "val")
    annotations: str = "annotations/captions_{split}2017.json"
    images: str = "{split}2017"
    karpathy: bool = False
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_splits(type(self).__name__, self.splits)


def coco_captions_samples(
    config: CocoCaptionsConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every picture with its captions, in the order of the files; one without is bad."""
    report = report or ImportReport()
    if config.karpathy:
        yield from _karpathy_samples(config, report)
        return
    paths = [config.root / config.annotations.replace("{split}", split) for split in config.splits]
    require_files(paths)
    for split, path in zip(config.splits, paths, strict=True):
        folder = config.root / config.images.replace("{split}", split)
        file = JsonFile(path)
        captions = _captions(file, config, report)
        seen: set[int] = set()
        for where, image in file.records("images"):
            try:
                number = member(image, "id", int)
                where = f"{path}: image {number}"
                if number in seen:
                    raise BadItemError("is there twice")
                seen.add(number)
                name = member(image, "file_name", str)
                sample = _sample(folder, name, captions.get(number, []), {"image_id": number})
            except BadItemError as error:
                report.bad("image", where, str(error), skip=config.skip_bad)
                continue
            yield split, sample
        for number in captions.keys() - seen:
            where = f"{path}: image {number}"
            report.bad(
                "caption", where, "has captions, but is not in `images`", skip=config.skip_bad
            )


def _captions(
    file: JsonFile, config: CocoCaptionsConfig, report: ImportReport
) -> dict[int, list[str]]:
    captions: dict[int, list[str]] = {}
    for where, record in file.records("annotations"):
        try:
            caption = member(record, "caption", str).strip()
            if not caption:
                raise BadItemError("its caption is empty")
            captions.setdefault(member(record, "image_id", int), []).append(caption)
        except BadItemError as error:
            report.bad("caption", where, str(error), skip=config.skip_bad)
    return captions


def _karpathy_samples(
    config: CocoCaptionsConfig, report: ImportReport
) -> Iterator[tuple[str, Sample]]:
    path = config.root / KARPATHY
    seen: set[str] = set()
    for where, image in JsonFile(path).records("images"):
        try:
            split = member(image, "split", str).replace("restval", "train")
            if split not in config.splits:
                continue
            name = member(image, "filename", str)
            where = f"{path}: {name}"
            if name in seen:
                raise BadItemError("is there twice")
            seen.add(name)
            folder = inside(config.root, member(image, "filepath", str) or ".")
            captions = [_raw(sentence) for sentence in member(image, "sentences", list)]
            source = known_members(image, ["cocoid", "imgid"])
            sample = _sample(folder, name, captions, source)
        except BadItemError as error:
            report.bad("image", where, str(error), skip=config.skip_bad)
            continue
        yield split, sample


def _raw(sentence: Any) -> str:
    if not isinstance(sentence, dict):
        raise BadItemError(f"a sentence is {repr(sentence)[:60]}; expected an object with `raw`")
    return member(sentence, "raw", str).strip()


def _sample(folder: Path, name: str, captions: list[str], source: Mapping[str, Any]) -> Sample:
    if not captions:
        raise BadItemError("has no caption")
    encoded = read_image(inside(folder, name))
    known = Annotations(
        width=encoded.width,
        height=encoded.height,
        captions=tuple(captions),
        source={**source, "file_name": name},
    )
    key = sample_key(str(PurePosixPath(name).with_suffix("")))
    return Sample(key, encoded.data, encoded.format, captions[0], known.to_info())
