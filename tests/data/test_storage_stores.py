import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import fsspec
import pytest

from groundwork.data.cache import CacheConfig
from groundwork.data.storage import Storage, open_storage
from groundwork.data.storage_errors import (
    MissingFileError,
    StorageError,
)
from groundwork.data.storage_remote import RemoteStorage


def _load(name: str) -> ModuleType:
    """A file beside this one, which is not importable by its name."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


reading, fault_server = _load("storage_reading"), _load("fault_server")
QUICK = reading.QUICK
SMALL = reading.SMALL
files_of = reading.files_of
in_processes = reading.in_processes
in_threads = reading.in_threads
members = reading.members
read_all = reading.read_all
Faults = fault_server.Faults
FaultServer = fault_server.FaultServer


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reading.write_data_set(tmp_path_factory.mktemp("set") / "set")


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
    with FaultServer(served, Faults(unavailable=0.1, resets=0.05, seed=1)) as server:
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
        assert again.names() == storage.names()
        assert read_all(again, wanted, 1) == len(wanted)
        assert not any("resolve" in request.name for request in server.requests[first:])
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
    # another endpoint would be another data set, so this one is put out of reach
    nowhere = {
        **s3[1],
        "config_kwargs": {
            "proxies": {"http": "http://127.0.0.1:9"},
            "connect_timeout": 1,
            "retries": {"max_attempts": 0},
        },
    }
    assert read_all(on_s3(nowhere, tmp_path), wanted, 1) == len(wanted)
    start = time.monotonic()
    with pytest.raises(StorageError, match="failed 12 times"):
        on_s3(nowhere).read("train-000000.tar", 0, 9)
    assert time.monotonic() - start < 20
