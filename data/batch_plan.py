"""Which positions of the stream a rank reads, step by step."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """Shares out each step's `global_batch` consecutive positions.

    A step has `accumulation` micro-steps; each gives every rank in turn a micro-batch, of
    `micro_batch` positions or, where the global batch does not divide, of one fewer. Another number
    of ranks therefore trains on the same global batches, whatever divides what.
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
        if self.global_batch < self.parts:
            raise ValueError(
                f"global_batch {self.global_batch} leaves some of {self.world_size} ranks without "
                "a sample; use fewer ranks or a larger global_batch"
            )

    @property
    def accumulation(self) -> int:
        """Micro-steps per step, the same on all ranks."""
        return -(-self.global_batch // (self.micro_batch * self.world_size))

    @property
    def parts(self) -> int:
        """Micro-batches of all ranks per step."""
        return self.accumulation * self.world_size

    @property
    def is_even(self) -> bool:
        """Whether all micro-batches have the same size, so that means over ranks are exact."""
        return self.global_batch == self.parts * self.micro_batch

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[list[int]]:
        """The positions of this rank's micro-batches of steps first_step..last_step-1."""
        for step in range(first_step, last_step):
            start = step * self.global_batch
            for micro_step in range(self.accumulation):
                part = micro_step * self.world_size + self.rank
                begin = part * self.global_batch // self.parts
                end = (part + 1) * self.global_batch // self.parts
                yield list(range(start + begin, start + end))
