"""The learning rate of every step, against torch's, timm's and mmcv's rules."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from groundwork.pretrain.engine.schedule import ScheduleConfig, lr_at


@settings(max_examples=40, deadline=None)
@given(warmup=st.integers(0, 12), rest=st.integers(2, 30), min_lr=st.sampled_from([0.0, 1e-4]))
def test_the_schedule_is_torchs_linear_warm_up_and_cosine(
    warmup: int, rest: int, min_lr: float
) -> None:
    peak, total = 4e-3, warmup + rest
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    torch_schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=rest - 1, eta_min=min_lr
    )
    if warmup:
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rest - 1, eta_min=min_lr)
        torch_schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torch_schedule.step()
    schedule = ScheduleConfig(warmup_steps=warmup, min_lr=min_lr)
    actual = [lr_at(step, total, peak, schedule) for step in range(total)]
    assert actual == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_schedule_at_its_edges() -> None:
    schedule = ScheduleConfig(warmup_steps=10, min_lr=1e-5)
    assert lr_at(0, 100, 1e-3, schedule) == pytest.approx(1e-4)
    assert lr_at(9, 100, 1e-3, schedule) == pytest.approx(1e-3)
    assert lr_at(10, 100, 1e-3, schedule) == pytest.approx(1e-3)
    assert lr_at(99, 100, 1e-3, schedule) == pytest.approx(1e-5)
    assert lr_at(1000, 100, 1e-3, schedule) == pytest.approx(1e-5)

    no_warmup = ScheduleConfig(warmup_steps=0, min_lr=1e-5)
    assert lr_at(0, 100, 1e-3, no_warmup) == 1e-3
    assert lr_at(0, 1, 1e-3, no_warmup) == 1e-3  # the only step trains

    longer_than_the_run = ScheduleConfig(warmup_steps=1000)
    assert lr_at(99, 100, 1e-3, longer_than_the_run) == pytest.approx(1e-4)
    assert lr_at(10, 11, 1e-3, ScheduleConfig(warmup_steps=10)) == pytest.approx(1e-3)


def test_timms_cosine_is_the_official_one(shared_golden: Path) -> None:
    path = shared_golden / "internimage" / "param_groups" / "cosine_schedule.json"
    schedule = ScheduleConfig("timm_cosine", warmup_steps=200, warmup_lr=4e-6, min_lr=4e-5)
    for step, (first, second) in json.loads(path.read_text())["values"].items():
        assert lr_at(int(step), 3000, 4e-3, schedule) == pytest.approx(first, rel=1e-12)
        assert lr_at(int(step), 3000, 1e-3, schedule) == pytest.approx(second, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    total=st.integers(2, 60),
    warmup=st.integers(0, 20),
    min_lr=st.sampled_from([0.0, 1e-4]),
    warmup_lr=st.sampled_from([0.0, 5e-7]),
)
def test_timms_cosine_is_timms(total: int, warmup: int, min_lr: float, warmup_lr: float) -> None:
    from timm.scheduler.cosine_lr import CosineLRScheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-3)
    timms = CosineLRScheduler(
        optimizer,
        t_initial=total,
        lr_min=min_lr,
        warmup_t=warmup,
        warmup_lr_init=warmup_lr,
        t_in_epochs=False,
        cycle_limit=1,
    )
    schedule = ScheduleConfig(
        "timm_cosine", warmup_steps=warmup, warmup_lr=warmup_lr, min_lr=min_lr
    )
    for step in range(total + 5):
        timms.step_update(step)
        expected = optimizer.param_groups[0]["lr"]
        assert lr_at(step, total, 2e-3, schedule) == pytest.approx(expected, rel=1e-9)


def test_multistep_is_torchs_and_warms_up_as_mmcv_does() -> None:
    schedule = ScheduleConfig(
        "multistep", warmup_steps=500, warmup_ratio=1e-3, milestones=(800, 1100), gamma=0.1
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    torchs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [800, 1100], gamma=0.1)
    for step in range(1200):
        peak = optimizer.param_groups[0]["lr"]
        # mmcv: warmup_lr = lr * (1 - (1 - iteration / warmup_iters) * (1 - warmup_ratio))
        share = 1 - (1 - step / 500) * (1 - 1e-3) if step < 500 else 1
        assert lr_at(step, 1200, 1e-4, schedule) == pytest.approx(peak * share, rel=1e-9)
        optimizer.step()
        torchs.step()
    assert lr_at(0, 1200, 1e-4, schedule) == pytest.approx(1e-7)


def test_poly_is_torchs_and_warms_up_as_mmcv_does() -> None:
    schedule = ScheduleConfig("poly", warmup_steps=15, warmup_ratio=1e-6, power=0.9)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=6e-5)
    torchs = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=160, power=0.9)
    for step in range(165):
        share = 1 - (1 - step / 15) * (1 - 1e-6) if step < 15 else 1
        expected = optimizer.param_groups[0]["lr"] * share
        assert lr_at(step, 160, 6e-5, schedule) == pytest.approx(expected, rel=1e-6, abs=1e-15)
        optimizer.step()
        torchs.step()


def test_the_least_rate_is_the_same_for_every_peak() -> None:
    poly = ScheduleConfig("poly", min_lr=1e-6)
    steps = ScheduleConfig("multistep", min_lr=1e-6, milestones=(5,), gamma=1e-9)
    for peak in (1e-3, 1e-5):
        assert lr_at(10, 10, peak, poly) == pytest.approx(1e-6)
        assert lr_at(9, 10, peak, steps) == pytest.approx(1e-6)
        assert lr_at(9, 10, peak, steps, factor=8) == pytest.approx(8e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": -1}, r"schedule\.warmup_steps is -1"),
        ({"min_lr": -1e-5}, r"schedule\.min_lr"),
        ({"warmup_ratio": 2.0}, r"schedule\.warmup_ratio is 2\.0"),
        ({"warmup_lr": 1e-6}, r"schedule\.warmup_lr is of the kind timm_cosine, and"),
        ({"milestones": (3,)}, r"schedule\.milestones is of the kind multistep"),
        ({"kind": "multistep"}, r"schedule\.milestones is empty"),
        ({"kind": "multistep", "milestones": (5, 3)}, r"schedule\.milestones is \[5, 3\]"),
        ({"kind": "multistep", "milestones": (-1, 3)}, r"schedule\.milestones is \[-1, 3\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**arguments)
