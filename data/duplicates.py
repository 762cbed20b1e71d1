"""Equal keys and equal images among any number of samples, in bounded memory.

While a shard is written, 8 bytes of a hash are noted for each key and each image; they are sorted
and put into a file beside the shard, a *run*. When all shards are there, the runs are merged: one
range of hashes at a time, so that no more than HASHES_IN_MEMORY of them are held. 10^9 samples take
24 GB of runs, some 250 passes and 100 MB of memory.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import google_crc32c
import numpy as np
from numpy.typing import NDArray

HASHES_IN_MEMORY: Final = 2**22
KIND = Literal["key", "image"]
#: Hash of a sample without an image; it is left out of the comparison.
NO_IMAGE: Final = 0


def hash64(content: bytes) -> int:
    """The first 8 bytes of the sha256; never NO_IMAGE."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") or 1


def write_run(path: Path, key_hashes: NDArray[np.uint64], image_hashes: NDArray[np.uint64]) -> int:
    """Write the run of a shard: hashes (S,) of its samples, in their order. Returns its crc32c.

    Layout: S as uint64; then, for keys and for images, the sorted hashes (uint64) and the sample
    that each belongs to (uint32).
    """
    parts = [np.array([len(key_hashes)], "<u8").tobytes()]
    for hashes in (key_hashes, image_hashes):
        order = np.argsort(hashes, kind="stable")
        parts += [hashes[order].astype("<u8").tobytes(), order.astype("<u4").tobytes()]
    data = b"".join(parts)
    path.write_bytes(data)
    return int(google_crc32c.value(data))


def equal_hashes(
    runs: Sequence[Path], kind: KIND, *, in_memory: int = HASHES_IN_MEMORY
) -> Iterator[list[tuple[int, int]]]:
    """Groups of samples with the same hash, each as (run, sample in its shard) in ascending order.

    in_memory: how many hashes are held at a time, on average.
    """
    lengths = [int(np.fromfile(run, "<u8", 1)[0]) for run in runs]
    passes = max(1, -(-sum(lengths) // in_memory))
    for number in range(passes):
        first = max(NO_IMAGE + 1, number * 2**64 // passes)
        last = (number + 1) * 2**64 // passes - 1
        pieces = [
            (run, *_range(path, length, kind, first, last))
            for run, (path, length) in enumerate(zip(runs, lengths, strict=True))
            if length
        ]
        if not pieces:
            continue
        hashes = np.concatenate([piece[1] for piece in pieces])
        rows = np.concatenate([piece[2] for piece in pieces])
        owners = np.concatenate([np.full(len(p[1]), p[0], np.int64) for p in pieces])
        order = np.argsort(hashes, kind="stable")  # stable: owners and rows stay ascending
        hashes = hashes[order]
        same = np.flatnonzero(hashes[1:] == hashes[:-1])
        starts = same[np.flatnonzero(np.diff(same, prepend=-2) > 1)] if len(same) else same
        for start in starts:
            end = int(np.searchsorted(hashes, hashes[start], side="right"))
            members = order[start:end]
            yield [(int(owners[m]), int(rows[m])) for m in members]


def _range(
    path: Path, length: int, kind: KIND, first: int, last: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """The hashes of a run in first..last, and their samples."""
    begin = 8 + (12 * length if kind == "image" else 0)
    hashes = np.memmap(path, "<u8", "r", begin, (length,))
    low = int(np.searchsorted(hashes, np.uint64(first), side="left"))
    high = int(np.searchsorted(hashes, np.uint64(last), side="right"))
    rows = np.fromfile(path, "<u4", high - low, offset=begin + 8 * length + 4 * low)
    return np.array(hashes[low:high]), rows
