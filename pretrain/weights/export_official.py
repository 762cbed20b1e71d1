"""`--format official`: InternImage under the names of the official code, which loads it."""

import json
from pathlib import Path
from typing import Any

import torch

from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.internimage_arguments import RENAMED
from groundwork.pretrain.weights.export_error import ExportError
from groundwork.pretrain.weights.export_groundwork import CONFIG, WEIGHTS, save_weights
from groundwork.pretrain.weights.exportable import Exportable, ExportOptions
from groundwork.pretrain.weights.internimage import load_internimage

PTH = "model.pth"


def write_official(subject: Exportable, folder: Path, options: ExportOptions) -> None:
    """The weights, and the arguments of the official constructor that make the model for them.

    The .pth file holds plain tensors under the key `model`, as official checkpoints do.
    """
    assert isinstance(subject.model, InternImage)
    assert isinstance(subject.config, InternImageConfig)
    arguments = official_arguments(subject.config)
    state = subject.model.official_state_dict()
    save_weights(state, folder / WEIGHTS)
    if options.pth:
        plain = {name: value.cpu().contiguous().clone() for name, value in state.items()}
        torch.save({"model": plain}, folder / PTH)
    config = {"format": "official", "arguments": arguments, "image_size": subject.image.size}
    if subject.labels:
        config["labels"] = list(subject.labels)
    (folder / CONFIG).write_text(json.dumps(config, indent=1), "utf-8")


def official_arguments(config: InternImageConfig) -> dict[str, Any]:
    """The official constructor's arguments; `InternImageConfig.from_official` is the way back."""
    if config.use_clip_projector and (config.clip_embed_dim, config.clip_num_heads) != (1024, 16):
        raise ExportError(
            f"--format official: clip_embed_dim is {config.clip_embed_dim} with "
            f"{config.clip_num_heads} heads; the official constructor has 1024 with 16 built in. "
            "Use --format groundwork or hf"
        )
    if config.use_clip_projector and config.clip_dim != 768:
        raise ExportError(
            f"--format official: clip_dim is {config.clip_dim}, the official constructor has 768 "
            "built in. Use --format groundwork or hf"
        )
    is_flash = config.core == "dcnv4"
    arguments: dict[str, Any] = {"core_op": "DCNv4" if is_flash else "DCNv3", "norm_layer": "LN"}
    for official, (ours, _) in RENAMED.items():
        value = getattr(config, ours)
        if official in ("mlp_fc2_bias", "dcn_output_bias"):
            if not is_flash:
                continue  # arguments of FlashInternImage only
        elif official in ("with_cp", "cls_scale"):
            continue
        arguments[official] = list(value) if isinstance(value, tuple) else value
    arguments["cls_scale"] = config.cls_scale
    arguments["act_layer"] = {"gelu": "GELU", "relu": "ReLU", "silu": "SiLU"}[config.act]
    arguments["dw_kernel_size"] = config.dw_kernel_size
    arguments["post_norm"] = config.norm == "post_norm"
    arguments["res_post_norm"] = config.norm == "res_post_norm"
    if config.level2_post_norm_block_ids:
        arguments["level2_post_norm"] = True
        arguments["level2_post_norm_block_ids"] = list(config.level2_post_norm_block_ids)
    return arguments


def load_official_folder(folder: Path) -> InternImage:
    """Load what `--format official` wrote, by the strict loader of official checkpoints."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    model = InternImage(InternImageConfig.from_official(config["arguments"]))
    load_internimage(model, folder / WEIGHTS)
    if (folder / PTH).is_file():
        load_internimage(InternImage(model.config), folder / PTH)
    return model.eval()
