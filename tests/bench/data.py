"""The data plane against its peers: `python tests/bench/data.py [--quick] [--json FILE]`.

    python tests/bench/data.py --peer-python PEERS/bin/python

All sides read the same tars from a temporary folder, in rounds that alternate between the sides; a
ratio is taken within a round, and given with the lowest and the highest. Processor time per sample,
of all processes of a side, tells the same on a machine that has other work to do.

reading: JPEGs of 4 KB with caption and JSON, without decoding. decoding: random crops of 224
pixels, two workers. writing: small records into tars. opening: the middle of 10^8 samples.
webdataset is measured always. MosaicML Streaming and Energon are measured by `data_peers.py` where
`--peer-python` names a Python that has them (`uv pip install mosaicml-streaming megatron-energon
torchvision psutil` in an environment of their own).
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import data_opening
import data_sides as sides
import decode
import numpy as np
import psutil
import shard_writing
import torch
from rich.console import Console
from rich.table import Table

from groundwork.data.tar_writer import TarShardWriter

PEERS = ("mosaic", "energon")
PACKAGES = ("webdataset", "torch", "torchvision", "numpy", "pillow", "simplejpeg", "google-crc32c")


#: Samples before the clock starts.
WARM, WARM_DECODED = 2048, decode.WORKERS * decode.BATCH


class Speed(NamedTuple):
    """samples per second; microseconds: processor time of all processes of a side, per sample."""

    samples: float
    microseconds: float


Side = Callable[[], Speed]


def processor_seconds() -> float:
    """Of this process, to the microsecond, and of its children, in ticks of the system's clock."""
    children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in children)


