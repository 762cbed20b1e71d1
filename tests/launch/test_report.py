"""The report of a run, read back as a browser would."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from groundwork.pretrain.engine.checkpoint import CheckpointError
from groundwork.pretrain.report import ReportError, Step, read_steps, write_report, write_steps

HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.example/a.png> & co"
CONTROLS = ("plain", "knowledge", "shuffled", "random")
RESOURCE_ATTRIBUTES = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}


class Page(HTMLParser):
    """Tags with their attributes, in order, and the text outside of style and title."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str | None]:
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]


def score(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1.25, "high": value + 1.25}


def evaluation(shards: str, names: tuple[str, ...]) -> dict[str, Any]:
    results = {}
    for i, name in enumerate(names):
        controls: dict[str, dict[str, Any]] = {
            control: {"top1": score(10.0 * i + j + 2), "top5": score(40.0 + 10 * i + j)}
            for j, control in enumerate(CONTROLS)
        }
        for other, gain in (("plain", 3.0), ("shuffled", 0.5), ("random", -4.0)):
            controls["knowledge"][f"gain_over_{other}"] = score(gain)
        results[name] = {"pictures": 1200, "candidates": 77, "controls": controls}
    return {
        "checkpoint": "RUN/checkpoints/step-00000020",
        "step": 20,
        "shards": shards,
        "knowledge": None,
        "names": 1377,
        "names_with_knowledge": 1358,
        "seed": 0,
        "results": results,
    }


def metrics(step: int) -> dict[str, float]:
    return {
        "step": step,
        "samples": step * 8,
        "epoch": step / 10,
        "loss": 5.0 / step,
        "lr": 1e-3,
        "data_wait": 0.25,
        "seconds_per_step": 0.5,
        "samples_per_s": 16.0,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints" / "step-00000020"
    checkpoint.mkdir(parents=True)
    recipe = {
        "model": {"kind": HOSTILE},
        "train": {"steps": 20, "precision": "fp32", "zero_stage": 3},
    }
    record = {
        "format": "groundwork-checkpoint",
        "version": 1,
        "step": 20,
        "position": 160,
        "world_size": 2,
        "recipe": recipe,
        "dataset": "abc/train",
        "concepts": "",
        "knowledge": "",
        "bad_samples": 0,
        "files": {},
    }
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))
    (folder / "recipe.yaml").write_text(f"model: {{kind: {HOSTILE}}}\n")
    lines = [json.dumps(metrics(10)), json.dumps({**metrics(20), "first_step_s": 12.34})]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "lo']))
    return folder


@pytest.fixture
def zeroshot(tmp_path: Path) -> Path:
    folder = tmp_path / "zeroshot"
    folder.mkdir()
    content = evaluation(f"/nowhere/{HOSTILE}", ("heldout_concepts", "heldout_renderings", HOSTILE))
    (folder / "zeroshot.json").write_text(json.dumps(content))
    Image.new("RGB", (8, 8), "red").save(folder / "zeroshot.png")
    return folder


@pytest.fixture
def page(run: Path, zeroshot: Path, tmp_path: Path) -> Page:
    commands = [
        Step("shards", ("groundwork", "shards", "--out", HOSTILE), 61.0, 0, 1.0, HOSTILE),
        Step("export", ("groundwork", "export", "--out", "a b"), 4.5, 3, 2.0),
    ]
    out = tmp_path / "report.html"
    write_report(out, run=run, zeroshot=zeroshot, commands=commands)
    return Page(out.read_text("utf-8"))


def test_report_needs_nothing_from_elsewhere(page: Page) -> None:
    assert {"script", "link", "iframe", "object", "embed"}.isdisjoint(tag for tag, _ in page.tags)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in RESOURCE_ATTRIBUTES or (value or "").startswith(("#", "data:"))
            assert not name.startswith("on"), f"<{tag}> has a handler {name}"
            if name == "style":
                assert "url(" not in (value or "")
    assert "@import" not in page.text
    assert "url(http" not in page.text


def test_report_shows_hostile_names_as_text(page: Page) -> None:
    # title, heading, recipe, a command and its note, a result, a licence
    assert page.text.count("<script>alert") >= 6
    assert [attributes for tag, attributes in page.tags if tag == "img"] == [
        {"alt": "Hits and misses", "src": page.values("src")[0]}
    ]


def test_report_has_every_control_of_every_result(page: Page) -> None:
    assert page.values("data-control") == [*CONTROLS] * 3
    assert page.values("data-gain-over") == ["plain", "shuffled", "random"] * 3
    for i in range(3):
        for j in range(4):
            value = 10.0 * i + j + 2
            assert f"{value:.1f}{value - 1.25:.1f} – {value + 1.25:.1f}" in page.text


def test_report_says_which_gains_are_told_apart_from_zero(page: Page) -> None:
    assert page.text.count("a gain") - page.text.count("a gain over") == 3
    assert page.text.count("not told apart from zero") == 3
    assert page.text.count("a loss") == 3


def test_report_gives_the_key_numbers(page: Page) -> None:
    assert "top-1, held-out renderings12.0 %" in page.text
    assert "with knowledge 13.0 %" in page.text
    assert "samples/s16over" in page.text
    assert "time to first step12.3 s" in page.text
    assert "data wait25.0 %" in page.text
    assert "total time1 min 06 s" in page.text


def test_report_lists_commands_as_they_can_be_typed(page: Page) -> None:
    assert "groundwork export --out 'a b'4.5 s3" in page.text


def test_report_has_curves_and_pictures_inside(page: Page) -> None:
    assert [tag for tag, _ in page.tags].count("svg") == 1
    assert all(label in page.text for label in ("loss", "learning rate", "data wait, %"))
    assert str(page.values("src")[0]).startswith("data:image/png;base64,iVBOR")


def test_report_without_data_set_says_why_the_licence_is_unknown(page: Page) -> None:
    assert "unknown: /nowhere/" in page.text


def test_report_names_the_command_that_makes_what_is_missing(
    run: Path, zeroshot: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    (zeroshot / "zeroshot.json").unlink()
    with pytest.raises(ReportError, match=r"zeroshot\.json: .*groundwork evaluate zeroshot"):
        write_report(out, run=run, zeroshot=zeroshot)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        write_report(out, run=tmp_path / "none", zeroshot=zeroshot)
    assert not out.exists()


def test_a_record_of_commands_survives_the_file(tmp_path: Path) -> None:
    steps = [Step("a", ("b", "c d"), 1.5, 0, 3.0, "note"), Step("e", ("f",), 0.1, 1, 4.0)]
    write_steps(tmp_path / "commands.json", steps)
    assert read_steps(tmp_path / "commands.json") == steps
    assert read_steps(tmp_path / "none.json") == []
    (tmp_path / "commands.json").write_text("[{}]")
    with pytest.raises(ReportError, match="delete it"):
        read_steps(tmp_path / "commands.json")
