"""The renderer against a slow ray marcher in float64 that knows solids only by an inside test."""

import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from groundwork.data.sources.scenes_description import (
    COLOURS,
    Scene,
    SceneObject,
    SceneSettings,
    choose_scene,
)
from groundwork.data.sources.scenes_renderer import Rendering, render
from groundwork.data.sources.scenes_shapes import SHAPES, Shape, entry_distance, surface_normal

SIZE = 48
SETTINGS = SceneSettings((1, 6), frozenset(), False)
#: More solids than usual, so that many stand in one another's shadow.
CROWDED = SceneSettings((5, 6), frozenset(), False)
SEEDS = range(16)
Points = NDArray[np.float64]


def scene(seed: int) -> Scene:
    return choose_scene(CROWDED if seed % 2 else SETTINGS, random.Random(f"renderer:{seed}"))


@cache
def drawn(seed: int) -> tuple[Scene, Rendering, Points, NDArray[np.int64], Points]:
    """Scene, rendering, and the oracle's points (N, 3), surfaces (N) and depths (N)."""
    one = scene(seed)
    points, surface, depth = cast_from_camera(one, SIZE)
    return one, render(one, SIZE), points, surface, depth


def outside(thing: SceneObject, points: Points) -> Points:
    """A convex function of the point (..., 3), negative inside the solid."""
    cos, sin = thing.heading
    x0, y0 = points[..., 0] - thing.x, points[..., 1] - thing.y
    x, y, z = x0 * cos + y0 * sin, y0 * cos - x0 * sin, points[..., 2] - thing.half_height
    h, r = thing.half_height, thing.radius
    if thing.shape == "sphere":
        return np.sqrt(x**2 + y**2 + z**2) - r
    if thing.shape == "cube":
        return np.maximum(np.maximum(abs(x), abs(y)), abs(z)) - h
    if thing.shape == "cylinder":
        return np.maximum(np.hypot(x, y) - r, abs(z) - h)
    return np.maximum(np.hypot(x, y) - r * (h - z) / (2 * h), -z - h)


def first_contact(thing: SceneObject, start: Points, way: Points) -> Points:
    """Distance along unit vectors to the solid, inf where they miss: (N,).

    Along a ray `outside` is convex: golden sections find its minimum, bisection the contact.
    """
    centre = np.array(thing.centre)
    middle = ((centre - start) * way).sum(-1)
    low, high = middle - 2 * thing.bounding_radius, middle + 2 * thing.bounding_radius
    golden = (5**0.5 - 1) / 2

    def value(t: Points) -> Points:
        return outside(thing, start + way * t[:, None])

    near = middle.copy()
    begin, end = low.copy(), high.copy()
    for _ in range(60):
        a, b = end - golden * (end - begin), begin + golden * (end - begin)
        is_left = value(a) < value(b)
        end, begin = np.where(is_left, b, end), np.where(is_left, begin, a)
    near = (begin + end) / 2
    hits = value(near) < 0
    begin, end = low, near
    for _ in range(50):
        half = (begin + end) / 2
        inside = value(half) < 0
        begin, end = np.where(inside, begin, half), np.where(inside, half, end)
    return np.where(hits & (end > 1e-3), end, np.inf)


def cast_from_camera(one: Scene, size: int) -> tuple[Points, NDArray[np.int64], Points]:
    eye, target = np.array(one.camera.position), np.array(one.camera.target)
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    v, u = np.mgrid[:size, :size].reshape(2, -1)
    x = ((u + 0.5) / size * 2 - 1) * one.camera.tangent
    y = (1 - (v + 0.5) / size * 2) * one.camera.tangent
    way = forward + x[:, None] * right + y[:, None] * np.cross(right, forward)
    way /= np.linalg.norm(way, axis=1, keepdims=True)
    start = np.broadcast_to(eye, way.shape)
    with np.errstate(divide="ignore"):
        distance = -eye[2] / way[:, 2]
    distance[(distance < 0) | (distance > 40)] = np.inf
    surface = np.where(np.isfinite(distance), -1, 0)
    if one.backdrop.wall_y is not None:
        wall = (one.backdrop.wall_y - eye[1]) / way[:, 1]
        is_wall = (wall > 0) & (wall < distance)
        distance, surface = np.where(is_wall, wall, distance), np.where(is_wall, -2, surface)
    for number, thing in enumerate(one.objects, start=1):
        contact = first_contact(thing, start, way)
        surface = np.where(contact < distance, number, surface)
        distance = np.minimum(contact, distance)
    depth = np.where(surface == 0, 0, np.where(surface == 0, 0, distance) * (way @ forward))
    points = start + way * np.where(surface == 0, 0, distance)[:, None]
    return points, surface, depth


