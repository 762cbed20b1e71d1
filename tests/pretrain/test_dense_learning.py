"""UperNet and DINO learn from scratch on synthetic scenes, by the command and the recipes as they
come along, only shorter."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from groundwork.pretrain.downstream.finetuning.recipe import load_finetune_recipe
from groundwork.pretrain.downstream.finetuning.run import build_task, open_finetune_data

pytestmark = pytest.mark.slow

STEPS = 150


@pytest.fixture(scope="module")
def scenes(
    build_scenes: Callable[[Path, int, int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return build_scenes(tmp_path_factory.mktemp("dense") / "scenes", 1200, 60)


def trained(recipe: str, scenes: Path, out: Path, *more: str) -> dict[str, Any]:
    settings = [f"data.shards={scenes}", f"train.steps={STEPS}", *more]
    overrides = [word for setting in settings for word in ("--set", setting)]
    command = "from groundwork.launch.cli import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", command, "finetune", recipe, "--out", str(out), *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads((out / "results.json").read_text("utf-8"))["last"]
    return result


def untrained(recipe_name: str, scenes: Path, metric: str) -> float:
    recipe = load_finetune_recipe(recipe_name, [f"data.shards={scenes}"])
    data = open_finetune_data(recipe)
    torch.manual_seed(0)
    task = build_task(recipe, data.train)
    evaluator = task.evaluator()
    task.model.eval()
    assert data.evaluation is not None
    for index in islice(range(len(data.evaluation)), 50):
        batch = task.collate([task.example(data.evaluation.read(index), None)])
        with torch.no_grad():
            evaluator.add(task.model(batch), batch)
    return evaluator.result(evaluator.records())[metric]


def test_upernet_learns_the_colours_of_scenes(scenes: Path, tmp_path: Path) -> None:
    recipe = "internimage_scenes_upernet"
    assert untrained(recipe, scenes, "mean_iou") < 0.1
    result = trained(recipe, scenes, tmp_path / "run")
    # 0.10 for "background" everywhere; 0.44 and 0.91 were reached
    assert result["mean_iou"] > 0.3
    assert result["pixel_accuracy"] > 0.85


def test_dino_learns_to_find_the_objects_of_scenes(scenes: Path, tmp_path: Path) -> None:
    recipe = "internimage_scenes_dino"
    assert untrained(recipe, scenes, "box_ap50") < 0.01
    result = trained(recipe, scenes, tmp_path / "run", "schedule.milestones=[120]")
    # 32 classes; 0.17 and 0.45 were reached
    assert result["box_ap50"] > 0.08
    assert result["box_ar100"] > 0.3
