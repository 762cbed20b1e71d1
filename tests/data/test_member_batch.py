"""A reader in C++ against reading by Python: the same samples, the same errors."""

import multiprocessing
import os
import pickle
import resource
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from groundwork.data.dataset import Dataset, open_dataset
from groundwork.data.raw_batch import RawBatch, RawSample, RawView, pack_samples
from groundwork.data.samples import SampleError
from groundwork.data.shard_index import ShardError
from groundwork.data.shard_table import ShardEntry
from groundwork.data.storage import LocalStorage
from groundwork.data.tar_writer import TarShardWriter
from groundwork.kernels.member_reader import find_member_reader

READER = find_member_reader()
pytestmark = pytest.mark.skipif(READER is None, reason="the reader cannot be compiled here")

KEYS = st.text("abcdé/", min_size=1, max_size=4).filter(lambda k: k.strip("/") == k != "")
CONTENTS = st.one_of(
    st.binary(max_size=40),
    st.integers(500, 9000).map(lambda size: bytes(i * 7 % 251 for i in range(size))),
)
FIELDS = st.sampled_from(["jpg", "json", "png", "txt", "depth.png", "x"])
SAMPLES = st.dictionaries(FIELDS, CONTENTS, min_size=1, max_size=4)
TARS = st.lists(st.lists(SAMPLES, min_size=1, max_size=6), min_size=1, max_size=4)


def write(folder: Path, tars: Sequence[Sequence[dict[str, bytes]]]) -> None:
    for number, samples in enumerate(tars):
        with TarShardWriter(folder / f"{number:03d}.tar", sync=False) as tar:
            for i, fields in enumerate(samples):
                tar.write(f"k{'é' * (i % 2)}{number}-{i}", fields)


def plain(samples: Sequence[RawSample | RawView]) -> list[object]:
    """What can be compared: errors by their message and diagnosis, views by their content."""
    return [
        (str(sample), sample.diagnosis)
        if isinstance(sample, SampleError)
        else (sample[0], {name: bytes(content) for name, content in sample[1].items()})
        for sample in samples
    ]


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, int, int]:
    kinds = ["flip", "truncate", "delete", "replace", "spoil index", "delete index"]
    return draw(st.sampled_from(kinds)), draw(st.integers(0, 3)), draw(st.integers(0, 2**20))


