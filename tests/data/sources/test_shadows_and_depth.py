"""SOBA, ViSha and the RGB-D sets in their published layouts."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from groundwork.data.annotations import Rle, annotations_from_info
from groundwork.data.samples import Sample
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.report import ImportReport
from groundwork.data.sources.rgbd_sod import RgbdSodConfig, rgbd_sod_samples
from groundwork.data.sources.soba import SobaConfig, soba_concepts, soba_samples
from groundwork.data.sources.visha import VishaConfig, visha_samples


def grey(size: tuple[int, int] = (8, 6), value: int = 0, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, value).save(buffer, image_format)
    return buffer.getvalue()


def samples_of(pairs: Any) -> list[Sample]:
    return [sample for _, sample in pairs]


# SOBA


def soba_annotation(number: int, category: int, pair: int, left: float) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": 3,
        "category_id": category,
        "bbox": [left, 1, 2, 2],
        "segmentation": {"size": [6, 8], "counts": "14" if category == 1 else [10, 2, 36]},
        "area": 2,
        "iscrowd": 0,
        "association": pair,
        "relation": [4.0, 2.0],
        "light": [0, 0],
    }


SOBA = {
    "images": [{"id": 3, "file_name": "SOBA/web-shadow0004.jpg", "height": 6, "width": 8}],
    "categories": [{"id": 1, "name": "Object"}, {"id": 2, "name": "Shadow"}],
    # in no useful order
    "annotations": [
        soba_annotation(11, 2, 2, 5),
        soba_annotation(12, 1, 2, 3),
        soba_annotation(13, 2, 1, 2),
        soba_annotation(14, 1, 1, 0),
    ],
    "association": [{"id": 1, "name": "association"}],
    "association_anno": [
        {"id": n, "image_id": 3, "category_id": 1, "bbox": [0, 1, 4, 2]} for n in (1, 2)
    ],
}


@pytest.fixture
def soba(tmp_path: Path, picture: Any, put: Any) -> Path:
    put(tmp_path / "annotations" / "SOBA_train_relation_v2.json", SOBA)
    put(tmp_path / "SOBA_val_v2.json", SOBA)
    put(tmp_path / "SOBA" / "web-shadow0004.jpg", picture())
    return tmp_path


@pytest.mark.parametrize("above", ["", "images"])
def test_soba_has_objects_first_and_shadows_in_the_same_order(
    soba: Path, picture: Any, put: Any, above: str
) -> None:
    if above:
        (soba / "SOBA" / "web-shadow0004.jpg").unlink()
        put(soba / above / "SOBA" / "web-shadow0004.jpg", picture())
    (split, sample), (other, _) = soba_samples(SobaConfig(soba))
    assert (split, other) == ("train", "val") and sample.image == picture()
    boxes = annotations_from_info(sample.info).boxes
    assert [(b.label, b.pair, b.id) for b in boxes] == [
        (0, 1, 14),
        (0, 2, 12),
        (1, 1, 13),
        (1, 2, 11),
    ]
    assert boxes[2].segmentation == Rle((6, 8), (10, 2, 36))
    assert boxes[0].segmentation == Rle((6, 8), "14")
    assert [c.name for c in soba_concepts(SobaConfig(soba))] == ["object", "shadow"]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda r: r["annotations"][0].update(association=1), "association 1 has 1 .* 2 shadow"),
        (lambda r: r["annotations"].pop(0), r"association 2 has 1 object\(s\) and 0 shadow"),
        (lambda r: r["annotations"][0].pop("association"), "annotation 11 has no number"),
        (lambda r: r["association_anno"].pop(), "has 2 pairs, `association_anno` has 1"),
        (lambda r: r["images"][0].update(file_name="x.jpg"), "image file is missing"),
    ],
)
def test_soba_names_pairs_that_do_not_fit(
    soba: Path, put: Any, change: Any, complaint: str
) -> None:
    record = json.loads(json.dumps(SOBA))
    change(record)
    put(soba / "SOBA_val_v2.json", record)
    with pytest.raises(SourceError, match=f"SOBA_val_v2.json: image 3: {complaint}"):
        list(soba_samples(SobaConfig(soba)))
    report = ImportReport()
    assert len(list(soba_samples(SobaConfig(soba, skip_bad=True), report))) == 1
    assert report.skipped == {"image": 1}


def test_soba_of_another_kind_is_refused(soba: Path, put: Any) -> None:
    put(soba / "SOBA_val_v2.json", SOBA | {"categories": [{"id": 1, "name": "Object"}]})
    with pytest.raises(SourceError, match="has 1 categories"):
        list(soba_samples(SobaConfig(soba, splits=("val",), skip_bad=True)))
    with pytest.raises(SourceError, match=r"SOBA_challenge_v2.json: annotation file is missing"):
        list(soba_samples(SobaConfig(soba, splits=("train", "challenge"))))
    with pytest.raises(SourceError, match="no split 'test'"):
        SobaConfig(soba, splits=("test",))


# ViSha


@pytest.fixture
def visha(tmp_path: Path, picture: Any, put: Any) -> Path:
    for split, video, frames in (("train", "dog", 11), ("train", "a-car.1", 2), ("test", "dog", 1)):
        for n in range(frames):
            # one video without leading zeros
            stem = str(n) if video == "dog" else f"{n:08d}"
            put(tmp_path / split / "images" / video / f"{stem}.jpg", picture(colour=n))
            put(tmp_path / split / "labels" / video / f"{stem}.png", grey(value=n))
    return tmp_path


def test_visha_frames_come_in_the_order_of_the_video(visha: Path, picture: Any) -> None:
    pairs = list(visha_samples(VishaConfig(visha)))
    assert [split for split, _ in pairs] == ["train"] * 13 + ["test"]
    dog = [s for _, s in pairs[2:13]]
    assert [s.info["source"]["number"] for s in dog] == list(range(11))
    assert [s.image for s in dog] == [picture(colour=n) for n in range(11)]
    assert [dict(s.members) for s in dog] == [{"mask.png": grey(value=n)} for n in range(11)]
    assert dog[10].info["source"] == {"video": "dog", "frame": "10", "number": 10, "frames": 11}
    assert len({s.key for _, s in pairs[:13]}) == 13


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("train/labels/dog/3.png", None, "images/dog/3.jpg: image file .*3.png is missing"),
        ("train/images/dog/3.jpg", None, "labels/dog/3.png: has no image"),
        ("train/labels/dog/3.png", grey((6, 8)), "its mask has 6 x 8 pixels, the image has 8 x 6"),
        ("train/labels/dog/3.png", grey(image_format="JPEG"), "its mask 3.png is no PNG"),
        ("train/images/dog/3.jpg", b"", "3.jpg: image file .* is empty"),
    ],
)
def test_visha_names_frames_that_do_not_fit(
    visha: Path, name: str, content: bytes | None, complaint: str
) -> None:
    if content is None:
        (visha / name).unlink()
    else:
        (visha / name).write_bytes(content)
    with pytest.raises(SourceError, match=complaint):
        list(visha_samples(VishaConfig(visha)))
    report = ImportReport()
    assert len(list(visha_samples(VishaConfig(visha, skip_bad=True), report))) == 13
    assert report.skipped == {"frame": 1}


def test_visha_refuses_a_turned_picture_and_a_missing_folder(
    visha: Path, picture: Any, put: Any
) -> None:
    put(visha / "test" / "images" / "dog" / "0.jpg", picture(orientation=6))
    with pytest.raises(SourceError, match="is stored turned"):
        list(visha_samples(VishaConfig(visha, splits=("test",))))
    with pytest.raises(SourceError, match=r"val/images: this folder is missing"):
        list(visha_samples(VishaConfig(visha, splits=("val",))))


# RGB-D salient objects


@pytest.fixture(params=[("RGB", "depth", "GT"), ("Imgs", "Depth", "mask")])
def rgbd(request: pytest.FixtureRequest, tmp_path: Path, picture: Any, put: Any) -> Path:
    rgb, depth, gt = request.param
    for n, (stem, depth_format) in enumerate((("000001_left", "PNG"), ("000002_left", "JPEG"))):
        put(tmp_path / rgb / f"{stem}.jpg", picture(colour=n))
        name = f"{stem}.{'png' if depth_format == 'PNG' else 'jpg'}"
        put(tmp_path / depth / name, grey(value=40 * n, image_format=depth_format))
        put(tmp_path / gt / f"{stem}.png", grey(value=255))
    put(tmp_path / rgb / "Thumbs.db", "")
    return tmp_path


def test_rgbd_sets_become_samples_with_depth_and_mask(rgbd: Path, picture: Any) -> None:
    first, second = samples_of(
        rgbd_sod_samples(RgbdSodConfig(rgbd, near="bright", split="test", name="NJU2K"))
    )
    assert first.image == picture() and second.image == picture(colour=1)
    assert dict(first.members) == {"depth.png": grey(), "mask.png": grey(value=255)}
    # from JPEG to PNG without another loss
    depth = np.asarray(Image.open(io.BytesIO(second.members["depth.png"])))
    stored = Image.open(io.BytesIO(grey(value=40, image_format="JPEG")))
    np.testing.assert_array_equal(depth, np.asarray(stored))
    known = annotations_from_info(first.info)
    assert known.depth is not None
    assert (known.depth.unit, known.depth.near) == ("relative", "bright")
    assert known.source["data_set"] == "NJU2K"


def test_rgbd_lists_say_what_belongs_together(tmp_path: Path, picture: Any, put: Any) -> None:
    put(tmp_path / "a" / "x.jpg", picture())
    put(tmp_path / "b" / "y.png", grey(value=9))
    put(tmp_path / "z.png", grey(value=255))
    put(tmp_path / "train.lst", "a/x.jpg b/y.png z.png\n\n")
    config = RgbdSodConfig(tmp_path, near="dark", listing="train.lst")
    (sample,) = samples_of(rgbd_sod_samples(config))
    assert sample.members["depth.png"] == grey(value=9)
    put(tmp_path / "train.lst", "a/x.jpg b/y.png z.png\na/x.jpg b/y.png\n")
    with pytest.raises(SourceError, match=r"train.lst: line 2 has 2 parts"):
        list(rgbd_sod_samples(config))
    put(tmp_path / "train.lst", "a/x.jpg ../y.png z.png\n")
    with pytest.raises(SourceError, match=r"train.lst: line 1: file name '../y.png' .* refused"):
        list(rgbd_sod_samples(config))
    with pytest.raises(SourceError, match="the list cannot be read"):
        list(rgbd_sod_samples(RgbdSodConfig(tmp_path, near="dark", listing="no.lst")))


@pytest.mark.parametrize(
    "kind, content, complaint",
    [
        (1, None, "000001_left: has no depth map of the same name"),
        (2, None, "000001_left: has no mask of the same name"),
        (0, None, "000001_left: has no image of the same name"),
        (1, grey((6, 8)), "has 6 x 8 pixels, 000001_left.jpg has 8 x 6"),
        (2, b"", "is no PNG, JPEG"),
        (1, grey()[:50], "000001_left.png is not a readable image"),
    ],
)
def test_rgbd_names_what_is_missing(
    rgbd: Path, kind: int, content: bytes | None, complaint: str
) -> None:
    folders = ("RGB", "depth", "GT") if (rgbd / "RGB").is_dir() else ("Imgs", "Depth", "mask")
    file = next((rgbd / folders[kind]).glob("000001_left.*"))
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(SourceError, match=complaint):
        list(rgbd_sod_samples(RgbdSodConfig(rgbd, near="dark")))
    report = ImportReport()
    skipping = RgbdSodConfig(rgbd, near="dark", skip_bad=True)
    assert len(list(rgbd_sod_samples(skipping, report))) == 1
    assert report.skipped == {"image": 1}


def test_rgbd_without_its_folders_says_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "RGB").mkdir()
    with pytest.raises(SourceError, match=r"no folder of depth \(looked for depth, .*found RGB\)"):
        list(rgbd_sod_samples(RgbdSodConfig(tmp_path, near="dark")))
    with pytest.raises(SourceError, match="choose 'dark' or 'bright'"):
        RgbdSodConfig(tmp_path, near="left")  # type: ignore[arg-type]
