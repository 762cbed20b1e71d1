"""Which parameters decay, and how fast each learns."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from groundwork.pretrain.engine.optimizer import (
    OptimizerConfig,
    build_optimizer,
    parameter_groups,
    set_lr,
)
from groundwork.pretrain.engine.schedule import ScheduleConfig
from groundwork.pretrain.models.clip_text import TextConfig
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
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
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
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
    assert [
        group["weight_decay"]
        for group in parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    ] == [0.0]


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


class Layers(nn.Module):
    """Parameters of the given names, and their layer scales."""

    def __init__(self, scales: dict[str, float]) -> None:
        super().__init__()
        self.scales = scales
        for name in scales:
            parent: nn.Module = self
            *path, last = name.split(".")
            for step in path:
                if not hasattr(parent, step):
                    parent.add_module(step, nn.Module())
                parent = getattr(parent, step)
            # what has a bias or a norm is of one dimension; nothing else decides
            is_vector = last.endswith("bias") or "norm" in name or last.startswith("gamma")
            is_vector |= ".dw_conv.1." in name or "conv_head.1." in name
            parent.register_parameter(last, nn.Parameter(torch.ones((1,) if is_vector else (1, 1))))

    def lr_scales(self, decay: float, rule: str) -> dict[str, float]:
        return {name: scale for name, scale in self.scales.items() if scale != 1.0}


def golden_groups(path: Path) -> dict[tuple[float, float], set[str]]:
    groups = json.loads(path.read_text())["groups"]
    return {
        (float(scale), float(decay)): set(names)
        for (scale, decay), names in ((key.split("|"), names) for key, names in groups.items())
    }


def built_groups(model: nn.Module, config: OptimizerConfig) -> dict[tuple[float, float], set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    assert len({(g["lr_scale"], g["weight_decay"]) for g in groups}) == len(groups)
    return {
        (float(f"{g['lr_scale']:.10f}"), g["weight_decay"]): {names[id(p)] for p in g["params"]}
        for g in groups
    }


def internimage(variant: Literal["t", "l"]) -> nn.Module:
    with torch.device("meta"):
        return InternImage(InternImageConfig.variant(variant))


def assert_same_groups(
    got: dict[tuple[float, float], set[str]], expected: dict[tuple[float, float], set[str]]
) -> None:
    assert len(got) == len(expected)
    for (scale, decay), names in expected.items():
        match = [k for k in got if k[1] == decay and k[0] == pytest.approx(scale, rel=1e-6)]
        assert [got[key] for key in match] == [names]


def test_classification_groups_are_the_official_ones(shared_golden: Path) -> None:
    folder = shared_golden / "internimage" / "param_groups"
    expected = golden_groups(folder / "cls_internimage_l.json")
    config = OptimizerConfig(weight_decay=0.05, layer_decay=0.9, lr_multipliers={"offset": 0.1})
    got = built_groups(internimage("l"), config)
    assert len(got) < 200  # and not one for each of 839 tensors
    assert_same_groups(got, expected)


def test_without_layer_decay_there_are_two_groups(shared_golden: Path) -> None:
    expected = golden_groups(
        shared_golden / "internimage" / "param_groups" / "cls_internimage_t.json"
    )
    got = built_groups(internimage("t"), OptimizerConfig(weight_decay=0.05))
    assert_same_groups(got, expected)


def test_layers_count_from_the_part_that_has_them(shared_golden: Path) -> None:
    """The detection rule's golden: a backbone below other parts, which learn at the full rate."""
    folder = shared_golden / "internimage" / "param_groups"
    expected = golden_groups(folder / "det_internimage_l.json")
    names = {name for group in expected.values() for name in group}
    model = Layers({name: 1.0 for name in names if not name.startswith("backbone.")})
    model.backbone = internimage("l")
    # a detector's backbone has no head of its own
    del model.backbone.conv_head, model.backbone.head
    config = OptimizerConfig(
        weight_decay=0.05,
        layer_decay=0.94,
        layer_decay_rule="detection",
        lr_multipliers={"sampling_offsets": 0.01},
        no_weight_decay=("sampling_offsets",),
    )
    assert_same_groups(built_groups(model, config), expected)


def test_a_shared_parameter_is_slowed_if_one_of_its_names_is() -> None:
    model = nn.Module()
    model.head = nn.Linear(2, 2, bias=False)
    model.table = Layers({"weight": 0.5})
    model.table.weight = model.head.weight
    [group] = parameter_groups(model, OptimizerConfig(layer_decay=0.5))
    assert group["lr_scale"] == 0.5


def test_settings_about_no_parameter_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"lr_multipliers names 'ofset', which is in the name of"):
        parameter_groups(model, OptimizerConfig(lr_multipliers={"ofset": 0.1}))
    with pytest.raises(ValueError, match=r"no_weight_decay names 'nrom'"):
        parameter_groups(model, OptimizerConfig(no_weight_decay=("nrom",)))
    with pytest.raises(ValueError, match=r"layer_decay is 0\.9, but no part of the model"):
        parameter_groups(model, OptimizerConfig(layer_decay=0.9))


def test_lr_scales_with_the_batch_and_by_group() -> None:
    """Linear scaling also takes the schedule's own rates along; those are alike for all groups."""
    model = Layers({"slow.weight": 0.1, "fast.weight": 1.0})
    config = OptimizerConfig(lr=5e-4, lr_for_batch=512, layer_decay=0.5)
    schedule = ScheduleConfig("timm_cosine", warmup_steps=20, warmup_lr=5e-7, min_lr=5e-6)
    optimizer = build_optimizer(model, config)

    def rates(step: int) -> list[float]:
        base = set_lr(optimizer, step, 100, config, schedule, batch=4096)
        groups = sorted(optimizer.param_groups, key=lambda g: -g["lr_scale"])
        assert groups[0]["lr"] == base
        return [group["lr"] for group in groups]

    assert rates(0) == pytest.approx([4e-6, 4e-6])
    assert rates(10) == pytest.approx([(4e-3 + 4e-6) / 2, (4e-4 + 4e-6) / 2])
    assert rates(100) == pytest.approx([4e-5, 4e-5])
    fast, slow = rates(50)
    assert fast == pytest.approx((4e-3 + 4e-5) / 2)
    assert slow == pytest.approx((4e-4 + 4e-5) / 2)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (OptimizerConfig, {"lr": 0.0}, r"optimizer\.lr is 0\.0; it must be above 0"),
        (OptimizerConfig, {"lr": math.nan}, r"optimizer\.lr is nan"),
        (OptimizerConfig, {"eps": -1e-8}, r"optimizer\.eps"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, r"optimizer\.betas is \[0\.9, 1\.0\]"),
        (OptimizerConfig, {"weight_decay": -0.1}, r"optimizer\.weight_decay is -0\.1"),
        (OptimizerConfig, {"lr_for_batch": 0}, r"optimizer\.lr_for_batch is 0"),
        (OptimizerConfig, {"layer_decay": 1.5}, r"optimizer\.layer_decay is 1\.5"),
        (OptimizerConfig, {"lr_multipliers": {"a": -1.0}}, r"optimizer\.lr_multipliers\.a is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    config: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**arguments)
