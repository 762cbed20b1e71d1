"""What is in a synthetic scene: solids on a ground, a light, a camera, what lies behind.

The unit is the metre; x points right, y away from the viewer, z up, the ground is z = 0.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, TypeVar

from groundwork.data.sources.scenes_shapes import (
    SHAPES,
    Shape,
    bounding_radius,
    footprint_radius,
)

Vector = tuple[float, float, float]
Material = Literal["matt", "shiny", "striped", "checked"]
Size = Literal["small", "large"]
T = TypeVar("T")

#: Colour name -> sRGB.
COLOURS: Final = {
    "red": (206, 38, 46),
    "orange": (240, 134, 30),
    "yellow": (244, 208, 52),
    "green": (52, 150, 66),
    "cyan": (60, 192, 204),
    "blue": (40, 84, 196),
    "purple": (122, 54, 158),
    "pink": (240, 140, 176),
}
MATERIALS: Final[tuple[Material, ...]] = ("matt", "shiny", "striped", "checked")
SIZES: Final[tuple[Size, ...]] = ("small", "large")
#: Half of a solid's height lies in this range, in metres.
HALF_HEIGHTS: Final = {"small": (0.27, 0.34), "large": (0.55, 0.68)}
#: Radius in half heights. A cube has its half side here.
PROPORTIONS: Final = {"sphere": 1.0, "cube": 1.0, "cylinder": 0.82, "cone": 0.95}
MAX_OBJECTS: Final = 6
#: Free ground between two solids, in metres.
GAP: Final = 0.12
#: Share of the small solids, of those that come after a large one, that are put in a shadow: by
#: chance alone hardly any would be.
IN_SHADOW: Final = 0.4
#: Places tried for a solid before the scene does without it.
PLACING_TRIES: Final = 60
#: sRGB of the ground; the sky meets it at the horizon.
GROUNDS: Final = (
    (214, 208, 198),
    (190, 200, 206),
    (218, 206, 180),
    (178, 190, 172),
    (204, 190, 200),
    (150, 156, 164),
    (222, 220, 216),
    (196, 172, 146),
)
WALLS: Final = (
    (226, 222, 212),
    (182, 202, 214),
    (214, 196, 176),
    (198, 210, 190),
    (222, 200, 200),
    (168, 174, 188),
)
SKIES: Final = ((196, 214, 232), (236, 236, 232), (228, 216, 200), (206, 212, 222))
GroundPattern = Literal["plain", "tiles", "boards"]
GROUND_PATTERNS: Final[tuple[GroundPattern, ...]] = ("plain", "plain", "tiles", "boards")


@dataclass(frozen=True)
class SceneObject:
    """A solid that stands on the ground.

    x, y: of its centre; its centre's z is half_height. heading: (cos, sin) of its turn about z.
    rgb: sRGB, near the colour that `colour` names. pattern_frequency: stripes or checks per metre;
    pattern_phase: their shift.
    """

    shape: Shape
    colour: str
    material: Material
    size: Size
    radius: float
    half_height: float
    x: float
    y: float
    heading: tuple[float, float]
    rgb: tuple[int, int, int]
    pattern_frequency: float
    pattern_phase: float

    @property
    def centre(self) -> Vector:
        return (self.x, self.y, self.half_height)

    @property
    def bounding_radius(self) -> float:
        return bounding_radius(self.shape, self.radius, self.half_height)

    @property
    def footprint(self) -> float:
        """Radius of the disc on the ground that no other solid may touch."""
        return footprint_radius(self.shape, self.radius)


@dataclass(frozen=True)
class Light:
    """kind: a sun shines from a direction, a lamp from a place.

    toward: unit vector from the origin to the light. distance: of a lamp from the origin, metres.
    softness: width of the blur at the border of a shadow, in image widths; 0 is a hard border.
    """

    kind: Literal["sun", "lamp"]
    toward: Vector
    distance: float
    strength: float
    softness: float

    @property
    def position(self) -> Vector:
        x, y, z = self.toward
        return (x * self.distance, y * self.distance, z * self.distance)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks from `position` at `target`, upright.

    tangent: of half the angle of view, the same across and down: pictures are square.
    """

    position: Vector
    target: Vector
    tangent: float

    @cached_property
    def axes(self) -> tuple[Vector, Vector, Vector]:
        """Unit vectors to the right, up and forward."""
        forward = _unit(_minus(self.target, self.position))
        right = _unit((forward[1], -forward[0], 0.0))
        return right, _cross(right, forward), forward

    def view(self, point: Vector) -> Vector:
        """A point in the camera's frame: (right, up, forward) in metres."""
        offset = _minus(point, self.position)
        right, up, forward = (_dot(offset, axis) for axis in self.axes)
        return right, up, forward


