"""Which backend each op uses on this machine, and why."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from groundwork.kernels import (
    dcnv3_cpu,
    dcnv3_cuda,
    depthwise_norm_gelu_cpu,
    fused_layers,
    fused_layers_cuda,
    jpeg_crop,
    member_reader,
    residual_norm_cpu,
)
from groundwork.kernels.cuda_compiler import CudaCompileError, cached_cubin
from groundwork.kernels.host_compiler import (
    HostCompileError,
    build_host_library,
    cache_folder,
    instruction_set,
    load_host_library,
)
from groundwork.kernels.optional_backends import apex_problem, choose_adamw, choose_layer_norm


@dataclass(frozen=True)
class KernelStatus:
    """op on device: runs `backend`; reason says why this one, and what would change it."""

    op: str
    device: str
    backend: str
    reason: str


def kernel_statuses() -> list[KernelStatus]:
    """Every op on every kind of device here; kernels that are missing are compiled."""
    devices = range(torch.cuda.device_count())
    return [
        _on_cpu("dcnv3, dcnv4", dcnv3_cpu.SOURCE, dcnv3_cpu.library),
        _on_cpu(
            "depthwise_norm_gelu", depthwise_norm_gelu_cpu.SOURCE, depthwise_norm_gelu_cpu.library
        ),
        _on_cpu("residual_norm", residual_norm_cpu.SOURCE, residual_norm_cpu.library),
        *map(_dcnv3_on_cuda, devices),
        *map(_fused_on_cuda, devices),
        _adamw("cuda" if torch.cuda.is_available() else "cpu"),
        _layer_norm("cuda" if torch.cuda.is_available() else "cpu"),
        KernelStatus("modulated_deform_conv2d", "all", "torchvision", "delegates to torchvision"),
        KernelStatus(
            *("linear_cross_entropy", "all", "torch"),
            "plain PyTorch by blocks of rows: for memory, not for speed",
        ),
        KernelStatus(
            *("contrastive loss", "all", "torch"),
            "plain PyTorch by blocks of rows: for memory, not for speed",
        ),
        _jpeg_crop(),
        _on_cpu(
            "member reader",
            member_reader.SOURCE,
            partial(load_host_library, member_reader.SOURCE),
            otherwise="Python",
            threaded=False,
        ),
    ]


def _on_cpu(
    op: str,
    source: str,
    load: Callable[[], object],
    otherwise: str = "reference",
    threaded: bool = True,
) -> KernelStatus:
    """load: of the library of a file in `csrc/`, with its checks. otherwise: what stands in for it.

    threaded: it uses torch's threads.
    """
    try:
        library = build_host_library(source)
        load()
    except HostCompileError as error:
        return KernelStatus(op, "cpu", otherwise, str(error))
    built = "built" if library.built_now else "built before,"
    openmp = library.openmp or "OpenMP of the compiler"
    threads = f", {torch.get_num_threads()} threads ({openmp})" if threaded else ""
    return KernelStatus(
        op,
        "cpu",
        "cpu",
        f"{instruction_set()}{threads}; {library.compiler}; {built} in {library.seconds:.1f} s: "
        f"{library.path}",
    )


def _jpeg_crop() -> KernelStatus:
    load = partial(load_host_library, jpeg_crop.SOURCE)
    status = _on_cpu("jpeg_crop", jpeg_crop.SOURCE, load, otherwise="libraries", threaded=False)
    if platform.machine() in ("x86_64", "AMD64") and instruction_set() == "DEFAULT":
        reason = "JPEGs are decoded by libraries: this processor has no AVX2"
        return KernelStatus("jpeg_crop", "cpu", "libraries", reason)
    return status


def _dcnv3_on_cuda(device: int) -> KernelStatus:
    # the most usual one: bfloat16, 16 channels per group, 3x3, logits
    problem = dcnv3_cuda.Problem(units=1, groups=1, depth=16)
    cut = dcnv3_cuda.plan(problem, 9, (torch.bfloat16,) * 3, softmax=True, fixed=False)
    reason = dcnv3_cuda.unavailable(device)
    return _on_cuda("dcnv3, dcnv4", device, reason, dcnv3_cuda.SOURCE, cut.settings)


def _fused_on_cuda(device: int) -> KernelStatus:
    # the convolution of InternImage-T's first stage
    cut = fused_layers_cuda.plan(64, (torch.bfloat16,) * 3, side=3)
    reason = fused_layers.unavailable("cuda", device)
    op = "depthwise_norm_gelu, residual_norm"
    return _on_cuda(op, device, reason, fused_layers_cuda.SOURCE, cut.settings)


def _on_cuda(
    op: str, device: int, reason: str | None, source: str, settings: Mapping[str, int]
) -> KernelStatus:
    """reason: why no kernel can run there, or None; settings: of one variant, to compile."""
    name = torch.cuda.get_device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    if reason is None:
        try:
            cubin = cached_cubin(source, settings, f"sm_{major}{minor}")
        except (CudaCompileError, HostCompileError) as error:
            reason = str(error)
        except OSError as error:
            reason = f"a kernel cannot be kept in the cache ({error}); set GROUNDWORK_CACHE"
        else:
            built = f"built in {cubin.seconds:.1f} s" if cubin.seconds else "built before"
            detail = f"{name}, sm_{major}{minor}; NVRTC, {built}, in {cache_folder()}"
            return KernelStatus(op, f"cuda:{device}", "cuda", detail)
    return KernelStatus(op, f"cuda:{device}", "reference", f"{name}: {reason}")


def _adamw(device: str) -> KernelStatus:
    choice = choose_adamw("auto", device)
    apex = apex_problem() or "apex is installed: optimizer.backend=apex uses it"
    return KernelStatus("adamw", device, choice.backend, f"{choice.reason}; {apex}")


def _layer_norm(device: str) -> KernelStatus:
    choice = choose_layer_norm("auto", device)
    apex = apex_problem() or "apex is installed: choose_layer_norm('apex', 'cuda') uses it"
    return KernelStatus("layer_norm", device, choice.backend, f"{choice.reason}; {apex}")
