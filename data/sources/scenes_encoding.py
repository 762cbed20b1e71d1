"""Arrays of synthetic scenes as the files that a sample holds."""

import io
from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groundwork.data.sources.errors import SourceError

JPEG_QUALITY: Final = 95
#: Little is gained by more: masks are small anyway, and depths compress badly.
PNG_LEVEL: Final = 3
#: Nearly without loss, so that a frame fits its masks. Lower is better.
MP4_QUALITY: Final = "12"


def encode_image(rgb: NDArray[np.uint8], image_format: Literal["png", "jpg"]) -> bytes:
    """(H, W, 3) uint8 -> the encoded picture."""
    if image_format == "png":
        return encode_png(rgb)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def encode_png(values: NDArray[Any]) -> bytes:
    """(H, W, 3) or (H, W) uint8, or (H, W) uint16 -> PNG of 8 or 16 bits."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def has_mp4() -> bool:
    """Whether clips can be written as mp4 here."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def encode_mp4(frames: Sequence[NDArray[np.uint8]], fps: int) -> bytes:
    """Frames (H, W, 3) uint8, of even size, as H.264 (MPEG-4 where PyAV has no x264)."""
    try:
        import av
    except ImportError as error:
        raise SourceError(
            "clips as mp4 need PyAV: pip install 'groundwork-pretrain[video]', or write their "
            "frames as PNG (clip_format 'png')"
        ) from error
    codec, options = "mpeg4", {"qscale": "2"}
    if "libx264" in av.codecs_available:
        # x264's assembly gives other bits now and then, and on other processors
        options = {"crf": MP4_QUALITY, "preset": "veryfast", "x264-params": "no-asm=1"}
        codec = "libx264"
    buffer = io.BytesIO()
    # bitexact leaves out dates and library versions; one thread, since more change the bits
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream(codec, rate=fps, options={**options, "threads": "1"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
