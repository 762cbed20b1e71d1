"""The CUDA kernels without a GPU: compiled for several, and run on the CPU thread by thread."""

import ctypes
import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from groundwork.kernels import cuda_compiler, dcnv3_cuda, dcnv3_reference, host_compiler
from groundwork.kernels.cuda_compiler import CudaCompileError, cached_cubin, compile_cubin
from groundwork.kernels.dcnv3_cuda import Plan, Problem, fixed_scale, make_problem, plan
from groundwork.kernels.dcnv3_geometry import Geometry, make_geometry

#: NVRTC comes with the CUDA builds of torch.
needs_nvrtc = pytest.mark.skipif(
    cuda_compiler.unavailable() is not None, reason=str(cuda_compiler.unavailable())
)

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden" / "internimage"
CASES = json.loads((GOLDEN / "cases.json").read_text())["op"]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

HOST_ENTRY = """
extern "C" void run_forward(unsigned blocks, unsigned threads, const Problem* q, const float* grid,
                            const Value* value, const Offset* offset, const Mask* mask,
                            Value* output) {
  host_device::launch(blocks, threads,
                      [=] { dcnv3_forward(*q, grid, value, offset, mask, output); });
}
extern "C" void run_backward(unsigned blocks, unsigned threads, const Problem* q, const float* grid,
                             const Value* grad, const Value* value, const Offset* offset,
                             const Mask* mask, Sum* sums, Offset* grad_offset, Mask* grad_mask,
                             const float* scale) {
  host_device::launch(blocks, threads, [=] {
    dcnv3_backward(*q, grid, grad, value, offset, mask, sums, grad_offset, grad_mask, scale);
  });
}
extern "C" long problem_bytes() { return sizeof(Problem); }
"""


