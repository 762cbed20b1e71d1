"""Image transforms against torchvision, and what must not pass for a picture."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from groundwork.data.samples import SampleError
from groundwork.data.transforms import (
    ImageTransform,
    decode_image,
    evaluation_image,
    random_crop_box,
    training_image,
)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (33, 90), (17, 16), (500, 31)])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_evaluation_is_torchvisions_resize_and_centre_crop(
    size: tuple[int, int], resample: str
) -> None:
    image = noise(*size)
    transform = ImageTransform(size=32, resample=resample)  # type: ignore[arg-type]
    theirs = v2.Compose([v2.Resize(32, v2.InterpolationMode(resample)), v2.CenterCrop(32)])(image)
    expected = torch.from_numpy(np.array(theirs)).permute(2, 0, 1)
    assert torch.equal(evaluation_image(encoded(image), transform), expected)


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    seed=st.integers(0, 2**31),
    low=st.floats(0.05, 1.0),
)
def test_a_crop_lies_inside_and_keeps_its_bounds(
    width: int, height: int, seed: int, low: float
) -> None:
    transform = ImageTransform(scale=(low, 1.0))
    rng = np.random.default_rng(seed)
    left, top, right, bottom = random_crop_box(width, height, transform, rng)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_a_generator_decides_the_training_image() -> None:
    data = encoded(noise(60, 50))
    transform = ImageTransform(size=24, flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4)
    first, again, other = (
        training_image(data, transform, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (3, 24, 24)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_mode_comes_out_as_rgb(mode: str) -> None:
    image = Image.new("RGB", (8, 8), (255, 255, 255) if mode == "1" else (200, 200, 200)).convert(
        mode, palette=Image.Palette.ADAPTIVE
    )
    decoded = decode_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert decoded.mode == "RGB"
    assert np.abs(np.array(decoded).astype(int) - (255 if mode == "1" else 200)).max() <= 6


def test_sixteen_bits_are_scaled_and_not_cut() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    decoded = np.array(decode_image(encoded(Image.fromarray(ramp))))[..., 0]
    assert np.abs(decoded.astype(float) - ramp / 257).max() <= 1


def test_transparency_shows_white() -> None:
    decoded = decode_image(encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 0))))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>not found</html>", encoded(noise(64, 64), "JPEG")[:700], bomb()],
    ids=["empty", "web page", "truncated", "bomb"],
)
def test_what_is_no_picture_is_a_sample_error(data: bytes) -> None:
    with pytest.raises(SampleError):
        decode_image(data)
