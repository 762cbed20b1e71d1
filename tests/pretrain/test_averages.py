"""The average of the weights and the momentum teacher, at every ZeRO stage: kept, saved, resumed.

The two ranks run all cases in one process group, so that they import and start once: this file is
also their program. The oracle averages whole float32 masters, as DeepSpeed gathers them.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundwork.pretrain.engine.averages import Averages
from groundwork.pretrain.engine.checkpoint import (
    CheckpointError,
    RunState,
    load_checkpoint,
    save_checkpoint,
)
from groundwork.pretrain.engine.deepspeed_config import (
    World,
    deepspeed_config,
    prepare_environment,
    start_process_group,
)
from groundwork.pretrain.engine.ema import EmaConfig
from groundwork.pretrain.engine.optimizer import OptimizerConfig, build_optimizer
from groundwork.pretrain.models.batch_norm import FloatBatchNorm
from groundwork.pretrain.weights.zero_shards import (
    full_buffers,
    full_weights,
    has_ema,
    state_digest,
)

pytestmark = pytest.mark.multirank

STEPS, SAVED_AT = 5, 3
EMA = EmaConfig(decay=0.5)  # reached from the 8th update on: before, the warm-up decides
MOMENTUM = 0.9
#: Stage, precision, and ZeRO-3's limit below which parameters stay gathered between steps.
CASES = [
    *((stage, precision, 0) for stage in range(4) for precision in ("fp32", "bf16")),
    (3, "bf16", 100_000),
]


def name(case: tuple[int, str, int]) -> str:
    return "-".join(map(str, case))


class Objective(nn.Module):
    """A student with BatchNorm, and its teacher. Sizes that two ranks do not divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.student = tower()
        self.teacher = tower().requires_grad_(False)
        self.head = nn.Linear(5, 3)

    def momentum_pairs(self) -> list[tuple[str, str]]:
        return [(f"teacher.{n}", f"student.{n}") for n, _ in self.teacher.named_parameters()]

    def momentum(self, step: int, total_steps: int) -> float:
        assert 0 <= step < total_steps == STEPS
        return MOMENTUM + 0.01 * step

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.student(x).mean((2, 3))
        with torch.no_grad():
            target = self.teacher(x).mean((2, 3))
        return self.head(tokens).float().square().mean() + (tokens - target).float().square().mean()


def tower() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 7, 1), FloatBatchNorm(7), nn.Conv2d(7, 5, 1), nn.Conv2d(5, 5, 1)
    )


@pytest.fixture(scope="module")
def runs(run_two_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("averages")
    run_two_ranks(__file__, out)
    return out


def checkpoint(runs: Path, case: tuple[int, str, int], step: int, suffix: str = "") -> Path:
    return runs / f"{name(case)}{suffix}" / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_saved_average_is_that_of_whole_float32_weights(
    runs: Path, case: tuple[int, str, int]
) -> None:
    for step in (SAVED_AT, STEPS):
        oracle = torch.load(runs / name(case) / f"oracle-{step}.pt")
        saved = checkpoint(runs, case, step)
        assert has_ema(saved)
        averages = full_weights(saved, ema=True)
        for key, value in oracle["ema"].items():
            torch.testing.assert_close(averages[key], value, rtol=0, atol=0, msg=key)
        plain = full_weights(saved)
        assert plain.keys() == averages.keys()
        assert any((plain[key] != averages[key]).any() for key in oracle["ema"])


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_teacher_is_the_average_of_the_student_everywhere(
    runs: Path, case: tuple[int, str, int]
) -> None:
    for step in (SAVED_AT, STEPS):
        oracle = torch.load(runs / name(case) / f"oracle-{step}.pt")
        for weights in (full_weights(checkpoint(runs, case, step), ema=e) for e in (False, True)):
            for key, value in oracle["teacher"].items():
                torch.testing.assert_close(weights[key], value, rtol=0, atol=0, msg=key)
        # and so are the weights that the ranks compute with, rounded
        dtype = torch.float32 if case[1] == "fp32" else torch.bfloat16
        ranks = [torch.load(runs / name(case) / f"teacher-{step}-{r}.pt") for r in range(2)]
        for rank in ranks:
            for key, value in oracle["teacher"].items():
                assert rank[key].dtype == dtype
                assert torch.equal(rank[key], value.to(dtype)), key


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_resumed_run_equals_an_uninterrupted_one(runs: Path, case: tuple[int, str, int]) -> None:
    whole, resumed = (checkpoint(runs, case, STEPS, suffix) for suffix in ("", "-resumed"))
    assert state_digest(whole) == state_digest(resumed)
    for key, value in full_weights(whole, ema=True).items():
        assert torch.equal(full_weights(resumed, ema=True)[key], value)
    for ema in (False, True):
        for key, value in full_buffers(whole, ema=ema).items():
            assert torch.equal(full_buffers(resumed, ema=ema)[key], value)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_ranks_save_the_same_float32_statistics(runs: Path, case: tuple[int, str, int]) -> None:
    saved = checkpoint(runs, case, STEPS)
    key = "student.1.running_mean"
    before = [torch.load(runs / name(case) / f"buffers-{r}.pt")[key] for r in range(2)]
    assert not torch.equal(*before)  # each rank has seen its own samples
    mean = full_buffers(saved)[key]
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, (before[0] + before[1]) / 2, rtol=1e-6, atol=1e-7)
    averages = full_buffers(saved, ema=True)
    assert averages[key].dtype == torch.float32
    assert not torch.equal(averages[key], mean)
    if case[0] > 0:
        states = [torch.load(saved / f"averages-{rank:05d}.pt")["ema"] for rank in range(2)]
        assert torch.equal(states[0]["buffers"][key], states[1]["buffers"][key])


