"""Launch choices: measured only when asked, kept on disk, and never in the way."""

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from groundwork.kernels import autotune
from groundwork.kernels.autotune import Table, choose, make_table
from groundwork.kernels.cuda_compiler import CudaCompileError


class Choice(NamedTuple):
    threads: int


CHOICES = (Choice(128), Choice(64), Choice(256))
SOURCES = ("dcnv3.cu", "dcnv3_tile.cu")


class FakeGpu:
    """Runs take as long as `milliseconds` says; those that it does not name do not run at all."""

    def __init__(self, milliseconds: dict[Choice, float]) -> None:
        self.milliseconds = milliseconds
        self.launched: list[Choice] = []

    def launch(self, choice: Choice) -> None:
        if choice not in self.milliseconds:
            raise CudaCompileError(f"{choice} does not run here")
        self.launched.append(choice)

    def timer(self, run: Callable[[], None]) -> float:
        run()
        return self.milliseconds[self.launched[-1]]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.setenv("GROUNDWORK_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    return make_table("NVIDIA H100 80GB HBM3", "sm_90", SOURCES)


def again(table: Table) -> Table:
    """The table as a later process reads it."""
    return Table(table.path, table.identity)


def test_nothing_is_measured_or_written_unless_asked(table: Table) -> None:
    gpu = FakeGpu(dict.fromkeys(CHOICES, 1.0))
    assert choose(table, "op", CHOICES, gpu.launch, False, gpu.timer) == Choice(128)
    assert gpu.launched == []
    assert list(table.path.parent.iterdir()) == []


def test_the_fastest_choice_is_kept_for_later_processes(table: Table) -> None:
    gpu = FakeGpu({Choice(128): 1.0, Choice(64): 0.5, Choice(256): 0.7})
    assert choose(table, "op", CHOICES, gpu.launch, True, gpu.timer) == Choice(64)
    assert len(gpu.launched) == 3
    assert choose(again(table), "op", CHOICES, gpu.launch, True, gpu.timer) == Choice(64)
    assert choose(again(table), "op", CHOICES, gpu.launch, False, gpu.timer) == Choice(64)
    assert choose(again(table), "other", CHOICES, gpu.launch, False, gpu.timer) == Choice(128)
    assert len(gpu.launched) == 3


def test_the_default_stays_where_another_is_faster_by_noise_only(table: Table) -> None:
    gpu = FakeGpu({Choice(128): 1.0, Choice(64): 0.99, Choice(256): 2.0})
    assert choose(table, "op", CHOICES, gpu.launch, True, gpu.timer) == Choice(128)


def test_a_choice_that_does_not_run_is_passed_over(table: Table) -> None:
    gpu = FakeGpu({Choice(64): 0.5, Choice(256): 0.4})
    assert choose(table, "op", CHOICES, gpu.launch, True, gpu.timer) == Choice(256)


def test_where_nothing_runs_the_default_is_left_to_say_so(table: Table) -> None:
    gpu = FakeGpu({})
    assert choose(table, "op", CHOICES, gpu.launch, True, gpu.timer) == Choice(128)
    assert not table.path.exists()


def test_nothing_is_measured_while_a_graph_is_captured(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    gpu = FakeGpu(dict.fromkeys(CHOICES, 1.0))
    assert choose(table, "op", CHOICES, gpu.launch, True, gpu.timer) == Choice(128)
    assert gpu.launched == []


@pytest.mark.parametrize("value", ["1", "0", "", None])
def test_the_environment_asks(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GROUNDWORK_TUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("GROUNDWORK_TUNE", value)
    assert autotune.wanted() == (value == "1")


def damaged(table: Table, how: str) -> str | bytes:
    good = {"made_for": table.identity, "entries": {"op": {"choice": "Choice(threads=64)"}}}
    contents: dict[str, Any] = {
        "cut off": json.dumps(good)[:-5],
        "not text": b"\xff\x00\x80",
        "empty": "",
        "a list": "[1, 2]",
        "nested": "[" * 100_000,
        "of another device": json.dumps({**good, "made_for": {"device": "A100"}}),
        "entries are no mapping": json.dumps({**good, "entries": [1]}),
        "an entry is no mapping": json.dumps({**good, "entries": {"op": 5}}),
        "an unknown choice": json.dumps(
            {**good, "entries": {"op": {"choice": "Choice(threads=7)"}}}
        ),
    }
    content: str | bytes = contents[how]
    return content


@pytest.mark.parametrize(
    "how",
    [
        *("cut off", "not text", "empty", "a list", "nested", "of another device"),
        *("entries are no mapping", "an entry is no mapping", "an unknown choice"),
    ],
)
def test_a_damaged_or_foreign_table_counts_as_empty_and_is_replaced(table: Table, how: str) -> None:
    content = damaged(table, how)
    table.path.write_bytes(content if isinstance(content, bytes) else content.encode())
    gpu = FakeGpu({Choice(128): 1.0, Choice(64): 2.0, Choice(256): 0.5})
    table = again(table)
    assert choose(table, "op", CHOICES, gpu.launch, False, gpu.timer) == Choice(128)
    assert choose(table, "op", CHOICES, gpu.launch, True, gpu.timer) == Choice(256)
    assert choose(again(table), "op", CHOICES, gpu.launch, False, gpu.timer) == Choice(256)


def test_devices_and_versions_of_the_sources_have_tables_of_their_own(table: Table) -> None:
    other = make_table("NVIDIA A100-SXM4-40GB", "sm_80", SOURCES)
    fewer = make_table("NVIDIA H100 80GB HBM3", "sm_90", SOURCES[:1])
    assert len({table.path, other.path, fewer.path}) == 3


def _tune_in_a_process(table: Table, key: str, ranks: Any) -> None:
    gpu = FakeGpu({Choice(128): 1.0, Choice(64): 0.5, Choice(256): 2.0})

    def slow(run: Callable[[], None]) -> float:
        time.sleep(0.05)
        return gpu.timer(run)

    chosen = table.tune(key, CHOICES, gpu.launch, slow)
    ranks.put((chosen, len(gpu.launched)))


@pytest.mark.multirank
def test_ranks_that_ask_at_once_measure_once_and_lose_no_entry(table: Table) -> None:
    context = multiprocessing.get_context("fork")
    ranks = context.Queue()
    processes = [
        context.Process(target=_tune_in_a_process, args=(table, key, ranks))
        for key in ("op", "op", "op", "other")
    ]
    for process in processes:
        process.start()
    results = [ranks.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [tuple(chosen) for chosen, _ in results] == [(64,)] * 4
    assert sorted(launched for _, launched in results) == [0, 0, 3, 3]
    assert set(again(table).entries) == {"op", "other"}
