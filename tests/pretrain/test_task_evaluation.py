"""`groundwork evaluate task`: a fine-tuned run scores what it scored at its end."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from groundwork.data.sources.scenes import ScenesConfig, scenes_concepts
from groundwork.launch.cli import main
from groundwork.pretrain.downstream.evaluation import task_evaluation
from groundwork.pretrain.downstream.evaluation.task_evaluation import load_task
from groundwork.pretrain.downstream.finetuning.recipe import load_finetune_recipe
from groundwork.pretrain.downstream.finetuning.run import build_task
from groundwork.pretrain.engine.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "shards"
    size = ["--image-size", "64", "--train", "24", "--val", "9", "--compositional", "1"]
    assert main(["shards", "build", "scenes", "--out", str(out), *size, "--workers", "1"]) == 0
    return out


@pytest.mark.multirank
def test_a_run_scores_what_it_scored_at_its_end(
    scenes: Path, tmp_path: Path, start_job: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    overrides = [
        *(f"data.shards={scenes}", "train.steps=3", "train.global_batch=4", "ema={decay: 0.5}"),
        *("schedule.warmup_steps=1", "checkpoint.every_steps=9", "monitor.tensorboard=false"),
    ]
    given = [part for override in overrides for part in ("--set", override)]
    job = start_job(
        "finetune", "internimage_scenes_upernet", "--out", str(out), *given, launcher="groundwork"
    )
    assert job.wait() == 0, job.text()
    ended = json.loads((out / "results.json").read_text())["last"]
    result = tmp_path / "task.json"
    command = ["evaluate", "task", "--checkpoint", str(out), "--out", str(result), "--workers", "0"]
    assert main([*command, "--batch", "3"]) == 0, capfd.readouterr().err
    found = json.loads(result.read_text())
    assert found["samples"] == 9
    compared = {name for name, value in ended.items() if isinstance(value, float)} & found.keys()
    assert len(compared) > 5
    for name in compared:
        assert found[name] == pytest.approx(ended[name], abs=1e-6), name
    assert main([*command, "--no-ema"]) == 0
    plain = json.loads(result.read_text())
    assert any(plain[name] != found[name] for name in compared)
    assert main([*command, "--split", "nothing"]) == 1
    assert "nothing" in capfd.readouterr().err


def test_an_official_detector_is_read_for_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset: Any = SimpleNamespace(concepts=scenes_concepts(ScenesConfig()))
    monkeypatch.setattr(task_evaluation, "_open", lambda *_: dataset)
    recipe = load_finetune_recipe("internimage_scenes_mask_rcnn")
    ours = build_task(recipe, dataset).model.state_dict()
    name = "backbone.patch_embed.conv1.weight"
    ours[name] = torch.full_like(ours[name], 0.25)
    monkeypatch.setattr(task_evaluation, "rcnn_from_mmdet", dict)
    path = tmp_path / "detector.safetensors"
    save_file({k: v.contiguous() for k, v in ours.items()}, path)
    read = load_task(path, recipe="internimage_scenes_mask_rcnn")
    assert (read.task.model.state_dict()[name] == 0.25).all()
    save_file({name: ours[name]}, path)
    with pytest.raises(CheckpointError, match="not of the detector of internimage_scenes_mask"):
        load_task(path, recipe="internimage_scenes_mask_rcnn")
