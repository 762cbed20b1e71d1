"""`groundwork demo`: the whole way from raw data to a report, as commands to repeat by hand.

`groundwork report`, its last command, is here, too.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from groundwork.launch.errors import reporting, require_file, require_folder

RECIPE = "klite_emoji"
#: Where the recipe looks for its data; any other folder is passed to it as overrides.
DEFAULT_OUT = Path("runs/demo")
INDEX, COMMANDS, REPORT = "wordnet.gkb", "commands.json", "report.html"
TRAIN = "pretrain"

Run = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Command:
    """One command of the demo. made: a file that is there once it has succeeded."""

    name: str
    title: str
    argv: tuple[str, ...]
    made: Path


def start(out: Path, overrides: Sequence[str], run: Run | None = None) -> int:
    """Run the demo in folder `out`. Returns the exit status; 0 also after a polite stop.

    overrides: of the recipe, `key.path=value`. run: runs a command and returns its exit status.
    """
    return _reporting(lambda: _demo(out, overrides, run or run_command))


def report(run: Path, zeroshot: Path, commands: Path | None, out: Path) -> int:
    """Write the report of a run. Returns the exit status."""

    def write() -> int:
        from groundwork.pretrain.report import read_steps, write_report

        require_file(out)
        steps = [] if commands is None else read_steps(commands)
        write_report(out, run=run, zeroshot=zeroshot, commands=steps)
        print(f"wrote {out}")
        return 0

    return _reporting(write)


def demo_commands(out: Path, overrides: Sequence[str], ranks: int) -> list[Command]:
    """What the demo runs, in order."""
    shards, index = out / "shards", out / INDEX
    run, zeroshot, export = out / "klite", out / "zeroshot", out / "export"
    changes = [part for change in data_overrides(out, overrides) for part in ("--set", change)]
    launcher = ("deepspeed", "--num_gpus", str(ranks), _script())
    evaluate = ("groundwork", "evaluate", "zeroshot", "--checkpoint", str(run))
    write = ("groundwork", "export", "--format", "hf", "--checkpoint", str(run))
    return [
        Command(
            "shards",
            "render pictograms and write them as shards",
            ("groundwork", "shards", "build", "emoji", "--out", str(shards)),
            shards / "manifest.json",
        ),
        Command(
            "knowledge",
            "index WordNet",
            ("groundwork", "knowledge", "build", "wordnet", "--out", str(index)),
            index,
        ),
        Command(
            TRAIN,
            f"pretrain on {ranks} rank{'s' if ranks > 1 else ''} (Ctrl-C saves and stops)",
            (*launcher, RECIPE, "--out", str(run), *changes),
            run / "checkpoints" / "latest",
        ),
        Command(
            "zeroshot",
            "evaluate zero-shot, with text controls",
            (*evaluate, "--out", str(zeroshot)),
            zeroshot / "zeroshot.json",
        ),
        Command(
            "export",
            "export for transformers",
            (*write, "--out", str(export)),
            export / "config.json",
        ),
    ]


def data_overrides(out: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides of the recipe, led by its data where that is not in the usual folder."""
    if out == DEFAULT_OUT:
        return list(overrides)
    shards, index = _yaml_text(str(out / "shards")), _yaml_text(str(out / INDEX))
    return [f"data.shards={shards}", f"data.knowledge.index={index}", *overrides]


def _yaml_text(text: str) -> str:
    """YAML that reads as this text: the text itself where that is possible."""
    import yaml

    try:
        if yaml.safe_load(text) == text:
            return text
    except (yaml.YAMLError, ValueError):
        pass
    # JSON is YAML, but for the surrogates that stand for bytes of no character
    return json.dumps(text, ensure_ascii=not text.isprintable())


def report_command(out: Path) -> tuple[str, ...]:
    run, zeroshot = str(out / "klite"), str(out / "zeroshot")
    inputs = ("--run", run, "--zeroshot", zeroshot, "--commands", str(out / COMMANDS))
    return ("groundwork", "report", *inputs, "--out", str(out / REPORT))


def usable_ranks() -> int:
    """2 where the machine has the cores and, if it has any, the GPUs for it."""
    import torch

    available = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    return min(2, available)


def run_command(argv: Sequence[str]) -> int:
    """Run a command with the tools of this interpreter's environment first in PATH.

    Ctrl-C reaches the command by itself; SIGTERM is passed on, so that none is left behind.
    """
    tools = str(Path(sys.executable).parent)
    path = os.pathsep.join(filter(None, (tools, os.environ.get("PATH"))))
    try:
        process = subprocess.Popen(argv, env={**os.environ, "PATH": path})
    except FileNotFoundError:
        print(
            f"{argv[0]}: not found, neither in {tools} nor in PATH; install groundwork into this "
            "environment again",
            file=sys.stderr,
        )
        return 127
    before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        while True:
            try:
                status = process.wait()
                return status if status >= 0 else 128 - status
            except KeyboardInterrupt:
                continue  # the command decides how to end
    finally:
        signal.signal(signal.SIGTERM, before)


