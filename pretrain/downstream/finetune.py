"""A fine-tuning run: recipe -> task on a backbone, weights, Accelerate engine -> loop."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from groundwork.pretrain.downstream.classification import build_classification
from groundwork.pretrain.downstream.task import Task

#: kind of task -> (its config, config of the backbone, training split) -> the task, with fresh
#: weights. `model.backbone` gets the weights of the recipe afterwards.
TASKS: Final[Mapping[str, Callable[[Any, Any, Any], Task]]] = {
    "classification": build_classification,
}
