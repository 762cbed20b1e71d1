import errno
import io
import json
import pickle
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from groundwork.data import shard_table
from groundwork.data.dataset import Dataset, open_dataset
from groundwork.data.order import BlockOrder
from groundwork.data.samples import Concept, Sample, SampleError
from groundwork.data.shard_index import ShardError
from groundwork.data.shards import write_shards
from groundwork.data.storage import LocalStorage


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value % 256, value // 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def sample(number: int) -> Sample:
    return Sample(f"k{number:03d}", picture(number), "png", f"text {number}", {"label": number})


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """10 samples in the split `train`, in shards of 4, and one in `val`."""
    pairs = [("train", sample(i)) for i in range(10)] + [("val", sample(99))]
    write_shards(
        pairs,
        tmp_path / "built",
        name="n",
        source={},
        licence="l",
        concepts=[Concept(0, "a")],
        max_samples=4,
    )
    return tmp_path / "built"


def foreign_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def img2dataset(tmp_path: Path) -> Path:
    """The layout of img2dataset: KEY.jpg, KEY.txt, KEY.json; 00000.tar ... ; statistics beside."""
    for shard in range(3):
        members = {}
        for i in range(2):
            key = f"{shard:05d}{i:04d}"
            members[f"{key}.jpg"] = picture(shard * 2 + i)
            members[f"{key}.json"] = b'{"url": "http://x/%d", "status": "success"}' % i
            members[f"{key}.txt"] = f"a caption, {shard} {i}, \N{SNOWFLAKE}".encode()
        foreign_tar(tmp_path / "cc" / f"{shard:05d}.tar", members)
        (tmp_path / "cc" / f"{shard:05d}_stats.json").write_text("{}")
    return tmp_path / "cc"


def test_samples_are_numbered_in_the_order_written(built: Path) -> None:
    dataset = open_dataset(str(built))
    assert [dataset.read(i) for i in range(len(dataset))] == [sample(i) for i in range(10)]
    assert dataset.locate(9) == (2, 1)
    assert dataset.where(9) == (str(built / "train-000002.tar"), "k009")
    assert dataset.concepts == [Concept(0, "a")]
    assert open_dataset(str(built), "val").read(0) == sample(99)


@pytest.mark.parametrize("index", [-1, 10, 10**12])
def test_a_number_out_of_range_is_an_index_error(index: int, built: Path) -> None:
    dataset = open_dataset(str(built))
    for method in (dataset.read, dataset.where, dataset.locate):
        with pytest.raises(IndexError):
            method(index)


def test_an_unknown_split_is_refused_with_the_known_ones(built: Path) -> None:
    with pytest.raises(ShardError, match="no split 'test'; it has train, val"):
        open_dataset(str(built), "test")


def test_a_pickled_copy_reads_the_same(built: Path) -> None:
    dataset = open_dataset(str(built))
    dataset.read(0)
    assert pickle.loads(pickle.dumps(dataset)).read(7) == sample(7)


def test_more_shards_than_file_handles_can_be_read(tmp_path: Path) -> None:
    pairs = (("train", sample(i)) for i in range(180))
    write_shards(pairs, tmp_path / "o", name="n", source={}, licence="l", max_samples=1)
    dataset = open_dataset(str(tmp_path / "o"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 140, hard))
    try:
        order = np.random.default_rng(0).permutation(360) % 180
        assert all(dataset.read(int(i)).info == {"label": i} for i in order)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_a_member_spoils_that_sample_alone(built: Path) -> None:
    dataset = open_dataset(str(built))
    tar = built / "train-000001.tar"
    flip(tar, tar.read_bytes().index(b"text 6"))
    with pytest.raises(SampleError, match="member 'txt' fails its checksum"):
        dataset.read(6)
    assert [dataset.read(i) for i in (5, 7)] == [sample(5), sample(7)]


def test_a_tar_that_shrinks_while_open_gives_sample_errors(built: Path) -> None:
    dataset = open_dataset(str(built))
    dataset.read(4)
    (built / "train-000001.tar").write_bytes(b"")
    with pytest.raises(SampleError, match="the file ends early"):
        dataset.read(5)


def test_a_tar_that_vanishes_gives_sample_errors(built: Path) -> None:
    # as a worker receives it: with no file open
    dataset = pickle.loads(pickle.dumps(open_dataset(str(built))))
    (built / "train-000001.tar").unlink()
    with pytest.raises(SampleError, match="No such file"):
        dataset.read(5)
    assert dataset.read(8) == sample(8)


