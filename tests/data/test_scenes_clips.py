"""Short videos of synthetic scenes: tracks, motion in words and in pictures, both formats."""

import io
import random
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from groundwork.data.annotations import annotations_from_info
from groundwork.data.samples import Sample, sample_from_fields
from groundwork.data.sources.scenes import (
    FIRST_INDEX,
    ScenesConfig,
    heldout_pairs,
    scene_clip,
    scene_sample,
)
from groundwork.data.sources.scenes_clips import Clip, choose_clip
from groundwork.data.sources.scenes_description import SceneSettings

FRAMES = 5
CONFIG = ScenesConfig(image_size=64, frames=FRAMES, fps=4)
INDICES = range(40)


@cache
def clips() -> list[Sample]:
    return [scene_clip(CONFIG, index) for index in INDICES]


def stack(sample: Sample, name: str) -> NDArray[Any]:
    """(T, H, W[, 3]): the numbered members of one kind."""
    frames = [sample.members[f"{name}.{n:04d}.png"] for n in range(FRAMES)]
    return np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in frames])


def test_tracks_fit_the_masks_of_every_frame() -> None:
    for sample in clips():
        instances, shadows = stack(sample, "instances"), stack(sample, "shadows")
        assert instances.shape == (FRAMES, 64, 64)
        numbers = set(np.unique(instances)) - {0}
        assert numbers <= {track["id"] for track in sample.info["tracks"]}
        for track in sample.info["tracks"]:
            areas = (instances == track["id"]).sum((1, 2))
            assert track["areas"] == areas.tolist()
            for n, box in enumerate(track["boxes"]):
                if box is None:
                    assert areas[n] < 0.05 * 64 * 64
                    continue
                rows, columns = np.nonzero(instances[n] == track["id"])
                tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert box == tight
                assert track["shadow_areas"][n] == (shadows[n] == track["id"]).sum()


def test_a_still_camera_and_light_change_nothing_but_what_moves() -> None:
    checked = 0
    for sample in clips():
        info = sample.info
        if info["camera_moves"] or info["light_moves"]:
            continue
        moving = [track["id"] for track in info["tracks"] if track["moves"]]
        assert moving
        instances, shadows = stack(sample, "instances"), stack(sample, "shadows")
        depth = stack(sample, "depth")
        still = ~np.isin(instances, moving).any(0)
        np.testing.assert_array_equal(depth[0][still], depth[-1][still])
        still &= ~np.isin(shadows, moving).any(0)
        np.testing.assert_array_equal(instances[0][still], instances[-1][still])
        np.testing.assert_array_equal(shadows[0][still], shadows[-1][still])
        assert (instances[0] != instances[-1]).any()
        checked += 1
    assert checked > 10


def test_a_moving_light_moves_shadows_only() -> None:
    checked = 0
    for sample in clips():
        if sample.info["light_moves"] and not any(t["moves"] for t in sample.info["tracks"]):
            for name in ("instances", "depth"):
                assert (stack(sample, name) == stack(sample, name)[0]).all()
            shadows = stack(sample, "shadows")
            assert (shadows[0] != shadows[-1]).any()
            checked += 1
        if sample.info["light_moves"]:
            assert len({tuple(light["direction"]) for light in sample.info["lights"]}) == FRAMES
    assert sum(sample.info["light_moves"] for sample in clips()) > 3


def choose(seed: int, frames: int) -> Clip:
    settings = SceneSettings((1, 6), frozenset(), False)
    return choose_clip(settings, random.Random(f"clip:{seed}"), frames)


@pytest.mark.parametrize("seed", range(30))
def test_objects_never_meet_each_other_or_the_wall(seed: int) -> None:
    for scene in choose(seed, 41).scenes:
        for i, a in enumerate(scene.objects):
            for b in scene.objects[:i]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a.footprint + b.footprint
            assert scene.backdrop.wall_y is None or a.y + a.footprint < scene.backdrop.wall_y


def test_the_same_clip_is_cut_into_any_number_of_frames() -> None:
    for seed in range(8):
        coarse, fine = choose(seed, 3), choose(seed, 9)
        assert coarse.movers == fine.movers
        for a, b in zip(coarse.scenes, fine.scenes[::4], strict=True):
            assert a == b


def test_every_kind_of_motion_occurs() -> None:
    chosen = [choose(seed, 2) for seed in range(60)]
    assert any(c.camera_moves for c in chosen) and any(c.light_moves for c in chosen)
    assert {len(c.movers) for c in chosen} == {0, 1, 2}
    assert all(c.camera_moves or c.light_moves or c.movers for c in chosen)


