"""DCNv4's packed layout, against DCNv3 with its offsets and weights apart."""

from typing import Any

import pytest
import torch

from groundwork.kernels.dcnv3 import dcnv3
from groundwork.kernels.dcnv4 import dcnv4, packed_channels


@pytest.mark.parametrize(("groups", "points", "expected"), [(4, 9, 112), (1, 1, 8), (8, 9, 216)])
def test_packed_channels_are_those_of_the_official_layer(
    groups: int, points: int, expected: int
) -> None:
    assert packed_channels(groups, points) == expected


@pytest.mark.parametrize("remove_center", [False, True])
def test_a_packed_tensor_is_read_group_by_group(remove_center: bool) -> None:
    torch.manual_seed(0)
    groups, points = 3, 9 - remove_center
    value = torch.randn(2, 5, 6, 12, requires_grad=True)
    packed = torch.randn(2, 5, 6, packed_channels(groups, points), requires_grad=True)
    arguments = {"kernel_size": 3, "groups": groups, "offset_scale": 0.5}
    output = dcnv4(value, packed, remove_center=remove_center, **arguments)

    blocks = packed[..., : 3 * groups * points].reshape(2, 5, 6, groups, 3 * points)
    offset = torch.cat([blocks[..., g, : 2 * points] for g in range(groups)], -1)
    mask = torch.cat([blocks[..., g, 2 * points :] for g in range(groups)], -1)
    expected = dcnv3(value, offset, mask, remove_center=remove_center, **arguments)
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    ours = torch.autograd.grad(output, (value, packed), grad)
    theirs = torch.autograd.grad(expected, (value, packed), grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert ours[1][..., 3 * groups * points :].count_nonzero() == 0


def test_too_few_channels_are_named() -> None:
    value = torch.randn(1, 4, 4, 8)
    with pytest.raises(ValueError, match=r"K at least 54 = 3·groups·P \(56 in the official"):
        dcnv4(value, torch.randn(1, 4, 4, 53), kernel_size=3, groups=2)


def test_errors_name_what_the_caller_passed() -> None:
    value, packed = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 56)
    arguments: dict[str, Any] = {"kernel_size": 3, "groups": 2}
    with pytest.raises(ValueError, match=r"^dcnv4: offset_mask has shape \(2, 3, 5, 56\)") as found:
        dcnv4(value, packed[:, 1:], **arguments)
    assert "dcnv3" not in str(found.value)
    with pytest.raises(TypeError, match=r"^dcnv4: offset_mask is torch.int64; cast it"):
        dcnv4(value, packed.long(), **arguments)
    with pytest.raises(TypeError, match=r"^dcnv4: offset_mask is None; expected a torch.Tensor"):
        dcnv4(value, None, **arguments)
    with pytest.raises(ValueError, match=r"^dcnv4: offset_mask is on meta, value on cpu"):
        dcnv4(value, packed.to("meta"), **arguments)
    with pytest.raises(ValueError, match=r"^dcnv4: backend 'cpu' cannot run: offset_mask is torch"):
        dcnv4(value, packed.double(), backend="cpu", **arguments)
    with pytest.raises(ValueError, match=r"^dcnv4: backend 'gpu' is unknown"):
        dcnv4(value, packed, backend="gpu", **arguments)
    with pytest.raises(ValueError, match=r"^dcnv4: stride is 0"):
        dcnv4(value, packed, stride=0, **arguments)
    with pytest.raises(ValueError, match=r"^dcnv4: .*looks like \(N, C, H, W\)"):
        dcnv4(value.permute(0, 3, 1, 2), packed, **arguments)
