"""InternImage against all outputs and gradients of the official code, in both precisions.

The whole models are kept beside the repository; `test_internimage.py` has the part within it.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from groundwork.pretrain.models.dcnv3_module import DCNv3
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig

MODELS = ("tiny_T_like", "tiny_L_like", "tiny_H_like", "tiny_G_like")
MODULES = (
    *("dcnv3_basic", "dcnv3_os2_dw5", "dcnv3_center_scale", "dcnv3_remove_center"),
    "dcnv3_k5_silu",
)

#: Tolerances of the outputs, absolute and times the largest value, and of gradients, relative.
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance", "gradient_tolerance"),
    [(torch.float64, 2e-6, 2e-6), (torch.float32, 1e-4, 1e-3)],
    ids=["float64", "float32"],
)
BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])


@pytest.fixture(scope="module")
def golden(shared_golden: Path) -> Path:
    return shared_golden / "internimage"


@pytest.fixture(scope="module")
def manifest(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "manifest.json").read_text())


def case(manifest: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    (found,) = (entry for entry in manifest[kind] if entry["name"] == name)
    return found


def arrays(path: Path) -> dict[str, Tensor]:
    return {key: torch.from_numpy(array) for key, array in np.load(path).items()}


def assert_near(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((actual.detach().double() - expected.double()).abs().max())
    assert error <= tolerance * max(1.0, float(expected.abs().max())), (name, error)


def assert_gradient(name: str, actual: Tensor | None, expected: Tensor, tolerance: float) -> None:
    assert actual is not None, name
    difference = float((actual.double() - expected.double()).norm())
    # absolute for what is zero by its nature, as of a bias added to all logits of a query
    assert difference <= tolerance * max(float(expected.double().norm()), 1e-3), name


def golden_model(
    golden: Path, manifest: dict[str, Any], name: str, backend: str
) -> tuple[InternImage, dict[str, Any]]:
    entry = case(manifest, "model", name)
    config = InternImageConfig.from_official(entry["config"])
    if entry["clip_head"]:
        head = entry["clip_head"]
        config = replace(
            config,
            clip_embed_dim=head["embed_dim"],
            clip_num_heads=head["num_heads"],
            clip_dim=head["clip_dim"],
        )
    model = InternImage(replace(config, kernel_backend=backend)).eval()
    report = model.load_official(load_file(golden / entry["weights"]))
    # the golden weights have no such counters
    assert all(n.endswith("num_batches_tracked") for n in report.initial)
    return model, entry


@BACKENDS
@PRECISIONS
@pytest.mark.parametrize("name", MODELS)
def test_every_block_and_every_gradient_is_that_of_the_official_code(
    golden: Path,
    manifest: dict[str, Any],
    name: str,
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    gradient_tolerance: float,
) -> None:
    model, entry = golden_model(golden, manifest, name, backend)
    model = model.to(dtype)
    data = arrays(golden / entry["data"])
    seen: dict[str, Tensor] = {}

    def keep(key: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[key] = output[1] if isinstance(output, tuple) else output

        return hook

    model.patch_embed.register_forward_hook(keep("out.stem"))
    for i, level in enumerate(model.levels):
        level.register_forward_hook(keep(f"out.level{i}_out"))
        for j, block in enumerate(level.blocks):
            block.register_forward_hook(keep(f"out.level{i}_block{j}"))
    x = data["input"].to(dtype).requires_grad_()
    logits = model(x)
    seen["out.logits"] = logits
    logits.backward(data["grad_logits"].to(dtype))
    with torch.no_grad():
        seen["out.pooled"] = model.forward_features(x)
        for i, stage in enumerate(model.features(x)):
            seen[f"out.stage{i}_nodown"] = stage.permute(0, 2, 3, 1)
    # The official block output precedes the post norm, as ours does.
    expected = {key for key in data if key.startswith("out.")}
    assert seen.keys() == expected
    for key in expected:
        assert_near(key, seen[key], data[key], tolerance)

    parameters = dict(model.named_parameters())
    norms = entry["grad_norm_per_parameter"]
    assert parameters.keys() == norms.keys()
    assert_gradient("input", x.grad, data["grad_input"], gradient_tolerance)
    for key in (key for key in data if key.startswith("grad.")):
        gradient = parameters[key.removeprefix("grad.")].grad
        assert_gradient(key, gradient, data[key], gradient_tolerance)
    for key, norm in norms.items():
        gradient = parameters[key].grad
        assert gradient is not None, key
        error = abs(float(gradient.double().norm()) - norm)
        assert error <= gradient_tolerance * max(norm, 1e-3), (key, error)


@BACKENDS
@PRECISIONS
@pytest.mark.parametrize("name", MODULES)
def test_the_layer_is_that_of_the_official_code(
    golden: Path,
    manifest: dict[str, Any],
    name: str,
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    gradient_tolerance: float,
) -> None:
    entry = case(manifest, "module", name)
    config = dict(entry["config"])
    config["groups"] = config.pop("group")
    config.pop("pad", None)  # ours keeps the size
    if config.pop("act_layer", "GELU") == "SiLU":
        config["act"] = nn.SiLU
    layer = DCNv3(**config, backend=backend).to(dtype)
    data = arrays(golden / entry["file"])
    layer.load_state_dict(
        {k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")}
    )
    x = data["input"].to(dtype).requires_grad_()
    output = layer(x)
    assert_near("output", output, data["output"], tolerance)
    output.backward(data["grad_output"].to(dtype))
    assert_gradient("input", x.grad, data["grad_input"], gradient_tolerance)
    for key, parameter in layer.named_parameters():
        assert_gradient(key, parameter.grad, data[f"grad.{key}"], gradient_tolerance)


def test_all_released_sizes_have_the_official_names_shapes_and_counts(golden: Path) -> None:
    summary = json.loads((golden / "inventory" / "summary.json").read_text())
    assert len(summary) == 7
    for name, expected in summary.items():
        config = InternImageConfig.from_official(expected["config"])
        assert config == InternImageConfig.variant(name.split("_")[1])
        with torch.device("meta"):
            model = InternImage(config)
        inventory = json.loads((golden / "inventory" / f"{name}.json").read_text())["state_dict"]
        state = model.official_state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == inventory
        assert sum(p.numel() for p in model.parameters()) == expected["n_params"]
        assert len(state) == expected["n_tensors"]
