"""Subsets of DataComp: a `.npy` file with the uids that are kept, as its filtering track exchanges.

A uid of 32 hexadecimal digits is a pair of 64-bit integers; the file is an array of such pairs with
dtype "u8,u8", sorted. It is mapped, not read, so that a subset of a billion costs no memory.
"""

import re
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.report import BadItemError

#: Uids that are compared at a time.
CHUNK: Final = 2**22
UID: Final = re.compile(r"[0-9a-f]{32}")


def open_uids(path: Path) -> NDArray[Any]:
    """Map a file of uids. Raises SourceError for anything else."""
    try:
        uids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(f"{path}: not a readable .npy file of uids ({error})") from error
    if not isinstance(uids, np.ndarray) or uids.dtype != np.dtype("u8,u8") or uids.ndim != 1:
        raise SourceError(f"{path}: expected an array of dtype 'u8,u8', as DataComp writes subsets")
    return uids


def require_sorted(path: Path) -> None:
    """Read a subset once from end to end. Raises SourceError where it is not in order."""
    high = open_uids(path)["f0"]
    for begin in range(0, len(high), CHUNK):
        part = high[begin : begin + CHUNK + 1]
        if not bool((part[:-1] <= part[1:]).all()):
            raise SourceError(f"{path}: the uids are not sorted; sort them with np.sort")


def has_uid(uids: NDArray[Any], uid: str) -> bool:
    """Whether a uid of 32 hexadecimal digits is in the subset. Raises BadItemError for others."""
    if not UID.fullmatch(uid):
        raise BadItemError(f"uid {uid[:40]!r} has not 32 hexadecimal digits")
    high, low = np.uint64(int(uid[:16], 16)), np.uint64(int(uid[16:], 16))
    begin, end = (int(np.searchsorted(uids["f0"], high, side=side)) for side in ("left", "right"))
    return bool((uids["f1"][begin:end] == low).any())
