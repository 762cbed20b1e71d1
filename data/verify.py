"""Checking a data set: every shard to its last byte, and keys across the shards of a split.

report = verify("corpus/", Checks(decode=True), workers=8)
report.is_good, report.counts(), report.findings
"""

import json
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Final

import numpy as np

from groundwork.data.diagnosis import Diagnosis
from groundwork.data.duplicates import NO_IMAGE, equal_hashes, hash64, write_run
from groundwork.data.shard_check import (
    CheckedShard,
    Checks,
    Finding,
    ShardFile,
    check_shard,
)
from groundwork.data.shard_index import ShardError
from groundwork.data.shard_patterns import expand_braces
from groundwork.data.shards import CONCEPTS, MANIFEST, Manifest, parse_manifest, read_concepts
from groundwork.data.split_writer import SPLIT
from groundwork.data.storage import is_remote
from groundwork.data.worker_processes import worker_processes

#: The split of tars without a manifest.
ONLY_SPLIT: Final = "train"
#: Lists of keys that are held while repeated ones are looked up.
KEPT_KEYS: Final = 16

Progress = Callable[[CheckedShard], None]


@dataclass(frozen=True)
class ShardSet:
    """The shards of a data set, before anything is known to be right with them.

    where: as it was given. directory: of the manifest, None for plain tars. findings: of the
    manifest and the list of classes.
    """

    where: str
    splits: Mapping[str, Sequence[ShardFile]]
    directory: Path | None = None
    manifest: Manifest | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def shards(self) -> list[ShardFile]:
        return [shard for split in self.splits.values() for shard in split]


@dataclass(frozen=True)
class Report:
    """What was found in a data set, in the order of its shards. samples: all that were found."""

    findings: Sequence[Finding]
    shards: int
    samples: int
    bytes: int

    @property
    def is_good(self) -> bool:
        return not any(finding.diagnosis.is_bad for finding in self.findings)

    def counts(self) -> dict[Diagnosis, tuple[int, int]]:
        """(findings, shards that have one) of each diagnosis that was found."""
        findings = Counter(finding.diagnosis for finding in self.findings)
        shards = Counter(
            diagnosis for _, diagnosis in {(f.file, f.diagnosis) for f in self.findings}
        )
        return {d: (findings[d], shards[d]) for d in Diagnosis if d in findings}


def find_shards(where: str) -> ShardSet:
    """The shards of a folder with a manifest, a folder of tars, a tar or a pattern.

    Raises ShardError where there is nothing to check.
    """
    if is_remote(where):
        raise ShardError(f"{where}: only local data sets are checked; fetch a copy of it first")
    directory = Path(where)
    if not (directory / MANIFEST).is_file():
        return ShardSet(where, {ONLY_SPLIT: _plain_tars(where)})
    findings = []
    try:
        read_concepts(directory)
    except (ShardError, OSError, RecursionError) as error:
        findings.append(Finding(CONCEPTS, "", 0, Diagnosis.BAD_CONCEPTS, str(error)))
    try:
        manifest = parse_manifest((directory / MANIFEST).read_bytes(), MANIFEST)
    except ShardError as error:
        findings.append(Finding(MANIFEST, "", 0, Diagnosis.BAD_MANIFEST, str(error)))
        splits = _splits_by_name(sorted(directory.glob("*.tar")))
        return ShardSet(where, splits, directory, None, tuple(findings))
    splits = {
        split: [ShardFile(directory / s.file, s.file, s.samples, s.bytes, s.crc32c) for s in shards]
        for split, shards in manifest.splits.items()
    }
    return ShardSet(where, splits, directory, manifest, tuple(findings))


def verify(
    where: str,
    checks: Checks | None = None,
    *,
    workers: int = 1,
    on_progress: Progress | None = None,
) -> Report:
    """Check a data set: manifest, tars, side-cars, every member, keys.

    where: as `find_shards` takes it. workers: processes; with 1 all is done in this one.
    Raises ShardError where there is nothing to check.
    """
    return verify_shards(
        find_shards(where), checks or Checks(), workers=workers, on_progress=on_progress
    )


