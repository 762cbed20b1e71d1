"""The file of a run's evaluations: what is the best, what a resumed run knows of them."""

import json
import math
from pathlib import Path

import pytest

from groundwork.pretrain.downstream.finetuning.evaluations import Evaluations
from groundwork.pretrain.downstream.finetuning.recipe import EvaluationConfig


def noted(out: Path, config: EvaluationConfig, *values: float) -> Evaluations:
    """After evaluations at the steps 10, 20, ... with these losses, and 1 less as `other`."""
    evaluations = Evaluations(out, config, is_main=True)
    for number, value in enumerate(values, 1):
        evaluations.add(10 * number, {"loss": value, "other": 1 - value})
    return evaluations


def test_the_best_is_that_of_the_first_metric_and_the_earliest_of_equals(tmp_path: Path) -> None:
    evaluations = noted(tmp_path, EvaluationConfig(), 0.5, 0.7, 0.7, 0.6)
    assert evaluations.best == {"step": 20, "metric": "loss", "value": 0.7}
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "last": {"step": 40, "loss": 0.6, "other": pytest.approx(0.4)},
        "best": {"step": 20, "metric": "loss", "value": 0.7},
    }


@pytest.mark.parametrize("values", [(math.nan, 0.5, 0.9), (0.5, math.nan, math.inf)])
def test_what_is_no_number_is_never_the_best_and_the_files_stay_json(
    tmp_path: Path, values: tuple[float, ...]
) -> None:
    config = EvaluationConfig(metric="loss", larger_is_better=False)
    evaluations = noted(tmp_path, config, *values)
    assert evaluations.best is not None and evaluations.best["value"] == 0.5

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for name in ("evaluations.jsonl", "results.json"):
        text = (tmp_path / name).read_text()
        for line in text.splitlines() if name.endswith("l") else [text]:
            json.loads(line, parse_constant=refuse)


def test_a_resumed_run_forgets_what_it_repeats_and_a_line_that_was_cut(tmp_path: Path) -> None:
    noted(tmp_path, EvaluationConfig(), 0.5, 0.7, 0.9)
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    again = Evaluations(tmp_path, EvaluationConfig(), is_main=True)
    again.resume(20)
    assert again.has(20) and not again.has(30)
    assert again.best == {"step": 20, "metric": "loss", "value": 0.7}
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 2


def test_a_metric_that_was_changed_is_the_one_of_all_evaluations(tmp_path: Path) -> None:
    noted(tmp_path, EvaluationConfig(metric="loss"), 0.5, 0.8, 0.7)
    again = Evaluations(tmp_path, EvaluationConfig(metric="other"), is_main=True)
    again.resume(30)
    assert again.best == {"step": 10, "metric": "other", "value": 0.5}
    assert again.add(40, {"loss": 0.1, "other": 0.9})
