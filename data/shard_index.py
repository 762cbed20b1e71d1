"""The `.idx` side-car of a tar: where each member of each sample lies, and its checksum.

A plain WebDataset tar can only be read from the front. The side-car turns it into an array: sample
number i is one slice per field, so a stream can open anywhere without reading what comes before.

Layout, little-endian: magic (8 bytes), length of the JSON header (uint32), header, zero padding to a
multiple of 8, then `offsets` (samples, fields) int64, `sizes` (samples, fields) int64, `checksums`
(samples, fields) uint32 padded to 8, `key_ends` (samples) int64, and the keys, UTF-8, end to end. A
field that a sample lacks has size -1. The header carries the crc32c of all that follows it.
"""

import json
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from groundwork.data.atomic import write_atomically

MAGIC = b"GWIDX\x00\x00\x01"
BLOCK = 512  # bytes of a tar block
MISSING = -1


class ShardError(ValueError):
    """A shard, index or manifest that cannot be used; says which file, why, and how to mend it."""


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


def index_path(tar: Path) -> Path:
    """`x.tar` -> `x.idx`."""
    return tar.with_suffix(".idx")


def scan_tar(tar: Path) -> ShardIndex:
    """Read a tar once and index it.

    Consecutive members with the same stem form a sample (the WebDataset convention: the stem ends
    at the first dot of the base name). Raises ShardError on truncation, on links, devices, absolute
    or parent paths, and on keys that come back after other keys.
    """
    keys: list[str] = []
    members: list[dict[str, tuple[int, int, int]]] = []
    seen: set[str] = set()
    for name, offset, size, checksum in _members(tar):
        key, field = _split(name)
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
    encoded = [key.encode("utf-8") for key in keys]
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
    """(name, offset, size, crc32c) of each regular member; refuses what a data tar must not hold."""
    total = tar.stat().st_size
    with tar.open("rb") as raw:
        try:
            with tarfile.open(fileobj=raw, mode="r:") as archive:
                end = 0
                for member in archive:
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    if member.isdir():
                        continue
                    _refuse_unsafe(tar, member)
                    if member.offset_data + member.size > total:
                        raise _truncated(tar, total, member.offset_data + member.size)
                    raw.seek(member.offset_data)
                    data = raw.read(member.size)
                    yield member.name, member.offset_data, member.size, google_crc32c.value(data)
                if end + 2 * BLOCK > total:
                    raise _truncated(tar, total, end + 2 * BLOCK)
        except tarfile.TarError as error:
            raise ShardError(
                f"{tar}: not a readable tar ({error}); fetch or build this shard again"
            ) from error


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


def _split(name: str) -> tuple[str, str]:
    directory, _, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return (f"{directory}/{stem}" if directory else stem), field.lower()


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
        {
            "tar_bytes": index.tar_bytes,
            "samples": len(index),
            "fields": index.fields,
            "crc32c": google_crc32c.value(body),
        }
    ).encode()
    start = MAGIC + struct.pack("<I", len(header)) + header
    write_atomically(path, start + bytes(-len(start) % 8) + body)


def read_index(path: Path, tar: Path) -> ShardIndex:
    """Read a side-car and check it against itself and against the size of its tar."""
    remedy = f"delete it, and it is rebuilt from {tar.name} at the next start"
    data = path.read_bytes()
    if data[:8] != MAGIC:
        raise ShardError(f"{path}: not a groundwork shard index; {remedy}")
    try:
        (length,) = struct.unpack_from("<I", data, 8)
        header = json.loads(data[12 : 12 + length])
        start = 12 + length + (-(12 + length) % 8)
        body = data[start:]
        samples, fields = int(header["samples"]), tuple(map(str, header["fields"]))
        tar_bytes, expected = int(header["tar_bytes"]), int(header["crc32c"])
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ShardError(f"{path}: damaged header ({error}); {remedy}") from error
    if google_crc32c.value(body) != expected:
        raise ShardError(f"{path}: checksum mismatch, the index is damaged; {remedy}")
    cells = samples * len(fields)
    checksum_bytes = cells * 4 + (-cells * 4) % 8
    index = ShardIndex(
        tar_bytes=tar_bytes,
        fields=fields,
        offsets=np.frombuffer(body, "<i8", cells).reshape(samples, -1),
        sizes=np.frombuffer(body, "<i8", cells, cells * 8).reshape(samples, -1),
        checksums=np.frombuffer(body, "<u4", cells, cells * 16).reshape(samples, -1),
        key_ends=np.frombuffer(body, "<i8", samples, cells * 16 + checksum_bytes),
        keys=body[cells * 16 + checksum_bytes + samples * 8 :],
    )
    actual = tar.stat().st_size
    if actual < index.tar_bytes:
        raise _truncated(tar, actual, index.tar_bytes)
    if actual != index.tar_bytes:
        raise ShardError(
            f"{tar}: has {actual:,} bytes, but its index was made for {index.tar_bytes:,}; the tar was "
            f"replaced: delete {path.name} to have it indexed anew"
        )
    return index
