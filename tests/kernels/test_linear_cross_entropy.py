"""The blocked linear + cross-entropy against torch's, which holds all logits."""

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from groundwork.kernels import linear_cross_entropy as module
from groundwork.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)


def draw(rows: int, depth: int, vocabulary: int, seed: int, bias: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, depth, generator=g).requires_grad_()
    weight = torch.randn(vocabulary, depth, generator=g).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < 0.2] = -100
    return [x, weight, targets, *([torch.randn(vocabulary).requires_grad_()] if bias else [])]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 30),
    depth=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    block=st.sampled_from([1, 7, 64, 10_000]),
    smoothing=st.sampled_from([0.0, 0.1, 0.6]),
    bias=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_loss_and_gradients_are_those_of_torch(
    rows: int,
    depth: int,
    vocabulary: int,
    block: int,
    smoothing: float,
    bias: bool,
    reduction: Literal["mean", "sum"],
    seed: int,
) -> None:
    tensors = draw(rows, depth, vocabulary, seed, bias)
    tensors[2][0] = 0  # at least one row counts
    arguments: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ELEMENTS", block)
        ours = linear_cross_entropy(*tensors, **arguments)
    theirs = linear_cross_entropy_reference(*tensors, **arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    leaves = [t for t in tensors if t.requires_grad]
    for a, b in zip(
        torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * theirs, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_that_do_not_count_give_nan_as_in_torch() -> None:
    x, weight, targets = draw(5, 4, 6, 0, bias=False)
    targets[:] = -100
    assert linear_cross_entropy(x, weight, targets).isnan()
    assert linear_cross_entropy(x, weight, targets, reduction="sum") == 0


def test_bfloat16_products_have_float32_sums() -> None:
    x, weight, targets = draw(64, 32, 500, 0, bias=False)
    low = [x.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()]
    ours = linear_cross_entropy(*low, targets)
    exact = [t.detach().double().requires_grad_() for t in low]
    theirs = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=3e-3)
    for a, b in zip(
        torch.autograd.grad(ours, low), torch.autograd.grad(theirs, exact), strict=True
    ):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - b).norm() / b.norm()) < 1e-2


def test_only_the_gradients_asked_for_are_made() -> None:
    x, weight, targets = draw(8, 4, 6, 0, bias=False)
    loss = linear_cross_entropy(x, weight.detach(), targets)
    (grad,) = torch.autograd.grad(loss, x)
    expected = torch.autograd.grad(linear_cross_entropy_reference(x, weight.detach(), targets), x)
    torch.testing.assert_close(grad, expected[0])
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets).requires_grad


def test_the_largest_tensor_is_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits would be 64 x 5,000; no tensor of more than a block may be made."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 10_000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    x, weight, targets = draw(64, 2, 5000, 0, bias=False)
    with Watch():
        linear_cross_entropy(x, weight, targets).backward()
    assert largest == 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(6, 3)}, r"x has shape \(5, 4\), weight \(6, 3\)"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"of shape \(4,\); expected int64"),
        ({"targets": torch.zeros(5)}, "targets are torch.float32"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\), expected 6 values"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"reduction": "none"}, "reduction is 'none'"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    x, weight, targets = draw(5, 4, 6, 0, bias=False)
    arguments: dict[str, Any] = {"x": x, "weight": weight, "targets": targets, **change}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_without_gradients_only_the_loss_is_computed() -> None:
    tensors = draw(12, 8, 20, 0, bias=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss = linear_cross_entropy(*tensors)
    assert counter.get_total_flops() == 2 * 12 * 8 * 20
    torch.testing.assert_close(loss, linear_cross_entropy_reference(*tensors).detach())
