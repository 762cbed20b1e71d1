"""InternImage in standard ONNX operations, as onnxruntime runs them."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groundwork.data.transforms import ImageTransform
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.weights import export_onnx
from groundwork.pretrain.weights.export import export
from groundwork.pretrain.weights.export_error import ExportError
from groundwork.pretrain.weights.export_internimage import to_huggingface_internimage
from groundwork.pretrain.weights.export_onnx import largest_offset, write_onnx
from groundwork.pretrain.weights.exportable import (
    Exportable,
    ExportOptions,
    relative_difference,
)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CONFIG = InternImageConfig(num_classes=3, channels=16, depths=(1, 1, 1, 1), groups=(2, 4, 4, 8))
CLIP = replace(
    CONFIG,
    norm="res_post_norm",
    dw_kernel_size=5,
    center_feature_scale=True,
    level2_post_norm_block_ids=(0,),
    use_clip_projector=True,
    clip_embed_dim=64,
    clip_num_heads=4,
    clip_dim=48,
)
FLASH = replace(CONFIG, core="dcnv4", num_classes=0, remove_center=True, offset_scale=0.5)


def randomised(config: InternImageConfig) -> InternImage:
    torch.manual_seed(0)
    model = InternImage(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def exportable(model: InternImage) -> Exportable:
    return Exportable(model, model.config, ImageTransform(size=64), "Made for a test.")


def assert_runs_as(folder: Path, model: InternImage, *shape: int) -> None:
    """The outputs of the graph for random images are those of our model."""
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected: dict[str, Tensor] = {f"map{i}": m for i, m in enumerate(model.features(x))}
        expected["logits" if model.config.num_classes else "pooled"] = model(x)
    names = [output.name for output in session.get_outputs()]
    for name, value in zip(names, session.run(None, {"pixel_values": x.numpy()}), strict=True):
        assert relative_difference(torch.from_numpy(value), expected[name]) < 1e-4, name


@pytest.fixture(scope="module")
def model() -> InternImage:
    return randomised(CONFIG)


@pytest.fixture(scope="module")
def exported(model: InternImage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    write_onnx(exportable(model), folder, ExportOptions(features=True))
    return folder


def test_any_batch_and_size_computes_what_ours_does(exported: Path, model: InternImage) -> None:
    # offsets of pixels, not the zeros of a new model
    hf = to_huggingface_internimage(exportable(model))
    assert largest_offset(hf, torch.randn(1, 3, 64, 64)) > 1
    assert_runs_as(exported, model, 2, 3, 64, 96)
    assert_runs_as(exported, model, 1, 3, 128, 32)
    assert_runs_as(exported, model, 3, 3, 32, 32)
    assert json.loads((exported / "config.json").read_text())["outputs"] == [
        *("logits", "map0", "map1", "map2", "map3"),
    ]


def test_the_graph_has_standard_operations_only(exported: Path) -> None:
    graph = onnx.load(exported / "model.onnx")
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert [(o.domain, o.version) for o in graph.opset_import if o.domain == ""] == [("", 18)]
    assert "GridSample" in {node.op_type for node in graph.graph.node}
    assert not graph.functions
    (pixels,) = graph.graph.input
    dims = [d.dim_param or d.dim_value for d in pixels.type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "32*h", "32*w"]


def test_the_graph_says_nothing_of_this_machine(exported: Path) -> None:
    content = (exported / "model.onnx").read_bytes()
    for trace in (sys.prefix, str(Path.cwd()), "site-packages", ".py"):
        assert trace.encode() not in content, trace


def test_a_new_model_is_tried_with_offsets_that_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All samples of a new model lie on pixels, where a wrong interpolation would not show."""
    tried = []

    def require(graph: Any, names: Any, probe: Tensor, *_: Any) -> None:
        tried.append(largest_offset(graph.model, probe))

    monkeypatch.setattr(export_onnx, "_require_equal", require)
    write_onnx(exportable(InternImage(CONFIG).eval()), tmp_path, ExportOptions())
    assert len(tried) == 2
    assert tried[0] > 1
    assert tried[1] == 0


def test_a_graph_that_computes_otherwise_is_refused(
    exported: Path, model: InternImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_another(_graph: Any, _names: Any, _probe: Any, _opset: int, folder: Path) -> None:
        (folder / "model.onnx").write_bytes((exported / "model.onnx").read_bytes())

    monkeypatch.setattr(export_onnx, "_save", save_another)
    changed = randomised(CONFIG)
    with torch.no_grad():
        changed.levels[0].blocks[0].dcn.mask.bias.normal_()  # type: ignore
    with pytest.raises(ExportError, match=r"onnxruntime differs by .* nothing was written"):
        export(exportable(changed), tmp_path / "out", "onnx", ExportOptions(features=True))
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: InternImage
) -> None:
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'groundwork-pretrain\[onnx\]'"):
        write_onnx(exportable(model), tmp_path, ExportOptions())


@pytest.mark.parametrize("opset", [15, 99])
def test_an_opset_without_the_operations_is_named(opset: int) -> None:
    with pytest.raises(ExportError, match="choose 16 to 23"):
        ExportOptions(opset=opset)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CLIP, FLASH], ids=["h", "flash"])
def test_the_other_kinds_are_exported_with_weights_of_any_size(
    config: InternImageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomised(config)
    if config is FLASH:
        monkeypatch.setattr(export_onnx, "LARGEST_BYTES", 1000)
    options = ExportOptions(features=True, opset=20)
    differences = export(exportable(model), tmp_path / "out", "onnx", options)
    assert max(differences.values()) <= 1e-4
    assert_runs_as(tmp_path / "out", model, 1, 3, 96, 64)
    assert (tmp_path / "out" / "model.onnx.data").is_file() == (config is FLASH)
    export(exportable(model), tmp_path / "out", "groundwork")  # an export of ours is replaced
    assert not (tmp_path / "out" / "model.onnx").exists()


@pytest.mark.slow
def test_the_same_model_gives_the_same_graph(
    exported: Path, model: InternImage, tmp_path: Path
) -> None:
    write_onnx(exportable(model), tmp_path, ExportOptions(features=True))
    again, first = (p / "model.onnx" for p in (tmp_path, exported))
    assert again.read_bytes() == first.read_bytes()
