"""depthwise_norm_gelu and residual_norm against plain PyTorch in float64, on the CPU."""

import inspect
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from groundwork.kernels import (
    depthwise_norm_gelu_cpu,
    doctor,
    fused_layers,
    host_compiler,
    residual_norm_cpu,
)
from groundwork.kernels.depthwise_norm_gelu import (
    depthwise_norm_gelu,
    depthwise_norm_gelu_reference,
)
from groundwork.kernels.residual_norm import residual_norm, residual_norm_reference

needs_kernels = pytest.mark.skipif(
    fused_layers.unavailable("cpu", None) is not None,
    reason=str(fused_layers.unavailable("cpu", None)),
)
ORDER = ("DEFAULT", "AVX2", "AVX512")
#: The instruction sets that this CPU has.
RUNNABLE = ORDER[: ORDER.index(host_compiler.instruction_set()) + 1]
CHANNELS = st.sampled_from([1, 2, 5, 8, 15, 16, 17, 33, 48, 64, 80, 130])
SEEDS = st.integers(0, 2**31 - 1)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def draw_convolution(
    batch: int, image: tuple[int, int], channels: int, k: int, seed: int
) -> list[Tensor]:
    vector = (channels,)
    weight = (channels, 1, k, k)
    return draw(seed, (batch, *image, channels), weight, vector, vector, vector)


def draw_residual(
    batch: int, image: tuple[int, int], channels: int, seed: int
) -> tuple[list[Tensor], Tensor]:
    size, vector = (batch, *image, channels), (channels,)
    *tensors, keep = draw(seed, size, size, vector, vector, vector, (batch,))
    return tensors, keep.clamp_min(0)  # some samples are dropped


