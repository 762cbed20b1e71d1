"""`groundwork evaluate classification`, `task`, `linear-probe` and `knn`."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from groundwork.data.atomic import write_atomically
from groundwork.launch.errors import reporting, require_file

Checkpoint = Annotated[
    Path,
    typer.Option(help="A run's folder, one of its checkpoints, an official file or an export."),
]
Shards = Annotated[
    str | None, typer.Option(help="Data set: a folder, pattern or URL; by default the run's.")
]
Variant = Annotated[
    str | None, typer.Option(help="Architecture of an official file: t, s, b, l, xl, h, g, ...")
]
Size = Annotated[int | None, typer.Option(help="Side of the pictures; by default the training's.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")]
Workers = Annotated[int, typer.Option(min=0, help="Decoding processes; 0 decodes in this one.")]
Budget = Annotated[float, typer.Option(min=0, max=1, help="Share of pictures that may be bad.")]
Ema = Annotated[bool, typer.Option(help="Take averaged weights where there are some.")]
Train = Annotated[str, typer.Option(help="Split that neighbours, or the probe, learn from.")]
Test = Annotated[str, typer.Option(help="Split that is scored.")]
Out = Annotated[Path | None, typer.Option(help="JSON file for the results.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `groundwork evaluate`."""
    app.command("classification")(classification)
    app.command("task")(task)
    app.command("linear-probe")(probe)
    app.command("knn")(knn)


def classification(
    checkpoint: Checkpoint,
    shards: Shards = None,
    split: Annotated[str, typer.Option(help="Split that is scored.")] = "val",
    variant: Variant = None,
    class_indices: Annotated[
        Path | None,
        typer.Option(help="File of one row of the head per class, as from 22K to 1K classes."),
    ] = None,
    size: Size = None,
    batch: Batch = 32,
    workers: Workers = 2,
    bad_sample_budget: Budget = 0.001,
    ema: Ema = True,
    out: Out = None,
) -> None:
    """Top-1 and top-5 of a classifier: shorter side to the crop size, bicubic, centre crop."""

    def run() -> dict[str, Any]:
        from groundwork.data.dataset import open_dataset
        from groundwork.pretrain.downstream.evaluation.frozen import classify_split
        from groundwork.pretrain.downstream.evaluation.image_models import (
            load_image_model,
            require_shards,
        )
        from groundwork.pretrain.downstream.finetuning.evaluation import SplitReading

        model = load_image_model(checkpoint, variant=variant, class_indices=class_indices, ema=ema)
        where = require_shards(model, shards)
        dataset = open_dataset(where, split)
        image = model.image if size is None else replace(model.image, size=size)
        reading = SplitReading(batch, workers, budget=bad_sample_budget)
        result = classify_split(model, dataset, image, reading)
        found = {"checkpoint": model.source, "shards": where, "split": split}
        return {**found, "size": image.size, **result}

    raise typer.Exit(reporting(lambda: _report(run, out)))


