"""The `.idx` side-car of a tar: where each member of each sample lies, and its checksum.

A plain WebDataset tar can only be read from the front. The side-car turns it into an array: sample
number i is one slice per field, so a stream can open anywhere without reading what comes before.

Layout, little-endian: magic (7 bytes), version (uint8), length of the JSON header (uint32), crc32c
of all that follows (uint32), header, zero padding to a multiple of 8, then `offsets` (samples,
fields) int64, `sizes` (samples, fields) int64, `checksums` (samples, fields) uint32 padded to 8,
`key_ends` (samples) int64, and the keys, UTF-8, end to end. A field that a sample lacks has size
-1.
"""

import hashlib
import json
import re
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from groundwork.data.atomic import write_atomically

MAGIC = b"GWIDX\x00\x00"
VERSION = 2
PREAMBLE = struct.Struct("<7sBII")  # magic, version, length of the header, crc32c of the rest
BLOCK = 512  # bytes of a tar block
MISSING = -1
#: Bytes of a member that are checksummed at a time.
CHUNK = 16 * 1024**2
#: webdataset's convention: such members describe the tar and belong to no sample.
META = re.compile(r"__[^/]*__($|/)")


class ShardError(ValueError):
    """A shard, index or manifest that cannot be used; says which file, why, and how to mend it."""


class OutdatedIndexError(ShardError):
    """A side-car in the layout of an earlier version; scanning the tar again replaces it."""