def damage(folder: Path, kind: str, tar: int, where: int) -> None:
    paths = [path for path in sorted(folder.glob("*.tar")) if path.stat().st_size]
    if not paths:
        return
    path = paths[tar % len(paths)]
    index = path.with_suffix(".idx")
    if kind == "flip":
        with path.open("r+b") as file:  # in place: open files see it
            file.seek(where % path.stat().st_size)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1 << where % 8]))
    elif kind == "truncate":
        os.truncate(path, where % path.stat().st_size)
    elif kind == "delete":
        path.unlink()
    elif kind == "replace":  # by another file of the same content
        shutil.copy(path, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    elif kind == "delete index":
        index.unlink(missing_ok=True)
    elif index.is_file():
        data = bytearray(index.read_bytes())
        data[where % len(data)] ^= 1 << where % 8
        index.with_suffix(".new").write_bytes(data)  # as writers do: maps of the old one stay
        index.with_suffix(".new").replace(index)


@settings(max_examples=120, deadline=None)
@given(
    tars=TARS,
    before=st.lists(damages(), max_size=2),
    between=st.lists(damages(), max_size=2),
    wanted=st.none() | st.sets(FIELDS, max_size=3),
    data=st.data(),
)
def test_a_reader_changes_no_sample_and_no_error(
    tars: list[list[dict[str, bytes]]],
    before: list[tuple[str, int, int]],
    between: list[tuple[str, int, int]],
    wanted: set[str] | None,
    data: st.DataObject,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, tars)
        entries = [ShardEntry(f"{i:03d}.tar", len(samples)) for i, samples in enumerate(tars)]
        copy = folder.with_name(folder.name + "-copy")
        sides = []
        try:
            shutil.copytree(folder, copy)
            for where, reader in ((folder, None), (copy, READER)):
                sides.append(Dataset(LocalStorage(where), entries, "", reader=reader))
            total = sum(map(len, tars))
            for changes in (before, between):
                for change in changes:
                    damage(folder, *change)
                    damage(copy, *change)
                indices = data.draw(st.lists(st.integers(0, total - 1), min_size=4, max_size=20))
                expected, found = (side.read_fields(indices, wanted) for side in sides)
                messages = plain(expected)
                assert str(messages).replace(str(folder), str(copy)) == str(plain(found))
                for side in sides:
                    batch = side.read_batch(indices, wanted)
                    assert str(plain(list(batch))).replace(str(folder) + "/", str(copy) + "/") == (
                        str(plain(found))
                    )
                    assert plain(batch.samples()) == plain(list(batch))
        finally:
            shutil.rmtree(copy, ignore_errors=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "d", [[{"jpg": b"j%d" % i, "txt": b"t"} for i in range(8)]] * 3)
    return tmp_path / "d"


@pytest.fixture
def dataset(folder: Path) -> Iterator[Dataset]:
    yield open_dataset(str(folder), reader=READER)


def test_a_batch_is_arrays_and_views(dataset: Dataset) -> None:
    batch = dataset.read_batch([9, 0, 9], ["jpg"])
    assert len(batch) == 3
    assert batch.fields == ("jpg",)
    assert batch.sizes[:, 0].tolist() == [2, 2, 2]
    assert [batch.key(i) for i in range(3)] == ["ké1-1", "k0-0", "ké1-1"]
    sample = batch[-2]
    assert isinstance(sample, tuple)
    assert sample[0] == "k0-0"
    assert bytes(sample[1]["jpg"]) == b"j0"
    with pytest.raises(TypeError, match="read-only"):
        sample[1]["jpg"][0] = 1
    for number in (3, -4):
        with pytest.raises(IndexError):
            batch[number]
    assert plain(list(pickle.loads(pickle.dumps(batch)))) == plain(list(batch))


def test_a_bad_sample_is_its_error_and_has_no_key(dataset: Dataset, folder: Path) -> None:
    tar = folder / "001.tar"
    tar.write_bytes(tar.read_bytes().replace(b"j2", b"J2"))
    batch = dataset.read_batch(range(24))
    assert set(batch.errors) == {10}
    assert isinstance(batch[10], SampleError)
    assert (batch.sizes[10] == -1).all()
    with pytest.raises(SampleError, match="member 'jpg' fails its checksum"):
        batch.key(10)
    assert plain(batch.samples())[11] == ("ké1-3", {"jpg": b"j3", "txt": b"t"})


def test_a_file_that_was_replaced_is_opened_again(dataset: Dataset, folder: Path) -> None:
    """What was open holds other bytes than the index says; a second try finds the new file."""
    tar = folder / "001.tar"
    good = tar.read_bytes()
    tar.write_bytes(good.replace(b"j2", b"J2"))
    assert set(dataset.read_batch(range(24)).errors) == {10}
    dataset.read_batch(range(24))
    tar.with_suffix(".new").write_bytes(good)
    tar.with_suffix(".new").replace(tar)
    batch = dataset.read_batch(range(24))
    assert not batch.errors
    assert plain(batch.samples())[10] == ("k1-2", {"jpg": b"j2", "txt": b"t"})


def test_a_batch_of_nothing(dataset: Dataset) -> None:
    assert len(dataset.read_batch([])) == 0
    batch = dataset.read_batch(range(5), [])
    assert plain(list(batch)) == [(f"k{'é' * (i % 2)}0-{i}", {}) for i in range(5)]


def test_an_index_out_of_range_is_refused(dataset: Dataset) -> None:
    for bad in (-1, 24):
        with pytest.raises(IndexError, match="data set of 24"):
            dataset.read_batch([0, 1, 2, bad])


def test_a_batch_may_be_of_more_shards_than_files_can_be_open(tmp_path: Path) -> None:
    write(tmp_path, [[{"txt": b"%d" % i}] for i in range(300)])
    dataset = open_dataset(str(tmp_path), reader=READER)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 140, hard))
    try:
        for _ in range(2):
            batch = dataset.read_batch(range(299, -1, -1))
            assert not batch.errors
            assert [bytes(batch.samples()[i][1]["txt"]) for i in (0, 299)] == [b"299", b"0"]  # type: ignore[index]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_copy_in_another_process_reads_the_same(dataset: Dataset) -> None:
    expected = plain(dataset.read_fields(range(24)))
    assert plain(pickle.loads(pickle.dumps(dataset)).read_fields(range(24))) == expected
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert plain(pool.apply(dataset.read_fields, (range(24),))) == expected


