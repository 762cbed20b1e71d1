import hashlib
import io
import json
import pickle
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from groundwork.data.diagnosis import Diagnosis
from groundwork.data.index_builder import MAX_FIELDS, IndexBuilder, RepeatedMemberError
from groundwork.data.shard_index import (
    MISSING,
    OutdatedIndexError,
    ShardError,
    ShardIndex,
    header_bytes,
    index_path,
    map_index,
    parse_index,
    parse_index_header,
    read_index,
    read_index_header,
    scan_tar,
    write_index,
)
from groundwork.data.tar_writer import TarShardWriter

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
    arrays = ("offsets", "sizes", "checksums", "key_ends", "widths", "heights", "text_bytes")
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


@pytest.mark.parametrize("name", ["/etc", "../d", "a/../../d", ".."])
def test_absolute_and_parent_paths_of_folders_are_refused(name: str, tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w") as archive:
        folder = tarfile.TarInfo(name)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ShardError, match="absolute or parent path") as caught:
        scan_tar(tar)
    assert caught.value.diagnosis is Diagnosis.UNSAFE_PATH


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


def picture(image_format: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, image_format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An indexed tar of pictures, some of which are none."""
    members = [
        ("a.jpg", picture("JPEG", (7, 5))),
        ("a.txt", b"seven"),
        ("b.png", picture("PNG", (300, 2))),
        ("c.txt", b""),
        ("c.webp", picture("WEBP", (64, 63))),
        ("d.png", picture("PNG", (2, 2))),  # the image of a sample is its jpg, if it has one
        ("d.jpg", picture("JPEG", (8, 9))),
        ("e.jpg", b"<html>"),
        ("f.depth.png", picture("PNG", (3, 3))),
    ]
    tar = write_tar(tmp_path_factory.mktemp("pictures") / "x.tar", members)
    write_index(scan_tar(tar), index_path(tar))
    return tar


def test_an_index_knows_the_sizes_of_images_and_texts(pictures: Path) -> None:
    index = read_index(index_path(pictures), pictures)
    assert index.widths.tolist() == [7, 300, 64, 8, 0, 0]
    assert index.heights.tolist() == [5, 2, 63, 9, 0, 0]
    assert index.text_bytes.tolist() == [5, MISSING, 0, MISSING, MISSING, MISSING]


def test_the_header_alone_tells_what_the_tar_holds(pictures: Path) -> None:
    path, index = index_path(pictures), scan_tar(pictures)
    header = read_index_header(path)
    assert header.samples == len(index)
    assert header.fields == index.fields
    assert header.tar_bytes == pictures.stat().st_size
    assert header.file_bytes == path.stat().st_size
    assert header.digest == index.digest()
    data = path.read_bytes()
    length = header_bytes(data[:16], "x.idx")
    assert length < 700
    assert parse_index_header(data[:length], "x.idx") == header
    with pytest.raises(ShardError, match=r"x\.idx: checksum mismatch"):
        parse_index_header(data[: length - 1], "x.idx")


def test_a_header_of_many_fields_is_read(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", [(f"a.field_{i:04}", b"") for i in range(900)])
    write_index(scan_tar(tar), index_path(tar))
    assert len(read_index_header(index_path(tar)).fields) == 900
    assert content(map_index(index_path(tar)), tar) == content(scan_tar(tar), tar)


def test_sections_are_aligned_and_found_where_the_header_says(pictures: Path) -> None:
    data, index = index_path(pictures).read_bytes(), scan_tar(pictures)
    for name, section in read_index_header(index_path(pictures)).sections.items():
        assert section.begin % 8 == 0
        stored = np.frombuffer(data[section.begin :], section.dtype, np.prod(section.shape))
        expected = np.frombuffer(index.keys, "u1") if name == "keys" else getattr(index, name)
        assert np.array_equal(stored.reshape(section.shape), expected)


@pytest.mark.parametrize("verify", [True, False])
def test_a_mapped_index_equals_a_read_one(verify: bool, pictures: Path) -> None:
    mapped = map_index(index_path(pictures), pictures.stat().st_size, verify=verify)
    assert same(mapped, read_index(index_path(pictures), pictures))
    assert mapped.digest() == scan_tar(pictures).digest()
    assert same(pickle.loads(pickle.dumps(mapped)), mapped)
    with pytest.raises(ShardError, match="the tar was replaced"):
        map_index(index_path(pictures), pictures.stat().st_size + 512)


def test_an_empty_file_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(b"")
    for read in (map_index, read_index_header):
        with pytest.raises(ShardError, match=r"x\.idx: not a groundwork shard index"):
            read(tmp_path / "x.idx")


def test_an_index_is_parsed_from_its_bytes(pictures: Path) -> None:
    data = index_path(pictures).read_bytes()
    size = pictures.stat().st_size
    for known in (size, None):
        assert same(parse_index(data, "s3://b/x.idx", known), scan_tar(pictures))
    with pytest.raises(ShardError, match=r"^s3://b/x\.tar: truncated"):
        parse_index(data, "s3://b/x.idx", size - 512)
    with pytest.raises(ShardError, match=r"^s3://b/x\.idx: checksum .* rebuilt from x\.tar"):
        parse_index(data[:-1], "s3://b/x.idx", size)


@settings(in_folder, max_examples=200)
@given(place=st.data(), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_mapped_index_is_found(
    place: st.DataObject, bit: int, pictures: Path, tmp_path: Path
) -> None:
    data = bytearray(index_path(pictures).read_bytes())
    data[place.draw(st.integers(0, len(data) - 1))] ^= 1 << bit
    (tmp_path / "x.idx").write_bytes(data)
    with pytest.raises(ShardError, match=r"x\.idx: .*delete it"):
        map_index(tmp_path / "x.idx")


def version_2(index: ShardIndex) -> bytes:
    """The layout of version 2, as its specification had it."""
    checksums = index.checksums.astype("<u4").tobytes()
    header = json.dumps(
        {"tar_bytes": index.tar_bytes, "samples": len(index), "fields": index.fields}
    ).encode()
    body = [index.offsets.astype("<i8").tobytes(), index.sizes.astype("<i8").tobytes()]
    body += [checksums, bytes(-len(checksums) % 8), index.key_ends.astype("<i8").tobytes()]
    rest = header + bytes(-(16 + len(header)) % 8) + b"".join(body) + bytes(index.keys)
    preamble = b"GWIDX\0\0\2" + len(header).to_bytes(4, "little")
    return preamble + google_crc32c.value(rest).to_bytes(4, "little") + rest


def test_version_2_is_read_with_unknown_sizes(pictures: Path, tmp_path: Path) -> None:
    index = scan_tar(pictures)
    data = version_2(index)
    (tmp_path / "x.idx").write_bytes(data)
    for read in (read_index(tmp_path / "x.idx", pictures), map_index(tmp_path / "x.idx")):
        assert content(read, pictures) == content(index, pictures)
        assert read.digest() == index.digest()
        assert read.text_bytes.tolist() == index.text_bytes.tolist()
        assert not read.widths.any()
        assert not read.heights.any()
    header = read_index_header(tmp_path / "x.idx")
    assert (header.version, header.samples, header.digest) == (2, len(index), "")
    for cut in range(0, len(data), 7):
        with pytest.raises(ShardError, match=r"x\.idx: "):
            parse_index(data[:cut], "x.idx", None)


@pytest.mark.parametrize("samples", [10, 2**63 - 1, 2**63, 10**30])
def test_version_2_of_more_samples_than_fit_the_file_is_refused(
    samples: int, pictures: Path, tmp_path: Path
) -> None:
    data = version_2(scan_tar(pictures))
    length = int.from_bytes(data[8:12], "little")
    record = {**json.loads(data[16 : 16 + length]), "samples": samples}
    header = json.dumps(record).encode()
    path = tmp_path / "x.idx"
    path.write_bytes(
        data[:8] + len(header).to_bytes(4, "little") + data[12:16] + header + data[16 + length :]
    )
    with pytest.raises(ShardError, match=r"x\.idx: malformed .*delete it"):
        read_index_header(path)


def resealed(data: bytes, edit: Any) -> bytes:
    """The side-car with another header, whose checksum is right."""
    length = int.from_bytes(data[8:12], "little")
    record = json.loads(data[16 : 16 + length])
    edit(record)
    header = json.dumps(record, separators=(",", ":")).encode().ljust(length)
    sealed = len(header).to_bytes(4, "little") + google_crc32c.value(header).to_bytes(4, "little")
    return data[:8] + sealed + header + data[16 + length :]


def huge(record: Any) -> None:
    record.update(samples=2**62)
    for section in record["sections"]:
        section[2][0] = 2**62


EDITS = [
    lambda r: r.update(samples=-1),
    lambda r: r.update(samples=1.5),
    lambda r: r.update(samples=10**9),
    lambda r: r.update(fields=[1]),
    lambda r: r.update(fields=None),
    lambda r: r.update(tar_bytes=600),
    lambda r: r.update(tar_bytes=10**30),
    lambda r: r.update(sections=[]),
    lambda r: r.update(sections={"offsets": 1}),
    lambda r: r.pop("file_bytes"),
    lambda r: r["sections"][0].__setitem__(1, "|O"),
    lambda r: r["sections"][0].__setitem__(3, -8),
    lambda r: r["sections"][0].__setitem__(3, 10**12),
    lambda r: r["sections"][7].__setitem__(2, [10**12]),
    lambda r: r["sections"][7].__setitem__(2, [3]),
    huge,
]


@pytest.mark.parametrize("edit", EDITS)
def test_a_header_that_lies_is_refused(edit: Any, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(resealed(index_path(pictures).read_bytes(), edit))
    with pytest.raises(ShardError, match=r"x\.idx: (malformed|checksum)"):
        map_index(tmp_path / "x.idx")


def test_sections_that_a_reader_does_not_know_are_passed_over(
    pictures: Path, tmp_path: Path
) -> None:
    data = index_path(pictures).read_bytes()
    record = json.loads(data[16 : 16 + int.from_bytes(data[8:12], "little")])

    def rename(record: Any) -> None:
        text = record["sections"][5]
        record["sections"].append(["faces", text[1], text[2], text[3], text[4]])
        record["new_key"] = 1
        # the longer header moves all arrays; both lengths are multiples of 8
        grown = 136
        for section in record["sections"]:
            section[3] += grown
        record["file_bytes"] += grown
        record["pad"] = ""
        length = len(json.dumps(record, separators=(",", ":")))
        record["pad"] = "x" * (int.from_bytes(data[8:12], "little") + grown - length)

    assert "faces" not in str(record)
    grown = resealed(data, rename)
    assert same(parse_index(grown, "x.idx", None), scan_tar(pictures))


def test_offsets_outside_the_tar_are_refused(whole: Path, tmp_path: Path) -> None:
    index = scan_tar(whole)
    index.offsets[1, 0] = whole.stat().st_size
    write_index(index, tmp_path / "x.idx")
    with pytest.raises(ShardError, match=r"x\.idx: malformed \(a member lies outside the tar"):
        map_index(tmp_path / "x.idx")


def pax_tar(path: Path, records: bytes, kind: bytes = tarfile.XHDTYPE) -> Path:
    """A tar of one member under a pax header with these records."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        header = tarfile.TarInfo("././@PaxHeader")
        header.type, header.size = kind, len(records)
        archive.addfile(header, io.BytesIO(records))
        member = tarfile.TarInfo("a.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    return path


def test_pax_headers_name_members_and_others_are_passed_over(tmp_path: Path) -> None:
    records = b"30 mtime=1700000000.123456789\n16 path=b/c.jpg\n"
    tar = pax_tar(tmp_path / "x.tar", records)
    assert content(scan_tar(tar), tar) == {"b/c": {"jpg": b"abc"}}


def test_of_two_records_in_a_pax_header_the_last_wins(tmp_path: Path) -> None:
    records = b"14 path=c.jpg\n14 path=b.jpg\n10 size=1\n10 size=3\n"
    tar = pax_tar(tmp_path / "x.tar", records)
    assert content(scan_tar(tar), tar) == {"b": {"jpg": b"abc"}}
    with tarfile.open(tar) as archive:
        assert [(member.name, member.size) for member in archive] == [("b.jpg", 3)]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (b"12 path=x\n", "damaged"),
        (b"9 path=x", "damaged"),
        (b"path=x\n", "damaged"),
        (b"9 path=x\n" + b"=" * 30, "damaged"),
        (b"-9 path=x\n", "damaged"),
        (b"99999999999999999999 path=x\n", "damaged"),
        (b"10 size=x\n", "damaged"),
        (b"11 size=-1\n", "damaged"),
        (b"19 size=1234567890\n", "truncated"),
        (b"16 path=/etc/x\n", "damaged"),
        (b"15 path=/etc/x\n", "absolute or parent path"),
        (b"22 GNU.sparse.major=1\n", "sparse"),
    ],
)
def test_pax_headers_that_lie_are_refused(records: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=rf"x\.tar: .*{message}"):
        scan_tar(pax_tar(tmp_path / "x.tar", records))