@dataclass(frozen=True)
class Backdrop:
    """Ground, sky and, if wall_y is given, a wall across the scene at that y. Colours are sRGB."""

    ground: tuple[int, int, int]
    pattern: GroundPattern
    pattern_size: float
    sky: tuple[int, int, int]
    wall: tuple[int, int, int]
    wall_y: float | None


@dataclass(frozen=True)
class Scene:
    """objects[k - 1] has the number k in masks and boxes."""

    objects: tuple[SceneObject, ...]
    light: Light
    camera: Camera
    backdrop: Backdrop


@dataclass(frozen=True)
class SceneSettings:
    """objects: least and most solids. heldout_pairs: (colour, shape) that do not occur, unless
    `compositional`, where at least the first solid is such a pair."""

    objects: tuple[int, int]
    heldout_pairs: frozenset[tuple[str, str]]
    compositional: bool


def choose_scene(settings: SceneSettings, rng: random.Random) -> Scene:
    """Draw a scene: a pure function of the settings and the generator's state."""
    room = rng.random() < 0.4
    light = _choose_light(rng, room)
    objects = _choose_objects(settings, light, rng)
    azimuth = _range(rng, -28, 28)
    camera = frame(
        [objects],
        azimuths=[azimuth],
        elevation=_range(rng, 22, 48),
        tangent=_range(rng, 0.28, 0.45),
        margin=_range(rng, 1.03, 1.25),
    )[0]
    return Scene(objects, light, camera, _choose_backdrop(rng, objects, room))


