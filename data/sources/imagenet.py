"""ImageNet-1k (ILSVRC 2012) from the published archives, without unpacking them.

    ROOT/ILSVRC2012_img_train.tar         holds n01440764.tar, which holds n01440764_10026.JPEG, ...
    ROOT/ILSVRC2012_img_val.tar           holds ILSVRC2012_val_00000001.JPEG, ...
    ROOT/ILSVRC2012_devkit_t12.tar.gz     data/meta.mat, data/ILSVRC2012_validation_ground_truth.txt

Instead of the development kit, which says the classes of the validation pictures, there may be the
files of Kaggle's edition: `LOC_synset_mapping.txt` and `LOC_val_solution.csv`.

Classes are labelled 0 to 999 in the order of their WordNet ids, as everybody does. The numbers of
the development kit (ILSVRC2012_ID, 1 to 1000) are in another order, and are translated.
"""

import csv
import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from groundwork.data.annotations import Annotations
from groundwork.data.samples import Concept, Sample
from groundwork.data.sources.coco import check_splits
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import measure
from groundwork.data.sources.keys import sample_key
from groundwork.data.sources.report import BadItemError, ImportReport

KIND: Final = "imagenet"

WORDNET_ID: Final = re.compile(r"n\d{8}")
TRAIN_TAR: Final = "ILSVRC2012_img_train.tar"
VAL_TAR: Final = "ILSVRC2012_img_val.tar"
DEVKIT: Final = "ILSVRC2012_devkit_t12"
META: Final = "data/meta.mat"
GROUND_TRUTH: Final = "data/ILSVRC2012_validation_ground_truth.txt"
SYNSET_MAPPING: Final = "LOC_synset_mapping.txt"
VAL_SOLUTION: Final = "LOC_val_solution.csv"


@dataclass(frozen=True)
class ImagenetConfig:
    """Where the archives lie. The development kit may be unpacked: ROOT/ILSVRC2012_devkit_t12."""

    root: Path
    splits: tuple[str, ...] = ("train", "val")
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_splits(type(self).__name__, self.splits)
        if unknown := set(self.splits) - {"train", "val"}:
            raise SourceError(f"ImagenetConfig: no split {min(unknown)!r}; there are train and val")


@dataclass(frozen=True)
class _Classes:
    """names: WordNet id -> names, in the order of the ids. numbers: ILSVRC2012_ID -> WordNet id."""

    names: Mapping[str, tuple[str, ...]]
    numbers: Mapping[int, str]
    labels: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        labels = {wordnet_id: label for label, wordnet_id in enumerate(self.names)}
        object.__setattr__(self, "labels", labels)


def imagenet_concepts(config: ImagenetConfig) -> list[Concept]:
    """The classes in the order of their WordNet ids; names need not be unique (two cranes)."""
    return [
        Concept(label, names[0], names[1:], info={"wordnet_id": wordnet_id})
        for label, (wordnet_id, names) in enumerate(_classes(config.root).names.items())
    ]


