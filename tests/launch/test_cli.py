"""The command line as a user meets it: help, usage errors, and errors that say what to do."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from groundwork.launch.cli import app, main
from groundwork.pretrain.recipe import load_recipe, recipe_to_dict

SCREEN = 24  # lines


def command_paths(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from command_paths(child, (*path, name))


PATHS = list(command_paths(typer.main.get_command(app)))


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """Commands set signal handlers for the process they expect to own."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two classes, built by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    for name in ("red", "blue"):
        (folder / "raw" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (16, 16), name).save(folder / "raw" / name / f"{number}.png")
    out = folder / "shards"
    assert main(["shards", "build", "image-folder", str(folder / "raw"), "--out", str(out)]) == 0
    return out


@pytest.fixture
def other_run(tmp_path: Path, shards: Path) -> Path:
    """A run whose checkpoint belongs to another recipe."""
    recipe = recipe_to_dict(load_recipe("klite_emoji", [f"data.shards={shards}", "train.seed=7"]))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    record = {
        "format": "groundwork-checkpoint",
        "step": 5,
        "position": 5,
        "world_size": 1,
        "recipe": recipe,
        "dataset": "",
        "concepts": "",
        "knowledge": "",
        "bad_samples": 0,
        "files": {"rank-00000.pt": [10, 0]},
    }
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))
    return tmp_path / "run"


