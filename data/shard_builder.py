"""Building a data set with several processes, such that a killed build goes on where it stopped.

A source that can be divided lists its *units*: JSON values, each of which says which part of the
raw data it stands for, by whatever changes with it (names, sizes, times of files). Worker processes
turn units into finished shards in a hidden folder beside the data set, and note each unit that is
done in a journal of its own, under the digest of the unit and the settings. A later build takes
over the shards of all units that it finds in this way, whole by size and checksum; so mending one
file makes anew what holds that file, and no more. When all units are done their shards are numbered
in the order of the units. Which process made what, and when, leaves no trace: the same units give
the same bytes.
"""

import hashlib
import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import google_crc32c

from groundwork.data.atomic import write_atomically
from groundwork.data.samples import Concept, Sample
from groundwork.data.shard_index import ShardError, index_path, read_index
from groundwork.data.shards import (
    Manifest,
    check_encodable,
    data_set_written_atomically,
    file_checksum,
    finish_data_set,
    no_sample,
    shard_name,
)
from groundwork.data.split_writer import (
    ShardLimits,
    WrittenShard,
    WrittenSplit,
    run_path,
    write_splits,
)
from groundwork.data.statistics import SplitStatistics
from groundwork.data.worker_processes import worker_processes

#: A unit: what `json.dumps` takes.
Unit = Any
Note = Callable[[str], None]
ReadUnit = Callable[[Unit, Note], Iterable[tuple[str, Sample]]]

#: Changes when the same unit gives other bytes than before, so that no older shard is taken over.
BUILD_VERSION: Final = 1
#: Units that are handed out ahead of the first unfinished one, per worker.
LOOK_AHEAD: Final = 4


@dataclass(frozen=True)
class Progress:
    """How far a build is. resumed: units that an earlier, unfinished build had done already."""

    units: int
    total_units: int
    samples: int
    resumed: int


@dataclass(frozen=True)
class _UnitShards:
    """A finished unit, as its journal says."""

    splits: Mapping[str, WrittenSplit]
    notes: tuple[str, ...]
    is_resumed: bool = False

    @property
    def samples(self) -> int:
        return sum(split.statistics.samples for split in self.splits.values())


@dataclass(frozen=True)
class _Task:
    """What every worker knows; with a unit it makes the shards of that unit."""

    read: ReadUnit
    parts: Path
    name: str
    limits: ShardLimits

    def __call__(self, digest: str, unit: Unit) -> _UnitShards:
        """Take over the shards of a unit if they are whole, otherwise make them."""
        if (done := _resumed(self.parts, digest)) is not None:
            return done
        notes: list[str] = []
        splits = write_splits(
            self.read(unit, notes.append),
            self.parts,
            name=self.name,
            limits=self.limits,
            prefix=f"{digest}.",
            sync=True,
        )
        done = _UnitShards(splits, tuple(notes))
        write_atomically(_journal(self.parts, digest), _encode(done))
        return done


def build_shards(
    units: Sequence[Unit],
    read: ReadUnit,
    out: Path,
    *,
    name: str,
    source: Mapping[str, Any],
    licence: str,
    concepts: Iterable[Concept] = (),
    workers: int = 1,
    max_samples: int = ShardLimits.max_samples,
    max_bytes: int = ShardLimits.max_bytes,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_note: Note = lambda _: None,
) -> Manifest:
    """Write the samples of all units as the data set folder `out`; all of it appears, or nothing.

    units: in the order that the samples are to have. A shard ends with its unit, so a unit is best
        about as large as a shard, and of one split.
    read: yields the (split, sample) pairs of a unit, the same ones in the same order every time;
        what it says to the second argument is passed to `on_note`. With several workers it has to
        be picklable, and the calling script needs the usual `if __name__ == "__main__"` guard.
    Finished shards of a build that ended early are kept in `.NAME.parts` beside `out`, for the next
    call with the same arguments. Raises as `write_shards` does.
    """
    limits, concepts = ShardLimits(max_samples, max_bytes), list(concepts)
    if workers < 1:
        raise ValueError(f"workers is {workers}; give at least 1")
    check_encodable(source, concepts)
    digests = _digests(units, name, source, limits)
    parts = parts_folder(out)
    with data_set_written_atomically(out) as directory:
        _clean(parts, digests)
        task = _Task(read, parts, name, limits)
        with _keeping_what_is_finished(out, len(units), on_note):
            finished = _build_units(task, digests, units, workers, on_progress, on_note)
            splits = _link_shards(finished, directory)
            if not splits:
                shutil.rmtree(parts)
                raise no_sample(name, out)
            manifest = finish_data_set(
                directory, splits, name=name, source=source, licence=licence, concepts=concepts
            )
    shutil.rmtree(parts, ignore_errors=True)
    return manifest


def _build_units(
    task: _Task,
    digests: Sequence[str],
    units: Sequence[Unit],
    workers: int,
    on_progress: Callable[[Progress], None],
    on_note: Note,
) -> list[_UnitShards]:
    """Finish all units, and tell of each in their order."""
    finished: list[_UnitShards] = []
    samples = resumed = 0
    with closing(_finished_units(task, digests, units, workers)) as in_order:
        for unit in in_order:
            finished.append(unit)
            samples, resumed = samples + unit.samples, resumed + unit.is_resumed
            for note in unit.notes:
                on_note(note)
            on_progress(Progress(len(finished), len(units), samples, resumed))
    return finished