def test_a_global_header_may_comment_but_not_name(tmp_path: Path) -> None:
    comment = pax_tar(tmp_path / "x.tar", b"13 comment=x\n", tarfile.XGLTYPE)
    assert len(scan_tar(comment)) == 1
    with pytest.raises(ShardError, match="a global header sets 'path'"):
        scan_tar(pax_tar(tmp_path / "y.tar", b"9 path=x\n", tarfile.XGLTYPE))


def test_tars_that_were_joined_are_told_apart(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "a.tar", [("a.jpg", b"1")]).read_bytes()
    second = write_tar(tmp_path / "b.tar", [("b.jpg", b"2")]).read_bytes()
    (tmp_path / "x.tar").write_bytes(first + second)
    with pytest.raises(
        ShardError, match=rf"x\.tar: .* at byte {len(first):,}: .*joined with `cat`"
    ):
        scan_tar(tmp_path / "x.tar")


def test_names_that_make_thousands_of_fields_are_refused_before_they_fill_memory(
    tmp_path: Path,
) -> None:
    members = [(f"k{i}.field{i}", b"") for i in range(8000)]
    tar = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(
        ShardError, match=r"x\.tar: more than 1,000 different fields .*dots"
    ) as caught:
        scan_tar(tar)
    assert caught.value.diagnosis is Diagnosis.TOO_MANY_FIELDS
    with (
        pytest.raises(ShardError, match=r"y\.tar: more than 1,000 different fields") as caught,
        TarShardWriter(tmp_path / "y.tar") as writer,
    ):
        writer.write("a", {f"x{i:04}": b"" for i in range(MAX_FIELDS + 1)})
    assert caught.value.diagnosis is Diagnosis.TOO_MANY_FIELDS
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_a_sample_may_have_as_many_fields_as_a_tar() -> None:
    builder = IndexBuilder()
    for sample in ("a", "b"):
        for i in range(MAX_FIELDS):
            assert builder.begin_member(f"{sample}.x{i}") == f"x{i}"
            builder.add_member(f"x{i}", i, 1, i, b"")
    columns = builder.columns()
    assert columns.fields == tuple(sorted(f"x{i}" for i in range(MAX_FIELDS)))
    for offsets in columns.offsets:
        assert [f"x{offset}" for offset in offsets] == list(columns.fields)
    for field, message in (("x7", "two 'x7' members"), ("y", "more than 1,000 different")):
        with pytest.raises(RepeatedMemberError, match=message):
            builder.add_member(field, 0, 1, 0, b"")


