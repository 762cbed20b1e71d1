"""Official InternImage checkpoints in every container: read strictly, and written back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundwork.pretrain.engine.checkpoint import CheckpointError
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.internimage_config import VARIANTS
from groundwork.pretrain.models.internimage_weights import OfficialWeightsError
from groundwork.pretrain.weights.internimage import (
    load_internimage,
    read_class_indices,
    save_internimage,
)

T_LIKE = InternImageConfig(
    num_classes=5, channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8), drop_path=0.0
)
L_LIKE = replace(T_LIKE, norm="post_norm", layer_scale=1e-5)
H_LIKE = replace(
    T_LIKE,
    channels=8,
    norm="res_post_norm",
    dw_kernel_size=5,
    center_feature_scale=True,
    level2_post_norm_block_ids=(1,),
    use_clip_projector=True,
    clip_embed_dim=32,
    clip_num_heads=4,
    clip_dim=24,
)
CONFIGS = {"T": T_LIKE, "L": L_LIKE, "H": H_LIKE}
HEAD = ("head.", "conv_head.", "fc_norm.", "clip_projector.", "dcnv3_head_x")

State = dict[str, Tensor]


def model_of(config: InternImageConfig, seed: int) -> InternImage:
    torch.manual_seed(seed)
    model = InternImage(config).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(value + torch.rand(value.shape) if value.is_floating_point() else value + 3)
    return model


def state_of(config: InternImageConfig, seed: int = 1) -> State:
    return {name: value.clone() for name, value in model_of(config, seed).state_dict().items()}


def assert_holds(model: InternImage, expected: State) -> None:
    state = model.official_state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=name)


def prefixed(prefix: str) -> Callable[[State], dict[str, Any]]:
    return lambda state: {prefix + name: value for name, value in state.items()}


def hugging_face(state: State) -> dict[str, Any]:
    renames = (("gamma1", "layer_scale1"), ("gamma2", "layer_scale2"))
    renamed = {}
    for name, value in state.items():
        for ours, theirs in renames:
            name = name.replace(ours, theirs)
        renamed[f"model.{name}"] = value
    return renamed


def student(state: State) -> dict[str, Any]:
    return {
        **{f"teacher.{name}": value + 1 for name, value in state.items()},
        **{f"student.{name}": value for name, value in state.items()},
        "student_proj.weight": torch.zeros(2, 2),
    }


CONTAINERS: dict[str, Callable[[State], dict[str, Any]]] = {
    "alone": lambda state: dict(state),
    "model": lambda state: {"model": state, "optimizer": {}, "epoch": 3},
    "deepspeed": lambda state: {"module": state, "global_steps": 7},
    "state_dict": lambda state: {"state_dict": state, "meta": {"CLASSES": ("a",)}},
    "nested": lambda state: {"model": {"module": state}},
    "data_parallel": prefixed("module."),
    "data_parallel_twice": lambda state: {"model": prefixed("module.module.")(state)},
    "hugging_face": hugging_face,
    "student": student,
    "teacher_alone": prefixed("teacher."),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_container_gives_the_weights(name: str, container: str) -> None:
    state = state_of(CONFIGS[name])
    model = model_of(CONFIGS[name], seed=2)
    report = model.load_official(CONTAINERS[container](state))
    assert_holds(model, state)
    assert report.initial == report.skipped == ()
    assert bool(report.dropped) == (container == "student")


def test_a_detectors_checkpoint_gives_its_backbone() -> None:
    config = L_LIKE.detection()
    state = state_of(config)
    values = {
        "state_dict": {
            **prefixed("backbone.")(state),
            "neck.lateral_convs.0.conv.weight": torch.zeros(1),
            "roi_head.bbox_head.fc_cls.weight": torch.zeros(1),
            "ema_backbone_patch_embed_conv1_weight": torch.zeros(1),
        }
    }
    model = model_of(config, seed=2)
    report = model.load_official(values)
    assert_holds(model, state)
    assert len(report.dropped) == 3


def test_the_joint_pre_training_gives_its_image_tower_and_classifier() -> None:
    """Whose names the official loader gets wrong: `fc_norm.weight` is no name of its model's."""
    state = state_of(H_LIKE)
    values: dict[str, Any] = {"mask_token": torch.zeros(4), "mm_dcnv3.weight": torch.zeros(1)}
    for name, value in state.items():
        if name.startswith("fc_norm.0."):
            values[name.replace("fc_norm.0.", "clip.classifier_ln.")] = value
        elif name.startswith("head."):
            values[name.replace("head.", "clip.classifier.")] = value
        elif name.startswith("clip_projector."):
            values[name] = value
        else:
            values[f"dcnv3.{name}"] = value
    values["clip.text.weight"] = torch.zeros(1)
    model = model_of(H_LIKE, seed=2)
    report = model.load_official({"module": values})
    assert_holds(model, state)
    assert set(report.dropped) == {"mask_token", "mm_dcnv3.weight", "clip.text.weight"}


