"""Samples to the shards of their splits, with what is counted on the way."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from groundwork.data.duplicates import NO_IMAGE, hash64, write_run
from groundwork.data.shard_index import ShardError
from groundwork.data.statistics import SplitStatistics
from groundwork.data.tar_writer import TarShardWriter

#: Names of splits: they begin file names.
SPLIT: Final = re.compile(r"\w[\w.-]*")


class Writable(Protocol):
    """What is written of a `Sample`."""

    @property
    def key(self) -> str: ...
    @property
    def image(self) -> bytes: ...
    @property
    def text(self) -> str: ...
    def fields(self) -> Mapping[str, bytes]: ...


@dataclass(frozen=True)
class WrittenShard:
    """A finished tar. run_crc32c: of its run of hashes (`duplicates.py`), at `run_path`."""

    path: Path
    samples: int
    bytes: int
    crc32c: int
    run_crc32c: int


@dataclass(frozen=True)
class WrittenSplit:
    """The shards of a split in order, and what was counted in them."""

    shards: tuple[WrittenShard, ...]
    statistics: SplitStatistics


@dataclass(frozen=True)
class ShardLimits:
    """A tar is closed when it reaches either; bytes are those of the members."""

    max_samples: int = 10_000
    max_bytes: int = 256 * 1024**2

    def __post_init__(self) -> None:
        if self.max_samples < 1 or self.max_bytes < 1:
            raise ValueError(
                f"max_samples {self.max_samples} and max_bytes {self.max_bytes} must be at least 1"
            )


def run_path(tar: Path) -> Path:
    """`x.tar` -> `x.hashes`."""
    return tar.with_suffix(".hashes")


def write_splits(
    samples: Iterable[tuple[str, Writable]],
    directory: Path,
    *,
    name: str,
    limits: ShardLimits,
    prefix: str = "",
    sync: bool = False,
) -> dict[str, WrittenSplit]:
    """Write (split, sample) pairs as DIRECTORY/{prefix}{split}-{number}.tar, each with its run.

    name: of the source, for messages. sync: wait for the disk on closing each shard. After an
    error the shards that are finished stay.
    Raises ShardError for a split that cannot begin a file name, and for a key that a shard holds
    twice; keys that come back in other shards are for the caller to find, by the runs.
    """
    writers: dict[str, _SplitWriter] = {}
    try:
        for split, sample in samples:
            if split not in writers:
                if not SPLIT.fullmatch(split):
                    raise ShardError(
                        f"source {name!r}: split {split!r}: a split is named by letters, digits, "
                        "'_', '-' and '.', because its shards begin with its name"
                    )
                writers[split] = _SplitWriter(directory, prefix, split, name, limits, sync)
            writers[split].write(sample)
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    return {
        split: WrittenSplit(tuple(writer.shards), writer.statistics)
        for split, writer in sorted(writers.items())
    }


class _SplitWriter:
    """Writes one split, starting a new tar whenever the present one is full."""

    def __init__(
        self, directory: Path, prefix: str, split: str, name: str, limits: ShardLimits, sync: bool
    ) -> None:
        self.directory, self.prefix, self.split, self.name = directory, prefix, split, name
        self.limits, self.sync = limits, sync
        self.shards: list[WrittenShard] = []
        self.statistics = SplitStatistics()
        self.tar: TarShardWriter | None = None

    def write(self, sample: Writable) -> None:
        if self.tar is None:
            file = f"{self.prefix}{self.split}-{len(self.shards):06d}.tar"
            self.tar = TarShardWriter(self.directory / file, sync=self.sync)
            self.bytes = 0
            self.key_hashes: list[int] = []
            self.image_hashes: list[int] = []
            self.image_bytes: list[int] = []
            self.text_characters: list[int] = []
        elif sample.key in self.tar:
            raise repeated_key(self.name, sample.key, self.split)
        self.bytes += self.tar.write(sample.key, sample.fields())
        self.key_hashes.append(hash64(sample.key.encode("utf-8")))
        self.image_hashes.append(hash64(sample.image) if sample.image else NO_IMAGE)
        self.image_bytes.append(len(sample.image))
        self.text_characters.append(0 if sample.text.isspace() else len(sample.text))
        full = len(self.key_hashes) >= self.limits.max_samples
        if full or self.bytes >= self.limits.max_bytes:
            self.close()

    def close(self) -> None:
        """Finish the present tar: note it in `shards` and its numbers in `statistics`."""
        if self.tar is None:
            return
        tar = self.tar.close()
        self.tar = None
        run_crc32c = write_run(
            run_path(tar.path),
            np.array(self.key_hashes, np.uint64),
            np.array(self.image_hashes, np.uint64),
        )
        self.statistics.add(
            widths=tar.index.widths,
            heights=tar.index.heights,
            image_bytes=self.image_bytes,
            text_characters=self.text_characters,
            sample_bytes=self.bytes,
        )
        self.shards.append(
            WrittenShard(tar.path, len(tar.index), tar.bytes, tar.crc32c, run_crc32c)
        )

    def abandon(self) -> None:
        """Remove the present tar, which is not taken up in `shards`."""
        if self.tar is not None:
            self.tar.abandon()
            self.tar = None


def repeated_key(name: str, key: str, split: str, where: str = "") -> ShardError:
    """The error about a key that a split of a source holds twice."""
    return ShardError(
        f"source {name!r}: key {key!r} twice in split {split!r}{where}; give every sample its own"
    )
