"""Tars of other tools in their published layouts: img2dataset, DataComp, Energon, the hub."""

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundwork.data.annotations import annotations_from_info
from groundwork.data.dataset import open_dataset
from groundwork.data.samples import Sample
from groundwork.data.shards import write_shards
from groundwork.data.sources import tar_fields
from groundwork.data.sources.datacomp_uids import has_uid, open_uids
from groundwork.data.sources.energon import EnergonConfig, energon_fields, energon_samples
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.huggingface import (
    HuggingfaceConfig,
    huggingface_card,
    huggingface_samples,
    huggingface_splits,
)
from groundwork.data.sources.img2dataset import (
    Img2datasetConfig,
    img2dataset_samples,
    img2dataset_units,
    read_img2dataset_unit,
)
from groundwork.data.sources.report import ImportReport
from groundwork.data.sources.tar_fields import TarFields
from groundwork.data.sources.webdataset_tars import WebdatasetConfig, webdataset_samples


def write_tar(path: Path, members: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, str):
                content = content.encode()
            elif not isinstance(content, bytes):
                content = json.dumps(content).encode()
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def samples_of(pairs: Any) -> list[Sample]:
    return [sample for _, sample in pairs]


# img2dataset


@pytest.fixture
def fetched(tmp_path: Path, picture: Any, put: Any) -> Path:
    """Two shards of three urls each; the second of each could not be fetched."""
    root = tmp_path / "laion"
    for shard in (0, 1):
        members: dict[str, Any] = {}
        rows = []
        for number in range(3):
            key = f"{shard:05d}{number:04d}"
            status = "failed_to_download" if number == 1 else "success"
            rows.append(
                {
                    "url": f"https://example.org/{key}.jpg",
                    "caption": f"picture {key}",
                    "key": key,
                    "status": status,
                    "error_message": None if status == "success" else "HTTP Error 404",
                    "width": 8 if status == "success" else None,
                    "height": 6 if status == "success" else None,
                    "original_width": 800,
                    "original_height": 600,
                    "exif": "{}",
                    "sha256": "0" * 64,
                }
            )
            if status == "success":
                members[f"{key}.jpg"] = picture(colour=shard * 10 + number)
                members[f"{key}.txt"] = f"picture {key}"
                members[f"{key}.json"] = rows[-1]
        write_tar(root / f"{shard:05d}.tar", members)
        pq.write_table(pa.Table.from_pylist(rows), root / f"{shard:05d}.parquet")
        statistics = {"count": 3, "successes": 2, "failed_to_download": 1, "failed_to_resize": 0}
        put(root / f"{shard:05d}_stats.json", statistics)
    return root


def test_img2dataset_output_is_imported(fetched: Path, picture: Any) -> None:
    pairs = list(img2dataset_samples(Img2datasetConfig(fetched)))
    assert [(split, s.key) for split, s in pairs] == [
        ("train", "000000000"),
        ("train", "000000002"),
        ("train", "000010000"),
        ("train", "000010002"),
    ]
    last = pairs[-1][1]
    assert (last.image, last.text) == (picture(colour=12), "picture 000010002")
    known = annotations_from_info(last.info)
    assert (known.width, known.height) == (8, 6)
    assert known.source["url"] == "https://example.org/000010002.jpg"
    assert known.source["original_width"] == 800 and known.source["tar"] == "00001.tar"
    assert pairs == list(img2dataset_samples(Img2datasetConfig(fetched, check_tables=False)))


def test_img2dataset_output_can_be_streamed_in_place(fetched: Path) -> None:
    dataset = open_dataset(str(fetched))
    imported = samples_of(img2dataset_samples(Img2datasetConfig(fetched)))
    assert [dataset.read(i).image for i in range(len(dataset))] == [s.image for s in imported]
    # the side-cars that this leaves behind do not disturb a later import
    assert samples_of(img2dataset_samples(Img2datasetConfig(fetched))) == imported


def without_statistics(root: Path) -> None:
    (root / "00000_stats.json").unlink()


def other_statistics(root: Path) -> None:
    (root / "00000_stats.json").write_text('{"count": 3, "successes": 3}')


def strange_statistics(root: Path) -> None:
    (root / "00000_stats.json").write_text('{"count": 3}')


