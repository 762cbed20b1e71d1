import json
import math
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from groundwork.data.samples import Concept
from groundwork.data.sources.scenes import ScenesConfig, scene_sample, scenes_concepts
from groundwork.pretrain.downstream.detection.data import DetectionTransform
from groundwork.pretrain.downstream.detection.instance_segmentation import (
    InstanceSegmentation,
    InstanceSegmentationTask,
    build_instance_segmentation,
    class_names,
)
from groundwork.pretrain.downstream.finetuning.recipe import (
    FINETUNE_RECIPES,
    load_finetune_recipe,
)
from groundwork.pretrain.engine.ema import EmaConfig
from groundwork.pretrain.engine.optimizer import parameter_groups
from groundwork.pretrain.models.cascade_rcnn import STAGES, build_cascade_heads
from groundwork.pretrain.models.feature_pyramid import FeaturePyramid, PyramidRoIAlign
from groundwork.pretrain.models.internimage import InternImageConfig
from groundwork.pretrain.models.mask_rcnn import (
    RcnnConfig,
    build_mask_rcnn_heads,
    build_proposals,
    paste_masks,
)
from groundwork.pretrain.weights.mmdet_rcnn import rcnn_from_mmdet

SIZE = 64
SMALL = RcnnConfig(
    channels=8,
    anchor_sizes=(8.0, 16.0, 32.0, 48.0, 64.0),
    proposals_before_nms=(40, 40),
    proposals=20,
    anchors_per_picture=16,
    boxes_per_picture=16,
    fc_channels=16,
    mask_channels=8,
)
BACKBONE = InternImageConfig(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), drop_path=0.0)
HEADS = ("mask_rcnn", "cascade_mask_rcnn")


def scenes_task(head: Any, rcnn: RcnnConfig = SMALL) -> InstanceSegmentation:
    torch.manual_seed(0)
    config = InstanceSegmentationTask(
        head=head, image=DetectionTransform(sizes=(SIZE,), max_size=2 * SIZE), rcnn=rcnn
    )
    dataset: Any = SimpleNamespace(concepts=scenes_concepts(ScenesConfig(image_size=SIZE)))
    return build_instance_segmentation(config, BACKBONE, dataset)


def scenes_batch(task: InstanceSegmentation, train: bool, count: int = 2) -> dict[str, Any]:
    config = ScenesConfig(image_size=SIZE)
    rngs = [np.random.default_rng(i) if train else None for i in range(count)]
    return task.collate(
        [task.example(scene_sample(config, i)[1], rng) for i, rng in enumerate(rngs)]
    )


def without_objects(batch: dict[str, Any]) -> dict[str, Any]:
    targets = [
        {**t, "boxes": t["boxes"][:0], "labels": t["labels"][:0], "masks": t["masks"][:0]}
        for t in batch["targets"]
    ]
    return {**batch, "targets": targets}


# ---------------------------------------------------------------------------- pyramid


