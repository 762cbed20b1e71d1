"""Pictograms of Noto Color Emoji as image-text data: real names, a long tail, no download.

Every rendering is a pure function of (seed, code point, rendering index): one sample can be drawn
again alone, and neither the order nor the number of processes changes a byte.
"""

import hashlib
import io
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, get_args

import emoji
from PIL import Image, ImageFont

from groundwork.data.samples import Concept, Sample
from groundwork.data.sources.emoji_font import draw_glyph, find_font, has_glyph, load_font
from groundwork.data.sources.emoji_rendering import choose_view, compose
from groundwork.data.sources.errors import SourceError
from groundwork.data.worker_processes import worker_processes

Split = Literal["train", "heldout_renderings", "heldout_concepts"]
SPLITS: Final = get_args(Split)


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
            raise SourceError(
                f"EmojiConfig: image_size is {self.image_size}; a glyph needs at least 16 pixels"
            )
        if not 0 <= self.heldout_renderings < self.renderings:
            raise SourceError(
                f"EmojiConfig: heldout_renderings is {self.heldout_renderings} of "
                f"{self.renderings} renderings; keep at least one rendering for training"
            )
        if not 0.0 <= self.heldout_concept_fraction < 1.0:
            raise SourceError(
                f"EmojiConfig: heldout_concept_fraction is {self.heldout_concept_fraction}; "
                "give a number in [0, 1)"
            )
        if self.seed < 0:
            raise SourceError(f"EmojiConfig: seed is {self.seed}; give a number >= 0")
        if self.image_format not in ("png", "jpg"):
            raise SourceError(
                f"EmojiConfig: image_format is {self.image_format!r}; choose 'png' or 'jpg'"
            )


def emoji_concepts(config: EmojiConfig) -> list[Concept]:
    """The pictograms that the font can draw, in code-point order; labels count from 0."""
    font_path = find_font(config.font)
    font = load_font(font_path)
    table = _named_pictograms()
    if config.max_version is not None:
        table = {c: entry for c, entry in table.items() if entry["E"] <= config.max_version}
    if config.code_points is None:
        code_points = sorted(c for c in table if has_glyph(font, c))
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
        raise SourceError(f"emoji_samples: workers is {workers}; give at least 1")
    config = replace(config, font=find_font(config.font))
    concepts = emoji_concepts(config)
    if workers == 1:
        for concept in concepts:
            yield from _concept_samples(config, concept)
        return
    with worker_processes(workers) as executor:
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


def emoji_units(config: EmojiConfig, *, unit_samples: int = 2_000) -> list[dict[str, Any]]:
    """The same renderings in the same order by split, as work units of `build_shards`.

    A unit lists pictograms, [label, name, code point], of one split with about `unit_samples`
    renderings. `font`: sha256 of the font file, so that another font makes other units.
    """
    font = hashlib.sha256(find_font(config.font).read_bytes()).hexdigest()
    concepts = emoji_concepts(config)
    units = []
    for split in SPLITS:
        per_concept = sum(
            _split(config, heldout=split == "heldout_concepts", rendering=r) == split
            for r in range(config.renderings)
        )
        shown = [c for c in concepts if per_concept and c.heldout == (split == "heldout_concepts")]
        step = max(1, unit_samples // max(1, per_concept))
        for first in range(0, len(shown), step):
            listed = [[c.label, c.name, c.info["code_point"]] for c in shown[first : first + step]]
            units.append({"split": split, "font": font, "concepts": listed})
    return units


def read_emoji_unit(
    config: EmojiConfig, unit: Mapping[str, Any], _note: Callable[[str], None]
) -> Iterator[tuple[Split, Sample]]:
    """Draw the renderings of a unit."""
    heldout = unit["split"] == "heldout_concepts"
    font = find_font(config.font)
    for label, name, code_point in unit["concepts"]:
        concept = Concept(label, name, heldout=heldout, info={"code_point": code_point})
        glyph = draw_glyph(font, int(code_point, 16))
        for rendering in range(config.renderings):
            if _split(config, heldout=heldout, rendering=rendering) == unit["split"]:
                yield _sample(config, concept, rendering, glyph)


def emoji_sample(config: EmojiConfig, concept: Concept, rendering: int) -> tuple[Split, Sample]:
    """Draw one rendering of one concept, exactly as `emoji_samples` yields it."""
    if not 0 <= rendering < config.renderings:
        raise ValueError(
            f"emoji_sample: rendering is {rendering}; give one of 0..{config.renderings - 1}"
        )
    glyph = draw_glyph(find_font(config.font), int(concept.info["code_point"], 16))
    return _sample(config, concept, rendering, glyph)


def _sample(
    config: EmojiConfig, concept: Concept, rendering: int, glyph: Image.Image
) -> tuple[Split, Sample]:
    code_point = int(concept.info["code_point"], 16)
    view = choose_view(glyph, config.image_size, (config.seed, code_point, rendering))
    image = compose(glyph, view, config.image_size)
    split = _split(config, heldout=concept.heldout, rendering=rendering)
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


def _split(config: EmojiConfig, *, heldout: bool, rendering: int) -> Split:
    if heldout:
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
    if not has_glyph(font, code_point):
        raise SourceError(
            f"font {font_path} has no glyph for U+{code_point:04X} "
            f"({_clean(table[code_point]['en'])}, Emoji {table[code_point]['E']}); take it out of "
            "code_points, or install a newer font with `apt-get install --only-upgrade "
            "fonts-noto-color-emoji` or give --font FILE"
        )
