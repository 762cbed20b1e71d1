"""The blocked linear + cross-entropy against torch's, which holds all logits."""

from typing import Any, Literal

import numpy as np
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [0, 5])
def test_rows_that_do_not_count_give_gradients_of_zero_as_in_torch(
    rows: int, smoothing: float, reduction: Literal["mean", "sum"], dtype: torch.dtype
) -> None:
    x, weight, targets, bias = (
        t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t[:rows] * 0 - 100
        for t in draw(5, 4, 6, 0, bias=True)
    )
    leaves = [x[:rows].detach().requires_grad_(), weight, bias]
    for op in (linear_cross_entropy, linear_cross_entropy_reference):
        loss = op(leaves[0], weight, targets, bias, label_smoothing=smoothing, reduction=reduction)
        assert loss.isnan() == (reduction == "mean")
        for grad in torch.autograd.grad(loss, leaves):
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_ignored_row_that_is_no_number_does_not_count(value: float, smoothing: float) -> None:
    """Not even in the gradients, where it does in torch."""
    x, weight, targets, bias = draw(6, 4, 7, 0, bias=True)
    targets[0], targets[3], targets[4] = -100, -100, 2
    with torch.no_grad():
        x[0] = value
    loss = linear_cross_entropy(x, weight, targets, bias, label_smoothing=smoothing)
    theirs = linear_cross_entropy_reference(x, weight, targets, bias, label_smoothing=smoothing)
    torch.testing.assert_close(loss, theirs)
    gradients = torch.autograd.grad(loss, [x, weight, bias])
    counted = [x[1:].detach().requires_grad_(), weight, targets[1:], bias]
    theirs = linear_cross_entropy_reference(*counted, label_smoothing=smoothing)
    expected = torch.autograd.grad(theirs, [counted[0], weight, bias])
    assert not gradients[0][0].any()
    torch.testing.assert_close((gradients[0][1:], *gradients[1:]), expected)


def scaled_errors(op: Any, tensors: list[Tensor], scale: float, cast: bool) -> list[float]:
    """The relative errors of a scaled loss's gradients, against float64."""
    x, weight, targets, bias = tensors
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", torch.float16, enabled=cast):
        loss = op(leaves[0], leaves[1], targets, leaves[2])
    gradients = torch.autograd.grad(loss * scale, leaves)
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    logits = torch.nn.functional.linear(exact[0], exact[1], exact[2])
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, targets) * scale, exact
    )
    return [
        float((a.double() - b).norm() / b.norm()) for a, b in zip(gradients, expected, strict=True)
    ]


@pytest.mark.parametrize("scale", [2.0**10, 2.0**16, 2.0**20])
@pytest.mark.parametrize("cast", [False, True])
def test_float16_with_a_scaled_loss_is_as_exact_as_torch(scale: float, cast: bool) -> None:
    """A mean of many rows over many classes: its gradients are below what float16 can hold."""
    g = torch.Generator().manual_seed(0)
    rows, depth, vocabulary = 4096, 16, 3000
    x, weight = torch.randn(rows, depth, generator=g), torch.randn(vocabulary, depth, generator=g)
    targets, bias = torch.randint(vocabulary, (rows,), generator=g), torch.zeros(vocabulary)
    tensors = [x, weight / 4, targets, bias]
    if not cast:
        tensors = [t.half() if t.is_floating_point() else t for t in tensors]
    ours = scaled_errors(linear_cross_entropy, tensors, scale, cast)
    theirs = scaled_errors(linear_cross_entropy_reference, tensors, scale, cast)
    assert max(ours) < 2e-3, ours
    for a, b in zip(ours, theirs, strict=True):
        assert a <= 1.2 * b + 1e-6, (ours, theirs)


@pytest.mark.parametrize("of_gradient", [False, True])
@pytest.mark.parametrize("needed", [0, 1, 3])
def test_a_second_derivative_is_refused(needed: int, of_gradient: bool) -> None:
    tensors = [t.detach() for t in draw(5, 4, 6, 0, bias=True)]
    tensors[needed].requires_grad_()
    loss = linear_cross_entropy(*tensors)
    upstream = torch.ones(()).requires_grad_(of_gradient)
    (grad,) = torch.autograd.grad(loss, tensors[needed], upstream, create_graph=True)
    assert grad.requires_grad
    message = "linear_cross_entropy: .*first derivatives only.*call linear_cross_entropy_reference"
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(grad.sum(), upstream if of_gradient else tensors[needed])


