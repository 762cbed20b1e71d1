"""What a recipe trains on: one data set, or a mixture of several, with their knowledge."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, TypeVar

from groundwork.data.cache import CacheConfig
from groundwork.data.dataset import Dataset, open_dataset
from groundwork.data.decode import JpegCrop
from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.mixture import Mixture, MixtureError
from groundwork.data.samples import Concept
from groundwork.data.stream import Decoder, Source, Stream
from groundwork.data.transforms import ImageTransform
from groundwork.kernels.jpeg_crop import find_jpeg_crop
from groundwork.kernels.member_reader import find_member_reader

T = TypeVar("T")

#: Class indices of a source lie below this; those of the next begin there.
LABELS_PER_SOURCE: Final = 2**40
#: Bytes before the header of a knowledge index.
PRELUDE_BYTES: Final = 24


@dataclass(frozen=True)
class SourceConfig:
    """One data set of a mixture.

    name: tells it apart, in metrics too; its order depends on it. weight: its share of the samples,
    in any unit. shuffle_block: as `data.shuffle_block`, which holds where it is null.
    """

    name: str
    shards: str
    split: str = "train"
    weight: float = 1.0
    shuffle_block: int | None = None


@dataclass(frozen=True)
class WeightChange:
    """Other weights, one for each source, from a sample of the run on."""

    from_sample: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class CacheSettings:
    """Where the blocks of remote files are kept, shared by all ranks of a node, and how many."""

    folder: str
    max_gb: float = 64.0

    def __post_init__(self) -> None:
        if not 0 < self.max_gb < 1e9:
            raise ValueError(f"data.cache.max_gb is {self.max_gb}; it must be above 0")

    def to_config(self) -> CacheConfig:
        return CacheConfig(self.folder, int(self.max_gb * 1e9))


@dataclass(frozen=True)
class DataConfig:
    """What every `data` section has.

    shards: a data set folder or URL, or a folder, pattern or URL of WebDataset tars.
    sources: several data sets instead, mixed by weight; weight_changes: their schedule. Exact in
        every prefix of the run. Classes of different sources are different classes.
    shuffle_block: samples shuffled together, in whole shards; null shuffles the whole data set,
        which reads from all shards at once. `groundwork shards order` shows what that means.
    cache: where blocks of remote files are kept on local disk.
    bad_sample_budget: fraction of the samples read that may be quarantined before the run stops.
    jpeg_decoder: `auto` compiles groundwork's decoder of JPEG crops where it can; `library` leaves
        all files to libjpeg-turbo. The pixels are the same, to the bit.
    workers: decoding processes per rank (0: decode in the rank itself). prefetch: batches that
        each of them decodes ahead.
    """

    shards: str | None = None
    split: str = "train"
    sources: tuple[SourceConfig, ...] = ()
    weight_changes: tuple[WeightChange, ...] = ()
    shuffle_block: int | None = None
    cache: CacheSettings | None = None
    image: ImageTransform = field(default_factory=ImageTransform)
    shuffle: bool = True
    bad_sample_budget: float = 0.001
    jpeg_decoder: Literal["auto", "library"] = "auto"
    workers: int = 2
    prefetch: int = 4

    @property
    def where(self) -> str:
        """The data sets, for messages."""
        return self.shards or ", ".join(source.shards for source in self.sources)

    def __post_init__(self) -> None:
        check_sources(self.shards, self.sources, self.weight_changes)
        check_block("data.shuffle_block", self.shuffle_block)
        if not 0 <= self.bad_sample_budget <= 1:
            raise ValueError(
                f"data.bad_sample_budget is {self.bad_sample_budget}; it is a fraction, 0 to 1"
            )
        if self.workers < 0:
            raise ValueError(
                f"data.workers is {self.workers}; it must be 0 (decode in the rank itself) or more"
            )
        if self.prefetch < (1 if self.workers else 0):
            raise ValueError(
                f"data.prefetch is {self.prefetch}; with {self.workers} workers it must be at "
                "least 1"
            )


@dataclass(frozen=True)
class TrainingData:
    """datasets: by name, in the order of the recipe; a single one has the name ""."""

    datasets: Mapping[str, Dataset]
    knowledge: KnowledgeIndex | None

    @cached_property
    def concepts(self) -> list[Concept]:
        return [concept for dataset in self.datasets.values() for concept in dataset.concepts]

    def digests(self) -> dict[str, str]:
        """What tells the content of the data apart, for `RunState`."""
        knowledge = ""
        if self.knowledge is not None:
            # holds the checksum of the header, which holds that of the rest
            with self.knowledge.path.open("rb") as file:
                knowledge = file.read(PRELUDE_BYTES).hex()
        parts = [[name, dataset.digest] for name, dataset in self.datasets.items()]
        single = self.datasets.get("")
        return {
            "dataset": _sha256(parts) if single is None else single.digest,
            "concepts": _sha256([asdict(concept) for concept in self.concepts]),
            "knowledge": knowledge,
        }


def _sha256(record: object) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def check_sources(
    shards: str | None, sources: tuple[SourceConfig, ...], changes: tuple[WeightChange, ...]
) -> None:
    """Raises ValueError where a `data` section names no data set, or no mixture."""
    if shards is None and not sources:
        raise ValueError(
            "data.shards is missing; name a data set, or several of them in data.sources"
        )
    if shards is not None and sources:
        raise ValueError("data.shards and data.sources are both given; leave one of them out")
    names = [source.name for source in sources]
    if len(set(names)) != len(names) or "" in names:
        raise ValueError(f"data.sources have the names {names}; each must be its own")
    if sources or changes:
        make_mixture(sources, changes)
    for source in sources:
        check_block("data.sources.shuffle_block", source.shuffle_block)


def check_block(key: str, block: int | None) -> None:
    if block is not None and block < 1:
        raise ValueError(f"{key} is {block}; it is a number of samples, or null for all")


def make_mixture(
    sources: tuple[SourceConfig, ...], changes: tuple[WeightChange, ...]
) -> Mixture | None:
    """None for a single data set. Raises ValueError naming the key at fault."""
    if not sources:
        if changes:
            raise ValueError("data.weight_changes are of data.sources, and there are none")
        return None
    schedule = {0: tuple(source.weight for source in sources)}
    for change in changes:
        if change.from_sample < 1 or change.from_sample in schedule:
            raise ValueError(
                f"data.weight_changes: from_sample {change.from_sample} must be above 0 and come "
                "once; the weights at 0 are those of data.sources"
            )
        if len(change.weights) != len(sources):
            raise ValueError(
                f"data.weight_changes: {len(change.weights)} weights from sample "
                f"{change.from_sample} on for {len(sources)} sources"
            )
        schedule[change.from_sample] = change.weights
    try:
        return Mixture(schedule)
    except MixtureError as error:
        raise ValueError(f"data.sources: {error}") from error


def open_datasets(config: DataConfig) -> dict[str, Dataset]:
    """Open what the section names; every missing or damaged file is found here."""
    cache = None if config.cache is None else config.cache.to_config()
    reader = find_member_reader()  # compiled here, before workers are forked
    if config.shards is not None:
        return {"": open_dataset(config.shards, config.split, cache=cache, reader=reader)}
    return {
        source.name: open_dataset(source.shards, source.split, cache=cache, reader=reader)
        for source in config.sources
    }


def make_stream(
    config: DataConfig,
    data: TrainingData,
    seed: int,
    decoder: Callable[[Dataset, int, JpegCrop | None], Decoder[T]],
) -> Stream[T]:
    """The training stream of a section.

    decoder: (data set, what is added to its class indices, decoder of JPEG crops) -> the decoder of
    its samples.
    """
    # found once, before the workers are forked
    jpeg_crop = find_jpeg_crop() if config.jpeg_decoder == "auto" else None
    blocks = {source.name: source.shuffle_block for source in config.sources}
    sources = [
        Source(
            dataset,
            decoder(dataset, number * LABELS_PER_SOURCE, jpeg_crop),
            name,
            blocks.get(name) or config.shuffle_block,
        )
        for number, (name, dataset) in enumerate(data.datasets.items())
    ]
    mixture = make_mixture(config.sources, config.weight_changes)
    return Stream(sources, seed=seed, shuffle=config.shuffle, mixture=mixture)


def open_knowledge_index(path: str | None) -> KnowledgeIndex | None:
    return None if path is None else KnowledgeIndex(Path(path))
