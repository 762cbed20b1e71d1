"""Classification of labelled pictures: the augmentation, the objective, and a run of two ranks."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwork.data.dataset import open_dataset
from groundwork.data.samples import Sample, SampleError
from groundwork.data.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from groundwork.pretrain.kinds import DATA
from groundwork.pretrain.labelled_images import LabelledImageDecoder, collate_labelled
from groundwork.pretrain.objectives.classification import Classification, ClassificationConfig
from groundwork.pretrain.recipe import RecipeError, load_recipe
from groundwork.pretrain.run import batch_plan

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


def decoder(classes: int = 6, augment: str | None = RAND_AUGMENT) -> LabelledImageDecoder:
    return LabelledImageDecoder(ImageTransform(size=32), classes, augment)


def first_sample(shards: Path) -> Sample:
    return open_dataset(str(shards), "train").read(0)


class Logits(nn.Module):
    """Scores of six classes, from the mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 6)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return self.head(x.mean((2, 3)))


def objective(**config: float) -> tuple[Classification, Logits]:
    torch.manual_seed(0)
    model = Logits()
    made = Classification(
        model,
        ClassificationConfig(**config),
        6,
        IMAGENET_MEAN,
        IMAGENET_STD,  # type: ignore[arg-type]
    )
    return made, model


def a_batch(size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return {"image": image, "labels": torch.arange(size) % 6}


def test_a_picture_depends_on_its_generator_alone(tiny_shards: Path) -> None:
    sample = first_sample(tiny_shards)
    one = decoder()(sample, np.random.default_rng(5))
    random.seed(99)
    np.random.seed(99)
    states = random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    again = decoder()(sample, np.random.default_rng(5))
    other = decoder()(sample, np.random.default_rng(6))
    assert torch.equal(one.image, again.image) and one.label == again.label
    assert not torch.equal(one.image, other.image)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]


def test_rand_augment_changes_pictures(tiny_shards: Path) -> None:
    sample = first_sample(tiny_shards)
    changed = 0
    for seed in range(20):
        plain = decoder(augment=None)(sample, np.random.default_rng(seed)).image
        changed += not torch.equal(plain, decoder()(sample, np.random.default_rng(seed)).image)
    assert changed >= 10


def test_a_class_the_model_has_not_is_a_bad_sample(tiny_shards: Path) -> None:
    dataset = open_dataset(str(tiny_shards), "train")
    labels = {decoder()(dataset.read(i), np.random.default_rng(0)).label for i in range(24)}
    assert max(labels) == 5
    sample = next(s for i in range(24) if (s := dataset.read(i)).info["label"] == 5)
    with pytest.raises(SampleError, match=r"json.label is 5; the model has the classes 0 to 4"):
        decoder(classes=5)(sample, np.random.default_rng(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_the_loss_is_that_of_torch(smoothing: float) -> None:
    module, model = objective(label_smoothing=smoothing)
    batch = a_batch()
    output = module(batch, torch.float32)
    assert model.seen is not None
    logits = model.head(model.seen.mean((2, 3)))
    expected = F.cross_entropy(logits, batch["labels"], label_smoothing=smoothing)
    torch.testing.assert_close(output["loss"], expected)
    assert output["top1"] == (logits.argmax(1) == batch["labels"]).float().mean()
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(model.seen, (batch["image"] / 255 - mean) / std)


def test_mixed_targets_follow_the_mixed_pixels() -> None:
    module, model = objective(label_smoothing=0.1, mixup=0.8)
    batch = a_batch()
    plain = module.normalise(batch["image"], torch.float32)
    np.random.seed(4)
    output = module(batch, torch.float32)
    assert model.seen is not None
    flipped = plain.flip(0)
    ratio = ((model.seen - flipped) * (plain - flipped)).sum() / (plain - flipped).square().sum()
    assert 0 < ratio < 1
    torch.testing.assert_close(model.seen, ratio * plain + (1 - ratio) * flipped)
    logits = model.head(model.seen.mean((2, 3)))
    labels = batch["labels"]
    expected = ratio * F.cross_entropy(logits, labels, label_smoothing=0.1)
    expected += (1 - ratio) * F.cross_entropy(logits, labels.flip(0), label_smoothing=0.1)
    torch.testing.assert_close(output["loss"], expected, rtol=1e-4, atol=1e-5)


def test_evaluation_neither_mixes_nor_erases() -> None:
    module, model = objective(mixup=0.8, cutmix=1.0, random_erasing=1.0)
    module.eval()
    module(a_batch(), torch.float32)
    plain = module.normalise(a_batch()["image"], torch.float32)
    assert model.seen is not None
    torch.testing.assert_close(model.seen, plain)
    module.train()
    module(a_batch(), torch.float32)
    assert model.seen is not None
    assert not torch.equal(model.seen, plain)


@pytest.mark.parametrize(
    ("key", "value"),
    [("label_smoothing", 1.0), ("mixup", -1.0), ("random_erasing", 1.5), ("mix_prob", 2.0)],
)
def test_settings_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{key} is {value}"):
        ClassificationConfig(**{key: value})  # type: ignore[arg-type]


def settings(shards: Path) -> list[str]:
    return [
        *(f"data.shards={shards}", "data.image.size=32", "model.num_classes=6"),
        *("model.channels=16", "model.depths=[1, 1, 1, 1]", "model.groups=[1, 2, 4, 8]"),
        *("train.steps=4", "train.global_batch=8", "schedule.warmup_steps=1"),
    ]


def test_mistakes_of_a_recipe_are_told_before_the_start(tiny_shards: Path) -> None:
    good = settings(tiny_shards)
    recipe = load_recipe("internimage_emoji", [*good, "model.num_classes=5"])
    with pytest.raises(RecipeError, match=r"model.num_classes is 5, but .* class 5 \('blue bar'\)"):
        DATA["labelled_images"].open(recipe)
    with pytest.raises(RecipeError, match="need an even number"):
        batch_plan(load_recipe("internimage_emoji", [*good, "train.global_batch=3"]), 1, 0)
    for wrong, message in (
        ("data.rand_augment=auto", "data.rand_augment is 'auto', which timm does not understand"),
        ("data.rand_augment=rand-x9", "data.rand_augment is 'rand-x9'"),
        ("data.rand_augment=rand-m9-foo", "with a number, or t with a name"),
        ("model.num_classes=0", "needs at least 1"),
        ("objective={kind: unicl}", "takes 'klite'"),
        ("objective.kind=clasification", "choose among .*classification"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe("internimage_emoji", [*good, wrong])


def test_batches_are_bytes_and_classes(tiny_shards: Path) -> None:
    recipe = load_recipe("internimage_emoji", settings(tiny_shards))
    data = DATA["labelled_images"].open(recipe)
    examples, faults = DATA["labelled_images"].stream(recipe, data).__getitems__(list(range(12)))
    batch = collate_labelled(examples)
    assert faults == ()
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (12, 3, 32, 32)
    assert set(batch["labels"].tolist()) <= set(range(6))
