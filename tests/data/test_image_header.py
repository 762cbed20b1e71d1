import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from groundwork.data.image_header import UNKNOWN, image_size


def encoded(
    size: tuple[int, int], image_format: str, mode: str = "RGB", **options: object
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, image_format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


KINDS = {
    "baseline JPEG": ("JPEG", "RGB", {}),
    "progressive JPEG": ("JPEG", "L", {"progressive": True}),
    "CMYK JPEG": ("JPEG", "CMYK", {}),
    "JPEG with a profile of three segments": ("JPEG", "RGB", {"icc_profile": bytes(180_000)}),
    "rotated JPEG": ("JPEG", "RGB", {"exif": exif(6)}),
    "JPEG with restarts": ("JPEG", "RGB", {"restart_marker_rows": 1}),
    "PNG": ("PNG", "RGB", {}),
    "PNG with a palette": ("PNG", "P", {}),
    "16-bit PNG": ("PNG", "I;16", {}),
    "lossy WebP": ("WEBP", "RGB", {}),
    "lossy WebP with alpha": ("WEBP", "RGBA", {}),
    "lossless WebP": ("WEBP", "RGB", {"lossless": True}),
    "WebP with EXIF": ("WEBP", "RGB", {"exif": exif(6)}),
}


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (640, 480), (4097, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_the_stored_one(kind: str, size: tuple[int, int]) -> None:
    image_format, mode, options = KINDS[kind]
    data = encoded(size, image_format, mode, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == size
    assert image_size(data) == size


def test_fill_bytes_and_lone_markers_of_a_jpeg_are_passed_over() -> None:
    data = encoded((9, 5), "JPEG")
    assert image_size(data[:2] + b"\xff\xff\xff\xff\x01" + data[2:]) == (9, 5)
    assert image_size(data[:2] + b"\xff\xd9" + data[2:]) == UNKNOWN


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_beginning_gives_the_size_or_nothing(kind: str) -> None:
    data = encoded((9, 5), kind)
    found = [image_size(data[:end]) for end in range(len(data))]
    assert set(found) == {UNKNOWN, (9, 5)}
    assert found == sorted(found)  # once known it stays


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>",
        b"GIF89a" + bytes(40),
        b"\xff\xd8\xff" + b"\xff" * 99,
        b"\xff\xd8\xff\xe0\0\0" * 30,
        b"\xff\xd8\xff\xc0\0\x0b\x08\0\0\0\x07\x01" + bytes(9),  # height 0: it follows the scan
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\xff" * 20,
        b"RIFF\0\0\0\0WEBPVP8?" + bytes(30),
    ],
)
def test_anything_else_is_unknown(data: bytes) -> None:
    assert image_size(data) == UNKNOWN


BEGINNINGS = [encoded((30, 20), kind) for kind in ("JPEG", "PNG", "WEBP")] + [b""]


@settings(max_examples=500, deadline=None)
@given(
    beginning=st.sampled_from(BEGINNINGS),
    keep=st.integers(0, 64),
    rest=st.binary(max_size=300),
    flips=st.lists(st.tuples(st.integers(0, 63), st.integers(1, 255)), max_size=4),
)
def test_garbage_gives_a_plausible_size_or_none(
    beginning: bytes, keep: int, rest: bytes, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(beginning[:keep] + rest)
    for place, mask in flips:
        if place < len(data):
            data[place] ^= mask
    width, height = image_size(bytes(data))
    assert (width > 0) == (height > 0)
    assert 0 <= width < 2**31
    assert 0 <= height < 2**31
