"""An M3I run from its recipe to its weights: resumed bit for bit, read back, taken apart.

One process makes the runs; this file is also its program.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groundwork.pretrain.downstream.finetuning.initial_weights import read_backbone_weights
from groundwork.pretrain.engine.checkpoint import CheckpointError, require_checkpoint
from groundwork.pretrain.models.internimage import InternImage
from groundwork.pretrain.models.internimage_weights import official_names
from groundwork.pretrain.models.klite import InternImageTower
from groundwork.pretrain.recipe import RecipeError, load_recipe
from groundwork.pretrain.weights.m3i_tower import image_tower, joint_names, write_image_tower
from groundwork.pretrain.weights.official import read_file
from groundwork.pretrain.weights.trained import load_trained
from groundwork.pretrain.weights.zero_shards import full_weights, state_digest

TINY = InternImageTower(
    channels=16,
    depths=(1, 1, 1, 1),
    groups=(1, 2, 4, 8),
    use_clip_projector=True,
    clip_embed_dim=32,
    clip_num_heads=4,
    clip_dim=32,
    drop_path=0.2,
)
SETTINGS = (
    *("model.image.channels=16", "model.image.depths=[1, 1, 1, 1]", "model.image.norm=pre_norm"),
    *("model.image.dw_kernel_size=3", "model.image.center_feature_scale=false"),
    *("model.image.clip_embed_dim=32", "model.image.clip_dim=32", "model.image.drop_path=0.2"),
    *("model.text.width=16", "model.projection_dim=16", "objective.decoder_width=16"),
    *("data.tokenizer.vocab_size=600", "train.steps=4", "train.global_batch=8"),
    *("train.precision=bf16", "optimizer.lr=1e-3", "schedule.warmup_steps=0"),
    *("checkpoint.every_steps=2", "checkpoint.keep=9"),
    *("monitor.log_every=1", "monitor.tensorboard=false"),
)


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("m3i")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = subprocess.run(
        [sys.executable, __file__, str(tiny_shards), str(out)],
        env={
            **os.environ,
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            **{"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return out


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_equals_an_uninterrupted_one(runs: Path) -> None:
    kept = ("step", "loss", "dense", "image_to_text", "teacher_spread")
    whole, resumed = ([[m[k] for k in kept] for m in metrics(runs / n)] for n in ("a", "b"))
    assert len(whole) == 4 and resumed == whole
    digests = {state_digest(require_checkpoint(runs / name)) for name in ("a", "b")}
    assert len(digests) == 1


def test_the_teacher_of_a_run_is_read_back_as_it_was_averaged(runs: Path) -> None:
    early, late = (
        full_weights(runs / "a" / "checkpoints" / f"step-0000000{step}") for step in (2, 4)
    )
    momentum = load_trained(runs / "a").objective.momentum
    assert callable(momentum)
    student, teacher = image_tower(late, "student"), image_tower(late, "teacher")
    assert student.keys() == teacher.keys()
    moved = [name for name in teacher if not torch.equal(teacher[name], student[name])]
    assert moved
    # between where it was and the student, as the momentum is close to 1
    name = "patch_embed.conv1.weight"
    before = image_tower(early, "teacher")[name]
    assert 0 < (teacher[name] - before).abs().max() < (student[name] - before).abs().max()


@pytest.mark.parametrize("tower", ["student", "teacher"])
def test_a_tower_of_a_run_loads_as_official_weights(runs: Path, tmp_path: Path, tower: str) -> None:
    path = tmp_path / "tower.safetensors"
    write_image_tower(runs / "a", path, tower)  # type: ignore[arg-type]
    model = InternImage(TINY)
    report = model.load_official(read_file(path))
    assert report.initial == report.dropped == report.skipped == ()
    expected = load_trained(runs / "a").objective.state_dict()
    prefix = {"student": "model.visual.", "teacher": "teacher."}[tower]
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[prefix + name]), name


def test_readers_of_joint_weights_and_of_runs_find_the_student(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "both.safetensors"
    write_image_tower(runs / "a", path, "both")
    student = image_tower(full_weights(require_checkpoint(runs / "a")), "student")
    joint, dropped = official_names(read_file(path))
    of_run, _, _ = read_backbone_weights(runs / "a", ema=True)
    for read in (joint, of_run):
        assert read.keys() == student.keys()
        assert all(torch.equal(read[name], value) for name, value in student.items())
    assert len(dropped) == len(student) and all(n.startswith("teacher.") for n in dropped)


def test_a_run_without_the_tower_is_named(tmp_path: Path) -> None:
    weights = {"model.visual.patch_embed.conv1.weight": torch.zeros(1)}
    assert list(image_tower(weights, "student")) == ["patch_embed.conv1.weight"]
    with pytest.raises(CheckpointError, match="no teacher in these weights"):
        joint_names(weights)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        write_image_tower(tmp_path, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"name it \.safetensors"):
        write_image_tower(tmp_path, tmp_path / "x.pt")


@pytest.mark.parametrize(("size", "parameters"), [("h", 1_088_867_760), ("g", 3_075_604_352)])
def test_the_published_sizes_are_pre_trained_on_30_epochs(size: str, parameters: int) -> None:
    recipe = load_recipe(f"internimage_{size}_m3i")
    assert recipe.train.steps * recipe.train.global_batch == pytest.approx(30 * 427e6, rel=1e-5)
    with torch.device("meta"):
        tower = InternImage(recipe.model.image)  # type: ignore[arg-type,union-attr]
    # the published count, without the classifier of 1000 classes
    assert sum(p.numel() for p in tower.parameters()) == parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.image.use_clip_projector=false", r"model\.image\.use_clip_projector: true"),
        ("data.image.size=80", r"objective\.mask_cell and data\.image\.size"),
        ("train.micro_batch=1", "a micro-batch has 1"),
    ],
)
def test_recipes_that_cannot_run_are_refused_as_they_are_read(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("internimage_emoji_m3i", [change])


def main(shards: str, folder: str) -> None:
    """Trains four steps, and a copy again from the second."""
    from groundwork.pretrain import run
    from groundwork.pretrain.engine.deepspeed_config import prepare_environment, start_process_group
    from groundwork.pretrain.engine.stop import StopRequest

    prepare_environment()
    world, stop = start_process_group(60), StopRequest()
    recipe = load_recipe("internimage_emoji_m3i", [*SETTINGS, f"data.shards={shards}"])
    whole, resumed = Path(folder) / "a", Path(folder) / "b"
    for out in (whole, resumed):
        data = run.check_inputs(recipe, out)
        assert run.pretrain(recipe, out, world, stop, data) == recipe.train.steps
        if out == whole:
            shutil.copytree(whole, resumed)
            shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
