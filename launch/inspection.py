"""`groundwork inspect ...`: look into a model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from groundwork.launch.errors import reporting, require_file

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

app = typer.Typer(help="Look into a model.", no_args_is_help=True)
console = Console(stderr=True, highlight=False)


@app.callback()
def _group() -> None:
    """Look into a model."""


@app.command("sampling")
def sampling(
    image: Annotated[Path, typer.Option(help="The picture.")],
    out: Annotated[Path, typer.Option(help="The PNG file to write.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder of a run, one of its checkpoints, or official weights."),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="Size: t, s, b, l, xl, h, g, flash_t, ...; without a checkpoint untrained."
        ),
    ] = None,
    stage: Annotated[int, typer.Option(min=0, max=3, help="Stage, from 0.")] = 2,
    block: Annotated[
        int | None, typer.Option(min=0, help="Block of the stage, from 0.  [the last]")
    ] = None,
    points: Annotated[
        list[str] | None,
        typer.Option(help="Pixels of the picture, `x,y` (repeatable).  [its middle]"),
    ] = None,
    size: Annotated[
        int, typer.Option(min=32, help="Length of the shorter side that the network gets.")
    ] = 224,
    others: Annotated[
        list[Path] | None,
        typer.Option("--average-over", help="More pictures, for the receptive field (repeatable)."),
    ] = None,
    field: Annotated[
        bool, typer.Option("--field/--no-field", help="Draw the effective receptive field.")
    ] = True,
    ema: Annotated[
        bool, typer.Option("--ema/--no-ema", help="Averaged weights, where a run has them.")
    ] = True,
    json_: Annotated[
        Path | None, typer.Option("--json", help="A file for positions and weights.")
    ] = None,
) -> None:
    """Draw where chosen pixels of a layer sample, and what part of the picture acts on them."""
    if checkpoint is None and variant is None:
        raise typer.BadParameter("give a --checkpoint, or a --variant to look at it untrained")
    chosen = [_point(text) for given in points or [] for text in given.split()]

    def run() -> int:
        require_file(out)
        if json_ is not None:
            require_file(json_)
        record = _inspect(
            checkpoint, variant, image, others or [], stage, block, chosen, size, field, ema, out
        )
        if json_ is not None:
            from groundwork.data.atomic import write_atomically

            write_atomically(json_, json.dumps(record, indent=1).encode())
        console.print(f"wrote {out}", soft_wrap=True)
        return 0

    raise typer.Exit(reporting(run))


def _point(text: str) -> tuple[float, float]:
    x, _, y = text.partition(",")
    try:
        return float(x), float(y)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no point; give x,y in pixels, such as 112,80", param_hint="--points"
        ) from None


def _inspect(
    checkpoint: Path | None,
    variant: str | None,
    image: Path,
    others: list[Path],
    stage: int,
    block: int | None,
    chosen: list[tuple[float, float]],
    size: int,
    with_field: bool,
    ema: bool,
    out: Path,
) -> dict[str, Any]:
    """Draw, and return what was drawn as JSON values; positions are in pixels of the picture."""
    from groundwork.pretrain.inspection.backbone_source import find_backbone
    from groundwork.pretrain.inspection.receptive_field import (
        effective_receptive_field,
        side_of_share,
    )
    from groundwork.pretrain.inspection.sampling import (
        block_of,
        point_record,
        sampled_points,
        stride_of,
    )
    from groundwork.pretrain.inspection.sampling_figure import draw_sampling

    picture = _open(image)
    width, height = picture.size
    outside = [p for p in chosen if not (0 <= p[0] < width and 0 <= p[1] < height)]
    if outside:
        raise typer.BadParameter(
            f"{', '.join(f'{x:g},{y:g}' for x, y in outside)}: outside of the picture of "
            f"{width} × {height} pixels",
            param_hint="--points",
        )
    model, name = find_backbone(checkpoint, variant, ema=ema)
    try:
        block_of(model, stage, block)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--block") from error
    shown = _resized(picture, size)
    # pixel centres of the picture are at half-integers of either scale
    scale = (shown.width / width, shown.height / height)
    inner = [
        tuple(
            min(max((p + 0.5) * s - 0.5, 0.0), n - 1)
            for p, s, n in zip(point, scale, shown.size, strict=True)
        )
        for point in chosen or [((width - 1) / 2, (height - 1) / 2)]
    ]
    network_input = _normalised(shown)
    found = sampled_points(model, network_input, stage, block, inner)  # type: ignore[arg-type]
    record: dict[str, Any] = {
        "model": name,
        "stage": stage,
        "block": block,
        "stride": stride_of(stage),
        "input_size": list(shown.size),
        "picture_size": [width, height],
        "points": [point_record(point, scale) for point in found],
    }
    receptive = None
    title = f"{name.rpartition('/')[2]}, stage {stage}, block {_number(model, stage, block)}"
    if with_field:
        images = [network_input, *(_normalised(_open(p).resize(shown.size)) for p in others)]
        receptive = effective_receptive_field(model, images, stage, block, found[0].centre)
        sides = {s: side_of_share(receptive, found[0].centre, s) for s in (0.5, 0.95)}
        record["receptive_field"] = {
            "pictures": len(images),
            "side_of_half": sides[0.5],
            "side_of_95_percent": sides[0.95],
        }
        title += f"; half of the gradient in {sides[0.5]} px, 95 % in {sides[0.95]} px"
        console.print(title, soft_wrap=True)
    draw_sampling(shown, found, receptive, title, out)
    return record


def _number(model: Any, stage: int, block: int | None) -> int:
    return len(model.levels[stage].blocks) - 1 if block is None else block


def _open(path: Path) -> "Image.Image":
    from PIL import Image, ImageOps, UnidentifiedImageError

    from groundwork.data.samples import SampleError

    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            if "A" in upright.getbands() or "transparency" in upright.info:
                coloured = upright.convert("RGBA")
                white = Image.new("RGBA", coloured.size, "white")
                return Image.alpha_composite(white, coloured).convert("RGB")
            return upright.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise SampleError(f"{path}: not a picture that can be read: {error}") from error


def _resized(picture: "Image.Image", size: int) -> "Image.Image":
    """The shorter side at about `size`, both multiples of 32, as InternImage wants them."""
    factor = size / min(picture.size)
    sides = [max(32, round(side * factor / 32) * 32) for side in picture.size]
    return picture.resize((sides[0], sides[1]))


def _normalised(picture: "Image.Image") -> "Tensor":
    """(3, H, W), as ImageNet's models want them."""
    import numpy as np
    import torch

    from groundwork.data.transforms import IMAGENET_MEAN, IMAGENET_STD

    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std
