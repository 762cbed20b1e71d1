"""The shards of an opened split, and their indices, each opened when it is first needed."""

import io
import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np
from numpy.typing import NDArray

from groundwork.data.diagnosis import Diagnosis
from groundwork.data.shard_index import (
    HEADER_BYTES,
    IndexHeader,
    OutdatedIndexError,
    ShardError,
    ShardIndex,
    header_bytes,
    index_bytes,
    index_path,
    map_index,
    parse_index,
    parse_index_header,
    scan_file,
    scan_tar,
    write_index,
)
from groundwork.data.shards import file_checksum
from groundwork.data.storage import LocalStorage, Storage
from groundwork.data.storage_errors import MissingFileError

log = logging.getLogger(__name__)

#: Indices a process keeps. Those of local files are maps, whose pages all processes share; of
#: remote ones, one of 10,000 samples takes about a megabyte.
KEPT_INDICES: Final = 4096
#: Side-cars of remote tars that are asked for together.
HEADERS_AT_ONCE: Final = 16

#: (rows, fields, addresses of `offsets`, `sizes`, `checksums`, `key_ends` and `keys`, bytes of the
#: keys) of a ShardIndex.
Pointers = tuple[int, int, int, int, int, int, int, int]
#: Those of an index without a sample.
NO_POINTERS: Final[Pointers] = (0,) * 8


@dataclass(frozen=True)
class ShardEntry:
    """One tar of a split. samples: as its index says. crc32c: of the whole tar, where known."""

    file: str
    samples: int
    crc32c: int | None = None


class ShardTable:
    """Which sample lies in which shard, and where in it. Can be pickled and forked."""

    def __init__(self, storage: Storage, entries: Sequence[ShardEntry]) -> None:
        self.storage = storage
        self.entries = list(entries)
        self.ends = np.cumsum([entry.samples for entry in entries], dtype=np.int64)
        self._indices: OrderedDict[int, ShardIndex] = OrderedDict()
        self._pointers: dict[int, tuple[ShardIndex, Pointers]] = {}  # of some of them

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": OrderedDict(), "_pointers": {}}

    def locate(self, index: int) -> tuple[int, int]:
        """(shard number, sample number inside the shard)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a data set of {len(self)}")
        shard = int(self.ends.searchsorted(index, side="right"))
        return shard, index - int(self.ends[shard - 1] if shard else 0)

    def locate_many(
        self, indices: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same for many samples. (K,) -> (K,), (K,)."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"samples {indices.min()} to {indices.max()} of a data set of {len(self)}"
            )
        shards = self.ends.searchsorted(indices, side="right")
        return shards, indices - np.where(shards > 0, self.ends[shards - 1], 0)

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard. Raises ShardError where it does not fit what is known of it."""
        kept = self._indices.get(shard)
        if kept is not None:
            self._indices.move_to_end(shard)
            return kept
        entry = self.entries[shard]
        index = load_index(self.storage, entry.file, entry.crc32c)
        if len(index) != entry.samples:
            raise ShardError(
                f"{self.storage.where(entry.file)}: its index has {len(index)} samples, "
                f"{entry.samples} were expected; fetch the shard and its index again",
                Diagnosis.WRONG_COUNT,
            )
        self._indices[shard] = index
        if len(self._indices) > KEPT_INDICES:
            self._pointers.pop(self._indices.popitem(last=False)[0], None)
        return index

    def pointers(self, shard: int) -> tuple[ShardIndex, Pointers]:
        """The index of a shard, and where its arrays lie in memory as long as it is held."""
        index = self.index(shard)
        known = self._pointers.get(shard)
        if known is None or known[0] is not index:
            known = self._pointers[shard] = (index, _pointers(index))
        return known


