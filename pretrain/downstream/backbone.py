"""The backbones that downstream tasks are built on, picked by the `kind` of a recipe's section."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from groundwork.pretrain.models.internimage import InternImage, InternImageConfig

#: A second kind makes this a union with `Discriminator(by_kind("internimage"))`, so that recipes
#: that do not say still mean InternImage.
BackboneConfig = InternImageConfig

BACKBONES: Final[Mapping[str, Callable[[Any], nn.Module]]] = {"internimage": InternImage}


def build_backbone(config: BackboneConfig) -> nn.Module:
    """A backbone with fresh weights; fine-tuning loads others into it afterwards."""
    return BACKBONES[config.kind](config)