def results(
    op: Callable[..., Tensor],
    tensors: list[Tensor],
    grad: Tensor | None = None,
    **arguments: Any,
) -> list[Tensor]:
    """The output, and the gradients of all tensors; grad: of the output."""
    inputs = [t.detach().requires_grad_() for t in tensors]
    output = op(*inputs, **arguments)
    if grad is None:
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output.detach(), *torch.autograd.grad(output, inputs, grad.to(output.dtype))]


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Relative to the largest value, as sums of many may cancel."""
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = (a.double() - b.double()).abs().max() if b.numel() else torch.zeros(())
        assert error <= tolerance * max(1.0, float(b.abs().amax()) if b.numel() else 0), number


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


CASES = (
    (depthwise_norm_gelu, draw_convolution(1, (5, 4), 6, 3, 0)),
    (residual_norm, draw_residual(1, (5, 4), 6, 0)[0]),
)


# ---- shapes, instruction sets, storage ----


@needs_kernels
@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    image=st.tuples(st.integers(1, 35), st.integers(1, 21)),
    channels=CHANNELS,
    k=st.sampled_from([1, 3, 5, 7, 9]),
    seed=SEEDS,
)
def test_a_convolution_of_any_shape_agrees_with_float64(
    batch: int, image: tuple[int, int], channels: int, k: int, seed: int
) -> None:
    # eps not tiny, else the deviation of one or two channels makes the result a step function
    tensors = draw_convolution(batch, image, channels, k, seed)
    actual = results(depthwise_norm_gelu, tensors, eps=0.1, backend="cpu")
    expected = results(depthwise_norm_gelu_reference, doubles(tensors), eps=0.1)
    assert_near(actual, expected, 2e-5)


@needs_kernels
@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    image=st.tuples(st.integers(1, 20), st.integers(1, 9)),
    channels=CHANNELS,
    drops=st.booleans(),
    seed=SEEDS,
)
def test_a_residual_of_any_shape_agrees_with_float64(
    batch: int, image: tuple[int, int], channels: int, drops: bool, seed: int
) -> None:
    tensors, keep = draw_residual(batch, image, channels, seed)
    wide = keep.double() if drops else None
    actual = results(residual_norm, tensors, keep=keep if drops else None, eps=0.1, backend="cpu")
    expected = results(residual_norm_reference, doubles(tensors), keep=wide, eps=0.1)
    assert_near(actual, expected, 2e-5)


def cpu_results(instructions: str, dtype: torch.dtype) -> list[Tensor]:
    """Both ops through one instruction set, with tails in every dimension."""
    tensors = draw_convolution(2, (31, 7), 37, 3, 0)
    x, *parameters = tensors[0].to(dtype), *tensors[1:]
    module: Any = depthwise_norm_gelu_cpu
    output = module.forward(x, *parameters, 1e-6, dtype, instructions)
    grads = module.backward(output, x, *parameters, 1e-6, instructions)
    (x, y, *vectors), keep = draw_residual(3, (7, 5), 37, 0)
    x, y = x.to(dtype), y.to(dtype)
    module = residual_norm_cpu
    total = module.forward(x, y, *vectors, keep, 1e-6, dtype, instructions)
    return [output, *grads, total, *module.backward(x, y, *vectors, keep, 1e-6, instructions)]


@needs_kernels
@pytest.mark.parametrize("instructions", RUNNABLE)
def test_instruction_sets_agree(instructions: str) -> None:
    best = cpu_results(RUNNABLE[-1], torch.float32)
    assert_near(cpu_results(instructions, torch.float32), best, 1e-5)


@needs_kernels
@pytest.mark.parametrize("channels", [37, 64])
def test_bfloat16_is_only_a_storage(channels: int) -> None:
    tensors = draw_convolution(2, (9, 7), channels, 3, 0)
    low = [tensors[0].bfloat16(), *tensors[1:]]
    actual = depthwise_norm_gelu_cpu.forward(*low, 1e-6, torch.bfloat16)  # type: ignore[call-arg]
    widened = [t.float() for t in low]
    expected = depthwise_norm_gelu_cpu.forward(*widened, 1e-6, torch.float32)  # type: ignore[call-arg]
    torch.testing.assert_close(actual, expected.bfloat16(), rtol=0, atol=0)
    (x, y, *vectors), keep = draw_residual(2, (9, 7), channels, 0)
    low = [x.bfloat16(), y.bfloat16(), *vectors, keep]
    actual = residual_norm_cpu.forward(*low, 1e-6, torch.bfloat16)  # type: ignore[call-arg]
    widened = [t.float() for t in low]
    expected = residual_norm_cpu.forward(*widened, 1e-6, torch.float32)  # type: ignore[call-arg]
    torch.testing.assert_close(actual, expected.bfloat16(), rtol=0, atol=0)


@needs_kernels
def test_gradients_keep_the_dtype_of_their_inputs() -> None:
    for op, tensors in (
        (depthwise_norm_gelu, draw_convolution(2, (9, 7), 24, 3, 0)),
        (residual_norm, draw_residual(2, (9, 7), 24, 0)[0]),
    ):
        low = [t.bfloat16() for t in tensors]
        actual = results(op, low, backend="cpu")
        assert {t.dtype for t in actual} == {torch.bfloat16}
        assert_near(actual, results(op, [t.float() for t in low], backend="cpu"), 2e-2)


@needs_kernels
def test_the_number_of_threads_changes_no_bit() -> None:
    before = torch.get_num_threads()
    convolution, (residual, keep) = (
        draw_convolution(3, (61, 9), 24, 3, 0),
        draw_residual(3, (61, 9), 24, 0),
    )
    runs = []
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            runs.append(
                results(depthwise_norm_gelu, convolution, backend="cpu")
                + results(residual_norm, residual, keep=keep, backend="cpu")
            )
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@needs_kernels
def test_no_images_give_no_output_and_gradients_of_zero() -> None:
    for op, tensors in (
        (depthwise_norm_gelu, draw_convolution(0, (4, 3), 8, 3, 0)),
        (residual_norm, draw_residual(0, (4, 3), 8, 0)[0]),
    ):
        output, *gradients = results(op, tensors, backend="cpu")
        assert output.shape == (0, 4, 3, 8)
        assert all(not g.any() for g in gradients)


@needs_kernels
def test_the_tails_of_the_normal_distribution_are_right() -> None:
    u = torch.linspace(-12, 12, 4096).view(1, 1, 1, -1)
    ones, zeros = torch.ones(4096), torch.zeros(4096)
    # mean 0, and a scale of the deviation: the norm changes nothing
    scale = torch.full((4096,), float(u.var(correction=0).sqrt()))
    tensors = [u, ones.view(-1, 1, 1, 1), zeros, scale, zeros]
    actual = depthwise_norm_gelu(*tensors, eps=0.0, backend="cpu")
    expected = depthwise_norm_gelu_reference(*doubles(tensors), eps=0.0)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=3e-6)


# ---- as PyTorch sees them ----


@needs_kernels
@pytest.mark.filterwarnings("ignore:.*")
def test_the_ops_pass_opcheck() -> None:
    ops = torch.ops.groundwork
    tensors = [t.requires_grad_() for t in draw_convolution(1, (5, 4), 6, 3, 0)]
    torch.library.opcheck(ops.depthwise_norm_gelu.default, (*tensors, 1e-6, torch.float32, "cpu"))
    residual, keep = draw_residual(2, (3, 4), 6, 0)
    residual = [t.requires_grad_() for t in residual]
    for factor in (None, keep):
        torch.library.opcheck(
            ops.residual_norm.default, (*residual, factor, 1e-6, torch.float32, "cpu")
        )


@needs_kernels
def test_they_compile_without_graph_breaks() -> None:
    residual, keep = draw_residual(2, (3, 4), 6, 0)
    for op, tensors, more in (
        (depthwise_norm_gelu, draw_convolution(2, (5, 4), 6, 3, 0), {}),
        (residual_norm, residual, {"keep": keep}),
    ):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        expected = results(op, tensors, **more)
        assert_near(results(compiled, tensors, **more), expected, 1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_plain_layers(autocast: bool, dtype: torch.dtype) -> None:
    x, *parameters = draw_convolution(1, (5, 4), 6, 3, 0)
    (first, second, *vectors), _ = draw_residual(1, (5, 4), 6, 0)
    if not autocast:
        parameters = [p.to(dtype) for p in parameters]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        actual = depthwise_norm_gelu(x.to(dtype), *parameters)
        expected = depthwise_norm_gelu_reference(x.to(dtype), *parameters)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)
        actual = residual_norm(first, second.to(dtype), *vectors)
        expected = residual_norm_reference(first, second.to(dtype), *vectors)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)


def test_on_the_meta_device_the_plain_layers_run() -> None:
    for op, tensors in CASES:
        assert op(*(t.to("meta") for t in tensors)).shape == (1, 5, 4, 6)


def test_what_no_kernel_can_take_runs_as_plain_layers() -> None:
    """With derivatives of every order."""
    tensors = [t.double().requires_grad_() for t in draw_convolution(1, (3, 3), 2, 3, 0)]
    assert torch.autograd.gradgradcheck(
        lambda *t: depthwise_norm_gelu(*t, eps=0.1), tensors, fast_mode=True
    )
    residual = [t.double().requires_grad_() for t in draw_residual(1, (2, 2), 3, 0)[0]]
    assert torch.autograd.gradgradcheck(
        lambda *t: residual_norm(*t, eps=0.1), residual, fast_mode=True
    )


def test_without_a_compiler_the_plain_layers_run_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROUNDWORK_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    forget_libraries()
    try:
        tensors = draw_convolution(1, (5, 4), 6, 3, 0)
        with pytest.warns(UserWarning, match=r"run unfused on the CPU.*no C\+\+ compiler"):
            output = depthwise_norm_gelu(*tensors)
        torch.testing.assert_close(output, depthwise_norm_gelu_reference(*tensors), rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"backend 'cpu' cannot run: no C\+\+ compiler"):
            depthwise_norm_gelu(*tensors, backend="cpu")
    finally:
        forget_libraries()


def forget_libraries() -> None:
    for cached in (
        host_compiler.load_host_library,
        fused_layers.host_library,
        fused_layers._unavailable,
    ):
        cached.cache_clear()


@needs_kernels
@pytest.mark.parametrize("broken", [depthwise_norm_gelu_cpu, residual_norm_cpu])
def test_a_broken_library_of_one_op_leaves_the_other_fused(
    broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = host_compiler.build_host_library

    def fail_for_one(source: str, instructions: str | None = None) -> host_compiler.HostLibrary:
        if source == broken.SOURCE:
            raise host_compiler.HostCompileError("the compiler stumbles")
        return build(source, instructions)

    for user in (host_compiler, doctor):
        monkeypatch.setattr(user, "build_host_library", fail_for_one)
    modules = {"depthwise_norm_gelu": depthwise_norm_gelu_cpu, "residual_norm": residual_norm_cpu}
    forget_libraries()
    cases = {
        "depthwise_norm_gelu": (depthwise_norm_gelu, draw_convolution(1, (5, 4), 6, 3, 0)),
        "residual_norm": (residual_norm, draw_residual(1, (5, 4), 6, 0)[0]),
    }
    try:
        for name, (op, tensors) in cases.items():
            if modules[name] is broken:
                with pytest.warns(UserWarning, match=f"{name}: the layers run unfused on the CPU"):
                    op(*tensors)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # one warning is enough
                op(*tensors)
            if modules[name] is broken:
                with pytest.raises(
                    ValueError, match=f"{name}: backend 'cpu' cannot run: the compiler"
                ):
                    op(*tensors, backend="cpu")
            else:
                op(*tensors, backend="cpu")
        shown = {status.op: status.backend for status in doctor.kernel_statuses()}
        assert {name: shown[name] for name in modules} == {
            name: "reference" if module is broken else "cpu" for name, module in modules.items()
        }
    finally:
        forget_libraries()


# ---- what a kernel cannot do ----


@needs_kernels
@pytest.mark.parametrize(("op", "tensors"), CASES)
@pytest.mark.parametrize("of_gradient", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_a_second_derivative_is_refused(
    op: Callable[..., Tensor], tensors: list[Tensor], of_gradient: bool, traced: bool
) -> None:
    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    inputs = [t.detach().requires_grad_() for t in tensors]
    with Nothing() if traced else nullcontext():  # by the registered op
        output = op(*inputs, backend="cpu")
    grad = torch.ones_like(output).requires_grad_(of_gradient)
    gradients = torch.autograd.grad(output, inputs, grad, create_graph=True)
    assert all(g.requires_grad for g in gradients[-3:])
    sought = [grad] if of_gradient else inputs[-3:]
    message = f"{op.__name__}: the op has first derivatives only.*call {op.__name__}_reference"
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(gradients[-1].sum(), sought)


@needs_kernels
@pytest.mark.parametrize(("op", "tensors"), CASES)
def test_under_vmap_the_plain_layers_run(op: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    x, *rest = tensors
    two = torch.stack((x, 2 * x))
    actual = torch.func.vmap(lambda t: op(t, *rest))(two)
    torch.testing.assert_close(actual[1], op(two[1], *rest), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.func.grad(lambda t: op(t, *rest).sum())(x),
        results(lambda t: op(t, *rest), [x], grad=torch.ones_like(x))[1],
        rtol=1e-4,
        atol=1e-5,
    )
    message = f"{op.__name__}: backend 'cpu' cannot run: vmap.*use backend='auto'"
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(lambda t: op(t, *rest, backend="cpu"))(two)


@pytest.mark.parametrize(("op", "tensors"), CASES)
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("of_images", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_parameters", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_parameters_may_have_another_dtype(
    op: Callable[..., Tensor],
    tensors: list[Tensor],
    backend: str,
    of_images: torch.dtype,
    of_parameters: torch.dtype,
    autocast: bool,
) -> None:
    if backend == "cpu" and torch.float16 in (of_images, of_parameters):
        pytest.skip("the CPU's kernels store no float16")
    if backend == "cpu" and fused_layers.unavailable("cpu", None):
        pytest.skip("no kernels")
    low = [t.to(of_images if t.dim() == 4 and t.shape[1] != 1 else of_parameters) for t in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = results(op, low, backend=backend)
    output = of_images
    if op is residual_norm:
        output = torch.promote_types(of_images, of_parameters)
    elif autocast:
        output = torch.bfloat16
    assert [t.dtype for t in actual] == [output, *(t.dtype for t in low)]
    assert_near(actual, results(op, doubles(low), backend="reference"), 6e-2)


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 4, 3, 6), (2, 0, 3, 6), (2, 4, 0, 6), (0, 0, 0, 6)])
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_a_residual_of_nothing_is_nothing(shape: tuple[int, ...], backend: str) -> None:
    keep = torch.ones(shape[0])
    tensors = draw(0, shape, shape, (6,), (6,), (6,))
    output, *gradients = results(residual_norm, tensors, keep=keep, backend=backend)
    assert output.shape == shape
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_what_has_no_channels_or_pixels_is_refused(backend: str) -> None:
    for shape in ((2, 0, 3, 6), (2, 4, 0, 6), (2, 4, 3, 0), (0, 4, 3, 0)):
        tensors = draw(0, shape, (shape[3], 1, 3, 3), *[(shape[3],)] * 3)
        with pytest.raises(ValueError, match=r"depthwise_norm_gelu: x has shape .* at least one"):
            depthwise_norm_gelu(*tensors, backend=backend)
    for shape in ((2048, 0), (2, 4, 3, 0)):
        tensors = draw(0, shape, shape, *[(0,)] * 3)
        with pytest.raises(ValueError, match=r"residual_norm: x has shape .* at least one channel"):
            residual_norm(*tensors, backend=backend)


@needs_kernels
def test_no_batches_of_images_are_nothing_on_every_backend() -> None:
    tensors = draw_convolution(0, (4, 3), 6, 3, 0)
    for backend in ("auto", "cpu", "reference"):
        output, *gradients = results(depthwise_norm_gelu, tensors, backend=backend)
        assert output.shape == (0, 4, 3, 6)
        assert not any(g.any() for g in gradients)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.zeros(5, 4, 6)}, r"x has shape \(5, 4, 6\), expected \(B, H, W, C\)"),
        ({1: torch.zeros(6, 1, 2, 2)}, r"weight has shape \(6, 1, 2, 2\), .*\(6, 1, k, k\) .* odd"),
        ({1: torch.zeros(6, 6, 3, 3)}, r"weight has shape \(6, 6, 3, 3\)"),
        ({2: torch.zeros(5)}, r"bias has shape \(5,\), expected \(6,\)"),
        ({4: torch.zeros(6, device="meta")}, "shift is on meta, expected cpu"),
    ],
)
def test_a_wrong_tensor_of_a_convolution_is_named(changes: dict[int, Tensor], message: str) -> None:
    tensors = draw_convolution(1, (5, 4), 6, 3, 0)
    for index, tensor in changes.items():
        tensors[index] = tensor
    with pytest.raises(ValueError, match=f"depthwise_norm_gelu: {message}"):
        depthwise_norm_gelu(*tensors)


def test_a_wrong_tensor_of_a_residual_is_named() -> None:
    (x, y, *vectors), keep = draw_residual(2, (5, 4), 6, 0)
    with pytest.raises(ValueError, match=r"residual_norm: y has shape .*, expected \(2, 5, 4, 6\)"):
        residual_norm(x, y[:, 1:], *vectors)
    with pytest.raises(ValueError, match=r"gamma has shape \(3,\), expected \(6,\)"):
        residual_norm(x, y, *vectors[:2], vectors[2][:3])
    with pytest.raises(ValueError, match=r"keep has shape \(1,\), expected \(2,\)"):
        residual_norm(x, y, *vectors, keep=keep[:1])
    with pytest.raises(TypeError, match=r"y is torch\.int64, expected a floating-point dtype"):
        residual_norm(x, y.long(), *vectors)
    with pytest.raises(ValueError, match="backend 'gpu' is unknown; choose one of auto"):
        residual_norm(x, y, *vectors, backend="gpu")
    with pytest.raises(ValueError, match="backend 'cuda' cannot run: the tensors are on cpu"):
        residual_norm(x, y, *vectors, backend="cuda")
    with pytest.raises(ValueError, match=r"'cpu' cannot run: a tensor is torch.float16, not"):
        residual_norm(x.half(), y.half(), *(v.half() for v in vectors), backend="cpu")


@pytest.mark.parametrize(("op", "tensors"), CASES)
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_what_is_no_tensor_is_named(
    op: Callable[..., Tensor], tensors: list[Tensor], backend: str
) -> None:
    names = list(inspect.signature(op).parameters)
    for index, name in enumerate(names[:5]):
        for value, called in (
            (None, "None"),
            (tensors[index].numpy(), r"a numpy\.ndarray \(torch\.as_tensor makes it a tensor\)"),
            (1.0, "a float"),
        ):
            changed: list[Any] = [*tensors[:index], value, *tensors[index + 1 :]]
            message = f"{op.__name__}: {name} is {called}, expected a torch.Tensor"
            with pytest.raises(TypeError, match=message):
                op(*changed, backend=backend)


@pytest.mark.parametrize(("op", "tensors"), CASES)
def test_eps_is_a_number_from_zero_on(op: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    for eps, called in (("1e-6", "a str"), (None, "None"), (torch.ones(1), "a Tensor")):
        with pytest.raises(TypeError, match=f"{op.__name__}: eps is {called}, expected a number"):
            op(*tensors, eps=eps)
    for eps in (-1e-6, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{op.__name__}: eps is {eps}, expected a number"):
            op(*tensors, eps=eps)
    op(*tensors, eps=1)


@pytest.mark.parametrize("module", [depthwise_norm_gelu_cpu, residual_norm_cpu])
@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
def test_other_compilers_and_processors(compiler: str, module: Any, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} in PATH")
    flags = [*host_compiler.COMMON_FLAGS, "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    source = host_compiler.SOURCES / module.SOURCE
    subprocess.run([compiler, *flags, "-c", source, "-o", tmp_path / "code.o"], check=True)


SANITIZED = """
import ctypes, sys, torch
from groundwork.kernels import depthwise_norm_gelu_cpu as convolution, residual_norm_cpu as residual
libraries = [ctypes.CDLL(path) for path in sys.argv[1:]]
convolution.library = lambda instructions=None: libraries[0]
residual.library = lambda instructions=None: libraries[1]
for k, channels, image in ((3, 16, (6, 5)), (5, 3, (1, 1)), (7, 33, (31, 2)), (9, 5, (2, 19))):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, *image, channels).to(dtype)
        given = [torch.randn(channels, 1, k, k), *torch.randn(3, channels)]
        output = convolution.forward(x, *given, 1e-6, dtype)
        convolution.backward(output, x, *given, 1e-6)
        vectors = [*torch.randn(3, channels), torch.rand(2)]
        residual.forward(x, x, *vectors, 1e-6, dtype)
        residual.backward(x, x, *vectors, 1e-6)
print("clean")
"""


def test_no_access_is_out_of_bounds(tmp_path: Path) -> None:
    """Under AddressSanitizer and UBSan."""
    compiler = host_compiler.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    asked = [compiler, "-print-file-name=libasan.so"]
    runtime = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"{compiler} has no AddressSanitizer")
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize=alignment"]
    libraries = []
    for module in (depthwise_norm_gelu_cpu, residual_norm_cpu):
        libraries.append(str(tmp_path / f"{module.SOURCE}.so"))
        source = host_compiler.SOURCES / module.SOURCE
        command = [compiler, *flags, *checks, "-fno-sanitize-recover=all", source]
        subprocess.run([*command, "-o", libraries[-1]], check=True)
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, *libraries],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert done.stdout.strip().endswith("clean"), done.stderr[-3000:]
