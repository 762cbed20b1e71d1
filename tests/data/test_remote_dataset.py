"""Data sets that lie on a server: opened, streamed, cached, damaged."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groundwork.data.batch_plan import BatchPlan
from groundwork.data.cache import CacheConfig
from groundwork.data.dataset import Dataset, open_dataset
from groundwork.data.mixture import Mixture
from groundwork.data.samples import Concept, Sample
from groundwork.data.shard_index import ShardError
from groundwork.data.shards import write_shards
from groundwork.data.storage import open_storage
from groundwork.data.storage_errors import StorageError
from groundwork.data.storage_retry import RetryConfig
from groundwork.data.stream import Source, Stream


def _load(name: str) -> Any:
    """A module beside this file: tests are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


fault_server = _load("fault_server")
SAMPLES = 60


def sample(number: int) -> Sample:
    image = np.random.default_rng(number).bytes(300 + number)
    return Sample(f"k{number:03d}", image, "png", f"text {number}", {"label": number})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("remote") / "o"
    pairs = (("train", sample(i)) for i in range(SAMPLES))
    concepts = [Concept(0, "a")]
    write_shards(
        *(pairs, folder), name="n", source={}, licence="l", concepts=concepts, max_samples=7
    )
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_list(examples: list[Any]) -> list[Any]:
    return examples


def decode(sample: Sample, rng: np.random.Generator) -> tuple[str, str, bytes]:
    return sample.key, sample.text, sample.image


def test_a_data_set_opens_from_its_url(files: dict[str, bytes], tmp_path: Path) -> None:
    with fault_server.FaultServer(files) as server:
        dataset = open_dataset(server.url, cache=CacheConfig(tmp_path))
        assert [dataset.read(i) for i in range(SAMPLES)] == [sample(i) for i in range(SAMPLES)]
        assert dataset.concepts == [Concept(0, "a")]
        assert dataset.where(8)[0] == f"{server.url.rstrip('/')}/train-000001.tar"
        with pytest.raises(ShardError, match="no split 'val'; it has train"):
            open_dataset(server.url, "val", cache=CacheConfig(tmp_path))


@pytest.mark.parametrize("pattern", ["", "train-{000000..000008}.tar", "train-00000[0-8].tar"])
@pytest.mark.parametrize("side_cars", [True, False])
def test_plain_tars_open_from_their_url(
    pattern: str, side_cars: bool, files: dict[str, bytes], tmp_path: Path
) -> None:
    kept = (".tar", ".idx") if side_cars else (".tar",)
    plain = {name: data for name, data in files.items() if name.endswith(kept)}
    with fault_server.FaultServer(plain) as server:
        url = f"{server.url.rstrip('/')}/{pattern}" if pattern else server.url
        dataset = open_dataset(url, cache=CacheConfig(tmp_path))
        assert [dataset.read(i).text for i in (0, 30, 59)] == ["text 0", "text 30", "text 59"]


def test_faults_of_the_server_lose_nothing_and_a_second_epoch_asks_for_nothing(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    faults = fault_server.Faults(unavailable=0.05, resets=0.05, truncated=0.05, seed=1)
    with fault_server.FaultServer(files, faults) as server:
        dataset = open_dataset(server.url, cache=CacheConfig(tmp_path))
        stream = Stream([Source(dataset, decode, block=20)], seed=0)
        plan = BatchPlan(SAMPLES, 10, 1, 0)

        def read(step: int) -> list[Any]:
            steps = {"first_step": step, "last_step": step + 1}
            batches = list(stream.batches(plan, as_list, workers=2, **steps))
            assert not any(batch.faults for batch in batches)
            return sorted(example for batch in batches for example in batch.data)

        first = read(0)
        asked = len(server.requests)
        assert read(1) == first
        tars = [request for request in server.requests[asked:] if request.name.endswith(".tar")]
        assert [request for request in tars if request.method == "GET"] == []
    assert first == [decode(sample(i), np.random.default_rng()) for i in range(SAMPLES)]


def test_a_damaged_copy_in_the_cache_is_fetched_anew(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    with fault_server.FaultServer(files) as server:
        open_dataset(server.url, cache=CacheConfig(tmp_path)).read(5)
        for block in (path for path in tmp_path.rglob("*") if path.is_file()):
            data = block.read_bytes()
            block.write_bytes(data.replace(b"text 5", b"text X"))
        assert open_dataset(server.url, cache=CacheConfig(tmp_path)).read(5) == sample(5)


def test_a_file_that_is_damaged_on_the_server_is_a_bad_sample(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    tar = files["train-000000.tar"].replace(b"text 5", b"text X")
    with fault_server.FaultServer({**files, "train-000000.tar": tar}) as server:
        dataset = open_dataset(server.url, cache=CacheConfig(tmp_path))
        stream = Stream([Source(dataset, decode)], seed=0)
        _, faults = stream.__getitems__(list(range(SAMPLES)))
    assert [(fault.key, fault.reason[:35]) for fault in faults] == [
        ("k005", "member 'txt' fails its checksum: th")
    ]


def test_a_manifest_that_is_none_names_its_url(files: dict[str, bytes]) -> None:
    record = json.loads(files["manifest.json"])
    for spoil in (b"{", json.dumps({**record, "version": 99}).encode()):
        with (
            fault_server.FaultServer({**files, "manifest.json": spoil}) as server,
            pytest.raises(ShardError, match=r"http://127.*manifest\.json: not a groundwork"),
        ):
            open_dataset(server.url)


def test_local_and_remote_sources_mix(files: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with fault_server.FaultServer(files) as server:
        sources = [
            Source(open_dataset(str(folder)), decode, "here"),
            Source(open_dataset(server.url), decode, "there"),
        ]
        stream = Stream(sources, seed=0, mixture=Mixture([1, 1]))
        examples, faults = stream.__getitems__(list(range(40)))
    assert (len(examples), faults) == (40, ())
    assert sources[0].dataset.digest == sources[1].dataset.digest


@pytest.mark.parametrize("workers", [0, 1])
def test_an_outage_ends_the_stream_at_once_and_replaces_nothing(
    workers: int, files: dict[str, bytes], tmp_path: Path
) -> None:
    """Else the sequence would depend on how long a server was down."""
    with fault_server.FaultServer(files) as server:
        patience = RetryConfig(attempts=2, deadline_s=2.0)
        storage = open_storage(server.url, CacheConfig(tmp_path), retry=patience)
        dataset = open_dataset(server.url, cache=CacheConfig(tmp_path))
        stream = Stream([Source(dataset, decode)], seed=0)
        undisturbed = stream.__getitems__(list(range(20)))
        for block in (path for path in tmp_path.rglob("*") if path.is_file()):
            block.unlink()
        server.faults = fault_server.Faults(status=503)
        afresh = Stream([Source(Dataset(storage, dataset.table.entries, ""), decode)], seed=0)
        plan = BatchPlan(20, 20, 1, 0)
        began = time.monotonic()
        with pytest.raises(StorageError, match="503"):
            next(afresh.batches(plan, as_list, first_step=0, last_step=1, workers=workers))
        assert time.monotonic() - began < 20  # and not once for every sample
        server.faults = fault_server.Faults()
        later = Stream([Source(open_dataset(server.url), decode)], seed=0)
        assert later.__getitems__(list(range(20))) == undisturbed
