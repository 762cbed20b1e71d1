"""Every ZeRO stage and precision trains, saves, resumes bit for bit, and its weights are read back.

The two ranks run all cases in one process group, so that they import and start once: this file is
also their program.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groundwork.data.text import load_tokenizer
from groundwork.pretrain.engine.checkpoint import TAG, require_checkpoint
from groundwork.pretrain.kinds import build_objective
from groundwork.pretrain.recipe import Recipe, load_recipe
from groundwork.pretrain.weights.trained import load_trained
from groundwork.pretrain.weights.zero_shards import full_weights, state_digest

pytestmark = pytest.mark.multirank

CASES = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]


def settings(stage: int, precision: str, *more: str) -> list[str]:
    return [
        *(f"train.zero_stage={stage}", f"train.precision={precision}", "train.steps=6"),
        *("checkpoint.every_steps=3", "data.workers=0", *more),
    ]


def name(stage: int, precision: str) -> str:
    return f"stage-{stage}-{precision}"


def initial_recipe(recipe: str, stage: int) -> Recipe:
    """One step so short that no float32 weight notices it."""
    return load_recipe(recipe, settings(stage, "bf16", "train.steps=1", "optimizer.lr=1e-30"))


@pytest.fixture(scope="module")
def runs(
    run_two_ranks: Callable[..., None], tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("zero")
    run_two_ranks(__file__, tiny_recipe, out)
    return out


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == torch.float32
        torch.testing.assert_close(
            got[key], value, rtol=0, atol=0, msg=lambda m, k=key: f"{k}: {m}"
        )


def losses(out: Path) -> list[tuple[int, float, float]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(m["step"], m["loss"], m["grad_norm"]) for m in lines]


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(runs: Path, stage: int, precision: str) -> None:
    whole, resumed = runs / name(stage, precision), runs / f"{name(stage, precision)}-resumed"
    assert losses(resumed) == losses(whole)
    last = require_checkpoint(whole), require_checkpoint(resumed)
    assert [checkpoint.name for checkpoint in last] == ["step-00000006"] * 2
    assert state_digest(last[0]) == state_digest(last[1])


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_weights_read_back_are_those_of_the_engine(runs: Path, stage: int, precision: str) -> None:
    out = runs / name(stage, precision)
    engine = torch.load(out / "engine.pt")
    assert_equal(full_weights(require_checkpoint(out)), engine)
    loaded = dict(load_trained(out).objective.named_parameters())
    assert_equal({key: value.detach() for key, value in loaded.items()}, engine)


@pytest.mark.parametrize(("stage", "precision"), [case for case in CASES if case[0] > 0])
def test_weights_read_back_are_those_of_deepspeeds_converter(
    runs: Path, stage: int, precision: str
) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    checkpoint = require_checkpoint(runs / name(stage, precision))
    converted = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), TAG)
    weights = full_weights(checkpoint)
    assert_equal({key: converted[key] for key in weights}, weights)


def test_all_stages_train_alike(runs: Path) -> None:
    first, *others = (losses(runs / name(stage, "fp32")) for stage in range(4))
    for other in others:
        for (_, loss, norm), (_, expected, expected_norm) in zip(other, first, strict=True):
            assert loss == pytest.approx(expected, abs=1e-4)
            assert norm == pytest.approx(expected_norm, rel=1e-3) and norm > 0


@pytest.mark.parametrize("stage", range(4))
def test_masters_start_from_values_that_bf16_has_not_rounded(
    runs: Path, tiny_recipe: Path, stage: int
) -> None:
    out, recipe = runs / f"initial-{stage}", initial_recipe(str(tiny_recipe), stage)
    tokenizer = load_tokenizer(out / "tokenizer", recipe.model.text.context_length)
    torch.manual_seed(recipe.train.seed)
    expected = dict(build_objective(recipe, tokenizer).named_parameters())
    masters = full_weights(require_checkpoint(out))
    assert masters.keys() == expected.keys()
    for key, value in expected.items():
        # biases start from 0, which even this learning rate moves
        torch.testing.assert_close(masters[key], value.detach(), rtol=0, atol=1e-25)
    assert any((value != value.bfloat16()).any() for value in expected.values())


def main(recipe_path: str, folder: str) -> None:
    """A rank: trains every case, and resumes a copy of it from step 3."""
    from groundwork.pretrain import run
    from groundwork.pretrain.engine.deepspeed_config import prepare_environment, start_process_group
    from groundwork.pretrain.engine.stop import StopRequest

    prepare_environment()
    world = start_process_group(60)
    stop, write = StopRequest(), run.save_checkpoint

    def save_and_note(engine: Any, out: Path, *arguments: Any) -> Path:
        weights = engine_weights(engine)
        if world.is_main:
            torch.save(weights, out / "engine.pt")
        return write(engine, out, *arguments)

    def train(recipe: Recipe, out: Path) -> None:
        data = run.check_inputs(recipe, out)
        assert run.pretrain(recipe, out, world, stop, data) == recipe.train.steps

    run.save_checkpoint = save_and_note
    for stage, precision in CASES:
        out = Path(folder) / name(stage, precision)
        recipe = load_recipe(recipe_path, settings(stage, precision))
        train(recipe, out)
        copy = out.with_name(f"{out.name}-resumed")
        if world.is_main:
            shutil.copytree(out, copy)
            shutil.rmtree(copy / "checkpoints" / "step-00000006")
        torch.distributed.barrier()
        train(recipe, copy)
    for stage in range(4):
        train(initial_recipe(recipe_path, stage), Path(folder) / f"initial-{stage}")
    torch.distributed.destroy_process_group()


def engine_weights(engine: Any) -> dict[str, Tensor]:
    """The float32 weights as DeepSpeed's own functions give them."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = list(engine.module.named_parameters())
    if engine.zero_optimization_stage() > 0:
        return {key: safe_get_full_fp32_param(p).cpu().clone() for key, p in named}
    if not engine.bfloat16_enabled():
        return {key: p.detach().clone() for key, p in named}
    names = {id(p): key for key, p in named}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {
        names[id(p)]: m.detach().clone() for ps, ms in groups for p, m in zip(ps, ms, strict=True)
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
