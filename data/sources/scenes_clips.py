"""Short videos of synthetic scenes: objects, camera or light move on straight or round paths."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from groundwork.data.sources.scenes_description import (
    Light,
    Scene,
    SceneObject,
    SceneSettings,
    choose_scene,
    cos_sin,
    frame,
    is_free,
)
from groundwork.data.sources.scenes_facts import SHADOW_SIDE, Facts, Seen, find_facts
from groundwork.data.sources.scenes_renderer import Rendering, render
from groundwork.data.sources.scenes_texts import (
    Caption,
    unique_phrase,
    write_captions,
)

#: Length of an object's path, in metres.
PATH: Final = (0.9, 2.0)
#: Paths tried for an object before it stands still.
PATH_TRIES: Final = 40
#: Places of a path at which it is tested, however many frames there are.
PATH_TESTS: Final = 12
#: Degrees by which the camera and the light turn about the scene.
CAMERA_TURN: Final = (14.0, 28.0)
LIGHT_TURN: Final = (30.0, 60.0)
#: A movement has a direction in words if the box's centre moves by this part of the picture ...
SIDEWAYS: Final = 0.12
#: ... or else the object comes nearer or goes by this many metres, and hardly to the side.
DEPTHWAYS: Final = 0.6


@dataclass(frozen=True)
class Clip:
    """scenes: one per frame; objects keep their numbers. movers: those that change their place."""

    scenes: tuple[Scene, ...]
    movers: frozenset[int]
    camera_moves: bool
    light_moves: bool


@dataclass(frozen=True)
class Track:
    """One object through a clip. boxes: per frame, None where it is not listed. areas: visible
    pixels per frame; shadow_areas: pixels of its shadow."""

    number: int
    thing: SceneObject
    moves: bool
    boxes: tuple[tuple[int, int, int, int] | None, ...]
    areas: tuple[int, ...]
    shadow_areas: tuple[int, ...]
    has_shadow: bool


@dataclass(frozen=True)
class DrawnClip:
    renderings: tuple[Rendering, ...]
    facts: tuple[Facts, ...]
    tracks: tuple[Track, ...]
    captions: list[Caption]
    questions: list[dict[str, Any]]


def choose_clip(settings: SceneSettings, rng: random.Random, frames: int) -> Clip:
    """Draw a clip: a pure function of the settings, the generator's state and `frames`.

    The paths do not depend on how many frames they are cut into.
    """
    scene = choose_scene(settings, rng)
    what = rng.random()
    camera_moves, light_moves = what < 0.2, 0.2 <= what < 0.4
    wanted = (1 if rng.random() < 0.7 else 2) if what >= 0.2 else 0
    order = sorted(range(len(scene.objects)), key=lambda _: rng.random())
    paths: dict[int, tuple[float, float]] = {}
    for index in order:
        if len(paths) < wanted and (path := _choose_path(scene, index, paths, rng)) is not None:
            paths[index] = path
    camera_moves = camera_moves or not (paths or light_moves)
    times = [i / (frames - 1) for i in range(frames)]
    moments = [_at(scene.objects, paths, time) for time in times]
    start = (rng.random() * 2 - 1) * 20
    turn = _signed(rng, CAMERA_TURN) if camera_moves else 0.0
    cameras = frame(
        # the framing is that of the whole paths
        [_at(scene.objects, paths, i / PATH_TESTS) for i in range(PATH_TESTS + 1)],
        azimuths=[start + turn * (time - 0.5) for time in times],
        elevation=24 + rng.random() * 22,
        tangent=scene.camera.tangent,
        margin=1.05,
    )
    light_turn = _signed(rng, LIGHT_TURN) if light_moves else 0.0
    scenes = tuple(
        Scene(objects, _turned(scene.light, light_turn * (time - 0.5)), camera, scene.backdrop)
        for objects, camera, time in zip(moments, cameras, times, strict=True)
    )
    return Clip(scenes, frozenset(i + 1 for i in paths), camera_moves, light_moves)


def draw_clip(clip: Clip, size: int, rng: random.Random) -> DrawnClip:
    """Draw all frames and say what is true of them."""
    renderings = tuple(render(scene, size) for scene in clip.scenes)
    facts = tuple(find_facts(s, r) for s, r in zip(clip.scenes, renderings, strict=True))
    tracks = tuple(
        _track(clip, facts, number) for number in range(1, len(clip.scenes[0].objects) + 1)
    )
    captions = _captions(clip, facts, tracks, rng)
    return DrawnClip(renderings, facts, tracks, captions, _questions(clip, facts, tracks, rng))


def _choose_path(
    scene: Scene, index: int, paths: dict[int, tuple[float, float]], rng: random.Random
) -> tuple[float, float] | None:
    """A straight way on which the object meets neither another nor the wall."""
    thing = scene.objects[index]
    for _ in range(PATH_TRIES):
        cos, sin = cos_sin(rng.random() * 360)
        length = PATH[0] + rng.random() * (PATH[1] - PATH[0])
        path = (cos * length, sin * length)
        if all(
            _is_open(scene, index, thing, paths, path, i / PATH_TESTS)
            for i in range(PATH_TESTS + 1)
        ):
            return path
    return None


def _is_open(
    scene: Scene,
    index: int,
    thing: SceneObject,
    paths: dict[int, tuple[float, float]],
    path: tuple[float, float],
    time: float,
) -> bool:
    others = [o for i, o in enumerate(_at(scene.objects, paths, time)) if i != index]
    x, y = thing.x + path[0] * time, thing.y + path[1] * time
    wall_y = scene.backdrop.wall_y
    before_wall = wall_y is None or y + thing.footprint < wall_y
    return before_wall and is_free(x, y, thing.footprint, others)


def _at(
    objects: Sequence[SceneObject], paths: dict[int, tuple[float, float]], time: float
) -> tuple[SceneObject, ...]:
    """The objects at a time between 0 and 1."""
    return tuple(
        replace(o, x=o.x + paths[i][0] * time, y=o.y + paths[i][1] * time) if i in paths else o
        for i, o in enumerate(objects)
    )


def _turned(light: Light, angle_deg: float) -> Light:
    cos, sin = cos_sin(angle_deg)
    x, y, z = light.toward
    return replace(light, toward=(x * cos - y * sin, x * sin + y * cos, z))


def _signed(rng: random.Random, size: tuple[float, float]) -> float:
    """A number of a size within a range, of either sign."""
    value = size[0] + rng.random() * (size[1] - size[0])
    return value if rng.random() < 0.5 else -value


def _track(clip: Clip, facts: Sequence[Facts], number: int) -> Track:
    seen = [_of(moment, number) for moment in facts]
    # an object out of sight may still throw a shadow, which is not counted then
    shadows = tuple(s.shadow_area if s else 0 for s in seen)
    return Track(
        number=number,
        thing=clip.scenes[0].objects[number - 1],
        moves=number in clip.movers,
        boxes=tuple(s.box if s and s.is_listed else None for s in seen),
        areas=tuple(s.area if s else 0 for s in seen),
        shadow_areas=shadows,
        has_shadow=max(shadows) >= (facts[0].size * SHADOW_SIDE) ** 2,
    )


def _of(facts: Facts, number: int) -> Seen | None:
    return next((seen for seen in facts.seen if seen.number == number), None)


def _captions(
    clip: Clip, facts: Sequence[Facts], tracks: Sequence[Track], rng: random.Random
) -> list[Caption]:
    """What moves, and how; then what stands in the first frame."""
    captions = []
    for track in tracks:
        name = _name(facts, track, rng) if track.moves else None
        if name is not None:
            way = "" if clip.camera_moves else _direction(clip, track)
            spans = {track.number: [(4, 4 + len(name))]}
            captions.append(Caption(f"The {name} moves{way}.", spans))
    if clip.camera_moves:
        captions.append(Caption("The camera moves around the scene.", {}))
    if clip.light_moves:
        captions.append(Caption("The light moves and the shadows turn.", {}))
    return [*captions, write_captions(facts[0], rng)[0]]


def _name(facts: Sequence[Facts], track: Track, rng: random.Random) -> str | None:
    """A phrase that fits this track only, in every frame; None where a frame does not list it."""
    if any(box is None for box in track.boxes):
        return None
    # the frame that shows most is the strictest
    fullest = max(facts, key=lambda f: len(f.seen))
    seen = _of(fullest, track.number)
    if seen is None or any(
        {s.number for s in f.seen} - {s.number for s in fullest.seen} for f in facts
    ):
        return None
    return unique_phrase(fullest, seen, rng)


def _direction(clip: Clip, track: Track) -> str:
    """The way of a moving object in the picture, in words; empty where no word fits well."""
    first, last = track.boxes[0], track.boxes[-1]
    if first is None or last is None:
        return ""
    size_moved = (last[0] + last[2] - first[0] - first[2]) / 2
    begin, end = (
        scene.camera.view(scene.objects[track.number - 1].centre)
        for scene in (clip.scenes[0], clip.scenes[-1])
    )
    aside, away = end[0] - begin[0], end[2] - begin[2]
    if abs(aside) > 1.5 * abs(away) and size_moved * aside > 0:
        return " to the right" if aside > 0 else " to the left"
    if abs(away) > max(DEPTHWAYS, 1.5 * abs(aside)):
        return " away from the camera" if away > 0 else " towards the camera"
    return ""


def _questions(
    clip: Clip, facts: Sequence[Facts], tracks: Sequence[Track], rng: random.Random
) -> list[dict[str, Any]]:
    questions = []

    def ask(question: str, answer: str, kind: str) -> None:
        questions.append({"question": question, "answers": [answer], "kind": kind})

    ask("Does the camera move?", "yes" if clip.camera_moves else "no", "camera motion")
    ask("Does the light move?", "yes" if clip.light_moves else "no", "light motion")
    named = [(track, name) for track in tracks if (name := _name(facts, track, rng)) is not None]
    if named:
        track, name = named[int(rng.random() * len(named))]
        ask(f"Does the {name} move?", "yes" if track.moves else "no", "motion")
    if all(f.is_countable and len(f.seen) == len(tracks) for f in facts):
        ask("How many objects move?", str(len(clip.movers)), "motion count")
        movers = [track.thing for track in tracks if track.moves]
        if len(movers) == 1:
            ask("What color is the object that moves?", movers[0].colour, "motion color")
            ask("What shape is the object that moves?", movers[0].shape, "motion shape")
    return questions