def verify_shards(
    shards: ShardSet,
    checks: Checks,
    *,
    workers: int = 1,
    on_progress: Progress | None = None,
) -> Report:
    """`verify` of a data set whose shards are known."""
    files = shards.shards
    findings: list[list[Finding]] = [[] for _ in files]
    samples = total_bytes = 0
    with tempfile.TemporaryDirectory(prefix="groundwork-verify-") as folder:
        notes = Path(folder)
        for number, checked in _check_all(files, checks, workers):
            _note_keys(notes, number, checked)
            findings[number] = checked.findings
            samples += len(checked.keys)
            total_bytes += checked.bytes
            if on_progress is not None:
                on_progress(checked)
        first = 0
        for split in shards.splits.values():
            numbers = range(first, first + len(split))
            for number, finding in _repeated_across(files, numbers, notes):
                findings[number].append(finding)
            first += len(split)
    return Report(
        [*shards.findings, *(finding for of_shard in findings for finding in of_shard)],
        len(files),
        samples,
        total_bytes,
    )


def _check_all(
    files: Sequence[ShardFile], checks: Checks, workers: int
) -> Iterator[tuple[int, CheckedShard]]:
    if workers <= 1 or len(files) <= 1:
        for number, shard in enumerate(files):
            yield number, check_shard(shard, checks)
        return
    with worker_processes(min(workers, len(files))) as executor:
        waiting = iter(enumerate(files))
        running: dict[Future[CheckedShard], int] = {}
        while True:
            # as many as there are processes, and some: a result holds the keys of its shard
            while len(running) < 2 * workers and (entry := next(waiting, None)) is not None:
                running[executor.submit(check_shard, entry[1], checks)] = entry[0]
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                number = running.pop(future)
                try:
                    checked = future.result()
                except BrokenProcessPool as error:
                    raise ShardError(
                        f"{files[number].path}: a process that checks shards was killed (by the "
                        "system, for want of memory?); use fewer workers"
                    ) from error
                yield number, checked


def _note_keys(folder: Path, number: int, checked: CheckedShard) -> None:
    """The hashes of the keys, and keys and offsets themselves, beside each other on disk."""
    # a bad sample has no key here, and the hash that is left out of the comparison
    hashes = [hash64(key.encode("utf-8")) if key else NO_IMAGE for key in checked.keys]
    array = np.array(hashes, np.uint64)
    write_run(folder / f"{number}.run", array, np.zeros_like(array))
    (folder / f"{number}.json").write_text(json.dumps([checked.keys, checked.offsets]))


def _repeated_across(
    files: Sequence[ShardFile], numbers: range, folder: Path
) -> Iterator[tuple[int, Finding]]:
    """All samples but the first of each key that several shards of a split have."""
    if len(numbers) < 2:
        return
    kept: OrderedDict[int, tuple[list[str], list[int]]] = OrderedDict()
    for group in equal_hashes([folder / f"{number}.run" for number in numbers], "key"):
        # hashes of 8 bytes may be equal by chance, so the keys themselves decide
        first: dict[str, int] = {}
        for run, row in group:
            number = numbers[run]
            if number not in kept:
                kept[number] = json.loads((folder / f"{number}.json").read_text())
                if len(kept) > KEPT_KEYS:
                    kept.popitem(last=False)
            keys, offsets = kept[number]
            key, offset = keys[row], offsets[row]
            if key in first:
                detail = f"sample {key!r} is in {files[first[key]].file} too"
                diagnosis = Diagnosis.KEY_IN_TWO_SHARDS
                yield number, Finding(files[number].file, key, offset, diagnosis, detail, row)
            else:
                first[key] = number


def _plain_tars(where: str) -> list[ShardFile]:
    directory = Path(where)
    if directory.is_dir():
        paths = sorted(directory.glob("*.tar"))
    elif directory.is_file():
        paths = [directory]
    else:
        # braces promise every file they name, stars what is there
        patterns = expand_braces(where)
        names = [
            name
            for pattern in patterns
            for name in (sorted(glob(pattern)) if has_magic(pattern) else [pattern])  # noqa: PTH207
        ]
        paths = [Path(name) for name in names]
    if not any(path.is_file() for path in paths):
        raise ShardError(f"{where}: no data set and no tar here; name a folder, a tar or a pattern")
    same_folder = len({path.parent for path in paths}) == 1
    return [ShardFile(path, path.name if same_folder else str(path)) for path in paths]


def _splits_by_name(tars: Sequence[Path]) -> dict[str, list[ShardFile]]:
    """What the manifest would say of tars whose names `write_shards` gave."""
    splits: dict[str, list[ShardFile]] = {}
    for tar in tars:
        split = tar.stem.rpartition("-")[0]
        split = split if SPLIT.fullmatch(split) else ONLY_SPLIT
        splits.setdefault(split, []).append(ShardFile(tar, tar.name))
    return splits
