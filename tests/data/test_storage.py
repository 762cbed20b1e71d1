import functools
import importlib.util
import os
import pickle
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.data.cache import CacheConfig
from groundwork.data.storage import LocalStorage, open_storage
from groundwork.data.storage_errors import (
    MissingFileError,
    StorageError,
)
from groundwork.data.storage_pool import Pool
from groundwork.data.storage_remote import RemoteConfig, RemoteStorage


def _load(name: str) -> ModuleType:
    """A file beside this one, which is not importable by its name."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


reading, fault_server = _load("storage_reading"), _load("fault_server")
BLOCK = reading.BLOCK
FILES = reading.FILES
FORK = reading.FORK
QUICK = reading.QUICK
SMALL = reading.SMALL
blocks_of = reading.blocks_of
content = reading.content
files_of = reading.files_of
in_processes = reading.in_processes
in_threads = reading.in_threads
members = reading.members
read_all = reading.read_all
remote = reading.remote
wait_until = reading.wait_until
Faults = fault_server.Faults
FaultServer = fault_server.FaultServer


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reading.write_data_set(tmp_path_factory.mktemp("set") / "set")


# -- local files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("local")
    (path / "sub").mkdir()
    for name, data in {**FILES, "sub/c.tar": b"deep"}.items():
        (path / name).write_bytes(data)
    return path


def test_a_folder_is_read_like_its_files(folder: Path) -> None:
    for url in (str(folder), f"file://{folder}"):
        storage = open_storage(url)
        assert isinstance(storage, LocalStorage)
        assert storage.names() == ["a.tar", "b.tar"]
        assert storage.names("e*") == ["empty"]
        assert storage.sizes(list(FILES)) == [len(data) for data in FILES.values()]
        assert storage.whole("a.tar") == FILES["a.tar"]
        assert storage.read("sub/c.tar", 1, 3) == b"ee"
        assert storage.read_many([("a.tar", 9, 30), ("b.tar", 0, 0)]) == [FILES["a.tar"][9:30], b""]
        storage.prefetch([("a.tar", 0, 10), ("none.tar", 0, 10), ("a.tar", -4, 10**12)])


def test_a_short_file_is_an_error_that_says_what_is_there(folder: Path) -> None:
    storage, size = LocalStorage(folder), len(FILES["b.tar"])
    said = rf"b.tar: bytes {size - 5:,} to {size + 9:,} wanted, 5 of 14"
    with pytest.raises(StorageError, match=said):
        storage.read("b.tar", size - 5, size + 9)
    with pytest.raises(StorageError, match="0 of 9 are there"):
        storage.read("empty", 0, 9)


def test_what_is_not_there_is_named(folder: Path) -> None:
    storage = LocalStorage(folder)
    for action in (storage.size, storage.whole, lambda name: storage.read(name, 0, 1)):
        with pytest.raises(MissingFileError, match=r"none\.tar: No such file"):
            action("none.tar")
    with pytest.raises(MissingFileError):
        LocalStorage(folder / "none").names()
    with pytest.raises(StorageError, match="directory"):
        storage.read("sub", 0, 1)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "sub/../../a", "", "a//b", "./a", "a\\b"])
def test_no_name_leads_out_of_the_data_set(name: str, folder: Path) -> None:
    for storage in (LocalStorage(folder), RemoteStorage("memory://x")):
        with pytest.raises(ValueError, match="inside the data set"):
            storage.read(name, 0, 1)
        with pytest.raises(ValueError, match="inside the data set"):
            storage.size(name)


def test_threads_read_more_files_than_may_be_open(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}").write_bytes(b"%06d" % number * 10)
    storage = LocalStorage(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 140, hard))

    def read(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(3000):
            number = generator.randrange(300)
            assert storage.read(f"{number}", 6, 12) == b"%06d" % number

    try:
        in_threads(4, read)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_threads_that_close_each_others_files_read_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groundwork.data.storage.MAX_OPEN_FILES", 2)
    for number in range(4):
        (tmp_path / f"{number}").write_bytes(b"%06d" % number * 10)
    storage = LocalStorage(tmp_path)

    def read(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(1000):
            number = generator.randrange(4)
            assert storage.read(f"{number}", 6, 12) == b"%06d" % number

    def slow(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            time.sleep(1e-5)  # threads change places here
            return call(*arguments)

        return called

    monkeypatch.setattr(os, "open", slow(os.open))
    monkeypatch.setattr(os, "close", slow(os.close))
    in_threads(6, read)


def test_a_pickled_or_forked_local_storage_reads_the_same(folder: Path) -> None:
    storage = LocalStorage(folder)
    storage.read("a.tar", 0, 9)

    def child(_: int) -> None:
        assert storage.read("a.tar", 5, 99) == FILES["a.tar"][5:99]

    in_processes(2, child)
    assert pickle.loads(pickle.dumps(storage)).read("a.tar", 5, 99) == FILES["a.tar"][5:99]


def test_a_replaced_file_is_opened_anew_once_the_old_one_is_forgotten(tmp_path: Path) -> None:
    path, storage = tmp_path / "a", LocalStorage(tmp_path)
    path.write_bytes(b"old")
    assert storage.read("a", 0, 3) == b"old"
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").rename(path)
    storage.forget("a", 0, 3)
    assert storage.read("a", 0, 3) == b"new"


# -- ranges and blocks


@pytest.fixture(scope="module")
def in_memory() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    for name, data in FILES.items():
        files.pipe(f"/storage-test/{name}", data)
    yield "memory://storage-test"
    files.rm("/storage-test", recursive=True)


@settings(max_examples=60, deadline=None)
@given(
    ranges=st.lists(
        st.tuples(
            st.sampled_from(sorted(FILES)),
            st.integers(0, 6 * BLOCK),
            st.integers(0, 3 * BLOCK) | st.integers(0, 40),
        ),
        max_size=6,
    ),
    block_bytes=st.sampled_from([1000, 4096, BLOCK, 2**20]),
    cached=st.booleans(),
)
def test_any_ranges_are_the_slices_of_the_files(
    ranges: list[tuple[str, int, int]],
    block_bytes: int,
    cached: bool,
    in_memory: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    cache = CacheConfig(tmp_path_factory.getbasetemp() / "ranges", 2**24) if cached else None
    config = RemoteConfig(block_bytes=block_bytes, threads=2, memory_bytes=3 * block_bytes)
    storage = RemoteStorage(in_memory, cache, config, QUICK)
    requests = [
        (name, min(begin, len(FILES[name])), min(begin + length, len(FILES[name])))
        for name, begin, length in ranges
    ]
    expected = [FILES[name][begin:end] for name, begin, end in requests]
    assert storage.read_many(requests) == expected
    assert [storage.read(*request) for request in requests] == expected


def test_names_sizes_and_whole_files_of_a_remote_store(in_memory: str, tmp_path: Path) -> None:
    for cache in (None, CacheConfig(tmp_path)):
        storage = open_storage(in_memory, cache)
        assert isinstance(storage, RemoteStorage)
        assert storage.names() == ["a.tar", "b.tar"]
        assert storage.names("*") == sorted(FILES)
        assert storage.sizes(["b.tar", "a.tar", "b.tar"]) == [
            len(FILES[name]) for name in ("b.tar", "a.tar", "b.tar")
        ]
        for name, data in FILES.items():
            assert storage.whole(name) == data


@pytest.mark.parametrize("begin, end", [(-1, 4), (5, 4)])
def test_what_is_no_range_is_refused(begin: int, end: int, in_memory: str, folder: Path) -> None:
    for storage in (open_storage(in_memory), open_storage(str(folder))):
        with pytest.raises(ValueError, match="no range"):
            storage.read("a.tar", begin, end)


@pytest.mark.parametrize("beyond", [1, BLOCK, 10**9])
def test_a_range_beyond_the_end_is_an_error_not_a_short_result(beyond: int) -> None:
    with FaultServer(FILES) as server:
        storage, size = remote(server), len(FILES["a.tar"])
        with pytest.raises(StorageError, match=f"a.tar: .*the file has {size:,} bytes"):
            storage.read("a.tar", size + beyond - 1, size + beyond)
        assert storage.read("a.tar", 0, 20) == FILES["a.tar"][:20]
        with pytest.raises(StorageError, match=f"the file has {size:,} bytes"):
            storage.read("a.tar", size - 20, size + 1)


# -- what is kept


def test_a_second_pass_reads_nothing_remotely(data_set: Path, tmp_path: Path) -> None:
    wanted = members(data_set)
    with FaultServer(files_of(data_set)) as server:
        storage = remote(server, tmp_path)
        assert read_all(storage, wanted, 0) == len(wanted)
        bodies = [r.range for r in server.requests if r.method == "GET"]
        first = len(server.requests)
        assert len(bodies) == len(blocks_of(wanted))
        assert read_all(storage, wanted, 1) == len(wanted)
        assert read_all(pickle.loads(pickle.dumps(storage)), wanted, 2) == len(wanted)
        # another job on this machine, which knows nothing but the folder of the cache
        in_processes(
            2, lambda n: sys.exit(read_all(remote(server, tmp_path), wanted, n) != len(wanted))
        )
        assert len(server.requests) == first


def test_processes_fetch_each_block_once_between_them(data_set: Path, tmp_path: Path) -> None:
    wanted = members(data_set)
    with FaultServer(files_of(data_set)) as server:

        def work(seed: int) -> None:
            assert read_all(remote(server, tmp_path), wanted, seed) == len(wanted)

        in_processes(3, work)
        bodies = [(r.name, r.range) for r in server.requests if r.method == "GET"]
        assert len(bodies) == len(set(bodies))
        assert len(bodies) == len(blocks_of(wanted))


def test_a_killed_reader_leaves_a_cache_for_the_next(data_set: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of fetching and evicting; another then reads everything right."""
    wanted, limit = members(data_set), 20 * BLOCK
    with FaultServer(files_of(data_set)) as server:

        def work(seed: int) -> None:
            cache = CacheConfig(tmp_path, limit, 0.0)
            for epoch in range(10**6):
                read_all(RemoteStorage(server.url, cache, SMALL, QUICK), wanted, seed + epoch)

        for trial in range(5):
            pair = [FORK.Process(target=work, args=(10 * trial + n,)) for n in range(2)]
            for process in pair:
                process.start()
            time.sleep(0.15 + 0.05 * trial)
            for process in pair:
                assert process.is_alive()
                os.kill(process.pid, signal.SIGKILL)
                process.join(30)
        storage = RemoteStorage(server.url, CacheConfig(tmp_path, limit), SMALL, QUICK)
        assert read_all(storage, wanted, 0) == len(wanted)
        assert 0 < storage.cache.used() <= limit