def test_captions_tell_how_things_move() -> None:
    ways = Counter()
    for sample in clips():
        tracks = sample.info["tracks"]
        for caption in sample.info["captions"]:
            if caption.startswith("The camera moves"):
                assert sample.info["camera_moves"]
            if caption.startswith("The light moves"):
                assert sample.info["light_moves"]
            match = re.fullmatch(r"The ([a-z ]+?) moves(?: ([a-z ]+))?\.", caption)
            if match is None or match[1] in ("camera", "light"):
                continue
            track = the(match[1], tracks)
            assert track["moves"]
            boxes = track["boxes"]
            step = boxes[-1][0] + boxes[-1][2] - boxes[0][0] - boxes[0][2]
            near = [
                np.median(stack(sample, "depth")[n][stack(sample, "instances")[n] == track["id"]])
                for n in (0, -1)
            ]
            if match[2]:
                ways[match[2]] += 1
                assert {
                    "to the left": step < 0,
                    "to the right": step > 0,
                    "towards the camera": near[1] < near[0],
                    "away from the camera": near[1] > near[0],
                }[match[2]], (sample.key, caption)
    assert len(ways) == 4


def the(words: str, tracks: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("size", "material", "colour", "shape")
    found = [t for t in tracks if set(words.split()) <= {t[key] for key in keys}]
    assert len(found) == 1, words
    return found[0]


def test_questions_about_motion_have_the_right_answers() -> None:
    kinds = Counter()
    for sample in clips():
        info, tracks = sample.info, sample.info["tracks"]
        movers = [track for track in tracks if track["moves"]]
        for record in info["qa"]:
            question = record["question"]
            kinds[record["kind"]] += 1
            if match := re.fullmatch(r"Does the ([a-z ]+) move\?", question):
                moves = {"camera": info["camera_moves"], "light": info["light_moves"]}
                is_moving = moves.get(match[1])
                if is_moving is None:
                    is_moving = the(match[1], tracks)["moves"]
                expected = "yes" if is_moving else "no"
            elif question == "How many objects move?":
                expected = str(len(movers))
            else:
                assert len(movers) == 1
                expected = movers[0]["colour" if "color" in question else "shape"]
            assert record["answers"] == [expected], (sample.key, question)
    assert len(kinds) == 6


def test_spans_name_the_tracks() -> None:
    found = 0
    for sample in clips():
        for track in sample.info["tracks"]:
            for begin, end in track["spans"]:
                words = set(sample.text[begin:end].removesuffix("s").split())
                assert words <= {track[k] for k in ("size", "material", "colour", "shape")}
                found += 1
    assert found >= 20


def test_clips_survive_the_tar_and_fit_the_schema() -> None:
    sample = clips()[0]
    assert sample_from_fields(sample.key, sample.fields()) == sample
    known = annotations_from_info(sample.info, sample.text)
    assert (known.fps, known.frames, known.end_s) == (4, FRAMES, FRAMES / 4)
    assert scene_sample(CONFIG, 0) == ("train", sample)
    assert sample.info["synthetic"] is True


def test_clips_keep_to_the_pairs_of_their_split() -> None:
    config = replace(CONFIG, frames=2, image_size=32)
    for index in range(8):
        for first, is_compositional in ((0, False), (FIRST_INDEX["compositional"], True)):
            tracks = scene_clip(config, first + index).info["tracks"]
            pairs = {(track["colour"], track["shape"]) for track in tracks}
            assert bool(pairs & heldout_pairs(config.seed)) == is_compositional


def test_a_clip_has_at_least_two_frames() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        scene_clip(replace(CONFIG, frames=1), 0)


def test_an_mp4_shows_the_frames() -> None:
    av = pytest.importorskip("av", reason="pip install 'groundwork-pretrain[video]'")
    sample = scene_clip(replace(CONFIG, clip_format="mp4"), 3)
    assert sample == scene_clip(replace(CONFIG, clip_format="mp4"), 3)
    with av.open(io.BytesIO(sample.members["mp4"])) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == 4
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
    expected = stack(clips()[3], "frame")
    assert frames.shape == expected.shape
    # half the resolution of colour costs most at the edges of bright solids
    assert np.abs(frames.astype(int) - expected).mean() < 4
    assert sample.info == clips()[3].info
    assert sample.members["instances.0002.png"] == clips()[3].members["instances.0002.png"]