def test_boxes_are_pooled_at_the_centres_of_their_bins() -> None:
    # Each level holds the coordinates of its pixels' centres, which RoIAlign averages exactly.
    features = OrderedDict()
    for level, stride in enumerate((4, 8, 16, 32)):
        y, x = torch.meshgrid(*[(torch.arange(1024 // stride) + 0.5) * stride] * 2, indexing="ij")
        features[str(level)] = torch.stack([x, y, torch.full_like(x, level)])[None]
    boxes = torch.tensor(
        [
            [100.0, 200.0, 130.0, 250.0],
            [90.25, 300.5, 230.75, 420.0],  # side 130: from 112 on the second level
            [200.0, 100.0, 500.0, 400.0],
            [100.0, 100.0, 900.0, 800.0],
            [100.0, 100.0, 211.9, 212.0],  # just below 112
        ]
    )
    pooled = PyramidRoIAlign(7)(features, [boxes], [(1024, 1024)])
    assert pooled.shape == (5, 3, 7, 7)
    assert pooled[:, 2, 0, 0].tolist() == [0, 1, 2, 3, 0]
    centres = (torch.arange(7) + 0.5) / 7
    for box, bins in zip(boxes, pooled, strict=True):
        x = box[0] + centres * (box[2] - box[0])
        y = box[1] + centres * (box[3] - box[1])
        torch.testing.assert_close(bins[0], x.expand(7, 7), rtol=0, atol=2e-3)
        torch.testing.assert_close(bins[1], y[:, None].expand(7, 7), rtol=0, atol=2e-3)


def test_boxes_of_several_pictures_are_pooled_from_their_own() -> None:
    features = OrderedDict(
        (str(i), torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 64 >> i, 64 >> i))
        for i in range(4)
    )
    boxes = torch.tensor([[50.0, 50.0, 90.0, 90.0], [60.0, 60.0, 190.0, 190.0]])
    pooled = PyramidRoIAlign(3)(features, [boxes, boxes[:0], boxes[:1]], [(256, 256)] * 3)
    assert pooled[:, 0, 1, 1].tolist() == [0, 0, 2]


def test_the_pyramid_has_five_levels_in_float32() -> None:
    neck = FeaturePyramid([16, 32, 64, 128], 8)
    maps = [torch.randn(2, 16 << i, 16 >> i, 16 >> i) for i in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        levels = neck(maps)
    assert [(name, tuple(x.shape)) for name, x in levels.items()] == [
        ("0", (2, 8, 16, 16)),
        ("1", (2, 8, 8, 8)),
        ("2", (2, 8, 4, 4)),
        ("3", (2, 8, 2, 2)),
        ("pool", (2, 8, 1, 1)),
    ]
    assert all(x.dtype == torch.float32 for x in levels.values())
    assert torch.equal(levels["pool"][..., 0, 0], levels["3"][..., 0, 0])


def test_anchors_have_the_area_and_the_ratio_they_are_named_for() -> None:
    anchors = build_proposals(RcnnConfig()).anchor_generator.cell_anchors
    for size, level in zip((32, 64, 128, 256, 512), anchors, strict=True):
        sides = level[:, 2:] - level[:, :2]
        assert sides.prod(1).tolist() == pytest.approx([size**2] * 3)
        assert (sides[:, 1] / sides[:, 0]).tolist() == pytest.approx([0.5, 1, 2])
        assert level.sum().item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("train", "expected"), [(None, 20), (7, 7)])
def test_training_has_its_own_number_of_proposals(train: int | None, expected: int) -> None:
    torch.manual_seed(0)
    rpn = build_proposals(replace(SMALL, train_proposals=train, proposals_before_nms=(200, 200)))
    images = ImageList(torch.rand(1, 3, SIZE, SIZE), [(SIZE, SIZE)])
    maps = OrderedDict((str(i), torch.randn(1, 8, SIZE >> i, SIZE >> i)) for i in range(2, 7))
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]])}]
    assert len(rpn.train()(images, maps, targets)[0][0]) == expected
    assert len(rpn.eval()(images, maps)[0][0]) == 20


# ------------------------------------------------------------------------------ masks


def test_a_mask_is_pasted_where_its_box_is() -> None:
    boxes = torch.tensor([[10.0, 5.0, 30.0, 25.0], [-6.0, 30.0, 20.0, 60.0]])
    pasted = paste_masks(torch.ones(2, 1, 28, 28), boxes, 40, 60)
    expected = torch.zeros(2, 40, 60, dtype=torch.bool)
    expected[0, 5:25, 10:30] = True
    expected[1, 30:40, :20] = True
    assert torch.equal(pasted, expected)


def test_a_cropped_disc_comes_back_as_the_disc() -> None:
    y, x = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    disc = (x - 30.7) ** 2 + (y - 20.2) ** 2 < 12.4**2
    box = torch.tensor([[30.7 - 12.4, 20.2 - 12.4, 30.7 + 12.4, 20.2 + 12.4]])
    u = (torch.arange(28) + 0.5) / 28 * 2 - 1
    mask = (u[:, None] ** 2 + u[None] ** 2 < 1).float()[None, None]
    pasted = paste_masks(mask, box, 48, 64)[0]
    assert (pasted & disc).sum() / (pasted | disc).sum() > 0.96


def test_masks_are_pasted_alike_in_one_part_and_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(7, 1, 28, 28, generator=generator)
    corner = torch.rand(7, 2, generator=generator) * 30
    boxes = torch.cat([corner, corner + 5 + torch.rand(7, 2, generator=generator) * 30], 1)
    whole = paste_masks(masks, boxes, 50, 40)
    monkeypatch.setattr("groundwork.pretrain.models.mask_rcnn.PASTED_PIXELS", 4500)
    assert torch.equal(paste_masks(masks, boxes, 50, 40), whole)
    assert paste_masks(masks[:0], boxes[:0], 50, 40).shape == (0, 50, 40)


