"""`groundwork shards build scenes`"""

from dataclasses import asdict
from functools import partial
from typing import Annotated, Literal

import typer

from groundwork.data.sources.errors import SourceError
from groundwork.data.sources.scenes import (
    LICENCE,
    VERSION,
    ScenesConfig,
    read_scenes_unit,
    scenes_concepts,
    scenes_units,
)
from groundwork.data.sources.scenes_encoding import has_mp4
from groundwork.launch.errors import reporting
from groundwork.launch.shards_build import Out, Overwrite, build, is_built


def build_scenes(
    out: Out,
    image_size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 96,
    train: Annotated[int, typer.Option(help="Scenes of the split `train`.")] = 10_000,
    val: Annotated[int, typer.Option(help="Scenes of the split `val`.")] = 1_000,
    compositional: Annotated[
        int, typer.Option(help="Scenes with colours of shapes that `train` never shows.")
    ] = 1_000,
    min_objects: Annotated[int, typer.Option(help="Objects in a scene, at least.")] = 1,
    max_objects: Annotated[int, typer.Option(help="Objects in a scene, at most.")] = 6,
    seed: Annotated[int, typer.Option(help="Of the scenes and of the held-out pairs.")] = 0,
    image_format: Annotated[Literal["jpg", "png"], typer.Option(help="Of still pictures.")] = "jpg",
    frames: Annotated[int, typer.Option(help="More than 1 makes clips of that many frames.")] = 1,
    fps: Annotated[int, typer.Option(help="Frames per second of clips.")] = 8,
    clip_format: Annotated[
        Literal["auto", "mp4", "png"], typer.Option(help="auto: mp4 where PyAV is installed.")
    ] = "auto",
    workers: Annotated[int, typer.Option(help="Drawing processes.")] = 2,
    overwrite: Overwrite = False,
) -> None:
    """Synthetic scenes: solids, light and shadows, with every annotation; no download."""

    def run() -> int:
        if frames > 1 and clip_format == "mp4" and not has_mp4():
            raise SourceError(
                "--clip-format mp4 needs PyAV: pip install 'groundwork-pretrain[video]', or choose "
                "--clip-format png"
            )
        is_mp4 = clip_format == "mp4" or (
            clip_format == "auto" and has_mp4() and image_size % 2 == 0
        )
        config = ScenesConfig(
            image_size=image_size,
            train=train,
            val=val,
            compositional=compositional,
            objects=(min_objects, max_objects),
            seed=seed,
            image_format=image_format,
            frames=frames,
            fps=fps,
            # what stills do not use may not tell one data set from another
            clip_format="mp4" if frames > 1 and is_mp4 else "png",
        )
        source = {"kind": "scenes", "synthetic": True, "version": VERSION, **asdict(config)}
        if is_built(out, source, overwrite, []):
            return 0
        build(
            scenes_units(config),
            partial(read_scenes_unit, config),
            out,
            "scenes",
            source,
            LICENCE,
            scenes_concepts(config),
            workers,
        )
        return 0

    raise typer.Exit(reporting(run))
