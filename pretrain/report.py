"""The report of a run: one HTML file with numbers, curves, controls, pictures and commands.

Everything is inside the file, so it opens from a disk, travels as an attachment and prints.
"""

import base64
import json
import os
import platform
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from groundwork.data.atomic import write_atomically
from groundwork.data.knowledge.index import KnowledgeError, KnowledgeIndex
from groundwork.data.shard_index import ShardError
from groundwork.data.shards import read_manifest
from groundwork.pretrain.engine.checkpoint import RECIPE, RunState, read_state, require_checkpoint
from groundwork.pretrain.engine.monitor import METRICS
from groundwork.pretrain.report_page import (
    duration,
    facts_table,
    page,
    percent,
    preformatted,
    spoken,
)

RESULTS, GRID = "zeroshot.json", "zeroshot.png"
PACKAGES = ("groundwork-pretrain", "torch", "deepspeed", "transformers")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
#: The result that the key number is taken from, where there is one of this name.
HEADLINE = "heldout_renderings"


class ReportError(ValueError):
    """Something that a report is made of is missing; says what, and which command makes it."""


@dataclass(frozen=True)
class Step:
    """A command that was run. seconds: wall time. status: exit status. started: Unix time."""

    name: str
    argv: tuple[str, ...]
    seconds: float
    status: int
    started: float
    note: str = ""

    @property
    def command(self) -> str:
        return shlex.join(self.argv)


def read_steps(path: Path) -> list[Step]:
    """The steps that `write_steps` wrote, oldest first; none where there is no file."""
    try:
        records = json.loads(path.read_text("utf-8"))
        return [Step(**{**record, "argv": tuple(record["argv"])}) for record in records]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: not a record of commands ({error}); delete it") from error


def write_steps(path: Path, steps: Sequence[Step]) -> None:
    write_atomically(path, json.dumps([asdict(step) for step in steps], indent=1).encode())


def write_report(out: Path, *, run: Path, zeroshot: Path, commands: Sequence[Step] = ()) -> None:
    """Write the report of a run as one HTML file.

    run: folder of a pretraining run. zeroshot: folder that `groundwork evaluate zeroshot` wrote.
    commands: that led here, oldest first. Raises ReportError and CheckpointError.
    """
    state = read_state(require_checkpoint(run))
    metrics = _read_metrics(run / METRICS)
    results = _read_results(zeroshot / RESULTS)
    picture = _read_picture(zeroshot / GRID)
    recipe = _read_text(run / RECIPE, "is written when a run starts")
    name, licences = _sources(results)
    title = f"{state.recipe['model']['kind']} on {name}"
    sections = [
        ("", _key_numbers(metrics, results, commands)),
        ("Curves", _curves(metrics)),
        ("What the texts are worth", _controls(results)),
        ("Pictures", _pictures(picture)),
        ("Commands", _commands(commands)),
        ("Run", facts_table(_run_facts(run, state, metrics, results))),
        ("Versions", facts_table(_versions())),
        ("Licences", facts_table(licences)),
        ("Recipe", f"<details open><summary>{RECIPE}</summary>{preformatted(recipe)}</details>"),
    ]
    body = "\n".join(
        f"<section>{f'<h2>{escape(head)}</h2>' if head else ''}\n{content}\n</section>"
        for head, content in sections
    )
    write_atomically(out, page(title, body).encode("utf-8"))


