"""Samples with boxes and masks -> the pictures and targets of detectors.

Training: the sides of Mask R-CNN (arXiv 1703.06870, shorter side 800, longer at most 1333) or the
multi-scale augmentation of DETR (arXiv 2005.12872, section 4.1), then a mirror image. Evaluation:
the test size, and the annotations as they are, in pixels of the original picture.

Boxes are [left, top, right, bottom] in pixels, (0, 0) the outer corner of the first pixel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from groundwork.data.annotations import Box, annotations_from_info, segmentation_mask
from groundwork.data.decode import decode_image, ignoring_warnings, open_image
from groundwork.data.diagnosis import Diagnosis
from groundwork.data.samples import Sample, SampleError
from groundwork.data.transforms import IMAGENET_MEAN, IMAGENET_STD

#: The sides of a batch are multiples of the stride of a pyramid's coarsest stage.
SIZE_MULTIPLE: Final = 32
#: Boxes that are narrower after the transform are left out of training, in pixels.
MIN_SIDE: Final = 1.0


@dataclass(frozen=True)
class DetectionTransform:
    """How a picture with its boxes and masks is resized.

    sizes: shorter sides in pixels, one is drawn for each training picture; the longer side is at
        most max_size, the aspect ratio is kept. crop_from: where it is given, half of the pictures
        are first resized to one of these sizes, and a part of crop_range[0] to crop_range[1] pixels
        a side is cut out, before they are resized to one of `sizes`. crop_max_size: the longer side
        at most, before that (null: max_size).
    redraws: how often all of this is drawn anew for a training picture of whose objects it left
        none (null: never; the picture is then a negative).
    flip: probability of a mirror image. test_size: the shorter side in evaluation (null: the
        largest of `sizes`).
    """

    sizes: tuple[int, ...] = (800,)
    max_size: int = 1333
    crop_from: tuple[int, ...] = ()
    crop_range: tuple[int, int] = (384, 600)
    flip: float = 0.5
    test_size: int | None = None
    crop_max_size: int | None = None
    redraws: int | None = None

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("DetectionTransform: sizes is empty; give at least one, such as [800]")
        limit = "max_size" if self.crop_max_size is None else "crop_max_size"
        for name, most in (("sizes", "max_size"), ("crop_from", limit)):
            longest = getattr(self, most)
            if any(not 1 <= size <= longest for size in getattr(self, name)):
                raise ValueError(
                    f"DetectionTransform: {name} is {list(getattr(self, name))}; each is a shorter "
                    f"side of 1 to {most} ({longest}) pixels"
                )
        if self.test_size is not None and not 1 <= self.test_size <= self.max_size:
            raise ValueError(
                f"DetectionTransform: test_size is {self.test_size}; give 1 to max_size "
                f"({self.max_size}) pixels"
            )
        if not 1 <= self.crop_range[0] <= self.crop_range[1]:
            raise ValueError(
                f"DetectionTransform: crop_range is {list(self.crop_range)}; give least and most"
            )
        if self.redraws is not None and self.redraws < 1:
            raise ValueError(
                f"DetectionTransform: redraws is {self.redraws}; give at least 1, or null for never"
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"DetectionTransform: flip is {self.flip}; it is a probability")

    def pipeline(self) -> v2.Transform:
        """The training transform of {"image", "boxes", "masks"}; draws from torch's generator."""
        resize = v2.RandomShortestSize(self.sizes, self.max_size)
        if self.crop_from:
            first = v2.RandomShortestSize(self.crop_from, self.crop_max_size or self.max_size)
            crop = v2.Compose([first, RandomSizeCrop(*self.crop_range), resize])
            resize = v2.RandomChoice([resize, crop])
        return v2.Compose([resize, v2.RandomHorizontalFlip(self.flip)])


#: DETR's augmentation, as the 3x schedules of Mask R-CNN use it.
MULTI_SCALE: Final = DetectionTransform(sizes=tuple(range(480, 801, 32)), crop_from=(400, 500, 600))
#: The same as DINO uses it: long pictures keep their scale before the crop, and a crop without any
#: object is not trained on.
DINO_MULTI_SCALE: Final = replace(MULTI_SCALE, crop_max_size=4200, redraws=10)


