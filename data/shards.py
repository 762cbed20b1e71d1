"""A data set on disk: a folder of tars with their side-cars, described by `manifest.json`.

    DIR/train-000000.tar  DIR/train-000000.idx  ...  DIR/concepts.json  DIR/manifest.json
    DIR/statistics.json  DIR/README.md

The tars are plain WebDataset. The manifest names every shard of every split with its size, sample
count and checksum; its hash identifies the data set in checkpoints. Nothing in it depends on the
time or the machine, so the same source gives the same manifest, byte for byte. All layouts are
specified in `docs/shard_format.md`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from heapq import nsmallest
from importlib.metadata import version
from pathlib import Path
from typing import Any

import google_crc32c

from groundwork.data.atomic import directory_written_atomically
from groundwork.data.data_card import CARD, data_card, is_card
from groundwork.data.diagnosis import Diagnosis
from groundwork.data.duplicates import equal_hashes
from groundwork.data.samples import Concept, Sample
from groundwork.data.shard_index import ShardError, index_path, map_index
from groundwork.data.split_writer import (
    SPLIT,
    ShardLimits,
    WrittenShard,
    WrittenSplit,
    repeated_key,
    run_path,
    write_splits,
)
from groundwork.data.statistics import Duplicates, SplitStatistics, Statistics

MANIFEST = "manifest.json"
CONCEPTS = "concepts.json"
STATISTICS = "statistics.json"
#: Written by `repair.py` only: what it left out.
REPAIR = "repair.json"
FORMAT = "groundwork-shards"
FORMAT_VERSION = 1
REBUILD = "build the data set again with `groundwork shards build SOURCE --out DIR`"
#: No size, count or sum of a data set is larger: what numpy and `len` hold.
MAX_COUNT = 2**63 - 1
#: Contents that the statistics name as examples of duplicates, and samples of each.
MAX_EXAMPLES = 10


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
        content = {name: [vars(shard) for shard in split] for name, split in self.splits.items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
    limits, concepts = ShardLimits(max_samples, max_bytes), list(concepts)
    check_encodable(source, concepts)
    with data_set_written_atomically(out) as directory:
        splits = write_splits(samples, directory, name=name, limits=limits)
        if not splits:
            raise no_sample(name, out)
        manifest = finish_data_set(
            directory,
            {split: [written] for split, written in splits.items()},
            name=name,
            source=source,
            licence=licence,
            concepts=concepts,
        )
        for run in directory.glob("*.hashes"):
            run.unlink()
    return manifest


@contextmanager
def data_set_written_atomically(out: Path) -> Iterator[Path]:
    """`directory_written_atomically` for data sets: another one is replaced, anything else not."""
    try:
        with directory_written_atomically(out, is_ours=is_data_set) as directory:
            yield directory
    except (NotADirectoryError, FileExistsError, BlockingIOError) as error:
        raise ShardError(f"{out}: {error.strerror}; choose another folder") from error


def no_sample(name: str, out: Path) -> ShardError:
    return ShardError(f"source {name!r} yielded no sample; nothing was written to {out}")


def finish_data_set(
    directory: Path,
    splits: Mapping[str, Sequence[WrittenSplit]],
    *,
    name: str,
    source: Mapping[str, Any],
    licence: str,
    concepts: Sequence[Concept],
) -> Manifest:
    """Describe the shards in `directory`: manifest, classes, statistics and card.

    splits: by name, in the order in which their shards are numbered. The shards are there under
    their final names (`shard_name`), their runs of hashes where they were written.
    Raises ShardError for a key that a split holds twice.
    """
    shards = {split: [s for part in parts for s in part.shards] for split, parts in splits.items()}
    shards = {split: shards[split] for split in sorted(shards) if shards[split]}
    for split in shards:
        _refuse_repeated_keys(directory, split, shards[split], name)
    statistics = Statistics(
        {split: _total(splits[split]) for split in shards}, _duplicates(directory, shards)
    )
    manifest = Manifest(
        name,
        source,
        licence,
        {
            split: tuple(
                Shard(shard_name(split, number), shard.samples, shard.bytes, shard.crc32c)
                for number, shard in enumerate(shards[split])
            )
            for split in shards
        },
    )
    (directory / CONCEPTS).write_bytes(_encode([asdict(concept) for concept in concepts]))
    (directory / STATISTICS).write_bytes(_encode(statistics.record()))
    counts = {split: (manifest.samples(split), len(shards[split])) for split in shards}
    first = shard_name(next(iter(shards)), 0)
    card = data_card(name, licence, source, counts, first, len(concepts), statistics)
    (directory / CARD).write_bytes(card)
    record = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "written_by": f"groundwork-pretrain {version('groundwork-pretrain')}",
        **asdict(manifest),
    }
    (directory / MANIFEST).write_bytes(_encode(record))
    return manifest


def shard_name(split: str, number: int) -> str:
    """The file name of a shard in a data set."""
    return f"{split}-{number:06d}.tar"


def _total(parts: Sequence[WrittenSplit]) -> SplitStatistics:
    total = SplitStatistics()
    for part in parts:
        total.merge(part.statistics)
    return total


def _refuse_repeated_keys(
    directory: Path, split: str, shards: Sequence[WrittenShard], name: str
) -> None:
    for group in equal_hashes([run_path(shard.path) for shard in shards], "key"):
        # hashes of 8 bytes may be equal by chance, so the keys themselves decide
        found: dict[str, int] = {}
        for number, row in group:
            key = _key(directory / shard_name(split, number), row)
            if key in found:
                first, second = shard_name(split, found[key]), shard_name(split, number)
                raise repeated_key(name, key, split, f" (in {first} and {second})")
            found[key] = number


def _duplicates(directory: Path, shards: Mapping[str, Sequence[WrittenShard]]) -> Duplicates:
    """Equal images in all splits."""
    owners = [(split, number) for split in shards for number in range(len(shards[split]))]
    runs = [run_path(shards[split][number].path) for split, number in owners]
    contents = samples = across = 0
    first: list[list[tuple[int, int]]] = []
    for group in equal_hashes(runs, "image"):
        contents += 1
        samples += len(group) - 1
        across += len({owners[run][0] for run, _ in group}) > 1
        first.append(group[:MAX_EXAMPLES])
        if len(first) > 100 * MAX_EXAMPLES:
            first = nsmallest(MAX_EXAMPLES, first)
    examples = tuple(
        tuple(
            (owners[run][0], _key(directory / shard_name(*owners[run]), row)) for run, row in group
        )
        for group in nsmallest(MAX_EXAMPLES, first)
    )
    return Duplicates(contents, samples, across, examples)


def _key(tar: Path, row: int) -> str:
    return map_index(index_path(tar), verify=False).key(row)


def check_encodable(source: Mapping[str, Any], concepts: Sequence[Concept]) -> None:
    """Raise for what cannot be written, before hours of writing."""
    _encode([asdict(concept) for concept in concepts])
    _encode(source)


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
        # one that somebody has written more into is theirs
        card_is_ours = CARD not in present or is_card((directory / CARD).read_bytes())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False
    side_cars = {str(Path(tar).with_suffix(".idx")) for tar in tars}
    ours = {MANIFEST, CONCEPTS, STATISTICS, REPAIR} | tars | side_cars
    return not has_folder and card_is_ours and present <= ours | {CARD}


def read_manifest(directory: Path) -> Manifest:
    """Read and check `DIR/manifest.json`; every shard it names must exist with the right size."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ShardError(f"{directory}: no data set here ({MANIFEST} is missing); {REBUILD}")
    manifest = parse_manifest(path.read_bytes(), str(path))
    missing, wrong = [], []
    with os.scandir(directory) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    for shard in (shard for split in manifest.splits.values() for shard in split):
        size = sizes.get(shard.file)
        if size is None:
            missing.append(shard.file)
        elif size != shard.bytes:
            wrong.append(f"{shard.file} ({size:,} of {shard.bytes:,} bytes)")
    if missing or wrong:
        parts = [
            f"missing: {_some(missing)}" if missing else "",
            f"truncated or replaced: {_some(wrong)}" if wrong else "",
        ]
        raise ShardError(
            f"{directory}: {'; '.join(filter(None, parts))}. Fetch these shards again, or "
            f"{REBUILD}",
            Diagnosis.MISSING_SHARD if missing else Diagnosis.WRONG_SIZE,
        )
    return manifest


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest from its bytes; the shards are not looked for. where: for messages."""
    try:
        record = json.loads(data)
        if record["format"] != FORMAT or record["version"] != FORMAT_VERSION:
            raise ValueError(f"format {record['format']!r} version {record['version']!r}")
        splits = {
            split: tuple(_shard(shard) for shard in shards)
            for split, shards in record["splits"].items()
        }
        files = [shard.file for split in splits.values() for shard in split]
        if len(set(files)) != len(files):
            raise ValueError("it names a shard twice")
        shards = [shard for split in splits.values() for shard in split]
        if max(sum(s.samples for s in shards), sum(s.bytes for s in shards)) > MAX_COUNT:
            raise ValueError("its shards together have more than 2^63 - 1 samples or bytes")
        manifest = Manifest(record["name"], record["source"], record["licence"], splits)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(
            f"{where}: not a groundwork manifest ({error}); {REBUILD}", Diagnosis.BAD_MANIFEST
        ) from error
    for file in files:
        if not SPLIT.fullmatch(file):
            raise ShardError(
                f"{where}: shard {file!r} lies outside the folder; refused", Diagnosis.BAD_MANIFEST
            )
    return manifest


def read_statistics(directory: Path) -> Statistics | None:
    """What `DIR/statistics.json` says; None where there is none, as in older data sets."""
    path = directory / STATISTICS
    try:
        return Statistics.from_record(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(
            f"{path}: not statistics of a data set ({error}); delete it, or {REBUILD}"
        ) from error


def _shard(record: Any) -> Shard:
    shard = Shard(**record)
    counts = (shard.samples, shard.bytes, shard.crc32c)
    if not isinstance(shard.file, str) or any(
        type(n) is not int or not 0 <= n <= MAX_COUNT for n in counts
    ):
        raise ValueError(f"a count or size of shard {str(record)[:300]} is not from 0 to 2^63 - 1")
    return shard


def read_concepts(directory: Path) -> list[Concept]:
    """The classes of a data set, in label order."""
    path = directory / CONCEPTS
    try:
        return parse_concepts(path.read_bytes(), str(path))
    except FileNotFoundError:
        return []


def parse_concepts(data: bytes, where: str) -> list[Concept]:
    """The classes from the bytes of `concepts.json`. where: its name for messages."""
    try:
        records = json.loads(data)
        concepts = [Concept(**{**r, "aliases": tuple(r["aliases"])}) for r in records]
        for concept in concepts:
            if type(concept.label) is not int or not isinstance(concept.name, str):
                raise ValueError(f"concept {concept}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(
            f"{where}: not a list of concepts ({error}); build the data set again",
            Diagnosis.BAD_CONCEPTS,
        ) from error
    return sorted(concepts, key=lambda concept: concept.label)


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
