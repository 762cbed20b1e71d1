"""A clean copy of a data set that `verify` finds fault with."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from groundwork.data.damaged_tar import FoundSample
from groundwork.data.diagnosis import Diagnosis
from groundwork.data.samples import IMAGE_EXTENSIONS
from groundwork.data.shard_check import Checks, Finding, is_never_read, samples_of
from groundwork.data.shard_index import ShardError
from groundwork.data.shards import (
    REPAIR,
    Manifest,
    data_set_written_atomically,
    finish_data_set,
    read_concepts,
)
from groundwork.data.split_writer import ShardLimits, write_splits
from groundwork.data.verify import Progress, Report, ShardSet, find_shards, verify_shards

OnShard = Callable[[], None]


@dataclass(frozen=True, slots=True)
class StoredSample:
    """A sample as it is stored: what the writer takes of a `Sample`, every byte unchanged."""

    key: str
    image: bytes
    text: str
    stored: Mapping[str, bytes]

    def fields(self) -> Mapping[str, bytes]:
        return self.stored


@dataclass(frozen=True)
class Repaired:
    """manifest: of the copy. report: of the original.

    left_out: samples that were found, and are not in the copy; others may be lost with their tars.
    expected: samples of the original as its manifest says; None where it has none.
    """

    manifest: Manifest
    report: Report
    left_out: int
    expected: int | None


def repair(
    where: str,
    out: Path,
    checks: Checks | None = None,
    *,
    workers: int = 1,
    on_progress: Progress | None = None,
    on_shard: OnShard | None = None,
) -> Repaired:
    """Write what is good of a data set as the data set `out`; the original stays as it is.

    Samples keep their members byte for byte, and their order. What is left out, and why, stands in
    OUT/repair.json. Plain tars become the split "train".
    checks: what counts as good; by default every image has to decode.
    Raises ShardError where there is nothing to copy, and where `out` holds something else.
    """
    shards = find_shards(where)
    _refuse_to_touch(shards, out)
    checks = checks or Checks(decode=True)
    report = verify_shards(shards, checks, workers=workers, on_progress=on_progress)
    bad = [finding for finding in report.findings if finding.diagnosis.is_bad]
    left_out: dict[str, set[int]] = {}
    for finding in bad:
        if finding.row >= 0:
            left_out.setdefault(finding.file, set()).add(finding.row)
    counts = [shard.samples for shard in shards.shards if shard.samples]
    limits = ShardLimits(max_samples=max(counts)) if counts else ShardLimits()
    name, licence, source = _described(shards)
    is_listed = any(finding.diagnosis is Diagnosis.BAD_CONCEPTS for finding in bad)
    concepts = [] if shards.directory is None or is_listed else read_concepts(shards.directory)
    with data_set_written_atomically(out) as directory:
        samples = _good_samples(shards, left_out, on_shard)
        splits = write_splits(samples, directory, name=name, limits=limits)
        if not splits:
            raise ShardError(f"{where}: no sample of it is good; nothing was written to {out}")
        manifest = finish_data_set(
            directory,
            {split: [written] for split, written in splits.items()},
            name=name,
            source={"kind": "repair", "of": source},
            licence=licence,
            concepts=concepts,
        )
        for run in directory.glob("*.hashes"):
            run.unlink()
        (directory / REPAIR).write_bytes(_record(manifest, bad))
    expected = sum(counts) if shards.manifest is not None else None
    return Repaired(manifest, report, sum(map(len, left_out.values())), expected)


def _refuse_to_touch(shards: ShardSet, out: Path) -> None:
    target = out.resolve()
    for folder in {shard.path.resolve().parent for shard in shards.shards}:
        if target == folder or folder in target.parents or target in folder.parents:
            raise ShardError(
                f"--out {out} and the data set {shards.where} lie in one another, and the original "
                "is not to change; choose another --out"
            )


def _described(shards: ShardSet) -> tuple[str, str, Mapping[str, Any]]:
    """Name, licence and source of the original, as far as they are known."""
    if shards.manifest is not None:
        return shards.manifest.name, shards.manifest.licence, shards.manifest.source
    path = Path(shards.where)
    return path.resolve().name if path.is_dir() else "repaired", "unknown", {}


def _good_samples(
    shards: ShardSet, left_out: Mapping[str, Set[int]], on_shard: OnShard | None
) -> Iterator[tuple[str, StoredSample]]:
    for split, files in shards.splits.items():
        for shard in files:
            bad = left_out.get(shard.file, frozenset())
            # one that is missing or cannot be read stands in the report
            if shard.path.is_file() and os.access(shard.path, os.R_OK):
                samples = samples_of(shard.path)[0].samples
                with shard.path.open("rb") as file:
                    for row, sample in enumerate(samples):
                        if row not in bad:
                            yield split, _stored(file, sample)
            if on_shard is not None:
                on_shard()


def _stored(file: BinaryIO, sample: FoundSample) -> StoredSample:
    stored = {}
    for name, (offset, size) in sample.members.items():
        if not is_never_read(name):
            file.seek(offset)
            stored[name] = file.read(size)
    image = next((stored[name] for name in IMAGE_EXTENSIONS if name in stored), b"")
    return StoredSample(sample.key, image, stored.get("txt", b"").decode("utf-8"), stored)


def _record(manifest: Manifest, bad: Sequence[Finding]) -> bytes:
    """`repair.json`: what was wrong. left_out: of samples that the copy has not; mended: the rest.

    Names of shards and offsets are those of the original.
    """
    record: dict[str, Any] = {
        "format": "groundwork-repair",
        "version": 1,
        "samples": sum(manifest.samples(split) for split in manifest.splits),
        "left_out": [_entry(finding) for finding in bad if finding.row >= 0],
        "mended": [_entry(finding) for finding in bad if finding.row < 0],
    }
    return json.dumps(record, ensure_ascii=True, indent=1).encode("ascii")


def _entry(finding: Finding) -> dict[str, Any]:
    return {
        "shard": finding.file,
        "key": finding.key,
        "offset": finding.offset,
        "diagnosis": finding.diagnosis.value,
        "detail": finding.detail,
    }
