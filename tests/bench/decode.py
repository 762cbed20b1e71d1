"""Decoding and cropping against webdataset: `python tests/bench/decode.py [--json FILE] [--quick]`.

Both sides read the same tars of JPEGs, take a random resized crop of 224 pixels (bilinear, scale
0.08 to 1, the defaults of torchvision) and give batches of 64 uint8 pictures to the process that
trains. The peer does it as webdataset's documentation shows: `decode("pil")`, torchvision's
RandomResizedCrop, `batched`, two worker processes. Rounds alternate between the sides; the ratio is
taken within a round. Processor time per picture, of all processes of a side, tells the same on a
machine that has other work to do. The first table has the single steps, per picture, on one core.
"""

import argparse
import io
import json
import math
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import psutil
import simplejpeg
import torch
import torchvision
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2

from groundwork.data.dataset import Dataset, open_dataset
from groundwork.data.transforms import (
    ImageTransform,
    evaluation_image,
    random_crop_box,
    training_image,
    training_images,
)
from groundwork.kernels.jpeg_crop import find_jpeg_crop

SIZES = ((480, 360), (1024, 768))
BATCH = 64
WORKERS = 2
TRANSFORM = ImageTransform(size=224, scale=(0.08, 1.0), resample="bilinear")


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG with the spectrum of a photograph (noise of all octaves) and some edges."""
    rng = np.random.default_rng(seed)
    pixels, side = np.zeros((height, width, 3), np.float32), 4
    while side < 2 * max(width, height):
        scale = side / max(width, height)
        shape = (max(2, round(height * scale)), max(2, round(width * scale)))
        gray, colour = rng.standard_normal(shape), rng.standard_normal((*shape, 3))
        octave = (gray[..., None] + 0.3 * colour).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(octave[..., channel]).resize((width, height))
            pixels[..., channel] += np.asarray(plane) * side**-0.4
        side *= 2
    pixels *= 50 / pixels.std()
    for _ in range(8):
        left, top = int(rng.integers(width - 40)), int(rng.integers(height - 40))
        pixels[top : top + 40, left : left + 40] += rng.normal(0, 40, 3).astype(np.float32)
    file = io.BytesIO()
    image = Image.fromarray(np.clip(pixels + 120, 0, 255).astype(np.uint8))
    image.save(file, "JPEG", quality=88)
    return file.getvalue()


def milliseconds(step: Callable[[bytes], object], files: Sequence[bytes], seconds: float) -> float:
    """Processor time per picture in the best of repeated rounds: other work only ever adds."""
    step(files[0])
    best, end = math.inf, time.monotonic() + seconds
    while True:
        began = time.process_time()
        for file in files:
            step(file)
        best = min(best, time.process_time() - began)
        if time.monotonic() > end:
            return best / len(files) * 1e3


def steps(width: int, height: int, files: Sequence[bytes]) -> dict[str, Callable[[bytes], object]]:
    """Routes to a whole picture, to a half one, to 224 pixels, and all of it together."""
    rng = np.random.default_rng(0)
    image = Image.open(io.BytesIO(files[0])).convert("RGB")
    box = random_crop_box(width, height, TRANSFORM, np.random.default_rng(1))
    crop = image.crop(box)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).unsqueeze(0)
    whole = RandomResizedCrop(224)
    half = {"min_height": height // 2, "min_width": width // 2}

    def pillow_at(scale: int, data: bytes) -> None:
        opened = Image.open(io.BytesIO(data))
        opened.draft("RGB", (width // scale, height // scale))
        opened.load()

    resized = (224, 224)
    of_crop = f"{crop.width} x {crop.height} -> 224"
    return {
        "header: Pillow": lambda data: Image.open(io.BytesIO(data)),
        "decode: Pillow": lambda data: pillow_at(1, data),
        "decode: torchvision": lambda data: torchvision.io.decode_jpeg(
            torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        ),
        "decode: simplejpeg": simplejpeg.decode_jpeg,
        "decode at 1/2: Pillow": lambda data: pillow_at(2, data),
        "decode at 1/2: simplejpeg": lambda data: simplejpeg.decode_jpeg(data, **half),
        f"resize {of_crop}: Pillow": lambda _: crop.resize(resized, Image.Resampling.BILINEAR),
        f"resize {of_crop}: torch": lambda _: interpolate(
            pixels, resized, mode="bilinear", antialias=True
        ),
        "all: Pillow, torchvision": lambda data: v2.functional.pil_to_tensor(
            whole(Image.open(io.BytesIO(data)).convert("RGB"))
        ),
        "all: groundwork, libraries": lambda data: training_image(data, TRANSFORM, rng),
        "all: groundwork, compiled": lambda data: training_image(
            data, TRANSFORM, rng, jpeg_crop=find_jpeg_crop()
        ),
    }


def write_tars(folder: Path, files: Sequence[bytes], tars: int, samples: int) -> list[str]:
    """`tars` tars of `samples` pictures each, the same few over and over."""
    names = []
    for number in range(tars):
        names.append(str(folder / f"{number:03d}.tar"))
        with webdataset.TarWriter(names[-1]) as tar:
            for i in range(samples):
                jpg = files[(number * samples + i) % len(files)]
                tar.write({"__key__": f"{number:03d}{i:06d}", "jpg": jpg, "txt": "a photo"})
    return names


def webdataset_batches(tars: Sequence[str]) -> Iterator[Tensor]:
    crop = v2.Compose(
        [RandomResizedCrop(224, interpolation=InterpolationMode.BILINEAR), v2.PILToTensor()]
    )
    stream = (
        webdataset.WebDataset(list(tars), shardshuffle=False)
        .repeat()
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(crop, str)
        .batched(BATCH)
    )
    loader = webdataset.WebLoader(stream, batch_size=None, num_workers=WORKERS, prefetch_factor=2)
    for images, _ in loader:
        yield images


class Batches(torch.utils.data.Dataset[Tensor]):
    """Batch i, endlessly: read by index, checked against its checksum, decoded into one tensor."""

    def __init__(self, dataset: Dataset, threads: int = 1) -> None:
        self.dataset = dataset
        self.threads = threads
        self.jpeg_crop = find_jpeg_crop()

    def __getitem__(self, i: int) -> Tensor:
        rows = [(i * BATCH + j) % len(self.dataset) for j in range(BATCH)]
        files = [self.dataset.read(row).image for row in rows]
        rngs = [np.random.default_rng((i, row)) for row in rows]
        images, errors = training_images(
            files, TRANSFORM, rngs, threads=self.threads, jpeg_crop=self.jpeg_crop
        )
        assert not any(errors)
        return images


def worker_batches(tars: Sequence[str]) -> Iterator[Tensor]:
    batches = Batches(open_dataset(str(Path(tars[0]).parent)))
    yield from DataLoader(
        batches, sampler=range(10**6), batch_size=None, num_workers=WORKERS, prefetch_factor=2
    )


def thread_batches(tars: Sequence[str]) -> Iterator[Tensor]:
    batches = Batches(open_dataset(str(Path(tars[0]).parent)), threads=WORKERS)
    yield from (batches[i] for i in range(10**6))


SIDES: dict[str, Callable[[Sequence[str]], Iterator[Tensor]]] = {
    "webdataset, 2 workers": webdataset_batches,
    "groundwork, 2 workers": worker_batches,
    "groundwork, 2 threads": thread_batches,
}


class Speed(NamedTuple):
    """pictures per second; milliseconds: processor time of all processes, per picture."""

    pictures: float
    milliseconds: float


def processor_seconds() -> float:
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def speed(batches: Iterator[Tensor], seconds: float) -> Speed:
    """In the steady state: the stream goes on before and after what is timed."""
    for _ in range(3 * WORKERS):  # what the workers have ready
        assert next(batches).shape == (BATCH, 3, 224, 224)
    began, worked, count = time.perf_counter(), processor_seconds(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        next(batches)
        count += BATCH
    return Speed(count / elapsed, (processor_seconds() - worked) / count * 1e3)


def assert_close(files: Sequence[bytes]) -> float:
    """The tensors show what a full decode shows; the largest mean error of a picture in levels."""
    whole = ImageTransform(size=224, scale=(1.0, 1.0), ratio=(1.0, 1.0), resample="bilinear")
    errors = []
    for file in files:
        seen = training_image(file, whole, np.random.default_rng(0))
        errors.append(float((seen.float() - evaluation_image(file, whole).float()).abs().mean()))
    assert max(errors) < 2.5, f"the mean error is {max(errors):.2f} levels"
    return max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    arguments = parser.parse_args()
    rounds, seconds = (2, 1.5) if arguments.quick else (7, 5.0)
    warnings.filterwarnings("ignore", module="webdataset")
    torch.set_num_threads(1)
    console = Console()
    report: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,
        "webdataset": webdataset.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "sizes": {},
    }
    for width, height in SIZES:
        files = [photograph(width, height, seed) for seed in range(8 if arguments.quick else 32)]
        bits = statistics.mean(map(len, files)) * 8 / width / height
        error = assert_close(files)
        table = Table("ms per picture, 1 core", f"{width} x {height}, {bits:.1f} bits per pixel")
        times = {}
        for name, step in steps(width, height, files).items():
            times[name] = milliseconds(step, files, seconds / 5)
            table.add_row(name, f"{times[name]:.3f}")
        console.print(table)
        speeds: dict[str, list[Speed]] = {name: [] for name in SIDES}
        with tempfile.TemporaryDirectory() as folder:
            tars = write_tars(Path(folder), files, tars=2 * WORKERS, samples=2 * BATCH)
            for _ in range(rounds):
                for name, side in SIDES.items():
                    batches = side(tars)
                    speeds[name].append(speed(batches, seconds))
                    del batches
        peer, *_ = speeds.values()
        table = Table("", "pictures/s", "ratio", "lowest", "highest", "CPU ms", "ratio")
        table.columns[0].no_wrap = True
        ratios = {}
        for name, values in speeds.items():
            pairs = list(zip(values, peer, strict=True))
            wall = [ours.pictures / theirs.pictures for ours, theirs in pairs]
            work = [theirs.milliseconds / ours.milliseconds for ours, theirs in pairs]
            ratios[name] = {"wall": statistics.median(wall), "work": statistics.median(work)}
            pictures = statistics.median(one.pictures for one in values)
            each = statistics.median(one.milliseconds for one in values)
            numbers = (ratios[name]["wall"], min(wall), max(wall), each, ratios[name]["work"])
            table.add_row(name, f"{pictures:,.0f}", *(f"{number:.2f}" for number in numbers))
        console.print(table)
        report["sizes"][f"{width}x{height}"] = {
            "bits_per_pixel": bits,
            "mean_error_levels": error,
            "milliseconds": times,
            "speeds": {name: [one._asdict() for one in values] for name, values in speeds.items()},
            "ratios": ratios,
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    summary = "; ".join(
        f"{size}: "
        + ", ".join(
            f"{name} {ratio['wall']:.2f}x ({ratio['work']:.2f}x by processor time)"
            for name, ratio in list(entry["ratios"].items())[1:]
        )
        for size, entry in report["sizes"].items()
    )
    console.print(f"against webdataset with 2 workers — {summary}", soft_wrap=True)


if __name__ == "__main__":
    main()
