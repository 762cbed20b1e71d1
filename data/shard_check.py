"""One shard, checked to the last byte: its tar, its side-car, its samples."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import google_crc32c
import numpy as np

from groundwork.data.damaged_tar import FoundSample, Problem, TarContent, find_samples
from groundwork.data.decode import decode_opened, ignoring_warnings, open_image, peculiarities
from groundwork.data.diagnosis import Diagnosis
from groundwork.data.image_header import UNKNOWN, image_size
from groundwork.data.index_builder import MAX_INT32
from groundwork.data.samples import (
    IMAGE_EXTENSIONS,
    NO_CLASS,
    UNSAFE_EXTENSIONS,
    Sample,
    SampleError,
    class_label,
    sample_from_fields,
    sample_key,
)
from groundwork.data.shard_index import MISSING, ShardError, ShardIndex, index_path, parse_index
from groundwork.data.shards import file_checksum
from groundwork.data.tar_reader import CHUNK, TarReader

#: Members that are read as a whole: what is parsed or decoded of a sample.
PARSED: Final = frozenset(("txt", "json", *IMAGE_EXTENSIONS))
#: As a required field: any of the image extensions.
IMAGE: Final = "image"
#: Faults that are one member's: where it lies is where the fault lies.
FIELD_OF: Final = {
    Diagnosis.BAD_TEXT: "txt",
    Diagnosis.BAD_JSON: "json",
    Diagnosis.BAD_LABEL: "json",
    Diagnosis.MISSING_CAPTION: "txt",
}
#: Breaks behind which a side-car that fits what lies before knows the members better.
MENDED_BY_INDEX: Final = frozenset((Diagnosis.TRUNCATED_TAR, Diagnosis.DAMAGED_TAR))


class Finding(NamedTuple):
    """file: of the shard, as its data set names it. key: empty where the whole shard is meant.
    offset: in the tar. row: number among `samples_of` its shard, of which repeated ones come
    last; -1 where it is none of them.
    """

    file: str
    key: str
    offset: int
    diagnosis: Diagnosis
    detail: str
    row: int = -1


@dataclass(frozen=True)
class ShardFile:
    """A tar to check, and what the manifest says of it; None where there is none."""

    path: Path
    file: str
    samples: int | None = None
    bytes: int | None = None
    crc32c: int | None = None


@dataclass(frozen=True)
class Checks:
    """decode: every image to its end. required: fields that every sample must have."""

    decode: bool = False
    required: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckedShard:
    """keys, offsets: of `samples_of` the shard in order; keys are empty where a sample is bad.

    bytes: of the tar.
    """

    findings: list[Finding] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    bytes: int = 0


class _Indexed(NamedTuple):
    """What a side-car says of a member."""

    key: str
    field: str
    size: int
    checksum: int


def samples_of(path: Path) -> tuple[TarContent, ShardIndex | None, list[Problem]]:
    """The samples of a tar as far as they can be found, and its side-car where that is sound.

    Behind a break the side-car knows the members, if it agrees with what lies before. Returns also
    what is wrong with the side-car.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=0) as raw:
        content = find_samples(TarReader(raw, size))
    index, problems = _read_index(path)
    bad = [problem for problem in content.problems if problem.diagnosis.is_bad]
    if (
        index is not None
        and bad
        and all(problem.diagnosis in MENDED_BY_INDEX for problem in bad)
        and index.tar_bytes >= size
        and not _misplaced(content.samples, _by_offset(index))
    ):
        content = content._replace(samples=list(_indexed_samples(index, size, bad[0])))
    return content, index, problems


def check_shard(shard: ShardFile, checks: Checks) -> CheckedShard:
    """All that is wrong or unusual with a shard."""
    try:
        return _check_shard(shard, checks)
    except FileNotFoundError:
        detail = "not there; fetch or build it again"
        return CheckedShard([Finding(shard.file, "", 0, Diagnosis.MISSING_SHARD, detail)])
    except OSError as error:
        detail = f"{error.strerror or error}; check its permissions and its disk"
        return CheckedShard([Finding(shard.file, "", 0, Diagnosis.UNREADABLE, detail)])


