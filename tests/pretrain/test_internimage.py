"""InternImage against the official code: names, sizes, results, and what training asks of it."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwork.pretrain.models.dcnv3_module import DCNv3
from groundwork.pretrain.models.internimage import (
    InternImage,
    InternImageConfig,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "internimage"
CASES = json.loads((GOLDEN / "cases.json").read_text())
MODELS = {case["name"].removeprefix("tiny_").removesuffix("_like"): case for case in CASES["model"]}
INVENTORY = json.loads(gzip.decompress((GOLDEN / "inventory.json.gz").read_bytes()))

#: The released models: parameters (1000 classes), those of stem and stages, state-dict tensors.
SIZES = {
    "t": (29_918_424, 28_754_672, 633),
    "s": (50_079_880, 48_502_560, 751),
    "b": (97_461_832, 94_909_920, 751),
    "l": (223_334_810, 218_952_370, 839),
    "xl": (334_819_780, 328_971_228, 883),
    "h": (1_089_636_760, 1_073_122_480, 1357),
    "g": (3_076_373_352, 3_052_781_184, 1295),
}

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance", "gradient_tolerance"),
    # float64 is limited by the rounding of the stored float32 results.
    [(torch.float64, 1e-6, 1e-6), (torch.float32, 1e-4, 1e-4)],
)


def load(name: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array) for key, array in np.load(GOLDEN / name).items()}


def official_config(name: str) -> InternImageConfig:
    """The golden model's official arguments, in our terms."""
    config, clip = (
        InternImageConfig.from_official(MODELS[name]["config"]),
        MODELS[name]["clip_head"],
    )
    if clip is None:
        return config
    return replace(
        config,
        clip_embed_dim=clip["embed_dim"],
        clip_num_heads=clip["num_heads"],
        clip_dim=clip["clip_dim"],
    )


def build_official(name: str, data: dict[str, Tensor], dtype: torch.dtype) -> InternImage:
    """The golden model with the golden weights, of which the file may hold a part."""
    model = InternImage(official_config(name)).to(dtype).eval()
    weights = {k.removeprefix("weight."): v for k, v in data.items() if k.startswith("weight.")}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model