# ---------------------------------------------------------------------------- cascade


class FixedPredictor(nn.Module):
    """The same logits and deltas for every box."""

    def __init__(self, logits: Tensor, deltas: Tensor) -> None:
        super().__init__()
        self.logits, self.deltas = nn.Parameter(logits), nn.Parameter(deltas)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits.expand(len(x), -1), self.deltas.expand(len(x), -1)


def fixed_cascade(logits: list[list[float]], moves: list[list[float]]) -> Any:
    """Three stages, each moving the boxes of class c by moves[stage][c] of their width."""
    torch.manual_seed(0)
    config = RcnnConfig(masks=False, channels=4, fc_channels=8, score_threshold=0.2)
    heads = build_cascade_heads(config, len(logits[0]) - 1)
    for stage, settings, own_logits, own_moves in zip(
        heads.stages, STAGES, logits, moves, strict=True
    ):
        deltas = torch.tensor([[move * settings.weights[0], 0, 0, 0] for move in own_moves])
        stage.box_predictor = FixedPredictor(torch.tensor(own_logits), deltas.flatten())
    return heads


def features_of(pictures: int, channels: int = 4) -> "OrderedDict[str, Tensor]":
    torch.manual_seed(1)
    return OrderedDict(
        (str(i), torch.randn(pictures, channels, 64 >> i, 64 >> i)) for i in range(4)
    )


def test_each_stage_moves_the_boxes_of_the_one_before() -> None:
    logits = [[0.0, 2.0, 1.0], [0.0, 1.0, 3.0], [1.0, 2.0, 0.5]]
    # likeliest object classes of the first two stages: 1, then 2
    moves = [[0.9, 0.1, 0.5], [0.9, 0.5, 0.2], [0.9, 0.05, 0.3]]
    heads = fixed_cascade(logits, moves).eval()
    box = torch.tensor([[40.0, 40.0, 80.0, 90.0]])
    (found,), losses = heads(features_of(1), [box], [(256, 256)])
    assert losses == {}
    scores = torch.tensor(logits).mean(0).softmax(0)
    kept = [c for c in (1, 2) if scores[c] > 0.2]
    assert sorted(found["labels"].tolist()) == kept
    for label, score, mended in zip(
        found["labels"].tolist(), found["scores"], found["boxes"], strict=True
    ):
        assert score.item() == pytest.approx(scores[label].item())
        moved = box[0] + torch.tensor([1.0, 0, 1, 0]) * 40 * (0.1 + 0.2 + moves[2][label])
        torch.testing.assert_close(mended, moved)


@pytest.mark.parametrize("build", [build_mask_rcnn_heads, build_cascade_heads])
def test_no_proposal_at_all_gives_no_detection(build: Any) -> None:
    # so it is where a model has diverged: boxes that are not numbers are left out
    heads = build(SMALL, 3).eval()
    results, _ = heads(features_of(2, 8), [torch.zeros(0, 4)] * 2, [(256, 256)] * 2)
    assert [tuple(result["boxes"].shape) for result in results] == [(0, 4)] * 2
    assert [tuple(result["masks"].shape) for result in results] == [(0, 1, 28, 28)] * 2


