import io
import tarfile
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundwork.data.shard_index import (
    MISSING,
    OutdatedIndexError,
    ShardError,
    ShardIndex,
    index_path,
    read_index,
    scan_tar,
    write_index,
)

Content = dict[str, dict[str, bytes]]
in_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: int) -> Path:
    with tarfile.open(path, "w", **options) as archive:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def content(index: ShardIndex, tar: Path) -> Content:
    """What an index says the tar holds, read by its byte ranges alone."""
    data = tar.read_bytes()
    samples: Content = {}
    for row in range(len(index)):
        fields = samples.setdefault(index.key(row), {})
        for column, field in enumerate(index.fields):
            offset, size = int(index.offsets[row, column]), int(index.sizes[row, column])
            if size != MISSING:
                fields[field] = data[offset : offset + size]
                assert google_crc32c.value(fields[field]) == index.checksums[row, column]
    assert len(samples) == len(index)
    return samples


def read_by_webdataset(tar: Path) -> Content:
    dataset = webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)
    return {
        sample["__key__"]: {k: v for k, v in sample.items() if not k.startswith("__")}
        for sample in dataset
    }


def same(a: ShardIndex, b: ShardIndex) -> bool:
    arrays = ("offsets", "sizes", "checksums", "key_ends")
    return (a.tar_bytes, a.fields, a.keys) == (b.tar_bytes, b.fields, b.keys) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays
    )


stems = st.lists(
    st.text("abcXYZ019_- äΩ雪", min_size=1, max_size=9), min_size=0, max_size=6, unique=True
)
directories = st.sampled_from(["", "./", "000/", "v1.0/a b/", "n0144/"])
fields = st.dictionaries(
    st.sampled_from(["jpg", "txt", "json", "seg.png", "CLS"]),
    st.binary(max_size=1100),
    min_size=1,
    max_size=4,
)


@in_folder
@given(
    samples=st.builds(
        lambda names, folder, values: [
            (folder + name, value) for name, value in zip(names, values, strict=False)
        ],
        stems,
        directories,
        st.lists(fields, min_size=6, max_size=6),
    ),
    tar_format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_an_index_holds_what_webdataset_reads(
    samples: list[tuple[str, dict[str, bytes]]], tar_format: int, tmp_path: Path
) -> None:
    members = [
        (f"{key}.{field}", data) for key, sample in samples for field, data in sample.items()
    ]
    tar = write_tar(tmp_path / "x.tar", members, format=tar_format)
    index = scan_tar(tar)
    assert content(index, tar) == read_by_webdataset(tar)
    write_index(index, index_path(tar))
    assert same(read_index(index_path(tar), tar), index)


def test_what_belongs_to_no_sample_is_passed_over(tmp_path: Path) -> None:
    members = [
        ("README", b"no extension"),
        ("a.txt", b"1"),
        ("._a.txt", b"what macOS leaves behind"),
        ("__meta__/info.json", b"{}"),
        ("a.jpg", b"2"),
        ("b/.hidden.jpg", b"3"),
        ("b/c.jpg", b"4"),
    ]
    tar = write_tar(tmp_path / "x.tar", members)
    assert content(scan_tar(tar), tar) == {"a": {"txt": b"1", "jpg": b"2"}, "b/c": {"jpg": b"4"}}


def test_long_names_and_folders_are_read(tmp_path: Path) -> None:
    long = "d" * 120 + "/" + "n" * 180
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as archive:
        folder = tarfile.TarInfo("d" * 120)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        member = tarfile.TarInfo(long + ".jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    assert content(scan_tar(tar), tar) == {long: {"jpg": b"abc"}}


def test_a_name_that_is_not_utf8_does_not_stop_the_scan(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name in ("caf\xe9.jpg", "caf\xe8.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    index = scan_tar(tar)
    assert len({index.key(0), index.key(1)}) == 2
    assert all(index.key(row).startswith("caf") for row in (0, 1))


def test_a_key_that_comes_back_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3")])
    with pytest.raises(ShardError, match=r"x\.tar: sample 'a' appears twice"):
        scan_tar(tar)


@pytest.mark.parametrize("second", ["a.jpg", "a.JPG"])
def test_two_members_of_one_field_are_refused(second: str, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), (second, b"2")])
    with pytest.raises(ShardError, match=r"sample 'a' has two 'jpg' members"):
        scan_tar(tar)


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "b/../../a.jpg", "b/.."])
def test_absolute_and_parent_paths_are_refused(name: str, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [("ok.jpg", b"1"), (name, b"2")])
    with pytest.raises(ShardError, match="absolute or parent path"):
        scan_tar(tar)


KINDS = ["LNKTYPE", "SYMTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE", "GNUTYPE_SPARSE"]


