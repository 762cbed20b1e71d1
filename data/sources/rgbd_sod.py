"""RGB-D salient object detection: NJU2K, NLPR, STERE, DES, LFSD, SIP, SSD, DUT-RGBD, ReDWeb-S.

    ROOT/RGB/0001.jpg   ROOT/depth/0001.png   ROOT/GT/0001.png

The folders have other names in some releases (FOLDERS below); files belong together by their
stems. Or a list has a line `rgb depth gt` for each picture, with paths relative to ROOT.

Members: `depth.png`, whose values are relative here, and `mask.png` (above 128: salient). PNG files
pass unchanged; others, JPEG mostly, are stored as PNG with the same pixels. Whether near things are
bright differs between the data sets: say it in `near`.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from PIL import Image, UnidentifiedImageError

from groundwork.data.annotations import Annotations, Depth
from groundwork.data.samples import Sample
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import inside, read_image
from groundwork.data.sources.image_folder import DECODE_ERRORS
from groundwork.data.sources.keys import sample_key
from groundwork.data.sources.report import BadItemError, ImportReport

KIND: Final = "rgbd_sod"

#: Names of the three folders in the releases, in lower case.
FOLDERS: Final = {
    "rgb": ("rgb", "imgs", "img", "image", "images", "lr", "left", "train_images", "test_images"),
    "depth": ("depth", "depths", "train_depth", "test_depth"),
    "gt": ("gt", "gts", "mask", "masks", "label", "labels", "train_masks", "test_masks"),
}
FILES: Final = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FORMATS: Final = ("PNG", "JPEG", "BMP", "WEBP")


@dataclass(frozen=True)
class RgbdSodConfig:
    """One of the data sets. listing: a file of lines `rgb depth gt`, below root; empty: folders.

    near: "bright" or "dark" things are near in the depth maps of this set. name: goes to `source`.
    """

    root: Path
    near: Literal["dark", "bright"]
    split: str = "train"
    name: str = ""
    listing: str = ""
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.near not in ("dark", "bright"):
            raise SourceError(
                f"RgbdSodConfig: near is {self.near!r}; look at a depth map and choose 'dark' or "
                "'bright'"
            )


def rgbd_sod_samples(
    config: RgbdSodConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every picture with depth and mask, in the order of the list or of the names."""
    report = report or ImportReport()
    triples = _listed(config) if config.listing else _found(config.root)
    for where, names in triples:
        try:
            sample = _sample(config, names)
        except BadItemError as error:
            report.bad("image", where, str(error), skip=config.skip_bad)
            continue
        yield config.split, sample


def _sample(config: RgbdSodConfig, names: tuple[str, ...]) -> Sample:
    if "" in names:
        kind = ("image", "depth map", "mask")[names.index("")]
        raise BadItemError(f"has no {kind} of the same name")
    rgb, depth, gt = (inside(config.root, name) for name in names)
    image = read_image(rgb)
    if image.orientation != 1:
        raise BadItemError(f"{rgb} is stored turned (EXIF), its depth is not; turn its pixels")
    members = {}
    for member, path in (("depth.png", depth), ("mask.png", gt)):
        data, size = as_png(path)
        if size != (image.width, image.height):
            raise BadItemError(
                f"{path} has {size[0]} x {size[1]} pixels, {rgb.name} has {image.width} x "
                f"{image.height}"
            )
        members[member] = data
    known = Annotations(
        width=image.width,
        height=image.height,
        depth=Depth("relative", config.near),
        source={"file_name": names[0], **({"data_set": config.name} if config.name else {})},
    )
    key = sample_key(names[0].rpartition(".")[0])
    return Sample(key, image.data, image.format, "", known.to_info(), members)


def as_png(path: Path) -> tuple[bytes, tuple[int, int]]:
    """A map as a PNG file, and (width, height): unchanged, or, from another format, in grey.

    Raises BadItemError.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadItemError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.format == "PNG":
                size = image.size
                image.verify()
                return data, size
            buffer = io.BytesIO()
            image.convert("L").save(buffer, "PNG")
            return buffer.getvalue(), image.size
    except UnidentifiedImageError as error:
        raise BadItemError(f"{path} is no {', '.join(FORMATS)} image") from error
    except DECODE_ERRORS as error:
        raise BadItemError(f"{path} is not a readable image ({error})") from error


def _listed(config: RgbdSodConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    try:
        path = inside(config.root, config.listing)
        lines = path.read_text("utf-8-sig").splitlines()
    except (BadItemError, OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{config.root / config.listing}: the list cannot be read ({error})"
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            names = tuple(line.split())
            if len(names) != 3:
                raise SourceError(
                    f"{path}: line {number} has {len(names)} parts; expected rgb, depth and gt"
                )
            yield f"{path}: line {number}", names


def _found(root: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(place, names of image, depth map and mask) of each stem; "" for what is missing."""
    if not root.is_dir():
        raise SourceError(f"{root}: not a folder; give the one above RGB, depth and GT")
    present = {e.name.casefold(): e.name for e in sorted(root.iterdir()) if e.is_dir()}
    files: list[dict[str, str]] = []
    for kind, known in FOLDERS.items():
        folder = next((present[name] for name in known if name in present), None)
        if folder is None:
            raise SourceError(
                f"{root}: no folder of {kind} (looked for {', '.join(known)}; found "
                f"{', '.join(present.values()) or 'none'}); rename it, or give a list"
            )
        listed = sorted(f for f in (root / folder).iterdir() if f.suffix.casefold() in FILES)
        files.append({file.stem: f"{folder}/{file.name}" for file in listed})
    for stem in sorted(set().union(*files)):
        yield f"{root}: {stem}", tuple(kind.get(stem, "") for kind in files)