def _demo(out: Path, overrides: Sequence[str], run: Run) -> int:
    from groundwork.pretrain.recipe import load_recipe, recipe_to_dict
    from groundwork.pretrain.report import Step, read_steps, write_steps

    require_folder(out)
    commands = demo_commands(out, overrides, usable_ranks())
    # a mistake in an override is to show before any work is done
    recipe = load_recipe(RECIPE, data_overrides(out, overrides))
    resolved = recipe_to_dict(recipe)
    steps = read_steps(out / COMMANDS)
    again = _again(out, overrides)
    for number, command in enumerate(commands):
        print(f"\n[{number + 1}/{len(commands) + 1}] {command.title}")
        print(shlex.join(command.argv), flush=True)
        is_training = command.name == TRAIN
        earlier = [step for step in steps if step.name == command.name]
        if (
            command.made.exists()
            and any(step.argv == command.argv and step.status == 0 for step in earlier)
            and (not is_training or _is_finished(out / "klite", resolved))
        ):
            print(f"done before, in {sum(step.seconds for step in earlier):.1f} s")
            continue
        # what comes later is of no use once this runs anew; a training may have several parts
        valid = {before.name for before in commands[:number]}
        if is_training and _steps_done(out / "klite"):
            valid.add(TRAIN)
        steps = [step for step in steps if step.name in valid]
        write_steps(out / COMMANDS, steps)
        began, clock = time.time(), time.monotonic()
        status = run(command.argv)
        seconds = time.monotonic() - clock
        note = ""
        if is_training and (done := _steps_done(out / "klite")) < recipe.train.steps:
            note = f"stopped after step {done} of {recipe.train.steps}"
        steps.append(Step(command.name, command.argv, seconds, status, began, note))
        write_steps(out / COMMANDS, steps)
        if status:
            _explain_failure(command, status, again)
            return status
        if note:
            print(f"\nTraining {note}; `{again}` resumes it. Nothing was evaluated.")
            return 0
    argv = report_command(out)
    print(f"\n[{len(commands) + 1}/{len(commands) + 1}] write the report")
    print(shlex.join(argv), flush=True)
    status = run(argv)
    if status == 0:
        minutes = sum(step.seconds for step in steps) / 60
        print(f"\ndone: the commands took {minutes:.1f} min; open {out / REPORT} in a browser")
    return status


def _explain_failure(command: Command, status: int, again: str) -> None:
    print(
        f"\nerror: this command ended with status {status}:\n"
        f"  {shlex.join(command.argv)}\n"
        f"Mend the cause it names above, then run `{again}`: it goes on from here.",
        file=sys.stderr,
    )


def _reporting(action: Callable[[], int]) -> int:
    """`reporting`, for the errors of reports, too."""

    def run() -> int:
        from groundwork.pretrain.report import ReportError

        try:
            return action()
        except ReportError as error:
            print(f"\nerror: {error}", file=sys.stderr)
            return 1

    return reporting(run)


def _steps_done(run: Path) -> int:
    from groundwork.pretrain.engine.checkpoint import find_checkpoint, read_state

    checkpoint = find_checkpoint(run)
    return 0 if checkpoint is None else read_state(checkpoint).step


def _is_finished(run: Path, recipe: dict[str, object]) -> bool:
    """Whether `run` holds the last step of this very recipe."""
    from groundwork.pretrain.engine.checkpoint import find_checkpoint, read_state
    from groundwork.pretrain.recipe import differences

    checkpoint = find_checkpoint(run)
    if checkpoint is None:
        return False
    state = read_state(checkpoint)
    return state.step >= state.recipe["train"]["steps"] and not differences(state.recipe, recipe)


def _script() -> str:
    """`launch/pretrain.py` of this installation, as typed in the present folder."""
    script = Path(__file__).resolve().with_name("pretrain.py")
    try:
        return str(script.relative_to(Path.cwd()))
    except ValueError:
        return str(script)


def _again(out: Path, overrides: Sequence[str]) -> str:
    if out == DEFAULT_OUT and not overrides:
        return "make demo"
    changes = [part for override in overrides for part in ("--set", override)]
    return shlex.join(["groundwork", "demo", "--out", str(out), *changes])
