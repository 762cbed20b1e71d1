"""InternImage (arXiv 2211.05778), a pyramid of DCNv3 blocks, with the official parameter names.

Images come in as (B, 3, H, W); inside, activations are (B, H, W, C). H and W should be multiples of
32. The variants T to XL classify by a convolutional head; H and G pool their two last stages by
attention, which is also the image embedding of their joint image-text pre-training
(arXiv 2211.09807).
"""

from torch import Tensor, nn

from groundwork.pretrain.models.attention_pool import AttentionPool
from groundwork.pretrain.models.dcnv3_module import LAYER_NORM_EPS, DCNv3
from groundwork.pretrain.models.initialisation import init_linear_and_norm
from groundwork.pretrain.models.internimage_blocks import Block, Stage, Stem
from groundwork.pretrain.models.internimage_config import InternImageConfig as InternImageConfig


class InternImage(nn.Module):
    """x: (B, 3, H, W) -> logits (B, num_classes); features (B, out_dim) where num_classes is 0."""

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__()
        self.config = config
        num_classes, width = config.num_classes, config.channels * 8
        self.out_dim = config.out_dim
        self.patch_embed = Stem(config.channels)
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.levels = nn.ModuleList(_stage(config, i) for i in range(4))
        self.conv_head: nn.Module | None = None
        self.clip_projector: nn.Module | None = None
        if config.use_clip_projector:
            self.dcnv3_head_x4 = nn.Sequential(
                nn.Conv2d(width, config.clip_embed_dim * 4, 1), nn.PixelShuffle(2)
            )
            self.dcnv3_head_x3 = nn.Conv2d(width // 2, config.clip_embed_dim, 1)
            self.clip_projector = AttentionPool(
                config.clip_embed_dim, config.clip_num_heads, config.clip_dim, LAYER_NORM_EPS
            )
            self.fc_norm = nn.Sequential(nn.LayerNorm(config.clip_dim, eps=LAYER_NORM_EPS))
        elif num_classes > 0:
            self.conv_head = nn.Sequential(
                nn.Conv2d(width, self.out_dim, 1, bias=False),
                nn.Sequential(nn.BatchNorm2d(self.out_dim)),
                nn.GELU(),
            )
        self.head = nn.Linear(self.out_dim, num_classes) if num_classes > 0 else nn.Identity()

        self.apply(init_linear_and_norm)
        for module in self.modules():
            if isinstance(module, DCNv3):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) -> (B, out_dim), what the classifier reads.

        With the attention pooling (H, G) it is the normalised embedding of the joint pre-training,
        whether there are classes or not. Else, the mean over the convolutional head; without
        classes there is none, and it is the mean over the last stage, after its norm if it has one.
        """
        if self.clip_projector is not None:
            return self.pool_tokens(self.forward_tokens(x))
        last = self.features(x)[-1]
        if self.conv_head is not None:
            last = self.conv_head(last)
        return last.mean((2, 3))

    def forward_tokens(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) -> (B, N, D), what is pooled.

        With the attention pooling (H, G) its input, N = H/16 · W/16, D = clip_embed_dim; else the
        last stage, N = H/32 · W/32, D = 8 channels.
        """
        *_, x3, x4 = self.features(x)
        if self.clip_projector is not None:
            if x3.shape[2] != 2 * x4.shape[2] or x3.shape[3] != 2 * x4.shape[3]:
                raise ValueError(
                    f"InternImage: an image of {x.shape[2]}×{x.shape[3]} has last stages of "
                    f"{tuple(x3.shape[2:])} and {tuple(x4.shape[2:])}; the attention pooling needs "
                    "one twice the other, give multiples of 32"
                )
            x4 = self.dcnv3_head_x4(x4) + self.dcnv3_head_x3(x3)  # (B, D, H/16, W/16)
        return x4.flatten(2).transpose(1, 2)

    def pool_tokens(self, tokens: Tensor) -> Tensor:
        """(B, N, D) of `forward_tokens` -> (B, out_dim), for the attention pooling (H, G) only."""
        if self.clip_projector is None:
            raise ValueError(
                "InternImage: pool_tokens needs the attention pooling; set use_clip_projector"
            )
        return self.fc_norm(self.clip_projector(tokens))

    def features(self, x: Tensor) -> list[Tensor]:
        """x: (B, 3, H, W) -> four maps (B, channels·2^i, H/2^(i+2), W/2^(i+2)), for detectors.

        Each is the output of a stage, after its norm and before the downsampling.
        """
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"InternImage: x has shape {tuple(x.shape)}; expected (B, 3, H, W)")
        x = self.pos_drop(self.patch_embed(x))
        maps = []
        for level in self.levels:
            features, x = level(x)
            maps.append(features.permute(0, 3, 1, 2))
        return maps


def _stage(config: InternImageConfig, i: int) -> Stage:
    blocks, start = sum(config.depths), sum(config.depths[:i])
    width = config.channels * 2**i
    rates = [
        config.drop_path * (k / max(blocks - 1, 1) if config.drop_path_schedule == "linear" else 1)
        for k in range(start, start + config.depths[i])
    ]
    return Stage(
        [
            Block(
                width,
                config.groups[i],
                mlp_ratio=config.mlp_ratio,
                norm=config.norm,
                layer_scale=config.layer_scale,
                offset_scale=config.offset_scale,
                dw_kernel_size=config.dw_kernel_size,
                center_feature_scale=config.center_feature_scale,
                remove_center=config.remove_center,
                drop_path=rate,
                kernel_backend=config.kernel_backend,
            )
            for rate in rates
        ],
        width,
        # So G has it, although its blocks are post-norm: the released weights say so.
        has_norm=config.norm != "post_norm" or config.center_feature_scale,
        has_downsample=i < 3,
        post_norm_block_ids=config.level2_post_norm_block_ids if i == 2 else (),
        activation_checkpointing=config.activation_checkpointing,
    )
