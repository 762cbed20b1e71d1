"""Ways of reading and decoding one folder of tars, for `data.py`: ours and webdataset's.

Each yields the number of samples that it has just given to the process that trains.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import webdataset
from decode import BATCH, TRANSFORM
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from groundwork.data.batch_plan import BatchPlan
from groundwork.data.dataset import Dataset, open_dataset
from groundwork.data.decode import JpegCrop
from groundwork.data.order import BlockOrder, GlobalOrder, Order
from groundwork.data.raw_batch import RawBatch
from groundwork.data.samples import Sample
from groundwork.data.stream import Source, Stream
from groundwork.data.transforms import training_image
from groundwork.kernels.jpeg_crop import find_jpeg_crop
from groundwork.kernels.member_reader import find_member_reader

#: Samples that are asked for at once where nothing is decoded.
READ_BATCH = 256
#: Of a shuffled order: samples that are shuffled together.
BLOCK = 2048


def opened(folder: Path) -> Dataset:
    reader = find_member_reader()
    assert reader is not None, "no compiler: what would be timed is not what is claimed"
    return open_dataset(str(folder), reader=reader)


def order_of(dataset: Dataset, shuffle: str) -> Order:
    """`block` as in training, `global` over everything, or `none`."""
    if shuffle == "block":
        return BlockOrder(dataset.shard_sizes, 0, BLOCK)
    return GlobalOrder(len(dataset), 0, shuffle == "global")


# ---- reading without decoding ----


def webdataset_samples(folder: Path) -> Iterator[int]:
    """As dicts of bytes, not shuffled, which is how it is fastest."""
    tars = sorted(map(str, folder.glob("*.tar")))
    for _ in webdataset.WebDataset(tars, shardshuffle=False).repeat():
        yield 1


def webdataset_workers(folder: Path, workers: int) -> Iterator[int]:
    tars = sorted(map(str, folder.glob("*.tar")))
    stream = webdataset.WebDataset(tars, shardshuffle=False).repeat()
    batches = stream.batched(READ_BATCH, collation_fn=None)
    for batch in webdataset.WebLoader(batches, batch_size=None, num_workers=workers):
        yield len(batch)


class RawBatches(torch.utils.data.Dataset[RawBatch]):
    """Batch i of an order, endlessly."""

    def __init__(self, dataset: Dataset, order: Order) -> None:
        self.dataset, self.order = dataset, order

    def indices(self, i: int) -> NDArray[np.int64]:
        return self.order.indices(np.arange(i * READ_BATCH, (i + 1) * READ_BATCH))

    def __getitem__(self, i: int) -> RawBatch:
        batch = self.dataset.read_batch(self.indices(i))  # type: ignore[arg-type]
        assert not batch.errors
        return batch


def our_batches(folder: Path, shuffle: str) -> Iterator[int]:
    """Verified, in one buffer for a batch."""
    dataset = opened(folder)
    batches = RawBatches(dataset, order_of(dataset, shuffle))
    for i in range(10**9):
        yield len(batches[i])


def our_dicts(folder: Path, shuffle: str) -> Iterator[int]:
    """Verified, as dicts of bytes, which is what the peers give."""
    dataset = opened(folder)
    batches = RawBatches(dataset, order_of(dataset, shuffle))
    for i in range(10**9):
        yield len(dataset.read_fields(batches.indices(i)))  # type: ignore[arg-type]


def our_workers(folder: Path, shuffle: str, workers: int) -> Iterator[int]:
    dataset = opened(folder)
    batches = RawBatches(dataset, order_of(dataset, shuffle))
    for batch in DataLoader(
        batches, sampler=range(10**9), batch_size=None, num_workers=workers, prefetch_factor=4
    ):
        yield len(batch)


# ---- decoding ----


class Captioned:
    """Sample -> random crop and caption, as the decoders of the objectives do it."""

    def __init__(self, jpeg_crop: JpegCrop | None) -> None:
        self.jpeg_crop = jpeg_crop

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, str]:
        image = training_image(sample.image, TRANSFORM, rng, jpeg_crop=self.jpeg_crop)
        return image, sample.text


def collate(examples: Sequence[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    return torch.stack([image for image, _ in examples]), [text for _, text in examples]


def pictures_in(batch: Tensor) -> int:
    assert batch.shape == (BATCH, 3, TRANSFORM.size, TRANSFORM.size)
    assert batch.dtype == torch.uint8
    return len(batch)


def our_stream(folder: Path, workers: int) -> Iterator[Tensor]:
    """The stream that training reads: global shuffle, replacements, exact state, workers."""
    jpeg_crop = find_jpeg_crop()
    assert jpeg_crop is not None
    stream = Stream([Source(opened(folder), Captioned(jpeg_crop))], seed=0)
    plan = BatchPlan(BATCH, BATCH, world_size=1, rank=0)
    for batch in stream.batches(
        plan, collate, first_step=0, last_step=10**9, workers=workers, prefetch=2
    ):
        assert not batch.faults
        yield batch.data[0]
