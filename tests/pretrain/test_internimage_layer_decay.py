"""Layer-wise decay of learning rates by the official rules, and the count of multiply-adds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from groundwork.pretrain.models.flops import internimage_mac_split, internimage_macs
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "internimage"
EXCERPT = json.loads((GOLDEN / "layer_decay.json").read_text())

#: Size of the input -> 10^9 multiply-adds, of the specification's table.
TABLE = {
    "t": {224: 4.89},
    "s": {224: 8.31},
    "b": {224: 16.2},
    "l": {384: 107.8, 224: 36.7},
    "xl": {384: 162.9, 224: 55.4},
    "h": {640: 1493, 224: 183},
    "g": {512: 2711, 224: 519},
}


def meta_model(config: InternImageConfig) -> InternImage:
    with torch.device("meta"):
        return InternImage(config)


# ---- layer decay ----


@pytest.mark.parametrize("rule", ["classification", "detection"])
def test_learning_rates_are_those_of_the_official_rule(rule: Any) -> None:
    golden = EXCERPT[rule]
    config = InternImageConfig.variant("l")
    model = meta_model(config.detection() if rule == "detection" else config)
    scales = model.lr_scales(golden["decay"], rule, golden["dcn_lr_mul"])
    for name, expected in golden["scales"].items():
        assert scales[name] == pytest.approx(expected, rel=1e-6), name


@pytest.mark.parametrize("name", ["cls_internimage_t", "cls_internimage_l", "det_internimage_l"])
def test_every_parameter_group_is_the_official_one(shared_golden: Path, name: str) -> None:
    folder = shared_golden / "internimage" / "param_groups"
    golden = json.loads((folder / f"{name}.json").read_text())
    kind, _, variant = name.split("_")
    config = InternImageConfig.variant(variant)
    model = meta_model(config.detection() if kind == "det" else config)
    options = golden["rule"]
    if kind == "det":
        scales = model.lr_scales(options["layer_decay_rate"], "detection")
    else:
        scales = model.lr_scales(
            options["lr_layer_decay_ratio"], "classification", options["dcn_lr_mul"]
        )
    expected: dict[str, tuple[float, float]] = {}
    for key, names in golden["groups"].items():
        scale, weight_decay = map(float, key.split("|"))
        for parameter in names:
            expected[parameter.removeprefix("backbone.")] = (scale, weight_decay)
    parameters = dict(model.named_parameters())
    assert set(parameters) <= set(expected)
    of_heads = set(expected) - set(parameters)
    assert all(n.startswith(("neck", "decode_head", "bbox_head")) for n in of_heads)
    assert bool(of_heads) == (kind == "det")
    undecayed = model.no_weight_decay()
    for parameter, value in parameters.items():
        scale, weight_decay = expected[parameter]
        assert scales[parameter] == pytest.approx(scale, rel=1e-6), parameter
        assert (value.ndim > 1 and parameter not in undecayed) == (weight_decay > 0), parameter


def test_post_norms_of_the_third_stage_go_by_each_rules_own_number() -> None:
    """Section (d) and (e) of the specification: 1.0, and the block of their place in the list."""
    config = InternImageConfig.variant("h")
    model = meta_model(config)
    classification = model.lr_scales(0.9, "classification")
    detection = model.lr_scales(0.9, "detection")
    for m in range(5):
        name = f"levels.2.post_norms.{m}.0.weight"
        assert classification[name] == 1.0
        assert detection[name] == detection[f"levels.2.blocks.{m}.mlp.fc1.weight"]
    assert classification["levels.3.norm.0.weight"] == 1.0
    first_of_last = detection["levels.3.blocks.0.mlp.fc1.weight"]
    assert detection["levels.3.norm.0.weight"] == first_of_last
    for head in ("dcnv3_head_x4.0.weight", "clip_projector.cross_dcn.q.weight", "head.weight"):
        assert classification[head] == detection[head] == 1.0


def test_the_multiplier_of_the_dcns_spares_masks_and_needs_layer_decay() -> None:
    model = meta_model(InternImageConfig.variant("h"))
    plain, scaled = (model.lr_scales(0.9, "classification", m) for m in (1.0, 0.1))
    for name, scale in scaled.items():
        touched = ".dcn.offset." in name or "center_feature_scale_proj" in name
        assert scale == pytest.approx(plain[name] * (0.1 if touched else 1.0)), name
    assert set(model.lr_scales(None, "classification", 0.1).values()) == {1.0}


def test_a_wrong_decay_or_rule_is_named() -> None:
    model = meta_model(InternImageConfig.variant("t"))
    with pytest.raises(ValueError, match=r"layer decay is 1\.5; give 0 < decay <= 1"):
        model.lr_scales(1.5, "classification")
    with pytest.raises(ValueError, match="rule is 'other'; choose classification or detection"):
        model.lr_scales(0.9, "other")  # type: ignore[arg-type]


# ---- multiply-adds ----


@pytest.mark.parametrize("variant", TABLE)
def test_multiply_adds_are_those_of_the_table(variant: str) -> None:
    config = InternImageConfig.variant(variant)
    for size, expected in TABLE[variant].items():
        assert internimage_macs(config, size, size) / 1e9 == pytest.approx(expected, rel=0.01)


def test_every_part_is_that_of_the_summary(shared_golden: Path) -> None:
    ours = {
        **{"stem": "stem", "dw": "depthwise", "proj": "projections", "dcn": "sampling"},
        **{"offmask": "offsets_and_weights", "mlp": "mlp", "down": "downsample", "head": "head"},
        "cfs": "center_feature_scale",
    }
    folder = shared_golden / "internimage" / "inventory"
    for name, entry in json.loads((folder / "summary.json").read_text()).items():
        config, size = InternImageConfig.variant(name.split("_")[1]), entry["input_resolution"]
        split = internimage_mac_split(config, size, size)
        split["head"] += split.pop("pooling")  # one number there
        assert set(split) == set(ours.values())
        for theirs, expected in entry["gmacs_split"].items():
            assert split[ours[theirs]] / 1e9 == pytest.approx(expected, rel=2e-3, abs=6e-4)


@pytest.mark.parametrize("variant", ["t", "s", "flash_t", "flash_b", "h"])
def test_multiply_adds_of_convolutions_and_products_are_those_torch_counts(variant: str) -> None:
    """On an image of odd sizes; the sampling is an op of ours, which torch does not know."""
    config = InternImageConfig.variant(variant)
    size = (64, 96) if config.use_clip_projector else (75, 53)
    # the plain layers: the fused depthwise convolution is an op of ours, too
    model = meta_model(replace(config, kernel_backend="reference")).eval()
    ops: dict[str, Any] = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, *size, device="meta"))
    ops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    split = internimage_mac_split(config, *size)
    products = sum(n for op, n in ops.items() if "grid" not in op) // 2
    assert products == pytest.approx(sum(split.values()) - split["sampling"], rel=1e-3)
