"""Pictures with a class -> the batches of supervised classification.

A training picture is cropped, mirrored and, by RandAugment (arXiv 1909.13719, timm's), distorted in
the worker; erasing and mixing are of whole batches, see `objectives/classification.py`. All choices
come from the generator of the sample's position in the stream.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from groundwork.data.dataset import Dataset
from groundwork.data.decode import JpegCrop
from groundwork.data.diagnosis import Diagnosis
from groundwork.data.samples import Sample, SampleError, class_label
from groundwork.data.stream import Stream
from groundwork.data.transforms import IMAGENET_MEAN, ImageTransform, training_image
from groundwork.pretrain.training_data import (
    DataConfig,
    TrainingData,
    make_stream,
    open_datasets,
)

_RAND_AUGMENT: Final = re.compile(r"rand(-((m|n|p|mstd|mmax|inc)\d+(\.\d+)?|t[a-z]\w*))*")


@dataclass(frozen=True)
class LabelledImagesConfig(DataConfig):
    """The `data` section of classification. All sources share one numbering of classes.

    rand_augment: timm's description, such as `rand-m9-mstd0.5-inc1`, or null for none.
    """

    kind: Literal["labelled_images"] = "labelled_images"
    rand_augment: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            make_rand_augment(self.rand_augment, self.image)
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                f"data.rand_augment is {self.rand_augment!r}, which timm does not understand "
                f"({error or 'see its rand_augment_transform'}); give one such as "
                "rand-m9-mstd0.5-inc1, or null"
            ) from error


class LabelledImage(NamedTuple):
    """image: (3, S, S) uint8. label: class index."""

    image: Tensor
    label: int


def make_rand_augment(
    description: str | None, image: ImageTransform
) -> Callable[[Image.Image], Image.Image] | None:
    """timm's RandAugment, with timm's settings for a picture of that size."""
    if description is None:
        return None
    from timm.data.auto_augment import rand_augment_transform

    # timm passes over what it does not know, without a word
    if not _RAND_AUGMENT.fullmatch(description):
        raise ValueError("parts are m, n, p, mstd, mmax or inc with a number, or t with a name")
    settings: dict[str, Any] = {
        "translate_const": int(image.size * 0.45),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in IMAGENET_MEAN),
        "interpolation": image.filter,
    }
    augment: Callable[[Image.Image], Image.Image] = rand_augment_transform(description, settings)
    return augment


class LabelledImageDecoder:
    """Sample -> LabelledImage. Raises SampleError where the class is none of `num_classes`."""

    def __init__(
        self,
        image: ImageTransform,
        num_classes: int,
        rand_augment: str | None = None,
        jpeg_crop: JpegCrop | None = None,
    ) -> None:
        self.image = image
        self.num_classes = num_classes
        self.augment = make_rand_augment(rand_augment, image)
        self.jpeg_crop = jpeg_crop

    def __call__(self, sample: Sample, rng: np.random.Generator) -> LabelledImage:
        label = label_below(sample, self.num_classes)
        image = training_image(sample.image, self.image, rng, jpeg_crop=self.jpeg_crop)
        if self.augment is not None:
            image = _augmented(image, self.augment, rng)
        return LabelledImage(image, label)


def label_below(sample: Sample, num_classes: int) -> int:
    """The class of a sample. Raises SampleError where it has none, or one the model has not."""
    label = class_label(sample)
    if not 0 <= label < num_classes:
        raise SampleError(
            f"json.label is {label}; the model has the classes 0 to {num_classes - 1}",
            Diagnosis.BAD_LABEL,
        )
    return label


def _augmented(
    image: Tensor, augment: Callable[[Image.Image], Image.Image], rng: np.random.Generator
) -> Tensor:
    """timm draws from the global generators: they are seeded here, and put back."""
    states = random.getstate(), np.random.get_state()
    seed = int(rng.integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    try:
        changed = augment(Image.fromarray(image.permute(1, 2, 0).numpy()))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1).contiguous()


def collate_labelled(examples: list[LabelledImage]) -> dict[str, Tensor]:
    """-> {"image": (B, 3, S, S) uint8, "labels": (B,) int64}."""
    return {
        "image": torch.stack([example.image for example in examples]),
        "labels": torch.tensor([example.label for example in examples]),
    }


def open_labelled_images(config: LabelledImagesConfig) -> TrainingData:
    """Open what the `data` section names; every missing or damaged file is found here."""
    return TrainingData(open_datasets(config), None)


def labelled_stream(
    config: LabelledImagesConfig, data: TrainingData, seed: int, num_classes: int
) -> Stream[LabelledImage]:
    """The training stream of a recipe's `data` section."""

    def decoder(_: Dataset, __: int, jpeg_crop: JpegCrop | None) -> LabelledImageDecoder:
        return LabelledImageDecoder(config.image, num_classes, config.rand_augment, jpeg_crop)

    return make_stream(config, data, seed, decoder)
