"""Which backend each op uses on this machine, and why."""

from dataclasses import dataclass

import torch

from groundwork.kernels import dcnv3_cpu
from groundwork.kernels.host_compiler import (
    HostCompileError,
    build_host_library,
    find_compiler,
    instruction_set,
)


@dataclass(frozen=True)
class KernelStatus:
    """op on device: runs `backend`; reason says why this one, and what would change it."""

    op: str
    device: str
    backend: str
    reason: str


def kernel_statuses() -> list[KernelStatus]:
    """Every op on every kind of device here; kernels that are missing are compiled."""
    statuses = [_dcnv3_on_cpu()]
    statuses.append(
        KernelStatus(
            "modulated_deform_conv2d", "cpu", "torchvision", "delegates to torchvision everywhere"
        )
    )
    return statuses


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
