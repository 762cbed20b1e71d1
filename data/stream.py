"""The stream: mixture + orders + data sets + decoders -> batches, with an exact, tiny state.

Position i of the stream is a sample of one source, its random numbers and, if it is bad, its
replacement: all pure functions of (seed, i). A rank's batch is a slice of positions, so the whole
state of a stream is the next global position, whatever the number of ranks and workers; how far
each source has come follows from it.
"""

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data._utils.pin_memory import pin_memory

from groundwork.data.batch_plan import BatchPlan
from groundwork.data.dataset import Dataset
from groundwork.data.mixture import Mixture
from groundwork.data.order import (
    BlockOrder,
    GlobalOrder,
    Order,
    replacement,
    sample_generator,
)
from groundwork.data.samples import Sample, SampleError

T = TypeVar("T")
BatchT = TypeVar("BatchT")
Decoder = Callable[[Sample, np.random.Generator], T]

#: Bad samples in a row, at one position, after which the data set itself is taken to be broken.
MAX_ATTEMPTS = 16


@dataclass(frozen=True)
class Fault:
    """A quarantined sample: where it stood in the stream and on disk, and what is wrong with it.

    diagnosis: the name of the fault (`diagnosis.py`).
    """

    position: int
    shard: str
    key: str
    reason: str
    diagnosis: str = ""


@dataclass(frozen=True)
class StreamBatch(Generic[BatchT]):
    """A collated micro-batch, and the samples that had to be replaced while making it."""

    data: BatchT
    faults: tuple[Fault, ...]

    def pin_memory(self) -> "StreamBatch[BatchT]":
        """What DataLoader calls; without it a batch of its own class stays in pageable memory."""
        return replace(self, data=pin_memory(self.data))


class BadDataError(RuntimeError):
    """More samples are bad than the run tolerates; the message lists them."""


class UnreadableDataError(RuntimeError):
    """Nothing readable was found at a position; the data set is not what the recipe expects."""


@dataclass(frozen=True)
class Source(Generic[T]):
    """One data set of a stream, and what makes examples of its samples.

    name: tells it apart from the other sources of a mixture.
    block: samples that are shuffled together, in whole shards; None for the whole data set.
    """

    dataset: Dataset
    decoder: Decoder[T]
    name: str = ""
    block: int | None = None

    def order(self, seed: int, shuffle: bool) -> Order:
        if self.name:
            digest = hashlib.blake2b(f"source {seed} {self.name}".encode(), digest_size=8).digest()
            seed = int.from_bytes(digest, "little")
        if shuffle and self.block is not None:
            return BlockOrder(self.dataset.shard_sizes, seed, self.block)
        return GlobalOrder(len(self.dataset), seed, shuffle)


