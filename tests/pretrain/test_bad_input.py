"""Mistakes a user makes with a training job: one message, status 1, nothing half-written."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from groundwork.data.dataset import open_dataset
from groundwork.data.samples import Sample
from groundwork.data.shards import read_concepts, write_shards
from groundwork.launch.cli import main
from groundwork.pretrain.engine.checkpoint import complete_checkpoints, read_state
from groundwork.pretrain.recipe import RecipeError, load_recipe
from groundwork.pretrain.run import batch_plan, engine_settings

pytestmark = pytest.mark.multirank


def run(
    start_job: Callable[..., Any],
    recipe: Path,
    out: Path,
    *settings: str,
    launcher: str = "groundwork",
) -> tuple[int, str]:
    arguments = ["pretrain"] if launcher == "groundwork" else []
    arguments += [str(recipe), "--out", str(out)]
    for setting in ("train.steps=6", *settings):
        arguments += ["--set", setting]
    job = start_job(*arguments, launcher=launcher)
    return job.wait(), job.text()


def assert_one_message(status: int, text: str, *parts: str) -> None:
    assert status == 1, text
    assert "Traceback" not in text
    assert text.count("error:") == 1
    for part in parts:
        assert part in text


@pytest.fixture(scope="module")
def partly_bad(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_shards` in which every eighth picture is a web page."""
    out = tmp_path_factory.mktemp("bad") / "shards"
    whole = open_dataset(str(tiny_shards), "train")

    def samples() -> Iterator[tuple[str, Sample]]:
        for number in range(len(whole)):
            sample = whole.read(number)
            image = b"<html>403</html>" if number % 8 == 0 else sample.image
            yield "train", Sample(sample.key, image, "png", sample.text, sample.info)

    concepts = read_concepts(tiny_shards)
    write_shards(samples(), out, name="bad", source={}, licence="CC0", concepts=concepts)
    return out


def test_bad_pictures_within_the_budget_are_quarantined(
    start_job: Callable[..., Any], tiny_recipe: Path, partly_bad: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = (f"data.shards={partly_bad}", "data.bad_sample_budget=0.5")
    status, text = run(start_job, tiny_recipe, out, *settings)
    assert status == 0, text
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert lines
    assert all("cannot be decoded" in line["reason"] for line in lines)
    assert {line["diagnosis"] for line in lines} == {"not-an-image"}
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["bad_samples"] == len(lines)


def test_bad_pictures_over_the_budget_end_the_run(
    start_job: Callable[..., Any], tiny_recipe: Path, partly_bad: Path, tmp_path: Path
) -> None:
    status, text = run(start_job, tiny_recipe, tmp_path / "run", f"data.shards={partly_bad}")
    assert_one_message(status, text, "data.bad_sample_budget", "cannot be decoded", "quarantine")


def test_a_checkpoint_between_two_log_steps_knows_its_bad_pictures(
    start_job: Callable[..., Any], tiny_recipe: Path, partly_bad: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = (f"data.shards={partly_bad}", "data.bad_sample_budget=0.5", "monitor.log_every=5")
    status, text = run(start_job, tiny_recipe, out, *settings, "checkpoint.every_steps=4")
    assert status == 0, text
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    before, after = (read_state(checkpoint) for checkpoint in complete_checkpoints(out))
    assert (before.step, after.step) == (4, 6)
    assert before.bad_samples == sum(line["position"] < before.position for line in lines) > 0
    assert after.bad_samples == len(lines)


def test_a_step_that_diverged_is_not_saved(
    start_job: Callable[..., Any], tiny_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = ("optimizer.lr=1e30", "schedule.warmup_steps=0", "train.gradient_clipping=0.0")
    more = ("monitor.log_every=5", "checkpoint.every_steps=4")
    status, text = run(start_job, tiny_recipe, out, *settings, *more)
    assert_one_message(status, text, "step 4", "optimizer.lr")
    assert not complete_checkpoints(out)


def test_a_truncated_tar_is_named_before_the_start(
    start_job: Callable[..., Any], tiny_recipe: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    tar = shards / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-5000])
    out = tmp_path / "run"
    # both ranks of this launcher see it at about the same time
    settings = (f"data.shards={shards}",)
    status, text = run(start_job, tiny_recipe, out, *settings, launcher="deepspeed")
    assert_one_message(status, text, "train-000001.tar", "truncated")
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--ranks", "0"), ("--ranks", "-1"), ("--timeout", "-1"), ("--timeout", "nan")],
)
def test_ranks_and_timeout_are_checked(
    option: str, value: str, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["pretrain", str(tiny_recipe), "--out", str(out), option, value]) == 2
    assert f"Invalid value for {option}" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("deepspeed.zero_optimization.stage=7", "stage: .*got 7"),
        ("deepspeed.zero_optimization=7", "must be a mapping"),
        ("deepspeed.train_batch_size=33", "train_batch_size"),
    ],
)
def test_what_deepspeed_refuses_is_an_error_of_the_recipe(
    setting: str, named: str, tiny_recipe: Path
) -> None:
    recipe = load_recipe(str(tiny_recipe), [setting, "train.micro_batch=16"])
    with pytest.raises(RecipeError, match=f"{named}.*section `deepspeed`"):
        engine_settings(recipe, batch_plan(recipe, 1, 0))


def test_a_folder_with_another_model_is_refused(
    start_job: Callable[..., Any], tiny_recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    status, text = run(start_job, tiny_recipe, out)
    assert status == 0, text
    before = sorted(out.rglob("*"))
    status, text = run(start_job, tiny_recipe, out, "model.projection_dim=32")
    assert_one_message(status, text, "model.projection_dim: 16 -> 32", "--out")
    assert sorted(out.rglob("*")) == before