def task(
    checkpoint: Annotated[
        Path, typer.Option(help="A fine-tuned run, one of its checkpoints; or see --recipe.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(help="The checkpoint is an official detector's file, of this recipe's model."),
    ] = None,
    shards: Shards = None,
    split: Annotated[
        str | None, typer.Option(help="Split that is scored; by default the recipe's.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 1,
    workers: Workers = 2,
    bad_sample_budget: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of pictures that may be bad; by default the recipe's."
        ),
    ] = None,
    ema: Ema = True,
    out: Out = None,
) -> None:
    """The metrics of a fine-tuned task: top-1, COCO's AP, mIoU."""

    def run() -> dict[str, Any]:
        from groundwork.pretrain.downstream.evaluation.task_evaluation import (
            evaluate_task,
            load_task,
        )
        from groundwork.pretrain.downstream.finetuning.evaluation import SplitReading

        trained = load_task(checkpoint, recipe=recipe, shards=shards, split=split, ema=ema)
        budget = trained.budget if bad_sample_budget is None else bad_sample_budget
        reading = SplitReading(batch, workers, budget=budget)
        return {"checkpoint": trained.source, **evaluate_task(trained, reading)}

    raise typer.Exit(reporting(lambda: _report(run, out)))


def probe(
    checkpoint: Checkpoint,
    shards: Shards = None,
    train: Train = "train",
    test: Test = "val",
    variant: Variant = None,
    size: Size = None,
    batch: Batch = 32,
    workers: Workers = 2,
    bad_sample_budget: Budget = 0.001,
    ema: Ema = True,
    seed: Annotated[int, typer.Option(help="Of the held-out part of the training split.")] = 0,
    out: Out = None,
) -> None:
    """Logistic regression on frozen features; the penalty is chosen within the training split."""

    def run() -> dict[str, Any]:
        from groundwork.pretrain.downstream.evaluation.probe import linear_probe

        found, known, asked = _features(
            checkpoint, shards, (train, test), variant, size, batch, workers, bad_sample_budget, ema
        )
        try:
            result = linear_probe(
                known.features, known.labels, asked.features, asked.labels, seed=seed
            )
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--train") from error
        counts = {"train_samples": len(known.labels), "samples": len(asked.labels)}
        return {**found, **asdict(result), **counts}

    raise typer.Exit(reporting(lambda: _report(run, out)))


def knn(
    checkpoint: Checkpoint,
    shards: Shards = None,
    train: Train = "train",
    test: Test = "val",
    neighbours: Annotated[
        list[int] | None, typer.Option("-k", help="Neighbours (repeatable): 10, 20, 100, 200.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the votes' weights.")] = 0.07,
    variant: Variant = None,
    size: Size = None,
    batch: Batch = 32,
    workers: Workers = 2,
    bad_sample_budget: Budget = 0.001,
    ema: Ema = True,
    out: Out = None,
) -> None:
    """Weighted vote of the k nearest training pictures, by the cosine of frozen features."""
    if temperature <= 0:
        raise typer.BadParameter(f"{temperature:g} is not above 0", param_hint="--temperature")

    def run() -> dict[str, Any]:
        from groundwork.pretrain.downstream.evaluation.probe import NEIGHBOURS, knn_accuracy

        found, known, asked = _features(
            checkpoint, shards, (train, test), variant, size, batch, workers, bad_sample_budget, ema
        )
        data = (known.features, known.labels, asked.features, asked.labels)
        try:
            scores = knn_accuracy(*data, neighbours or NEIGHBOURS, temperature)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="-k") from error
        flat = {f"top{n}, k={k}": s[f"top{n}"] for k, s in scores.items() for n in (1, 5)}
        counts = {"train_samples": len(known.labels), "samples": len(asked.labels)}
        return {**found, **flat, **counts}

    raise typer.Exit(reporting(lambda: _report(run, out)))


def _features(
    checkpoint: Path,
    shards: str | None,
    splits: tuple[str, str],
    variant: str | None,
    size: int | None,
    batch: int,
    workers: int,
    budget: float,
    ema: bool,
) -> tuple[dict[str, Any], Any, Any]:
    """(what was read, features of the training split, and of the test split)."""
    from groundwork.data.dataset import open_dataset, require_two_splits
    from groundwork.pretrain.downstream.evaluation.frozen import split_features
    from groundwork.pretrain.downstream.evaluation.image_models import (
        load_image_model,
        require_shards,
    )
    from groundwork.pretrain.downstream.finetuning.evaluation import SplitReading

    model = load_image_model(checkpoint, variant=variant, ema=ema)
    where = require_shards(model, shards)
    datasets = [open_dataset(where, split) for split in splits]
    require_two_splits(where, splits[0], datasets[0], splits[1], datasets[1])
    image = model.image if size is None else replace(model.image, size=size)
    reading = SplitReading(batch, workers, budget=budget)
    known, asked = (split_features(model, dataset, image, reading) for dataset in datasets)
    found = {"checkpoint": model.source, "shards": where, "train": splits[0], "split": splits[1]}
    return {**found, "size": image.size}, known, asked


def _report(run: Callable[[], dict[str, Any]], out: Path | None) -> int:
    if out is not None:
        require_file(out)
    results = run()
    table = Table("what", "value")
    for name, value in results.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.1e}" if 0 < value < 0.01 else f"{value:.2f}")
        elif not isinstance(value, dict):
            table.add_row(name, str(value))
    Console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(results, indent=1).encode())
        Console(stderr=True, highlight=False).print(f"wrote {out}", soft_wrap=True)
    return 0
