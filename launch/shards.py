"""`groundwork shards ...`"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
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
from groundwork.data.shards import (
    Manifest,
    is_data_set,
    read_manifest,
    read_statistics,
    write_shards,
)
from groundwork.data.sources.emoji import (
    EmojiConfig,
    emoji_concepts,
    emoji_units,
    read_emoji_unit,
)
from groundwork.data.sources.image_folder import (
    ImageFolderConfig,
    image_folder_concepts,
    image_folder_units,
    read_image_folder_unit,
)
from groundwork.data.split_writer import ShardLimits
from groundwork.launch.browse import browse
from groundwork.launch.errors import reporting
from groundwork.launch.shards_chaos import chaos
from groundwork.launch.shards_check import index, repair, verify
from groundwork.launch.shards_import import register
from groundwork.launch.shards_order import order
from groundwork.launch.shards_scenes import build_scenes
from groundwork.launch.shards_statistics import show_statistics

app = typer.Typer(help="Build and inspect data sets of WebDataset shards.", no_args_is_help=True)
build_app = typer.Typer(help="Build a data set from a source.", no_args_is_help=True)
app.add_typer(build_app, name="build")
build_app.command("scenes")(build_scenes)
register(build_app)
app.command("chaos")(chaos)
app.command("order")(order)
app.command("browse")(browse)
app.command("verify")(verify)
app.command("repair")(repair)
app.command("index")(index)

Out = Annotated[Path, typer.Option(help="Folder of the data set.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a data set built with other settings.")]
console = Console(stderr=True, highlight=False)


@build_app.command("emoji")
def build_emoji(
    out: Out,
    image_size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 72,
    renderings: Annotated[int, typer.Option(help="Pictures per pictogram.")] = 12,
    heldout_renderings: Annotated[int, typer.Option(help="Of these, kept for evaluation.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the renderings and of the held-out concepts.")] = 0,
    font: Annotated[Path | None, typer.Option(help="NotoColorEmoji.ttf; found by default.")] = None,
    workers: Annotated[int, typer.Option(help="Rendering processes.")] = 2,
    overwrite: Overwrite = False,
) -> None:
    """About 1,400 pictograms of Noto Color Emoji, several renderings each."""

    def run() -> int:
        config = EmojiConfig(
            image_size=image_size,
            renderings=renderings,
            heldout_renderings=heldout_renderings,
            seed=seed,
            font=font,
        )
        source = {"kind": "emoji", **asdict(config), "font": None if font is None else font.name}
        if _is_built(out, source, overwrite, [] if font is None else [font]):
            return 0
        licence = (
            "Pictures: Noto Color Emoji, SIL Open Font License 1.1 (Google). "
            "Names: Unicode CLDR through the emoji package (BSD)."
        )
        _build(
            emoji_units(config),
            partial(read_emoji_unit, config),
            out,
            "emoji",
            source,
            licence,
            emoji_concepts(config),
            workers,
        )
        return 0

    raise typer.Exit(reporting(run))


@build_app.command("image-folder")
def build_image_folder(
    root: Annotated[Path, typer.Argument(help="Folder with one sub-folder of pictures per class.")],
    out: Out,
    val_fraction: Annotated[float, typer.Option(help="Share of the files in the split `val`.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the choice of the split `val`.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option(help="List undecodable files instead of ending.")
    ] = False,
    licence: Annotated[str, typer.Option(help="Licence of the pictures.")] = "unknown",
    workers: Annotated[int, typer.Option(help="Reading processes.")] = 2,
    overwrite: Overwrite = False,
) -> None:
    """Pictures in class folders (the layout of ImageNet); files are passed through unchanged."""

    def run() -> int:
        config = ImageFolderConfig(
            root=root, val_fraction=val_fraction, seed=seed, skip_bad=skip_bad
        )
        source = {"kind": "image_folder", **asdict(config), "root": str(root)}
        if _is_built(out, source, overwrite, [root]):
            return 0
        _build(
            image_folder_units(config),
            partial(read_image_folder_unit, config),
            out,
            root.name,
            source,
            licence,
            image_folder_concepts(config),
            workers,
        )
        return 0

    raise typer.Exit(reporting(run))


@app.command("stat")
def stat(directory: Annotated[Path, typer.Argument(help="Folder of a data set.")]) -> None:
    """Show a data set in numbers; every shard is checked for presence and size."""

    def run() -> int:
        _show(read_manifest(directory), directory)
        show_statistics(read_statistics(directory))
        return 0

    raise typer.Exit(reporting(run))


def _is_built(out: Path, source: dict[str, Any], overwrite: bool, inputs: Sequence[Path]) -> bool:
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


def _build(
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
    _show(manifest, out)


def _write(
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
    _show(manifest, out)


def _show(manifest: Manifest, directory: Path) -> None:
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
