import io
from pathlib import Path

import pytest
from PIL import Image

from groundwork.data.sources.image_folder import ImageFolderConfig, image_folder_units
from groundwork.launch.cli import main


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for number, name in enumerate(("cat", "dog", "owl")):
        (root / name).mkdir(parents=True)
        buffer = io.BytesIO()
        Image.new("RGB", (40 + number, 30), (9, 9, 9)).save(buffer, "PNG")
        (root / name / "1.png").write_bytes(buffer.getvalue())
        (root / name / "2.png").write_bytes(buffer.getvalue())
    return root


def test_stat_shows_histograms_and_duplicates(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    build = ["shards", "build", "image-folder", str(pictures), "--out", out, "--workers", "1"]
    assert main(build) == 0
    capsys.readouterr()
    assert main(["shards", "stat", out]) == 0
    shown = capsys.readouterr().out
    assert "images that occur more than once, byte for byte: 3 (3 samples too many" in shown
    assert "Width (px): min 40  mean 41  max 42" in shown
    assert "Length of the texts (characters): min 3  mean 3  max 3" in shown
    assert "train/cat-1-" in shown

    (tmp_path / "out" / "statistics.json").unlink()
    assert main(["shards", "stat", out]) == 0
    assert "no statistics.json" in capsys.readouterr().out


def test_a_build_that_failed_goes_on_when_the_file_is_mended(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last_unit = image_folder_units(ImageFolderConfig(pictures, val_fraction=0.5))[-1]
    bad = pictures / last_unit["files"][-1][2]
    good = bad.read_bytes()
    bad.write_bytes(b"<html>")
    out = tmp_path / "out"
    build = ["shards", "build", "image-folder", str(pictures), "--out", str(out)]
    build += ["--workers", "1", "--val-fraction", "0.5"]
    assert main(build) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert f"{bad}: is neither a JPEG, nor a PNG, nor a WebP image" in message
    assert "1 of 2 units are finished and kept in" in message
    assert not out.exists()
    bad.write_bytes(good)
    assert main(build) == 0
    assert "6 samples, 1 units from before" in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]
