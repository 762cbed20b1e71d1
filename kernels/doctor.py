"""Which backend each op uses on this machine, and why."""

from dataclasses import dataclass

import torch

from groundwork.kernels import dcnv3_cpu, dcnv3_cuda
from groundwork.kernels.cuda_compiler import CudaCompileError, cached_cubin
from groundwork.kernels.host_compiler import (
    HostCompileError,
    build_host_library,
    cache_folder,
    find_compiler,
    instruction_set,
)
from groundwork.kernels.optional_backends import apex_problem, choose_adamw


@dataclass(frozen=True)
class KernelStatus:
    """op on device: runs `backend`; reason says why this one, and what would change it."""

    op: str
    device: str
    backend: str
    reason: str


def kernel_statuses() -> list[KernelStatus]:
    """Every op on every kind of device here; kernels that are missing are compiled."""
    return [
        _dcnv3_on_cpu(),
        *map(_dcnv3_on_cuda, range(torch.cuda.device_count())),
        _adamw("cuda" if torch.cuda.is_available() else "cpu"),
        KernelStatus("modulated_deform_conv2d", "all", "torchvision", "delegates to torchvision"),
    ]


def _dcnv3_on_cpu() -> KernelStatus:
    try:
        library = build_host_library(dcnv3_cpu.SOURCE)
        dcnv3_cpu.library()
    except HostCompileError as error:
        return KernelStatus("dcnv3, dcnv4", "cpu", "reference", str(error))
    compiler = library.compiler or find_compiler() or "no compiler needed"
    built = f"built in {library.seconds:.1f} s" if library.compiler else "built before"
    return KernelStatus(
        "dcnv3, dcnv4",
        "cpu",
        "cpu",
        f"{instruction_set()}, {torch.get_num_threads()} threads "
        f"({library.openmp or 'OpenMP of the compiler'}); {compiler}; {built}: {library.path}",
    )


def _dcnv3_on_cuda(device: int) -> KernelStatus:
    name = torch.cuda.get_device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    reason = dcnv3_cuda.unavailable(device)
    if reason is None:
        # the most usual one: bfloat16, 16 channels per group, 3x3, logits
        problem = dcnv3_cuda.Problem(units=1, groups=1, depth=16)
        cut = dcnv3_cuda.plan(problem, 9, (torch.bfloat16,) * 3, softmax=True, fixed=False)
        try:
            cubin = cached_cubin(dcnv3_cuda.SOURCE, cut.settings, f"sm_{major}{minor}")
        except (CudaCompileError, HostCompileError) as error:
            reason = str(error)
        else:
            built = f"built in {cubin.seconds:.1f} s" if cubin.seconds else "built before"
            detail = f"{name}, sm_{major}{minor}; NVRTC, {built}, in {cache_folder()}"
            return KernelStatus("dcnv3, dcnv4", f"cuda:{device}", "cuda", detail)
    return KernelStatus("dcnv3, dcnv4", f"cuda:{device}", "reference", f"{name}: {reason}")


def _adamw(device: str) -> KernelStatus:
    choice = choose_adamw("auto", device)
    apex = apex_problem() or "apex is installed: optimizer.backend=apex uses it"
    return KernelStatus("adamw", device, choice.backend, f"{choice.reason}; {apex}")
