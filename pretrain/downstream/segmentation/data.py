"""Pictures with a class for each pixel -> what UperNet is trained on and evaluated with.

Training follows mmsegmentation's recipe for ADE20K: resize by a random factor, crop where no class
takes up most of the picture, mirror, distort the colours, fill up to the crop. Evaluation takes the
whole picture. Pixels stay uint8 here; the model normalises them.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from groundwork.data.decode import decode_image
from groundwork.data.samples import Sample, SampleError
from groundwork.data.transforms import IMAGENET_MEAN
from groundwork.pretrain.downstream.segmentation.maps import SegmentationLabels, segmentation_map

#: Crops drawn before one is taken in which a class prevails.
CROP_TRIES = 10
#: Pixels of the filling: the mean colour, which the model normalises to zero within half a grey.
FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)


@dataclass(frozen=True)
class SegmentationTransform:
    """How a picture and its map become tensors.

    crop: side of training crops in pixels, and the shorter side of evaluated pictures.
    max_ratio: the longer side is at most this often the crop. scale: range of the random factor.
    cat_max_ratio: a crop is drawn again, up to 10 times, in which one class has at least this part
        of the labelled pixels. flip: probability of a mirror image.
    distortion: random brightness, contrast, saturation and hue, each of every other picture: those
        of SSD (arXiv 1512.02325) with torchvision's formulae.
    size_multiple: sides of evaluated pictures are rounded up to multiples of it.
    test_scales, test_flip: evaluate at several factors, and mirrored; probabilities are averaged.
    """

    crop: int = 512
    max_ratio: float = 4.0
    scale: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    distortion: bool = True
    size_multiple: int = 32
    test_scales: tuple[float, ...] = (1.0,)
    test_flip: bool = False

    def __post_init__(self) -> None:
        if self.crop < 1 or self.size_multiple < 1:
            raise ValueError(
                f"transform.crop is {self.crop}, size_multiple {self.size_multiple}; give at least "
                "1 pixel"
            )
        if not 1 <= self.max_ratio < math.inf:
            raise ValueError(f"transform.max_ratio is {self.max_ratio}; give at least 1")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(
                f"transform.scale is {list(self.scale)}; give a least and a greatest factor above 0"
            )
        if not 0 < self.cat_max_ratio <= 1:
            raise ValueError(
                f"transform.cat_max_ratio is {self.cat_max_ratio}; give a part above 0, or 1 to "
                "take the first crop"
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"transform.flip is {self.flip}; it is a probability, 0 to 1")
        if not self.test_scales or not all(0 < s < math.inf for s in self.test_scales):
            raise ValueError(
                f"transform.test_scales is {list(self.test_scales)}; give at least one factor"
            )


class SegmentationExample(NamedTuple):
    """key: of the sample. views: pictures (3, h, w) uint8, in evaluation one for each test scale.

    labels: (H, W) int32, of the crop in training, of the original picture in evaluation.
    """

    key: str
    views: list[Tensor]
    labels: Tensor


def segmentation_example(
    sample: Sample,
    labels: SegmentationLabels,
    transform: SegmentationTransform,
    rng: np.random.Generator | None,
) -> SegmentationExample:
    """A training example, or without a generator one to evaluate. Raises SampleError."""
    picture = torch.from_numpy(np.array(decode_image(sample.image))).permute(2, 0, 1)
    classes = torch.from_numpy(segmentation_map(sample, labels))
    if picture.shape[1:] != classes.shape:
        raise SampleError(
            f"{labels.member} is {classes.shape[1]} x {classes.shape[0]}, the upright picture "
            f"{picture.shape[2]} x {picture.shape[1]} pixels; they must be as large"
        )
    if rng is None:
        views = [_test_view(picture, transform, scale) for scale in transform.test_scales]
        return SegmentationExample(sample.key, views, classes)
    height, width = _resized(picture, transform, rng.uniform(*transform.scale))
    picture, classes = _resize(picture, height, width), _resize_map(classes, height, width)
    top, left = _choose_crop(classes, transform, labels.ignore_index, rng)
    side = transform.crop
    picture = picture[:, top : top + side, left : left + side]
    classes = classes[top : top + side, left : left + side]
    if rng.random() < transform.flip:
        picture, classes = picture.flip(2), classes.flip(1)
    if transform.distortion:
        picture = _distort(picture, rng)
    filled = torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1).repeat(1, side, side)
    filled[:, : picture.shape[1], : picture.shape[2]] = picture
    labelled = torch.full((side, side), labels.ignore_index, dtype=torch.int32)
    labelled[: classes.shape[0], : classes.shape[1]] = classes
    return SegmentationExample(sample.key, [filled], labelled)


def segmentation_collate(examples: list[SegmentationExample]) -> dict[str, Any]:
    """-> {"keys": names, "views": for each scale a list of B pictures, "labels": list of B maps}.

    Lists, because pictures to evaluate differ in size.
    """
    return {
        "keys": [example.key for example in examples],
        "views": [list(pictures) for pictures in zip(*(e.views for e in examples), strict=True)],
        "labels": [example.labels for example in examples],
    }


def _resized(picture: Tensor, transform: SegmentationTransform, factor: float) -> tuple[int, int]:
    """Height and width for a shorter side of crop·factor, the longer one bounded."""
    height, width = picture.shape[1:]
    short = transform.crop * factor
    by = min(short / min(height, width), short * transform.max_ratio / max(height, width))
    return max(1, int(height * by + 0.5)), max(1, int(width * by + 0.5))


def _test_view(picture: Tensor, transform: SegmentationTransform, scale: float) -> Tensor:
    multiple = transform.size_multiple
    height, width = (
        math.ceil(side / multiple) * multiple for side in _resized(picture, transform, scale)
    )
    return _resize(picture, height, width)


def _resize(picture: Tensor, height: int, width: int) -> Tensor:
    """(3, h, w) uint8 -> (3, height, width) uint8, bilinear with antialiasing."""
    if picture.shape[1:] == (height, width):
        return picture.contiguous()
    size = (height, width)
    x = F.interpolate(picture[None], size, mode="bilinear", antialias=True, align_corners=False)
    return x[0].contiguous()


def _resize_map(classes: Tensor, height: int, width: int) -> Tensor:
    """(h, w) -> (height, width), the class at the nearest pixel centre."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).long().clamp_max(old - 1)
        for new, old in zip((height, width), classes.shape, strict=True)
    )
    return classes[rows[:, None], columns]


