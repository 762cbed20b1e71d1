"""What a recipe trains on: one data set, or a mixture of several, with their knowledge."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from groundwork.data.cache import CacheConfig
from groundwork.data.dataset import Dataset, open_dataset
from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.mixture import Mixture, MixtureError
from groundwork.data.samples import Concept
from groundwork.kernels.member_reader import find_member_reader

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


def open_datasets(
    shards: str | None,
    split: str,
    sources: tuple[SourceConfig, ...],
    cache: CacheSettings | None,
) -> dict[str, Dataset]:
    """Open what the section names; every missing or damaged file is found here."""
    config = None if cache is None else cache.to_config()
    reader = find_member_reader()  # compiled here, before workers are forked
    if shards is not None:
        return {"": open_dataset(shards, split, cache=config, reader=reader)}
    return {s.name: open_dataset(s.shards, s.split, cache=config, reader=reader) for s in sources}


def open_knowledge_index(path: str | None) -> KnowledgeIndex | None:
    return None if path is None else KnowledgeIndex(Path(path))
