"""FlashInternImage: the DCNv4 layer against a slow one, its names, and its first steps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from groundwork.pretrain.models.dcnv4_module import DCNv4
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig

TINY = InternImageConfig(
    num_classes=3,
    core="dcnv4",
    channels=16,
    depths=(1, 1, 2, 1),
    groups=(1, 2, 4, 8),
    dcn_output_bias=False,
    mlp_fc2_bias=False,
    drop_path=0.0,
)


def slow_layer(layer: DCNv4, x: Tensor) -> Tensor:
    """The layer by its definition, one pixel, group and point after the other."""
    n, height, width, channels = x.shape
    value = x @ layer.value_proj.weight.T + layer.value_proj.bias
    guide = x
    if layer.offset_mask_dw is not None:
        convolution: Any = layer.offset_mask_dw
        pad = convolution.weight.shape[-1] // 2
        guide = F.conv2d(
            x.permute(0, 3, 1, 2), convolution.weight, convolution.bias, 1, pad, groups=channels
        ).permute(0, 2, 3, 1)
    packed = guide @ layer.offset_mask.weight.T + layer.offset_mask.bias
    radius, dim = layer.kernel_size // 2, channels // layer.groups
    steps = range(-radius, radius + 1)
    grid = [(i, j) for i in steps for j in steps if not (layer.remove_center and (i, j) == (0, 0))]
    rows = []
    for b in range(n):
        for y in range(height):
            for x_ in range(width):
                for g in range(layer.groups):
                    part = packed[b, y, x_, g * 3 * len(grid) : (g + 1) * 3 * len(grid)]
                    image = value[b, :, :, g * dim : (g + 1) * dim]
                    total = torch.zeros(dim, dtype=x.dtype)
                    for p, (i, j) in enumerate(grid):
                        column = x_ + layer.offset_scale * (i + part[2 * p])
                        row = y + layer.offset_scale * (j + part[2 * p + 1])
                        total = total + part[2 * len(grid) + p] * bilinear(image, row, column)
                    rows.append(total)
    sampled = torch.stack(rows).view(n, height, width, channels)
    if layer.center_feature_scale:
        weight = layer.center_feature_scale_proj_weight
        scale = torch.sigmoid(sampled @ weight.T + layer.center_feature_scale_proj_bias)
        scale = scale.repeat_interleave(dim, dim=-1)
        sampled = sampled * (1 - scale) + value * scale
    bias = 0 if layer.output_proj.bias is None else layer.output_proj.bias
    return sampled @ layer.output_proj.weight.T + bias


def bilinear(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """image: (H, W, D), zero outside -> (D,)."""
    height, width, dim = image.shape
    total = torch.zeros(dim, dtype=image.dtype)
    for corner_row in (row.floor(), row.floor() + 1):
        for corner_column in (column.floor(), column.floor() + 1):
            if 0 <= corner_row < height and 0 <= corner_column < width:
                weight = (1 - (row - corner_row).abs()) * (1 - (column - corner_column).abs())
                total = total + weight * image[int(corner_row), int(corner_column)]
    return total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dw_kernel_size": 3, "offset_scale": 0.5, "output_bias": False},
        {"dw_kernel_size": 5, "offset_scale": 2.0, "remove_center": True},
        {"center_feature_scale": True},
    ],
    ids=["t", "b", "remove_center", "center_feature_scale"],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_layer_is_its_definition(options: dict[str, Any], backend: str) -> None:
    torch.manual_seed(0)
    layer = DCNv4(12, 3, **options, backend=backend).double()
    for parameter in layer.parameters():
        parameter.data.copy_(0.5 * torch.randn_like(parameter))
    x = torch.randn(2, 4, 3, 12, dtype=torch.float64)
    gradients = []
    for function in (layer, lambda t: slow_layer(layer, t)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        output = function(leaf)
        output.square().sum().backward()
        assert leaf.grad is not None
        gradients.append([output.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    for ours, slow in zip(*gradients, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-9)


def test_names_and_shapes_are_the_official_ones() -> None:
    """C = 80, G = 5: 135 values, padded to 136."""
    layer = DCNv4(80, 5, dw_kernel_size=3, center_feature_scale=True, output_bias=False)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "center_feature_scale_proj_weight": (5, 80),
        "center_feature_scale_proj_bias": (5,),
        "offset_mask_dw.weight": (80, 1, 3, 3),
        "offset_mask_dw.bias": (80,),
        "offset_mask.weight": (136, 80),
        "offset_mask.bias": (136,),
        "value_proj.weight": (80, 80),
        "value_proj.bias": (80,),
        "output_proj.weight": (80, 80),
    }


@pytest.mark.parametrize("name", ["flash_t", "flash_s", "flash_b", "flash_l"])
def test_variants_have_the_biases_and_convolutions_of_the_paper(name: str) -> None:
    with torch.device("meta"):
        model = InternImage(InternImageConfig.variant(name))
    state = model.state_dict()
    has_biases = name == "flash_l"
    for layer in ("dcn.output_proj", "mlp.fc2"):
        biases = [k for k in state if k.endswith(f"{layer}.bias")]
        weights = [k for k in state if k.endswith(f"{layer}.weight")]
        assert len(biases) == (len(weights) if has_biases else 0)
    has_convolution = any(".dcn.offset_mask_dw." in key for key in state)
    assert has_convolution == (name != "flash_t")
    assert not any(".dcn.mask." in key or ".dcn.dw_conv." in key for key in state)
    # as DCNv3's without its offset and mask norms and with other projections: near its size
    plain = InternImageConfig.variant(name.removeprefix("flash_"))
    with torch.device("meta"):
        twin = InternImage(plain)
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, twin)]
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


def test_a_new_block_is_the_identity() -> None:
    """No softmax: weights of 0 add nothing, and the MLP of a T-like block is all that is left."""
    torch.manual_seed(0)
    model = InternImage(TINY)
    block = model.levels[0].blocks[0]
    x = torch.randn(1, 5, 6, 16)
    torch.testing.assert_close(block(x), x + block.mlp(block.norm2(x)), rtol=0, atol=1e-6)
    layer = DCNv4(8, 2)
    assert layer(torch.randn(1, 3, 3, 8)).unique().tolist() == [0.0]


@pytest.mark.parametrize(
    ("norm", "backend"),
    [("pre_norm", "auto"), ("post_norm", "reference"), ("res_post_norm", "auto")],
)
def test_a_small_model_learns_two_images_by_heart(norm: Any, backend: str) -> None:
    torch.manual_seed(0)
    config = replace(TINY, norm=norm, num_classes=2, dw_kernel_size=3, kernel_backend=backend)
    if norm == "post_norm":
        config = replace(config, layer_scale=1.0)
    model = InternImage(config)
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 0])
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(20):
        loss = F.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss) < 0.05
    offsets = [m.offset_mask.weight for m in model.modules() if isinstance(m, DCNv4)]
    assert all(weight.count_nonzero() > 0 for weight in offsets)


def test_wrong_sizes_are_named_with_their_remedy() -> None:
    with pytest.raises(ValueError, match="DCNv4: 10 channels in 4 groups"):
        DCNv4(10, 4)
    with pytest.raises(ValueError, match="dw_kernel_size is 4"):
        DCNv4(8, 4, dw_kernel_size=4)
