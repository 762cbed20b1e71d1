"""Image transforms against torchvision, and what must not pass for a picture."""

import io
import math
import os
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from scipy import stats
from torchvision.transforms import RandomResizedCrop, v2

from groundwork.data.decode import decode_image
from groundwork.data.samples import SampleError
from groundwork.data.transforms import (
    ImageTransform,
    evaluation_image,
    random_crop_box,
    training_image,
    training_images,
)
from groundwork.kernels.jpeg_crop import find_jpeg_crop


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


@pytest.mark.parametrize("size", [(64, 4000), (3000, 40)])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_a_strip_is_resized_where_it_is_kept(size: tuple[int, int], resample: str) -> None:
    image = noise(*size)
    transform = ImageTransform(size=32, resample=resample)  # type: ignore[arg-type]
    theirs = v2.Compose([v2.Resize(32, v2.InterpolationMode(resample)), v2.CenterCrop(32)])(image)
    expected = torch.from_numpy(np.array(theirs)).permute(2, 0, 1)
    difference = evaluation_image(encoded(image), transform).int() - expected.int()
    assert difference.abs().max() <= 1


def test_a_line_of_pixels_takes_no_memory() -> None:
    data = encoded(Image.new("RGB", (1_000_000, 1), "red"))
    pixels = evaluation_image(data, ImageTransform(size=224))  # as a whole 150 GB
    assert torch.equal(pixels[:, 0, 0], torch.tensor([255, 0, 0], dtype=torch.uint8))
    assert (pixels == pixels[:, :1, :1]).all()


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


@given(
    width=st.integers(60, 400),
    height=st.integers(60, 400),
    seed=st.integers(0, 2**31),
    low=st.floats(0.05, 0.6),
    ratio=st.floats(0.5, 1.0),
)
def test_a_crop_keeps_to_its_area_and_aspect_ratio(
    width: int, height: int, seed: int, low: float, ratio: float
) -> None:
    transform = ImageTransform(scale=(low, 0.7), ratio=(ratio, 1 / ratio))
    box = random_crop_box(width, height, transform, np.random.default_rng(seed))
    w, h = box[2] - box[0], box[3] - box[1]
    pixel = 1 / w + 1 / h  # what rounding both sides to pixels can change, relatively
    assert ratio * (1 - pixel) <= w / h <= 1 / ratio * (1 + pixel)
    # else all ten draws may be too long
    fits = math.sqrt(0.7 * width * height / ratio) <= min(width, height)
    assert not fits or low * (1 - pixel) <= w * h / (width * height) <= 0.7 * (1 + pixel)


@pytest.mark.parametrize("size", [(300, 300), (400, 250), (120, 500)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    width, height = size
    transform = ImageTransform(scale=(0.08, 1.0))
    rng = np.random.default_rng(0)
    boxes = [random_crop_box(width, height, transform, rng) for _ in range(1500)]
    ours = np.array([(x, y, right - x, bottom - y) for x, y, right, bottom in boxes])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        picture = torch.empty(1, height, width)
        draws = [
            RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(1500)
        ]
    theirs = np.array([(left, top, w, h) for top, left, h, w in draws])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001
    ratios = [boxes_[:, 2] / boxes_[:, 3] for boxes_ in (ours, theirs)]
    assert stats.ks_2samp(*ratios).pvalue > 0.001


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 77), (5, 5)])
def test_a_crop_that_cannot_fit_is_the_largest_one_in_the_centre(size: tuple[int, int]) -> None:
    width, height = size
    # the side ratio that torchvision falls back to is the nearest one allowed
    transform = ImageTransform(scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3))
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, round(height * ratio)), min(height, max(1, round(width / ratio)))
    left, top = (width - w) // 2, (height - h) // 2
    for seed in range(5):
        box = random_crop_box(width, height, transform, np.random.default_rng(seed))
        assert box == (left, top, left + w, top + h)


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
    decoded = np.array(decode_image(encoded(Image.fromarray(ramp))))
    assert np.abs(decoded.astype(float) - ramp[..., None] / 257).max() <= 1


