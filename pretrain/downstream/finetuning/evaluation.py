"""A split gone through once by all ranks together, and scored by the task's evaluator.

Every rank makes the same number of forward passes, as models parted over ranks demand: one that has
run out of samples repeats a batch, and nobody looks at what the model says about it.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from groundwork.data.dataset import Dataset
from groundwork.data.samples import SampleError
from groundwork.data.stream import BadDataError, leave_signals_to_the_rank
from groundwork.pretrain.downstream.task import Task
from groundwork.pretrain.engine.checkpoint import random_states, restore_random_states
from groundwork.pretrain.engine.deepspeed_config import World
from groundwork.pretrain.engine.faults import GRACE

#: Samples that are tried where a rank has no good one of its own to repeat.
TRIES = 16


@dataclass(frozen=True)
class SplitReading:
    """How a split is read. batch: samples per rank and forward pass. workers: decoding processes
    per rank. budget: fraction of the samples that may be bad."""

    batch: int
    workers: int = 0
    prefetch: int = 4
    budget: float = 0.0


def evaluate_split(
    model: Callable[[Any], Any],
    task: Task,
    dataset: Dataset,
    reading: SplitReading,
    world: World,
    to_device: Callable[[Any], Any],
) -> dict[str, float]:
    """The task's metrics over a split, and `samples` and `bad_samples`. Collective.

    model: in evaluation mode; batch -> predictions. The same on all ranks. A bad sample is left out
    and counted. Raises BadDataError, on every rank, where there are more than the budget allows.
    """
    states = random_states()  # what is drawn here must not change what is trained after it
    try:
        return _evaluate(model, task, dataset, reading, world, to_device)
    finally:
        restore_random_states(states)


def _evaluate(
    model: Callable[[Any], Any],
    task: Task,
    dataset: Dataset,
    reading: SplitReading,
    world: World,
    to_device: Callable[[Any], Any],
) -> dict[str, float]:
    evaluator, problems, seen = task.evaluator(), [], 0
    filler: dict[str, Any] | None = None
    for batch, size, found in _batches(task, dataset, reading, world):
        problems += found
        seen += size
        if batch is None and filler is None:
            filler = any_batch(task, dataset)
        data = to_device(filler if batch is None else batch)
        filler = filler if batch is None else batch
        with torch.no_grad():
            predictions = model(data)
        if batch is not None:
            evaluator.add(predictions, data)
    records, lists, counts = _gather(evaluator.records(), problems, seen, world)
    _check_budget(lists, len(dataset), reading.budget)
    result: list[Any] = [None]
    if world.is_main:
        assert records is not None
        if sum(counts) == 0:
            result = [{}]
        else:
            result = [evaluator.result([record for part in records for record in part])]
    if world.size > 1:
        dist.broadcast_object_list(result, src=0)
    bad = sum(len(part) for part in lists)
    return {**result[0], "samples": sum(counts), "bad_samples": bad}


def _batches(
    task: Task, dataset: Dataset, reading: SplitReading, world: World
) -> Iterator[tuple[dict[str, Any] | None, int, list[str]]]:
    """(batch, its samples, what is wrong with the others) of this rank; None for an empty one."""
    size, stride = reading.batch, reading.batch * world.size
    steps = -(-len(dataset) // stride)
    begins = [step * stride + world.rank * size for step in range(steps)]
    loader: DataLoader[Any] = DataLoader(
        _Split(dataset, task),
        batch_sampler=[list(range(b, min(b + size, len(dataset)))) or [-1] for b in begins],
        collate_fn=_identity,
        num_workers=reading.workers,
        prefetch_factor=reading.prefetch if reading.workers else None,
        worker_init_fn=partial(leave_signals_to_the_rank, os.getpid()),
        generator=torch.Generator(),  # starting an iterator draws a number
    )
    yield from loader


class _Split(TorchDataset[Any]):
    """Lists of sample numbers -> (collated batch or None, number of samples, problems)."""

    def __init__(self, dataset: Dataset, task: Task) -> None:
        self.dataset, self.task = dataset, task

    def __getitems__(self, numbers: list[int]) -> tuple[dict[str, Any] | None, int, list[str]]:
        numbers = [number for number in numbers if number >= 0]
        examples, problems = [], []
        samples = self.dataset.read_many(numbers) if numbers else []
        for number, sample in zip(numbers, samples, strict=True):
            try:
                if isinstance(sample, SampleError):
                    raise sample
                examples.append(self.task.example(sample, None))
            except SampleError as error:
                shard, key = self.dataset.where(number)
                problems.append(f"{shard}: {key}: {error}")
        batch = self.task.collate(examples) if examples else None
        return batch, len(examples), problems


def _identity(fetched: Any) -> Any:
    return fetched


def any_batch(task: Task, dataset: Dataset) -> dict[str, Any]:
    """A batch of one good sample, for a rank that has none. Raises BadDataError."""
    errors = []
    for number in range(min(TRIES, len(dataset))):
        try:
            return task.collate([task.example(dataset.read(number), None)])
        except SampleError as error:
            errors.append(f"{': '.join(dataset.where(number))}: {error}")
    listed = "\n  ".join(errors[:5])
    raise BadDataError(
        f"none of the first {len(errors)} samples of the evaluation split can be used:\n  {listed}"
    )


def _gather(
    records: list[Any], problems: list[str], seen: int, world: World
) -> tuple[list[list[Any]] | None, list[list[str]], list[int]]:
    """Records of all ranks (on rank 0), and problems and counts of all (everywhere)."""
    if world.size == 1:
        return [records], [problems], [seen]
    parts: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(records, parts, dst=0)
    known: list[Any] = [None] * world.size
    dist.all_gather_object(known, (problems, seen))
    return parts, [own for own, _ in known], [count for _, count in known]


def _check_budget(lists: list[list[str]], total: int, budget: float) -> None:
    bad = sum(map(len, lists))
    if bad > GRACE and bad > budget * total:
        listed = "\n  ".join([problem for part in lists for problem in part][:5])
        raise BadDataError(
            f"{bad} of {total:,} samples of the evaluation split could not be used, more than "
            f"the budget of bad samples allows ({budget:g} of them). The first ones:\n  {listed}"
        )
