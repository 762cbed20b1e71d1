"""The members of many samples, read and verified in two calls that hold no lock of Python's.

What `groundwork.data.member_batch.MemberReader` asks for; see `csrc/read_members.cpp`.
"""

import ctypes
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from groundwork.kernels.host_compiler import HostCompileError, load_host_library

log = logging.getLogger(__name__)

SOURCE = "read_members.cpp"
#: Bytes between two samples that are read along with them: they cost less than another call.
GAP = 4096
#: Status of a sample, beside its detail.
GOOD, NOT_READ, BAD_INDEX, SHORT, FAILED, DAMAGED = range(6)
#: int64 numbers of a shard, and of a run.
SHARD_NUMBERS, RUN_NUMBERS = 8, 6


@dataclass(frozen=True)
class MemberPlan:
    """Where the members of N samples will lie in a buffer, and what is to be read for it.

    buffer: (bytes,) uint8, keys filled in, members when `read` has been called.
    places, sizes: (N, F + 1) int64, of each field, and of the key in the last column; size -1 where
        the sample lacks the field, or its index is unusable.
    status: (N, 2) int32, what became of each sample and a detail: GOOD; NOT_READ; BAD_INDEX, it has
        no place or more than 2 GiB; SHORT, the file ends before it; FAILED, errno; DAMAGED, the
        first field whose checksum fails.
    runs: (R, 6) int64, byte ranges that are read at once, sorted; the first number is the shard.
    """

    buffer: NDArray[np.uint8]
    places: NDArray[np.int64]
    sizes: NDArray[np.int64]
    status: NDArray[np.int32]
    runs: NDArray[np.int64]
    order: NDArray[np.int64]
    checksums: NDArray[np.uint32]
    threads: int

    def read(self, first: int, last: int, descriptors: NDArray[np.int32]) -> None:
        """Read and verify runs first..last-1. descriptors: (K,), -1 for what is not open."""
        runs = self.runs[first:last]
        descriptors = np.ascontiguousarray(descriptors, np.int32)
        _functions().read_members(
            *(_address(runs), len(runs), _address(self.order), len(self.order), len(self.status)),
            *(_address(descriptors), len(descriptors), self.checksums.shape[1]),
            *(_address(self.places), _address(self.sizes), _address(self.checksums)),
            *(_address(self.buffer), len(self.buffer), self.threads, _address(self.status)),
        )


#: (shards, columns, numbers, rows) -> the plan of a batch.
MemberReader = Callable[
    [NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]], MemberPlan
]


def plan_members(
    shards: NDArray[np.int64],
    columns: NDArray[np.int32],
    numbers: NDArray[np.int64],
    rows: NDArray[np.int64],
    *,
    threads: int = 1,
    gap: int = GAP,
) -> MemberPlan:
    """Plan to read N samples from K shards.

    shards: (K, 8) int64: rows and fields of the index; the addresses of its arrays `offsets`,
        `sizes`, `checksums`, `key_ends` and `keys`, laid out as in `ShardIndex`; the bytes of the
        keys. The caller keeps these arrays alive until this returns.
    columns: (K, F) int32, the column of each field in the index of a shard, -1 for none.
    numbers, rows: (N,) int64, shard and row of each sample.
    threads: that read at once; more than one is worth it where the storage is slow.
    Raises MemoryError where the samples do not fit into memory.
    """
    shards, columns = (
        np.ascontiguousarray(shards, np.int64),
        np.ascontiguousarray(columns, np.int32),
    )
    numbers, rows = np.ascontiguousarray(numbers, np.int64), np.ascontiguousarray(rows, np.int64)
    n, fields = len(numbers), columns.shape[1]
    if shards.shape[1:] != (SHARD_NUMBERS,) or len(columns) != len(shards) or rows.shape != (n,):
        raise ValueError(
            f"plan_members: shards {shards.shape}, columns {columns.shape}, numbers "
            f"{numbers.shape}, rows {rows.shape}; expected (K, 8), (K, F), (N,), (N,)"
        )
    if gap < 0:
        raise ValueError(f"plan_members: gap is {gap}; need 0 or more bytes")
    places, sizes = np.empty((n, fields + 1), np.int64), np.empty((n, fields + 1), np.int64)
    checksums, status = np.empty((n, fields), np.uint32), np.empty((n, 2), np.int32)
    order, runs = np.empty(n, np.int64), np.empty((n, RUN_NUMBERS), np.int64)
    num_runs = ctypes.c_int64()
    functions = _functions()
    samples = (_address(shards), len(shards), _address(columns), fields, _address(numbers))
    needed = functions.plan_members(
        *(*samples, _address(rows), n, gap, _address(places), _address(sizes)),
        *(_address(checksums), _address(status), _address(order), _address(runs)),
        ctypes.byref(num_runs),
    )
    if needed < 0:
        raise MemoryError(f"{n} samples of {len(shards)} shards are more than memory holds")
    buffer = np.empty(needed, np.uint8)
    places_there = functions.copy_keys(
        *(_address(shards), len(shards), _address(numbers), n, fields),
        *(_address(places), _address(sizes), _address(buffer), needed),
    )
    if places_there:
        raise ValueError("an index was changed while it was read")
    runs = runs[: num_runs.value]
    return MemberPlan(buffer, places, sizes, status, runs, order, checksums, threads)


def find_member_reader(threads: int = 1) -> MemberReader | None:
    """`plan_members` if it runs here, compiled now; else None, and why in the log.

    threads: that read at once in each process; 1 is best where files are in memory or on a fast
        local disk, and batches are read by several processes.
    """
    if sys.byteorder != "little" or sys.maxsize < 2**32:
        log.info("samples are read by Python: indices cannot be used in place on this processor")
        return None
    try:
        _functions()
    except HostCompileError as error:
        log.info("samples are read by Python, which gives the same but more slowly: %s", error)
        return None
    return plan_members if threads == 1 else partial(plan_members, threads=threads)


def crc32c(data: bytes, *, by_tables: bool = False) -> int:
    """The checksum as the reader computes it. by_tables: without the processor's instructions."""
    return int(_functions().checksum_of(data, len(data), by_tables))


def _address(array: NDArray[np.generic]) -> int:
    return int(array.__array_interface__["data"][0])


@cache
def _functions() -> ctypes.CDLL:
    return declare(load_host_library(SOURCE))


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the types of the functions."""
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.plan_members.argtypes = (
        *(pointer, int64, pointer, int64, pointer, pointer, int64, int64),
        *(pointer,) * 7,
    )
    library.plan_members.restype = int64
    library.copy_keys.argtypes = (
        *(pointer, int64, pointer, int64, int64),
        *(pointer, pointer, pointer, int64),
    )
    library.copy_keys.restype = int32
    library.read_members.argtypes = (
        *(pointer, int64, pointer, int64, int64),
        *(pointer, int64, int64),
        *(pointer, pointer, pointer),
        *(pointer, int64, int32, pointer),
    )
    library.read_members.restype = None
    library.checksum_of.argtypes = (ctypes.c_char_p, int64, int32)
    library.checksum_of.restype = ctypes.c_uint32
    return library
