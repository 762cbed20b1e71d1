"""The C++ kernels against the reference: any shape, every instruction set of this CPU."""

import ctypes
import errno
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


@settings(max_examples=60, deadline=None)
@given(
    softmax=st.booleans(),
    spoiled=st.sampled_from(["mask", "grad_output", "both"]),
    spoil=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    share=st.sampled_from([0.02, 0.3, 1.0]),
    seed=st.integers(0, 2**31 - 1),
)
def test_what_is_no_number_spoils_the_same_places_as_in_the_reference(
    softmax: bool, spoiled: str, spoil: float, share: float, seed: int
) -> None:
    """A sample outside contributes nothing and gets no gradient, whatever its weight is."""
    geometry = make_geometry(3, 1, 1, 1, 2, 1.0, False)
    tensors = draw(geometry, 1, (4, 5), 5, seed)
    g = torch.Generator().manual_seed(seed)
    tensors[1] *= 2
    for index, name in ((2, "mask"), (3, "grad_output")):
        if spoiled in (name, "both"):
            tensors[index][torch.rand(tensors[index].shape, generator=g) < share] = spoil
    actual = results(dcnv3_cpu, tensors, geometry, softmax)
    expected = results(dcnv3_reference, tensors, geometry, softmax)
    for name, a, b in zip(("output", "value", "offset", "mask"), actual, expected, strict=True):
        finite = b.isfinite()
        torch.testing.assert_close(a.isfinite(), finite, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(
            *(t.where(finite, 0) for t in (a, b)), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("shape", [(0, 3, 4, 6), (1, 3, 4, 0)])
def test_the_kernels_take_what_is_empty(shape: tuple[int, ...]) -> None:
    geometry = make_geometry(3, 1, 1, 1, 2, 1.0, False)
    value, grad = torch.randn(shape), torch.randn(shape)
    offset, mask = torch.randn(shape[0], 3, 4, 36), torch.randn(shape[0], 3, 4, 18)
    output, *gradients = results(dcnv3_cpu, [value, offset, mask, grad], geometry, True)
    assert output.shape == shape
    for gradient, tensor in zip(gradients, (value, offset, mask), strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.count_nonzero() == 0
    # nor does the library end the process, should anyone call it
    problem = dcnv3_cpu._problem(value, offset, mask, geometry, True)
    library = dcnv3_cpu.library()
    pointers = dcnv3_cpu._pointers(value, offset, mask, value, value, offset, mask)
    assert library.dcnv3_forward(ctypes.byref(problem), *pointers[:4]) == 0
    assert library.dcnv3_backward(ctypes.byref(problem), *pointers) == 0


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


@pytest.mark.parametrize(
    ("batch", "groups", "image"),
    [(1, 1, (13, 11)), (2, 2, (3, 11)), (1, 3, (1, 1)), (2, 4, (7, 7))],
)
def test_the_number_of_threads_changes_no_bit(
    batch: int, groups: int, image: tuple[int, int]
) -> None:
    """With more groups than threads and with fewer, whose rows are divided."""
    geometry = make_geometry(3, 2, 1, 1, groups, 1.0, False)
    tensors = draw(geometry, batch, image, 24, 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(dcnv3_cpu, tensors, geometry, True)
        for threads in (2, 5, 16):
            torch.set_num_threads(threads)
            together = results(dcnv3_cpu, tensors, geometry, True)
            for a, b in zip(alone, together, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


MEMORY = """
import resource, torch
from groundwork.kernels.dcnv3 import dcnv3
def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.set_num_threads(16)
tensors = [torch.randn(1, 256, 256, channels) for channels in (64, 18, 9)]
dcnv3(*(t[:, :20, :20] for t in tensors), kernel_size=3, groups=1)
before = peak()
dcnv3(*tensors, kernel_size=3, groups=1)
print((peak() - before) / tensors[0].nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_threads_share_the_image_of_a_group() -> None:
    """The output and one padded copy of the value, not one for each of 16 threads."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 3


def test_ranks_that_ask_at_once_compile_once(cache: Path) -> None:
    program = (
        "from groundwork.kernels.host_compiler import build_host_library as build\n"
        "library = build('dcnv3_cpu.cpp'); print(library.built_now, library.path)"
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


@pytest.mark.parametrize("damage", ["junk", "cut off", "no note", "junk note", "foreign note"])
def test_a_damaged_library_is_built_again(cache: Path, damage: str) -> None:
    library = build_host_library(dcnv3_cpu.SOURCE)
    assert not build_host_library(dcnv3_cpu.SOURCE).built_now
    good = library.path.read_bytes()
    note = library.path.with_suffix(".json")
    if damage == "junk":
        library.path.write_bytes(b"not a library")
    elif damage == "cut off":  # loading it would end the process with SIGBUS
        library.path.write_bytes(good[:8192])
    elif damage == "no note":
        note.unlink()
    else:
        note.write_text("{" if damage == "junk note" else "[1]")
    dcnv3_cpu.library()
    assert len(library.path.read_bytes()) == len(good)
    again = build_host_library(dcnv3_cpu.SOURCE)
    assert not again.built_now
    assert again.seconds > 0


COMPILERS = {
    "silent": ("exit 3", "exit status 3: it printed nothing"),
    "idle": ("exit 0", "exit status 0, but it wrote no code.o"),
    "killed": ("kill -9 $$", "killed by SIGKILL"),
    "latin": (r"printf '\\344 error: x' >&2; exit 1", "exit status 1: .* error: x"),
    "full": (
        "echo 'error: No space left on device' >&2; exit 1",
        "set GROUNDWORK_CACHE and TMPDIR",
    ),
}


@pytest.mark.parametrize("kind", COMPILERS)
def test_any_failure_of_a_compiler_says_something(
    kind: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, message = COMPILERS[kind]
    compiler = cache.parent / kind
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(
        HostCompileError, match=f"{kind} could not build dcnv3_cpu.cpp: .*{message}"
    ):
        build_host_library(dcnv3_cpu.SOURCE)
    assert not list(cache.glob("*.so"))


@pytest.mark.parametrize("prefix", ["", "/usr/bin/env "])
def test_a_compiler_may_be_a_command_with_arguments(
    prefix: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = host_compiler.find_compiler()
    assert found is not None
    monkeypatch.setenv("CXX", f"{prefix}{found} -O1")
    library = build_host_library(dcnv3_cpu.SOURCE)
    assert (library.built_now, library.compiler) == (True, f"{prefix}{found} -O1")


@pytest.mark.parametrize(
    ("cxx", "message"),
    [
        ("g+++ -m64", "CXX is 'g.*', and there is no program 'g[+]{3}' in PATH"),
        ("'g++", r"CXX is .* no command \(No closing quotation\)"),
    ],
)
def test_a_misspelt_compiler_is_named(
    cxx: str, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", cxx)
    assert host_compiler.find_compiler() is None
    with pytest.raises(HostCompileError, match=rf"no C\+\+ compiler: {message}.*correct or unset"):
        build_host_library(dcnv3_cpu.SOURCE)


def test_after_a_broken_compiler_the_next_is_tried(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = cache.parent / "bin" / "c++"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CXX", raising=False)
    commands = host_compiler.compiler_commands()
    assert commands[0] == [str(broken)]
    if len(commands) == 1:
        pytest.skip("no second compiler in PATH")
    assert build_host_library(dcnv3_cpu.SOURCE).compiler != str(broken)


def test_no_failure_of_the_cache_reaches_the_caller_of_the_op(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full or read-only file system, and a user without a home."""

    def refuse(number: int) -> Any:
        def fail(*arguments: Any, **named: Any) -> Any:
            raise OSError(number, os.strerror(number))

        return fail

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    geometry = make_geometry(3, 1, 1, 1, 2, 1.0, False)
    value, offset, mask, _ = draw(geometry, 1, (5, 4), 3, 0)
    expected = dcnv3_reference.reference_forward(value, offset, mask, geometry, False)
    for owner, name, failure in (
        (Path, "mkdir", refuse(errno.EROFS)),
        (Path, "expanduser", homeless),
        (Path, "open", refuse(errno.EACCES)),
        (host_compiler.tempfile, "mkdtemp", refuse(errno.EACCES)),
        (host_compiler.os, "fsync", refuse(errno.ENOSPC)),
        (Path, "replace", refuse(errno.ENOSPC)),
    ):
        host_compiler.load_host_library.cache_clear()
        dcnv3_cpu.unavailable.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failure)
            with pytest.warns(UserWarning, match=r"slow reference.*set GROUNDWORK_CACHE"):
                output = dcnv3(value, offset, mask, kernel_size=3, groups=2)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


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
