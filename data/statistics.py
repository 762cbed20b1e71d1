"""What a data set is made of, in numbers that can be added up shard by shard.

All sums are of integers and all bins are fixed, so the statistics of a data set do not depend on
how many processes counted, nor in which order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
from numpy.typing import ArrayLike

FORMAT: Final = "groundwork-statistics"
VERSION: Final = 1

PIXELS: Final = (1, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
#: Lower ends of the bins of each quantity; the last bin has no upper end.
BINS: Final[Mapping[str, tuple[float, ...]]] = {
    "width": PIXELS,
    "height": PIXELS,
    "aspect": (0, 0.25, 0.333, 0.5, 0.667, 0.75, 0.95, 1.05, 1.334, 1.5, 2, 3, 4),
    "image_bytes": tuple(2**power for power in range(8, 27)),
    "text_characters": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
}
UNITS: Final[Mapping[str, str]] = {
    "width": "px",
    "height": "px",
    "aspect": "width / height",
    "image_bytes": "bytes",
    "text_characters": "characters",
}
#: Quantities whose mean is not given: it would be a sum of fractions.
WITHOUT_TOTAL: Final = ("aspect",)


@dataclass
class Histogram:
    """Counts of values by bins; a value below the first bin counts there.

    minimum, maximum: None where there is no value. total: the sum, 0 for fractions.
    """

    bins: tuple[float, ...]
    counts: list[int]
    minimum: float | None = None
    maximum: float | None = None
    total: int = 0

    @classmethod
    def empty(cls, bins: tuple[float, ...]) -> Self:
        return cls(bins, [0] * len(bins))

    @property
    def values(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        return self.total / self.values if self.total and self.values else None

    def add(self, values: ArrayLike) -> None:
        """Count values, (N,), integers or fractions."""
        array = np.asarray(values)
        if not array.size:
            return
        places = np.searchsorted(np.array(self.bins[1:]), array, side="right")
        found = np.bincount(places, minlength=len(self.bins)).tolist()
        self.counts = [a + b for a, b in zip(self.counts, found, strict=True)]
        low, high = array.min().item(), array.max().item()
        self.minimum = low if self.minimum is None else min(low, self.minimum)
        self.maximum = high if self.maximum is None else max(high, self.maximum)
        if array.dtype.kind in "iu":
            self.total += int(array.sum(dtype=np.int64))

    def merge(self, other: "Histogram") -> None:
        if self.bins != other.bins:
            raise ValueError(f"histograms of different bins: {self.bins} and {other.bins}")
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.minimum = min(_known(self.minimum, other.minimum), default=None)
        self.maximum = max(_known(self.maximum, other.maximum), default=None)
        self.total += other.total

    def record(self) -> dict[str, Any]:
        return {
            "bins": list(self.bins),
            "counts": self.counts,
            "min": self.minimum,
            "max": self.maximum,
            "total": self.total,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        histogram = cls(
            tuple(record["bins"]),
            list(record["counts"]),
            record["min"],
            record["max"],
            record["total"],
        )
        numbers = [n for n in (histogram.minimum, histogram.maximum) if n is not None]
        if (
            len(histogram.counts) != len(histogram.bins)
            or any(type(n) is not int or n < 0 for n in (*histogram.counts, histogram.total))
            or any(type(n) not in (int, float) for n in (*histogram.bins, *numbers))
        ):
            raise ValueError(f"histogram {record}")
        return histogram


@dataclass
class SplitStatistics:
    """Numbers of one split.

    bytes: of all members. images: samples that have one; unknown_sizes: those of them whose header
    is not understood. missing_captions: samples whose text is empty or blank.
    """

    samples: int = 0
    bytes: int = 0
    images: int = 0
    unknown_sizes: int = 0
    missing_captions: int = 0
    histograms: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram.empty(bins) for name, bins in BINS.items()}
    )

    def add(
        self,
        *,
        widths: ArrayLike,
        heights: ArrayLike,
        image_bytes: ArrayLike,
        text_characters: ArrayLike,
        sample_bytes: int,
    ) -> None:
        """Count samples. All arrays (N,): image_bytes 0 without an image, text_characters 0 without
        a caption, widths and heights 0 where they are unknown.
        """
        width, height = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
        images, texts = np.asarray(image_bytes, np.int64), np.asarray(text_characters, np.int64)
        known = (width > 0) & (height > 0)
        self.samples += len(images)
        self.bytes += sample_bytes
        self.images += int((images > 0).sum())
        self.unknown_sizes += int(((images > 0) & ~known).sum())
        self.missing_captions += int((texts == 0).sum())
        width, height = width[known], height[known]
        self.histograms["width"].add(width)
        self.histograms["height"].add(height)
        self.histograms["aspect"].add(np.round(width / np.maximum(height, 1), 3))
        self.histograms["image_bytes"].add(images[images > 0])
        self.histograms["text_characters"].add(texts[texts > 0])

    def merge(self, other: "SplitStatistics") -> None:
        for name in ("samples", "bytes", "images", "unknown_sizes", "missing_captions"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, histogram in self.histograms.items():
            histogram.merge(other.histograms[name])

    def record(self) -> dict[str, Any]:
        histograms = {name: histogram.record() for name, histogram in self.histograms.items()}
        return {**vars(self), "histograms": histograms}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        histograms = {name: Histogram.from_record(record["histograms"][name]) for name in BINS}
        statistics = cls(**{**record, "histograms": histograms})
        if any(type(n) is not int for name, n in vars(statistics).items() if name != "histograms"):
            raise ValueError("a count that is no integer")
        return statistics


@dataclass(frozen=True)
class Duplicates:
    """Images with the same bytes, by 64 bits of their sha256.

    contents: how many different images occur more than once; samples: how many samples could go
    without losing one; across_splits: contents that several splits have, such as test images in
    the training set. examples: (split, key) of the first samples of the first such contents.
    """

    contents: int = 0
    samples: int = 0
    across_splits: int = 0
    examples: tuple[tuple[tuple[str, str], ...], ...] = ()

    def record(self) -> dict[str, Any]:
        examples = [[{"split": s, "key": k} for s, k in group] for group in self.examples]
        return {**vars(self), "examples": examples}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        examples = tuple(
            tuple((str(sample["split"]), str(sample["key"])) for sample in group)
            for group in record["examples"]
        )
        duplicates = cls(**{**record, "examples": examples})
        counts = (duplicates.contents, duplicates.samples, duplicates.across_splits)
        if any(type(n) is not int or n < 0 for n in counts):
            raise ValueError(f"duplicates {counts}")
        return duplicates


@dataclass(frozen=True)
class Statistics:
    """What `statistics.json` says."""

    splits: Mapping[str, SplitStatistics]
    duplicates: Duplicates

    def all_splits(self) -> SplitStatistics:
        total = SplitStatistics()
        for split in self.splits.values():
            total.merge(split)
        return total

    def record(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "splits": {name: split.record() for name, split in self.splits.items()},
            "duplicate_images": self.duplicates.record(),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Raises ValueError, KeyError, TypeError or AttributeError for what is none."""
        if record["format"] != FORMAT or record["version"] != VERSION:
            raise ValueError(f"format {record['format']!r} version {record['version']!r}")
        splits = {
            name: SplitStatistics.from_record(split) for name, split in record["splits"].items()
        }
        return cls(splits, Duplicates.from_record(record["duplicate_images"]))


def _known(*values: float | None) -> list[float]:
    return [value for value in values if value is not None]
