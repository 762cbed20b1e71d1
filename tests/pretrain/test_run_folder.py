"""A run's folder is used by one job, and gone on with only by the run that it is of."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from groundwork.data.knowledge.index import Entry, write_index
from groundwork.data.text import load_tokenizer, train_tokenizer
from groundwork.pretrain.engine.checkpoint import CheckpointError, complete_checkpoints
from groundwork.pretrain.recipe import Recipe, load_recipe
from groundwork.pretrain.run import check_inputs

pytestmark = pytest.mark.multirank


def write_knowledge(path: Path, gloss: str) -> None:
    entry = Entry("tiny", "disc.n.01", "n", ("disc",), gloss)
    write_index(
        *(path,),
        **{"source": "tiny", "source_version": "1", "licence": "CC0"},
        **{"entries": [entry], "terms": {"disc": [0]}},
    )


def settings(folder: Path) -> list[str]:
    return [
        *(f"data.shards={folder / 'shards'}", f"data.knowledge.index={folder / 'tiny.gkb'}"),
        *("train.steps=2", "checkpoint.every_steps=1", "data.workers=0"),
    ]


@pytest.fixture(scope="module")
def started(tiny_recipe: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, knowledge and a finished run; another start had left a tokenizer."""
    folder = tmp_path_factory.mktemp("started")
    shutil.copytree(tiny_shards, folder / "shards")
    write_knowledge(folder / "tiny.gkb", "a flat round thing")
    train_tokenizer(["zebra quagga okapi"] * 9, 520, 12).save(folder / "run" / "tokenizer")
    command = [str(Path(sys.executable).parent / "groundwork"), "pretrain", str(tiny_recipe)]
    for setting in settings(folder):
        command += ["--set", setting]
    done = subprocess.run(
        [*command, "--out", str(folder / "run")], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def job(started: Path, tiny_recipe: Path, tmp_path: Path) -> Iterator[tuple[Recipe, Path]]:
    """(recipe, run) of a copy of `started` at the same path as ever."""
    kept = tmp_path / "kept"
    shutil.copytree(started, kept)
    yield load_recipe(str(tiny_recipe), settings(started)), started / "run"
    shutil.rmtree(started)
    shutil.copytree(kept, started)


def test_a_new_run_does_not_take_over_the_tokenizer_of_a_failed_start(started: Path) -> None:
    vocabulary = load_tokenizer(started / "run" / "tokenizer", 12).vocabulary
    assert "disc</w>" in vocabulary
    assert "okapi</w>" not in vocabulary


def test_the_same_run_goes_on(job: tuple[Recipe, Path]) -> None:
    check_inputs(*job)


def test_changed_class_names_are_refused(job: tuple[Recipe, Path], started: Path) -> None:
    path = started / "shards" / "concepts.json"
    path.write_text(path.read_text().replace("red disc", "red coin"))
    with pytest.raises(CheckpointError, match=r"other class names.*--out"):
        check_inputs(*job)


def test_changed_knowledge_is_refused(job: tuple[Recipe, Path], started: Path) -> None:
    write_knowledge(started / "tiny.gkb", "a flat round sort")
    with pytest.raises(CheckpointError, match=r"another knowledge index.*tiny\.gkb.*--out"):
        check_inputs(*job)


@pytest.mark.parametrize("damage", ["truncated", "another file", "no files"])
def test_a_damaged_record_says_what_to_do(damage: str, job: tuple[Recipe, Path]) -> None:
    recipe, out = job
    earlier, last = complete_checkpoints(out)
    record = last / "checkpoint.json"
    values = json.loads(record.read_text())
    record.write_text(
        {
            "truncated": record.read_text()[:100],
            "another file": "[]",
            "no files": json.dumps({k: v for k, v in values.items() if k != "files"}),
        }[damage]
    )
    with pytest.raises(CheckpointError, match=f"Delete the folder {last}.*{earlier.name}"):
        check_inputs(recipe, out)
    shutil.rmtree(last)
    check_inputs(recipe, out)


def test_a_garbled_pointer_to_the_last_checkpoint_is_passed_over(job: tuple[Recipe, Path]) -> None:
    recipe, out = job
    (out / "checkpoints" / "latest").write_bytes(b"\xff\xfe\x00step")
    check_inputs(recipe, out)


def test_a_second_training_in_the_folder_is_refused(
    start_job: Callable[..., Any], tiny_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    os.write(handle, b"process 77 on here")
    fcntl.lockf(handle, fcntl.LOCK_EX)
    try:
        second = start_job(
            *("pretrain", str(tiny_recipe), "--out", str(out), "--ranks", "2"),
            launcher="groundwork",
        )
        assert second.wait(60) == 1
    finally:
        os.close(handle)
    assert second.text().count("error:") == 1
    for part in ("another training", "process 77 on here", "--out"):
        assert part in second.text()
    assert "Traceback" not in second.text()
    assert [path.name for path in out.iterdir()] == [".lock"]
