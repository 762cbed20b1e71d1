"""A data set on disk: a folder of tars with their side-cars, described by `manifest.json`.

    DIR/train-000000.tar  DIR/train-000000.idx  ...  DIR/concepts.json  DIR/manifest.json

The tars are plain WebDataset. The manifest names every shard of every split with its size, sample
count and checksum; its hash identifies the data set in checkpoints. Nothing in it depends on the
time or the machine, so the same source gives the same manifest, byte for byte.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import google_crc32c
from webdataset import TarWriter

from groundwork.data.atomic import directory_written_atomically
from groundwork.data.samples import Concept, Sample
from groundwork.data.shard_index import ShardError, index_path, scan_tar, write_index

MANIFEST = "manifest.json"
CONCEPTS = "concepts.json"
FORMAT = "groundwork-shards"
FORMAT_VERSION = 1
#: Names of splits: they begin file names.
SPLIT = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Shard:
    """One tar of a split. file: relative to the manifest. crc32c: of the whole tar."""

    file: str
    samples: int
    bytes: int
    crc32c: int


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. source: the kind and the settings the data set was built with."""

    name: str
    source: Mapping[str, Any]
    licence: str
    splits: Mapping[str, tuple[Shard, ...]]

    def samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.splits[split])

    def digest(self) -> str:
        """sha256 of the content that decides which sample is which."""
        content = {name: [asdict(shard) for shard in split] for name, split in self.splits.items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _SplitWriter:
    """Writes one split, starting a new tar whenever the present one is full."""

    def __init__(self, directory: Path, split: str, max_samples: int, max_bytes: int) -> None:
        self.directory, self.split = directory, split
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.shards: list[Shard] = []
        self.samples = self.bytes = 0
        self.tar: TarWriter | None = None

    def path(self) -> Path:
        return self.directory / f"{self.split}-{len(self.shards):06d}.tar"

    def write(self, sample: Sample) -> None:
        if self.tar is None:
            # a fixed time and owner make the same samples give the same bytes
            self.file = self.path().open("wb")
            self.tar = TarWriter(
                self.file, encoder=False, mtime=0, user="groundwork", group="groundwork"
            )
        self.bytes += self.tar.write({"__key__": sample.key, **sample.fields()})
        self.samples += 1
        if self.samples >= self.max_samples or self.bytes >= self.max_bytes:
            self.close()

    def close(self) -> None:
        """Finish the present tar: index it and note it in `shards`."""
        if self.tar is None:
            return
        path = self.path()
        self.tar.close()
        self.file.close()
        self.tar = None
        write_index(scan_tar(path), index_path(path))
        self.shards.append(Shard(path.name, self.samples, path.stat().st_size, file_checksum(path)))
        self.samples = self.bytes = 0

    def abandon(self) -> None:
        """Close the file of the present tar, which is not taken up in `shards`."""
        if self.tar is not None:
            # closing the tar itself would write its end, which on a full disk fails once more
            self.tar.tarstream.fileobj.closed = True
            self.file.close()
            self.tar = None


def write_shards(
    samples: Iterable[tuple[str, Sample]],
    out: Path,
    *,
    name: str,
    source: Mapping[str, Any],
    licence: str,
    concepts: Iterable[Concept] = (),
    max_samples: int = 10_000,
    max_bytes: int = 256 * 1024**2,
) -> Manifest:
    """Write (split, sample) pairs as the data set folder `out`; all of it appears, or nothing.

    max_samples, max_bytes: a tar is closed when it reaches either; bytes are those of the members.
    A data set that is there already is replaced, anything else is not.
    Raises ShardError for a key that a split holds twice, and when there is no sample at all.
    """
    if max_samples < 1 or max_bytes < 1:
        raise ValueError(f"max_samples {max_samples} and max_bytes {max_bytes} must be at least 1")
    # encoded first, so that what cannot be written is found before hours of writing
    concepts_json = _encode([asdict(concept) for concept in concepts])
    _encode(source)
    try:
        with directory_written_atomically(out, is_ours=is_data_set) as directory:
            shards = _write_splits(samples, directory, name, max_samples, max_bytes)
            if not shards:
                raise ShardError(f"source {name!r} yielded no sample; nothing was written to {out}")
            manifest = Manifest(name, source, licence, shards)
            (directory / CONCEPTS).write_bytes(concepts_json)
            record = {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "written_by": f"groundwork-pretrain {version('groundwork-pretrain')}",
                **asdict(manifest),
            }
            (directory / MANIFEST).write_bytes(_encode(record))
    except (NotADirectoryError, FileExistsError, BlockingIOError) as error:
        raise ShardError(f"{out}: {error.strerror}; choose another folder") from error
    return manifest


def _write_splits(
    samples: Iterable[tuple[str, Sample]],
    directory: Path,
    name: str,
    max_samples: int,
    max_bytes: int,
) -> dict[str, tuple[Shard, ...]]:
    writers: dict[str, _SplitWriter] = {}
    keys: set[tuple[str, str]] = set()
    try:
        for split, sample in samples:
            if (split, sample.key) in keys:
                raise ShardError(f"source {name!r}: key {sample.key!r} twice in split {split!r}")
            keys.add((split, sample.key))
            if split not in writers:
                if not SPLIT.fullmatch(split):
                    raise ShardError(
                        f"source {name!r}: split {split!r}: a split is named by letters, digits, "
                        "'_', '-' and '.', because its shards begin with its name"
                    )
                writers[split] = _SplitWriter(directory, split, max_samples, max_bytes)
            writers[split].write(sample)
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    return {split: tuple(writer.shards) for split, writer in sorted(writers.items())}


def file_checksum(path: Path) -> int:
    """crc32c of a whole file."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while chunk := file.read(16 * 1024**2):
            checksum.update(chunk)
    return int.from_bytes(checksum.digest(), "big")


def _encode(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False, indent=1).encode("utf-8")


def is_data_set(directory: Path) -> bool:
    """Whether `write_shards` made this folder, be it damaged by now, and all that is in it."""
    try:
        record = json.loads((directory / MANIFEST).read_bytes())
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            return False
        tars = {shard["file"] for shards in record["splits"].values() for shard in shards}
        present = {entry.name for entry in directory.iterdir() if not entry.is_dir()}
        has_folder = len(present) < sum(1 for _ in directory.iterdir())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False
    side_cars = {str(Path(tar).with_suffix(".idx")) for tar in tars}
    return not has_folder and present <= {MANIFEST, CONCEPTS} | tars | side_cars


def read_manifest(directory: Path) -> Manifest:
    """Read and check `DIR/manifest.json`; every shard it names must exist with the right size."""
    path = directory / MANIFEST
    rebuild = "build the data set again with `groundwork shards build SOURCE --out DIR`"
    if not path.is_file():
        raise ShardError(f"{directory}: no data set here ({MANIFEST} is missing); {rebuild}")
    try:
        record = json.loads(path.read_text("utf-8"))
        if record["format"] != FORMAT or record["version"] != FORMAT_VERSION:
            raise ValueError(f"format {record['format']!r} version {record['version']!r}")
        splits = {
            split: tuple(_shard(shard) for shard in shards)
            for split, shards in record["splits"].items()
        }
        files = [shard.file for split in splits.values() for shard in split]
        if len(set(files)) != len(files):
            raise ValueError("it names a shard twice")
        manifest = Manifest(record["name"], record["source"], record["licence"], splits)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path}: not a groundwork manifest ({error}); {rebuild}") from error
    missing, wrong = [], []
    for shard in (shard for split in splits.values() for shard in split):
        if not SPLIT.fullmatch(shard.file):
            raise ShardError(f"{path}: shard {shard.file!r} lies outside the folder; refused")
        file = directory / shard.file
        if not file.is_file():
            missing.append(shard.file)
        elif file.stat().st_size != shard.bytes:
            wrong.append(f"{shard.file} ({file.stat().st_size:,} of {shard.bytes:,} bytes)")
    if missing or wrong:
        parts = [
            f"missing: {_some(missing)}" if missing else "",
            f"truncated or replaced: {_some(wrong)}" if wrong else "",
        ]
        raise ShardError(
            f"{directory}: {'; '.join(filter(None, parts))}. Fetch these shards again, or {rebuild}"
        )
    return manifest


def _shard(record: Any) -> Shard:
    shard = Shard(**record)
    counts = (shard.samples, shard.bytes, shard.crc32c)
    if not isinstance(shard.file, str) or any(type(n) is not int or n < 0 for n in counts):
        raise ValueError(f"shard {record}")
    return shard


def read_concepts(directory: Path) -> list[Concept]:
    """The classes of a data set, in label order."""
    path = directory / CONCEPTS
    try:
        records = json.loads(path.read_text("utf-8"))
        concepts = [Concept(**{**r, "aliases": tuple(r["aliases"])}) for r in records]
        for concept in concepts:
            if type(concept.label) is not int or not isinstance(concept.name, str):
                raise ValueError(f"concept {concept}")
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{path}: not a list of concepts ({error}); build the data set again"
        ) from error
    return sorted(concepts, key=lambda concept: concept.label)


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
