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

from groundwork.kernels import autotune, cuda_compiler, dcnv3_cuda, dcnv3_reference, host_compiler
from groundwork.kernels.cuda_compiler import CudaCompileError, cached_cubin, compile_cubin
from groundwork.kernels.dcnv3_cuda import (
    FORWARD_CHOICES,
    TILE_CHOICES,
    AtomicChoice,
    BackwardChoice,
    Call,
    ForwardChoice,
    Problem,
    TileChoice,
    backward_choices,
    fixed_scale,
    make_problem,
    plan,
    tile_plan,
)
from groundwork.kernels.dcnv3_geometry import Geometry, make_geometry

#: NVRTC comes with the CUDA builds of torch.
needs_nvrtc = pytest.mark.skipif(
    cuda_compiler.unavailable() is not None, reason=str(cuda_compiler.unavailable())
)

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden" / "internimage"
CASES = json.loads((GOLDEN / "cases.json").read_text())["op"]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
ATOMIC, TILE = AtomicChoice(), TileChoice()
#: None is the deterministic pass.
BACKWARD = pytest.mark.parametrize("choice", [ATOMIC, TILE, None], ids=["atomic", "tile", "fixed"])

HOST_ENTRY = """
extern "C" long problem_bytes() { return sizeof(Problem); }
#ifdef DEPTH
extern "C" void run_backward(unsigned blocks, unsigned threads, const Problem* q, const float* grid,
                             const Value* grad, const Value* value, const Offset* offset,
                             const Mask* mask, float* sums, Offset* grad_offset, Mask* grad_mask) {
  host_device::launch(blocks, threads, [=] {
    dcnv3_backward_tile(*q, grid, grad, value, offset, mask, sums, grad_offset, grad_mask);
  });
}
#else
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
#endif
"""


@cache
def host_build(
    folder: Path, cuda_source: str, settings: tuple[tuple[str, int], ...]
) -> ctypes.CDLL:
    """A CUDA source as C++ for this machine, with these settings."""
    compiler = host_compiler.find_compiler()
    assert compiler is not None
    name = "-".join((cuda_source, *(str(value) for _, value in settings)))
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    cuda = host_compiler.SOURCES / cuda_source
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


def make_call(tensors: list[Tensor], geometry: Geometry, softmax: bool) -> Call:
    """The call that `dcnv3_cuda` would make of value, offset, mask, grad on an H100."""
    value, offset, mask, _ = tensors
    problem = make_problem(value.shape, offset.shape, geometry)
    dtypes = (value.dtype, offset.dtype, mask.dtype)
    return Call(0, (9, 0), problem, geometry, dtypes, softmax, 16)


def forward_on_host(
    folder: Path,
    tensors: list[Tensor],
    geometry: Geometry,
    softmax: bool,
    choice: ForwardChoice = FORWARD_CHOICES[0],
) -> Tensor:
    value, offset, mask, grad = tensors
    call = make_call(tensors, geometry, softmax)
    cut = plan(
        call.problem, geometry.num_points, call.dtypes, softmax, fixed=False, **choice._asdict()
    )
    library = host_build(folder, dcnv3_cuda.SOURCE, tuple(sorted(cut.settings.items())))
    output = torch.full_like(grad, float("nan"))
    grid = regular_grid(geometry)
    head = (cut.blocks, cut.threads, ctypes.byref(call.problem), *pointers(grid))
    library.run_forward(*head, *pointers(value, offset, mask, output))
    return output


def backward_on_host(
    folder: Path,
    tensors: list[Tensor],
    geometry: Geometry,
    softmax: bool,
    choice: BackwardChoice | None,
) -> list[Tensor]:
    """The gradients of value, offset and mask; choice None is the deterministic pass."""
    value, offset, mask, grad = tensors
    call = make_call(tensors, geometry, softmax)
    fixed = choice is None
    if isinstance(choice, TileChoice):
        tiled = tile_plan(call, choice)
        assert tiled is not None
        source, cut = dcnv3_cuda.TILE_SOURCE, tiled
    else:
        source = dcnv3_cuda.SOURCE
        points = geometry.num_points
        cut = plan(
            call.problem, points, call.dtypes, softmax, fixed, **(choice or ATOMIC)._asdict()
        )
    library = host_build(folder, source, tuple(sorted(cut.settings.items())))
    scale = fixed_scale(grad, mask, geometry, softmax) if fixed else torch.ones(1)
    sums = torch.zeros_like(value, dtype=torch.int64 if fixed else torch.float32)
    grads = [torch.full_like(offset, float("nan")), torch.full_like(mask, float("nan"))]
    grid = regular_grid(geometry)
    head = (cut.blocks, cut.threads, ctypes.byref(call.problem), *pointers(grid))
    library.run_backward(*head, *pointers(grad, value, offset, mask, sums, *grads, scale))
    grad_value = sums.double() / scale if fixed else sums
    return [grad_value.to(value.dtype), *grads]


