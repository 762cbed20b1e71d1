"""Stochastic depth in the fused layers: the results are those of the formula."""

import pytest
import torch
from torch import Tensor

from groundwork.pretrain.models.dcnv3_module import DCNv3
from groundwork.pretrain.models.internimage_blocks import Block, Mlp, Norm

CASES = [("pre_norm", None), ("pre_norm", 0.5), ("post_norm", None), ("post_norm", 0.5)]
CASES += [("res_post_norm", None)]


def build(norm: Norm, layer_scale: float | None, drop_path: float, backend: str = "auto") -> Block:
    torch.manual_seed(0)
    block = Block(
        16,
        DCNv3(16, 2, backend=backend),
        Mlp(16, 32),
        norm=norm,
        layer_scale=layer_scale,
        drop_path=drop_path,
        backend=backend,
    )
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


def trained(block: Block, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    output = block(x)
    output.square().sum().backward()
    gradients = [p.grad for p in (x, *block.parameters())]
    assert all(g is not None for g in gradients)
    return [output.detach(), *gradients]  # type: ignore[list-item]


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(("norm", "layer_scale"), CASES)
def test_dropped_samples_are_those_of_the_plain_layers(
    norm: Norm, layer_scale: float | None, batch: int
) -> None:
    x = torch.randn(batch, 5, 4, 16)
    fast = trained(build(norm, layer_scale, 0.5), x)
    plain = trained(build(norm, layer_scale, 0.5, "reference"), x)
    for got, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("norm", ["pre_norm", "post_norm"])
def test_under_autocast_the_output_has_the_dtype_it_has_without_dropping(norm: Norm) -> None:
    x = torch.randn(8, 3, 3, 16)
    dtypes = set()
    for drop_path in (0.0, 0.5):
        block = build(norm, 0.5, drop_path)
        with torch.autocast("cpu", torch.bfloat16):
            dtypes.add(block(x).dtype)
    assert len(dtypes) == 1