@dataclass(frozen=True)
class ShardIndex:
    """Positions of all members of one tar.

    fields: the extensions that occur in the tar, sorted.
    offsets, sizes: (S, F) int64, byte ranges in the tar; size MISSING where a sample lacks a field.
    checksums: (S, F) uint32, crc32c of each member.
    """

    tar_bytes: int
    fields: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    checksums: NDArray[np.uint32]
    key_ends: NDArray[np.int64]
    keys: bytes

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, sample_index: int) -> str:
        begin = int(self.key_ends[sample_index - 1]) if sample_index else 0
        return self.keys[begin : int(self.key_ends[sample_index])].decode("utf-8")

    def digest(self) -> str:
        """sha256 of the keys, fields and checksums: what the tar holds, wherever it lies in it."""
        parts = (
            json.dumps(self.fields).encode(),
            np.where(self.sizes == MISSING, MISSING, self.checksums).astype("<i8").tobytes(),
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
    Raises ShardError on truncation, on links, devices, absolute or parent paths, and on keys that
    come back after other keys.
    """
    keys: list[str] = []
    members: list[dict[str, tuple[int, int, int]]] = []
    seen: set[str] = set()
    for name, offset, size, checksum in _members(tar):
        key, field = split_name(name)
        if not field or META.match(name):
            continue
        if not keys or keys[-1] != key:
            if key in seen:
                raise ShardError(
                    f"{tar}: sample {key!r} appears twice, with other samples between; give every "
                    "sample its own key, and write its members one after the other"
                )
            seen.add(key)
            keys.append(key)
            members.append({})
        if field in members[-1]:
            raise ShardError(
                f"{tar}: sample {key!r} has two {field!r} members; give every sample its own key"
            )
        members[-1][field] = (offset, size, checksum)
    fields = tuple(sorted({field for sample in members for field in sample}))
    table = np.full((len(keys), len(fields), 3), MISSING, np.int64)
    for row, sample in zip(table, members, strict=True):
        for column, field in enumerate(fields):
            if field in sample:
                row[column] = sample[field]
    # names that are not UTF-8 come from tarfile as lone surrogates
    encoded = [key.encode("utf-8", "backslashreplace") for key in keys]
    return ShardIndex(
        tar_bytes=tar.stat().st_size,
        fields=fields,
        offsets=table[..., 0],
        sizes=table[..., 1],
        checksums=(table[..., 2] & 0xFFFFFFFF).astype(np.uint32),
        key_ends=np.cumsum([len(e) for e in encoded], dtype=np.int64),
        keys=b"".join(encoded),
    )


def _members(tar: Path) -> Iterator[tuple[str, int, int, int]]:
    """(name, offset, size, crc32c) of each file; refuses what a data tar must not hold."""
    total = tar.stat().st_size
    with tar.open("rb") as raw:
        try:
            with tarfile.open(fileobj=raw, mode="r:") as archive:
                end = 0
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # or it keeps every header
                    if member.size < 0 or member.offset_data < end:
                        raise _damaged(tar, end)
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    if member.isdir():
                        continue
                    _refuse_unsafe(tar, member)
                    if end > total:
                        raise _truncated(tar, total, end)
                    checksum = _checksum(raw, member.offset_data, member.size)
                    yield member.name, member.offset_data, member.size, checksum
                # tarfile takes a header it cannot read for the end of the archive
                raw.seek(end)
                marker = raw.read(2 * BLOCK)
                if len(marker) < 2 * BLOCK:
                    raise _truncated(tar, total, end + 2 * BLOCK)
                if any(marker):
                    raise _damaged(tar, end)
        except ShardError:
            raise
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise ShardError(
                f"{tar}: not a readable tar ({error}); fetch or build this shard again (a tar that "
                "is compressed has no random access: decompress it first)"
            ) from error


def _checksum(raw: BinaryIO, offset: int, size: int) -> int:
    raw.seek(offset)
    checksum = google_crc32c.Checksum()
    while size > 0:
        checksum.update(raw.read(min(size, CHUNK)))
        size -= CHUNK
    return int.from_bytes(checksum.digest(), "big")


def _refuse_unsafe(tar: Path, member: tarfile.TarInfo) -> None:
    if not member.isfile() or member.issparse():
        raise ShardError(
            f"{tar}: member {member.name!r} is a link, a device or a sparse file; a data tar holds "
            "regular files only, so this one is not read"
        )
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise ShardError(
            f"{tar}: member {member.name!r} has an absolute or parent path; such tars are not read"
        )


def _truncated(tar: Path, total: int, needed: int) -> ShardError:
    return ShardError(
        f"{tar}: truncated: the file has {total:,} bytes, its members need {needed:,}; "
        "fetch or build this shard again"
    )


def _damaged(tar: Path, offset: int) -> ShardError:
    return ShardError(
        f"{tar}: damaged: no member and no end of the archive at byte {offset:,}; fetch or build "
        "this shard again"
    )


def split_name(name: str) -> tuple[str, str]:
    """Member name -> (key, field). The field is empty where the member belongs to no sample."""
    directory, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return f"{directory}{slash}{stem}", field.lower() if stem else ""


def write_index(index: ShardIndex, path: Path) -> None:
    """Write the side-car, atomically."""
    checksums = index.checksums.astype("<u4").tobytes()
    body = b"".join(
        (
            index.offsets.astype("<i8").tobytes(),
            index.sizes.astype("<i8").tobytes(),
            checksums + bytes(-len(checksums) % 8),
            index.key_ends.astype("<i8").tobytes(),
            index.keys,
        )
    )
    header = json.dumps(
        {"tar_bytes": index.tar_bytes, "samples": len(index), "fields": index.fields}
    ).encode()
    rest = header + bytes(-(PREAMBLE.size + len(header)) % 8) + body
    preamble = PREAMBLE.pack(MAGIC, VERSION, len(header), google_crc32c.value(rest))
    write_atomically(path, preamble + rest)


def read_index(path: Path, tar: Path) -> ShardIndex:
    """Read a side-car and check it against itself and against the size of its tar.

    Raises OutdatedIndexError for the layout of an earlier version.
    """
    remedy = f"delete it, and it is rebuilt from {tar.name} at the next start"
    data = path.read_bytes()
    if data[: len(MAGIC)] != MAGIC or len(data) < PREAMBLE.size:
        raise ShardError(f"{path}: not a groundwork shard index; {remedy}")
    _, version, length, expected = PREAMBLE.unpack_from(data)
    if version < VERSION:
        raise OutdatedIndexError(f"{path}: an index of version {version}; {remedy}")
    if version > VERSION:
        raise ShardError(f"{path}: an index of version {version}, newer than this code; {remedy}")
    if google_crc32c.value(data[PREAMBLE.size :]) != expected:
        raise ShardError(f"{path}: checksum mismatch, the index is damaged; {remedy}")
    try:
        start = PREAMBLE.size + length
        header = json.loads(data[PREAMBLE.size : start])
        body = data[start + -start % 8 :]
        samples, fields = int(header["samples"]), tuple(map(str, header["fields"]))
        cells, shape = samples * len(fields), (samples, len(fields))
        checksum_bytes = cells * 4 + (-cells * 4) % 8
        index = ShardIndex(
            tar_bytes=int(header["tar_bytes"]),
            fields=fields,
            offsets=np.frombuffer(body, "<i8", cells).reshape(shape),
            sizes=np.frombuffer(body, "<i8", cells, cells * 8).reshape(shape),
            checksums=np.frombuffer(body, "<u4", cells, cells * 16).reshape(shape),
            key_ends=np.frombuffer(body, "<i8", samples, cells * 16 + checksum_bytes),
            keys=body[cells * 16 + checksum_bytes + samples * 8 :],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: malformed ({error}); {remedy}") from error
    actual = tar.stat().st_size
    if actual < index.tar_bytes:
        raise _truncated(tar, actual, index.tar_bytes)
    if actual != index.tar_bytes:
        raise ShardError(
            f"{tar}: has {actual:,} bytes, but its index was made for {index.tar_bytes:,}; the tar "
            f"was replaced: delete {path.name} to have it indexed anew"
        )
    return index
