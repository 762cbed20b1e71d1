"""Raw image files: found without leaving their folder, read unchanged, measured from the header."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import urlsplit

from PIL import ExifTags, Image, UnidentifiedImageError

from groundwork.data.sources.image_folder import DECODE_ERRORS, FORMAT_EXTENSIONS
from groundwork.data.sources.report import BadItemError

#: EXIF orientations whose upright picture has the stored one's sides exchanged.
SIDEWAYS: Final = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The bytes of an image file, and what its header says.

    format: the extension that its content deserves. width, height: of the upright picture, in
    pixels. orientation: EXIF tag 274, by which the stored picture differs from the upright one.
    """

    data: bytes
    format: str
    width: int
    height: int
    orientation: int = 1

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) of the picture before it is turned upright."""
        is_sideways = self.orientation in SIDEWAYS
        return (self.height, self.width) if is_sideways else (self.width, self.height)


def inside(root: Path, name: str) -> Path:
    """`root / name`, for names that come from annotation files.

    Raises BadItemError for names that could lead out of `root`.
    """
    parts = PurePosixPath(name).parts
    if not name or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise BadItemError(f"file name {name[:200]!r} is absolute or leads out of {root}; refused")
    return root / name


def find_inside(roots: Sequence[Path], name: str) -> Path:
    """The first of `roots` that holds the file `name`. Raises BadItemError where none does."""
    candidates = [inside(root, name) for root in roots]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise BadItemError(f"image file is missing (looked for {', '.join(map(str, candidates))})")


def url_tail(url: str) -> str:
    """`http://host/x/train2017/9.jpg` -> `train2017/9.jpg`. Raises BadItemError."""
    try:
        parts = urlsplit(url).path.strip("/").split("/")
    except ValueError as error:
        raise BadItemError(f"url {url[:200]!r} cannot be parsed ({error})") from error
    if len(parts) < 2:
        raise BadItemError(f"url is {url[:200]!r}; expected .../FOLDER/FILE")
    return f"{parts[-2]}/{parts[-1]}"


def read_image(path: Path) -> EncodedImage:
    """Read an image file and measure it. Raises BadItemError that says why it is unusable."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise BadItemError(f"image file {path} is missing") from error
    except OSError as error:
        raise BadItemError(
            f"image file {path} cannot be read: {error.strerror or error}"
        ) from error
    try:
        return measure(data)
    except BadItemError as error:
        raise BadItemError(f"image file {path} {error}") from error


def measure(data: bytes) -> EncodedImage:
    """Read the header of an encoded image; nothing is decoded. Raises BadItemError.

    The check covers all chunks of a PNG; a JPEG cut short shows only when it is decoded.
    """
    if not data:
        raise BadItemError("is empty")
    orientation = 1
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            found, (width, height) = str(image.format), image.size
            if found != "PNG":
                orientation = _orientation(image)
            else:
                image.verify()
                # asked for the tag, Pillow decodes a PNG, in which it may come last
                if b"eXIf" in data or b"Raw profile type exif" in data:
                    orientation = _orientation(Image.open(io.BytesIO(data), formats=("PNG",)))
    except UnidentifiedImageError as error:
        # its own message names an address in memory
        raise BadItemError("is neither a JPEG, nor a PNG, nor a WebP image") from error
    except (*DECODE_ERRORS, TypeError) as error:
        raise BadItemError(f"is not a readable JPEG, PNG or WebP image ({error})") from error
    if orientation in SIDEWAYS:
        width, height = height, width
    return EncodedImage(data, FORMAT_EXTENSIONS[found], width, height, orientation)


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))
