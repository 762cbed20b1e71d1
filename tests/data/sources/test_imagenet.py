"""ImageNet's archives: tars in a tar, and a development kit that counts in another order."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.imagenet import (
    ImagenetConfig,
    imagenet_concepts,
    imagenet_samples,
)
from groundwork.data.sources.report import ImportReport

# ILSVRC2012_ID does not follow the order of WordNet ids; 3 is no leaf
SYNSETS = [
    (1, "n02119789", "kit fox, Vulpes macrotis", 0),
    (2, "n01440764", "tench, Tinca tinca", 0),
    (3, "n00001740", "entity", 2),
]


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def meta_mat() -> bytes:
    fields = [(n, object) for n in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    table = np.zeros((len(SYNSETS), 1), dtype=fields)
    for row, (number, wordnet_id, words, children) in zip(table, SYNSETS, strict=True):
        row[0] = (float(number), wordnet_id, words, "a gloss", float(children))
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": table})
    return buffer.getvalue()


DEVKIT_FILES = {
    "ILSVRC2012_devkit_t12/readme.txt": b"ImageNet",
    "ILSVRC2012_devkit_t12/data/meta.mat": meta_mat(),
    "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"2\n1\n",
}


@pytest.fixture
def root(tmp_path: Path, picture: Any) -> Path:
    classes = {
        f"{wordnet_id}.tar": tar_bytes(
            {
                f"{wordnet_id}_{number}.JPEG": picture(colour=10 * order + number)
                for number in (18, 2)
            }
        )
        for order, wordnet_id in enumerate(("n01440764", "n02119789"))
    }
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(classes))
    val = {
        "ILSVRC2012_val_00000001.JPEG": picture(colour=101),
        # as n02105855_2933.JPEG, a PNG under a wrong name
        "ILSVRC2012_val_00000002.JPEG": picture(colour=102, image_format="PNG"),
    }
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val))
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as kit:
        for name, content in DEVKIT_FILES.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            kit.addfile(header, io.BytesIO(content))
    return tmp_path


def unpack_devkit(root: Path) -> None:
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    for name, content in DEVKIT_FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def kaggle(root: Path) -> None:
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    mapping = "n02119789 kit fox, Vulpes macrotis\nn01440764 tench, Tinca tinca\n"
    (root / "LOC_synset_mapping.txt").write_text(mapping)
    (root / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000002,n02119789 1 2 3 4 n02119789 1 2 3 4\n"
        "ILSVRC2012_val_00000001,n01440764 85 1 499 272\n"
    )


def as_is(_root: Path) -> None:
    pass


@pytest.mark.parametrize("prepare", [as_is, unpack_devkit, kaggle])
def test_imagenet_is_read_from_its_archives(root: Path, picture: Any, prepare: Any) -> None:
    prepare(root)
    config = ImagenetConfig(root)
    pairs = list(imagenet_samples(config))
    assert [(split, s.key, s.text, s.info["label"]) for split, s in pairs] == [
        ("train", "n01440764_18", "tench", 0),
        ("train", "n01440764_2", "tench", 0),
        ("train", "n02119789_18", "kit fox", 1),
        ("train", "n02119789_2", "kit fox", 1),
        ("val", "ILSVRC2012_val_00000001", "tench", 0),
        ("val", "ILSVRC2012_val_00000002", "kit fox", 1),
    ]
    assert [s.image for _, s in pairs[:4]] == [picture(colour=n) for n in (18, 2, 28, 12)]
    assert [s.image_format for _, s in pairs[4:]] == ["jpg", "png"]
    assert [(c.label, c.name, c.aliases) for c in imagenet_concepts(config)] == [
        (0, "tench", ("Tinca tinca",)),
        (1, "kit fox", ("Vulpes macrotis",)),
    ]
    assert len(list(imagenet_samples(ImagenetConfig(root, splits=("val",))))) == 2


def test_a_picture_that_is_none_is_named_or_counted(root: Path, picture: Any) -> None:
    inner = tar_bytes({"n01440764_1.JPEG": b"<html>", "n01440764_2.JPEG": picture()})
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes({"n01440764.tar": inner}))
    with pytest.raises(
        SourceError, match=r"train.tar: n01440764.tar: n01440764_1.JPEG: is neither"
    ):
        list(imagenet_samples(ImagenetConfig(root)))
    report = ImportReport()
    assert len(list(imagenet_samples(ImagenetConfig(root, skip_bad=True), report))) == 3
    assert report.skipped == {"image": 1}


def cut_train(root: Path) -> None:
    tar = root / "ILSVRC2012_img_train.tar"
    tar.write_bytes(tar.read_bytes()[:3000])


def train_of(files: dict[str, bytes]) -> Any:
    return lambda root: (root / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(files))


def ground_truth(text: str) -> Any:
    def change(root: Path) -> None:
        unpack_devkit(root)
        name = "data/ILSVRC2012_validation_ground_truth.txt"
        (root / "ILSVRC2012_devkit_t12" / name).write_text(text)

    return change


def kaggle_without_solution(root: Path) -> None:
    kaggle(root)
    (root / "LOC_val_solution.csv").unlink()


def strange_mapping(root: Path) -> None:
    kaggle(root)
    (root / "LOC_synset_mapping.txt").write_text("tench\n")


def strange_solution(root: Path) -> None:
    kaggle(root)
    (root / "LOC_val_solution.csv").write_text("ImageId,P\nILSVRC2012_val_00000001,n00000001 1\n")


def strange_meta(root: Path) -> None:
    unpack_devkit(root)
    (root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").write_bytes(b"no matrix" * 99)


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda r: (r / "ILSVRC2012_img_train.tar").unlink(), "img_train.tar: missing"),
        (lambda r: (r / "ILSVRC2012_devkit_t12.tar.gz").unlink(), "neither ILSVRC2012_devkit_t12"),
        (lambda r: (r / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"x"), "meta.mat cannot be"),
        (cut_train, r"n01440764.tar: .*(cut short|not a readable tar)"),
        (train_of({"a.txt": b""}), "holds 'a.txt'; expected the tars of the classes"),
        (train_of({"n00000009.tar": b""}), "n00000009.tar: this class is not among the 2 known"),
        (train_of({"n01440764.tar": b"no tar" * 999}), "n01440764.tar: not a readable tar"),
        (ground_truth("2\n3\n"), "line 2 is '3'; expected a class number"),
        (ground_truth("2\n"), "ILSVRC2012_val_00000002.JPEG: its class is not in the ground truth"),
        (kaggle_without_solution, r"but not LOC_val_solution.csv"),
        (strange_mapping, "LOC_synset_mapping.txt: line 1: expected"),
        (strange_solution, "class 'n00000001' is not in LOC_synset_mapping.txt"),
        (strange_meta, "meta.mat: not the table of synsets"),
    ],
)
def test_what_is_wrong_with_the_archives_is_named(root: Path, damage: Any, complaint: str) -> None:
    damage(root)
    with pytest.raises(SourceError, match=complaint):
        list(imagenet_samples(ImagenetConfig(root)))


def test_links_in_an_archive_are_refused(root: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("n01440764.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../secret.tar"
        tar.addfile(link)
    (root / "ILSVRC2012_img_train.tar").write_bytes(buffer.getvalue())
    with pytest.raises(SourceError, match="is a link or a device; refused"):
        list(imagenet_samples(ImagenetConfig(root)))
    with pytest.raises(SourceError, match="no split 'test'"):
        ImagenetConfig(root, splits=("test",))