def cut_tar(root: Path) -> None:
    tar = root / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:2000])


def damaged_table(root: Path) -> None:
    (root / "00000.parquet").write_bytes(b"PAR1 no PAR1")


def tar_without_its_last(root: Path) -> None:
    table = pq.read_table(root / "00000.parquet").to_pylist()
    table[1].update(status="success")
    pq.write_table(pa.Table.from_pylist(table), root / "00000.parquet")
    other_statistics(root)


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (without_statistics, "00000.tar: 00000_stats.json is missing"),
        (other_statistics, "00000.parquet has 2 successes, 00000_stats.json says 3"),
        (strange_statistics, "00000_stats.json: 'successes' is missing"),
        (cut_tar, "00000.tar: truncated"),
        (damaged_table, "00000.parquet cannot be read"),
        (tar_without_its_last, r"3 images were fetched, 2 are in the tar \(000000001, ...\)"),
    ],
)
def test_img2dataset_shards_that_are_not_whole_are_named(
    fetched: Path, damage: Any, complaint: str
) -> None:
    damage(fetched)
    with pytest.raises(SourceError, match=complaint):
        list(img2dataset_samples(Img2datasetConfig(fetched)))
    report = ImportReport()
    kept = samples_of(img2dataset_samples(Img2datasetConfig(fetched, skip_bad=True), report))
    assert [s.key for s in kept][-2:] == ["000010000", "000010002"]
    assert report.skipped["shard"] >= 1


def test_a_tar_with_an_image_that_its_table_lacks_is_named(fetched: Path, picture: Any) -> None:
    table = pq.read_table(fetched / "00000.parquet").to_pylist()
    table[0]["key"] = "000009999"
    pq.write_table(pa.Table.from_pylist(table), fetched / "00000.parquet")
    with pytest.raises(SourceError, match="'000000000': is not among the successes"):
        list(img2dataset_samples(Img2datasetConfig(fetched)))


def test_a_shard_is_read_again_when_any_of_its_files_changes(fetched: Path, put: Any) -> None:
    config = Img2datasetConfig(fetched)
    units = img2dataset_units(config)
    assert [unit["tar"] for unit in units] == ["00000.tar", "00001.tar"]
    assert json.loads(json.dumps(units)) == units == img2dataset_units(config)
    put(fetched / "00001_stats.json", '{"successes":  2}')
    assert [a == b for a, b in zip(units, img2dataset_units(config), strict=True)] == [True, False]


def test_units_give_the_same_samples_and_tell_what_they_skip(fetched: Path) -> None:
    without_statistics(fetched)
    config = Img2datasetConfig(fetched, skip_bad=True)
    notes: list[str] = []
    pairs = [
        pair
        for unit in img2dataset_units(config)
        for pair in read_img2dataset_unit(config, unit, notes.append)
    ]
    assert pairs == list(img2dataset_samples(config)) and len(pairs) == 2
    assert len(notes) == 2 and notes[0].startswith("skipped: ")
    assert notes[1] == "00000.tar: 1 shard skipped"


# open_clip, LAION, DataComp


def datacomp(picture: Any, number: int) -> dict[str, Any]:
    image = picture(colour=number)
    return {
        f"{number:09d}.jpg": image,
        f"{number:09d}.json": {
            "uid": f"{number:032x}",
            "sha256": hashlib.sha256(image).hexdigest(),
            "caption": f"number {number}",
            "face_bboxes": [[0.1, 0.2, 0.3, 0.4]],
            "width": 8,
            "height": 6,
        },
        f"{number:09d}.txt": f"number {number}\n",
    }


def test_datacomp_tars_keep_uid_and_sha256(tmp_path: Path, picture: Any) -> None:
    # two downloads, whose keys are the same
    for folder in ("a", "b"):
        members = {**datacomp(picture, 0), **datacomp(picture, 1)}
        write_tar(tmp_path / "shards" / folder / "00000000.tar", members)
    config = WebdatasetConfig(tmp_path / "shards", check_sha256=True)
    samples = samples_of(webdataset_samples(config))
    assert len({s.key for s in samples}) == 4
    assert [s.info["source"]["uid"] for s in samples] == [f"{n:032x}" for n in (0, 1)] * 2
    assert samples[3].text == "number 1" and samples[3].image == picture(colour=1)
    assert samples[3].info["source"]["tar"] == "b/00000000.tar"
    manifest = write_shards(
        (("train", s) for s in samples), tmp_path / "out", name="d", source={}, licence="?"
    )
    assert manifest.samples("train") == 4
    one = WebdatasetConfig(tmp_path / "shards" / "b" / "00000000.tar", split="val")
    assert [split for split, _ in webdataset_samples(one)] == ["val", "val"]