class RandomSizeCrop(v2.Transform):
    """Cuts out a part of `least` to `most` pixels a side, or the whole side where it is shorter."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        (top, h), (left, w) = self._range(height), self._range(width)
        return {"top": top, "left": left, "height": h, "width": w}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.crop(inpt, **params)

    def _range(self, side: int) -> tuple[int, int]:
        """(first pixel, pixels)."""
        length = _draw(min(side, self.least), min(side, self.most))
        return _draw(0, side - length), length


@dataclass(frozen=True)
class GroundTruth:
    """What is true of an evaluated picture of original size; N objects, crowds among them.

    boxes: (N, 4) float64. labels: (N,) int64. area: (N,) float64, pixels by which COCO tells small
    from large. crowd: (N,) bool. rles: each mask as pycocotools' compressed run lengths, None where
    masks were not asked for. source_id: the picture's number in the raw data, if it has one.
    """

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    area: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    rles: tuple[dict[str, Any], ...] | None
    source_id: int | None = None


class DetectionExample(NamedTuple):
    """image: (3, h, w) uint8. target: see `detection_example`."""

    image: Tensor
    target: dict[str, Any]


def detection_example(
    sample: Sample,
    transform: DetectionTransform,
    num_classes: int,
    rng: np.random.Generator | None,
    *,
    masks: bool = True,
) -> DetectionExample:
    """A picture, resized, and its target; with a generator augmented for training.

    Both targets have `image_id` (the sample's key) and `orig_size` (height, width). For training:

        boxes    (N, 4) float32, pixels of the resized picture
        labels   (N,) int64
        masks    (N, h, w) uint8, if asked for; from polygons or run lengths, or else the pixels of
                 `instances.png` that have the box's id
        dropped  why annotations of the picture are not among them, one text each: crowds, boxes
                 without a class, and what a crop or the resizing left nothing of

    For evaluation: `ground_truth`, a `GroundTruth`; boxes without a class are no part of it. N may
    be 0. The same generator state gives the same example.
    Raises SampleError for pictures that nobody looked for boxes in, for labels beyond num_classes,
    and where a mask is asked for and there is none.
    """
    known = annotations_from_info(sample.info)
    if not known.has_boxes:
        raise SampleError("json.boxes is missing: the picture is not annotated with boxes")
    with ignoring_warnings():
        picture = decode_image(sample.image)
    height, width = picture.height, picture.width
    if known.width is not None and (known.height, known.width) != (height, width):
        raise SampleError(
            f"the picture has {width} x {height} pixels, its annotations are for {known.width} x "
            f"{known.height}"
        )
    for box in known.boxes:
        if box.label is not None and box.label >= num_classes:
            raise SampleError(
                f"json.boxes: label {box.label} ({box.category!r}), and the model has "
                f"{num_classes} classes",
                Diagnosis.BAD_LABEL,
            )
    image = tv_tensors.Image(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    shared = {"image_id": sample.key, "orig_size": (height, width)}
    if rng is None:
        test_size = transform.test_size or max(transform.sizes)
        resized = v2.RandomShortestSize(test_size, transform.max_size)(image)
        labelled = [box for box in known.boxes if box.label is not None]
        drawn = _masks(sample, labelled, height, width) if masks else None
        truth = _ground_truth(labelled, drawn, known.source.get("image_id"))
        return DetectionExample(_plain(resized), {**shared, "ground_truth": truth})

    dropped = [
        f"{box.category or 'box'}: {'a crowd' if box.crowd else 'no class'}"
        for box in known.boxes
        if box.crowd or box.label is None
    ]
    kept = [box for box in known.boxes if not box.crowd and box.label is not None]
    parts = {
        "image": image,
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor([box.xyxy for box in kept], dtype=torch.float32).reshape(-1, 4),
            format=tv_tensors.BoundingBoxFormat.XYXY,
            canvas_size=(height, width),
        ),
    }
    if masks:
        drawn = _masks(sample, kept, height, width)
        parts["masks"] = tv_tensors.Mask(torch.from_numpy(drawn))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        pipeline, original = transform.pipeline(), parts
        for _ in range(1 + (transform.redraws or 0)):
            parts = pipeline(original)
            is_whole = _left(parts)
            if not kept or is_whole.any():
                break
    boxes = _plain(parts["boxes"])
    dropped += [
        f"{kept[i].category or 'box'}: nothing is left of it after the transform"
        for i in (~is_whole).nonzero().flatten().tolist()
    ]
    target: dict[str, Any] = {
        **shared,
        "boxes": boxes[is_whole],
        "labels": torch.tensor([box.label for box in kept], dtype=torch.int64)[is_whole],
        "dropped": tuple(dropped),
    }
    if masks:
        target["masks"] = _plain(parts["masks"])[is_whole]
    return DetectionExample(_plain(parts["image"]), target)


def _left(parts: Mapping[str, Tensor]) -> Tensor:
    """(N,) bool: the objects of which the transform left something."""
    boxes = _plain(parts["boxes"])
    is_whole = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(1)
    if "masks" in parts:
        is_whole &= _plain(parts["masks"]).flatten(1).any(1).bool()
    return is_whole


def detection_collate(examples: Sequence[DetectionExample]) -> dict[str, Any]:
    """Pictures of different size -> one batch.

    -> images: (B, 3, H, W) uint8, black at the right and the bottom, H and W multiples of 32;
    sizes: (B, 2) int64, (height, width) of each without that; targets: list of B, masks as large
    as their picture.
    """
    sizes = torch.tensor([example.image.shape[-2:] for example in examples])
    height, width = (
        math.ceil(side / SIZE_MULTIPLE) * SIZE_MULTIPLE for side in sizes.amax(0).tolist()
    )
    images = torch.zeros(len(examples), 3, height, width, dtype=torch.uint8)
    for row, (image, _) in zip(images, examples, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return {
        "images": images,
        "sizes": sizes,
        "targets": [example.target for example in examples],
    }


def inside_pictures(sizes: Tensor, height: int, width: int) -> Tensor:
    """(B, 2) sizes -> (B, height, width) bool, False in the padding."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]  # (B, H)
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]  # (B, W)
    return rows[:, :, None] & columns[:, None, :]


