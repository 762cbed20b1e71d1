"""What is true of a drawn synthetic scene: boxes, areas, shadows, relations between objects."""

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from groundwork.data.sources.scenes_description import Scene, SceneObject, Vector
from groundwork.data.sources.scenes_renderer import DEPTH_PER_METRE, Rendering

Predicate = Literal[
    "to the left of",
    "to the right of",
    "in front of",
    "behind",
    "larger than",
    "smaller than",
    "in the shadow of",
]
#: An object is listed if it shows at least this part of itself ...
VISIBLE_PART: Final = 0.25
#: ... and at least the square of this part of the picture's side.
VISIBLE_SIDE: Final = 0.05
#: A shadow is listed if it covers the square of this part of the picture's side.
SHADOW_SIDE: Final = 0.04
#: Left and right: centres of boxes differ by this part of the picture and of their mean width.
ASIDE: Final = 0.08
ASIDE_WIDTH: Final = 0.5
#: Before and behind: metres on the ground, away from the viewer, and this part of both radii, so
#: that hardly any of the one is beside the other; the nearer also ends this much lower.
NEARER: Final = 0.5
NEARER_RADII: Final = 0.7
LOWER: Final = 0.02
#: Larger: in height, and in pixels if nothing hid it.
LARGER: Final = 1.5
LARGER_AREA: Final = 1.3
#: In the shadow of another: this part of the visible pixels is.
SHADED_PART: Final = 0.25
#: Light from the side: component of the direction to the light, in the camera's frame.
LIGHT_ASIDE: Final = 0.4


@dataclass(frozen=True)
class Seen:
    """An object as the picture shows it.

    number: in the masks. box: (x0, y0, x1, y1) in pixels around the visible part, x1 and y1 just
    outside. area: visible pixels; full_area: pixels if nothing stood before it. shadow_area: pixels
    of its shadow, wherever it falls. shaded_by: other object's number -> pixels of this one in its
    shadow. away: its distance from the camera over the ground, straight ahead, in metres.
    is_listed: whether enough is visible for boxes and texts to speak of it.
    """

    number: int
    thing: SceneObject
    box: tuple[int, int, int, int]
    area: int
    full_area: int
    shadow_area: int
    shaded_by: dict[int, int]
    away: float
    is_listed: bool


@dataclass(frozen=True)
class Facts:
    """seen: every object with at least one visible pixel. relations: (subject, predicate, object)
    between listed ones. light_from: the side of the picture, if it is one clearly.
    """

    size: int
    seen: tuple[Seen, ...]
    relations: tuple[tuple[int, Predicate, int], ...]
    light_from: Literal["left", "right"] | None
    has_wall: bool

    @property
    def listed(self) -> tuple[Seen, ...]:
        return tuple(s for s in self.seen if s.is_listed)

    @property
    def is_countable(self) -> bool:
        """Whether every object that shows at all is listed."""
        return all(s.is_listed for s in self.seen)

    @property
    def salient(self) -> Seen | None:
        """The listed object with most visible pixels; of equal ones the first."""
        return max(self.listed, key=lambda s: (s.area, -s.number), default=None)


def find_facts(scene: Scene, rendering: Rendering) -> Facts:
    size = len(rendering.instances)
    numbers = len(scene.objects) + 1
    joint = rendering.instances.astype(np.intp) * numbers + rendering.shadows
    # table[j][k]: pixels of object j in the shadow of object k
    table = np.bincount(joint.ravel(), minlength=numbers * numbers).reshape(numbers, numbers)
    seen = []
    for number, thing in enumerate(scene.objects, start=1):
        area = int(table[number].sum())
        if not area:
            continue
        mask = rendering.instances == number
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        full_area = rendering.full_areas[number - 1]
        seen.append(
            Seen(
                number=number,
                thing=thing,
                box=(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1),
                area=area,
                full_area=full_area,
                shadow_area=int(table[:, number].sum()),
                shaded_by={k: int(n) for k, n in enumerate(table[number]) if k and n},
                away=_away(scene, thing),
                is_listed=area >= max(full_area * VISIBLE_PART, (size * VISIBLE_SIDE) ** 2),
            )
        )
    return Facts(
        size=size,
        seen=tuple(seen),
        relations=_relations([s for s in seen if s.is_listed], size),
        light_from=_light_from(scene),
        has_wall=scene.backdrop.wall_y is not None,
    )