def test_a_changed_image_is_found_by_its_sha256(tmp_path: Path, picture: Any) -> None:
    members = datacomp(picture, 0) | {"000000000.jpg": picture(colour=7)}
    tar = write_tar(tmp_path / "0.tar", members)
    assert len(list(webdataset_samples(WebdatasetConfig(tar)))) == 1
    with pytest.raises(SourceError, match=r"0.tar: sample '000000000': its image has sha256"):
        list(webdataset_samples(WebdatasetConfig(tar, check_sha256=True)))
    del members["000000000.json"]
    write_tar(tar, members)
    with pytest.raises(SourceError, match="has no sha256"):
        list(webdataset_samples(WebdatasetConfig(tar, check_sha256=True)))


@given(st.lists(st.integers(0, 2**128 - 1), max_size=8), st.integers(0, 2**128 - 1))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_uid_is_found_if_it_is_in_the_subset(tmp_path: Path, kept: list[int], other: int) -> None:
    # numbers that share a half are the hard ones
    kept = [*kept, other ^ 1, other ^ (1 << 64)]
    pairs = np.array([divmod(number, 2**64) for number in kept], np.dtype("u8,u8"))
    np.save(tmp_path / "subset.npy", np.sort(pairs))
    uids = open_uids(tmp_path / "subset.npy")
    assert all(has_uid(uids, f"{number:032x}") for number in kept)
    assert has_uid(uids, f"{other:032x}") == (other in kept)


def test_a_subset_of_datacomp_is_imported(tmp_path: Path, picture: Any) -> None:
    members = {**datacomp(picture, 0), **datacomp(picture, 1), **datacomp(picture, 2)}
    tar = write_tar(tmp_path / "0.tar", members)
    np.save(tmp_path / "subset.npy", np.array([(0, 0), (0, 2)], np.dtype("u8,u8")))
    report = ImportReport()
    config = WebdatasetConfig(tar, uids=tmp_path / "subset.npy")
    assert [s.text for s in samples_of(webdataset_samples(config, report))] == [
        "number 0",
        "number 2",
    ]
    assert report.mended == {"samples outside of the subset left out": 1}
    members["000000001.json"] = {"uid": "7"}
    write_tar(tar, members)
    with pytest.raises(SourceError, match="uid '7' has not 32 hexadecimal digits"):
        list(webdataset_samples(config))


@pytest.mark.parametrize(
    "content, complaint",
    [
        (np.zeros(3), "expected an array of dtype"),
        (np.array([(2, 0), (1, 0)], np.dtype("u8,u8")), "not sorted"),
        (np.array([{}], object), "not a readable .npy file"),
        (None, "not a readable .npy file"),
    ],
)
def test_other_files_are_no_subsets(tmp_path: Path, content: Any, complaint: str) -> None:
    if content is not None:
        np.save(tmp_path / "subset.npy", content, allow_pickle=True)
    with pytest.raises(SourceError, match=complaint):
        list(webdataset_samples(WebdatasetConfig(tmp_path, uids=tmp_path / "subset.npy")))


def test_other_members_pass_and_code_does_not(tmp_path: Path, picture: Any) -> None:
    tar = write_tar(
        tmp_path / "0.tar",
        {
            "x.cls": "7",
            "x.depth.png": picture(image_format="PNG"),
            "x.JPG": picture(),
            "x.pkl": b"cos\nsystem\n",
            "x.pyd": b"",
            "y.cls": "1",
            "y.mp4": b"a clip",
        },
    )
    report = ImportReport()
    x, y = samples_of(webdataset_samples(WebdatasetConfig(tar), report))
    assert x.info["label"] == 7 and x.text == ""
    assert list(x.members) == ["depth.png"] and x.image == picture()
    assert (y.image, dict(y.members)) == (b"", {"mp4": b"a clip"})
    assert report.mended == {"members of unsafe formats left out": 2}


