"""InternImage (arXiv 2211.05778), a pyramid of DCNv3 blocks, with the official parameter names.

With DCNv4 in the blocks it is FlashInternImage (arXiv 2401.06197). Images come in as (B, 3, H, W);
inside, activations are (B, H, W, C), and the maps handed out are (B, C, H, W) views of them, in
channels-last memory. H and W should be multiples of 32. The variants T to XL classify by a
convolutional head; H and G pool their two last stages by attention, which is also the image
embedding of their joint image-text pre-training (arXiv 2211.09807).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn

from groundwork.pretrain.models.attention_pool import AttentionPool
from groundwork.pretrain.models.dcnv3_module import LAYER_NORM_EPS, DCNv3
from groundwork.pretrain.models.dcnv4_module import DCNv4
from groundwork.pretrain.models.initialisation import Conv2d, Linear
from groundwork.pretrain.models.internimage_blocks import Block, Mlp, Stage, Stem
from groundwork.pretrain.models.internimage_config import InternImageConfig as InternImageConfig
from groundwork.pretrain.models.internimage_head import ConvHead, PixelShuffle, fuse_stages
from groundwork.pretrain.models.internimage_layer_decay import LayerDecayRule, layer_scales
from groundwork.pretrain.models.internimage_weights import HeadRule, LoadReport, load_weights

ACTIVATIONS: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class InternImage(nn.Module):
    """x: (B, 3, H, W) -> logits (B, num_classes); features (B, out_dim) where num_classes is 0.

    Each layer sets its initial weights in its own constructor, so that a model built under
    `deepspeed.zero.Init` starts as one built without it, and never lies whole on one rank.
    """

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__()
        self.config = config
        width, act = config.channels * 8, ACTIVATIONS[config.act]
        self.out_dim = config.out_dim
        self.patch_embed = Stem(config.channels, act)
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.levels = nn.ModuleList(build_stage(config, i) for i in range(4))
        self.conv_head: nn.Module | None = None
        self.clip_projector: nn.Module | None = None
        if config.use_clip_projector:
            dim = config.clip_embed_dim
            self.dcnv3_head_x4 = nn.Sequential(Conv2d(width, dim * 4, 1), PixelShuffle(2))
            self.dcnv3_head_x3 = Conv2d(width // 2, dim, 1)
            self.clip_projector = AttentionPool(
                dim, config.clip_num_heads, config.clip_dim, LAYER_NORM_EPS
            )
            self.fc_norm = nn.Sequential(nn.LayerNorm(config.clip_dim, eps=LAYER_NORM_EPS))
        elif config.num_classes > 0:
            self.conv_head = ConvHead(width, self.out_dim, act)
        self.head = (
            Linear(self.out_dim, config.num_classes) if config.num_classes > 0 else nn.Identity()
        )
        for part in self._frozen():
            part.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "InternImage":
        """As nn.Module; frozen stages drop no paths, whatever the mode."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        stages = self.config.frozen_stages
        return [self.patch_embed, *self.levels[:stages]] if stages else []

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
            return fuse_stages(self.dcnv3_head_x3(x3), self.dcnv3_head_x4(x4), x.shape)
        return x4.permute(0, 2, 3, 1).flatten(1, 2)

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
        return self.stage_features(self.pos_drop(self.patch_embed(x)))

    def stage_features(self, x: Tensor, stages: int = 4) -> list[Tensor]:
        """`features` of the first stages, from the stem's output x: (B, H/4, W/4, channels)."""
        maps = []
        for level in self.levels[:stages]:
            features, x = level(x)
            maps.append(features.permute(0, 3, 1, 2))
        return maps

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Of each map of `features`, as timm describes them: channels, reduction, module."""
        return [
            {
                "num_chs": self.config.channels * 2**i,
                "reduction": 4 * 2**i,
                "module": f"levels.{i}.norm",
            }
            for i in range(4)
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The chosen maps of `features`, with timm's arguments; and the last stage before them.

        indices: of stages, or how many of the last; None for all. norm: without effect, as a map is
        what its stage hands to a detector. stop_early: skip the stages after the last chosen.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; choose NCHW or NHWC")
        taken = _stage_indices(indices)
        stem = self.pos_drop(self.patch_embed(x))
        maps = self.stage_features(stem, max(taken) + 1 if stop_early else 4)
        chosen = [maps[i] if output_fmt == "NCHW" else maps[i].permute(0, 2, 3, 1) for i in taken]
        return chosen if intermediates_only else (maps[-1], chosen)

    def lr_scales(
        self, decay: float | None, rule: LayerDecayRule, dcn_lr_mul: float = 1.0
    ) -> dict[str, float]:
        """Name of each parameter -> the factor of its learning rate; see `layer_scales`.

        decay: None for none, and then dcn_lr_mul is without effect, too, as in the official code.
        """
        names = [name for name, _ in self.named_parameters()]
        if decay is None:
            return dict.fromkeys(names, 1.0)
        return layer_scales(names, self.config.depths, decay, rule, dcn_lr_mul)

    def no_weight_decay(self) -> frozenset[str]:
        """Parameters of two or more dimensions that are not decayed: none (1-d ones never are)."""
        return frozenset()

    def load_official(
        self,
        checkpoint: Mapping[str, Any],
        head: HeadRule = "same",
        class_indices: Sequence[int] | None = None,
    ) -> LoadReport:
        """Copy in the weights of an official checkpoint, all of them; see `load_weights`."""
        return load_weights(self, checkpoint, head, class_indices)

    def official_state_dict(self) -> dict[str, Tensor]:
        """The weights under the official names, which are ours. They share the model's memory."""
        partitioned = [n for n, p in self.named_parameters() if hasattr(p, "ds_id")]
        if partitioned:
            raise ValueError(
                f"InternImage: {len(partitioned)} parameters are partitioned over ranks by ZeRO-3; "
                "save a checkpoint and export it"
            )
        return {name: value.detach() for name, value in self.state_dict().items()}


