"""What comes after InternImage's stages: a convolution for T to XL, fused tokens for H and G."""

from collections.abc import Callable

from torch import Tensor, nn

from groundwork.pretrain.models.batch_norm import FloatBatchNorm
from groundwork.pretrain.models.initialisation import Conv2d


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
