"""Data set repositories of the Hugging Face hub that hold WebDataset tars, as cloned or fetched.

    ROOT/README.md             front matter: configs: [{config_name, data_files: [{split, path}]}]
    ROOT/data/train-0000.tar   or ROOT/train/0000.tar, ...

Without `configs`, a tar belongs to the split that its path names (train, validation, test), else to
train. Such tars can be streamed in place, too; importing applies the splits and checks all samples.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml

from groundwork.data.samples import Sample
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.keys import sample_key
from groundwork.data.sources.report import BadItemError, ImportReport
from groundwork.data.sources.tar_fields import TarFields, record_sample, tar_records
from groundwork.data.sources.tar_units import Unit, noted, tar_unit, unit_tar
from groundwork.data.sources.webdataset_tars import tars_below

KIND: Final = "huggingface"

FRONT_MATTER: Final = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
#: Words of a path that name a split, as the hub reads them.
SPLIT_WORDS: Final = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class HuggingfaceConfig:
    """A repository on disk. config_name: of several; empty takes the default one."""

    root: Path
    config_name: str = ""
    fields: TarFields = field(default_factory=TarFields)
    skip_bad: bool = False


def huggingface_samples(
    config: HuggingfaceConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every sample, split by split."""
    report = report or ImportReport()
    for unit in huggingface_units(config):
        yield from _unit_samples(config, unit, report)


def huggingface_units(config: HuggingfaceConfig) -> list[Unit]:
    """One unit for each tar of each split."""
    return [
        tar_unit(config.root, tar, split)
        for split, tars in huggingface_splits(config).items()
        for tar in tars
    ]


def read_huggingface_unit(
    config: HuggingfaceConfig, unit: Unit, note: Callable[[str], None]
) -> Iterator[tuple[str, Sample]]:
    """The samples of one tar; what is skipped is said to `note`."""
    return noted(partial(_unit_samples, config, unit), unit, note)


def _unit_samples(
    config: HuggingfaceConfig, unit: Unit, report: ImportReport
) -> Iterator[tuple[str, Sample]]:
    name = unit["tar"].removesuffix(".tar")
    for record in tar_records(unit_tar(config.root, unit), report, skip_bad=config.skip_bad):
        try:
            sample = record_sample(
                record,
                sample_key(f"{name}/{record.key}"),
                config.fields,
                report,
                {"tar": unit["tar"], "key": record.key},
            )
        except BadItemError as error:
            report.bad("sample", record.where, str(error), skip=config.skip_bad)
            continue
        yield unit["split"], sample


def huggingface_splits(config: HuggingfaceConfig) -> dict[str, list[Path]]:
    """The tars of each split, in order."""
    if not config.root.is_dir():
        raise SourceError(f"{config.root}: not a folder; give the fetched repository")
    configs = huggingface_card(config.root).get("configs")
    if not configs:
        if config.config_name:
            raise SourceError(f"{config.root / 'README.md'}: has no configs; drop --config-name")
        return _named_splits(config.root)
    return _declared_splits(config, configs)


def huggingface_card(root: Path) -> Mapping[str, Any]:
    """The front matter of README.md: licence, configs and more; empty where there is none."""
    path = root / "README.md"
    try:
        match = FRONT_MATTER.match(path.read_text("utf-8-sig"))
        card = yaml.safe_load(match[1]) if match else {}
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: its front matter is not YAML ({error}); mend it") from error
    return card if isinstance(card, dict) else {}


def _declared_splits(config: HuggingfaceConfig, configs: Any) -> dict[str, list[Path]]:
    path = config.root / "README.md"
    if not isinstance(configs, list) or not all(isinstance(one, dict) for one in configs):
        raise SourceError(f"{path}: configs is no list of mappings; mend it")
    names = [str(one.get("config_name", "default")) for one in configs]
    chosen = config.config_name or _default_name(configs, names)
    if chosen not in names:
        raise SourceError(
            f"{path}: no config {chosen!r}; choose one with --config-name: {', '.join(names)}"
        )
    data_files = configs[names.index(chosen)].get("data_files")
    if isinstance(data_files, str):
        data_files = [data_files]
    if not isinstance(data_files, list):
        raise SourceError(f"{path}: config {chosen!r} has no data_files")
    splits: dict[str, list[Path]] = {}
    for entry in data_files:
        is_split = isinstance(entry, dict)
        split = str(entry.get("split", "train")) if is_split else "train"
        patterns = entry.get("path") if is_split else entry
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            splits.setdefault(split, []).extend(_tars(config.root, str(pattern), path))
    return {split: list(dict.fromkeys(tars)) for split, tars in splits.items()}


def _default_name(configs: list[Any], names: list[str]) -> str:
    for one, name in zip(configs, names, strict=True):
        if one.get("default") is True:
            return name
    return names[0] if len(names) == 1 else "default"


def _tars(root: Path, pattern: str, path: Path) -> list[Path]:
    if pattern.startswith("/") or ".." in pattern.split("/") or "://" in pattern:
        raise SourceError(f"{path}: data_files {pattern!r} lead out of the repository; refused")
    tars = sorted(tar for tar in root.glob(pattern) if tar.suffix == ".tar")
    if not tars:
        raise SourceError(f"{path}: data_files {pattern!r} match no tar; fetch all files")
    return tars


def _named_splits(root: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for tar in tars_below(root):
        words = re.split(r"[^a-z]+", tar.relative_to(root).as_posix().casefold())
        named = [s for s, known in SPLIT_WORDS.items() if any(word in known for word in words)]
        splits.setdefault(named[0] if named else "train", []).append(tar)
    return dict(sorted(splits.items()))
