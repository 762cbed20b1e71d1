"""Export folders: what is in them, who can load them, and what is refused."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from groundwork.data.transforms import ImageTransform
from groundwork.pretrain.engine.checkpoint import CheckpointError
from groundwork.pretrain.models.clip_text import TextConfig
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.klite import InternImageTower, KliteConfig, build_klite
from groundwork.pretrain.weights import export as exports
from groundwork.pretrain.weights.export import FORMATS, export
from groundwork.pretrain.weights.export_error import ExportError
from groundwork.pretrain.weights.export_groundwork import load_groundwork
from groundwork.pretrain.weights.export_official import load_official_folder, official_arguments
from groundwork.pretrain.weights.exportable import (
    Exportable,
    ExportOptions,
    relative_difference,
)

CONFIG = InternImageConfig(
    num_classes=3, channels=16, depths=(1, 1, 1, 1), groups=(2, 4, 4, 8), drop_path=0.0
)
LABELS = ("disc", "bar", "ring")


@pytest.fixture(autouse=True, scope="module")
def own_code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies the code of a folder to a cache of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


def randomised(config: InternImageConfig) -> InternImage:
    torch.manual_seed(0)
    model = InternImage(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        if model.conv_head is not None:
            model.conv_head[1][0].running_mean.normal_()
    return model.eval()


def exportable(config: InternImageConfig = CONFIG, **changes: Any) -> Exportable:
    labels = LABELS if config.num_classes == 3 else ()
    subject = Exportable(
        randomised(config), config, ImageTransform(size=64), "Made for a test.", labels=labels
    )
    return replace(subject, **changes)


def written(subject: Exportable, kind: str, folder: Path, **options: Any) -> Path:
    """What a format writes, without the check in a fresh process."""
    folder.mkdir(parents=True)
    FORMATS[subject.config.kind][kind].write(subject, folder, ExportOptions(**options))
    return folder


def images(batch: int = 2, height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def backbone_of(folder: Path, **options: Any) -> Any:
    """AutoBackbone.from_pretrained asks the Hub about every name, and knows no local folder."""
    code = get_class_from_dynamic_module("modeling_internimage.InternImageBackbone", str(folder))
    return code.from_pretrained(folder, **options).eval()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert relative_difference(actual, expected) <= 1e-5


@pytest.fixture(scope="module")
def subject() -> Exportable:
    return exportable(licence="apache-2.0")


@pytest.fixture(scope="module")
def exported(subject: Exportable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real thing: loaded in fresh processes with and without groundwork."""
    out = tmp_path_factory.mktemp("exports") / "hf"
    differences = export(subject, out, "hf")
    assert differences.keys() == {"with groundwork", "without groundwork"}
    assert max(differences.values()) <= 1e-5
    return out


# ---- transformers ----


def test_the_automatic_classes_load_the_folder(exported: Path, subject: Exportable) -> None:
    x, ours = images(), subject.model
    assert isinstance(ours, InternImage)
    model = AutoModel.from_pretrained(exported, trust_remote_code=True).eval()
    classifier = AutoModelForImageClassification.from_pretrained(exported, trust_remote_code=True)
    backbone = backbone_of(exported)
    with torch.no_grad():
        output, maps = model(x), ours.features(x)
        assert_near(output.logits, ours(x))
        assert_near(output.pooler_output, ours.forward_features(x))
        for got, expected in zip(output.hidden_states, maps, strict=True):
            assert_near(got, expected)
        assert_near(classifier.eval()(x).logits, ours(x))
        for got, expected in zip(backbone(x).feature_maps, maps, strict=True):
            assert_near(got, expected)
    assert classifier.config.id2label == dict(enumerate(LABELS))
    assert backbone.channels == [16, 32, 64, 128]
    assert sum(p.numel() for p in backbone.parameters()) < sum(
        p.numel() for p in model.parameters()
    )


def test_a_backbone_gives_the_chosen_stages(exported: Path, subject: Exportable) -> None:
    """As timm's features_only with out_indices."""
    backbone = backbone_of(exported, out_features=["stem", "stage2", "stage4"])
    with torch.no_grad():
        stem, *chosen = backbone(images()).feature_maps
        maps = subject.model.features(images())  # type: ignore[operator]
    assert stem.shape == (2, 16, 16, 24)
    assert_near(chosen[0], maps[1])
    assert_near(chosen[1], maps[3])
    assert backbone.channels == [16, 32, 128]
    assert backbone.out_indices == [0, 2, 4]
    others = backbone_of(exported, out_indices=[1, -1])
    assert others.out_features == ["stage1", "stage4"]
    assert [m.shape[1] for m in others(images()).feature_maps] == [16, 128]


