"""The CUDA kernels on a GPU, against the reference on the same device."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groundwork.kernels import autotune, dcnv3_cuda
from groundwork.kernels.dcnv3 import choose_backend, dcnv3
from groundwork.kernels.dcnv3_cuda import (
    ATOMIC_CHOICES,
    FORWARD_CHOICES,
    TILE_CHOICES,
    BackwardChoice,
    ForwardChoice,
)
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


def force(monkeypatch: pytest.MonkeyPatch, choice: BackwardChoice | ForwardChoice) -> None:
    """Let all calls be launched with this choice."""
    if isinstance(choice, ForwardChoice):
        monkeypatch.setattr(dcnv3_cuda, "FORWARD_CHOICES", (choice,))
    else:
        monkeypatch.setattr(dcnv3_cuda, "backward_choices", lambda call: (choice,))


def test_the_output_has_the_same_bits_for_every_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [t.detach() for t in draw(4, 28, 8, 16, 9, torch.bfloat16)]
    outputs = []
    for choice in FORWARD_CHOICES:
        force(monkeypatch, choice)
        outputs.append(dcnv3(*tensors, kernel_size=3, groups=8, softmax=True))
    assert all(torch.equal(output, outputs[0]) for output in outputs[1:])


@pytest.mark.parametrize("choice", [*TILE_CHOICES, *ATOMIC_CHOICES], ids=str)
@pytest.mark.parametrize("depth", [16, 32])
@pytest.mark.parametrize("spread", [0.5, 8.0])  # within what a tile holds, and mostly beyond
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_every_choice_gives_the_gradients_of_the_reference(
    choice: BackwardChoice,
    depth: int,
    spread: float,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force(monkeypatch, choice)
    value, offset, mask = (t.detach() for t in draw(2, 30, 4, depth, 9, dtype))
    tensors = [t.requires_grad_() for t in (value, offset * spread, mask)]
    grad = torch.randn(value.shape, device="cuda").to(dtype)
    arguments = {"kernel_size": 3, "groups": 4, "softmax": True}
    actual = results(dcnv3, tensors, grad, **arguments)
    wide = [t.detach().float().requires_grad_() for t in tensors]
    expected = results(dcnv3_reference, wide, grad.float(), **arguments)
    for name, a, b in zip(("output", "value", "offset", "mask"), actual, expected, strict=True):
        error = (a.float() - b).abs().max() / b.abs().max().clamp_min(1)
        assert error <= tolerance, name


def test_a_call_is_tuned_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = draw(4, 28, 8, 16, 9, torch.bfloat16)
    grad = torch.randn(tensors[0].shape, device="cuda")
    arguments = {"kernel_size": 3, "groups": 8, "softmax": True}
    monkeypatch.setenv("GROUNDWORK_CACHE", str(tmp_path))
    autotune.table_of.cache_clear()
    before = results(dcnv3, tensors, grad, **arguments)
    assert not list(tmp_path.rglob("*.json"))
    monkeypatch.setenv("GROUNDWORK_TUNE", "1")
    tuned = results(dcnv3, tensors, grad, **arguments)
    autotune.table_of.cache_clear()  # what later tests use
    assert torch.equal(tuned[0], before[0])
    for a, b in zip(tuned[1:], before[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert len(list(tmp_path.rglob("*.json"))) == 1


@pytest.mark.parametrize(
    "choice", [TILE_CHOICES[0], ATOMIC_CHOICES[0], None], ids=["tile", "atomic", "fixed"]
)
@pytest.mark.parametrize(("depth", "dtype"), [(16, torch.bfloat16), (7, torch.float32)])
def test_small_case(
    choice: BackwardChoice | None,
    depth: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few threads, tails, samples near, far and nowhere: also what compute-sanitizer looks at."""
    if choice is not None:
        force(monkeypatch, choice)
    tensors = [t.detach() for t in draw(1, 9, 2, depth, 9, dtype)]
    tensors[1].view(-1)[::5] *= 30
    tensors[1].view(-1)[::7] = float("nan")
    tensors = [t.requires_grad_() for t in tensors]
    grad = torch.randn(tensors[0].shape, device="cuda")
    torch.use_deterministic_algorithms(choice is None)
    try:
        actual = results(dcnv3, tensors, grad, kernel_size=3, groups=2, softmax=True)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()
    assert all(t.isfinite().all() for t in actual)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing_in_small_cases(tool: str) -> None:
    sanitizer = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=99"]
    if tool == "memcheck":  # torch asks for things that may not be there
        sanitizer.append("--report-api-errors=no")
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", "test_small_case", __file__]
    # every tensor an allocation of its own, so that an access beyond its end is noticed
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*sanitizer, *tests], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
