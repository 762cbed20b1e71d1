"""Fixtures for all tests: golden files beside the repository, WordNet, a tiny data set, jobs."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from groundwork.data.knowledge.index import KnowledgeIndex
from groundwork.data.knowledge.wordnet import DEBIAN_DICTIONARY, build_wordnet
from groundwork.data.samples import Concept, Sample
from groundwork.data.shards import write_shards
from groundwork.data.sources.scenes import ScenesConfig, scenes_concepts, scenes_samples

_REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """One thread, here and in the jobs that tests start, unless the caller says otherwise.

    Models as small as those of tests gain nothing from more, and on a busy machine threads that
    wait for each other take many times as long.
    """
    threads = os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(threads))


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """Training in this process sets RANK and so on, which no later job shall inherit."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """The folder of golden files that hold others' texts and weights, so stay out of git."""
    named = os.environ.get("GROUNDWORK_GOLDEN")
    folder = Path(named) if named else _REPOSITORY.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(f"no golden files in {folder}: set GROUNDWORK_GOLDEN to their folder")
    return folder


@pytest.fixture(scope="session")
def wordnet_dictionary() -> Path:
    """WordNet 3.0 as Debian ships it."""
    if not (DEBIAN_DICTIONARY / "data.noun").is_file():
        pytest.skip(f"no WordNet in {DEBIAN_DICTIONARY}: `apt-get install wordnet-base`")
    return DEBIAN_DICTIONARY


@pytest.fixture(scope="session")
def wordnet_index(
    wordnet_dictionary: Path, tmp_path_factory: pytest.TempPathFactory
) -> KnowledgeIndex:
    """The knowledge index of the whole of WordNet, built once (about 3 s)."""
    path = tmp_path_factory.mktemp("knowledge") / "wordnet.gkb"
    build_wordnet(wordnet_dictionary, path)
    return KnowledgeIndex(path)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 6 coloured-pattern classes: 96 training pictures, 12 of other renderings."""
    out = tmp_path_factory.mktemp("tiny") / "shards"
    names = ("red disc", "green disc", "blue disc", "red bar", "green bar", "blue bar")
    colours = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}

    def samples() -> Iterator[tuple[str, Sample]]:
        rng = np.random.default_rng(0)
        for number in range(108):
            label = number % len(names)
            colour, shape = names[label].split()
            pixels = rng.integers(0, 60, (24, 24, 3), np.uint8)
            y, x = np.mgrid[:24, :24] - 12 + rng.integers(-3, 4, (2, 1, 1))
            inside = x**2 + y**2 < 50 if shape == "disc" else abs(x) < 3
            pixels[inside] = colours[colour]
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            split = "train" if number < 96 else "heldout_renderings"
            info = {"label": label}
            yield split, Sample(f"{number:04d}", buffer.getvalue(), "png", names[label], info)

    concepts = [Concept(label, name) for label, name in enumerate(names)]
    write_shards(
        samples(),
        out,
        name="tiny",
        source={"kind": "tiny"},
        licence="CC0",
        concepts=concepts,
        max_samples=40,
    )
    return out


@pytest.fixture(scope="session")
def tiny_recipe(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over `tiny_shards` that trains in seconds; two ranks, ZeRO-3, every tensor cut."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        f"""
model:
  kind: klite
  projection_dim: 16
  image: {{kind: swin, image_size: 16, patch_size: 4, embed_dim: 8, depths: [1, 2],
           num_heads: [2, 2], window_size: 2, drop_path: 0.2}}
  text: {{context_length: 12, width: 16, layers: 1, heads: 2, drop_path: 0.1}}
objective: {{kind: unicl}}
data:
  shards: {tiny_shards}
  image: {{size: 16}}
  tokenizer: {{vocab_size: 600}}
  workers: 1
train: {{steps: 40, global_batch: 16, micro_batch: 4, precision: fp32, gradient_clipping: 1.0}}
optimizer: {{lr: 1.0e-3}}
schedule: {{warmup_steps: 4}}
checkpoint: {{every_steps: 7}}
monitor: {{log_every: 1, tensorboard: false}}
deepspeed: {{zero_optimization: {{stage3_param_persistence_threshold: 0}}}}
"""
    )
    return path


@pytest.fixture(scope="session")
def build_scenes() -> Callable[[Path, int, int], Path]:
    """Writes a data set of synthetic scenes, so many for training and for `val`, into a folder."""

    def build(out: Path, train: int, val: int) -> Path:
        config = ScenesConfig(train=train, val=val, compositional=0)
        write_shards(
            scenes_samples(config),
            out,
            name="scenes",
            source={"kind": "scenes"},
            licence="CC0 1.0",
            concepts=scenes_concepts(config),
        )
        return out

    return build


@pytest.fixture(scope="session")
def run_two_ranks() -> Callable[..., None]:
    """Runs a file of tests as the program of two ranks of one job, to the end of both."""

    def run(program: str, *arguments: object, timeout_s: float = 500) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        ranks = [
            subprocess.Popen(
                [sys.executable, program, *map(str, arguments)],
                env={
                    **os.environ,
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
                    **{"LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                    **{"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            texts = [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(texts)

    return run


class Job:
    """A training job in a process group of its own, so that nothing of it survives the test."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        scripts = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "PYTHONPATH": str(_REPOSITORY / "tests" / "namespace"),
            "OMP_NUM_THREADS": "1",
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            command,
            cwd=_REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, timeout_s: float = 180) -> int:
        """The exit status."""
        return self.process.wait(timeout_s)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """Wait until `condition` holds; fails with the log when the job ends before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"the job ended early:\n{self.text()}"
            assert time.monotonic() < deadline, f"waited in vain:\n{self.text()}"
            time.sleep(0.02)

    def text(self) -> str:
        """All that the job printed so far."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """kill -9 for every process of the job."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait(30)


@pytest.fixture
def start_job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts `deepspeed launch/pretrain.py` (or `groundwork`) with free ports; kills leftovers."""
    jobs: list[Job] = []

    def start(*arguments: str, launcher: str = "deepspeed", ranks: int = 2) -> Job:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        scripts = Path(sys.executable).parent
        command = {
            "deepspeed": [
                *(str(scripts / "deepspeed"), "--num_gpus", str(ranks)),
                *("--master_port", str(port), "launch/pretrain.py", *arguments),
            ],
            "groundwork": [str(scripts / "groundwork"), *arguments],
        }[launcher]
        jobs.append(Job(command, tmp_path / f"job-{len(jobs)}.log"))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()
