"""Whatever an annotation file holds, an importer gives valid samples or says what is wrong."""

import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from groundwork.data.annotations import annotations_from_info
from groundwork.data.samples import Sample
from groundwork.data.sources.coco import CocoConfig, coco_concepts, coco_samples
from groundwork.data.sources.coco_captions import CocoCaptionsConfig, coco_captions_samples
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.git_tsv import GitTsvConfig, git_tsv_samples
from groundwork.data.sources.lvis import LvisConfig, lvis_concepts, lvis_samples
from groundwork.data.sources.mdetr import MdetrConfig, mdetr_samples
from groundwork.data.sources.objects365 import Objects365Config, objects365_samples
from groundwork.data.sources.soba import SobaConfig, soba_samples
from groundwork.data.sources.visual_genome import VisualGenomeConfig, visual_genome_samples
from groundwork.data.sources.vqa import VqaConfig, vqa_samples

Samples = Iterator[tuple[str, Sample]]

IMAGE = {
    "id": 1,
    "file_name": "a/1.jpg",
    "width": 8,
    "height": 6,
    "caption": "a cat and a dog",
    "dataset_name": "flickr",
    "coco_url": "http://host/a/1.jpg",
    "neg_category_ids": [1],
    "not_exhaustive_category_ids": [2],
}
BOX = {
    "id": 5,
    "image_id": 1,
    "category_id": 1,
    "bbox": [1, 1, 4, 3.5],
    "area": 9,
    "iscrowd": 0,
    "segmentation": [[1, 1, 4, 1, 4, 4]],
    "association": 1,
    "tokens_positive": [[0, 5]],
    "caption": "a cat",
}
COCO: Any = {
    "images": [IMAGE],
    "annotations": [BOX, BOX | {"id": 6, "category_id": 2, "segmentation":
        {"size": [6, 8], "counts": [40, 8]}}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog", "synonyms": ["hound"]}],
    "association_anno": [{"id": 1, "image_id": 1}],
}  # fmt: skip
GENOME: Any = {
    "image_data.json": [{"image_id": 1, "width": 8, "height": 6, "url": "http://h/a/1.jpg"}],
    "region_descriptions.json": [
        {"id": 1, "regions": [{"region_id": 3, "x": 1, "y": 1, "width": 4, "height": 2,
            "phrase": "a cat"}]}
    ],
}  # fmt: skip
VQA: Any = {
    "v2_OpenEndedQuestions_mscoco_train2014_questions.json": {
        "questions": [{"image_id": 1, "question": "Who?", "question_id": 11}]
    },
    "v2_mscoco_train2014_annotations.json": {
        "annotations": [
            {"question_id": 11, "answer_type": "other", "answers": [{"answer": "a cat"}]}
        ]
    },
}
KARPATHY: Any = {
    "images": [{"filepath": "a", "filename": "1.jpg", "split": "train", "cocoid": 1,
        "sentences": [{"raw": "a cat"}]}]
}  # fmt: skip


def both(config: CocoConfig) -> Samples:
    coco_concepts(config)
    return coco_samples(config)


def lvis(config: LvisConfig) -> Samples:
    lvis_concepts(config)
    return lvis_samples(config)


IMPORTERS: dict[str, tuple[dict[str, Any], Callable[[Path], Samples]]] = {
    "coco": (
        {"x.json": COCO},
        lambda root: both(CocoConfig(root, ("train",), "x.json", "", skip_bad=True)),
    ),
    "lvis": (
        {"lvis_v1_train.json": COCO},
        lambda root: lvis(LvisConfig(root, ("train",), skip_bad=True)),
    ),
    "objects365": (
        {"zhiyuan_objv2_train.json": COCO},
        lambda root: objects365_samples(Objects365Config(root, ("train",), skip_bad=True)),
    ),
    "mdetr": (
        {"x.json": COCO},
        lambda root: mdetr_samples(MdetrConfig({"train": root / "x.json"}, (root,), True)),
    ),
    "soba": (
        {"SOBA_val_v2.json": COCO},
        lambda root: soba_samples(SobaConfig(root, ("val",), skip_bad=True)),
    ),
    "captions": (
        {"x.json": COCO},
        lambda root: coco_captions_samples(
            CocoCaptionsConfig(root, ("train",), "x.json", "", skip_bad=True)
        ),
    ),
    "karpathy": (
        {"dataset_coco.json": KARPATHY},
        lambda root: coco_captions_samples(
            CocoCaptionsConfig(root, ("train",), karpathy=True, skip_bad=True)
        ),
    ),
    "vqa": (VQA, lambda root: vqa_samples(VqaConfig(root, ("train",), skip_bad=True))),
    "genome": (
        GENOME,
        lambda root: visual_genome_samples(VisualGenomeConfig(root, skip_bad=True)),
    ),
}

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**70, -(2**63), 1e300, float("nan"), float("inf"), -0.5, 10**400]),
    st.sampled_from(["", "1", "../a/1.jpg", "/a/1.jpg", "a\0b", "\ud800", "a/1.jpg", "http://["]),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-2, 9), max_size=5),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "JPEG")
    for name in ("a/1.jpg", "train2014/COCO_train2014_000000000001.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(buffer.getvalue())
    return tmp_path


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) inside of a JSON value."""
    if not isinstance(value, (dict, list)):
        return []
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    return [(value, key) for key, _ in pairs] + [p for _, v in pairs for p in places(v)]


@pytest.mark.parametrize("kind", IMPORTERS)
def test_the_unchanged_files_give_one_sample(kind: str, root: Path) -> None:
    files, read = IMPORTERS[kind]
    for name, content in files.items():
        (root / name).write_text(json.dumps(content))
    assert len(list(read(root))) == 1


@pytest.mark.parametrize("kind", IMPORTERS)
@given(data=st.data())
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_changed_files_give_valid_samples_or_a_clear_error(
    kind: str, root: Path, data: st.DataObject
) -> None:
    files, read = IMPORTERS[kind]
    files = copy.deepcopy(files)
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(files)))
        if container is files:
            continue
        if data.draw(st.booleans()) and isinstance(container, dict):
            container.pop(key, None)
        elif isinstance(container, dict) or key < len(container):
            container[key] = data.draw(values)
    for name, content in files.items():
        (root / name).write_text(json.dumps(content))
    try:
        samples = list(read(root))
    except SourceError as error:
        assert str(root) in str(error)
        return
    for _, sample in samples:
        fields = sample.fields()
        annotations_from_info(json.loads(fields["json"]), sample.text)
        assert sample.image == (root / "a" / "1.jpg").read_bytes()


@given(st.lists(st.binary(max_size=12), max_size=3), st.lists(st.binary(max_size=12), max_size=3))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tables_are_read_or_refused(
    tmp_path: Path, images: list[bytes], texts: list[bytes]
) -> None:
    for name, rows in (("i.tsv", images), ("t.tsv", texts)):
        (tmp_path / name).write_bytes(b"\n".join(rows))
    try:
        list(git_tsv_samples(GitTsvConfig(tmp_path / "i.tsv", tmp_path / "t.tsv", skip_bad=True)))
    except SourceError as error:
        assert str(tmp_path) in str(error)
