"""Swin Transformer image encoder with the parameter names of the K-LITE / UniCL checkpoints.

Liu et al., "Swin Transformer" (ICCV 2021). The blocks are timm's; this file puts them in the order
and under the names of the official checkpoints (timm moved the patch merging to the next stage).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundwork.pretrain.models.initialisation import init_linear_and_norm


@dataclass(frozen=True)
class SwinConfig:
    """The image tower `swin`; defaults are Swin-T as in klite_swin_tiny."""

    kind: Literal["swin"] = "swin"
    image_size: int = 224
    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    drop_path: float = 0.2
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"model.image: depths has {len(self.depths)} stages, num_heads has "
                f"{len(self.num_heads)}; give one head count per stage"
            )
        for name in ("image_size", "patch_size", "embed_dim", "window_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.image: {name} is {getattr(self, name)}; give at least 1")
        if not self.depths or min(self.depths) < 0 or min(self.num_heads) < 1:
            raise ValueError(
                f"model.image: depths is {list(self.depths)} and num_heads {list(self.num_heads)}; "
                "give at least one stage, 0 or more blocks each, 1 or more heads"
            )
        stride = self.patch_size * 2 ** (len(self.depths) - 1)
        if self.image_size % stride:
            raise ValueError(
                f"model.image: image_size {self.image_size} is not a multiple of {stride} "
                "(patch_size times 2 per patch merging); choose another image_size or fewer stages"
            )
        for stage, heads in enumerate(self.num_heads):
            if self.embed_dim * 2**stage % heads:
                raise ValueError(
                    f"model.image: stage {stage} has {self.embed_dim * 2**stage} channels, not "
                    f"divisible by its {heads} heads"
                )

    @property
    def out_dim(self) -> int:
        return self.embed_dim * 2 ** (len(self.depths) - 1)


class SwinStage(nn.Module):
    """Blocks at one resolution, then patch merging. x: (B, H, W, C) -> (B, H/2, W/2, 2C)."""

    def __init__(
        self,
        dim: int,
        resolution: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float,
        drop_paths: list[float],
        merge: bool,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        # timm shrinks the window, and drops the shift, where the resolution is not above the window
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(
                dim=dim,
                input_resolution=(resolution, resolution),
                num_heads=num_heads,
                window_size=window_size,
                shift_size=window_size // 2 if i % 2 else 0,
                mlp_ratio=mlp_ratio,
                drop_path=drop_path,
            )
            for i, drop_path in enumerate(drop_paths)
        )
        for block in self.blocks:
            attention = block.get_submodule("attn")
            attention.register_forward_pre_hook(_mask_like_input, with_kwargs=True)
        self.downsample = PatchMerging(dim) if merge else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x if self.downsample is None else self.downsample(x)


class SwinTransformer(nn.Module):
    """x: (B, 3, H, W) -> (B, out_dim): final LayerNorm, mean over tokens."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        window_size: int,
        mlp_ratio: float,
        drop_path: float,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(
            image_size, patch_size, 3, embed_dim, norm_layer=nn.LayerNorm, output_fmt="NHWC"
        )
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
        resolution = image_size // patch_size
        self.layers = nn.ModuleList(
            SwinStage(
                embed_dim * 2**i,
                resolution // 2**i,
                num_heads[i],
                window_size,
                mlp_ratio,
                rates[sum(depths[:i]) : sum(depths[: i + 1])],
                merge=i < len(depths) - 1,
                activation_checkpointing=activation_checkpointing,
            )
            for i in range(len(depths))
        )
        self.out_dim = embed_dim * 2 ** (len(depths) - 1)
        self.norm = nn.LayerNorm(self.out_dim)
        self.apply(init_linear_and_norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)  # (B, H/p, W/p, C)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean((1, 2))


def _mask_like_input(_attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Cast the shift mask to the input's dtype: DeepSpeed makes weights bf16, but not buffers."""
    mask = kwargs.get("mask")
    return args, kwargs if mask is None else {**kwargs, "mask": mask.to(args[0].dtype)}


def build_swin(config: SwinConfig) -> SwinTransformer:
    return SwinTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=config.window_size,
        mlp_ratio=config.mlp_ratio,
        drop_path=config.drop_path,
        activation_checkpointing=config.activation_checkpointing,
    )
