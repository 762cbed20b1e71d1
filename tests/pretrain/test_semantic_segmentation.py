"""UperNet over InternImage: transformers' outputs and loss, the published sizes, and learning."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, UperNetForSemanticSegmentation
from transformers import UperNetConfig as HuggingFaceConfig

from groundwork.data.sources.scenes import ScenesConfig, scene_sample
from groundwork.pretrain.downstream.segmentation.data import SegmentationTransform
from groundwork.pretrain.downstream.segmentation.maps import SegmentationLabels
from groundwork.pretrain.downstream.segmentation.semantic_segmentation import (
    Segmenter,
    SemanticSegmentationTask,
    build_semantic_segmentation,
)
from groundwork.pretrain.models.internimage import InternImageConfig
from groundwork.pretrain.models.upernet import UperNet, UperNetConfig

TINY = InternImageConfig(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), drop_path=0.0)
SMALL_HEAD = UperNetConfig(channels=16, auxiliary_channels=8, dropout=0.0)
LABELS = SegmentationLabels(
    num_classes=5,
    names=("background", "sphere", "cube", "cylinder", "cone"),
    member="instances.png",
    instance_field="shape",
)


class NoConcepts(NamedTuple):
    concepts: tuple[Any, ...] = ()


def scenes_task(**transform: Any) -> Any:
    config = SemanticSegmentationTask(
        LABELS, transform=SegmentationTransform(crop=64, **transform), head=SMALL_HEAD
    )
    torch.manual_seed(0)
    return build_semantic_segmentation(config, TINY, NoConcepts())  # type: ignore[arg-type]


class Maps(nn.Module):
    """A backbone of transformers behind our interface; its pictures are used as they are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def features(self, pictures: Tensor) -> list[Tensor]:
        return list(self.model(pictures).feature_maps)


def test_logits_and_loss_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    widths = [8, 16, 24, 32]
    peer = UperNetForSemanticSegmentation(
        HuggingFaceConfig(
            backbone_config=ResNetConfig(
                embedding_size=8,
                hidden_sizes=widths,
                depths=[1, 1, 1, 1],
                layer_type="basic",
                out_features=stages,
            ),
            hidden_size=12,
            auxiliary_channels=6,
            num_labels=7,
        )
    )
    heads = UperNet(UperNetConfig(channels=12, auxiliary_channels=6, dropout=0.0), widths, 7)
    weights = {k: v for k, v in peer.state_dict().items() if not k.startswith("backbone.")}
    heads.load_state_dict(weights, strict=True)  # under the same names
    module = "groundwork.pretrain.downstream.segmentation.semantic_segmentation.normalise"
    monkeypatch.setattr(module, lambda pictures, *_: pictures)
    ours = Segmenter(Maps(peer.backbone), heads)

    pictures, labels = torch.randn(3, 3, 64, 64), torch.randint(7, (3, 64, 64))
    labels[:, :20] = 255
    ours.eval()
    peer.eval()
    with torch.no_grad():
        expected = peer(pictures).logits.argmax(1)
        found = ours({"views": [list(pictures)], "labels": list(labels)})
    assert torch.equal(torch.stack(found), expected)

    ours.train()
    peer.train()
    losses = ours({"views": [list(pictures)], "labels": list(labels)})
    torch.testing.assert_close(losses["loss"], peer(pictures, labels=labels).loss)


@pytest.mark.parametrize(
    ("variant", "millions"),
    [("t", 59), ("s", 80), ("b", 128), ("l", 256), ("xl", 368), ("h", 1120)],
)
def test_sizes_are_the_published_ones(variant: str, millions: int) -> None:
    task = SemanticSegmentationTask(SegmentationLabels(num_classes=150, zero_is_ignored=True))
    config = InternImageConfig.variant(variant)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = build_semantic_segmentation(task, config, NoConcepts()).model  # type: ignore[arg-type]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.6 if millions < 1000 else 6)
    assert not [
        name for name, _ in model.named_parameters() if "clip" in name or "conv_head" in name
    ]