@pytest.mark.parametrize("kind", KINDS)
def test_links_devices_and_sparse_files_are_refused(kind: str, tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = getattr(tarfile, kind), "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(ShardError, match=r"'a\.jpg' is a link, a device or a sparse file"):
        scan_tar(tar)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = [0, 1, 511, 512, 513, 1500]
    members = [
        (f"{i}.{field}", bytes([65 + i]) * size)
        for i, size in enumerate(sizes)
        for field in ("jpg", "txt")
    ]
    return write_tar(tmp_path_factory.mktemp("whole") / "x.tar", members)


def is_refused_or_complete(data: bytes, whole: Path, folder: Path) -> bool:
    """Scans `data`; True if refused, False if it holds all that `whole` holds, else fails."""
    tar = folder / "cut.tar"
    tar.write_bytes(data)
    try:
        index = scan_tar(tar)
    except ShardError as error:
        assert "cut.tar" in str(error)
        return True
    assert content(index, tar) == content(scan_tar(whole), whole)
    return False


def test_a_tar_cut_at_any_block_is_refused(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    with tarfile.open(whole) as archive:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in archive.getmembers())
    for size in range(0, len(data), 512):
        # the padding after the two blocks that end an archive holds nothing
        assert is_refused_or_complete(data[:size], whole, tmp_path) == (size < end + 1024)


@in_folder
@given(cut=st.data())
def test_a_tar_cut_anywhere_is_refused_or_complete(
    cut: st.DataObject, whole: Path, tmp_path: Path
) -> None:
    data = whole.read_bytes()
    is_refused_or_complete(data[: cut.draw(st.integers(0, len(data)))], whole, tmp_path)


@settings(in_folder, max_examples=300)
@given(place=st.data(), bit=st.integers(0, 7))
def test_a_flipped_bit_never_loses_a_sample_silently(
    place: st.DataObject, bit: int, whole: Path, tmp_path: Path
) -> None:
    """Names, sizes and types are under the checksum of their tar header; contents are not."""
    data = bytearray(whole.read_bytes())
    with tarfile.open(whole) as archive:
        headers = [member.offset for member in archive.getmembers()]
    offset = place.draw(st.sampled_from(headers)) + place.draw(st.integers(0, 511))
    data[offset] ^= 1 << bit
    is_refused_or_complete(bytes(data), whole, tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"x", b"<html>404</html>" * 100, b"\x1f\x8b" + bytes(9999), b"\xff" * 10240]
)
def test_what_is_no_tar_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ShardError, match=r"x\.tar: "):
        scan_tar(tmp_path / "x.tar")


def test_an_empty_tar_has_an_index_that_is_read_back(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [])
    write_index(scan_tar(tar), index_path(tar))
    assert len(read_index(index_path(tar), tar)) == 0


@settings(in_folder, max_examples=200)
@given(place=st.data(), bit=st.integers(0, 7))
def test_any_flipped_bit_of_an_index_is_found(
    place: st.DataObject, bit: int, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.idx"
    write_index(scan_tar(whole), path)
    data = bytearray(path.read_bytes())
    data[place.draw(st.integers(0, len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"x\.idx: .*delete it"):
        read_index(path, whole)


@in_folder
@given(cut=st.data())
def test_a_cut_index_is_found(cut: st.DataObject, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.idx"
    write_index(scan_tar(whole), path)
    data = path.read_bytes()
    path.write_bytes(data[: cut.draw(st.integers(0, len(data) - 1))])
    with pytest.raises(ShardError, match=r"x\.idx: .*delete it"):
        read_index(path, whole)


def test_an_index_of_version_1_is_told_from_a_damaged_one(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.idx"
    path.write_bytes(b"GWIDX\x00\x00\x01" + bytes(64))
    with pytest.raises(OutdatedIndexError):
        read_index(path, whole)


@pytest.mark.parametrize("change", [-512, 512])
def test_an_index_of_another_tar_is_refused(change: int, whole: Path, tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    data = whole.read_bytes()
    tar.write_bytes(data)
    write_index(scan_tar(tar), index_path(tar))
    tar.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(ShardError, match=r"truncated" if change < 0 else r"the tar was replaced"):
        read_index(index_path(tar), tar)


def test_the_digest_tells_contents_apart_that_have_the_same_size(tmp_path: Path) -> None:
    def digest(*members: tuple[str, bytes]) -> str:
        return scan_tar(write_tar(tmp_path / "x.tar", list(members))).digest()

    base = digest(("a.jpg", b"1"), ("b.jpg", b"2"))
    assert base == digest(("a.jpg", b"1"), ("b.jpg", b"2"))
    assert base != digest(("a.jpg", b"1"), ("b.jpg", b"3"))
    assert base != digest(("a.jpg", b"1"), ("c.jpg", b"2"))
    assert base != digest(("a.jpg", b"1"), ("b.png", b"2"))
    assert base != digest(("b.jpg", b"2"), ("a.jpg", b"1"))