def giou(a: Tensor, b: Tensor) -> float:
    """Generalised overlap of two boxes (arXiv 1902.09630), written out."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.tolist(), b.tolist()
    w = max(0.0, min(ax1, bx1) - max(ax0, bx0))
    h = max(0.0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - w * h
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return w * h / union - (hull - union) / hull


def test_the_losses_of_a_cascade_are_those_of_its_definition() -> None:
    logits = [[0.5, 2.0, 1.0], [0.0, 1.0, 3.0], [1.0, 2.0, 0.5]]
    moves = [[0.0, 0.05, -0.1], [0.0, 0.0, -0.02], [0.0, 0.01, 0.02]]
    heads = fixed_cascade(logits, moves).train()
    truth = torch.tensor([[40.0, 40.0, 80.0, 90.0], [120.0, 60.0, 200.0, 160.0]])
    labels = torch.tensor([1, 2])
    proposals = torch.tensor(
        [
            [46.0, 42.0, 86.0, 92.0],  # at the first object
            [130.0, 70.0, 215.0, 175.0],  # at the second
            [10.0, 200.0, 60.0, 240.0],  # at none
            [36.0, 48.0, 70.0, 96.0],
        ]
    )
    _, losses = heads(
        features_of(1), [proposals], [(256, 256)], [{"boxes": truth, "labels": labels}]
    )
    # The same by hand: the true boxes join in each stage, everything fits into the sample.
    boxes = proposals
    for number, settings in enumerate(STAGES):
        candidates = torch.cat([boxes, truth])
        overlap, of = box_iou(candidates, truth).max(1)
        label = torch.where(overlap >= settings.iou, labels[of], 0)
        move = torch.tensor(moves[number])
        cross_entropy = F.cross_entropy(torch.tensor(logits[number]).expand(len(label), -1), label)
        likely = int(torch.tensor(logits[number][1:]).argmax()) + 1
        chosen = torch.where(label > 0, label, likely)
        widths = candidates[:, 2] - candidates[:, 0]
        mended = candidates + torch.stack([move[chosen] * widths, torch.zeros_like(widths)] * 2, 1)
        distance = sum(1 - giou(mended[i], truth[of[i]]) for i in range(len(label)) if label[i] > 0)
        expected = settings.loss * cross_entropy.item()
        assert losses[f"loss_classifier_{number}"].item() == pytest.approx(expected, rel=1e-5)
        expected = settings.loss * 10 * distance / len(label)
        assert losses[f"loss_box_reg_{number}"].item() == pytest.approx(expected, rel=1e-4)
        boxes = mended[: len(boxes)].clamp(0, 256)
    assert len(losses) == 6


def test_the_stages_demand_ever_more_overlap() -> None:
    heads = build_cascade_heads(SMALL, 3)
    assert [stage.proposal_matcher.high_threshold for stage in heads.stages] == [0.5, 0.6, 0.7]
    assert heads.loss_weights == [1.0, 0.5, 0.25]
    stds = [[1 / w for w in stage.box_coder.weights] for stage in heads.stages]
    assert stds == [
        pytest.approx([0.1, 0.1, 0.2, 0.2]),
        pytest.approx([0.05, 0.05, 0.1, 0.1]),
        pytest.approx([0.033, 0.033, 0.067, 0.067]),
    ]


# -------------------------------------------------------------------------- the model


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_gets_a_gradient_also_without_any_object(head: str) -> None:
    task = scenes_task(head)
    batch = scenes_batch(task, train=True)
    assert all(len(target["boxes"]) for target in batch["targets"])
    for part in (batch, without_objects(batch)):
        task.model.train().zero_grad(set_to_none=True)
        losses = task.model(part)
        assert losses["loss"].isfinite()
        total = sum(value for name, value in losses.items() if name != "loss")
        torch.testing.assert_close(losses["loss"], total)
        losses["loss"].backward()
        for name, parameter in task.model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("head", HEADS)
def test_detections_are_in_pixels_of_the_original_picture(head: str) -> None:
    rcnn = RcnnConfig(**{**vars(SMALL), "score_threshold": 0.0})
    task = scenes_task(head, rcnn)
    batch = scenes_batch(task, train=False)
    batch["targets"][1]["orig_size"] = (SIZE * 2, SIZE * 3)
    task.model.eval()
    with torch.no_grad():
        predictions = task.model(batch)
        batch["targets"][1]["orig_size"] = (SIZE, SIZE)
        plain = task.model(batch)
    for prediction, (height, width) in zip(
        predictions, [(SIZE, SIZE), (SIZE * 2, SIZE * 3)], strict=True
    ):
        assert 0 < len(prediction["boxes"]) <= 100
        assert prediction["masks"].shape == (len(prediction["boxes"]), height, width)
        assert prediction["masks"].dtype == torch.bool
        assert prediction["labels"].min() >= 0 and prediction["labels"].max() < 32
        assert (prediction["scores"].diff() <= 0).all()
    scale = torch.tensor([3.0, 2.0, 3.0, 2.0])
    torch.testing.assert_close(predictions[1]["boxes"], plain[1]["boxes"] * scale)


def test_coordinates_stay_float32_under_autocast() -> None:
    task = scenes_task("mask_rcnn", RcnnConfig(**{**vars(SMALL), "score_threshold": 0.0}))
    batch = scenes_batch(task, train=False)
    task.model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (first, _) = task.model(batch)
    assert first["boxes"].dtype == first["scores"].dtype == torch.float32
    # edges that no bfloat16 can hold
    inside = first["boxes"][(first["boxes"] > 1) & (first["boxes"] < SIZE - 1)]
    assert (inside != inside.bfloat16().float()).any()


def test_the_labels_of_the_task_begin_at_0() -> None:
    task = scenes_task("mask_rcnn")
    predictor = task.model.get_submodule("heads.box_predictor")
    with torch.no_grad():
        predictor.cls_score.weight.zero_()
        predictor.cls_score.bias.zero_()[1 + 30] = 20  # after the background
    task.model.eval()
    with torch.no_grad():
        predictions = task.model(scenes_batch(task, train=False))
    assert {label for p in predictions for label in p["labels"].tolist()} == {30}


def test_without_masks_it_is_a_detector_of_boxes() -> None:
    task = scenes_task("cascade_mask_rcnn", RcnnConfig(**{**vars(SMALL), "masks": False}))
    batch = scenes_batch(task, train=True)
    assert "masks" not in batch["targets"][0]
    task.model.train()
    assert not [name for name in task.model(batch) if "mask" in name]
    task.model.eval()
    batch = scenes_batch(task, train=False)
    evaluator = task.evaluator()
    with torch.no_grad():
        evaluator.add(task.model(batch), batch)
    result = evaluator.result(evaluator.records())
    assert 0 <= result["box_ap"] < 0.1 and "mask_ap" not in result


def test_the_classes_come_from_the_data_set_or_the_recipe() -> None:
    named: Any = SimpleNamespace(concepts=[Concept(0, "cat"), Concept(2, "dog")])
    nameless: Any = SimpleNamespace(concepts=[])
    assert class_names(None, named) == ["cat", "1", "dog"]
    assert class_names(4, named) == ["cat", "1", "dog", "3"]
    assert class_names(2, nameless) == ["0", "1"]
    with pytest.raises(ValueError, match=r"num_classes is null, and the data set names no classes"):
        class_names(None, nameless)
    with pytest.raises(ValueError, match=r"num_classes is 2, and the data set names 3 classes"):
        class_names(2, named)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"anchor_sizes": (8.0, 16.0)}, r"anchor_sizes is \[8\.0, 16\.0\].*five levels"),
        ({"aspect_ratios": ()}, r"aspect_ratios is \[\]"),
        ({"proposals": 0}, "proposals is 0"),
        ({"train_proposals": 0}, r"train_proposals is 0.*null for as many as `proposals`"),
        ({"proposals_before_nms": (0, 5)}, r"proposals_before_nms is \[0, 5\]"),
        ({"nms_threshold": 1.5}, r"nms_threshold is 1\.5"),
    ],
)
def test_a_config_that_cannot_be_says_which_value(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RcnnConfig(**values)


# --------------------------------------------------------------------- published models

#: Parameters in millions as published, with 80 classes.
PUBLISHED = {
    "internimage_t_mask_rcnn_1x": 49,
    "internimage_s_mask_rcnn_3x": 69,
    "internimage_b_mask_rcnn_1x": 115,
    "internimage_l_cascade_1x": 277,
    "internimage_xl_cascade_3x": 387,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_have_the_published_number_of_parameters(name: str) -> None:
    recipe = load_finetune_recipe(name)
    dataset: Any = SimpleNamespace(concepts=[Concept(i, str(i)) for i in range(80)])
    assert isinstance(recipe.task, InstanceSegmentationTask)
    with torch.device("meta"):
        task = build_instance_segmentation(recipe.task, recipe.backbone, dataset)
    millions = sum(p.numel() for p in task.model.parameters()) / 1e6
    assert abs(millions - PUBLISHED[name]) < 0.6


def test_the_recipes_differ_only_where_the_official_configs_do() -> None:
    names = [path.stem for path in FINETUNE_RECIPES.glob("internimage_*_[13]x.yaml")]
    names = [name for name in names if "mask_rcnn" in name or "cascade" in name]
    assert len(names) == 10
    for name in names:
        recipe = load_finetune_recipe(name)
        epochs = 12 if name.endswith("1x") else 36
        batch = recipe.train.global_batch
        per_epoch = math.ceil(117_266 / batch)
        assert recipe.train.steps == epochs * per_epoch
        falls = (8, 11) if epochs == 12 else (27, 33)
        assert recipe.schedule.milestones == tuple(fall * per_epoch for fall in falls)
        assert (recipe.schedule.warmup_steps, recipe.schedule.warmup_ratio) == (500, 1e-3)
        assert recipe.optimizer.weight_decay == 0.05
        assert recipe.optimizer.lr == pytest.approx(1e-4 * (2 if batch == 64 else 1))
        assert recipe.backbone.layer_scale == 1.0
        assert isinstance(recipe.task, InstanceSegmentationTask)
        assert bool(recipe.task.image.crop_from) == (epochs == 36)
        assert (recipe.task.image.crop_max_size, recipe.task.image.redraws) == (None, None)
        is_cascade = "cascade" in name
        averaged = EmaConfig(0.9999, warmup_steps=2000) if is_cascade and epochs == 36 else None
        assert recipe.ema == averaged
        rpn = build_proposals(recipe.task.rcnn)
        assert rpn.train().post_nms_top_n() == (2000 if is_cascade else 1000)
        assert rpn.pre_nms_top_n() == 2000
        assert rpn.eval().post_nms_top_n() == rpn.pre_nms_top_n() == 1000


def test_the_backbone_of_a_cascade_learns_slower_towards_its_input() -> None:
    recipe = load_finetune_recipe("internimage_l_cascade_1x")
    dataset: Any = SimpleNamespace(concepts=[Concept(i, str(i)) for i in range(80)])
    assert isinstance(recipe.task, InstanceSegmentationTask)
    with torch.device("meta"):
        model = build_instance_segmentation(recipe.task, recipe.backbone, dataset).model
    scales = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(model, recipe.optimizer)
        for p in group["params"]
    }
    by_name = {name: scales[id(p)] for name, p in model.named_parameters()}
    # 37 blocks, so 39 layers with the stem and the heads; the first block is layer 1
    assert by_name["backbone.patch_embed.conv1.weight"] == pytest.approx((0.94**38, 0.05))
    assert by_name["backbone.levels.0.blocks.0.mlp.fc1.weight"] == pytest.approx((0.94**37, 0.05))
    assert by_name["backbone.levels.3.blocks.4.gamma1"] == pytest.approx((0.94**1, 0.0))
    assert by_name["heads.stages.2.box_predictor.cls_score.weight"] == (1.0, 0.05)
    assert by_name["heads.stages.0.box_head.0.1.weight"] == (1.0, 0.0)


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def mmdet_names(head: str, classes: int, channels: int, fc: int) -> dict[str, Tensor]:
    """Shapes of a public checkpoint's neck and heads, with random values."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[1:2] if "upsample" in name else shape[:1]

    for i in range(4):
        layer(f"neck.lateral_convs.{i}.conv", channels, 16 << i, 1, 1)
        layer(f"neck.fpn_convs.{i}.conv", channels, channels, 3, 3)
    layer("rpn_head.rpn_conv", channels, channels, 3, 3)
    layer("rpn_head.rpn_cls", 3, channels, 1, 1)
    layer("rpn_head.rpn_reg", 12, channels, 1, 1)
    for stage in ("",) if head == "mask_rcnn" else ("0.", "1.", "2."):
        box, mask = f"roi_head.bbox_head.{stage}", f"roi_head.mask_head.{stage}"
        layer(f"{box}shared_fcs.0", fc, channels * 49)
        if head == "mask_rcnn":
            layer(f"{box}shared_fcs.1", fc, fc)
        else:
            for i in range(4):
                layer(f"{box}shared_convs.{i}.conv", channels, channels, 3, 3, bias=False)
                for name in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"{box}shared_convs.{i}.bn.{name}"] = (channels,)
                shapes[f"{box}shared_convs.{i}.bn.num_batches_tracked"] = ()
        layer(f"{box}fc_cls", classes + 1, fc)
        layer(f"{box}fc_reg", 4 * classes, fc)
        for i in range(4):
            layer(f"{mask}convs.{i}.conv", channels, channels, 3, 3)
        layer(f"{mask}upsample", channels, channels, 2, 2)
        layer(f"{mask}conv_logits", classes, channels, 1, 1)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