class Batches(TorchDataset[RawBatch]):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, i: int) -> RawBatch:
        return self.dataset.read_batch(range(i))


def test_a_batch_comes_from_a_worker_as_it_was(dataset: Dataset) -> None:
    sizes = [0, 1, 5, 24]
    loader = DataLoader(Batches(dataset), sampler=sizes, batch_size=None, num_workers=2)
    for size, batch in zip(sizes, list(loader), strict=True):
        assert plain(list(batch)) == plain(dataset.read_fields(range(size)))


def test_indices_that_are_let_go_are_not_read_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses belong to an index that is held; with room for one, each call maps them anew."""
    monkeypatch.setattr("groundwork.data.shard_table.KEPT_INDICES", 1)
    dataset = open_dataset(str(folder), reader=READER)
    expected = plain(open_dataset(str(folder)).read_fields(range(24)))
    for _ in range(20):
        assert plain(dataset.read_fields(range(24))) == expected


def test_threads_that_close_each_others_files_and_indices_read_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groundwork.data.shard_table.KEPT_INDICES", 1)
    monkeypatch.setattr("groundwork.data.storage.MAX_OPEN_FILES", 1)
    dataset = open_dataset(str(folder), reader=READER)
    orders = [np.random.default_rng(i).permutation(24).tolist() for i in range(60)]
    expected = plain(open_dataset(str(folder)).read_fields(range(24)))
    with ThreadPoolExecutor(4) as pool:
        for order, found in zip(orders, pool.map(dataset.read_fields, orders), strict=True):
            assert plain(found) == [expected[i] for i in order]


def test_an_index_with_a_field_twice_is_left_to_python(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in range(3):
        object.__setattr__(dataset.table.index(shard), "fields", ("jpg", "jpg"))
    expected = [(f"k{'é' * (i % 2)}0-{i}", {"jpg": b"t"}) for i in range(8)]
    assert plain(dataset.read_fields(range(8))) == expected


def test_an_index_that_comes_back_brings_its_fields(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first try no index could be opened, so the batch knew of no field."""
    entries = [ShardEntry(f"{i:03d}.tar", 8) for i in range(3)]
    dataset = Dataset(LocalStorage(folder), entries, "", reader=READER)

    def fail(shard: int) -> None:
        raise ShardError("the network")

    monkeypatch.setattr(dataset.table, "pointers", fail)
    batch = dataset.read_batch(range(24))
    assert not batch.errors
    assert batch.fields == ("jpg", "txt")


@settings(max_examples=50, deadline=None)
@given(samples=st.lists(st.tuples(KEYS, SAMPLES) | st.builds(SampleError, st.text()), max_size=6))
def test_packed_samples_come_back(samples: list[RawSample]) -> None:
    batch = pack_samples(samples)
    assert isinstance(batch, RawBatch)
    assert plain(batch.samples()) == plain(samples)
