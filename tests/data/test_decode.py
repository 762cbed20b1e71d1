"""Crops of JPEGs: every decoder against a full decode, damaged files, and where the pixels lie."""

import io
import itertools
import struct
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from groundwork.data import decode
from groundwork.data.decode import Box, JpegCrop, decode_image, decode_jpeg_crop, open_image
from groundwork.data.samples import SampleError
from groundwork.data.transforms import ImageTransform, random_crop_box, training_image
from groundwork.kernels.jpeg_crop import find_jpeg_crop

DECODERS = ("compiled", "simplejpeg", "pillow")


@pytest.fixture(params=DECODERS)
def jpeg_crop(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[JpegCrop | None]:
    """Each decoder in turn, as the one that is asked first."""
    compiled = find_jpeg_crop()
    if request.param == "compiled" and compiled is None:
        pytest.skip("no C++ compiler here")
    if request.param == "pillow":
        monkeypatch.setattr(decode, "simplejpeg", None)
    yield compiled if request.param == "compiled" else None


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise of all octaves, as photographs have it, and an edge."""
    rng = np.random.default_rng(seed)
    pixels, side = np.zeros((height, width, 3), np.float32), 2
    while side < 2 * max(width, height):
        shape = [max(1, round(side * n / max(width, height))) for n in (height, width)]
        for channel in range(3):
            plane = Image.fromarray(rng.standard_normal(shape).astype(np.float32))
            pixels[..., channel] += np.asarray(plane.resize((width, height))) * side**-0.4
        side *= 2
    pixels *= 45 / max(float(pixels.std()), 1)
    pixels[height // 3 : height // 2, width // 4 :] += 60
    return Image.fromarray(np.clip(pixels + 120, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


@cache
def kinds(width: int, height: int) -> dict[str, bytes]:
    image = photograph(width, height)
    return {
        "4:4:4": jpeg(image, subsampling=0),
        "4:2:2": jpeg(image, subsampling=1),
        "4:2:0": jpeg(image, subsampling=2),
        "grey": jpeg(image.convert("L")),
        "optimised": jpeg(image, optimize=True),
        "progressive": jpeg(image, progressive=True),
        "progressive grey": jpeg(image.convert("L"), progressive=True),
        "restarts": jpeg(image, restart_marker_blocks=3),
        "restarts of rows": jpeg(image, subsampling=0, restart_marker_rows=1),
        "CMYK": jpeg(image.convert("CMYK")),
        "coarse": jpeg(image, quality=4),
        "fine": jpeg(image, quality=99),
    }


KINDS = tuple(kinds(8, 8))


def fully_decoded(data: bytes, k: int) -> np.ndarray:
    """The oracle: Pillow, the whole picture at 1/k."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (image.width // k, image.height // k))
    return np.asarray(image.convert("RGB"))


def decoded_box(data: bytes, box: Box, size: int) -> tuple[int, Box]:
    """Which pixels, of the picture at 1/k, the crop consists of."""
    asked: list[tuple[int, Box]] = []

    def note(_: bytes, width: int, height: int, k: int, scaled: Box) -> np.ndarray:
        asked.append((k, scaled))
        return np.zeros((scaled[3] - scaled[1], scaled[2] - scaled[0], 3), np.uint8)

    decode_jpeg_crop(data, open_image(data), box, size, note)
    return asked[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(97, 61), (64, 80), (8, 8), (9, 30), (250, 201), (3, 5), (1, 1)])
def test_a_crop_is_cut_from_the_whole_picture(
    kind: str, size: tuple[int, int], jpeg_crop: JpegCrop | None
) -> None:
    width, height = size
    data = kinds(width, height)[kind]
    rng = np.random.default_rng(width)
    for _ in range(12):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        box = (left, top, int(rng.integers(left, width)) + 1, int(rng.integers(top, height)) + 1)
        out = int(rng.integers(1, 40))
        k, (x0, y0, x1, y1) = decoded_box(data, box, out)
        crop = decode_jpeg_crop(data, open_image(data), box, out, jpeg_crop)
        assert np.array_equal(crop, fully_decoded(data, k)[y0:y1, x0:x1])


