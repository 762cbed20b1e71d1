"""Flickr30k Entities (Plummer et al. 2015): five captions a picture, their phrases tied to boxes.

    ROOT/Sentences/1000092795.txt      [/EN#283585/people Two young guys] with ... , five lines
    ROOT/Annotations/1000092795.xml    boxes by entity number, in the form of PASCAL VOC
    ROOT/train.txt, val.txt, test.txt  the numbers of the pictures of each split
    IMAGES/1000092795.jpg              IMAGES is ROOT/flickr30k-images unless given

Each caption gives a sample, as in MDETR and GLIP; `one_per="image"` gives one for all five, its
text the captions on lines of their own. A box has a span for each phrase that means it.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from xml.etree import ElementTree

from groundwork.data.annotations import Annotations, Box, Xyxy, clip_box
from groundwork.data.samples import Sample
from groundwork.data.sources.coco import check_splits
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import EncodedImage, inside, read_image
from groundwork.data.sources.keys import sample_key
from groundwork.data.sources.report import BadItemError, ImportReport
from groundwork.data.sources.upright import annotated_as_stored, upright_box

KIND: Final = "flickr30k"

#: `[/EN#283585/people Two young guys]`: number, types, phrase.
PHRASE: Final = re.compile(r"\[/EN#(?P<entity>\d+)(?P<types>(/[^\s\]/]+)+) (?P<phrase>[^\]]*)\]")


@dataclass(frozen=True)
class Flickr30kConfig:
    """Where annotations (`root`) and pictures (`images`; None: root/flickr30k-images) lie."""

    root: Path
    images: Path | None = None
    splits: tuple[str, ...] = ("train", "val", "test")
    one_per: Literal["caption", "image"] = "caption"
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_splits(type(self).__name__, self.splits)
        if self.one_per not in ("caption", "image"):
            raise SourceError(
                f"Flickr30kConfig: one_per is {self.one_per!r}; choose 'caption' or 'image'"
            )


@dataclass(frozen=True)
class Phrase:
    """A phrase of a caption. begin, end: its characters. entity: number shared by all captions."""

    begin: int
    end: int
    entity: str
    types: tuple[str, ...]


def flickr30k_samples(
    config: Flickr30kConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """The captions of every picture, in the order of the lists of the splits."""
    report = report or ImportReport()
    images = config.images or config.root / "flickr30k-images"
    for split in config.splits:
        for name in _listed(config.root / f"{split}.txt"):
            try:
                encoded = read_image(inside(images, f"{name}.jpg"))
                captions = _captions(inside(config.root, f"Sentences/{name}.txt"))
                annotation = inside(config.root, f"Annotations/{name}.xml")
                boxes = _boxes(config, annotation, encoded, report)
            except BadItemError as error:
                where = f"{config.root}: picture {name}"
                report.bad("image", where, str(error), skip=config.skip_bad)
                continue
            if config.one_per == "image":
                captions = [_joined(captions)]
            for number, (text, phrases) in enumerate(captions):
                yield split, _sample(config, name, number, text, phrases, boxes, encoded)


def parse_caption(line: str) -> tuple[str, list[Phrase]]:
    """A line of Sentences/*.txt -> the plain caption and its phrases.

    Raises BadItemError for brackets that do not fit.
    """
    text, phrases, end = "", [], 0
    for match in PHRASE.finditer(line):
        text += line[end : match.start()]
        types = tuple(match["types"].strip("/").split("/"))
        begin = len(text)
        text += match["phrase"]
        phrases.append(Phrase(begin, len(text), match["entity"], types))
        end = match.end()
    text += line[end:]
    if "[/EN#" in text or any(phrase.begin == phrase.end for phrase in phrases):
        raise BadItemError(f"caption {line[:100]!r} has a phrase that does not end, or is empty")
    return text, phrases


def _sample(
    config: Flickr30kConfig,
    name: str,
    number: int,
    text: str,
    phrases: list[Phrase],
    boxes: list[tuple[set[str], Box]],
    encoded: EncodedImage,
) -> Sample:
    grounded = []
    for entities, box in boxes:
        meant = [phrase for phrase in phrases if phrase.entity in entities]
        if meant:
            grounded.append(
                Box(
                    box.xyxy,
                    category=meant[0].types[0],
                    spans=tuple((phrase.begin, phrase.end) for phrase in meant),
                    id=meant[0].entity,
                )
            )
    per_image = config.one_per == "image"
    known = Annotations(
        width=encoded.width,
        height=encoded.height,
        captions=tuple(text.split("\n")) if per_image else (),
        boxes=tuple(grounded),
        has_boxes=True,
        source={"image_id": name} if per_image else {"image_id": name, "caption": number},
    )
    key = sample_key(name if per_image else f"{name}_{number}")
    return Sample(key, encoded.data, encoded.format, text, known.to_info())


def _listed(path: Path) -> list[str]:
    try:
        names = path.read_text("utf-8").split()
    except FileNotFoundError as error:
        raise SourceError(
            f"{path}: the list of this split is missing; it lies beside Annotations and Sentences"
        ) from error
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise SourceError(f"{path}: {name} is there {count} times; remove all lines but one")
    return names


def _captions(path: Path) -> list[tuple[str, list[Phrase]]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadItemError(f"{path} cannot be read ({error})") from error
    captions = [parse_caption(line.strip()) for line in lines if line.strip()]
    if not captions:
        raise BadItemError(f"{path} holds no caption")
    return captions


def _joined(captions: list[tuple[str, list[Phrase]]]) -> tuple[str, list[Phrase]]:
    """All captions, one on each line, as one text."""
    text, moved = "", []
    for caption, phrases in captions:
        text += "\n" if text else ""
        for phrase in phrases:
            begin, end = phrase.begin + len(text), phrase.end + len(text)
            moved.append(Phrase(begin, end, phrase.entity, phrase.types))
        text += caption
    return text, moved


def _boxes(
    config: Flickr30kConfig, path: Path, encoded: EncodedImage, report: ImportReport
) -> list[tuple[set[str], Box]]:
    """The boxes of a picture, each with the numbers of the entities that it shows."""
    root = _xml(path)
    width, height = (_number(root, f"size/{name}") for name in ("width", "height"))
    as_stored = annotated_as_stored(encoded, width, height)
    boxes = []
    for entry in root.iter("object"):
        entities = {name.text or "" for name in entry.findall("name")}
        if entry.find("bndbox") is None:
            continue  # a scene, or an entity that cannot be seen
        try:
            xyxy = _xyxy(entry, encoded, as_stored, report)
        except BadItemError as error:
            where = f"{path}: box of entity {', '.join(sorted(entities))}"
            report.bad("box", where, str(error), skip=config.skip_bad)
            continue
        boxes.append((entities, Box(xyxy)))
    return boxes


def _xyxy(
    entry: ElementTree.Element, encoded: EncodedImage, as_stored: bool, report: ImportReport
) -> Xyxy:
    # pixels counted from 1, the last one included
    x0, y0 = _number(entry, "bndbox/xmin") - 1, _number(entry, "bndbox/ymin") - 1
    xyxy: Xyxy = (x0, y0, _number(entry, "bndbox/xmax"), _number(entry, "bndbox/ymax"))
    if as_stored:
        xyxy = upright_box(xyxy, encoded.orientation, encoded.stored_size)
    clipped = clip_box(xyxy, encoded.width, encoded.height)
    if clipped is None:
        raise BadItemError(
            f"{list(map(int, xyxy))} has no area inside of the picture of {encoded.width} x "
            f"{encoded.height} pixels"
        )
    if clipped != xyxy:
        report.mended["boxes cut to their picture"] += 1
    return clipped


def _xml(path: Path) -> ElementTree.Element:
    try:
        content = path.read_text("utf-8")
        if "\0" in content:
            # the parser would guess an encoding in which the next check finds nothing
            raise BadItemError(f"{path} cannot be read (not UTF-8)")
        if "<!DOCTYPE" in content or "<!ENTITY" in content:
            # entities can make a small file fill all memory
            raise BadItemError(f"{path} declares a document type, which annotations do not need")
        return ElementTree.fromstring(content)
    except (OSError, UnicodeDecodeError, ElementTree.ParseError) as error:
        raise BadItemError(f"{path} cannot be read ({error})") from error


def _number(element: ElementTree.Element, path: str) -> int:
    text = element.findtext(path) or ""
    if not re.fullmatch(r"\s*-?\d{1,9}\s*", text):
        raise BadItemError(f"{path} in its XML is {text[:40]!r}; expected a number")
    return int(text)