@pytest.mark.parametrize("old", [None, b"GWIDX\x00\x00\x01" + bytes(80)])
def test_a_missing_or_outdated_index_is_made_anew(old: bytes | None, built: Path) -> None:
    before = open_dataset(str(built))
    index = built / "train-000001.idx"
    written = index.read_bytes()
    index.unlink() if old is None else index.write_bytes(old)
    after = open_dataset(str(built))
    assert index.read_bytes() == written
    assert after.digest == before.digest
    assert after.read(5) == sample(5)


def test_an_index_is_not_made_from_a_tar_that_the_manifest_does_not_know(built: Path) -> None:
    """Else the new index would take the damage for the content."""
    tar = built / "train-000001.tar"
    (built / "train-000001.idx").unlink()
    flip(tar, tar.read_bytes().index(b"text 6"))
    with pytest.raises(ShardError, match=r"train-000001\.tar: does not have the checksum"):
        open_dataset(str(built))


def test_a_damaged_index_is_refused_with_the_remedy(built: Path) -> None:
    flip(built / "train-000001.idx", 40)
    with pytest.raises(ShardError, match=r"train-000001\.idx: .*delete it"):
        open_dataset(str(built))
    (built / "train-000001.idx").unlink()
    assert open_dataset(str(built)).read(5) == sample(5)


def test_the_index_of_another_shard_is_refused(built: Path) -> None:
    (built / "train-000002.idx").write_bytes((built / "train-000001.idx").read_bytes())
    with pytest.raises(ShardError, match=r"train-000002"):
        open_dataset(str(built))


def test_img2dataset_output_is_read_as_webdataset_reads_it(img2dataset: Path) -> None:
    dataset = open_dataset(str(img2dataset))
    tars = sorted(map(str, img2dataset.glob("*.tar")))
    expected = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(dataset) == len(expected) == 6
    for i, theirs in enumerate(expected):
        ours = dataset.read(i)
        assert ours.key == theirs["__key__"]
        assert (ours.image, ours.image_format) == (theirs["jpg"], "jpg")
        assert ours.text == theirs["txt"].decode()
        assert ours.info["status"] == "success"


def test_patterns_choose_shards(img2dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(pattern: str) -> list[str]:
        dataset = open_dataset(pattern)
        return [dataset.read(i).key for i in range(0, len(dataset), 2)]

    everything = ["000000000", "000010000", "000020000"]
    assert keys(f"{img2dataset}/*.tar") == everything
    assert keys(f"{img2dataset}/{{00000..00002}}.tar") == everything
    assert keys(f"{img2dataset}/{{00002,00000}}.tar") == ["000020000", "000000000"]
    assert keys(f"{img2dataset}/{{00000,00002}}*.tar") == ["000000000", "000020000"]
    assert keys(f"{img2dataset}/00001.tar") == ["000010000"]
    monkeypatch.chdir(img2dataset)
    assert keys("0000[01].tar") == everything[:2]
    odd = img2dataset / "x[1].tar"
    odd.write_bytes((img2dataset / "00001.tar").read_bytes())
    assert keys("x[1].tar") == ["000010000"]


def test_a_pattern_that_promises_more_than_is_there_names_what_is_missing(
    img2dataset: Path,
) -> None:
    with pytest.raises(ShardError, match=r"missing: .*00003\.tar"):
        open_dataset(f"{img2dataset}/{{00000..00003}}.tar")
    for nothing in ("*.tgz", "nowhere", "nowhere/*.tar"):
        with pytest.raises(ShardError, match="shards build"):
            open_dataset(f"{img2dataset}/{nothing}")


def test_keys_of_foreign_tars_become_usable(tmp_path: Path) -> None:
    names = ["./a", "n01/n01_1", "v1.0/b", "two words", "back\\slash", "caf\xe9"]
    tar = foreign_tar(tmp_path / "x.tar", {f"{name}.png": picture(0) for name in names})
    dataset = open_dataset(str(tar))
    read = [dataset.read(i).key for i in range(len(dataset))]
    assert read == ["__a", "n01_n01_1", "v1_0_b", "two_words", "back_slash", "caf\xe9"]
    assert [dataset.where(i)[1] for i in range(len(dataset))] == names


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.json": b"{}"}, "no image member"),
        ({"a.pickle": b"cos\nsystem\n(S'true'\ntR."}, "no image member"),
        ({"a.png": b"", "a.txt": b"\xff\xfe"}, "'txt' is not UTF-8"),
        ({"a.png": b"", "a.json": b"{"}, "'json' is not JSON"),
        ({"a.png": b"", "a.json": b"[]"}, "holds a list"),
        ({"a.png": b"", "a.json": b"[" * 200_000}, "nested too deeply"),
    ],
)
def test_an_unusable_sample_says_why(
    members: dict[str, bytes], reason: str, tmp_path: Path
) -> None:
    dataset = open_dataset(str(foreign_tar(tmp_path / "x.tar", members)))
    with pytest.raises(SampleError, match=reason):
        dataset.read(0)