# ---- heads ----


def test_classes_of_another_head_are_chosen_by_index() -> None:
    wide = state_of(replace(T_LIKE, num_classes=12))
    indices = [3, 11, 0, 7, 3]
    model = model_of(T_LIKE, seed=2)
    report = model.load_official({"model": wide}, class_indices=indices)
    expected = {
        **wide,
        "head.weight": wide["head.weight"][indices],
        "head.bias": wide["head.bias"][indices],
    }
    assert_holds(model, expected)
    assert report.initial == ()


@pytest.mark.parametrize(("rule", "factor"), [("skip", 1.0), ("zeros", 0.0), ("scaled", 0.001)])
def test_a_head_of_other_classes_starts_as_told(rule: Any, factor: float) -> None:
    wide = state_of(replace(T_LIKE, num_classes=12))
    model = model_of(T_LIKE, seed=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = model.load_official(wide, head=rule)
    expected = {
        **wide,
        "head.weight": before["head.weight"] * factor,
        "head.bias": before["head.bias"] * factor,
    }
    assert_holds(model, expected)
    assert set(report.skipped) == set(report.initial) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifiers_checkpoint_serves_a_detectors_backbone(name: str) -> None:
    """T has layer scales only there; ones compute the same."""
    config = CONFIGS[name]
    state = state_of(config)
    # as built: the layer scales are 1.0
    model = InternImage(config.detection()).eval()
    with pytest.raises(OfficialWeightsError, match="only the head differs: allow it with"):
        model.load_official(state)
    report = model.load_official({"model": state}, head="skip")
    gammas = tuple(n for n in model.state_dict() if n.endswith(("gamma1", "gamma2")))
    assert report.initial == (gammas if name == "T" else ())
    assert all(n.startswith(HEAD) for n in report.skipped)
    whole = InternImage(config).eval()
    whole.load_official(state)
    x = torch.randn(1, 3, 32, 32)
    for ours, theirs in zip(model.features(x), whole.features(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_backbone_alone_serves_a_new_classifier() -> None:
    state = {k: v for k, v in state_of(T_LIKE).items() if not k.startswith(HEAD)}
    model = model_of(T_LIKE, seed=2)
    report = model.load_official(state, head="zeros")
    assert all(n.startswith(HEAD) for n in report.initial)
    assert model.head.weight.count_nonzero() == 0
    assert model.conv_head is not None
    assert model.conv_head[0].weight.count_nonzero() > 0  # type: ignore[index]


def test_layer_scales_that_start_elsewhere_must_be_in_the_checkpoint() -> None:
    model = InternImage(replace(T_LIKE, layer_scale=1e-5))
    with pytest.raises(OfficialWeightsError, match=r"10 missing: levels\.0\.blocks\.0\.gamma1"):
        model.load_official(state_of(T_LIKE))


# ---- strictness ----


def test_what_does_not_fit_is_listed_and_nothing_is_copied() -> None:
    state = state_of(T_LIKE)
    del state["levels.1.blocks.0.mlp.fc1.bias"]
    state["levels.9.what"] = torch.zeros(1)
    state["patch_embed.conv1.weight"] = torch.zeros(8, 4, 3, 3)
    model = model_of(T_LIKE, seed=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(OfficialWeightsError) as error:
        model.load_official(state)
    for part in (
        "1 missing: levels.1.blocks.0.mlp.fc1.bias",
        "1 not in the model: levels.9.what",
        "1 of another shape: patch_embed.conv1.weight is (8, 4, 3, 3), the model's is (8, 3, 3, 3)",
        "set the model's config to the checkpoint's",
    ):
        assert part in str(error.value)
    assert_holds(model, before)


def test_batch_norms_keep_their_statistics_and_may_lack_a_counter() -> None:
    state = state_of(T_LIKE)
    del state["conv_head.1.0.num_batches_tracked"]
    model = model_of(T_LIKE, seed=2)
    report = model.load_official(state)
    assert report.initial == ("conv_head.1.0.num_batches_tracked",)
    torch.testing.assert_close(
        model.state_dict()["conv_head.1.0.running_var"], state["conv_head.1.0.running_var"]
    )
    del state["conv_head.1.0.running_var"]
    with pytest.raises(OfficialWeightsError, match=r"missing: conv_head\.1\.0\.running_var"):
        model.load_official(state)


def test_weights_with_the_centre_serve_a_model_without() -> None:
    """The mask's point 4 and the offset's (8, 9) go, of each group of nine points."""
    state = state_of(T_LIKE)
    model = model_of(replace(T_LIKE, remove_center=True), seed=2)
    model.load_official(state)
    for i, groups in enumerate(T_LIKE.groups):
        for leaf in ("weight", "bias"):
            name = f"levels.{i}.blocks.0.dcn.mask.{leaf}"
            kept = [k for k in range(groups * 9) if k % 9 != 4]
            torch.testing.assert_close(model.state_dict()[name], state[name][kept])
            name = f"levels.{i}.blocks.0.dcn.offset.{leaf}"
            kept = [k for k in range(groups * 18) if k % 18 not in (8, 9)]
            torch.testing.assert_close(model.state_dict()[name], state[name][kept])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 1], "class_indices has 2 entries, the model 5 classes"),
        ([0, 1, 2, 3, 12], r"class_indices names \[12\]; .* the rows 0 to 11"),
    ],
)
def test_wrong_class_indices_are_named(indices: list[int], message: str) -> None:
    model = model_of(T_LIKE, seed=2)
    with pytest.raises(OfficialWeightsError, match=message):
        model.load_official(state_of(replace(T_LIKE, num_classes=12)), class_indices=indices)


