"""The compiled decoder against libjpeg-turbo: the same bytes, or none."""

import io
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from groundwork.kernels import host_compiler, jpeg_crop
from groundwork.kernels.host_compiler import find_compiler, instruction_set
from groundwork.kernels.jpeg_crop import find_jpeg_crop

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

WIDTH, HEIGHT = 113, 86


def jpeg(mode: str = "RGB", **options: object) -> bytes:
    """Smooth in one half, noise in the other."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2] = np.linspace(0, 255, WIDTH // 2)[None, :, None]
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **{"quality": 85, **options})
    return file.getvalue()


def library(data: bytes, scale: int) -> np.ndarray:
    sizes = {"min_height": -(-HEIGHT // scale), "min_width": -(-WIDTH // scale)}
    return simplejpeg.decode_jpeg(data, **sizes)


PLAIN = {
    "4:4:4": jpeg(subsampling=0),
    "4:2:2": jpeg(subsampling=1),
    "4:2:0": jpeg(subsampling=2),
    "grey": jpeg("L"),
    "optimised": jpeg(optimize=True),
    "restarts": jpeg(restart_marker_blocks=5),
    "restarts of rows": jpeg(restart_marker_rows=1, subsampling=1),
    "coarse": jpeg(quality=1),
    "exact": jpeg(quality=100, subsampling=0),
}


def instruction_sets() -> list[str]:
    ascending = ["DEFAULT", "AVX2", "AVX512"]
    return ascending[: ascending.index(instruction_set()) + 1]


@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_every_part_is_decoded_as_by_the_library(
    kind: str, scale: int, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = jpeg_crop._function(instructions)
    monkeypatch.setattr(jpeg_crop, "_function", lambda: function)
    whole = library(PLAIN[kind], scale)
    height, width, _ = whole.shape
    rng = np.random.default_rng(scale)
    boxes = [(0, 0, width, height), (width - 1, height - 1, width, height), (0, 0, 1, 1)]
    for _ in range(15):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        right, bottom = int(rng.integers(left, width)) + 1, int(rng.integers(top, height)) + 1
        boxes.append((left, top, right, bottom))
    for box in boxes:
        pixels = jpeg_crop.jpeg_crop(PLAIN[kind], WIDTH, HEIGHT, scale, box)
        assert pixels is not None
        assert np.array_equal(pixels, whole[box[1] : box[3], box[0] : box[2]])


@pytest.mark.parametrize(
    "data",
    [jpeg(progressive=True), jpeg("CMYK"), b"", b"\xff\xd8", bytes(500), PLAIN["4:2:0"][2:]],
    ids=["progressive", "CMYK", "empty", "start only", "zeros", "no start"],
)
def test_other_files_are_left_to_a_library(data: bytes) -> None:
    assert jpeg_crop.jpeg_crop(data, WIDTH, HEIGHT, 1, (0, 0, 10, 10)) is None


@pytest.mark.parametrize("kind", PLAIN)
def test_a_file_cut_off_is_left_to_a_library(kind: str) -> None:
    data = PLAIN[kind]
    for keep in [*range(0, len(data) - 1, 37), len(data) - 2, len(data) - 1]:
        assert jpeg_crop.jpeg_crop(data[:keep], WIDTH, HEIGHT, 1, (0, 0, 16, 8)) is None
    assert jpeg_crop.jpeg_crop(data, WIDTH, HEIGHT, 1, (0, 0, 16, 8)) is not None


@pytest.mark.parametrize(
    "box", [(-1, 0, 5, 5), (0, 0, 0, 5), (5, 5, 4, 9), (0, 0, WIDTH + 1, 5), (0, 0, 5, 1 << 40)]
)
def test_a_box_outside_is_not_decoded(box: tuple[int, int, int, int]) -> None:
    assert jpeg_crop.jpeg_crop(PLAIN["grey"], WIDTH, HEIGHT, 1, box) is None


def test_another_size_than_that_of_the_header_is_not_decoded() -> None:
    assert jpeg_crop.jpeg_crop(PLAIN["grey"], WIDTH + 8, HEIGHT, 1, (0, 0, 5, 5)) is None


def test_without_a_compiler_libraries_decode_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GROUNDWORK_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    jpeg_crop._function.cache_clear()
    host_compiler.load_host_library.cache_clear()
    with caplog.at_level("INFO"):
        assert find_jpeg_crop() is None
    assert "no C++ compiler" in caplog.text
