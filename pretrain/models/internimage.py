"""InternImage (arXiv 2211.05778), a pyramid of DCNv3 blocks, with the official parameter names.

Images come in as (B, 3, H, W); inside, activations are (B, H, W, C). H and W should be multiples of
32. The variants T to XL classify by a convolutional head; H and G pool their two last stages by
attention, which is also the image embedding of their joint image-text pre-training
(arXiv 2211.09807).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor, nn

from groundwork.pretrain.models.attention_pool import AttentionPool
from groundwork.pretrain.models.dcnv3_module import LAYER_NORM_EPS, DCNv3
from groundwork.pretrain.models.initialisation import init_linear_and_norm
from groundwork.pretrain.models.internimage_blocks import Block, Norm, Stage, Stem

DropPathSchedule = Literal["linear", "uniform"]


@dataclass(frozen=True)
class InternImageConfig:
    """The defaults are InternImage-T, as trained on ImageNet-1K.

    num_classes: 0 leaves the classification head out, see `InternImage.forward_features`.
    groups: of the DCNs of each stage; each divides the width channels·2^stage of its stage.
    norm: where a block normalises, see `Block`; layer_scale: the initial gamma, None for none.
    offset_scale: widens the sampling grid and the offsets; dw_kernel_size: of the depthwise
        convolution from which offsets and mask come.
    level2_post_norm_block_ids: blocks of the third stage after which its activation is normalised.
    use_clip_projector: attention pooling of the last two stages to clip_dim instead of the
        convolutional head.
    drop_rate: dropout after the stem; drop_path: stochastic depth, of the last block if "linear".
    activation_checkpointing: recompute each block in the backward pass.
    kernel_backend: which DCNv3 runs, see `groundwork.kernels.dcnv3`.
    """

    num_classes: int = 1000
    channels: int = 64
    depths: tuple[int, ...] = (4, 4, 18, 4)
    groups: tuple[int, ...] = (4, 8, 16, 32)
    mlp_ratio: float = 4.0
    norm: Norm = "pre_norm"
    layer_scale: float | None = None
    offset_scale: float = 1.0
    dw_kernel_size: int = 3
    center_feature_scale: bool = False
    remove_center: bool = False
    level2_post_norm_block_ids: tuple[int, ...] = ()
    use_clip_projector: bool = False
    clip_embed_dim: int = 1024
    clip_num_heads: int = 16
    clip_dim: int = 768
    drop_rate: float = 0.0
    drop_path: float = 0.1
    drop_path_schedule: DropPathSchedule = "linear"
    activation_checkpointing: bool = False
    kernel_backend: str = "auto"

    def __post_init__(self) -> None:
        if len(self.depths) != 4 or len(self.groups) != 4:
            raise ValueError(
                f"InternImageConfig: depths has {len(self.depths)} stages, groups has "
                f"{len(self.groups)}; InternImage has 4, give one number for each"
            )
        if min(self.depths) < 1:
            raise ValueError(f"InternImageConfig: depths is {self.depths}; give at least 1 block")
        if self.num_classes < 0:
            raise ValueError(f"InternImageConfig: num_classes is {self.num_classes}; 0 is no head")
        if self.channels < 2 or self.channels % 2 != 0:
            raise ValueError(
                f"InternImageConfig: channels is {self.channels}; the stem halves it, give an even "
                "number"
            )
        for stage, groups in enumerate(self.groups):
            width = self.channels * 2**stage
            if groups < 1 or width % groups != 0:
                raise ValueError(
                    f"InternImageConfig: groups[{stage}] is {groups}, stage {stage} has {width} "
                    "channels; choose groups that divide the channels"
                )
        if self.norm == "res_post_norm" and self.layer_scale is not None:
            raise ValueError(
                "InternImageConfig: norm is 'res_post_norm' with a layer_scale of "
                f"{self.layer_scale}; a block has one of the two, set layer_scale to None"
            )
        if self.dw_kernel_size % 2 == 0:
            raise ValueError(
                f"InternImageConfig: dw_kernel_size is {self.dw_kernel_size}; an even one changes "
                "the size of the image, give an odd one"
            )
        outside = [i for i in self.level2_post_norm_block_ids if not 0 <= i < self.depths[2]]
        if outside:
            raise ValueError(
                f"InternImageConfig: level2_post_norm_block_ids names {outside}, the third stage "
                f"has the blocks 0 to {self.depths[2] - 1}"
            )
        if self.use_clip_projector and (
            self.clip_embed_dim % self.clip_num_heads != 0 or self.clip_embed_dim < 1
        ):
            raise ValueError(
                f"InternImageConfig: clip_embed_dim {self.clip_embed_dim} is not a multiple of "
                f"clip_num_heads {self.clip_num_heads}; choose heads that divide it"
            )
        for name, rate in (("drop_rate", self.drop_rate), ("drop_path", self.drop_path)):
            if not 0 <= rate < 1:
                raise ValueError(f"InternImageConfig: {name} is {rate}; give 0 <= {name} < 1")

    @property
    def out_dim(self) -> int:
        """The width of `InternImage.forward_features`."""
        if self.use_clip_projector:
            return self.clip_dim
        return _pooled_width(self.channels * 8, self.num_classes)


VARIANTS: Final[Mapping[str, InternImageConfig]] = {
    "t": InternImageConfig(),
    "s": InternImageConfig(
        channels=80,
        depths=(4, 4, 21, 4),
        groups=(5, 10, 20, 40),
        norm="post_norm",
        layer_scale=1e-5,
        drop_path=0.4,
    ),
    "b": InternImageConfig(
        channels=112,
        depths=(4, 4, 21, 4),
        groups=(7, 14, 28, 56),
        norm="post_norm",
        layer_scale=1e-5,
        drop_path=0.5,
    ),
    "l": InternImageConfig(
        channels=160,
        depths=(5, 5, 22, 5),
        groups=(10, 20, 40, 80),
        norm="post_norm",
        layer_scale=1e-5,
        offset_scale=2.0,
        drop_path=0.1,
    ),
    "xl": InternImageConfig(
        channels=192,
        depths=(5, 5, 24, 5),
        groups=(12, 24, 48, 96),
        norm="post_norm",
        layer_scale=1e-5,
        offset_scale=2.0,
        drop_path=0.2,
    ),
    "h": InternImageConfig(
        channels=320,
        depths=(6, 6, 32, 6),
        groups=(10, 20, 40, 80),
        norm="res_post_norm",
        dw_kernel_size=5,
        center_feature_scale=True,
        level2_post_norm_block_ids=(5, 11, 17, 23, 29),
        use_clip_projector=True,
        drop_path=0.2,
    ),
    "g": InternImageConfig(
        channels=512,
        depths=(2, 2, 48, 4),
        groups=(16, 32, 64, 128),
        norm="post_norm",
        dw_kernel_size=5,
        center_feature_scale=True,
        level2_post_norm_block_ids=(5, 11, 17, 23, 29, 35, 41, 47),
        use_clip_projector=True,
        drop_path=0.4,
    ),
}


def build_internimage(config: InternImageConfig) -> "InternImage":
    blocks = sum(config.depths)
    rates = [
        config.drop_path * (k / max(blocks - 1, 1) if config.drop_path_schedule == "linear" else 1)
        for k in range(blocks)
    ]
    stages = []
    for i, (depth, groups) in enumerate(zip(config.depths, config.groups, strict=True)):
        start = sum(config.depths[:i])
        width = config.channels * 2**i
        stages.append(
            Stage(
                [
                    Block(
                        width,
                        groups,
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
                    for rate in rates[start : start + depth]
                ],
                width,
                # So G has it, although its blocks are post-norm: the released weights say so.
                has_norm=config.norm != "post_norm" or config.center_feature_scale,
                has_downsample=i < 3,
                post_norm_block_ids=config.level2_post_norm_block_ids if i == 2 else (),
                activation_checkpointing=config.activation_checkpointing,
            )
        )
    return InternImage(
        stages,
        config.channels,
        num_classes=config.num_classes,
        drop_rate=config.drop_rate,
        clip_projector=config.use_clip_projector,
        clip_embed_dim=config.clip_embed_dim,
        clip_num_heads=config.clip_num_heads,
        clip_dim=config.clip_dim,
    )


class InternImage(nn.Module):
    """x: (B, 3, H, W) -> logits (B, num_classes), or the features (B, out_dim) for num_classes 0.

    stages: four, of width channels·2^i.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        channels: int,
        *,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        clip_projector: bool = False,
        clip_embed_dim: int = 1024,
        clip_num_heads: int = 16,
        clip_dim: int = 768,
    ) -> None:
        super().__init__()
        width = channels * 8
        self.out_dim = clip_dim if clip_projector else _pooled_width(width, num_classes)
        self.patch_embed = Stem(channels)
        self.pos_drop = nn.Dropout(drop_rate)
        self.levels = nn.ModuleList(stages)
        self.conv_head: nn.Module | None = None
        self.clip_projector: nn.Module | None = None
        if clip_projector:
            self.dcnv3_head_x4 = nn.Sequential(
                nn.Conv2d(width, clip_embed_dim * 4, 1), nn.PixelShuffle(2)
            )
            self.dcnv3_head_x3 = nn.Conv2d(width // 2, clip_embed_dim, 1)
            self.clip_projector = AttentionPool(
                clip_embed_dim, clip_num_heads, clip_dim, LAYER_NORM_EPS
            )
            self.fc_norm = nn.Sequential(nn.LayerNorm(clip_dim, eps=LAYER_NORM_EPS))
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
        *_, x3, x4 = self.forward_stages(x)
        if self.clip_projector is not None:
            if x3.shape[2] != 2 * x4.shape[2] or x3.shape[3] != 2 * x4.shape[3]:
                raise ValueError(
                    f"InternImage: an image of {x.shape[2]}×{x.shape[3]} has last stages of "
                    f"{tuple(x3.shape[2:])} and {tuple(x4.shape[2:])}; the attention pooling needs "
                    "one twice the other, give multiples of 32"
                )
            fused = self.dcnv3_head_x4(x4) + self.dcnv3_head_x3(x3)  # (B, D, H/16, W/16)
            return self.fc_norm(self.clip_projector(fused.flatten(2).transpose(1, 2)))
        if self.conv_head is not None:
            x4 = self.conv_head(x4)
        return x4.mean((2, 3))

    def forward_stages(self, x: Tensor) -> list[Tensor]:
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


def _pooled_width(width: int, num_classes: int) -> int:
    """The convolutional head widens the last stage, and exists for a classifier only."""
    return int(width * 1.5) if num_classes > 0 else width