def test_without_groundwork_the_folder_stands_alone(exported: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['groundwork'] = None\n"
        "import torch\n"
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(exported)!r}, trust_remote_code=True).eval()\n"
        "assert model.sampling.startswith('standard operations of PyTorch (no groundwork')\n"
        "assert [m for m in sys.modules if m.startswith('groundwork.')] == []\n"
        "model(torch.zeros(1, 3, 32, 32)).logits.sum().backward()\n"
        "assert all(p.grad is not None for p in model.parameters())\n"
        "print('alone')\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("alone\n"), done.stderr
    assert "pip install groundwork-pretrain" in done.stderr  # not silently


def test_code_is_run_only_where_it_is_trusted(exported: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(exported, trust_remote_code=False)


def test_a_saved_model_loads_again(exported: Path, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(exported, trust_remote_code=True)
    with torch.no_grad():
        model.head.bias.add_(1.0)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageClassification.from_pretrained(
        tmp_path / "saved", trust_remote_code=True
    )
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(images()).logits, model.eval()(images()).logits, rtol=0, atol=0
        )
    saved = AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    for name in ("depths", "groups", "norm", "layer_scale", "id2label", "out_features"):
        assert getattr(saved, name) == getattr(model.config, name), name
    fresh = AutoBackbone.from_config(saved, trust_remote_code=True)
    assert [m.shape[1] for m in fresh(images()).feature_maps] == [16, 32, 64, 128]


def test_a_new_head_is_put_on_for_other_classes(exported: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(
        exported, trust_remote_code=True, num_labels=5, ignore_mismatched_sizes=True
    )
    assert model(images()).logits.shape == (2, 5)
    kept = load_file(exported / "model.safetensors")
    for name, value in model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(value, kept[name]), name
    assert 0.01 < model.head.weight.std() < 0.03


def test_a_backbone_without_a_head_gets_one_on_request(tmp_path: Path) -> None:
    subject = exportable(replace(CONFIG, num_classes=0))
    folder = written(subject, "hf", tmp_path / "backbone")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert model.config.num_labels == 0
    assert model.eval()(images()).logits is None
    with pytest.raises(ValueError, match="give from_pretrained num_labels"):
        AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    fresh = AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=True, num_labels=4
    )
    assert fresh(images()).logits.shape == (2, 4)


def test_weights_load_in_bfloat16(exported: Path, subject: Exportable) -> None:
    model = AutoModel.from_pretrained(exported, trust_remote_code=True, dtype="bfloat16").eval()
    with torch.no_grad():
        logits, expected = model(images().bfloat16()).logits, subject.model(images())
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()


def test_the_processor_gives_the_pixels_of_our_evaluation(exported: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(exported, backend="pil")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    levels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float()
    expected = (levels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(pixels[0], expected)


# ---- what is in a folder ----


def test_the_weights_have_the_official_names_and_nothing_is_pickled(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
        *("configuration_internimage.py", "layers_internimage.py", "modeling_internimage.py"),
    }
    model = randomised(CONFIG)
    model.load_state_dict(load_file(exported / "model.safetensors"), strict=True)
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "internimage"
    assert set(config["auto_map"]) == {
        *("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoBackbone"),
    }


def test_the_model_card_says_what_one_needs(subject: Exportable, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    for part in ("pipeline_tag: image-classification", 'license: "apache-2.0"', "Made for a test."):
        assert part in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    picture = Image.new("RGB", (80, 70), (200, 40, 40))
    known: dict[str, Any] = {"DIR": str(exported), "picture": picture}
    exec(code[1], known)  # the card's own words
    assert known["output"].logits.shape == (1, 3)


@pytest.mark.parametrize("kind", ["hf", "groundwork", "official"])
def test_the_same_model_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    pth = kind == "official"
    folders = [written(exportable(), kind, tmp_path / n, pth=pth) for n in ("first", "second")]
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]


# ---- our own and the official form ----


def test_our_own_form_loads_again(tmp_path: Path) -> None:
    subject = exportable()
    model = load_groundwork(written(subject, "groundwork", tmp_path / "ours"))
    assert isinstance(model, InternImage)
    assert model.config == CONFIG
    with torch.no_grad():
        assert torch.equal(model(images()), subject.model(images()))


def test_a_folder_that_is_no_export_of_ours_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_groundwork(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "onnx"}')
    with pytest.raises(CheckpointError, match="no export of --format groundwork"):
        load_groundwork(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "groundwork", "model": {"kind": "vit"}}')
    with pytest.raises(CheckpointError, match=r"model.kind is 'vit'; this version knows klite"):
        load_groundwork(tmp_path)


def test_the_official_form_has_the_official_container_and_arguments(tmp_path: Path) -> None:
    subject = exportable()
    folder = written(subject, "official", tmp_path / "official", pth=True)
    container = torch.load(folder / "model.pth", weights_only=True)
    assert list(container) == ["model"]
    assert {n: tuple(v.shape) for n, v in container["model"].items()} == {
        n: tuple(v.shape) for n, v in subject.model.state_dict().items()
    }
    arguments = json.loads((folder / "config.json").read_text())["arguments"]
    assert arguments["core_op"] == "DCNv3"
    assert arguments["channels"] == 16
    with torch.no_grad():
        assert torch.equal(load_official_folder(folder)(images()), subject.model(images()))


@pytest.mark.parametrize("variant", ["t", "s", "b", "l", "xl", "h", "g", "flash_t", "flash_l"])
def test_the_official_arguments_make_the_same_model(variant: str) -> None:
    config = InternImageConfig.variant(variant)
    arguments = json.loads(json.dumps(official_arguments(config)))
    assert InternImageConfig.from_official(arguments) == config


def test_official_arguments_are_those_of_the_released_models(shared_golden: Path) -> None:
    summary = json.loads((shared_golden / "internimage/inventory/summary.json").read_text())
    for name, entry in summary.items():
        variant = name.split("_")[1]
        ours = official_arguments(InternImageConfig.variant(variant))
        for argument, value in entry["config"].items():
            assert ours.get(argument, value) == value, (name, argument)


def test_what_the_official_constructor_has_built_in_cannot_be_exported() -> None:
    config = replace(CONFIG, use_clip_projector=True, clip_embed_dim=64, clip_num_heads=4)
    with pytest.raises(ExportError, match="1024 with 16 built in"):
        official_arguments(config)


# ---- image-text models ----


def image_text(image: Any) -> Exportable:
    from groundwork.data.text import train_tokenizer
    from groundwork.pretrain.models.klite import Klite

    tokenizer = train_tokenizer(["a red disc", "a blue bar", "knowledge of rings"], 600, 16)
    text = TextConfig(
        vocab_size=tokenizer.vocab_size, context_length=16, width=16, layers=1, heads=2
    )
    config = KliteConfig(image=image, text=text, projection_dim=8)
    torch.manual_seed(0)
    model = build_klite(config).eval()
    assert isinstance(model, Klite)
    return Exportable(model, config, ImageTransform(size=64), "Made.", None, tokenizer)


TOWER = InternImageTower(**{**asdict(CONFIG), "num_classes": 0, "image_size": 64})


def test_an_image_text_model_over_internimage_keeps_our_own_form(tmp_path: Path) -> None:
    subject = image_text(TOWER)
    differences = export(subject, tmp_path / "out", "groundwork")
    assert max(differences.values()) <= 1e-5
    with pytest.raises(ExportError, match=r"no internimage image model; use --format groundwork"):
        export(subject, tmp_path / "hf", "hf")
    with pytest.raises(ExportError, match=r"not for the model klite, which has hf, groundwork"):
        export(subject, tmp_path / "onnx", "onnx")


def test_an_image_text_model_over_swin_needs_no_code_of_ours(tmp_path: Path) -> None:
    from groundwork.pretrain.models.swin import SwinConfig

    swin = SwinConfig(
        image_size=64, embed_dim=12, depths=(2, 1), num_heads=(2, 4), window_size=4, drop_path=0.0
    )
    differences = export(image_text(swin), tmp_path / "out", "hf")
    assert max(differences.values()) <= 1e-5
    assert not list((tmp_path / "out").glob("*.py"))


# ---- what is refused ----


def test_a_folder_of_others_is_kept(tmp_path: Path, subject: Exportable) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="holds something else, which would be lost"):
        export(subject, tmp_path, "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_export_that_computes_otherwise_is_not_kept(
    tmp_path: Path, subject: Exportable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reloaded(folder: Path, kind: str, check: Any, probe: Any) -> dict[str, Tensor]:
        values = exports.image_model_outputs(subject.model, probe)
        return {name: value + 1e-3 for name, value in values.items()}

    monkeypatch.setattr(exports, "_reloaded", reloaded)
    with pytest.raises(ExportError, match=r"differs by .* after reloading with groundwork"):
        export(subject, tmp_path / "out", "groundwork")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("tensorflow", {}, "unknown; choose among hf, groundwork, official, onnx"),
        ("hf", {"pth": True}, "--pth: of --format official only, not of hf"),
        ("official", {"features": True}, "--features: of --format onnx only, not of official"),
    ],
)
def test_wrong_options_are_named(
    kind: str, options: dict[str, Any], message: str, tmp_path: Path, subject: Exportable
) -> None:
    with pytest.raises(ExportError, match=message):
        export(subject, tmp_path / "out", kind, ExportOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_labels_must_be_as_many_as_the_classes() -> None:
    with pytest.raises(ExportError, match="2 labels are given, the model has 3 classes"):
        exportable(labels=("disc", "bar"))