def parts_folder(out: Path) -> Path:
    """Where the shards of an unfinished build of `out` are kept."""
    out = out.resolve()
    return out.with_name(f".{out.name}.parts")


@contextmanager
def _keeping_what_is_finished(out: Path, total_units: int, on_note: Note) -> Iterator[None]:
    """After an error, say what is left for the next build; leave nothing where no unit is done."""
    parts = parts_folder(out)
    try:
        yield
    except BaseException as error:
        if done := sum(1 for _ in parts.glob("*.json")):
            on_note(
                f"{done} of {total_units} units are finished and kept in {parts}: the same "
                "command goes on from there; delete that folder if it is not wanted"
            )
        else:
            shutil.rmtree(parts, ignore_errors=True)
        if isinstance(error, BrokenProcessPool):
            raise ShardError(
                f"{out}: a worker process died, most likely because memory ran out; start again "
                "with fewer --workers, and the build goes on where it stopped"
            ) from error
        if isinstance(error, OSError) and (
            error.filename is None or Path(error.filename).parent == parts
        ):
            error.filename = str(out)  # the hidden folder means nothing to who reads this
        raise


def _digests(
    units: Sequence[Unit], name: str, source: Mapping[str, Any], limits: ShardLimits
) -> list[str]:
    """What tells each unit, with all that its shards depend on."""
    settings = json.dumps([BUILD_VERSION, dict(source), asdict(limits)], sort_keys=True)
    digests = [
        hashlib.sha256(f"{settings}\n{json.dumps(unit, sort_keys=True)}".encode()).hexdigest()[:32]
        for unit in units
    ]
    if len(set(digests)) != len(digests):
        raise ShardError(f"source {name!r} lists a unit twice, so its samples would come twice")
    return digests


def _clean(parts: Path, digests: Sequence[str]) -> None:
    """Make the folder of finished units, with nothing in it but what belongs to these."""
    parts.mkdir(exist_ok=True)
    done = {file.stem for file in parts.glob("*.json")}.intersection(digests)
    for file in parts.iterdir():
        if file.name.partition(".")[0] not in done:
            file.unlink()


def _finished_units(
    task: _Task, digests: Sequence[str], units: Sequence[Unit], workers: int
) -> Generator[_UnitShards]:
    """The units in order, made or taken over by as many processes."""
    if workers == 1:
        yield from map(task, digests, units)
        return
    waiting = iter(zip(digests, units, strict=True))
    # units in the making are finished at the end, and taken over by the next build
    with worker_processes(min(workers, len(units) or 1)) as executor:
        pending: deque[Future[_UnitShards]] = deque(
            executor.submit(task, *unit) for unit in islice(waiting, LOOK_AHEAD * workers)
        )
        while pending:
            finished = pending.popleft().result()
            pending.extend(executor.submit(task, *unit) for unit in islice(waiting, 1))
            yield finished


def _link_shards(
    units: Sequence[_UnitShards], directory: Path
) -> dict[str, tuple[WrittenSplit, ...]]:
    """Give all shards their final names in `directory`; returns what was written, by split.

    They are linked rather than moved, so that a kill from here on loses nothing either.
    """
    splits: dict[str, list[WrittenSplit]] = {}
    numbers: Counter[str] = Counter()
    for unit in units:
        for split, written in unit.splits.items():
            splits.setdefault(split, []).append(written)
            for shard in written.shards:
                final = directory / shard_name(split, numbers[split])
                _link(shard.path, final)
                _link(index_path(shard.path), index_path(final))
                numbers[split] += 1
    return {split: tuple(parts) for split, parts in splits.items()}


def _link(present: Path, final: Path) -> None:
    try:
        final.hardlink_to(present)
    except OSError:  # a file system without links
        present.rename(final)


def _journal(parts: Path, digest: str) -> Path:
    return parts / f"{digest}.json"


def _encode(unit: _UnitShards) -> bytes:
    record = {
        "splits": {
            split: {
                "shards": [{**asdict(s), "path": s.path.name} for s in written.shards],
                "statistics": written.statistics.record(),
            }
            for split, written in unit.splits.items()
        },
        "notes": unit.notes,
    }
    return json.dumps(record).encode()


def _resumed(parts: Path, digest: str) -> _UnitShards | None:
    """What an earlier build made of a unit, if all of it is there and whole."""
    try:
        record = json.loads(_journal(parts, digest).read_bytes())
        splits = {
            split: WrittenSplit(
                tuple(
                    WrittenShard(**{**shard, "path": parts / Path(shard["path"]).name})
                    for shard in written["shards"]
                ),
                SplitStatistics.from_record(written["statistics"]),
            )
            for split, written in record["splits"].items()
        }
        shards = [shard for written in splits.values() for shard in written.shards]
        if all(map(_is_whole, shards)):
            return _UnitShards(splits, tuple(map(str, record["notes"])), is_resumed=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not finished, or damaged by a crash: it is made again
    return None


def _is_whole(shard: WrittenShard) -> bool:
    return (
        shard.path.stat().st_size == shard.bytes
        and file_checksum(shard.path) == shard.crc32c
        and len(read_index(index_path(shard.path), shard.path)) == shard.samples
        and google_crc32c.value(run_path(shard.path).read_bytes()) == shard.run_crc32c
    )
