"""Heads with batch norms train with bfloat16 weights, and with one picture on each rank."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from groundwork.data.dataset import open_dataset
from groundwork.pretrain.downstream.finetuning.recipe import load_finetune_recipe
from groundwork.pretrain.downstream.finetuning.run import build_task
from groundwork.pretrain.engine.checkpoint import require_checkpoint

UPERNET = "internimage_scenes_upernet"
HEADS = {
    "upernet": (UPERNET, []),
    "cascade": ("internimage_scenes_mask_rcnn", ["task.head=cascade_mask_rcnn"]),
}
#: What an Accelerate config for ZeRO-1 on CPUs comes to.
ZERO_1 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "DS_ACCELERATOR": "cpu",
    "LOCAL_SIZE": "2",
}


@pytest.fixture(scope="module")
def scenes(
    build_scenes: Callable[[Path, int, int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return build_scenes(tmp_path_factory.mktemp("scenes") / "shards", 8, 4)


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_weights_train_beside_float32_statistics(scenes: Path, head: str) -> None:
    """The forward pass of DeepSpeed's bf16: a cast model, under autocast."""
    name, settings = HEADS[head]
    recipe = load_finetune_recipe(name, [f"data.shards={scenes}", *settings])
    data = open_dataset(str(scenes), "train")
    torch.manual_seed(0)
    task = build_task(recipe, data)
    rng = np.random.default_rng(0)
    batch = task.collate([task.example(data.read(index), rng) for index in range(2)])
    task.model.bfloat16().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = task.model(batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    statistics = {k: v for k, v in task.model.state_dict().items() if "running_mean" in k}
    assert len(statistics) >= 10
    for key, value in statistics.items():
        assert value.dtype == torch.float32 and value.any(), key
        weight = task.model.get_parameter(key.replace("running_mean", "weight"))
        assert weight.dtype == torch.bfloat16
        assert weight.grad is not None and weight.grad.isfinite().all(), key


def finished(job: Any, out: Path) -> dict[str, torch.Tensor]:
    """The weights of a run of two steps that must have ended well."""
    assert job.wait() == 0, job.text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert json.loads((out / "results.json").read_text())["last"]["pixel_accuracy"] > 0
    return load_file(require_checkpoint(out) / "model.safetensors")


def arguments(scenes: Path, out: Path, *more: str) -> list[str]:
    settings = [f"data.shards={scenes}", "train.steps=2", "monitor.log_every=1", *more]
    overrides = [word for setting in settings for word in ("--set", setting)]
    return ["finetune", UPERNET, "--ranks", "2", "--out", str(out), *overrides]


@pytest.mark.multirank
def test_upernet_trains_under_deepspeed_in_bfloat16(
    start_job: Callable[..., Any], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ZERO_1.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    settings = ("train.precision=bf16", "train.global_batch=4")
    weights = finished(start_job(*arguments(scenes, out, *settings), launcher="groundwork"), out)
    assert list((require_checkpoint(out) / "deepspeed").glob("bf16_zero_*"))
    for name, value in weights.items():
        if "running_var" in name:
            assert (value != value.bfloat16()).any(), name


@pytest.mark.multirank
def test_one_picture_on_each_rank_trains_with_synchronised_norms(
    start_job: Callable[..., Any], scenes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = ("train.sync_batch_norm=true", "train.global_batch=2")
    weights = finished(start_job(*arguments(scenes, out, *settings), launcher="groundwork"), out)
    # the pooled map of 1×1: a single picture has no variance in it, and two have
    name = "psp_modules.0.1.batch_norm.running_var"
    (pooled,) = (value for key, value in weights.items() if key.endswith(name))
    assert ((pooled - 0.9**2).abs() > 1e-5).any()
