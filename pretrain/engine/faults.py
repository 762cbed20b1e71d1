"""Bad samples: collected on every rank, agreed on, written to `quarantine.jsonl`, and bounded."""

import json
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from groundwork.data.stream import BadDataError, Fault
from groundwork.pretrain.engine.deepspeed_config import World

QUARANTINE = "quarantine.jsonl"
#: Bad samples a run may meet whatever its budget, so that one early fault does not end it.
GRACE = 3


class Quarantine:
    """The bad samples of a run, over all ranks.

    budget: fraction of the samples read that may be bad. count: bad samples so far, all ranks.
    """

    def __init__(self, out: Path, budget: float, *, count: int, position: int, is_main: bool):
        self.path, self.budget, self.count, self.is_main = out / QUARANTINE, budget, count, is_main
        self._pending: list[Fault] = []
        if is_main:
            _forget_from(self.path, position)

    def add(self, faults: tuple[Fault, ...]) -> None:
        """Note this rank's bad samples of one micro-batch."""
        self._pending.extend(faults)

    @property
    def pending(self) -> int:
        """This rank's bad samples since the last `collect`."""
        return len(self._pending)

    def collect(self, total: int, samples: int, world: World) -> None:
        """Write down the pending ones of all ranks. Collective where total > 0.

        total: sum of `pending` over the ranks, known to all. samples: read so far by the run.
        Raises BadDataError, on every rank, when the budget is exceeded.
        """
        if not total:
            return
        gathered: list[list[Fault]] = [[] for _ in range(world.size)]
        dist.all_gather_object(gathered, self._pending)
        self._pending = []
        faults = sorted((f for part in gathered for f in part), key=lambda f: f.position)
        if self.is_main:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(fault)) + "\n" for fault in faults)
        self.count += len(faults)
        if self.count > GRACE and self.count > self.budget * samples:
            listed = "\n  ".join(f"{f.shard}: {f.key}: {f.reason}" for f in faults[:5])
            raise BadDataError(
                f"{self.count} of {samples:,} samples could not be used, more than "
                f"data.bad_sample_budget allows ({self.budget:g} of them). The last ones:\n"
                f"  {listed}\nAll are listed in {self.path}. Mend the shards, or raise the budget "
                "(--set data.bad_sample_budget=0.01)"
            )


def _forget_from(path: Path, position: int) -> None:
    """Drop records of positions that a resumed run will read again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["position"] < position:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    path.write_text("".join(f"{line}\n" for line in kept))
