"""The composite backbone of two InternImages."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from groundwork.pretrain.models.composite import CompositeInternImage
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.internimage_weights import OfficialWeightsError

CLASSIFIER = InternImageConfig(
    num_classes=3,
    channels=16,
    depths=(1, 1, 2, 1),
    groups=(1, 2, 4, 8),
    norm="post_norm",
    layer_scale=1e-5,
    drop_path=0.0,
)
CONFIG = CLASSIFIER.detection()


def randomised(seed: int = 0) -> CompositeInternImage:
    torch.manual_seed(seed)
    model = CompositeInternImage(CONFIG).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def by_definition(model: CompositeInternImage, x: Tensor) -> list[Tensor]:
    """The second maps, stage by stage in (B, C, H, W), by the formula of the specification."""
    first, lead = model.cb_modules
    weights = model.state_dict()
    maps = first.features(x)
    stage_input = first.patch_embed(x)
    results = []
    for i in range(4):
        total = torch.zeros_like(maps[i])
        for j in range(i, 4):
            part = maps[j]
            if j > i:
                name = f"cb_linears.{i}.{j - i}"
                part = F.conv2d(part, weights[f"{name}.weight"], weights[f"{name}.bias"])
            rows = torch.arange(maps[i].shape[2]) * part.shape[2] // maps[i].shape[2]
            columns = torch.arange(maps[i].shape[3]) * part.shape[3] // maps[i].shape[3]
            total = total + part[:, :, rows][:, :, :, columns]
        gamma = weights[f"cb_modules.1.gamma{i}"]
        features, stage_input = lead.levels[i](stage_input + gamma * total.permute(0, 2, 3, 1))
        results.append(features.permute(0, 3, 1, 2))
    return results


@pytest.mark.parametrize("size", [(64, 96), (75, 53)])
def test_the_second_backbone_gets_the_maps_of_the_first(size: tuple[int, int]) -> None:
    model = randomised()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        first, second = model(x)
        for got, expected in zip(first, model.cb_modules[0].features(x), strict=True):
            torch.testing.assert_close(got, expected)
        for got, expected in zip(second, by_definition(model, x), strict=True):
            torch.testing.assert_close(got, expected)


def test_a_new_composite_is_two_backbones_with_one_stem() -> None:
    """And its gates learn from the first step."""
    model = CompositeInternImage(CONFIG)
    x = torch.randn(1, 3, 64, 64)
    _, second = model(x)
    twin = InternImage(CONFIG)
    twin.patch_embed.load_state_dict(model.cb_modules[0].patch_embed.state_dict())
    twin.levels.load_state_dict(model.cb_modules[1].levels.state_dict())
    for got, expected in zip(second, twin.features(x), strict=True):
        torch.testing.assert_close(got, expected)
    (sum(m.square().sum() for m in second)).backward()
    for i in range(4):
        gamma = dict(model.named_parameters())[f"cb_modules.1.gamma{i}"]
        assert gamma.grad is not None
        assert gamma.grad.count_nonzero() > 0


def test_names_are_the_official_ones() -> None:
    state = CompositeInternImage(CONFIG).official_state_dict()
    joints = {k: tuple(v.shape) for k, v in state.items() if k.startswith("cb_linears.")}
    assert joints["cb_linears.0.1.weight"] == (16, 32, 1, 1)
    assert joints["cb_linears.1.2.bias"] == (32,)
    assert len(joints) == 2 * (3 + 2 + 1)
    assert state["cb_modules.1.gamma3"].shape == (128,)
    assert not any(k.startswith("cb_modules.1.patch_embed.") for k in state)
    single = InternImage(CONFIG).state_dict()
    assert {k.removeprefix("cb_modules.0.") for k in state if k.startswith("cb_modules.0.")} == set(
        single
    )


def test_a_classifiers_checkpoint_starts_both_backbones() -> None:
    weights = {
        k: torch.rand_like(v)
        for k, v in InternImage(CLASSIFIER).state_dict().items()
        if v.is_floating_point()
    }
    model = CompositeInternImage(CONFIG)
    report = model.load_official({"model": weights})
    state = model.official_state_dict()
    for name, value in weights.items():
        for k in (0, 1):
            if name.startswith("levels.") or (k == 0 and name.startswith("patch_embed.")):
                torch.testing.assert_close(state[f"cb_modules.{k}.{name}"], value)
    joins = {n for n in state if n.startswith(("cb_linears.", "cb_modules.1.gamma"))}
    assert set(report.initial) == joins
    assert set(report.skipped) == {n for n in weights if n.startswith(("head.", "conv_head."))}


def test_a_composite_checkpoint_comes_back() -> None:
    model, other = randomised(0), randomised(1)
    values = {f"backbone.{k}": v for k, v in model.official_state_dict().items()}
    report = other.load_official({"state_dict": {**values, "neck.weight": torch.zeros(1)}})
    assert report.dropped == ("neck.weight",)
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    del values["backbone.cb_linears.0.1.bias"]
    with pytest.raises(OfficialWeightsError, match=r"1 missing: cb_linears\.0\.1\.bias"):
        other.load_official({"state_dict": values})
    with pytest.raises(OfficialWeightsError, match="no stages"):
        other.load_official({"head.weight": torch.zeros(1)})


def test_layer_decay_holds_for_both_backbones() -> None:
    model = CompositeInternImage(CONFIG)
    scales = model.lr_scales(0.9, "detection")
    single = InternImage(CONFIG).lr_scales(0.9, "detection")
    assert set(scales) == {name for name, _ in model.named_parameters()}
    for name, scale in single.items():
        assert scales[f"cb_modules.0.{name}"] == scale
        if name.startswith("levels."):
            assert scales[f"cb_modules.1.{name}"] == scale
    assert scales["cb_linears.0.1.weight"] == scales["cb_modules.1.gamma0"] == 1.0


def test_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"give its detection form, config\.detection\(\)"):
        CompositeInternImage(replace(CONFIG, num_classes=3))
