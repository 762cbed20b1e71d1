"""Reading the members of samples: one byte range each, every checksum verified."""

from collections.abc import Sequence

import google_crc32c

from groundwork.data.samples import SampleError
from groundwork.data.shard_index import MISSING, ShardIndex
from groundwork.data.storage import Storage
from groundwork.data.storage_errors import StorageError

#: Key and members of a sample, or why it cannot be used.
RawSample = tuple[str, dict[str, bytes]] | SampleError


class ReadPlan:
    """The one byte range that holds the wanted members of a sample.

    wanted: the fields to read, None for all.
    parts: (field, begin, end, crc32c) with begin and end inside the range.
    """

    __slots__ = ("begin", "end", "file", "key", "parts")

    def __init__(
        self, file: str, table: ShardIndex, row: int, wanted: frozenset[str] | None = None
    ) -> None:
        self.file, self.key = file, table.key(row)
        members = [
            (field, offset, offset + size, checksum)
            for field, offset, size, checksum in zip(
                table.fields,
                table.offsets[row].tolist(),
                table.sizes[row].tolist(),
                table.checksums[row].tolist(),
                strict=True,
            )
            if size != MISSING and (wanted is None or field in wanted)
        ]
        self.begin = min((begin for _, begin, _, _ in members), default=0)
        self.end = max((end for _, _, end, _ in members), default=0)
        self.parts = [(f, b - self.begin, e - self.begin, c) for f, b, e, c in members]

    def first_damaged(self, data: bytes) -> str | None:
        """The first member whose checksum fails."""
        for field, begin, end, checksum in self.parts:
            if google_crc32c.value(data[begin:end]) != checksum:
                return field
        return None

    def members(self, data: bytes) -> dict[str, bytes]:
        return {field: data[begin:end] for field, begin, end, _ in self.parts}


def read_samples(storage: Storage, plans: Sequence[ReadPlan]) -> list[RawSample]:
    """Carry out the plans, together where the storage can. Nothing unverified is returned."""
    try:
        found: list[bytes | StorageError] = [
            *storage.read_many([(plan.file, plan.begin, plan.end) for plan in plans])
        ]
    except StorageError:  # of one of them; the others are not to suffer
        found = [_read(storage, plan) for plan in plans]
    return [_verified(storage, plan, data) for plan, data in zip(plans, found, strict=True)]


def _read(storage: Storage, plan: ReadPlan) -> bytes | StorageError:
    try:
        return storage.read(plan.file, plan.begin, plan.end)
    except StorageError as error:
        return error


def _verified(storage: Storage, plan: ReadPlan, data: bytes | StorageError) -> RawSample:
    if isinstance(data, bytes) and plan.first_damaged(data) is not None:
        # what is wrong may be a cached copy, or a file that was replaced while it was open
        storage.forget(plan.file, plan.begin, plan.end)
        data = _read(storage, plan)
    if isinstance(data, StorageError):
        return SampleError(f"cannot be read: {data}")
    if (field := plan.first_damaged(data)) is not None:
        return SampleError(
            f"member {field!r} fails its checksum: the tar was damaged, or replaced after it was "
            "indexed"
        )
    return plan.key, plan.members(data)
