"""COCO captions, Karpathy's splits, VQA v2 and GIT's tables in their published layouts."""

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from groundwork.data.annotations import annotations_from_info
from groundwork.data.sources import git_tsv, json_files
from groundwork.data.sources.coco_captions import CocoCaptionsConfig, coco_captions_samples
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.git_tsv import GitTsvConfig, git_tsv_samples
from groundwork.data.sources.report import ImportReport
from groundwork.data.sources.vqa import VqaConfig, vqa_samples

# COCO captions


def captions(numbers: list[int]) -> dict[str, Any]:
    return {
        "info": {},
        "licenses": [],
        "images": [
            {"license": 5, "file_name": f"{n:012d}.jpg", "height": 6, "width": 8, "id": n}
            for n in numbers
        ],
        "annotations": [
            {"image_id": n, "id": 10 * n + k, "caption": f"{text} {n}.\n"}
            for text, k in (("A bicycle", 1), ("A clock", 2))
            for n in reversed(numbers)
        ],
    }


@pytest.fixture
def coco(tmp_path: Path, picture: Any, put: Any) -> Path:
    for split, numbers in (("train", [9, 25]), ("val", [139])):
        put(tmp_path / "annotations" / f"captions_{split}2017.json", captions(numbers))
        for n in numbers:
            put(tmp_path / f"{split}2017" / f"{n:012d}.jpg", picture(colour=n))
    return tmp_path


def test_a_picture_with_its_captions_is_one_sample(coco: Path, picture: Any) -> None:
    pairs = list(coco_captions_samples(CocoCaptionsConfig(coco)))
    assert [(split, s.key, s.text, s.info["captions"]) for split, s in pairs] == [
        ("train", "000000000009", "A bicycle 9.", ["A bicycle 9.", "A clock 9."]),
        ("train", "000000000025", "A bicycle 25.", ["A bicycle 25.", "A clock 25."]),
        ("val", "000000000139", "A bicycle 139.", ["A bicycle 139.", "A clock 139."]),
    ]
    assert pairs[1][1].image == picture(colour=25)
    assert annotations_from_info(pairs[0][1].info).source["image_id"] == 9


@pytest.mark.parametrize(
    "change, kind, complaint",
    [
        (lambda r: r["annotations"][0].update(caption=" "), "caption", "its caption is empty"),
        (lambda r: r["annotations"][0].update(caption=3), "caption", "'caption' is 3"),
        (
            lambda r: r["annotations"][0].update(image_id=7),
            "caption",
            "7: has captions, but is not",
        ),
        (lambda r: r["images"][0].update(id=25), "image", "image 25: is there twice"),
        (lambda r: r["images"].append({"id": 3, "file_name": "x"}), "image", "3: has no caption"),
        (lambda r: r["images"][0].update(file_name="../a"), "image", "9: file name .* refused"),
    ],
)
def test_wrong_captions_are_named(
    coco: Path, put: Any, change: Any, kind: str, complaint: str
) -> None:
    record = captions([9, 25])
    change(record)
    put(coco / "annotations" / "captions_train2017.json", record)
    with pytest.raises(SourceError, match=complaint):
        list(coco_captions_samples(CocoCaptionsConfig(coco)))
    report = ImportReport()
    assert list(coco_captions_samples(CocoCaptionsConfig(coco, skip_bad=True), report))
    assert report.skipped[kind] == 1


def karpathy() -> dict[str, Any]:
    def image(split: str, number: int, folder: str) -> dict[str, Any]:
        return {
            "filepath": folder,
            "sentids": [0, 1],
            "filename": f"COCO_{folder}_{number:012d}.jpg",
            "imgid": 0,
            "split": split,
            "sentences": [{"tokens": ["a", "cat"], "raw": f"A cat {number}. ", "imgid": 0}],
            "cocoid": number,
        }

    return {
        "images": [
            image("test", 391895, "val2014"),
            image("restval", 60623, "val2014"),
            image("train", 9, "train2014"),
            image("val", 5, "val2014"),
        ],
        "dataset": "coco",
    }