def frame(
    frames: Sequence[Sequence[SceneObject]],
    *,
    azimuths: Sequence[float],
    elevation: float,
    tangent: float,
    margin: float,
) -> list[Camera]:
    """Cameras, one per azimuth, that look at the middle of the objects from one distance.

    frames: the objects at each moment; at every moment and from every azimuth all are in the
    picture. azimuths, elevation: of the camera, degrees; azimuth 0 looks along y. margin: 1 lets
    the outermost object touch the border.
    """
    everything = [thing for moment in frames for thing in moment]
    xs, ys = [t.x for t in everything], [t.y for t in everything]
    height = max(t.half_height for t in everything)
    target = ((min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, height * 0.8)
    cos_e, sin_e = cos_sin(elevation)
    backwards = []
    for azimuth in azimuths:
        cos_a, sin_a = cos_sin(azimuth)
        backwards.append((-sin_a * cos_e, -cos_a * cos_e, sin_e))
    # the sphere of radius r touches the border at r / cos(half angle of view) from its centre
    widening = math.sqrt(1 + tangent * tangent)
    distance = 3.0
    for backward in backwards:
        at_target = Camera(_plus(target, backward), target, tangent)
        for thing in everything:
            right, up, forward = at_target.view(thing.centre)
            reach = max(abs(right), abs(up)) + thing.bounding_radius * widening
            distance = max(distance, reach * margin / tangent - (forward - 1.0))
    return [Camera(_plus(target, _times(b, distance)), target, tangent) for b in backwards]


def cos_sin(angle_deg: float) -> tuple[float, float]:
    """Rounded, since C libraries differ in the last bits."""
    angle = math.radians(angle_deg)
    return round(math.cos(angle), 9), round(math.sin(angle), 9)


def direction(azimuth_deg: float, elevation_deg: float) -> Vector:
    """Unit vector: azimuth 0 is along y, 90 along x."""
    (cos_a, sin_a), (cos_e, sin_e) = cos_sin(azimuth_deg), cos_sin(elevation_deg)
    return sin_a * cos_e, cos_a * cos_e, sin_e


def is_free(x: float, y: float, footprint: float, others: Sequence[SceneObject]) -> bool:
    """Whether a solid of this footprint can stand at (x, y) beside the others."""
    for other in others:
        dx, dy, apart = x - other.x, y - other.y, footprint + other.footprint + GAP
        if dx * dx + dy * dy <= apart * apart:
            return False
    return True


def _choose_objects(
    settings: SceneSettings, light: Light, rng: random.Random
) -> tuple[SceneObject, ...]:
    least, most = settings.objects
    count = least + int(rng.random() * (most - least + 1))
    radius = 0.55 + 0.2 * count
    objects: list[SceneObject] = []
    while len(objects) < count:
        size, material = _pick(rng, SIZES), _pick(rng, MATERIALS)
        colour, shape = _choose_pair(settings, rng, first=not objects)
        half_height = _range(rng, *HALF_HEIGHTS[size])
        base = half_height * PROPORTIONS[shape]
        heading = cos_sin(_range(rng, 0, 90))
        look = (_tint(rng, COLOURS[colour]), _range(rng, 3.0, 4.5), _range(rng, 0, 1))
        footprint = footprint_radius(shape, base)
        shading = [o for o in objects if o.size == "large"] if size == "small" else []
        in_shadow = bool(shading) and rng.random() < IN_SHADOW
        for attempt in range(PLACING_TRIES + 1):
            # the ground grows until there is room, so a scene has as many solids as were drawn
            reach = radius * (1 + max(0, attempt - PLACING_TRIES // 2) / 10)
            # deeper than wide, since the view foreshortens depth
            x, y = _range(rng, -reach, reach), 1.4 * _range(rng, -reach, reach)
            if in_shadow and attempt < PLACING_TRIES // 4:
                x, y = _shaded_place(_pick(rng, shading), light, footprint, rng)
            if is_free(x, y, footprint, objects):
                objects.append(
                    SceneObject(
                        *(shape, colour, material, size, base, half_height, x, y, heading), *look
                    )
                )
                break
    return tuple(objects)


def _shaded_place(
    shading: SceneObject, light: Light, footprint: float, rng: random.Random
) -> tuple[float, float]:
    """A place near the foot of a solid, on its side away from the light."""
    x, y, z = light.toward
    level = math.sqrt(x * x + y * y)
    length = shading.half_height * level / z  # half of its shadow's
    away = shading.footprint + footprint + GAP + rng.random() * 0.6 * length
    return shading.x - x / level * away, shading.y - y / level * away


def _choose_pair(settings: SceneSettings, rng: random.Random, *, first: bool) -> tuple[str, Shape]:
    must_be_heldout = settings.compositional and first
    while True:
        colour, shape = _pick(rng, tuple(COLOURS)), _pick(rng, SHAPES)
        is_heldout = (colour, shape) in settings.heldout_pairs
        if is_heldout == must_be_heldout or (settings.compositional and not first):
            return colour, shape


def _choose_light(rng: random.Random, room: bool) -> Light:
    # Before a wall the light comes from the viewer's side, else the wall would be dark. It never
    # comes from the viewer, where objects hide their shadows.
    aside = 30 + rng.random() * (45 if room else 105)
    azimuth = 180 + (aside if rng.random() < 0.5 else -aside)
    kind: Literal["sun", "lamp"] = "sun" if rng.random() < 0.6 else "lamp"
    toward = direction(azimuth, _range(rng, 26, 56))
    strength = _range(rng, 0.82, 1.0)
    soft = rng.random() < 0.6
    softness = _range(rng, 0.006, 0.016) if soft else 0.0
    return Light(kind, toward, _range(rng, 7, 11), strength, softness)


def _choose_backdrop(rng: random.Random, objects: tuple[SceneObject, ...], room: bool) -> Backdrop:
    behind = max(thing.y + thing.footprint for thing in objects)
    return Backdrop(
        ground=_tint(rng, _pick(rng, GROUNDS)),
        pattern=_pick(rng, GROUND_PATTERNS),
        pattern_size=_range(rng, 0.45, 0.9),
        sky=_tint(rng, _pick(rng, SKIES)),
        wall=_tint(rng, _pick(rng, WALLS)),
        wall_y=behind + _range(rng, 0.3, 1.6) if room else None,
    )


def _tint(rng: random.Random, rgb: tuple[int, int, int], width: int = 8) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + int((rng.random() * 2 - 1) * width))) for c in rgb)
    return r, g, b


def _range(rng: random.Random, low: float, high: float) -> float:
    return round(low + (high - low) * rng.random(), 4)


def _pick(rng: random.Random, choices: Sequence[T]) -> T:
    # not rng.choice, whose algorithm Python may change
    return choices[int(rng.random() * len(choices))]


def _unit(v: Vector) -> Vector:
    return _times(v, 1 / math.sqrt(_dot(v, v)))


def _dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _plus(a: Vector, b: Vector) -> Vector:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _minus(a: Vector, b: Vector) -> Vector:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def _times(v: Vector, factor: float) -> Vector:
    return v[0] * factor, v[1] * factor, v[2] * factor


def _cross(a: Vector, b: Vector) -> Vector:
    return (
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    )
