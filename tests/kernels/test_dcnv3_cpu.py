"""The C++ kernels against the reference: any shape, every instruction set of this CPU."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from groundwork.kernels import dcnv3_cpu, dcnv3_reference, host_compiler
from groundwork.kernels.dcnv3 import dcnv3
from groundwork.kernels.dcnv3_geometry import Geometry, make_geometry
from groundwork.kernels.host_compiler import HostCompileError, build_host_library

pytestmark = pytest.mark.skipif(
    dcnv3_cpu.unavailable() is not None, reason=str(dcnv3_cpu.unavailable())
)

ORDER = ("DEFAULT", "AVX2", "AVX512")
#: The instruction sets that this CPU has.
RUNNABLE = ORDER[: ORDER.index(host_compiler.instruction_set()) + 1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of compiled libraries."""
    monkeypatch.setenv("GROUNDWORK_CACHE", str(tmp_path))
    host_compiler.load_host_library.cache_clear()
    dcnv3_cpu.unavailable.cache_clear()
    yield tmp_path / "kernels"
    host_compiler.load_host_library.cache_clear()
    dcnv3_cpu.unavailable.cache_clear()


def draw(
    geometry: Geometry, batch: int, image: tuple[int, int], depth: int, seed: int
) -> list[Tensor]:
    """value, offset, mask, grad_output in float32; samples in, at the edge of and off the image."""
    g = torch.Generator().manual_seed(seed)
    ho, wo = geometry.output_hw(*image)
    samples = geometry.groups * geometry.num_points
    channels = geometry.groups * depth
    offset = torch.randn(batch, ho, wo, samples * 2, generator=g) * 3
    # on integers, too, where the derivative has its kink
    offset = offset.where(torch.rand(offset.shape, generator=g) < 0.7, offset.round())
    return [
        torch.randn(batch, *image, channels, generator=g),
        offset,
        torch.randn(batch, ho, wo, samples, generator=g),
        torch.randn(batch, ho, wo, channels, generator=g),
    ]


def results(module: Any, tensors: list[Tensor], geometry: Geometry, *rest: Any) -> list[Tensor]:
    value, offset, mask, grad = tensors
    names = ("forward", "backward")
    if module is dcnv3_reference:
        names = ("reference_forward", "reference_backward")
    forward, backward = (getattr(module, name) for name in names)
    return [
        forward(value, offset, mask, geometry, *rest),
        *backward(grad, value, offset, mask, geometry, *rest),
    ]


@pytest.mark.parametrize("instructions", RUNNABLE)
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    image=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 4),
    depth=st.sampled_from([1, 3, 4, 8, 15, 16, 17, 32, 33, 48, 80]),
    offset_scale=st.sampled_from([0.5, 1.0, 2.0]),
    softmax=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape_agrees_with_the_reference(
    instructions: str,
    batch: int,
    image: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    depth: int,
    offset_scale: float,
    softmax: bool,
    seed: int,
) -> None:
    geometry = make_geometry(kernel, stride, padding, dilation, groups, offset_scale, False)
    assume(min(geometry.output_hw(*image)) >= 1)
    tensors = draw(geometry, batch, image, depth, seed)
    actual = results(dcnv3_cpu, tensors, geometry, softmax, instructions)
    # in float32, so that coordinates round alike: at a kink the two sides differ
    expected = results(dcnv3_reference, tensors, geometry, softmax)
    for name, a, b in zip(("output", "value", "offset", "mask"), actual, expected, strict=True):
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(
            a, b, rtol=0, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("instructions", RUNNABLE)
def test_a_sample_far_away_touches_no_pixel(instructions: str) -> None:
    """Not even one that is infinite: zero times infinity is no number."""
    geometry = make_geometry(3, 1, 1, 1, 1, 1.0, False)
    value, _, mask, grad = draw(geometry, 1, (5, 5), 4, 0)
    offset = torch.full((1, 5, 5, 18), 100.0)
    offset[:, 0] = torch.nan
    value[:] = torch.inf
    grad[:] = torch.inf
    tensors = [value, offset, mask, grad]
    for tensor in results(dcnv3_cpu, tensors, geometry, False, instructions):
        torch.testing.assert_close(tensor, torch.zeros_like(tensor), rtol=0, atol=0)


@pytest.mark.parametrize("instructions", RUNNABLE)
@pytest.mark.parametrize("softmax", [False, True])
def test_bfloat16_is_only_a_storage(instructions: str, softmax: bool) -> None:
    geometry = make_geometry(3, 1, 1, 1, 3, 1.0, False)
    wide = draw(geometry, 2, (11, 9), 20, 0)
    low = [t.bfloat16() for t in wide]
    actual = results(dcnv3_cpu, low, geometry, softmax, instructions)
    expected = results(dcnv3_cpu, [t.float() for t in low], geometry, softmax, instructions)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b.bfloat16(), rtol=0, atol=0)


