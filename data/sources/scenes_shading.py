"""The colours of a synthetic scene: light from sky and ground, contact shade, gloss, patterns."""

from typing import Final

import numpy as np

from groundwork.data.sources.scenes_description import Scene, SceneObject
from groundwork.data.sources.scenes_shapes import Field, Fields
from groundwork.data.sources.scenes_tracing import SKY, WALL, Hits

#: Red, green and blue of the light from the sky, from the ground, and from the sun or lamp.
SKY_LIGHT: Final = (0.31, 0.34, 0.39)
GROUND_LIGHT: Final = (0.20, 0.18, 0.16)
DIRECT_LIGHT: Final = (1.02, 0.95, 0.84)
#: Share of white in the second tint of stripes and checks.
PATTERN_WHITE: Final = 0.6
#: How much darker every other tile or board of the ground is.
GROUND_CONTRAST: Final = 0.13
#: Between these distances the ground fades into the sky and its pattern into it, in metres.
FADE: Final = (10.0, 32.0)
PATTERN_FADE: Final = 16.0
#: Where ground and wall meet, the light of the sky fades over this many metres.
CORNER: Final = 0.9
#: How dark the ground gets below a solid that touches it.
CONTACT: Final = 0.8
#: Strength of the highlight, and how often its cosine is squared.
HIGHLIGHTS: Final = {"matt": (0.05, 3), "striped": (0.08, 4), "checked": (0.08, 4)}
SHINY_HIGHLIGHT: Final = (0.9, 6)


def shade(scene: Scene, rays: Fields, hits: Hits, points: Fields, direct: Field) -> Field:
    """The light that comes back along each ray, linear: (3, N).

    direct: what arrives of the sun or lamp, with its angle and the shadows, (N,).
    """
    direct = direct * np.float32(scene.light.strength)
    colour = np.empty((3, len(direct)), np.float32)
    _shade_planes(scene, hits, points, direct, colour)
    for thing, (where, local, normal) in zip(scene.objects, hits.objects, strict=True):
        if len(where):
            ray = (rays[0][where], rays[1][where], rays[2][where])
            point = (points[0][where], points[1][where], points[2][where])
            colour[:, where] = _shade_object(scene, thing, ray, point, local, normal, direct[where])
    return colour


def _shade_planes(scene: Scene, hits: Hits, points: Fields, direct: Field, colour: Field) -> None:
    """Ground, wall and sky, into `colour`. All pixels are drawn as ground first."""
    backdrop = scene.backdrop
    x, y, z = points
    on_wall = np.flatnonzero(hits.surface == WALL)
    open_sky = _open_sky(scene, x, y)
    tint = _ground_tint(scene, x, y, hits.distance)
    fade = None
    if backdrop.wall_y is None:
        fade = (hits.distance - np.float32(FADE[0])) * np.float32(1 / (FADE[1] - FADE[0]))
        fade = np.clip(fade, 0, 1)
        fade = fade * fade * (np.float32(3) - fade - fade)
    else:
        corner = np.clip((backdrop.wall_y - y) * np.float32(1 / CORNER), 0, 1)
        open_sky *= np.float32(0.7) + np.float32(0.3) * corner
        corner = np.clip(z[on_wall] * np.float32(1 / CORNER), 0, 1)
        wall_sky = np.float32(0.7) + np.float32(0.3) * corner
    ground, wall, sky = (_linear(c) for c in (backdrop.ground, backdrop.wall, backdrop.sky))
    for channel in range(3):
        value = open_sky * SKY_LIGHT[channel] + direct * DIRECT_LIGHT[channel]
        value *= ground[channel]
        if tint is not None:
            value *= tint
        if fade is not None:
            value += (sky[channel] - value) * fade
        if len(on_wall):
            sideways = (SKY_LIGHT[channel] + GROUND_LIGHT[channel]) * 0.6
            light = wall_sky * np.float32(sideways) + direct[on_wall] * DIRECT_LIGHT[channel]
            value[on_wall] = light * wall[channel]
        value[hits.surface == SKY] = sky[channel]
        colour[channel] = value


def _open_sky(scene: Scene, x: Field, y: Field) -> Field:
    """Share of the sky that each point of the ground sees past the objects.

    Each is taken for a ball, whose part of the sky above a plane has a closed form.
    """
    share = np.ones(len(x), np.float32)
    for thing in scene.objects:
        height, radius = thing.half_height, thing.radius
        gx, gy = x - thing.x, y - thing.y
        square = gx * gx + gy * gy
        near = np.flatnonzero(square < np.float32(3.2 * radius * 3.2 * radius))
        square = square[near] + np.float32(height * height)
        hidden = np.float32(radius * radius * height) / (square * np.sqrt(square))
        hidden = np.maximum(hidden - np.float32(0.03), 0) * np.float32(CONTACT)
        share[near] *= np.float32(1) - np.minimum(hidden, np.float32(CONTACT))
    return share


