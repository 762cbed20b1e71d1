"""The CUDA kernels on a GPU, against the reference on the same device."""

from typing import Any

import pytest
import torch
from torch import Tensor

from groundwork.kernels.dcnv3 import choose_backend, dcnv3
from groundwork.kernels.dcnv3_reference import dcnv3_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def draw(
    batch: int, side: int, groups: int, depth: int, points: int, dtype: torch.dtype
) -> list[Tensor]:
    torch.manual_seed(0)
    size = (batch, side, side)
    tensors = (
        torch.randn(*size, groups * depth),
        torch.randn(*size, groups * points * 2) * 2,
        torch.randn(*size, groups * points),
    )
    return [t.to("cuda", dtype).requires_grad_() for t in tensors]


def results(op: Any, tensors: list[Tensor], grad: Tensor, **arguments: Any) -> list[Tensor]:
    output = op(*tensors, **arguments)
    return [output, *torch.autograd.grad(output, tensors, grad.to(output.dtype))]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.float16, 4e-3), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(
    ("side", "groups", "depth", "kernel"), [(56, 4, 16, 3), (14, 10, 32, 3), (9, 3, 7, 5)]
)
def test_output_and_gradients_are_those_of_the_reference(
    side: int,
    groups: int,
    depth: int,
    kernel: int,
    softmax: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    tensors = draw(2, side, groups, depth, kernel**2, dtype)
    assert choose_backend("auto", *tensors) == "cuda"
    grad = torch.randn(tensors[0].shape, device="cuda")
    arguments = {"kernel_size": kernel, "groups": groups, "softmax": softmax}
    actual = results(dcnv3, tensors, grad, **arguments)
    wide = [t.detach().float().requires_grad_() for t in tensors]
    expected = results(dcnv3_reference, wide, grad.to(dtype).float(), **arguments)
    for name, a, b in zip(("output", "value", "offset", "mask"), actual, expected, strict=True):
        assert a.dtype == dtype
        error = (a.float() - b).abs().max() / b.abs().max().clamp_min(1)
        assert error <= tolerance, name


def test_deterministic_gradients_have_the_same_bits_in_every_run() -> None:
    tensors = draw(2, 28, 4, 16, 9, torch.float32)
    grad = torch.randn(tensors[0].shape, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        runs = [results(dcnv3, tensors, grad, kernel_size=3, groups=4) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_the_kernel_runs_on_the_current_stream() -> None:
    tensors = [t.detach() for t in draw(2, 28, 4, 16, 9, torch.bfloat16)]
    expected = dcnv3(*tensors, kernel_size=3, groups=4)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # long enough that a kernel on another stream would read before it is done
        torch.cuda._sleep(50_000_000)
        late = tensors[0] * 1
        output = dcnv3(late, *tensors[1:], kernel_size=3, groups=4)
    stream.synchronize()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_the_op_can_be_captured_in_a_graph() -> None:
    tensors = [t.detach() for t in draw(2, 28, 4, 16, 9, torch.bfloat16)]
    expected = dcnv3(*tensors, kernel_size=3, groups=4)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = dcnv3(*tensors, kernel_size=3, groups=4)
    output.zero_()
    graph.replay()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_current_is_used() -> None:
    tensors = [t.detach() for t in draw(1, 14, 4, 16, 9, torch.float32)]
    expected = dcnv3(*tensors, kernel_size=3, groups=4)
    with torch.cuda.device(0):
        output = dcnv3(*(t.to("cuda:1") for t in tensors), kernel_size=3, groups=4)
    torch.testing.assert_close(output.to("cuda:0"), expected)