@pytest.mark.parametrize(
    "members, complaint",
    [
        ({"k.txt": "no image"}, "has no image .*found txt"),
        ({"k.jpg": b"<html>404</html>"}, "'jpg' is neither a JPEG"),
        ({"k.jpg": b""}, "'jpg' is empty"),
        ({"k.jpg": None, "k.txt": b"\xff\xfe"}, "'txt' is not UTF-8"),
        ({"k.jpg": None, "k.json": b"{"}, "'json' is not JSON"),
        ({"k.jpg": None, "k.json": b"[" * 10**5}, "'json' is not JSON"),
        ({"k.jpg": None, "k.json": {"caption": 3}}, "text in 'json' is 3"),
        ({"k.jpg": None, "k.json": b'{"a": "\\ud800"}'}, "escapes half a character"),
        ({"k.jpg": None, "k.json": b'{"caption": "\\ud800"}'}, "escapes half a character"),
        ({"k.jpg": None, "k.cls": "cat"}, "label in 'cls' is 'cat'"),
    ],
)
def test_bad_samples_of_tars_are_named(
    tmp_path: Path, picture: Any, members: dict[str, Any], complaint: str
) -> None:
    members = {k: picture() if v is None else v for k, v in members.items()}
    tar = write_tar(tmp_path / "0.tar", {"a.jpg": picture(), **members, "z.jpg": picture()})
    with pytest.raises(SourceError, match=f"0.tar: sample 'k': .*{complaint}"):
        list(webdataset_samples(WebdatasetConfig(tar)))
    report = ImportReport()
    kept = samples_of(webdataset_samples(WebdatasetConfig(tar, skip_bad=True), report))
    assert len(kept) == 2 and report.skipped == {"sample": 1}


def test_a_sample_too_large_for_memory_is_not_read(
    tmp_path: Path, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_fields, "MAX_SAMPLE", 5_000)
    tar = write_tar(tmp_path / "0.tar", {"a.mp4": bytes(5_001), "b.jpg": picture()})
    with pytest.raises(SourceError, match="sample 'a': has 5,001 bytes"):
        list(webdataset_samples(WebdatasetConfig(tar)))
    assert len(list(webdataset_samples(WebdatasetConfig(tar, skip_bad=True)))) == 1


def test_tars_that_lead_outside_are_refused(tmp_path: Path, picture: Any) -> None:
    tar = write_tar(tmp_path / "0.tar", {"../../x.jpg": picture()})
    with pytest.raises(SourceError, match="absolute or parent path"):
        list(webdataset_samples(WebdatasetConfig(tar)))
    with pytest.raises(SourceError, match="no tar here"):
        list(webdataset_samples(WebdatasetConfig(tmp_path / "no")))


@pytest.mark.parametrize("field", ["jpg json", "json[", "json[]", "a/b", "json[a]b"])
def test_a_field_that_is_none_is_named(field: str) -> None:
    with pytest.raises(SourceError, match="neither a member like"):
        TarFields(image=field)


