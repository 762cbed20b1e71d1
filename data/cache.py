"""Blocks of remote files on a local disk, shared by all processes of a node.

    FOLDER/blocks/ab/<key>   one block: header, checksums, bytes; its mtime is its last use
    FOLDER/temporary/*       blocks being written, each locked by its writer
    FOLDER/locks/*           a fixed number of empty files, locked while a block is fetched
    FOLDER/usage             how many bytes the blocks take; locked while that changes

There are no servers and no shared memory: a process that dies lets go of its locks, and what it was
writing is removed by the next one that needs room. Several jobs may use one folder.

The count in `usage` grows before a block is written and shrinks after one is deleted, so a crash in
between makes it too large, never too small; whenever it reaches the limit the folder is counted.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

log = logging.getLogger(__name__)

MAGIC = b"GWBLK\x00\x00\x01"
#: magic, the key, bytes of content; then a crc32c per page, then the crc32c of all of this.
HEADER = struct.Struct("<8s32sQ")
#: Bytes that have a checksum of their own, so that a small read need not check the whole block.
PAGE = 16 * 1024
USAGE = struct.Struct("<8sqII")  # magic, bytes in use, crc32c of the boot id, crc32c of the rest
USAGE_MAGIC = b"GWUSE\x00\x00\x01"
#: What a file takes on the disk is counted in such units.
DISK_UNIT = 4096
KEY = re.compile(r"[0-9a-f]{64}")
LOCK_FILES = 512
#: An eviction goes on down to this share of the limit, so that not every new block needs one.
EVICT_TO = 0.95
#: How long to wait for the lock of `usage`, which is held for microseconds, or for one count.
USAGE_TIMEOUT_S = 30.0
#: After the disk refused a block, the cache is not written for so long.
PAUSE_S = 60.0
#: Where there are no locks, what was being written so long ago is taken for abandoned.
ABANDONED_AFTER_S = 3600.0
#: Errors of flock that say only that this file system has no locks.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True)
class CacheConfig:
    """A folder on a local disk, and what it may take there.

    max_bytes: the blocks used least recently are deleted beyond it. It counts all blocks of the
        folder, also those of other jobs.
    touch_after_s: the time of last use is noted at most this often per block.
    """

    folder: str | Path
    max_bytes: int = 64 * 2**30
    touch_after_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.touch_after_s < 0:
            raise ValueError(
                f"CacheConfig: max_bytes {self.max_bytes} must be at least 1 and touch_after_s "
                f"{self.touch_after_s} at least 0"
            )


def block_key(*parts: str | int) -> str:
    """The name of a block: a digest of what it is a block of."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class BlockCache:
    """Reads, writes and deletes blocks. Holds no open file, so it survives pickling and forks.

    Nothing here raises because of the disk: a cache that cannot be used misses, and says so once.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.folder = Path(config.folder).expanduser().absolute()
        self._paused_until = 0.0
        self._warned = False
        self._checked_by = 0  # the process that has looked for what a crash or reboot left

    def get(self, key: str, begin: int = 0, end: int | None = None) -> bytes | None:
        """Bytes begin..end-1 of a block (None: to its end), checked; None where it is not here."""
        try:
            fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            data = _read_block(fd, key, begin, end)
            if data is not None:
                self._touch(fd)
                return data
        except OSError as error:
            self._complain(error)
            return None
        finally:
            os.close(fd)
        log.warning("%s: damaged; the block is dropped and fetched again", self._path(key))
        self.drop(key)
        return None

    def has(self, key: str) -> bool:
        return os.path.exists(self._path(key))  # noqa: PTH110  # called per block and read

    def put(self, key: str, data: bytes) -> bool:
        """Keep a block. False where the disk does not take it, or it is larger than the limit."""
        if time.monotonic() < self._paused_until:
            return False
        header = _header(key, data)
        size = len(header) + len(data)
        temporary = None
        try:
            with self._usage() as usage:
                if usage is None:
                    raise BlockingIOError(errno.EWOULDBLOCK, "another process holds its lock")
                if not self._make_room(usage, _on_disk(size)):
                    return False
                _write_usage(usage, _read_usage(usage) + _on_disk(size))
                temporary, fd = self._claim_temporary(size)
            try:
                _write_all(fd, (header, data))
                path = Path(self._path(key))
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.replace(path)
            finally:
                os.close(fd)
        except OSError as error:
            self._complain(error)
            self._paused_until = time.monotonic() + PAUSE_S
            if temporary is not None:
                self._delete(str(temporary))
            return False
        return True

    def drop(self, key: str) -> None:
        """Delete a block, if it is here."""
        self._delete(self._path(key))

    @contextmanager
    def fetching(self, key: str, timeout_s: float) -> Iterator[bool]:
        """Hold the lock under which one process fetches a block; the others wait, and then find it.

        Yields False where it was not to be had in time, because its holder hangs, or at all.
        A lock is shared by many blocks, so nobody may wait for a second one while holding it.
        """
        path = self.folder / "locks" / f"{int(key[:8], 16) % LOCK_FILES:03x}"
        fd = None
        try:
            try:
                fd = _open_or_create(path)
                locked = _lock(fd, timeout_s)
            except OSError as error:
                self._complain(error)
                locked = False
            yield locked
        finally:
            if fd is not None:
                _release(fd)

    def used(self) -> int:
        """Bytes on the disk, counted now: blocks and what is being written."""
        return sum(size for _, size, _ in self._blocks()) + self._temporaries(clean=False)

    # -- accounting; all of it under the lock of `usage`

    @contextmanager
    def _usage(self) -> Iterator[int | None]:
        """The open, locked file `usage`; None where the lock is not to be had."""
        path = self.folder / "usage"
        fd = _open_or_create(path)
        try:
            deadline = time.monotonic() + USAGE_TIMEOUT_S
            while True:
                if not _lock(fd, deadline - time.monotonic()):
                    yield None
                    return
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), path.stat()):
                        break
                _release(fd)  # somebody deleted the file while we waited for it
                fd = _open_or_create(path)
            if _read_usage(fd) < 0:
                _write_usage(fd, self.used())
            if self._checked_by != os.getpid():
                self._recover(fd)
                self._checked_by = os.getpid()
            yield fd
        finally:
            _release(fd)

    def _recover(self, usage: int) -> None:
        """Remove what dead writers left; count anew if the machine was started since the last."""
        self._temporaries(clean=True)
        if _boot_of_usage(usage) != _boot():
            _write_usage(usage, self.used())

    def _make_room(self, usage: int, size: int) -> bool:
        """Evict until `size` more bytes fit. False where they never will."""
        if size > self.config.max_bytes:
            return False
        if _read_usage(usage) + size <= self.config.max_bytes:
            return True
        writing = self._temporaries(clean=True)
        blocks = sorted(self._blocks())
        total = writing + sum(block_size for _, block_size, _ in blocks)
        if total + size > self.config.max_bytes:
            target = max(size, int(self.config.max_bytes * EVICT_TO)) - size
            for _, block_size, path in blocks:
                if total <= target:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)  # noqa: PTH108
                total -= block_size
        _write_usage(usage, total)
        return total + size <= self.config.max_bytes

    def _blocks(self) -> Iterator[tuple[int, int, str]]:
        """(time of last use in ns, bytes on disk, path) of every block."""
        for folder in _entries(self.folder / "blocks"):
            for entry in _entries(folder.path):
                with suppress(FileNotFoundError):
                    if KEY.fullmatch(entry.name):
                        status = entry.stat(follow_symlinks=False)
                        yield status.st_mtime_ns, _on_disk(status.st_size), entry.path

    def _temporaries(self, *, clean: bool) -> int:
        """Bytes reserved by writers at work; `clean` deletes the files of dead ones."""
        total = 0
        for entry in _entries(self.folder / "temporary"):
            with suppress(OSError):
                fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    if clean and _is_abandoned(fd):
                        os.unlink(entry.path)  # noqa: PTH108
                    else:
                        total += _on_disk(os.fstat(fd).st_size)
                finally:
                    os.close(fd)
        return total

    def _claim_temporary(self, size: int) -> tuple[Path, int]:
        """A new locked file that already has its final size, so that counting finds it."""
        path = self.folder / "temporary" / secrets.token_hex(16)
        fd = _open_or_create(path)
        try:
            _try_lock(fd)
            os.ftruncate(fd, size)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return path, fd

    def _delete(self, path: str) -> None:
        with suppress(OSError), self._usage() as usage:
            size = _on_disk(os.stat(path).st_size)  # noqa: PTH116
            os.unlink(path)  # noqa: PTH108
            if usage is not None:
                _write_usage(usage, max(0, _read_usage(usage) - size))

    def _path(self, key: str) -> str:
        return f"{self.folder}/blocks/{key[:2]}/{key}"

    def _touch(self, fd: int) -> None:
        if time.time() - os.fstat(fd).st_mtime > self.config.touch_after_s:
            with suppress(OSError):
                os.utime(fd)

    def _complain(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "cache %s cannot be used (%s); reading goes on without it, so remote data is "
                "fetched again each time. Free some space, or choose another cache folder or size",
                self.folder,
                error.strerror or error,
            )


def _entries(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from entries


def _on_disk(size: int) -> int:
    return -(-size // DISK_UNIT) * DISK_UNIT


def _header(key: str, data: bytes) -> bytes:
    view = memoryview(data)
    pages = [google_crc32c.value(bytes(view[i : i + PAGE])) for i in range(0, len(data), PAGE)]
    head = HEADER.pack(MAGIC, bytes.fromhex(key), len(data)) + np.array(pages, "<u4").tobytes()
    return head + struct.pack("<I", google_crc32c.value(head))


def _read_block(fd: int, key: str, begin: int, end: int | None) -> bytes | None:
    """A range of the content; None where the file is not what was written."""
    head = os.pread(fd, DISK_UNIT, 0)
    if len(head) < HEADER.size:
        return None
    magic, digest, length = HEADER.unpack_from(head)
    if magic != MAGIC or digest.hex() != key or length > os.fstat(fd).st_size:
        return None
    table_end = HEADER.size + 4 * -(-length // PAGE)
    if len(head) < table_end + 4:
        head = os.pread(fd, table_end + 4, 0)
    if len(head) < table_end + 4:
        return None
    (checksum,) = struct.unpack_from("<I", head, table_end)
    if google_crc32c.value(head[:table_end]) != checksum:
        return None
    end = length if end is None else end
    if not 0 <= begin <= end <= length:
        raise ValueError(f"bytes {begin} to {end} of a block of {length}")
    first, last = begin // PAGE, -(-end // PAGE)
    start, stop = first * PAGE, min(last * PAGE, length)
    data = os.pread(fd, stop - start, table_end + 4 + start)
    if len(data) != stop - start:
        return None
    expected = struct.unpack_from(f"<{last - first}I", head, HEADER.size + 4 * first)
    if last - first == 1:
        intact = google_crc32c.value(data) == expected[0]
    else:
        intact = all(
            google_crc32c.value(data[i * PAGE : (i + 1) * PAGE]) == checksum
            for i, checksum in enumerate(expected)
        )
    return data[begin - start : end - start] if intact else None


def _write_all(fd: int, parts: tuple[bytes, ...]) -> None:
    for part in parts:
        view = memoryview(part)
        while view:
            view = view[os.write(fd, view) :]


def _open_or_create(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o600)


def _is_abandoned(fd: int) -> bool:
    """Whether the writer of a temporary file is dead: its lock died with it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # without locks only the age can tell
        return time.time() - os.fstat(fd).st_mtime > ABANDONED_AFTER_S
    return True


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _lock(fd: int, timeout_s: float) -> bool:
    """Wait for a lock, but not for ever: its holder may be stopped."""
    deadline = time.monotonic() + timeout_s
    pause = 0.001
    while not _try_lock(fd):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    return True


def _release(fd: int) -> None:
    # closing alone would leave the lock with a process forked in the meantime
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _read_usage(fd: int) -> int:
    """The count; -1 where there is none, or it is damaged."""
    data = os.pread(fd, USAGE.size, 0)
    if len(data) != USAGE.size:
        return -1
    magic, used, _, checksum = USAGE.unpack(data)
    return used if magic == USAGE_MAGIC and google_crc32c.value(data[:-4]) == checksum else -1


def _boot_of_usage(fd: int) -> int:
    return USAGE.unpack(os.pread(fd, USAGE.size, 0))[2]


def _write_usage(fd: int, used: int) -> None:
    head = USAGE.pack(USAGE_MAGIC, used, _boot(), 0)[:-4]
    os.pwrite(fd, head + struct.pack("<I", google_crc32c.value(head)), 0)


def _boot() -> int:
    """Tells one start of the machine from the next: a power cut may lose the last counts."""
    try:
        return google_crc32c.value(Path("/proc/sys/kernel/random/boot_id").read_bytes())
    except OSError:
        return 0
