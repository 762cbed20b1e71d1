"""A stopped or killed run goes on bit for bit: two ranks, ZeRO-3, real processes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from groundwork.pretrain.engine.checkpoint import complete_checkpoints, require_checkpoint
from groundwork.pretrain.weights.zero_shards import state_digest

pytestmark = pytest.mark.multirank
STEPS = 40


def metrics(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # the last line, while it is being written
    return lines


def steps_done(out: Path) -> int:
    return max((line["step"] for line in metrics(out)), default=0)


def losses(out: Path) -> list[tuple[int, float, float]]:
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(out)]


@pytest.fixture(scope="module")
def uninterrupted(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted")
    command = [str(Path(sys.executable).parent / "groundwork"), "pretrain", str(tiny_recipe)]
    done = subprocess.run(
        [*command, "--out", str(out), "--ranks", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps_done(out) == STEPS
    return out


def assert_same_run(out: Path, uninterrupted: Path) -> None:
    assert losses(out) == losses(uninterrupted)
    last, expected = require_checkpoint(out), require_checkpoint(uninterrupted)
    assert last.name == expected.name == f"step-{STEPS:08d}"
    assert state_digest(last) == state_digest(expected)


@pytest.mark.parametrize("victim", ["one rank", "everything"])
def test_a_killed_run_resumes_bit_for_bit(
    victim: str,
    start_job: Callable[..., Any],
    tiny_recipe: Path,
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    arguments = (str(tiny_recipe), "--out", str(out))
    job = start_job(*arguments)
    job.wait_for(lambda: steps_done(out) >= 10)
    if victim == "everything":
        job.kill()
    else:
        ranks = [
            child
            for child in psutil.Process(job.process.pid).children(recursive=True)
            if "--local_rank=1" in child.cmdline()
        ]
        ranks[0].send_signal(signal.SIGKILL)
        assert job.wait(60) != 0
    assert steps_done(out) < STEPS
    again = start_job(*arguments)
    assert again.wait() == 0, again.text()
    assert "resuming from" in again.text()
    assert_same_run(out, uninterrupted)


def test_sigterm_saves_and_the_printed_command_goes_on(
    start_job: Callable[..., Any], tiny_recipe: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = start_job(
        *("pretrain", str(tiny_recipe), "--out", str(out), "--ranks", "2"), launcher="groundwork"
    )
    job.wait_for(lambda: steps_done(out) >= 9)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0, job.text()
    stopped = require_checkpoint(out)
    assert 0 < steps_done(out) < STEPS
    assert stopped.name == f"step-{steps_done(out):08d}"
    printed = job.text().split("to go on, run\n")[1].splitlines()[0]
    command = shlex.split(printed)
    assert command[0] == "groundwork"
    again = start_job(*command[1:], launcher="groundwork")
    assert again.wait() == 0, again.text()
    assert_same_run(out, uninterrupted)


def test_sigterm_while_the_ranks_start_ends_the_job_well(
    start_job: Callable[..., Any], tiny_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = start_job(
        *("pretrain", str(tiny_recipe), "--out", str(out), "--ranks", "2"), launcher="groundwork"
    )
    job.wait_for(lambda: len(psutil.Process(job.process.pid).children()) == 2)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0, job.text()
    assert "stopped before the first step" in job.text()
    assert "ended with status" not in job.text()


def test_only_the_last_checkpoints_are_kept(uninterrupted: Path) -> None:
    assert [c.name for c in complete_checkpoints(uninterrupted)] == [
        "step-00000035",
        "step-00000040",
    ]
    assert (uninterrupted / "checkpoints" / "latest").read_text() == "step-00000040"
