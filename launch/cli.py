"""The console script `groundwork`: parse, validate, call."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from groundwork.launch.doctor import app as kernels_app
from groundwork.launch.doctor import doctor
from groundwork.launch.evaluation import app as evaluation_app
from groundwork.launch.inspection import app as inspection_app
from groundwork.launch.knowledge import app as knowledge_app
from groundwork.launch.recipes import app as recipe_app
from groundwork.launch.shards import app as shards_app

app = typer.Typer(
    name="groundwork",
    help="Pretrain vision and vision-language foundation models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(shards_app, name="shards")
app.add_typer(knowledge_app, name="knowledge")
app.add_typer(recipe_app, name="recipe")
app.add_typer(evaluation_app, name="evaluate")
app.add_typer(kernels_app, name="kernels")
app.add_typer(inspection_app, name="inspect")
app.command()(doctor)


@app.command(context_settings={"ignore_unknown_options": False})
def pretrain(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or path of a YAML file.")],
    out: Annotated[str, typer.Option(help="Folder of the run; an unfinished one is resumed.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override: key.path=value (repeatable).")
    ] = None,
    ranks: Annotated[
        int, typer.Option(help="Processes to start here; 1 inside deepspeed or torchrun.")
    ] = 1,
    timeout: Annotated[
        float, typer.Option(help="Seconds after which a silent rank ends the job.")
    ] = 1800.0,
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", hidden=True, help="Passed by deepspeed; unused.")
    ] = None,
) -> None:
    """Pretrain a recipe (as one rank of a job where RANK is set, else as the whole job)."""
    from groundwork.launch.pretraining import start

    raise typer.Exit(start(recipe, out, set_ or [], ranks, timeout))


@app.command()
def finetune(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or path of a YAML file.")],
    out: Annotated[str, typer.Option(help="Folder of the run; an unfinished one is resumed.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override: key.path=value (repeatable).")
    ] = None,
    ranks: Annotated[
        int, typer.Option(help="Processes to start here (DDP); 1 inside accelerate or torchrun.")
    ] = 1,
    timeout: Annotated[
        float, typer.Option(help="Seconds after which a silent rank ends the job.")
    ] = 1800.0,
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", hidden=True, help="Passed by deepspeed; unused.")
    ] = None,
) -> None:
    """Fine-tune on a task, under Accelerate (as one rank where RANK is set, else as the job)."""
    from groundwork.launch.finetuning import start

    raise typer.Exit(start(recipe, out, set_ or [], ranks, timeout))


@app.command("export")
def export_model(
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="Folder of a run, or one of its checkpoints; with --variant a file of official "
            "weights (.pth, .pt, .safetensors)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="hf (loads with transformers), groundwork, or for InternImage official or onnx.",
        ),
    ] = "hf",
    ema: Annotated[bool, typer.Option(help="The averaged weights.")] = False,
    tower: Annotated[
        str | None,
        typer.Option(help="Only the image model of an image-text model: image, or M3I's teacher."),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="Size of official weights: t, s, b, l, xl, h, g, flash_t, ..., flash_l."),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes of official weights; 1000 unless given.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the pictures of official weights; 224 unless given.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="File of class names, one per line, in their order.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the weights, for the model card.")
    ] = None,
    pth: Annotated[
        bool, typer.Option(help="official: also a .pth file, as the official code reads.")
    ] = False,
    features: Annotated[bool, typer.Option(help="onnx: also give the four maps.")] = False,
    opset: Annotated[int, typer.Option(help="onnx: version of the operators, 16 to 23.")] = 18,
) -> None:
    """Write a model for others; reloaded in a fresh process, it must compute the same."""
    from groundwork.launch.export import ExportArguments, start

    raise typer.Exit(
        start(
            ExportArguments(
                checkpoint,
                out,
                format_,
                ema=ema,
                tower=tower,
                variant=variant,
                num_classes=num_classes,
                size=size,
                labels=labels,
                licence=licence,
                pth=pth,
                features=features,
                opset=opset,
            )
        )
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path(
        "runs/demo"
    ),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override of the recipe: key.path=value (repeatable)."),
    ] = None,
) -> None:
    """Build data, pretrain, evaluate, export and report; every command is printed, then run."""
    from groundwork.launch.demo import start

    raise typer.Exit(start(out, set_ or []))


@app.command()
def report(
    run: Annotated[Path, typer.Option(help="Folder of a pretraining run.")],
    zeroshot: Annotated[Path, typer.Option(help="Folder written by `evaluate zeroshot`.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")],
    commands: Annotated[
        Path | None, typer.Option(help="The demo's record of commands and durations.")
    ] = None,
) -> None:
    """Write one self-contained HTML file: key numbers, curves, controls, pictures, commands."""
    from groundwork.launch.demo import report as write

    raise typer.Exit(write(run, zeroshot, commands, out))


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    try:
        status = app(args=argv, standalone_mode=False, prog_name="groundwork")
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's usage errors
            error.show(file=sys.stderr)
            return int(error.exit_code)
        raise
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    raise SystemExit(main())
