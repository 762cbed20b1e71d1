"""DCNv2 with zero offsets and weights of one is a convolution."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from groundwork.kernels.deform_conv2d import modulated_deform_conv2d


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_zero_offsets_give_a_convolution(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    wide = torch.randn(2, 8, 7, 6), torch.randn(5, 8, 3, 3) / 8, torch.randn(5)
    low = [t.to(dtype) for t in wide]
    output = modulated_deform_conv2d(
        low[0],
        torch.zeros(2, 18, 4, 3, dtype=dtype),
        torch.ones(2, 9, 4, 3, dtype=dtype),
        *low[1:],
        stride=2,
        padding=1,
    )
    assert output.dtype == dtype
    expected = F.conv2d(*(t.double() for t in low), stride=2, padding=1)
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"stride": 0}, ValueError, "stride is 0; both sizes must be at least 1"),
        ({"dilation": "1"}, TypeError, "dilation is '1'; expected an integer"),
        ({"padding": (-1, 0)}, ValueError, r"padding is \(-1, 0\)"),
        ({"padding": 0, "dilation": 4}, ValueError, ".*use a larger image or more padding"),
        ({"mask": None}, TypeError, r"mask is None; for DCNv1, .*torch.ones"),
        ({"mask": torch.ones(1, 9, 4, 3)}, ValueError, r"mask has .* expected \(2, 9, 4, 3\)"),
        ({"offset": torch.ones(2, 17, 4, 3)}, ValueError, r"offset has .* P = 9"),
        ({"offset": torch.ones(2, 54, 4, 3)}, ValueError, r"offset has .* divide C = 8"),
        ({"offset": torch.ones(2, 18, 7, 6)}, ValueError, r"offset has .*\(2, 18, 4, 3\)"),
        ({"weight": torch.ones(5, 3, 3, 3)}, ValueError, r"weight has .* divide C = 8"),
        ({"weight": torch.ones(5, 4, 3, 3)}, ValueError, r"weight has .* divide C = 8 and K"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\); expected \(5,\)"),
        ({"x": torch.ones(8, 7, 6)}, ValueError, r"x has shape .*expected \(N, C, H, W\)"),
        ({"x": torch.ones(2, 8, 7, 6).byte()}, TypeError, "x is torch.uint8; cast it"),
        ({"offset": torch.ones(2, 18, 4, 3, device="meta")}, ValueError, "offset is on meta, x on"),
    ],
)
def test_a_wrong_argument_is_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {
        "x": torch.ones(2, 8, 7, 6),
        "offset": torch.zeros(2, 18, 4, 3),
        "mask": torch.ones(2, 9, 4, 3),
        "weight": torch.ones(5, 8, 3, 3),
        "bias": torch.ones(5),
        **{"stride": 2, "padding": 1, "dilation": 1},
    }
    with pytest.raises(error, match=f"^modulated_deform_conv2d: {message}"):
        modulated_deform_conv2d(**{**arguments, **changes})
