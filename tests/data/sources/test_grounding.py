"""Flickr30k Entities, MDETR's GoldG files and Visual Genome in their published layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwork.data.annotations import annotations_from_info
from groundwork.data.samples import Sample
from groundwork.data.sources import json_files
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.flickr30k import (
    Flickr30kConfig,
    flickr30k_samples,
    parse_caption,
)
from groundwork.data.sources.mdetr import MdetrConfig, mdetr_samples
from groundwork.data.sources.report import BadItemError, ImportReport
from groundwork.data.sources.visual_genome import VisualGenomeConfig, visual_genome_samples


def grounded(sample: Sample) -> list[tuple[tuple[float, ...], list[str]]]:
    """(box, the phrases that its spans cut from the text)."""
    known = annotations_from_info(sample.info, sample.text)
    return [(box.xyxy, [sample.text[b:e] for b, e in box.spans]) for box in known.boxes]


# Flickr30k Entities

SENTENCES = """\
[/EN#283585/people Two young guys] with [/EN#283587/bodyparts shaggy hair] look at \
[/EN#283588/bodyparts their hands] while hanging out in [/EN#283586/scene the yard] .
[/EN#283585/people/other Two young , White males] are outside near [/EN#283591/scene many bushes] .
A sentence without phrases .
"""

ANNOTATION = """\
<annotation>
    <filename>1000092795.jpg</filename>
    <size><width>50</width><height>40</height><depth>3</depth></size>
    <object><name>283585</name>
        <bndbox><xmin>1</xmin><ymin>6</ymin><xmax>20</xmax><ymax>40</ymax></bndbox></object>
    <object><name>283585</name><name>283587</name>
        <bndbox><xmin>10</xmin><ymin>1</ymin><xmax>50</xmax><ymax>9</ymax></bndbox></object>
    <object><name>283586</name><scene>1</scene><nobndbox>1</nobndbox></object>
    <object><name>999</name>
        <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></object>
</annotation>
"""


@pytest.fixture
def flickr(tmp_path: Path, picture: Any, put: Any) -> Path:
    put(tmp_path / "train.txt", "1000092795\n")
    put(tmp_path / "val.txt", "")
    put(tmp_path / "test.txt", "36979\n")
    for name in ("1000092795", "36979"):
        put(tmp_path / "Sentences" / f"{name}.txt", SENTENCES)
        put(tmp_path / "Annotations" / f"{name}.xml", ANNOTATION)
        put(tmp_path / "flickr30k-images" / f"{name}.jpg", picture((50, 40), len(name)))
    return tmp_path


def test_flickr30k_ties_phrases_to_boxes(flickr: Path, picture: Any) -> None:
    pairs = list(flickr30k_samples(Flickr30kConfig(flickr)))
    assert [(split, s.key) for split, s in pairs] == [
        *(("train", f"1000092795_{n}") for n in range(3)),
        *(("test", f"36979_{n}") for n in range(3)),
    ]
    first, second, third = (s for _, s in pairs[:3])
    assert first.text == (
        "Two young guys with shaggy hair look at their hands while hanging out in the yard ."
    )
    # VOC counts pixels from 1 and includes the last
    assert grounded(first) == [
        ((0, 5, 20, 40), ["Two young guys"]),
        ((9, 0, 50, 9), ["Two young guys", "shaggy hair"]),
    ]
    assert grounded(second) == [
        ((0, 5, 20, 40), ["Two young , White males"]),
        ((9, 0, 50, 9), ["Two young , White males"]),
    ]
    assert grounded(third) == [] and third.info["boxes"] == []
    assert first.image == picture((50, 40), 10)
    assert first.info["boxes"][0]["category"] == "people"
    assert first.info["source"] == {"image_id": "1000092795", "caption": 0}


def test_flickr30k_can_give_one_sample_per_picture(flickr: Path) -> None:
    config = Flickr30kConfig(flickr, splits=("train",), one_per="image")
    ((_, sample),) = flickr30k_samples(config)
    assert sample.key == "1000092795"
    assert sample.text.split("\n") == sample.info["captions"] and len(sample.info["captions"]) == 3
    assert grounded(sample) == [
        ((0, 5, 20, 40), ["Two young guys", "Two young , White males"]),
        ((9, 0, 50, 9), ["Two young guys", "shaggy hair", "Two young , White males"]),
    ]


plain = st.text(st.characters(codec="utf-8", exclude_characters="[]\n\r"), min_size=1, max_size=9)


@given(st.lists(st.tuples(plain, st.integers(0, 99), plain), max_size=4))
@settings(max_examples=80)
def test_parsing_a_caption_undoes_its_brackets(parts: list[tuple[str, int, str]]) -> None:
    line = "".join(f"{before}[/EN#{entity}/other {phrase}]" for before, entity, phrase in parts)
    text, phrases = parse_caption(line)
    assert text == "".join(before + phrase for before, _, phrase in parts)
    assert [(text[p.begin : p.end], p.entity) for p in phrases] == [
        (phrase, str(entity)) for _, entity, phrase in parts
    ]


def test_brackets_that_do_not_end_are_refused() -> None:
    with pytest.raises(BadItemError, match="does not end"):
        parse_caption("[/EN#1/people Two guys")
    with pytest.raises(BadItemError, match="is empty"):
        parse_caption("[/EN#1/people ] walk")
    assert parse_caption("an array [3] of [ brackets ]") == ("an array [3] of [ brackets ]", [])


@pytest.mark.parametrize(
    "file, old, new, complaint",
    [
        ("Sentences/1000092795.txt", SENTENCES, "", "holds no caption"),
        ("Sentences/1000092795.txt", "the yard]", "the yard", "does not end"),
        ("Annotations/1000092795.xml", "</annotation>", "", "xml cannot be read"),
        ("Annotations/1000092795.xml", "<annotation>", "<!DOCTYPE a><annotation>", "document type"),
        ("Annotations/1000092795.xml", "<width>50", "<width>60", "annotations are for 60 x 40"),
        ("Annotations/1000092795.xml", "<width>50", "<width>wide", "size/width .* 'wide'"),
        ("train.txt", "1000092795", "../x", "leads out of"),
        ("train.txt", "1000092795", "17", "image file .*17.jpg is missing"),
    ],
)
def test_flickr30k_names_what_is_wrong(
    flickr: Path, file: str, old: str, new: str, complaint: str
) -> None:
    path = flickr / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(SourceError, match=rf"picture \S+: .*{complaint}"):
        list(flickr30k_samples(Flickr30kConfig(flickr)))
    report = ImportReport()
    kept = list(flickr30k_samples(Flickr30kConfig(flickr, skip_bad=True), report))
    assert [split for split, _ in kept] == ["test"] * 3 and report.skipped == {"image": 1}


def test_xml_in_another_encoding_cannot_smuggle_entities(flickr: Path) -> None:
    bomb = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'
    for encoding in ("utf-8", "utf-16", "utf-16-le", "utf-32"):
        (flickr / "Annotations" / "1000092795.xml").write_bytes(bomb.encode(encoding))
        with pytest.raises(SourceError, match=r"1000092795\.xml (declares|cannot be read)"):
            list(flickr30k_samples(Flickr30kConfig(flickr)))


def test_a_bad_box_of_flickr30k_costs_itself_only(flickr: Path) -> None:
    path = flickr / "Annotations" / "1000092795.xml"
    path.write_text(path.read_text().replace("<xmin>10", "<xmin>51"))
    with pytest.raises(SourceError, match=r"xml: box of entity 283585, 283587: .* has no area"):
        list(flickr30k_samples(Flickr30kConfig(flickr)))
    report = ImportReport()
    config = Flickr30kConfig(flickr, splits=("train",), skip_bad=True)
    first, *_ = (s for _, s in flickr30k_samples(config, report))
    assert grounded(first) == [((0, 5, 20, 40), ["Two young guys"])]
    assert report.skipped == {"box": 1}


def test_flickr30k_lists_must_be_there_and_name_each_picture_once(flickr: Path) -> None:
    (flickr / "train.txt").write_text("1000092795\n36979\n1000092795\n")
    with pytest.raises(SourceError, match=r"train.txt: 1000092795 is there 2 times"):
        list(flickr30k_samples(Flickr30kConfig(flickr)))
    (flickr / "train.txt").unlink()
    with pytest.raises(SourceError, match=r"train.txt: the list of this split is missing"):
        list(flickr30k_samples(Flickr30kConfig(flickr)))
    with pytest.raises(SourceError, match="choose 'caption' or 'image'"):
        Flickr30kConfig(flickr, one_per="phrase")  # type: ignore[arg-type]


# MDETR

CAPTION = "Two young guys with shaggy hair look at their hands ."
GOLDG = {
    "info": [],
    "licenses": [],
    "images": [
        {
            "file_name": "1000092795.jpg",
            "height": 40,
            "width": 50,
            "id": 7,
            "original_img_id": 1000092795,
            "caption": CAPTION,
            "dataset_name": "flickr",
            "sentence_id": 0,
            "tokens_negative": [[0, 53]],
        },
        {
            "file_name": "1000092795.jpg",
            "height": 40,
            "width": 50,
            "id": 8,
            "caption": "Nobody here .",
            "dataset_name": "flickr",
        },
    ],
    "annotations": [
        {
            "area": 700,
            "iscrowd": 0,
            "image_id": 7,
            "category_id": 1,
            "id": 31,
            "bbox": [0, 5, 20, 35],
            "tokens_positive": [[0, 14]],
        },
        {
            "area": 369.0,
            "iscrowd": 0,
            "image_id": 7,
            "category_id": 1,
            "id": 32,
            "bbox": [9, 0, 41, 9],
            "tokens_positive": [[20, 26], [27, 31]],
        },
    ],
    "categories": [{"supercategory": "object", "id": 1, "name": "object"}],
}


@pytest.fixture
def goldg(tmp_path: Path, picture: Any, put: Any) -> MdetrConfig:
    put(tmp_path / "gqa" / "other.jpg", picture())
    put(tmp_path / "flickr30k-images" / "1000092795.jpg", picture((50, 40)))
    file = put(tmp_path / "final_flickr_separateGT_train.json", GOLDG)
    folders = (tmp_path / "gqa", tmp_path / "flickr30k-images")
    return MdetrConfig({"train": file}, folders)


def test_mdetr_gives_a_sample_for_each_caption(goldg: MdetrConfig, picture: Any) -> None:
    (split, first), (_, second) = mdetr_samples(goldg)
    assert (split, first.key, second.key) == ("train", "1000092795_7", "1000092795_8")
    assert first.image == second.image == picture((50, 40)) and first.text == CAPTION
    assert grounded(first) == [
        ((0, 5, 20, 40), ["Two young guys"]),
        ((9, 0, 50, 9), ["shaggy", "hair"]),
    ]
    box = annotations_from_info(first.info).boxes[1]
    assert (box.label, box.category, box.id, box.area) == (None, "shaggy hair", 32, 369)
    assert first.info["source"]["dataset_name"] == "flickr"
    assert second.text == "Nobody here ." and second.info["boxes"] == []


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda r: r["annotations"][0].update(tokens_positive=[[0, 99]]), "31: tokens_positive"),
        (lambda r: r["annotations"][0].update(tokens_positive=[[5, 5]]), "31: tokens_positive"),
        (lambda r: r["annotations"][0].update(tokens_positive=3), "31: tokens_positive has 3"),
        (lambda r: r["images"][0].pop("caption"), "image 7: 'caption' is missing"),
        (lambda r: r["images"][0].update(file_name="/a.jpg"), "file name '/a.jpg' is absolute"),
        (lambda r: r["images"][0].update(file_name="a.jpg"), "missing .looked for .*gqa/a.jpg, "),
    ],
)
def test_mdetr_names_what_is_wrong(
    goldg: MdetrConfig, put: Any, change: Any, complaint: str
) -> None:
    record = json.loads(json.dumps(GOLDG))
    change(record)
    put(goldg.annotations["train"], record)
    with pytest.raises(SourceError, match=complaint):
        list(mdetr_samples(goldg))
    report = ImportReport()
    skipping = MdetrConfig(goldg.annotations, goldg.images, skip_bad=True)
    assert [s.key for _, s in mdetr_samples(skipping, report)] == ["1000092795_8"]
    assert report.skipped == {"image": 1}


# Visual Genome

VG_IMAGES = [
    {
        "width": 50,
        "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg",
        "height": 40,
        "image_id": 1,
        "coco_id": None,
        "flickr_id": None,
    },
    {
        "width": 8,
        "url": "https://cs.stanford.edu/people/rak248/VG_100K/2.jpg",
        "height": 6,
        "image_id": 2,
        "coco_id": 480023,
        "flickr_id": 1,
    },
]
VG_REGIONS = [
    {
        "id": 1,
        "regions": [
            {"region_id": 1382, "width": 20, "height": 35, "image_id": 1,
                "phrase": "the clock is green\n in colour", "y": 5, "x": 0},
            {"region_id": 1383, "width": 80, "height": 10, "image_id": 1,
                "phrase": "shade is along the street ", "y": 30, "x": -2},
        ],
    },
    {"id": 2, "regions": []},
]  # fmt: skip
VG_OBJECTS = [
    {
        "image_id": 1,
        "objects": [
            {"synsets": ["tree.n.01"], "h": 20, "object_id": 1058549, "merged_object_ids": [],
                "names": ["trees", "bush"], "w": 30, "y": 0, "x": 10},
        ],
        "image_url": "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg",
    },
    {"image_id": 2, "objects": []},
]  # fmt: skip


@pytest.fixture
def genome(tmp_path: Path, picture: Any, put: Any) -> Path:
    put(tmp_path / "image_data.json", VG_IMAGES)
    put(tmp_path / "region_descriptions.json", VG_REGIONS)
    put(tmp_path / "objects.json", VG_OBJECTS)
    put(tmp_path / "VG_100K_2" / "1.jpg", picture((50, 40)))
    put(tmp_path / "VG_100K" / "2.jpg", picture())
    return tmp_path


@pytest.mark.parametrize("streamed", [False, True])
def test_visual_genome_regions_become_lines_of_text(
    genome: Path, picture: Any, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if streamed:
        monkeypatch.setattr(json_files, "LARGE_FILE", 0)
    report = ImportReport()
    (_, first), (_, second) = visual_genome_samples(VisualGenomeConfig(genome), report)
    assert first.text == "the clock is green in colour\nshade is along the street"
    assert grounded(first) == [
        ((0, 5, 20, 40), ["the clock is green in colour"]),
        ((0, 30, 50, 40), ["shade is along the street"]),
    ]
    assert (first.key, first.image) == ("1", picture((50, 40)))
    assert (second.text, second.info["boxes"]) == ("", [])
    assert second.info["source"] == {"image_id": 2, "coco_id": 480023}
    assert report.mended == {"boxes cut to their picture": 1}


def test_visual_genome_objects_have_free_names(genome: Path) -> None:
    (_, first), _ = visual_genome_samples(VisualGenomeConfig(genome, annotate="objects"))
    (box,) = annotations_from_info(first.info).boxes
    assert (box.xyxy, box.category, box.label, box.id) == ((10, 0, 40, 20), "trees", None, 1058549)


def test_visual_genome_without_coco_and_with_a_split(genome: Path, picture: Any, put: Any) -> None:
    report = ImportReport()
    config = VisualGenomeConfig(genome, without_coco=True)
    assert [s.key for _, s in visual_genome_samples(config, report)] == ["1"]
    assert report.mended["pictures of COCO left out"] == 1
    images = [VG_IMAGES[0] | {"image_id": n} for n in range(200)]
    put(genome / "image_data.json", images)
    put(genome / "region_descriptions.json", [{"id": n, "regions": []} for n in range(200)])
    splits = {
        s.key: split
        for split, s in visual_genome_samples(VisualGenomeConfig(genome, val_fraction=0.25))
    }
    assert 30 < sum(split == "val" for split in splits.values()) < 70
    put(genome / "region_descriptions.json", [{"id": n, "regions": []} for n in range(100)])
    again = visual_genome_samples(VisualGenomeConfig(genome, val_fraction=0.25))
    assert all(splits[s.key] == split for split, s in again)  # each by itself


def region(**changes: Any) -> Any:
    return lambda images, regions: regions[0]["regions"][0].update(changes)


@pytest.mark.parametrize(
    "change, kind, complaint",
    [
        (region(x=50), "box", "image 1: entry 1382: x 50.0, y 5.0, .* no area inside"),
        (region(width=0), "box", "entry 1382: .* no area inside"),
        (region(phrase=" "), "box", "entry 1382 has neither a phrase"),
        (region(phrase=None), "box", "image 1: 'phrase' is None"),
        (region(x="left"), "box", "'x' is 'left'; expected a number"),
        (lambda i, r: r[0].update(id=9), "image", "image 9: is not in image_data.json"),
        (lambda i, r: r[1].update(id=1), "image", "image 1: is there twice"),
        (lambda i, r: i[0].update(width=51), "image", "annotations are for 51 x 40"),
        (lambda i, r: i[0].update(url="https://h/../1.jpg"), "image", "leads out of"),
        (lambda i, r: i[0].update(url="1.jpg"), "image", "expected .../FOLDER/FILE"),
        (
            lambda i, r: i.append(i[0]),
            "image",
            r"image_data.json: \[2\]: image_id 1 is there twice",
        ),
    ],
)
def test_visual_genome_names_what_is_wrong(
    genome: Path, put: Any, change: Any, kind: str, complaint: str
) -> None:
    images, regions = json.loads(json.dumps([VG_IMAGES, VG_REGIONS]))
    change(images, regions)
    put(genome / "image_data.json", images)
    put(genome / "region_descriptions.json", regions)
    with pytest.raises(SourceError, match=complaint):
        list(visual_genome_samples(VisualGenomeConfig(genome)))
    report = ImportReport()
    list(visual_genome_samples(VisualGenomeConfig(genome, skip_bad=True), report))
    assert report.skipped == {kind: 1}
