"""An opened split: random access to the samples of many tars by one number."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from webdataset.shardlists import expand_urls

from groundwork.data.samples import Concept, Sample, SampleError, sample_from_fields
from groundwork.data.shard_index import (
    MISSING,
    OutdatedIndexError,
    ShardError,
    ShardIndex,
    index_path,
    read_index,
    scan_tar,
    write_index,
)
from groundwork.data.shards import MANIFEST, file_checksum, read_concepts, read_manifest

log = logging.getLogger(__name__)

#: Tars a process keeps open. A shuffled stream visits all of them; the limit on open files is often
#: 1,024, and opening a tar costs microseconds.
MAX_OPEN_TARS = 128
#: What foreign tars may have in their keys and `Sample` may not.
UNFIT_FOR_KEYS = re.compile(r"[./\\\s]")


class Dataset:
    """The samples of one split, numbered 0..len-1 in shard order.

    Tars are opened on first use in each process; the object itself can be pickled and forked.
    Plain reads rather than memory maps, because a map of a tar that shrinks under it, or whose disk
    fails, kills the process instead of raising.
    digest: identifies the content, for checkpoints.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        indices: Sequence[ShardIndex],
        digest: str,
        concepts: Sequence[Concept] = (),
    ) -> None:
        self.tars = list(tars)
        self.indices = list(indices)
        self.digest = digest
        self.concepts = list(concepts)
        self.ends = np.cumsum([len(index) for index in indices], dtype=np.int64)
        self._open_tars: dict[int, BinaryIO] = {}

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_tars": {}}

    def locate(self, index: int) -> tuple[int, int]:
        """(shard number, sample number inside the shard)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a data set of {len(self)}")
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, index - (int(self.ends[shard - 1]) if shard else 0)

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard, in the order in which samples are numbered."""
        return [len(index) for index in self.indices]

    def read_many(self, indices: Sequence[int]) -> list[Sample | SampleError]:
        """Read samples; a bad one is returned as the error that says why."""
        samples: list[Sample | SampleError] = []
        for index in indices:
            try:
                samples.append(self.read(index))
            except SampleError as error:
                samples.append(error)
        return samples

    def where(self, index: int) -> tuple[str, str]:
        """(shard file, key) of a sample, for messages."""
        shard, row = self.locate(index)
        return str(self.tars[shard]), self.indices[shard].key(row)

    def read(self, index: int) -> Sample:
        """Read one sample and verify the checksums. Raises SampleError if it is not as written."""
        shard, row = self.locate(index)
        table = self.indices[shard]
        offsets, sizes = table.offsets[row], table.sizes[row]
        present = np.flatnonzero(sizes != MISSING)
        begin = int(offsets[present].min())
        data = self._bytes(shard, begin, int((offsets + sizes)[present].max()))
        fields = {}
        for column in present:
            start, field = int(offsets[column]) - begin, table.fields[column]
            content = data[start : start + int(sizes[column])]
            if google_crc32c.value(content) != table.checksums[row, column]:
                raise SampleError(
                    f"member {field!r} fails its checksum: the tar was damaged, or replaced after "
                    "it was indexed"
                )
            fields[field] = content
        try:
            return sample_from_fields(UNFIT_FOR_KEYS.sub("_", table.key(row)), fields)
        except RecursionError as error:
            raise SampleError("member 'json' is nested too deeply") from error

    def _bytes(self, shard: int, begin: int, end: int) -> bytes:
        try:
            return os.pread(self._tar(shard).fileno(), end - begin, begin)
        except OSError as error:
            raise SampleError(f"cannot be read: {error}") from error

    def _tar(self, shard: int) -> BinaryIO:
        tar = self._open_tars.pop(shard, None) or self.tars[shard].open("rb", buffering=0)
        self._open_tars[shard] = tar  # the last one of the dictionary is the one used last
        if len(self._open_tars) > MAX_OPEN_TARS:
            self._open_tars.pop(next(iter(self._open_tars))).close()
        return tar


def open_dataset(shards: str, split: str = "train") -> Dataset:
    """Open a data set.

    shards: a folder with a manifest; or a folder, a glob (`*`) or a brace pattern
        (`x-{000..127}.tar`) of plain tars, in which case `split` is not used.
    Tars without a side-car are scanned once and the side-car is written beside them.
    """
    directory = Path(shards)
    if (directory / MANIFEST).is_file():
        manifest = read_manifest(directory)
        if split not in manifest.splits:
            raise ShardError(
                f"{directory}: no split {split!r}; it has {', '.join(sorted(manifest.splits))}"
            )
        tars = [directory / shard.file for shard in manifest.splits[split]]
        indices = []
        for tar, shard in zip(tars, manifest.splits[split], strict=True):
            index = _index(tar, shard.crc32c)
            if len(index) != shard.samples:
                raise ShardError(
                    f"{directory / shard.file}: its index has {len(index)} samples, the manifest "
                    f"says {shard.samples}; fetch the shard and its index again"
                )
            indices.append(index)
        if not manifest.samples(split):
            raise ShardError(f"{directory}: split {split!r} holds no sample; build it again")
        return Dataset(tars, indices, f"{manifest.digest()}/{split}", read_concepts(directory))
    tars = _plain_tars(shards)
    indices = [_index(tar) for tar in tars]
    if not sum(map(len, indices)):
        raise ShardError(f"{shards}: the tars hold no sample")
    content = [(tar.name, index.digest()) for tar, index in zip(tars, indices, strict=True)]
    return Dataset(tars, indices, hashlib.sha256(json.dumps(content).encode()).hexdigest())


def _plain_tars(shards: str) -> list[Path]:
    if Path(shards).is_dir():
        tars = sorted(Path(shards).glob("*.tar"))
    elif Path(shards).is_file():
        tars = [Path(shards)]
    else:
        # braces promise every file they name, stars what is there
        patterns = expand_urls(shards) if "{" in shards else [shards]
        found = [
            sorted(glob(pattern)) if has_magic(pattern) else [pattern]  # noqa: PTH207
            for pattern in patterns
        ]
        tars = [Path(name) for names in found for name in names]
    missing = [str(tar) for tar in tars if not tar.is_file()]
    if not tars or missing:
        what = f"missing: {', '.join(missing[:5])}" if missing else "no data set and no tar here"
        raise ShardError(
            f"{shards}: {what}. Build shards with `groundwork shards build SOURCE --out DIR`, or "
            "set data.shards in the recipe to a folder or pattern of WebDataset tars"
        )
    return tars


def _index(tar: Path, crc32c: int | None = None) -> ShardIndex:
    """The side-car, or a new one made from the tar. crc32c: what the tar is known to have."""
    side_car = index_path(tar)
    if side_car.is_file():
        try:
            return read_index(side_car, tar)
        except OutdatedIndexError as error:
            log.info("%s", error)
    # the new index takes the bytes of the tar for right, so they have to be
    if crc32c is not None and file_checksum(tar) != crc32c:
        raise ShardError(
            f"{tar}: does not have the checksum that the manifest says; fetch this shard again"
        )
    index = scan_tar(tar)
    try:
        write_index(index, side_car)
    except OSError as error:
        log.warning("%s: not written (%s), so the tar is scanned at every start", side_car, error)
    return index
