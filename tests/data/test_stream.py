import io
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from groundwork.data.batch_plan import BatchPlan
from groundwork.data.dataset import Dataset, open_dataset
from groundwork.data.mixture import Mixture
from groundwork.data.order import GlobalOrder
from groundwork.data.samples import Sample, SampleError
from groundwork.data.shards import write_shards
from groundwork.data.stream import (
    MAX_ATTEMPTS,
    Fault,
    Source,
    Stream,
    StreamBatch,
    UnreadableDataError,
)
from groundwork.data.transforms import ImageTransform, training_image

SAMPLES = 22  # no multiple of any batch, so epochs end inside of batches
GLOBAL_BATCH, MICRO_BATCH, STEPS = 8, 2, 6
TRANSFORM = ImageTransform(size=4, scale=(0.3, 1.0), flip=0.5, brightness=0.4, saturation=0.3)


class Example(NamedTuple):
    """key, the augmented pixels as bytes, and the process that decoded them."""

    key: str
    pixels: bytes
    process: int


def decode(sample: Sample, rng: np.random.Generator) -> Example:
    pixels = training_image(sample.image, TRANSFORM, rng)
    return Example(sample.key, pixels.numpy().tobytes(), os.getpid())


def dataset_of(stream: Stream[Example]) -> Dataset:
    return stream.sources[0].dataset


def as_list(examples: list[Example]) -> list[Example]:
    return examples


def build(folder: Path, spoil: Callable[[int, bytes], bytes] = lambda _, image: image) -> Dataset:
    def samples() -> Iterator[tuple[str, Sample]]:
        rng = np.random.default_rng(0)
        for i in range(SAMPLES):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).save(buffer, "PNG")
            yield "train", Sample(f"k{i:02d}", spoil(i, buffer.getvalue()), "png", "")

    write_shards(samples(), folder, name="n", source={}, licence="l", max_samples=5)
    return open_dataset(str(folder))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Stream[Example]:
    return Stream([Source(build(tmp_path_factory.mktemp("good") / "o"), decode)], seed=3)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Stream[Example]:
    """A third of the samples are bad: web pages for pictures, and a member of flipped bits."""
    folder = tmp_path_factory.mktemp("spoilt") / "o"
    dataset = build(folder, lambda i, image: b"<html>403</html>" if i % 4 == 0 else image)
    image = dataset.read(7).image
    tar = Path(dataset.where(7)[0])
    tar.write_bytes(tar.read_bytes().replace(image, image[:-5] + b"?" + image[-4:]))
    return Stream([Source(dataset, decode)], seed=3)


def run(
    stream: Stream[Example], world_size: int, workers: int, first_step: int = 0
) -> tuple[list[tuple[str, bytes]], list[Fault]]:
    """The global sequence put together from all ranks, and all faults in order of position."""
    ranks = []
    for rank in range(world_size):
        plan = BatchPlan(GLOBAL_BATCH, MICRO_BATCH, world_size, rank)
        batches = stream.batches(
            plan, as_list, first_step=first_step, last_step=STEPS, workers=workers
        )
        ranks.append(list(batches))
    assert {len(batches) for batches in ranks} == {
        (STEPS - first_step) * GLOBAL_BATCH // MICRO_BATCH // world_size
    }
    in_turn = [batch for micro_step in zip(*ranks, strict=True) for batch in micro_step]
    sequence = [(e.key, e.pixels) for batch in in_turn for e in batch.data]
    faults = [fault for batch in in_turn for fault in batch.faults]
    return sequence, sorted(faults, key=lambda fault: fault.position)


TOPOLOGIES = [(ranks, workers) for ranks in (1, 2, 4) for workers in (0, 1, 2)]


@pytest.mark.parametrize(("world_size", "workers"), TOPOLOGIES)
def test_the_global_sequence_does_not_depend_on_ranks_and_workers(
    world_size: int, workers: int, good: Stream[Example]
) -> None:
    sequence, faults = run(good, world_size, workers)
    order = GlobalOrder(SAMPLES, seed=3).indices(np.arange(STEPS * GLOBAL_BATCH))
    assert [key for key, _ in sequence] == [f"k{i:02d}" for i in order]
    assert sequence == run(good, 1, 0)[0]
    assert faults == []


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (4, 1)])
def test_starting_at_a_step_equals_skipping_to_it(
    world_size: int, workers: int, good: Stream[Example], spoilt: Stream[Example]
) -> None:
    for stream in (good, spoilt):
        sequence, faults = run(stream, 1, 0)
        for step in (1, 4, STEPS):
            resumed, later = run(stream, world_size, workers, first_step=step)
            assert resumed == sequence[step * GLOBAL_BATCH :]
            assert later == [f for f in faults if f.position >= step * GLOBAL_BATCH]


