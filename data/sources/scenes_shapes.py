"""The solids of the synthetic scenes: where a ray enters them, and which way their surface faces.

All is in a solid's own frame: its centre at the origin, its axis along z. Rays start at their point
nearest to the centre, so numbers stay near the solid's size and float32 is exact enough. Only
additions, products, quotients and roots are used: these are the same on every machine, sines and
powers of arrays are not.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Shape = Literal["sphere", "cube", "cylinder", "cone"]
#: Always float32; mypy cannot follow numpy through products with bool arrays.
Field = NDArray[np.floating[Any]]
#: x, y and z of many points or directions, each (N,).
Fields = tuple[Field, Field, Field]

SHAPES: Final[tuple[Shape, ...]] = ("sphere", "cube", "cylinder", "cone")
MISS: Final = np.float32(np.inf)
#: Added to a divisor, so that a ray along an axis gives a huge number and not a NaN.
TINY: Final = np.float32(1e-9)


def entry_distance(
    shape: Shape, radius: float, half_height: float, start: Fields, direction: Fields
) -> Field:
    """How far from `start`, which may be behind it, a ray enters the solid; MISS where it does not.

    start: the points of the rays nearest to the centre; direction: unit vectors -> (N,).
    """
    return ENTRIES[shape](np.float32(radius), np.float32(half_height), start, direction)


def surface_normal(shape: Shape, radius: float, half_height: float, point: Fields) -> Fields:
    """Outward unit normals at points on the surface; the bottom, never seen, has none."""
    return NORMALS[shape](np.float32(radius), np.float32(half_height), point)


def bounding_radius(shape: Shape, radius: float, half_height: float) -> float:
    """Radius of the sphere around the centre that holds the solid."""
    if shape == "sphere":
        return radius
    if shape == "cube":
        return half_height * math.sqrt(3)
    return math.sqrt(radius * radius + half_height * half_height)


def footprint_radius(shape: Shape, radius: float) -> float:
    """Radius of the disc around the axis that holds the solid."""
    return radius * math.sqrt(2) if shape == "cube" else radius


def _sphere_entry(
    radius: np.float32, half_height: np.float32, start: Fields, direction: Fields
) -> Field:
    x, y, z = start
    remaining = radius * radius - (x * x + y * y + z * z)
    distance: Field = -np.sqrt(np.maximum(remaining, 0))
    distance[remaining < 0] = MISS
    return distance


def _sphere_normal(radius: np.float32, half_height: np.float32, point: Fields) -> Fields:
    x, y, z = point
    scale = np.float32(1) / radius
    return x * scale, y * scale, z * scale


def _slab(start: Field, direction: Field, half_width: np.float32) -> tuple[Field, Field]:
    """Where rays enter and leave the space between two planes at +-half_width."""
    inverse = np.float32(1) / (direction + TINY)
    middle = start * inverse
    half = np.abs(inverse) * half_width
    return -middle - half, half - middle


def _cube_entry(
    radius: np.float32, half_height: np.float32, start: Fields, direction: Fields
) -> Field:
    enter, leave = _slab(start[0], direction[0], half_height)
    for axis in (1, 2):
        first, last = _slab(start[axis], direction[axis], half_height)
        enter, leave = np.maximum(enter, first), np.minimum(leave, last)
    enter[enter >= leave] = MISS
    return enter


def _cube_normal(radius: np.float32, half_height: np.float32, point: Fields) -> Fields:
    x, y, z = point
    ax, ay, az = np.abs(x), np.abs(y), np.abs(z)
    on_top = (az >= ax) & (az >= ay)
    on_x = ~on_top & (ax >= ay)
    on_y = ~on_top & ~on_x
    return np.sign(x) * on_x, np.sign(y) * on_y, np.sign(z) * on_top


def _cylinder_entry(
    radius: np.float32, half_height: np.float32, start: Fields, direction: Fields
) -> Field:
    (x, y, z), (dx, dy, dz) = start, direction
    a = dx * dx + dy * dy + TINY
    b = x * dx + y * dy
    c = x * x + y * y - radius * radius
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    first, last = _slab(z, dz, half_height)
    enter = np.maximum((-b - root) / a, first)
    leave = np.minimum((root - b) / a, last)
    enter[(discriminant < 0) | (enter >= leave)] = MISS
    return enter


def _cylinder_normal(radius: np.float32, half_height: np.float32, point: Fields) -> Fields:
    x, y, z = point
    # the rim belongs to whichever surface the point is nearer to
    side = radius - np.sqrt(x * x + y * y) < half_height - z
    scale = side / radius
    return x * scale, y * scale, np.asarray(~side, np.float32)


def _cone_entry(
    radius: np.float32, half_height: np.float32, start: Fields, direction: Fields
) -> Field:
    """The cone has its apex at z = half_height and its base of `radius` at z = -half_height."""
    (x, y, z), (dx, dy, dz) = start, direction
    slope = radius / (half_height + half_height)
    k = slope * slope
    below = half_height - z  # how far below the apex
    a = dx * dx + dy * dy - k * dz * dz
    a = np.where(np.abs(a) < 1e-7, np.float32(1e-7), a)
    b = x * dx + y * dy + k * below * dz
    c = x * x + y * y - k * below * below
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    near, far = (-b - root) / a, (root - b) / a
    near, far = np.minimum(near, far), np.maximum(near, far)
    # A ray steeper than the flank is inside the double cone before the one root and after the
    # other; the cone below the apex is on the side towards which the ray descends.
    steep, descends = a < 0, dz < 0
    enter = np.where(steep, np.where(descends, far, -MISS), near)
    leave = np.where(steep, np.where(descends, MISS, near), far)
    first, last = _slab(z, dz, half_height)
    enter, leave = np.maximum(enter, first), np.minimum(leave, last)
    enter[(discriminant < 0) | (enter >= leave)] = MISS
    return enter


def _cone_normal(radius: np.float32, half_height: np.float32, point: Fields) -> Fields:
    x, y, z = point
    slope = radius / (half_height + half_height)
    nz = slope * slope * (half_height - z)
    scale = np.float32(1) / np.sqrt(x * x + y * y + nz * nz + TINY)
    return x * scale, y * scale, nz * scale


ENTRIES: Final[Mapping[str, Callable[[np.float32, np.float32, Fields, Fields], Field]]] = {
    "sphere": _sphere_entry,
    "cube": _cube_entry,
    "cylinder": _cylinder_entry,
    "cone": _cone_entry,
}
NORMALS: Final[Mapping[str, Callable[[np.float32, np.float32, Fields], Fields]]] = {
    "sphere": _sphere_normal,
    "cube": _cube_normal,
    "cylinder": _cylinder_normal,
    "cone": _cone_normal,
}