@pytest.mark.parametrize("head", HEADS)
def test_a_public_checkpoint_fills_the_model_completely(head: Any) -> None:
    task = scenes_task(head)
    official = mmdet_names(head, 32, 8, 16)
    backbone = {f"backbone.{n}": x for n, x in task.model.backbone.state_dict().items()}  # type: ignore[union-attr]
    converted = rcnn_from_mmdet(official | backbone)
    for name, x in converted.items():
        if name.endswith("num_batches_tracked"):
            converted[name] = x.long()
    task.model.load_state_dict(converted, strict=True)


def test_a_public_mask_rcnn_head_gives_its_own_scores_and_deltas() -> None:
    official = mmdet_names("mask_rcnn", 32, 8, 16)
    task = scenes_task("mask_rcnn")
    task.model.load_state_dict(rcnn_from_mmdet(official), strict=False)
    pooled = torch.randn(5, 8, 7, 7, generator=torch.Generator().manual_seed(1))
    heads = task.model.get_submodule("heads")
    logits, deltas = heads.box_predictor(heads.box_head(pooled))
    x = pooled.flatten(1)
    for i in range(2):
        x = linear(x, official, f"roi_head.bbox_head.shared_fcs.{i}").relu()
    # mmdetection: the background is the last class, and has no deltas
    scores = linear(x, official, "roi_head.bbox_head.fc_cls").softmax(-1)
    torch.testing.assert_close(logits.softmax(-1)[:, 1:], scores[:, :-1])
    torch.testing.assert_close(deltas[:, 4:], linear(x, official, "roi_head.bbox_head.fc_reg"))
    maps = torch.randn(2, 8, 14, 14, generator=torch.Generator().manual_seed(2))
    masks = heads.mask_predictor(heads.mask_head(maps))
    y = maps
    for i in range(4):
        name = f"roi_head.mask_head.convs.{i}.conv"
        y = F.conv2d(y, official[f"{name}.weight"], official[f"{name}.bias"], padding=1).relu()
    name = "roi_head.mask_head.upsample"
    y = F.conv_transpose2d(y, official[f"{name}.weight"], official[f"{name}.bias"], 2).relu()
    name = "roi_head.mask_head.conv_logits"
    y = F.conv2d(y, official[f"{name}.weight"], official[f"{name}.bias"])
    torch.testing.assert_close(masks[:, 1:], y)


