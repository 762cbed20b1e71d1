"""The statistics of a data set on a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from groundwork.data.data_card import TITLES, bars, summary
from groundwork.data.statistics import UNITS, Statistics


def show_statistics(statistics: Statistics | None) -> None:
    """Print what `statistics.json` says; None where a data set has none."""
    console = Console(highlight=False)
    if statistics is None:
        console.print("no statistics.json: built by an earlier version")
        return
    table = Table("split", "images", "without caption", "size unknown")
    for name, split in statistics.splits.items():
        numbers = (split.images, split.missing_captions, split.unknown_sizes)
        table.add_row(name, *(f"{number:,}" for number in numbers))
    console.print(table)
    duplicates = statistics.duplicates
    console.print(
        f"images that occur more than once, byte for byte: {duplicates.contents:,} "
        f"({duplicates.samples:,} samples too many; {duplicates.across_splits:,} in several splits)"
    )
    for group in duplicates.examples:
        console.print("  " + escape(" = ".join(f"{split}/{key}" for split, key in group)))
    for quantity, histogram in statistics.all_splits().histograms.items():
        if histogram.values:
            console.print(f"\n{TITLES[quantity]} ({UNITS[quantity]}): {summary(histogram)}")
            for bar in bars(histogram):
                console.print(f"  {bar}")