def _check_shard(shard: ShardFile, checks: Checks) -> CheckedShard:
    tar_bytes = shard.path.stat().st_size
    content, index, index_problems = samples_of(shard.path)
    repeated = [sample.fault for sample in content.repeated]
    problems = [*(p for p in content.problems if p not in repeated), *index_problems]
    if content.pax_headers:
        detail = f"{content.pax_headers:,} members have one"
        problems.append(Problem(content.first_pax, Diagnosis.PAX_HEADER, detail))
    is_whole = not any(problem.diagnosis.is_bad for problem in content.problems)
    # where the manifest vouches for the tar, it is the side-car that is wrong
    is_as_written = shard.crc32c is not None and file_checksum(shard.path) == shard.crc32c
    if is_whole:
        problems += _against_manifest(shard, tar_bytes, len(content.samples))
    with shard.path.open("rb", buffering=0) as raw:
        checker = _SampleChecker(TarReader(raw, tar_bytes), index, content.samples, checks)
        found = [list(checker.check(sample)) for sample in content.samples]
    if index is not None and is_whole:
        misplaced = _misplaced(content.samples, checker.indexed)
        problems += _wrong_index(index, tar_bytes, content.samples, misplaced, checker)
    damaged = checker.damaged
    is_index_wrong = is_as_written or len(damaged) > max(1, len(found) // 2)
    if (
        damaged
        and is_index_wrong
        and not any(p.diagnosis is Diagnosis.WRONG_INDEX for p in problems)
    ):
        first = next(iter(damaged.values()))
        detail = f"has other checksums than the tar for {len(damaged):,} samples; delete it"
        problems.append(Problem(first.offset, Diagnosis.WRONG_INDEX, detail, first.key))
    if not is_index_wrong:
        for row, problem in damaged.items():
            found[row] = [problem]
    findings = [Finding(shard.file, p.key, *p[:3]) for p in problems]
    for row, of_sample in enumerate(found):
        findings += [Finding(shard.file, p.key, *p[:3], row) for p in of_sample]
    for row, problem in enumerate(filter(None, repeated), len(found)):
        findings.append(Finding(shard.file, problem.key, *problem[:3], row))
    is_bad = any(finding.diagnosis.is_bad for finding in findings)
    if shard.crc32c is not None and not is_as_written and not is_bad:
        detail = "the file has another crc32c than the manifest says; its members are whole"
        findings.append(Finding(shard.file, "", 0, Diagnosis.WRONG_TAR_CHECKSUM, detail))
    keys = [
        "" if any(problem.diagnosis.is_bad for problem in of_sample) else sample.key
        for sample, of_sample in zip(content.samples, found, strict=True)
    ]
    offsets = [sample.offset for sample in content.samples]
    return CheckedShard(sorted(findings, key=lambda f: f.offset), keys, offsets, tar_bytes)


class _SampleChecker:
    """Checks samples one by one.

    damaged: by row, those with a checksum that the index has not. sizes: of all rows, width and
    height of the image and bytes of the text, as an index states them.
    """

    def __init__(
        self,
        reader: TarReader,
        index: ShardIndex | None,
        samples: list[FoundSample],
        checks: Checks,
    ) -> None:
        self.reader, self.checks = reader, checks
        self.indexed = {} if index is None else _by_offset(index)
        self.damaged: dict[int, Problem] = {}
        self.sizes: list[tuple[int, int, int]] = []
        self.has_captions = any(s.members.get("txt", (0, 0))[1] for s in samples)
        self.row = -1

    def check(self, sample: FoundSample) -> Iterator[Problem]:
        """What is wrong or unusual with a sample; called for all in order."""
        self.row += 1
        if sample.fault is not None:
            self.sizes.append((*UNKNOWN, MISSING))
            yield Problem(*sample.fault[:3], sample.key)
            return
        fields: dict[str, bytes] = {}
        for name, (offset, size) in sample.members.items():
            checksum, fields[name] = self._read(offset, size, name in PARSED)
            indexed = self.indexed.get(offset)
            if indexed is not None and indexed.size == size and indexed.checksum != checksum:
                detail = f"member {name!r} fails its checksum"
                problem = Problem(offset, Diagnosis.DAMAGED_MEMBER, detail, sample.key)
                self.damaged.setdefault(self.row, problem)
        text_bytes = min(sample.members.get("txt", (0, MISSING))[1], MAX_INT32)
        self.sizes.append((*image_size(fields.get(_image_field(fields), b"")[:CHUNK]), text_bytes))
        for name in sorted(fields):
            if is_never_read(name):
                offset = sample.members[name][0]
                detail = f"member {name!r} is never read"
                yield Problem(offset, Diagnosis.UNSAFE_FIELD, detail, sample.key)
        try:
            yield from self._check_fields(sample, fields)
        except SampleError as error:
            name = FIELD_OF.get(error.diagnosis) or _image_field(fields)
            offset = sample.members.get(name, (sample.offset, 0))[0]
            yield Problem(offset, error.diagnosis, str(error), sample.key)

    def _check_fields(self, found: FoundSample, fields: Mapping[str, bytes]) -> Iterator[Problem]:
        for name in self.checks.required:
            if name not in fields and not (name == IMAGE and _image_field(fields)):
                raise SampleError(f"no member {name!r}", Diagnosis.MISSING_FIELD)
        sample = sample_from_fields(sample_key(found.key), fields)
        label = class_label(sample)
        if label == NO_CLASS and self.has_captions and not sample.text.strip():
            raise SampleError("neither a class nor a caption", Diagnosis.MISSING_CAPTION)
        if sample.image_format:
            offset = found.members[sample.image_format][0]
            for diagnosis, detail in self._check_image(sample):
                yield Problem(offset, diagnosis, detail, found.key)

    def _check_image(self, sample: Sample) -> list[tuple[Diagnosis, str]]:
        with ignoring_warnings():
            image = open_image(sample.image)
            notes = peculiarities(image)
            if self.checks.decode:
                decode_opened(image)
        return notes

    def _read(self, offset: int, size: int, is_wanted: bool) -> tuple[int, bytes]:
        """The checksum of a member, and its content if it is wanted."""
        checksum, pieces = 0, []
        for begin in range(offset, offset + size, CHUNK):
            piece = self.reader.read(begin, min(CHUNK, offset + size - begin))
            checksum = google_crc32c.extend(checksum, piece)
            if is_wanted:
                pieces.append(piece)
        return checksum, b"".join(pieces)


def is_never_read(field_name: str) -> bool:
    """Members that no reader decodes, and that a repaired copy does without."""
    return not field_name.isascii() or bool(UNSAFE_EXTENSIONS.intersection(field_name.split(".")))


def _image_field(fields: Mapping[str, bytes]) -> str:
    return next((name for name in IMAGE_EXTENSIONS if name in fields), "")


def _read_index(path: Path) -> tuple[ShardIndex | None, list[Problem]]:
    name = index_path(path)
    try:
        return parse_index(name.read_bytes(), name.name, None), []
    except FileNotFoundError:
        detail = f"no {name.name}; `groundwork shards index` writes it"
        return None, [Problem(0, Diagnosis.MISSING_INDEX, detail)]
    except ShardError as error:
        return None, [Problem(0, error.diagnosis or Diagnosis.DAMAGED_INDEX, str(error))]


def _by_offset(index: ShardIndex) -> dict[int, _Indexed]:
    members = {}
    for row, (offsets, sizes, checksums) in enumerate(
        zip(index.offsets.tolist(), index.sizes.tolist(), index.checksums.tolist(), strict=True)
    ):
        key = index.key(row)
        for name, offset, size, checksum in zip(
            index.fields, offsets, sizes, checksums, strict=True
        ):
            if size != MISSING:
                members[offset] = _Indexed(key, name, size, checksum)
    return members


def _misplaced(
    samples: list[FoundSample], indexed: Mapping[int, _Indexed]
) -> list[tuple[FoundSample, int]]:
    """Members that the side-car does not have where the tar has them: (sample, offset)."""
    return [
        (sample, offset)
        for sample in samples
        for name, (offset, size) in sample.members.items()
        if (known := indexed.get(offset)) is None or known[:3] != (sample.key, name, size)
    ]


def _indexed_samples(index: ShardIndex, tar_bytes: int, lost: Problem) -> Iterator[FoundSample]:
    """The samples that a side-car knows; those that end behind the tar are excluded."""
    for row, (offsets, sizes) in enumerate(
        zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)
    ):
        members = {
            name: (offset, size)
            for name, offset, size in zip(index.fields, offsets, sizes, strict=True)
            if size != MISSING
        }
        sample = FoundSample(index.key(row), members)
        if any(offset + size > tar_bytes for offset, size in members.values()):
            detail = "the tar ends before this sample does"
            sample.fault = Problem(sample.offset, lost.diagnosis, detail, sample.key)
        yield sample


