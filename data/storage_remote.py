"""Files of a remote store: fetched in aligned blocks, in parallel, kept in memory or on disk."""

import functools
import math
import os
import random
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, TypeVar

from groundwork.data.cache import BlockCache, CacheConfig
from groundwork.data.storage_errors import ReplacedFileError, StorageError, redact
from groundwork.data.storage_fsspec import FsspecTransport
from groundwork.data.storage_http import HttpTransport
from groundwork.data.storage_hub import HubTransport
from groundwork.data.storage_known import KnownFiles
from groundwork.data.storage_names import HTTP, Range, check_name, join_url
from groundwork.data.storage_pool import Pool, Task
from groundwork.data.storage_retry import RetryConfig, with_retries
from groundwork.data.storage_transport import FileInfo, Transport

T = TypeVar("T")

#: Beyond the deadline of a fetch, before whoever waits for it takes its thread for lost.
GRACE_S = 10.0

Block = tuple[str, int]  # name of a file, number of a block in it


@dataclass(frozen=True)
class RemoteConfig:
    """How remote files are read.

    block_bytes: what one request fetches. Smaller ones waste less where samples are read in random
        order, larger ones cost fewer requests where they are read in long runs.
    threads: requests at a time, per process.
    memory_bytes: blocks kept in memory, per process, where there is no cache on disk.
    prefetch_blocks: blocks on their way at most because of `prefetch`.
    revalidate_s: `size` and `whole` ask the store again whether a file has changed when it was last
        asked longer ago. Reads of ranges do not: what they read has checksums.
    options: for the file system of fsspec (`endpoint_url`, `anon`, ...); for HTTP `headers`.
    """

    block_bytes: int = 4 * 2**20
    threads: int = 16
    memory_bytes: int = 128 * 2**20
    prefetch_blocks: int = 32
    revalidate_s: float = 600.0
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold secrets

    def __post_init__(self) -> None:
        if min(self.block_bytes, self.threads, self.prefetch_blocks) < 1:
            raise ValueError(
                f"RemoteConfig: block_bytes {self.block_bytes}, threads {self.threads} and "
                f"prefetch_blocks {self.prefetch_blocks} must be at least 1"
            )


def open_transport(url: str, options: Mapping[str, Any], retry: RetryConfig) -> Transport:
    """The way to the files below a URL. Connects to nothing yet."""
    if HTTP.match(url):
        return HttpTransport(url, options, retry)
    if url.startswith("hf://"):
        return HubTransport(url, options, retry)
    return FsspecTransport(url, options, retry)


class _Process:
    """What one process has: connections, threads, blocks on their way, blocks in memory."""

    def __init__(self, url: str, config: RemoteConfig, retry: RetryConfig) -> None:
        self.transport = open_transport(url, config.options, retry)
        self.pool = Pool(config.threads)
        # seeded by the system: forked workers must not retry in step
        self.generator = random.Random()
        self.lock = threading.Lock()
        self.tasks: dict[Block, Task[bytes]] = {}
        self.prefetching: set[Block] = set()
        self.memory: OrderedDict[Block, bytes] = OrderedDict()
        self.asking = [threading.Lock() for _ in range(64)]


