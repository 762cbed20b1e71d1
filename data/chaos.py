"""Kill a stream at random, resume it on another topology, and count what was lost or doubled.

A trial reads a mixture of two data sets, some of whose samples are bad, with packed texts. Its
ranks note what they read and save the stream's state now and then, until they are killed: one of
them, all of them, or a worker of theirs. Other ranks, of another number and with other workers, go
on from the saved state, until the last step. What was read after the last save counts for nothing,
as in a training that goes back to its checkpoint. In the end every position must have been read
once, with the very sample and tokens of an undisturbed run.
"""

import json
import multiprocessing
import os
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from groundwork.data.atomic import write_atomically
from groundwork.data.batch_plan import BatchPlan
from groundwork.data.dataset import open_dataset
from groundwork.data.mixture import Mixture
from groundwork.data.packing import PackedTokens, pack_tokens
from groundwork.data.samples import Sample, SampleError
from groundwork.data.shards import write_shards
from groundwork.data.stream import Source, Stream

CAPACITY = 64
STATE = "state.json"
#: Seconds a rank waits for the others.
PATIENCE_S = 60.0
#: Attempts after which a trial is taken to hang.
MAX_ATTEMPTS = 60
SAVE_EVERY = 3  # steps


class Topology(NamedTuple):
    ranks: int
    workers: int
    micro_batch: int


@dataclass(frozen=True)
class Outcome:
    """Of all trials. lost, duplicated: positions. kills: processes or jobs that were killed."""

    trials: int
    kills: int
    lost: int
    duplicated: int


class Record(NamedTuple):
    """One position as it was read: sample and the checksum of its tokens."""

    position: int
    key: str
    tokens: int


class Example(NamedTuple):
    key: str
    ids: list[int]


def run_trials(
    trials: int, seed: int, folder: Path, on_trial: Callable[[int], object] = lambda _: None
) -> Outcome:
    """Run the trials in an empty folder. Raises TimeoutError where one hangs."""
    stream = _build_stream(folder / "data", seed)
    lost = duplicated = kills = 0
    for trial in range(trials):
        rng = np.random.default_rng([seed, trial])
        global_batch = int(rng.integers(8, 40))
        steps = int(rng.integers(12, 40))
        expected = Counter(_records(stream, global_batch * steps))
        work = folder / f"trial-{trial}"
        seen, killed = _run_trial(stream, global_batch, steps, work, rng)
        lost += sum((expected - seen).values())
        duplicated += sum((seen - expected).values())
        kills += killed
        on_trial(trial)
    return Outcome(trials, kills, lost, duplicated)


# ---- what is read ----


def _build_stream(folder: Path, seed: int) -> Stream[Example]:
    """Two data sets of unlike sizes; about one sample in thirty is bad."""
    words = [f"w{i}" for i in range(97)]

    def samples(number: int, name: str) -> Iterator[tuple[str, Sample]]:
        rng = np.random.default_rng([seed, number])
        for i in range(number):
            text = " ".join(rng.choice(words, int(rng.integers(1, 30))))
            is_bad = rng.random() < 1 / 30
            yield "train", Sample(f"{name}{i:05d}", b"\0", "png", "" if is_bad else text)

    sources = []
    for number, name, block in ((311, "a", 60), (173, "b", None)):
        out = folder / name
        write_shards(
            *(samples(number, name), out), name=name, source={}, licence="CC0", max_samples=29
        )
        sources.append(Source(open_dataset(str(out)), _decode, name, block))
    return Stream(sources, seed=seed, mixture=Mixture({0: [0.7, 0.3], 150: [0.4, 0.6]}))


def _decode(sample: Sample, rng: np.random.Generator) -> Example:
    if not sample.text:
        raise SampleError("no caption")
    ids = [zlib.crc32(word.encode()) % 30_000 for word in sample.text.split()]
    return Example(sample.key, list(rng.permutation(ids)))


def _collate(examples: list[Example]) -> tuple[PackedTokens, list[Example]]:
    return pack_tokens([example.ids for example in examples], CAPACITY), examples


def _records(stream: Stream[Example], positions: int) -> Iterator[Record]:
    """What an undisturbed run reads."""
    examples, _ = stream.__getitems__(list(range(positions)))
    for position, example in enumerate(examples):
        yield Record(position, example.key, _checksum(example.ids))


def _checksum(ids: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(ids, "<i8").tobytes())


# ---- one trial ----


def _run_trial(
    stream: Stream[Example], global_batch: int, steps: int, folder: Path, rng: np.random.Generator
) -> tuple[Counter[Record], int]:
    """What was read for good, and how many times something was killed."""
    folder.mkdir(parents=True)
    seen: Counter[Record] = Counter()
    done = kills = attempt = 0
    while done < steps:
        if attempt == MAX_ATTEMPTS:
            raise TimeoutError(f"{folder.name}: {done} of {steps} steps in {attempt} attempts")
        topology = _draw_topology(global_batch, rng)
        logs = folder / f"attempt-{attempt}"
        logs.mkdir()
        job = _Job(stream, global_batch, steps, done, topology, folder, logs)
        # the later, the more likely to get to the end
        kills += job.run(rng, patience=float(rng.uniform(0.02, 0.25)) * min(1 + attempt, 40))
        saved = _saved_step(folder)
        for record, step in _read_logs(logs):
            if done <= step < saved:
                seen[record] += 1
        done, attempt = saved, attempt + 1
    return seen, kills


