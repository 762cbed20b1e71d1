"""M3I on two ranks: the loss of the global batch, ZeRO-3, and a teacher that follows.

The two ranks do all of it in one process group; this file is also their program.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groundwork.pretrain.models.clip_text import TextConfig
from groundwork.pretrain.models.klite import InternImageTower, KliteConfig, build_klite
from groundwork.pretrain.models.mixed_images import draw_masks
from groundwork.pretrain.objectives.m3i import M3i, M3iConfig

pytestmark = pytest.mark.multirank

STEPS = 4
#: So small that roundings do not grow from step to step.
LR = 0.02
#: `partitioned`: every parameter is cut; `persistent`: all are so small that they stay gathered.
THRESHOLDS = {"partitioned": 0, "persistent": 100_000}


def build(precision: torch.dtype = torch.float32) -> M3i:
    torch.manual_seed(0)
    image = InternImageTower(
        channels=16,
        depths=(1, 1, 1, 1),
        groups=(1, 2, 4, 8),
        norm="res_post_norm",
        center_feature_scale=True,
        use_clip_projector=True,
        clip_embed_dim=32,
        clip_num_heads=4,
        clip_dim=32,
        drop_path=0.0,
        activation_checkpointing=True,
    )
    text = TextConfig(vocab_size=60, context_length=8, width=32, layers=1, heads=2)
    model = build_klite(KliteConfig(image=image, text=text, projection_dim=16, logit_scale=2.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    config = M3iConfig(
        decoder_depth=1, decoder_width=32, decoder_heads=4, momentum=0.5, final_momentum=0.8
    )
    return M3i(model, config, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)).to(precision).train()


def global_batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 50, (8, 8), generator=generator)
    ids[:, -1] = 59
    image = torch.randint(0, 256, (8, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return {"image": image, "ids": ids, "labels": torch.tensor([-1, 4, 4, -1, -1, 7, 4, -1])}


def share_of(rank: int, step: int) -> dict[str, Tensor]:
    return {name: value[4 * rank : 4 * rank + 4] for name, value in global_batch(step).items()}


def masks_of(rank: int, step: int) -> Tensor:
    """What the objective draws on a rank that has been seeded with this."""
    torch.manual_seed(100 * rank + step)
    return draw_masks(2, 2, 2, 0.5)


def whole_losses(m3i: M3i, step: int) -> dict[str, Tensor]:
    masks = torch.cat([masks_of(rank, step) for rank in range(2)])
    return m3i.losses(global_batch(step), masks, torch.float32)


def test_two_ranks_have_the_loss_and_the_gradients_of_the_global_batch(runs: Path) -> None:
    m3i = build()
    losses = whole_losses(m3i, 0)
    losses["loss"].backward()
    ranks = [torch.load(runs / f"gloo-{rank}.pt") for rank in range(2)]
    for name, value in losses.items():
        mean = (ranks[0]["losses"][name] + ranks[1]["losses"][name]) / 2
        torch.testing.assert_close(mean, value.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in m3i.named_parameters():
        if parameter.grad is None:
            assert name.startswith("teacher."), name
            continue
        mean = (ranks[0]["gradients"][name] + ranks[1]["gradients"][name]) / 2
        torch.testing.assert_close(
            mean, parameter.grad, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", THRESHOLDS)
def test_zero_3_trains_as_one_process_does_and_the_teacher_follows(runs: Path, case: str) -> None:
    m3i = build()
    own, first = dict(m3i.named_parameters()), dict(build().named_parameters())
    optimizer = torch.optim.SGD([p for p in own.values() if p.requires_grad], lr=LR)
    losses = []
    for step in range(STEPS):
        values = whole_losses(m3i, step)
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
        with torch.no_grad():
            for teacher, student in m3i.momentum_pairs():
                own[teacher].lerp_(own[student], 1 - m3i.momentum(step, STEPS))
        losses.append([float(values[name].detach()) for name in ("loss", "dense")])

    got = torch.load(runs / f"{case}.pt")
    for (loss, dense), expected in zip(got["losses"], losses, strict=True):
        assert [loss, dense] == pytest.approx(expected, rel=1e-5)
    moved = 0.0
    for name, parameter in own.items():
        torch.testing.assert_close(
            got["weights"][name],
            parameter.detach(),
            rtol=1e-3,
            atol=2e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )
        if name.startswith("teacher."):
            moved = max(moved, float((parameter - first[name]).abs().max()))
    assert moved > 1e-3


def test_a_teacher_built_from_partitioned_weights_has_them(runs: Path) -> None:
    pairs = torch.load(runs / "init.pt")
    assert pairs
    for name, (teacher, student) in pairs.items():
        assert torch.equal(teacher, student), name
    assert sum(float(teacher.abs().sum()) for teacher, _ in pairs.values()) > 0


def test_bf16_weights_train_and_the_teacher_is_averaged_in_float32(runs: Path) -> None:
    got = torch.load(runs / "bf16.pt")
    assert all(torch.tensor(values).isfinite().all() for values in got["losses"])
    assert got["steps_seen"] > 0.5  # an average kept in bf16 would not notice most of them


@pytest.fixture(scope="module")
def runs(run_two_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("m3i")
    run_two_ranks(__file__, out)
    return out


def settings(threshold: int, *, bf16: bool = False) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 1_000_000,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": threshold,
        },
    }


def main(folder: str) -> None:
    """A rank: one backward pass without DeepSpeed, then ZeRO-3 in its variants."""
    from groundwork.pretrain.engine.deepspeed_config import prepare_environment, start_process_group

    prepare_environment()
    world = start_process_group(60)
    out = Path(folder)

    m3i = build()
    losses = m3i.losses(share_of(world.rank, 0), masks_of(world.rank, 0), torch.float32)
    losses["loss"].backward()
    gradients = {n: p.grad for n, p in m3i.named_parameters() if p.grad is not None}
    values = {name: value.detach() for name, value in losses.items()}
    torch.save({"losses": values, "gradients": gradients}, out / f"gloo-{world.rank}.pt")

    for case, threshold in THRESHOLDS.items():
        trained = train(world.rank, settings(threshold), torch.float32)
        if world.is_main:
            torch.save(trained, out / f"{case}.pt")
    trained = train(world.rank, settings(0, bf16=True), torch.bfloat16)
    if world.is_main:
        torch.save(trained, out / "bf16.pt")
    built = built_in_partitions()
    if world.is_main:
        torch.save(built, out / "init.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train(rank: int, config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Losses of all steps, mean over ranks, and the weights at the end."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    from groundwork.pretrain.engine.averages import Averages

    m3i = build()
    lr = LR if dtype == torch.float32 else 1e-4
    optimizer = torch.optim.SGD([p for p in m3i.parameters() if p.requires_grad], lr=lr)
    engine, *_ = deepspeed.initialize(model=m3i, optimizer=optimizer, config=config)
    averages = Averages(engine, None, STEPS)
    assert averages.teacher is not None
    before = {name: part.values.clone() for name, part in averages.teacher.shadow.items()}
    losses = []
    for step in range(STEPS):
        torch.manual_seed(100 * rank + step)
        values = engine(share_of(rank, step), dtype)
        engine.backward(values["loss"])
        engine.step()
        averages.after_step(step + 1)
        mean = torch.stack([values[name].detach().float() for name in ("loss", "dense")])
        torch.distributed.all_reduce(mean)
        losses.append((mean / 2).tolist())
    shadow = averages.teacher.shadow
    same = sum(int((shadow[n].values == before[n]).sum()) for n in before)
    count = sum(value.numel() for value in before.values())
    weights = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            weights[name] = safe_get_full_fp32_param(parameter).cpu().clone()
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().float().clone()
    return {"losses": losses, "weights": weights, "steps_seen": 1 - same / count}


def built_in_partitions() -> dict[str, tuple[Tensor, Tensor]]:
    """The teacher's and the student's weights where `zero.Init` cut them as they were built."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=settings(0)):
        image = InternImageTower(
            channels=16,
            depths=(1, 1, 1, 1),
            groups=(1, 2, 4, 8),
            use_clip_projector=True,
            clip_embed_dim=32,
            clip_num_heads=4,
            clip_dim=32,
        )
        text = TextConfig(vocab_size=60, context_length=8, width=32, layers=1, heads=2)
        model = build_klite(KliteConfig(image=image, text=text, projection_dim=16))
        config = replace(M3iConfig(), decoder_depth=1, decoder_width=32, decoder_heads=4)
        m3i = M3i(model, config, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    own = dict(m3i.named_parameters())
    pairs = {}
    for teacher, student in m3i.momentum_pairs():
        assert hasattr(own[teacher], "ds_id") and own[teacher].numel() == 0
        with deepspeed.zero.GatheredParameters([own[teacher], own[student]]):
            pairs[teacher] = own[teacher].detach().clone(), own[student].detach().clone()
    return pairs


if __name__ == "__main__":
    main(*sys.argv[1:])