def regular_grid(geometry: Geometry) -> Tensor:
    return (geometry.offset_scale * torch.tensor(geometry.points_xy()).double()).float()


def run_on_host(
    folder: Path,
    tensors: list[Tensor],
    geometry: Geometry,
    softmax: bool,
    choice: BackwardChoice | None = ATOMIC,
) -> list[Tensor]:
    """output and the gradients of value, offset, mask, as `dcnv3_cuda` would launch them."""
    output = forward_on_host(folder, tensors, geometry, softmax)
    return [output, *backward_on_host(folder, tensors, geometry, softmax, choice)]


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
    names = ("output", "value", "offset", "mask")[-len(actual) :]
    for name, a, b in zip(names, actual, expected, strict=True):
        scale = max(1.0, float(b.double().abs().max()))
        assert (a.double() - b.double()).abs().max() <= tolerance * scale, name


@BACKWARD
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_arithmetic_gives_the_official_results(
    folder: Path, case: dict[str, Any], choice: BackwardChoice | None
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
    if choice == TILE and tile_plan(make_call(tensors, geometry, False), TILE) is None:
        pytest.skip("not a case for tiles")
    actual = run_on_host(folder, tensors, geometry, False, choice)
    expected = [data[n] for n in ("output", "grad_input", "grad_offset", "grad_mask")]
    assert_close(actual, expected, 1e-5)


@settings(max_examples=25, deadline=None)
@given(
    image=st.tuples(st.integers(1, 9), st.integers(1, 19)),
    shape=st.sampled_from([(3, 16, 2), (3, 32, 1), (3, 5, 3), (2, 12, 1), (3, 72, 1), (1, 2, 5)]),
    stride=st.integers(1, 2),
    offset_scale=st.sampled_from([1.0, 2.0]),
    softmax=st.booleans(),
    choice=st.sampled_from([ATOMIC, TILE]),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape_agrees_with_the_reference(
    folder: Path,
    image: tuple[int, int],
    shape: tuple[int, int, int],
    stride: int,
    offset_scale: float,
    softmax: bool,
    choice: BackwardChoice,
    seed: int,
) -> None:
    kernel, depth, groups = shape
    geometry = make_geometry(kernel, stride, kernel // 2, 1, groups, offset_scale, False)
    assume(min(geometry.output_hw(*image)) >= 1)
    tensors = draw(geometry, 2, image, depth, seed)
    call = make_call(tensors, geometry, softmax)
    assume(choice == ATOMIC or choice in backward_choices(call))
    actual = run_on_host(folder, tensors, geometry, softmax, choice)
    assert_close(actual, expected_results(tensors, geometry, softmax), 1e-5)


def test_the_output_has_the_same_bits_for_every_choice(folder: Path) -> None:
    geometry = make_geometry(3, 1, 1, 1, 3, 1.0, False)
    tensors = [t.bfloat16() for t in draw(geometry, 2, (6, 5), 16, 0)]
    # on the CPU only the threads differ; test_dcnv3_gpu.py takes all choices
    outputs = [
        forward_on_host(folder, tensors, geometry, True, choice) for choice in FORWARD_CHOICES[:3]
    ]
    assert all(torch.equal(output, outputs[0]) for output in outputs[1:])


@pytest.mark.parametrize(
    ("choice", "depth"), [*((choice, 16) for choice in TILE_CHOICES), (TILE, 32)], ids=str
)
def test_every_choice_of_tiles_gives_the_gradients(
    folder: Path, choice: TileChoice, depth: int
) -> None:
    geometry = make_geometry(3, 1, 1, 1, 2, 1.0, False)
    tensors = draw(geometry, 2, (7, 18), depth, 0)
    actual = backward_on_host(folder, tensors, geometry, True, choice)
    assert_close(actual, expected_results(tensors, geometry, True)[1:], 1e-5)


@pytest.mark.parametrize("choice", [ATOMIC, TILE], ids=["atomic", "tile"])
@pytest.mark.parametrize("depth", [16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_only_a_storage(
    folder: Path, dtype: torch.dtype, depth: int, choice: BackwardChoice
) -> None:
    geometry = make_geometry(3, 1, 1, 1, 2, 1.0, False)
    low = [t.to(dtype) for t in draw(geometry, 2, (6, 5), depth, 0)]
    actual = run_on_host(folder, low, geometry, True, choice)
    expected = expected_results([t.float() for t in low], geometry, True)
    step = torch.finfo(dtype).eps
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, rtol=0.6 * step, atol=1e-4)


@pytest.mark.parametrize("choice", [ATOMIC, TILE], ids=["atomic", "tile"])
def test_mixed_dtypes_keep_each_their_own(folder: Path, choice: BackwardChoice) -> None:
    geometry = make_geometry(3, 1, 1, 1, 2, 1.0, False)
    value, offset, mask, grad = draw(geometry, 1, (6, 5), 16, 0)
    mixed = [value.bfloat16(), offset, mask.half(), grad.bfloat16()]
    actual = run_on_host(folder, mixed, geometry, True, choice)
    assert [t.dtype for t in actual[1:]] == [torch.bfloat16, torch.float32, torch.float16]
    assert_close(actual, expected_results([t.float() for t in mixed], geometry, True), 5e-3)


@pytest.mark.parametrize("choice", [ATOMIC, TILE], ids=["atomic", "tile"])
@pytest.mark.parametrize("far", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_samples_at_no_finite_place_contribute_nothing(
    folder: Path, far: float, choice: BackwardChoice
) -> None:
    geometry = make_geometry(3, 1, 1, 1, 2, 1.0, False)
    tensors = draw(geometry, 1, (5, 4), 4, 0)
    tensors[1].view(-1)[::7] = far
    for softmax in (False, True):
        actual = run_on_host(folder, tensors, geometry, softmax, choice)
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
        actual = run_on_host(folder, tensors, geometry, False, choice=None)
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
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("depth", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_compile_without_spilling(arch: str, dtype: torch.dtype, depth: int) -> None:
    geometry = make_geometry(3, 1, 1, 1, 4, 1.0, False)
    problem = make_problem((2, 56, 56, 4 * depth), (2, 56, 56, 72), geometry)
    call = Call(0, (9, 0), problem, geometry, (dtype,) * 3, True, 16)
    # on the architecture that it is meant for, all halos; elsewhere the default
    for choice in TILE_CHOICES[::2] if arch == "sm_90" else TILE_CHOICES[:1]:
        cut = tile_plan(call, choice)
        assert cut is not None
        cubin = compile_cubin(dcnv3_cuda.TILE_SOURCE, cut.settings, arch)
        assert re.findall(r"(\d+) bytes spill", cubin.log) == ["0", "0"], cubin.log
        # shared memory lets 8 to 15 warps be at work in a multiprocessor, and registers as many
        registers, shared = (
            int(re.findall(pattern, cubin.log)[0])
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes smem")
        )
        warps = 65536 // (32 * -(-registers // 8) * 8)
        assert warps >= min(12, 228 * 1024 // (shared + 1024)), (registers, shared)


def test_tiles_are_for_what_they_fit() -> None:
    def choices(kernel: int, depth: int, stride: int, scale: float, *capability: int) -> int:
        geometry = make_geometry(kernel, stride, kernel // 2, 1, 1, scale, False)
        ho, wo = geometry.output_hw(32, 32)
        problem = make_problem((2, 32, 32, depth), (2, ho, wo, kernel**2 * 2), geometry)
        dtypes = (torch.bfloat16,) * 3
        call = Call(0, (capability[0], capability[1]), problem, geometry, dtypes, True, 16)
        return sum(isinstance(choice, TileChoice) for choice in backward_choices(call))

    assert choices(3, 16, 1, 1.0, 9, 0) == len(TILE_CHOICES)
    assert choices(3, 16, 2, 1.0, 9, 0) > 0
    assert choices(3, 16, 1, 20.0, 9, 0) == 0  # the regular grid alone is larger than a region
    assert choices(3, 64, 1, 1.0, 9, 0) == 0
    assert choices(5, 16, 1, 1.0, 9, 0) == 0
    assert choices(3, 16, 1, 1.0, 7, 5) == 0  # no tensor cores for float32 operands


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
    (kept,) = (tmp_path / "kernels").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert cached_cubin(dcnv3_cuda.SOURCE, chosen, "sm_90").code == first.code
    assert cached_cubin(dcnv3_cuda.SOURCE, chosen, "sm_90").seconds == 0


def test_without_a_cache_cubins_are_compiled_and_choices_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("GROUNDWORK_CACHE", str(tmp_path / "file"))
    problem = Problem(units=10, groups=1, depth=16)
    chosen = plan(problem, 9, (torch.float32,) * 3, True, False).settings
    assert cached_cubin(dcnv3_cuda.SOURCE, chosen, "sm_90").seconds > 0
    assert "is compiled by every process" in caplog.text
    table = autotune.make_table("a device", "sm_90", (dcnv3_cuda.SOURCE,))
    assert table.tune("key", (1, 2), lambda choice: None, lambda run: 1.0) == 1
    assert table.choice("key", (1, 2)) == 1
