"""Supervised classification as the official InternImage and Swin codes train it.

Mixup (arXiv 1710.09412), cutmix (arXiv 1905.04899) and random erasing (arXiv 1708.04896) are
timm's, on whole batches where the model is. They draw from the global generators of torch, NumPy
and Python, whose states checkpoints hold, so a resumed run draws what it would have drawn.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwork.pretrain.objectives.pixels import normalise


@dataclass(frozen=True)
class ClassificationConfig:
    """The objective `classification`.

    label_smoothing: share of the target spread over all classes. mixup, cutmix: alpha of the Beta
    distribution that the mixing ratio comes from, 0 for none; mix_prob: share of the batches that
    are mixed; switch_prob: of cutmix where both are on. random_erasing: share of the pictures of
    which a rectangle is replaced by noise.
    """

    kind: Literal["classification"] = "classification"
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"objective.label_smoothing is {self.label_smoothing}; it must be in [0, 1)"
            )
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"objective.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("mix_prob", "switch_prob", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"objective.{name} is {getattr(self, name)}; it is a probability, 0 to 1"
                )

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


class Classification(nn.Module):
    """What DeepSpeed wraps: model: (B, 3, H, W) -> logits (B, num_classes), and the loss.

    mean, std: of the pixels in [0, 1], per channel.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ClassificationConfig,
        num_classes: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        from timm.data.mixup import Mixup
        from timm.data.random_erasing import RandomErasing

        self.model = model
        self.num_classes = num_classes
        self.label_smoothing = config.label_smoothing
        self.mean, self.std = mean, std
        self.mix = None
        if config.mixes:
            self.mix = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mix_prob,
                switch_prob=config.switch_prob,
                mode="batch",
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )
        self.erase = None
        if config.random_erasing > 0:
            self.erase = RandomErasing(config.random_erasing, mode="pixel", device="cpu")

    def normalise(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """image: (B, 3, H, W) uint8 -> normalised pixels."""
        return normalise(image, self.mean, self.std, dtype)

    def forward(self, batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """batch: image (B, 3, H, W) uint8, labels (B,) int64; B is even where pictures are mixed.

        top1: share of the batch that the logits have right, which means little of mixed pictures.
        """
        image, targets = self.inputs(batch)
        return self.losses(self.model(image.to(dtype)), targets, batch["labels"])

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """batch, as in `forward` -> normalised images (B, 3, H, W), targets (B, K), both float32.

        Erased and mixed in training mode.
        """
        image, labels = self.normalise(batch["image"], torch.float32), batch["labels"]
        targets = F.one_hot(labels, self.num_classes).float()
        targets += self.label_smoothing * (1 / self.num_classes - targets)
        if self.training and self.erase is not None:
            self.erase.device = image.device
            image = self.erase(image)
        if self.training and self.mix is not None:
            image, targets = self.mix(image, labels)
        return image, targets

    @staticmethod
    def losses(logits: Tensor, targets: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """logits, targets: (B, K); labels: (B,) -> "loss", the cross entropy, and "top1"."""
        logits = logits.float()
        loss = -(targets.to(logits.device) * logits.log_softmax(1)).sum(1).mean()
        top1 = (logits.detach().argmax(1) == labels).float().mean()
        return {"loss": loss, "top1": top1}