def _ground_tint(scene: Scene, x: Field, y: Field, distance: Field) -> Field | None:
    """Factor of the ground's colour; None for a plain one."""
    pattern, inverse = scene.backdrop.pattern, np.float32(1 / scene.backdrop.pattern_size)
    if pattern == "plain":
        return None
    cells = np.floor(x * inverse)
    if pattern == "tiles":
        cells += np.floor(y * inverse)
    # so that far cells, smaller than a pixel, do not flicker
    strength = np.maximum(np.float32(1) - distance * np.float32(1 / PATTERN_FADE), 0)
    return np.float32(1) - strength * (_parity(cells) * np.float32(GROUND_CONTRAST))


def _shade_object(
    scene: Scene,
    thing: SceneObject,
    ray: Fields,
    point: Fields,
    local: Fields,
    normal: Fields,
    direct: Field,
) -> Field:
    """Colour of the visible points of one object: (3, N)."""
    nz = normal[2]
    # Near the ground a wall sees less of the sky.
    raised = np.minimum(point[2] * np.float32(0.9 / thing.half_height), 1)
    open_sky = np.float32(1) - (np.float32(1) - raised) * np.float32(0.55) * (
        np.float32(1) - np.maximum(nz, 0)
    )
    upward = nz * np.float32(0.5) + np.float32(0.5)
    glint, mirrored, gloss = _gloss(scene, thing, ray, point, normal)
    glint *= np.minimum(direct, 1)
    second = _pattern(thing, local)
    albedo = _linear(thing.rgb)
    ground, sky = _linear(scene.backdrop.ground), _linear(scene.backdrop.sky)
    colour = np.empty((3, len(nz)), np.float32)
    for channel in range(3):
        below, above = GROUND_LIGHT[channel], SKY_LIGHT[channel]
        light = (upward * np.float32(above - below) + np.float32(below)) * open_sky
        light += direct * np.float32(DIRECT_LIGHT[channel])
        own: Field | np.float32 = np.float32(albedo[channel])
        if second is not None:
            own = own + second * np.float32((0.86 - albedo[channel]) * PATTERN_WHITE)
        value = light * own
        if gloss is not None:
            around = mirrored * np.float32(sky[channel] - 0.5 * ground[channel])
            around += np.float32(0.5 * ground[channel])
            value += (around - value) * gloss
        colour[channel] = value + glint
    return colour


def _gloss(
    scene: Scene, thing: SceneObject, ray: Fields, point: Fields, normal: Fields
) -> tuple[Field, Field, Field | None]:
    """The highlight; how far the mirrored ray looks up (0..1); how much a shiny surface mirrors."""
    (dx, dy, dz), (nx, ny, nz) = ray, normal
    lx, ly, lz = (np.float32(c) for c in scene.light.toward)
    hx, hy, hz = lx - dx, ly - dy, lz - dz
    if scene.light.kind == "lamp":
        sx, sy, sz = (np.float32(c) for c in scene.light.position)
        fx, fy, fz = sx - point[0], sy - point[1], sz - point[2]
        inverse = np.float32(1) / np.sqrt(fx * fx + fy * fy + fz * fz)
        hx, hy, hz = fx * inverse - dx, fy * inverse - dy, fz * inverse - dz
    cosine = (nx * hx + ny * hy + nz * hz) / np.sqrt(hx * hx + hy * hy + hz * hz)
    cosine = np.maximum(cosine, 0)
    strength, squarings = HIGHLIGHTS.get(thing.material, SHINY_HIGHLIGHT)
    for _ in range(squarings):
        cosine = cosine * cosine
    glint = cosine * np.float32(strength)
    if thing.material != "shiny":
        return glint, nz, None
    towards = -(dx * nx + dy * ny + dz * nz)
    mirrored = np.clip((dz + (towards + towards) * nz) * np.float32(2) + np.float32(0.4), 0, 1)
    grazing = np.clip(np.float32(1) - towards, 0, 1)
    grazing = grazing * grazing
    return glint, mirrored, np.float32(0.10) + np.float32(0.5) * grazing * grazing


def _pattern(thing: SceneObject, local: Fields) -> Field | None:
    """1 where the second tint shows, 0 elsewhere; None for an object of one tint."""
    if thing.material not in ("striped", "checked"):
        return None
    frequency, phase = np.float32(thing.pattern_frequency), np.float32(thing.pattern_phase)
    x, y, z = local
    cells = np.floor(z * frequency + phase)
    if thing.material == "checked":
        cells += np.floor(x * frequency + phase) + np.floor(y * frequency + phase)
    return _parity(cells)


def _parity(cells: Field) -> Field:
    """0 for even, 1 for odd whole numbers."""
    half = cells * np.float32(0.5)
    parity: Field = (half - np.floor(half)) * np.float32(2)
    return parity


def _linear(rgb: tuple[int, int, int]) -> tuple[float, float, float]:
    """Linear light of a colour; the square stands for the curve of sRGB."""
    r, g, b = (c * c / (255 * 255) for c in rgb)
    return r, g, b
