import hashlib
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from groundwork.data.shard_index import ShardError, index_path, read_index, scan_tar
from groundwork.data.tar_writer import TarShardWriter, WrittenTar, member_header, pax_record

Samples = dict[str, dict[str, bytes]]
in_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)

parts = st.text(st.characters(codec="utf-8", exclude_characters="./\x00"), min_size=1, max_size=70)
keys = st.lists(parts, min_size=1, max_size=3).map("/".join).filter(lambda k: k[:2] != "__")
fields = st.dictionaries(
    st.sampled_from(["jpg", "txt", "json", "depth.png", "very_long_name." * 6 + "npz"]),
    st.binary(max_size=1300),
    min_size=1,
    max_size=4,
)
samples_drawn = st.dictionaries(keys, fields, max_size=6)


def write(path: Path, samples: Samples) -> WrittenTar:
    writer = TarShardWriter(path, sync=False)
    for key, sample in samples.items():
        assert writer.write(key, sample) == sum(map(len, sample.values()))
    return writer.close()


def member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    info.uname = info.gname = "groundwork"
    return info


def written_by_tarfile(samples: Samples) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for key, sample in samples.items():
            for field, content in sorted(sample.items()):
                archive.addfile(member(f"{key}.{field}", len(content)), io.BytesIO(content))
    return buffer.getvalue()


@in_folder
@given(samples=samples_drawn)
@example(samples={"k" * n: {"jpg": b"x" * n} for n in (95, 96, 97, 255, 256)})
@example(samples={"é": {"jpg": b""}, "a/雪": {"txt": b"x" * 512, "depth.png": b"x" * 513}})
def test_the_bytes_are_those_that_tarfile_writes(samples: Samples, tmp_path: Path) -> None:
    tar = write(tmp_path / "x.tar", samples)
    data = tar.path.read_bytes()
    assert data == written_by_tarfile(samples)
    assert (tar.bytes, tar.crc32c) == (len(data), google_crc32c.value(data))


@in_folder
@given(samples=samples_drawn)
def test_the_index_is_the_one_that_a_scan_finds(samples: Samples, tmp_path: Path) -> None:
    tar = write(tmp_path / "x.tar", samples)
    scanned, read = scan_tar(tar.path), read_index(index_path(tar.path), tar.path)
    for index in (tar.index, read):
        for name, column in vars(scanned).items():
            assert np.array_equal(getattr(index, name), column), name


@in_folder
@given(samples=samples_drawn.filter(len))
def test_webdataset_reads_it(samples: Samples, tmp_path: Path) -> None:
    tar = write(tmp_path / "x.tar", samples)
    read = {
        sample["__key__"]: {name: v for name, v in sample.items() if name[:2] != "__"}
        for sample in webdataset.WebDataset(str(tar.path), shardshuffle=False)
    }
    assert read == samples


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
def test_the_tar_program_reads_it(tmp_path: Path) -> None:
    samples = {
        "plain": {"jpg": b"1" * 700, "txt": b""},
        "ein/Fuß": {"depth.png": b"2" * 512},
        "l" * 98: {"json": b"{}", "mask.png": b"3"},
    }
    tar = write(tmp_path / "x.tar", samples)
    (tmp_path / "out").mkdir()
    command = ["tar", "-x", "-f", str(tar.path), "-C", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={"LC_ALL": "C.UTF-8"})
    assert (done.returncode, done.stderr) == (0, "")
    expected = {
        f"{k}.{f}": content for k, sample in samples.items() for f, content in sample.items()
    }
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in found} == expected


@pytest.mark.parametrize("size", [0, 1, 8**11 - 1, 8**11, 10**13])
@pytest.mark.parametrize("name", ["a.jpg", "é.jpg", "n" * 101])
def test_headers_of_any_size_are_those_of_tarfile(name: str, size: int) -> None:
    assert member_header(name, size) == member(name, size).tobuf(tarfile.PAX_FORMAT)


@given(st.integers(0, 1100))
def test_a_pax_record_states_its_own_length(size: int) -> None:
    record = pax_record(b"path", b"x" * size)
    assert int(record.partition(b" ")[0]) == len(record)


def test_large_members_pass_through_the_buffer(tmp_path: Path) -> None:
    large = hashlib.shake_128(b"seed").digest(3_000_001)
    samples = {f"k{i}": {"jpg": large[i:], "txt": b"t"} for i in range(3)}
    assert write(tmp_path / "x.tar", samples).path.read_bytes() == written_by_tarfile(samples)


def test_no_sample_is_a_tar_too(tmp_path: Path) -> None:
    tar = write(tmp_path / "x.tar", {})
    assert tar.path.read_bytes() == bytes(10240)
    assert len(tar.index) == len(read_index(index_path(tar.path), tar.path)) == 0


def test_nothing_appears_before_it_is_complete(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    tar.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), TarShardWriter(tar) as writer:
        writer.write("a", {"jpg": b"1"})
        assert tar.read_bytes() == b"old"
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    with TarShardWriter(tar) as writer:
        writer.write("a", {"jpg": b"1"})
        assert "a" in writer
        assert "b" not in writer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.idx", "x.tar"]
    assert tar.read_bytes() == written_by_tarfile({"a": {"jpg": b"1"}})


def test_a_key_comes_once(tmp_path: Path) -> None:
    with (
        pytest.raises(ShardError, match=r"x\.tar: sample 'a' appears twice"),
        TarShardWriter(tmp_path / "x.tar") as writer,
    ):
        for key in ("a", "b", "a"):
            writer.write(key, {"jpg": b"1"})
    assert not any(tmp_path.iterdir())


BAD_KEYS = ["", "a.b", ".a", "/a", "../a", "a/../b", "a/", "a\0", "__m__/a", "\udc80"]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_keys_that_would_not_be_read_back_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="key "), TarShardWriter(tmp_path / "x.tar") as writer:
        writer.write(key, {"jpg": b"1"})


@pytest.mark.parametrize("field", ["", "JPG", "a/b", "bäh", "x\0"])
def test_fields_that_would_not_be_read_back_are_refused(field: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="field "), TarShardWriter(tmp_path / "x.tar") as writer:
        writer.write("a", {field: b"1"})
