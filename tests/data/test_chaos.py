"""Kill and resume: nothing lost, nothing doubled, and a harness that would notice."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from groundwork.data import chaos
from groundwork.data.batch_plan import BatchPlan
from groundwork.launch.cli import app


def test_nothing_is_lost_or_doubled_when_streams_are_killed(tmp_path: Path) -> None:
    outcome = chaos.run_trials(5, 1, tmp_path)
    assert outcome.kills > 5
    assert (outcome.lost, outcome.duplicated) == (0, 0)


@pytest.mark.slow
def test_fifty_trials() -> None:
    result = CliRunner().invoke(app, ["shards", "chaos", "--trials", "50", "--seed", "0"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "lost=0 duplicated=0"


def test_a_resumed_run_that_is_off_by_one_sample_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = BatchPlan.micro_batches

    def shifted(plan: BatchPlan, first_step: int, last_step: int) -> Iterator[list[int]]:
        for positions in right(plan, first_step, last_step):
            yield [position + (first_step > 0) for position in positions]

    monkeypatch.setattr(BatchPlan, "micro_batches", shifted)
    outcome = chaos.run_trials(3, 0, tmp_path)
    assert outcome.lost > 0
    assert outcome.duplicated > 0


def test_the_command_says_so_on_its_last_line_and_leaves_no_process() -> None:
    program = "from groundwork.launch.cli import app; app()"
    command = [sys.executable, "-c", program, "shards", "chaos", "--trials", "4", "--seed", "3"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    last_line = job.communicate(timeout=300)[0].splitlines()[-1]
    assert (job.returncode, last_line) == (0, "lost=0 duplicated=0")
    # workers of a killed rank notice within a second
    deadline = time.monotonic() + 20
    while left := [pid for pid in psutil.pids() if _session(pid) == job.pid]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
