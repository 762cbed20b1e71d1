"""Pictograms of Noto Color Emoji as image-text data: real names, a long tail, no download.

Every rendering is a pure function of (seed, code point, rendering index): one sample can be drawn
again alone, and neither the order nor the number of processes changes a byte.
"""

import hashlib
import io
import math
import multiprocessing
import struct
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

import emoji
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from groundwork.data.samples import Concept, Sample
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

Split = Literal["train", "heldout_renderings", "heldout_concepts"]
Colour = tuple[int, int, int]
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class EmojiConfig:
    """Which pictograms are drawn, how often, and what is kept out of training.

    heldout_renderings: how many of each trained concept's `renderings` are kept for testing.
    heldout_concept_fraction: the expected share of concepts that training never shows.
    font: the font file; None searches the usual folders.
    max_version: the newest Emoji version to use, such as 15.0; None takes all that the font has.
    code_points: exactly these code points, each of which the font must have; None takes all.
    """

    image_size: int = 72
    renderings: int = 12
    heldout_renderings: int = 2
    heldout_concept_fraction: float = 0.1
    seed: int = 0
    font: Path | None = None
    max_version: float | None = None
    code_points: tuple[int, ...] | None = None
    image_format: Literal["png", "jpg"] = "png"

    def __post_init__(self) -> None:
        if self.image_size < 16:
            raise ValueError(
                f"EmojiConfig: image_size is {self.image_size}; a glyph needs at least 16 pixels"
            )
        if not 0 <= self.heldout_renderings < self.renderings:
            raise ValueError(
                f"EmojiConfig: heldout_renderings is {self.heldout_renderings} of "
                f"{self.renderings} renderings; keep at least one rendering for training"
            )
        if not 0.0 <= self.heldout_concept_fraction < 1.0:
            raise ValueError(
                f"EmojiConfig: heldout_concept_fraction is {self.heldout_concept_fraction}; "
                "give a number in [0, 1)"
            )
        if self.seed < 0:
            raise ValueError(f"EmojiConfig: seed is {self.seed}; give a number >= 0")
        if self.image_format not in ("png", "jpg"):
            raise ValueError(
                f"EmojiConfig: image_format is {self.image_format!r}; choose 'png' or 'jpg'"
            )


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


def emoji_concepts(config: EmojiConfig) -> list[Concept]:
    """The pictograms that the font can draw, in code-point order; labels count from 0."""
    font_path = find_font(config.font)
    font = _load_font(font_path)
    table = _named_pictograms()
    if config.max_version is not None:
        table = {c: entry for c, entry in table.items() if entry["E"] <= config.max_version}
    if config.code_points is None:
        code_points = sorted(c for c in table if _has_glyph(font, c))
    else:
        code_points = sorted(set(config.code_points))
        for code_point in code_points:
            _check_code_point(code_point, table, font, font_path, config.max_version)
    aliases = _aliases()
    return [
        Concept(
            label=label,
            name=_clean(table[code_point]["en"]),
            aliases=aliases[code_point],
            heldout=_is_heldout(config, code_point),
            info={
                "code_point": f"{code_point:04X}",
                "emoji_version": float(table[code_point]["E"]),
            },
        )
        for label, code_point in enumerate(code_points)
    ]


def emoji_samples(config: EmojiConfig, *, workers: int = 1) -> Iterator[tuple[Split, Sample]]:
    """Draw every rendering of every concept, lazily, in code-point order.

    workers: number of processes; the samples and their order do not depend on it. With more than
    one, the calling script needs the usual `if __name__ == "__main__"` guard.
    """
    if workers < 1:
        raise ValueError(f"emoji_samples: workers is {workers}; give at least 1")
    config = replace(config, font=find_font(config.font))
    concepts = emoji_concepts(config)
    if workers == 1:
        for concept in concepts:
            yield from _concept_samples(config, concept)
        return
    # Spawned, not forked: the caller may hold threads (torch) that do not survive a fork.
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        waiting = iter(concepts)
        # A bounded look-ahead keeps memory flat when the reader is slower than the painters.
        pending: deque[Future[list[tuple[Split, Sample]]]] = deque(
            executor.submit(_concept_samples, config, c) for c in islice(waiting, 4 * workers)
        )
        while pending:
            samples = pending.popleft().result()
            for concept in islice(waiting, 1):
                pending.append(executor.submit(_concept_samples, config, concept))
            yield from samples
    finally:
        executor.shutdown(cancel_futures=True)


