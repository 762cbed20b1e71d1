"""InternImage with the branches of iNaturalist: where and when a picture was taken."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.internimage_metaformer import InternImageMetaFormer

CONFIG = InternImageConfig(
    num_classes=7, channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), drop_path=0.0
)


def build(seed: int = 0) -> InternImageMetaFormer:
    torch.manual_seed(seed)
    model = InternImageMetaFormer(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 3, 32, 32), (2, 4), (2, 3))
    x, temporal, spatial = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, temporal, spatial


def test_the_facts_add_their_logits_to_those_of_the_picture() -> None:
    model = build()
    x, *facts = inputs()
    w = model.state_dict()
    encoded = []
    for k, numbers in enumerate(facts, 1):
        name = f"meta_head_{k}"
        y = F.relu(numbers @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"])
        y = F.layer_norm(y, (64,), w[f"{name}.2.weight"], w[f"{name}.2.bias"], 1e-5)
        z = y
        for layer in (1, 2):
            z = F.relu(z @ w[f"{name}.3.w{layer}.weight"].T + w[f"{name}.3.w{layer}.bias"])
            norm = f"{name}.3.norm_fn{layer}"
            z = F.layer_norm(z, (64,), w[f"{norm}.weight"], w[f"{norm}.bias"], 1e-5)
        encoded.append(y + z)
    joined = torch.cat(encoded, -1)
    joined = F.layer_norm(joined, (128,), w["meta_norm.weight"], w["meta_norm.bias"], 1e-6)
    added = joined @ w["meta_head.weight"].T + w["meta_head.bias"]
    plain = InternImage(CONFIG).eval()
    plain.load_state_dict({k: v for k, v in w.items() if not k.startswith("meta_")})
    torch.testing.assert_close(model(x, *facts), plain(x) + added)


def test_official_weights_come_back_and_a_plain_models_start_it() -> None:
    state = build(0).official_state_dict()
    model = build(1)
    assert model.load_official({"model": state}).initial == ()
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    plain = InternImage(replace(CONFIG, num_classes=9))
    report = model.load_official(plain.state_dict(), head="zeros")
    assert {n.split(".")[0] for n in report.initial} == {
        *("meta_head_1", "meta_head_2", "meta_norm", "meta_head", "head")
    }


def test_branches_learn_at_the_heads_rate() -> None:
    scales = build().lr_scales(0.9, "classification")
    assert scales["meta_head_1.0.weight"] == scales["meta_head.weight"] == 1.0


def test_wrong_facts_and_no_classes_are_named() -> None:
    x, temporal, spatial = inputs()
    with pytest.raises(ValueError, match=r"spatial has shape \(2, 4\); expected \(2, 3\)"):
        build()(x, temporal, temporal)
    with pytest.raises(ValueError, match="temporal has shape"):
        build()(x, spatial, spatial)
    with pytest.raises(ValueError, match="num_classes is 0"):
        InternImageMetaFormer(replace(CONFIG, num_classes=0))
