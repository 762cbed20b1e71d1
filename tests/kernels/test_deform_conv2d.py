"""DCNv2 with zero offsets and weights of one is a convolution."""

import pytest
import torch
import torch.nn.functional as F

from groundwork.kernels.deform_conv2d import modulated_deform_conv2d


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_zero_offsets_give_a_convolution(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 8, 7, 6), torch.randn(5, 8, 3, 3) / 8, torch.randn(5)
    low = [t.to(dtype) for t in (x, weight, bias)]
    output = modulated_deform_conv2d(
        low[0],
        torch.zeros(2, 18, 4, 3, dtype=dtype),
        torch.ones(2, 9, 4, 3, dtype=dtype),
        *low[1:],
        stride=2,
        padding=1,
    )
    assert output.dtype == dtype
    expected = F.conv2d(*(t.float() for t in low), stride=2, padding=1)
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)