@pytest.mark.parametrize("values", [{}, {"model": {}}, {"epoch": 3}, {"model": {"a": "b"}}, [1]])
def test_what_holds_no_weights_is_refused(values: Any) -> None:
    with pytest.raises(OfficialWeightsError, match="not a state dict"):
        model_of(T_LIKE, seed=2).load_official(values)


@pytest.mark.parametrize("kind", ["meta", "integer", "complex"])
def test_what_is_no_weight_leaves_the_model_untouched(kind: str) -> None:
    model, state = model_of(T_LIKE, seed=2), state_of(T_LIKE)
    name = "levels.3.blocks.0.mlp.fc2.weight"
    wrong = {"meta": state[name].to("meta"), "integer": state[name].long()}
    state[name] = wrong.get(kind, state[name].to(torch.complex64))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(OfficialWeightsError, match=rf"no weights: {name}"):
        model.load_official(state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_rule_for_the_head_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="head is 'bogus'; choose from: same"):
        model_of(T_LIKE, seed=2).load_official(state_of(T_LIKE), head="bogus")  # type: ignore[arg-type]


# ---- files ----


@pytest.mark.parametrize("variant", [n for n in VARIANTS if not n.startswith("flash")])
def test_every_size_goes_out_and_comes_back(variant: str) -> None:
    """On the meta device; the names are held against the official inventories elsewhere."""
    with torch.device("meta"):
        first, second = (InternImage(InternImageConfig.variant(variant)) for _ in range(2))
    report = second.load_official({"model": first.official_state_dict()})
    assert report.initial == report.skipped == report.dropped == ()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_is_written_and_read_back(tmp_path: Path, suffix: str) -> None:
    model = model_of(H_LIKE, seed=1)
    path = tmp_path / "folder" / f"weights{suffix}"
    save_internimage(model, path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    values = (
        load_file(path)
        if suffix == ".safetensors"
        else torch.load(path, weights_only=True)["model"]
    )
    assert values.keys() == model.state_dict().keys()
    other = model_of(H_LIKE, seed=2)
    load_internimage(other, path)
    assert_holds(other, model.official_state_dict())
    with pytest.raises(CheckpointError, match=r"name it \.pth or \.safetensors"):
        save_internimage(model, tmp_path / "weights.bin")


def test_a_file_of_classes_maps_the_head(tmp_path: Path) -> None:
    wide = state_of(replace(T_LIKE, num_classes=12))
    weights, classes = tmp_path / "22k.safetensors", tmp_path / "map.txt"
    save_file(wide, weights)
    classes.write_text("3\n11\n0\n7\n3\n")
    model = model_of(T_LIKE, seed=2)
    load_internimage(model, weights, class_indices=classes)
    torch.testing.assert_close(model.head.bias, wide["head.bias"][[3, 11, 0, 7, 3]])
    with pytest.raises(CheckpointError, match=r"22k\.safetensors: .*only the head differs"):
        load_internimage(model, weights)


@pytest.mark.parametrize("text", ["1\nx\n", "1\n\n2\n", "-1\n"])
def test_a_wrong_line_of_classes_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.txt"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"map\.txt:\d: .* is no class; give one integer"):
        read_class_indices(path)


def test_partitioned_weights_are_not_handed_out() -> None:
    model = model_of(T_LIKE, seed=1)
    model.head.weight.ds_id = 0  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="1 parameters are partitioned over ranks by ZeRO-3"):
        model.official_state_dict()
