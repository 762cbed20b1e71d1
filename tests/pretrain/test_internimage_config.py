"""What an InternImage is made of: sizes, official arguments, detection forms, mistakes."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.internimage_config import VARIANTS

GOLDEN = Path(__file__).parents[1] / "golden" / "internimage"
INVENTORY = json.loads(gzip.decompress((GOLDEN / "inventory.json.gz").read_bytes()))

T = {
    **{"core_op": "DCNv3", "channels": 64, "depths": [4, 4, 18, 4], "groups": [4, 8, 16, 32]},
    **{"mlp_ratio": 4.0, "norm_layer": "LN", "offset_scale": 1.0, "drop_path_rate": 0.1},
}
L = {
    **{"channels": 160, "depths": [5, 5, 22, 5], "groups": [10, 20, 40, 80], "layer_scale": 1e-5},
    **{"offset_scale": 2.0, "post_norm": True, "drop_path_rate": 0.1},
}
H = {
    **{"channels": 320, "depths": [6, 6, 32, 6], "groups": [10, 20, 40, 80], "layer_scale": None},
    **{"res_post_norm": True, "dw_kernel_size": 5, "use_clip_projector": True},
    **{"level2_post_norm": True, "level2_post_norm_block_ids": [5, 11, 17, 23, 29]},
    **{"center_feature_scale": True, "drop_path_rate": 0.2, "num_classes": 1000},
}
TINY = InternImageConfig(
    num_classes=3, channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8), drop_path=0.4
)

#: The sections of the official configuration files, in lower case as its builder passes them.
FLASH = {
    "flash_t": {
        **{"core_op": "DCNv4", "channels": 64, "depths": [4, 4, 18, 4]},
        **{"groups": [4, 8, 16, 32], "offset_scale": 1.0, "drop_path_rate": 0.1},
    },
    "flash_s": {
        **{"core_op": "DCNv4", "channels": 80, "depths": [4, 4, 21, 4], "dw_kernel_size": 3},
        **{"groups": [5, 10, 20, 40], "offset_scale": 1.0, "drop_path_rate": 0.4},
        **{"layer_scale": 1e-5, "post_norm": True},
    },
    "flash_b": {
        **{"core_op": "DCNv4", "channels": 112, "depths": [4, 4, 21, 4], "dw_kernel_size": 3},
        **{"groups": [7, 14, 28, 56], "offset_scale": 0.5, "drop_path_rate": 0.5},
        **{"layer_scale": 1e-5, "post_norm": True},
    },
    "flash_l": {
        **{"core_op": "DCNv4", "channels": 160, "depths": [5, 5, 22, 5], "dw_kernel_size": 3},
        **{"groups": [10, 20, 40, 80], "offset_scale": 2.0, "drop_path_rate": 0.1},
        **{"layer_scale": 1e-5, "post_norm": True, "dcn_output_bias": True, "mlp_fc2_bias": True},
    },
}


@pytest.mark.parametrize(("name", "arguments"), [("t", T), ("l", L), ("h", H)])
def test_the_official_arguments_give_the_variant(name: str, arguments: dict[str, Any]) -> None:
    assert InternImageConfig.from_official(arguments) == InternImageConfig.variant(name)


@pytest.mark.parametrize("name", FLASH)
def test_the_official_arguments_of_flash_give_the_variant(name: str) -> None:
    assert InternImageConfig.from_official(FLASH[name]) == InternImageConfig.variant(name)


def test_official_defaults_hold_for_what_is_not_given() -> None:
    # the default groups do not divide the default channels
    config = InternImageConfig.from_official({"channels": 48})
    assert (config.depths, config.groups) == ((3, 4, 18, 5), (3, 6, 12, 24))
    assert (config.offset_scale, config.drop_path, config.num_classes) == (1.0, 0.2, 1000)
    flash = InternImageConfig.from_official({"core_op": "DCNv4", "groups": [4, 8, 16, 32]})
    assert (flash.offset_scale, flash.mlp_fc2_bias, flash.dw_kernel_size) == (0.5, False, None)


def test_every_official_argument_has_its_effect_or_is_ignored() -> None:
    config = InternImageConfig.from_official(
        {
            **T,
            **{"core_op": "DCNv3_pytorch", "act_layer": "SiLU", "drop_path_type": "uniform"},
            **{"with_cp": True, "drop_rate": 0.1, "cls_scale": 2.0, "remove_center": True},
            **{"layer_scale": 0.5, "num_classes": 7, "frozen_stages": 2, "mlp_ratio": 2.0},
            # ignored
            **{"out_indices": (1, 2, 3), "init_cfg": None, "use_dcn_v4_op": True},
            # switched off by level2_post_norm
            **{"level2_post_norm": False, "level2_post_norm_block_ids": [5]},
            **{"model_type": "internimage", "frozen_stages": -1},
        }
    )
    assert config == InternImageConfig(
        act="silu",
        drop_path_schedule="uniform",
        activation_checkpointing=True,
        drop_rate=0.1,
        cls_scale=2.0,
        remove_center=True,
        layer_scale=0.5,
        num_classes=7,
        mlp_ratio=2.0,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"chanels": 64},
            r"'chanels' is no argument .* did you mean 'channels'\? \(known: .*with_cp",
        ),
        (
            {"core_op": "DCNv2"},
            "core_op is 'DCNv2'; choose from: 'DCNv3', 'DCNv3_pytorch', 'DCNv4'",
        ),
        ({"act_layer": "Tanh"}, "act_layer is 'Tanh'; choose from: 'GELU', 'ReLU', 'SiLU'"),
        ({"norm_layer": "BN"}, "norm_layer is 'BN'; only 'LN'"),
        ({"depths": 3}, "depths is 3: Input should be a valid tuple"),
        ({"mlp_ratio": None}, "mlp_ratio is None: Input should be a valid number"),
        ({"frozen_stages": "two"}, "frozen_stages is 'two': Input should be a valid integer"),
        ({"core_op": []}, r"core_op is \[\]: Input should be a valid string"),
        ({"level2_post_norm": True}, "without level2_post_norm_block_ids"),
        ({"post_norm": True, "res_post_norm": True}, "set one of the two"),
        ({"res_post_norm": True, "layer_scale": 1.0}, "set one of the two"),
    ],
)
def test_official_arguments_that_cannot_be_are_named(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        InternImageConfig.from_official(T | arguments)


def test_a_config_is_read_strictly_from_a_recipe() -> None:
    adapter = TypeAdapter(InternImageConfig)
    values = {"kind": "internimage", "channels": 80, "groups": [5, 10, 20, 40], "core": "dcnv4"}
    assert adapter.validate_python(values) == InternImageConfig(
        channels=80, groups=(5, 10, 20, 40), core="dcnv4"
    )
    assert get_args(get_type_hints(InternImageConfig)["kind"]) == ("internimage",)


def test_an_unknown_variant_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'huge'; choose from: t, s, b, l, xl, h, g, flash_t"):
        InternImageConfig.variant("huge")


# ---- detection forms ----


@pytest.mark.parametrize("name", VARIANTS)
def test_the_detection_form_has_the_backbone_alone(name: str) -> None:
    config = InternImageConfig.variant(name).detection(drop_path=0.3)
    with torch.device("meta"):
        model = InternImage(config)
    state = model.state_dict()
    assert all(key.startswith(("patch_embed.", "levels.")) for key in state)
    has_gammas = any(key.endswith(".gamma1") for key in state)
    assert has_gammas == (name not in ("h", "g"))
    assert config.layer_scale == (1.0 if has_gammas else None)
    assert config.drop_path == 0.3
    if name in INVENTORY:
        official = INVENTORY[name]["state_dict"]
        backbone = {k for k in official if k.startswith(("patch_embed.", "levels."))}
        added = set(state) - backbone
        assert backbone <= set(state)
        # T alone has none in its classification form
        assert bool(added) == (name == "t")
        assert all(key.endswith((".gamma1", ".gamma2")) for key in added)


def test_frozen_stages_neither_train_nor_drop_paths() -> None:
    model = InternImage(TINY.detection(frozen_stages=2))
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert {n.split(".blocks")[0].split(".downsample")[0] for n in frozen} >= {
        "levels.0",
        "levels.1",
    }
    assert all(n.startswith(("patch_embed.", "levels.0.", "levels.1.")) for n in frozen)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(n.startswith(("levels.2.", "levels.3.")) for n in trained)
    for mode in (True, False):
        model.train(mode)
        assert model.training == mode
        assert model.levels[2].training == mode
        assert not model.levels[1].blocks[0].drop_path.training
    sum(m.sum() for m in model.train().features(torch.randn(1, 3, 32, 32))).backward()
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())


# ---- options ----


@pytest.mark.parametrize(("act", "module"), [("relu", nn.ReLU), ("silu", nn.SiLU)])
def test_the_activation_is_that_of_the_config_everywhere(act: Any, module: type) -> None:
    model = InternImage(replace(TINY, act=act)).eval()
    acts = [m for m in model.modules() if isinstance(m, (nn.ReLU, nn.SiLU, nn.GELU))]
    # stem, head, and in each of five blocks the DCN and the MLP
    assert len(acts) == 2 + 2 * 5
    assert all(type(m) is module for m in acts)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dw_kernel_size": None}, "dw_kernel_size is None, and core is 'dcnv3'"),
        ({"dcn_output_bias": False}, "dcn_output_bias is false, and core is 'dcnv3'"),
        ({"frozen_stages": 5}, r"frozen_stages is 5; give 0 \(none\) to 4"),
        ({"cls_scale": 0.0}, "it must be above 0"),
        ({"mlp_ratio": -1.0}, "it must be above 0"),
    ],
)
def test_a_wrong_option_is_named_with_its_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InternImageConfig(**changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "post-norm"}, "norm is 'post-norm'; choose from: pre_norm"),
        ({"core": "DCNv4"}, "core is 'DCNv4'; choose from: dcnv3, dcnv4"),
        ({"act": "swish"}, "act is 'swish'; choose from: gelu"),
        ({"drop_path_schedule": "cos"}, "drop_path_schedule is 'cos'"),
        ({"kernel_backend": "cuda2"}, "kernel_backend is 'cuda2'; choose from: auto, cuda"),
        ({"offset_scale": 0.0}, "offset_scale is 0.0; it must be above 0"),
        ({"mlp_ratio": 1e-9}, "leaves an MLP of 64 channels no hidden one"),
        ({"layer_scale": float("nan")}, "layer_scale is nan"),
        ({"dw_kernel_size": -1}, "dw_kernel_size is -1"),
        ({"level2_post_norm_block_ids": (1, 1)}, "name each block once"),
        ({"use_clip_projector": True, "clip_num_heads": 0}, "clip_num_heads 0"),
    ],
)
def test_what_no_model_can_be_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InternImageConfig(**settings)