def test_one_sample_is_in_memory_at_a_time(
    tmp_path: Path, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned: list[Path] = []
    scan = tar_fields.scan_tar
    monkeypatch.setattr(tar_fields, "scan_tar", lambda tar: (scanned.append(tar), scan(tar))[1])
    for number in (0, 1):
        write_tar(tmp_path / f"{number}.tar", datacomp(picture, number))
    stream = webdataset_samples(WebdatasetConfig(tmp_path))
    next(stream)
    assert scanned == [tmp_path / "0.tar"]


# Megatron Energon


def energon(root: Path, picture: Any, info: str = ".info.json") -> Path:
    """As `energon prepare` leaves it."""
    counts = {}
    for number in range(3):
        name = f"shards/shard_{number}.tar"
        members: dict[str, Any] = {}
        for sample in range(2):
            members[f"s{sample}.jpg"] = picture(colour=10 * number + sample)
            members[f"s{sample}.detail.json"] = {"caption": f"{number}.{sample}"}
        tar = write_tar(root / name, members)
        with tarfile.open(tar) as opened:
            offsets = [m.offset for m in opened if m.name.endswith(".jpg")] + [opened.offset]
        tar.with_suffix(".tar.idx").write_bytes(struct.pack(f"<{len(offsets)}Q", *offsets))
        counts[name] = 2
    meta = root / ".nv-meta"
    meta.mkdir()
    record = {"energon_version": "7.4.1", "shard_counts": counts}
    (meta / info).write_text(json.dumps(record) if info.endswith("json") else yaml.dump(record))
    split = {
        "exclude": ["shards/shard_1.tar/1", "shards/shard_2.tar"],
        "split_parts": {"train": ["shards/shard_{0..1}.tar"], "val": ["shards/shard_2.tar"],
            "test": []},
    }  # fmt: skip
    (meta / "split.yaml").write_text(yaml.dump(split))
    dataset = {
        "sample_type": {"__module__": "megatron.energon", "__class__": "CaptioningSample"},
        "field_map": {"image": "jpg,png", "caption": "detail.json[caption]"},
    }
    (meta / "dataset.yaml").write_text(yaml.dump(dataset))
    (meta / "index.uuid").write_text("5b1b7f1c")
    return root


@pytest.mark.parametrize("info", [".info.json", ".info.yaml"])
def test_energon_keeps_splits_and_exclusions(tmp_path: Path, picture: Any, info: str) -> None:
    root = energon(tmp_path / "e", picture, info)
    pairs = list(energon_samples(EnergonConfig(root)))
    assert [(split, s.text) for split, s in pairs] == [
        ("train", "0.0"),
        ("train", "0.1"),
        ("train", "1.0"),
    ]
    assert [s.image for _, s in pairs] == [picture(colour=n) for n in (0, 1, 10)]
    assert len({s.key for _, s in pairs}) == 3
    assert len(open_dataset(str(root / "shards"))) == 6  # in place


def test_energon_maps_questions_and_labels(tmp_path: Path, picture: Any) -> None:
    root = energon(tmp_path / "e", picture)
    write_tar(
        root / "shards" / "shard_0.tar",
        {
            "a.png": picture(image_format="PNG"),
            "a.q.txt": "What is it?",
            "a.a.json": ["a cat", "a dog"],
            "b.png": picture(image_format="PNG"),
            "b.q.txt": "Where?",
            "b.a.json": [],
        },
    )
    fields = {"image": "png", "context": "q.txt", "answers": "a.json"}
    (root / ".nv-meta" / "dataset.yaml").write_text(yaml.dump({"field_map": fields}))
    (root / ".nv-meta" / "split.yaml").write_text(
        yaml.dump({"split_parts": {"train": ["shards/shard_0.tar"]}})
    )
    samples = samples_of(energon_samples(EnergonConfig(root)))
    (question,) = annotations_from_info(samples[0].info).qa
    assert (question.question, question.answers) == ("What is it?", ("a cat", "a dog"))
    assert annotations_from_info(samples[1].info).qa[0].answers == ()
    fields = {"image": "jpg", "label": "cls", "label_name": "name.txt"}
    (root / ".nv-meta" / "dataset.yaml").write_text(yaml.dump({"field_map": fields}))
    assert energon_fields(root) == TarFields("jpg", "name.txt", "cls")


@pytest.mark.parametrize(
    "file, content, complaint",
    [
        ("dataset.yaml", "sample_loader: sample_loader.py:load", "is code and is not run"),
        ("dataset.yaml", "sample_type: {}", "has no field_map"),
        ("dataset.yaml", "field_map: {sound: wav}", "field_map has 'sound': 'wav'"),
        ("dataset.yaml", "- a", "holds a list"),
        ("dataset.yaml", "a: !!python/object/apply:os.system [ls]", "not YAML"),
        ("split.yaml", "split_parts: [a]", "expected split_parts"),
        ("split.yaml", "split_parts: {train: [../x.tar]}", "leads out of"),
        ("split.yaml", "split_parts: {train: [shards/x.tar]}", "x.tar: this tar is missing"),
        (".info.json", "{}", "has no shard_counts"),
        (".info.json", '{"shard_counts": {"shards/shard_0.tar": 3}}', r"its samples: 2, .*info: 3"),
    ],
)
def test_energon_files_that_do_not_fit_are_named(
    tmp_path: Path, picture: Any, file: str, content: str, complaint: str
) -> None:
    root = energon(tmp_path / "e", picture)
    (root / ".nv-meta" / file).write_text(content)
    with pytest.raises(SourceError, match=complaint):
        list(energon_samples(EnergonConfig(root)))


def test_an_energon_index_of_another_tar_is_found(tmp_path: Path, picture: Any) -> None:
    root = energon(tmp_path / "e", picture)
    (root / "shards" / "shard_0.tar.idx").write_bytes(bytes(8 * 9))
    with pytest.raises(SourceError, match=r"its samples: 2, .*info: 2, shard_0.tar.idx: 8"):
        list(energon_samples(EnergonConfig(root)))
    with pytest.raises(SourceError, match=r"no \.nv-meta here"):
        list(energon_samples(EnergonConfig(tmp_path)))


# Hugging Face hub


CARD = """---
license: cc-by-4.0
configs:
- config_name: small
  data_files:
  - split: train
    path: data/small-*.tar
- config_name: full
  default: true
  data_files:
  - split: train
    path:
    - "data/train-*.tar"
    - data/small-0.tar
  - split: validation
    path: data/val-0.tar
---
# A data set
---
not front matter: {
"""


@pytest.fixture
def repository(tmp_path: Path, picture: Any, put: Any) -> Path:
    root = tmp_path / "repo"
    put(root / "README.md", CARD)
    for number, name in enumerate(("train-0", "train-1", "small-0", "val-0")):
        members = {"0.png": picture(colour=number, image_format="PNG"), "0.cls": str(number),
            "0.json": {"caption": name}}  # fmt: skip
        write_tar(root / "data" / f"{name}.tar", members)
    return root


def test_a_repository_of_the_hub_declares_its_splits(repository: Path) -> None:
    pairs = list(huggingface_samples(HuggingfaceConfig(repository)))
    assert [(split, s.text, s.info["label"]) for split, s in pairs] == [
        ("train", "train-0", 0),
        ("train", "train-1", 1),
        ("train", "small-0", 2),
        ("validation", "val-0", 3),
    ]
    assert len({s.key for _, s in pairs}) == 4
    small = huggingface_splits(HuggingfaceConfig(repository, config_name="small"))
    assert {k: [t.name for t in v] for k, v in small.items()} == {"train": ["small-0.tar"]}
    assert huggingface_card(repository)["license"] == "cc-by-4.0"


def test_without_configs_paths_name_the_splits(tmp_path: Path, picture: Any, put: Any) -> None:
    put(tmp_path / "README.md", "# Just text")
    for name in ("train/0", "imagenet1k-validation-00", "my_test/0", "part-1", "trainer/0"):
        write_tar(tmp_path / f"{name}.tar", {"0.jpg": picture()})
    splits = huggingface_splits(HuggingfaceConfig(tmp_path))
    found = {k: [t.relative_to(tmp_path).as_posix() for t in v] for k, v in splits.items()}
    assert found == {
        "test": ["my_test/0.tar"],
        "train": ["part-1.tar", "train/0.tar", "trainer/0.tar"],
        "validation": ["imagenet1k-validation-00.tar"],
    }


@pytest.mark.parametrize(
    "card, name, complaint",
    [
        (CARD, "large", "no config 'large'; choose one with --config-name: small, full"),
        (CARD.replace("default: true", "default: false"), "", "no config 'default'"),
        ("---\nconfigs: 3\n---\n", "", "configs is no list"),
        ("---\nconfigs: [\n---\n", "", "not YAML"),
        ("---\nconfigs: [{config_name: a}]\n---\n", "", "has no data_files"),
        ("---\nconfigs: [{data_files: '../*.tar'}]\n---\n", "", "lead out of the repository"),
        ("---\nconfigs: [{data_files: 'x/*.tar'}]\n---\n", "", "match no tar"),
        ("---\nlicense: mit\n---\n", "a", "has no configs"),
    ],
)
def test_cards_that_do_not_fit_are_named(
    repository: Path, put: Any, card: str, name: str, complaint: str
) -> None:
    put(repository / "README.md", card)
    with pytest.raises(SourceError, match=complaint):
        list(huggingface_samples(HuggingfaceConfig(repository, config_name=name)))
