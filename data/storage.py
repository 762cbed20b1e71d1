"""Where the files of a data set lie, read as byte ranges: a folder, or a remote store.

storage = open_storage("s3://bucket/corpus", CacheConfig("/local/cache", 200 * 2**30))
storage.read("train-000007.tar", 1_048_576, 1_064_960)
"""

import errno
import fnmatch
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from groundwork.data.cache import CacheConfig
from groundwork.data.storage_errors import MissingFileError, StorageError
from groundwork.data.storage_names import Range, check_name
from groundwork.data.storage_remote import RemoteConfig, RemoteStorage
from groundwork.data.storage_retry import RetryConfig

#: Files a process keeps open. A shuffled stream visits all shards; the limit on open files is often
#: 1,024, and opening a file costs microseconds.
MAX_OPEN_FILES = 128
#: `s3://`, `https://`, `hf://`, and chains of fsspec such as `zip::s3://`.
REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")


class Storage(Protocol):
    """Files of one data set by name, as byte ranges [begin, end).

    A name is relative to the data set's folder, with `/` between its parts. Objects can be pickled
    and used after a fork, by several threads at once; nothing is opened before its first use in a
    process. Methods raise StorageError (an OSError) after all retries, MissingFileError where there
    is no such file.
    """

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def sizes(self, names: Sequence[str]) -> list[int]:
        """The same for many files, asked for in parallel."""

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes begin..end-1. Less than that is an error, never a short result."""

    def read_many(self, requests: Sequence[Range]) -> list[bytes]:
        """The ranges in the order asked for, read in parallel where that is faster."""

    def prefetch(self, requests: Sequence[Range]) -> None:
        """Begin to fetch in the background. Never raises and never waits; asks for more than is
        sensible to hold are dropped."""

    def forget(self, name: str, begin: int, end: int) -> None:
        """Drop what is kept of a range whose checksum is wrong: the next read fetches anew."""

    def names(self, pattern: str = "*.tar") -> list[str]:
        """The files of the folder itself that match, sorted."""

    def whole(self, name: str) -> bytes:
        """All of a file."""

    def where(self, name: str) -> str:
        """Path or URL for messages, without credentials."""


def open_storage(
    url: str,
    cache: CacheConfig | None = None,
    *,
    remote: RemoteConfig | None = None,
    retry: RetryConfig | None = None,
) -> Storage:
    """The files below `url`: a local folder, or a folder URL that fsspec or HTTP(S) can read.

    cache: keeps remote blocks on a local disk; without one they are kept in memory, per process.
        Local files are never cached.
    """
    if url.startswith("file://"):
        return LocalStorage(url.removeprefix("file://"))
    if not REMOTE.match(url):
        return LocalStorage(url)
    return RemoteStorage(url, cache, remote or RemoteConfig(), retry or RetryConfig())


def is_remote(url: str) -> bool:
    """Whether `open_storage` reads this with caches and retries."""
    return REMOTE.match(url) is not None and not url.startswith("file://")


class OpenFile:
    """A file descriptor that is closed when nobody reads from it any more."""

    __slots__ = ("fd",)

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class LocalStorage:
    """Files of a folder, by positioned reads on at most MAX_OPEN_FILES open files.

    Plain reads rather than memory maps, because a map of a file that shrinks under it, or whose
    disk fails, kills the process instead of raising.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        # threads share it without a lock, which a fork in the wrong moment would leave locked for
        # ever: only operations that are atomic, and none that drops a value, since closing a file
        # in the middle of an operation lets another thread in
        self._open: dict[str, OpenFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def size(self, name: str) -> int:
        try:
            file = self.open(name)
            return os.fstat(file.fd).st_size
        except OSError as error:
            raise self._failure(name, error) from error

    def sizes(self, names: Sequence[str]) -> list[int]:
        return [self.size(name) for name in names]

    def read(self, name: str, begin: int, end: int) -> bytes:
        if not 0 <= begin <= end:
            raise ValueError(f"{name}: bytes {begin} to {end} are no range")
        try:
            # held by a variable, or another thread could close the descriptor before it is read
            file = self.open(name)
            data = os.pread(file.fd, end - begin, begin)
        except OSError as error:
            if error.errno == errno.ESTALE:  # replaced on a network file system
                self._open.pop(name, None)
            raise self._failure(name, error) from error
        return data if len(data) == end - begin else self._rest(name, begin, end, data)

    def _rest(self, name: str, begin: int, end: int, data: bytes) -> bytes:
        """Go on where one call gave less than asked for: at 2 GiB, or at the end of the file."""
        parts = [data]
        position = begin + len(data)
        while position < end and parts[-1]:
            try:
                file = self.open(name)
                parts.append(os.pread(file.fd, end - position, position))
            except OSError as error:
                raise self._failure(name, error) from error
            position += len(parts[-1])
        if position < end:
            raise StorageError(
                f"{self.where(name)}: bytes {begin:,} to {end:,} wanted, {position - begin:,} of "
                f"{end - begin:,} are there: the file ends early; fetch or build it again"
            )
        return b"".join(parts)

    def read_many(self, requests: Sequence[Range]) -> list[bytes]:
        return [self.read(*request) for request in requests]

    def prefetch(self, requests: Sequence[Range]) -> None:
        """Tell the kernel what will be read soon; it reads ahead by itself."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name, begin, end in requests:
            try:
                file = self.open(name)
                os.posix_fadvise(file.fd, begin, max(0, end - begin), os.POSIX_FADV_WILLNEED)
            except (OSError, ValueError):
                continue  # whoever reads it will say what is wrong

    def forget(self, name: str, begin: int, end: int) -> None:
        """Close the file: if it was replaced, the next read opens the new one."""
        self._open.pop(name, None)

    def names(self, pattern: str = "*.tar") -> list[str]:
        try:
            with os.scandir(self.folder) as entries:
                found = [entry.name for entry in entries if entry.is_file()]
        except OSError as error:
            raise self._failure("", error) from error
        return sorted(fnmatch.filter(found, pattern))

    def whole(self, name: str) -> bytes:
        self._open.pop(name, None)  # small files are replaced now and then
        return self.read(name, 0, self.size(name))

    def open(self, name: str) -> OpenFile:
        """A file for reading at any place, as long as the result is held. Raises OSError."""
        file = self._open.pop(name, None)
        if file is None:
            check_name(name)
            file = OpenFile(self.folder / name)
        file = self._open.setdefault(name, file)  # the last one is the one used last
        while len(self._open) > MAX_OPEN_FILES:
            with suppress(RuntimeError, StopIteration):  # another thread has just changed it
                self._open.pop(next(iter(self._open)), None)
        return file

    def _failure(self, name: str, error: OSError) -> StorageError:
        what = f"{self.where(name)}: {error.strerror or error}"
        if isinstance(error, FileNotFoundError):
            return MissingFileError(f"{what}; fetch or build it, or mend the path")
        return StorageError(f"{what}; check the file, its permissions and its disk")