def randomised(config: InternImageConfig, seed: int = 0) -> InternImage:
    """A model whose offsets, masks and scales are not at their initial zeros."""
    torch.manual_seed(seed)
    model = InternImage(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_equals(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.detach().double() - expected.double()).abs().max()
    assert error <= tolerance * max(1.0, float(expected.abs().max()))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


# ---- the official code ----


@pytest.mark.parametrize("variant", SIZES)
def test_names_and_shapes_are_those_of_the_released_weights(variant: str) -> None:
    with torch.device("meta"):
        model = InternImage(InternImageConfig.variant(variant))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == INVENTORY[variant]["state_dict"]
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    backbone = sum(n for k, n in parameters.items() if k.startswith(("patch_embed", "levels")))
    assert (sum(parameters.values()), backbone, len(shapes)) == SIZES[variant]


@DTYPES
@pytest.mark.parametrize("case", CASES["module"], ids=lambda case: case["name"])
def test_the_dcnv3_layer_computes_what_the_official_one_does(
    case: dict[str, Any], dtype: torch.dtype, tolerance: float, gradient_tolerance: float
) -> None:
    data = load(f"module_{case['name']}.npz")
    config = dict(case["config"])
    layer = DCNv3(groups=config.pop("group"), **config).to(dtype)
    layer.load_state_dict(
        {k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")}
    )
    x = data["input"].to(dtype).requires_grad_()
    output = layer(x)
    assert_equals(output, data["output"], tolerance)
    output.backward(data["grad_output"].to(dtype))
    assert x.grad is not None
    assert relative_error(x.grad, data["grad_input"]) < gradient_tolerance
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert relative_error(parameter.grad, data[f"grad.{name}"]) < gradient_tolerance, name


@DTYPES
def test_a_whole_model_computes_what_the_official_one_does(
    dtype: torch.dtype, tolerance: float, gradient_tolerance: float
) -> None:
    data = load("model_tiny_G_like.npz")
    model = build_official("G", data, dtype)
    x = data["input"].to(dtype).requires_grad_()
    _, _, *stages = model.features(x)
    for i, stage in zip((2, 3), stages, strict=True):
        assert_equals(stage.permute(0, 2, 3, 1), data[f"out.stage{i}_nodown"], tolerance)
    assert_equals(model.forward_features(x), data["out.pooled"], tolerance)
    logits = model(x)
    assert_equals(logits, data["out.logits"], tolerance)

    logits.backward(data["grad_logits"].to(dtype))
    norms = MODELS["G"]["grad_norm_per_parameter"]
    parameters = dict(model.named_parameters())
    assert set(norms) == set(parameters)
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        # Absolute below 1: some gradients are zero, as a constant on all logits of a query is.
        error = abs(float(parameter.grad.norm()) - norms[name])
        assert error <= gradient_tolerance * max(1.0, norms[name]), name
    for name in (key.removeprefix("grad.") for key in data if key.startswith("grad.")):
        grad = parameters[name].grad
        assert grad is not None
        assert relative_error(grad, data[f"grad.{name}"]) < gradient_tolerance, name


@DTYPES
@pytest.mark.parametrize("name", ["T", "L", "H"])
def test_the_first_stage_computes_what_the_official_one_does(
    name: str, dtype: torch.dtype, tolerance: float, gradient_tolerance: float
) -> None:
    data = load(f"model_tiny_{name}_like.npz")
    model = build_official(name, data, dtype)
    stem = model.patch_embed(data["input"].to(dtype))
    assert_equals(stem, data["out.stem"], tolerance)
    features, downsampled = model.levels[0](stem)
    assert_equals(features, data["out.stage0_nodown"], tolerance)
    if "out.level0_block0" in data:
        assert_equals(model.levels[0].blocks[0](stem), data["out.level0_block0"], tolerance)
    if "out.level0_out" in data:
        assert_equals(downsampled, data["out.level0_out"], tolerance)


@DTYPES
def test_the_convolutional_head_computes_what_the_official_one_does(
    dtype: torch.dtype, tolerance: float, gradient_tolerance: float, monkeypatch: Any
) -> None:
    data = load("model_tiny_L_like.npz")
    model = build_official("L", data, dtype)
    last = data["out.stage3_nodown"].to(dtype).permute(0, 3, 1, 2)
    monkeypatch.setattr(model, "features", lambda x: [last, last])
    assert_equals(model.forward_features(data["input"]), data["out.pooled"], tolerance)
    assert_equals(model(data["input"]), data["out.logits"], tolerance)


# ---- initialisation ----


def test_a_new_layer_averages_the_window_of_the_projected_input() -> None:
    torch.manual_seed(0)
    layer = DCNv3(8, 2, center_feature_scale=True)
    x = torch.randn(1, 6, 5, 8)
    projected = layer.input_proj(x)
    window = F.avg_pool2d(projected.permute(0, 3, 1, 2), 3, stride=1, padding=1)
    expected = layer.output_proj((window.permute(0, 2, 3, 1) + projected) / 2)
    torch.testing.assert_close(layer(x), expected)
    assert float(layer.input_proj.weight.detach().abs().max()) <= (6 / 16) ** 0.5


def test_initial_weights_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    model = InternImage(
        replace(official_config("L"), channels=32, groups=(2, 4, 8, 16), layer_scale=1e-5)
    )
    block = model.levels[3].blocks[0]
    assert float(block.mlp.fc1.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(model.head.weight.std()) == pytest.approx(0.02, rel=0.1)
    assert block.gamma1.unique().tolist() == [pytest.approx(1e-5)]
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "conv" not in name:
            assert parameter.count_nonzero() == 0, name
        if ".dcn.offset." in name or ".dcn.mask." in name:
            assert parameter.count_nonzero() == 0, name
    xavier = (6 / (2 * 256)) ** 0.5
    assert float(block.dcn.output_proj.weight.detach().abs().max()) == pytest.approx(
        xavier, rel=0.01
    )


@pytest.mark.parametrize(
    ("schedule", "expected"), [("linear", [0.0, 0.1, 0.2, 0.3, 0.4]), ("uniform", [0.4] * 5)]
)
def test_stochastic_depth_follows_its_schedule(schedule: Any, expected: list[float]) -> None:
    config = replace(official_config("T"), drop_path=0.4, drop_path_schedule=schedule)
    model = InternImage(config)
    rates = [block.drop_path.drop_prob for level in model.levels for block in level.blocks]
    assert rates == pytest.approx(expected)


# ---- what training asks of it ----


@pytest.mark.parametrize(
    ("name", "num_classes", "width"),
    [("T", 10, 192), ("T", 0, 128), ("L", 0, 128), ("G", 10, 48), ("G", 0, 48)],
)
def test_features_have_the_width_the_config_says(name: str, num_classes: int, width: int) -> None:
    config = replace(official_config(name), num_classes=num_classes)
    model = InternImage(config).eval()
    x = torch.randn(2, 3, 64, 32)
    features = model.forward_features(x)
    assert features.shape == (2, width)
    assert config.out_dim == model.out_dim == width
    if num_classes == 0:
        torch.testing.assert_close(model(x), features)


def test_without_a_head_features_are_the_mean_of_the_last_stage() -> None:
    model = randomised(replace(official_config("T"), num_classes=0)).eval()
    x = torch.randn(2, 3, 64, 64)
    stages = model.features(x)
    assert [tuple(s.shape[1:]) for s in stages] == [
        (16, 16, 16),
        (32, 8, 8),
        (64, 4, 4),
        (128, 2, 2),
    ]
    torch.testing.assert_close(model.forward_features(x), stages[-1].mean((2, 3)))


@pytest.mark.parametrize("name", ["T", "G"])
def test_an_image_alone_gets_the_logits_it_gets_in_a_batch(name: str) -> None:
    model = randomised(official_config(name)).double().eval()
    x = torch.randn(4, 3, 32, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]))


def test_odd_image_sizes_round_up_and_the_attention_pooling_refuses_them() -> None:
    stages = InternImage(official_config("T")).eval().features(torch.randn(1, 3, 37, 70))
    assert [tuple(s.shape[2:]) for s in stages] == [(10, 18), (5, 9), (3, 5), (2, 3)]
    with pytest.raises(ValueError, match=r"37×70 .* multiples of 32"):
        InternImage(official_config("G")).eval()(torch.randn(1, 3, 37, 70))


@pytest.mark.parametrize("name", ["L", "G"])
def test_checkpointing_changes_memory_and_nothing_else(name: str) -> None:
    config = replace(official_config(name), drop_path=0.5)
    gradients = []
    for checkpointing in (False, True):
        model = randomised(replace(config, activation_checkpointing=checkpointing))
        torch.manual_seed(1)
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["T", "L", "H", "G"])
def test_parameters_are_read_only_while_their_module_runs(name: str) -> None:
    """What ZeRO-3 demands: it gathers a module's own parameters for the time of its forward."""
    model = randomised(official_config(name)).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)

    def gather(kept: dict[nn.Parameter, Tensor]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            for parameter, data in kept.items():
                parameter.data = data

        return hook

    def release(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for module in model.modules():
        kept = {p: p.data for p in module.parameters(recurse=False)}
        module.register_forward_pre_hook(gather(kept))
        module.register_forward_hook(release)
        release(module)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["T", "L", "G"])
def test_fused_layers_train_as_the_plain_ones_do(name: str) -> None:
    """With the same samples dropped by stochastic depth."""
    config = replace(official_config(name), drop_path=0.3)
    results = []
    for backend in ("auto", "reference"):
        model = randomised(replace(config, kernel_backend=backend))
        torch.manual_seed(1)
        logits = model(torch.randn(3, 3, 32, 32))
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for fused, plain in zip(*results, strict=True):
        assert fused is not None
        assert plain is not None
        # absolute for the small: some gradients are zero, as that of a bias before a norm
        assert (fused - plain).norm() < 2e-3 * max(0.1, float(plain.norm()))


@pytest.mark.parametrize("act", [nn.ReLU, lambda: nn.GELU("tanh")])
def test_another_activation_runs_the_plain_layers(act: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    layer, x = DCNv3(8, 2, act=act), torch.randn(1, 5, 4, 8)
    plain = nn.Sequential(*layer.dw_conv)
    torch.testing.assert_close(layer.dw_conv(x), plain(x.permute(0, 3, 1, 2)), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_layer_compiles_without_graph_breaks(backend: str) -> None:
    torch.manual_seed(0)
    layer = DCNv3(8, 2, dw_kernel_size=5, center_feature_scale=True)
    for parameter in layer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(2, 5, 6, 8)
    results = []
    for function in (layer, compiled):
        layer.zero_grad()
        output = function(x)
        output.square().sum().backward()
        results.append((output.detach(), {k: p.grad for k, p in layer.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_whole_model_compiles_without_graph_breaks() -> None:
    model = randomised(replace(official_config("G"), drop_path=0.0)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["T", "G"])
def test_bfloat16_autocast_stays_near_float32(name: str) -> None:
    model = randomised(official_config(name)).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    assert relative_error(logits.detach(), expected.detach()) < 0.05
    logits.float().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_a_pure_bfloat16_model_runs_and_keeps_its_dtype() -> None:
    model = randomised(official_config("G")).eval().bfloat16()
    logits = model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16))
    logits.sum().backward()
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_a_small_model_learns_two_images_by_heart() -> None:
    torch.manual_seed(0)
    model = InternImage(
        replace(official_config("L"), layer_scale=1.0, num_classes=2, offset_scale=1.0)
    )
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 0])
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(15):
        loss = F.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss) < 0.05


# ---- mistakes ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (4, 4, 18)}, "depths has 3 stages, groups has 4"),
        ({"groups": (4, 8, 17, 32)}, r"groups\[2\] is 17, stage 2 has 256 channels"),
        ({"depths": (4, 0, 18, 4)}, "at least 1 block"),
        ({"channels": 63}, "give an even number"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"norm": "res_post_norm", "layer_scale": 1.0}, "set layer_scale to None"),
        ({"dw_kernel_size": 4}, "dw_kernel_size is 4"),
        ({"level2_post_norm_block_ids": (5, 18)}, r"names \[18\], .* blocks 0 to 17"),
        ({"use_clip_projector": True, "clip_num_heads": 15}, "not a multiple of clip_num_heads 15"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
    ],
)
def test_a_wrong_config_is_named_with_its_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InternImageConfig(**changes)


def test_wrong_inputs_are_named_with_their_remedy() -> None:
    model = InternImage(official_config("T"))
    with pytest.raises(ValueError, match=r"shape \(1, 32, 32, 3\); expected \(B, 3, H, W\)"):
        model(torch.randn(1, 32, 32, 3))
    with pytest.raises(ValueError, match=r"shape \(1, 3, 0, 32\); expected \(B, 3, H, W\)"):
        model(torch.zeros(1, 3, 0, 32))
    with pytest.raises(TypeError, match="x is uint8; expected pictures in floating point"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="10 channels in 4 groups"):
        DCNv3(10, 4)
    with pytest.raises(ValueError, match="give odd ones"):
        DCNv3(8, 4, kernel_size=4)
