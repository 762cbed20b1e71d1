"""`groundwork shards browse`: look at a data set in a web browser."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from groundwork.launch.errors import reporting

if TYPE_CHECKING:
    from groundwork.data.browse.collection import Collection
    from groundwork.data.browse.server import Browser
    from groundwork.data.knowledge.index import KnowledgeIndex

#: The resolved recipe in the folder of a run.
RECIPE = "recipe.yaml"
#: Taken where no --port is given, unless another program has it.
USUAL_PORT = 8765


def browse(
    directory: Annotated[
        str | None, typer.Argument(help="Folder of a data set, or folder or pattern of tars.")
    ] = None,
    locate: Annotated[
        int | None, typer.Option(min=1, help="Show the samples of this training step.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of a run: its data, seed, batch and checks are taken."),
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(min=1, help="Samples per training step, without --run.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the training order, without --run.")] = 0,
    shuffle: Annotated[
        bool, typer.Option("--shuffle/--no-shuffle", help="The same of the training order.")
    ] = True,
    split: Annotated[
        str | None, typer.Option(help="Split to show first; `train` where there is one.")
    ] = None,
    knowledge: Annotated[
        Path | None, typer.Option(help="A .gkb file: what it knows about words of the texts.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port on this machine, 0 for any free one.  [8765]"),
    ] = None,
) -> None:
    """Look at samples in a web browser: pictures, boxes, masks, texts, the order of training."""
    if directory is None and run is None:
        raise typer.BadParameter("give a data set, or --run with a run that has one")
    if locate is not None and run is None and global_batch is None:
        raise typer.BadParameter(
            "a step is known by --run FOLDER, or by --global-batch N with --seed and --shuffle",
            param_hint="--locate",
        )
    if run is not None and global_batch is not None:
        raise typer.BadParameter("the run has its own", param_hint="--global-batch")

    def start() -> int:
        from groundwork.data.browse.collection import Collection
        from groundwork.data.knowledge.index import KnowledgeIndex

        index = None if knowledge is None else KnowledgeIndex(knowledge)
        if run is not None:
            collection = _collection_of_run(run, directory, locate or 0, index)
        else:
            assert directory is not None
            collection = Collection(
                directory,
                trained=split,
                seed=seed,
                shuffle=shuffle,
                global_batch=global_batch or 0,
                step=locate or 0,
                knowledge=index,
            )
        return _serve(collection, port)

    raise typer.Exit(reporting(start))


def _collection_of_run(
    run: Path, directory: str | None, step: int, knowledge: "KnowledgeIndex | None"
) -> "Collection":
    """The data of a run in its order, bad samples told by its own decoder."""
    from groundwork.data.browse.collection import Collection
    from groundwork.data.order import sample_generator
    from groundwork.data.samples import Sample
    from groundwork.data.shard_index import ShardError
    from groundwork.pretrain.kinds import DATA
    from groundwork.pretrain.recipe import load_recipe

    recipe = load_recipe(str(run / RECIPE))
    if recipe.data.sources:
        folders = ", ".join(source.shards for source in recipe.data.sources)
        raise ShardError(
            f"{run} mixes several data sets, and one is shown at a time: leave out --run and name "
            f"one of {folders}"
        )
    shards = directory or recipe.data.shards
    assert shards is not None
    data = replace(recipe.data, shards=shards)
    recipe = replace(recipe, data=data)
    opened = DATA[data.kind].open(recipe)
    trained_on = _dataset_digest(run)
    if trained_on is not None and trained_on != opened.digests()["dataset"]:
        raise ShardError(
            f"{shards} is not what {run} was trained on, or has changed since; name the data "
            "set it was trained on, or leave out --run"
        )
    stream = DATA[data.kind].stream(recipe, opened)

    def order(position: int) -> int:
        return stream.locate([position])[0][1]

    def check(sample: Sample, position: int) -> object:
        return stream.sources[0].decoder(sample, sample_generator(recipe.train.seed, position))

    return Collection(
        shards,
        trained=data.split,
        seed=recipe.train.seed,
        shuffle=data.shuffle,
        order=order,
        check=check,
        global_batch=recipe.train.global_batch,
        step=step,
        knowledge=knowledge or opened.knowledge,
    )


def _dataset_digest(run: Path) -> str | None:
    """What the data set of a run was, as its last checkpoint says."""
    from groundwork.pretrain.engine.checkpoint import CheckpointError, find_checkpoint, read_state

    checkpoint = find_checkpoint(run)
    if checkpoint is None:
        return None
    try:
        return read_state(checkpoint).dataset
    except CheckpointError:  # of an earlier version, which this only wants to look at
        print(f"{checkpoint} does not tell whether this is the data set trained on", flush=True)
        return None


def _serve(collection: "Collection", port: int | None) -> int:
    with _server(collection, port) as server:
        samples = ", ".join(f"{name} {count:,}" for name, count in collection.sizes.items())
        print(f"{collection.name}: {samples}", flush=True)
        print(f"open {server.url}   (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            print("\nstopped")
    return 0


def _server(collection: "Collection", port: int | None) -> "Browser":
    from groundwork.data.browse.server import Browser

    try:
        return Browser(collection, USUAL_PORT if port is None else port)
    except OSError as error:
        if port is None and error.errno == errno.EADDRINUSE:
            return Browser(collection, 0)
        raise typer.BadParameter(
            f"{port} cannot be used ({error.strerror}); choose another one, or 0",
            param_hint="--port",
        ) from error
