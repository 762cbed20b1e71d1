"""The fused layers on a GPU, against plain PyTorch in float64 on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from groundwork.kernels.depthwise_norm_gelu import (
    depthwise_norm_gelu,
    depthwise_norm_gelu_reference,
)
from groundwork.kernels.residual_norm import residual_norm, residual_norm_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
TOLERANCES = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def results(op: Callable[..., Tensor], tensors: list[Tensor], **more: Any) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in tensors]
    output = op(*inputs, **more)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=g).to(output.device, output.dtype)
    gradients = torch.autograd.grad(output, inputs, grad)
    return [t.detach().cpu().double() for t in (output, *gradients)]


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), number


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("side", "channels", "k"), [(56, 64, 3), (7, 512, 3), (13, 35, 5)])
def test_the_convolution_is_that_of_the_plain_layers(
    side: int, channels: int, k: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(3, channels)
    tensors = [torch.randn(2, side, side, channels), torch.randn(channels, 1, k, k) / k, *vectors]
    low = [t.to(dtype) for t in tensors]
    actual = results(depthwise_norm_gelu, [t.cuda() for t in low], backend="cuda")
    expected = results(depthwise_norm_gelu_reference, [t.double() for t in low])
    assert_near(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(("side", "channels"), [(56, 80), (7, 1536), (13, 35)])
def test_the_residual_is_that_of_the_plain_layers(
    side: int, channels: int, drops: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    size, vectors = (2, side, side, channels), torch.randn(3, channels)
    low = [t.to(dtype) for t in (torch.randn(size), torch.randn(size), *vectors)]
    keep = torch.tensor([0.0, 1.25]) if drops else None
    on_gpu = None if keep is None else keep.cuda()
    actual = results(residual_norm, [t.cuda() for t in low], keep=on_gpu, backend="cuda")
    wide = None if keep is None else keep.double()
    expected = results(residual_norm_reference, [t.double() for t in low], keep=wide)
    assert_near(actual, expected, TOLERANCES[dtype])


def test_under_autocast_outputs_have_the_dtypes_of_the_plain_layers() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 9, 9, 64, device="cuda")
    vectors = list(torch.randn(3, 64, device="cuda"))
    weight = torch.randn(64, 1, 3, 3, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for low in (x, x.bfloat16()):
            actual = depthwise_norm_gelu(low, weight, *vectors, backend="cuda")
            expected = depthwise_norm_gelu_reference(low, weight, *vectors)
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)
            actual = residual_norm(low, y.bfloat16(), *vectors, backend="cuda")
            expected = residual_norm_reference(low, y.bfloat16(), *vectors)
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)
