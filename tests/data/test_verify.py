import io
import json
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from groundwork.data.diagnosis import Diagnosis, Policy
from groundwork.data.samples import Sample
from groundwork.data.shard_check import Checks
from groundwork.data.shard_index import index_path, read_index, scan_tar
from groundwork.data.shards import write_shards
from groundwork.data.side_cars import write_side_cars
from groundwork.data.verify import find_shards, verify
from groundwork.launch.cli import main
from groundwork.launch.shards_check import printable

SAMPLES, PER_SHARD = 10, 3


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    folder = tmp_path / "o"
    samples = (
        ("train" if i < 8 else "val", Sample(f"k{i}", jpeg(), "jpg", f"text {i}"))
        for i in range(SAMPLES)
    )
    write_shards(samples, folder, name="n", source={}, licence="l", max_samples=PER_SHARD)
    return folder


def flip(tar: Path, name: str, at: int = 100) -> int:
    """Flip a bit of a member; returns where the member begins."""
    with tarfile.open(tar) as archive:
        begin = archive.getmember(name).offset_data
    data = bytearray(tar.read_bytes())
    data[begin + at] ^= 4
    tar.write_bytes(data)
    return begin


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_a_good_data_set_is_good(data_set: Path) -> None:
    before = {path.name: path.read_bytes() for path in data_set.iterdir()}
    report = verify(str(data_set), Checks(decode=True))
    assert (report.is_good, report.findings) == (True, [])
    tars = sorted(data_set.glob("*.tar"))
    assert (report.shards, report.samples) == (len(tars), SAMPLES)
    assert report.bytes == sum(tar.stat().st_size for tar in tars)
    assert before == {path.name: path.read_bytes() for path in data_set.iterdir()}


def test_workers_find_the_same_in_the_same_order(data_set: Path) -> None:
    for number in range(3):
        flip(data_set / f"train-{number:06d}.tar", f"k{3 * number + 1}.jpg")
    (data_set / "val-000000.idx").write_bytes(b"")
    seen: list[int] = []
    alone = verify(str(data_set))
    report = verify(str(data_set), workers=2, on_progress=lambda shard: seen.append(shard.bytes))
    assert report == alone
    assert len(report.findings) == 4
    assert sum(seen) == report.bytes


def test_an_image_is_decoded_where_that_is_asked_for(data_set: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", jpeg()[:-9]), ("a.txt", b"t")])
    where = str(tmp_path / "x.tar")
    assert verify(where).is_good
    findings = verify(where, Checks(decode=True)).findings
    assert [f.diagnosis for f in findings if f.diagnosis.is_bad] == [Diagnosis.DAMAGED_IMAGE]


def test_required_fields_are_missed_by_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", jpeg()), ("a.json", b"{}"), ("b.jpg", jpeg())])
    where = str(tmp_path / "x.tar")

    def missed(*required: str) -> list[tuple[str, Diagnosis]]:
        found = verify(where, Checks(required=required)).findings
        return [(f.key, f.diagnosis) for f in found if f.diagnosis.is_bad]

    assert missed() == missed("image") == missed("jpg") == []
    assert missed("json", "image") == [("b", Diagnosis.MISSING_FIELD)]
    assert [key for key, _ in missed("png")] == ["a", "b"]


def test_captions_are_missed_only_where_others_have_them(tmp_path: Path) -> None:
    where = str(tmp_path / "x.tar")
    pictures = [("a.jpg", jpeg()), ("b.jpg", jpeg())]
    write_tar(tmp_path / "x.tar", pictures)
    assert verify(where).is_good
    write_tar(tmp_path / "x.tar", [*pictures, ("c.jpg", jpeg()), ("c.txt", b"caption")])
    found = verify(where).findings
    bad = [(f.key, f.diagnosis) for f in found if f.diagnosis.is_bad]
    assert bad == [("a", Diagnosis.MISSING_CAPTION), ("b", Diagnosis.MISSING_CAPTION)]


def test_the_same_key_in_two_splits_is_no_fault(tmp_path: Path) -> None:
    samples = [(split, Sample("k", jpeg(), "jpg", "t")) for split in ("train", "val")]
    write_shards(samples, tmp_path / "o", name="n", source={}, licence="l")
    assert verify(str(tmp_path / "o")).is_good


@pytest.mark.parametrize("pattern", ["", "/train-*.tar", "/train-{000000..000002}.tar"])
def test_tars_are_found_by_folder_and_pattern(pattern: str, data_set: Path) -> None:
    if not pattern:
        (data_set / "manifest.json").unlink()
        (data_set / "val-000000.tar").unlink()
    report = verify(f"{data_set}{pattern}")
    assert (report.is_good, report.shards, report.samples) == (True, 3, 8)


def test_a_tar_that_braces_promise_is_missed(data_set: Path) -> None:
    (finding,) = verify(f"{data_set}/train-{{000000..000003}}.tar").findings
    assert finding[:4] == ("train-000003.tar", "", 0, Diagnosis.MISSING_SHARD)


def test_the_command_lists_shard_key_offset_and_fails(
    data_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "verify", str(data_set), "--workers", "1"]) == 0
    assert capsys.readouterr().out == ""
    offset = flip(data_set / "train-000001.tar", "k4.jpg")
    assert main(["shards", "verify", str(data_set), "--workers", "1"]) == 1
    told = capsys.readouterr()
    (line,) = told.out.splitlines()
    assert line.split("\t") == [
        "train-000001.tar",
        "k4",
        str(offset),
        "damaged-member",
        "member 'jpg' fails its checksum",
    ]
    assert "something is bad" in told.err
    assert "damaged-member" in told.err


