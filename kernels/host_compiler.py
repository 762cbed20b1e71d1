"""Compiles the C++ sources in `csrc/` for this machine at first use, and loads them.

A library is built for one instruction set, chosen by what the CPU can do, and kept in the cache
folder under the hash of its sources and flags. Ranks that ask at once wait for one compilation.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch

SOURCES: Final = Path(__file__).resolve().parent / "csrc"
COMPILERS: Final = ("c++", "g++", "clang++")
COMMON_FLAGS: Final = (
    *("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    *("-fvisibility=default", "-Wno-psabi"),
)
#: Instruction sets by torch's names, with their flags. Any other is the compiler's default.
INSTRUCTION_SETS: Final[Mapping[str, tuple[str, ...]]] = {
    "AVX512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
        *("-mbmi2", "-mprefer-vector-width=512"),
    ),
    "AVX2": ("-mavx2", "-mfma", "-mf16c", "-mbmi2"),
    "DEFAULT": (),
}


class HostCompileError(RuntimeError):
    """No host library can be had here; says why and what would mend it."""


@dataclass(frozen=True)
class HostLibrary:
    """path: the compiled file. seconds: its compilation took, 0.0 if it was there already.

    compiler: that built it in this process, or None. openmp: the runtime it was linked with.
    """

    path: Path
    instruction_set: str
    seconds: float
    compiler: str | None
    openmp: str | None


def cache_folder() -> Path:
    """`$GROUNDWORK_CACHE`, else `groundwork` in the user's cache folder; created private.

    Code is loaded from it, so a folder that others may write to is refused.
    """
    given = os.environ.get("GROUNDWORK_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(given).expanduser() if given else Path(base).expanduser() / "groundwork"
    folder = folder / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise HostCompileError(
            f"the cache folder {folder} cannot be made ({error.strerror}); set GROUNDWORK_CACHE to "
            "a folder you may write to"
        ) from error
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
        raise HostCompileError(
            f"the cache folder {folder} is not yours alone, and code is loaded from it; "
            f"`chmod 700` it, or set GROUNDWORK_CACHE to a folder that only you can write to"
        )
    return folder


def instruction_set() -> str:
    """The best instruction set of this CPU that sources are built for."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability if capability in INSTRUCTION_SETS else "DEFAULT"


def find_compiler() -> str | None:
    """`$CXX`, else the first of the usual C++ compilers in PATH."""
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else COMPILERS:
        if found := shutil.which(name):
            return found
    return None


@cache
def load_host_library(source: str, instructions: str | None = None) -> ctypes.CDLL:
    """The library of a file in `csrc/`, compiled if need be. Raises HostCompileError."""
    library = build_host_library(source, instructions)
    try:
        return ctypes.CDLL(str(library.path))
    except OSError as error:
        raise HostCompileError(
            f"{library.path} does not load ({error}); delete it, and it is compiled again"
        ) from error


def build_host_library(source: str, instructions: str | None = None) -> HostLibrary:
    """Compile a file in `csrc/` into the cache, unless it is there. Raises HostCompileError."""
    instructions = instructions or instruction_set()
    flags = (*COMMON_FLAGS, *INSTRUCTION_SETS[instructions])
    openmp = _openmp_of_torch()
    parts = [*flags, platform.machine(), str(openmp and openmp.name)]
    key = _digest(SOURCES / source, parts)
    path = cache_folder() / f"{Path(source).stem}-{instructions.lower()}-{key}.so"
    name = openmp.name if openmp else None
    if path.exists():
        return HostLibrary(path, instructions, 0.0, None, name)
    with _alone(path.with_suffix(".lock")):
        if path.exists():  # another rank has been faster
            return HostLibrary(path, instructions, 0.0, None, name)
        compiler = find_compiler()
        if compiler is None:
            raise HostCompileError(
                f"no C++ compiler ({', '.join(COMPILERS)}) in PATH to build {source} with; install "
                "one (`apt-get install g++`), or set CXX"
            )
        began = time.monotonic()
        _compile(compiler, SOURCES / source, path, flags, openmp)
        return HostLibrary(path, instructions, time.monotonic() - began, compiler, name)


def _compile(
    compiler: str, source: Path, path: Path, flags: tuple[str, ...], openmp: Path | None
) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder, "code.o"), Path(folder, "code.so")
        run = [compiler, *flags, "-c", str(source), "-o", str(compiled)]
        # A compiler without OpenMP (Apple's) still makes a library, for one thread.
        threads = openmp is not None or _run([*run, "-fopenmp"]) is None
        failure = _run([*run, "-fopenmp"] if openmp else run) if openmp or not threads else None
        if failure is None:
            # The runtime that torch has loaded: one process, one pool of threads.
            runtime = [str(openmp)] if openmp else ["-fopenmp"] if threads else []
            failure = _run([compiler, "-shared", str(compiled), *runtime, "-o", str(linked)])
        if failure is not None:
            raise HostCompileError(f"{compiler} could not build {source.name}: {failure}")
        linked.replace(path)


def _run(command: list[str]) -> str | None:
    """None if a command succeeds, else what it said last."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
    return f"exit status {done.returncode}: {lines[0].strip()[:300]}"


def _openmp_of_torch() -> Path | None:
    """The OpenMP runtime mapped into this process, where the system lists such files."""
    torch.get_num_threads()
    with suppress(OSError):
        maps = Path("/proc/self/maps").read_text("utf-8", errors="replace")
        for line in maps.splitlines():
            file = line.partition("/")[2]
            if re.search(r"/lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*$", file):
                return Path("/" + file)
    return None


def _digest(source: Path, parts: list[str]) -> str:
    text = source.read_bytes()
    headers = re.findall(rb'^#include "([\w.]+)"', text, re.MULTILINE)
    texts = [text, *((source.parent / name.decode()).read_bytes() for name in headers)]
    return hashlib.sha256("\0".join(parts).encode() + b"\0".join(texts)).hexdigest()[:20]


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock that the system releases when its holder dies."""
    with lock.open("w") as file:
        with suppress(OSError):  # a file system without locks: the work is then done twice
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
