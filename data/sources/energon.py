"""Data sets of Megatron Energon: tars with a folder `.nv-meta`.

    ROOT/.nv-meta/split.yaml     split_parts: {train: [shards/shard_0.tar], val: [...]}, exclude
    ROOT/.nv-meta/dataset.yaml   sample_type or __class__, field_map: {image: jpg, caption: txt}
    ROOT/.nv-meta/.info.json     shard_counts: {shards/shard_0.tar: 100} (older: .info.yaml)
    ROOT/shards/shard_0.tar      and shard_0.tar.idx: where each sample begins, 8 bytes each

Such tars can be streamed in place, too. Importing keeps Energon's splits and exclusions and checks
its counts. A `sample_loader.py` is Python code, which is never run: name the fields instead.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml

from groundwork.data.samples import Sample
from groundwork.data.shard_patterns import expand_braces
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import inside
from groundwork.data.sources.keys import sample_key
from groundwork.data.sources.report import BadItemError, ImportReport
from groundwork.data.sources.tar_fields import TarFields, record_sample, tar_records
from groundwork.data.sources.tar_units import Unit, noted, tar_unit, unit_tar

KIND: Final = "energon"

#: Members of Energon's sample classes -> fields of ours.
FIELDS: Final = {
    "image": "image",
    "caption": "text",
    "text": "text",
    "label": "label",
    "label_name": "text",
    "context": "question",
    "answers": "answers",
}
OFFSET_BYTES: Final = 8


@dataclass(frozen=True)
class EnergonConfig:
    """A prepared data set. fields: instead of those that dataset.yaml maps."""

    root: Path
    fields: TarFields | None = None
    skip_bad: bool = False


def energon_samples(
    config: EnergonConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every sample of every split, in the order of split.yaml, without what it excludes."""
    report = report or ImportReport()
    for unit in energon_units(config):
        yield from _unit_samples(config, unit, report)


def energon_units(config: EnergonConfig) -> list[Unit]:
    """One unit for each tar of each split, with all that `.nv-meta` says of it."""
    meta = config.root / ".nv-meta"
    if not meta.is_dir():
        raise SourceError(f"{config.root}: no .nv-meta here; give the folder that was prepared")
    fields = config.fields or energon_fields(config.root)
    splits, excluded = _splits(meta / "split.yaml")
    counts = _shard_counts(meta)
    units = []
    for split, shards in splits.items():
        for name in shards:
            if name in excluded:
                continue
            try:
                tar = inside(config.root, name)
            except BadItemError as error:
                raise SourceError(f"{meta / 'split.yaml'}: {error}") from error
            unit = tar_unit(config.root, tar, split, _offsets_file(tar))
            without = sorted(e for e in excluded if e.startswith(f"{name}/"))
            said = {"fields": asdict(fields), "count": counts.get(name), "excluded": without}
            units.append(unit | said)
    return units


def read_energon_unit(
    config: EnergonConfig, unit: Unit, note: Callable[[str], None]
) -> Iterator[tuple[str, Sample]]:
    """The samples of one tar; what is skipped is said to `note`."""
    return noted(partial(_unit_samples, config, unit), unit, note)


def _unit_samples(
    config: EnergonConfig, unit: Unit, report: ImportReport
) -> Iterator[tuple[str, Sample]]:
    name, excluded, number = unit["tar"], set(unit["excluded"]), -1
    fields, tar = TarFields(**unit["fields"]), unit_tar(config.root, unit)
    for number, record in enumerate(tar_records(tar, report, skip_bad=config.skip_bad)):
        if f"{name}/{number}" in excluded or f"{name}/{record.key}" in excluded:
            continue
        key = sample_key(f"{name.removesuffix('.tar')}/{record.key}")
        try:
            sample = record_sample(record, key, fields, report, {"tar": name, "key": record.key})
        except BadItemError as error:
            report.bad("sample", record.where, str(error), skip=config.skip_bad)
            continue
        yield unit["split"], sample
    _check_counts(config, tar, number + 1, unit["count"], report)


def energon_fields(root: Path) -> TarFields:
    """The `field_map` of dataset.yaml. Raises SourceError where it needs what is not here."""
    path = root / ".nv-meta" / "dataset.yaml"
    record = _yaml(path)
    remedy = "name the fields yourself (--image jpg --text txt)"
    loader = record.get("sample_loader")
    if loader is not None or not isinstance(record.get("field_map"), dict):
        why = f"uses {loader}, which is code and is not run" if loader else "has no field_map"
        raise SourceError(f"{path}: {why}; {remedy}")
    fields: dict[str, str] = {}
    for member, field in record["field_map"].items():
        if member not in FIELDS or not isinstance(field, str):
            raise SourceError(
                f"{path}: field_map has {member!r}: {field!r}; known are {', '.join(FIELDS)}; "
                f"{remedy}"
            )
        fields.setdefault(FIELDS[member], field)
    return TarFields(**{"text": "", "label": "", **fields})


def _splits(path: Path) -> tuple[dict[str, list[str]], set[str]]:
    record = _yaml(path)
    parts, exclude = record.get("split_parts"), record.get("exclude") or []
    wrong = SourceError(f"{path}: expected split_parts, lists of shards, and perhaps exclude")
    if not isinstance(parts, dict) or not isinstance(exclude, list):
        raise wrong
    if not all(isinstance(shards, list) for shards in parts.values()):
        raise wrong
    splits = {
        str(split): [name for pattern in shards for name in expand_braces(str(pattern))]
        for split, shards in parts.items()
        if shards
    }
    return splits, {name for pattern in exclude for name in expand_braces(str(pattern))}


def _shard_counts(meta: Path) -> Mapping[str, Any]:
    for name in (".info.json", ".info.yaml"):
        if (meta / name).is_file():
            counts = _yaml(meta / name).get("shard_counts")  # JSON is YAML
            if not isinstance(counts, dict):
                raise SourceError(f"{meta / name}: has no shard_counts; prepare the data set again")
            return counts
    return {}


def _check_counts(
    config: EnergonConfig, tar: Path, samples: int, expected: Any, report: ImportReport
) -> None:
    """Compare .info, the `.tar.idx` and the tar itself, as far as they are there."""
    index = _offsets_file(tar)
    numbers = {"its samples": samples}
    if expected is not None:
        numbers[".nv-meta/.info"] = expected
    if index.is_file():
        # the last offset is that of the end
        numbers[index.name] = index.stat().st_size // OFFSET_BYTES - 1
    if len(set(numbers.values())) > 1:
        told = ", ".join(f"{source}: {number}" for source, number in numbers.items())
        report.bad(
            "count",
            str(tar),
            f"the numbers of samples differ ({told}); the tar was replaced after it was prepared: "
            "fetch it again, or run `energon prepare` again",
            skip=config.skip_bad,
        )


def _offsets_file(tar: Path) -> Path:
    return tar.with_suffix(".tar.idx")


def _yaml(path: Path) -> dict[str, Any]:
    try:
        record = yaml.safe_load(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceError(f"{path}: missing; run `energon prepare` on the data set") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not YAML ({error}); mend it") from error
    if not isinstance(record, dict):
        raise SourceError(f"{path}: holds a {type(record).__name__}, expected a mapping")
    return record