class Stream(TorchDataset[Any], Generic[T]):
    """Reads and decodes positions; a map-style dataset over an endless sequence.

    mixture: which source each position takes; needed for more than one.
    """

    def __init__(
        self,
        sources: Sequence[Source[T]],
        *,
        seed: int,
        shuffle: bool = True,
        mixture: Mixture | None = None,
    ) -> None:
        self.sources = list(sources)
        self.mixture = Mixture([1]) if mixture is None else mixture
        if self.mixture.num_sources != len(sources):
            raise ValueError(
                f"Stream: {len(sources)} sources, but the mixture is of {self.mixture.num_sources}"
            )
        names = [source.name for source in sources]
        if len(set(names)) != len(names):
            raise ValueError(f"Stream: the names of the sources are {names}; each must be its own")
        self.seed = seed
        self.orders = [source.order(seed, shuffle) for source in sources]

    def locate(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """(source number, sample index in it) of each position, replacements not counted."""
        sources, ordinals = self.mixture.locate(np.asarray(positions, np.int64))
        indices = np.empty_like(ordinals)
        for number in np.unique(sources):
            chosen = sources == number
            indices[chosen] = self.orders[number].indices(ordinals[chosen])
        return list(zip(sources.tolist(), indices.tolist(), strict=True))

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source has been gone through before a position."""
        counts = self.mixture.counts(position).tolist()
        return {
            source.name: count / len(source.dataset)
            for source, count in zip(self.sources, counts, strict=True)
        }

    def __getitems__(self, positions: list[int]) -> tuple[list[T], tuple[Fault, ...]]:
        places = self.locate(positions)
        samples: list[Sample | SampleError | None] = [None] * len(places)
        for number in {source for source, _ in places}:
            mine = [i for i, (source, _) in enumerate(places) if source == number]
            read = self.sources[number].dataset.read_many([places[i][1] for i in mine])
            for i, sample in zip(mine, read, strict=True):
                samples[i] = sample
        faults: list[Fault] = []
        examples = [
            self._example(position, source, index, sample, faults)
            for position, (source, index), sample in zip(positions, places, samples, strict=True)
        ]
        return examples, tuple(faults)

    def _example(
        self,
        position: int,
        number: int,
        index: int,
        sample: Sample | SampleError | None,
        faults: list[Fault],
    ) -> T:
        """The example of a position: of its sample, or of the first good one that stands in."""
        source = self.sources[number]
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                if sample is None:
                    sample = source.dataset.read(index)
                if isinstance(sample, SampleError):
                    raise sample
                return source.decoder(sample, sample_generator(self.seed, position))
            except SampleError as error:
                shard, key = source.dataset.where(index)
                faults.append(Fault(position, shard, key, str(error), error.diagnosis.value))
                index = replacement(self.seed, len(source.dataset), position, attempt)
                sample = None
        listed = "\n  ".join(f"{fault.shard}: {fault.key}: {fault.reason}" for fault in faults[-5:])
        raise UnreadableDataError(
            f"{MAX_ATTEMPTS} samples in a row could not be used at position {position}; the data "
            f"set does not hold what the recipe expects. The last ones:\n  {listed}"
        )

    def batches(
        self,
        plan: BatchPlan,
        collate: Callable[[list[T]], BatchT],
        *,
        first_step: int,
        last_step: int,
        workers: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> Iterator[StreamBatch[BatchT]]:
        """This rank's micro-batches in order, decoded by `workers` processes (0: in this one)."""
        loader: DataLoader[StreamBatch[BatchT]] = DataLoader(
            self,
            batch_sampler=_MicroBatches(plan, first_step, last_step),
            collate_fn=_Collate(collate),  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=partial(leave_signals_to_the_rank, os.getpid()),
            pin_memory=pin_memory,
            # its own generator: starting an iterator draws a number; a resumed run, which starts
            # one more, must not thereby shift torch's global sequence
            generator=torch.Generator(),
        )
        # Blocked while the workers are forked, so that threads which libraries start in them before
        # our own code runs have it blocked too; a SIGTERM to this process waits that long.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class _MicroBatches:
    """The batch sampler: a plan's micro-batches over a range of steps."""

    plan: BatchPlan
    first_step: int
    last_step: int

    def __iter__(self) -> Iterator[list[int]]:
        return self.plan.micro_batches(self.first_step, self.last_step)


@dataclass(frozen=True)
class _Collate(Generic[T, BatchT]):
    collate: Callable[[list[T]], BatchT]

    def __call__(self, fetched: tuple[list[T], tuple[Fault, ...]]) -> StreamBatch[BatchT]:
        examples, faults = fetched
        return StreamBatch(self.collate(examples), faults)


def leave_signals_to_the_rank(rank_process: int, _worker: int) -> None:
    """For `worker_init_fn` of a DataLoader, with the rank's process id bound."""
    # Ctrl-C and the scheduler's SIGTERM reach the whole process group; the rank finishes its step
    # and needs its workers until then. Its own SIGTERM still ends them: a rank that leaves with an
    # error sends it at exit and then waits for them, without end if they ignored it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_rank, args=(rank_process,), daemon=True).start()


def _end_with_the_rank(rank_process: int) -> None:
    """End when the rank says so, or is no more.

    DataLoader's own watch takes for the rank whoever is the parent when the watch begins, so a
    worker whose rank was killed before that would stay for ever.
    """
    while os.getppid() == rank_process:
        told = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if told is not None and told.si_pid == rank_process:
            break
    os._exit(0)