def cast_to_light(one: Scene, points: Points, surface: NDArray[np.int64]) -> NDArray[np.int64]:
    """Whose shadow each point lies in; -1 where it cannot be told, near the edge of the light."""
    to_light = np.broadcast_to(np.array(one.light.toward), points.shape)
    if one.light.kind == "lamp":
        to_light = np.array(one.light.toward) * one.light.distance - points
        to_light = to_light / np.linalg.norm(to_light, axis=1, keepdims=True)
    shadow = np.zeros(len(points), int)
    nearest = np.full(len(points), np.inf)
    for number, thing in enumerate(one.objects, start=1):
        contact = first_contact(thing, points, to_light)
        contact[surface == number] = np.inf
        shadow = np.where(contact < nearest, number, shadow)
        nearest = np.minimum(nearest, contact)
    for number, thing in enumerate(one.objects, start=1):
        own = surface == number
        step = 1e-4
        climb = (outside(thing, points + to_light * step) - outside(thing, points)) / step
        shadow[own & (climb < 0)] = 0
        shadow[own & (abs(climb) < 2e-2)] = -1
    if one.backdrop.wall_y is not None:
        shadow[(surface == -2) & (to_light[:, 1] > 0)] = 0
    shadow[surface == 0] = 0
    return shadow


@pytest.mark.parametrize("shape", SHAPES)
def test_rays_from_everywhere_enter_solids_where_the_oracle_says(shape: Shape) -> None:
    """Also the steep ones that cameras and lights above a scene seldom send."""
    thing = replace(scene(0).objects[0], shape=shape, radius=0.5, half_height=0.6, x=0.0, y=0.0)
    thing = replace(thing, heading=(1.0, 0.0))
    if shape in ("sphere", "cube"):
        thing = replace(thing, half_height=0.5)
    rng = np.random.default_rng(0)
    way = rng.standard_normal((4000, 3))
    way[:1000, :2] *= 0.1
    way /= np.linalg.norm(way, axis=1, keepdims=True)
    start = rng.uniform(-0.7, 0.7, (4000, 3))
    start -= (start * way).sum(1, keepdims=True) * way
    far = start - 3 * way
    expected = first_contact(thing, far + np.array(thing.centre), way) - 3
    found = entry_distance(
        thing.shape,
        thing.radius,
        thing.half_height,
        tuple(start.T.astype(np.float32)),
        tuple(way.T.astype(np.float32)),
    )
    assert found.dtype == np.float32
    hits = np.isfinite(expected)
    assert 1000 < hits.sum() < 3800
    # rays that graze the solid may go either way
    assert (np.isfinite(found) != hits).sum() <= 4
    both = hits & np.isfinite(found)
    assert np.quantile(abs(found[both] - expected[both]), 0.995) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_point_where_the_oracle_grows_fastest(shape: Shape) -> None:
    thing = replace(scene(0).objects[0], shape=shape, radius=0.5, half_height=0.6, x=0.0, y=0.0)
    thing = replace(thing, heading=(1.0, 0.0))
    if shape in ("sphere", "cube"):
        thing = replace(thing, half_height=0.5)
    rng = np.random.default_rng(1)
    way = rng.standard_normal((500, 3))
    way[:, 2] = -abs(way[:, 2])  # from above, as the bottom is never seen
    way /= np.linalg.norm(way, axis=1, keepdims=True)
    centre = np.array(thing.centre)
    distance = first_contact(thing, np.broadcast_to(centre, way.shape) - 3 * way, way)
    points = centre - 3 * way + distance[:, None] * way
    step = 1e-5
    slope = np.stack(
        [outside(thing, points + step * a) - outside(thing, points - step * a) for a in np.eye(3)],
        axis=1,
    )
    slope /= np.linalg.norm(slope, axis=1, keepdims=True)
    local = tuple((points - centre).T.astype(np.float32))
    normals = np.stack(surface_normal(shape, thing.radius, thing.half_height, local), axis=1)
    # at an edge between two faces either normal will do
    assert np.quantile(np.abs(normals - slope).max(1), 0.97) < 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_instances_are_what_the_oracle_sees(seed: int) -> None:
    _, rendering, _, surface, _ = drawn(seed)
    differs = rendering.instances.ravel() != np.maximum(surface, 0)
    # a ray that grazes an outline may go either way in float32
    assert differs.sum() <= 2


