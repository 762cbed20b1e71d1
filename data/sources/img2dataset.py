"""What img2dataset writes with `--output_format webdataset`.

    ROOT/00000.tar          members 000000000.jpg, 000000000.txt, 000000000.json
    ROOT/00000.parquet      one row for each url, fetched or not
    ROOT/00000_stats.json   written last: count, successes, failed_to_download, failed_to_resize

A tar without its `_stats.json` was cut short. Such output can be streamed in place, too. Importing
checks that tar, table and statistics agree, and that every image can be read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from groundwork.data.samples import Sample
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.json_files import member, read_json
from groundwork.data.sources.keys import sample_key
from groundwork.data.sources.report import BadItemError, ImportReport
from groundwork.data.sources.tar_fields import TarFields, record_sample, tar_records
from groundwork.data.sources.tar_units import Unit, noted, tar_unit, unit_tar

KIND: Final = "img2dataset"


@dataclass(frozen=True)
class Img2datasetConfig:
    """Output of one run of img2dataset.

    check_tables: compare each tar with its Parquet table, where there is one (needs pyarrow).
    skip_bad: pass over shards that are not complete, and over bad samples, and count them.
    """

    root: Path
    split: str = "train"
    fields: TarFields = field(default_factory=TarFields)
    check_tables: bool = True
    skip_bad: bool = False


def img2dataset_samples(
    config: Img2datasetConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every fetched image, in the order of the shards' numbers."""
    report = report or ImportReport()
    for unit in img2dataset_units(config):
        yield from _unit_samples(config, unit, report)


def img2dataset_units(config: Img2datasetConfig) -> list[Unit]:
    """One unit for each shard of img2dataset."""
    tars = sorted(tar for tar in config.root.glob("*.tar") if tar.stem.isdecimal())
    if not tars:
        raise SourceError(
            f"{config.root}: no NNNNN.tar here; give the output_folder of img2dataset"
        )
    return [
        tar_unit(config.root, tar, config.split, _statistics(tar), tar.with_suffix(".parquet"))
        for tar in tars
    ]


def read_img2dataset_unit(
    config: Img2datasetConfig, unit: Unit, note: Callable[[str], None]
) -> Iterator[tuple[str, Sample]]:
    """The samples of one shard; what is skipped is said to `note`."""
    return noted(partial(_unit_samples, config, unit), unit, note)


def _unit_samples(
    config: Img2datasetConfig, unit: Unit, report: ImportReport
) -> Iterator[tuple[str, Sample]]:
    tar = unit_tar(config.root, unit)
    try:
        keys = _expected_keys(tar, config.check_tables)
    except BadItemError as error:
        report.bad("shard", str(tar), str(error), skip=config.skip_bad)
        return
    yield from _shard_samples(config, tar, keys, report)


def _statistics(tar: Path) -> Path:
    return tar.with_name(f"{tar.stem}_stats.json")


def _shard_samples(
    config: Img2datasetConfig, tar: Path, expected: int | set[str], report: ImportReport
) -> Iterator[tuple[str, Sample]]:
    found: set[str] = set()
    for record in tar_records(tar, report, skip_bad=config.skip_bad):
        found.add(record.key)
        try:
            if isinstance(expected, set) and record.key not in expected:
                raise BadItemError(f"is not among the successes of {tar.stem}.parquet")
            sample = record_sample(
                record, sample_key(record.key), config.fields, report, {"tar": tar.name}
            )
        except BadItemError as error:
            report.bad("sample", record.where, str(error), skip=config.skip_bad)
            continue
        yield config.split, sample
    count = len(expected) if isinstance(expected, set) else expected
    if len(found) < count:
        missing = sorted(expected - found)[:3] if isinstance(expected, set) else []
        named = f" ({', '.join(missing)}, ...)" if missing else ""
        report.bad(
            "shard",
            str(tar),
            f"{count:,} images were fetched, {len(found):,} are in the tar{named}: it was not "
            "written to its end; fetch this shard again",
            skip=config.skip_bad,
        )


def _expected_keys(tar: Path, check_table: bool) -> int | set[str]:
    """What the tar must hold: the keys if the table is there, else their number."""
    statistics = _statistics(tar)
    if not statistics.is_file():
        raise BadItemError(
            f"{statistics.name} is missing, so img2dataset has not finished this shard; run it "
            "again with --incremental_mode incremental"
        )
    record = read_json(statistics)
    if not isinstance(record, dict):
        raise BadItemError(f"{statistics.name} holds no object")
    try:
        successes = member(record, "successes", int)
    except BadItemError as error:
        raise BadItemError(f"{statistics.name}: {error}") from error
    table = tar.with_suffix(".parquet")
    if not check_table or not table.is_file():
        return successes
    keys = _successes(table)
    if len(keys) != successes:
        raise BadItemError(
            f"{table.name} has {len(keys):,} successes, {statistics.name} says {successes:,}"
        )
    return keys


def _successes(table: Path) -> set[str]:
    """The keys of the rows that were fetched."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise SourceError(
            f"{table}: Parquet tables are read with pyarrow: pip install "
            "'groundwork-pretrain[parquet]', or leave them out with --no-check-tables"
        ) from error
    try:
        rows = pq.read_table(table, columns=["key", "status"]).to_pydict()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise BadItemError(f"{table.name} cannot be read ({error})") from error
    return {
        str(key) for key, status in zip(rows["key"], rows["status"], strict=True)
        if status == "success"
    }  # fmt: skip
