"""Draws a synthetic scene: colour, depth, which object each pixel shows, whose shadow it lies in.

The annotations belong to the centre of
each pixel; the colour is averaged over four more rays where neighbouring pixels differ. Every
number comes from additions, products, quotients and roots of float32, never from a library's sum or
sine, so the same scene gives the same bytes whatever the machine.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from groundwork.data.sources.scenes_description import Scene
from groundwork.data.sources.scenes_shading import shade
from groundwork.data.sources.scenes_shapes import Field
from groundwork.data.sources.scenes_tracing import (
    GROUND,
    SKY,
    WALL,
    Hits,
    camera_rays,
    end_points,
    facing_light,
    occluders,
    trace,
)

#: Where a channel differs by more than this from the next pixel, of 255, more rays are cast.
EDGE: Final = 14
#: Places of the further rays in a pixel, in pixels from its centre.
SUBPIXELS: Final = ((-0.125, -0.375), (0.375, -0.125), (0.125, 0.375), (-0.375, 0.125))
#: Depth is stored in millimetres, as 16 bits.
DEPTH_PER_METRE: Final = 1000


@dataclass(frozen=True)
class Rendering:
    """All that a scene shows at one size; every array is (H, W), rgb (H, W, 3).

    rgb: uint8. depth: uint16, millimetres along the camera's axis, 0 for the sky. instances: uint8,
    the object's number, 0 for none. shadows: uint8, the number of the object whose shadow the
    visible point lies in, 0 for none; of several the one nearest to the point. A point that faces
    away from the light lies in no shadow of another. full_areas: pixels of each object if nothing
    stood before it.
    """

    rgb: NDArray[np.uint8]
    depth: NDArray[np.uint16]
    instances: NDArray[np.uint8]
    shadows: NDArray[np.uint8]
    full_areas: tuple[int, ...]


def render(scene: Scene, size: int) -> Rendering:
    """Draw a scene as a square picture. size: its side in pixels."""
    # divisions by zero give infinities, which is what the intersections expect
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        centres = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / size)
        across = np.broadcast_to(centres - np.float32(1), (size, size)).reshape(-1)
        down = np.repeat(centres - np.float32(1), size)
        rays, length = camera_rays(scene.camera, across, down)
        hits = trace(scene, rays)
        points = end_points(scene.camera, rays, hits)
        facing = facing_light(scene, hits, points)
        shadows = occluders(scene, hits, points, facing)
        soft = _soft_light(scene, hits, shadows, size)
        every = np.arange(size * size)
        direct = facing * _lit(hits, shadows, soft, every)
        pixels = _encode(shade(scene, rays, hits, points, direct))
        edges = np.flatnonzero(_edges(pixels.reshape(size, size, 3)))
        if len(edges):
            pixels[edges] = _encode(_supersampled(scene, across, down, edges, soft, size))
        depth = hits.distance / length * np.float32(DEPTH_PER_METRE)
        depth[hits.surface == SKY] = 0
        depth = np.minimum(np.rint(depth), np.float32(65535))
    shape = (size, size)
    return Rendering(
        rgb=pixels.reshape(size, size, 3),
        depth=depth.astype(np.uint16).reshape(shape),
        instances=np.maximum(hits.surface, 0).astype(np.uint8).reshape(shape),
        shadows=shadows.reshape(shape),
        full_areas=hits.full_areas,
    )


def _soft_light(
    scene: Scene, hits: Hits, shadows: NDArray[np.uint8], size: int
) -> dict[int, Field]:
    """How much of the light reaches ground and wall where it is no point; empty for a hard light.

    Only pixels of one surface are averaged, so nothing bleeds. Values also stand at pixels whose
    centre shows an object, since their corners may not.
    """
    width = round(scene.light.softness * size)
    if not width:
        return {}
    lit = np.asarray(shadows == 0, np.float32)
    soft = {}
    for plane in (GROUND, WALL)[: 1 if scene.backdrop.wall_y is None else 2]:
        shows = np.asarray(hits.surface == plane, np.float32)
        weight = _blurred(shows.reshape(size, size), width).reshape(-1)
        light = _blurred((shows * lit).reshape(size, size), width).reshape(-1)
        soft[plane] = np.where(weight > 0, light / weight, lit)
    return soft


def _blurred(values: Field, width: int) -> Field:
    """Sums over a tent of 4 width + 1 pixels; exact, since the terms are small integers."""
    size = values.shape[0]
    for _ in range(2):
        padded = np.zeros((size + 2 * width, size + 2 * width), np.float32)
        padded[width:-width, width:-width] = values
        rows = padded[:size].copy()
        for i in range(1, 2 * width + 1):
            rows += padded[i : i + size]
        values = rows[:, :size].copy()
        for i in range(1, 2 * width + 1):
            values += rows[:, i : i + size]
    return values


def _lit(
    hits: Hits, shadows: NDArray[np.uint8], soft: dict[int, Field], pixels: NDArray[np.intp]
) -> Field:
    """Share of the light that reaches each point. pixels: where in the picture each ray lies."""
    lit = np.asarray(shadows == 0, np.float32)
    for plane, light in soft.items():
        where = np.flatnonzero(hits.surface == plane)
        lit[where] = light[pixels[where]]
    return lit


def _edges(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels that differ from one of their four neighbours: (H, W, 3) -> (H, W)."""
    values = pixels.astype(np.int16)
    is_edge = np.zeros(pixels.shape[:2], bool)
    # one channel after the other: reducing over an axis of three is slow
    differs = np.abs(values[1:] - values[:-1]) > EDGE
    differs_down = differs[..., 0] | differs[..., 1] | differs[..., 2]
    differs = np.abs(values[:, 1:] - values[:, :-1]) > EDGE
    differs_right = differs[..., 0] | differs[..., 1] | differs[..., 2]
    is_edge[1:] |= differs_down
    is_edge[:-1] |= differs_down
    is_edge[:, 1:] |= differs_right
    is_edge[:, :-1] |= differs_right
    return is_edge


def _supersampled(
    scene: Scene,
    across: Field,
    down: Field,
    edges: NDArray[np.intp],
    soft: dict[int, Field],
    size: int,
) -> Field:
    """Mean colour of four rays in each of these pixels: (3, E)."""
    step = np.float32(2 / size)
    x, y = across[edges], down[edges]
    rays, _ = camera_rays(
        scene.camera,
        np.concatenate([x + step * np.float32(dx) for dx, _ in SUBPIXELS]),
        np.concatenate([y + step * np.float32(dy) for _, dy in SUBPIXELS]),
    )
    hits = trace(scene, rays)
    points = end_points(scene.camera, rays, hits)
    facing = facing_light(scene, hits, points)
    shadows = occluders(scene, hits, points, facing)
    direct = facing * _lit(hits, shadows, soft, np.tile(edges, len(SUBPIXELS)))
    a, b, c, d = np.split(shade(scene, rays, hits, points, direct), len(SUBPIXELS), axis=1)
    mean: Field = ((a + b) + (c + d)) * np.float32(0.25)
    return mean


def _encode(colour: Field) -> NDArray[np.uint8]:
    """Linear light (3, N) -> (N, 3) uint8. The root stands for the curve of sRGB."""
    coded = np.sqrt(np.clip(colour, 0, 1)) * np.float32(255) + np.float32(0.5)
    return np.ascontiguousarray(coded.astype(np.uint8).T)
