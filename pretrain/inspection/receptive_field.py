"""The effective receptive field of a layer (Luo et al. 2016, arXiv 1701.04128)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from groundwork.pretrain.inspection.sampling import block_of, stride_of
from groundwork.pretrain.models.internimage import InternImage


def effective_receptive_field(
    model: InternImage,
    images: Iterable[Tensor],
    stage: int,
    block: int | None = None,
    centre_xy: tuple[float, float] | None = None,
    seed: int = 0,
) -> Tensor:
    """How strongly each pixel acts on one pixel of a block's output: (H, W), its sum is 1.

    images: (3, H, W) each, normalised, of one size. centre_xy: the pixel of the image whose next
    pixel of the layer is meant; None for the middle. For each image the absolute gradient of the
    layer's channels there with respect to the image, summed over colours; then the mean over
    images. The channels are summed with random signs: with equal ones the output of a LayerNorm
    has a constant sum, and no gradient.
    """
    target = block_of(model, stage, block)
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        outputs.append(output)

    generator = torch.Generator().manual_seed(seed)
    total: Tensor | None = None
    handle = target.register_forward_hook(keep)
    try:
        for image in images:
            if total is not None and image.shape[1:] != total.shape:
                raise ValueError(
                    f"an image is {tuple(image.shape[1:])}, the first was {tuple(total.shape)}; "
                    "resize them to one size"
                )
            outputs.clear()
            pixels = image[None].clone().requires_grad_()
            with torch.enable_grad():
                model.forward_intermediates(pixels, indices=[stage], stop_early=True)
                column, line = _layer_pixel(outputs[0], image, stage, centre_xy)
                feature = outputs[0][0, line, column]  # (C,)
                signs = torch.randint(0, 2, feature.shape, generator=generator) * 2 - 1
                projected = (feature * signs.to(feature)).sum()
            (gradient,) = torch.autograd.grad(projected, pixels)
            field = gradient[0].abs().sum(0)
            total = field if total is None else total + field
    finally:
        handle.remove()
    if total is None:
        raise ValueError("no image is given; an effective receptive field needs at least one")
    return total / total.sum().clamp_min(torch.finfo(total.dtype).tiny)


def _layer_pixel(
    output: Tensor, image: Tensor, stage: int, centre_xy: tuple[float, float] | None
) -> tuple[int, int]:
    """output: (1, h, w, C) -> column and line."""
    _, h, w, _ = output.shape
    x, y = centre_xy or (image.shape[2] / 2, image.shape[1] / 2)
    stride = stride_of(stage)
    return min(round(x / stride), w - 1), min(round(y / stride), h - 1)


def side_of_share(field: Tensor, centre: tuple[float, float], share: float) -> int:
    """The side, in pixels, of the smallest square around a pixel that has a share of a field.

    field: (H, W), of sum 1; centre: (x, y).
    """
    height, width = field.shape
    x = (torch.arange(width, device=field.device) - round(centre[0])).abs()
    y = (torch.arange(height, device=field.device) - round(centre[1])).abs()
    radius = torch.maximum(x.view(1, -1), y.view(-1, 1)).flatten()  # (H·W,)
    sums = torch.zeros(int(radius.max()) + 1, dtype=torch.float64, device=field.device)
    sums.index_add_(0, radius, field.flatten().double())
    within = sums.cumsum(0)
    reached = int((within < share * within[-1]).sum())
    return 2 * min(reached, len(sums) - 1) + 1
