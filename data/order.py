"""The global order: which sample is number i of the stream. Pure functions of (seed, size).

The order of an epoch is a keyed permutation of the sample indices, computed per element (a Feistel
network with cycle walking: Black & Rogaway, "Ciphers with arbitrary finite domains", 2002). There
is no shuffle buffer and no stored permutation: element 10^9 costs as much as element 0, ranks and
workers only decide who computes which elements, and the state of a stream is one integer.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
#: Sizes up to which the permutation is made by sorting: so few bits leave a Feistel network biased.
SMALL = 1024


@dataclass(frozen=True)
class GlobalOrder:
    """An endless sequence over `num_samples` samples, each exactly once per epoch.

    seed: another seed, another order. shuffle: False gives 0, 1, 2, ... in every epoch.
    """

    num_samples: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"GlobalOrder: num_samples is {self.num_samples}; need at least one")

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample index at each global position. positions: (K,) int64, >= 0 -> (K,) int64."""
        epochs, within = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        if not self.shuffle:
            return within
        result = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = _key(self.seed, int(epoch))
            result[chosen] = permute(within[chosen], self.num_samples, key)
        return result

    def replacement(self, position: int, attempt: int) -> int:
        """The sample index that stands in at `position` when its own sample is bad.

        attempt: 1, 2, ... for further bad draws. The same on every resume and topology.
        """
        digest = hashlib.blake2b(
            f"replacement {self.seed} {position} {attempt}".encode(), digest_size=8
        ).digest()
        return int.from_bytes(digest, "little") % self.num_samples


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
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in key:
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << shift) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


def sample_generator(seed: int, position: int) -> np.random.Generator:
    """The random numbers of the sample at a global position: the same on every rank and worker."""
    digest = hashlib.blake2b(f"sample {seed} {position}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, "<u8")))
