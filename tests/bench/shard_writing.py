"""Writing and indexing tars against webdataset: `python tests/bench/shard_writing.py [--quick]`.

All sides write the same small records (a JPEG of about 4 KB, a caption, some JSON) into the same
number of tars. webdataset's ShardWriter is taken as its documentation shows it, and with its
encoders off, which is its fastest setting; it neither indexes nor waits for the disk. Ours writes
the side-cars too, with and without waiting for the disk. `write_shards` is the whole way: samples
to a data set with checksums, statistics and a card. Rounds alternate between the sides, the ratio
is taken within a round. Then the tars are scanned, as foreign ones are when they are first
opened.
"""

import argparse
import io
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table

from groundwork.data.samples import Sample
from groundwork.data.shard_index import scan_tar
from groundwork.data.shards import write_shards
from groundwork.data.tar_writer import TarShardWriter

SAMPLES_PER_TAR = 2_000


def samples(count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(50):
        file = io.BytesIO()
        noise = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((160, 120)).save(file, "JPEG", quality=85)
        jpegs.append(file.getvalue())
    return [
        Sample(f"{i:09d}", jpegs[i % 50], "jpg", f"a caption of picture {i}", {"label": i % 10})
        for i in range(count)
    ]


def peer(records: Sequence[Sample], folder: Path, *, encoder: bool) -> None:
    pattern = str(folder / "%06d.tar")
    with webdataset.ShardWriter(
        pattern, maxcount=SAMPLES_PER_TAR, verbose=0, encoder=encoder, mtime=0
    ) as writer:
        for sample in records:
            fields = sample.fields()
            if encoder:
                fields["txt"], fields["json"] = sample.text, sample.info  # type: ignore[assignment]
            writer.write({"__key__": sample.key, **fields})


def ours(records: Sequence[Sample], folder: Path, *, sync: bool) -> None:
    for first in range(0, len(records), SAMPLES_PER_TAR):
        tar = folder / f"{first // SAMPLES_PER_TAR:06d}.tar"
        with TarShardWriter(tar, sync=sync) as writer:
            for sample in records[first : first + SAMPLES_PER_TAR]:
                writer.write(sample.key, sample.fields())


def whole_data_set(records: Sequence[Sample], folder: Path) -> None:
    pairs: Iterator[tuple[str, Sample]] = (("train", sample) for sample in records)
    write_shards(pairs, folder, name="n", source={}, licence="CC0", max_samples=SAMPLES_PER_TAR)


SIDES: dict[str, Callable[[Sequence[Sample], Path], None]] = {
    "ShardWriter": lambda records, folder: peer(records, folder, encoder=True),
    "ShardWriter, encoder=False": lambda records, folder: peer(records, folder, encoder=False),
    "TarShardWriter": lambda records, folder: ours(records, folder, sync=True),
    "TarShardWriter, sync=False": lambda records, folder: ours(records, folder, sync=False),
    "write_shards": whole_data_set,
}


def contents(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    tars = sorted(str(tar) for tar in folder.glob("*.tar"))
    return [
        (s["__key__"], {k: v for k, v in s.items() if k != "json" and not k.startswith("__")})
        for s in webdataset.WebDataset(tars, shardshuffle=False)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and samples")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    records = samples(4_000 if options.quick else 20_000)
    rounds = 3 if options.quick else 9
    speeds: dict[str, list[float]] = {name: [] for name in SIDES}
    scans: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        expected = None
        for number in range(rounds + 1):
            for side, write in SIDES.items():
                folder = Path(name) / "out"
                folder.mkdir()
                begin = time.perf_counter()
                write(records, folder)
                elapsed = time.perf_counter() - begin
                if number == 0:  # the round that warms up is the one whose result is compared
                    expected = expected or contents(folder)
                    assert contents(folder) == expected, side
                else:
                    speeds[side].append(len(records) / elapsed)
                if side == "TarShardWriter" and number:
                    tars = list(folder.glob("*.tar"))
                    megabytes = sum(tar.stat().st_size for tar in tars) / 1e6
                    begin = time.perf_counter()
                    members = sum(int((scan_tar(tar).sizes >= 0).sum()) for tar in tars)
                    elapsed = time.perf_counter() - begin
                    scans.append((members / elapsed, megabytes / elapsed))
                shutil.rmtree(folder)
    show(speeds, scans, options.json)


def show(
    speeds: dict[str, list[float]], scans: list[tuple[float, float]], file: Path | None
) -> None:
    table = Table("writer", "samples/s", "least..most", "to ShardWriter", "to its fastest")
    record: dict[str, object] = {
        "python": platform.python_version(),
        "webdataset": webdataset.__version__,
    }
    for side, values in speeds.items():
        ratios = [
            [a / b for a, b in zip(values, speeds[base], strict=True)]
            for base in ("ShardWriter", "ShardWriter, encoder=False")
        ]
        shown = [f"{statistics.median(r):.1f} ({min(r):.1f}..{max(r):.1f})" for r in ratios]
        spread = f"{min(values):,.0f}..{max(values):,.0f}"
        table.add_row(side, f"{statistics.median(values):,.0f}", spread, *shown)
        record[side] = {"samples_per_s": values, "ratios": ratios}
    members, megabytes = (statistics.median(column) for column in zip(*scans, strict=True))
    record["scan_tar"] = {"members_per_s": members, "megabytes_per_s": megabytes}
    console = Console()
    console.print(table)
    if file is not None:
        file.write_text(json.dumps(record, indent=1))
    best = statistics.median(
        a / b for a, b in zip(speeds["TarShardWriter"], speeds["ShardWriter"], strict=True)
    )
    console.print(
        f"writing: {best:.1f}x ShardWriter; scan_tar: {members:,.0f} members/s, "
        f"{megabytes:,.0f} MB/s"
    )


if __name__ == "__main__":
    main()
