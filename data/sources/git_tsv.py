"""Tables of images and texts as GIT (Wang et al. 2022) keeps them.

    X.img.tsv        key <tab> the file of the image in base64
    X.caption.tsv    key <tab> JSON list of {"caption"} or {"question", "question_id", "answers"}
    X.img.lineidx    where each row begins, one number a line; or X.img.lineidx.8b, 8 bytes each

Row i of both tables has the same key. An image is one sample with all of its texts; the text of
the sample is the first caption. The side-cars, where they are, are compared with the tables.
"""

import base64
import binascii
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from groundwork.data.annotations import Annotations, Question
from groundwork.data.samples import Sample
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import measure
from groundwork.data.sources.json_files import is_encodable, known_members, member
from groundwork.data.sources.keys import sample_key
from groundwork.data.sources.report import BadItemError, ImportReport

KIND: Final = "git_tsv"

#: Bytes of the longest row that is read.
MAX_ROW = 2**28


@dataclass(frozen=True)
class GitTsvConfig:
    """A pair of tables. texts: None for images alone."""

    images: Path
    texts: Path | None = None
    split: str = "train"
    skip_bad: bool = False


def git_tsv_samples(
    config: GitTsvConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every row in order; one row is in memory at a time."""
    report = report or ImportReport()
    texts = _rows(config.texts) if config.texts is not None else None
    seen: set[str] = set()
    for number, line in enumerate(_rows(config.images), start=1):
        row = next(texts, b"") if texts is not None else None
        if row == b"":
            raise SourceError(
                f"{config.texts}: ends before row {number} of {config.images}; the tables do not "
                "belong together, or one was cut short: fetch both again"
            )
        try:
            key, image = _columns(line)
            if key in seen:
                raise BadItemError(f"key {key!r} is there twice")
            captions, questions = _texts(row, key) if row is not None else ([], [])
            seen.add(key)
            sample = _sample(key, image, captions, questions)
        except BadItemError as error:
            where = f"{config.images}: line {number}"
            report.bad("row", where, str(error), skip=config.skip_bad)
            continue
        yield config.split, sample
    if texts is not None and next(texts, b""):
        raise SourceError(
            f"{config.texts}: has more rows than {config.images}; the tables do not belong "
            "together, or one was cut short: fetch both again"
        )


def _sample(key: str, image: str, captions: list[str], questions: list[Question]) -> Sample:
    try:
        data = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadItemError(f"key {key!r}: its image is not base64 ({error})") from error
    try:
        encoded = measure(data)
    except BadItemError as error:
        raise BadItemError(f"key {key!r}: its image {error}") from error
    known = Annotations(
        width=encoded.width,
        height=encoded.height,
        captions=tuple(captions),
        qa=tuple(questions),
        source={"key": key},
    )
    text = captions[0] if captions else ""
    return Sample(sample_key(key), data, encoded.format, text, known.to_info())


def _columns(line: bytes) -> tuple[str, str]:
    try:
        columns = line.decode("utf-8").rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise BadItemError(f"is not UTF-8 ({error})") from error
    if len(columns) != 2 or not columns[0]:
        raise BadItemError(f"has {len(columns)} columns; expected a key, a tab and the content")
    return columns[0], columns[1]


def _texts(line: bytes, key: str) -> tuple[list[str], list[Question]]:
    """The captions and questions of the row of the other table."""
    other, content = _columns(line)
    if other != key:
        raise BadItemError(f"its key is {key!r}, the table of texts has {other!r} in this row")
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadItemError(f"key {key!r}: its texts are not JSON ({error})") from error
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise BadItemError(f"key {key!r}: its texts are {content[:60]}; expected a list of objects")
    captions, questions = [], []
    for record in records:
        if "question" in record:
            questions.append(_question(record))
        else:
            captions.append(member(record, "caption", str))
    return captions, questions


def _question(record: dict[str, Any]) -> Question:
    answers = record.get("answers", record.get("answer", []))
    answers = answers if isinstance(answers, list) else [answers]
    texts = [one.get("answer") if isinstance(one, dict) else one for one in answers]
    number = record.get("question_id")
    if not all(isinstance(text, str) and is_encodable(text) for text in texts):
        raise BadItemError(f"question {number!r}: its answers are {texts!r:.60}; expected strings")
    known = known_members(record, ["question_id"])
    return Question(
        member(record, "question", str), tuple(map(str, texts)), known.get("question_id")
    )


def _rows(path: Path) -> Iterator[bytes]:
    """The lines of a table; where there is a side-car, each is compared with it."""
    offsets = _offsets(path)
    position = 0
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise SourceError(f"{path}: this table is missing; fetch it") from error
    with file:
        lines = iter(lambda: file.readline(MAX_ROW + 1), b"")
        for number, line in enumerate(lines):
            if len(line) > MAX_ROW:
                raise SourceError(
                    f"{path}: line {number + 1} is longer than {MAX_ROW:,} bytes: this is no table"
                )
            if offsets is not None and next(offsets, None) != position:
                raise SourceError(
                    f"{path}: line {number + 1} begins at byte {position:,}, its side-car says "
                    "otherwise; delete the .lineidx files, or fetch table and side-car again"
                )
            position += len(line)
            yield line
    if offsets is not None and (left := sum(1 for _ in offsets)):
        raise SourceError(
            f"{path}: its side-car has {left:,} more rows: the table was cut short; fetch it again"
        )


def _offsets(path: Path) -> Iterator[int] | None:
    """Where rows begin, as the side-car says; None without one."""
    text, binary = path.with_suffix(".lineidx"), path.with_suffix(".lineidx.8b")
    if binary.is_file():
        return (offset for (offset,) in struct.iter_unpack("<q", _whole(binary)))
    if text.is_file():
        return _text_offsets(text)
    return None


def _whole(path: Path) -> bytes:
    data = path.read_bytes()
    if len(data) % 8:
        raise SourceError(f"{path}: {len(data):,} bytes are no multiple of 8; delete it")
    return data


def _text_offsets(path: Path) -> Iterator[int]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip().isdigit():
                raise SourceError(f"{path}: line {number} is {line[:40]!r}; delete this file")
            yield int(line)
