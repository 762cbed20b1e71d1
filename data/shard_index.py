"""The `.idx` side-car of a tar: where each member of each sample lies, its checksum and its size.

A plain WebDataset tar can only be read from the front. The side-car turns it into an array: sample
number i is one slice per field, so a stream can open anywhere without reading what comes before.
`docs/shard_format.md` specifies the layout byte by byte. Its header says how many samples there
are and where each array begins, so that a data set of many shards is opened by their headers, and
the arrays of a shard are read, or mapped, when it is first used.
"""

import hashlib
import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from groundwork.data.atomic import write_atomically
from groundwork.data.index_builder import (
    MISSING,
    IndexBuilder,
    IndexColumns,
    RepeatedMemberError,
    split_name,
)
from groundwork.data.tar_reader import CHUNK, TarFormatError, TarReader, truncated

__all__ = [
    "HEADER_BYTES",
    "MISSING",
    "IndexHeader",
    "OutdatedIndexError",
    "ShardError",
    "ShardIndex",
    "header_bytes",
    "index_path",
    "map_index",
    "parse_index",
    "parse_index_header",
    "read_index",
    "read_index_header",
    "scan_file",
    "scan_tar",
    "split_name",
    "write_index",
]

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


class ShardError(ValueError):
    """A shard, index or manifest that cannot be used; says which file, why, and how to mend it."""


class OutdatedIndexError(ShardError):
    """A side-car in the layout of version 1; scanning the tar again replaces it."""


@dataclass(frozen=True)
class ShardIndex:
    """Positions of all members of one tar.

    fields: the extensions that occur in the tar, sorted.
    offsets, sizes: (S, F) int64, byte ranges in the tar; size MISSING where a sample lacks a field.
    checksums: (S, F) uint32, crc32c of each member.
    widths, heights: (S,) int32, stored size of the image in pixels; 0 where there is none or its
        header is not understood.
    text_bytes: (S,) int32, size of the member `txt`; -1 where there is none.
    key_ends: (S,) int64, end of each key in `keys`, which are UTF-8.
    """

    tar_bytes: int
    fields: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    checksums: NDArray[np.uint32]
    key_ends: NDArray[np.int64]
    keys: bytes | memoryview
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    text_bytes: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.key_ends)

    def __getstate__(self) -> dict[str, Any]:
        # a view of a mapped file cannot be pickled, its content can
        return {**self.__dict__, "keys": bytes(self.keys)}

    def key(self, sample_index: int) -> str:
        begin = int(self.key_ends[sample_index - 1]) if sample_index else 0
        return bytes(self.keys[begin : int(self.key_ends[sample_index])]).decode("utf-8")

    def digest(self) -> str:
        """sha256 of the keys, fields and checksums: what the tar holds, wherever it lies in it."""
        parts = (
            json.dumps(self.fields).encode(),
            np.where(self.sizes == MISSING, MISSING, self.checksums).astype("<i8").tobytes(),
            self.key_ends.astype("<i8").tobytes(),
            self.keys,
        )
        return hashlib.sha256(b"".join(parts)).hexdigest()


