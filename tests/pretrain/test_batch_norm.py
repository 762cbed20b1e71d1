"""Batch norms with float32 statistics: against torch's own, in bfloat16, and over two ranks.

The two ranks run all cases in one process group; this file is also their program. What they must
come to is nn.BatchNorm2d on the rows of both, in float64.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundwork.pretrain.engine.batch_statistics import batch_statistics
from groundwork.pretrain.models.batch_norm import (
    FloatBatchNorm,
    SyncFloatBatchNorm,
    float_batch_norms,
    synchronise_batch_norms,
)

CHANNELS = 3
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

#: rows of each rank, dtype of x, dtype of the weights, shape of a row
CASES: dict[str, tuple[tuple[int, int], torch.dtype, torch.dtype, tuple[int, int]]] = {
    "even": ((2, 2), torch.float32, torch.float32, (3, 5)),
    "uneven": ((3, 1), torch.float32, torch.float32, (3, 5)),
    "empty": ((0, 4), torch.float32, torch.float32, (3, 5)),
    "one value each": ((1, 1), torch.float32, torch.float32, (1, 1)),
    "bf16": ((3, 1), torch.bfloat16, torch.float32, (3, 5)),
    "bf16 weights": ((3, 1), torch.bfloat16, torch.bfloat16, (3, 5)),
    "bf16 empty": ((4, 0), torch.bfloat16, torch.bfloat16, (3, 5)),
    "float32 beside bf16 weights": ((1, 2), torch.float32, torch.bfloat16, (3, 5)),
}


def norm_like(kind: Any, **settings: Any) -> Any:
    """With weights and statistics that are no default ones, and bfloat16 numbers."""
    norm = kind(CHANNELS, **settings)
    with torch.no_grad():
        for name, low in (("weight", 0.5), ("bias", -1.0)):
            if getattr(norm, name) is not None:
                getattr(norm, name).copy_(low + torch.arange(CHANNELS) / 4)
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(2.0)
    return norm


def rows_and_gradients(case: str) -> tuple[list[Tensor], list[Tensor]]:
    """Of both ranks. A channel has a mean far above its deviation."""
    rows, dtype, _, size = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    offset = torch.tensor([0.0, 1.0, 60.0]).view(-1, 1, 1)
    x = torch.randn(sum(rows), CHANNELS, *size, generator=generator) + offset
    grad = torch.randn(x.shape, generator=generator)
    return list(x.to(dtype).split(rows)), list(grad.to(dtype).split(rows))


def trained(norm: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """What comes of two training passes, the second one with its gradients."""
    norm.train()
    norm(x)
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(grad)
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in norm.named_parameters()}
    found |= {name: getattr(norm, name).clone() for name in STATISTICS}
    return {name: value for name, value in found.items() if value is not None}


# ---- one rank ----


@pytest.mark.parametrize("kind", [FloatBatchNorm, SyncFloatBatchNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"eps": 0.1, "momentum": 0.5}, {"affine": False}])
def test_alone_it_is_torchs(kind: Any, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    x, grad = (torch.cat(part).to(dtype) for part in rows_and_gradients("even"))
    ours = norm_like(kind, **settings).to(dtype)
    theirs = norm_like(nn.BatchNorm2d, **settings).to(dtype)
    got, expected = trained(ours, x, grad), trained(theirs, x, grad)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=0)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("kind", [FloatBatchNorm, SyncFloatBatchNorm])
def test_in_bfloat16_the_statistics_are_float32(kind: Any) -> None:
    x, grad = (torch.cat(part) for part in rows_and_gradients("bf16 weights"))
    norm = norm_like(kind).to(torch.bfloat16)
    got = trained(norm, x, grad)
    expected = trained(norm_like(nn.BatchNorm2d).double(), x.double(), grad.double())
    assert got["y"].dtype == got["weight"].dtype == torch.bfloat16
    for name in STATISTICS[:2]:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-5, atol=1e-5)
    for name in ("y", "x", "weight", "bias"):
        torch.testing.assert_close(got[name].double(), expected[name], rtol=0.02, atol=0.02)


# ---- replacing ----


def test_replaced_norms_keep_their_values_names_and_settings() -> None:
    shared = norm_like(nn.BatchNorm2d, eps=0.1, momentum=0.3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.Sequential(shared), nn.BatchNorm1d(2))
    model[2].eval()
    parameters, state = dict(model.named_parameters()), model.state_dict()
    assert float_batch_norms(model) is model
    norm = model[1]
    assert type(norm) is FloatBatchNorm and model[2][0] is norm and not norm.training
    assert (norm.eps, norm.momentum) == (0.1, 0.3)
    assert type(model[3]) is nn.BatchNorm1d
    synchronise_batch_norms(model)
    assert type(model[1]) is type(model[3]) is SyncFloatBatchNorm and model[2][0] is model[1]
    assert (model[1].eps, model[1].momentum, model[1].training) == (0.1, 0.3, False)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    assert model.state_dict().keys() == state.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    assert batch_statistics(model) == {}  # those of ranks that agree need no averaging


def test_a_module_that_is_itself_a_norm_is_given_back_replaced() -> None:
    norm = nn.BatchNorm2d(3, affine=False).to(torch.bfloat16)
    assert type(float_batch_norms(norm)) is FloatBatchNorm
    new = synchronise_batch_norms(norm)
    assert type(new) is SyncFloatBatchNorm and list(new.parameters()) == []
    assert new.running_mean.dtype == torch.float32  # type: ignore[union-attr]


def test_norms_with_other_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"1 has momentum=None.* a number"):
        float_batch_norms(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, momentum=None)))
    with pytest.raises(ValueError, match=r"0 has .*track_running_stats=False"):
        synchronise_batch_norms(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))
    with pytest.raises(TypeError, match=r"0 is a LazyBatchNorm2d.*sync_batch_norm"):
        synchronise_batch_norms(nn.Sequential(nn.LazyBatchNorm2d()))


# ---- two ranks ----


@pytest.fixture(scope="module")
def ranks(run_two_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    run_two_ranks(__file__, out)
    return out


@pytest.mark.multirank
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_torchs_on_the_rows_of_both(ranks: Path, case: str) -> None:
    first, second = (torch.load(ranks / f"{case}-{rank}.pt") for rank in range(2))
    _, dtype, weights, _ = CASES[case]
    x, grad = (torch.cat(part).double() for part in rows_and_gradients(case))
    expected = trained(norm_like(nn.BatchNorm2d).double(), x, grad)
    got = {name: torch.cat([first[name], second[name]]) for name in ("y", "x")}
    got |= {name: first[name].double() + second[name] for name in ("weight", "bias")}
    # the last place of bfloat16, of x and y as large as 3, of sums as large as 40
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 8e-3}
    for name in ("y", "x"):
        assert first[name].dtype == second[name].dtype == dtype
        t = tolerance[dtype]
        torch.testing.assert_close(got[name].double(), expected[name], rtol=t, atol=t)
    for name in ("weight", "bias"):
        assert first[name].dtype == second[name].dtype == weights
        t = tolerance[weights]
        torch.testing.assert_close(got[name], expected[name], rtol=t, atol=10 * t)
    for name in STATISTICS:
        assert torch.equal(first[name], second[name])
        assert first[name].dtype in (torch.float32, torch.int64)
        torch.testing.assert_close(first[name].to(expected[name].dtype), expected[name])


@pytest.mark.multirank
def test_a_batch_without_rows_on_any_rank_leaves_the_statistics(ranks: Path) -> None:
    for rank in range(2):
        got = torch.load(ranks / f"nothing-{rank}.pt")
        assert got["y"].shape == got["x"].shape == (0, CHANNELS, 2, 2)
        assert torch.equal(got["weight"], torch.zeros(CHANNELS))
        assert torch.equal(got["running_mean"], torch.full((CHANNELS,), 0.5))
        assert torch.equal(got["running_var"], torch.full((CHANNELS,), 2.0))


@pytest.mark.multirank
def test_in_evaluation_no_rank_waits_for_the_others(ranks: Path) -> None:
    got = torch.load(ranks / "evaluation-0.pt")  # the other one made no forward pass
    (x, _), _ = rows_and_gradients("even")
    torch.testing.assert_close(got, norm_like(nn.BatchNorm2d).eval()(x), rtol=0, atol=0)


def main(folder: str) -> None:
    """A rank: every case."""
    torch.distributed.init_process_group("gloo")
    rank, out = torch.distributed.get_rank(), Path(folder)
    for case, (_, _, weights, _) in CASES.items():
        x, grad = (part[rank] for part in rows_and_gradients(case))
        norm = norm_like(SyncFloatBatchNorm).to(weights)
        torch.save(trained(norm, x, grad), out / f"{case}-{rank}.pt")
    x = torch.zeros(0, CHANNELS, 2, 2)
    torch.save(trained(norm_like(SyncFloatBatchNorm), x, x), out / f"nothing-{rank}.pt")
    if rank == 0:
        x = rows_and_gradients("even")[0][0]
        torch.save(norm_like(SyncFloatBatchNorm).eval()(x), out / f"evaluation-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
