"""ViSha (Chen et al. 2021): the shadows in each frame of 120 videos.

    ROOT/train/images/VIDEO/00000000.jpg   ROOT/train/labels/VIDEO/00000000.png
    ROOT/test/images/VIDEO/00000000.jpg    ROOT/test/labels/VIDEO/00000000.png

A frame is one sample with its mask as member `mask.png` (255: shadow). Frames come in the order of
their numbers, so that neighbours in a video are neighbours in the data set; `source` says the
number of the frame and how many the video has.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from groundwork.data.annotations import Annotations
from groundwork.data.samples import Sample
from groundwork.data.sources.coco import check_splits
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import EncodedImage, read_image
from groundwork.data.sources.keys import sample_key
from groundwork.data.sources.report import BadItemError, ImportReport

KIND: Final = "visha"


@dataclass(frozen=True)
class VishaConfig:
    """Where the folders `train` and `test` lie."""

    root: Path
    splits: tuple[str, ...] = ("train", "test")
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_splits(type(self).__name__, self.splits)


def visha_samples(
    config: VishaConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every frame with its mask, video by video."""
    report = report or ImportReport()
    for split in config.splits:
        images, labels = config.root / split / "images", config.root / split / "labels"
        for folder in (images, labels):
            if not folder.is_dir():
                raise SourceError(f"{folder}: this folder is missing; it holds one for each video")
        for video in sorted(folder for folder in images.iterdir() if folder.is_dir()):
            frames = sorted(
                (f for f in video.iterdir() if f.suffix.casefold() in (".jpg", ".jpeg", ".png")),
                key=_frame_order,
            )
            for number, file in enumerate(frames):
                try:
                    mask = labels / video.name / f"{file.stem}.png"
                    sample = _sample(video.name, number, len(frames), file, mask)
                except BadItemError as error:
                    report.bad("frame", str(file), str(error), skip=config.skip_bad)
                    continue
                yield split, sample
            present = {file.stem for file in frames}
            for mask in sorted((labels / video.name).glob("*.png")):
                if mask.stem not in present:
                    report.bad("frame", str(mask), "has no image", skip=config.skip_bad)


def _sample(video: str, number: int, frames: int, file: Path, mask: Path) -> Sample:
    image = read_image(file)
    known = Annotations(
        width=image.width,
        height=image.height,
        source={"video": video, "frame": file.stem, "number": number, "frames": frames},
    )
    data = read_mask(mask, image).data
    key = sample_key(f"{video}/{file.stem}")
    return Sample(key, image.data, image.format, "", known.to_info(), {"mask.png": data})


def read_mask(path: Path, image: EncodedImage) -> EncodedImage:
    """A mask that is a PNG of the size of its picture. Raises BadItemError."""
    mask = read_image(path)
    if mask.format != "png":
        raise BadItemError(f"its mask {path.name} is no PNG, but {mask.format}")
    if (mask.width, mask.height) != image.stored_size:
        raise BadItemError(
            f"its mask has {mask.width} x {mask.height} pixels, the image has "
            f"{image.stored_size[0]} x {image.stored_size[1]}"
        )
    if image.orientation != 1:
        raise BadItemError("is stored turned (EXIF), which its mask is not; turn its pixels")
    return mask


def _frame_order(file: Path) -> tuple[int, str]:
    """By number: 9 before 10."""
    return (int(file.stem) if file.stem.isdecimal() else 0, file.stem)
