"""Encoded files -> pixels: whole pictures, or only the part of a JPEG that a crop needs.

A picture is seen as a browser shows it: turned by its EXIF orientation (whoever wrote the caption
saw it upright), transparent parts on white, grey scales of 16 bits brought to 8.

Of a JPEG, `decode_jpeg_crop` decodes no more than a crop of known size needs: at 1/2, 1/4 or 1/8
where the crop is that much larger than the tensor (the inverse DCT then gives fewer pixels), and no
further down than the crop reaches. Three decoders give the same pixels, so that it matters only for
speed which of them are at hand: a `JpegCrop` that the caller brings, simplejpeg and Pillow, which
both contain libjpeg-turbo. They are asked in this order, and Pillow decides about every file that
the others do not find flawless. What is accepted is therefore what Pillow accepts: a file that is
cut off is refused, wherever the crop lies; damage below the crop is not looked for.
"""

import io
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from groundwork.data.diagnosis import Diagnosis
from groundwork.data.samples import SampleError

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: the same pixels from Pillow, less quickly
    simplejpeg = None

#: Pixels above which a file is taken for a decompression bomb (the largest photographs have fewer).
#: Pillow has a limit of its own, 178,956,970, above which it opens nothing.
MAX_PIXELS = 170_000_000
#: EXIF orientation -> what makes the stored picture upright (Exif 2.3, tag 274).
UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: (left, top, right, bottom) in pixels; the last two are outside.
Box = tuple[int, int, int, int]
#: Decodes (file, width, height, k, box of the picture at 1/k) exactly as libjpeg-turbo does by
#: default -> (h, w, 3) uint8; None for files that a library has to look at.
JpegCrop = Callable[[bytes, int, int, int, Box], np.ndarray | None]


class Turn(NamedTuple):
    """What makes stored pixels upright: first rows and columns change places, then the mirrors."""

    transposed: bool = False
    flip_y: bool = False
    flip_x: bool = False

    def upright_size(self, width: int, height: int) -> tuple[int, int]:
        return (height, width) if self.transposed else (width, height)

    def stored_box(self, box: Box, width: int, height: int) -> Box:
        """A box of the upright picture in coordinates of the stored one, `width` x `height`."""
        left, top, right, bottom = box
        upright_width, upright_height = self.upright_size(width, height)
        if self.flip_x:
            left, right = upright_width - right, upright_width - left
        if self.flip_y:
            top, bottom = upright_height - bottom, upright_height - top
        return (top, left, bottom, right) if self.transposed else (left, top, right, bottom)


#: The same as UPRIGHT, for arrays.
TURNS: Final = {
    2: Turn(flip_x=True),
    3: Turn(flip_y=True, flip_x=True),
    4: Turn(flip_y=True),
    5: Turn(transposed=True),
    6: Turn(transposed=True, flip_x=True),
    7: Turn(transposed=True, flip_y=True, flip_x=True),
    8: Turn(transposed=True, flip_y=True),
}


def decode_image(data: bytes) -> Image.Image:
    """Decode to upright RGB.

    Raises SampleError for what is no image, is cut off, or is over MAX_PIXELS; the size is checked
    before a pixel is decoded.
    """
    with ignoring_warnings():
        return decode_opened(open_image(data))


