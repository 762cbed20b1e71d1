"""What an InternImage is: its sizes (arXiv 2211.05778, table 1; 2401.06197) and its options."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

from groundwork.kernels.dcnv3 import BACKENDS
from groundwork.pretrain.models.internimage_arguments import official_fields
from groundwork.pretrain.models.internimage_blocks import Norm

Core = Literal["dcnv3", "dcnv4"]
Activation = Literal["gelu", "relu", "silu"]
DropPathSchedule = Literal["linear", "uniform"]


@dataclass(frozen=True)
class InternImageConfig:
    """The defaults are InternImage-T, as trained on ImageNet-1K.

    num_classes: 0 leaves the classification head out, see `InternImage.forward_features`.
    core: the deformable convolution; `dcnv4` is FlashInternImage.
    groups: of the DCNs of each stage; each divides the width channels·2^stage of its stage.
    norm: where a block normalises, see `Block`; layer_scale: the initial gamma, None for none.
    offset_scale: widens the sampling grid and the offsets.
    dw_kernel_size: of the depthwise convolution from which offsets and weights come; None for
        none, with dcnv4 only.
    act: of the stem, the MLPs, the convolutional head and before the offsets of DCNv3.
    dcn_output_bias, mlp_fc2_bias: FlashInternImage-T, -S and -B are without them.
    level2_post_norm_block_ids: blocks of the third stage after which its activation is normalised.
    use_clip_projector: attention pooling of the last two stages to clip_dim instead of the
        convolutional head, which widens the last stage by cls_scale.
    drop_rate: dropout after the stem; drop_path: stochastic depth, of the last block if "linear".
    frozen_stages: so many stages, and the stem, do not train; 0 freezes nothing.
    activation_checkpointing: recompute each block in the backward pass.
    kernel_backend: which kernels run, see `groundwork.kernels.dcnv3`.
    """

    kind: Literal["internimage"] = "internimage"
    num_classes: int = 1000
    core: Core = "dcnv3"
    channels: int = 64
    depths: tuple[int, ...] = (4, 4, 18, 4)
    groups: tuple[int, ...] = (4, 8, 16, 32)
    mlp_ratio: float = 4.0
    norm: Norm = "pre_norm"
    layer_scale: float | None = None
    offset_scale: float = 1.0
    dw_kernel_size: int | None = 3
    act: Activation = "gelu"
    dcn_output_bias: bool = True
    mlp_fc2_bias: bool = True
    center_feature_scale: bool = False
    remove_center: bool = False
    level2_post_norm_block_ids: tuple[int, ...] = ()
    use_clip_projector: bool = False
    clip_embed_dim: int = 1024
    clip_num_heads: int = 16
    clip_dim: int = 768
    cls_scale: float = 1.5
    drop_rate: float = 0.0
    drop_path: float = 0.1
    drop_path_schedule: DropPathSchedule = "linear"
    frozen_stages: int = 0
    activation_checkpointing: bool = False
    kernel_backend: str = "auto"

    def __post_init__(self) -> None:
        self._check_choices()
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
        if self.dw_kernel_size is None and self.core != "dcnv4":
            raise ValueError(
                "InternImageConfig: dw_kernel_size is None, and core is 'dcnv3', which takes its "
                "offsets from a depthwise convolution; give its size, 3 in T to XL and 5 in H and G"
            )
        if self.dw_kernel_size is not None and (
            self.dw_kernel_size < 1 or self.dw_kernel_size % 2 == 0
        ):
            raise ValueError(
                f"InternImageConfig: dw_kernel_size is {self.dw_kernel_size}; an even one changes "
                "the size of the image, give an odd one"
            )
        if not self.dcn_output_bias and self.core != "dcnv4":
            raise ValueError(
                "InternImageConfig: dcn_output_bias is false, and core is 'dcnv3', which always "
                "has this bias; set it to true, or core to dcnv4"
            )
        for name in ("offset_scale", "mlp_ratio", "cls_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"InternImageConfig: {name} is {getattr(self, name)}; it must be above 0"
                )
        if int(self.channels * self.mlp_ratio) < 1:
            raise ValueError(
                f"InternImageConfig: mlp_ratio is {self.mlp_ratio}, which leaves an MLP of "
                f"{self.channels} channels no hidden one"
            )
        if self.layer_scale is not None and not math.isfinite(self.layer_scale):
            raise ValueError(f"InternImageConfig: layer_scale is {self.layer_scale}")
        if not 0 <= self.frozen_stages <= 4:
            raise ValueError(
                f"InternImageConfig: frozen_stages is {self.frozen_stages}; give 0 (none) to 4"
            )
        outside = [i for i in self.level2_post_norm_block_ids if not 0 <= i < self.depths[2]]
        if outside:
            raise ValueError(
                f"InternImageConfig: level2_post_norm_block_ids names {outside}, the third stage "
                f"has the blocks 0 to {self.depths[2] - 1}"
            )
        blocks = self.level2_post_norm_block_ids
        if len(set(blocks)) < len(blocks):
            raise ValueError(
                f"InternImageConfig: level2_post_norm_block_ids is {list(blocks)}; name each block "
                "once"
            )
        sizes = (self.clip_embed_dim, self.clip_num_heads, self.clip_dim)
        if self.use_clip_projector and (
            min(sizes) < 1 or self.clip_embed_dim % self.clip_num_heads != 0
        ):
            raise ValueError(
                f"InternImageConfig: clip_embed_dim {self.clip_embed_dim} is not a multiple of "
                f"clip_num_heads {self.clip_num_heads}; choose heads that divide it"
            )
        for name, rate in (("drop_rate", self.drop_rate), ("drop_path", self.drop_path)):
            if not 0 <= rate < 1:
                raise ValueError(f"InternImageConfig: {name} is {rate}; give 0 <= {name} < 1")

    def _check_choices(self) -> None:
        """A recipe's words are checked when it is read; those of a program here."""
        for name, known in (
            ("norm", get_args(Norm)),
            ("core", get_args(Core)),
            ("act", get_args(Activation)),
            ("drop_path_schedule", get_args(DropPathSchedule)),
            ("kernel_backend", ("auto", *BACKENDS)),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"InternImageConfig: {name} is {value!r}; choose from: {', '.join(known)}"
                )

    @classmethod
    def variant(cls, name: str) -> "InternImageConfig":
        """A published size, as trained on ImageNet-1K with 1000 classes: a key of `VARIANTS`."""
        if name not in VARIANTS:
            raise ValueError(
                f"InternImageConfig: there is no variant {name!r}; choose from: "
                + ", ".join(VARIANTS)
            )
        return VARIANTS[name]

    @classmethod
    def from_official(cls, kwargs: Mapping[str, Any]) -> "InternImageConfig":
        """The config of the model that the official constructor builds from these arguments.

        See `official_fields`.
        """
        return cls(**official_fields(kwargs))

    def detection(
        self, drop_path: float | None = None, frozen_stages: int = 0
    ) -> "InternImageConfig":
        """The backbone of the official detection and segmentation configs: without a head.

        T to XL have a layer scale of 1.0 there, S to XL until the checkpoint overwrites it. Not
        followed: without a checkpoint, the official backbone draws all linear weights again, so
        that offsets and masks do not start at 0.
        """
        plain = self.norm != "res_post_norm" and not self.center_feature_scale
        return replace(
            self,
            num_classes=0,
            use_clip_projector=False,
            layer_scale=1.0 if plain else self.layer_scale,
            drop_path=self.drop_path if drop_path is None else drop_path,
            frozen_stages=frozen_stages,
        )

    @property
    def out_dim(self) -> int:
        """The width of `InternImage.forward_features`."""
        if self.use_clip_projector:
            return self.clip_dim
        width = self.channels * 8
        # the convolutional head widens the last stage, and exists for a classifier only
        return int(width * self.cls_scale) if self.num_classes > 0 else width


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
    # DCNv4's sizes are those of DCNv3
    "flash_t": InternImageConfig(
        core="dcnv4", dw_kernel_size=None, dcn_output_bias=False, mlp_fc2_bias=False
    ),
    "flash_s": InternImageConfig(
        core="dcnv4",
        channels=80,
        depths=(4, 4, 21, 4),
        groups=(5, 10, 20, 40),
        norm="post_norm",
        layer_scale=1e-5,
        dcn_output_bias=False,
        mlp_fc2_bias=False,
        drop_path=0.4,
    ),
    "flash_b": InternImageConfig(
        core="dcnv4",
        channels=112,
        depths=(4, 4, 21, 4),
        groups=(7, 14, 28, 56),
        norm="post_norm",
        layer_scale=1e-5,
        offset_scale=0.5,
        dcn_output_bias=False,
        mlp_fc2_bias=False,
        drop_path=0.5,
    ),
    "flash_l": InternImageConfig(
        core="dcnv4",
        channels=160,
        depths=(5, 5, 22, 5),
        groups=(10, 20, 40, 80),
        norm="post_norm",
        layer_scale=1e-5,
        offset_scale=2.0,
        drop_path=0.1,
    ),
}