def imagenet_samples(
    config: ImagenetConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every picture in the order of the archives, byte for byte, with its class name as text."""
    report = report or ImportReport()
    classes = _classes(config.root)
    if "train" in config.splits:
        for where, wordnet_id, name, data in _train_files(config.root / TRAIN_TAR, classes.labels):
            yield from _sample(config, "train", where, name, data, wordnet_id, classes, report)
    if "val" in config.splits:
        answers = _val_classes(config.root, classes)
        for where, name, data in _val_files(config.root / VAL_TAR):
            answer = answers.get(name.rpartition(".")[0])
            yield from _sample(config, "val", where, name, data, answer, classes, report)


def _sample(
    config: ImagenetConfig,
    split: str,
    where: str,
    name: str,
    data: bytes,
    wordnet_id: str | None,
    classes: _Classes,
    report: ImportReport,
) -> Iterator[tuple[str, Sample]]:
    try:
        if wordnet_id is None:
            raise BadItemError("its class is not in the ground truth")
        encoded = measure(data)
    except BadItemError as error:
        report.bad("image", where, str(error), skip=config.skip_bad)
        return
    known = Annotations(
        width=encoded.width,
        height=encoded.height,
        label=classes.labels[wordnet_id],
        source={"file_name": name, "wordnet_id": wordnet_id},
    )
    key = sample_key(name.rpartition(".")[0])
    text = classes.names[wordnet_id][0]
    yield split, Sample(key, data, encoded.format, text, known.to_info())


def _train_files(tar: Path, labels: Mapping[str, int]) -> Iterator[tuple[str, str, str, bytes]]:
    """(place, WordNet id, name, bytes) of each picture of the tar of tars."""
    with _opened(tar) as archive:
        for name, inner in _files(tar, archive):
            wordnet_id = name.removesuffix(".tar")
            if not WORDNET_ID.fullmatch(wordnet_id) or not name.endswith(".tar"):
                raise SourceError(f"{tar}: holds {name!r}; expected the tars of the classes")
            if wordnet_id not in labels:
                raise SourceError(f"{tar}: {name}: this class is not among the {len(labels)} known")
            place = f"{tar}: {name}"
            with _opened(tar, inner, place) as pictures:
                for picture, file in _files(place, pictures):
                    yield f"{place}: {picture}", wordnet_id, picture, _read(file, place)


def _val_files(tar: Path) -> Iterator[tuple[str, str, bytes]]:
    with _opened(tar) as archive:
        for name, file in _files(tar, archive):
            yield f"{tar}: {name}", name, _read(file, str(tar))


def _opened(tar: Path, file: IO[bytes] | None = None, place: str = "") -> tarfile.TarFile:
    try:
        return tarfile.open(tar if file is None else None, "r:", fileobj=file)
    except FileNotFoundError as error:
        raise SourceError(
            f"{tar}: missing; the archives come from image-net.org, to be fetched by whoever has "
            "agreed to its terms"
        ) from error
    except (tarfile.TarError, EOFError) as error:
        raise SourceError(
            f"{place or tar}: not a readable tar ({error}); fetch it again"
        ) from error


def _files(place: object, archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    """(base name, content) of each regular file; others are refused."""
    try:
        while (entry := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # or it keeps every header
            if entry.isdir():
                continue
            file = archive.extractfile(entry) if entry.isreg() else None
            if file is None:
                raise SourceError(f"{place}: {entry.name!r} is a link or a device; refused")
            yield entry.name.rpartition("/")[2], file
    except (tarfile.TarError, EOFError) as error:
        raise SourceError(f"{place}: not a readable tar ({error}); fetch it again") from error


def _read(file: IO[bytes], place: str) -> bytes:
    try:
        return file.read()
    except (tarfile.TarError, EOFError) as error:
        raise SourceError(f"{place}: cut short ({error}); fetch it again") from error


def _classes(root: Path) -> _Classes:
    mapping = root / SYNSET_MAPPING
    if mapping.is_file():
        names = {}
        for number, line in enumerate(mapping.read_text("utf-8-sig").splitlines(), start=1):
            wordnet_id, _, listed = line.strip().partition(" ")
            if not WORDNET_ID.fullmatch(wordnet_id) or not listed:
                raise SourceError(f"{mapping}: line {number}: expected 'n01440764 name, name'")
            names[wordnet_id] = _names(listed)
        return _Classes(dict(sorted(names.items())), {})
    synsets = _read_meta(_devkit_file(root, META))
    names = {wordnet_id: _names(words) for _, wordnet_id, words in synsets}
    return _Classes(dict(sorted(names.items())), {number: w for number, w, _ in synsets})


def _read_meta(content: bytes) -> list[tuple[int, str, str]]:
    """(ILSVRC2012_ID, WordNet id, words) of the classes that have no children."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise SourceError(
            f"{META}: MATLAB's format is read with scipy: pip install "
            f"'groundwork-pretrain[annotations]', or put Kaggle's {SYNSET_MAPPING} and "
            f"{VAL_SOLUTION} there instead"
        ) from error
    try:
        synsets: Any = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        return [
            (int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"]))
            for row in synsets.ravel()
            if int(row["num_children"]) == 0
        ]
    except (ValueError, KeyError, TypeError, IndexError, NotImplementedError) as error:
        raise SourceError(f"{META}: not the table of synsets ({error}); fetch it again") from error


def _val_classes(root: Path, classes: _Classes) -> dict[str, str]:
    """Name of a validation picture, without extension -> WordNet id."""
    solution = root / VAL_SOLUTION
    if solution.is_file():
        with solution.open(newline="", encoding="utf-8-sig") as file:
            rows = {row[0]: row[1].split(" ")[0] for row in csv.reader(file) if len(row) > 1}
        rows.pop("ImageId", None)
        if unknown := sorted(set(rows.values()) - set(classes.names)):
            raise SourceError(f"{solution}: class {unknown[0]!r} is not in {SYNSET_MAPPING}")
        return rows
    if not classes.numbers:
        raise SourceError(
            f"{root}: {SYNSET_MAPPING} is there, but not {VAL_SOLUTION}, which says the classes of "
            "the validation pictures; fetch it, or remove the mapping and use the development kit"
        )
    answers = {}
    lines = _devkit_file(root, GROUND_TRUTH).decode("ascii", "replace").split()
    for line, text in enumerate(lines, start=1):
        if not text.isdecimal() or int(text) not in classes.numbers:
            raise SourceError(f"{GROUND_TRUTH}: line {line} is {text!r}; expected a class number")
        answers[f"ILSVRC2012_val_{line:08d}"] = classes.numbers[int(text)]
    return answers


def _devkit_file(root: Path, name: str) -> bytes:
    folder, archive = root / DEVKIT, root / f"{DEVKIT}.tar.gz"
    if (folder / name).is_file():
        return (folder / name).read_bytes()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            file = tar.extractfile(f"{DEVKIT}/{name}")
            if file is None:
                raise SourceError(f"{archive}: {name} is no regular file; fetch it again")
            return file.read()
    except FileNotFoundError as error:
        raise SourceError(
            f"{root}: neither {archive.name} nor {SYNSET_MAPPING} is here, one of which names the "
            "classes; fetch one of them"
        ) from error
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise SourceError(f"{archive}: {name} cannot be read ({error}); fetch it again") from error


def _names(listed: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
