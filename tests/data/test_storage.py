import importlib.util
import json
import multiprocessing
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
from urllib.parse import unquote

import fsspec
import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.data.cache import CacheConfig
from groundwork.data.samples import Sample
from groundwork.data.shard_index import MISSING, index_path, read_index
from groundwork.data.shards import write_shards
from groundwork.data.storage import LocalStorage, Storage, open_storage
from groundwork.data.storage_errors import (
    MissingFileError,
    PermanentError,
    StorageError,
    TransientError,
    redact,
)
from groundwork.data.storage_names import join_url, split_url
from groundwork.data.storage_remote import RemoteConfig, RemoteStorage
from groundwork.data.storage_retry import RetryConfig, with_retries

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


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


fault_server = _load("fault_server")
Faults, FaultServer = fault_server.Faults, fault_server.FaultServer


def content(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


FILES = {"a.tar": content(1, 5 * BLOCK + 77), "b.tar": content(2, BLOCK), "empty": b""}


def remote(
    server: Any, cache: Path | None = None, config: RemoteConfig = SMALL, retry: RetryConfig = QUICK
) -> RemoteStorage:
    config_of_cache = None if cache is None else CacheConfig(cache, 2**30)
    return RemoteStorage(server.url, config_of_cache, config, retry)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 samples in 6 shards, 5 to 40 kB each."""
    out = tmp_path_factory.mktemp("set") / "set"
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


# -- faults


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "memory"])
def test_two_processes_of_two_threads_lose_no_sample_to_faults(
    cached: bool, data_set: Path, tmp_path: Path
) -> None:
    """5 % each of: 503, stalls, resets, truncated bodies, lies about the length, trickles."""
    wanted = members(data_set)
    with FaultServer(files_of(data_set), Faults(**ALL_FAULTS, seed=3)) as server:
        config = replace(SMALL, memory_bytes=80 * BLOCK)
        storage = remote(server, tmp_path / "cache" if cached else None, config)
        manifest = json.loads(storage.whole("manifest.json"))
        assert len(manifest["splits"]["train"]) == 6

        def work(process: int) -> None:
            def read(thread: int) -> None:
                assert read_all(storage, wanted, 10 * process + thread) == len(wanted) == 180

            in_threads(2, read)

        start = time.monotonic()
        in_processes(2, work)
        assert time.monotonic() - start < 60
        assert all(server.count()[kind] > 0 for kind in ALL_FAULTS), server.count()


def test_a_server_without_ranges_is_read_nevertheless_and_named_once(
    data_set: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = members(data_set)[:60]
    with FaultServer(files_of(data_set), Faults(ranges=False, resets=0.05)) as server:
        assert read_all(remote(server), wanted, 0) == 60
    assert caplog.text.count("ignores ranges") == 1


@pytest.mark.parametrize("head, etag", [(False, True), (True, False), (False, False)])
def test_servers_without_head_or_etag_will_do(head: bool, etag: bool, tmp_path: Path) -> None:
    with FaultServer(FILES, Faults(head=head, etag=etag)) as server:
        for cache in (None, tmp_path):
            storage = remote(server, cache)
            assert {name: storage.whole(name) for name in FILES} == FILES


@pytest.mark.parametrize("kind", ["stalls", "trickles", "resets", "truncated", "wrong_length"])
def test_a_fault_that_does_not_pass_ends_before_the_deadline(kind: str) -> None:
    patience = replace(QUICK, attempts=50, deadline_s=1.0)
    with FaultServer(FILES, Faults(**{kind: 1.0})) as server:
        start = time.monotonic()
        with pytest.raises(StorageError, match=r"b\.tar: .*failed \d+ times? in .* RetryConfig"):
            remote(server, retry=patience).read("b.tar", 0, 9_000)
        assert time.monotonic() - start < 3


def test_the_message_names_file_range_attempts_and_cause() -> None:
    with FaultServer(FILES) as server:
        storage = remote(server, retry=replace(QUICK, attempts=3))
        storage.size("a.tar")
        server.faults = Faults(unavailable=1.0)
        with pytest.raises(StorageError) as caught:
            storage.read("a.tar", BLOCK + 5, BLOCK + 9)
    message = str(caught.value)
    assert f"{server.url}/a.tar: bytes {BLOCK:,} to {2 * BLOCK:,}: failed 3 times" in message
    assert "the server answers 503 Service Unavailable; check the network" in message
    assert len(server.requests) == 4


def test_nobody_listening_is_an_error_within_the_deadline() -> None:
    with FaultServer(FILES) as server:
        url = server.url
    start = time.monotonic()
    with pytest.raises(StorageError, match="refused"):
        RemoteStorage(url, None, SMALL, replace(QUICK, attempts=4)).read("a.tar", 0, 1)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("status, missing", [(404, True), (410, True), (403, False), (401, False)])
def test_what_no_repetition_mends_is_not_repeated(status: int, missing: bool) -> None:
    with FaultServer(FILES, Faults(status=status)) as server:
        with pytest.raises(StorageError, match=f"a.tar: .*{status}.*check the") as caught:
            remote(server).read("a.tar", 0, 1)
        assert isinstance(caught.value, MissingFileError) is missing
        assert len(server.requests) <= 2  # HEAD, and GET where HEAD may be forbidden alone


@pytest.mark.parametrize("url", ["memory://no-such-folder", "zip://a::memory://no-such-archive"])
def test_a_missing_file_of_fsspec_is_missing(url: str) -> None:
    with pytest.raises(MissingFileError):
        RemoteStorage(url, None, SMALL, QUICK).read("x.tar", 0, 1)


def test_an_unknown_protocol_is_named_at_once() -> None:
    with pytest.raises(StorageError, match="nonsense"):
        open_storage("nonsense://x").read("a.tar", 0, 1)


@pytest.mark.parametrize("size", [3 * BLOCK, 9 * BLOCK])
def test_a_file_replaced_while_it_is_read_is_noticed_by_its_size(size: int) -> None:
    with FaultServer(FILES) as server:
        storage = remote(server)
        storage.read("a.tar", 0, 9)
        server.files["a.tar"] = content(3, size)
        with pytest.raises(StorageError, match="replaced or cut off"):
            storage.read("a.tar", 4 * BLOCK, 4 * BLOCK + 9)


@pytest.mark.parametrize("size", [3 * BLOCK, 9 * BLOCK])
@pytest.mark.parametrize("cached", [True, False])
def test_a_file_replaced_since_an_earlier_job_is_asked_for_anew(
    size: int, cached: bool, tmp_path: Path
) -> None:
    with FaultServer(FILES) as server:
        config = replace(SMALL, revalidate_s=1e-6)
        storage = remote(server, tmp_path if cached else None, config)
        storage.read("a.tar", 0, 9)
        server.files["a.tar"] = content(3, size)
        if cached:
            storage = remote(server, tmp_path, config)
        assert storage.read("a.tar", size - 9, size) == content(3, size)[-9:]
        assert storage.read("a.tar", 0, 9) == content(3, size)[:9]


# -- retries, with a clock that nobody waits for


class FakeTime:
    def __init__(self, per_attempt: float = 0.0) -> None:
        self.now, self.sleeps, self.per_attempt = 0.0, [], per_attempt

    def run(self, errors: list[Exception], config: RetryConfig, seed: int = 0) -> int:
        left = list(errors)

        def attempt(timeout_s: float) -> int:
            assert 0 < timeout_s <= config.attempt_timeout_s
            self.now += self.per_attempt
            if left:
                raise left.pop(0)
            return len(self.sleeps)

        return with_retries(
            attempt,
            "thing",
            config,
            generator=random.Random(seed),
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


@settings(max_examples=50, deadline=None)
@given(failures=st.integers(0, 9), seed=st.integers(0, 10**6))
def test_pauses_are_random_below_a_limit_that_doubles(failures: int, seed: int) -> None:
    config = RetryConfig(attempts=10, first_delay_s=1, max_delay_s=20, deadline_s=1e6)
    fake = FakeTime()
    assert fake.run([TransientError("x")] * failures, config, seed) == failures
    limits = [min(20, 2.0**k) for k in range(failures)]
    assert all(0 <= pause <= limit for pause, limit in zip(fake.sleeps, limits, strict=True))


def test_full_jitter_spreads_over_the_whole_interval() -> None:
    config = RetryConfig(first_delay_s=1, deadline_s=1e6)
    firsts = []
    for seed in range(200):
        fake = FakeTime()
        fake.run([TransientError("x")], config, seed)
        firsts.append(fake.sleeps[0])
    assert min(firsts) < 0.05
    assert max(firsts) > 0.95
    assert 0.4 < sum(firsts) / 200 < 0.6


def test_the_deadline_ends_it_whatever_the_attempts() -> None:
    config = RetryConfig(attempts=10**6, deadline_s=30, attempt_timeout_s=4)
    fake = FakeTime(per_attempt=4)
    with pytest.raises(StorageError, match="thing: failed"):
        fake.run([TransientError("x")] * 10**4, config)
    assert 25 < fake.now <= 34


def test_retry_after_is_obeyed_or_given_up_at_once() -> None:
    config = RetryConfig(deadline_s=100)
    fake = FakeTime()
    fake.run([TransientError("busy", 40.0)], config)
    assert fake.sleeps == [40.0]
    fake = FakeTime()
    with pytest.raises(StorageError, match="asks for 400 s"):
        fake.run([TransientError("busy", 400.0)], config)
    assert fake.sleeps == []


def test_permanent_errors_are_not_retried() -> None:
    fake = FakeTime()
    with pytest.raises(MissingFileError, match="thing: gone; look elsewhere"):
        fake.run([PermanentError("gone", "look elsewhere", MissingFileError)], RetryConfig())
    assert fake.sleeps == []


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_of_a_server_is_understood(form: str) -> None:
    value = (
        "1"
        if form == "seconds"
        else time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    )
    faults = Faults(unavailable=1.0, retry_after=value, only_first=1)
    with FaultServer(FILES, faults) as server:
        start = time.monotonic()
        assert remote(server).size("a.tar") == len(FILES["a.tar"])
        assert 0.9 < time.monotonic() - start < 10


@pytest.mark.parametrize("field", [{"attempts": 0}, {"deadline_s": 0}, {"stall_timeout_s": -1}])
def test_impossible_patience_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        RetryConfig(**field)


# -- secrets


SECRETS = ("s3cr3t", "SIGNATURE", "TOKEN")


@pytest.mark.parametrize(
    "faults",
    [Faults(status=403), Faults(status=404), Faults(resets=1.0), Faults(ranges=False), Faults()],
    ids=["403", "404", "resets", "no-ranges", "closed"],
)
def test_no_message_holds_a_credential(faults: Any, caplog: pytest.LogCaptureFixture) -> None:
    with FaultServer(FILES, faults) as server:
        url = server.url.replace("://", "://user:s3cr3t@") + "?X-Sig=SIGNATURE&t=TOKEN"
        if faults == Faults():
            server.__exit__(None, None, None)
        config = replace(SMALL, options={"headers": {"X-Token": "TOKEN"}})
        storage = RemoteStorage(url, None, config, replace(QUICK, attempts=2))
        messages = [storage.where("a.tar")]
        for action in (
            lambda: storage.read("a.tar", BLOCK, BLOCK + 5),
            lambda: storage.names(),
            lambda: storage.whole("none.tar"),
        ):
            try:
                action()
            except StorageError as error:
                messages += [str(error), repr(error.__cause__), repr(error.__suppress_context__)]
    assert len(messages) > 3
    assert not any(secret in text for text in [*messages, caplog.text] for secret in SECRETS)


def test_a_signature_goes_with_every_request_and_not_into_the_cache_key(tmp_path: Path) -> None:
    with FaultServer(FILES) as server:
        for signature in ("sig=one", "sig=two"):
            config = CacheConfig(tmp_path)
            storage = RemoteStorage(f"{server.url}?{signature}", config, SMALL, QUICK)
            assert storage.names() == ["a.tar", "b.tar"]
            assert storage.read("a.tar", 5, 9) == FILES["a.tar"][5:9]
        queries = [(r.query, r.name) for r in server.requests]
    assert queries == [("sig=one", ""), ("sig=one", "a.tar"), ("sig=one", "a.tar"), ("sig=two", "")]


def test_urls_are_taken_apart_and_put_together() -> None:
    assert join_url("https://h/a/?k=v", "b c#.tar") == "https://h/a/b%20c%23.tar?k=v"
    assert join_url("s3://bucket/a/", "b?.tar") == "s3://bucket/a/b?.tar"
    assert split_url("s3://b/x/y-{00..09}.tar") == ("s3://b/x", "y-{00..09}.tar")
    assert split_url("https://h/x/*.tar?k=/v") == ("https://h/x?k=/v", "*.tar")
    assert (
        redact("get https://u:p@h/a?x=1 and http://h/b?y='2'")
        == "get https://h/a and http://h/b'2'"
    )


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
        with FaultServer(FILES) as server:
            storage = remote(server, cache)
            storage.whole("a.tar")
            before = len(server.requests)
            # a store that once gave wrong bytes of the right length, and has been mended since
            server.files["a.tar"] = content(9, len(FILES["a.tar"]))
            server.faults = Faults(etag=False)
            storage.forget("a.tar", BLOCK + 5, BLOCK + 9)
            assert storage.read("a.tar", BLOCK, BLOCK + 9) == content(9, 2 * BLOCK)[BLOCK:][:9]
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


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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


def test_connections_are_used_again() -> None:
    with FaultServer(FILES) as server:
        storage = remote(server, config=replace(SMALL, threads=2, memory_bytes=0))
        for number in range(20):
            storage.read("a.tar", number * 100, number * 100 + 50)
        assert len(server.requests) == 21
        assert server.connections <= 2


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


# -- the Hugging Face Hub, as this machine's server plays it


def test_a_data_set_on_the_hub_is_read_through_its_listing(data_set: Path, tmp_path: Path) -> None:
    served: dict[str, bytes] = {}
    tree = [{"type": "directory", "path": "v1/sub", "oid": "d", "size": 0}]
    for number, (name, data) in enumerate(files_of(data_set).items()):
        served[f"datasets/own/na.me/resolve/r%2F1/v1/{name}"] = data
        entry = {"type": "file", "path": f"v1/{name}", "size": len(data), "oid": f"b{number}"}
        tree.append(entry | ({"lfs": {"oid": f"sha{number}"}} if number % 2 else {}))
    served["api/datasets/own/na.me/tree/r%2F1/v1"] = json.dumps(tree).encode()
    served = {unquote(name): data for name, data in served.items()}
    wanted = members(data_set)
    with FaultServer(served, Faults(**ALL_FAULTS | {"wrong_length": 0.0}, seed=1)) as server:
        config = replace(SMALL, options={"endpoint": server.url, "token": "TOKEN"})
        url = "hf://datasets/own/na.me@r%2F1/v1"
        storage = RemoteStorage(url, CacheConfig(tmp_path), config, QUICK)
        assert storage.names() == sorted(path.name for path in data_set.glob("*.tar"))
        assert storage.whole("manifest.json") == (data_set / "manifest.json").read_bytes()
        assert read_all(storage, wanted, 0) == len(wanted)
        with pytest.raises(MissingFileError, match="lists no such file"):
            storage.size("none.tar")
        first = len(server.requests)
        again = RemoteStorage(url, CacheConfig(tmp_path), config, QUICK)
        assert read_all(again, wanted, 1) == len(wanted)
        assert len(server.requests) == first
        assert {r.authorization for r in server.requests} == {"Bearer TOKEN"}


@pytest.mark.parametrize("url", ["hf://datasets/nobody", "hf://datasets/"])
def test_what_is_no_url_of_the_hub_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected hf://datasets/OWNER/NAME"):
        open_storage(url).size("a.tar")


# -- S3, served by moto on this machine


@pytest.fixture(scope="module")
def s3(data_set: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A server with the data set in bucket `corpus`, and the options that reach it."""
    pytest.importorskip("s3fs", reason="the test extra installs s3fs")
    server_of_moto = pytest.importorskip("moto.server", reason="the test extra installs moto")
    server = server_of_moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "endpoint_url": f"http://{host}:{port}",
        "key": "key-id",
        "secret": "s3cr3t",
        "client_kwargs": {"region_name": "eu-west-1"},
    }
    files = fsspec.filesystem("s3", **options)
    files.mkdir("corpus")
    for name, data in files_of(data_set).items():
        files.pipe(f"corpus/v1/{name}", data)
    files.pipe("corpus/v1/sub/deep.tar", b"deep")
    try:
        yield server, options
    finally:
        server.stop()


