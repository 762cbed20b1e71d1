"""Reading the members of samples: one byte range each, every checksum verified."""

import errno
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from groundwork.data.diagnosis import Diagnosis
from groundwork.data.raw_batch import RawSample
from groundwork.data.samples import SampleError
from groundwork.data.shard_index import MISSING, ShardError, ShardIndex
from groundwork.data.shard_table import ShardTable
from groundwork.data.storage import LocalStorage, Storage
from groundwork.data.storage_errors import MissingFileError, ReplacedFileError, StorageError

_UNREAD = SampleError("not read")


class ReadPlan(NamedTuple):
    """The one byte range of a file that holds the wanted members of a sample.

    offsets, sizes, checksums: of each of `fields`, offsets in the file; size MISSING where the
    sample lacks the field.
    """

    file: str
    begin: int
    end: int
    key: str
    fields: tuple[str, ...]
    offsets: list[int]
    sizes: list[int]
    checksums: list[int]

    def members(self, data: bytes) -> dict[str, bytes] | str:
        """The members in the bytes of the range, or the first field whose checksum fails."""
        found = {}
        for field, offset, size, checksum in zip(
            self.fields, self.offsets, self.sizes, self.checksums, strict=True
        ):
            if size != MISSING:
                start = offset - self.begin
                content = data[start : start + size]
                if google_crc32c.value(content) != checksum:
                    return field
                found[field] = content
        return found


def read_rows(
    storage: Storage,
    table: ShardTable,
    shards: NDArray[np.int64],
    rows: NDArray[np.int64],
    wanted: frozenset[str] | None = None,
) -> list[RawSample]:
    """Key and members of samples. shards, rows: (N,), where each is. wanted: None for all fields.

    A sample that cannot be read, or whose checksums fail twice, is returned as its error.
    """
    results: list[RawSample] = [_UNREAD] * len(rows)
    places: list[int] = []
    plans: list[ReadPlan] = []
    for shard in np.unique(shards).tolist():
        chosen = np.flatnonzero(shards == shard)
        try:
            index = table.index(shard)
        except (ShardError, OSError) as error:
            if is_outage(storage, error):
                raise
            diagnosis = getattr(error, "diagnosis", None) or Diagnosis.UNREADABLE
            for place in chosen.tolist():
                results[place] = SampleError(f"its index cannot be used: {error}", diagnosis)
            continue
        places += chosen.tolist()
        plans += plan_reads(table.entries[shard].file, index, rows[chosen], wanted)
    for place, sample in zip(places, read_samples(storage, plans), strict=True):
        results[place] = sample
    return results


def plan_reads(
    file: str, table: ShardIndex, rows: NDArray[np.int64], wanted: frozenset[str] | None = None
) -> Iterator[ReadPlan]:
    """How to read samples of one tar. wanted: the fields to read, None for all."""
    columns = [i for i, field in enumerate(table.fields) if wanted is None or field in wanted]
    fields = tuple(table.fields[i] for i in columns)
    offsets = table.offsets[rows][:, columns]
    sizes = table.sizes[rows][:, columns]
    is_there = sizes != MISSING
    begins = offsets.min(1, initial=np.iinfo(np.int64).max, where=is_there)
    ends = (offsets + sizes).max(1, initial=0, where=is_there)
    return map(
        ReadPlan,
        [file] * len(rows),
        np.minimum(begins, ends).tolist(),
        ends.tolist(),
        table.keys_of(rows),
        [fields] * len(rows),
        offsets.tolist(),
        sizes.tolist(),
        table.checksums[rows][:, columns].tolist(),
    )


def is_outage(storage: Storage, error: Exception) -> bool:
    """Whether it is the storage that fails, and not a file of it.

    Such errors end the run, which can go on later: were the samples replaced as bad ones, the
    sequence would depend on the weather.
    """
    if isinstance(error, MissingFileError | ReplacedFileError) or not isinstance(error, OSError):
        return False
    causes = (error, error.__cause__)
    is_stale = any(getattr(cause, "errno", None) == errno.ESTALE for cause in causes)
    return is_stale or not isinstance(storage, LocalStorage)


def read_samples(storage: Storage, plans: Sequence[ReadPlan]) -> list[RawSample]:
    """Carry out the plans, together where the storage can. Nothing unverified is returned."""
    try:
        found: Sequence[bytes | StorageError] = storage.read_many([plan[:3] for plan in plans])
    except StorageError as error:  # of one of them; the others are not to suffer
        if is_outage(storage, error):
            raise
        found = [_read(storage, plan) for plan in plans]
    results: list[RawSample] = []
    for plan, data in zip(plans, found, strict=True):
        members = plan.members(data) if isinstance(data, bytes) else ""
        if isinstance(members, dict):
            results.append((plan.key, members))
        else:
            results.append(_second_try(storage, plan, data))
    return results


def _read(storage: Storage, plan: ReadPlan) -> bytes | StorageError:
    try:
        return storage.read(plan.file, plan.begin, plan.end)
    except StorageError as error:
        if is_outage(storage, error):
            raise
        return error


def _second_try(storage: Storage, plan: ReadPlan, data: bytes | StorageError) -> RawSample:
    if not isinstance(data, StorageError):
        # what is wrong may be a cached copy, or a file that was replaced while it was open
        storage.forget(plan.file, plan.begin, plan.end)
        data = _read(storage, plan)
    if isinstance(data, StorageError):
        return SampleError(f"cannot be read: {data}", Diagnosis.UNREADABLE)
    members = plan.members(data)
    if isinstance(members, str):
        return SampleError(
            f"member {members!r} fails its checksum: the tar was damaged, or replaced after it "
            "was indexed",
            Diagnosis.DAMAGED_MEMBER,
        )
    return plan.key, members
