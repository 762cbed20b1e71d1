"""The exported code of InternImage beside ours and the official results: numbers and training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from groundwork.data.transforms import ImageTransform
from groundwork.kernels.dcnv3_reference import dcnv3_reference
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.weights.export_internimage import (
    huggingface_config,
    to_huggingface_internimage,
)
from groundwork.pretrain.weights.exportable import Exportable, relative_difference
from groundwork.pretrain.weights.hf_internimage import layers_internimage
from groundwork.pretrain.weights.hf_internimage.configuration_internimage import (
    InternImageConfig as TheirConfig,
)
from groundwork.pretrain.weights.hf_internimage.layers_internimage import sample_and_sum
from groundwork.pretrain.weights.hf_internimage.modeling_internimage import (
    InternImageForImageClassification,
    InternImageModel,
)

SMALL = InternImageConfig(num_classes=7, channels=16, depths=(1, 1, 2, 1), groups=(2, 4, 4, 8))
#: The parts of T, of L, of H, of G and of both kinds of FlashInternImage, in small.
CONFIGS = {
    "t": SMALL,
    "t detection": replace(SMALL, num_classes=0, layer_scale=1.0),
    "l": replace(SMALL, norm="post_norm", layer_scale=0.5, offset_scale=2.0),
    "h": replace(
        SMALL,
        norm="res_post_norm",
        dw_kernel_size=5,
        center_feature_scale=True,
        level2_post_norm_block_ids=(1,),
        use_clip_projector=True,
        clip_embed_dim=64,
        clip_num_heads=4,
        clip_dim=48,
    ),
    "g without a head": replace(
        SMALL,
        num_classes=0,
        norm="post_norm",
        dw_kernel_size=5,
        center_feature_scale=True,
        use_clip_projector=True,
        clip_embed_dim=64,
        clip_num_heads=4,
        clip_dim=48,
    ),
    "without centres": replace(SMALL, remove_center=True, act="silu", cls_scale=1.25),
    "flash t": replace(
        SMALL, core="dcnv4", dw_kernel_size=None, dcn_output_bias=False, mlp_fc2_bias=False
    ),
    "flash l": replace(
        SMALL,
        core="dcnv4",
        norm="post_norm",
        layer_scale=0.5,
        offset_scale=2.0,
        center_feature_scale=True,
    ),
}


def randomised(config: InternImageConfig) -> InternImage:
    """A model whose offsets, weights and scales are not at their initial zeros."""
    torch.manual_seed(0)
    model = InternImage(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        if model.conv_head is not None:
            model.conv_head[1][0].running_mean.normal_()
            model.conv_head[1][0].running_var.uniform_(0.5, 2)
    return model.eval()


def exportable(config: InternImageConfig) -> Exportable:
    return Exportable(randomised(config), config, ImageTransform(size=64), "Made for a test.")


def images(batch: int = 2, height: int = 64, width: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator)


def assert_near(actual: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual is not None
    assert relative_difference(actual, expected) <= tolerance


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


# ---- the same numbers ----


@pytest.mark.parametrize("sampling", ["groundwork", "standard"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_exported_code_computes_what_ours_does(name: str, sampling: str) -> None:
    subject = exportable(CONFIGS[name])
    ours = subject.model
    assert isinstance(ours, InternImage)
    model = to_huggingface_internimage(subject, sampling=sampling)
    assert sampling in model.sampling  # type: ignore[operator]
    x = images()
    with torch.no_grad():
        output = model(x)
        for got, expected in zip(output.hidden_states, ours.features(x), strict=True):
            assert_near(got, expected)
        assert output.last_hidden_state is output.hidden_states[-1]
        assert_near(output.pooler_output, ours.forward_features(x))
        if subject.config.num_classes:  # type: ignore[union-attr]
            assert_near(output.logits, ours(x))
        else:
            assert output.logits is None


@pytest.mark.parametrize("name", ["tiny_T_like", "tiny_L_like", "tiny_H_like", "tiny_G_like"])
def test_the_exported_code_computes_what_the_official_code_does(
    name: str, shared_golden: Path
) -> None:
    golden = shared_golden / "internimage"
    cases = json.loads((golden / "manifest.json").read_text())["model"]
    (case,) = (entry for entry in cases if entry["name"] == name)
    config = InternImageConfig.from_official(case["config"])
    if head := case["clip_head"]:
        config = replace(
            config,
            clip_embed_dim=head["embed_dim"],
            clip_num_heads=head["num_heads"],
            clip_dim=head["clip_dim"],
        )
    ours = InternImage(config).eval()
    ours.load_official(load_file(golden / case["weights"]))
    model = to_huggingface_internimage(
        Exportable(ours, config, ImageTransform(), ""), sampling="standard"
    )
    data = {k: torch.from_numpy(v) for k, v in np.load(golden / case["data"]).items()}
    output = model(data["input"])
    assert_near(output.logits, data["out.logits"], 1e-4)
    assert_near(output.pooler_output, data["out.pooled"], 1e-4)
    for i, features in enumerate(output.hidden_states):
        assert_near(features.permute(0, 2, 3, 1), data[f"out.stage{i}_nodown"], 1e-4)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("remove_center", [False, True])
@pytest.mark.parametrize(("height", "width"), [(7, 12), (1, 5), (1, 1), (33, 4)])
def test_the_standard_sampling_is_that_of_the_reference(
    height: int, width: int, remove_center: bool, scale: float
) -> None:
    torch.manual_seed(height + width)
    batch, groups, depth, points = 2, 3, 5, 9 - remove_center
    value = torch.randn(batch, height, width, groups * depth)
    offset = 2 * torch.randn(batch, height, width, groups * points * 2)
    offset.view(-1)[::7] = 1e9  # far outside, where no integer reaches
    offset.view(-1)[1::11] = 0.0
    mask = torch.randn(batch, height, width, groups * points)
    expected = dcnv3_reference(
        value,
        offset,
        mask,
        kernel_size=3,
        groups=groups,
        offset_scale=scale,
        remove_center=remove_center,
        softmax=True,
    )
    weights = mask.unflatten(-1, (groups, points)).softmax(-1)
    assert_near(sample_and_sum(value, offset, weights, scale), expected)


def test_bfloat16_samples_at_coordinates_in_float32() -> None:
    torch.manual_seed(0)
    value = torch.linspace(0, 1, 200).view(1, 1, 200, 1).expand(1, 1, 200, 16).bfloat16()
    offset = torch.full((1, 1, 200, 18), 0.25).bfloat16()
    weights = torch.zeros(1, 1, 200, 1, 9)
    weights[..., 4] = 1  # the centre alone
    output = sample_and_sum(value, offset, weights, 1.0)
    exact = sample_and_sum(value.float(), offset.float(), weights, 1.0)
    assert output.dtype == torch.bfloat16
    # coordinates in bfloat16 would be whole pixels off from 128 on
    torch.testing.assert_close(output, exact.bfloat16(), rtol=0, atol=0)


def test_every_setting_of_a_model_is_known_to_the_exported_code() -> None:
    for name in ("t", "s", "b", "l", "xl", "h", "g", "flash_t", "flash_s", "flash_b", "flash_l"):
        config = InternImageConfig.variant(name)
        with torch.device("meta"):
            ours = InternImage(config)
            theirs = InternImageModel(
                huggingface_config(Exportable(ours, config, ImageTransform(), ""))
            )
        shapes = {n: tuple(v.shape) for n, v in ours.state_dict().items()}
        assert {n: tuple(v.shape) for n, v in theirs.state_dict().items()} == shapes
        rates = [b.drop_path.drop_prob for s in ours.levels for b in s.blocks]  # type: ignore
        assert [b.drop_rate for s in theirs.levels for b in s.blocks] == rates  # type: ignore


# ---- which kernels ----


def test_the_model_says_which_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = InternImageModel(huggingface_config(exportable(SMALL))).eval()
    assert model.sampling.startswith("groundwork.kernels.dcnv3 (")
    model.set_sampling("standard")
    assert model.sampling == "standard operations of PyTorch (as asked for)"
    monkeypatch.setattr(layers_internimage, "dcnv3", None)  # as where it is not installed
    model.set_sampling("auto")
    assert model.sampling == "standard operations of PyTorch (no groundwork here)"
    model(images(1, 32, 32))
    with pytest.raises(ImportError, match="pip install groundwork-pretrain"):
        model.set_sampling("groundwork")
    with pytest.raises(ValueError, match="choose auto, groundwork or standard"):
        model.set_sampling("fast")


def test_the_two_kinds_of_sampling_have_the_same_gradients() -> None:
    subject = exportable(CONFIGS["l"])
    gradients = []
    for sampling in ("groundwork", "standard"):
        model = to_huggingface_internimage(subject, sampling=sampling)
        model(images()).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, fast in gradients[0].items():
        standard = gradients[1][name]
        assert fast is not None and standard is not None, name
        assert (fast - standard).norm() <= 2e-3 * max(1.0, float(standard.norm())), name


# ---- training ----


def classifier(config: InternImageConfig, **changes: Any) -> InternImageForImageClassification:
    torch.manual_seed(0)
    theirs = huggingface_config(exportable(config))
    for key, value in changes.items():
        setattr(theirs, key, value)
    model = InternImageForImageClassification(theirs)
    model.load_state_dict(randomised(config).state_dict())
    return model.train()


@pytest.mark.parametrize("name", ["l", "h", "flash t"])
def test_fine_tuning_learns_and_reaches_every_parameter(name: str) -> None:
    model = classifier(replace(CONFIGS[name], drop_path=0.0))
    x, labels = images(4, 32, 32), torch.tensor([0, 1, 2, 3])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        loss = model(x, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]


def test_losses_are_those_of_the_labels() -> None:
    model = classifier(SMALL).eval()
    x, labels = images(4, 32, 32), torch.tensor([0, 1, 6, 3])
    output = model(x, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    soft = F.one_hot(labels, 7) * 0.9 + 0.1 / 7
    torch.testing.assert_close(model(x, labels=soft).loss, F.cross_entropy(output.logits, soft))
    model.config.problem_type = "multi_label_classification"
    torch.testing.assert_close(
        model(x, labels=F.one_hot(labels, 7)).loss,
        F.binary_cross_entropy_with_logits(output.logits, F.one_hot(labels, 7).float()),
    )
    model.config.problem_type = "regression"
    numbers = torch.randn(4, 7)
    torch.testing.assert_close(model(x, labels=numbers).loss, F.mse_loss(output.logits, numbers))
    assert output.hidden_states is None
    assert len(model(x, output_hidden_states=True).hidden_states) == 4
    assert torch.equal(model(x, return_dict=False)[0], output.logits)


def test_checkpointing_activations_changes_no_gradient() -> None:
    gradients, forwards = [], []
    for checkpointing in (False, True):
        model = classifier(replace(SMALL, drop_path=0.3))
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls: list[int] = []
        block = model.levels[2].blocks[0]  # type: ignore[index, union-attr]
        assert isinstance(block, nn.Module)
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        model(images(), labels=torch.tensor([1, 2])).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        forwards.append(len(calls))
    assert forwards == [1, 2]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_bfloat16_stays_near_float32() -> None:
    for sampling in ("groundwork", "standard"):
        model = to_huggingface_internimage(exportable(CONFIGS["h"]), sampling=sampling)
        expected = model(images()).logits
        logits = model.bfloat16()(images()).logits
        assert logits.dtype == torch.bfloat16
        assert relative_error(logits, expected) < 0.05
        logits.float().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_new_model_starts_as_ours_does() -> None:
    config = replace(CONFIGS["l"], channels=32, groups=(2, 4, 8, 16))
    torch.manual_seed(0)
    model = InternImageModel(huggingface_config(exportable(config)))
    block = model.levels[3].blocks[0]  # type: ignore[index, union-attr]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)  # type: ignore
    assert block.gamma1.unique().tolist() == [0.5]  # type: ignore[union-attr, operator]
    for name, parameter in model.named_parameters():
        if ".dcn.offset." in name or ".dcn.mask." in name:
            assert parameter.count_nonzero() == 0, name
    xavier = (6 / (2 * 256)) ** 0.5
    weight = block.dcn.output_proj.weight  # type: ignore[union-attr]
    assert weight.abs().max().item() == pytest.approx(xavier, rel=0.01)  # type: ignore
    reference = InternImage(config)
    for name, parameter in reference.named_parameters():
        spread = dict(model.named_parameters())[name].std()
        if parameter.numel() > 500:
            assert float(spread) == pytest.approx(float(parameter.std()), rel=0.1), name


# ---- mistakes ----


def test_wrong_inputs_are_named_with_their_remedy() -> None:
    model = to_huggingface_internimage(exportable(CONFIGS["h"]))
    with pytest.raises(ValueError, match=r"shape \(1, 32, 32, 3\); expected \(B, 3, H, W\)"):
        model(torch.randn(1, 32, 32, 3))
    with pytest.raises(ValueError, match="multiples of 32"):
        model(torch.randn(1, 3, 37, 70))
    with pytest.raises(ValueError, match=r"out_features has \['stage5'\]; choose among stem"):
        TheirConfig(out_features=["stage5"])
    with pytest.raises(ValueError, match="give from_pretrained num_labels"):
        InternImageForImageClassification(huggingface_config(exportable(CONFIGS["t detection"])))
