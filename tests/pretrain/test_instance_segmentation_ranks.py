"""R-CNN detectors on two ranks of which one has a picture without objects: DDP and ZeRO-3.

The two ranks run all cases in one process group; this file is also their program.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groundwork.data.sources.scenes import ScenesConfig, scene_sample
from groundwork.pretrain.downstream.detection.data import (
    DetectionTransform,
    detection_collate,
    detection_example,
)
from groundwork.pretrain.downstream.detection.instance_segmentation import HEADS, Head, Rcnn
from groundwork.pretrain.models.internimage import InternImage, InternImageConfig
from groundwork.pretrain.models.mask_rcnn import RcnnConfig

pytestmark = pytest.mark.multirank

SIZE, STEPS, LR = 64, 2, 0.01
CLASSES = 32


def build(head: Head) -> Rcnn:
    torch.manual_seed(0)
    backbone = InternImage(
        InternImageConfig(
            num_classes=0, channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), drop_path=0.0
        )
    )
    config = RcnnConfig(
        channels=8,
        anchor_sizes=(8.0, 16.0, 32.0, 48.0, 64.0),
        proposals_before_nms=(40, 40),
        proposals=20,
        anchors_per_picture=16,
        boxes_per_picture=16,
        fc_channels=16,
        mask_channels=8,
    )
    model = Rcnn(backbone, head, config, CLASSES)
    with torch.no_grad():  # off the kinks of the sampling at whole pixels, where signs decide
        for name, parameter in model.named_parameters():
            if "offset" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch_of(rank: int, step: int) -> dict[str, Any]:
    """One picture; every second one of a rank is without objects."""
    _, sample = scene_sample(ScenesConfig(image_size=SIZE), 2 * step + rank)
    transform = DetectionTransform(sizes=(SIZE,), max_size=SIZE)
    batch = detection_collate(
        [detection_example(sample, transform, CLASSES, np.random.default_rng(step))]
    )
    if (rank + step) % 2:
        (target,) = batch["targets"]
        batch["targets"] = [
            {**target, **{name: target[name][:0] for name in ("boxes", "labels", "masks")}}
        ]
    torch.manual_seed(100 * step + rank)  # of the samples that the losses are taken of
    return batch


def settings() -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1_000_000,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
        },
    }


@pytest.mark.parametrize("head", HEADS)
def test_an_empty_picture_on_one_rank_holds_nobody_up(runs: Path, head: Head) -> None:
    first, second = (torch.load(runs / f"{head}-ddp-{rank}.pt") for rank in range(2))
    partitioned = torch.load(runs / f"{head}-zero3.pt")
    initial = build(head).state_dict()
    changed = 0
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        assert weight.isfinite().all(), name
        torch.testing.assert_close(
            partitioned[name], weight, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        changed += not torch.equal(weight, initial[name])
    assert changed > 0.9 * len(first)


@pytest.fixture(scope="module")
def runs(run_two_ranks: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rcnn")
    run_two_ranks(__file__, out)
    return out


def main(folder: str) -> None:
    """A rank: trains each head as DDP, then on partitioned parameters."""
    from groundwork.pretrain.engine.deepspeed_config import prepare_environment, start_process_group

    prepare_environment()
    world = start_process_group(200)
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    for head in HEADS:
        model = build(head).train()
        whole = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        for step in range(STEPS):
            optimizer.zero_grad()
            whole(batch_of(world.rank, step))["loss"].backward()
            optimizer.step()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        torch.save(weights, Path(folder) / f"{head}-ddp-{world.rank}.pt")

        model = build(head).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings())
        assert all(p.numel() == 0 for p in engine.module.parameters())
        for step in range(STEPS):
            engine.backward(engine(batch_of(world.rank, step))["loss"])
            engine.step()
        weights = {
            name: safe_get_full_fp32_param(p).cpu().clone()
            for name, p in engine.module.named_parameters()
        }
        if world.is_main:
            torch.save(weights, Path(folder) / f"{head}-zero3.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
