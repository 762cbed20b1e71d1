"""Compiles the C++ sources in `csrc/` for this machine at first use, and loads them.

A library is built for one instruction set, chosen by what the CPU can do, and kept in the cache
folder under the hash of its sources and flags. Ranks that ask at once wait for one compilation.
Beside it lies a note of its size and checksum: a library that is not what was built (cut off by a
full disk, or overwritten) would end the process when it is loaded, and is built again instead.

Whatever goes wrong is a HostCompileError, on which every op runs its reference.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

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
    """path: the compiled file. seconds: its compilation took, with `compiler`, whenever it was.

    built_now: by this call. openmp: the runtime it was linked with.
    """

    path: Path
    instruction_set: str
    seconds: float
    compiler: str
    openmp: str | None
    built_now: bool


def cache_folder() -> Path:
    """`$GROUNDWORK_CACHE`, else `groundwork` in the user's cache folder; created private.

    Code is loaded from it, so a folder that others may write to is refused.
    """
    given = os.environ.get("GROUNDWORK_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(given) if given else Path(base) / "groundwork"
    folder = folder / "kernels"
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except (OSError, RuntimeError) as error:  # the latter: a user without a home
        reason = getattr(error, "strerror", None) or error
        raise HostCompileError(
            f"the cache folder {folder} cannot be made ({reason}); set GROUNDWORK_CACHE to a "
            "folder you may write to"
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
    """The program that is tried first: that of `$CXX`, else the first usual compiler in PATH."""
    try:
        return compiler_commands()[0][0]
    except HostCompileError:
        return None


def compiler_commands() -> list[list[str]]:
    """What to try as a compiler, in order: `$CXX` alone, which may be a command with arguments
    ("ccache g++"), or else all usual compilers in PATH. Raises HostCompileError if there is none.
    """
    chosen = (os.environ.get("CXX") or "").strip()
    if not chosen:
        found = [program for name in COMPILERS if (program := shutil.which(name))]
        if not found:
            raise HostCompileError(
                f"no C++ compiler ({', '.join(COMPILERS)}) in PATH; install one "
                "(`apt-get install g++`), or set CXX"
            )
        return [[program] for program in found]
    if program := shutil.which(chosen):  # a path with spaces in it
        return [[program]]
    try:
        name, *arguments = shlex.split(chosen)
    except ValueError as error:
        raise HostCompileError(
            f"no C++ compiler: CXX is {chosen!r}, which is no command ({error}); correct "
            "or unset it"
        ) from error
    program = shutil.which(name)
    if program is None:
        raise HostCompileError(
            f"no C++ compiler: CXX is {chosen!r}, and there is no program {name!r} in PATH; "
            "correct or unset it"
        )
    return [[program, *arguments]]


@cache
def load_host_library(source: str, instructions: str | None = None) -> ctypes.CDLL:
    """The library of a file in `csrc/`, compiled if need be. Raises HostCompileError."""
    library = build_host_library(source, instructions)
    try:
        return ctypes.CDLL(str(library.path))
    except OSError as error:
        raise HostCompileError(
            f"{library.path}, built by {library.compiler}, does not load ({error}); set CXX to "
            "another compiler, delete the file, and it is compiled again"
        ) from error


def build_host_library(source: str, instructions: str | None = None) -> HostLibrary:
    """Compile a file in `csrc/` into the cache, unless it is there. Raises HostCompileError."""
    try:
        return _build(source, instructions or instruction_set())
    except OSError as error:
        raise HostCompileError(
            f"{source} cannot be compiled into the cache ({error}); set GROUNDWORK_CACHE to a "
            "folder that you may write to, on a file system with space left"
        ) from error


def _build(source: str, instructions: str) -> HostLibrary:
    flags = (*COMMON_FLAGS, *INSTRUCTION_SETS[instructions])
    openmp = _openmp_of_torch()
    name = openmp.name if openmp else None
    parts = [*flags, platform.machine(), str(name)]
    key = _digest(SOURCES / source, parts)
    path = cache_folder() / f"{Path(source).stem}-{instructions.lower()}-{key}.so"
    note = _verified(path)
    if note is None:
        with _alone(path.with_suffix(".lock")):
            note = _verified(path)  # another rank may have been faster
            if note is None:
                note = _compile(SOURCES / source, path, flags, openmp)
                return HostLibrary(path, instructions, *note, name, built_now=True)
    return HostLibrary(path, instructions, *note, name, built_now=False)


def _verified(path: Path) -> tuple[float, str] | None:
    """Seconds and compiler of a library whose bytes are those that were built; else None."""
    try:
        note: Any = json.loads(path.with_suffix(".json").read_text("utf-8"))
        content = path.read_bytes()
        if note["bytes"] == len(content) and note["sha256"] == hashlib.sha256(content).hexdigest():
            return float(note["seconds"]), str(note["compiler"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return None


def _compile(
    source: Path, path: Path, flags: tuple[str, ...], openmp: Path | None
) -> tuple[float, str]:
    """Build a library and its note with the first compiler that can -> seconds, compiler."""
    failures = []
    for command in compiler_commands():
        compiler = shlex.join(command)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            began = time.monotonic()
            linked = Path(folder, "code.so")
            failure = _compile_with(command, source, linked, flags, openmp)
            if failure is not None:
                failures.append(f"{compiler} could not build {source.name}: {failure}")
                continue
            seconds = time.monotonic() - began
            content = linked.read_bytes()
            note = {
                **{"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
                **{"seconds": seconds, "compiler": compiler},
            }
            written = Path(folder, "code.json")
            written.write_text(json.dumps(note), "utf-8")
            # On disk before they have their names; the note last, as it vouches for the library.
            for file, target in ((linked, path), (written, path.with_suffix(".json"))):
                _sync(file)
                file.replace(target)
            return seconds, compiler
    failure = "; ".join(failures)
    if "No space left" in failure:
        failure += "; make room, or set GROUNDWORK_CACHE and TMPDIR to folders with space left"
    raise HostCompileError(failure)


def _compile_with(
    command: list[str], source: Path, linked: Path, flags: tuple[str, ...], openmp: Path | None
) -> str | None:
    """None if a compiler has made `linked`, else what it said."""
    compiled = linked.with_suffix(".o")
    run = [*command, *flags, "-c", str(source), "-o", str(compiled)]
    # A compiler without OpenMP (Apple's) still makes a library, for one thread.
    threads = openmp is not None or _run([*run, "-fopenmp"], compiled) is None
    failure = None
    if openmp or not threads:
        failure = _run([*run, "-fopenmp"] if openmp else run, compiled)
    if failure is not None:
        return failure
    # The runtime that torch has loaded: one process, one pool of threads.
    runtime = [str(openmp)] if openmp else ["-fopenmp"] if threads else []
    return _run([*command, "-shared", str(compiled), *runtime, "-o", str(linked)], linked)


def _run(command: list[str], made: Path) -> str | None:
    """None if a command succeeds and has made a file, else what it said first."""
    environment = {**os.environ, "LC_ALL": "C"}  # errors are looked for by their English name
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=600,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = [
        line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()
    ]
    said = [line for line in said if "error" in line] or said or ["it printed nothing"]
    if done.returncode < 0:
        with suppress(ValueError):
            name = signal.Signals(-done.returncode).name
            return f"killed by {name}: {said[0][:300]}"
    if done.returncode != 0:
        return f"exit status {done.returncode}: {said[0][:300]}"
    if not made.is_file() or made.stat().st_size == 0:
        return f"exit status 0, but it wrote no {made.name}: {said[0][:300]}"
    return None


def _sync(path: Path) -> None:
    """Wait until a file's content is on the disk, where the file system knows of such a thing."""
    with path.open("rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise


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