def _draw_topology(global_batch: int, rng: np.random.Generator) -> Topology:
    while True:
        topology = Topology(
            int(rng.choice([1, 2, 3, 5])), int(rng.integers(0, 3)), int(rng.integers(1, 9))
        )
        try:
            BatchPlan(global_batch, topology.micro_batch, topology.ranks, 0)
        except ValueError:
            continue  # a rank without a sample
        return topology


def _saved_step(folder: Path) -> int:
    state = folder / STATE
    return int(json.loads(state.read_bytes())["step"]) if state.exists() else 0


def _read_logs(logs: Path) -> Iterator[tuple[Record, int]]:
    for log in sorted(logs.iterdir()):
        for line in log.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # the last one may be cut off
                step, *record = json.loads(line)
                yield Record(*record), step


class _Job:
    """The ranks of one attempt."""

    def __init__(
        self,
        stream: Stream[Example],
        global_batch: int,
        steps: int,
        first_step: int,
        topology: Topology,
        folder: Path,
        logs: Path,
    ) -> None:
        self.stream, self.topology = stream, topology
        self.global_batch, self.steps, self.first_step = global_batch, steps, first_step
        self.folder, self.logs = folder, logs
        context = multiprocessing.get_context("fork")
        self.progress = context.Array("q", [first_step] * topology.ranks)
        self.processes = [
            context.Process(target=self._run_rank, args=(rank,)) for rank in range(topology.ranks)
        ]

    def run(self, rng: np.random.Generator, patience: float) -> int:
        """Run until the end or for `patience` seconds, then kill. Returns the number of kills."""
        for process in self.processes:
            process.start()
        try:
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                if all(process.exitcode == 0 for process in self.processes):
                    return 0
                time.sleep(0.005)
            victims = self._victims(rng)
            for victim in victims:
                _kill(victim)
            return min(1, len(victims))
        finally:
            self._end()

    def _victims(self, rng: np.random.Generator) -> list[psutil.Process]:
        alive = [psutil.Process(p.pid) for p in self.processes if p.is_alive()]
        if not alive:
            return []
        kind = rng.choice(["rank", "job", "worker"])
        if kind == "job":
            return alive
        one = alive[int(rng.integers(len(alive)))]
        try:
            workers = one.children(recursive=True) if kind == "worker" else []
        except psutil.NoSuchProcess:
            workers = []
        return [workers[int(rng.integers(len(workers)))]] if workers else [one]

    def _end(self) -> None:
        """What a launcher does when a rank has died: end the others, and their workers."""
        time.sleep(0.01)  # survivors go on a little, as they do until the launcher notices
        for process in self.processes:
            if process.is_alive():
                try:
                    family = psutil.Process(process.pid)
                    members = [family, *family.children(recursive=True)]
                except psutil.NoSuchProcess:
                    members = []
                for member in members:
                    _kill(member)
            process.join()

    def _run_rank(self, rank: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # what a dying rank complains about is no news here
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        plan = BatchPlan(self.global_batch, self.topology.micro_batch, self.topology.ranks, rank)
        positions = plan.micro_batches(self.first_step, self.steps)
        batches = self.stream.batches(
            plan,
            _collate,
            first_step=self.first_step,
            last_step=self.steps,
            workers=self.topology.workers,
        )
        log = os.open(self.logs / f"rank-{rank}.jsonl", os.O_WRONLY | os.O_CREAT)
        for step in range(self.first_step, self.steps):
            lines = []
            for _ in range(plan.accumulation):
                packed, examples = next(batches).data
                for place, (position, example) in enumerate(
                    zip(next(positions), examples, strict=True)
                ):
                    tokens = _checksum(_unpacked(packed, place, len(example.ids)))
                    lines.append(json.dumps([step, position, example.key, tokens]) + "\n")
            os.write(log, "".join(lines).encode())
            self.progress[rank] = step + 1
            self._wait_for_others(step + 1)
            if rank == 0 and ((step + 1) % SAVE_EVERY == 0 or step + 1 == self.steps):
                state = {"step": step + 1, "position": (step + 1) * self.global_batch}
                write_atomically(self.folder / STATE, json.dumps(state).encode())

    def _wait_for_others(self, step: int) -> None:
        """What the collectives of a training step do."""
        deadline = time.monotonic() + PATIENCE_S
        while min(self.progress[:]) < step:
            if time.monotonic() > deadline:
                raise TimeoutError(f"a rank does not come to step {step}")
            time.sleep(0.0005)


def _unpacked(packed: PackedTokens, place: int, length: int) -> Any:
    row, start = int(packed.rows[place]), int(packed.starts[place])
    return packed.ids[row, start : start + length].numpy()


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()