def test_the_command_speaks_json(data_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offset = flip(data_set / "train-000001.tar", "k4.jpg")
    index_path(data_set / "val-000000.tar").unlink()
    assert main(["shards", "verify", str(data_set), "--json", "--workers", "1"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["counts"] == {"missing-index": 1, "damaged-member": 1}
    assert (record["is_good"], record["samples"], record["shards"]) == (False, SAMPLES, 4)
    first = record["findings"][0]
    assert (first["shard"], first["key"], first["offset"]) == ("train-000001.tar", "k4", offset)
    assert (first["diagnosis"], first["policy"]) == ("damaged-member", "quarantine")


def test_notes_are_listed_on_demand(data_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index_path(data_set / "val-000000.tar").unlink()
    assert main(["shards", "verify", str(data_set), "--workers", "1"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["shards", "verify", str(data_set), "--notes", "--workers", "1"]) == 0
    assert capsys.readouterr().out.startswith("val-000000.tar\t-\t0\tmissing-index\t")


def test_nothing_to_check_is_another_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for where in (str(tmp_path), str(tmp_path / "x-*.tar"), "s3://bucket/corpus"):
        assert main(["shards", "verify", where]) == 2
        assert where in capsys.readouterr().err


def test_an_unreadable_tar_is_a_finding(data_set: Path) -> None:
    tar = data_set / "train-000001.tar"
    tar.unlink()
    tar.mkdir()  # root reads what has no permissions, but nobody reads a folder
    found = {(f.file, f.diagnosis) for f in verify(str(data_set)).findings}
    assert found == {("train-000001.tar", Diagnosis.UNREADABLE)}


def test_names_of_a_tar_do_not_reach_the_terminal_as_they_are(tmp_path: Path) -> None:
    assert printable("a\x1b[2J\nb\tж雪") == "a\\x1b[2J\\nb\\tж雪"


def test_index_writes_what_is_missing_or_damaged(
    data_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [index_path(data_set / f"train-{number:06d}.tar") for number in range(3)]
    whole = [path.read_bytes() for path in paths]
    paths[0].unlink()
    paths[1].write_bytes(whole[1][:50])
    assert main(["shards", "index", str(data_set)]) == 0
    assert capsys.readouterr().out == "written: 2, kept: 2, refused: 0\n"
    assert [path.read_bytes() for path in paths] == whole
    flip(data_set / "train-000000.tar", "k1.jpg")
    paths[0].unlink()
    assert main(["shards", "index", str(data_set)]) == 1
    told = capsys.readouterr()
    assert told.out == "written: 0, kept: 3, refused: 1\n"
    assert "train-000000.tar: the tar has another checksum" in told.err
    assert not paths[0].exists()


def test_index_of_plain_tars(data_set: Path) -> None:
    (data_set / "manifest.json").unlink()
    tar = data_set / "train-000000.tar"
    flip(tar, "k1.jpg")
    (data_set / "train-000001.tar").write_bytes(b"no tar")
    index_path(data_set / "train-000001.tar").unlink()
    outcomes = {s.file: s.outcome for s in write_side_cars(str(data_set), rebuild=True)}
    assert outcomes.pop("train-000001.tar") == "refused"
    assert set(outcomes.values()) == {"written"}
    assert read_index(index_path(tar), tar).digest() == scan_tar(tar).digest()


def test_find_shards_gives_the_splits_of_a_manifest(data_set: Path) -> None:
    splits = find_shards(str(data_set)).splits
    assert {split: len(shards) for split, shards in splits.items()} == {"train": 3, "val": 1}
    assert splits["val"][0].samples == 2


def test_names_of_diagnoses_are_those_of_files_and_reports() -> None:
    assert len({d.value for d in Diagnosis}) == len(Diagnosis)
    assert all(d.value == d.value.lower() and " " not in d.value for d in Diagnosis)
    assert all(d.is_bad == (d.policy is not Policy.ACCEPT) for d in Diagnosis)


def test_the_documentation_lists_every_diagnosis_with_its_policy() -> None:
    page = (Path(__file__).parents[2] / "docs" / "faults.md").read_text("utf-8")
    table = page.partition("<!-- table: begin -->")[2].partition("<!-- table: end -->")[0]
    rows = [line.strip("|").split("|") for line in table.strip().splitlines()[2:]]
    listed = [tuple(cell.strip() for cell in row) for row in rows]
    assert listed == [(f"`{d.value}`", d.meaning, d.policy.value) for d in Diagnosis]
    # and every name that the rest of the page uses is one
    named = set(re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)+)`", page))
    assert named <= {d.value for d in Diagnosis}
    assert all(f"| {policy.value} |" in page for policy in Policy)