def test_karpathys_splits_put_restval_to_train(tmp_path: Path, picture: Any, put: Any) -> None:
    record = karpathy()
    put(tmp_path / "dataset_coco.json", record)
    for n, image in enumerate(record["images"]):
        put(tmp_path / image["filepath"] / image["filename"], picture(colour=n))
    config = CocoCaptionsConfig(tmp_path, splits=("train", "test"), karpathy=True)
    pairs = list(coco_captions_samples(config))
    assert [(split, s.key, s.text) for split, s in pairs] == [
        ("test", "COCO_val2014_000000391895", "A cat 391895."),
        ("train", "COCO_val2014_000000060623", "A cat 60623."),
        ("train", "COCO_train2014_000000000009", "A cat 9."),
    ]
    assert pairs[0][1].info["source"]["cocoid"] == 391895
    record["images"][0]["filepath"] = "../val2014"
    put(tmp_path / "dataset_coco.json", record)
    with pytest.raises(SourceError, match=r"COCO_val2014_000000391895.jpg: .* refused"):
        list(coco_captions_samples(config))


# VQA v2

QUESTIONS = [
    {"image_id": 458752, "question": "What is this photo taken looking through?",
        "question_id": 458752000},
    {"image_id": 262146, "question": "Is the sky blue?", "question_id": 262146000},
    {"image_id": 458752, "question": "What position is this man playing?",
        "question_id": 458752001},
]  # fmt: skip


def answers(number: int, kind: str, *texts: str) -> dict[str, Any]:
    return {
        "question_type": "what is this",
        "multiple_choice_answer": texts[0],
        "answers": [
            {"answer": text, "answer_confidence": "yes", "answer_id": i + 1}
            for i, text in enumerate(texts)
        ],
        "image_id": number // 1000,
        "answer_type": kind,
        "question_id": number,
    }


ANSWERS = [
    answers(458752000, "other", *["net"] * 8, "netting", "mesh"),
    answers(262146000, "yes/no", *["yes"] * 10),
    answers(458752001, "other", *["pitcher"] * 9, "catcher"),
]


@pytest.fixture(params=["flat", "official"])
def vqa(request: pytest.FixtureRequest, tmp_path: Path, picture: Any, put: Any) -> Path:
    official = request.param == "official"
    questions = tmp_path / "Questions" if official else tmp_path
    annotations = tmp_path / "Annotations" if official else tmp_path
    images = tmp_path / "Images" / "mscoco" if official else tmp_path
    name = "v2_OpenEndedQuestions_mscoco_{}_questions.json"
    put(questions / name.format("train2014"), {"info": {}, "questions": QUESTIONS})
    put(questions / name.format("test-dev2015"), {"questions": QUESTIONS[1:2]})
    put(annotations / "v2_mscoco_train2014_annotations.json", {"annotations": ANSWERS})
    for n in (458752, 262146):
        put(images / "train2014" / f"COCO_train2014_{n:012d}.jpg", picture(colour=n))
    put(images / "test2015" / "COCO_test2015_000000262146.jpg", picture())
    return tmp_path


def test_a_picture_with_its_questions_is_one_sample(vqa: Path, picture: Any) -> None:
    first, second = vqa_samples(VqaConfig(vqa, splits=("train",)))
    assert first[1].key == "COCO_train2014_000000458752"
    assert first[1].image == picture(colour=458752)
    known = annotations_from_info(first[1].info)
    assert [(q.id, q.question, q.type) for q in known.qa] == [
        (458752000, "What is this photo taken looking through?", "other"),
        (458752001, "What position is this man playing?", "other"),
    ]
    assert known.qa[0].answers == (*["net"] * 8, "netting", "mesh")
    assert second[1].info["qa"][0]["type"] == "yes/no"
    ((split, test),) = vqa_samples(VqaConfig(vqa, splits=("test-dev",)))
    assert split == "test-dev" and test.key == "COCO_test2015_000000262146"
    assert annotations_from_info(test.info).qa[0].answers == ()
    with pytest.raises(SourceError, match=r"_val2014_questions.json: annotation file is missing"):
        list(vqa_samples(VqaConfig(vqa)))
    with pytest.raises(SourceError, match="no split 'dev'"):
        VqaConfig(vqa, splits=("dev",))


