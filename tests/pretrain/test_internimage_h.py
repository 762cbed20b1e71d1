"""InternImage-H for real: all of its 1,089,636,760 parameters train under ZeRO-3 on two CPU ranks.

Slow, and only where there is memory. With bf16 weights and gradients, float32 masters and two
float32 moments it takes 16 bytes a parameter, 17.4 GB, and two processes of 0.8 GB come on top.
With masters and moments of bf16, 8 bytes: no way to train for long, as small updates are lost, but
every layer, gradient and collective is the same. Run it alone:

    pytest -m slow -s tests/pretrain/test_internimage_h.py

It goes through `groundwork pretrain`. Peak memory of each rank and of the job is printed, and added
as a line of JSON to the file that GROUNDWORK_MEMORY_REPORT names.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import pytest

from groundwork.pretrain.engine.checkpoint import read_state, require_checkpoint
from groundwork.pretrain.engine.partitioned_init import parameter_count
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig

pytestmark = [pytest.mark.slow, pytest.mark.multirank]

PARAMETERS = 1_089_636_760
STEPS = 2
GB = 1e9


@dataclass(frozen=True)
class States:
    """Of masters and moments: bytes a parameter on disk; memory that must be free, in GB; settings
    of DeepSpeed."""

    saved_bytes: int
    needed_gb: float
    deepspeed: dict[str, object]


STATES = {
    "float32": States(12, 21.5, {}),
    "bf16": States(
        6,
        14.5,
        {
            "bf16": {
                "enabled": True,
                "bf16_master_weights_and_grads": True,
                "bf16_optimizer_states": True,
            }
        },
    ),
}

#: Nothing is kept or gathered that need not be: of a bf16 weight a rank has its half and, in turn,
#: a layer's whole; gradients are reduced, and masters stepped, in small portions. The masters lie
#: in host memory as offloading would put them, but without its copy of the gradients.
FRUGAL = {
    "reduce_bucket_size": 10_000_000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 60_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 100_000,
    "sub_group_size": 10_000_000,
}


@dataclass(frozen=True)
class Memory:
    """Peaks in GB: resident memory of each rank, and of all processes of the job at one time."""

    ranks: list[float]
    job: float
    seconds: float


def recipe(shards: Path, model: InternImageConfig, size: int, deepspeed: dict[str, object]) -> str:
    """A recipe file, which is JSON as well as YAML."""
    return json.dumps(
        {
            "model": asdict(model),
            "objective": {"kind": "classification"},
            "data": {
                "kind": "labelled_images",
                "shards": str(shards),
                "image": {"size": size},
                "workers": 0,
            },
            "train": {
                "steps": STEPS,
                "global_batch": 2,
                "precision": "bf16",
                "zero_stage": 3,
                "gradient_clipping": 5.0,
            },
            "optimizer": {"lr": 1e-5, "weight_decay": 0.05, "layer_decay": 0.9},
            "schedule": {"min_lr": 1e-5},
            "monitor": {"log_every": 1, "tensorboard": False},
            "checkpoint": {"every_steps": 1000, "keep": 1},
            "deepspeed": {"zero_optimization": FRUGAL, **deepspeed},
        }
    )


def train(path: Path, out: Path, timeout_s: float) -> tuple[Memory, str]:
    """`groundwork pretrain` with two ranks, and what memory it took."""
    log = out.with_suffix(".log")
    began = time.monotonic()
    with log.open("w") as file:
        job = subprocess.Popen(
            [
                *(str(Path(sys.executable).parent / "groundwork"), "pretrain", str(path)),
                *("--out", str(out), "--ranks", "2", "--timeout", str(timeout_s)),
            ],
            env={
                **os.environ,
                **{"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
                # give freed blocks back: fragments of gathered layers would pile up
                **{"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "100000"},
            },
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    peaks: dict[int, float] = {}
    most = 0.0
    try:
        while job.poll() is None:
            resident = {}
            for process in psutil.Process(job.pid).children(recursive=True):
                try:
                    resident[process.pid] = process.memory_info().rss / GB
                except psutil.Error:
                    continue  # it has just ended
            most = max(most, sum(resident.values()))
            for pid, value in resident.items():
                peaks[pid] = max(peaks.get(pid, 0.0), value)
            assert time.monotonic() < began + timeout_s, log.read_text()
            time.sleep(0.2)
    finally:
        for process in [*psutil.Process().children(recursive=True)]:
            if job.poll() is None:
                process.kill()
    ranks = sorted(peaks.values(), reverse=True)[:2]
    return Memory(ranks, most, time.monotonic() - began), log.read_text()


def check(out: Path, text: str, saved_bytes: int) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), text
    for line in lines:
        assert 0 < line["loss"] < 20
        assert 0 < line["grad_norm"] < 1000
        assert line["tflops_per_s"] > 0
    assert lines[0]["loss"] != lines[1]["loss"]
    checkpoint = require_checkpoint(out)
    assert read_state(checkpoint).step == STEPS
    saved = sum(path.stat().st_size for path in checkpoint.rglob("*optim_states.pt"))
    assert saved > saved_bytes * PARAMETERS
    return lines


@pytest.mark.parametrize("kind", STATES)
def test_two_ranks_train_all_of_h(kind: str, tiny_shards: Path, tmp_path: Path) -> None:
    states, available = STATES[kind], psutil.virtual_memory().available / GB
    if available < states.needed_gb:
        pytest.skip(f"{available:.1f} GB of memory are free, {states.needed_gb} are needed")
    model = replace(InternImageConfig.variant("h"), activation_checkpointing=True)
    assert parameter_count(lambda: InternImage(model)) == PARAMETERS
    path, out = tmp_path / "h.yaml", tmp_path / "h"
    path.write_text(recipe(tiny_shards, model, 64, states.deepspeed))
    memory, text = train(path, out, 1800)
    lines = check(out, text, states.saved_bytes)
    shutil.rmtree(out)  # 8 to 15 GB
    report = {
        "parameters": PARAMETERS,
        "states": kind,
        "peak_gb_of_each_rank": [round(value, 2) for value in memory.ranks],
        "peak_gb_of_the_job": round(memory.job, 2),
        "seconds": round(memory.seconds, 1),
        "seconds_per_step": [round(line["seconds_per_step"], 1) for line in lines],
        "losses": [line["loss"] for line in lines],
    }
    print(json.dumps(report))
    if name := os.environ.get("GROUNDWORK_MEMORY_REPORT"):
        with Path(name).open("a") as file:
            file.write(json.dumps(report) + "\n")
    # each rank has its half of everything, and little more
    each = (states.saved_bytes + 4) * PARAMETERS / 2 / GB
    assert max(memory.ranks) < each + 2.0
