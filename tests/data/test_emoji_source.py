import io
import itertools
from dataclasses import replace
from pathlib import Path

import emoji
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from groundwork.data.samples import sample_from_fields
from groundwork.data.sources.emoji import (
    EmojiConfig,
    emoji_concepts,
    emoji_sample,
    emoji_samples,
)
from groundwork.data.sources.emoji_font import CELL_WIDTH_HEIGHT, draw_glyph, find_font
from groundwork.data.sources.emoji_rendering import choose_view, compose
from groundwork.data.sources.errors import SourceError


def _installed_font() -> Path | None:
    try:
        return find_font()
    except SourceError:
        return None


FONT = _installed_font()
needs_font = pytest.mark.skipif(
    FONT is None, reason="NotoColorEmoji.ttf is absent: apt-get install fonts-noto-color-emoji"
)
CONFIG = EmojiConfig(font=FONT)
CONCEPTS = emoji_concepts(CONFIG) if FONT else []
FEW = tuple(range(0x1F600, 0x1F620))


@needs_font
def test_about_1400_pictograms_with_unique_names() -> None:
    # 1377 with Debian's font 2.042 (Emoji 15.1) and emoji 2.16.
    assert 1300 <= len(CONCEPTS) <= 1500
    assert [c.label for c in CONCEPTS] == list(range(len(CONCEPTS)))
    names = [c.name.casefold() for c in CONCEPTS]
    assert len(set(names)) == len(names)
    others = [alias.casefold() for c in CONCEPTS for alias in c.aliases]
    assert len(set(others + names)) == len(others) + len(names)
    assert not any(bad in name for name in names + others for bad in ":_’")


@needs_font
def test_names_are_those_of_unicode() -> None:
    names = {c.info["code_point"]: c.name for c in CONCEPTS}
    assert names["1F600"] == "grinning face"
    assert names["1F45E"] == "man's shoe"
    assert names["2764"] == "red heart"
    assert names["00A9"] == "copyright"
    assert "1F3FB" not in names, "skin tones are no pictograms of their own"
    assert "1F1E6" not in names, "halves of flags are no pictograms of their own"


@needs_font
def test_about_a_tenth_of_the_concepts_is_held_out() -> None:
    assert 0.07 < np.mean([c.heldout for c in CONCEPTS]) < 0.13
    none_held_out = emoji_concepts(replace(CONFIG, heldout_concept_fraction=0.0))
    assert not any(c.heldout for c in none_held_out)
    other_seed = emoji_concepts(replace(CONFIG, seed=1))
    assert [c.heldout for c in other_seed] != [c.heldout for c in CONCEPTS]


@needs_font
def test_held_out_concepts_stay_when_the_set_of_glyphs_changes() -> None:
    older = emoji_concepts(replace(CONFIG, max_version=11.0))
    assert 0 < len(older) < len(CONCEPTS)
    assert all(c.info["emoji_version"] <= 11.0 for c in older)
    heldout = {c.name: c.heldout for c in CONCEPTS}
    assert all(heldout[c.name] == c.heldout for c in older)


@needs_font
def test_splits_are_disjoint_and_complete() -> None:
    config = replace(CONFIG, code_points=FEW, renderings=5, heldout_renderings=2)
    concepts = {c.label: c for c in emoji_concepts(config)}
    samples = list(emoji_samples(config))
    assert len({sample.key for _, sample in samples}) == len(samples) == 5 * len(FEW)
    for label, concept in concepts.items():
        splits = sorted(split for split, s in samples if s.info["label"] == label)
        if concept.heldout:
            assert splits == ["heldout_concepts"] * 5
        else:
            assert splits == ["heldout_renderings"] * 2 + ["train"] * 3
    assert {concept.heldout for concept in concepts.values()} == {True, False}


@needs_font
def test_samples_tell_what_they_show_and_survive_the_tar() -> None:
    concept = CONCEPTS[700]
    png = replace(CONFIG, image_size=40)
    jpg = replace(png, image_format="jpg")
    for config, header in ((png, b"\x89PNG"), (jpg, b"\xff\xd8\xff")):
        split, sample = emoji_sample(config, concept, 3)
        assert sample.key == f"{concept.info['code_point'].lower()}-03"
        assert sample.image.startswith(header)
        assert Image.open(io.BytesIO(sample.image)).size == (40, 40)
        assert sample.text == sample.info["name"] == concept.name
        assert (sample.info["label"], sample.info["split"]) == (concept.label, split)
        read = sample_from_fields(sample.key, sample.fields())
        assert (read.image, read.text) == (sample.image, sample.text)


@needs_font
def test_workers_change_neither_bytes_nor_order() -> None:
    config = replace(CONFIG, code_points=FEW, renderings=3)
    assert list(emoji_samples(config, workers=2)) == list(emoji_samples(config))


@needs_font
def test_a_reader_that_stops_early_leaves_no_workers_behind() -> None:
    samples = emoji_samples(replace(CONFIG, code_points=FEW), workers=2)
    assert len(list(itertools.islice(samples, 3))) == 3
    samples.close()  # type: ignore[attr-defined]