def test_large_files_of_questions_are_streamed(vqa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = VqaConfig(vqa, splits=("train",))
    whole = list(vqa_samples(config))
    monkeypatch.setattr(json_files, "LARGE_FILE", 0)
    assert list(vqa_samples(config)) == whole


@pytest.mark.parametrize(
    "change, kind, complaint",
    [
        (lambda q, a: a.pop(), "question", "question 458752001: has no answers"),
        (lambda q, a: q.append(q[0]), "question", "question 458752000: is there twice"),
        (lambda q, a: a.append(a[0]), "question", "annotations.json: question 458752000: is there"),
        (lambda q, a: q[0].update(question=""), "question", "question 458752000: is empty"),
        (lambda q, a: q[0].update(image_id="x"), "question", "'image_id' is 'x'"),
        (lambda q, a: a[0].update(answers=["net"]), "question", "an answer is 'net'"),
        (lambda q, a: q[1].update(image_id=4), "image", "image 4: image file is missing"),
    ],
)
def test_wrong_questions_are_named(
    vqa: Path, put: Any, change: Any, kind: str, complaint: str
) -> None:
    questions, replies = json.loads(json.dumps([QUESTIONS, ANSWERS]))
    change(questions, replies)
    put(next(vqa.rglob("*train2014_questions.json")), {"questions": questions})
    put(next(vqa.rglob("*annotations.json")), {"annotations": replies})
    config = VqaConfig(vqa, splits=("train",))
    with pytest.raises(SourceError, match=complaint):
        list(vqa_samples(config))
    report = ImportReport()
    kept = list(vqa_samples(VqaConfig(vqa, splits=("train",), skip_bad=True), report))
    assert kept and report.skipped[kind] >= 1


# GIT's tables


def write_tables(
    root: Path, images: list[tuple[str, bytes]], texts: list[tuple[str, Any]], side_cars: str
) -> GitTsvConfig:
    for name, rows in (
        ("train.img.tsv", [(k, base64.b64encode(data).decode()) for k, data in images]),
        ("train.caption.tsv", [(k, json.dumps(records)) for k, records in texts]),
    ):
        lines = [f"{key}\t{content}\n".encode() for key, content in rows]
        offsets = [sum(map(len, lines[:n])) for n in range(len(lines))]
        path = root / name
        path.write_bytes(b"".join(lines))
        if side_cars == "text":
            path.with_suffix(".lineidx").write_text("".join(f"{o}\n" for o in offsets))
        elif side_cars == "binary":
            path.with_suffix(".lineidx.8b").write_bytes(struct.pack(f"<{len(offsets)}q", *offsets))
    return GitTsvConfig(root / "train.img.tsv", root / "train.caption.tsv")


TEXTS: list[tuple[str, Any]] = [
    ("391895", [{"caption": "A man\ton a motorcycle"}, {"caption": "A man riding"}]),
    ("60623", [{"question": "Who?", "question_id": 7, "answers": [{"answer": "a girl"}]}]),
    ("a/b 1", [{"question": "What?", "question_id": "q8"}, {"caption": "x"}]),
]


@pytest.fixture(params=["none", "text", "binary"])
def tables(request: pytest.FixtureRequest, tmp_path: Path, picture: Any) -> GitTsvConfig:
    images = [(key, picture(colour=n)) for n, (key, _) in enumerate(TEXTS)]
    return write_tables(tmp_path, images, TEXTS, request.param)


def test_gits_tables_become_samples(tables: GitTsvConfig, picture: Any) -> None:
    samples = [s for _, s in git_tsv_samples(tables)]
    assert [s.image for s in samples] == [picture(colour=n) for n in range(3)]
    assert [s.text for s in samples] == ["A man\ton a motorcycle", "", "x"]
    assert samples[0].info["captions"] == ["A man\ton a motorcycle", "A man riding"]
    who, what = (annotations_from_info(s.info).qa[0] for s in samples[1:])
    assert (who.question, who.answers, who.id) == ("Who?", ("a girl",), 7)
    assert (what.answers, what.id) == ((), "q8")
    assert samples[0].key == "391895" and samples[2].key.startswith("a-b_1-")
    assert samples[2].info["source"] == {"key": "a/b 1"}
    alone = [s for _, s in git_tsv_samples(GitTsvConfig(tables.images, split="val"))]
    assert [s.image for s in alone] == [s.image for s in samples]
    assert all(s.text == "" for s in alone)


ROW = b"7\t"


@pytest.mark.parametrize(
    "image_row, text_row, complaint",
    [
        (b"7\tno base64!", b"7\t[]", "line 2: key '7': its image is not base64"),
        (b"7\taGVsbG8=", b"7\t[]", "line 2: key '7': its image is neither a JPEG"),
        (b"7", b"7\t[]", "line 2: has 1 columns"),
        (b"7\t[]\taGVsbG8=", b"7\t[]", "line 2: has 3 columns"),
        (b"\xff\taGVsbG8=", b"7\t[]", "line 2: is not UTF-8"),
        (None, b"8\t[]", "line 2: its key is '7', the table of texts has '8'"),
        (None, b"7\t[{]", "line 2: key '7': its texts are not JSON"),
        (None, b'7\t{"caption": "x"}', "its texts are .*expected a list of objects"),
        (None, b'7\t[{"caption": 3}]', "'caption' is 3"),
        (None, b'7\t[{"question": "?", "answers": [3]}]', "its answers are .*expected strings"),
        (None, b"7", "line 2: has 1 columns"),
    ],
)
def test_wrong_rows_are_named(
    tmp_path: Path, picture: Any, image_row: bytes | None, text_row: bytes, complaint: str
) -> None:
    config = write_tables(tmp_path, [("1", picture())], [("1", [])], "none")
    good = b"7\t" + base64.b64encode(picture())
    last = b"9\t" + base64.b64encode(picture())
    assert config.texts is not None
    with config.images.open("ab") as file:
        file.write((image_row or good) + b"\n" + last + b"\n")
    with config.texts.open("ab") as file:
        file.write(text_row + b"\n9\t[]\n")
    with pytest.raises(SourceError, match=complaint):
        list(git_tsv_samples(config))
    report = ImportReport()
    skipping = GitTsvConfig(config.images, config.texts, skip_bad=True)
    assert [s.key for _, s in git_tsv_samples(skipping, report)] == ["1", "9"]
    assert report.skipped == {"row": 1}


def test_a_row_without_end_is_not_read(
    tmp_path: Path, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git_tsv, "MAX_ROW", 1000)
    (tmp_path / "x.tsv").write_bytes(b"1\t" + b"A" * 1000)
    with pytest.raises(SourceError, match="line 1 is longer than 1,000 bytes"):
        list(git_tsv_samples(GitTsvConfig(tmp_path / "x.tsv", skip_bad=True)))


def test_a_key_twice_is_named(tmp_path: Path, picture: Any) -> None:
    config = write_tables(tmp_path, [("1", picture())] * 2, [("1", [])] * 2, "none")
    with pytest.raises(SourceError, match="line 2: key '1' is there twice"):
        list(git_tsv_samples(config))


@pytest.mark.parametrize("skip_bad", [False, True])
def test_tables_of_unequal_length_are_refused(tmp_path: Path, picture: Any, skip_bad: bool) -> None:
    both = [("1", picture()), ("2", picture())]
    config = write_tables(tmp_path, both, [("1", [])], "none")
    with pytest.raises(SourceError, match="ends before row 2 of"):
        list(git_tsv_samples(GitTsvConfig(config.images, config.texts, skip_bad=skip_bad)))
    config = write_tables(tmp_path, both[:1], [("1", []), ("2", [])], "none")
    with pytest.raises(SourceError, match="has more rows than"):
        list(git_tsv_samples(GitTsvConfig(config.images, config.texts, skip_bad=skip_bad)))
    with pytest.raises(SourceError, match="table is missing"):
        list(git_tsv_samples(GitTsvConfig(tmp_path / "no.tsv")))


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("train.img.lineidx", b"0\n5\n", "line 2 begins at byte"),
        ("train.img.lineidx", b"0\n", "line 2 begins at byte"),
        ("train.img.lineidx", b"0\nx\n", "lineidx: line 2 is b'x"),
        ("train.img.lineidx.8b", struct.pack("<2q", 0, 5), "line 2 begins at byte"),
        ("train.img.lineidx.8b", b"1234567", "no multiple of 8"),
        ("train.caption.lineidx", b"0\n5\n10\n15\n", "has 2 more rows"),
    ],
)
def test_a_side_car_of_another_table_is_named(
    tmp_path: Path, picture: Any, name: str, content: bytes, complaint: str
) -> None:
    rows = [("1", picture()), ("2", picture())]
    config = write_tables(tmp_path, rows, [("1", []), ("2", [])], "none")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=complaint):
        list(git_tsv_samples(config))
