"""A feature pyramid (arXiv 1612.03144) over a backbone's stages, and pooling of boxes from it."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

#: Of the four maps that boxes are pooled from; the fifth, for anchors only, has twice the last.
STRIDES: Final = (4, 8, 16, 32)
#: Boxes of up to twice this side, in pixels, are pooled from the finest map (eq. 1 of the paper).
FINEST_SIDE: Final = 56


class FeaturePyramid(nn.Module):
    """Four maps of a backbone, finest first, (B, in_channels[i], H_i, W_i) -> five by name.

    "0" to "3" have the sizes of the maps and `channels` channels, "pool" is "3" at every second
    pixel. float32, whatever autocast says: what follows computes coordinates.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(list(in_channels), channels, LastLevelMaxPool())

    def forward(self, maps: Sequence[Tensor]) -> "OrderedDict[str, Tensor]":
        named = OrderedDict((str(i), x) for i, x in enumerate(maps))
        return OrderedDict((name, x.float()) for name, x in self.fpn(named).items())


class PyramidRoIAlign(nn.Module):
    """RoIAlign from the level of a pyramid that suits each box; no parameters.

    Unlike torchvision's MultiScaleRoIAlign it samples at pixel centres (`aligned`), as densely as
    the box is large, and knows the strides instead of guessing them from the first picture: as in
    the official configs, so that their heads see the features that they were trained on.
    """

    def __init__(self, output_size: int) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(
        self,
        features: Mapping[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> Tensor:
        """boxes: for each picture (n, 4) in pixels -> (sum of n, C, output_size, output_size).

        image_shapes: unused; torchvision's heads pass it.
        """
        rois = torch.cat(
            [torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(boxes)]
        )
        sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp_min(0).sqrt()
        levels = (sides / FINEST_SIDE + 1e-6).log2().floor().clamp(0, len(STRIDES) - 1)
        channels = features["0"].shape[1]
        pooled = rois.new_zeros(len(rois), channels, self.output_size, self.output_size)
        for level, stride in enumerate(STRIDES):
            rows = (levels == level).nonzero().flatten()
            # also of no rows: every rank computes on every map
            pooled[rows] = roi_align(
                features[str(level)],
                rois[rows],
                self.output_size,
                spatial_scale=1 / stride,
                sampling_ratio=0,
                aligned=True,
            )
        return pooled
