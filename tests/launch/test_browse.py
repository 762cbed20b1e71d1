"""`groundwork shards browse`: what it opens, how it ends, and the samples of a step of a run."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from groundwork.data.dataset import open_dataset
from groundwork.data.samples import Sample
from groundwork.data.shards import write_shards
from groundwork.launch.cli import main

NAMESPACE = Path(__file__).resolve().parents[1] / "namespace"


class Browsing:
    """The command at work."""

    def __init__(self, arguments: list[str]) -> None:
        scripts = Path(sys.executable).parent
        self.process = subprocess.Popen(
            [scripts / "groundwork", "shards", "browse", *arguments],
            env={**os.environ, "PYTHONPATH": str(NAMESPACE)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # ignored in all that a shell without job control runs in the background
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert self.process.stdout is not None
        self.printed = ""
        for line in self.process.stdout:
            self.printed += line
            if match := re.search(r"http://127\.0\.0\.1:(\d+)/(\S*)", line):
                self.port, self.place = int(match[1]), match[2]
                return
        raise AssertionError(self.printed)

    def get(self, path: str) -> Any:
        [record] = self.lines(path)
        return record

    def lines(self, path: str) -> list[Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse().read()
        connection.close()
        return [json.loads(line) for line in answer.splitlines()]

    def end(self, number: int) -> tuple[int, str]:
        """The exit status after a signal, and all that was printed."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=30)
        return self.process.returncode, self.printed + rest


@pytest.fixture
def browse() -> Iterator[Callable[..., Browsing]]:
    started: list[Browsing] = []

    def start(*arguments: object) -> Browsing:
        started.append(Browsing([*map(str, arguments), "--port", "0"]))
        return started[-1]

    yield start
    for browsing in started:
        browsing.process.kill()
        browsing.process.wait(10)


def test_it_serves_until_ctrl_c_even_while_it_is_asked(
    browse: Callable[..., Browsing], tiny_shards: Path
) -> None:
    server = browse(tiny_shards, "--locate", 3, "--global-batch", 8, "--no-shuffle")
    assert server.place == "#order=step&step=3"
    about = server.get("/api/about")
    assert (about["name"], about["globalBatch"], about["shuffle"]) == ("tiny", 8, False)
    idle = socket.create_connection(("127.0.0.1", server.port))  # as browsers keep them
    status, printed = server.end(signal.SIGINT)
    idle.close()
    assert status == 0
    assert "heldout_renderings 12, train 96" in printed and printed.endswith("stopped\n")
    assert "Traceback" not in printed


def test_a_step_of_a_run_shows_what_its_own_decoder_let_through(
    browse: Callable[..., Browsing], tiny_shards: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    from groundwork.pretrain.image_text import open_stream, open_training_data
    from groundwork.pretrain.recipe import load_recipe, recipe_to_dict

    image = open_dataset(str(tiny_shards)).read(0).image
    # every fourth has neither a class nor a caption: a good picture, but no use to this run
    texts = ["" if n % 4 == 0 else f"caption {n}" for n in range(50)]
    samples = [("train", Sample(f"k{n}", image, "png", text, {})) for n, text in enumerate(texts)]
    write_shards(samples, tmp_path / "o", name="o", source={}, licence="")
    run, batch, step = tmp_path / "run", 16, 2
    run.mkdir()
    overrides = [f"data.shards={tmp_path / 'o'}", "train.seed=11", f"train.global_batch={batch}"]
    recipe = load_recipe(str(tiny_recipe), overrides)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False))

    server = browse("--run", run, "--locate", step)
    assert server.get("/api/about")["globalBatch"] == batch
    start = (step - 1) * batch
    path = f"/api/list?split=train&order=training&start={start}&count={batch}"
    shown = server.get(path)["entries"]
    bad = server.lines("/api/scan?split=train&bad=1")
    assert [line["match"]["key"] for line in bad if "match" in line] == [
        f"k{n}" for n in range(0, 50, 4)
    ]
    server.end(signal.SIGTERM)

    stream = open_stream(recipe.data, open_training_data(recipe.data), seed=11)
    examples, faults = stream.__getitems__(list(range(start, start + batch)))
    assert [entry["text"] for entry in shown] == [example.text for example in examples]
    replaced = [(e["position"], bad["key"], bad["reason"]) for e in shown for bad in e["replaced"]]
    assert replaced == [(fault.position, fault.key, fault.reason) for fault in faults]
    assert len(faults) > 0
    assert np.unique([entry["position"] for entry in shown]).tolist() == [*range(start, start + 16)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a data set, or --run"),
        (["{shards}", "--locate", "3"], "a step is known by --run FOLDER, or by --global-batch N"),
        (["--run", "x", "--global-batch", "3"], "the run has its own"),
        (["{shards}", "--locate", "0", "--global-batch", "3"], "--locate"),
        (["{shards}", "--split", "nosuch"], "no split 'nosuch'; it has heldout_renderings, train"),
        (["nosuchfolder"], "nosuchfolder"),
        (["{shards}", "--knowledge", "nosuch.gkb"], "nosuch.gkb: cannot be opened"),
        (["{shards}", "--port", "{taken}"], "cannot be used"),
    ],
)
def test_what_cannot_be_browsed_is_said(
    arguments: list[str], message: str, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = [a.format(shards=tiny_shards, taken=port) for a in arguments]
        assert main(["shards", "browse", *given]) != 0
    told = capsys.readouterr()
    # usage errors stand in a frame, which breaks lines
    plain = re.sub(r"[\s│╭╮╰╯─]+", " ", told.out + told.err)
    assert message in plain and "Traceback" not in plain
