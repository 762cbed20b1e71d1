"""The data set behind the page: its splits, opened on demand, read by several threads."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from groundwork.data.browse.training_order import (
    Check,
    Order,
    Placed,
    check_sample,
    global_order,
    placed,
)
from groundwork.data.dataset import Dataset, open_dataset
from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.samples import Concept, Sample, SampleError
from groundwork.data.shard_index import ShardError
from groundwork.data.shards import MANIFEST, Manifest, parse_manifest, read_manifest
from groundwork.data.storage import is_remote, open_storage
from groundwork.data.storage_errors import MissingFileError, redact

#: The split of tars without a manifest.
ONLY_SPLIT = "all"
#: Samples kept after reading, since a page asks for a sample several times, and their bytes in all.
KEPT_SAMPLES = 64
KEPT_BYTES = 128 * 1024**2


class Split:
    """One split: samples by number, in file order, and by position, in the order of training.

    check: what tells a bad sample in the order of training.
    """

    def __init__(self, dataset: Dataset, seed: int, *, order: Order, check: Check) -> None:
        self.dataset = dataset
        self.seed = seed
        self.order = order
        self.check = check
        self.concepts: Mapping[int, Concept] = {c.label: c for c in dataset.concepts}
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Sample] = OrderedDict()
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, number: int) -> Sample:
        """Raises SampleError for a bad sample, IndexError outside 0..len-1."""
        # a Dataset shuffles open files among its reads, so it is one thread's at a time
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            sample = self.dataset.read(number)
            self._keep(number, sample)
            return sample

    def _keep(self, number: int, sample: Sample) -> None:
        self._kept[number] = sample
        self._kept_bytes += _size(sample)
        while len(self._kept) > KEPT_SAMPLES or self._kept_bytes > KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= _size(oldest)

    def where(self, number: int) -> tuple[str, str]:
        """(file name of the shard, key)."""
        shard, key = self.dataset.where(number)
        return shard.rpartition("/")[2], key

    def diagnosis(self, number: int) -> str | None:
        """What is wrong with a sample, or None. The image is decoded as a whole."""
        try:
            check_sample(self.read(number), 0)
            if self.check is not check_sample:
                self.check(self.read(number), 0)
        except SampleError as error:
            return str(error)
        return None

    def at(self, position: int) -> Placed:
        """What training sees at a position, bad samples replaced."""
        return placed(
            position,
            self.order,
            len(self),
            self.seed,
            read=self.read,
            check=self.check,
        )


class Collection:
    """A data set to look at.

    directory: as for `open_dataset`. seed, shuffle: of the order of training. order, check: those
        of the split `trained`, where a run has others than `GlobalOrder` and decoding the image.
    global_batch: samples of a training step, or 0. step: the one to show first (from 1), or 0.
    Raises ShardError where there is nothing to open.
    """

    def __init__(
        self,
        directory: str,
        *,
        trained: str | None = None,
        seed: int = 0,
        shuffle: bool = True,
        order: Order | None = None,
        check: Check = check_sample,
        global_batch: int = 0,
        step: int = 0,
        knowledge: KnowledgeIndex | None = None,
    ) -> None:
        self.directory = directory
        self.seed = seed
        self.shuffle = shuffle
        self.order = order
        self.check = check
        self.global_batch = global_batch
        self.step = step
        self.knowledge = knowledge
        self.sizes: dict[str, int] = {}
        self.name, self.licence = redact(directory).rstrip("/").rpartition("/")[2], ""
        manifest = _manifest(directory)
        if manifest is not None:
            self.name, self.licence = manifest.name, manifest.licence
            self.sizes = {name: manifest.samples(name) for name in manifest.splits}
            first = "train" if "train" in self.sizes else min(self.sizes, default="")
        else:
            first = ONLY_SPLIT
        self._splits: dict[str, Split] = {}
        self._lock = threading.Lock()
        self.trained = trained if trained in self.sizes else first
        if trained and self.sizes and trained not in self.sizes:
            raise ShardError(
                f"{directory}: no split {trained!r}; it has {', '.join(sorted(self.sizes))}"
            )
        self.sizes.setdefault(self.trained, 0)
        self.sizes[self.trained] = len(self.split(self.trained))

    def split(self, name: str) -> Split:
        """A split, opened at its first use. Raises KeyError for a name that is none."""
        if name not in self.sizes:
            raise KeyError(name)
        with self._lock:
            if name not in self._splits:
                dataset = open_dataset(self.directory, name)
                order = global_order(len(dataset), self.seed, shuffle=self.shuffle)
                is_trained = name == self.trained
                self._splits[name] = Split(
                    dataset,
                    self.seed,
                    order=self.order if is_trained and self.order is not None else order,
                    check=self.check if is_trained else check_sample,
                )
            return self._splits[name]

    def version(self) -> str:
        """Tells data sets apart in addresses, so that no browser shows pictures of another one."""
        return self.split(self.trained).dataset.digest[:16]


def _manifest(directory: str) -> Manifest | None:
    """What a data set says of itself; None for plain tars."""
    if not is_remote(directory):
        is_described = (Path(directory) / MANIFEST).is_file()
        return read_manifest(Path(directory)) if is_described else None
    storage = open_storage(directory)
    try:
        return parse_manifest(storage.whole(MANIFEST), storage.where(MANIFEST))
    except MissingFileError:
        return None


def _size(sample: Sample) -> int:
    return len(sample.image) + sum(map(len, sample.members.values()))
