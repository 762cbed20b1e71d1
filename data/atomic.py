"""Writing files so that a reader never sees half of one."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: Errors of a disk that say nothing of the file, where `write` met them.
NAMELESS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def write_atomically(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write `data` to `path`: to a temporary file beside it, synced, then renamed over it.

    sync: False where the folder is synced as a whole later.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise
    if sync:
        sync_directory(path.parent)


@contextmanager
def directory_written_atomically(path: Path, *, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its name when the block ends without error.

    A folder already at `path` is replaced, and kept until the new one is complete: if it is empty,
    or if `is_ours` says that it is an earlier result. Whatever an earlier, killed writer left
    behind is removed or, where it was killed between the two renames of a replacement, put back
    first. A symbolic link is followed: the folder it points to is replaced.
    Raises NotADirectoryError where a file is in the way, FileExistsError where a folder of others
    is, BlockingIOError while another process writes the same folder.
    """
    path = path.resolve()
    _refuse_to_lose(path, is_ours)
    working = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(working)
    try:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        for leftover in working.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield working
        for entry in working.rglob("*"):
            sync_file(entry)
        sync_directory(working)
        _refuse_to_lose(path, is_ours)  # writing may have taken hours
        shutil.rmtree(replaced, ignore_errors=True)
        _replace_directory(path, working, replaced)
    except BaseException as error:
        shutil.rmtree(working, ignore_errors=True)
        _name(error, path)
        raise
    finally:
        os.close(lock)
    sync_directory(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def umask() -> int:
    """The permissions that new files of this process do without."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refuse_to_lose(path: Path, is_ours: Callable[[Path], bool]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "a file is where a folder is to be written", str(path)
        )
    if any(path.iterdir()) and not is_ours(path):
        raise FileExistsError(errno.EEXIST, "holds something else, which would be lost", str(path))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error about a temporary file beside `path` names `path`."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _name(error: BaseException, path: Path) -> None:
    if isinstance(error, OSError) and error.filename is None and error.errno in NAMELESS:
        error.filename = str(path)


def _replace_directory(path: Path, working: Path, replaced: Path) -> None:
    if path.exists():
        path.rename(replaced)
    try:
        working.rename(path)
    except OSError:
        if replaced.exists():
            replaced.rename(path)
        raise


def _claim(working: Path) -> int:
    """Make the working folder and lock it; returns the handle that holds the lock.

    The lock dies with the process, so what a killed writer left behind can be told from the folder
    of one at work, whose shards another writer would otherwise mix with its own.
    """
    working.mkdir(exist_ok=True)
    busy = BlockingIOError(errno.EWOULDBLOCK, "another process is writing this folder", working)
    try:
        handle = os.open(working, os.O_RDONLY)
    except FileNotFoundError:
        raise busy from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # its former owner may have given it its final name between the two calls
        if not working.exists() or not os.path.samestat(os.fstat(handle), working.stat()):
            raise busy
    except BlockingIOError:
        os.close(handle)
        raise busy from None
    except OSError:
        pass  # a file system without locks (some NFS and Lustre mounts) is used without
    return handle


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