@given(data=st.data(), width=st.integers(1, 300), height=st.integers(1, 300))
@settings(max_examples=150, deadline=None)
def test_the_part_decoded_is_the_crop_at_the_smallest_scale(
    data: st.DataObject, width: int, height: int
) -> None:
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right = data.draw(st.integers(left + 1, width))
    bottom = data.draw(st.integers(top + 1, height))
    size = data.draw(st.integers(1, 64))
    file = jpeg(Image.new("L", (width, height)))
    k, box = decoded_box(file, (left, top, right, bottom), size)
    shorter = min(right - left, bottom - top)
    assert k == 1 or shorter >= k * size
    assert k == 8 or shorter < 2 * k * size
    for begin, end, x0, x1, length in (
        (left, right, box[0], box[2], width),
        (top, bottom, box[1], box[3], height),
    ):
        assert 0 <= x0 < x1 <= -(-length // k)
        assert x1 - x0 == (end - begin) // k
        assert k * x1 <= length  # no pixel that lies beyond the edge of the picture
        assert abs(k * x0 - begin) < k
        assert abs(k * x1 - end) < k


@pytest.mark.parametrize("kind", ["4:2:0", "progressive", "CMYK", "grey"])
def test_a_file_cut_off_anywhere_is_refused(kind: str, jpeg_crop: JpegCrop | None) -> None:
    data = kinds(120, 90)[kind]
    for keep in np.linspace(4, len(data) - 3, 40).astype(int):
        with pytest.raises(SampleError, match="image cannot be decoded"):
            # the crop lies at the top, and what is cut off mostly below it
            decode_jpeg_crop(data[:keep], open_image(data[:keep]), (10, 0, 60, 20), 16, jpeg_crop)


DAMAGED = [
    jpeg(photograph(56, 41, i), subsampling=i % 3, **options)
    for i, options in enumerate(({}, {"optimize": True}, {}, {"restart_marker_blocks": 3}))
] + [jpeg(photograph(33, 50).convert("L")), jpeg(photograph(33, 50), progressive=True)]


@given(
    file=st.sampled_from(DAMAGED),
    changes=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 255), st.booleans()), min_size=1, max_size=3
    ),
    keep=st.just(1.0) | st.floats(0, 1),
    corner=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)),
    size=st.integers(1, 20),
)
@settings(max_examples=400, deadline=None)
def test_all_decoders_agree_about_damaged_files(
    file: bytes,
    changes: list[tuple[float, int, bool]],
    keep: float,
    corner: tuple[float, float],
    size: int,
) -> None:
    damaged = bytearray(file)
    for place, value, in_header in changes:
        damaged[int(place * (min(700, len(file)) if in_header else len(file) - 1))] = value
    data = bytes(damaged[: int(keep * len(damaged))])
    try:
        image = open_image(data)
    except SampleError:
        return
    width, height = image.size
    if decode.jpeg_turn(image) is None or width * height > 100_000:
        return
    left, top = int(corner[0] * width), int(corner[1] * height)
    box = (left, top, max(left + 1, width * 9 // 10), max(top + 1, height * 9 // 10))
    seen = []
    for name in DECODERS:
        with pytest.MonkeyPatch.context() as patch:
            if name == "pillow":
                patch.setattr(decode, "simplejpeg", None)
            first = find_jpeg_crop() if name == "compiled" else None
            try:
                seen.append(decode_jpeg_crop(data, open_image(data), box, size, first))
            except SampleError:
                seen.append(None)
    if seen[-1] is None:
        assert all(crop is None for crop in seen)
    else:
        assert all(np.array_equal(crop, seen[-1]) for crop in seen if crop is not None)
        assert all(crop is not None for crop in seen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width, height", [(480, 360), (301, 777)])
def test_a_training_image_looks_like_a_resized_full_decode(
    kind: str, width: int, height: int, jpeg_crop: JpegCrop | None
) -> None:
    if kind == "coarse":
        pytest.skip("blocks of 8 pixels: the scaled transform and the filter differ at their edges")
    data = kinds(width, height)[kind]
    for size, seed in itertools.product((32, 64, 128), range(2)):
        transform = ImageTransform(size=size, scale=(0.3, 1.0))
        pixels = training_image(data, transform, np.random.default_rng(seed), jpeg_crop=jpeg_crop)
        box = random_crop_box(width, height, transform, np.random.default_rng(seed))
        k, scaled = decoded_box(data, box, size)
        moved = tuple(k * edge for edge in scaled)
        whole = decode_image(data)
        expected = np.asarray(whole.resize((size, size), transform.filter, box=moved))
        error = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected).mean()
        # of 4:2:2 the library scales the chroma down in both directions, though it needs only one
        limit = 3.5 if kind == "4:2:2" else 2.5
        assert error < (limit if k > 1 else 0.3)


def gradient(width: int, height: int) -> np.ndarray:
    """Red rises to the right and green downwards, linearly: 16 at one edge, 240 at the other."""
    y, x = np.mgrid[:height, :width]
    red, green = 16 + 224 * (x + 0.5) / width, 16 + 224 * (y + 0.5) / height
    return np.stack([red, green, np.full_like(red, 128)], -1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [16, 40, 90])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_pixels_lie_where_they_lay(
    orientation: int, size: int, subsampling: int, jpeg_crop: JpegCrop | None
) -> None:
    """By the colours of a gradient, to a tenth of a pixel of the tensor, for every scale."""
    width, height = 256, 320
    undone = {6: 8, 8: 6}.get(orientation, orientation)  # turns the upright picture into its file

    def stored(upright: Image.Image) -> Image.Image:
        method = decode.UPRIGHT.get(undone)
        return upright if method is None else upright.transpose(method)

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = Image.fromarray(gradient(width, height).round().astype(np.uint8))
    data = jpeg(stored(picture), quality=100, subsampling=subsampling, exif=exif)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    places = [np.asarray(stored(Image.fromarray(place))) for place in (x, y)]
    transform = ImageTransform(size=size, scale=(0.4, 1.0), resample="bilinear")
    for seed in range(2):
        pixels = training_image(data, transform, np.random.default_rng(seed), jpeg_crop=jpeg_crop)
        box = random_crop_box(width, height, transform, np.random.default_rng(seed))
        corners = [(box[0], box[1]), (box[2] - 1, box[3] - 1)]
        at = [np.argwhere((places[0] == x) & (places[1] == y))[0] for x, y in corners]
        (top, left), (bottom, right) = np.minimum(*at), np.maximum(*at) + 1
        k, scaled = decoded_box(data, (int(left), int(top), int(right), int(bottom)), size)
        x0, y0, x1, y1 = (k * edge for edge in scaled)
        for channel, axis, drawn, length in (
            (0, 0, (box[0], box[2]), width),
            (1, 1, (box[1], box[3]), height),
        ):
            shown = places[channel][y0:y1, x0:x1]
            begin, end = float(shown.min()), float(shown.max()) + 1
            assert max(abs(begin - drawn[0]), abs(end - drawn[1])) < k
            step = (end - begin) / size
            line = pixels[channel].double().mean(axis).numpy()[2:-2]
            seen = (line - 16) / 224 * length  # the place in the upright picture
            shift = seen - (begin + (np.arange(size) + 0.5)[2:-2] * step)
            assert abs(shift.mean()) < 0.1 * step
            # rounding to levels is the rest
            assert np.abs(shift).max() < 0.1 * step + 1.2 * length / 224


def test_of_several_pictures_in_a_file_the_first_counts(jpeg_crop: JpegCrop | None) -> None:
    first, second = photograph(80, 60, 1), photograph(80, 60, 2)
    file = io.BytesIO()
    first.save(file, "MPO", save_all=True, append_images=[second], quality=90)
    data = file.getvalue()
    assert open_image(data).format == "MPO"
    crop = decode_jpeg_crop(data, open_image(data), (3, 5, 70, 50), 40, jpeg_crop)
    assert np.array_equal(crop, fully_decoded(data, 1)[5:50, 3:70])


def test_a_jpeg_that_claims_to_be_huge_is_refused_before_it_is_decoded() -> None:
    data = bytearray(jpeg(photograph(64, 64)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 17_500, 10_000)

    def decodes(*_: object) -> np.ndarray:
        raise AssertionError("decoded")

    with pytest.raises(SampleError, match="image of 10000 x 17500 pixels"):
        training_image(
            bytes(data), ImageTransform(size=8), np.random.default_rng(0), jpeg_crop=decodes
        )


def test_damage_below_the_crop_does_not_change_it(jpeg_crop: JpegCrop | None) -> None:
    data = jpeg(photograph(120, 160))
    damaged = bytearray(data)
    damaged[-200:-100] = bytes(100)
    box = (0, 0, 100, 60)
    crops = [decode_jpeg_crop(d, open_image(d), box, 50, jpeg_crop) for d in (data, bytes(damaged))]
    assert np.array_equal(*crops)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d + b"trailing bytes \xff\xd8",
        lambda d: d[:2] + b"\xff\xfe\x00\x09comment" + d[2:],
        lambda d: d[:2] + b"\xff" + d[2:],  # a fill byte before a marker
        lambda d: d[:-2] + bytes(50) + d[-2:],
    ],
    ids=["behind the end", "comment", "fill byte", "before the end"],
)
def test_harmless_oddities_do_not_matter(
    change: Callable[[bytes], bytes], jpeg_crop: JpegCrop | None
) -> None:
    data = jpeg(photograph(90, 70))
    odd = change(data)
    crop = decode_jpeg_crop(odd, open_image(odd), (4, 0, 81, 66), 20, jpeg_crop)
    assert np.array_equal(
        crop, decode_jpeg_crop(data, open_image(data), (4, 0, 81, 66), 20, jpeg_crop)
    )
