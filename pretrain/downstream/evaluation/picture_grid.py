"""A sheet of pictures with what the model said about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE, TEXT, GAP = 120, 46, 8
HIT, MISS = (30, 130, 60), (190, 40, 40)


@dataclass(frozen=True)
class Tile:
    """A picture, its true name, and the best names the model gave, best first."""

    image: Image.Image
    truth: str
    guesses: tuple[str, ...]

    @property
    def is_hit(self) -> bool:
        return self.guesses[0] == self.truth


def picture_grid(tiles: Sequence[Tile], columns: int, path: Path) -> None:
    """Write a PNG: a green frame around hits, a red one around misses, truth and guess below."""
    rows = -(-len(tiles) // columns)
    width, height = columns * (TILE + GAP) + GAP, rows * (TILE + TEXT + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, tile in enumerate(tiles):
        x, y = GAP + i % columns * (TILE + GAP), GAP + i // columns * (TILE + TEXT + GAP)
        colour = HIT if tile.is_hit else MISS
        draw.rectangle((x - 3, y - 3, x + TILE + 2, y + TILE + 2), fill=colour)
        sheet.paste(tile.image.convert("RGB").resize((TILE, TILE)), (x, y))
        draw.text((x, y + TILE + 5), _cut(tile.truth, draw, font), fill="black", font=font)
        if not tile.is_hit:
            guess = _cut(f"not: {tile.guesses[0]}", draw, font)
            draw.text((x, y + TILE + 20), guess, fill=colour, font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _cut(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> str:
    while text and draw.textlength(text, font) > TILE:
        text = text[:-2].rstrip("…") + "…"
    return text
