"""The global order: which sample is number i of the stream. Pure functions of (seed, sizes).

There is no shuffle buffer and no stored permutation: ranks and workers only decide who computes
which elements, and the state of a stream is one integer, the next position.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from groundwork.data.permutation import permutation_key, permute

#: Epochs of a `BlockOrder` whose shard orders are kept: a batch may lie in two.
KEPT_EPOCHS = 2


class Order(Protocol):
    """An endless sequence over the samples 0..num_samples-1, each exactly once per epoch."""

    @property
    def num_samples(self) -> int: ...

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample index at each global position. positions: (K,) int64, >= 0 -> (K,) int64."""


@dataclass(frozen=True)
class GlobalOrder:
    """Every sample of an epoch may come at any position.

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
            key = permutation_key(f"order {self.seed} {epoch}")
            result[chosen] = permute(within[chosen], self.num_samples, key)
        return result


class BlockOrder:
    """A shuffle that reads whole shards at a time, for storage where jumping about is slow.

    Each epoch shuffles the shards, puts consecutive ones together to blocks of about `block`
    samples, and shuffles the samples of each block. A block of the size of the data set shuffles
    like `GlobalOrder`; one of a single sample reads shard after shard, each shuffled;
    `order_quality` says what lies between. A block's content is computed, so the state stays one
    position.

    shard_sizes: samples of each shard, in the order in which samples are numbered.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, block: int) -> None:
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        if block < 1 or self.shard_sizes.sum() < 1 or (self.shard_sizes < 0).any():
            raise ValueError(
                f"BlockOrder: block is {block} and the shards hold {self.shard_sizes.sum()} "
                "samples; need at least one of both"
            )
        self.seed, self.block = seed, block
        self._epochs: dict[int, _Epoch] = {}

    @property
    def num_samples(self) -> int:
        return int(self.shard_sizes.sum())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}}

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample index at each global position. positions: (K,) int64, >= 0 -> (K,) int64."""
        epochs, within = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        result = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = self._epoch(int(epoch)).indices(within[chosen])
        return result

    def _epoch(self, number: int) -> "_Epoch":
        if number not in self._epochs:
            if len(self._epochs) == KEPT_EPOCHS:
                del self._epochs[min(self._epochs)]
            self._epochs[number] = _Epoch(self.shard_sizes, self.seed, number, self.block)
        return self._epochs[number]


class _Epoch:
    """One epoch of a `BlockOrder`."""

    def __init__(self, sizes: NDArray[np.int64], seed: int, number: int, block: int) -> None:
        self.purpose = f"block order {seed} {number}"
        key = permutation_key(self.purpose)
        self.shards = permute(np.arange(len(sizes), dtype=np.int64), len(sizes), key)
        self.firsts = (np.cumsum(sizes) - sizes)[self.shards]  # index of each shard's first sample
        ends = np.cumsum(sizes[self.shards])
        self.begins = ends - sizes[self.shards]
        # A block holds the shards that begin in the same `block` positions.
        first_of_block = np.diff(self.begins // block, prepend=-1) > 0
        self.block_begins = self.begins[first_of_block]
        self.block_ends = np.append(self.block_begins[1:], ends[-1])

    def indices(self, within: NDArray[np.int64]) -> NDArray[np.int64]:
        blocks = np.searchsorted(self.block_begins, within, side="right") - 1
        shuffled = np.empty_like(within)
        for block in np.unique(blocks):
            chosen = blocks == block
            begin, end = int(self.block_begins[block]), int(self.block_ends[block])
            key = permutation_key(f"{self.purpose} {block}")
            shuffled[chosen] = begin + permute(within[chosen] - begin, end - begin, key)
        shard = np.searchsorted(self.begins, shuffled, side="right") - 1
        return self.firsts[shard] + shuffled - self.begins[shard]


def replacement(seed: int, num_samples: int, position: int, attempt: int) -> int:
    """The sample index that stands in at `position` when its own sample is bad.

    attempt: 1, 2, ... for further bad draws. The same on every resume and topology.
    """
    digest = hashlib.blake2b(
        f"replacement {seed} {position} {attempt}".encode(), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little") % num_samples


def sample_generator(seed: int, position: int) -> np.random.Generator:
    """The random numbers of the sample at a global position: the same on every rank and worker."""
    digest = hashlib.blake2b(f"sample {seed} {position}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, "<u8")))


@dataclass(frozen=True)
class OrderQuality:
    """How far an order is from a uniform shuffle, and what it asks of the storage.

    same_shard: the chance that two samples of a batch come from one shard, over what it is in a
        uniform shuffle; 1 is uniform, and the larger, the more alike a batch is.
    open_shards: different shards that a stretch of `window` positions reads, on average.
    """

    same_shard: float
    open_shards: float


def order_quality(
    order: Order, shard_sizes: Sequence[int], *, batch: int = 1024, window: int = 10_000
) -> OrderQuality:
    """Measure an order on batches spread over its first epoch. Costs about a second at most."""
    sizes = np.asarray(shard_sizes, np.int64)
    total, ends = int(sizes.sum()), np.cumsum(sizes)
    batch, window = min(batch, total), min(window, total)
    same = open_shards = 0.0
    starts = np.linspace(0, total - window, 16).astype(np.int64)
    for start in starts:
        shards = np.searchsorted(ends, order.indices(np.arange(start, start + window)), "right")
        open_shards += len(np.unique(shards)) / len(starts)
        counts = np.unique(shards[:batch], return_counts=True)[1]
        same += float((counts * (counts - 1)).sum()) / len(starts)
    pairs = max(1, batch * (batch - 1))
    uniform = float((sizes * (sizes - 1)).sum()) / max(1, total * (total - 1))
    return OrderQuality(same / pairs / uniform if uniform else 1.0, open_shards)