def _against_manifest(shard: ShardFile, tar_bytes: int, samples: int) -> list[Problem]:
    if shard.bytes is not None and shard.bytes != tar_bytes:
        detail = f"{tar_bytes:,} bytes, the manifest says {shard.bytes:,}"
        return [Problem(0, Diagnosis.WRONG_SIZE, detail)]
    if shard.samples is not None and shard.samples != samples:
        detail = f"{samples:,} samples, the manifest says {shard.samples:,}"
        return [Problem(0, Diagnosis.WRONG_COUNT, detail)]
    return []


def _wrong_index(
    index: ShardIndex,
    tar_bytes: int,
    samples: list[FoundSample],
    misplaced: list[tuple[FoundSample, int]],
    checker: _SampleChecker,
) -> list[Problem]:
    """Where a side-car tells of another tar than the one it lies beside."""
    if misplaced:
        sample, offset = misplaced[0]
        detail = f"does not have {len(misplaced):,} members where they are; delete the side-car"
        return [Problem(offset, Diagnosis.WRONG_INDEX, detail, sample.key)]
    if index.tar_bytes != tar_bytes:
        detail = f"made for {index.tar_bytes:,} bytes, the tar has {tar_bytes:,}; delete it"
    elif int((index.sizes != MISSING).sum()) != sum(len(s.members) for s in samples):
        detail = "lists members that are not there; delete the side-car"
    else:
        stated = np.stack([index.widths, index.heights, index.text_bytes], 1)
        # side-cars of version 2 do not know the sizes of images
        differs = (stated != np.array(checker.sizes, np.int64).reshape(-1, 3)) & (stated != 0)
        differs[list(checker.damaged)] = False
        rows = np.flatnonzero(differs.any(1))
        if not len(rows):
            return []
        sample = samples[int(rows[0])]
        detail = f"states other sizes for {len(rows):,} images or texts; delete the side-car"
        return [Problem(sample.offset, Diagnosis.WRONG_INDEX, detail, sample.key)]
    return [Problem(0, Diagnosis.WRONG_INDEX, detail)]
