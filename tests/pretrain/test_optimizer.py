"""Which parameters decay, and the learning rate of every step."""

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from groundwork.pretrain.engine.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    lr_at,
    parameter_groups,
)
from groundwork.pretrain.models.clip_text import TextConfig
from groundwork.pretrain.models.klite import InternImageTower, KliteConfig, build_klite
from groundwork.pretrain.models.swin import SwinConfig
from groundwork.pretrain.objectives.unicl import Unicl, UniclConfig

TEXT = TextConfig(vocab_size=60, context_length=8, width=16, layers=1, heads=2)
SWIN = SwinConfig(image_size=16, embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=2)
INTERNIMAGE = InternImageTower(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8))


def klite_objective(image: SwinConfig | InternImageTower) -> nn.Module:
    model = build_klite(KliteConfig(image=image, text=TEXT, projection_dim=8))
    return Unicl(model, UniclConfig(), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def decayed_names(model: nn.Module) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    members = [names[id(p)] for group in groups for p in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {n for n, p in model.named_parameters() if p.requires_grad}
    return {names[id(p)] for g in groups if g["weight_decay"] == 0.1 for p in g["params"]}


@pytest.mark.parametrize("image", [SWIN, INTERNIMAGE], ids=["swin", "internimage"])
def test_matrices_decay_and_nothing_else(image: SwinConfig | InternImageTower) -> None:
    objective = klite_objective(image)
    matrices = {
        f"{name}.weight"
        for name, module in objective.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
    }
    matrices |= {n for n, _ in objective.named_parameters() if n.endswith("in_proj_weight")}
    matrices |= {"model.vision_projection", "model.text_projection"}
    assert decayed_names(objective) == matrices


def test_positions_biases_norms_and_the_logit_scale_do_not_decay() -> None:
    objective = klite_objective(SWIN)
    plain = {n for n, _ in objective.named_parameters()} - decayed_names(objective)
    block = "model.visual.layers.0.blocks.1"
    assert plain >= {
        "model.logit_scale",
        "model.text.positional_embedding",
        f"{block}.attn.relative_position_bias_table",
        f"{block}.norm1.weight",
        f"{block}.attn.qkv.bias",
        "model.visual.patch_embed.proj.bias",
        "model.text.ln_final.weight",
        "model.text.resblocks.0.attn.in_proj_bias",
    }


class Positions(nn.Module):
    """A module that names what is not to decay."""

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.table = table
        self.linear = nn.Linear(3, 3)

    def no_weight_decay(self) -> set[str]:
        return {"table", "absent"}


def test_exemption_holds_for_every_name_of_a_shared_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5, bias=False)
            self.positions = Positions(self.head.weight)

    assert decayed_names(Tied()) == {"positions.linear.weight"}


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert decayed_names(model) == {"1.weight"}
    model[1].weight.requires_grad_(False)
    assert [group["weight_decay"] for group in parameter_groups(model, 0.1)] == [0.0]


def test_partitioned_parameters_count_by_their_full_shape() -> None:
    model = nn.Linear(4, 3)
    for parameter in model.parameters():
        shape = parameter.shape
        parameter.data = parameter.data.flatten()[:0]
        parameter.ds_shape = shape  # type: ignore[attr-defined]
    assert decayed_names(model) == {"weight"}


def test_a_step_without_gradient_shrinks_what_decays_and_spares_the_rest() -> None:
    torch.manual_seed(0)
    objective = klite_objective(SWIN)
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    optimizer = build_optimizer(objective, OptimizerConfig(lr=0.5, weight_decay=0.2))
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = decayed_names(objective)
    for name, parameter in objective.named_parameters():
        expected = before[name] * (0.9 if name in decayed else 1.0)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


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


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (OptimizerConfig, {"lr": 0.0}, r"optimizer\.lr is 0\.0; it must be above 0"),
        (OptimizerConfig, {"lr": math.nan}, r"optimizer\.lr is nan"),
        (OptimizerConfig, {"eps": -1e-8}, r"optimizer\.eps"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, r"optimizer\.betas is \[0\.9, 1\.0\]"),
        (OptimizerConfig, {"weight_decay": -0.1}, r"optimizer\.weight_decay is -0\.1"),
        (ScheduleConfig, {"warmup_steps": -1}, r"schedule\.warmup_steps is -1"),
        (ScheduleConfig, {"min_lr": -1e-5}, r"schedule\.min_lr"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    config: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**arguments)
