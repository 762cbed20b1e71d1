"""Where the rays of a synthetic scene end, and what keeps the light from there.

Rays are cast at the solids themselves, without triangles. All rays of a picture are one array, and
only those that pass near a solid are tried on it.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from groundwork.data.sources.scenes_description import Camera, Light, Scene, SceneObject
from groundwork.data.sources.scenes_shapes import (
    MISS,
    Field,
    Fields,
    entry_distance,
    surface_normal,
)

#: What a ray meets that is no object.
SKY: Final = 0
GROUND: Final = -1
WALL: Final = -2
#: Beyond this the ground is taken for sky, in metres along the ray.
HORIZON: Final = 40.0
#: A shadow ray starts this far from the surface, in metres.
CLEARANCE: Final = 1e-3
#: A lamp is as bright as a sun at this distance, in metres.
LAMP_DISTANCE: Final = 9.0


@dataclass(frozen=True)
class Hits:
    """Where rays end. surface: (N,) int8, an object's number, SKY, GROUND or WALL.

    distance: along the ray. objects: for each object the rays that show it, the points there in its
    own frame, and the normals in the scene's.
    """

    surface: NDArray[np.int8]
    distance: Field
    objects: tuple[tuple[NDArray[np.intp], Fields, Fields], ...]
    full_areas: tuple[int, ...]


def camera_rays(camera: Camera, across: Field, down: Field) -> tuple[Fields, Field]:
    """Unit directions through picture positions (-1..1), and their lengths at depth 1."""
    right, up, forward = camera.axes
    x, y = across * np.float32(camera.tangent), down * np.float32(-camera.tangent)
    length = np.sqrt(x * x + y * y + np.float32(1))
    x, y, inverse = x / length, y / length, np.float32(1) / length
    dx, dy, dz = (x * right[i] + y * up[i] + inverse * forward[i] for i in range(3))
    return (dx, dy, dz), length


def trace(scene: Scene, rays: Fields) -> Hits:
    _, oy, oz = scene.camera.position
    dx, dy, dz = rays
    distance = np.float32(-oz) / dz
    surface = np.full(len(dx), GROUND, np.int8)
    is_sky = (distance < 0) | (distance > HORIZON)
    distance[is_sky] = MISS
    surface[is_sky] = SKY
    if scene.backdrop.wall_y is not None:
        to_wall = np.float32(scene.backdrop.wall_y - oy) / dy
        on_wall = (to_wall > 0) & (to_wall < distance)
        distance[on_wall] = to_wall[on_wall]
        surface[on_wall] = WALL
    found = []
    full_areas = []
    for number, thing in enumerate(scene.objects, start=1):
        cx, cy, cz = (c - o for c, o in zip(thing.centre, scene.camera.position, strict=True))
        along = dx * cx + dy * cy + dz * cz
        # the sphere around the solid, seen from the camera, is a cone around the way to its centre
        reach = cx * cx + cy * cy + cz * cz - thing.bounding_radius * thing.bounding_radius
        near = np.flatnonzero(along > np.float32(math.sqrt(max(0.0, reach))))
        nx, ny, nz, middle = dx[near], dy[near], dz[near], along[near]
        start = _to_object(thing, (nx * middle - cx, ny * middle - cy, nz * middle - cz))
        ray = _to_object(thing, (nx, ny, nz))
        inside = entry_distance(thing.shape, thing.radius, thing.half_height, start, ray)
        is_hit = inside < MISS
        full_areas.append(int(np.count_nonzero(is_hit)))
        total = inside + middle
        shown = np.flatnonzero(is_hit & (total < distance[near]))
        where = near[shown]
        distance[where] = total[shown]
        surface[where] = number
        t = inside[shown]
        sx, sy, sz = (p[shown] + d[shown] * t for p, d in zip(start, ray, strict=True))
        found.append((where, (sx, sy, sz)))
    objects = []
    for number, (thing, (where, local)) in enumerate(
        zip(scene.objects, found, strict=True), start=1
    ):
        kept = np.flatnonzero(surface[where] == number)
        lx, ly, lz = (p[kept] for p in local)
        normal = surface_normal(thing.shape, thing.radius, thing.half_height, (lx, ly, lz))
        objects.append((where[kept], (lx, ly, lz), _to_scene(thing, normal)))
    return Hits(surface, distance, tuple(objects), tuple(full_areas))


def _to_object(thing: SceneObject, vectors: Fields) -> Fields:
    cos, sin = thing.heading
    x, y, z = vectors
    return x * cos + y * sin, y * cos - x * sin, z


def _to_scene(thing: SceneObject, vectors: Fields) -> Fields:
    cos, sin = thing.heading
    x, y, z = vectors
    return x * cos - y * sin, x * sin + y * cos, z


def end_points(camera: Camera, rays: Fields, hits: Hits) -> Fields:
    """Where the rays end; anywhere for the sky."""
    distance = np.where(hits.surface == SKY, np.float32(0), hits.distance)
    x, y, z = (d * distance + o for d, o in zip(rays, camera.position, strict=True))
    return x, y, z


def facing_light(scene: Scene, hits: Hits, points: Fields) -> Field:
    """Cosine between normal and light, at least 0; of a lamp also times its brightness there."""
    tx, ty, tz = scene.light.toward
    if scene.light.kind == "sun":
        facing = np.where(hits.surface == GROUND, np.float32(tz), np.float32(0))
        if scene.backdrop.wall_y is not None:
            facing[hits.surface == WALL] = max(0.0, -ty)
        for where, _, (nx, ny, nz) in hits.objects:
            facing[where] = np.maximum(nx * tx + ny * ty + nz * tz, 0)
        return facing
    px, py, pz = points
    lx, ly, lz = scene.light.position
    fx, fy, fz = lx - px, ly - py, lz - pz
    square = fx * fx + fy * fy + fz * fz
    # The first power of the distance, as of a tube: with the square most of a picture is dark. One
    # more for the length of (fx, fy, fz).
    bright = np.float32(LAMP_DISTANCE) / square
    facing = np.where(hits.surface == GROUND, fz, np.float32(0))
    if scene.backdrop.wall_y is not None:
        on_wall = hits.surface == WALL
        facing[on_wall] = np.maximum(-fy[on_wall], 0)
    for where, _, (nx, ny, nz) in hits.objects:
        cosine = nx * fx[where] + ny * fy[where] + nz * fz[where]
        facing[where] = np.maximum(cosine, 0)
    return facing * bright


def occluders(scene: Scene, hits: Hits, points: Fields, facing: Field) -> NDArray[np.uint8]:
    """The object that each point's ray to the light meets first; 0 where it meets none."""
    shadows = np.zeros(len(facing), np.uint8)
    nearest = np.full(len(facing), MISS, np.float32)
    lit = np.flatnonzero(facing > 0)
    px, py, pz = (p[lit] for p in points)
    surface = hits.surface[lit]
    to_light = _to_light(scene.light, px, py, pz)
    for number, thing in enumerate(scene.objects, start=1):
        cx, cy, cz = thing.centre
        ax, ay, az = cx - px, cy - py, cz - pz
        along = ax * to_light[0] + ay * to_light[1] + az * to_light[2]
        # Pythagoras: how far the ray passes beside the centre; wider by what rounding may cost
        radius = thing.bounding_radius
        reach = along * along + np.float32(radius * radius * 1.01 + 1e-4)
        square = ax * ax
        square += ay * ay
        square += az * az
        is_ahead = along > np.float32(-radius)
        near = np.flatnonzero((square < reach) & is_ahead & (surface != number))
        if not len(near):
            continue
        middle = along[near]
        dx, dy, dz = (
            d[near] if isinstance(d, np.ndarray) else np.full(len(near), d, np.float32)
            for d in to_light
        )
        start = (dx * middle - ax[near], dy * middle - ay[near], dz * middle - az[near])
        inside = entry_distance(
            *(thing.shape, thing.radius, thing.half_height),
            _to_object(thing, start),
            _to_object(thing, (dx, dy, dz)),
        )
        total = inside + middle
        where = lit[near]
        first = (total > CLEARANCE) & (total < nearest[where])
        nearest[where[first]] = total[first]
        shadows[where[first]] = number
    return shadows


def _to_light(
    light: Light, px: Field, py: Field, pz: Field
) -> tuple[Field | float, Field | float, Field | float]:
    """Unit vectors from points to the light; of a sun one for all."""
    if light.kind == "sun":
        return light.toward
    sx, sy, sz = light.position
    fx, fy, fz = sx - px, sy - py, sz - pz
    inverse = np.float32(1) / np.sqrt(fx * fx + fy * fy + fz * fz)
    return fx * inverse, fy * inverse, fz * inverse
