"""What the tests of storage share: files, a data set, and ways to read it."""

import multiprocessing
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c

from groundwork.data.cache import CacheConfig
from groundwork.data.samples import Sample
from groundwork.data.shard_index import MISSING, index_path, read_index
from groundwork.data.shards import write_shards
from groundwork.data.storage import Storage
from groundwork.data.storage_remote import RemoteConfig, RemoteStorage
from groundwork.data.storage_retry import RetryConfig

FORK = multiprocessing.get_context("fork")
#: Every kind of fault, 5 % each.
ALL_FAULTS = dict.fromkeys(
    ("unavailable", "stalls", "resets", "truncated", "wrong_length", "trickles"), 0.05
)
BLOCK = 16 * 1024
SMALL = RemoteConfig(block_bytes=BLOCK, threads=6, memory_bytes=8 * BLOCK)
#: Patience that suits a server on this machine.
QUICK = RetryConfig(
    attempts=12,
    first_delay_s=0.01,
    max_delay_s=0.1,
    connect_timeout_s=2,
    stall_timeout_s=0.4,
    attempt_timeout_s=0.8,
    deadline_s=20,
)


def content(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


FILES = {"a.tar": content(1, 5 * BLOCK + 77), "b.tar": content(2, BLOCK), "empty": b""}


def remote(
    server: Any, cache: Path | None = None, config: RemoteConfig = SMALL, retry: RetryConfig = QUICK
) -> RemoteStorage:
    config_of_cache = None if cache is None else CacheConfig(cache, 2**30)
    return RemoteStorage(server.url, config_of_cache, config, retry)


def write_data_set(out: Path) -> Path:
    """60 samples in 6 shards, 5 to 40 kB each."""
    pairs = (
        ("train", Sample(f"k{i:03d}", content(i, 5_000 + 600 * i), "png", f"text {i}", {"n": i}))
        for i in range(60)
    )
    write_shards(pairs, out, name="n", source={}, licence="l", max_samples=10)
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def members(folder: Path) -> list[tuple[str, int, int, int]]:
    """(tar, begin, end, crc32c) of every member of every sample."""
    found = []
    for tar in sorted(folder.glob("*.tar")):
        index = read_index(index_path(tar), tar)
        for offsets, sizes, checksums in zip(
            index.offsets.tolist(), index.sizes.tolist(), index.checksums.tolist(), strict=True
        ):
            for offset, size, checksum in zip(offsets, sizes, checksums, strict=True):
                if size != MISSING:
                    found.append((tar.name, offset, offset + size, checksum))
    return found


def read_all(storage: Storage, wanted: list[tuple[str, int, int, int]], seed: int) -> int:
    """Read all members in random order, some alone, some together; the number that were right."""
    order = list(wanted)
    random.Random(seed).shuffle(order)
    right = 0
    while order:
        part = [order.pop() for _ in range(min(len(order), 1 + len(order) % 5))]
        requests = [(name, begin, end) for name, begin, end, _ in part]
        storage.prefetch([request[:3] for request in order[-8:]])
        got = storage.read_many(requests) if len(part) > 1 else [storage.read(*requests[0])]
        right += sum(google_crc32c.value(data) == p[3] for data, p in zip(got, part, strict=True))
    return right


def blocks_of(wanted: list[tuple[str, int, int, int]]) -> set[tuple[str, int]]:
    return {
        (name, number)
        for name, begin, end, _ in wanted
        for number in range(begin // BLOCK, (end - 1) // BLOCK + 1)
    }


def in_processes(count: int, target: Callable[..., None], *arguments: Any) -> None:
    processes = [FORK.Process(target=target, args=(n, *arguments)) for n in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * count


def in_threads(count: int, target: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            target(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    if failures:
        raise failures[0]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
