"""InternImage (arXiv 2211.05778) for transformers, with the parameter names of the official code.

This file and those beside it are copied into every export and stand alone there: they need torch
and transformers. The deformable convolutions run on the kernels of the package groundwork-pretrain
where it is installed, and on operations of PyTorch otherwise; `model.sampling` says which.
Pictures come in as (B, 3, H, W); inside, activations are (B, H, W, C).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from .configuration_internimage import InternImageConfig
from .layers_internimage import (
    ACTIVATIONS,
    EPS,
    AttentionPool,
    Block,
    CrossAttention,
    DeformableConv,
    Stage,
    Stem,
    backend_of,
    has_kernels,
)

#: Names of parameters that come after the last stage.
HEADS = r"^(conv_head|head|dcnv3_head_x[34]|clip_projector|fc_norm)\."

logger = logging.get_logger(__name__)


@dataclass
class InternImageOutput(ModelOutput):
    """hidden_states: four maps (B, channels·2^i, H/2^(i+2), W/2^(i+2)); pooler_output: what the
    classifier reads, (B, D); logits: (B, num_labels), where there is a head."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    pooler_output: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class InternImagePreTrainedModel(PreTrainedModel):
    """The network. Its parameters have no prefix, so that a file of weights is an official one."""

    config_class = InternImageConfig
    base_model_prefix = "internimage"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers wants lists
    has_heads = True

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__(config)
        width = config.channels * 8
        self.patch_embed = Stem(config)
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.levels = nn.ModuleList(Stage(config, i) for i in range(4))
        if self.has_heads:
            classes, out_dim = config.num_labels or 0, config.clip_dim
            if config.use_clip_projector:
                self.dcnv3_head_x4 = nn.Sequential(
                    nn.Conv2d(width, config.clip_embed_dim * 4, 1), nn.PixelShuffle(2)
                )
                self.dcnv3_head_x3 = nn.Conv2d(width // 2, config.clip_embed_dim, 1)
                self.clip_projector = AttentionPool(
                    config.clip_embed_dim, config.clip_num_heads, config.clip_dim
                )
                self.fc_norm = nn.Sequential(nn.LayerNorm(config.clip_dim, eps=EPS))
            elif classes > 0:
                out_dim = int(width * config.cls_scale)
                self.conv_head = nn.Sequential(
                    nn.Conv2d(width, out_dim, 1, bias=False),
                    nn.Sequential(nn.BatchNorm2d(out_dim)),
                    ACTIVATIONS[config.act](),
                )
            if classes > 0:
                self.head = nn.Linear(out_dim, classes)
        self.set_sampling(config.sampling)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def sampling(self) -> str:
        """What runs the deformable convolutions of this model where its weights are now."""
        dcn = next(m for m in self.modules() if isinstance(m, DeformableConv))
        if not dcn.uses_kernels:
            why = "as asked for" if self.config.sampling == "standard" else "no groundwork here"
            return f"standard operations of PyTorch ({why})"
        return f"groundwork.kernels.dcnv3 ({backend_of(self.patch_embed.conv1.weight)})"

    def set_sampling(self, sampling: str) -> None:
        """sampling: "auto", "groundwork" or "standard", see the configuration."""
        if sampling not in ("auto", "groundwork", "standard"):
            raise ValueError(f"sampling is {sampling!r}; choose auto, groundwork or standard")
        if sampling == "groundwork" and not has_kernels():
            raise ImportError(
                "sampling is 'groundwork', which is not installed: pip install "
                "groundwork-pretrain, or choose 'auto'"
            )
        if sampling == "auto" and not has_kernels():
            logger.warning_once(
                "InternImage samples with standard operations of PyTorch, which are slow; "
                "pip install groundwork-pretrain for its kernels"
            )
        self.config.sampling = sampling
        for module in self.modules():
            if isinstance(module, DeformableConv):
                module.uses_kernels = sampling != "standard" and has_kernels()

    def _maps(self, pixel_values: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the stem's and four stages' maps, (B, C, h, w)."""
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (B, 3, H, W)"
            )
        x = self.pos_drop(self.patch_embed(pixel_values.to(self.patch_embed.conv1.weight.dtype)))
        maps = [x]
        for level in self.levels:
            features, x = level(x)
            maps.append(features)
        return [m.permute(0, 3, 1, 2) for m in maps]

    def _pooled(self, maps: list[Tensor]) -> Tensor:
        """-> (B, D), what the classifier reads."""
        x3, x4 = maps[-2:]
        if self.config.use_clip_projector:
            if x3.shape[2] != 2 * x4.shape[2] or x3.shape[3] != 2 * x4.shape[3]:
                raise ValueError(
                    f"the last stages are {tuple(x3.shape[2:])} and {tuple(x4.shape[2:])}; the "
                    "attention pooling needs one twice the other, give images whose height and "
                    "width are multiples of 32"
                )
            fused = self.dcnv3_head_x4(x4) + self.dcnv3_head_x3(x3)  # (B, D, H/16, W/16)
            return self.fc_norm(self.clip_projector(fused.flatten(2).transpose(1, 2)))
        return (self.conv_head(x4) if hasattr(self, "conv_head") else x4).mean((2, 3))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """For parameters that a checkpoint does not have."""
        if isinstance(module, nn.Linear):
            start = getattr(module, "start", "normal")
            if start == "zeros":
                nn.init.zeros_(module.weight)
            elif start == "xavier":
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, DeformableConv):
            for parameter in module.parameters(recurse=False):  # of center_feature_scale
                nn.init.zeros_(parameter)
        elif isinstance(module, Block):
            for gamma in (module.gamma1, module.gamma2):
                if gamma is not None:
                    nn.init.constant_(gamma, self.config.layer_scale)
        elif isinstance(module, CrossAttention):
            for bias in (module.q_bias, module.k_bias, module.v_bias):
                nn.init.zeros_(bias)


class InternImageModel(InternImagePreTrainedModel):
    """All there is: maps, pooled features, and logits where the configuration has labels."""

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> InternImageOutput | tuple[Any, ...]:
        """output_hidden_states: True unless given, as the maps are there in any case."""
        _, *maps = self._maps(pixel_values)
        pooled = self._pooled(maps)
        output = InternImageOutput(
            logits=self.head(pooled) if hasattr(self, "head") else None,
            pooler_output=pooled,
            last_hidden_state=maps[-1],
            hidden_states=None if output_hidden_states is False else tuple(maps),
        )
        return output if return_dict is not False else output.to_tuple()


class InternImageForImageClassification(InternImagePreTrainedModel):
    """Logits, and the loss where there are labels.

    labels: (B,) classes; (B, num_labels) soft labels or, with the problem type
    multi_label_classification, independent ones. With the problem type regression, which a single
    label implies, numbers (B,) or (B, num_labels), as everywhere in transformers.
    """

    def __init__(self, config: InternImageConfig) -> None:
        if not config.num_labels:
            raise ValueError(
                "this InternImage has no labels; load it as AutoModel or AutoBackbone, or give "
                "from_pretrained num_labels, which adds a new head"
            )
        super().__init__(config)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> InternImageOutput | tuple[Any, ...]:
        _, *maps = self._maps(pixel_values)
        logits = self.head(self._pooled(maps))
        loss = None
        if labels is not None:
            loss = self._loss(logits.float(), labels)
        wanted = output_hidden_states or self.config.output_hidden_states
        output = InternImageOutput(
            loss=loss, logits=logits, hidden_states=tuple(maps) if wanted else None
        )
        return output if return_dict is not False else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.config.problem_type
        if problem == "regression" or (problem is None and self.config.num_labels == 1):
            return F.mse_loss(logits, labels.float().view_as(logits))
        if problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.float())
        return F.cross_entropy(logits, labels.float() if labels.is_floating_point() else labels)


class InternImageBackbone(InternImagePreTrainedModel):
    """The maps of `config.out_features`, for detectors and segmenters of transformers."""

    has_heads = False
    _keys_to_ignore_on_load_unexpected = [HEADS]  # noqa: RUF012 - transformers wants lists

    @property
    def stage_names(self) -> list[str]:
        return list(self.config.stage_names)

    @property
    def out_features(self) -> list[str]:
        return list(self.config.out_features)

    @property
    def out_indices(self) -> list[int]:
        return list(self.config.out_indices)

    @property
    def num_features(self) -> list[int]:
        return [self.config.channels, *self.config.hidden_sizes]

    @property
    def channels(self) -> list[int]:
        return [self.num_features[i] for i in self.out_indices]

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        maps = self._maps(pixel_values)
        output = BackboneOutput(
            feature_maps=tuple(maps[i] for i in self.out_indices),  # type: ignore[arg-type]
            hidden_states=tuple(maps) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()