@contextmanager
def ignoring_warnings() -> Iterator[None]:
    """Without Pillow's warnings of large images and corrupt metadata; what matters of it ends in
    an error. Of the whole process, so not for threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_image(data: bytes) -> Image.Image:
    """Read the header. Raises SampleError as `decode_image`; Pillow's warnings are the caller's."""
    if not data:
        raise SampleError("no image: the member is missing or empty", Diagnosis.EMPTY_IMAGE)
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except UnidentifiedImageError as error:
        # its own message names an address in memory, so would differ from run to run
        raise SampleError(
            "image cannot be decoded: neither JPEG, PNG nor WebP", Diagnosis.NOT_AN_IMAGE
        ) from error
    except Exception as error:
        raise _undecodable(error) from error
    if image.width * image.height > MAX_PIXELS:
        raise SampleError(
            f"image of {image.width} x {image.height} pixels (limit: {MAX_PIXELS:,} in all)",
            Diagnosis.TOO_MANY_PIXELS,
        )
    return image


def decode_opened(image: Image.Image) -> Image.Image:
    """The pixels of an opened image: upright RGB. Raises SampleError."""
    try:
        image.load()
        method = UPRIGHT.get(_orientation(image))
        rgb = _rgb(image)
        return rgb if method is None else rgb.transpose(method)
    except Exception as error:
        raise _undecodable(error) from error


def peculiarities(image: Image.Image) -> list[tuple[Diagnosis, str]]:
    """What is unusual about an opened image, all of which decoding takes care of."""
    notes = []
    if image.mode == "CMYK":
        notes.append((Diagnosis.CMYK_IMAGE, "CMYK, converted to RGB"))
    # colours of 16 bits are brought to 8 while they are read, so only the stored layout tells
    is_deep = any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    if image.mode == "I" or image.mode.startswith("I;16") or is_deep:
        notes.append((Diagnosis.DEEP_IMAGE, "16 bits, brought to 8"))
    if (orientation := _orientation(image)) in UPRIGHT:
        notes.append((Diagnosis.ROTATED_IMAGE, f"EXIF orientation {orientation}, turned upright"))
    # MPO, a JPEG with further views, is none
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        notes.append((Diagnosis.ANIMATED_IMAGE, f"{frames} frames, the first is taken"))
    return notes


def jpeg_turn(image: Image.Image) -> Turn | None:
    """How the pixels of an opened JPEG have to be turned; None for other formats."""
    # MPO: a JPEG followed by further views of the same scene
    return TURNS.get(_orientation(image), Turn()) if image.format in ("JPEG", "MPO") else None


def decode_jpeg_crop(
    data: bytes, image: Image.Image, box: Box, size: int, jpeg_crop: JpegCrop | None = None
) -> np.ndarray:
    """The part of an opened JPEG that becomes size x size pixels -> (h, w, 3) uint8, as stored.

    data: the file; image: the same, opened and not loaded. box: in stored coordinates. The result
        is the box at 1/k of its size, k of 1, 2, 4, 8 the largest for which both sides keep at
        least `size` pixels. Its edges lie on multiples of k, each less than k pixels away from the
        box's, which is less than one pixel of the tensor.
    Raises SampleError.
    """
    left, top, right, bottom = box
    k = max(k for k in (1, 2, 4, 8) if k == 1 or min(right - left, bottom - top) >= k * size)
    x, w = _on_grid(left, right, image.width, k)
    y, h = _on_grid(top, bottom, image.height, k)
    if jpeg_crop is not None:
        pixels = jpeg_crop(data, image.width, image.height, k, (x, y, x + w, y + h))
        if pixels is not None:
            return pixels
    pixels = _simplejpeg(data, image, k, y + h)
    if pixels is None:
        try:
            image.draft("RGB", (image.width // k, image.height // k))
            pixels = np.asarray(image.convert("RGB"))
        except Exception as error:
            raise _undecodable(error) from error
    return np.ascontiguousarray(pixels[y : y + h, x : x + w])


def _on_grid(begin: int, end: int, length: int, k: int) -> tuple[int, int]:
    """(first pixel, pixels) of the scaled picture that show begin..end most nearly.

    The pixels at the far edge that lie only partly inside the picture are left out.
    """
    pixels = (end - begin) // k
    centred = round((begin + end - k * pixels) / (2 * k))
    return min(centred, length // k - pixels), pixels


def _simplejpeg(data: bytes, image: Image.Image, k: int, rows: int) -> np.ndarray | None:
    """At least the first `rows` rows of the picture at 1/k; None where Pillow has to look at it."""
    # CMYK needs Pillow's conversion; below 8 pixels the scales cannot be told apart by their sizes
    if simplejpeg is None or image.mode not in ("RGB", "L") or min(image.size) < 8:
        return None
    width, height = -(-image.width // k), -(-image.height // k)
    shortened = _shorten(data, rows * k)
    if shortened is not None:
        # the decoder takes the file for one of fewer rows, and complains of what then is left over
        data, kept = shortened
        height = -(-kept // k)
    pixels = np.empty((height, width, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, buffer=pixels)
    except ValueError as error:
        if shortened is None or not LEFT_OVER.search(str(error)):
            return None
    return pixels


#: libjpeg's complaint of data between the last row and the end of the image. It reports its first
#: warning only, so nothing was wrong in the rows before; a file cut off says "premature end".
LEFT_OVER: Final = re.compile(r"^Corrupt JPEG data: \d+ extraneous bytes before marker 0xd9$")


def _shorten(data: bytes, rows: int) -> tuple[bytes, int] | None:
    """The file with a header that says fewer rows, and their number: `rows` or a few more.

    None where that is not possible or saves nothing. Only for sequential files of one scan without
    restart markers, where what follows the last row is one run of data up to the end of the image.
    """
    at, sampling = 2, 0
    frame = -1
    try:
        while True:
            marker, length = struct.unpack_from(">HH", data, at)
            if marker in (0xFFC0, 0xFFC1):  # start of frame: baseline, extended sequential
                frame, components = at, data[at + 9]
                sampling = max(data[at + 11 + 3 * i] & 15 for i in range(components))
            elif marker == 0xFFDD and data[at + 4 : at + 6] != b"\0\0":  # restart interval
                return None
            elif marker == 0xFFDA:  # start of scan
                if frame < 0 or data[at + 4] != data[frame + 9]:
                    return None
                break
            elif not 0xFFC4 <= marker <= 0xFFFE:
                return None
            at += 2 + length
    except (struct.error, IndexError):
        return None
    block = 8 * sampling
    # one row of chroma more: the last ones are interpolated from their neighbours
    kept = -(-(rows + sampling) // block) * block if block else 0
    (height,) = struct.unpack_from(">H", data, frame + 5)
    if not 8 <= kept < height:
        return None
    return data[: frame + 5] + struct.pack(">H", kept) + data[frame + 7 :], kept


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


def _orientation(image: Image.Image) -> int:
    """As ImageOps.exif_transpose reads it, which however fails on odd EXIF data."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation) or 0)
    except Exception:
        return 0  # metadata that cannot be read say nothing about the pixels


def _undecodable(error: Exception) -> SampleError:
    # the decoders meet malformed files with anything from struct.error to KeyError
    is_bomb = isinstance(error, Image.DecompressionBombError)
    return SampleError(
        f"image cannot be decoded: {error or type(error).__name__}",
        Diagnosis.TOO_MANY_PIXELS if is_bomb else Diagnosis.DAMAGED_IMAGE,
    )
