"""The `README.md` of a data set: what it is, for people who find the folder."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import google_crc32c

from groundwork.data.statistics import UNITS, Histogram, Statistics

CARD: Final = "README.md"
#: Last line of a card as it was written; an edited one has another checksum, and is not replaced.
SIGNATURE: Final = re.compile(rb"<!-- groundwork data card, crc32c ([0-9a-f]{8}) -->\n")
BAR_WIDTH: Final = 40
TITLES: Final[Mapping[str, str]] = {
    "width": "Width",
    "height": "Height",
    "aspect": "Aspect ratio",
    "image_bytes": "Size of the image files",
    "text_characters": "Length of the texts",
}

USE: Final = """\
## Format

The tars are plain WebDataset: each sample is some files with the same stem, one after the other.
Any tar program and any WebDataset reader opens them. The `.idx` file beside a tar says where each
file lies, its checksum, and the sizes of images and texts; `manifest.json` names all shards with
their checksums, `statistics.json` holds the numbers of this page. The layouts are specified in
`docs/shard_format.md` of groundwork (groundwork-pretrain on PyPI).

    groundwork shards stat .

    import webdataset
    samples = webdataset.WebDataset("{first}", shardshuffle=False)
"""


def data_card(
    name: str,
    licence: str,
    source: Mapping[str, Any],
    splits: Mapping[str, tuple[int, int]],
    first_tar: str,
    concepts: int,
    statistics: Statistics,
) -> bytes:
    """The card, UTF-8. splits: name -> (samples, shards). concepts: number of classes."""
    total = statistics.all_splits()
    duplicates = statistics.duplicates
    lines = [f"# {_line(name)}", "", f"Licence: {_line(licence)}", ""]
    lines += ["| split | samples | shards | MiB | without caption |", "|---|--:|--:|--:|--:|"]
    for split, (samples, shards) in splits.items():
        numbers = statistics.splits[split]
        lines.append(
            f"| {split} | {samples:,} | {shards:,} | {numbers.bytes / 2**20:,.1f} | "
            f"{numbers.missing_captions:,} |"
        )
    lines += ["", f"Classes: {concepts:,}." if concepts else "No classes.", ""]
    if total.unknown_sizes:
        lines += [f"Images whose header is not understood: {total.unknown_sizes:,}.", ""]
    if duplicates.contents:
        lines += [
            f"Images that occur more than once, byte for byte: {duplicates.contents:,}, in "
            f"{duplicates.samples:,} samples too many; {duplicates.across_splits:,} of them are in "
            "several splits. The first:",
            "",
            *(
                "- " + ", ".join(f"`{split}/{key}`" for split, key in group)
                for group in duplicates.examples
            ),
            "",
        ]
    else:
        lines += ["No image occurs twice, byte for byte.", ""]
    lines += [
        "## Source",
        "",
        "```json",
        *json.dumps(dict(source), indent=1).split("\n"),
        "```",
        "",
    ]
    for quantity, histogram in total.histograms.items():
        if histogram.values:
            lines += [f"## {TITLES[quantity]} ({UNITS[quantity]})", "", "```text"]
            lines += [summary(histogram), *bars(histogram), "```", ""]
    text = "\n".join(lines) + "\n" + USE.replace("{first}", first_tar) + "\n"
    card = text.encode("utf-8", "backslashreplace")
    return card + b"<!-- groundwork data card, crc32c %08x -->\n" % google_crc32c.value(card)


def is_card(data: bytes) -> bool:
    """Whether `data_card` made this, and nobody has edited it since."""
    begin = data.rfind(b"\n", 0, -1) + 1
    signature = SIGNATURE.fullmatch(data[begin:])
    return signature is not None and int(signature[1], 16) == google_crc32c.value(data[:begin])


def summary(histogram: Histogram) -> str:
    """Least, mean and greatest value in one line."""
    parts = [("min", histogram.minimum), ("mean", histogram.mean), ("max", histogram.maximum)]
    return "  ".join(f"{what} {_number(value)}" for what, value in parts if value is not None)


def bars(histogram: Histogram) -> list[str]:
    """One line per bin from the first to the last that is not empty: its begin, count and bar."""
    filled = [place for place, count in enumerate(histogram.counts) if count]
    if not filled:
        return []
    most = max(histogram.counts)
    return [
        f">= {_number(histogram.bins[place]):>12}  {histogram.counts[place]:>13,}  "
        f"{'#' * -(-histogram.counts[place] * BAR_WIDTH // most)}".rstrip()
        for place in range(filled[0], filled[-1] + 1)
    ]


def _number(value: float) -> str:
    return f"{value:,.3f}".rstrip("0").rstrip(".")


def _line(text: str) -> str:
    return " ".join(text.split())