def test_a_damaged_cache_is_mended_from_the_store(tmp_path: Path) -> None:
    with FaultServer(FILES) as server:
        assert remote(server, tmp_path).whole("a.tar") == FILES["a.tar"]
        for path in (tmp_path / "blocks").rglob("*"):
            if path.is_file():
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
        assert remote(server, tmp_path).whole("a.tar") == FILES["a.tar"]


def test_what_is_forgotten_is_fetched_anew_and_only_that(tmp_path: Path) -> None:
    for cache in (None, tmp_path):
        # without an ETag a store that gave wrong bytes, and was mended, looks as it did before
        with FaultServer(FILES, Faults(etag=False)) as server:
            storage = remote(server, cache)
            storage.whole("a.tar")
            before = len(server.requests)
            server.files["a.tar"] = content(9, len(FILES["a.tar"]))
            storage.forget("a.tar", BLOCK + 5, BLOCK + 9)
            assert storage.read("a.tar", BLOCK, BLOCK + 9) == content(9, 2 * BLOCK)[BLOCK:][:9]
            assert storage.read("a.tar", 5, 9) == FILES["a.tar"][5:9]
            assert [r.method for r in server.requests[before:]] == ["HEAD", "GET"]


def test_a_replaced_small_file_is_seen_once_it_is_asked_for_again(tmp_path: Path) -> None:
    for cache in (None, tmp_path):
        with FaultServer({"manifest.json": b"old"}) as server:
            config = replace(SMALL, revalidate_s=1e-6)
            assert remote(server, cache, config).whole("manifest.json") == b"old"
            server.files["manifest.json"] = b"new!"
            assert remote(server, cache, config).whole("manifest.json") == b"new!"


