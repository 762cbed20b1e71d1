"""Keyed permutations of {0..n-1}, computed per element: nothing is stored, nothing comes before.

A Feistel network with cycle walking (Black & Rogaway, "Ciphers with arbitrary finite domains",
2002): element 10^9 costs as much as element 0.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
#: Sizes up to which the permutation is made by sorting: so few bits leave a Feistel network biased.
SMALL = 1024
# as arrays: NumPy takes twice as long with scalars, which matters for batches of some hundred
_SHIFTS = tuple(np.array(shift, np.uint64) for shift in (30, 27, 31))
_FACTORS = tuple(np.array(x, np.uint64) for x in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def permute(values: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Apply a keyed permutation of {0..size-1}. values: (K,) int64; key: (ROUNDS,) uint64."""
    if size <= SMALL:
        hashes = _mix(_mix(np.arange(size, dtype=np.uint64) + key[0]) + key[1])
        return np.argsort(hashes, kind="stable")[values]
    half_bits = -(-int(size - 1).bit_length() // 2)
    result = _feistel(values.astype(np.uint64), half_bits, key)
    # cycle walking: the network permutes a power of four; step until the value is back in range
    outside = np.flatnonzero(result >= size)
    while len(outside):
        result[outside] = _feistel(result[outside], half_bits, key)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], half_bits: int, key: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    shift, mask = np.array(half_bits, np.uint64), np.array((1 << half_bits) - 1, np.uint64)
    left, right = values >> shift, values & mask
    for round_key in key.reshape(-1, 1):
        mixed = _mix(right + round_key)
        mixed &= mask
        mixed ^= left
        left, right = right, mixed
    return (left << shift) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        y = x >> shift
        y ^= x
        y *= factor
        x = y
    y = x >> _SHIFTS[2]
    y ^= x
    return y


def permutation_key(purpose: str) -> NDArray[np.uint64]:
    """A key for `permute`, (ROUNDS,) uint64. purpose: another text, another permutation."""
    digest = hashlib.blake2b(purpose.encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8")
