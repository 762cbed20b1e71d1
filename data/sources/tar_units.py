"""Tars as units of `build_shards`: each is read by one process, and again only if it changes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from groundwork.data.samples import Sample
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.image_files import inside
from groundwork.data.sources.report import BadItemError, ImportReport

Unit = dict[str, Any]


def tar_unit(root: Path, tar: Path, split: str, *beside: Path) -> Unit:
    """A tar below `root`, with what changes when it, or a file `beside` it, does."""
    files = [file for file in (tar, *beside) if file.is_file()]
    states = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"split": split, "tar": tar.relative_to(root).as_posix(), "files": states}


def unit_tar(root: Path, unit: Unit) -> Path:
    """Where the tar of a unit lies."""
    try:
        return inside(root, unit["tar"])
    except BadItemError as error:
        raise SourceError(str(error)) from error


def noted(
    samples: Callable[[ImportReport], Iterator[tuple[str, Sample]]],
    unit: Unit,
    note: Callable[[str], None],
) -> Iterator[tuple[str, Sample]]:
    """The samples of a unit; what is passed over or mended is said to `note`."""
    report = ImportReport(lambda where, reason: note(f"skipped: {where}: {reason}"))
    yield from samples(report)
    if report.summary():
        note(f"{unit['tar']}: {report.summary()}")