def test_without_a_cache_on_disk_memory_is_bounded_and_used() -> None:
    with FaultServer(FILES) as server:
        storage = remote(server, config=replace(SMALL, memory_bytes=2 * BLOCK))
        for _ in range(3):
            storage.read("a.tar", 0, 2 * BLOCK)
        assert sum(r.method == "GET" for r in server.requests) == 2
        storage.whole("a.tar")
        storage.read("a.tar", 0, 9)
        assert sum(r.method == "GET" for r in server.requests) == 7


def test_an_unusable_cache_folder_does_not_stop_reading(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with FaultServer(FILES) as server:
        assert remote(server, tmp_path / "file" / "cache").whole("a.tar") == FILES["a.tar"]
    assert len([r for r in caplog.records if "cannot be used" in r.message]) == 1


def test_a_cache_smaller_than_two_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="room for many"):
        RemoteStorage("memory://x", CacheConfig(tmp_path, 100), SMALL)


# -- in the background, and in other processes


@pytest.mark.parametrize("cached", [True, False])
def test_what_was_prefetched_is_not_fetched_again(cached: bool, tmp_path: Path) -> None:
    with FaultServer(FILES) as server:
        storage = remote(server, tmp_path if cached else None)
        storage.prefetch([("a.tar", 0, 2 * BLOCK), ("none.tar", 0, 5), ("../x", 0, 5)])
        wait_until(lambda: len(server.requests) == 4)  # two sizes, one of no file, and two blocks
        before = len(server.requests)
        assert storage.read("a.tar", 0, 2 * BLOCK) == FILES["a.tar"][: 2 * BLOCK]
        assert len(server.requests) == before


