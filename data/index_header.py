"""The beginning of a side-car: which version it has, of what tar it is, where its arrays lie."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import google_crc32c
import numpy as np

from groundwork.data.diagnosis import Diagnosis

MAGIC: Final = b"GWIDX\x00\x00"
VERSION: Final = 3
PREAMBLE: Final = struct.Struct("<7sBII")  # magic, version, length of the header, its crc32c
ALIGNMENT: Final = 8
#: First bytes of a side-car that hold its whole header, unless the tar has some hundred fields.
HEADER_BYTES: Final = 4096
#: A longer header than this is not believed.
MAX_HEADER: Final = 16 * 1024**2
#: Arrays of version 3 in the order in which they are written, with their element types.
ARRAYS: Final[Mapping[str, str]] = {
    "offsets": "<i8",
    "sizes": "<i8",
    "checksums": "<u4",
    "widths": "<i4",
    "heights": "<i4",
    "text_bytes": "<i4",
    "key_ends": "<i8",
    "keys": "|u1",
}
CELL_ARRAYS: Final = ("offsets", "sizes", "checksums")
DAMAGED: Final = Diagnosis.DAMAGED_INDEX


class ShardError(ValueError):
    """A shard, index or manifest that cannot be used; says which file, why, and how to mend it.

    diagnosis: which of the known faults it is; None where it is none of the data.
    offset: where in the file, as far as that is known.
    """

    def __init__(
        self, message: str, diagnosis: Diagnosis | None = None, offset: int | None = None
    ) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis
        self.offset = offset


class OutdatedIndexError(ShardError):
    """A side-car in the layout of version 1; scanning the tar again replaces it."""


class Section(NamedTuple):
    """One array of a side-car. begin: in the file; crc32c: of the array and its padding."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    crc32c: int

    @property
    def bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    @property
    def end(self) -> int:
        """Behind the padding."""
        return self.begin + self.bytes + -self.bytes % ALIGNMENT


@dataclass(frozen=True)
class IndexHeader:
    """What a side-car says of itself before its arrays.

    digest: `ShardIndex.digest()`; empty in version 2, which does not state it.
    file_bytes: size of the side-car; 0 in version 2.
    """

    version: int
    tar_bytes: int
    samples: int
    fields: tuple[str, ...]
    digest: str
    file_bytes: int
    sections: Mapping[str, Section]


def read_index_header(path: Path) -> IndexHeader:
    """Read what a side-car says of itself: one short read, whatever the size of the shard.

    Its checksum and the size of the side-car are checked, its arrays are not.
    """
    with path.open("rb") as file:
        data = file.read(HEADER_BYTES)
        if (end := header_bytes(data, str(path))) > len(data):
            data += file.read(end - len(data))
        return parse_index_header(data, str(path), file.seek(0, 2))


def parse_index_header(data: bytes, name: str, file_bytes: int | None = None) -> IndexHeader:
    """The header of a side-car. data: `header_bytes` of it or more; file_bytes: its whole size.

    Raises OutdatedIndexError for the layout of version 1. The header of version 2 has no checksum
    of its own: it is checked together with the arrays.
    """
    remedy = remedy_for(name)
    end = header_bytes(data, name)
    _, version, length, expected = PREAMBLE.unpack_from(data)
    header = data[PREAMBLE.size : end]
    if len(header) < length or (version > 2 and google_crc32c.value(header) != expected):
        raise ShardError(f"{name}: checksum mismatch, the index is damaged; {remedy}", DAMAGED)
    try:
        record = json.loads(header)
        samples, tar_bytes = record["samples"], record["tar_bytes"]
        fields = tuple(record["fields"])
        if any(type(n) is not int or not 0 <= n < 2**63 for n in (samples, tar_bytes)) or not all(
            isinstance(field, str) for field in fields
        ):
            raise ValueError("samples, tar_bytes or fields")
        if version == 2:
            sections = _sections_of_version_2(samples, len(fields), end + -end % ALIGNMENT)
            if file_bytes is not None and sections["key_ends"].end > file_bytes:
                raise ValueError(f"{samples:,} samples end behind the file")
            return IndexHeader(version, tar_bytes, samples, fields, "", 0, sections)
        sections = {
            section[0]: Section(str(section[1]), tuple(section[2]), section[3], section[4])
            for section in record["sections"]
        }
        _check_sections(sections, samples, len(fields), record["file_bytes"])
        parsed = IndexHeader(
            version, tar_bytes, samples, fields, record["digest"], record["file_bytes"], sections
        )
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ShardError(f"{name}: malformed ({error!r}); {remedy}", DAMAGED) from error
    if file_bytes is not None and file_bytes != parsed.file_bytes:
        raise ShardError(
            f"{name}: has {file_bytes:,} bytes instead of {parsed.file_bytes:,}, the index is "
            f"damaged; {remedy}",
            DAMAGED,
        )
    return parsed


def header_bytes(data: bytes | memoryview, name: str) -> int:
    """How many of the first bytes of a side-car its preamble and header take.

    data: 16 bytes or more of it; they are checked. name: for messages.
    """
    remedy = remedy_for(name)
    if len(data) < PREAMBLE.size or bytes(data[: len(MAGIC)]) != MAGIC:
        raise ShardError(f"{name}: not a groundwork shard index; {remedy}", DAMAGED)
    _, version, length, _ = PREAMBLE.unpack_from(data)
    if version < 2:
        raise OutdatedIndexError(
            f"{name}: an index of version {version}; {remedy}", Diagnosis.OUTDATED_INDEX
        )
    if version > VERSION:
        raise ShardError(
            f"{name}: an index of version {version}, newer than this code; {remedy}", DAMAGED
        )
    if length > MAX_HEADER:
        raise ShardError(f"{name}: checksum mismatch, the index is damaged; {remedy}", DAMAGED)
    return PREAMBLE.size + int(length)


def _sections_of_version_2(samples: int, fields: int, begin: int) -> dict[str, Section]:
    sections = {}
    for name, dtype in ARRAYS.items():
        if name in ("widths", "heights", "text_bytes", "keys"):
            continue
        shape = (samples, fields) if name in CELL_ARRAYS else (samples,)
        sections[name] = Section(dtype, shape, begin, 0)
        begin = sections[name].end
    return sections


def _check_sections(
    sections: Mapping[str, Section], samples: int, fields: int, file_bytes: int
) -> None:
    for name, dtype in ARRAYS.items():
        section = sections[name]
        shape = (samples, fields) if name in CELL_ARRAYS else (samples,)
        numbers = (section.begin, section.crc32c, file_bytes, *section.shape)
        if any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"section {name}")
        if section.dtype != dtype or (name != "keys" and section.shape != shape):
            raise ValueError(f"section {name} is {section.dtype} {section.shape}")
        if len(section.shape) != len(shape) or section.end > file_bytes:
            raise ValueError(f"section {name} ends behind the file")


def tar_of(name: str) -> str:
    return f"{name.removesuffix('.idx')}.tar"


def remedy_for(name: str) -> str:
    tar = tar_of(name).rpartition("/")[2]
    return f"delete it, and it is rebuilt from {tar} at the next start"
