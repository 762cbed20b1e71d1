"""Which members of a foreign tar make which part of a sample.

A field is named as in Energon's `field_map`: `jpg` is a member, `json[caption]` a value inside of
a JSON member, `txt,json[caption]` the first of both that is there.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from groundwork.data.annotations import Annotations, Question
from groundwork.data.samples import Sample, SampleError, is_member_name
from groundwork.data.shard_index import MISSING, ShardError, scan_tar
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import measure
from groundwork.data.sources.json_files import is_encodable
from groundwork.data.sources.report import BadItemError, ImportReport

FIELD: Final = re.compile(r"(?P<member>[a-z0-9_.]+)(?P<path>(\[[^\[\]]+\])*)", re.IGNORECASE)
IMAGES: Final = "jpg,jpeg,png,webp"
#: Bytes of the largest sample that is read into memory.
MAX_SAMPLE = 2**30
#: Members of clips; a sample that has one needs no still image.
CLIPS: Final = ("mp4", "webm", "mkv", "mov", "avi")


@dataclass(frozen=True)
class TarFields:
    """Where the parts of a sample are found. An empty string: nowhere.

    image: of several that are there, the first counts. text: the caption; may be a list, all of
    which become `captions`. label: a class index. question, answers: of a visual question.
    """

    image: str = IMAGES
    text: str = "txt,text,caption,json[caption]"
    label: str = "cls"
    question: str = ""
    answers: str = ""

    def __post_init__(self) -> None:
        for name in ("image", "text", "label", "question", "answers"):
            for option in filter(None, getattr(self, name).split(",")):
                if not FIELD.fullmatch(option.strip()):
                    raise SourceError(
                        f"field {name}: {option.strip()!r} is neither a member like 'jpg' nor a "
                        "value in one like 'json[caption]'"
                    )


@dataclass(frozen=True, slots=True)
class TarRecord:
    """The members of one sample, by extension in lower case, and where they came from."""

    tar: Path
    key: str
    members: Mapping[str, bytes]

    @property
    def where(self) -> str:
        return f"{self.tar}: sample {self.key!r}"


def tar_records(tar: Path, report: ImportReport, *, skip_bad: bool) -> Iterator[TarRecord]:
    """The samples of a tar in order, one in memory at a time.

    A tar that `scan_tar` refuses (damaged, with links or parent paths, or with samples whose
    members do not stand together) is bad as a whole.
    """
    try:
        index = scan_tar(tar)
    except FileNotFoundError:
        report.bad("shard", str(tar), "this tar is missing", skip=skip_bad)
        return
    except ShardError as error:
        reason = str(error).removeprefix(f"{tar}: ")
        report.bad("shard", str(tar), reason, skip=skip_bad)
        return
    with tar.open("rb") as file:
        for row in range(len(index)):
            members = {}
            size = int(index.sizes[row].clip(0).sum())
            if size > MAX_SAMPLE:
                where = f"{tar}: sample {index.key(row)!r}"
                report.bad("sample", where, f"has {size:,} bytes, which is too much", skip=skip_bad)
                continue
            for name, offset, size in zip(
                index.fields, index.offsets[row].tolist(), index.sizes[row].tolist(), strict=True
            ):
                if size != MISSING:
                    file.seek(offset)
                    members[name] = file.read(size)
            yield TarRecord(tar, index.key(row), members)


def record_sample(
    record: TarRecord, key: str, fields: TarFields, report: ImportReport, source: Mapping[str, Any]
) -> Sample:
    """A sample with `key` from a record; image bytes and further members pass unchanged.

    What the JSON member knows goes to `info["source"]`. Members of formats that can hold code are
    left out and counted. Raises BadItemError.
    """
    members = record.members
    image_member, image = _first(members, fields.image)
    if image is not None and not isinstance(image, bytes):
        raise BadItemError(f"its image {image_member!r} is a value in JSON; name a member")
    taken = {"txt", "json", image_member}
    clips = [name for name in CLIPS if name in members]
    width = height = None
    image_format = ""
    if image is not None:
        try:
            encoded = measure(image)
        except BadItemError as error:
            raise BadItemError(f"its member {image_member!r} {error}") from error
        width, height, image_format = encoded.width, encoded.height, encoded.format
    elif not clips:
        raise BadItemError(
            f"has no image (looked for {fields.image}; found {', '.join(sorted(members))})"
        )
    captions = _texts(record, fields.text)
    known = Annotations(
        width=width,
        height=height,
        label=_label(record, fields.label),
        captions=captions if len(captions) > 1 else (),
        qa=_questions(record, fields),
        source={**source, **_metadata(record)},
    )
    others = {
        name: content
        for name, content in members.items()
        if name not in taken and is_member_name(name) and not _is_text(name, fields)
    }
    unsafe = [name for name in members if name not in taken and not is_member_name(name)]
    second = [name for name in unsafe if name in IMAGES.split(",")]
    if second:
        report.mended["further images of a sample left out"] += len(second)
        unsafe = [name for name in unsafe if name not in second]
    if unsafe:
        report.mended["members of unsafe formats left out"] += len(unsafe)
    try:
        return Sample(
            key,
            image or b"",
            image_format,
            captions[0] if captions else "",
            known.to_info(),
            others,
        )
    except SampleError as error:
        raise BadItemError(str(error)) from error


def _first(members: Mapping[str, bytes], field: str) -> tuple[str, Any]:
    """(member, value) of the first option of a field that is there, else ("", None)."""
    for option in filter(None, (part.strip() for part in field.split(","))):
        match = FIELD.fullmatch(option)
        name = match["member"].lower() if match else ""
        if match is None or name not in members:
            continue
        if not match["path"]:
            return name, members[name]
        value = _json(members[name], name)
        for step in match["path"][1:-1].split("]["):
            if isinstance(value, dict):
                value = value.get(step)
            elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            else:
                value = None
        if value is not None:
            return name, value
    return "", None


def _json(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadItemError(f"its member {name!r} is not JSON ({error})") from error


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadItemError(f"its member {name!r} is not UTF-8 ({error})") from error


def _texts(record: TarRecord, field: str) -> tuple[str, ...]:
    name, value = _first(record.members, field)
    if isinstance(value, bytes):
        value = _json(value, name) if name.endswith("json") else _text(value, name)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, str) for one in values):
        raise BadItemError(f"its text in {name!r} is {repr(value)[:60]}; expected a string")
    return tuple(one for one in values if one)


def _label(record: TarRecord, field: str) -> int | None:
    name, value = _first(record.members, field)
    if isinstance(value, bytes):
        value = _text(value, name)
        value = int(value) if value.isdecimal() else value
    if value is not None and (type(value) is not int or value < 0):
        raise BadItemError(f"its label in {name!r} is {repr(value)[:60]}; expected a class index")
    return value


def _questions(record: TarRecord, fields: TarFields) -> tuple[Question, ...]:
    questions = _texts(record, fields.question)
    return tuple(Question(question, _texts(record, fields.answers)) for question in questions[:1])


def _metadata(record: TarRecord) -> dict[str, Any]:
    content = record.members.get("json", b"{}")
    value = _json(content, "json")
    if b"\\u" in content and not is_encodable(json.dumps(value, ensure_ascii=False)):
        raise BadItemError("its member 'json' escapes half a character, which UTF-8 cannot hold")
    return value if isinstance(value, dict) else {"json": value}


def _is_text(name: str, fields: TarFields) -> bool:
    """Whether a member has been read into the text, label or question."""
    used = (fields.text, fields.label, fields.question, fields.answers)
    return any(name == option.strip().lower() for field in used for option in field.split(","))
