"""The stream: global order + data set + decoder -> batches, with an exact, tiny state.

Position i of the stream is a sample, its random numbers and, if it is bad, its replacement: all
pure functions of (seed, i). A rank's batch is a slice of positions, so the whole state of a stream
is the next global position, whatever the number of ranks and workers.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data._utils.pin_memory import pin_memory

from groundwork.data.dataset import Dataset
from groundwork.data.order import GlobalOrder, sample_generator
from groundwork.data.samples import Sample, SampleError

T = TypeVar("T")
BatchT = TypeVar("BatchT")
Decoder = Callable[[Sample, np.random.Generator], T]

#: Bad samples in a row, at one position, after which the data set itself is taken to be broken.
MAX_ATTEMPTS = 16


@dataclass(frozen=True)
class Fault:
    """A quarantined sample: where it stood in the stream and on disk, and what is wrong with it."""

    position: int
    shard: str
    key: str
    reason: str


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
class BatchPlan:
    """Which positions a rank reads.

    A step consumes `global_batch` consecutive positions; each of its micro-steps gives
    `micro_batch` to every rank in turn. Another number of ranks therefore trains on the same global
    batches.
    """

    global_batch: int
    micro_batch: int
    world_size: int
    rank: int

    def __post_init__(self) -> None:
        if min(self.global_batch, self.micro_batch, self.world_size) < 1:
            raise ValueError(
                f"global_batch {self.global_batch}, micro_batch {self.micro_batch} and world_size "
                f"{self.world_size} must be at least 1"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} ranks")
        if self.global_batch % (self.micro_batch * self.world_size):
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch "
                f"{self.micro_batch} x {self.world_size} ranks; change one of the three"
            )

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.micro_batch * self.world_size)

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[list[int]]:
        """The positions of this rank's micro-batches of steps first_step..last_step-1."""
        for step in range(first_step, last_step):
            for micro_step in range(self.accumulation):
                start = step * self.global_batch
                start += (micro_step * self.world_size + self.rank) * self.micro_batch
                yield list(range(start, start + self.micro_batch))


class Stream(TorchDataset[Any], Generic[T]):
    """Reads and decodes positions; a map-style dataset over an endless sequence."""

    def __init__(
        self, dataset: Dataset, decoder: Decoder[T], *, seed: int, shuffle: bool = True
    ) -> None:
        self.dataset = dataset
        self.decoder = decoder
        self.seed = seed
        self.order = GlobalOrder(len(dataset), seed, shuffle)

    def __getitems__(self, positions: list[int]) -> tuple[list[T], tuple[Fault, ...]]:
        indices = self.order.indices(np.asarray(positions, np.int64))
        faults: list[Fault] = []
        examples = [
            self._read(position, int(index), faults)
            for position, index in zip(positions, indices, strict=True)
        ]
        return examples, tuple(faults)

    def _read(self, position: int, index: int, faults: list[Fault]) -> T:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                sample = self.dataset.read(index)
                return self.decoder(sample, sample_generator(self.seed, position))
            except SampleError as error:
                shard, key = self.dataset.where(index)
                faults.append(Fault(position, shard, key, str(error)))
                index = self.order.replacement(position, attempt)
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
            worker_init_fn=_leave_signals_to_the_rank,
            pin_memory=pin_memory,
            # its own generator: starting an iterator draws a number; a resumed run, which starts
            # one more, must not thereby shift torch's global sequence
            generator=torch.Generator(),
        )
        return iter(loader)


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


def _leave_signals_to_the_rank(_worker: int) -> None:
    # Ctrl-C and the scheduler's SIGTERM reach the whole process group; the rank finishes its step
    # and needs its workers until then. Its own SIGTERM still ends them: a rank that leaves with an
    # error sends it at exit and then waits for them, without end if they ignored it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_rank_says, args=(os.getppid(),), daemon=True).start()


def _end_when_the_rank_says(rank_process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank_process:
        pass
    os._exit(0)