def test_prefetching_is_bounded_and_does_not_hold_up_a_read() -> None:
    files = {"big.tar": content(1, 400 * BLOCK), **FILES}
    config = replace(SMALL, prefetch_blocks=3, memory_bytes=100 * BLOCK)
    with FaultServer(files) as server:
        storage = remote(server, config=config)
        storage.size("big.tar")
        server.faults = Faults(stalls=1.0, only_first=4)
        storage.prefetch([("big.tar", 0, 400 * BLOCK)])
        assert storage.read("b.tar", 0, 9) == FILES["b.tar"][:9]
        assert storage.read("big.tar", 0, 3 * BLOCK) == files["big.tar"][: 3 * BLOCK]
        assert {r.range for r in server.requests if r.name == "big.tar" and r.range} == {
            f"bytes={n * BLOCK}-{(n + 1) * BLOCK - 1}" for n in range(3)
        }


def test_what_somebody_waits_for_overtakes_what_may_be_wanted_later() -> None:
    pool, begin, order = Pool(1), threading.Event(), []
    pool.submit(lambda: begin.wait(60), urgent=True)
    tasks = [pool.submit(functools.partial(order.append, n), urgent=False) for n in range(4)]
    pool.submit(lambda: order.append("urgent"), urgent=True)
    pool.hurry(tasks[2])
    begin.set()
    for task in tasks:
        task.future.result(60)
    assert order == ["urgent", 2, 0, 1, 3]
    pool.close()


def test_a_read_overtakes_what_was_prefetched_before_it() -> None:
    config = replace(SMALL, threads=1, prefetch_blocks=6, memory_bytes=100 * BLOCK)
    with FaultServer(FILES) as server:
        storage = remote(server, config=config)
        storage.size("a.tar")
        server.faults = Faults(stalls=1.0, only_first=2)  # the first block keeps the thread busy
        storage.prefetch([("a.tar", 0, 5 * BLOCK)])
        wait_until(lambda: len(server.requests) == 2)
        storage.read("a.tar", 4 * BLOCK, 4 * BLOCK + 9)
        storage.read("a.tar", 0, 5 * BLOCK)
        asked = dict.fromkeys(int(r.range[6:].split("-")[0]) // BLOCK for r in server.requests[1:])
        assert list(asked) == [0, 4, 1, 2, 3]


def test_connections_are_used_again() -> None:
    files = {"a.tar": content(1, 10 * 2**20)}
    with FaultServer(files) as server:
        config = RemoteConfig(block_bytes=2**20, threads=1, memory_bytes=0)
        storage = remote(server, config=config)
        for number in range(20):
            storage.read("a.tar", number * 2**19, number * 2**19 + 50)
        assert len(server.requests) == 21
        assert server.connections == 1


def test_a_storage_at_work_can_be_forked(tmp_path: Path) -> None:
    files = {f"{n}.tar": content(n, 3 * BLOCK) for n in range(12)}
    with FaultServer(files) as server:
        for cache in (None, tmp_path):
            storage = remote(server, cache)
            storage.prefetch([(name, 0, 3 * BLOCK) for name in files])
            storage.read("0.tar", 0, 5)

            def child(seed: int, storage: RemoteStorage = storage) -> None:
                names = sorted(files)
                random.Random(seed).shuffle(names)
                storage.prefetch([(name, 0, 3 * BLOCK) for name in names])
                assert all(storage.whole(name) == files[name] for name in names)

            in_processes(3, child)
            assert storage.whole("7.tar") == files["7.tar"]


def test_a_process_ends_at_once_with_fetches_under_way() -> None:
    with FaultServer(FILES, Faults(stalls=1.0)) as server:
        patient = replace(QUICK, stall_timeout_s=100, attempt_timeout_s=100, deadline_s=300)

        under_way = FORK.Event()

        def child() -> None:
            remote(server, retry=patient).prefetch([("a.tar", 0, 5 * BLOCK)])
            under_way.wait(60)

        process = FORK.Process(target=child)
        process.start()
        wait_until(lambda: len(server.requests) > 0)
        under_way.set()
        process.join(20)
        assert process.exitcode == 0


def test_a_file_system_without_time_limits_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    hang = threading.Event()
    memory = fsspec.get_filesystem_class("memory")
    monkeypatch.setattr(memory, "info", lambda *_, **__: hang.wait(60) and {})
    monkeypatch.setattr("groundwork.data.storage_remote.GRACE_S", 0.1)
    storage = RemoteStorage("memory://x", None, SMALL, replace(QUICK, deadline_s=0.5))
    try:
        with pytest.raises(StorageError, match="obeys no time limit"):
            storage.read("a.tar", 0, 1)
    finally:
        hang.set()
