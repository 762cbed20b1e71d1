"""An opened split: random access to the samples of many tars by one number."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from glob import glob, has_magic
from pathlib import Path

import numpy as np

from groundwork.data.cache import CacheConfig
from groundwork.data.member_batch import MemberReader, read_batch, reads_in_batches
from groundwork.data.raw_batch import RawBatch, RawSample
from groundwork.data.sample_reader import read_rows
from groundwork.data.samples import (
    Concept,
    Sample,
    SampleError,
    sample_from_fields,
    sample_key,
)
from groundwork.data.shard_index import ShardError
from groundwork.data.shard_patterns import expand_braces
from groundwork.data.shard_table import ShardEntry, ShardTable, load_headers
from groundwork.data.shards import (
    CONCEPTS,
    MANIFEST,
    Manifest,
    parse_concepts,
    parse_manifest,
    read_concepts,
    read_manifest,
)
from groundwork.data.storage import LocalStorage, Storage, is_remote, open_storage
from groundwork.data.storage_errors import MissingFileError
from groundwork.data.storage_names import split_url

#: Samples from which on one call of a reader is faster than one call of Python's for each.
WORTH_A_BATCH = 4


class Dataset:
    """The samples of one split, numbered 0..len-1 in shard order.

    Nothing but the list of shards is read before the first sample is asked for; the object can be
    pickled and forked.
    digest: identifies the content, for checkpoints.
    reader: reads batches of local samples, with the same results (`member_batch`).
    """

    def __init__(
        self,
        storage: Storage,
        entries: Sequence[ShardEntry],
        digest: str,
        concepts: Sequence[Concept] = (),
        *,
        reader: MemberReader | None = None,
    ) -> None:
        self.storage = storage
        self.reader = reader
        self.table = ShardTable(storage, entries)
        self.digest = digest
        self.concepts = list(concepts)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard, in the order in which samples are numbered."""
        return [entry.samples for entry in self.table.entries]

    def locate(self, index: int) -> tuple[int, int]:
        """(shard number, sample number inside the shard)."""
        return self.table.locate(index)

    def where(self, index: int) -> tuple[str, str]:
        """(shard file, key) of a sample, for messages. The key is empty where the index is bad."""
        shard, row = self.locate(index)
        file = self.storage.where(self.table.entries[shard].file)
        try:
            return file, self.table.index(shard).key(row)
        except (ShardError, OSError):
            return file, ""

    def read(self, index: int) -> Sample:
        """Read one sample and verify the checksums. Raises SampleError if it is not as written."""
        sample = self.read_many([index])[0]
        if isinstance(sample, SampleError):
            raise sample
        return sample

    def read_many(
        self, indices: Sequence[int], fields: Iterable[str] | None = None
    ) -> list[Sample | SampleError]:
        """Read samples; a bad one is returned as the error that says why."""
        return [
            raw if isinstance(raw, SampleError) else _sample(*raw)
            for raw in self.read_fields(indices, fields)
        ]

    def read_fields(
        self, indices: Sequence[int], fields: Iterable[str] | None = None
    ) -> list[RawSample]:
        """Key and verified members of each sample, undecoded.

        fields: the extensions wanted; the others are neither read nor verified. None: all of them.
        A sample that cannot be read, or whose checksums fail twice, is returned as its error.
        """
        if reads_in_batches(self.reader, self.storage) and len(indices) >= WORTH_A_BATCH:
            return self.read_batch(indices, fields).samples()
        shards, rows = self.table.locate_many(np.asarray(indices, np.int64))
        wanted = None if fields is None else frozenset(fields)
        return read_rows(self.storage, self.table, shards, rows, wanted)

    def read_batch(self, indices: Sequence[int], fields: Iterable[str] | None = None) -> RawBatch:
        """The same in one buffer, without Python objects for each sample."""
        shards, rows = self.table.locate_many(np.asarray(indices, np.int64))
        wanted = None if fields is None else frozenset(fields)
        return read_batch(self.reader, self.table, shards, rows, wanted)


def _sample(key: str, fields: dict[str, bytes]) -> Sample | SampleError:
    try:
        return sample_from_fields(sample_key(key), fields)
    except SampleError as error:
        return error


#: Up to so many shards, all side-cars are checked when a data set is opened. Of more, each is
#: checked when it is first used: opening is not to read what lies before the first sample.
CHECKED_AT_OPENING = 64
REMEDY = (
    "Build shards with `groundwork shards build SOURCE --out DIR`, or set data.shards in the "
    "recipe to a folder, pattern or URL of WebDataset tars"
)