def test_averages_of_other_runs_are_refused(runs: Path) -> None:
    errors = torch.load(runs / "errors.pt", weights_only=True)
    assert "was saved without averages" in errors["none saved"]
    assert "model.0.weight" in errors["frozen student"]
    assert "must be alike" in errors["other shape"]
    with pytest.raises(CheckpointError, match="no averages of the weights in it"):
        full_weights(runs / "plain" / "checkpoints" / "step-00000001", ema=True)


def test_masters_on_disk_are_refused() -> None:
    class Swapping:
        optimizer = type("Optimizer", (), {"swap_optimizer": True})()

    with pytest.raises(ValueError, match=r"offload_optimizer\.device is nvme"):
        Averages(Swapping(), EMA, 1)


def start_engine(objective: nn.Module, stage: int, precision: str, threshold: int) -> Any:
    import deepspeed

    settings = deepspeed_config(
        global_batch=8,
        micro_batch=4,
        accumulation=1,
        precision=precision,
        zero_stage=stage,
        gradient_clipping=1.0,
        overrides={"zero_optimization": {"stage3_param_persistence_threshold": threshold}},
    )
    optimizer = build_optimizer(objective, OptimizerConfig(lr=0.01))
    return deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)[0]


def one_step(engine: Any, step: int, world: World) -> None:
    torch.manual_seed(1000 * step + world.rank)
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(torch.randn(4, 3, 4, 4).to(dtype)))
    engine.step()


def masters(engine: Any) -> dict[str, Tensor]:
    """Whole float32 weights of the trained parameters, by DeepSpeed's own functions."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = [(key, p) for key, p in engine.module.named_parameters() if p.requires_grad]
    if engine.zero_optimization_stage() > 0:
        return {key: safe_get_full_fp32_param(p).clone() for key, p in named}
    if not engine.bfloat16_enabled():
        return {key: p.detach().clone() for key, p in named}
    names = {id(p): key for key, p in named}
    groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {
        names[id(p)]: m.detach().clone() for ps, ms in groups for p, m in zip(ps, ms, strict=True)
    }


def whole(engine: Any, prefix: str) -> dict[str, Tensor]:
    """The parameters the model computes with."""
    import deepspeed

    named = {k: p for k, p in engine.module.named_parameters() if k.startswith(prefix)}
    partitioned = [p for p in named.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned):
        return {key: p.detach().clone() for key, p in named.items()}


def run_case(case: tuple[int, str, int], folder: Path, world: World) -> None:
    out = folder / name(case)

    def train(out: Path, first: int) -> None:
        torch.manual_seed(0)
        objective = Objective()
        engine = start_engine(objective, *case)
        averages = Averages(engine, EMA, STEPS)
        if first:
            load_checkpoint(engine, checkpoint(folder, case, first), world, averages)
        else:
            oracle = {
                "ema": masters(engine),
                "teacher": {k: v.float() for k, v in whole(engine, "teacher").items()},
            }
        for step in range(first, STEPS):
            one_step(engine, step, world)
            if not first:
                buffers = {k: b.clone() for k, b in engine.module.named_buffers()}
                torch.save(buffers, out / f"buffers-{world.rank}.pt")
            averages.after_step(step + 1)
            if not first:
                decay = min(EMA.decay, (2 + step) / (11 + step))
                for key, value in masters(engine).items():
                    oracle["ema"][key].lerp_(value, 1 - decay)
                    teacher = oracle["teacher"].get(key.replace("student", "teacher"))
                    if teacher is not None and key.startswith("student"):
                        teacher.lerp_(value, 1 - (MOMENTUM + 0.01 * step))
            if step + 1 in (SAVED_AT, STEPS):
                if not first:
                    if world.is_main:
                        torch.save(oracle, out / f"oracle-{step + 1}.pt")
                    teacher_now = whole(engine, "teacher")
                    torch.save(teacher_now, out / f"teacher-{step + 1}-{world.rank}.pt")
                state = RunState(step + 1, 0, world.size, {}, "", "", "", 0)
                save_checkpoint(engine, out, state, world, 9, averages)

    out.mkdir(exist_ok=True)
    train(out, 0)
    train(out.with_name(f"{out.name}-resumed"), SAVED_AT)


def note_errors(folder: Path, world: World) -> None:
    """What Averages refuses."""
    engine = start_engine(Objective(), 3, "fp32", 0)
    state = RunState(1, 0, world.size, {}, "", "", "", 0)
    one_step(engine, 0, world)
    saved = save_checkpoint(engine, folder / "plain", state, world, 9)
    errors = {}
    try:
        load_checkpoint(engine, saved, world, Averages(engine, EMA, STEPS))
    except CheckpointError as error:
        errors["none saved"] = str(error)

    class Pairs(nn.Module):
        def __init__(self, names: tuple[str, str]) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(3, 3))
            self.model[0].requires_grad_(False)
            self.names = names

        def momentum_pairs(self) -> list[tuple[str, str]]:
            return [self.names]

    for what, names in (
        ("frozen student", ("model.1.weight", "model.0.weight")),
        ("other shape", ("model.0.weight", "model.2.weight")),
    ):
        try:
            Averages(start_engine(Pairs(names), 3, "fp32", 0), None, STEPS)
        except ValueError as error:
            errors[what] = str(error)
    if world.is_main:
        torch.save(errors, folder / "errors.pt")


def main(folder: str) -> None:
    prepare_environment()
    world = start_process_group(60)
    for case in CASES:
        run_case(case, Path(folder), world)
    note_errors(Path(folder), world)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
