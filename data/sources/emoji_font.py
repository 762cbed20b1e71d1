"""The colour bitmap font that pictograms come from, and the glyphs in it."""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

from groundwork.data.sources.errors import SourceError

FONT_NAME: Final = "NotoColorEmoji.ttf"
FONT_FOLDERS: Final = (
    Path("/usr/share/fonts"),
    Path("/usr/local/share/fonts"),
    Path("~/.local/share/fonts"),
    Path("~/.fonts"),
    Path("~/Library/Fonts"),
    Path("/Library/Fonts"),
)
FONT_REMEDY: Final = "install it with `apt-get install fonts-noto-color-emoji` or give --font FILE"

#: The one size at which the font holds bitmaps, and the cell that each of them fills there.
STRIKE_SIZE: Final = 109
CELL_WIDTH_HEIGHT: Final = (136, 128)


def find_font(path: Path | None = None, folders: Iterable[Path] = FONT_FOLDERS) -> Path:
    """Find the colour bitmap font: the file given, or Noto Color Emoji in one of the folders."""
    if path is not None:
        if not path.is_file():
            raise SourceError(f"emoji font {path} is not a file; {FONT_REMEDY}")
        return _checked_font(path)
    searched = [folder.expanduser() for folder in folders]
    for folder in searched:
        found = sorted(folder.rglob(FONT_NAME)) if folder.is_dir() else []
        if found:
            return _checked_font(found[0])
    raise SourceError(
        f"emoji font {FONT_NAME} is not below {', '.join(map(str, searched))}; {FONT_REMEDY}"
    )


def draw_glyph(font_path: Path, code_point: int) -> Image.Image:
    """The glyph in its cell at its native size, as premultiplied RGBa on transparency."""
    cell = Image.new("RGBA", CELL_WIDTH_HEIGHT)
    font = load_font(font_path)
    ImageDraw.Draw(cell).text((0, 0), chr(code_point), font=font, embedded_color=True)
    return cell.convert("RGBa")


def has_glyph(font: ImageFont.FreeTypeFont, code_point: int) -> bool:
    """Whether drawing leaves ink; this font's .notdef leaves none."""
    left, top, right, bottom = font.getbbox(chr(code_point))
    return right > left and bottom > top


def load_font(path: Path) -> ImageFont.FreeTypeFont:
    # The basic layout reads the cmap alone, so pictures do not depend on an installed raqm.
    return ImageFont.truetype(path, STRIKE_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _checked_font(path: Path) -> Path:
    """Refuse a font without colour bitmaps, which would draw black outlines or nothing."""
    with path.open("rb") as file:
        header = file.read(12)
        num_tables = struct.unpack(">H", header[4:6])[0] if len(header) == 12 else 0
        records = file.read(16 * num_tables)
    tags = {records[i : i + 4] for i in range(0, len(records), 16)}
    if b"CBDT" not in tags:
        raise SourceError(
            f"emoji font {path} holds no colour bitmaps (no CBDT table: an outline or COLR font, "
            f"or no font at all); {FONT_REMEDY}"
        )
    try:
        load_font(path)
    except OSError as error:
        raise SourceError(
            f"emoji font {path} does not open at size {STRIKE_SIZE}: {error}; {FONT_REMEDY}"
        ) from error
    return path