def test_empty_tars_between_others_shift_nothing(tmp_path: Path) -> None:
    for name, count in (("0", 0), ("1", 2), ("2", 0), ("3", 0), ("4", 1), ("5", 0)):
        members = {f"{name}-{i}.png": picture(i) for i in range(count)}
        foreign_tar(tmp_path / "t" / f"{name}.tar", members)
    for _ in range(2):  # indexed, then read from the side-cars
        dataset = open_dataset(str(tmp_path / "t"))
        assert [dataset.read(i).key for i in range(len(dataset))] == ["1-0", "1-1", "4-0"]


def test_tars_without_any_sample_are_refused(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "t" / "0.tar", {})
    with pytest.raises(ShardError, match="hold no sample"):
        open_dataset(str(tmp_path / "t"))


def test_a_side_car_that_cannot_be_written_costs_a_warning(
    img2dataset: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # root may write into any folder
    def refuse(index: object, path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shard_table, "write_index", refuse)
    dataset = open_dataset(str(img2dataset))
    assert len(dataset) == 6
    assert dataset.read(5).key == "000020001"
    assert "scanned at every start" in caplog.text


def test_the_digest_of_plain_tars_follows_their_content(img2dataset: Path) -> None:
    def digest() -> str:
        return open_dataset(str(img2dataset)).digest

    before = digest()
    assert digest() == before
    # another picture of the same size under the same name
    tar = img2dataset / "00001.tar"
    flip(tar, tar.read_bytes().index(b"a caption"))
    tar.with_suffix(".idx").unlink()
    assert digest() != before


def test_an_empty_data_set_has_length_zero() -> None:
    assert len(Dataset(LocalStorage("."), [], "")) == 0


def test_opening_in_the_middle_of_many_shards_touches_none_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10^6 samples in 10^4 shards, all of them links to one; the order is by blocks."""
    shard = [("train", Sample(f"k{i:03d}", picture(i), "png", "")) for i in range(100)]
    write_shards(shard, tmp_path / "o", name="n", source={}, licence="l")
    folder, record = tmp_path / "o", json.loads((tmp_path / "o" / "manifest.json").read_text())
    one = record["splits"]["train"][0]
    files = [f"train-{number:06d}.tar" for number in range(10_000)]
    for file in files[1:]:
        for name in (file, file.replace(".tar", ".idx")):
            (folder / name).hardlink_to(folder / one["file"].replace(".tar", Path(name).suffix))
    record["splits"]["train"] = [{**one, "file": file} for file in files]
    (folder / "manifest.json").write_text(json.dumps(record))
    touched: set[str] = set()
    pread, map_index = LocalStorage.read_many, shard_table.map_index

    def read_many(self: LocalStorage, requests: list[tuple[str, int, int]]) -> list[bytes]:
        touched.update(name for name, _, _ in requests)
        return pread(self, requests)

    def index(path: Path, *rest: object) -> object:
        touched.add(path.name.replace(".idx", ".tar"))
        return map_index(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStorage, "read_many", read_many)
    monkeypatch.setattr(shard_table, "map_index", index)
    dataset = open_dataset(str(folder))
    order = BlockOrder(dataset.shard_sizes, seed=0, block=1000)
    assert (len(dataset), touched) == (10**6, set())
    positions = np.arange(654_321, 654_321 + 64)
    assert all(isinstance(s, Sample) for s in dataset.read_many(order.indices(positions).tolist()))
    wanted = {files[int(i) // 100] for i in order.indices(positions)}
    assert touched == wanted
    assert len(wanted) <= 20  # of the one or two blocks that the positions lie in
