"""Models built in parts: the same numbers, never whole on a rank, trained and resumed by a run.

The two ranks run all cases in one process group; this file is also their program.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from groundwork.pretrain.engine.checkpoint import require_checkpoint
from groundwork.pretrain.engine.partitioned_init import parameter_count
from groundwork.pretrain.kinds import build_objective
from groundwork.pretrain.recipe import Recipe, RecipeError, load_recipe
from groundwork.pretrain.weights.zero_shards import full_buffers, full_weights, state_digest

pytestmark = pytest.mark.multirank

#: One with BatchNorm in its head, as T to XL; one with the attention pooling and all that H has.
MODELS = {
    "convolutional": "{kind: internimage, num_classes: 6, channels: 16, depths: [1, 1, 1, 1], "
    "groups: [1, 2, 4, 8]}",
    "pooled": "{kind: internimage, num_classes: 6, channels: 16, depths: [1, 1, 2, 1], "
    "groups: [1, 2, 4, 8], norm: res_post_norm, dw_kernel_size: 5, center_feature_scale: true, "
    "level2_post_norm_block_ids: [0], use_clip_projector: true, clip_embed_dim: 32, "
    "clip_num_heads: 2, clip_dim: 24, activation_checkpointing: true}",
}
CASES = [("convolutional", "bf16"), ("pooled", "bf16"), ("pooled", "fp32")]


def load(path: str, model: str, precision: str, *more: str) -> Recipe:
    overrides = [f"model={MODELS[model]}", f"train.precision={precision}", *more]
    return load_recipe(path, overrides)


@pytest.fixture(scope="module")
def recipe(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "parts.yaml"
    path.write_text(
        f"""
model: {MODELS["pooled"]}
objective: {{kind: classification}}
data: {{kind: labelled_images, shards: {tiny_shards}, image: {{size: 64}}, workers: 0}}
train: {{steps: 4, global_batch: 4, gradient_clipping: 5.0, partitioned_init: true}}
optimizer: {{lr: 1.0e-3, layer_decay: 0.9}}
ema: {{decay: 0.9}}
checkpoint: {{every_steps: 2}}
monitor: {{log_every: 1, tensorboard: false}}
"""
    )
    return path


@pytest.fixture(scope="module")
def runs(
    run_two_ranks: Callable[..., None], recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("parts")
    run_two_ranks(__file__, recipe, out)
    return out


@pytest.mark.parametrize(("model", "precision"), CASES)
def test_the_initial_weights_are_those_of_a_whole_model(
    runs: Path, recipe: Path, model: str, precision: str
) -> None:
    loaded = load(str(recipe), model, precision)
    torch.manual_seed(loaded.train.seed)
    expected = build_objective(loaded, None)
    built = torch.load(runs / f"{model}-{precision}.pt")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for key, value in expected.named_parameters():
        assert built["weights"][key].dtype == dtype
        assert torch.equal(built["weights"][key], value.detach().to(dtype)), key
    for key, buffer in expected.named_buffers():
        assert built["buffers"][key].dtype == buffer.dtype
        assert torch.equal(built["buffers"][key], buffer), key


@pytest.mark.parametrize(("model", "precision"), CASES)
def test_no_rank_holds_more_than_its_part_and_one_layer(
    runs: Path, recipe: Path, model: str, precision: str
) -> None:
    built = torch.load(runs / f"{model}-{precision}.pt")
    total = parameter_count(lambda: build_objective(load(str(recipe), model, precision), None))
    assert built["largest"] < total / 2 + built["layer"] + 2_000
    assert built["own"] == pytest.approx(total / 2, rel=0.02)


@pytest.mark.parametrize(("model", "precision"), CASES)
def test_it_trains_saves_and_resumes_bit_for_bit(runs: Path, model: str, precision: str) -> None:
    whole, resumed = runs / f"{model}-{precision}", runs / f"{model}-{precision}-resumed"
    saved = [require_checkpoint(out) for out in (whole, resumed)]
    assert [checkpoint.name for checkpoint in saved] == ["step-00000004"] * 2
    assert state_digest(saved[0]) == state_digest(saved[1])
    averages = full_weights(saved[0], ema=True)
    initial = torch.load(runs / f"{model}-{precision}.pt")["weights"]
    assert averages.keys() == initial.keys()
    assert sum(not torch.equal(averages[k], initial[k].float()) for k in initial) > 10
    assert all(b.dtype != torch.bfloat16 for b in full_buffers(saved[0]).values())
    lines = map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
    assert all(line["tflops_per_s"] > 0 and "mfu" not in line for line in lines)


def test_counting_takes_no_memory() -> None:
    assert parameter_count(lambda: nn.Linear(10**6, 10**6)) == 10**12 + 10**6


def test_other_stages_have_no_parts(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="only stage 3 partitions the weights"):
        load_recipe(str(recipe), ["train.zero_stage=2"])


def build_and_note(recipe: Recipe, path: Path, is_main: bool) -> None:
    """Build the model in parts; note its values, and how much of it is held at a time."""
    import deepspeed

    from groundwork.pretrain.engine import partitioned_init
    from groundwork.pretrain.run import batch_plan, engine_settings

    settings = engine_settings(recipe, batch_plan(recipe, 2, torch.distributed.get_rank()))
    largest, post = 0, deepspeed.zero.Init._post_init_method
    seen: list[nn.Module] = []
    layers: list[int] = []

    def look(self: Any, module: nn.Module) -> None:
        nonlocal largest
        seen.append(module)
        own = [p for p in module.parameters(recurse=False) if not hasattr(p, "ds_id")]
        layers.append(sum(p.numel() for p in own))
        kept = {id(p): p for m in seen for p in m.parameters()}
        parts = sum(p.ds_tensor.numel() for p in kept.values() if hasattr(p, "ds_tensor"))
        largest = max(largest, parts + sum(p.numel() for p in kept.values()))
        post(self, module)

    deepspeed.zero.Init._post_init_method = look
    torch.manual_seed(recipe.train.seed)
    objective = partitioned_init.build_partitioned(lambda: build_objective(recipe, None), settings)
    deepspeed.zero.Init._post_init_method = post
    named = dict(objective.named_parameters())
    own = sum(p.ds_tensor.numel() for p in named.values())  # type: ignore[attr-defined]
    with deepspeed.zero.GatheredParameters(list(named.values())):
        weights = {key: p.detach().clone() for key, p in named.items()}
    if is_main:
        noted = {
            "weights": weights,
            "buffers": dict(objective.named_buffers()),
            "largest": largest,
            "layer": max(layers),
            "own": own,
        }
        torch.save(noted, path)


def main(recipe_path: str, folder: str) -> None:
    from groundwork.pretrain import run
    from groundwork.pretrain.engine.deepspeed_config import prepare_environment, start_process_group
    from groundwork.pretrain.engine.stop import StopRequest

    prepare_environment()
    world = start_process_group(60)
    stop = StopRequest()

    def train(recipe: Recipe, out: Path) -> None:
        data = run.check_inputs(recipe, out)
        assert run.pretrain(recipe, out, world, stop, data) == recipe.train.steps

    for model, precision in CASES:
        recipe = load(recipe_path, model, precision)
        out = Path(folder) / f"{model}-{precision}"
        build_and_note(recipe, out.with_suffix(".pt"), world.is_main)
        train(recipe, out)
        copy = out.with_name(f"{out.name}-resumed")
        if world.is_main:
            shutil.copytree(out, copy)
            shutil.rmtree(copy / "checkpoints" / "step-00000004")
        torch.distributed.barrier()
        train(recipe, copy)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
