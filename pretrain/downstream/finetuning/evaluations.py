"""The evaluations of a run: one line each in its folder, and the best of them."""

import json
import math
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

from groundwork.data.atomic import write_atomically
from groundwork.pretrain.downstream.finetuning.recipe import EvaluationConfig

EVALUATIONS: Final = "evaluations.jsonl"
RESULTS: Final = "results.json"


class Evaluations:
    """evaluations.jsonl, a line for each, and results.json with the last and the best.

    The best is found by the metric that the recipe names now, whatever it was when the run began.
    A value that is no number (NaN) is null in the files, and never the best.
    """

    def __init__(self, out: Path, config: EvaluationConfig, is_main: bool) -> None:
        self.out, self.config, self.is_main = out, config, is_main
        self._lines: list[dict[str, Any]] = []

    def resume(self, step: int) -> None:
        """Know those of the first `step` steps. Collective: rank 0 reads.

        Later ones, which the run will repeat, and a line cut off by a kill leave the file.
        """
        known: list[Any] = [[]]
        path = self.out / EVALUATIONS
        if self.is_main and path.is_file():
            known = [_lines_up_to(step, path.read_text("utf-8"))]
            write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in known[0]).encode())
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(known, src=0)
        self._lines = known[0]

    def has(self, step: int) -> bool:
        """Whether the weights after that many steps have been evaluated."""
        return any(line["step"] == step for line in self._lines)

    @property
    def best(self) -> dict[str, Any] | None:
        """{"step", "metric", "value"}; the earliest of equals. None before the first number."""
        best: dict[str, Any] | None = None
        sign = 1 if self.config.larger_is_better else -1
        for line in self._lines:
            # the task's first metric stands right behind the step
            metric = self.config.metric or next((name for name in line if name != "step"), "")
            value = line.get(metric)
            if value is not None and (best is None or sign * value > sign * best["value"]):
                best = {"step": line["step"], "metric": metric, "value": value}
        return best

    def add(self, step: int, result: dict[str, float]) -> bool:
        """Note a result, the same on all ranks. Returns whether it is the best so far."""
        numbers = {name: v if math.isfinite(v) else None for name, v in result.items()}
        line = {"step": step, **numbers}
        self._lines.append(line)
        best = self.best
        if self.is_main:
            with (self.out / EVALUATIONS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            record = json.dumps({"last": line, "best": best}, indent=1)
            write_atomically(self.out / RESULTS, record.encode())
        return best is not None and best["step"] == step


def _lines_up_to(step: int, text: str) -> list[dict[str, Any]]:
    lines = []
    for line in text.splitlines():
        try:
            known = json.loads(line)
            if known["step"] <= step:
                lines.append(known)
        except (ValueError, KeyError, TypeError):
            continue
    return lines