@cache
def host_build(folder: Path, settings: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """The CUDA source as C++ for this machine, with these settings."""
    compiler = host_compiler.find_compiler()
    assert compiler is not None
    name = "-".join(str(value) for _, value in settings)
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    cuda = host_compiler.SOURCES / dcnv3_cuda.SOURCE
    source.write_text(f'#include "{HERE / "cuda_on_host.h"}"\n#include "{cuda}"\n{HOST_ENTRY}')
    defines = [f"-D{key}={value}" for key, value in settings]
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-w", "-ffp-contract=off"]
    subprocess.run([compiler, *flags, *defines, source, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    assert loaded.problem_bytes() == ctypes.sizeof(Problem)
    return loaded


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if host_compiler.find_compiler() is None:
        pytest.skip("no C++ compiler")
    return tmp_path_factory.mktemp("cuda_on_host")


def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def run_on_host(
    folder: Path,
    tensors: list[Tensor],
    geometry: Geometry,
    softmax: bool,
    fixed: bool = False,
    **changes: int,
) -> list[Tensor]:
    """output and the gradients of value, offset, mask, as `dcnv3_cuda` would launch them."""
    value, offset, mask, grad = tensors
    problem = make_problem(value, offset, geometry)
    dtypes = (value.dtype, offset.dtype, mask.dtype)
    cut: Plan = plan(problem, geometry.num_points, dtypes, softmax, fixed)
    library = host_build(folder, tuple(sorted({**cut.settings, **changes}.items())))
    grid = (geometry.offset_scale * torch.tensor(geometry.points_xy()).double()).float()
    head = (cut.blocks, cut.threads, ctypes.byref(problem), *pointers(grid))
    output = torch.full_like(grad, float("nan"))
    library.run_forward(*head, *pointers(value, offset, mask, output))
    scale = fixed_scale(grad, mask, geometry, softmax) if fixed else torch.ones(1)
    sums = torch.zeros_like(value, dtype=torch.int64 if fixed else torch.float32)
    grads = [torch.full_like(offset, float("nan")), torch.full_like(mask, float("nan"))]
    library.run_backward(*head, *pointers(grad, value, offset, mask, sums, *grads, scale))
    grad_value = sums.double() / scale if fixed else sums
    return [output, grad_value.to(value.dtype), *grads]


def expected_results(tensors: list[Tensor], geometry: Geometry, softmax: bool) -> list[Tensor]:
    value, offset, mask, grad = tensors
    return [
        dcnv3_reference.reference_forward(value, offset, mask, geometry, softmax),
        *dcnv3_reference.reference_backward(grad, value, offset, mask, geometry, softmax),
    ]


def draw(
    geometry: Geometry, batch: int, image: tuple[int, int], depth: int, seed: int
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    ho, wo = geometry.output_hw(*image)
    samples, channels = geometry.groups * geometry.num_points, geometry.groups * depth
    offset = torch.randn(batch, ho, wo, samples * 2, generator=g) * 2
    offset = offset.where(torch.rand(offset.shape, generator=g) < 0.7, offset.round())
    return [
        torch.randn(batch, *image, channels, generator=g),
        offset,
        torch.randn(batch, ho, wo, samples, generator=g),
        torch.randn(batch, ho, wo, channels, generator=g),
    ]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("output", "value", "offset", "mask"), actual, expected, strict=True):
        scale = max(1.0, float(b.double().abs().max()))
        assert (a.double() - b.double()).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_arithmetic_gives_the_official_results(
    folder: Path, case: dict[str, Any], fixed: bool
) -> None:
    data = {
        name: torch.from_numpy(array)
        for name, array in np.load(GOLDEN / f"op_{case['name']}.npz").items()
    }
    geometry = make_geometry(
        (case["kh"], case["kw"]),
        (case["sh"], case["sw"]),
        (case["ph"], case["pw"]),
        (case["dh"], case["dw"]),
        case["G"],
        case["offset_scale"],
        case["remove_center"],
    )
    names = ("input", "offset", "mask", "grad_output")
    tensors = [data[name].float().contiguous() for name in names]
    actual = run_on_host(folder, tensors, geometry, False, fixed)
    expected = [data[n] for n in ("output", "grad_input", "grad_offset", "grad_mask")]
    assert_close(actual, expected, 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    image=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    shape=st.sampled_from([(3, 16, 2), (3, 5, 3), (2, 12, 1), (3, 72, 1), (1, 2, 5)]),
    stride=st.integers(1, 2),
    offset_scale=st.sampled_from([0.5, 1.0, 2.0]),
    softmax=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape_agrees_with_the_reference(
    folder: Path,
    image: tuple[int, int],
    shape: tuple[int, int, int],
    stride: int,
    offset_scale: float,
    softmax: bool,
    seed: int,
) -> None:
    kernel, depth, groups = shape
    geometry = make_geometry(kernel, stride, kernel // 2, 1, groups, offset_scale, False)
    assume(min(geometry.output_hw(*image)) >= 1)
    tensors = draw(geometry, 2, image, depth, seed)
    actual = run_on_host(folder, tensors, geometry, softmax)
    assert_close(actual, expected_results(tensors, geometry, softmax), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_only_a_storage(folder: Path, dtype: torch.dtype) -> None:
    geometry = make_geometry(3, 1, 1, 1, 2, 1.0, False)
    low = [t.to(dtype) for t in draw(geometry, 2, (6, 5), 16, 0)]
    actual = run_on_host(folder, low, geometry, True)
    expected = expected_results([t.float() for t in low], geometry, True)
    step = torch.finfo(dtype).eps
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, rtol=0.6 * step, atol=1e-4)


def test_mixed_dtypes_keep_each_their_own(folder: Path) -> None:
    geometry = make_geometry(3, 1, 1, 1, 2, 1.0, False)
    value, offset, mask, grad = draw(geometry, 1, (6, 5), 16, 0)
    mixed = [value.bfloat16(), offset, mask.half(), grad.bfloat16()]
    actual = run_on_host(folder, mixed, geometry, True)
    assert [t.dtype for t in actual[1:]] == [torch.bfloat16, torch.float32, torch.float16]
    assert_close(actual, expected_results([t.float() for t in mixed], geometry, True), 5e-3)


@pytest.mark.parametrize("far", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_samples_at_no_finite_place_contribute_nothing(folder: Path, far: float) -> None:
    geometry = make_geometry(3, 1, 1, 1, 2, 1.0, False)
    tensors = draw(geometry, 1, (5, 4), 4, 0)
    tensors[1].view(-1)[::7] = far
    for softmax in (False, True):
        actual = run_on_host(folder, tensors, geometry, softmax)
        assert all(t.isfinite().all() for t in actual)
        assert_close(actual, expected_results(tensors, geometry, softmax), 1e-5)


def test_fixed_point_sums_do_not_overflow_and_keep_more_than_float32(folder: Path) -> None:
    geometry = make_geometry(3, 1, 1, 1, 1, 1.0, False)
    value, offset, mask, grad = draw(geometry, 1, (6, 5), 4, 0)
    # all samples at one place: the largest sum there can be
    line, column = torch.meshgrid(torch.arange(6), torch.arange(5), indexing="ij")
    grid = torch.tensor(geometry.points_xy())
    at = torch.stack((column, line), -1).unsqueeze(2) + grid
    offset = (torch.tensor([2.0, 3.0]) - at).view(offset.shape).contiguous()
    for size in (1e-20, 1.0, 1e18):
        tensors = [value, offset, mask.abs(), torch.full_like(grad, size)]
        doubles = expected_results([t.double() for t in tensors], geometry, False)
        actual = run_on_host(folder, tensors, geometry, False, fixed=True)
        torch.testing.assert_close(actual[1].double(), doubles[1], rtol=1e-6, atol=0)


#: The variants of InternImage (D = 16 and 32, 3x3, logits) and tails; ours has no other default.
VARIANTS = [
    (dtype, depth, points, fixed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for depth, points in ((16, 9), (32, 9), (6, 25))
    for fixed in (False, True)
]


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "depth", "points", "fixed"), VARIANTS)
def test_every_variant_compiles_without_spilling(
    arch: str, dtype: torch.dtype, depth: int, points: int, fixed: bool
) -> None:
    problem = Problem(units=1000, groups=4, depth=depth)
    cut = plan(problem, points, (dtype, dtype, dtype), True, fixed)
    cubin = compile_cubin(dcnv3_cuda.SOURCE, cut.settings, arch)
    assert cubin.code.startswith(b"\x7fELF")
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", cubin.log)]
    assert len(spilled) >= 4
    assert not any(spilled), cubin.log
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", cubin.log)]
    # 128 threads in each of 4 blocks of a multiprocessor, at least
    assert max(registers) <= 128


def test_vectors_are_as_wide_as_depth_and_alignment_allow() -> None:
    def settings_of(depth: int, dtype: torch.dtype, alignment: int = 16) -> tuple[int, int]:
        problem = Problem(units=10, groups=1, depth=depth)
        chosen = plan(problem, 9, (dtype,) * 3, False, False, alignment).settings
        return chosen["WIDTH"], chosen["LANES"]

    assert settings_of(16, torch.bfloat16) == (8, 2)
    assert settings_of(16, torch.float32) == (4, 4)
    assert settings_of(12, torch.bfloat16) == (4, 4)
    assert settings_of(7, torch.float32) == (1, 8)
    assert settings_of(16, torch.bfloat16, alignment=4) == (2, 8)
    assert settings_of(1024, torch.float32) == (4, 32)


def test_the_samples_of_a_block_fit_its_shared_memory() -> None:
    for points in (1, 9, 25, 49, 121, 900):
        cut = plan(Problem(units=10, groups=1, depth=1), points, (torch.float32,) * 3, False, False)
        units = cut.threads // cut.settings["LANES"]
        assert units * points * dcnv3_cuda.SAMPLE_BYTES <= dcnv3_cuda.SHARED_BYTES
    with pytest.raises(ValueError, match="5000 points does not fit"):
        plan(Problem(units=10, groups=1, depth=1), 5000, (torch.float32,) * 3, False, False)


@needs_nvrtc
def test_a_source_that_does_not_compile_shows_the_compilers_log() -> None:
    with pytest.raises(CudaCompileError, match=r"dcnv3.cu does not compile for sm_90 with"):
        compile_cubin(dcnv3_cuda.SOURCE, {"VALUE_T": 0}, "sm_90")


@needs_nvrtc
def test_a_cubin_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUNDWORK_CACHE", str(tmp_path))
    problem = Problem(units=10, groups=1, depth=16)
    chosen = plan(problem, 9, (torch.bfloat16,) * 3, True, False).settings
    first = cached_cubin(dcnv3_cuda.SOURCE, chosen, "sm_90")
    second = cached_cubin(dcnv3_cuda.SOURCE, chosen, "sm_90")
    assert first.code == second.code
    assert first.seconds > 0
    assert second.seconds == 0
    assert len(list((tmp_path / "kernels").iterdir())) == 1
