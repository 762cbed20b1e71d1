"""Samples of synthetic scenes: the same bytes everywhere, annotations that fit their masks."""

import hashlib
import io
import json
import random
import subprocess
import sys
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
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.scenes import (
    FIRST_INDEX,
    ScenesConfig,
    heldout_pairs,
    read_scenes_unit,
    scene_description,
    scene_sample,
    scenes_concepts,
    scenes_samples,
    scenes_units,
)
from groundwork.data.sources.scenes_renderer import render

CONFIG = ScenesConfig(train=8, val=3, compositional=3)
#: sha256 of the arrays of a few scenes. They change when the drawing is changed on purpose; if they
#: differ between machines, some operation is not the same everywhere.
GOLDEN = "833a2344cb2705730546a0c372b0e8cb41849ce98f614562533d0c563fad0146"
HASHES = """
import hashlib, json, sys
from groundwork.data.sources.scenes import ScenesConfig, scene_sample
config = ScenesConfig(image_size=64, image_format="png")
for index in json.loads(sys.argv[1]):
    fields = scene_sample(config, index)[1].fields()
    print(index, hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest())
"""


def image(sample: Sample, name: str) -> NDArray[Any]:
    return np.asarray(Image.open(io.BytesIO(sample.members[name])))


@cache
def stills() -> list[tuple[str, Sample]]:
    config = replace(CONFIG, train=60, val=20, compositional=40)
    return [(str(split), sample) for split, sample in scenes_samples(config)]


