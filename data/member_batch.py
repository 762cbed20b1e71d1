"""Reading the members of many samples of a local data set into one buffer.

A reader in C++ that the caller brings (`groundwork.kernels.member_reader`; `data` does not import
`kernels`) finds, reads and verifies them. What it does not find flawless is read again by
`sample_reader`, which knows of second tries and says what is wrong: so the result is the same
without a reader.
"""

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from groundwork.data.raw_batch import RawBatch, pack_samples, replace_samples
from groundwork.data.sample_reader import read_rows
from groundwork.data.shard_index import ShardError, ShardIndex
from groundwork.data.shard_table import NO_POINTERS, Pointers, ShardTable
from groundwork.data.storage import LocalStorage, Storage

#: Tars that are open at once for a batch: fewer than a LocalStorage keeps open.
FILES_AT_ONCE: Final = 64


class MemberPlan(Protocol):
    """Where N samples will lie in `buffer`. places, sizes: as in RawBatch.

    status: (N, 2), 0 in the first column where a sample has been read and is as it was written.
    runs: (R, ...), what is read at once, sorted by the number of the shard in the first column.
    """

    @property
    def buffer(self) -> NDArray[np.uint8]: ...
    @property
    def places(self) -> NDArray[np.int64]: ...
    @property
    def sizes(self) -> NDArray[np.int64]: ...
    @property
    def status(self) -> NDArray[np.int32]: ...
    @property
    def runs(self) -> NDArray[np.int64]: ...

    def read(self, first: int, last: int, descriptors: NDArray[np.int32]) -> None:
        """Read runs first..last-1 and verify their samples. descriptors: of all shards, or -1."""


#: (shards (K, 8), columns (K, F), numbers (N,), rows (N,)) -> the plan of a batch. shards: the
#: `pointers` of their indices; columns: of each field in the index of a shard, -1 for none;
#: numbers, rows: shard and row of each sample.
MemberReader = Callable[
    [NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]], MemberPlan
]


def reads_in_batches(reader: MemberReader | None, storage: Storage) -> bool:
    """Whether a reader is there that can read from this storage."""
    return reader is not None and isinstance(storage, LocalStorage)


def read_batch(
    reader: MemberReader | None,
    table: ShardTable,
    shards: NDArray[np.int64],
    rows: NDArray[np.int64],
    wanted: frozenset[str] | None = None,
) -> RawBatch:
    """Key and verified members of samples. shards, rows: (N,), where each of them is.

    wanted: the fields to read, None for all. Without a reader, and from remote storage, samples
    are read one by one.
    """
    storage = table.storage
    if reader is None or not isinstance(storage, LocalStorage):
        return pack_samples(read_rows(storage, table, shards, rows, wanted))
    chosen = sorted(set(shards.tolist()))  # of a hundred numbers; np.unique takes twice as long
    numbers = np.array(chosen, np.int64).searchsorted(shards)
    fields, pointers, columns, held = _indices(table, chosen, wanted)
    plan = reader(pointers, columns, numbers, rows)
    del held  # the plan has taken what it needs from the indices
    _read(plan, storage, [table.entries[shard].file for shard in chosen])
    batch = RawBatch(fields, plan.buffer, plan.places, plan.sizes)
    bad = np.flatnonzero(plan.status[:, 0])
    if not len(bad):
        return batch
    others = read_rows(storage, table, shards[bad], rows[bad], wanted)
    return replace_samples(batch, dict(zip(bad.tolist(), others, strict=True)))


def _indices(
    table: ShardTable, shards: list[int], wanted: frozenset[str] | None
) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.int32], list[ShardIndex | None]]:
    """Fields of some shards, their pointers, the columns of the fields, and what must stay."""
    pointers: list[Pointers] = []
    held: list[ShardIndex | None] = []
    kinds: list[tuple[str, ...]] = []
    for shard in shards:
        try:
            index, numbers = table.pointers(shard)
        except (ShardError, OSError):  # the second reading says what is wrong
            held.append(None)
            pointers.append(NO_POINTERS)
            kinds.append(())
            continue
        held.append(index)
        pointers.append(numbers)
        kinds.append(index.fields)
    names = {name for fields in set(kinds) for name in fields}
    fields = tuple(sorted(names if wanted is None else names & wanted))
    # nearly always all shards have the same fields
    columns = {kind: [_column(kind, name) for name in fields] for kind in set(kinds)}
    return (
        fields,
        np.array(pointers, np.int64).reshape(len(shards), len(NO_POINTERS)),
        np.array([columns[kind] for kind in kinds], np.int32).reshape(len(shards), len(fields)),
        held,
    )


def _column(fields: tuple[str, ...], name: str) -> int:
    return fields.index(name) if name in fields else -1


def _read(plan: MemberPlan, storage: LocalStorage, files: list[str]) -> None:
    descriptors = np.full(len(files), -1, np.int32)
    first_shards = range(0, len(files), FILES_AT_ONCE)
    bounds = plan.runs[:, 0].searchsorted([*first_shards, len(files)]).tolist()
    for begin, first, last in zip(first_shards, bounds, bounds[1:], strict=False):
        opened = []  # held until they are read: another thread may make the storage drop them
        for number in range(begin, min(begin + FILES_AT_ONCE, len(files))):
            try:
                file = storage.open(files[number])
            except OSError:  # the second reading says why
                continue
            opened.append(file)
            descriptors[number] = file.fd
        plan.read(first, last, descriptors)
        descriptors[begin : begin + FILES_AT_ONCE] = -1