def png(colour_type: int, depth: int, rows: np.ndarray, **chunks: bytes) -> bytes:
    """A PNG put together by hand; Pillow writes few of the kinds. rows: (H, bytes of a row)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    width = rows.shape[1] * 8 // (depth * channels)
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    signature = b"\x89PNG\r\n\x1a\n"
    ending = chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return signature + chunk(b"IHDR", header) + extra + ending


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
def test_pictures_of_sixteen_bits_look_like_those_of_eight(colour_type: int) -> None:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    values = np.random.default_rng(0).integers(0, 65536, (6, 5, channels), np.uint16)
    if colour_type in (4, 6):
        values[..., -1] = np.where(values[..., -1] > 30_000, 65535, 0)
    deep = png(colour_type, 16, values.astype(">u2").view(np.uint8).reshape(6, -1))
    flat = png(colour_type, 8, (values >> 8).astype(np.uint8).reshape(6, -1))
    deep_pixels, flat_pixels = (np.array(decode_image(data)).astype(int) for data in (deep, flat))
    assert np.abs(deep_pixels - flat_pixels).max() <= 1


def test_the_transparent_grey_of_sixteen_bits_shows_white() -> None:
    values = np.array([[1000, 20_000], [1001, 65_535]], np.uint16)
    data = png(0, 16, values.astype(">u2").view(np.uint8).reshape(2, -1), tRNS=b"\x03\xe8")
    assert np.array(decode_image(data))[..., 0].tolist() == [[255, 78], [3, 255]]


def test_transparency_shows_white() -> None:
    decoded = decode_image(encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 0))))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_a_transparent_palette_entry_shows_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    decoded = decode_image(encoded(image, transparency=transparency))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_shows_white(mode: str) -> None:
    image = Image.new(mode, (2, 1), 7 if mode == "L" else (7, 7, 7))
    image.putpixel((1, 0), 9 if mode == "L" else (9, 9, 9))
    decoded = decode_image(encoded(image, transparency=7 if mode == "L" else (7, 7, 7)))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 9, 9)]


def test_half_transparent_pixels_are_laid_on_white() -> None:
    decoded = decode_image(encoded(Image.new("RGBA", (1, 1), (0, 100, 200, 128))))
    expected = np.array([0, 100, 200]) * 128 / 255 + 127
    assert np.abs(np.array(decoded.getpixel((0, 0))) - expected).max() <= 1


@pytest.mark.parametrize("rgb", [(255, 0, 0), (0, 160, 80), (0, 0, 0), (255, 255, 255)])
def test_a_cmyk_jpeg_keeps_its_colours(rgb: tuple[int, int, int]) -> None:
    data = encoded(Image.new("RGB", (16, 16), rgb).convert("CMYK"), "JPEG", quality=100)
    assert np.abs(np.array(decode_image(data)).astype(int) - rgb).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_upright(kind: str, orientation: int) -> None:
    image = Image.new("RGB", (48, 32), (250, 250, 250))
    image.paste((200, 30, 30), (0, 0, 16, 16))
    image.paste((30, 30, 200), (32, 16, 48, 32))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(image, kind, exif=exif, quality=95)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.array(decode_image(data)), np.array(expected))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(40), b"?" * 30]
)
def test_exif_data_that_cannot_be_read_do_not_spoil_the_picture(exif: bytes) -> None:
    image = noise(16, 8)
    decoded = np.array(decode_image(encoded(image, "JPEG", exif=exif)))
    assert np.array_equal(decoded, np.array(decode_image(encoded(image, "JPEG"))))


def bomb(width: int, height: int) -> bytes:
    """A few bytes that claim to be a huge picture."""
    data = bytearray(png(2, 8, np.zeros((1, 3), np.uint8)))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def compressed_text_bomb() -> bytes:
    text = b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    return png(2, 8, np.zeros((1, 3), np.uint8), zTXt=text)


NO_PICTURES = {
    "empty": b"",
    "web page": b"<!DOCTYPE html><html>not found</html>",
    "truncated jpeg": encoded(noise(64, 64), "JPEG")[:700],
    "truncated png": encoded(noise(64, 64))[:-5000],
    "truncated webp": encoded(noise(64, 64), "WEBP")[:700],
    "bomb": bomb(100_000, 100_000),
    "bomb within Pillow's limit": bomb(17_500, 10_000),
    "header with a wrong checksum": bomb(4, 4)[:29] + b"1234" + bomb(4, 4)[33:],
    "compressed text": compressed_text_bomb(),
    "gif": encoded(noise(8, 8), "GIF"),
    "bmp": encoded(noise(8, 8), "BMP"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "pickle": b"cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_a_sample_error(name: str) -> None:
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(SampleError, match="image"):
        decode_image(NO_PICTURES[name])
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 5_000_000


def test_the_reason_is_the_same_on_every_run() -> None:
    """It is written down for the sample, and compared between runs."""
    reasons = set()
    for _ in range(2):
        with pytest.raises(SampleError) as caught:
            decode_image(NO_PICTURES["web page"])
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "0x" not in reasons.pop()


SEEDS = [encoded(noise(12, 9), kind) for kind in ("JPEG", "PNG", "WEBP")] + [
    encoded(noise(12, 9).quantize(8), transparency=0),
    encoded(noise(12, 9).convert("CMYK"), "JPEG"),
    png(0, 16, np.zeros((4, 8), np.uint8), tRNS=b"\0\0"),
]


@settings(deadline=None, max_examples=400)
@given(
    data=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=5),
    keep=st.floats(0, 1) | st.just(1.0),
)
def test_a_damaged_picture_is_decoded_or_is_a_sample_error(
    data: bytes, changes: list[tuple[float, int]], keep: float
) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * (len(damaged) - 1))] = value
    damaged = damaged[: int(len(damaged) * keep)]
    try:
        image = decode_image(bytes(damaged))
    except SampleError:
        return
    assert image.mode == "RGB"


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.4)},
        {"scale": (0.5, 1.1)},
        {"ratio": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
        {"flip": 1.5},
        {"brightness": -0.1},
    ],
)
def test_a_wrong_setting_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImageTransform(**wrong)  # type: ignore[arg-type]


def test_mirroring_is_as_frequent_as_asked() -> None:
    data = encoded(Image.fromarray(np.tile(np.arange(0, 240, 10), (24, 1)).astype(np.uint8)))
    transform = ImageTransform(size=8, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.3)
    flipped = 0
    for seed in range(600):
        row = training_image(data, transform, np.random.default_rng(seed))[0, 0].int()
        flipped += int(row[0] > row[-1])
    assert stats.binomtest(flipped, 600, 0.3).pvalue > 0.001


def test_settings_of_zero_leave_the_colours_alone() -> None:
    data = encoded(noise(16, 16))
    transform = ImageTransform(size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    pixels = training_image(data, transform, np.random.default_rng(0))
    assert torch.equal(pixels, evaluation_image(data, transform))


def generators(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng((7, i)) for i in range(count)]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_other_formats_are_cropped_and_resized_by_pillow(kind: str, resample: str) -> None:
    data = encoded(noise(90, 70), kind, lossless=True)
    transform = ImageTransform(size=24, resample=resample)  # type: ignore[arg-type]
    for seed in range(5):
        box = random_crop_box(90, 70, transform, np.random.default_rng(seed))
        expected = noise(90, 70).resize((24, 24), transform.filter, box=box, reducing_gap=2.0)
        pixels = training_image(data, transform, np.random.default_rng(seed))
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.array(expected))


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_a_jpeg_of_the_right_size_is_cut_and_resized_as_by_pillow(resample: str) -> None:
    # not so bright that a cubic overshoots: both cut its first pass to bytes, but rows and columns
    # may change places
    data = encoded(noise(90, 70).point(lambda level: 85 + level // 3), "JPEG", quality=90)
    transform = ImageTransform(size=48, resample=resample)  # type: ignore[arg-type]
    for seed in range(5):
        box = random_crop_box(90, 70, transform, np.random.default_rng(seed))
        crop = decode_image(data).crop(box)
        expected = np.array(crop.resize((48, 48), transform.filter))
        pixels = training_image(data, transform, np.random.default_rng(seed))
        difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.max() <= 2  # two roundings
        assert difference.mean() < 0.3


MIXED = [
    encoded(noise(90, 70), "JPEG"),
    encoded(noise(40, 60)),
    b"<!DOCTYPE html>",
    encoded(noise(300, 200), "JPEG", progressive=True),
    encoded(noise(64, 64), "JPEG")[:700],
    encoded(noise(50, 50), "WEBP"),
    b"",
    encoded(noise(33, 47).convert("L"), "JPEG"),
]
BAD = (2, 4, 6)


@pytest.mark.parametrize("threads", [1, 2, 5, 20])
def test_a_batch_is_its_pictures_and_its_errors(threads: int) -> None:
    transform = ImageTransform(
        size=20, flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, scale=(0.2, 1.0)
    )
    images, errors = training_images(
        MIXED, transform, generators(8), threads=threads, jpeg_crop=find_jpeg_crop()
    )
    assert images.shape == (8, 3, 20, 20)
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    for i, (data, rng) in enumerate(zip(MIXED, generators(8), strict=True)):
        if i in BAD:
            with pytest.raises(SampleError) as caught:
                training_image(data, transform, rng)
            assert str(errors[i]) == str(caught.value)
            assert not images[i].any()
        else:
            assert errors[i] is None
            assert torch.equal(images[i], training_image(data, transform, rng))


def test_an_empty_batch_has_no_pictures() -> None:
    images, errors = training_images([], ImageTransform(size=20), [])
    assert images.shape == (0, 3, 20, 20)
    assert errors == []


def test_a_batch_needs_a_generator_for_every_picture() -> None:
    with pytest.raises(ValueError, match="8 files, 7 generators"):
        training_images(MIXED, ImageTransform(size=20), generators(7))


def test_decoding_in_threads_leaves_the_filters_of_warnings_alone() -> None:
    before = list(warnings.filters)
    training_images(MIXED * 4, ImageTransform(size=20), generators(32), threads=4)
    assert warnings.filters == before


def test_the_resized_pixels_do_not_depend_on_the_processor() -> None:
    """torch without vector instructions gives the same bytes."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("there are no vector instructions to be without")
    code = """
import hashlib, io, numpy, sys
from PIL import Image
from groundwork.data.transforms import ImageTransform, training_image
pixels = numpy.random.default_rng(0).integers(0, 256, (90, 120, 3), numpy.uint8)
file = io.BytesIO()
Image.fromarray(pixels).save(file, "JPEG")
seen = hashlib.sha256()
for resample in ("bilinear", "bicubic"):
    for size in (7, 32, 64, 150):
        transform = ImageTransform(size=size, resample=resample)
        image = training_image(file.getvalue(), transform, numpy.random.default_rng(size))
        seen.update(image.numpy().tobytes())
print(seen.hexdigest())
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **capability, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for capability in ({}, {"ATEN_CPU_CAPABILITY": "default"})
    }
    assert len(outputs) == 1