class RemoteStorage:
    """Files below any URL of fsspec or HTTP(S); implements `storage.Storage`.

    A range is cut from blocks; a block is fetched once, however many threads and (with a cache)
    processes of this machine want it at the same time.
    """

    def __init__(
        self,
        url: str,
        cache: CacheConfig | None = None,
        config: RemoteConfig | None = None,
        retry: RetryConfig | None = None,
    ) -> None:
        self.url = url
        self.config = config or RemoteConfig()
        self.retry = retry or RetryConfig()
        if cache is not None and cache.max_bytes < 2 * self.config.block_bytes:
            raise ValueError(
                f"cache of {cache.max_bytes:,} bytes: a block has {self.config.block_bytes:,}; "
                "give the cache room for many, or make blocks smaller (RemoteConfig.block_bytes)"
            )
        self.cache = None if cache is None else BlockCache(cache)
        self.known = KnownFiles(url, self.config.options, self.cache)
        self._processes: dict[int, _Process] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_processes": {}}

    def where(self, name: str) -> str:
        return redact(join_url(self.url, name))

    # -- the interface

    def size(self, name: str) -> int:
        return self.sizes([name])[0]

    def sizes(self, names: Sequence[str]) -> list[int]:
        pool = self._process().pool
        tasks: dict[str, Task[FileInfo]] = {}
        for name in names:
            if name not in tasks and not self.known.get(name, self.config.revalidate_s):
                ask = functools.partial(self._info, name, fresh=True)
                tasks[name] = pool.submit(ask, urgent=True)
        asked = {
            name: self._wait(task, f"{self.where(name)}: size") for name, task in tasks.items()
        }
        return [(asked.get(name) or self._info(name)).size for name in names]

    def read(self, name: str, begin: int, end: int) -> bytes:
        first = begin // self.config.block_bytes
        if 0 <= begin < end <= (first + 1) * self.config.block_bytes:
            offset = first * self.config.block_bytes
            data = self._kept((name, first), begin - offset, end - offset)
            if data is not None:
                return data
        return self.read_many([(name, begin, end)])[0]

    def read_many(self, requests: Sequence[Range]) -> list[bytes]:
        try:
            return self._read_many(requests)
        except ReplacedFileError:
            # what was known of the files may be old: from the cache, or from hours ago
            names = {name for name, _, _ in requests}
            stale = [n for n in names if not self.known.get(n, self.config.revalidate_s)]
            for name in names:
                self._lose(name)
            if not stale:
                raise
            return self._read_many(requests)

    def _read_many(self, requests: Sequence[Range]) -> list[bytes]:
        wanted: dict[Block, list[tuple[int, int, int, int]]] = {}
        parts: list[list[bytes]] = []
        for number, (name, begin, end) in enumerate(requests):
            blocks = self._blocks(name, begin, end)
            parts.append([b""] * len(blocks))
            for part, (block, low, high) in enumerate(blocks):
                wanted.setdefault(block, []).append((number, part, low, high))

        def deliver(block: Block, task: Task[bytes] | None) -> None:
            data = None if task is None else self._wait(task, self._title(block))
            for number, part, low, high in wanted[block]:
                piece = self._kept(block, low, high) if data is None else data[low:high]
                if piece is None:  # it was kept a moment ago, and has been evicted since
                    data = self._wait(self._start(block), self._title(block))
                    piece = data[low:high]
                if len(piece) != high - low:
                    raise self._ends_early(block, high)
                parts[number][part] = piece

        # blocks ahead of the one waited for: enough to keep the threads busy, few enough to hold
        ahead: deque[tuple[Block, Task[bytes] | None]] = deque()
        for block in wanted:
            ahead.append((block, None if self._is_kept(block) else self._start(block)))
            if len(ahead) > 2 * self.config.threads:
                deliver(*ahead.popleft())
        while ahead:
            deliver(*ahead.popleft())
        return [pieces[0] if len(pieces) == 1 else b"".join(pieces) for pieces in parts]

    def prefetch(self, requests: Sequence[Range]) -> None:
        process = self._process()
        limit = self.config.prefetch_blocks
        if self.cache is None:
            # more would push out what was fetched before it is read
            limit = min(limit, self.config.memory_bytes // self.config.block_bytes // 2)
        for name, begin, end in requests:
            try:
                blocks = self._blocks(name, begin, end)
            except ValueError:
                continue  # whoever reads it will say so
            for block, _, _ in blocks:
                if len(process.prefetching) >= limit:
                    return
                if block not in process.tasks and not self._is_kept(block):
                    self._start(block, urgent=False)

    def forget(self, name: str, begin: int, end: int) -> None:
        info = self.known.get(name)
        for block, _, _ in self._blocks(name, begin, end):
            self._process().memory.pop(block, None)
            if self.cache is not None and info is not None:
                self.cache.drop(self._key(block, info))
        self.known.forget(name)

    def names(self, pattern: str = "*.tar") -> list[str]:
        now = time.time()
        process = self._process()
        task = process.pool.submit(
            lambda: self._retrying(process.transport.listing, f"{redact(self.url)}: listing"),
            urgent=True,
        )
        found = self._wait(task, f"{redact(self.url)}: listing")
        matching = {name: info for name, info in found.items() if fnmatch(name, pattern)}
        for name, info in matching.items():
            if info is not None:
                self.known.note(name, info, now, shared=False)
        return sorted(matching)

    def whole(self, name: str) -> bytes:
        return self.read(name, 0, self.size(name))

    # -- blocks

    def _blocks(self, name: str, begin: int, end: int) -> list[tuple[Block, int, int]]:
        """The blocks of a range, each with the part of it that belongs to the range."""
        check_name(name)
        if not 0 <= begin <= end:
            raise ValueError(f"{name}: bytes {begin} to {end} are no range")
        size = self.config.block_bytes
        return [
            ((name, number), max(begin - number * size, 0), min(end - number * size, size))
            for number in range(begin // size, math.ceil(end / size) if end > begin else 0)
        ]

    def _is_kept(self, block: Block) -> bool:
        if block in self._process().memory:
            return True
        info = self.known.get(block[0]) if self.cache is not None else None
        return (
            self.cache is not None and info is not None and self.cache.has(self._key(block, info))
        )

    def _kept(self, block: Block, low: int, high: int) -> bytes | None:
        """Part of a block that is here already; None where it is not."""
        memory = self._process().memory
        data = memory.get(block)
        if data is not None:
            with suppress(KeyError):  # pushed out by another thread just now
                memory.move_to_end(block)
            return data[low:high] if high <= len(data) else None
        if self.cache is None:
            return None
        info = self.known.get(block[0])
        if info is None or high > info.size - block[1] * self.config.block_bytes:
            return None
        return self.cache.get(self._key(block, info), low, high)

    def _start(self, block: Block, *, urgent: bool = True) -> Task[bytes]:
        process = self._process()
        with process.lock:
            task = process.tasks.get(block)
            if task is None:
                task = process.pool.submit(functools.partial(self._fetch, block), urgent=urgent)
                process.tasks[block] = task
                if not urgent:
                    process.prefetching.add(block)
            elif urgent:
                process.pool.hurry(task)
        return task

    def _fetch(self, block: Block) -> bytes:
        """What a thread of the pool does for a block."""
        process = self._process()
        try:
            return self._fetch_once(block, process)
        finally:
            with process.lock:
                process.tasks.pop(block, None)
                process.prefetching.discard(block)

    def _fetch_once(self, block: Block, process: _Process) -> bytes:
        deadline = time.monotonic() + self.retry.deadline_s
        name, number = block
        info = self._info(name, deadline=deadline)
        begin = number * self.config.block_bytes
        end = min(begin + self.config.block_bytes, info.size)
        if begin >= end:
            raise self._ends_early(block, 1)

        def fetch() -> bytes:
            return self._retrying(
                lambda timeout_s: process.transport.fetch(name, begin, end, info.size, timeout_s),
                self._title(block),
                deadline - time.monotonic(),
            )

        if self.cache is None:
            return self._remember_block(process, block, fetch())
        key = self._key(block, info)
        # a process that hangs with the lock is not waited for to the end of our own time
        patience = min(self.retry.attempt_timeout_s, self.retry.deadline_s / 2)
        with self.cache.fetching(key, patience):
            data = self.cache.get(key)
            if data is None:
                data = fetch()
                if not self.cache.put(key, data):
                    self._remember_block(process, block, data)
        return data

    def _remember_block(self, process: _Process, block: Block, data: bytes) -> bytes:
        if len(data) <= self.config.memory_bytes:
            with process.lock:
                process.memory[block] = data
                most = max(1, self.config.memory_bytes // self.config.block_bytes)
                while len(process.memory) > most:
                    process.memory.popitem(last=False)
        return data

    def _key(self, block: Block, info: FileInfo) -> str:
        return self.known.block_key(block[0], info, self.config.block_bytes, block[1])

    def _title(self, block: Block) -> str:
        begin = block[1] * self.config.block_bytes
        return f"{self.where(block[0])}: bytes {begin:,} to {begin + self.config.block_bytes:,}"

    def _lose(self, name: str) -> None:
        """Forget what a file was; its blocks on disk bear its version, those in memory do not."""
        process = self._process()
        with process.lock:
            for block in list(process.memory):
                if block[0] == name:
                    process.memory.pop(block, None)
        self.forget(name, 0, 0)

    def _ends_early(self, block: Block, high: int) -> StorageError:
        end = block[1] * self.config.block_bytes + high
        info = self.known.get(block[0])
        has = f"has {info.size:,} bytes" if info else "is shorter"
        return ReplacedFileError(
            f"{self.where(block[0])}: bytes up to {end:,} wanted, but the file {has}; it was "
            "replaced or cut off: build or fetch it and its index again"
        )

    def _info(self, name: str, *, fresh: bool = False, deadline: float | None = None) -> FileInfo:
        """Size and version of a file: remembered, from the cache, or from the store."""
        check_name(name)
        age = self.config.revalidate_s if fresh else math.inf
        deadline = time.monotonic() + self.retry.deadline_s if deadline is None else deadline
        process = self._process()
        asking = process.asking[hash(name) % len(process.asking)]
        # whoever holds it asks for the same file; without it there are two questions, no more
        held = asking.acquire(timeout=max(0.0, deadline - time.monotonic()))
        try:
            info = self.known.find(name, age)
            if info is None:
                asked = time.time()
                info = self._retrying(
                    lambda timeout_s: process.transport.info(name, timeout_s),
                    f"{self.where(name)}: size",
                    deadline - time.monotonic(),
                )
                self.known.note(name, info, asked)
            return info
        finally:
            if held:
                asking.release()

    # -- threads and processes

    def _process(self) -> _Process:
        pid = os.getpid()
        process = self._processes.get(pid)
        if process is None:
            # setdefault is atomic; a lock could have been held at the moment of a fork
            made = _Process(self.url, self.config, self.retry)
            process = self._processes.setdefault(pid, made)
            if process is made:
                weakref.finalize(self, _close, process, pid).atexit = False
        return process

    def _retrying(
        self, attempt: Callable[[float], T], what: str, deadline_s: float | None = None
    ) -> T:
        return with_retries(
            attempt, what, self.retry, generator=self._process().generator, deadline_s=deadline_s
        )

    def _wait(self, task: Task[T], what: str) -> T:
        """The result of a task; an error where its thread, or all of them, hang for good.

        Every step of a task has a limit, but for file systems of fsspec that have none.
        """
        pool = self._process().pool
        limit = self.retry.deadline_s + GRACE_S
        while True:
            since = task.since if task.claim.locked() else max(task.since, pool.progress)
            remaining = since + limit - time.monotonic()
            try:
                return task.future.result(timeout=max(0.0, remaining))
            except TimeoutError:
                if task.future.done():
                    raise
                if remaining <= 0:
                    raise StorageError(
                        f"{what}: no answer in {limit:.0f} s, and the file system obeys no time "
                        "limit; check the network, or copy the data set to a local disk"
                    ) from None


def _close(process: _Process, pid: int) -> None:
    if os.getpid() == pid:  # a fork has the object, but not the threads
        process.pool.close()
