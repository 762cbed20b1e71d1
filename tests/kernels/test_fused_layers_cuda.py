"""The CUDA kernels of the fused layers without a GPU: compiled for several, and run on the CPU."""

import ctypes
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groundwork.kernels import (
    cuda_compiler,
    depthwise_norm_gelu_cuda,
    fused_layers_cuda,
    host_compiler,
    residual_norm_cuda,
)
from groundwork.kernels.cuda_compiler import compile_cubin
from groundwork.kernels.depthwise_norm_gelu import depthwise_norm_gelu_reference
from groundwork.kernels.fused_layers_cuda import SOURCE, Plan, Problem, limit, plan
from groundwork.kernels.residual_norm import residual_norm_reference

HERE = Path(__file__).parent
#: NVRTC comes with the CUDA builds of torch.
needs_nvrtc = pytest.mark.skipif(
    cuda_compiler.unavailable() is not None, reason=str(cuda_compiler.unavailable())
)
Launch = Callable[[str, Plan, Problem, int, tuple[Tensor | None, ...]], None]

#: Each kernel with its number of tensors.
RESIDUAL = {"residual_norm_forward": 7, "residual_norm_backward": 7, "residual_norm_sums": 5}
CONVOLUTION = {
    **{"depthwise_norm_gelu_forward": 6, "depthwise_norm_gelu_backward": 8},
    **{"depthwise_norm_gelu_image": 3, "depthwise_norm_gelu_sums": 9},
}


def entries(side: int) -> str:
    """A function for each kernel that runs all blocks; pointers are passed without their types."""
    lines = [
        "struct Any { void* p; template <class T> operator T*() const { return (T*)p; } };",
        'extern "C" long problem_bytes() { return sizeof(Problem); }',
    ]
    for name, count in (CONVOLUTION if side else RESIDUAL).items():
        passed = ", ".join(f"Any{{a[{i}]}}" for i in range(count))
        lines.append(
            f'extern "C" void run_{name}(unsigned blocks, const Problem* q, void** a) {{ '
            f"host_device::launch(blocks, THREADS, [=] {{ {name}(*q, {passed}); }}); }}"
        )
    return "\n".join(lines)


@cache
def host_build(folder: Path, settings: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """The CUDA source as C++ for this machine, with these settings."""
    compiler = host_compiler.find_compiler()
    assert compiler is not None
    name = "-".join(str(value) for _, value in settings)
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    headers = (HERE / "cuda_on_host.h", host_compiler.SOURCES / SOURCE)
    includes = "".join(f'#include "{header}"\n' for header in headers)
    source.write_text(includes + entries(dict(settings)["SIDE"]))
    defines = [f"-D{key}={value}" for key, value in settings]
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-w", "-ffp-contract=off"]
    subprocess.run([compiler, *flags, *defines, source, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    assert loaded.problem_bytes() == ctypes.sizeof(Problem)
    return loaded


@pytest.fixture(scope="session")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """`launch` that runs the kernels on the CPU."""
    if host_compiler.find_compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_host")

    def launch(
        name: str,
        chosen: Plan,
        problem: Problem,
        blocks: int,
        tensors: tuple[Tensor | None, ...],
    ) -> None:
        library = host_build(folder, tuple(sorted(chosen.settings.items())))
        count = {**RESIDUAL, **CONVOLUTION}[name]
        assert len(tensors) == count
        pointers = (ctypes.c_void_p * len(tensors))(
            *(None if t is None else t.data_ptr() for t in tensors)
        )
        getattr(library, f"run_{name}")(blocks, ctypes.byref(problem), pointers)

    return launch


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def expected_of(op: Callable[..., Tensor], tensors: list[Tensor], **more: Any) -> list[Tensor]:
    """The output and the gradients of the reference in float64, for a gradient of ones to two."""
    inputs = [t.double().requires_grad_() for t in tensors]
    output = op(*inputs, **more)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad_of(output).double())]


def grad_of(output: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=g)


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = (a.double() - b.double()).abs().max()
        assert error <= tolerance * max(1.0, float(b.abs().max())), number


def convolution_on_host(tensors: list[Tensor], dtype: torch.dtype, eps: float) -> list[Tensor]:
    x, *given = tensors
    output = depthwise_norm_gelu_cuda.forward(x.to(dtype), *given, eps, dtype)  # type: ignore[call-arg]
    grad = grad_of(output).to(dtype)
    grad_x, grads = depthwise_norm_gelu_cuda.backward(grad, x.to(dtype), *given, eps)  # type: ignore[call-arg]
    return [output, grad_x, grads[:-3].t().reshape(given[0].shape), *grads[-3:]]


def residual_on_host(
    tensors: list[Tensor], keep: Tensor | None, dtype: torch.dtype, eps: float
) -> list[Tensor]:
    x, y, *given = tensors
    low = x.to(dtype), y.to(dtype)
    output = residual_norm_cuda.forward(*low, *given, keep, eps, dtype)  # type: ignore[call-arg]
    grad = grad_of(output).to(dtype)
    grad_y, grads = residual_norm_cuda.backward(grad, low[1], *given, keep, eps)  # type: ignore[call-arg]
    return [output, grad, grad_y, *grads]


#: Channels (several pieces per lane, one lane, tails) with the side of the convolution.
SHAPES = st.sampled_from([(16, 3), (5, 3), (80, 5), (264, 3), (33, 7), (1, 1)])


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    image=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    shape=SHAPES,
    seed=st.integers(0, 2**31 - 1),
)
def test_a_convolution_of_any_shape_agrees_with_float64(
    on_host: Launch, batch: int, image: tuple[int, int], shape: tuple[int, int], seed: int
) -> None:
    channels, side = shape
    vector = (channels,)
    tensors = draw(
        seed, (batch, *image, channels), (channels, 1, side, side), vector, vector, vector
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise_norm_gelu_cuda, "launch", on_host)
        actual = convolution_on_host(tensors, torch.float32, 0.1)
    assert_near(actual, expected_of(depthwise_norm_gelu_reference, tensors, eps=0.1), 2e-5)


