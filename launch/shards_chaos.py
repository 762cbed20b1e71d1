"""`groundwork shards chaos`"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from groundwork.launch.errors import reporting

console = Console(stderr=True, highlight=False)


def chaos(
    trials: Annotated[int, typer.Option(min=1, help="Streams to kill and resume.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of the data, the kills and topologies.")] = 0,
) -> None:
    """Kill streams at random, resume them on other topologies, count lost and doubled samples.

    Ends with status 1 if there are any. Needs nothing: the data sets are made for the purpose.
    """

    def run() -> int:
        from groundwork.data.chaos import run_trials

        with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
            task = progress.add_task("trials", total=trials)
            outcome = run_trials(trials, seed, Path(folder), lambda _: progress.advance(task))
        typer.echo(
            f"trials={outcome.trials} kills={outcome.kills} "
            "(ranks, workers and whole jobs; resumed on 1, 2, 3 or 5 ranks with 0 to 2 workers)"
        )
        typer.echo(f"lost={outcome.lost} duplicated={outcome.duplicated}")
        return int(outcome.lost + outcome.duplicated > 0)

    raise typer.Exit(reporting(run))
