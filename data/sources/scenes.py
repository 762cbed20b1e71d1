"""Small 3-D scenes drawn on the spot: pictures whose every annotation is known exactly.

SYNTHETIC: nothing here is a photograph, and a number measured on these pictures says nothing about
real ones. They are for training and testing every task without a download.

A scene is a pure function of (seed, index): one can be drawn again alone, and neither the order nor
the number of processes changes a byte. Splits are ranges of indices, so a larger training set
leaves the others as they are. Some pairs of colour and shape never occur in `train` and `val`, and
at least once in each scene of `compositional`.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

from groundwork.data.samples import Concept, Sample
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.scenes_clips import choose_clip, draw_clip
from groundwork.data.sources.scenes_description import (
    COLOURS,
    MAX_OBJECTS,
    Scene,
    SceneSettings,
    choose_scene,
)
from groundwork.data.sources.scenes_encoding import encode_image, encode_mp4, encode_png
from groundwork.data.sources.scenes_facts import (
    Facts,
    camera_info,
    find_facts,
    light_info,
    shadow_pairs,
)
from groundwork.data.sources.scenes_renderer import Rendering, render
from groundwork.data.sources.scenes_shapes import SHAPES
from groundwork.data.sources.scenes_texts import Caption, write_captions, write_questions

Split = Literal["train", "val", "compositional"]

LICENCE: Final = (
    "CC0 1.0. Synthetic: drawn by groundwork from random numbers, no photographs; results on these "
    "pictures say nothing about real ones."
)
#: Index of the first scene of each split.
FIRST_INDEX: Final[dict[Split, int]] = {
    "train": 0,
    "val": 1_000_000_000,
    "compositional": 2_000_000_000,
}
MAX_SAMPLES: Final = 1_000_000_000
#: Colours held out of each shape.
HELDOUT_COLOURS: Final = 2
#: Changes when the same index gives another scene, picture or text than before.
VERSION: Final = 1


@dataclass(frozen=True)
class ScenesConfig:
    """How many scenes, how large, and whether they move.

    objects: least and most solids in a scene. frames: 1 for still pictures, more for clips of that
    many frames, fps per second. clip_format: a clip is one `mp4` (needs PyAV), or numbered PNGs.
    """

    image_size: int = 96
    train: int = 10_000
    val: int = 1_000
    compositional: int = 1_000
    objects: tuple[int, int] = (1, MAX_OBJECTS)
    seed: int = 0
    image_format: Literal["png", "jpg"] = "jpg"
    frames: int = 1
    fps: int = 8
    clip_format: Literal["mp4", "png"] = "png"

    def __post_init__(self) -> None:
        if not 32 <= self.image_size <= 2048:
            raise SourceError(
                f"ScenesConfig: image_size is {self.image_size}; give 32 to 2048 pixels"
            )
        for split in FIRST_INDEX:
            if not 0 <= getattr(self, split) <= MAX_SAMPLES:
                raise SourceError(
                    f"ScenesConfig: {split} is {getattr(self, split)}; give 0 to {MAX_SAMPLES:,}"
                )
        least, most = self.objects
        if not 1 <= least <= most <= MAX_OBJECTS:
            raise SourceError(
                f"ScenesConfig: objects is {least} to {most}; give a range within 1 to "
                f"{MAX_OBJECTS}"
            )
        if self.seed < 0:
            raise SourceError(f"ScenesConfig: seed is {self.seed}; give a number >= 0")
        if self.image_format not in ("png", "jpg"):
            raise SourceError(
                f"ScenesConfig: image_format is {self.image_format!r}; choose 'png' or 'jpg'"
            )
        if self.clip_format not in ("mp4", "png"):
            raise SourceError(
                f"ScenesConfig: clip_format is {self.clip_format!r}; choose 'mp4' or 'png'"
            )
        if not 1 <= self.frames <= 1000 or not 1 <= self.fps <= 120:
            raise SourceError(
                f"ScenesConfig: {self.frames} frames at {self.fps} per second; give 1 to 1000 "
                "frames and 1 to 120 per second"
            )
        if self.frames > 1 and self.clip_format == "mp4" and self.image_size % 2:
            raise SourceError(
                f"ScenesConfig: image_size is {self.image_size}; an mp4 needs an even one"
            )


def scenes_concepts(config: ScenesConfig) -> list[Concept]:
    """Every colour with every shape; `heldout` are the pairs that only `compositional` shows."""
    heldout = heldout_pairs(config.seed)
    return [
        Concept(
            label=concept_label(colour, shape),
            name=f"{colour} {shape}",
            heldout=(colour, shape) in heldout,
            info={"colour": colour, "shape": shape, "synthetic": True},
        )
        for shape in SHAPES
        for colour in COLOURS
    ]


def concept_label(colour: str, shape: str) -> int:
    """Index of a pair among the concepts."""
    return list(SHAPES).index(shape) * len(COLOURS) + list(COLOURS).index(colour)  # type: ignore[arg-type]


@cache
def heldout_pairs(seed: int) -> frozenset[tuple[str, str]]:
    """(colour, shape) that training does not show: for each shape other colours."""
    rng = random.Random(f"scenes:{seed}:heldout")
    colours = sorted(COLOURS, key=lambda _: rng.random())
    return frozenset(
        (colours[(row * HELDOUT_COLOURS + i) % len(colours)], shape)
        for row, shape in enumerate(SHAPES)
        for i in range(HELDOUT_COLOURS)
    )


def split_of(index: int) -> Split:
    """The split that a scene belongs to."""
    for split, first in FIRST_INDEX.items():
        if first <= index < first + MAX_SAMPLES:
            return split
    raise ValueError(f"scene {index}: an index is 0 or more and below {3 * MAX_SAMPLES:,}")


def scenes_samples(config: ScenesConfig) -> Iterator[tuple[Split, Sample]]:
    """Draw every scene of every split, lazily, in order."""
    for unit in scenes_units(config):
        yield from read_scenes_unit(config, unit)


def scenes_units(config: ScenesConfig, *, unit_frames: int = 2_000) -> list[dict[str, int]]:
    """The same scenes in the same order, as work units of `build_shards`.

    A unit is a range of indices of one split with about `unit_frames` pictures.
    """
    step = max(1, unit_frames // config.frames)
    return [
        {"version": VERSION, "begin": begin, "end": min(begin + step, end)}
        for split, first in FIRST_INDEX.items()
        for end in (first + getattr(config, split),)
        for begin in range(first, end, step)
    ]


def read_scenes_unit(
    config: ScenesConfig, unit: Mapping[str, int], _note: Callable[[str], None] | None = None
) -> Iterator[tuple[Split, Sample]]:
    """Draw the scenes of a unit."""
    for index in range(unit["begin"], unit["end"]):
        yield scene_sample(config, index)


def scene_sample(config: ScenesConfig, index: int) -> tuple[Split, Sample]:
    """Draw one scene, exactly as `scenes_samples` yields it; a clip where the config has frames."""
    split = split_of(index)
    if config.frames > 1:
        return split, scene_clip(config, index)
    scene = scene_description(config, index)
    rendering = render(scene, config.image_size)
    facts = find_facts(scene, rendering)
    rng = random.Random(f"scenes:{config.seed}:{index}:texts")
    captions = write_captions(facts, rng)
    info = {
        **_origin(config, index),
        "captions": [caption.text for caption in captions],
        "boxes": _boxes(facts, captions[0]),
        "pairs": shadow_pairs(facts),
        "relations": [
            {"subject": a, "predicate": predicate, "object": b}
            for a, predicate, b in facts.relations
        ],
        "qa": write_questions(facts, rng),
        "depth": {"unit": "mm", "near": "dark"},
        "light": light_info(scene, facts),
        "camera": camera_info(scene, config.image_size),
        "salient": None if facts.salient is None else facts.salient.number,
    }
    if len(scene.objects) == 1 == len(facts.listed):
        # with several objects a scene belongs to no one class
        thing = scene.objects[0]
        info["label"] = concept_label(thing.colour, thing.shape)
    return split, Sample(
        key=_key(index),
        image=encode_image(rendering.rgb, config.image_format),
        image_format=config.image_format,
        text=captions[0].text,
        info=info,
        members=_members(rendering, facts),
    )


def scene_description(config: ScenesConfig, index: int) -> Scene:
    """The scene of an index, before it is drawn."""
    rng = random.Random(f"scenes:{config.seed}:{index}")
    return choose_scene(_settings(config, split_of(index)), rng)


def scene_clip(config: ScenesConfig, index: int) -> Sample:
    """Draw one short video: the same kind of scene, in which objects, camera or light move.

    Its masks and depths are numbered members, `instances.0000.png` and so on.
    """
    if config.frames < 2:
        raise ValueError(f"scene_clip: frames is {config.frames}; a clip has at least 2")
    rng = random.Random(f"scenes:{config.seed}:{index}:clip")
    clip = choose_clip(_settings(config, split_of(index)), rng, config.frames)
    drawn = draw_clip(clip, config.image_size, rng)
    tracks = [
        {
            "id": track.number,
            "label": concept_label(track.thing.colour, track.thing.shape),
            "category": f"{track.thing.colour} {track.thing.shape}",
            "colour": track.thing.colour,
            "shape": track.thing.shape,
            "material": track.thing.material,
            "size": track.thing.size,
            "moves": track.moves,
            "boxes": [None if box is None else list(box) for box in track.boxes],
            "areas": list(track.areas),
            "shadow_areas": list(track.shadow_areas),
            "spans": [list(span) for span in drawn.captions[0].spans.get(track.number, ())],
        }
        for track in drawn.tracks
    ]
    info = {
        **_origin(config, index),
        "fps": config.fps,
        "frames": config.frames,
        "begin_s": 0.0,
        "end_s": config.frames / config.fps,
        "captions": [caption.text for caption in drawn.captions],
        "qa": drawn.questions,
        "tracks": tracks,
        "pairs": [{"object": t.number, "shadow": t.number} for t in drawn.tracks if t.has_shadow],
        "depth": {"unit": "mm", "near": "dark"},
        "lights": [light_info(s, f) for s, f in zip(clip.scenes, drawn.facts, strict=True)],
        "cameras": [camera_info(scene, config.image_size) for scene in clip.scenes],
        "camera_moves": clip.camera_moves,
        "light_moves": clip.light_moves,
    }
    members = {}
    for number, rendering in enumerate(drawn.renderings):
        members[f"depth.{number:04d}.png"] = encode_png(rendering.depth)
        members[f"instances.{number:04d}.png"] = encode_png(rendering.instances)
        members[f"shadows.{number:04d}.png"] = encode_png(rendering.shadows)
    frames = [rendering.rgb for rendering in drawn.renderings]
    if config.clip_format == "mp4":
        members["mp4"] = encode_mp4(frames, config.fps)
    else:
        members |= {f"frame.{n:04d}.png": encode_png(frame) for n, frame in enumerate(frames)}
    return Sample(
        key=_key(index),
        image=b"",
        image_format="",
        text=drawn.captions[0].text,
        info=info,
        members=members,
    )


def _settings(config: ScenesConfig, split: Split) -> SceneSettings:
    return SceneSettings(
        objects=config.objects,
        heldout_pairs=heldout_pairs(config.seed),
        compositional=split == "compositional",
    )


def _key(index: int) -> str:
    return f"scene-{index:010d}"


def _origin(config: ScenesConfig, index: int) -> dict[str, Any]:
    return {
        "synthetic": True,
        "source": {"kind": "scenes", "seed": config.seed, "index": index},
        "split": split_of(index),
        "width": config.image_size,
        "height": config.image_size,
    }


def _boxes(facts: Facts, caption: Caption) -> list[dict[str, Any]]:
    """The listed objects. `id` is the object's number in the masks, `pair` ties it to a shadow."""
    with_shadow = {pair["object"] for pair in shadow_pairs(facts)}
    return [
        {
            "id": seen.number,
            "xyxy": list(seen.box),
            "label": concept_label(seen.thing.colour, seen.thing.shape),
            "category": f"{seen.thing.colour} {seen.thing.shape}",
            "colour": seen.thing.colour,
            "shape": seen.thing.shape,
            "material": seen.thing.material,
            "size": seen.thing.size,
            "crowd": False,
            "area": seen.area,
            "visible": round(seen.area / seen.full_area, 4),
            "shadow_area": seen.shadow_area,
            "spans": [list(span) for span in caption.spans.get(seen.number, ())],
            **({"pair": seen.number} if seen.number in with_shadow else {}),
        }
        for seen in facts.listed
    ]


def _members(rendering: Rendering, facts: Facts) -> dict[str, bytes]:
    salient = facts.salient.number if facts.salient else -1
    return {
        "depth.png": encode_png(rendering.depth),
        "instances.png": encode_png(rendering.instances),
        "shadows.png": encode_png(rendering.shadows),
        "mask.png": encode_png((rendering.instances == salient).astype("uint8") * 255),
    }
