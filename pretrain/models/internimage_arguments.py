"""The arguments of the official InternImage constructors, in our terms."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

#: Arguments that mean the same here: our names and their types.
RENAMED: Final[Mapping[str, tuple[str, Any]]] = {
    "num_classes": ("num_classes", int),
    "channels": ("channels", int),
    "depths": ("depths", tuple[int, ...]),
    "groups": ("groups", tuple[int, ...]),
    "mlp_ratio": ("mlp_ratio", float),
    "layer_scale": ("layer_scale", float | None),
    "offset_scale": ("offset_scale", float),
    "use_clip_projector": ("use_clip_projector", bool),
    "center_feature_scale": ("center_feature_scale", bool),
    "remove_center": ("remove_center", bool),
    "cls_scale": ("cls_scale", float),
    "drop_rate": ("drop_rate", float),
    "drop_path_rate": ("drop_path", float),
    "drop_path_type": ("drop_path_schedule", str),
    "with_cp": ("activation_checkpointing", bool),
    "mlp_fc2_bias": ("mlp_fc2_bias", bool),
    "dcn_output_bias": ("dcn_output_bias", bool),
}

#: Arguments that need a word of translation: their types.
TRANSLATED: Final[Mapping[str, Any]] = {
    "core_op": str,
    "act_layer": str,
    "norm_layer": str,
    "dw_kernel_size": int | None,
    "frozen_stages": int,
    "post_norm": bool,
    "res_post_norm": bool,
    "level2_post_norm": bool,
    "level2_post_norm_block_ids": tuple[int, ...] | None,
}

#: Accepted without effect. The choice of kernels and of feature maps, and where weights come from,
#: are not the model's here; the rest is what configuration files carry besides.
IGNORED: Final = (
    *("use_dcn_v4_op", "out_indices", "init_cfg", "pretrained", "type", "in_chans", "im2col_step"),
    *("_name_or_path", "architectures", "auto_map", "model_type", "torch_dtype", "dtype"),
    *("transformers_version", "id2label", "label2id"),
)

CORES: Final[Mapping[str, str]] = {
    "DCNv3": "dcnv3",
    "DCNv3_pytorch": "dcnv3",
    "DCNv4": "dcnv4",
}


def official_fields(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an InternImageConfig for the arguments of an official constructor.

    kwargs: of InternImage, of its detection form (without `num_classes`, which is then 1000: see
    `InternImageConfig.detection`) or of FlashInternImage (`core_op: DCNv4`), which has other
    defaults. What is not given has the official default. Raises ValueError for arguments that are
    unknown, of another type, or contradict each other; `IGNORED` has no effect.
    """
    _check_names(kwargs)
    kwargs = _of_their_types(kwargs)
    core = _one_of(CORES, "core_op", kwargs.get("core_op", "DCNv3"))
    is_flash = core == "dcnv4"
    fields: dict[str, Any] = {
        "core": core,
        "depths": (3, 4, 18, 5),
        "groups": (3, 6, 12, 24),
        "offset_scale": 0.5 if is_flash else 1.0,
        "drop_path": 0.2,
        "mlp_fc2_bias": not is_flash,
        "dcn_output_bias": not is_flash,
    }
    for official, (ours, _) in RENAMED.items():
        if official in kwargs:
            fields[ours] = kwargs[official]
    acts = {"GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}
    fields["act"] = _one_of(acts, "act_layer", kwargs.get("act_layer", "GELU"))
    if kwargs.get("norm_layer", "LN") != "LN":
        raise ValueError(
            f"from_official: norm_layer is {kwargs['norm_layer']!r}; only 'LN' is there, the norm "
            "of every published model"
        )
    dw_kernel_size = kwargs.get("dw_kernel_size")
    fields["dw_kernel_size"] = 3 if dw_kernel_size is None and not is_flash else dw_kernel_size
    fields["frozen_stages"] = max(kwargs.get("frozen_stages", -1), 0)
    fields["norm"] = _norm(kwargs)
    if kwargs.get("level2_post_norm"):
        ids = kwargs.get("level2_post_norm_block_ids")
        if not ids:
            raise ValueError(
                "from_official: level2_post_norm without level2_post_norm_block_ids; name the "
                "blocks of the third stage, 5, 11, 17, ... in H and G"
            )
        fields["level2_post_norm_block_ids"] = ids
    return fields


def _norm(kwargs: Mapping[str, Any]) -> str:
    if kwargs.get("post_norm"):
        if kwargs.get("res_post_norm"):
            raise ValueError(
                "from_official: both post_norm and res_post_norm; the official block would then "
                "have norms that it never runs, set one of the two"
            )
        return "post_norm"
    if kwargs.get("res_post_norm"):
        if kwargs.get("layer_scale") is not None:
            raise ValueError(
                "from_official: res_post_norm with a layer_scale; the official block would then "
                "have norms that it never runs, set one of the two"
            )
        return "res_post_norm"
    return "pre_norm"


def _check_names(kwargs: Mapping[str, Any]) -> None:
    known = [*RENAMED, *TRANSLATED, *IGNORED]
    for name in kwargs:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"from_official: {name!r} is no argument of the official constructors{hint} "
                f"(known: {', '.join(sorted([*RENAMED, *TRANSLATED]))})"
            )


def _of_their_types(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not ignored; lists become tuples."""
    types = {name: kind for name, (_, kind) in RENAMED.items()} | dict(TRANSLATED)
    typed = {}
    for name, value in kwargs.items():
        if name not in types:
            continue
        try:
            typed[name] = TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            raise ValueError(
                f"from_official: {name} is {value!r}: {error.errors()[0]['msg']}"
            ) from error
    return typed


def _one_of(choices: Mapping[str, str], name: str, value: Any) -> str:
    if value not in choices:
        raise ValueError(
            f"from_official: {name} is {value!r}; choose from: {', '.join(map(repr, choices))}"
        )
    return choices[value]
