"""InternImage under ZeRO-3: its fused layers read parameters of several modules, all partitioned.

The two ranks run both cases in one process group; this file is also their program.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from groundwork.pretrain.models.internimage import InternImage, InternImageConfig

pytestmark = pytest.mark.multirank

CONFIG = InternImageConfig(
    num_classes=3,
    channels=16,
    depths=(1, 1, 2, 1),
    groups=(1, 2, 4, 8),
    norm="post_norm",
    layer_scale=0.5,
)
STEPS = 3
#: So small that roundings do not grow from step to step.
LR = 0.01


def build(checkpointing: bool) -> InternImage:
    torch.manual_seed(0)
    model = InternImage(replace(CONFIG, activation_checkpointing=checkpointing))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loss_of(model: torch.nn.Module, step: int) -> Tensor:
    torch.manual_seed(100 + step)
    images: Tensor = model(torch.randn(2, 3, 32, 32))
    return images.square().mean()


def settings() -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 1_000_000,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
        },
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_ranks_of_partitions_train_as_one_process(runs: Path, checkpointing: bool) -> None:
    model = build(checkpointing)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    got = torch.load(runs / f"{checkpointing}.pt")
    assert got["losses"] == pytest.approx(losses, rel=1e-4)
    assert losses[-1] != losses[0]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            got["weights"][name],
            parameter.detach(),
            rtol=1e-3,
            atol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.fixture(scope="module")
def runs(run_two_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zero3")
    run_two_ranks(__file__, out)
    return out


def main(folder: str) -> None:
    """A rank: trains with and without activation checkpointing on partitioned parameters."""
    from groundwork.pretrain.engine.deepspeed_config import prepare_environment, start_process_group

    prepare_environment()
    world = start_process_group(60)
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    for checkpointing in (False, True):
        model = build(checkpointing)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings())
        assert all(p.numel() == 0 for p in engine.module.parameters())
        losses = []
        for step in range(STEPS):
            loss = loss_of(engine, step)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        weights = {
            name: safe_get_full_fp32_param(p).cpu().clone()
            for name, p in engine.module.named_parameters()
        }
        if world.is_main:
            torch.save({"losses": losses, "weights": weights}, Path(folder) / f"{checkpointing}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
