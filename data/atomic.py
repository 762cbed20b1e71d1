"""Writing files so that a reader never sees half of one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`: to a temporary file beside it, synced, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def directory_written_atomically(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its name when the block ends without error.

    A folder already at `path` is replaced, and kept until the new one is complete. Whatever an
    earlier, killed writer left behind under the working name is removed first.
    """
    path = path.absolute()
    working = path.with_name(f".{path.name}.partial")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    try:
        yield working
        for file in working.rglob("*"):
            if file.is_file():
                sync_file(file)
        sync_directory(working)
        replaced = path.with_name(f".{path.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if path.exists():
            path.rename(replaced)
        working.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(path: Path) -> None:
    """Flush a directory entry to the disk, so that a rename survives a power cut."""
    sync_file(path)
