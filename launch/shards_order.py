"""`groundwork shards order`"""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from groundwork.launch.errors import reporting

console = Console(highlight=False)


def order(
    shards: Annotated[str, typer.Argument(help="Data set: folder, pattern or URL.")],
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    batch: Annotated[int, typer.Option(min=2, help="Samples of a global batch.")] = 1024,
    window: Annotated[
        int, typer.Option(min=2, help="Samples in flight: ranks x workers x prefetched batches.")
    ] = 10_000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Compare shuffle blocks: how alike a batch is, and how many shards are read at a time.

    The value chosen goes into the recipe as data.shuffle_block.
    """

    def run() -> int:
        from groundwork.data.dataset import open_dataset
        from groundwork.data.order import BlockOrder, GlobalOrder, Order, order_quality

        dataset = open_dataset(shards, split)
        sizes, total = dataset.shard_sizes, len(dataset)
        largest = max(sizes)
        table = Table(title=f"{total:,} samples in {len(sizes):,} shards")
        for head in ("shuffle_block", "alike", "open shards"):
            table.add_column(head, justify="right")
        choices: list[tuple[str, Order]] = [
            (f"{block:,}", BlockOrder(sizes, seed, block))
            for block in (largest * 4**i for i in range(10))
            if block < total
        ]
        for name, chosen in (*choices, ("null (all)", GlobalOrder(total, seed))):
            quality = order_quality(chosen, sizes, batch=batch, window=window)
            table.add_row(name, f"{quality.same_shard:.2f}", f"{quality.open_shards:.1f}")
        console.print(table)
        console.print(
            f"alike: how often two samples of a batch of {batch:,} come from one shard, over what "
            "it is in a uniform shuffle (1.00).\n"
            f"open shards: read in a stretch of {window:,} samples; each costs a request now and "
            "then, and room in the cache."
        )
        return 0

    raise typer.Exit(reporting(run))
