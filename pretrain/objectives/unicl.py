"""UniCL: image-label and image-text pairs in one contrastive objective (arXiv 2204.03610)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from groundwork.pretrain.objectives.contrastive import unicl_loss
from groundwork.pretrain.objectives.pixels import normalise


@dataclass(frozen=True)
class UniclConfig:
    """The objective `unicl`. block_rows: rows of the logit matrix that exist at a time.

    A pair's negatives are those of one forward pass over all ranks: under gradient accumulation
    these are micro_batch x ranks, not the global batch.
    """

    kind: Literal["unicl"] = "unicl"
    block_rows: int = 1024

    def __post_init__(self) -> None:
        if self.block_rows < 1:
            raise ValueError(f"objective.block_rows is {self.block_rows}; it must be at least 1")


class Unicl(nn.Module):
    """What DeepSpeed wraps: the model, and the loss over the global batch.

    mean, std: of the pixels in [0, 1], per channel.
    """

    def __init__(
        self,
        model: nn.Module,
        config: UniclConfig,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.model = model
        self.block_rows = config.block_rows
        self.mean, self.std = mean, std

    def normalise(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """image: (B, 3, H, W) uint8 -> normalised pixels."""
        return normalise(image, self.mean, self.std, dtype)

    def forward(self, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """batch: image (B, 3, H, W) uint8, ids (B, N) int64, labels (B,) int64 (-1: unique)."""
        image = self.normalise(batch["image"], dtype)
        features = self.model(image=image, ids=batch["ids"])
        i2t, t2i = unicl_loss(
            features.image, features.text, features.scale, batch["labels"], self.block_rows
        )
        return {
            "loss": (i2t + t2i) / 2,
            "image_to_text": i2t.detach(),
            "text_to_image": t2i.detach(),
            "logit_scale": features.scale.detach(),
        }
