"""`groundwork evaluate ...`"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from groundwork.data.atomic import write_atomically
from groundwork.launch.errors import reporting, require_file, require_folder
from groundwork.launch.evaluation_images import register

app = typer.Typer(help="Evaluate a trained model.", no_args_is_help=True)
register(app)
console = Console(stderr=True, highlight=False)

RESULTS = "zeroshot.json"
GRID = "zeroshot.png"


@app.command("zeroshot")
def zeroshot(
    checkpoint: Annotated[Path, typer.Option(help="Folder of a run, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option(help="Folder for zeroshot.json and zeroshot.png.")],
    shards: Annotated[
        str | None, typer.Option(help="Data set; by default the one trained on.")
    ] = None,
    knowledge: Annotated[
        Path | None, typer.Option(help="Knowledge index; by default the one trained with.")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Splits; by default all but `train` (repeatable).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the shuffled and random controls.")] = 0,
) -> None:
    """Top-1 and top-5 among class names, with four texts: plain, knowledge, shuffled, random."""

    def run() -> int:
        from groundwork.pretrain.downstream.evaluation.zeroshot_run import evaluate_zeroshot

        require_folder(out)
        require_file(out / RESULTS)
        results, grid = evaluate_zeroshot(checkpoint, shards, knowledge, split, seed)
        out.mkdir(parents=True, exist_ok=True)
        grid(out / GRID)
        write_atomically(out / RESULTS, json.dumps(results, indent=1).encode())
        _show(results)
        console.print(f"wrote {out / RESULTS} and {out / GRID}", soft_wrap=True)
        return 0

    raise typer.Exit(reporting(run))


def _show(results: Mapping[str, Any]) -> None:
    for name, part in results["results"].items():
        title = f"{name}: {part['pictures']:,} pictures, {part['candidates']:,} names"
        table = Table("text", "top-1 %", "95 % interval", "top-5 %", "95 % interval", title=title)
        for control, score in part["controls"].items():
            cells = []
            for metric in ("top1", "top5"):
                s = score[metric]
                cells += [f"{s['value']:.1f}", f"{s['low']:.1f} – {s['high']:.1f}"]
            table.add_row(control, *cells)
        Console().print(table)
        for metric, s in part["controls"].get("knowledge", {}).items():
            if metric.startswith("gain_over_"):
                other = metric.removeprefix("gain_over_")
                print(
                    f"  knowledge gains {s['value']:+.1f} points of top-1 over {other} "
                    f"({s['low']:+.1f} to {s['high']:+.1f})"
                )