def emoji_sample(config: EmojiConfig, concept: Concept, rendering: int) -> tuple[Split, Sample]:
    """Draw one rendering of one concept, exactly as `emoji_samples` yields it."""
    if not 0 <= rendering < config.renderings:
        raise ValueError(
            f"emoji_sample: rendering is {rendering}; give one of 0..{config.renderings - 1}"
        )
    glyph = draw_glyph(find_font(config.font), int(concept.info["code_point"], 16))
    return _sample(config, concept, rendering, glyph)


def draw_glyph(font_path: Path, code_point: int) -> Image.Image:
    """The glyph in its cell at its native size, as premultiplied RGBa on transparency."""
    cell = Image.new("RGBA", CELL_WIDTH_HEIGHT)
    font = _load_font(font_path)
    ImageDraw.Draw(cell).text((0, 0), chr(code_point), font=font, embedded_color=True)
    return cell.convert("RGBa")


def choose_view(config: EmojiConfig, code_point: int, rendering: int, glyph: Image.Image) -> View:
    """Draw a view at random; a background that hides the glyph is drawn anew."""
    generator = np.random.default_rng([config.seed, code_point, rendering])
    view = View(
        scale=_uniform(generator, *SCALE_RANGE),
        angle_deg=_uniform(generator, -MAX_ANGLE_DEG, MAX_ANGLE_DEG),
        dx=_uniform(generator, -MAX_SHIFT, MAX_SHIFT),
        dy=_uniform(generator, -MAX_SHIFT, MAX_SHIFT),
        brightness=_uniform(generator, *BRIGHTNESS_RANGE),
        blur=_uniform(generator, *BLUR_RANGE) if generator.random() < BLUR_PROBABILITY else 0.0,
        background=Background("plain", ((0, 0, 0),)),
    )
    colour, alpha = _place(glyph, view, config.image_size)
    opaque = alpha[..., 0] > 0.5
    glyph_colour = _brighten(colour[opaque] / alpha[opaque], view.brightness)
    best_part, best_view = -1.0, view
    for _ in range(BACKGROUND_TRIES):
        background = _choose_background(generator)
        ground = paint_background(background, config.image_size)[opaque]
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


def _sample(
    config: EmojiConfig, concept: Concept, rendering: int, glyph: Image.Image
) -> tuple[Split, Sample]:
    code_point = int(concept.info["code_point"], 16)
    view = choose_view(config, code_point, rendering, glyph)
    image = compose(glyph, view, config.image_size)
    split = _split(config, concept, rendering)
    info = {
        "label": concept.label,
        "name": concept.name,
        "code_point": concept.info["code_point"],
        "split": split,
        "rendering": rendering,
        "view": asdict(view),
    }
    return split, Sample(
        key=f"{code_point:04x}-{rendering:02d}",
        image=_encode(image, config.image_format),
        image_format=config.image_format,
        text=concept.name,
        info=info,
    )


def _concept_samples(config: EmojiConfig, concept: Concept) -> list[tuple[Split, Sample]]:
    glyph = draw_glyph(find_font(config.font), int(concept.info["code_point"], 16))
    return [_sample(config, concept, r, glyph) for r in range(config.renderings)]


def _split(config: EmojiConfig, concept: Concept, rendering: int) -> Split:
    if concept.heldout:
        return "heldout_concepts"
    # The first ones, so that a larger `renderings` adds to training and leaves the test as it was.
    return "heldout_renderings" if rendering < config.heldout_renderings else "train"


