"""CB-InternImage: two backbones, the second fed with the maps of the first (CBNetV2, 2107.00420).

The composition is the dense one, as of the public detectors of InternImage-H and -G; parameter
names are theirs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwork.pretrain.models.initialisation import Conv2d
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig, build_stage
from groundwork.pretrain.models.internimage_layer_decay import LayerDecayRule, layer_scales
from groundwork.pretrain.models.internimage_weights import (
    LoadReport,
    OfficialWeightsError,
    load_weights,
    official_names,
)


class LeadBackbone(nn.Module):
    """The stages of a second InternImage, without a stem; what is added to them starts at 0."""

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = nn.ModuleList(build_stage(config, i) for i in range(4))
        for i in range(4):
            self.register_parameter(f"gamma{i}", nn.Parameter(torch.zeros(config.channels * 2**i)))

    def forward(self, x: Tensor, added: Sequence[Tensor]) -> list[Tensor]:
        """x: (B, H/4, W/4, C) of the first stem; added: per stage, of its input's shape.

        -> four maps (B, C·2^i, H_i, W_i), as `InternImage.features`.
        """
        maps = []
        for i, (level, extra) in enumerate(zip(self.levels, added, strict=True)):
            features, x = level(x + getattr(self, f"gamma{i}") * extra)
            maps.append(features.permute(0, 3, 1, 2))
        return maps


class CompositeInternImage(nn.Module):
    """images: (B, 3, H, W) -> the maps of both backbones, four each; see `InternImage.features`.

    config: of both, in its detection form; frozen_stages are those of the first.
    Before stage i of the second backbone, gamma_i · Σ_{j>=i} upsample(conv_ij(map j of the first))
    is added, conv_ii the identity.
    """

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__()
        if config.num_classes or config.use_clip_projector:
            raise ValueError(
                "CompositeInternImage: the config has a head; give its detection form, "
                "config.detection()"
            )
        self.config = config
        self.cb_modules = nn.ModuleList([InternImage(config), LeadBackbone(config)])
        widths = [config.channels * 2**i for i in range(4)]
        self.cb_linears = nn.ModuleList(
            nn.ModuleList(
                [nn.Identity(), *(Conv2d(widths[j], widths[i], 1) for j in range(i + 1, 4))]
            )
            for i in range(4)
        )

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        first, lead = self.cb_modules
        assert isinstance(first, InternImage)
        stem = first.pos_drop(first.patch_embed(x))
        maps = first.stage_features(stem)
        return maps, lead(stem, self._composed(maps))

    def _composed(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, C_i, H_i, W_i) -> what each stage of the second backbone is to get,
        (B, H_i, W_i, C_i).
        """
        composed = []
        for i, convolutions in enumerate(self.cb_linears):
            assert isinstance(convolutions, nn.ModuleList)
            size = maps[i].shape[2:]
            total = maps[i]
            for convolution, features in zip(convolutions[1:], maps[i + 1 :], strict=True):
                total = total + F.interpolate(convolution(features), size=size, mode="nearest")
            composed.append(total.permute(0, 2, 3, 1))
        return composed

    def lr_scales(self, decay: float | None, rule: LayerDecayRule) -> dict[str, float]:
        """As `InternImage.lr_scales`, for both backbones alike; what joins them has 1. Ours."""
        names = [name for name, _ in self.named_parameters()]
        scales = dict.fromkeys(names, 1.0)
        if decay is not None:
            for prefix in ("cb_modules.0.", "cb_modules.1."):
                inner = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
                found = layer_scales(inner, self.config.depths, decay, rule)
                scales |= {prefix + name: scale for name, scale in found.items()}
        return scales

    def no_weight_decay(self) -> frozenset[str]:
        """Parameters of two or more dimensions that are not decayed: none."""
        return frozenset()

    def load_official(self, checkpoint: Mapping[str, Any]) -> LoadReport:
        """Copy in a composite checkpoint; or a single InternImage's into both backbones.

        Of a single one the head is left out, and what joins the backbones keeps its values.
        """
        state, dropped = official_names(checkpoint)
        if any(name.startswith("cb_modules.") for name in state):
            report = load_weights(self, state)
            return LoadReport((*dropped, *report.dropped), report.skipped, report.initial)
        first, lead = self.cb_modules
        stages = {name: value for name, value in state.items() if name.startswith("levels.")}
        if not stages:
            raise OfficialWeightsError("the checkpoint has no stages of an InternImage (levels.*)")
        own = [name for name, _ in lead.named_parameters() if name.startswith("gamma")]
        reports = (
            load_weights(first, state, "skip"),
            load_weights(lead, stages, optional=own),
        )
        joints = [name for name in self.state_dict() if name.startswith("cb_linears.")]
        initial = [
            f"cb_modules.{k}.{name}" for k, report in enumerate(reports) for name in report.initial
        ]
        return LoadReport(tuple(dropped), reports[0].skipped, (*initial, *joints))

    def official_state_dict(self) -> dict[str, Tensor]:
        """The weights under the official names, which are ours. They share the model's memory."""
        return {name: value.detach() for name, value in self.state_dict().items()}
