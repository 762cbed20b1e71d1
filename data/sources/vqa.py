"""VQA v2 (Goyal et al. 2017): questions about pictures of COCO, ten answers each.

    ROOT/v2_OpenEndedQuestions_mscoco_train2014_questions.json   also below ROOT/Questions
    ROOT/v2_mscoco_train2014_annotations.json                    also below ROOT/Annotations
    ROOT/train2014/COCO_train2014_000000458752.jpg               also below ROOT/Images/mscoco

A picture is one sample with all of its questions. The splits "test" and "test-dev", on the pictures
of test2015, have questions without answers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from groundwork.data.annotations import Annotations, Question
from groundwork.data.samples import Sample
from groundwork.data.sources.coco import check_splits
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import find_inside, read_image
from groundwork.data.sources.json_files import JsonFile, member, require_files
from groundwork.data.sources.keys import sample_key
from groundwork.data.sources.report import BadItemError, ImportReport

KIND: Final = "vqa"

#: Split -> (the part of file names that tells it, the folder of its pictures).
SUBSETS: Final = {
    "train": ("train2014", "train2014"),
    "val": ("val2014", "val2014"),
    "test": ("test2015", "test2015"),
    "test-dev": ("test-dev2015", "test2015"),
}


@dataclass(frozen=True)
class VqaConfig:
    """Where questions, answers and pictures lie."""

    root: Path
    splits: tuple[str, ...] = ("train", "val")
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_splits(type(self).__name__, self.splits)
        if unknown := set(self.splits) - set(SUBSETS):
            raise SourceError(
                f"VqaConfig: no split {min(unknown)!r}; choose from {', '.join(SUBSETS)}"
            )


def vqa_samples(
    config: VqaConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every picture with its questions, in the order in which the questions name them."""
    report = report or ImportReport()
    require_files(_questions_file(config, split) for split in config.splits)
    for split in config.splits:
        subset, folder = SUBSETS[split]
        path = _questions_file(config, split)
        answers = {} if split.startswith("test") else _answers(config, subset, report)
        roots = (config.root / folder, config.root / "Images" / "mscoco" / folder)
        for image_id, questions in _questions(config, path, split, answers, report).items():
            try:
                name = f"COCO_{folder}_{image_id:012d}.jpg"
                encoded = read_image(find_inside(roots, name))
            except BadItemError as error:
                where = f"{path}: image {image_id}"
                report.bad("image", where, str(error), skip=config.skip_bad)
                continue
            known = Annotations(
                width=encoded.width,
                height=encoded.height,
                qa=tuple(questions),
                source={"image_id": image_id, "file_name": name},
            )
            key = sample_key(Path(name).stem)
            yield split, Sample(key, encoded.data, encoded.format, "", known.to_info())


def _questions(
    config: VqaConfig,
    path: Path,
    split: str,
    answers: Mapping[int, tuple[tuple[str, ...], str]],
    report: ImportReport,
) -> dict[int, list[Question]]:
    """Image id -> its questions with their answers."""
    questions: dict[int, list[Question]] = {}
    seen: set[int] = set()
    for where, record in JsonFile(path).records("questions"):
        try:
            number = member(record, "question_id", int)
            where = f"{path}: question {number}"
            if number in seen:
                raise BadItemError("is there twice")
            seen.add(number)
            text = member(record, "question", str).strip()
            if not text:
                raise BadItemError("is empty")
            if not split.startswith("test") and number not in answers:
                raise BadItemError("has no answers in the file of annotations")
            replies, kind = answers.get(number, ((), ""))
            image_id = member(record, "image_id", int)
        except BadItemError as error:
            report.bad("question", where, str(error), skip=config.skip_bad)
            continue
        questions.setdefault(image_id, []).append(Question(text, replies, number, kind))
    return questions


def _answers(
    config: VqaConfig, subset: str, report: ImportReport
) -> dict[int, tuple[tuple[str, ...], str]]:
    """Question id -> (answers of all annotators, type of answer)."""
    path = _found(config.root, f"v2_mscoco_{subset}_annotations.json")
    answers = {}
    for where, record in JsonFile(path).records("annotations"):
        try:
            number = member(record, "question_id", int)
            where = f"{path}: question {number}"
            if number in answers:
                raise BadItemError("is there twice")
            replies = tuple(_answer(reply) for reply in member(record, "answers", list))
            kind = member(record, "answer_type", str) if "answer_type" in record else ""
            answers[number] = (replies, kind)
        except BadItemError as error:
            report.bad("question", where, str(error), skip=config.skip_bad)
    return answers


def _answer(reply: Any) -> str:
    if not isinstance(reply, dict):
        raise BadItemError(f"an answer is {repr(reply)[:60]}; expected an object")
    return member(reply, "answer", str)


def _questions_file(config: VqaConfig, split: str) -> Path:
    return _found(config.root, f"v2_OpenEndedQuestions_mscoco_{SUBSETS[split][0]}_questions.json")


def _found(root: Path, name: str) -> Path:
    folders = (root, root / "Questions", root / "Annotations", root / "annotations")
    return next((f / name for f in folders if (f / name).is_file()), root / name)
