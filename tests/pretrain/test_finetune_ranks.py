"""Fine-tuning on two ranks: DDP goes on after a kill, ZeRO-3 too, each sample is scored once."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from groundwork.data.dataset import open_dataset
from groundwork.pretrain.downstream.evaluation.frozen import classify_split
from groundwork.pretrain.downstream.evaluation.image_models import load_image_model
from groundwork.pretrain.downstream.finetuning.evaluation import SplitReading
from groundwork.pretrain.engine.checkpoint import complete_checkpoints, require_checkpoint
from groundwork.pretrain.weights.zero_shards import full_weights

pytestmark = pytest.mark.multirank

STEPS = 20
SPLIT = "heldout_renderings"
RECIPE = """
task: {{kind: classification, image: {{size: 32, scale: [0.7, 1.0]}}, objective: {{mixup: 0.2}}}}
backbone: {{channels: 16, depths: [1, 1, 1, 1], groups: [1, 2, 4, 8], drop_path: 0.1}}
data: {{shards: {shards}, evaluation_split: heldout_renderings, workers: 1}}
train: {{steps: {steps}, global_batch: 16, micro_batch: 4, precision: fp32, gradient_clipping: 5.0}}
optimizer: {{lr: 3.0e-3, weight_decay: 0.05}}
ema: {{decay: 0.8}}
evaluation: {{every_steps: 10, batch: 5}}
checkpoint: {{every_steps: 6, keep: 9}}
monitor: {{log_every: 1, tensorboard: false}}
"""
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {{zero_stage: {stage}, zero3_init_flag: false}}
num_machines: 1
num_processes: 2
mixed_precision: bf16
main_process_port: {port}
"""


@pytest.fixture(scope="module")
def recipe(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny_finetune.yaml"
    path.write_text(RECIPE.format(shards=tiny_shards, steps=STEPS))
    return path


def metrics(out: Path) -> list[dict[str, Any]]:
    path, found = out / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # the last line, while it is being written
    return found


def losses(out: Path) -> list[tuple[int, float, float]]:
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(out)]


def assert_same_run(out: Path, expected: Path) -> None:
    assert losses(out) == losses(expected) and len(losses(out)) == STEPS
    names = ("evaluations.jsonl", "results.json")
    assert [(out / n).read_text() for n in names] == [(expected / n).read_text() for n in names]
    one, other = require_checkpoint(out), require_checkpoint(expected)
    files = [path.name for path in sorted(other.glob("*.safetensors"))]
    assert {"ema.safetensors", "model.safetensors"} <= set(files)
    for name in files:
        for key, value in load_file(other / name).items():
            torch.testing.assert_close(load_file(one / name)[key], value, rtol=0, atol=0)