def test_every_sample_comes_once_per_epoch(good: Stream[Example]) -> None:
    keys = [key for key, _ in run(good, 2, 0)[0]]
    everything = sorted(f"k{i:02d}" for i in range(SAMPLES))
    first, second = keys[:SAMPLES], keys[SAMPLES : 2 * SAMPLES]
    assert sorted(first) == sorted(second) == everything
    assert first != second


def test_a_sample_is_augmented_anew_in_each_epoch(good: Stream[Example]) -> None:
    sequence, _ = run(good, 1, 0)
    first, second = dict(sequence[:SAMPLES]), dict(sequence[SAMPLES : 2 * SAMPLES])
    assert all(first[key] != second[key] for key in first)


def test_another_seed_gives_another_stream(good: Stream[Example]) -> None:
    assert run(Stream([Source(dataset_of(good), decode)], seed=4), 1, 0) != run(good, 1, 0)


@pytest.mark.parametrize(("world_size", "workers"), TOPOLOGIES)
def test_bad_samples_have_the_same_stand_ins_on_every_topology(
    world_size: int, workers: int, spoilt: Stream[Example]
) -> None:
    sequence, faults = run(spoilt, world_size, workers)
    assert (sequence, faults) == run(spoilt, 1, 0)


def test_bad_samples_are_reported_with_place_and_reason(
    spoilt: Stream[Example], good: Stream[Example]
) -> None:
    sequence, faults = run(spoilt, 1, 0)
    bad = {f"k{i:02d}" for i in range(0, SAMPLES, 4)} | {"k07"}
    assert not bad & {key for key, _ in sequence}
    clean, _ = run(good, 1, 0)
    own = {position: key for position, (key, _) in enumerate(clean) if key in bad}
    first_faults: dict[int, str] = {}
    for fault in faults:
        first_faults.setdefault(fault.position, fault.key)
        shard = int(fault.key[1:]) // 5
        assert fault.shard == dataset_of(spoilt).where(5 * shard)[0]
        expected = "fails its checksum" if fault.key == "k07" else "cannot be decoded"
        assert expected in fault.reason
    assert first_faults == own
    # what is good stays where it was
    assert [s for p, s in enumerate(sequence) if p not in own] == [
        s for p, s in enumerate(clean) if p not in own
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_without_a_usable_sample_ends_the_stream(workers: int, tmp_path: Path) -> None:
    stream = Stream([Source(build(tmp_path / "o", lambda i, image: b"<html>"), decode)], seed=0)
    batches = stream.batches(
        BatchPlan(2, 2, 1, 0), as_list, first_step=0, last_step=1, workers=workers
    )
    with pytest.raises(UnreadableDataError) as caught:
        next(batches)
    assert f"{MAX_ATTEMPTS} samples in a row could not be used at position 0" in str(caught.value)
    assert "train-00000" in str(caught.value)
    assert "cannot be decoded" in str(caught.value)


def test_a_defect_of_the_decoder_is_no_bad_sample(good: Stream[Example]) -> None:
    def broken(sample: Sample, rng: np.random.Generator) -> Example:
        raise KeyError("a bug")

    stream = Stream([Source(dataset_of(good), broken)], seed=0)
    with pytest.raises(KeyError, match="a bug"):
        next(stream.batches(BatchPlan(2, 2, 1, 0), as_list, first_step=0, last_step=1))


def test_workers_outlive_the_signals_that_ask_a_job_to_stop(good: Stream[Example]) -> None:
    """They reach the whole process group, and the rank still wants to finish its step."""
    plan = BatchPlan(GLOBAL_BATCH, MICRO_BATCH, 1, 0)
    batches = good.batches(plan, as_list, first_step=0, last_step=STEPS, workers=1, prefetch=1)
    received = [next(batches)]
    worker = received[0].data[0].process
    assert worker != os.getpid()
    for number in (signal.SIGINT, signal.SIGTERM):
        # from another process, as the scheduler's
        subprocess.run(["kill", f"-{number}", str(worker)], check=True)
    received += batches
    sequence = [(e.key, e.pixels) for batch in received for e in batch.data]
    assert sequence == run(good, 1, 0)[0]
    assert {e.process for batch in received for e in batch.data} == {worker}


def leave_with_batches_to_come(stream: Stream[Example]) -> None:
    plan = BatchPlan(GLOBAL_BATCH, MICRO_BATCH, 1, 0)
    batches = stream.batches(plan, as_list, first_step=0, last_step=1000, workers=2)
    next(batches)
    HELD.append(batches)  # as the traceback of an error does


HELD: list[object] = []


def test_a_rank_that_leaves_early_takes_its_workers_along(good: Stream[Example]) -> None:
    rank = multiprocessing.get_context("fork").Process(
        target=leave_with_batches_to_come, args=(good,)
    )
    rank.start()
    rank.join(30)
    ended = rank.exitcode
    for child in psutil.Process(rank.pid).children() if ended is None else ():
        child.kill()
    rank.kill()
    assert ended == 0


def test_the_tensors_of_a_batch_are_pinned_when_asked() -> None:
    class Pinnable(torch.Tensor):
        def pin_memory(self, device: object = None) -> str:  # type: ignore[override]
            return "pinned"

    fault = Fault(1, "shard", "key", "reason")
    batch = StreamBatch({"image": torch.zeros(2).as_subclass(Pinnable)}, (fault,))
    # what DataLoader's pinning thread does with each batch
    assert pin_memory(batch) == StreamBatch({"image": "pinned"}, (fault,))


def test_sample_errors_of_the_decoder_are_quarantined(good: Stream[Example]) -> None:
    def picky(sample: Sample, rng: np.random.Generator) -> Example:
        if sample.key == "k03":
            raise SampleError("no caption")
        return decode(sample, rng)

    _, faults = run(Stream([Source(dataset_of(good), picky)], seed=3), 1, 0)
    assert {(fault.key, fault.reason) for fault in faults} == {("k03", "no caption")}


GRID = [(ranks, workers) for ranks in (1, 2, 3, 5, 8) for workers in (0, 1, 2, 4)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Stream[Example]:
    """Two data sets at 0.7 and 0.3, then at 0.5 and 0.5; one of them in blocks; some bad."""
    folder = tmp_path_factory.mktemp("mixed")
    a = build(folder / "a")
    b = build(folder / "b", lambda i, image: b"<html>" if i % 9 == 0 else image)
    sources = [Source(a, decode, "a"), Source(b, decode, "b", block=8)]
    return Stream(sources, seed=5, mixture=Mixture({0: [0.7, 0.3], 30: [0.5, 0.5]}))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("ranks", "workers"), GRID)
def test_a_mixture_is_read_alike_by_any_ranks_and_workers(
    ranks: int, workers: int, mixed: Stream[Example]
) -> None:
    """13 samples a step divide by none of the numbers of ranks but one."""
    global_batch, steps = 13, 5
    expected, faults = mixed.__getitems__(list(range(steps * global_batch)))
    plans = [BatchPlan(global_batch, 2, ranks, rank) for rank in range(ranks)]
    read = [
        list(mixed.batches(plan, as_list, first_step=0, last_step=steps, workers=workers))
        for plan in plans
    ]
    in_turn = [batch for micro_step in zip(*read, strict=True) for batch in micro_step]
    assert [(e.key, e.pixels) for batch in in_turn for e in batch.data] == [
        (e.key, e.pixels) for e in expected
    ]
    assert [fault for batch in in_turn for fault in batch.faults] == list(faults)
    assert faults


def test_each_source_of_a_mixture_comes_once_per_epoch(mixed: Stream[Example]) -> None:
    places = mixed.locate(range(200))
    for number in range(2):
        indices = [index for source, index in places if source == number]
        for epoch in range(len(indices) // SAMPLES):
            assert sorted(indices[epoch * SAMPLES :][:SAMPLES]) == list(range(SAMPLES))
    assert mixed.epochs(200) == {
        name: sum(source == number for source, _ in places) / SAMPLES
        for number, name in enumerate("ab")
    }


def test_sources_and_mixture_belong_together(good: Stream[Example]) -> None:
    source = good.sources[0]
    with pytest.raises(ValueError, match="2 sources, but the mixture is of 1"):
        Stream([source, Source(source.dataset, decode, "b")], seed=0)
    with pytest.raises(ValueError, match="each must be its own"):
        Stream([source, source], seed=0, mixture=Mixture([1, 1]))
