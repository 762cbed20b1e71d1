"""Tars of images and captions as open_clip, LAION and DataComp have them.

    ROOT/00000.tar      members KEY.jpg, KEY.txt, KEY.json, and others
    ROOT/00001.tar      ...

The JSON of DataComp and LAION has uid, url, caption, sha256, width, height, original_width and
more; all of it is kept. Such tars can be streamed in place, too: `data.shards: ROOT`. Importing
checks every sample, gives keys that are unique over all tars, a manifest, and splits.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from groundwork.data.samples import Sample
from groundwork.data.sources.datacomp_uids import has_uid, open_uids, require_sorted
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.keys import sample_key
from groundwork.data.sources.report import BadItemError, ImportReport
from groundwork.data.sources.tar_fields import TarFields, record_sample, tar_records
from groundwork.data.sources.tar_units import Unit, noted, tar_unit, unit_tar

KIND: Final = "webdataset"


@dataclass(frozen=True)
class WebdatasetConfig:
    """Which tars become which split.

    root: a folder, read at any depth, or one tar. check_sha256: compare `sha256` of the JSON with
    the stored image; right only where images were stored as they were fetched, since img2dataset
    notes the sum before it resizes. uids: a subset of DataComp (`datacomp_uids.py`); samples whose
    JSON has another uid are left out. skip_bad: pass over bad samples and count them.
    """

    root: Path
    split: str = "train"
    fields: TarFields = field(default_factory=TarFields)
    check_sha256: bool = False
    uids: Path | None = None
    skip_bad: bool = False


def webdataset_samples(
    config: WebdatasetConfig, report: ImportReport | None = None
) -> Iterator[tuple[str, Sample]]:
    """Every sample of every tar, in the order of the tars' paths."""
    report = report or ImportReport()
    for unit in webdataset_units(config):
        yield from _unit_samples(config, unit, report)


def webdataset_units(config: WebdatasetConfig) -> list[Unit]:
    """One unit for each tar."""
    if config.uids is not None:
        require_sorted(config.uids)
    return [tar_unit(_folder(config), tar, config.split) for tar in tars_below(config.root)]


def read_webdataset_unit(
    config: WebdatasetConfig, unit: Unit, note: Callable[[str], None]
) -> Iterator[tuple[str, Sample]]:
    """The samples of one tar; what is skipped is said to `note`."""
    return noted(partial(_unit_samples, config, unit), unit, note)


def _folder(config: WebdatasetConfig) -> Path:
    return config.root if config.root.is_dir() else config.root.parent


def _unit_samples(
    config: WebdatasetConfig, unit: Unit, report: ImportReport
) -> Iterator[tuple[str, Sample]]:
    name = unit["tar"].removesuffix(".tar")
    uids = None if config.uids is None else open_uids(config.uids)
    for record in tar_records(unit_tar(_folder(config), unit), report, skip_bad=config.skip_bad):
        try:
            sample = record_sample(
                record,
                sample_key(f"{name}/{record.key}"),
                config.fields,
                report,
                {"tar": unit["tar"], "key": record.key},
            )
            if uids is not None and not has_uid(uids, _text(sample, "uid")):
                report.mended["samples outside of the subset left out"] += 1
                continue
            if config.check_sha256:
                _check_sha256(sample)
        except BadItemError as error:
            report.bad("sample", record.where, str(error), skip=config.skip_bad)
            continue
        yield unit["split"], sample


def tars_below(root: Path) -> list[Path]:
    """A tar itself, or all tars of a folder in order. Raises SourceError where there is none."""
    tars = [root] if root.is_file() else sorted(root.rglob("*.tar"))
    if not tars:
        raise SourceError(f"{root}: no tar here; give a tar, or a folder with tars at any depth")
    return tars


def _text(sample: Sample, name: str) -> str:
    value = sample.info["source"].get(name)
    if not isinstance(value, str):
        raise BadItemError(f"its JSON has no {name}; import without the check of it")
    return value


def _check_sha256(sample: Sample) -> None:
    expected = _text(sample, "sha256")
    found = hashlib.sha256(sample.image).hexdigest()
    if found != expected.lower():
        raise BadItemError(
            f"its image has sha256 {found[:12]}..., its JSON says {expected[:12]}...: it was "
            "changed after it was fetched"
        )