def open_dataset(
    shards: str,
    split: str = "train",
    *,
    cache: CacheConfig | None = None,
    reader: MemberReader | None = None,
) -> Dataset:
    """Open a data set.

    shards: a folder or URL with a manifest; or a folder, a glob (`*`) or a brace pattern
        (`x-{000..127}.tar`) of plain tars, local or remote, in which case `split` is not used.
    cache: where blocks of remote files are kept; None: in memory, for this process only.
    reader: reads and verifies batches of local samples faster than Python does, with the same
        results (`groundwork.kernels.member_reader.find_member_reader()`).
    Local tars without a side-car are scanned once and the side-car is written beside them.
    """
    dataset = _open(shards, split, cache)
    dataset.reader = reader
    return dataset


def require_two_splits(where: str, name: str, first: Dataset, other: str, second: Dataset) -> None:
    """Raise ShardError where splits of two names are the same samples.

    So they are in plain tars, which know no splits: what is measured on one of them would be
    measured on what was trained on. Who names one split twice means it.
    """
    if name != other and first.digest == second.digest:
        raise ShardError(
            f"{where}: these tars have no splits, {name!r} and {other!r} are the same "
            f"{len(first):,} samples. Name the tars of each by a pattern "
            f"({other}-*.tar; for the evaluation of a recipe in data.evaluation_shards), or build "
            "a data set with splits from them (groundwork shards build --help)"
        )


def _open(shards: str, split: str, cache: CacheConfig | None) -> Dataset:
    if is_remote(shards):
        storage = open_storage(shards, cache)
        try:
            record = storage.whole(MANIFEST)
        except MissingFileError:
            return _open_remote_tars(shards, cache)
        manifest = parse_manifest(record, storage.where(MANIFEST))
        try:
            concepts = parse_concepts(storage.whole(CONCEPTS), storage.where(CONCEPTS))
        except MissingFileError:
            concepts = []
        return _open_split(storage, manifest, split, concepts)
    directory = Path(shards)
    if (directory / MANIFEST).is_file():
        manifest, concepts = read_manifest(directory), read_concepts(directory)
        return _open_split(LocalStorage(directory), manifest, split, concepts)
    tars = _local_tars(shards)
    # one folder as a rule; tars of several lie below the one they share
    folder = Path(os.path.commonpath([tar.parent for tar in tars]))
    files = [tar.relative_to(folder).as_posix() for tar in tars]
    return _open_tars(LocalStorage(folder), files, shards)


def _open_split(
    storage: Storage, manifest: Manifest, split: str, concepts: Sequence[Concept]
) -> Dataset:
    if split not in manifest.splits:
        known = ", ".join(sorted(manifest.splits))
        raise ShardError(f"{storage.where('')}: no split {split!r}; it has {known}")
    entries = [
        ShardEntry(shard.file, shard.samples, shard.crc32c) for shard in manifest.splits[split]
    ]
    dataset = Dataset(storage, entries, f"{manifest.digest()}/{split}", concepts)
    if not len(dataset):
        raise ShardError(f"{storage.where('')}: split {split!r} holds no sample; build it again")
    if len(entries) <= CHECKED_AT_OPENING:
        for shard in range(len(entries)):
            dataset.table.index(shard)
    return dataset


def _open_remote_tars(url: str, cache: CacheConfig | None) -> Dataset:
    storage = open_storage(url, cache)
    if "{" in url or has_magic(url) or url.endswith(".tar"):
        folder, pattern = split_url(url)
        storage = open_storage(folder, cache)
        files = expand_braces(pattern)
        files = [
            name for file in files for name in (storage.names(file) if has_magic(file) else [file])
        ]
    else:
        files = storage.names("*.tar")
    if not files:
        raise ShardError(f"{storage.where('')}: no data set and no tar here. {REMEDY}")
    return _open_tars(storage, files, storage.where(""))


def _open_tars(storage: Storage, files: Sequence[str], where: str) -> Dataset:
    headers = load_headers(storage, files)
    entries = [
        ShardEntry(file, header.samples) for file, header in zip(files, headers, strict=True)
    ]
    if not sum(entry.samples for entry in entries):
        raise ShardError(f"{where}: the tars hold no sample")
    content = [[Path(f).name, header.digest] for f, header in zip(files, headers, strict=True)]
    return Dataset(storage, entries, hashlib.sha256(json.dumps(content).encode()).hexdigest())


def _local_tars(shards: str) -> list[Path]:
    if Path(shards).is_dir():
        tars = sorted(Path(shards).glob("*.tar"))
    elif Path(shards).is_file():
        tars = [Path(shards)]
    else:
        # braces promise every file they name, stars what is there
        patterns = expand_braces(shards)
        found = [
            sorted(glob(pattern)) if has_magic(pattern) else [pattern]  # noqa: PTH207
            for pattern in patterns
        ]
        tars = [Path(name) for names in found for name in names]
    missing = [str(tar) for tar in tars if not tar.is_file()]
    if not tars or missing:
        what = f"missing: {', '.join(missing[:5])}" if missing else "no data set and no tar here"
        raise ShardError(f"{shards}: {what}. {REMEDY}")
    return tars
