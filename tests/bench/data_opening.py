"""Opening a large data set in its middle, for `data.py`.

The manifest names 10,000 shards of 10,000 samples each. Of these only the ones that the first batch
after sample 10,000,000 needs are there; the others have the right size, but no side-car and nothing
in them: were any of them opened, reading would fail.
"""

import json
import os
import statistics
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from groundwork.data.dataset import open_dataset
from groundwork.data.samples import Sample
from groundwork.data.shards import (
    CONCEPTS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    Shard,
    shard_name,
)
from groundwork.data.stream import Source, Stream
from groundwork.data.tar_writer import TarShardWriter
from groundwork.kernels.member_reader import find_member_reader

SHARDS, SAMPLES = 10_000, 10_000
POSITION, BATCH = 10**7, 256
#: Name of an order -> shuffle, block.
ORDERS: dict[str, tuple[bool, int | None]] = {
    "in shard order": (False, None),
    "blocks of 100,000": (True, 100_000),
    "global shuffle": (True, None),
}


def write(folder: Path) -> Path:
    """The manifest in a folder, and one tar beside it that stands for any of them."""
    tar = folder.parent / "any.tar"
    writer = TarShardWriter(tar, sync=False)
    for i in range(SAMPLES):
        writer.write(f"{i:06d}", {"jpg": b"%060d" % i, "txt": b"a caption"})
    written = writer.close()
    shards = tuple(
        Shard(shard_name("train", n), SAMPLES, written.bytes, written.crc32c) for n in range(SHARDS)
    )
    manifest = Manifest("large", {"kind": "synthetic"}, "CC0-1.0", {"train": shards})
    record = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "written_by": "bench",
        **asdict(manifest),
    }
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps(record, indent=1))
    (folder / CONCEPTS).write_text("[]")
    for shard in shards:
        put_empty(folder / shard.file, shard.bytes)
    return tar


def _key(sample: Sample, _rng: np.random.Generator) -> str:
    return sample.key


def stream_of(folder: Path, order: str) -> Stream[str]:
    shuffle, block = ORDERS[order]
    dataset = open_dataset(str(folder), reader=find_member_reader())
    return Stream([Source(dataset, _key, block=block)], seed=0, shuffle=shuffle)


def measure(parent: Path, rounds: int) -> dict[str, Any]:
    """For each order: milliseconds to open, to say what comes, and to have read the first batch."""
    folder = parent / "large"
    tar = write(folder)
    results = {}
    for order in ORDERS:
        stream = stream_of(folder, order)
        dataset = stream.sources[0].dataset
        places = stream.locate(range(POSITION, POSITION + BATCH))
        needed = sorted({dataset.locate(index)[0] for _, index in places})
        for shard in needed:
            put(tar, folder / shard_name("train", shard))
        laps = [lap(folder, order) for _ in range(rounds)]
        for shard in needed:
            take_away(folder / shard_name("train", shard), tar.stat().st_size)
        opening, seeking, reading = map(statistics.median, zip(*laps, strict=True))
        results[order] = {
            "open_ms": opening,
            "seek_ms": seeking,
            "first_batch_ms": reading,
            "total_ms": [sum(row) for row in laps],
            "shards": len(needed),
            "first_shard": shard_name("train", needed[0]),
            "files": [MANIFEST, CONCEPTS, f"{len(needed)} tars and side-cars"],
        }
    return results


def lap(folder: Path, order: str) -> tuple[float, float, float]:
    times = [time.perf_counter()]
    stream = stream_of(folder, order)
    times.append(time.perf_counter())
    stream.locate(range(POSITION, POSITION + BATCH))
    times.append(time.perf_counter())
    keys, faults = stream.__getitems__(list(range(POSITION, POSITION + BATCH)))
    times.append(time.perf_counter())
    assert not faults
    assert len(keys) == BATCH
    opened, sought, read = ((b - a) * 1e3 for a, b in pairwise(times))
    return opened, sought, read


def put(tar: Path, name: Path) -> None:
    name.unlink()
    os.link(tar, name)
    os.link(tar.with_suffix(".idx"), name.with_suffix(".idx"))


def take_away(name: Path, size: int) -> None:
    name.with_suffix(".idx").unlink()
    name.unlink()
    put_empty(name, size)


def put_empty(name: Path, size: int) -> None:
    with name.open("wb") as file:
        file.truncate(size)