def _key_numbers(
    metrics: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    commands: Sequence[Step],
) -> str:
    parts = results["results"]
    name = HEADLINE if HEADLINE in parts else next(iter(parts))
    controls = parts[name]["controls"]
    first = controls.get("plain") or next(iter(controls.values()))
    also = ""
    if "knowledge" in controls and "plain" in controls:
        also = f"plain names; with knowledge {percent(controls['knowledge']['top1']['value'])}"
    first_step = next((m["first_step_s"] for m in metrics if "first_step_s" in m), None)
    total = sum(step.seconds for step in commands)
    tiles = [
        (f"top-1, {spoken(name)}", percent(first["top1"]["value"]), also),
        ("samples/s", f"{_throughput(metrics):,.0f}", "over all steps, saving included"),
        (
            "time to first step",
            "not recorded" if first_step is None else duration(first_step),
            "from launch",
        ),
        ("data wait", percent(100 * _mean(metrics, "data_wait")), "of the training time"),
        (
            "total time",
            duration(total) if commands else "not recorded",
            "of the commands below" if commands else "",
        ),
    ]
    shown = "\n".join(
        f'<div class="tile"><div class="what">{escape(what)}</div>'
        f'<div class="value">{escape(value)}</div><div class="what">{escape(note)}</div></div>'
        for what, value, note in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Four curves over the steps, as one inline SVG."""
    panels: list[tuple[str, str, Callable[[float], float]]] = [
        ("loss", "loss", float),
        ("lr", "learning rate", float),
        ("samples_per_s", "samples/s", float),
        ("data_wait", "data wait, %", lambda share: 100 * share),
    ]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "groundwork"}):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        for axes, (key, label, scaled) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            points = [(m["step"], scaled(m[key])) for m in metrics if key in m]
            marker = "o" if len(points) < 20 else ""
            axes.plot(*zip(*points, strict=True), color="#1f6f8b", marker=marker, markersize=4)
            axes.set_title(label, fontsize=11, loc="left")
            axes.set_xlabel("step", fontsize=9)
            axes.tick_params(labelsize=9)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if key != "lr":
                axes.set_ylim(bottom=0)
        text = StringIO()
        figure.savefig(text, format="svg")
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # neither XML declaration nor document type inside HTML
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return f'<figure role="img" aria-label="Loss, learning rate, speed, data wait">{svg}</figure>'


def _controls(results: Mapping[str, Any]) -> str:
    parts = []
    for name, part in results["results"].items():
        rows, gains = [], []
        for control, score in part["controls"].items():
            cells = [f"<th>{escape(control)}</th>"]
            for metric in ("top1", "top5"):
                cells += _score_cells(score[metric], bar=metric == "top1")
            rows.append(f'<tr data-control="{escape(control)}">{"".join(cells)}</tr>')
            gains += [
                (key.removeprefix("gain_over_"), value)
                for key, value in score.items()
                if key.startswith("gain_over_")
            ]
        parts.append(
            f"<h3>{escape(spoken(name))}: {part['pictures']:,} pictures, choice among "
            f"{part['candidates']:,} names</h3>\n"
            "<table><thead><tr><th>text</th><th>top-1 %</th><th>95 % interval</th><th></th>"
            "<th>top-5 %</th><th>95 % interval</th></tr></thead>\n"
            f"<tbody>{''.join(rows)}</tbody></table>\n{_gains(gains)}"
        )
    return _how_to_read(results) + "\n".join(parts)


def _score_cells(score: Mapping[str, float], *, bar: bool) -> list[str]:
    cells = [
        f"<td>{score['value']:.1f}</td>",
        f"<td>{score['low']:.1f} – {score['high']:.1f}</td>",
    ]
    if bar:
        left, width = score["low"], max(0.4, score["high"] - score["low"])
        cells.append(
            '<td><div class="bar">'
            f'<i style="width:{score["value"]:.1f}%"></i>'
            f'<b style="left:{left:.1f}%;width:{width:.1f}%"></b></div></td>'
        )
    return cells


def _gains(gains: Iterable[tuple[str, Mapping[str, float]]]) -> str:
    rows = "".join(
        f'<tr data-gain-over="{escape(other)}"><th>knowledge over {escape(other)}</th>'
        f"<td>{gain['value']:+.1f}</td><td>{gain['low']:+.1f} to {gain['high']:+.1f}</td>"
        f"<td>{_verdict(gain)}</td></tr>"
        for other, gain in gains
    )
    if not rows:
        return ""
    return (
        "<table><thead><tr><th>paired gain</th><th>points of top-1</th><th>95 % interval</th>"
        f"<th></th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _verdict(gain: Mapping[str, float]) -> str:
    if gain["low"] > 0:
        return "a gain"
    return "a loss" if gain["high"] < 0 else "not told apart from zero"


def _how_to_read(results: Mapping[str, Any]) -> str:
    known, names = results.get("names_with_knowledge"), results.get("names")
    coverage = ""
    if known is not None:
        coverage = f" Of {names:,} names {known:,} have knowledge; the others are as in “plain”."
    return (
        '<p class="note">Read “knowledge” against its controls: it adds to each name what the '
        "knowledge base says about it, “shuffled” adds what it says about another name, “random” "
        "adds as many random words. Knowledge has been of use only where its gain over plain, over "
        "shuffled and over random all lie above zero; a gain over plain alone may come from the "
        "mere length of the text. Intervals are a bootstrap over classes, gains are paired by "
        f"picture.{coverage}</p>\n"
    )


def _pictures(picture: bytes) -> str:
    data = base64.b64encode(picture).decode()
    return (
        '<p class="note">Evenly spaced hits (green) and misses (red) of each split; below a '
        "picture its name, below a miss the name that was chosen.</p>\n"
        f'<figure><img alt="Hits and misses" src="data:image/png;base64,{data}"></figure>'
    )


def _commands(commands: Sequence[Step]) -> str:
    if not commands:
        return "<p>Not recorded.</p>"
    rows = "".join(
        f"<tr><td><code>{escape(step.command)}</code></td><td>{duration(step.seconds)}</td>"
        f"<td>{step.status}</td><td>{escape(step.note)}</td></tr>"
        for step in commands
    )
    total = duration(sum(step.seconds for step in commands))
    return (
        "<table><thead><tr><th>command</th><th>duration</th><th>exit status</th><th></th></tr>"
        f"</thead><tbody>{rows}</tbody><tfoot><tr><th>total</th><td>{total}</td><td></td><td></td>"
        "</tr></tfoot></table>"
    )


def _run_facts(
    run: Path,
    state: RunState,
    metrics: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
) -> dict[str, str]:
    last = metrics[-1]
    return {
        "folder": str(run),
        "steps": f"{state.step:,} of {state.recipe['train']['steps']:,}",
        "samples seen": f"{state.position:,} ({last.get('epoch', 0):.1f} epochs)",
        "ranks": str(state.world_size),
        "precision": f"{state.recipe['train']['precision']}, "
        f"ZeRO stage {state.recipe['train']['zero_stage']}",
        "last loss": f"{last['loss']:.4f}",
        "bad samples": str(state.bad_samples),
        "evaluated checkpoint": f"{results['checkpoint']}, step {results['step']:,}",
        "data set digest": state.dataset,
    }


def _versions() -> dict[str, str]:
    facts = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["system"] = platform.platform()
    facts["CPU"] = f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores usable"
    devices = _devices()
    if devices:
        facts["GPU"] = devices
    return facts


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _devices() -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    return ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))


def _sources(results: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Name of the data set, and licences of data and knowledge; a missing source is no error."""
    name, licences = str(results["shards"]), {}
    try:
        manifest = read_manifest(Path(name))
        name, licences["data"] = manifest.name, manifest.licence
    except ShardError as error:
        licences["data"] = f"unknown: {error}"
    if results.get("knowledge"):
        try:
            index = KnowledgeIndex(results["knowledge"])
            source = f"{index.source} {index.source_version}"
            licences["knowledge"] = f"{source}\n\n{index.licence}"
        except KnowledgeError as error:
            licences["knowledge"] = f"unknown: {error}"
    return name, licences


def _read_metrics(path: Path) -> list[Mapping[str, Any]]:
    text = _read_text(path, "is written by rank 0 of a pretraining run")
    metrics = []
    for line in text.splitlines():
        try:
            metrics.append(json.loads(line))
        except ValueError:
            continue  # the line that a kill has cut off
    if not metrics:
        raise ReportError(f"{path}: no line of metrics yet; let the run go on, then repeat")
    return metrics


def _read_results(path: Path) -> Mapping[str, Any]:
    text = _read_text(path, f"is written by `groundwork evaluate zeroshot --out {path.parent}`")
    try:
        results: Mapping[str, Any] = json.loads(text)
        if not results["results"]:
            raise ValueError("no results in it")
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: not the result of an evaluation ({error})") from error
    return results


def _read_picture(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ReportError(
            f"{path}: {error.strerror}; it is written by `groundwork evaluate zeroshot`"
        ) from error
    if not data.startswith(PNG_MAGIC):
        raise ReportError(f"{path}: not a PNG; repeat `groundwork evaluate zeroshot`")
    return data


def _read_text(path: Path, origin: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ReportError(f"{path}: {reason}; it {origin}") from error


def _throughput(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Samples per second over all lines, each weighted by the time it stands for."""
    samples = seconds = 0.0
    previous = 0
    for line in metrics:
        part = line["samples"] - previous
        samples, seconds = samples + part, seconds + part / line["samples_per_s"]
        previous = line["samples"]
    return samples / seconds


def _mean(metrics: Sequence[Mapping[str, Any]], key: str) -> float:
    """Mean of a share of time, over time."""
    weights = [line["seconds_per_step"] for line in metrics]
    return sum(w * line[key] for w, line in zip(weights, metrics, strict=True)) / sum(weights)
