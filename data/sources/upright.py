"""Annotations of a sideways stored picture, turned upright together with it.

Cameras store pictures sideways and say so in EXIF tag 274. Some annotators saw them upright, some
as stored; width and height in the annotation file tell which.
"""

import numpy as np
from numpy.typing import NDArray

from groundwork.data.annotations import Rle, Segmentation, Xyxy, segmentation_mask
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import EncodedImage
from groundwork.data.sources.report import BadItemError


def annotated_as_stored(image: EncodedImage, width: int, height: int) -> bool:
    """Whether annotations of a `width` x `height` picture are of the stored, not the upright one.

    Orientations that keep the sides (mirrored, upside down) count as annotated upright. Raises
    BadItemError where the sizes are of neither.
    """
    if (width, height) == (image.width, image.height):
        return False
    if (width, height) == image.stored_size:
        return True
    raise BadItemError(
        f"the image has {image.width} x {image.height} pixels, its annotations are for "
        f"{width} x {height}: it was resized or exchanged"
    )


def upright_points(
    points: NDArray[np.float64], orientation: int, size: tuple[int, int]
) -> NDArray[np.float64]:
    """(N, 2) x, y of the stored picture -> of the upright one. size: stored (width, height)."""
    x, y = points[:, 0], points[:, 1]
    width, height = size
    turned = {
        5: (y, x),
        6: (height - y, x),
        7: (height - y, width - x),
        8: (y, width - x),
    }
    return np.stack(turned[orientation], axis=1)


def upright_box(xyxy: Xyxy, orientation: int, size: tuple[int, int]) -> Xyxy:
    """A box of the stored picture -> of the upright one."""
    corners = upright_points(np.array(xyxy, np.float64).reshape(2, 2), orientation, size)
    (x0, y0), (x1, y1) = corners.min(0).tolist(), corners.max(0).tolist()
    return x0, y0, x1, y1


def upright_segmentation(
    segmentation: Segmentation, orientation: int, size: tuple[int, int]
) -> Segmentation:
    """A segmentation of the stored picture -> of the upright one. Run lengths stay run lengths."""
    width, height = size
    if not isinstance(segmentation, Rle):
        return tuple(
            tuple(upright_points(np.array(p).reshape(-1, 2), orientation, size).ravel().tolist())
            for p in segmentation
        )
    try:
        mask = segmentation_mask(segmentation, height, width)
    except ImportError as error:
        raise SourceError(str(error)) from error
    turned = {
        5: mask.T,
        6: np.rot90(mask, -1),
        7: mask[::-1, ::-1].T,
        8: np.rot90(mask),
    }[orientation]
    return Rle((width, height), run_lengths(turned))


def run_lengths(mask: NDArray[np.bool_]) -> tuple[int, ...]:
    """COCO's uncompressed run lengths of a (height, width) mask, column by column."""
    flat = np.concatenate(([False], mask.ravel(order="F")))
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    edges = np.concatenate(([0], starts, [mask.size]))
    return tuple(np.diff(edges).tolist())