@needs_font
@settings(max_examples=25, deadline=None)
@given(index=st.integers(0, max(0, len(CONCEPTS) - 1)), rendering=st.integers(0, 11))
def test_a_sample_drawn_alone_equals_the_one_drawn_in_order(index: int, rendering: int) -> None:
    concept = CONCEPTS[index]
    config = replace(CONFIG, code_points=(int(concept.info["code_point"], 16),))
    split, in_order = list(emoji_samples(config))[rendering]
    split_alone, alone = emoji_sample(CONFIG, concept, rendering)
    assert (split, in_order.key, in_order.image) == (split_alone, alone.key, alone.image)
    assert {**in_order.info, "label": concept.label} == alone.info


@needs_font
def test_more_renderings_leave_the_old_ones_as_they_were() -> None:
    few = {
        s.key: (split, s.image) for split, s in emoji_samples(replace(CONFIG, code_points=FEW[:3]))
    }
    more = {
        s.key: (split, s.image)
        for split, s in emoji_samples(replace(CONFIG, code_points=FEW[:3], renderings=14))
    }
    assert len(more) > len(few)
    assert few.items() <= more.items()


@needs_font
@settings(max_examples=150, deadline=None)
@given(
    index=st.integers(0, max(0, len(CONCEPTS) - 1)),
    rendering=st.integers(0, 11),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_glyph_stands_out_from_its_background(index: int, rendering: int, seed: int) -> None:
    assert FONT is not None
    code_point = int(CONCEPTS[index].info["code_point"], 16)
    glyph = draw_glyph(FONT, code_point)
    view = choose_view(glyph, 72, (seed, code_point, rendering))
    picture = np.asarray(compose(glyph, view, 72), np.float64)
    nothing = Image.new("RGBa", CELL_WIDTH_HEIGHT)
    background = np.asarray(compose(nothing, view, 72), np.float64)
    stands_out = np.abs(picture - background).max(axis=2) > 40

    cell_area = CELL_WIDTH_HEIGHT[0] * CELL_WIDTH_HEIGHT[1]
    scaled_cell_area = (view.scale * 72) ** 2 * CELL_WIDTH_HEIGHT[1] / CELL_WIDTH_HEIGHT[0]
    ink = (np.asarray(glyph)[..., 3] / 255.0).sum() / cell_area * scaled_cell_area
    # At least half of the ink, after whatever the frame cuts off and the blur takes.
    assert stands_out.sum() > 0.5 * ink


@needs_font
def test_renderings_of_a_concept_differ() -> None:
    images = {s.image for _, s in emoji_samples(replace(CONFIG, code_points=(0x1F34E,)))}
    assert len(images) == CONFIG.renderings


@needs_font
def test_a_code_point_that_is_no_emoji_is_named() -> None:
    with pytest.raises(SourceError, match=r"U\+0041 is not a single-code-point emoji"):
        emoji_concepts(replace(CONFIG, code_points=(0x1F600, ord("A"))))
    with pytest.raises(SourceError, match=r"U\+1FAE8 .* up to Emoji 14\.0"):
        emoji_concepts(replace(CONFIG, code_points=(0x1FAE8,), max_version=14.0))


@needs_font
def test_a_glyph_missing_from_the_font_is_named_with_font_and_remedy() -> None:
    known = {
        ord(s): entry["E"]
        for s, entry in emoji.EMOJI_DATA.items()
        if len(s) == 1 and entry["status"] == emoji.STATUS["fully_qualified"]
    }
    drawn = {int(c.info["code_point"], 16) for c in CONCEPTS}
    missing = sorted(known.keys() - drawn)
    if not missing:
        pytest.skip("the font draws every emoji that the `emoji` package knows")
    with pytest.raises(SourceError, match=f"no glyph for U\\+{missing[0]:04X}") as error:
        emoji_concepts(replace(CONFIG, code_points=(missing[0],)))
    assert str(FONT) in str(error.value)
    assert "fonts-noto-color-emoji" in str(error.value)
    assert "--font" in str(error.value)


def test_a_missing_font_is_reported_with_the_remedy(tmp_path: Path) -> None:
    for search in (
        lambda: find_font(tmp_path / "absent.ttf"),
        lambda: find_font(None, folders=(tmp_path,)),
        lambda: emoji_concepts(EmojiConfig(font=tmp_path / "absent.ttf")),
        lambda: next(emoji_samples(EmojiConfig(font=tmp_path / "absent.ttf"))),
    ):
        with pytest.raises(SourceError, match="apt-get install fonts-noto-color-emoji") as error:
            search()
        assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a font", b"\x00\x01\x00\x00\x00\x01" + b"glyf" * 9])
def test_a_font_without_colour_bitmaps_is_refused(tmp_path: Path, content: bytes) -> None:
    font = tmp_path / "NotoColorEmoji.ttf"
    font.write_bytes(content)
    with pytest.raises(SourceError, match="CBDT"):
        find_font(None, folders=(tmp_path,))


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 4},
        {"renderings": 2, "heldout_renderings": 2},
        {"heldout_concept_fraction": 1.0},
        {"seed": -1},
        {"image_format": "gif"},
    ],
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"EmojiConfig: {list(wrong)[-1]} is"):
        EmojiConfig(**wrong)  # type: ignore[arg-type]
