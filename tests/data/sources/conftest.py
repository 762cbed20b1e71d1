import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Picture = Callable[..., bytes]
Put = Callable[[Path, Any], Path]


@pytest.fixture
def picture() -> Picture:
    """Encodes a small picture: size (width, height), colour, format, EXIF orientation."""

    def encode(
        size: tuple[int, int] = (8, 6),
        colour: int = 0,
        image_format: str = "JPEG",
        orientation: int = 1,
    ) -> bytes:
        buffer = io.BytesIO()
        exif = Image.Exif()
        if orientation != 1:
            exif[0x0112] = orientation
        Image.new("RGB", size, (colour % 256, 80, 160)).save(buffer, image_format, exif=exif)
        return buffer.getvalue()

    return encode


@pytest.fixture
def put() -> Put:
    """Writes bytes, text, or anything else as JSON, making folders."""

    def write(file: Path, content: Any) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode()
        elif not isinstance(content, bytes):
            content = json.dumps(content).encode()
        file.write_bytes(content)
        return file

    return write
