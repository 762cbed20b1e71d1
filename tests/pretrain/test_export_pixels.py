"""The exported image processor beside our own evaluation images."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from groundwork.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageTransform,
    evaluation_image,
)
from groundwork.pretrain.weights.huggingface import image_processor


def pixels_of_both(
    transform: ImageTransform, size: tuple[int, int], folder: Path, **options: Any
) -> tuple[Tensor, Tensor]:
    """Ours and those of the processor as a stranger loads it, as levels of 255."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    image_processor(transform).save_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, **options)
    theirs = torch.as_tensor(np.asarray(processor(images=image)["pixel_values"][0]))
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    levels = (theirs * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 255
    return evaluation_image(buffer.getvalue(), transform).float(), levels


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(40, 40), (32, 32), (33, 64), (72, 64)])
def test_the_processor_with_pillow_gives_our_pixels(
    resample: Any, size: tuple[int, int], tmp_path: Path
) -> None:
    transform = ImageTransform(size=32, resample=resample)
    ours, theirs = pixels_of_both(transform, size, tmp_path, backend="pil")
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-3)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_the_processor_as_it_loads_by_default_is_two_levels_away(
    resample: Any, tmp_path: Path
) -> None:
    transform = ImageTransform(size=32, resample=resample)
    ours, theirs = pixels_of_both(transform, (72, 64), tmp_path)
    assert (theirs - ours).abs().max() < 2.001


def test_the_processor_crops_some_pictures_a_pixel_further_left(tmp_path: Path) -> None:
    transform = ImageTransform(size=32)
    ours, theirs = pixels_of_both(transform, (35, 32), tmp_path, backend="pil")
    torch.testing.assert_close(theirs[..., 1:], ours[..., :-1], rtol=0, atol=1e-3)
