"""Views of a glyph: size, turn, place, brightness, blur and what lies behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

SCALE_RANGE: Final = (0.7, 1.05)  # width of the glyph's cell, in image widths
MAX_ANGLE_DEG: Final = 15.0  # less than half of the 45 degrees between neighbouring arrows
MAX_SHIFT: Final = 0.08  # in image widths
BRIGHTNESS_RANGE: Final = (0.8, 1.2)
BLUR_PROBABILITY: Final = 0.3
BLUR_RANGE: Final = (0.004, 0.011)  # radius in image widths

#: A glyph shows where its colour is this far from the background (largest channel, of 255) ...
VISIBLE_DISTANCE: Final = 56
#: ... and a background is accepted when at least this part of the glyph shows.
VISIBLE_PART: Final = 0.7
BACKGROUND_TRIES: Final = 24

BackgroundKind = Literal["plain", "gradient", "stripes", "noise"]
#: Greys that backgrounds are near to, with their probabilities: paper, stone, night.
BACKGROUND_GREYS: Final = (238, 140, 30)
BACKGROUND_GREY_SHARES: Final = (0.6, 0.2, 0.2)
BACKGROUND_CHROMA: Final = 45  # half-width of a channel's distance from the grey
BACKGROUND_KINDS: Final[tuple[BackgroundKind, ...]] = ("plain", "gradient", "stripes", "noise")

Colour = tuple[int, int, int]
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Background:
    """What lies behind a glyph. A plain one has one colour, every other kind two.

    direction_deg: along which a gradient or stripes change. period: of stripes, in image widths.
    texture_seed: of noise.
    """

    kind: BackgroundKind
    colours: tuple[Colour, ...]
    direction_deg: float = 0.0
    period: float = 0.0
    texture_seed: int = 0


@dataclass(frozen=True)
class View:
    """Everything that tells one rendering of a glyph from another.

    scale: width of the glyph's cell in image widths; angle_deg: counter-clockwise; dx, dy: shift of
    the cell's centre to the right and down, in image widths; blur: radius in image widths.
    """

    scale: float
    angle_deg: float
    dx: float
    dy: float
    brightness: float
    blur: float
    background: Background


def choose_view(glyph: Image.Image, image_size: int, seed: Sequence[int]) -> View:
    """Draw a view at random; a background that hides the glyph is drawn anew."""
    generator = np.random.default_rng(seed)
    view = View(
        scale=_uniform(generator, *SCALE_RANGE),
        angle_deg=_uniform(generator, -MAX_ANGLE_DEG, MAX_ANGLE_DEG),
        dx=_uniform(generator, -MAX_SHIFT, MAX_SHIFT),
        dy=_uniform(generator, -MAX_SHIFT, MAX_SHIFT),
        brightness=_uniform(generator, *BRIGHTNESS_RANGE),
        blur=_uniform(generator, *BLUR_RANGE) if generator.random() < BLUR_PROBABILITY else 0.0,
        background=Background("plain", ((0, 0, 0),)),
    )
    colour, alpha = _place(glyph, view, image_size)
    opaque = alpha[..., 0] > 0.5
    glyph_colour = _brighten(colour[opaque] / alpha[opaque], view.brightness)
    best_part, best_view = -1.0, view
    for _ in range(BACKGROUND_TRIES):
        background = _choose_background(generator)
        ground = paint_background(background, image_size)[opaque]
        distance = np.abs(glyph_colour - _brighten(ground, view.brightness)).max(axis=1)
        visible_part = float((distance > VISIBLE_DISTANCE).mean()) if distance.size else 0.0
        if visible_part > best_part:
            best_part, best_view = visible_part, replace(view, background=background)
        if visible_part >= VISIBLE_PART:
            break
    return best_view


def compose(glyph: Image.Image, view: View, image_size: int) -> Image.Image:
    """The square RGB picture of a premultiplied RGBa glyph in a view."""
    colour, alpha = _place(glyph, view, image_size)
    ground = paint_background(view.background, image_size)
    pixels = _brighten(colour + ground * (1.0 - alpha), view.brightness)
    image = Image.fromarray(np.rint(pixels).astype(np.uint8), "RGB")
    if view.blur:
        image = image.filter(ImageFilter.GaussianBlur(view.blur * image_size))
    return image


def paint_background(background: Background, image_size: int) -> Pixels:
    """The background alone: (H, W, 3), 0..255."""
    first = np.array(background.colours[0], np.float32)
    if background.kind == "plain":
        return np.broadcast_to(first, (image_size, image_size, 3))
    second = np.array(background.colours[1], np.float32)
    blend = _blend(background, image_size)[..., None]  # (H, W, 1), 0..1
    return first + (second - first) * blend


def _blend(background: Background, image_size: int) -> Pixels:
    """How much of the second colour each pixel takes: (H, W), 0..1."""
    if background.kind == "noise":
        generator = np.random.default_rng(background.texture_seed)
        cells = int(generator.integers(4, 13))
        coarse = generator.random((cells, cells), dtype=np.float32)
        smooth = Image.fromarray(coarse).resize((image_size, image_size), Image.Resampling.BILINEAR)
        return np.asarray(smooth)
    axis = ((np.arange(image_size) + 0.5) / image_size - 0.5).astype(np.float32)
    direction = math.radians(background.direction_deg)
    cos, sin = math.cos(direction), math.sin(direction)
    along = axis[None, :] * np.float32(cos) + axis[:, None] * np.float32(sin)
    if background.kind == "gradient":
        return np.asarray(along / (abs(cos) + abs(sin)) + 0.5, np.float32)
    # Stripes whose edges are about a pixel wide, so that they do not alias.
    pixels_per_radian = np.float32(background.period * image_size / (2.0 * math.pi))
    wave = np.sin(along * np.float32(image_size) / pixels_per_radian)
    blend: Pixels = np.clip(wave * pixels_per_radian + np.float32(0.5), 0.0, 1.0, dtype=np.float32)
    return blend


def _choose_background(generator: np.random.Generator) -> Background:
    kind = BACKGROUND_KINDS[generator.integers(len(BACKGROUND_KINDS))]
    # Muted: a saturated ground as large as the glyph would be the main thing in the picture.
    grey = generator.choice(BACKGROUND_GREYS, p=BACKGROUND_GREY_SHARES)
    first, second = np.clip(
        grey + generator.integers(-BACKGROUND_CHROMA, BACKGROUND_CHROMA + 1, (2, 3)), 0, 255
    )
    colours = (_colour(first), _colour(second))
    return Background(
        kind=kind,
        colours=colours[:1] if kind == "plain" else colours,
        direction_deg=_uniform(generator, 0.0, 360.0) if kind in ("gradient", "stripes") else 0.0,
        period=_uniform(generator, 0.08, 0.3) if kind == "stripes" else 0.0,
        texture_seed=int(generator.integers(2**31)) if kind == "noise" else 0,
    )


def _place(glyph: Image.Image, view: View, image_size: int) -> tuple[Pixels, Pixels]:
    """The glyph in the picture: premultiplied colour (H, W, 3), 0..255; alpha (H, W, 1), 0..1."""
    factor = view.scale * image_size / glyph.width
    width, height = (max(1, round(side * factor)) for side in glyph.size)
    # Resizing filters over the area, the affine map only interpolates: scale first, then turn.
    scaled = glyph.resize((width, height), Image.Resampling.BICUBIC)
    angle = math.radians(view.angle_deg)
    cos, sin = math.cos(angle), math.sin(angle)
    centre_x, centre_y = (0.5 + view.dx) * image_size, (0.5 + view.dy) * image_size
    picture_to_glyph = (
        *(cos, -sin, width / 2 - cos * centre_x + sin * centre_y),
        *(sin, cos, height / 2 - sin * centre_x - cos * centre_y),
    )
    placed = np.asarray(
        scaled.transform(
            (image_size, image_size),
            Image.Transform.AFFINE,
            picture_to_glyph,
            Image.Resampling.BICUBIC,
        ),
        np.float32,
    )
    alpha = placed[..., 3:]
    # Bicubic overshoot may leave a premultiplied colour brighter than its alpha allows.
    return np.minimum(placed[..., :3], alpha), alpha / np.float32(255.0)


def _uniform(generator: np.random.Generator, low: float, high: float) -> float:
    # Rounded before use, so that the number in `info` is the number that was drawn with.
    return round(float(generator.uniform(low, high)), 4)


def _colour(channels: NDArray[np.int64]) -> Colour:
    red, green, blue = (int(c) for c in channels)
    return red, green, blue


def _brighten(pixels: Pixels, brightness: float) -> Pixels:
    return np.clip(pixels * np.float32(brightness), 0.0, 255.0)