def test_it_learns_a_few_scenes_by_heart() -> None:
    task = scenes_task(scale=(1.0, 1.0), flip=0.0, distortion=False, cat_max_ratio=1.0)
    scenes = ScenesConfig(image_size=64, objects=(1, 3))
    samples = [scene_sample(scenes, index)[1] for index in range(4)]
    batch = task.collate([task.example(sample, np.random.default_rng(0)) for sample in samples])

    def mean_iou() -> float:
        task.model.eval()
        evaluator = task.evaluator()
        held = task.collate([task.example(sample, None) for sample in samples])
        with torch.no_grad():
            evaluator.add(task.model(held), held)
        return float(evaluator.result(evaluator.records())["mean_iou"])

    before = mean_iou()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=5e-3)
    for _ in range(60):
        task.model.train()
        losses = task.model(batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert all(p.grad is not None for p in task.model.parameters())
    assert before < 0.3 and mean_iou() > 0.55
    assert set(losses) == {"loss", "loss_main", "loss_auxiliary", "pixel_accuracy"}


def test_pictures_of_different_size_are_predicted_as_alone() -> None:
    task = scenes_task()
    task.model.eval()
    sizes = (64, 96, 64)
    samples = [scene_sample(ScenesConfig(image_size=s), n)[1] for n, s in enumerate(sizes)]
    examples = [task.example(sample, None) for sample in samples]
    examples[1] = examples[1]._replace(views=[examples[1].views[0][:, :32]])
    with torch.no_grad():
        together = task.model(task.collate(examples))
        alone = [task.model(task.collate([example]))[0] for example in examples]
    assert [tuple(p.shape) for p in together] == [(s, s) for s in sizes]
    for a, b in zip(together, alone, strict=True):
        assert (a == b).float().mean() > 0.999  # sums of another order decide ties


def test_scales_and_mirror_images_are_averaged() -> None:
    sample = scene_sample(ScenesConfig(image_size=64), 7)[1]
    task = scenes_task(test_scales=(0.5, 1.0), test_flip=True)
    model = task.model.eval()
    example = task.example(sample, None)
    with torch.no_grad():
        (found,) = model(task.collate([example]))
        total = torch.zeros(5, 64, 64)
        for view in example.views:
            for turned in (view, view.flip(2)):
                pixels = turned[None].float() / 255
                mean, std = (
                    torch.tensor(v).view(3, 1, 1)
                    for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
                )
                logits, _ = model.heads(model.backbone.features((pixels - mean) / std))
                logits = nn.functional.interpolate(logits, (64, 64), mode="bilinear")
                if turned is not view:
                    logits = logits.flip(3)
                total += logits[0].softmax(0)
    assert (found == total.argmax(0)).float().mean() > 0.999


def test_a_batch_without_a_labelled_pixel_gives_zero_and_not_nan() -> None:
    task = scenes_task()
    views = [torch.zeros(3, 64, 64, dtype=torch.uint8)] * 2
    labels = [torch.full((64, 64), 255, dtype=torch.int32)] * 2
    losses = task.model.train()({"views": [views], "labels": labels})
    losses["loss"].backward()
    assert losses["loss"] == 0
    assert all(bool((p.grad == 0).all()) for p in task.model.parameters())


def test_one_picture_per_device_is_explained() -> None:
    task = scenes_task()
    example = task.example(
        scene_sample(ScenesConfig(image_size=64), 0)[1], np.random.default_rng(0)
    )
    with pytest.raises(ValueError, match="at least 2 pictures per device"):
        task.model.train()(task.collate([example]))


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 0},
        {"pool_sizes": ()},
        {"auxiliary_stage": 4},
        {"auxiliary_weight": -1.0},
        {"dropout": 1.0},
    ],
)
def test_a_head_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(UperNetConfig(), **change)


def test_without_an_auxiliary_head() -> None:
    heads = UperNet(replace(SMALL_HEAD, auxiliary_weight=0.0), [16, 32, 64, 128], 5)
    assert heads.auxiliary_head is None
    maps = [torch.randn(2, 16 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(4)]
    logits, auxiliary = heads.train()(maps)
    assert logits.shape == (2, 5, 16, 16) and auxiliary is None
