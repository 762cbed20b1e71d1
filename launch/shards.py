"""`groundwork shards ...`"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from groundwork.data.shards import read_manifest, read_statistics
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
from groundwork.launch.browse import browse
from groundwork.launch.errors import reporting
from groundwork.launch.shards_build import Out, Overwrite, build, is_built, show_manifest
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
        if is_built(out, source, overwrite, [] if font is None else [font]):
            return 0
        licence = (
            "Pictures: Noto Color Emoji, SIL Open Font License 1.1 (Google). "
            "Names: Unicode CLDR through the emoji package (BSD)."
        )
        build(
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
        if is_built(out, source, overwrite, [root]):
            return 0
        build(
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
        show_manifest(read_manifest(directory), directory)
        show_statistics(read_statistics(directory))
        return 0

    raise typer.Exit(reporting(run))