def test_transforms_of_functorch_are_refused() -> None:
    x, weight, targets = (t.detach() for t in draw(5, 4, 6, 0, bias=False))
    with pytest.raises(RuntimeError, match=r"func\.grad .*; call linear_cross_entropy_reference"):
        torch.func.grad(linear_cross_entropy)(x, weight, targets)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: vmap"):
        torch.func.vmap(linear_cross_entropy, (0, None, 0))(x[None], weight, targets[None])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_torchs(low: torch.dtype) -> None:
    x, weight, targets, bias = draw(5, 4, 6, 0, bias=True)
    leaves = [x, weight, bias]
    with torch.autocast("cpu", low):
        ours = linear_cross_entropy(x, weight, targets, bias)
        theirs = linear_cross_entropy_reference(x, weight, targets, bias)
        assert linear_cross_entropy(x.to(low), weight, targets, bias).dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves),
        torch.autograd.grad(theirs, leaves),
        rtol=2e-2,
        atol=1e-2,
    )


def test_it_runs_on_the_meta_device() -> None:
    tensors = [t.detach().to("meta") for t in draw(5, 4, 6, 0, bias=True)]
    assert linear_cross_entropy(*tensors).is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_compiles_without_graph_breaks(dtype: torch.dtype) -> None:
    tensors = [
        t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t
        for t in draw(5, 4, 6, 0, bias=True)
    ]
    leaves = [t for t in tensors if t.requires_grad]
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(*tensors), linear_cross_entropy(*tensors)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)
    )


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
        ({"weight": torch.zeros(0, 4)}, r"weight \(0, 4\); expected .* V at least 1"),
        ({"weight": torch.zeros(6, 4, device="meta")}, "weight is on meta, expected cpu, where x"),
        ({"bias": torch.zeros(6, device="meta")}, "bias is on meta, expected cpu, where x is"),
        (
            {"targets": torch.zeros(5, dtype=torch.int64, device="meta")},
            "targets are on meta, expected cpu, where x is",
        ),
        ({"targets": torch.tensor([0, 1, 6, 2, -100])}, r"targets have 6, .* 0 to 5 .* \(-100\)"),
        ({"targets": torch.tensor([0, 1, -1, 2, -100])}, "targets have -1, expected 0 to 5"),
        (
            {"targets": torch.tensor([0, 1, -100, 2, 9]), "ignore_index": 9},
            r"targets have -100, expected 0 to 5 .* ignore_index \(9\)",
        ),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 4, dtype=torch.int64)}, r"x is torch\.int64, expected a floating"),
        ({"x": None}, "x is None, expected a torch.Tensor"),
        ({"weight": np.zeros((6, 4))}, r"weight is a numpy\.ndarray .*, expected a torch.Tensor"),
        ({"weight": torch.zeros(6, 4).bfloat16()}, r"weight is torch\.bfloat16, x torch\.float32;"),
        ({"bias": torch.zeros(6).half()}, r"bias is torch\.float16, x torch\.float32; convert one"),
        ({"targets": [0, 1, 2, 3, 4]}, "targets are a list; expected an int64 torch.Tensor"),
        ({"ignore_index": None}, "ignore_index is None; give an int"),
    ],
)
def test_a_wrong_type_is_named(change: dict[str, Any], message: str) -> None:
    x, weight, targets = draw(5, 4, 6, 0, bias=False)
    arguments: dict[str, Any] = {"x": x, "weight": weight, "targets": targets, **change}
    with pytest.raises(TypeError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(**arguments)


def test_without_gradients_only_the_loss_is_computed() -> None:
    tensors = draw(12, 8, 20, 0, bias=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss = linear_cross_entropy(*tensors)
    assert counter.get_total_flops() == 2 * 12 * 8 * 20
    torch.testing.assert_close(loss, linear_cross_entropy_reference(*tensors).detach())