def message_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that must fail with status 1 prints, checked to be one screen of prose."""
    capsys.readouterr()
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "\nerror: " in message  # a progress bar may come before it
    assert "Traceback" not in message
    assert len(message.splitlines()) <= SCREEN
    return message


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_command_explains_itself(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*path, "--help"]) == 0
    assert "Usage: groundwork" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["pretrain", "klite_emoji"], "--out"),
        (["pretrain", "--out", "x"], "recipe"),
        (["pretrain", "klite_emoji", "--out", "x", "--ranks", "many"], "--ranks"),
        (["shards", "build", "emoji"], "--out"),
        (["shards", "build", "movies", "--out", "x"], "movies"),
        (["evaluate", "zeroshot", "--checkpoint", "x"], "--out"),
        (["export", "--fromat", "hf"], "--fromat"),
        (["report", "--run", "x"], "--zeroshot"),
        (["demo", "--ranks", "3"], "--ranks"),
    ],
)
def test_a_usage_error_ends_with_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message


def test_a_wrong_recipe_name_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    message = message_of(["pretrain", "klite_emojy", "--out", "x"], capsys)
    assert "did you mean 'klite_emoji'?" in message
    assert "did you mean" in message_of(["recipe", "show", "klite_emojy"], capsys)


def test_an_unknown_key_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    message = message_of(["recipe", "show", "klite_emoji", "--set", "optimizer.lrr=1"], capsys)
    assert "unknown key 'optimizer.lrr'; did you mean 'lr'?" in message


def test_a_wrong_value_shows_what_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    message = message_of(["recipe", "show", "klite_emoji", "--set", "train.steps=many"], capsys)
    assert "train.steps" in message
    assert "'many'" in message


def test_an_override_without_a_value_says_the_form(capsys: pytest.CaptureFixture[str]) -> None:
    message = message_of(["recipe", "show", "klite_emoji", "--set", "train.steps"], capsys)
    assert "expected key.path=value" in message


def test_missing_shards_say_how_to_build_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    change = ["--set", f"data.shards={tmp_path}/none"]
    message = message_of(["pretrain", "klite_emoji", "--out", str(out), *change], capsys)
    assert "groundwork shards build" in message
    assert not out.exists()
    assert "no data set here" in message_of(["shards", "stat", str(tmp_path)], capsys)


def test_a_truncated_shard_is_named(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "shards"
    copy.mkdir()
    for file in shards.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tar = copy / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:1000])
    message = message_of(["shards", "stat", str(copy)], capsys)
    assert "train-000000.tar (1,000 of" in message


def test_a_missing_knowledge_index_is_named(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"data.shards={shards}", f"data.knowledge.index={tmp_path}/none.gkb"]
    arguments = ["pretrain", "klite_emoji", "--out", str(tmp_path / "run")]
    for change in changes:
        arguments += ["--set", change]
    assert "none.gkb" in message_of(arguments, capsys)
    assert "none.gkb" in message_of(["knowledge", "show", str(tmp_path / "none.gkb"), "a"], capsys)


def test_a_batch_that_does_not_divide_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pretrain", "klite_emoji", "--out", "x", "--set", "train.micro_batch=3"]
    message = message_of(arguments, capsys)
    assert "global_batch 128 is not a multiple of micro_batch 3" in message


def test_a_run_of_another_recipe_is_not_touched(
    other_run: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in other_run.rglob("*"))
    changes = [f"data.shards={shards}", "data.knowledge.index=null"]
    arguments = ["pretrain", "klite_emoji", "--out", str(other_run)]
    for change in changes:
        arguments += ["--set", change]
    message = message_of(arguments, capsys)
    assert "is of another recipe" in message
    assert "train.seed: 7 -> 0" in message
    assert sorted(path for path in other_run.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "zeroshot", "--checkpoint", "NONE", "--out", "NONE/out"],
        ["export", "--checkpoint", "NONE", "--out", "NONE/out"],
        ["report", "--run", "NONE", "--zeroshot", "NONE", "--out", "NONE/report.html"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_missing_checkpoint_says_where_it_was_looked_for(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = str(tmp_path / "none")
    message = message_of([word.replace("NONE", none) for word in arguments], capsys)
    assert "no checkpoint here" in message
    assert not Path(none).exists()


def test_a_damaged_checkpoint_lists_what_is_wrong(
    other_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = other_run.parent / "export"
    message = message_of(["export", "--checkpoint", str(other_run), "--out", str(out)], capsys)
    assert "rank-00000.pt is missing" in message
    assert not out.exists()


def test_missing_system_packages_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["knowledge", "build", "wordnet", "--out", str(tmp_path / "w.gkb")]
    message = message_of([*arguments, "--dictionary", str(tmp_path)], capsys)
    assert "apt-get install wordnet-base" in message
    arguments = ["shards", "build", "emoji", "--out", str(tmp_path / "shards")]
    message = message_of([*arguments, "--font", str(tmp_path / "none.ttf")], capsys)
    assert "fonts-noto-color-emoji" in message
    assert list(tmp_path.iterdir()) == []


def test_an_undecodable_picture_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw" / "cat").mkdir(parents=True)
    (tmp_path / "raw" / "cat" / "a.jpg").write_bytes(b"no picture")
    arguments = ["shards", "build", "image-folder", str(tmp_path / "raw")]
    message = message_of([*arguments, "--out", str(tmp_path / "out")], capsys)
    assert "a.jpg" in message
    assert "--skip-bad" in message
    assert not (tmp_path / "out").exists()


def test_impossible_settings_of_a_source_are_told(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = str(shards.parent / "raw"), str(tmp_path / "out")
    arguments = ["shards", "build", "image-folder", raw, "--out", out, "--val-fraction", "2"]
    assert "val_fraction is 2.0" in message_of(arguments, capsys)
    arguments = ["shards", "build", "emoji", "--out", out, "--renderings", "0"]
    assert "keep at least one rendering" in message_of(arguments, capsys)


def test_a_folder_that_is_no_data_set_is_not_overwritten(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    raw = str(shards.parent / "raw")
    arguments = ["shards", "build", "image-folder", raw, "--out", str(tmp_path)]
    assert "exists and is no data set" in message_of(arguments, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_recipes_are_listed_and_shown_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "list"]) == 0
    assert "klite_emoji" in capsys.readouterr().out
    assert main(["recipe", "show", "klite_emoji", "--set", "train.seed=5"]) == 0
    shown = capsys.readouterr().out
    assert "seed: 5" in shown
    assert "mlp_ratio: 4.0" in shown
