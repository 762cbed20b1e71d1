"""Compiles the CUDA sources in `csrc/` with NVRTC for the present GPU, and launches their kernels.

No toolkit and no headers are needed: NVRTC comes with torch. A cubin is kept in the cache folder
under the hash of its sources, settings and compiler.
"""

import ctypes
import hashlib
import logging
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from groundwork.kernels.host_compiler import SOURCES, HostCompileError, cache_folder

log = logging.getLogger(__name__)

#: A cubin's file begins with its sha256.
DIGEST_BYTES: Final = 32
#: Least compute capability that the sources are written for (bfloat16 needs none of its own).
LEAST_CAPABILITY: Final = (7, 0)


class CudaCompileError(RuntimeError):
    """A kernel could not be compiled, loaded or launched; says which, and with which settings."""


@dataclass(frozen=True)
class Cubin:
    """code: machine code for `arch` (such as sm_90). log: of the compiler, with registers used.

    seconds: the compilation took; 0.0 if it came from the cache.
    """

    code: bytes
    arch: str
    log: str
    seconds: float


def source_text(source: str) -> bytes:
    """A file in `csrc/` with the headers there in place of their `#include`; each only once."""
    included: set[bytes] = set()

    def expand(text: bytes) -> bytes:
        def header(found: re.Match[bytes]) -> bytes:
            if found[1] in included:
                return b""
            included.add(found[1])
            return expand((SOURCES / found[1].decode()).read_bytes())

        return re.sub(rb'^#include "([\w.]+)"$', header, text, flags=re.MULTILINE)

    return expand((SOURCES / source).read_bytes())


def compile_cubin(source: str, settings: Mapping[str, int], arch: str) -> Cubin:
    """Compile a file in `csrc/` with preprocessor `settings`. Needs no GPU."""
    nvrtc = _nvrtc()
    options = [
        f"--gpu-architecture={arch}",
        "--std=c++17",
        "--ptxas-options=-v",
        *(f"-D{name}={value}" for name, value in sorted(settings.items())),
    ]
    began = time.monotonic()
    status, program = nvrtc.nvrtcCreateProgram(source_text(source), source.encode(), 0, [], [])
    _check_nvrtc(status, source)
    (status,) = nvrtc.nvrtcCompileProgram(
        program, len(options), [option.encode() for option in options]
    )
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.rstrip(b"\0 ").decode(errors="replace")
    if int(status) != 0:
        raise CudaCompileError(
            f"{source} does not compile for {arch} with {dict(settings)}:\n{text}"
        )
    status, size = nvrtc.nvrtcGetCUBINSize(program)
    _check_nvrtc(status, source)
    code = b" " * size
    (status,) = nvrtc.nvrtcGetCUBIN(program, code)
    _check_nvrtc(status, source)
    nvrtc.nvrtcDestroyProgram(program)
    return Cubin(code, arch, text, time.monotonic() - began)


def cached_cubin(source: str, settings: Mapping[str, int], arch: str) -> Cubin:
    """`compile_cubin`, kept on disk. Ranks that ask at once may each compile; one file remains.

    A damaged file is compiled again; without a usable cache folder each process compiles.
    """
    _, major, minor = _nvrtc().nvrtcVersion()
    settled = f"{sorted(settings.items())} {arch} {major}.{minor}\0".encode()
    digest = hashlib.sha256(settled + source_text(source))
    name = f"{Path(source).stem}-{arch}-{digest.hexdigest()[:20]}.cubin"
    try:
        path = cache_folder() / name
        kept = path.read_bytes() if path.exists() else b""
    except (HostCompileError, OSError) as error:
        log.warning("%s is compiled by every process: %s", source, error)
        return compile_cubin(source, settings, arch)
    code = kept[DIGEST_BYTES:]
    if kept[:DIGEST_BYTES] == hashlib.sha256(code).digest():
        return Cubin(code, arch, "", 0.0)
    cubin = compile_cubin(source, settings, arch)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder, name)
            written.write_bytes(hashlib.sha256(cubin.code).digest() + cubin.code)
            written.replace(path)
    except OSError as error:
        log.warning("%s is compiled by every process: %s", source, error)
    return cubin


class CudaKernel:
    """One kernel of a compiled source on one device."""

    def __init__(self, source: str, name: str, settings: Mapping[str, int], device: int) -> None:
        driver = _driver()
        self.device = device
        self.label = f"{name} of {source} with {dict(settings)} on cuda:{device}"
        major, minor = torch.cuda.get_device_capability(device)
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the context of torch, which the module belongs to
            torch.cuda.synchronize()
            code = cached_cubin(source, settings, f"sm_{major}{minor}").code
            status, self._module = driver.cuModuleLoadData(code)
            self._check(status, "load")
            status, self._function = driver.cuModuleGetFunction(self._module, name.encode())
            self._check(status, "find")

    def launch(self, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        """Queue the kernel on torch's current stream. arguments: ctypes values, structures."""
        pointers = (ctypes.c_void_p * len(arguments))(
            *(ctypes.addressof(argument) for argument in arguments)
        )
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            (status,) = _driver().cuLaunchKernel(
                self._function,
                *(blocks, 1, 1),
                *(threads, 1, 1),
                0,
                stream,
                ctypes.addressof(pointers),
                0,
            )
        self._check(status, "launch")

    def _check(self, status: Any, what: str) -> None:
        if int(status) != 0:
            _, text = _driver().cuGetErrorString(status)
            detail = text.decode() if isinstance(text, bytes) else str(status)
            raise CudaCompileError(f"could not {what} {self.label}: {detail}")


@cache
def cuda_kernel(
    source: str, name: str, settings: tuple[tuple[str, int], ...], device: int
) -> CudaKernel:
    """The kernel, compiled and loaded once per process and device."""
    return CudaKernel(source, name, dict(settings), device)


def unavailable() -> str | None:
    """Why CUDA sources cannot be compiled and launched here; None where they can."""
    try:
        _nvrtc(), _driver()
    except CudaCompileError as error:
        return str(error)
    return None


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise CudaCompileError(
            f"cuda.bindings is not installed ({error}); `pip install cuda-bindings`"
        ) from error
    return nvrtc


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise CudaCompileError(
            f"cuda.bindings is not installed ({error}); `pip install cuda-bindings`"
        ) from error
    return driver


def _check_nvrtc(status: Any, source: str) -> None:
    if int(status) != 0:
        _, text = _nvrtc().nvrtcGetErrorString(status)
        raise CudaCompileError(f"{source}: NVRTC says {text.decode()}")
