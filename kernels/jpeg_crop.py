"""Part of a JPEG -> RGB pixels, in C++, bit for bit as libjpeg-turbo decodes them.

Faster than the library where only a part is wanted: see `csrc/jpeg_crop.cpp`. It decodes the common
kinds of file, if they are flawless, and leaves all others to a library.
"""

import ctypes
import logging
import platform
from collections.abc import Callable
from functools import cache

import numpy as np

from groundwork.kernels.host_compiler import (
    HostCompileError,
    instruction_set,
    load_host_library,
)

log = logging.getLogger(__name__)

SOURCE = "jpeg_crop.cpp"

#: (file, width, height, scale, (left, top, right, bottom)) -> pixels, or None for a library.
JpegCrop = Callable[[bytes, int, int, int, tuple[int, int, int, int]], np.ndarray | None]


def jpeg_crop(
    data: bytes, width: int, height: int, scale: int, box: tuple[int, int, int, int]
) -> np.ndarray | None:
    """Decode a box of a JPEG at 1/scale -> (h, w, 3) uint8; None where a library has to do it.

    width, height: of the whole picture, as its header says. scale: 1, 2, 4 or 8. box: left, top,
        right, bottom in pixels of the picture at 1/scale, whose size is rounded up.
    None is the answer for progressive, CMYK and other uncommon files, for a box that is not inside,
    and for whatever is wrong with a file, except damage below the box. Python's lock is released.
    Raises HostCompileError where there is no compiled code; `find_jpeg_crop` says so beforehand.
    """
    left, top, right, bottom = box
    whole_width, whole_height = -(-width // scale), -(-height // scale)
    if not (0 <= left < right <= whole_width and 0 <= top < bottom <= whole_height):
        return None
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    sizes = (width, height, scale, left, top, right - left, bottom - top)
    failed = _function()(data, len(data), *sizes, pixels.ctypes.data)
    return None if failed else pixels


def find_jpeg_crop() -> JpegCrop | None:
    """`jpeg_crop` if it runs here and is worth it, compiled now; else None, and why in the log."""
    if platform.machine() in ("x86_64", "AMD64") and instruction_set() == "DEFAULT":
        log.info("JPEGs are decoded by libraries: this processor has no AVX2")
        return None
    try:
        _function()
    except HostCompileError as error:
        log.info("JPEGs are decoded by libraries, which gives the same but more slowly: %s", error)
        return None
    return jpeg_crop


@cache
def _function(instructions: str | None = None) -> Callable[..., int]:
    function = load_host_library(SOURCE, instructions).jpeg_crop
    function.argtypes = (
        *(ctypes.c_char_p, ctypes.c_uint64),
        *(ctypes.c_int32,) * 7,
        ctypes.c_void_p,
    )
    function.restype = ctypes.c_int32
    return function
