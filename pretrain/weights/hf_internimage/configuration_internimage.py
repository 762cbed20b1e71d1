"""The configuration of InternImage for transformers.

This file and those beside it are copied into every export and stand alone there: they need torch
and transformers, and nothing else.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

STAGES = ("stem", "stage1", "stage2", "stage3", "stage4")


class InternImageConfig(PretrainedConfig):
    """The defaults are InternImage-T. num_labels 0 leaves the classification head out.

    core: the deformable convolution, dcnv3, or dcnv4 for FlashInternImage. groups: of it in each
    stage. norm: pre_norm, post_norm or res_post_norm. layer_scale: the initial gamma, None for
    none. offset_scale: widens the sampling grid and the offsets. dw_kernel_size: of the depthwise
    convolution they come from, None for none (dcnv4 only). act: gelu, relu or silu.
    level2_post_norm_block_ids: blocks of the third stage followed by a norm.
    use_clip_projector: attention pooling to clip_dim (H, G) instead of the convolutional head,
    which widens the last stage by cls_scale.
    drop_path: stochastic depth, of the last block if the schedule is "linear".
    sampling: what runs the deformable convolutions. "auto" takes groundwork's kernels where they
    are installed, "groundwork" insists on them, "standard" takes operations of PyTorch only.
    image_size: the side of the pictures it was trained on; others work, in multiples of 32.
    out_features: stages an `AutoBackbone` returns, among stem, stage1, ..., stage4; out_indices:
    the same as places in this list.
    """

    model_type = "internimage"

    def __init__(
        self,
        core: str = "dcnv3",
        channels: int = 64,
        depths: Sequence[int] = (4, 4, 18, 4),
        groups: Sequence[int] = (4, 8, 16, 32),
        mlp_ratio: float = 4.0,
        norm: str = "pre_norm",
        layer_scale: float | None = None,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = 3,
        act: str = "gelu",
        dcn_output_bias: bool = True,
        mlp_fc2_bias: bool = True,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        level2_post_norm_block_ids: Sequence[int] = (),
        use_clip_projector: bool = False,
        clip_embed_dim: int = 1024,
        clip_num_heads: int = 16,
        clip_dim: int = 768,
        cls_scale: float = 1.5,
        drop_rate: float = 0.0,
        drop_path: float = 0.1,
        drop_path_schedule: str = "linear",
        sampling: str = "auto",
        image_size: int = 224,
        num_channels: int = 3,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.core = core
        self.channels = channels
        self.depths = list(depths)
        self.groups = list(groups)
        self.mlp_ratio = mlp_ratio
        self.norm = norm
        self.layer_scale = layer_scale
        self.offset_scale = offset_scale
        self.dw_kernel_size = dw_kernel_size
        self.act = act
        self.dcn_output_bias = dcn_output_bias
        self.mlp_fc2_bias = mlp_fc2_bias
        self.center_feature_scale = center_feature_scale
        self.remove_center = remove_center
        self.level2_post_norm_block_ids = list(level2_post_norm_block_ids)
        self.use_clip_projector = use_clip_projector
        self.clip_embed_dim = clip_embed_dim
        self.clip_num_heads = clip_num_heads
        self.clip_dim = clip_dim
        self.cls_scale = cls_scale
        self.drop_rate = drop_rate
        self.drop_path = drop_path
        self.drop_path_schedule = drop_path_schedule
        self.sampling = sampling
        self.image_size = image_size
        self.num_channels = num_channels
        self.hidden_size = channels * 8
        self.hidden_sizes = [channels * 2**i for i in range(4)]
        self.stage_names = list(STAGES)
        if out_features is None and out_indices is not None:
            out_features = [STAGES[i] for i in out_indices]
        self.out_features = list(out_features or STAGES[-1:])

    def __setattr__(self, name: str, value: Any) -> None:
        """Keeps the two ways to choose stages together: transformers sets either by itself."""
        values = {name: value}
        if name == "out_features":
            unknown = [stage for stage in value if stage not in STAGES]
            if unknown:
                raise ValueError(f"out_features has {unknown}; choose among {', '.join(STAGES)}")
            values["out_indices"] = [STAGES.index(stage) for stage in value]
        elif name == "out_indices":
            places = [int(i) % len(STAGES) for i in value]
            values = {name: places, "out_features": [STAGES[i] for i in places]}
        for key, chosen in values.items():
            super().__setattr__(key, chosen)  # type: ignore[no-untyped-call]
