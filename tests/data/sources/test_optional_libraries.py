"""Without a library that is optional, the message says what to install."""

import sys
from pathlib import Path
from typing import Any

import pytest

from groundwork.data.annotations import Rle, segmentation_mask
from groundwork.data.sources import json_files
from groundwork.data.sources.clips import read_clip
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.imagenet import ImagenetConfig, imagenet_concepts
from groundwork.data.sources.img2dataset import Img2datasetConfig, img2dataset_samples
from groundwork.data.sources.json_files import JsonFile
from groundwork.data.sources.upright import upright_segmentation
from groundwork.data.sources.video import VideoConfig, video_samples


def test_videos_need_pyav(tmp_path: Path, put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    put(tmp_path / "a.mp4", b"x")
    with pytest.raises(SourceError, match=r"pip install .groundwork-pretrain\[video\]"):
        list(video_samples(VideoConfig(tmp_path, skip_bad=True)))
    with pytest.raises(SourceError, match=r"\[video\]"):
        read_clip(b"x", [0])


def test_masks_need_pycocotools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"groundwork-pretrain\[annotations\]"):
        segmentation_mask(Rle((2, 2), (4,)), 2, 2)
    with pytest.raises(SourceError, match=r"groundwork-pretrain\[annotations\]"):
        upright_segmentation(Rle((2, 2), (4,)), 6, (2, 2))


def test_large_annotation_files_need_ijson(
    tmp_path: Path, put: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ijson", None)
    file = JsonFile(put(tmp_path / "small.json", {"images": []}))
    assert list(file.records("images")) == []
    monkeypatch.setattr(json_files, "LARGE_FILE", 0)
    with pytest.raises(SourceError, match=r"groundwork-pretrain\[annotations\]"):
        list(JsonFile(put(tmp_path / "large.json", {"images": []})).records("images"))


def test_the_development_kit_needs_scipy(
    tmp_path: Path, put: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    put(tmp_path / "ILSVRC2012_devkit_t12" / "data" / "meta.mat", b"MATLAB 5.0 MAT-file")
    with pytest.raises(SourceError, match=r"\[annotations\]', or put Kaggle's LOC_synset"):
        imagenet_concepts(ImagenetConfig(tmp_path))


def test_tables_of_img2dataset_need_pyarrow(
    tmp_path: Path, put: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    put(tmp_path / "00000.tar", bytes(10240))
    put(tmp_path / "00000.parquet", b"PAR1")
    put(tmp_path / "00000_stats.json", {"successes": 0})
    with pytest.raises(SourceError, match=r"\[parquet\].*--no-check-tables"):
        list(img2dataset_samples(Img2datasetConfig(tmp_path, skip_bad=True)))
    assert list(img2dataset_samples(Img2datasetConfig(tmp_path, check_tables=False))) == []