def test_each_tensor_has_its_own_dtype() -> None:
    geometry = make_geometry(3, 1, 1, 1, 2, 1.0, False)
    value, offset, mask, grad = draw(geometry, 2, (6, 5), 16, 0)
    mixed = [value.bfloat16(), offset, mask.bfloat16(), grad.bfloat16()]
    actual = results(dcnv3_cpu, mixed, geometry, True)
    assert [t.dtype for t in actual[1:]] == [torch.bfloat16, torch.float32, torch.bfloat16]
    expected = results(dcnv3_cpu, [t.float() for t in mixed], geometry, True)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=0)


def test_the_number_of_threads_changes_no_bit() -> None:
    geometry = make_geometry(3, 2, 1, 1, 1, 1.0, False)
    tensors = draw(geometry, 1, (13, 11), 24, 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(dcnv3_cpu, tensors, geometry, True)
        torch.set_num_threads(5)
        together = results(dcnv3_cpu, tensors, geometry, True)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_ranks_that_ask_at_once_compile_once(cache: Path) -> None:
    program = (
        "from groundwork.kernels.host_compiler import build_host_library as build\n"
        "library = build('dcnv3_cpu.cpp'); print(library.seconds > 0, library.path)"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = sorted(rank.communicate(timeout=120)[0].split() for rank in ranks)
    assert [compiled for compiled, _ in outputs] == ["False", "False", "True"]
    assert {Path(path) for _, path in outputs} == set(cache.glob("*.so"))


def test_without_a_compiler_the_reference_runs_and_one_line_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(cache.parent))
    monkeypatch.delenv("CXX", raising=False)
    geometry = make_geometry(3, 1, 1, 1, 2, 1.0, False)
    value, offset, mask, _ = draw(geometry, 1, (5, 4), 3, 0)
    with pytest.warns(UserWarning, match=r"runs its slow reference.*no C\+\+ compiler.*install"):
        output = dcnv3(value, offset, mask, kernel_size=3, groups=2)
    expected = dcnv3_reference.reference_forward(value, offset, mask, geometry, False)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run: no C\+\+ compiler"):
        dcnv3(value, offset, mask, kernel_size=3, groups=2, backend="cpu")


def test_what_the_compiler_says_is_passed_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = cache.parent / "broken"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(HostCompileError, match=r"exit status 3: x.cpp:1: error: no such thing"):
        build_host_library(dcnv3_cpu.SOURCE)
    assert not list(cache.glob("*.so"))


def test_a_cache_that_others_may_write_to_is_refused(cache: Path) -> None:
    cache.mkdir(mode=0o700)
    cache.chmod(0o777)
    with pytest.raises(HostCompileError, match="not yours alone"):
        build_host_library(dcnv3_cpu.SOURCE)


def test_a_damaged_library_says_which_file_to_delete(cache: Path) -> None:
    library = build_host_library(dcnv3_cpu.SOURCE)
    library.path.write_bytes(b"not a library")
    with pytest.raises(HostCompileError, match="delete it, and it is compiled again"):
        dcnv3_cpu.library()


@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
def test_other_compilers_and_processors(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} in PATH")
    flags = [*host_compiler.COMMON_FLAGS, "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    source = host_compiler.SOURCES / dcnv3_cpu.SOURCE
    subprocess.run([compiler, *flags, "-c", source, "-o", tmp_path / "code.o"], check=True)


SANITIZED = """
import ctypes, sys, torch
from groundwork.kernels import dcnv3_cpu
from groundwork.kernels.dcnv3_geometry import make_geometry
library = ctypes.CDLL(sys.argv[1])
dcnv3_cpu.library = lambda instructions=None: library
torch.manual_seed(0)
for kernel, depth, image, stride in ((3, 16, (6, 5), 1), (2, 3, (1, 1), 1), (5, 33, (4, 9), 2)):
    geometry = make_geometry(kernel, stride, kernel // 2, 1, 2, 1.5, False)
    ho, wo = geometry.output_hw(*image)
    samples = 2 * kernel * kernel
    for far in (1.0, 3.0, 1e9, float("inf"), float("nan")):
        offset = torch.randn(2, ho, wo, samples * 2) * far
        value, mask = torch.randn(2, *image, 2 * depth), torch.randn(2, ho, wo, samples)
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [t.to(dtype) for t in (value, offset, mask)]
            output = dcnv3_cpu.forward(*tensors, geometry, True)
            dcnv3_cpu.backward(torch.ones_like(output), *tensors, geometry, True)
print("clean")
"""


def test_no_access_is_out_of_bounds(tmp_path: Path) -> None:
    """Under AddressSanitizer and UBSan, with samples far outside and at no number."""
    compiler = host_compiler.find_compiler()
    assert compiler is not None
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"{compiler} has no AddressSanitizer")
    library = tmp_path / "sanitized.so"
    source = host_compiler.SOURCES / dcnv3_cpu.SOURCE
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize=alignment"]
    subprocess.run(
        [compiler, *flags, *checks, "-fno-sanitize-recover=all", source, "-o", library], check=True
    )
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert done.stdout.strip().endswith("clean"), done.stderr[-3000:]