def test_processes_and_orders_give_the_same_bytes() -> None:
    indices = [0, 7, FIRST_INDEX["val"] + 2, FIRST_INDEX["compositional"]]
    found = []
    for order in (indices, indices[::-1]):
        run = subprocess.run(
            [sys.executable, "-c", HASHES, json.dumps(order)],
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(sorted(run.stdout.splitlines()))
    assert found[0] == found[1]
    assert len({line.split()[1] for line in found[0]}) == len(indices)


def test_the_pictures_are_those_of_every_other_machine() -> None:
    digest = hashlib.sha256()
    for index in range(12):
        drawn = render(scene_description(ScenesConfig(), index), 96)
        for values in (drawn.rgb, drawn.depth.astype("<u2"), drawn.instances, drawn.shadows):
            digest.update(values.tobytes())
    assert digest.hexdigest() == GOLDEN


def test_units_divide_the_same_samples() -> None:
    units = scenes_units(CONFIG, unit_frames=3)
    assert [unit["end"] - unit["begin"] for unit in units] == [3, 3, 2, 3, 3]
    divided = [pair for unit in units for pair in read_scenes_unit(CONFIG, unit)]
    assert divided == list(scenes_samples(CONFIG))


def test_a_scene_can_be_drawn_alone() -> None:
    for split, sample in list(scenes_samples(CONFIG))[::4]:
        assert scene_sample(CONFIG, sample.info["source"]["index"]) == (split, sample)


def test_seeds_and_indices_give_different_scenes() -> None:
    images = {
        scene_sample(replace(CONFIG, seed=seed), index)[1].image
        for seed in range(3)
        for index in range(3)
    }
    assert len(images) == 9


def test_a_larger_training_set_leaves_the_other_splits_as_they_are() -> None:
    def others(train: int) -> list[tuple[str, Sample]]:
        return [p for p in scenes_samples(replace(CONFIG, train=train)) if p[0] != "train"]

    assert others(2) == others(5) != []


def test_splits_have_the_sizes_asked_for_and_keys_of_their_own() -> None:
    counts = Counter(split for split, _ in stills())
    assert counts == {"train": 60, "val": 20, "compositional": 40}
    assert len({sample.key for _, sample in stills()}) == 120


def test_heldout_pairs_occur_in_the_compositional_split_only() -> None:
    concepts = scenes_concepts(CONFIG)
    assert [c.label for c in concepts] == list(range(32))
    heldout = {c.label for c in concepts if c.heldout}
    assert len(heldout) == 8
    # each colour and each shape is trained, only not together
    assert Counter(concepts[n].info["shape"] for n in heldout) == dict.fromkeys(
        ("sphere", "cube", "cylinder", "cone"), 2
    )
    assert len({concepts[n].info["colour"] for n in heldout}) == 8
    seen = set()
    for split, sample in stills():
        scene = scene_description(CONFIG, sample.info["source"]["index"])
        pairs = {(thing.colour, thing.shape) for thing in scene.objects}
        if split == "compositional":
            assert pairs & heldout_pairs(CONFIG.seed)
            seen |= pairs & heldout_pairs(CONFIG.seed)
        else:
            assert not pairs & heldout_pairs(CONFIG.seed)
    assert len(seen) == 8
    assert heldout_pairs(0) != heldout_pairs(1)


def test_boxes_areas_and_labels_fit_the_masks() -> None:
    concepts = {c.label: c.name for c in scenes_concepts(CONFIG)}
    for _, sample in stills():
        instances, shadows = image(sample, "instances.png"), image(sample, "shadows.png")
        scene = scene_description(CONFIG, sample.info["source"]["index"])
        for box in sample.info["boxes"]:
            thing = scene.objects[box["id"] - 1]
            rows, columns = np.nonzero(instances == box["id"])
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box["xyxy"] == tight
            assert box["area"] == len(rows) >= (0.05 * 96) ** 2
            assert box["shadow_area"] == (shadows == box["id"]).sum()
            assert box["category"] == concepts[box["label"]] == f"{thing.colour} {thing.shape}"
            assert 0.25 <= box["visible"] <= 1


def test_pairs_join_objects_with_shadows_that_can_be_seen() -> None:
    joined = alone = 0
    for _, sample in stills():
        shadows = image(sample, "shadows.png")
        pairs = sample.info["pairs"]
        assert all(pair["object"] == pair["shadow"] for pair in pairs)
        paired = {pair["object"] for pair in pairs}
        for box in sample.info["boxes"]:
            area = (shadows == box["id"]).sum()
            assert (box["id"] in paired) == (area >= (0.04 * 96) ** 2)
            assert box.get("pair") == (box["id"] if box["id"] in paired else None)
            joined, alone = joined + (box["id"] in paired), alone + (box["id"] not in paired)
        assert paired <= {box["id"] for box in sample.info["boxes"]}
    assert joined > 5 * alone > 0


def test_the_salient_object_shows_most_pixels() -> None:
    for _, sample in stills():
        areas = {box["id"]: box["area"] for box in sample.info["boxes"]}
        salient = sample.info["salient"]
        assert areas[salient] == max(areas.values())
        mask = image(sample, "mask.png")
        np.testing.assert_array_equal(mask, (image(sample, "instances.png") == salient) * 255)


def test_depth_and_camera_put_the_points_where_the_scene_has_them() -> None:
    """Unprojection with what the sample says: ground at z = 0, shadows in line with the light."""
    for _, sample in stills()[::6]:
        scene = scene_description(CONFIG, sample.info["source"]["index"])
        points = unprojected(sample)
        instances, shadows = image(sample, "instances.png"), image(sample, "shadows.png")
        shown = image(sample, "depth.png") > 0
        flat = shown & (instances == 0)
        wall_y = scene.backdrop.wall_y
        to_wall = np.inf if wall_y is None else abs(points[..., 1] - wall_y)
        assert np.minimum(abs(points[..., 2]), to_wall)[flat].max() < 0.02
        light = sample.info["light"]
        for number, thing in enumerate(scene.objects, start=1):
            from_centre = points - np.array(thing.centre)
            assert (
                np.linalg.norm(from_centre[instances == number], axis=-1)
                < thing.bounding_radius + 0.01
            ).all()
            shade = points[shadows == number]
            way = np.broadcast_to(light["direction"], shade.shape)
            if light["kind"] == "lamp":
                way = np.array(light["position"]) - shade
                way = way / np.linalg.norm(way, axis=-1, keepdims=True)
            aside = np.cross(np.array(thing.centre) - shade, way)
            assert (np.linalg.norm(aside, axis=-1) < thing.bounding_radius + 0.02).all()


def unprojected(sample: Sample) -> NDArray[np.float64]:
    """(H, W, 3): scene coordinates of every pixel, by the sample's own camera."""
    camera = sample.info["camera"]
    depth = image(sample, "depth.png") / camera["depth_per_metre"]
    v, u = np.mgrid[: depth.shape[0], : depth.shape[1]] + 0.5
    x = (u - camera["centre_px"]) / camera["focal_px"]
    y = (v - camera["centre_px"]) / camera["focal_px"]
    axes = (np.array(camera[name]) for name in ("right", "down", "forward"))
    right, down, forward = axes
    rays = x[..., None] * right + y[..., None] * down + forward
    points: NDArray[np.float64] = np.array(camera["position"]) + depth[..., None] * rays
    return points


def test_samples_survive_the_tar_and_fit_the_schema() -> None:
    for split, sample in stills()[::10]:
        assert sample.image.startswith(b"\xff\xd8\xff")
        assert Image.open(io.BytesIO(sample.image)).size == (96, 96)
        assert image(sample, "depth.png").dtype == np.uint16
        read = sample_from_fields(sample.key, sample.fields())
        assert read == sample, "JSON holds tuples or keys that are no strings"
        assert sample.info["synthetic"] is True
        assert sample.info["split"] == split
        known = annotations_from_info(sample.info, sample.text)
        assert len(known.boxes) == len(sample.info["boxes"])
        assert known.captions[0] == sample.text


def test_a_scene_of_one_object_has_its_class_as_label() -> None:
    config = replace(CONFIG, objects=(1, 1))
    for index in range(5):
        _, sample = scene_sample(config, index)
        assert sample.info["label"] == sample.info["boxes"][0]["label"]
        assert len(sample.info["boxes"]) == 1
    for _, sample in stills():
        assert ("label" in sample.info) == (
            len(scene_description(CONFIG, sample.info["source"]["index"]).objects) == 1
        )


def test_pictures_as_png_are_the_rendering() -> None:
    _, sample = scene_sample(replace(CONFIG, image_format="png", image_size=50), 3)
    pixels = np.asarray(Image.open(io.BytesIO(sample.image)))
    drawn = render(scene_description(CONFIG, 3), 50)
    np.testing.assert_array_equal(pixels, drawn.rgb)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"image_size": 8}, "image_size is 8"),
        ({"train": -1}, "train is -1"),
        ({"val": 10**10}, "val is 10000000000"),
        ({"objects": (0, 3)}, "objects is 0 to 3"),
        ({"objects": (4, 3)}, "objects is 4 to 3"),
        ({"objects": (1, 7)}, "objects is 1 to 7"),
        ({"seed": -1}, "seed is -1"),
        ({"image_format": "gif"}, "image_format is 'gif'"),
        ({"clip_format": "avi"}, "clip_format is 'avi'"),
        ({"frames": 0}, "0 frames"),
        ({"frames": 4, "clip_format": "mp4", "image_size": 97}, "image_size is 97"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(SourceError, match=names):
        ScenesConfig(**changes)


def test_indices_of_no_split_are_refused() -> None:
    for index in (-1, 3 * 10**9):
        with pytest.raises(ValueError, match="an index is"):
            scene_sample(CONFIG, index)


def test_global_random_state_neither_matters_nor_changes() -> None:
    random.seed(1)
    before = random.getstate()
    first = scene_sample(CONFIG, 1)
    assert random.getstate() == before
    random.seed(2)
    assert scene_sample(CONFIG, 1) == first