@pytest.mark.parametrize("seed", SEEDS)
def test_depth_is_the_distance_along_the_axis(seed: int) -> None:
    _, rendering, _, surface, depth = drawn(seed)
    same = rendering.instances.ravel() == np.maximum(surface, 0)
    drawn_depth = rendering.depth.ravel() / 1000
    assert ((drawn_depth == 0) == (surface == 0)).all()
    near = same & (depth < 20)
    assert near.any()
    np.testing.assert_allclose(drawn_depth[near], depth[near], atol=1.5e-3)
    np.testing.assert_allclose(drawn_depth[same], depth[same], rtol=1e-3, atol=1.5e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_shadows_are_where_the_oracle_finds_the_light_blocked(seed: int) -> None:
    one, rendering, points, surface, _ = drawn(seed)
    expected = cast_to_light(one, points, surface)
    told = (expected >= 0) & (rendering.instances.ravel() == np.maximum(surface, 0))
    differs = told & (rendering.shadows.ravel() != expected)
    assert differs.sum() <= 3


def test_the_oracle_has_seen_every_shape_light_and_wall_and_shadows_on_objects() -> None:
    scenes = [drawn(seed) for seed in SEEDS]
    assert {t.shape for s, *_ in scenes for t in s.objects} == {
        "sphere",
        "cube",
        "cylinder",
        "cone",
    }
    assert {s.light.kind for s, *_ in scenes} == {"sun", "lamp"}
    assert {s.backdrop.wall_y is None for s, *_ in scenes} == {True, False}
    on_objects = [((r.shadows > 0) & (r.instances > 0)).sum() for _, r, *_ in scenes]
    assert sum(on_objects) > 50
    assert any(((r.shadows.ravel() > 0) & (surface == -2)).any() for _, r, _, surface, _ in scenes)


@pytest.mark.parametrize("seed", SEEDS)
def test_full_areas_are_those_of_the_objects_alone(seed: int) -> None:
    one, rendering, *_ = drawn(seed)
    for number, thing in enumerate(one.objects, start=1):
        alone = render(Scene((thing,), one.light, one.camera, one.backdrop), SIZE)
        # a wall or the ground never hides an object
        assert rendering.full_areas[number - 1] == (alone.instances == 1).sum()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9))
def test_objects_stand_apart_inside_the_picture(seed: int) -> None:
    one = scene(seed)
    for i, a in enumerate(one.objects):
        for b in one.objects[:i]:
            assert np.hypot(a.x - b.x, a.y - b.y) > a.footprint + b.footprint
        assert one.backdrop.wall_y is None or a.y + a.footprint < one.backdrop.wall_y
    border = np.ones((SIZE, SIZE), bool)
    border[1:-1, 1:-1] = False
    rendering = render(one, SIZE)
    assert not rendering.instances[border].any()
    assert all(area > 0 for area in rendering.full_areas)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**9))
def test_shadowed_ground_is_darker_than_lit_ground_beside_it(seed: int) -> None:
    one = scene(seed)
    rendering = render(one, 96)
    plain = (rendering.instances == 0) & (rendering.depth > 0)
    dark = plain & (rendering.shadows > 0)
    lit = plain & (rendering.shadows == 0)
    if one.backdrop.wall_y is not None or dark.sum() < 60:
        return
    # the same rows, so that neither the fade to the sky nor the wall matters
    rows = np.flatnonzero((dark.sum(1) > 5) & (lit.sum(1) > 5))
    for row in rows:
        mean = [rendering.rgb[row][mask[row]].mean() for mask in (dark, lit)]
        assert mean[0] < mean[1]


def test_the_colour_of_a_matt_object_is_the_one_it_is_named_for() -> None:
    seen = set()
    for seed in range(40):
        one = scene(seed)
        rendering = render(one, 96)
        for number, thing in enumerate(one.objects, start=1):
            mask = (rendering.instances == number) & (rendering.shadows == 0)
            if thing.material != "matt" or mask.sum() < 60:
                continue
            pixels = rendering.rgb[mask].astype(float)
            # the brighter half faces the light
            bright = pixels[pixels.sum(1) >= np.median(pixels.sum(1))].mean(0)
            direction = bright / np.linalg.norm(bright)
            cosines = {
                name: direction @ (np.array(rgb) / np.linalg.norm(rgb))
                for name, rgb in COLOURS.items()
            }
            assert max(cosines, key=lambda name: cosines[name]) == thing.colour
            seen.add(thing.colour)
    assert seen == set(COLOURS)


def test_a_hard_light_and_a_soft_one_differ_in_colour_only() -> None:
    one = next(s for s in map(scene, range(50)) if s.light.softness > 0.012 and len(s.objects) > 3)
    hard = replace(one, light=replace(one.light, softness=0.0))
    a, b = render(one, 96), render(hard, 96)
    assert (a.rgb != b.rgb).any()
    for name in ("depth", "instances", "shadows"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("size", [33, 64, 131])
def test_a_larger_picture_shows_the_same(size: int) -> None:
    one = scene(3)
    small, large = render(one, size), render(one, 3 * size)
    # the centre of every third pixel is a pixel's centre of the small picture
    for name in ("instances", "shadows"):
        coarse, fine = getattr(small, name), getattr(large, name)[1::3, 1::3]
        assert (coarse != fine).mean() < 2e-3


def test_edges_are_smooth() -> None:
    """Supersampled outlines hold more than the two colours at their sides."""
    one, rendering, *_ = drawn(1)
    fine = render(one, 8 * SIZE).rgb.astype(float)
    mean = fine.reshape(SIZE, 8, SIZE, 8, 3).mean((1, 3))
    coarse = fine[4::8, 4::8]
    error = np.abs(rendering.rgb - mean).mean()
    assert error < 0.7 * np.abs(coarse - mean).mean()
