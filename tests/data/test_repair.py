import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from groundwork.data.dataset import open_dataset
from groundwork.data.diagnosis import Diagnosis
from groundwork.data.repair import repair
from groundwork.data.samples import Concept, Sample
from groundwork.data.shard_check import Checks
from groundwork.data.shard_index import ShardError
from groundwork.data.shards import is_data_set, read_concepts, read_manifest, write_shards
from groundwork.data.verify import verify
from groundwork.launch.cli import main


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (seed, 2 * seed, 3 * seed)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def members(directory: Path) -> dict[str, bytes]:
    found = {}
    for tar in sorted(directory.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive.getmembers():
                content = archive.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    return found


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    samples = [
        (split, Sample(f"{split}{i}", picture(i), "png", f"text {i}", {"label": i % 2}))
        for split in ("train", "val")
        for i in range(5)
    ]
    write_shards(
        samples,
        tmp_path / "o",
        name="corpus",
        source={"kind": "test"},
        licence="CC0",
        concepts=[Concept(0, "zero"), Concept(1, "one", ("uno",))],
        max_samples=2,
    )
    return tmp_path / "o"


def test_a_good_data_set_is_copied_as_it_is(data_set: Path, tmp_path: Path) -> None:
    result = repair(str(data_set), tmp_path / "r")
    assert result.left_out == 0
    assert result.report.is_good
    for path in data_set.iterdir():
        if path.suffix in (".tar", ".idx"):
            assert (tmp_path / "r" / path.name).read_bytes() == path.read_bytes()
    before, after = read_manifest(data_set), read_manifest(tmp_path / "r")
    assert after.splits == before.splits
    assert (after.name, after.licence) == ("corpus", "CC0")
    assert after.source == {"kind": "repair", "of": {"kind": "test"}}
    assert read_concepts(tmp_path / "r") == read_concepts(data_set)


def test_what_foreign_tars_hold_is_kept_byte_for_byte(tmp_path: Path) -> None:
    content = [
        ("n01/a.JPG", picture(1)),
        ("n01/a.cls", b"7"),
        ("n01/a.json", b'{"b": 1,   "a": 2.50}'),
        ("n01/a.seg-1.png", b"anything"),
        ("n01/a.txt", b" blanks \n"),
        ("ж.png", picture(2)),
        ("ж.txt", "два".encode()),
    ]
    write_tar(tmp_path / "o" / "x.tar", [*content, ("ж.pyd", b"cos\nsystem\n.")])
    result = repair(str(tmp_path / "o"), tmp_path / "r")
    assert members(tmp_path / "r") == {name.replace("JPG", "jpg"): d for name, d in content}
    assert {f.diagnosis for f in result.report.findings} >= {Diagnosis.UNSAFE_FIELD}
    manifest = read_manifest(tmp_path / "r")
    assert (manifest.name, list(manifest.splits)) == ("o", ["train"])
    assert open_dataset(str(tmp_path / "r")).read(0).text == " blanks \n"


def test_repair_json_says_what_is_left_out_and_what_is_mended(
    data_set: Path, tmp_path: Path
) -> None:
    tar = data_set / "train-000001.tar"
    data = tar.read_bytes()
    with tarfile.open(tar) as archive:
        begin = archive.getmember("train3.png").offset_data
    tar.write_bytes(data[:begin] + b"?" + data[begin + 1 :])
    (data_set / "val-000000.idx").write_bytes(b"nothing")
    result = repair(str(data_set), tmp_path / "r")
    record = json.loads((tmp_path / "r" / "repair.json").read_bytes())
    assert record["samples"] == 9
    assert result.left_out == 1
    assert record["left_out"] == [
        {
            "shard": "train-000001.tar",
            "key": "train3",
            "offset": begin,
            "diagnosis": "damaged-member",
            "detail": "member 'png' fails its checksum",
        }
    ]
    (mended,) = record["mended"]
    assert (mended["shard"], mended["diagnosis"]) == ("val-000000.tar", "damaged-index")
    assert verify(str(tmp_path / "r"), Checks(decode=True)).is_good


def test_a_repaired_data_set_is_one_that_may_be_replaced(data_set: Path, tmp_path: Path) -> None:
    repair(str(data_set), tmp_path / "r")
    assert is_data_set(tmp_path / "r")
    again = repair(str(data_set), tmp_path / "r")
    assert again.left_out == 0


def test_without_its_manifest_a_data_set_keeps_its_splits(data_set: Path, tmp_path: Path) -> None:
    (data_set / "manifest.json").write_bytes(b"\0" * 50)
    repair(str(data_set), tmp_path / "r")
    manifest = read_manifest(tmp_path / "r")
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 5, "val": 5}
    assert members(tmp_path / "r") == members(data_set)


@pytest.mark.parametrize("out", ["o", "o/r", ""])
def test_the_original_is_not_written_into(out: str, data_set: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in data_set.iterdir()}
    with pytest.raises(ShardError, match="lie in one another"):
        repair(str(data_set), tmp_path / out)
    assert before == {path.name: path.read_bytes() for path in data_set.iterdir()}


def test_nothing_of_others_is_replaced(data_set: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.tex").write_text("years of work")
    with pytest.raises(ShardError, match="choose another folder"):
        repair(str(data_set), tmp_path / "r")
    assert (tmp_path / "r" / "thesis.tex").is_file()


def test_a_copy_that_is_interrupted_leaves_nothing(data_set: Path, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(str(data_set), tmp_path / "r", on_shard=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_without_a_good_sample_nothing_is_written(tmp_path: Path) -> None:
    write_tar(tmp_path / "o" / "x.tar", [("a.jpg", b"<html>"), ("b.jpg", b"")])
    with pytest.raises(ShardError, match="no sample of it is good"):
        repair(str(tmp_path / "o"), tmp_path / "r")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o"]


def test_what_does_not_decode_stays_where_that_is_asked_for(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((60, 40), 50).save(buffer, "JPEG")
    content = [("a.jpg", buffer.getvalue()[:-99]), ("b.png", picture(2))]
    write_tar(tmp_path / "o" / "x.tar", content)
    assert repair(str(tmp_path / "o"), tmp_path / "r").left_out == 1
    assert repair(str(tmp_path / "o"), tmp_path / "s", Checks(decode=False)).left_out == 0
    assert members(tmp_path / "s") == dict(content)


def test_names_that_are_not_utf8_are_kept_as_the_index_has_them(tmp_path: Path) -> None:
    tar = tmp_path / "o" / "x.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        member = tarfile.TarInfo("caf\xe9.png")
        member.size = len(picture(1))
        archive.addfile(member, io.BytesIO(picture(1)))
    repair(str(tmp_path / "o"), tmp_path / "r")
    assert members(tmp_path / "r") == {"caf\\udce9.png": picture(1)}
    original, copy = (open_dataset(str(tmp_path / name)) for name in "or")
    assert original.where(0)[1] == copy.where(0)[1] == "caf\\udce9"


def test_the_command_repairs(
    data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data_set / "train-000000.tar").write_bytes(b"<html>")
    out = str(tmp_path / "r")
    assert main(["shards", "repair", str(data_set), "--out", out, "--workers", "1"]) == 0
    assert (
        "8 samples of 10; repair.json lists the 0 that were found and left out"
        in capsys.readouterr().out
    )
    assert main(["shards", "verify", out, "--decode", "--workers", "1"]) == 0
    assert main(["shards", "repair", str(tmp_path / "none"), "--out", out]) == 1