def _is_heldout(config: EmojiConfig, code_point: int) -> bool:
    """Judge each code point by itself, so that new glyphs do not change the fate of old ones."""
    digest = hashlib.sha256(f"{config.seed}:{code_point:X}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < config.heldout_concept_fraction * 2**64


def _encode(image: Image.Image, image_format: Literal["png", "jpg"]) -> bytes:
    buffer = io.BytesIO()
    if image_format == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _named_pictograms() -> dict[int, Mapping[str, Any]]:
    """Code point -> entry of the `emoji` package, for emoji of one code point.

    Unqualified forms, skin tones, flags, keycaps and joined sequences are thereby left out.
    """
    table: dict[int, Mapping[str, Any]] = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        single = characters.removesuffix("\N{VARIATION SELECTOR-16}")
        if len(single) == 1 and entry["status"] == emoji.STATUS["fully_qualified"]:
            table[ord(single)] = entry
    return table


def _aliases() -> dict[int, tuple[str, ...]]:
    """Other names of each pictogram that name no other one.

    Names with digits ("cow2", "u7533") and single letters are spellings for chat, not names.
    """
    table = _named_pictograms()
    names = {_folded(_clean(entry["en"])) for entry in table.values()}
    candidates = {
        code_point: {
            _folded(alias): alias
            for alias in map(_clean, entry.get("alias", ()))
            if len(alias) > 1
            and not any(c.isdigit() for c in alias)
            and _folded(alias) not in names
        }
        for code_point, entry in table.items()
    }
    uses = Counter(folded for own in candidates.values() for folded in own)
    return {
        code_point: tuple(alias for folded, alias in own.items() if uses[folded] == 1)
        for code_point, own in candidates.items()
    }


def _clean(name: str) -> str:
    """ ":man’s_shoe:" -> "man's shoe"."""
    return " ".join(name.strip(":").replace("_", " ").replace("\u2019", "'").split())


def _folded(name: str) -> str:
    """What two spellings of one name share: "T-Rex", "t rex" -> "trex"."""
    return "".join(c for c in name.casefold() if c.isalnum())


def _check_code_point(
    code_point: int,
    table: Mapping[int, Mapping[str, Any]],
    font: ImageFont.FreeTypeFont,
    font_path: Path,
    max_version: float | None,
) -> None:
    if code_point not in table:
        newest = "" if max_version is None else f" up to Emoji {max_version}"
        raise SourceError(
            f"U+{code_point:04X} is not a single-code-point emoji{newest} known to the `emoji` "
            f"package {emoji.__version__}; take it out of code_points or upgrade the package"
        )
    if not _has_glyph(font, code_point):
        raise SourceError(
            f"font {font_path} has no glyph for U+{code_point:04X} "
            f"({_clean(table[code_point]['en'])}, Emoji {table[code_point]['E']}); take it out of "
            "code_points, or install a newer font with `apt-get install --only-upgrade "
            "fonts-noto-color-emoji` or give --font FILE"
        )


def _has_glyph(font: ImageFont.FreeTypeFont, code_point: int) -> bool:
    """Whether drawing leaves ink; this font's .notdef leaves none."""
    left, top, right, bottom = font.getbbox(chr(code_point))
    return right > left and bottom > top


def _load_font(path: Path) -> ImageFont.FreeTypeFont:
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
        _load_font(path)
    except OSError as error:
        raise SourceError(
            f"emoji font {path} does not open at size {STRIKE_SIZE}: {error}; {FONT_REMEDY}"
        ) from error
    return path


def _uniform(generator: np.random.Generator, low: float, high: float) -> float:
    # Rounded before use, so that the number in `info` is the number that was drawn with.
    return round(float(generator.uniform(low, high)), 4)


def _colour(channels: NDArray[np.int64]) -> Colour:
    red, green, blue = (int(c) for c in channels)
    return red, green, blue


def _brighten(pixels: Pixels, brightness: float) -> Pixels:
    return np.clip(pixels * np.float32(brightness), 0.0, 255.0)
