"""MosaicML Streaming or Energon, reading and decoding when told to: run by their own Python.

    python data_peers.py mosaic|energon FOLDER

The data plane needs neither of them, so `data.py` starts this file with `--peer-python`, in whose
environment `mosaicml-streaming` or `megatron-energon`, `torchvision` and `psutil` are installed.
FOLDER has a folder of tars for each data set. Lines of standard input are orders, `TASK NAME
SECONDS WORKERS`; each is answered by a line of JSON. A task is `prepare`, `read` (all members of a
sample as bytes) or `decode` (batches of 64 random crops of 224 pixels, as in `decode.py`).
"""

import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2

BATCH = 64
CROP = v2.Compose(
    [RandomResizedCrop(224, interpolation=InterpolationMode.BILINEAR), v2.PILToTensor()]
)


def picture(data: bytes) -> torch.Tensor:
    return CROP(Image.open(io.BytesIO(data)).convert("RGB"))


def members(tars: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and fields of the samples of some tars."""
    for tar in sorted(tars.glob("*.tar")):
        with tarfile.open(tar) as archive:
            files = ((m.name, archive.extractfile(m).read()) for m in archive)  # type: ignore[union-attr]
            for key, group in itertools.groupby(files, lambda file: file[0].partition(".")[0]):
                yield key, {name.partition(".")[2]: content for name, content in group}


class Mosaic:
    """The tars converted to the format of MosaicML Streaming."""

    package = "mosaicml-streaming"

    def prepare(self, tars: Path) -> None:
        from streaming import MDSWriter

        first = next(members(tars))[1]
        columns = {"key": "str", **dict.fromkeys(first, "bytes")}
        with MDSWriter(out=str(tars / "mds"), columns=columns) as writer:
            for key, fields in members(tars):
                writer.write({"key": key, **fields})

    def batches(self, tars: Path, task: str, workers: int) -> Iterator[int]:
        from streaming import StreamingDataset

        class Pictures(StreamingDataset):  # type: ignore[misc]
            def __getitem__(self, at: Any) -> Any:
                return picture(super().__getitem__(at)["jpg"])

        kind = Pictures if task == "decode" else StreamingDataset
        dataset = kind(local=str(tars / "mds"), shuffle=False, batch_size=BATCH, epoch_size=10**6)
        if not workers:
            for _ in dataset:
                yield 1
        collate = None if task == "decode" else list
        for _ in DataLoader(dataset, BATCH, num_workers=workers, collate_fn=collate):
            yield BATCH


def cook(sample: Any) -> Any:
    """Energon's sample with its members as they are."""
    from megatron.energon import TextSample, basic_sample_keys

    fields = {name: sample[name] for name in sample if not name.startswith("__")}
    return TextSample(**basic_sample_keys(sample), text=fields)


def cook_picture(sample: Any) -> Any:
    from megatron.energon import TextSample, basic_sample_keys

    return TextSample(**basic_sample_keys(sample), text=picture(sample["jpg"]))


class Energon:
    """The tars themselves, with the index that `energon prepare` puts beside them."""

    package = "megatron-energon"

    def prepare(self, tars: Path) -> None:
        command = [Path(sys.executable).with_name("energon"), "prepare", "--non-interactive"]
        options = ["--no-progress", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
        subprocess.run([*command, *options, tars], check=True, stdout=subprocess.DEVNULL)

    def batches(self, tars: Path, task: str, workers: int) -> Iterator[int]:
        from megatron.energon import (
            Cooker,
            DefaultTaskEncoder,
            WorkerConfig,
            get_loader,
            get_train_dataset,
            stateless,
        )

        class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
            decoder = None
            cookers = [Cooker(stateless(cook_picture if task == "decode" else cook))]  # noqa: RUF012

        batch = BATCH if task == "decode" else None
        dataset = get_train_dataset(
            tars,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
            batch_size=batch,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            task_encoder=Encoder(),
        )
        for _ in get_loader(dataset):
            yield batch or 1


def processor_seconds() -> float:
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def measure(batches: Iterator[int], seconds: float, warm: int) -> dict[str, float]:
    """Samples per second and microseconds of processor time for each, after `warm` samples."""
    while warm > 0:
        warm -= next(batches)
    began, worked, count = time.perf_counter(), processor_seconds(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        target = count + BATCH  # not to look at the clock for each sample
        while count < target:
            count += next(batches)
    return {
        "samples": count / elapsed,
        "microseconds": (processor_seconds() - worked) / count * 1e6,
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    peer = {"mosaic": Mosaic, "energon": Energon}[sys.argv[1]]()
    folder = Path(sys.argv[2])
    # libraries print what they like; the answers go where standard output was
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from importlib.metadata import version

    print(json.dumps({"version": f"{peer.package} {version(peer.package)}"}), file=answers)
    answers.flush()
    for line in sys.stdin:
        task, name, seconds, workers = line.split()
        if task == "prepare":
            peer.prepare(folder / name)
            answer = {}
        else:
            batches = peer.batches(folder / name, task, int(workers))
            warm = 2 * BATCH if task == "decode" else 1024
            answer = measure(batches, float(seconds), warm)
            del batches
        print(json.dumps(answer), file=answers)
        answers.flush()


if __name__ == "__main__":
    main()