def on_s3(
    options: dict[str, Any], cache: Path | None = None, url: str = "s3://corpus/v1"
) -> Storage:
    config_of_cache = None if cache is None else CacheConfig(cache, 2**30)
    return open_storage(url, config_of_cache, remote=replace(SMALL, options=options), retry=QUICK)


def test_a_data_set_on_s3_is_read_whole_by_processes(
    s3: tuple[Any, dict[str, Any]], data_set: Path, tmp_path: Path
) -> None:
    wanted, options = members(data_set), s3[1]
    storage = on_s3(options, tmp_path)
    assert storage.names() == sorted(path.name for path in data_set.glob("*.tar"))
    for name, data in files_of(data_set).items():
        assert storage.size(name) == len(data)
    assert storage.whole("manifest.json") == (data_set / "manifest.json").read_bytes()
    assert storage.read("sub/deep.tar", 1, 3) == b"ee"

    def work(seed: int) -> None:
        assert read_all(storage, wanted, seed) == len(wanted)

    in_processes(2, work)
    in_threads(2, work)


def test_what_is_wrong_on_s3_is_said_at_once_and_without_secrets(
    s3: tuple[Any, dict[str, Any]],
) -> None:
    start = time.monotonic()
    messages = []
    for storage, name in (
        (on_s3(s3[1]), "none.tar"),
        (on_s3(s3[1]), "sub"),
        (on_s3(s3[1], url="s3://no-such-bucket/v1"), "a.tar"),
    ):
        with pytest.raises(MissingFileError, match="check the URL") as caught:
            storage.read(name, 0, 5)
        messages.append(str(caught.value))
    with pytest.raises(StorageError, match=r"the file has \d+ bytes"):
        on_s3(s3[1]).read("manifest.json", 10**6, 10**6 + 5)
    assert "s3cr3t" not in " ".join(messages)
    assert time.monotonic() - start < 10


def test_a_cached_data_set_is_read_without_its_s3(
    s3: tuple[Any, dict[str, Any]], data_set: Path, tmp_path: Path
) -> None:
    wanted = members(data_set)
    assert read_all(on_s3(s3[1], tmp_path), wanted, 0) == len(wanted)
    nowhere = {**s3[1], "endpoint_url": "http://127.0.0.1:9"}
    assert read_all(on_s3(nowhere, tmp_path), wanted, 1) == len(wanted)
    start = time.monotonic()
    with pytest.raises(StorageError, match="failed 12 times"):
        on_s3(nowhere).read("train-000000.tar", 0, 9)
    assert time.monotonic() - start < 20