def measure(counts: Iterator[int], seconds: float, warm: int) -> Speed:
    """In the steady state, after `warm` samples: when workers run and caches are warm."""
    while warm > 0:
        warm -= next(counts)
    began, worked, count = time.perf_counter(), processor_seconds(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        target = count + 256  # not to look at the clock for each sample
        while count < target:
            count += next(counts)
    return Speed(count / elapsed, (processor_seconds() - worked) / count * 1e6)


def alternate(contestants: Mapping[str, Side], rounds: int) -> dict[str, list[Speed]]:
    speeds: dict[str, list[Speed]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, side in contestants.items():
            speeds[name].append(side())
    return speeds


def compare(ours: Sequence[Speed], peer: Sequence[Speed]) -> dict[str, float]:
    """ratio, lowest, highest: by the clock. work: by processor time."""
    pairs = list(zip(ours, peer, strict=True))
    by_clock = [a.samples / b.samples for a, b in pairs]
    return {
        "ratio": statistics.median(by_clock),
        "lowest": min(by_clock),
        "highest": max(by_clock),
        "work": statistics.median(b.microseconds / a.microseconds for a, b in pairs),
    }


# ---- peers in another Python ----


class PeerError(RuntimeError):
    """A peer that does not run here."""


class Peer:
    """A process of `data_peers.py` that waits for orders."""

    def __init__(self, python: Path, name: str, folder: Path, log: Path) -> None:
        self.name, self.log = name, log
        script = Path(__file__).with_name("data_peers.py")
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, script, name, folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.version = ""

    def send(self, *order: object) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(" ".join(map(str, order)) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise self._failure() from error

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._failure()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def speed(self, task: str, name: str, seconds: float, workers: int) -> Speed:
        self.send(task, name, seconds, workers)
        answer = self.answer()
        return Speed(answer["samples"], answer["microseconds"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _failure(self) -> PeerError:
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["no message"]
        return PeerError(f"{self.name} is left out: {lines[-1]}")


def start_peers(python: Path | None, folder: Path, console: Console) -> list[Peer]:
    if python is None:
        console.print("MosaicML Streaming and Energon are left out: no --peer-python")
        return []
    return [Peer(python, name, folder / name, folder / f"{name}.log") for name in PEERS]


def prepared(peers: Sequence[Peer], names: Sequence[str], console: Console) -> list[Peer]:
    """Those that run here, once they have converted or indexed the folders of tars."""
    ready = []
    for peer in peers:
        try:
            peer.version = peer.answer()["version"]
            for name in names:
                peer.send("prepare", name, 0, 0)
            for _ in names:
                peer.answer()
            ready.append(peer)
        except PeerError as error:
            console.print(str(error))
            peer.close()
    return ready


# ---- what is measured ----


def write_small(folder: Path, tars: int, samples: int) -> None:
    """JPEGs of 4 KB (their bytes are noise: nobody looks), a caption and some JSON."""
    rng = np.random.default_rng(0)
    for number in range(tars):
        with TarShardWriter(folder / f"{number:03d}.tar", sync=False) as tar:
            for i in range(samples):
                info = b'{"label": %d, "url": "http://example.org/%d"}' % (i % 1000, i)
                fields = {"jpg": rng.bytes(4096), "txt": b"a photo of thing %d" % i, "json": info}
                tar.write(f"{number:03d}{i:06d}", fields)


def assert_same_samples(folder: Path) -> None:
    """Ours are those that webdataset reads."""
    dataset = sides.opened(folder)
    tars = sorted(map(str, folder.glob("*.tar")))
    theirs = sides.webdataset.WebDataset(tars, shardshuffle=False)
    batch = dataset.read_batch(range(1000))
    for ours, other in zip(batch, theirs, strict=False):
        assert isinstance(ours, tuple)
        assert ours[0] == other["__key__"]
        assert all(ours[1][field] == other[field] for field in ("jpg", "txt", "json"))


def reading(
    folder: Path, peers: Sequence[Peer], rounds: int, seconds: float
) -> dict[str, list[Speed]]:
    assert_same_samples(folder)
    contestants: dict[str, Callable[[Path], Iterator[int]]] = {
        "webdataset": sides.webdataset_samples,
        "ours": partial(sides.our_batches, shuffle="none"),
        "ours, shuffled in blocks": partial(sides.our_batches, shuffle="block"),
        "ours, global shuffle": partial(sides.our_batches, shuffle="global"),
        "ours, as dicts": partial(sides.our_dicts, shuffle="none"),
        "webdataset, 2 workers": partial(sides.webdataset_workers, workers=2),
        "ours, 2 workers": partial(sides.our_workers, shuffle="none", workers=2),
    }
    timed: dict[str, Side] = {
        name: partial(lambda side: measure(side(folder), seconds, WARM), side)
        for name, side in contestants.items()
    }
    for peer in peers:
        timed[peer.name] = partial(peer.speed, "read", folder.name, seconds, 0)
    return alternate(timed, rounds)


def decoding(
    folder: Path, peers: Sequence[Peer], rounds: int, seconds: float
) -> dict[str, list[Speed]]:
    tars = sorted(map(str, folder.glob("*.tar")))

    contestants: dict[str, Side] = {
        "webdataset": lambda: measure(
            map(sides.pictures_in, decode.webdataset_batches(tars)), seconds, WARM_DECODED
        ),
        "ours": lambda: measure(
            map(sides.pictures_in, sides.our_stream(folder, decode.WORKERS)), seconds, WARM_DECODED
        ),
    }
    for peer in peers:
        contestants[peer.name] = partial(peer.speed, "decode", folder.name, seconds, decode.WORKERS)
    return alternate(contestants, rounds)


def writing(folder: Path, rounds: int, samples: int) -> dict[str, list[Speed]]:
    records = shard_writing.samples(samples)

    def timed(write: Callable[[Sequence[Any], Path], None]) -> Speed:
        out = folder / "written"
        out.mkdir()
        began, worked = time.perf_counter(), processor_seconds()
        write(records, out)
        elapsed, work = time.perf_counter() - began, processor_seconds() - worked
        shutil.rmtree(out)
        return Speed(samples / elapsed, work / samples * 1e6)

    writers = {
        "webdataset": "ShardWriter",
        "webdataset, no encoder": "ShardWriter, encoder=False",
        "ours": "TarShardWriter",
        "ours, whole data set": "write_shards",
    }
    contestants: dict[str, Side] = {
        name: partial(timed, shard_writing.SIDES[side]) for name, side in writers.items()
    }
    alternate(contestants, 1)  # warms up
    return alternate(contestants, rounds)


# ---- the report ----


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": model,
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0],
    }


def base_of(name: str, speeds: Mapping[str, list[Speed]]) -> str:
    """Whom a side is compared with: the webdataset that works in the same way."""
    same = "webdataset" + name.partition("ours")[2]
    return same if same in speeds else "webdataset"


def show(title: str, speeds: Mapping[str, list[Speed]], console: Console) -> dict[str, Any]:
    """Print a table; returns the numbers and the ratios of each of ours to each peer."""
    table = Table("", "samples/s", "CPU us", "to webdataset", "lowest", "highest", "by CPU")
    table.title, table.columns[0].no_wrap = title, True
    for name, values in speeds.items():
        found = compare(values, speeds[base_of(name, speeds)])
        numbers = (f"{found[key]:.2f}" for key in ("ratio", "lowest", "highest", "work"))
        median = [statistics.median(column) for column in zip(*values, strict=True)]
        table.add_row(name, f"{median[0]:,.0f}", f"{median[1]:,.1f}", *numbers)
    console.print(table)
    ratios = {
        name: {
            peer: compare(values, theirs)
            for peer, theirs in speeds.items()
            if not peer.startswith("ours")
        }
        for name, values in speeds.items()
        if name.startswith("ours")
    }
    record = {name: [value._asdict() for value in values] for name, values in speeds.items()}
    return {"speeds": record, "ratios": ratios, "load_average": os.getloadavg()[0]}


def show_opening(results: Mapping[str, Any], console: Console) -> None:
    table = Table("order", "open ms", "seek ms", "first batch ms", "in all", "files touched")
    table.title = "opening 10^8 samples in 10^4 shards at sample 10^7"
    for order, r in results.items():
        numbers = [r["open_ms"], r["seek_ms"], r["first_batch_ms"]]
        whole = statistics.median(r["total_ms"])
        files = ", ".join(r["files"])
        table.add_row(order, *(f"{number:.1f}" for number in (*numbers, whole)), files)
    console.print(table)


def summary(report: Mapping[str, Any]) -> str:
    parts = []
    for name in ("reading", "decoding 480x360", "decoding 1024x768", "writing"):
        ratios = report[name]["ratios"]["ours"]
        peers = ("webdataset", *PEERS)
        listed = ", ".join(
            f"{ratios[peer]['ratio']:.1f}x {peer} ({ratios[peer]['work']:.1f}x by CPU time)"
            for peer in peers
            if peer in ratios
        )
        parts.append(f"{name} {listed}")
    shuffled = report["reading"]["ratios"]["ours, shuffled in blocks"]["webdataset"]
    parts[0] += f", shuffled {shuffled['ratio']:.1f}x webdataset ({shuffled['work']:.1f}x)"
    opening = max(r["open_ms"] + r["seek_ms"] for r in report["opening"].values())
    batch = report["opening"]["blocks of 100,000"]["first_batch_ms"]
    last = f"opening at sample 10^7 of 10^8 {opening:.0f} ms, first shuffled batch {batch:.0f} ms"
    return "; ".join([*parts, last])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--peer-python", type=Path, help="a Python that has the other peers")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="webdataset")
    torch.set_num_threads(1)
    quick = arguments.quick
    rounds, seconds = (3, 0.4) if quick else (9, 2.0)
    console = Console(width=150)
    report: dict[str, Any] = {"machine": machine(), "arguments": sys.argv[1:]}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_small(folder / "small", 8, 1024 if quick else 4096)
        sizes = {f"{width}x{height}": (width, height) for width, height in decode.SIZES}
        for size, (width, height) in sizes.items():
            pictures = [decode.photograph(width, height, i) for i in range(4 if quick else 32)]
            (folder / size).mkdir()
            decode.write_tars(folder / size, pictures, tars=4, samples=2 * decode.BATCH)
        for peer, tars in itertools.product(PEERS, ("small", *sizes)):
            (folder / peer / tars).mkdir(parents=True)  # they put their own files beside the tars
            for tar in (folder / tars).glob("*.tar"):
                os.link(tar, folder / peer / tars / tar.name)
        started = start_peers(arguments.peer_python, folder, console)
        try:
            peers = prepared(started, ("small", *sizes), console)
            report["writing"] = show(
                "writing", writing(folder, 2 if quick else 9, 2000 if quick else 20_000), console
            )
            opening = data_opening.measure(folder, 3 if quick else 9)
            report["opening"] = opening
            show_opening(opening, console)
            report["reading"] = show(
                "reading without decoding",
                reading(folder / "small", peers, rounds, seconds),
                console,
            )
            for size in sizes:
                speeds = decoding(
                    folder / size, peers, 2 if quick else rounds, 1.8 if quick else 5.0
                )
                report[f"decoding {size}"] = show(f"decoding {size}, 2 workers", speeds, console)
        finally:
            for peer in started:
                peer.close()
    report["machine"]["load_average_after"] = os.getloadavg()[0]
    report["versions"] = {
        **{package: version(package) for package in (*PACKAGES, "groundwork-pretrain")},
        **dict(peer.version.split() for peer in peers),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }
    report["seconds"] = time.monotonic() - began
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    before, after = (report["machine"][f"load_average_{when}"] for when in ("before", "after"))
    console.print(f"load {before:.1f} before, {after:.1f} after; {report['seconds']:.0f} s")
    console.print(summary(report), soft_wrap=True)


if __name__ == "__main__":
    main()
