"""The demo's driver, with a stand-in for the commands it runs."""

import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from groundwork.launch import demo
from groundwork.pretrain.recipe import load_recipe, recipe_to_dict
from groundwork.pretrain.report import read_steps

ROOT = Path(__file__).resolve().parents[2]
STEPS = load_recipe("klite_emoji").train.steps


class Commands:
    """Runs a command by writing the files that tell of its success.

    step: where the next training ends. failing: the sub-command that ends with status 3.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.step, self.failing = out, STEPS, ""
        self.ran: list[list[str]] = []

    def __call__(self, argv: Sequence[str]) -> int:
        self.ran.append(list(argv))
        if self.failing and self.failing in argv:
            return 3
        target = Path(argv[argv.index("--out") + 1])
        if argv[0] == "deepspeed":
            overrides = [argv[i + 1] for i, word in enumerate(argv) if word == "--set"]
            self._train(target, overrides)
        elif "shards" in argv:
            self._write(target / "manifest.json")
        elif "zeroshot" in argv:
            self._write(target / "zeroshot.json")
        elif "export" in argv:
            self._write(target / "config.json")
        else:
            self._write(target)
        return 0

    def _train(self, run: Path, overrides: list[str]) -> None:
        name = f"step-{self.step:08d}"
        record = {
            "format": "groundwork-checkpoint",
            "step": self.step,
            "position": 0,
            "world_size": 2,
            "recipe": recipe_to_dict(load_recipe("klite_emoji", overrides)),
            "dataset": "",
            "concepts": "",
            "knowledge": "",
            "bad_samples": 0,
            "files": {},
        }
        self._write(run / "checkpoints" / name / "checkpoint.json", json.dumps(record))
        self._write(run / "checkpoints" / "latest", name)

    def _write(self, path: Path, text: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def names(self) -> list[str]:
        """The sub-commands that ran since the last call."""
        ran = ["pretrain" if argv[0] == "deepspeed" else argv[1] for argv in self.ran]
        self.ran.clear()
        return ran


ALL = ["shards", "knowledge", "pretrain", "evaluate", "export", "report"]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "usable_ranks", lambda: 2)
    return Commands(tmp_path / "out")


def test_the_commands_are_those_of_the_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = [shlex.join(c.argv) for c in demo.demo_commands(demo.DEFAULT_OUT, [], 2)]
    lines.append(shlex.join(demo.report_command(demo.DEFAULT_OUT)))
    if not Path(demo.__file__).resolve().is_relative_to(ROOT):  # installed: its own script
        lines[2] = lines[2].replace(demo._script(), "launch/pretrain.py")
    assert lines == [
        "groundwork shards build emoji --out runs/demo/shards",
        "groundwork knowledge build wordnet --out runs/demo/wordnet.gkb",
        "deepspeed --num_gpus 2 launch/pretrain.py klite_emoji --out runs/demo/klite",
        "groundwork evaluate zeroshot --checkpoint runs/demo/klite --out runs/demo/zeroshot",
        "groundwork export --format hf --checkpoint runs/demo/klite --out runs/demo/export",
        "groundwork report --run runs/demo/klite --zeroshot runs/demo/zeroshot "
        "--commands runs/demo/commands.json --out runs/demo/report.html",
    ]
    quickstart = (ROOT / "docs" / "quickstart.md").read_text("utf-8")
    assert [line for line in lines if line not in quickstart] == []


def test_the_training_script_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = demo.demo_commands(demo.DEFAULT_OUT, [], 1)[2].argv
    assert argv[:3] == ("deepspeed", "--num_gpus", "1")
    assert Path(argv[3]).is_file()


def test_every_command_is_printed_as_it_is_run(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.start(commands.out, ["train.seed=3"], commands) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for argv in commands.ran if (line := shlex.join(argv)) not in printed] == []
    training = commands.ran[2]
    assert f"data.shards={commands.out}/shards" in training
    assert f"data.knowledge.index={commands.out}/wordnet.gkb" in training
    assert training[-2:] == ["--set", "train.seed=3"]
    assert commands.names() == ALL


def test_a_second_demo_writes_the_report_only(commands: Commands) -> None:
    assert demo.start(commands.out, [], commands) == 0
    commands.names()
    assert demo.start(commands.out, [], commands) == 0
    assert commands.names() == ["report"]


def test_a_changed_recipe_trains_and_evaluates_again(commands: Commands) -> None:
    demo.start(commands.out, [], commands)
    commands.names()
    demo.start(commands.out, ["train.seed=1"], commands)
    assert commands.names() == ["pretrain", "evaluate", "export", "report"]


def test_a_lost_result_is_made_again(commands: Commands) -> None:
    demo.start(commands.out, [], commands)
    commands.names()
    (commands.out / "zeroshot" / "zeroshot.json").unlink()
    demo.start(commands.out, [], commands)
    assert commands.names() == ["evaluate", "export", "report"]


def test_a_failing_command_ends_the_demo_with_its_status(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.failing = "evaluate"
    assert demo.start(commands.out, [], commands) == 3
    assert commands.names() == ["shards", "knowledge", "pretrain", "evaluate"]
    message = capsys.readouterr().err
    assert "ended with status 3" in message
    assert "groundwork evaluate zeroshot --checkpoint" in message
    assert f"groundwork demo --out {commands.out}" in message

    commands.failing = ""
    assert demo.start(commands.out, [], commands) == 0
    assert commands.names() == ["evaluate", "export", "report"]


def test_a_stopped_training_is_not_evaluated_but_resumed(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.step = 250
    assert demo.start(commands.out, [], commands) == 0
    assert commands.names() == ["shards", "knowledge", "pretrain"]
    assert f"stopped after step 250 of {STEPS}" in capsys.readouterr().out

    commands.step = STEPS
    assert demo.start(commands.out, [], commands) == 0
    assert commands.names() == ["pretrain", "evaluate", "export", "report"]
    parts = [s for s in read_steps(commands.out / "commands.json") if s.name == "pretrain"]
    assert [part.note for part in parts] == [f"stopped after step 250 of {STEPS}", ""]


def test_a_training_stopped_before_its_first_checkpoint_is_recognised(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argv: Sequence[str]) -> int:
        return 0 if argv[0] == "deepspeed" else commands(argv)

    assert demo.start(commands.out, [], run) == 0
    assert f"stopped after step 0 of {STEPS}" in capsys.readouterr().out


def test_a_mistake_in_an_override_shows_before_any_work(
    commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.start(commands.out, ["train.stepz=3"], commands) == 1
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert commands.names() == []


def test_the_usual_demo_is_resumed_by_make(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo._again(demo.DEFAULT_OUT, []) == "make demo"


def test_commands_come_from_the_environment_of_this_interpreter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    impostor = tmp_path / "python"
    impostor.write_text("#!/bin/sh\nexit 9\n")
    impostor.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    same = f"import sys; sys.exit(sys.prefix != {sys.prefix!r})"
    assert demo.run_command(["python", "-c", same]) == 0


def test_exit_statuses_are_those_of_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run_command(["sh", "-c", "exit 5"]) == 5
    assert demo.run_command(["sh", "-c", "kill -TERM $$"]) == 143
    assert demo.run_command(["no-such-command-anywhere"]) == 127
    assert "no-such-command-anywhere: not found" in capsys.readouterr().err


def test_sigterm_ends_the_command_and_not_the_demo_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert demo.run_command(["sh", "-c", "sleep 0.5; kill -TERM $PPID; exec sleep 60"]) == 143
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "folder",
    ["a #1", "a: b", "[d]", "'q", "&d", "*glob", "%d", "@d", "- d", "{d}", "1", "~", '"', "plain"],
)
def test_any_folder_reaches_the_recipe_as_it_is(folder: str) -> None:
    recipe = load_recipe("klite_emoji", demo.data_overrides(Path(folder), []))
    assert recipe.data.shards == f"{folder}/shards"
    assert recipe.data.knowledge.index == f"{folder}/wordnet.gkb"
