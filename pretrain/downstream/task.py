"""What a downstream task is: a backbone with a head, how samples become batches, and a metric.

`finetune.py` trains any of them under Accelerate. A task is made from its config, a frozen
dataclass whose `kind` picks it from `TASKS` in that file.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import nn

from groundwork.data.samples import Sample


class Evaluator(Protocol):
    """Collects what a model says about a split, on every rank, and scores it once."""

    def add(self, predictions: Any, batch: dict[str, Any]) -> None:
        """Take in the model's output for a batch, and keep small records on the host."""

    def records(self) -> list[Any]:
        """What this rank has collected: plain values and arrays, to be gathered over ranks."""

    def names(self) -> list[str]:
        """Of the metrics that `result` can have, the first one first."""

    def result(self, records: Sequence[Any]) -> dict[str, float]:
        """The metrics, from the records of all ranks."""


class Task(Protocol):
    """`model` is one module with a submodule `backbone`, so that all parameters are reached alike.

    model.forward(batch): in training mode {"loss": (), other scalars}; in evaluation mode the
    predictions of the batch.
    """

    model: nn.Module

    def example(self, sample: Sample, rng: np.random.Generator | None) -> Any:
        """A sample, decoded and augmented; without a generator as it is evaluated.

        Raises SampleError.
        """

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        """Examples -> a batch: tensors, or lists of tensors and of plain values."""

    def evaluator(self) -> Evaluator:
        """A fresh evaluator of the task's metrics."""

    def no_weight_decay(self) -> frozenset[str]:
        """Names of parameters of `model` that are not decayed, besides those of one dimension."""
