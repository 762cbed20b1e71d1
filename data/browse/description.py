"""A sample as JSON for the page: what is known of it checked and cut into shape, the rest as is."""

import io
import json
import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

from groundwork.data.browse.annotation import (
    find_entities,
    knowledge_card,
    name_card,
    segments,
)
from groundwork.data.browse.collection import Split
from groundwork.data.browse.pictures import member_kind
from groundwork.data.browse.run_lengths import has_run_lengths
from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.samples import Concept, Sample, SampleError

#: Limits of what one sample may put on the page; the number left out is said there.
MAX_BOXES = 1000
MAX_POINTS = 20_000
MAX_LIST = 200
MAX_TEXT = 20_000
MAX_RAW = 300_000
#: Of a text under a thumbnail.
MAX_TEASER = 160


def brief(split: Split, number: int) -> dict[str, Any]:
    """What a tile of the grid shows. A sample that cannot be read has an "error"."""
    shard, key = split.where(number)
    entry: dict[str, Any] = {"number": number, "key": key, "shard": shard}
    try:
        sample = split.read(number)
    except SampleError as error:
        return {**entry, "error": str(error)}
    boxes = sample.info.get("boxes")
    return {
        **entry,
        "text": _main_text(sample)[:MAX_TEASER],
        "size": _declared_size(sample),
        "boxes": len(boxes) if isinstance(boxes, list) else 0,
        "class": _class(split, sample, None),
        "image": bool(sample.image),
        "kinds": sorted({member_kind(name) for name in sample.members}),
        "standIn": _stand_in(sample),
    }


def full(split: Split, number: int, knowledge: KnowledgeIndex | None) -> dict[str, Any]:
    """All that is shown of one sample, bad or good."""
    shard, key = split.where(number)
    entry: dict[str, Any] = {
        "number": number,
        "key": key,
        "shard": shard,
        "diagnosis": split.diagnosis(number),
    }
    try:
        sample = split.read(number)
    except SampleError:
        return entry
    problems: list[str] = []
    boxes = _boxes(split, sample, problems)
    tracks = _tracks(split, sample, problems)
    texts = _texts(sample, problems)
    return {
        **entry,
        "image": len(sample.image),
        "format": sample.image_format,
        "size": _declared_size(sample) or image_size(sample.image),
        "class": _class(split, sample, knowledge),
        "texts": [
            _annotated(text, [*boxes, *tracks] if place == 0 else [], knowledge, problems)
            for place, text in enumerate(texts)
        ],
        "boxes": boxes,
        "tracks": tracks,
        "runLengths": any(map(has_run_lengths, _list(sample.info.get("boxes")))),
        "fps": _fps(sample),
        "qa": _questions(sample, problems),
        "members": [
            {"name": name, "bytes": len(content), "kind": member_kind(name)}
            for name, content in sample.members.items()
        ],
        "raw": raw(sample.info)[:MAX_RAW],
        "problems": problems,
    }


def image_size(image: bytes) -> list[int] | None:
    """[width, height] as the header of an image says."""
    try:
        with Image.open(io.BytesIO(image), formats=("JPEG", "PNG", "WEBP")) as opened:
            return list(opened.size)
    except Exception:  # decoders meet malformed files with anything; the diagnosis tells more
        return None


def raw(info: Mapping[str, Any]) -> str:
    """The `json` member, indented."""
    try:
        return json.dumps(info, ensure_ascii=False, indent=1)
    except RecursionError:
        return "nested too deeply to be shown"


def short(value: Any, most: int = 80) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _main_text(sample: Sample) -> str:
    captions = sample.info.get("captions")
    if not sample.text and isinstance(captions, list) and captions:
        return short(captions[0], MAX_TEXT)
    return sample.text


def _texts(sample: Sample, problems: list[str]) -> list[str]:
    """The text that spans count in, then the other captions."""
    first = _main_text(sample)
    captions = sample.info.get("captions", [])
    if not isinstance(captions, list):
        problems.append(f"captions: {short(captions)}: expected a list")
        captions = []
    others = [caption for caption in captions[:MAX_LIST] if isinstance(caption, str)]
    if len(others) < len(captions):
        problems.append(f"captions: {len(captions) - len(others)} not shown")
    texts = [first, *(caption for caption in others if caption != first)]
    return [text for text in texts if text]


def _annotated(
    text: str,
    boxes: list[dict[str, Any]],
    knowledge: KnowledgeIndex | None,
    problems: list[str],
) -> dict[str, Any]:
    if len(text) > MAX_TEXT:
        problems.append(f"a text of {len(text):,} characters is cut to {MAX_TEXT:,}")
        text = text[:MAX_TEXT]
    spans = []
    for box in boxes:
        for begin, end in box["spans"]:
            if 0 <= begin < end <= len(text):
                spans.append((box["index"], begin, end))
            else:
                problems.append(
                    f"box {box['index'] % MAX_BOXES}: span [{begin}, {end}] is not in the text"
                )
    entities = [] if knowledge is None else find_entities(knowledge, text)
    return {
        "segments": segments(text, spans, entities),
        "entities": [knowledge_card(entity.knowledge, entity.senses) for entity in entities],
    }


def _class(split: Split, sample: Sample, knowledge: KnowledgeIndex | None) -> dict[str, Any] | None:
    label = sample.info.get("label", -1)
    if type(label) is not int or label < 0:
        return None
    concept = split.concepts.get(label)
    if concept is None:
        return {"label": str(label), "name": ""}
    return {
        "label": str(label),
        "name": concept.name,
        "aliases": [str(alias) for alias in concept.aliases],
        "heldout": bool(concept.heldout),
        "knowledge": name_card(knowledge, concept.name),
    }