def test_a_table_that_would_be_nearly_empty_is_refused() -> None:
    builder = IndexBuilder()
    for i in range(8000):
        builder.begin_sample(str(i))
        builder.add_member(f"x{i % MAX_FIELDS}", i, 1, i, b"")
    with pytest.raises(
        RepeatedMemberError, match=r"1,000 different fields .* 8,000 samples"
    ) as caught:
        builder.columns()
    assert caught.value.diagnosis is Diagnosis.TOO_MANY_FIELDS


def test_many_members_of_different_names_are_refused_at_once(tmp_path: Path) -> None:
    names = {"sample": "a.x{:06}", "names": "v1.{:06}.jpg"}
    for file, name in names.items():
        members = [(name.format(i), b"") for i in range(40_000)]
        tar = write_tar(tmp_path / f"{file}.tar", members)
        begin = time.process_time()
        with pytest.raises(ShardError, match="more than 1,000 different fields"):
            scan_tar(tar)
        assert time.process_time() - begin < 2  # all of it took 9 s once


def sealed_header(block: bytearray) -> None:
    """Set the checksum of a tar header to what it should be."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)


@settings(in_folder, max_examples=200)
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, 11),
            st.sampled_from([0, 100, 124, 135, 156, 156, 257, 345]) | st.integers(0, 511),
            st.integers(0, 255) | st.sampled_from(list(b"0123457LKxgSD\x80\xff")),
        ),
        max_size=6,
    )
)
def test_headers_that_lie_under_a_right_checksum_do_no_harm(
    changes: list[tuple[int, int, int]], whole: Path, tmp_path: Path
) -> None:
    data = bytearray(whole.read_bytes())
    with tarfile.open(whole) as archive:
        headers = [member.offset for member in archive.getmembers()]
    for header, place, value in changes:
        block = bytearray(data[headers[header] :][:512])
        block[place] = value
        sealed_header(block)
        data[headers[header] : headers[header] + 512] = block
    tar = tmp_path / "x.tar"
    tar.write_bytes(data)
    begin = time.monotonic()
    try:
        index = scan_tar(tar)
    except ShardError as error:
        assert re.match(r".*x\.tar: ", str(error))
    else:
        content(index, tar)
    assert time.monotonic() - begin < 5


def hexdump(data: bytes, begin: int) -> list[str]:
    lines = []
    for place in range(0, len(data), 16):
        row = data[place : place + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{begin + place:06x}  {row.hex(' '):47}  {text}")
    return lines


def example(folder: Path) -> str:
    """The side-car of a small tar, taken to pieces by its specification."""
    jpeg = bytes.fromhex("ffd8 ffc0 0011 08 0020 0040 03 012200 021101 031101 ffd9")
    with TarShardWriter(folder / "x.tar") as writer:
        writer.write("cat", {"jpg": jpeg, "txt": b"a cat"})
        writer.write("dog", {"jpg": jpeg})
    tar, data = (folder / "x.tar").read_bytes(), (folder / "x.idx").read_bytes()
    lines = []
    for name, begin in (("cat.jpg", 512), ("cat.txt", 1536), ("dog.jpg", 2560)):
        assert tar[begin - 512 :].startswith(name.encode() + b"\0")
        size = 5 if name == "cat.txt" else len(jpeg)
        lines.append(f"x.tar  {begin:5}  {name}, {size} bytes")
    lines += ["", "x.idx, preamble: magic, version, length and crc32c of the header"]
    length = int.from_bytes(data[8:12], "little")
    record = json.loads(data[16 : 16 + length])
    lines += hexdump(data[:16], 0)
    blanks = length - len(data[16 : 16 + length].rstrip())
    lines += ["", f"header, {length} bytes, the last {blanks} of them blanks"]
    sections = record.pop("sections")
    lines += [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in record.items()]
    lines[-len(record)] = "{" + lines[-len(record)][1:]
    lines.append(' "sections": [')
    lines += [f"  {json.dumps(section)}," for section in sections]
    lines[-1] = lines[-1][:-1] + "]}"
    for name, kind, shape, begin, _ in sections:
        values = np.frombuffer(data, kind, int(np.prod(shape)), begin).reshape(shape)
        shown = bytes(values) if name == "keys" else values.tolist()
        lines += ["", f"{name}: {shown}"]
        lines += hexdump(data[begin : begin + values.nbytes + -values.nbytes % 8], begin)
    return "\n".join(lines)


def test_the_example_in_the_specification_is_what_is_written(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "shard_format.md").read_text("utf-8")
    shown = page.partition("<!-- example: begin -->\n")[2].partition("\n<!-- example: end -->")[0]
    assert shown == f"```text\n{example(tmp_path)}\n```"


def test_the_digest_is_the_one_that_is_specified(pictures: Path) -> None:
    index = scan_tar(pictures)
    parts = [b'["depth.png", "jpg", "png", "txt", "webp"]']
    for row in range(len(index)):
        for size, checksum in zip(index.sizes[row], index.checksums[row], strict=True):
            value = 2**32 - 1 if size == MISSING else int(checksum)
            parts.append(value.to_bytes(8, "little"))
    ends = np.cumsum([len(index.key(row).encode()) for row in range(len(index))])
    parts += [int(end).to_bytes(8, "little") for end in ends]
    parts += [index.key(row).encode() for row in range(len(index))]
    assert hashlib.sha256(b"".join(parts)).hexdigest() == index.digest()


@settings(in_folder, max_examples=300)
@given(
    pieces=st.lists(
        st.sampled_from(
            ["9", "16", "99", "-1", " ", "=", "\n", "path", "size", "b.jpg", "1", "GNU.sparse.x"]
        ),
        max_size=14,
    ),
    kind=st.sampled_from([tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME]),
)
def test_any_extension_header_is_read_or_refused(
    pieces: list[str], kind: bytes, tmp_path: Path
) -> None:
    tar = pax_tar(tmp_path / "x.tar", "".join(pieces).encode(), kind)
    try:
        content(scan_tar(tar), tar)
    except ShardError as error:
        assert re.match(r".*x\.tar: ", str(error))
