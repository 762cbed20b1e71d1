"""Official K-LITE / UniCL checkpoints: every layout is read, nothing in them is run, and back."""

import json
import os
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundwork.pretrain.engine.checkpoint import CheckpointError
from groundwork.pretrain.models.clip_text import TextConfig
from groundwork.pretrain.models.klite import Klite, KliteConfig, build_klite
from groundwork.pretrain.models.swin import SwinConfig
from groundwork.pretrain.weights.official import (
    load_into,
    load_official,
    our_name,
    resize_bias_table,
    resize_positions,
    to_official,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "klite"
TENSORS = load_file(GOLDEN / "model.safetensors")
#: An official state dict, its buffers included.
OFFICIAL = {k.removeprefix("weight."): v for k, v in TENSORS.items() if k.startswith("weight.")}

CONFIG = KliteConfig(
    image=SwinConfig(
        image_size=64,
        embed_dim=12,
        depths=(1, 1),
        num_heads=(2, 4),
        window_size=4,
        mlp_ratio=2.0,
        drop_path=0.0,
    ),
    text=TextConfig(vocab_size=100, context_length=16, width=32, layers=2, heads=4),
    projection_dim=24,
)


def check_features(model: Klite) -> None:
    with torch.no_grad():
        features = model.eval()(TENSORS["input.image"], TENSORS["input.ids"])
    for name in ("image", "text", "scale"):
        value = getattr(features, name)
        expected = TENSORS["output.scale" if name == "scale" else f"output.{name}_features"]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def sibling_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the UniCL class, as its training saves them under DistributedDataParallel."""
    renames = {
        "visual": "image_encoder",
        "text": "lang_encoder",
        "vision_projection": "image_projection",
        "text_projection": "lang_projection",
    }
    result = {}
    for name, value in state.items():
        first, dot, rest = name.partition(".")
        result[f"module.{renames.get(first, first)}{dot}{rest}"] = value
    return result


def save_flat(path: Path) -> Path:
    torch.save(OFFICIAL, path / "model_state_dict.pt")
    return path / "model_state_dict.pt"


def save_nested(path: Path) -> Path:
    torch.save({"model": OFFICIAL, "epoch": 31, "max_accuracy": 0.5}, path / "checkpoint.pth")
    return path / "checkpoint.pth"


def save_sibling(path: Path) -> Path:
    torch.save({"model": sibling_names(OFFICIAL)}, path / "unicl.pth")
    return path / "unicl.pth"


def save_safetensors(path: Path) -> Path:
    save_file(OFFICIAL, path / "model.safetensors")
    return path / "model.safetensors"


def save_one_element_scale(path: Path) -> Path:
    torch.save(OFFICIAL | {"logit_scale": OFFICIAL["logit_scale"].reshape(1)}, path / "scale.pt")
    return path / "scale.pt"


@pytest.mark.parametrize(
    "save", [save_flat, save_nested, save_sibling, save_safetensors, save_one_element_scale]
)
def test_every_official_layout_gives_the_official_features(
    save: Callable[[Path], Path], tmp_path: Path
) -> None:
    state = load_official(save(tmp_path))
    assert not any("relative_position_index" in name or "attn_mask" in name for name in state)
    assert state["logit_scale"].shape == ()
    model = build_klite(CONFIG)
    load_into(model, state)
    check_features(model)


@pytest.mark.parametrize(
    ("official", "ours"),
    [
        ("module.module.visual.norm.weight", "visual.norm.weight"),
        ("image_encoder.layers.0.blocks.1.attn.qkv.bias", "visual.layers.0.blocks.1.attn.qkv.bias"),
        ("lang_encoder.resblocks.3.ln_1.bias", "text.resblocks.3.ln_1.bias"),
        ("image_projection", "vision_projection"),
        ("lang_projection", "text_projection"),
        ("logit_scale", "logit_scale"),
        ("visual.image_encoder.weight", "visual.image_encoder.weight"),
    ],
)
def test_names_of_the_sibling_class_become_ours(official: str, ours: str) -> None:
    assert our_name(official) == ours


def test_a_model_goes_out_under_the_official_names_with_the_official_buffers(
    tmp_path: Path,
) -> None:
    model = build_klite(CONFIG)
    load_into(model, load_official(save_flat(tmp_path)))
    back = to_official(model)
    assert back.keys() == OFFICIAL.keys()
    for name, value in OFFICIAL.items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=0)
    assert not any(value.requires_grad for value in back.values())


PUBLISHED = {
    "klite_swin_tiny": SwinConfig(),
    "klite_swin_base": SwinConfig(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_go_out_with_every_official_key(name: str) -> None:
    inventory = json.loads((GOLDEN / f"{name}.keys.json").read_text())
    with torch.device("meta"):
        model = build_klite(KliteConfig(image=PUBLISHED[name], text=TextConfig(vocab_size=49408)))
    assert {k: list(v.shape) for k, v in to_official(model).items()} == inventory["shapes"]


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("raw", [False, True], ids=["torch", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(raw: bool, tmp_path: Path) -> None:
    path, made = tmp_path / "bad.pt", tmp_path / "made"
    values = {"model": OFFICIAL, "extra": Payload(made)}
    if raw:
        path.write_bytes(pickle.dumps(values["extra"]))
    else:
        torch.save(values, path)
    with pytest.raises(CheckpointError, match=r"bad\.pt: holds more than tensors and numbers"):
        load_official(path)
    assert not made.exists()


def test_a_training_checkpoint_may_carry_its_yacs_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CfgNode(dict[str, Any]):
        def __init__(self, values: dict[str, Any]) -> None:
            super().__init__(values)
            self.__dict__["__immutable__"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    config = types.ModuleType("yacs.config")
    config.CfgNode = CfgNode  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", config)
        nested = CfgNode({"MODEL": CfgNode({"NAME": "swin"}), "EPOCHS": 32})
        torch.save({"model": OFFICIAL, "config": nested}, tmp_path / "full.pth")
    assert load_official(tmp_path / "full.pth").keys() < OFFICIAL.keys()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("page.pt", b"<html>404</html>", "no checkpoint at all"),
        ("empty.pt", b"", "cannot be read"),
        ("cut.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "cannot be read"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_official(tmp_path / name)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save_flat(tmp_path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"model_state_dict\.pt: cannot be read"):
        load_official(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "holds no state dict"),
        ([torch.zeros(2)], "holds no state dict"),
        ({"weights": {"a": torch.zeros(1)}, "epoch": 3}, "weights, epoch hold no tensors"),
        (
            {"visual.norm.bias": torch.zeros(1), "image_encoder.norm.bias": torch.zeros(1)},
            r"two of its tensors are named visual\.norm\.bias",
        ),
    ],
)
def test_what_is_no_state_dict_is_refused(values: Any, message: str, tmp_path: Path) -> None:
    torch.save(values, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=message):
        load_official(tmp_path / "odd.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pt: no such file"):
        load_official(tmp_path / "absent.pt")


def test_missing_unexpected_and_misshaped_tensors_are_named_together() -> None:
    state = dict(build_klite(CONFIG).state_dict())
    state["visual.head.weight"] = state.pop("visual.norm.weight")
    state["text_projection"] = torch.zeros(32, 8)
    model = build_klite(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(model, state, "unicl.pth")
    message = str(caught.value)
    assert message.startswith("unicl.pth: of another model")
    assert "1 missing: visual.norm.weight" in message
    assert "1 not in the model: visual.head.weight" in message
    assert "text_projection is (32, 8), the model's is (32, 24)" in message
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_another_depth_is_refused_with_a_short_list() -> None:
    deeper = build_klite(replace(CONFIG, text=replace(CONFIG.text, layers=3)))
    with pytest.raises(CheckpointError, match=r"12 missing: .* and 6 more\. Set the sections"):
        load_into(deeper, build_klite(CONFIG).state_dict())


def cubic(x: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def naive_resize_matrix(old: int, new: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(new, old): bicubic along one axis, pixel centres at k + 1/2, edges repeated."""
    matrix = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        for k in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            matrix[i, min(max(k, 0), old - 1)] += cubic(at - k)
    return matrix


@pytest.mark.parametrize(("old_window", "new_window"), [(7, 12), (12, 7), (4, 2), (1, 4), (7, 8)])
def test_bias_tables_are_resized_bicubically_head_by_head(old_window: int, new_window: int) -> None:
    old, new, heads = 2 * old_window - 1, 2 * new_window - 1, 3
    table = torch.randn(old**2, heads, generator=torch.Generator().manual_seed(0))
    matrix = naive_resize_matrix(old, new)
    grid = table.double().numpy().reshape(old, old, heads)
    expected = np.einsum("ai,bj,ijh->abh", matrix, matrix, grid).reshape(new**2, heads)
    actual = resize_bias_table(table, new)
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    centre = actual[new**2 // 2]  # the bias of a token for itself
    torch.testing.assert_close(centre, table[old**2 // 2], rtol=1e-5, atol=1e-6)


def test_a_model_of_another_window_and_image_size_takes_the_weights(tmp_path: Path) -> None:
    state = load_official(save_flat(tmp_path))
    larger = replace(CONFIG, image=replace(CONFIG.image, image_size=96, window_size=6))
    model = build_klite(larger)
    load_into(model, state)
    for stage in (0, 1):
        name = f"visual.layers.{stage}.blocks.0.attn.relative_position_bias_table"
        assert model.state_dict()[name].shape == (121, CONFIG.image.num_heads[stage])
        torch.testing.assert_close(model.state_dict()[name], resize_bias_table(state[name], 11))
    assert model.eval()(image=torch.randn(1, 3, 96, 96)).isfinite().all()


def test_a_table_with_other_heads_is_not_resized() -> None:
    state = build_klite(CONFIG).state_dict()
    name = "visual.layers.0.blocks.0.attn.relative_position_bias_table"
    state[name] = torch.zeros(121, 3)
    with pytest.raises(
        CheckpointError, match=r"bias_table is \(121, 3\), the model's is \(49, 2\)"
    ):
        load_into(build_klite(CONFIG), state)


def test_texts_that_fit_a_shorter_context_keep_their_features_exactly(tmp_path: Path) -> None:
    state = load_official(save_flat(tmp_path))
    full, short = (
        build_klite(CONFIG),
        build_klite(replace(CONFIG, text=replace(CONFIG.text, context_length=14))),
    )
    load_into(full, state)
    load_into(short, state)
    ids = TENSORS["input.ids"][1:]
    assert (ids[:, 14:] == 0).all()
    expected = full.eval()(ids=ids)
    torch.testing.assert_close(short.eval()(ids=ids[:, :14]), expected, rtol=1e-6, atol=1e-6)


def test_a_longer_context_stretches_the_positions() -> None:
    table = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    expected = naive_resize_matrix(16, 40) @ table.double().numpy()
    actual = resize_positions(table, 40)
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    model = build_klite(replace(CONFIG, text=replace(CONFIG.text, context_length=40)))
    state = build_klite(CONFIG).state_dict()
    load_into(model, state)
    resized = resize_positions(state["text.positional_embedding"], 40)
    torch.testing.assert_close(model.state_dict()["text.positional_embedding"], resized)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_load(dtype: torch.dtype, tmp_path: Path) -> None:
    halves = {k: v.to(dtype) if v.is_floating_point() else v for k, v in OFFICIAL.items()}
    torch.save(halves, tmp_path / "half.pt")
    larger = replace(CONFIG, image=replace(CONFIG.image, window_size=8))
    model = build_klite(larger)
    load_into(model, load_official(tmp_path / "half.pt"))
    assert model.vision_projection.dtype == torch.float32
    torch.testing.assert_close(
        model.vision_projection.detach(), OFFICIAL["vision_projection"], rtol=2**-8, atol=1e-6
    )