@settings(max_examples=25, deadline=None)
@given(
    image=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    channels=st.sampled_from([16, 5, 80, 264, 1, 96]),
    drops=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_residual_of_any_shape_agrees_with_float64(
    on_host: Launch, image: tuple[int, int], channels: int, drops: bool, seed: int
) -> None:
    size, vector = (2, *image, channels), (channels,)
    tensors = draw(seed, size, size, vector, vector, vector)
    keep = torch.tensor([0.0, 1.25]) if drops else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual_norm_cuda, "launch", on_host)
        actual = residual_on_host(tensors, keep, torch.float32, 0.1)
    wide = None if keep is None else keep.double()
    assert_near(actual, expected_of(residual_norm_reference, tensors, keep=wide, eps=0.1), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_only_a_storage(
    on_host: Launch, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    for module in (residual_norm_cuda, depthwise_norm_gelu_cuda):
        monkeypatch.setattr(module, "launch", on_host)
    vector = (48,)
    tensors = draw(0, (2, 5, 7, 48), (48, 1, 3, 3), vector, vector, vector)
    tensors[0] = tensors[0].to(dtype).float()
    step = torch.finfo(dtype).eps
    output, *rest = convolution_on_host(tensors, dtype, 1e-6)
    expected = convolution_on_host(tensors, torch.float32, 1e-6)
    assert output.dtype == rest[0].dtype == dtype
    torch.testing.assert_close(output.float(), expected[0], rtol=0.6 * step, atol=1e-6)
    # the gradient of the output is rounded, and that of the convolution's output once more
    assert_near(rest, expected[1:], 4 * step)
    tensors = draw(0, (2, 5, 7, 48), (2, 5, 7, 48), vector, vector, vector)
    tensors[:2] = [t.to(dtype).float() for t in tensors[:2]]
    output, *rest = residual_on_host(tensors, None, dtype, 1e-6)
    expected = residual_on_host(tensors, None, torch.float32, 1e-6)
    torch.testing.assert_close(output.float(), expected[0], rtol=0.6 * step, atol=1e-6)
    assert_near(rest, expected[1:], 4 * step)


def test_what_autocast_mixes_keeps_each_its_own(
    on_host: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x float32, y bfloat16 -> float32."""
    monkeypatch.setattr(residual_norm_cuda, "launch", on_host)
    x, y, *given = draw(0, (2, 5, 7, 40), (2, 5, 7, 40), (40,), (40,), (40,))
    y = y.bfloat16()
    output = residual_norm_cuda.forward(x, y, *given, None, 1e-6, torch.float32)
    expected = residual_norm_reference(x, y.float(), *given)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    grad_y, _ = residual_norm_cuda.backward(x, y, *given, None, 1e-6)
    assert grad_y.dtype == torch.bfloat16


#: InternImage's: the widths of its first and last stages, both sizes of the convolution.
VARIANTS = [
    (dtype, channels, side)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for channels, side in ((64, 3), (512, 3), (1536, 3), (320, 5), (80, 0), (1536, 0))
]


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("dtype", "channels", "side"), VARIANTS)
def test_every_variant_compiles_without_spilling(
    arch: str, dtype: torch.dtype, channels: int, side: int
) -> None:
    cubin = compile_cubin(SOURCE, plan(channels, (dtype,) * 3, side).settings, arch)
    assert cubin.code.startswith(b"\x7fELF")
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", cubin.log)]
    assert len(spilled) >= 6
    assert not any(spilled), cubin.log


@pytest.mark.parametrize("channels", [1, 7, 64, 80, 264, 1000, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alignment", [4, 16])
def test_a_plan_covers_the_channels(channels: int, dtype: torch.dtype, alignment: int) -> None:
    chosen = plan(channels, (dtype, dtype, dtype), 3, alignment).settings
    assert channels % chosen["WIDTH"] == 0
    assert chosen["LANES"] * chosen["PIECES"] * chosen["WIDTH"] >= channels
    assert chosen["WIDTH"] * dtype.itemsize <= alignment


def test_what_does_not_fit_the_registers_is_left_to_the_plain_layers() -> None:
    assert limit(2048) is None
    assert limit(4096) == "4096 channels do not fit its registers"
    assert limit(64, 9) == "a kernel of 9×9 does not fit its registers"
    assert fused_layers_cuda.span_of(10, 64) == 1
