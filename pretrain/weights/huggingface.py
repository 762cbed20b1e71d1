"""K-LITE -> transformers: a `VisionTextDualEncoderModel` of a Swin and a CLIP text model.

Both towers exist in transformers, so an export needs no code of ours to load:
`VisionTextDualEncoderModel.from_pretrained(DIR)`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from groundwork.data.text import ClipTokenizer
from groundwork.data.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from groundwork.pretrain.models.clip_text import EPSILON, TextConfig
from groundwork.pretrain.models.klite import Klite, KliteConfig
from groundwork.pretrain.models.swin import SwinConfig
from groundwork.pretrain.weights.export_error import ExportError

#: Part of a Swin block: our name -> transformers' name.
BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
#: Part of a text block: our name -> transformers' name.
TEXT_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def to_huggingface(model: Klite, config: KliteConfig, tokenizer: ClipTokenizer) -> Any:
    """The same model as a transformers module, in float32."""
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    if not isinstance(config.image, SwinConfig):
        raise ExportError(
            f"--format hf: transformers has no {config.image.kind} image model; use "
            "--format groundwork, which writes every model"
        )
    if not config.text.autoregressive:
        raise ExportError(
            "--format hf: transformers' CLIP text model is causal, this one is bidirectional "
            "(model.text.autoregressive: false); use --format groundwork"
        )
    _check_windows(config.image)
    hf = VisionTextDualEncoderModel(
        VisionTextDualEncoderConfig(
            vision_config=_swin_config(config.image),
            text_config=_text_config(config.text, tokenizer, config.projection_dim),
            projection_dim=config.projection_dim,
        )
    )
    hf.load_state_dict(_state(model.state_dict()), strict=True)
    return hf.eval()


def image_processor(transform: ImageTransform) -> Any:
    """transformers' processor with this transform's evaluation protocol.

    Its options do not reach two roundings. The torchvision backend, which transformers takes where
    it can, resizes one or two of 255 levels apart from Pillow; loaded with `backend="pil"` it gives
    our pixels. Either backend crops one pixel further left (or up) where the longer side exceeds
    `size` by 3, 7, 11, ...: torchvision, whose CenterCrop we follow, rounds half a pixel to even.
    """
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": transform.size},
        crop_size={"height": transform.size, "width": transform.size},
        resample=int(transform.filter),
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )


def _check_windows(config: SwinConfig) -> None:
    with_blocks = [stage for stage, depth in enumerate(config.depths) if depth]
    smallest = config.image_size // config.patch_size // 2 ** max(with_blocks, default=0)
    if smallest < config.window_size:
        raise ExportError(
            f"--format hf: a stage is {smallest} x {smallest}, below the window of "
            f"{config.window_size}; transformers keeps the larger bias table there. Use "
            "--format groundwork"
        )


def _swin_config(config: SwinConfig) -> dict[str, Any]:
    return {
        "model_type": "swin",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": config.window_size,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": True,
        "drop_path_rate": config.drop_path,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def _text_config(
    config: TextConfig, tokenizer: ClipTokenizer, projection_dim: int
) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context_length,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": EPSILON,
        "projection_dim": projection_dim,
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": 0,
    }


def _state(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, and split the fused projections into query, key and value, in this order."""
    state: dict[str, Tensor] = {}
    for name, value in ours.items():
        tower, _, rest = name.partition(".")
        if tower == "visual":
            _add_visual(state, rest, value)
        elif tower == "text":
            _add_text(state, rest, value)
        elif name == "logit_scale":
            state[name] = value
        elif name == "vision_projection":
            state["visual_projection.weight"] = value.T.contiguous()
        elif name == "text_projection":
            state["text_projection.weight"] = value.T.contiguous()
        else:
            raise ExportError(f"--format hf: no place for parameter {name!r}")
    return state


def _add_visual(state: dict[str, Tensor], name: str, value: Tensor) -> None:
    parts = name.split(".")
    if name.startswith("patch_embed.proj."):
        state[f"vision_model.embeddings.patch_embeddings.projection.{parts[-1]}"] = value
    elif name.startswith("patch_embed.norm."):
        state[f"vision_model.embeddings.norm.{parts[-1]}"] = value
    elif name.startswith("norm."):
        state[f"vision_model.layernorm.{parts[-1]}"] = value
    elif parts[2] == "downsample":
        state[f"vision_model.encoder.{name}"] = value
    else:
        block, part = ".".join(parts[:4]), ".".join(parts[4:])
        prefix = f"vision_model.encoder.{block}"
        if part.startswith("attn.qkv."):
            for which, piece in zip("qkv", value.chunk(3), strict=True):
                state[f"{prefix}.attention.{which}_proj.{parts[-1]}"] = piece.clone()
        elif part == "attn.relative_position_bias_table":
            place = "attention.relative_position_bias.relative_position_bias_table"
            state[f"{prefix}.{place}"] = value
        else:
            state[f"{prefix}.{BLOCK['.'.join(parts[4:-1])]}.{parts[-1]}"] = value


def _add_text(state: dict[str, Tensor], name: str, value: Tensor) -> None:
    parts = name.split(".")
    if name == "token_embedding.weight":
        state["text_model.embeddings.token_embedding.weight"] = value
    elif name == "positional_embedding":
        state["text_model.embeddings.position_embedding.weight"] = value
    elif parts[0] == "ln_final":
        state[f"text_model.final_layer_norm.{parts[-1]}"] = value
    else:
        prefix, part = f"text_model.encoder.layers.{parts[1]}", ".".join(parts[2:])
        if part.startswith("attn.in_proj_"):
            kind = part.removeprefix("attn.in_proj_")
            for which, piece in zip("qkv", value.chunk(3), strict=True):
                state[f"{prefix}.self_attn.{which}_proj.{kind}"] = piece.clone()
        else:
            state[f"{prefix}.{TEXT_BLOCK['.'.join(parts[2:-1])]}.{parts[-1]}"] = value


@torch.no_grad()
def embed(hf: Any, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised image and text features of a transformers model. pixels: (B, 3, S, S)."""
    image = hf.get_image_features(pixel_values=pixels).pooler_output
    text = hf.get_text_features(input_ids=ids).pooler_output
    return torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)
