"""What the commands `groundwork shards build KIND` share."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from rich.progress import Progress as RichProgress
from rich.table import Table

from groundwork.data.samples import Concept, Sample
from groundwork.data.shard_builder import Progress, ReadUnit, Unit, build_shards
from groundwork.data.shard_index import ShardError
from groundwork.data.shards import Manifest, is_data_set, read_manifest, write_shards
from groundwork.data.split_writer import ShardLimits

Out = Annotated[Path, typer.Option(help="Folder of the data set.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a data set built with other settings.")]
console = Console(stderr=True, highlight=False)


def is_built(out: Path, source: dict[str, Any], overwrite: bool, inputs: Sequence[Path]) -> bool:
    """Whether `out` already holds this very data set. Refuses to replace what is no data set.

    inputs: files and folders that the data set is built from; `out` may not touch them.
    """
    folder = out.resolve()
    for path in (path.resolve() for path in inputs):
        if folder == path or folder in path.parents or path in folder.parents:
            raise ShardError(
                f"--out {out} and the source {path} lie in one another, so that writing the one "
                "could delete the other; choose another --out"
            )
    if not out.exists():
        return False
    if is_data_set(out):
        if overwrite:
            return False
        manifest = read_manifest(out)
        if dict(manifest.source) == {k: _json(v) for k, v in source.items()}:
            console.print(f"{out}: already built with these settings")
            return True
        raise ShardError(
            f"{out} holds another data set ({manifest.name}, other settings); choose another --out "
            "or pass --overwrite"
        )
    if not out.is_dir() or any(out.iterdir()):
        raise ShardError(
            f"{out} exists and is no data set, or holds files beside one, so nothing there is "
            "replaced; choose another --out, or move those files away"
        )
    return False


def build(
    units: Sequence[Unit],
    read: ReadUnit,
    out: Path,
    name: str,
    source: dict[str, Any],
    licence: str,
    concepts: list[Concept],
    workers: int,
) -> None:
    """Build from a source that is divided into units of about a shard each."""
    # shards end with their units, which may be somewhat larger than planned
    limits = ShardLimits()
    columns = (TextColumn("writing"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with RichProgress(*columns, TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=len(units))

        def show(progress: Progress) -> None:
            resumed = f", {progress.resumed:,} units from before" if progress.resumed else ""
            description = f"{progress.samples:,} samples{resumed}"
            bar.update(task, completed=progress.units, description=description)

        manifest = build_shards(
            units,
            read,
            out,
            name=name,
            source={k: _json(v) for k, v in source.items()},
            licence=licence,
            concepts=concepts,
            workers=workers,
            max_samples=2 * limits.max_samples,
            max_bytes=2 * limits.max_bytes,
            on_progress=show,
            on_note=lambda note: console.print(note, markup=False),
        )
    show_manifest(manifest, out)


def write(
    samples: Iterable[tuple[str, Sample]],
    total: int | None,
    out: Path,
    name: str,
    source: dict[str, Any],
    licence: str,
    concepts: list[Concept],
) -> None:
    def shown() -> Iterator[tuple[str, Sample]]:
        yield from track(samples, "writing", total=total, console=console)

    manifest = write_shards(
        shown(),
        out,
        name=name,
        source={k: _json(v) for k, v in source.items()},
        licence=licence,
        concepts=concepts,
    )
    show_manifest(manifest, out)


def show_manifest(manifest: Manifest, directory: Path) -> None:
    table = Table("split", "samples", "shards", "MiB", title=f"{manifest.name} in {directory}")
    for split, shards in manifest.splits.items():
        size = sum(shard.bytes for shard in shards) / 2**20
        table.add_row(split, f"{manifest.samples(split):,}", str(len(shards)), f"{size:.1f}")
    Console().print(table)


def _json(value: Any) -> Any:
    return (
        list(value)
        if isinstance(value, tuple)
        else str(value)
        if isinstance(value, Path)
        else value
    )