def test_a_checkpoint_of_another_detector_is_refused() -> None:
    state = {"bbox_head.cls_branches.0.weight": torch.zeros(1), "backbone.x": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 parameters are none.*bbox_head\.cls_branches\.0"):
        rcnn_from_mmdet(state)


# -------------------------------------------------------------------------- learning


def untrained_scores(task: InstanceSegmentation, pictures: int) -> dict[str, float]:
    """Of the first pictures of the split `val`."""
    config, first = ScenesConfig(), 1_000_000_000
    evaluator = task.evaluator()
    task.model.eval()
    for start in range(0, pictures, 10):
        batch = task.collate(
            [
                task.example(scene_sample(config, first + i)[1], None)
                for i in range(start, start + 10)
            ]
        )
        with torch.no_grad():
            evaluator.add(task.model(batch), batch)
    return evaluator.result(evaluator.records())


@pytest.mark.slow
def test_a_small_model_learns_to_find_and_outline_objects(tmp_path: Path) -> None:
    """From scratch, through the commands that the recipe names, in half of its steps."""
    groundwork = str(Path(sys.executable).parent / "groundwork")
    shards, run = str(tmp_path / "scenes"), tmp_path / "run"
    scenes = ("--train", "2000", "--val", "60", "--compositional", "1")
    subprocess.run([groundwork, "shards", "build", "scenes", "--out", shards, *scenes], check=True)
    name = "internimage_scenes_mask_rcnn"
    settings = (f"data.shards={shards}", "train.steps=250", "checkpoint.every_steps=250")
    subprocess.run(
        [groundwork, "finetune", name, "--out", str(run)]
        + [argument for setting in settings for argument in ("--set", setting)],
        check=True,
    )
    trained = json.loads((run / "results.json").read_text())

    recipe = load_finetune_recipe(name, ["task.rcnn.score_threshold=0.0"])
    assert isinstance(recipe.task, InstanceSegmentationTask)
    dataset: Any = SimpleNamespace(concepts=scenes_concepts(ScenesConfig()))
    torch.manual_seed(0)
    untrained = untrained_scores(
        build_instance_segmentation(recipe.task, recipe.backbone, dataset), 60
    )
    for metric in ("box_ap50", "mask_ap50"):
        assert untrained[metric] < 0.02
        assert trained["last"][metric] > 0.12