def _relations(listed: list[Seen], size: int) -> tuple[tuple[int, Predicate, int], ...]:
    """All relations that hold with a margin, so that nobody who looks would doubt them."""
    found: list[tuple[int, Predicate, int]] = []
    for a in listed:
        for b in listed:
            if a is b:
                continue
            pair = (a.number, b.number)
            widths = (a.box[2] - a.box[0] + b.box[2] - b.box[0]) / 2
            aside = (b.box[0] + b.box[2] - a.box[0] - a.box[2]) / 2
            if abs(aside) > max(ASIDE * size, ASIDE_WIDTH * widths):
                found.append(
                    (pair[0], "to the left of" if aside > 0 else "to the right of", pair[1])
                )
            nearer, lower = b.away - a.away, a.box[3] - b.box[3]
            gap = max(NEARER, NEARER_RADII * (a.thing.footprint + b.thing.footprint))
            if nearer > gap and lower > LOWER * size:
                found.append((pair[0], "in front of", pair[1]))
            elif -nearer > gap and -lower > LOWER * size:
                found.append((pair[0], "behind", pair[1]))
            if _is_larger(a, b):
                found.append((pair[0], "larger than", pair[1]))
            elif _is_larger(b, a):
                found.append((pair[0], "smaller than", pair[1]))
            if a.shaded_by.get(b.number, 0) >= SHADED_PART * a.area:
                found.append((pair[0], "in the shadow of", pair[1]))
    return tuple(found)


def _is_larger(a: Seen, b: Seen) -> bool:
    return (
        a.thing.half_height > LARGER * b.thing.half_height
        and a.full_area > LARGER_AREA * b.full_area
    )


def _away(scene: Scene, thing: SceneObject) -> float:
    (x, y, _), (px, py, _) = scene.camera.axes[2], scene.camera.position
    return ((thing.x - px) * x + (thing.y - py) * y) / math.sqrt(x * x + y * y)


def _light_from(scene: Scene) -> Literal["left", "right"] | None:
    aside = _camera_vector(scene, scene.light.toward)[0]
    return "left" if aside < -LIGHT_ASIDE else "right" if aside > LIGHT_ASIDE else None


def _camera_vector(scene: Scene, vector: Vector) -> Vector:
    """A direction in the picture's frame: right, down, forward."""
    x, y, z = vector
    right, up, forward = (x * a + y * b + z * c for a, b, c in scene.camera.axes)
    return right, -up, forward


def shadow_pairs(facts: Facts) -> list[dict[str, int]]:
    """Listed objects with a shadow that can be seen, as numbers in the two masks."""
    least = (facts.size * SHADOW_SIDE) ** 2
    return [
        {"object": s.number, "shadow": s.number} for s in facts.listed if s.shadow_area >= least
    ]


def camera_info(scene: Scene, size: int) -> dict[str, Any]:
    """The camera as JSON: what turns pixels and depth into points.

    A pixel's centre (u, v) at depth z is position + z (right (u - c) / f + down (v - c) / f +
    forward), where c is `centre_px` and f is `focal_px`.
    """
    right, up, forward = scene.camera.axes
    return {
        "position": _rounded(scene.camera.position),
        "target": _rounded(scene.camera.target),
        "right": _rounded(right),
        "down": _rounded((-up[0], -up[1], -up[2])),
        "forward": _rounded(forward),
        "focal_px": round(size / 2 / scene.camera.tangent, 4),
        "centre_px": size / 2,
        "depth_per_metre": DEPTH_PER_METRE,
    }


def light_info(scene: Scene, facts: Facts) -> dict[str, Any]:
    """The light as JSON. direction: unit vector towards it, seen from the middle of the scene."""
    light = scene.light
    return {
        "kind": light.kind,
        "direction": _rounded(light.toward),
        "direction_in_camera": _rounded(_camera_vector(scene, light.toward)),
        "position": _rounded(light.position) if light.kind == "lamp" else None,
        "softness": light.softness,
        "from": facts.light_from,
    }


def _rounded(vector: Vector) -> list[float]:
    return [round(v, 5) for v in vector]
