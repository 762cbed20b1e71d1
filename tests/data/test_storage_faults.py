import importlib.util
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.data.cache import CacheConfig
from groundwork.data.storage import open_storage
from groundwork.data.storage_errors import (
    MissingFileError,
    PermanentError,
    StorageError,
    TransientError,
    redact,
)
from groundwork.data.storage_names import join_url, split_url
from groundwork.data.storage_remote import RemoteStorage
from groundwork.data.storage_retry import RetryConfig, with_retries


def _load(name: str) -> ModuleType:
    """A file beside this one, which is not importable by its name."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


reading, fault_server = _load("storage_reading"), _load("fault_server")
ALL_FAULTS = reading.ALL_FAULTS
BLOCK = reading.BLOCK
FILES = reading.FILES
QUICK = reading.QUICK
SMALL = reading.SMALL
content = reading.content
files_of = reading.files_of
in_processes = reading.in_processes
in_threads = reading.in_threads
members = reading.members
read_all = reading.read_all
remote = reading.remote
Faults = fault_server.Faults
FaultServer = fault_server.FaultServer


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reading.write_data_set(tmp_path_factory.mktemp("set") / "set")


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


@pytest.mark.parametrize("ranges", [True, False])
def test_a_body_that_ends_early_is_noticed_though_no_length_was_announced(ranges: bool) -> None:
    faults = Faults(length=False, truncated=0.4, ranges=ranges, seed=2)
    with FaultServer(FILES, faults) as server:
        storage = remote(server)
        assert {name: storage.whole(name) for name in FILES} == FILES
        assert server.count()["truncated"] > 1


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
