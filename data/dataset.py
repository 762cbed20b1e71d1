"""An opened split: random access to the samples of many tars by one number."""

import glob
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from webdataset.shardlists import expand_urls

from groundwork.data.samples import Concept, Sample, SampleError, sample_from_fields
from groundwork.data.shard_index import (
    MISSING,
    ShardError,
    ShardIndex,
    index_path,
    read_index,
    scan_tar,
    write_index,
)
from groundwork.data.shards import MANIFEST, read_concepts, read_manifest

log = logging.getLogger(__name__)


class Dataset:
    """The samples of one split, numbered 0..len-1 in shard order.

    Tars are memory-mapped on first use in each process; the object itself can be pickled and forked.
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
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def locate(self, index: int) -> tuple[int, int]:
        """(shard number, sample number inside the shard)."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, index - (int(self.ends[shard - 1]) if shard else 0)

    def where(self, index: int) -> tuple[str, str]:
        """(shard file, key) of a sample, for messages."""
        shard, row = self.locate(index)
        return str(self.tars[shard]), self.indices[shard].key(row)

    def read(self, index: int) -> Sample:
        """Read one sample and verify the checksums. Raises SampleError if it is not as written."""
        shard, row = self.locate(index)
        table, data = self.indices[shard], self._map(shard)
        fields = {}
        for column, field in enumerate(table.fields):
            size, offset = int(table.sizes[row, column]), int(table.offsets[row, column])
            if size == MISSING:
                continue
            content = data[offset : offset + size]
            if google_crc32c.value(content) != table.checksums[row, column]:
                raise SampleError(f"member {field!r} fails its checksum: the tar is damaged")
            fields[field] = content
        return sample_from_fields(table.key(row).replace("/", "_"), fields)

    def _map(self, shard: int) -> mmap.mmap:
        mapped = self._maps.get(shard)
        if mapped is None:
            with self.tars[shard].open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[shard] = mapped
        return mapped


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
        indices = [_index(tar) for tar in tars]
        for shard, index in zip(manifest.splits[split], indices, strict=True):
            if len(index) != shard.samples:
                raise ShardError(
                    f"{directory / shard.file}: its index has {len(index)} samples, the manifest "
                    f"says {shard.samples}; fetch the shard and its index again"
                )
        return Dataset(tars, indices, f"{manifest.digest()}/{split}", read_concepts(directory))
    tars = _plain_tars(shards)
    indices = [_index(tar) for tar in tars]
    if not sum(map(len, indices)):
        raise ShardError(f"{shards}: the tars hold no sample")
    content = [(tar.name, index.tar_bytes, len(index)) for tar, index in zip(tars, indices)]
    return Dataset(tars, indices, hashlib.sha256(json.dumps(content).encode()).hexdigest())


def _plain_tars(shards: str) -> list[Path]:
    if Path(shards).is_dir():
        tars = sorted(Path(shards).glob("*.tar"))
    elif "{" in shards:
        tars = [Path(url) for url in expand_urls(shards)]
    else:
        tars = sorted(Path(name) for name in glob.glob(shards))
    missing = [str(tar) for tar in tars if not tar.is_file()]
    if not tars or missing:
        what = f"missing: {', '.join(missing[:5])}" if missing else "no data set and no tar here"
        raise ShardError(
            f"{shards}: {what}. Build shards with `groundwork shards build SOURCE --out DIR`, or "
            "set data.shards in the recipe to a folder or pattern of WebDataset tars"
        )
    return tars


def _index(tar: Path) -> ShardIndex:
    side_car = index_path(tar)
    if side_car.is_file():
        return read_index(side_car, tar)
    index = scan_tar(tar)
    if os.access(tar.parent, os.W_OK):
        write_index(index, side_car)
    else:
        log.warning("%s: folder not writable, so the tar is scanned at every start", tar)
    return index
