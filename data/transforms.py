"""Image bytes -> uint8 tensors.

Randomness comes in as a generator, so a position of the stream fixes its crop.
"""

import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from groundwork.data.decode import (
    JpegCrop,
    decode_image,
    decode_jpeg_crop,
    decode_opened,
    jpeg_turn,
    open_image,
)
from groundwork.data.samples import SampleError

#: Aspect ratio above which an evaluated picture is resized in its central square only.
MAX_ASPECT = 32
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageTransform:
    """How a picture becomes a square tensor.

    size: side in pixels. scale, ratio: area fraction and aspect ratio of the random training crop
    (Szegedy et al. 2015, as in torchvision's RandomResizedCrop). flip: probability of a mirror
    image. brightness, contrast, saturation: half-width of the uniform factor around 1 (0: off).
    """

    size: int = 224
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    resample: Literal["bilinear", "bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"ImageTransform: size is {self.size}; need at least one pixel")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"ImageTransform: flip is {self.flip}; it is a probability, 0 to 1")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"ImageTransform: {name} is {getattr(self, name)}; need 0 or more")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"ImageTransform: scale {self.scale} must satisfy 0 < low <= high <= 1"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ImageTransform: ratio {self.ratio} must satisfy 0 < low <= high")

    @property
    def filter(self) -> Image.Resampling:
        return Image.Resampling.BICUBIC if self.resample == "bicubic" else Image.Resampling.BILINEAR


def random_crop_box(
    width: int, height: int, transform: ImageTransform, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random box (left, top, right, bottom) with the transform's area and aspect ratio.

    Where ten draws do not fit (long, thin pictures): the largest central box within the ratios.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*transform.scale)
        ratio = math.exp(rng.uniform(math.log(transform.ratio[0]), math.log(transform.ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, transform.ratio[0]), transform.ratio[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def training_image(
    data: bytes,
    transform: ImageTransform,
    rng: np.random.Generator,
    *,
    jpeg_crop: JpegCrop | None = None,
) -> Tensor:
    """Random resized crop, mirror and colour jitter -> (3, size, size) uint8.

    The crop is drawn before a JPEG is decoded, which is then decoded in the crop only and at 1/2,
    1/4 or 1/8 where that still gives `size` pixels; see `decode_jpeg_crop` for how far the crop's
    edges may move for that. Other formats are decoded whole.
    jpeg_crop: a faster decoder that gives the same pixels (`groundwork.kernels.jpeg_crop`).
    """
    with warnings.catch_warnings():
        # of large images and corrupt metadata; what matters of it ends in an error
        warnings.simplefilter("ignore")
        pixels = _training_pixels(data, transform, rng, jpeg_crop)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def training_images(
    files: Sequence[bytes],
    transform: ImageTransform,
    rngs: Sequence[np.random.Generator],
    *,
    threads: int = 1,
    jpeg_crop: JpegCrop | None = None,
) -> tuple[Tensor, list[SampleError | None]]:
    """`training_image` of every file -> (B, 3, size, size) uint8, and what is wrong with each.

    The tensor is channels-last in memory, as the decoder writes it; `.contiguous()` for the other
    way round. The row of a file that cannot be used is zero, its error is returned in its place.
    threads: how many share the work; decoding and resizing run outside Python's global lock, and
        the pixels do not depend on the number.
    """
    shape = (len(files), transform.size, transform.size, 3)
    batch = np.empty(shape, np.uint8)
    errors: list[SampleError | None] = [None] * len(files)

    def work(rows: range) -> None:
        for row in rows:
            try:
                batch[row] = _training_pixels(files[row], transform, rngs[row], jpeg_crop)
            except SampleError as error:
                batch[row] = 0
                errors[row] = error

    if len(rngs) != len(files):
        raise ValueError(f"training_images: {len(files)} files, {len(rngs)} generators")
    # around the threads, because the filters are those of the whole process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if threads <= 1:
            work(range(len(files)))
        else:
            with ThreadPoolExecutor(threads) as pool:
                # in turn, so that each thread gets as many large pictures as the others
                for done in [
                    pool.submit(work, range(first, len(files), threads)) for first in range(threads)
                ]:
                    done.result()
    return torch.from_numpy(batch).permute(0, 3, 1, 2), errors


def _training_pixels(
    data: bytes,
    transform: ImageTransform,
    rng: np.random.Generator,
    jpeg_crop: JpegCrop | None,
) -> np.ndarray:
    """(size, size, 3) uint8."""
    image = open_image(data)
    turn = jpeg_turn(image)
    if turn is None:
        image = decode_opened(image)
        box = random_crop_box(image.width, image.height, transform, rng)
        size = (transform.size, transform.size)
        image = image.resize(size, transform.filter, box=box, reducing_gap=2.0)
        pixels = np.array(image)
    else:
        box = random_crop_box(*turn.upright_size(*image.size), transform, rng)
        box = turn.stored_box(box, *image.size)
        crop = decode_jpeg_crop(data, image, box, transform.size, jpeg_crop)
        pixels = _resize(crop, transform)
        pixels = pixels.swapaxes(0, 1) if turn.transposed else pixels
        pixels = pixels[:: -1 if turn.flip_y else 1, :: -1 if turn.flip_x else 1]
    if rng.random() < transform.flip:
        pixels = pixels[:, ::-1]
    pixels = np.ascontiguousarray(pixels)
    if transform.brightness or transform.contrast or transform.saturation:
        pixels = _jitter(pixels, transform, rng)
    return pixels


def _resize(pixels: np.ndarray, transform: ImageTransform) -> np.ndarray:
    """(h, w, 3) uint8 -> (size, size, 3) uint8, with antialiasing.

    torch's kernel for bytes is Pillow's algorithm in vector instructions (4 to 6 times as fast with
    AVX2); its arithmetic is in integers, so the pixels are the same on every processor.
    """
    x = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)  # channels-last, as is the result
    size = (transform.size, transform.size)
    x = interpolate(x, size, mode=transform.resample, antialias=True, align_corners=False)
    return x[0].permute(1, 2, 0).numpy()


def evaluation_image(data: bytes, transform: ImageTransform) -> Tensor:
    """Shorter side to `size`, centre crop -> (3, size, size) uint8.

    The ELEVATER protocol, with torchvision's rounding (Resize, then CenterCrop).
    """
    image = decode_image(data)
    size = transform.size
    short = min(image.width, image.height)
    width, height = int(size * image.width / short), int(size * image.height / short)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if max(width, height) > MAX_ASPECT * size:
        # the same square without the rest of the strip, which may not fit into memory; its rounding
        # differs in a few pixels, so ordinary pictures go the other way
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        image = image.resize((size, size), transform.filter, box=box)
    else:
        image = image.resize((width, height), transform.filter)
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _jitter(pixels: np.ndarray, transform: ImageTransform, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and saturation by random factors. pixels: (H, W, 3) uint8."""

    def factor(width: float) -> np.float32:
        return np.float32(rng.uniform(max(0.0, 1 - width), 1 + width))

    x = pixels.astype(np.float32)
    x *= factor(transform.brightness)
    mean = x.mean(dtype=np.float32)
    x -= mean
    x *= factor(transform.contrast)
    x += mean
    gray = (x @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    x -= gray
    x *= factor(transform.saturation)
    x += gray
    np.rint(x, out=x)
    return np.clip(x, 0, 255, out=x).astype(np.uint8)
