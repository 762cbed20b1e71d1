"""Image bytes -> uint8 tensors. Randomness comes in as a generator, so a position fixes its crop.

A picture is seen as a browser shows it: turned by its EXIF orientation (whoever wrote the caption
saw it upright), transparent parts on white, grey scales of 16 bits brought to 8.
"""

import io
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from groundwork.data.samples import SampleError

#: Pixels above which a file is taken for a decompression bomb (the largest photographs have fewer).
#: Pillow has a limit of its own, 178,956,970, above which it opens nothing.
MAX_PIXELS = 170_000_000
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


#: EXIF orientation -> what makes the stored picture upright (Exif 2.3, tag 274).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes) -> Image.Image:
    """Decode to upright RGB.

    Raises SampleError for what is no image, is cut off, or is over MAX_PIXELS; the size is checked
    before a pixel is decoded.
    """
    if not data:
        raise SampleError("no image: the member is missing or empty")
    try:
        with warnings.catch_warnings():
            # of large images and corrupt metadata; what matters of it ends in an error
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            if image.width * image.height > MAX_PIXELS:
                raise SampleError(
                    f"image of {image.width} x {image.height} pixels (limit: {MAX_PIXELS:,} in all)"
                )
            image.load()
            return _upright(_rgb(image), image)
    except SampleError:
        raise
    except UnidentifiedImageError as error:
        # its own message names an address in memory, so would differ from run to run
        raise SampleError("image cannot be decoded: neither JPEG, PNG nor WebP") from error
    # the decoders meet malformed files with anything from struct.error to KeyError
    except Exception as error:
        raise SampleError(f"image cannot be decoded: {error or type(error).__name__}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16-bit grey PNG; Pillow's own conversion clips at 255, which makes nearly all of it white
        values = np.asarray(image)
        gray = (np.clip(values, 0, 65535) >> 8).astype(np.uint8)
        if "transparency" in image.info:
            gray[values == image.info["transparency"]] = 255
        return Image.fromarray(gray).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        # transparent pixels carry arbitrary colours; white is what a page would show
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image, source: Image.Image) -> Image.Image:
    """Turn `image` as the EXIF data of `source` say.

    As ImageOps.exif_transpose, which however also rewrites the EXIF data and fails on odd ones.
    """
    try:
        orientation = source.getexif().get(ExifTags.Base.Orientation)
        method = UPRIGHT.get(int(orientation or 0))
    except Exception:
        return image  # metadata that cannot be read say nothing about the pixels
    return image if method is None else image.transpose(method)


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


def training_image(data: bytes, transform: ImageTransform, rng: np.random.Generator) -> Tensor:
    """Random resized crop, mirror and colour jitter -> (3, size, size) uint8."""
    image = decode_image(data)
    box = random_crop_box(image.width, image.height, transform, rng)
    size = (transform.size, transform.size)
    image = image.resize(size, transform.filter, box=box, reducing_gap=2.0)
    if rng.random() < transform.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.array(image)
    if transform.brightness or transform.contrast or transform.saturation:
        pixels = _jitter(pixels, transform, rng)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


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

    x = pixels.astype(np.float32) * factor(transform.brightness)
    mean = x.mean(dtype=np.float32)
    x = mean + (x - mean) * factor(transform.contrast)
    gray = x @ np.array([0.299, 0.587, 0.114], np.float32)
    x = gray[..., None] + (x - gray[..., None]) * factor(transform.saturation)
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)