def _name(box: Mapping[str, Any], concepts: Mapping[int, Concept]) -> str:
    """What a box is of: its category, or the name of its class."""
    category, label = box.get("category"), box.get("label")
    if category is not None and category != "":
        return short(category)
    if type(label) is int and label in concepts:
        return concepts[label].name
    return "" if label is None else short(label)


def _note(box: Mapping[str, Any]) -> str:
    """The numbers that tell a box from others and tie it to them."""
    known = {name: box[name] for name in ("label", "pair", "id") if box.get(name) is not None}
    return ", ".join(f"{name} {short(value, 24)}" for name, value in known.items())


def _boxes(split: Split, sample: Sample, problems: list[str]) -> list[dict[str, Any]]:
    listed = sample.info.get("boxes", [])
    if not isinstance(listed, list):
        problems.append(f"boxes: {short(listed)}: expected a list")
        return []
    if len(listed) > MAX_BOXES:
        problems.append(f"boxes: the first {MAX_BOXES} of {len(listed):,} are shown")
    boxes, points = [], 0
    for index, box in enumerate(listed[:MAX_BOXES]):
        if not isinstance(box, dict):
            problems.append(f"box {index}: {short(box)}: expected an object")
            continue
        corners = box.get("xyxy")
        if not _is_corners(corners):
            problems.append(f"box {index}: xyxy is {short(box.get('xyxy'))}: expected four numbers")
            continue
        polygons = _polygons(box.get("segmentation"))
        points += sum(map(len, polygons)) // 2
        boxes.append(
            {
                "index": index,
                "xyxy": corners,
                "name": _name(box, split.concepts),
                "note": _note(box),
                "crowd": bool(box.get("crowd")),
                "polygons": polygons if points <= MAX_POINTS else [],
                "spans": _spans(box),
            }
        )
    if points > MAX_POINTS:
        problems.append(
            f"segmentation: outlines after the first {MAX_POINTS:,} points are left out"
        )
    return boxes


def _tracks(split: Split, sample: Sample, problems: list[str]) -> list[dict[str, Any]]:
    """Boxes that move: one per frame of the clip, None where the object is not seen."""
    tracks: list[dict[str, Any]] = []
    for number, track in enumerate(_list(sample.info.get("tracks"))[:MAX_BOXES]):
        boxes = _list(track.get("boxes")) if isinstance(track, dict) else []
        if not all(box is None or _is_corners(box) for box in boxes) or not boxes:
            problems.append(f"track {number}: expected an object with a box for each frame")
        elif sum(len(known["frames"]) for known in tracks) + len(boxes) > MAX_POINTS:
            problems.append(f"tracks: from number {number} on left out")
            break
        else:
            tracks.append(
                {
                    "index": MAX_BOXES + number,  # numbers of boxes come before
                    "frames": boxes,
                    "name": _name(track, split.concepts),
                    "note": _note(track),
                    "crowd": False,
                    "polygons": [],
                    "spans": _spans(track),
                }
            )
    return tracks


def _spans(box: Mapping[str, Any]) -> list[list[int]]:
    """[[begin, end], ...] of characters in the text."""
    return [
        span
        for span in _list(box.get("spans"))[:MAX_LIST]
        if _is_numbers(span) and len(span) == 2 and all(type(n) is int for n in span)
    ]


def _fps(sample: Sample) -> float:
    """Frames per second of a clip; a guess where it does not say so."""
    fps = sample.info.get("fps")
    return fps if isinstance(fps, int | float) and 0 < fps <= 1000 else 8


def _stand_in(sample: Sample) -> dict[str, str] | None:
    """The member that a tile shows where there is no image."""
    for kind in ("video", "image", "labels", "depth"):
        for name in sample.members:
            if member_kind(name) == kind:
                return {"name": name, "kind": kind}
    return None


def _polygons(segmentation: Any) -> list[list[float]]:
    """COCO's polygons, [[x, y, x, y, ...], ...]; other kinds of masks are not drawn."""
    return [p for p in _list(segmentation) if _is_numbers(p) and len(p) >= 6 and len(p) % 2 == 0]


def _questions(sample: Sample, problems: list[str]) -> list[dict[str, Any]]:
    listed = sample.info.get("qa", [])
    if not isinstance(listed, list):
        problems.append(f"qa: {short(listed)}: expected a list")
        return []
    if len(listed) > MAX_LIST:
        problems.append(f"qa: the first {MAX_LIST} of {len(listed):,} are shown")
    questions = []
    for pair in listed[:MAX_LIST]:
        if not isinstance(pair, dict) or "question" not in pair:
            problems.append(f"qa: {short(pair)}: expected a question and its answers")
            continue
        answers = pair.get("answers", pair.get("answer", []))
        questions.append(
            {
                "question": short(pair["question"], 1000),
                "answers": [
                    short(answer, 500)
                    for answer in (answers[:MAX_LIST] if isinstance(answers, list) else [answers])
                ],
            }
        )
    return questions


def _declared_size(sample: Sample) -> list[int] | None:
    """[width, height] as the `json` member says."""
    width, height = sample.info.get("width"), sample.info.get("height")
    if type(width) is not int or type(height) is not int:
        return None
    return [width, height] if 0 < width < 2**31 and 0 < height < 2**31 else None


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(n) in (int, float) and math.isfinite(n) and abs(n) < 1e9 for n in value
    )


def _is_corners(value: Any) -> bool:
    return _is_numbers(value) and len(value) == 4


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
