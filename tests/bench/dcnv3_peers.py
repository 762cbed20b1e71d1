"""What DCNv3 is measured against: 3x3, stride 1, on the device of the tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d


def grid_sample_core(value: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
    """DCNv3 3x3, stride 1, as the official project computes it without its extension."""
    n, h, w, channels = value.shape
    padded = F.pad(value, (0, 0, 1, 1, 1, 1))
    height, width = h + 2, w + 2
    like = {"device": value.device, "dtype": offset.dtype}
    line, column = torch.meshgrid(
        torch.arange(h, **like) + 1.5, torch.arange(w, **like) + 1.5, indexing="ij"
    )  # centres, in pixels of the padded image
    centre = torch.stack((column / width, line / height), -1).view(1, h, w, 1, 2)
    step = torch.tensor([-1.0, 0.0, 1.0], **like)
    points = torch.stack(torch.meshgrid(step, step, indexing="ij"), -1).view(9, 2)
    size = torch.tensor([float(width), float(height)], **like)
    points = (points / size).repeat(groups, 1)  # (G·9, 2), columns outermost
    at = centre + points + offset.view(n, h, w, groups * 9, 2) / size
    grid = (2 * at - 1).view(n, h * w, groups, 9, 2).transpose(1, 2).flatten(0, 1)
    image = padded.view(n, height * width, groups, -1).permute(0, 2, 3, 1)
    image = image.reshape(n * groups, channels // groups, height, width)
    sampled = F.grid_sample(image, grid, mode="bilinear", align_corners=False)
    weights = mask.view(n, h * w, groups, 9).transpose(1, 2).reshape(n * groups, 1, h * w, 9)
    out = (sampled * weights).sum(-1).view(n, channels, h * w)
    return out.transpose(1, 2).reshape(n, h, w, channels).contiguous()


def torchvision_core(value: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
    """The same through torchvision: rows outermost, (y, x), channels first."""
    n, h, w, channels = value.shape
    moved = offset.view(n, h, w, groups, 3, 3, 2).transpose(4, 5).flip(-1)
    weights = mask.view(n, h, w, groups, 3, 3).transpose(4, 5)
    return deform_conv2d(
        value.permute(0, 3, 1, 2).contiguous(),
        moved.flatten(3).permute(0, 3, 1, 2).contiguous(),
        value.new_ones(channels, 1, 3, 3),
        padding=1,
        mask=weights.flatten(3).permute(0, 3, 1, 2).contiguous(),
    ).permute(0, 2, 3, 1)