def normalise_images(images: Tensor, sizes: Tensor) -> Tensor:
    """ImageNet's mean and deviation; the padding is 0. (B, 3, H, W) uint8 -> the same, float32."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    inside = inside_pictures(sizes, *images.shape[-2:])
    return (images.float() / 255 - mean) / std * inside[:, None]


def _masks(sample: Sample, boxes: Sequence[Box], height: int, width: int) -> NDArray[np.uint8]:
    """-> (N, height, width)."""
    masks = np.zeros((len(boxes), height, width), np.uint8)
    numbers: NDArray[Any] | None = None
    for row, box in zip(masks, boxes, strict=True):
        if box.segmentation is not None:
            row[:] = segmentation_mask(box.segmentation, height, width)
            continue
        if "instances.png" not in sample.members or type(box.id) is not int:
            raise SampleError(
                f"json.boxes: {box.category or 'a box'} has no segmentation, and no pixels in an "
                "instances.png; import the data set with its masks, or train a detector of boxes"
            )
        if numbers is None:
            numbers = _instances(sample.members["instances.png"], height, width)
        row[:] = numbers == box.id
    return masks


def _instances(data: bytes, height: int, width: int) -> NDArray[Any]:
    """`instances.png` -> (height, width), the number of the object at each pixel."""
    with ignoring_warnings():
        image = open_image(data)
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise SampleError(f"instances.png cannot be decoded: {error}") from error
    numbers = np.asarray(image)
    if numbers.shape != (height, width):
        raise SampleError(
            f"instances.png is {image.width} x {image.height} in mode {image.mode}; expected the "
            f"picture's {width} x {height} with one number a pixel"
        )
    return numbers


def _ground_truth(
    boxes: Sequence[Box], masks: NDArray[np.uint8] | None, source_id: Any
) -> GroundTruth:
    return GroundTruth(
        boxes=np.array([box.xyxy for box in boxes], np.float64).reshape(-1, 4),
        labels=np.array([box.label for box in boxes], np.int64),
        area=np.array([box.area for box in boxes], np.float64),
        crowd=np.array([box.crowd for box in boxes], np.bool_),
        rles=None if masks is None else tuple(map(encode_mask, masks)),
        source_id=source_id if type(source_id) is int else None,
    )


def encode_mask(mask: NDArray[Any]) -> dict[str, Any]:
    """(H, W), bool or 0 and 1 -> COCO's compressed run lengths, as JSON has them."""
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ImportError(
            "run lengths of masks need pycocotools: pip install 'groundwork-pretrain[annotations]'"
        ) from error
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def _draw(least: int, most: int) -> int:
    """Both ends included."""
    return int(torch.randint(least, most + 1, ()))


def _plain(x: Tensor) -> Tensor:
    """Without the class of torchvision, which would follow every later operation."""
    return x.as_subclass(Tensor)
