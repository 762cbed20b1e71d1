"""The `.idx` side-car of a tar: where each member of each sample lies, its checksum and its size.

A plain WebDataset tar can only be read from the front. The side-car turns it into an array: sample
number i is one slice per field, so a stream can open anywhere without reading what comes before.
`docs/shard_format.md` specifies the layout byte by byte. Its header says how many samples there
are and where each array begins, so that a data set of many shards is opened by their headers, and
the arrays of a shard are read, or mapped, when it is first used.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from groundwork.data.atomic import write_atomically
from groundwork.data.diagnosis import Diagnosis
from groundwork.data.index_builder import (
    MISSING,
    IndexBuilder,
    IndexColumns,
    RepeatedMemberError,
    split_name,
)
from groundwork.data.index_header import (
    ALIGNMENT,
    ARRAYS,
    HEADER_BYTES,
    MAGIC,
    PREAMBLE,
    VERSION,
    IndexHeader,
    OutdatedIndexError,
    Section,
    ShardError,
    header_bytes,
    parse_index_header,
    read_index_header,
    remedy_for,
    tar_of,
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

#: What stands for the checksum of a member that is not there.
NO_CHECKSUM = 2**32 - 1


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

    def keys_of(self, rows: NDArray[np.int64]) -> list[str]:
        """The keys of several samples."""
        ends = self.key_ends[rows]
        begins = np.where(rows > 0, self.key_ends[rows - 1], 0)
        keys = self.keys
        return [
            bytes(keys[begin:end]).decode("utf-8")
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        ]

    def digest(self) -> str:
        """sha256 of the keys, fields and checksums: what the tar holds, wherever it lies in it."""
        parts = (
            json.dumps(self.fields).encode(),
            np.where(self.sizes == MISSING, NO_CHECKSUM, self.checksums.astype("<i8")).tobytes(),
            self.key_ends.astype("<i8").tobytes(),
            self.keys,
        )
        return hashlib.sha256(b"".join(parts)).hexdigest()


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
    except TarFormatError as error:
        raise ShardError(f"{where}: {error}", error.diagnosis, error.offset) from error
    except RepeatedMemberError as error:
        raise ShardError(f"{where}: {error}", error.diagnosis) from error


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
        _check_tar_bytes(index.tar_bytes, tar_bytes, name, tar_of(name))
    return index


def map_index(path: Path, tar_bytes: int | None = None, *, verify: bool = True) -> ShardIndex:
    """Open a side-car without copying it: its arrays are views of the file, mapped read-only.

    All processes of a node share the pages. Side-cars are replaced by renaming, never changed in
    place, so a map stays what it was.
    verify: check the arrays' checksums, which reads the file once (about 1 ms per MB); without it
        only the header and the size are checked.
    """
    import torch  # here, because the processes that build shards do without these two seconds

    size = path.stat().st_size
    # torch's maps hold no file descriptor, unlike Python's, so a process may have thousands
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    data = mapped.data.toreadonly() if size else memoryview(b"")
    header = parse_index_header(bytes(data[: header_bytes(data, str(path))]), str(path), len(data))
    index = _parse_arrays(data, header, str(path), verify=verify)
    if tar_bytes is not None:
        _check_tar_bytes(index.tar_bytes, tar_bytes, str(path), tar_of(str(path)))
    return index


def _parse_arrays(data: memoryview, header: IndexHeader, name: str, *, verify: bool) -> ShardIndex:
    """The arrays as views of `data`, which is the whole side-car."""
    remedy = remedy_for(name)
    damaged = f"{name}: checksum mismatch, the index is damaged; {remedy}"
    sections = dict(header.sections)
    if header.version == 2:
        expected = PREAMBLE.unpack_from(data)[3]
        if verify and google_crc32c.value(bytes(data[PREAMBLE.size :])) != expected:
            raise ShardError(damaged, Diagnosis.DAMAGED_INDEX)
        begin = sections["key_ends"].end
        sections["keys"] = Section("|u1", (max(0, len(data) - begin),), begin, 0)
    elif len(data) != header.file_bytes or (
        verify
        and any(
            google_crc32c.value(bytes(data[section.begin : section.end])) != section.crc32c
            for array, section in sections.items()
            if array in ARRAYS
        )
    ):
        raise ShardError(damaged, Diagnosis.DAMAGED_INDEX)
    try:
        arrays: dict[str, Any] = {
            array: np.frombuffer(
                data, section.dtype, math.prod(section.shape), section.begin
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
        raise ShardError(
            f"{name}: malformed ({error}); {remedy}", Diagnosis.DAMAGED_INDEX
        ) from error
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
    bytes(index.keys).decode("utf-8")
    # what is UTF-8 as a whole may still be divided within a character
    begins = np.concatenate(([0], ends))[:-1][np.diff(ends, prepend=0) > 0]
    if (np.frombuffer(index.keys, np.uint8)[begins] & 0xC0 == 0x80).any():
        raise ValueError("the keys are not UTF-8")


def _check_tar_bytes(indexed: int, actual: int, index_name: str, tar_name: str) -> None:
    if actual < indexed:
        message = f"{tar_name}: {truncated(actual, indexed)}"
        raise ShardError(message, Diagnosis.TRUNCATED_TAR, actual)
    if actual != indexed:
        raise ShardError(
            f"{tar_name}: has {actual:,} bytes, but its index was made for {indexed:,}; the tar "
            f"was replaced: delete {index_name.rpartition('/')[2]} to have it indexed anew",
            Diagnosis.WRONG_INDEX,
        )
