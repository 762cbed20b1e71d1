"""K-LITE: a two-tower contrastive model (Shen et al., NeurIPS 2022, arXiv 2204.09222).

The architecture is UniCL's (Yang et al., CVPR 2022): an image encoder, a CLIP-style text encoder
and one projection each into a shared space. K-LITE's knowledge enters through the text alone.
Parameter names are those of the official checkpoints: `visual.*`, `text.*`, `text_projection`,
`vision_projection`, `logit_scale`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from groundwork.pretrain.models.clip_text import TextConfig, TextTransformer, build_text
from groundwork.pretrain.models.initialisation import Init, linear_std
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.swin import SwinConfig, build_swin

#: exp(logit_scale) is limited to this; the reference leaves it unbounded, CLIP has the same limit.
MAX_SCALE = 100.0


@dataclass(frozen=True)
class InternImageTower(InternImageConfig):
    """The image tower `internimage`."""

    image_size: int = 224
    num_classes: int = 0


ImageConfig = Annotated[SwinConfig | InternImageTower, Field(discriminator="kind")]

IMAGE_TOWERS: Final[Mapping[str, Callable[[Any], nn.Module]]] = {
    "swin": build_swin,
    "internimage": InternImage,
}


@dataclass(frozen=True)
class KliteConfig:
    """The model `klite`; defaults are klite_swin_tiny.

    logit_scale: initial logarithm of the scale (the reference starts at 1.0, not ln(1/0.07)).
    """

    kind: Literal["klite"] = "klite"
    image: ImageConfig = field(default_factory=SwinConfig)
    text: TextConfig = field(default_factory=TextConfig)
    projection_dim: int = 512
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.projection_dim < 1:
            raise ValueError(
                f"model.projection_dim is {self.projection_dim}; it must be at least 1"
            )
        if not math.isfinite(self.logit_scale):
            raise ValueError(f"model.logit_scale is {self.logit_scale}; it must be finite")


class Features(NamedTuple):
    """Normalised features (B, D) of both towers, and the positive scale () of their products.

    float32 whatever the weights are: times a scale of 100, the rounding of bf16 features would move
    the logits by several tenths. tokens: (B, L, C), what the image tower pools, if asked for.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    tokens: Tensor | None = None


class Klite(nn.Module):
    """image: (B, 3, H, W) normalised pixels; ids: (B, N) int64 -> Features.

    Either input may be left out: `forward(image=x)` gives image features (B, D) only, and so does
    `forward(ids=ids)` for texts. dense: with the image tower's tokens, which only an InternImage
    with attention pooling has. All parameters are read here, so ZeRO-3 has gathered them.
    """

    def __init__(
        self,
        visual: nn.Module,
        text: TextTransformer,
        image_dim: int,
        projection_dim: int,
        logit_scale: float,
        text_init: Init = "reference",
    ) -> None:
        super().__init__()
        self.visual = visual
        self.text = text
        self.text_projection = nn.Parameter(torch.empty(text.out_dim, projection_dim))
        self.vision_projection = nn.Parameter(torch.empty(image_dim, projection_dim))
        # one element, not a scalar: DeepSpeed cannot broadcast 0-dimensional parameters. In state
        # dicts it is the scalar of the official checkpoints.
        self.logit_scale = nn.Parameter(torch.full((1,), float(logit_scale)))
        self.register_state_dict_post_hook(_scalar_logit_scale)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _one_element_logit_scale
        )
        nn.init.trunc_normal_(self.text_projection, std=linear_std(text_init, text.out_dim))
        nn.init.trunc_normal_(self.vision_projection, std=0.02)

    def forward(
        self, image: Tensor | None = None, ids: Tensor | None = None, *, dense: bool = False
    ) -> Any:
        if ids is None and image is None:
            raise ValueError("Klite: give an image, ids, or both")
        image_features = text_features = tokens = None
        if image is not None:
            if dense:
                visual: Any = self.visual
                tokens = visual.forward_tokens(image)
                pooled = visual.pool_tokens(tokens)
            else:
                pooled = self.visual(image)
            projected = pooled @ self.vision_projection
            image_features = F.normalize(projected.float(), dim=-1)
        if ids is not None:
            projected = self.text(ids) @ self.text_projection
            text_features = F.normalize(projected.float(), dim=-1)
        if image_features is None:
            return text_features
        if text_features is None:
            return image_features
        scale = self.logit_scale.float().exp().squeeze(0)
        return Features(image_features, text_features, _Limited.apply(scale), tokens)

    def no_weight_decay(self) -> frozenset[str]:
        """Parameters of two or more dimensions that are not decayed (1-d ones never are)."""
        return frozenset(
            name
            for name, _ in self.named_parameters()
            if name.endswith(("positional_embedding", "relative_position_bias_table"))
        )


class _Limited(torch.autograd.Function):
    """min(scale, MAX_SCALE), with a gradient that leads back below the limit.

    clamp has none above it: a scale that one step carries over the limit would stay there for good.
    """

    @staticmethod
    def forward(ctx: Any, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return scale.clamp(max=MAX_SCALE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (scale,) = ctx.saved_tensors
        return grad.masked_fill((scale > MAX_SCALE) & (grad < 0), 0.0)


def _scalar_logit_scale(_module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    value = state[f"{prefix}logit_scale"]
    if value.numel() == 1:  # under ZeRO-3 it may be partitioned, and empty here
        state[f"{prefix}logit_scale"] = value.reshape(())


def _one_element_logit_scale(
    _module: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    value = state.get(f"{prefix}logit_scale")
    if value is not None and value.ndim == 0:
        state[f"{prefix}logit_scale"] = value.reshape(1)


def build_klite(config: KliteConfig) -> Klite:
    visual = IMAGE_TOWERS[config.image.kind](config.image)
    return Klite(
        visual=visual,
        text=build_text(config.text),
        image_dim=config.image.out_dim,
        projection_dim=config.projection_dim,
        logit_scale=config.logit_scale,
        text_init=config.text.init,
    )
