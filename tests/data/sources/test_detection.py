"""COCO, LVIS and Objects365 in their published layouts."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from groundwork.data.annotations import Rle, annotations_from_info, segmentation_mask
from groundwork.data.samples import Sample
from groundwork.data.sources import json_files
from groundwork.data.sources.coco import CocoConfig, coco_concepts, coco_samples
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.lvis import LvisConfig, lvis_concepts, lvis_samples
from groundwork.data.sources.objects365 import (
    Objects365Config,
    objects365_concepts,
    objects365_samples,
)
from groundwork.data.sources.report import ImportReport

CATEGORIES = [
    {"supercategory": "person", "id": 1, "name": "person"},
    {"supercategory": "animal", "id": 18, "name": "dog"},
    {"supercategory": "animal", "id": 17, "name": "cat"},
]


def image(number: int, **more: Any) -> dict[str, Any]:
    return {
        "license": 3,
        "file_name": f"{number:012d}.jpg",
        "coco_url": f"http://images.cocodataset.org/train2017/{number:012d}.jpg",
        "height": 6,
        "width": 8,
        "date_captured": "2013-11-14 11:18:45",
        "id": number,
    } | more


def annotation(number: int, image_id: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    left, top, width, height = bbox
    right, bottom = left + width, top + height
    return {
        "segmentation": [[left, top, right, top, right, bottom]],
        "area": width * height / 2,
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": bbox,
        "category_id": 18,
        "id": number,
    } | more


def coco(images: list[Any], annotations: list[Any]) -> dict[str, Any]:
    return {
        "info": {"year": 2017},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": CATEGORIES,
    }


CROWD = annotation(
    900100000009,
    9,
    [0, 0, 8, 6],
    iscrowd=1,
    segmentation={"counts": [0, 48], "size": [6, 8]},
    category_id=1,
)
TRAIN = coco(
    [image(30), image(9), image(25)],
    [
        annotation(1, 9, [1.5, 2, 3, 2.25]),
        annotation(2, 30, [0, 0, 2, 2], category_id=17),
        CROWD,
    ],
)


@pytest.fixture
def root(tmp_path: Path, picture: Any, put: Any) -> Path:
    for number in (30, 9, 25):
        put(tmp_path / "train2017" / f"{number:012d}.jpg", picture(colour=number))
    put(tmp_path / "val2017" / "000000000139.jpg", picture(colour=139))
    put(tmp_path / "annotations" / "instances_train2017.json", TRAIN)
    put(
        tmp_path / "annotations" / "instances_val2017.json",
        coco([image(139)], [annotation(5, 139, [0, 0, 4, 4])]),
    )
    return tmp_path


def retold(root: Path, change: Any) -> Path:
    """The training file with a change."""
    record = json.loads(json.dumps(TRAIN))
    change(record)
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(record))
    return root


def test_coco_gives_every_picture_with_its_boxes(root: Path) -> None:
    samples = list(coco_samples(CocoConfig(root)))
    assert [(split, s.key) for split, s in samples] == [
        ("train", "000000000030"),
        ("train", "000000000009"),
        ("train", "000000000025"),
        ("val", "000000000139"),
    ]
    assert samples == list(coco_samples(CocoConfig(root)))
    two = samples[1][1]
    assert two.image == (root / "train2017" / "000000000009.jpg").read_bytes()
    known = annotations_from_info(two.info, two.text)
    dog, crowd = known.boxes
    assert (known.width, known.height) == (8, 6)
    assert (dog.xyxy, dog.label, dog.category, dog.area) == ((1.5, 2, 4.5, 4.25), 2, "dog", 3.375)
    assert dog.segmentation == ((1.5, 2.0, 4.5, 2.0, 4.5, 4.25),)
    assert (crowd.crowd, crowd.label, crowd.segmentation) == (True, 0, Rle((6, 8), (0, 48)))
    assert known.source == {"image_id": 9, "file_name": "000000000009.jpg"}
    # a picture without annotations is a negative, not a fault
    empty = annotations_from_info(samples[2][1].info)
    assert empty.has_boxes and not empty.boxes


def test_coco_classes_are_labelled_in_the_order_of_their_ids(root: Path) -> None:
    concepts = coco_concepts(CocoConfig(root))
    assert [(c.label, c.name, c.info["category_id"]) for c in concepts] == [
        (0, "person", 1),
        (1, "cat", 17),
        (2, "dog", 18),
    ]
    assert concepts[1].info["supercategory"] == "animal"


def test_other_data_sets_in_this_format_need_file_names_only(root: Path, put: Any) -> None:
    (root / "train2017").rename(root / "train")
    put(root / "train" / "_annotations.coco.json", TRAIN)
    config = CocoConfig(
        root, splits=("train",), annotations="{split}/_annotations.coco.json", images="{split}"
    )
    assert len(list(coco_samples(config))) == 3


def test_a_large_file_is_read_record_by_record_with_the_same_result(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(coco_samples(CocoConfig(root)))
    monkeypatch.setattr(json_files, "LARGE_FILE", 0)
    assert list(coco_samples(CocoConfig(root))) == whole
    assert json.dumps([s.info for _, s in whole]) == json.dumps(
        [s.info for _, s in coco_samples(CocoConfig(root))]
    )
    file = root / "annotations" / "instances_train2017.json"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(SourceError, match=r"instances_train2017.json: byte .* fetch it again"):
        list(coco_samples(CocoConfig(root)))


@pytest.mark.parametrize("large_file", [2**28, 0])
def test_a_number_of_too_many_digits_is_named_with_its_file(
    large_file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "LARGE_FILE", large_file)
    path = tmp_path / "a.json"
    path.write_text('{"images": [{"id": ' + "9" * 5000 + "}]}")
    with pytest.raises(SourceError, match=r"a\.json: .*not JSON .*fetch"):
        list(json_files.JsonFile(path).records("images"))


def first_annotation(**changes: Any) -> Any:
    return lambda record: record["annotations"][0].update(changes)


@pytest.mark.parametrize(
    "change, kind, complaint",
    [
        (first_annotation(bbox=[9, 0, 2, 2]), "box", "annotation 1: bbox .* no area inside"),
        (first_annotation(bbox=[1, 1, 0, 4]), "box", "annotation 1: bbox .* no area inside"),
        (first_annotation(bbox=[4, 4, -2, -2]), "box", "no area inside of the picture of 8 x 6"),
        (first_annotation(bbox=[1, 1, 2]), "box", "annotation 1: bbox is"),
        (first_annotation(category_id=3), "box", r"category_id 3 is not in .* \(ids 1, 17, 18\)"),
        (first_annotation(image_id=4), "box", "annotation 1: image_id 4 is not in `images`"),
        (first_annotation(id=2), "box", "annotation id 2 is there twice"),
        (first_annotation(id="1"), "box", r"annotations\[0\]: 'id' is '1'; expected an integer"),
        (first_annotation(segmentation={"size": [8, 6], "counts": [48]}), "box", "size is .8, 6."),
        (lambda r: r["images"][0].update(id=9), "image", r"images\[1\]: image id 9 is there twice"),
        (lambda r: r["images"][0].pop("file_name"), "image", "image 30: 'file_name' is missing"),
        (
            lambda r: r["images"][0].update(file_name="../val2017/000000000139.jpg"),
            "image",
            "image 30: file name .* leads out of .*; refused",
        ),
        (
            lambda r: r["images"][0].update(file_name="/etc/hosts"),
            "image",
            "file name '/etc/hosts' is absolute",
        ),
        (
            lambda r: r["images"][0].update(file_name="no.jpg"),
            "image",
            "image 30: image file .*no.jpg is missing",
        ),
        (
            lambda r: r["images"][0].update(width=16),
            "image",
            "has 8 x 6 pixels, its annotations are for 16 x 6",
        ),
    ],
)
def test_a_bad_item_ends_the_import_or_is_counted(
    root: Path, change: Any, kind: str, complaint: str
) -> None:
    retold(root, change)
    with pytest.raises(SourceError, match=complaint) as error:
        list(coco_samples(CocoConfig(root)))
    assert "instances_train2017.json: " in str(error.value) and "--skip-bad" in str(error.value)
    told: list[str] = []
    report = ImportReport(lambda where, reason: told.append(f"{where}: {reason}"))
    samples = list(coco_samples(CocoConfig(root, skip_bad=True), report))
    assert report.skipped[kind] >= 1
    assert len(samples) == (3 if kind == "image" else 4)
    assert report.skipped.total() == len(told)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ('{"images": [\n  {"id": 1,,', r"line 2, column 12: not JSON"),
        ("[]", "holds no list 'categories'"),
        ('{"categories": [3]}', r"categories\[0\] is a int, expected an object"),
        ('{"categories": [{"id": 1}]}', r"categories\[0\]: 'name' is missing"),
        ('{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "id 1 is there twice"),
        ('{"categories": []}', "holds no list 'images'"),
    ],
)
def test_a_file_in_another_layout_is_named(root: Path, content: str, complaint: str) -> None:
    file = root / "annotations" / "instances_train2017.json"
    file.write_text(content)
    with pytest.raises(SourceError, match=complaint) as error:
        list(coco_samples(CocoConfig(root, skip_bad=True)))
    assert str(file) in str(error.value)


def test_splits_that_disagree_about_the_classes_are_named(root: Path) -> None:
    retold(root, lambda r: r["categories"].append({"id": 99, "name": "yak"}))
    with pytest.raises(SourceError, match=r"different categories \(yak\)"):
        coco_concepts(CocoConfig(root))
    with pytest.raises(SourceError, match="missing"):
        coco_concepts(CocoConfig(root, splits=("test",)))


def test_boxes_that_leave_their_picture_are_cut_and_counted(root: Path) -> None:
    retold(root, first_annotation(bbox=[-1, 2, 99, 99], area=0))
    report = ImportReport()
    samples = {s.key: s for _, s in coco_samples(CocoConfig(root), report)}
    box = annotations_from_info(samples["000000000009"].info).boxes[0]
    assert box.xyxy == (0, 2, 8, 6) and box.area == 32
    assert report.mended == {"boxes cut to their picture": 1}
    assert report.summary() == "1 boxes cut to their picture"


def test_polygons_that_are_none_are_left_out(root: Path) -> None:
    retold(root, first_annotation(segmentation=[[1, 1, 2, 2], [0, 0, 3, 0, 3, 3]]))
    report = ImportReport()
    samples = {s.key: s for _, s in coco_samples(CocoConfig(root), report)}
    box = annotations_from_info(samples["000000000009"].info).boxes[0]
    assert box.segmentation == ((0.0, 0.0, 3.0, 0.0, 3.0, 3.0),)
    assert list(report.mended) == ["polygons of fewer than three points left out"]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("polygons", [True, False])
def test_annotations_of_a_sideways_picture_turn_with_it(
    tmp_path: Path, put: Any, orientation: int, polygons: bool
) -> None:
    """Oracle: Pillow turns a picture in which the box is painted white."""
    stored = np.zeros((30, 40, 3), np.uint8)
    stored[3:12, 5:30] = 255
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(buffer, "PNG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(buffer)))[..., 0] > 0
    put(tmp_path / "train2017" / "000000000009.jpg", buffer.getvalue())
    corners = [5, 3, 30, 3, 30, 12, 5, 12]
    columns = np.repeat(stored[:, 5, 0] > 0, 1)
    runs = [5 * 30 + 3] + [9, 21] * 24 + [9, 18 + 10 * 30]
    assert columns.sum() == 9 and sum(runs) == 1200
    segmentation: Any = [corners] if polygons else {"size": [30, 40], "counts": runs}
    record = coco(
        [image(9, width=40, height=30)],
        [annotation(1, 9, [5, 3, 25, 9], segmentation=segmentation)],
    )
    put(tmp_path / "annotations" / "instances_train2017.json", record)
    report = ImportReport()
    ((_, sample),) = coco_samples(CocoConfig(tmp_path, splits=("train",)), report)
    known = annotations_from_info(sample.info)
    assert (known.width, known.height) == (30, 40)
    x0, y0, x1, y1 = map(int, known.boxes[0].xyxy)
    drawn = np.zeros_like(upright)
    drawn[y0:y1, x0:x1] = True
    np.testing.assert_array_equal(drawn, upright)
    assert known.boxes[0].segmentation is not None
    np.testing.assert_array_equal(segmentation_mask(known.boxes[0].segmentation, 40, 30), upright)
    assert report.mended == {"boxes turned upright": 1}
    # annotated upright, they stay as they are
    record["images"] = [image(9, width=30, height=40)]
    record["annotations"] = [annotation(1, 9, [5, 3, 25, 30])]
    put(tmp_path / "annotations" / "instances_train2017.json", record)
    ((_, sample),) = coco_samples(CocoConfig(tmp_path, splits=("train",)))
    assert annotations_from_info(sample.info).boxes[0].xyxy == (5, 3, 30, 33)


LVIS_CATEGORIES = [
    {
        "image_count": 64,
        "synonyms": ["aerosol_can", "spray_can"],
        "def": "a dispenser that holds a substance under pressure",
        "id": 1,
        "synset": "aerosol.n.02",
        "name": "aerosol_can",
        "frequency": "c",
        "instance_count": 109,
    },
    {"id": 2, "name": "cat", "synonyms": ["cat"], "synset": "cat.n.01", "frequency": "f"},
    {"id": 3, "name": "yak", "synonyms": ["yak"], "synset": "yak.n.01", "frequency": "r"},
]


def lvis_image(number: int, folder: str, **more: Any) -> dict[str, Any]:
    record = image(
        number,
        coco_url=f"http://images.cocodataset.org/{folder}/{number:012d}.jpg",
        neg_category_ids=[3, 1],
        not_exhaustive_category_ids=[2],
        **more,
    )
    del record["file_name"]
    return record


@pytest.fixture
def lvis_root(root: Path, put: Any) -> Path:
    for split, images in (
        ("train", [lvis_image(9, "train2017"), lvis_image(139, "val2017")]),
        ("val", [lvis_image(30, "train2017")]),
    ):
        record = {
            "images": images,
            "annotations": [annotation(1, images[0]["id"], [0, 0, 4, 4], category_id=2)],
            "categories": LVIS_CATEGORIES,
        }
        put(root / "annotations" / f"lvis_v1_{split}.json", record)
    return root


def test_lvis_knows_absent_and_partly_boxed_classes(lvis_root: Path) -> None:
    samples = list(lvis_samples(LvisConfig(lvis_root)))
    assert [(split, s.key) for split, s in samples] == [
        ("train", "000000000009"),
        ("train", "000000000139"),
        ("val", "000000000030"),
    ]
    known = annotations_from_info(samples[0][1].info)
    assert (known.absent_labels, known.partial_labels) == ((0, 2), (1,))
    assert [(b.label, b.category) for b in known.boxes] == [(1, "cat")]
    # a picture of the training split that lies in val2017
    assert samples[1][1].image == (lvis_root / "val2017" / "000000000139.jpg").read_bytes()
    concept = lvis_concepts(LvisConfig(lvis_root))[0]
    assert (concept.name, concept.aliases) == ("aerosol can", ("spray can",))
    assert concept.info == {
        "category_id": 1,
        "synset": "aerosol.n.02",
        "definition": "a dispenser that holds a substance under pressure",
        "frequency": "c",
    }


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"neg_category_ids": [7]}, r"image 9: neg_category_ids has \[7\]"),
        ({"coco_url": "http://host/train2017/x.jpg"}, "image 9: image file .* is missing"),
        ({"coco_url": "http://host/x.jpg"}, "expected .../FOLDER/FILE"),
        ({"coco_url": "x.jpg"}, "url is 'x.jpg'"),
        ({"coco_url": "http://h/../x.jpg"}, "leads out of"),
        ({"coco_url": None}, "'coco_url' is None"),
    ],
)
def test_lvis_names_what_is_wrong(
    lvis_root: Path, put: Any, changes: dict[str, Any], complaint: str
) -> None:
    file = lvis_root / "annotations" / "lvis_v1_train.json"
    record = json.loads(file.read_text())
    record["images"][0].update(changes)
    put(file, record)
    with pytest.raises(SourceError, match=complaint):
        list(lvis_samples(LvisConfig(lvis_root)))
    report = ImportReport()
    assert len(list(lvis_samples(LvisConfig(lvis_root, skip_bad=True), report))) == 2
    assert report.skipped == {"image": 1}


def objects365(image_id: int, file_name: str) -> dict[str, Any]:
    return {
        "images": [
            {
                "height": 6,
                "id": image_id,
                "license": 5,
                "width": 8,
                "file_name": file_name,
                "url": "",
            }
        ],
        "annotations": [
            {
                "id": 51,
                "iscrowd": 0,
                "isfake": 0,
                "area": 4.0,
                "isreflected": 0,
                "bbox": [1.0, 1.0, 2.0, 2.0],
                "image_id": image_id,
                "category_id": 2,
            }
        ],
        "categories": [{"name": "Person", "id": 1}, {"name": "Sneakers", "id": 2}],
        "licenses": [],
    }


@pytest.mark.parametrize("above", ["{split}", "images/{split}", "images", ""])
@pytest.mark.parametrize("annotations", ["", "annotations"])
def test_objects365_finds_pictures_by_patch_and_name(
    tmp_path: Path, picture: Any, put: Any, above: str, annotations: str
) -> None:
    names = {"train": "images/v1/patch8/objects365_v1_00420917.jpg"}
    names["val"] = "images/v2/patch16/objects365_v2_00908726.jpg"
    for split, name in names.items():
        folder = tmp_path / above.format(split=split)
        put(folder / "/".join(name.split("/")[-2:]), picture(colour=len(split)))
        put(tmp_path / annotations / f"zhiyuan_objv2_{split}.json", objects365(420917, name))
    config = Objects365Config(tmp_path)
    samples = list(objects365_samples(config))
    assert [(split, s.key) for split, s in samples] == [
        ("train", "objects365_v1_00420917"),
        ("val", "objects365_v2_00908726"),
    ]
    assert [s.image for _, s in samples] == [picture(colour=5), picture(colour=3)]
    box = annotations_from_info(samples[0][1].info).boxes[0]
    assert (box.xyxy, box.label, box.category) == ((1, 1, 3, 3), 1, "Sneakers")
    assert [c.name for c in objects365_concepts(config)] == ["Person", "Sneakers"]


def test_objects365_without_a_picture_says_where_it_looked(tmp_path: Path, put: Any) -> None:
    name = "images/v2/patch16/objects365_v2_00908726.jpg"
    put(tmp_path / "zhiyuan_objv2_train.json", objects365(3, name))
    config = Objects365Config(tmp_path, splits=("train",))
    with pytest.raises(SourceError, match=r"image 3: .*train/patch16/objects365_v2_00908726.jpg"):
        list(objects365_samples(config))


def test_pictures_are_read_one_at_a_time(root: Path) -> None:
    (root / "train2017" / "000000000009.jpg").unlink()
    stream = coco_samples(CocoConfig(root))
    assert next(stream)[1].key == "000000000030"
    with pytest.raises(SourceError, match=r"000000000009.jpg is missing"):
        next(stream)


def test_masks_are_those_of_cocos_own_tools(root: Path) -> None:
    """Oracle: pycocotools reading the same file."""
    from pycocotools.coco import COCO

    theirs = COCO(str(root / "annotations" / "instances_train2017.json"))
    for _, sample in coco_samples(CocoConfig(root, splits=("train",))):
        for box in annotations_from_info(sample.info).boxes:
            record = theirs.anns[box.id]
            assert box.segmentation is not None
            mask = segmentation_mask(box.segmentation, 6, 8)
            np.testing.assert_array_equal(mask, theirs.annToMask(record))
            left, top, width, height = record["bbox"]
            assert box.xyxy == (left, top, left + width, top + height)
            assert theirs.cats[record["category_id"]]["name"] == box.category


def test_samples_survive_a_tar(root: Path) -> None:
    for _, sample in coco_samples(CocoConfig(root)):
        fields = sample.fields()
        again = Sample(sample.key, fields["jpg"], "jpg", "", json.loads(fields["json"]))
        assert annotations_from_info(again.info) == annotations_from_info(sample.info)
