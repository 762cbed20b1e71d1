"""`groundwork shards build KIND`: from raw data in their published layout to an open data set."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from groundwork.data.annotations import annotations_from_info
from groundwork.data.dataset import open_dataset
from groundwork.data.shards import read_manifest
from groundwork.launch.cli import main
from groundwork.launch.shards import build_app

KINDS = {
    "coco",
    "coco-captions",
    "energon",
    "flickr30k",
    "git-tsv",
    "huggingface",
    "imagenet",
    "img2dataset",
    "lvis",
    "mdetr",
    "objects365",
    "rgbd-sod",
    "soba",
    "video",
    "visha",
    "visual-genome",
    "vqa",
    "webdataset",
}


def picture(size: tuple[int, int] = (8, 6), image_format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (3, 80, 160)).save(buffer, image_format)
    return buffer.getvalue()


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    for split, box in (("train", [1, 1, 4, 4]), ("val", [0, 0, 99, 2])):
        (root / f"{split}2017").mkdir(parents=True)
        (root / f"{split}2017" / "1.jpg").write_bytes(picture())
        record = {
            "images": [{"id": 1, "file_name": "1.jpg", "width": 8, "height": 6}],
            "annotations": [{"id": 5, "image_id": 1, "category_id": 18, "bbox": box}],
            "categories": [{"id": 18, "name": "dog"}],
        }
        (root / "annotations").mkdir(exist_ok=True)
        file = root / "annotations" / f"instances_{split}2017.json"
        file.write_text(json.dumps(record))
    return root


def test_every_kind_has_a_command_that_explains_itself() -> None:
    group = typer.main.get_command(build_app)
    commands: dict[str, Any] = group.commands  # type: ignore[attr-defined]
    assert set(commands) >= KINDS
    for name in KINDS:
        assert commands[name].help, name
        options = {option.name: option for option in commands[name].params}
        assert {"out", "check", "skip_bad", "licence", "overwrite"} <= set(options), name
        assert all(getattr(o, "help", "") for o in options.values() if o.name != "help"), name


def test_coco_becomes_a_data_set_with_classes(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["shards", "build", "coco", str(coco), "--out", str(out), "--licence", "CC BY"]
    assert main(arguments) == 0
    assert "1 boxes cut to their picture" in capsys.readouterr().err
    manifest = read_manifest(out)
    assert manifest.licence == "CC BY" and manifest.name == "coco"
    assert manifest.source["kind"] == "coco" and manifest.source["splits"] == ["train", "val"]
    dataset = open_dataset(str(out), "val")
    assert [concept.name for concept in dataset.concepts] == ["dog"]
    (box,) = annotations_from_info(dataset.read(0).info).boxes
    assert (box.xyxy, box.label) == ((0, 0, 8, 2), 0)
    assert main(arguments) == 0
    assert "already built with these settings" in " ".join(capsys.readouterr().err.split())
    assert main([*arguments, "--split", "val"]) == 1
    assert "other settings" in capsys.readouterr().err
    assert main([*arguments, "--split", "val", "--overwrite"]) == 0
    assert set(read_manifest(out).splits) == {"val"}


def test_checking_lists_what_is_bad_and_writes_nothing(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["shards", "build", "coco", str(coco), "--check"]) == 0
    assert "val: 1 samples" in capsys.readouterr().out
    (coco / "train2017" / "1.jpg").write_bytes(b"<html>")
    assert main(["shards", "build", "coco", str(coco), "--check"]) == 1
    captured = capsys.readouterr()
    assert "1 image skipped" in captured.out
    (line,) = [line for line in captured.err.splitlines() if line.startswith("bad: ")]
    assert line.endswith("1.jpg is neither a JPEG, nor a PNG, nor a WebP image")
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_items_end_the_build_or_are_listed(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (coco / "train2017" / "1.jpg").unlink()
    arguments = ["shards", "build", "coco", str(coco), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "image 1: image file" in error and "--skip-bad" in error
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--skip-bad"]) == 0
    assert "1 image skipped" in capsys.readouterr().err
    assert set(read_manifest(tmp_path / "out").splits) == {"val"}


def test_neither_out_nor_check_is_an_error(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "build", "coco", str(coco)]) == 1
    assert "give --out FOLDER, or --check" in capsys.readouterr().err
    inside = str(coco / "out")
    assert main(["shards", "build", "coco", str(coco), "--out", inside]) == 1
    assert "lie in one another" in capsys.readouterr().err


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_empty_folder_is_an_error_that_names_it(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    more = {"mdetr": ["--images", str(root)], "rgbd-sod": ["--near", "dark"]}.get(kind, [])
    raw = root / "x" if kind in ("mdetr", "git-tsv") else root
    out = ["--out", str(tmp_path / "out")]
    for arguments in ([], ["--skip-bad"]):
        assert main(["shards", "build", kind, str(raw), *more, *out, *arguments]) == 1
        error = capsys.readouterr().err
        assert "error: " in error and str(root) in error
    assert sorted(tmp_path.iterdir()) == [root]


def test_the_licence_of_a_repository_is_kept(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    root.mkdir()
    (root / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Pictures\n")
    with tarfile.open(root / "train-0.tar", "w") as tar:
        for name, content in (("0.jpg", picture()), ("0.txt", b"blue")):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    out = tmp_path / "out"
    assert main(["shards", "build", "huggingface", str(root), "--out", str(out)]) == 0
    assert read_manifest(out).licence == "cc0-1.0"
    assert open_dataset(str(out)).read(0).text == "blue"


def test_tars_are_built_by_any_number_of_processes_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "tars"
    root.mkdir()
    for number in range(3):
        with tarfile.open(root / f"{number}.tar", "w") as tar:
            for name, content in (("a.jpg", picture((8 + number, 6))), ("b.jpg", b"<html>")):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    digests = []
    for workers in ("1", "2"):
        out = tmp_path / f"out{workers}"
        arguments = ["shards", "build", "webdataset", str(root), "--out", str(out), "--skip-bad"]
        assert main([*arguments, "--workers", workers]) == 0
        assert capsys.readouterr().err.count("skipped: ") == 3
        digests.append(read_manifest(out).digest())
        assert read_manifest(out).samples("train") == 3
    assert digests[0] == digests[1]


def test_karpathys_splits_from_the_command_line(tmp_path: Path) -> None:
    root = tmp_path / "k"
    (root / "val2014").mkdir(parents=True)
    images = []
    for number, split in enumerate(("train", "restval", "val", "test")):
        (root / "val2014" / f"{number}.jpg").write_bytes(picture())
        sentences = [{"raw": f"caption {number}"}]
        images.append(
            {
                "filepath": "val2014",
                "filename": f"{number}.jpg",
                "cocoid": number,
                "split": split,
                "sentences": sentences,
            }
        )
    (root / "dataset_coco.json").write_text(json.dumps({"images": images}))
    out = tmp_path / "out"
    build = ["shards", "build", "coco-captions", str(root), "--karpathy", "--out", str(out)]
    assert main(build) == 0
    manifest = read_manifest(out)
    assert {s: manifest.samples(s) for s in manifest.splits} == {"train": 2, "val": 1, "test": 1}
