"""Pictures for the page: thumbnails, and masks and depth maps made visible."""

import io
import threading
import warnings
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groundwork.data.decode import MAX_PIXELS, decode_opened, open_image
from groundwork.data.samples import Sample, SampleError

#: Side of a thumbnail in pixels, at most. Pictures of fewer bytes are sent as they are stored.
THUMBNAIL: Final = 320
SMALL_BYTES: Final = 48 * 1024
#: Longer side of an overlay in pixels, at most.
OVERLAY: Final = 1600
#: Media types of images, and of the members that a browser can show.
IMAGE_TYPES: Final = {
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
}
VIDEO_TYPES: Final = {"mp4": "video/mp4", "webm": "video/webm", "m4v": "video/mp4"}
#: Parts of names before the format, of maps that are laid over the image.
LABEL_MAPS: Final = ("instances", "shadows", "mask", "masks", "semantic", "seg")
DEPTH: Final = "depth"

#: Large pictures decoded at a time: each may take half a gigabyte.
_decoding = threading.BoundedSemaphore(2)


def member_kind(name: str) -> str:
    """How the page shows a member: labels, depth, image, video or file.

    Members of a frame of a clip bear its number: `depth.0007.png`.
    """
    *before, last = (part for part in name.split(".") if not part.isdigit())
    if last in VIDEO_TYPES:
        return "video"
    if last not in IMAGE_TYPES:
        return "file"
    if last == "png" and before and before[-1] in LABEL_MAPS:
        return "labels"
    return "depth" if last == "png" and before and before[-1] == DEPTH else "image"


def media_type(name: str) -> str:
    """Of a member or an image extension; nothing that a browser would run or lay out."""
    last = name.rpartition(".")[2]
    return {**IMAGE_TYPES, **VIDEO_TYPES}.get(last, "application/octet-stream")


def thumbnail(sample: Sample) -> tuple[bytes, str]:
    """(file, media type) of at most THUMBNAIL pixels a side, or as stored where that is small.

    Raises SampleError for an image that cannot be decoded.
    """
    if len(sample.image) <= SMALL_BYTES and _fits(sample.image, 4 * THUMBNAIL):
        return sample.image, media_type(sample.image_format)
    with _decoding, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in decode_image: what matters ends in an error
        opened = open_image(sample.image)
        # a JPEG gives fewer pixels in the first place, by its inverse DCT
        opened.draft("RGB", (THUMBNAIL, THUMBNAIL))
        image = decode_opened(opened)
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), "image/jpeg"


def overlay(name: str, content: bytes, *, near_is_dark: bool = True) -> bytes:
    """A label map or depth map as a coloured PNG; transparent where it says nothing.

    Labels get colours of their own, 0 is transparent; depth runs from near (bright) to far (dark)
    over the values present. near_is_dark: small values of a depth map are near ones, as distances
    are. Raises SampleError for what cannot be decoded.
    """
    with _decoding:
        values = _map(name, content)
        if member_kind(name) == "depth":
            colours = _depth_colours(values, near_is_dark)
        else:
            colours = label_colours(values)
        return _png(colours)


def labels_overlay(labels: NDArray[Any]) -> bytes:
    """(H, W) labels as a coloured PNG."""
    with _decoding:
        return _png(label_colours(labels))


def _png(rgba: NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(rgba)
    image.thumbnail((OVERLAY, OVERLAY), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def label_colours(labels: NDArray[Any]) -> NDArray[np.uint8]:
    """(H, W) integers -> (H, W, 4) RGBA; the same label has the same colour in every map."""
    hue = np.mod(labels.astype(np.float64) * 0.618033988749895, 1.0)  # golden ratio: far apart
    # three cosines a third of a turn apart: bright colours all around
    phase = hue[..., None] * 2 * np.pi - np.array([0, 2, 4]) * np.pi / 3
    rgb = 140 + 110 * np.cos(phase)
    alpha = np.where(labels > 0, 255, 0)[..., None]
    return np.concatenate([rgb, alpha], axis=-1).astype(np.uint8)


def _depth_colours(depth: NDArray[Any], near_is_dark: bool) -> NDArray[np.uint8]:
    """(H, W) -> (H, W, 4) RGBA. 0 is no measurement."""
    known = depth > 0
    low, high = (float(depth[known].min()), float(depth[known].max())) if known.any() else (0, 1)
    scaled = np.clip((depth.astype(np.float64) - low) / max(high - low, 1e-9), 0, 1)
    nearness = 1 - scaled if near_is_dark else scaled
    colours = _depth_table()[(nearness * 255).astype(np.uint8)]
    return np.concatenate([colours, np.where(known, 255, 0)[..., None].astype(np.uint8)], axis=-1)


@cache
def _depth_table() -> NDArray[np.uint8]:
    from matplotlib import colormaps  # takes a third of a second

    table: NDArray[np.float64] = colormaps["magma"](np.arange(256))[:, :3]
    return np.asarray(np.rint(table * 255), np.uint8)


def _map(name: str, content: bytes) -> NDArray[Any]:
    """(H, W) values of a map; colours stand for R + 256 G + 65,536 B, as in panoptic COCO."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=("PNG",))
            if image.width * image.height > MAX_PIXELS:
                raise SampleError(
                    f"{name} of {image.width} x {image.height} pixels (limit: {MAX_PIXELS:,})"
                )
            # half of the pixels would not be seen, and colours take 4 to 32 bytes each
            step = max(1, -(-max(image.size) // (2 * OVERLAY)))
            values = np.asarray(image)[::step, ::step]
    except SampleError:
        raise
    except Exception as error:  # the decoder meets malformed files with anything
        raise SampleError(f"{name} cannot be decoded: {error or type(error).__name__}") from error
    if values.ndim == 3 and values.shape[2] >= 3:
        rgb = values[..., :3].astype(np.int64)
        return np.asarray(rgb @ np.array([1, 256, 65536]))
    return values[..., 0] if values.ndim == 3 else values


def _fits(data: bytes, side: int) -> bool:
    """Whether an image of few bytes is small when decoded, too."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            return max(image.size) <= side
    except Exception:  # not an image; the caller's decoder says so
        return False
