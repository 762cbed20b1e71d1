"""Pretraining an InternImage classifier: two ranks, ZeRO-3, killed, resumed, averaged weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groundwork.pretrain.engine.checkpoint import complete_checkpoints, require_checkpoint
from groundwork.pretrain.weights.trained import load_trained
from groundwork.pretrain.weights.zero_shards import full_weights, state_digest

pytestmark = pytest.mark.multirank
STEPS = 12


def arguments(shards: Path, out: Path) -> list[str]:
    settings = [
        *(f"data.shards={shards}", "data.image.size=32", "model.num_classes=6"),
        *("model.channels=8", "model.depths=[1, 1, 1, 1]", "model.groups=[1, 2, 4, 8]"),
        *("model.activation_checkpointing=true", "model.drop_path=0.1"),
        *(f"train.steps={STEPS}", "train.global_batch=16", "train.micro_batch=4"),
        *("schedule.warmup_steps=2", "checkpoint.every_steps=3", "checkpoint.keep=9"),
        *("monitor.log_every=1", "monitor.tensorboard=false"),
        "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
    ]
    given = [part for setting in settings for part in ("--set", setting)]
    return ["pretrain", "internimage_emoji", "--out", str(out), "--ranks", "2", *given]


def test_a_killed_run_ends_as_if_nothing_had_happened(
    tiny_shards: Path, tmp_path: Path, start_job: Callable[..., Any]
) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    job = start_job(*arguments(tiny_shards, whole), launcher="groundwork")
    assert job.wait() == 0, job.text()
    job = start_job(*arguments(tiny_shards, torn), launcher="groundwork")
    job.wait_for(lambda: len(complete_checkpoints(torn)) >= 2)
    job.kill()
    assert len(complete_checkpoints(torn)) < STEPS // 3
    job = start_job(*arguments(tiny_shards, torn), launcher="groundwork")
    assert job.wait() == 0, job.text()
    assert "resuming from" in job.text()
    # the ranks may have saved once more when their launcher was gone
    ends = [require_checkpoint(out) for out in (whole, torn)]
    assert state_digest(ends[0]) == state_digest(ends[1])
    averages = [full_weights(end, ema=True) for end in ends]
    for name, value in averages[0].items():
        assert torch.equal(value, averages[1][name]), name
    weights = full_weights(ends[0])
    assert any(not torch.equal(value, weights[name]) for name, value in averages[0].items())

    trained = load_trained(whole)
    assert trained.tokenizer is None
    statistics = dict(trained.model.named_buffers())["conv_head.1.0.running_mean"]
    assert statistics.abs().max() > 0
    with torch.no_grad():
        assert trained.model(torch.zeros(2, 3, 32, 32)).shape == (2, 6)


def test_ranks_that_drop_other_samples_stay_in_step(
    tiny_shards: Path, tmp_path: Path, start_job: Callable[..., Any]
) -> None:
    """The blocks of S to XL, recomputed in the backward pass, with half of all branches dropped."""
    settings = ["model.norm=post_norm", "model.layer_scale=0.1", "model.drop_path=0.5"]
    settings += ["model.drop_path_schedule=uniform", "train.precision=bf16"]
    given = [part for setting in settings for part in ("--set", setting)]
    job = start_job(*arguments(tiny_shards, tmp_path / "run"), *given, launcher="groundwork")
    assert job.wait() == 0, job.text()