def _pointers(index: ShardIndex) -> Pointers:
    rows, fields = index.sizes.shape
    arrays = {
        "offsets": (np.int64, (rows, fields)),
        "sizes": (np.int64, (rows, fields)),
        "checksums": (np.uint32, (rows, fields)),
        "key_ends": (np.int64, (rows,)),
    }
    addresses = []
    for name, (dtype, shape) in arrays.items():
        array = getattr(index, name)
        flags = array.flags
        if (array.dtype, array.shape) != (dtype, shape) or not (flags.c_contiguous & flags.aligned):
            return NO_POINTERS
        addresses.append(array.ctypes.data)
    if len(set(index.fields)) != fields:
        return NO_POINTERS
    offsets, sizes, checksums, key_ends = addresses
    keys = np.frombuffer(index.keys, np.uint8)
    return rows, fields, offsets, sizes, checksums, key_ends, keys.ctypes.data, len(keys)


def side_car(file: str) -> str:
    """`x.tar` -> `x.idx`."""
    return str(index_path(Path(file)))


def load_index(storage: Storage, file: str, crc32c: int | None = None) -> ShardIndex:
    """The index of a tar: from its side-car, or made from the tar and kept where that is possible.

    crc32c: of the tar, where known; an index is not made from one that has another.
    """
    try:
        if isinstance(storage, LocalStorage):
            return map_index(storage.folder / side_car(file), storage.size(file))
        data = storage.whole(side_car(file))
        return parse_index(data, storage.where(side_car(file)), storage.size(file))
    except MissingFileError:
        storage.size(file)  # says so where it is the tar that is missing
    except FileNotFoundError:
        pass
    except OutdatedIndexError as error:
        log.info("%s", error)
    return _make_index(storage, file, crc32c)


def load_headers(storage: Storage, files: Sequence[str]) -> list[IndexHeader]:
    """`load_header` of many tars, several at a time where each costs a round trip."""
    if isinstance(storage, LocalStorage):
        return [load_header(storage, file) for file in files]
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        return list(pool.map(partial(load_header, storage), files))


def load_header(storage: Storage, file: str) -> IndexHeader:
    """What the index of a tar says of itself, without its arrays where a side-car is there."""
    name = side_car(file)
    where = storage.where(name)
    try:
        size = storage.size(name)
        data = storage.read(name, 0, min(size, HEADER_BYTES))
        if (needed := header_bytes(data, where)) > len(data):
            data = storage.read(name, 0, min(size, needed))
        header = parse_index_header(data, where, size)
    except (MissingFileError, OutdatedIndexError):
        data = index_bytes(load_index(storage, file))
        return parse_index_header(data, where, len(data))
    if header.digest:
        return header
    data = index_bytes(load_index(storage, file))  # of a version that states no digest
    return parse_index_header(data, where, len(data))


def _make_index(storage: Storage, file: str, crc32c: int | None) -> ShardIndex:
    if isinstance(storage, LocalStorage):
        tar = storage.folder / file
        # the new index takes the bytes of the tar for right, so they have to be
        if crc32c is not None and file_checksum(tar) != crc32c:
            raise ShardError(
                f"{tar}: does not have the checksum that the manifest says; fetch this shard again",
                Diagnosis.WRONG_TAR_CHECKSUM,
            )
        index = scan_tar(tar)
        try:
            write_index(index, index_path(tar))
        except OSError as error:
            log.warning(
                "%s: not written (%s), so the tar is scanned at every start",
                *(index_path(tar), error),
            )
        return index
    log.warning(
        "%s has no side-car, so all of it is read now; `groundwork shards index` on a copy of the "
        "data set makes one to put beside it",
        storage.where(file),
    )
    raw = cast(BinaryIO, io.BufferedReader(_StoredFile(storage, file), 4 * 1024**2))
    return scan_file(raw, storage.size(file), storage.where(file))


class _StoredFile(io.RawIOBase):
    """A stored file as a seekable stream."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        self.position, self.bytes = 0, storage.size(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.bytes}[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        end = min(self.bytes, self.position + len(buffer))
        data = self.storage.read(self.name, self.position, max(self.position, end))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