def _choose_crop(
    classes: Tensor, transform: SegmentationTransform, ignore_index: int, rng: np.random.Generator
) -> tuple[int, int]:
    """Top and left edge of the first crop in which no class prevails, or of the last tried."""
    height, width = classes.shape
    side = transform.crop
    top = left = 0
    for _ in range(CROP_TRIES):
        top = int(rng.integers(max(height - side, 0) + 1))
        left = int(rng.integers(max(width - side, 0) + 1))
        if transform.cat_max_ratio == 1:
            break
        present, counts = classes[top : top + side, left : left + side].unique(return_counts=True)
        counts = counts[present != ignore_index]
        if len(counts) > 1 and counts.max() < transform.cat_max_ratio * counts.sum():
            break
    return top, left


def _distort(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, saturation and hue, and contrast before or after the last two."""

    def sometimes(adjust: Any, low: float, high: float, x: Tensor) -> Tensor:
        chosen, amount = rng.random() < 0.5, rng.uniform(low, high)
        return adjust(x, amount) if chosen else x

    picture = sometimes(tv.adjust_brightness, 0.875, 1.125, picture)
    contrast_first = rng.random() < 0.5
    if contrast_first:
        picture = sometimes(tv.adjust_contrast, 0.5, 1.5, picture)
    picture = sometimes(tv.adjust_saturation, 0.5, 1.5, picture)
    picture = sometimes(tv.adjust_hue, -0.05, 0.05, picture)
    if not contrast_first:
        picture = sometimes(tv.adjust_contrast, 0.5, 1.5, picture)
    return picture
