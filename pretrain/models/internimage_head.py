"""What comes after InternImage's stages: a convolution for T to XL, fused tokens for H and G."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from groundwork.pretrain.models.initialisation import Conv2d


class FloatBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose running statistics stay float32 when the model is cast to bf16 or fp16.

    Their updates are too small for these: a tenth of a change of a per cent is below a rounding of
    bfloat16. `deepspeed.zero.Init` and DeepSpeed's engine cast buffers, too. x: any float dtype.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        if self.running_mean is not None and self.running_mean.element_size() < 4:
            self.running_mean = self.running_mean.float()
            self.running_var = self.running_mean.new_ones(channels).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {"running_mean": self.running_mean, "running_var": self.running_var}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in before.items():
            cast = getattr(self, name)
            if values is not None and cast.is_floating_point() and cast.element_size() < 4:
                setattr(self, name, values.to(cast.device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean = self.running_mean
        assert mean is not None
        return F.batch_norm(
            x,
            mean,
            self.running_var,
            self.weight.to(mean.dtype),
            self.bias.to(mean.dtype),
            self.training,
            self.momentum,  # type: ignore[arg-type]  # a number, as we set none
            self.eps,
        )


class ConvHead(nn.Sequential):
    """(B, C, H, W) -> (B, D, H, W): a 1×1 convolution, a batch norm and an activation."""

    def __init__(self, channels: int, out_channels: int, act: Callable[[], nn.Module]) -> None:
        super().__init__(
            Conv2d(channels, out_channels, 1, bias=False),
            nn.Sequential(FloatBatchNorm(out_channels)),
            act(),
        )


class PixelShuffle(nn.Module):
    """nn.PixelShuffle that keeps the channels-last memory. (B, r²·C, H, W) -> (B, C, r·H, r·W)."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        r = self.factor
        x = x.permute(0, 2, 3, 1).unflatten(-1, (-1, r, r))  # (B, H, W, C, r, r)
        x = x.permute(0, 1, 4, 2, 5, 3)  # (B, H, r, W, r, C)
        return x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def fuse_stages(x3: Tensor, x4: Tensor, image_shape: tuple[int, ...]) -> Tensor:
    """x3, x4: (B, D, H, W), of the last two stages -> their sum as tokens (B, H·W, D).

    image_shape: of the images (B, 3, H, W), for the error where the two differ in size.
    """
    if x3.shape != x4.shape:
        raise ValueError(
            f"InternImage: images of {image_shape[2]}×{image_shape[3]} have last stages of "
            f"{tuple(x3.shape[2:])} and, twice enlarged, {tuple(x4.shape[2:])}; the attention "
            "pooling needs the same, give multiples of 32"
        )
    return (x3 + x4).permute(0, 2, 3, 1).flatten(1, 2)