def _stage_indices(indices: int | list[int] | None) -> list[int]:
    """timm's way to name stages: all for None, the last n for a number, or a list of them."""
    if indices is None:
        return [0, 1, 2, 3]
    named = list(range(4 - indices, 4)) if isinstance(indices, int) else list(indices)
    taken = [i + 4 if i < 0 else i for i in named]
    if not taken or not all(0 <= i < 4 for i in taken):
        raise ValueError(f"indices is {indices!r}; InternImage has the stages 0 to 3")
    return taken


def build_stage(config: InternImageConfig, i: int) -> Stage:
    """Stage i, 0 to 3, with its downsampling."""
    blocks, start = sum(config.depths), sum(config.depths[:i])
    rates = [
        config.drop_path * (k / max(blocks - 1, 1) if config.drop_path_schedule == "linear" else 1)
        for k in range(start, start + config.depths[i])
    ]
    return Stage(
        [_block(config, i, rate) for rate in rates],
        config.channels * 2**i,
        # So G has it, although its blocks are post-norm: the released weights say so.
        has_norm=config.norm != "post_norm" or config.center_feature_scale,
        has_downsample=i < 3,
        post_norm_block_ids=config.level2_post_norm_block_ids if i == 2 else (),
        activation_checkpointing=config.activation_checkpointing,
    )


def _block(config: InternImageConfig, stage: int, drop_path: float) -> Block:
    width, act = config.channels * 2**stage, ACTIVATIONS[config.act]
    shared: dict[str, Any] = {
        "dw_kernel_size": config.dw_kernel_size,
        "offset_scale": config.offset_scale,
        "center_feature_scale": config.center_feature_scale,
        "remove_center": config.remove_center,
        "backend": config.kernel_backend,
    }
    dcn: nn.Module
    if config.core == "dcnv4":
        dcn = DCNv4(width, config.groups[stage], output_bias=config.dcn_output_bias, **shared)
    else:
        dcn = DCNv3(width, config.groups[stage], act=act, **shared)
    return Block(
        width,
        dcn,
        Mlp(width, int(width * config.mlp_ratio), act, fc2_bias=config.mlp_fc2_bias),
        norm=config.norm,
        layer_scale=config.layer_scale,
        drop_path=drop_path,
        backend=config.kernel_backend,
    )
