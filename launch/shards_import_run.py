"""What the commands that import other people's data have in common: options, writing, checking."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from groundwork.data.samples import Concept, Sample
from groundwork.data.shard_builder import Note, Unit
from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.report import ImportReport
from groundwork.data.sources.tar_fields import TarFields
from groundwork.launch.shards_build import build, console, is_built, write

Root = Annotated[Path, typer.Argument(help="Folder of the raw data, as published.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the data set to be written.")]
Check = Annotated[
    bool, typer.Option(help="Read everything, list what is bad, write nothing; status 1 if any is.")
]
SkipBad = Annotated[bool, typer.Option(help="List and count bad items instead of ending.")]
Licence = Annotated[str, typer.Option(help="Licence of the data.")]
Splits = Annotated[list[str] | None, typer.Option("--split", help="May be given several times.")]
Split = Annotated[str, typer.Option(help="Name of the split that is made.")]
ImageField = Annotated[str, typer.Option("--image", help="Members that hold the image.")]
TextField = Annotated[
    str, typer.Option("--text", help="Members that hold the caption; `json[caption]` looks inside.")
]
LabelField = Annotated[str, typer.Option("--label", help="Members that hold a class index.")]
Annotation = Annotated[
    str, typer.Option(help="Annotation file below ROOT; {split} stands for the split.")
]
Images = Annotated[str, typer.Option(help="Folder of pictures below ROOT; {split} for the split.")]
ValFraction = Annotated[float, typer.Option(help="Share of the raw items in the split `val`.")]
Workers = Annotated[int, typer.Option(min=1, help="Reading processes.")]
Seed = Annotated[int, typer.Option(help="Of the choice of the split `val`.")]

DEFAULTS = TarFields()
Samples = Callable[[Any, ImportReport], Iterator[tuple[str, Sample]]]


@dataclass(frozen=True)
class Parts:
    """How a source is divided among processes; see `build_shards`."""

    units: Callable[[Any], Sequence[Unit]]
    read: Callable[[Any, Unit, Note], Iterator[tuple[str, Sample]]]
    workers: int


@dataclass(frozen=True)
class Destination:
    """What every import is told besides its source."""

    out: Path | None
    check: bool
    licence: str
    overwrite: bool


def with_splits(config: Any, splits: list[str] | None) -> Any:
    return replace(config, splits=tuple(splits)) if splits else config


def run_import(
    kind: str,
    config: Any,
    samples: Samples,
    destination: Destination,
    inputs: Sequence[Path],
    concepts: Callable[[Any], list[Concept]] = lambda _: [],
    parts: Parts | None = None,
) -> int:
    """Write the data set, or only check what it would be made of.

    parts: of a source that several processes can read.
    """
    word = "bad" if destination.check else "skipped"
    report = ImportReport(
        # one line each, however long, so that lists can be filtered
        lambda where, reason: console.print(
            f"{word}: {where}: {reason}", markup=False, soft_wrap=True
        )
    )
    if destination.check:
        return _check(replace(config, skip_bad=True), samples, report)
    if destination.out is None:
        raise SourceError("give --out FOLDER, or --check to read the data and write nothing")
    source = {"kind": kind, **_plain(asdict(config))}
    out = destination.out
    if is_built(out, source, destination.overwrite, inputs):
        return 0
    name = inputs[0].resolve().stem
    if parts is not None:
        read = partial(parts.read, config)
        units = parts.units(config)
        build(units, read, out, name, source, destination.licence, [], parts.workers)
        return 0
    named = concepts(config)
    write(samples(config, report), None, out, name, source, destination.licence, named)
    if report.summary():
        console.print(report.summary(), markup=False)
    return 0


def _check(config: Any, samples: Samples, report: ImportReport) -> int:
    counts = Counter(
        split for split, _ in track(samples(config, report), "reading", console=console)
    )
    for split, count in sorted(counts.items()):
        typer.echo(f"{split}: {count:,} samples")
    typer.echo(report.summary() or "nothing bad found")
    return 1 if report.skipped else 0


def _plain(value: Any) -> Any:
    """Settings as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
