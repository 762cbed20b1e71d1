"""`groundwork shards build scenes`, as a user runs it."""

import json
from pathlib import Path

import pytest

from groundwork.data.dataset import open_dataset
from groundwork.data.shards import read_concepts, read_manifest
from groundwork.launch.cli import main

FEW = ["--train", "6", "--val", "2", "--compositional", "2", "--image-size", "48"]


def build(out: Path, *arguments: str) -> int:
    return int(main(["shards", "build", "scenes", "--out", str(out), *FEW, *arguments]))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def stills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "stills"
    assert build(out, "--workers", "1") == 0
    return out


def test_the_data_set_says_that_it_is_synthetic(stills: Path) -> None:
    manifest = read_manifest(stills)
    assert {split: manifest.samples(split) for split in manifest.splits} == {
        "train": 6,
        "val": 2,
        "compositional": 2,
    }
    assert manifest.source["synthetic"] is True
    assert "Synthetic" in manifest.licence and "CC0" in manifest.licence
    assert "Synthetic" in (stills / "README.md").read_text()
    concepts = read_concepts(stills)
    assert len(concepts) == 32 and all(c.info["synthetic"] for c in concepts)


def test_samples_can_be_read_back(stills: Path) -> None:
    data = open_dataset(str(stills), "train")
    sample = data.read(3)
    assert set(sample.members) == {"depth.png", "instances.png", "mask.png", "shadows.png"}
    assert sample.text == sample.info["captions"][0]
    assert json.loads(json.dumps(sample.info)) == sample.info


def test_workers_do_not_change_the_data_set(stills: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "again", "--workers", "2") == 0
    assert files(tmp_path / "again") == files(stills)


def test_building_again_does_nothing_and_other_settings_are_refused(
    stills: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(stills)
    assert build(stills) == 0
    assert "already built" in capsys.readouterr().err
    assert build(stills, "--seed", "1") == 1
    assert "holds another data set" in capsys.readouterr().err
    assert files(stills) == before


def test_clips_are_built_in_both_formats(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="pip install 'groundwork-pretrain[video]'")
    for clip_format, member in (("auto", "mp4"), ("png", "frame.0001.png")):
        out = tmp_path / clip_format
        assert build(out, "--frames", "2", "--clip-format", clip_format, "--workers", "1") == 0
        sample = open_dataset(str(out), "val").read(0)
        assert member in sample.members
        assert not sample.image
        assert sample.info["frames"] == 2


def test_bad_settings_end_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(tmp_path / "out", "--max-objects", "9") == 1
    assert "give a range within 1 to 6" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