class Section(NamedTuple):
    """One array of a side-car. begin: in the file; crc32c: of the array and its padding."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    crc32c: int

    @property
    def bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))

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


def index_path(tar: Path) -> Path:
    """`x.tar` -> `x.idx`."""
    return tar.with_suffix(".idx")


def scan_tar(tar: Path) -> ShardIndex:
    """Read a tar once and index it.

    Consecutive members with the same stem form a sample (the WebDataset convention: the stem ends
    at the first dot of the base name; hidden files and names without a dot belong to no sample).
    Raises ShardError on truncation, on links, devices, absolute or parent paths, on keys that come
    back after other keys, and where something follows the end of the archive.
    """
    with tar.open("rb", buffering=0) as raw:
        return scan_file(raw, tar.stat().st_size, str(tar))


def scan_file(raw: BinaryIO, tar_bytes: int, where: str) -> ShardIndex:
    """`scan_tar` of an open, seekable file. where: its name for messages."""
    reader = TarReader(raw, tar_bytes)
    builder = IndexBuilder()
    crc32c, extend = google_crc32c.value, google_crc32c.extend
    try:
        for name, offset, size in reader.members():
            field = builder.begin_member(name)
            if not field:
                continue
            head = reader.read(offset, min(size, CHUNK))
            checksum = crc32c(head)
            for done in range(CHUNK, size, CHUNK):
                more = reader.read(offset + done, min(size - done, CHUNK))
                checksum = extend(checksum, more)
            builder.add_member(field, offset, size, checksum, head)
        return _shard_index(builder.columns(), tar_bytes)
    except (TarFormatError, RepeatedMemberError) as error:
        raise ShardError(f"{where}: {error}") from error


def _shard_index(columns: IndexColumns, tar_bytes: int) -> ShardIndex:
    return ShardIndex(tar_bytes=tar_bytes, **columns._asdict())


def index_of(builder: IndexBuilder, tar_bytes: int) -> ShardIndex:
    """The index of the samples that a builder was given."""
    return _shard_index(builder.columns(), tar_bytes)


def index_bytes(index: ShardIndex) -> bytes:
    """The side-car, version 3: preamble, header, arrays."""
    content = {
        name: np.frombuffer(index.keys, "|u1") if name == "keys" else getattr(index, name)
        for name in ARRAYS
    }
    arrays = {name: np.ascontiguousarray(content[name], ARRAYS[name]) for name in ARRAYS}
    padded = {
        name: (data := array.tobytes()) + bytes(-len(data) % ALIGNMENT)
        for name, array in arrays.items()
    }
    checksums = {name: google_crc32c.value(data) for name, data in padded.items()}
    body = b"".join(padded.values())
    # the header states where the arrays begin, which depends on its own length
    begin = PREAMBLE.size
    while True:
        header = _header_json(index, arrays, checksums, begin, begin + len(body))
        if PREAMBLE.size + len(header) <= begin:
            break
        begin = PREAMBLE.size + len(header) + -len(header) % ALIGNMENT
    header += b" " * (begin - PREAMBLE.size - len(header))
    preamble = PREAMBLE.pack(MAGIC, VERSION, len(header), google_crc32c.value(header))
    return preamble + header + body


def _header_json(
    index: ShardIndex,
    arrays: Mapping[str, NDArray[Any]],
    checksums: Mapping[str, int],
    begin: int,
    file_bytes: int,
) -> bytes:
    sections = []
    for name, array in arrays.items():
        sections.append([name, ARRAYS[name], list(array.shape), begin, checksums[name]])
        begin += array.nbytes + -array.nbytes % ALIGNMENT
    record = {
        "tar_bytes": index.tar_bytes,
        "samples": len(index),
        "fields": index.fields,
        "digest": index.digest(),
        "file_bytes": file_bytes,
        "sections": sections,
    }
    return json.dumps(record, separators=(",", ":")).encode()


def write_index(index: ShardIndex, path: Path, *, sync: bool = True) -> None:
    """Write the side-car, atomically. sync: wait until it is on the disk."""
    write_atomically(path, index_bytes(index), sync=sync)


def read_index(path: Path, tar: Path) -> ShardIndex:
    """Read a side-car and check it against itself and against the size of its tar.

    Raises OutdatedIndexError for the layout of version 1. Version 2 has neither sizes of images nor
    of texts: the former are given as unknown, the latter taken from the members.
    """
    data = path.read_bytes()
    index = parse_index(data, str(path), None)
    _check_tar_bytes(index.tar_bytes, tar.stat().st_size, str(path), str(tar))
    return index


def parse_index(data: bytes, name: str, tar_bytes: int | None) -> ShardIndex:
    """Read a side-car from its bytes, as `read_index` does from a file.

    name: of the side-car, for messages. tar_bytes: size of the tar, None where it is not known.
    """
    header = parse_index_header(data, name)
    index = _parse_arrays(memoryview(data), header, name, verify=True)
    if tar_bytes is not None:
        _check_tar_bytes(index.tar_bytes, tar_bytes, name, _tar_of(name))
    return index


def map_index(path: Path, tar_bytes: int | None = None, *, verify: bool = True) -> ShardIndex:
    """Open a side-car without copying it: its arrays are views of the file, mapped read-only.

    All processes of a node share the pages. Side-cars are replaced by renaming, never changed in
    place, so a map stays what it was.
    verify: check the arrays' checksums, which reads the file once (about 1 ms per MB); without it
        only the header and the size are checked.
    """
    with path.open("rb") as file:
        try:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError:  # an empty file
            data = memoryview(b"")
    header = parse_index_header(bytes(data[: _header_end(data, str(path))]), str(path), len(data))
    index = _parse_arrays(data, header, str(path), verify=verify)
    if tar_bytes is not None:
        _check_tar_bytes(index.tar_bytes, tar_bytes, str(path), _tar_of(str(path)))
    return index


def read_index_header(path: Path) -> IndexHeader:
    """Read what a side-car says of itself: one short read, whatever the size of the shard.

    Its checksum and the size of the side-car are checked, its arrays are not.
    """
    with path.open("rb") as file:
        data = file.read(HEADER_BYTES)
        if (end := _header_end(data, str(path))) > len(data):
            data += file.read(end - len(data))
        return parse_index_header(data, str(path), file.seek(0, 2))


def header_bytes(data: bytes, name: str) -> int:
    """How many of the first bytes of a side-car its header takes. data: 16 bytes or more of it."""
    return _header_end(data, name)


def parse_index_header(data: bytes, name: str, file_bytes: int | None = None) -> IndexHeader:
    """The header of a side-car. data: `header_bytes` of it or more; file_bytes: its whole size.

    Raises OutdatedIndexError for the layout of version 1. The header of version 2 has no checksum
    of its own: it is checked together with the arrays.
    """
    remedy = _remedy(name)
    end = _header_end(data, name)
    _, version, length, expected = PREAMBLE.unpack_from(data)
    header = data[PREAMBLE.size : end]
    if len(header) < length or (version > 2 and google_crc32c.value(header) != expected):
        raise ShardError(f"{name}: checksum mismatch, the index is damaged; {remedy}")
    try:
        record = json.loads(header)
        samples, tar_bytes = record["samples"], record["tar_bytes"]
        fields = tuple(record["fields"])
        if any(type(n) is not int or n < 0 for n in (samples, tar_bytes)) or not all(
            isinstance(field, str) for field in fields
        ):
            raise ValueError("samples, tar_bytes or fields")
        if version == 2:
            sections = _sections_of_version_2(samples, len(fields), end + -end % ALIGNMENT)
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
        raise ShardError(f"{name}: malformed ({error!r}); {remedy}") from error
    if file_bytes is not None and file_bytes != parsed.file_bytes:
        raise ShardError(
            f"{name}: has {file_bytes:,} bytes instead of {parsed.file_bytes:,}, the index is "
            f"damaged; {remedy}"
        )
    return parsed


def _header_end(data: bytes | memoryview, name: str) -> int:
    """Where the header ends, by the preamble, which is checked."""
    remedy = _remedy(name)
    if len(data) < PREAMBLE.size or bytes(data[: len(MAGIC)]) != MAGIC:
        raise ShardError(f"{name}: not a groundwork shard index; {remedy}")
    _, version, length, _ = PREAMBLE.unpack_from(data)
    if version < 2:
        raise OutdatedIndexError(f"{name}: an index of version {version}; {remedy}")
    if version > VERSION:
        raise ShardError(f"{name}: an index of version {version}, newer than this code; {remedy}")
    if length > MAX_HEADER:
        raise ShardError(f"{name}: checksum mismatch, the index is damaged; {remedy}")
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


def _parse_arrays(data: memoryview, header: IndexHeader, name: str, *, verify: bool) -> ShardIndex:
    """The arrays as views of `data`, which is the whole side-car."""
    remedy = _remedy(name)
    damaged = f"{name}: checksum mismatch, the index is damaged; {remedy}"
    sections = dict(header.sections)
    if header.version == 2:
        expected = PREAMBLE.unpack_from(data)[3]
        if verify and google_crc32c.value(bytes(data[PREAMBLE.size :])) != expected:
            raise ShardError(damaged)
        begin = sections["key_ends"].end
        sections["keys"] = Section("|u1", (max(0, len(data) - begin),), begin, 0)
    elif len(data) != header.file_bytes or (
        verify
        and any(
            google_crc32c.value(bytes(data[section.begin : section.end])) != section.crc32c
            for section in sections.values()
        )
    ):
        raise ShardError(damaged)
    try:
        arrays: dict[str, Any] = {
            array: np.frombuffer(
                data, section.dtype, np.prod(section.shape), section.begin
            ).reshape(section.shape)
            if section.bytes
            else np.zeros(section.shape, section.dtype)
            for array, section in sections.items()
            if array in ARRAYS
        }
        keys = sections["keys"]
        arrays["keys"] = data[keys.begin : keys.begin + keys.bytes]
        if isinstance(data.obj, bytes):
            arrays["keys"] = bytes(arrays["keys"])
        if header.version == 2:
            arrays.update(_sizes_of_version_2(header.fields, arrays["sizes"]))
        index = ShardIndex(tar_bytes=header.tar_bytes, fields=header.fields, **arrays)
        if verify:
            _check_values(index)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ShardError(f"{name}: malformed ({error}); {remedy}") from error
    return index


def _sizes_of_version_2(
    fields: tuple[str, ...], sizes: NDArray[np.int64]
) -> dict[str, NDArray[np.int32]]:
    unknown = np.zeros(len(sizes), np.int32)
    text = sizes[:, fields.index("txt")] if "txt" in fields else np.full(len(sizes), -1, np.int64)
    return {
        "widths": unknown,
        "heights": unknown,
        "text_bytes": np.minimum(text, 2**31 - 1).astype(np.int32),
    }


def _check_values(index: ShardIndex) -> None:
    """Refuse ranges that lie outside the tar or the keys, whoever computed the checksums."""
    present = index.sizes != MISSING
    offsets, sizes = index.offsets[present], index.sizes[present]
    if (offsets < 0).any() or (sizes < 0).any() or (offsets > index.tar_bytes - sizes).any():
        raise ValueError("a member lies outside the tar")
    ends = index.key_ends
    if len(ends) and (ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] != len(index.keys)):
        raise ValueError("the keys")


def _check_tar_bytes(indexed: int, actual: int, index_name: str, tar_name: str) -> None:
    if actual < indexed:
        raise ShardError(f"{tar_name}: {truncated(actual, indexed)}")
    if actual != indexed:
        raise ShardError(
            f"{tar_name}: has {actual:,} bytes, but its index was made for {indexed:,}; the tar "
            f"was replaced: delete {index_name.rpartition('/')[2]} to have it indexed anew"
        )


def _tar_of(name: str) -> str:
    return f"{name.removesuffix('.idx')}.tar"


def _remedy(name: str) -> str:
    tar = _tar_of(name).rpartition("/")[2]
    return f"delete it, and it is rebuilt from {tar} at the next start"