def test_ddp_goes_on_after_a_kill_and_scores_each_sample_once(
    start_job: Callable[..., Any], recipe: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def arguments(out: Path) -> list[str]:
        return ["finetune", str(recipe), "--out", str(out), "--ranks", "2"]

    job = start_job(*arguments(whole), launcher="groundwork")
    assert job.wait() == 0, job.text()
    job = start_job(*arguments(killed), launcher="groundwork")
    job.wait_for(lambda: len(metrics(killed)) >= 9)
    for process in psutil.Process(job.process.pid).children(recursive=True):
        process.kill()
    assert job.wait(60) != 0
    assert len(metrics(killed)) < STEPS
    again = start_job(*arguments(killed), launcher="groundwork")
    assert again.wait() == 0, again.text()
    assert "resuming from" in again.text()
    assert_same_run(killed, whole)
    # 12 samples, 2 ranks, batches of 5: the last round has 2 samples for one rank, none for one
    model = load_image_model(whole)
    dataset = open_dataset(str(tiny_shards), SPLIT)
    alone = classify_split(model, dataset, model.image, SplitReading(12))
    last = json.loads((whole / "results.json").read_text())["last"]
    assert last.pop("step") == STEPS
    assert last == pytest.approx(alone) and alone["samples"] == 12


def accelerate_job(folder: Path, recipe: Path, out: Path, stage: int, *more: str) -> Any:
    """`accelerate launch` of two ranks on CPUs, with DeepSpeed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / f"accelerate-{stage}-{port}.yaml"
    config.write_text(ACCELERATE.format(stage=stage, port=port))
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    repository = Path(__file__).resolve().parents[2]
    environment["PYTHONPATH"] = str(repository / "tests" / "namespace")
    command = [
        *(str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(config)),
        *("launch/finetune.py", str(recipe), "--out", str(out)),
        *("--set", "train.precision=bf16", *more),
    ]
    return subprocess.Popen(
        command,
        cwd=repository,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_accelerate(*arguments: Any) -> tuple[int, str]:
    job = accelerate_job(*arguments)
    try:
        text, _ = job.communicate(timeout=240)
    finally:
        job.kill()
    return job.returncode, text


def test_zero_3_resumes_bit_for_bit_and_leaves_whole_weights(recipe: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    status, text = run_accelerate(tmp_path, recipe, whole, 3)
    assert status == 0, text
    last = require_checkpoint(whole)
    shards = list((last / "deepspeed").glob("bf16_zero_pp_rank_*_optim_states.pt"))
    assert len(shards) == 2  # DeepSpeed it is, and each rank had its part
    shutil.copytree(whole, resumed)
    for checkpoint in complete_checkpoints(resumed):
        if checkpoint.name > "step-00000012":
            shutil.rmtree(checkpoint)
    status, text = run_accelerate(tmp_path, recipe, resumed, 3)
    assert status == 0, text
    assert "resuming from" in text
    assert_same_run(resumed, whole)
    saved, masters = load_file(last / "model.safetensors"), full_weights(last)
    assert saved.keys() >= masters.keys()
    for name, value in masters.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)
    assert any((value != value.bfloat16()).any() for value in masters.values())
    loss = [value for _, value, _ in losses(whole)]
    assert sum(loss[-4:]) < 0.9 * sum(loss[:4])


@pytest.mark.slow
def test_fsdp_2_resumes_bit_for_bit(recipe: Path, tmp_path: Path) -> None:
    """Accelerate runs FSDP on GPUs only; this file, as a program, makes it do so on CPUs."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for out, steps in ((whole, 10**9), (stopped, 7), (stopped, 10**9)):
        done = subprocess.run(
            [
                *(str(Path(sys.executable).parent / "torchrun"), "--standalone"),
                *("--nproc_per_node", "2", __file__, str(recipe), str(out), str(steps)),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "DistributedType.FSDP True" in done.stdout
    assert_same_run(stopped, whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_other_stages_train_like_zero_3(stage: int, recipe: Path, tmp_path: Path) -> None:
    """In float32; rounding to bf16 moves the gradients of a model as small as this by a tenth."""
    few = ("--set", "train.steps=6", "--set", "train.precision=fp32")
    for number in (3, stage):
        status, text = run_accelerate(tmp_path, recipe, tmp_path / f"{number}", number, *few)
        assert status == 0, text
    for one, other in zip(losses(tmp_path / "3"), losses(tmp_path / f"{stage}"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_deepspeed_that_would_be_ignored_is_an_error(recipe: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job_of_one = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    wanted = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"}
    program = (
        "import os, sys; os.environ.update(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0'); "
        "from groundwork.launch.cli import main; raise SystemExit(main(sys.argv[1:]))"
    )
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, "finetune", str(recipe), "--out", str(tmp_path / "run")],
        env={
            **os.environ,
            **job_of_one,
            **wanted,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(repository / "tests" / "namespace"),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "asks for deepspeed" in done.stderr and "use_cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def fsdp_rank(recipe_name: str, out: str, steps: str) -> None:
    """A rank of FSDP 2, on a CPU, that stops after so many steps."""
    import accelerate
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from groundwork.pretrain.downstream.finetuning.engine import start_accelerator
    from groundwork.pretrain.downstream.finetuning.recipe import load_finetune_recipe
    from groundwork.pretrain.downstream.finetuning.run import (
        check_finetune_inputs,
        finetune,
        finetune_plan,
    )

    class OnCpu(accelerate.Accelerator):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            wanted = os.environ.pop("ACCELERATE_USE_FSDP")
            super().__init__(*arguments, **options)
            os.environ["ACCELERATE_USE_FSDP"] = wanted
            self.state.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Block"],
                reshard_after_forward=True,
            )

    class Stop:
        left = int(steps)

        def agreed(self) -> bool:
            self.left -= 1
            return self.left < 0

    accelerate.Accelerator = OnCpu
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    recipe = load_finetune_recipe(recipe_name)
    plan = finetune_plan(recipe, int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    data = check_finetune_inputs(recipe, Path(out))
    accelerator, world = start_accelerator(recipe.train, plan, 60)
    print(accelerator.distributed_type, accelerator.is_fsdp2)
    stop: Any = Stop()
    finetune(recipe, Path(out), accelerator, world, stop, data)


if __name__ == "__main__":
    fsdp_rank(*sys.argv[1:])
